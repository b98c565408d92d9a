"""Attention to queries, keys and values in 8 bits, float8_e4m3fn, with a scale for each head.

For inference on Hopper GPUs with half the memory of 16 bits, and up to 1.14 times as fast. All
products are of 8-bit numbers, the softmax's weights included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from natten import validation
from natten.functional import sharded
from natten.functional.backend import Backend
from natten.functional.call import Call, Parameters, Tensors, encode_window, make_call
from natten.functional.dispatch import FMHA, FNA, parse_name, resolve_float8
from natten.functional.operators import autocast, autocast_dtype, check_devices, library
from natten.types import BoolOrSequence, IntOrSequence

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
_RESULTS = (torch.bfloat16, torch.float16)


class Rounded(NamedTuple):
    """Numbers in 8 bits: ``tensor`` times the ``scale`` of its head.

    Attributes:
        tensor: ``[batch, *tokens, heads, head_dim]`` in float8_e4m3fn.
        scale: ``[heads]`` in float32, positive.
    """

    tensor: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers as a tensor of another dtype."""
        return (self.tensor.float() * self.scale.unsqueeze(-1)).to(dtype)


def _refuse_gradients(name: str, tensor: Tensor) -> None:
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise NotImplementedError(
            f"{name} requires a gradient, which 8-bit numbers have not: call this under "
            f"torch.no_grad(), or with {name}.detach()"
        )


def _check_axes(name: str, tensor: Tensor) -> None:
    if not 4 <= tensor.dim() <= 6:
        raise ValueError(
            f"{name} must have 4, 5 or 6 dimensions, [batch, *tokens, heads, head_dim], got shape "
            f"{tuple(tensor.shape)}"
        )


def _given_scale(scale: Any, tensor: Tensor) -> Tensor:
    heads = tensor.shape[-2]
    if not isinstance(scale, Tensor):
        number = validation.check_scale(scale, 1)
        if number <= 0:
            raise ValueError(f"scale must be positive, got {number}")
        return torch.full((heads,), number, device=tensor.device)
    _check_scale("scale", scale, tensor)
    # Looking at what a GPU holds would wait for it.
    if scale.is_cpu and not torch.compiler.is_compiling() and not bool((scale > 0).all()):
        raise ValueError(f"scale must be positive for every head, got {scale.tolist()}")
    return scale


def _check_scale(name: str, scale: Any, tensor: Tensor) -> None:
    if not isinstance(scale, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(scale).__name__}")
    if scale.shape != tensor.shape[-2:-1] or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} must have shape [heads] = {tuple(tensor.shape[-2:-1])} and be torch.float32, "
            f"got {tuple(scale.shape)} and {scale.dtype}"
        )
    if scale.device != tensor.device:
        raise ValueError(f"{name} must be on {tensor.device}, got {scale.device}")


def to_float8(tensor: Tensor, scale: Tensor | float | None = None) -> Rounded:
    """Round a tensor to 8 bits, with a scale for each head.

    What is beyond the largest number, 448 times the scale, becomes that. NaN stays NaN, and where
    the scale is computed, a head that holds NaN or an infinity becomes NaN throughout.

    Args:
        tensor: ``[batch, *tokens, heads, head_dim]``, any floating dtype.
        scale: ``[heads]`` in float32, or one positive number for all heads; None for the largest
            magnitude of each head over 448, and 1 for a head of zeros.

    Returns:
        The numbers, and the scales that multiply them.

    Raises:
        ValueError: An argument is wrong.
        NotImplementedError: The tensor requires a gradient, and gradients are enabled.
    """
    validation.check_is_tensor("tensor", tensor)
    _check_axes("tensor", tensor)
    _refuse_gradients("tensor", tensor)
    if scale is None:
        return _round(tensor, _computed_scale(tensor))
    return _round(tensor, _given_scale(scale, tensor))


