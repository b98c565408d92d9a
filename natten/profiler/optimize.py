"""The search for the fastest backend, tiles and schedule of a call on this device.

Everything that a backend lists is simulated first; only what is predicted to be near the fastest
is compiled and timed, the most promising first, until the time is over. Forward settings are
searched for every backend that can run the call, backward settings for those whose forward pass
came close to the best. The backends' own choice is always among what is timed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod

import torch

from natten.devices import Device
from natten.functional import dispatch
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.profiler import measuring
from natten.profiler.configurations import Configuration, list_backend
from natten.profiler.subjects import Tensors, natten_call

# Predictions err by this much: what is further from the best is not timed.
_MARGIN = 1.3
_PER_BACKEND = 16
_PER_SIZE = 2
# Backends whose forward pass is slower than the best by this are not searched backward.
_CLOSE = 1.5

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Trial:
    """One configuration that was timed.

    Attributes:
        backend: Without suffix.
        config: The knobs.
        ms: Median milliseconds of the pass that was searched; None if it failed.
        failure: Why it failed.
        backward: Whether the backward pass was timed.
    """

    backend: str
    config: Config
    ms: float | None
    failure: str | None = None
    backward: bool = False


@dataclass
class Search:
    """What :func:`search` found so far.

    Attributes:
        trials: All that was timed, in order.
        forward: The fastest forward trial of each backend.
        backward: The fastest backward trial of each backend; empty without gradients.
        interrupted: Whether it was stopped by Ctrl-C.
        seconds: How long it took.
    """

    trials: list[Trial] = field(default_factory=list)
    forward: dict[str, Trial] = field(default_factory=dict)
    backward: dict[str, Trial] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0

    def add(self, trial: Trial) -> None:
        """Note a trial."""
        self.trials.append(trial)
        best = self.backward if trial.backward else self.forward
        known = best.get(trial.backend)
        if trial.ms is not None and (known is None or trial.ms < (known.ms or 0.0)):
            best[trial.backend] = trial

    def total_ms(self, backend: str) -> float:
        """Milliseconds of a backend's best settings, forward and, as far as known, backward."""
        trials = [self.forward.get(backend), self.backward.get(backend)]
        return sum(t.ms for t in trials if t is not None and t.ms is not None)

    @property
    def best(self) -> tuple[str, Config, float] | None:
        """The fastest backend, its knobs and milliseconds; None if nothing ran."""
        # A backend whose backward pass was not timed does not beat one whose was.
        names = [n for n in self.forward if n in self.backward] if self.backward else []
        names = names or list(self.forward)
        if not names:
            return None
        name = min(names, key=self.total_ms)
        config = self.forward[name].config
        if name in self.backward:
            other = self.backward[name].config
            config = replace(
                config,
                backward_q_tile_shape=other.backward_q_tile_shape,
                backward_kv_tile_shape=other.backward_kv_tile_shape,
            )
        return name, config, self.total_ms(name)


def backends(problem: Problem, named: str = "", base: Config = DEFAULT_CONFIG) -> list[str]:
    """Those that can run the problem; the eager ones only if nothing else can."""
    if named:
        dispatch.resolve(problem, base, named)
        return [named]
    able = [name for name in dispatch.BACKENDS if dispatch.can_run(name, problem, base)]
    return [name for name in able if name not in ("flex", "reference")] or able[-1:]


def _near(found: tuple[Configuration, ...]) -> list[Configuration]:
    """The default's place is taken by no tiles at all; of the others those worth timing."""
    others = found[1:]
    times = [c.ms for c in found if c.ms is not None]
    if not times:
        return list(others)[:_PER_BACKEND]
    limit = _MARGIN * min(times)
    chosen: list[Configuration] = []
    sizes: Counter[tuple[int, int, str | None]] = Counter()
    for c in others:
        # What predictions know least is how sizes compare: a few of each.
        size = (prod(c.q_tile_shape), prod(c.kv_tile_shape), c.kernel_schedule)
        if c.ms is not None and c.ms <= limit and sizes[size] < _PER_SIZE:
            chosen.append(c)
            sizes[size] += 1
    return chosen[:_PER_BACKEND]


def candidates(
    problem: Problem, backend: str, device: Device | None, base: Config = DEFAULT_CONFIG
) -> tuple[list[Config], list[Config]]:
    """Forward and backward configurations to time, the most promising first.

    What ``base`` sets is kept, the first of both is ``base`` itself.
    """
    listing = list_backend(backend, problem, device, absent=False)
    forward, backward = [base], [base]
    if backend == "blackwell" and base.run_persistent_kernel:
        forward.append(replace(base, run_persistent_kernel=False))
    if base.q_tile_shape is None:
        wanted = base.kernel_schedule
        listed = [c for c in listing.forward if wanted is None or c.kernel_schedule == wanted]
        if wanted is None:
            schedules = sorted({c.kernel_schedule for c in listed if c.kernel_schedule})
            forward += [replace(base, kernel_schedule=schedule) for schedule in schedules]
        forward += [
            replace(
                base, q_tile_shape=c.q_tile_shape, kv_tile_shape=c.kv_tile_shape,
                kernel_schedule=c.kernel_schedule,
            )
            for c in _near(tuple(listed))
        ]  # fmt: skip
    if base.backward_q_tile_shape is None:
        backward += [
            replace(
                base, backward_q_tile_shape=c.q_tile_shape, backward_kv_tile_shape=c.kv_tile_shape
            )
            for c in _near(listing.backward)
        ]
    return list(dict.fromkeys(forward)), backward


