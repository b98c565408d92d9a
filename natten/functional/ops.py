"""The torch.library operators: schema, implementation, fake, autograd, autocast.

One pair of operators serves neighborhood attention of every rank, and dense, causal and varlen
attention, which are rank-1 problems. A second pair takes query, key and value as the heads of one
tensor, and writes their gradients into one: nothing has to be split or concatenated around it. All
return fresh contiguous tensors.

    natten::neighborhood_attention           -> out, logsumexp
    natten::neighborhood_attention_backward  -> gradients of the six inputs, empty if not asked for
    natten::packed_attention                 -> out, logsumexp
    natten::packed_attention_backward        -> gradients of qkv and bias, empty if not asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten.functional.dispatch import resolve
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem, decode_config
from natten.profile_file import with_profile

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? cumulative_seqlen_q, Tensor? cumulative_seqlen_kv, "
    "Tensor? additional_lengths"
)
_PARAMETERS = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal, float scale, "
    "SymInt[] grid, SymInt[] query_origin, SymInt[] key_origin, SymInt max_seqlen_q, "
    "SymInt max_seqlen_kv, str backend, str config, bool requires_grad"
)
# Tensors before the parameters in the schema; the first six are differentiable.
NUM_TENSORS = 9
_IS_CAUSAL = NUM_TENSORS + 3

_library = torch.library.Library("natten", "DEF")
_library.define(
    f"neighborhood_attention({_TENSORS}, {_PARAMETERS}) -> (Tensor out, Tensor logsumexp)"
)
_library.define(
    f"neighborhood_attention_backward(Tensor? grad_out, Tensor? grad_logsumexp, {_TENSORS}, "
    f"Tensor out, Tensor logsumexp, {_PARAMETERS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The first, for torch.jit.trace, which takes lists of plain integers only.
_CONSTANTS = _PARAMETERS.replace("SymInt", "int").replace("bool[]", "int[]")
_library.define(
    f"neighborhood_attention_traced({_TENSORS}, {_CONSTANTS}) -> (Tensor out, Tensor logsumexp)"
)
# window: kernel_size, stride, dilation, is_causal as 0 and 1, grid, and the box's origin in it, one
# after the other. Fewer lists cost the dispatcher less time.
_PACKED = "SymInt heads_kv, SymInt[] window, float scale, str backend, bool requires_grad"
_library.define(
    f"packed_attention(Tensor qkv, Tensor? rpb, {_PACKED}) -> (Tensor out, Tensor logsumexp)"
)
_library.define(
    "packed_attention_backward(Tensor? grad_out, Tensor? grad_logsumexp, Tensor qkv, Tensor? rpb, "
    f"Tensor out, Tensor logsumexp, {_PACKED}, bool needs_qkv, bool needs_rpb) -> (Tensor, Tensor)"
)


@lru_cache(maxsize=4096)
def _problem(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    head_dim_v: int,
    num_additional: int,
    has_lengths: bool,
    has_rpb: bool,
    varlen: bool,
    dtype: torch.dtype,
    device: torch.device,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
    grid: tuple[int, ...],
    query_origin: tuple[int, ...],
    key_origin: tuple[int, ...],
    max_seqlen_q: int,
    max_seqlen_kv: int,
    requires_grad: bool,
) -> Problem:
    return Problem(
        batch=query_shape[0],
        query_shape=tuple(query_shape[1:-2]),
        key_shape=tuple(key_shape[1:-2]),
        heads=query_shape[-2],
        heads_kv=key_shape[-2],
        head_dim=query_shape[-1],
        head_dim_v=head_dim_v,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        grid=grid,
        query_origin=query_origin,
        key_origin=key_origin,
        scale=scale,
        num_additional=num_additional,
        has_lengths=has_lengths,
        has_rpb=has_rpb,
        varlen=varlen,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        dtype=dtype,
        device=device,
        requires_grad=requires_grad,
    )


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    cumulative_seqlen_q: Tensor | None,
    additional_lengths: Tensor | None,
    parameters: Sequence[Any],
    requires_grad: bool,
) -> Problem:
    """The problem that a call of the operator states.

    ``parameters`` are those of the schema from kernel_size to max_seqlen_kv.
    """
    kernel_size, stride, dilation, is_causal, scale, grid, query_origin, key_origin, *most = (
        parameters
    )
    return _problem(
        query.shape,
        key.shape,
        value.shape[-1],
        0 if additional_keys is None else additional_keys.shape[1],
        additional_keys is not None and additional_lengths is not None,
        rpb is not None,
        cumulative_seqlen_q is not None,
        query.dtype,
        query.device,
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        tuple(is_causal),
        scale,
        tuple(grid),
        tuple(query_origin),
        tuple(key_origin),
        *most,
        requires_grad,
    )


def _plan(tensors: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Problem, Config, str]:
    query, key, value, rpb, additional_keys, _, cumulative_seqlen_q, _, lengths = tensors
    *window, backend, config, requires_grad = parameters
    problem = make_problem(
        query, key, value, rpb, additional_keys, cumulative_seqlen_q, lengths, window, requires_grad
    )
    return problem, decode_config(config), backend


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Even where there is nothing to do, to() takes as long as an allocation.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_empty_context(tensors: tuple[Any, ...], problem: Problem) -> tuple[Any, ...]:
    if problem.num_additional or tensors[4] is None:
        return tensors
    return (*tensors[:4], None, None, *tensors[6:8], None)


def _is_empty(problem: Problem) -> bool:
    """Whether there is no query, or no query sees a key: no backend is troubled with that."""
    has_queries = problem.batch and problem.num_queries and problem.heads
    has_keys = problem.num_keys or problem.num_additional
    is_unused = problem.varlen and not (problem.max_seqlen_q and problem.max_seqlen_kv)
    return not has_queries or not has_keys or is_unused


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, parameters = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
    return _run(tensors, *_plan(tensors, parameters))


def _run(
    tensors: tuple[Any, ...], problem: Problem, config: Config, backend_name: str
) -> tuple[Tensor, Tensor]:
    """out and logsumexp."""
    backend = resolve(problem, config, backend_name)
    config = with_profile(config, problem, backend.name)
    if _is_empty(problem):
        query = tensors[0]
        return (
            query.new_zeros(problem.output_shape),
            query.new_full(problem.lse_shape, -torch.inf, dtype=problem.accumulation_dtype),
        )
    out, lse = backend.forward(problem, config, *_without_empty_context(tensors, problem))
    return _contiguous(out), _contiguous(lse)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value = arguments[0], arguments[2]
    rows = query.shape[:-1]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*rows, value.shape[-1])), query.new_empty(rows, dtype=accumulate)


def _backward(grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any) -> Any:
    tensors = arguments[:NUM_TENSORS]
    out, lse = arguments[NUM_TENSORS : NUM_TENSORS + 2]
    *parameters, needs = arguments[NUM_TENSORS + 2 :]
    inputs = tensors[:6]
    needed = tuple([n and t is not None for n, t in zip(needs, inputs, strict=True)])
    gradients = _run_backward(
        grad_out, grad_lse, tensors, out, lse, needed, *_plan(tensors, tuple(parameters))
    )
    query = tensors[0]
    results = []
    for need, tensor, gradient in zip(needs, inputs, gradients, strict=True):
        if not need or tensor is None:
            results.append(query.new_empty(0))
        elif gradient is None:
            results.append(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        else:
            results.append(_contiguous(_of_dtype(gradient, tensor.dtype)))
    return tuple(results)


def _run_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    needed: tuple[bool, ...],
    problem: Problem,
    config: Config,
    backend_name: str,
    destinations: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """The six gradients. None: not needed, or zero."""
    backend = resolve(problem, config, backend_name)
    config = with_profile(config, problem, backend.name)
    if _is_empty(problem) or (grad_out is None and grad_lse is None):
        return (None,) * 6
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    arguments = (
        problem,
        config,
        grad_out,
        grad_lse,
        *_without_empty_context(tensors, problem),
        out,
        lse,
        needed,
    )
    if destinations is None or not getattr(backend, "takes_destinations", False):
        return backend.backward(*arguments)
    return backend.backward(*arguments, destinations=destinations)


def _backward_fake(grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any) -> Any:
    query, needs = arguments[0], arguments[-1]
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if need and tensor is not None
        else query.new_empty(0)
        for need, tensor in zip(needs, arguments[:6], strict=True)
    )


@lru_cache(maxsize=4096)
def _packed_problem(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    has_rpb: bool,
    heads_kv: int,
    window: tuple[int, ...],
    scale: float,
    requires_grad: bool,
) -> Problem:
    batch, *tokens, heads, head_dim = shape
    kernel_size, stride, dilation, is_causal, grid, origin = window_parts(window)
    return Problem(
        batch=batch,
        query_shape=tuple(tokens),
        key_shape=tuple(tokens),
        heads=heads - 2 * heads_kv,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=tuple(map(bool, is_causal)),
        grid=grid,
        query_origin=origin,
        key_origin=origin,
        scale=scale,
        has_rpb=has_rpb,
        dtype=dtype,
        device=device,
        requires_grad=requires_grad,
    )


def unpacked(qkv: Tensor, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value, the heads of one tensor."""
    # Tensor.split is Python around this.
    sizes = [qkv.shape[-2] - 2 * heads_kv, heads_kv, heads_kv]
    query, key, value = qkv.split_with_sizes(sizes, -2)
    return query, key, value


