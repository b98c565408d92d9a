"""Which tiles a kernel uses: the geometry of windows, and a small cost model over it.

The time of a kernel is, to first order, the pairs of queries and keys that its tiles cover,
divided by the rate at which a tile of that size is computed. The first factor follows from the
windows exactly (`work`). The second is measured, on Hopper GPUs, relative to the best tile: the
tables below. Nothing is timed at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from natten.functional import geometry
from natten.functional.geometry import Array, Shape
from natten.functional.problem import Problem

_POWERS = tuple(1 << n for n in range(10))
# Tokens of the smallest tile: a matrix product takes no less.
_LEAST_TOKENS = 16
# Bytes of shared memory that only GPUs for data centers have.
_ROOMY = 128 * 1024


def block(features: int) -> int:
    """Features of a tile: a power of two, at least what a matrix product takes."""
    return max(16, next_power(features))


def next_power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def parts(features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Features of the tiles that hold a head: of one, or of a main one and one for the rest where
    two take less. Of narrow float32 tiles, warps would compute the same."""
    whole = block(features)
    split = whole // 2, block(features - whole // 2)
    is_narrow = dtype == torch.float32 and features < 64
    return (whole,) if is_narrow or sum(split) >= whole else split


@dataclass(frozen=True)
class Tiling:
    """How one kernel divides its work.

    Attributes:
        query: Query tile, one extent per axis; powers of two.
        key: Key tile.
        warps: Warps of a program.
        stages: Tiles in flight.
        mask_edges: Whether only tiles at the edges of windows are masked.
        whole: Whether no tile is masked: all are in full sight of each other.
        tma: Whether tiles of the inner loop are loaded by the tensor memory accelerator.
        programs: For persistent kernels, the number of programs; 0 for one per tile.
        warp_specialize: Whether loads, products and softmax get warps of their own.
        ping_pong: Whether two groups of warps own half of the rows each and do not wait for each
            other.
        skips: Whether each of these groups skips tiles that none of its own rows sees.
        splits: Programs that share the columns of a row tile.
        rate: At which tiles of this size are computed, beside other sizes.
    """

    query: Shape
    key: Shape
    warps: int = 4
    stages: int = 2
    mask_edges: bool = False
    whole: bool = False
    tma: bool = False
    programs: int = 0
    warp_specialize: bool = False
    ping_pong: bool = False
    skips: bool = False
    splits: int = 1
    rate: float = field(default=1.0, compare=False)


class _Size(NamedTuple):
    """Tokens of a row and a column tile, how to run them, and their relative rate."""

    rows: int
    columns: int
    warps: int
    stages: int
    rate: float


# By head_dim: powers of two, and 96 for what is between 64 and 128.
_Sizes = dict[int, tuple[_Size, ...]]


def _always(_: Problem) -> bool:
    return True


