"""How many kernels calls on ever new sizes compile, and how long a choice of tiles takes.

    python benchmarks/sizes.py --output benchmarks/results/sizes.json

For each window, grids, batches and heads are drawn at random, 200 of them, and planned for an H100
one after the other, as calls would: nothing is compiled or run, so any machine will do. For each
kernel it counts shapes of tiles, each of which is a kernel to compile; "alone" is what there would
be if every size took the tiles that suit it best. The loss is the estimated time over that of these
best tiles.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from natten import devices
from natten.functional.backends.triton import tiles
from natten.functional.dispatch import resolve
from natten.functional.problem import DEFAULT_CONFIG, Problem
from natten.simulator import make_problem

SIZES = 200
# Window, extents that grids are drawn from, head_dim, what else.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], int, dict[str, Any]]] = {
    "1-D, 63": ((63,), (64, 4096), 64, {}),
    "1-D, 2048, stride 256": ((2048,), (2048, 16384), 128, {"stride": 256}),
    "2-D, 7 x 7": ((7, 7), (7, 128), 32, {}),
    "2-D, 7 x 7, dilation 2": ((7, 7), (14, 128), 32, {"dilation": 2}),
    "2-D, 13 x 13": ((13, 13), (13, 128), 64, {}),
    "2-D, 40 x 40": ((40, 40), (40, 128), 128, {}),
    "2-D, 40 x 40, stride 8": ((40, 40), (40, 128), 128, {"stride": 8}),
    "3-D, 3 x 7 x 7": ((3, 7, 7), (7, 48), 64, {}),
    "3-D, 11 x 11 x 11": ((11, 11, 11), (11, 48), 128, {}),
    "3-D, 16 x 12 x 24": ((16, 12, 24), (24, 64), 128, {}),
    "3-D, 16 x 12 x 24, stride 4": ((16, 12, 24), (24, 64), 128, {"stride": 4}),
}


def problems(case: str, seed: int) -> list[Problem]:
    """Random sizes of one window."""
    window, (least, most), head_dim, more = CASES[case]
    draw = random.Random(seed)
    found = []
    for _ in range(SIZES):
        grid = tuple(round(exp(draw.uniform(log(max(least, k)), log(most)))) for k in window)
        problem = make_problem(
            grid, window, batch=draw.choice([1, 2, 3, 8, 16]), heads=draw.choice([2, 3, 8, 24]),
            head_dim=head_dim, dtype=torch.bfloat16, device="cuda", **more,
        )  # fmt: skip
        found.append(problem)
    return found


def counted(case: str, seed: int) -> dict[str, Any]:
    """Shapes and losses of the kernels that the sizes of a case run with."""
    tiles._used.clear()
    tiles.reuse.cache_clear()
    curves: list[tuple[int, int]] = []
    shapes: dict[str, set[Any]] = {}
    alone: dict[str, set[Any]] = {}
    losses: dict[str, list[float]] = {}
    choosing = []
    for problem in problems(case, seed):
        backend: Any = resolve(problem, DEFAULT_CONFIG, "")
        begin = time.perf_counter()
        best = backend.forward_tiling(problem, DEFAULT_CONFIG)
        best_backward = backend.backward_tilings(problem, DEFAULT_CONFIG)
        choosing.append(time.perf_counter() - begin)
        forward = backend._running(problem, DEFAULT_CONFIG)
        backward = backend._running_backward(problem, DEFAULT_CONFIG)
        kernel = tiles.PING_PONG if forward.ping_pong else tiles.FORWARD
        ran = [("forward", kernel, best, forward)]
        if backward.fused is not None:
            ran.append(("all gradients", tiles.FUSED, best_backward.fused, backward.fused))
        else:
            query, key = tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT
            ran.append(("query gradient", query, best_backward.query, backward.query))
            ran.append(("key gradient", key, best_backward.key_value, backward.key_value))
        for name, kernel, ideal, tiling in ran:
            # The shapes of either backend's kernels are kernels of their own, and one more serves
            # any number of programs that share columns.
            compiled = replace(tiling, splits=min(tiling.splits, 2))
            shapes.setdefault(name, set()).add((backend.name, compiled))
            alone.setdefault(name, set()).add((backend.name, ideal))
            loss = kernel.time_of(problem, tiling) / kernel.time_of(problem, ideal)
            losses.setdefault(name, []).append(loss)
        curves.append((sum(map(len, shapes.values())), sum(map(len, alone.values()))))
    return {
        "case": case,
        "kernels": {name: len(found) for name, found in shapes.items()},
        "alone": {name: len(found) for name, found in alone.items()},
        "kernels_after": [kernels for kernels, _ in curves],
        "alone_after": [kernels for _, kernels in curves],
        "loss": {name: exp(sum(map(log, found)) / len(found)) for name, found in losses.items()},
        "worst": {name: max(found) for name, found in losses.items()},
        "choosing_ms": 1e3 * median(choosing),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table("case", "kernel", "kernels", "alone", "loss %", "worst %", "choice ms")
    rows = []
    with devices.pretending(devices.find("h100")):
        for case in CASES:
            row = counted(case, options.seed)
            rows.append(row)
            for name, kernels in row["kernels"].items():
                table.add_row(
                    case, name, str(kernels), str(row["alone"][name]),
                    f"{100 * row['loss'][name] - 100:.1f}", f"{100 * row['worst'][name] - 100:.1f}",
                    f"{row['choosing_ms']:.2f}",
                )  # fmt: skip
    Console(width=110).print(table)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
