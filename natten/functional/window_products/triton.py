"""Products over windows on GPUs: kernels, and their launchers.

One program works on some tokens of one unit (batch entry and head), a row each, and visits their
neighbors slot by slot. Neighbors of adjacent rows are adjacent, so that caches serve most of them.
No sum is divided among programs: results are the same on every run.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten.functional.window_products.eager import keys_of_queries, queries_of_keys
from natten.window import Axis

# Numbers that a program holds of one tensor.
TILE = 2048


class Windows(NamedTuple):
    """For each position of each axis, its first neighbor and how many there are."""

    x_first: Any
    x_count: Any
    y_first: Any
    y_count: Any
    z_first: Any
    z_count: Any


class Inverses(NamedTuple):
    """For each position of each axis, the first one that has it as a neighbor, and how many do."""

    x_lowest: Any
    x_seen: Any
    y_lowest: Any
    y_seen: Any
    z_lowest: Any
    z_seen: Any


class Sizes(NamedTuple):
    """Lengths of the last two axes, window sizes and dilations."""

    Y: int
    Z: int
    KX: int
    KY: int
    KZ: int
    DX: int
    DY: int
    DZ: int


@triton.jit
def _rows(tokens, Y, Z, BLOCK: tl.constexpr):
    """This program's unit, rows, which of them exist, and their coordinates."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    unit = (program // blocks).to(tl.int64) * tokens
    row = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return unit, row, row < tokens, row // (Y * Z), row // Z % Y, row % Z


@triton.jit
def _features(start, row, live, feature, features, PRECISE: tl.constexpr):
    """Rows [BLOCK] of a tensor [rows, features]."""
    place = start + row[:, None] * features + feature[None, :]
    inside = live[:, None] & (feature < features)[None, :]
    return tl.load(place, mask=inside, other=0).to(PRECISE)


