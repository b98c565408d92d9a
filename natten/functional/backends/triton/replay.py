"""Calls that do again what the same call did before: launch the same kernels on other tensors.

Between a public function and its kernels lie the choice of a backend, of tiles, of layouts, of a
compiled kernel, and the packing of its arguments. All of that is the same whenever shapes, dtypes,
strides, alignment and settings are. :func:`record` watches one call and keeps what is left: memory
that was allocated, launches with the addresses of tensors left open, and operations of torch that
are neither.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


@dataclass(frozen=True)
class Operated:
    """An operation of torch, and the tensors that it returned."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[Tensor, ...]

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        leaves: list[Any] = tree_leaves((self.arguments, self.options))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Watch(TorchDispatchMode):
    """Sees what torch is asked for, and by way of :func:`note`, what is launched.

    Attributes:
        allocated: Tensors without values.
        steps: Operations and launches, in their order. All tensors are kept, so that no two are at
            the same address or the same to Python.
        is_known: Whether there was nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.steps: list[Launched | Operated] = []
        self.is_known = True

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if function in _ALLOCATIONS:
            self.allocated.append(result)
            return result
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if all(isinstance(r, Tensor) for r in results):
            self.steps.append(Operated(function, tuple(arguments), options or {}, results))
        else:
            # Somebody looked at values, and what comes next may depend on them.
            self.is_known = False
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
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def note(compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """Tell whoever watches this thread of a launch. ``compiled`` is None if Triton does not say
    what it launched."""
    if _here.watch is not None:
        if compiled is None:
            _here.watch.is_known = False
        else:
            _here.watch.steps.append(Launched(compiled, programs, arguments))


@dataclass(frozen=True)
class _Address:
    """An address in the memory of one of the call's tensors."""

    tensor: int
    offset: int


class _UnknownTensorError(Exception):
    """A tensor that is neither given to the call nor made in it, or given and returned."""


