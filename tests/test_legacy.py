"""Unfused operations: slots, values and derivatives; call forms of older versions; FLOPs."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import flops
from natten.functional.window_products import eager, operators
from natten.legacy import na3d_qk_with_bias, natten1dav, natten1dqkrpb, natten3dqkrpb
from natten.nn.core import attend_packed
from natten.window import Axis, attended, grid_mask

QK = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}

# tokens, kernel_size, stride, dilation, is_causal
CASES = {
    "1d": ((9,), (3,), (1,), (1,), (False,)),
    "1d-even-dilated": ((11,), (4,), (1,), (2,), (False,)),
    "1d-causal-dilated": ((10,), (3,), (1,), (3,), (True,)),
    "1d-strided": ((10,), (4,), (3,), (1,), (False,)),
    "1d-even": ((6,), (4,), (1,), (1,), (False,)),
    "1d-whole": ((5,), (5,), (1,), (1,), (False,)),
    "2d": ((7, 6), (3, 4), (1, 1), (2, 1), (False, False)),
    "2d-small": ((3, 4), (2, 3), (1, 1), (1, 1), (False, False)),
    "2d-causal": ((5, 6), (3, 2), (1, 2), (1, 2), (True, False)),
    "3d": ((4, 5, 6), (2, 3, 3), (1, 1, 1), (1, 1, 2), (False,) * 3),
    "3d-causal": ((4, 3, 5), (3, 2, 3), (1, 1, 1), (1, 1, 1), (True, False, True)),
}


@pytest.fixture(params=["compiled", "eager"])
def _implementation(request, monkeypatch):
    """On a CPU, loops that numba compiles and plain torch operations."""
    if request.param == "eager":
        monkeypatch.setattr(operators, "_compiled", lambda: None)
    elif operators._compiled() is None:
        pytest.skip("needs numba")


both = pytest.mark.usefixtures("_implementation")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def window(case: str) -> tuple[int, dict, list[Axis]]:
    tokens, kernel, stride, dilation, causal = CASES[case]
    arguments = dict(kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal)
    return len(tokens), arguments, list(map(Axis, tokens, kernel, stride, dilation, causal))


def make(case: str, batch: int = 2, heads: int = 2, dim: int = 3, count: int = 2) -> list[Tensor]:
    return [randn(batch, heads, *CASES[case][0], dim) for _ in range(count)]


def finite(tensor: Tensor) -> Tensor:
    return tensor.masked_fill(tensor.isinf(), 0)


# Slot j of query i is token [i][j], from the definition by hand; "-" is an empty slot.
SLOTS = {
    "bidirectional": (6, dict(kernel_size=3), "012 012 123 234 345 345"),
    "even": (6, dict(kernel_size=4), "0123 0123 0123 1234 2345 2345"),
    "dilated": (7, dict(kernel_size=3, dilation=2), "024 135 024 135 246 135 246"),
    "causal": (5, dict(kernel_size=3, is_causal=True), "0-- 01- 012 123 234"),
    "causal dilated": (
        6,
        dict(kernel_size=2, dilation=3, is_causal=True),
        "0- 1- 2- 03 14 25",
    ),
    "strided": (6, dict(kernel_size=3, stride=3), "012 012 012 345 345 345"),
}


@both
@pytest.mark.parametrize("name", SLOTS)
def test_slots_by_hand(name):
    length, arguments, table = SLOTS[name]
    key = torch.arange(length, dtype=torch.float64).view(1, 1, length, 1)
    scores = natten.na1d_qk(torch.ones_like(key), key, **arguments)[0, 0]
    expected = [
        [-torch.inf if token == "-" else float(token) for token in slots] for slots in table.split()
    ]
    assert scores.tolist() == expected


def test_slots_of_two_axes_are_row_major():
    key = torch.arange(20.0).view(1, 1, 4, 5, 1)
    scores = natten.na2d_qk(torch.ones_like(key), key, (2, 3), (2, 1))
    # Row 1 sees rows 1 and 3; column 4 the last three.
    assert scores[0, 0, 1, 4].tolist() == [7, 8, 9, 17, 18, 19]
    # The first and last corner.
    assert scores[0, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert scores[0, 0, 3, 4].tolist() == [7, 8, 9, 17, 18, 19]


def test_bias_by_hand():
    zero = torch.zeros(1, 1, 5, 1)
    table = torch.tensor([[-2.0, -1, 0, 1, 2]])
    scores = natten.na1d_qk(zero, zero, 3, rpb=table)[0, 0]
    assert scores.tolist() == [[0, 1, 2], [-1, 0, 1], [-1, 0, 1], [-1, 0, 1], [-2, -1, 0]]
    dilated = natten.na1d_qk(torch.zeros(1, 1, 6, 1), torch.zeros(1, 1, 6, 1), 3, 2, rpb=table)
    assert dilated[0, 0, :2].tolist() == [[0, 1, 2], [0, 1, 2]]


@both
@pytest.mark.parametrize("case", CASES)
def test_against_loops(case):
    rank, arguments, axes = window(case)
    query, key = make(case)
    extra = randn(2, 2, 2, 3)
    scores = QK[rank](query, key, additional_keys=extra, **arguments)
    weights = torch.randn_like(scores)
    out = AV[rank](weights, key, additional_values=extra, **arguments)
    kernel = arguments["kernel_size"]
    for place in itertools.product(*(range(axis.length) for axis in axes)):
        tokens = [attended(i, axis) for i, axis in zip(place, axes)]
        at = (slice(None), slice(None), *place)
        grid = weights[at][..., :-2].unflatten(-1, kernel)
        wanted = torch.full_like(grid, -torch.inf if any(arguments["is_causal"]) else torch.nan)
        total = (weights[at][..., -2:, None] * extra).sum(-2)
        for slot in itertools.product(*(range(len(t)) for t in tokens)):
            there = (slice(None), slice(None), *(t[j] for t, j in zip(tokens, slot)))
            wanted[(..., *slot)] = (query[at] * key[there]).sum(-1)
            total = total + grid[(..., *slot)][..., None] * key[there]
        more = (query[at][:, :, None] * extra).sum(-1)
        torch.testing.assert_close(scores[at], torch.cat([wanted.flatten(2), more], -1))
        torch.testing.assert_close(out[at], total)


@pytest.mark.parametrize("case", [c for c in CASES if "causal" not in c])
def test_bias_against_loops(case):
    rank, arguments, axes = window(case)
    query, key = make(case)
    table = randn(2, *(2 * k - 1 for k in arguments["kernel_size"]))
    difference = QK[rank](query, key, rpb=table, **arguments) - QK[rank](query, key, **arguments)
    for place in itertools.product(*(range(axis.length) for axis in axes)):
        tokens = itertools.product(*(attended(i, axis) for i, axis in zip(place, axes)))
        index = [
            tuple((t - i) // a.dilation + a.kernel_size - 1 for t, i, a in zip(token, place, axes))
            for token in tokens
        ]
        wanted = torch.stack([table[(slice(None), *i)] for i in index], dim=-1)
        got = difference[(slice(None), slice(None), *place)]
        torch.testing.assert_close(got, wanted.expand_as(got))


@both
@pytest.mark.parametrize("case", CASES)
def test_equals_fused(case):
    rank, arguments, _ = window(case)
    query, key, value = make(case, count=3)
    extra = [randn(2, 2, 2, 3) for _ in range(2)]
    leaves = [query, key, value, *extra]
    bias = None
    if "causal" not in case:
        bias = randn(2, *(2 * k - 1 for k in arguments["kernel_size"]))
        leaves.append(bias)
    scores = QK[rank](query * 0.7, key, additional_keys=extra[0], rpb=bias, **arguments)
    weights = scores.softmax(-1)
    out = AV[rank](weights, value, additional_values=extra[1], **arguments)
    query_, key_, value_, *extra_ = (t.movedim(1, -2) for t in leaves[:5])
    fused = natten.functional.neighborhood_attention_generic(
        query_,
        key_,
        value_,
        scale=0.7,
        rpb=bias,
        additional_keys=extra_[0],
        additional_values=extra_[1],
        backend="reference",
        **arguments,
    ).movedim(-2, 1)
    torch.testing.assert_close(out, fused)
    grad = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(fused, leaves, grad)
    ):
        torch.testing.assert_close(got, wanted)


@both
@pytest.mark.parametrize("case", ["1d-even", "1d-causal-dilated", "1d-strided", "2d-small"])
def test_derivatives(case):
    rank, arguments, _ = window(case)
    query, key = make(case, batch=1, heads=2, dim=2)
    bias = randn(2, *(2 * k - 1 for k in arguments["kernel_size"]))
    has_bias = "causal" not in case

    def scores(query, key, bias):
        return finite(QK[rank](query, key, rpb=bias if has_bias else None, **arguments))

    inputs = (query, key, bias) if has_bias else (query, key, bias.detach())
    assert gradcheck(scores, inputs, nondet_tol=0.0)
    weights = torch.randn_like(scores(*inputs)).requires_grad_()

    def values(weights, value):
        return AV[rank](weights, value, **arguments)

    assert gradcheck(values, (weights, key), nondet_tol=0.0)
    if rank == 1:
        assert gradgradcheck(scores, inputs)
        assert gradgradcheck(values, (weights, key))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype):
    query, key, value = (randn(1, 2, 9, 8, 16, dtype=dtype) for _ in range(3))
    scores = natten.na2d_qk(query, key, 5)
    out = natten.na2d_av(scores, value, 5)
    assert scores.dtype == out.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps
    exact = natten.na2d_qk(query.double(), key.double(), 5)
    assert (scores - exact).abs().max() <= bound * exact.abs().max()
    exact = natten.na2d_av(scores.double(), value.double(), 5)
    assert (out - exact).abs().max() <= bound * exact.abs().max()
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    (wanted,) = torch.autograd.grad(exact, value, torch.ones_like(exact))
    assert (grad - wanted).abs().max() <= bound * wanted.abs().max()


@both
def test_layouts_and_empty_batches():
    whole = randn(2, 7, 6, 3, 2, 4)
    query, key = (t.permute(0, 4, 1, 2, 3) for t in (whole[..., 0, :], whole[..., 1, :]))
    strided = natten.na2d_qk(query, key, 3)
    torch.testing.assert_close(strided, natten.na2d_qk(query.contiguous(), key.contiguous(), 3))
    empty = randn(0, 2, 7, 6, 4)
    assert natten.na2d_qk(empty, empty, 3).shape == (0, 2, 7, 6, 9)
    assert natten.na2d_av(randn(0, 2, 7, 6, 9), empty, 3).shape == (0, 2, 7, 6, 4)


@both
def test_weights_that_are_no_attention():
    """Negative weights that sum to nothing, for a batch of values; what causal windows leave empty
    is not read."""
    weights, values = randn(1, 2, 9, 3), randn(4, 2, 9, 5)
    out = natten.na1d_av(weights, values, 3)
    assert out.shape == (4, 2, 9, 5)
    torch.testing.assert_close(out[2:3], natten.na1d_av(weights, values[2:3], 3))
    (grad,) = torch.autograd.grad(out.sum(), weights)
    expected = natten.na1d_qk(torch.ones_like(values), values, 3).sum(0, keepdim=True)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(
        natten.na1d_av(weights.expand(4, -1, -1, -1)[:2], values[:1], 3)[1:],
        natten.na1d_av(weights, values[:1], 3),
    )
    spoiled = weights.detach().clone()
    spoiled[:, :, 0, 1:] = torch.nan
    spoiled[:, :, 1, 2] = torch.inf
    assert natten.na1d_av(spoiled, values, 3, is_causal=True).isfinite().all()


def test_function_transforms():
    """grad, vmap and jvp of torch.func, nested as in a Hessian, and forward-mode duals."""
    query, key, bias = torch.randn(2, 2, 7, 2), torch.randn(2, 2, 7, 2), torch.randn(2, 5)

    def loss(query, bias=bias):
        scores = natten.na1d_qk(query, key, 3, 2, rpb=bias)
        return natten.na1d_av(scores.softmax(-1), query, 3, 2).square().sum()

    leaves = query.clone().requires_grad_(), bias.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, wanted in zip(torch.func.grad(loss, (0, 1))(query, bias), expected):
        torch.testing.assert_close(got, wanted)
    tangents = torch.randn_like(query), torch.randn_like(bias)
    _, slope = torch.func.jvp(loss, (query, bias), tangents)
    wanted = sum((g * t).sum() for g, t in zip(expected, tangents))
    torch.testing.assert_close(slope, wanted)
    with forward_ad.dual_level():
        dual = loss(*map(forward_ad.make_dual, (query, bias), tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, wanted)
    torch.testing.assert_close(
        torch.func.hessian(loss)(query), torch.autograd.functional.hessian(loss, query)
    )
    several = torch.randn(3, *query.shape)
    each = torch.stack([torch.func.grad(loss)(one) for one in several])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(several), each)
    tables = torch.randn(2, 3, 5).movedim(1, 2)
    each = torch.stack([loss(query, table) for table in tables.unbind(2)])
    torch.testing.assert_close(torch.vmap(loss, (None, 2))(query, tables), each)


def test_causal_gradients_do_not_see_empty_slots():
    query, key = randn(1, 1, 5, 2), randn(1, 1, 5, 2)
    scores = natten.na1d_qk(query, key, 3, is_causal=True)
    grad = torch.full_like(scores, torch.nan)
    grad[scores.isfinite()] = 1
    for gradient in torch.autograd.grad(scores, (query, key), grad):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks(dynamic):
    def attend(query, key, value, bias):
        scores = natten.na1d_qk(query, key, 3, 2, rpb=bias)
        return natten.na1d_av(scores.softmax(-1), value, 3, 2)

    inputs = [randn(2, 2, 12, 4), randn(2, 2, 12, 4), randn(2, 2, 12, 4), randn(2, 5)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, wanted = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dot", "sum", "scatter", "bias", "bias_sum"])
def test_operators(name):
    window = ([3], [1], [2], [0])
    a, b, weights = randn(1, 2, 8, 3), randn(1, 2, 8, 3), randn(1, 2, 8, 3)
    arguments = {
        "dot": (a, b, *window, 0.0),
        "sum": (weights, b, *window),
        "scatter": (weights, a, *window),
        "bias": (randn(2, 5), [8], *window),
        "bias_sum": (randn(2, 8, 3), *window),
    }[name]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = getattr(torch.ops.natten, f"window_{name}").default
    opcheck(operator, arguments, test_utils=tests)


@both
def test_same_bits_on_every_run():
    query, key = (
        randn(2, 2, 9, 8, 4, dtype=torch.float32),
        randn(2, 2, 9, 8, 4, dtype=torch.float32),
    )
    bias = randn(2, 9, 9, dtype=torch.float32)
    runs = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(3):
        out = natten.na2d_av(natten.na2d_qk(query, key, 5, rpb=bias).softmax(-1), key, 5)
        runs.append([out, *torch.autograd.grad(out.sum(), (query, key, bias))])
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], other))


def test_memory_is_linear(monkeypatch):
    """65536 queries: dense scores would take 16 GiB."""
    monkeypatch.setattr(operators, "_compiled", lambda: None)
    query = randn(1, 1, 256, 256, 1, dtype=torch.float32)
    scores = natten.na2d_qk(query, query, 3)
    out = natten.na2d_av(scores.softmax(-1), query, 3)
    out.sum().backward()
    assert query.grad.isfinite().all()


def test_autocast():
    query, key, value = (randn(1, 2, 9, 4, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        scores = natten.na1d_qk(query, key, 3)
        # softmax gives float32 under autocast.
        weights = torch.nn.functional.softmax(scores, -1)
        out = natten.na1d_av(weights, value, 3)
    assert scores.dtype == out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad.dtype == torch.float32


X = torch.randn(1, 2, 8, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: natten.na2d_qk(X, X, 3), "query must have 5 dimensions"),
        (lambda: natten.na1d_qk(X, X[:, :, :5], 3), "key must have shape"),
        (lambda: natten.na1d_qk(X, X.double(), 3), "key must be torch.float32"),
        (lambda: natten.na1d_qk(X, X, 9), "kernel_size \\* dilation must be at most"),
        (lambda: natten.na1d_qk(X, X, 3, additional_keys=X[:, :1]), "additional_keys must have"),
        (lambda: natten.na1d_qk(X, X, 3, rpb=torch.zeros(2, 7)), "rpb must have shape"),
        (
            lambda: natten.na1d_qk(X, X, 3, is_causal=True, rpb=torch.zeros(2, 5)),
            "bidirectional axes only",
        ),
        (lambda: natten.na1d_av(X, X, 3), r"attn must have shape \[any, 2, 8, 3\]"),
        (
            lambda: natten.na1d_av(torch.zeros(2, 2, 8, 3), X.expand(3, -1, -1, -1), 3),
            "one batch size",
        ),
        (lambda: natten1dqkrpb(X, X, None, dilation=1), "needs kernel_size"),
        (lambda: natten1dqkrpb(X, X, None, 3, 1, 5, 6), "takes kernel_size and dilation"),
        (lambda: natten1dqkrpb(X, X, None, 3, 1, size=3), "takes kernel_size and dilation"),
        (lambda: natten1dqkrpb(X, X, torch.zeros(2, 5), "two"), "dilation must be an int"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


NO_TENSORS = {
    "none": None,
    "array": np.zeros((1, 2, 6, 7, 8), np.float32),
    "list": [1.0],
    "str": "x",
}
# name: function of one bad argument
OLD_CALLS = {
    "query": lambda bad, good: natten.natten2dqkrpb(bad, good, torch.ones(2, 5, 5), 3, 1),
    "key": lambda bad, good: natten.na2d_qk_with_bias(good, bad, torch.ones(2, 5, 5), 3, 1),
    "rpb": lambda bad, good: natten.natten2dqkrpb(good, good, bad, 3, 1),
    "attn": lambda bad, good: natten.natten2dav(bad, good, 3, 1),
    "value": lambda bad, good: natten.natten2dav(torch.ones(1, 2, 6, 7, 9), bad, 3, 1),
    "input_tensor": lambda bad, good: natten.legacy.make_attn_tensor_from_input(bad, 3),
}


# None stands for no bias.
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in OLD_CALLS for k in NO_TENSORS if (n, k) != ("rpb", "none")]
)
def test_what_is_no_tensor_is_named(name, kind):
    with pytest.raises(ValueError, match=rf"^{name} must be a torch\.Tensor, got "):
        OLD_CALLS[name](NO_TENSORS[kind], torch.randn(1, 2, 6, 7, 8))


def test_qkrpb_call_forms():
    bias = randn(2, 5)
    query, key = randn(1, 2, 9, 4), randn(1, 2, 9, 4)
    expected = natten.na1d_qk(query, key, 3, 2, rpb=bias)
    for got in (
        natten1dqkrpb(query, key, bias, 3, 2),
        natten1dqkrpb(query, key, bias, 2),
        natten1dqkrpb(query, key, bias, "2"),
        natten1dqkrpb(query, key, bias, kernel_size=3, dilation=2),
        natten1dqkrpb(query, key, bias, dilation=2),
        natten1dqkrpb(query, key, bias, 3, dilation=2),
        natten.na1d_qk_with_bias(query, key, bias, 3, 2),
    ):
        assert got.equal(expected)
    plain = natten.na1d_qk(query, key, 3, 2)
    assert natten.natten1dqk(query, key, 3, 2).equal(plain)
    assert natten1dqkrpb(query, key, None, 3, 2).equal(plain)
    more = natten.na1d_qk_with_bias(query, key, bias, 3, 2, query[:, :, :2])
    assert more.equal(natten.na1d_qk(query, key, 3, 2, query[:, :, :2], rpb=bias))


def test_av_call_forms():
    weights, value = randn(1, 2, 9, 3), randn(1, 2, 9, 4)
    expected = natten.na1d_av(weights, value, 3, 2)
    for got in (
        natten1dav(weights, value, 3, 2),
        natten1dav(weights, value, 2),
        natten1dav(weights, value, "2"),
        natten1dav(weights, value, kernel_size=3, dilation=2),
    ):
        assert got.equal(expected)
    weights = randn(1, 2, 9, 5)
    assert natten1dav(weights, value, 2, additional_values=value[:, :, :2]).equal(
        natten.na1d_av(weights, value, 3, 2, value[:, :, :2])
    )


def test_three_dimensional_call_forms():
    query, bias = randn(1, 2, 4, 6, 6, 3), randn(2, 3, 5, 5)
    expected = natten.na3d_qk(query, query, (2, 3, 3), (1, 2, 2), rpb=bias)
    for got in (
        na3d_qk_with_bias(query, query, bias, 2, 3, 1, 2),
        natten3dqkrpb(query, query, bias, kernel_size_d=2, kernel_size=3, dilation_d=1, dilation=2),
        natten3dqkrpb(query, query, bias, (2, 3, 3), (1, 2, 2)),
    ):
        assert got.equal(expected)
    assert natten.natten3dqk(query, query, 2, 3, 1, 2).shape == expected.shape
    out = natten.natten3dav(expected, query, 2, 3, 1, 2)
    assert out.equal(natten.na3d_av(expected, query, (2, 3, 3), (1, 2, 2)))


@pytest.mark.parametrize("heads", [2, 6, 1])
def test_swapped_layout(heads):
    """[batch, width, height, heads, head_dim], as transformers has it from 5.6 on: also with as
    many heads as columns."""
    tokens = randn(2, 5, 6, heads, 4)
    first, swapped = tokens.permute(0, 3, 1, 2, 4), tokens.transpose(1, 2)
    bias = randn(heads, 5, 5)
    expected = natten.na2d_qk(first, first, 3, 1, rpb=bias)
    assert natten.natten2dqkrpb(first, first, bias, 3, 1).equal(expected)
    assert natten.natten2dqkrpb(first.contiguous(), first, bias, 3, 1).equal(expected)
    assert natten.natten2dqkrpb(swapped * 1.0, swapped, bias, 3, 1).equal(expected)
    expected_out = natten.na2d_av(expected, first, 3, 1)
    assert natten.natten2dav(expected, swapped, 3, 1).equal(expected_out)
    assert natten.natten2dav(expected, first, 3, 1).equal(expected_out)
    assert natten.natten2dav(expected, first.contiguous(), 3, 1).equal(expected_out)


def test_programs_may_ask_for_what_is_not_there():
    for name in ("libnatten", "nonsense"):
        assert not hasattr(natten, name)


def test_names_are_where_programs_import_them():
    from natten.context import is_fna_enabled, use_autotuner, use_fused_na
    from natten.experimental import na1d
    from natten.functional import na1d_av, na2d_qk_with_bias, natten2dav, use_gemm_na
    from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed, NoneType
    from natten.utils import check_all_args, log
    from natten.utils.checks import check_all_args as same

    assert same is check_all_args
    assert check_all_args(2, 3, None, True) == ((3, 3), (1, 1), (True, True))
    assert check_all_args(2, (3, 5), 1, 2, None) == ((3, 5), (1, 1), (2, 2), (False, False))
    with pytest.raises(ValueError, match="takes na_dim"):
        check_all_args(2, 3)
    assert log.get_logger("natten.x").name == "natten.x"
    assert None not in (na1d_av, na2d_qk_with_bias, natten2dav, Dimension2DTypeOrDed, NoneType)
    assert CausalArg2DTypeOrDed is not None
    assert is_fna_enabled()
    use_fused_na(False)
    assert not natten.is_fused_na_enabled()
    natten.enable_fused_na()
    assert is_fna_enabled()
    assert use_gemm_na(True) is None
    assert use_autotuner(False, False, warmup_steps_forward=5) is None
    assert natten.has_fused_na()
    assert natten.has_half("cuda:0")
    assert natten.has_bfloat()
    assert not natten.has_tf32_gemm()
    assert natten.has_cuda() == torch.cuda.is_available()
    query = randn(1, 12, 2, 4)
    expected = natten.na1d(query, query, query, 3, dilation=2, is_causal=True, scale=2.0)
    assert na1d(query, query, query, 3, 2, True, None, 2.0).equal(expected)
    for name in natten.legacy.__all__:
        assert getattr(natten, name) is getattr(natten.legacy, name)
    for module in (natten, natten.functional, natten.context, natten.utils):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_attn_tensor():
    assert natten.utils.make_attn_tensor_from_input(X, 3, 2).shape == (1, 2, 8, 5)
    video = torch.zeros(1, 2, 4, 5, 6, 8)
    assert natten.utils.make_attn_tensor_from_input(video, (1, 2, 3)).shape[-1] == 6


def describe(module) -> tuple:
    return (
        module.embed_dim,
        module.num_heads,
        module.kernel_size,
        module.stride,
        module.dilation,
        module.is_causal,
        module.rpb is not None,
        module.pad,
    )


PLAIN = dict(stride=1, dilation=1, is_causal=False, rpb=False, pad=False)


@pytest.mark.parametrize(
    ("arguments", "named", "expected"),
    [
        # 0.17
        ((), dict(dim=64, num_heads=2, kernel_size=7, dilation=None), dict(PLAIN)),
        (
            (),
            dict(dim=64, num_heads=2, kernel_size=7, rel_pos_bias=True, attn_drop=0.1),
            PLAIN | dict(rpb=True),
        ),
        ((64, 2, 7), dict(use_experimental_ops=False, dilation=2), PLAIN | dict(dilation=2)),
        ((64, 2, 7, 2, (True, False)), {}, PLAIN | dict(dilation=2, is_causal=(True, False))),
        ((64, 2, 7, 2, False), {}, PLAIN | dict(dilation=2)),
        # 0.14.5 to 0.15
        (
            (),
            dict(dim=64, num_heads=2, kernel_size=7, dilation=2, bias=True, qkv_bias=True),
            PLAIN | dict(dilation=2, rpb=True, pad=True),
        ),
        ((64, 2, 7, 2), dict(bias=False), PLAIN | dict(dilation=2, pad=True)),
        # up to 0.14.4
        ((64, 7, 2), dict(bias=True), PLAIN | dict(rpb=True, pad=True)),
        ((64,), dict(kernel_size=7, num_heads=2, attn_drop=0.0), dict(PLAIN)),
        # now
        ((64, 2, 7, 2), {}, PLAIN | dict(stride=2)),
        ((64, 2, 7, 2, 1, True), {}, PLAIN | dict(stride=2, is_causal=True)),
    ],
)
def test_module_arguments(arguments, named, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = natten.NeighborhoodAttention2D(*arguments, **named)
    both = {k: v if isinstance(v, tuple) else (v, v) for k, v in expected.items()}
    flags = expected["rpb"], expected["pad"]
    assert describe(module) == (
        64, 2, (7, 7), both["stride"], both["dilation"], both["is_causal"], *flags,
    )  # fmt: skip


def test_module_order_is_warned_of():
    with pytest.warns(UserWarning, match="kernel_size=7 comes before num_heads=2") as record:
        module = natten.NeighborhoodAttention2D(64, 7, 2)
    assert module.num_heads == 2
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="comes before"):
        assert natten.NeighborhoodAttention2D(64, (3, 5), 2).kernel_size == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "named", "text"),
    [
        ((15, 3, 5), dict(bias=True), "may be num_heads and kernel_size, or the reverse"),
        ((64, 2, 7, 2, True), {}, "versions up to 0.17 differ"),
        ((64, 2, 7, 2, False, True), {}, "versions up to 0.17 differ"),
        ((64, 2, 7, 2), dict(bias=True, dilation=2), "dilation is given by position and by name"),
        ((), dict(dim=64, embed_dim=64, num_heads=2, kernel_size=7), "give one of them"),
        ((64, 2, 7), dict(bias=True, rel_pos_bias=True), "give one of them"),
        ((64, 2, 7, 9), {}, "if dilation is meant"),
        ((64, 5, 6), {}, "embed_dim must be a multiple of num_heads"),
        # No version had windows of 4 before the heads.
        ((33, 4, 3), {}, "embed_dim must be a multiple of num_heads"),
        ((64, "a", 2), {}, "num_heads must be a positive int, got 'a'"),
    ],
)
def test_module_errors(arguments, named, text):
    with pytest.raises(ValueError, match=text):
        natten.NeighborhoodAttention2D(*arguments, **named)


def test_module_pads_as_it_did():
    module = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=7, bias=True)
    assert module(torch.randn(1, 4, 9, 8)).shape == (1, 4, 9, 8)
    module = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=7, rel_pos_bias=True)
    with pytest.raises(ValueError, match="fewer than kernel_size"):
        module(torch.randn(1, 4, 9, 8))


def test_fused_positions():
    query = torch.randn(1, 12, 2, 4)
    with pytest.raises(ValueError, match="if dilation is meant"):
        natten.na1d(query, query, query, 3, 4)
    with pytest.warns(UserWarning, match="dilation got True"):
        natten.na1d(query, query, query, 3, 2, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        natten.na1d(query, query, query, 3, 2, 2, True, 0.5)


@pytest.mark.parametrize("case", CASES)
def test_flops_of_fused(case):
    _, arguments, axes = window(case)
    batch, heads, dim, dim_v, extra = 2, 4, 8, 6, 3
    tokens = CASES[case][0]
    query = randn(batch, *tokens, heads, dim)
    key, value = randn(batch, *tokens, 2, dim), randn(batch, *tokens, 2, dim_v)
    more = randn(batch, extra, 2, dim), randn(batch, extra, 2, dim_v)
    with FlopCounterMode(display=False) as counter:
        out = natten.functional.neighborhood_attention_generic(
            query,
            key,
            value,
            additional_keys=more[0],
            additional_values=more[1],
            backend="reference",
            **arguments,
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    rows = query.shape[1:-2].numel()
    pairs = batch * heads * (int(grid_mask(axes).sum()) + rows * extra)
    assert forward == 2 * pairs * (dim + dim_v)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * dim + 2 * dim_v)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_flops_of_a_packed_projection(needs):
    module = natten.NeighborhoodAttention2D(12, 6, 3, num_kv_heads=2, rel_pos_bias=True)
    module.rpb.requires_grad_(needs[1])
    x = randn(2, 5, 4, 12).float()
    counts = []
    for is_packed in (True, False):
        qkv = module._heads(x).detach().requires_grad_(needs[0])
        with FlopCounterMode(display=False) as counter:
            if is_packed:
                no = [False, False]
                out = attend_packed(qkv, 2, [3, 3], [1, 2], [1, 1], no, no, 1.0, module.rpb)
            else:
                query, key, value = qkv.split([6, 2, 2], -2)
                out = natten.na2d(query, key, value, 3, (1, 2), rpb=module.rpb, scale=1.0)
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


def test_flops_of_attention():
    query, key = randn(1, 7, 2, 4), randn(1, 9, 2, 4)
    with FlopCounterMode(display=False) as counter:
        natten.attention(query, key, key)
    assert counter.get_total_flops() == 2 * 2 * 7 * 9 * 8
    lengths_q, lengths_kv = (torch.tensor(n, dtype=torch.int32) for n in ([3, 4], [5, 4]))
    with FlopCounterMode(display=False) as counter:
        natten.attention(
            query, key, key, is_causal=True, seqlens_Q=lengths_q, seqlens_KV=lengths_kv
        )
    # Queries 0, 1, ... of each sequence see 1, 2, ... keys.
    assert counter.get_total_flops() == 2 * 2 * (6 + 10) * 8


@pytest.mark.parametrize("case", CASES)
def test_flops_of_unfused(case):
    rank, arguments, axes = window(case)
    query, key = make(case)
    pairs = 4 * int(grid_mask(axes).sum())
    with FlopCounterMode(display=False) as counter:
        scores = QK[rank](query, key, **arguments)
        assert counter.get_total_flops() == 2 * pairs * 3
        finite(scores).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * pairs * 3


def test_flops_of_large_grids_are_cheap():
    axes = (Axis(10**6, 101, 1, 3, True), Axis(4096, 63))
    assert flops.count_pairs(axes) == flops.count_pairs(axes[:1]) * 4096 * 63
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        natten.na2d(*(torch.empty(1, 4000, 5000, 2, 64) for _ in range(3)), kernel_size=7)
    assert counter.get_total_flops() == 4000 * 5000 * 49 * 2 * 2 * 128


def test_counter_is_not_imported_for_nothing():
    program = """
