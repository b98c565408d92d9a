"""Shares of the columns of a row tile, which programs visit apart, and what joins their results."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from natten.functional.backends.triton.arguments import pad, strides_of, unspecialized
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import LOG2_E, decode
from natten.functional.backends.triton.tiles import Tiling, block
from natten.functional.problem import Problem

_ROWS = 16


@triton.jit
def share(number, split, splits):
    """Where the share of one of so many programs begins and ends."""
    return number * split // splits, number * (split + 1) // splits


def shares(problem: Problem, tiling: Tiling) -> tuple[int, ...] | None:
    """What kernels are told of programs that share keys: how many there are for each tile of
    queries, and batch entries of the results of each. None for one."""
    return unspecialized((tiling.splits, problem.batch, 0)) if tiling.splits > 1 else None


@triton.jit(do_not_specialize=["rows", "splits", "heads"])
def merge_kernel(
    parts, out, part_lse, lse, strides, extents, rows, splits, heads,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of parts, each with the weight that its logsumexp gives it, or all alike if that is
    None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    feature = tl.arange(0, BLOCK)[None, :]
    mask = exists[:, None] & (feature < FEATURES)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if part_lse is None:
        for split in range(splits):
            place = (tl.cast(split, tl.int64) * rows + row) * FEATURES
            sums += tl.load(parts + (place[:, None] + feature), mask=mask, other=0.0)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for split in range(splits):
            found = tl.load(part_lse + (split * rows + row), mask=exists, other=float("-inf"))
            top = tl.maximum(top, found)
        # A row that sees nothing has -inf everywhere.
        pivot = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([ROWS], tl.float32)
        for split in range(splits):
            found = tl.load(part_lse + (split * rows + row), mask=exists, other=float("-inf"))
            weight = tl.math.exp2((found - pivot) * LOG2_E)
            total += weight
            place = (tl.cast(split, tl.int64) * rows + row) * FEATURES
            needed = mask & (weight != 0.0)[:, None]
            part = tl.load(parts + (place[:, None] + feature), mask=needed, other=0.0)
            sums += weight[:, None] * part
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(lse + row, top + tl.math.log2(total) / LOG2_E, mask=exists)
    batch_stride, stride_x, stride_y, stride_z, head_stride = decode(strides)
    extent_x, extent_y, extent_z = decode(extents)
    token = row // heads
    line = token // extent_z
    plane = line // extent_y
    offset = (row % heads).to(tl.int64) * head_stride + (token % extent_z).to(tl.int64) * stride_z
    offset += (line % extent_y).to(tl.int64) * stride_y
    offset += (plane % extent_x).to(tl.int64) * stride_x
    offset += (plane // extent_x).to(tl.int64) * batch_stride
    tl.store(out + (offset[:, None] + feature), sums.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=4096)
def _launch(splits: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Launch:
    _batch, *tokens, heads, features = shape
    rows = prod(shape[:-1])
    return Launch(
        merge_kernel,
        triton.cdiv(rows, _ROWS),
        (
            unspecialized(strides_of(stride)), unspecialized(pad(tokens, 1)), rows, splits, heads,
            features, block(features), _ROWS,
        ),
    )  # fmt: skip


def merge(
    parts: Tensor, out: Tensor, part_lse: Tensor | None = None, lse: Tensor | None = None
) -> None:
    """Write output and logsumexp, given those of each share: contiguous, float32. Without
    logsumexp, the sum of all shares."""
    _launch(parts.shape[0], out.shape, out.stride()).run(parts, out, part_lse, lse)
