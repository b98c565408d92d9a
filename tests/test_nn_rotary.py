"""Rotary position embedding against one complex number at a time."""

from __future__ import annotations

import nn_eager
import pytest
import torch
from torch.testing import assert_close

from natten.nn import RotaryEmbedding

# TorchScript is deprecated, and timm's models are still expected to compile with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.mark.parametrize(
    ("extent", "head_dim", "theta", "spacing", "origin"),
    [
        ((7,), 8, 10000.0, (1.0,), (0.0,)),
        ((5, 3), 12, 100.0, (1.0, 2.0), (0.0, 0.0)),
        ((4, 3), 10, 10000.0, (1.0, 1.0), (11.0, -3.5)),
        ((3, 2, 5), 16, 10000.0, (1.0, 4.0, 0.5), (2.0, 0.0, 7.0)),
    ],
)
def test_equals_the_definition(extent, head_dim, theta, spacing, origin):
    x = torch.randn(2, *extent, 3, head_dim, dtype=torch.float64, requires_grad=True)
    rotary = RotaryEmbedding(head_dim, len(extent), theta, spacing, dtype=torch.float64)
    out = rotary(x, list(origin))
    expected = nn_eager.rotate(x, origin, theta, spacing)
    assert_close(out, expected, atol=1e-12, rtol=0)
    wanted = torch.autograd.grad(expected.sin().sum(), x)
    assert_close(torch.autograd.grad(out.sin().sum(), x), wanted, atol=1e-12, rtol=0)


def test_products_depend_on_differences_alone():
    rotary = RotaryEmbedding(16, 2, spacing=(3.0, 1.0), dtype=torch.float64)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    grid = torch.ones(1, 9, 8, 1, 1, dtype=torch.float64)
    q, k = rotary(grid * q), rotary(grid * k, [30, -4])
    first = (q[0, 5, 6] * k[0, 2, 7]).sum()
    second = (q[0, 3, 1] * k[0, 0, 2]).sum()
    assert_close(first, second)
    assert_close(q.norm(dim=-1), q.norm(dim=-1)[:, :1, :1].expand_as(q[..., 0]))


def test_half_precision_has_precise_angles():
    x = torch.randn(1, 4096, 1, 8, dtype=torch.float64)
    expected = RotaryEmbedding(8, 1, dtype=torch.float64)(x)
    half = RotaryEmbedding(8, 1).to(torch.bfloat16)
    assert half.frequencies.dtype == torch.float32
    got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), expected, atol=0.05, rtol=0)


def test_has_no_state():
    rotary = RotaryEmbedding(8, 2)
    assert not rotary.state_dict()
    assert not list(rotary.parameters())
    rotary.to(torch.float64)
    assert rotary.frequencies.dtype == torch.float64
    # Rebuilt, not widened from float32.
    exact = RotaryEmbedding(8, 2, dtype=torch.float64)
    assert_close(rotary.frequencies, exact.frequencies, atol=0, rtol=0)


def test_compiles_and_scripts():
    rotary = RotaryEmbedding(12, 2, theta=50.0)
    x = torch.randn(2, 5, 4, 3, 12)
    assert_close(
        torch.compile(rotary, backend="eager", fullgraph=True)(x, [1, 2]), rotary(x, [1.0, 2.0])
    )
    assert_close(torch.jit.script(rotary)(x), rotary(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 1), "head_dim must be even"),
        ((4, 3), "at least 6"),
        ((8, 2, -1.0), "theta must be one positive number, or 2"),
        ((8, 2, 1e4, (1.0, 2.0, 3.0)), "spacing must be one positive number, or 2"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(*arguments)
