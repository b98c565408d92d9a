"""Run the GPU tests in parallel processes, with nothing but Python, torch and Triton.

    python tests/run_gpu.py --workers 12

Prints a line for each failure and a summary; exits with 1 if anything failed. `pytest -m gpu` runs
the same checks, one after another and with every dtype.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from workers import Unit, work  # noqa: E402

PARTS = ("single", "larger", "listed", "named", "free", "random", "gluon", "grids")
# What is asked for by name only; also each kind of `gpu_checks.SPECIAL`.
MORE = ("special", "pairs", "sanitize")


def _checks(unit: Unit) -> Iterable[tuple[str, Callable[[], None]]]:
    """Titles and functions of a unit."""
    from functools import partial

    import gpu_checks

    if unit.part == "random":
        number, *seeds = unit.items
        for seed in seeds:
            title = f"family {number} seed {seed}"
            yield title, partial(gpu_checks.check_family_problem, number, seed)
    elif unit.part == "gluon":
        number, *seeds = unit.items
        for seed in seeds:
            title = f"Gluon family {number} seed {seed}"
            yield title, partial(gpu_checks.check_gluon_problem, number, seed)
    elif unit.part == "grids":
        number, *seeds = unit.items
        for seed in seeds:
            title = f"grids {number} seed {seed}"
            yield title, partial(gpu_checks.check_grids_problem, number, seed)
    elif unit.part in gpu_checks.SPECIAL:
        number, *seeds = unit.items
        for seed in seeds:
            title = f"{unit.part} {number} seed {seed}"
            yield title, partial(gpu_checks.check_special_problem, unit.part, number, seed)
    elif unit.part == "pairs":
        for seed in unit.items:
            yield f"pair {seed}", partial(gpu_checks.check_listed_pair, seed)
    elif unit.part == "free":
        for seed in unit.items:
            yield f"free seed {seed}", partial(gpu_checks.check_free_problem, seed)
    elif unit.part == "single":
        for name in unit.items:
            yield name, gpu_checks.SINGLE[name]
    else:
        everything = _titled(unit.part)
        for title in unit.items:
            yield title, everything[title]


def _titled(part: str) -> dict[str, Callable[[], None]]:
    import gpu_checks

    return dict(
        {
            "larger": gpu_checks.larger_checks,
            "listed": gpu_checks.listed_checks,
            "named": lambda: gpu_checks.named_checks(all_dtypes=False),
            "named_all": lambda: gpu_checks.named_checks(all_dtypes=True),
            "sanitize": gpu_checks.sanitized_cases,
        }[part]()
    )


def _plan(options: argparse.Namespace) -> list[Unit]:
    """Units of all parts that were asked for, long ones first."""
    import gpu_checks

    units = []
    parts = options.only.split(",")
    if "single" in parts:
        units.append(Unit("single", gpu_checks.HUGE))
        units += [Unit("single", (n,)) for n in gpu_checks.SINGLE if n not in gpu_checks.HUGE]
    if "gluon" in parts and gpu_checks.has_hopper():
        # Two sets of large kernels each, which take long to compile.
        for number in range(options.gluon_families):
            first = options.seed + 20 * number
            units.append(Unit("gluon", (number, *range(first, first + 20))))
    if "grids" in parts:
        seeds = range(options.seed, options.seed + options.grids)
        units += [Unit("grids", (n, *seeds)) for n in range(gpu_checks.GRIDS_FAMILIES)]
    for kind in gpu_checks.SPECIAL:
        if kind in parts or "special" in parts:
            families = gpu_checks.SPECIAL_FAMILIES
            per_family = -(-options.special // families)
            for number in range(families):
                first = options.seed + number * per_family
                units.append(Unit(kind, (number, *range(first, first + per_family))))
    if "random" in parts:
        per_family, rest = divmod(options.random, options.families)
        first = options.seed
        for number in range(options.families):
            count = per_family + (number < rest)
            units.append(Unit("random", (number, *range(first, first + count))))
            first += count
    for part in ("larger", "listed", "named"):
        if part in parts:
            name = "named_all" if part == "named" and options.all_dtypes else part
            units += [Unit(name, (title,)) for title in _titled(name)]
    if "free" in parts:
        units += [Unit("free", (options.seed + n,)) for n in range(options.free)]
    if "pairs" in parts:
        first = options.seed
        seeds = sorted(
            range(first, first + options.pairs),
            key=lambda seed: -gpu_checks.listed_pair(seed).cost,
        )
        units += [Unit("pairs", (seed,)) for seed in seeds]
    if "sanitize" in parts:
        titles = [title for title in _titled("sanitize") if options.match in title]
        share, shares = map(int, options.share.split("/"))
        units += [Unit("sanitize", (title,)) for title in titles[share::shares]]
    return units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) * 3 // 4, 1))
    parser.add_argument("--random", type=int, default=2000, help="random problems, in families")
    parser.add_argument("--families", type=int, default=72, help="sets of compiled kernels")
    parser.add_argument("--gluon-families", type=int, default=30, help="of 20 problems each")
    parser.add_argument("--grids", type=int, default=20, help="layouts of each set of kernels")
    parser.add_argument("--special", type=int, default=500, help="problems of each special kind")
    parser.add_argument("--free", type=int, default=64, help="of all kinds, with default tiles")
    parser.add_argument(
        "--pairs", type=int, default=170, help="problems with two listed pairs each"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first random problem")
    parser.add_argument("--all-dtypes", action="store_true", help="named cases in every dtype")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"of {', '.join((*PARTS, *MORE))}, or a kind"
    )
    parser.add_argument("--match", default="", help="of sanitize, those whose titles have this")
    parser.add_argument("--share", default="0/1", help="of sanitize, every N-th from K on: K/N")
    parser.add_argument("--each", action="store_true", help="a line for all that is checked")
    parser.add_argument(
        "--unfilled", action="store_true", help="without workers: do not fill new memory with NaN"
    )
    parser.add_argument("--limit", type=float, default=540.0, help="seconds; then start no more")
    options = parser.parse_args()

    import memory
    import torch

    import natten

    start = time.perf_counter()
    units = _plan(options)
    memory.fills_empties = not options.unfilled
    tally = work(units, _checks, options.workers, options.limit, each=options.each)
    import triton

    tally.show()
    if "pairs" in tally.parts:
        pairs = 2 * tally.parts["pairs"].checked
        print(f"{pairs} listed pairs of tiles tried, half of them backward")
    total, bad = tally.checked, tally.failed
    unstarted = len(units) - tally.finished
    print(
        f"{total} checked, {bad} failed, {tally.left} left, {unstarted} of {len(units)} units not "
        f"started, {time.perf_counter() - start:.0f} s; natten {natten.__version__}, torch "
        f"{torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    )
    return 1 if bad or unstarted or tally.left else 0


if __name__ == "__main__":
    sys.exit(main())
