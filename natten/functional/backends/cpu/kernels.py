"""Compiled loops of the CPU backend: attention over a list of key rows, one query at a time.

The unit of work is a box of queries (or, for the gradients of keys and values, a box of keys) of
one batch entry, one key head and one residue of the dilation. A thread copies the rows that the box
can see into a contiguous, zero-padded scratch array in the compute type; every stride, storage type
and dilation ends there. A row's window is then a list of `picks`, offsets into the scratch array
relative to the window's first row; the list changes only where the window's extents do.
"""

from __future__ import annotations

import math

import numpy as np

from natten.functional.backends.cpu.vectors import (
    BFLOAT16,
    FLOATING,
    LANES,
    Floats,
    Ints,
    add,
    after,
    bytes_at,
    capped,
    entry,
    exp,
    fma,
    halves_at,
    inner,
    larger,
    load,
    multiply,
    narrow_bfloat16,
    narrow_float16,
    numbers_at,
    padded,
    prefetch,
    reduce_max,
    reduce_sum,
    splat,
    start_of,
    store,
    subtract,
    sum_lanes,
    take_ticket,
    tanh,
    widen_bfloat16,
    widen_float16,
)


@inner
def read_row(
    address: int,
    step: int,
    count: int,
    kind: int,
    factor: float,
    ahead: int,
    out: Floats,
    width: int,
) -> None:
    """out = factor * the `count` numbers `step` elements apart at `address`, then zeros to `width`.

    Asks for the row `ahead` bytes further on.
    """
    if kind == FLOATING:
        source = numbers_at(address, out)
        whole = count - count % LANES if step == 1 else 0
        factors = splat(out, factor)
        for i in range(0, whole, LANES):
            prefetch(address + ahead, out, i)
            store(out, i, multiply(load(source, i), factors))
        for i in range(whole, count):
            out[i] = source[i * step] * factor
    else:
        halves = halves_at(address)
        # The loops over neighbors are written apart, because only they become vector code.
        if kind == BFLOAT16 and step == 1:
            for i in range(count):
                out[i] = widen_bfloat16(halves[i]) * factor
        elif kind == BFLOAT16:
            for i in range(count):
                out[i] = widen_bfloat16(halves[i * step]) * factor
        elif step == 1:
            for i in range(count):
                out[i] = widen_float16(halves[i]) * factor
        else:
            for i in range(count):
                out[i] = widen_float16(halves[i * step]) * factor
    for i in range(count, width):
        out[i] = 0


@inner
def write_row(
    values: Floats, count: int, kind: int, factor: float, address: int, step: int
) -> None:
    """The reverse of read_row."""
    if kind == FLOATING:
        target = numbers_at(address, values)
        whole = count - count % LANES if step == 1 else 0
        factors = splat(values, factor)
        for i in range(0, whole, LANES):
            store(target, i, multiply(load(values, i), factors))
        for i in range(whole, count):
            target[i * step] = values[i] * factor
    else:
        halves = halves_at(address)
        if kind == BFLOAT16 and step == 1:
            for i in range(count):
                halves[i] = narrow_bfloat16(values[i] * factor)
        elif kind == BFLOAT16:
            for i in range(count):
                halves[i * step] = narrow_bfloat16(values[i] * factor)
        elif step == 1:
            for i in range(count):
                halves[i] = narrow_float16(values[i] * factor)
        else:
            for i in range(count):
                halves[i * step] = narrow_float16(values[i] * factor)


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
def dot(a: Floats, b: Floats, width: int) -> float:
    """a . b, of a multiple of LANES numbers."""
    total = splat(a, 0)
    for i in range(0, width, LANES):
        total = fma(load(a, i), load(b, i), total)
    return reduce_sum(total)


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
def with_sink(lse: float, sink: float, one: float) -> tuple[float, float]:
    """What outputs are multiplied with that a sink joins, and the logsumexp with it."""
    if lse == -np.inf:
        return one, sink
    top = max(lse, sink)
    total = top + math.log(math.exp(lse - top) + math.exp(sink - top))
    return math.exp(lse - total), total


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
def cap(scores: Floats, count: int, limit: float, slopes: Floats) -> None:
    """Replace scores s by limit * tanh(s / limit), and write the derivative of that to `slopes`.

    `count` is rounded up to LANES.
    """
    limits, parts, ones = splat(scores, limit), splat(scores, 1 / limit), splat(scores, 1)
    for j in range(0, count, LANES):
        share = tanh(multiply(load(scores, j), parts))
        store(slopes, j, subtract(ones, multiply(share, share)))
        store(scores, j, multiply(share, limits))


