"""Attention a row at a time (kernels.py): its launches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Gradients, Inputs, Results
from natten.functional.backends.cpu.launch import (
    KINDS,
    launch,
    masks,
    numpy_type,
    precise,
    table,
    with_axis,
)
from natten.functional.backends.cpu.plan import (
    array_of,
    bias_extents,
    key_sweep,
    padded,
    query_sweep,
)
from natten.functional.problem import Problem


def _extras(problem: Problem, lengths: Tensor | None) -> np.ndarray:
    """How many additional keys each batch entry has."""
    most = problem.num_additional
    if lengths is None:
        return np.full(problem.batch, most, np.int64)
    if lengths.shape != (problem.batch,):
        raise ValueError(
            f"additional_lengths must have shape {(problem.batch,)} for this problem, got "
            f"{tuple(lengths.shape)}"
        )
    return np.array(lengths.tolist(), np.int64).clip(0, most)


def forward(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output and the logsumexp."""
    query, key, value, rpb, additional_keys, additional_values, sink, *_ = inputs
    # numba takes half a second to import.
    from natten.functional.backends.cpu import kernels

    kind = problem.accumulation_dtype
    out = query.new_empty(problem.output_shape)
    lse = query.new_empty(problem.lse_shape, dtype=kind)
    sweep = query_sweep(problem, torch.get_num_threads())
    width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
    longest, extra = padded(sweep.longest), problem.num_additional
    bias, logits = precise(problem, rpb), precise(problem, sink)
    arguments = (
        table(
            query,
            key,
            value,
            additional_keys,
            additional_values,
            out,
            with_axis(lse),
            *masks(inputs),
        ),
        KINDS[problem.dtype],
        problem.scale,
        problem.softcap,
        problem.heads_kv,
        problem.heads // problem.heads_kv,
        problem.head_dim,
        problem.head_dim_v,
        extra,
        _extras(problem, inputs.additional_lengths),
        array_of(logits),
        array_of(bias),
        bias_extents(problem),
        sweep.capacity,
        sweep.longest,
    )
    scratch = (sweep.capacity + extra + 1) * (width + width_v) + 2 * (longest + padded(extra))
    picks = 2 * longest + padded(extra) + kernels.STATE_SIZE
    if problem.has_key_mask:
        picks += sweep.capacity
    launch(kernels.forward, sweep, arguments, scratch, picks, numpy_type(problem))
    return out, lse


def backward(
    problem: Problem, inputs: Inputs, results: Results, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients of the six differentiable inputs."""
    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    out, lse, grad_out, grad_lse = results
    # numba takes half a second to import.
    from natten.functional.backends.cpu import kernels

    kind = problem.accumulation_dtype
    numbers = numpy_type(problem)
    threads = torch.get_num_threads()
    width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
    extra = problem.num_additional
    needs_extra = extra > 0 and (needs[4] or needs[5])
    needs_queries = needs[0] or needs[3] or needs_extra
    bias, extents = precise(problem, rpb), bias_extents(problem)
    key_mask, _ = masks(inputs)
    if grad_lse is not None:
        grad_lse = grad_lse.to(kind)
    lse = lse.to(kind)
    delta = query.new_empty(problem.lse_shape, dtype=kind)
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    shared = (
        KINDS[problem.dtype],
        problem.scale,
        problem.gradient_scale,
        problem.softcap,
        problem.heads_kv,
        problem.heads // problem.heads_kv,
        problem.head_dim,
        problem.head_dim_v,
    )

    # The gradients of additional keys are sums over the boxes of their batch entry.
    sweep = query_sweep(problem, threads, fixed=needs_extra)
    longest, boxes = padded(sweep.longest), sweep.boxes
    biases = problem.heads // problem.heads_kv * int(extents.prod())
    bias_grads = np.zeros((sweep.units if rpb is not None and needs[3] else 0, biases), numbers)
    extra_grads = np.zeros((sweep.units if needs_extra else 0, extra * (width + width_v)), numbers)
    arguments = (
        table(
            query, key, value, additional_keys, additional_values, out, with_axis(lse),
            grad_out, with_axis(grad_lse), with_axis(delta), grad_query, key_mask,
        ),
        *shared, extra, _extras(problem, inputs.additional_lengths), array_of(bias), extents,
        sweep.capacity, sweep.longest, not needs_queries,
        bias_grads.reshape(-1), extra_grads.reshape(-1),
    )  # fmt: skip
    scratch = (sweep.capacity + extra + 2) * (width + width_v) + 3 * (longest + padded(extra))
    picks = 2 * longest + padded(extra) + kernels.STATE_SIZE
    if problem.has_key_mask:
        picks += sweep.capacity
    launch(kernels.backward_queries, sweep, arguments, scratch, picks, numbers)

    if needs[1] or needs[2]:
        sweep = key_sweep(problem, threads)
        longest = padded(sweep.longest)
        key_arguments = (
            table(
                query, key, value, with_axis(lse), grad_out, with_axis(delta),
                grad_key, grad_value, key_mask,
            ),
            *shared, array_of(bias), extents, sweep.capacity, sweep.longest, sweep.rows,
        )  # fmt: skip
        scratch = (sweep.capacity + sweep.rows + 1) * (width + width_v)
        scratch += 2 * sweep.capacity + 3 * longest
        picks = 2 * longest + kernels.STATE_SIZE
        launch(kernels.backward_keys, sweep, key_arguments, scratch, picks, numbers)

    grad_rpb = grad_extra_keys = grad_extra_values = None
    if rpb is not None and needs[3]:
        # The sum runs over batch entries and boxes, always in this order.
        of_boxes = torch.from_numpy(bias_grads).view(
            problem.batch * boxes, problem.heads_kv, biases
        )
        grad_rpb = of_boxes.sum(0).view(rpb.shape).to(rpb.dtype)
    if needs_extra:
        of_boxes = torch.from_numpy(extra_grads)
        of_entries = of_boxes.view(problem.batch, boxes, problem.heads_kv, -1).sum(1)
        keys, values = of_entries.split([extra * width, extra * width_v], -1)

        def features(part: Tensor, size: int) -> Tensor:
            part = part.view(problem.batch, problem.heads_kv, extra, -1)[..., :size]
            return part.transpose(1, 2).to(problem.dtype).contiguous()

        keys = keys * problem.gradient_scale
        grad_extra_keys = features(keys, problem.head_dim)
        grad_extra_values = features(values, problem.head_dim_v)
    return grad_query, grad_key, grad_value, grad_rpb, grad_extra_keys, grad_extra_values


__all__ = ["backward", "forward"]
