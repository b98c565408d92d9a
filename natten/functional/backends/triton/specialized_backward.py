"""The backward kernel for Hopper that computes all three gradients in one pass, in Gluon.

Two groups of four warps own half of a key tile each and visit the queries that see it, as in
`specialized.py`. Each sums the gradients of its own keys and values in registers. The gradients of
queries are sums over all key tiles: the groups share the scores' gradients in memory, each
multiplies them with half the features of the keys, and the memory accelerator adds the product to a
sum in global memory. That is five matrix products where the kernels of `backward.py` compute
seven, but the order of the additions is left to chance.

A step's product for the query runs in the next step, so that no group waits for the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .primitives import (
    column_steps,
    column_tile,
    in_sight,
    row_tile,
    sequence_of,
    unravel,
)
from .specialized import row_corner, seen, sights, store_tile


def sums_descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """Of float32 sums, in tiles of half the features."""
    tile = [*tile[:-1], tile[-1] // 2]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.float32)
    return TensorDescriptor(tensor, shape, strides, tile, layout)


def statistics_descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """Of a few numbers a token, which lie in shared memory one after the other."""
    return TensorDescriptor(tensor, shape, strides, tile, gl.NVMMASharedLayout(0, 32, len(tile)))


if hasattr(tma, "async_atomic_add"):
    add_to_global = tma.async_atomic_add
else:
    # Triton 3.6 and 3.7 have the operation, but no name for it.
    @builtin
    def add_to_global(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Starts to add a tile in shared memory to global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def place_of(
    i, steps, kv_head, box, TILE: gl.constexpr, HEADS_PER_KV: gl.constexpr, RANK: gl.constexpr
):
    """The head and the corner of the i-th tile of queries, of `steps` tiles a head."""
    head = kv_head * HEADS_PER_KV
    if HEADS_PER_KV > 1:
        head += i // steps
        i = i % steps
    corner, _whole = column_tile(i, box, TILE, RANK)
    return head, corner


@gluon.jit
def load_queries(
    HALF: gl.constexpr, i, place, queries, query, out_gradient, statistics, batch, heads,
    buffers, barriers, FEATURES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts to load the i-th tile: the first half queries, the second all else about them."""
    head, corner = place
    stage = i % STAGES
    z = queries + corner[2]
    if HALF == 0:
        full = barriers[1].index(stage)
        mbarrier.expect(full, query.block_type.nbytes)
        tma.async_copy_global_to_shared(
            query, [batch, corner[0], corner[1], z, head * FEATURES], full,
            buffers[2].index(stage),
        )  # fmt: skip
    else:
        full = barriers[2].index(stage)
        statistics_full = barriers[3].index(stage)
        mbarrier.expect(full, out_gradient.block_type.nbytes)
        mbarrier.expect(statistics_full, statistics.block_type.nbytes)
        tma.async_copy_global_to_shared(
            out_gradient, [batch, corner[0], corner[1], z, head * FEATURES], full,
            buffers[3].index(stage),
        )  # fmt: skip
        tma.async_copy_global_to_shared(
            statistics, [batch * heads + head, corner[0], corner[1], z, 0], statistics_full,
            buffers[4].index(stage),
        )  # fmt: skip


