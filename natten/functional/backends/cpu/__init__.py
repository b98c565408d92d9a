"""Compiled CPU kernels, forward and backward, at a cost linear in the number of tokens.

Neighborhoods run on loops that numba compiles, over tables made from :mod:`natten.window`
(plan.py). There are two kinds. By row, each query streams the keys of its window (rows.py), with
nothing wasted; by block, patches of neighboring queries multiply what their windows cover together
(blocks.py), and what is loaded once serves them all. Both walk over boxes (boxes.py). Measured
costs decide. Dense attention, causal or not, runs on torch's own CPU flash-attention operator
(dense.py) where that computes the same, and packed sequences one after the other.

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
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from natten.functional.backend import Backend, Gradients, Inputs, Results, sequences
from natten.functional.backends.cpu import dense
from natten.functional.backends.cpu.launch import KINDS
from natten.functional.problem import Config, Problem, Unavailable
from natten.functional.sink import join


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


def _entries(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors of each batch entry.

    One entry must not decide by what, and so with which bits, another is computed.
    """
    parts = [repeat(None) if t is None else t.split(1) for t in tensors]
    return zip(*parts)


def _alone(
    problem: Problem, inputs: Inputs, entries: list[int]
) -> Iterator[tuple[slice, Problem, Inputs]]:
    """Some batch entries: the place of each, and its problem and inputs."""
    alone = replace(problem, batch=1)
    for entry in entries:
        place = slice(entry, entry + 1)
        tensors = {
            name: tensor if name in ("rpb", "sink") or tensor is None else tensor[place]
            for name, tensor in inputs._asdict().items()
        }
        yield place, alone, Inputs(**tensors)


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

    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output and the logsumexp."""
        query, key, value, rpb, additional_keys, additional_values, sink, *_ = inputs
        if problem.varlen:
            # Tokens behind the last sequence belong to none.
            out = query.new_zeros(problem.output_shape)
            lse = query.new_full(problem.lse_shape, -torch.inf, dtype=problem.accumulation_dtype)
            for part in sequences(problem, inputs):
                place = part.queries
                found = self.forward(part.problem, config, part.inputs(inputs))
                out[:, place], lse[:, place] = found
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
        from natten.functional.backends.cpu import blocks, rows

        if not blocks.pays(problem, False):
            return rows.forward(problem, inputs)
        out, lse, failed = blocks.forward(problem, inputs)
        for entry, alone, own in _alone(problem, inputs, failed):
            out[entry], lse[entry] = rows.forward(alone, own)
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
            wholes = [t.new_zeros(t.shape) for t in (query, key, value)]
            for part in sequences(problem, inputs):
                own = (part.inputs(inputs), part.results(results))
                pieces = self.backward(part.problem, config, *own, needs)
                places = (part.queries, part.keys, part.keys)
                for whole, place, piece in zip(wholes, places, pieces):
                    if piece is not None:
                        whole[:, place] = piece
            return wholes[0], wholes[1], wholes[2], None, None, None
        _check(
            problem, query=query, key=key, value=value, rpb=rpb,
            additional_keys=additional_keys, additional_values=additional_values,
            grad_out=grad_out, grad_lse=grad_lse, out=out, lse=lse, sink=inputs.sink,
            key_mask=inputs.key_mask, query_mask=inputs.query_mask,
        )  # fmt: skip
        if dense.covers(problem):
            tame = dense.tame(problem, query, key, value, grad_out, grad_lse)
            if all(tame):
                found = dense.backward(problem, grad_out, grad_lse, query, key, value, out, lse)
                return (*found, None, None, None)
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
        from natten.functional.backends.cpu import blocks, rows

        if not blocks.pays(problem, True):
            return rows.backward(problem, inputs, results, needs)
        gradients, failed = blocks.backward(problem, inputs, results, needs)
        for entry, alone, tensors in _alone(problem, inputs, failed):
            last = None if grad_lse is None else grad_lse[entry]
            given = Results(out[entry], lse[entry], grad_out[entry], last)
            pieces = rows.backward(alone, tensors, given, needs)
            for name, gradient, piece in zip(Inputs._fields, gradients, pieces):
                if gradient is not None and piece is not None:
                    if name == "rpb":
                        gradient += piece
                    else:
                        gradient[entry] = piece
        return gradients


CPU = CpuBackend()

__all__ = ["CPU", "CpuBackend"]
