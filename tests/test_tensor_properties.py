"""Tensors that are more than their bytes: negative views, zeros without memory, subclasses ...

Whatever a tensor is, a call gives what it gives for a plain tensor of the same numbers.
"""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import natten
from natten import _internals
from natten.functional.neighborhood import packed_attention

SHAPE = (2, 6, 7, 2, 8)
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def negative(*shape: int, device: str = "cpu") -> Tensor:
    """A view whose numbers are those in memory, negated."""
    tensor = torch.randn(*shape, dtype=torch.complex64, device=device).conj().imag
    assert tensor.is_neg()
    return tensor


def zero(*shape: int, device: str = "cpu") -> Tensor:
    """Zeros that have no memory."""
    tensor = torch._efficientzerotensor(shape, device=device)
    assert tensor._is_zerotensor()
    return tensor


def plain(tensor: Tensor) -> Tensor:
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, device=tensor.device)
    return tensor.resolve_neg().clone()


KINDS = {"negative": negative, "zero": zero}


def fused(query, key, value, rpb, additional_keys, additional_values):
    return natten.na2d(
        query, key, value, 3, rpb=rpb, additional_keys=additional_keys,
        additional_values=additional_values, return_lse=True,
    )  # fmt: skip


def inputs(device: str) -> list[Tensor]:
    shapes = (SHAPE, SHAPE, SHAPE, (2, 5, 5), (2, 4, 2, 8), (2, 4, 2, 8))
    return [torch.randn(*shape, device=device) for shape in shapes]


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", range(6))
def test_inputs(kind, position, device):
    given = inputs(device)
    given[position] = KINDS[kind](*given[position].shape, device=device)
    expected = fused(*map(plain, given))
    for got, wanted in zip(fused(*given), expected):
        torch.testing.assert_close(got, wanted)
    leaves = [t.clone().requires_grad_() if t is not given[position] else t for t in given]
    others = [t for i, t in enumerate(leaves) if i != position]
    copies = [plain(t).requires_grad_() for t in given]
    references = [t for i, t in enumerate(copies) if i != position]
    sums = [sum(t.sin().sum() for t in fused(*tensors)) for tensors in (leaves, copies)]
    grads = torch.autograd.grad(sums[0], others), torch.autograd.grad(sums[1], references)
    torch.testing.assert_close(*grads)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("window", [3, (6, 7)])
def test_gradients_of_out_and_lse(kind, which, window, device):
    query, key, value = (t.requires_grad_() for t in inputs(device)[:3])
    result = natten.na2d(query, key, value, window, return_lse=True)[which]
    gradient = KINDS[kind](*result.shape, device=device)
    got = torch.autograd.grad(result, (query, key, value), gradient, retain_graph=True)
    expected = torch.autograd.grad(result, (query, key, value), plain(gradient))
    torch.testing.assert_close(got, expected)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, device):
    def attend(qkv):
        return packed_attention(qkv, 1, (3, 3), (1, 1), (1, 1), (False, False))

    qkv = KINDS[kind](1, 6, 7, 4, 8, device=device)
    torch.testing.assert_close(attend(qkv), attend(plain(qkv)))
    leaf = torch.randn(1, 6, 7, 4, 8, device=device, requires_grad=True)
    for result in attend(leaf):
        gradient = KINDS[kind](*result.shape, device=device)
        (got,) = torch.autograd.grad(result, leaf, gradient, retain_graph=True)
        (expected,) = torch.autograd.grad(result, leaf, plain(gradient), retain_graph=True)
        torch.testing.assert_close(got, expected)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_products(kind, device):
    first, second = KINDS[kind](2, 9, 2, 8, device=device), torch.randn(2, 9, 2, 8, device=device)
    for backend in ("reference", "flex-fmha", None):
        got = natten.attention(first, second, first, is_causal=backend is None, backend=backend)
        copy = plain(first)
        expected = natten.attention(copy, second, copy, is_causal=backend is None, backend=backend)
        torch.testing.assert_close(got, expected)
    grid = KINDS[kind](2, 2, 6, 7, 8, device=device)
    other = torch.randn(2, 2, 6, 7, 8, device=device, requires_grad=True)
    copy = plain(grid)
    pairs = []
    for tensor in (grid, copy):
        scores = natten.functional.na2d_qk(other, tensor, 3)
        out = natten.functional.na2d_av(scores.softmax(-1), tensor, 3)
        (gradient,) = torch.autograd.grad(out, other, tensor)
        pairs.append((scores, out, gradient))
    torch.testing.assert_close(*pairs)


CALLS = {
    "output": "na2d(q, k, v, 3).sgn().sum()",
    "logsumexp": "na2d(q, k, v, 3, return_lse=True)[1].sgn().sum()",
    "module": "natten.NeighborhoodAttention2D(16, 2, 3)(q.flatten(-2)).sgn().sum()",
    "full window": "na2d(q, k, v, (6, 7)).sgn().sum()",
    "grouped heads": "natten.attention(q[:, 0], k[:, 0, :, :1], v[:, 0, :, :1]).sgn().sum()",
    "causal": "natten.attention(q[:, 0], k[:, 1], v[:, 1], is_causal=True).sgn().sum()",
    "unfused": "na2d_av(na2d_qk(q, k, (3, 3)), v, 3).sgn().sum()",
}