@triton.jit
def _dot(
    a, b, out, windows, tokens, features, empty, sizes,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    Y, Z, KX, KY, KZ, DX, DY, DZ = sizes
    unit, row, live, x, y, z = _rows(tokens, Y, Z, BLOCK)
    feature = tl.arange(0, WIDTH)
    query = _features(a, unit + row, live, feature, features, PRECISE)
    xf, xc = tl.load(windows.x_first + x, live, 0), tl.load(windows.x_count + x, live, 0)
    yf, yc = tl.load(windows.y_first + y, live, 0), tl.load(windows.y_count + y, live, 0)
    zf, zc = tl.load(windows.z_first + z, live, 0), tl.load(windows.z_count + z, live, 0)
    slots = out + (unit + row) * (KX * KY * KZ)
    for i in range(KX):
        for j in range(KY):
            line = ((xf + i * DX) * Y + yf + j * DY) * Z + zf
            for l in range(KZ):
                real = live & (i < xc) & (j < yc) & (l < zc)
                key = _features(b, unit + line + l * DZ, real, feature, features, PRECISE)
                product = tl.where(real, tl.sum(query * key, axis=1), empty)
                place = slots + (i * KY + j) * KZ + l
                tl.store(place, product.to(out.dtype.element_ty), mask=live)


@triton.jit
def _weighted_sum(
    weights, b, out, windows, tokens, features, sizes,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    Y, Z, KX, KY, KZ, DX, DY, DZ = sizes
    unit, row, live, x, y, z = _rows(tokens, Y, Z, BLOCK)
    feature = tl.arange(0, WIDTH)
    xf, xc = tl.load(windows.x_first + x, live, 0), tl.load(windows.x_count + x, live, 0)
    yf, yc = tl.load(windows.y_first + y, live, 0), tl.load(windows.y_count + y, live, 0)
    zf, zc = tl.load(windows.z_first + z, live, 0), tl.load(windows.z_count + z, live, 0)
    slots = weights + (unit + row) * (KX * KY * KZ)
    total = tl.zeros((BLOCK, WIDTH), PRECISE)
    for i in range(KX):
        for j in range(KY):
            line = ((xf + i * DX) * Y + yf + j * DY) * Z + zf
            for l in range(KZ):
                real = live & (i < xc) & (j < yc) & (l < zc)
                weight = tl.load(slots + (i * KY + j) * KZ + l, real, 0).to(PRECISE)
                value = _features(b, unit + line + l * DZ, real, feature, features, PRECISE)
                total += weight[:, None] * value
    place = out + (unit + row)[:, None] * features + feature[None, :]
    inside = live[:, None] & (feature < features)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scatter(
    weights, a, out, windows, inverses, tokens, features, longest, sizes,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    Y, Z, KX, KY, KZ, DX, DY, DZ = sizes
    unit, row, live, x, y, z = _rows(tokens, Y, Z, BLOCK)
    feature = tl.arange(0, WIDTH)
    xl, xs = tl.load(inverses.x_lowest + x, live, 0), tl.load(inverses.x_seen + x, live, 0)
    yl, ys = tl.load(inverses.y_lowest + y, live, 0), tl.load(inverses.y_seen + y, live, 0)
    zl, zs = tl.load(inverses.z_lowest + z, live, 0), tl.load(inverses.z_seen + z, live, 0)
    total = tl.zeros((BLOCK, WIDTH), PRECISE)
    for i in range(longest[0]):
        query_x, real_x = xl + i * DX, live & (i < xs)
        slot_x = (x - tl.load(windows.x_first + query_x, real_x, 0)) // DX
        for j in range(longest[1]):
            query_y, real_y = yl + j * DY, real_x & (j < ys)
            slot_y = slot_x * KY + (y - tl.load(windows.y_first + query_y, real_y, 0)) // DY
            for l in range(longest[2]):
                query_z, real = zl + l * DZ, real_y & (l < zs)
                slot = slot_y * KZ + (z - tl.load(windows.z_first + query_z, real, 0)) // DZ
                query = unit + (query_x * Y + query_y) * Z + query_z
                weight = tl.load(weights + query * (KX * KY * KZ) + slot, real, 0).to(PRECISE)
                value = _features(a, query, real, feature, features, PRECISE)
                total += weight[:, None] * value
    place = out + (unit + row)[:, None] * features + feature[None, :]
    inside = live[:, None] & (feature < features)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@lru_cache(maxsize=64)
def _tables(
    axes: tuple[Axis, ...], device: torch.device
) -> tuple[Windows, Inverses, tuple[int, ...], Sizes]:
    """Windows of three axes and their inverses, the longest of those, and sizes."""
    axes = (Axis(1, 1),) * (3 - len(axes)) + axes

    def tables(neighbors: Any) -> list[Tensor]:
        return [t.to(device, torch.int32) for axis in axes for t in neighbors(axis)]

    longest = tuple([int(queries_of_keys(axis).number.max()) for axis in axes])
    sizes = Sizes(
        *(axis.length for axis in axes[1:]),
        *(axis.kernel_size for axis in axes),
        *(axis.dilation for axis in axes),
    )
    return Windows(*tables(keys_of_queries)), Inverses(*tables(queries_of_keys)), longest, sizes


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], tables: tuple[Any, ...], numbers: tuple[Any, ...]
) -> Tensor:
    """Run a kernel; the last of ``tensors`` ``[units, tokens, ...]`` is its result."""
    out = tensors[-1]
    features = tensors[1].shape[2]
    width = triton.next_power_of_2(features)
    block = max(1, min(128, TILE // width))
    programs = out.shape[0] * triton.cdiv(out.shape[1], block)
    precise = tl.float64 if out.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(out):
        kernel[(programs,)](
            *tensors, *tables, out.shape[1], features, *numbers,
            BLOCK=block, WIDTH=width, PRECISE=precise, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def dot(a: Tensor, b: Tensor, axes: tuple[Axis, ...], empty: float) -> Tensor:
    """As :func:`natten.functional.window_products.eager.dot`."""
    windows, _, _, sizes = _tables(axes, a.device)
    out = a.new_empty(*a.shape[:2], prod(axis.kernel_size for axis in axes))
    return _launch(_dot, (a.contiguous(), b.contiguous(), out), (windows,), (empty, sizes))


def weighted_sum(weights: Tensor, b: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """As :func:`natten.functional.window_products.eager.weighted_sum`."""
    windows, _, _, sizes = _tables(axes, b.device)
    b = b.contiguous()
    tensors = (weights.contiguous(), b, torch.empty_like(b))
    return _launch(_weighted_sum, tensors, (windows,), (sizes,))


def scatter(weights: Tensor, a: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """As :func:`natten.functional.window_products.eager.scatter`."""
    windows, inverses, longest, sizes = _tables(axes, a.device)
    a = a.contiguous()
    tensors = (weights.contiguous(), a, torch.empty_like(a))
    return _launch(_scatter, tensors, (windows, inverses), (longest, sizes))


__all__ = ["dot", "scatter", "weighted_sum"]
