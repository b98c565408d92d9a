"""The products that attention over windows is made of, as torch.library operators.

With slot j of a query's window standing for the key ``key(q, j)``::

    natten::window_dot       out[q, j] = a[q] · b[key(q, j)]
    natten::window_sum       out[q] = sum over j of weights[q, j] * b[key(q, j)]
    natten::window_scatter   out[key(q, j)] += weights[q, j] * a[q]
    natten::window_bias      out[q, j] = table[key(q, j) - q]
    natten::window_bias_sum  out[key(q, j) - q] += weights[q, j]

Each is linear in each of its tensors, and the derivative of one is another, so that derivatives of
every order exist, in backward and forward mode and under torch.func. Memory is linear in queries
times window, and sums have a fixed order: results are the same on every run.

Tensors are heads-first, ``[batch, heads, *tokens, features]``; slots are in row-major order from
the start of the window. Causal windows may leave their last slots empty: the dot product there is
``empty``, and weights there are not read. Numbers of 16 bits are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from natten import validation
from natten.functional.operators import check_devices, define
from natten.functional.problem import accumulation_dtype
from natten.functional.window_products import eager
from natten.window import Axis

# Plain integers, is_causal 0 and 1: torch.jit.trace takes no other lists.
_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal"


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """The kernels for GPUs, None without Triton."""
    if find_spec("triton") is None:
        return None
    from natten.functional.window_products import triton

    return triton


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """The loops for CPUs, None without numba."""
    from natten.functional.backends.cpu import _numba_problem

    if _numba_problem() is not None:
        return None
    # numba takes half a second to import.
    from natten.functional.window_products import cpu

    return cpu


def _axes(tokens: Any, window: tuple[Any, ...]) -> tuple[Axis, ...]:
    *sizes, is_causal = window
    return tuple(map(Axis, tokens, *sizes, map(bool, is_causal)))


@lru_cache(maxsize=4096)
def _check(
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype, torch.device], ...],
    tokens: tuple[int, ...],
    window: tuple[tuple[int, ...], ...],
    expected: tuple[tuple[int | None, ...], ...],
) -> None:
    """Check tensors and window of an operator against each other, for every caller.

    Args:
        shapes: Name, shape, dtype and device of each tensor.
        tokens: Extents of the grid.
        window: kernel_size, stride, dilation, is_causal.
        expected: The shape of each tensor; None where any extent will do.
    """
    rank = len(tokens)
    if not 1 <= rank <= 3 or any(len(values) != rank for values in window):
        raise ValueError(
            "kernel_size, stride, dilation and is_causal must have one value for each of 1 to 3 "
            f"axes of tokens, got {window} for tokens of shape {tokens}"
        )
    *sizes, is_causal = window
    if any(flag not in (0, 1) for flag in is_causal):
        raise ValueError(f"is_causal must hold 0 or 1, got {is_causal}")
    validation.int_tuple("tokens", tokens, rank, minimum=0)
    kernel_size, stride, dilation = sizes
    flags = tuple(map(bool, is_causal))
    validation.check_window(tokens, kernel_size, stride, dilation, flags)
    for (name, shape, dtype, device), wanted in zip(shapes, expected, strict=True):
        if len(shape) != len(wanted) or any(w not in (None, n) for n, w in zip(shape, wanted)):
            text = ", ".join("any" if w is None else str(w) for w in wanted)
            raise ValueError(f"{name} must have shape [{text}], got {shape}")
        if not dtype.is_floating_point or (dtype, device) != shapes[0][2:]:
            raise ValueError(
                f"{name} must be floating-point, of one dtype and on one device with "
                f"{shapes[0][0]}, got {dtype} on {device}"
            )


def _checked(
    tensors: dict[str, Tensor],
    tokens: Sequence[int],
    window: tuple[Any, ...],
    *expected: tuple[int | None, ...],
) -> tuple[Axis, ...]:
    """The axes of a call whose arguments fit each other."""
    for name, tensor in tensors.items():
        validation.check_is_tensor(name, tensor)
    described = tuple([(n, tuple(t.shape), t.dtype, t.device) for n, t in tensors.items()])
    _check(described, tuple(tokens), tuple(map(tuple, window)), expected)
    return _axes(tokens, window)


def _product(
    name: str, first: Tensor, second: Tensor, window: tuple[Any, ...], *more: Any
) -> Tensor:
    """A product of two tensors ``[batch, heads, *tokens, features]``, by what is fastest."""
    shape = second.shape
    width = shape[-1] if name == "dot" else prod(window[0])
    axes = _checked(
        {"the first tensor": first, "the second tensor": second},
        shape[2:-1],
        window,
        (*shape[:-1], width),
        (None,) * len(shape),
    )
    units, tokens = shape[0] * shape[1], prod(shape[2:-1])
    a = first.reshape(units, tokens, first.shape[-1])
    b = second.reshape(units, tokens, shape[-1])
    if not (units and tokens):
        width = prod(window[0]) if name == "dot" else shape[-1]
        return first.new_empty(*shape[:-1], width)
    backend: Any = eager
    if a.device.type == "cuda":
        backend = _kernels() or eager
    elif a.device.type == "cpu":
        # torch's matrix products of 16 bits do not all sum in float32 on CPUs.
        precise = accumulation_dtype(a.dtype)
        a, b = a.to(precise), b.to(precise)
        backend = _compiled() or eager
    out = getattr(backend, name)(a, b, axes, *more)
    return out.to(first.dtype).view(*shape[:-1], out.shape[-1])


def _dot(a: Tensor, b: Tensor, *window: Any) -> Tensor:
    *window_, empty = window
    return _product("dot", a, b, tuple(window_), empty)


def _sum(weights: Tensor, b: Tensor, *window: Any) -> Tensor:
    return _product("weighted_sum", weights, b, window)


def _scatter(weights: Tensor, a: Tensor, *window: Any) -> Tensor:
    return _product("scatter", weights, a, window)


def _relative(axes: tuple[Axis, ...], device: torch.device) -> list[Tensor]:
    """For each axis, the entry of the table that each query adds to each slot: [length, k]."""
    entries = []
    for axis in axes:
        own = torch.arange(axis.length, device=device)
        start = (eager.keys_of_queries(axis, device).first - own) // axis.dilation
        slot = torch.arange(axis.kernel_size, device=device)
        last = 2 * axis.kernel_size - 2
        # Only empty slots leave the table.
        entries.append((start[:, None] + slot + axis.kernel_size - 1).clamp(0, last))
    return entries


def _bias(table: Tensor, tokens: Any, *window: Any) -> Tensor:
    axes = _checked({"table": table}, tokens, window, (None, *(2 * k - 1 for k in window[0])))
    rank = len(axes)
    index: list[Any] = [slice(None)]
    for i, entries in enumerate(_relative(axes, table.device)):
        shape = [1] * (2 * rank)
        shape[i], shape[rank + i] = entries.shape
        index.append(entries.view(shape))
    return table[tuple(index)].flatten(rank + 1)


def _bias_sum(weights: Tensor, *window: Any) -> Tensor:
    heads, *tokens, _ = weights.shape
    expected = (heads, *tokens, prod(window[0]))
    axes = _checked({"weights": weights}, tokens, window, expected)
    rank = len(axes)
    # One axis after the other, as products with matrices of zeros and ones: index_add_ has no
    # fixed order on GPUs. In float64, which no setting rounds.
    total = weights.double().unflatten(-1, [axis.kernel_size for axis in axes])
    for i, (axis, entries) in enumerate(zip(axes, _relative(axes, weights.device), strict=True)):
        width = 2 * axis.kernel_size - 1
        selected = torch.nn.functional.one_hot(entries.flatten(), width).double()
        # Tokens come before slots, and sums after both.
        last = total.movedim((1, 1 + rank - i), (-2, -1)).flatten(-2)
        total = last @ selected
    return total.reshape(heads, *(2 * k - 1 for k in window[0])).to(weights.dtype)


def _dot_fake(a: Tensor, b: Tensor, kernel_size: Any, *_: Any) -> Tensor:
    check_devices((a, b))
    return a.new_empty(*a.shape[:-1], prod(kernel_size))


def _like_second(weights: Tensor, b: Tensor, *_: Any) -> Tensor:
    check_devices((weights, b))
    return b.new_empty(b.shape)


def _bias_fake(table: Tensor, tokens: Any, kernel_size: Any, *_: Any) -> Tensor:
    return table.new_empty(table.shape[0], *tokens, prod(kernel_size))


def _bias_sum_fake(weights: Tensor, kernel_size: Any, *_: Any) -> Tensor:
    return weights.new_empty(weights.shape[0], *(2 * k - 1 for k in kernel_size))


class _Bilinear(torch.autograd.Function):
    """A product of two tensors; subclasses name the products that its derivatives are."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.window = inputs[2:6]

    @staticmethod
    def gradients(ctx: Any, left: Callable[[], Tensor], right: Callable[[], Tensor]) -> Any:
        need_left, need_right, *others = ctx.needs_input_grad
        none = [None] * len(others)
        return (left() if need_left else None, right() if need_right else None, *none)


