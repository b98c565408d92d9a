"""What every kernel shares: windows, boxes of tiles, tile loads and scores.

A program owns a tile of *rows* and visits tiles of *columns*. In the forward pass and for the
gradient of the query, rows are queries and columns are keys; for the gradients of key and value it
is the other way round, and windows are replaced by inverse windows. Both are boxes (window bounds
are monotone), so one set of functions serves all kernels.

Kernels always have three axes; a grid of lower rank has leading axes of extent one, which `RANK`
lets the compiler drop. Positions are counted inside a dilation group (see `natten.window`), and
column positions start at the first column that exists, so that a column tile is a plain box of the
strided view of one group: dilation and sub-grids need no permutation of tokens.

Along a circular axis, positions are unwrapped (see `natten.window`): windows and their unions may
begin before the first column and end behind the last. Column tiles are boxes all the same: none
lies across the seam, and each has a corner in memory beside its position.

The window test must agree with `natten.window`; `tests/test_triton_window.py` compares them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Beyond all positions of a ring, unwrapped.
FAR = tl.constexpr(2**30)
# Integers that a table has of each grid, see `arguments.Table`.
GRID_NUMBERS = tl.constexpr(14)
# Whether kernels may contain PTX.
INLINE = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


class Place(NamedTuple):
    """What a row tile belongs to: head, batch entry or sequence, and the batch entry in memory."""

    head: Any
    batch: Any
    memory_batch: Any


class Rows(NamedTuple):
    """The rows of a tile, each quantity one per axis.

    Attributes:
        memory: Coordinates in memory.
        exists: Whether they do.
        position: Positions in the dilation group.
        begin: Where their windows begin, counted from the first column.
        width: How wide these are.
        corner: Position of the tile's first row.
    """

    memory: Any
    exists: Any
    position: Any
    begin: Any
    width: Any
    corner: Any


class Box(NamedTuple):
    """The column tiles that a row tile visits, each quantity one per axis.

    Attributes:
        union: Where the union of its rows' windows begins.
        counts: How many tiles cover it.
        inner: The first tile in sight of all rows; along a circular axis the first column.
        inner_counts: How many of these there are.
        inverses: `reciprocal` of the counts, as far as it is needed.
    """

    union: Any
    counts: Any
    inner: Any
    inner_counts: Any
    inverses: Any


class Columns(NamedTuple):
    """The columns that exist, each quantity one per axis.

    Attributes:
        first: Position of the first.
        memory: Its coordinate in memory.
        extent: Their number.
        dilation: Distance in memory of one to the next, in steps of the tensor.
        sequence: Only one number: the first token of their sequence.
    """

    first: Any
    memory: Any
    extent: Any
    dilation: Any
    sequence: Any


class Source(NamedTuple):
    """Where columns of one tensor are loaded from, see `column_source`."""

    data: Any
    steps: Any
    batch: Any
    head: Any


class Additional(NamedTuple):
    """Where one head's additional keys and values start, and how many there are."""

    key: Any
    value: Any
    number: Any


@triton.jit
def ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator


@triton.jit
def log2(x):
    """The logarithm within 2**-22, of itself or, from 0.5 to 2, of one: what the GPU has an
    instruction for. Without PTX, Triton's, which takes thirty."""
    if INLINE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.math.log2(x)


@triton.jit
def decode(numbers):
    """The integers behind `arguments.unspecialized` ones, three (axes) or five (strides)."""
    x = (numbers[0] >> 1) - 1
    y = (numbers[1] >> 1) - 1
    z = (numbers[2] >> 1) - 1
    if len(numbers) == 3:
        return x, y, z
    else:
        return x, y, z, (numbers[3] >> 1) - 1, (numbers[4] >> 1) - 1


