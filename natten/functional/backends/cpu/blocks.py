"""Compiled loops of the CPU backend: attention a block at a time.

A vector's lanes are a patch: up to WIDE neighboring queries (or, for the gradients of keys and
values, keys). The patch takes one by one the tokens that its windows cover together, whose rows lie
packed as in boxes.py, a chunk at a time. Scores are vectors of the patch, one for each such
token; so are features of the patch's own rows, which are transposed as they are read and written.
Both products then multiply one number of a packed row with one vector, and every loaded number
serves the whole patch. What a lane does not see is masked.

The units of work are boxes as in boxes.py, of many patches, so that a packed chunk serves many.
Neither the batch nor the number of threads decides about patches, boxes and chunks: the order in
which a row's numbers are summed, and so its bits, depend on its own problem alone.

Weights of zero multiply what a lane does not see, and zero times infinity is not zero: `failed`
says of which batch entries packed rows are not all finite, whose results are to be thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Gradients, Inputs, Results
from natten.functional.backends.cpu import plan
from natten.functional.backends.cpu.boxes import (
    ADDRESS,
    AXIS_SIZE,
    BLOCK_SIZE,
    COUNT,
    DILATION,
    FIRST,
    HIGH,
    ITEM,
    LOW,
    all_seen,
    cap,
    dot,
    fill,
    flag,
    get_row,
    locate_row,
    locations,
    open_unit,
    pack_extras,
    pack_keys,
    pack_queries,
    put_row,
    seen,
    with_sink,
)
from natten.functional.backends.cpu.launch import (
    Locations,
    backward_tensors,
    forward_tensors,
    launch,
    lengths,
    numbers,
    numpy_type,
    precise,
    table,
)
from natten.functional.backends.cpu.plan import (
    Patches,
    additional_patches,
    array_of,
    bias_extents,
    chunk_of,
    key_patches,
    query_patches,
    sides_of,
)
from natten.functional.backends.cpu.vectors import (
    FEW_DOTS,
    FEW_SUMS,
    LANES,
    MANY_DOTS,
    MANY_SUMS,
    WIDE,
    Floats,
    Ints,
    Vector,
    add,
    after,
    capped,
    entry,
    exp,
    few_dots,
    few_sums,
    fma,
    inlined,
    inner,
    larger,
    load,
    load_wide,
    many_dots,
    many_sums,
    masked,
    multiply,
    numbers_at,
    padded,
    reduce_sum,
    splat,
    splat_wide,
    start_of,
    store,
    subtract,
    take_ticket,
    transpose,
    zero_where,
)
from natten.functional.problem import Problem

# A patch and a chunk: the first token of the chunk and one past the last that the patch sees along
# each axis; the lanes that hold rows, and of them the valid ones; where the bias vectors of the
# axes' tokens zero are; the place of each lane's row; and for each axis and token along it the
# lanes that see it.
SIGHT, ACTIVE, VALID, NEAREST, PLACES = 0, 6, 7, 8, 11
SEERS = PLACES + 3 * WIDE
# What open_patch writes behind the seers.
PATCH_SIZE = SEERS + 6 + 3 * WIDE
# Of the vectors of a head's biases, one for the lanes of a patch at each distance of the first lane
# from a token: extents, where distance zero of the positions' counts is, and the sign of those.
SPAN, ORIGIN, SIGN = 0, 3, 6


@inlined
def span_of(slants: Ints) -> int:
    """Numbers of a head's vectors of biases."""
    return slants[SPAN] * slants[SPAN + 1] * slants[SPAN + 2] * WIDE


@inner
def patches_of(box: Ints, extents: Ints) -> int:
    total = 1
    for axis in range(3):
        total *= (box[BLOCK_SIZE * axis + COUNT] + extents[axis] - 1) // extents[axis]
    return total


@inner
def chunk_bounds(box: Ints, begin: int, end: int, bounds: Ints) -> None:
    """First and one past the last token, along each axis, of those from `begin` to `end` of a
    box."""
    deep, row = seen(box, 1), seen(box, 2)
    for axis in range(3):
        bounds[2 * axis] = box[BLOCK_SIZE * axis + LOW]
        bounds[2 * axis + 1] = box[BLOCK_SIZE * axis + (LOW if end <= begin else HIGH)]
    if end <= begin:
        return
    line, last = begin // row, (end - 1) // row
    bounds[0], bounds[1] = box[LOW] + line // deep, box[LOW] + last // deep + 1
    if bounds[1] == bounds[0] + 1:
        low = box[BLOCK_SIZE + LOW]
        bounds[2], bounds[3] = low + line % deep, low + last % deep + 1
    if line == last:
        low = box[2 * BLOCK_SIZE + LOW] - line * row
        bounds[4], bounds[5] = low + begin, low + end


