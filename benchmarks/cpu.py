"""Time the CPU backend against what torch offers, after checking that it is right.

    python benchmarks/cpu.py              everything, a quarter of an hour on two cores
    python benchmarks/cpu.py --quick      fewer rounds, few cases
    python benchmarks/cpu.py --no-flex    without FlexAttention, whose compilation takes longest

Every case is compared with the float64 reference first, gradients included. The contenders are
timed in turns, so that a busy moment of the machine hits all of them; tables show the least time of
each, which other processes disturb least. The last column divides the time by that of dense
attention times the share of its products that the window needs. Results go to a JSON file with the
machine and the versions.
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
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from natten import na2d
from natten.functional import neighborhood_attention_generic
from natten.functional.geometry import count_pairs
from natten.window import Axis, grid_mask, mask


class Case(NamedTuple):
    """A call of neighborhood attention."""

    batch: int
    heads: int
    grid: tuple[int, ...]
    dim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(
            map(Axis, self.grid, self.kernel_size, self.stride, self.dilation, self.is_causal)
        )

    @property
    def share(self) -> float:
        """Of the products of dense attention, those that the window needs."""
        return count_pairs(self.axes) / prod(self.grid) ** 2

    def __str__(self) -> str:
        """Short, with what differs from the defaults."""
        grid, window = ("x".join(map(str, sizes)) for sizes in (self.grid, self.kernel_size))
        text = f"{grid} k {window}, B {self.batch}, H {self.heads}, D {self.dim}"
        for name in ("stride", "dilation", "is_causal"):
            values = getattr(self, name)
            if max(values) > (name != "is_causal"):
                text += f", {name.removeprefix('is_')} {'x'.join(str(int(v)) for v in values)}"
        return text


def case(
    batch: int,
    heads: int,
    grid: tuple[int, ...],
    dim: int,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> Case:
    """A case, one value for all axes or one for each."""
    sizes: list[Any] = [
        v if isinstance(v, tuple) else (v,) * len(grid)
        for v in (kernel_size, stride, dilation, is_causal)
    ]
    return Case(batch, heads, grid, dim, *sizes)


SMALL = [
    case(8, 2, (56, 56), 32, 7),
    case(8, 4, (28, 28), 32, 7),
    case(32, 8, (14, 14), 32, 7),
    case(2, 8, (64, 64), 64, 7),
    case(1, 8, (96, 96), 64, 13),
    case(1, 8, (64, 64), 128, 7),
    case(1, 8, (48, 48), 64, 7, dilation=6),
]
LARGE = [
    case(1, 4, (8, 24, 24), 64, (5, 9, 9)),
    case(1, 8, (4096,), 64, 512),
    case(1, 8, (64, 64), 64, 31),
    case(1, 4, (8, 24, 24), 64, (8, 16, 16)),
    case(1, 8, (4096,), 64, 2048),
    case(1, 8, (64, 64), 64, 48, stride=8),
    case(1, 8, (4096,), 64, 1024, is_causal=True),
]


# Those of the documentation's table.
PUBLISHED = [SMALL[0], SMALL[1], SMALL[3], SMALL[4]]


def published(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the documentation's table, which has no dense attention."""
    found = []
    for row in rows:
        one = Case(**row["case"])
        if one in PUBLISHED:
            others = {n: t for n, t in row["ms"].items() if n not in ("natten cpu", "SDPA dense")}
            found.append({
                "case": [one.batch, one.heads, *one.grid, one.dim],
                "kernel_size": one.kernel_size[0],
                "pass": "forward" if row["pass"] == "forward" else "forward+backward",
                "error": row["error"], "natten_ms": row["ms"]["natten cpu"], "others_ms": others,
                "times_faster": min(others.values()) / row["ms"]["natten cpu"],
            })  # fmt: skip
    return found


