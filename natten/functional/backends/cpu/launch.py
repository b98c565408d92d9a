"""What the compiled loops of the CPU backend take, made from tensors and problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natten.functional.backend import Inputs
from natten.functional.backends.cpu import parallel
from natten.functional.backends.cpu.plan import Sweep, element_strides
from natten.functional.problem import Problem

# How the loops call the storage types; FLOATING is the type of the computation itself.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
NOWHERE = (0,) * 7


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


def table(*tensors: Tensor | None) -> np.ndarray:
    """Addresses and strides of tensors with a feature axis; address 0 for None."""
    rows = [NOWHERE if t is None else element_strides(t) for t in tensors]
    return np.array(rows, np.int64)


def precise(problem: Problem, tensor: Tensor | None) -> Tensor:
    """Bias or sink in the compute type and row-major order, empty if there is none."""
    if tensor is None:
        return torch.empty(0, dtype=problem.accumulation_dtype, device="cpu")
    return tensor.to(problem.accumulation_dtype).contiguous().view(-1)


def numpy_type(problem: Problem) -> np.dtype[Any]:
    """The type of the computation."""
    return np.dtype(np.float64 if problem.dtype == torch.float64 else np.float32)


def with_axis(tensor: Tensor | None) -> Tensor | None:
    """Logsumexp and the like, with a feature axis of one."""
    return None if tensor is None else tensor.unsqueeze(-1)


def masks(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Those of keys and of queries, with axes of one head and one feature."""
    key, query = (
        None if mask is None else mask[..., None, None]
        for mask in (inputs.key_mask, inputs.query_mask)
    )
    return key, query


__all__ = ["KINDS", "launch", "masks", "numpy_type", "precise", "table", "with_axis"]
