"""Calls that do again what the same call did before: launch the same kernels on other tensors.

Between a public function and its kernels lie the choice of a backend, of tiles, of layouts, of a
compiled kernel, and the packing of its arguments. All of that is the same whenever shapes, dtypes,
strides, alignment and settings are. :func:`record` watches one call and keeps what is left: memory
that was allocated, and launches with the addresses of tensors left open.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from natten._internals import empty_cuda

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)
# How Python packs what Triton passes by value.
_FORMATS = {
    "i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "I", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """A launch of a compiled kernel, as Triton's launcher takes it."""

    compiled: Any
    programs: int
    arguments: tuple[Any, ...]


class _Watch(TorchDispatchMode):
    """Sees what torch is asked for, and by way of :func:`note`, what is launched.

    Attributes:
        allocated: Tensors without values; they are kept, so that no two have the same address.
        launches: In their order.
        is_simple: Whether there was nothing else but views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.launches: list[Launched] = []
        self.is_simple = True

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if function in _ALLOCATIONS:
            self.allocated.append(result)
        elif not function.is_view:
            self.is_simple = False
        return result

    def __enter__(self) -> _Watch:
        super().__enter__()
        _here.watch = self
        return self

    def __exit__(self, *error: Any) -> None:
        _here.watch = None
        super().__exit__(*error)


class _Here(threading.local):
    watch: _Watch | None = None


_here = _Here()


def observed() -> bool:
    """Whether a profiler has asked Triton to tell it of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def note(compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """Tell whoever watches this thread of a launch. ``compiled`` is None if Triton does not say
    what it launched."""
    if _here.watch is not None:
        if compiled is None:
            _here.watch.is_simple = False
        else:
            _here.watch.launches.append(Launched(compiled, programs, arguments))


@dataclass(frozen=True)
class _Address:
    """An address in the memory of one of the call's tensors."""

    tensor: int
    offset: int


class _UnknownAddressError(Exception):
    """An argument that is in no memory that this module knows of."""


class _Base:
    """Stands for the tensor of a descriptor: Triton asks for no more than its address."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def data_ptr(self) -> int:
        return self._pointer


class _Places:
    """Where the tensors of a call are."""

    def __init__(self, inputs: Sequence[Tensor], allocated: Sequence[Tensor]) -> None:
        self.inputs = [t.data_ptr() for t in inputs]
        self.sizes = [t.untyped_storage().nbytes() for t in allocated]
        self.allocated = [t.data_ptr() for t in allocated]

    def find(self, pointer: int) -> _Address:
        if pointer in self.inputs:
            return _Address(self.inputs.index(pointer), 0)
        for number, (start, size) in enumerate(zip(self.allocated, self.sizes, strict=True)):
            if start <= pointer < start + size:
                return _Address(len(self.inputs) + number, pointer - start)
        raise _UnknownAddressError


def _open(argument: Any, find: Callable[[int], _Address]) -> Any:
    """An argument with addresses in place of tensors."""
    if isinstance(argument, Tensor):
        return find(argument.data_ptr())
    if isinstance(argument, tuple):
        parts = [_open(part, find) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if hasattr(argument, "base"):
        found = copy(argument)
        found.base = find(argument.base.data_ptr())
        return found
    return argument


def _filled(argument: Any, pointers: Sequence[int]) -> Any:
    """An argument with pointers in place of addresses."""
    if isinstance(argument, _Address):
        return pointers[argument.tensor] + argument.offset
    if isinstance(argument, tuple):
        parts = [_filled(part, pointers) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if hasattr(argument, "base"):
        found = copy(argument)
        found.base = _Base(_filled(argument.base, pointers))
        return found
    return argument


def flat(signature: Any, argument: Any) -> list[tuple[str, Any]]:
    """The arguments that a kernel gets, with their types."""
    if isinstance(signature, tuple):
        pairs = zip(signature, argument, strict=True)
        return [leaf for types, value in pairs for leaf in flat(types, value)]
    return [] if signature == "constexpr" else [(signature, argument)]


@cache
def _driver() -> Any:
    """The driver's function that launches kernels."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return launch


class _DriverLaunch:
    """A launch by the driver, whose arguments lie in memory already, all but the addresses.

    Triton's launcher unpacks every argument again and asks the driver about every address.
    """

    def __init__(self, launch: Launched, leaves: list[tuple[str, Any]]) -> None:
        self.compiled = launch.compiled  # which owns the function
        metadata = launch.compiled.metadata
        self.before = (launch.programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared)
        # And two scratch buffers, which the kernel does not use.
        self.values = [0] * (len(leaves) + 2)
        self.addresses = []
        for number, (kind, value) in enumerate(leaves):
            if isinstance(value, _Address):
                self.addresses.append((number, value.tensor, value.offset))
            elif not kind.startswith("*"):
                packed = struct.pack("<" + _FORMATS[kind], value).ljust(8, b"\0")
                self.values[number] = int.from_bytes(packed, "little")
        # Threads must not write into each other's arguments.
        self.memory = threading.local()

    def _memory(self) -> tuple[Any, Any]:
        size = len(self.values)
        values = (ctypes.c_uint64 * size)(*self.values)
        start = ctypes.addressof(values)
        places = (ctypes.c_uint64 * size)(*[start + 8 * i for i in range(size)])
        self.memory.found = values, places
        return values, places

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        try:
            values, places = self.memory.found
        except AttributeError:
            values, places = self._memory()
        for number, tensor, offset in self.addresses:
            values[number] = pointers[tensor] + offset
        error = _driver()(self.compiled.function, *self.before, stream, places, None)
        if error:
            raise RuntimeError(
                f"CUDA error {error} when the kernel {self.compiled.name} was launched"
            )


class _TritonLaunch:
    """A launch by Triton's launcher, which makes tensor maps of descriptors."""

    def __init__(self, launch: Launched, arguments: tuple[Any, ...]) -> None:
        self.compiled, self.programs, self.arguments = launch.compiled, launch.programs, arguments

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        compiled = self.compiled
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None,
            None, *_filled(self.arguments, pointers),
        )  # fmt: skip


