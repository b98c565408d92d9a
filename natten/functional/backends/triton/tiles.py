"""Which tiles a kernel uses: the geometry of windows, and a small cost model over it.

The time of a kernel is, to first order, the pairs of queries and keys that its tiles cover,
divided by the rate at which a tile of that size is computed. The first factor follows from the
windows exactly (`work`). The second is measured, on an H100, relative to the best tile: the
tables below. Nothing is timed at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

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
    return max(16, _power(features))


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Tiling:
    """How one kernel divides its work.

    Attributes:
        query: Query tile, one extent an axis; powers of two.
        key: Key tile.
        warps: Warps of a program.
        stages: Tiles in flight.
        split: Whether tiles in full sight of the others are told apart, and not masked.
        whole: Whether all tiles are: none is masked.
        tma: Whether tiles of the inner loop are loaded by the tensor memory accelerator.
        programs: For persistent kernels, the number of programs; 0 for one a tile.
        specialize: Whether loads, products and softmax get warps of their own.
        apart: Whether two groups of warps work on halves of the query tile without waiting for
            each other.
    """

    query: Shape
    key: Shape
    warps: int = 4
    stages: int = 2
    split: bool = False
    whole: bool = False
    tma: bool = False
    programs: int = 0
    specialize: bool = False
    apart: bool = False


class _Size(NamedTuple):
    """Tokens of a row and a column tile, how to run them, and their relative rate."""

    rows: int
    columns: int
    warps: int
    stages: int
    rate: float
    apart: bool = False


# Rates where most tiles are masked, and where `split` leaves masks out (large windows).
_FORWARD: dict[int, tuple[_Size, ...]] = {
    32: (_Size(64, 64, 4, 3, 1.0), _Size(64, 128, 4, 2, 0.95)),
    64: (_Size(64, 128, 4, 2, 1.0), _Size(64, 64, 4, 3, 0.93), _Size(128, 64, 4, 3, 1.05)),
    128: (_Size(128, 128, 8, 3, 1.0), _Size(64, 64, 4, 3, 0.97), _Size(128, 64, 4, 2, 1.03)),
    256: (_Size(64, 64, 4, 2, 1.0), _Size(128, 64, 8, 2, 1.0)),
    512: (_Size(64, 64, 4, 2, 1.0),),
    1024: (_Size(64, 32, 4, 1, 1.0),),
}
_FORWARD_SPLIT: dict[int, tuple[_Size, ...]] = {
    **_FORWARD,
    64: (_Size(128, 64, 4, 3, 1.0), _Size(64, 64, 4, 3, 0.93)),
    128: (_Size(128, 128, 8, 3, 1.0), _Size(64, 64, 4, 3, 0.92), _Size(128, 64, 4, 2, 0.93)),
}
# Of the kernel whose groups of warps run apart, against the others where those mask most tiles.
_APART: dict[int, _Size] = {
    64: _Size(128, 128, 4, 3, 1.4, True),
    128: _Size(128, 128, 4, 2, 1.5, True),
}
# How much longer it takes for a masked tile, and to begin and end, as one program alone fits a
# multiprocessor: in tiles.
_APART_MASK, _APART_START = 0.4, 1.5
_QUERY_GRADIENT: dict[int, tuple[_Size, ...]] = {
    32: (_Size(64, 64, 4, 2, 1.0),),
    64: (_Size(64, 64, 4, 3, 1.0),),
    128: (_Size(64, 64, 4, 2, 1.0),),
    256: (_Size(64, 32, 4, 2, 1.0),),
    512: (_Size(64, 32, 8, 2, 1.0),),
    1024: (_Size(64, 16, 8, 1, 1.0),),
}
_QUERY_GRADIENT_SPLIT: dict[int, tuple[_Size, ...]] = {
    **_QUERY_GRADIENT,
    128: (_Size(128, 64, 8, 3, 1.08), _Size(64, 64, 4, 2, 1.0)),
}
# Rows are keys here.
_KEY_VALUE_GRADIENT: dict[int, tuple[_Size, ...]] = {
    32: (_Size(64, 32, 4, 3, 1.0), _Size(64, 64, 4, 2, 0.93)),
    64: (_Size(64, 64, 4, 3, 1.0),),
    128: (_Size(64, 64, 4, 2, 1.0),),
    256: (_Size(64, 32, 8, 1, 1.0),),
    512: (_Size(64, 32, 8, 1, 1.0),),
    1024: (_Size(64, 16, 8, 1, 1.0),),
}
# Of the kernel that computes all gradients in one pass. Rows are keys; the rate is that of its five
# products against the seven of two kernels.
_TOGETHER: dict[int, _Size] = {
    64: _Size(128, 128, 4, 2, 0.9, True),
    128: _Size(128, 64, 4, 2, 0.92, True),
}
# How much longer it takes for a masked tile, and to begin and end: in tiles.
_TOGETHER_MASK, _TOGETHER_START = 0.1, 6.0
# And in space: the sums of the queries that its programs see do not stay in the cache.
_TOGETHER_SPACE = 0.75
FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT = "forward", "query", "key_value"
_TABLES = {
    FORWARD: (_FORWARD, _FORWARD_SPLIT),
    QUERY_GRADIENT: (_QUERY_GRADIENT, _QUERY_GRADIENT_SPLIT),
    KEY_VALUE_GRADIENT: (_KEY_VALUE_GRADIENT, _KEY_VALUE_GRADIENT),
}


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


def _apart_cost(problem: Problem, query_tile: Shape, key_tile: Shape) -> float:
    """Pairs that the halves of query tiles compute, which skip key tiles they do not see."""
    covered, inside = work(problem, half(query_tile), key_tile)
    tokens = int(geometry.covering(problem.query_shape, query_tile))
    start = _APART_START * tokens * prod(key_tile)
    return covered + _APART_MASK * (covered - inside) + start


@lru_cache(maxsize=4096)
def best_apart_shapes(problem: Problem, queries: int, keys: int) -> tuple[Shape, Shape]:
    """The shapes of so many tokens that suit the kernel whose groups of warps run apart best.

    Among equals, those that load the fewest tiles, then those that read the longest runs.
    """
    pairs = _all_pairs(queries, keys, problem.rank, False)
    covered, inside = _work_of_all(problem, _halved(queries, keys, problem.rank))
    tokens = geometry.covering(problem.query_shape, np.array(pairs.queries))
    start = _APART_START * tokens[:, None] * keys
    cost = covered + _APART_MASK * (covered - inside) + start
    return _first_least(pairs, cost, _work_of_all(problem, pairs)[0])


@lru_cache(maxsize=4096)
def best_shapes(
    problem: Problem, queries: int, keys: int, inverse: bool = False, sums_bias: bool = False
) -> tuple[Shape, Shape]:
    """The shapes of so many tokens that cover the fewest pairs.

    Among equals, those that read the longest runs along the last axis. With ``sums_bias``, runs of
    less than eight tokens count double: of their pairs, more numbers are added to memory.
    """
    pairs = _all_pairs(queries, keys, problem.rank, inverse)
    covered, _ = _work_of_all(problem, pairs, inverse)
    return _first_least(pairs, covered * (1 + pairs.is_short) if sums_bias else covered)


def is_apart(rows: int, columns: int) -> bool:
    """Whether tiles of so many tokens are those of the kernel whose groups of warps run apart."""
    return rows == 128 and columns in (64, 128)


def has_apart_heads(problem: Problem) -> bool:
    """Whether the kernel whose groups of warps run apart knows heads like those of the problem."""
    return (
        problem.head_dim in _APART
        and problem.head_dim_v in _APART
        and problem.dtype != torch.float32
    )


def suits_apart(problem: Problem) -> bool:
    """Whether the kernel whose groups of warps run apart can run the problem."""
    return (
        has_apart_heads(problem)
        and not problem.has_rpb
        # It loads whole tiles of additional keys, whatever they hold behind a length.
        and not problem.has_lengths
        and problem.num_keys > 0
        and not any(d > 1 for d in problem.dilation)
    )


def suits_together(problem: Problem) -> bool:
    """Whether the kernel that computes all gradients in one pass can run the problem."""
    return (
        suits_apart(problem)
        and problem.head_dim == problem.head_dim_v
        and problem.num_queries > 0
        and not problem.num_additional
    )


def _together_cost(problem: Problem, query_tile: Shape, key_tile: Shape) -> float:
    """Pairs times products. Halves of key tiles wait for each other: skipping gains nothing."""
    covered, inside = work(problem, query_tile, key_tile, inverse=True)
    tokens = int(geometry.covering(problem.key_shape, key_tile))
    start = _TOGETHER_START * tokens * prod(query_tile)
    start *= problem.heads_kv / problem.heads
    return 5 * (covered + _TOGETHER_MASK * (covered - inside) + start)


def are_together(problem: Problem, query: Shape, key: Shape) -> bool:
    """Whether tiles of these shapes are those of that kernel."""
    size = _TOGETHER.get(problem.head_dim)
    return size is not None and (prod(key), prod(query)) == (size.rows, size.columns)


def together(problem: Problem, query: Shape | None = None, key: Shape | None = None) -> Tiling:
    """The tiling of that kernel."""
    size = _TOGETHER[problem.head_dim]
    if query is None or key is None:
        query, key = best_shapes(problem, size.columns, size.rows, inverse=True)
    return Tiling(query, key, size.warps, size.stages, True, tma=True, apart=True)


def is_faster_together(problem: Problem, query: Tiling, key_value: Tiling) -> bool:
    """Whether that kernel is estimated to take less time than two with these tilings."""
    separate = 3 * work(problem, query.query, query.key).covered
    separate += 4 * work(problem, key_value.query, key_value.key, inverse=True).covered
    if separate / 7 * problem.heads * problem.batch * problem.head_dim < MIN_TMA_PRODUCTS:
        return False
    rate = _TOGETHER[problem.head_dim].rate * (_TOGETHER_SPACE if problem.rank == 3 else 1.0)
    tiling = together(problem)
    return _together_cost(problem, tiling.query, tiling.key) / rate < separate


def _sizes(problem: Problem, kind: str, split: bool, chip: Chip) -> tuple[_Size, ...]:
    if problem.dtype == torch.float32:
        # Twice the memory a token, and three products for one: small tiles.
        features = max(problem.head_dim, problem.head_dim_v)
        return (_Size(64 if features <= 128 else 32, 64 if features <= 32 else 32, 4, 2, 1.0),)
    features = _power(max(problem.head_dim, problem.head_dim_v, 32))
    if chip.products in ("turing", "ampere"):
        # Without warp-group products, which read shared memory, large tiles spill registers.
        split = False
    return _TABLES[kind][split][features]


def _splits(problem: Problem, pair: tuple[Shape, Shape], inverse: bool) -> bool:
    """Whether enough tiles lie inside all windows to make asking for each of them worth it."""
    covered, inside = work(problem, *pair, inverse)
    return inside >= 0.2 * max(covered, 1.0)


def _whole(problem: Problem, tiling: Tiling, inverse: bool) -> bool:
    """Whether every tile is in full sight of its rows: counted for one dilation group only."""
    if problem.varlen or any(d > 1 for d in problem.dilation):
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


def _shared_memory(tiling: Tiling, problem: Problem, kind: str, products: str = "hopper") -> int:
    """Bytes that a program takes: close to what the compiler allocates, and not less.

    `tests/test_triton_fits.py` compares them. Tiles of columns are kept in as many places as there
    are stages, rows for the whole time. What comes on top follows from how products are computed:
    float32 ones on tensor cores have three parts, of high and low halves of the operands; without
    a pipeline, tiles and scores change their layout in shared memory.
    """
    query, value = block(problem.head_dim), block(problem.head_dim_v)
    rows, columns = prod(tiling.query), prod(tiling.key)
    if kind == KEY_VALUE_GRADIENT:
        rows, columns = columns, rows
    # The forward pass keeps rows of queries; the gradients keep pairs of rows, too.
    kept = rows * (query if kind == FORWARD else query + value)
    # Specialized warps load ahead as far as the compiler likes.
    stages = 3 if tiling.specialize else tiling.stages
    step, widest = columns * (query + value), columns * max(query, value)
    scores = rows * columns
    itemsize = problem.dtype.itemsize
    numbers = kept + stages * step
    # Scores of a bias go to memory in another layout.
    biases = 4 * scores // itemsize if kind == QUERY_GRADIENT and problem.has_rpb else 0
    if tiling.apart:
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
        if query > 256 and kind != FORWARD:
            # Two warp groups share what is narrow, and pass it to each other.
            numbers += step + widest
    elif products == "blackwell" and rows >= 64:
        # So do these, but for tiles that two products read, once transposed.
        if stages > 1 and kind != FORWARD:
            numbers += step if kind == KEY_VALUE_GRADIENT else columns * query
        numbers += biases + (widest if itemsize == 4 else 0)
    elif itemsize == 4 and kind == FORWARD:
        numbers += kept + 2 * scores
    elif itemsize == 4:
        later = max(max(stages - 1, 1) * step, stages * widest)
        numbers = max(numbers, 2 * kept + later) + min(stages, 2) * scores + biases
    elif stages == 1:
        numbers += 2 * scores + (widest if rows < 32 or query > 256 else widest // 2)
    else:
        numbers += biases // 2
    taken = numbers * itemsize + _SMALL_THINGS
    if kind == KEY_VALUE_GRADIENT:
        # Logsumexp and delta of the columns.
        taken += 8 * columns * max(stages - 1, 1)
    return taken + (12 * rows if tiling.specialize else 0)


def _tensor_memory(tiling: Tiling, problem: Problem, kind: str) -> float:
    """Columns of tensor memory that a program takes: of sums, scores, and scores as operands."""
    query, value = block(problem.head_dim), block(problem.head_dim_v)
    rows, columns = prod(tiling.query), prod(tiling.key)
    if kind == KEY_VALUE_GRADIENT:
        rows, columns = columns, rows
    sums = {FORWARD: value, QUERY_GRADIENT: query, KEY_VALUE_GRADIENT: query + value}[kind]
    scores = 1.0
    if tiling.specialize:
        scores = 2.5
    elif tiling.stages > 1:
        scores = {FORWARD: 1.5, QUERY_GRADIENT: 2.5, KEY_VALUE_GRADIENT: 3.0}[kind]
    return rows / 128 * (sums + scores * columns)


# Tilings that took more than their GPU had, whatever had been estimated.
_refused: set[tuple[Any, ...]] = set()


def _facts(tiling: Tiling, problem: Problem, kind: str, chip: Chip) -> tuple[Any, ...]:
    """What the memory that a kernel takes depends on, by and large."""
    sizes = prod(tiling.query), prod(tiling.key), tiling.stages, tiling.apart, tiling.specialize
    return kind, *sizes, problem.head_dim, problem.head_dim_v, problem.dtype, chip


def refuse(tiling: Tiling, problem: Problem, kind: str, chip: Chip) -> bool:
    """Never choose this tiling again, for a kernel did not run with it. False if that is known."""
    facts = _facts(tiling, problem, kind, chip)
    if facts in _refused:
        return False
    _refused.add(facts)
    choose.cache_clear()
    return True


def fits(tiling: Tiling, problem: Problem, kind: str, chip: Chip) -> bool:
    """Whether a program with this tiling finds the memory it takes."""
    if _shared_memory(tiling, problem, kind, chip.products) > chip.shared_memory:
        return False
    if chip.products == "blackwell" and _tensor_memory(tiling, problem, kind) > _TENSOR_MEMORY:
        return False
    return not _refused or _facts(tiling, problem, kind, chip) not in _refused


def _fit(tiling: Tiling, problem: Problem, kind: str, chip: Chip, named: bool) -> Tiling | None:
    """The tiling with as many stages as fit, and smaller tiles where even one does not, unless
    they are ``named``; None where nothing fits."""
    while not fits(tiling, problem, kind, chip):
        # The ring of the kernel whose warp groups run apart has two places at least.
        if tiling.stages > (2 if tiling.apart else 1):
            tiling = replace(tiling, stages=tiling.stages - 1)
        elif named or tiling.apart:
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


def persistent(tiling: Tiling, programs: int, warps: int) -> Tiling:
    """The tiling with ``programs`` programs that take tiles in turn."""
    return replace(tiling, programs=programs, warps=warps)


# Products below which making descriptors takes the host longer than they save the GPU.
MIN_TMA_PRODUCTS = 1.2e10


def _make(
    problem: Problem, pair: tuple[Shape, Shape], size: _Size, split: bool, tma: bool
) -> Tiling:
    # Narrow heads gain nothing from descriptors; dilated boxes have none, nor do empty tensors.
    use_tma = tma and problem.head_dim > 32 and not any(d > 1 for d in problem.dilation)
    use_tma = use_tma and problem.num_keys > 0
    return Tiling(*pair, size.warps, size.stages, split, tma=use_tma, apart=size.apart)


@lru_cache(maxsize=4096)
def choose(
    problem: Problem,
    kind: str,
    tma: bool,
    chip: Chip,
    query: Shape | None = None,
    key: Shape | None = None,
    apart: bool = False,
) -> Tiling | None:
    """The tiling with the least estimated time; ``query`` and ``key`` fix the tile shapes.

    ``apart`` says that there is a kernel whose groups of warps run apart, and that it may be used.
    None if nothing fits.
    """
    inverse = kind == KEY_VALUE_GRADIENT
    named = query is not None and key is not None
    apart = apart and suits_apart(problem)
    tiling = _choose(problem, kind, inverse, tma, chip, query, key, apart)
    if tiling.apart and _fit(tiling, problem, kind, chip, named) is None:
        tiling = _choose(problem, kind, inverse, tma, chip, query, key, False)
    if chip.shared_memory < _ROOMY:
        # A second program on a multiprocessor hides more than a third tile in flight.
        half = Chip(chip.shared_memory // 2, chip.products)
        while tiling.stages > 2 and not fits(tiling, problem, kind, half):
            tiling = replace(tiling, stages=tiling.stages - 1)
    fitting = _fit(tiling, problem, kind, chip, named)
    if fitting is None:
        return None
    return replace(fitting, whole=_whole(problem, fitting, inverse))


def _choose(
    problem: Problem,
    kind: str,
    inverse: bool,
    tma: bool,
    chip: Chip,
    query: Shape | None,
    key: Shape | None,
    apart: bool,
) -> Tiling:
    if query is not None and key is not None:
        size = _named_size(problem, kind, prod(query), prod(key))
        if apart and is_apart(size.rows, size.columns):
            size = size._replace(warps=4, apart=True)
        split = _splits(problem, (query, key), inverse)
        return _make(problem, (query, key), size, split, tma)
    found: list[tuple[bool, float, Tiling]] = []
    for split in (False, True):
        for size in _sizes(problem, kind, split, chip):
            queries, keys = (size.columns, size.rows) if inverse else (size.rows, size.columns)
            sums_bias = kind == QUERY_GRADIENT and problem.has_rpb
            pair = best_shapes(problem, queries, keys, inverse, sums_bias)
            if _splits(problem, pair, inverse) != split:
                continue
            tiling = _make(problem, pair, size, split, tma)
            fitting = _fit(tiling, problem, kind, chip, True)
            # Smaller tiles are better than tiles that nothing is loaded ahead of.
            is_cramped = fitting is None or fitting.stages < min(tiling.stages, 2)
            found.append((is_cramped, work(problem, *pair, inverse).covered / size.rate, tiling))
    if not found:
        raise RuntimeError("no tile size suits the problem")
    _is_cramped, time, tiling = min(found, key=lambda candidate: candidate[:2])
    if time * problem.heads * problem.batch * problem.head_dim < MIN_TMA_PRODUCTS:
        return replace(tiling, tma=False)
    if apart:
        size = _APART[max(problem.head_dim, problem.head_dim_v)]
        pair = best_apart_shapes(problem, size.rows, size.columns)
        if _apart_cost(problem, *pair) / size.rate < time:
            return _make(problem, pair, size, True, tma)
    return tiling


def _named_size(problem: Problem, kind: str, queries: int, keys: int) -> _Size:
    """How tiles run that the caller names."""
    rows, columns = (keys, queries) if kind == KEY_VALUE_GRADIENT else (queries, keys)
    # A warp group of four warps computes 64 rows. Sums of wide heads need the registers of two.
    is_large = rows >= 128 and max(problem.head_dim, columns) >= 128
    is_wide = kind != FORWARD and problem.head_dim > 256
    warps = 8 if is_large or is_wide else 4
    return _Size(rows, columns, warps, 2, 1.0)


def _can_name(problem: Problem, kind: str, chip: Chip, queries: int, keys: int) -> bool:
    """Whether tiles of so many tokens fit, in as many stages as it may take."""
    size = _named_size(problem, kind, queries, keys)
    tiling = Tiling((queries,), (keys,), size.warps, size.stages)
    return _fit(tiling, problem, kind, chip, True) is not None


def any_fit(problem: Problem, chip: Chip) -> bool:
    """Whether the smallest tiles fit, in all kernels that the problem needs."""
    kinds: tuple[str, ...] = (FORWARD,)
    if problem.requires_grad:
        kinds = (FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT)
    return all(_can_name(problem, kind, chip, _LEAST_TOKENS, _LEAST_TOKENS) for kind in kinds)


def listed(
    problem: Problem, kinds: tuple[str, ...], default: Tiling, chip: Chip, largest: int
) -> list[tuple[Shape, Shape]]:
    """All (query tile, key tile) pairs that kernels of these kinds accept, the default first, then
    by work.

    What they are does not depend on the window, nor on what else is given with query, key and
    value: whoever has asked without a bias may name a pair with one.
    """
    inverse = kinds[-1] == KEY_VALUE_GRADIENT
    most = replace(problem, has_rpb=True)

    def suit(queries: int, keys: int) -> bool:
        return all(_can_name(most, kind, chip, queries, keys) for kind in kinds)

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
