"""Kernels compiled before they are needed, for the GPU that is here or for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from natten.functional.backend import Backend, Inputs, Results
from natten.functional.backends.triton.launcher import (
    Compilation,
    collecting,
    compile_meanwhile,
)
from natten.functional.problem import Config, Problem


class Given(NamedTuple):
    """What a backend is given beside the problem and its knobs."""

    inputs: Inputs
    results: Results
    needs: tuple[bool, ...]


def without_memory(problem: Problem) -> Given:
    """Tensors of a problem, as backends take them."""

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, heads_kv, context = problem.batch, problem.heads_kv, problem.num_additional
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    keys = problem.key_shape if problem.grids is None else problem.tokens
    bias = sequences = lengths = more_keys = more_values = sink = key_mask = query_mask = None
    if problem.has_rpb:
        bias = tensor(problem.heads, *(2 * k - 1 for k in problem.kernel_size))
    if context:
        more_keys = tensor(problem.entries, context, heads_kv, head_dim)
        more_values = tensor(problem.entries, context, heads_kv, head_dim_v)
    if problem.varlen:
        sequences = tensor(4, dtype=torch.int32)
    if problem.has_lengths:
        lengths = tensor(problem.entries, dtype=torch.int64)
    if problem.has_sink:
        sink = tensor(problem.heads, dtype=torch.float32)
    if problem.has_key_mask:
        key_mask = tensor(batch, *keys, dtype=torch.bool)
    if problem.has_query_mask:
        query_mask = tensor(batch, *problem.tokens, dtype=torch.bool)
    inputs = Inputs(
        tensor(batch, *problem.tokens, problem.heads, head_dim),
        tensor(batch, *keys, heads_kv, head_dim),
        tensor(batch, *keys, heads_kv, head_dim_v),
        bias, more_keys, more_values, sink, sequences, sequences, lengths, key_mask, query_mask,
    )  # fmt: skip
    out = tensor(*problem.output_shape)
    lse = tensor(*problem.lse_shape, dtype=torch.float32)
    needs = (True, True, True, problem.has_rpb, context > 0, context > 0)
    return Given(inputs, Results(out, lse, out), needs)


def kernels(backend: Backend, problem: Problem, config: Config) -> list[Compilation]:
    """The kernels that a problem needs and that are not compiled yet, of its backward pass too if
    it asks for gradients."""
    inputs, results, needs = without_memory(problem)
    with collecting(any_order=True) as found:
        backend.forward(problem, config, inputs)
        if problem.requires_grad:
            backend.backward(problem, config, inputs, results, needs)
    return found


def compile_backward(backend: Backend, problem: Problem, config: Config) -> None:
    """Compile in the background what the backward pass of a call will need, unless it is there."""
    inputs, results, needs = without_memory(problem)
    # What is declined is told when the time comes.
    with suppress(NotImplementedError), collecting(any_order=False) as found:
        backend.backward(problem, config, inputs, results, needs)
    if found:
        compile_meanwhile(found, problem.device)


@contextmanager
def target(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, Triton compiles for NVIDIA GPUs of a compute capability, and knows of no other."""
    major, minor = capability
    gpu = GPUTarget("cuda", 10 * major + minor, 32)
    before = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: f"sm_{major}{minor}",
            get_current_stream=lambda device: 0,
            get_current_target=lambda: gpu,
        )
    )
    try:
        yield
    finally:
        driver._active = before


def compile_all(
    compilations: list[Compilation],
    workers: int,
    done: Callable[[], None],
    device: torch.device | None,
) -> list[tuple[Compilation, Exception]]:
    """Compile kernels in threads, which wait for the compiler most of the time, and what launches
    them on the device, if any; ``done`` is called after each. Returns what failed, and why."""
    failed = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(compilation.run, device): compilation for compilation in compilations
        }
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, Exception):
                failed.append((futures[future], error))
            elif error is not None:
                raise error
            done()
    return failed


__all__ = ["Given", "compile_all", "kernels", "target", "without_memory"]
