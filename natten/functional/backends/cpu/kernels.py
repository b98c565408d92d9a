"""Compiled loops of the CPU backend: attention over a list of key rows for one query at a time.

Everything numba compiles lives in this one file, because numba's disk cache notices changes of the file
that holds a compiled function only, not of the files it calls into.

The unit of work is a box of queries (or, for the gradients of keys and values, a box of keys) of one batch
entry, one key head and one residue of the dilation. A thread copies the rows that the box can see into a
contiguous, zero-padded scratch array in the compute type; every stride, storage type and dilation ends
there. A row's window is then a list of `picks`, offsets into the scratch array relative to the window's first
row; the list changes only where the window's extents do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 8
FLOATING, BFLOAT16, FLOAT16 = 0, 1, 2


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL; keep the result on disk wherever numba finds a writable folder."""
    # Contraction and reassociation only: the flags that assume no NaN and no infinity stay off.
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)



class Vector(types.Type):
    """LANES numbers of one floating type, held in registers."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(manager[kind.dtype].get_value_type(), LANES))


def _vector_pointer(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, index: Any) -> Any:
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    kind = ir.VectorType(context.get_value_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def load(typing, array, index):
    """The vector array[index : index + LANES] of a contiguous array."""

    def generate(context, builder, signature, args):
        pointer = _vector_pointer(context, builder, signature.args[0], *args)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def store(typing, array, index, vector):
    """array[index : index + LANES] = vector."""

    def generate(context, builder, signature, args):
        pointer = _vector_pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(typing, array, value):
    """`value` in every lane, in the type of the array's elements."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(context.get_value_type(array.dtype), LANES)
        single = builder.insert_element(ir.Constant(kind, ir.Undefined), args[1], ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)

    return Vector(array.dtype)(array, array.dtype), generate


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    width = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{LANES}{width}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once where the processor can."""

    def generate(context, builder, signature, args):
        return _multiply_add(builder, *args)

    return a(a, b, c), generate


def _elementwise(emit: Callable[..., Any], doc: str) -> Any:
    @intrinsic
    def operation(typing, a, b):
        def generate(context, builder, signature, args):
            return emit(builder, *args)

        return a(a, b), generate

    operation.__doc__ = doc
    return operation


add = _elementwise(lambda builder, a, b: builder.fadd(a, b), "a + b")
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b), "a - b")
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), "a * b")
larger = _elementwise(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), "a where a > b, else b"
)


def _halves(level: int) -> tuple[list[int], list[int]]:
    """Shuffles of two vectors whose sum halves the number of partial sums of each."""
    step = 1 << level
    low = [i + (LANES - step if i & step else 0) for i in range(LANES)]
    return low, [i + step for i in low]


def _sum_lanes(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """Lane i of the result is the sum of all lanes of vectors[i]."""
    mask = ir.VectorType(ir.IntType(32), LANES)
    level = 0
    while len(vectors) > 1:
        low, high = (ir.Constant(mask, indices) for indices in _halves(level))
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        level += 1
    return vectors[0]


@intrinsic
def sum_lanes(typing, a, b, c, d, e, f, g, h):
    """The vector of the eight arguments' sums over lanes."""

    def generate(context, builder, signature, args):
        return _sum_lanes(builder, list(args))

    return a(a, b, c, d, e, f, g, h), generate


@intrinsic
def reduce_sum(typing, vector):
    """The sum of a vector's lanes."""

    def generate(context, builder, signature, args):
        total = _sum_lanes(builder, [args[0]] * LANES)
        return builder.extract_element(total, ir.IntType(32)(0))

    return vector.dtype(vector), generate


@intrinsic
def reduce_max(typing, vector):
    """The largest lane of a vector."""

    def generate(context, builder, signature, args):
        best = builder.extract_element(args[0], ir.IntType(32)(0))
        for i in range(1, LANES):
            lane = builder.extract_element(args[0], ir.IntType(32)(i))
            best = builder.select(builder.fcmp_ordered(">", lane, best), lane, best)
        return best

    return vector.dtype(vector), generate