def test_gradients_without_memory_do_not_kill_the_process():
    """torch's gradient of sgn is such a tensor."""
    lines = [
        "import torch, natten; from natten.functional import na2d, na2d_av, na2d_qk",
        "new = lambda: torch.randn(1, 6, 7, 2, 8, requires_grad=True)",
    ]
    for call in CALLS.values():
        shape = "(1, 2, 6, 7, 8)" if "na2d_av" in call else "(1, 6, 7, 2, 8)"
        lines += [
            f"q, k, v = (torch.randn{shape}.requires_grad_() for _ in range(3))",
            f"{call}.backward()",
            "assert all(t.grad is None or (t.grad == 0).all() for t in (q, k, v))",
        ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


class Watching(Tensor):
    """A subclass that sees the operators called on it, by __torch_function__ alone."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_see_the_operator():
    Watching.seen.clear()
    query = torch.randn(SHAPE)
    expected = natten.na2d(query, query, query, 3)
    got = natten.na2d(query.as_subclass(Watching), query, query, 3)
    assert isinstance(got, Watching)
    assert any("neighborhood_attention" in name for name in Watching.seen)
    assert got.as_subclass(Tensor).equal(expected)


def test_what_is_plain():
    tensor = torch.randn(2, 3)
    with torch.inference_mode():
        inference = torch.randn(2, 3)
    assert _internals.is_plain((tensor, torch.nn.Parameter(tensor), inference, None))
    for special in (
        negative(2, 3),
        zero(2, 3),
        torch._to_functional_tensor(tensor),
        tensor.to("meta"),
        tensor.as_subclass(Watching),
        tensor.to_sparse(),
        torch.nested.nested_tensor([tensor]),
    ):
        assert not _internals.is_plain((tensor, special))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_guard():
    """What tells tensors that a call was made with before from others."""
    a, b, c = (torch.randn(2, 3, 4) for _ in range(3))
    check = _internals.guard((a, b))
    assert check(b, a)
    with torch.no_grad():
        assert check(b, c)
    for other in (
        c[:, :2],
        c.transpose(1, 2).contiguous().transpose(1, 2),
        c.double(),
        c.clone().requires_grad_(),
        torch.nn.Parameter(c, False),
        c.as_subclass(Watching),
        c.to("meta"),
        c.to_sparse(),
        torch._neg_view(c),
        torch._to_functional_tensor(c),
        a,
    ):
        assert not check(a, other)
        assert not check(other, a)
    with _Mode():
        assert not check(a, b)
    with torch.autocast("cpu"):
        assert not check(a, b)

    def inside(x: Tensor) -> Tensor:
        assert not check(a, b)
        assert not check(x, b)
        return x.sum()

    for transform in (torch.vmap, torch.func.grad, torch.func.functionalize):
        transform(inside)(c)


def test_guard_of_a_tensor_that_is_given_twice():
    a, b, c, d = (torch.randn(2, 3) for _ in range(4))
    check = _internals.guard((a, b, a))
    assert check(c, d, c)
    assert not check(c, d, d)
    assert not check(c, d, a)
    assert not check(c, c, c)
    assert not check(c, d.double(), c)
    assert not check(c[:1], d, c[:1])
    assert not _internals.guard((a, b, c))(a, b, a)
    assert _internals.guard((a, a))(b, b)


def test_inference_mode():
    query = torch.randn(SHAPE)
    expected = natten.na2d(query, query, query, 3)
    with torch.inference_mode():
        assert natten.na2d(query, query, query, 3).equal(expected)
        inside = query.clone()
        assert natten.na2d(inside, query, query, 3).equal(expected)
    assert natten.na2d(inside, query, query, 3).equal(expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functionalize():
    query = torch.randn(SHAPE)

    def function(query):
        return natten.na2d(query, query, query, 3).mul(2).add_(1)

    expected = function(query)
    assert torch.func.functionalize(function)(query).equal(expected)
    # Alone, inside and outside of the other transforms.
    doubled = torch.vmap(torch.func.functionalize(function))(torch.stack([query, query]))
    torch.testing.assert_close(doubled[1], expected)
    loss = lambda q: function(q).square().sum()  # noqa: E731
    wanted = torch.func.grad(loss)(query)
    torch.testing.assert_close(torch.func.grad(torch.func.functionalize(loss))(query), wanted)
    graph = torch.fx.experimental.proxy_tensor.make_fx(torch.func.functionalize(function))(query)
    assert "neighborhood_attention" in graph.code
    torch.testing.assert_close(graph(query), expected)


def test_profiler_sees_the_operator_and_the_same_numbers():
    query = negative(*SHAPE)
    expected = natten.na2d(query, query, query, 3)
    with torch.profiler.profile() as profile:
        assert natten.na2d(query, query, query, 3).equal(expected)
    names = {event.name for event in profile.events()}
    assert "natten::neighborhood_attention" in names


def test_import_again():
    """After removal from sys.modules, as notebooks reload packages."""
    code = (
        "import sys, torch, natten\n"
        "q = torch.randn(1, 6, 7, 2, 8)\n"
        "first = natten.na2d(q, q, q, 3)\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'natten']:\n"
        "    del sys.modules[name]\n"
        "import natten\n"
        "q.requires_grad_()\n"
        "assert natten.na2d(q, q, q, 3).equal(first)\n"
        "natten.na2d(q, q, q, 3).sum().backward()\n"
        "f = torch.compile(lambda q: natten.na2d(q, q, q, 3), backend='aot_eager')\n"
        "f(q).sum().backward()\n"
        "h = q.detach().movedim(-2, 1)\n"
        "natten.functional.na2d_qk(h, h, 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
