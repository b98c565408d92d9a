"""Isotropic models: one grid of patches from the first block to the last, as in ViT.

NAT and DiNAT without levels, and ViT with a relative position bias, which they were compared with.
Paper: `Dilated Neighborhood Attention Transformer`, https://arxiv.org/abs/2209.15001, section 4.3.
"""

# No postponed annotations here: torch.fx writes those of `forward` into the code that it generates,
# as types.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natten.nn import NeighborhoodTransformerBlock, PatchTokenizer
from natten.nn.backbone import is_list, pack_images, share_out

from ._base import (
    CHECKPOINTS,
    Classifier,
    Layer,
    build_model,
    cfg,
    init_weights,
    layers,
    refuse_list,
)
from ._checkpoint import resize_bias
from .dinat import PAPER

__all__ = ["IsotropicNAT"]


class IsotropicNAT(Classifier):
    """Isotropic neighborhood attention classifier.

    Args:
        img_size: of images, where `whole_grid`; else any size is taken.
        whole_grid: every window is the grid of an image of `img_size` (dense attention with a
            relative position bias: vitrpb) instead of `kernel_size`.
        in_chans: channels of the image.
        num_classes: classes; 0 for pooled features.
        global_pool: pooling of timm's `ClassifierHead`, "" for none.
        patch_size: pixels of a token along each axis.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        kernel_size, stride: window, and queries that share one: an integer, an entry for each
            block (an integer, one for each axis, or a list of windows, one for each of equal groups
            of heads), or one for each axis.
        clip_window: cut windows to grids that are smaller, instead of padding these, as the
            released models do.
        is_circular: whether rows and columns are rings (a panorama's columns), a bool or two:
            windows wrap around, and nothing is padded there.
        dilations: dilation of every block; None for 1.
        mlp_ratio, qkv_bias, qk_scale, layer_scale, drop_rate, proj_drop_rate, attn_drop_rate,
            drop_path_rate, norm_layer, act_layer: as for `NAT`.

    Shapes: images `[B, in_chans, H, W]` to logits `[B, num_classes]`; features are `[B, H', W',
        embed_dim]`. A list of images `[in_chans, H, W]` of different sizes runs without padding
        them to one; its features are a list of `[H', W', embed_dim]`.

    Raises:
        ValueError: for dilations that do not fit `depth`, or an `img_size` that is not a square of
            whole patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | Sequence[Any] = 7,
        stride: int | Sequence[Any] = 1,
        dilations: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        whole_grid: bool = False,
        clip_window: bool = False,
        is_circular: bool | Sequence[bool] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer, act_layer = layers(norm_layer, act_layer)
        dilations = (1,) * depth if dilations is None else tuple(dilations)
        if len(dilations) != depth:
            raise ValueError(
                f"dilations needs one entry for each of the {depth} blocks, got {len(dilations)}."
            )
        self.whole_grid = whole_grid
        if whole_grid:
            kernel_size = _grid_of(img_size, patch_size)
        sizes = share_out("kernel_size", kernel_size, depth, "blocks", 2)
        strides = share_out("stride", stride, depth, "blocks", 2)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = PatchTokenizer(
            in_chans, embed_dim, patch_size, norm_layer=norm_layer, is_circular=is_circular, **place
        )
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.Sequential(
            *(
                NeighborhoodTransformerBlock(
                    embed_dim,
                    num_heads,
                    sizes[j],
                    strides[j],
                    dilation=dilations[j],
                    mlp_ratio=mlp_ratio,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    layer_scale=layer_scale,
                    drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_paths[j],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    rel_pos_bias=True,
                    # Padding would be attended to: only the released local models expect it.
                    pad=not (whole_grid or clip_window),
                    clip_window=clip_window,
                    is_circular=is_circular,
                    **place,
                )
                for j in range(depth)
            )
        )
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"layers.{j}")
            for j in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **place)
        self.head = ClassifierHead(
            embed_dim,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **place,
        )
        self.apply(init_weights)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().set_input_size(img_size, patch_size)
        if img_size is not None and self.whole_grid:
            kernel_size = _grid_of(img_size, self.patch_embed.patch_size[0])
            for layer in self.layers:
                attn = layer.attn
                attn.kernel_size = kernel_size
                shape = torch.Size((attn.num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
                bias = resize_bias(attn.rpb.detach(), shape)
                attn.rpb = nn.Parameter(bias, requires_grad=attn.rpb.requires_grad)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the model and returns the blocks' outputs too; arguments as for `NAT`, but for
        blocks.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        refuse_list(x)
        take, last = feature_take_indices(len(self.layers), indices)
        layers = self.layers[: last + 1] if stop_early else self.layers
        x = self.patch_embed(x)
        intermediates = []
        for i, layer in enumerate(layers):
            x = checkpoint_seq([layer], x) if self.grad_checkpointing else layer(x)
            if i in take:
                # All blocks have the width of the final norm.
                y = self.norm(x) if norm else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(layers) == len(self.layers) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the blocks `indices` do not need; returns their indices."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def _features_of_list(self, images: Any) -> Any:
        x, layout = pack_images(self.patch_embed, images)
        for layer in self.layers:
            block = partial(layer, layout=layout)
            x = checkpoint_seq([block], x) if self.grad_checkpointing else block(x)
        return layout.unpack(self.norm(x))

    def forward_features(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows an "and")
            if is_list(x):
                return self._features_of_list(x)
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.layers, x)
        else:
            x = self.layers(x)
        return self.norm(x)


def _grid_of(img_size: int | tuple[int, int] | None, patch_size: int) -> int:
    """Tokens along each axis of a square image."""
    height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if height is None or height != width or height % patch_size:
        raise ValueError(
            f"img_size must be square and a multiple of the patch size {patch_size}, "
            f"got {img_size}."
        )
    return height // patch_size


def _cfg(name: str, top1: float, **kwargs: Any) -> dict[str, Any]:
    url = f"{CHECKPOINTS}/dinat/checkpoints/isotropic/{name}_in1k_224.pth"
    return cfg(url, top1, first_conv="patch_embed.proj", pool_size=(14, 14), **PAPER, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.shi_in1k": _cfg("nat_isotropic_small", 80.0),
        "nat_isotropic_base.shi_in1k": _cfg("nat_isotropic_base", 81.6),
        "dinat_isotropic_small.shi_in1k": _cfg("dinat_isotropic_small", 80.8),
        "dinat_isotropic_base.shi_in1k": _cfg("dinat_isotropic_base", 82.1),
        "vitrpb_small.shi_in1k": _cfg("vitrpb_small", 81.2, fixed_input_size=True),
        "vitrpb_base.shi_in1k": _cfg("vitrpb_base", 82.5, fixed_input_size=True),
    }
)

_SMALL = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1, out_indices=(2, 5, 8, 11))
_BASE = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4, out_indices=(2, 5, 8, 11))
_DILATIONS = (1, 2) * 6


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic NAT-Small."""
    return build_model(IsotropicNAT, "nat_isotropic_small", pretrained, _SMALL, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic NAT-Base."""
    return build_model(IsotropicNAT, "nat_isotropic_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic DiNAT-Small: every second block is dilated by 2, so that its window covers the
    grid.
    """
    defaults = dict(_SMALL, dilations=_DILATIONS)
    return build_model(IsotropicNAT, "dinat_isotropic_small", pretrained, defaults, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic DiNAT-Base."""
    defaults = dict(_BASE, dilations=_DILATIONS)
    return build_model(IsotropicNAT, "dinat_isotropic_base", pretrained, defaults, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """ViT-Small with a relative position bias; for images of one size (`img_size`, default 224)."""
    defaults = dict(_SMALL, whole_grid=True)
    return build_model(IsotropicNAT, "vitrpb_small", pretrained, defaults, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """ViT-Base with a relative position bias; for images of one size (`img_size`, default 224)."""
    defaults = dict(_BASE, whole_grid=True)
    return build_model(IsotropicNAT, "vitrpb_base", pretrained, defaults, **kwargs)