def packed_tensors(qkv: Tensor, rpb: Tensor | None, heads_kv: int) -> tuple[Tensor | None, ...]:
    """The tensors of the packed operator as the other one takes them."""
    return (*unpacked(qkv, heads_kv), rpb, None, None, None, None, None)


def window_parts(window: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The packed operator's kernel_size, stride, dilation, is_causal, grid and origin, which it
    takes one behind the other."""
    rank = len(window) // 6
    return tuple([tuple(window[start : start + rank]) for start in range(0, 6 * rank, rank)])


def _packed_plan(
    qkv: Tensor,
    rpb: Tensor | None,
    heads_kv: int,
    window: Sequence[int],
    scale: float,
    requires_grad: bool,
) -> tuple[tuple[Tensor | None, ...], Problem]:
    problem = _packed_problem(
        qkv.shape, qkv.dtype, qkv.device, rpb is not None, heads_kv, tuple(window), scale,
        requires_grad,
    )  # fmt: skip
    return packed_tensors(qkv, rpb, heads_kv), problem


def _packed_forward(
    qkv: Tensor,
    rpb: Tensor | None,
    heads_kv: int,
    window: Sequence[int],
    scale: float,
    backend: str,
    requires_grad: bool,
) -> tuple[Tensor, Tensor]:
    plan = _packed_plan(qkv, rpb, heads_kv, window, scale, requires_grad)
    return _run(*plan, DEFAULT_CONFIG, backend)


def _packed_forward_fake(qkv: Tensor, rpb: Any, heads_kv: int, *_: Any) -> tuple[Tensor, Tensor]:
    return _forward_fake(*unpacked(qkv, heads_kv))


def _packed_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    qkv: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads_kv: int,
    window: Sequence[int],
    scale: float,
    backend: str,
    requires_grad: bool,
    needs_qkv: bool,
    needs_rpb: bool,
) -> tuple[Tensor, Tensor]:
    tensors, problem = _packed_plan(qkv, rpb, heads_kv, window, scale, requires_grad)
    needs_rpb = needs_rpb and rpb is not None
    destinations = None
    if needs_qkv:
        gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        destinations = unpacked(gradient, heads_kv)
    else:
        gradient = qkv.new_empty(0)
    gradients = _run_backward(
        grad_out, grad_lse, tensors, out, lse,
        (needs_qkv, needs_qkv, needs_qkv, needs_rpb, False, False), problem, DEFAULT_CONFIG,
        backend, destinations,
    )  # fmt: skip
    if destinations is not None:
        for destination, part in zip(destinations, gradients[:3], strict=True):
            if part is None:
                destination.zero_()
            elif part is not destination:
                destination.copy_(part)
    if not needs_rpb or rpb is None:
        return gradient, qkv.new_empty(0)
    rpb_gradient = gradients[3]
    if rpb_gradient is None:
        return gradient, torch.zeros_like(rpb, memory_format=torch.contiguous_format)
    return gradient, _contiguous(_of_dtype(rpb_gradient, rpb.dtype))


def _packed_backward_fake(
    grad_out: Any, grad_lse: Any, qkv: Tensor, rpb: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_qkv, needs_rpb = rest[-2:]
    gradients = []
    for need, tensor in ((needs_qkv, qkv), (needs_rpb, rpb)):
        shape = tensor.shape if need and tensor is not None else (0,)
        dtype = qkv.dtype if tensor is None or not need else tensor.dtype
        gradients.append(torch.empty(shape, dtype=dtype, device=qkv.device))
    return gradients[0], gradients[1]


class _Attention(torch.autograd.Function):
    """The derivative of the forward operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return neighborhood_attention(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
        ctx.parameters = inputs[NUM_TENSORS:]
        # A gradient that nobody asks for stays None: filling it with zeros would cost a kernel.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        arguments = (grad_out, grad_lse, *saved, *ctx.parameters, needs)
        if transforming():
            gradients = _AttentionBackward.apply(*arguments)
        elif not torch.is_grad_enabled() and _is_plain(arguments[: NUM_TENSORS + 4]):
            gradients = _backward(*arguments)
        else:
            gradients = neighborhood_attention_backward(*arguments)
        kept = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*kept, *[None] * (len(ctx.needs_input_grad) - 6))


class _PackedAttention(torch.autograd.Function):
    """The derivative of the packed forward operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return packed_attention(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.parameters = inputs[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:2]
        arguments = (grad_out, grad_lse, *ctx.saved_tensors, *ctx.parameters, *needs)
        if transforming():
            gradients = _PackedAttentionBackward.apply(*arguments)
        elif not torch.is_grad_enabled() and _is_plain(arguments[:6]):
            gradients = _packed_backward(*arguments)
        else:
            gradients = packed_attention_backward(*arguments)
        kept = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*kept, None, None, None, None, None)


class _PlainAttention(torch.autograd.Function):
    """`_Attention` where nobody but autograd watches.

    torch spends 25 microseconds on a Function whose context is set up apart from its forward pass,
    which its transforms need, and 6 on one like this.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        _Attention.setup_context(ctx, arguments, output)
        return output

    backward = staticmethod(_Attention.backward)


class _PlainPackedAttention(torch.autograd.Function):
    """`_PackedAttention`, likewise."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _packed_forward(*arguments)
        _PackedAttention.setup_context(ctx, arguments, output)
        return output

    backward = staticmethod(_PackedAttention.backward)


# Function.apply first looks for default arguments, by inspection. The base class's apply, which it
# ends with, is all that a call without transforms needs.
_apply_plainly = super(torch.autograd.Function, _PlainAttention).apply
_apply_packed_plainly = super(torch.autograd.Function, _PlainPackedAttention).apply


class _OnceDifferentiable(torch.autograd.Function):
    """Refuses the second derivative, which would otherwise silently be zero."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(
            "neighborhood attention cannot be differentiated twice: its backward pass has no "
            "derivative"
        )


