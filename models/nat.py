"""NAT: Neighborhood Attention Transformer, the hierarchical model that DiNAT and DiNAT_s share.

Paper: `Neighborhood Attention Transformer`, https://arxiv.org/abs/2204.07143.
Released code and checkpoints: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.
"""

# No postponed annotations here: torch.fx writes those of `forward` into the code that it generates,
# as types.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natten.nn import (
    ConvDownsampler,
    ConvTokenizer,
    NeighborhoodAttention2D,
    PatchMerging,
    PatchTokenizer,
)
from natten.nn.backbone import is_list, stages

from ._base import (
    CHECKPOINTS,
    Hierarchy,
    Layer,
    build_model,
    cfg,
    init_weights,
    layers,
    refuse_list,
)
from ._checkpoint import packaged_weights

__all__ = ["NAT"]

# Padding a small input is control flow on shapes: one call in a traced graph.
register_notrace_module(NeighborhoodAttention2D)


class NAT(Hierarchy):
    """Hierarchical neighborhood attention classifier: NAT, DiNAT and DiNAT_s.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for pooled features.
        global_pool: pooling of timm's `ClassifierHead`, "" for none.
        embed_dim: channels of the first level; they double at every level.
        depths: blocks of every level.
        num_heads: heads of every level.
        kernel_size, stride: window, and queries that share one: an integer, an entry for each level
            (an integer, an entry for each block, or one for each axis), or one for each axis. The
            entry of a block may be a list of windows, one for each of equal groups of heads.
        dilations: dilation of every block of every level, an integer or one for each axis; None for
            1.
        mlp_ratio: hidden width of the MLPs.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor on query · key; None for `head_dim ** -0.5`.
        layer_scale: initial value of the residual scales, None for none.
        is_circular: whether rows and columns are rings (a panorama's columns): windows,
            convolutions and patches wrap around, and divide them. A bool, or one for each axis.
        clip_window: cut windows to grids that are smaller, instead of padding these, as the
            released models do.
        stem: "conv" (two overlapping convolutions; convolutions between levels: NAT, DiNAT) or
            "patch" (patches of 4; patch merging between levels: DiNAT_s).
        stem_strides: strides of the two convolutions of the "conv" stem.
        drop_rate: dropout in front of the classifier.
        proj_drop_rate: dropout behind the projections of attention and MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_layer, act_layer: normalization (LayerNorm, eps 1e-5) and activation (exact GELU), or
            timm's names of them.
        weight_init: "" for the published initial weights (std 0.02), "xavier" for narrow models.

    Shapes: images `[B, in_chans, H, W]` to logits `[B, num_classes]`; features are
    `[B, H', W', C]`. A list of images `[in_chans, H, W]` of different sizes runs without padding
    them to one; its features are a list of `[H', W', C]`.

    Raises:
        ValueError: for lists of different lengths, or an unknown stem.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[Any] = 7,
        stride: int | Sequence[Any] = 1,
        dilations: Sequence[Sequence[int | Sequence[int]]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        is_circular: bool | Sequence[bool] = False,
        clip_window: bool = False,
        stem: str = "conv",
        stem_strides: tuple[int, int] = (2, 2),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        weight_init: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer, act_layer = layers(norm_layer, act_layer)
        num_levels = len(depths)
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        for name, values in (("num_heads", num_heads), ("dilations", dilations)):
            if len(values) != num_levels:
                raise ValueError(
                    f"{name} needs one entry for each of the {num_levels} levels of depths, "
                    f"got {len(values)}."
                )
        for i, (depth, level_dilations) in enumerate(zip(depths, dilations)):
            if len(level_dilations) != depth:
                raise ValueError(
                    f"dilations[{i}] needs one dilation for each of the {depth} blocks, "
                    f"got {len(level_dilations)}."
                )
        if stem not in ("conv", "patch"):
            raise ValueError(f"stem must be 'conv' or 'patch', got {stem!r}.")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (num_levels - 1)
        self.drop_rate = drop_rate

        norms: dict[str, Any] = {"norm_layer": norm_layer, **place}
        rings: dict[str, Any] = {"is_circular": is_circular}
        if stem == "conv":
            self.patch_embed = ConvTokenizer(
                in_chans, embed_dim, strides=stem_strides, **norms, **rings
            )
            reduction = stem_strides[0] * stem_strides[1]
            downsampler: type[nn.Module] = ConvDownsampler
        else:
            self.patch_embed = PatchTokenizer(in_chans, embed_dim, 4, **norms, **rings)
            reduction = 4
            downsampler = PatchMerging
        self.levels = stages(
            embed_dim,
            depths,
            num_heads,
            kernel_size,
            # One for each axis: of two blocks, two numbers might be for two axes.
            [[(d, d) if isinstance(d, int) else d for d in level] for level in dilations],
            stride,
            rank=2,
            drop_path=drop_path_rate,
            downsampler=lambda channels: downsampler(channels, **norms, **rings),
            mlp_ratio=mlp_ratio,
            act_layer=act_layer,
            layer_scale=layer_scale,
            drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            rel_pos_bias=True,
            pad=not clip_window,
            clip_window=clip_window,
            **rings,
            **norms,
        )
        self.feature_info = [
            dict(num_chs=embed_dim * 2**i, reduction=reduction * 2**i, module=f"levels.{i}")
            for i in range(num_levels)
        ]
        self.norm = norm_layer(self.num_features, **place)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **place,
        )
        self.apply(partial(init_weights, weight_init=weight_init))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the model and returns the levels' outputs too.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: levels to return: the last n for an integer, all for None.
            norm: apply the final norm to the last level's output.
            stop_early: run no level behind the last that is asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, else (final features `[B, H', W', C]`, list).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        refuse_list(x)
        take, last = feature_take_indices(len(self.levels), indices)
        levels = self.levels[: last + 1] if stop_early else self.levels
        x = self.patch_embed(channels_last(x))
        intermediates = []
        final = len(self.levels) - 1
        for i, level in enumerate(levels):
            x = level(x)
            if i == final and (norm or not intermediates_only):
                normed = self.norm(x)
            if i in take:
                y = normed if norm and i == final else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return (normed if len(levels) == final + 1 else x), intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows an "and")
            if is_list(x):
                return self._features_of_list(x)
        return self.norm(self.levels(self.patch_embed(channels_last(x))))


def channels_last(x: Tensor) -> Tensor:
    """Tokens are channels-last: convolutions of channels-last images need no transposition."""
    return x.contiguous(memory_format=torch.channels_last)


def pico_cfg(name: str) -> dict[str, Any]:
    """pretrained_cfg of a small model that this project trained; the package has its weights."""
    return {
        **cfg(),
        "file": packaged_weights(name),
        "num_classes": 10,
        "input_size": (3, 28, 28),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "mean": (0.1307,) * 3,
        "std": (0.3081,) * 3,
        "license": "mit",
        "origin_url": None,
        "notes": (),
    }


# 28x28, 14x14 and 7x7 tokens for a 28x28 image: its windows of 7 are local in two levels of three.
PICO = dict(
    embed_dim=32,
    depths=(2, 3, 5),
    num_heads=(1, 2, 4),
    mlp_ratio=3.0,
    stem_strides=(1, 1),
    weight_init="xavier",
)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.shi_in1k": cfg(f"{CHECKPOINTS}/nat/checkpoints/CLS/nat_mini.pth", 81.8),
        "nat_tiny.shi_in1k": cfg(f"{CHECKPOINTS}/nat/checkpoints/CLS/nat_tiny.pth", 83.2),
        "nat_small.shi_in1k": cfg(f"{CHECKPOINTS}/nat/checkpoints/CLS/nat_small.pth", 83.7),
        "nat_base.shi_in1k": cfg(f"{CHECKPOINTS}/nat/checkpoints/CLS/nat_base.pth", 84.3),
        "nat_pico.mnist5k": pico_cfg("nat_pico.mnist5k"),
        "nat_pico.digits": pico_cfg("nat_pico.digits"),
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini."""
    defaults = dict(drop_path_rate=0.2)
    return build_model(NAT, "nat_mini", pretrained, defaults, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny."""
    defaults = dict(depths=(3, 4, 18, 5), drop_path_rate=0.2)
    return build_model(NAT, "nat_tiny", pretrained, defaults, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small."""
    defaults = dict(
        embed_dim=96,
        depths=(3, 4, 18, 5),
        num_heads=(3, 6, 12, 24),
        mlp_ratio=2.0,
        layer_scale=1e-5,
        drop_path_rate=0.3,
    )
    return build_model(NAT, "nat_small", pretrained, defaults, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base."""
    defaults = dict(
        embed_dim=128,
        depths=(3, 4, 18, 5),
        num_heads=(4, 8, 16, 32),
        mlp_ratio=2.0,
        layer_scale=1e-5,
        drop_path_rate=0.5,
    )
    return build_model(NAT, "nat_base", pretrained, defaults, **kwargs)


@register_model
def nat_pico(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT of 1.1 million parameters for images of 28x28, with weights in the package."""
    return build_model(NAT, "nat_pico", pretrained, PICO, **kwargs)
