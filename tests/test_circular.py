"""Circular axes against what can be done without them, and where else they are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import na1d, na2d, na3d
from natten.functional import neighborhood_attention_generic
from natten.nn import NeighborhoodAttention2D, NeighborhoodTransformerBlock, RotaryEmbedding
from natten.window import Axis, attended


def parts(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def with_halo(query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Longitude, the second axis, by hand: keys of the other side on both sides."""
    rows, columns = query.shape[1:3]
    halo = kernel_size // 2 * dilation
    key, value = (torch.cat([t[:, :, -halo:], t, t[:, :, :halo]], 2) for t in (key, value))
    out: Tensor = neighborhood_attention_generic(
        query, key, value, kernel_size, dilation=(1, dilation),
        grid=(rows, columns + 2 * halo), query_origin=(0, halo), key_origin=(0, 0),
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 2), (7, 1)])
def test_like_a_halo_of_keys(kernel_size: int, dilation: int) -> None:
    tensors = parts(2, 7, 12, 2, 8)
    window: dict[str, Any] = dict(kernel_size=kernel_size, dilation=(1, dilation))
    out = na2d(*tensors, **window, is_circular=(False, True))
    by_hand = with_halo(*tensors, kernel_size, dilation)
    gradient = torch.randn_like(out)
    torch.testing.assert_close(out, by_hand, rtol=0, atol=2e-15)
    for got, expected in zip(
        torch.autograd.grad(out, tensors, gradient), torch.autograd.grad(by_hand, tensors, gradient)
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_turning_the_ring_turns_the_result() -> None:
    tensors = parts(1, 12, 6, 2, 8)
    window: dict[str, Any] = dict(kernel_size=(5, 3), stride=(2, 1), is_circular=(True, True))
    turned = na2d(*(t.roll((4, 1), (1, 2)) for t in tensors), **window)
    torch.testing.assert_close(turned, na2d(*tensors, **window).roll((4, 1), (1, 2)))


def test_a_window_of_the_whole_ring_is_everything() -> None:
    tensors = parts(1, 12, 2, 8)
    whole = na1d(*tensors, 12)
    torch.testing.assert_close(na1d(*tensors, 12, is_circular=True), whole)
    problem = natten.explain(*tensors, 12, is_circular=True).problem
    assert problem.is_circular == ()


def test_one_flag_for_all_axes() -> None:
    tensors = parts(1, 4, 5, 6, 1, 8)
    out = na3d(*tensors, 3, is_circular=True)
    assert out.equal(na3d(*tensors, 3, is_circular=(True, True, True)))
    assert not out.equal(na3d(*tensors, 3))
    assert na3d(*tensors, 3, is_circular=None).equal(na3d(*tensors, 3, is_circular=(False,) * 3))


def test_compiled() -> None:
    tensors = parts(1, 9, 8, 2, 8, dtype=torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return na2d(*tensors, 3, is_circular=(False, True))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), run(*tensors)
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(
        torch.autograd.grad(out.sin().sum(), tensors),
        torch.autograd.grad(expected.sin().sum(), tensors),
    ):
        torch.testing.assert_close(got, wanted)


def test_every_query_counts_a_whole_window() -> None:
    tensors = parts(1, 9, 8, 2, 8, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        na2d(*tensors, (3, 5), is_circular=(False, True))
    assert counter.get_total_flops() == 2 * 9 * 8 * 2 * 15 * 16


def test_explained() -> None:
    tensors = parts(1, 9, 8, 2, 8)
    assert "is_circular=(False, True)" in str(
        natten.explain(*tensors, 3, is_circular=(False, True))
    )
    assert "is_circular" not in str(natten.explain(*tensors, 3))


def modules(**options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(dilation=(1, 2), is_circular=(False, True))
    module = NeighborhoodAttention2D(16, 2, (5, 5), **{**settings, **options})
    return module.double().eval()


X = torch.randn(2, 7, 12, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"rel_pos_bias": True}, {"rotary": True}, {"qk_norm": True, "stride": (1, 3)}],
    ids=str,
)
def test_modules_turn_with_the_ring(options: dict[str, Any]) -> None:
    module = modules(**options)
    turned = module(X.roll(6, 2)).roll(-6, 2)
    torch.testing.assert_close(turned, module(X))
    bounded = modules(**options, is_circular=False)
    assert not torch.allclose(bounded(X), module(X))


@pytest.mark.parametrize("options", [{}, {"rel_pos_bias": True, "stride": 1}], ids=str)
def test_dropout_and_maps_know_the_ring(options: dict[str, Any]) -> None:
    module = modules(**{"stride": (1, 3), **options}, attn_drop=1e-12)
    expected = module(X)
    torch.testing.assert_close(module.train()(X), expected)
    positions = [[3, 0], [6, 11]]
    weights = module.eval().attention_map(X, positions).grid
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones_like(weights[..., 0, 0]))
    seen = weights[0, 1, 0].nonzero().tolist()
    axes = (Axis(7, 5), Axis(12, 5, module.stride[1], 2, is_circular=True))
    assert sorted(map(tuple, seen)) == sorted(attended((6, 11), axes))


def test_scripted_modules() -> None:
    module = modules()
    torch.testing.assert_close(torch.jit.script(module)(X), module(X))


def test_attributes_are_as_if_constructed() -> None:
    module = modules(rotary=True)
    other = modules(rotary=True, is_circular=False)
    other.is_circular = (False, True)
    torch.testing.assert_close(other(X), module(X))
    assert "is_circular=(False, True)" in repr(module)


def test_blocks() -> None:
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(16, 2, (3, 3), is_circular=(False, True)).double().eval()
    torch.testing.assert_close(block(X.roll(5, 2)).roll(-5, 2), block(X))


def test_streams() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(is_causal=(True, False), is_circular=(False, True))
    module = NeighborhoodAttention2D(16, 2, (3, 5), **options).double().eval()
    out, state = module.stream(X[:, :4])
    rest, _ = module.stream(X[:, 4:], state)
    torch.testing.assert_close(torch.cat([out, rest], 1), module(X))


def test_what_modules_refuse() -> None:
    with pytest.raises(ValueError, match="causal or circular but not both"):
        modules(is_causal=True)
    with pytest.raises(ValueError, match="a circular axis is not padded, got 4 tokens"):
        modules(pad=True)(X[:, :, :4])
    with pytest.raises(ValueError, match="dilation must divide the number of tokens"):
        modules()(X[:, :, :11])


def test_periodic_rotations() -> None:
    rotary = RotaryEmbedding(16, 2, is_circular=(False, True), dtype=torch.float64)
    cos, sin = rotary.rotation([5, 12])
    later, _ = rotary.rotation([5, 12], [0, 12])
    torch.testing.assert_close(later, cos)
    assert not torch.allclose(rotary.rotation([5, 12], [5, 0])[0], cos)
    # Every pair of the ring turns: no coordinate looks like another one.
    angles = torch.atan2(sin, cos)[0, :, 0, 4:]
    assert bool(((angles[1:] - angles[:1]).abs() > 1e-3).any(1).all())
