"""Values wider than a tile: every slice of the value becomes a head of its own.

Everything is linear in the value. With the query, key and bias of a head repeated for each slice of
its value, the slices' outputs side by side are the head's output, their logsumexps are equal, and
the gradients of what was repeated are sums over the slices.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from natten.functional.problem import Problem

MAX_VALUE_DIM = 256
_SLICE = 128


@lru_cache(maxsize=4096)
def sliced(problem: Problem) -> tuple[Problem, int]:
    """The problem over slices as heads, and their number; itself and 1 if it is narrow enough."""
    if problem.head_dim_v <= MAX_VALUE_DIM:
        return problem, 1
    slices = -(-problem.head_dim_v // _SLICE)
    width = -(-problem.head_dim_v // (8 * slices)) * 8
    wide = replace(
        problem,
        heads=problem.heads * slices,
        heads_kv=problem.heads_kv * slices,
        head_dim_v=width,
    )
    return wide, slices


def repeat(tensor: Tensor | None, slices: int, axis: int = -2) -> Tensor | None:
    """Heads once for each slice: all heads of the first slice, then all of the second."""
    if tensor is None:
        return None
    return torch.cat([tensor] * slices, axis)


def split(tensor: Tensor | None, slices: int, width: int) -> Tensor | None:
    """[..., heads, head_dim_v] to [..., slices * heads, width], with zeros behind the last."""
    if tensor is None:
        return None
    padded = torch.nn.functional.pad(tensor, (0, slices * width - tensor.shape[-1]))
    return padded.unflatten(-1, (slices, width)).transpose(-3, -2).flatten(-3, -2)


def join(tensor: Tensor, slices: int, features: int) -> Tensor:
    """The inverse of `split`."""
    return tensor.unflatten(-2, (slices, -1)).transpose(-3, -2).flatten(-2)[..., :features]


def add(tensor: Tensor | None, slices: int, axis: int = -2) -> Tensor | None:
    """The gradient of `repeat`, summed in float32."""
    if tensor is None:
        return None
    return tensor.unflatten(axis, (slices, -1)).float().sum(axis - 1 if axis < 0 else axis)
