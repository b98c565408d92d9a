"""Compiled loops of the CPU backend: attention a block at a time.

A vector's lanes are a patch: up to WIDE neighboring queries (or, for the gradients of keys and
values, keys). The patch takes one by one the tokens that its windows cover together, whose rows lie
packed as in kernels.py, a chunk at a time. Scores are vectors of the patch, one for each such
token; so are features of the patch's own rows, which are transposed as they are read and written.
Both products then multiply one number of a packed row with one vector, and every loaded number
serves the whole patch. What a lane does not see is masked.

The units of work are boxes as in kernels.py, of many patches, so that a packed chunk serves many.
Neither the batch nor the number of threads decides about patches, boxes and chunks: the order in
which a row's numbers are summed, and so its bits, depend on its own problem alone.

Weights of zero multiply what a lane does not see, and zero times infinity is not zero: `failed`
says of which batch entries packed rows are not all finite, whose results are to be thrown away.
"""

from __future__ import annotations

import math

import numpy as np

from natten.functional.backends.cpu.kernels import (
    ADDRESS,
    AXIS_SIZE,
    BLOCK_SIZE,
    COUNT,
    DILATION,
    FIRST,
    HIGH,
    ITEM,
    LOW,
    TENSOR_SIZE,
    all_seen,
    cap,
    dot,
    fill,
    flag,
    get_row,
    locate_row,
    open_unit,
    pack,
    pack_flags,
    put_row,
    seen,
    steepen,
    with_sink,
)
from natten.functional.backends.cpu.vectors import (
    FEW_DOTS,
    FEW_SUMS,
    FLOATING,
    LANES,
    MANY_DOTS,
    MANY_SUMS,
    WIDE,
    Floats,
    Ints,
    add,
    after,
    capped,
    entry,
    exp,
    few_dots,
    few_sums,
    fma,
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

# A patch and a chunk: the first token of the chunk and one past the last that the patch sees along
# each axis; the lanes that hold rows; the place of each lane's row; and for each axis and token
# along it the lanes that see it.
SIGHT, ACTIVE, PLACES = 0, 6, 7
SEERS = PLACES + 3 * WIDE
# What open_patch writes behind the seers.
PATCH_SIZE = SEERS + 6 + 3 * WIDE


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
    tensor: Ints, batch: int, reach: int, patch: Ints,
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
    patch[ACTIVE] = 0
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
                    by_row[i] |= bit
                    by_row[WIDE + j] |= bit
                    by_row[2 * WIDE + k] |= bit
    for axis in range(3):
        seers, sight = after(patch, SEERS + axis * reach), after(patch, SIGHT + 2 * axis)
        step = 3 * axes[AXIS_SIZE * axis + DILATION]
        item = after(items, 3 * (axes[AXIS_SIZE * axis + ITEM] + starts[axis]))
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
    patch: Ints, reach: int, box: Ints, begin: int, end: int, flagged: bool, flags: Ints,
    picks: Ints, bits: Ints,
) -> int:  # fmt: skip
    """Of a chunk, from `begin` to `end` of the box's tokens, those that a patch sees, and the lanes
    that see each. The last is repeated for no lane up to whole FEW_DOTS. Leaves out what is flagged
    with zero."""
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
            first = max(patch[SIGHT + 4], -line)
            last = min(patch[SIGHT + 5], end - begin - line)
            if flagged:
                for z in range(first, last):
                    picks[count], bits[count] = line + z, see & seers_z[z]
                    count += flags[line + z] != 0
            else:
                for z in range(first, last):
                    picks[count], bits[count] = line + z, see & seers_z[z]
                    count += 1
    for i in range(count, (count + FEW_DOTS - 1) // FEW_DOTS * FEW_DOTS):
        picks[i], bits[i] = picks[count - 1], 0
    return count


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
def bend(scores: Floats, count: int, scale: float, limit: float, slopes: Floats) -> None:
    """Scale and cap `count` vectors of scores."""
    factors = splat(scores, scale)
    for i in range(0, count * WIDE, LANES):
        store(scores, i, multiply(load(scores, i), factors))
    cap(scores, count * WIDE, limit, slopes)


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
def forward(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, shift: float, sinks: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """Attention of every unit that this thread gets.

    tensors: query, key, value, out, logsumexp, masks of keys and queries (address 0 for none).
    extents: of a patch. reach: see open_patch. capacity: tokens of a chunk. shift: the logarithm of
    the largest window, which keeps sums of weights below one, so that a sum of values never
    overflows. work: keys and values of a chunk, scores and slopes, rows of a patch; for each patch
    and head of a unit query, output, best score and sum of weights. lists: picks, bits and flags of
    a chunk, a patch, a box.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    shift, sunk, sinks = work.dtype.type(shift), sinks.size > 0, start_of(sinks)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents = start_of(extents)

    query_at = start_of(tensors)
    key_at = after(query_at, TENSOR_SIZE)
    value_at = after(key_at, TENSOR_SIZE)
    out_at = after(value_at, TENSOR_SIZE)
    lse_at = after(out_at, TENSOR_SIZE)
    key_mask_at = after(lse_at, TENSOR_SIZE)
    query_mask_at = after(key_mask_at, TENSOR_SIZE)
    flagged = key_mask_at[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    scores = after(values, capacity * width_v)
    slopes = after(scores, (capacity + FEW_DOTS) * WIDE)
    rows = after(slopes, (capacity + FEW_DOTS) * WIDE)
    states = after(rows, WIDE * max(width, width_v))
    state_size = (width + width_v + 2) * WIDE

    picks = start_of(lists)
    bits = after(picks, capacity + FEW_DOTS)
    flags = after(bits, capacity + FEW_DOTS)
    box = after(flags, capacity)
    patch = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        every, patches = all_seen(box), patches_of(box, extents)
        begin = np.int64(0)
        while begin == 0 or begin < every:
            end = min(begin + capacity, every)
            pack(key_at, batch, head_kv, axes, box, begin, end, kind, dim, width, one, keys)
            pack(value_at, batch, head_kv, axes, box, begin, end, kind, dim_v, width_v, one, values)
            pack_flags(key_mask_at, batch, axes, box, begin, end, flags)
            if flagged:
                for j in range(end - begin):
                    if flags[j] == 0:
                        fill(after(values, j * width_v), width_v, zero)
            if not all_finite(values, (end - begin) * width_v, zero):
                failed[batch] = 1
            for index in range(patches):
                open_patch(
                    index, extents, axes, items, box, begin, end, query_mask_at, batch, reach, patch
                )
                count = list_seen(patch, reach, box, begin, end, flagged, flags, picks, bits)
                for part in range(group):
                    head = head_kv * group + part
                    query = after(states, (index * group + part) * state_size)
                    result = after(query, width * WIDE)
                    best = after(result, width_v * WIDE)
                    total = after(best, WIDE)
                    if begin == 0:
                        get_rows(query_at, batch, head, patch, kind, dim, width, one, rows, query)
                        fill(result, width_v * WIDE, zero)
                        fill(best, WIDE, -infinity)
                        fill(total, WIDE, zero)
                    if count > 0:
                        dots(keys, width, picks, count, query, scores)
                        factor = scale
                        if limit > 0:
                            bend(scores, count, scale, limit, slopes)
                            factor = one
                        weigh(
                            scores, bits, count, factor, infinity, shift, best, total, result,
                            width_v,
                        )  # fmt: skip
                        accumulate(scores, values, width_v, picks, count, result)
                    if end == every:
                        for lane in range(WIDE):
                            logsumexp, share = -infinity, zero
                            if total[lane] != 0:
                                share = one / total[lane]
                                base = zero if best[lane] == -infinity else best[lane]
                                logsumexp = base + shift + math.log(total[lane])
                            if patch[ACTIVE] >> np.int64(lane) & 1:
                                place = after(patch, PLACES + 3 * lane)
                                if sunk and flag(query_mask_at, batch, place):
                                    less, logsumexp = with_sink(logsumexp, sinks[head], one)
                                    share *= less
                                address = locate_row(lse_at, batch, head, place)
                                numbers_at(address, keys)[0] = logsumexp
                            total[lane] = share
                        shares = load_wide(total, 0)
                        for i in range(0, width_v * WIDE, WIDE):
                            store(result, i, multiply(load_wide(result, i), shares))
                        put_rows(
                            out_at, batch, head, patch, kind, dim_v, width_v, one, result, rows
                        )
            begin = max(end, np.int64(1))


@inner
def weights_of_queries(
    scores: Floats, grads: Floats, bits: Ints, count: int, scale: float, lse: Floats, delta: Floats
) -> None:
    """Replace scores by weights P, and gradients of P by those of the scores. Lanes are queries."""
    scales, zeros = splat_wide(scores, scale), splat_wide(scores, scale - scale)
    lses, deltas = load_wide(lse, 0), load_wide(delta, 0)
    for j in range(count):
        at = j * WIDE
        score = subtract(multiply(load_wide(scores, at), scales), lses)
        # No weight is above one, but the logsumexp of huge scores is not exact enough to say so.
        weight = masked(bits[j], exp(capped(score, zeros)), zeros)
        grad = multiply(weight, subtract(load_wide(grads, at), deltas))
        store(scores, at, weight)
        store(grads, at, masked(bits[j], grad, zeros))


@inner
def weights_of_keys(
    scores: Floats, grads: Floats, bits: Ints, picks: Ints, count: int, scale: float, lse: Floats,
    delta: Floats,
) -> None:  # fmt: skip
    """The same where lanes are keys, and what a chunk holds, queries."""
    scales, zeros = splat_wide(scores, scale), splat_wide(scores, scale - scale)
    for j in range(count):
        at = j * WIDE
        lses, deltas = splat_wide(lse, lse[picks[j]]), splat_wide(delta, delta[picks[j]])
        score = subtract(multiply(load_wide(scores, at), scales), lses)
        weight = masked(bits[j], exp(capped(score, zeros)), zeros)
        grad = multiply(weight, subtract(load_wide(grads, at), deltas))
        store(scores, at, weight)
        store(grads, at, masked(bits[j], grad, zeros))


@entry
def backward_queries(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, grad_scale: float, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of queries, and each row's `delta` for backward_keys.

    tensors: query, key, value, out, logsumexp, grad_out, grad_logsumexp (address 0 for none),
    delta, grad_query, mask of keys (address 0 for none). work: keys and values of a chunk, scores,
    gradients and slopes, two rows of a patch; for each patch and head of a unit query, grad_out,
    logsumexp, delta, grad_query. The rest is as in `forward` and in kernels.py.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    grad_scale = work.dtype.type(grad_scale)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents = start_of(extents)

    query_at = start_of(tensors)
    key_at = after(query_at, TENSOR_SIZE)
    value_at = after(key_at, TENSOR_SIZE)
    out_at = after(value_at, TENSOR_SIZE)
    lse_at = after(out_at, TENSOR_SIZE)
    grad_out_at = after(lse_at, TENSOR_SIZE)
    grad_lse_at = after(grad_out_at, TENSOR_SIZE)
    delta_at = after(grad_lse_at, TENSOR_SIZE)
    grad_query_at = after(delta_at, TENSOR_SIZE)
    key_mask_at = after(grad_query_at, TENSOR_SIZE)
    no_mask = after(key_mask_at, TENSOR_SIZE)
    flagged = key_mask_at[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    scores = after(values, capacity * width_v)
    grads = after(scores, (capacity + FEW_DOTS) * WIDE)
    slopes = after(grads, (capacity + FEW_DOTS) * WIDE)
    rows = after(slopes, (capacity + FEW_DOTS) * WIDE)
    outs = after(rows, WIDE * max(width, width_v))
    states = after(outs, WIDE * max(width, width_v))
    state_size = (2 * width + width_v + 2) * WIDE

    picks = start_of(lists)
    bits = after(picks, capacity + FEW_DOTS)
    flags = after(bits, capacity + FEW_DOTS)
    box = after(flags, capacity)
    patch = after(box, 3 * BLOCK_SIZE)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        every, patches = all_seen(box), patches_of(box, extents)
        begin = np.int64(0)
        while begin == 0 or begin < every:
            end = min(begin + capacity, every)
            pack(key_at, batch, head_kv, axes, box, begin, end, kind, dim, width, one, keys)
            pack(value_at, batch, head_kv, axes, box, begin, end, kind, dim_v, width_v, one, values)
            pack_flags(key_mask_at, batch, axes, box, begin, end, flags)
            if flagged:
                for j in range(end - begin):
                    if flags[j] == 0:
                        fill(after(keys, j * width), width, zero)
            if not all_finite(keys, (end - begin) * width, zero):
                failed[batch] = 1
            for index in range(patches):
                open_patch(
                    index, extents, axes, items, box, begin, end, no_mask, batch, reach, patch
                )
                count = list_seen(patch, reach, box, begin, end, flagged, flags, picks, bits)
                for part in range(group):
                    head = head_kv * group + part
                    query = after(states, (index * group + part) * state_size)
                    grad_out = after(query, width * WIDE)
                    lse = after(grad_out, width_v * WIDE)
                    delta = after(lse, WIDE)
                    grad_query = after(delta, WIDE)
                    if begin == 0:
                        get_rows(query_at, batch, head, patch, kind, dim, width, one, rows, query)
                        get_rows(
                            out_at, batch, head, patch, kind, dim_v, width_v, one, outs, grad_out
                        )
                        get_rows(
                            grad_out_at, batch, head, patch, kind, dim_v, width_v, one, rows,
                            grad_out,
                        )  # fmt: skip
                        get_numbers(lse_at, batch, head, patch, -infinity, lse)
                        fill(delta, WIDE, zero)
                        if grad_lse_at[ADDRESS]:
                            get_numbers(grad_lse_at, batch, head, patch, zero, delta)
                        for lane in range(WIDE):
                            place = after(patch, PLACES + 3 * lane)
                            at = lane * width_v
                            delta[lane] = (
                                dot(after(outs, at), after(rows, at), width_v) - delta[lane]
                            )
                            if patch[ACTIVE] >> np.int64(lane) & 1:
                                address = locate_row(delta_at, batch, head, place)
                                numbers_at(address, keys)[0] = delta[lane]
                            # Those without weights get none.
                            if lse[lane] == -infinity:
                                lse[lane] = infinity
                        fill(grad_query, width * WIDE, zero)
                    if count > 0:
                        dots(keys, width, picks, count, query, scores)
                        dots(values, width_v, picks, count, grad_out, grads)
                        factor = scale
                        if limit > 0:
                            bend(scores, count, scale, limit, slopes)
                            factor = one
                        weights_of_queries(scores, grads, bits, count, factor, lse, delta)
                        if limit > 0:
                            steepen(grads, count * WIDE, slopes)
                        accumulate(grads, keys, width, picks, count, grad_query)
                    if end == every:
                        put_rows(
                            grad_query_at, batch, head, patch, kind, dim, width, grad_scale,
                            grad_query, rows,
                        )  # fmt: skip
            begin = max(end, np.int64(1))


@entry
def backward_keys(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, extents: Ints,
    reach: int, capacity: int, failed: Ints, grad_scale: float, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over the queries that see them.

    tensors: query, key, value, logsumexp, grad_out, delta, grad_key, grad_value, mask of keys
    (address 0 for none). work: of a chunk the queries, their output gradients, logsumexp and delta,
    scores, gradients and slopes; rows of a patch; for each patch of a unit key, value and both
    gradients. The rest is as in `forward`.
    """
    width, width_v = padded(dim), padded(dim_v)
    one, zero, scale = work.dtype.type(1), work.dtype.type(0), work.dtype.type(scale)
    limit, infinity = work.dtype.type(limit), work.dtype.type(np.inf)
    grad_scale = work.dtype.type(grad_scale)
    single, floating = np.int64(1), np.int64(FLOATING)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    extents = start_of(extents)

    query_at = start_of(tensors)
    key_at = after(query_at, TENSOR_SIZE)
    value_at = after(key_at, TENSOR_SIZE)
    lse_at = after(value_at, TENSOR_SIZE)
    grad_out_at = after(lse_at, TENSOR_SIZE)
    delta_at = after(grad_out_at, TENSOR_SIZE)
    grad_key_at = after(delta_at, TENSOR_SIZE)
    grad_value_at = after(grad_key_at, TENSOR_SIZE)
    key_mask_at = after(grad_value_at, TENSOR_SIZE)

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
    flags = after(bits, capacity + FEW_DOTS)
    box = after(flags, capacity)
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
                pack(query_at, batch, head, axes, box, begin, end, kind, dim, width, one, queries)
                pack(
                    grad_out_at, batch, head, axes, box, begin, end, kind, dim_v, width_v, one,
                    grad_rows,
                )  # fmt: skip
                pack(lse_at, batch, head, axes, box, begin, end, floating, single, single, one, lse)
                pack(
                    delta_at, batch, head, axes, box, begin, end, floating, single, single, one,
                    delta,
                )  # fmt: skip
                # A query that attends to nothing gives nothing, whatever it and its gradient hold.
                for j in range(length):
                    flags[j] = lse[j] != -infinity
                    if not flags[j]:
                        fill(after(queries, j * width), width, zero)
                        fill(after(grad_rows, j * width_v), width_v, zero)
                if not (
                    all_finite(queries, length * width, zero)
                    and all_finite(grad_rows, length * width_v, zero)
                ):
                    failed[batch] = 1
                for index in range(patches):
                    open_patch(
                        index,
                        extents,
                        axes,
                        items,
                        box,
                        begin,
                        end,
                        key_mask_at,
                        batch,
                        reach,
                        patch,
                    )
                    count = list_seen(patch, reach, box, begin, end, True, flags, picks, bits)
                    key = after(states, index * state_size)
                    value = after(key, width * WIDE)
                    grad_key = after(value, width_v * WIDE)
                    grad_value = after(grad_key, width * WIDE)
                    if begin == 0 and part == 0:
                        get_rows(key_at, batch, head_kv, patch, kind, dim, width, one, rows, key)
                        get_rows(
                            value_at, batch, head_kv, patch, kind, dim_v, width_v, one, rows, value
                        )
                        fill(grad_key, (width + width_v) * WIDE, zero)
                    if count > 0:
                        dots(queries, width, picks, count, key, scores)
                        dots(grad_rows, width_v, picks, count, value, grads)
                        factor = scale
                        if limit > 0:
                            bend(scores, count, scale, limit, slopes)
                            factor = one
                        weights_of_keys(scores, grads, bits, picks, count, factor, lse, delta)
                        if limit > 0:
                            steepen(grads, count * WIDE, slopes)
                        accumulate(grads, queries, width, picks, count, grad_key)
                        accumulate(scores, grad_rows, width_v, picks, count, grad_value)
                    if end == every and part == group - 1:
                        put_rows(
                            grad_key_at, batch, head_kv, patch, kind, dim, width, grad_scale,
                            grad_key, rows,
                        )  # fmt: skip
                        put_rows(
                            grad_value_at, batch, head_kv, patch, kind, dim_v, width_v, one,
                            grad_value, rows,
                        )  # fmt: skip
                begin = max(end, np.int64(1))
