"""Kernels around the table of relative position biases."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import revealed


@triton.jit
def bias_table_kernel(
    rpb, bias, sums, kernels, paddings, size, factor, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    """The table in float32, times `factor`, with zeros around each head's entries.

    All pairs of the tiles that a kernel visits then have an entry, in sight or not, which spares
    the kernel a mask in the layout of a load. Also fills in zeros where the table's gradient will
    be summed, in tables of the same layout.
    """
    kernels, paddings = revealed(kernels), revealed(paddings)
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
    kernels, paddings = revealed(kernels), revealed(paddings)
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
