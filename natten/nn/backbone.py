"""Stages of blocks, and a hierarchical backbone of stages, over grids of any rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten.nn.block import NeighborhoodTransformerBlock
from natten.nn.core import check_flags, left_out, warn_of_dropped
from natten.nn.embed import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from natten.validation import check_positive_int


class NeighborhoodStage(nn.Module):
    """A downsampler, if any, and blocks of one resolution.

    Args:
        embed_dim: channels of the blocks.
        depth: number of blocks.
        num_heads: heads of every block.
        kernel_size: window size of every block.
        dilation: dilation of every block: one value for all, or a sequence of `depth` of them,
            each an int or one int for each axis.
        drop_path: one probability for all blocks, or `depth` of them.
        downsample: module that runs first, `[B, *X, C']` to `[B, *X', embed_dim]`.
        block_args: further arguments of `NeighborhoodTransformerBlock`.

    Attributes:
        grad_checkpointing: recompute the blocks in the backward pass instead of storing what is
            inside them. Default False.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int | Sequence[int]] = 1,
        *,
        drop_path: float | Sequence[float] = 0.0,
        downsample: nn.Module | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        check_positive_int("depth", depth)
        dilations = _for_each_block(dilation, depth, "dilation")
        drop_paths = _for_each_block(drop_path, depth, "drop_path")
        self.downsample = downsample
        self.blocks = nn.ModuleList(
            NeighborhoodTransformerBlock(
                embed_dim, num_heads, kernel_size, dilation=d, drop_path=p, **block_args
            )
            for d, p in zip(dilations, drop_paths, strict=True)
        )
        self.grad_checkpointing = False

    # TorchScript infers the type of the result from the branch without registers.
    def forward(  # type: ignore[no-untyped-def]
        self, x: Tensor, cond: Tensor | None = None, registers: Tensor | None = None
    ):
        """As `NeighborhoodTransformerBlock.forward`, after the downsampler."""
        if not torch.jit.is_scripting():
            x, registers = left_out(x, "registers", registers)
        if self.downsample is not None:
            x = self.downsample(x)
        if torch.jit.is_scripting():
            if registers is not None:
                raise RuntimeError("TorchScript has no attention with registers")
            for block in self.blocks:
                x = block(x, cond)
            return x
        else:
            for block in self.blocks:
                if self.grad_checkpointing and self.training:
                    result = checkpoint(block, x, cond, registers, use_reentrant=False)
                else:
                    result = block(x, cond, registers)
                if registers is None:
                    x = result
                else:
                    x, registers = result
            return x if registers is None else (x, registers)


class NeighborhoodBackbone(nn.Module):
    """Hierarchical backbone: a tokenizer, then stages with half the resolution and twice the
    channels of the one before.

    With `rank=2` and the default tokenizer this is the shape of NAT
    (https://arxiv.org/abs/2204.07143); `rank=3` gives video and volumes, `rank=1` sound.

    Args:
        in_channels: channels of the image.
        embed_dim: channels of the first stage.
        depths: blocks of every stage.
        num_heads: heads of every stage.
        kernel_size: window size of all blocks.
        dilation: one int for all blocks, or an entry for every stage as `NeighborhoodStage` takes
            it.
        rank: number of axes of the grid: 1, 2 or 3.
        overlapping: overlapping convolutions (`ConvTokenizer`, `ConvDownsampler`) if True,
            patches (`PatchTokenizer` of 4, `PatchMerging`) otherwise.
        num_registers: learned register tokens. They take part in every stage, through a linear
            layer between stages.
        drop_path: probability of dropping a branch of the last block; it grows linearly from 0.
        cond_dim: channels of a conditioning vector; None for none.
        block_args: further arguments of `NeighborhoodTransformerBlock`.

    Shapes: `[B, in_channels, *X]` to one `[B, *X_i, embed_dim * 2**i]` for every stage i, each
    after a norm of its own.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[Any] = 1,
        *,
        rank: int = 2,
        overlapping: bool = True,
        num_registers: int = 0,
        drop_path: float = 0.0,
        cond_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(
                f"depths and num_heads must have one value for every stage, got {depths} and "
                f"{num_heads}"
            )
        levels = len(depths)
        dilations = (dilation,) * levels if isinstance(dilation, int) else tuple(dilation)
        if len(dilations) != levels:
            raise ValueError(
                f"dilation must be an int or have an entry for each of {levels} stages, got "
                f"{dilation}"
            )
        check_flags(overlapping=overlapping)
        if num_registers != 0:
            check_positive_int("num_registers", num_registers)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [embed_dim * 2**i for i in range(levels)]
        total = sum(depths)
        rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
        tokenizer = ConvTokenizer if overlapping else PatchTokenizer
        downsampler = ConvDownsampler if overlapping else PatchMerging
        self.patch_embed = tokenizer(in_channels, embed_dim, rank=rank, **factory)
        self.levels = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            stage = NeighborhoodStage(
                widths[i],
                depth,
                num_heads[i],
                kernel_size,
                dilations[i],
                drop_path=rates[first : first + depth],
                downsample=downsampler(widths[i - 1], rank=rank, **factory) if i else None,
                rank=rank,
                cond_dim=cond_dim,
                **factory,
                **block_args,
            )
            self.levels.append(stage)
        self.norms = nn.ModuleList(nn.LayerNorm(width, **factory) for width in widths)
        self.register_parameter("registers", None)
        self.widen = nn.ModuleList()
        if num_registers:
            self.registers = nn.Parameter(torch.empty(num_registers, embed_dim, **factory))
            nn.init.trunc_normal_(self.registers, std=0.02)
            for i in range(levels - 1):
                self.widen.append(nn.Linear(widths[i], widths[i + 1], **factory))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        optional = {"registers": "num_registers"}
        warn_of_dropped(self, optional, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing what is inside them."""
        for level in self.levels:
            if isinstance(level, NeighborhoodStage):
                level.grad_checkpointing = enable

    def forward(self, x: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """Feature maps of all stages, channels-last, from `x`, `[B, in_channels, *X]`.

        Args:
            x: the image.
            cond: `[B, cond_dim]`, given if and only if the backbone has a `cond_dim`.
        """
        if torch.jit.is_scripting():
            if self.registers is not None:
                raise RuntimeError("TorchScript has no attention with registers")
            x = self.patch_embed(x)
            maps: list[Tensor] = []
            for level, norm in zip(self.levels, self.norms):
                x = level(x, cond)
                maps.append(norm(x))
            return maps
        else:
            return self.forward_features(x, cond)[0]

    def forward_features(
        self, x: Tensor, cond: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The result of `forward`, and the registers after the last stage, `[B, R, C]`, or None."""
        x = self.patch_embed(x)
        registers = None
        if self.registers is not None:
            registers = self.registers.expand(x.shape[0], -1, -1)
        maps = []
        for i, (level, norm) in enumerate(zip(self.levels, self.norms, strict=True)):
            if registers is None:
                x = level(x, cond)
            else:
                registers = self.widen[i - 1](registers) if i else registers
                x, registers = level(x, cond, registers)
            maps.append(norm(x))
        return maps, registers


def _for_each_block(value: Any, depth: int, name: str) -> tuple[Any, ...]:
    values = (value,) * depth if isinstance(value, (int, float)) else tuple(value)
    if len(values) != depth:
        raise ValueError(
            f"{name} must be one value, or one for each of {depth} blocks, got {value}"
        )
    return values
