"""natten.nn cross-attention against plain eager definitions, in float64."""

from __future__ import annotations

import nn_eager
import pytest
import torch
from torch.testing import assert_close

from natten.nn import (
    NeighborhoodCrossAttention1D,
    NeighborhoodCrossAttention2D,
    NeighborhoodCrossAttention3D,
)

# TorchScript is deprecated, and timm's models are still expected to compile with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

RANKS = {
    1: NeighborhoodCrossAttention1D,
    2: NeighborhoodCrossAttention2D,
    3: NeighborhoodCrossAttention3D,
}
BATCH, TOKENS, CONTEXT = 3, 5, 20

# name: extent, arguments, whether there are context, lengths, source
CASES = {
    "1d": ((9,), {"kernel_size": 3}, True, False, False),
    "2d": ((5, 7), {"kernel_size": 3, "dilation": (1, 2)}, True, False, False),
    "3d": ((3, 4, 2), {"kernel_size": (3, 2, 2)}, True, False, False),
    "lengths": ((5, 6), {"kernel_size": 3}, True, True, False),
    "lengths-causal": (
        (9,),
        {"kernel_size": 4, "stride": 2, "is_causal": True, "num_kv_heads": 2},
        True,
        True,
        False,
    ),
    "lengths-everything": (
        (4, 6),
        {
            "kernel_size": (5, 3),
            "dilation": (1, 2),
            "rel_pos_bias": True,
            "num_kv_heads": 2,
            "qk_norm": True,
            "rotary": True,
            "pad": True,
            "source_dim": 24,
            "qkv_bias": False,
        },
        True,
        True,
        True,
    ),
    "two-grids": ((5, 6), {"kernel_size": 3, "rel_pos_bias": True}, False, False, True),
    "two-grids-of-two-widths": (
        (7,),
        {"kernel_size": 3, "source_dim": 12, "rotary": True},
        False,
        False,
        True,
    ),
    "two-grids-and-context": ((5, 4), {"kernel_size": (3, 4)}, True, False, True),
    "alone": ((5, 6), {"kernel_size": 3}, False, False, False),
}
LENGTHS = [5, 0, 3]


def build(name, dtype=torch.float64, **more):
    extent, arguments, has_context, has_lengths, has_source = CASES[name]
    torch.manual_seed(0)
    module = RANKS[len(extent)](
        32,
        4,
        **arguments,
        **more,
        context_dim=CONTEXT if has_context else None,
        dtype=dtype,
    )
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.endswith("norm.weight") or parameter_name == "rpb":
            torch.nn.init.normal_(parameter)

    def tensor(*shape):
        return torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True)

    x = tensor(*extent, 32)
    context = tensor(TOKENS, CONTEXT) if has_context else None
    source = tensor(*extent, module.source_dim) if has_source else None
    lengths = torch.tensor(LENGTHS) if has_lengths else None
    return module, x, context, lengths, source


def eager(module, x, context, lengths, source):
    """Output, and weights [B, H, N, N + S], with one mask for all."""
    rank = len(module.kernel_size)
    extent = x.shape[1:-1]
    needed = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padded = [max(a, b) for a, b in zip(extent, needed, strict=True)]
    n = torch.Size(padded).numel()
    inside = tuple(slice(0, length) for length in extent)

    def grid_of(t):
        grid = t.new_zeros(t.shape[0], *padded, t.shape[-1])
        grid[(slice(None), *inside)] = t
        return grid

    def linear(layer, t):
        return t @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    heads = module.num_kv_heads
    q = linear(module.q, grid_of(x)).unflatten(-1, (module.num_heads, -1))
    kv = linear(module.kv, grid_of(x if source is None else source))
    k, v = kv.unflatten(-1, (2, heads, -1)).unbind(-3)
    if module.q_norm is not None:
        q = nn_eager.rms_norm(q, module.q_norm.weight)
        k = nn_eager.rms_norm(k, module.k_norm.weight)
    if module.rotary is not None:
        spacing = module.rotary.spacing
        q, k = (nn_eager.rotate(t, [0] * rank, 10000.0, spacing) for t in (q, k))
    window = (padded, module.kernel_size, module.stride, module.dilation, module.is_causal)
    mask = nn_eager.window_mask(*window).expand(x.shape[0], n, n)
    bias = 0.0
    if module.rpb is not None:
        bias = nn_eager.window_bias(module.rpb, *window)
    q, k, v = (t.flatten(1, rank) for t in (q, k, v))
    if context is not None:
        kv = linear(module.context_kv, context)
        k_c, v_c = kv.unflatten(-1, (2, heads, -1)).unbind(-3)
        if module.k_norm is not None:
            k_c = nn_eager.rms_norm(k_c, module.k_norm.weight)
        k, v = torch.cat([k, k_c], 1), torch.cat([v, v_c], 1)
        counts = torch.tensor([TOKENS] * BATCH) if lengths is None else lengths
        seen = torch.arange(TOKENS) < counts[:, None]
        mask = torch.cat([mask, seen[:, None].expand(-1, n, -1)], -1)
        if module.rpb is not None:
            bias = torch.cat([bias, bias.new_zeros(*bias.shape[:2], TOKENS)], -1)
    out, weights = nn_eager.attention(q, k, v, module.scale, mask, bias)
    out = linear(module.proj, out.flatten(-2))
    return out.unflatten(1, padded)[(slice(None), *inside)], weights


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_dense_definition(name):
    module, x, context, lengths, source = build(name)
    out = module(x, context, lengths, source)
    expected, _ = eager(module, x, context, lengths, source)
    assert_close(out, expected, atol=1e-10, rtol=0)
    inputs = [t for t in (x, context, source) if t is not None] + list(module.parameters())
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, atol=1e-9, rtol=0)


