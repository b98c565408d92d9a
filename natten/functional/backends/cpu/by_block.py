"""Attention a block at a time (blocks.py): which problems take it, and its launches."""

from __future__ import annotations

from functools import lru_cache
from math import log, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Inputs, Results
from natten.functional.backends.cpu.launch import (
    KINDS,
    launch,
    masks,
    numpy_type,
    precise,
    table,
    with_axis,
)
from natten.functional.backends.cpu.plan import (
    Patches,
    array_of,
    chunk_of,
    key_patches,
    padded,
    query_patches,
    sides_of,
)
from natten.functional.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable


class Costs(NamedTuple):
    """Nanoseconds: of each row or patch, of each of its features, of each pair of a row or patch
    with a token that it sees, of each feature of each pair."""

    row: float
    row_feature: float
    pair: float
    pair_feature: float

    def of(self, rows: int, pairs: int, features: int) -> float:
        own = self.row + self.row_feature * features
        return rows * own + pairs * (self.pair + self.pair_feature * features)


# Fitted to 349 random problems with small windows, whose rows stay in the cache, in one thread. A
# step costs a patch what a pair costs a row ten times, and serves up to WIDE rows at once.
BY_ROW = Costs(84, 0.77, 1.0, 0.04), Costs(170, 2.5, 4.8, 0.14)
BY_BLOCK = Costs(470, 10.7, 4.0, 0.46), Costs(670, 15.5, 3.4, 0.79)


def covers(problem: Problem) -> bool:
    """Whether the loops by block compute this problem.

    A bias is a table that rows look up in windows of their own, and additional keys are not part
    of the grid that patches are laid on. Where scores may be too large for their type, and it
    matters which product is rounded first, rows do as the reference does.
    """
    is_tame = abs(problem.scale) < torch.finfo(problem.accumulation_dtype).max ** 0.5
    return is_tame and not (problem.has_rpb or problem.num_additional)


@lru_cache(maxsize=256)
def pays(problem: Problem, backward: bool) -> bool:
    """Whether the loops by block are the faster ones.

    They are not where windows are so small, or so far apart, that the rows of a patch hardly share
    what they see.
    """
    if not covers(problem):
        return False
    from natten.functional.backends.cpu.vectors import WIDE

    features = padded(problem.head_dim) + padded(problem.head_dim_v)
    pairs = prod(int((s.items[:, 1] - s.items[:, 0]).sum()) for s in sides_of(problem).queries)
    by_row = BY_ROW[backward].of(problem.num_queries, pairs, features)
    sides = [query_patches(problem, WIDE, 1)]
    if backward:
        sides.append(key_patches(problem, WIDE, 1))
    steps, patches = sum(side.steps for side in sides), sum(side.count for side in sides)
    return BY_BLOCK[backward].of(patches, steps, features) < by_row


def _run(
    kernel: Callable[..., None],
    problem: Problem,
    patches: Patches,
    tensors: np.ndarray,
    own: tuple[Any, ...],
    features: int,
    buffers: int,
) -> list[int]:
    """Launch a loop; returns the batch entries that it fails on.

    Args:
        kernel: The loop.
        problem, patches: What it computes, in which order.
        tensors: Their table.
        own: Arguments that the others do not have.
        features: Vectors of the state of a patch.
        buffers: Scratch arrays of scores.
    """
    from natten.functional.backends.cpu.blocks import PATCH_SIZE
    from natten.functional.backends.cpu.kernels import BLOCK_SIZE
    from natten.functional.backends.cpu.vectors import FEW_DOTS, WIDE

    width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
    chunk = min(chunk_of(problem), padded(patches.sweep.capacity))
    failed = np.zeros(problem.batch, np.int64)
    arguments = (
        tensors,
        KINDS[problem.dtype],
        problem.scale,
        problem.softcap,
        problem.heads_kv,
        problem.heads // problem.heads_kv,
        problem.head_dim,
        problem.head_dim_v,
        patches.extents,
        patches.reach,
        chunk,
        failed,
        *own,
    )
    vectors = buffers * (chunk + FEW_DOTS) + 2 * max(width, width_v) + patches.members * features
    scratch = chunk * (width + width_v + 2) + vectors * WIDE
    lists = 3 * chunk + 2 * FEW_DOTS + 3 * BLOCK_SIZE + PATCH_SIZE + 3 * patches.reach
    launch(kernel, patches.sweep, arguments, scratch, lists, numpy_type(problem))
    return [int(entry) for entry in np.flatnonzero(failed)]


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, list[int]]:
    """The output, the logsumexp, and the batch entries that have to be computed otherwise."""
    # numba takes half a second to import.
    from natten.functional.backends.cpu import blocks

    query, key, value, *_ = inputs
    out = query.new_empty(problem.output_shape)
    lse = query.new_empty(problem.lse_shape, dtype=problem.accumulation_dtype)
    patches = query_patches(problem, blocks.WIDE, torch.get_num_threads())
    sinks = precise(problem, inputs.sink)
    tensors = table(query, key, value, out, with_axis(lse), *masks(inputs))
    own = (log(max(patches.sweep.longest, 1)), array_of(sinks))
    features = padded(problem.head_dim) + padded(problem.head_dim_v) + 2
    return out, lse, _run(blocks.forward, problem, patches, tensors, own, features, 2)


def backward(
    problem: Problem, inputs: Inputs, results: Results, needs: tuple[bool, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """The gradients of query, key and value, and the batch entries that have to be computed
    otherwise."""
    from natten.functional.backends.cpu import blocks

    query, key, value, *_ = inputs
    out, lse, grad_out, grad_lse = results
    threads, key_mask = torch.get_num_threads(), masks(inputs)[0]
    if grad_lse is not None:
        grad_lse = grad_lse.to(problem.accumulation_dtype)
    lse = lse.to(problem.accumulation_dtype)
    delta = torch.empty_like(lse)
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
    own = (problem.gradient_scale,)
    tensors = table(
        query, key, value, out, with_axis(lse), grad_out, with_axis(grad_lse), with_axis(delta),
        grad_query, key_mask, None,
    )  # fmt: skip
    patches = query_patches(problem, blocks.WIDE, threads)
    features = 2 * width + width_v + 2
    failed = _run(blocks.backward_queries, problem, patches, tensors, own, features, 3)
    if needs[1] or needs[2]:
        tensors = table(
            query, key, value, with_axis(lse), grad_out, with_axis(delta), grad_key, grad_value,
            key_mask,
        )  # fmt: skip
        patches = key_patches(problem, blocks.WIDE, threads)
        features = 2 * (width + width_v)
        failed += _run(blocks.backward_keys, problem, patches, tensors, own, features, 3)
    return (grad_query, grad_key, grad_value), sorted(set(failed))


__all__ = ["backward", "covers", "forward", "pays"]
