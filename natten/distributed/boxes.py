"""Boxes of tokens of a global grid: which keys a box of queries needs, and which queries see a key.

Pure geometry, all of it asked of :mod:`natten.window`; nothing here knows of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import groupby, product
from math import prod
from typing import NamedTuple

import torch

from natten import window
from natten._internals import concrete
from natten.window import Axis


class Box(NamedTuple):
    """A box of tokens of the global grid.

    Attributes:
        origin: Its first token.
        extent: Tokens along each axis.
    """

    origin: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """One past its last token, along each axis."""
        return tuple([o + n for o, n in zip(self.origin, self.extent)])

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return prod(self.extent)

    def intersection(self, other: Box) -> Box:
        """The tokens of both."""
        return between(map(max, self.origin, other.origin), map(min, self.end, other.end))

    def holds(self, other: Box) -> bool:
        """Whether it has all tokens of another."""
        return not other.tokens or self.intersection(other) == other

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it lies in a tensor ``[batch, *outer.extent, ...]``."""
        starts = [o - p for o, p in zip(self.origin, outer.origin)]
        return (slice(None), *[slice(s, s + n) for s, n in zip(starts, self.extent)])


def between(low: Iterable[int], high: Iterable[int]) -> Box:
    """The box from ``low`` to ``high`` (exclusive); empty where they cross."""
    low = tuple(low)
    return Box(low, tuple([max(h - l, 0) for l, h in zip(low, high)]))


def whole(grid: Sequence[int]) -> Box:
    """All of a grid."""
    return Box((0,) * len(grid), tuple(grid))


def moved(box: Box, offset: Iterable[int]) -> Box:
    """The box somewhere else."""
    return Box(tuple([o + n for o, n in zip(box.origin, offset)]), box.extent)


def margin(axis: Axis) -> int:
    """Room on both sides of a ring that is unrolled: whole windows, and a number of tokens that
    leaves dilation and stride groups what they are."""
    return -(-(axis.kernel_size + axis.stride) // axis.stride) * axis.stride * axis.dilation


def unrolled(axis: Axis) -> Axis:
    """A ring as an axis with borders, and room beyond them for tokens of the other end."""
    return axis._replace(length=axis.length + 2 * margin(axis), is_circular=False)


def turns(axis: Axis) -> tuple[int, ...]:
    """How far a token of an unrolled ring is from where it is, and is again."""
    return 0, -axis.length, axis.length


def parts(boxes: Iterable[Box], of: Box) -> list[Box]:
    """What boxes have in common with another, where that is any."""
    common = [box.intersection(of) for box in boxes]
    return [part for part in common if part.tokens]


def chunk_lengths(length: int, parts: int) -> tuple[int, ...]:
    """Extents of the shards of an axis, as torch.chunk and DTensor cut it."""
    size = -(-length // parts)
    return tuple([max(min(size, length - size * i), 0) for i in range(parts)])


def shards(
    grid: Sequence[int], axes: Sequence[int], splits: Sequence[Sequence[int]]
) -> tuple[Box, ...]:
    """The boxes of a grid whose ``axes`` are cut into ``splits``, the last axis fastest."""
    boxes = []
    for place in product(*[range(len(split)) for split in splits]):
        origin, extent = [0] * len(grid), list(grid)
        for axis, split, i in zip(axes, splits, place):
            origin[axis], extent[axis] = sum(split[:i]), split[i]
        boxes.append(Box(tuple(origin), tuple(extent)))
    return tuple(boxes)


def _along_axes(
    function: Callable[..., tuple[int, int]],
    axes: Sequence[Axis],
    queries: Box,
    *more: Sequence[int],
) -> Box:
    if not queries.tokens:
        return Box(queries.origin, (0,) * len(axes))
    return between(*zip(*[function(*along) for along in zip(axes, *queries, *more)]))


@lru_cache(maxsize=4096)
@concrete
def _needed_along(axis: Axis, origin: int, extent: int) -> tuple[int, int]:
    if axis.is_circular:  # of which every box has all tokens
        return 0, axis.length
    low, high = axis.length, 0
    # A range has tokens of at most as many groups as it has tokens.
    for group in {index % axis.dilation for index in range(origin, origin + extent)}:
        first, end = window.box_bounds(group, axis.dilation, origin, extent)
        start, stop = map(int, window.union_bounds(first, end - 1, group, axis))
        if stop > start:
            low = min(low, group + axis.dilation * start)
            high = max(high, group + axis.dilation * (stop - 1) + 1)
    return (low, high) if high > low else (origin, origin)


def needed(axes: Sequence[Axis], queries: Box) -> Box:
    """The smallest box of keys that holds all that a box of queries sees."""
    return _along_axes(_needed_along, axes, queries)


@lru_cache(maxsize=4096)
@concrete
def _viewers_along(axis: Axis, origin: int, extent: int, low: int, high: int) -> tuple[int, int]:
    if axis.is_circular:
        return 0, axis.length
    start, end = window.bounds_table(axis, origin, extent, low, high - low)
    seeing = (end > start).nonzero()
    if not len(seeing):
        return origin, origin
    return origin + int(seeing[0]), origin + int(seeing[-1]) + 1


def viewers(axes: Sequence[Axis], queries: Box, keys: Box) -> Box:
    """The smallest box of the queries that see any of the keys."""
    return _along_axes(_viewers_along, axes, queries, keys.origin, keys.end)


# Query tiles have powers of two along each axis, mostly this many tokens: a cut elsewhere leaves
# tiles half empty.
_TILE = 8


@lru_cache(maxsize=4096)
@concrete
def _interior_along(axis: Axis, origin: int, extent: int) -> tuple[int, int]:
    """The longest range of queries that see keys of their own range alone, by whole tiles."""
    if axis.is_circular:
        return 0, axis.length
    start, end = window.bounds_table(axis, origin, extent)
    group = torch.arange(origin, origin + extent, device="cpu") % axis.dilation
    first, last = group + axis.dilation * start, group + axis.dilation * (end - 1)
    local = (end <= start) | ((first >= origin) & (last < origin + extent))
    best, at = (0, 0), 0
    # Queries of a dilated axis that see local keys alone need not be one range.
    for is_local, run in groupby(local.tolist()):
        stop = at + len(list(run))
        if is_local:
            low = -(-at // _TILE) * _TILE
            high = stop if stop == extent else stop // _TILE * _TILE
            best = max(best, (low, high), key=lambda ends: ends[1] - ends[0])
        at = stop
    return origin + best[0], origin + best[1]


def interior_first(axes: Sequence[Axis], own: Box) -> tuple[Box, ...]:
    """A box of queries in parts: those that see keys of it alone, then what is around them.

    One slab is cut off at each end of one axis after the other: at most 2 * rank + 1 boxes, and
    one alone where no query sees local keys only.
    """
    inner = _along_axes(_interior_along, axes, own)
    if not inner.tokens:
        return (own,) if own.tokens else ()
    cut, low, high = [inner], list(own.origin), list(own.end)
    for i, cuts in enumerate(zip(inner.origin, inner.end)):
        for start, stop in ((low[i], cuts[0]), (cuts[1], high[i])):
            if stop > start:
                cut.append(
                    between([*low[:i], start, *low[i + 1 :]], [*high[:i], stop, *high[i + 1 :]])
                )
        low[i], high[i] = cuts
    return tuple(cut)


__all__ = [
    "Box",
    "between",
    "chunk_lengths",
    "interior_first",
    "margin",
    "moved",
    "needed",
    "parts",
    "shards",
    "turns",
    "unrolled",
    "viewers",
    "whole",
]
