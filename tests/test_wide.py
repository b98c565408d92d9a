"""Values wider than a tile, sliced into heads: what the slices compute is what the heads would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from natten.functional import neighborhood_attention_generic
from natten.functional.backend import Inputs, Results
from natten.functional.backends.triton import value_slices
from natten.functional.problem import Problem

WINDOW = {"kernel_size": (3, 5), "dilation": (1, 1)}


def _problem(heads: int, heads_kv: int, features: int) -> Problem:
    ones, zeros, tokens = (1, 1), (0, 0), (5, 6)
    return Problem(
        2, tokens, tokens, heads, heads_kv, 8, features, WINDOW["kernel_size"], ones, ones,
        (False, False), tokens, zeros, zeros, 8**-0.5, 3, heads == heads_kv,
        dtype=torch.float64, device=torch.device("cpu"), requires_grad=True,
    )  # fmt: skip


def _attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, key, value, rpb, context_key, context_value, *_ = inputs
    return neighborhood_attention_generic(
        query, key, value, **WINDOW, rpb=rpb, additional_keys=context_key,
        additional_values=context_value, return_lse=True, backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("features", [257, 320, 384])
@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (2, 2), (6, 2), (3, 1)])
def test_slices(heads: int, heads_kv: int, features: int) -> None:
    problem = _problem(heads, heads_kv, features)
    slices = value_slices.sliced(problem)
    assert slices is not None
    narrow = slices.problem
    assert narrow.head_dim_v % 8 == 0
    assert narrow.head_dim_v * slices.number >= features

    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    tensors = Inputs(
        randn(2, 5, 6, heads, 8), randn(2, 5, 6, heads_kv, 8), randn(2, 5, 6, heads_kv, features),
        randn(heads, 5, 9) if problem.has_rpb else None,
        randn(2, 3, heads_kv, 8), randn(2, 3, heads_kv, features),
    )  # fmt: skip
    out, lse = _attend(tensors)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    leaves = [t for t in tensors if t is not None]
    exact = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))

    with torch.no_grad():
        inputs = slices.inputs(tensors)
    inputs = Inputs._make([None if t is None else t.double().requires_grad_() for t in inputs])
    narrow_out, narrow_lse = _attend(inputs)
    assert narrow_out.shape == narrow.output_shape
    torch.testing.assert_close(slices.join(narrow_out), out)
    torch.testing.assert_close(slices.first(narrow_lse), lse)
    torch.testing.assert_close(slices.repeat(lse, -1), narrow_lse)

    sliced = slices.results(Results(out, lse, grad_out, grad_lse))
    torch.testing.assert_close((sliced.out, sliced.lse), (narrow_out, narrow_lse))
    given = sliced[2:]
    present = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad((narrow_out, narrow_lse), present, given))
    gradients = slices.gradients(
        tuple(None if t is None else next(found) for t in inputs.differentiable)
    )
    got = [gradient for gradient in gradients if gradient is not None]
    for tensor, gradient, expected in zip(leaves, got, exact, strict=True):
        assert gradient.shape == tensor.shape
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_values_of_heads_that_share_nothing_are_not_copied() -> None:
    slices = value_slices.sliced(_problem(2, 2, 384))
    assert slices is not None
    value = torch.randn(2, 5, 6, 2, 384)
    parts = slices.split(value)
    assert parts.data_ptr() == value.data_ptr()
    assert slices.join(parts).data_ptr() == value.data_ptr()


def test_narrow_values_stay() -> None:
    assert value_slices.sliced(_problem(2, 2, 256)) is None
