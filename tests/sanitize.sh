#!/usr/bin/env bash
# compute-sanitizer over a small set of problems that reaches every kernel: memory, races in shared
# memory, then numbers that nobody wrote. Needs a GPU and CUDA's compute-sanitizer on the path. Arguments go to run_gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
# One allocation for each tensor: in torch's own pool, what lies beyond a tensor is still readable.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
report=$(mktemp)
trap 'rm -f "$report"' EXIT
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
    echo "== $tool"
    # racecheck's verdict is that of races.py, which fails if there is no complete report.
    code=1
    [ "$tool" = racecheck ] && code=0
    more=()
    [ "$tool" = initcheck ] && more=(--unfilled)
    compute-sanitizer --tool "$tool" --error-exitcode "$code" --print-limit 1000 \
        "$PYTHON" tests/run_gpu.py --workers 0 --only sanitize "${more[@]}" "$@" | tee "$report"
    if [ "$tool" = racecheck ]; then
        "$PYTHON" tests/races.py "$report"
        # Its exit code says nothing of the program's.
        ! grep -q "Target application returned an error" "$report"
    fi
done
