"""Which stride, dilation, window and tile shapes waste less, for a given grid and window.

All candidates are simulated (:mod:`natten.simulator`). Of strides and windows the Pareto front is
kept: what no other candidate beats both in time and in how close it is to what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import log2, prod
from typing import TYPE_CHECKING, Any

from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.tables import table

if TYPE_CHECKING:
    from natten.simulator import Shape, Simulation

_MAX_CANDIDATES = 64
_MAX_ROWS = 12
_MIN_TOKENS = 64


@dataclass(frozen=True)
class Suggestion:
    """One way to call, and what it would cost.

    Attributes:
        kernel_size: Window.
        stride: Stride.
        dilation: Dilation.
        q_tile_shape: Query tile of the forward pass.
        kv_tile_shape: Key tile of the forward pass.
        waste: Executed over needed operations.
        ms: Predicted milliseconds of the forward pass.
        speedup: Over the call as it was asked for.
    """

    kernel_size: Shape
    stride: Shape
    dilation: Shape
    q_tile_shape: Shape
    kv_tile_shape: Shape
    waste: float
    ms: float
    speedup: float


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` found. ``str()`` is a table.

    Attributes:
        simulation: Of the call as it was asked for.
        strides: Strides of the same window, on the front of small stride and time.
        dilations: Dilations of the same window.
        windows: Windows of about the same size, on the front of many keys and time.
        tiles: Tile shapes for the call as it was asked for, the fastest first.
    """

    simulation: Simulation
    strides: tuple[Suggestion, ...]
    dilations: tuple[Suggestion, ...]
    windows: tuple[Suggestion, ...]
    tiles: tuple[Suggestion, ...]

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists only, for JSON."""
        kinds = ("strides", "dilations", "windows", "tiles")
        return {kind: [asdict(s) for s in getattr(self, kind)] for kind in kinds}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Notebooks show the table."""
        printer.text(str(self))

    def __str__(self) -> str:
        asked = self.simulation.problem
        parts = []
        for title, suggestions in (
            (f"stride, for window {_text(asked.kernel_size)}", self.strides),
            (f"dilation, for window {_text(asked.kernel_size)}", self.dilations),
            (f"windows near {_text(asked.kernel_size)}", self.windows),
            ("tile shapes", self.tiles),
        ):
            if suggestions:
                parts.append(f"{title}\n\n{_table(self.simulation, suggestions)}")
        return "\n\n".join(parts)


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _table(asked: Simulation, suggestions: Sequence[Suggestion]) -> str:
    rows = []
    for s in suggestions:
        same = (s.kernel_size, s.stride, s.dilation, s.q_tile_shape, s.kv_tile_shape) == (
            asked.problem.kernel_size, asked.problem.stride, asked.problem.dilation,
            asked.forward.q_tile_shape, asked.forward.kv_tile_shape,
        )  # fmt: skip
        rows.append(
            (
                ">" if same else "", _text(s.kernel_size), _text(s.stride), _text(s.dilation),
                _text(s.q_tile_shape), _text(s.kv_tile_shape),
                f"{s.waste:.2f}", f"{s.ms:.3g}", f"{s.speedup:.2f}",
            )
        )  # fmt: skip
    header = ("", "window", "stride", "dilation", "q tile", "kv tile", "waste", "ms", "speedup")
    return table(header, rows, left=4)


def _suggestion(asked: Simulation, problem: Problem, config: Config, ms: float) -> Suggestion:
    found = asked.variant(problem, config)
    return Suggestion(
        problem.kernel_size, problem.stride, problem.dilation,
        found.forward.q_tile_shape, found.forward.kv_tile_shape,
        found.waste, found.forward_ms, ms / found.forward_ms,
    )  # fmt: skip


def _powers(limit: int) -> list[int]:
    return [1 << n for n in range(limit.bit_length())]


def _combinations(per_axis: Sequence[Sequence[int]], asked: Shape) -> list[Shape]:
    """The combinations nearest to ``asked``: those that change all axes alike come first."""

    def distance(shape: Shape) -> tuple[float, ...]:
        ratios = [log2(n / a) for n, a in zip(shape, asked, strict=True)]
        return (max(ratios) - min(ratios), max(map(abs, ratios)))

    return sorted({*product(*per_axis), asked}, key=distance)[:_MAX_CANDIDATES]


