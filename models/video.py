"""Video models of 3-D neighborhood attention: a hierarchical classifier, an isotropic denoiser.

Clips are `[B, C, T, H, W]`. Both models can be causal in time: a frame then attends to itself and
to frames before it, so that frames may arrive one by one. `VideoNAT.stream` takes them as they come
and gives what the full clip would.

Neighborhood attention: https://arxiv.org/abs/2204.07143, in the layout of Swin Transformer (https://arxiv.org/abs/2103.14030).
Adaptive norms: DiT, https://arxiv.org/abs/2212.09748.
"""

# No postponed annotations here: torch.fx writes those of `forward` into the code that it generates,
# as types.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natten.functional import neighborhood_attention_generic
from natten.nn import (
    NeighborhoodAttention3D,
    NeighborhoodTransformerBlock,
    PatchMerging,
    PatchTokenizer,
)
from natten.nn.core import crop, fit_window, refuse_sharded

from ._base import Hierarchy, LayerNorm, NATLevel, cfg, init_weights
from ._checkpoint import build_model

__all__ = ["StreamOutput", "StreamState", "VideoDenoiser", "VideoNAT"]

register_notrace_module(NeighborhoodAttention3D)


@register_notrace_function
def as_clip(x: Tensor) -> Tensor:
    """An image `[B, C, H, W]` is a clip of one frame."""
    if x.dim() == 4:
        return x.unsqueeze(2)
    if x.dim() != 5:
        raise ValueError(
            f"x must be a clip [B, C, T, H, W] or images [B, C, H, W], got shape {x.shape}."
        )
    return x


@register_notrace_function
def as_input(features: Tensor, x: Tensor) -> Tensor:
    """Features `[B, T, H, W, C]` without their time axis where the input `x` was of images."""
    return features.squeeze(1) if x.dim() == 4 else features


class FrameDownsampler(nn.Module):
    """Patch merging within frames: `[B, T, H, W, C]` to `[B, T, ceil(H / 2), ceil(W / 2), 2C]`."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.merging = PatchMerging(dim, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[0], x.shape[1]
        return self.merging(x.flatten(0, 1)).unflatten(0, (batch, frames))


class VideoHead(nn.Module):
    """Mean over time and space ("avg", or "" for none), dropout, classifier."""

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, drop_rate: float, **place: Any
    ) -> None:
        super().__init__()
        if pool_type not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {pool_type!r}.")
        self.pool_type = pool_type
        # Set by natten.distributed, where tokens are sharded over ranks.
        self.plan: Any = None
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes, **place) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "avg":
            x = x.flatten(1, -2).mean(1) if self.plan is None else self.plan.mean(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


@dataclass
class StreamState:
    """What a causal model remembers of the frames so far: its size does not grow with them.

    keys, values: of every block, `[B, T, H, W, heads, head_dim]` of the last frames that its
        window can reach.
    frames: frames seen.
    feature_sum: sum over them of the pooled features, `[B, C]`.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    frames: int = 0
    feature_sum: Tensor | None = None


class StreamOutput(NamedTuple):
    """What a stream returns for new frames.

    features: `[B, t, H', W', C]` of the new frames.
    logits: `[B, num_classes]` of all frames so far.
    state: for the next call.
    """

    features: Tensor
    logits: Tensor
    state: StreamState


