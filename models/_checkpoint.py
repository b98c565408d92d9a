"""Checkpoints: building models from them, and their layouts.

Three layouts of the same weights:

- "natten": ours, timm's conventions. The downsampler opens a level (`levels.1.downsample`), the
classifier is `head.fc`.
- "original": the released checkpoints'. The downsampler closes a level (`levels.0.downsample`), the
classifier is `head`;
  DiNAT_s calls its levels `layers`.
- "huggingface": transformers' DiNAT and Nat. Separate query, key and value, both layer scales in
one tensor.

Converting never changes a weight: a tensor is renamed, split, stacked or, where a table is kept in
    the opposite order, flipped.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import build_model_with_cfg
from timm.models._helpers import clean_state_dict
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

LAYOUTS = ("natten", "original", "huggingface")

StateDict = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"


def packaged_weights(name: str) -> str | None:
    """Path of the weights of `name` ("model.tag") in the package, None where there are none."""
    path = WEIGHTS / f"{name}.safetensors"
    return str(path) if path.is_file() else None


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
        feature_cls: how timm extracts features (`features_only=True`).
        kwargs: the caller's arguments, which override the defaults.

    Raises:
        FileNotFoundError: `pretrained_cfg_overlay` names a file that does not exist.
        ValueError: it names one that is no checkpoint, is truncated, or would run code when loaded.
    """
    arguments = {**defaults, **kwargs}
    overlay = dict(arguments.pop("pretrained_cfg_overlay", None) or {})
    if pretrained and overlay.get("file") and not overlay.get("state_dict"):
        overlay["state_dict"] = read_checkpoint(overlay["file"])
    depths = arguments.get("depths", ())
    out_indices = arguments.pop("out_indices", None) or tuple(range(len(depths) or 4))
    model = build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True, feature_cls=feature_cls),
        **arguments,
    )
    # The configuration travels with the model: it shall not keep the checkpoint alive.
    for holder in (model, getattr(model, "model", None)):
        if isinstance(getattr(holder, "pretrained_cfg", None), dict):
            holder.pretrained_cfg.pop("state_dict", None)
    return model


def read_checkpoint(path: str | Path) -> StateDict:
    """Reads a state dict from a `.safetensors` file or from one of `torch.save`; nothing in the
    file is executed.

    Of a training checkpoint, the averaged weights (`state_dict_ema`, `model_ema`) are taken if it
    has them, else `state_dict` or `model`. Prefixes of DistributedDataParallel and torch.compile
    are removed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no checkpoint, or it asks for more than tensors (such a
            pickle can run any code).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            checkpoint: Any = load_file(path, device="cpu")
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or it needs more than tensors and plain containers "
            "to load, which could run any code. Save its state dict alone, best as .safetensors. "
            f"({_first_line(error)})"
        ) from error
    except Exception as error:
        # Of damaged files torch's unpickler raises whatever it stumbles over.
        raise ValueError(
            f"{path} is truncated, or not a checkpoint of this kind: {_first_line(error)}"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise ValueError(f"{path} holds no state dict, but {type(checkpoint).__name__}.")
    tensors = {k: v for k, v in clean_state_dict(checkpoint).items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; its keys begin with {list(checkpoint)[:3]}.")
    return tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def detect_layout(state_dict: Mapping[str, Any]) -> str:
    """ "natten", "original" or "huggingface", by the keys.

    Raises:
        ValueError: none of them.
    """
    keys = list(state_dict)
    if any(re.match(r"(dinat|nat)\.|(embeddings|encoder|hidden_states_norms)\.", k) for k in keys):
        return "huggingface"
    if not any(k.startswith("patch_embed.") for k in keys):
        raise ValueError(
            f"the keys are of none of the layouts {', '.join(LAYOUTS)}: {', '.join(keys[:4])}, ..."
        )
    original = re.compile(
        r"head\.(weight|bias)$|levels\.0\.downsample\.|layers\.\d+\.(blocks|downsample)\.|.*relative_position_index$"
    )
    return "original" if any(original.match(k) for k in keys) else "natten"


# One entry is (keys there, keys here): what a rule of a layout joins or splits.
Move = tuple[tuple[str, ...], tuple[str, ...]]


def convert(
    state_dict: Mapping[str, Tensor], layout: str, *, prefix: str = "dinat"
) -> tuple[StateDict, list[Move]]:
    """Converts a state dict of any layout to `layout`.

    Args:
        state_dict: weights of a NAT, DiNAT, DiNAT_s or isotropic model.
        layout: "natten", "original" or "huggingface" (NAT and DiNAT alone, the others are not in
            transformers).
        prefix: of the keys in the Hugging Face layout: "dinat" or "nat".

    Returns:
        The new state dict, which shares memory with the old where it can, and for the report the
        moves: pairs of a tuple of source keys and the tuple of keys they became, none for tensors
        that the layout computes by itself.

    Raises:
        ValueError: an unknown layout, or a model that the layout cannot express.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    source = detect_layout(state_dict)
    if source == layout:
        return dict(state_dict), [((key,), (key,)) for key in state_dict]
    moves: list[Move]
    if source == "natten":
        native, moves = dict(state_dict), [((key,), (key,)) for key in state_dict]
    elif source == "original":
        native, moves = _from_original(state_dict)
    else:
        native, moves = _from_huggingface(state_dict)
    if layout == "original":
        converted, further = _to_original(native)
    elif layout == "huggingface":
        converted, further = _to_huggingface(native, prefix)
    else:
        return native, moves
    return converted, _compose(moves, further)


