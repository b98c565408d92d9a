"""What the Gluon kernels for Hopper share: rings of tiles in shared memory, and what rows see.

The geometry is that of `primitives.py`, whose functions compile for Gluon as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from natten.functional.backends.triton.primitives import (
    decode,
    head_offset,
    row_offsets,
    unravel,
)

# Starts to load a tile into shared memory. Triton 3.6 has no other name for it than the second, and
# 3.9 none than the first.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Memory as numbers of another type, in another shape. Public since Triton 3.9.
as_numbers = (
    gl.shared_memory_descriptor.reinterpret
    if hasattr(gl.shared_memory_descriptor, "reinterpret")
    else gl.shared_memory_descriptor._reinterpret
)
_ELEMENTS = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv,
}  # fmt: skip


def descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """Like `triton.tools.tensor_descriptor.TensorDescriptor`, for Gluon, which wants to know how a
    tile lies in shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(tile, _ELEMENTS[tensor.dtype])
    return TensorDescriptor(tensor, shape, strides, tile, layout)


class Places(NamedTuple):
    """Places in shared memory that are filled in turn, as those of a `Ring`, where something else
    says that they are free.

    Attributes:
        buffers: A tile per place.
        full: Barriers: the tile is there.
    """

    buffers: Any
    full: Any


class Ring(NamedTuple):
    """Places in shared memory that are filled in turn, tile t in place t modulo their number.

    The n-th filling of a place, from 0, completes phase n & 1 of both barriers. Before the n-th
    filling, whoever fills waits for phase (n - 1) & 1 of `empty`, unless n is 0.

    Attributes:
        buffers: A tile per place.
        full: Barriers: the tile is there.
        empty: Barriers: both halves of the program are done with it.
    """

    buffers: Any
    full: Any
    empty: Any


# Products take powers of two of features. Over features, which they sum, a product is one for as
# many features of a head as the largest power of two and one for the others. What has features as
# columns, the sums of a head, is a tuple: one or two tiles, which may have columns of the next head
# at the end.


@gluon.constexpr_function
def main_features(FEATURES):
    """The largest power of two of them."""
    return 1 << (FEATURES.bit_length() - 1)


@gluon.constexpr_function
def sums_widths(FEATURES):
    """Columns of the tiles that hold sums for so many features."""
    main = main_features(FEATURES)
    # Tiles of 16 columns, next to others, gave wrong sums on an H100 (Triton 3.6).
    rest = FEATURES - main and max(FEATURES - main, 32)
    return (main, rest) if 0 < rest < main else (main + rest,)


