"""Forward kernel: one softmax over the neighborhood and the additional tokens.

A program owns one tile of queries of one head and visits the key tiles that cover the union of
their windows, which start exactly where the union starts. Where there would be few programs,
several share these tiles, and `splits.py` joins what they find. Tiles in full sight of every query
need no mask (`MASK`); where there are few of them, asking for each costs more than it saves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten.functional.backend import Inputs
from natten.functional.backends.triton import arguments, launcher
from natten.functional.backends.triton.bias import bias_table
from natten.functional.backends.triton.grids import placed_table
from natten.functional.backends.triton.launcher import Launch, describable, descriptor, readable
from natten.functional.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    add_products,
    additional_scores,
    additional_source,
    additional_tile,
    any_of,
    ceil_div,
    column_source,
    column_steps,
    decode,
    divided,
    head_offset,
    kept,
    load_columns,
    load_parts,
    log2,
    mask_source,
    placed_tile,
    row_offsets,
    row_tile,
    scaled,
    store_parts,
    tile_scores,
    unravel,
    valid_columns,
    valid_rows,
    zero_sums,
)
from natten.functional.backends.triton.splits import merge, share, shares
from natten.functional.backends.triton.tiles import FORWARD, Tiling, bias_paddings
from natten.functional.problem import Problem


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`."""

    query: Any
    key: Any
    value: Any
    out: Any
    lse: Any
    additional_key: Any
    additional_value: Any
    key_mask: Any
    query_mask: Any


class Data(NamedTuple):
    """Tensors but query, key and value, `arguments.cap`, `splits.shares`, strides of all tensors,
    and windows. None for what there is not."""

    out: Any
    lse: Any
    bias: Any
    additional_key: Any
    additional_value: Any
    cumulative_query: Any
    cumulative_key: Any
    grids: Any
    additional_counts: Any
    sink: Any
    key_mask: Any
    query_mask: Any
    cap: Any
    splits: Any
    strides: Any
    window: Any


