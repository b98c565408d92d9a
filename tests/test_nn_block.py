"""natten.nn blocks, tokenizers, downsamplers, stages and backbones."""

from __future__ import annotations

import nn_eager
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from natten.nn import (
    ConvDownsampler,
    ConvTokenizer,
    DropPath,
    GatedMlp,
    Mlp,
    NeighborhoodBackbone,
    NeighborhoodStage,
    NeighborhoodTransformerBlock,
    PatchMerging,
    PatchTokenizer,
)

# TorchScript is deprecated, and timm's models are still expected to compile with it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

DOUBLE = {"dtype": torch.float64}


def small_backbone(**arguments):
    torch.manual_seed(0)
    defaults = {
        "embed_dim": 16,
        "depths": (1, 2),
        "num_heads": (2, 4),
        "kernel_size": 3,
        "dilation": (1, (1, 2)),
        "pad": True,
        "mlp_ratio": 2,
    }
    return NeighborhoodBackbone(**{**defaults, **arguments})


# Blocks

BLOCKS = {
    "plain": ((5, 6), {"kernel_size": 3}, False, 0),
    "1d-gated": ((9,), {"kernel_size": 3, "gated_mlp": True, "is_causal": True}, False, 0),
    "3d": ((3, 4, 3), {"kernel_size": (3, 2, 3)}, False, 0),
    "nat": (
        (4, 6),
        {"kernel_size": 5, "rel_pos_bias": True, "layer_scale": 0.5, "pad": True},
        False,
        0,
    ),
    "adaptive": ((5, 6), {"kernel_size": 3, "cond_dim": 12, "rotary": True}, True, 0),
    "registers": ((5, 6), {"kernel_size": 3, "layer_scale": 0.5}, False, 2),
    "adaptive-registers": ((5, 6), {"kernel_size": 3, "cond_dim": 12, "gated_mlp": True}, True, 2),
}


def build_block(name, dtype=torch.float64):
    extent, arguments, has_cond, registers = BLOCKS[name]
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(32, 4, **arguments, rank=len(extent), dtype=dtype)
    for parameter in block.parameters():
        if parameter.dim() == 1 or "modulation" in name:
            nn.init.normal_(parameter)
    if has_cond:
        nn.init.normal_(block.modulation.linear.weight)

    def tensor(*shape):
        return torch.randn(2, *shape, dtype=dtype, requires_grad=True)

    cond = tensor(12) if has_cond else None
    return block, tensor(*extent, 32), cond, tensor(registers, 32) if registers else None


def eager_block(block, x, cond, registers):
    rank = x.dim() - 2
    values = None
    if cond is not None:
        values = F.silu(cond) @ block.modulation.linear.weight.T + block.modulation.linear.bias
        values = values.unflatten(-1, (6, 32))

    def like(v, t):
        return v.view(2, *[1] * (t.dim() - 2), 32)

    def norm(layer, t, first):
        t = F.layer_norm(t, (32,), layer.weight, layer.bias, 1e-5)
        if values is not None:
            t = t * (1 + like(values[:, first + 1], t)) + like(values[:, first], t)
        return t

    def add(t, branch, gamma, first):
        if gamma is not None:
            branch = gamma * branch
        if values is not None:
            branch = branch * like(values[:, first + 2], t)
        return t + branch

    def mlp(t):
        t = t @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        if isinstance(block.mlp, GatedMlp):
            n = t.shape[-1] // 2
            t = F.silu(t[..., :n]) * t[..., n:]
        else:
            t = F.gelu(t)
        return t @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

    tokens = None if registers is None else norm(block.norm1, registers, 0)
    origin = [0] * rank
    branch, branch_r, _ = nn_eager.self_attention(
        block.attn, norm(block.norm1, x, 0), tokens, origin
    )
    results = []
    for t, b in ((x, branch), (registers, branch_r)):
        if t is not None:
            t = add(t, b, block.gamma1, 0)
            t = add(t, mlp(norm(block.norm2, t, 3)), block.gamma2, 3)
            results.append(t)
    return results


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_the_definition(name):
    block, x, cond, registers = build_block(name)
    result = block(x, cond, registers)
    result = [result] if registers is None else list(result)
    expected = eager_block(block, x, cond, registers)
    assert_close(result, expected, atol=1e-9, rtol=0)
    inputs = [t for t in (x, cond, registers) if t is not None] + list(block.parameters())
    got = torch.autograd.grad(sum(t.sin().sum() for t in result), inputs)
    wanted = torch.autograd.grad(sum(t.sin().sum() for t in expected), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_compiles_as_one_graph(name):
    block, x, cond, registers = build_block(name)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert_close(compiled(x, cond, registers), block(x, cond, registers), atol=1e-12, rtol=0)


@pytest.mark.slow
def test_block_compiles_with_inductor():
    block, x, _, _ = build_block("nat", torch.float32)
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), block(x), atol=1e-4, rtol=0)