@gluon.constexpr_function
def sums_layout(COLUMNS):
    """How a warp group holds a tile of sums."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@gluon.jit
def zero_sums(ROWS: gl.constexpr, FEATURES: gl.constexpr):
    """Sums of nothing yet, to be added to."""
    WIDTHS: gl.constexpr = sums_widths(FEATURES)
    main = gl.full([ROWS, WIDTHS[0]], 0.0, gl.float32, sums_layout(WIDTHS[0]))
    if len(WIDTHS) == 1:
        return (warpgroup_mma_init(main),)
    else:
        rest = gl.full([ROWS, WIDTHS[1]], 0.0, gl.float32, sums_layout(WIDTHS[1]))
        return warpgroup_mma_init(main), warpgroup_mma_init(rest)


@gluon.jit
def multiply(rows, columns, zeros, FEATURES: gl.constexpr):
    """Starts the product of rows and columns in shared memory. Behind the features of a head in
    their tiles are those of another."""
    MAIN: gl.constexpr = main_features(FEATURES)
    REST: gl.constexpr = FEATURES - MAIN
    product = warpgroup_mma(
        rows.slice(0, MAIN, 1), columns.slice(0, MAIN, 1).permute((1, 0)), zeros, use_acc=False,
        is_async=True,
    )  # fmt: skip
    if REST > 0:
        product = warpgroup_mma(
            rows.slice(MAIN, REST, 1), columns.slice(MAIN, REST, 1).permute((1, 0)), product,
            is_async=True,
        )  # fmt: skip
    return product


@gluon.jit
def add_products(weights, columns, sums, FEATURES: gl.constexpr):
    """Starts to add the product of weights and columns, features of tokens in shared memory."""
    WIDTHS: gl.constexpr = sums_widths(FEATURES)
    MAIN: gl.constexpr = WIDTHS[0]
    operand = gl.convert_layout(weights, gl.DotOperandLayout(0, sums_layout(MAIN), 2))
    main = warpgroup_mma(operand, columns.slice(0, MAIN, 1), sums[0], is_async=True)
    if len(sums) == 1:
        return (main,)
    else:
        REST: gl.constexpr = WIDTHS[1]
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, sums_layout(REST), 2))
        rest = warpgroup_mma(operand, columns.slice(MAIN, REST, 1), sums[1], is_async=True)
        return main, rest


@gluon.jit
def wait_for(PENDING: gl.constexpr, product, sums):
    """A product and sums when no more than so many later ones are at work."""
    if len(sums) == 1:
        product, main = warpgroup_mma_wait(PENDING, deps=[product, sums[0]])
        return product, (main,)
    else:
        product, main, rest = warpgroup_mma_wait(PENDING, deps=[product, sums[0], sums[1]])
        return product, (main, rest)


@gluon.jit
def wait(sums):
    """The sums when all products are done."""
    if len(sums) == 1:
        return (warpgroup_mma_wait(0, deps=[sums[0]]),)
    else:
        main, rest = warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
        return main, rest


@gluon.jit
def wait_for_both(sums, others):
    """Both when all products are done."""
    if len(sums) == 1:
        main, other_main = warpgroup_mma_wait(0, deps=[sums[0], others[0]])
        return (main,), (other_main,)
    else:
        main, rest, other_main, other_rest = warpgroup_mma_wait(
            0, deps=[sums[0], sums[1], others[0], others[1]]
        )
        return (main, rest), (other_main, other_rest)


@gluon.jit
def in_flight(sums):
    """Sums that are done as sums that may not be."""
    if len(sums) == 1:
        return (warpgroup_mma_init(sums[0]),)
    else:
        return warpgroup_mma_init(sums[0]), warpgroup_mma_init(sums[1])


@gluon.jit
def spread(numbers, tile):
    """A number per row, as the tile has them."""
    return gl.convert_layout(numbers, gl.SliceLayout(1, tile.type.layout))[:, None]


@gluon.jit
def scaled(sums, factors):
    """The sums of each row times its factor."""
    main = sums[0] * spread(factors, sums[0])
    if len(sums) == 1:
        return (main,)
    else:
        return main, sums[1] * spread(factors, sums[1])


@gluon.jit
def kept(sums, flags):
    """The sums of rows with a flag, and zeros."""
    main = gl.where(spread(flags, sums[0]), sums[0], 0.0)
    if len(sums) == 1:
        return (main,)
    else:
        return main, gl.where(spread(flags, sums[1]), sums[1], 0.0)


@gluon.jit
def divided(sums, divisors):
    """The sums of each row by its divisor."""
    return scaled(sums, 1.0 / divisors)


@gluon.jit
def barriers(PLACES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier per place, whose phases complete after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(made.index(place), count=ARRIVALS)
    return made


@gluon.jit
def loaded_places(source, PLACES: gl.constexpr):
    """Places for so many of the tiles that a descriptor loads."""
    buffers = gl.allocate_shared_memory(
        source.dtype, [PLACES] + source.block_type.shape, source.layout
    )
    return Places(buffers, barriers(PLACES, 1))


@gluon.jit
def loaded_ring(source, PLACES: gl.constexpr):
    """A ring of them: the memory accelerator writes, the halves of the program read."""
    places = loaded_places(source, PLACES)
    return Ring(places.buffers, places.full, barriers(PLACES, 2))


@gluon.jit
def row_corner(half, corner, origins, first, TILE: gl.constexpr):
    """Coordinates in memory of the first row of a half of a tile."""
    x, y, z = unravel(half * (TILE[0] * TILE[1] * TILE[2] // 2), TILE)
    origin_x, origin_y, origin_z = decode(origins)
    return (
        corner[0] + x - origin_x, corner[1] + y - origin_y, corner[2] + z - origin_z + first,
    )  # fmt: skip


@gluon.jit
def group_start(group, steps, RANK: gl.constexpr):
    """What coordinates of the features of a dilation group begin with, see `launcher.descriptor`.
    `group` is the place of its first token, `steps` what `arguments.group_steps` gives."""
    if steps is None:
        return 0
    else:
        step_x, step_y, step_z = decode(steps)
        start = group[2] * step_z
        if RANK >= 2:
            start += group[1] * step_y
        if RANK == 3:
            start += group[0] * step_x
        return start.to(gl.int32)


@gluon.jit
def least_of_each(a, b, c, d, e, f, g, h):
    return gl.minimum(a, e), gl.minimum(b, f), gl.minimum(c, g), gl.minimum(d, h)


@gluon.jit
def sight(begin, width, exists):
    """Along one axis: where the windows of the rows that exist begin and end, together (two
    numbers) and in common (two more)."""
    far: gl.constexpr = 2**30
    end = begin + width
    # Four numbers in one reduction: warps meet as often as for one.
    first, last, last_first, first_last = gl.reduce(
        (
            gl.where(exists, begin, far), gl.where(exists, -end, far),
            gl.where(exists, -begin, far), gl.where(exists, end, far),
        ),
        0, least_of_each,
    )  # fmt: skip
    return first, -last, -last_first, first_last


@gluon.jit
def sights(begin, width, exists, RANK: gl.constexpr):
    """`sight` of each axis."""
    all_exist = exists[2]
    if RANK >= 2:
        all_exist = all_exist & exists[1]
    if RANK == 3:
        all_exist = all_exist & exists[0]
    sight_z = sight(begin[2], width[2], all_exist)
    sight_y = sight_z
    sight_x = sight_z
    if RANK >= 2:
        sight_y = sight(begin[1], width[1], all_exist)
    if RANK == 3:
        sight_x = sight(begin[0], width[0], all_exist)
    return sight_x, sight_y, sight_z


@gluon.jit
def seen(corner, sights, TILE: gl.constexpr, RANK: gl.constexpr):
    """Whether some row sees some column of the tile at `corner`, and whether all rows see all."""
    x, y, z = sights
    some = (corner[2] < z[1]) & (corner[2] + TILE[2] > z[0])
    whole = (corner[2] >= z[2]) & (corner[2] + TILE[2] <= z[3])
    if RANK >= 2:
        some = some & (corner[1] < y[1]) & (corner[1] + TILE[1] > y[0])
        whole = whole & (corner[1] >= y[2]) & (corner[1] + TILE[1] <= y[3])
    if RANK == 3:
        some = some & (corner[0] < x[1]) & (corner[0] + TILE[0] > x[0])
        whole = whole & (corner[0] >= x[2]) & (corner[0] + TILE[0] <= x[3])
    return some, whole


@gluon.jit
def store_tile(
    target, tile, batch, head, rows, strides, FEATURES: gl.constexpr, V: gl.constexpr
):  # fmt: skip
    """Rows of tokens of one head, 16 bytes per thread: the first features, which a tile may have
    more columns than."""
    COLUMNS: gl.constexpr = tile.shape[1]
    offset, all_exist = row_offsets(rows.memory, rows.exists, strides, V.UNIT, V.WIDE, V.RANK)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    features = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    offset = gl.convert_layout(offset, row_layout)[:, None] + features
    mask = gl.convert_layout(all_exist, row_layout)[:, None]
    if FEATURES < COLUMNS:
        mask = mask & (features < FEATURES)
    gl.store(
        target + head_offset(batch, head, strides, V.UNIT, V.WIDE) + offset,
        gl.convert_layout(tile.to(target.dtype.element_ty), layout),
        mask=mask,
    )


@gluon.jit
def store_sums(target, sums, batch, head, rows, strides, FEATURES: gl.constexpr, V: gl.constexpr):
    """The features' columns of sums, as `store_tile`."""
    if len(sums) == 1:
        store_tile(target, sums[0], batch, head, rows, strides, FEATURES, V)
    else:
        MAIN: gl.constexpr = sums[0].shape[1]
        store_tile(target, sums[0], batch, head, rows, strides, MAIN, V)
        store_tile(target + MAIN, sums[1], batch, head, rows, strides, FEATURES - MAIN, V)
