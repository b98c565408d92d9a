"""Run the GPU tests in parallel processes, with nothing but Python, torch and Triton.

    python tests/run_gpu.py --workers 12

Prints a line for each failure and a summary; exits with 1 if anything failed. `pytest -m gpu` runs
the same checks, one after another and with every dtype.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PARTS = ("single", "larger", "listed", "named", "free", "random", "gluon")


class Unit(NamedTuple):
    """Work for one process: problems that share compiled kernels, so far as possible."""

    part: str
    items: tuple[Any, ...]


class Outcome(NamedTuple):
    checked: int
    failures: list[tuple[str, str]]
    seconds: float
    is_poisoned: bool  # the process can no longer use the GPU


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "natten" in f.filename or "tests" in f.filename]
    at = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return text[:600] + at


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


def execute(unit: Unit) -> Outcome:
    """Run all checks of a unit, whatever fails."""
    import torch

    start = time.perf_counter()
    failures = []
    checked = 0
    poisoned = False
    try:
        for title, check in _checks(unit):
            checked += 1
            torch.manual_seed(0)
            try:
                check()
            except Exception as error:
                failures.append((title, _reason(error)))
                try:
                    torch.cuda.synchronize()
                except Exception:
                    poisoned = True
                    break
    except Exception as error:
        failures.append((str(unit)[:80], _reason(error)))
    if not poisoned:
        torch.cuda.empty_cache()
    return Outcome(checked, failures, time.perf_counter() - start, poisoned)


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (unit := connection.recv()) is not None:
        outcome = execute(unit)
        connection.send(outcome)
        if outcome.is_poisoned:
            return


class Worker(threading.Thread):
    """Feeds one process from the queue, and starts another when it dies or hangs."""

    def __init__(
        self,
        units: Queue[Unit],
        done: Callable[[Unit, Outcome], None],
        deadline: float,
    ) -> None:
        super().__init__()
        self.units, self.done, self.deadline = units, done, deadline
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None

    def _start(self) -> None:
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def run(self) -> None:
        while time.perf_counter() < self.deadline:
            try:
                unit = self.units.get_nowait()
            except Empty:
                break
            if self.process is None:
                self._start()
            self.connection.send(unit)
            outcome = None
            try:
                if self.connection.poll(max(self.deadline - time.perf_counter(), 1.0) + 30.0):
                    outcome = self.connection.recv()
            except EOFError:
                pass
            if outcome is None:
                self.process.kill()
                self.process.join()
                why = f"died or took too long (exit code {self.process.exitcode})"
                outcome = Outcome(0, [(str(unit)[:200], why)], 0.0, True)
            if outcome.is_poisoned:
                self.process = None
            self.done(unit, outcome)
        if self.process is not None:
            self.connection.send(None)
            self.process.join(10.0)
            self.process.kill()


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
        units.append(Unit("sanitize", tuple(t for t in _titled("sanitize") if options.match in t)))
    return units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) * 3 // 4, 1))
    parser.add_argument("--random", type=int, default=2000, help="random problems, in families")
    parser.add_argument("--families", type=int, default=72, help="sets of compiled kernels")
    parser.add_argument("--gluon-families", type=int, default=18, help="of 20 problems each")
    parser.add_argument("--free", type=int, default=48, help="random problems with default tiles")
    parser.add_argument(
        "--pairs", type=int, default=170, help="problems with two listed pairs each"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first random problem")
    parser.add_argument("--all-dtypes", action="store_true", help="named cases in every dtype")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, pairs, sanitize"
    )
    parser.add_argument("--match", default="", help="of sanitize, those whose titles have this")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds; then start no more")
    options = parser.parse_args()

    import torch

    import natten

    start = time.perf_counter()
    units = _plan(options)
    queue: Queue[Unit] = Queue()
    for unit in units:
        queue.put(unit)
    lock = threading.Lock()
    checked: dict[str, int] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, int] = {}
    finished = 0

    def done(unit: Unit, outcome: Outcome) -> None:
        nonlocal finished
        with lock:
            finished += 1
            part = unit.part
            checked[part] = checked.get(part, 0) + outcome.checked
            seconds[part] = seconds.get(part, 0.0) + outcome.seconds
            failed[part] = failed.get(part, 0) + len(outcome.failures)
            for title, reason in outcome.failures:
                print(f"FAILED {title}: {reason}", flush=True)

    if options.workers == 0:
        # In this process, as sanitizers and debuggers like it.
        for unit in units:
            done(unit, execute(unit))
    else:
        deadline = start + options.limit
        workers = [Worker(queue, done, deadline) for _ in range(options.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    import triton

    for part, count in checked.items():
        print(f"{part:>10}: {count} checked, {failed[part]} failed, {seconds[part]:.0f} s of work")
    if "pairs" in checked:
        print(f"{2 * checked['pairs']} listed pairs of tiles tried, half of them backward")
    total, bad = sum(checked.values()), sum(failed.values())
    left = len(units) - finished
    print(
        f"{total} checked, {bad} failed, {left} of {len(units)} units not started, "
        f"{time.perf_counter() - start:.0f} s; natten {natten.__version__}, torch "
        f"{torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    )
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
