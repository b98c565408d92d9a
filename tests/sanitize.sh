#!/usr/bin/env bash
# compute-sanitizer over a small set of problems that reaches every kernel: memory, then races in
# shared memory. Needs a GPU and CUDA's compute-sanitizer on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
# One allocation for each tensor: in torch's own pool, what lies beyond a tensor is still readable.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in ${TOOLS:-memcheck racecheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
        "$PYTHON" tests/run_gpu.py --workers 0 --only sanitize
done
