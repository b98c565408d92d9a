"""Compiled CPU kernels, forward and backward, at a cost linear in the number of tokens.

Neighborhoods run on loops that numba compiles (kernels.py) over tables made from
:mod:`natten.window` (plan.py). Dense attention, causal or not, runs on torch's own CPU
flash-attention operator (dense.py) where that computes the same, and packed sequences one after the
other.

All storage types but float64 are computed in float32. bfloat16 and float16 are widened while the
loops copy a box of keys and values, which they do for every type, and results are narrowed as they
are written: neither needs a copy of a tensor.

Both passes are deterministic: a query's gradient is summed by the thread that owns the query, a
key's by the thread that owns the key, and the gradients of biases and additional keys in a fixed
order of boxes, always.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Backend, Gradients, Inputs, Results, sequences
from natten.functional.backends.cpu import dense, parallel
from natten.functional.backends.cpu.plan import (
    Sweep,
    array_of,
    bias_extents,
    element_strides,
    key_sweep,
    padded,
    query_sweep,
)
from natten.functional.problem import Config, Problem, Unavailable
from natten.functional.sink import join

# How kernels.py calls the storage types; FLOATING is the type of the computation itself.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
NOWHERE = (0,) * 7


@lru_cache(maxsize=1)
def _numba_problem() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return f"numba, which compiles it, is missing ({error}): run `pip install numba`"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return (
            "it is compiled by numba, and the environment variable NUMBA_DISABLE_JIT forbids that"
        )
    return None


def _launch(
    kernel: Callable[..., None],
    sweep: Sweep,
    arguments: tuple[Any, ...],
    scratch: int,
    picks: int,
    dtype: np.dtype[Any],
) -> None:
    """Run a compiled loop on every unit of a sweep."""
    counter = np.zeros(1, np.int64)

    def task() -> None:
        work, lists = np.empty(scratch, dtype), np.empty(picks, np.int64)
        kernel(counter, sweep.units, sweep.axes, sweep.items, sweep.blocks, *arguments, work, lists)

    parallel.run(task, sweep.threads)


def _table(*tensors: Tensor | None) -> np.ndarray:
    rows = [NOWHERE if t is None else element_strides(t) for t in tensors]
    return np.array(rows, np.int64)


def _precise(problem: Problem, tensor: Tensor | None) -> Tensor:
    """Bias or sink in the compute type and row-major order, empty if there is none."""
    if tensor is None:
        return torch.empty(0, dtype=problem.accumulation_dtype, device="cpu")
    return tensor.to(problem.accumulation_dtype).contiguous().view(-1)


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == torch.float64 else np.float32)


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


def _entries(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors of each batch entry.

    One entry must not decide by what, and so with which bits, another is computed.
    """
    parts = [repeat(None) if t is None else t.split(1) for t in tensors]
    return zip(*parts)


def _with_axis(tensor: Tensor | None) -> Tensor | None:
    """Logsumexp and the like, with a feature axis of one."""
    return None if tensor is None else tensor.unsqueeze(-1)


