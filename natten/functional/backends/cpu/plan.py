"""Tables and boxes of one problem: what the compiled loops of the CPU backend walk over."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from natten.functional.problem import Problem
from natten.window import Axis, bounds_table, inverse_position_bounds

_Table = TypeVar("_Table")

# Keys and values of a box this large stay in a core's own cache; copying the halo is still cheap.
MAX_BOX_BYTES = 1 << 20
MIN_BOX_BYTES = 1 << 18
# Units of a batch entry where their number may depend on nothing else.
FIXED_UNITS = 8
# Multiply-adds that are worth a thread of their own: about a fifth of a millisecond.
WORK_PER_THREAD = 2_000_000


# Patches, times heads, of a box: as many are served by a chunk while it is in the cache.
MAX_MEMBERS = 32
CHUNK_BYTES = 1 << 17

# Tables have about a hundred bytes for each token along an axis. Of longer axes than these, in all,
# few are remembered.
MANY_TOKENS = 1 << 14
MAX_SHORT, MAX_LONG = 256, 8


def remembered(function: Callable[..., _Table]) -> Callable[..., _Table]:
    """What a function makes of a problem, or a box, and of numbers; as `lru_cache`, but in bounded
    memory for axes of any length."""
    short = lru_cache(maxsize=MAX_SHORT)(function)
    long = lru_cache(maxsize=MAX_LONG)(function)

    @wraps(function)
    def table(problem: Problem | Box, *arguments: Any, **named: Any) -> _Table:
        tokens = sum(problem.query_shape) + sum(problem.key_shape)
        return (short if tokens <= MANY_TOKENS else long)(problem, *arguments, **named)

    def cache_clear() -> None:
        short.cache_clear()
        long.cache_clear()

    table.cache_clear = cache_clear  # type: ignore[attr-defined]
    return table


# More than there are tokens.
UNBOUNDED = 2**62


@dataclass(frozen=True)
class Residue:
    """The rows of an axis that share one residue of the dilation, and what they can see."""

    first: int
    count: int
    other: int


@dataclass(frozen=True)
class Side:
    """One axis, seen from the queries or from the keys.

    Attributes:
        items: For each row: the first of the others that it sees, one past the last (both counted
            inside the residue), and an offset into the relative position bias.
        residues: The rows, by residue.
        dilation: The distance of neighbors.
        ring: The others of a residue of a circular axis, where what a row sees is unwrapped (see
            :mod:`natten.window`), or more than there are.
    """

    items: np.ndarray
    residues: tuple[Residue, ...]
    dilation: int
    ring: int = UNBOUNDED

    def blocks(self, tile: int) -> list[tuple[int, int, int, int, int]]:
        """Runs of up to `tile` rows of a residue: first, count, first of the others, lo, hi."""
        blocks = []
        for residue in self.residues:
            for start in range(0, residue.count, tile):
                count = min(tile, residue.count - start)
                first = residue.first + start * self.dilation
                last = first + (count - 1) * self.dilation
                # Both ends of a window grow with the row.
                low, high = self.items[first, 0], self.items[last, 1]
                blocks.append((first, count, residue.other, int(low), int(high)))
        return blocks


def query_side(
    axis: Axis, query_origin: int, query_extent: int, key_origin: int, key_extent: int
) -> Side:
    """The keys that each query of an axis sees."""
    start, end = bounds_table(axis, query_origin, query_extent, key_origin, key_extent)
    token = np.arange(query_origin, query_origin + query_extent)
    dilation = axis.dilation
    other = (token - key_origin) % dilation
    first_position = (key_origin + other) // dilation
    bias = first_position - token // dilation + axis.kernel_size - 1
    low, high = start.numpy() - first_position, end.numpy() - first_position
    if not axis.is_circular:
        available = np.maximum(-(-(key_extent - other) // dilation), 0)
        low = np.clip(low, 0, available)
        high = np.clip(high, low, available)
    residues = tuple(
        Residue(first, ceil((query_extent - first) / dilation), int(other[first]))
        for first in range(min(dilation, query_extent))
    )
    ring = axis.length // dilation if axis.is_circular else UNBOUNDED
    return Side(np.stack([low, high, bias], axis=1), residues, dilation, ring)


def key_side(
    queries: Side, axis: Axis, query_origin: int, key_origin: int, key_extent: int
) -> Side:
    """The queries that see each key of an axis: the inverse of `queries`."""
    dilation = axis.dilation
    items = np.zeros((key_extent, 3), np.int64)
    residues = []
    for first in range(min(dilation, key_extent)):
        count = ceil((key_extent - first) / dilation)
        other = (key_origin + first - query_origin) % dilation
        keys = np.arange(count)
        if axis.is_circular:
            bounds = inverse_position_bounds(torch.from_numpy(keys), first, axis)
            low, high = (bound.numpy() for bound in bounds)
        else:
            windows = queries.items[other::dilation]
            # Both ends of the windows grow, so that the queries of a key are a range.
            low = np.searchsorted(windows[:, 1], keys, side="right")
            high = np.maximum(np.searchsorted(windows[:, 0], keys, side="right"), low)
        difference = (key_origin + first) // dilation - (query_origin + other) // dilation
        bias = difference + keys + axis.kernel_size - 1
        items[first::dilation] = np.stack([low, high, bias], axis=1)
        residues.append(Residue(first, count, other))
    ring = len(queries.items) // dilation if axis.is_circular else UNBOUNDED
    return Side(items, tuple(residues), dilation, ring)


@dataclass(frozen=True)
class Sweep:
    """The arguments of one compiled loop that depend on the problem alone.

    Attributes:
        axes, items, blocks: The tables that boxes.py describes.
        units: Pieces of work: for each batch entry, for each box, one for each head.
        boxes: Boxes of a batch entry.
        capacity: The most tokens that a unit sees.
        rows: The most rows of a unit.
        longest: The largest window.
        threads: How many threads the work is worth.
    """

    axes: np.ndarray
    items: np.ndarray
    blocks: np.ndarray
    units: int
    boxes: int
    capacity: int
    rows: int
    longest: int
    threads: int


def make_sweep(
    sides: tuple[Side, ...],
    outer: int,
    row_work: int,
    token_bytes: int,
    budget: int,
    threads: int,
    least: int | None = None,
) -> Sweep:
    """Cut the rows into boxes.

    Args:
        sides: The three axes.
        outer: Independent repetitions (batch times heads).
        row_work: Multiply-adds for each pair of a row and one that it sees.
        token_bytes: Scratch memory for each token that a box sees.
        budget: Scratch memory that a box should not exceed.
        threads: Available threads.
        least: Units to make if possible; by default, what keeps the threads busy.
    """
    sizes = [side.items[:, 1] - side.items[:, 0] for side in sides]
    pairs = outer * prod(int(size.sum()) for size in sizes)
    threads = max(1, min(threads, pairs * row_work // WORK_PER_THREAD))
    if least is None:
        least = 4 * threads if threads > 1 else 1
    tiles = [max((r.count for r in side.residues), default=1) for side in sides]
    while True:
        blocks = [side.blocks(tile) for side, tile in zip(sides, tiles, strict=True)]
        capacity = prod(max((b[4] - b[3] for b in part), default=0) for part in blocks)
        units = outer * prod(map(len, blocks))
        small = capacity * token_bytes <= budget and units >= least
        if small or max(tiles) <= 1 or units == 0:
            break
        widest = tiles.index(max(tiles))
        tiles[widest] = ceil(tiles[widest] / 2)
    return _tables(sides, blocks, outer, threads)


def _tables(
    sides: tuple[Side, ...],
    blocks: list[list[tuple[int, int, int, int, int]]],
    outer: int,
    threads: int,
) -> Sweep:
    """The sweep over the product of these blocks of each axis."""
    longest = prod(int((side.items[:, 1] - side.items[:, 0]).max(initial=0)) for side in sides)
    units = outer * prod(map(len, blocks))
    item_starts = np.cumsum([0] + [len(side.items) for side in sides])
    block_starts = np.cumsum([0] + [len(part) for part in blocks])
    axes = [
        (item_starts[a], block_starts[a], len(blocks[a]), sides[a].dilation, sides[a].ring)
        for a in range(len(sides))
    ]
    return Sweep(
        axes=np.array(axes, np.int64),
        items=np.concatenate([side.items for side in sides]).astype(np.int64),
        blocks=np.array([b for part in blocks for b in part], np.int64).reshape(-1, 5),
        units=units,
        boxes=prod(map(len, blocks)),
        capacity=prod(max((b[4] - b[3] for b in part), default=0) for part in blocks),
        rows=prod(max((b[1] for b in part), default=0) for part in blocks),
        longest=longest,
        threads=min(threads, max(units, 1)),
    )


@dataclass(frozen=True)
class Sides:
    """The three axes of a problem, padded at the front."""

    queries: tuple[Side, ...]
    keys: tuple[Side, ...]


class Box(NamedTuple):
    """What the sides of a problem follow from."""

    axes: tuple[Axis, ...]
    query_origin: tuple[int, ...]
    query_shape: tuple[int, ...]
    key_origin: tuple[int, ...]
    key_shape: tuple[int, ...]


@remembered
def make_sides(box: Box) -> Sides:
    axes, query_origin, query_shape, key_origin, key_shape = box
    missing = 3 - len(axes)
    axes = (Axis(1, 1),) * missing + axes
    query_origin, key_origin = (0,) * missing + query_origin, (0,) * missing + key_origin
    query_shape, key_shape = (1,) * missing + query_shape, (1,) * missing + key_shape
    queries = tuple(map(query_side, axes, query_origin, query_shape, key_origin, key_shape))
    keys = tuple(map(key_side, queries, axes, query_origin, key_origin, key_shape))
    return Sides(queries, keys)


def sides_of(problem: Problem) -> Sides:
    return make_sides(
        Box(
            problem.axes,
            problem.query_origin,
            problem.query_shape,
            problem.key_origin,
            problem.key_shape,
        )
    )


def padded(count: int, lanes: int = 8) -> int:
    """`count`, rounded up to whole vectors."""
    return -(-count // lanes) * lanes


def scratch_bytes(problem: Problem) -> int:
    """Bytes of a packed pair of rows, one of head_dim and one of head_dim_v."""
    size = problem.accumulation_dtype.itemsize
    return (padded(problem.head_dim) + padded(problem.head_dim_v)) * size


@dataclass(frozen=True)
class Patches:
    """How blocks.py walks over one side of a problem.

    Attributes:
        sweep: The sweep over boxes.
        extents: Rows of a patch along each axis.
        reach: The most of the others that a patch sees along an axis, and one.
        members: The most patches of a box, times heads.
        steps: Pairs of a patch and one of the others that it sees, of a batch entry and head.
        count: Patches of a batch entry and head.
    """

    sweep: Sweep
    extents: np.ndarray
    reach: int
    members: int
    steps: int
    count: int


def _reaches(side: Side, extent: int) -> np.ndarray:
    """How many of the others each patch of an axis sees."""
    found = []
    for residue in side.residues:
        start = np.arange(0, residue.count, extent)
        last = np.minimum(start + extent, residue.count) - 1
        first, last = (residue.first + side.dilation * n for n in (start, last))
        found.append(side.items[last, 1] - side.items[first, 0])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def make_patches(
    sides: tuple[Side, ...], outer: int, group: int, row_work: int, lanes: int, threads: int
) -> Patches:
    """Lay patches of up to ``lanes`` rows, and boxes of up to MAX_MEMBERS patches and heads.

    Args:
        sides: The three axes.
        outer: Independent repetitions (batch times heads).
        group: Query heads of each key head.
        row_work: Multiply-adds for each pair of a row and one that it sees.
        lanes: Of a vector.
        threads: Available threads, which decide about nothing but how many are to run.
    """
    most = [max((r.count for r in side.residues), default=1) for side in sides]
    reaches = [
        {n: _reaches(side, n) for n in range(1, min(lanes, limit) + 1)}
        for side, limit in zip(sides, most, strict=True)
    ]
    sums = [{n: int(reach.sum()) for n, reach in axis.items()} for axis in reaches]
    shapes = [shape for shape in product(*sums) if prod(shape) <= lanes]
    # Of equal ones, that which is longest along the last axis, where neighbors are in memory.
    steps, extents = min(
        (prod(sums[a][n] for a, n in enumerate(shape)), shape[::-1]) for shape in shapes
    )
    extents = extents[::-1]
    along = [ceil(limit / extent) for limit, extent in zip(most, extents, strict=True)]
    while prod(along) * group > MAX_MEMBERS and max(along) > 1:
        widest = along.index(max(along))
        along[widest] = ceil(along[widest] / 2)
    blocks = [side.blocks(n * e) for side, n, e in zip(sides, along, extents, strict=True)]
    own = [axis[extent] for axis, extent in zip(reaches, extents, strict=True)]
    threads = max(1, min(threads, outer * steps * lanes * row_work // WORK_PER_THREAD))
    return Patches(
        _tables(sides, blocks, outer, threads),
        np.array(extents, np.int64),
        max(int(reach.max(initial=0)) for reach in own) + 1,
        prod(along) * group,
        steps,
        prod(map(len, own)),
    )


@remembered
def query_patches(problem: Problem, lanes: int, threads: int) -> Patches:
    """The patches of queries."""
    return make_patches(
        sides_of(problem).queries,
        problem.batch * problem.heads_kv,
        problem.heads // problem.heads_kv,
        (problem.head_dim + problem.head_dim_v) * problem.heads // problem.heads_kv,
        lanes,
        threads,
    )


@remembered
def key_patches(problem: Problem, lanes: int, threads: int) -> Patches:
    """The patches of keys, for their gradients."""
    return make_patches(
        sides_of(problem).keys,
        problem.batch * problem.heads_kv,
        1,
        2 * (problem.head_dim + problem.head_dim_v) * problem.heads // problem.heads_kv,
        lanes,
        threads,
    )


@remembered
def additional_patches(problem: Problem, lanes: int, threads: int) -> Patches:
    """The patches of additional keys, for their gradients: all queries see them."""
    extra = problem.num_additional
    extents = (*(1,) * (3 - problem.rank), *problem.query_shape)
    sides = tuple(
        Side(np.array([(0, extent, 0)] * rows), (Residue(0, rows, 0),), 1)
        for extent, rows in zip(extents, (1, 1, extra), strict=True)
    )
    return make_patches(
        sides,
        problem.batch * problem.heads_kv,
        1,
        2 * (problem.head_dim + problem.head_dim_v) * problem.heads // problem.heads_kv,
        lanes,
        threads,
    )


def chunk_of(problem: Problem) -> int:
    """Tokens of a chunk."""
    return max(CHUNK_BYTES // scratch_bytes(problem) // 8, 4) * 8


@remembered
def query_sweep(problem: Problem, threads: int, fixed: bool = False) -> Sweep:
    """The sweep over queries. Scratch memory stays under the size of the output where it can.

    With ``fixed``, neither the batch nor the threads change the boxes, for sums over boxes.
    """
    output = prod(problem.output_shape) * problem.dtype.itemsize // (2 * threads)
    if fixed:
        output = MAX_BOX_BYTES
    return make_sweep(
        sides_of(problem).queries,
        problem.batch * problem.heads_kv,
        (problem.head_dim + problem.head_dim_v) * problem.heads // problem.heads_kv,
        scratch_bytes(problem),
        min(max(output, MIN_BOX_BYTES), MAX_BOX_BYTES),
        threads,
        FIXED_UNITS * problem.batch if fixed else None,
    )


@remembered
def key_sweep(problem: Problem, threads: int) -> Sweep:
    """The sweep over keys, for their gradients."""
    return make_sweep(
        sides_of(problem).keys,
        problem.batch * problem.heads_kv,
        2 * (problem.head_dim + problem.head_dim_v) * problem.heads // problem.heads_kv,
        scratch_bytes(problem) + 2 * problem.accumulation_dtype.itemsize,
        MAX_BOX_BYTES,
        threads,
    )


def bias_extents(problem: Problem) -> np.ndarray:
    """Extents of the relative position bias of a head, padded to three axes."""
    kernel = (1,) * (3 - problem.rank) + problem.kernel_size
    return np.array([2 * k - 1 for k in kernel], np.int64)


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as an array, which is valid for as long as the tensor is.

    ``Tensor.numpy()`` forbids for ever that the storage is resized, which sharded training does
    with parameters.
    """
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    if not tensor.numel():
        return np.empty(tensor.shape, dtype)
    memory = (ctypes.c_byte * tensor.nbytes).from_address(tensor.data_ptr())
    return np.ndarray(tensor.shape, dtype, memoryview(memory))


def element_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Address, byte strides of batch, three axes and heads, element stride of the last axis.

    Args:
        tensor: ``[batch, *axes, heads, features]``.
    """
    size = tensor.element_size()
    batch, *axes, heads, features = tensor.stride()
    missing = (0,) * (3 - len(axes))
    scaled = (s * size for s in (batch, *missing, *axes, heads))
    return (tensor.data_ptr(), *scaled, features)
