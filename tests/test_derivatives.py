"""Derivatives beyond the gradient, against dense attention that torch differentiates."""

from __future__ import annotations

from functools import partial
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


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_cases(case):
    check_derivatives(case)


@pytest.mark.parametrize("seed", range(8))
def test_random(seed):
    check_derivatives(random_case(100 + seed, max_tokens=150))


@pytest.mark.parametrize("budget", [1, 3000, 1 << 30])
@pytest.mark.parametrize("tile", [1, 6, 1 << 30])
def test_any_tiles_give_the_same(budget, tile, monkeypatch):
    monkeypatch.setattr(decomposition, "_CHUNK", {"cpu": budget})
    monkeypatch.setattr(decomposition, "_TILE", tile)
    monkeypatch.setattr(decomposition, "_SHORTEST", 2)
    check_derivatives(
        Case("tiles", (11, 10), (4, 3), (3, 2), (2, 3), heads=4, heads_kv=2, head_dim=3,
             additional=3, additional_lengths=(2, 0), rpb=True)
    )  # fmt: skip


SMALL = [
    Case("all", (4, 3), (3, 2), rpb=True, additional=2, heads=2, head_dim=2, batch=1),
    Case("causal", (5, 3), (3, 3), (2, 1), is_causal=(True, False), heads=1, head_dim=2, batch=1),
    Case("varlen", (5,), None, batch=1, heads=1, head_dim=2, lengths_q=(2, 3), key_tokens=(4,),
         lengths_kv=(3, 1), is_causal=(True,)),
]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_finite_differences(case):
    """Both modes and both ways to second derivatives, batched too."""
    leaves, (function, _) = _functions(case)
    assert gradcheck(
        function, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)


def _packed(qkv: Tensor, rpb: Tensor) -> tuple[Tensor, Tensor]:
    # A window of everything is flattened.
    return packed_attention(qkv, 1, (3, 3), (1, 1), (1, 1), (False, False), rpb=rpb)


