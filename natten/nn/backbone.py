"""Stages of blocks, and a hierarchical backbone of stages, over grids of any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten.nn.block import NeighborhoodTransformerBlock
from natten.nn.core import check_flags, left_out, warn_of_dropped
from natten.nn.embed import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from natten.nn.stream import StreamState
from natten.validation import bool_tuple, check_is_tensor, check_positive_int
from natten.varlen import GridLayout


class Axes(tuple[int, ...]):
    """A number for each axis, which is not to be taken for one for each level or block."""


def share_out(name: str, value: Any, count: int, unit: str, rank: int) -> tuple[Any, ...]:
    """A part of a window for each of `count` levels or blocks.

    `value` is one for all, or has an entry for each, or a number for each axis. A flat list of as
    many numbers as there are axes and levels or blocks alike means the latter for dilations, which
    are often listed so, and is refused for windows and strides.

    Raises:
        ValueError: none of them, or both.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, Axes)):
        return (value,) * count
    values = tuple(value)
    is_flat = not any(isinstance(v, Sequence) for v in values)
    for_axes = is_flat and len(values) == rank
    if len(values) == count:
        if for_axes and name != "dilation" and count > 1 and len(set(values)) > 1:
            raise ValueError(
                f"{name}={value} may be for {count} {unit} or for {rank} axes: write "
                f"{tuple((v,) * rank for v in values)} or {(values,) * count}"
            )
        return values
    if for_axes:
        return (Axes(values),) * count
    raise ValueError(
        f"{name} must be one value, have an entry for each of {count} {unit}, or one for each of "
        f"{rank} axes, got {value}"
    )


def depth_groups(coarse: bool = False) -> dict[str, Any]:
    """Patterns that order parameters by depth, as timm asks them of a `group_matcher`: by blocks,
    or by levels with `coarse`.
    """
    levels: Any = r"^levels\.(\d+)"
    if not coarse:
        levels = [
            (r"^levels\.(\d+)\.downsample", (0,)),
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^widen\.(\d+)", (99998,)),  # behind its level
            (r"^norm", (99999,)),
        ]
    return {"stem": r"^(?:patch_embed|registers)", "blocks": levels}


def without_decay(module: nn.Module) -> set[str]:
    """Names of parameters that weight decay is not for, though they have several axes."""
    last = ("rpb", "logit_scale", "registers")
    return {name for name, _ in module.named_parameters() if name.rpartition(".")[2] in last}