import sys, torch, natten
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.zeros(1, 8, 1, 4)
with FlopCounterMode(display=False) as counter:
    natten.na1d(q, q, q, 3)
assert counter.get_total_flops() == 2 * 8 * 3 * 8
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.filterwarnings("ignore")
def test_fvcore():
    pytest.importorskip("fvcore")
    module = natten.NeighborhoodAttention2D(24, 3, 5, dilation=2, is_causal=(True, False)).eval()
    axes = (Axis(12, 5, 1, 2, True), Axis(11, 5, 1, 2))
    products = 4 * 132 * 24 * 24 + 3 * flops.count_pairs(axes) * 16
    assert flops.get_flops(module, torch.zeros(1, 12, 11, 24)) == products

    class Unfused(torch.nn.Module):
        def forward(self, x):
            scores = natten.na1d_qk(x, x, 3, additional_keys=x[:, :, :2])
            return natten.na1d_av(scores, x, 3, additional_values=x[:, :, :2])

    window = 2 * 2 * 9 * 3 * 4
    assert flops.get_flops(Unfused(), torch.zeros(1, 2, 9, 4), True) == window + 2 * 2 * 9 * 2 * 4


def test_fvcore_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(RuntimeError, match="pip install fvcore"):
        flops.get_flops(torch.nn.Identity(), X)


