"""Windows of everything along an axis, windows that are clipped to small grids, and windows of
groups of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten import na1d, na2d, na3d
from natten.functional import operators
from natten.nn import NeighborhoodAttention2D


def parts(*tokens: int, heads: int = 4, heads_kv: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    to: dict[str, Any] = dict(dtype=torch.float64, requires_grad=True)
    kv = heads if heads_kv is None else heads_kv
    return [torch.randn(2, *tokens, n, 8, **to) for n in (heads, kv, kv)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [((-1, 3), (7, 3)), ((None, 3), (7, 3)), ([3, None], (3, 6)), (-1, (7, 6)), ((-1, -1), (7, 6))],
)
@pytest.mark.parametrize("is_causal", [False, (True, False)])
def test_everything_along_an_axis(given: Any, meant: Any, is_causal: Any) -> None:
    tensors = parts(7, 6)
    expected = na2d(*tensors, meant, is_causal=is_causal)
    assert na2d(*tensors, given, is_causal=is_causal).equal(expected)
    problem = natten.explain(*tensors, given, is_causal=(True, False)).problem
    assert problem.kernel_size == meant


def test_everything_in_modules() -> None:
    module = NeighborhoodAttention2D(8, 1, (None, 3))
    assert module.kernel_size == (-1, 3)
    x = torch.randn(1, 6, 7, 8)
    other = NeighborhoodAttention2D(8, 1, (6, 3))
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), other(x))


def test_everything_of_a_dilation_group_or_a_ring() -> None:
    tensors = parts(12)
    assert na1d(*tensors, -1, dilation=3).equal(na1d(*tensors, 4, dilation=3))
    assert na1d(*tensors, -1, is_circular=True).equal(na1d(*tensors, 12))
    with pytest.raises(ValueError, match="kernel_size=-1, everything along an axis, goes with"):
        na1d(*tensors, -1, dilation=5)
    for wrong in ((0, -1), (-2, 3)):
        with pytest.raises(ValueError, match="kernel_size must hold integers of at least"):
            na2d(*parts(5, 5), wrong)


def test_everything_in_a_compiled_program() -> None:
    compiled = torch.compile(
        lambda *t: na2d(*t, (-1, 3)), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in ((7, 6), (9, 8)):
        tensors = parts(*tokens)
        torch.testing.assert_close(compiled(*tensors), na2d(*tensors, (tokens[0], 3)))


@pytest.mark.parametrize(
    ("tokens", "window", "meant"),
    [
        ((5, 9), ((7, 7), 1, 1), ((5, 7), 1, 1)),
        ((5, 9), ((7, 7), (6, 2), 1), ((5, 7), (5, 2), 1)),
        # The smallest of three dilation groups of 8 tokens has 2.
        ((8, 9), ((3, 3), 3, 3), ((2, 3), (2, 3), 3)),
        ((4, 1), ((3, 3), 1, 6), ((1, 1), 1, (4, 1))),
        ((20, 20), ((7, 7), 2, 1), ((7, 7), 2, 1)),
        ((5, 9), ((-1, 12), 7, 1), ((5, 9), (5, 7), 1)),
    ],
)
def test_clipped_windows(tokens: Any, window: Any, meant: Any) -> None:
    tensors = parts(*tokens)
    expected = na2d(*tensors, *meant)
    assert na2d(*tensors, *window, clip_window=True).equal(expected)


def test_without_clipping_it_raises() -> None:
    with pytest.raises(ValueError, match="at most the number of tokens"):
        na2d(*parts(5, 9), 7)
    with pytest.raises(ValueError, match="clip_window must be a bool"):
        na2d(*parts(5, 9), 3, clip_window=1)


def test_the_middle_of_a_clipped_windows_biases() -> None:
    tensors = parts(5, 9)
    rpb = torch.randn(4, 13, 13, dtype=torch.float64, requires_grad=True)
    out = na2d(*tensors, 7, rpb=rpb, clip_window=True)
    middle = rpb.detach()[:, 2:11].clone().requires_grad_()
    expected = na2d(*tensors, (5, 7), rpb=middle)
    assert out.equal(expected)
    (got,) = torch.autograd.grad(out.sin().sum(), rpb)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), middle)
    torch.testing.assert_close(got[:, 2:11], wanted)
    assert not got[:, :2].any()
    assert not got[:, 11:].any()
    with pytest.raises(ValueError, match="rpb must have shape"):
        na2d(*tensors, 7, rpb=middle, clip_window=True)


@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 4), (4, 2), (4, 1), (8, 4), (8, 1)], ids=str)
def test_windows_of_groups_of_heads(heads: int, heads_kv: int) -> None:
    tensors = parts(9, 8, heads=heads, heads_kv=heads_kv)
    context = [torch.randn(2, 3, heads_kv, 8, dtype=torch.float64) for _ in range(2)]
    windows = [(3, 3), (7, 5)]
    dilations = [(2, 2), (1, 1)]
    out, lse = na2d(
        *tensors, windows, dilation=dilations, additional_keys=context[0],
        additional_values=context[1], return_lse=True,
    )  # fmt: skip
    query, key, value = tensors
    repeat = heads // heads_kv
    key, value = (t.repeat_interleave(repeat, -2) for t in (key, value))
    more = [t.repeat_interleave(repeat, -2) for t in context]
    for head in range(heads):
        group = head * 2 // heads
        one = slice(head, head + 1)
        expected, expected_lse = na2d(
            query[..., one, :], key[..., one, :], value[..., one, :], windows[group],
            dilation=dilations[group], additional_keys=more[0][..., one, :],
            additional_values=more[1][..., one, :], return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(out[..., one, :], expected)
        torch.testing.assert_close(lse[..., one], expected_lse)
    gradients = torch.autograd.grad(out.sin().sum(), tensors)
    for tensor, gradient in zip(tensors, gradients):
        assert gradient.shape == tensor.shape
        assert bool(gradient.any())


SHARED: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": [(3, 3), (5, 7)]},
    "dilated, strided": {
        "kernel_size": [(3, 3), (2, 5)], "dilation": [(2, 2), (1, 1)], "stride": [(1, 1), (2, 1)],
    },
    "scores, rings": {
        "kernel_size": [(3, 3), (9, 3)], "is_circular": (False, True), "softcap": 2.0, "scale": 0.3,
    },
    "everything": {"kernel_size": [(-1, -1), (3, 3)], "is_causal": False},
    "boxes": {
        "kernel_size": [(3, 3), (11, 5)], "grid": (12, 10), "query_origin": (2, 1),
        "key_origin": (2, 1), "clip_window": True,
    },
}  # fmt: skip


def _of_each(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Groups as calls of their own."""
    lists = {name: options[name] for name in ("kernel_size", "stride", "dilation")
             if isinstance(options.get(name), list)}  # fmt: skip
    halves = zip(*[t.chunk(2, -2) for t in tensors], strict=True)
    found = [
        na2d(*half, **options | {name: each[g] for name, each in lists.items()}, return_lse=True)
        for g, half in enumerate(halves)
    ]
    return torch.cat([out for out, _ in found], -2), torch.cat([lse for _, lse in found], -1)


