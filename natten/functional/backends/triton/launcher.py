"""Launches of kernels, and tensors in layouts that kernels read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from natten.functional.backends.triton.arguments import Variant, pad
from natten.functional.backends.triton.replay import note, observed
from natten.functional.backends.triton.tiles import Kernel, Tiling, next_power
from natten.functional.geometry import Shape
from natten.functional.problem import Problem


@cache
def in_gluon(name: str) -> Any:
    """A module of kernels in Gluon; None where this Triton has another dialect."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return None
    try:
        return import_module(f"natten.functional.backends.triton.{name}")
    except (ImportError, AttributeError):
        return None


class TooLargeError(RuntimeError):
    """The tiles of a kernel take more of a GPU than it has.

    Attributes:
        tiling: How the kernel was to divide its work.
        kind: Which kernel it was.
    """

    def __init__(self, tiling: Tiling, kind: Kernel, reason: OutOfResources) -> None:
        super().__init__(f"tiles {tiling.query}/{tiling.key} of the {kind} kernel: {reason}")
        self.tiling, self.kind = tiling, kind


@dataclass(frozen=True)
class Compilation:
    """A kernel, and what Triton specializes it on."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, device: torch.device | None = None) -> None:
        """Compile it, into Triton's cache; for a CUDA device also what launches it there."""
        with nullcontext() if device is None else torch.cuda.device(device):
            compiled = self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.options)
            if device is not None:
                # Not loaded: that would break a CUDA graph that another thread captures.
                triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


_collected: ContextVar[list[Compilation] | None] = ContextVar("collected", default=None)
_any_order: ContextVar[bool] = ContextVar("any_order", default=False)


@contextmanager
def collecting(any_order: bool) -> Iterator[list[Compilation]]:
    """Inside, new kernels are neither compiled nor launched. Yields the list that they go to.

    ``any_order`` says that nobody knows what other calls will come before.
    """
    found: list[Compilation] = []
    tokens = _collected.set(found), _any_order.set(any_order)
    try:
        yield found
    finally:
        _collected.reset(tokens[0])
        _any_order.reset(tokens[1])


def is_collecting() -> bool:
    """Whether that is so now."""
    return _collected.get() is not None


def for_any_order() -> bool:
    """Whether kernels are collected now that are to serve whatever calls will come before."""
    return _any_order.get()


# Compilations that threads are at or will be, by kernel.
_pending: dict[Any, list[Future[None]]] = {}


def compile_meanwhile(compilations: list[Compilation], device: torch.device) -> None:
    """Compile kernels in threads, all at once: the compiler, which they wait for most of the time,
    has threads of its own. What fails is left to the launch."""

    pool = ThreadPoolExecutor(max(len(compilations), 1), "natten-compile")
    for compilation in compilations:
        before = _pending.get(compilation.kernel, ())
        future = pool.submit(compilation.run, device)
        _pending[compilation.kernel] = [*(f for f in before if not f.done()), future]
    pool.shutdown(wait=False)


