#!/usr/bin/env bash
# The command line on a GPU, as a person would use it: bash benchmarks/profiler_check.sh [FOLDER]
# Takes about three minutes; what does not fit into four is skipped. What the commands print is kept
# in FOLDER/profiler_check (default: in $OUT, or in a new folder); here appear a line for each
# expectation, PASS, FAIL or SKIP, and the ends of what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
folder="${1:-${OUT:-$(mktemp -d)}}/profiler_check"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
natten=(python -m natten.cli)
hunyuan=(-i 30 48 80 -w 18 24 24 -n 24 -d 128 --dtype bf16)
flux=(-i 256 256 -w 80 -n 24 -d 128 --dtype bf16)
SECONDS=0

verdict() { # verdict PASS|FAIL|SKIP NAME TEXT
    printf '%-4s  %-12s  %s\n' "$1" "$2" "$3" | tee -a "$folder/summary.txt"
}

run() { # run NAME CODE COMMAND...: its output in NAME.txt, and the exit code it must have
    local name="$1" code="$2" begin="$SECONDS" got
    shift 2
    if [ "$begin" -gt "${LATEST:-190}" ]; then
        verdict SKIP "$name" "no time left"
        return
    fi
    timeout -k 5 100 "$@" > "$folder/$name.txt" 2>&1
    got=$?
    if [ "$got" != "$code" ]; then
        verdict FAIL "$name" "exit code $got, expected $code ($((SECONDS - begin)) s)"
    elif grep -q Traceback "$folder/$name.txt"; then
        verdict FAIL "$name" "a traceback ($((SECONDS - begin)) s)"
    else
        verdict PASS "$name" "$((SECONDS - begin)) s"
    fi
}

holds() { # holds NAME FILE EXPRESSION: of the JSON document d, with a text to show
    if [ ! -s "$folder/$2" ]; then
        verdict SKIP "$1" "there is no $2"
        return
    fi
    python - "$folder/$2" "$3" > "$folder/$1.txt" 2>&1 <<'PYTHON'
import json, sys
d = json.load(open(sys.argv[1]))
good, text = eval(sys.argv[2])
print(text)
sys.exit(not good)
PYTHON
    if [ $? = 0 ]; then
        verdict PASS "$1" "$(tail -1 "$folder/$1.txt")"
    else
        verdict FAIL "$1" "$(tail -1 "$folder/$1.txt")"
    fi
}

rm -f "$folder"/*.txt "$folder"/*.json
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device here")' \
    || exit 2
# The search first, with the machine to itself: how long it takes is one of the goals.
run optimize 0 "${natten[@]}" profile "${hunyuan[@]}" --optimize --optimize-seconds 35 \
    --warmup-steps 2 --baseline --save "$folder/profile.json" --json "$folder/optimize.json"
holds in-a-minute optimize.json \
    '(d["optimized"]["seconds"] < 60 and d["optimized"]["trials"] > 5, "{trials} configurations in {seconds:.0f} s: {backend}, {ms:.2f} ms".format(**d["optimized"]))'
run applied 0 env NATTEN_PROFILE="$folder/profile.json" "${natten[@]}" profile "${hunyuan[@]}" \
    --warmup-steps 2 --baseline --json "$folder/applied.json"
holds as-fast applied.json \
    "(d['subject']['total_ms'] < 1.1 * json.load(open('$folder/optimize.json'))['optimized']['ms'], '%.2f ms with the profile' % d['subject']['total_ms'])"
# These need little of the GPU.
run explain 0 "${natten[@]}" explain "${hunyuan[@]}" --backprop &
run dry-run 0 "${natten[@]}" profile "${hunyuan[@]}" --dry-run --max-configs 5 &
run memory 2 "${natten[@]}" profile -i 4096 4096 -w 3 -n 512 &
run absent 2 "${natten[@]}" profile "${hunyuan[@]}" --device cuda:99 &
echo '{"format": "natten profile"' > "$folder/corrupt.json"
run corrupt 2 env NATTEN_PROFILE="$folder/corrupt.json" "${natten[@]}" explain "${hunyuan[@]}" &
run predictions 0 python benchmarks/predictions.py &
# As Ctrl-C does, 15 s after everything is loaded. (A shell without a terminal may ignore SIGINT.)
run interrupted 0 python -c 'if True:
    import os, signal, sys, threading
    import natten.profiler.run
    from natten.cli import main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(15, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    sys.exit(main(sys.argv[1:]))' profile "${hunyuan[@]}" --optimize --warmup-steps 1 --baseline \
    --save "$folder/interrupted.json" --json "$folder/stopped.json"
holds best-so-far stopped.json \
    '(d["optimized"]["interrupted"] and d["optimized"]["trials"] > 0, "stopped after {trials} configurations: {ms:.2f} ms".format(**d["optimized"]))'
wait
run baselines 0 "${natten[@]}" profile "${flux[@]}" --warmup-steps 2 \
    --baseline dense cudnn fav2 flex xformers --json "$folder/baselines.json"
holds all-timed baselines.json \
    '([b["name"] for b in d["baselines"] if b["failure"] and "xFormers" not in b["name"]] == [], "; ".join("%s %s" % (b["name"], b["failure"] or "%.1f ms" % b["forward_ms"]) for b in d["baselines"]))'
run backprop 0 "${natten[@]}" profile -i 56 56 -w 7 -b 128 -n 2 -d 32 --dtype bf16 --backprop \
    --json "$folder/backprop.json"
holds named backprop.json \
    '({"attention, forward", "gradient of queries"} <= {o["name"] for o in d["subject"]["operations"]}, ", ".join("%s %.2f ms" % (o["name"], o["ms"]) for o in d["subject"]["operations"][:4]))'
run compiled 0 "${natten[@]}" profile -i 64 64 -w 13 -n 8 --dtype bf16 --backend flex-fna --compile \
    --warmup-steps 1 --baseline
run info 0 "${natten[@]}" info
if python -c 'import pytest' 2> /dev/null; then
    # Without the project's settings, which ask for plugins that may be missing.
    LATEST=150 run tests 0 python -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider -m gpu \
        tests/test_profiler.py
else
    verdict SKIP tests "pytest is not installed"
fi

while read -r state name _; do
    if [ "$state" = FAIL ]; then
        printf -- '--- %s\n' "$name"
        tail -4 "$folder/$name.txt" | cut -c 1-300
    fi
done < "$folder/summary.txt"
echo "$SECONDS s; details in $folder"
for state in PASS FAIL SKIP; do
    printf '%s %s  ' "$(grep -c "^$state" "$folder/summary.txt")" "$state"
done
echo
! grep -q '^FAIL' "$folder/summary.txt"
