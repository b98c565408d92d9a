"""What kernels are told of a problem.

Most arguments travel in a few groups, named tuples, whose members stand in the order in which the
compiled kernel takes them: another order makes the assembler schedule, and spill, differently. Some
stay outside. Triton 3.6 finds TMA descriptors among a kernel's own parameters alone; and of a
tuple's integers it makes a kernel of its own for each pattern of ones and multiples of 16, whatever
`do_not_specialize` says: one for almost every image size. Integers in groups are `unspecialized`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import torch

from natten.devices import capability
from natten.functional.backends.triton.tiles import Tiling, block, is_dilated, parts
from natten.functional.problem import Grid, Grids, Problem

LOG2_E = 1.4426950408889634
# Beyond this factor of the scores, what a fused multiplication and subtraction rounds less often
# than the product alone would be an exponent of its own: kernels round both.
_LARGEST_FUSED_SCALE = 2.0**16
# Bytes of a head's keys and values that caches hold.
LEAST_UNCACHED = 16 * 2**20
NO_PADDINGS = (0,) * 3
NO_STRIDES = (0,) * 5


class Window(NamedTuple):
    """Windows and tiles, three numbers each, one per axis.

    All but strides and dilations are `unspecialized`. A grid of lower rank has leading axes of one
    token.

    Attributes:
        bias_paddings: How far pairs of tiles reach beyond the table of biases.
        lengths: Of the grid.
        kernels: Window sizes.
        strides: Queries that share a window.
        dilations: Distances of neighbors.
        query_origins: Where the queries' box starts in the grid.
        query_extents: Of the queries' box.
        key_origins: Where the keys' box starts.
        key_extents: Of the keys' box.
        tiles: Row tiles of one dilation group.
        divisions: `divisions` by them; None where grids differ in size.
    """

    bias_paddings: Any
    lengths: Any
    kernels: Any
    strides: Any
    dilations: Any
    query_origins: Any
    query_extents: Any
    key_origins: Any
    key_extents: Any
    tiles: Any
    divisions: Any


class Scales(NamedTuple):
    """Factor of the scores in base 2, and of the gradients of query and key."""

    scores: float
    gradients: float


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for.

    Attributes:
        HEADS_PER_KV: Query heads for each head of keys and values.
        QUERY_TILE: Extents of a tile of queries.
        KEY_TILE: Extents of a tile of keys.
        FEATURES: Of a query or key.
        VALUE_FEATURES: Of a value.
        BLOCK: Features of one tile of queries or keys, a power of two.
        VALUE_BLOCK: Features of one tile of values.
        PARTS: The same of one tile, or of two that take less together: `tiles.parts`.
        VALUE_PARTS: Those of values.
        RANK: Axes of the grid.
        FIRST_AXIS_FASTEST: Whether tiles are numbered along the first of three axes first, those of
            rows and those that each of them visits; else along the last.
        CAUSAL: Whether queries attend to no later token, of each axis.
        CIRCULAR: Whether windows wrap around, of each axis.
        UPSAMPLING: Queries of each key, along each axis.
        DILATED: Whether tokens form several dilation groups, along each axis.
        TMA: Whether column tiles are loaded through descriptors.
        UNIT: Divides all strides, which kernels take in multiples of it.
        WIDE: Whether offsets of elements take 64 bits.
        VARLEN: Whether the batch holds packed sequences.
        GRIDS: Whether it holds grids of different sizes, which a table tells apart.
        HAS_RPB: Whether scores have a bias.
        HAS_ADDITIONAL: Whether there are additional keys.
        HAS_QUERY_MASK: Whether queries may not be valid.
        NEGATE: Whether the scale is negative.
        MASK: Which tiles are masked, see `primitives.tile_scores`.
        STAGES: Column tiles in flight.
        THREADS: Of a program.
        PRECISION: Of float32 products.
        PERSISTENT: Whether there are fewer programs than row tiles, and each takes several.
        WARP_SPECIALIZE: Whether loads, products and softmax get warps of their own.
        SKIPS: Whether halves of row tiles that own their warps skip what they do not see.
    """

    HEADS_PER_KV: int
    QUERY_TILE: tuple[int, ...]
    KEY_TILE: tuple[int, ...]
    FEATURES: int
    VALUE_FEATURES: int
    BLOCK: int
    VALUE_BLOCK: int
    PARTS: tuple[int, ...]
    VALUE_PARTS: tuple[int, ...]
    RANK: int
    FIRST_AXIS_FASTEST: bool
    CAUSAL: tuple[bool, ...]
    CIRCULAR: tuple[bool, ...]
    UPSAMPLING: tuple[int, ...]
    DILATED: tuple[bool, ...]
    TMA: bool
    UNIT: int
    WIDE: bool
    VARLEN: bool
    GRIDS: bool
    HAS_RPB: bool
    HAS_ADDITIONAL: bool
    HAS_QUERY_MASK: bool
    NEGATE: bool
    MASK: str
    STAGES: int
    THREADS: int
    PRECISION: str
    PERSISTENT: bool
    WARP_SPECIALIZE: bool
    SKIPS: bool

    @property
    def QUERIES(self) -> int:
        """Tokens of a tile of queries."""
        return prod(self.QUERY_TILE)

    @property
    def KEYS(self) -> int:
        """Tokens of a tile of keys."""
        return prod(self.KEY_TILE)


