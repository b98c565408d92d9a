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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from natten import devices
from natten.functional.backends.triton.ahead import without_memory

__all__ = ["DEVICE", "Memory", "compiling", "launches", "measuring", "without_memory"]

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

    with (
        mock.patch.object(type(driver), "active", active),
        mock.patch.object(JITFunction, "run", not_run),
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
        if name.startswith(("statistics", "bias_", "longest", "merge")):
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