@triton.jit
def query_window(
    position, length, kernel, stride, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr
):  # fmt: skip
    """First key and one past the last key that the query at `position` attends to."""
    if CIRCULAR:
        start = position // stride * stride + stride // 2 - kernel // 2
        return start, start + kernel
    elif CAUSAL:
        leader = tl.minimum(position // stride * stride + stride - 1, length - 1)
        return tl.maximum(leader - kernel + 1, 0), position + 1
    else:
        leader = tl.minimum(position // stride * stride + stride // 2, length - 1)
        start = tl.minimum(tl.maximum(leader - kernel // 2, 0), length - kernel)
        return start, start + kernel


@triton.jit
def key_window(
    position, length, kernel, stride, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr
):  # fmt: skip
    """First query and one past the last query that attends to the key at `position`."""
    if CIRCULAR:
        # From the first leader whose window holds the key to the last. Stride divides the length,
        # and quotients are of positive numbers.
        earliest = position + length - kernel + kernel // 2 + 1
        start = ceil_div(earliest - stride // 2, stride) * stride - length
        latest = position + kernel // 2 - stride // 2
        return start, latest // stride * stride + stride
    elif CAUSAL:
        reach = position + kernel - 1
        stop = (reach - (stride - 1)) // stride * stride + stride
        return position, tl.where(reach >= length - 1, length, tl.minimum(stop, length))
    else:
        # Leaders grow with the position, so both bounds are leaders' bounds turned around.
        reach = position + kernel // 2
        stop = (reach - stride // 2) // stride * stride + stride
        everything = (position >= length - kernel) | (reach >= length - 1)
        last = tl.where(everything, length, tl.minimum(stop, length))
        before = position - kernel + 1
        start = ceil_div(tl.maximum(before, 0) + kernel // 2 - stride // 2, stride) * stride
        return tl.where(before <= 0, 0, tl.minimum(start, length)), last


@triton.jit
def window(
    position,
    length,
    kernel,
    stride,
    first_column,
    end_column,
    CAUSAL: tl.constexpr,
    CIRCULAR: tl.constexpr,
    UPSAMPLING: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Columns that a row sees, counted from the first column that exists."""
    if INVERSE:
        start, end = key_window(position, length, kernel, stride, CAUSAL, CIRCULAR)
        if UPSAMPLING != 1:
            start *= UPSAMPLING
            end *= UPSAMPLING
    else:
        if UPSAMPLING != 1:
            position = position // UPSAMPLING
        start, end = query_window(position, length, kernel, stride, CAUSAL, CIRCULAR)
    if CIRCULAR:
        return start, end
    start = tl.minimum(tl.maximum(start, first_column), end_column)
    end = tl.maximum(tl.minimum(end, end_column), start)
    return start - first_column, end - first_column


@triton.jit
def axis_rows(
    numbers, offset, axis, row_box, column_box,
    TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr,
    UPSAMPLING: tl.constexpr, INVERSE: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """Everything about one axis of a row tile.

    `numbers` are that of the tile, among all of all dilation groups of the axis, and how many one
    group has, or None where there is one group; `offset` the place of each row inside the tile.
    `axis` is the grid's length, the window's size, stride and dilation; the boxes of rows and
    columns are where they begin and how many.

    Returns three groups: all of `Rows`, all of `Box` but inverses, and all of `Columns` but the
    sequence.
    """
    if ACTIVE:
        tile, tiles = numbers
        length, kernel, stride, dilation = axis
        row_origin, row_extent = row_box
        column_origin, column_extent = column_box
        group = 0
        if tiles is not None:
            group = tile // tiles
            tile -= group * tiles
        group_length = ceil_div(length - group, dilation)
        row_begin = ceil_div(tl.maximum(row_origin - group, 0), dilation)
        row_end = (row_origin + row_extent - group + dilation - 1) // dilation
        column_begin = ceil_div(tl.maximum(column_origin - group, 0), dilation)
        column_end = (column_origin + column_extent - group + dilation - 1) // dilation
        column_end = tl.maximum(column_end, column_begin)

        # Tiles sit on multiples of their size, so that they line up with groups of a stride.
        first = (row_begin // TILE + tile) * TILE
        first_row = tl.maximum(first, row_begin)
        end_of_rows = tl.minimum(first + TILE, row_end)
        last_row = tl.maximum(end_of_rows - 1, 0)
        first_begin, first_end = window(
            first_row, group_length, kernel, stride, column_begin, column_end, CAUSAL, CIRCULAR,
            UPSAMPLING, INVERSE,
        )  # fmt: skip
        last_begin, last_end = window(
            last_row, group_length, kernel, stride, column_begin, column_end, CAUSAL, CIRCULAR,
            UPSAMPLING, INVERSE,
        )  # fmt: skip
        if CIRCULAR:
            count = ring_tiles(first_begin, last_end, column_end, COLUMN_TILE)
            count = tl.where(end_of_rows > first_row, count, 0)
            inner, inner_count = last_begin, first_end - last_begin
        else:
            count = tl.where(
                end_of_rows > first_row, ceil_div(last_end - first_begin, COLUMN_TILE), 0
            )
            inner = tl.minimum(
                tl.maximum(ceil_div(last_begin - first_begin, COLUMN_TILE), 0), count
            )
            inner_end = tl.maximum(first_end - first_begin, 0) // COLUMN_TILE
            inner_count = tl.maximum(tl.minimum(inner_end, count) - inner, 0)

        position = first + offset
        exists = (position >= row_begin) & (position < row_end)
        begin, end = window(
            position, group_length, kernel, stride, column_begin, column_end, CAUSAL, CIRCULAR,
            UPSAMPLING, INVERSE,
        )  # fmt: skip
        memory = position * dilation + group - row_origin
        column_memory = column_begin * dilation + group - column_origin
        return (
            # Rows that do not exist see nothing: their biases would lie outside the table.
            (memory, exists, position, begin, tl.where(exists, end - begin, 0), first),
            (first_begin, count, inner, inner_count),
            (column_begin, column_memory, column_end - column_begin),
        )  # fmt: skip
    else:
        return (offset, offset < 1, offset, offset, offset + 1, 0), (0, 1, 0, 1), (0, 0, 1)


@triton.jit
def divided_by(number, divisor, factor):
    """number // divisor, of numbers below 2**31; `factor` is `arguments.division` by it, or None.

    A division takes more than twenty instructions, this a few.
    """
    if factor is None:
        return number // divisor
    else:
        product = tl.cast(number, tl.uint32).to(tl.uint64) * (factor >> 7).to(tl.uint32)
        return (product >> ((factor >> 1) & 63).to(tl.uint64)).to(tl.int32)


@triton.jit
def program_place(
    program, tiles, dilations, heads, factors, V: tl.constexpr, LAST_FIRST: tl.constexpr
):  # fmt: skip
    """Row tile along each axis, head and batch of a program. Tiles of one head are neighbors.
    `factors` are `arguments.divisions`, or None."""
    if factors is None:
        by_tiles, by_heads, by_first, by_second = None, None, None, None
    else:
        by_tiles, by_heads, by_first, by_second = factors
    tiles_z = tiles[2] * dilations[2]
    tiles_y = 1
    tiles_x = 1
    if V.RANK >= 2:
        tiles_y = tiles[1] * dilations[1]
    if V.RANK == 3:
        tiles_x = tiles[0] * dilations[0]
    in_head = tiles_x * tiles_y * tiles_z
    rest = divided_by(program, in_head, by_tiles)
    tile = program - rest * in_head
    if LAST_FIRST:
        # The longest rows of a causal problem come last: start them first.
        tile = in_head - 1 - tile
    batch = divided_by(rest, heads, by_heads)
    head = rest - batch * heads
    x, y, z = tile * 0, tile * 0, tile
    if V.FIRST_AXIS_FASTEST:
        y = divided_by(tile, tiles_x, by_first)
        x = tile - y * tiles_x
        z = divided_by(y, tiles_y, by_second)
        y -= z * tiles_y
    elif V.RANK >= 2:
        y = divided_by(tile, tiles_z, by_first)
        z = tile - y * tiles_z
        if V.RANK == 3:
            x = divided_by(y, tiles_y, by_second)
            y -= x * tiles_y
    return (x, y, z), head, batch


@triton.jit
def unravel(index, TILE: tl.constexpr):
    """Place inside a tile, along each axis."""
    return index // (TILE[1] * TILE[2]), (index // TILE[2]) % TILE[1], index % TILE[2]


@triton.jit
def reciprocal(divisor):
    """2**32 / divisor, rounded up; 0 for 1."""
    return tl.cast(2**32 - 1, tl.uint32) // tl.cast(divisor, tl.uint32) + 1


@triton.jit
def quotient(dividend, divisor, inverse):
    """Exact while the product of both is below 2**32, which `arguments` makes sure of."""
    high = tl.umulhi(tl.cast(dividend, tl.uint32), inverse).to(tl.int32)
    return tl.where(divisor == 1, dividend, high)


@triton.jit
def tile_index(t, counts, inverses, V: tl.constexpr):
    """The number along each axis of the t-th column tile of a box."""
    x, y, z = t * 0, t * 0, t
    if V.FIRST_AXIS_FASTEST:
        y = quotient(t, counts[0], inverses[0])
        x = t - y * counts[0]
        z = quotient(y, counts[1], inverses[1])
        y -= z * counts[1]
    elif V.RANK >= 2:
        y = quotient(t, counts[2], inverses[2])
        z = t - y * counts[2]
        if V.RANK == 3:
            x = quotient(y, counts[1], inverses[1])
            y -= x * counts[1]
    return x, y, z


@triton.jit
def column_tile(t, box, COLUMN_TILE: tl.constexpr, V: tl.constexpr):
    """Corner of the t-th column tile of a box, and whether all rows see all of it."""
    union, counts, inner, inner_counts, inverses = box
    x, y, z = tile_index(t, counts, inverses, V)
    whole = (z >= inner[2]) & (z < inner[2] + inner_counts[2])
    if V.RANK >= 2:
        whole = whole & (y >= inner[1]) & (y < inner[1] + inner_counts[1])
    if V.RANK == 3:
        whole = whole & (x >= inner[0]) & (x < inner[0] + inner_counts[0])
    corner = (
        union[0] + x * COLUMN_TILE[0], union[1] + y * COLUMN_TILE[1], union[2] + z * COLUMN_TILE[2],
    )  # fmt: skip
    return corner, whole


@triton.jit
def ring_tiles(begin, end, length, COLUMN_TILE: tl.constexpr):
    """How many column tiles cover a range of a ring, unwrapped, if none lies across its seam."""
    start = tl.where(begin < 0, begin + length, begin)
    before, total = length - start, end - begin
    second = tl.minimum(tl.maximum(total - before, 0), length)
    third = tl.maximum(total - before - length, 0)
    return (
        ceil_div(tl.minimum(total, before), COLUMN_TILE)
        + ceil_div(second, COLUMN_TILE)
        + ceil_div(third, COLUMN_TILE)
    )


@triton.jit
def axis_tile(
    t, union, inner, inner_count, length, COLUMN_TILE: tl.constexpr, CIRCULAR: tl.constexpr
):  # fmt: skip
    """Corner of the t-th column tile along one axis, its position, and whether all rows see it."""
    if CIRCULAR:
        # Up to the seam, then once around, then the rest.
        start = tl.where(union < 0, union + length, union)
        before, around = ceil_div(length - start, COLUMN_TILE), ceil_div(length, COLUMN_TILE)
        later = t - before
        rest = tl.where(later >= around, later - around, later)
        corner = tl.where(later < 0, start + t * COLUMN_TILE, rest * COLUMN_TILE)
        rings = tl.where(later < 0, 0, tl.where(later >= around, 2, 1))
        position = corner + rings * length + (union - start)
        end = position + COLUMN_TILE
        whole = (position >= inner) & (end <= inner + inner_count)
        return corner, position, whole & (corner + COLUMN_TILE <= length)
    else:
        corner = union + t * COLUMN_TILE
        return corner, corner, (t >= inner) & (t < inner + inner_count)


@triton.jit
def placed_tile(t, box, columns, COLUMN_TILE: tl.constexpr, V: tl.constexpr):
    """Corner of the t-th column tile of a box, whether all rows see all of it, and the positions of
    the corner that windows are compared with: others where an axis is circular."""
    if V.CIRCULAR[0] or V.CIRCULAR[1] or V.CIRCULAR[2]:
        x, y, z = tile_index(t, box.counts, box.inverses, V)
        corner_x, position_x, whole_x = axis_tile(
            x, box.union[0], box.inner[0], box.inner_counts[0], columns.extent[0], COLUMN_TILE[0],
            V.CIRCULAR[0],
        )  # fmt: skip
        corner_y, position_y, whole_y = axis_tile(
            y, box.union[1], box.inner[1], box.inner_counts[1], columns.extent[1], COLUMN_TILE[1],
            V.CIRCULAR[1],
        )  # fmt: skip
        corner_z, position_z, whole_z = axis_tile(
            z, box.union[2], box.inner[2], box.inner_counts[2], columns.extent[2], COLUMN_TILE[2],
            V.CIRCULAR[2],
        )  # fmt: skip
        corner = (corner_x, corner_y, corner_z)
        return corner, whole_x & whole_y & whole_z, (position_x, position_y, position_z)
    else:
        corner, whole = column_tile(t, box, COLUMN_TILE, V)
        return corner, whole, corner


@triton.jit
def before_seam(place, corner, length, CIRCULAR: tl.constexpr):
    """Places of columns in a tile along one axis; far away those behind the seam of a ring, which
    are columns of another tile."""
    if CIRCULAR:
        return tl.where(place + corner < length, place, FAR)
    else:
        return place


@triton.jit
def sized(number, WIDE: tl.constexpr):
    """An integer of as many bits as element offsets take."""
    return tl.cast(number, tl.int64 if WIDE else tl.int32)


@triton.jit
def row_offsets(
    memory, exists, strides, UNIT: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Element offset of each row's token from the start of its batch and head, and its mask."""
    strides = decode(strides)
    offset = sized(memory[2], WIDE) * (sized(strides[3], WIDE) * UNIT)
    all_exist = exists[2]
    if RANK >= 2:
        offset += sized(memory[1], WIDE) * (sized(strides[2], WIDE) * UNIT)
        all_exist = all_exist & exists[1]
    if RANK == 3:
        offset += sized(memory[0], WIDE) * (sized(strides[1], WIDE) * UNIT)
        all_exist = all_exist & exists[0]
    return offset, all_exist


@triton.jit
def head_offset(batch, head, strides, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Element offset of a batch and head. `UNIT` divides every stride: it tells the alignment."""
    strides = decode(strides)
    offset = sized(batch, WIDE) * (sized(strides[0], WIDE) * UNIT)
    return offset + sized(head, WIDE) * (sized(strides[4], WIDE) * UNIT)


@triton.jit
def base2_lse(pointer, exists):
    """The logsumexp of rows in base 2."""
    lse = tl.load(pointer, mask=exists, other=0.0)
    # Rows that see nothing have no weights; 0 keeps -inf - -inf out of the exponent.
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit
def load_rows(base, offset, exists, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of tokens as [rows, features].

    Through pointers in every variant: the tile then reaches the matrix product from shared memory.
    Behind a descriptor load and a reshape it would sit in registers, which the assembler reuses
    inside the loop.
    """
    feature = tl.arange(0, BLOCK)
    mask = exists[:, None]
    if FEATURES != BLOCK:
        mask = mask & (feature < FEATURES)[None, :]
    return tl.load(base + offset[:, None] + feature[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, tile, offset, exists, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    feature = tl.arange(0, BLOCK)
    mask = exists[:, None]
    if FEATURES != BLOCK:
        mask = mask & (feature < FEATURES)[None, :]
    tl.store(base + offset[:, None] + feature[None, :], tile.to(base.dtype.element_ty), mask=mask)


# Tiles have powers of two of features. What has a head's features as columns is a tuple of tiles,
# one or two, whose widths `tiles.parts` decides.


@triton.jit
def load_parts(base, offset, exists, FEATURES: tl.constexpr, PARTS: tl.constexpr):
    """Rows of tokens, as `load_rows`."""
    MAIN: tl.constexpr = PARTS[0]
    if len(PARTS) == 1:
        return (load_rows(base, offset, exists, FEATURES, MAIN),)
    else:
        main = load_rows(base, offset, exists, MAIN, MAIN)
        return main, load_rows(base + MAIN, offset, exists, FEATURES - MAIN, PARTS[1])


@triton.jit
def store_parts(base, parts, offset, exists, FEATURES: tl.constexpr, PARTS: tl.constexpr):
    MAIN: tl.constexpr = PARTS[0]
    if len(PARTS) == 1:
        store_rows(base, parts[0], offset, exists, FEATURES, MAIN)
    else:
        store_rows(base, parts[0], offset, exists, MAIN, MAIN)
        store_rows(base + MAIN, parts[1], offset, exists, FEATURES - MAIN, PARTS[1])


@triton.jit
def zero_sums(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Sums of nothing yet, to be added to."""
    MAIN: tl.constexpr = PARTS[0]
    main = tl.zeros([ROWS, MAIN], tl.float32)
    if len(PARTS) == 1:
        return (main,)
    else:
        REST: tl.constexpr = PARTS[1]
        return main, tl.zeros([ROWS, REST], tl.float32)


@triton.jit
def multiply(rows, columns, product, PRECISION: tl.constexpr):
    """The product of rows and columns over their features, added to another unless that is None:
    [rows, columns]."""
    product = tl.dot(rows[0], columns[0].T, product, input_precision=PRECISION)
    if len(rows) == 2:
        product = tl.dot(rows[1], columns[1].T, product, input_precision=PRECISION)
    return product


@triton.jit
def add_products(weights, columns, sums, PRECISION: tl.constexpr):
    """The product of weights and columns, added to sums: [rows, features].

    The compiler divides all products among warps as it would the last one, which is to be the
    widest: by rows alone, warps would compute the same where there are few.
    """
    if len(sums) == 1:
        return (tl.dot(weights, columns[0], sums[0], input_precision=PRECISION),)
    else:
        rest = tl.dot(weights, columns[1], sums[1], input_precision=PRECISION)
        return tl.dot(weights, columns[0], sums[0], input_precision=PRECISION), rest


@triton.jit
def scaled(sums, factors):
    """Sums times a number, or those of each row times its factor, [rows, 1]."""
    main = sums[0] * factors
    if len(sums) == 1:
        return (main,)
    else:
        return main, sums[1] * factors


@triton.jit
def divided(sums, divisors):
    """The sums of each row by its divisor."""
    return scaled(sums, (1.0 / divisors)[:, None])


@triton.jit
def kept(sums, rows):
    """The sums of these rows, zeros of the others."""
    main = tl.where(rows[:, None], sums[0], 0.0)
    if len(sums) == 1:
        return (main,)
    else:
        return main, tl.where(rows[:, None], sums[1], 0.0)


@triton.jit
def row_products(rows, others):
    """The product of each row and its other."""
    product = tl.sum(rows[0].to(tl.float32) * others[0].to(tl.float32), 1)
    if len(rows) == 2:
        product += tl.sum(rows[1].to(tl.float32) * others[1].to(tl.float32), 1)
    return product


@triton.jit
def column_source(
    source, batch, head, columns, strides,
    UNIT: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Where the columns of one batch, head and dilation group come from, and their strides.

    With `TMA`, `source` is a descriptor of the whole tensor, else a pointer to it.
    """
    memory, dilations = columns.memory, columns.dilation
    _batch, stride_x, stride_y, stride_z, _head = decode(strides)
    stride_z = sized(stride_z, WIDE) * UNIT
    step_x, step_y, step_z = 0, 0, stride_z * dilations[2]
    if RANK >= 2:
        stride_y = sized(stride_y, WIDE) * UNIT
        step_y = stride_y * dilations[1]
    if RANK == 3:
        stride_x = sized(stride_x, WIDE) * UNIT
        step_x = stride_x * dilations[0]
    if TMA:
        return Source(source, (step_x, step_y, step_z), batch, head)
    else:
        start = head_offset(batch, head, strides, UNIT, WIDE)
        start += sized(memory[2], WIDE) * stride_z
        if RANK >= 2:
            start += sized(memory[1], WIDE) * stride_y
        if RANK == 3:
            start += sized(memory[0], WIDE) * stride_x
        return Source(source + start, (step_x, step_y, step_z), batch, head)


@triton.jit
def load_columns(
    source, corner, columns, place,
    FEATURES: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The column tile at `corner`, parts of [columns, features]; what lies outside reads as zero.

    Whole heads alone have descriptors, see `tiles.choose`.
    """
    if V.TMA:
        box = source.data.load(
            [
                source.batch, corner[0], corner[1], columns.sequence + corner[2],
                source.head * FEATURES,
            ]
        )  # fmt: skip
        return (box.reshape(COLUMNS, PARTS[0]),)
    else:
        offset, exists = column_offsets(source, corner, columns, place, V.WIDE, V.RANK)
        return load_parts(source.data, offset, exists, FEATURES, PARTS)


@triton.jit
def column_offsets(
    source, corner, columns, place, WIDE: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Element offsets of the columns of the tile at `corner`, and which of them exist."""
    extent, steps = columns.extent, source.steps
    exists = place[2] < extent[2] - corner[2]
    start = corner[2] * steps[2]
    offset = place[2] * steps[2]
    if RANK >= 2:
        exists = exists & (place[1] < extent[1] - corner[1])
        start += corner[1] * steps[1]
        offset += place[1] * steps[1]
    if RANK == 3:
        exists = exists & (place[0] < extent[0] - corner[0])
        start += corner[0] * steps[0]
        offset += place[0] * steps[0]
    return start + offset, exists


@triton.jit
def mask_source(mask, at, grid, strides, V: tl.constexpr):
    """Where the mask of the columns of one batch entry and dilation group comes from."""
    return column_source(mask, at.memory_batch, at.head, grid, strides, 1, True, V.RANK, False)


@triton.jit
def valid_columns(source, corner, columns, place, V: tl.constexpr):
    """Which columns of the tile at `corner` are valid."""
    offset, exists = column_offsets(source, corner, columns, place, True, V.RANK)
    return tl.load(source.data + offset, mask=exists, other=0) != 0


@triton.jit
def valid_rows(mask, at, rows, strides, V: tl.constexpr):
    """Which rows of a tile are valid."""
    offset, all_exist = row_offsets(rows.memory, rows.exists, strides, 1, True, V.RANK)
    offset += head_offset(at.memory_batch, at.head, strides, 1, True)
    return tl.load(mask + offset, mask=all_exist, other=0) != 0


@triton.jit
def any_of(flags):
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def tanh(x):
    """Within a few ulps."""
    size = tl.abs(x)
    power = tl.math.exp2(size * (-2.0 * LOG2_E))
    far = (1.0 - power) / (1.0 + power)
    # Near zero the difference would lose digits: x + x**3 p(x**2), fitted up to 0.6.
    square = size * size
    series = -6.276389118283987e-3 * square + 2.1116215735673904e-2
    series = series * square - 5.3875137120485306e-2
    series = series * square + 1.3332924246788025e-1
    series = series * square - 3.333333134651184e-1
    near = size + size * square * series
    result = tl.where(size < 0.6, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def capped(scores, cap):
    """Shares of their bound that soft caps leave of scores, and the derivative of that; `cap` is
    the factor of the scores, None without such a bound."""
    if cap is None:
        return scores, scores
    else:
        shares = tanh(scores * cap)
        return shares, 1.0 - shares * shares


@triton.jit
def in_sight(corner, place, begin, width, RANK: tl.constexpr):
    """Whether each row sees each column of the tile at `corner`: [rows, columns]."""
    # One unsigned comparison tests both bounds of an axis.
    distance = (place[2] + corner[2])[None, :] - begin[2][:, None]
    seen = distance.to(tl.uint32) < width[2].to(tl.uint32)[:, None]
    if RANK >= 2:
        distance = (place[1] + corner[1])[None, :] - begin[1][:, None]
        seen = seen & (distance.to(tl.uint32) < width[1].to(tl.uint32)[:, None])
    if RANK == 3:
        distance = (place[0] + corner[0])[None, :] - begin[0][:, None]
        seen = seen & (distance.to(tl.uint32) < width[0].to(tl.uint32)[:, None])
    return seen


@triton.jit
def tile_scores(
    row_features, column_features, tile, place, rows, columns, bias, window, head, cap,
    INVERSE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Scores of a tile before scaling, -inf where a row does not see a column: [rows, columns]; and
    their derivatives where `cap`, see `capped`, is not None.

    `tile` is what `placed_tile` says. `V.MASK` says which tiles are masked:
    "always" all of them, "edges" those that not all rows see all of, "never" none, for there are no
    such tiles. A bias is what the product adds to: as a summand of its own, its layout, that of a
    load, would spread to all that follows.
    """
    PRECISION: tl.constexpr = V.PRECISION
    corner, whole, position = tile
    if V.HAS_RPB:
        row, column, size = bias_slot(
            position, place, rows.position, columns.first, window, INVERSE, V.RANK
        )
        biases = load_biases(bias + head.to(tl.int64) * size, row, column)
    if V.HAS_RPB and cap is None:
        scores = multiply(row_features, column_features, biases, PRECISION)
    else:
        scores = multiply(row_features, column_features, None, PRECISION)
    if V.NEGATE:
        scores = -scores
    scores, slopes = capped(scores, cap)
    if V.HAS_RPB and cap is not None:
        scores += biases
    if V.MASK != "never":
        extent = columns.extent
        place = (
            before_seam(place[0], corner[0], extent[0], V.CIRCULAR[0]),
            before_seam(place[1], corner[1], extent[1], V.CIRCULAR[1]),
            before_seam(place[2], corner[2], extent[2], V.CIRCULAR[2]),
        )
    if V.MASK == "edges":
        if not whole:
            seen = in_sight(position, place, rows.begin, rows.width, V.RANK)
            scores = tl.where(seen, scores, float("-inf"))
    elif V.MASK == "always":
        seen = in_sight(position, place, rows.begin, rows.width, V.RANK)
        scores = tl.where(seen, scores, float("-inf"))
    return scores, slopes


@triton.jit
def bias_slot(
    corner, place, position, first, window, INVERSE: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Where the bias of each (row, column) lies in one head's table, and the table's size.

    Along an axis that is key position - query position + kernel - 1, and the padding before it.
    Returned are two summands: that of each row, with the tile's place, and that of each column
    inside its tile, which is not negative.
    """
    kernels, paddings = decode(window.kernels), decode(window.bias_paddings)
    size = 2 * (kernels[2] + paddings[2]) - 1
    row = position[2]
    column = place[2]
    tile = corner[2] + first[2]
    middle = kernels[2] + paddings[2] - 1
    reach = paddings[2]
    if RANK >= 2:
        row += position[1] * size
        column += place[1] * size
        tile += (corner[1] + first[1]) * size
        middle += (kernels[1] + paddings[1] - 1) * size
        reach += paddings[1] * size
        size *= 2 * (kernels[1] + paddings[1]) - 1
    if RANK == 3:
        row += position[0] * size
        column += place[0] * size
        tile += (corner[0] + first[0]) * size
        middle += (kernels[0] + paddings[0] - 1) * size
        reach += paddings[0] * size
        size *= 2 * (kernels[0] + paddings[0]) - 1
    if INVERSE:
        # The padding is at least as wide as a tile.
        return row + (middle - tile - reach), reach - column, size
    else:
        return (tile + middle) - row, column, size


@triton.jit
def table_size(window):
    """Entries of one head's padded table; axes that the grid lacks have one."""
    kernels, paddings = decode(window.kernels), decode(window.bias_paddings)
    size = 2 * (kernels[0] + paddings[0]) - 1
    size *= 2 * (kernels[1] + paddings[1]) - 1
    return size * (2 * (kernels[2] + paddings[2]) - 1)


@triton.jit
def load_biases(table, row, column):
    """Entries of one head's table, straight to the registers that the product adds to.

    A load of Triton's would be spread over the threads in its own way and then pass through shared
    memory, which takes longer than the product. An elementwise operation is computed where its
    result is used.
    """
    if INLINE:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; cvt.u64.u32 at, $2; add.s64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
            "=f,l,r", [table + row[:, None], 4 * column[None, :]], tl.float32, True, 1,
        )  # fmt: skip
    else:
        return tl.load(table + (row[:, None] + column[None, :]))


@triton.jit
def sequence_of(cumulative, batch, tokens, VARLEN: tl.constexpr):
    """First token and length of one sequence of a packed batch of so many tokens.

    Cut to the tokens that there are: nobody has looked at these numbers yet.
    """
    if VARLEN:
        first = tl.minimum(tl.maximum(tl.load(cumulative + batch), 0), tokens)
        stop = tl.minimum(tl.load(cumulative + batch + 1), tokens)
        return first, tl.maximum(stop - first, 0)
    else:
        return 0, tokens


@triton.jit
def load_three(pointer):
    """Three integers that follow each other."""
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2)


@triton.jit
def grid_place(
    program, table, programs, ROW_TILE: tl.constexpr, V: tl.constexpr, LAST_FIRST: tl.constexpr
):  # fmt: skip
    """The row tile of a program where grids differ in size, of so many programs for each head.

    Returns its number along each axis, head, grid, and what `arguments.Table` has of the grid.
    """
    number = tl.load(table + program % programs)
    grid = table + programs + number * GRID_NUMBERS
    lengths, kernels = load_three(grid), load_three(grid + 3)
    strides, dilations = load_three(grid + 6), load_three(grid + 9)
    tiles = (
        ceil_div(ceil_div(lengths[0], dilations[0]), ROW_TILE[0]),
        ceil_div(ceil_div(lengths[1], dilations[1]), ROW_TILE[1]),
        ceil_div(ceil_div(lengths[2], dilations[2]), ROW_TILE[2]),
    )
    in_grid = program % programs - tl.load(grid + 12)
    tile, _head, _batch = program_place(in_grid, tiles, dilations, 1, None, V, LAST_FIRST)
    first_token = tl.load(grid + 13)
    return (
        tile, program // programs, number, first_token, tiles, lengths, kernels, strides, dilations,
    )  # fmt: skip


@triton.jit
def row_tile(program, row, data, heads, INVERSE: tl.constexpr, V: tl.constexpr):
    """The row tile of a program and the columns it has to visit, all axes together.

    `row` are places of rows in the tile, usually all of them. Rows are queries and columns keys, or
    the other way round if `INVERSE`. Returns `Place`, `Rows`, `Box` and `Columns`.
    """
    window = data.window
    if INVERSE:
        ROW_TILE: tl.constexpr = V.KEY_TILE
        COLUMN_TILE: tl.constexpr = V.QUERY_TILE
        cumulative_row, cumulative_column = data.cumulative_key, data.cumulative_query
        row_origins, row_extents = window.key_origins, window.key_extents
        column_origins, column_extents = window.query_origins, window.query_extents
    else:
        ROW_TILE: tl.constexpr = V.QUERY_TILE
        COLUMN_TILE: tl.constexpr = V.KEY_TILE
        cumulative_row, cumulative_column = data.cumulative_query, data.cumulative_key
        row_origins, row_extents = window.query_origins, window.query_extents
        column_origins, column_extents = window.key_origins, window.key_extents
    # In a causal problem the last queries and the first keys have most to do: start them first.
    LAST_FIRST: tl.constexpr = V.CAUSAL[2] and not INVERSE
    if V.GRIDS:
        tile, head, batch, first_token, tiles, lengths, kernels, strides, dilations = grid_place(
            program, data.grids, decode(window.tiles)[2], ROW_TILE, V, LAST_FIRST
        )
        row_origins, column_origins = (0, 0, 0), (0, 0, 0)
        row_extents, column_extents = lengths, lengths
    else:
        strides, dilations = window.strides, window.dilations
        lengths, kernels, tiles = (
            decode(window.lengths), decode(window.kernels), decode(window.tiles),
        )  # fmt: skip
        row_origins, row_extents = decode(row_origins), decode(row_extents)
        column_origins, column_extents = decode(column_origins), decode(column_extents)
        tile, head, batch = program_place(
            program, tiles, dilations, heads, window.divisions, V, LAST_FIRST
        )
    row_first, row_extent = sequence_of(cumulative_row, batch, row_extents[2], V.VARLEN)
    column_first, column_extent = sequence_of(cumulative_column, batch, column_extents[2], V.VARLEN)
    length, kernel, memory_batch = lengths[2], kernels[2], batch
    if V.VARLEN:
        length = tl.maximum(tl.maximum(row_extent, column_extent), 1)
        kernel = length
        memory_batch = batch * 0
    elif V.GRIDS:
        memory_batch = first_token

    row = unravel(row, ROW_TILE)
    rows_x, box_x, columns_x = axis_rows(
        (tile[0], tiles[0] if V.DILATED[0] else None), row[0],
        (lengths[0], kernels[0], strides[0], dilations[0]),
        (row_origins[0], row_extents[0]), (column_origins[0], column_extents[0]),
        ROW_TILE[0], COLUMN_TILE[0], V.CAUSAL[0], V.CIRCULAR[0], V.UPSAMPLING[0],
        INVERSE, V.RANK == 3,
    )  # fmt: skip
    rows_y, box_y, columns_y = axis_rows(
        (tile[1], tiles[1] if V.DILATED[1] else None), row[1],
        (lengths[1], kernels[1], strides[1], dilations[1]),
        (row_origins[1], row_extents[1]), (column_origins[1], column_extents[1]),
        ROW_TILE[1], COLUMN_TILE[1], V.CAUSAL[1], V.CIRCULAR[1], V.UPSAMPLING[1],
        INVERSE, V.RANK >= 2,
    )  # fmt: skip
    rows_z, box_z, columns_z = axis_rows(
        (tile[2], tiles[2] if V.DILATED[2] else None), row[2],
        (length, kernel, strides[2], dilations[2]),
        (row_origins[2], row_extent), (column_origins[2], column_extent),
        ROW_TILE[2], COLUMN_TILE[2], V.CAUSAL[2], V.CIRCULAR[2], V.UPSAMPLING[2],
        INVERSE, True,
    )  # fmt: skip
    row_memory = rows_x[0], rows_y[0], rows_z[0] + row_first
    column_memory = columns_x[1], columns_y[1], columns_z[1] + column_first
    column_dilation = dilations
    if V.GRIDS:
        # Strides along all axes are those of a token.
        plane = lengths[1] * lengths[2]
        row_memory = row_memory[0] * plane, row_memory[1] * lengths[2], row_memory[2]
        column_memory = column_memory[0] * plane, column_memory[1] * lengths[2], column_memory[2]
        column_dilation = dilations[0] * plane, dilations[1] * lengths[2], dilations[2]
    inverses = (0, 0, 0)
    if V.RANK == 2:
        inverses = (0, 0, reciprocal(tl.maximum(box_z[1], 1)))
    if V.FIRST_AXIS_FASTEST:
        inverses = (reciprocal(tl.maximum(box_x[1], 1)), reciprocal(tl.maximum(box_y[1], 1)), 0)
    elif V.RANK == 3:
        inverses = (0, reciprocal(tl.maximum(box_y[1], 1)), reciprocal(tl.maximum(box_z[1], 1)))
    return (
        Place(head, batch, memory_batch),
        Rows(
            memory=row_memory,
            exists=(rows_x[1], rows_y[1], rows_z[1]),
            position=(rows_x[2], rows_y[2], rows_z[2]),
            begin=(rows_x[3], rows_y[3], rows_z[3]),
            width=(rows_x[4], rows_y[4], rows_z[4]),
            corner=(rows_x[5], rows_y[5], rows_z[5]),
        ),
        Box(
            union=(box_x[0], box_y[0], box_z[0]),
            counts=(box_x[1], box_y[1], box_z[1]),
            inner=(box_x[2], box_y[2], box_z[2]),
            inner_counts=(box_x[3], box_y[3], box_z[3]),
            inverses=inverses,
        ),
        Columns(
            first=(columns_x[0], columns_y[0], columns_z[0]),
            memory=column_memory,
            extent=(columns_x[2], columns_y[2], columns_z[2]),
            dilation=column_dilation,
            sequence=column_first,
        ),
    )


@triton.jit
def column_steps(box):
    """Number of column tiles that a row tile visits."""
    return box.counts[0] * box.counts[1] * box.counts[2]


@triton.jit
def additional_count(counts, batch, most):
    """How many additional tokens a batch entry has; `counts` is None where it has all.

    Cut to those that there are: nobody has looked at these numbers yet.
    """
    if counts is None:
        return most
    else:
        return tl.minimum(tl.maximum(tl.load(counts + batch), 0), most).to(tl.int32)


@triton.jit
def additional_source(batch, head, data, most, V: tl.constexpr):
    """One head's additional tokens."""
    strides = data.strides
    key = head_offset(batch, head, strides.additional_key, V.UNIT, V.WIDE)
    value = head_offset(batch, head, strides.additional_value, V.UNIT, V.WIDE)
    key, value = data.additional_key + key, data.additional_value + value
    return Additional(key, value, additional_count(data.additional_counts, batch, most))


@triton.jit
def additional_tile(t, additional, strides, COLUMNS: tl.constexpr, V: tl.constexpr):
    """The t-th tile of additional keys and values, and which of them exist."""
    key_stride = decode(strides.additional_key)[3]
    value_stride = decode(strides.additional_value)[3]
    token = t * COLUMNS + tl.arange(0, COLUMNS)
    present = token < additional.number
    token = sized(token, V.WIDE)
    key_offset = token * (sized(key_stride, V.WIDE) * V.UNIT)
    value_offset = token * (sized(value_stride, V.WIDE) * V.UNIT)
    PARTS: tl.constexpr = V.PARTS
    VALUE_PARTS: tl.constexpr = V.VALUE_PARTS
    return (
        load_parts(additional.key, key_offset, present, V.FEATURES, PARTS),
        load_parts(additional.value, value_offset, present, V.VALUE_FEATURES, VALUE_PARTS),
        present,
    )


@triton.jit
def additional_scores(row_features, column_features, present, cap, V: tl.constexpr):
    """Scores of such a tile before scaling, -inf where no token is, and their derivatives as those
    of `tile_scores`."""
    PRECISION: tl.constexpr = V.PRECISION
    scores = multiply(row_features, column_features, None, PRECISION)
    if V.NEGATE:
        scores = -scores
    scores, slopes = capped(scores, cap)
    return tl.where(present[None, :], scores, float("-inf")), slopes
