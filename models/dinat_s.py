"""DiNAT_s: dilated neighborhood attention in the layout of Swin Transformer.

Patches of 4 and patch merging instead of convolutions. Paper: `Dilated Neighborhood Attention
Transformer`, https://arxiv.org/abs/2209.15001.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ._base import CHECKPOINTS, build_model, cfg
from .dinat import IN22K_CLASSES, PAPER
from .nat import NAT

_DILATIONS_224_TINY = ((1, 8), (1, 4), (1, 2) * 3, (1, 1))
_DILATIONS_224 = ((1, 8), (1, 4), (1, 2) * 9, (1, 1))
_DILATIONS_384 = ((1, 13), (1, 6), (1, 3) * 9, (1, 1))


def _cfg(path: str, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    url = f"{CHECKPOINTS}/dinat/checkpoints/{path}"
    return cfg(url, top1, first_conv="patch_embed.proj", **PAPER, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.shi_in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth", 81.8),
        "dinat_s_small.shi_in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth", 83.5),
        "dinat_s_base.shi_in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth", 83.8),
        "dinat_s_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth", 86.5),
        "dinat_s_large_384.shi_in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth",
            87.4,
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
        "dinat_s_large_21k.shi_in22k": _cfg(
            "imagenet22k/dinat_s_large_in22k_224.pth", num_classes=IN22K_CLASSES
        ),
    }
)

_SMALL = dict(
    stem="patch",
    embed_dim=96,
    depths=(2, 2, 18, 2),
    num_heads=(3, 6, 12, 24),
    mlp_ratio=4.0,
    dilations=_DILATIONS_224,
    drop_path_rate=0.3,
)
_LARGE = dict(_SMALL, embed_dim=192, num_heads=(6, 12, 24, 48), drop_path_rate=0.35)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Tiny."""
    defaults = dict(_SMALL, depths=(2, 2, 6, 2), dilations=_DILATIONS_224_TINY, drop_path_rate=0.2)
    return build_model(NAT, "dinat_s_tiny", pretrained, defaults, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Small."""
    return build_model(NAT, "dinat_s_small", pretrained, _SMALL, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Base."""
    defaults = dict(_SMALL, embed_dim=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
    return build_model(NAT, "dinat_s_base", pretrained, defaults, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large."""
    return build_model(NAT, "dinat_s_large", pretrained, _LARGE, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large for images of 384x384."""
    defaults = dict(_LARGE, dilations=_DILATIONS_384)
    return build_model(NAT, "dinat_s_large_384", pretrained, defaults, **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large for ImageNet-22k."""
    defaults = dict(_LARGE, drop_path_rate=0.2)
    return build_model(NAT, "dinat_s_large_21k", pretrained, defaults, **kwargs)
