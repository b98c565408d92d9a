"""Time the CPU backend against what torch offers, after checking that it is right.

    python benchmarks/cpu.py            everything, under four minutes on two cores
    python benchmarks/cpu.py --quick    fewer rounds, two cases

Every case is compared with the float64 reference first, gradients included. The contenders are
timed in turns, so that a busy moment of the machine hits all of them; tables show medians. Results
go to a JSON file with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from natten import na2d
from natten.window import Axis, grid_mask, mask

# batch, heads, height, width, head_dim; kernel_size
CASES = [
    ((8, 2, 56, 56, 32), 7),
    ((8, 4, 28, 28, 32), 7),
    ((2, 8, 64, 64, 64), 7),
    ((1, 8, 96, 96, 64), 13),
]
GOAL = 6.0
console = Console(width=None if sys.stdout.isatty() else 120)
Contender = Callable[[], Any]


def in_turns(contenders: dict[str, Contender], seconds: float, least: int) -> dict[str, float]:
    """Median milliseconds of each contender, which run one after the other, round by round.

    Each gets about `seconds`, and at least `least` rounds after one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    while True:
        waiting = [n for n, t in times.items() if len(t) < least or sum(t) < 1e3 * seconds]
        if not waiting:
            return {name: statistics.median(t) for name, t in times.items()}
        for name in waiting:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - start))