@inner
def steepen(grads: Floats, count: int, slopes: Floats) -> None:
    """Gradients of products from those of their capped scores; `count` is rounded up to LANES."""
    for j in range(0, count, LANES):
        store(grads, j, multiply(load(grads, j), load(slopes, j)))


@inner
def fill(start: Floats, count: int, value: float) -> None:
    for i in range(count):
        start[i] = value


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


# The tables of a sweep, all int64. "Rows" are queries in `forward` and `backward_queries`, keys in
# `backward_keys`; "the others" are what a row sees. Axes are padded to three.
#   axes     for each axis: first entry in `items`, first in `blocks`, number of blocks, dilation,
#            and how many of the others make a ring, which lo and hi may leave by less than its size
#   items    for each row of an axis: lo and hi, the others that it sees, counted inside its residue
#            of the dilation; what turns such a count into an index of the relative position bias
#   blocks   first row, number of rows, first of the others, lo and hi of all rows together
#   tensors  address, byte strides of batch, three axes and heads, element stride of head_dim
ITEM, BLOCK, BLOCKS, DILATION, RING, AXIS_SIZE = 0, 1, 2, 3, 4, 5
FIRST, COUNT, OTHER, LOW, HIGH, BLOCK_SIZE = 0, 1, 2, 3, 4, 5
ADDRESS, BATCH, AXES, HEADS, FEATURES, TENSOR_SIZE = 0, 1, 2, 5, 6, 7
# What open_row says about a row: its place, where its window starts in the bias, and the window's
# extents, for which the lists of picks were made.
AT, BIAS, LISTED, ROW_SIZE = 0, 3, 6, 9
# Tables of three axes that a thread keeps for itself.
STATE_SIZE = 3 * BLOCK_SIZE + ROW_SIZE


@inner
def open_unit(unit: int, axes: Ints, blocks: Ints, heads: int, box: Ints) -> tuple[int, int]:
    """Fill `box` with the unit's block of each axis; returns its batch entry and its head."""
    # Heads follow each other: they share pages of memory.
    head = unit % heads
    unit = unit // heads
    for axis in range(2, -1, -1):
        number = axes[AXIS_SIZE * axis + BLOCKS]
        block = axes[AXIS_SIZE * axis + BLOCK] + unit % number
        for i in range(BLOCK_SIZE):
            box[BLOCK_SIZE * axis + i] = blocks[BLOCK_SIZE * block + i]
        unit = unit // number
    return unit, head


@inner
def rows_of(box: Ints) -> int:
    return box[COUNT] * box[BLOCK_SIZE + COUNT] * box[2 * BLOCK_SIZE + COUNT]


@inner
def seen(box: Ints, axis: int) -> int:
    return box[BLOCK_SIZE * axis + HIGH] - box[BLOCK_SIZE * axis + LOW]


@inner
def all_seen(box: Ints) -> int:
    return seen(box, 0) * seen(box, 1) * seen(box, 2)