# Triton's kernels against torch's, by name: arguments for axes, two tensors and weights.
PRODUCTS: dict[str, Callable[..., tuple]] = {
    "dot": lambda axes, a, b, weights: (a, b, axes, -1.0),
    "weighted_sum": lambda axes, a, b, weights: (weights, b, axes),
    "scatter": lambda axes, a, b, weights: (weights, a, axes),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    ("axes", "dim"),
    [
        ((Axis(9, 3, 1, 2, True),), 5),
        ((Axis(7, 3, 2, 2), Axis(6, 4, 1, 1)), 4),
        ((Axis(4, 2), Axis(5, 3, 1, 1, True), Axis(6, 3, 1, 2)), 3),
    ],
    ids=["1d", "2d", "3d"],
)
def test_kernels_in_the_interpreter(axes, dim, name):
    pytest.importorskip("triton")
    from natten.functional.window_products import triton as kernels

    tokens = math.prod(axis.length for axis in axes)
    slots = math.prod(axis.kernel_size for axis in axes)
    # What is dense in another order is not what a result of the same strides would be.
    a, b = torch.randn(2, dim, 3, tokens, dtype=torch.float64).movedim(1, -1)
    weights = torch.randn(slots, 3, tokens, dtype=torch.float64).movedim(0, -1)
    arguments = PRODUCTS[name](axes, a, b, weights)
    torch.testing.assert_close(getattr(kernels, name)(*arguments), getattr(eager, name)(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_gpu(case, dtype, implementation, monkeypatch):
    if implementation == "eager":
        monkeypatch.setattr(operators, "_kernels", lambda: None)
    rank, arguments, _ = window(case)
    query, key, value = (t.detach().to(dtype) for t in make(case, count=3, dim=16))
    has_bias = "causal" not in case
    bias = torch.randn(2, *(2 * k - 1 for k in arguments["kernel_size"])).to(dtype)
    results = []
    for device, precision in (("cpu", torch.float64), ("cuda", dtype), ("cuda", dtype)):
        leaves = [t.to(device, precision).requires_grad_() for t in (query, key, value, bias)]
        q, k, v, b = leaves
        weights = QK[rank](q * 0.25, k, rpb=b if has_bias else None, **arguments).softmax(-1)
        out = AV[rank](weights, v, **arguments)
        gradients = torch.autograd.grad(out.square().sum(), leaves[: 3 + has_bias])
        results.append([out, *gradients])
    bound = 40 * torch.finfo(dtype).eps
    for wanted, got, again in zip(*results, strict=True):
        assert (got.double().cpu() - wanted).abs().max() <= bound * wanted.abs().max()
        assert got.equal(again)


def test_eager_products_are_chunked(monkeypatch):
    """The same in small pieces."""
    monkeypatch.setattr(operators, "_compiled", lambda: None)
    query, key = make("2d")
    arguments = window("2d")[1]

    def run():
        scores = natten.na2d_qk(query, key, **arguments)
        return [scores, *torch.autograd.grad(scores.sum(), (query, key))]

    whole = run()
    monkeypatch.setattr(eager, "CHUNK", {"cpu": 1})
    for a, b in zip(whole, run()):
        torch.testing.assert_close(a, b)
