"""Kernels that the choice of tiles decides between, timed beside what it expects of them.

    python benchmarks/choices.py --output results/choices.json      # on a Hopper GPU
    python benchmarks/choices.py --show results/choices.json        # beside today's choice

The rates in `natten/functional/backends/triton/tiles.py` follow from these: forward, of the kernel
whose groups of warps run apart against the general one; backward, of all gradients in one pass
against two. Both results of a problem have to agree. A ratio below 1 is for the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from predictions import simulated
from rich.console import Console
from rich.table import Table
from torch import Tensor

import natten
from natten import devices
from natten.functional.backends.triton import HOPPER, tiles
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import on_gpu

SPACE, IMAGE, SEQUENCE = (30, 48, 80), (128, 128), (16384,)
IN_TIME = (True, False, False)


def _case(name: str, shape: tuple[int, ...], window: Any, **more: Any) -> dict[str, Any]:
    usual = {"batch": 1, "heads": 12, "head_dim": 128}
    usual |= {"stride": 1, "dilation": 1, "is_causal": False}
    return {"name": name, "shape": shape, "kernel_size": window, **usual, **more}


CASES = [
    _case("dense, 128", SEQUENCE, 16384, heads=16),
    _case("dense, 96", SEQUENCE, 16384, heads=16, head_dim=96),
    _case("dense, 64", SEQUENCE, 16384, heads=32, head_dim=64),
    _case("128 of 32768, 128", (32768,), 128, heads=16),
    _case("128 of 32768, 64", (32768,), 128, heads=16, head_dim=64),
    _case("256 of 32768, 64", (32768,), 256, heads=16, head_dim=64),
    _case("512 of 32768, 128", (32768,), 512, heads=16),
    _case("the same, causal", (32768,), 512, heads=16, is_causal=True),
    _case("image, 7, 128", (64, 64), 7, heads=8, batch=4),
    _case("image, 7, 64", (64, 64), 7, heads=8, batch=8, head_dim=64),
    _case("image, 13, 128", IMAGE, 13),
    _case("image, 13, 96", IMAGE, 13, heads=16, head_dim=96),
    _case("image, 13, 64", IMAGE, 13, heads=24, head_dim=64),
    _case("image, 21, 64", IMAGE, 21, heads=24, head_dim=64),
    _case("image, 33, 128", IMAGE, 33),
    _case("image, 33, 64", IMAGE, 33, heads=24, head_dim=64),
    _case("image, 80, 128", IMAGE, 80, heads=24),
    _case("image, 64, dilated", (256, 256), 64, dilation=2, heads=4),
    _case("image, 80, context", IMAGE, 80, additional_kv=512),
    _case("image, 33, few keys", IMAGE, 33, heads=24, head_dim=64, additional_kv=77),
    _case("weather, 4 7 7, 64", (9, 65, 107), (4, 7, 7), heads=8, head_dim=64),
    _case("weather, 4 13 13, 64", (13, 58, 167), (4, 13, 13), heads=4, head_dim=64, batch=2),
    _case("video, 9 17 25, 128", (16, 48, 64), (9, 17, 25)),
    _case("video, 9 17 25, 64", (16, 48, 64), (9, 17, 25), heads=16, head_dim=64),
    _case("video, 12 16 16, 64", SPACE, (12, 16, 16), head_dim=64),
    _case("video, 18 24 24, 128", SPACE, (18, 24, 24), heads=6),
    _case("the same, strided", SPACE, (18, 24, 24), heads=6, stride=(16, 8, 8)),
    _case("video, all frames", SPACE, (30, 16, 24), heads=6),
    _case("video, causal in time", (21, 60, 104), (8, 16, 24), heads=8, is_causal=IN_TIME),
    _case("video, dilated", (16, 64, 64), (8, 16, 16), heads=8, dilation=(1, 2, 2)),
]


def problem_of(case: dict[str, Any]) -> Problem:
    """What tiles are chosen for."""
    return replace(on_gpu(simulated(case, torch.bfloat16).problem), requires_grad=True)


def expected(case: dict[str, Any]) -> tuple[float, bool, bool]:
    """The backward pass in one over that in two, as the choice of tiles estimates it; whether it
    chooses that, and the forward kernel whose groups of warps run apart."""
    problem = problem_of(case)
    one = tiles.fused_tiling(problem)
    named = Config(backward_q_tile_shape=one.query, backward_kv_tile_shape=one.key)
    with devices.pretending(devices.find("h100")):
        asked = HOPPER.backward_tilings(problem, named)
        with natten.set_memory_usage_preference("strict"):
            two = HOPPER.backward_tilings(problem, DEFAULT_CONFIG)
        chosen = HOPPER.backward_tilings(problem, DEFAULT_CONFIG).fused is not None
        apart = HOPPER.forward_tiling(problem, DEFAULT_CONFIG).ping_pong
    together = tiles.cost_of_one(problem, one, asked.fused_additional)
    return together / tiles.cost_of_two(problem, two), chosen, apart


def difference(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest one, relative to the largest number."""
    pairs = zip(tensors, others, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def measured(case: dict[str, Any], is_timed: bool) -> dict[str, Any]:
    """Milliseconds of each way, and by how much results differ."""
    torch.manual_seed(0)
    problem = gpu.Problem(case, torch.bfloat16)
    attend = partial(problem.forward, backend="hopper-fna")
    row: dict[str, Any] = dict(case)
    results: dict[str, list[Sequence[Tensor]]] = {"forward": [], "backward": []}

    def run(way: str, name: str, call: Callable[[], Sequence[Tensor]]) -> None:
        results[way].append(call())
        torch.cuda.synchronize()
        if is_timed:
            row[name] = gpu.median_ms(call, rep=70)

    with torch.no_grad():
        for schedule in ("pp", "non"):
            call = partial(attend, kernel_schedule=schedule)
            run("forward", f"forward_{schedule}", lambda call=call: (call(),))
    one = tiles.fused_tiling(problem_of(case))
    named = {"backward_q_tile_shape": one.query, "backward_kv_tile_shape": one.key}
    for name, memory, knobs in (("one", "default", named), ("two", "strict", {})):
        with natten.set_memory_usage_preference(memory):
            out = attend(**knobs)
            run("backward", f"backward_{name}", partial(problem.backward, out))
    for way, (first, second) in results.items():
        row[f"{way}_difference"] = difference(first, second)
    return row


def compile_all(workers: int) -> None:
    """Run everything once, in several processes at a time."""
    command = [sys.executable, __file__, "--once"]
    shares = [[*command, f"{i}/{workers}"] for i in range(workers)]
    processes = [subprocess.Popen(share) for share in shares]
    failed = [process.args for process in processes if process.wait()]
    if failed:
        raise SystemExit(f"{len(failed)} of {workers} processes failed: {failed[0]}")


def show(rows: list[dict[str, Any]]) -> None:
    """Ratios, beside what is expected of them today."""
    table = Table("problem", "forward", "chosen", "backward", "expected", "chosen", "difference")
    for row in rows:
        share, together, apart = expected(row)
        table.add_row(
            row["name"], f"{row['forward_pp'] / row['forward_non']:.2f}", "yes" if apart else "",
            f"{row['backward_one'] / row['backward_two']:.2f}", f"{share:.2f}",
            "yes" if together else "",
            f"{max(row['forward_difference'], row['backward_difference']):.1e}",
        )  # fmt: skip
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="measured before; needs no GPU")
    parser.add_argument("--workers", type=int, default=6, help="processes that compile")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        share, shares = map(int, options.once.split("/"))
        for case in CASES[share::shares]:
            measured(case, False)
        return 0
    if options.show is not None:
        show(json.loads(options.show.read_text(encoding="utf-8")))
        return 0
    compile_all(options.workers)
    rows = []
    for case in CASES:
        rows.append(measured(case, True))
        if options.output is not None:
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    limit = gpu.TOLERANCE[torch.bfloat16]
    ways = ("forward_difference", "backward_difference")
    return int(any(not row[way] <= limit for row in rows for way in ways))


if __name__ == "__main__":
    sys.exit(main())
