"""The kernel for the gradients of the query and of the bias, or for all gradients.

With P the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE, the gradient of the scores is
dS = P * (dP - delta). A tile of queries visits its keys and sums dQ = dS K, and the gradient of the
bias, dS over the pairs at the same distance.

Where one tile holds all queries of a head, dK = dS^T Q and dV = P^T dO are whole at each visit:
then nothing is left for another kernel to do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from natten.functional.backends.triton import arguments
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import (
    add_products,
    additional_scores,
    additional_source,
    additional_tile,
    any_of,
    base2_lse,
    bias_slot,
    ceil_div,
    column_offsets,
    column_source,
    column_steps,
    decode,
    head_offset,
    load_columns,
    load_parts,
    mask_source,
    multiply,
    placed_tile,
    row_offsets,
    row_products,
    row_tile,
    scaled,
    store_parts,
    table_size,
    tile_scores,
    unravel,
    valid_columns,
    zero_sums,
)
from natten.functional.backends.triton.splits import share, shares
from natten.functional.backends.triton.tiles import QUERY_GRADIENT, SINGLE, Tiling
from natten.functional.problem import Problem

# Registers of a thread where the bias gradient is summed: three programs on a multiprocessor
# instead of two.
_BIAS_REGISTERS = 168


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`."""

    query: Any
    key: Any
    value: Any
    out_gradient: Any
    statistics: Any
    lse: Any
    query_gradient: Any
    additional_key: Any
    additional_value: Any
    key_mask: Any
    key_gradient: Any
    value_gradient: Any


class Data(NamedTuple):
    """Tensors but query, key and value, `arguments.cap`, strides of all tensors, and windows. None
    for what there is not.

    With `out`, logsumexp and delta are computed, and written to `statistics` if that is not None,
    else read from there.
    The gradient of the bias is added to `bias_gradient`, with `factor` in integers, multiples of
    1 / factor.
    """

    out_gradient: Any
    statistics: Any
    query_gradient: Any
    bias: Any
    additional_key: Any
    additional_value: Any
    cumulative_query: Any
    cumulative_key: Any
    grids: Any
    additional_counts: Any
    out: Any
    lse: Any
    lse_gradient: Any
    bias_gradient: Any
    factor: Any
    key_mask: Any
    key_gradient: Any
    value_gradient: Any
    cap: Any
    splits: Any
    strides: Any
    window: Any