def is_list(x: Any) -> bool:
    """Whether x is images of different sizes, and not a tensor of them."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Tensor)


def pack_images(
    patch_embed: Callable[[Tensor], Tensor], images: Sequence[Tensor]
) -> tuple[Tensor, GridLayout]:
    """The packed tokens that a tokenizer makes of images of different sizes, `[C, *X]`."""
    for image in images:
        check_is_tensor("images", image)
    pixels = GridLayout([tuple(image.shape[1:]) for image in images])
    packed = pixels.pack([image.movedim(0, -1) for image in images])
    return pixels.resize(lambda run: patch_embed(run.movedim(-1, 1)), packed)


class NeighborhoodStage(nn.Module):
    """A downsampler, if any, and blocks of one resolution.

    Args:
        embed_dim: channels of the blocks.
        depth: number of blocks.
        num_heads: heads of every block.
        kernel_size, dilation, stride: of every block: one value for all, a sequence of `depth` of
            them, each an int, one int for each axis or a list of windows for groups of heads, or
            one int for each axis for all.
        drop_path: one probability for all blocks, or `depth` of them.
        downsample: module that runs first, `[B, *X, C']` to `[B, *X', embed_dim]`.
        rank: number of axes of the grid: 1, 2 or 3.
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
        kernel_size: int | Sequence[int | Sequence[int]] = 7,
        dilation: int | Sequence[int | Sequence[int]] = 1,
        *,
        stride: int | Sequence[int | Sequence[int]] = 1,
        drop_path: float | Sequence[float] = 0.0,
        downsample: nn.Module | None = None,
        rank: int = 2,
        **block_args: Any,
    ) -> None:
        super().__init__()
        check_positive_int("depth", depth)
        windows = [
            share_out(name, value, depth, "blocks", rank)
            for name, value in (
                ("kernel_size", kernel_size),
                ("stride", stride),
                ("dilation", dilation),
            )
        ]
        drop_paths = (drop_path,) * depth if isinstance(drop_path, (int, float)) else drop_path
        if len(drop_paths) != depth:
            raise ValueError(
                f"drop_path must be one value, or one for each of {depth} blocks, got {drop_path}"
            )
        self.embed_dim = embed_dim
        self.downsample: Any = downsample
        self.blocks = nn.ModuleList(
            NeighborhoodTransformerBlock(
                embed_dim, num_heads, *window, drop_path=p, rank=rank, **block_args
            )
            for *window, p in zip(*windows, drop_paths, strict=True)
        )
        self.grad_checkpointing = False

    # TorchScript infers the type of the result from the branch without registers.
    def forward(  # type: ignore[no-untyped-def]
        self,
        x: Tensor,
        cond: Tensor | None = None,
        registers: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
        layout: Any | None = None,
    ):
        """As `NeighborhoodTransformerBlock.forward`, after the downsampler. With a layout, it is
        returned too, behind everything else: a downsampler changes it.
        """
        if not torch.jit.is_scripting():
            x, registers = left_out(x, "registers", registers)
            x, layout = left_out(x, "layout", layout)
        if layout is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention of packed grids")
            else:
                if self.downsample is not None:
                    x, layout = layout.resize(self.downsample, x)
                result = self._through_blocks(x, cond, registers, context, context_lengths, layout)
                return (result, layout) if registers is None else (*result, layout)
        if self.downsample is not None:
            x = self.downsample(x)
        if torch.jit.is_scripting():
            if registers is not None:
                raise RuntimeError("TorchScript has no attention with registers")
            for block in self.blocks:
                x = block(x, cond, None, context, context_lengths)
            return x
        else:
            return self._through_blocks(x, cond, registers, context, context_lengths, None)

    def _through_blocks(
        self,
        x: Tensor,
        cond: Tensor | None,
        registers: Tensor | None,
        context: Tensor | None,
        context_lengths: Tensor | None,
        layout: GridLayout | None,
    ) -> Any:
        # Whoever put another block there need not know of layouts.
        more = () if layout is None else (None, layout)
        for block in self.blocks:
            arguments = (x, cond, registers, context, context_lengths, *more)
            if self.grad_checkpointing and self.training:
                result = checkpoint(block, *arguments, use_reentrant=False)
            else:
                result = block(*arguments)
            if registers is None:
                x = result
            else:
                x, registers = result
        return x if registers is None else (x, registers)

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        state: StreamState | None = None,
        cond: Tensor | None = None,
        registers: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> tuple[Any, StreamState]:
        """As `NeighborhoodTransformerBlock.stream`, after the downsampler, which must leave the
        first axis as it is.
        """
        if self.downsample is not None:
            frames = x.shape[1]
            if getattr(self.downsample, "strides", (1,))[0] != 1:
                raise ValueError(
                    "a stream needs a downsampler with stride 1 along the first axis, got "
                    f"{self.downsample}"
                )
            x = self.downsample(x)
            if x.shape[1] != frames:
                raise ValueError(
                    f"a stream needs a downsampler that keeps frames, got {x.shape[1]} of {frames}"
                )
        new = StreamState()
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            before = None if state is None else state.part(i)
            result, after = block.stream(x, before, cond, registers, context, context_lengths)
            x, registers = (result, None) if registers is None else result
            new.add(after)
        return (x if registers is None else (x, registers)), new


def stages(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    stride: Any,
    *,
    rank: int,
    drop_path: float,
    downsampler: Callable[[int], nn.Module],
    **block_args: Any,
) -> nn.Sequential:
    """Stages with twice the channels of the one before, `downsampler(channels)` between them.

    `kernel_size`, `dilation` and `stride` are one for all, an entry for each stage as
    `NeighborhoodStage` takes it, or a number for each axis. drop_path grows linearly to the last
    block.
    """
    if len(depths) != len(num_heads) or not depths:
        raise ValueError(
            f"depths and num_heads must have one value for every stage, got {depths} and "
            f"{num_heads}"
        )
    windows = [
        share_out(name, value, len(depths), "stages", rank)
        for name, value in (
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("stride", stride),
        )
    ]
    total = sum(depths)
    rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
    levels = []
    for i, (depth, heads, size, dilations, strides) in enumerate(
        zip(depths, num_heads, *windows, strict=True)
    ):
        first = sum(depths[:i])
        levels.append(
            NeighborhoodStage(
                embed_dim * 2**i,
                depth,
                heads,
                size,
                dilations,
                stride=strides,
                drop_path=rates[first : first + depth],
                downsample=downsampler(embed_dim * 2 ** (i - 1)) if i else None,
                rank=rank,
                **block_args,
            )
        )
    return nn.Sequential(*levels)


