"""Compile kernels without a GPU, for the GPUs that the backends are for.

The launches are the library's own, on tensors without memory, so that tilings and specializations
are what a GPU would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from natten import devices
from natten.functional.backend import Inputs, Results
from natten.functional.backends.triton import arguments
from natten.functional.problem import Problem

# A device of each compute capability.
DEVICE = {75: "t4", 80: "a100", 86: "a10", 89: "l4", 90: "h100", 100: "b200", 120: "rtx5090"}


@contextmanager
def launches(arch: int, done: Callable[[str, Callable[[], Any]], None]) -> Iterator[None]:
    """Inside, launches for an architecture do not run: ``done`` gets each kernel's name and a
    function that compiles it."""
    target = GPUTarget("cuda", arch, 32)
    active = SimpleNamespace(
        get_current_device=lambda: f"sm_{arch}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    run = JITFunction.run

    def not_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        done(self.__name__, lambda: run(self, *args, grid=grid, warmup=True, **options))

    def precision(tensor: Tensor) -> str:
        # That of a tensor on such a GPU: these here have no device.
        if tensor.dtype != torch.float32:
            return "tf32"
        return "tf32x3" if arch >= 80 else "ieee"

    with (
        mock.patch.object(type(driver), "active", active),
        mock.patch.object(JITFunction, "run", not_run),
        mock.patch.object(arguments, "precision", precision),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        devices.pretending(devices.find(DEVICE[arch])),
    ):
        yield


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, Any]]:
    """Inside, launches compile for an architecture and do not run. Yields kernels by name."""
    kernels: dict[str, Any] = {}

    def done(name: str, compile_it: Callable[[], Any]) -> None:
        kernel, numbered, number = compile_it(), name, 1
        # A second launch of the same kernel: that of the additional tokens.
        while numbered in kernels and kernels[numbered] is not kernel:
            number += 1
            numbered = f"{name}_{number}"
        kernels[numbered] = kernel

    with launches(arch, done):
        yield kernels


class Memory(NamedTuple):
    """What a kernel takes on chip: bytes of shared memory, columns of tensor memory."""

    kernel: str
    shared: int
    tensor: int


class _EnoughError(Exception):
    """Raised when the compiler has laid out memory: the rest takes most of the time."""


@contextmanager
def measuring(arch: int) -> Iterator[list[Memory]]:
    """Inside, launches find out the memory that tiles take. Yields what each kernel takes."""
    found: list[Memory] = []
    known: dict[str, int] = {}
    make_llir, tools = nvidia.CUDABackend.make_llir, nvidia.llvm

    class Llvm:
        def __getattr__(self, name: str) -> Any:
            if name == "to_module":
                raise _EnoughError
            return getattr(tools, name)

    def make(self: Any, module: Any, metadata: dict[str, Any], *rest: Any, **more: Any) -> Any:
        try:
            return make_llir(self, module, metadata, *rest, **more)
        except _EnoughError:
            known["shared"] = module.get_int_attr("ttg.shared")
            known["tensor"] = module.get_int_attr("ttg.tensor_memory_size") or 0
            raise

    def done(name: str, compile_it: Callable[[], Any]) -> None:
        if name.startswith(("statistics", "bias_")):
            # They have no tiles to choose.
            return
        try:
            kernel = compile_it()
        except _EnoughError:
            found.append(Memory(name, known["shared"], known["tensor"]))
        else:
            metadata = kernel.metadata
            found.append(Memory(name, metadata.shared, getattr(metadata, "tmem_size", None) or 0))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nvidia.CUDABackend, "make_llir", make))
        stack.enter_context(mock.patch.object(nvidia, "llvm", Llvm()))
        stack.enter_context(launches(arch, done))
        yield found


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
    bias = sequences = lengths = more_keys = more_values = None
    if problem.has_rpb:
        bias = tensor(problem.heads, *(2 * k - 1 for k in problem.kernel_size))
    if context:
        more_keys = tensor(batch, context, heads_kv, head_dim)
        more_values = tensor(batch, context, heads_kv, head_dim_v)
    if problem.varlen:
        sequences = tensor(4, dtype=torch.int32)
    if problem.has_lengths:
        lengths = tensor(batch, dtype=torch.int64)
    inputs = Inputs(
        tensor(batch, *problem.query_shape, problem.heads, head_dim),
        tensor(batch, *problem.key_shape, heads_kv, head_dim),
        tensor(batch, *problem.key_shape, heads_kv, head_dim_v),
        bias, more_keys, more_values, sequences, sequences, lengths,
    )  # fmt: skip
    out = tensor(*problem.output_shape)
    lse = tensor(*problem.lse_shape, dtype=torch.float32)
    needs = (True, True, True, problem.has_rpb, context > 0, context > 0)
    return Given(inputs, Results(out, lse, out), needs)