@triton.jit
def query_gradient_step(
    scores, row_lse, row_delta, gradient_rows, key_columns, value_columns, accumulator, scale,
    IS_CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile's scores and of its products, the latter's product with the keys
    added to a sum, and the weights. `scores` come with their derivatives, which count if
    `IS_CAPPED`."""
    scores, slopes = scores
    weights = tl.math.exp2(scores * scale - row_lse[:, None])
    weight_gradient = multiply(gradient_rows, value_columns, None, PRECISION)
    score_gradient = weights * (weight_gradient - row_delta[:, None])
    if IS_CAPPED:
        product_gradient = (score_gradient * slopes).to(key_columns[0].dtype)
        accumulator = add_products(product_gradient, key_columns, accumulator, PRECISION)
        return accumulator, score_gradient.to(key_columns[0].dtype), product_gradient, weights
    else:
        score_gradient = score_gradient.to(key_columns[0].dtype)
        accumulator = add_products(score_gradient, key_columns, accumulator, PRECISION)
        return accumulator, score_gradient, score_gradient, weights


@triton.jit
def add_bias_gradient(
    score_gradient, target, factor, corner, row_corner, first, window, V: tl.constexpr
):  # fmt: skip
    """Adds the scores' gradient of one tile to one head's table, atomically.

    A bias belongs to a diagonal of the tile. Runs of up to eight rows and columns along the last
    axis share their diagonals' sums, which a product with zeros and ones finds, so that two to four
    times fewer numbers are added to memory, to different places. With `factor` these are integers,
    multiples of 1 / factor: then the order of the additions does not matter.
    """
    ROW_TILE: tl.constexpr = V.QUERY_TILE
    COLUMN_TILE: tl.constexpr = V.KEY_TILE
    ROW_RUN: tl.constexpr = 8 if ROW_TILE[2] >= 8 else ROW_TILE[2]
    COLUMN_RUN: tl.constexpr = 8 if COLUMN_TILE[2] >= 8 else COLUMN_TILE[2]
    ROW_RUNS: tl.constexpr = V.QUERIES // ROW_RUN
    COLUMN_RUNS: tl.constexpr = V.KEYS // COLUMN_RUN
    if ROW_RUN * COLUMN_RUN >= 16 and ROW_RUNS * COLUMN_RUNS >= 16:
        sums = score_gradient.reshape(ROW_RUNS, ROW_RUN, COLUMN_RUNS, COLUMN_RUN)
        sums = sums.permute(0, 2, 1, 3).reshape(ROW_RUNS * COLUMN_RUNS, ROW_RUN * COLUMN_RUN)
        diagonal = tl.arange(0, 16)
        pair = tl.arange(0, ROW_RUN * COLUMN_RUN)
        distance = pair % COLUMN_RUN - pair // COLUMN_RUN + (ROW_RUN - 1)
        ones = (distance[:, None] == diagonal[None, :]).to(score_gradient.dtype)
        sums = tl.dot(sums, ones, input_precision=V.PRECISION)
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
    row, column, _size = bias_slot(corner, column_place, position, first, window, False, V.RANK)
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


@triton.jit
def store_column_gradient(
    target, corner, columns, place, weights, rows, scale,
    FEATURES: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the column tile at `corner`: the sum of all rows that there are."""
    offset, exists = column_offsets(target, corner, columns, place, V.WIDE, V.RANK)
    COLUMNS: tl.constexpr = V.KEYS
    PRECISION: tl.constexpr = V.PRECISION
    gradient = add_products(weights.T, rows, zero_sums(COLUMNS, PARTS), PRECISION)
    store_parts(target.data, scaled(gradient, scale), offset, exists, FEATURES, PARTS)


@triton.jit(do_not_specialize=["heads", "num_additional", "bias_copies"])
def query_gradient_kernel(
    query, key, value, data, heads, num_additional, bias_copies, scales, V: tl.constexpr
):  # fmt: skip
    """Key and value are descriptors of key tiles if `V.TMA`, else pointers."""
    ROWS: tl.constexpr = V.QUERIES
    COLUMNS: tl.constexpr = V.KEYS
    KEY_TILE: tl.constexpr = V.KEY_TILE
    PARTS: tl.constexpr = V.PARTS
    VALUE_PARTS: tl.constexpr = V.VALUE_PARTS
    PRECISION: tl.constexpr = V.PRECISION
    strides, window = data.strides, data.window
    program = tl.program_id(0)
    if data.splits is not None:
        splits, entries, _none = decode(data.splits)
        split = program % splits
        program = program // splits
    at, rows, box, grid = row_tile(program, tl.arange(0, ROWS), data, heads, False, V)
    memory_batch, head = at.memory_batch, at.head
    kv_head = head // V.HEADS_PER_KV
    place = unravel(tl.arange(0, COLUMNS), KEY_TILE)

    offset, all_exist = row_offsets(rows.memory, rows.exists, strides.query, V.UNIT, V.WIDE, V.RANK)
    query_rows = load_parts(
        query + head_offset(memory_batch, head, strides.query, V.UNIT, V.WIDE),
        offset, all_exist, V.FEATURES, PARTS,
    )  # fmt: skip
    gradient_offset, all_exist = row_offsets(
        rows.memory, rows.exists, strides.out_gradient, V.UNIT, V.WIDE, V.RANK
    )
    gradient_rows = load_parts(
        data.out_gradient + head_offset(memory_batch, head, strides.out_gradient, V.UNIT, V.WIDE),
        gradient_offset, all_exist, V.VALUE_FEATURES, VALUE_PARTS,
    )  # fmt: skip
    offset, all_exist = row_offsets(rows.memory, rows.exists, strides.statistics, 1, V.WIDE, V.RANK)
    offset += head_offset(memory_batch, head, strides.statistics, 1, V.WIDE)
    statistics = data.statistics
    if data.out is None:
        row_lse = tl.load(statistics + 2 * offset, mask=all_exist, other=0.0)
        row_delta = tl.load(statistics + 2 * offset + 1, mask=all_exist, other=0.0)
    else:
        # The rows are here already: compute what the kernel for key and value reads later. Output
        # and gradient have the same strides.
        out_rows = load_parts(
            data.out + head_offset(memory_batch, head, strides.out_gradient, V.UNIT, V.WIDE),
            gradient_offset, all_exist, V.VALUE_FEATURES, VALUE_PARTS,
        )  # fmt: skip
        row_delta = row_products(out_rows, gradient_rows)
        lse_offset, all_exist = row_offsets(
            rows.memory, rows.exists, strides.lse, 1, V.WIDE, V.RANK
        )
        lse_offset += head_offset(memory_batch, head, strides.lse, 1, V.WIDE)
        if data.lse_gradient is not None:
            row_delta -= tl.load(data.lse_gradient + lse_offset, mask=all_exist, other=0.0)
        row_lse = base2_lse(data.lse + lse_offset, all_exist)
        if statistics is not None:
            tl.store(statistics + 2 * offset, row_lse, mask=all_exist)
            tl.store(statistics + 2 * offset + 1, row_delta, mask=all_exist)
    key_source = column_source(
        key, memory_batch, kv_head, grid, strides.key, V.UNIT, V.WIDE, V.RANK, V.TMA
    )
    value_source = column_source(
        value, memory_batch, kv_head, grid, strides.value, V.UNIT, V.WIDE, V.RANK, V.TMA
    )

    if data.key_gradient is not None:
        key_target = column_source(
            data.key_gradient, memory_batch, kv_head, grid, strides.key_gradient, V.UNIT, V.WIDE,
            V.RANK, False,
        )  # fmt: skip
        value_target = column_source(
            data.value_gradient, memory_batch, kv_head, grid, strides.value_gradient, V.UNIT,
            V.WIDE, V.RANK, False,
        )  # fmt: skip

    if data.bias_gradient is not None:
        # Additions to few addresses wait for each other: programs take turns on copies.
        copy = tl.program_id(0) % bias_copies
        bias_target = data.bias_gradient + (copy * heads + head).to(tl.int64) * table_size(window)
    accumulator = zero_sums(ROWS, PARTS)
    steps = column_steps(box)
    if V.HAS_QUERY_MASK:
        # Rows that see nothing, see `backward.BackwardPass`.
        steps = tl.where(any_of(row_lse < float("inf")), steps, 0)
    if data.key_mask is not None:
        key_valid = mask_source(data.key_mask, at, grid, strides.key_mask, V)
    first, last = 0, steps
    if data.splits is not None:
        first, last = share(steps, split, splits)
    for t in tl.range(first, last, num_stages=V.STAGES):
        tile = placed_tile(t, box, grid, KEY_TILE, V)
        key_columns = load_columns(
            key_source, tile[0], grid, place, V.FEATURES, PARTS, COLUMNS, V
        )  # fmt: skip
        value_columns = load_columns(
            value_source, tile[0], grid, place, V.VALUE_FEATURES, VALUE_PARTS, COLUMNS, V
        )
        if data.key_mask is not None:
            seen = valid_columns(key_valid, tile[0], grid, place, V)
        # Additions to memory that some tiles skip came out wrong on an H100 (Triton 3.6).
        if data.key_mask is None or data.bias_gradient is not None:
            scores, slopes = tile_scores(
                query_rows, key_columns, tile, place, rows, grid, data.bias, window, head, data.cap,
                False, V,
            )  # fmt: skip
            if data.key_mask is not None:
                scores = tl.where(seen[None, :], scores, float("-inf"))
            accumulator, score_gradient, product_gradient, weights = query_gradient_step(
                (scores, slopes), row_lse, row_delta, gradient_rows, key_columns, value_columns,
                accumulator, scales.scores, data.cap is not None, PRECISION,
            )  # fmt: skip
            if data.bias_gradient is not None:
                add_bias_gradient(
                    score_gradient, bias_target, data.factor, tile[2], rows.corner, grid.first,
                    window, V,
                )  # fmt: skip
            if data.key_gradient is not None:
                store_column_gradient(
                    key_target, tile[0], grid, place, product_gradient, query_rows,
                    scales.gradients, V.FEATURES, PARTS, V,
                )  # fmt: skip
                store_column_gradient(
                    value_target, tile[0], grid, place, weights.to(gradient_rows[0].dtype),
                    gradient_rows, 1.0, V.VALUE_FEATURES, VALUE_PARTS, V,
                )  # fmt: skip
        elif any_of(seen):
            scores, slopes = tile_scores(
                query_rows, key_columns, tile, place, rows, grid, data.bias, window, head, data.cap,
                False, V,
            )  # fmt: skip
            scores = tl.where(seen[None, :], scores, float("-inf"))
            accumulator, _gradient, _product, _weights = query_gradient_step(
                (scores, slopes), row_lse, row_delta, gradient_rows, key_columns, value_columns,
                accumulator, scales.scores, data.cap is not None, PRECISION,
            )  # fmt: skip
    if V.HAS_ADDITIONAL:
        additional = additional_source(at.batch, kv_head, data, num_additional, V)
        first, last = 0, ceil_div(additional.number, COLUMNS)
        if data.splits is not None:
            first, last = share(last, split, splits)
        for t in tl.range(first, last, num_stages=V.STAGES):
            key_columns, value_columns, present = additional_tile(
                t, additional, strides, COLUMNS, V
            )  # fmt: skip
            scores = additional_scores(query_rows, key_columns, present, data.cap, V)
            accumulator, _gradient, _product, _weights = query_gradient_step(
                scores, row_lse, row_delta, gradient_rows, key_columns, value_columns, accumulator,
                scales.scores, data.cap is not None, PRECISION,
            )  # fmt: skip
    if data.splits is not None:
        memory_batch += split * entries
    offset, all_exist = row_offsets(
        rows.memory, rows.exists, strides.query_gradient, V.UNIT, V.WIDE, V.RANK
    )  # fmt: skip
    start = head_offset(memory_batch, head, strides.query_gradient, V.UNIT, V.WIDE)
    store_parts(
        data.query_gradient + start, scaled(accumulator, scales.gradients), offset, all_exist,
        V.FEATURES, PARTS,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def query_gradient_launch(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    precision: str,
    strides: tuple[tuple[int, ...], ...],
    additional: tuple[tuple[int, ...], ...],
    gradient: tuple[int, ...],
    key_mask: tuple[int, ...] | None,
    paddings: tuple[int, ...],
    bias_copies: int,
    others: tuple[tuple[int, ...], ...],
) -> Launch:
    """The launch on query, key, value and the members of `Data`.

    ``strides`` are those of query, key, value and the output's gradient, ``additional`` those of
    additional keys and values, ``gradient`` those of the query's gradient, ``key_mask`` those of
    the mask of keys, `arguments.mask_strides`. ``bias_copies`` says how many tables the bias's
    gradient is summed in, 0 if it is not. ``others`` are the strides of the gradients of key and
    value where these are computed too.
    """
    common = arguments.common(
        problem, tiling, sequences, precision, strides, *additional, gradient, *others,
        has_additional=bool(additional), bias_paddings=paddings,
    )  # fmt: skip
    key_gradient, value_gradient = map(common.steps, others) if others else (None, None)
    additional_key, additional_value = additional or (None, None)
    query, key, value, out_gradient = strides
    steps = Strides(
        query=common.steps(query),
        key=common.steps(key),
        value=common.steps(value),
        out_gradient=common.steps(out_gradient),
        statistics=common.statistics(problem, False),
        lse=common.statistics(problem, True),
        query_gradient=common.steps(gradient),
        additional_key=common.entry_steps(additional_key),
        additional_value=common.entry_steps(additional_value),
        key_mask=common.mask(key_mask),
        key_gradient=key_gradient,
        value_gradient=value_gradient,
    )
    options = common.options
    # AMD's compiler does not know the limit.
    if bias_copies and tiling.warps <= 4 and torch.version.hip is None:
        options = {**options, "maxnreg": _BIAS_REGISTERS}
    return Launch(
        query_gradient_kernel,
        common.tiles * tiling.splits,
        (common.heads, problem.num_additional, max(bias_copies, 1), common.scales, common.variant),
        group=Data,
        alone=3,
        grouped=(arguments.cap(problem), shares(problem, tiling), steps, common.window),
        options=options,
        tiles=(tiling, SINGLE if others else QUERY_GRADIENT),
    )  # fmt: skip
