"""All of NATTEN 0.14 to 0.17 that programs still use, and nothing that newer code needs.

:mod:`natten.older.functions`     names, call forms and flags: ``natten.legacy``, and found in
                                  ``natten``, its ``context``, ``functional`` and ``utils`` too
:mod:`natten.older.experimental`  fused attention with the arguments of 0.17:
                                  ``natten.experimental``
:mod:`natten.older.modules`       arguments of the attention modules
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any


def find(module: str, name: str) -> Any:
    """An older name that a program asks a module for, at no cost to those that ask for none.

    Raises:
        AttributeError: It is not one of them.
    """
    if not name.startswith("_"):
        functions = import_module("natten.older.functions")
        if name in functions.__all__:
            return getattr(functions, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def add_names(*modules: ModuleType) -> None:
    """Let modules, which know nothing of this package, have the older names as well."""
    for module in modules:
        vars(module).update(__getattr__=partial(find, module.__name__))


__all__ = ["add_names", "find"]
