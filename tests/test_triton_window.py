"""The kernels' idea of windows, tiles and boxes against `natten.window`, by brute force.

Triton's interpreter works on arrays of any shape, so one program computes thousands of problems:
what is a scalar in the kernels is a column of values here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from natten.window import Axis, axis_mask, inverse_position_bounds, position_bounds

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

import triton.language as tl  # noqa: E402

from natten.functional.backends.triton import arguments  # noqa: E402
from natten.functional.backends.triton.primitives import (  # noqa: E402
    axis_rows,
    axis_tile,
    column_tile,
    divided_by,
    key_window,
    program_place,
    query_window,
    quotient,
    reciprocal,
    ring_tiles,
)


@triton.jit
def window_kernel(
    position, length, kernel, stride, start, end,
    COUNT: tl.constexpr, CAUSAL: tl.constexpr, CIRCULAR: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    arguments = tl.load(position + i), tl.load(length + i), tl.load(kernel + i), tl.load(stride + i)
    if INVERSE:
        first, last = key_window(*arguments, CAUSAL, CIRCULAR)
    else:
        first, last = query_window(*arguments, CAUSAL, CIRCULAR)
    tl.store(start + i, first)
    tl.store(end + i, last)


@triton.jit
def axis_kernel(
    parameters, row_results, tile_results,
    COUNT: tl.constexpr, TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
    CAUSAL: tl.constexpr, UPSAMPLING: tl.constexpr, DILATED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """All that `axis_rows` says about COUNT tiles. One column of parameters each."""
    i = tl.arange(0, COUNT)[:, None]
    offset = tl.arange(0, TILE)[None, :]
    at = parameters + i
    rows, box, columns = axis_rows(
        (tl.load(at), tl.load(at + COUNT) if DILATED else None), offset,
        (tl.load(at + 2 * COUNT), tl.load(at + 3 * COUNT), tl.load(at + 4 * COUNT),
         tl.load(at + 5 * COUNT)),
        (tl.load(at + 6 * COUNT), tl.load(at + 7 * COUNT)),
        (tl.load(at + 8 * COUNT), tl.load(at + 9 * COUNT)),
        TILE, COLUMN_TILE, CAUSAL, False, UPSAMPLING, INVERSE, True,
    )  # fmt: skip
    for n in tl.static_range(5):
        tl.store(row_results + n * COUNT * TILE + i * TILE + offset, rows[n].to(tl.int32))
    for n in tl.static_range(4):
        tl.store(tile_results + n * COUNT + i, box[n])
    for n in tl.static_range(3):
        tl.store(tile_results + (4 + n) * COUNT + i, columns[n])


@triton.jit
def ring_kernel(
    parameters, results, COUNT: tl.constexpr, STEPS: tl.constexpr, COLUMN_TILE: tl.constexpr
):
    """Corner, position and wholeness of the first column tiles along a circular axis, and how many
    there are. Rows of parameters: begin and end of the union and of the intersection, length."""
    at = parameters + tl.arange(0, COUNT)[:, None]
    t = tl.arange(0, STEPS)[None, :]
    begin, end, length = tl.load(at), tl.load(at + COUNT), tl.load(at + 4 * COUNT)
    inner, inner_end = tl.load(at + 2 * COUNT), tl.load(at + 3 * COUNT)
    found = axis_tile(t, begin, inner, inner_end - inner, length, COLUMN_TILE, True)
    place = results + tl.arange(0, COUNT)[:, None] * STEPS + t
    for n in tl.static_range(3):
        tl.store(place + n * COUNT * STEPS, found[n].to(tl.int32))
    number = ring_tiles(begin, end, length, COLUMN_TILE)
    tl.store(place + 3 * COUNT * STEPS, number + t * 0)


@dataclass(frozen=True)
class Order:
    """What of `arguments.Variant` says in which order tiles are visited."""

    RANK: int
    FIRST_AXIS_FASTEST: bool


@triton.jit
def enumeration_kernel(
    parameters, results, COUNT: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr
):
    """Corners of column tiles. Rows of parameters: t, union, counts, inner, inner_counts."""
    at = parameters + tl.arange(0, COUNT)
    t = tl.load(at)
    union = tl.load(at + COUNT), tl.load(at + 2 * COUNT), tl.load(at + 3 * COUNT)
    counts = tl.load(at + 4 * COUNT), tl.load(at + 5 * COUNT), tl.load(at + 6 * COUNT)
    inner = tl.load(at + 7 * COUNT), tl.load(at + 8 * COUNT), tl.load(at + 9 * COUNT)
    inner_counts = tl.load(at + 10 * COUNT), tl.load(at + 11 * COUNT), tl.load(at + 12 * COUNT)
    inverses = reciprocal(counts[0]), reciprocal(counts[1]), reciprocal(counts[2])
    corner, whole = column_tile(t, (union, counts, inner, inner_counts, inverses), TILE, V)
    for axis in tl.static_range(3):
        tl.store(results + axis * COUNT + tl.arange(0, COUNT), corner[axis])
    tl.store(results + 3 * COUNT + tl.arange(0, COUNT), whole.to(tl.int32))


@triton.jit
def quotient_kernel(dividend, divisor, result, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    by = tl.load(divisor + at)
    tl.store(result + at, quotient(tl.load(dividend + at), by, reciprocal(by)))


@triton.jit
def division_kernel(number, divisor, factor, result, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    by = tl.load(divisor + at)
    tl.store(result + at, divided_by(tl.load(number + at), by, tl.load(factor + at)))


@triton.jit
def place_kernel(
    tiles, dilations, heads, factors, results,
    COUNT: tl.constexpr, V: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Tile along three axes, head and batch of COUNT programs."""
    at = tl.arange(0, COUNT)
    tile, head, batch = program_place(at, tiles, dilations, heads, factors, V, LAST_FIRST)
    for axis in tl.static_range(3):
        tl.store(results + axis * COUNT + at, tile[axis])
    tl.store(results + 3 * COUNT + at, head)
    tl.store(results + 4 * COUNT + at, batch)


