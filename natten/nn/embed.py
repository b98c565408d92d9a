"""Tokenizers and downsamplers: from images (any number of axes) to token grids, and between levels.

Tokenizers take the channels-first layout of images, `[B, C, *X]`; everything after them is
channels-last, `[B, *X, C]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natten._internals import is_exporting, scripted
from natten.nn.core import left_out
from natten.validation import (
    bool_tuple,
    check_is_tensor,
    check_positive_int,
    int_tuple,
    optional_bool,
)

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _convolution(rank: int) -> type[nn.Module]:
    if rank not in _CONVOLUTIONS:
        raise ValueError(f"rank must be 1, 2 or 3, got {rank}")
    return _CONVOLUTIONS[rank]


def _norm(
    norm_layer: Callable[..., nn.Module] | None,
    channels: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    if norm_layer is None:
        return nn.Identity()
    return norm_layer(channels, device=device, dtype=dtype)


class ConvTokenizer(nn.Module):
    """Overlapping tokenizer: two convolutions of size 3, by default of stride 2, then a norm.

    The tokenizer of NAT (https://arxiv.org/abs/2204.07143): one token for 4 pixels along every
    axis, no activation between the convolutions. Parameters: `proj.0`, `proj.1`, `norm`.

    Args:
        in_channels: channels of the image.
        embed_dim: channels of a token; even.
        rank: number of axes of the grid: 1, 2 or 3.
        strides: of the two convolutions; smaller ones leave small images more tokens.
        is_circular: whether an axis is a ring, a bool or one for each axis: convolutions wrap
            around there, instead of seeing zeros, and strides divide its pixels.
        norm_layer: called as `norm_layer(embed_dim, device=, dtype=)`; None for no norm.

    Shapes: `[B, in_channels, *X]` to `[B, *ceil(ceil(X / strides[0]) / strides[1]), embed_dim]`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        *,
        rank: int = 2,
        strides: tuple[int, int] = (2, 2),
        is_circular: bool | Sequence[bool] = False,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("embed_dim", embed_dim)
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even, got {embed_dim}")
        conv = _convolution(rank)
        strides = int_tuple("strides", strides, 2)  # of two convolutions, not of axes
        self.rank = rank
        self.is_circular = bool_tuple("is_circular", is_circular, rank)
        self.strides = strides
        steps = (in_channels, embed_dim // 2, embed_dim)
        self.proj = nn.Sequential(
            *(
                conv(
                    steps[i],
                    steps[i + 1],
                    3,
                    stride=strides[i],
                    padding=[0 if wraps else 1 for wraps in self.is_circular],
                    device=device,
                    dtype=dtype,
                )
                for i in range(2)
            )
        )
        self.norm = _norm(norm_layer, embed_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        if not any(self.is_circular):
            return self.norm(self.proj(x).movedim(1, -1))
        for i, conv in enumerate(self.proj):
            x = conv(wrapped(x, self.is_circular, [self.strides[i]] * self.rank))
        return self.norm(x.movedim(1, -1))


class PatchTokenizer(nn.Module):
    """Tokenizer of non-overlapping patches: one convolution whose stride is its size, then a norm.

    The tokenizer of Swin Transformer, DiNAT_s and ViT. Parameters: `proj`, `norm`. Extents that the
    patch does not divide are refused with `pad=False`, and zero-padded on the right otherwise.

    Args:
        in_channels: channels of the image.
        embed_dim: channels of a token.
        patch_size: an integer, or one for each axis.
        rank: number of axes of the grid: 1, 2 or 3.
        norm_layer: called as `norm_layer(embed_dim, device=, dtype=)`; None for no norm.
        pad: zero-pad extents to a multiple of the patch.
        is_circular: whether an axis is a ring, a bool or one for each axis: it is not padded.

    Shapes: `[B, in_channels, *X]` to `[B, *ceil(X / patch_size), embed_dim]`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        patch_size: int | Sequence[int] = 4,
        *,
        rank: int = 2,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        pad: bool = True,
        is_circular: bool | Sequence[bool] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = (patch_size,) * rank if isinstance(patch_size, int) else tuple(patch_size)
        if len(size) != rank or any(extent < 1 for extent in size):
            raise ValueError(
                f"patch_size must be one positive integer, or {rank} of them, got {patch_size}"
            )
        check_positive_int("in_channels", in_channels)
        check_positive_int("embed_dim", embed_dim)
        self.patch_size = size
        self.pad = optional_bool("pad", pad)
        conv = _convolution(rank)
        self.rank = rank
        self.is_circular = bool_tuple("is_circular", is_circular, rank)
        self.proj = conv(in_channels, embed_dim, size, stride=size, device=device, dtype=dtype)
        self.norm = _norm(norm_layer, embed_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        _check_rings(x, self.is_circular, self.patch_size, 2)
        x = _pad_to_multiple(x, self.patch_size, 2, self.pad)
        return self.norm(self.proj(x).movedim(1, -1))


class ConvDownsampler(nn.Module):
    """Overlapping downsampler: a convolution of size 3 and stride 2 without bias, then a norm.

    Between the levels of NAT (https://arxiv.org/abs/2204.07143). Parameters: `reduction`, `norm`.
    `strides` may be another int, or one for each axis; along axes of stride 1 the convolution has
    size 1. `is_circular` is as for `ConvTokenizer`.

    Shapes: `[B, *X, embed_dim]` to `[B, *ceil(X / strides), out_dim]`; `out_dim` is
    `2 * embed_dim` unless given.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        rank: int = 2,
        strides: int | Sequence[int] = 2,
        is_circular: bool | Sequence[bool] = False,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        out_dim = 2 * embed_dim if out_dim is None else out_dim
        self.rank = rank
        conv = _convolution(rank)
        self.strides = int_tuple("strides", strides, rank)
        self.is_circular = bool_tuple("is_circular", is_circular, rank)
        self.reduction = conv(
            embed_dim,
            out_dim,
            [1 if stride == 1 else 3 for stride in self.strides],
            stride=self.strides,
            padding=[
                0 if stride == 1 or wraps else 1
                for stride, wraps in zip(self.strides, self.is_circular, strict=True)
            ],
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.norm = _norm(norm_layer, out_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        x = x.movedim(-1, 1)
        if any(self.is_circular):
            x = wrapped(x, self.is_circular, self.strides, 1)
        return self.norm(self.reduction(x).movedim(1, -1))


class PatchMerging(nn.Module):
    """Concatenates the channels of every 2 x ... x 2 tokens, norms them, and projects them without
    bias.

    Between the levels of Swin Transformer (https://arxiv.org/abs/2103.14030) and DiNAT_s. Odd
    extents are zero-padded on the right. The parts are concatenated with the first axis varying
    fastest. Parameters: `norm`, `reduction`. `strides` may be another int than 2, or one for each
    axis, with 1 for axes that are left alone. An axis that `is_circular` is not padded.

    Shapes: `[B, *X, embed_dim]` to `[B, *ceil(X / strides), out_dim]`; `out_dim` is
    `2 * embed_dim` unless given.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        rank: int = 2,
        strides: int | Sequence[int] = 2,
        is_circular: bool | Sequence[bool] = False,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        check_positive_int("embed_dim", embed_dim)
        out_dim = 2 * embed_dim if out_dim is None else out_dim
        self.strides: tuple[int, ...] = int_tuple("strides", strides, rank)
        self.is_circular = bool_tuple("is_circular", is_circular, rank)
        merged = embed_dim * prod(self.strides)
        # One tuple of first indices for every part, the first axis varying fastest.
        self.corners = [
            list(reversed(corner)) for corner in product(*map(range, reversed(self.strides)))
        ]
        self.norm = _norm(norm_layer, merged, device, dtype)
        self.reduction = nn.Linear(merged, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, len(self.strides))
        _check_rings(x, self.is_circular, self.strides, 1)
        x = _pad_to_multiple(x, self.strides, 1, True)
        parts: list[Tensor] = []
        for corner in self.corners:
            part = x
            for axis, first in enumerate(corner):
                part = _every_nth(part, axis + 1, first, self.strides[axis])
            parts.append(part)
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class PatchExpanding(nn.Module):
    """The way back from `PatchMerging`: a norm, a projection without bias to the channels of
    several tokens, and each of them at its place.

    Between the levels of Swin-Unet (https://arxiv.org/abs/2105.05537). Parameters: `norm`,
    `expansion`, whose rows are in the order in which `PatchMerging` concatenates.

    Args:
        embed_dim: channels of a token; even unless out_dim is given.
        out_dim: channels of the new tokens; None for `embed_dim / 2`.
        rank: number of axes of the grid.
        strides: new tokens for one along every axis, an int or one for each axis.
        norm_layer: called as `norm_layer(embed_dim, device=, dtype=)`; None for no norm.

    Shapes: `[B, *X, embed_dim]` to `[B, *X * strides, out_dim]`, or to its first `extent` tokens
    along every axis.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        rank: int = 2,
        strides: int | Sequence[int] = 2,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        if out_dim is None and embed_dim % 2:
            raise ValueError(f"embed_dim must be even without out_dim, got {embed_dim}")
        out_dim = embed_dim // 2 if out_dim is None else out_dim
        self.rank = rank
        self.strides = int_tuple("strides", strides, rank)
        self.norm = _norm(norm_layer, embed_dim, device, dtype)
        self.expansion = nn.Linear(
            embed_dim, out_dim * prod(self.strides), bias=False, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, extent: list[int] | None = None) -> Tensor:
        """Expands.

        Args:
            x: `[B, *X, embed_dim]`.
            extent: what is left of the result, as of a skip connection whose extents `PatchMerging`
                padded; None for all.
        """
        if not torch.jit.is_scripting():
            x, extent = left_out(x, "extent", extent)
        _check_image(x, self.rank)
        x = self.expansion(self.norm(x))
        # From the last axis on, so that the axes in front stay where they are.
        for axis in range(self.rank, 0, -1):
            x = torch.unflatten(x, -1, (self.strides[axis - 1], -1)).movedim(-2, axis + 1)
            x = x.flatten(axis, axis + 1)
        if extent is not None:
            x = _cut(x, extent)
        return x


class ChannelsFirst(nn.Module):
    """A module of channels-last grids, `[B, *X, C]`, among ones of channels-first images.

    Shapes: `[B, C, *X]` to `[B, C', *X']`; further arguments are passed on.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x.movedim(1, -1), *args, **kwargs).movedim(-1, 1)


def _check_image(x: Tensor, rank: int) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor("x", x)
    if x.dim() != rank + 2:
        raise ValueError(
            f"x must have {rank + 2} dimensions, batch, channels and {rank} spatial, got a tensor "
            f"of shape {list(x.shape)}"
        )


def _check_rings(x: Tensor, is_circular: list[bool], multiple: list[int], first_dim: int) -> None:
    for axis in range(len(multiple)):
        extent = x.shape[first_dim + axis]
        if is_circular[axis] and extent % multiple[axis] != 0:
            raise ValueError(
                f"a circular axis is not padded, got extent {extent} of axis {axis}, which is no "
                f"multiple of {multiple[axis]}"
            )


def wrapped(
    x: Tensor, is_circular: list[bool], strides: list[int], without_reach: int = 0
) -> Tensor:
    """`[B, C, *X]` with the pixels that a convolution of size 3 reaches around each ring; along
    axes whose stride is `without_reach`, it reaches none.
    """
    _check_rings(x, is_circular, strides, 2)
    amounts: list[int] = []
    for axis in range(len(strides)):
        reach = 1 if is_circular[axis] and strides[axis] != without_reach else 0
        amounts = [reach, reach] + amounts
    return F.pad(x, amounts, mode="circular")


def _cut(x: Tensor, extent: list[int]) -> Tensor:
    for axis in range(len(extent)):
        if extent[axis] > x.shape[axis + 1]:
            raise ValueError(f"extent must be at most {list(x.shape[1:-1])}, got {extent}")
        x = x.narrow(axis + 1, 0, extent[axis])
    return x


def _every_nth(x: Tensor, dim: int, first: int, n: int) -> Tensor:
    # n divides the extents here, so splitting an axis and taking one of each part is a view.
    return x if n == 1 else torch.unflatten(x, dim, (-1, n)).select(dim + 1, first)


def _pad_to_multiple(x: Tensor, size: list[int], first_dim: int, pad: bool) -> Tensor:
    """Zero-pads the axes `first_dim`, `first_dim + 1`, ... on the right to a multiple of `size`."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows an "and")
        if torch.jit.is_tracing():
            return scripted(_padded_to_multiple)(x, list(size), first_dim, pad)
    return _padded_to_multiple(x, size, first_dim, pad)


def _padded_to_multiple(x: Tensor, size: list[int], first_dim: int, pad: bool) -> Tensor:
    amounts: list[int] = []
    for i in range(len(size)):
        extent = x.shape[first_dim + i]
        missing = (size[i] - extent % size[i]) % size[i]
        if not pad and missing > 0:
            raise ValueError(
                f"extent {extent} of axis {i} is not a multiple of the patch size {size[i]}; "
                "pass pad=True to zero-pad it"
            )
        amounts = [0, missing] + amounts
    behind = x.dim() - first_dim - len(size)
    amounts = [0, 0] * behind + amounts
    if not torch.jit.is_scripting():  # noqa: SIM102
        # An exported program is one for all sizes.
        if pad and is_exporting():
            return F.pad(x, amounts)
    return x if sum(amounts) == 0 else F.pad(x, amounts)


# Control flow on shapes cannot be traced symbolically; in an fx graph each is one call.
torch.fx.wrap("_check_image")
torch.fx.wrap("_check_rings")
torch.fx.wrap("wrapped")
torch.fx.wrap("_cut")
torch.fx.wrap("_pad_to_multiple")