@inner
def open_patch(
    index: int, extents: Ints, axes: Ints, items: Ints, box: Ints, begin: int, end: int,
    tensor: Ints, batch: int, reach: int, slants: Ints, patch: Ints,
) -> None:  # fmt: skip
    """Fill `patch`. `tensor`, if there is one, says which rows are valid; others see nothing.
    `reach` is the most tokens that a patch sees along an axis, and one."""
    starts, counts = after(patch, SEERS + 3 * reach), after(patch, SEERS + 3 * reach + 3)
    by_row = after(counts, 3)
    for i in range(3 * WIDE):
        by_row[i] = 0
    chunk_bounds(box, begin, end, patch)
    for axis in range(2, -1, -1):
        block = after(box, BLOCK_SIZE * axis)
        number = (block[COUNT] + extents[axis] - 1) // extents[axis]
        first = index % number * extents[axis]
        index = index // number
        counts[axis] = min(extents[axis], block[COUNT] - first)
        starts[axis] = block[FIRST] + axes[AXIS_SIZE * axis + DILATION] * first
    patch[ACTIVE] = patch[VALID] = 0
    for i in range(counts[0]):
        for j in range(counts[1]):
            for k in range(counts[2]):
                lane = (i * extents[1] + j) * extents[2] + k
                bit = np.int64(1) << np.int64(lane)
                place = after(patch, PLACES + 3 * lane)
                place[0] = starts[0] + i * axes[DILATION]
                place[1] = starts[1] + j * axes[AXIS_SIZE + DILATION]
                place[2] = starts[2] + k * axes[2 * AXIS_SIZE + DILATION]
                patch[ACTIVE] |= bit
                if flag(tensor, batch, place):
                    patch[VALID] |= bit
                    by_row[i] |= bit
                    by_row[WIDE + j] |= bit
                    by_row[2 * WIDE + k] |= bit
    for axis in range(3):
        seers, sight = after(patch, SEERS + axis * reach), after(patch, SIGHT + 2 * axis)
        step = 3 * axes[AXIS_SIZE * axis + DILATION]
        item = after(items, 3 * (axes[AXIS_SIZE * axis + ITEM] + starts[axis]))
        patch[NEAREST + axis] = slants[ORIGIN + axis] - slants[SIGN] * item[2]
        low = max(sight[0], item[0])
        high = max(low, min(sight[1], after(item, step * (counts[axis] - 1))[1]))
        sight[0], sight[1] = low, high
        for i in range(high - low + 1):
            seers[i] = 0
        # Mark the ends of the windows, then fill in what lies between.
        for i in range(counts[axis]):
            first, last = max(item[0], low), min(item[1], high)
            if first < last:
                seers[first - low] ^= by_row[axis * WIDE + i]
                seers[last - low] ^= by_row[axis * WIDE + i]
            item = after(item, step)
        bits = np.int64(0)
        for i in range(high - low):
            bits ^= seers[i]
            seers[i] = bits


