"""Neighborhood attention in two steps, with the scores in between.

    scores = na2d_qk(query * scale, key, kernel_size)
    out = na2d_av(scores.softmax(dim=-1), value, kernel_size)

:func:`natten.na2d` computes the same in one kernel, without the scores in memory. The two steps are
for whatever has to see or change the scores or the weights, and for weights that no softmax made.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natten import validation
from natten.functional.operators import autocast, autocast_dtype
from natten.functional.ranks import without_rank
from natten.functional.window_products.operators import window_bias, window_dot, window_sum
from natten.types import BoolOrSequence, IntOrSequence


def _check_grid(name: str, tensor: Tensor, rank: int) -> None:
    validation.check_is_tensor(name, tensor)
    if tensor.dim() != rank + 3:
        raise ValueError(
            f"{name} must have {rank + 3} dimensions, [batch, heads, {rank} of tokens, features], "
            f"got shape {tuple(tensor.shape)}"
        )


def _check_match(name: str, tensor: Tensor, expected: tuple[int | None, ...], like: Tensor) -> None:
    """``expected`` has None where any extent will do."""
    validation.check_is_tensor(name, tensor)
    if tensor.dim() != len(expected) or any(
        e is not None and n != e for n, e in zip(tensor.shape, expected)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as the other tensors are, got "
            f"{tensor.dtype} on {tensor.device}"
        )


def _cast(*tensors: Tensor | None) -> list[Any]:
    dtype = autocast_dtype(tensors[0])
    return list(tensors) if dtype is None else autocast(dtype, *tensors)


def _halos(
    is_circular: Any, tokens: tuple[int, ...], *window: tuple[Any, ...]
) -> list[tuple[int, int]]:
    """Tokens before and behind each axis with which windows need not wrap around; [] without
    circular axes."""
    rings = validation.check_circular(is_circular, tokens, *window)
    kernel_size, stride, dilation, _ = window
    # Whole strides and dilation groups, so that windows stay where they are.
    return [
        (-(-k // s) * s * d, k * d) if is_ring else (0, 0)
        for is_ring, k, s, d in zip(rings, kernel_size, stride, dilation)
    ]


def _around(tensor: Tensor, halos: list[tuple[int, int]]) -> Tensor:
    """``[batch, heads, *tokens, features]`` with the tokens of its halos."""
    for dim, (before, behind) in enumerate(halos, 2):
        if before:
            first = tensor.narrow(dim, tensor.shape[dim] - before, before)
            tensor = torch.cat([first, tensor, tensor.narrow(dim, 0, behind)], dim)
    return tensor


def _inside(tensor: Tensor, halos: list[tuple[int, int]], tokens: Sequence[int]) -> Tensor:
    """The inverse."""
    for dim, ((before, _), length) in enumerate(zip(halos, tokens), 2):
        if before:
            tensor = tensor.narrow(dim, before, length)
    return tensor


def window_scores(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrSequence,
    dilation: IntOrSequence | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrSequence | None = False,
    rpb: Tensor | None = None,
    *,
    stride: IntOrSequence | None = 1,
    is_circular: BoolOrSequence | None = False,
) -> Tensor:
    """na1d_qk, na2d_qk and na3d_qk: ``rank`` says which."""
    query, key, additional_keys = _cast(query, key, additional_keys)
    _check_grid("query", query, rank)
    _check_match("key", key, tuple(query.shape), query)
    batch, heads, *tokens, features = query.shape
    kernel, strides, dilations, causal = validation.check_window(
        tuple(tokens), kernel_size, stride, dilation, is_causal
    )
    halos = _halos(is_circular, tuple(tokens), kernel, strides, dilations, causal)
    window = (kernel, strides, dilations, [int(c) for c in causal])
    empty = -torch.inf if any(causal) else 0.0
    scores = window_dot(_around(query, halos), _around(key, halos), *window, empty)
    if rpb is not None:
        # Heads come last where the other functions of this package have them.
        validation.check_rpb(rpb, query.movedim(1, -2), kernel, causal)
        scores = scores + window_bias(rpb.to(scores.dtype), scores.shape[2:-1], *window)
    scores = _inside(scores, halos, tokens)
    if additional_keys is not None:
        _check_match("additional_keys", additional_keys, (batch, heads, None, features), query)
        more = query.flatten(2, -2) @ additional_keys.transpose(-2, -1)
        scores = torch.cat([scores, torch.unflatten(more, 2, tokens)], dim=-1)
    return scores


def _of_one_batch(
    first_name: str, first: Tensor, second_name: str, second: Tensor
) -> tuple[Tensor, Tensor]:
    """Both with the same batch size; a batch of 1 goes with any."""
    # Nothing is done where nothing has to be: a compiler or tracer would keep the size.
    if first.shape[0] == second.shape[0]:
        return first, second
    if second.shape[0] == 1:
        return first, second.expand(first.shape[0], *second.shape[1:])
    if first.shape[0] == 1:
        return first.expand(second.shape[0], *first.shape[1:]), second
    raise ValueError(
        f"{first_name} and {second_name} must have one batch size, or a batch of 1 for all, got "
        f"{first.shape[0]} and {second.shape[0]}"
    )


def window_values(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrSequence,
    dilation: IntOrSequence | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrSequence | None = False,
    *,
    stride: IntOrSequence | None = 1,
    is_circular: BoolOrSequence | None = False,
) -> Tensor:
    """na1d_av, na2d_av and na3d_av: ``rank`` says which."""
    attn, value, additional_values = _cast(attn, value, additional_values)
    _check_grid("value", value, rank)
    validation.check_is_tensor("attn", attn)
    heads, *tokens = value.shape[1:-1]
    kernel, strides, dilations, causal = validation.check_window(
        tuple(tokens), kernel_size, stride, dilation, is_causal
    )
    window = (kernel, strides, dilations, [int(c) for c in causal])
    slots = prod(kernel)
    extra = 0
    if additional_values is not None:
        expected = (None, heads, None, value.shape[-1])
        _check_match("additional_values", additional_values, expected, value)
        extra = additional_values.shape[2]
    _check_match("attn", attn, (None, heads, *tokens, slots + extra), value)
    weights, value = _of_one_batch("attn", attn, "value", value)
    if additional_values is not None:
        weights, additional_values = _of_one_batch(
            "attn and value", weights, "additional_values", additional_values
        )
        weights, value = _of_one_batch("attn", weights, "value", value)
    halos = _halos(is_circular, tuple(tokens), kernel, strides, dilations, causal)
    inner = weights[..., :slots]
    if halos:
        # Nothing is asked for beside the tokens.
        inner = F.pad(inner, [0, 0, *[n for halo in reversed(halos) for n in halo]])
    out = _inside(window_sum(inner, _around(value, halos), *window), halos, tokens)
    if additional_values is not None:
        more = weights[..., slots:].flatten(2, -2) @ additional_values
        out = out + torch.unflatten(more, 2, tokens)
    return out


@without_rank(window_scores)
def na1d_qk(*arguments: Any, **named: Any) -> Any:
    """The dot products of every query with the keys of its window, over one axis.

    Nothing is scaled: multiply the query by ``head_dim ** -0.5`` for attention. Forward and
    backward take memory linear in tokens times window; derivatives of every order exist.

    Args:
        query: ``[batch, heads, X, head_dim]`` (heads first), any floating dtype.
        key: Of query's shape.
        kernel_size: Window size, an int or one for each axis.
        dilation: Distance of neighbors.
        additional_keys: ``[batch, heads, context, head_dim]``, seen by every query.
        is_causal: Whether queries see no later token, for each axis.
        rpb: Relative position bias ``[heads, 2 * kernel_size - 1 for each axis]``, added to the
            scores. Bidirectional axes only.
        stride: Queries that share one window.
        is_circular: Whether windows wrap around, for each axis, as in :func:`natten.na2d`. Computed
            with as many tokens more on both sides as a window has.

    Returns:
        ``[batch, heads, X, slots]``, slots = the product of kernel_size, and context more with
        additional keys, which come last. Slot j of an axis is the key ``start + j * dilation``;
        slots are in row-major order. Causal windows that the border cuts short hold -inf in their
        last slots.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.

    References: https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001
    """
    return window_scores(1, *arguments, **named)


@without_rank(window_scores)
def na2d_qk(*arguments: Any, **named: Any) -> Any:
    """:func:`na1d_qk` over two axes: ``[batch, heads, X, Y, head_dim]`` to
    ``[batch, heads, X, Y, slots]``."""
    return window_scores(2, *arguments, **named)


@without_rank(window_scores)
def na3d_qk(*arguments: Any, **named: Any) -> Any:
    """:func:`na1d_qk` over three axes: ``[batch, heads, X, Y, Z, head_dim]`` to
    ``[batch, heads, X, Y, Z, slots]``."""
    return window_scores(3, *arguments, **named)


@without_rank(window_values)
def na1d_av(*arguments: Any, **named: Any) -> Any:
    """The weighted sum of the values of every query's window, over one axis.

    The weights are the caller's: they need not come from a softmax, nor sum to 1. Those in slots
    that a causal window leaves empty are not read.

    Args:
        attn: ``[batch, heads, X, slots]`` in the order of :func:`na1d_qk`.
        value: ``[batch, heads, X, head_dim]``, of attn's dtype. Either of both may have a batch of
            1, which then goes with all of the other.
        kernel_size: Window size, an int or one for each axis.
        dilation: Distance of neighbors.
        additional_values: ``[batch, heads, context, head_dim]``, for the last slots of attn.
        is_causal: Whether queries see no later token, for each axis.
        stride: Queries that share one window.
        is_circular: Whether windows wrap around, for each axis, as in :func:`natten.na2d`. Computed
            with as many tokens more on both sides as a window has.

    Returns:
        Of value's shape, with the larger of the two batch sizes.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
    """
    return window_values(1, *arguments, **named)


@without_rank(window_values)
def na2d_av(*arguments: Any, **named: Any) -> Any:
    """:func:`na1d_av` over two axes: ``[batch, heads, X, Y, slots]`` and
    ``[batch, heads, X, Y, head_dim]``."""
    return window_values(2, *arguments, **named)


@without_rank(window_values)
def na3d_av(*arguments: Any, **named: Any) -> Any:
    """:func:`na1d_av` over three axes: ``[batch, heads, X, Y, Z, slots]`` and
    ``[batch, heads, X, Y, Z, head_dim]``."""
    return window_values(3, *arguments, **named)


__all__ = ["na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]
