"""What the models share: what timm asks of a classifier and of a hierarchy of levels, building them
with timm, initial weights, and timm's pretrained_cfg.
"""

# No postponed annotations here: torch.fx writes those of `forward` into the code that it generates,
# as types.

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer, get_norm_layer, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, get_pretrained_cfg
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from natten.nn import NeighborhoodBackbone
from natten.nn.backbone import depth_groups, is_list, pack_images, without_decay

from ._checkpoint import adopt_checkpoints, checkpoint_filter_fn, read_checkpoint

__all__ = [
    "CHECKPOINTS",
    "Classifier",
    "Hierarchy",
    "LayerNorm",
    "build_model",
    "cfg",
    "for_size",
    "init_weights",
    "layers",
]

Model = TypeVar("Model", bound=nn.Module)
LayerNorm = partial(nn.LayerNorm, eps=1e-5)


def refuse_list(x: Any) -> None:
    """For what takes images of one size."""
    if is_list(x):
        raise NotImplementedError(
            "forward_intermediates of a list of images is not implemented: call it for each, or "
            "forward_features for all"
        )


Layer = str | Callable[..., nn.Module] | None


def layers(
    norm_layer: Layer, act_layer: Layer
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module] | None]:
    """Normalization and activation, which may be given by timm's names; None for the models' own.

    Raises:
        ValueError: timm has no layer of that name.
    """
    found: list[Any] = []
    for kind, layer, get in (
        ("norm_layer", norm_layer, get_norm_layer),
        ("act_layer", act_layer, get_act_layer),
    ):
        if isinstance(layer, str):
            try:
                found.append(get(layer))
            except (AssertionError, KeyError) as error:
                raise ValueError(f"{kind}={layer!r} is not one of timm's layers") from error
        else:
            found.append(layer)
    return found[0] or LayerNorm, found[1]


