"""Attention a row at a time: compiled loops, and their launches.

Each query streams the keys of its window from the scratch array of its box (boxes.py). A row's
window is a list of `picks`, offsets into the scratch array relative to the window's first row; the
list changes only where the window's extents do.
"""

from __future__ import annotations

import math

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
    rows_of,
    seen,
    with_sink,
)
from natten.functional.backends.cpu.launch import (
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
    Sweep,
    array_of,
    bias_extents,
    key_sweep,
    query_sweep,
)
from natten.functional.backends.cpu.vectors import (
    LANES,
    Floats,
    Ints,
    add,
    after,
    capped,
    entry,
    exp,
    fma,
    inner,
    larger,
    load,
    multiply,
    numbers_at,
    padded,
    reduce_max,
    reduce_sum,
    splat,
    start_of,
    store,
    subtract,
    sum_lanes,
    take_ticket,
)
from natten.functional.problem import Problem


@inner
def dots(
    row: Floats, rows: Floats, width: int, picks: Ints, count: int, factor: float, out: Floats
) -> None:
    """out[j] = factor * (row . rows[picks[j]]), for `count` rounded up to LANES picks."""
    for j in range(0, count, LANES):
        r0 = picks[j] * width
        r1 = picks[j + 1] * width
        r2 = picks[j + 2] * width
        r3 = picks[j + 3] * width
        r4 = picks[j + 4] * width
        r5 = picks[j + 5] * width
        r6 = picks[j + 6] * width
        r7 = picks[j + 7] * width
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(out, 0)
        for i in range(0, width, LANES):
            x = load(row, i)
            s0 = fma(x, load(rows, r0 + i), s0)
            s1 = fma(x, load(rows, r1 + i), s1)
            s2 = fma(x, load(rows, r2 + i), s2)
            s3 = fma(x, load(rows, r3 + i), s3)
            s4 = fma(x, load(rows, r4 + i), s4)
            s5 = fma(x, load(rows, r5 + i), s5)
            s6 = fma(x, load(rows, r6 + i), s6)
            s7 = fma(x, load(rows, r7 + i), s7)
        sums = sum_lanes(s0, s1, s2, s3, s4, s5, s6, s7)
        # A register for the factors all along would cost more.
        store(out, j, multiply(sums, splat(out, factor)))


