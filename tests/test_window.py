"""The window against tables written by hand and against loops that follow its definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from natten.window import (
    Axis,
    attended,
    axis_mask,
    bounds,
    bounds_table,
    distance,
    grid_mask,
    intersection_bounds,
    inverse_bounds,
    position_bounds,
    union_bounds,
)


# Written by hand from the pictures in the papers.
@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(5, 3), [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),
        # Even windows: one more to the left.
        (Axis(5, 2), [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]]),
        (Axis(5, 4), [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]),
        (Axis(4, 1), [[0], [1], [2], [3]]),
        (Axis(3, 3), [[0, 1, 2]] * 3),
        (Axis(1, 1), [[0]]),
        # Stride 2: pairs share the window of the second of them.
        (Axis(6, 3, 2), [[0, 1, 2]] * 2 + [[2, 3, 4]] * 2 + [[3, 4, 5]] * 2),
        # Blocks.
        (Axis(6, 3, 3), [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3),
        # The last block is short: its window is pushed back to full size.
        (Axis(5, 3, 3), [[0, 1, 2]] * 3 + [[2, 3, 4]] * 2),
        # Dilation 2: even and odd tokens apart.
        (
            Axis(7, 3, 1, 2),
            [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]],
        ),
        (Axis(4, 3, 1, 1, True), [[0], [0, 1], [0, 1, 2], [1, 2, 3]]),
        # Causal with stride 2: the window starts where the second of the pair wants it.
        (Axis(5, 3, 2, 1, True), [[0], [0, 1], [1, 2], [1, 2, 3], [2, 3, 4]]),
        (Axis(5, 2, 1, 2, True), [[0], [1], [0, 2], [1, 3], [2, 4]]),
        # Circular: nobody is pushed back.
        (Axis(5, 3, is_circular=True), [[0, 1, 4], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4]]),
        (Axis(4, 3, 2, is_circular=True), [[0, 1, 2]] * 2 + [[0, 2, 3]] * 2),
        (
            Axis(6, 2, 1, 2, is_circular=True),
            [[0, 4], [1, 5], [0, 2], [1, 3], [2, 4], [3, 5]],
        ),
    ],
    ids=str,
)
def test_hand_written(axis, expected):
    assert [attended(i, axis) for i in range(axis.length)] == expected


def test_two_axes():
    assert attended((0, 3), (Axis(4, 2), Axis(4, 3))) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
    ]


def every_axis(longest: int = 13):
    """All valid axes of up to ``longest`` tokens, strides thinned out."""
    for length in range(1, longest + 1):
        for dilation in range(1, length + 1):
            for kernel_size in range(1, length // dilation + 1):
                for stride in range(1, kernel_size + 1):
                    for is_causal in (False, True):
                        yield Axis(length, kernel_size, stride, dilation, is_causal)


AXES = list(every_axis())
RINGS = [
    axis._replace(is_circular=True)
    for axis in AXES
    if not axis.is_causal and axis.length % (axis.dilation * axis.stride) == 0
]


FINER = [
    axis._replace(upsampling=factor)
    for axis in [*AXES[::7], *RINGS[::3]]
    if axis.dilation == 1
    for factor in (2, 3)
]


def by_definition(axis: Axis, index: int) -> list[int]:
    """The tokens a query attends to, spelled out."""
    length, k, s, d, is_causal, is_circular, _ = axis
    group = [t for t in range(length) if t % d == index % d]
    p = group.index(index)
    stride_group = [q for q in range(len(group)) if q // s == p // s]
    if is_causal:
        leader = stride_group[-1] if len(stride_group) == s else len(group) - 1
        return [t for j, t in enumerate(group) if leader - k < j <= p]
    leader = stride_group[0] + s // 2
    if is_circular:
        return [group[(leader - k // 2 + j) % len(group)] for j in range(k)]
    leader = min(leader, len(group) - 1)
    start = leader - k // 2
    while start < 0:
        start += 1
    while start + k > len(group):
        start -= 1
    return group[start : start + k]


def test_by_definition():
    assert len(AXES) > 1000
    for axis in AXES:
        d = axis.dilation
        starts, ends = (b.tolist() for b in bounds(torch.arange(axis.length), *axis))
        for index, (start, end) in enumerate(zip(starts, ends)):
            window = list(range(index % d + d * start, index % d + d * end, d))
            assert window == by_definition(axis, index), (axis, index)
            assert index in window
            assert len(window) == axis.kernel_size or axis.is_causal


def test_rings_by_definition():
    assert len(RINGS) > 200
    for axis in RINGS:
        d, ring = axis.dilation, axis.length // axis.dilation
        starts, ends = (b.tolist() for b in bounds(torch.arange(axis.length), *axis))
        for index, (start, end) in enumerate(zip(starts, ends)):
            window = [index % d + d * (j % ring) for j in range(start, end)]
            assert window == by_definition(axis, index), (axis, index)
            assert index in window
            assert len(window) == axis.kernel_size


def test_inverse_of_rings():
    """Unwrapped, the windows of the queries from low to high hold the key, and no others do."""
    for axis in RINGS:
        ring = axis.length // axis.dilation
        far = torch.arange(-2 * ring, 3 * ring)
        # Windows of what is before and after the ring are those of the ring, moved.
        start = position_bounds(far % ring, 0, axis)[0] + far // ring * ring
        for key in range(ring):
            low, high = (int(b) for b in inverse_bounds(key * axis.dilation, *axis))
            seen = (start <= key) & (key < start + axis.kernel_size)
            assert far[seen].tolist() == list(range(low, high)), (axis, key)
            assert -ring <= low < ring
            assert high - low <= ring


def test_queries_of_a_token_have_its_window():
    assert len(FINER) > 100
    for axis in FINER:
        own = axis._replace(upsampling=1)
        index = torch.arange(axis.length * axis.upsampling)
        for fine, coarse in zip(bounds(index, *axis), bounds(index // axis.upsampling, *own)):
            assert torch.equal(fine, coarse), axis
        for fine, coarse in zip(
            inverse_bounds(torch.arange(axis.length), *axis),
            inverse_bounds(torch.arange(axis.length), *own),
        ):
            assert torch.equal(fine, coarse * axis.upsampling), axis
        repeated = grid_mask([own]).repeat_interleave(axis.upsampling, 0)
        assert torch.equal(grid_mask([axis]), repeated), axis


def test_inverse():
    for axis in AXES:
        seen = grid_mask([axis])
        d = axis.dilation
        index = torch.arange(axis.length)
        low, high = inverse_bounds(index, *axis)
        assert bool((low <= high).all()), axis
        position = index // d
        inside = (position[:, None] >= low) & (position[:, None] < high)
        inside &= index[:, None] % d == index % d
        assert torch.equal(inside, seen), axis
        # Never beyond the group.
        assert bool((low >= 0).all()), axis
        assert bool((high <= -((index % d - axis.length) // d)).all()), axis


def test_windows_are_monotone():
    for axis in [*AXES, *RINGS]:
        for group in range(axis.dilation):
            tokens = torch.arange(group, axis.length, axis.dilation)
            start, end = bounds(tokens, *axis)
            assert bool((start.diff() >= 0).all() and (end.diff() >= 0).all()), axis
            # No gap between the windows of neighbors.
            assert bool((start[1:] <= end[:-1]).all()), axis


def test_union_and_intersection():
    for axis in [*AXES[::29], *RINGS[::29]]:
        for group in range(axis.dilation):
            count = len(range(group, axis.length, axis.dilation))
            for first, last in product(range(count), range(count)):
                if first > last:
                    continue
                windows = [
                    set(range(*(int(b) for b in position_bounds(p, group, axis))))
                    for p in range(first, last + 1)
                ]
                union = {int(b) for b in range(*map(int, union_bounds(first, last, group, axis)))}
                shared = set(range(*map(int, intersection_bounds(first, last, group, axis))))
                assert union == set.union(*windows), (axis, group, first, last)
                assert shared == set.intersection(*windows), (axis, group, first, last)


def test_mask_is_the_windows():
    for axis in [*AXES[::13], *RINGS[::13]]:
        seen = grid_mask([axis])
        for index in range(axis.length):
            assert seen[index].nonzero().flatten().tolist() == attended(index, axis)


def test_distances():
    for axis in [*AXES[::29], *RINGS[::13]]:
        index = torch.arange(axis.length)
        found = distance(index[:, None], index[None, :], axis)
        group, position = index % axis.dilation, index // axis.dilation
        start, end = bounds(index, *axis)
        key = position[:, None] + found
        assert bool(((key - position) % (-(-axis.length // axis.dilation)) == 0).all()) or not (
            axis.is_circular
        )
        inside = (start[:, None] <= key) & (key < end[:, None]) & (group[:, None] == group)
        assert torch.equal(inside, grid_mask([axis])), axis


def test_mask_is_a_product():
    axes = (Axis(5, 3, 2), Axis(6, 2, 1, 3), Axis(4, 4, 1, 1, True))
    product_of_axes = torch.einsum("ab,cd,ef->acebdf", *(grid_mask([a]).int() for a in axes))
    assert torch.equal(grid_mask(axes), product_of_axes.reshape(120, 120).bool())


def test_mask_of_boxes():
    axes = (Axis(9, 3), Axis(8, 4, 2))
    whole = grid_mask(axes).view(9, 8, 9, 8)
    part = grid_mask(axes, (3, 4), (5, 2), (2, 1), (4, 6))
    assert torch.equal(part.view(3, 4, 5, 2), whole[2:5, 1:5, 4:9, 6:8])


def test_table_is_cut_to_the_keys():
    for axis in AXES[::23]:
        n = axis.length
        for q, queries, k, keys in ((0, n, 0, n), (n // 3, n - n // 3, n // 2, n - n // 2)):
            start, end = bounds_table(axis, q, queries, k, keys)
            for i in range(queries):
                group = (q + i) % axis.dilation
                tokens = [group + axis.dilation * j for j in range(int(start[i]), int(end[i]))]
                visible = [t for t in attended(q + i, axis) if k <= t < k + keys]
                assert tokens == visible, (axis, q, k, i)


def test_tensors_broadcast():
    axis = Axis(20, 5, 2, 2)
    index = torch.arange(20).view(4, 5)
    start, end = bounds(index, *axis)
    assert start.shape == end.shape == (4, 5)
    assert start.dtype == torch.int64
    for i in range(20):
        assert [int(b) for b in bounds(i, *axis)] == [
            int(start.flatten()[i]),
            int(end.flatten()[i]),
        ]


def test_under_vmap_and_compile():
    axis = Axis(12, 5, 2, 2)
    index = torch.arange(12)
    seen = torch.vmap(torch.vmap(lambda q, k: axis_mask(q, k, axis), (None, 0)), (0, None))
    assert torch.equal(seen(index, index), grid_mask([axis]))
    compiled = torch.compile(lambda i: bounds(i, *axis), backend="eager", fullgraph=True)
    for got, expected in zip(compiled(index), bounds(index, *axis)):
        assert torch.equal(got, expected)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="index"):
        attended((1, 2), Axis(5, 3))
    with pytest.raises(ValueError, match="index"):
        attended(1, (Axis(5, 3), Axis(5, 3)))
