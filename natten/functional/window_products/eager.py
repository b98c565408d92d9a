"""Products over windows in plain torch operations, on any device: gather, then a small matmul.

The neighbors of a few tokens at a time are gathered, so that memory beyond the result is bounded.
Sums over the queries that see a key gather as well (:func:`natten.window.inverse_bounds`), rather
than add in the order in which threads arrive: results are the same on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from natten.window import Axis, bounds, inverse_bounds

# Gathered numbers at a time: a core's cache, or enough to fill a GPU.
CHUNK = {"cpu": 1 << 18}
DEFAULT_CHUNK = 1 << 25


class Neighbors(NamedTuple):
    """Along one axis: the first neighbor of every token, and how many there are, in steps of the
    dilation.
    """

    first: Tensor
    number: Tensor


def keys_of_queries(axis: Axis, device: torch.device | str = "cpu") -> Neighbors:
    """Tokens that each token of an axis attends to."""
    index = torch.arange(axis.length, device=device)
    start, end = bounds(index, *axis)
    return Neighbors(index % axis.dilation + axis.dilation * start, end - start)


def queries_of_keys(axis: Axis, device: torch.device | str = "cpu") -> Neighbors:
    """Tokens that attend to each token of an axis."""
    index = torch.arange(axis.length, device=device)
    start, end = inverse_bounds(index, *axis)
    return Neighbors(index % axis.dilation + axis.dilation * start, end - start)


def _coordinates(rows: Tensor, axes: Sequence[Axis]) -> list[Tensor]:
    """Flat indices of tokens to one index per axis."""
    coordinates = []
    for axis in reversed(axes):
        coordinates.append(rows % axis.length)
        rows = rows // axis.length
    return coordinates[::-1]


class _Chunk(NamedTuple):
    rows: slice
    neighbor: Tensor  # [rows, M] flat tokens; an empty slot has the row's own token
    slot: Tensor  # [rows, M] flat slot in the window of the query
    real: Tensor  # [rows, M]


def _chunks(
    axes: Sequence[Axis], inverse: bool, row_size: int, device: torch.device
) -> Iterator[_Chunk]:
    """Every token's neighbors: its window, or with ``inverse`` the queries that see it."""
    windows = [keys_of_queries(axis, device) for axis in axes]
    tables = [queries_of_keys(axis, device) for axis in axes] if inverse else windows
    widths = [
        max(int(t.number.max()), 1) if inverse else axis.kernel_size
        for t, axis in zip(tables, axes, strict=True)
    ]
    tokens = prod(axis.length for axis in axes)
    budget = CHUNK.get(device.type, DEFAULT_CHUNK)
    step = max(1, budget // max(1, row_size * prod(widths)))
    for begin in range(0, tokens, step):
        rows = torch.arange(begin, min(begin + step, tokens), device=device)
        neighbor = slot = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
        real = torch.ones(len(rows), 1, dtype=torch.bool, device=device)
        for axis, window, table, width, own in zip(
            axes, windows, tables, widths, _coordinates(rows, axes), strict=True
        ):
            offset = torch.arange(width, device=device)
            valid = offset < table.number[own][:, None]
            other = table.first[own][:, None] + axis.dilation * offset
            other = torch.where(valid, other, own[:, None])
            if inverse:
                place = (own[:, None] - window.first[other]) // axis.dilation
            else:
                place = offset.expand(len(rows), -1)
            neighbor = _outer(neighbor * axis.length, other)
            slot = _outer(slot * axis.kernel_size, place)
            real = (real[:, :, None] & valid[:, None]).flatten(1)
        yield _Chunk(slice(begin, begin + len(rows)), neighbor, slot, real)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """[N, K] and [N, J] to their sums [N, K * J]."""
    return (a[:, :, None] + b[:, None]).flatten(1)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[:, index]``, but many times faster."""
    return tensor.index_select(1, index.flatten()).unflatten(1, index.shape)


def dot(a: Tensor, b: Tensor, axes: Sequence[Axis], empty: float) -> Tensor:
    """``out[u, q, j] = a[u, q] · b[u, key(q, j)]`` of ``[units, tokens, features]``."""
    slots = prod(axis.kernel_size for axis in axes)
    out = a.new_empty(*a.shape[:2], slots)
    for chunk in _chunks(axes, False, b.shape[0] * b.shape[2], a.device):
        keys, queries = _take(b, chunk.neighbor), a[:, chunk.rows]
        if a.device.type == "cpu":
            products = (keys * queries[:, :, None]).sum(-1)
        else:
            # Sums in float32, whatever the type.
            products = (keys @ queries[..., None]).squeeze(-1)
        out[:, chunk.rows] = torch.where(chunk.real, products, empty)
    return out


def weighted_sum(weights: Tensor, b: Tensor, axes: Sequence[Axis]) -> Tensor:
    """``out[u, q] = sum over j of weights[u, q, j] * b[u, key(q, j)]``."""
    out = torch.empty_like(b)
    for chunk in _chunks(axes, False, b.shape[0] * b.shape[2], b.device):
        kept = torch.where(chunk.real, weights[:, chunk.rows], 0)
        out[:, chunk.rows] = (kept[:, :, None] @ _take(b, chunk.neighbor)).squeeze(2)
    return out


def scatter(weights: Tensor, a: Tensor, axes: Sequence[Axis]) -> Tensor:
    """``out[u, key(q, j)] += weights[u, q, j] * a[u, q]``."""
    out = torch.empty_like(a)
    flat, slots = weights.flatten(1), weights.shape[2]
    for chunk in _chunks(axes, True, a.shape[0] * a.shape[2], a.device):
        kept = torch.where(chunk.real, _take(flat, chunk.neighbor * slots + chunk.slot), 0)
        out[:, chunk.rows] = (kept[:, :, None] @ _take(a, chunk.neighbor)).squeeze(2)
    return out


__all__ = ["Neighbors", "dot", "keys_of_queries", "queries_of_keys", "scatter", "weighted_sum"]
