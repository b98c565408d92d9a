"""Vectors in registers, for the compiled loops of the CPU backend.

Operations that numba has no words for, written as LLVM instructions: vectors of two lengths, LANES
for loops by row and WIDE for loops by block, pointers, 16-bit floating types, and the two products
that blocks are made of.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

from natten.functional.backends.cpu.cache import Cache

Ints: TypeAlias = np.ndarray[Any, Any]
Floats: TypeAlias = np.ndarray[Any, Any]
LANES = 8
# Numbers of a vector of blocks: one register of float32 where there is AVX-512, else of AVX2.
FEATURES = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()
WIDE = 16 if "+avx512f" in FEATURES.split(",") else 8
FLOATING, BFLOAT16, FLOAT16, BYTE = 0, 1, 2, 3


# Contraction and reassociation only: the flags that assume no NaN and no infinity stay off.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
# Python calls none of these: without wrappers, they are compiled in half the time.
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
# Inlined before it is compiled: for what calls much and is called once in a loop. What is not is
# compiled for itself, too, with all that it calls.
inlined = njit(inline="always", **OPTIONS)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of this block.

    Whoever leaves numba in the middle of a compilation may find it unable to compile for as long
    as the process lives, since it reads the tables of its types by generators.
    """
    before, held = signal.getsignal(signal.SIGINT), []
    # Other threads are not interrupted, and may not say how the main one is.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *happened: held.append(happened))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


