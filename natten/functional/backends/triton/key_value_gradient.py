"""The kernel for the gradients of key and value.

A tile of keys visits the queries that see it (inverse windows are boxes too) and sums dV = P^T dO
and dK = dS^T Q, with the names of `query_gradient.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from natten.functional.backends.triton import arguments
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import (
    add_products,
    additional_count,
    any_of,
    column_source,
    column_steps,
    decode,
    head_offset,
    kept,
    load_columns,
    load_parts,
    multiply,
    placed_tile,
    row_offsets,
    row_tile,
    scaled,
    sized,
    store_parts,
    tile_scores,
    unravel,
    valid_rows,
    zero_sums,
)
from natten.functional.backends.triton.splits import share
from natten.functional.backends.triton.tiles import KEY_VALUE_GRADIENT, Tiling
from natten.functional.problem import Problem


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`."""

    query: Any
    key: Any
    value: Any
    out_gradient: Any
    statistics: Any
    key_gradient: Any
    value_gradient: Any
    key_mask: Any


class Data(NamedTuple):
    """Tensors but query, key, value and the output's gradient, `arguments.cap`, strides of all
    tensors, and windows. None for what there is not.

    `statistics` are logsumexp and delta of each query. Rows, which are additional keys then, exist
    as far as `row_counts` says.
    """

    statistics: Any
    key_gradient: Any
    value_gradient: Any
    bias: Any
    cumulative_query: Any
    cumulative_key: Any
    grids: Any
    row_counts: Any
    key_mask: Any
    cap: Any
    strides: Any
    window: Any