def random_cases(number: int, seed: int = 0) -> list[Case]:
    """Grids and windows as models of text, pictures and video have them."""
    rng, cases = Random(seed), []
    while len(cases) < number:
        rank = rng.choice((1, 2, 2, 3))
        sizes = {1: (512, 1024, 2048, 4096), 2: (14, 24, 28, 32, 48, 56), 3: (4, 8, 12, 16)}[rank]
        grid = tuple(rng.choice(sizes) for _ in range(rank))
        dilation = tuple(rng.choice((1, 1, 1, 2, 3)) if rank < 3 else 1 for _ in grid)
        kernel_size = tuple(
            rng.randint(
                min(3, n // d), max(3, min(n // d, round(n * rng.choice((0.15, 0.4, 1.0)))))
            )
            for n, d in zip(grid, dilation)
        )
        stride = tuple(rng.choice((1, 1, 1, max(1, k // 4), k)) for k in kernel_size)
        is_causal = (rng.random() < (0.4 if rank == 1 else 0.2), *(False,) * (rank - 1))
        found = case(
            rng.choice((1, 2, 8)), rng.choice((2, 4, 8)), grid, rng.choice((32, 64, 64, 128)),
            kernel_size, stride, dilation, is_causal,
        )  # fmt: skip
        # Neither whole axes alone, which is dense attention, nor minutes of it.
        work = found.batch * found.heads * prod(grid) ** 2 * found.dim
        if prod(kernel_size) < prod(grid) and 1e8 < work < 2e10:
            cases.append(found)
    return cases


console = Console(width=None if sys.stdout.isatty() else 120)
Contender = Callable[[], Any]


def in_turns(contenders: dict[str, Contender], seconds: float, least: int) -> dict[str, float]:
    """Least milliseconds of each contender, which run one after the other, round by round.

    Each gets about `seconds`, and at least `least` rounds after one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    while True:
        waiting = [n for n, t in times.items() if len(t) < least or sum(t) < 1e3 * seconds]
        if not waiting:
            return {name: min(t) for name, t in times.items()}
        for name in waiting:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - start))


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (case.batch, *case.grid, case.heads, case.dim)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]


def attend(case: Case, backend: str, *tensors: Tensor) -> Tensor:
    """The attention of a case."""
    out: Tensor = neighborhood_attention_generic(
        *tensors, kernel_size=case.kernel_size, stride=case.stride, dilation=case.dilation,
        is_causal=case.is_causal, backend=backend,
    )  # fmt: skip
    return out


def worst_error(case: Case, dtype: torch.dtype) -> float:
    """Largest error of output and gradients, relative to the largest value of each, of a head."""
    inputs = inputs_of(case._replace(batch=1, heads=1), dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out = attend(case, "cpu", *inputs)
    exact = attend(case, "reference", *exact_inputs)
    grad = torch.randn_like(out)
    pairs = [(out, exact)]
    pairs += zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(exact, exact_inputs, grad.double()),
    )
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def contenders_of(
    case: Case, dtype: torch.dtype, backward: bool, flex: bool
) -> dict[str, Contender]:
    """The same attention some ways, and dense: heads last for ours, heads first for torch's."""
    inputs = inputs_of(case, dtype)
    flat = [x.detach().flatten(1, -3).transpose(1, 2).contiguous() for x in inputs]
    flat = [x.requires_grad_() for x in flat]
    visible = grid_mask(case.axes)

    def step(function: Callable[..., Tensor], tensors: list[Tensor]) -> Contender:
        if not backward:
            # FlexAttention refuses tensors that require gradients on the CPU.
            plain = [x.detach() for x in tensors]
            return lambda: function(*plain)
        grad = torch.randn_like(tensors[0])
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)

    found = {
        "natten cpu": step(partial(attend, case, "cpu"), inputs),
        "SDPA + mask": step(masked, flat),
        "SDPA dense": step(scaled_dot_product_attention, flat),
    }
    if flex and not backward:

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return mask(unravel(q, case.grid), unravel(k, case.grid), case.axes)

        tokens = prod(case.grid)
        # One compilation for all shapes takes longer than one for each.
        torch._dynamo.reset()
        try:
            blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device="cpu")
            compiled = torch.compile(flex_attention, dynamic=False)

            def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return compiled(q, k, v, block_mask=blocks)

            call = step(flexible, flat)
            call()
            found["FlexAttention"] = call
        except Exception as error:  # a machine without a C++ compiler
            console.print(f"compiled FlexAttention does not run here: {str(error)[:200]}")
    return found


def unravel(index: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Positions along the axes of a grid."""
    found: list[Tensor] = []
    for size in reversed(grid):
        found.insert(0, index % size)
        index = index // size
    return tuple(found)


def compare(
    title: str, cases: list[Case], dtype: torch.dtype, seconds: float, flex: bool
) -> list[dict[str, Any]]:
    """Both passes of every case against torch's ways."""
    rows: list[dict[str, Any]] = []
    table = Table(title=f"{title}, {str(dtype)[6:]}, milliseconds")
    table.add_column("case")
    table.add_column("pass")
    names = ["natten cpu", "SDPA + mask", "SDPA dense", *(["FlexAttention"] if flex else [])]
    for column in (*names, "times faster", "share", "time / (dense x share)"):
        table.add_column(column, justify="right")
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for case in cases:
        error = worst_error(case, dtype)
        if error > limit:
            raise SystemExit(f"wrong result: relative error {error:.3g} in {case}")
        for backward in (False, True):
            times = in_turns(contenders_of(case, dtype, backward, flex), seconds, least=3)
            others = {name: time for name, time in times.items() if name != "natten cpu"}
            own, dense = times["natten cpu"], times["SDPA dense"]
            rows.append({
                "case": case._asdict(), "dtype": str(dtype)[6:],
                "pass": "both" if backward else "forward", "error": error, "ms": times,
                "times_faster": min(others.values()) / own, "share": case.share,
                "over_share": own / (dense * case.share),
            })  # fmt: skip
            row = rows[-1]
            table.add_row(
                str(case), row["pass"],
                *(f"{times[name]:.2f}" if name in times else "" for name in names),
                f"[{'green' if row['times_faster'] >= 1 else 'red'}]{row['times_faster']:.1f}",
                f"{case.share:.3f}", f"{row['over_share']:.2f}",
            )  # fmt: skip
    console.print(table)
    for name in ("forward", "both"):
        own = [row for row in rows if row["pass"] == name]
        ratios = [row["times_faster"] for row in own]
        slower = sum(ratio < 1 for ratio in ratios)
        console.print(
            f"{name}: {statistics.geometric_mean(ratios):.2f} times faster than the best of the "
            f"others in the geometric mean, {slower} of {len(own)} slower"
        )
    return rows


def linearity(sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """The cost of a token, at more and more tokens."""
    table = Table(title="cost of a token: [1, 2, n, n, 32], 7, float32")
    for column in ("n", "forward ms", "ns a token", "forward+backward ms", "ns a token"):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        inputs = inputs_of(case(1, 2, (size, size), 32, 7))
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
    shown = SMALL[3]
    table = Table(title=f"types: {shown}")
    for column in ("type", "error", "forward ms", "forward+backward ms"):
        table.add_column(column, justify="left" if column == "type" else "right")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        error = worst_error(shown, dtype)
        inputs = inputs_of(shown, dtype)
        grad = torch.randn_like(inputs[0])

        def forward(inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return attend(shown, "cpu", *inputs)

        def both(inputs: list[Tensor] = inputs, grad: Tensor = grad) -> Any:
            out = attend(shown, "cpu", *inputs)
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
    q, k, v = (torch.randn({batch}, *{grid}, {heads}, {dim}) for _ in range(3))
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


def footprint(cases: list[Case]) -> dict[str, Any]:
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
            for case in cases:
                peak = in_fresh_process(PEAK, cache, **case._asdict())
                peaks.append({"case": case._asdict(), "outputs": peak})
                table.add_row(
                    f"peak extra memory of {case}, the output included",
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
    seconds = 0.2 if options.quick else 1.0
    found: dict[str, Any] = {"machine": machine()}
    console.print(" · ".join(f"{k} {v}" for k, v in found["machine"].items()))
    single, half = torch.float32, torch.bfloat16
    groups = [
        ("small windows", SMALL, single, not options.no_flex),
        ("large windows", LARGE, single, not options.no_flex),
        ("random", random_cases(40), single, False),
        ("random", random_cases(10), half, False),
    ]
    if options.quick:
        groups = [(title, cases[:2], *rest) for title, cases, *rest in groups]  # type: ignore[misc]
    found["groups"] = {
        f"{title}, {str(dtype)[6:]}": compare(title, cases, dtype, seconds, flex)
        for title, cases, dtype, flex in groups
    }
    found["cases"] = published(found["groups"]["small windows, float32"])
    found["linearity"] = linearity(
        [64, 128, 256] if options.quick else [64, 128, 256, 512], seconds
    )
    found["types"] = types(seconds)
    found["footprint"] = footprint(SMALL[:2] if options.quick else SMALL[:5])
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
