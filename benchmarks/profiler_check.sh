#!/usr/bin/env bash
# The command line on a GPU, as a person would use it: bash benchmarks/profiler_check.sh [FOLDER]
# Prints what each command printed, and PASS or FAIL a line for each expectation at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
folder="${1:-$(mktemp -d)}"
mkdir -p "$folder"
natten=(python -m natten.cli)
hunyuan=(-i 30 48 80 -w 18 24 24 -n 24 -d 128 --dtype bf16)
flux=(-i 256 256 -w 80 -n 24 -d 128 --dtype bf16)
summary=()

expect() { # expect NAME CODE COMMAND...
    local name="$1" code="$2" begin end got
    shift 2
    echo "== $name: $*"
    begin=$(date +%s)
    "$@" > "$folder/$name.txt" 2>&1
    got=$?
    end=$(date +%s)
    cat "$folder/$name.txt"
    if [ "$got" = "$code" ] && ! grep -q Traceback "$folder/$name.txt"; then
        summary+=("PASS $name ($((end - begin)) s)")
    else
        summary+=("FAIL $name: exit code $got, expected $code ($((end - begin)) s)")
    fi
}

expect info 0 "${natten[@]}" info
expect tests 0 python -m pytest -q -m gpu tests/test_profiler.py
expect explain 0 "${natten[@]}" explain "${hunyuan[@]}" --backprop
expect dry-run 0 "${natten[@]}" profile "${hunyuan[@]}" --dry-run --max-configs 5
expect baselines 0 "${natten[@]}" profile "${flux[@]}" --warmup-steps 3 \
    --baseline dense cudnn fav2 flex xformers --json "$folder/baselines.json"
expect backprop 0 "${natten[@]}" profile -i 56 56 -w 7 -b 128 -n 2 -d 32 --dtype bf16 --backprop
expect optimize 0 "${natten[@]}" profile "${hunyuan[@]}" --optimize --warmup-steps 2 \
    --save "$folder/profile.json" --baseline --json "$folder/optimize.json"
expect applied 0 env NATTEN_PROFILE="$folder/profile.json" "${natten[@]}" profile "${hunyuan[@]}" \
    --warmup-steps 2 --baseline
expect memory 2 "${natten[@]}" profile -i 4096 4096 -w 3 -n 512
expect foreign 2 "${natten[@]}" profile "${hunyuan[@]}" --device cuda:99
expect predictions 0 python benchmarks/predictions.py
printf '%s\n' "${summary[@]}"
! printf '%s\n' "${summary[@]}" | grep -q FAIL
