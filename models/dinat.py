"""DiNAT: Dilated Neighborhood Attention Transformer.

NAT with dilated windows in every second block. Paper: `Dilated Neighborhood Attention Transformer`,
https://arxiv.org/abs/2209.15001.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ._base import CHECKPOINTS, build_model, cfg
from .nat import NAT, PICO, pico_cfg

# The last level's grid is as small as the window, so it is not dilated.
_DILATIONS_224_MINI = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5)
_DILATIONS_224 = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)
_DILATIONS_384 = ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)

PAPER = dict(paper_name="Dilated Neighborhood Attention Transformer", paper_ids="arXiv:2209.15001")
# Upstream does not state the head of its ImageNet-22k checkpoints; this is the usual one. Asking
# for another num_classes drops the head, so fine-tuning does not depend on it.
IN22K_CLASSES = 21841


def _cfg(path: str, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return cfg(f"{CHECKPOINTS}/dinat/checkpoints/{path}", top1, **PAPER, **kwargs)


def cfg_384(path: str, top1: float) -> dict[str, Any]:
    return _cfg(path, top1, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "dinat_mini.shi_in1k": _cfg("imagenet1k/dinat_mini_in1k_224.pth", 81.8),
        "dinat_tiny.shi_in1k": _cfg("imagenet1k/dinat_tiny_in1k_224.pth", 82.7),
        "dinat_small.shi_in1k": _cfg("imagenet1k/dinat_small_in1k_224.pth", 83.8),
        "dinat_base.shi_in1k": _cfg("imagenet1k/dinat_base_in1k_224.pth", 84.4),
        "dinat_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_224.pth", 86.6),
        "dinat_large_384.shi_in22k_ft_in1k": cfg_384(
            "imagenet1k/dinat_large_in22k_in1k_384.pth", 87.4
        ),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": cfg_384(
            "imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", 87.5
        ),
        "dinat_large_21k.shi_in22k": _cfg(
            "imagenet22k/dinat_large_in22k_224.pth", num_classes=IN22K_CLASSES
        ),
        "dinat_large_21k_11x11.shi_in22k": _cfg(
            "imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=IN22K_CLASSES
        ),
        "dinat_pico.mnist5k": {**pico_cfg("dinat_pico.mnist5k"), **PAPER},
        "dinat_pico.digits": {**pico_cfg("dinat_pico.digits"), **PAPER},
    }
)

_TINY = dict(depths=(3, 4, 18, 5), dilations=_DILATIONS_224, drop_path_rate=0.2)
_LARGE = dict(
    embed_dim=192,
    depths=(3, 4, 18, 5),
    num_heads=(6, 12, 24, 48),
    mlp_ratio=2.0,
    dilations=_DILATIONS_224,
    drop_path_rate=0.35,
)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini."""
    defaults = dict(dilations=_DILATIONS_224_MINI, drop_path_rate=0.2)
    return build_model(NAT, "dinat_mini", pretrained, defaults, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny."""
    return build_model(NAT, "dinat_tiny", pretrained, _TINY, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small. Unlike NAT-Small it has no layer scale."""
    defaults = dict(
        _TINY, embed_dim=96, num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3
    )
    return build_model(NAT, "dinat_small", pretrained, defaults, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base."""
    defaults = dict(
        _TINY,
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
        mlp_ratio=2.0,
        layer_scale=1e-5,
        drop_path_rate=0.5,
    )
    return build_model(NAT, "dinat_base", pretrained, defaults, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large."""
    return build_model(NAT, "dinat_large", pretrained, _LARGE, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for images of 384x384."""
    defaults = dict(_LARGE, dilations=_DILATIONS_384)
    return build_model(NAT, "dinat_large_384", pretrained, defaults, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for images of 384x384, with windows of 11x11."""
    defaults = dict(_LARGE, kernel_size=11)
    return build_model(NAT, "dinat_large_384_11x11", pretrained, defaults, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for ImageNet-22k."""
    defaults = dict(_LARGE, drop_path_rate=0.2)
    return build_model(NAT, "dinat_large_21k", pretrained, defaults, **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for ImageNet-22k, with windows of 11x11."""
    defaults = dict(_LARGE, kernel_size=11, drop_path_rate=0.2)
    return build_model(NAT, "dinat_large_21k_11x11", pretrained, defaults, **kwargs)


@register_model
def dinat_pico(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT of 1.1 million parameters for images of 28x28, with weights in the package."""
    defaults = dict(PICO, dilations=((1, 4), (1, 2, 1), (1,) * 5))
    return build_model(NAT, "dinat_pico", pretrained, defaults, **kwargs)
