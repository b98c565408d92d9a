"""What the compiled loops of the CPU backend take, made from tensors and problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Inputs, Results
from natten.functional.backends.cpu import parallel
from natten.functional.backends.cpu.plan import Sweep, element_strides
from natten.functional.problem import Problem

# How the loops call the storage types; FLOATING is the type of the computation itself.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}


class Locations(NamedTuple):
    """The tensors of the loops, or where each is."""

    query: Any = None
    key: Any = None
    value: Any = None
    additional_keys: Any = None
    additional_values: Any = None
    out: Any = None
    lse: Any = None
    grad_out: Any = None
    grad_lse: Any = None
    delta: Any = None
    grad_query: Any = None
    grad_key: Any = None
    grad_value: Any = None
    key_mask: Any = None
    query_mask: Any = None


NOWHERE = (0,) * 7
# Those without an axis of features, and those without one of heads, too.
LACKING = {"lse": 1, "grad_lse": 1, "delta": 1, "key_mask": 2, "query_mask": 2}


def table(tensors: Locations) -> np.ndarray:
    """Where they are. It does not keep them."""
    rows = [
        NOWHERE
        if tensor is None
        else element_strides(tensor[(..., *(None,) * LACKING.get(name, 0))])
        for name, tensor in zip(Locations._fields, tensors, strict=True)
    ]
    return np.array(rows, np.int64)


def forward_tensors(problem: Problem, inputs: Inputs) -> Locations:
    """Those of the forward loops; output and logsumexp are new."""
    new = inputs.query.new_empty
    return Locations(
        out=new(problem.output_shape),
        lse=new(problem.lse_shape, dtype=problem.accumulation_dtype),
        **{name: t for name, t in inputs._asdict().items() if name in Locations._fields},
    )


def backward_tensors(problem: Problem, inputs: Inputs, results: Results) -> Locations:
    """Those of the backward loops; delta and the gradients of query, key and value are new."""
    out, lse, grad_out, grad_lse = results
    if grad_lse is not None:
        grad_lse = grad_lse.to(problem.accumulation_dtype)
    lse = lse.to(problem.accumulation_dtype)
    query, key, value = (t.new_empty(t.shape) for t in inputs[:3] if t is not None)
    return Locations(
        out=out, lse=lse, grad_out=grad_out, grad_lse=grad_lse, delta=torch.empty_like(lse),
        grad_query=query, grad_key=key, grad_value=value,
        **{name: t for name, t in inputs._asdict().items() if name in Locations._fields},
    )  # fmt: skip


def numbers(problem: Problem) -> tuple[Any, ...]:
    """What the loops know of the rows of every problem."""
    group = problem.heads // problem.heads_kv
    sizes = problem.heads_kv, group, problem.head_dim, problem.head_dim_v
    return KINDS[problem.dtype], problem.scale, problem.softcap, *sizes


def lengths(problem: Problem, inputs: Inputs) -> np.ndarray:
    """How many additional keys each batch entry has."""
    most, given = problem.num_additional, inputs.additional_lengths
    if given is None:
        return np.full(problem.batch, most, np.int64)
    if given.shape != (problem.batch,):
        raise ValueError(
            f"additional_lengths must have shape {(problem.batch,)} for this problem, got "
            f"{tuple(given.shape)}"
        )
    return np.array(given.tolist(), np.int64).clip(0, most)


def launch(
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


def precise(problem: Problem, tensor: Tensor | None) -> Tensor:
    """Bias or sink in the compute type and row-major order, empty if there is none."""
    if tensor is None:
        return torch.empty(0, dtype=problem.accumulation_dtype, device="cpu")
    return tensor.to(problem.accumulation_dtype).contiguous().view(-1)


def numpy_type(problem: Problem) -> np.dtype[Any]:
    """The type of the computation."""
    return np.dtype(np.float64 if problem.dtype == torch.float64 else np.float32)


__all__ = [
    "KINDS", "Locations", "backward_tensors", "forward_tensors", "launch", "lengths", "numbers",
    "numpy_type", "precise", "table",
]  # fmt: skip