@inner
def lines_of(box: Ints, begin: int, end: int) -> tuple[int, int]:
    """The lines along the last axis that hold the others from `begin` to `end` of a box."""
    row = seen(box, 2)
    if end <= begin:
        return 0, 0
    return begin // row, (end + row - 1) // row


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
def flag(tensor: Ints, batch: int, row: Ints) -> bool:
    """Whether a mask, if there is one, has a row valid."""
    if tensor[ADDRESS] == 0:
        return True
    return bytes_at(locate_row(tensor, batch, 0, row))[0] != 0


@inner
def pack_flags(
    tensor: Ints, batch: int, axes: Ints, box: Ints, begin: int, end: int, out: Ints
) -> None:
    """Which of the others that a box sees a mask has valid, one after the other."""
    if tensor[ADDRESS] == 0:
        return
    axis_y, axis_z = after(axes, AXIS_SIZE), after(axes, 2 * AXIS_SIZE)
    box_y, box_z = after(box, BLOCK_SIZE), after(box, 2 * BLOCK_SIZE)
    start, j = locate(tensor, batch, 0), 0
    lines, row = lines_of(box, begin, end), seen(box, 2)
    for line in range(lines[0], lines[1]):
        x, y = box[LOW] + line // seen(box, 1), box_y[LOW] + line % seen(box, 1)
        at = box[OTHER] + axes[DILATION] * wrapped(x, axes[RING])
        start_x = start + at * tensor[AXES]
        at = box_y[OTHER] + axis_y[DILATION] * wrapped(y, axis_y[RING])
        start_y = start_x + at * tensor[AXES + 1]
        low = box_z[LOW] - line * row
        for z in range(max(box_z[LOW], low + begin), min(box_z[HIGH], low + end)):
            at = box_z[OTHER] + axis_z[DILATION] * wrapped(z, axis_z[RING])
            start_z = start_y + at * tensor[AXES + 2]
            out[j] = bytes_at(start_z)[0]
            j += 1


@inner
def keep_valid(flags: Ints, count: int, picks: Ints, bias_picks: Ints) -> int:
    """Leave out of both lists what is not valid; returns how many are left. `flags` begins with the
    window's first row."""
    kept = 0
    for j in range(count):
        if flags[picks[j]]:
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
def locate(tensor: Ints, batch: int, head: int) -> int:
    return tensor[ADDRESS] + batch * tensor[BATCH] + head * tensor[HEADS]


@inner
def locate_row(tensor: Ints, batch: int, head: int, row: Ints) -> int:
    offset = (
        row[AT] * tensor[AXES] + row[AT + 1] * tensor[AXES + 1] + row[AT + 2] * tensor[AXES + 2]
    )
    return locate(tensor, batch, head) + offset


@inner
def get_row(
    tensor: Ints, batch: int, head: int, row: Ints, ahead: int, kind: int, count: int, width: int,
    factor: float, out: Floats,
) -> None:  # fmt: skip
    """Copy an open row; `ahead` says which later row of the last axis to ask for."""
    address = locate_row(tensor, batch, head, row)
    ahead *= tensor[AXES + 2]
    read_row(address, tensor[FEATURES], count, kind, factor, ahead, out, width)


@inner
def put_row(
    tensor: Ints, batch: int, head: int, row: Ints, kind: int, count: int, factor: float,
    values: Floats,
) -> None:  # fmt: skip
    address = locate_row(tensor, batch, head, row)
    write_row(values, count, kind, factor, address, tensor[FEATURES])


@inner
def wrapped(position: int, ring: int) -> int:
    """A position of a ring, from an unwrapped one."""
    if position < 0:
        return position + ring
    # Twice around where the window of a box's last row begins at the end of a ring.
    while position >= ring:
        position -= ring
    return position