def _computed_scale(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.ones(tensor.shape[-2], device=tensor.device)
    axes = [axis for axis in range(tensor.dim()) if axis != tensor.dim() - 2]
    largest = torch.linalg.vector_norm(tensor, torch.inf, axes).float()
    return (largest / LARGEST).masked_fill(largest == 0, 1.0)


def _round(tensor: Tensor, scale: Tensor) -> Rounded:
    scaled = tensor.float() / scale.unsqueeze(-1)
    return Rounded(scaled.clamp(-LARGEST, LARGEST).to(FLOAT8), scale)


@lru_cache(maxsize=4096)
def _planned(
    shapes: tuple[tuple[int, ...], ...],
    devices: tuple[torch.device, ...],
    dtype: torch.dtype,
    window: tuple[int, ...],
    scale: float,
    backend: str,
) -> tuple[Call, Backend]:
    """The call of tensors like these, with results of a dtype, and who runs it."""
    # It is that of tensors of this dtype, which nothing reads.
    tensors = [
        torch.empty((), dtype=dtype, device=device).expand(shape)
        for shape, device in zip(shapes, devices, strict=True)
    ]
    call = make_call(Tensors(*tensors), Parameters(0, window, scale, 0.0, 0, 0, backend, "", False))
    return call, resolve_float8(call.problem, backend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    window: Sequence[int],
    scale: float,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tensors, scales = (query, key, value), (query_scale, key_scale, value_scale)
    for name, tensor, its_scale in zip(Tensors._fields, tensors, scales):
        _check_rounded(name, Rounded(tensor, its_scale))
    if dtype not in _RESULTS:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    shapes, devices = tuple([t.shape for t in tensors]), tuple([t.device for t in tensors])
    call, found = _planned(shapes, devices, dtype, tuple(window), scale, backend)
    if call.is_empty:
        out = query.new_zeros(call.out_shape, dtype=dtype)
        return out, out.new_full(call.out_shape[:-1], -torch.inf, dtype=torch.float32)
    adjacent = tuple([s.contiguous() for s in scales])
    out, lse = found.float8_forward(call.problem, call.prepared(Tensors(*tensors)), adjacent)
    return call.result(out, call.out_shape), call.result(lse, call.out_shape[:-1])


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_devices((query, key, value, *rest))
    rows = query.shape[:-1]
    out = query.new_empty((*rows, value.shape[-1]), dtype=rest[-1])
    return out, query.new_empty(rows, dtype=torch.float32)


library.define(
    "float8_attention(Tensor query, Tensor key, Tensor value, Tensor query_scale, "
    "Tensor key_scale, Tensor value_scale, SymInt[] window, float scale, str backend, "
    "ScalarType dtype) -> (Tensor, Tensor)"
)
library.impl("float8_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("natten::float8_attention", _attend_fake, lib=library)


def _check_rounded(name: str, rounded: Rounded) -> None:
    tensor, scale = rounded
    if not isinstance(tensor, Tensor) or tensor.dtype != FLOAT8:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be in {FLOAT8} where it is rounded, got {found}")
    _check_axes(name, tensor)
    _check_scale(f"{name}'s scale", scale, tensor)


def _rounded(name: str, given: Any) -> Rounded:
    """An argument in 8 bits, checked by itself."""
    if isinstance(given, Rounded):
        _check_rounded(name, given)
        return given
    if not isinstance(given, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor, or what natten.to_float8 returns, got "
            f"{type(given).__name__}"
        )
    if given.dtype not in _RESULTS:
        raise ValueError(
            f"{name} must be in float16 or bfloat16, or what natten.to_float8 returns, got "
            f"{given.dtype}"
        )
    _refuse_gradients(name, given)
    validation.check_is_tensor(name, given)
    _check_axes(name, given)
    return to_float8(given)


def _result_dtype(given: tuple[Any, ...]) -> torch.dtype:
    """That of the tensors that come in 16 bits; bfloat16 where there are none."""
    found = {tensor.dtype for tensor in given if isinstance(tensor, Tensor)}
    if len(found) > 1:
        raise ValueError(
            "query, key and value must have one dtype where they are not rounded, got "
            f"{sorted(map(str, found))}"
        )
    return found.pop() if found else torch.bfloat16


@overload
def float8_attention(
    query: Rounded | Tensor, key: Rounded | Tensor, value: Rounded | Tensor,
    kernel_size: int | Sequence[int | None], stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1, is_causal: BoolOrSequence = False, scale: float | None = None,
    backend: str | None = None, *, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def float8_attention(
    query: Rounded | Tensor, key: Rounded | Tensor, value: Rounded | Tensor,
    kernel_size: int | Sequence[int | None], stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1, is_causal: BoolOrSequence = False, scale: float | None = None,
    backend: str | None = None, *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def float8_attention(
    query: Rounded | Tensor, key: Rounded | Tensor, value: Rounded | Tensor,
    kernel_size: int | Sequence[int | None], stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1, is_causal: BoolOrSequence = False, scale: float | None = None,
    backend: str | None = None, *, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def float8_attention(
    query: Rounded | Tensor,
    key: Rounded | Tensor,
    value: Rounded | Tensor,
    kernel_size: int | Sequence[int | None],
    stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1,
    is_causal: BoolOrSequence = False,
    scale: float | None = None,
    backend: str | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention in 8 bits, 1-D, 2-D or 3-D; dense attention with ``kernel_size=-1``.

    As :func:`natten.na1d`, :func:`natten.na2d` and :func:`natten.na3d` of rounded query, key and
    value, without gradients. On Hopper GPUs (compute capability 9.0) with Triton 3.6 or newer,
    head_dim 64 or 128 for query, key and value, and no dilation; other calls are refused, and
    nothing is computed in 16 bits instead. ``backend="reference"`` computes every call on every
    device, slowly and without rounding weights: what results are to be compared with.

    Args:
        query: ``[batch, *tokens, heads, head_dim]``: what :func:`natten.to_float8` returns, or a
            tensor in float16 or bfloat16, which is rounded by that.
        key: ``[batch, *tokens, heads_kv, head_dim]``, likewise; heads is a multiple of heads_kv.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``, likewise.
        kernel_size: Window size, one for all axes or one for each; -1 for everything along an axis.
        stride: Queries that share a window.
        dilation: Distance of neighbors.
        is_causal: Whether queries attend to no later token, for all axes or each.
        scale: Factor on the dot products; None means head_dim ** -0.5.
        backend: None, "hopper-fna", "hopper-fmha" (the same), or "reference".
        return_lse: Also return the logsumexp.

    Returns:
        ``[batch, *tokens, heads, head_dim_v]`` in bfloat16, or the dtype of those of query, key and
        value that come in 16 bits; and with ``return_lse`` the natural logarithm of the sum of
        exponentials, ``[batch, *tokens, heads]`` in float32.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
        NotImplementedError: No backend, or not the one named, runs such a call; or a tensor
            requires a gradient, and gradients are enabled.
        RuntimeError: The backend named needs something that this machine lacks.
    """
    given: tuple[Any, ...] = (query, key, value)
    if sharded.current is not None or any(map(sharded.is_dtensor, given)):
        raise NotImplementedError("8-bit numbers are not for grids that are sharded over ranks")
    for tensor in given:
        dtype = autocast_dtype(tensor)
        if dtype is not None:
            given = tuple(autocast(dtype, *given))
            break
    if validation.head_windows(kernel_size, stride, dilation) is not None:
        raise NotImplementedError(
            "in 8 bits all heads have one window: make a call for each group of heads, got "
            f"kernel_size={kernel_size}, stride={stride}, dilation={dilation}"
        )
    validation.optional_bool("return_lse", return_lse)
    tensors, scales = zip(*map(_rounded, Tensors._fields, given))
    dtype = _result_dtype(given)
    devices = [tensor.device for tensor in tensors]
    if len(set(devices)) > 1:
        raise ValueError(
            f"query, key and value must be on one device, got {', '.join(map(str, devices))}"
        )
    shapes = [tuple(tensor.shape[1:-2]) for tensor in tensors[:2]]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"query and key must have the same token shape, got {shapes[0]} and {shapes[1]}"
        )
    kind = FMHA if isinstance(backend, str) and backend.endswith(FMHA) else FNA
    name = parse_name(backend, kind)
    window = encode_window(
        *validation.check_window(shapes[0], kernel_size, stride, dilation, is_causal)
    )
    scale = validation.check_scale(scale, tensors[0].shape[-1])
    out, lse = torch.ops.natten.float8_attention(*tensors, *scales, window, scale, name, dtype)
    return (out, lse) if return_lse else out


__all__ = ["Rounded", "float8_attention", "to_float8"]
