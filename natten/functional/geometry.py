"""Tiles along the axes, and the pairs of tokens that they cover: exact counts, also with dilation.

A kernel computes attention a tile of rows and a tile of columns at a time, within one dilation
group along each axis. Rows are queries and columns keys, or, ``inverse``, the other way round. A
row tile visits the column tiles that cover the union of its windows; those within the
intersection of its windows are *full*, and need no mask. Windows, boxes and tiles are products
over the axes, and so are all counts: this module counts along each axis.

Column tiles begin where the union does, or, ``aligned``, at multiples of their size from the
beginning of the columns. Row tiles begin at multiples of their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd, prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike

from natten import window
from natten.functional.problem import Problem
from natten.window import Axis

Shape = tuple[int, ...]
# Beyond all unwrapped positions.
_FAR = 2**40
Array = np.ndarray


class Box(NamedTuple):
    """Rows and columns along one axis: origin and extent of each, in tokens of the grid."""

    row_origin: int
    row_extent: int
    column_origin: int
    column_extent: int


class RowTiles(NamedTuple):
    """Tiles of rows, as positions in their dilation groups; stops are exclusive.

    Attributes:
        offsets: Where the tiles of each axis and of each size begin, in this order.
        times: How many tiles there are like each of them, and as many dilation groups have.
        first: First row of each tile.
        end: One past its last row.
        begin: First column that one of its rows sees.
        stop: One past the last.
        sight: First column that all of its rows see.
        sight_stop: One past the last.
        column_begin: First column that there is.
        column_end: One past the last.
        is_circular: Whether columns are those of a ring, unwrapped.
    """

    offsets: list[int]
    times: Array
    first: Array
    end: Array
    begin: Array
    stop: Array
    sight: Array
    sight_stop: Array
    column_begin: Array
    column_end: Array
    is_circular: Array


class Counts(NamedTuple):
    """Tiles along each axis, ``[axes, rows]`` for each size of rows and ``[axes, rows, columns]``
    for each size of columns, summed over dilation groups. In float64, which is exact here.

    Attributes:
        row_tiles: Tiles of rows.
        visited: Pairs of a row tile and a column tile that it visits.
        full: Those in which every row sees every column.
        all: All pairs.
    """

    row_tiles: Array
    visited: Array
    full: Array
    all: Array


def boxes(problem: Problem, inverse: bool = False) -> tuple[Box, ...]:
    """The rows and columns of a problem along each axis."""
    queries = zip(problem.query_origin, problem.query_shape, strict=True)
    keys = zip(problem.key_origin, problem.key_shape, strict=True)
    pairs = zip(keys, queries) if inverse else zip(queries, keys)
    return tuple([Box(*row, *column) for row, column in pairs])


class _Group(NamedTuple):
    """What decides how many tiles a dilation group has: its length, and its rows and columns."""

    length: int
    row_begin: int
    row_end: int
    column_begin: int
    column_end: int


def _groups(axis: Axis, box: Box) -> Iterator[tuple[_Group, int, int]]:
    """The dilation groups of each kind that has rows: the first of them, and their number."""
    found: dict[_Group, list[int]] = {}
    for group in range(axis.dilation):
        rows = window.box_bounds(group, axis.dilation, *box[:2])
        columns = window.box_bounds(group, axis.dilation, *box[2:])
        bounds = [max(0, int(bound)) for bound in (*rows, *columns)]
        kind = _Group(int(window.group_length(group, axis)), *bounds)
        found.setdefault(kind, []).append(group)
    for kind, groups in found.items():
        if kind.row_end > kind.row_begin:
            yield kind, groups[0], len(groups)


def _runs(axis: Axis, group: _Group, size: int, every: bool) -> Iterator[tuple[int, int, int]]:
    """Runs of row tiles of one size: the first, how many, and how often there are such tiles.

    Windows that no border holds back lie as far from their queries as those of one stride before.
    """
    begin, end = group.row_begin // size, -(-group.row_end // size)
    period = axis.stride // gcd(axis.stride, size)
    reach = axis.kernel_size + axis.stride
    low = max(group.row_begin, group.column_begin + reach)
    high = min(group.row_end, group.column_end - reach, group.length - reach)
    if axis.kernel_size == group.length and not axis.is_causal and not axis.is_circular:
        # All windows are the same.
        period, low, high = 1, group.row_begin, group.row_end
    low, high = -(-low // size), high // size
    # Nor with upsampling, where rows and columns are counted in different units.
    repeats = 1 if every or axis.upsampling > 1 else (high - low) // period
    if repeats < 2:
        yield begin, end - begin, 1
        return
    yield begin, low - begin, 1
    yield low, period, repeats
    rest = low + period * repeats
    yield rest, end - rest, 1


def row_tiles(
    axes: Sequence[Axis],
    boxes: Sequence[Box],
    sizes: Shape,
    inverse: bool = False,
    every: bool = True,
) -> RowTiles:
    """The tiles of rows of each of the sizes along each axis.

    Not ``every`` one, but one of those that differ by where they are alone.
    """
    runs, per_size = [], []
    for axis, box in zip(axes, boxes, strict=True):
        groups = list(_groups(axis, box)) or [(_Group(1, 0, 1, 0, 0), 0, 0)]
        for size in sizes:
            number = 0
            for group, example, alike in groups:
                for start, length, times in _runs(axis, group, size, every):
                    if length:
                        number += length
                        runs.append((
                            length, start * size, size, times * alike, *group[1:], example, *axis,
                        ))  # fmt: skip
            per_size.append(number)
    # Facts of each run, then of each of its tiles.
    of_runs = np.array(runs).T
    lengths = of_runs[0]
    total = int(lengths.sum())
    facts = of_runs[1:].repeat(lengths, 1)
    first, size, times, row_begin, row_end, column_begin, column_end, example, *window_ = facts
    first = first + size * (np.arange(total) - (lengths.cumsum() - lengths).repeat(lengths))
    end = np.minimum(first + size, row_end)
    first = np.maximum(first, row_begin)
    column_end = np.maximum(column_begin, column_end)
    lower, upper = _bounds(np.stack((first, end - 1)), example, axes, window_, inverse)
    is_circular = window_[5]
    low, high = (
        np.where(is_circular, far, c) for far, c in ((-_FAR, column_begin), (_FAR, column_end))
    )
    begin, sight = lower.clip(low, high)
    sight_stop, stop = upper.clip(low, high)
    offsets = [0, *accumulate(per_size[:-1])]
    return RowTiles(
        offsets, times, first, end, begin, stop, sight, sight_stop, column_begin, column_end,
        is_circular > 0,
    )  # fmt: skip


def _bounds(
    positions: Array, groups: Array, axes: Sequence[Axis], facts: Sequence[Array], inverse: bool
) -> Array:
    """Begins and ends of the windows of positions, each in a group of an axis of its own: ``facts``
    are those of Axis."""
    find = window.inverse_position_bounds if inverse else window.position_bounds
    # The formulas of windows hold for tensors of parameters, too, but for flags.
    position, *tensors = (torch.from_numpy(array) for array in (positions, groups, *facts[:4]))
    group, length, kernel_size, stride, dilation = cast("list[Any]", tensors)
    if all(axis.dilation == 1 for axis in axes):
        group, dilation = 0, 1
    result: Any = None
    for kind in {axis[4:] for axis in axes}:
        bounds = find(position, group, Axis(length, kernel_size, stride, dilation, *kind))
        found = np.stack([bound.numpy() for bound in bounds])
        is_kind = np.all([own == flag for own, flag in zip(facts[4:], kind)], axis=0)
        result = found if result is None else np.where(is_kind, found, result)
    return cast("Array", result)


def _visits(tiles: RowTiles, width: Array, aligned: bool) -> tuple[Array, Array]:
    """Column tiles of each width that row tiles visit, and those in sight of all their rows."""
    visited, full = _piece(tiles, tiles.begin, tiles.stop, width, aligned)
    rings = tiles.is_circular
    if not rings.any():
        return visited, full
    # No column tile lies across the seam of a ring.
    length = np.maximum(tiles.column_end - tiles.column_begin, 1)
    start = tiles.begin // length * length
    parts = [
        _piece(
            tiles, np.maximum(tiles.begin, start + n * length),
            np.minimum(tiles.stop, start + (n + 1) * length), width, aligned, start + n * length,
        )
        for n in range(3)
    ]  # fmt: skip
    around, around_full = (sum(part) for part in zip(*parts, strict=True))
    if aligned:
        # A tile that is seen from both sides of the seam is visited once.
        around = np.minimum(around, np.ceil(length / width))
    return np.where(rings, around, visited), np.where(rings, around_full, full)


def _piece(
    tiles: RowTiles, begin: Array, stop: Array, width: Array, aligned: bool, origin: Any = None
) -> tuple[Array, Array]:
    """`_visits` between these columns; aligned tiles lie at multiples of their width from
    ``origin``, by default the first column."""
    if not aligned:
        origin = begin
    elif origin is None:
        origin = tiles.column_begin
    sight, sight_stop = np.maximum(tiles.sight, begin), np.minimum(tiles.sight_stop, stop)
    visited = np.ceil((stop - origin) / width)
    full = np.floor((sight_stop - origin) / width) - np.ceil((sight - origin) / width)
    if aligned:
        visited -= np.floor((begin - origin) / width)
    visited[:, stop <= begin] = 0
    return visited, full.clip(0)


@lru_cache(maxsize=16384)
def count(
    axes: tuple[Axis, ...],
    boxes: tuple[Box, ...],
    rows: Shape,
    columns: Shape,
    inverse: bool = False,
    aligned: bool = False,
) -> Counts:
    """Count the tiles of some sizes of rows and columns along each of some axes.

    Args:
        axes: The windows.
        boxes: Rows and columns.
        rows: Sizes of row tiles.
        columns: Sizes of column tiles.
        inverse: Whether rows are keys.
        aligned: Whether column tiles lie at multiples of their size.
    """
    tiles = row_tiles(axes, boxes, rows, inverse, every=aligned)
    # Quotients of integers below 2 ** 53 are rounded to no other integer.
    width = np.array(columns, float)[:, None]
    visited, full = _visits(tiles, width, aligned)
    whole = np.ceil((tiles.column_end - tiles.column_begin) / width)
    terms = np.stack((visited.clip(0), full.clip(0), whole)) * tiles.times
    sums = np.add.reduceat(terms, tiles.offsets, axis=2)
    shape = (len(axes), len(rows))
    return Counts(
        np.add.reduceat(tiles.times, tiles.offsets).astype(float).reshape(shape),
        *sums.swapaxes(1, 2).reshape(3, *shape, len(columns)),
    )


def count_tiles(
    axes: tuple[Axis, ...],
    boxes: tuple[Box, ...],
    row_tile: Shape,
    column_tile: Shape,
    inverse: bool = False,
    aligned: bool = False,
) -> tuple[int, int, int, int]:
    """`Counts` over all axes, of tiles of one shape."""
    found = count(axes, boxes, tuple(row_tile), tuple(column_tile), inverse, aligned)
    own = range(len(axes))
    row_tiles = prod(int(found.row_tiles[n, n]) for n in own)
    visited, full, everything = (prod(int(part[n, n, n]) for n in own) for part in found[1:])
    return row_tiles, visited, full, everything


@lru_cache(maxsize=1024)
def count_pairs(
    axes: tuple[Axis, ...],
    query_shape: Shape | None = None,
    key_shape: Shape | None = None,
    query_origin: Shape | None = None,
    key_origin: Shape | None = None,
) -> int:
    """Pairs of a query and a key that it attends to, in a grid or between two boxes of it."""
    rank = len(axes)
    lengths = tuple(axis.length for axis in axes)
    queries = window.queries_of(axes)
    total = 1
    boxes = map(
        Box,
        query_origin or (0,) * rank,
        query_shape or queries,
        key_origin or (0,) * rank,
        key_shape or lengths,
    )
    for axis, box in zip(axes, boxes, strict=True):
        start, end = window.bounds_table(axis, *box)
        total *= int((end - start).sum())
    return total


def needed_pairs(problem: Problem) -> int:
    """Pairs of a query and a key that it attends to, for one batch entry and head."""
    p = problem
    in_grid = count_pairs(p.axes, p.query_shape, p.key_shape, p.query_origin, p.key_origin)
    return in_grid + p.num_queries * p.num_additional


def covering(shape: Shape, tile: ArrayLike) -> Array:
    """Tokens of the tiles of a shape, or of each of some shapes, that cover a box."""
    tiles = np.asarray(tile)
    return (-(-np.array(shape) // tiles) * tiles).prod(-1)


__all__ = [
    "Array", "Box", "Counts", "RowTiles", "Shape", "boxes", "count", "count_pairs", "count_tiles",
    "covering", "needed_pairs", "row_tiles",
]  # fmt: skip