def _prepared(launch: Launched, find: Callable[[int], _Address]) -> _DriverLaunch | _TritonLaunch:
    compiled, arguments = launch.compiled, _open(launch.arguments, find)
    metadata = compiled.metadata
    leaves = flat(tuple(compiled.src.signature.values()), arguments)
    is_plain = (
        metadata.num_ctas == 1
        and not metadata.launch_cooperative_grid
        and not metadata.launch_pdl
        and not metadata.global_scratch_size
        and not getattr(metadata, "profile_scratch_size", 0)
        and all(kind.startswith("*") or kind in _FORMATS for kind, _ in leaves)
    )
    return _DriverLaunch(launch, leaves) if is_plain else _TritonLaunch(launch, arguments)


class Replay:
    """What a call does, given the addresses of its tensors.

    Attributes:
        device: On which, by its number.
        allocations: Size, stride and dtype of the memory that it needs.
        launches: What it launches.
        results: Which of its memory is what it returns; None for what is None.
    """

    def __init__(
        self, watch: _Watch, inputs: Sequence[Tensor], results: Sequence[Tensor | None]
    ) -> None:
        self.device = inputs[0].device.index
        allocated = watch.allocated
        places = _Places(inputs, allocated)
        self.results: list[int | None] = []
        shapes = [(tuple(t.shape), t.stride(), t.dtype) for t in allocated]
        for result in results:
            number = None
            if result is not None:
                number = places.find(result.data_ptr()).tensor - len(inputs)
                if number < 0 or result.untyped_storage().nbytes() != places.sizes[number]:
                    raise _UnknownAddressError
                # Kernels know addresses alone: the memory may as well have the result's shape.
                shapes[number] = (tuple(result.shape), result.stride(), result.dtype)
            self.results.append(number)
        self.allocations = shapes
        self.launches = [_prepared(launch, places.find) for launch in watch.launches]

    def __call__(self, pointers: list[int]) -> tuple[Tensor | None, ...] | None:
        if torch._C._cuda_getDevice() != self.device or observed():
            return None
        memory = [empty_cuda(*allocation) for allocation in self.allocations]
        pointers = pointers + [t.data_ptr() for t in memory]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for launch in self.launches:
            launch(pointers, stream)
        return tuple([None if number is None else memory[number] for number in self.results])


def record(
    function: Callable[[], tuple[Tensor | None, ...]], inputs: list[Tensor]
) -> tuple[tuple[Tensor | None, ...], Replay | None]:
    """The results of a call on ``inputs``, and how to do it again on others of the same kind, at
    addresses that all differ; None if it does more than to allocate memory and launch kernels.
    """
    with _Watch() as watch:
        results = function()
    if not watch.is_simple:
        return results, None
    try:
        return results, Replay(watch, inputs, results)
    except _UnknownAddressError:
        return results, None


__all__ = ["Launched", "Replay", "note", "observed", "record"]