def test_gradcheck_with_lengths():
    module, x, context, lengths, source = build("lengths-everything")
    assert torch.autograd.gradcheck(
        lambda *t: module(t[0], t[1], lengths, t[2]), (x, context, source), fast_mode=True
    )


def test_hidden_context_has_no_influence():
    module, x, context, lengths, _ = build("lengths")
    out = module(x, context, lengths)
    (gradient,) = torch.autograd.grad(out.square().sum(), context)
    other = context.detach().clone()
    for entry, length in enumerate(LENGTHS):
        other[entry, length:] = 1e3
        assert (gradient[entry, length:] == 0).all()
        assert (gradient[entry, :length] != 0).all()
    assert_close(module(x, other, lengths), out, atol=0, rtol=0)
    # The whole length is the same as no lengths.
    whole = module(x, context, torch.full((BATCH,), TOKENS, dtype=torch.int32))
    assert_close(whole, module(x, context), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_attention_map_is_the_row_of_weights(name):
    module, x, context, lengths, source = build(name)
    extent = x.shape[1:-1]
    positions = torch.tensor([[0] * len(extent), [n - 1 for n in extent]])
    got = module.attention_map(x, positions, context, lengths, source)
    weights = eager(module, x, context, lengths, source)[1]
    needed = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padded = [max(a, b) for a, b in zip(extent, needed, strict=True)]
    n = torch.Size(padded).numel()
    rows = [torch.arange(n).view(padded)[tuple(p)].item() for p in positions.tolist()]
    wanted = weights[:, :, rows].transpose(1, 2)
    grid = wanted[..., :n].unflatten(-1, padded)[(..., *(slice(0, m) for m in extent))]
    assert_close(got.grid, grid, atol=1e-12, rtol=0)
    if context is None:
        assert got.additional is None
    else:
        assert_close(got.additional, wanted[..., n:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["2d", "lengths-everything", "two-grids"])
def test_dropout_of_weights(name):
    module, x, context, lengths, source = build(name)
    dropping = build(name, attn_drop=0.4)[0]
    expected = module(x, context, lengths, source)
    dropping.eval()
    assert_close(dropping(x, context, lengths, source), expected, atol=0, rtol=0)
    dropping.train()
    assert (dropping(x, context, lengths, source) - expected).abs().max() > 1e-3
    dropping.attn_drop.p = 0.0
    assert_close(dropping(x, context, lengths, source), expected, atol=1e-10, rtol=0)


def test_autocast():
    module, x, context, lengths, source = build("lengths-everything", torch.float32)
    expected = module(x, context, lengths, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x, context, lengths, source)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), expected, atol=0.1, rtol=0)
    got.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("name", ["2d", "lengths-everything"])
def test_compiles_as_one_graph(name):
    module, x, context, lengths, source = build(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = compiled(x, context, lengths, source)
    expected = module(x, context, lengths, source)
    assert_close(got, expected, atol=1e-12, rtol=0)
    inputs = [x, context, *module.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), wanted, strict=True):
        assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["lengths-everything", "two-grids"])