class _AttentionBackward(_OnceDifferentiable):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return neighborhood_attention_backward(*arguments)


class _PackedAttentionBackward(_OnceDifferentiable):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return packed_attention_backward(*arguments)


def transforming() -> bool:
    """Whether torch.func transforms are at work, which must see the Function and not the operator:
    the dispatcher does not hand them a Python kernel's derivative."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_is_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))


def _is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd watches: then the dispatcher has nothing to add.

    Its way to a Python kernel and back costs more than all the rest of a call (57 of 77
    microseconds), which counts for small windows. Tracers, modes, the profiler, subclasses and
    the meta device take it.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES:
            return False
        # Gradients may be batched (`is_grads_batched`) without being a subclass or functorch's.
        if tensor is not None and (tensor.is_meta or _is_batched(tensor)):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def call(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward operator, on the shortest way that autograd, compilers, tracers and torch.func
    allow."""
    if transforming():
        return _Attention.apply(*arguments)
    if _is_plain(arguments[:NUM_TENSORS]):
        # The last argument says whether gradients are needed.
        return _apply_plainly(*arguments) if arguments[-1] else _forward(*arguments)
    if torch.jit.is_tracing():
        constants = [
            [int(v) for v in p] if isinstance(p, (tuple, list)) else p
            for p in arguments[NUM_TENSORS:-1]
        ]
        return neighborhood_attention_traced(*arguments[:NUM_TENSORS], *constants, False)
    return neighborhood_attention(*arguments)


