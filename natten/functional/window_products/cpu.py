"""Products over windows, compiled by numba.

This file holds everything that its loops call, so that numba's disk cache notices every change. The
loops go over rows: tokens of all units (batch entries and heads) in a line. A
table has, for each axis, the first neighbor of each token and how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natten.functional.backends.cpu import parallel
from natten.functional.backends.cpu.plan import array_of
from natten.functional.backends.cpu.vectors import entry
from natten.functional.window_products.eager import keys_of_queries, queries_of_keys
from natten.window import Axis

# Multiply-adds of one piece of work, which a thread takes at a time.
PIECE = 1 << 20


@entry
def _dot(begin, end, extents, steps, kernel, x_keys, y_keys, z_keys, a, b, out):
    tokens, features, depth = extents[0] * extents[1] * extents[2], a.shape[2], extents[2]
    for row in range(begin, end):
        unit, token = row // tokens, row % tokens
        z, y, x = token % depth, token // depth % extents[1], token // (depth * extents[1])
        for i in range(x_keys[x, 1]):
            for j in range(y_keys[y, 1]):
                line = (x_keys[x, 0] + i * steps[0]) * extents[1] + y_keys[y, 0] + j * steps[1]
                for l in range(z_keys[z, 1]):
                    key = line * depth + z_keys[z, 0] + l * steps[2]
                    total = a.dtype.type(0)
                    for f in range(features):
                        total += a[unit, token, f] * b[unit, key, f]
                    out[unit, token, (i * kernel[1] + j) * kernel[2] + l] = total


@entry
def _weighted_sum(begin, end, extents, steps, kernel, x_keys, y_keys, z_keys, weights, b, out):
    tokens, features, depth = extents[0] * extents[1] * extents[2], b.shape[2], extents[2]
    for row in range(begin, end):
        unit, token = row // tokens, row % tokens
        z, y, x = token % depth, token // depth % extents[1], token // (depth * extents[1])
        for i in range(x_keys[x, 1]):
            for j in range(y_keys[y, 1]):
                line = (x_keys[x, 0] + i * steps[0]) * extents[1] + y_keys[y, 0] + j * steps[1]
                for l in range(z_keys[z, 1]):
                    key = line * depth + z_keys[z, 0] + l * steps[2]
                    weight = weights[unit, token, (i * kernel[1] + j) * kernel[2] + l]
                    for f in range(features):
                        out[unit, token, f] += weight * b[unit, key, f]


@entry
def _scatter(
    begin, end, extents, steps, kernel, x_keys, y_keys, z_keys, x_queries, y_queries, z_queries,
    weights, a, out,
):  # fmt: skip
    tokens, features, depth = extents[0] * extents[1] * extents[2], a.shape[2], extents[2]
    for row in range(begin, end):
        unit, token = row // tokens, row % tokens
        z, y, x = token % depth, token // depth % extents[1], token // (depth * extents[1])
        for i in range(x_queries[x, 1]):
            query_x = x_queries[x, 0] + i * steps[0]
            slot_x = (x - x_keys[query_x, 0]) // steps[0]
            for j in range(y_queries[y, 1]):
                query_y = y_queries[y, 0] + j * steps[1]
                slot_y = slot_x * kernel[1] + (y - y_keys[query_y, 0]) // steps[1]
                for l in range(z_queries[z, 1]):
                    query_z = z_queries[z, 0] + l * steps[2]
                    slot = slot_y * kernel[2] + (z - z_keys[query_z, 0]) // steps[2]
                    query = (query_x * extents[1] + query_y) * depth + query_z
                    weight = weights[unit, query, slot]
                    for f in range(features):
                        out[unit, token, f] += weight * a[unit, query, f]


@lru_cache(maxsize=64)
def _tables(axes: tuple[Axis, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Extents, dilation, kernel size, and the windows of three axes; and their inverses."""
    axes = (Axis(1, 1),) * (3 - len(axes)) + axes
    numbers = [
        np.array(v, np.int64)
        for v in zip(*((axis.length, axis.dilation, axis.kernel_size) for axis in axes))
    ]
    windows, inverses = (
        [torch.stack(neighbors(axis, "cpu"), dim=1).numpy() for axis in axes]
        for neighbors in (keys_of_queries, queries_of_keys)
    )
    return (*numbers, *windows), tuple(inverses)


def _over_rows(
    kernel: Callable[..., None],
    arguments: tuple[Any, ...],
    tensors: tuple[Tensor, ...],
    out: Tensor,
    row_work: int,
) -> Tensor:
    """Run a loop over all rows of ``out`` ``[units, tokens, ...]``, which holds zeros."""
    rows = out.shape[0] * out.shape[1]
    piece = max(1, PIECE // max(row_work, 1))
    tensors = tuple(t.contiguous() for t in tensors)
    arrays = [array_of(t) for t in (*tensors, out)]
    pieces = count()

    def task() -> None:
        # next() on one counter is atomic: no two threads get the same piece.
        while (begin := next(pieces) * piece) < rows:
            kernel(begin, min(begin + piece, rows), *arguments, *arrays)

    parallel.run(task, min(torch.get_num_threads(), -(-rows // piece)))
    return out


def _slots(axes: Sequence[Axis]) -> int:
    return prod(axis.kernel_size for axis in axes)


def dot(a: Tensor, b: Tensor, axes: tuple[Axis, ...], empty: float) -> Tensor:
    """As :func:`natten.functional.window_products.eager.dot`, of float32 or float64."""
    slots = _slots(axes)
    out = a.new_full((*a.shape[:2], slots), empty)
    return _over_rows(_dot, _tables(axes)[0], (a, b), out, slots * a.shape[2])


def weighted_sum(weights: Tensor, b: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """As :func:`natten.functional.window_products.eager.weighted_sum`, of float32 or float64."""
    out = b.new_zeros(b.shape)
    return _over_rows(_weighted_sum, _tables(axes)[0], (weights, b), out, _slots(axes) * b.shape[2])


def scatter(weights: Tensor, a: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """As :func:`natten.functional.window_products.eager.scatter`, of float32 or float64."""
    windows, inverses = _tables(axes)
    out = a.new_zeros(a.shape)
    return _over_rows(_scatter, (*windows, *inverses), (weights, a), out, _slots(axes) * a.shape[2])


__all__ = ["dot", "scatter", "weighted_sum"]
