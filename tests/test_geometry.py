"""Counts of tiles, against masks written out: random axes, boxes and dilations."""

from __future__ import annotations

from math import prod
from random import Random

import pytest

from natten import window
from natten.functional import geometry
from natten.functional.geometry import Box, count, count_tiles, needed_pairs, row_tiles
from natten.simulator import make_problem, simulate
from natten.window import Axis


def finer(axis: Axis, random: Random) -> Axis:
    """Sometimes the axis with several queries of a token."""
    if axis.dilation > 1 or random.random() < 0.7:
        return axis
    return axis._replace(upsampling=random.choice((2, 3, 4)))


def random_axis(random: Random) -> Axis:
    length = random.randint(1, 60)
    dilation = random.choice((1, 1, 2, 3, random.randint(1, length)))
    kernel_size = random.randint(1, max(1, min(length // dilation, random.choice((3, 9, 60)))))
    stride = random.randint(1, kernel_size)
    axis = Axis(length, kernel_size, stride, dilation, random.random() < 0.3)
    if random.random() < 0.3:
        # A ring of whole groups and strides.
        unit = stride * dilation
        length = max(length // unit, -(-kernel_size // stride)) * unit
        axis = Axis(length, kernel_size, stride, dilation, is_circular=True)
    return axis


def random_box(random: Random, axis: Axis, inverse: bool = False) -> Box:
    length = axis.length
    if axis.upsampling > 1:
        extents = (length, length * axis.upsampling)
        rows, columns = extents if inverse else reversed(extents)
        return Box(0, rows, 0, columns)
    if axis.is_circular or random.random() < 0.5:
        return Box(0, length, 0, length)
    ranges = [sorted(random.sample(range(length + 1), 2)) for _ in range(2)]
    return Box(*(number for low, high in ranges for number in (low, high - low)))


def around_a_ring(
    axis: Axis, row_tile: int, column_tile: int, inverse: bool, aligned: bool
) -> tuple[int, int, int]:
    """The same for a circular axis, one dilation group for all."""
    ring = axis.length // axis.dilation
    rows, ring = (ring, ring * axis.upsampling) if inverse else (ring * axis.upsampling, ring)
    row_tiles = visited = full = 0
    find = window.inverse_position_bounds if inverse else window.position_bounds
    for first in range(0, rows, row_tile):
        row_tiles += 1
        members = range(first, min(first + row_tile, rows))
        windows = [range(*(int(bound) for bound in find(row, 0, axis))) for row in members]
        columns = range(windows[0].start, windows[-1].stop)
        tiles = set()
        corner = columns.start
        while corner < columns.stop:
            seam = (corner // ring + 1) * ring
            start = corner
            if aligned:
                start -= corner % ring % column_tile
            tile = range(start, start + column_tile)
            whole = tile.stop <= seam and all(c in own for own in windows for c in tile)
            full += whole
            # Aligned tiles are the same ones once around.
            tiles.add(start % ring if aligned else start)
            corner = min(tile.stop, seam)
        visited += len(tiles)
    return row_tiles * axis.dilation, visited * axis.dilation, full * axis.dilation


def brute_force(
    axis: Axis, box: Box, row_tile: int, column_tile: int, inverse: bool, aligned: bool
) -> tuple[int, int, int]:
    """Row tiles, visited and full tiles, each query of each tile asked about each key."""
    mask = window.grid_mask([axis])
    mask = mask.T if inverse else mask
    row_tiles = visited = full = 0
    if axis.is_circular:
        return around_a_ring(axis, row_tile, column_tile, inverse, aligned)
    for group in range(axis.dilation):
        own = mask[group :: axis.dilation, group :: axis.dilation].tolist()
        rows, columns = (
            [n for n in range(count) if origin <= group + axis.dilation * n < origin + extent]
            for count, origin, extent in (
                (len(own), *box[:2]),
                (len(own[0]) if own else 0, *box[2:]),
            )
        )
        for tile in sorted({row // row_tile for row in rows}):
            members = [row for row in rows if row // row_tile == tile]
            row_tiles += 1
            seen = [c for c in columns if any(own[row][c] for row in members)]
            if not seen:
                continue
            first = seen[0]
            if aligned:
                first -= (first - columns[0]) % column_tile
            for corner in range(first, seen[-1] + 1, column_tile):
                visited += 1
                full += all(
                    c in columns and own[row][c]
                    for row in members
                    for c in range(corner, corner + column_tile)
                )
    return row_tiles, visited, full


@pytest.mark.parametrize("seed", range(40))
def test_counts_along_an_axis(seed: int) -> None:
    random = Random(seed)
    for _ in range(5):
        axis = finer(random_axis(random), random)
        rows, columns = ([random.choice((1, 2, 3, 4, 8)) for _ in range(2)] for _ in range(2))
        inverse, aligned = random.random() < 0.5, random.random() < 0.3
        box = random_box(random, axis, inverse)
        found = count((axis,), (box,), tuple(rows), tuple(columns), inverse, aligned)
        for i, row_tile in enumerate(rows):
            for j, column_tile in enumerate(columns):
                expected = brute_force(axis, box, row_tile, column_tile, inverse, aligned)
                got = found.row_tiles[0, i], found.visited[0, i, j], found.full[0, i, j]
                assert got == expected, (axis, box, row_tile, column_tile, inverse, aligned)


@pytest.mark.parametrize("seed", range(20))
def test_axes_are_counted_together_as_alone(seed: int) -> None:
    random = Random(seed)
    axes = tuple(random_axis(random) for _ in range(3))
    boxes = tuple(random_box(random, axis) for axis in axes)
    rows, columns = (2, 8), (1, 4, 5)
    for inverse in (False, True):
        together = count(axes, boxes, rows, columns, inverse)
        for n, (axis, box) in enumerate(zip(axes, boxes, strict=True)):
            alone = count((axis,), (box,), rows, columns, inverse)
            assert all((a[n] == b[0]).all() for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_boxes_are_those_of_the_mask(seed: int) -> None:
    random = Random(seed)
    axes = tuple(random_axis(random) for _ in range(random.choice((1, 2))))
    boxes = [random_box(random, axis) for axis in axes]
    query_origin, query_shape, key_origin, key_shape = zip(*boxes, strict=True)
    mask = window.grid_mask(axes, query_shape, key_shape, query_origin, key_origin)
    found = geometry.count_pairs(axes, query_shape, key_shape, query_origin, key_origin)
    assert found == int(mask.sum())


def test_long_axes_are_counted_by_the_tiles_that_differ() -> None:
    axis, box = Axis(1_000_003, 31, 4), Box(0, 1_000_003, 0, 1_000_003)
    tiles = row_tiles((axis,), (box,), (64,), every=False)
    assert len(tiles.first) < 10
    every = row_tiles((axis,), (box,), (64,))
    assert tiles.times.sum() == len(every.first) == -(-1_000_003 // 64)
    union = (every.stop - every.begin).sum()
    assert ((tiles.stop - tiles.begin) * tiles.times).sum() == union


def test_dilation_groups_of_different_lengths() -> None:
    """Of 57 tokens, one group has 15 and three have 14; of 55, three have 14 and one has 13."""
    pytest.importorskip("triton")
    from natten.functional.backends.triton import tiles

    problem = make_problem((57, 55), 7, dilation=4, heads=1, head_dim=64)
    shape = (8, 8)
    expected = prod(
        brute_force(axis, Box(0, axis.length, 0, axis.length), 8, 8, False, False)[1]
        for axis in problem.axes
    )
    assert expected * 64 * 64 == 983_040
    counted = count_tiles(problem.axes, geometry.boxes(problem), shape, shape)
    assert counted[1] == expected
    assert tiles.work(problem, shape, shape).covered == 983_040
    named = simulate((57, 55), 7, dilation=4, q_tile_shape=shape, kv_tile_shape=shape)
    assert named.forward.visited == expected
    assert needed_pairs(problem) == 57 * 55 * 49
