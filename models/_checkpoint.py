"""Checkpoints: files of them, and their layouts.

Three layouts of the same weights:

- "natten": ours, timm's conventions. The downsampler opens a level (`levels.1.downsample`), the
  classifier is `head.fc`.
- "original": the released checkpoints'. The downsampler closes a level (`levels.0.downsample`), the
  classifier is `head`; DiNAT_s calls its levels `layers`.
- "huggingface": transformers' DiNAT and Nat. Separate query, key and value, both layer scales in
  one tensor.

Each of them may be a part of a larger network, as in checkpoints of detectors and segmenters: what
stands before `patch_embed` is taken for the name of the backbone there.

Converting never changes a weight: a tensor is renamed, split, stacked or, where a table is kept in
the opposite order, flipped.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models._helpers import clean_state_dict
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

LAYOUTS = ("natten", "original", "huggingface")

StateDict = dict[str, Tensor]

WEIGHTS = Path(__file__).parent / "weights"


def packaged_weights(name: str) -> str | None:
    """Path of the weights of `name` ("model.tag") in the package, None where there are none."""
    path = WEIGHTS / f"{name}.safetensors"
    return str(path) if path.is_file() else None


def read_checkpoint(path: str | Path) -> StateDict:
    """Reads a state dict from a `.safetensors` file or from one of `torch.save`; nothing in the
    file is executed.

    Of a training checkpoint, the averaged weights (`state_dict_ema`, `model_ema`) are taken if it
    has them, else `state_dict` or `model`. Prefixes of DistributedDataParallel and torch.compile
    are removed. Besides tensors, it may hold what training scripts store: arguments, paths, numbers
    of numpy.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no checkpoint, or it asks for more than tensors (such a
            pickle can run any code).
    """
    checkpoint = read_file(path)
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


def read_file(path: str | Path) -> Any:
    """All that a checkpoint holds, read as `read_checkpoint` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
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


# What training scripts store beside weights, none of which can run code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *(pathlib.PosixPath, pathlib.PurePosixPath),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
    # Where numpy's scalars are made has moved; their pickles say where.
    np.float64(0).__reduce__()[0],
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# The tokenizer's first convolutions, which every layout has and little else is called like.
_TOKENIZER = re.compile(r"(.*?)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.")


def _without_wrapper(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[Move]]:
    """The backbone of a larger network: its keys without the name that it has there.

    Raises:
        ValueError: there are several backbones.
    """
    names = {match[1] for match in map(_TOKENIZER.match, state_dict) if match}
    if len(names) > 1:
        listed = ", ".join(map(repr, sorted(names)))
        raise ValueError(
            f"the checkpoint holds several backbones, under {listed}: pass the keys of one of them."
        )
    name = "".join(names)
    # transformers keep the classifier, and norms of a backbone, beside it.
    beside = ("classifier.", "hidden_states_norms.") if name in ("dinat.", "nat.") else ()
    kept: dict[str, Any] = {}
    moves: list[Move] = []
    for key, value in state_dict.items():
        inside = key.startswith(name)
        new = ()
        if inside or key.startswith(beside):
            new = (key[len(name) :] if inside else key,)
            kept[new[0]] = value
        moves.append(((key,), new))
    return kept, moves


