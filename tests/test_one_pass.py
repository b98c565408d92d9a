"""The pass that computes all gradients, with what it launches computed by torch.

What is checked is all but the kernel: which launches there are, and which memory each is told of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import natten
from natten import devices, window
from natten.functional.backend import Inputs, Results
from natten.functional.backends.reference import REFERENCE
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import make_problem

pytest.importorskip("triton")

from natten.functional import backends
from natten.functional.backends.triton import HOPPER, ahead, tiles
from natten.functional.backends.triton.arguments import LOG2_E
from natten.functional.backends.triton.launcher import Launch, collecting, in_gluon

pytestmark = pytest.mark.skipif(
    in_gluon("hopper_backward") is None, reason="another dialect of Gluon"
)


def _decoded(numbers: Any) -> list[int]:
    return [(number >> 1) - 1 for number in numbers]


def _described(source: Any) -> Tensor:
    """All memory that a descriptor may read or write."""
    return source.base.as_strided(source.shape, source.strides)


def _pointed(target: Tensor, strides: Any, like: Tensor, unit: int) -> Tensor:
    """A tensor that strides lead through, as large as keys ``[batch, x, y, z, head, feature]``."""
    return target.as_strided(like.shape, [unit * step for step in _decoded(strides)] + [1])


def _compute_gradients(launch: Launch, *tensors: Any) -> None:
    """What `hopper_gradients_kernel` does."""
    query, key, value, grad_out, statistics, sums = map(_described, tensors[:6])
    strides, seen = launch.grouped
    heads, first_head, group, scales, variant = launch.rest
    members, features, block = variant.HEADS_PER_KV, variant.FEATURES, variant.BLOCK
    keys = [t.unflatten(-1, (heads, features)) for t in (key, value)]
    queries = [t.unflatten(-1, (heads * members, features)) for t in (query, grad_out)]
    targets = [
        _pointed(target, steps, like, variant.UNIT)
        for target, steps, like in zip(tensors[6:8], strides[:2], keys, strict=True)
    ]
    lengths, sizes = _decoded(seen.lengths), _decoded(seen.kernels)
    axes = [
        window.Axis(*axis)
        for axis in zip(lengths, sizes, seen.strides, seen.dilations, variant.CAUSAL)
    ]
    boxes = [*query.shape[1:4]], [*key.shape[1:4]]
    mask = window.grid_mask(axes, *boxes)
    for batch in range(len(query)):
        for head in range(first_head, first_head + group):
            k, v = (t[batch, ..., head, :].flatten(0, 2).float() for t in keys)
            found = [torch.zeros_like(t) for t in (k, v)]
            for member in range(head * members, (head + 1) * members):
                q, g = (t[batch, ..., member, :].flatten(0, 2).float() for t in queries)
                row = statistics[batch * heads * members + member].flatten(0, 2)
                weights = torch.exp2(q @ k.T * scales.scores - row[:, :1]) * mask
                scores = weights * (g @ v.T - row[:, 1:2])
                found[0] += scores.T @ q * scales.gradients
                found[1] += weights.T @ g
                first = (member - first_head * members) * block
                part = sums[batch, ..., first : first + features]
                part += (scores @ k).view(part.shape)
            for target, gradient in zip(targets, found, strict=True):
                own = target[batch, ..., head, :]
                own.copy_(gradient.view(own.shape))


def _compute_statistics(launch: Launch, *tensors: Tensor) -> None:
    """What `statistics_kernel` does."""
    out, grad_out, lse, _, statistics = tensors
    delta = (out.float() * grad_out).sum(-1)
    for number, rows in enumerate((lse * LOG2_E, delta)):
        statistics[..., number] = rows.flatten(1, -2).mT


def _compute_sums(launch: Launch, parts: Tensor, out: Tensor, *_: Any) -> None:
    """What `merge_kernel` does."""
    assert parts.is_contiguous()
    out.copy_(parts.sum(0))


COMPUTED: dict[str, Callable[..., None]] = {
    "hopper_gradients_kernel": _compute_gradients,
    "statistics_kernel": _compute_statistics,
    "merge_kernel": _compute_sums,
}


def _run(problem: Problem, config: Config, inputs: Inputs, results: Results, needs: Any) -> Any:
    """The gradients, and the launches of the kernel for them."""
    launched: list[Launch] = []

    def run(launch: Launch, *tensors: Any) -> None:
        if launch.kernel.fn.__name__ == "hopper_gradients_kernel":
            launched.append(launch)
        COMPUTED[launch.kernel.fn.__name__](launch, *tensors)

    with devices.pretending(devices.find("h100")), mock.patch.object(Launch, "run", run):
        found = HOPPER.backward(
            replace(problem, device=torch.device("cuda")), config, inputs, results, needs
        )
    return found, launched


def _tensors(problem: Problem, is_packed: bool) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=problem.dtype)

    batch, heads_kv, width = problem.batch, problem.heads_kv, problem.head_dim
    if is_packed:
        query, key, value = randn(batch, *problem.query_shape, 3, heads_kv, width).unbind(-3)
    else:
        query = randn(batch, *problem.query_shape, problem.heads, width)
        key, value = (randn(batch, *problem.key_shape, heads_kv, width) for _ in range(2))
    more = [randn(batch, problem.num_additional, heads_kv, width) for _ in range(2)]
    return Inputs(query, key, value, None, *more, *(None,) * 6)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    HOPPER._backward_tilings.cache_clear()
    yield
    HOPPER._backward_tilings.cache_clear()


@pytest.mark.parametrize("is_packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(
    ("shape", "batch", "heads", "heads_kv", "head_dim", "additional", "splits"),
    [
        ((60,), 1, 3, 3, 64, 77, 15),
        ((6, 10), 2, 3, 3, 128, 200, 15),
        ((3, 4, 5), 2, 3, 3, 96, 1, 15),
        ((6, 10), 3, 6, 3, 64, 130, 12),
        ((59,), 2, 2, 1, 64, 5, 1),
    ],
)
def test_additional_keys(
    shape, batch, heads, heads_kv, head_dim, additional, splits, launches, is_packed, monkeypatch
):
    """Every gradient, whatever divides heads and queries."""

    def shared(problem: Problem, *_: Any) -> tiles.Tiling:
        tiling = tiles.fused_tiling(tiles.additional_problem(problem))
        return tiling if splits == 1 else tiles.shared_queries(tiling, splits)

    monkeypatch.setattr(tiles, "fused_additional", shared)
    monkeypatch.setattr(backends.triton, "_SMALL_SUMS", 2**26 if launches == 1 else 0)
    if is_packed:
        heads = heads_kv
    problem = make_problem(
        shape, tuple(max(n // 2, 1) for n in shape), batch=batch, heads=heads, heads_kv=heads_kv,
        head_dim=head_dim, additional=additional, dtype=torch.float16, requires_grad=True,
    )  # fmt: skip
    rank, queries = len(shape), 8192 // tiles.block(head_dim)
    config = Config(
        backward_q_tile_shape=(1,) * (rank - 1) + (queries,),
        backward_kv_tile_shape=(1,) * (rank - 1) + (128,),
    )
    inputs = _tensors(problem, is_packed)
    out, lse = REFERENCE.forward(problem, config, inputs)
    results, needs = Results(out, lse, torch.randn_like(out)), (True,) * 3 + (False, True, True)
    wanted = REFERENCE.backward(problem, config, inputs, results, needs)
    found, launched = _run(problem, config, inputs, results, needs)
    assert len(launched) == 2 * min(launches, heads_kv)
    dense = launched[1]
    tile = dense.variant.KEYS
    assert dense.programs == -(-additional // tile) * batch * splits * -(-heads_kv // launches)
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == problem.dtype
            torch.testing.assert_close(got, want, atol=6e-3, rtol=4e-3)
    # Its part of the query's gradient is needed all the same.
    alone, launched = _run(problem, config, inputs, results, (True,) * 3 + (False,) * 3)
    assert len(launched) == 2 * min(launches, heads_kv)
    assert alone[3:] == (None, None, None)
    assert all(map(torch.equal, alone[:3], found[:3]))


def test_kernels_that_are_compiled_ahead() -> None:
    """One for the grid's keys, one for additional ones, and what joins the gradients of shares."""
    problem = make_problem(
        (128, 128), (60, 60), heads=8, head_dim=128, additional=77, dtype=torch.bfloat16,
        device="cuda", requires_grad=True,
    )  # fmt: skip
    inputs, results, needs = ahead.without_memory(problem)
    with devices.pretending(devices.find("h100")), collecting(any_order=True) as found:
        HOPPER.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
    assert Counter(c.kernel.__name__ for c in found) == {
        "statistics_kernel": 1, "hopper_gradients_kernel": 2, "merge_kernel": 2,
    }  # fmt: skip