@pytest.mark.parametrize("name", SHARED)
def test_groups_of_heads_share_results(name: str) -> None:
    """Numbers and all derivatives are those of calls of their own, whatever is asked for."""
    options = SHARED[name]
    masks = {mask: torch.rand(2, 9, 8) > 0.3 for mask in ("key_mask", "query_mask")}
    for more in ({}, masks):
        query, *others = parts(9, 8)
        tensors = [query, *[t[..., :2, :].detach().requires_grad_() for t in others]]
        given = options | more
        found = na2d(*tensors, **given, return_lse=True)
        expected = _of_each(tensors, given)
        torch.testing.assert_close(found, expected)
        weights = [torch.randn_like(t) for t in found]
        for results in (slice(0, 1), slice(1, 2), slice(2)):
            for wanted in (tensors, tensors[:1], tensors[1:2], tensors[1:]):
                mine, true = (
                    torch.autograd.grad(
                        pair[results], wanted, weights[results], retain_graph=True,
                        allow_unused=True, materialize_grads=True,
                    )
                    for pair in (found, expected)
                )  # fmt: skip
                torch.testing.assert_close(mine, true)


def test_derivatives_of_groups_of_heads() -> None:
    """Of second order, of a tensor that is all three, and while somebody watches."""
    given = SHARED["dilated, strided"]
    x = parts(9, 8)[0]
    found = []
    for function in (na2d, lambda *t, **more: _of_each([*t], more)[0]):
        out = function(x, x, x, **given)
        out = out[0] if isinstance(out, tuple) else out
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.cos().sum(), x)
        found.append((first, second))
    torch.testing.assert_close(*found)
    out = na2d(x, x, x, **given)
    with torch.profiler.profile():
        watched = na2d(x, x, x, **given)
        (gradient,) = torch.autograd.grad(out.sin().sum(), x)
    torch.testing.assert_close(watched, out)
    torch.testing.assert_close(gradient, found[0][0])


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["dilated, strided", "everything"])
def test_kernels_write_into_shared_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups of heads, into views of one output and of one gradient each, and read gradients as
    they are; numbers are those of float64."""
    pytest.importorskip("triton")
    from natten.functional.backends.triton.backward import BackwardPass

    options, seen = SHARED[name], []
    compute, back, run = operators._compute, operators._compute_backward, BackwardPass.run

    def noted(call: Any, tensors: Any, view: Tensor) -> Any:
        out, lse = compute(call, tensors, view)
        seen.append(out is view)
        return out, lse

    def noted_backward(*arguments: Any) -> Any:
        found = back(*arguments)
        seen.extend(g is view for g, view in zip(found[:3], arguments[-1], strict=True))
        return found

    def noted_run(self: Any) -> Any:
        # Not copied: as far apart as all heads are.
        seen.extend(t.stride(-3) == 4 * t.shape[-1] for t in (self.out, self.grad_out))
        return run(self)

    monkeypatch.setattr(operators, "_compute", noted)
    monkeypatch.setattr(operators, "_compute_backward", noted_backward)
    monkeypatch.setattr(BackwardPass, "run", noted_run)
    exact = [t.detach()[:1, :7, :6].contiguous() for t in parts(9, 8)]
    single = [t.float().requires_grad_() for t in exact]
    weights = torch.randn(exact[0].shape)
    out = na2d(*single, **options, backend="cutlass-fna")
    found = [out, *torch.autograd.grad(out, single, weights)]
    assert seen == [True] * 12
    monkeypatch.undo()
    exact = [t.requires_grad_() for t in exact]
    out, _ = _of_each(exact, options | {"backend": "reference"})
    expected = [out, *torch.autograd.grad(out, exact, weights.double())]
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_biases_of_groups_of_heads() -> None:
    tensors = parts(12)
    rpb = torch.randn(4, 5, dtype=torch.float64)
    for sizes, cut in (([(3,), (3,)], 0), ([(3,), (2,)], 1)):  # the middle, of a smaller window
        out = na1d(*tensors, sizes, dilation=[(1,), (2,)], rpb=rpb)
        biases = [rpb[:2], rpb[2:, cut : 5 - cut]]
        halves = [
            na1d(*(t[..., h, :] for t in tensors), k, dilation=d, rpb=bias)
            for h, k, d, bias in zip((slice(2), slice(2, 4)), sizes, (1, 2), biases, strict=True)
        ]
        assert out.equal(torch.cat(halves, -2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel_size": [(3,), (3,), (5,)]}, "got 3 windows for 4 and 4 heads"),
        ({"kernel_size": [(3,), (5,)], "stride": [(1,)]}, "lists of as many windows"),
        ({"kernel_size": [(3,), (5,)], "rpb": torch.zeros(4, 5)}, "rpb must have shape"),
        ({"kernel_size": [(3,), (13,)]}, "at most the number of tokens"),
    ],
)
def test_wrong_groups_of_heads(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        na1d(*parts(12), **options)


def test_space() -> None:
    tensors = parts(4, 5, 6, heads=2)
    out = na3d(*tensors, [(-1, 3, 3), (3, 9, 3)], clip_window=True)
    for head, size in enumerate(((4, 3, 3), (3, 5, 3))):
        one = slice(head, head + 1)
        torch.testing.assert_close(out[..., one, :], na3d(*(t[..., one, :] for t in tensors), size))
