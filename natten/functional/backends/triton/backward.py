"""Backward kernels.

With P the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE, the gradient of the scores is
dS = P * (dP - delta). Two kernels read it in the two directions:

- `query_gradient_kernel`: a tile of queries visits its keys and sums dQ = dS K;
- `key_value_gradient_kernel`: a tile of keys visits the queries that see it (inverse windows are
  boxes too) and sums dV = P^T dO and dK = dS^T Q.

The former also sums the gradient of the bias, dS over the pairs at the same distance.

The scores are computed twice, seven matrix products instead of five. In return every sum has a
fixed order, so that results are bitwise reproducible, and but for the bias nothing is added to
memory atomically: one kernel in this dialect that also adds dS K to dQ in memory took 1.2 to 2.6
times as long on an H100. `specialized_backward.py` has one that takes less, for large windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2_E,
    additional_count,
    additional_tile,
    bias_slot,
    ceil_div,
    column_source,
    column_steps,
    column_tile,
    head_offset,
    load_columns,
    load_rows,
    revealed,
    row_offsets,
    row_tile,
    store_rows,
    table_size,
    tile_scores,
    unravel,
)

NOT_SPECIALIZED = [
    "programs", "heads", "num_additional", "tokens", "splits", "split_size", "value_split_size",
    "bias_copies",
]  # fmt: skip


@triton.jit
def base2_lse(pointer, exists):
    """The logsumexp of rows in base 2."""
    lse = tl.load(pointer, mask=exists, other=0.0)
    # Rows that see nothing have no weights; 0 keeps -inf - -inf out of the exponent.
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_kernel(
    out, out_gradient, lse, lse_gradient, statistics, tokens, heads,
    VALUE_FEATURES: tl.constexpr, VALUE_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_LSE_GRADIENT: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """The base-2 logsumexp and delta, the first of `WIDTH` numbers of each [batch, head, token].

    Only where no kernel for the query's gradient computes them in passing.
    """
    blocks = ceil_div(tokens, ROWS)
    program = tl.program_id(0)
    rest = program // blocks
    head = rest % heads
    batch = (rest // heads).to(tl.int64)
    token = (program % blocks) * ROWS + tl.arange(0, ROWS)
    exists = token < tokens
    row = (batch * tokens + token) * heads + head
    row_lse = base2_lse(lse + row, exists)
    target = statistics + WIDTH * ((batch * heads + head) * tokens + token)
    tl.store(target, row_lse, mask=exists)
    if HAS_DELTA:
        offset = row * VALUE_FEATURES
        product = load_rows(out, offset, exists, VALUE_FEATURES, VALUE_BLOCK).to(tl.float32)
        product *= load_rows(out_gradient, offset, exists, VALUE_FEATURES, VALUE_BLOCK)
        row_delta = tl.sum(product, 1)
        if HAS_LSE_GRADIENT:
            row_delta -= tl.load(lse_gradient + row, mask=exists, other=0.0)
        tl.store(target + 1, row_delta, mask=exists)


@triton.jit
def load_statistics(
    pointer, corner, place, extent, steps, dilation, MASK: tl.constexpr, RANK: tl.constexpr
):
    """lse and delta of a tile of query columns, contiguous along the last axis but for dilation.

    Loaded together: of a load with fewer elements than threads, every thread would load all that
    it needs itself, sixteen of each where the columns are those of a matrix product.
    """
    start = corner[2].to(tl.int64) * dilation
    offset = place[2] * dilation
    exists = place[2] < extent[2] - corner[2]
    if RANK >= 2:
        start += corner[1] * steps[1]
        offset += place[1] * steps[1].to(tl.int32)
        exists = exists & (place[1] < extent[1] - corner[1])
    if RANK == 3:
        start += corner[0] * steps[0]
        offset += place[0] * steps[0].to(tl.int32)
        exists = exists & (place[0] < extent[0] - corner[0])
    source = pointer + 2 * start + (2 * offset[:, None] + tl.arange(0, 2)[None, :])
    if MASK == "never":
        pair = tl.load(source)
    else:
        pair = tl.load(source, mask=exists[:, None], other=0.0)
    return tl.split(pair)


@triton.jit
def query_gradient_step(
    scores, row_lse, row_delta, gradient_rows, key_columns, value_columns, accumulator, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    weights = tl.math.exp2(scores * scale - row_lse[:, None])
    weight_gradient = tl.dot(gradient_rows, value_columns.T, input_precision=PRECISION)
    score_gradient = weights * (weight_gradient - row_delta[:, None])
    score_gradient = score_gradient.to(key_columns.dtype)
    accumulator = tl.dot(score_gradient, key_columns, accumulator, input_precision=PRECISION)
    return accumulator, score_gradient


@triton.jit
def add_bias_gradient(
    score_gradient, target, factor, corner, row_corner, first, kernels, paddings,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the scores' gradient of one tile to one head's table, atomically.

    A bias belongs to a diagonal of the tile. Runs of up to eight rows and columns along the last
    axis share their diagonals' sums, which a product with zeros and ones finds, so that two to four
    times fewer numbers are added to memory, to different places. With `factor` these are integers,
    multiples of 1 / factor: then the order of the additions does not matter.
    """
    ROW_RUN: tl.constexpr = 8 if ROW_TILE[2] >= 8 else ROW_TILE[2]
    COLUMN_RUN: tl.constexpr = 8 if COLUMN_TILE[2] >= 8 else COLUMN_TILE[2]
    ROW_RUNS: tl.constexpr = ROW_TILE[0] * ROW_TILE[1] * ROW_TILE[2] // ROW_RUN
    COLUMN_RUNS: tl.constexpr = COLUMN_TILE[0] * COLUMN_TILE[1] * COLUMN_TILE[2] // COLUMN_RUN
    if ROW_RUN * COLUMN_RUN >= 16 and ROW_RUNS * COLUMN_RUNS >= 16:
        sums = score_gradient.reshape(ROW_RUNS, ROW_RUN, COLUMN_RUNS, COLUMN_RUN)
        sums = sums.permute(0, 2, 1, 3).reshape(ROW_RUNS * COLUMN_RUNS, ROW_RUN * COLUMN_RUN)
        diagonal = tl.arange(0, 16)
        pair = tl.arange(0, ROW_RUN * COLUMN_RUN)
        distance = pair % COLUMN_RUN - pair // COLUMN_RUN + (ROW_RUN - 1)
        ones = (distance[:, None] == diagonal[None, :]).to(score_gradient.dtype)
        sums = tl.dot(sums, ones, input_precision=PRECISION)
        run = tl.arange(0, ROW_RUNS * COLUMN_RUNS)
        row_place = unravel(run // COLUMN_RUNS * ROW_RUN, ROW_TILE)
        column_place = unravel(run % COLUMN_RUNS * COLUMN_RUN, COLUMN_TILE)
    else:
        sums = score_gradient.to(tl.float32)
        row_place = unravel(tl.arange(0, ROW_RUNS * ROW_RUN), ROW_TILE)
        column_place = unravel(tl.arange(0, COLUMN_RUNS * COLUMN_RUN), COLUMN_TILE)
    position = (
        row_corner[0] + row_place[0], row_corner[1] + row_place[1], row_corner[2] + row_place[2],
    )  # fmt: skip
    row, column, _size = bias_slot(
        corner, column_place, position, first, kernels, paddings, False, RANK
    )
    if ROW_RUN * COLUMN_RUN >= 16 and ROW_RUNS * COLUMN_RUNS >= 16:
        target += (row + column - (ROW_RUN - 1))[:, None] + diagonal[None, :]
        # Zeros are the sums of pairs out of sight, most of them.
        needed = (sums != 0.0) & (diagonal < ROW_RUN + COLUMN_RUN - 1)[None, :]
    else:
        target += row[:, None] + column[None, :]
        needed = sums != 0.0
    if factor is None:
        tl.atomic_add(target, sums, mask=needed, sem="relaxed")
    else:
        tl.atomic_add(target, (sums * tl.load(factor)).to(tl.int64), mask=needed, sem="relaxed")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    query, key, value, out_gradient, statistics, query_gradient, bias,
    additional_key, additional_value, cumulative_query, cumulative_key, additional_counts,
    out, lse, lse_gradient, bias_gradient, factor,
    query_strides, key_strides, value_strides, out_gradient_strides, statistic_strides,
    lse_strides, query_gradient_strides, additional_key_strides, additional_value_strides,
    bias_paddings, lengths, kernels, strides, dilations,
    query_origins, query_extents, key_origins, key_extents,
    tiles, programs, heads, num_additional, bias_copies, scale, gradient_scale,
    HEADS_PER_KV: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_ADDITIONAL: tl.constexpr, NEGATE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    COLUMNS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    at, rows, box, grid = row_tile(
        tl.program_id(0), tl.arange(0, ROWS), cumulative_query, cumulative_key,
        lengths, kernels, strides, dilations,
        query_origins, query_extents, key_origins, key_extents, tiles, heads,
        QUERY_TILE, KEY_TILE, CAUSAL, False, RANK, VARLEN,
    )  # fmt: skip
    head, batch, memory_batch = at
    memory, exists, position, begin, width, row_corner = rows
    first, column_memory, extent, column_first = grid
    kv_head = head // HEADS_PER_KV
    place = unravel(tl.arange(0, COLUMNS), KEY_TILE)

    offset, all_exist = row_offsets(memory, exists, query_strides, UNIT, RANK)
    query_rows = load_rows(
        query + head_offset(memory_batch, head, query_strides, UNIT),
        offset, all_exist, FEATURES, BLOCK,
    )  # fmt: skip
    gradient_offset, all_exist = row_offsets(memory, exists, out_gradient_strides, UNIT, RANK)
    gradient_rows = load_rows(
        out_gradient + head_offset(memory_batch, head, out_gradient_strides, UNIT),
        gradient_offset, all_exist, VALUE_FEATURES, VALUE_BLOCK,
    )  # fmt: skip
    offset, all_exist = row_offsets(memory, exists, statistic_strides, 1, RANK)
    offset += head_offset(memory_batch, head, statistic_strides, 1)
    if out is None:
        row_lse = tl.load(statistics + 2 * offset, mask=all_exist, other=0.0)
        row_delta = tl.load(statistics + 2 * offset + 1, mask=all_exist, other=0.0)
    else:
        # The rows are here already: compute what the kernel for key and value reads later. Output
        # and gradient are both contiguous.
        out_rows = load_rows(
            out + head_offset(memory_batch, head, out_gradient_strides, UNIT),
            gradient_offset, all_exist, VALUE_FEATURES, VALUE_BLOCK,
        )  # fmt: skip
        row_delta = tl.sum(out_rows.to(tl.float32) * gradient_rows.to(tl.float32), 1)
        lse_offset, all_exist = row_offsets(memory, exists, lse_strides, 1, RANK)
        lse_offset += head_offset(memory_batch, head, lse_strides, 1)
        if lse_gradient is not None:
            row_delta -= tl.load(lse_gradient + lse_offset, mask=all_exist, other=0.0)
        row_lse = base2_lse(lse + lse_offset, all_exist)
        tl.store(statistics + 2 * offset, row_lse, mask=all_exist)
        tl.store(statistics + 2 * offset + 1, row_delta, mask=all_exist)
    key_source, key_steps = column_source(
        key, memory_batch, kv_head, column_memory, key_strides, dilations, UNIT, RANK, TMA,
    )  # fmt: skip
    value_source, value_steps = column_source(
        value, memory_batch, kv_head, column_memory, value_strides, dilations, UNIT, RANK, TMA,
    )  # fmt: skip

    if bias_gradient is not None:
        # Additions to few addresses wait for each other: programs take turns on copies.
        copy = tl.program_id(0) % bias_copies
        bias_target = bias_gradient + (copy * heads + head).to(tl.int64) * table_size(
            kernels, bias_paddings
        )
    accumulator = tl.zeros([ROWS, BLOCK], tl.float32)
    for t in tl.range(0, column_steps(box), num_stages=STAGES):
        corner, whole = column_tile(t, box, KEY_TILE, RANK)
        key_columns = load_columns(
            key_source, memory_batch, kv_head, corner, column_first, extent, key_steps, place,
            FEATURES, BLOCK, COLUMNS, RANK, TMA, WIDE,
        )  # fmt: skip
        value_columns = load_columns(
            value_source, memory_batch, kv_head, corner, column_first, extent, value_steps,
            place, VALUE_FEATURES, VALUE_BLOCK, COLUMNS, RANK, TMA, WIDE,
        )  # fmt: skip
        scores = tile_scores(
            query_rows, key_columns, corner, whole, place, begin, width, position, first, kernels,
            bias, bias_paddings, head, MASK, False, HAS_RPB, NEGATE, RANK, PRECISION,
        )  # fmt: skip
        accumulator, score_gradient = query_gradient_step(
            scores, row_lse, row_delta, gradient_rows, key_columns, value_columns, accumulator,
            scale, PRECISION,
        )  # fmt: skip
        if bias_gradient is not None:
            add_bias_gradient(
                score_gradient, bias_target, factor, corner, row_corner, first, kernels,
                bias_paddings, QUERY_TILE, KEY_TILE, RANK, PRECISION,
            )  # fmt: skip
    if HAS_ADDITIONAL:
        keys = additional_key + head_offset(batch, kv_head, additional_key_strides, UNIT)
        values = additional_value + head_offset(batch, kv_head, additional_value_strides, UNIT)
        count = additional_count(additional_counts, batch, num_additional)
        for t in tl.range(0, ceil_div(count, COLUMNS), num_stages=STAGES):
            key_columns, value_columns, present = additional_tile(
                t, count, keys, values, additional_key_strides, additional_value_strides,
                FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK, COLUMNS, UNIT,
            )  # fmt: skip
            scores = tl.dot(query_rows, key_columns.T, input_precision=PRECISION)
            if NEGATE:
                scores = -scores
            scores = tl.where(present[None, :], scores, float("-inf"))
            accumulator, _score_gradient = query_gradient_step(
                scores, row_lse, row_delta, gradient_rows, key_columns, value_columns, accumulator,
                scale, PRECISION,
            )  # fmt: skip
    offset, all_exist = row_offsets(memory, exists, query_gradient_strides, UNIT, RANK)
    store_rows(
        query_gradient + head_offset(memory_batch, head, query_gradient_strides, UNIT),
        accumulator * gradient_scale, offset, all_exist, FEATURES, BLOCK,
    )  # fmt: skip


@triton.jit
def key_value_gradient_tile(
    program, split,
    query, key, value, out_gradient, statistics,
    key_gradient, value_gradient, bias, cumulative_query, cumulative_key, row_counts,
    query_strides, key_strides, value_strides, out_gradient_strides, statistic_strides,
    key_gradient_strides, value_gradient_strides,
    bias_paddings, lengths, kernels, strides, dilations,
    query_origins, query_extents, key_origins, key_extents,
    tiles, heads, splits, split_size, value_split_size, scale, gradient_scale,
    HEADS_PER_KV: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_RPB: tl.constexpr, NEGATE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    COLUMNS: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    at, rows, box, grid = row_tile(
        program, tl.arange(0, ROWS), cumulative_key, cumulative_query,
        lengths, kernels, strides, dilations,
        key_origins, key_extents, query_origins, query_extents, tiles, heads,
        KEY_TILE, QUERY_TILE, CAUSAL, True, RANK, VARLEN,
    )  # fmt: skip
    kv_head, batch, memory_batch = at
    memory, exists, position, begin, width, corner = rows
    first, column_memory, extent, column_first = grid
    place = unravel(tl.arange(0, COLUMNS), QUERY_TILE)
    steps = column_steps(box)
    present = exists
    if row_counts is not None:
        # Rows are additional keys, of which this batch entry has so many.
        count = additional_count(row_counts, batch, revealed(key_extents)[2])
        present = (exists[0], exists[1], exists[2] & (position[2] < count))
        steps = tl.where(corner[2] < count, steps, 0)

    offset, all_exist = row_offsets(memory, present, key_strides, UNIT, RANK)
    key_rows = load_rows(
        key + head_offset(memory_batch, kv_head, key_strides, UNIT),
        offset, all_exist, FEATURES, BLOCK,
    )  # fmt: skip
    offset, all_exist = row_offsets(memory, present, value_strides, UNIT, RANK)
    value_rows = load_rows(
        value + head_offset(memory_batch, kv_head, value_strides, UNIT),
        offset, all_exist, VALUE_FEATURES, VALUE_BLOCK,
    )  # fmt: skip
    key_accumulator = tl.zeros([ROWS, BLOCK], tl.float32)
    value_accumulator = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)

    for member in tl.range(0, HEADS_PER_KV, num_stages=1):
        head = kv_head * HEADS_PER_KV + member
        query_source, query_steps = column_source(
            query, memory_batch, head, column_memory, query_strides, dilations, UNIT, RANK, TMA,
        )  # fmt: skip
        gradient_source, gradient_steps = column_source(
            out_gradient, memory_batch, head, column_memory, out_gradient_strides, dilations,
            UNIT, RANK, TMA,
        )  # fmt: skip
        start, statistic_steps = column_source(
            0, memory_batch, head, column_memory, statistic_strides, dilations, 1, RANK, False,
        )  # fmt: skip
        for t in tl.range(
            steps * split // splits, steps * (split + 1) // splits, num_stages=STAGES
        ):
            column_corner, whole = column_tile(t, box, QUERY_TILE, RANK)
            query_columns = load_columns(
                query_source, memory_batch, head, column_corner, column_first, extent, query_steps,
                place, FEATURES, BLOCK, COLUMNS, RANK, TMA, WIDE,
            )  # fmt: skip
            gradient_columns = load_columns(
                gradient_source, memory_batch, head, column_corner, column_first, extent,
                gradient_steps, place, VALUE_FEATURES, VALUE_BLOCK, COLUMNS, RANK, TMA, WIDE,
            )  # fmt: skip
            column_lse, column_delta = load_statistics(
                statistics + 2 * start, column_corner, place, extent, statistic_steps, dilations[2],
                MASK, RANK,
            )  # fmt: skip
            scores = tile_scores(
                key_rows, query_columns, column_corner, whole, place, begin, width, position, first,
                kernels, bias, bias_paddings, head, MASK, True, HAS_RPB, NEGATE, RANK, PRECISION,
            )  # fmt: skip
            weights = tl.math.exp2(scores * scale - column_lse[None, :])
            value_accumulator = tl.dot(
                weights.to(gradient_columns.dtype), gradient_columns, value_accumulator,
                input_precision=PRECISION,
            )  # fmt: skip
            weight_gradient = tl.dot(value_rows, gradient_columns.T, input_precision=PRECISION)
            score_gradient = weights * (weight_gradient - column_delta[None, :])
            score_gradient = score_gradient.to(query_columns.dtype)
            key_accumulator = tl.dot(
                score_gradient, query_columns, key_accumulator, input_precision=PRECISION
            )

    if row_counts is not None:
        # Their scores were not masked.
        key_accumulator = tl.where(present[2][:, None], key_accumulator, 0.0)
        value_accumulator = tl.where(present[2][:, None], value_accumulator, 0.0)
    offset, all_exist = row_offsets(memory, exists, key_gradient_strides, UNIT, RANK)
    start = head_offset(memory_batch, kv_head, key_gradient_strides, UNIT)
    start += split * (split_size * UNIT)
    store_rows(
        key_gradient + start, key_accumulator * gradient_scale, offset, all_exist, FEATURES, BLOCK
    )
    offset, all_exist = row_offsets(memory, exists, value_gradient_strides, UNIT, RANK)
    start = head_offset(memory_batch, kv_head, value_gradient_strides, UNIT)
    start += split * (value_split_size * UNIT)
    store_rows(
        value_gradient + start, value_accumulator, offset, all_exist, VALUE_FEATURES, VALUE_BLOCK
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def key_value_gradient_kernel(
    query, key, value, out_gradient, statistics,
    key_gradient, value_gradient, bias, cumulative_query, cumulative_key, row_counts,
    query_strides, key_strides, value_strides, out_gradient_strides, statistic_strides,
    key_gradient_strides, value_gradient_strides,
    bias_paddings, lengths, kernels, strides, dilations,
    query_origins, query_extents, key_origins, key_extents,
    tiles, programs, heads, splits, split_size, value_split_size, scale, gradient_scale,
    HEADS_PER_KV: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, VARLEN: tl.constexpr,
    HAS_RPB: tl.constexpr, NEGATE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """`LOOP`: fewer programs than tiles, each takes several (the `backward_kv_splits` knob)."""
    if LOOP:
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0)):
            key_value_gradient_tile(
                program // splits, program % splits,
                query, key, value, out_gradient, statistics,
                key_gradient, value_gradient, bias, cumulative_query,
                cumulative_key, row_counts, query_strides, key_strides, value_strides,
                out_gradient_strides, statistic_strides, key_gradient_strides,
                value_gradient_strides, bias_paddings, lengths, kernels, strides, dilations,
                query_origins,
                query_extents, key_origins, key_extents,
                tiles, heads, splits, split_size, value_split_size, scale, gradient_scale,
                HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK,
                RANK, CAUSAL, TMA, UNIT, WIDE, VARLEN, HAS_RPB, NEGATE, MASK,
                STAGES, PRECISION,
            )  # fmt: skip
    else:
        key_value_gradient_tile(
            tl.program_id(0) // splits, tl.program_id(0) % splits,
            query, key, value, out_gradient, statistics,
            key_gradient, value_gradient, bias, cumulative_query,
            cumulative_key, row_counts, query_strides, key_strides, value_strides,
            out_gradient_strides, statistic_strides, key_gradient_strides,
            value_gradient_strides, bias_paddings, lengths, kernels, strides, dilations,
            query_origins,
            query_extents, key_origins, key_extents,
            tiles, heads, splits, split_size, value_split_size, scale, gradient_scale,
            HEADS_PER_KV, QUERY_TILE, KEY_TILE, FEATURES, VALUE_FEATURES, BLOCK, VALUE_BLOCK,
            RANK, CAUSAL, TMA, UNIT, WIDE, VARLEN, HAS_RPB, NEGATE, MASK,
            STAGES, PRECISION,
        )  # fmt: skip