@dataclass(frozen=True)
class Launch:
    """A kernel's programs, and all its arguments but the tensors.

    Triton works out anew at every launch which compiled kernel the arguments call for, at a
    hundred microseconds for as many arguments as there are here. A launch fixes all but types and
    alignment of the tensors, so the compiled kernels are kept with it.

    Attributes:
        kernel: Whose first parameters are tensors, then those of ``rest``.
        programs: How many run.
        rest: The last arguments.
        group: A named tuple that the tensors from number ``alone`` on come in, and behind them
            ``grouped``; None if each tensor is a parameter of its own.
        alone: Tensors, or descriptors, before the group.
        grouped: What else is in the group.
        options: Of the compiler. By default a product and a sum may be rounded once, which Triton
            will not assume for much longer.
        tiles: What the programs are made of, and for which kernel; None where none are chosen.
        compiled: Compiled kernels, by what Triton specializes on besides all this.
    """

    kernel: Any
    programs: int
    rest: tuple[Any, ...]
    group: Any = None
    alone: int = 0
    grouped: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})
    tiles: tuple[Tiling, Kernel] | None = None
    compiled: dict[Any, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """What a kernel of attention is compiled for."""
        variant: Variant = self.rest[-1]
        return variant

    def run(self, *tensors: Any) -> None:
        """Launch the kernel on these tensors, descriptors and Nones."""
        if self.programs == 0:
            return
        # `_kind` of each tensor, without a call for the most usual type: this is for every launch.
        kinds = tuple(
            [
                None
                if tensor is None
                else (tensor.dtype, tensor.data_ptr() % 16 == 0)
                if type(tensor) is Tensor
                else _kind(tensor)
                for tensor in tensors
            ]
        )
        compiled = self.compiled.get(kinds)
        if (collected := _collected.get()) is not None:
            # These tensors have no memory.
            if compiled is None:
                collected.append(self.compilation(tensors))
            return
        if compiled is None or observed():
            compiled = self._compile(tensors)
            if hasattr(compiled, "packed_metadata"):
                self.compiled[kinds] = compiled
            note(None, self.programs, ())
            return
        if self.group is None:
            arguments = (*tensors, *self.rest)
        else:
            alone = self.alone
            arguments = (*tensors[:alone], (*tensors[alone:], *self.grouped), *self.rest)
        note(compiled, self.programs, arguments)
        # torch.cuda.current_device() first sees to it that CUDA is initialized, as it is by now.
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None,
            None, *arguments,
        )  # fmt: skip

    def compilation(self, tensors: tuple[Any, ...]) -> Compilation:
        """What is to be compiled for such tensors."""
        return Compilation(self.kernel, self.programs, self._arguments(tensors), self.options)

    def _arguments(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.group is not None:
            group = self.group(*tensors[self.alone :], *self.grouped)
            tensors = (*tensors[: self.alone], group)
        return (*tensors, *self.rest)

    def _compile(self, tensors: tuple[Any, ...]) -> Any:
        """Launch by way of Triton, which compiles the kernel if need be and returns it."""
        arguments = self._arguments(tensors)
        for future in _pending.pop(self.kernel, ()):
            future.exception()  # which this launch will meet, too
        try:
            return _launch(self.kernel, self.programs, arguments, self.options)
        except OutOfResources as error:
            if self.tiles is None:
                raise
            raise TooLargeError(*self.tiles, error) from error


def run_all(launches: list[Launch], *tensors: Any) -> None:
    """Launch kernels on the same tensors, one after the other. They are compiled all at once."""
    device = next(t.device for t in tensors if isinstance(t, Tensor))
    if len(launches) > 1 and device.type == "cuda" and not any(one.compiled for one in launches):
        compile_meanwhile([launch.compilation(tensors) for launch in launches], device)
    for launch in launches:
        launch.run(*tensors)


@cache
def _own_cache() -> TemporaryDirectory[str]:
    """A place for compiled kernels that lasts as long as the process."""
    return TemporaryDirectory(prefix="natten-triton-")


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Where Triton cannot read or write its cache, kernels are kept for this process alone."""
    try:
        return kernel[(programs,)](*arguments, **options)
    except OSError as error:
        if _own_cache.cache_info().currsize:
            raise
        place = knobs.cache.dir
        knobs.cache.dir = _own_cache().name
        warnings.warn(
            f"Triton cannot use its cache, {place} (TRITON_CACHE_DIR): {error}. Kernels are "
            "compiled for this process alone, at every start anew",
            stacklevel=2,
        )
    return kernel[(programs,)](*arguments, **options)


def _kind(tensor: Any) -> Any:
    """What Triton specializes on: the type, and whether the address is a multiple of 16."""
    if not isinstance(tensor, Tensor):
        return tensor.base.dtype
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself unless its features are not adjacent."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _last_start(tensor: Tensor, dilation: Shape) -> int:
    """How far the first token of the last dilation group lies behind that of the first group."""
    steps = tensor.stride()[1:-2]
    return sum([(d - 1) * step for d, step in zip(dilation, steps, strict=True)])


def describable(tensor: Tensor, dilation: Shape = ()) -> Tensor:
    """The tensor itself if a TMA descriptor can view it as [batch, tokens, heads * features]."""
    size = tensor.element_size()
    suits = (
        tensor.stride(-1) == 1
        and (tensor.shape[-2] == 1 or tensor.stride(-2) == tensor.shape[-1])
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * size % 16 == 0 for s in tensor.stride()[:-2])
        # A coordinate is an integer of 32 bits.
        and not (dilation and _last_start(tensor, dilation) >= 2**31 - tensor.shape[-2:].numel())
    )
    # contiguous() keeps strides of axes of one token, whatever they are, and addresses. Nor would a
    # stride of 0 (an expanded tensor) go away by clone() alone.
    return tensor if suits else tensor.clone(memory_format=torch.contiguous_format)


def adjacent(numbers: Tensor | None) -> Tensor | None:
    """Numbers of tokens, contiguous in memory, as kernels read them."""
    return None if numbers is None else numbers.contiguous()


# Kinds of checked descriptors and what they hold but their tensors, by layout, tile and maker.
# Cleared when full, which shapes that never repeat can cause.
_descriptors: dict[Any, tuple[Any, dict[str, Any]]] = {}
_MAX_DESCRIPTORS = 4096


def descriptor(
    tensor: Tensor, tile: Shape, make: Any = TensorDescriptor, dilation: Shape = ()
) -> Any:
    """A descriptor of the tensor that loads tiles: boxes of one dilation group.

    It has no dimensions for groups. Steps along the axes are those from neighbor to neighbor, which
    divide the grid, and coordinates of features lead to the first token of a group as well: they
    are counted from the first feature of the grid's first token.
    """
    identity = (tensor.shape, tensor.stride(), tensor.dtype, tile, make, dilation)
    found = _descriptors.get(identity)
    if found is None:
        batch, *tokens, heads, features = tensor.shape
        batch_stride, *steps = tensor.stride()[:-2]
        dilation = dilation or (1,) * len(tokens)
        tokens = [n // d for n, d in zip(tokens, dilation, strict=True)]
        steps = [d * step for d, step in zip(dilation, steps, strict=True)]
        # Axes that the grid lacks are never stepped along; any valid stride will do.
        checked = make(
            tensor,
            [batch, *pad(tokens, 1), _last_start(tensor, dilation) + heads * features],
            [batch_stride, *pad(steps, batch_stride), 1],
            [1, *tile, next_power(features)],
        )
        if len(_descriptors) >= _MAX_DESCRIPTORS:
            _descriptors.clear()
        found = _descriptors[identity] = type(checked), {**vars(checked), "base": None}
    kind, fields = found
    # The class checks its arguments at every construction, as long as all the rest here takes.
    described = object.__new__(kind)
    vars(described).update(fields, base=tensor)
    return described


def allocate(
    problem: Problem, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a result: zeros where tokens may belong to no sequence, else uninitialized."""
    return (torch.zeros if problem.varlen else torch.empty)(shape, dtype=dtype, device=device)


def sequences(problem: Problem, cumulative: Tensor | None) -> int:
    """Batch entries, or packed sequences."""
    return problem.batch if cumulative is None else cumulative.shape[0] - 1