@inner
def pack(
    tensor: Ints, batch: int, head: int, axes: Ints, box: Ints, begin: int, end: int, kind: int,
    count: int, width: int, factor: float, out: Floats,
) -> None:  # fmt: skip
    """Copy those of the others that a box sees, one after the other, each padded to `width`, of all
    from the one that is `begin` in this order up to `end`."""
    start = locate(tensor, batch, head)
    axis_y, axis_z = after(axes, AXIS_SIZE), after(axes, 2 * AXIS_SIZE)
    box_y, box_z = after(box, BLOCK_SIZE), after(box, 2 * BLOCK_SIZE)
    features, ahead = tensor[FEATURES], 16 * axis_z[DILATION] * tensor[AXES + 2]
    lines, row = lines_of(box, begin, end), seen(box, 2)
    for line in range(lines[0], lines[1]):
        x, y = box[LOW] + line // seen(box, 1), box_y[LOW] + line % seen(box, 1)
        at = box[OTHER] + axes[DILATION] * wrapped(x, axes[RING])
        start_x = start + at * tensor[AXES]
        at = box_y[OTHER] + axis_y[DILATION] * wrapped(y, axis_y[RING])
        start_y = start_x + at * tensor[AXES + 1]
        low = box_z[LOW] - line * row
        for z in range(max(box_z[LOW], low + begin), min(box_z[HIGH], low + end)):
            at = box_z[OTHER] + axis_z[DILATION] * wrapped(z, axis_z[RING])
            start_z = start_y + at * tensor[AXES + 2]
            read_row(start_z, features, count, kind, factor, ahead, out, width)
            out = after(out, width)


