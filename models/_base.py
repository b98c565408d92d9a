"""What the models share: what timm asks of a classifier and of a hierarchy of levels, initial
weights, and timm's pretrained_cfg.
"""

# No postponed annotations here: torch.fx writes those of `forward` into the code that it generates,
# as types.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = [
    "CHECKPOINTS",
    "Classifier",
    "Hierarchy",
    "LayerNorm",
    "NATLevel",
    "cfg",
    "init_weights",
]

LayerNorm = partial(nn.LayerNorm, eps=1e-5)


class NATLevel(nn.Module):
    """A downsampler (none at the first level), then blocks: `[B, H, W, C]` in and out."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Classifier(nn.Module):
    """What timm asks of every classifier; subclasses have `forward_features`, and timm's `head` or
    a `reset_classifier` of their own."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: removes it), and the pooling unless None."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        # timm's head does not ask for the model's present width, place and mode.
        parameter = next(self.parameters(), torch.empty(0))
        self.head.in_features = self.num_features
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=parameter.device, dtype=parameter.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Hierarchy(Classifier):
    """What timm asks of a model with `patch_embed`, `levels` of `NATLevel`, and `norm`."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^levels\.(\d+)"
        if not coarse:
            blocks = [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the levels `indices` do not need; returns their indices."""
        take, last = feature_take_indices(len(self.levels), indices)
        shortened = last < len(self.levels) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        self.levels = self.levels[: last + 1]
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take


def init_weights(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02) and zero biases, as in the released code."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_MODEL_REPOSITORY = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
CHECKPOINTS = "https://shi-labs.com/projects"


def cfg(url: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained_cfg of a model of this package; `top1` is the published accuracy."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": _MODEL_REPOSITORY,
        "paper_name": "Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2204.07143",
        "notes": () if top1 is None else (f"ImageNet-1k top-1 {top1}",),
        **kwargs,
    }
