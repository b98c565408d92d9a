"""The torch.library operators: schema, implementation, fake, derivative, autocast.

One pair of operators serves neighborhood attention of every rank, and dense, causal and varlen
attention, which are rank-1 problems. Without key and value, the query holds the heads of all three,
and so does its gradient: nothing has to be split or concatenated around the operator. All results
are fresh contiguous tensors.

    natten::neighborhood_attention           -> out, logsumexp
    natten::neighborhood_attention_backward  -> seven gradients, empty if not asked for
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten import _internals
from natten._internals import is_dense, is_plain, is_watched, plain_apply, transformed, transforming
from natten.functional import known as knowns
from natten.functional import sink as sinks
from natten.functional.backend import Inputs, Results
from natten.functional.call import (
    EVERYTHING,
    NUM_DIFFERENTIABLE,
    NUM_TENSORS,
    Call,
    Parameters,
    Tensors,
    flat,
    in_order,
    joined,
    make_call,
    make_problem,
    runs,
    separated,
    unpacked,
)
from natten.functional.decomposition import attention
from natten.functional.derivatives import gradient_tangents, output_tangents
from natten.functional.dispatch import resolve
from natten.functional.known import Known
from natten.functional.problem import accumulation_dtype
from natten.tuned import with_profile

_TENSORS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? sink, Tensor? cumulative_seqlen_q, "
    "Tensor? cumulative_seqlen_kv, Tensor? additional_lengths, Tensor? key_mask, "
    "Tensor? query_mask"
)
_PARAMETERS = (
    "SymInt heads_kv, SymInt[] window, float scale, float softcap, SymInt max_seqlen_q, "
    "SymInt max_seqlen_kv, str backend, str config, bool requires_grad"
)

library = _internals.library("natten")

# Calls by everything that validation looks at. Cleared when full, which shapes that never repeat
# can cause.
_calls: dict[tuple[Any, ...], Call] = {}
_MAX_CALLS = 4096


def _remembered(key: tuple[Any, ...], make: Callable[..., Call], *arguments: Any) -> Call:
    """The call of a key, made of the arguments if it is new.

    Raises:
        TypeError: Symbolic sizes of a compiler, which are not hashable, in the key.
    """
    found = _calls.get(key)
    if found is None:
        found = make(*arguments)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = found
    return found


def forget() -> None:
    """Make calls anew: who runs them has changed."""
    _calls.clear()
    knowns.forget()


def _identity(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """What validation looks at of each tensor, but for its layout in memory."""
    return [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]


def _planned(tensors: Tensors, parameters: Parameters) -> Call:
    """The call that the operator's arguments state, validated."""
    for tensor in tensors:
        # Layouts are not part of the key.
        if tensor is not None and tensor.layout is not torch.strided:
            return make_call(tensors, parameters)
    parameters = parameters._replace(window=tuple(parameters.window))
    return _remembered((*_identity(tensors), parameters), make_call, tensors, parameters)


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Even where there is nothing to do, to() takes as long as an allocation.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _compute(
    call: Call, tensors: Tensors, destination: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out, which is the destination if it could be written there, and logsumexp."""
    problem = call.problem
    backend = resolve(problem, call.config, call.parameters.backend)
    config = with_profile(call.config, problem, backend.name)
    call.check_values(tensors)
    if problem.grids is not None and not call.is_empty:
        if not backend.takes_grids(problem, call.config, False):
            return _compute_runs(call, tensors)
        config = call.config
    if call.is_empty:
        query, shape = tensors.query, call.out_shape
        lse = query.new_full(shape[:-1], -torch.inf, dtype=problem.accumulation_dtype)
        if tensors.sink is not None:
            lse.copy_(tensors.sink)
            if tensors.query_mask is not None:
                lse.masked_fill_(~tensors.query_mask.unsqueeze(-1), -torch.inf)
        return query.new_zeros(shape), lse
    views: tuple[Tensor, ...] = ()
    if destination is not None:
        views = (flat(destination) if call.is_flat else destination,)
    out, lse = backend.forward(problem, config, call.prepared(tensors), *views)
    lse = call.result(lse, call.out_shape[:-1])
    if destination is not None and out is views[0]:
        return destination, lse
    return call.result(out, call.out_shape), lse


def _compute_runs(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """`_compute` of grids of different sizes, those of one size at a time."""
    found = [_compute(run.call, run.of(tensors)) for run in runs(call, tensors)]
    return in_order(found, call.problem.rank)


def _compute_backward_of_runs(
    call: Call,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: Tensors,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """`_compute_backward` of these."""
    parts = []
    for run in runs(call, tensors):
        out_part = None if grad_out is None else run.of_tokens(grad_out)
        lse_part = None if grad_lse is None else run.of_tokens(grad_lse)
        results = run.of_tokens(out), run.of_tokens(lse)
        own = run.of(tensors)
        parts.append(_compute_backward(run.call, out_part, lse_part, own, *results, needs))
    return joined(call, tensors, parts)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _present(arguments: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors that there are, and which are missing."""
    return [t for t in arguments if t is not None], [t is None for t in arguments]


def _places(missing: Sequence[bool]) -> tuple[int, ...]:
    """Where the tensors that there are stand among all."""
    return tuple([place for place, is_missing in enumerate(missing) if not is_missing])


def _spread(values: Sequence[Any], places: Sequence[int], count: int) -> list[Any]:
    """Values in their places of so many, None in all others."""
    found = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def _known_forward(call: Call, tensors: Sequence[Tensor], places: tuple[int, ...]) -> Known:
    """The forward pass of a call on tensors such as these, which stand at these places among the
    operator's."""

    def compute(given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _compute(call, Tensors(*_spread(given, places, NUM_TENSORS)))

    return Known(call, places, tensors, compute)


def _known_backward(
    call: Call,
    tensors: Sequence[Tensor],
    places: tuple[int, ...],
    needs: tuple[bool, ...],
    returned: Sequence[int] | None = None,
) -> Known:
    """The backward pass; behind the operator's tensors come out, logsumexp and their gradients.
    Which gradients are ``returned``, by number, that of the last is None; or as the operator does.
    """

    def compute(given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        *all_tensors, out, lse, grad_out, grad_lse = _spread(given, places, NUM_TENSORS + 4)
        tensors = Tensors(*all_tensors)
        found = _compute_backward(call, grad_out, grad_lse, tensors, out, lse, needs)
        if returned is None:
            return _filled(found, tensors.query)
        return tuple([(*found, None)[number] for number in returned])

    return Known(call, places, tensors, compute)


def _filled(gradients: Sequence[Tensor | None], query: Tensor) -> tuple[Tensor, ...]:
    """Gradients as the operator returns them: empty where none is asked for."""
    return tuple([query.new_empty(0) if g is None else g for g in gradients])


def _compute_backward(
    call: Call,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: Tensors,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
    destinations: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients; of query, key and value, which are all asked for then, the destinations if
    there are any."""
    problem = call.problem
    needs = tuple(
        [n and t is not None for n, t in zip(needs, tensors[:NUM_DIFFERENTIABLE], strict=True)]
    )
    backend = resolve(problem, call.config, call.parameters.backend)
    config = with_profile(call.config, problem, backend.name)
    call.check_values(tensors)
    if problem.grids is not None and not call.is_empty:
        if not backend.takes_grids(problem, call.config, True):
            return _compute_backward_of_runs(call, grad_out, grad_lse, tensors, out, lse, needs)
        config = call.config
    *wanted, sink = [
        t if need else None for need, t in zip(needs, tensors[:NUM_DIFFERENTIABLE], strict=True)
    ]
    grad_sink = None
    if sink is not None:
        grad_sink = sinks.gradient(sink, out, lse, grad_out, grad_lse)
    *needed, _ = needs
    is_zero = call.is_empty or (grad_out is None and grad_lse is None)
    if is_zero or not any(needed):
        return (*[None if t is None else _zeros(t) for t in wanted], grad_sink)
    gradients: list[Tensor | None] = [None] * len(wanted)
    parts = None
    if destinations is not None:
        gradients[:3] = destinations
        d_query, d_key, d_value = destinations
        parts = (flat(d_query), flat(d_key), flat(d_value)) if call.is_flat else destinations
    elif call.is_packed:
        if needed[0]:
            whole = torch.empty_like(tensors.query, memory_format=torch.contiguous_format)
            gradients[0] = whole
            parts = unpacked(flat(whole) if call.is_flat else whole, call.parameters.heads_kv)
        needed[:3] = [needed[0]] * 3
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if call.is_flat:
        out, grad_out, lse = flat(out), flat(grad_out), lse.flatten(1, -2)
        grad_lse = None if grad_lse is None else grad_lse.flatten(1, -2)
    results = Results(out, lse, grad_out, grad_lse)
    inputs = call.prepared(tensors)
    found = backend.backward(problem, config, inputs, results, tuple(needed), parts)
    if parts is not None:
        for destination, part in zip(parts, found[:3], strict=True):
            if part is None:
                destination.zero_()
            elif part is not destination:
                destination.copy_(part)
    for i in range(3 if call.is_packed or parts is not None else 0, len(wanted)):
        tensor, gradient = wanted[i], found[i]
        if tensor is not None:
            gradient = _zeros(tensor) if gradient is None else _of_dtype(gradient, tensor.dtype)
            gradients[i] = call.result(gradient, tensor.shape)
    return (*gradients, grad_sink)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Named tuples are made only where they are needed.
    tensors, (heads_kv, window, *others) = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
    parameters = (heads_kv, tuple(window), *others)
    present, missing = _present(tensors)
    key = (_forward, parameters, tensors[0].shape, *missing)
    known = knowns.find(key, present)
    if known is None:
        call = _planned(Tensors(*tensors), Parameters(*parameters))
        if not is_dense(present):
            return _compute(call, Tensors(*tensors))
        known = knowns.add(key, _known_forward(call, present, _places(missing)))
    out, lse = known.run(present)
    return out, lse  # type: ignore[return-value]


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    tensors = arguments[:NUM_TENSORS]
    out, lse, heads_kv, window, *others, needs = arguments[NUM_TENSORS:]
    parameters, needs = (heads_kv, tuple(window), *others), tuple(needs)
    present, missing = _present((*tensors, out, lse, grad_out, grad_lse))
    key = (_backward, parameters, needs, tensors[0].shape, *missing)
    known = knowns.find(key, present)
    if known is None:
        call = _planned(Tensors(*tensors), Parameters(*parameters))
        call.check_results(out, lse, grad_out, grad_lse)
        if len(needs) != NUM_DIFFERENTIABLE:
            raise ValueError(
                f"needs must hold {NUM_DIFFERENTIABLE} flags, one for each gradient, got "
                f"{len(needs)}"
            )
        if not is_dense(present):
            given = Tensors(*tensors)
            found = _compute_backward(call, grad_out, grad_lse, given, out, lse, needs)
            return _filled(found, given.query)
        known = knowns.add(key, _known_backward(call, present, _places(missing), needs))
    return known.run(present)  # type: ignore[return-value]


def check_devices(arguments: tuple[Any, ...]) -> None:
    """Refuse tensors of which some have no data: results would have memory that nobody wrote."""
    devices = {t.device for t in arguments if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


# Those who want to know which calls a function makes that computes nothing.
_observers: list[Callable[[Call], None]] = []


@contextmanager
def observing(observer: Callable[[Call], None]) -> Iterator[None]:
    """Inside, ``observer`` is told of each call that is made of tensors without data."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    check_devices(arguments)
    for observer in _observers:
        observer(make_call(Tensors(*arguments[:NUM_TENSORS]), Parameters(*arguments[NUM_TENSORS:])))
    query, key, value = arguments[:3]
    heads_kv = arguments[NUM_TENSORS]
    rows = query.shape[:-1]
    if key is None:
        rows = (*query.shape[:-2], query.shape[-2] - 2 * heads_kv)
    features = query.shape[-1] if value is None else value.shape[-1]
    accumulate = accumulation_dtype(query.dtype)
    return query.new_empty((*rows, features)), query.new_empty(rows, dtype=accumulate)


def _backward_fake(grad_out: Any, grad_lse: Any, *arguments: Any) -> tuple[Tensor, ...]:
    check_devices((grad_out, grad_lse, *arguments))
    query, needs = arguments[0], arguments[-1]
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if need and tensor is not None
        else query.new_empty(0)
        for need, tensor in zip(needs, arguments[:NUM_DIFFERENTIABLE], strict=True)
    )


class _Attention(torch.autograd.Function):
    """The derivative of the forward operator."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        saved = (*inputs[:NUM_TENSORS], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.parameters = inputs[NUM_TENSORS:]
        # A gradient that nobody asks for stays None: filling it with zeros would cost a kernel.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
        # Once: hooks on saved tensors, as of checkpointing, may compute them.
        arguments = (grad_out, grad_lse, *ctx.saved_tensors, *ctx.parameters, needs)
        differentiate = neighborhood_attention_backward
        if "torch._dynamo" in sys.modules and transforming():
            # Between two parts of a compiled program, whose compiler would look into this one.
            differentiate = _internals.uncompiled(differentiate)
        found = differentiate(*arguments)
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - NUM_DIFFERENTIABLE))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        tensors = Tensors(*ctx.saved_tensors[:NUM_TENSORS])
        with _internals.below_autocast():
            call = _traceable(tensors, Parameters(*ctx.parameters))
            return output_tangents(call, tensors, tangents)


class _PlainAttention(torch.autograd.Function):
    """`_Attention` where nobody but autograd watches, of the tensors that there are.

    torch spends 25 microseconds on a Function whose context is set up apart from its forward pass,
    which its transforms need, and 6 on one like this.
    """

    @staticmethod
    def forward(ctx: Any, known: Known, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        output = known.run(tensors)
        ctx.save_for_backward(*tensors, *output)
        ctx.known = known
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        forward: Known = ctx.known
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_watched():
            given = [t for t in (*saved, grad_out, grad_lse) if t is not None]
            key = (forward, ctx.needs_input_grad, grad_out is None, grad_lse is None)
            known = knowns.find(key, given)
            if known is None and is_dense(given):
                known = knowns.add(key, _gradients(given, *key))
            if known is not None:
                return known.run(given)
        tensors = _spread(saved[:-2], forward.places, NUM_TENSORS)
        needs = _needs(forward, ctx.needs_input_grad)
        found = neighborhood_attention_backward(
            grad_out, grad_lse, *tensors, *saved[-2:], *forward.call.parameters, list(needs)
        )
        is_asked = (*needs, *[False] * (NUM_TENSORS - NUM_DIFFERENTIABLE))
        return None, *[found[p] if is_asked[p] else None for p in forward.places]


def _needs(forward: Known, needs_input_grad: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which gradients the operator is to compute for `_PlainAttention`."""
    found = _spread(needs_input_grad[1:], forward.places, NUM_TENSORS)
    return tuple([bool(need) for need in found[:NUM_DIFFERENTIABLE]])


def _gradients(
    tensors: Sequence[Tensor],
    forward: Known,
    needs_input_grad: tuple[bool, ...],
    no_grad_out: bool,
    no_grad_lse: bool,
) -> Known:
    """The backward pass of `_PlainAttention` on tensors such as these."""
    missing = [place not in forward.places for place in range(NUM_TENSORS)]
    places = _places((*missing, False, False, no_grad_out, no_grad_lse))
    returned = [min(place, NUM_DIFFERENTIABLE) for place in (NUM_TENSORS, *forward.places)]
    needs = _needs(forward, needs_input_grad)
    return _known_backward(forward.call, tensors, places, needs, returned)


_apply_plainly = plain_apply(_PlainAttention)


def _traceable(tensors: Tensors, parameters: Parameters) -> Call:
    """As `_planned`, for symbolic sizes too."""
    try:
        return _planned(tensors, parameters)
    except TypeError:
        return make_call(tensors, parameters)


class _AttentionBackward(torch.autograd.Function):
    """The derivative of the backward operator, as a function of the gradients that it is given and
    the call's tensors: out and logsumexp are what the forward operator makes of those."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saved = inputs[: 2 + NUM_TENSORS]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        *ctx.parameters, ctx.needs = inputs[4 + NUM_TENSORS :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        grad_out, grad_lse, *saved = ctx.saved_tensors
        tensors = Tensors(*saved)
        directions = tuple([d if n else None for d, n in zip(directions, ctx.needs, strict=True)])
        with _internals.below_autocast():
            call = _traceable(tensors, Parameters(*ctx.parameters))
            out, lse, gradients = gradient_tangents(call, tensors, directions, (grad_out, grad_lse))
        return (
            None if grad_out is None else out,
            None if grad_lse is None else lse,
            *gradients,
            *[None] * (len(ctx.needs_input_grad) - 2 - NUM_DIFFERENTIABLE),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grad_out, grad_lse, *saved = ctx.saved_tensors
        tensors = Tensors(*saved)
        with _internals.below_autocast():
            call = _traceable(tensors, Parameters(*ctx.parameters))
            _, _, gradients = gradient_tangents(
                call, tensors, tangents[2:], (grad_out, grad_lse), tangents[:2]
            )
        return tuple(
            tensors.query.new_zeros(0) if g is None or not need else g
            for g, need in zip(gradients, ctx.needs, strict=True)
        )


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """What autocast casts to where ``tensor`` is; None where it is off."""
    # For most calls that is all there is to ask. torch refuses to be asked about the meta device.
    if not _internals.any_autocast() or not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    """Cast as torch's attention does: every floating-point tensor but float64."""
    return [
        t.to(dtype)
        if isinstance(t, Tensor)
        # Most often there is nothing to do, and to() takes as long as an allocation.
        and t.dtype != dtype
        and t.is_floating_point()
        and t.dtype != torch.float64
        else t
        for t in tensors
    ]


def _autocast(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of the operator as it gets them under autocast."""
    dtype = autocast_dtype(arguments[0])
    if dtype is None:
        return arguments
    # Bias and sink are added in the accumulation dtype and keep their own.
    query, key, value, rpb, more_keys, more_values, *rest = arguments
    query, key, value, more_keys, more_values = autocast(
        dtype, query, key, value, more_keys, more_values
    )
    return (query, key, value, rpb, more_keys, more_values, *rest)


class _Hidden:
    """Keeps a list from torch's vmap, whose rule for forward mode takes it for many arguments."""

    def __init__(self, values: Any) -> None:
        self.values = values


def _revealed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([a.values if isinstance(a, _Hidden) else a for a in arguments])


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
    cast: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Define an operator of this package and everything that torch wants to know of it.

    Args:
        name: Its name in the namespace "natten".
        schema: Its arguments and results, as in ``torch.library.define``.
        implementation: Computes it, of any arguments that the schema allows.
        fake: Its results without data.
        function: Its derivatives: a Function with ``setup_context``, ``backward`` and ``jvp``,
            and ``vmap`` or ``generate_vmap_rule``. It gets the operator itself as its forward pass.
        cast: The arguments under autocast; None where it has no part in it.

    Returns:
        What calls it, in eager mode, under compilers and tracers and under torch.func.
    """
    library.define(name + schema)
    operator = getattr(torch.ops.natten, name).default

    def forward(*arguments: Any) -> Any:
        with _internals.below_autograd():
            return operator(*_revealed(arguments))

    set_up, jvp = function.setup_context, function.jvp

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        set_up(ctx, _revealed(inputs), output)

    def nested_jvp(ctx: Any, *tangents: Any) -> Any:
        with _internals.in_outer_levels(ctx) as outer:
            return jvp(outer, *tangents)

    function.forward = staticmethod(forward)  # type: ignore[method-assign]
    function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    function.jvp = staticmethod(nested_jvp)  # type: ignore[method-assign]
    apply = plain_apply(function)

    def differentiated(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        """What torch.library.register_autograd makes, but for forward mode and torch.func.grad."""
        if _internals.in_forward_mode() or (
            torch.is_grad_enabled() and _internals.any_requires_grad(*arguments)
        ):
            return apply(*arguments)
        # Compiled programs call the operator this way. The rest of the dispatcher's way costs as
        # much as what is behind it.
        if is_plain([a for a in arguments if isinstance(a, Tensor)]):
            return implementation(*arguments)
        with _internals.below_autograd():
            return operator.redispatch(keyset & _internals.after_autograd, *arguments)

    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, differentiated, "Autograd", with_keyset=True)
    tell_inductor = _internals.called_directly(operator, f"{name}_compiled", implementation)

    def traced(*arguments: Any) -> Any:
        tell_inductor()
        return fake(*arguments)

    torch.library.register_fake(f"natten::{name}", traced, lib=library)
    if cast is not None:

        def under_autocast(*arguments: Any) -> Any:
            arguments = cast(*arguments)
            with _internals.below_autocast():
                return operator(*arguments)

        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, under_autocast, key)

    def call(*arguments: Any) -> Any:
        if not transforming():
            return operator(*arguments)
        if function.generate_vmap_rule:
            arguments = tuple([_Hidden(a) if isinstance(a, list | tuple) else a for a in arguments])
        return transformed(function, arguments)

    return call


neighborhood_attention_backward = define(
    "neighborhood_attention_backward",
    f"(Tensor? grad_out, Tensor? grad_logsumexp, {_TENSORS}, Tensor out, Tensor logsumexp, "
    f"{_PARAMETERS}, bool[] needs) -> ({', '.join(['Tensor'] * NUM_DIFFERENTIABLE)})",
    _backward,
    _backward_fake,
    _AttentionBackward,
)
neighborhood_attention = define(
    "neighborhood_attention",
    f"({_TENSORS}, {_PARAMETERS}) -> (Tensor out, Tensor logsumexp)",
    _forward,
    _forward_fake,
    _Attention,
    _autocast,
)


def _decomposed(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward operator in operators of torch's own, for exported programs."""
    tensors, parameters = Tensors(*arguments[:NUM_TENSORS]), Parameters(*arguments[NUM_TENSORS:])
    problem = make_problem(tensors, parameters)
    if problem.grids is not None:
        each = runs(make_call(tensors, parameters), tensors)
        found = [_decomposed(*run.of(tensors), *run.call.parameters) for run in each]
        return in_order(found, problem.rank)
    if len(parameters.window) == 4 * problem.rank and not problem.is_circular:
        # Which of query and key is longer is no part of a program for all sizes.
        shapes = zip(problem.query_shape, problem.key_shape, problem.grid, parameters.window)
        grid = tuple([q + k if size == EVERYTHING else n for q, k, n, size in shapes])
        sizes = zip(problem.kernel_size, grid, parameters.window)
        kernel_size = tuple([n if size == EVERYTHING else k for k, n, size in sizes])
        problem = replace(problem, grid=grid, kernel_size=kernel_size)
    query, key, value = separated(tensors, parameters.heads_kv)
    return attention(problem, Inputs(query, key, value, *tensors[3:]))


_internals.decompose(torch.ops.natten.neighborhood_attention.default, _decomposed, _forward_fake)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``natten::neighborhood_attention`` is made of in torch's own operators, for
    ``ExportedProgram.run_decompositions``: gathers, products of matrices and a softmax, for all
    sizes that the program is for, in memory linear in tokens times window times head_dim.

    ``torch.onnx.export(dynamo=True)`` looks it up by itself.
    """
    return {torch.ops.natten.neighborhood_attention.default: _decomposed}


# The same for torch.jit.trace, which takes lists of plain integers only.
library.define(
    f"neighborhood_attention_traced({_TENSORS}, {_PARAMETERS.replace('SymInt', 'int')}) "
    "-> (Tensor out, Tensor logsumexp)"
)


def _forward_traced(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, parameters = arguments[:NUM_TENSORS], Parameters(*arguments[NUM_TENSORS:])
    # Whether there are gradients is a matter of each run.
    requires_grad = needs_grad(tensors)
    return neighborhood_attention(*tensors, *parameters._replace(requires_grad=requires_grad))


library.impl("neighborhood_attention_traced", _forward_traced, "CompositeImplicitAutograd")


def needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward pass may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors[:NUM_DIFFERENTIABLE]:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _text(arguments: tuple[Any, ...]) -> Any:
    """What tells arguments apart in a cache: 1 from True and 1.0, and lists as well."""
    try:
        return pickle.dumps(arguments, 4)
    except Exception:  # whatever an argument that has no place there raises
        return repr(arguments)


def _make(
    tensors: Tensors, arguments: tuple[Any, ...], check: Callable[..., Parameters], needs: bool
) -> Call:
    return make_call(tensors, check(tensors, *arguments)._replace(requires_grad=needs))


def _validated(
    tensors: Tensors, arguments: tuple[Any, ...], check: Callable[..., Parameters]
) -> Call | None:
    """The call of a public function's arguments; None where they are checked on another way."""
    try:
        needs = needs_grad(tensors)
        key = (check, *_identity(tensors), _text(arguments), needs)
        return _remembered(key, _make, tensors, arguments, check, needs)
    except (AttributeError, RuntimeError, TypeError):
        # What is no tensor has no shape, nested tensors have none, and symbolic sizes are not
        # hashable: the first two are told so where the last know their way.
        return None


def _known(
    present: list[Tensor],
    tensors: Tensors,
    arguments: tuple[Any, ...],
    check: Callable[..., Parameters],
) -> Known | None:
    """What is known of a public function's call; None if it is not one on dense tensors."""
    try:
        missing = [t is None for t in tensors]
        key = (check, _text(arguments), torch.is_grad_enabled(), tensors[0].shape, *missing)
        known = knowns.find(key, present)
    except (AttributeError, RuntimeError, TypeError):
        # What is no tensor has no shape, nested tensors have none.
        return None
    if known is None:
        call = _validated(tensors, arguments, check)
        if call is not None and is_dense(present):
            known = knowns.add(key, _known_forward(call, present, _places(missing)))
    return known


def attend(
    tensors: Tensors, arguments: tuple[Any, ...], check: Callable[..., Parameters]
) -> tuple[Tensor, Tensor]:
    """out and logsumexp of a public function's call, on the shortest way that autograd, compilers,
    tracers and torch.func allow.

    Args:
        tensors: As the user gives them.
        arguments: All others.
        check: Checks tensors and arguments, and makes the operator's parameters of them; whether
            gradients are needed is seen to here. Once for each kind of call.
    """
    if not is_watched():
        present = [t for t in tensors if t is not None]
        known = _known(present, tensors, arguments, check)
        if known is not None:
            if known.call.parameters.requires_grad:
                return _apply_plainly(known, *present)
            out, lse = known.run(present)
            return out, lse  # type: ignore[return-value]
    elif "torch._dynamo" in sys.modules and _internals.in_forward_mode():
        if torch.compiler.is_compiling():
            if _internals.only_forward_mode():
                return _dispatched_duals(tensors, arguments, check)
            # The compiler knows no derivatives of these: this part of a program runs without it.
            torch._dynamo.graph_break(msg=_NESTED)
        return _internals.uncompiled(_dispatched)(tensors, arguments, check)
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        call = _validated(tensors, arguments, check)
        if call is not None:
            return neighborhood_attention(*tensors, *call.parameters)
    return _dispatched(tensors, arguments, check)


_NESTED = (
    "neighborhood attention in forward mode (torch.func.jvp) beside another derivative is not "
    "compiled: leave out fullgraph=True, or the compilation of what is around it"
)


def _dispatched(
    tensors: Tensors, arguments: tuple[Any, ...], check: Callable[..., Parameters]
) -> tuple[Tensor, Tensor]:
    parameters = check(tensors, *arguments)._replace(requires_grad=needs_grad(tensors))
    if torch.jit.is_tracing():
        return torch.ops.natten.neighborhood_attention_traced(*tensors, *parameters)
    return neighborhood_attention(*tensors, *parameters)


# What torch.func.jvp makes of attention in a compiled program, as one node of it, and the gradients
# of its tangents: the compiler has duals, and knows no tangents of operators.
_NUM_DUALS = NUM_TENSORS + NUM_DIFFERENTIABLE
_DUALS = ", ".join([_TENSORS, *(f"Tensor? tangent_{i}" for i in range(NUM_DIFFERENTIABLE))])
library.define(
    f"neighborhood_attention_duals({_DUALS}, {_PARAMETERS}) "
    "-> (Tensor out, Tensor logsumexp, Tensor out_tangent, Tensor logsumexp_tangent)"
)
library.define(
    "neighborhood_attention_duals_backward(Tensor? grad_out_tangent, "
    f"Tensor? grad_logsumexp_tangent, {_DUALS}, {_PARAMETERS}, bool[] needs) "
    f"-> ({', '.join(['Tensor'] * NUM_DIFFERENTIABLE)})"
)


def _forward_duals(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, parameters = Tensors(*arguments[:NUM_TENSORS]), Parameters(*arguments[_NUM_DUALS:])
    tangents = arguments[NUM_TENSORS:_NUM_DUALS]
    results = _forward(*tensors, *parameters)
    return *results, *output_tangents(_traceable(tensors, parameters), tensors, tangents)


def _forward_duals_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = *arguments[:NUM_TENSORS], *arguments[_NUM_DUALS:]
    return *_forward_fake(*given), *_forward_fake(*given)


def _backward_duals(*arguments: Any) -> tuple[Tensor, ...]:
    # The gradient of <g, J x'>, of the derivative J of the results and any x', is what changes of
    # the gradient J^T g along x'.
    tensors, tangents = Tensors(*arguments[2 : 2 + NUM_TENSORS]), arguments[2 + NUM_TENSORS :]
    call = _traceable(tensors, Parameters(*arguments[2 + _NUM_DUALS : -1]))
    _, _, gradients = gradient_tangents(
        call, tensors, tangents[:NUM_DIFFERENTIABLE], arguments[:2], (None, None)
    )
    return tuple(
        tensors.query.new_empty(0) if g is None or not need else g
        for g, need in zip(gradients, arguments[-1], strict=True)
    )


def _backward_duals_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(
        arguments[2].new_empty(0) if t is None or not need
        else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, need in zip(arguments[2:], arguments[-1], strict=False)
    )  # fmt: skip


def _set_up_duals(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_DUALS], *output[:2])
    ctx.parameters = inputs[_NUM_DUALS:]
    ctx.set_materialize_grads(False)


def _differentiate_duals(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    *saved, out, lse = ctx.saved_tensors
    tensors, of_results, of_tangents = saved[:NUM_TENSORS], gradients[:2], gradients[2:]
    needs = [*ctx.needs_input_grad[:NUM_DIFFERENTIABLE]]
    needs_tangents = [*ctx.needs_input_grad[NUM_TENSORS:_NUM_DUALS]]

    def first_order(given: Sequence[Tensor | None], needs: list[bool]) -> Sequence[Any]:
        if not any(needs) or all(gradient is None for gradient in given):
            return [None] * len(needs)
        return neighborhood_attention_backward(*given, *tensors, out, lse, *ctx.parameters, needs)

    found = list(first_order(of_results, needs))
    if any(needs) and any(gradient is not None for gradient in of_tangents):
        more = torch.ops.natten.neighborhood_attention_duals_backward(
            *of_tangents, *saved, *ctx.parameters, needs
        )
        found = [b if a is None else a + b for a, b in zip(found, more, strict=True)]
    kept = [g if need else None for g, need in zip(found, needs, strict=True)]
    along = first_order(of_tangents, needs_tangents)
    kept_along = [g if need else None for g, need in zip(along, needs_tangents, strict=True)]
    between, after = NUM_TENSORS - NUM_DIFFERENTIABLE, len(ctx.parameters)
    return *kept, *[None] * between, *kept_along, *[None] * after


for _name, _compute_duals, _fake_duals in (
    ("neighborhood_attention_duals", _forward_duals, _forward_duals_fake),
    ("neighborhood_attention_duals_backward", _backward_duals, _backward_duals_fake),
):
    library.impl(_name, _compute_duals, "CompositeExplicitAutograd")
    torch.library.register_fake(f"natten::{_name}", _fake_duals, lib=library)
torch.library.register_autograd(
    "natten::neighborhood_attention_duals",
    _differentiate_duals,
    setup_context=_set_up_duals,
    lib=library,
)


def _dispatched_duals(
    tensors: Tensors, arguments: tuple[Any, ...], check: Callable[..., Parameters]
) -> tuple[Tensor, Tensor]:
    """`_dispatched`, with duals as a compiler is to see them."""
    duals = [None if t is None else forward_ad.unpack_dual(t) for t in tensors[:NUM_DIFFERENTIABLE]]
    tangents = [None if dual is None else dual.tangent for dual in duals]
    primals: list[Any] = [None if dual is None else dual.primal for dual in duals]
    own = Tensors(*primals, *tensors[NUM_DIFFERENTIABLE:])
    parameters = check(own, *arguments)._replace(requires_grad=needs_grad(own))
    out, lse, out_tangent, lse_tangent = torch.ops.natten.neighborhood_attention_duals(
        *own, *tangents, *parameters
    )
    return forward_ad.make_dual(out, out_tangent), forward_ad.make_dual(lse, lse_tangent)


__all__ = [
    "attend",
    "autocast",
    "autocast_dtype",
    "check_devices",
    "decompositions",
    "define",
    "forget",
    "needs_grad",
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "observing",
]
