"""What lies between a public function and a launch, once a call is known."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from test_replay import _compiled
from torch import Tensor

import natten
from natten.functional import known, operators

pytest.importorskip("triton")

from natten.functional.backends.triton import replay

PACKAGE = str(Path(natten.__file__).parent)
QKV = tuple(torch.randn(1, 12, 14, 2, 16) for _ in range(3))


def spine(frame: FrameType | None) -> list[str]:
    """The package's own functions that lead to a frame, the innermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            code = frame.f_code
            found.append(getattr(code, "co_qualname", code.co_name))  # of Python 3.11 and newer
        frame = frame.f_back
    return found


class Driver:
    """Launches nothing, but sees from where it is asked to."""

    def __init__(self) -> None:
        self.spines: list[list[str]] = []

    def __call__(self, *_: Any) -> int:
        self.spines.append(spine(sys._getframe(1)))
        return 0


class Counted(dict):
    """A dictionary that counts how often something is looked up in it."""

    lookups = 0

    def get(self, key: Any, default: Any = None) -> Any:
        Counted.lookups += 1
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        Counted.lookups += 1
        return super().__getitem__(key)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Calls of CPU tensors go the way of those on a GPU: computed, recorded, then replayed."""
    found = Driver()
    make_call = operators.make_call

    def on_gpu(*arguments: Any) -> Any:
        call = make_call(*arguments)
        problem = replace(call.problem, device=torch.device("cuda"))
        return replace(call, problem=problem)

    def compute(call: Any, tensors: Any) -> tuple[Tensor, ...]:
        results = torch.empty(call.out_shape), torch.empty(call.out_shape[:-1])
        replay.note(_compiled(1), 5, (tensors.query, (results[0], (7, None)), 0.5))
        return results

    def compute_backward(call: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        tensors = arguments[2]
        results = [torch.empty(t.shape) for t in QKV]
        replay.note(_compiled(1), 5, (tensors.query, (results[0], (7, None)), 0.5))
        return (*results, None, None, None, None)

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    monkeypatch.setattr(operators, "_calls", Counted())
    monkeypatch.setattr(known, "_known", Counted())
    monkeypatch.setattr(operators, "make_call", on_gpu)
    monkeypatch.setattr(operators, "_compute", compute)
    monkeypatch.setattr(operators, "_compute_backward", compute_backward)
    monkeypatch.setattr(known, "resolve", lambda *_: mock.Mock(record=replay.record))
    monkeypatch.setattr(replay, "_driver", lambda: found)
    monkeypatch.setattr(replay, "empty_cuda", empty)
    for name, result in (("_cuda_getDevice", None), ("_cuda_getCurrentRawStream", 77)):
        monkeypatch.setattr(torch._C, name, lambda *_, result=result: result, raising=False)
    return found


def forward() -> Tensor:
    return natten.na2d(*QKV, (3, 5), dilation=2)


def forward_and_backward() -> Tensor:
    leaves = [t.detach().requires_grad_() for t in QKV]
    out = natten.na2d(*leaves, (3, 5), dilation=2)
    out.backward(torch.ones(out.shape))
    return out


def warm(function: Callable[[], Tensor], driver: Driver) -> None:
    for _ in range(3):
        function()
    driver.spines.clear()


@pytest.mark.parametrize(
    ("function", "most"), [(forward, [5]), (forward_and_backward, [6, 3])], ids=["forward", "both"]
)
def test_frames_to_a_launch(driver: Driver, function: Callable[[], Tensor], most: list[int]):
    warm(function, driver)
    function()
    assert len(driver.spines) == len(most)
    for found, frames in zip(driver.spines, most, strict=True):
        assert len(found) <= frames, found


@pytest.mark.parametrize(("function", "most"), [(forward, 1), (forward_and_backward, 2)])
def test_lookups_of_a_known_call(driver: Driver, function: Callable[[], Tensor], most: int):
    """In dictionaries, and in caches of functions, of which there are none on the way."""
    warm(function, driver)
    caches = [
        cache for cache in gc.get_objects()
        # Not isinstance, which asks proxies of what is gone.
        if type(cache) is functools._lru_cache_wrapper
        and str(cache.__module__).startswith("natten")
    ]  # fmt: skip
    assert len(caches) > 20

    def asked() -> list[int]:
        return [info.hits + info.misses for info in (cache.cache_info() for cache in caches)]

    before, Counted.lookups = asked(), 0
    function()
    assert Counted.lookups <= most
    asked_for = zip(caches, before, asked(), strict=True)
    assert [cache.__name__ for cache, first, then in asked_for if first != then] == []
    assert driver.spines