@triton.jit
def softmax_step(scores, columns, scale, accumulator, maximum, total, PRECISION: tl.constexpr):
    """One step of the running softmax, in base 2."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet has maximum -inf: keep -inf - -inf out of the exponent.
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores * scale - pivot[:, None])
    shrink = tl.math.exp2(maximum - pivot)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = scaled(accumulator, shrink[:, None])
    accumulator = add_products(weights.to(columns[0].dtype), columns, accumulator, PRECISION)
    return accumulator, new_maximum, total


@triton.jit
def forward_tile(program, query, key, value, data, heads, num_additional, scale, V: tl.constexpr):
    ROWS: tl.constexpr = V.QUERIES
    COLUMNS: tl.constexpr = V.KEYS
    KEY_TILE: tl.constexpr = V.KEY_TILE
    PARTS: tl.constexpr = V.PARTS
    VALUE_PARTS: tl.constexpr = V.VALUE_PARTS
    PRECISION: tl.constexpr = V.PRECISION
    strides = data.strides
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
    key_source = column_source(
        key, memory_batch, kv_head, grid, strides.key, V.UNIT, V.WIDE, V.RANK, V.TMA
    )
    value_source = column_source(
        value, memory_batch, kv_head, grid, strides.value, V.UNIT, V.WIDE, V.RANK, V.TMA
    )

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if data.sink is not None:
        # As if it had been seen already.
        sink = tl.load(data.sink + head).to(tl.float32) * LOG2_E
        if data.splits is not None:
            sink = tl.where(split == 0, sink, float("-inf"))
        maximum = tl.where(maximum == float("-inf"), sink, maximum)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    accumulator = zero_sums(ROWS, VALUE_PARTS)
    steps = column_steps(box)
    if data.query_mask is not None:
        valid = valid_rows(data.query_mask, at, rows, strides.query_mask, V)
        steps = tl.where(any_of(valid), steps, 0)
    if data.key_mask is not None:
        key_valid = mask_source(data.key_mask, at, grid, strides.key_mask, V)
    first, last = 0, steps
    if data.splits is not None:
        first, last = share(steps, split, splits)
    for t in tl.range(first, last, num_stages=V.STAGES, warp_specialize=V.WARP_SPECIALIZE):
        tile = placed_tile(t, box, grid, KEY_TILE, V)
        columns = load_columns(
            key_source, tile[0], grid, place, V.FEATURES, PARTS, COLUMNS, V
        )  # fmt: skip
        if data.key_mask is None:
            scores, _slopes = tile_scores(
                query_rows, columns, tile, place, rows, grid, data.bias, data.window, head,
                data.cap, False, V,
            )  # fmt: skip
            columns = load_columns(
                value_source, tile[0], grid, place, V.VALUE_FEATURES, VALUE_PARTS, COLUMNS, V
            )
            accumulator, maximum, total = softmax_step(
                scores, columns, scale, accumulator, maximum, total, PRECISION
            )
        else:
            # Loads come first, so that they stay in flight whatever the mask says.
            value_columns = load_columns(
                value_source, tile[0], grid, place, V.VALUE_FEATURES, VALUE_PARTS, COLUMNS, V
            )
            seen = valid_columns(key_valid, tile[0], grid, place, V)
            if any_of(seen):
                scores, _slopes = tile_scores(
                    query_rows, columns, tile, place, rows, grid, data.bias, data.window, head,
                    data.cap, False, V,
                )  # fmt: skip
                scores = tl.where(seen[None, :], scores, float("-inf"))
                accumulator, maximum, total = softmax_step(
                    scores, value_columns, scale, accumulator, maximum, total, PRECISION
                )
    if V.HAS_ADDITIONAL:
        additional = additional_source(at.batch, kv_head, data, num_additional, V)
        first, last = 0, ceil_div(additional.number, COLUMNS)
        if data.splits is not None:
            first, last = share(last, split, splits)
        for t in tl.range(first, last, num_stages=V.STAGES):
            columns, value_columns, present = additional_tile(t, additional, strides, COLUMNS, V)
            scores, _slopes = additional_scores(query_rows, columns, present, data.cap, V)
            accumulator, maximum, total = softmax_step(
                scores, value_columns, scale, accumulator, maximum, total, PRECISION
            )

    if data.query_mask is not None:
        accumulator = kept(accumulator, valid)
        total = tl.where(valid, total, 0.0)
        maximum = tl.where(valid, maximum, float("-inf"))
    # A query that sees nothing has output 0 and logsumexp -inf.
    accumulator = divided(accumulator, tl.where(total == 0.0, 1.0, total))
    if data.splits is not None:
        memory_batch += split * entries
    offset, all_exist = row_offsets(rows.memory, rows.exists, strides.out, V.UNIT, V.WIDE, V.RANK)
    start = head_offset(memory_batch, head, strides.out, V.UNIT, V.WIDE)
    store_parts(data.out + start, accumulator, offset, all_exist, V.VALUE_FEATURES, VALUE_PARTS)
    offset, all_exist = row_offsets(rows.memory, rows.exists, strides.lse, 1, V.WIDE, V.RANK)
    offset += head_offset(memory_batch, head, strides.lse, 1, V.WIDE)
    tl.store(data.lse + offset, (maximum + log2(total)) * LN_2, mask=all_exist)


@triton.jit(do_not_specialize=["programs", "heads", "num_additional"])
def forward_kernel(
    query, key, value, data, programs, heads, num_additional, scale, V: tl.constexpr
):  # fmt: skip
    """Key and value are descriptors of key tiles if `V.TMA`, else pointers."""
    if V.PERSISTENT:
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0)):
            forward_tile(program, query, key, value, data, heads, num_additional, scale, V)
    else:
        forward_tile(tl.program_id(0), query, key, value, data, heads, num_additional, scale, V)


@lru_cache(maxsize=4096)
def _launch(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    precision: str,
    strides: tuple[tuple[int, ...], ...],
    additional: tuple[tuple[int, ...], ...],
    out: tuple[int, ...],
    masks: tuple[tuple[int, ...] | None, ...],
    paddings: tuple[int, ...],
) -> Launch:
    """``strides`` are those of query, key and value, ``additional`` those of additional ones,
    ``masks`` those of the masks of keys and queries, `arguments.mask_strides`."""
    common = arguments.common(
        problem, tiling, sequences, precision, strides, *additional, out,
        has_additional=bool(additional), persistent=tiling.programs > 0, bias_paddings=paddings,
    )  # fmt: skip
    additional_key, additional_value = additional or (None, None)
    query, key, value = strides
    steps = Strides(
        query=common.steps(query),
        key=common.steps(key),
        value=common.steps(value),
        out=common.steps(out),
        lse=common.statistics(problem, True),
        additional_key=common.entry_steps(additional_key),
        additional_value=common.entry_steps(additional_value),
        key_mask=common.mask(masks[0]),
        query_mask=common.mask(masks[1]),
    )
    return Launch(
        forward_kernel,
        min(tiling.programs or common.tiles, common.tiles) * tiling.splits,
        (
            common.tiles, common.heads, problem.num_additional, common.scales.scores,
            common.variant,
        ),
        group=Data,
        alone=3,
        grouped=(arguments.cap(problem), shares(problem, tiling), steps, common.window),
        options=common.options,
        tiles=(tiling, FORWARD),
    )  # fmt: skip


def forward(
    problem: Problem, tiling: Tiling, inputs: Inputs, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out, written into a view if one is given, and logsumexp."""
    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    cumulative_query = launcher.adjacent(inputs.cumulative_seqlen_q)
    cumulative_key = launcher.adjacent(inputs.cumulative_seqlen_kv)
    if out is None:
        out = launcher.allocate(problem, problem.output_shape, query.dtype, query.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=query.device)
    if problem.varlen:
        lse.fill_(-torch.inf)
    results = [out, lse]
    if tiling.splits > 1:
        results = [lse.new_empty((tiling.splits, *tensor.shape)) for tensor in results]
    columns = describable if tiling.tma else readable
    query, key, value = readable(query), columns(key), columns(value)
    additional: tuple[tuple[int, ...], ...] = ()
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = readable(additional_keys), readable(additional_values)
        additional = (additional_keys.stride(), additional_values.stride())
    paddings: tuple[int, ...] = arguments.NO_PADDINGS
    bias = None
    if rpb is not None:
        paddings = bias_paddings(tiling)
        bias = bias_table(rpb, problem, paddings)
    masks = (inputs.key_mask, inputs.query_mask)
    launch = _launch(
        problem, tiling, launcher.sequences(problem, cumulative_query),
        arguments.precision(problem), (query.stride(), key.stride(), value.stride()), additional,
        results[0].stride()[-out.dim() :], tuple(map(arguments.mask_strides, masks)), paddings,
    )  # fmt: skip
    query_tile, key_tile = launch.variant.QUERY_TILE, launch.variant.KEY_TILE
    launch.run(
        query,
        descriptor(key, key_tile) if tiling.tma else key,
        descriptor(value, key_tile) if tiling.tma else value,
        *results, bias, additional_keys, additional_values, cumulative_query, cumulative_key,
        placed_table(problem, query_tile, query.device),
        launcher.adjacent(inputs.additional_lengths), launcher.adjacent(inputs.sink),
        *map(arguments.as_bytes, masks),
    )  # fmt: skip
    if tiling.splits > 1:
        merge(results[0], out, results[1], lse)
    return out, lse
