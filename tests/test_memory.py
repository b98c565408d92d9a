"""What is kept between calls is bounded, and tensors may have more elements than 32 bits count."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import pickle
import pkgutil
import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import natten
from natten.functional import known, neighborhood_attention_generic, operators
from natten.functional.backends.cpu import plan

pytest.importorskip("numba")

# Caches without a bound, which only so much can be asked of: nothing at all, a device of this
# machine, a function or a backend of this package, a dtype.
FINITE = {
    "natten._internals._functionalize",
    "natten._internals.scripted",
    "natten._internals.uncompiled",
    "natten.devices._processor",
    "natten.devices._properties",
    "natten.functional.backends.cpu.cache._source_of",
    "natten.functional.backends.flex._compiled",
    "natten.functional.backends.triton._kernels",
    "natten.functional.backends.triton.launcher._own_cache",
    "natten.functional.backends.triton.launcher.in_gluon",
    "natten.functional.backends.triton.replay._driver",
    "natten.functional.dispatch.load",
    "natten.functional.messages._listen",
    "natten.profiler.measuring.limits",
}


def _caches() -> dict[str, Any]:
    """All caches of functions and methods of the package, imported as a whole."""
    here = [str(Path(natten.__file__).parent)]
    for module in pkgutil.walk_packages(here, "natten."):
        if not module.name.startswith("natten.models") and not module.name.endswith("__main__"):
            try:
                import_module(module.name)
            except ImportError:
                continue  # of what is optional
    return {
        f"{found.__module__}.{found.__qualname__}": found
        for found in gc.get_objects()
        if type(found) is functools._lru_cache_wrapper
        and (found.__module__ or "").startswith("natten")
    }


def test_caches_are_bounded() -> None:
    caches = _caches()
    assert len(caches) > 30
    for name, found in caches.items():
        bound = found.cache_parameters()["maxsize"]
        assert name in FINITE if bound is None else bound <= 16384, name


def test_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionaries of calls are emptied when they are full."""
    monkeypatch.setattr(operators, "_MAX_CALLS", 20)
    monkeypatch.setattr(known, "_MAX_KEYS", 30)
    operators.forget()
    for length in range(5, 60):
        query = torch.randn(1, length, 1, 8)
        natten.na1d(query, query, query, 3)
        assert 0 < len(operators._calls) <= 20
        assert 0 < len(known._known) <= 30


def test_layouts_of_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_MAX_KINDS", 20)
    operators.forget()
    for padding in range(30):
        query = torch.randn(1, 9, 1, 8 + padding)[..., :8]
        natten.na1d(query, query, query, 3)
        (kinds,) = known._known.values()
        assert 0 < len(kinds) <= 20


def test_tables_of_long_axes_are_few() -> None:
    """They take megabytes: memory does not grow with the lengths that there were."""
    sizes = []
    for number in range(2 * plan.MAX_LONG + 4):
        query = torch.empty(1, plan.MANY_TOKENS + number, 1, 8)
        problem = natten.explain(query, query, query, 5).problem
        if number == 0:
            tracemalloc.start()
        plan.query_sweep(problem, 1)
        plan.key_sweep(problem, 1)
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    full = sizes[plan.MAX_LONG :]
    assert sizes[0] > 1 << 20
    assert max(full) - min(full) < sizes[0]


