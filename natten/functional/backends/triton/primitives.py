"""What every kernel shares: windows, boxes of tiles, tile loads and scores.

A program owns a tile of *rows* and visits tiles of *columns*. In the forward pass and for the
gradient of the query, rows are queries and columns are keys; for the gradients of key and value it
is the other way round, and windows are replaced by inverse windows. Both are boxes (window bounds
are monotone), so one set of functions serves all kernels.

Kernels always have three axes; a grid of lower rank has leading axes of extent one, which `RANK`
lets the compiler drop. Positions are counted inside a dilation group (see `natten.window`), and
column positions start at the first column that exists, so that a column tile is a plain box of the
strided view of one group: dilation and sub-grids need no permutation of tokens.

The window test must agree with `natten.window`; `tests/test_triton_window.py` compares them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Whether kernels may contain PTX.
INLINE = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator


@triton.jit
def revealed(hidden):
    """The integers behind `launch._hidden`'s, three (axes) or five (strides)."""
    x = (hidden[0] >> 1) - 1
    y = (hidden[1] >> 1) - 1
    z = (hidden[2] >> 1) - 1
    if len(hidden) == 3:
        return x, y, z
    else:
        return x, y, z, (hidden[3] >> 1) - 1, (hidden[4] >> 1) - 1


