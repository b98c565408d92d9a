"""Calls that were made before on tensors like those at hand.

Checks of arguments, the choice of a backend, of tiles, layouts and compiled kernels depend on
everything about tensors but their data. What they came to is kept with a guard, by which one look
at other tensors tells that they are alike; on a GPU with the launches that are left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from natten._internals import guard
from natten.context import preferences
from natten.functional.call import Call
from natten.functional.dispatch import resolve

Results = tuple[Tensor | None, ...]

# Replays of tensors of one kind, of which there is one for each pattern of alignments.
_MAX_REPLAYS = 64
# Beside replays: what has been done once, and what has to be done as the first time for good.
_ONCE, _NEVER = object(), object()


class Known:
    """A forward or backward pass of a call, on tensors of one kind.

    Attributes:
        call: Which call.
        compute: Computes the results, of tensors of that kind.
        places: Which arguments of the operator the call's tensors are; the others are None.
        suits: Whether other tensors are of that kind.
        replays: Pairs of alignment and settings with how to do it again; None where nothing is
            recorded.
    """

    __slots__ = ("call", "compute", "places", "replays", "suits")

    def __init__(
        self,
        call: Call,
        places: tuple[int, ...],
        tensors: Sequence[Tensor],
        compute: Callable[[Sequence[Tensor]], Results],
    ) -> None:
        self.call, self.places, self.compute = call, places, compute
        self.suits = guard(tensors)
        self.replays: list[Any] | None = [] if call.problem.device.type == "cuda" else None

    def run(self, tensors: Sequence[Tensor]) -> Results:
        """The results, on a GPU by what the backend recorded of an earlier run, if it did."""
        if self.replays is None:
            return self.compute(tensors)
        problem = self.call.problem
        pointers = [t.data_ptr() for t in tensors]
        settings = (
            reduce(or_, pointers) & 15 and tuple([p & 15 for p in pointers]),
            preferences().identity,
            torch.get_float32_matmul_precision() if problem.dtype is torch.float32 else None,
        )
        # Hardly ever are there two.
        for replay in self.replays:
            if replay[0] == settings:
                break
        else:
            # For all that is done once, such as compiling.
            if len(self.replays) >= _MAX_REPLAYS:
                self.replays.clear()
            self.replays.append([settings, _ONCE])
            return self.compute(tensors)
        found = replay[1]
        if found is _ONCE:
            backend = resolve(problem, self.call.config, self.call.parameters.backend)
            results, recorded = backend.record(lambda: self.compute(tensors), list(tensors))
            replay[1] = recorded or _NEVER
            return results
        again: Results | None = None if found is _NEVER else found(tensors, pointers)
        return self.compute(tensors) if again is None else again


# By what is quick to look at. Cleared when full, which shapes that never repeat can cause.
_known: dict[Any, list[Known]] = {}
_MAX_KEYS = 4096
# With one key: strides, dtypes, devices.
_MAX_KINDS = 64


def find(key: Any, tensors: Sequence[Tensor]) -> Known | None:
    """What is known by a key for such tensors.

    Raises:
        TypeError: Symbolic sizes of a compiler, which are not hashable, in the key.
    """
    for known in _known.get(key, ()):
        if known.suits(*tensors):
            return known
    return None


def add(key: Any, known: Known) -> Known:
    """Have it found by a key from now on."""
    if len(_known) >= _MAX_KEYS:
        _known.clear()
    kinds = _known.setdefault(key, [])
    if len(kinds) >= _MAX_KINDS:
        kinds.clear()
    kinds.append(known)
    return known


def forget() -> None:
    """Find nothing of what has been added."""
    _known.clear()


__all__ = ["Known", "Results", "add", "find", "forget"]