class VideoNAT(Hierarchy):
    """Hierarchical video classifier of 3-D neighborhood attention.

    Time keeps its length through all levels, space is halved between them. Positions enter through
    rotary embeddings of queries and keys, which hold for any length of the clip.

    Args:
        in_chans: channels of a frame.
        num_classes: classes; 0 for pooled features.
        global_pool: "avg" or "".
        patch_size: pixels of a token: frames, rows, columns. Streams need 1 frame.
        embed_dim: channels of the first level; they double at every level.
        depths, num_heads: blocks and heads of every level.
        kernel_size: window: frames, rows, columns.
        time_dilations: dilation in time of every block, repeated over the blocks of a level.
        is_causal: whether a frame attends to no later one.
        mlp_ratio, qkv_bias, drop_rate, proj_drop_rate, drop_path_rate, norm_layer, act_layer: as
            for `NAT`.

    Shapes: clips `[B, in_chans, T, H, W]` to logits `[B, num_classes]`; features are `[B, T', H',
    W', C]`. Images `[B, in_chans, H, W]` are clips of one frame, and their features have no time
    axis, so that timm's tools apply.

    Raises:
        ValueError: for lists of different lengths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: tuple[int, int, int] = (1, 4, 4),
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: tuple[int, int, int] = (4, 7, 7),
        time_dilations: Sequence[int] = (1, 2),
        is_causal: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads needs one entry for each of the {len(depths)} levels of depths, "
                f"got {len(num_heads)}."
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = norm_layer or LayerNorm
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.is_causal = is_causal
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)

        self.patch_embed = PatchTokenizer(
            in_chans, embed_dim, patch_size, rank=3, norm_layer=norm_layer, **place
        )
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        levels = []
        self.feature_info = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            downsample = nn.Identity()
            if i > 0:
                downsample = FrameDownsampler(dim // 2, norm_layer=norm_layer, **place)
            blocks = [
                NeighborhoodTransformerBlock(
                    dim,
                    num_heads[i],
                    kernel_size,
                    dilation=(time_dilations[j % len(time_dilations)], 1, 1),
                    is_causal=(is_causal, False, False),
                    rank=3,
                    mlp_ratio=mlp_ratio,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    drop=proj_drop_rate,
                    drop_path=drop_paths[i][j],
                    qkv_bias=qkv_bias,
                    rotary=True,
                    pad=True,
                    **place,
                )
                for j in range(depth)
            ]
            levels.append(NATLevel(downsample, blocks))
            self.feature_info.append(
                dict(num_chs=dim, reduction=patch_size[-1] * 2**i, module=f"levels.{i}")
            )
        self.levels = nn.Sequential(*levels)
        self.norm = norm_layer(self.num_features, **place)
        self.head = VideoHead(self.num_features, num_classes, global_pool, drop_rate, **place)
        self.apply(init_weights)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: removes it), and the pooling unless None."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        parameter = next(self.parameters(), torch.empty(0))
        self.head = VideoHead(
            self.num_features,
            num_classes,
            self.global_pool,
            self.drop_rate,
            device=parameter.device,
            dtype=parameter.dtype,
        ).train(self.training)
        self.head_hidden_size = self.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the model and returns the levels' outputs too; arguments as for `NAT`.

        Of clips they are `[B, C, T, H', W']` ("NCHW") or `[B, T, H', W', C]` ("NHWC"), of images
        without T.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take, last = feature_take_indices(len(self.levels), indices)
        levels = self.levels[: last + 1] if stop_early else self.levels
        final = len(self.levels) - 1
        y = self.patch_embed(as_clip(x))
        intermediates = []
        for i, level in enumerate(levels):
            y = level(y)
            if i in take:
                taken = as_input(self.norm(y) if norm and i == final else y, x)
                intermediates.append(taken.movedim(-1, 1) if output_fmt == "NCHW" else taken)
        if intermediates_only:
            return intermediates
        if len(levels) == final + 1:
            y = self.norm(y)
        return as_input(y, x), intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        return as_input(self.norm(self.levels(self.patch_embed(as_clip(x)))), x)

    def forward(self, x: Tensor) -> Tensor:
        # Here and not inherited: torch.fx leaves alone the functions of the file of `forward`.
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    @torch.no_grad()
    def stream(self, frames: Tensor, state: StreamState | None = None) -> StreamOutput:
        """Takes the next frames of a clip, one or several.

        The features equal those that `forward_features` of the clip so far gives for these frames,
        and the logits those of `forward`. The work does not depend on how many frames came before.

        Args:
            frames: `[B, in_chans, t, H, W]`, or one frame `[B, in_chans, H, W]`.
            state: what the call with the frames before returned; None at the start of a clip. It is
                not changed.

        Raises:
            ValueError: if the model is not causal in time, or merges frames into one token.
        """
        if not self.is_causal or self.patch_embed.patch_size[0] != 1:
            raise ValueError(
                "streams need a model with is_causal=True and patches of 1 frame, got "
                f"is_causal={self.is_causal} and patch_size={self.patch_embed.patch_size}."
            )
        refuse_sharded(self.head.plan, "stream")
        state = state or StreamState()
        new = StreamState(frames=state.frames)
        x = self.patch_embed(as_clip(frames))
        block_index = 0
        for level in self.levels:
            x = level.downsample(x)
            for block in level.blocks:
                cached = None
                if state.keys:
                    cached = state.keys[block_index], state.values[block_index]
                branch, (key, value) = _stream_attention(
                    block.attn, block.norm1(x), state.frames, cached
                )
                x = x + branch
                x = x + block.mlp(block.norm2(x))
                new.keys.append(key)
                new.values.append(value)
                block_index += 1
        features = self.norm(x)
        pooled = features.mean((2, 3)).sum(1)
        new.frames += features.shape[1]
        new.feature_sum = pooled if state.feature_sum is None else state.feature_sum + pooled
        logits = self.head.fc(new.feature_sum / new.frames)
        return StreamOutput(features, logits, new)


def _stream_attention(
    attn: NeighborhoodAttention3D,
    x: Tensor,
    first_frame: int,
    cached: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of new frames to themselves and to cached keys and values; also the new cache."""
    extent = x.shape[1:-1]
    time_window, time_dilation = attn.kernel_size[0], attn.dilation[0]
    # Time needs no padding here: the frames of the window that do not exist are before the clip.
    x = fit_window(x, [1, *attn.kernel_size[1:]], [1, *attn.dilation[1:]], attn.pad)
    query, key, value = attn._project(x, [float(first_frame), 0.0, 0.0], True)
    if cached is not None:
        key = torch.cat([cached[0], key], dim=1)
        value = torch.cat([cached[1], value], dim=1)
    frames = first_frame + extent[0]
    key_origin = frames - key.shape[1]
    # A causal window depends on no later frame, so the grid may end with this one, or where the
    # window first fits.
    grid = (max(frames, time_window * time_dilation), *query.shape[2:4])
    out = neighborhood_attention_generic(
        query,
        key,
        value,
        attn.kernel_size,
        dilation=attn.dilation,
        is_causal=attn.is_causal,
        scale=attn.scale,
        grid=grid,
        query_origin=(first_frame, 0, 0),
        key_origin=(key_origin, 0, 0),
    )
    keep = min((time_window - 1) * time_dilation, key.shape[1])
    # Copies: a view would keep every frame's keys alive.
    cache = key[:, key.shape[1] - keep :].clone(), value[:, value.shape[1] - keep :].clone()
    return attn._output(crop(out, extent)), cache


