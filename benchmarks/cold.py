"""Seconds until the first calls of a process have results: with nothing compiled, and after that.

    python benchmarks/cold.py --output benchmarks/results/cold.json

Each case runs in processes of its own, one after the other: the first finds an empty cache of
compiled kernels, the next one what that left there, the last what ``natten.precompile`` left in
another one. Times start when torch has been imported and CUDA has been initialized, which every
program needs; they hold the import of natten, compilation, and waiting for the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Grid, window, heads, head_dim.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "small window, 2-D": ((56, 56), (7, 7), 2, 32),
    "large window, 2-D": ((128, 128), (40, 40), 8, 128),
    "large window, 3-D": ((24, 32, 32), (12, 12, 12), 8, 128),
    "dense": ((64, 64), (64, 64), 8, 64),
}

PROGRAM = """
import json, sys, time
import torch
grid, window, heads, head_dim, what = json.loads(sys.argv[1])
tensors = [
    torch.randn(1, *grid, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3)
]
gradient = torch.randn(1, *grid, heads, head_dim, device="cuda", dtype=torch.bfloat16)
torch.autograd.grad(tensors[0] * tensors[1], tensors[:2], gradient)
torch.cuda.synchronize()
times = [time.perf_counter()]
def now():
    torch.cuda.synchronize()
    times.append(time.perf_counter())
import natten
now()
operation = getattr(natten, f"na{len(grid)}d")
if what == "precompile":
    natten.precompile(lambda *qkv: operation(*qkv, window), *tensors)
else:
    out = operation(*tensors, window)
    now()
    torch.autograd.grad(out, tensors, gradient)
now()
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def seconds(case: tuple[object, ...], what: str, cache: str) -> list[float]:
    """Between the points that the program notes, in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*case, what])],
        # With bytecode, as an installed package has it.
        env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: list[float] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    options = parser.parse_args()
    import torch
    import triton

    table = Table("case", "cache", "import", "forward", "backward", "all", title="seconds")
    results = []
    for name in options.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
            rows = [("empty", seconds(case, "call", cache)), ("full", seconds(case, "call", cache))]
            imported, compiling = seconds(case, "precompile", other)
            rows.append(("precompiled", seconds(case, "call", other)))
        results.append({"case": name, "precompile": compiling, **dict(rows)})
        for what, times in rows:
            table.add_row(name, what, *[f"{t:.2f}" for t in (*times, sum(times))])
        table.add_row(name, "precompile", f"{imported:.2f}", "", "", f"{compiling:.2f}")
    Console(width=100).print(table)
    if options.output is not None:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cpus": os.cpu_count(),
        }
        text = json.dumps({"machine": machine, "seconds": results}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
