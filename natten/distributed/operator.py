"""The operators of attention over a sharded grid.

    natten::sharded_attention           -> out, logsumexp, halo
    natten::sharded_attention_backward  -> gradients of the inputs, empty if not asked for

Exchange and products are one operator, so that each pass orders them as it likes, and compiled
programs have one node where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from natten.distributed import blocks, halo
from natten.distributed.call import (
    NUM_DIFFERENTIABLE,
    NUM_TENSORS,
    Call,
    Inputs,
    Results,
    automatic_method,
)
from natten.distributed.exchange import Statement, agree
from natten.distributed.sharding import layout
from natten.flops import attention_backward_flops, attention_flops
from natten.functional.call import Tensors
from natten.functional.problem import accumulation_dtype
from natten.window import Axis

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? sink, Tensor? additional_lengths, Tensor? key_mask, "
    "Tensor? query_mask"
)
_PARAMETERS = (
    "str sharding, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "
    "bool[] is_circular, float scale, float softcap, str backend, str method, str transport, "
    "int head_chunks, bool save_halo, bool requires_grad"
)
_METHODS: dict[str, Any] = {"halo": halo, "merge": blocks, "ring": blocks}

_library = torch.library.Library("natten", "FRAGMENT")
_library.define(
    f"sharded_attention({_TENSORS}, {_PARAMETERS}) -> (Tensor out, Tensor logsumexp, Tensor halo)"
)
_library.define(
    f"sharded_attention_backward(Tensor? grad_out, Tensor? grad_logsumexp, {_TENSORS}, "
    f"Tensor out, Tensor logsumexp, Tensor halo, {_PARAMETERS}, bool[] needs) "
    f"-> ({', '.join(['Tensor'] * NUM_DIFFERENTIABLE)})"
)


@lru_cache(maxsize=4096)
def _call(sharding: str, *parameters: Any) -> Call:
    *window, scale, softcap, backend, method, transport, head_chunks, save_halo = parameters
    placed = layout(sharding)
    axes = tuple(map(Axis, placed.grid, *window))
    options = transport, head_chunks, save_halo
    call = Call(placed, axes, scale, softcap, backend, method, *options)
    return replace(call, method=automatic_method(call)) if method == "auto" else call


def _call_of(parameters: Sequence[Any]) -> Call:
    sharding, *others, _ = parameters
    # Lists, where the operator was called.
    return _call(sharding, *[tuple(p) if isinstance(p, list) else p for p in others])


def _statement(inputs: Inputs, call: Call, requires_grad: bool) -> Statement:
    """What all ranks must have in common."""
    query, key, value, rpb, additional_keys, _, *others = inputs
    sink, lengths, key_mask, query_mask = others
    _, kernel_size, stride, dilation, is_causal, is_circular, _ = zip(*call.window)
    return (
        ("grid", call.layout.grid),
        ("the boxes of the ranks", call.layout.boxes),
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
        ("is_causal", is_causal),
        ("is_circular", is_circular),
        ("scale", call.scale),
        ("softcap", call.softcap),
        ("dtype", query.dtype),
        ("the batch size", query.shape[0]),
        ("query's [heads, head_dim]", tuple(query.shape[-2:])),
        ("key's [heads, head_dim]", tuple(key.shape[-2:])),
        ("value's [heads, head_dim]", tuple(value.shape[-2:])),
        ("the number of additional keys", additional_keys is not None and additional_keys.shape[1]),
        ("whether there are additional_lengths", lengths is not None),
        ("whether there is an rpb", rpb is not None),
        ("whether there is a sink", sink is not None),
        ("whether there is a key_mask", key_mask is not None),
        ("whether there is a query_mask", query_mask is not None),
        ("method", call.method),
        ("transport", call.transport),
        ("head_chunks", call.head_chunks),
        ("save_halo", call.save_halo),
        # A rank that skips its backward pass leaves the others waiting in theirs.
        ("whether gradients are needed", requires_grad),
    )


def _agree_on(inputs: Inputs, parameters: Sequence[Any], heads_dim: int | None = None) -> None:
    call = _call_of(parameters)
    statement = (*_statement(inputs, call, parameters[-1]), ("heads_dim", heads_dim))
    agree(call.layout.group, statement)


def _agreement(*arguments: Any) -> Tensor:
    inputs, *parameters, heads_dim = (Inputs(*arguments[:NUM_TENSORS]), *arguments[NUM_TENSORS:])
    _agree_on(inputs, parameters, heads_dim)
    return inputs.query.new_zeros(())


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, parameters = Inputs(*arguments[:NUM_TENSORS]), arguments[NUM_TENSORS:]
    _agree_on(inputs, parameters)
    call = _call_of(parameters)
    out, lse, received = _METHODS[call.method].forward(call, inputs)
    return out, lse, received if call.saves_halo else received.new_empty(0)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, parameters = Inputs(*arguments[:NUM_TENSORS]), arguments[NUM_TENSORS:]
    call, rows = _call_of(parameters), inputs.query.shape[:-1]
    return (
        inputs.query.new_empty((*rows, inputs.value.shape[-1])),
        inputs.query.new_empty(rows, dtype=accumulation_dtype(inputs.query.dtype)),
        inputs.key.new_empty(
            sum(call.elements(inputs.keys, call.incoming)) if call.saves_halo else 0
        ),
    )


def _backward(grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any) -> Any:
    inputs = Inputs(*arguments[:NUM_TENSORS])
    out, lse, received, *parameters, needs = arguments[NUM_TENSORS:]
    call = _call_of(parameters)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = _METHODS[call.method].backward(
        call,
        inputs,
        Results(grad_out, grad_lse, out, lse),
        received if call.saves_halo else None,
        # Others need the gradients of their keys even where this rank needs none of its own.
        [True, True, True, *needs[3:]],
    )
    return tuple(
        [
            inputs.query.new_empty(0) if gradient is None or tensor is None or not need
            else gradient.to(tensor.dtype)
            for gradient, tensor, need in zip(gradients, inputs, needs)
        ]
    )  # fmt: skip


def _backward_fake(grad_out: Tensor | None, grad_lse: Tensor | None, *arguments: Any) -> Any:
    inputs, needs = arguments[:NUM_DIFFERENTIABLE], arguments[-1]
    return tuple(
        [
            inputs[0].new_empty(0) if tensor is None or not need
            else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor, need in zip(inputs, needs)
        ]
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
    ctx.parameters = inputs[NUM_TENSORS:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    # Once: checkpointing computes them again at every look.
    saved = ctx.saved_tensors
    gradients = sharded_attention_backward(grad_out, grad_lse, *saved, *ctx.parameters, needs)
    kept = [g if need else None for g, need in zip(gradients, needs)]
    return (*kept, *[None] * (NUM_TENSORS - NUM_DIFFERENTIABLE + len(ctx.parameters)))


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "neighborhood attention cannot be differentiated twice: its backward pass has no derivative"
    )


# What follows an agreement in a compiled program has to depend on it: it gives a 0 to add.
_library.define(f"sharded_agreement({_TENSORS}, {_PARAMETERS}, int heads_dim) -> Tensor")
_library.impl("sharded_agreement", torch.compiler.disable(_agreement), "CompositeExplicitAutograd")
torch.library.register_fake(
    "natten::sharded_agreement", lambda query, *_: query.new_empty(()), lib=_library
)
sharded_agreement = torch.ops.natten.sharded_agreement.default


def _of_one(inputs: Inputs, call: Call) -> Tensors:
    """What the operator of one process is given for this rank's queries and all keys they see."""
    keys = [
        torch.empty((t.shape[0], *call.needed.extent, *t.shape[-2:]), dtype=t.dtype, device="meta")
        for t in inputs[1:3]
    ]
    given = Tensors(inputs.query, *keys, *inputs[3:NUM_DIFFERENTIABLE])
    return given._replace(additional_lengths=inputs.additional_lengths)


