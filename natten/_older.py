"""Names of older versions, found where programs import them, at no cost to those that do not."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def find_older(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that has the names of :mod:`natten.legacy` too."""

    def find(name: str) -> Any:
        if not name.startswith("_"):
            legacy = import_module("natten.legacy")
            if name in legacy.__all__:
                return getattr(legacy, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


__all__ = ["find_older"]
