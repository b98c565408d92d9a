"""na1d, na2d, na3d over one N-dimensional function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten import validation
from natten.functional.attention import attention
from natten.functional.dispatch import FMHA, FNA, Explanation, parse_name
from natten.functional.dispatch import explain as explain_problem
from natten.functional.merge import merge_attentions
from natten.functional.ops import (
    autocast,
    autocast_dtype,
    call,
    call_packed,
    make_problem,
    unpacked,
)
from natten.functional.problem import DEFAULT_CONFIG, decode_config, encode_config
from natten.types import AttentionKwargs, BoolOrSequence, IntOrSequence, KernelSchedule


class _Plan(NamedTuple):
    """A validated call: the operator's parameters, and which way it goes."""

    parameters: tuple[Any, ...]  # of the operator, without requires_grad
    is_full_window: bool


# Validated calls by everything that validation looks at. Cleared when full, which shapes that
# never repeat can cause.
_plans: dict[tuple[Any, ...], _Plan] = {}
_MAX_PLANS = 4096


def _boxes(
    query: Tensor,
    key: Tensor,
    grid: Any,
    query_origin: Any,
    key_origin: Any,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The global grid and the origins of the query and key boxes in it."""
    query_shape, key_shape = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    rank = len(query_shape)
    if grid is None:
        if query_origin is not None or key_origin is not None:
            raise ValueError("query_origin and key_origin need grid, the extents of the whole grid")
        if query_shape != key_shape:
            raise ValueError(
                "query and key must have the same token shape (or boxes of one grid=), got "
                f"{query_shape} and {key_shape}"
            )
        return query_shape, (0,) * rank, (0,) * rank
    extents = validation.int_tuple("grid", grid, rank, minimum=0)
    origins = []
    for name, origin, shape in (
        ("query", query_origin, query_shape),
        ("key", key_origin, key_shape),
    ):
        start = validation.int_tuple(
            f"{name}_origin", 0 if origin is None else origin, rank, minimum=0
        )
        if any(o + n > g for o, n, g in zip(start, shape, extents, strict=True)):
            raise ValueError(
                f"{name}'s box must lie inside the grid, got {name}_origin={start}, token shape "
                f"{shape} and grid={extents}"
            )
        origins.append(start)
    return extents, origins[0], origins[1]


def _make_plan(
    rank: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    window: tuple[Any, ...],
    scale: Any,
    backend: Any,
    knobs: tuple[Any, ...],
    boxes: tuple[Any, ...],
) -> _Plan:
    rank = validation.check_qkv(query, key, value, rank)
    grid, query_origin, key_origin = _boxes(query, key, *boxes)
    kernel_size, stride, dilation, is_causal = validation.check_window(grid, *window)
    validation.check_additional(query, key, value, additional_keys, additional_values)
    validation.check_lengths(additional_lengths, query, additional_keys)
    validation.check_rpb(rpb, query, kernel_size, is_causal)
    checked_knobs = validation.check_knobs(rank, knobs)
    name = parse_name(backend, FNA)
    has_context = additional_keys is not None
    is_full_window = (
        kernel_size == grid
        and tuple(query.shape[1:-2]) == grid
        and tuple(key.shape[1:-2]) == grid
        and (not any(is_causal) or (rank == 1 and not has_context))
        and rpb is None
        # Tile shapes are of the given rank.
        and all(tile is None for tile in checked_knobs[:5])
    )
    parameters = (
        kernel_size,
        stride,
        dilation,
        is_causal,
        validation.check_scale(scale, query.shape[-1]),
        grid,
        query_origin,
        key_origin,
        0,
        0,
        name,
        encode_config(*checked_knobs),
    )
    return _Plan(parameters, is_full_window)


def _cached_plan(*arguments: Any) -> _Plan:
    """_make_plan, remembered by shapes, dtypes, devices and the text of the other arguments."""
    if torch.compiler.is_compiling():
        return _make_plan(*arguments)
    identity: list[Any] = []
    for tensor in arguments[1:8]:
        if tensor is None:
            identity.append(None)
        elif isinstance(tensor, Tensor) and not tensor.is_nested:
            identity += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        else:
            return _make_plan(*arguments)
    # The text tells 1 from True and 1.0, and holds for lists as well.
    identity.append(repr((arguments[0], arguments[8:])))
    return _remembered(_plans, tuple(identity), _make_plan, arguments)


def _remembered(
    plans: dict[tuple[Any, ...], Any],
    key: tuple[Any, ...],
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """The plan of a key, made of the arguments if it is new."""
    try:
        return plans[key]
    except KeyError:
        pass
    except TypeError:
        # Symbolic sizes of a tracer are not hashable.
        return make(*arguments)
    plan = make(*arguments)
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1, -3) if tensor.dim() > 4 else tensor


def _flattened(parameters: tuple[Any, ...], query: Tensor) -> tuple[Any, ...]:
    """The operator's parameters where the window is everything, over flattened tokens."""
    length = (prod(query.shape[1:-2]),)
    one, zero = (1,), (0,)
    return (length, one, one, (False,), parameters[4], length, zero, zero, *parameters[8:])


def _fmha_knobs(parameters: tuple[Any, ...]) -> dict[str, Any]:
    """attention's arguments that correspond to a call of neighborhood attention."""
    config = decode_config(parameters[11])
    return {
        "scale": parameters[4],
        "backend": f"{parameters[10]}-{FMHA}" if parameters[10] else None,
        "backward_use_pt_reduction": config.backward_use_pt_reduction,
        "run_persistent_kernel": config.run_persistent_kernel,
        "kernel_schedule": config.kernel_schedule,
        "torch_compile": config.torch_compile,
    }


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: tuple[Any, ...],
    is_causal: bool,
    attention_kwargs: AttentionKwargs,
) -> tuple[Tensor, Tensor]:
    """natten.attention over flattened tokens, with the user's overrides."""
    arguments = {**_fmha_knobs(parameters), "is_causal": is_causal, **attention_kwargs}
    arguments["return_lse"] = True
    out, lse = attention(_flat(query), _flat(key), _flat(value), **arguments)
    return out, lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    plan: _Plan,
) -> tuple[Tensor, Tensor]:
    """The operator, over flattened tokens where the window is everything."""
    requires_grad = _needs_grad(query, key, value, rpb, additional_keys, additional_values)
    parameters = plan.parameters
    tokens = query.shape[1:-2]
    if plan.is_full_window and len(tokens) > 1:
        parameters = _flattened(parameters, query)
        query, key, value = _flat(query), _flat(key), _flat(value)
    out, lse = call(
        query,
        key,
        value,
        rpb,
        additional_keys,
        additional_values,
        None,
        None,
        additional_lengths,
        *parameters,
        requires_grad,
    )
    if plan.is_full_window and len(tokens) > 1:
        out, lse = out.unflatten(1, tokens), lse.unflatten(1, tokens)
    return out, lse