def test_block_names_are_those_of_the_checkpoints():
    block = NeighborhoodTransformerBlock(32, 4, 7, rel_pos_bias=True, layer_scale=1e-5)
    assert set(block.state_dict()) == {
        "gamma1",
        "gamma2",
        "norm1.weight",
        "norm1.bias",
        "attn.rpb",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    }
    assert (block.gamma1 == 1e-5).all()
    assert block.norm1.eps == 1e-5


def test_fresh_adaptive_block_is_the_identity():
    block = NeighborhoodTransformerBlock(32, 4, 3, cond_dim=8)
    assert block.norm1.weight is None
    x = torch.randn(2, 5, 6, 32)
    assert_close(block(x, torch.randn(2, 8)), x, atol=0, rtol=0)
    with pytest.raises(ValueError, match="needs cond"):
        block(x)
    with pytest.raises(ValueError, match="without cond_dim"):
        NeighborhoodTransformerBlock(32, 4, 3)(x, torch.randn(2, 8))


def test_gated_mlp_has_as_many_parameters():
    plain, gated = Mlp(96, 384, bias=False), GatedMlp(96, 256, bias=False)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in gated.parameters())


def test_drop_path():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    out = drop(x)
    assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (out == out[:, :1, :1]).all()
    assert abs((out[:, 0, 0] == 0).float().mean() - 0.25) < 0.03
    assert drop.eval()(x) is x
    assert isinstance(NeighborhoodTransformerBlock(32, 4, 3).drop_path, nn.Identity)
    with pytest.raises(ValueError, match="drop_prob must be in"):
        DropPath(1.0)


def test_drop_path_and_dropout_are_traced_in_training():
    block = NeighborhoodTransformerBlock(32, 4, 3, drop_path=0.5, drop=0.1)
    assert block.attn.proj_drop.p == block.mlp.drop.p == 0.1
    assert "DropPath(drop_prob=0.5)" in repr(block)
    torch.fx.symbolic_trace(block.drop_path)


