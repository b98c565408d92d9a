"""Where tensors lie: layouts, the border of what may be touched, and what nobody wrote."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

Layout = Callable[[Tensor, Random], Tensor]
PAGE = mmap.PAGESIZE
# Whether new memory is filled with NaN; not where a tool looks for numbers that nobody wrote.
fills_empties = True
_libc = None if sys.platform == "win32" else ctypes.CDLL(None)


# ---------------------------------------------------------------- guards


def _region(size: int, at_end: bool) -> tuple[mmap.mmap, int]:
    """Memory between two pages that must not be touched, and where ``size`` bytes of it begin: next
    to the last of these pages, or to the first."""
    pages = max(-(-size // PAGE), 1)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    if _libc is not None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for page in (0, pages + 1):
            if _libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0):
                raise OSError("mprotect failed")
    return region, (pages + 1) * PAGE - size if at_end else PAGE


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy with the same strides, next to memory that ends the process when it is touched.

    Tensors on other devices, and empty ones, stay as they are.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    steps = zip(tensor.shape, tensor.stride())
    span = 1 + sum((extent - 1) * step for extent, step in steps)
    region, offset = _region(span * tensor.element_size(), at_end)
    memory = torch.frombuffer(region, dtype=tensor.dtype, count=span, offset=offset)
    copy = memory.as_strided(tensor.shape, tensor.stride(), 0)
    # Numbers that lie in one place are the same: each is written once.
    once = tuple(slice(None) if step else slice(0, 1) for step in tensor.stride())
    copy[once].copy_(tensor.detach()[once])
    return copy


def _guarded_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not array.nbytes:
        return array
    region, offset = _region(array.nbytes, True)
    copy = np.frombuffer(region, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


class _GuardedNumpy:
    """numpy, whose new arrays end where memory does, and hold NaN if nobody wrote them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray[Any, Any]:
        fill = math.nan if np.issubdtype(dtype, np.floating) else 1 << 40
        return _guarded_array(np.full(shape, fill, dtype))

    def zeros(self, shape: Any, dtype: Any = float) -> np.ndarray[Any, Any]:
        return _guarded_array(np.zeros(shape, dtype))


@contextmanager
def nan_filled_empties() -> Iterator[None]:
    """Fill what torch leaves uninitialized with NaN, so that a missing write shows; and on the CPU,
    let all new tensors, and the scratch memory of compiled loops, end where memory does, so that a
    write beyond ends the process."""
    from natten.functional.backends.cpu import launch

    def filled(allocate: Any, fills: bool) -> Any:
        def function(*arguments: Any, **named: Any) -> Tensor:
            tensor = allocate(*arguments, **named)
            if fills and fills_empties and tensor.is_floating_point():
                tensor.fill_(torch.nan)
            # Wrappers of compilers and transforms have no memory of their own.
            return guarded(tensor) if type(tensor) is Tensor else tensor

        return function

    with ExitStack() as stack:
        for owner, name, fills in (
            (torch, "empty", True),
            (torch, "empty_like", True),
            (Tensor, "new_empty", True),
            (torch, "zeros", False),
            (torch, "zeros_like", False),
            (Tensor, "new_zeros", False),
            (Tensor, "new_full", False),
        ):
            allocate = filled(getattr(owner, name), fills)
            stack.enter_context(mock.patch.object(owner, name, allocate))
        stack.enter_context(mock.patch.object(launch, "np", _GuardedNumpy()))
        yield


@contextmanager
def nan_filled_replays() -> Iterator[None]:
    """The same of memory for calls that are done again (`backends.triton.replay`)."""
    from natten.functional.backends.triton import replay

    allocate = replay.empty_cuda

    def filled(*arguments: Any) -> Tensor:
        tensor: Tensor = allocate(*arguments)
        fills = fills_empties and tensor.is_floating_point()
        return tensor.fill_(torch.nan) if fills else tensor

    with mock.patch.object(replay, "empty_cuda", filled):
        yield


