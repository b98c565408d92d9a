"""Forward kernel: one softmax over the neighborhood and the additional tokens.

A program owns one tile of queries of one head and visits the key tiles that cover the union of
their windows, which start exactly where the union starts. Tiles in full sight of every query need
no mask (`MASK`); where there are few of them, asking for each costs more than it saves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN_2,
    additional_count,
    additional_tile,
    ceil_div,
    column_source,
    column_steps,
    column_tile,
    head_offset,
    load_columns,
    load_rows,
    row_offsets,
    row_tile,
    store_rows,
    tile_scores,
    unravel,
)


@triton.jit
def softmax_step(
    scores, columns, scale, accumulator, maximum, total, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the running softmax, in base 2."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet has maximum -inf: keep -inf - -inf out of the exponent.
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores * scale - pivot[:, None])
    shrink = tl.math.exp2(maximum - pivot)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = tl.dot(weights.to(columns.dtype), columns, accumulator, input_precision=PRECISION)
    return accumulator, new_maximum, total


@triton.jit
def forward_tile(
    program,
    query, key, value, out, lse, bias, additional_key, additional_value,
    cumulative_query, cumulative_key, additional_counts,
    query_strides, key_strides, value_strides, out_strides, lse_strides,
    additional_key_strides, additional_value_strides,
    bias_paddings, lengths, kernels, strides, dilations,
    query_origins, query_extents, key_origins, key_extents,
    tiles, heads, num_additional, scale,
    HEADS_PER_KV: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_ADDITIONAL: tl.constexpr, NEGATE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    COLUMNS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    at, rows, box, grid = row_tile(
        program, tl.arange(0, ROWS), cumulative_query, cumulative_key,
        lengths, kernels, strides, dilations,
        query_origins, query_extents, key_origins, key_extents, tiles, heads,
        QUERY_TILE, KEY_TILE, CAUSAL, False, RANK, VARLEN,
    )  # fmt: skip
    head, batch, memory_batch = at
    memory, exists, position, begin, width, _corner = rows
    first, column_memory, extent, column_first = grid
    kv_head = head // HEADS_PER_KV
    place = unravel(tl.arange(0, COLUMNS), KEY_TILE)

    offset, all_exist = row_offsets(memory, exists, query_strides, UNIT, RANK)
    query_rows = load_rows(
        query + head_offset(memory_batch, head, query_strides, UNIT),
        offset, all_exist, FEATURES, BLOCK,
    )  # fmt: skip
    key_source, key_steps = column_source(
        key, memory_batch, kv_head, column_memory, key_strides, dilations, UNIT, RANK, TMA,
    )  # fmt: skip
    value_source, value_steps = column_source(
        value, memory_batch, kv_head, column_memory, value_strides, dilations, UNIT, RANK, TMA,
    )  # fmt: skip

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for t in tl.range(0, column_steps(box), num_stages=STAGES, warp_specialize=WARP_SPECIALIZE):
        corner, whole = column_tile(t, box, KEY_TILE, RANK)
        columns = load_columns(
            key_source, memory_batch, kv_head, corner, column_first, extent, key_steps, place,
            FEATURES, BLOCK, COLUMNS, RANK, TMA, WIDE,
        )  # fmt: skip
        scores = tile_scores(
            query_rows, columns, corner, whole, place, begin, width, position, first, kernels, bias,
            bias_paddings, head, MASK, False, HAS_RPB, NEGATE, RANK, PRECISION,
        )  # fmt: skip
        columns = load_columns(
            value_source, memory_batch, kv_head, corner, column_first, extent, value_steps, place,
            VALUE_FEATURES, VALUE_BLOCK, COLUMNS, RANK, TMA, WIDE,
        )  # fmt: skip
        accumulator, maximum, total = softmax_step(
            scores, columns, scale, accumulator, maximum, total, PRECISION
        )
    if HAS_ADDITIONAL:
        keys = additional_key + head_offset(batch, kv_head, additional_key_strides, UNIT)
        values = additional_value + head_offset(batch, kv_head, additional_value_strides, UNIT)
        count = additional_count(additional_counts, batch, num_additional)
        for t in tl.range(0, ceil_div(count, COLUMNS), num_stages=STAGES):
            columns, value_columns, present = additional_tile(
                t, count, keys, values, additional_key_strides, additional_value_strides,
                FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK, COLUMNS, UNIT,
            )  # fmt: skip
            scores = tl.dot(query_rows, columns.T, input_precision=PRECISION)
            if NEGATE:
                scores = -scores
            scores = tl.where(present[None, :], scores, float("-inf"))
            accumulator, maximum, total = softmax_step(
                scores, value_columns, scale, accumulator, maximum, total, PRECISION
            )

    # A query that sees nothing has output 0 and logsumexp -inf.
    accumulator = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    offset, all_exist = row_offsets(memory, exists, out_strides, UNIT, RANK)
    start = head_offset(memory_batch, head, out_strides, UNIT)
    store_rows(out + start, accumulator, offset, all_exist, VALUE_FEATURES, VALUE_BLOCK)
    offset, all_exist = row_offsets(memory, exists, lse_strides, 1, RANK)
    offset += head_offset(memory_batch, head, lse_strides, 1)
    tl.store(lse + offset, (maximum + tl.math.log2(total)) * LN_2, mask=all_exist)


@triton.jit(do_not_specialize=["programs", "heads", "num_additional"])
def forward_kernel(
    query, key, value, out, lse, bias, additional_key, additional_value,
    cumulative_query, cumulative_key, additional_counts,
    query_strides, key_strides, value_strides, out_strides, lse_strides,
    additional_key_strides, additional_value_strides,
    bias_paddings, lengths, kernels, strides, dilations,
    query_origins, query_extents, key_origins, key_extents,
    tiles, programs, heads, num_additional, scale,
    HEADS_PER_KV: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_ADDITIONAL: tl.constexpr, NEGATE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0)):
            forward_tile(
                program, query, key, value, out, lse, bias, additional_key, additional_value,
                cumulative_query, cumulative_key, additional_counts,
                query_strides, key_strides, value_strides, out_strides, lse_strides,
                additional_key_strides, additional_value_strides,
                bias_paddings, lengths, kernels, strides, dilations,
                query_origins, query_extents, key_origins,
                key_extents, tiles, heads, num_additional, scale,
                HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK,
                RANK, CAUSAL, TMA, UNIT, WIDE, VARLEN, HAS_RPB, HAS_ADDITIONAL, NEGATE,
                MASK, STAGES, PRECISION, WARP_SPECIALIZE,
            )  # fmt: skip
    else:
        forward_tile(
            tl.program_id(0), query, key, value, out, lse, bias, additional_key, additional_value,
            cumulative_query, cumulative_key, additional_counts,
            query_strides, key_strides, value_strides, out_strides, lse_strides,
            additional_key_strides, additional_value_strides,
            bias_paddings, lengths, kernels, strides, dilations,
            query_origins, query_extents, key_origins,
            key_extents, tiles, heads, num_additional, scale,
            HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK,
            RANK, CAUSAL, TMA, UNIT, WIDE, VARLEN, HAS_RPB, HAS_ADDITIONAL, NEGATE,
            MASK, STAGES, PRECISION, WARP_SPECIALIZE,
        )  # fmt: skip
