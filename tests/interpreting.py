"""Triton's interpreter, with what it does again and again done once, and overflow noticed."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_PACKAGES = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
# Looked up while none is patched.
_BUILTINS = {
    package: [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]
    for package in _PACKAGES
}
_OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_patch_lang = interpreter._patch_lang
_find_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, np.dtype[Any]] = {}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _BUILTINS[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _get_np_dtype(kind: Any) -> np.dtype[Any]:
    name = kind.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _find_numpy_dtype(kind)
    return _numpy_dtypes[name]


@cache
def _sees_core(function: Any) -> bool:
    return any(value is tl.core for value in function.__globals__.values())


class _Patches:
    """What is patched: a function that a kernel calls finds it so."""

    def __init__(self) -> None:
        self.known: set[bool] = set()

    def __call__(self, function: Any) -> Any:
        key = _sees_core(function)
        if key in self.known:
            return None
        is_outermost = not self.known
        self.known.add(key)
        scope = _patch_lang(function)
        if is_outermost:
            restore = scope.restore

            def forget() -> None:
                self.known.clear()
                restore()

            scope.restore = forget
        return scope


def _check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Raises where Triton's own works out what it would compare, and compares nothing unless
    kernels are debugged."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or kind.is_int_unsigned():
        return
    numbers = (t.handle.data.astype(np.int64) for t in (left, right))
    exact = _OPERATIONS[operation.__name__](*numbers)
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    if exact.size and (exact.min() < low or exact.max() > high):
        raise OverflowError(f"{operation.__name__} exceeds {kind}: {exact.min()} to {exact.max()}")


def install() -> None:
    """From now on, in this process."""
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _Patches()
    interpreter._get_np_dtype = _get_np_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
