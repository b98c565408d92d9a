"""The kernels' idea of windows, tiles and boxes against `natten.window`, by brute force.

Triton's interpreter works on arrays of any shape, so one program computes thousands of problems:
what is a scalar in the kernels is a column of values here.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pytest
import torch
from interpret import main, run_interpreted
from torch import Tensor

from natten.window import Axis, axis_mask, position_bounds

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from natten.functional.backends.triton import launch  # noqa: E402
from natten.functional.backends.triton.primitives import (  # noqa: E402
    axis_rows,
    inner_tile,
    key_window,
    outer_tile,
    query_window,
)


@triton.jit
def window_kernel(
    position, length, kernel, stride, start, end,
    COUNT: tl.constexpr, CAUSAL: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    arguments = tl.load(position + i), tl.load(length + i), tl.load(kernel + i), tl.load(stride + i)
    if INVERSE:
        first, last = key_window(*arguments, CAUSAL)
    else:
        first, last = query_window(*arguments, CAUSAL)
    tl.store(start + i, first)
    tl.store(end + i, last)


@triton.jit
def axis_kernel(
    parameters, row_results, tile_results,
    COUNT: tl.constexpr, TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
    CAUSAL: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """All that `axis_rows` says about COUNT tiles. One column of parameters each."""
    i = tl.arange(0, COUNT)[:, None]
    offset = tl.arange(0, TILE)[None, :]
    at = parameters + i
    rows, box, columns = axis_rows(
        tl.load(at), tl.load(at + COUNT), tl.load(at + 2 * COUNT), tl.load(at + 3 * COUNT),
        tl.load(at + 4 * COUNT), tl.load(at + 5 * COUNT), tl.load(at + 6 * COUNT),
        tl.load(at + 7 * COUNT), tl.load(at + 8 * COUNT), tl.load(at + 9 * COUNT), offset,
        TILE, COLUMN_TILE, CAUSAL, INVERSE, True,
    )  # fmt: skip
    for n in tl.static_range(5):
        tl.store(row_results + n * COUNT * TILE + i * TILE + offset, rows[n].to(tl.int32))
    for n in tl.static_range(4):
        tl.store(tile_results + n * COUNT + i, box[n])
    for n in tl.static_range(3):
        tl.store(tile_results + (4 + n) * COUNT + i, columns[n])


@triton.jit
def enumeration_kernel(
    parameters, results, COUNT: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr
):
    """Coordinates of column tiles. Rows of parameters: t, counts, inner, inner_counts."""
    at = parameters + tl.arange(0, COUNT)
    t = tl.load(at)
    counts = tl.load(at + COUNT), tl.load(at + 2 * COUNT), tl.load(at + 3 * COUNT)
    inner = tl.load(at + 4 * COUNT), tl.load(at + 5 * COUNT), tl.load(at + 6 * COUNT)
    inner_counts = tl.load(at + 7 * COUNT), tl.load(at + 8 * COUNT), tl.load(at + 9 * COUNT)
    if INNER:
        x, y, z = inner_tile(t, inner, inner_counts, RANK)
    else:
        x, y, z = outer_tile(t, counts, inner, inner_counts, RANK)
    tl.store(results + tl.arange(0, COUNT), x)
    tl.store(results + COUNT + tl.arange(0, COUNT), y)
    tl.store(results + 2 * COUNT + tl.arange(0, COUNT), z)


def _lengths() -> list[int]:
    return [*range(1, 22), 33, 40]


def _check_windows() -> None:
    """Every kernel size and stride of small axes, and some of larger ones."""
    for causal in (False, True):
        columns: list[list[Tensor]] = []
        expected: list[list[Tensor]] = []
        random = Random(0)
        for length in _lengths():
            position = torch.arange(length)
            for kernel in range(1, length + 1):
                for stride in range(1, kernel + 1):
                    if length > 22 and random.random() > 0.1:
                        continue
                    axis = Axis(length, kernel, stride, 1, causal)
                    start, end = position_bounds(position, 0, axis)
                    seen = (start[:, None] <= position) & (position < end[:, None])
                    fills = (torch.full_like(position, n) for n in (length, kernel, stride))
                    columns.append([position, *fills])
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
                *arguments, got[0], got[1], block, causal, inverse
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


def _axis_problem(random: Random, causal: bool) -> _AxisProblem:
    length = random.randint(1, 60)
    dilation = random.choice((1, 1, 2, 3, random.randint(1, length)))
    dilation = min(dilation, length)
    kernel = random.randint(1, length // dilation)
    stride = random.choice((1, kernel, random.randint(1, kernel)))
    boxes = [(0, length), (0, length)]
    for n in range(2):
        if random.random() < 0.4:
            origin = random.randint(0, length - 1)
            boxes[n] = origin, random.randint(1, length - origin)
    return _AxisProblem(Axis(length, kernel, stride, dilation, causal), *boxes)


def _check_axis_rows(problems: int = 120) -> None:
    """Tiles hold every row once, know its window, and the boxes that they visit are right."""
    random = Random(1)
    total = 0
    for tile_size, column_tile in ((1, 4), (4, 1), (8, 8), (16, 4), (4, 32)):
        for causal in (False, True):
            chosen = [_axis_problem(random, causal) for _ in range(problems)]
            for inverse in (False, True):
                total += _check_tiles(chosen, tile_size, column_tile, causal, inverse)
    assert total > 10 * problems


def _check_tiles(
    problems: list[_AxisProblem], tile_size: int, column_tile: int, causal: bool, inverse: bool
) -> int:
    parameters: list[tuple[int, ...]] = []
    for axis, query, key in problems:
        row, column = (key, query) if inverse else (query, key)
        (tiles,) = launch._tile_counts((row[0],), (row[1],), (axis.dilation,), (tile_size,))
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
    axis_kernel[(1,)](
        table, row_results, tile_results, count, tile_size, column_tile, causal, inverse
    )
    done = 0
    for problem in problems:
        mask = problem.mask()
        if inverse:
            mask = mask.T
        (tiles,) = launch._tile_counts(
            *(((problem.key if inverse else problem.query)[n],) for n in (0, 1)),
            (problem.axis.dilation,),
            (tile_size,),
        )
        tiles *= problem.axis.dilation
        one = slice(done, done + tiles)
        _check_problem(problem, mask, row_results[:, one], tile_results[:, one], column_tile)
        done += tiles
    assert done == real
    return done


def _check_problem(
    problem: _AxisProblem, mask: Tensor, rows: Tensor, tiles: Tensor, column_tile: int
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
    assert bool((begin + width <= union + count * column_tile)[used].all()), f"count: {problem}"
    inner_begin = union + inner * column_tile
    inner_end = inner_begin + inner_count * column_tile
    inside = (begin <= inner_begin) & (begin + width >= inner_end)
    assert bool((inside | (inner_count == 0))[exists].all()), f"inner tiles: {problem}"
    within = (inner >= 0) & (inner_count >= 0) & (inner + inner_count <= count)
    assert bool((within | ~exists).all()), f"inner tiles within the box: {problem}"

    # No more tiles than needed, where all rows see something.
    full = (used == exists).all(1) & exists.any(1)
    far = torch.where(exists, begin + width, 0).amax(1)
    near = torch.where(exists, begin, 1 << 20).amin(1)
    least = (far - near + column_tile - 1) // column_tile
    assert bool((count[:, 0] == least)[full].all()), f"fewest tiles: {problem}"


def _check_enumeration() -> None:
    """Inner and outer tiles together are all tiles of the box, each once."""
    random = Random(2)
    for rank in (1, 2, 3):
        boxes = []
        for _ in range(300):
            counts, inner, inner_counts = [1] * 3, [0] * 3, [1] * 3
            for axis in range(3 - rank, 3):
                counts[axis] = random.randint(1, 5)
                inner[axis] = random.randint(0, counts[axis])
                inner_counts[axis] = random.randint(0, counts[axis] - inner[axis])
            boxes.append((counts, inner, inner_counts))
        visited: list[list[tuple[int, ...]]] = [[] for _ in boxes]
        for is_inner in (True, False):
            parameters, owner = [], []
            for n, (counts, inner, inner_counts) in enumerate(boxes):
                inside = inner_counts[0] * inner_counts[1] * inner_counts[2]
                outside = counts[0] * counts[1] * counts[2] - inside
                for t in range(inside if is_inner else outside):
                    parameters.append((t, *counts, *inner, *inner_counts))
                    owner.append(n)
            count = triton.next_power_of_2(len(owner))
            parameters += parameters[-1:] * (count - len(owner))
            table = torch.tensor(parameters, dtype=torch.int32).T.contiguous()
            results = torch.empty(3, count, dtype=torch.int32)
            enumeration_kernel[(1,)](table, results, count, rank, is_inner)
            for n, *corner in zip(owner, *results.tolist()):
                visited[n].append(tuple(corner))
        for (counts, inner, inner_counts), corners in zip(boxes, visited):
            everything = [
                (x, y, z)
                for x in range(counts[0])
                for y in range(counts[1])
                for z in range(counts[2])
            ]
            assert sorted(corners) == everything, (rank, counts, inner, inner_counts)
            inside = inner_counts[0] * inner_counts[1] * inner_counts[2]
            for corner in corners[:inside]:
                assert all(i <= c < i + n for c, i, n in zip(corner, inner, inner_counts)), (
                    rank,
                    counts,
                    inner,
                    inner_counts,
                )


CHECKS = {
    "windows": _check_windows,
    "axis_rows": _check_axis_rows,
    "enumeration": _check_enumeration,
}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str) -> None:
    run_interpreted(__file__, name)


if __name__ == "__main__":
    main(CHECKS)