def _lengths() -> list[int]:
    return [*range(1, 22), 33, 40]


# Kinds of windows: is_causal and is_circular.
KINDS = {"plain": (False, False), "causal": (True, False), "circular": (False, True)}


@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind: str) -> None:
    """Every kernel size and stride of small axes, and some of larger ones."""
    columns: list[list[Tensor]] = []
    expected: list[list[Tensor]] = []
    random = Random(0)
    causal, circular = KINDS[kind]
    for length in _lengths():
        position = torch.arange(length)
        for kernel in range(1, length + 1):
            for stride in range(1, kernel + 1):
                if length > 22 and random.random() > 0.1:
                    continue
                if circular and length % stride:
                    continue
                axis = Axis(length, kernel, stride, 1, causal, circular)
                start, end = position_bounds(position, 0, axis)
                seen = (start[:, None] <= position) & (position < end[:, None])
                fills = (torch.full_like(position, n) for n in (length, kernel, stride))
                columns.append([position, *fills])
                if circular:
                    first, last = inverse_position_bounds(position, 0, axis)
                    expected.append([start, end, first, last, position >= 0])
                    continue
                # argmax finds the first; a key that nobody sees has an empty range.
                first = seen.int().argmax(0)
                last = length - seen.flip(0).int().argmax(0)
                expected.append([start, end, first, last, seen.any(0)])
    count = sum(len(c[0]) for c in columns)
    block = 1 << 14
    padding = -count % block
    arguments = [
        torch.nn.functional.pad(torch.cat(parts), (0, padding), value=1).int()
        for parts in zip(*columns)
    ]
    start, end, first, last, anyone = (torch.cat(parts) for parts in zip(*expected))
    for inverse in (False, True):
        got = torch.empty(2, count + padding, dtype=torch.int32)
        window_kernel[((count + padding) // block,)](
            *arguments, got[0], got[1], block, causal, circular, inverse
        )
        low, high = got[:, :count]
        if not inverse:
            torch.testing.assert_close(low.long(), start)
            torch.testing.assert_close(high.long(), end)
            continue
        assert bool((high <= low)[~anyone].all()), "unseen keys must have an empty range"
        torch.testing.assert_close(low[anyone].long(), first[anyone])
        torch.testing.assert_close(high[anyone].long(), last[anyone])


class _AxisProblem(NamedTuple):
    axis: Axis
    query: tuple[int, int]
    key: tuple[int, int]

    def mask(self) -> Tensor:
        """Which tokens of the query box see which of the key box."""
        queries, keys = (torch.arange(o, o + n) for o, n in (self.query, self.key))
        return axis_mask(queries[:, None], keys[None, :], self.axis)


def _axis_problem(random: Random, causal: bool, upsampling: int = 1) -> _AxisProblem:
    length = random.randint(1, 60)
    dilation = random.choice((1, 1, 2, 3, random.randint(1, length)))
    if upsampling > 1:
        dilation = 1
    dilation = min(dilation, length)
    kernel = random.randint(1, length // dilation)
    stride = random.choice((1, kernel, random.randint(1, kernel)))
    boxes = [(0, length * upsampling), (0, length)]
    for n in range(2):
        if upsampling == 1 and random.random() < 0.4:
            origin = random.randint(0, length - 1)
            boxes[n] = origin, random.randint(1, length - origin)
    axis = Axis(length, kernel, stride, dilation, causal, upsampling=upsampling)
    return _AxisProblem(axis, *boxes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("tile_size", "column_size"), [(1, 4), (4, 1), (8, 8), (16, 4), (4, 32)], ids=str
)
def test_axis_rows(tile_size: int, column_size: int, causal: bool) -> None:
    """Tiles hold every row once, know its window, and the boxes that they visit are right."""
    random = Random(f"{tile_size} {column_size} {causal}")
    problems = [_axis_problem(random, causal) for _ in range(120)]
    tiles = sum(
        _check_tiles(problems, tile_size, column_size, causal, inverse) for inverse in (False, True)
    )
    assert tiles > 2 * len(problems)
    for upsampling in (2, 3):
        problems = [_axis_problem(random, causal, upsampling) for _ in range(40)]
        for inverse in (False, True):
            _check_tiles(problems, tile_size, column_size, causal, inverse, upsampling)


def _check_tiles(
    problems: list[_AxisProblem], tile_size: int, column_size: int, causal: bool, inverse: bool,
    upsampling: int = 1,
) -> int:  # fmt: skip
    parameters: list[tuple[int, ...]] = []
    for axis, query, key in problems:
        row, column = (key, query) if inverse else (query, key)
        (tiles,) = arguments._tile_counts((row[0],), (row[1],), (axis.dilation,), (tile_size,))
        parameters += [
            (tile, tiles, axis.length, axis.kernel_size, axis.stride, axis.dilation, *row, *column)
            for tile in range(tiles * axis.dilation)
        ]
    real = len(parameters)
    count = triton.next_power_of_2(real)
    parameters += parameters[-1:] * (count - real)
    table = torch.tensor(parameters, dtype=torch.int32).T.contiguous()
    row_results = torch.empty(5, count, tile_size, dtype=torch.int32)
    tile_results = torch.empty(7, count, dtype=torch.int32)
    is_dilated = any(axis.dilation > 1 for axis, *_ in problems)
    axis_kernel[(1,)](
        table, row_results, tile_results, count, tile_size, column_size, causal, upsampling,
        is_dilated, inverse,
    )  # fmt: skip
    done = 0
    for problem in problems:
        mask = problem.mask()
        if inverse:
            mask = mask.T
        (tiles,) = arguments._tile_counts(
            *(((problem.key if inverse else problem.query)[n],) for n in (0, 1)),
            (problem.axis.dilation,),
            (tile_size,),
        )
        tiles *= problem.axis.dilation
        one = slice(done, done + tiles)
        _check_problem(problem, mask, row_results[:, one], tile_results[:, one], column_size)
        done += tiles
    assert done == real
    return done


def _check_problem(
    problem: _AxisProblem, mask: Tensor, rows: Tensor, tiles: Tensor, column_size: int
) -> None:
    memory, exists, _position, begin, width = rows
    union, count, inner, inner_count, _first, column_memory, extent = tiles[:, :, None]
    exists = exists.bool()
    in_order = memory[exists].sort().values
    assert in_order.tolist() == list(range(mask.shape[0])), f"rows once each: {problem}"

    # Windows, token by token.
    column = torch.arange(mask.shape[1])
    distance = column - column_memory[:, :, None]
    step = problem.axis.dilation
    place = distance.div(step, rounding_mode="floor") - begin[:, :, None]
    seen = (distance % step == 0) & (place >= 0) & (place < width[:, :, None])
    wanted = mask[memory.clamp(0, mask.shape[0] - 1).long()]
    assert bool((seen == wanted)[exists].all()), f"windows: {problem}"
    assert bool(((begin >= 0) & (begin + width <= extent))[exists].all()), f"extent: {problem}"

    # The box of the tile covers every window, and its inner tiles lie in every window.
    used = exists & (width > 0)
    assert bool((begin >= union)[used].all()), f"union: {problem}"
    assert bool((begin + width <= union + count * column_size)[used].all()), f"count: {problem}"
    inner_begin = union + inner * column_size
    inner_end = inner_begin + inner_count * column_size
    inside = (begin <= inner_begin) & (begin + width >= inner_end)
    assert bool((inside | (inner_count == 0))[exists].all()), f"inner tiles: {problem}"
    within = (inner >= 0) & (inner_count >= 0) & (inner + inner_count <= count)
    assert bool((within | ~exists).all()), f"inner tiles within the box: {problem}"

    # No more tiles than needed, where all rows see something.
    full = (used == exists).all(1) & exists.any(1)
    far = torch.where(exists, begin + width, 0).amax(1)
    near = torch.where(exists, begin, 1 << 20).amin(1)
    least = (far - near + column_size - 1) // column_size
    assert bool((count[:, 0] == least)[full].all()), f"fewest tiles: {problem}"


@pytest.mark.parametrize("column_size", [1, 4, 32])
def test_tiles_of_rings(column_size: int) -> None:
    """Every column of a union is in one tile, at its unwrapped position, and no tile lies across
    the seam; tiles that need no mask are told from the others."""
    random = Random(column_size)
    parameters = []
    for _ in range(256):
        length = random.randint(1, 40)
        begin = random.randint(-length, length - 1)
        end = begin + random.randint(1, 2 * length - 1)
        inner = random.randint(begin, end)
        parameters.append((begin, end, inner, random.randint(inner - 3, end), length))
    table = torch.tensor(parameters, dtype=torch.int32).T.contiguous()
    steps = 128
    results = torch.empty(4, len(parameters), steps, dtype=torch.int32)
    ring_kernel[(1,)](table, results, len(parameters), steps, column_size)
    for problem, corners, positions, wholes, numbers in zip(parameters, *results.tolist()):
        begin, end, inner, inner_end, length = problem
        number = numbers[0]
        assert number <= steps
        found = []
        for corner, position, whole in zip(corners[:number], positions, wholes):
            columns = range(corner, corner + column_size)
            real = [c for c in columns if c < length]
            assert (position - corner) % length == 0
            found += [c - corner + position for c in real]
            in_sight = inner <= position and position + column_size <= inner_end
            assert whole == (in_sight and len(real) == column_size), problem
        assert found[: end - begin] == list(range(begin, end)), problem
        assert len(found) - (end - begin) < column_size


@pytest.mark.parametrize("order", [Order(n, False) for n in (1, 2, 3)] + [Order(3, True)], ids=str)
def test_enumeration(order: Order) -> None:
    """Every tile of a box is visited once, and those inside it are told from the others."""
    random = Random(2)
    tile = (2, 4, 8)
    parameters, expected = [], []
    for _ in range(300):
        union, counts, inner, inner_counts = [0] * 3, [1] * 3, [0] * 3, [1] * 3
        for axis in range(3 - order.RANK, 3):
            union[axis] = random.randint(0, 9)
            counts[axis] = random.randint(1, 5)
            inner[axis] = random.randint(0, counts[axis])
            inner_counts[axis] = random.randint(0, counts[axis] - inner[axis])
        turn = -1 if order.FIRST_AXIS_FASTEST else 1
        ranges = (range(n) for n in counts[::turn])
        for t, place in enumerate(p[::turn] for p in product(*ranges)):
            parameters.append((t, *union, *counts, *inner, *inner_counts))
            corner = [u + p * n for u, p, n in zip(union, place, tile)]
            whole = all(i <= p < i + n for p, i, n in zip(place, inner, inner_counts))
            expected.append([*corner, int(whole)])
    count = triton.next_power_of_2(len(parameters))
    parameters += parameters[-1:] * (count - len(parameters))
    table = torch.tensor(parameters, dtype=torch.int32).T.contiguous()
    results = torch.empty(4, count, dtype=torch.int32)
    enumeration_kernel[(1,)](table, results, count, order, tile)
    assert results.T[: len(expected)].tolist() == expected


def test_quotients() -> None:
    """Exact up to the limit that the launches keep."""
    random = Random(3)
    pairs = [(0, 1), (2**31 - 1, 1), (2**31 - 1, 2), (65535, 65536), (65536, 65535)]
    for _ in range(4000):
        divisor = random.randint(1, 2 ** random.randint(1, 31) - 1)
        largest = min((2**32 - 1) // divisor, 2**31 - 1)
        edge = largest // divisor * divisor
        for dividend in (largest, edge, max(edge - 1, 0), random.randint(0, largest)):
            pairs.append((dividend, divisor))
    pairs += pairs[:1] * (triton.next_power_of_2(len(pairs)) - len(pairs))
    dividend, divisor = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    result = torch.empty_like(dividend)
    quotient_kernel[(1,)](dividend, divisor, result, len(pairs))
    assert torch.equal(result, dividend // divisor)


def test_division() -> None:
    """By what a factor stands for, of any number of 31 bits: at multiples of the divisor, and one
    before, where a quotient that is off by little would differ."""
    random = Random(0)
    most = 2**31 - 1
    divisors = [*range(1, 70), *(2**n + d for n in range(7, 31) for d in (-1, 0, 1)), most]
    divisors += [random.randint(1, most) for _ in range(400)]
    pairs = []
    for divisor in divisors:
        multiples = {0, 1, most // divisor, random.randint(0, most // divisor)}
        numbers = {n * divisor + d for n in multiples for d in (-1, 0, 1)} | {most}
        pairs += [(number, divisor) for number in numbers if 0 <= number <= most]
    count = triton.next_power_of_2(len(pairs))
    pairs += pairs[-1:] * (count - len(pairs))
    number, divisor = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    factor = torch.tensor([arguments.division(by) for _, by in pairs])
    result = torch.empty(count, dtype=torch.int32)
    division_kernel[(1,)](number, divisor, factor, result, count)
    torch.testing.assert_close(result, number // divisor)
    # Launches make a kernel for each pattern of even numbers, ones, and numbers of 32 bits.
    assert bool((factor % 2 == 1).all())
    assert int(factor.min()) >= 2**32


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    ("rank", "first_axis_fastest"), [(1, False), (2, False), (3, False), (3, True)]
)
def test_program_place(rank: int, first_axis_fastest: bool, last_first: bool) -> None:
    """Tiles of one head are numbered along one axis first, then heads, then batch entries."""
    random = Random(0)
    variant = SimpleNamespace(RANK=rank, FIRST_AXIS_FASTEST=first_axis_fastest)
    for has_factors in (False, True):
        tiles = arguments.pad([random.randint(1, 5) for _ in range(rank)], 1)
        dilations = arguments.pad([random.randint(1, 3) for _ in range(rank)], 1)
        heads, batch = random.randint(2, 5), 2
        extents = [t * d for t, d in zip(tiles, dilations, strict=True)]
        order = extents if not first_axis_fastest else extents[::-1]
        places = [p if not first_axis_fastest else p[::-1] for p in product(*map(range, order))]
        if last_first:
            places.reverse()
        expected = [(*p, h, b) for b in range(batch) for h in range(heads) for p in places]
        count = triton.next_power_of_2(len(expected))
        results = torch.empty(5, count, dtype=torch.int32)
        factors = None
        if has_factors:
            factors = arguments.divisions(tiles, dilations, heads, first_axis_fastest)
        place_kernel[(1,)](tiles, dilations, heads, factors, results, count, variant, last_first)
        assert results.T[: len(expected)].tolist() == [list(place) for place in expected]