@register_flop_formula(torch.ops.natten.sharded_attention, get_raw=True)
def _flops(*arguments: Any, out_val: Any = None) -> int:
    inputs, parameters = Inputs(*arguments[:NUM_TENSORS]), arguments[NUM_TENSORS:]
    call = _call_of(parameters)
    return attention_flops(*_of_one(inputs, call), *call.parameters(call.own, call.needed))


@register_flop_formula(torch.ops.natten.sharded_attention_backward, get_raw=True)
def _backward_flops(grad_out: Any, grad_lse: Any, *arguments: Any, out_val: Any = None) -> int:
    inputs = Inputs(*arguments[:NUM_TENSORS])
    out, lse, _, *parameters, needs = arguments[NUM_TENSORS:]
    call = _call_of(parameters)
    of_one = (*_of_one(inputs, call), out, lse, *call.parameters(call.own, call.needed))
    # All three, whichever are needed.
    return attention_backward_flops(grad_out, grad_lse, *of_one, [True] * 3 + list(needs[3:]))


sharded_attention = torch.ops.natten.sharded_attention.default
sharded_attention_backward = torch.ops.natten.sharded_attention_backward.default

for _name, _implementation, _fake, _derivative, _context in (
    ("sharded_attention", _forward, _forward_fake, _differentiate, _setup),
    (
        "sharded_attention_backward",
        _backward,
        _backward_fake,
        _refuse,
        lambda ctx, inputs, output: None,
    ),
):
    # Where a graph breaks, compilers look into what is called then.
    _library.impl(_name, torch.compiler.disable(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"natten::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"natten::{_name}", _derivative, setup_context=_context, lib=_library
    )

__all__ = ["sharded_agreement", "sharded_attention", "sharded_attention_backward"]