def call_packed(
    qkv: Tensor,
    rpb: Tensor | None,
    heads_kv: int,
    window: tuple[int, ...],
    scale: float,
    backend: str,
    requires_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The packed forward operator, on the shortest way as `call`."""
    arguments = (qkv, rpb, heads_kv, window, scale, backend, requires_grad)
    if transforming():
        return _PackedAttention.apply(*arguments)
    if _is_plain((qkv, rpb)):
        return _apply_packed_plainly(*arguments) if requires_grad else _packed_forward(*arguments)
    return packed_attention(*arguments)


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            forward_ad.unpack_dual(argument, level=0).tangent is not None
        ):
            raise NotImplementedError(
                "neighborhood attention does not support forward-mode differentiation (jvp); use "
                "backward mode"
            )


def _autograd_kernel(
    operator: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes, but for forward mode and torch.func.grad."""

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        # Compiled programs call the operator this way. The rest of the dispatcher's way costs as
        # much as what is behind it.
        if _is_plain(tuple([a for a in arguments if isinstance(a, Tensor)])):
            return implementation(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


neighborhood_attention = torch.ops.natten.neighborhood_attention.default
neighborhood_attention_backward = torch.ops.natten.neighborhood_attention_backward.default
neighborhood_attention_traced = torch.ops.natten.neighborhood_attention_traced.default
packed_attention = torch.ops.natten.packed_attention.default
packed_attention_backward = torch.ops.natten.packed_attention_backward.default

for _operator, _implementation, _fake, _function in (
    (neighborhood_attention, _forward, _forward_fake, _Attention),
    (neighborhood_attention_backward, _backward, _backward_fake, _AttentionBackward),
    (packed_attention, _packed_forward, _packed_forward_fake, _PackedAttention),
    (
        packed_attention_backward,
        _packed_backward,
        _packed_backward_fake,
        _PackedAttentionBackward,
    ),
):
    _name = _operator._opname
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(
        _name,
        _autograd_kernel(_operator, _implementation, _function),
        "Autograd",
        with_keyset=True,
    )
    torch.library.register_fake(f"natten::{_name}", _fake, lib=_library)


def _forward_traced(*arguments: Any) -> tuple[Tensor, Tensor]:
    is_causal = [bool(c) for c in arguments[_IS_CAUSAL]]
    # Whether there are gradients is a matter of each run.
    requires_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in arguments[:NUM_TENSORS]
    )
    return call(*arguments[:_IS_CAUSAL], is_causal, *arguments[_IS_CAUSAL + 1 : -1], requires_grad)


_library.impl("neighborhood_attention_traced", _forward_traced, "CompositeImplicitAutograd")


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """What autocast casts to where ``tensor`` is; None where it is off."""
    # torch refuses to be asked about the meta device.
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    """Cast as torch's attention does: every floating-point tensor but float64."""
    return [
        _of_dtype(t, dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]


def _autocast_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors = list(arguments[:NUM_TENSORS])
    # The bias is added in the accumulation dtype and keeps its own.
    dtype = autocast_dtype(tensors[0])
    cast = [*tensors[:3], *tensors[4:6]]
    if dtype is not None:
        cast = autocast(dtype, *cast)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return neighborhood_attention(
            *cast[:3], tensors[3], *cast[3:], *tensors[6:], *arguments[NUM_TENSORS:]
        )


def _packed_autocast_kernel(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = autocast(dtype, qkv)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return packed_attention(qkv, *rest)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("neighborhood_attention", _autocast_kernel, _key)
    _library.impl("packed_attention", _packed_autocast_kernel, _key)

__all__ = [
    "NUM_TENSORS",
    "autocast",
    "autocast_dtype",
    "call",
    "call_packed",
    "make_problem",
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "packed_attention",
    "packed_attention_backward",
    "packed_tensors",
    "transforming",
    "unpacked",
    "window_parts",
]