class NeighborhoodBackbone(nn.Module):
    """Hierarchical backbone: a tokenizer, then stages with half the resolution and twice the
    channels of the one before, and a norm for the output of each.

    With `rank=2` and the default tokenizer this is the shape of NAT
    (https://arxiv.org/abs/2204.07143) in detection and segmentation; `rank=3` gives video and
    volumes, `rank=1` sound.

    Args:
        in_channels: channels of the image.
        embed_dim: channels of the first stage.
        depths: blocks of every stage.
        num_heads: heads of every stage.
        kernel_size, dilation, stride: of all blocks: one int, an entry for every stage as
            `NeighborhoodStage` takes it, or one int for each axis.
        rank: number of axes of the grid: 1, 2 or 3.
        overlapping: overlapping convolutions (`ConvTokenizer`, `ConvDownsampler`) if True,
            patches (`PatchTokenizer`, `PatchMerging`) otherwise.
        patch_size: pixels of a token, an int or one for each axis; patches alone.
        downsample_strides: of the downsamplers, an int or one for each axis. Default 2.
        num_registers: learned register tokens. They take part in every stage, through a linear
            layer between stages.
        drop_path: probability of dropping a branch of the last block; it grows linearly from 0.
        is_circular: whether an axis is a ring (a panorama's columns), a bool or one for each axis:
            tokenizer, downsamplers and windows wrap around, and divide it.
        cond_dim: channels of a conditioning vector; None for none.
        norm_layer: of tokenizer, downsamplers, blocks and outputs.
        out_indices: stages whose outputs are wanted; None for all.
        frozen_stages: stages that do not train, from the first on, 0 for the tokenizer alone, -1
            for none. They stay in evaluation mode.
        channels_first: outputs are `[B, C, *X_i]` instead of `[B, *X_i, C]`.
        block_args: further arguments of `NeighborhoodTransformerBlock`.

    Shapes: `[B, in_channels, *X]` to one `[B, *X_i, embed_dim * 2**i]` for every stage i of
    out_indices, each after a norm of its own.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[Any] = 7,
        dilation: int | Sequence[Any] = 1,
        *,
        stride: int | Sequence[Any] = 1,
        rank: int = 2,
        overlapping: bool = True,
        patch_size: int | Sequence[int] = 4,
        downsample_strides: int | Sequence[int] = 2,
        num_registers: int = 0,
        drop_path: float = 0.0,
        is_circular: bool | Sequence[bool] = False,
        cond_dim: int | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        check_flags(overlapping=overlapping)
        if overlapping and patch_size != 4:
            raise ValueError(f"patch_size={patch_size} needs overlapping=False")
        if num_registers != 0:
            check_positive_int("num_registers", num_registers)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norms: dict[str, Any] = {"norm_layer": norm_layer, **place}
        rings = {"is_circular": bool_tuple("is_circular", is_circular, rank)}
        downsampler = ConvDownsampler if overlapping else PatchMerging
        levels = stages(
            embed_dim,
            depths,
            num_heads,
            kernel_size,
            dilation,
            stride,
            rank=rank,
            drop_path=drop_path,
            downsampler=lambda channels: downsampler(
                channels, rank=rank, strides=downsample_strides, **norms, **rings
            ),
            **rings,
            cond_dim=cond_dim,
            **norms,
            **block_args,
        )
        if overlapping:
            tokenizer: nn.Module = ConvTokenizer(
                in_channels, embed_dim, rank=rank, **norms, **rings
            )
        else:
            tokenizer = PatchTokenizer(
                in_channels, embed_dim, patch_size, rank=rank, **norms, **rings
            )
        self._set(tokenizer, levels, out_indices, frozen_stages, channels_first, **norms)
        if num_registers:
            self.registers = nn.Parameter(torch.empty(num_registers, embed_dim, **place))
            nn.init.trunc_normal_(self.registers, std=0.02)
            for i in range(len(depths) - 1):
                self.widen.append(nn.Linear(embed_dim * 2**i, embed_dim * 2 ** (i + 1), **place))

    @classmethod
    def of(
        cls,
        patch_embed: nn.Module,
        levels: nn.Sequential,
        *,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NeighborhoodBackbone:
        """A backbone of the tokenizer and the stages of another model; norms are new."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        norms: dict[str, Any] = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        self._set(patch_embed, levels, out_indices, frozen_stages, channels_first, **norms)
        return self

    def _set(
        self,
        patch_embed: nn.Module,
        levels: nn.Sequential,
        out_indices: Sequence[int] | None,
        frozen_stages: int,
        channels_first: bool,
        norm_layer: Callable[..., nn.Module],
        **place: Any,
    ) -> None:
        count = len(levels)
        indices = range(count) if out_indices is None else out_indices
        if not all(isinstance(i, int) and -count <= i < count for i in indices):
            raise ValueError(f"out_indices must be indices of {count} stages, got {out_indices}")
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= count:
            raise ValueError(f"frozen_stages must be from -1 to {count}, got {frozen_stages}")
        check_flags(channels_first=channels_first)
        self.patch_embed = patch_embed
        self.levels = levels
        self.out_indices = sorted({i % count for i in indices})
        self.frozen_stages = frozen_stages
        self.channels_first = channels_first
        widths = [level.embed_dim for level in levels]
        self.norms = nn.ModuleList(
            norm_layer(width, **place) if i in self.out_indices else nn.Identity()
            for i, width in enumerate(widths)
        )
        self.register_parameter("registers", None)
        self.widen = nn.ModuleList()
        for part in self._frozen():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, *self.levels[: self.frozen_stages]]

    def train(self, mode: bool = True) -> NeighborhoodBackbone:
        """As of every module, but for the stages that are frozen."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        optional = {"registers": "num_registers"}
        warn_of_dropped(self, optional, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for timm's layer decay; the outputs' norms as the last block."""
        return depth_groups(coarse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay is not for, beside those of one axis."""
        return without_decay(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing what is inside them."""
        for level in self.levels:
            if isinstance(level, NeighborhoodStage):
                level.grad_checkpointing = enable

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> list[Tensor]:
        """Feature maps of the stages of out_indices, from `x`, `[B, in_channels, *X]`.

        Args:
            x: the images; or a list of images `[in_channels, *X]` of different sizes, whose feature
                maps are lists then. Nothing is padded to a common size.
            cond: `[B, cond_dim]`, given if and only if the backbone has a `cond_dim`.
            context, context_lengths: as for `NeighborhoodTransformerBlock.forward`.
        """
        if torch.jit.is_scripting():
            if self.registers is not None:
                raise RuntimeError("TorchScript has no attention with registers")
            x = self.patch_embed(x)
            maps: list[Tensor] = []
            for i, (level, norm) in enumerate(zip(self.levels, self.norms)):
                x = level(x, cond, None, context, context_lengths)
                if i in self.out_indices:
                    maps.append(self._output(norm(x)))
            return maps
        else:
            if is_list(x):
                return self._forward_images(x, cond, context, context_lengths)
            return self.forward_features(x, cond, context, context_lengths)[0]

    def _forward_images(
        self,
        images: Sequence[Tensor],
        cond: Tensor | None,
        context: Tensor | None,
        context_lengths: Tensor | None,
    ) -> list[Any]:
        x, layout = pack_images(self.patch_embed, images)
        registers = None
        if self.registers is not None:
            registers = self.registers.expand(len(images), -1, -1)
        maps: list[Any] = []
        for i, (level, norm) in enumerate(zip(self.levels, self.norms, strict=True)):
            if registers is None:
                x, layout = level(x, cond, None, context, context_lengths, layout)
            else:
                registers = self.widen[i - 1](registers) if i else registers
                x, registers, layout = level(x, cond, registers, context, context_lengths, layout)
            if i in self.out_indices:
                each = layout.unpack(norm(x))
                maps.append([y.movedim(-1, 0) if self.channels_first else y for y in each])
        return maps

    def _output(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self.channels_first else x

    def forward_features(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The result of `forward`, and the registers after the last stage, `[B, R, C]`, or None."""
        x = self.patch_embed(x)
        registers = None
        if self.registers is not None:
            registers = self.registers.expand(x.shape[0], -1, -1)
        maps = []
        for i, (level, norm) in enumerate(zip(self.levels, self.norms, strict=True)):
            if registers is None:
                x = level(x, cond, None, context, context_lengths)
            else:
                registers = self.widen[i - 1](registers) if i else registers
                x, registers = level(x, cond, registers, context, context_lengths)
            if i in self.out_indices:
                maps.append(self._output(norm(x)))
        return maps, registers