@inner
def list_seen(
    patch: Ints, reach: int, box: Ints, begin: int, end: int, flagged: bool, flags: Floats,
    none: float, slants: Ints, picks: Ints, bits: Ints, places: Ints,
) -> int:  # fmt: skip
    """Of a chunk, from `begin` to `end` of the box's tokens, those that a patch sees, the lanes
    that see each, and its vector of biases. The last is repeated for no lane up to whole FEW_DOTS.
    Leaves out those whose flag is `none`."""
    deep, row = seen(box, 1), seen(box, 2)
    low_x, low_y, low_z = box[LOW], box[BLOCK_SIZE + LOW], box[2 * BLOCK_SIZE + LOW]
    seers_y = after(patch, SEERS + reach - patch[SIGHT + 2])
    seers_z = after(patch, SEERS + 2 * reach - patch[SIGHT + 4])
    count = 0
    for x in range(patch[SIGHT], patch[SIGHT + 1]):
        see_x = patch[SEERS + x - patch[SIGHT]]
        for y in range(patch[SIGHT + 2], patch[SIGHT + 3]):
            see = see_x & seers_y[y]
            line = ((x - low_x) * deep + y - low_y) * row - low_z - begin
            place = (patch[NEAREST] - x) * slants[SPAN + 1] + patch[NEAREST + 1] - y
            place = place * slants[SPAN + 2] + patch[NEAREST + 2]
            first = max(patch[SIGHT + 4], -line)
            last = min(patch[SIGHT + 5], end - begin - line)
            if flagged:
                for z in range(first, last):
                    picks[count], bits[count] = line + z, see & seers_z[z]
                    places[count] = place - z
                    count += flags[line + z] != none
            else:
                for z in range(first, last):
                    picks[count], bits[count] = line + z, see & seers_z[z]
                    places[count] = place - z
                    count += 1
    for i in range(count, (count + FEW_DOTS - 1) // FEW_DOTS * FEW_DOTS):
        picks[i], bits[i] = picks[count - 1], 0
    return count


@inner
def list_extras(count: int, patch: Ints, picks: Ints, bits: Ints) -> int:
    """The same of additional keys, which every lane sees."""
    for i in range(count):
        picks[i], bits[i] = i, patch[VALID]
    for i in range(count, (count + FEW_DOTS - 1) // FEW_DOTS * FEW_DOTS):
        picks[i], bits[i] = count - 1, 0
    return count


@inlined
def see(
    index: int, extents: Ints, axes: Ints, items: Ints, box: Ints, every: int, begin: int, end: int,
    tensor: Ints, batch: int, reach: int, slants: Ints, flagged: bool, flags: Floats, none: float,
    patch: Ints, picks: Ints, bits: Ints, places: Ints,
) -> int:  # fmt: skip
    """Open a patch, and list what it sees of a chunk; `every` token of the box comes before the
    additional keys."""
    inside = min(end, every)
    open_patch(index, extents, axes, items, box, begin, inside, tensor, batch, reach, slants, patch)
    if begin >= every:
        return list_extras(end - begin, patch, picks, bits)
    return list_seen(
        patch, reach, box, begin, end, flagged, flags, none, slants, picks, bits, places
    )


@inlined
def pack_chunk(
    at: Locations, batch: int, head: int, axes: Ints, box: Ints, every: int, begin: int, end: int,
    kind: int, dim: int, dim_v: int, one: float, keys: Floats, values: Floats, flags: Floats,
) -> None:  # fmt: skip
    """Keys and values of a chunk."""
    if begin >= every:
        first, last = begin - every, end - every
        pack_extras(at, batch, head, first, last, kind, dim, dim_v, one, keys, values)
    else:
        pack_keys(
            at, batch, head, axes, box, begin, end, kind, dim, dim_v, one, keys, values, flags
        )


@inner
def get_rows(
    tensor: Ints, batch: int, head: int, patch: Ints, kind: int, count: int, width: int,
    one: float, rows: Floats, out: Floats,
) -> None:  # fmt: skip
    """Read the rows of a patch, `rows`, and transpose them to `out`."""
    for lane in range(WIDE):
        row = after(rows, lane * width)
        if patch[ACTIVE] >> np.int64(lane) & 1:
            place = after(patch, PLACES + 3 * lane)
            get_row(tensor, batch, head, place, np.int64(4), kind, count, width, one, row)
        else:
            fill(row, width, one - one)
    for lane in range(0, WIDE, LANES):
        for i in range(0, width, LANES):
            transpose(after(rows, lane * width + i), width, after(out, i * WIDE + lane), WIDE)


@inner
def put_rows(
    tensor: Ints, batch: int, head: int, patch: Ints, kind: int, count: int, width: int,
    factor: float, columns: Floats, rows: Floats,
) -> None:  # fmt: skip
    """Write `columns`, the transposed rows of a patch, times `factor`."""
    for lane in range(0, WIDE, LANES):
        for i in range(0, width, LANES):
            transpose(after(columns, i * WIDE + lane), WIDE, after(rows, lane * width + i), width)
    for lane in range(WIDE):
        if patch[ACTIVE] >> np.int64(lane) & 1:
            place = after(patch, PLACES + 3 * lane)
            put_row(tensor, batch, head, place, kind, count, factor, after(rows, lane * width))


@inner
def get_numbers(tensor: Ints, batch: int, head: int, patch: Ints, zero: float, out: Floats) -> None:
    """One number for each row of a patch, in the compute type."""
    for lane in range(WIDE):
        out[lane] = zero
        if patch[ACTIVE] >> np.int64(lane) & 1:
            place = after(patch, PLACES + 3 * lane)
            out[lane] = numbers_at(locate_row(tensor, batch, head, place), out)[0]


@inner
def dots(rows: Floats, width: int, picks: Ints, count: int, columns: Floats, out: Floats) -> None:
    """out[j] = rows[picks[j]] . columns, for `count` rounded up to whole FEW_DOTS."""
    j = 0
    while j + MANY_DOTS <= count:
        many_dots(rows, width, after(picks, j), columns, after(out, j * WIDE))
        j += MANY_DOTS
    while j < count:
        few_dots(rows, width, after(picks, j), columns, after(out, j * WIDE))
        j += FEW_DOTS


@inner
def accumulate(
    weights: Floats, rows: Floats, width: int, picks: Ints, count: int, out: Floats
) -> None:
    """out += the sum of rows[picks[j]] times weights[j] over j < count, which is above zero."""
    i = 0
    while i + MANY_SUMS <= width:
        many_sums(weights, after(rows, i), width, picks, count, after(out, i * WIDE))
        i += MANY_SUMS
    while i < width:
        few_sums(weights, after(rows, i), width, picks, count, after(out, i * WIDE))
        i += FEW_SUMS


@inner
def all_finite(numbers: Floats, count: int, zero: float) -> bool:
    """Whether a multiple of LANES numbers are."""
    zeros = splat(numbers, zero)
    total = zeros
    for i in range(0, count, LANES):
        total = fma(load(numbers, i), zeros, total)
    return reduce_sum(total) == zero


@inner
def bend(
    scores: Floats, count: int, scale: float, one: float, limit: float, slopes: Floats,
    biased: bool, biases: Floats, places: Ints,
) -> float:  # fmt: skip
    """Scale `count` vectors of scores, cap them and add biases, where there is one of both to do.

    Returns the factor that they still lack.
    """
    if limit == 0 and not biased:
        return scale
    if limit > 0:
        factors = splat(scores, scale)
        for i in range(0, count * WIDE, LANES):
            store(scores, i, multiply(load(scores, i), factors))
        cap(scores, count * WIDE, limit, slopes)
        scale = one
    if biased:
        scales = splat_wide(scores, scale)
        for j in range(count):
            bias = load_wide(biases, places[j] * WIDE)
            store(scores, j * WIDE, fma(load_wide(scores, j * WIDE), scales, bias))
    return one


@inner
def weigh(
    scores: Floats, bits: Ints, count: int, scale: float, infinity: float, shift: float,
    best: Floats, total: Floats, out: Floats, width: int,
) -> None:  # fmt: skip
    """Replace scores of a chunk by weights, relative to the best score so far and less `shift`.

    Keeps the running maximum and sum, and rescales what is summed already.
    """
    scales, lowest = splat_wide(scores, scale), splat_wide(scores, -infinity)
    before = load_wide(best, 0)
    b0 = b1 = b2 = b3 = before
    # Four independent chains hide the latency.
    for j in range(0, count, 4):
        at = j * WIDE
        x0 = masked(bits[j], multiply(load_wide(scores, at), scales), lowest)
        x1 = masked(bits[j + 1], multiply(load_wide(scores, at + WIDE), scales), lowest)
        x2 = masked(bits[j + 2], multiply(load_wide(scores, at + 2 * WIDE), scales), lowest)
        x3 = masked(bits[j + 3], multiply(load_wide(scores, at + 3 * WIDE), scales), lowest)
        store(scores, at, x0)
        store(scores, at + WIDE, x1)
        store(scores, at + 2 * WIDE, x2)
        store(scores, at + 3 * WIDE, x3)
        b0, b1, b2, b3 = larger(b0, x0), larger(b1, x1), larger(b2, x2), larger(b3, x3)
    now = larger(larger(b0, b1), larger(b2, b3))
    store(best, 0, now)
    # Where there is no score but -inf, weights are zero.
    origin = add(zero_where(now, lowest), splat_wide(scores, shift))
    t0 = t1 = t2 = t3 = splat_wide(scores, scale - scale)
    for j in range(0, count, 4):
        at = j * WIDE
        x0 = exp(subtract(load_wide(scores, at), origin))
        x1 = exp(subtract(load_wide(scores, at + WIDE), origin))
        x2 = exp(subtract(load_wide(scores, at + 2 * WIDE), origin))
        x3 = exp(subtract(load_wide(scores, at + 3 * WIDE), origin))
        store(scores, at, x0)
        store(scores, at + WIDE, x1)
        store(scores, at + 2 * WIDE, x2)
        store(scores, at + 3 * WIDE, x3)
        t0, t1, t2, t3 = add(t0, x0), add(t1, x1), add(t2, x2), add(t3, x3)
    sums = add(add(t0, t1), add(t2, t3))
    factor = exp(subtract(before, zero_where(now, lowest)))
    store(total, 0, fma(load_wide(total, 0), factor, sums))
    for i in range(0, width * WIDE, WIDE):
        store(out, i, multiply(load_wide(out, i), factor))


@entry
def forward_loop(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, slants: Ints, biases: Floats, extras: Ints,
    shift: float, sinks: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """Attention of every unit that this thread gets.

    extents: of a patch. reach: see open_patch. capacity: tokens of a chunk. shift: the logarithm of
    the largest window, which keeps sums of weights below one, so that a sum of values never
    overflows. work: keys, values and flags of a chunk, scores and slopes, rows of a patch; for each
    patch and head of a unit query, output, best score and sum of weights. lists: picks and bits of
    a chunk, a patch, a box.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    shift, sunk, sinks = work.dtype.type(shift), sinks.size > 0, start_of(sinks)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents, slants = start_of(extents), start_of(slants)
    biased, biases, span = biases.size > 0, start_of(biases), span_of(slants)
    extras = start_of(extras)

    at = locations(tensors)
    flagged = at.key_mask[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    flags = after(values, capacity * width_v)
    scores = after(flags, capacity)
    slopes = after(scores, (capacity + FEW_DOTS) * WIDE)
    rows = after(slopes, (capacity + FEW_DOTS) * WIDE)
    states = after(rows, WIDE * max(width, width_v))
    state_size = (width + width_v + 2) * WIDE

    picks = start_of(lists)
    bits = after(picks, capacity + FEW_DOTS)
    places = after(bits, capacity + FEW_DOTS)
    box = after(places, capacity)
    patch = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        every, patches = all_seen(box), patches_of(box, extents)
        tokens, begin = every + extras[batch], np.int64(0)
        while begin == 0 or begin < tokens:
            end = min(begin + capacity, every if begin < every else tokens)
            pack_chunk(
                at, batch, head_kv, axes, box, every, begin, end, kind, dim, dim_v, one, keys,
                values, flags,
            )  # fmt: skip
            if not all_finite(values, (end - begin) * width_v, zero):
                failed[batch] = 1
            for index in range(patches):
                count = see(
                    index, extents, axes, items, box, every, begin, end, at.query_mask, batch,
                    reach, slants, flagged, flags, zero, patch, picks, bits, places,
                )  # fmt: skip
                for part in range(group):
                    head = head_kv * group + part
                    query = after(states, (index * group + part) * state_size)
                    result = after(query, width * WIDE)
                    best = after(result, width_v * WIDE)
                    total = after(best, WIDE)
                    if begin == 0:
                        get_rows(at.query, batch, head, patch, kind, dim, width, one, rows, query)
                        fill(result, width_v * WIDE, zero)
                        fill(best, WIDE, -infinity)
                        fill(total, WIDE, zero)
                    if count > 0:
                        dots(keys, width, picks, count, query, scores)
                        factor = bend(
                            scores, count, scale, one, limit, slopes, biased and begin < every,
                            after(biases, head * span), places,
                        )  # fmt: skip
                        weigh(
                            scores, bits, count, factor, infinity, shift, best, total, result,
                            width_v,
                        )  # fmt: skip
                        accumulate(scores, values, width_v, picks, count, result)
                    if end == tokens:
                        for lane in range(WIDE):
                            logsumexp, share = -infinity, zero
                            if total[lane] != 0:
                                share = one / total[lane]
                                base = zero if best[lane] == -infinity else best[lane]
                                logsumexp = base + shift + math.log(total[lane])
                            if patch[ACTIVE] >> np.int64(lane) & 1:
                                place = after(patch, PLACES + 3 * lane)
                                if sunk and flag(at.query_mask, batch, place):
                                    less, logsumexp = with_sink(logsumexp, sinks[head], one)
                                    share *= less
                                address = locate_row(at.lse, batch, head, place)
                                numbers_at(address, keys)[0] = logsumexp
                            total[lane] = share
                        shares = load_wide(total, 0)
                        for i in range(0, width_v * WIDE, WIDE):
                            store(result, i, multiply(load_wide(result, i), shares))
                        put_rows(
                            at.out, batch, head, patch, kind, dim_v, width_v, one, result, rows
                        )
            begin = max(end, np.int64(1))


@inner
def differentiate(
    scores: Floats, grads: Floats, j: int, bits: Ints, scale: float, lses: Vector, deltas: Vector
) -> None:
    """Replace scores by weights P, and gradients of P by those of the scores."""
    at, zeros = j * WIDE, splat_wide(scores, scale - scale)
    score = subtract(multiply(load_wide(scores, at), splat_wide(scores, scale)), lses)
    # No weight is above one, but the logsumexp of huge scores is not exact enough to say so.
    weight = masked(bits[j], exp(capped(score, zeros)), zeros)
    store(scores, at, weight)
    grad = multiply(weight, subtract(load_wide(grads, at), deltas))
    store(grads, at, masked(bits[j], grad, zeros))


@inner
def steepen(grads: Floats, bits: Ints, count: int, slopes: Floats, zero: float) -> None:
    """Gradients of products from those of their capped scores."""
    zeros = splat_wide(grads, zero)
    for j in range(count):
        grad = multiply(load_wide(grads, j * WIDE), load_wide(slopes, j * WIDE))
        store(grads, j * WIDE, masked(bits[j], grad, zeros))


@inner
def numbers_of(slants: Ints, extents: Ints) -> int:
    """Biases of a head."""
    total = 1
    for axis in range(3):
        total *= slants[SPAN + axis] - extents[axis] + 1
    return total


@inner
def fold(sums: Floats, slants: Ints, extents: Ints, out: Floats) -> None:
    """The gradients of a head's biases from those of their vectors for patches of queries."""
    u1, u2 = slants[SPAN + 1], slants[SPAN + 2]
    n0, n1, n2 = slants[SPAN] - extents[0] + 1, u1 - extents[1] + 1, u2 - extents[2] + 1
    for i in range(extents[0]):
        for j in range(extents[1]):
            for k in range(extents[2]):
                lane = (i * extents[1] + j) * extents[2] + k
                for x in range(n0):
                    for y in range(n1):
                        at = (slants[ORIGIN] - i - x) * u1 + slants[ORIGIN + 1] - j - y
                        at = at * u2 + slants[ORIGIN + 2] - k
                        row = after(out, (x * n1 + y) * n2)
                        for z in range(n2):
                            row[z] += sums[(at - z) * WIDE + lane]


@entry
def backward_queries(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, slants: Ints, biases: Floats, extras: Ints,
    grad_scale: float, bias_grads: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of queries, and each row's `delta` for backward_keys.

    work: keys, values and flags of a chunk, scores, gradients and slopes, two rows of a patch; for
    each patch and head of a unit query, grad_out, logsumexp, delta, grad_query. The rest is as in
    `forward_loop` and in rows.py.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    grad_scale = work.dtype.type(grad_scale)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents, slants = start_of(extents), start_of(slants)
    biased, biases, span = biases.size > 0, start_of(biases), span_of(slants)
    extras, summed, bias_grads = start_of(extras), bias_grads.size > 0, start_of(bias_grads)

    at = locations(tensors)
    flagged = at.key_mask[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    flags = after(values, capacity * width_v)
    scores = after(flags, capacity)
    grads = after(scores, (capacity + FEW_DOTS) * WIDE)
    slopes = after(grads, (capacity + FEW_DOTS) * WIDE)
    rows = after(slopes, (capacity + FEW_DOTS) * WIDE)
    outs = after(rows, WIDE * max(width, width_v))
    bias_sums = after(outs, WIDE * max(width, width_v))
    states = after(bias_sums, group * span if summed else 0)
    state_size = (2 * width + width_v + 2) * WIDE

    picks = start_of(lists)
    bits = after(picks, capacity + FEW_DOTS)
    places = after(bits, capacity + FEW_DOTS)
    box = after(places, capacity)
    patch = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        every, patches = all_seen(box), patches_of(box, extents)
        if summed:
            fill(bias_sums, group * span, zero)
        tokens, begin = every + extras[batch], np.int64(0)
        while begin == 0 or begin < tokens:
            end = min(begin + capacity, every if begin < every else tokens)
            pack_chunk(
                at, batch, head_kv, axes, box, every, begin, end, kind, dim, dim_v, one, keys,
                values, flags,
            )  # fmt: skip
            if not all_finite(keys, (end - begin) * width, zero):
                failed[batch] = 1
            for index in range(patches):
                count = see(
                    index, extents, axes, items, box, every, begin, end, at.query_mask, batch,
                    reach, slants, flagged, flags, zero, patch, picks, bits, places,
                )  # fmt: skip
                for part in range(group):
                    head = head_kv * group + part
                    query = after(states, (index * group + part) * state_size)
                    grad_out = after(query, width * WIDE)
                    lse = after(grad_out, width_v * WIDE)
                    delta = after(lse, WIDE)
                    grad_query = after(delta, WIDE)
                    if begin == 0:
                        get_rows(at.query, batch, head, patch, kind, dim, width, one, rows, query)
                        get_rows(
                            at.out, batch, head, patch, kind, dim_v, width_v, one, outs, grad_out
                        )
                        get_rows(
                            at.grad_out, batch, head, patch, kind, dim_v, width_v, one, rows,
                            grad_out,
                        )  # fmt: skip
                        get_numbers(at.lse, batch, head, patch, -infinity, lse)
                        fill(delta, WIDE, zero)
                        if at.grad_lse[ADDRESS]:
                            get_numbers(at.grad_lse, batch, head, patch, zero, delta)
                        for lane in range(WIDE):
                            row = lane * width_v
                            own = dot(after(outs, row), after(rows, row), width_v)
                            delta[lane] = own - delta[lane]
                            if patch[ACTIVE] >> np.int64(lane) & 1:
                                place = after(patch, PLACES + 3 * lane)
                                address = locate_row(at.delta, batch, head, place)
                                numbers_at(address, keys)[0] = delta[lane]
                            # Those without weights get none, whatever they and their gradients
                            # hold.
                            if lse[lane] == -infinity:
                                lse[lane], delta[lane] = infinity, zero
                                for i in range(width):
                                    query[i * WIDE + lane] = zero
                                for i in range(width_v):
                                    grad_out[i * WIDE + lane] = zero
                        fill(grad_query, width * WIDE, zero)
                    if count > 0:
                        dots(keys, width, picks, count, query, scores)
                        dots(values, width_v, picks, count, grad_out, grads)
                        factor = bend(
                            scores, count, scale, one, limit, slopes, biased and begin < every,
                            after(biases, head * span), places,
                        )  # fmt: skip
                        lses, deltas = load_wide(lse, 0), load_wide(delta, 0)
                        for j in range(count):
                            differentiate(scores, grads, j, bits, factor, lses, deltas)
                        if summed and begin < every:
                            sums = after(bias_sums, part * span)
                            for j in range(count):
                                place, grad = places[j] * WIDE, load_wide(grads, j * WIDE)
                                store(sums, place, add(load_wide(sums, place), grad))
                        if limit > 0:
                            steepen(grads, bits, count, slopes, zero)
                        accumulate(grads, keys, width, picks, count, grad_query)
                    if end == tokens:
                        put_rows(
                            at.grad_query, batch, head, patch, kind, dim, width, grad_scale,
                            grad_query, rows,
                        )  # fmt: skip
            begin = max(end, np.int64(1))
        for part in range(group if summed else 0):
            at_unit = after(bias_grads, (unit * group + part) * numbers_of(slants, extents))
            fold(after(bias_sums, part * span), slants, extents, at_unit)


@entry
def backward_keys(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, slants: Ints, biases: Floats, grad_scale: float,
    work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over the queries that see them.

    work: of a chunk the queries, their output gradients, logsumexp and delta, scores, gradients and
    slopes; rows of a patch; for each patch of a unit key, value and both gradients. The rest is as
    in `forward_loop`.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    grad_scale = work.dtype.type(grad_scale)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents, slants = start_of(extents), start_of(slants)
    biased, biases, span = biases.size > 0, start_of(biases), span_of(slants)

    at = locations(tensors)

    queries = start_of(work)
    grad_rows = after(queries, capacity * width)
    lse = after(grad_rows, capacity * width_v)
    delta = after(lse, capacity)
    scores = after(delta, capacity)
    grads = after(scores, (capacity + FEW_DOTS) * WIDE)
    slopes = after(grads, (capacity + FEW_DOTS) * WIDE)
    rows = after(slopes, (capacity + FEW_DOTS) * WIDE)
    states = after(rows, WIDE * max(width, width_v))
    state_size = 2 * (width + width_v) * WIDE

    picks = start_of(lists)
    bits = after(picks, capacity + FEW_DOTS)
    places = after(bits, capacity + FEW_DOTS)
    box = after(places, capacity)
    patch = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        every, patches = all_seen(box), patches_of(box, extents)
        for part in range(group):
            head = head_kv * group + part
            begin = np.int64(0)
            while begin == 0 or begin < every:
                end = min(begin + capacity, every)
                length = end - begin
                pack_queries(
                    at, batch, head, axes, box, begin, end, kind, dim, dim_v, one, infinity,
                    queries, grad_rows, lse, delta,
                )  # fmt: skip
                if not (
                    all_finite(queries, length * width, zero)
                    and all_finite(grad_rows, length * width_v, zero)
                ):
                    failed[batch] = 1
                for index in range(patches):
                    count = see(
                        index, extents, axes, items, box, every, begin, end, at.key_mask, batch,
                        reach, slants, True, lse, -infinity, patch, picks, bits, places,
                    )  # fmt: skip
                    key = after(states, index * state_size)
                    value = after(key, width * WIDE)
                    grad_key = after(value, width_v * WIDE)
                    grad_value = after(grad_key, width * WIDE)
                    if begin == 0 and part == 0:
                        get_rows(at.key, batch, head_kv, patch, kind, dim, width, one, rows, key)
                        get_rows(
                            at.value, batch, head_kv, patch, kind, dim_v, width_v, one, rows, value
                        )
                        fill(grad_key, (width + width_v) * WIDE, zero)
                    if count > 0:
                        dots(queries, width, picks, count, key, scores)
                        dots(grad_rows, width_v, picks, count, value, grads)
                        factor = bend(
                            scores, count, scale, one, limit, slopes, biased,
                            after(biases, head * span), places,
                        )  # fmt: skip
                        for j in range(count):
                            lses = splat_wide(lse, lse[picks[j]])
                            deltas = splat_wide(delta, delta[picks[j]])
                            differentiate(scores, grads, j, bits, factor, lses, deltas)
                        if limit > 0:
                            steepen(grads, bits, count, slopes, zero)
                        accumulate(grads, queries, width, picks, count, grad_key)
                        accumulate(scores, grad_rows, width_v, picks, count, grad_value)
                    if end == every and part == group - 1:
                        put_rows(
                            at.grad_key, batch, head_kv, patch, kind, dim, width, grad_scale,
                            grad_key, rows,
                        )  # fmt: skip
                        put_rows(
                            at.grad_value, batch, head_kv, patch, kind, dim_v, width_v, one,
                            grad_value, rows,
                        )  # fmt: skip
                begin = max(end, np.int64(1))


class Costs(NamedTuple):
    """Nanoseconds: of each row or patch, of each of its features, of each pair of a row or patch
    with a token that it sees, of each feature of each pair."""

    row: float
    row_feature: float
    pair: float
    pair_feature: float

    def of(self, rows: int, pairs: int, features: int) -> float:
        own = self.row + self.row_feature * features
        return rows * own + pairs * (self.pair + self.pair_feature * features)


# Fitted to 349 random problems with small windows, whose rows stay in the cache, in one thread. A
# step costs a patch what a pair costs a row ten times, and serves up to WIDE rows at once.
BY_ROW = Costs(84, 0.77, 1.0, 0.04), Costs(170, 2.5, 4.8, 0.14)
BY_BLOCK = Costs(470, 10.7, 4.0, 0.46), Costs(670, 15.5, 3.4, 0.79)


# Biases of all heads: each becomes about two vectors.
MAX_BIASES = 1 << 20


def covers(problem: Problem) -> bool:
    """Whether the loops by block compute this problem.

    Where scores may be too large for their type, and it matters which product is rounded first,
    rows do as the reference does. They also take biases whose vectors would be many.
    """
    is_tame = abs(problem.scale) < torch.finfo(problem.accumulation_dtype).max ** 0.5
    biases = problem.heads * int(bias_extents(problem).prod()) * problem.has_rpb
    return is_tame and biases <= MAX_BIASES


@lru_cache(maxsize=256)
def pays(problem: Problem, backward: bool) -> bool:
    """Whether the loops by block are the faster ones.

    They are not where windows are so small, or so far apart, that the rows of a patch hardly share
    what they see.
    """
    if not covers(problem):
        return False
    features = plan.padded(problem.head_dim) + plan.padded(problem.head_dim_v)
    pairs = prod(int((s.items[:, 1] - s.items[:, 0]).sum()) for s in sides_of(problem).queries)
    pairs += problem.num_queries * problem.num_additional
    by_row = BY_ROW[backward].of(problem.num_queries, pairs, features)
    sides = [query_patches(problem, WIDE, 1)]
    steps = sides[0].count * problem.num_additional
    if backward:
        sides.append(key_patches(problem, WIDE, 1))
        if problem.num_additional:
            sides.append(additional_patches(problem, WIDE, 1))
    steps += sum(side.steps for side in sides)
    patches = sum(side.count for side in sides)
    return BY_BLOCK[backward].of(patches, steps, features) < by_row


class Biases(NamedTuple):
    """A relative position bias as the loops take it.

    Attributes:
        slants: Described above; of zeros if there is no bias.
        vectors: For each head and distance, the biases of a patch's lanes; empty if there is none.
    """

    slants: np.ndarray
    vectors: Tensor


def _biases(problem: Problem, rpb: Tensor | None, patches: Patches, sign: int) -> Biases:
    """The biases of patches of queries (sign 1) or of keys (-1)."""
    table = precise(problem, rpb)
    if rpb is None:
        return Biases(np.zeros(7, np.int64), table)
    extents, sizes = patches.extents, bias_extents(problem)
    table = table.view(problem.heads, *sizes.tolist())
    if sign > 0:
        # The next query is one further from a token in the other direction than the next key.
        table = table.flip(1, 2, 3)
    last = (extents - 1).tolist()
    table = torch.nn.functional.pad(table, [n for side in last[::-1] for n in (side, side)])
    for axis, extent in enumerate(extents.tolist()):
        table = table.unfold(axis + 1, extent, 1)
    lanes = table.flatten(-3)
    vectors = lanes.new_zeros(*lanes.shape[:-1], WIDE)
    vectors[..., : lanes.shape[-1]] = lanes
    origin = extents - 1 if sign < 0 else sizes + extents - 2
    return Biases(np.array([*(sizes + extents - 1), *origin, sign], np.int64), vectors.view(-1))


def _run(
    kernel: Callable[..., None],
    problem: Problem,
    patches: Patches,
    tensors: Locations,
    biases: Biases,
    own: tuple[Any, ...],
    features: int,
    buffers: int,
    sums: int = 0,
) -> list[int]:
    """Launch a loop; returns the batch entries that it fails on.

    Args:
        kernel: The loop.
        problem, patches: What it computes, in which order.
        tensors, biases: Of what.
        own: Arguments that the others do not have.
        features: Vectors of the state of a patch.
        buffers: Scratch arrays of scores.
        sums: Numbers of scratch memory for gradients of biases.
    """
    width, width_v = plan.padded(problem.head_dim), plan.padded(problem.head_dim_v)
    most = plan.padded(max(patches.sweep.capacity, problem.num_additional))
    chunk = min(chunk_of(problem), most)
    failed = np.zeros(problem.batch, np.int64)
    arguments = (
        table(tensors), *numbers(problem), patches.extents, patches.reach, chunk, failed,
        biases.slants, array_of(biases.vectors), *own,
    )  # fmt: skip
    vectors = buffers * (chunk + FEW_DOTS) + 2 * max(width, width_v) + patches.members * features
    scratch = chunk * (width + width_v + 2) + vectors * WIDE + sums
    lists = 3 * chunk + 2 * FEW_DOTS + 3 * BLOCK_SIZE + PATCH_SIZE + 3 * patches.reach
    launch(kernel, patches.sweep, arguments, scratch, lists, numpy_type(problem))
    return [int(entry) for entry in np.flatnonzero(failed)]


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, list[int]]:
    """The output, the logsumexp, and the batch entries that have to be computed otherwise."""
    tensors, sinks = forward_tensors(problem, inputs), precise(problem, inputs.sink)
    patches = query_patches(problem, WIDE, torch.get_num_threads())
    biases = _biases(problem, inputs.rpb, patches, 1)
    shift = math.log(max(patches.sweep.longest + problem.num_additional, 1))
    own = (lengths(problem, inputs), shift, array_of(sinks))
    features = plan.padded(problem.head_dim) + plan.padded(problem.head_dim_v) + 2
    failed = _run(forward_loop, problem, patches, tensors, biases, own, features, 2)
    return tensors.out, tensors.lse, failed


def backward(
    problem: Problem, inputs: Inputs, results: Results, needs: tuple[bool, ...]
) -> tuple[Gradients, list[int]]:
    """The gradients of the six differentiable inputs, and the batch entries that have to be
    computed otherwise, which that of the bias is without."""
    rpb, extra_keys, extra_values = inputs[3:6]
    tensors, threads = backward_tensors(problem, inputs, results), torch.get_num_threads()
    width, width_v = plan.padded(problem.head_dim), plan.padded(problem.head_dim_v)
    extras, factor = lengths(problem, inputs), problem.gradient_scale
    patches = query_patches(problem, WIDE, threads)
    biases = _biases(problem, rpb, patches, 1)
    group, needs_bias = problem.heads // problem.heads_kv, rpb is not None and needs[3]
    size = group * int(bias_extents(problem).prod())
    bias_grads = biases.vectors.new_zeros(patches.sweep.units * size * needs_bias)
    sums = biases.vectors.numel() // problem.heads_kv * needs_bias
    own: tuple[Any, ...] = (extras, factor, array_of(bias_grads))
    features = 2 * width + width_v + 2
    failed = _run(backward_queries, problem, patches, tensors, biases, own, features, 3, sums)
    features = 2 * (width + width_v)
    if needs[1] or needs[2]:
        patches = key_patches(problem, WIDE, threads)
        biases = _biases(problem, rpb, patches, -1)
        failed += _run(backward_keys, problem, patches, tensors, biases, (factor,), features, 3)
    grad_extra_keys = grad_extra_values = None
    if extra_keys is not None and extra_values is not None and (needs[4] or needs[5]):
        # Keys that all queries see, and that are there or not.
        grad_extra_keys, grad_extra_values = map(torch.empty_like, (extra_keys, extra_values))
        numbered = torch.arange(problem.num_additional, device="cpu")
        extra = tensors._replace(
            key=extra_keys, value=extra_values, grad_key=grad_extra_keys,
            grad_value=grad_extra_values, key_mask=numbered < torch.from_numpy(extras)[:, None],
        )  # fmt: skip
        patches = additional_patches(problem, WIDE, threads)
        biases = _biases(problem, None, patches, -1)
        failed += _run(backward_keys, problem, patches, extra, biases, (factor,), features, 3)
    entries = sorted(set(failed))
    grad_rpb = None
    if rpb is not None and needs[3]:
        of_units = bias_grads.view(problem.batch, -1, problem.heads_kv, size)
        kept = [entry for entry in range(problem.batch) if entry not in entries]
        # The sum runs over batch entries and boxes, always in this order.
        grad_rpb = of_units[kept].sum((0, 1)).view(rpb.shape).to(rpb.dtype)
    gradients = tensors.grad_query, tensors.grad_key, tensors.grad_value
    return (*gradients, grad_rpb, grad_extra_keys, grad_extra_values), entries


__all__ = ["backward", "covers", "forward", "pays"]
