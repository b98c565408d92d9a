#!/usr/bin/env bash
# compute-sanitizer over a small set of problems that reaches every kernel: memory, races in shared
# memory, and numbers that nobody wrote. Needs a GPU, and CUDA's compute-sanitizer on the path.
# Kernels are compiled first. Then the tools run side by side, each in PARTS processes, and in one
# more whose kernel does everything wrong, which each has to find. Arguments go to run_gpu.py.
#
#   TOOLS    of memcheck, racecheck, initcheck (all)
#   PARTS    processes of each tool (4)
#   LIMIT    seconds after which no tool begins another problem (360); it has one minute more to end
#   REPORTS  a folder for what they say (a new one)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PARTS=${PARTS:-4}
LIMIT=${LIMIT:-360}
REPORTS=${REPORTS:-$(mktemp -d)}
read -ra tools <<< "${TOOLS:-memcheck racecheck initcheck}"
mkdir -p "$REPORTS"
TRITON_CACHE_DIR=$(mktemp -d)
export TRITON_CACHE_DIR
trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT
# One allocation for each tensor: in torch's own pool, what lies beyond a tensor is still readable.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

echo "== compiling; reports go to $REPORTS"
code=0
"$PYTHON" tests/run_gpu.py --only sanitize "$@" || code=1
# With arguments, it may be a part of the set.
[ $# -gt 0 ] || "$PYTHON" tests/reports.py reached "$TRITON_CACHE_DIR" || code=1
"$PYTHON" tests/wrong_kernel.py
echo "== compiled in $SECONDS s"

names=()
for name in $("$PYTHON" tests/reports.py names); do
    names+=(--kernel-name "kernel_substring=$name")
done
if ! compute-sanitizer "${names[@]}" --version > /dev/null; then
    echo "== no filters by name here: torch's kernels are looked at, too"
    names=()
fi
check() {
    local tool=$1 report=$REPORTS/$1.$2.log begun=$SECONDS more=()
    shift 2
    # initcheck has to see what torch's kernels write.
    [ "$tool" = initcheck ] || more=("${names[@]}")
    timeout --kill-after 10 $((LIMIT + 60)) compute-sanitizer --tool "$tool" "${more[@]}" \
        --show-backtrace no --print-limit 100000 "$PYTHON" "$@" > "$report" 2>&1 || true
    echo "== $(basename "$report" .log) ended after $((SECONDS - begun)) s"
}
for tool in "${tools[@]}"; do
    more=()
    [ "$tool" = initcheck ] && more=(--unfilled)
    check "$tool" wrong tests/wrong_kernel.py &
    for ((part = 0; part < PARTS; part++)); do
        check "$tool" "$part" tests/run_gpu.py --workers 0 --only sanitize --each \
            --share "$part/$PARTS" --limit "$LIMIT" "${more[@]}" "$@" &
    done
done
wait
for tool in "${tools[@]}"; do
    "$PYTHON" tests/reports.py "$tool" "$REPORTS/$tool".*.log || code=1
done
echo "== $SECONDS s in all"
exit $code