def inputs_of(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, *grid, dim = case
    torch.manual_seed(0)
    return [torch.randn(batch, *grid, heads, dim).to(dtype).requires_grad_() for _ in range(3)]


def worst_error(case: tuple[int, ...], kernel_size: int, dtype: torch.dtype) -> float:
    """Largest error of output and gradients, relative to the largest value of each."""
    inputs = inputs_of(case, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out = na2d(*inputs, kernel_size=kernel_size, backend="cpu")
    exact = na2d(*exact_inputs, kernel_size=kernel_size, backend="reference")
    grad = torch.randn_like(out)
    pairs = [(out, exact)]
    pairs += zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(exact, exact_inputs, grad.double()),
    )
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def contenders_of(
    case: tuple[int, ...], kernel_size: int, backward: bool, flex: bool
) -> dict[str, Contender]:
    """The same attention three ways: heads last for ours, heads first for torch's."""
    height, width = case[2:4]
    inputs = inputs_of(case)
    axes = [Axis(height, kernel_size), Axis(width, kernel_size)]
    flat = [x.detach().flatten(1, 2).transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    visible = grid_mask(axes)

    def step(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Contender:
        if not backward:
            # FlexAttention refuses tensors that require gradients on the CPU.
            plain = [x.detach() for x in tensors]
            return lambda: attend(*plain)
        grad = torch.randn_like(tensors[0])
        return lambda: torch.autograd.grad(attend(*tensors), tensors, grad)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return na2d(q, k, v, kernel_size=kernel_size, backend="cpu")

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)

    found = {"natten cpu": step(ours, inputs), "SDPA + mask": step(sdpa, flat)}
    if flex and not backward:

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return mask((q // width, q % width), (k // width, k % width), axes)

        tokens = height * width
        blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device="cpu")
        # One compilation for all shapes takes longer than one for each.
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(q, k, v, block_mask=blocks)

        call = step(flexible, flat)
        try:
            call()
            found["FlexAttention"] = call
        except Exception as error:  # a machine without a C++ compiler
            console.print(f"compiled FlexAttention does not run here: {str(error)[:200]}")
    return found


def compare(cases: list[Any], seconds: float, flex: bool) -> list[dict[str, Any]]:
    """Both passes of every case against torch's ways."""
    rows = []
    table = Table(title="float32, milliseconds (median)")
    for column in ("case [B, H, X, Y, D], k", "pass", "error", "natten cpu", "SDPA + mask"):
        table.add_column(column, justify="left" if column[0] in "cp" else "right")
    table.add_column("FlexAttention", justify="right")
    table.add_column("times faster", justify="right")
    for case, kernel_size in cases:
        error = worst_error(case, kernel_size, torch.float32)
        if error > 1e-5:
            raise SystemExit(f"wrong result: relative error {error:.3g} in {case}, {kernel_size}")
        for backward in (False, True):
            contenders = contenders_of(case, kernel_size, backward, flex)
            times = in_turns(contenders, seconds, least=3)
            own = times.pop("natten cpu")
            speedup = min(times.values()) / own
            rows.append({
                "case": case, "kernel_size": kernel_size, "pass": "forward+backward" if backward
                else "forward", "error": error, "natten_ms": own, "others_ms": times,
                "times_faster": speedup,
            })  # fmt: skip
            table.add_row(
                f"{list(case)}, {kernel_size}", rows[-1]["pass"], f"{error:.1e}", f"{own:.2f}",
                f"{times['SDPA + mask']:.1f}",
                f"{times['FlexAttention']:.1f}" if "FlexAttention" in times else "",
                f"[{'green' if speedup >= GOAL else 'red'}]{speedup:.1f}",
            )  # fmt: skip
    console.print(table)
    return rows


def linearity(sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """The cost of a token, at more and more tokens."""
    table = Table(title="cost of a token: [1, 2, n, n, 32], 7, float32")
    for column in ("n", "forward ms", "ns a token", "forward+backward ms", "ns a token"):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        inputs = inputs_of((1, 2, size, size, 32))
        grad = torch.randn_like(inputs[0])

        def forward(inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return na2d(*inputs, kernel_size=7, backend="cpu")

        def both(inputs: list[Tensor] = inputs, grad: Tensor = grad) -> Any:
            out = na2d(*inputs, kernel_size=7, backend="cpu")
            return torch.autograd.grad(out, inputs, grad)

        times = in_turns({"forward": forward, "both": both}, seconds, least=3)
        tokens = size * size
        rows.append({"n": size, **{f"{k}_ms": v for k, v in times.items()}})
        table.add_row(
            str(size), f"{times['forward']:.2f}", f"{1e6 * times['forward'] / tokens:.0f}",
            f"{times['both']:.2f}", f"{1e6 * times['both'] / tokens:.0f}",
        )  # fmt: skip
    console.print(table)
    return rows


def types(seconds: float) -> list[dict[str, Any]]:
    """All storage types on one case."""
    case, kernel_size = CASES[2]
    table = Table(title=f"types: {list(case)}, {kernel_size}")
    for column in ("type", "error", "forward ms", "forward+backward ms"):
        table.add_column(column, justify="left" if column == "type" else "right")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        error = worst_error(case, kernel_size, dtype)
        inputs = inputs_of(case, dtype)
        grad = torch.randn_like(inputs[0])

        def forward(inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return na2d(*inputs, kernel_size=kernel_size, backend="cpu")

        def both(inputs: list[Tensor] = inputs, grad: Tensor = grad) -> Any:
            out = na2d(*inputs, kernel_size=kernel_size, backend="cpu")
            return torch.autograd.grad(out, inputs, grad)

        times = in_turns({"forward": forward, "both": both}, seconds, least=3)
        name = str(dtype).removeprefix("torch.")
        rows.append({"dtype": name, "error": error, **{f"{k}_ms": v for k, v in times.items()}})
        table.add_row(name, f"{error:.1e}", f"{times['forward']:.2f}", f"{times['both']:.2f}")
    console.print(table)
    return rows


FIRST_CALL = """
    import time, torch
    from natten import na2d
    torch.set_num_threads({threads})
    x = torch.randn(1, 16, 16, 2, 32, requires_grad=True)
    start = time.perf_counter()
    na2d(x, x, x, kernel_size=7, backend="cpu").sum().backward()
    print(time.perf_counter() - start)
"""
PEAK = """
    from pathlib import Path
    import torch
    from natten import na2d
    torch.set_num_threads({threads})
    x = torch.randn(1, 8, 8, 4, 32)
    na2d(x, x, x, kernel_size=7, backend="cpu")
    q, k, v = (torch.randn({batch}, {height}, {width}, {heads}, {dim}) for _ in range(3))
    Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    before = peak()
    out = na2d(q, k, v, kernel_size={kernel_size}, backend="cpu")
    print((peak() - before) / out.nbytes)
"""


def in_fresh_process(script: str, cache: str, **values: Any) -> float:
    """The number that a script prints."""
    threads = torch.get_num_threads()
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script).format(threads=threads, **values)],
        env=os.environ | {"NUMBA_CACHE_DIR": cache}, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return float(ran.stdout)


def footprint(cases: list[Any]) -> dict[str, Any]:
    """First-call time, and peak memory of the forward pass."""
    table = Table(title="footprint")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("goal", justify="right")
    with tempfile.TemporaryDirectory() as cache:
        first, second = (in_fresh_process(FIRST_CALL, cache) for _ in range(2))
        table.add_row("first forward and backward pass, compiling", f"{first:.1f} s", "< 15 s")
        table.add_row("the same in the next process, from disk", f"{second:.1f} s", "")
        peaks = []
        if platform.system() == "Linux":
            for case, kernel_size in cases:
                names = ("batch", "heads", "height", "width", "dim")
                values = dict(zip(names, case)) | {"kernel_size": kernel_size}
                peak = in_fresh_process(PEAK, cache, **values)
                peaks.append({"case": case, "kernel_size": kernel_size, "outputs": peak})
                table.add_row(
                    f"peak extra memory of {list(case)}, {kernel_size}, the output included",
                    f"{peak:.2f} outputs", "< 2",
                )  # fmt: skip
    console.print(table)
    return {"first_call_s": first, "cached_call_s": second, "peak_memory": peaks}


def machine() -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    import numba

    return {
        "processor": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, two cases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("cpu.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(options.threads)
    cases = CASES[:2] if options.quick else CASES
    seconds = 0.3 if options.quick else 1.5
    found: dict[str, Any] = {"machine": machine()}
    console.print(" · ".join(f"{k} {v}" for k, v in found["machine"].items()))
    found["cases"] = compare(cases, seconds, flex=not options.no_flex)
    found["linearity"] = linearity(
        [64, 128, 256] if options.quick else [64, 128, 256, 512], seconds
    )
    found["types"] = types(seconds)
    found["footprint"] = footprint(cases)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