class _Stopped(KeyboardInterrupt):
    """Ctrl-C while a configuration was timed; the trial holds what was timed of it."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial


def _time(
    problem: Problem,
    tensors: Tensors,
    backend: str,
    config: Config,
    warmup: int,
    backward: bool,
    until: float,
) -> Trial:
    """Time a configuration; with fewer calls where more would not end before ``until``."""
    call = natten_call(problem, tensors, backend, config)
    device = problem.device
    first = None
    try:
        with torch.set_grad_enabled(backward):
            timed = (
                measuring.gradients(call(), tensors.inputs, tensors.grad_out) if backward else call
            )
            # The first call compiles. Slow calls need little warming up.
            timed()
            first = measuring.median_ms(timed, device, seconds=0, least=1)
            if time.perf_counter() + 3 * first / 1e3 > until:
                return Trial(backend, config, first, None, backward)
            for _ in range(min(warmup, int(200 / max(first, 1e-3)))):
                timed()
            ms = measuring.median_ms(timed, device, seconds=min(0.2, 6e-3 * first))
    except KeyboardInterrupt:
        if first is None:
            raise
        raise _Stopped(Trial(backend, config, first, None, backward)) from None
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Trial(backend, config, None, " ".join(str(error).split())[:160], backward)
    except Exception as error:
        # Compilers raise what they like; a configuration that does not compile is not an end.
        return Trial(backend, config, None, type(error).__name__, backward)
    return Trial(backend, config, ms, None, backward)


def search(
    problem: Problem,
    tensors: Tensors,
    device: Device | None,
    *,
    backend: str = "",
    base: Config = DEFAULT_CONFIG,
    warmup: int = 5,
    seconds: float = 45.0,
    progress: Progress | None = None,
) -> Search:
    """Time configurations for ``seconds``, and say which was fastest.

    Args:
        problem: The call; with its backward pass if it requires gradients.
        tensors: Its tensors.
        device: The device's facts for predictions; None for the CPU.
        backend: The only backend to search (without suffix); "" for all.
        base: Knobs that are kept in all that is tried.
        warmup: Calls before timing.
        seconds: How long to go on. The first trial of each pass always runs.
        progress: Called with a text and the share of the time that has passed.

    Returns:
        A :class:`Search`. Ctrl-C ends it early with what was found until then.
    """
    found = Search()
    start = time.perf_counter()

    def tell(text: str) -> None:
        if progress is not None:
            progress(text, min((time.perf_counter() - start) / max(seconds, 1e-9), 1.0))

    def run(trials: Iterator[tuple[str, Config]], until: float, backward: bool) -> None:
        longest = 0.0
        for n, (name, config) in enumerate(trials):
            began = time.perf_counter()
            # What would end too late is not begun.
            if n and began + longest > start + until:
                return
            tell(f"{name}-fna {'backward' if backward else 'forward'} {describe(config)}")
            found.add(_time(problem, tensors, name, config, warmup, backward, start + until))
            longest = max(longest, time.perf_counter() - began)

    try:
        names = backends(problem, backend, base)
        lists = {name: candidates(problem, name, device, base) for name in names}
        share = 0.5 if problem.requires_grad else 1.0
        run(_in_turn({name: lists[name][0] for name in names}), share * seconds, False)
        if problem.requires_grad and found.forward:
            best = min(trial.ms or 0.0 for trial in found.forward.values())
            close = [
                name for name, trial in found.forward.items() if (trial.ms or 0.0) <= _CLOSE * best
            ]
            run(_in_turn({name: lists[name][1] for name in close}), seconds, True)
    except _Stopped as stop:
        found.add(stop.trial)
        found.interrupted = True
    except KeyboardInterrupt:
        found.interrupted = True
    found.seconds = time.perf_counter() - start
    tell("done")
    return found


def _in_turn(lists: dict[str, list[Config]]) -> Iterator[tuple[str, Config]]:
    """The first of every backend, then the second of every one, ..."""
    for n in range(max(map(len, lists.values()), default=0)):
        for name, configs in lists.items():
            if n < len(configs):
                yield name, configs[n]


def describe(config: Config) -> str:
    """The knobs that are set, as text."""
    parts = []
    for name, q, kv in (
        ("tiles", config.q_tile_shape, config.kv_tile_shape),
        ("backward tiles", config.backward_q_tile_shape, config.backward_kv_tile_shape),
    ):
        if q is not None and kv is not None:
            parts.append(f"{name} {'x'.join(map(str, q))} / {'x'.join(map(str, kv))}")
    if config.kernel_schedule is not None:
        parts.append(f"schedule {config.kernel_schedule}")
    if not config.run_persistent_kernel:
        parts.append("not persistent")
    if config.torch_compile:
        parts.append("compiled")
    return ", ".join(parts) or "default"


__all__ = ["Search", "Trial", "backends", "candidates", "describe", "search"]
