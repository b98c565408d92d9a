"""Checks in parallel processes, which may crash and hang: each failure has a title."""

# ruff: noqa: T201

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

Titled = tuple[str, Callable[[], None]]


class Declined(Exception):
    """A check's problem is one that its backend says it does not compute."""


class Unit(NamedTuple):
    """Work for one process: problems that share compiled kernels, so far as possible."""

    part: str
    items: tuple[Any, ...]
    # Variables of the environment, which libraries read when they are imported.
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    """What became of a unit's checks."""

    checked: int = 0
    declined: int = 0
    left: int = 0  # not begun in time
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    is_poisoned: bool = False  # the process can no longer use the GPU


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "natten" in f.filename or "tests" in f.filename]
    at = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return text[:600] + at


def execute(
    unit: Unit,
    checks: Callable[[Unit], Iterable[Titled]],
    begin: Callable[[str], None] = lambda title: None,
    deadline: float = float("inf"),
) -> Outcome:
    """Run all checks of a unit, whatever fails, until the deadline; ``begin`` hears of each
    before."""
    import torch

    start = time.perf_counter()
    outcome = Outcome()
    try:
        for title, check in checks(unit):
            # Processes of a machine share this clock.
            if time.perf_counter() >= deadline:
                outcome.left += 1
                continue
            begin(title)
            torch.manual_seed(0)
            try:
                check()
                outcome.checked += 1
            except Declined:
                outcome.declined += 1
            except Exception as error:
                outcome.checked += 1
                outcome.failures.append((title, _reason(error)))
                if not torch.cuda.is_available():
                    continue
                try:
                    torch.cuda.synchronize()
                except Exception:
                    outcome.is_poisoned = True
                    break
    except Exception as error:
        outcome.failures.append((str(unit)[:80], _reason(error)))
    if torch.cuda.is_available() and not outcome.is_poisoned:
        torch.cuda.empty_cache()
    outcome.seconds = time.perf_counter() - start
    return outcome


def _serve(
    connection: Connection,
    environment: dict[str, str],
    checks: Callable[[Unit], Iterable[Titled]],
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    while (received := connection.recv()) is not None:
        unit, deadline = received
        outcome = execute(unit, checks, connection.send, deadline)
        connection.send(outcome)
        if outcome.is_poisoned:
            return


class Worker(threading.Thread):
    """Feeds processes, one for each environment, from the queue, one at a time; starts another when
    one dies or hangs."""

    def __init__(
        self,
        units: Queue[Unit],
        checks: Callable[[Unit], Iterable[Titled]],
        done: Callable[[Unit, Outcome], None],
        deadline: float,
        patience: float = float("inf"),
    ) -> None:
        """A worker.

        Args:
            units: What is to be done.
            checks: The titles and functions of a unit.
            done: Called with each unit and its outcome.
            deadline: Time (`time.perf_counter`) from which on nothing is begun.
            patience: Seconds that a check may take.
        """
        super().__init__()
        self.units, self.checks, self.done = units, checks, done
        self.deadline, self.patience = deadline, patience
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[Any, tuple[Any, Connection]] = {}

    def _start(self, unit: Unit) -> tuple[Any, Connection]:
        connection, other = self.context.Pipe()
        process = self.context.Process(
            target=_serve, args=(other, dict(unit.environment), self.checks), daemon=True
        )
        process.start()
        other.close()
        return process, connection

    def _outcome(self, unit: Unit) -> Outcome:
        if unit.environment not in self.processes:
            self.processes[unit.environment] = self._start(unit)
        process, connection = self.processes[unit.environment]
        connection.send((unit, self.deadline))
        title, begun = str(unit)[:200], 0
        try:
            while True:
                # A process takes a while to start.
                wait = self.patience if begun else float("inf")
                left = max(self.deadline - time.perf_counter(), 1.0) + 30.0
                if not connection.poll(min(left, wait)):
                    break
                found = connection.recv()
                if isinstance(found, Outcome):
                    return found
                title, begun = found, begun + 1
        except (EOFError, OSError):
            # Dead; its exit code says of what.
            process.join(5.0)
        why = "died" if process.exitcode is not None else "took too long"
        process.kill()
        process.join()
        failure = (title, f"{why} (exit code {process.exitcode})")
        return Outcome(begun, failures=[failure], is_poisoned=True)

    def run(self) -> None:
        while time.perf_counter() < self.deadline:
            try:
                unit = self.units.get_nowait()
            except Empty:
                break
            outcome = self._outcome(unit)
            if outcome.is_poisoned:
                self.processes.pop(unit.environment)
            self.done(unit, outcome)
        for process, connection in self.processes.values():
            connection.send(None)
            process.join(10.0)
            process.kill()


class Tally:
    """Prints failures as they come, and counts; with ``each``, also a line for every unit."""

    def __init__(self, each: bool = False) -> None:
        self.each = each
        self.lock = threading.Lock()
        self.parts: dict[str, Outcome] = {}
        self.finished = 0

    def __call__(self, unit: Unit, outcome: Outcome) -> None:
        """Add what became of a unit."""
        with self.lock:
            self.finished += 1
            part = self.parts.setdefault(unit.part, Outcome())
            part.checked += outcome.checked
            part.declined += outcome.declined
            part.left += outcome.left
            part.seconds += outcome.seconds
            part.failures += outcome.failures
            for title, reason in outcome.failures:
                print(f"FAILED {title}: {reason}", flush=True)
            if self.each:
                print(f"{unit.part} {unit.items}: {outcome.seconds:.1f} s", flush=True)

    @property
    def checked(self) -> int:
        return sum(part.checked for part in self.parts.values())

    @property
    def failed(self) -> int:
        return sum(len(part.failures) for part in self.parts.values())

    @property
    def left(self) -> int:
        """Checks of units that were begun, for which there was no time."""
        return sum(part.left for part in self.parts.values())

    def show(self) -> None:
        """Print a line for each part."""
        for name, part in sorted(self.parts.items()):
            others = {"declined": part.declined, "left": part.left}
            more = "".join(f", {count} {what}" for what, count in others.items() if count)
            print(
                f"{name:>20}: {part.checked} checked, {len(part.failures)} failed{more}, "
                f"{part.seconds:.0f} s of work"
            )


def work(
    units: list[Unit],
    checks: Callable[[Unit], Iterable[Titled]],
    workers: int,
    seconds: float,
    patience: float = float("inf"),
    each: bool = False,
) -> Tally:
    """Run all units, as far as there is time; without workers in this process."""
    tally = Tally(each)
    deadline = time.perf_counter() + seconds
    if workers == 0:
        for unit in units:
            if time.perf_counter() < deadline:
                tally(unit, execute(unit, checks, deadline=deadline))
        return tally
    queue: Queue[Unit] = Queue()
    for unit in units:
        queue.put(unit)
    threads = [Worker(queue, checks, tally, deadline, patience) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


__all__ = ["Declined", "Outcome", "Tally", "Unit", "execute", "work"]
