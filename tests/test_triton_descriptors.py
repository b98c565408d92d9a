"""What descriptors of dilated grids view: every dilation group as a box, and nothing behind it."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from natten.simulator import make_problem

pytest.importorskip("triton")

from natten.functional.backends.triton.arguments import group_steps, pad
from natten.functional.backends.triton.launcher import describable, descriptor

GRIDS = [((12,), (3,)), ((6, 8), (2, 4)), ((6, 8), (1, 2)), ((4, 6, 6), (2, 3, 1))]


def _contiguous(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.float32).view(shape)


def _packed(shape: tuple[int, ...]) -> Tensor:
    """Values, behind queries and keys of the same tokens."""
    *tokens, heads, features = shape
    return _contiguous((*tokens, 3 * heads, features))[..., 2 * heads :, :]


def _inside(shape: tuple[int, ...]) -> Tensor:
    """A corner of a larger grid."""
    batch, *tokens, heads, features = shape
    larger = _contiguous((batch + 1, *(n + 1 for n in tokens), heads, features))
    return larger[tuple(slice(1, None) for _ in shape[:-2])]


def _box(described: Any, corner: tuple[int, ...], extents: tuple[int, ...]) -> Tensor:
    """What a descriptor loads, without what lies out of its bounds."""
    sizes = [min(n, size - at) for n, size, at in zip(extents, described.shape, corner)]
    start = sum(at * step for at, step in zip(corner, described.strides))
    base = described.base
    return base.as_strided(sizes, described.strides, base.storage_offset() + start)


@pytest.mark.parametrize("layout", [_contiguous, _packed, _inside])
@pytest.mark.parametrize(("grid", "dilation"), GRIDS)
def test_groups_are_boxes(grid, dilation, layout):
    rank, heads, features = len(grid), 2, 8
    tensor = layout((3, *grid, heads, features))
    assert describable(tensor, dilation) is tensor
    described = descriptor(tensor, (1, 1, 1), dilation=dilation)
    # The last number within bounds is the tensor's last.
    last = sum((n - 1) * step for n, step in zip(described.shape, described.strides))
    assert last == sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))

    problem = make_problem(grid, 1, dilation=dilation, heads=heads, head_dim=features)
    steps = group_steps(problem, tensor.stride())
    assert steps is not None
    # As kernels decode them.
    steps = [(step >> 1) - 1 for step in steps]
    for group in product(*map(range, dilation)):
        start = sum(g * step for g, step in zip(pad(group, 0), steps))
        places = tuple(slice(g, None, d) for g, d in zip(group, dilation))
        for entry, head in product(range(3), range(heads)):
            corner = (entry, 0, 0, 0, start + head * features)
            # More rows than there are, which never reach into other groups.
            found = _box(described, corner, (1, *pad((99,) * rank, 1), features))
            wanted = tensor[(entry, *places, head)]
            assert torch.equal(found.reshape(wanted.shape), wanted)


def test_one_group_needs_no_steps():
    problem = make_problem((6, 8), 3, heads=2, head_dim=8)
    assert group_steps(problem, (768, 128, 16, 8, 1)) is None


def test_groups_out_of_reach_are_copied():
    """Coordinates have 32 bits, and views may be of tensors of any size."""
    shape, step = (1, 64, 4, 64), 2**27
    view = torch.empty_strided(shape, (64 * step, step, 64, 1), dtype=torch.float16, device="meta")
    assert describable(view) is view
    assert describable(view, (16,)) is view
    assert describable(view, (32,)).is_contiguous()