class _Base:
    """Stands for the tensor of a descriptor: Triton asks for no more than its address."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def data_ptr(self) -> int:
        return self._pointer


class _Tensors:
    """The tensors of a call, numbered: inputs, memory, then the results of operations.

    Attributes:
        all: Themselves.
        owners: The number of the tensor in whose memory each of them is.
        first_memory: The number of the first that was allocated.
        first_result: The number of the first result.
    """

    def __init__(self, inputs: Sequence[Tensor], watch: _Watch) -> None:
        self.all: list[Tensor] = []
        self.owners: list[int] = []
        self._numbers: dict[int, int] = {}
        self.first_memory = len(inputs)
        self.first_result = len(inputs) + len(watch.allocated)
        for number, tensor in enumerate((*inputs, *watch.allocated)):
            self._add(tensor, number)
        for step in watch.steps:
            if isinstance(step, Operated):
                given = step.given
                for result in step.results:
                    # An operation in place returns what it was given.
                    if id(result) not in self._numbers:
                        shared = [t for t in given if _storage(t) == _storage(result)]
                        self._add(result, self.owner(shared[0]) if shared else len(self.all))

    def _add(self, tensor: Tensor, owner: int) -> None:
        self._numbers[id(tensor)] = len(self.all)
        self.all.append(tensor)
        self.owners.append(owner)

    def number(self, tensor: Tensor) -> int:
        found = self._numbers.get(id(tensor))
        if found is None:
            raise _UnknownTensorError
        return found

    def owner(self, tensor: Tensor) -> int:
        return self.owners[self.number(tensor)]

    def address(self, tensor: Tensor) -> _Address:
        owner = self.owner(tensor)
        return _Address(owner, tensor.data_ptr() - self.all[owner].data_ptr())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _open(argument: Any, tensors: _Tensors) -> Any:
    """An argument of a kernel with addresses in place of tensors."""
    if isinstance(argument, Tensor):
        return tensors.address(argument)
    if isinstance(argument, tuple):
        parts = [_open(part, tensors) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if hasattr(argument, "base"):
        found = copy(argument)
        found.base = tensors.address(argument.base)
        return found
    return argument


def _filling(argument: Any) -> Callable[[Sequence[int]], Any] | None:
    """What makes an argument with pointers in place of addresses; None if there are none in it."""
    if isinstance(argument, _Address):
        tensor, offset = argument.tensor, argument.offset
        return lambda pointers: pointers[tensor] + offset
    if isinstance(argument, tuple):
        parts = [(place, _filling(part)) for place, part in enumerate(argument)]
        open_parts = [(place, fill) for place, fill in parts if fill is not None]

        def filled(pointers: Sequence[int]) -> tuple[Any, ...]:
            found = list(argument)
            for place, fill in open_parts:
                found[place] = fill(pointers)
            return tuple(found)

        return filled if open_parts else None
    if hasattr(argument, "base"):
        kind, fields = type(argument), vars(argument)
        tensor, offset = argument.base.tensor, argument.base.offset

        def described(pointers: Sequence[int]) -> Any:
            # The class checks its arguments at every construction.
            found = object.__new__(kind)
            vars(found).update(fields, base=_Base(pointers[tensor] + offset))
            return found

        return described
    return None


def flat(signature: Any, argument: Any) -> list[tuple[str, Any]]:
    """The arguments that a kernel gets, with their types."""
    if isinstance(signature, tuple):
        pairs = zip(signature, argument, strict=True)
        return [leaf for types, value in pairs for leaf in flat(types, value)]
    return [] if signature == "constexpr" else [(signature, argument)]


@cache
def _driver() -> Any:
    """The driver's function that launches kernels. Without declared types, what it is given is
    handed on as it is, in a quarter of the time."""
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


# The driver's CUlaunchConfig: three extents of the grid, three of a block, bytes of shared memory;
# then the stream, the address of attributes and how many there are.
_EXTENTS, _REST = "7I4x", "3Q"
_STREAM, _CONFIG = struct.calcsize(_EXTENTS), struct.calcsize(_EXTENTS + _REST)


class _DriverLaunch:
    """A launch by the driver, whose arguments lie in memory already, all but the addresses.

    Triton's launcher unpacks every argument again and asks the driver about every address.
    """

    def __init__(self, launch: Launched, leaves: list[tuple[str, Any]]) -> None:
        self.compiled = launch.compiled  # which owns the function
        metadata = launch.compiled.metadata
        self.extents = (launch.programs, 1, 1, 32 * metadata.num_warps, 1, 1, metadata.shared)
        # In memory, addresses come before all other values: every launch writes them anew.
        addresses = list(dict.fromkeys(v for _, v in leaves if isinstance(v, _Address)))
        self.values: list[bytes] = []
        self.places: list[int] = []
        # The last two are scratch buffers, which the kernel does not use.
        for kind, value in (*leaves, ("*", None), ("*", None)):
            if isinstance(value, _Address):
                self.places.append(addresses.index(value))
            else:
                self.places.append(len(addresses) + len(self.values))
                is_null = kind.startswith("*")
                self.values.append(b"" if is_null else struct.pack("<" + _FORMATS[kind], value))
        self.write = struct.Struct(f"{_REST}{len(addresses)}Q").pack_into
        self.first_value = _CONFIG + 8 * len(addresses)
        self.select = _selecting(addresses)
        # Threads must not write into each other's arguments.
        self.memory = threading.local()

    def _memory(self) -> tuple[bytearray, tuple[Any, ...], Any]:
        memory = bytearray(self.first_value + 8 * len(self.values))
        struct.pack_into(_EXTENTS, memory, 0, *self.extents)
        for number, value in enumerate(self.values):
            start = self.first_value + 8 * number
            memory[start : start + len(value)] = value
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        places = [start + _CONFIG + 8 * place for place in self.places]
        table = (ctypes.c_void_p * len(places))(*places)
        pointers = (start, self.compiled.function, ctypes.addressof(table), None)
        return memory, tuple(map(ctypes.c_void_p, pointers)), table

    def bound(self, pointers: list[int], stream: int) -> tuple[Any, ...]:
        """What the driver is given, with these addresses among the arguments."""
        try:
            memory, given, _ = self.memory.found
        except AttributeError:
            memory, given, _ = self.memory.found = self._memory()
        self.write(memory, _STREAM, stream, 0, 0, *self.select(pointers))
        return given


def _selecting(addresses: list[_Address]) -> Callable[[list[int]], Sequence[int]]:
    """What makes these addresses of those of a call's tensors."""
    if len(addresses) > 1 and not any(address.offset for address in addresses):
        found: Callable[[list[int]], Sequence[int]] = itemgetter(*[a.tensor for a in addresses])
        return found
    pairs = [(address.tensor, address.offset) for address in addresses]
    return lambda pointers: [pointers[tensor] + offset for tensor, offset in pairs]


class _TritonLaunch:
    """A launch by Triton's launcher, which makes tensor maps of descriptors."""

    def __init__(self, launch: Launched, arguments: tuple[Any, ...]) -> None:
        self.compiled, self.programs = launch.compiled, launch.programs
        self.filled: Any = _filling(arguments)

    def __call__(self, tensors: list[Any], pointers: list[int], stream: int) -> None:
        compiled = self.compiled
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None,
            None, *self.filled(pointers),
        )  # fmt: skip


class _Operation:
    """An operation of torch on tensors of the call."""

    def __init__(self, step: Operated, tensors: _Tensors) -> None:
        self.function, self.options = step.function, step.options
        self.arguments = [None if isinstance(a, (Tensor, list)) else a for a in step.arguments]
        self.places: list[tuple[int, int]] = []
        self.lists: list[tuple[int, list[int]]] = []
        for place, argument in enumerate(step.arguments):
            if isinstance(argument, Tensor):
                self.places.append((place, tensors.number(argument)))
            elif isinstance(argument, list) and any(isinstance(a, Tensor) for a in argument):
                self.lists.append((place, [tensors.number(a) for a in argument]))
            elif isinstance(argument, list):
                self.arguments[place] = argument
        if any(isinstance(option, Tensor) for option in tree_leaves(step.options)):
            raise _UnknownTensorError
        self.results = [tensors.number(result) for result in step.results]

    def __call__(self, tensors: list[Any], pointers: list[int], stream: int) -> None:
        arguments = self.arguments.copy()
        for place, number in self.places:
            arguments[place] = tensors[number]
        for place, numbers in self.lists:
            arguments[place] = [tensors[number] for number in numbers]
        found = self.function(*arguments, **self.options)
        for number, result in zip(
            self.results, (found,) if isinstance(found, Tensor) else found, strict=True
        ):
            tensors[number], pointers[number] = result, result.data_ptr()