def test_shares_of_queries() -> None:
    """Few programs share the queries, as evenly as their number allows, if they may."""
    problem = make_problem(
        (120, 128), (60, 60), heads=8, head_dim=128, additional=77, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip

    def found(**changes: Any) -> Any:
        HOPPER._backward_tilings.cache_clear()
        with devices.pretending(devices.find("h100")):
            return HOPPER.backward_tilings(replace(problem, **changes), Config())

    chosen = found()
    assert chosen.fused is not None
    assert chosen.fused_additional == replace(
        chosen.fused, query=(1, 64), key=(1, 128), splits=chosen.fused_additional.splits
    )
    # A program for each multiprocessor, of 132.
    assert chosen.fused_additional.splits == 16
    # Half of the heads at a time.
    assert found(batch=4).fused_additional.splits == 8
    assert found(num_additional=8192).fused_additional == replace(
        chosen.fused, query=(64,), key=(128,)
    )
    prime = found(query_shape=(15361,), key_shape=(15361,), grid=(15361,), kernel_size=(4000,),
                  stride=(1,), dilation=(1,), is_causal=(False,), query_origin=(0,),
                  key_origin=(0,))  # fmt: skip
    assert prime.fused_additional.splits == 1
    with natten.use_kv_parallelism_in_fused_na(False):
        assert found().fused_additional.splits == 1
    with natten.set_memory_usage_preference("unrestricted"):
        assert found(heads=4, heads_kv=4).fused_additional.splits == 30
    with natten.set_memory_usage_preference("strict"):
        assert found().fused is None
    with natten.use_deterministic_algorithms():
        assert found().fused is None
    # Two kernels still run where not all gradients are asked for, with tilings of theirs.
    assert not chosen.additional.ping_pong
    assert not chosen.query.ping_pong