@intrinsic
def exp(typing, vector):
    """e ** x for x up to about 80; 0 below the normal range, NaN for NaN. Within 2 units in the last place."""

    def generate(context, builder, signature, args):
        x = args[0]
        single = vector.dtype.bitwidth == 32
        kind, bits = x.type, ir.VectorType(ir.IntType(vector.dtype.bitwidth), LANES)

        def real(value: float) -> Any:
            return ir.Constant(kind, [value] * LANES)

        def whole(value: int) -> Any:
            return ir.Constant(bits, [value] * LANES)

        mantissa, bias, smallest, degree = (23, 127, -87.0, 7) if single else (52, 1023, -708.0, 13)
        # Adding 1.5 * 2 ** mantissa leaves round(x / log 2) in the low bits of the sum.
        magic = real(1.5 * 2.0**mantissa)
        shifted = _multiply_add(builder, x, real(1 / math.log(2)), magic)
        count = builder.fsub(shifted, magic)
        # log 2 in two parts, so that count * high is exact.
        high = math.floor(math.log(2) * 2.0 ** (mantissa - 12)) / 2.0 ** (mantissa - 12)
        low = 1.90821492927058770002e-10 if not single else math.log(2) - high
        if not single:
            high = 6.93147180369123816490e-01
        rest = _multiply_add(builder, count, real(-high), x)
        rest = _multiply_add(builder, count, real(-low), rest)
        result = real(1 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            result = _multiply_add(builder, result, rest, real(1 / math.factorial(power)))
        exponent = builder.add(builder.bitcast(shifted, bits), whole(bias))
        power_of_two = builder.bitcast(builder.shl(exponent, whole(mantissa)), kind)
        result = builder.fmul(result, power_of_two)
        return builder.select(builder.fcmp_ordered("<", x, real(smallest)), real(0.0), result)

    return vector(vector), generate



@intrinsic
def take_ticket(typing, counter):
    """The value of counter[0], which grows by one; no two threads get the same."""

    def generate(context, builder, signature, args):
        data = cgutils.create_struct_proxy(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def pointer(typing, address):
    """An integer address as the pointer that `carray` takes."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


def _bitcast(source: types.Type, target: types.Type, doc: str) -> Any:
    @intrinsic
    def operation(typing, value):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    operation.__doc__ = doc
    return operation


bits_of = _bitcast(types.float32, types.uint32, "The bits of a float32.")
from_bits = _bitcast(types.uint32, types.float32, "The float32 of these bits.")


@jit
def widen_bfloat16(half):
    return from_bits(np.uint32(half) << np.uint32(16))


@jit
def narrow_bfloat16(value):
    """Round to nearest even."""
    bits = bits_of(np.float32(value))
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(0x7FC00000) if value != value else np.uint32(rounded)
    return np.uint16(rounded >> np.uint32(16))


@jit
def widen_float16(half):
    bits = np.uint32(half)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    # The product rescales the exponent and normalises subnormal numbers.
    size = from_bits((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    special = (bits & np.uint32(0x7C00)) == np.uint32(0x7C00)
    size_bits = bits_of(size) | (np.uint32(0x7F800000) if special else np.uint32(0))
    return from_bits(size_bits | sign)


@jit
def narrow_float16(value):
    """Round to nearest even, to infinity beyond 65520."""
    bits = bits_of(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    # Normal numbers: move the exponent's bias, round the mantissa by integer addition.
    normal = size - np.uint32(0x38000000) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
    normal = normal >> np.uint32(13)
    # Subnormal numbers: an addition lets the processor round at the right bit.
    small = bits_of(from_bits(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    result = small if size < np.uint32(0x38800000) else normal
    if size >= np.uint32(0x477FF000):
        result = np.uint32(0x7C00)
    if size > np.uint32(0x7F800000):
        result = np.uint32(0x7E00)
    return np.uint16(result | sign)


@jit
def read_row(address, step, count, kind, factor, out, at, padded):
    """out[at:] = factor * the `count` numbers `step` elements apart at `address`, then zeros up to `padded`."""
    if kind == FLOATING:
        source = carray(pointer(address), ((count - 1) * step + 1,), out.dtype)
        if step == 1:
            for i in range(count):
                out[at + i] = source[i] * factor
        else:
            for i in range(count):
                out[at + i] = source[i * step] * factor
    else:
        halves = carray(pointer(address), ((count - 1) * step + 1,), np.uint16)
        if kind == BFLOAT16:
            for i in range(count):
                out[at + i] = widen_bfloat16(halves[i * step]) * factor
        else:
            for i in range(count):
                out[at + i] = widen_float16(halves[i * step]) * factor
    for i in range(count, padded):
        out[at + i] = 0


@jit
def write_row(values, at, count, kind, factor, address, step):
    """The reverse of read_row."""
    if kind == FLOATING:
        target = carray(pointer(address), ((count - 1) * step + 1,), values.dtype)
        for i in range(count):
            target[i * step] = values[at + i] * factor
    else:
        halves = carray(pointer(address), ((count - 1) * step + 1,), np.uint16)
        if kind == BFLOAT16:
            for i in range(count):
                halves[i * step] = narrow_bfloat16(values[at + i] * factor)
        else:
            for i in range(count):
                halves[i * step] = narrow_float16(values[at + i] * factor)


@jit
def read_number(address, like):
    return carray(pointer(address), (1,), like.dtype)[0]


@jit
def write_number(address, value, like):
    carray(pointer(address), (1,), like.dtype)[0] = value



@jit
def dots(row, at, rows, base, width, picks, count, out, to):
    """out[to + j] = row . rows[base + picks[j]], for `count` rounded up to LANES picks."""
    for j in range(0, count, LANES):
        r0 = (base + picks[j]) * width
        r1 = (base + picks[j + 1]) * width
        r2 = (base + picks[j + 2]) * width
        r3 = (base + picks[j + 3]) * width
        r4 = (base + picks[j + 4]) * width
        r5 = (base + picks[j + 5]) * width
        r6 = (base + picks[j + 6]) * width
        r7 = (base + picks[j + 7]) * width
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(out, 0)
        for i in range(0, width, LANES):
            x = load(row, at + i)
            s0 = fma(x, load(rows, r0 + i), s0)
            s1 = fma(x, load(rows, r1 + i), s1)
            s2 = fma(x, load(rows, r2 + i), s2)
            s3 = fma(x, load(rows, r3 + i), s3)
            s4 = fma(x, load(rows, r4 + i), s4)
            s5 = fma(x, load(rows, r5 + i), s5)
            s6 = fma(x, load(rows, r6 + i), s6)
            s7 = fma(x, load(rows, r7 + i), s7)
        store(out, to + j, sum_lanes(s0, s1, s2, s3, s4, s5, s6, s7))


@jit
def dot(a, b, width):
    """a[:width] . b[:width], of a multiple of LANES numbers."""
    total = splat(a, 0)
    for i in range(0, width, LANES):
        total = fma(load(a, i), load(b, i), total)
    return reduce_sum(total)


@jit
def accumulate(weights, w, rows, base, width, picks, count, out, to):
    """out[to : to + width] += sum of weights[w + j] * rows[base + picks[j]] over j < count."""
    even = count - count % 2
    whole = width - width % (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        # Two rows a step: eight independent sums hide the latency of the multiply-add.
        a0 = load(out, to + i)
        a1 = load(out, to + i + LANES)
        a2 = load(out, to + i + 2 * LANES)
        a3 = load(out, to + i + 3 * LANES)
        b0 = b1 = b2 = b3 = splat(out, 0)
        for j in range(0, even, 2):
            r = (base + picks[j]) * width + i
            x = splat(out, weights[w + j])
            a0 = fma(x, load(rows, r), a0)
            a1 = fma(x, load(rows, r + LANES), a1)
            a2 = fma(x, load(rows, r + 2 * LANES), a2)
            a3 = fma(x, load(rows, r + 3 * LANES), a3)
            r = (base + picks[j + 1]) * width + i
            x = splat(out, weights[w + j + 1])
            b0 = fma(x, load(rows, r), b0)
            b1 = fma(x, load(rows, r + LANES), b1)
            b2 = fma(x, load(rows, r + 2 * LANES), b2)
            b3 = fma(x, load(rows, r + 3 * LANES), b3)
        if even < count:
            r = (base + picks[even]) * width + i
            x = splat(out, weights[w + even])
            a0 = fma(x, load(rows, r), a0)
            a1 = fma(x, load(rows, r + LANES), a1)
            a2 = fma(x, load(rows, r + 2 * LANES), a2)
            a3 = fma(x, load(rows, r + 3 * LANES), a3)
        store(out, to + i, add(a0, b0))
        store(out, to + i + LANES, add(a1, b1))
        store(out, to + i + 2 * LANES, add(a2, b2))
        store(out, to + i + 3 * LANES, add(a3, b3))
    for i in range(whole, width, LANES):
        a0 = load(out, to + i)
        b0 = splat(out, 0)
        for j in range(0, even, 2):
            a0 = fma(splat(out, weights[w + j]), load(rows, (base + picks[j]) * width + i), a0)
            b0 = fma(splat(out, weights[w + j + 1]), load(rows, (base + picks[j + 1]) * width + i), b0)
        if even < count:
            a0 = fma(splat(out, weights[w + even]), load(rows, (base + picks[even]) * width + i), a0)
        store(out, to + i, add(a0, b0))


@jit
def scatter(weights, w, count, row, width, out, to):
    """out[to + j * width :][:width] += weights[w + j] * row, for j < count."""
    for j in range(count):
        x = splat(out, weights[w + j])
        for i in range(0, width, LANES):
            store(out, to + j * width + i, fma(x, load(row, i), load(out, to + j * width + i)))


@jit
def softmax(scores, count):
    """Replace a multiple of LANES scores by exp(score - largest); the largest and the sum."""
    best = splat(scores, -np.inf)
    for j in range(0, count, LANES):
        best = larger(best, load(scores, j))
    largest = reduce_max(best)
    best = splat(scores, largest)
    total = splat(scores, 0)
    for j in range(0, count, LANES):
        weight = exp(subtract(load(scores, j), best))
        store(scores, j, weight)
        total = add(total, weight)
    return largest, reduce_sum(total)


@jit
def score_gradients(scores, grads, count, lse, delta):
    """Replace a multiple of LANES scores by weights P, and gradients of P by those of the scores."""
    lse = splat(scores, lse)
    delta = splat(scores, delta)
    for j in range(0, count, LANES):
        weight = exp(subtract(load(scores, j), lse))
        store(scores, j, weight)
        store(grads, j, multiply(weight, subtract(load(grads, j), delta)))


@jit
def fill(array, start, end, value):
    for i in range(start, end):
        array[i] = value


@jit
def list_picks(n0, n1, n2, s0, s1, s2, picks):
    """Offsets of an n0 x n1 x n2 box with these strides; the last repeats up to a multiple of LANES."""
    j = 0
    for x in range(n0):
        for y in range(n1):
            for z in range(n2):
                picks[j] = x * s0 + y * s1 + z * s2
                j += 1
    for i in range(j, padded(j)):
        picks[i] = picks[j - 1]


@jit
def padded(count):
    return (count + LANES - 1) // LANES * LANES


# The tables of a sweep, all int64. "Rows" are queries in `forward` and `backward_queries`, keys in
# `backward_keys`; "the others" are what a row sees. Axes are padded to three.
#   axes[a]    first entry of the axis in `items`, first in `blocks`, number of blocks, dilation
#   items[i]   lo, hi, bias: the others that a row of the axis sees, counted inside its residue of the
#              dilation, and what turns such a count into an index of the relative position bias
#   blocks[j]  first row, number of rows, first of the others, lo and hi of all rows together
#   tensors[t] address, byte strides of batch, three axes and heads, element stride of head_dim
FIRST, COUNT, OTHER, LOW, HIGH = 0, 1, 2, 3, 4
# What open_row says about a row: its place, the start of its window, the window's extents, where it
# starts in the bias; and the extents of the window last listed.
AT, START, SIZE, BIAS, LISTED, ROW_SIZE = 0, 3, 6, 9, 12, 15


@jit
def open_unit(unit: int, axes: Ints, blocks: Ints, heads: int, box: Ints) -> tuple[int, int]:
    """Fill box[axis] with the blocks of the unit; returns its batch entry and its head."""
    for axis in range(2, -1, -1):
        number = axes[axis, 2]
        box[axis] = blocks[axes[axis, 1] + unit % number]
        unit = unit // number
    return unit // heads, unit % heads


@jit
def open_row(
    index: int, axes: Ints, items: Ints, box: Ints, sign: int, extents: Ints,
    picks: Ints, bias_picks: Ints, row: Ints,
) -> tuple[int, int]:  # fmt: skip
    """Fill `row` and, where the extents of its window are new, the two lists.

    Returns the size of the window and its first row in the packed box.
    """
    count, first, stride, changed = 1, 0, 1, False
    for axis in range(2, -1, -1):
        at = box[axis, FIRST] + axes[axis, 3] * (index % box[axis, COUNT])
        index = index // box[axis, COUNT]
        item = axes[axis, 0] + at
        size = items[item, 1] - items[item, 0]
        row[AT + axis] = at
        row[START + axis] = items[item, 0]
        row[SIZE + axis] = size
        row[BIAS + axis] = items[item, 2] + sign * items[item, 0]
        changed |= size != row[LISTED + axis]
        row[LISTED + axis] = size
        count *= size
        first += (items[item, 0] - box[axis, LOW]) * stride
        stride *= box[axis, HIGH] - box[axis, LOW]
    if changed:
        y = box[1, HIGH] - box[1, LOW]
        z = box[2, HIGH] - box[2, LOW]
        list_picks(row[SIZE], row[SIZE + 1], row[SIZE + 2], y * z, z, 1, picks)
        y = sign * extents[1]
        z = sign * extents[2]
        list_picks(row[SIZE], row[SIZE + 1], row[SIZE + 2], y * extents[2], z, sign, bias_picks)
    return count, first


@jit
def bias_index(head: int, row: Ints, extents: Ints) -> int:
    at = (head * extents[0] + row[BIAS]) * extents[1] + row[BIAS + 1]
    return at * extents[2] + row[BIAS + 2]


@jit
def locate(tensor: Ints, batch: int, head: int) -> int:
    return tensor[0] + batch * tensor[1] + head * tensor[5]


@jit
def locate_row(tensor: Ints, batch: int, head: int, row: Ints) -> int:
    offset = row[AT] * tensor[2] + row[AT + 1] * tensor[3] + row[AT + 2] * tensor[4]
    return locate(tensor, batch, head) + offset


@jit
def pack(
    tensor: Ints, batch: int, head: int, axes: Ints, box: Ints, kind: int, count: int, width: int,
    factor: float, out: Floats, at: int,
) -> None:  # fmt: skip
    """Copy the others that a box sees to out[at:], one after the other, each padded to `width`."""
    start = locate(tensor, batch, head)
    for x in range(box[0, LOW], box[0, HIGH]):
        start_x = start + (box[0, OTHER] + axes[0, 3] * x) * tensor[2]
        for y in range(box[1, LOW], box[1, HIGH]):
            start_y = start_x + (box[1, OTHER] + axes[1, 3] * y) * tensor[3]
            for z in range(box[2, LOW], box[2, HIGH]):
                start_z = start_y + (box[2, OTHER] + axes[2, 3] * z) * tensor[4]
                read_row(start_z, tensor[6], count, kind, factor, out, at, width)
                at += width


@jit
def pack_list(
    tensor: Ints, batch: int, head: int, length: int, kind: int, count: int, width: int,
    factor: float, out: Floats, at: int,
) -> None:  # fmt: skip
    """The same for the first `length` tokens of the last axis."""
    start = locate(tensor, batch, head)
    for z in range(length):
        read_row(start + z * tensor[4], tensor[6], count, kind, factor, out, at, width)
        at += width


@jit
def score(
    query: Floats, at: int, keys: Floats, first: int, width: int, picks: Ints, count: int,
    extra_keys: Floats, extra_picks: Ints, extra: int, rpb: Floats, bias_at: int, bias_picks: Ints,
    out: Floats, to: int,
) -> None:  # fmt: skip
    """The scores of one query: its window's, then the additional keys', each padded with -inf."""
    dots(query, at, keys, first, width, picks, count, out, to)
    if rpb.size:
        for j in range(count):
            out[to + j] += rpb[bias_at + bias_picks[j]]
    more = to + padded(count)
    fill(out, to + count, more, -np.inf)
    if extra:
        dots(query, at, extra_keys, 0, width, extra_picks, extra, out, more)
        fill(out, more + extra, more + padded(extra), -np.inf)


@jit
def forward(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, heads: int, group: int, dim: int, dim_v: int, extra: int, rpb: Floats,
    extents: Ints, capacity: int, longest: int, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """Attention of every unit that this thread gets.

    tensors: query, key, value, additional keys, additional values, out, logsumexp. work: keys and
    values of `capacity` tokens, additional keys and values, a query, an output, scores. lists: two
    of `longest` picks and one of `extra`.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale = work.dtype.type(1), work.dtype.type(scale)
    keys = work
    values = keys[capacity * width :]
    extra_keys = values[capacity * width_v :]
    extra_values = extra_keys[extra * width :]
    query = extra_values[extra * width_v :]
    result = query[width:]
    scores = result[width_v:]
    picks, bias_picks, extra_picks = lists, lists[longest:], lists[2 * longest :]
    list_picks(1, 1, extra, 0, 0, 1, extra_picks)
    box, row = np.empty((3, 5), np.int64), np.empty(ROW_SIZE, np.int64)
    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        pack(tensors[1], batch, head_kv, axes, box, kind, dim, width, one, keys, 0)
        pack(tensors[2], batch, head_kv, axes, box, kind, dim_v, width_v, one, values, 0)
        pack_list(tensors[3], batch, head_kv, extra, kind, dim, width, one, extra_keys, 0)
        pack_list(tensors[4], batch, head_kv, extra, kind, dim_v, width_v, one, extra_values, 0)
        row[LISTED:] = -1
        for index in range(box[0, COUNT] * box[1, COUNT] * box[2, COUNT]):
            count, first = open_row(index, axes, items, box, 1, extents, picks, bias_picks, row)
            for head in range(head_kv * group, (head_kv + 1) * group):
                fill(result, 0, width_v, 0)
                largest, total = work.dtype.type(-np.inf), one
                if count + extra:
                    address = locate_row(tensors[0], batch, head, row)
                    read_row(address, tensors[0, 6], dim, kind, scale, query, 0, width)
                    score(
                        query, 0, keys, first, width, picks, count, extra_keys, extra_picks, extra,
                        rpb, bias_index(head, row, extents), bias_picks, scores, 0,
                    )  # fmt: skip
                    more = padded(count)
                    largest, total = softmax(scores, more + padded(extra))
                    accumulate(scores, 0, values, first, width_v, picks, count, result, 0)
                    accumulate(
                        scores, more, extra_values, 0, width_v, extra_picks, extra, result, 0
                    )
                address = locate_row(tensors[5], batch, head, row)
                write_row(result, 0, dim_v, kind, one / total, address, tensors[5, 6])
                write_number(locate_row(tensors[6], batch, head, row), largest + math.log(total), work)


@jit
def backward_queries(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, heads: int, group: int, dim: int, dim_v: int, extra: int, rpb: Floats,
    extents: Ints, capacity: int, longest: int, only_delta: bool, bias_grads: Floats,
    extra_grads: Floats, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients that a query owns, and each row's `delta` for backward_keys.

    With P the attention weights and S the scores, dS = P * (dP - delta) where
    delta = rowsum(grad_out * out) - grad_logsumexp.

    tensors: query, key, value, additional keys, additional values, out, logsumexp, grad_out,
    grad_logsumexp (address 0 for none), delta, grad_query. bias_grads: of every unit, or empty.
    extra_grads: of every unit `extra` keys, then as many values, or empty.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale = work.dtype.type(1), work.dtype.type(scale)
    keys = work
    values = keys[capacity * width :]
    extra_keys = values[capacity * width_v :]
    extra_values = extra_keys[extra * width :]
    query = extra_values[extra * width_v :]
    result = query[width:]
    grad_row = result[max(width, width_v) :]
    scores = grad_row[width_v:]
    grads = scores[longest + padded(extra) :]
    picks, bias_picks, extra_picks = lists, lists[longest:], lists[2 * longest :]
    list_picks(1, 1, extra, 0, 0, 1, extra_picks)
    box, row = np.empty((3, 5), np.int64), np.empty(ROW_SIZE, np.int64)
    biases = extents[0] * extents[1] * extents[2]
    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        if not only_delta:
            pack(tensors[1], batch, head_kv, axes, box, kind, dim, width, one, keys, 0)
            pack(tensors[2], batch, head_kv, axes, box, kind, dim_v, width_v, one, values, 0)
            pack_list(tensors[3], batch, head_kv, extra, kind, dim, width, one, extra_keys, 0)
            pack_list(tensors[4], batch, head_kv, extra, kind, dim_v, width_v, one, extra_values, 0)
        row[LISTED:] = -1
        for index in range(box[0, COUNT] * box[1, COUNT] * box[2, COUNT]):
            count, first = open_row(index, axes, items, box, 1, extents, picks, bias_picks, row)
            for head in range(head_kv * group, (head_kv + 1) * group):
                address = locate_row(tensors[5], batch, head, row)
                read_row(address, tensors[5, 6], dim_v, kind, one, result, 0, width_v)
                address = locate_row(tensors[7], batch, head, row)
                read_row(address, tensors[7, 6], dim_v, kind, one, grad_row, 0, width_v)
                delta = dot(result, grad_row, width_v)
                if tensors[8, 0]:
                    delta -= read_number(locate_row(tensors[8], batch, head, row), work)
                write_number(locate_row(tensors[9], batch, head, row), delta, work)
                if only_delta:
                    continue
                fill(result, 0, width, 0)
                if count + extra:
                    address = locate_row(tensors[0], batch, head, row)
                    read_row(address, tensors[0, 6], dim, kind, scale, query, 0, width)
                    score(
                        query, 0, keys, first, width, picks, count, extra_keys, extra_picks, extra,
                        rpb, bias_index(head, row, extents), bias_picks, scores, 0,
                    )  # fmt: skip
                    more = padded(count)
                    dots(grad_row, 0, values, first, width_v, picks, count, grads, 0)
                    dots(grad_row, 0, extra_values, 0, width_v, extra_picks, extra, grads, more)
                    lse = read_number(locate_row(tensors[6], batch, head, row), work)
                    score_gradients(scores, grads, more + padded(extra), lse, delta)
                    accumulate(grads, 0, keys, first, width, picks, count, result, 0)
                    accumulate(grads, more, extra_keys, 0, width, extra_picks, extra, result, 0)
                    if bias_grads.size:
                        at = unit * group * biases
                        at += bias_index(head - head_kv * group, row, extents)
                        for j in range(count):
                            bias_grads[at + bias_picks[j]] += grads[j]
                    if extra_grads.size:
                        at = unit * extra * (width + width_v)
                        scatter(grads, more, extra, query, width, extra_grads, at)
                        at += extra * width
                        scatter(scores, more, extra, grad_row, width_v, extra_grads, at)
                address = locate_row(tensors[10], batch, head, row)
                write_row(result, 0, dim, kind, scale, address, tensors[10, 6])


@jit
def backward_keys(
    counter: Ints, units: int, axes: Ints, items: Ints, blocks: Ints, tensors: Ints, kind: int,
    scale: float, heads: int, group: int, dim: int, dim_v: int, rpb: Floats, extents: Ints,
    capacity: int, longest: int, rows: int, work: Floats, lists: Ints,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over the queries that see them.

    tensors: query, key, value, logsumexp, grad_out, delta, grad_key, grad_value. work: of
    `capacity` queries the vectors, their output gradients, logsumexp and delta; of `rows` keys both
    gradients; a key, a value, scores and their gradients.
    """
    width, width_v, longest = padded(dim), padded(dim_v), padded(longest)
    one, scale = work.dtype.type(1), work.dtype.type(scale)
    queries = work
    grad_rows = queries[capacity * width :]
    lse = grad_rows[capacity * width_v :]
    delta = lse[capacity:]
    grad_keys = delta[capacity:]
    grad_values = grad_keys[rows * width :]
    key = grad_values[rows * width_v :]
    value = key[width:]
    scores = value[width_v:]
    grads = scores[longest:]
    picks, bias_picks = lists, lists[longest:]
    box, row = np.empty((3, 5), np.int64), np.empty(ROW_SIZE, np.int64)
    while True:
        unit = take_ticket(counter)
        if unit >= units:
            break
        batch, head_kv = open_unit(unit, axes, blocks, heads, box)
        members = box[0, COUNT] * box[1, COUNT] * box[2, COUNT]
        fill(grad_keys, 0, members * width, 0)
        fill(grad_values, 0, members * width_v, 0)
        for head in range(head_kv * group, (head_kv + 1) * group):
            pack(tensors[0], batch, head, axes, box, kind, dim, width, scale, queries, 0)
            pack(tensors[4], batch, head, axes, box, kind, dim_v, width_v, one, grad_rows, 0)
            pack(tensors[3], batch, head, axes, box, FLOATING, 1, 1, one, lse, 0)
            pack(tensors[5], batch, head, axes, box, FLOATING, 1, 1, one, delta, 0)
            row[LISTED:] = -1
            for index in range(members):
                count, first = open_row(index, axes, items, box, -1, extents, picks, bias_picks, row)
                address = locate_row(tensors[1], batch, head_kv, row)
                read_row(address, tensors[1, 6], dim, kind, one, key, 0, width)
                address = locate_row(tensors[2], batch, head_kv, row)
                read_row(address, tensors[2, 6], dim_v, kind, one, value, 0, width_v)
                dots(key, 0, queries, first, width, picks, count, scores, 0)
                dots(value, 0, grad_rows, first, width_v, picks, count, grads, 0)
                if rpb.size:
                    at = bias_index(head, row, extents)
                    for j in range(count):
                        scores[j] += rpb[at + bias_picks[j]]
                for j in range(count):
                    scores[j] -= lse[first + picks[j]]
                    grads[j] -= delta[first + picks[j]]
                score_gradients(scores, grads, padded(count), 0.0, 0.0)
                accumulate(grads, 0, queries, first, width, picks, count, grad_keys, index * width)
                accumulate(
                    scores, 0, grad_rows, first, width_v, picks, count, grad_values, index * width_v
                )
        for index in range(members):
            open_row(index, axes, items, box, -1, extents, picks, bias_picks, row)
            address = locate_row(tensors[6], batch, head_kv, row)
            write_row(grad_keys, index * width, dim, kind, one, address, tensors[6, 6])
            address = locate_row(tensors[7], batch, head_kv, row)
            write_row(grad_values, index * width_v, dim_v, kind, one, address, tensors[7, 6])
