"""The neighborhood: which keys a query attends to.

This module is the one Python definition of the window. Everything else (the reference, the masks
given to FlexAttention, the tables given to compiled CPU kernels, pictures, tests) asks it.

Along one axis of ``length`` tokens, with ``dilation`` d, token ``index`` belongs to the dilation
group ``index % d`` and sits there at position ``index // d``. Group g has
``ceil((length - g) / d)`` tokens. Windows are ranges of *positions* of the query's own group, so
that position j stands for token ``g + d * j``. With stride s, the s queries of a stride group
share the window of their leader:

| axis | leader | start | end |
|-|-|-|-|
| bidirectional | `min(p//s*s + s//2, L_g - 1)` | `clamp(leader - k//2, 0, L_g - k)` | `start + k` |
| causal | `min(p//s*s + s - 1, L_g - 1)` | `max(leader - k + 1, 0)` | `p + 1` |
| circular | `p//s*s + s//2` | `leader - k//2` | `start + k` |

Windows are clamped into the axis, never cut by its border. A circular axis has no border: its
positions are those of a ring, on which j and j + L_g are one. Dilation divides its length and
stride that of its groups. Bounds stay *unwrapped* there: they may be negative, or lie beyond L_g.

An N-dimensional window is the product of the windows of its axes. Both ends of a window grow with
the query's position, and stride is at most kernel_size, so that the union of the windows of
consecutive positions, their intersection, and the set of queries that see a key are ranges too.

All functions take Python integers or integer tensors of any shape that broadcast, use plain tensor
operations only (they run inside a FlexAttention ``mask_mod``, under vmap and torch.compile), and
return tensors of int64 unless noted.

References: Neighborhood Attention Transformer (https://arxiv.org/abs/2204.07143), Dilated
Neighborhood Attention Transformer (https://arxiv.org/abs/2209.15001), Generalized Neighborhood
Attention (https://arxiv.org/abs/2504.16922).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

Index = int | Tensor


class Axis(NamedTuple):
    """The parameters of the neighborhood along one axis.

    Attributes:
        length: Tokens along the axis of the whole (global) grid.
        kernel_size: Window size, in tokens of one dilation group.
        stride: Queries that share one window.
        dilation: Distance of neighbors.
        is_causal: Whether a query attends to no later token.
        is_circular: Whether the last token is a neighbor of the first.
        upsampling: Queries of each token of the grid: query i has the window of token
            ``i // upsampling``. Positions of queries are then counted in queries. More than one
            go with dilation 1 only.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    is_circular: bool = False
    upsampling: int = 1


def _tensor(index: Index) -> Tensor:
    # A number on the CPU goes with tensors of every device.
    return index if isinstance(index, Tensor) else torch.tensor(index, device="cpu")