@inner
def pack_list(
    tensor: Ints, batch: int, head: int, length: int, kind: int, count: int, width: int,
    factor: float, out: Floats,
) -> None:  # fmt: skip
    """The same for the first `length` tokens of the last axis."""
    start, step = locate(tensor, batch, head), tensor[AXES + 2]
    for z in range(length):
        read_row(
            start + z * step,
            tensor[FEATURES],
            count,
            kind,
            factor,
            step,
            after(out, z * width),
            width,
        )


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
def forward(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int, most: int,
    extras: Ints, sinks: Floats, rpb: Floats, extents: Ints, capacity: int, longest: int,
    work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """Attention of every unit that this thread gets.

    tensors: query, key, value, additional keys, additional values, out, logsumexp, masks of keys
    and queries (address 0 for none). work: keys and values of `capacity` tokens, `most` additional
    keys and values, a query, an output, scores, slopes. lists: two of `longest` picks, one of
    `most`, STATE_SIZE, and flags of `capacity` tokens if there is a mask of keys. extras:
    additional keys of every batch entry, at most `most`. sinks: of every head, or empty. limit: of
    the scores, 0 for none.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale, infinity = work.dtype.type(1), work.dtype.type(scale), work.dtype.type(np.inf)
    zero, forth, biased = work.dtype.type(0), np.int64(1), rpb.size > 0
    limit, sunk, sinks = work.dtype.type(limit), sinks.size > 0, start_of(sinks)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    rpb, extents = start_of(rpb), start_of(extents)

    query_at = start_of(tensors)
    key_at = after(query_at, TENSOR_SIZE)
    value_at = after(key_at, TENSOR_SIZE)
    extra_key_at = after(value_at, TENSOR_SIZE)
    extra_value_at = after(extra_key_at, TENSOR_SIZE)
    out_at = after(extra_value_at, TENSOR_SIZE)
    lse_at = after(out_at, TENSOR_SIZE)
    key_mask_at = after(lse_at, TENSOR_SIZE)
    query_mask_at = after(key_mask_at, TENSOR_SIZE)
    masked = key_mask_at[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    extra_keys = after(values, capacity * width_v)
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
    flags = after(row, ROW_SIZE)
    extras = start_of(extras)

    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        none, every = np.int64(0), all_seen(box)
        extra = extras[batch]
        list_extras(extra, extra_picks)
        pack(key_at, batch, head_kv, axes, box, none, every, kind, dim, width, one, keys)
        pack(value_at, batch, head_kv, axes, box, none, every, kind, dim_v, width_v, one, values)
        pack_list(extra_key_at, batch, head_kv, extra, kind, dim, width, one, extra_keys)
        pack_list(extra_value_at, batch, head_kv, extra, kind, dim_v, width_v, one, extra_values)
        pack_flags(key_mask_at, batch, axes, box, none, every, flags)
        row[LISTED] = -1
        ahead = 2 * axes[2 * AXIS_SIZE + DILATION]
        for index in range(rows_of(box)):
            count, first = open_row(index, axes, items, box, forth, extents, picks, bias_picks, row)
            valid = flag(query_mask_at, batch, row)
            if masked:
                count = keep_valid(after(flags, first), count, picks, bias_picks)
                row[LISTED] = -1
            for head in range(head_kv * group, (head_kv + 1) * group):
                fill(result, width_v, zero)
                logsumexp = -infinity
                if valid and count + extra > 0:
                    get_row(query_at, batch, head, row, ahead, kind, dim, width, one, query)
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
                put_row(out_at, batch, head, row, kind, dim_v, share, result)
                numbers_at(locate_row(lse_at, batch, head, row), keys)[0] = logsumexp


@entry
def backward_queries(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, grad_scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int,
    most: int, extras: Ints, rpb: Floats, extents: Ints, capacity: int, longest: int,
    only_delta: bool, bias_grads: Floats, extra_grads: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients that a query owns, and each row's `delta` for backward_keys.

    With P the attention weights and S the scores, dS = P * (dP - delta) where
    delta = rowsum(grad_out * out) - grad_logsumexp.

    tensors: query, key, value, additional keys, additional values, out, logsumexp, grad_out,
    grad_logsumexp (address 0 for none), delta, grad_query, mask of keys (address 0 for none).
    bias_grads: of every unit, or empty.
    extra_grads: of every unit `most` keys, which are still to be scaled, then as many values, or
    empty. grad_scale: the factor of the gradients of queries and keys. work: as in `forward`, then
    a gradient of the output and gradients of scores. lists, extras: as in `forward`.
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

    query_at = start_of(tensors)
    key_at = after(query_at, TENSOR_SIZE)
    value_at = after(key_at, TENSOR_SIZE)
    extra_key_at = after(value_at, TENSOR_SIZE)
    extra_value_at = after(extra_key_at, TENSOR_SIZE)
    out_at = after(extra_value_at, TENSOR_SIZE)
    lse_at = after(out_at, TENSOR_SIZE)
    grad_out_at = after(lse_at, TENSOR_SIZE)
    grad_lse_at = after(grad_out_at, TENSOR_SIZE)
    delta_at = after(grad_lse_at, TENSOR_SIZE)
    grad_query_at = after(delta_at, TENSOR_SIZE)
    key_mask_at = after(grad_query_at, TENSOR_SIZE)
    masked = key_mask_at[ADDRESS] != 0

    keys = start_of(work)
    values = after(keys, capacity * width)
    extra_keys = after(values, capacity * width_v)
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
    flags = after(row, ROW_SIZE)
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
            pack(key_at, batch, head_kv, axes, box, none, every, kind, dim, width, one, keys)
            pack(
                value_at, batch, head_kv, axes, box, none, every, kind, dim_v, width_v, one, values
            )
            pack_list(extra_key_at, batch, head_kv, extra, kind, dim, width, one, extra_keys)
            pack_list(
                extra_value_at, batch, head_kv, extra, kind, dim_v, width_v, one, extra_values
            )
            pack_flags(key_mask_at, batch, axes, box, none, every, flags)
        row[LISTED] = -1
        ahead = 2 * axes[2 * AXIS_SIZE + DILATION]
        for index in range(rows_of(box)):
            count, first = open_row(index, axes, items, box, forth, extents, picks, bias_picks, row)
            if masked and not only_delta:
                count = keep_valid(after(flags, first), count, picks, bias_picks)
                row[LISTED] = -1
            for head in range(head_kv * group, (head_kv + 1) * group):
                get_row(out_at, batch, head, row, ahead, kind, dim_v, width_v, one, result)
                get_row(grad_out_at, batch, head, row, ahead, kind, dim_v, width_v, one, grad_row)
                delta = dot(result, grad_row, width_v)
                if grad_lse_at[ADDRESS]:
                    delta -= numbers_at(locate_row(grad_lse_at, batch, head, row), keys)[0]
                numbers_at(locate_row(delta_at, batch, head, row), keys)[0] = delta
                if only_delta:
                    continue
                fill(result, width, zero)
                lse = numbers_at(locate_row(lse_at, batch, head, row), keys)[0]
                if lse != -infinity:
                    get_row(query_at, batch, head, row, ahead, kind, dim, width, one, query)
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
                        at = unit * group * biases
                        at += bias_index(head - head_kv * group, row, extents)
                        for j in range(count):
                            bias_grads[at + bias_picks[j]] += grads[j]
                    if limit > 0:
                        steepen(grads, padded(count) + padded(extra), slopes)
                    accumulate(grads, after(keys, first * width), width, picks, count, result)
                    accumulate(more_grads, extra_keys, width, extra_picks, extra, result)
                    if extra_wanted:
                        out = after(extra_grads, unit * most * (width + width_v))
                        scatter(more_grads, extra, query, width, out)
                        scatter(more, extra, grad_row, width_v, after(out, most * width))
                put_row(grad_query_at, batch, head, row, kind, dim, grad_scale, result)


@entry
def backward_keys(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, grad_scale: float, limit: float, heads: int, group: int, dim: int, dim_v: int,
    rpb: Floats, extents: Ints, capacity: int, longest: int, rows: int, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over the queries that see them.

    tensors: query, key, value, logsumexp, grad_out, delta, grad_key, grad_value, mask of keys
    (address 0 for none). work: of `capacity` queries the vectors, their output gradients, logsumexp
    and delta; of `rows` keys both gradients; a key, a value, scores, their gradients and slopes.
    lists: two of `longest` picks,
    STATE_SIZE.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale, zero = work.dtype.type(1), work.dtype.type(scale), work.dtype.type(0)
    infinity, grad_scale = work.dtype.type(np.inf), work.dtype.type(grad_scale)
    single, back, floating, biased = np.int64(1), np.int64(-1), np.int64(FLOATING), rpb.size > 0
    limit = work.dtype.type(limit)
    axes, items, blocks = start_of(axes), start_of(items), start_of(blocks)
    rpb, extents = start_of(rpb), start_of(extents)

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
            pack(query_at, batch, head, axes, box, none, every, kind, dim, width, one, queries)
            pack(
                grad_out_at,
                batch,
                head,
                axes,
                box,
                none,
                every,
                kind,
                dim_v,
                width_v,
                one,
                grad_rows,
            )
            pack(lse_at, batch, head, axes, box, none, every, floating, single, single, one, lse)
            pack(
                delta_at, batch, head, axes, box, none, every, floating, single, single, one, delta
            )
            # A query that attends to nothing gives nothing, whatever it and its gradient hold.
            for j in range(every):
                if lse[j] == -infinity:
                    fill(after(queries, j * width), width, zero)
                    fill(after(grad_rows, j * width_v), width_v, zero)
            row[LISTED] = -1
            for index in range(members):
                count, first = open_row(
                    index, axes, items, box, back, extents, picks, bias_picks, row
                )
                if not flag(key_mask_at, batch, row):
                    continue
                get_row(key_at, batch, head_kv, row, ahead, kind, dim, width, one, key)
                get_row(value_at, batch, head_kv, row, ahead, kind, dim_v, width_v, one, value)
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
                grad_key_at, batch, head_kv, row, kind, dim, grad_scale,
                after(grad_keys, index * width),
            )  # fmt: skip
            put_row(
                grad_value_at, batch, head_kv, row, kind, dim_v, one,
                after(grad_values, index * width_v),
            )  # fmt: skip
