"""The reference against loops and eager attention, its memory, and non-finite inputs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case
from checks import check_problem, eager, make_inputs, run

import natten
from natten.functional.backends import reference
from natten.window import Axis, attended


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype):
    if dtype != torch.float64:
        check_problem(case, "reference", dtype)
        return
    # In float64 the reference is its own oracle, so eager attention is.
    inputs = make_inputs(case, dtype)
    results = []
    for function in (run, eager):
        leaves = inputs.to(dtype)
        out, lse = (
            function(case, leaves, "reference") if function is run else function(case, leaves)
        )
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (out * torch.arange(out.numel()).view(out.shape).sin()).sum() + finite.cos().sum()
        names = leaves.tensors()
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, names.values())]
        results.append([out, lse, *zeros])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 300, 1 << 30])
def test_any_tile_gives_the_same(budget, monkeypatch):
    case = Case("tiles", (9, 11), (4, 3), (3, 2), (2, 3), heads=4, heads_kv=2, additional=3)
    inputs = make_inputs(case, torch.float64)
    expected = run(case, inputs, "reference")
    expected += torch.autograd.grad(sum(t.sin().sum() for t in expected), inputs.query)
    monkeypatch.setattr(reference, "_SCORES", budget)
    got = run(case, inputs, "reference")
    got += torch.autograd.grad(sum(t.sin().sum() for t in got), inputs.query)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_loops():
    """Every sum written out."""
    torch.manual_seed(3)
    axes = (Axis(5, 3, 2, 1, True), Axis(6, 2, 1, 3, False))
    query, key = torch.randn(2, 1, 5, 6, 2, 3, dtype=torch.float64)
    value = torch.randn(1, 5, 6, 2, 4, dtype=torch.float64)
    got, got_lse = natten.na2d(
        query,
        key,
        value,
        kernel_size=(3, 2),
        stride=(2, 1),
        dilation=(1, 3),
        is_causal=(True, False),
        scale=0.5,
        return_lse=True,
        backend="reference",
    )
    for x in range(5):
        for y in range(6):
            for h in range(2):
                neighbors = attended((x, y), axes)
                scores = [
                    0.5 * sum(float(query[0, x, y, h, c] * key[0, i, j, h, c]) for c in range(3))
                    for i, j in neighbors
                ]
                total = sum(math.exp(s) for s in scores)
                assert math.isclose(float(got_lse[0, x, y, h]), math.log(total))
                for c in range(4):
                    expected = sum(
                        math.exp(s) / total * float(value[0, i, j, h, c])
                        for s, (i, j) in zip(scores, neighbors)
                    )
                    assert math.isclose(float(got[0, x, y, h, c]), expected, abs_tol=1e-12)


def test_scores_never_exist_at_once(monkeypatch):
    largest = 0
    scores = reference._scores

    def recorded(*arguments):
        nonlocal largest
        result = scores(*arguments)
        largest = max(largest, result[0].numel())
        return result

    monkeypatch.setattr(reference, "_scores", recorded)
    query = torch.randn(1, 96, 96, 1, 4, requires_grad=True)
    natten.na2d(query, query, query, 7, backend="reference").sum().backward()
    assert 0 < largest <= reference._SCORES < 96**4 / 50
    largest = 0
    query = torch.randn(1, 3000, 1, 4, requires_grad=True)
    natten.attention(query, query, query, backend="reference").sum().backward()
    assert 0 < largest <= reference._SCORES


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_non_finite_inputs_reach_who_sees_them(which, bad):
    """As in eager attention over the window of each query: nobody else is touched."""
    case = Case("bad", (9, 8), (3, 3), (1, 2), (2, 1), heads=2, batch=2)
    inputs = make_inputs(case, torch.float64)
    clean = run(case, inputs, "reference")[0].detach()
    with torch.no_grad():
        getattr(inputs, which)[1, 4, 4, 1, 2] = bad
    out = run(case, inputs, "reference")[0]
    grads = torch.autograd.grad(out.sum(), [inputs.query, inputs.key, inputs.value])
    axes = (Axis(9, 3, 1, 2), Axis(8, 3, 2, 1))
    for x in range(9):
        for y in range(8):
            sees = (4, 4) in attended((x, y), axes) if which != "query" else (x, y) == (4, 4)
            touched = not torch.allclose(out[1, x, y, 1], clean[1, x, y, 1])
            if not sees:
                assert not touched, (x, y)
                assert bool(grads[0][1, x, y, 1].isfinite().all())
            elif which == "value" or math.isnan(bad):
                assert touched, (x, y)
    torch.testing.assert_close(out[0], clean[0])
    torch.testing.assert_close(out[1, :, :, 0], clean[1, :, :, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    query = torch.randn(1, 6, 1, 8).to(dtype)
    out, lse = natten.na1d(query, query, query, 3, return_lse=True, backend="reference")
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_on_a_gpu(case):
    check_problem(case, "reference", torch.float32, "cuda")
