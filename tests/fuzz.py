"""Random problems on the CPU, valid and invalid, in parallel processes.

    python tests/fuzz.py --problems 2000 --wrong 500 --seconds 600

Prints a line for each failure, with what runs it again, and a summary; exits with 1 if anything
failed. A seed names the same problem everywhere. Tensors, results and the scratch memory of
compiled loops lie next to memory that ends a process when it is touched, and results begin as NaN.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from workers import Declined, Titled, Unit, work  # noqa: E402

# Of 100 problems, and how many of one unit. "bounds" are the loops of the unfused products, which
# index arrays, compiled with checks.
SHARES = {"cpu": 55, "reference": 37, "flex": 2, "triton": 1, "bounds": 5}
SIZES = {"cpu": 50, "reference": 50, "flex": 10, "triton": 4, "bounds": 50}
# Of 100 problems of one backend; where it cannot be named, the CPU's is meant.
KINDS = {
    "window": 42, "attention": 15, "packed": 8, "grids": 10, "groups": 8, "merge": 3,
    "products": 6, "modules": 5, "float8": 3,
}  # fmt: skip


def _small(case: Any) -> Any:
    """The case with few heads and batch entries."""
    group, batch = min(case.heads // case.heads_kv, 2), min(case.batch, 2)
    lengths = case.additional_lengths
    lengths = None if lengths is None else lengths[:batch]
    return replace(case, batch=batch, heads=group, heads_kv=1, additional_lengths=lengths)


def _small_and_wide(case: Any) -> Any:
    """And with heads that are loaded through descriptors."""
    return replace(_small(case), head_dim=64, head_dim_v=64)


def _on(backend: str, seed: int) -> Any:
    """Where a problem is computed, and what it may be like there."""
    import torch
    from problems import On

    if backend == "triton":
        from natten.functional.backends.triton import tiles

        # Descriptors for small problems too.
        tiles.MIN_TMA_PRODUCTS = 0.0
        name = ("cutlass", "hopper", "cutlass", "blackwell")[seed % 4]
        # The interpreter takes 40 ms for each program.
        on = On(name, max_tokens=30, dtypes=(torch.float16, torch.float32), changed=_small)
        if name == "cutlass":
            return on
        return on._replace(dtypes=(torch.float16,), changed=_small_and_wide)
    if backend == "flex":
        # It has no backward pass on the CPU.
        return On("flex", max_tokens=100, backward=False)
    return On("cpu" if backend == "bounds" else backend)


def _check(backend: str, kind: str, seed: int) -> None:
    import problems

    is_shared = backend == "triton" and seed % 3 == 1
    try:
        with problems.sharing(2 + seed % 2) if is_shared else nullcontext():
            problems.check(kind, seed, _on(backend, seed))
    except (NotImplementedError, RuntimeError) as error:
        if backend in ("flex", "triton") and "cannot run this problem" in str(error):
            raise Declined from None
        raise


def _refuse(kind: str, seed: int, count: int) -> None:
    import problems
    import wrong_calls

    wrong_calls.refuse(kind, seed, problems.On(("cpu", "reference", None)[seed % 3]), count)


def checks(unit: Unit) -> Iterable[Titled]:
    """Titles and functions of a unit."""
    backend, kind, *seeds = unit.items
    for seed in seeds:
        again = f"--kinds {kind} --seed {seed}"
        if backend == "wrong":
            yield f"wrong {again} --problems 0 --wrong 10", partial(_refuse, kind, seed, 10)
        else:
            title = f"{again} --backends {backend} --problems 1 --wrong 0"
            yield title, partial(_check, backend, kind, seed)


def _plan(options: argparse.Namespace, cache: str) -> list[Unit]:
    """Units of all that was asked for, in an order that depends on nothing else."""
    from problems import NAMING
    from wrong_calls import REFUSING

    environments = {
        "triton": (("TRITON_INTERPRET", "1"),),
        "bounds": (("NUMBA_BOUNDSCHECK", "1"), ("NUMBA_CACHE_DIR", cache)),
    }
    kinds = {kind: n for kind, n in KINDS.items() if kind in options.kinds.split(",")}
    jobs = []
    shares = {backend: SHARES[backend] for backend in options.backends.split(",")}
    for backend, share in shares.items():
        fit = {
            kind: n for kind, n in kinds.items()
            if (kind == "products" if backend == "bounds" else backend == "cpu" or kind in NAMING)
        }  # fmt: skip
        number = options.problems * share / sum(shares.values())
        for kind, weight in fit.items():
            # At least one of each, so that one problem can be asked for.
            count = max(round(number * weight / sum(fit.values())), min(options.problems, 1))
            jobs.append((backend, kind, count, SIZES[backend]))
    refusing = [kind for kind in REFUSING if kind in kinds]
    for kind in dict.fromkeys(refusing):
        # Ten calls each.
        count = -(-options.wrong * refusing.count(kind) // (10 * len(refusing)))
        jobs.append(("wrong", kind, count, 20))
    units = []
    for backend, kind, count, size in jobs:
        for first in range(options.seed, options.seed + count, size):
            seeds = range(first, min(first + size, options.seed + count))
            part = f"{backend} {kind}"
            units.append(Unit(part, (backend, kind, *seeds), environments.get(backend, ())))
    Random(0).shuffle(units)
    return units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=2000, help="valid ones")
    parser.add_argument("--wrong", type=int, default=1000, help="calls that must be refused")
    parser.add_argument("--seed", type=int, default=0, help="the first of each kind")
    parser.add_argument("--backends", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="then start no more")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for one problem")
    options = parser.parse_args()

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="natten-fuzz-") as cache:
        units = _plan(options, cache)
        tally = work(units, checks, max(options.workers, 1), options.seconds, options.patience)
    tally.show()
    left = len(units) - tally.finished
    print(
        f"seeds from {options.seed}: {tally.checked} checked, {tally.failed} failed, {left} of "
        f"{len(units)} units not started, {time.perf_counter() - start:.0f} s"
    )
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