# ---------------------------------------------------------------- layouts


def between_nan(values: Tensor) -> Tensor:
    """A contiguous copy with NaN on either side, at an odd offset."""
    base = torch.full(
        (values.numel() + 34,), math.nan, dtype=values.dtype, device=values.device
    )  # fmt: skip
    part = base[17 : 17 + values.numel()].view(values.shape)
    part.copy_(values)
    return part


def permuted(values: Tensor, random: Random) -> Tensor:
    """Axes in another order in memory."""
    order = list(range(values.dim()))
    random.shuffle(order)
    inverse = [order.index(i) for i in range(len(order))]
    return between_nan(values.permute(order)).permute(inverse)


def heads_innermost(values: Tensor, random: Random) -> Tensor:
    """As ``b n (d h) -> b n h d`` leaves it."""
    if values.dim() < 3:
        return permuted(values, random)
    return between_nan(values.transpose(-1, -2)).transpose(-1, -2)


def channels_last(values: Tensor, random: Random) -> Tensor:
    """Heads and features first, then the tokens, in memory behind them."""
    if values.dim() < 2:
        return between_nan(values)
    return between_nan(values.movedim(1, -1)).movedim(-1, 1)


def sliced(values: Tensor, random: Random) -> Tensor:
    """Every second or third of a larger tensor, from an offset."""
    steps = [random.choice((1, 1, 2, 3)) for _ in values.shape]
    whole = [(n + 2) * step for n, step in zip(values.shape, steps)]
    base = torch.full(whole, math.nan, dtype=values.dtype, device=values.device)
    part = base[tuple(slice(s, (n + 1) * s, s) for n, s in zip(values.shape, steps))]
    part.copy_(values)
    return part


def expanded(values: Tensor, random: Random) -> Tensor:
    """Strides of zero."""
    axes = [axis for axis in range(values.dim()) if random.random() < 0.5]
    first = values[tuple(slice(0, 1) if i in axes else slice(None) for i in range(values.dim()))]
    return between_nan(first).expand(values.shape)


def overlapping(values: Tensor, random: Random) -> Tensor:
    """Rows that share memory, such as sliding windows."""
    strides = [random.choice((1, 2, 3, 5)) for _ in values.shape]
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides))
    base = between_nan(values.flatten().repeat(-(-span // values.numel()))[:span])
    return base.as_strided(values.shape, strides, base.storage_offset())


def misaligned(values: Tensor, random: Random) -> Tensor:
    """An address that no vector, and not even the number, is aligned to."""
    if values.device.type != "cpu":
        return between_nan(values)
    memory = bytearray(values.nbytes + 1)
    tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=1)
    return tensor.view(values.shape).copy_(values)


def flipped(values: Tensor, random: Random) -> Tensor:
    return between_nan(values).flip(random.randrange(values.dim()))


def odd_unit_strides(values: Tensor, random: Random) -> Tensor:
    """Axes of one, whose strides mean nothing."""
    base = between_nan(values)
    strides = [random.choice((0, 1, 12345)) if n == 1 else s
               for n, s in zip(values.shape, base.stride())]  # fmt: skip
    return base.as_strided(values.shape, strides, base.storage_offset())


def at_the_end(values: Tensor, random: Random) -> Tensor:
    """Directly before memory that must not be touched, rows apart or not."""
    return guarded(random.choice((permuted, sliced, expanded, flipped))(values, random))


def at_the_beginning(values: Tensor, random: Random) -> Tensor:
    """Directly behind memory that must not be touched."""
    return guarded(values.contiguous(), at_end=False)


LAYOUTS: list[Layout] = [
    permuted, heads_innermost, channels_last, sliced, expanded, overlapping, misaligned, flipped,
    odd_unit_strides, at_the_end, at_the_beginning,
]  # fmt: skip
# Where every number stays what it is.
DISTINCT: list[Layout] = [
    layout for layout in LAYOUTS if layout not in (expanded, overlapping, flipped, at_the_end)
]
