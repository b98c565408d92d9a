"""Functions of one rank, made of one that takes the rank first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def without_rank(
    function: Callable[Concatenate[Any, P], R],
) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """Gives a function the signature of another without its first parameter: types are written
    once."""

    def decorate(wrapper: Callable[..., Any]) -> Callable[P, R]:
        signature = inspect.signature(function)
        _, *parameters = signature.parameters.values()
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {
            name: annotation
            for name, annotation in function.__annotations__.items()
            if name != "rank"
        }
        return wrapper

    return decorate


__all__ = ["without_rank"]