def _largest_group(problem: Problem, extents: Shape) -> Shape:
    """The extents of the largest dilation group of a box."""
    return tuple([-(-n // d) for n, d in zip(extents, problem.dilation, strict=True)])


def _covering(problem: Problem, extents: Shape, tile: ArrayLike) -> Array:
    """`geometry.covering` of all dilation groups of a box."""
    found = geometry.covering(_largest_group(problem, extents), tile)
    return found * prod(problem.dilation)


@dataclass(frozen=True, eq=False)
class Kernel:
    """What the choice of tiles knows of a kernel.

    Attributes:
        name: For messages.
        inverse: Whether its rows are keys.
        products: Matrix products of a pair of tiles.
        sizes: Tiles to choose from, with their rates where most tiles are masked.
        mask_edges_sizes: The same where `Tiling.mask_edges` leaves masks out (large windows).
        float32_sizes: Those of float32, which takes twice the memory, and three products for one.
        suits: Whether it can run a problem.
        instead_of: The kernel that runs what this one cannot, or not as fast; None for that itself.
        by_halves: Whether the halves of its row tiles skip column tiles that they do not see.
        mask: How much longer it takes for a masked tile.
        start: How long it takes to begin and end, as one program alone fits a multiprocessor: in
            tiles.
    """

    name: str
    inverse: bool
    products: int
    sizes: _Sizes
    mask_edges_sizes: _Sizes
    float32_sizes: _Sizes = field(default_factory=dict)
    suits: Callable[[Problem], bool] = _always
    instead_of: Kernel | None = None
    by_halves: bool = False
    mask: float = 0.0
    start: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def general(self) -> Kernel:
        """The kernel that runs every problem, and takes as much memory."""
        return self.instead_of or self

    def rate(self, problem: Problem) -> float:
        """The rate of its first tiles."""
        size, *_ = self.sizes[max(problem.head_dim, problem.head_dim_v)]
        return size.rate

    def time(self, problem: Problem, covered: Any, inside: Any, started: Any) -> Any:
        """Estimated time for so many pairs that are covered and inside, at a rate of 1; ``started``
        are those of each row tile with one column tile."""
        start = self.start * started
        if self.inverse:
            start = start * (problem.heads_kv / problem.heads)
        return covered + self.mask * (covered - inside) + start

    def cost(self, problem: Problem, query: Shape, key: Shape) -> float:
        """`time` of tiles of these shapes."""
        covered, inside = work(problem, half(query) if self.by_halves else query, key, self.inverse)
        extents, rows, columns = problem.query_shape, query, key
        if self.inverse:
            extents, rows, columns = problem.key_shape, key, query
        started = int(_covering(problem, extents, rows)) * prod(columns)
        return float(self.time(problem, covered, inside, started))

    def time_of(self, problem: Problem, tiling: Tiling) -> float:
        """`cost` at the rate of tiles of this size."""
        return self.cost(problem, tiling.query, tiling.key) / tiling.rate


_FORWARD_SIZES: _Sizes = {
    32: (_Size(64, 64, 4, 3, 1.0), _Size(32, 32, 2, 3, 0.71), _Size(64, 128, 4, 2, 0.88)),
    64: (
        _Size(64, 128, 4, 2, 1.03),
        _Size(64, 64, 4, 3, 1.0),
        _Size(64, 32, 4, 3, 0.905),
        _Size(128, 64, 4, 3, 1.06),
    ),
    96: (
        _Size(64, 64, 4, 3, 1.0),
        _Size(64, 32, 4, 3, 0.98),
        _Size(128, 64, 8, 3, 1.0),
        _Size(128, 128, 8, 2, 0.95),
    ),
    128: (
        _Size(128, 128, 8, 3, 1.0),
        _Size(64, 64, 4, 3, 0.97),
        _Size(64, 32, 4, 3, 0.907),
        _Size(128, 64, 4, 2, 1.03),
    ),
    256: (_Size(128, 64, 8, 2, 1.0), _Size(64, 32, 4, 2, 0.84)),
    512: (_Size(64, 32, 8, 2, 1.0),),
    1024: (_Size(16, 32, 8, 1, 1.0),),
}
FORWARD = Kernel("forward", False, 2, _FORWARD_SIZES, {
    **_FORWARD_SIZES,
    64: (_Size(128, 64, 4, 3, 1.0), _Size(64, 64, 4, 3, 0.93)),
    128: (_Size(128, 128, 8, 3, 1.0), _Size(64, 64, 4, 3, 0.92), _Size(128, 64, 4, 2, 0.93)),
}, {
    32: (_Size(64, 64, 4, 2, 1.0), _Size(64, 32, 4, 2, 0.93)),
    64: (_Size(32, 64, 4, 2, 1.0),),
    96: (_Size(32, 64, 4, 2, 1.0),),
    128: (_Size(32, 64, 4, 2, 1.0),),
    256: (_Size(16, 32, 4, 2, 1.0),),
})  # fmt: skip

_QUERY_SIZES: _Sizes = {
    32: (_Size(64, 64, 4, 3, 1.0), _Size(32, 32, 2, 3, 0.6)),
    64: (_Size(64, 64, 4, 3, 1.0), _Size(64, 32, 4, 3, 0.935)),
    96: (_Size(128, 64, 8, 3, 1.0), _Size(64, 64, 4, 2, 0.86)),
    128: (_Size(64, 64, 4, 2, 1.0),),
    256: (_Size(64, 64, 8, 2, 1.0), _Size(64, 32, 4, 2, 0.99), _Size(32, 64, 4, 2, 0.88)),
    512: (_Size(16, 32, 4, 2, 1.0),),
    1024: (_Size(16, 16, 8, 1, 1.0),),
}
QUERY_GRADIENT = Kernel("query", False, 3, _QUERY_SIZES, {
    **_QUERY_SIZES,
    128: (_Size(128, 64, 8, 3, 1.08), _Size(64, 64, 4, 2, 1.0)),
}, {
    32: (_Size(64, 64, 4, 2, 1.0), _Size(64, 32, 4, 2, 0.97)),
    64: (_Size(32, 64, 4, 2, 1.0),),
    96: (_Size(32, 32, 4, 2, 1.0),),
    128: (_Size(32, 64, 4, 1, 1.0), _Size(16, 64, 4, 1, 0.93)),
    256: (_Size(16, 32, 4, 1, 1.0),),
})  # fmt: skip

_KEY_VALUE_SIZES: _Sizes = {
    32: (_Size(64, 32, 4, 3, 1.0), _Size(32, 32, 2, 3, 0.735), _Size(64, 64, 4, 2, 0.97)),
    64: (_Size(64, 64, 4, 3, 1.0), _Size(64, 32, 4, 3, 0.945)),
    96: (_Size(64, 32, 4, 3, 1.0), _Size(64, 64, 4, 2, 0.81)),
    128: (_Size(64, 64, 4, 2, 1.0),),
    256: (_Size(64, 32, 8, 2, 1.0), _Size(32, 32, 4, 2, 0.94), _Size(32, 64, 8, 2, 0.96)),
    512: (_Size(16, 32, 4, 2, 1.0),),
    1024: (_Size(16, 16, 8, 1, 1.0),),
}
KEY_VALUE_GRADIENT = Kernel("key_value", True, 4, _KEY_VALUE_SIZES, _KEY_VALUE_SIZES, {
    32: (_Size(64, 64, 4, 2, 1.0), _Size(64, 32, 4, 2, 0.98)),
    64: (_Size(32, 64, 4, 2, 1.0),),
    96: (_Size(32, 32, 4, 2, 1.0),),
    128: (_Size(32, 64, 8, 1, 1.0), _Size(16, 32, 4, 2, 0.9)),
    256: (_Size(16, 32, 8, 1, 1.0),),
})  # fmt: skip


def has_ping_pong_heads(problem: Problem) -> bool:
    """Whether `PING_PONG` knows heads like those of the problem."""
    known = (problem.head_dim in _PING_PONG_SIZES, problem.head_dim_v in _PING_PONG_SIZES)
    return all(known) and problem.dtype != torch.float32


def is_dilated(problem: Problem) -> bool:
    """Whether tokens form several dilation groups."""
    return any(d > 1 for d in problem.dilation)


def _has_equal_groups(problem: Problem) -> bool:
    """Whether descriptors find every dilation group in all tensors: as many tokens, which a number
    of 32 bits leads to from the first, see `launcher.descriptor`."""
    width = problem.heads * block(max(problem.head_dim, problem.head_dim_v))
    return (
        problem.query_shape == problem.key_shape == problem.grid
        and all(n % d == 0 for n, d in zip(problem.grid, problem.dilation, strict=True))
        and problem.num_queries * width < 2**31
    )


def _suits_gluon(problem: Problem) -> bool:
    return (
        has_ping_pong_heads(problem)
        and not problem.has_rpb
        and not problem.softcap
        and not problem.has_key_mask
        # It loads whole tiles of additional keys, whatever they hold behind a length.
        and not problem.has_lengths
        and problem.num_keys > 0
        and not (problem.is_circular or problem.upsampling or problem.grids)
        and (not is_dilated(problem) or _has_equal_groups(problem))
    )


def _suits_fused(problem: Problem) -> bool:
    # Sinks and masks of queries are in the logsumexp.
    return (
        _suits_gluon(problem)
        and problem.head_dim in _FUSED_SIZES
        and problem.head_dim == problem.head_dim_v
        and problem.num_queries > 0
    )


# Rates against those of `FORWARD` where it masks most tiles.
_PING_PONG_SIZES: _Sizes = {
    48: (_Size(128, 128, 4, 3, 1.38),),
    64: (_Size(128, 128, 4, 3, 1.4),),
    80: (_Size(128, 128, 4, 2, 1.34),),
    96: (_Size(128, 128, 4, 2, 1.48),),
    128: (_Size(128, 128, 4, 2, 1.62),),
    256: (_Size(128, 64, 4, 2, 1.35),),
}
# Two groups of warps, each with half of the query tile, whose products and softmax alternate.
PING_PONG = Kernel(
    "forward", False, 2, _PING_PONG_SIZES, _PING_PONG_SIZES, suits=_suits_gluon,
    instead_of=FORWARD, by_halves=True, mask=0.4, start=1.5,
)  # fmt: skip

_FLOAT8_SIZES: _Sizes = {
    64: (_Size(128, 128, 4, 3, 1.0),),
    128: (_Size(128, 128, 4, 3, 1.0),),
}
# The same with 8-bit queries, keys and values, for calls that ask for it.
FLOAT8 = replace(PING_PONG, sizes=_FLOAT8_SIZES, mask_edges_sizes=_FLOAT8_SIZES)

# The rate is that of its five products against the seven of two kernels.
_FUSED_SIZES: _Sizes = {
    48: (_Size(128, 128, 4, 2, 0.87),),
    64: (_Size(128, 128, 4, 2, 0.87),),
    80: (_Size(128, 64, 4, 2, 0.92),),
    96: (_Size(128, 64, 4, 2, 1.04),),
    128: (_Size(128, 64, 4, 2, 0.92),),
}
# All gradients in one pass. Halves of key tiles wait for each other: skipping gains nothing.
FUSED = Kernel(
    "key_value", True, 5, _FUSED_SIZES, _FUSED_SIZES, suits=_suits_fused,
    instead_of=KEY_VALUE_GRADIENT, start=4.0,
)  # fmt: skip


def _suits_single(problem: Problem) -> bool:
    """Whether every program of a kernel could see all queries of a head, and all of its keys."""
    return (
        problem.dtype != torch.float32
        and problem.heads == problem.heads_kv
        and problem.query_shape == problem.key_shape == problem.grid
        and not (problem.varlen or problem.num_additional)
        and not (problem.has_key_mask or problem.has_query_mask)
        and not (problem.is_circular or problem.upsampling or problem.grids)
        # Every token sees itself, so that no key is left out.
        and all(s == 1 for s in problem.stride)
        and prod(_single_queries(problem)) <= _SINGLE_QUERIES
        and max(problem.head_dim, problem.head_dim_v) <= _SINGLE_FEATURES
    )


def _single_queries(problem: Problem) -> Shape:
    """The query tile that holds a dilation group."""
    *tile, last = map(next_power, _largest_group(problem, problem.grid))
    return (*tile, max(last, _SINGLE_KEYS // prod(tile)))


# The largest tile of queries and widest head for which that is faster, and keys of a tile.
_SINGLE_QUERIES, _SINGLE_FEATURES, _SINGLE_KEYS = 128, 64, 64
# All gradients where one program has all queries of a head: none is summed in memory.
SINGLE = Kernel("query", False, 5, {}, {}, suits=_suits_single, instead_of=QUERY_GRADIENT)


def cost_of_two(problem: Problem, found: BackwardTilings) -> float:
    """Estimated time of the kernels for the gradients of query, and of key and value."""
    query, other = found.query, found.key_value
    query_cost = QUERY_GRADIENT.cost(problem, query.query, query.key)
    other_cost = KEY_VALUE_GRADIENT.cost(problem, other.query, other.key)
    if problem.num_additional:
        dense, last = additional_problem(problem), found.additional
        query_cost += QUERY_GRADIENT.cost(dense, (prod(query.query),), (prod(query.key),))
        other_cost += KEY_VALUE_GRADIENT.cost(dense, last.query, last.key)
    return QUERY_GRADIENT.products * query_cost + KEY_VALUE_GRADIENT.products * other_cost


def single_tiling(problem: Problem) -> Tiling:
    """The tiling of `SINGLE`, for a problem that suits it."""

    def tokens(key: Shape) -> tuple[int, int]:
        return int(_covering(problem, problem.grid, key)), -key[-1]

    key = min(shapes(_SINGLE_KEYS, problem.rank), key=tokens)
    tiling = Tiling(_single_queries(problem), key)
    return replace(tiling, whole=_whole(problem, tiling, False))


def is_single_faster(problem: Problem, found: BackwardTilings) -> bool:
    """Whether `SINGLE` is estimated to take less time than two kernels with these tilings."""
    if not SINGLE.suits(problem):
        return False
    tiling = single_tiling(problem)
    cost = SINGLE.products * SINGLE.cost(problem, tiling.query, tiling.key)
    return cost < cost_of_two(problem, found)


def bias_paddings(*tilings: Tiling) -> tuple[int, ...]:
    """How far beyond the table of biases the pairs of the tiles of these kernels reach."""
    reaches = [
        [q + k - 2 for q, k in zip(tiling.query, tiling.key, strict=True)] for tiling in tilings
    ]
    most = [max(axis) for axis in zip(*reaches, strict=True)]
    return (0,) * (3 - len(most)) + tuple(most)


@dataclass(frozen=True)
class BackwardTilings:
    """Tilings of the kernels of a backward pass, by the gradients they compute.

    Attributes:
        query: Of the query.
        key_value: Of key and value.
        additional: Of additional keys and values.
        splits: Programs that share the queries of one tile of additional keys; each needs
            float32 memory of its own for what it sums.
        persistent_programs: Programs for each head that take turns on its key tiles; 0 for one per
            tile.
        fused: Of query, key and value in one pass, where that runs instead.
        launches: Of that pass, which divide the heads: the fewer heads at a time, the less memory
            for float32 sums.
        fused_additional: Of additional keys and values in that pass. Its splits divide the queries,
            see `additional_problem`.
        single: Of all gradients but those of additional keys, where programs that have all queries
            of a head run instead.
    """

    query: Tiling
    key_value: Tiling
    additional: Tiling
    splits: int = 1
    persistent_programs: int = 0
    fused: Tiling | None = None
    launches: int = 1
    fused_additional: Tiling | None = None
    single: Tiling | None = None

    def bias_paddings(self, single: Tiling | None) -> tuple[int, ...]:
        """Paddings of the one table of biases that the kernels share: ``single`` or the others."""
        return bias_paddings(*((self.query, self.key_value) if single is None else (single,)))


@lru_cache(maxsize=4096)
def dense_problem(problem: Problem, num_queries: int, num_keys: int) -> Problem:
    """Attention of all queries to ``num_keys`` tokens, with the other facts of ``problem``."""
    length = (max(num_queries, num_keys),)
    return replace(
        problem,
        query_shape=(num_queries,),
        key_shape=(num_keys,),
        kernel_size=length,
        stride=(1,),
        dilation=(1,),
        is_causal=(False,),
        is_circular=(),
        upsampling=(),
        grids=None,
        grid=length,
        query_origin=(0,),
        key_origin=(0,),
        num_additional=0,
        has_lengths=False,
        has_rpb=False,
        has_key_mask=False,
    )


@lru_cache(maxsize=4096)
def additional_problem(problem: Problem, splits: int = 1) -> Problem:
    """Attention of all queries to the additional keys; of grids of different sizes as of packed
    sequences, the queries of each and its additional keys.

    Splits make a second axis of them: in each is an equal share of the queries, one after the
    other, and all keys once more, which the window keeps apart from those of other splits.
    """
    grids, context = problem.grids, problem.num_additional
    if grids is not None:
        dense = dense_problem(problem, grids.tokens, grids.number * context)
        return replace(dense, varlen=True, max_seqlen_q=grids.longest, max_seqlen_kv=context)
    dense = dense_problem(problem, problem.num_queries // splits, context)
    if splits == 1:
        return dense
    return replace(
        dense,
        query_shape=(splits, *dense.query_shape),
        key_shape=(splits, *dense.key_shape),
        kernel_size=(1, *dense.kernel_size),
        stride=(1, 1),
        dilation=(1, 1),
        is_causal=(False, False),
        grid=(splits, *dense.grid),
        query_origin=(0, 0),
        key_origin=(0, 0),
    )


class Work(NamedTuple):
    """Query-key pairs that tiles cover, for one batch entry and head, and those without a mask."""

    covered: float
    inside: float


class _Table(NamedTuple):
    """`Work` along each axis, ``[axes, sizes, sizes]`` for sizes of row and of column tiles."""

    covered: Array
    inside: Array


def _counted_sizes(rank: int) -> Shape:
    """The sizes of tiles along an axis that are counted at once."""
    return _POWERS[4:] if rank == 1 else _POWERS


@lru_cache(maxsize=4096)
def _table(problem: Problem, inverse: bool, sizes: Shape) -> _Table:
    boxes = geometry.boxes(problem, inverse)
    found = geometry.count(problem.axes, boxes, sizes, sizes, inverse)
    pairs = np.outer(sizes, sizes)
    return _Table(found.visited * pairs, found.full * pairs)


@lru_cache(maxsize=16384)
def work(problem: Problem, query_tile: Shape, key_tile: Shape, inverse: bool = False) -> Work:
    """What tiles of these shapes compute; ``inverse`` for the kernel whose rows are keys."""
    rows, columns = (key_tile, query_tile) if inverse else (query_tile, key_tile)
    # First in the table that the choice among all shapes is made by.
    sizes = _counted_sizes(problem.rank)
    if not set(sizes).issuperset(rows + columns):
        sizes = tuple(sorted({*rows, *columns}))
    table = _table(problem, inverse, sizes)
    at = [(n, sizes.index(r), sizes.index(c)) for n, (r, c) in enumerate(zip(rows, columns))]
    return Work(*(prod(float(part[place]) for place in at) for part in table))


def shapes(tokens: int, rank: int) -> Iterator[Shape]:
    """All shapes of ``rank`` powers of two that hold ``tokens`` tokens."""
    if rank == 1:
        yield (tokens,)
        return
    first = 1
    while first <= tokens:
        for rest in shapes(tokens // first, rank - 1):
            yield (first, *rest)
        first *= 2


class _Pairs(NamedTuple):
    """All pairs of shapes of query and key tiles of so many tokens, ``[queries, keys]``.

    Attributes:
        queries: The shapes of query tiles.
        keys: Those of key tiles.
        at: Where `_Table` has the work of each pair along each axis ``[axes, queries, keys]``.
        runs: Less where a tile reads longer runs along the last axis, of keys first.
        is_short: Whether a run is of less than eight tokens.
    """

    queries: list[Shape]
    keys: list[Shape]
    at: Array
    runs: Array
    is_short: Array


@lru_cache(maxsize=256)
def _all_pairs(queries: int, keys: int, rank: int, inverse: bool) -> _Pairs:
    of_queries, of_keys = list(shapes(queries, rank)), list(shapes(keys, rank))
    q, k = np.array(of_queries).T[:, :, None], np.array(of_keys).T[:, None, :]
    sizes = _counted_sizes(rank)
    rows, columns = (np.searchsorted(sizes, part) for part in ((k, q) if inverse else (q, k)))
    at = (np.arange(rank)[:, None, None] * len(sizes) + rows) * len(sizes) + columns
    runs = -(k[-1] * 4096 + q[-1])
    return _Pairs(of_queries, of_keys, at, runs, np.minimum(q[-1], k[-1]) < 8)


def _work_of_all(problem: Problem, pairs: _Pairs, inverse: bool = False) -> tuple[Array, Array]:
    """`Work` of all pairs."""
    table = _table(problem, inverse, _counted_sizes(problem.rank))
    covered, inside = (part.take(pairs.at).prod(0) for part in table)
    return covered, inside


def _first_least(pairs: _Pairs, *costs: Array) -> tuple[Shape, Shape]:
    """The pair of the least cost, by the first of them in which pairs differ; then that which reads
    the longest runs."""
    are_least = True
    for cost in (*costs, pairs.runs):
        left = np.where(are_least, cost, np.inf)
        are_least = left == left.min()
    query, key = divmod(int(np.argmax(are_least)), len(pairs.keys))
    return pairs.queries[query], pairs.keys[key]


def half(tile: Shape) -> Shape:
    """The first half of a tile's tokens, which is a box too."""
    axis = next(axis for axis, size in enumerate(tile) if size > 1)
    return (*tile[:axis], tile[axis] // 2, *tile[axis + 1 :])


@lru_cache(maxsize=64)
def _halved(queries: int, keys: int, rank: int) -> _Pairs:
    """`_all_pairs` with the first halves of their query tiles."""
    pairs, halves = (_all_pairs(n, keys, rank, False) for n in (queries, queries // 2))
    at = halves.at[:, [halves.queries.index(half(shape)) for shape in pairs.queries]]
    return pairs._replace(at=at)


@lru_cache(maxsize=4096)
def best_shapes(problem: Problem, kernel: Kernel, queries: int, keys: int) -> tuple[Shape, Shape]:
    """The shapes of so many tokens that cover the fewest pairs.

    Among equals, those that read the longest runs along the last axis.
    """
    pairs = _all_pairs(queries, keys, problem.rank, kernel.inverse)
    covered, _ = _work_of_all(problem, pairs, kernel.inverse)
    if kernel.by_halves:
        # Fewest pairs that are computed, then that are loaded.
        halves = _work_of_all(problem, _halved(queries, keys, problem.rank))
        tokens = _covering(problem, problem.query_shape, pairs.queries)
        return _first_least(pairs, kernel.time(problem, *halves, tokens[:, None] * keys), covered)
    if kernel is QUERY_GRADIENT and problem.has_rpb:
        # Of the pairs of short runs, more numbers are added to the bias's gradient in memory.
        covered = covered * (1 + pairs.is_short)
    return _first_least(pairs, covered)


def is_ping_pong_size(rows: int, columns: int) -> bool:
    """Whether `PING_PONG` has tiles of so many tokens."""
    return rows == 128 and columns in (64, 128)


def is_fused_size(problem: Problem, query: Shape, key: Shape) -> bool:
    """Whether `FUSED` has tiles of these shapes."""
    return (prod(key), prod(query)) in {size[:2] for size in _FUSED_SIZES.get(problem.head_dim, ())}


def fused_tiling(problem: Problem, query: Shape | None = None, key: Shape | None = None) -> Tiling:
    """The tiling of `FUSED`."""
    (size,) = _FUSED_SIZES[problem.head_dim]
    if query is None or key is None:
        query, key = best_shapes(problem, FUSED, size.columns, size.rows)
    return Tiling(query, key, size.warps, size.stages, True, tma=True, ping_pong=True)


# Queries that a program with additional keys visits at least, and most where several share them,
# whose tiles kernels number. How often multiprocessors are to take one of these programs, at most.
_LEAST_QUERIES, _MOST_QUERIES, _MOST_TURNS = 256, 2**20, 4


def shared_queries(tiling: Tiling, splits: int) -> Tiling:
    """The tiling of programs that share the queries, with the axis of splits that
    `additional_problem` has. Tiles of one split each: others would be further kernels to compile.
    """
    return replace(tiling, query=(1, *tiling.query), key=(1, *tiling.key), splits=splits)


def fused_additional(problem: Problem, launches: int, multiprocessors: int, most: int) -> Tiling:
    """The tiling of `FUSED` for the additional keys. There may be few programs with all queries to
    visit: up to ``most`` share these, so that multiprocessors are done with all soonest."""
    tiling = fused_tiling(additional_problem(problem))
    row_tiles = -(-problem.num_additional // prod(tiling.key))
    programs = row_tiles * -(-problem.heads_kv // launches) * problem.batch
    members = problem.heads // problem.heads_kv

    def time(splits: int) -> float:
        turns = -(-programs * splits // multiprocessors)
        steps = -(-problem.num_queries // (splits * prod(tiling.query))) * members
        return turns * (steps + FUSED.start)

    most = min(most, _MOST_TURNS * multiprocessors // programs)
    shares = [
        splits
        for splits in range(2, most + 1)
        if problem.num_queries % splits == 0
        and _LEAST_QUERIES <= problem.num_queries // splits <= _MOST_QUERIES
    ]
    splits = min((1, *shares), key=time)
    return tiling if splits == 1 else shared_queries(tiling, splits)


@lru_cache(maxsize=4096)
def float8_tiling(problem: Problem) -> Tiling:
    """The tiling of `FLOAT8`."""
    (size,) = FLOAT8.sizes[problem.head_dim]
    query, key = best_shapes(problem, FLOAT8, size.rows, size.columns)
    tiling = Tiling(query, key, size.warps, size.stages, True, tma=True, ping_pong=True)
    return replace(tiling, whole=_whole(problem, tiling, False))


def cost_of_one(problem: Problem, fused: Tiling, additional: Tiling | None) -> float:
    """Estimated time of `FUSED` with a tiling for the grid's keys and one for additional ones, in
    the unit of `cost_of_two`."""
    runs = [(problem, fused)]
    if additional is not None:
        runs.append((additional_problem(problem, additional.splits), additional))
    costs = [FUSED.cost(part, tiling.query, tiling.key) for part, tiling in runs]
    return FUSED.products * sum(costs) / FUSED.rate(problem)


def is_fused_faster(
    problem: Problem, found: BackwardTilings, fused: Tiling, additional: Tiling | None
) -> bool:
    """Whether `FUSED` with these tilings is estimated to take less time than the other kernels with
    those found."""
    separate = cost_of_two(problem, found)
    if separate / 7 * problem.heads * problem.batch * problem.head_dim < MIN_TMA_PRODUCTS:
        return False
    return cost_of_one(problem, fused, additional) < separate


# The tilings that calls ran with, in the order of their first use, by all else that a kernel is
# compiled for.
_used: dict[Any, list[Tiling]] = {}
# How much longer a call may take with shapes that have been used already: a few percent, and more
# where there are many of them.
_LITTLE, _MORE, _MANY = 1.05, 1.08, 5


@lru_cache(maxsize=4096)
def reuse(problem: Problem, kernel: Kernel, tiling: Tiling) -> Tiling:
    """The tiling that a call runs with, given the best one for its problem alone: the same, or one
    with shapes of earlier calls, on other grids or with other windows, that takes little longer.

    Every shape is a kernel to compile, which takes as long as thousands of calls.
    """
    alike = (
        kernel, replace(tiling, query=(), key=(), warps=0, stages=0), problem.rank,
        problem.is_causal, problem.is_circular, problem.upsampling, problem.head_dim,
        problem.head_dim_v, problem.dtype, problem.heads // problem.heads_kv,
        problem.num_additional > 0, problem.has_rpb, problem.softcap > 0, problem.has_sink,
        problem.has_key_mask, problem.has_query_mask, problem.varlen, problem.grids is None,
        problem.device,
    )  # fmt: skip
    used = _used.setdefault(alike, [])
    are_many = len(used) >= _MANY
    most = kernel.time_of(problem, tiling) * (_MORE if are_many else _LITTLE)
    for found in used:
        if (
            kernel.time_of(problem, found) <= most
            # What the rates of two sizes say of a problem is a guess.
            and (are_many or (found.warps, found.stages) == (tiling.warps, tiling.stages))
            and _whole(problem, found, kernel.inverse) == tiling.whole
            and not (
                problem.has_rpb and min(found.query[-1], found.key[-1]) < min(tiling.query[-1], 8)
            )
        ):
            return found
    used.append(tiling)
    return tiling


def _sizes(problem: Problem, kernel: Kernel, mask_edges: bool, chip: Chip) -> tuple[_Size, ...]:
    widest = max(problem.head_dim, problem.head_dim_v, 32)
    features = next_power(widest)
    if problem.dtype == torch.float32:
        return kernel.float32_sizes[96 if 64 < widest <= 96 else features]
    if 64 < widest < 128:
        features = 96
    if chip.products in ("turing", "ampere"):
        # Without warp-group products, which read shared memory, large tiles spill registers.
        mask_edges = False
    return (kernel.mask_edges_sizes if mask_edges else kernel.sizes)[features]


def _pays_to_mask_edges(problem: Problem, pair: tuple[Shape, Shape], inverse: bool) -> bool:
    """Whether enough tiles lie inside all windows to make asking for each of them worth it."""
    covered, inside = work(problem, *pair, inverse)
    return inside >= 0.2 * max(covered, 1.0)


def _pays_to_skip(problem: Problem, tiling: Tiling) -> bool:
    """Whether the halves of `PING_PONG`'s tiles see so much less that it is worth to ask for each
    tile: without the branch, all others take a twentieth less time."""
    if not tiling.ping_pong:
        return False
    seen = work(problem, half(tiling.query), tiling.key).covered
    return seen < 0.95 * work(problem, tiling.query, tiling.key).covered


def _whole(problem: Problem, tiling: Tiling, inverse: bool) -> bool:
    """Whether every tile is in full sight of its rows: counted for one dilation group only."""
    if problem.varlen or problem.grids is not None or is_dilated(problem):
        return False
    covered, inside = work(problem, tiling.query, tiling.key, inverse)
    return inside == covered


@dataclass(frozen=True)
class Chip:
    """What a GPU offers to one program.

    Attributes:
        shared_memory: Bytes of it.
        products: Whose matrix instructions it has, which decide what passes through shared memory:
            "turing", "ampere", "hopper" or "blackwell".
    """

    shared_memory: int
    products: str = "hopper"


def products(capability: tuple[int, int]) -> str:
    """Whose matrix instructions a GPU of this compute capability has."""
    if capability < (8, 0):
        return "turing"
    return {9: "hopper", 10: "blackwell"}.get(capability[0], "ampere")


# Barriers, and statistics of rows.
_SMALL_THINGS = 1024
# Columns of a Blackwell multiprocessor's tensor memory, of 128 numbers each.
_TENSOR_MEMORY = 512


def _parts(tiling: Tiling, problem: Problem) -> tuple[Shape, Shape]:
    """Features of the tiles of queries or keys, and of values."""
    if tiling.ping_pong:
        return (block(problem.head_dim),), (block(problem.head_dim_v),)
    return parts(problem.head_dim, problem.dtype), parts(problem.head_dim_v, problem.dtype)


def _shared_memory(
    tiling: Tiling, problem: Problem, kernel: Kernel, products: str = "hopper"
) -> int:
    """Bytes that a program takes: close to what the compiler allocates, and not less.

    `tests/test_triton_fits.py` compares them. Tiles of columns are kept in as many places as there
    are stages, rows for the whole time. What comes on top follows from how products are computed:
    float32 ones on tensor cores have three parts, of high and low halves of the operands; without
    a pipeline, tiles and scores change their layout in shared memory.
    """
    query_parts, value_parts = _parts(tiling, problem)
    query, value = sum(query_parts), sum(value_parts)
    rows, columns = prod(tiling.query), prod(tiling.key)
    if kernel is KEY_VALUE_GRADIENT:
        rows, columns = columns, rows
    # The forward pass keeps rows of queries; the gradients keep pairs of rows, too.
    kept = rows * (query if kernel is FORWARD else query + value)
    # Specialized warps load ahead as far as the compiler likes.
    stages = 3 if tiling.warp_specialize else tiling.stages
    step, widest = columns * (query + value), columns * max(query, value)
    scores = rows * columns
    itemsize = problem.dtype.itemsize
    numbers = kept + stages * step
    # Scores of a bias go to memory in another layout.
    has_biases = problem.has_rpb and kernel in (QUERY_GRADIENT, SINGLE)
    biases = 4 * scores // itemsize if has_biases else 0
    if tiling.ping_pong:
        # The output, between the layout of products and that of memory.
        numbers += rows // 2 * value
    elif products == "turing":
        # Copies are not asynchronous: there is one place, and tiles are laid out again.
        numbers = kept + step + scores + biases
        if itemsize == 2:
            numbers += max(2 * rows * max(query, value), widest)
    elif products == "hopper" and rows >= 64:
        # Warp-group products read shared memory.
        parts = kept + columns * abs(query - value)
        numbers += biases + (parts if itemsize == 4 else 0)
        if query > 256 and kernel is not FORWARD:
            # Two warp groups share what is narrow, and pass it to each other.
            numbers += step + widest
    elif products == "blackwell" and rows >= 64:
        # So do these, but for tiles that two products read, once transposed; the first of two parts
        # takes another copy.
        if stages > 1 and kernel is not FORWARD:
            numbers += columns * sum(query_parts + query_parts[:-1])
            if kernel is KEY_VALUE_GRADIENT:
                numbers += columns * sum(value_parts + value_parts[:-1])
        numbers += biases + (widest if itemsize == 4 else 0)
    elif itemsize == 4 and kernel is FORWARD:
        numbers += kept + 2 * scores
    elif itemsize == 4:
        later = max(max(stages - 1, 1) * step, stages * widest)
        numbers = max(numbers, 2 * kept + later) + min(stages, 2) * scores + biases
        if rows < 32 or (columns < 32 and max(query, value) >= 256):
            # Warps that share narrow tiles pass the widest operand to each other.
            numbers = max(numbers, 2 * kept + widest + min(widest, 8192))
    elif stages == 1:
        numbers += 2 * scores + (widest if rows < 32 or query > 256 else widest // 2)
    else:
        numbers += biases // 2
    if kernel is SINGLE:
        # Both kinds of weights, once transposed.
        numbers += 2 * scores
    taken = numbers * itemsize + _SMALL_THINGS
    if kernel is KEY_VALUE_GRADIENT:
        # Logsumexp and delta of the columns, as many numbers as there are threads.
        taken += max(8 * columns, 128 * tiling.warps) * max(stages - 1, 1)
    return taken + (12 * rows if tiling.warp_specialize else 0)


def _tensor_memory(tiling: Tiling, problem: Problem, kernel: Kernel) -> float:
    """Columns of tensor memory that a program takes: of sums, scores, and scores as operands. Those
    of each part of the features have their own."""
    query_parts, value_parts = _parts(tiling, problem)
    query, value = sum(query_parts), sum(value_parts)
    rows, columns = prod(tiling.query), prod(tiling.key)
    if kernel is KEY_VALUE_GRADIENT:
        rows, columns = columns, rows
    sums = {FORWARD: value, QUERY_GRADIENT: query, KEY_VALUE_GRADIENT: query + value}[kernel]
    scores = 1.0
    if tiling.warp_specialize:
        scores = 2.5
    elif tiling.stages > 1:
        scores = {FORWARD: 1.5, QUERY_GRADIENT: 2.5, KEY_VALUE_GRADIENT: 3.0}[kernel]
        scores += len(query_parts) - 1
        if kernel is not FORWARD:
            scores += len(value_parts) - 1
    return rows / 128 * (sums + scores * columns)


# Tilings that took more than their GPU had, whatever had been estimated.
_refused: set[tuple[Any, ...]] = set()


def _facts(tiling: Tiling, problem: Problem, kernel: Kernel, chip: Chip) -> tuple[Any, ...]:
    """What the memory that a kernel takes mostly depends on."""
    sizes = prod(tiling.query), prod(tiling.key)
    how = tiling.stages, tiling.ping_pong, tiling.warp_specialize
    return kernel, *sizes, *how, problem.head_dim, problem.head_dim_v, problem.dtype, chip


def refuse(tiling: Tiling, problem: Problem, kernel: Kernel, chip: Chip) -> bool:
    """Never choose this tiling again, for a kernel did not run with it. False if that is known."""
    facts = _facts(tiling, problem, kernel, chip)
    if facts in _refused:
        return False
    _refused.add(facts)
    _used.clear()
    choose.cache_clear()
    reuse.cache_clear()
    return True


def fits(tiling: Tiling, problem: Problem, kernel: Kernel, chip: Chip) -> bool:
    """Whether a program with this tiling finds the memory it takes."""
    if _shared_memory(tiling, problem, kernel, chip.products) > chip.shared_memory:
        return False
    if chip.products == "blackwell" and _tensor_memory(tiling, problem, kernel) > _TENSOR_MEMORY:
        return False
    return not _refused or _facts(tiling, problem, kernel, chip) not in _refused


def _fit(
    tiling: Tiling, problem: Problem, kernel: Kernel, chip: Chip, named: bool
) -> Tiling | None:
    """The tiling with as many stages as fit, and smaller tiles where even one does not, unless
    they are ``named``; None where nothing fits."""
    while not fits(tiling, problem, kernel, chip):
        # The ring of the ping-pong kernel has at least two places.
        if tiling.stages > (2 if tiling.ping_pong else 1):
            tiling = replace(tiling, stages=tiling.stages - 1)
        elif named or tiling.ping_pong:
            return None
        elif prod(tiling.key) > max(_LEAST_TOKENS, prod(tiling.query) // 2):
            tiling = replace(tiling, key=_halve(tiling.key))
        elif prod(tiling.query) > _LEAST_TOKENS:
            tiling = replace(tiling, query=_halve(tiling.query))
        else:
            return None
    return tiling


def _halve(shape: Shape) -> Shape:
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    return tuple(n // 2 if axis == longest else n for axis, n in enumerate(shape))


# Columns from which on programs share them, in the forward and the backward pass: of fewer, kernels
# take less time than the host for one more launch. Tiles that each has at least, and most programs.
_LEAST_SHARED, _LEAST_SHARED_BACK = 1536, 6144
_LEAST_SHARE, _MOST_SHARES = 4, 32


def splits(problem: Problem, kernel: Kernel, tiling: Tiling, multiprocessors: int) -> int:
    """How many programs should share the columns of each row tile: one, unless so few programs have
    so many columns that most multiprocessors wait for them."""
    inverse, is_forward = kernel.inverse, kernel.general is FORWARD
    tile, columns, extents, heads = tiling.query, tiling.key, problem.query_shape, problem.heads
    if inverse:
        tile, columns, extents, heads = columns, tile, problem.key_shape, problem.heads_kv
    in_head = int(_covering(problem, extents, tile)) // prod(tile)
    programs = in_head * heads * problem.entries
    # Measured on an H100: with more programs than this, joining what they find takes as long as is
    # won, and kernels with warp groups are faster as they are.
    if not 0 < programs <= multiprocessors * (0.25 if tiling.ping_pong else 0.75):
        return 1
    covered = work(problem, tiling.query, tiling.key, inverse).covered * problem.heads / heads
    shared = covered / (in_head * prod(tile)) + (0 if inverse else problem.num_additional)
    if shared < (_LEAST_SHARED if is_forward else _LEAST_SHARED_BACK):
        return 1
    steps = int(shared) // prod(columns)
    return max(1, min(2 * multiprocessors // programs, steps // _LEAST_SHARE, _MOST_SHARES))


def persistent(tiling: Tiling, programs: int, warps: int) -> Tiling:
    """The tiling with ``programs`` programs that take tiles in turn."""
    return replace(tiling, programs=programs, warps=warps)


# Products below which making descriptors takes the host longer than they save the GPU.
MIN_TMA_PRODUCTS = 1.2e10


def _make(
    problem: Problem,
    kernel: Kernel,
    pair: tuple[Shape, Shape],
    size: _Size,
    mask_edges: bool,
    tma: bool,
) -> Tiling:
    # Narrow heads gain nothing from descriptors; empty tensors have none.
    use_tma = tma and problem.head_dim > 32 and problem.num_keys > 0 and problem.grids is None
    is_ping_pong = kernel is PING_PONG
    if not is_ping_pong:
        # Behind the features of other heads, a box has those of the next head. Dilation groups
        # of any size are read through pointers.
        use_tma = use_tma and all(d == block(d) for d in (problem.head_dim, problem.head_dim_v))
        use_tma = use_tma and not is_dilated(problem)
    return Tiling(
        *pair, size.warps, size.stages, mask_edges, tma=use_tma, ping_pong=is_ping_pong,
        rate=size.rate,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def choose(
    problem: Problem,
    kernel: Kernel,
    tma: bool,
    chip: Chip,
    query: Shape | None = None,
    key: Shape | None = None,
) -> Tiling | None:
    """The tiling with the least estimated time; ``query`` and ``key`` fix the tile shapes.

    Of `PING_PONG` where that suits, fits and is faster than `FORWARD`. None if nothing fits.
    """
    named = query is not None and key is not None
    general = kernel.general
    if query is not None and key is not None:
        tiling, instead = _named(problem, kernel, query, key, tma)
    else:
        tiling, instead = _fastest(problem, kernel, chip, tma)
    if instead is not None and _fit(instead, problem, general, chip, named) is not None:
        tiling = instead
    if chip.shared_memory < _ROOMY:
        # A second program on a multiprocessor hides more than a third tile in flight.
        half = Chip(chip.shared_memory // 2, chip.products)
        while tiling.stages > 2 and not fits(tiling, problem, general, half):
            tiling = replace(tiling, stages=tiling.stages - 1)
    fitting = _fit(tiling, problem, general, chip, named)
    if fitting is None:
        return None
    return replace(
        fitting,
        whole=_whole(problem, fitting, kernel.inverse),
        skips=_pays_to_skip(problem, fitting),
    )


def _named(
    problem: Problem, kernel: Kernel, query: Shape, key: Shape, tma: bool
) -> tuple[Tiling, Tiling | None]:
    """The tiling of the general kernel with named tiles, and that of the one to run instead."""
    pair = query, key
    mask_edges = _pays_to_mask_edges(problem, pair, kernel.inverse)
    size = _named_size(problem, kernel.general, prod(query), prod(key))
    tiling = _make(problem, kernel.general, pair, size, mask_edges, tma)
    if kernel is kernel.general or not kernel.suits(problem):
        return tiling, None
    if not is_ping_pong_size(size.rows, size.columns):
        return tiling, None
    return tiling, _make(problem, kernel, pair, size._replace(warps=4), mask_edges, tma)


def _fastest(
    problem: Problem, kernel: Kernel, chip: Chip, tma: bool
) -> tuple[Tiling, Tiling | None]:
    """The fastest tiling of the general kernel, and that of another one if that is even faster."""
    general, inverse = kernel.general, kernel.inverse
    found: list[tuple[bool, float, Tiling]] = []
    for mask_edges in (False, True):
        for size in _sizes(problem, general, mask_edges, chip):
            queries, keys = (size.columns, size.rows) if inverse else (size.rows, size.columns)
            pair = best_shapes(problem, general, queries, keys)
            if _pays_to_mask_edges(problem, pair, inverse) != mask_edges:
                continue
            tiling = _make(problem, general, pair, size, mask_edges, tma)
            fitting = _fit(tiling, problem, general, chip, True)
            # Smaller tiles are better than tiles that nothing is loaded ahead of.
            is_cramped = fitting is None or fitting.stages < min(tiling.stages, 2)
            found.append((is_cramped, general.time_of(problem, tiling), tiling))
    if not found:
        raise RuntimeError("no tile size suits the problem")
    _is_cramped, time, tiling = min(found, key=lambda candidate: candidate[:2])
    if time * problem.heads * problem.batch * problem.head_dim < MIN_TMA_PRODUCTS:
        return replace(tiling, tma=False), None
    if kernel is general or not kernel.suits(problem):
        return tiling, None
    (size,) = kernel.sizes[max(problem.head_dim, problem.head_dim_v)]
    pair = best_shapes(problem, kernel, size.rows, size.columns)
    if kernel.cost(problem, *pair) / size.rate >= time:
        return tiling, None
    return tiling, _make(problem, kernel, pair, size, True, tma)


def _named_size(problem: Problem, kernel: Kernel, queries: int, keys: int) -> _Size:
    """How tiles run that the caller names."""
    rows, columns = (keys, queries) if kernel.inverse else (queries, keys)
    # A warp group of four warps computes 64 rows. Sums of wide heads need the registers of two.
    is_large = rows >= 128 and max(problem.head_dim, columns) >= 128
    is_wide = kernel is not FORWARD and problem.head_dim > 256
    warps = 8 if is_large or is_wide else 4
    return _Size(rows, columns, warps, 2, 1.0)


def _can_name(problem: Problem, kernel: Kernel, chip: Chip, queries: int, keys: int) -> bool:
    """Whether tiles of so many tokens fit, in as many stages as it may take."""
    size = _named_size(problem, kernel, queries, keys)
    tiling = Tiling((queries,), (keys,), size.warps, size.stages)
    return _fit(tiling, problem, kernel, chip, True) is not None


def any_fit(problem: Problem, chip: Chip) -> bool:
    """Whether the smallest tiles fit, in all kernels that the problem needs."""
    kernels: tuple[Kernel, ...] = (FORWARD,)
    if problem.requires_grad:
        kernels = (FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT)
    return all(_can_name(problem, k, chip, _LEAST_TOKENS, _LEAST_TOKENS) for k in kernels)


def listed(
    problem: Problem, kernels: tuple[Kernel, ...], default: Tiling, chip: Chip, largest: int
) -> list[tuple[Shape, Shape]]:
    """All (query tile, key tile) pairs that these kernels accept, the default first, then
    by work.

    What they are does not depend on the window, nor on what else is given with query, key and
    value: pairs listed for a call without a bias are valid with one.
    """
    inverse = kernels[-1].inverse
    most = replace(problem, has_rpb=True)

    def suit(queries: int, keys: int) -> bool:
        return all(_can_name(most, kernel, chip, queries, keys) for kernel in kernels)

    # The smallest tiles are for heads that leave no room for others.
    least = 32 if suit(64, 64) else _LEAST_TOKENS
    sizes = [n for n in (16, 32, 64, 128, 256) if least <= n <= largest]
    covered: dict[tuple[Shape, Shape], float] = {}
    for queries, keys in product(sizes, sizes):
        if suit(queries, keys):
            pairs = _all_pairs(queries, keys, problem.rank, inverse)
            work_of_pairs = _work_of_all(problem, pairs, inverse)[0].flatten().tolist()
            covered |= zip(product(pairs.queries, pairs.keys), work_of_pairs, strict=True)
    ordered = sorted(covered, key=lambda pair: (covered[pair], pair))
    first = (default.query, default.key)
    if not suit(prod(first[0]), prod(first[1])):
        return ordered
    return [first, *(pair for pair in ordered if pair != first)]