def _prepared(launch: Launched, tensors: _Tensors) -> _DriverLaunch | _TritonLaunch:
    compiled, arguments = launch.compiled, _open(launch.arguments, tensors)
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


def _addresses(argument: Any) -> Iterator[_Address]:
    if isinstance(argument, _Address):
        yield argument
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _addresses(part)
    elif hasattr(argument, "base"):
        yield argument.base


def _needed(
    steps: list[Launched | Operated], tensors: _Tensors, results: set[int]
) -> tuple[list[Launched | Operated], set[int]]:
    """Launches and the operations that these, or results, need; and the numbers of all tensors that
    operations are given."""
    needed = set(results)
    operands: set[int] = set()
    found: list[Launched | Operated] = []
    for step in reversed(steps):
        if isinstance(step, Launched):
            needed.update(a.tensor for a in _addresses(_open(step.arguments, tensors)))
        elif step.function._schema.is_mutable or any(
            tensors.number(result) in needed for result in step.results
        ):
            given = [tensors.number(t) for t in step.given]
            operands.update(given)
            needed.update(given)
        else:
            continue
        found.append(step)
    return found[::-1], operands


# The number of the result that is None: behind all tensors.
_NONE = -1


class Replay:
    """What a call does, given its tensors.

    Attributes:
        device: On which, by its number.
        launch: The driver's function.
        allocations: Size, stride and dtype of the memory that it needs.
        steps: Launches, and operations.
        others: Places of the tensors that operations return, and behind them of None.
        results: Which of all its tensors it returns.
    """

    def __init__(
        self, watch: _Watch, inputs: Sequence[Tensor], results: Sequence[Tensor | None]
    ) -> None:
        self.device, self.launch = inputs[0].device.index, _driver()
        tensors = _Tensors(inputs, watch)
        self.allocations = [(tuple(t.shape), t.stride(), t.dtype) for t in watch.allocated]
        self.results = [_NONE if r is None else tensors.number(r) for r in results]
        returned = [n for n in self.results if n != _NONE]
        owners = [tensors.owners[n] for n in returned]
        if any(owner < tensors.first_memory for owner in owners):
            raise _UnknownTensorError
        operated = {n for n in returned if tensors.owners[n] >= tensors.first_result}
        operands = _needed(watch.steps, tensors, operated)[1]
        seen = {tensors.owners[n] for n in operands}
        for place, number in enumerate(self.results):
            if number == _NONE:
                continue
            result, owner = tensors.all[number], tensors.owners[number]
            is_all = result.untyped_storage().nbytes() == result.nbytes
            if (
                owner < tensors.first_result
                and owner not in seen
                and owners.count(owner) == 1
                and is_all
            ):
                # Kernels know addresses alone: the memory may as well have the result's shape.
                shape = tuple(result.shape), result.stride(), result.dtype
                self.allocations[owner - tensors.first_memory] = shape
                self.results[place] = owner
        wanted = {n for n in self.results if n != _NONE}
        steps, _ = _needed(watch.steps, tensors, wanted)
        self.steps = [
            _prepared(step, tensors) if isinstance(step, Launched) else _Operation(step, tensors)
            for step in steps
        ]
        operates = any(isinstance(step, _Operation) for step in self.steps)
        self.others = [None] * (1 + (len(tensors.all) - tensors.first_result if operates else 0))

    def __call__(
        self, inputs: Sequence[Tensor], pointers: list[int]
    ) -> tuple[Tensor | None, ...] | None:
        if torch._C._cuda_getDevice() != self.device or observed():
            return None
        memory = [empty_cuda(*allocation) for allocation in self.allocations]
        # Operations fill in the rest.
        tensors: list[Any] = [*inputs, *memory, *self.others]
        places: list[Any] = [*pointers, *[t.data_ptr() for t in memory], *self.others]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for step in self.steps:
            if not isinstance(step, _DriverLaunch):
                step(tensors, places, stream)
            elif error := self.launch(*step.bound(places, stream)):
                raise RuntimeError(
                    f"CUDA error {error} when the kernel {step.compiled.name} was launched"
                )
        return tuple([tensors[number] for number in self.results])


def record(
    function: Callable[[], tuple[Tensor | None, ...]], inputs: list[Tensor]
) -> tuple[tuple[Tensor | None, ...], Replay | None]:
    """The results of a call on ``inputs``, and how to do it again on others of the same kind; None
    if it looks at values, or at tensors from elsewhere.
    """
    with _Watch() as watch:
        results = function()
    if not watch.is_known:
        return results, None
    try:
        return results, Replay(watch, inputs, results)
    except _UnknownTensorError:
        return results, None


__all__ = ["Launched", "Replay", "note", "observed", "record"]