class _Dot(_Bilinear):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (a, b), window = ctx.saved_tensors, ctx.window
        return _Bilinear.gradients(
            ctx,
            lambda: window_sum(grad, b, *window),
            lambda: window_scatter(grad, a, *window),
        )

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor, *_: Any) -> Tensor:
        (a, b), window = ctx.saved_tensors, ctx.window
        return window_dot(a_tangent, b, *window, 0.0) + window_dot(a, b_tangent, *window, 0.0)


class _Sum(_Bilinear):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weights, b), window = ctx.saved_tensors, ctx.window
        return _Bilinear.gradients(
            ctx,
            lambda: window_dot(grad, b, *window, 0.0),
            lambda: window_scatter(weights, grad, *window),
        )

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, b_tangent: Tensor, *_: Any) -> Tensor:
        (weights, b), window = ctx.saved_tensors, ctx.window
        return window_sum(weights_tangent, b, *window) + window_sum(weights, b_tangent, *window)


class _Scatter(_Bilinear):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weights, a), window = ctx.saved_tensors, ctx.window
        return _Bilinear.gradients(
            ctx,
            lambda: window_dot(a, grad, *window, 0.0),
            lambda: window_sum(weights, grad, *window),
        )

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, a_tangent: Tensor, *_: Any) -> Tensor:
        (weights, a), window = ctx.saved_tensors, ctx.window
        first = window_scatter(weights_tangent, a, *window)
        return first + window_scatter(weights, a_tangent, *window)


