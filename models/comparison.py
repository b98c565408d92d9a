"""The same model with another attention: dense, or in shifted windows. For comparisons at one
budget.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .nat import NAT

ATTENTIONS = ("neighborhood", "dense", "shifted-window")


class WindowAttention2D(nn.Module):
    """Attention within the windows of a partition, which may be shifted, with a relative position
    bias.

    Swin Transformer (https://arxiv.org/abs/2103.14030). One window as large as the grid is dense
    attention.

    Args:
        dim, num_heads: channels and heads.
        grid: rows and columns, multiples of the window.
        window: tokens of a window along each axis.
        shift: how far the partition is moved, cyclically; tokens that the move brings together do
            not see each other.

    Shapes: `[B, *grid, dim]` to the same. Parameters as those of `NeighborhoodAttention2D`.
    """

    mask: Tensor | None

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, int], window: int, shift: int = 0
    ) -> None:
        super().__init__()
        if any(extent % window for extent in grid):
            raise ValueError(f"grid must be a multiple of the window {window}, got {grid}.")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1))
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.rpb, std=0.02)
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        axis = torch.arange(window)
        relative = axis[None, :] - axis[:, None] + window - 1  # [query, key]
        rows = relative[:, None, :, None] * (2 * window - 1)
        index = (rows + relative[None, :, None, :]).reshape(window**2, window**2)
        self.register_buffer("index", index, persistent=False)
        mask = self._mask(grid) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def _mask(self, grid: tuple[int, int]) -> Tensor:
        """[windows, tokens, tokens]: 0 where two tokens were in one window region before the cyclic
        shift, else -inf.
        """
        region = torch.zeros(1, *grid, 1)
        for axis, extent in enumerate(grid):
            position = torch.arange(extent)
            label = (position >= extent - self.window).long() + (position >= extent - self.shift)
            region = region * 3 + label.view(1, *(-1 if i == axis else 1 for i in (0, 1)), 1)
        windows = self._partition(region).squeeze(-1)
        same = windows[:, :, None] == windows[:, None, :]
        return torch.zeros(same.shape).masked_fill(~same, -torch.inf)

    def _partition(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B * windows, tokens, C]."""
        w = self.window
        x = torch.unflatten(torch.unflatten(x, 2, (-1, w)), 1, (-1, w))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        w = self.window
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = torch.unflatten(self.qkv(self._partition(x)), -1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B * windows, heads, tokens, D]
        bias = self.rpb.flatten(1)[:, self.index].to(query.dtype)[None]
        if self.mask is not None:
            bias = bias + self.mask.to(query.dtype)[:, None]
            bias = bias.repeat(batch, 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = self.proj(out.transpose(1, 2).flatten(2))
        out = out.view(batch, height // w, width // w, w, w, -1).transpose(2, 3)
        out = out.reshape(batch, height, width, -1)
        return out.roll((self.shift, self.shift), (1, 2)) if self.shift else out


def replace_attention(model: Any, attention: str, input_size: tuple[int, int]) -> Any:
    """Replaces the attention of every block of `model`, in place, for images of `input_size`.

    Args:
        model: a NAT or DiNAT.
        attention: "neighborhood" leaves the model as it is; "dense" attends to the whole grid;
            "shifted-window" to windows of the block's kernel size, shifted by half of it in every
            second block.
        input_size: rows and columns of the images.

    Raises:
        ValueError: another attention or model, or windows that do not divide the grid.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}.")
    if attention == "neighborhood":
        return model
    if not isinstance(model, NAT):
        raise ValueError(f"attention of a NAT or DiNAT is replaced, got {type(model).__name__}")
    for level, info in zip(model.levels, model.feature_info):
        height, width = (extent // info["reduction"] for extent in input_size)
        for i, block in enumerate(level.blocks):
            old = block.attn
            window, shift = max(height, width), 0
            if attention == "shifted-window":
                window = old.kernel_size[0]
                shift = window // 2 if i % 2 and window < max(height, width) else 0
            block.attn = WindowAttention2D(
                old.embed_dim, old.num_heads, (height, width), window, shift
            )
            # As strong in the beginning.
            for name in ("qkv", "proj"):
                getattr(block.attn, name).load_state_dict(getattr(old, name).state_dict())
    return model