@triton.jit
def query_window(position, length, kernel, stride, CAUSAL: tl.constexpr):
    """First key and one past the last key that the query at `position` attends to."""
    if CAUSAL:
        leader = tl.minimum(position // stride * stride + stride - 1, length - 1)
        return tl.maximum(leader - kernel + 1, 0), position + 1
    else:
        leader = tl.minimum(position // stride * stride + stride // 2, length - 1)
        start = tl.minimum(tl.maximum(leader - kernel // 2, 0), length - kernel)
        return start, start + kernel


@triton.jit
def key_window(position, length, kernel, stride, CAUSAL: tl.constexpr):
    """First query and one past the last query that attends to the key at `position`."""
    if CAUSAL:
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
    INVERSE: tl.constexpr,
):
    """Columns that a row sees, counted from the first column that exists."""
    if INVERSE:
        start, end = key_window(position, length, kernel, stride, CAUSAL)
    else:
        start, end = query_window(position, length, kernel, stride, CAUSAL)
    start = tl.minimum(tl.maximum(start, first_column), end_column)
    end = tl.maximum(tl.minimum(end, end_column), start)
    return start - first_column, end - first_column


@triton.jit
def axis_rows(
    tile, tiles, length, kernel, stride, dilation,
    row_origin, row_extent, column_origin, column_extent, offset,
    TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, CAUSAL: tl.constexpr,
    INVERSE: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """Everything about one axis of a row tile.

    `tile` counts over all tiles of all dilation groups of the axis, `tiles` is their number in one
    group, `offset` the place of each row inside the tile.

    Returns three groups. For each row: its coordinate in memory, whether it exists, its position,
    where its window begins and how wide that is, and the position of the tile's first row. Of the
    tile: where the union of the windows begins, how many column tiles cover it, the first column
    tile in sight of all rows, and how many of these there are. Of the columns: the first one's
    position and coordinate in memory, and their number.
    """
    if ACTIVE:
        group = tile // tiles
        group_length = ceil_div(length - group, dilation)
        row_begin = ceil_div(tl.maximum(row_origin - group, 0), dilation)
        row_end = (row_origin + row_extent - group + dilation - 1) // dilation
        column_begin = ceil_div(tl.maximum(column_origin - group, 0), dilation)
        column_end = (column_origin + column_extent - group + dilation - 1) // dilation
        column_end = tl.maximum(column_end, column_begin)

        # Tiles sit on multiples of their size, so that they line up with groups of a stride.
        first = (row_begin // TILE + tile % tiles) * TILE
        head = tl.maximum(first, row_begin)
        end_of_rows = tl.minimum(first + TILE, row_end)
        tail = tl.maximum(end_of_rows - 1, 0)
        begin_head, end_head = window(
            head, group_length, kernel, stride, column_begin, column_end, CAUSAL, INVERSE
        )
        begin_tail, end_tail = window(
            tail, group_length, kernel, stride, column_begin, column_end, CAUSAL, INVERSE
        )
        count = tl.where(end_of_rows > head, ceil_div(end_tail - begin_head, COLUMN_TILE), 0)
        inner = tl.minimum(tl.maximum(ceil_div(begin_tail - begin_head, COLUMN_TILE), 0), count)
        inner_end = tl.maximum(end_head - begin_head, 0) // COLUMN_TILE
        inner_count = tl.maximum(tl.minimum(inner_end, count) - inner, 0)

        position = first + offset
        exists = (position >= row_begin) & (position < row_end)
        begin, end = window(
            position, group_length, kernel, stride, column_begin, column_end, CAUSAL, INVERSE
        )
        memory = position * dilation + group - row_origin
        column_memory = column_begin * dilation + group - column_origin
        return (
            # Rows that do not exist see nothing: their biases would lie outside the table.
            (memory, exists, position, begin, tl.where(exists, end - begin, 0), first),
            (begin_head, count, inner, inner_count),
            (column_begin, column_memory, column_end - column_begin),
        )  # fmt: skip
    else:
        return (offset, offset < 1, offset, offset, offset + 1, 0), (0, 1, 0, 1), (0, 0, 1)


@triton.jit
def program_place(program, tiles, dilations, heads, RANK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Row tile along each axis, head and batch of a program. Tiles of one head are neighbors."""
    tiles_z = tiles[2] * dilations[2]
    tiles_y = 1
    tiles_x = 1
    if RANK >= 2:
        tiles_y = tiles[1] * dilations[1]
    if RANK == 3:
        tiles_x = tiles[0] * dilations[0]
    in_head = tiles_x * tiles_y * tiles_z
    tile = program % in_head
    if LAST_FIRST:
        # The longest rows of a causal problem come last: start them first.
        tile = in_head - 1 - tile
    rest = program // in_head
    z = tile % tiles_z
    y = (tile // tiles_z) % tiles_y
    x = tile // (tiles_z * tiles_y)
    return (x, y, z), rest % heads, rest // heads


@triton.jit
def unravel(index, TILE: tl.constexpr):
    """Place inside a tile, an axis at a time."""
    return index // (TILE[1] * TILE[2]), (index // TILE[2]) % TILE[1], index % TILE[2]


@triton.jit
def reciprocal(divisor):
    """2**32 / divisor, rounded up; 0 for 1."""
    return tl.cast(2**32 - 1, tl.uint32) // tl.cast(divisor, tl.uint32) + 1


@triton.jit
def quotient(dividend, divisor, inverse):
    """Exact while the product of both is below 2**32, which `launch` makes sure of."""
    high = tl.umulhi(tl.cast(dividend, tl.uint32), inverse).to(tl.int32)
    return tl.where(divisor == 1, dividend, high)


@triton.jit
def column_tile(t, box, COLUMN_TILE: tl.constexpr, RANK: tl.constexpr):
    """Corner of the t-th column tile of a box, and whether all rows see all of it."""
    union, counts, inner, inner_counts, inverses = box
    x, y, z = t * 0, t * 0, t
    if RANK >= 2:
        y = quotient(t, counts[2], inverses[2])
        z = t - y * counts[2]
    if RANK == 3:
        x = quotient(y, counts[1], inverses[1])
        y -= x * counts[1]
    whole = (z >= inner[2]) & (z < inner[2] + inner_counts[2])
    if RANK >= 2:
        whole = whole & (y >= inner[1]) & (y < inner[1] + inner_counts[1])
    if RANK == 3:
        whole = whole & (x >= inner[0]) & (x < inner[0] + inner_counts[0])
    corner = (
        union[0] + x * COLUMN_TILE[0], union[1] + y * COLUMN_TILE[1], union[2] + z * COLUMN_TILE[2],
    )  # fmt: skip
    return corner, whole


@triton.jit
def row_offsets(memory, exists, strides, UNIT: tl.constexpr, RANK: tl.constexpr):
    """Element offset of each row's token from the start of its batch and head, and its mask."""
    strides = revealed(strides)
    offset = memory[2].to(tl.int64) * (strides[3] * UNIT)
    all_exist = exists[2]
    if RANK >= 2:
        offset += memory[1].to(tl.int64) * (strides[2] * UNIT)
        all_exist = all_exist & exists[1]
    if RANK == 3:
        offset += memory[0].to(tl.int64) * (strides[1] * UNIT)
        all_exist = all_exist & exists[0]
    return offset, all_exist


@triton.jit
def head_offset(batch, head, strides, UNIT: tl.constexpr):
    """Element offset of a batch and head. `UNIT` divides every stride: it tells the alignment."""
    strides = revealed(strides)
    return tl.cast(batch, tl.int64) * (strides[0] * UNIT) + head.to(tl.int64) * (strides[4] * UNIT)


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


@triton.jit
def column_source(
    source, batch, head, memory, strides, dilations,
    UNIT: tl.constexpr, RANK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Where the columns of one batch, head and dilation group come from, and their strides.

    `memory` is the coordinate of the first column. With `TMA`, `source` is a descriptor of the
    whole tensor, else a pointer to it.
    """
    _batch, stride_x, stride_y, stride_z, _head = revealed(strides)
    step_x, step_y, step_z = 0, 0, stride_z.to(tl.int64) * UNIT * dilations[2]
    if RANK >= 2:
        step_y = stride_y.to(tl.int64) * UNIT * dilations[1]
    if RANK == 3:
        step_x = stride_x.to(tl.int64) * UNIT * dilations[0]
    if TMA:
        return source, (step_x, step_y, step_z)
    else:
        start = head_offset(batch, head, strides, UNIT)
        start += memory[2].to(tl.int64) * (stride_z * UNIT)
        if RANK >= 2:
            start += memory[1].to(tl.int64) * (stride_y * UNIT)
        if RANK == 3:
            start += memory[0].to(tl.int64) * (stride_x * UNIT)
        return source + start, (step_x, step_y, step_z)


@triton.jit
def load_columns(
    source, batch, head, corner, first, extent, steps, place,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The column tile at `corner`, as [columns, features]; what lies outside reads as zero."""
    if TMA:
        box = source.load([batch, corner[0], corner[1], first + corner[2], head * FEATURES])
        return box.reshape(COLUMNS, BLOCK)
    else:
        exists = place[2] < extent[2] - corner[2]
        start = corner[2] * steps[2]
        offset = place[2] * (steps[2] if WIDE else steps[2].to(tl.int32))
        if RANK >= 2:
            exists = exists & (place[1] < extent[1] - corner[1])
            start += corner[1] * steps[1]
            offset += place[1] * (steps[1] if WIDE else steps[1].to(tl.int32))
        if RANK == 3:
            exists = exists & (place[0] < extent[0] - corner[0])
            start += corner[0] * steps[0]
            offset += place[0] * (steps[0] if WIDE else steps[0].to(tl.int32))
        return load_rows(source + start, offset, exists, FEATURES, BLOCK)


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
    rows, columns, corner, whole, place, begin, width, position, first, kernels, bias, paddings,
    head,
    MASK: tl.constexpr, INVERSE: tl.constexpr, HAS_RPB: tl.constexpr, NEGATE: tl.constexpr,
    RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile before scaling, -inf where a row does not see a column: [rows, columns].

    `MASK` says which tiles are masked: "always" all of them, "edges" those that not all rows see
    all of, "never" none, for there are no such tiles. A bias is what the product adds to: as a
    summand of its own, its layout, that of a load, would spread to all that follows.
    """
    if HAS_RPB:
        row, column, size = bias_slot(
            corner, place, position, first, kernels, paddings, INVERSE, RANK
        )
        biases = load_biases(bias + head.to(tl.int64) * size, row, column)
        scores = tl.dot(rows, columns.T, biases, input_precision=PRECISION)
    else:
        scores = tl.dot(rows, columns.T, input_precision=PRECISION)
    if NEGATE:
        scores = -scores
    if MASK == "edges":
        if not whole:
            scores = tl.where(in_sight(corner, place, begin, width, RANK), scores, float("-inf"))
    elif MASK == "always":
        scores = tl.where(in_sight(corner, place, begin, width, RANK), scores, float("-inf"))
    return scores


@triton.jit
def bias_slot(
    corner, place, position, first, kernels, paddings, INVERSE: tl.constexpr, RANK: tl.constexpr
):
    """Where the bias of each (row, column) lies in one head's table, and the table's size.

    Along an axis that is key position - query position + kernel - 1, and the padding before it.
    Returned are two summands: that of each row, with the tile's place, and that of each column
    inside its tile, which is not negative.
    """
    kernels, paddings = revealed(kernels), revealed(paddings)
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
def table_size(kernels, paddings):
    """Entries of one head's padded table; axes that the grid lacks have one."""
    kernels, paddings = revealed(kernels), revealed(paddings)
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
def row_tile(
    program, row, cumulative_row, cumulative_column, lengths, kernels, strides, dilations,
    row_origins, row_extents, column_origins, column_extents, tiles, heads,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, CAUSAL: tl.constexpr,
    INVERSE: tl.constexpr, RANK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The row tile of a program and the columns it has to visit, all axes together.

    `row` are places of rows in the tile, usually all of them. Returns the tile's place (head,
    batch, the batch's index in memory), then the groups that `axis_rows` names, each quantity as
    one value an axis. The columns' group ends with the first column of the sequence, for packed
    batches.
    """
    lengths, kernels, tiles = revealed(lengths), revealed(kernels), revealed(tiles)
    row_origins, row_extents = revealed(row_origins), revealed(row_extents)
    column_origins, column_extents = revealed(column_origins), revealed(column_extents)
    # In a causal problem the last queries and the first keys have most to do: start them first.
    tile, head, batch = program_place(
        program, tiles, dilations, heads, RANK, CAUSAL[2] and not INVERSE
    )
    row_first, row_extent = sequence_of(cumulative_row, batch, row_extents[2], VARLEN)
    column_first, column_extent = sequence_of(cumulative_column, batch, column_extents[2], VARLEN)
    length, kernel, memory_batch = lengths[2], kernels[2], batch
    if VARLEN:
        length = tl.maximum(tl.maximum(row_extent, column_extent), 1)
        kernel = length
        memory_batch = batch * 0

    row = unravel(row, ROW_TILE)
    rows_x, box_x, columns_x = axis_rows(
        tile[0], tiles[0], lengths[0], kernels[0], strides[0], dilations[0],
        row_origins[0], row_extents[0], column_origins[0], column_extents[0],
        row[0], ROW_TILE[0], COLUMN_TILE[0], CAUSAL[0], INVERSE, RANK == 3,
    )  # fmt: skip
    rows_y, box_y, columns_y = axis_rows(
        tile[1], tiles[1], lengths[1], kernels[1], strides[1], dilations[1],
        row_origins[1], row_extents[1], column_origins[1], column_extents[1],
        row[1], ROW_TILE[1], COLUMN_TILE[1], CAUSAL[1], INVERSE, RANK >= 2,
    )  # fmt: skip
    rows_z, box_z, columns_z = axis_rows(
        tile[2], tiles[2], length, kernel, strides[2], dilations[2],
        row_origins[2], row_extent, column_origins[2], column_extent,
        row[2], ROW_TILE[2], COLUMN_TILE[2], CAUSAL[2], INVERSE, True,
    )  # fmt: skip
    memory = (rows_x[0], rows_y[0], rows_z[0] + row_first)
    exists = (rows_x[1], rows_y[1], rows_z[1])
    position = (rows_x[2], rows_y[2], rows_z[2])
    begin = (rows_x[3], rows_y[3], rows_z[3])
    width = (rows_x[4], rows_y[4], rows_z[4])
    corner = (rows_x[5], rows_y[5], rows_z[5])
    union = (box_x[0], box_y[0], box_z[0])
    counts = (box_x[1], box_y[1], box_z[1])
    inner = (box_x[2], box_y[2], box_z[2])
    inner_counts = (box_x[3], box_y[3], box_z[3])
    inverses = (0, 0, 0)
    if RANK == 2:
        inverses = (0, 0, reciprocal(tl.maximum(box_z[1], 1)))
    if RANK == 3:
        inverses = (0, reciprocal(tl.maximum(box_y[1], 1)), reciprocal(tl.maximum(box_z[1], 1)))
    first = (columns_x[0], columns_y[0], columns_z[0])
    column_memory = (columns_x[1], columns_y[1], columns_z[1] + column_first)
    extent = (columns_x[2], columns_y[2], columns_z[2])
    return (
        (head, batch, memory_batch),
        (memory, exists, position, begin, width, corner),
        (union, counts, inner, inner_counts, inverses),
        (first, column_memory, extent, column_first),
    )  # fmt: skip


@triton.jit
def column_steps(box):
    """Number of column tiles that a row tile visits."""
    counts = box[1]
    return counts[0] * counts[1] * counts[2]


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
def additional_tile(
    t, count, keys, values, key_strides, value_strides,
    FEATURES: tl.constexpr, VALUE_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The t-th tile of additional keys and values, and which of them exist."""
    key_stride, value_stride = revealed(key_strides)[3], revealed(value_strides)[3]
    token = t * COLUMNS + tl.arange(0, COLUMNS)
    present = token < count
    token = token.to(tl.int64)
    return (
        load_rows(keys, token * (key_stride * UNIT), present, FEATURES, BLOCK),
        load_rows(values, token * (value_stride * UNIT), present, VALUE_FEATURES, VALUE_BLOCK),
        present,
    )  # fmt: skip