@gluon.jit
def statistic(pairs, which: gl.constexpr, COLUMNS: gl.constexpr, column_layout: gl.constexpr):
    """One of the numbers of each query."""
    # That of products along their columns, with an axis of one.
    NEXT: gl.constexpr = [[1, 0], [8, 0], [16, 0], [32, 0]]
    layout: gl.constexpr = gl.DistributedLinearLayout(
        NEXT if COLUMNS == 64 else NEXT + [[64, 0]],
        [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [COLUMNS, 1],
    )  # fmt: skip
    numbers = pairs.slice(which, 1, 1).load(layout).reshape([COLUMNS])
    return gl.convert_layout(numbers, column_layout)


@gluon.jit
def multiply_keys(score_gradients, keys, COLUMNS: gl.constexpr, PART: gl.constexpr):
    """Starts the product of a tile's score gradients with half the features of the keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    zeros = gl.full([COLUMNS, PART], 0.0, gl.float32, layout)
    return warpgroup_mma(score_gradients.permute((1, 0)), keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def add_queries(
    part, place, queries, query_sums, sums, batch, first_head, feature, FEATURES: gl.constexpr
):
    """Starts to add half the features of a tile's query gradients to memory."""
    head, corner = place
    sums.reshape(part.shape).store(part)
    fence_async_shared()
    add_to_global(
        query_sums,
        [
            batch, corner[0], corner[1], queries + corner[2],
            (head - first_head) * FEATURES + feature,
        ],
        sums,
    )  # fmt: skip


@gluon.jit
def attend_back(
    HALF: gl.constexpr,
    query, key, value, out_gradient, statistics, query_sums, key_gradient, value_gradient,
    cumulative_query, cumulative_key, key_gradient_strides, value_gradient_strides,
    lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
    tiles, heads, first_head, group_heads, scale, gradient_scale, buffers, barriers,
    HEADS_PER_KV: gl.constexpr, QUERY_TILE: gl.constexpr, KEY_TILE: gl.constexpr,
    FEATURES: gl.constexpr, RANK: gl.constexpr, CAUSAL: gl.constexpr, UNIT: gl.constexpr,
    VARLEN: gl.constexpr, NEGATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps with half of a key tile."""
    (
        key_buffer, value_buffer, query_buffers, gradient_buffers, statistics_buffers,
        score_gradient_buffers, sum_buffers,
    ) = buffers  # fmt: skip
    (
        rows_full, query_full, gradient_full, statistics_full, query_empty, gradient_empty,
        shared_full, shared_empty,
    ) = barriers  # fmt: skip
    ALL: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    ROWS: gl.constexpr = ALL // 2
    COLUMNS: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    PART: gl.constexpr = FEATURES // 2
    # Two products of 128 columns at a time and a sum that waits for a third spill registers.
    LATE: gl.constexpr = COLUMNS == 128
    dtype: gl.constexpr = query_buffers.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEATURES, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    at, rows, box, grid = row_tile(
        gl.program_id(0), HALF * ROWS + gl.arange(0, ROWS, row_layout),
        cumulative_key, cumulative_query, lengths, kernels, strides, (1, 1, 1),
        key_origins, key_extents, query_origins, query_extents, tiles, group_heads,
        KEY_TILE, QUERY_TILE, CAUSAL, True, RANK, VARLEN,
    )  # fmt: skip
    kv_head, batch, memory_batch = at
    kv_head += first_head
    memory, exists, _position, begin, width, corner = rows
    queries = grid[3]
    own = sights(begin, width, exists, RANK)
    # Rows that do not exist see nothing: unmasked, they would add to the queries' gradients.
    widths = width[2]
    if RANK >= 2:
        widths = gl.minimum(widths, width[1])
    if RANK == 3:
        widths = gl.minimum(widths, width[0])
    see_some = gl.min(widths, 0) > 0
    steps = column_steps(box)
    total = steps * HEADS_PER_KV

    row_first, _length = sequence_of(cumulative_key, batch, 2**30, VARLEN)
    x, y, z = row_corner(0, corner, key_origins, row_first, KEY_TILE)
    mbarrier.expect(rows_full.index(HALF), key.block_type.nbytes)
    tma.async_copy_global_to_shared(
        key if HALF == 0 else value, [memory_batch, x, y, z, kv_head * FEATURES],
        rows_full.index(HALF), key_buffer if HALF == 0 else value_buffer,
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        if i < total:
            load_queries(
                HALF, i,
                place_of(i, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK), queries,
                query, out_gradient, statistics, memory_batch, heads * HEADS_PER_KV, buffers,
                barriers, FEATURES, STAGES,
            )  # fmt: skip

    all_keys = key_buffer.reshape([ALL, FEATURES])
    keys = all_keys.slice(HALF * ROWS, ROWS, 0)
    key_features = all_keys.slice(HALF * PART, PART, 1)
    values = value_buffer.reshape([ALL, FEATURES]).slice(HALF * ROWS, ROWS, 0)
    sums = sum_buffers.index(HALF)
    place = unravel(gl.arange(0, COLUMNS, column_layout), QUERY_TILE)
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, scores_layout)
    key_sum = warpgroup_mma_init(gl.full([ROWS, FEATURES], 0.0, gl.float32, sum_layout))
    value_sum = warpgroup_mma_init(gl.full([ROWS, FEATURES], 0.0, gl.float32, sum_layout))
    mbarrier.wait(rows_full.index(0), 0)
    mbarrier.wait(rows_full.index(1), 0)
    for i in range(total):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        here = i & 1
        _head, corner = place_of(i, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK)
        needed, whole = seen(corner, own, QUERY_TILE, RANK)
        shared = score_gradient_buffers.index(here).slice(HALF * ROWS, ROWS, 0)
        mbarrier.wait(query_full.index(stage), phase)
        if needed:
            query_tile = query_buffers.index(stage).reshape([COLUMNS, FEATURES])
            gradient_tile = gradient_buffers.index(stage).reshape([COLUMNS, FEATURES])
            pairs = statistics_buffers.index(stage)._reinterpret(gl.float32, [COLUMNS, 4], flat)
            scores = warpgroup_mma(
                keys, query_tile.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(gradient_full.index(stage), phase)
            weight_gradient = warpgroup_mma(
                values, gradient_tile.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(statistics_full.index(stage), phase)
            column_lse = statistic(pairs, 0, COLUMNS, column_layout)
            scores = warpgroup_mma_wait(1, deps=[scores])
            if NEGATE:
                scores = -scores
            if not (whole & see_some):
                scores = gl.where(
                    in_sight(corner, place, begin, width, RANK), scores, float("-inf")
                )
            weights = gl.exp2(scores * scale - column_lse[None, :])
            operand = gl.convert_layout(weights.to(dtype), operand_layout)
            if LATE:
                weight_gradient = warpgroup_mma_wait(0, deps=[weight_gradient])
            else:
                value_sum = warpgroup_mma(operand, gradient_tile, value_sum, is_async=True)
                weight_gradient = warpgroup_mma_wait(1, deps=[weight_gradient])
            column_delta = statistic(pairs, 1, COLUMNS, column_layout)
            score_gradient = weights * (weight_gradient - column_delta[None, :])
            score_gradient = score_gradient.to(dtype)
            mbarrier.wait(shared_empty.index(here), ((i >> 1) + 1) & 1)
            shared.store(score_gradient)
            if LATE:
                value_sum = warpgroup_mma(operand, gradient_tile, value_sum, is_async=True)
            operand = gl.convert_layout(score_gradient, operand_layout)
            fence_async_shared()
            mbarrier.arrive(shared_full.index(here))
            if i > 0:
                mbarrier.wait(shared_full.index(1 - here), ((i - 1) >> 1) & 1)
                part = multiply_keys(
                    score_gradient_buffers.index(1 - here), key_features, COLUMNS, PART
                )
                key_sum = warpgroup_mma(operand, query_tile, key_sum, is_async=True)
                tma.store_wait(0)
                part, value_done = warpgroup_mma_wait(1, deps=[part, value_sum])
                mbarrier.arrive(shared_empty.index(1 - here))
                mbarrier.arrive(gradient_empty.index(stage))
                value_sum = warpgroup_mma_init(value_done)
                add_queries(
                    part,
                    place_of(i - 1, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK),
                    queries, query_sums, sums, memory_batch, first_head * HEADS_PER_KV,
                    HALF * PART, FEATURES,
                )  # fmt: skip
                key_done = warpgroup_mma_wait(0, deps=[key_sum])
                mbarrier.arrive(query_empty.index(stage))
                key_sum = warpgroup_mma_init(key_done)
            else:
                key_sum = warpgroup_mma(operand, query_tile, key_sum, is_async=True)
                key_done, value_done = warpgroup_mma_wait(0, deps=[key_sum, value_sum])
                mbarrier.arrive(gradient_empty.index(stage))
                mbarrier.arrive(query_empty.index(stage))
                key_sum = warpgroup_mma_init(key_done)
                value_sum = warpgroup_mma_init(value_done)
        else:
            key_done, value_done = warpgroup_mma_wait(0, deps=[key_sum, value_sum])
            key_sum = warpgroup_mma_init(key_done)
            value_sum = warpgroup_mma_init(value_done)
            # Buffers are filled again only after they have been full.
            mbarrier.wait(gradient_full.index(stage), phase)
            mbarrier.wait(statistics_full.index(stage), phase)
            mbarrier.arrive(gradient_empty.index(stage))
            mbarrier.arrive(query_empty.index(stage))
            mbarrier.wait(shared_empty.index(here), ((i >> 1) + 1) & 1)
            shared.store(gl.full([ROWS, COLUMNS], 0.0, dtype, scores_layout))
            fence_async_shared()
            mbarrier.arrive(shared_full.index(here))
            if i > 0:
                mbarrier.wait(shared_full.index(1 - here), ((i - 1) >> 1) & 1)
                part = multiply_keys(
                    score_gradient_buffers.index(1 - here), key_features, COLUMNS, PART
                )
                tma.store_wait(0)
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(shared_empty.index(1 - here))
                add_queries(
                    part,
                    place_of(i - 1, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK),
                    queries, query_sums, sums, memory_batch, first_head * HEADS_PER_KV,
                    HALF * PART, FEATURES,
                )  # fmt: skip
        if i + STAGES < total:
            if HALF == 0:
                mbarrier.wait(query_empty.index(stage), phase)
            else:
                mbarrier.wait(gradient_empty.index(stage), phase)
            load_queries(
                HALF, i + STAGES,
                place_of(i + STAGES, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK),
                queries, query, out_gradient, statistics, memory_batch, heads * HEADS_PER_KV,
                buffers, barriers, FEATURES, STAGES,
            )  # fmt: skip
    key_sum, value_sum = warpgroup_mma_wait(0, deps=[key_sum, value_sum])
    if total > 0:
        last = (total - 1) & 1
        mbarrier.wait(shared_full.index(last), ((total - 1) >> 1) & 1)
        part = multiply_keys(score_gradient_buffers.index(last), key_features, COLUMNS, PART)
        tma.store_wait(0)
        part = warpgroup_mma_wait(0, deps=[part])
        add_queries(
            part,
            place_of(total - 1, steps, kv_head, box, QUERY_TILE, HEADS_PER_KV, RANK),
            queries, query_sums, sums, memory_batch, first_head * HEADS_PER_KV, HALF * PART,
            FEATURES,
        )  # fmt: skip
    store_tile(
        key_gradient, key_sum * gradient_scale, memory_batch, kv_head, memory, exists,
        key_gradient_strides, FEATURES, UNIT, RANK,
    )  # fmt: skip
    store_tile(
        value_gradient, value_sum, memory_batch, kv_head, memory, exists,
        value_gradient_strides, FEATURES, UNIT, RANK,
    )  # fmt: skip
    # Shared memory must not go before it has been read.
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "first_head", "group_heads"])
def specialized_gradients_kernel(
    query, key, value, out_gradient, statistics, query_sums, key_gradient, value_gradient,
    cumulative_query, cumulative_key, key_gradient_strides, value_gradient_strides,
    lengths, kernels, strides, query_origins, query_extents, key_origins, key_extents,
    tiles, heads, first_head, group_heads, scale, gradient_scale,
    HEADS_PER_KV: gl.constexpr, QUERY_TILE: gl.constexpr, KEY_TILE: gl.constexpr,
    FEATURES: gl.constexpr, RANK: gl.constexpr, CAUSAL: gl.constexpr, UNIT: gl.constexpr,
    VARLEN: gl.constexpr, NEGATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as those of `key_value_gradient_kernel`, but for descriptors: of query and the
    output's gradient, in query tiles; of key and value, in key tiles; of four statistics a query,
    logsumexp and delta first; and of the sums, which the gradients of `group_heads` heads of keys,
    from `first_head` on, are added to."""
    COLUMNS: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    shared: gl.constexpr = [KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2], COLUMNS]
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    buffers = (
        gl.allocate_shared_memory(key.dtype, key.block_type.shape, key.layout),
        gl.allocate_shared_memory(value.dtype, value.block_type.shape, value.layout),
        gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout),
        gl.allocate_shared_memory(
            query.dtype, [STAGES] + out_gradient.block_type.shape, out_gradient.layout
        ),
        gl.allocate_shared_memory(
            gl.float32, [STAGES] + statistics.block_type.shape, statistics.layout
        ),
        gl.allocate_shared_memory(
            query.dtype, [2] + shared, gl.NVMMASharedLayout.get_default_for(shared, query.dtype)
        ),
        gl.allocate_shared_memory(gl.float32, [2] + query_sums.block_type.shape, query_sums.layout),
    )
    barriers = (
        gl.allocate_shared_memory(gl.int64, [2, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], layout),
    )
    for half in gl.static_range(2):
        mbarrier.init(barriers[0].index(half), count=1)
        mbarrier.init(barriers[6].index(half), count=2)
        mbarrier.init(barriers[7].index(half), count=2)
    for stage in gl.static_range(STAGES):
        for full in gl.static_range(1, 4):
            mbarrier.init(barriers[full].index(stage), count=1)
        for empty in gl.static_range(4, 6):
            mbarrier.init(barriers[empty].index(stage), count=2)
    gl.warp_specialize(
        [
            (attend_back, (
                0, query, key, value, out_gradient, statistics, query_sums, key_gradient,
                value_gradient, cumulative_query, cumulative_key, key_gradient_strides,
                value_gradient_strides, lengths, kernels, strides, query_origins, query_extents,
                key_origins, key_extents, tiles, heads, first_head, group_heads, scale,
                gradient_scale, buffers, barriers, HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES,
                RANK, CAUSAL, UNIT, VARLEN, NEGATE, STAGES,
            )),
            (attend_back, (
                1, query, key, value, out_gradient, statistics, query_sums, key_gradient,
                value_gradient, cumulative_query, cumulative_key, key_gradient_strides,
                value_gradient_strides, lengths, kernels, strides, query_origins, query_extents,
                key_origins, key_extents, tiles, heads, first_head, group_heads, scale,
                gradient_scale, buffers, barriers, HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES,
                RANK, CAUSAL, UNIT, VARLEN, NEGATE, STAGES,
            )),
        ],
        [4],
        [240],
    )  # fmt: skip