def entry(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop that Python calls; keep the result on disk if there is a writable folder."""
    compiled = njit(no_cfunc_wrapper=True, **OPTIONS)(function)
    compiled.compile = _uninterrupted()(compiled.compile)
    # Without any such folder, numba has no cache to offer.
    with contextlib.suppress(RuntimeError):
        compiled._cache = Cache(function)
    return compiled


class Vector(types.Type):
    """Numbers of one floating type, held in registers."""

    def __init__(self, dtype: types.Float, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype} x {lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(
            manager, kind, ir.VectorType(manager[kind.dtype].get_value_type(), kind.lanes)
        )


def _load(builder: ir.IRBuilder, pointer: Any, lanes: int) -> Any:
    """The vector that begins at a pointer to a number."""
    number = pointer.type.pointee
    size = 4 if isinstance(number, ir.FloatType) else 8
    vector = ir.VectorType(number, lanes).as_pointer()
    return builder.load(builder.bitcast(pointer, vector), align=size)


def _store(builder: ir.IRBuilder, vector: Any, pointer: Any) -> None:
    size = 4 if isinstance(vector.type.element, ir.FloatType) else 8
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=size)


def _splat(builder: ir.IRBuilder, number: Any, lanes: int) -> Any:
    kind = ir.VectorType(number.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)


def _loads(lanes: int) -> Any:
    @intrinsic
    def load(typing, start, index):
        """The vector that begins at start[index]."""

        def generate(context, builder, signature, args):
            return _load(builder, builder.gep(args[0], [args[1]]), lanes)

        return Vector(start.dtype, lanes)(start, types.intp), generate

    return load


def _splats(lanes: int) -> Any:
    @intrinsic
    def splat(typing, like, value):
        """`value` in every lane, in the type that `like` points to."""

        def generate(context, builder, signature, args):
            return _splat(builder, args[1], lanes)

        return Vector(like.dtype, lanes)(like, like.dtype), generate

    return splat


load, load_wide = _loads(LANES), _loads(WIDE)
splat, splat_wide = _splats(LANES), _splats(WIDE)


@intrinsic
def store(typing, start, index, vector):
    """Write a vector to start[index] and the numbers that follow."""

    def generate(context, builder, signature, args):
        _store(builder, args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(start, types.intp, vector), generate


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    width = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}{width}"
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
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b), "a / b")
zero_where = _elementwise(
    lambda builder, a, b: builder.select(
        builder.fcmp_ordered("==", a, b), ir.Constant(a.type, [0.0] * a.type.count), a
    ),
    "0 where a equals b, else a",
)
capped = _elementwise(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), b, a),
    "b where a > b, else a; NaN where a is",
)
larger = _elementwise(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b),
    "a where a > b, else b",
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
        best, mask = args[0], ir.VectorType(ir.IntType(32), LANES)
        step = LANES // 2
        while step:
            order = ir.Constant(mask, [i ^ step for i in range(LANES)])
            other = builder.shuffle_vector(best, ir.Constant(best.type, ir.Undefined), order)
            best = builder.select(builder.fcmp_ordered(">", other, best), other, best)
            step //= 2
        return builder.extract_element(best, ir.IntType(32)(0))

    return vector.dtype(vector), generate


class _Reals:
    """Constants of a vector of floats, and what e ** x begins and ends with."""

    def __init__(self, builder: Any, vector: Any) -> None:
        self.builder, width, self.lanes = builder, vector.dtype.bitwidth, vector.lanes
        self.single = width == 32
        self.kind = ir.VectorType(ir.FloatType() if self.single else ir.DoubleType(), self.lanes)
        self.bits = ir.VectorType(ir.IntType(width), self.lanes)
        self.mantissa, self.bias = (23, 127) if self.single else (52, 1023)

    def real(self, value: float) -> Any:
        return ir.Constant(self.kind, [value] * self.lanes)

    def whole(self, value: int) -> Any:
        return ir.Constant(self.bits, [value] * self.lanes)

    def reduced(self, x: Any) -> tuple[Any, Any]:
        """``x - n * log 2`` and ``2 ** n``, for the integer n next to ``x / log 2``."""
        builder, real = self.builder, self.real
        # Adding 1.5 * 2 ** mantissa leaves n in the low bits of the sum.
        magic = real(1.5 * 2.0**self.mantissa)
        shifted = _multiply_add(builder, x, real(1 / math.log(2)), magic)
        # Flags of its own: with numba's, and where there is no fused multiply-add, the two sums
        # cancel each other.
        count = builder.fsub(shifted, magic, flags=("nsz",))
        # log 2 in two parts, so that count * high is exact.
        high, low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
        if self.single:
            unit = 2.0 ** (12 - self.mantissa)
            high = math.floor(math.log(2) / unit) * unit
            low = math.log(2) - high
        rest = _multiply_add(builder, count, real(-high), x)
        rest = _multiply_add(builder, count, real(-low), rest)
        exponent = builder.add(builder.bitcast(shifted, self.bits), self.whole(self.bias))
        power = builder.shl(exponent, self.whole(self.mantissa))
        return rest, builder.bitcast(power, self.kind)

    def series(self, rest: Any, degree: int, first: int) -> Any:
        """The sum of ``rest ** (n - first) / n!`` for n from ``first`` to ``degree``."""
        result = self.real(1 / math.factorial(degree))
        for power in range(degree - 1, first - 1, -1):
            result = _multiply_add(self.builder, result, rest, self.real(1 / math.factorial(power)))
        return result


@intrinsic
def exp(typing, vector):
    """e ** x within an ulp for x up to about 80; 0 below the normal range, NaN for NaN."""

    def generate(context, builder, signature, args):
        x, numbers = args[0], _Reals(builder, vector)
        smallest, degree = (-87.0, 7) if numbers.single else (-708.0, 13)
        rest, power_of_two = numbers.reduced(x)
        result = builder.fmul(numbers.series(rest, degree, 0), power_of_two)
        is_small = builder.fcmp_ordered("<", x, numbers.real(smallest))
        return builder.select(is_small, numbers.real(0.0), result)

    return vector(vector), generate


@intrinsic
def tanh(typing, vector):
    """tanh x within a few ulps, by e ** 2|x| - 1, which loses nothing where x is small."""

    def generate(context, builder, signature, args):
        x, numbers = args[0], _Reals(builder, vector)
        kind, bits, real = numbers.kind, numbers.bits, numbers.real
        largest, degree = (20.0, 8) if numbers.single else (44.0, 14)
        sign = numbers.whole(1 << (vector.dtype.bitwidth - 1))
        whole = builder.bitcast(x, bits)
        size = builder.bitcast(builder.and_(whole, builder.not_(sign)), kind)
        # Beyond, the result is 1; NaN stays.
        y = builder.fmul(size, real(2.0))
        y = builder.select(builder.fcmp_ordered(">", y, real(largest)), real(largest), y)
        rest, power_of_two = numbers.reduced(y)
        # (e ** rest - 1) / rest, times rest.
        less_one = builder.fmul(numbers.series(rest, degree, 1), rest)
        less_one = _multiply_add(
            builder, power_of_two, less_one, builder.fsub(power_of_two, real(1.0))
        )
        result = builder.fdiv(less_one, builder.fadd(less_one, real(2.0)))
        result = builder.or_(builder.bitcast(result, bits), builder.and_(whole, sign))
        return builder.bitcast(result, kind)

    return vector(vector), generate


@intrinsic
def take_ticket(typing, counter):
    """The value of counter[0], which grows by one; no two threads get the same."""

    def generate(context, builder, signature, args):
        data = cgutils.create_struct_proxy(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


# Loops take pointers, not arrays: a numba array is seven arguments and a reference count.


@intrinsic
def start_of(typing, array):
    """The address of a contiguous array's first element, as a pointer that can be indexed."""

    def generate(context, builder, signature, args):
        return cgutils.create_struct_proxy(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def after(typing, start, count):
    """The pointer `count` elements further."""

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return start(start, types.intp), generate


@intrinsic
def numbers_at(typing, address, like):
    """A pointer to the same type as `like`, from an integer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(like))

    return like(types.int64, like), generate


@intrinsic
def halves_at(typing, address):
    """A pointer to 16-bit integers, from an integer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.uint16)))

    return types.CPointer(types.uint16)(types.int64), generate