def _compose(first: list[Move], second: list[Move]) -> list[Move]:
    origin = {new: old for old, news in first for new in news}
    composed = []
    for old, new in second:
        sources = [source for key in old for source in origin.get(key, ())]
        composed.append((tuple(dict.fromkeys(sources)), new))
    return composed + [(old, ()) for old, new in first if not new]


def _rename(
    state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]
) -> tuple[StateDict, list[Move]]:
    renamed: StateDict = {}
    moves: list[Move] = []
    for key, tensor in state_dict.items():
        new = rename(key)
        moves.append(((key,), () if new is None else (new,)))
        if new is not None:
            renamed[new] = tensor
    return renamed, moves


def _shift_downsample(key: str, by: int) -> str:
    return re.sub(
        r"^levels\.(\d+)\.downsample\.",
        lambda match: f"levels.{int(match[1]) + by}.downsample.",
        key,
    )


def _from_original(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[Move]]:
    def rename(key: str) -> str | None:
        if key.endswith("relative_position_index"):
            return None  # a constant of the grid
        key = re.sub(r"^layers\.(\d+)\.(blocks|downsample)\.", r"levels.\1.\2.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        return _shift_downsample(key, 1)

    native, moves = _rename(state_dict, rename)
    for key, index in state_dict.items():
        # Our tables go by key - query. With the difference the other way round, the first query
        # finds the last key in the first entry of the table, not in the last.
        if key.endswith("relative_position_index"):
            tokens = round(index.numel() ** 0.5)
            if index.flatten()[tokens - 1] == 0:
                rpb = key[: -len("relative_position_index")] + "rpb"
                native[rpb] = native[rpb].flip(-2, -1)
    return native, moves


def _to_original(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[Move]]:
    # One convolution as the stem of a model with levels: DiNAT_s, whose levels are called layers.
    layers = "patch_embed.proj.weight" in state_dict

    def rename(key: str) -> str:
        key = _shift_downsample(re.sub(r"^head\.fc\.", "head.", key), -1)
        return re.sub(r"^levels\.", "layers.", key) if layers else key

    converted, moves = _rename(state_dict, rename)
    for key in list(converted):
        # vitrpb: the released checkpoints hold the index that spreads the bias table over a square
        # grid.
        if layers and re.match(r"layers\.\d+\.attn\.rpb$", key):
            size = (converted[key].shape[-1] + 1) // 2
            if size % 2 == 0:
                index = key[: -len("rpb")] + "relative_position_index"
                converted[index] = _relative_position_index(size)
                moves.append(((), (index,)))
    return converted, moves


def _relative_position_index(size: int) -> Tensor:
    axis = torch.arange(size)
    difference = axis[None, :] - axis[:, None] + size - 1  # [query, key]
    rows = difference[:, None, :, None] * (2 * size - 1)
    return (rows + difference[None, :, None, :]).reshape(size * size, size * size)


_HUGGINGFACE = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"encoder.levels.\1.layers.\2."),
    (r"^levels\.(\d+)\.downsample\.", r"encoder.levels.\1.downsample."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)
