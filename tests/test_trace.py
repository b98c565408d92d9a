"""torch.jit.trace: a traced module is right for inputs of other sizes, or refuses them."""

from __future__ import annotations

import pytest
import torch

import natten

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = (RuntimeError, ValueError, torch.jit.Error)
MODULES = {
    "plain": {},
    "bias": {"rel_pos_bias": True},
    "dilated": {"dilation": (1, 2)},
    "causal": {"is_causal": (True, False), "stride": 2},
    "padding": {"kernel_size": 5, "pad": True},
    "rotary": {"rotary": True},
    "grouped": {"num_kv_heads": 1},
}


def check(module, example, inputs) -> None:
    traced = torch.jit.trace(module, example, check_trace=False)
    for x in inputs:
        try:
            expected = module(x)
        except ValueError:
            with pytest.raises(REFUSED):
                traced(x)
            continue
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [(8, 9), (3, 4)])
def test_modules(name, size):
    settings = {"kernel_size": 3} | MODULES[name]
    if size == (3, 4) and name == "dilated":
        size = (3, 6)
    module = natten.NeighborhoodAttention2D(16, 2, **settings).eval()
    sizes = ((8, 9), (9, 8), (3, 3), (3, 6), (4, 4), (8, 90), (2, 2), (1, 30))
    inputs = [torch.randn(2, *s, 16) for s in sizes] + [torch.randn(5, 8, 9, 16)]
    check(module, torch.randn(2, *size, 16), inputs)


def test_full_window_and_gradients():
    query = torch.randn(1, 5, 6, 2, 8)
    traced = torch.jit.trace(lambda q: natten.na2d(q, q, q, (5, 6)), query, check_trace=False)
    leaf = torch.randn(2, 9, 8, 2, 8, requires_grad=True)
    torch.testing.assert_close(traced(leaf), natten.na2d(leaf, leaf, leaf, (5, 6)))
    grads = [
        torch.autograd.grad(f(leaf).square().sum(), leaf)[0]
        for f in (traced, lambda q: natten.na2d(q, q, q, (5, 6)))
    ]
    torch.testing.assert_close(*grads)
    with pytest.raises(REFUSED):
        traced(torch.randn(1, 5, 5, 2, 8))


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5)])
def test_attention_of_two_lengths(lengths):
    def attend(query, key):
        return natten.attention(query, key, key)

    example = tuple(torch.randn(1, n, 2, 8) for n in lengths)
    traced = torch.jit.trace(attend, example, check_trace=False)
    for queries, keys in ((3, 4), (4, 3), (20, 1)):
        query, key = torch.randn(2, queries, 2, 8), torch.randn(2, keys, 2, 8)
        torch.testing.assert_close(traced(query, key), attend(query, key))


def test_unfused():
    def attend(query):
        scores = natten.functional.na2d_qk(query, query, 3)
        return natten.functional.na2d_av(scores.softmax(-1), query, 3)

    traced = torch.jit.trace(attend, torch.randn(1, 2, 6, 7, 8), check_trace=False)
    for shape in ((1, 2, 6, 7, 8), (3, 2, 7, 6, 8), (2, 2, 3, 30, 8)):
        query = torch.randn(shape)
        torch.testing.assert_close(traced(query), attend(query))
    with pytest.raises(REFUSED):
        traced(torch.randn(1, 2, 2, 7, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nat_mini", "dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"]
)
def test_models(name):
    timm = pytest.importorskip("timm")
    import natten.models  # noqa: F401

    if name not in timm.list_models():
        pytest.skip(f"no model {name}")
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        inputs = [torch.randn(1, 3, *size) for size in ((64, 64), (96, 80), (33, 70))]
        traced = torch.jit.trace(model, inputs[0], check_trace=False)
        for x in inputs:
            try:
                expected = model(x)
            except (ValueError, AssertionError):
                continue
            try:
                got = traced(x)
            except REFUSED:
                continue  # refused
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