@inner
def accumulate(
    weights: Floats, rows: Floats, width: int, picks: Ints, count: int, out: Floats
) -> None:
    """out += the sum of weights[j] * rows[picks[j]] over j < count."""
    even = count - count % 2
    whole = width - width % (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        # Two rows a step: eight independent sums hide the latency of the multiply-add.
        a0 = load(out, i)
        a1 = load(out, i + LANES)
        a2 = load(out, i + 2 * LANES)
        a3 = load(out, i + 3 * LANES)
        b0 = b1 = b2 = b3 = splat(out, 0)
        for j in range(0, even, 2):
            r = picks[j] * width + i
            x = splat(out, weights[j])
            a0 = fma(x, load(rows, r), a0)
            a1 = fma(x, load(rows, r + LANES), a1)
            a2 = fma(x, load(rows, r + 2 * LANES), a2)
            a3 = fma(x, load(rows, r + 3 * LANES), a3)
            r = picks[j + 1] * width + i
            x = splat(out, weights[j + 1])
            b0 = fma(x, load(rows, r), b0)
            b1 = fma(x, load(rows, r + LANES), b1)
            b2 = fma(x, load(rows, r + 2 * LANES), b2)
            b3 = fma(x, load(rows, r + 3 * LANES), b3)
        if even < count:
            r = picks[even] * width + i
            x = splat(out, weights[even])
            a0 = fma(x, load(rows, r), a0)
            a1 = fma(x, load(rows, r + LANES), a1)
            a2 = fma(x, load(rows, r + 2 * LANES), a2)
            a3 = fma(x, load(rows, r + 3 * LANES), a3)
        store(out, i, add(a0, b0))
        store(out, i + LANES, add(a1, b1))
        store(out, i + 2 * LANES, add(a2, b2))
        store(out, i + 3 * LANES, add(a3, b3))
    for i in range(whole, width, LANES):
        a0 = load(out, i)
        b0 = splat(out, 0)
        for j in range(0, even, 2):
            a0 = fma(splat(out, weights[j]), load(rows, picks[j] * width + i), a0)
            b0 = fma(splat(out, weights[j + 1]), load(rows, picks[j + 1] * width + i), b0)
        if even < count:
            a0 = fma(splat(out, weights[even]), load(rows, picks[even] * width + i), a0)
        store(out, i, add(a0, b0))


@inner
def scatter(weights: Floats, count: int, row: Floats, width: int, out: Floats) -> None:
    """Add weights[j] * row to the j-th row of out, for j < count."""
    for j in range(count):
        x = splat(out, weights[j])
        for i in range(0, width, LANES):
            at = j * width + i
            store(out, at, fma(x, load(row, i), load(out, at)))


@inner
def softmax(scores: Floats, count: int) -> float:
    """Replace a multiple of LANES scores by attention weights; returns the logsumexp.

    Scores of -inf alone give -inf, and the weights are not to be used.
    """
    best = splat(scores, -np.inf)
    for j in range(0, count, LANES):
        best = larger(best, load(scores, j))
    largest = reduce_max(best)
    if largest == -np.inf:
        # A NaN may have been passed over on the way: it is larger than nothing.
        others = 0
        for j in range(count):
            others += scores[j] != -np.inf
        if others == 0:
            return largest
    best = splat(scores, largest)
    totals = splat(scores, 0)
    for j in range(0, count, LANES):
        weight = exp(subtract(load(scores, j), best))
        store(scores, j, weight)
        totals = add(totals, weight)
    total = reduce_sum(totals)
    # Dividing the weights, not the output, keeps the output from overflowing on its way.
    factor = splat(scores, 1 / total)
    for j in range(0, count, LANES):
        store(scores, j, multiply(load(scores, j), factor))
    return largest + math.log(total)


@inner
def score_gradients(scores: Floats, grads: Floats, count: int, lse: float, delta: float) -> None:
    """Replace scores by weights P, and gradients of P by those of the scores.

    `count` is a multiple of LANES.
    """
    lses = splat(scores, lse)
    deltas = splat(scores, delta)
    most = splat(scores, 0)
    for j in range(0, count, LANES):
        # No weight is above one, but the logsumexp of huge scores is not exact enough to say so.
        weight = exp(capped(subtract(load(scores, j), lses), most))
        store(scores, j, weight)
        store(grads, j, multiply(weight, subtract(load(grads, j), deltas)))


@inner
def steepen(grads: Floats, count: int, slopes: Floats) -> None:
    """Gradients of products from those of their capped scores; `count` is rounded up to LANES."""
    for j in range(0, count, LANES):
        store(grads, j, multiply(load(grads, j), load(slopes, j)))


@inner
def list_picks(n0: int, n1: int, n2: int, s0: int, s1: int, s2: int, picks: Ints) -> None:
    """Offsets of an n0 x n1 x n2 box with these strides; the last repeats up to whole vectors."""
    j = 0
    for x in range(n0):
        for y in range(n1):
            for z in range(n2):
                picks[j] = x * s0 + y * s1 + z * s2
                j += 1
    for i in range(j, padded(j)):
        picks[i] = picks[j - 1]


@inner
def list_extras(extra: int, picks: Ints) -> None:
    """The first `extra` rows; the last repeats up to whole vectors."""
    for i in range(padded(extra)):
        picks[i] = min(i, extra - 1)


# What open_row says about a row: its place, where its window starts in the bias, and the window's
# extents, for which the lists of picks were made.
AT, BIAS, LISTED, ROW_SIZE = 0, 3, 6, 9
# What a thread keeps of the box and of its row.
STATE_SIZE = 3 * BLOCK_SIZE + ROW_SIZE


@inner
def open_row(
    index: int, axes: Ints, items: Ints, box: Ints, sign: int, extents: Ints,
    picks: Ints, bias_picks: Ints, row: Ints,
) -> tuple[int, int]:  # fmt: skip
    """Fill `row` and, where the extents of its window are new, the two lists.

    Returns the size of the window and its first row in the packed box.
    """
    size, first, stride, changed = 1, 0, 1, False
    for axis in range(2, -1, -1):
        block = after(box, BLOCK_SIZE * axis)
        at = block[FIRST] + axes[AXIS_SIZE * axis + DILATION] * (index % block[COUNT])
        index = index // block[COUNT]
        item = after(items, 3 * (axes[AXIS_SIZE * axis + ITEM] + at))
        row[AT + axis] = at
        row[BIAS + axis] = item[2] + sign * item[0]
        length = item[1] - item[0]
        changed |= length != row[LISTED + axis]
        row[LISTED + axis] = length
        size *= length
        first += (item[0] - block[LOW]) * stride
        stride *= block[HIGH] - block[LOW]
    if changed:
        n0, n1, n2 = row[LISTED], row[LISTED + 1], row[LISTED + 2]
        z = np.int64(1)
        y = seen(box, z + z)
        list_picks(n0, n1, n2, y * seen(box, z), y, z, picks)
        y = sign * extents[2]
        list_picks(n0, n1, n2, y * extents[1], y, sign, bias_picks)
    return size, first


@inner
def keep_valid(flags: Floats, count: int, picks: Ints, bias_picks: Ints) -> int:
    """Leave out of both lists what is not valid; returns how many are left. `flags` begins with the
    window's first row."""
    kept = 0
    for j in range(count):
        if flags[picks[j]] != 0:
            picks[kept], bias_picks[kept] = picks[j], bias_picks[j]
            kept += 1
    for j in range(kept, padded(kept)):
        picks[j] = picks[kept - 1]
    return kept


@inner
def bias_index(head: int, row: Ints, extents: Ints) -> int:
    at = (head * extents[0] + row[BIAS]) * extents[1] + row[BIAS + 1]
    return at * extents[2] + row[BIAS + 2]


@inner
def score(
    query: Floats, keys: Floats, width: int, picks: Ints, count: int, extra_keys: Floats,
    extra_picks: Ints, extra: int, scale: float, limit: float, slopes: Floats, biased: bool,
    rpb: Floats, bias_picks: Ints, infinity: float, out: Floats,
) -> None:  # fmt: skip
    """The scores of one query: its window's, then the additional keys', each padded with -inf. With
    a `limit` above zero, that of a soft cap, also its `slopes`.

    The scale belongs to the product: where numbers are not finite, scaling a factor of it would not
    be the same.
    """
    dots(query, keys, width, picks, count, scale, out)
    if limit > 0:
        cap(out, count, limit, slopes)
    if biased:
        for j in range(count):
            out[j] += rpb[bias_picks[j]]
    fill(after(out, count), padded(count) - count, -infinity)
    if extra:
        more = after(out, padded(count))
        dots(query, extra_keys, width, extra_picks, extra, scale, more)
        if limit > 0:
            cap(more, extra, limit, after(slopes, padded(count)))
        fill(after(more, extra), padded(extra) - extra, -infinity)


@entry
def forward_loop(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, most: int,
    extras: Ints, sinks: Floats, rpb: Floats, extents: Ints, capacity: int, longest: int,
    work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """Attention of every unit that this thread gets.

    work: keys, values and flags of `capacity` tokens, `most` additional keys and values, a query,
    an output, scores, slopes. lists: two of `longest` picks, one of `most`, STATE_SIZE. extras:
    additional keys of every batch entry, at most `most`. sinks: of every head, or empty. limit: of
    the scores, 0 for none.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale, infinity = work.dtype.type(1), work.dtype.type(scale), work.dtype.type(np.inf)
    zero, forth, biased = work.dtype.type(0), np.int64(1), rpb.size > 0
    limit, sunk, sinks = work.dtype.type(limit), sinks.size > 0, start_of(sinks)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    rpb, extents = start_of(rpb), start_of(extents)

    at = locations(tensors)
    masked = at.key_mask[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    flags = after(values, capacity * width_v)
    extra_keys = after(flags, capacity)
    extra_values = after(extra_keys, most * width)
    query = after(extra_values, most * width_v)
    result = after(query, width)
    scores = after(result, width_v)
    slopes = after(scores, longest + padded(most))

    picks = start_of(lists)
    bias_picks = after(picks, longest)
    extra_picks = after(bias_picks, longest)
    box = after(extra_picks, padded(most))
    row = after(box, 3 * BLOCK_SIZE)
    extras = start_of(extras)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        none, every = np.int64(0), all_seen(box)
        extra = extras[batch]
        list_extras(extra, extra_picks)
        pack_keys(
            at, batch, head_kv, axes, box, none, every, kind, dim, dim_v, one, keys, values, flags
        )
        pack_extras(
            at, batch, head_kv, none, extra, kind, dim, dim_v, one, extra_keys, extra_values
        )
        row[LISTED] = -1
        ahead = 2 * axes[2 * AXIS_SIZE + DILATION]
        for index in range(rows_of(box)):
            count, first = open_row(index, axes, items, box, forth, extents, picks, bias_picks, row)
            valid = flag(at.query_mask, batch, row)
            if masked:
                count = keep_valid(after(flags, first), count, picks, bias_picks)
                row[LISTED] = -1
            for head in range(head_kv * group, (head_kv + 1) * group):
                fill(result, width_v, zero)
                logsumexp = -infinity
                if valid and count + extra > 0:
                    get_row(at.query, batch, head, row, ahead, kind, dim, width, one, query)
                    score(
                        query, after(keys, first * width), width, picks, count, extra_keys,
                        extra_picks, extra, scale, limit, slopes, biased,
                        after(rpb, bias_index(head, row, extents)), bias_picks, infinity, scores,
                    )  # fmt: skip
                    logsumexp = softmax(scores, padded(count) + padded(extra))
                if logsumexp != -infinity:
                    accumulate(
                        scores, after(values, first * width_v), width_v, picks, count, result
                    )
                    more = after(scores, padded(count))
                    accumulate(more, extra_values, width_v, extra_picks, extra, result)
                share = one
                if sunk and valid:
                    share, logsumexp = with_sink(logsumexp, sinks[head], one)
                put_row(at.out, batch, head, row, kind, dim_v, share, result)
                numbers_at(locate_row(at.lse, batch, head, row), keys)[0] = logsumexp


@entry
def backward_queries(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, grad_scale: float,
    most: int, extras: Ints, rpb: Floats, extents: Ints, capacity: int, longest: int,
    only_delta: bool, bias_grads: Floats, extra_grads: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients that a query owns, and each row's `delta` for backward_keys.

    With P the attention weights and S the scores, dS = P * (dP - delta) where
    delta = rowsum(grad_out * out) - grad_logsumexp.

    bias_grads: of every unit, or empty. extra_grads: of every unit `most` keys, which are still to
    be scaled, then as many values, or empty. grad_scale: the factor of the gradients of queries and
    keys. work: as in `forward_loop`, then a gradient of the output and gradients of scores. The
    rest is as there.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale, infinity = work.dtype.type(1), work.dtype.type(scale), work.dtype.type(np.inf)
    grad_scale = work.dtype.type(grad_scale)
    zero, forth, biased = work.dtype.type(0), np.int64(1), rpb.size > 0
    limit = work.dtype.type(limit)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    rpb, extents = start_of(rpb), start_of(extents)
    bias_wanted, extra_wanted = bias_grads.size > 0, extra_grads.size > 0
    bias_grads, extra_grads = start_of(bias_grads), start_of(extra_grads)
    biases = extents[0] * extents[1] * extents[2]

    at = locations(tensors)
    masked = at.key_mask[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    flags = after(values, capacity * width_v)
    extra_keys = after(flags, capacity)
    extra_values = after(extra_keys, most * width)
    query = after(extra_values, most * width_v)
    result = after(query, width)
    grad_row = after(result, max(width, width_v))
    scores = after(grad_row, width_v)
    grads = after(scores, longest + padded(most))
    slopes = after(grads, longest + padded(most))

    picks = start_of(lists)
    bias_picks = after(picks, longest)
    extra_picks = after(bias_picks, longest)
    box = after(extra_picks, padded(most))
    row = after(box, 3 * BLOCK_SIZE)
    extras = start_of(extras)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        none, every = np.int64(0), all_seen(box)
        extra = extras[batch]
        list_extras(extra, extra_picks)
        if not only_delta:
            pack_keys(
                at, batch, head_kv, axes, box, none, every, kind, dim, dim_v, one, keys, values,
                flags,
            )  # fmt: skip
            pack_extras(
                at, batch, head_kv, none, extra, kind, dim, dim_v, one, extra_keys, extra_values
            )
        row[LISTED] = -1
        ahead = 2 * axes[2 * AXIS_SIZE + DILATION]
        for index in range(rows_of(box)):
            count, first = open_row(index, axes, items, box, forth, extents, picks, bias_picks, row)
            if masked and not only_delta:
                count = keep_valid(after(flags, first), count, picks, bias_picks)
                row[LISTED] = -1
            for head in range(head_kv * group, (head_kv + 1) * group):
                get_row(at.out, batch, head, row, ahead, kind, dim_v, width_v, one, result)
                get_row(at.grad_out, batch, head, row, ahead, kind, dim_v, width_v, one, grad_row)
                delta = dot(result, grad_row, width_v)
                if at.grad_lse[ADDRESS]:
                    delta -= numbers_at(locate_row(at.grad_lse, batch, head, row), keys)[0]
                numbers_at(locate_row(at.delta, batch, head, row), keys)[0] = delta
                if only_delta:
                    continue
                fill(result, width, zero)
                lse = numbers_at(locate_row(at.lse, batch, head, row), keys)[0]
                if lse != -infinity:
                    get_row(at.query, batch, head, row, ahead, kind, dim, width, one, query)
                    score(
                        query, after(keys, first * width), width, picks, count, extra_keys,
                        extra_picks, extra, scale, limit, slopes, biased,
                        after(rpb, bias_index(head, row, extents)), bias_picks, infinity, scores,
                    )  # fmt: skip
                    value_rows = after(values, first * width_v)
                    dots(grad_row, value_rows, width_v, picks, count, one, grads)
                    more, more_grads = after(scores, padded(count)), after(grads, padded(count))
                    dots(grad_row, extra_values, width_v, extra_picks, extra, one, more_grads)
                    score_gradients(scores, grads, padded(count) + padded(extra), lse, delta)
                    if bias_wanted:
                        first_bias = unit * group * biases
                        first_bias += bias_index(head - head_kv * group, row, extents)
                        for j in range(count):
                            bias_grads[first_bias + bias_picks[j]] += grads[j]
                    if limit > 0:
                        steepen(grads, padded(count) + padded(extra), slopes)
                    accumulate(grads, after(keys, first * width), width, picks, count, result)
                    accumulate(more_grads, extra_keys, width, extra_picks, extra, result)
                    if extra_wanted:
                        out = after(extra_grads, unit * most * (width + width_v))
                        scatter(more_grads, extra, query, width, out)
                        scatter(more, extra, grad_row, width_v, after(out, most * width))
                put_row(at.grad_query, batch, head, row, kind, dim, grad_scale, result)


@entry
def backward_keys(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, grad_scale: float,
    rpb: Floats, extents: Ints, capacity: int, longest: int, rows: int, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over the queries that see them.

    work: of `capacity` queries the vectors, their output gradients, logsumexp and delta; of `rows`
    keys both gradients; a key, a value, scores, their gradients and slopes. lists: two of `longest`
    picks, STATE_SIZE.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale, zero = work.dtype.type(1), work.dtype.type(scale), work.dtype.type(0)
    infinity, grad_scale = work.dtype.type(np.inf), work.dtype.type(grad_scale)
    back, biased = np.int64(-1), rpb.size > 0
    limit = work.dtype.type(limit)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    rpb, extents = start_of(rpb), start_of(extents)

    at = locations(tensors)

    queries = start_of(work)
    grad_rows = after(queries, capacity * width)
    lse = after(grad_rows, capacity * width_v)
    delta = after(lse, capacity)
    grad_keys = after(delta, capacity)
    grad_values = after(grad_keys, rows * width)
    key = after(grad_values, rows * width_v)
    value = after(key, width)
    scores = after(value, width_v)
    grads = after(scores, longest)
    slopes = after(grads, longest)

    picks = start_of(lists)
    bias_picks = after(picks, longest)
    box = after(bias_picks, longest)
    row = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        none, every = np.int64(0), all_seen(box)
        members = rows_of(box)
        fill(grad_keys, members * width, zero)
        fill(grad_values, members * width_v, zero)
        ahead = 2 * axes[2 * AXIS_SIZE + DILATION]
        for head in range(head_kv * group, (head_kv + 1) * group):
            pack_queries(
                at, batch, head, axes, box, none, every, kind, dim, dim_v, one, infinity, queries,
                grad_rows, lse, delta,
            )  # fmt: skip
            row[LISTED] = -1
            for index in range(members):
                count, first = open_row(
                    index, axes, items, box, back, extents, picks, bias_picks, row
                )
                if not flag(at.key_mask, batch, row):
                    continue
                get_row(at.key, batch, head_kv, row, ahead, kind, dim, width, one, key)
                get_row(at.value, batch, head_kv, row, ahead, kind, dim_v, width_v, one, value)
                window = after(queries, first * width)
                window_grads = after(grad_rows, first * width_v)
                dots(key, window, width, picks, count, scale, scores)
                dots(value, window_grads, width_v, picks, count, one, grads)
                if limit > 0:
                    cap(scores, count, limit, slopes)
                if biased:
                    bias = after(rpb, bias_index(head, row, extents))
                    for j in range(count):
                        scores[j] += bias[bias_picks[j]]
                window_lse, window_delta = after(lse, first), after(delta, first)
                for j in range(count):
                    logsumexp = window_lse[picks[j]]
                    empty = logsumexp == -infinity
                    scores[j] = -infinity if empty else scores[j] - logsumexp
                    grads[j] = zero if empty else grads[j] - window_delta[picks[j]]
                score_gradients(scores, grads, padded(count), zero, zero)
                if limit > 0:
                    steepen(grads, count, slopes)
                accumulate(grads, window, width, picks, count, after(grad_keys, index * width))
                accumulate(
                    scores, window_grads, width_v, picks, count, after(grad_values, index * width_v)
                )
        for index in range(members):
            open_row(index, axes, items, box, back, extents, picks, bias_picks, row)
            put_row(
                at.grad_key, batch, head_kv, row, kind, dim, grad_scale,
                after(grad_keys, index * width),
            )  # fmt: skip
            put_row(
                at.grad_value, batch, head_kv, row, kind, dim_v, one,
                after(grad_values, index * width_v),
            )  # fmt: skip


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output and the logsumexp."""
    tensors = forward_tensors(problem, inputs)
    sweep = query_sweep(problem, torch.get_num_threads())
    bias, sinks = precise(problem, inputs.rpb), precise(problem, inputs.sink)
    arguments = (
        table(tensors), *numbers(problem), problem.num_additional,
        lengths(problem, inputs), array_of(sinks), array_of(bias),
        bias_extents(problem), sweep.capacity, sweep.longest,
    )  # fmt: skip
    launch(forward_loop, sweep, arguments, *_memory(problem, sweep, 1, 2), numpy_type(problem))
    return tensors.out, tensors.lse


def _memory(problem: Problem, sweep: Sweep, rows: int, lists: int) -> tuple[int, int]:
    """Numbers of `work` and of `lists` that a loop over queries takes, with so many pairs of rows
    and so many lists of scores."""
    longest, extra = plan.padded(sweep.longest), plan.padded(problem.num_additional)
    tokens = sweep.capacity + problem.num_additional + rows
    width = plan.padded(problem.head_dim) + plan.padded(problem.head_dim_v)
    work = tokens * width + sweep.capacity + lists * (longest + extra)
    return work, 2 * longest + extra + STATE_SIZE


def backward(
    problem: Problem, inputs: Inputs, results: Results, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients of the six differentiable inputs."""
    tensors = backward_tensors(problem, inputs, results)
    places, threads = table(tensors), torch.get_num_threads()
    dtype, rpb, extra = numpy_type(problem), inputs.rpb, problem.num_additional
    width, width_v = plan.padded(problem.head_dim), plan.padded(problem.head_dim_v)
    needs_extra = extra > 0 and (needs[4] or needs[5])
    needs_queries = needs[0] or needs[3] or needs_extra
    bias, extents = precise(problem, rpb), bias_extents(problem)
    shared = (places, *numbers(problem), problem.gradient_scale)

    # The gradients of additional keys are sums over the boxes of their batch entry.
    sweep = query_sweep(problem, threads, fixed=needs_extra)
    biases = problem.heads // problem.heads_kv * int(extents.prod())
    needs_bias = rpb is not None and needs[3]
    bias_grads = bias.new_zeros(sweep.units * biases * needs_bias)
    extra_grads = bias.new_zeros(sweep.units * extra * (width + width_v) * needs_extra)
    arguments = (
        *shared, extra, lengths(problem, inputs), array_of(bias), extents,
        sweep.capacity, sweep.longest, not needs_queries, array_of(bias_grads),
        array_of(extra_grads),
    )  # fmt: skip
    launch(backward_queries, sweep, arguments, *_memory(problem, sweep, 2, 3), dtype)

    if needs[1] or needs[2]:
        key_units = key_sweep(problem, threads)
        longest = plan.padded(key_units.longest)
        arguments = (
            *shared, array_of(bias), extents, key_units.capacity, key_units.longest, key_units.rows
        )  # fmt: skip
        work = (key_units.capacity + key_units.rows + 1) * (width + width_v)
        work += 2 * key_units.capacity + 3 * longest
        launch(backward_keys, key_units, arguments, work, 2 * longest + STATE_SIZE, dtype)

    grad_rpb = grad_extra_keys = grad_extra_values = None
    if rpb is not None and needs[3]:
        # The sum runs over batch entries and boxes, always in this order.
        of_boxes = bias_grads.view(-1, problem.heads_kv, biases)
        grad_rpb = of_boxes.sum(0).view(rpb.shape).to(rpb.dtype)
    if needs_extra:
        of_entries = extra_grads.view(problem.batch, sweep.boxes, problem.heads_kv, -1).sum(1)
        keys, values = of_entries.split([extra * width, extra * width_v], -1)

        def features(part: Tensor, size: int) -> Tensor:
            part = part.view(problem.batch, problem.heads_kv, extra, -1)[..., :size]
            return part.transpose(1, 2).to(problem.dtype).contiguous()

        grad_extra_keys = features(keys * problem.gradient_scale, problem.head_dim)
        grad_extra_values = features(values, problem.head_dim_v)
    gradients = tensors.grad_query, tensors.grad_key, tensors.grad_value
    return (*gradients, grad_rpb, grad_extra_keys, grad_extra_values)


__all__ = ["backward", "forward"]
