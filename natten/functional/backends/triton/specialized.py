"""The forward kernel for Hopper whose warp groups run apart, in Triton's Gluon dialect.

Two groups of four warps own half of a query tile each and visit the same tiles of keys and values,
in a ring of buffers. In `forward.py` all warps of a program meet at every step, so that no product
runs during the softmax; here nothing but the ring ties the groups, and one multiplies while the
other computes its softmax. Each of them also skips tiles that none of its own rows sees.

The geometry is that of `primitives.py`, whose functions compile for Gluon as they are. There is no
interpreter for Gluon: `forward.py` is this kernel's equal, and what runs everywhere else.
"""

from __future__ import annotations

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

from .primitives import (
    LN_2,
    ceil_div,
    column_steps,
    column_tile,
    head_offset,
    in_sight,
    revealed,
    row_offsets,
    row_tile,
    sequence_of,
    unravel,
)


def descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """Like `triton.tools.tensor_descriptor.TensorDescriptor`, for Gluon, which wants to know how a
    tile lies in shared memory."""
    element = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(tile, element)
    return TensorDescriptor(tensor, shape, strides, tile, layout)


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """What the halves of a program wait for: their rows, and of two tensors that are read in
    columns, that a buffer is full and that both halves are done with it."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    first_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    first_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    second_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    second_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for half in gl.static_range(2):
        mbarrier.init(rows_full.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(first_full.index(stage), count=1)
        mbarrier.init(first_empty.index(stage), count=2)
        mbarrier.init(second_full.index(stage), count=1)
        mbarrier.init(second_empty.index(stage), count=2)
    return rows_full, first_full, first_empty, second_full, second_empty


@gluon.jit
def row_corner(half, corner, origins, first, TILE: gl.constexpr):
    """Coordinates in memory of the first row of a half of a tile."""
    x, y, z = unravel(half * (TILE[0] * TILE[1] * TILE[2] // 2), TILE)
    origin_x, origin_y, origin_z = revealed(origins)
    return (
        corner[0] + x - origin_x, corner[1] + y - origin_y, corner[2] + z - origin_z + first,
    )  # fmt: skip


@gluon.jit
def sight(begin, width, exists):
    """Along one axis: where the windows of the rows that exist begin and end, together (two
    numbers) and in common (two more)."""
    far: gl.constexpr = 2**30
    end = begin + width
    return (
        gl.min(gl.where(exists, begin, far), 0),
        gl.max(gl.where(exists, end, -far), 0),
        gl.max(gl.where(exists, begin, -far), 0),
        gl.min(gl.where(exists, end, far), 0),
    )


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
    target, tile, batch, head, memory, exists, strides,
    FEATURES: gl.constexpr, UNIT: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Rows of tokens, 16 bytes a thread."""
    offset, all_exist = row_offsets(memory, exists, strides, UNIT, RANK)
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // FEATURES, FEATURES // 8], [4, 1], [1, 0]
    )
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    offset = gl.convert_layout(offset, rows)[:, None]
    offset += gl.arange(0, FEATURES, gl.SliceLayout(0, layout))[None, :]
    gl.store(
        target + head_offset(batch, head, strides, UNIT) + offset,
        gl.convert_layout(tile.to(target.dtype.element_ty), layout),
        mask=gl.convert_layout(all_exist, rows)[:, None],
    )