def _run_separately(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    plan: _Plan,
    attention_kwargs: AttentionKwargs,
) -> tuple[Tensor, Tensor]:
    """With the user's attention_kwargs, for whatever is plain attention."""
    tokens = query.shape[1:-2]
    parameters = plan.parameters
    if plan.is_full_window:
        causal = parameters[3][0]
        out, lse = _attention(query, key, value, parameters, causal, attention_kwargs)
    else:
        out, lse = _run(query, key, value, rpb, None, None, None, plan)
        out, lse = _flat(out), lse.flatten(1, -2)
    if additional_keys is not None and additional_values is not None:
        context = _attention(
            query, additional_keys, additional_values, parameters, False, attention_kwargs
        )
        out, lse = merge_attentions([out, context[0]], [lse, context[1]], return_lse=True)
    return out.unflatten(1, tokens), lse.unflatten(1, tokens)


def _neighborhood_attention(
    rank: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    window: tuple[Any, ...],
    scale: float | None,
    attention_kwargs: AttentionKwargs | None,
    backend: str | None,
    knobs: tuple[Any, ...],
    boxes: tuple[Any, ...],
    try_fuse_additional_kv: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value, additional_keys, additional_values = autocast(
            dtype, query, key, value, additional_keys, additional_values
        )
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    plan = _cached_plan(rank, *tensors, additional_lengths, window, scale, backend, knobs, boxes)
    if additional_lengths is not None and additional_keys is not None:
        most = additional_keys.shape[1]
        validation.check_length_values("additional_lengths", additional_lengths, most)
    applies = plan.is_full_window or additional_keys is not None
    if attention_kwargs and applies and not try_fuse_additional_kv:
        if additional_lengths is not None:
            raise NotImplementedError(
                "additional_lengths and attention_kwargs, which make additional keys an attention "
                "of their own, do not go together without try_fuse_additional_kv=True"
            )
        out, lse = _run_separately(*tensors, plan, attention_kwargs)
    else:
        out, lse = _run(*tensors, additional_lengths, plan)
    return (out, lse) if return_lse else out


_WHOLE_GRID = (None, None, None)
_NO_KNOBS = astuple(DEFAULT_CONFIG)


class _PackedPlan(NamedTuple):
    """A validated call of the packed operator."""

    plan: _Plan
    window: tuple[int, ...]  # the operator's
    is_flat: bool  # over flattened tokens


# As `_plans`.
_packed_plans: dict[tuple[Any, ...], _PackedPlan] = {}


def _make_packed_plan(
    qkv: Tensor,
    rpb: Tensor | None,
    heads_kv: int,
    window: tuple[Any, ...],
    scale: Any,
    backend: Any,
    boxes: tuple[Any, ...],
) -> _PackedPlan:
    query, key, value = unpacked(qkv, heads_kv)
    plan = _make_plan(
        None, query, key, value, rpb, None, None, None, window, scale, backend, _NO_KNOBS, boxes
    )
    is_flat = plan.is_full_window and qkv.dim() > 4
    parameters = _flattened(plan.parameters, qkv) if is_flat else plan.parameters
    kernel_size, stride, dilation, is_causal, _, grid, origin, *_ = parameters
    packed = (*kernel_size, *stride, *dilation, *map(int, is_causal), *grid, *origin)
    return _PackedPlan(plan, packed, is_flat)


def _cached_packed_plan(*arguments: Any) -> _PackedPlan:
    """_make_packed_plan, remembered; its arguments but the tensors are hashable."""
    if torch.compiler.is_compiling():
        return _make_packed_plan(*arguments)
    qkv, rpb, *rest = arguments
    key = (qkv.shape, qkv.dtype, qkv.device, qkv.layout, *rest)
    if rpb is not None:
        key += (rpb.shape, rpb.dtype, rpb.device)
    return _remembered(_packed_plans, key, _make_packed_plan, arguments)


def packed_attention(
    qkv: Tensor,
    heads_kv: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float | None = None,
    rpb: Tensor | None = None,
    origin: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention of heads that one projection made, and its logsumexp.

    As :func:`neighborhood_attention_generic` of the three parts of ``qkv``, with one gradient: the
    backward pass writes the three parts where they belong, and there is nothing to concatenate.

    Args:
        qkv: ``[batch, *tokens, heads + 2 * heads_kv, head_dim]``: the heads of query, of key and
            of value, in this order.
        heads_kv: Heads of key and of value; heads is a multiple of it.
        kernel_size, stride, dilation, is_causal, scale, rpb, backend: As there.
        origin: Where the box starts in the grid.
        grid: Extents of the whole grid, of which the tokens are a box; default the tokens' own.
    """
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = autocast(dtype, qkv)
    window = (tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
    boxes: tuple[Any, ...] = _WHOLE_GRID
    if grid is not None:
        corner = None if origin is None else tuple(origin)
        boxes = (tuple(grid), corner, corner)
    plan, packed_window, is_flat = _cached_packed_plan(
        qkv, rpb, heads_kv, window, scale, backend, boxes
    )
    if torch.jit.is_tracing():
        # The deprecated tracer records the operator of three tensors.
        query, key, value = unpacked(qkv, heads_kv)
        return _run(query, key, value, rpb, None, None, None, plan)
    tokens = qkv.shape[1:-2]
    if is_flat:
        qkv = _flat(qkv)
    out, lse = call_packed(
        qkv,
        rpb,
        heads_kv,
        packed_window,
        plan.parameters[4],
        plan.parameters[10],
        _needs_grad(qkv, rpb),
    )
    if is_flat:
        out, lse = out.unflatten(1, tokens), lse.unflatten(1, tokens)
    return out, lse


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrSequence,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: AttentionKwargs | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    torch_compile: bool = False,
    try_fuse_additional_kv: bool = False,
    *,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    grid: Sequence[int] | None = None,
    query_origin: Sequence[int] | None = None,
    key_origin: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over 1, 2 or 3 axes of tokens, as many as the tensors have.

    Every query attends to the window of ``kernel_size`` keys around it (:mod:`natten.window` has
    the definition), and to all additional keys, in one softmax::

        out = softmax(scale * query @ keys.T + bias) @ values

    Args:
        query: ``[batch, *tokens, heads, head_dim]``, any floating dtype.
        key: ``[batch, *tokens, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``.
        kernel_size: Window size; at most the number of tokens along the axis.
        stride: Queries that share one window; at most kernel_size. stride == kernel_size is
            blocked attention.
        dilation: Distance of neighbors; kernel_size * dilation is at most the number of tokens.
        is_causal: Whether queries attend to no later token, for each axis.
        scale: Factor on the dot products; None means head_dim ** -0.5.
        additional_keys: ``[batch, context, heads_kv, head_dim]``, seen by every query.
        additional_values: ``[batch, context, heads_kv, head_dim_v]``.
        attention_kwargs: Arguments for :func:`natten.attention` where it computes a part: the
            additional keys, or all where the window is the whole grid. If given and not empty,
            additional keys are computed separately and merged.
        backend: None for the first that can run the call, or a name such as "cutlass-fna".
        q_tile_shape: Query tile of the forward pass, one of
            ``natten.get_configs_for_cutlass_fna(query, key, value)`` and its like.
        kv_tile_shape: Key tile that goes with it.
        backward_q_tile_shape: Query tile of the backward pass.
        backward_kv_tile_shape: Key tile that goes with it.
        backward_kv_splits: Key tiles that the backward pass may work on in parallel.
        backward_use_pt_reduction: Compute the backward pass's row sums with torch.
        run_persistent_kernel: Persistent tile scheduling, where the backend has both.
        kernel_schedule: "non", "coop", "pp" (Hopper; see the page on backends) or None.
        torch_compile: Compile FlexAttention, if ``natten.allow_flex_compile()`` allows it.
        try_fuse_additional_kv: Keep additional keys in one kernel even if attention_kwargs are
            given, which are then not used.
        return_lse: Also return the logsumexp.
        rpb: Relative position bias ``[heads, 2 * kernel_size - 1 for each axis]``; entry
            ``key position - query position + kernel_size - 1`` of the dilation group is added to
            the scaled dot product. Bidirectional axes only.
        additional_lengths: Integers ``[batch]``, from 0 to context: how many of the additional
            keys, the first ones, each batch entry has. The others are neither read nor get a
            gradient other than 0, whatever they hold; short contexts cost less than long ones.
            None: all. Values out of range raise where looking is free, on the CPU; elsewhere they
            count as 0 and context.
        grid: Extents of the whole grid, where query and key hold boxes of it. Windows are
            placed in the grid, and keys outside of the key box are left out.
        query_origin: Where query's box starts in the grid; default 0.
        key_origin: Where key's box starts in the grid; default 0.

    Returns:
        ``[batch, *tokens, heads, head_dim_v]`` in query's dtype, and with ``return_lse`` the
        natural logarithm of the sum of exponentials, ``[batch, *tokens, heads]`` in float32
        (float64 for float64). A query with no key gets 0 and -inf. Both are differentiable.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
        NotImplementedError: No backend, or not the one named, runs such a call.
        RuntimeError: The backend named needs something that this machine lacks.

    References: https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001,
    https://arxiv.org/abs/2504.16922
    """
    return _neighborhood_attention(
        None,
        query,
        key,
        value,
        rpb,
        additional_keys,
        additional_values,
        additional_lengths,
        (kernel_size, stride, dilation, is_causal),
        scale,
        attention_kwargs,
        backend,
        (
            q_tile_shape,
            kv_tile_shape,
            backward_q_tile_shape,
            backward_kv_tile_shape,
            backward_kv_splits,
            backward_use_pt_reduction,
            run_persistent_kernel,
            kernel_schedule,
            torch_compile,
        ),
        (grid, query_origin, key_origin),
        try_fuse_additional_kv,
        return_lse,
    )


_SUMMARY = """{rank}-D neighborhood attention.

:func:`neighborhood_attention_generic` for tensors with {axes} of tokens:

Args:
    query: ``[batch, {tokens}, heads, head_dim]``, any floating dtype.
    key: ``[batch, {tokens}, heads_kv, head_dim]``; heads is a multiple of heads_kv.
    value: ``[batch, {tokens}, heads_kv, head_dim_v]``.
    kernel_size: Window size; an int stands for every axis.

All other arguments, what is returned and what is raised are as documented there, except for
sub-grids, which only it has.

Raises:
    ValueError: The tensors do not have {dims} dimensions, or as documented there.
"""


def _of_rank(rank: int) -> Callable[..., Any]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntOrSequence,
        stride: IntOrSequence | None = 1,
        dilation: IntOrSequence | None = 1,
        is_causal: BoolOrSequence | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: AttentionKwargs | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | KernelSchedule | None = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
        *,
        return_lse: bool = False,
        rpb: Tensor | None = None,
        additional_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return _neighborhood_attention(
            rank,
            query,
            key,
            value,
            rpb,
            additional_keys,
            additional_values,
            additional_lengths,
            (kernel_size, stride, dilation, is_causal),
            scale,
            attention_kwargs,
            backend,
            (
                q_tile_shape,
                kv_tile_shape,
                backward_q_tile_shape,
                backward_kv_tile_shape,
                backward_kv_splits,
                backward_use_pt_reduction,
                run_persistent_kernel,
                kernel_schedule,
                torch_compile,
            ),
            _WHOLE_GRID,
            try_fuse_additional_kv,
            return_lse,
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = _SUMMARY.format(
        rank=rank,
        axes="one axis" if rank == 1 else f"{rank} axes",
        tokens=", ".join("XYZ"[:rank]),
        dims=rank + 3,
    )
    return function


na1d = _of_rank(1)
na2d = _of_rank(2)
na3d = _of_rank(3)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrSequence,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    torch_compile: bool = False,
    grid: Sequence[int] | None = None,
    query_origin: Sequence[int] | None = None,
    key_origin: Sequence[int] | None = None,
) -> Explanation:
    """Who would run :func:`neighborhood_attention_generic` so called, and why the others would not.

    Nothing is computed. ``print(natten.explain(query, key, value, 7))`` shows a table; the result
    also has the fields ``chosen`` (a name for ``backend=``) and ``decisions``.

    Raises:
        ValueError, NotImplementedError: As the call itself would, for wrong arguments.
    """
    knobs = (None, None, None, None, None, False, True, None, torch_compile)
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    window = (kernel_size, stride, dilation, is_causal)
    boxes = (grid, query_origin, key_origin)
    parameters = _make_plan(
        None, *tensors, additional_lengths, window, scale, None, knobs, boxes
    ).parameters
    problem = make_problem(
        query,
        key,
        value,
        rpb,
        additional_keys,
        None,
        additional_lengths,
        parameters[:10],
        _needs_grad(*tensors),
    )
    return explain_problem(problem, decode_config(parameters[11]))