def pad(numbers: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    """One for each of three axes; leading axes that the grid lacks get ``fill``."""
    return (fill,) * (3 - len(numbers)) + tuple(numbers)


def unspecialized(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Integers that Triton finds nothing special about, odd ones above 1; kernels undo it with
    `primitives.decode`."""
    return tuple([2 * number + 3 for number in numbers])


def division(divisor: int) -> int:
    """What `primitives.divided_by` needs to divide integers of 31 bits: a factor of 32 bits and how
    far the product is shifted, which make an odd number that never fits into 32 bits.

    Round-up method of T. Granlund and P. L. Montgomery, "Division by Invariant Integers using
    Multiplication", 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return (-(-(1 << shift) // divisor) << 7) | (shift << 1) | 1


def divisions(
    tiles: tuple[int, ...], dilations: tuple[int, ...], heads: int, first_axis_fastest: bool
) -> tuple[int, ...]:
    """Divisions by the row tiles of a head, by heads, and by the tiles along the axis by which they
    are numbered first, and second."""
    along = [count * dilation for count, dilation in zip(tiles, dilations, strict=True)]
    if not first_axis_fastest:
        along.reverse()
    return tuple(map(division, (prod(along), heads, *along[:2])))


def strides_of(stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of batch, three axes of tokens, and heads, from those of a tensor."""
    batch, *tokens, head, _ = stride
    return (batch, *pad(tokens, 0), head)


def group_steps(problem: Problem, stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of three axes of tokens, where there are several dilation groups; else None."""
    return unspecialized(strides_of(stride)[1:4]) if is_dilated(problem) else None


def statistic_strides(shape: Sequence[int], heads: int, heads_last: bool) -> tuple[int, ...]:
    """Strides of one number per [batch, token, head], or per [batch, head, token]."""
    tokens = prod(shape)
    unit = heads if heads_last else 1
    steps = [unit * prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return unspecialized((tokens * heads, *pad(steps, 0), 1 if heads_last else tokens))


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...] | None:
    """Strides of a mask ``[batch, *tokens]``, as those of a tensor with heads; None for None."""
    if mask is None:
        return None
    batch, *tokens = mask.stride()
    return unspecialized((batch, *pad(tokens, 0), 0))


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as kernels read it."""
    return None if mask is None else mask.view(torch.uint8)


def cap(problem: Problem) -> float | None:
    """What kernels multiply products with to have the hyperbolic tangent of; None for no bound."""
    return abs(problem.scale) / problem.softcap if problem.softcap else None


def scales(problem: Problem) -> tuple[float, bool]:
    """Factor of the scores in base 2, positive, and whether products are negated first. With a soft
    cap, scores are shares of it.

    The running maximum is taken before scaling, so the factor must keep the order, and a product
    with -inf must stay -inf: zero becomes a factor too small to change any weight.
    """
    return max(problem.softcap or abs(problem.scale), 1e-30) * LOG2_E, problem.scale < 0


def precision(problem: Problem) -> str:
    """Precision of float32 products, as torch's float32 matmul precision asks for.

    Full precision takes three products on tensor cores that know tf32, or none at all.
    """
    if problem.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    device = problem.device
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if is_nvidia and capability(device.index) >= (8, 0) else "ieee"


def _first_axis_fastest(problem: Problem) -> bool:
    """Whether tiles that follow each other then share more of what they read.

    The outermost loop comes back to a tile last, by when the cache may have lost it. So it should
    go along the axis that windows cover least of.
    """
    held = problem.num_keys * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    if problem.rank < 3 or any(problem.is_causal) or held < LEAST_UNCACHED:
        return False
    windows = zip(problem.kernel_size, problem.dilation, problem.grid, strict=True)
    first, _, last = [min(size * step, length) / length for size, step, length in windows]
    return last < first


def _mask(problem: Problem, tiling: Tiling) -> str:
    """Which tiles a kernel masks. The branch around a mask costs more than it saves with a bias."""
    if tiling.whole:
        return "never"
    return "edges" if tiling.mask_edges and not problem.has_rpb else "always"


def _tile_counts(
    origin: Sequence[int], extent: Sequence[int], dilation: Sequence[int], tile: Sequence[int]
) -> tuple[int, ...]:
    """Tiles along each axis that cover the box, in the dilation group that needs most."""
    counts = []
    for begin, size, step, width in zip(origin, extent, dilation, tile, strict=True):
        most = 0
        # First and last position of a group change from group to group at these places only.
        for group in {0, begin % step, (begin + size - 1) % step, step - 1}:
            first = -(-max(begin - group, 0) // step)
            last = -(-max(begin + size - group, 0) // step)
            most = max(most, -(-last // width) - first // width)
        counts.append(most)
    return tuple(counts)


def _check_steps(
    problem: Problem, one: Grid, row_tile: tuple[int, ...], column_tile: tuple[int, ...]
) -> None:
    """Decline windows of so many tiles that kernels would divide their numbers inexactly, and rings
    whose unwrapped positions they would not tell from what lies beyond."""
    rings = zip(one.extents, problem.is_circular)
    if any(is_circular and length >= 2**28 for length, is_circular in rings):
        raise NotImplementedError(
            "the Triton kernels take circular axes of less than 2 ** 28 tokens, got a grid of "
            f"{one.extents}"
        )
    if problem.rank == 1:
        return
    grid, kernel_size = pad(one.extents, 1), pad(one.kernel_size, 1)
    # An inverse window reaches as far as a window and two strides, which are no longer. Around a
    # ring it may pass the same token twice, and the seam cuts tiles.
    around, cuts = (2, 3) if problem.is_circular else (1, 1)
    finer = pad(problem.upsampling, 1)
    counts = [
        -(-min(around * length, 3 * size + rows) * factor // columns) + cuts
        for length, size, rows, columns, factor in zip(
            grid, kernel_size, row_tile, column_tile, finer, strict=True
        )
    ]
    if prod(counts) * max(counts) >= 2**32:
        raise NotImplementedError(
            f"kernel_size {one.kernel_size} on a grid of {one.extents} makes windows of more "
            "tiles than the Triton kernels can number"
        )


class Table(NamedTuple):
    """What programs find their grid in, where grids differ in size.

    Attributes:
        numbers: Integers of 32 bits: first the number of the grid of each row tile, all grids one
            after the other; then, for each grid, three extents, window sizes, strides and
            dilations, one per axis, the number of its first row tile, and its first token.
        tiles: Row tiles of one head.
    """

    numbers: np.ndarray
    tiles: int


@lru_cache(maxsize=64)
def table(grids: Grids, row_tile: tuple[int, ...]) -> Table:
    """The table of row tiles of this shape, of three axes."""
    each = [(*(pad(part, 1) for part in grid), count) for grid, count in grids.runs]
    *windows, counts = zip(*each, strict=True)
    extents, *_, dilations = map(np.array, windows)
    in_group = -(-extents // dilations)
    tiles = (-(-in_group // np.array(row_tile)) * dilations).prod(1).repeat(counts)
    tokens = extents.prod(1).repeat(counts)
    rows = np.zeros((grids.number, 14), np.int32)
    rows[:, :12] = np.concatenate(windows, 1).repeat(counts, 0)
    rows[1:, 12], rows[1:, 13] = tiles.cumsum()[:-1], tokens.cumsum()[:-1]
    owners = np.arange(grids.number, dtype=np.int32).repeat(tiles)
    return Table(np.concatenate([owners, rows.ravel()]), len(owners))


def _is_wide(problem: Problem, tiling: Tiling, strides: Sequence[tuple[int, ...]]) -> bool:
    """Whether 32 bits may be too few for an element's offset in a tensor with any of these strides,
    of batch, three axes of tokens, and heads, or in the statistics of queries."""
    keys = problem.key_shape if problem.grids is None else problem.tokens
    tokens = list(map(max, pad(problem.tokens, 1), pad(keys, 1)))
    tokens[-1] = max(tokens[-1], problem.num_additional)
    entries = problem.entries if problem.num_additional else problem.batch
    extents = (entries, *tokens, problem.heads)
    reaches = [
        sum([(extent - 1) * step for extent, step in zip(extents, stride, strict=True)])
        for stride in strides
    ]
    features = max(block(problem.head_dim), block(problem.head_dim_v))
    elements = max(max(reaches) + features, 2 * prod(extents))
    return elements * tiling.splits >= 2**31


@dataclass(frozen=True)
class Common:
    """What the kernels of attention have in common.

    Attributes:
        tiles: Row tiles of all heads and sequences.
        heads: That programs are for.
        window: Windows and tiles.
        variant: What the kernel is compiled for.
        scales: Factors of the scores and of gradients.
        options: Of the launch.
    """

    tiles: int
    heads: int
    window: Window
    variant: Variant
    scales: Scales
    options: dict[str, Any]

    def steps(self, stride: tuple[int, ...] | None) -> tuple[int, ...]:
        """Strides of a tensor of tokens as kernels take them: in multiples of the unit; zeros for
        None."""
        found = self.entry_steps(stride)
        return self.over_grids(found) if self.variant.GRIDS else found

    def entry_steps(self, stride: tuple[int, ...] | None) -> tuple[int, ...]:
        """The same of a tensor of additional tokens, of which each grid has its own."""
        strides = NO_STRIDES if stride is None else strides_of(stride)
        return unspecialized(tuple([s // self.variant.UNIT for s in strides]))

    def statistics(self, problem: Problem, heads_last: bool) -> tuple[int, ...]:
        """`statistic_strides` of the queries."""
        found = statistic_strides(problem.tokens, problem.heads, heads_last)
        return self.over_grids(found) if self.variant.GRIDS else found

    def mask(self, stride: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Strides of a mask, `mask_strides`."""
        return self.over_grids(stride) if self.variant.GRIDS and stride is not None else stride

    @staticmethod
    def over_grids(strides: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of packed grids: those of a token throughout, which kernels multiply with extents
        that a table holds; batch entries are counted in tokens."""
        token, head = strides[3:]
        return (token, token, token, token, head)


def common(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    precision: str,
    strides: tuple[tuple[int, ...], ...],
    *others: tuple[int, ...],
    has_additional: bool = False,
    inverse: bool = False,
    persistent: bool = False,
    bias_paddings: tuple[int, ...] = NO_PADDINGS,
) -> Common:
    """What follows from problem, tiling and layout.

    ``strides`` are those of query, key, value and, in the backward pass, the output's gradient;
    ``others`` those of all else with features. ``inverse`` says that key tiles own the programs.
    """
    groups = tuple(map(strides_of, (*strides, *others)))
    query_tile, key_tile = pad(tiling.query, 1), pad(tiling.key, 1)
    dilations = pad(problem.dilation, 1)
    query_box = (pad(problem.query_origin, 0), pad(problem.query_shape, 1))
    key_box = (pad(problem.key_origin, 0), pad(problem.key_shape, 1))
    row_box, row_tile, column_tile = query_box, query_tile, key_tile
    heads = problem.heads
    if inverse:
        row_box, row_tile, column_tile = key_box, key_tile, query_tile
        heads = problem.heads_kv
    if problem.varlen:
        # As many programs for each sequence as the longest needs.
        row_box = row_box[0], pad((problem.max_seqlen_kv if inverse else problem.max_seqlen_q,), 1)
    if problem.grids is None:
        tiles = _tile_counts(*row_box, dilations, row_tile)
        programs = prod(tiles) * prod(dilations)
        grids = [Grid(problem.grid, problem.kernel_size, problem.stride, problem.dilation)]
    else:
        programs = table(problem.grids, row_tile).tiles
        tiles = (1, 1, programs)
        grids = [grid for grid, _ in problem.grids.runs]
    for grid in grids:
        _check_steps(problem, grid, row_tile, column_tile)
    scale, negate = scales(problem)
    first_axis_fastest, has_grids = _first_axis_fastest(problem), problem.grids is not None
    factors = None if has_grids else divisions(tiles, dilations, heads, first_axis_fastest)
    options = {"num_warps": tiling.warps, "enable_fp_fusion": scale <= _LARGEST_FUSED_SCALE}
    return Common(
        programs * heads * sequences,
        heads,
        Window(
            bias_paddings=unspecialized(bias_paddings),
            lengths=unspecialized(pad(problem.grid, 1)),
            kernels=unspecialized(pad(problem.kernel_size, 1)),
            strides=pad(problem.stride, 1),
            dilations=dilations,
            query_origins=unspecialized(query_box[0]),
            query_extents=unspecialized(query_box[1]),
            key_origins=unspecialized(key_box[0]),
            key_extents=unspecialized(key_box[1]),
            tiles=unspecialized(tiles),
            divisions=factors,
        ),
        Variant(
            HEADS_PER_KV=problem.heads // problem.heads_kv,
            QUERY_TILE=query_tile,
            KEY_TILE=key_tile,
            FEATURES=problem.head_dim,
            VALUE_FEATURES=problem.head_dim_v,
            BLOCK=block(problem.head_dim),
            VALUE_BLOCK=block(problem.head_dim_v),
            PARTS=parts(problem.head_dim, problem.dtype),
            VALUE_PARTS=parts(problem.head_dim_v, problem.dtype),
            RANK=problem.rank,
            FIRST_AXIS_FASTEST=first_axis_fastest,
            CAUSAL=pad(problem.is_causal, False),
            CIRCULAR=pad(problem.is_circular or (False,) * problem.rank, False),
            UPSAMPLING=pad(problem.upsampling or (1,) * problem.rank, 1),
            DILATED=tuple([has_grids or step > 1 for step in dilations]),
            TMA=tiling.tma,
            UNIT=gcd(16, *(step for group in groups for step in group)),
            WIDE=_is_wide(problem, tiling, groups),
            VARLEN=problem.varlen,
            GRIDS=has_grids,
            HAS_RPB=problem.has_rpb,
            HAS_ADDITIONAL=has_additional,
            HAS_QUERY_MASK=problem.has_query_mask,
            NEGATE=negate,
            MASK=_mask(problem, tiling),
            STAGES=tiling.stages,
            THREADS=32 * tiling.warps,
            PRECISION=precision,
            PERSISTENT=persistent,
            WARP_SPECIALIZE=tiling.warp_specialize,
            SKIPS=tiling.skips,
        ),
        Scales(scale, problem.scale),
        options,
    )  # fmt: skip
