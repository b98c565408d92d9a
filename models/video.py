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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten.nn import (
    NeighborhoodAttention3D,
    NeighborhoodTransformerBlock,
    PatchMerging,
    PatchTokenizer,
    StreamState,
)
from natten.nn.backbone import Axes, is_list, pack_images, share_out, stages
from natten.nn.core import refuse_sharded
from natten.varlen import GridLayout

from ._base import Hierarchy, Layer, build_model, cfg, init_weights, layers, refuse_list
from ._checkpoint import packaged_weights

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


def _window(kernel_size: int | Sequence[Any]) -> int | Sequence[Any]:
    """Three numbers are for frames, rows and columns, however many levels or blocks there are."""
    flat = isinstance(kernel_size, Sequence) and all(isinstance(k, int) for k in kernel_size)
    return Axes(kernel_size) if flat else kernel_size


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


class StreamOutput(NamedTuple):
    """What a stream returns for new frames.

    features: `[B, t, H', W', C]` of the new frames.
    logits: `[B, num_classes]` of all frames so far; without pooling, of every new token,
        `[B, t, H', W', num_classes]`.
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
        kernel_size: window: frames, rows, columns; or an entry for each level, as `NAT` takes it.
        time_dilations: dilation in time of every block, repeated over the blocks of a level.
        dilations: of every block of every level (frames, rows, columns), instead of them.
        rel_pos_bias: learn relative position biases instead of rotating queries and keys; not of
            causal models. An image model's weights, loaded into a model with its depths, heads,
            windows and dilations in space, then give on a clip of one image what they give of it.
        is_causal: whether a frame attends to no later one.
        is_circular: whether windows wrap around along frames, rows or columns, and positions with
            them: a bool or three. A ring is neither causal nor padded: patches and levels must
            divide it, and windows fit.
        clip_window: cut windows to grids that are smaller, instead of padding these.
        mlp_ratio, qkv_bias, qk_scale, drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate,
            norm_layer, act_layer: as for `NAT`.

    Shapes: clips `[B, in_chans, T, H, W]` to logits `[B, num_classes]`; features are `[B, T', H',
    W', C]`. Images `[B, in_chans, H, W]` are clips of one frame, and their features have no time
    axis, so that timm's tools apply. A list of clips `[in_chans, T, H, W]` of different lengths and
    sizes runs without padding them to one; its features are a list of `[T', H', W', C]`.

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
        kernel_size: Sequence[Any] = (4, 7, 7),
        time_dilations: Sequence[int] = (1, 2),
        dilations: Sequence[Sequence[tuple[int, int, int]]] | None = None,
        rel_pos_bias: bool = False,
        is_causal: bool = False,
        is_circular: bool | Sequence[bool] = False,
        clip_window: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = None,
        act_layer: Layer = None,
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
        norm_layer, act_layer = layers(norm_layer, act_layer)
        norms: dict[str, Any] = {"norm_layer": norm_layer, **place}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.is_causal = is_causal
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)

        rings: dict[str, Any] = {"is_circular": is_circular}
        self.patch_embed = PatchTokenizer(in_chans, embed_dim, patch_size, rank=3, **norms, **rings)
        self.levels = stages(
            embed_dim,
            depths,
            num_heads,
            _window(kernel_size),
            dilations
            or [
                [(time_dilations[j % len(time_dilations)], 1, 1) for j in range(depth)]
                for depth in depths
            ],
            1,
            rank=3,
            drop_path=drop_path_rate,
            downsampler=lambda channels: PatchMerging(
                channels, rank=3, strides=(1, 2, 2), **norms, **rings
            ),
            is_causal=(is_causal, False, False),
            **rings,
            clip_window=clip_window,
            mlp_ratio=mlp_ratio,
            act_layer=act_layer,
            drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            rel_pos_bias=rel_pos_bias,
            rotary=not rel_pos_bias,
            pad=not clip_window,
            **norms,
        )
        self.feature_info = [
            dict(num_chs=embed_dim * 2**i, reduction=patch_size[-1] * 2**i, module=f"levels.{i}")
            for i in range(len(depths))
        ]
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
        refuse_list(x)
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
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows an "and")
            if is_list(x):
                return self._features_of_list(x)
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
        x = self.patch_embed(as_clip(frames))
        new, first = StreamState(), 0
        for level in self.levels:
            depth = len(level.blocks)
            x, after = level.stream(x, None if state is None else state.part(first, depth))
            new.add(after)
            first += depth
        features = self.norm(x)
        if self.head.pool_type == "":
            return StreamOutput(features, self.head.fc(features), new)
        new.feature_sum = features.mean((2, 3)).sum(1)
        if state is not None and state.feature_sum is not None:
            new.feature_sum = state.feature_sum + new.feature_sum
        logits = self.head.fc(new.feature_sum / new.frames)
        return StreamOutput(features, logits, new)


class TimestepEmbedding(nn.Module):
    """Sinusoids of a number (a diffusion time or noise level), then an MLP: `[...]` to
    `[..., dim]`.

    Numbers are multiplied by `scale` first: the frequencies, from 1 down to 1 / 10000, suit numbers
    up to about 1000.
    """

    def __init__(self, dim: int, frequencies: int = 128, scale: float = 1.0, **place: Any) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, dim, **place), nn.SiLU(), nn.Linear(dim, dim, **place)
        )

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        rate = torch.exp(exponent * (-math.log(10000.0) / self.frequencies))
        angle = t.float().unsqueeze(-1) * self.scale * rate
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
        kernel_size: window: frames, rows, columns; or an entry for each block. -1 for a whole axis.
        dilations: (frames, rows, columns) of the blocks, repeated over them; None for no dilation.
        is_causal: whether a frame depends on no later one.
        is_circular: whether windows wrap around along frames, rows or columns, and positions with
            them: a bool or three. A ring is neither causal nor padded.
        cond_dim: channels of the condition; None for none.
        context_dim: channels of a context that every token attends to, as of a text; None for none.
        num_registers: learned tokens that every token attends to, and which attend to all, or in a
            causal model to each other. Not beside a context.
        mlp_ratio: hidden width of the MLPs.
        time_scale: timesteps are multiplied by it; 1000 for times in [0, 1], as of flow matching.
        norm_layer, act_layer: as for `NAT`.
        block_args: further arguments of `NeighborhoodTransformerBlock`.

    Shapes: `[B, in_chans, T, H, W]` to `[B, out_chans, T, H, W]`, multiples of the patch; images
    `[B, in_chans, H, W]` are clips of one frame. A list of clips `[in_chans, T, H, W]` of different
    sizes, or of images, to such a list: nothing is padded.
    """

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        embed_dim: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        kernel_size: int | Sequence[Any] = (3, 7, 7),
        dilations: Sequence[tuple[int, int, int]] | None = None,
        is_causal: bool = False,
        cond_dim: int | None = None,
        mlp_ratio: float = 4.0,
        *,
        is_circular: bool | Sequence[bool] = False,
        context_dim: int | None = None,
        num_registers: int = 0,
        time_scale: float = 1.0,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer, act_layer = layers(norm_layer, act_layer)
        if num_registers and context_dim is not None:
            raise ValueError("num_registers and context_dim exclude each other.")
        self.in_chans = in_chans
        self.patch_size = tuple(patch_size)
        self.out_chans = in_chans if out_chans is None else out_chans
        self.grad_checkpointing = False
        self.patch_embed = PatchTokenizer(
            in_chans, embed_dim, patch_size, rank=3, norm_layer=None, pad=False, **place
        )
        self.time_embed = TimestepEmbedding(embed_dim, scale=time_scale, **place)
        self.cond_embed = None if cond_dim is None else nn.Linear(cond_dim, embed_dim, **place)
        self.register_parameter("registers", None)
        if num_registers:
            self.registers = nn.Parameter(torch.empty(num_registers, embed_dim, **place))
            trunc_normal_(self.registers, std=0.02)
        dilations = dilations or [(1, 1, 1)]
        sizes = share_out("kernel_size", _window(kernel_size), depth, "blocks", 3)
        self.blocks = nn.ModuleList(
            NeighborhoodTransformerBlock(
                embed_dim,
                num_heads,
                sizes[j],
                dilation=dilations[j % len(dilations)],
                is_causal=(is_causal, False, False),
                is_circular=is_circular,
                rank=3,
                mlp_ratio=mlp_ratio,
                cond_dim=embed_dim,
                context_dim=context_dim,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **{"qk_norm": True, "rotary": True, "pad": True, **place, **block_args},
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

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing what is inside them."""
        self.grad_checkpointing = enable

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Tensor:
        """Denoises.

        Args:
            x: `[B, in_chans, T, H, W]`, or `[B, in_chans, H, W]`; or a list of either without B,
                and all else is then one for each of them.
            timestep: diffusion times or noise levels, `[B]`, for each frame of tokens `[B, T']`, or
                for each token `[B, T', H', W']`; None for 0.
            cond: of a model with `cond_dim`, `[B, cond_dim]`, or with the axes of the tokens,
                `[B, T', H', W', cond_dim]`, of extent 1 where it does not vary; None for no
                condition.
            context, context_lengths: of a model with `context_dim`, `[B, S, context_dim]` and how
                many tokens of it are there, `[B]`, None for all.

        Raises:
            ValueError: for a condition or a context that the model has no place for.
        """
        return self._run(x, timestep, cond, context, context_lengths, None)[0]

    @torch.jit.ignore
    @torch.no_grad()
    def stream(
        self,
        frames: Tensor,
        timestep: Tensor | None = None,
        state: StreamState | None = None,
        cond: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> tuple[Tensor, StreamState]:
        """The next frames of a clip, of a model that is causal in time.

        Frames before are remembered as they were when they were taken: of a clip that is denoised
        frame by frame, give each its last, clean state once with the state that is kept, and the
        noisy ones before with the state from before, which no call changes.

        Args:
            frames: `[B, in_chans, t, H, W]`, or `[B, in_chans, H, W]`.
            timestep, cond, context, context_lengths: as for `forward`, of these frames.
            state: what the call with the frames before returned; None at the start.

        Returns:
            What `forward` of the clip so far returns for these frames, and the state for the next
            call.

        Raises:
            ValueError: the model is not causal in time, or the size of frames changes.
        """
        state = state or StreamState()
        return self._run(frames, timestep, cond, context, context_lengths, state)

    def _run(
        self,
        x: Any,
        timestep: Tensor | None,
        cond: Tensor | None,
        context: Tensor | None,
        context_lengths: Tensor | None,
        state: StreamState | None,
    ) -> tuple[Any, StreamState]:
        if context is not None and self.blocks and self.blocks[0].context_dim is None:
            raise ValueError("context was given to a model without context_dim.")
        layout: GridLayout | None = None
        if is_list(x):
            if state is not None:
                raise NotImplementedError("a stream of a list of clips is not implemented.")
            clips = [as_clip(one[None])[0] for one in x]
            y, layout = pack_images(self.patch_embed, clips)
            count = len(clips)
            self._check_each(count, timestep, cond)
        else:
            y = self.patch_embed(as_clip(x))
            count = y.shape[0]
        embedding = self._embedding(y, count, timestep, cond)
        registers = None
        if self.registers is not None:
            registers = self.registers.expand(count, -1, -1)
        new = StreamState()
        for i, block in enumerate(self.blocks):
            arguments = (embedding, registers, context, context_lengths)
            if state is not None:
                result, after = block.stream(y, state.part(i), *arguments)
                new.add(after)
            elif self.grad_checkpointing and self.training:
                result = checkpoint(block, y, *arguments, None, layout, use_reentrant=False)
            else:
                result = block(y, *arguments, None, layout)
            y, registers = (result, None) if registers is None else result
        modulation = self.modulation(nn.functional.silu(embedding))
        if layout is not None:
            modulation = layout.spread(modulation)
        elif embedding.dim() == 2:
            modulation = modulation[:, None, None, None]
        shift, scale = modulation.chunk(2, dim=-1)
        y = self.unpatch(self.norm(y) * (1 + scale) + shift)
        if layout is None:
            return self._pixels(y, x.dim() == 4), new
        tokens = zip(layout.unpack(y), x, strict=True)
        return [self._pixels(part[None], one.dim() == 3)[0] for part, one in tokens], new

    def _pixels(self, y: Tensor, is_image: bool) -> Tensor:
        """`[B, T', H', W', C * t * h * w]` to `[B, C, T, H, W]`, or without T."""
        y = torch.unflatten(y, -1, (self.out_chans, *self.patch_size)).permute(
            0, 4, 1, 5, 2, 6, 3, 7
        )
        y = y.flatten(6).flatten(4, 5).flatten(2, 3)
        return y.squeeze(2) if is_image else y

    def _check_each(self, clips: int, timestep: Tensor | None, cond: Tensor | None) -> None:
        """Of a list of clips, what has to be one number or vector for each."""
        for name, given, dim in (("timestep", timestep, 1), ("cond", cond, 2)):
            if given is not None and (given.dim() != dim or given.shape[0] != clips):
                raise ValueError(
                    f"{name} of a list of {clips} clips must have one entry for each, got shape "
                    f"{list(given.shape)}."
                )

    def _embedding(
        self, y: Tensor, count: int, timestep: Tensor | None, cond: Tensor | None
    ) -> Tensor:
        """What the blocks are told, `[B, C]` or with the axes of the tokens `y`."""
        if timestep is None:
            timestep = y.new_zeros(count)
        if timestep.dim() == 2:
            timestep = timestep[:, :, None, None]
        if timestep.dim() not in (1, 4):
            raise ValueError(
                "timestep must have the shape [batch], [batch, frames] or [batch, frames, rows, "
                f"columns] of tokens, got {list(timestep.shape)}."
            )
        embedding = self.time_embed(timestep)
        if cond is not None:
            if self.cond_embed is None:
                raise ValueError("cond was given to a model without cond_dim.")
            told = self.cond_embed(cond)
            if embedding.dim() != told.dim():
                embedding, told = (
                    t[:, None, None, None] if t.dim() == 2 else t for t in (embedding, told)
                )
            embedding = embedding + told
        return embedding


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        # timm adapts weights of two-dimensional convolutions to other channels, and no others.
        **cfg(first_conv=None),
        "origin_url": None,
        "paper_name": "Neighborhood Attention Transformer",
        **kwargs,
    }


_DENOISER: dict[str, Any] = {"num_classes": 0, "classifier": None, "pool_size": None}

default_cfgs = generate_default_cfgs(
    {
        "video_nat_pico.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), num_classes=10),
        "video_nat_pico_causal.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(4, 4), num_classes=10
        ),
        "video_nat_tiny.untrained": _cfg(num_classes=400),
        "video_nat_tiny_causal.untrained": _cfg(num_classes=400),
        "video_denoiser_pico.bikes": _cfg(
            file=packaged_weights("video_denoiser_pico.bikes"), input_size=(6, 48, 112), **_DENOISER
        ),
        "video_denoiser_small.untrained": _cfg(input_size=(4, 64, 64), **_DENOISER),
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


def _denoiser(variant: str, pretrained: bool, defaults: Any, **kwargs: Any) -> VideoDenoiser:
    # There is nothing to classify or to pool.
    unused = ("num_classes", "global_pool")
    return build_model(VideoDenoiser, variant, pretrained, defaults, kwargs_filter=unused, **kwargs)


@register_model
def video_denoiser_pico(pretrained: bool = False, **kwargs: Any) -> VideoDenoiser:
    """A small VideoDenoiser, causal in time, of frames and what changed in them.

    With the weights in the package it tells what will change next (`natten.models.clip.predict`).
    """
    defaults = dict(
        out_chans=3, embed_dim=96, depth=4, num_heads=3, patch_size=(1, 4, 4), is_causal=True
    )
    return _denoiser("video_denoiser_pico", pretrained, defaults, **kwargs)


@register_model
def video_denoiser_small(pretrained: bool = False, **kwargs: Any) -> VideoDenoiser:
    """VideoDenoiser of four latent channels, with 32 million parameters."""
    defaults = dict(embed_dim=384, depth=12, num_heads=6)
    return _denoiser("video_denoiser_small", pretrained, defaults, **kwargs)