def for_size(cfg: dict[str, Any], img_size: int | Sequence[int]) -> dict[str, Any]:
    """What a pretrained_cfg says of images, for images of another size.

    Raises:
        ValueError: no size.
    """
    size = to_2tuple(img_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"img_size must be one or two positive integers, got {img_size}")
    channels, *before = cfg["input_size"]
    pool = cfg["pool_size"]  # of the last features; None where nothing is pooled
    if pool is not None:
        pool = tuple(-(-n * p // b) for n, p, b in zip(size, pool, before))
    return {"input_size": (channels, *size), "pool_size": pool}


class Classifier(nn.Module):
    """What timm asks of every classifier; subclasses have `forward_features`, and timm's `head` or
    a `reset_classifier` of their own. `load_state_dict` takes checkpoints of every layout."""

    def __init__(self) -> None:
        super().__init__()
        adopt_checkpoints(self)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Says for images of which size the model is meant, as timm's transforms ask it; the models
        themselves take any (but vitrpb, whose window this sets).
        """
        if patch_size is not None:
            raise ValueError(f"patches of a model keep their size, got patch_size={patch_size}")
        if img_size is not None and getattr(self, "pretrained_cfg", None):
            self.pretrained_cfg = self.default_cfg = {
                **self.pretrained_cfg,
                **for_size(self.pretrained_cfg, img_size),
            }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return without_decay(self)

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
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what follows an "and")
            if is_list(x):
                found = [self.head(features[None], pre_logits=pre_logits) for features in x]
                return torch.cat(found) if self.global_pool else [part[0] for part in found]
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Hierarchy(Classifier):
    """What timm asks of a model with `patch_embed`, `levels` of `NeighborhoodStage`, and `norm`."""

    @torch.jit.ignore
    def _features_of_list(self, images: Any) -> Any:
        """`forward_features` of images of different sizes."""
        x, layout = pack_images(self.patch_embed, images)
        for level in self.levels:
            x, layout = level(x, layout=layout)
        return layout.unpack(self.norm(x))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return depth_groups(coarse)

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


def build_model(
    cls: Callable[..., Model],
    variant: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    *,
    feature_cls: str = "list",
    **kwargs: Any,
) -> Model:
    """Builds a registered model with timm.

    Args:
        cls: the model.
        variant: its registered name.
        pretrained: load weights.
        defaults: the variant's arguments.
        feature_cls: how features are extracted (`features_only=True`): as timm names it, or "dense"
            for a `NeighborhoodBackbone` with a norm for each output, `[B, C, H, W]`, and
            `frozen_stages`.
        kwargs: the caller's arguments, which override the defaults.

    Raises:
        FileNotFoundError: `pretrained_cfg_overlay` names a file that does not exist.
        RuntimeError: released weights could not be downloaded.
        ValueError: it names one that is no checkpoint, is truncated, or would run code when loaded.
    """
    arguments = {**defaults, **kwargs}
    overlay = dict(arguments.pop("pretrained_cfg_overlay", None) or {})
    if pretrained and overlay.get("file") and not overlay.get("state_dict"):
        overlay["state_dict"] = read_checkpoint(overlay["file"])
    img_size = arguments.get("img_size")
    if img_size is not None:
        overlay.update(for_size(get_pretrained_cfg(variant).to_dict(), img_size))
        if "img_size" not in inspect.signature(cls).parameters:
            del arguments["img_size"]
    depths = arguments.get("depths", ())
    out_indices = arguments.pop("out_indices", None) or tuple(range(len(depths) or 4))
    if feature_cls == "dense" and arguments.pop("features_only", False):
        arguments = {**arguments, "num_classes": 0, "out_indices": out_indices}
        cls = partial(dense, cls)
    try:
        model = build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(
                out_indices=out_indices, flatten_sequential=True, feature_cls=feature_cls
            ),
            **arguments,
        )
    except URLError as error:
        raise RuntimeError(
            f"the weights of {variant} could not be downloaded ({error.reason}): without a "
            "network, give a file of them, pretrained_cfg_overlay=dict(file=...)"
        ) from error
    if arguments.get("features_only"):
        adopt_checkpoints(model)  # timm's wrapper has other keys than the model in it
    # The configuration travels with the model: it shall not keep the checkpoint alive.
    for holder in (model, getattr(model, "model", None)):
        if isinstance(getattr(holder, "pretrained_cfg", None), dict):
            holder.pretrained_cfg.pop("state_dict", None)
    return model


def dense(
    cls: Callable[..., nn.Module],
    out_indices: Sequence[int],
    frozen_stages: int = -1,
    norm_layer: Layer = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> NeighborhoodBackbone:
    """The backbone of a detector or segmenter, with the levels of a classifier.

    Raises:
        ValueError: a model without levels.
    """
    model = cls(norm_layer=norm_layer, device=device, dtype=dtype, **kwargs)
    if not isinstance(model, Hierarchy):
        raise ValueError(f"feature_cls='dense' needs levels, which {type(model).__name__} has not.")
    backbone = NeighborhoodBackbone.of(
        model.patch_embed,
        model.levels,
        norm_layer=layers(norm_layer, None)[0],
        out_indices=out_indices,
        frozen_stages=frozen_stages,
        channels_first=True,
        device=device,
        dtype=dtype,
    )
    backbone.feature_info = FeatureInfo(model.feature_info, tuple(backbone.out_indices))
    adopt_checkpoints(backbone)
    return backbone


def init_weights(module: nn.Module, weight_init: str = "") -> None:
    """Truncated normal weights (std 0.02) and zero biases, as in the released code.

    That is for wide models: in narrow ones branches would begin too faint to learn. These take
    `weight_init="xavier"`.

    Raises:
        ValueError: another weight_init.
    """
    if weight_init not in ("", "xavier"):
        raise ValueError(f"weight_init must be '' or 'xavier', got {weight_init!r}")
    if isinstance(module, nn.Linear):
        if weight_init:
            nn.init.xavier_uniform_(module.weight)
        else:
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