class _Bias(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.tokens, *ctx.window = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (window_bias_sum(grad, *ctx.window), None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return window_bias(tangent, ctx.tokens, *ctx.window)


class _BiasSum(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, *ctx.window = inputs
        ctx.tokens = weights.shape[1:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (window_bias(grad, ctx.tokens, *ctx.window), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return window_bias_sum(tangent, *ctx.window)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A dimension that vmap adds, made one with the batch (with the heads, of a table)."""
    if dim is None:
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def _define(
    name: str,
    arguments: str,
    implementation: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    function: type[torch.autograd.Function],
) -> Callable[..., Tensor]:
    """Define an operator, whose batching rule makes the new dimension one with the first."""
    call = define(name, f"({arguments}) -> Tensor", implementation, fake, function)

    def batch(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        folded = [
            _fold(argument, dim, size) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        out = call(*folded)
        return out.unflatten(0, (size, out.shape[0] // size)), 0

    function.vmap = staticmethod(batch)  # type: ignore[method-assign]
    return call


window_dot = _define(
    "window_dot", f"Tensor a, Tensor b, {_WINDOW}, float empty", _dot, _dot_fake, _Dot
)
window_sum = _define("window_sum", f"Tensor weights, Tensor b, {_WINDOW}", _sum, _like_second, _Sum)
window_scatter = _define(
    "window_scatter", f"Tensor weights, Tensor a, {_WINDOW}", _scatter, _like_second, _Scatter
)
window_bias = _define(
    "window_bias", f"Tensor table, SymInt[] tokens, {_WINDOW}", _bias, _bias_fake, _Bias
)
window_bias_sum = _define(
    "window_bias_sum", f"Tensor weights, {_WINDOW}", _bias_sum, _bias_sum_fake, _BiasSum
)

__all__ = ["window_bias", "window_bias_sum", "window_dot", "window_scatter", "window_sum"]
