"""Boxes of queries and keys against the windows' definition, token by token."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from natten.distributed.boxes import (
    Box,
    between,
    chunk_lengths,
    interior_first,
    needed,
    shards,
    viewers,
    whole,
)
from natten.window import Axis, attended


def random_axis(random: Random, most: int = 40) -> Axis:
    length = random.randint(1, most)
    dilation = min(random.choice([1, 1, 2, 3]), length)
    kernel = random.randint(1, length // dilation)
    stride = random.randint(1, kernel)
    return Axis(length, kernel, stride, dilation, random.random() < 0.3)


def random_box(random: Random, axes: list[Axis]) -> Box:
    cuts = [sorted(random.randint(0, axis.length) for _ in range(2)) for axis in axes]
    return between([low for low, _ in cuts], [high for _, high in cuts])


def tokens(box: Box) -> set[tuple[int, ...]]:
    return set(product(*[range(o, e) for o, e in zip(box.origin, box.end, strict=True)]))


def hull(points: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """All tokens of the smallest box that has these."""
    if not points:
        return set()
    return set(product(*[range(min(c), max(c) + 1) for c in zip(*points, strict=True)]))


@pytest.mark.parametrize("seed", range(60))
def test_needed_and_viewers_are_the_smallest_boxes(seed):
    random = Random(seed)
    axes = [random_axis(random, 14) for _ in range(random.randint(1, 2))]
    queries, keys = random_box(random, axes), random_box(random, axes)
    seen = {query: set(attended(query, axes)) for query in tokens(queries)}
    assert tokens(needed(axes, queries)) == hull(set().union(*seen.values()))
    seeing = {query for query, its in seen.items() if its & tokens(keys)}
    found = tokens(viewers(axes, queries, keys))
    # One axis sees it and another does not: then no query does, and the box may be empty or not.
    assert found >= seeing
    assert not seeing or found == hull(seeing)


@pytest.mark.parametrize("seed", range(60))
def test_interior_is_local_and_nothing_is_left_out(seed):
    random = Random(seed)
    axes = [random_axis(random) for _ in range(random.randint(1, 2))]
    own = random_box(random, axes)
    parts = interior_first(axes, own)
    assert len(parts) <= 2 * len(axes) + 1
    everything = [token for part in parts for token in tokens(part)]
    assert len(everything) == len(set(everything))
    assert set(everything) == tokens(own)
    if len(parts) > 1:
        assert own.holds(needed(axes, parts[0]))


def test_interior_of_a_shard_by_hand():
    # With windows of 9, queries 20 to 31 see tokens 16 to 35 alone; 24 is where a tile begins.
    axes = [Axis(48, 9)]
    assert interior_first(axes, Box((16,), (20,))) == (
        Box((24,), (8,)), Box((16,), (8,)), Box((32,), (4,)),
    )  # fmt: skip
    # Nobody's window is inside.
    assert interior_first(axes, Box((16,), (6,))) == (Box((16,), (6,)),)
    assert interior_first(axes, Box((16,), (0,))) == ()


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")])
def test_boxes_where_tensors_have_no_values(mode):
    """A compiler runs the geometry too; torch 2.10 does not tell the value of a constant there."""
    # Of lengths that no other test has: what is known is remembered.
    axis = Axis(61 if mode is FakeTensorMode else 67, 5, 1, 2, False)
    own = Box((20,), (24,))
    with mode():
        assert needed([axis], own) == Box((16,), (32,))
        assert viewers([axis], Box((0,), (60,)), own) == Box((16,), (32,))
        assert interior_first([axis], own)[0] == Box((28,), (8,))


def test_boxes():
    box = Box((2, 3), (4, 5))
    assert box.end == (6, 8)
    assert box.tokens == 20
    assert box.intersection(Box((0, 4), (3, 9))) == Box((2, 4), (1, 4))
    assert not box.intersection(Box((7, 4), (3, 9))).tokens
    assert box.holds(Box((3, 3), (1, 1)))
    assert box.holds(Box((99, 99), (0, 1)))
    assert not box.holds(Box((1, 3), (2, 2)))
    tensor = torch.arange(4 * 5).view(1, 4, 5)
    assert tensor[Box((3, 4), (2, 1)).within(box)].flatten().tolist() == [6, 11]
    assert whole((2, 3)) == Box((0, 0), (2, 3))


@pytest.mark.parametrize(("length", "parts"), [(10, 4), (2, 3), (0, 2), (8, 1)])
def test_shards_are_those_of_torch(length, parts):
    theirs = [len(chunk) for chunk in torch.arange(length).chunk(parts)] if length else []
    assert chunk_lengths(length, parts) == (*theirs, *[0] * (parts - len(theirs)))
    boxes = shards((length, 4), (0, 1), (chunk_lengths(length, parts), (1, 3)))
    assert len(boxes) == 2 * parts
    covered = [token for box in boxes for token in tokens(box)]
    assert sorted(covered) == sorted(tokens(whole((length, 4))))