def _ceil_div(numerator: Index, denominator: int) -> Index:
    return -(-numerator // denominator)


def group_length(group: Index, axis: Axis) -> Index:
    """Tokens of the dilation group ``group`` along ``axis``."""
    return _ceil_div(axis.length - group, axis.dilation)


def position_bounds(position: Index, group: Index, axis: Axis) -> tuple[Tensor, Tensor]:
    """First key position and one past the last that a query attends to, in its group.

    Args:
        position: Position of the query in its dilation group.
        group: The dilation group.
        axis: The axis.
    """
    position = _tensor(position) // axis.upsampling
    last: Any = group_length(group, axis) - 1
    k, s = axis.kernel_size, axis.stride
    leader = position // s * s + (s - 1 if axis.is_causal else s // 2)
    if axis.is_circular:
        return leader - k // 2, leader - k // 2 + k
    leader = leader.clamp(max=last)
    if axis.is_causal:
        return (leader - k + 1).clamp(min=0), position + 1
    start = (leader - k // 2).clamp(max=last + 1 - k).clamp(min=0)
    return start, start + k


def bounds(
    index: Index,
    length: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    is_circular: bool = False,
    upsampling: int = 1,
) -> tuple[Tensor, Tensor]:
    """First key position and one past the last that the query token ``index`` attends to.

    Both are positions in the group ``index % dilation``.
    """
    axis = Axis(length, kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    index = _tensor(index)
    return position_bounds(index // dilation, index % dilation, axis)


def inverse_position_bounds(position: Index, group: Index, axis: Axis) -> tuple[Tensor, Tensor]:
    """First query position and one past the last that attend to a key, in the key's group.

    The range may be empty for a causal axis with stride, where no query sees some keys.
    """
    start, stop = _inverse_bounds(position, group, axis)
    return start * axis.upsampling, stop * axis.upsampling


def _inverse_bounds(position: Index, group: Index, axis: Axis) -> tuple[Tensor, Tensor]:
    """The same in tokens of the grid."""
    position = _tensor(position)
    length = group_length(group, axis)
    last = length - 1
    k, s = axis.kernel_size, axis.stride
    if axis.is_circular:
        # The leaders whose windows hold the key.
        earliest, latest = position - k + k // 2 + 1, position + k // 2
        first = _tensor(_ceil_div(earliest - s // 2, s)) * s
        return first, (latest - s // 2) // s * s + s
    end = torch.zeros_like(position) + length
    if axis.is_causal:
        # A later query drops the key when its leader passes position + k - 1. The clamp of the
        # leader to the last position can only keep it.
        reach = position + k - 1
        stop = ((reach - (s - 1)) // s + 1) * s
        stop = torch.where(reach >= last, end, torch.minimum(stop, end))
        return position, torch.maximum(stop, position)
    # The window starts at or before the key ...
    reach = position + k // 2
    stop = ((reach - s // 2) // s + 1) * s
    sees_last = (position >= length - k) | (reach >= last)
    stop = torch.where(sees_last, end, torch.minimum(stop, end).clamp(min=0))
    # ... and ends after it.
    earliest = position - k + 1
    start = _tensor(_ceil_div(earliest + k // 2 - s // 2, s)) * s
    start = torch.where(earliest <= 0, torch.zeros_like(position), start.clamp(min=0))
    return torch.minimum(start, end), stop


def inverse_bounds(
    index: Index,
    length: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    is_circular: bool = False,
    upsampling: int = 1,
) -> tuple[Tensor, Tensor]:
    """First query position and one past the last that attend to the key token ``index``.

    Both are positions in the group ``index % dilation``; first == last + 1 means none.
    """
    axis = Axis(length, kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    index = _tensor(index)
    return inverse_position_bounds(index // dilation, index % dilation, axis)


def box_bounds(group: Index, dilation: int, origin: int, extent: int) -> tuple[Index, Index]:
    """Positions of ``group`` inside the token range ``[origin, origin + extent)``: first, end."""
    return (
        _ceil_div(origin - group, dilation),
        _ceil_div(origin + extent - group, dilation),
    )


def union_bounds(first: Index, last: Index, group: Index, axis: Axis) -> tuple[Tensor, Tensor]:
    """Key positions that some query of positions ``first .. last`` (inclusive) attends to."""
    return position_bounds(first, group, axis)[0], position_bounds(last, group, axis)[1]


def intersection_bounds(
    first: Index, last: Index, group: Index, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Key positions that every query of positions ``first .. last`` attends to (maybe none)."""
    start = position_bounds(last, group, axis)[0]
    return start, torch.maximum(position_bounds(first, group, axis)[1], start)


def axis_mask(query_index: Index, key_index: Index, axis: Axis) -> Tensor:
    """Whether the query token attends to the key token along one axis (bool, broadcast)."""
    query_index, key_index = _tensor(query_index), _tensor(key_index)
    d = axis.dilation
    start, end = position_bounds(query_index // d, query_index % d, axis)
    key_position = key_index // d
    if axis.is_circular:
        inside = (key_position - start) % (axis.length // d) < axis.kernel_size
    else:
        inside = (key_position >= start) & (key_position < end)
    return inside if d == 1 else inside & (query_index % d == key_index % d)


def distance(query_index: Index, key_index: Index, axis: Axis) -> Tensor:
    """Key position - that of the query's token along one axis; on a circular one that inside the
    query's window, if the key is in there."""
    query_index, key_index = _tensor(query_index), _tensor(key_index)
    d = axis.dilation
    query, key = query_index // d // axis.upsampling, key_index // d
    if not axis.is_circular:
        return key - query
    start, _ = position_bounds(query_index // d, query_index % d, axis)
    return (key - start) % (axis.length // d) + start - query


def mask(query_index: Sequence[Index], key_index: Sequence[Index], axes: Sequence[Axis]) -> Tensor:
    """Whether a query token attends to a key token: the product of the masks of the axes.

    Args:
        query_index: One integer tensor per axis, that broadcast together.
        key_index: Likewise.
        axes: One :class:`Axis` each.
    """
    visible = axis_mask(query_index[0], key_index[0], axes[0])
    for q, k, axis in zip(query_index[1:], key_index[1:], axes[1:], strict=True):
        visible = visible & axis_mask(q, k, axis)
    return visible


def queries_of(axes: Sequence[Axis]) -> tuple[int, ...]:
    """The extents of a whole grid of queries."""
    return tuple([axis.length * axis.upsampling for axis in axes])


def grid_mask(
    axes: Sequence[Axis],
    query_shape: Sequence[int] | None = None,
    key_shape: Sequence[int] | None = None,
    query_origin: Sequence[int] | None = None,
    key_origin: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The full bool mask ``[num_queries, num_keys]``, row-major, of a small problem.

    Boxes of queries and keys default to the whole grid.
    """
    rank = len(axes)
    lengths = [axis.length for axis in axes]
    zeros = [0] * rank

    def coordinates(shape: Sequence[int], origin: Sequence[int] | None) -> list[Tensor]:
        extents = zip(origin or zeros, shape, strict=True)
        ranges = [torch.arange(o, o + n, device=device) for o, n in extents]
        return [c.flatten() for c in torch.meshgrid(*ranges, indexing="ij")]

    queries = [c[:, None] for c in coordinates(query_shape or queries_of(axes), query_origin)]
    keys = [c[None, :] for c in coordinates(key_shape or lengths, key_origin)]
    return mask(queries, keys, axes)


def bounds_table(
    axis: Axis,
    query_origin: int = 0,
    query_extent: int | None = None,
    key_origin: int = 0,
    key_extent: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The windows of all queries of a range, cut to a range of keys: for kernels that look up.

    Returns:
        start, end: int64 ``[query_extent]``, positions in the group of each query (token
        ``group + dilation * position``). Tokens outside
        ``[key_origin, key_origin + key_extent)`` are left out; start == end means none.
    """
    if query_extent is None:
        query_extent = axis.length * axis.upsampling - query_origin
    key_extent = axis.length - key_origin if key_extent is None else key_extent
    index = torch.arange(query_origin, query_origin + query_extent, device=device)
    start, end = bounds(index, *axis)
    if axis.is_circular:
        return start, end
    low, high = box_bounds(index % axis.dilation, axis.dilation, key_origin, key_extent)
    start = torch.maximum(start, _tensor(low))
    return start, torch.maximum(torch.minimum(end, _tensor(high)), start)


def attended(
    index: Sequence[int] | int,
    axes: Sequence[Axis] | Axis,
) -> list[Any]:
    """The tokens that one query attends to, row-major: for tests and pictures.

    A single index and :class:`Axis` give a list of integers, sequences a list of tuples.
    """
    if isinstance(axes, Axis):
        if not isinstance(index, int):
            raise ValueError(f"index must be an int for a single axis, got {index!r}")
        start, end = (int(b) for b in bounds(index, *axes))
        d, ring = axes.dilation, axes.length // axes.dilation
        positions: Iterable[int] = range(start, end)
        if axes.is_circular:
            positions = sorted(j % ring for j in positions)
        return [index % d + d * j for j in positions]
    if isinstance(index, int) or len(index) != len(axes):
        raise ValueError(f"index must have one value for each of {len(axes)} axes, got {index!r}")
    per_axis: list[Any] = [attended(i, axis) for i, axis in zip(index, axes, strict=True)]
    return list(product(*per_axis))


def absent(lengths: Tensor, size: int) -> Tensor:
    """Which of ``size`` additional keys each batch entry lacks: bool ``[batch, size]``, True from
    its length on."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def cleared(tensor: Tensor, hidden: Tensor) -> Tensor:
    """Keys or values ``[batch, *tokens, heads, features]`` with zeros where ``hidden``, of
    ``[batch, *tokens]``: a weight of zero times what is not finite would not be zero."""
    return tensor.masked_fill(hidden[..., None, None], 0.0)


__all__ = [
    "Axis",
    "absent",
    "attended",
    "axis_mask",
    "bounds",
    "bounds_table",
    "box_bounds",
    "cleared",
    "distance",
    "grid_mask",
    "group_length",
    "intersection_bounds",
    "inverse_bounds",
    "inverse_position_bounds",
    "mask",
    "position_bounds",
    "queries_of",
    "union_bounds",
]
