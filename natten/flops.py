"""Floating-point operations of neighborhood attention, from its windows: borders and causal windows
count what they are, not kernel_size.

``torch.utils.flop_counter.FlopCounterMode`` knows the operators of this package as soon as both are
imported. A multiply-add is two operations there, a backward pass counts its recomputed scores, and
softmax counts nothing. fvcore counts multiply-adds, and needs :func:`add_natten_handle`.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import islice, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from natten.functional.call import (
    NUM_TENSORS,
    Parameters,
    Tensors,
    decode_grids,
    decode_window,
    separated,
)
from natten.functional.geometry import count_pairs
from natten.functional.problem import Grids
from natten.window import Axis

_COUNTER = "torch.utils.flop_counter"


def _readable(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _features(tensors: Tensors) -> tuple[int, int]:
    """head_dim and head_dim_v."""
    query, _, value, *_ = tensors
    return query.shape[-1], query.shape[-1] if value is None else value.shape[-1]


def _separated(tensors: Tensors, parameters: Parameters) -> Tensors:
    return Tensors(*separated(tensors, parameters.heads_kv), *tensors[3:])


def _pairs(tensors: Tensors, parameters: Parameters) -> tuple[int, int]:
    """Pairs of a call of the operator: with keys of the grid, and with additional keys."""
    query, key = tensors.query, tensors.key
    cumulative_q, cumulative_kv = tensors.cumulative_seqlen_q, tensors.cumulative_seqlen_kv
    batch, heads = query.shape[0], query.shape[-2]
    query_shape = tuple(query.shape[1:-2])
    key_shape = query_shape if key is None else tuple(key.shape[1:-2])
    grids = decode_grids(parameters.window)
    if grids is not None:
        return _pairs_of_grids(tensors, *grids)
    window = decode_window(parameters.window, query_shape, key_shape)
    repeats = batch * heads
    if cumulative_q is not None and cumulative_kv is not None:
        if _readable(cumulative_q):
            ends = [pairwise(c.tolist()) for c in (cumulative_q, cumulative_kv)]
            sequences = [(b - a, d - c) for (a, b), (c, d) in zip(*ends, strict=True)]
        else:
            # The largest that it can be.
            longest = (parameters.max_seqlen_q, parameters.max_seqlen_kv)
            sequences = [longest] * (cumulative_q.shape[0] - 1)
        total = 0
        for q, kv in sequences:
            if q and kv:
                length = max(q, kv)
                axis = Axis(length, length, 1, 1, window.is_causal[0])
                total += count_pairs((axis,), (q,), (kv,))
        return repeats * total, 0
    origins = window.query_origin, window.key_origin
    in_grid = count_pairs(window.axes, query_shape, key_shape, *origins)
    return repeats * in_grid, heads * prod(query_shape) * sum(_additional(tensors, batch))


def _additional(tensors: Tensors, entries: int) -> list[int]:
    """How many additional keys each entry has, as far as that is known."""
    if tensors.additional_keys is None:
        return [0] * entries
    extra, lengths = tensors.additional_keys.shape[1], tensors.additional_lengths
    if lengths is not None and _readable(lengths):
        return [min(max(length, 0), extra) for length in lengths.tolist()]
    return [extra] * entries


def _pairs_of_grids(
    tensors: Tensors, grids: Grids, is_causal: Sequence[bool], is_circular: Sequence[bool]
) -> tuple[int, int]:
    """`_pairs` of grids of different sizes."""
    heads, rings = tensors.query.shape[-2], is_circular or (False,) * len(is_causal)
    lengths = iter(_additional(tensors, grids.number))
    in_grid = extra = 0
    for grid, count in grids.runs:
        axes = tuple(map(Axis, *grid, is_causal, rings))
        in_grid += count * count_pairs(axes) if grid.tokens else 0
        extra += grid.tokens * sum(islice(lengths, count))
    return heads * in_grid, heads * extra


def attention_flops(*arguments: Any, **_: Any) -> int:
    """FLOPs of natten::neighborhood_attention, by the arguments of its schema."""
    parameters = Parameters(*arguments[NUM_TENSORS:])
    tensors = _separated(Tensors(*arguments[:NUM_TENSORS]), parameters)
    return 2 * sum(_pairs(tensors, parameters)) * sum(_features(tensors))


def attention_backward_flops(*arguments: Any, **_: Any) -> int:
    """FLOPs of natten::neighborhood_attention_backward: scores again, the gradient of the weights,
    and the gradients that are asked for.
    """
    *numbers, needs = arguments[4 + NUM_TENSORS :]
    parameters = Parameters(*numbers)
    given = Tensors(*arguments[2 : 2 + NUM_TENSORS])
    tensors = _separated(given, parameters)
    if given.key is None:
        needs = [needs[0]] * 3 + list(needs[3:])
    head_dim, head_dim_v = _features(tensors)
    total = 0
    for pairs, k, v in zip(_pairs(tensors, parameters), (1, 4), (2, 5), strict=True):
        features = head_dim + head_dim_v
        features += head_dim * (needs[0] + needs[k]) + head_dim_v * needs[v]
        total += 2 * pairs * features
    return total


def float8_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
    """FLOPs of natten::float8_attention: of as many products as in 16 bits."""
    window = tuple(rest[3])
    parameters = Parameters(0, window, 1.0, 0.0, 0, 0, "", "", False)
    return attention_flops(query, key, value, *[None] * (NUM_TENSORS - 3), *parameters)


def window_flops(first: Tensor, second: Tensor, *window: Any, **_: Any) -> int:
    """FLOPs of natten::window_dot, window_sum and window_scatter."""
    batch, heads, *tokens, features = second.shape
    *sizes, is_causal = window[:4]
    axes = tuple(map(Axis, tokens, *sizes, map(bool, is_causal)))
    return 2 * batch * heads * count_pairs(axes) * features


def _formulas() -> dict[str, Callable[..., int]]:
    return {
        "neighborhood_attention": attention_flops,
        "neighborhood_attention_traced": attention_flops,
        "neighborhood_attention_backward": attention_backward_flops,
        "float8_attention": float8_flops,
        "window_dot": window_flops,
        "window_sum": window_flops,
        "window_scatter": window_flops,
    }


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _formulas().items():
        operator = getattr(torch.ops.natten, name)
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(_without_result(formula))


def _without_result(formula: Callable[..., int]) -> Callable[..., int]:
    def count(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        return formula(*arguments, **named)

    return count


class _Registrar(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported, which itself takes as long as all
    of this package.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make torch's FlopCounterMode count our operators, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


def _constant(value: Any) -> Any:
    """What a value of a traced graph holds: a tensor of its shape on no device, or a constant."""
    if value.type().kind() == "TensorType":
        return torch.empty(value.type().sizes() or (), device="meta")
    if value.node().kind() == "prim::ListConstruct":
        return [_constant(v) for v in value.node().inputs()]
    return value.toIValue()


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return formula(*map(_constant, inputs)) // 2

    return handle


def add_natten_handle(flop_counter: Any) -> Any:
    """Make an fvcore ``FlopCountAnalysis`` count our operators; returns it."""
    handles = {f"natten::{name}": _handle(formula) for name, formula in _formulas().items()}
    free = dict.fromkeys(("natten::window_bias", "natten::window_bias_sum"))
    return flop_counter.set_op_handle(**handles, **free)


def get_flops(model: torch.nn.Module, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of ``model(input)``, counted by fvcore.

    Raises:
        RuntimeError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise RuntimeError(
            "get_flops counts with fvcore, which is not installed (pip install fvcore); "
            "torch.utils.flop_counter.FlopCounterMode counts without it"
        ) from error
    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False)
    return int(counter.total())


def _qk_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of an unfused QK of older versions, with fvcore's arguments of a handle."""
    return prod(inputs[0].type().sizes()) * outputs[0].type().sizes()[-1]


def _av_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of an unfused AV of older versions, with fvcore's arguments of a handle."""
    return prod(outputs[0].type().sizes()) * inputs[0].type().sizes()[-1]


qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = _qk_flop
av_1d_flop = av_2d_flop = av_3d_flop = _av_flop

__all__ = [
    "add_natten_handle",
    "attention_backward_flops",
    "attention_flops",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "count_pairs",
    "float8_flops",
    "get_flops",
    "qk_1d_rpb_flop",
    "qk_2d_rpb_flop",
    "qk_3d_rpb_flop",
    "register",
    "window_flops",
]