def test_packed_heads():
    qkv = torch.randn(1, 4, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(_packed, (qkv, rpb), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(_packed, (qkv, rpb), fast_mode=True, check_fwd_over_rev=True)

    def whole(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return packed_attention(qkv, 1, (4, 3), (1, 1), (1, 1), (False, False))

    assert gradgradcheck(whole, (qkv,), fast_mode=True, check_fwd_over_rev=True)


def _loss(query: Tensor) -> Tensor:
    out, lse = natten.na2d(query, query.sin(), query, (2, 3), dilation=(2, 1), return_lse=True)
    return (out**3).sum() + lse.square().sum()


def test_hessians():
    """By every way that torch has."""
    query = torch.randn(1, 4, 4, 1, 2, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(_loss, query)
    torch.testing.assert_close(
        expected.flatten(5).flatten(0, 4), expected.flatten(5).flatten(0, 4).T
    )
    for function in (
        torch.func.hessian(_loss),
        torch.func.jacrev(torch.func.jacrev(_loss)),
        torch.func.jacrev(torch.func.jacfwd(_loss)),
        torch.func.jacfwd(torch.func.jacfwd(_loss)),
        lambda q: torch.autograd.functional.hessian(
            _loss, q, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ):
        torch.testing.assert_close(function(query), expected)
    direction = torch.randn_like(query)
    _, product = torch.autograd.functional.hvp(_loss, query, direction)
    torch.testing.assert_close(product, (expected * direction).sum((5, 6, 7, 8, 9)))


def test_third_order():
    query, *directions = torch.randn(4, 1, 4, 4, 1, 2, dtype=torch.float64).unbind()
    slope = _loss
    for direction in directions:
        slope = _along(slope, direction)
    forward = slope(query)
    leaf = query.requires_grad_()
    value = _loss(leaf)
    for direction in directions:
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = (gradient * direction).sum()
    torch.testing.assert_close(value, forward)


def _along(function: Any, direction: Tensor) -> Any:
    return lambda point: torch.func.jvp(function, (point,), (direction,))[1]


@pytest.mark.parametrize("backend", ["cpu", "flex-fna"])
def test_every_backend(backend):
    """Of its results; the derivatives are none of its own."""
    if backend == "cpu":
        pytest.importorskip("numba")
    primals = torch.randn(3, 2, 6, 5, 2, 8).unbind()
    tangents = torch.randn(3, 2, 6, 5, 2, 8).unbind()
    found, expected = (
        torch.func.jvp(partial(natten.na2d, kernel_size=3, backend=name), primals, tangents)
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, primals, tangents)
        out = forward_ad.unpack_dual(natten.na2d(*duals, 3, backend=backend))
    torch.testing.assert_close((out.primal, out.tangent), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    """Computed in float32, whatever autocast says of products of matrices."""
    primals, tangents = (torch.randn(3, 1, 9, 2, 8).to(dtype) for _ in range(2))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return natten.na1d(q, k, v, 5, return_lse=True)

    exact = torch.func.jvp(function, tuple(primals.double()), tuple(tangents.double()))[1]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            out, lse = torch.func.jvp(function, tuple(primals), tuple(tangents))[1]
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(lse, exact[1].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, exact[0].to(dtype))


def test_nothing_is_seen():
    """Neither NaN nor a derivative comes of queries without a key, or of calls without queries."""
    query = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor) -> Tensor:
        boxes = {"grid": (9,), "query_origin": (0,), "key_origin": (3,)}
        return natten.na1d(q, k, k, 3, **boxes)

    out = function(query, key)
    assert bool((out[0, :2] == 0).all())
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    for second in torch.autograd.grad(gradient.square().sum(), (query, key)):
        assert bool(second.isfinite().all())
    tangents = (torch.randn_like(query), torch.randn_like(key))
    primals = (query.detach(), key.detach())
    _, tangent = torch.func.jvp(function, primals, tangents)
    assert bool((tangent[0, :2] == 0).all())
    assert bool(tangent.isfinite().all())
    sink = torch.randn(1, dtype=torch.float64)
    nothing = query.detach()[:, :0]

    def alone(sink: Tensor) -> tuple[Tensor, Tensor]:
        return natten.attention(query.detach(), nothing, nothing, sink=sink, return_lse=True)

    out, lse = torch.func.jvp(alone, (sink,), (sink.cos(),))[1]
    assert bool((out == 0).all())
    torch.testing.assert_close(lse, sink.cos().expand(lse.shape))
    none = torch.randn(1, 0, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        natten.attention(none, none, none).sum(), none, create_graph=True
    )
    assert gradient.shape == none.shape
    gradient.sum().backward()
    assert none.grad.shape == none.shape


def test_memory_is_linear(monkeypatch):
    """No more pairs at a time than the budget, however long the sequence is."""
    largest = 0
    scores = decomposition.Chunk.softmax

    def recorded(self: Any, pairs: Tensor) -> Any:
        nonlocal largest
        largest = max(largest, pairs.numel())
        return scores(self, pairs)

    monkeypatch.setattr(decomposition.Chunk, "softmax", recorded)
    query = torch.randn(1, 4000, 1, 4)
    torch.func.jvp(lambda q: natten.attention(q, q, q), (query,), (query,))
    assert 0 < largest <= decomposition._CHUNK["cpu"] < query.shape[1] ** 2 / 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """The backend's forward and backward pass and their derivatives, against float64 on a CPU."""

    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = natten.na2d(q, k, v, (5, 3), dilation=(1, 2), rpb=rpb, return_lse=True)
        return out, lse

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 19, 17, 4, 64), *[(2, 19, 17, 2, 64)] * 2, (4, 9, 5)]
    primals, tangents = (
        [torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2)
    )
    found = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float64)):
        at = tuple(t.to(device, precision) for t in primals)
        along = tuple(t.to(device, precision) for t in tangents)
        results, changes = torch.func.jvp(function, at, along)
        leaves = tuple(t.requires_grad_() for t in at)
        out, lse = function(*leaves)
        loss = out.float().square().sum() + lse.float().square().sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        slope = sum((g.double() * t).sum() for g, t in zip(gradients, along))
        second = torch.autograd.grad(slope, leaves)
        found.append([*results, *changes, *gradients, *second])
    relative = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for mine, true in zip(*found, strict=True):
        error = float((mine.detach().cpu().double() - true.detach().double()).abs().max())
        assert error <= relative * float(true.detach().abs().max())


@pytest.mark.gpu
def test_compiled_tangents_on_a_gpu() -> None:
    """A loss of results and tangents and its gradients, by Inductor, as in eager mode."""
    generator = torch.Generator().manual_seed(0)
    tensors, tangents = (
        [torch.randn(1, 24, 20, 4, 64, generator=generator).cuda() for _ in range(3)]
        for _ in range(2)
    )

    def loss(*tensors: Tensor) -> Tensor:
        attend = partial(natten.na2d, kernel_size=(7, 5))
        out, slope = torch.func.jvp(attend, tensors, tuple(tangents))
        return (out - slope).square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = function(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for mine, true in zip(found[1], found[0], strict=True):
        assert (mine - true).abs().max() <= 1e-3 * true.abs().max()
    torch.compiler.reset()


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """Linear in the number of tokens: a million of them."""
    query = torch.randn(1, 1024, 1024, 1, 32, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    torch.func.jvp(lambda q: natten.na2d(q, q, q, 7), (query,), (query,))
    size = query.numel() * query.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 30 * size + (3 << 30)
    leaf = query.requires_grad_()
    (gradient,) = torch.autograd.grad(
        natten.na2d(leaf, leaf, leaf, 7).square().sum(), leaf, create_graph=True
    )
    torch.autograd.grad((gradient * query.detach()).sum(), leaf)
    assert torch.cuda.max_memory_allocated() - before <= 60 * size + (4 << 30)


def _of_random(count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 6, 8, 2, 8, dtype=torch.float64) for _ in range(count))


def _attend(*tensors: Tensor) -> Tensor:
    return 2 * natten.na2d(*tensors, kernel_size=3)


@pytest.mark.parametrize(
    "place",
    ["jvp", "query alone", "dual tensors", "jacfwd", "nested", "of a gradient", "in a gradient"],
)
def test_forward_mode_is_compiled(place: str) -> None:
    torch.manual_seed(0)
    query, *others = tensors = _of_random(3)
    tangents = _of_random(3)
    mask = torch.arange(48).view(1, 6, 8) % 5 > 0

    def scored(query: Tensor) -> Any:
        sink = query[0, 0, 0, :, 0]
        return natten.na2d(
            query, *others, 3, key_mask=mask, softcap=2.0, sink=sink, return_lse=True
        )

    def of_duals(*tensors: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents)]
            tangent: Tensor = forward_ad.unpack_dual(_attend(*duals)).tangent
            return tangent

    def scaled(scale: Tensor) -> Tensor:
        return _attend(scale * query, *others).sum((1, 2))

    def slope(*tensors: Tensor) -> Tensor:
        return torch.func.jvp(_attend, tensors, tangents)[1]

    functions: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        "jvp": (lambda *t: torch.func.jvp(_attend, t, tangents), tensors),
        "query alone": (lambda q: torch.func.jvp(scored, (q,), tangents[:1]), (query,)),
        "dual tensors": (of_duals, tensors),
        "jacfwd": (torch.func.jacfwd(scaled), (query.new_ones(()),)),
        "nested": (lambda *t: torch.func.jvp(slope, t, tangents)[1], tensors),
        "of a gradient": (
            lambda *t: torch.func.jvp(
                torch.func.grad(lambda *t: _attend(*t).sin().sum()), t, tangents
            )[1],
            tensors,
        ),
        "in a gradient": (torch.func.grad(lambda *t: slope(*t).sin().sum()), tensors),
    }
    function, given = functions[place]
    expected = function(*given)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    if place in ("nested", "of a gradient", "in a gradient"):
        with pytest.raises(RuntimeError, match=r"beside another derivative is not compiled"):
            compiled(*given)
        torch.compiler.reset()
        # Between two compiled parts.
        compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("is_target", [True, False])