# The same rules backwards; the more special ones of two that match first.
_HUGGINGFACE_BACK = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def _apply_rules(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _require(state_dict: Mapping[str, Tensor], keys: list[str]) -> None:
    """Raise ValueError if a tensor is missing that another is joined with."""
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise ValueError(f"the checkpoint is not complete: it lacks {', '.join(missing)}")


def _to_huggingface(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[StateDict, list[Move]]:
    if prefix not in ("dinat", "nat"):
        raise ValueError(f"prefix must be 'dinat' or 'nat', got {prefix!r}.")
    if "patch_embed.proj.0.weight" not in state_dict:
        raise ValueError(
            "transformers has NAT and DiNAT alone (two convolutions as the stem); "
            "this state dict is of DiNAT_s or of an isotropic model."
        )
    converted: StateDict = {}
    moves: list[Move] = []
    for key, tensor in state_dict.items():
        if key.startswith("head.fc."):
            names: list[tuple[str, Tensor]] = [(key.replace("head.fc.", "classifier."), tensor)]
        elif key.endswith(".gamma2"):
            # Stacked with gamma1.
            _require(state_dict, [key[:-1] + "1"])
            continue
        elif key.endswith(".gamma1"):
            other = key[:-1] + "2"
            _require(state_dict, [other])
            name = _apply_rules(key[: -len("gamma1")], _HUGGINGFACE) + "layer_scale_parameters"
            converted[f"{prefix}.{name}"] = torch.stack([tensor, state_dict[other]])
            moves.append(((key, other), (f"{prefix}.{name}",)))
            continue
        elif match := re.match(r"(.*)\.attn\.qkv\.(weight|bias)$", key):
            block = _apply_rules(match[1] + ".", _HUGGINGFACE)
            names = [
                (f"{prefix}.{block}attention.self.{part}.{match[2]}", chunk)
                for part, chunk in zip(("query", "key", "value"), tensor.chunk(3))
            ]
        else:
            names = [(f"{prefix}.{_apply_rules(_shift_downsample(key, -1), _HUGGINGFACE)}", tensor)]
        converted.update(names)
        moves.append(((key,), tuple(name for name, _ in names)))
    return converted, moves


def _from_huggingface(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[Move]]:
    converted: StateDict = {}
    moves: list[Move] = []
    for full, tensor in state_dict.items():
        key = re.sub(r"^(dinat|nat)\.", "", full)
        if key.startswith("classifier."):
            new = (key.replace("classifier.", "head.fc."),)
            converted[new[0]] = tensor
        elif match := re.match(r"hidden_states_norms\.stage(\d+)\.(weight|bias)$", key):
            new = (f"norm{int(match[1]) - 1}.{match[2]}",)
            converted[new[0]] = tensor
        elif key.endswith("layer_scale_parameters"):
            block = _apply_rules(key[: -len("layer_scale_parameters")], _HUGGINGFACE_BACK)
            new = (f"{block}gamma1", f"{block}gamma2")
            converted.update(zip(new, tensor.unbind(0)))
        elif match := re.match(r"(.*\.)attention\.self\.(query|key|value)\.(weight|bias)$", key):
            if match[2] != "query":
                # Joined with the query.
                _require(state_dict, [full.replace(f".{match[2]}.", ".query.")])
                continue
            parts = [full.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            _require(state_dict, parts)
            new = (f"{_apply_rules(match[1], _HUGGINGFACE_BACK)}attn.qkv.{match[3]}",)
            converted[new[0]] = torch.cat([state_dict[part] for part in parts])
            moves.append((tuple(parts), new))
            continue
        else:
            new = (_shift_downsample(_apply_rules(key, _HUGGINGFACE_BACK), 1),)
            converted[new[0]] = tensor
        moves.append(((full,), new))
    return converted, moves


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Makes a checkpoint of any layout fit `model`: keys to ours, bias tables to the model's
    windows.

    Applying it twice changes nothing more. Norms of detection backbones (`norm0` to `norm3`), for
    which the classifier has no place, are dropped with a warning.
    """
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    native, _ = convert(state_dict, "natten")
    backbone = [key for key in native if re.match(r"norm\d+\.", key)]
    if backbone:
        _logger.warning("dropped the norms of a detection backbone: %s", ", ".join(backbone))
    wanted = model.state_dict()
    return {
        key: resize_bias(tensor, wanted[key].shape)
        if key.endswith(".rpb") and key in wanted
        else tensor
        for key, tensor in native.items()
        if key not in backbone
    }


def resize_bias(rpb: Tensor, shape: torch.Size) -> Tensor:
    """Resizes a table of relative position biases, `[heads, 2k-1, 2k-1]`, to another window,
    bicubically.
    """
    if rpb.shape == shape or rpb.shape[0] != shape[0] or rpb.dim() != 3:
        return rpb
    resized = F.interpolate(
        rpb.float()[None], size=tuple(shape[1:]), mode="bicubic", align_corners=False
    )
    return resized[0].to(rpb.dtype)
