"""A grid of queries that is finer than that of the keys, against what can be done without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import na1d, na2d
from natten.nn import NeighborhoodCrossAttention2D


def parts(
    queries: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (queries, keys, keys)
    return [torch.randn(2, *s, 2, 8, dtype=dtype, requires_grad=True) for s in shapes]


def repeated(query: Tensor, key: Tensor, value: Tensor, factors: tuple[int, int], size: Any) -> Any:
    """By hand: keys as many times as there are queries, of which dilation leaves one each."""
    for axis, factor in enumerate(factors):
        key, value = (t.repeat_interleave(factor, axis + 1) for t in (key, value))
    return na2d(query, key, value, size, dilation=factors)


@pytest.mark.parametrize("factors", [(2, 3), (4, 1)])
def test_like_repeated_keys_and_dilation(factors: tuple[int, int]) -> None:
    keys = (7, 6)
    tensors = parts(tuple(n * r for n, r in zip(keys, factors)), keys)
    out = na2d(*tensors, (5, 3), upsampling=factors)
    by_hand = repeated(*tensors, factors, (5, 3))
    torch.testing.assert_close(out, by_hand, rtol=0, atol=2e-15)
    gradient = torch.randn_like(out)
    for got, expected in zip(
        torch.autograd.grad(out, tensors, gradient), torch.autograd.grad(by_hand, tensors, gradient)
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_a_window_of_everything_is_cross_attention() -> None:
    query, key, value = parts((12,), (4,))
    out = na1d(query, key, value, 4, upsampling=3)
    torch.testing.assert_close(out, natten.attention(query, key, value))


def test_one_is_the_default() -> None:
    tensors = parts((6, 5), (6, 5))
    expected = na2d(*tensors, 3)
    for one in (1, (1, 1), None):
        assert na2d(*tensors, 3, upsampling=one).equal(expected)
        assert na2d(*tensors, 3, upsampling=one, grid=(6, 5)).equal(expected)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "text"),
    [
        (
            (12, 9), (6, 4), {"upsampling": 2},
            r"upsampling times as many tokens as key .* got upsampling=\(2, 2\) with query's token "
            r"shape \(12, 9\) and key's \(6, 4\)",
        ),
        ((12, 8), (6, 4), {}, "must have the same token shape"),
        ((12, 8), (6, 4), {"upsampling": (2,)}, "upsampling must have 2 values"),
        ((12, 8), (6, 4), {"upsampling": 0}, "upsampling must hold integers of at least 1"),
        ((12, 8), (6, 4), {"upsampling": 2, "dilation": (2, 1)}, "dilation must be 1 along"),
        ((12, 8), (6, 4), {"upsampling": 2, "grid": (6, 4)}, "does not go with grid"),
        ((12, 8), (6, 4), {"upsampling": 2, "kernel_size": 5}, "at most the number of tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(
    queries: tuple[int, ...], keys: tuple[int, ...], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        na2d(*parts(queries, keys), **{"kernel_size": 2, **options})


def test_biases_are_declined() -> None:
    rpb = torch.zeros(2, 5, 5, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="rpb and upsampling do not go together"):
        na2d(*parts((12, 8), (6, 4)), 3, upsampling=2, rpb=rpb)


def test_the_operator_looks_too() -> None:
    query, key, value = parts((12,), (6,))
    operator = torch.ops.natten.neighborhood_attention

    def call(window: list[int]) -> Any:
        names = {argument.name for argument in operator.default._schema.arguments}
        given = dict(query=query, key=key, value=value, window=window, scale=1.0, heads_kv=0)
        given |= dict(max_seqlen_q=0, max_seqlen_kv=0, backend="", config="", requires_grad=False)
        rest = dict.fromkeys(names - set(given))
        return operator(**{**rest, **given, "softcap": 0.0})

    call([3, 1, 1, 0, 6, 0, 0, 2])
    for wrong in ([3, 1, 1, 0, 6, 0, 0, 3], [3, 1, 1, 0, 6, 1, 1, 2], [3, 1, 1, 0, 6, 0, 0, 0]):
        with pytest.raises(ValueError, match="upsampling"):
            call(wrong)


def test_compiled_explained_and_counted() -> None:
    tensors = parts((12, 12), (6, 4), torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return na2d(*tensors, 3, upsampling=(2, 3))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), run(*tensors)
    torch.testing.assert_close(out, expected)
    (got,) = torch.autograd.grad(out.sin().sum(), tensors[1])
    (wanted,) = torch.autograd.grad(expected.sin().sum(), tensors[1])
    torch.testing.assert_close(got, wanted)
    assert "upsampling=(2, 3)" in str(natten.explain(*tensors, 3, upsampling=(2, 3)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*tensors)
    assert counter.get_total_flops() == 2 * 2 * 2 * 12 * 12 * 9 * 16


def test_modules() -> None:
    """An upsampler: pixels attend to features of a coarser grid."""
    torch.manual_seed(0)
    module = NeighborhoodCrossAttention2D(
        16, 2, 3, source_dim=24, context_dim=10, upsampling=(2, 3), qk_norm=True
    ).double()
    x, source = torch.randn(2, 8, 15, 16).double(), torch.randn(2, 4, 5, 24).double()
    context = torch.randn(2, 7, 10).double()
    out = module(x, context, source=source)
    fine = NeighborhoodCrossAttention2D(
        16, 2, 3, dilation=(2, 3), source_dim=24, context_dim=10, qk_norm=True
    ).double()
    fine.load_state_dict(module.state_dict())
    repeated = source.repeat_interleave(2, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(out, fine(x, context, source=repeated))
    assert "upsampling=(2, 3)" in repr(module)
    with pytest.raises(ValueError, match="takes a source, and no origin and grid"):
        module(x)
    with pytest.raises(ValueError, match="upsampling times as many tokens as key"):
        module(x, source=source[:, :3])
    with pytest.raises(NotImplementedError, match="attention_map with upsampling"):
        module.attention_map(x, [[0, 0]], source=source)
    with pytest.raises(NotImplementedError, match="rel_pos_bias, rotary, pad and attn_drop"):
        NeighborhoodCrossAttention2D(16, 2, 3, upsampling=2, rotary=True)
    plain = NeighborhoodCrossAttention2D(16, 2, 3)
    assert torch.jit.script(plain)(x.float()).shape == x.shape