def _thinned(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, evenly, with both ends."""
    if len(values) <= count:
        return list(values)
    step = (len(values) - 1) / (count - 1)
    return [values[round(n * step)] for n in range(count)]


def _front(
    suggestions: Iterable[Suggestion], size: Any, asked: Shape, of: str
) -> tuple[Suggestion, ...]:
    """Those that no other beats in time and in ``size`` (smaller is better), and the asked one."""
    kept: list[Suggestion] = []
    best = float("inf")
    for s in sorted(suggestions, key=lambda s: (size(s), s.ms)):
        # A hundredth is less than the prediction can tell apart.
        if s.ms < 0.99 * best:
            best = s.ms
            kept.append(s)
        elif getattr(s, of) == asked:
            kept.append(s)
    if len(kept) > _MAX_ROWS:
        chosen = _thinned(range(len(kept)), _MAX_ROWS)
        kept = [s for n, s in enumerate(kept) if n in chosen or getattr(s, of) == asked]
    return tuple(kept)


def _fitting(problems: Iterable[Problem]) -> list[Problem]:
    """Those whose windows go around their circular axes, and have no dilation with upsampling."""
    return [
        problem
        for problem in problems
        if all(
            (not axis.is_circular or axis.length % (axis.stride * axis.dilation) == 0)
            and (axis.upsampling == 1 or axis.dilation == 1)
            for axis in problem.axes
        )
    ]


def _strides(problem: Problem) -> list[Problem]:
    axes = [sorted({*_powers(k), k}) for k in problem.kernel_size]
    ones = (1,) * problem.rank
    candidates = {ones, problem.stride, *_combinations(axes, ones)}
    # Blocks that tiles of both kinds can follow, on every axis.
    aligned = [[s for s in axis if s in (1, 4, 8, 16, axis[-1])] for axis in axes]
    candidates |= set(_combinations(aligned, tuple(axis[-1] for axis in aligned)))
    return _fitting([replace(problem, stride=stride) for stride in sorted(candidates)])


def _dilations(problem: Problem) -> list[Problem]:
    room = [n // k for n, k in zip(problem.grid, problem.kernel_size, strict=True)]
    axes = [sorted({*_powers(n), n}) for n in room]
    candidates = {problem.dilation, (1,) * problem.rank, tuple(room)}
    for d in sorted({n for axis in axes for n in axis}):
        candidates.add(tuple(min(d, n) for n in room))
    return _fitting([replace(problem, dilation=dilation) for dilation in sorted(candidates)])


def _windows(problem: Problem) -> list[Problem]:
    axes = []
    for k, s, d, n in zip(
        problem.kernel_size, problem.stride, problem.dilation, problem.grid, strict=True
    ):
        reach = max(2, k // 4)
        near = range(max(s, k - reach), min(n // d, k + reach) + 1)
        multiples = [m for m in near if m % 8 == 0 or m % 8 == 1] if k >= 16 else list(near)
        axes.append(sorted({*_thinned(multiples, 31 // len(problem.grid)), k}))
    windows = _combinations(axes, problem.kernel_size)
    return [replace(problem, kernel_size=window) for window in windows]


def _tiles(simulation: Simulation) -> list[Config]:
    listed = simulation.listed_tiles()
    # Smaller tiles leave parts of the matrix units idle, which the predictions do not know.
    pairs = [pair for pair in listed if min(map(prod, pair)) >= _MIN_TOKENS] or listed
    return [Config(q_tile_shape=q, kv_tile_shape=kv) for q, kv in pairs[:_MAX_CANDIDATES]]


def advise(simulation: Simulation) -> Advice:
    """Simulate strides, dilations, windows and tile shapes near a simulated call.

    Args:
        simulation: What :func:`natten.simulate` returned.

    Returns:
        An :class:`Advice`. A larger stride gives up some of the smoothness of the windows, another
        window is another model: what is worth its speed is for the reader to say.

    Raises:
        RuntimeError: No GPU backend runs the problem.
    """
    problem = simulation.problem
    base = simulation.variant(problem).forward_ms

    def of(problems: Iterable[Problem]) -> list[Suggestion]:
        return [_suggestion(simulation, p, DEFAULT_CONFIG, base) for p in problems]

    strides = _front(of(_strides(problem)), lambda s: prod(s.stride), problem.stride, "stride")
    windows = _front(
        of(_windows(problem)), lambda s: -prod(s.kernel_size), problem.kernel_size, "kernel_size"
    )
    tiles = sorted(
        (_suggestion(simulation, problem, config, base) for config in _tiles(simulation)),
        key=lambda s: s.ms,
    )
    return Advice(
        simulation, strides, tuple(of(_dilations(problem))), windows, tuple(tiles[:_MAX_ROWS])
    )


__all__ = ["Advice", "Suggestion", "advise"]