@triton.jit
def first_of(equal):
    """One of equal numbers in each row."""
    if equal.shape[1] == 1:
        return equal.reshape(equal.shape[0])
    else:
        some, _others = tl.split(equal.reshape(equal.shape[0], equal.shape[1] // 2, 2))
        return first_of(some)


@triton.jit
def load_statistics(pointer, corner, place, extent, steps, dilation, V: tl.constexpr):
    """lse and delta of a tile of query columns, contiguous along the last axis but for dilation.

    Loaded together, and several times where they are few: of a load with fewer elements than
    threads, every thread would load all that it needs itself, sixteen of each where the columns are
    those of a matrix product.
    """
    COLUMNS: tl.constexpr = V.QUERIES
    TIMES: tl.constexpr = 1 if V.THREADS <= 2 * COLUMNS else V.THREADS // (2 * COLUMNS)
    start = sized(corner[2], V.WIDE) * dilation
    offset = place[2] * dilation
    exists = place[2] < extent[2] - corner[2]
    if V.RANK >= 2:
        start += corner[1] * steps[1]
        offset += place[1] * steps[1]
        exists = exists & (place[1] < extent[1] - corner[1])
    if V.RANK == 3:
        start += corner[0] * steps[0]
        offset += place[0] * steps[0]
        exists = exists & (place[0] < extent[0] - corner[0])
    source = pointer + (2 * (start + offset)[:, None] + tl.arange(0, 2 * TIMES)[None, :] % 2)
    if V.MASK == "never":
        pairs = tl.load(source)
    else:
        pairs = tl.load(source, mask=exists[:, None], other=0.0)
    lse, delta = tl.split(pairs.reshape(COLUMNS, TIMES, 2))
    return first_of(lse), first_of(delta)


@triton.jit
def key_value_gradient_tile(
    program, query, key, value, out_gradient, data,
    heads, splits, split_size, value_split_size, scales, V: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = V.KEYS
    COLUMNS: tl.constexpr = V.QUERIES
    QUERY_TILE: tl.constexpr = V.QUERY_TILE
    PARTS: tl.constexpr = V.PARTS
    VALUE_PARTS: tl.constexpr = V.VALUE_PARTS
    PRECISION: tl.constexpr = V.PRECISION
    strides, window = data.strides, data.window
    if splits is not None:
        split = program % splits
        program = program // splits
    at, rows, box, grid = row_tile(program, tl.arange(0, ROWS), data, heads, True, V)
    memory_batch, kv_head = at.memory_batch, at.head
    place = unravel(tl.arange(0, COLUMNS), QUERY_TILE)
    steps = column_steps(box)
    present = rows.exists
    if data.row_counts is not None:
        # Rows are additional keys, of which this batch entry has so many.
        count = additional_count(data.row_counts, at.batch, decode(window.key_extents)[2])
        exists = rows.exists
        present = (exists[0], exists[1], exists[2] & (rows.position[2] < count))
        steps = tl.where(rows.corner[2] < count, steps, 0)
    if data.key_mask is not None:
        valid = valid_rows(data.key_mask, at, rows, strides.key_mask, V)
        exists = rows.exists
        present = (exists[0], exists[1], exists[2] & valid)
        steps = tl.where(any_of(valid), steps, 0)

    offset, all_exist = row_offsets(rows.memory, present, strides.key, V.UNIT, V.WIDE, V.RANK)
    key_rows = load_parts(
        key + head_offset(memory_batch, kv_head, strides.key, V.UNIT, V.WIDE),
        offset, all_exist, V.FEATURES, PARTS,
    )  # fmt: skip
    offset, all_exist = row_offsets(rows.memory, present, strides.value, V.UNIT, V.WIDE, V.RANK)
    value_rows = load_parts(
        value + head_offset(memory_batch, kv_head, strides.value, V.UNIT, V.WIDE),
        offset, all_exist, V.VALUE_FEATURES, VALUE_PARTS,
    )  # fmt: skip
    key_accumulator = zero_sums(ROWS, PARTS)
    value_accumulator = zero_sums(ROWS, VALUE_PARTS)

    for member in tl.range(0, V.HEADS_PER_KV, num_stages=1):
        head = kv_head * V.HEADS_PER_KV + member
        query_source = column_source(
            query, memory_batch, head, grid, strides.query, V.UNIT, V.WIDE, V.RANK, V.TMA
        )
        gradient_source = column_source(
            out_gradient, memory_batch, head, grid, strides.out_gradient, V.UNIT, V.WIDE, V.RANK,
            V.TMA,
        )  # fmt: skip
        statistics = column_source(
            0, memory_batch, head, grid, strides.statistics, 1, V.WIDE, V.RANK, False
        )
        first, last = 0, steps
        if splits is not None:
            first, last = share(steps, split, splits)
        for t in tl.range(first, last, num_stages=V.STAGES):
            tile = placed_tile(t, box, grid, QUERY_TILE, V)
            query_columns = load_columns(
                query_source, tile[0], grid, place, V.FEATURES, PARTS, COLUMNS, V
            )
            gradient_columns = load_columns(
                gradient_source, tile[0], grid, place, V.VALUE_FEATURES, VALUE_PARTS, COLUMNS, V
            )
            column_lse, column_delta = load_statistics(
                data.statistics + 2 * statistics.data, tile[0], place, grid.extent,
                statistics.steps, grid.dilation[2], V,
            )  # fmt: skip
            scores, slopes = tile_scores(
                key_rows, query_columns, tile, place, rows, grid, data.bias, window, head, data.cap,
                True, V,
            )  # fmt: skip
            weights = tl.math.exp2(scores * scales.scores - column_lse[None, :])
            value_accumulator = add_products(
                weights.to(gradient_columns[0].dtype), gradient_columns, value_accumulator,
                PRECISION,
            )  # fmt: skip
            weight_gradient = multiply(value_rows, gradient_columns, None, PRECISION)
            score_gradient = weights * (weight_gradient - column_delta[None, :])
            if data.cap is not None:
                score_gradient *= slopes
            key_accumulator = add_products(
                score_gradient.to(query_columns[0].dtype), query_columns, key_accumulator,
                PRECISION,
            )  # fmt: skip

    if data.row_counts is not None or data.key_mask is not None:
        # Their scores were not masked.
        key_accumulator = kept(key_accumulator, present[2])
        value_accumulator = kept(value_accumulator, present[2])
    offset, all_exist = row_offsets(
        rows.memory, rows.exists, strides.key_gradient, V.UNIT, V.WIDE, V.RANK
    )
    start = head_offset(memory_batch, kv_head, strides.key_gradient, V.UNIT, V.WIDE)
    if splits is not None:
        start += split.to(tl.int64) * split_size * V.UNIT
    store_parts(
        data.key_gradient + start, scaled(key_accumulator, scales.gradients), offset, all_exist,
        V.FEATURES, PARTS,
    )  # fmt: skip
    offset, all_exist = row_offsets(
        rows.memory, rows.exists, strides.value_gradient, V.UNIT, V.WIDE, V.RANK
    )  # fmt: skip
    start = head_offset(memory_batch, kv_head, strides.value_gradient, V.UNIT, V.WIDE)
    if splits is not None:
        start += split.to(tl.int64) * value_split_size * V.UNIT
    store_parts(
        data.value_gradient + start, value_accumulator, offset, all_exist, V.VALUE_FEATURES,
        VALUE_PARTS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["programs", "heads", "splits", "split_size", "value_split_size"]
)  # fmt: skip
def key_value_gradient_kernel(
    query, key, value, out_gradient, data,
    programs, heads, splits, split_size, value_split_size, scales, V: tl.constexpr,
):  # fmt: skip
    """Query and the output's gradient are descriptors of query tiles if `V.TMA`, else pointers.

    `splits` programs share the queries of a tile of keys, and each writes sums of its own; None for
    one.
    """
    if V.PERSISTENT:
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0)):
            key_value_gradient_tile(
                program, query, key, value, out_gradient, data,
                heads, splits, split_size, value_split_size, scales, V,
            )  # fmt: skip
    else:
        key_value_gradient_tile(
            tl.program_id(0), query, key, value, out_gradient, data,
            heads, splits, split_size, value_split_size, scales, V,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def key_value_gradient_launch(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    precision: str,
    strides: tuple[tuple[int, ...], ...],
    gradients: tuple[tuple[int, ...], ...],
    key_mask: tuple[int, ...] | None,
    paddings: tuple[int, ...],
    splits: int,
    persistent_programs: int,
) -> Launch:
    """The launch on query, key, value, the output's gradient and the members of `Data`.

    ``strides`` are those of query, key, value and the output's gradient, ``gradients`` those of
    what is computed, without the axis of ``splits``, ``key_mask`` those of the mask of keys,
    `arguments.mask_strides`. ``persistent_programs`` for each head take turns on its key tiles,
    unless 0.
    """
    limit = persistent_programs * problem.heads_kv * sequences
    common = arguments.common(
        problem, tiling, sequences, precision, strides, *gradients, inverse=True,
        bias_paddings=paddings,
    )  # fmt: skip
    programs = common.tiles * splits
    launched = min(programs, limit) if persistent_programs else programs
    query, key, value, out_gradient = strides
    key_gradient, value_gradient = gradients
    steps = Strides(
        query=common.steps(query),
        key=common.steps(key),
        value=common.steps(value),
        out_gradient=common.steps(out_gradient),
        statistics=common.statistics(problem, False),
        key_gradient=common.steps(key_gradient),
        value_gradient=common.steps(value_gradient),
        key_mask=common.mask(key_mask),
    )
    variant = replace(common.variant, PERSISTENT=launched < programs)
    rows = problem.batch * problem.num_keys * problem.heads_kv
    split_sizes = [
        rows * features // variant.UNIT for features in (problem.head_dim, problem.head_dim_v)
    ]
    return Launch(
        key_value_gradient_kernel,
        launched,
        (
            programs, common.heads, splits if splits > 1 else None, *split_sizes, common.scales,
            variant,
        ),
        group=Data,
        alone=4,
        grouped=(arguments.cap(problem), steps, common.window),
        options=common.options,
        tiles=(tiling, KEY_VALUE_GRADIENT),
    )  # fmt: skip