class TimestepEmbedding(nn.Module):
    """Sinusoids of a scalar (a diffusion time or noise level), then an MLP: `[B]` to `[B, dim]`."""

    def __init__(self, dim: int, frequencies: int = 128, **place: Any) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, dim, **place), nn.SiLU(), nn.Linear(dim, dim, **place)
        )

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        rate = torch.exp(exponent * (-math.log(10000.0) / self.frequencies))
        angle = t.float()[:, None] * rate
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class VideoDenoiser(nn.Module):
    """Isotropic denoiser of blocks of 3-D neighborhood attention with adaptive norms.

    Every block's norms are shifted and scaled, and its branches gated, by a vector of the timestep
    and an optional condition (adaLN-Zero). Gates and the last layer begin at zero: a fresh model
    returns zeros.

    Args:
        in_chans, out_chans: channels in and out; out_chans None for in_chans.
        patch_size: pixels of a token: frames, rows, columns.
        embed_dim, depth, num_heads: width, blocks, heads.
        kernel_size: window: frames, rows, columns.
        dilations: (frames, rows, columns) of the blocks, repeated over them; None for no dilation.
        is_causal: whether a frame depends on no later one.
        cond_dim: channels of the condition; None for none.
        mlp_ratio: hidden width of the MLPs.

    Shapes: `[B, in_chans, T, H, W]` to `[B, out_chans, T, H, W]`, multiples of the patch.
    """

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        embed_dim: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        kernel_size: tuple[int, int, int] = (3, 7, 7),
        dilations: Sequence[tuple[int, int, int]] | None = None,
        is_causal: bool = False,
        cond_dim: int | None = None,
        mlp_ratio: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = tuple(patch_size)
        self.out_chans = in_chans if out_chans is None else out_chans
        self.patch_embed = PatchTokenizer(
            in_chans, embed_dim, patch_size, rank=3, norm_layer=None, pad=False, **place
        )
        self.time_embed = TimestepEmbedding(embed_dim, **place)
        self.cond_embed = None if cond_dim is None else nn.Linear(cond_dim, embed_dim, **place)
        dilations = dilations or [(1, 1, 1)]
        self.blocks = nn.ModuleList(
            NeighborhoodTransformerBlock(
                embed_dim,
                num_heads,
                kernel_size,
                dilation=dilations[j % len(dilations)],
                is_causal=(is_causal, False, False),
                rank=3,
                mlp_ratio=mlp_ratio,
                cond_dim=embed_dim,
                qk_norm=True,
                rotary=True,
                pad=True,
                **place,
            )
            for j in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(embed_dim, 2 * embed_dim, **place)
        self.unpatch = nn.Linear(embed_dim, math.prod(patch_size) * self.out_chans, **place)
        for linear in (self.patch_embed.proj, *self.time_embed.mlp[::2]):
            trunc_normal_(linear.weight, std=0.02)
        for linear in (self.modulation, self.unpatch):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoises.

        Args:
            x: `[B, in_chans, T, H, W]`.
            timestep: `[B]`, diffusion times or noise levels.
            cond: `[B, cond_dim]` of a model with `cond_dim`; None there for no condition.

        Raises:
            ValueError: for a condition that the model has no place for.
        """
        embedding = self.time_embed(timestep)
        if cond is not None:
            if self.cond_embed is None:
                raise ValueError("cond was given to a model without cond_dim.")
            embedding = embedding + self.cond_embed(cond)
        y = self.patch_embed(x)
        for block in self.blocks:
            y = block(y, embedding)
        shift, scale = self.modulation(nn.functional.silu(embedding)).chunk(2, dim=-1)
        y = self.norm(y) * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
        y = self.unpatch(y)
        # [B, T', H', W', C, t, h, w] to [B, C, T', t, H', h, W', w]
        y = y.unflatten(-1, (self.out_chans, *self.patch_size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return y.reshape(x.shape[0], self.out_chans, *x.shape[2:])


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        **cfg(first_conv="patch_embed.proj"),
        "origin_url": None,
        "paper_name": "Neighborhood Attention Transformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "video_nat_pico.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), num_classes=10),
        "video_nat_pico_causal.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(4, 4), num_classes=10
        ),
        "video_nat_tiny.untrained": _cfg(num_classes=400),
        "video_nat_tiny_causal.untrained": _cfg(num_classes=400),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> VideoNAT:
    # The tokenizer alone does not know that an image is a clip of one frame, so features come from
    # forward_intermediates.
    kwargs.setdefault("feature_cls", "getter")
    return build_model(VideoNAT, variant, pretrained, defaults, **kwargs)


_PICO = dict(embed_dim=32, depths=(1, 2, 2), num_heads=(1, 2, 4), kernel_size=(3, 5, 5))
_TINY = dict(drop_path_rate=0.2)


@register_model
def video_nat_pico(pretrained: bool = False, **kwargs: Any) -> VideoNAT:
    """A small VideoNAT, for clips of few pixels."""
    return _create("video_nat_pico", pretrained, _PICO, **kwargs)


@register_model
def video_nat_pico_causal(pretrained: bool = False, **kwargs: Any) -> VideoNAT:
    """A small VideoNAT, causal in time."""
    defaults = dict(_PICO, is_causal=True)
    return _create("video_nat_pico_causal", pretrained, defaults, **kwargs)


@register_model
def video_nat_tiny(pretrained: bool = False, **kwargs: Any) -> VideoNAT:
    """VideoNAT with 12 million parameters."""
    return _create("video_nat_tiny", pretrained, _TINY, **kwargs)


@register_model
def video_nat_tiny_causal(pretrained: bool = False, **kwargs: Any) -> VideoNAT:
    """VideoNAT with 12 million parameters, causal in time."""
    defaults = dict(_TINY, is_causal=True)
    return _create("video_nat_tiny_causal", pretrained, defaults, **kwargs)