def test_traces_symbolically(name):
    module, x, context, lengths, source = build(name)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = module

        def forward(self, x, context, lengths, source):
            return self.attn(x, *((context, lengths) if name != "two-grids" else ()), source=source)

    graph = torch.fx.symbolic_trace(Model())
    expected = module(x, context, lengths, source)
    assert_close(graph(x, context, lengths, source), expected, atol=1e-12, rtol=0)
    if context is not None:
        with pytest.raises(ValueError, match="integers from 0 to 5"):
            graph(x, context, lengths + 3, source)


@pytest.mark.parametrize("name", ["1d", "lengths", "two-grids-and-context", "alone"])
def test_torchscript(name):
    module, x, context, lengths, source = build(name)
    scripted = torch.jit.script(module)
    got = scripted(x, context, lengths, source)
    assert_close(got, module(x, context, lengths, source), atol=1e-12, rtol=0)


def test_state_dict_and_repr():
    module = NeighborhoodCrossAttention2D(32, 4, 3, num_kv_heads=2, context_dim=20, source_dim=24)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {
        "q.weight": (32, 32),
        "q.bias": (32,),
        "kv.weight": (32, 24),
        "kv.bias": (32,),
        "context_kv.weight": (32, 20),
        "context_kv.bias": (32,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    assert "kernel_size=(3, 3), context_dim=20, source_dim=24" in repr(module)
    without = NeighborhoodCrossAttention2D(32, 4, 3)
    assert "context_kv.weight" not in without.state_dict()


def test_empty_context():
    module, x, _, _, _ = build("2d")
    empty = torch.zeros(BATCH, 0, CONTEXT, dtype=torch.float64)
    hidden = torch.zeros(BATCH, 4, CONTEXT, dtype=torch.float64)
    expected = module(x)
    assert_close(module(x, empty), expected, atol=1e-12, rtol=0)
    none = torch.zeros(BATCH, dtype=torch.int64)
    assert_close(module(x, hidden, none), expected)
    assert_close(module(x, empty, none), expected)


def test_empty_batch():
    module, x, context, lengths, _ = build("lengths")
    assert module(x[:0], context[:0]).shape == (0, *x.shape[1:])
    assert module(x[:0], context[:0], lengths[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize(
    ("shapes", "lengths", "message"),
    [
        (((2, 8, 32), None, None), None, "x must have 4 dimensions"),
        (((2, 8, 8, 32), (3, 5, 20), None), None, r"context must have the shape \[batch=2"),
        (((2, 8, 8, 32), (2, 5, 21), None), None, "context must have the shape"),
        (((2, 8, 8, 32), None, (2, 8, 8, 16)), None, "source must have 32 channels"),
        (((2, 8, 8, 32), None, (2, 8, 9, 32)), None, "source must have x's batch size and extents"),
        (((2, 8, 4, 32), None, None), None, "pad=True"),
        (((2, 8, 8, 32), None, None), [1, 2], "context_lengths was given without a context"),
        (((2, 8, 8, 32), (2, 5, 20), None), [1, 2, 3], "context_lengths must be 2 integers"),
        (((2, 8, 8, 32), (2, 5, 20), None), [1.0, 2.0], "context_lengths must be 2 integers"),
        (((2, 8, 8, 32), (2, 5, 20), None), [True, False], "context_lengths must be 2 integers"),
        (((2, 8, 8, 32), (2, 5, 20), None), [1j, 2j], "context_lengths must be 2 integers"),
        (((2, 8, 8, 32), (2, 5, 20), None), [1, 6], r"integers from 0 to 5, got \[1, 6\]"),
        (((2, 8, 8, 32), (2, 5, 20), None), [-1, 5], r"integers from 0 to 5, got \[-1, 5\]"),
    ],
)
def test_refused_inputs(shapes, lengths, message):
    module = NeighborhoodCrossAttention2D(32, 4, 5, context_dim=20)
    x, context, source = (None if s is None else torch.randn(s) for s in shapes)
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        module(x, context, lengths, source)


def test_context_needs_its_projection():
    module = NeighborhoodCrossAttention2D(32, 4, 5)
    with pytest.raises(ValueError, match="without context_dim"):
        module(torch.randn(1, 8, 8, 32), torch.randn(1, 5, 32))