def detect_layout(state_dict: Mapping[str, Any]) -> str:
    """ "natten", "original" or "huggingface", by the keys.

    Raises:
        ValueError: none of them.
    """
    keys = list(_without_wrapper(state_dict)[0])
    if any(re.match(r"(embeddings|encoder|hidden_states_norms)\.", k) for k in keys):
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
        that the layout computes by itself or that belong to no backbone.

    Raises:
        ValueError: an unknown layout, or a model that the layout cannot express.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    source = detect_layout(state_dict)
    if source == layout == "huggingface":  # where the prefix is a part of the layout
        return dict(state_dict), [((key,), (key,)) for key in state_dict]
    native, moves = _without_wrapper(state_dict)
    if source == layout:
        return native, moves
    if source != "natten":
        native, further = (_from_original if source == "original" else _from_huggingface)(native)
        moves = _compose(moves, further)
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
    for key, tensor in state_dict.items():
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
                _require(state_dict, [key.replace(f".{match[2]}.", ".query.")])
                continue
            parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            _require(state_dict, parts)
            new = (f"{_apply_rules(match[1], _HUGGINGFACE_BACK)}attn.qkv.{match[3]}",)
            converted[new[0]] = torch.cat([state_dict[part] for part in parts])
            moves.append((tuple(parts), new))
            continue
        else:
            new = (_shift_downsample(_apply_rules(key, _HUGGINGFACE_BACK), 1),)
            converted[new[0]] = tensor
        moves.append(((key,), new))
    return converted, moves


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Makes a checkpoint of any layout fit `model`: keys to its own, bias tables to its windows.

    `model` is one of this package, what timm makes of it with `features_only=True`, or a
    `natten.nn.NeighborhoodBackbone`. Applying it twice changes nothing more. Norms of detection and
    segmentation backbones are dropped with a warning where the model has no place for them.

    Raises:
        ValueError: the keys are of no layout, or of no model like this one.
    """
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    wanted = model.state_dict()
    fitted: StateDict = {}
    dropped = []
    biases = []
    for key, tensor in convert(state_dict, "natten")[0].items():
        place = _place_of(key, wanted)
        if re.match(r"norms?\.?\d+\.", key) and place not in wanted:
            dropped.append(key)
        elif (
            key.endswith(".rpb")
            and place.replace("attn.rpb", "norm1.weight") in wanted
            and (place not in wanted)
        ):
            biases.append(key)
        elif place in wanted or not _is_of_classifier(key, wanted):
            if place in wanted:
                tensor = _inflate(tensor, wanted[place].shape)
                if place.endswith(".rpb"):
                    tensor = resize_bias(tensor, wanted[place].shape)
            fitted[place] = tensor
    if biases:
        _logger.warning(
            "dropped relative position biases, for which the model was built without "
            "rel_pos_bias=True: %s, ...",
            biases[0],
        )
    if dropped:
        _logger.warning(
            "dropped the norms of a detection or segmentation backbone: %s; "
            "create_model(..., features_only=True, feature_cls='dense') has them",
            ", ".join(dropped),
        )
    if not wanted.keys() & fitted.keys():
        raise ValueError(
            f"no key of the checkpoint fits the {type(model).__name__}: it has "
            f"{', '.join(list(fitted)[:3])}, ..., the model {', '.join(list(wanted)[:3])}, ..."
        )
    return fitted


def _inflate(tensor: Tensor, shape: torch.Size) -> Tensor:
    """An image model's tensor for a video model, whose parameters have one more axis, for time,
    behind the channels of a convolution and the heads of a bias table.

    Frames share what one had (https://arxiv.org/abs/1705.07750): convolutions as a mean over them,
    and biases, which a softmax does not add up, as they are.
    """
    if tensor.dim() == 4 and len(shape) == 5:
        return tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    if tensor.dim() == 3 and len(shape) == 4:
        return tensor.unsqueeze(1).expand(-1, shape[1], -1, -1)
    return tensor


def _place_of(key: str, wanted: Mapping[str, Any]) -> str:
    """The key in a model with the keys `wanted` of one of this package's layout."""
    key = re.sub(r"^norm(\d+)\.", r"norms.\1.", key)
    flat = re.sub(r"^(levels|layers)\.(\d+)\.", r"\1_\2.", key)
    for candidate in (key, flat, f"model.{key}"):
        if candidate in wanted:
            return candidate
    return key


def _is_of_classifier(key: str, wanted: Mapping[str, Any]) -> bool:
    """Whether only a classifier has the key, and `wanted` are those of extracted features."""
    return key.startswith(("head.", "norm.")) and not any("head." in k for k in wanted)


def adopt_checkpoints(model: nn.Module) -> None:
    """Lets `model.load_state_dict` take every layout that `checkpoint_filter_fn` does.

    A state dict of which nothing fits is an error, with `strict=False` too.
    """
    model.register_load_state_dict_pre_hook(_adopt)


def _adopt(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    wanted = model.state_dict().keys()
    if not own or own.keys() <= wanted or wanted <= own.keys():
        return
    try:
        fitted = checkpoint_filter_fn(own, model)
    except ValueError as error:
        # In a larger network, the rest of the state dict may fit.
        if not prefix:
            error_msgs.append(str(error))
        return
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: tensor for key, tensor in fitted.items()})


def resize_bias(rpb: Tensor, shape: torch.Size) -> Tensor:
    """Resizes a table of relative position biases, `[heads, ..., 2k-1, 2k-1]`, to another window,
    bicubically; not along the axes in between.
    """
    if rpb.shape == shape or rpb.shape[:-2] != shape[:-2] or rpb.dim() < 3:
        return rpb
    resized = F.interpolate(
        rpb.float().flatten(0, -3)[None], size=shape[-2:], mode="bicubic", align_corners=False
    )
    return resized[0].unflatten(0, rpb.shape[:-2]).to(rpb.dtype)
