"""Grids of different sizes in one launch of each kernel, in Triton's interpreter: as the reference,
grid by grid."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from natten.functional import operators
from natten.nn import NeighborhoodAttention2D, NeighborhoodCrossAttention2D
from natten.varlen import GridLayout, PackedWindows, configure_varlen, neighborhood_attention_varlen

pytest.importorskip("triton")
from natten.functional.backends.triton.launcher import Launch

pytestmark = pytest.mark.interpreted

WINDOWS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "windows of their own": (
        [(5, 8), (0, 4), (6, 7)],
        {
            "kernel_size_list": [(2, 3), 1, 3], "stride_list": [(2, 1), 1, (1, 2)],
            "dilation_list": [(2, 1), 1, (1, 2)], "is_causal": (True, False),
        },
    ),
    "clipped": ([(90,), (3,), (3,)], {"kernel_size": 7, "stride": 2, "clip_window": True,
                                      "is_causal": True}),
    "3-D": ([(3, 4, 2), (2, 3, 5)], {"kernel_size": 2}),
    "rings": ([(4, 8), (5, 3)], {"kernel_size": 3, "is_circular": (False, True), "softcap": 2.0}),
}  # fmt: skip
GIVEN = {
    "additional": ([(5, 4), (3, 5), (0, 9)], ("additional_keys", "additional_values")),
    "lengths, a sink": (
        [(18,), (30,)], ("sink", "additional_keys", "additional_values", "additional_lengths"),
    ),
    "a bias, masks": ([(4, 5), (6, 3)], ("rpb", "key_mask", "query_mask")),
}  # fmt: skip


@contextmanager
def launched() -> Iterator[list[str]]:
    """Names of kernels that are launched inside."""
    names: list[str] = []
    run = Launch.run

    def noted(self: Launch, *tensors: Any) -> None:
        names.append(self.kernel.fn.__name__)
        run(self, *tensors)

    with mock.patch.object(Launch, "run", noted):
        yield names


def _tensors(layout: GridLayout, given: tuple[str, ...] = (), heads: int = 1) -> dict[str, Tensor]:
    """Tensors of packed grids, with one head of keys, in layouts of their own."""
    heads_kv, context = 1, 3
    grids, rank = len(layout.sizes), layout.rank
    tensors = {
        "query": torch.randn(1, heads, layout.total, 16).movedim(1, 2),
        "key": torch.randn(1, layout.total, heads_kv, 16),
        "value": torch.randn(1, layout.total, heads_kv + 1, 24)[:, :, 1:],
    }
    makers = {
        "rpb": lambda: torch.randn(heads, *[5] * rank),
        "additional_keys": lambda: torch.randn(grids, context, heads_kv, 16),
        "additional_values": lambda: torch.randn(grids, context, heads_kv, 24),
        "additional_lengths": lambda: torch.arange(grids) * 2,
        "sink": lambda: torch.randn(heads),
        "key_mask": lambda: torch.rand(1, layout.total) > 0.3,
        "query_mask": lambda: torch.rand(1, layout.total) > 0.3,
    }
    return tensors | {name: makers[name]() for name in given}


def _check(layout: GridLayout, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[str]:
    """As the reference in float64, forward and backward; returns what was launched."""
    results = []
    for backend, dtype in (("cutlass-fna", torch.float32), ("reference", torch.float64)):
        leaves = {
            name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
            for name, t in tensors.items()
        }
        wanted = [t for t in leaves.values() if t.is_floating_point()]
        with launched() as names:
            out, lse = neighborhood_attention_varlen(
                **leaves, metadata=layout, backend=backend, return_lse=True, **options
            )
            weights = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(dtype) for t in (out, lse)]
            found = torch.autograd.grad((out, lse), wanted, weights)
        results.append(([out.detach(), lse.detach(), *found], names))
    (found, names), (exact, _) = results
    for number, (got, right) in enumerate(zip(found, exact, strict=True)):
        assert got.isnan().sum() == 0, number
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    return names


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str) -> None:
    sizes, options = WINDOWS[name]
    layout = GridLayout(sizes)
    names = _check(layout, _tensors(layout), options)
    assert names == ["forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"]


@pytest.mark.parametrize("name", GIVEN)
def test_what_else_is_given(name: str) -> None:
    sizes, given = GIVEN[name]
    layout = GridLayout(sizes)
    names = _check(layout, _tensors(layout, given, heads=2), {"kernel_size": 3})
    assert names.count("forward_kernel") == names.count("query_gradient_kernel") == 1
    assert names.count("key_value_gradient_kernel") == 1 + ("additional_keys" in given)


def test_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary positions, registers, and contexts with lengths of their own: as in float64 on
    each grid alone."""
    layout = GridLayout([(5, 4), (3, 6)])
    shared: dict[str, Any] = {"qk_norm": True, "rotary": True}
    modules = torch.nn.ModuleList([
        NeighborhoodAttention2D(32, 2, 3, **shared),
        NeighborhoodCrossAttention2D(32, 2, 3, context_dim=8, **shared),
    ])  # fmt: skip
    given = [torch.randn(1, layout.total, 32), torch.randn(2, 2, 32), torch.randn(2, 5, 8)]
    lengths = torch.tensor([2, 5])

    def gradients(results: list[Tensor], modules: Any, leaves: list[Tensor]) -> list[Tensor]:
        loss = sum(t.sin().sum() for t in results)
        return [*results, *torch.autograd.grad(loss, [*leaves, *modules.parameters()])]

    def configured(self: GridLayout, windows: dict[str, Any]) -> PackedWindows:
        return configure_varlen(self, **windows, backend="cutlass-fna")

    monkeypatch.setattr(GridLayout, "configured", configured)
    x, registers, context = leaves = [t.clone().requires_grad_() for t in given]
    with launched() as names:
        mixed, r = modules[0](x, registers, layout=layout)
        results = [modules[1](mixed, context, lengths, layout=layout), r]
        found = gradients(results, modules, leaves)
    assert names.count("forward_kernel") == names.count("query_gradient_kernel") == 2

    exact = copy.deepcopy(modules).double()
    x, registers, context = leaves = [t.double().requires_grad_() for t in given]
    alone = []
    for i, grid in enumerate(layout.unpack(x)):
        mixed, r = exact[0](grid[None], registers[i : i + 1])
        alone.append((exact[1](mixed, context[i : i + 1], lengths[i : i + 1])[0], r))
    results = [layout.pack([y for y, _ in alone]), torch.cat([r for _, r in alone])]
    for got, right in zip(found, gradients(results, exact, leaves), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)


def test_second_derivatives() -> None:
    """Of the operator for grids of different sizes, as of those of one size."""
    layout = GridLayout([(4, 3), (3, 5)])
    tensors = [t.requires_grad_() for t in _tensors(layout).values()]

    def second(backend: str) -> tuple[Tensor, ...]:
        out = neighborhood_attention_varlen(*tensors, layout, kernel_size=3, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.cos().sum() for g in first), tensors)

    for got, right in zip(second("cutlass-fna"), second("reference"), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    """One operator in the program, and the numbers of the call itself."""
    layout = GridLayout([(4, 3), (3, 5)])
    tensors = list(_tensors(layout).values())
    calls = []
    with operators.observing(calls.append):
        compiled = torch.compile(neighborhood_attention_varlen, fullgraph=True, backend="aot_eager")
        options: dict[str, Any] = {"kernel_size": 3, "backend": "cutlass-fna"}
        out = compiled(*tensors, layout, **options)
    assert [call.problem.grids.number for call in calls][:1] == [2]
    assert torch.equal(out, neighborhood_attention_varlen(*tensors, layout, **options))