def test_training_with_compiled_tangents(is_target: bool) -> None:
    """Of results, as of consistency models, whose targets have tangents, and of tangents."""
    torch.manual_seed(0)
    tensors, tangents = _of_random(3), _of_random(3)
    sink = torch.randn(2, dtype=torch.float64)

    def attend(*tensors: Tensor) -> Any:
        *grids, sink = tensors
        return natten.na2d(*grids, 3, softcap=3.0, sink=sink, return_lse=True)

    def loss(sink: Tensor, *both: Tensor) -> Tensor:
        given = (*both[:3], sink), (*both[3:], sink.cos())
        (out, lse), (slope, lse_slope) = torch.func.jvp(attend, *given)
        if is_target:
            return (out - slope.detach()).square().sum() + lse.sin().sum()
        return (out - slope).square().sum() + (lse * lse_slope.sin()).sum()

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (sink, *tensors, *tangents)]
        found.append(torch.autograd.grad(function(*leaves), leaves, materialize_grads=True))
    torch.testing.assert_close(*found)
    torch.compiler.reset()


def test_compiled_attention_in_forward_mode() -> None:
    torch.manual_seed(0)
    tensors, tangents = _of_random(3), _of_random(3)
    _, expected = torch.func.jvp(_attend, tensors, tangents)
    compiled = torch.compile(_attend, backend="aot_eager")
    torch.testing.assert_close(torch.func.jvp(compiled, tensors, tangents)[1], expected)
    torch.compiler.reset()