@gluon.jit
def load_tile(
    t, steps, box, source, additional, batches, column_first, feature, full, buffers,
    KEY_TILE: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to load the t-th tile of keys or values."""
    bar = full.index(t % STAGES)
    buffer = buffers.index(t % STAGES)
    mbarrier.expect(bar, source.block_type.nbytes)
    corner, _whole = column_tile(t, box, KEY_TILE, RANK)
    in_grid = True
    if additional is not None:
        COLUMNS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
        in_grid = t < steps
        tma.async_copy_global_to_shared(
            additional, [batches[0], 0, 0, (t - steps) * COLUMNS, feature], bar,
            buffer.reshape(additional.block_type.shape), pred=t >= steps,
        )  # fmt: skip
    tma.async_copy_global_to_shared(
        source, [batches[1], corner[0], corner[1], column_first + corner[2], feature], bar, buffer,
        pred=in_grid,
    )  # fmt: skip


@gluon.jit
def attend(
    HALF: gl.constexpr,
    query, key, value, out, lse, additional_key, additional_value,
    cumulative_query, cumulative_key, out_strides, lse_strides,
    lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
    tiles, heads, num_additional, scale, buffers, barriers,
    HEADS_PER_KV: gl.constexpr, QUERY_TILE: gl.constexpr, KEY_TILE: gl.constexpr,
    FEATURES: gl.constexpr, VALUE_FEATURES: gl.constexpr,
    RANK: gl.constexpr, CAUSAL: gl.constexpr, UNIT: gl.constexpr, VARLEN: gl.constexpr,
    NEGATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps with half of a query tile. The first half loads keys, the second values."""
    query_buffers, key_buffers, value_buffers = buffers
    query_full, key_full, key_empty, value_full, value_empty = barriers
    COLUMNS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    ROWS: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2] // 2
    dtype: gl.constexpr = query_buffers.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_FEATURES, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)

    at, rows, box, grid = row_tile(
        gl.program_id(0), HALF * ROWS + gl.arange(0, ROWS, row_layout),
        cumulative_query, cumulative_key, lengths, kernels, strides, (1, 1, 1),
        query_origins, query_extents, key_origins, key_extents, tiles, heads,
        QUERY_TILE, KEY_TILE, CAUSAL, False, RANK, VARLEN,
    )  # fmt: skip
    head, batch, memory_batch = at
    memory, exists, _position, begin, width, corner = rows
    column_first = grid[3]
    kv_head = head // HEADS_PER_KV
    batches = (batch, memory_batch)
    steps = column_steps(box)
    all_steps = steps
    if additional_key is not None:
        all_steps += ceil_div(num_additional, COLUMNS)

    row_first, _length = sequence_of(cumulative_query, batch, 2**30, VARLEN)
    x, y, z = row_corner(HALF, corner, query_origins, row_first, QUERY_TILE)
    mbarrier.expect(query_full.index(HALF), query.block_type.nbytes)
    tma.async_copy_global_to_shared(
        query, [memory_batch, x, y, z, head * FEATURES], query_full.index(HALF),
        query_buffers.index(HALF),
    )  # fmt: skip
    for t in gl.static_range(STAGES):
        if t < all_steps:
            if HALF == 0:
                load_tile(
                    t, steps, box, key, additional_key, batches, column_first, kv_head * FEATURES,
                    key_full, key_buffers, KEY_TILE, RANK, STAGES,
                )  # fmt: skip
            else:
                load_tile(
                    t, steps, box, value, additional_value, batches, column_first,
                    kv_head * VALUE_FEATURES, value_full, value_buffers, KEY_TILE, RANK, STAGES,
                )  # fmt: skip

    own = sights(begin, width, exists, RANK)
    place = unravel(gl.arange(0, COLUMNS, column_layout), KEY_TILE)
    queries = query_buffers.index(HALF).reshape([ROWS, FEATURES])
    maximum = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, scores_layout)
    accumulator = warpgroup_mma_init(gl.full([ROWS, VALUE_FEATURES], 0.0, gl.float32, out_layout))
    mbarrier.wait(query_full.index(HALF), 0)
    for t in range(all_steps):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        corner, _whole = column_tile(t, box, KEY_TILE, RANK)
        needed, whole = seen(corner, own, KEY_TILE, RANK)
        if additional_key is not None:
            needed = needed | (t >= steps)
            whole = whole | (t >= steps)
        mbarrier.wait(key_full.index(stage), phase)
        if needed:
            keys = key_buffers.index(stage).reshape([COLUMNS, FEATURES])
            scores = warpgroup_mma(
                queries, keys.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            scores, accumulated = warpgroup_mma_wait(0, deps=[scores, accumulator])
            mbarrier.arrive(key_empty.index(stage))
            mbarrier.arrive(value_empty.index((t + STAGES - 1) % STAGES), pred=t > 0)
            if NEGATE:
                scores = -scores
            if not whole:
                scores = gl.where(
                    in_sight(corner, place, begin, width, RANK), scores, float("-inf")
                )
            if additional_key is not None:
                token = (t - steps) * COLUMNS + gl.arange(0, COLUMNS, column_layout)
                scores = gl.where((token < num_additional)[None, :], scores, float("-inf"))
            new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
            # Keep -inf - -inf, of a row that has seen nothing yet, out of the exponent.
            pivot = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = gl.exp2(scores * scale - pivot[:, None])
            shrink = gl.exp2(maximum - pivot)
            total = total * shrink + gl.sum(weights, 1)
            maximum = new_maximum
            accumulated = accumulated * gl.convert_layout(shrink, out_row_layout)[:, None]
            weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, out_layout, 2))
            mbarrier.wait(value_full.index(stage), phase)
            accumulator = warpgroup_mma(
                weights, value_buffers.index(stage).reshape([COLUMNS, VALUE_FEATURES]),
                accumulated, is_async=True,
            )  # fmt: skip
        else:
            accumulated = warpgroup_mma_wait(0, deps=[accumulator])
            mbarrier.arrive(key_empty.index(stage))
            mbarrier.arrive(value_empty.index((t + STAGES - 1) % STAGES), pred=t > 0)
            # A buffer is filled again only after it has been full.
            mbarrier.wait(value_full.index(stage), phase)
            accumulator = warpgroup_mma_init(accumulated)
        if HALF == 0:
            if t + STAGES < all_steps:
                mbarrier.wait(key_empty.index(stage), phase)
                load_tile(
                    t + STAGES, steps, box, key, additional_key, batches, column_first,
                    kv_head * FEATURES, key_full, key_buffers, KEY_TILE, RANK, STAGES,
                )  # fmt: skip
        else:
            # The product with the last tile of values runs until the next step.
            if (t > 0) & (t + STAGES - 1 < all_steps):
                mbarrier.wait(
                    value_empty.index((t + STAGES - 1) % STAGES),
                    ((t + STAGES - 1) // STAGES + 1) & 1,
                )
                load_tile(
                    t + STAGES - 1, steps, box, value, additional_value, batches, column_first,
                    kv_head * VALUE_FEATURES, value_full, value_buffers, KEY_TILE, RANK, STAGES,
                )  # fmt: skip
    result = warpgroup_mma_wait(0, deps=[accumulator])

    # A query that sees nothing has output 0 and logsumexp -inf.
    divisor = gl.where(total == 0.0, 1.0, total)
    result = result / gl.convert_layout(divisor, out_row_layout)[:, None]
    offset, all_exist = row_offsets(memory, exists, lse_strides, 1, RANK)
    offset += head_offset(memory_batch, head, lse_strides, 1)
    gl.store(lse + offset, (maximum + gl.log2(total)) * LN_2, mask=all_exist)
    store_tile(
        out, result, memory_batch, head, memory, exists, out_strides, VALUE_FEATURES, UNIT, RANK
    )


@gluon.jit(do_not_specialize=["heads", "num_additional"])
def specialized_forward_kernel(
    query, key, value, out, lse, additional_key, additional_value,
    cumulative_query, cumulative_key, out_strides, lse_strides,
    lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
    tiles, heads, num_additional, scale,
    HEADS_PER_KV: gl.constexpr, QUERY_TILE: gl.constexpr, KEY_TILE: gl.constexpr,
    FEATURES: gl.constexpr, VALUE_FEATURES: gl.constexpr,
    RANK: gl.constexpr, CAUSAL: gl.constexpr, UNIT: gl.constexpr, VARLEN: gl.constexpr,
    NEGATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as those of `forward_kernel`. Query, key, value and the additional ones are
    descriptors, of tiles of half a query tile, a key tile, and as many tokens in a row."""
    buffers = (
        gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout),
        gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout),
        gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout),
    )
    barriers = ring_barriers(STAGES)
    gl.warp_specialize(
        [
            (attend, (
                0, query, key, value, out, lse, additional_key, additional_value,
                cumulative_query, cumulative_key, out_strides, lse_strides,
                lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
                tiles, heads, num_additional, scale, buffers, barriers,
                HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, RANK, CAUSAL, UNIT,
                VARLEN, NEGATE, STAGES,
            )),
            (attend, (
                1, query, key, value, out, lse, additional_key, additional_value,
                cumulative_query, cumulative_key, out_strides, lse_strides,
                lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
                tiles, heads, num_additional, scale, buffers, barriers,
                HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, RANK, CAUSAL, UNIT,
                VARLEN, NEGATE, STAGES,
            )),
        ],
        [4],
        [240],
    )  # fmt: skip
