"""Tokenizers and downsamplers: from images (any number of axes) to token grids, and between levels.

Tokenizers take the channels-first layout of images, `[B, C, *X]`; everything after them is
channels-last, `[B, *X, C]`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natten._internals import is_exporting, scripted
from natten.validation import check_is_tensor, check_positive_int, optional_bool

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
        self.rank = rank
        steps = (in_channels, embed_dim // 2, embed_dim)
        self.proj = nn.Sequential(
            *(
                conv(
                    steps[i],
                    steps[i + 1],
                    3,
                    stride=strides[i],
                    padding=1,
                    device=device,
                    dtype=dtype,
                )
                for i in range(2)
            )
        )
        self.norm = _norm(norm_layer, embed_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        return self.norm(self.proj(x).movedim(1, -1))


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

    Shapes: `[B, in_channels, *X]` to `[B, *ceil(X / patch_size), embed_dim]`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        patch_size: int | tuple[int, ...] = 4,
        *,
        rank: int = 2,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        pad: bool = True,
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
        self.proj = conv(in_channels, embed_dim, size, stride=size, device=device, dtype=dtype)
        self.norm = _norm(norm_layer, embed_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        x = _pad_to_multiple(x, self.patch_size, 2, self.pad)
        return self.norm(self.proj(x).movedim(1, -1))


class ConvDownsampler(nn.Module):
    """Overlapping downsampler: a convolution of size 3 and stride 2 without bias, then a norm.

    Between the levels of NAT (https://arxiv.org/abs/2204.07143). Parameters: `reduction`, `norm`.

    Shapes: `[B, *X, embed_dim]` to `[B, *ceil(X / 2), out_dim]`; `out_dim` is `2 * embed_dim`
        unless given.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        rank: int = 2,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        out_dim = 2 * embed_dim if out_dim is None else out_dim
        self.rank = rank
        self.reduction = _convolution(rank)(
            embed_dim, out_dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype
        )
        self.norm = _norm(norm_layer, out_dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.rank)
        return self.norm(self.reduction(x.movedim(-1, 1)).movedim(1, -1))


class PatchMerging(nn.Module):
    """Concatenates the channels of every 2 x ... x 2 tokens, norms them, and projects them without
    bias.

    Between the levels of Swin Transformer (https://arxiv.org/abs/2103.14030) and DiNAT_s. Odd
    extents are zero-padded on the right. The parts are concatenated with the first axis varying
    fastest. Parameters: `norm`, `reduction`.

    Shapes: `[B, *X, embed_dim]` to `[B, *ceil(X / 2), out_dim]`; `out_dim` is `2 * embed_dim`
        unless given.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        rank: int = 2,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        check_positive_int("embed_dim", embed_dim)
        out_dim = 2 * embed_dim if out_dim is None else out_dim
        merged = embed_dim * 2**rank
        self.two = (2,) * rank
        # One tuple of first indices for every part, the first axis varying fastest.
        self.corners = [list(reversed(corner)) for corner in product((0, 1), repeat=rank)]
        self.norm = _norm(norm_layer, merged, device, dtype)
        self.reduction = nn.Linear(merged, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, len(self.two))
        x = _pad_to_multiple(x, self.two, 1, True)
        parts: list[Tensor] = []
        for corner in self.corners:
            part = x
            for axis, first in enumerate(corner):
                part = _every_second(part, axis + 1, first)
            parts.append(part)
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


def _check_image(x: Tensor, rank: int) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor("x", x)
    if x.dim() != rank + 2:
        raise ValueError(
            f"x must have {rank + 2} dimensions, batch, channels and {rank} spatial, got a tensor "
            f"of shape {list(x.shape)}"
        )


def _every_second(x: Tensor, dim: int, first: int) -> Tensor:
    # The extents are even here, so splitting an axis in pairs and taking one of each is a view.
    return x.unflatten(dim, (-1, 2)).select(dim + 1, first)


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
torch.fx.wrap("_pad_to_multiple")