# Tokenizers and downsamplers


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_tokenizer(rank):
    tokenizer = ConvTokenizer(3, 8, rank=rank, **DOUBLE)
    assert list(tokenizer.state_dict())[:3:2] == ["proj.0.weight", "proj.1.weight"]
    extent = (11, 8, 5)[:rank]
    x = torch.randn(2, 3, *extent, **DOUBLE)
    out = tokenizer(x)
    assert out.shape == (2, *[-(-n // 4) for n in extent], 8)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    for layer in tokenizer.proj:
        x = conv(x, layer.weight, layer.bias, stride=2, padding=1)
    x = F.layer_norm(x.movedim(1, -1), (8,), tokenizer.norm.weight, tokenizer.norm.bias, 1e-5)
    assert_close(out, x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_patch_tokenizer(rank):
    size = (4, 2, 3)[:rank]
    tokenizer = PatchTokenizer(3, 8, size, rank=rank, norm_layer=None, **DOUBLE)
    assert list(tokenizer.state_dict()) == ["proj.weight", "proj.bias"]
    extent = [2 * n - 1 for n in size]
    x = torch.randn(2, 3, *extent, **DOUBLE)
    out = tokenizer(x)
    assert out.shape == (2, *[2] * rank, 8)
    # The first patch is one product, and the last is padded with zeros.
    first = x[(..., *(slice(0, n) for n in size))]
    expected = torch.einsum("bi,oi->bo", first.flatten(1), tokenizer.proj.weight.flatten(1))
    assert_close(out[(slice(None), *[0] * rank)], expected + tokenizer.proj.bias)
    last = x[(..., *(slice(n, None) for n in size))]
    weight = tokenizer.proj.weight[(..., *(slice(0, n - 1) for n in size))]
    expected = torch.einsum("bi,oi->bo", last.flatten(1), weight.flatten(1))
    assert_close(out[(slice(None), *[1] * rank)], expected + tokenizer.proj.bias)
    with pytest.raises(ValueError, match="is not a multiple of the patch size"):
        PatchTokenizer(3, 8, size, rank=rank, pad=False, **DOUBLE)(x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_downsampler(rank):
    down = ConvDownsampler(8, rank=rank, **DOUBLE)
    assert set(down.state_dict()) == {"reduction.weight", "norm.weight", "norm.bias"}
    extent = (7, 6, 5)[:rank]
    x = torch.randn(2, *extent, 8, **DOUBLE)
    out = down(x)
    assert out.shape == (2, *[-(-n // 2) for n in extent], 16)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    x = conv(x.movedim(-1, 1), down.reduction.weight, stride=2, padding=1).movedim(1, -1)
    assert_close(out, F.layer_norm(x, (16,)))


def test_patch_merging_order_and_padding():
    merging = PatchMerging(4, **DOUBLE)
    shapes = {name: tuple(t.shape) for name, t in merging.state_dict().items()}
    assert shapes == {"norm.weight": (16,), "norm.bias": (16,), "reduction.weight": (8, 16)}
    x = torch.randn(2, 5, 4, 4, **DOUBLE)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    parts = [
        padded[:, 0::2, 0::2],
        padded[:, 1::2, 0::2],
        padded[:, 0::2, 1::2],
        padded[:, 1::2, 1::2],
    ]
    expected = F.layer_norm(torch.cat(parts, -1), (16,)) @ merging.reduction.weight.T
    assert_close(merging(x), expected)
    assert PatchMerging(4, 6, rank=3)(torch.randn(1, 3, 4, 5, 4)).shape == (1, 2, 2, 3, 6)
    assert PatchMerging(4, rank=1)(torch.randn(1, 3, 4)).shape == (1, 2, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvTokenizer(3, 9), "embed_dim must be even, got 9"),
        (lambda: ConvTokenizer(rank=4), "rank must be 1, 2 or 3, got 4"),
        (lambda: PatchTokenizer(patch_size=(4, 4, 4)), "patch_size must be one positive integer"),
        (lambda: PatchMerging(8, rank=0), "rank must be positive"),
        (lambda: NeighborhoodTransformerBlock(32, 4, rank=4), "rank must be 1, 2 or 3"),
        (
            lambda: NeighborhoodStage(32, 3, 4, 3, dilation=(1, 2, 3, 4)),
            "dilation must be one value",
        ),
        (lambda: NeighborhoodBackbone(depths=(1, 2)), "depths and num_heads"),
        (lambda: small_backbone(dilation=(1, 2, 3)), "an entry for each of 2 stages"),
    ],
)
def test_refused_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Stages and backbones


def test_stage():
    stage = NeighborhoodStage(
        32,
        3,
        4,
        3,
        dilation=(1, (2, 1), 2),
        drop_path=(0.0, 0.1, 0.2),
        downsample=ConvDownsampler(16),
        layer_scale=0.1,
    )
    assert [block.attn.dilation for block in stage.blocks] == [(1, 1), (2, 1), (2, 2)]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in stage.blocks] == [0.0, 0.1, 0.2]
    assert {name.split(".")[0] for name in stage.state_dict()} == {"blocks", "downsample"}
    x = torch.randn(2, 13, 14, 16)
    stage.eval()
    expected = stage.downsample(x)
    for block in stage.blocks:
        expected = block(expected)
    assert_close(stage(x), expected)


@pytest.mark.parametrize("registers", [0, 2])
def test_checkpointing_recomputes_and_changes_nothing(registers):
    torch.manual_seed(0)
    stage = NeighborhoodStage(16, 2, 2, 3, drop=0.2, drop_path=0.3, attn_drop=0.1, **DOUBLE)
    calls = []
    # Before the forward, since recomputation stops as soon as it has all it needs.
    stage.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 6, 16, **DOUBLE, requires_grad=True)
    tokens = torch.randn(2, registers, 16, **DOUBLE) if registers else None
    results = []
    for enabled in (False, True):
        stage.grad_checkpointing = enabled
        calls.clear()
        torch.manual_seed(1)
        out = stage(x, None, tokens)
        out = out if registers == 0 else torch.cat([t.flatten() for t in out])
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *stage.parameters()])))
        assert len(calls) == (2 if enabled else 1)
    assert_close(results[0], results[1])
    stage.eval()
    calls.clear()
    stage(x, None, tokens)[0].sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rank", "arguments"),
    [
        (1, {"rotary": True, "is_causal": True, "gated_mlp": True}),
        (2, {"rel_pos_bias": True, "layer_scale": 1e-5, "drop_path": 0.2}),
        (2, {"overlapping": False, "num_registers": 3, "qk_norm": True}),
        (3, {"kernel_size": (3, 2, 3), "cond_dim": 8, "num_registers": 1}),
    ],
)
def test_backbone(rank, arguments):
    backbone = small_backbone(rank=rank, **arguments)
    extent = (17, 14, 21)[:rank]
    x = torch.randn(2, 3, *extent)
    cond = torch.randn(2, 8) if "cond_dim" in arguments else None
    if cond is not None:
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.1)
    maps, registers = backbone.forward_features(x, cond)
    once = [-(-n // 4) for n in extent]
    twice = [-(-n // 2) for n in once]
    assert [tuple(m.shape) for m in maps] == [(2, *once, 16), (2, *twice, 32)]
    count = arguments.get("num_registers", 0)
    assert (registers is None) == (count == 0)
    loss = sum(m.square().sum() for m in maps)
    if registers is not None:
        assert registers.shape == (2, count, 32)
        loss = loss + registers.square().sum()
    loss.backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    backbone.eval()
    assert_close(backbone(x, cond), backbone.forward_features(x, cond)[0])
    twin = small_backbone(rank=rank, **arguments).eval()
    twin.load_state_dict(backbone.state_dict(), strict=True)
    assert_close(twin(x, cond), backbone(x, cond), atol=0, rtol=0)


def test_backbone_checkpointing():
    backbone = small_backbone(num_registers=2)
    x = torch.randn(2, 3, 17, 14)
    results = []
    for enabled in (False, True):
        backbone.set_grad_checkpointing(enabled)
        loss = sum(m.square().sum() for m in backbone(x))
        results.append(torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True))
    assert_close(results[0], results[1])


def test_backbone_compiles_as_one_graph():
    backbone = small_backbone(rel_pos_bias=True, num_registers=2, cond_dim=8).eval()
    x, cond = torch.randn(2, 3, 17, 14), torch.randn(2, 8)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    assert_close(compiled(x, cond), backbone(x, cond))


@pytest.mark.parametrize("arguments", [{}, {"overlapping": False, "rel_pos_bias": True}])
def test_backbone_scripts(arguments):
    backbone = small_backbone(**arguments).eval()
    x = torch.randn(2, 3, 17, 14)
    assert_close(torch.jit.script(backbone)(x), backbone(x))


def test_torchscript_refuses_registers():
    scripted = torch.jit.script(small_backbone(num_registers=2))
    with pytest.raises(torch.jit.Error, match="no attention with registers"):
        scripted(torch.randn(1, 3, 16, 16))


# Of torch's own GraphModule.
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("attention_is_a_leaf", [False, True])
@pytest.mark.parametrize("extras", [{}, {"rotary": True, "qk_norm": True, "num_registers": 2}])
def test_traces_symbolically(attention_is_a_leaf, extras):
    class Tracer(torch.fx.Tracer):
        # As timm does with modules it is told not to trace.
        def is_leaf_module(self, module, name):
            return (attention_is_a_leaf and hasattr(module, "kernel_size")) or (
                super().is_leaf_module(module, name)
            )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = small_backbone(overlapping=False, rel_pos_bias=True, **extras)

        def forward(self, x):
            return self.backbone(x)

    model = Model().eval()
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    for extent in ((17, 14), (24, 9)):
        x = torch.randn(2, 3, *extent)
        assert_close(graph(x), model(x))
    if attention_is_a_leaf and not extras:
        assert_close(torch.jit.script(graph)(x), model(x))


def test_meta_and_dtype():
    backbone = small_backbone(
        rotary=True, num_registers=1, layer_scale=0.1, device="meta", dtype=torch.bfloat16
    )
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    maps = backbone(torch.empty(2, 3, 16, 16, device="meta", dtype=torch.bfloat16))
    assert [m.shape[-1] for m in maps] == [16, 32]


def test_autocast():
    backbone = small_backbone(num_registers=1, rotary=True, qk_norm=True)
    x = torch.randn(2, 3, 17, 14)
    expected = backbone(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = backbone(x)
    for a, b in zip(got, expected, strict=True):
        assert_close(a.float(), b, atol=0.15, rtol=0)
    sum(m.float().square().sum() for m in got).backward()
