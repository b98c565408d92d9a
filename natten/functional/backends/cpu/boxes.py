"""Compiled pieces that loops by row and by block share: boxes of tokens, and rows of tensors.

The unit of work is a box of queries (or, for the gradients of keys and values, a box of keys) of
one batch entry, one key head and one residue of the dilation. A thread copies the rows that the box
can see into a contiguous, zero-padded scratch array in the compute type; every stride, storage type
and dilation ends there.

"Rows" are queries in `forward` and `backward_queries`, keys in `backward_keys`; "the others" are
what a row sees. Axes are padded to three. The tables of a sweep, all int64:

    axes     for each axis: first entry in `items`, first in `blocks`, number of blocks, dilation,
             and how many of the others make a ring, which lo and hi may leave by less than its size
    items    for each row of an axis: lo and hi, the others that it sees, counted inside its residue
             of the dilation; what turns such a count into an index of the relative position bias
    blocks   first row, number of rows, first of the others, lo and hi of all rows together
    tensors  of each of `Locations`: address, byte strides of batch, three axes and heads, element
             stride of the features
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from natten.functional.backends.cpu.launch import Locations
from natten.functional.backends.cpu.vectors import (
    BFLOAT16,
    BYTE,
    FLOATING,
    LANES,
    Floats,
    Ints,
    after,
    bytes_at,
    fma,
    halves_at,
    inlined,
    inner,
    load,
    multiply,
    narrow_bfloat16,
    narrow_float16,
    numbers_at,
    padded,
    prefetch,
    reduce_sum,
    splat,
    store,
    subtract,
    tanh,
    widen_bfloat16,
    widen_float16,
)

ITEM, BLOCK, BLOCKS, DILATION, RING, AXIS_SIZE = 0, 1, 2, 3, 4, 5
FIRST, COUNT, OTHER, LOW, HIGH, BLOCK_SIZE = 0, 1, 2, 3, 4, 5
ADDRESS, BATCH, AXES, HEADS, FEATURES, TENSOR_SIZE = 0, 1, 2, 5, 6, 7


@intrinsic
def locations(typing: Any, tensors: Any) -> Any:
    """The beginning of each tensor's row in their table."""
    pointer = types.CPointer(types.int64)
    result = types.NamedUniTuple(pointer, len(Locations._fields), Locations)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = cgutils.create_struct_proxy(tensors)(context, builder, args[0]).data
        rows = [ir.IntType(64)(TENSOR_SIZE * i) for i in range(len(Locations._fields))]
        return context.make_tuple(builder, result, [builder.gep(start, [row]) for row in rows])

    return result(tensors), generate


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

    Asks for the row `ahead` bytes further on. Bytes are zero or not.
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
    elif kind == BYTE:
        for i in range(count):
            out[i] = factor * (bytes_at(address)[i * step] != 0)
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
def dot(a: Floats, b: Floats, width: int) -> float:
    """a . b, of a multiple of LANES numbers."""
    total = splat(a, 0)
    for i in range(0, width, LANES):
        total = fma(load(a, i), load(b, i), total)
    return reduce_sum(total)


@inner
def with_sink(lse: float, sink: float, one: float) -> tuple[float, float]:
    """What outputs are multiplied with that a sink joins, and the logsumexp with it."""
    if lse == -np.inf:
        return one, sink
    top = max(lse, sink)
    total = top + math.log(math.exp(lse - top) + math.exp(sink - top))
    return math.exp(lse - total), total


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
def fill(start: Floats, count: int, value: float) -> None:
    for i in range(count):
        start[i] = value


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
def flag(tensor: Ints, batch: int, row: Ints) -> bool:
    """Whether a mask, if there is one, has a row valid."""
    if tensor[ADDRESS] == 0:
        return True
    return bytes_at(locate_row(tensor, batch, 0, row))[0] != 0


@inner
def locate(tensor: Ints, batch: int, head: int) -> int:
    return tensor[ADDRESS] + batch * tensor[BATCH] + head * tensor[HEADS]


@inner
def locate_row(tensor: Ints, batch: int, head: int, row: Ints) -> int:
    """The address of a row whose table begins with its place."""
    offset = row[0] * tensor[AXES] + row[1] * tensor[AXES + 1] + row[2] * tensor[AXES + 2]
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
    if end <= begin:
        return
    row = seen(box, 2)
    for line in range(begin // row, (end + row - 1) // row):
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


@inlined
def pack_extras(
    at: Locations, batch: int, head: int, begin: int, end: int, kind: int, dim: int, dim_v: int,
    one: float, keys: Floats, values: Floats,
) -> None:  # fmt: skip
    """The additional keys and values from `begin` to `end`."""
    parts = (at.additional_keys, dim, keys), (at.additional_values, dim_v, values)
    for tensor, count, out in parts:
        start, step, width = locate(tensor, batch, head), tensor[AXES + 2], padded(count)
        for z in range(begin, end):
            read_row(start + z * step, tensor[FEATURES], count, kind, one, step, out, width)
            out = after(out, width)


@inner
def clear(rows: Floats, width: int, flags: Floats, count: int, flag: float, zero: float) -> None:
    """Zeros in those of `count` rows that have this flag."""
    for j in range(count):
        if flags[j] == flag:
            fill(after(rows, j * width), width, zero)


@inlined
def pack_keys(
    at: Locations, batch: int, head: int, axes: Ints, box: Ints, begin: int, end: int, kind: int,
    dim: int, dim_v: int, one: float, keys: Floats, values: Floats, flags: Floats,
) -> None:  # fmt: skip
    """Keys, values, and flags of those that their mask, if there is one, has valid. The others are
    packed as zeros."""
    single, count = np.int64(1), end - begin
    # One call in a loop is compiled into it once.
    for tensor, size, out in ((at.key, dim, keys), (at.value, dim_v, values)):
        pack(tensor, batch, head, axes, box, begin, end, kind, size, padded(size), one, out)
    if at.key_mask[ADDRESS]:
        none, byte, zero = np.int64(0), np.int64(BYTE), one - one
        pack(at.key_mask, batch, none, axes, box, begin, end, byte, single, single, one, flags)
        clear(keys, padded(dim), flags, count, zero, zero)
        clear(values, padded(dim_v), flags, count, zero, zero)


@inlined
def pack_queries(
    at: Locations, batch: int, head: int, axes: Ints, box: Ints, begin: int, end: int, kind: int,
    dim: int, dim_v: int, one: float, infinity: float, queries: Floats, grads: Floats, lse: Floats,
    delta: Floats,
) -> None:  # fmt: skip
    """Queries, the gradients of their outputs, logsumexp and delta. A query that attends to nothing
    gives nothing, whatever it and its gradient hold: they are packed as zeros."""
    width, width_v, count, zero = padded(dim), padded(dim_v), end - begin, one - one
    single, floating = np.int64(1), np.int64(FLOATING)
    for tensor, of, size, wide, out in (
        (at.query, kind, dim, width, queries),
        (at.grad_out, kind, dim_v, width_v, grads),
        (at.lse, floating, single, single, lse),
        (at.delta, floating, single, single, delta),
    ):
        pack(tensor, batch, head, axes, box, begin, end, of, size, wide, one, out)
    clear(queries, width, lse, count, -infinity, zero)
    clear(grads, width_v, lse, count, -infinity, zero)
