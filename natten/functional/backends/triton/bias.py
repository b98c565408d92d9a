"""Kernels around the table of relative position biases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten.functional.backends.triton.arguments import LOG2_E, pad, scales, unspecialized
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import decode
from natten.functional.problem import Problem

# Tables that the gradient is summed in, and how many numbers they hold at most.
_COPIES = 8
_ENTRIES = 2**20
_BLOCK = 512


@triton.jit
def bias_table_kernel(
    rpb, bias, sums, kernels, paddings, size, factor, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    """The table in float32, times `factor`, with zeros around each head's entries.

    All pairs of the tiles that a kernel visits then have an entry, in sight or not, which spares
    the kernel a mask in the layout of a load. Also fills in zeros where the table's gradient will
    be summed, in tables of the same layout.
    """
    kernels, paddings = decode(kernels), decode(paddings)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size_x, size_y, size_z = 2 * kernels[0] - 1, 2 * kernels[1] - 1, 2 * kernels[2] - 1
    padded_x, padded_y = size_x + 2 * paddings[0], size_y + 2 * paddings[1]
    padded_z = size_z + 2 * paddings[2]
    z = slot % padded_z - paddings[2]
    rest = slot // padded_z
    y = rest % padded_y - paddings[1]
    rest = rest // padded_y
    x = rest % padded_x - paddings[0]
    head = rest // padded_x
    inside = (x >= 0) & (x < size_x) & (y >= 0) & (y < size_y) & (z >= 0) & (z < size_z)
    source = ((head * size_x + x) * size_y + y) * size_z + z
    value = tl.load(rpb + source, mask=inside & (slot < size), other=0.0)
    tl.store(bias + slot, value.to(tl.float32) * factor, mask=slot < size)
    if sums is not None:
        nothing = tl.zeros([BLOCK], sums.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(sums + (copy * size + slot), nothing, mask=slot < size)


@triton.jit
def bias_gradient_kernel(
    sums, gradient, factor, kernels, paddings, size, padded_size, COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the tables that the bias gradient was added to, without what surrounds them.

    With `factor` these are integers, multiples of 1 / factor.
    """
    kernels, paddings = decode(kernels), decode(paddings)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = slot < size
    size_x, size_y, size_z = 2 * kernels[0] - 1, 2 * kernels[1] - 1, 2 * kernels[2] - 1
    padded_x, padded_y = size_x + 2 * paddings[0], size_y + 2 * paddings[1]
    padded_z = size_z + 2 * paddings[2]
    z = slot % size_z + paddings[2]
    rest = slot // size_z
    y = rest % size_y + paddings[1]
    rest = rest // size_y
    x = rest % size_x + paddings[0]
    head = rest // size_x
    source = sums + ((head * padded_x + x) * padded_y + y) * padded_z + z
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        total += tl.load(source + copy * padded_size, mask=exists, other=0)
    if factor is not None:
        total = total.to(tl.float64) / tl.load(factor).to(tl.float64)
    tl.store(gradient + slot, total.to(gradient.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class BiasTables:
    """A padded table of biases, and the kernels around it.

    Attributes:
        shape: Of the table.
        copies: Tables that its gradient is summed in.
        fill: Fills in the table, and zeros in those of the gradient.
        gradient: Sums the tables of the gradient.
    """

    shape: tuple[int, ...]
    copies: int
    fill: Launch
    gradient: Launch


@lru_cache(maxsize=4096)
def _tables(
    heads: int,
    sizes: tuple[int, ...],
    paddings: tuple[int, ...],
    factor: float,
    device: torch.device,
) -> BiasTables:
    """Those of a bias. Compiled kernels, which they keep, belong to a device."""
    shape = (heads, *(s + 2 * p for s, p in zip(pad(sizes, 1), paddings, strict=True)))
    size, inside = prod(shape), heads * prod(sizes)
    copies = max(1, min(_COPIES, _ENTRIES // size))
    kernels = unspecialized(tuple([(s + 1) // 2 for s in pad(sizes, 1)]))
    padded = unspecialized(paddings)
    return BiasTables(
        shape,
        copies,
        Launch(
            bias_table_kernel, triton.cdiv(size, _BLOCK),
            (kernels, padded, size, factor, copies, _BLOCK),
        ),
        Launch(
            bias_gradient_kernel, triton.cdiv(inside, _BLOCK),
            (kernels, padded, inside, size, copies, _BLOCK),
        ),
    )  # fmt: skip


def bias_table(rpb: Tensor, problem: Problem, paddings: tuple[int, ...]) -> Tensor:
    """Biases as kernels read them: padded, and divided by what scores are multiplied with."""
    return bias_tables(rpb, problem, paddings, None)[0]


def bias_tables(
    rpb: Tensor, problem: Problem, paddings: tuple[int, ...], sums: torch.dtype | None
) -> tuple[Tensor, Tensor | None, BiasTables]:
    """Such a table, and unless ``sums`` is None tables of zeros of that dtype, which the gradient
    is to be added to."""
    scale, negate = scales(problem)
    # Behind a soft cap they are added to products that are negated already.
    factor = (-LOG2_E if negate and not problem.softcap else LOG2_E) / scale
    tables = _tables(rpb.shape[0], tuple(rpb.shape[1:]), paddings, factor, rpb.device)
    bias = torch.empty(tables.shape, dtype=torch.float32, device=rpb.device)
    zeros = None
    if sums is not None:
        zeros = torch.empty((tables.copies, *tables.shape), dtype=sums, device=rpb.device)
    tables.fill.run(rpb.contiguous(), bias, zeros)
    return bias, zeros, tables