def _masks(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Those of keys and of queries, with axes of one head and one feature."""
    key, query = (
        None if mask is None else mask[..., None, None]
        for mask in (inputs.key_mask, inputs.query_mask)
    )
    return key, query


def _check(problem: Problem, **tensors: Tensor | None) -> None:
    """Compiled loops trust the problem, not the tensors: make sure that they agree.

    Raises:
        ValueError: a tensor of another shape or type than the problem says.
    """
    batch, heads, extra = problem.batch, problem.heads_kv, problem.num_additional
    shapes = {
        "query": (batch, *problem.query_shape, problem.heads, problem.head_dim),
        "key": (batch, *problem.key_shape, heads, problem.head_dim),
        "value": (batch, *problem.key_shape, heads, problem.head_dim_v),
        "rpb": (problem.heads, *(2 * k - 1 for k in problem.kernel_size)),
        "additional_keys": (batch, extra, heads, problem.head_dim),
        "additional_values": (batch, extra, heads, problem.head_dim_v),
        "out": problem.output_shape,
        "grad_out": problem.output_shape,
        "lse": problem.lse_shape,
        "grad_lse": problem.lse_shape,
        "sink": (problem.heads,),
        "key_mask": (batch, *problem.key_shape),
        "query_mask": (batch, *problem.query_shape),
    }
    optional = {"grad_lse"}
    for name in ("rpb", "sink", "key_mask", "query_mask"):
        if not getattr(problem, f"has_{name}"):
            optional.add(name)
    if not extra:
        optional.update(("additional_keys", "additional_values"))
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        converted = name in ("rpb", "lse", "grad_lse", "sink", "key_mask", "query_mask")
        if (
            tensor is None
            or not (converted or tensor.dtype == problem.dtype)
            or tensor.shape != shapes[name]
            or tensor.device.type != "cpu"
        ):
            got = tensor if tensor is None else f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise ValueError(
                f"{name} must be {shapes[name]}, {problem.dtype} on the CPU for this problem, "
                f"got {got}"
            )


class CpuBackend(Backend):
    """Compiled CPU kernels; they pick their boxes themselves, and there are no tiles to name."""

    name = "cpu"

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why this backend cannot run a problem, or None."""
        if problem.device.type != "cpu":
            return f"it runs on the CPU, and the tensors are on {problem.device}"
        if problem.dtype not in KINDS:
            return f"it computes float32, float64, bfloat16 and float16, not {problem.dtype}"
        if problem.rank > 3:
            return f"it supports 1 to 3 axes of tokens, not {problem.rank}"
        if problem.varlen and (problem.num_additional or problem.has_rpb):
            return "packed sequences with additional keys or a bias are not supported"
        reason = _numba_problem()
        return None if reason is None else Unavailable(reason)

    def forward(self, problem: Problem, config: Config, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The output and the logsumexp."""
        query, key, value, rpb, additional_keys, additional_values, sink, *_ = inputs
        if problem.varlen:
            # Tokens behind the last sequence belong to none.
            out = query.new_zeros(problem.output_shape)
            lse = query.new_full(problem.lse_shape, -torch.inf, dtype=problem.accumulation_dtype)
            for part in sequences(problem, inputs):
                rows = part.queries
                found = self.forward(part.problem, config, part.inputs(inputs))
                out[:, rows], lse[:, rows] = found
            return out, lse
        _check(
            problem, query=query, key=key, value=value, rpb=rpb,
            additional_keys=additional_keys, additional_values=additional_values, sink=sink,
            key_mask=inputs.key_mask, query_mask=inputs.query_mask,
        )  # fmt: skip
        if dense.covers(problem):
            tame = dense.tame(problem, query, key, value)
            if all(tame):
                out, lse = dense.forward(problem, query, key, value)
                return (out, lse) if sink is None else join(out, lse, sink)
            if any(tame):
                alone = replace(problem, batch=1)
                tensors = _entries(query, key, value)
                results = [
                    self.forward(alone, config, Inputs(q, k, v, sink=sink)) for q, k, v in tensors
                ]
                out, lse = map(torch.cat, zip(*results, strict=True))
                return out, lse
        # numba takes half a second to import.
        from natten.functional.backends.cpu import kernels

        precise = problem.accumulation_dtype
        out = query.new_empty(problem.output_shape)
        lse = query.new_empty(problem.lse_shape, dtype=precise)
        sweep = query_sweep(problem, torch.get_num_threads())
        width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
        longest, extra = padded(sweep.longest), problem.num_additional
        bias, logits = _precise(problem, rpb), _precise(problem, sink)
        arguments = (
            _table(
                query,
                key,
                value,
                additional_keys,
                additional_values,
                out,
                _with_axis(lse),
                *_masks(inputs),
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
        _launch(kernels.forward, sweep, arguments, scratch, picks, _numpy_type(precise))
        return out, lse

    def backward(
        self,
        problem: Problem,
        config: Config,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> Gradients:
        """The gradients of the six differentiable inputs, those not needed may be None or zero."""
        query, key, value, rpb, additional_keys, additional_values, *_ = inputs
        out, lse, grad_out, grad_lse = results
        if problem.varlen:
            gradients = [t.new_zeros(t.shape) for t in (query, key, value)]
            for part in sequences(problem, inputs):
                own = (part.inputs(inputs), part.results(results))
                found = self.backward(part.problem, config, *own, needs)
                places = (part.queries, part.keys, part.keys)
                for gradient, place, piece in zip(gradients, places, found):
                    if piece is not None:
                        gradient[:, place] = piece
            return gradients[0], gradients[1], gradients[2], None, None, None
        _check(
            problem, query=query, key=key, value=value, rpb=rpb,
            additional_keys=additional_keys, additional_values=additional_values,
            grad_out=grad_out, grad_lse=grad_lse, out=out, lse=lse, sink=inputs.sink,
            key_mask=inputs.key_mask, query_mask=inputs.query_mask,
        )  # fmt: skip
        if dense.covers(problem):
            tame = dense.tame(problem, query, key, value, grad_out, grad_lse)
            if all(tame):
                whole = dense.backward(problem, grad_out, grad_lse, query, key, value, out, lse)
                return (*whole, None, None, None)
            if any(tame):
                alone = replace(problem, batch=1)
                entries = [
                    self.backward(
                        alone, config, Inputs(q, k, v, sink=inputs.sink), Results(*rest), needs
                    )[:3]
                    for q, k, v, *rest in _entries(query, key, value, *results)
                ]
                dq, dk, dv = [torch.cat(parts) for parts in zip(*entries, strict=True)]
                return dq, dk, dv, None, None, None
        # numba takes half a second to import.
        from natten.functional.backends.cpu import kernels

        precise = problem.accumulation_dtype
        numpy_type = _numpy_type(precise)
        threads = torch.get_num_threads()
        width, width_v = padded(problem.head_dim), padded(problem.head_dim_v)
        extra = problem.num_additional
        needs_extra = extra > 0 and (needs[4] or needs[5])
        needs_queries = needs[0] or needs[3] or needs_extra
        bias, extents = _precise(problem, rpb), bias_extents(problem)
        key_mask, _ = _masks(inputs)
        if grad_lse is not None:
            grad_lse = grad_lse.to(precise)
        lse = lse.to(precise)
        delta = query.new_empty(problem.lse_shape, dtype=precise)
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
        bias_grads = np.zeros(
            (sweep.units if rpb is not None and needs[3] else 0, biases), numpy_type
        )
        extra_grads = np.zeros(
            (sweep.units if needs_extra else 0, extra * (width + width_v)), numpy_type
        )
        arguments = (
            _table(
                query, key, value, additional_keys, additional_values, out, _with_axis(lse),
                grad_out, _with_axis(grad_lse), _with_axis(delta), grad_query, key_mask,
            ),
            *shared, extra, _extras(problem, inputs.additional_lengths), array_of(bias), extents,
            sweep.capacity, sweep.longest, not needs_queries,
            bias_grads.reshape(-1), extra_grads.reshape(-1),
        )  # fmt: skip
        scratch = (sweep.capacity + extra + 2) * (width + width_v) + 3 * (longest + padded(extra))
        picks = 2 * longest + padded(extra) + kernels.STATE_SIZE
        if problem.has_key_mask:
            picks += sweep.capacity
        _launch(kernels.backward_queries, sweep, arguments, scratch, picks, numpy_type)

        if needs[1] or needs[2]:
            sweep = key_sweep(problem, threads)
            longest = padded(sweep.longest)
            key_arguments = (
                _table(
                    query, key, value, _with_axis(lse), grad_out, _with_axis(delta),
                    grad_key, grad_value, key_mask,
                ),
                *shared, array_of(bias), extents, sweep.capacity, sweep.longest, sweep.rows,
            )  # fmt: skip
            scratch = (sweep.capacity + sweep.rows + 1) * (width + width_v)
            scratch += 2 * sweep.capacity + 3 * longest
            picks = 2 * longest + kernels.STATE_SIZE
            _launch(kernels.backward_keys, sweep, key_arguments, scratch, picks, numpy_type)

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


CPU = CpuBackend()

__all__ = ["CPU", "CpuBackend"]
