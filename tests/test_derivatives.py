"""Derivatives beyond the gradient, against dense attention that torch differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, random_case
from checks import Inputs, eager, make_inputs, run
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import natten
from natten.functional import decomposition
from natten.functional.neighborhood import packed_attention

# Batched tensors of Functions that torch derives the rule for.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def _functions(case: Case) -> tuple[tuple[Tensor, ...], list[Any]]:
    """A case's tensors in float64, and functions of them that give out and a finite logsumexp: ours
    and dense attention."""
    inputs = make_inputs(case, torch.float64)
    names = list(inputs.tensors())

    def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(case, Inputs(**dict(zip(names, tensors))), "reference")
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    def dense(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = eager(case, Inputs(**dict(zip(names, tensors))))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return tuple(inputs.tensors().values()), [ours, dense]


def _like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def _compare(found: Any, expected: Any) -> None:
    for mine, true in zip(found, expected, strict=True):
        scale = float(true.abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10 * max(scale, 1.0))


def check_derivatives(case: Case) -> None:
    """Tangents of the results, what differentiating the gradients gives, and tangents of those."""
    leaves, functions = _functions(case)
    tangents = _like(leaves, 1)
    found = []
    for function in functions:
        primals = tuple(t.detach() for t in leaves)
        results, results_tangents = torch.func.jvp(function, primals, tangents)
        weights = tuple(t.requires_grad_() for t in _like(results, 2))
        out, lse = function(*leaves)
        gradients = torch.autograd.grad(
            (out, lse), leaves, weights, create_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        slopes = [(g * t).sum() for g, t in zip(gradients, tangents)]
        second = torch.autograd.grad(
            sum(slopes), (*leaves, *weights), allow_unused=True, materialize_grads=True
        )
        found.append((*results_tangents, *second))
    _compare(*found)

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(functions[0], *tensors)
        return pull(tuple(t.detach() for t in weights))

    _, over_reverse = torch.func.jvp(gradient, primals, tangents)
    # Second derivatives are symmetric.
    _compare(over_reverse, found[1][2 : 2 + len(leaves)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case):
    check_derivatives(case)


@pytest.mark.parametrize("seed", range(12))
def test_random(seed):
    check_derivatives(random_case(100 + seed, max_tokens=150))