def _resident() -> int:
    """Bytes of memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _call(number: int) -> None:
    """Forward and backward of a shape that no other number has, in one of five ways."""
    rows, columns = 5 + number % 89, 5 + number // 89
    kind = number % 5
    to: dict[str, Any] = {"requires_grad": True}
    if kind == 4:
        query = torch.randn(1, 1, rows, columns, 4, **to)
        scores = natten.functional.na2d_qk(query, query, (3, 2))
        out = natten.functional.na2d_av(scores.softmax(-1), query, (3, 2))
    elif kind == 3:
        query = torch.randn(1, rows * 97 + columns, 1, 8, **to)
        out = natten.na1d(query, query, query, 5)
    else:
        query = torch.randn(1, rows, columns, 1, 8, **to)
        more: dict[str, Any] = {}
        if kind == 1:
            context = torch.randn(1, 1 + number % 50, 1, 8)
            more = {"additional_keys": context, "additional_values": context}
        elif kind == 2:
            more = {"rpb": torch.randn(1, 5, 3), "dilation": (1, 1 + number % 2)}
        out = natten.na2d(query, query, query, (3, 2), backend="cpu", **more)
    out.sum().backward()


def _grow(connection: Any, calls: int) -> None:
    torch.set_num_threads(1)
    sizes = []
    for number in range(calls):
        _call(number)
        if (number + 1) % (calls // 10) == 0:
            gc.collect()
            sizes.append(_resident())
    caches = {name: found.cache_info() for name, found in _caches().items()}
    connection.send((sizes, {name: (i.currsize, i.maxsize) for name, i in caches.items()}))


@pytest.mark.exhaustive
def test_memory_does_not_grow() -> None:
    """10,000 calls of ever new shapes; the last caches are full after 4,096."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_grow, args=(there, 10_000))
    process.start()
    there.close()
    sizes, caches = here.recv()
    process.join()
    print("MB after each thousand calls:", *(size >> 20 for size in sizes))  # noqa: T201
    for name, (size, bound) in sorted(caches.items()):
        if size > 1:
            print(f"  {name}: {size} of {bound}")  # noqa: T201
        assert bound is None or size <= bound
    # The shapes grow, too.
    assert sizes[-1] - sizes[4] < 64 << 20


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.exhaustive
def test_more_elements_than_32_bits_count() -> None:
    """The last tokens of tensors of more than 2**31 elements; one after the other, for their
    memory."""
    for backward, needed in ((False, 8), (True, 12)):
        if _available() < needed << 30:
            pytest.skip(f"needs {needed} GiB of free memory")
        for head_dim, head_dim_v in ((128, 8), (8, 128)):
            _check_huge(head_dim, head_dim_v, backward)


def _check_huge(head_dim: int, head_dim_v: int, backward: bool) -> None:
    length, some, window = 2**24 + 77, 200, 9

    def tensor(features: int) -> Tensor:
        # numpy's zeros take no memory until they are written.
        found = torch.from_numpy(np.zeros((1, length, 1, features), np.int16)).view(torch.bfloat16)
        found[:, -some:] = torch.randn(1, some, 1, features)
        return found

    query, key, value = map(tensor, (head_dim, head_dim, head_dim_v))
    assert max(query.numel(), value.numel()) > 2**31
    weights = tensor(head_dim_v)

    def compute(queries: Tensor, keys: Tensor, values: Tensor, **box: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(backward) for t in (queries, keys, values)]
        out = neighborhood_attention_generic(*leaves, window, backend="cpu", **box)
        if not backward:
            return [out]
        grad = weights if out.shape == weights.shape else weights[:, -some:]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    found = [t[:, -some // 2 :].clone() for t in compute(query, key, value)]
    origin = length - some
    near = compute(
        *(t[:, -some:] for t in (query, key, value)), grid=length, query_origin=origin,
        key_origin=origin,
    )  # fmt: skip
    for mine, right in zip(found, near):
        torch.testing.assert_close(mine, right[:, -some // 2 :])
        assert mine.abs().max() > 0


def test_what_is_measured() -> None:
    """Every number is a shape of its own."""
    shapes = {(n % 5, 5 + n % 89, 5 + n // 89) for n in range(10_000)}
    assert len(shapes) == 10_000
    connection = mock.Mock()
    _grow(connection, 10)
    (((sizes, caches),), _) = connection.send.call_args
    assert len(sizes) == 10
    assert caches["natten.functional.dispatch._resolve"][0] > 3
    pickle.dumps(caches)
