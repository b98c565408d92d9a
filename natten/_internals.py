"""Everything private of torch that this package touches, in one place.

The dispatcher's way to a Python kernel and back costs more than all the rest of a call, so that
calls which nobody but autograd watches go around it. :func:`is_plain` decides which those are, and
:func:`guard` which were made before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")

_KEY = torch._C.DispatchKey


def key_set(*keys: Any) -> torch._C.DispatchKeySet:
    """A set of dispatch keys."""
    found = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        found = found | torch._C.DispatchKeySet(key)
    return found


# What a dense tensor on a CPU or an NVIDIA or AMD GPU has. Whatever else a tensor has, its bytes
# are not all there is to it: negative and conjugate views, tensors of zeros without memory,
# wrappers of functionalization, of vmap and of batched gradients, sparse and meta tensors ...
_DENSE = key_set(
    _KEY.CPU,
    _KEY.CUDA,
    _KEY.AutogradCPU,
    _KEY.AutogradCUDA,
    _KEY.AutocastCPU,
    _KEY.AutocastCUDA,
    _KEY.ADInplaceOrView,
)
_SPECIAL = ~_DENSE.raw_repr()
# Other subclasses may want to see the operator, by __torch_function__ alone too.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

AUTOCAST = key_set(_KEY.AutocastCPU, _KEY.AutocastCUDA)
AUTOGRAD = key_set(_KEY.AutogradFunctionality, _KEY.AutogradOther, _KEY.AutogradNestedTensor)


def _empty_cuda(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


# Allocates on the current device, as Inductor's programs do: without the dispatcher if torch can.
empty_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_cuda)


after_autograd = torch._C._after_autograd_keyset
below_autograd = torch._C._AutoDispatchBelowAutograd
excluding = torch._C._ExcludeDispatchKeyGuard
any_requires_grad = torch._C._any_requires_grad
any_autocast = torch._C._is_any_autocast_enabled


def is_watched() -> bool:
    """Whether anybody but autograd wants to see what is done here: tracers, modes, the profiler,
    transforms."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def is_dense(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all that these tensors are is in their memory."""
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or torch._C._dispatch_keys(tensor).raw_repr() & _SPECIAL
        ):
            return False
    return True


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody but autograd watches what is done with these tensors, and all that they are is
    in their memory: then the dispatcher has nothing to add."""
    return not is_watched() and is_dense(tensors)


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells whether as many other tensors are like these dense ones: type, sizes, strides,
    dtype, device, requires_grad, what the dispatcher would do with them, and which are the same.

    It is what compiled programs ask before they run: one call, where to read all that in Python
    takes ten times as long.
    """
    first = {id(tensor): number for number, tensor in reversed([*enumerate(tensors)])}
    places = [first[id(tensor)] for tensor in tensors]
    numbers = sorted(set(places))
    different = [tensors[number] for number in numbers]
    # It crashes without its named arguments, whose types are not as torch declares them.
    make: Any = torch._C._dynamo.guards.TensorGuards
    sizes, strides = [list(t.shape) for t in different], [list(t.stride()) for t in different]
    check: Callable[..., bool] = make(
        *different, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    if len(different) == len(tensors):
        return check

    def check_same(*others: Tensor) -> bool:
        # To torch's, no tensor may be given twice.
        are_same = all(t is others[place] for t, place in zip(others, places, strict=True))
        return are_same and check(*[others[number] for number in numbers])

    return check_same


def plain_apply(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its search for default arguments, by inspection, and transforms:
    the base class's, which it ends with.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is going on, with or without tangents."""
    return forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, which imports the compiler: programs are of one
# mode.
in_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def only_forward_mode() -> bool:
    """Whether forward mode, once, is all that torch.func differentiates with now."""
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    types = torch._C._functorch.TransformType
    return kinds.count(types.Jvp) <= 1 and types.Grad not in kinds


only_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward mode differentiates some of these tensors now."""
    if not in_forward_mode():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _primal(tensor: Tensor) -> Tensor:
    """A tensor without its tangent of this level. torch's vmap has no rule for that."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor):
        return forward_ad.unpack_dual(tensor).primal
    inner = _primal(functorch.get_unwrapped(tensor))
    level = functorch.maybe_get_level(tensor)
    return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(tensor), level)


class _Primals:
    """A Function's context, whose saved tensors have lost their tangents of this level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = tuple([None if t is None else _primal(t) for t in ctx.saved_tensors])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


@contextmanager
def in_outer_levels(ctx: Any) -> Iterator[Any]:
    """Inside a Function's ``jvp``, tangents have tangents of their own: those of levels around this
    one, as in ``jvp`` of ``jvp``. torch has forward mode off there, and they would silently be 0.

    Yields:
        What to use for the Function's context.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield _Primals(ctx)


def transforming() -> bool:
    """Whether torch.func transforms are at work, which must see the Function and not the operator:
    the dispatcher does not hand them a Python kernel's derivative.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# Functions that change nothing and return no views.
_pure: set[type[torch.autograd.Function]] = set()


@cache
def _functionalize() -> None:
    """Have torch.func.functionalize hand on what it wraps to pure Functions: torch has no rule for
    any."""
    from torch._functorch.autograd_function import custom_function_call
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    rules: Any = custom_function_call.functorch_table
    kind = torch._C._functorch.TransformType.Functionalize
    of_others = rules[kind]

    def rule(interpreter: Any, function: Any, *arguments: Any) -> Any:
        if function not in _pure:
            return of_others(interpreter, function, *arguments)
        level = FunctorchFunctionalizeAPI(interpreter)
        inner: Any = level.unwrap_tensors(arguments)
        with level.redispatch_to_next():
            results = function.apply(*inner)
        return level.wrap_tensors(results)

    rules[kind] = rule


def transformed(function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """``function.apply(*arguments)`` under the transforms of torch.func, functionalization too. The
    function changes nothing and returns no views."""
    _pure.add(function)
    _functionalize()
    return function.apply(*arguments)


def is_exporting() -> bool:
    """Whether a program is exported, which is one for all sizes, and not compiled.

    Dynamo says so of itself in torch 2.11, whatever it does; what it traces may branch on sizes.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_known(condition: Any) -> bool:
    """A comparison of sizes; False where a compiler would have to guard on it."""
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


@cache
def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that no compiler looks into."""
    return torch.compiler.disable(function)


def concrete(function: Callable[P, T]) -> Callable[P, T]:
    """A function of numbers, by tensors that have values also while a program is traced."""

    @wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> T:
        with _disable_current_modes():
            return function(*arguments, **named)

    return computed


@cache
def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose branches on sizes stay branches in what torch.jit.trace records."""
    with warnings.catch_warnings():
        # All of torch.jit is deprecated, of which tracing warns itself.
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def called_directly(operator: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Have programs that Inductor writes in Python call a function where they would call an
    operator, whose arguments it takes: the dispatcher's way costs more than all the rest.

    Args:
        operator: An overload of ``torch.ops``.
        name: What the function is called in the operator's namespace, where programs find it, also
            those that a cache keeps on disk.
        function: Computes it, of plain tensors.

    Returns:
        What tells Inductor so, once it has been imported. To be called while a program is traced.
    """
    setattr(getattr(torch.ops, operator.namespace), name, function)
    is_told = False

    def tell() -> None:
        nonlocal is_told
        lowering = sys.modules.get("torch._inductor.lowering")
        if lowering is None or is_told:
            return
        is_told = True
        fall_back = lowering.fallback_handler(operator, add_to_fallback_set=False)

        def lower(*arguments: Any) -> Any:
            results = fall_back(*arguments)
            # Programs in C++ have the dispatcher alone.
            if not V.graph.cpp_wrapper:
                first = results[0] if isinstance(results, list | tuple) else results
                kernel = first.data.data
                if not isinstance(kernel, FallbackKernel):
                    (kernel,) = kernel.inputs
                kernel.python_kernel_name = f"torch.ops.{operator.namespace}.{name}"
            return results

        from torch._inductor.ir import FallbackKernel
        from torch._inductor.virtualized import V

        lowering.register_lowering(operator, type_promotion_kind=None)(lower)

    return tell


def decompose(operator: Any, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Tell exporters to other runtimes, such as torch.onnx's, what an operator is made of.

    Args:
        operator: An overload of ``torch.ops``.
        function: Computes it in operators of torch's own.
        fake: Its results without data. Otherwise they would be those of ``function``.
    """
    from torch._decomp import decomposition_table, meta_table

    decomposition_table[operator] = function
    meta_table[operator] = fake


def below_autocast() -> AbstractContextManager[Any]:
    """Keeps autocast from seeing what it has cast already."""
    return excluding(AUTOCAST)


def library(namespace: str) -> torch.library.Library:
    """The library that operators of a namespace are defined in.

    If this package was imported before, and removed from ``sys.modules`` since, what that import
    defined is undone.
    """
    home = getattr(torch.ops, namespace)
    previous = getattr(home, "_natten_library", None)
    if previous is not None:
        previous._destroy()
    found = torch.library.Library(namespace, "DEF")
    home._natten_library = found
    return found


__all__ = [
    "AUTOCAST",
    "AUTOGRAD",
    "after_autograd",
    "any_autocast",
    "any_requires_grad",
    "below_autocast",
    "below_autograd",
    "called_directly",
    "decompose",
    "empty_cuda",
    "guard",
    "has_tangents",
    "in_forward_mode",
    "in_outer_levels",
    "is_dense",
    "is_exporting",
    "is_known",
    "is_plain",
    "is_watched",
    "key_set",
    "library",
    "only_forward_mode",
    "plain_apply",
    "scripted",
    "transformed",
    "transforming",
]
