"""The NAT, DiNAT, DiNAT_s and isotropic classifiers as first published, written out plainly.

An oracle for `natten.models`: the published module names (so that the published checkpoints' layout
is this file's `state_dict`), attention through explicit lists of attended tokens, no import of
`natten`. Slow and memory-hungry on purpose: nothing here is clever.

Papers: https://arxiv.org/abs/2204.07143 (NAT), https://arxiv.org/abs/2209.15001 (DiNAT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attended(length: int, kernel_size: int, dilation: int) -> Tensor:
    """Tokens that each token of an axis attends to: int64 [length, kernel_size].

    A token sees the `kernel_size` tokens of its dilation group around it; the window is moved, not
    cut, where it would leave the axis.
    """
    rows = []
    for index in range(length):
        group = list(range(index % dilation, length, dilation))
        first = group.index(index) - kernel_size // 2
        first = min(max(first, 0), len(group) - kernel_size)
        rows.append(group[first : first + kernel_size])
    return torch.tensor(rows)


class OriginalAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1) * 0.5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        least = self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
        batch, rows, columns, dim = x.shape
        qkv = self.qkv(x).reshape(batch, rows, columns, 3, self.heads, dim // self.heads)
        query, key, value = qkv.unbind(3)  # [B, H, W, heads, head_dim]
        y = attended(rows, self.kernel_size, self.dilation)
        x_ = attended(columns, self.kernel_size, self.dilation)
        tokens = (y[:, None, :, None] * columns + x_[None, :, None, :]).flatten(2)  # [H, W, k*k]
        key = key.flatten(1, 2)[:, tokens]  # [B, H, W, k*k, heads, head_dim]
        value = value.flatten(1, 2)[:, tokens]
        scores = torch.einsum("bhwnd,bhwknd->bhwnk", query * query.shape[-1] ** -0.5, key)
        dy = (y - torch.arange(rows)[:, None]) // self.dilation + self.kernel_size - 1
        dx = (x_ - torch.arange(columns)[:, None]) // self.dilation + self.kernel_size - 1
        bias = self.rpb[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3)
        weights = (scores + bias.permute(1, 2, 0, 3)).softmax(-1)
        out = torch.einsum("bhwnk,bhwknd->bhwnd", weights, value).flatten(3)
        return self.proj(out[:, :height, :width])


class OriginalGlobalAttention(nn.Module):
    """Dense attention with a relative position bias, over a square grid of one size."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.randn(heads, 2 * size - 1, 2 * size - 1) * 0.5)
        self.proj = nn.Linear(dim, dim)
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = y[None] - y[:, None] + size - 1, x[None] - x[:, None] + size - 1
        self.register_buffer("relative_position_index", dy * (2 * size - 1) + dx)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(1, 2)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        scores = scores + self.rpb.flatten(1)[:, self.relative_position_index]
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(shape))


class OriginalMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class OriginalBlock(nn.Module):
    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-5), attention
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-5), OriginalMlp(dim, int(dim * mlp_ratio))
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(())
        x = x + getattr(self, "gamma1", one) * self.attn(self.norm1(x))
        return x + getattr(self, "gamma2", one) * self.mlp(self.norm2(x))


class OriginalConvTokenizer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OriginalPatchTokenizer(nn.Module):
    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OriginalConvDownsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class OriginalPatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class OriginalLevel(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class OriginalNAT(nn.Module):
    """NAT and DiNAT (`merging=False`), DiNAT_s (`merging=True`, levels under the name `layers`)."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        kernel_size: int,
        dilations: Sequence[Sequence[int]],
        mlp_ratio: float,
        layer_scale: float | None = None,
        num_classes: int = 1000,
        merging: bool = False,
    ) -> None:
        super().__init__()
        self.merging = merging
        self.patch_embed = (
            OriginalPatchTokenizer(embed_dim, 4) if merging else OriginalConvTokenizer(embed_dim)
        )
        levels = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim = embed_dim * 2**i
            blocks = [
                OriginalBlock(
                    dim,
                    OriginalAttention(dim, heads, kernel_size, dilations[i][j]),
                    mlp_ratio,
                    layer_scale,
                )
                for j in range(depth)
            ]
            downsampler = OriginalPatchMerging if merging else OriginalConvDownsampler
            levels.append(OriginalLevel(blocks, downsampler(dim) if i < len(depths) - 1 else None))
        setattr(self, "layers" if merging else "levels", nn.ModuleList(levels))
        dim = embed_dim * 2 ** (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for level in self.layers if self.merging else self.levels:
            x = level(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))


class OriginalBackbone(OriginalNAT):
    """NAT, DiNAT and DiNAT_s in detectors and segmenters: a norm for each level's output."""

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.norm, self.head
        self.out_indices = out_indices
        for i in out_indices:
            dim = arguments["embed_dim"] * 2**i
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=1e-5))

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.merging:
            x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.patch_embed(x)
        maps = []
        for i, level in enumerate(self.layers if self.merging else self.levels):
            for block in level.blocks:
                x = block(x)
            if i in self.out_indices:
                maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return maps


class OriginalIsotropic(nn.Module):
    """One level over patches of 16: neighborhood attention, or dense with `size` given (vitrpb)."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        kernel_size: int = 7,
        dilations: Sequence[int] = (),
        size: int | None = None,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = OriginalPatchTokenizer(embed_dim, 16)
        self.layers = nn.ModuleList(
            OriginalBlock(
                embed_dim,
                OriginalAttention(embed_dim, num_heads, kernel_size, dilations[j])
                if size is None
                else OriginalGlobalAttention(embed_dim, num_heads, size),
                4.0,
                None,
            )
            for j in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(embed_dim, eps=1e-5), nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))