@intrinsic
def bytes_at(typing, address):
    """A pointer to bytes, from an integer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.uint8)))

    return types.CPointer(types.uint8)(types.int64), generate


@intrinsic
def prefetch(typing, address, like, index):
    """Ask for the cache line of element `index` at an address; any address will do."""

    def generate(context, builder, signature, args):
        start = builder.inttoptr(args[0], context.get_value_type(like))
        pointer = builder.bitcast(builder.gep(start, [args[2]]), cgutils.voidptr_t)
        flags = [ir.IntType(32)(flag) for flag in (0, 3, 1)]
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] + [ir.IntType(32)] * 3)
        function = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(function, [pointer, *flags])
        return context.get_dummy_value()

    return types.void(types.int64, like, types.intp), generate


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


@inner
def widen_bfloat16(half):
    return from_bits(np.uint32(half) << np.uint32(16))


@inner
def narrow_bfloat16(value):
    """Round to nearest even."""
    bits = bits_of(np.float32(value))
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(0x7FC00000) if value != value else np.uint32(rounded)
    return np.uint16(rounded >> np.uint32(16))


@inner
def _widen_float16(half):
    bits = np.uint32(half)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    # The product rescales the exponent and normalises subnormal numbers.
    size = from_bits((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    special = (bits & np.uint32(0x7C00)) == np.uint32(0x7C00)
    size_bits = bits_of(size) | (np.uint32(0x7F800000) if special else np.uint32(0))
    return from_bits(size_bits | sign)


@inner
def _narrow_float16(value):
    """Round to nearest even, to infinity beyond 65520."""
    bits = bits_of(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    # Normal numbers: move the exponent's bias, round the mantissa by integer addition.
    normal = (
        size - np.uint32(0x38000000) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
    )
    normal = normal >> np.uint32(13)
    # Subnormal numbers: an addition lets the processor round at the right bit.
    small = bits_of(from_bits(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    result = small if size < np.uint32(0x38800000) else normal
    if size >= np.uint32(0x477FF000):
        result = np.uint32(0x7C00)
    if size > np.uint32(0x7F800000):
        result = np.uint32(0x7E00)
    return np.uint16(result | sign)


@intrinsic
def _extended(typing, half):
    """The float32 of a float16's bits, by the processor."""

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _truncated(typing, value):
    """The bits of the float16 next to a float32, by the processor."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@inner
def _convert_from(half):
    return _extended(half)


@inner
def _convert_to(value):
    return _truncated(np.float32(value))


# Without the instructions, LLVM would call functions that are not there.
CONVERTS = "+f16c" in FEATURES.split(",")
widen_float16 = _convert_from if CONVERTS else _widen_float16
narrow_float16 = _convert_to if CONVERTS else _narrow_float16


@inner
def padded(count: int) -> int:
    return (count + LANES - 1) // LANES * LANES


@intrinsic
def masked(typing, bits, vector, other):
    """`vector` in the lanes of the bits that are set, `other` in the rest."""

    def generate(context, builder, signature, args):
        flags = builder.trunc(args[0], ir.IntType(vector.lanes))
        flags = builder.bitcast(flags, ir.VectorType(ir.IntType(1), vector.lanes))
        return builder.select(flags, args[1], args[2])

    return vector(types.int64, vector, vector), generate


class _Loop:
    """``for index in range(0, stop, step)``, at least once, over sums that stay in registers."""

    def __init__(self, builder: Any, stop: Any, step: int, sums: list[Any]) -> None:
        self.builder, self.stop, self.step = builder, stop, step
        before, self.block = builder.block, builder.append_basic_block("products")
        builder.branch(self.block)
        builder.position_at_end(self.block)
        self.index = builder.phi(stop.type)
        self.index.add_incoming(stop.type(0), before)
        self.sums = [builder.phi(total.type) for total in sums]
        for phi, total in zip(self.sums, sums, strict=True):
            phi.add_incoming(total, before)

    def close(self, sums: list[Any]) -> None:
        builder, last = self.builder, self.builder.block
        following = builder.add(self.index, self.stop.type(self.step))
        self.index.add_incoming(following, last)
        for phi, total in zip(self.sums, sums, strict=True):
            phi.add_incoming(total, last)
        end = builder.append_basic_block("summed")
        builder.cbranch(builder.icmp_signed("<", following, self.stop), self.block, end)
        builder.position_at_end(end)


def _picked_row(builder: Any, rows: Any, width: Any, picks: Any, j: Any) -> Any:
    return builder.gep(rows, [builder.mul(builder.load(builder.gep(picks, [j])), width)])


def _block_dots(count: int) -> Any:
    @intrinsic
    def dots(typing, rows, width, picks, columns, out):
        """out[j] = rows[picks[j]] . columns, for `count` picks; columns are ``[width, WIDE]``.

        Numbers of rows are broadcast by the multiply-add that uses them, so that registers hold
        sums alone.
        """

        def generate(context, builder, signature, args):
            rows, width, picks, columns, out = args
            size = width.type
            starts = [_picked_row(builder, rows, width, picks, size(j)) for j in range(count)]
            zero = ir.Constant(ir.VectorType(columns.type.pointee, WIDE), [0.0] * WIDE)
            loop = _Loop(builder, width, LANES, [zero] * count)
            sums = list(loop.sums)
            for step in range(LANES):
                at = builder.add(loop.index, size(step))
                start = builder.gep(columns, [builder.mul(at, size(WIDE))])
                column = _load(builder, start, WIDE)
                for j, row in enumerate(starts):
                    number = _splat(builder, builder.load(builder.gep(row, [at])), WIDE)
                    sums[j] = _multiply_add(builder, number, column, sums[j])
            loop.close(sums)
            for j, total in enumerate(sums):
                _store(builder, total, builder.gep(out, [size(j * WIDE)]))
            return context.get_dummy_value()

        signature = types.void(rows, types.intp, picks, columns, out)
        return signature, generate

    return dots


def _block_sums(count: int) -> Any:
    @intrinsic
    def sums(typing, weights, rows, width, picks, length, out):
        """out[i] += the sum over j < length of rows[picks[j]][i] * weights[j], for `count` numbers
        of each row; weights and out are vectors of WIDE. `length` is above zero."""

        def generate(context, builder, signature, args):
            weights, rows, width, picks, length, out = args
            size = width.type
            places = [builder.gep(out, [size(i * WIDE)]) for i in range(count)]
            loop = _Loop(builder, length, 1, [_load(builder, place, WIDE) for place in places])
            row = _picked_row(builder, rows, width, picks, loop.index)
            start = builder.gep(weights, [builder.mul(loop.index, size(WIDE))])
            weight = _load(builder, start, WIDE)
            totals = []
            for i, total in enumerate(loop.sums):
                number = _splat(builder, builder.load(builder.gep(row, [size(i)])), WIDE)
                totals.append(_multiply_add(builder, number, weight, total))
            loop.close(totals)
            for place, total in zip(places, totals, strict=True):
                _store(builder, total, place)
            return context.get_dummy_value()

        signature = types.void(weights, rows, types.intp, picks, types.intp, out)
        return signature, generate

    return sums


# As many sums as registers hold beside what they are made of.
MANY_DOTS, FEW_DOTS = 12, 4
many_dots, few_dots = _block_dots(MANY_DOTS), _block_dots(FEW_DOTS)
MANY_SUMS, FEW_SUMS = WIDE, 8
many_sums, few_sums = _block_sums(MANY_SUMS), _block_sums(FEW_SUMS)


@intrinsic
def transpose(typing, source, source_step, target, target_step):
    """target[j][i] = source[i][j], for i and j below LANES and rows that many numbers apart."""

    def generate(context, builder, signature, args):
        source, source_step, target, target_step = args
        size, order = source_step.type, ir.VectorType(ir.IntType(32), LANES)
        rows = [
            _load(builder, builder.gep(source, [builder.mul(source_step, size(i))]), LANES)
            for i in range(LANES)
        ]
        level = 1
        while level < LANES:
            # Of each pair of rows, swap the off-diagonal parts of each 2 x 2 square of parts.
            for i in range(LANES):
                if i & level:
                    continue
                a, b = rows[i], rows[i + level]
                high = [LANES + j - level if j & level else j for j in range(LANES)]
                low = [LANES + j if j & level else j + level for j in range(LANES)]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(order, high))
                rows[i + level] = builder.shuffle_vector(a, b, ir.Constant(order, low))
            level *= 2
        for j, row in enumerate(rows):
            _store(builder, row, builder.gep(target, [builder.mul(target_step, size(j))]))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate
