"""natten.nn self-attention against plain eager definitions, in float64."""

from __future__ import annotations

import copy
import pickle

import nn_eager
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import natten
from natten.nn import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodCrossAttention2D,
    RotaryEmbedding,
)

# TorchScript is deprecated, and timm's models are still expected to compile with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

DOUBLE = {"dtype": torch.float64}
RANKS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}

# name: extent, arguments, registers, origin
CASES = {
    "1d": ((11,), {"kernel_size": 5}, 0, None),
    "1d-even-strided": ((13,), {"kernel_size": 4, "stride": 3, "dilation": 2}, 0, None),
    "2d-odd": ((7, 9), {"kernel_size": 3}, 0, None),
    "2d-window-is-grid": ((4, 5), {"kernel_size": (4, 5)}, 0, None),
    "2d-per-axis": (
        (6, 11),
        {
            "kernel_size": (3, 4),
            "stride": (2, 1),
            "dilation": (2, 1),
            "is_causal": (False, True),
            "qk_scale": 0.3,
            "qkv_bias": False,
        },
        0,
        None,
    ),
    "3d-per-axis": (
        (4, 5, 3),
        {"kernel_size": (2, 5, 3), "dilation": (2, 1, 1), "is_causal": (True, False, False)},
        0,
        None,
    ),
    "rpb": ((7, 5), {"kernel_size": (3, 5), "dilation": (2, 1), "rel_pos_bias": True}, 0, None),
    "rpb-window-is-grid": ((4, 3), {"kernel_size": (4, 3), "rel_pos_bias": True}, 0, None),
    "gqa": ((6, 5), {"kernel_size": 3, "num_kv_heads": 2}, 0, None),
    "mqa-rpb": ((6, 5), {"kernel_size": 3, "num_kv_heads": 1, "rel_pos_bias": True}, 0, None),
    "qk-norm": ((5, 6), {"kernel_size": 3, "qk_norm": True}, 0, None),
    "rotary": ((5, 7), {"kernel_size": 3, "rotary": True}, 0, None),
    "rotary-dilated": (
        (7, 5),
        {"kernel_size": 3, "dilation": (2, 1), "rotary": True},
        0,
        [3, -2],
    ),
    "pad": ((3, 6), {"kernel_size": 5, "pad": True, "rel_pos_bias": True}, 0, None),
    "pad-dilated": ((5, 7), {"kernel_size": 3, "dilation": 3, "pad": True}, 0, None),
    "registers": ((5, 4), {"kernel_size": 3}, 3, None),
    "registers-1d": ((9,), {"kernel_size": 3, "dilation": 2, "rel_pos_bias": True}, 1, None),
    "everything": (
        (4, 7),
        {
            "kernel_size": (3, 5),
            "dilation": (2, 1),
            "stride": (1, 2),
            "rel_pos_bias": True,
            "num_kv_heads": 2,
            "qk_norm": True,
            "rotary": True,
            "pad": True,
        },
        2,
        [1, 2],
    ),
}


def build(extent, arguments, registers, dtype=torch.float64):
    torch.manual_seed(0)
    module = RANKS[len(extent)](32, 4, **arguments, dtype=dtype)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight") or name == "rpb":
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, *extent, 32, dtype=dtype, requires_grad=True)
    tokens = torch.randn(2, registers, 32, dtype=dtype, requires_grad=True) if registers else None
    return module, x, tokens


def run(module, x, tokens, origin=None, grid=None):
    result = module(x, tokens, origin, grid)
    return result if tokens is not None else (result, None)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_dense_definition(name):
    extent, arguments, registers, origin = CASES[name]
    module, x, tokens = build(extent, arguments, registers)
    out, out_r = run(module, x, tokens, origin)
    expected, expected_r, _ = nn_eager.self_attention(module, x, tokens, origin)
    assert_close(out, expected, atol=1e-10, rtol=0)
    loss, expected_loss = (out * out.detach().cos()).sum(), (expected * out.detach().cos()).sum()
    inputs = [x, *module.parameters()]
    if tokens is not None:
        assert_close(out_r, expected_r, atol=1e-10, rtol=0)
        loss, expected_loss = loss + out_r.sin().sum(), expected_loss + expected_r.sin().sum()
        inputs.append(tokens)
    for got, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs), strict=True
    ):
        assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_attention_map_is_the_row_of_weights(name):
    extent, arguments, registers, origin = CASES[name]
    module, x, tokens = build(extent, arguments, registers)
    positions = [[0] * len(extent), [n - 1 for n in extent], [n // 2 for n in extent]]
    got = module.attention_map(x, positions, tokens, origin)
    assert got.grid.shape == (2, 3, 4, *extent)
    assert not got.grid.requires_grad
    weights = nn_eager.self_attention(module, x, tokens, origin)[2]  # [B, H, N + R, N + R]
    needed = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padded = [max(a, b) for a, b in zip(extent, needed, strict=True)]
    n = torch.Size(padded).numel()
    rows = [torch.arange(n).view(padded)[tuple(p)].item() for p in positions]
    wanted = weights[:, :, rows].transpose(1, 2)
    grid = wanted[..., :n].unflatten(-1, padded)[(..., *(slice(0, m) for m in extent))]
    assert_close(got.grid, grid, atol=1e-12, rtol=0)
    if tokens is not None:
        assert_close(got.additional, wanted[..., n:], atol=1e-12, rtol=0)
        by_register = module.register_map(x, tokens, origin)
        wanted = weights[:, :, n:].transpose(1, 2)
        grid = wanted[..., :n].unflatten(-1, padded)[(..., *(slice(0, m) for m in extent))]
        assert_close(by_register.grid, grid, atol=1e-12, rtol=0)
        assert_close(by_register.additional, wanted[..., n:], atol=1e-12, rtol=0)
    else:
        assert got.additional is None


@pytest.mark.parametrize("name", ["2d-per-axis", "everything"])
def test_gradcheck(name):
    extent, arguments, registers, origin = CASES[name]
    module, x, tokens = build(extent, arguments, registers)
    x = x[:1].detach().requires_grad_()
    tokens = tokens[:1].detach().requires_grad_() if tokens is not None else None
    inputs = [t for t in (x, tokens) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, tokens=None: module(x, tokens, origin), inputs, fast_mode=True
    )


@pytest.mark.parametrize("name", ["2d-per-axis", "rpb", "gqa", "everything", "3d-per-axis"])
def test_dropout_of_weights(name):
    extent, arguments, registers, origin = CASES[name]
    module, x, tokens = build(extent, arguments, registers)
    dropping, _, _ = build(extent, {**arguments, "attn_drop": 0.4}, registers)
    fused = run(module, x, tokens, origin)
    # Evaluation does not drop and takes the fused path.
    dropping.eval()
    assert_close(run(dropping, x, tokens, origin), fused, atol=0, rtol=0)
    # The explicit path without dropping is the same function.
    dropping.train()
    dropping.attn_drop.p = 0.0
    explicit = run(dropping, x, tokens, origin)
    assert_close(explicit, fused, atol=1e-10, rtol=0)
    inputs = [x, *module.parameters()]
    wanted = torch.autograd.grad(fused[0].square().sum(), inputs)
    inputs = [x, *dropping.parameters()]
    got = torch.autograd.grad(explicit[0].square().sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, atol=1e-9, rtol=0)


def test_dropout_acts_on_normalized_weights():
    # With value = 1 and proj = identity, an output is the sum of the weights that are left, each
    # divided by 1 - p.
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 1, 3, attn_drop=0.25, qk_scale=0.0, dtype=torch.float64)
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.bias.fill_(1.0)
        module.proj.weight.copy_(torch.eye(8))
        module.proj.bias.zero_()
    out = module(torch.randn(4, 16, 16, 8, dtype=torch.float64))
    kept = out[..., 0] * 9 * 0.75
    assert_close(kept, kept.round(), atol=1e-9, rtol=0)
    assert kept.min() < 9
    assert abs(kept.mean() / 9 - 0.75) < 0.02
    module.eval()
    assert_close(
        module(torch.randn(1, 4, 4, 8, dtype=torch.float64)), torch.ones(1, 4, 4, 8).double()
    )


def test_query_key_and_value_are_views_of_one_tensor():
    module = NeighborhoodAttention2D(32, 4, 3, num_kv_heads=2)
    query, key, value = module._project(torch.randn(2, 5, 6, 32), None, True)
    storages = {t.untyped_storage().data_ptr() for t in (query, key, value)}
    assert len(storages) == 1
    assert query.stride(-2) == key.stride(-2) == 8
    assert query.stride(-3) == value.stride(-3) == 64


def test_forward_copies_nothing():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    calls: list = []
    module = NeighborhoodAttention2D(32, 4, 3, rel_pos_bias=True)
    x = torch.randn(2, 5, 6, 32)
    with Record():
        module(x)
    working = [f.overloadpacket for f in calls if not f.is_view]
    views = {torch.ops.aten.view, torch.ops.aten._unsafe_view}
    assert [f for f in working if f not in views] == [
        torch.ops.aten.addmm,
        torch.ops.natten.neighborhood_attention,
        torch.ops.aten.addmm,
    ]


def test_backward_concatenates_nothing():
    """The gradients of query, key and value are written into that of qkv."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    calls: list = []
    module = NeighborhoodAttention2D(32, 4, 3, num_kv_heads=2, rel_pos_bias=True)
    with Record():
        module(torch.randn(2, 5, 6, 32, requires_grad=True)).sum().backward()
    assert calls.count(torch.ops.natten.neighborhood_attention_backward) == 1
    copies = {"cat", "clone", "copy_", "slice_backward", "zeros", "stack"}
    assert not [f for f in calls if f._qualified_op_name.split("::")[1] in copies]


PACKED = {
    "plain": {},
    "rpb": {"rel_pos_bias": True},
    "grouped": {"num_kv_heads": 1, "rel_pos_bias": True},
    "strided": {"stride": 2, "dilation": (2, 1), "is_causal": (False, True)},
    "whole window": {"kernel_size": (6, 7)},
    "crop": {"rel_pos_bias": True},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_projection_equals_three_tensors(name):
    torch.manual_seed(0)
    options = {"kernel_size": 3, **PACKED[name]}
    module = NeighborhoodAttention2D(32, 4, **options, dtype=torch.float64)
    box = {"origin": [2, 1], "grid": [11, 9]} if name == "crop" else {}
    x = torch.randn(2, 6, 7, 32, dtype=torch.float64, requires_grad=True)

    def separately(x):
        query, key, value = module._project(x, None, True)
        out = module._attend(query, key, value, None, None, *box.values())
        return module._output(out)

    results = []
    for function in (lambda x: module(x, **box), separately):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_exports():
    module = NeighborhoodAttention2D(32, 4, 3, rel_pos_bias=True, rotary=True).eval()
    x = torch.randn(2, 5, 6, 32)
    assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_origin_of_a_crop():
    # A crop's queries and keys are rotated as they are in the whole grid.
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(32, 4, 3, dilation=2, rotary=True, dtype=torch.float64)
    x = torch.randn(1, 9, 12, 32, dtype=torch.float64)
    whole = module._project(x, None, True)
    crop = module._project(x[:, 2:8, 5:], [2, 5], True)
    for a, b in zip(crop, whole, strict=True):
        assert_close(a, b[:, 2:8, 5:], atol=1e-12, rtol=0)
    # And since angles are relative, a crop alone does not depend on where it was.
    assert_close(module(x, None, [100, -3]), module(x), atol=1e-10, rtol=0)


CROPS = {
    "1d-even-strided": [(3, 12)],
    "2d-per-axis": [(1, 6), (4, 9)],
    "3d-per-axis": [(1, 4), (0, 5), (0, 3)],
    "rpb": [(1, 7), (0, 5)],
    "rotary-dilated": [(1, 7), (0, 4)],
    "registers": [(1, 5), (0, 3)],
}


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", CROPS)
def test_crops_of_larger_grids(name, drop):
    whole, arguments, registers, _ = CASES[name]
    module, x, tokens = build(whole, {**arguments, "attn_drop": 0.5 * drop}, registers)
    if drop:
        module.attn_drop.p = 0.0
    box = tuple(slice(*edges) for edges in CROPS[name])
    origin = [edges[0] for edges in CROPS[name]]
    part = x[(slice(None), *box)]

    rank = len(whole)
    window = (whole, module.kernel_size, module.stride, module.dilation, module.is_causal)
    chosen = torch.arange(torch.Size(whole).numel()).view(whole)[box].flatten()
    mask = nn_eager.window_mask(*window)[chosen][:, chosen]
    bias = torch.zeros(4, *mask.shape, dtype=torch.float64)
    if module.rpb is not None:
        bias = nn_eager.window_bias(module.rpb, *window)[:, chosen][:, :, chosen]
    q, k, v = (t.flatten(1, rank)[:, chosen] for t in nn_eager.project(module, x, [0] * rank))
    if tokens is not None:
        mask = torch.nn.functional.pad(mask, (0, registers), value=True)
        bias = torch.nn.functional.pad(bias, (0, registers))
        _, k_r, v_r = nn_eager.project(module, tokens)
        k, v = torch.cat([k, k_r], 1), torch.cat([v, v_r], 1)
    expected, weights = nn_eager.attention(q, k, v, module.scale, mask, bias)
    expected = module.proj(expected.flatten(-2)).view(part.shape)

    out, _ = run(module, part, tokens, origin, whole)
    assert_close(out, expected, atol=1e-10, rtol=0)
    # Windows that lie inside of the crop give what they give in the whole grid.
    all_mask = nn_eager.window_mask(*window)[chosen]
    inside = all_mask.sum(1) == all_mask[:, chosen].sum(1)
    assert inside.any()
    complete, _ = run(module, x, tokens)
    complete = complete.flatten(1, rank)[:, chosen]
    assert_close(out.flatten(1, rank)[:, inside], complete[:, inside], atol=1e-10, rtol=0)

    positions = [[n - 1 for n in part.shape[1:-1]]]
    got = module.attention_map(part, positions, tokens, origin, whole)
    n = mask.shape[0]
    wanted = weights[:, :, -1]
    assert_close(got.grid.flatten(3)[:, 0], wanted[..., :n], atol=1e-12, rtol=0)
    if not drop and tokens is None:
        scripted = torch.jit.script(module)
        assert_close(scripted(part, None, origin, list(whole)), out, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("origin", "grid", "message"),
    [
        ([0], [9, 9], r"must have 2 values, got \[9, 9\] and \[0\]"),
        (None, [9], "must have 2 values"),
        ([4, 0], [9, 9], "6 tokens from origin 4 on are not inside the grid"),
        ([0, -1], [9, 9], "6 tokens from origin -1"),
        ([0, 0], [6, 6], "must be at most the 6 tokens of grid along axis 0"),
        (["0", "0"], [9, 9], "origin must be a list of 2 ints"),
        (0, [9, 9], "origin must be a list of 2 ints"),
        ([0, 0], 9, "grid must be a list of 2 ints, got 9"),
    ],
)
def test_refused_crops(origin, grid, message):
    module = NeighborhoodAttention2D(32, 4, 7)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(1, 6, 6, 32), None, origin, grid)


def test_shared_rotary():
    rotary = RotaryEmbedding(8, 2, theta=100.0)
    modules = [NeighborhoodAttention2D(32, 4, 3, rotary=rotary) for _ in range(2)]
    assert modules[0].rotary is modules[1].rotary
    with pytest.raises(ValueError, match="rotary must be of head_dim 16 and rank 2"):
        NeighborhoodAttention2D(32, 2, 3, rotary=rotary)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    extent, arguments, registers, origin = CASES["everything"]
    module, x, tokens = build(extent, arguments, registers)
    with torch.no_grad():
        expected = run(module, x, tokens, origin)
        half = copy.deepcopy(module).to(dtype)
        got = run(half, x.to(dtype), tokens.to(dtype), origin)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a.double(), b, atol=0.1, rtol=0)


def test_autocast():
    extent, arguments, registers, origin = CASES["everything"]
    module, x, tokens = build(extent, {**arguments}, registers, torch.float32)
    expected = run(module, x, tokens, origin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(module, x, tokens, origin)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a.float(), b, atol=0.1, rtol=0)
    got[0].float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
    module, x, tokens = build(extent, {**arguments, "attn_drop": 0.1}, registers, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(module, x, tokens, origin)
    got[0].float().square().sum().backward()


def test_meta_device():
    module = NeighborhoodAttention2D(
        32, 4, 3, rotary=True, qk_norm=True, rel_pos_bias=True, device="meta", dtype=torch.bfloat16
    )
    assert module(torch.empty(2, 6, 7, 32, device="meta", dtype=torch.bfloat16)).shape == (
        2,
        6,
        7,
        32,
    )
    # Moved off the meta device, the rotary table has its values again.
    module = module.to_empty(device="cpu")
    assert_close(module.rotary.frequencies, RotaryEmbedding(8, 2).frequencies)


def test_state_dict():
    plain = NeighborhoodAttention2D(32, 4, 7)
    assert list(plain.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert plain.qkv.weight.shape == (96, 32)
    module = NeighborhoodAttention2D(
        32, 4, (3, 5), rel_pos_bias=True, qk_norm=True, rotary=True, qkv_bias=False
    )
    state = module.state_dict()
    assert set(state) == {
        "rpb",
        "qkv.weight",
        "proj.weight",
        "proj.bias",
        "q_norm.weight",
        "k_norm.weight",
    }
    assert state["rpb"].shape == (4, 5, 9)
    assert 0.01 < state["rpb"].std() < 0.03
    other = NeighborhoodAttention2D(
        32, 4, (3, 5), rel_pos_bias=True, qk_norm=True, rotary=True, qkv_bias=False
    )
    other.load_state_dict(state, strict=True)
    x = torch.randn(1, 5, 6, 32)
    assert_close(other(x), module(x), atol=0, rtol=0)
    assert_close(pickle.loads(pickle.dumps(module))(x), module(x), atol=0, rtol=0)


def test_repr():
    module = NeighborhoodAttention2D(
        32, 4, (3, 5), dilation=(2, 1), rel_pos_bias=True, num_kv_heads=2, rotary=True, pad=True
    )
    text = repr(module)
    first = text.splitlines()[1].strip()
    assert first == (
        "embed_dim=32, num_heads=4, num_kv_heads=2, kernel_size=(3, 5), dilation=(2, 1), "
        "rel_pos_bias=True, pad=True"
    )
    assert "RotaryEmbedding(head_dim=8, rank=2" in text


def test_proj_drop_and_scale():
    module = NeighborhoodAttention1D(16, 2, 3, qk_scale=0.5, proj_drop=0.5)
    assert module.scale == 0.5
    assert NeighborhoodAttention1D(16, 2, 3).scale == 8**-0.5
    x = torch.randn(2, 64, 16)
    assert (module(x) == 0).float().mean() > 0.3
    module.eval()
    assert not (module(x) == 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 33}, "embed_dim must be a multiple of num_heads, got 33 and 4"),
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"embed_dim": 0}, "embed_dim must be a positive int, got 0"),
        ({"embed_dim": 32.0}, "embed_dim must be a positive int, got 32.0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive int, got 0"),
        ({"qk_scale": "a"}, "qk_scale must be a number or None, got 'a'"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must have 2 values"),
        ({"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"stride": 4}, "stride must be at most kernel_size"),
        ({"dilation": 0}, "dilation"),
        ({"is_causal": 1}, "is_causal"),
        ({"rel_pos_bias": True, "is_causal": True}, "rel_pos_bias=True needs is_causal=False"),
        ({"num_heads": 16, "rotary": True}, "head_dim must be even and at least 4"),
        ({"attn_drop": 1.5}, "dropout probability"),
        ({"attn_drop": -0.5}, "dropout probability"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**{"embed_dim": 32, "num_heads": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("shape", "registers", "message"),
    [
        ((2, 8, 32), None, r"x must have 4 dimensions.*got a tensor of shape \[2, 8, 32\]"),
        ((2, 8, 8, 4, 8), None, "x must have 4 dimensions"),
        ((2, 8, 8, 31), None, "x must have 32 channels"),
        ((2, 8, 4, 32), None, r"4 tokens along axis 1, fewer than .* = 5 \* 1 = 5; .*pad=True"),
        ((2, 8, 8, 32), (1, 3, 32), r"registers must have the shape \[batch=2"),
        ((2, 8, 8, 32), (2, 3, 16), "registers must have the shape"),
    ],
)
def test_refused_inputs(shape, registers, message):
    module = NeighborhoodAttention2D(32, 4, 5)
    tokens = None if registers is None else torch.randn(registers)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), tokens)


@pytest.mark.parametrize("arguments", [{}, {"attn_drop": 0.3}], ids=["fused", "dropout"])
def test_registers_are_earlier_than_a_causal_grid(arguments):
    module = NeighborhoodAttention2D(32, 4, (5, 3), is_causal=(True, False), **arguments, **DOUBLE)
    x, registers = torch.randn(1, 8, 4, 32, **DOUBLE), torch.randn(1, 3, 32, **DOUBLE)
    changed = x.clone()
    changed[:, 6:] += 1
    torch.manual_seed(0)
    out, of_registers = module.train()(x, registers)
    torch.manual_seed(0)
    other, also = module(changed, registers)
    assert torch.equal(of_registers, also)
    assert_close(out[:, :6], other[:, :6])
    # Among themselves they attend densely, and the grid attends to them.
    module.eval()
    q, k, v = (t[0] for t in module._project(registers, None, False))
    weights = (torch.einsum("ihd,jhd->hij", q, k) * module.scale).softmax(-1)
    want = module.proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    assert_close(module(x, registers)[1][0], want)
    assert not torch.equal(module(x, registers)[0], module(x, registers * 2)[0])
    with pytest.raises(NotImplementedError, match="not implemented for causal axes"):
        module.register_map(x, registers)


@pytest.mark.parametrize("kernel_size", [-1, (-1, 3), (3, -1)], ids=str)
@pytest.mark.parametrize("kind", ["packed", "separate", "cross"])
def test_whole_axes(kind, kernel_size):
    make = NeighborhoodCrossAttention2D if kind == "cross" else NeighborhoodAttention2D
    arguments = {"qk_norm": kind == "separate", "is_causal": (True, False), **DOUBLE}
    module = make(32, 4, kernel_size, **arguments).eval()
    assert str(kernel_size).strip("()") in repr(module)
    for extent in ((6, 5), (4, 7)):
        sizes = [n if k == -1 else k for n, k in zip(extent, module.kernel_size)]
        same = make(32, 4, sizes, **arguments).eval()
        same.load_state_dict(module.state_dict())
        x = torch.randn(2, *extent, 32, **DOUBLE)
        for f in (module, torch.compile(module, backend="eager"), torch.jit.script(module)):
            assert_close(f(x), same(x))
        maps = [m.attention_map(x, [[3, 2]]).grid for m in (module, same)]
        assert_close(*maps)
    torch.compiler.reset()  # it counts how often a function was compiled
    with pytest.raises(ValueError, match="rel_pos_bias=True needs a kernel_size"):
        make(32, 4, kernel_size, rel_pos_bias=True)
    with pytest.raises(ValueError, match="at least 1, or -1 for a whole axis"):
        make(32, 4, (0, 3))


def test_own_width_of_heads_scales_and_rotation():
    module = NeighborhoodAttention2D(
        30,
        4,
        3,
        head_dim=8,
        num_kv_heads=2,
        learned_scale=True,
        rotary=True,
        qk_scale=0.5,
        **DOUBLE,
    )
    assert module.qkv.out_features == 64
    assert module.proj.in_features == 32
    assert "head_dim=8" in repr(module)
    assert "learned_scale=True" in repr(module)
    x = torch.randn(2, 5, 6, 30, **DOUBLE)
    plain = NeighborhoodAttention2D(
        30, 4, 3, head_dim=8, num_kv_heads=2, qk_scale=0.5, rotary=module.rotary, **DOUBLE
    )
    with pytest.warns(UserWarning, match="logit_scale .* without learned_scale=True"):
        plain.load_state_dict(module.state_dict(), strict=False)
    assert_close(module(x), plain(x))
    plain.rotary = lambda t, origin: module.rotary(t, origin)  # a function instead of a module
    assert_close(plain(x, origin=[2, 1]), module(x, origin=[2, 1]))
    with torch.no_grad():
        module.logit_scale.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    query, key, value = plain._project(x, None, True)
    heads = []
    for head, scale in enumerate((0.1, 0.2, 0.3, 0.4)):
        q, kv = query[..., head : head + 1, :], slice(head // 2, head // 2 + 1)
        heads.append(natten.na2d(q, key[..., kv, :], value[..., kv, :], 3, scale=scale))
    assert_close(module(x), plain._output(torch.cat(heads, -2)))
    module(x).square().sum().backward()
    assert module.logit_scale.grad.abs().min() > 0
    assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("positions", [[[0, 8]], [[-1, 0]], [[0]], [0, 0], [[0.0, 1.0]]])
def test_refused_positions(positions):
    with pytest.raises(ValueError, match="positions must"):
        NeighborhoodAttention2D(32, 4, 5).attention_map(torch.randn(1, 8, 8, 32), positions)


def test_empty_batch():
    assert NeighborhoodAttention2D(32, 4, 5)(torch.randn(0, 8, 8, 32)).shape == (0, 8, 8, 32)


@pytest.mark.parametrize("name", ["2d-per-axis", "rpb", "everything"])
def test_compiles_as_one_graph(name):
    extent, arguments, registers, origin = CASES[name]
    module, x, tokens = build(extent, arguments, registers)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    result = compiled(x, tokens, origin)
    got = result if tokens is not None else (result, None)
    expected = run(module, x, tokens, origin)
    assert_close(got, expected, atol=1e-12, rtol=0)
    inputs = [x, *module.parameters()]
    wanted = torch.autograd.grad(expected[0].square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(got[0].square().sum(), inputs), wanted, strict=True):
        assert_close(a, b, atol=1e-10, rtol=0)


def test_compiles_with_dynamic_shapes():
    module = NeighborhoodAttention2D(32, 4, 3, rel_pos_bias=True, rotary=True, pad=True)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((2, 6, 7), (3, 9, 8), (1, 5, 11)):
        x = torch.randn(*shape, 32)
        assert_close(compiled(x), module(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["1d", "2d-per-axis", "3d-per-axis", "rpb", "gqa", "qk-norm", "rotary-dilated", "pad"]
)
def test_torchscript(name, tmp_path):
    extent, arguments, registers, origin = CASES[name]
    module, x, _ = build(extent, arguments, registers)
    scripted = torch.jit.script(module)
    expected = module(x, None, origin)
    got = scripted(x, None, origin)
    assert_close(got, expected, atol=1e-12, rtol=0)
    wanted = torch.autograd.grad(expected.sum(), x)
    assert_close(torch.autograd.grad(got.sum(), x), wanted, atol=1e-10, rtol=0)
    scripted.save(tmp_path / "module.pt")
    assert_close(torch.jit.load(tmp_path / "module.pt")(x, None, origin), expected)


def test_torchscript_refuses_registers():
    scripted = torch.jit.script(NeighborhoodAttention2D(32, 4, 3))
    with pytest.raises(torch.jit.Error, match="no attention with registers"):
        scripted(torch.randn(1, 4, 4, 32), torch.randn(1, 1, 32))


def test_torchscript_drops_no_weights_silently():
    module = NeighborhoodAttention2D(32, 4, 3, attn_drop=0.1)
    scripted = torch.jit.script(module)
    x = torch.randn(1, 4, 4, 32)
    with pytest.raises(torch.jit.Error, match="no dropout of attention weights"):
        scripted(x)
    assert_close(scripted.eval()(x), module.eval()(x))
