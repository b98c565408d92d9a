"""Streams equal the whole grid; contexts, conditions and upsamplers of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natten.nn
from natten.nn import (
    ChannelsFirst,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodBackbone,
    NeighborhoodCrossAttention2D,
    NeighborhoodStage,
    NeighborhoodTransformerBlock,
    PatchExpanding,
    PatchMerging,
)

DOUBLE = {"dtype": torch.float64}


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, **DOUBLE)


FRAMES = {"is_causal": (True, False, False), "rank": 3, "rotary": True}
# name: module, extents, further arguments of the calls, whether they vary over frames
STREAMED = {
    "tokens": (lambda: NeighborhoodAttention1D(16, 2, 4, 1, 2, True, **DOUBLE), (11,), {}),
    "everything-before": (
        lambda: NeighborhoodAttention1D(16, 2, -1, is_causal=True, rotary=True, **DOUBLE), (7,), {},
    ),
    "frames": (
        lambda: NeighborhoodAttention3D(
            24, 2, (3, 5, 2), stride=(1, 2, 1), dilation=(2, 1, 1), is_causal=(True, False, True),
            num_kv_heads=1, qk_norm=True, rotary=True, pad=True, learned_scale=True, **DOUBLE,
        ), (9, 4, 5), {},
    ),
    "groups-of-heads": (
        lambda: NeighborhoodAttention2D(
            24, 3, [(2, 5), (4, 2), (-1, 3)], [(1, 1), (1, 2), (1, 1)], [(3, 1), (1, 2), (1, 1)],
            is_causal=(True, False), num_kv_heads=1, pad=True, **DOUBLE,
        ), (11, 4), {},
    ),
    "groups-and-registers": (
        lambda: NeighborhoodAttention2D(
            16, 2, [(2, 3), (3, 2)], is_causal=(True, False), rotary=True, sink=True, **DOUBLE
        ), (9, 3), {"registers": tensor(2, 2, 16)},
    ),
    "cross-groups": (
        lambda: NeighborhoodCrossAttention2D(
            16, 2, [(2, 3), (4, 2)], dilation=[(3, 1), (1, 1)], is_causal=(True, False),
            context_dim=6, **DOUBLE,
        ), (9, 4), {"context": tensor(2, 5, 6)},
    ),
    "attention-registers": (
        lambda: NeighborhoodAttention3D(24, 2, 3, is_causal=(True, False, False), **DOUBLE),
        (5, 3, 4), {"registers": tensor(2, 2, 24)},
    ),
    "cross": (
        lambda: NeighborhoodCrossAttention2D(
            16, 2, (-1, 3), is_causal=(True, False), context_dim=6, rotary=True, **DOUBLE
        ), (6, 4), {"context": tensor(2, 5, 6), "context_lengths": torch.tensor([3, 5])},
    ),
    "block-registers": (
        lambda: NeighborhoodTransformerBlock(24, 2, 3, **FRAMES, layer_scale=0.5, **DOUBLE),
        (5, 3, 4), {"registers": tensor(2, 2, 24)},
    ),
    "block-context": (
        lambda: NeighborhoodTransformerBlock(
            24, 2, 3, **FRAMES, context_dim=6, cond_dim=5, gated_mlp=True, **DOUBLE
        ), (5, 3, 4), {"context": tensor(2, 5, 6), "cond": tensor(2, 5)},
    ),
    "block-cond-of-frames": (
        lambda: NeighborhoodTransformerBlock(24, 2, 3, **FRAMES, cond_dim=5, **DOUBLE),
        (6, 3, 4), {"cond": tensor(2, 6, 1, 4, 5)},
    ),
    "stage": (
        lambda: NeighborhoodStage(
            24, 3, 2, ((2, 3, 2), (-1, 3, 3), 3), (1, 1, (2, 1, 1)), **FRAMES,
            downsample=PatchMerging(12, rank=3, strides=(1, 2, 2), **DOUBLE), **DOUBLE,
        ), (7, 6, 7), {},
    ),
}  # fmt: skip


def parts_of(arguments: dict, first: int, count: int) -> dict:
    """Arguments of some frames: a condition with an axis of frames varies over them."""
    cond = arguments.get("cond")
    if cond is None or cond.dim() == 2:
        return arguments
    return {**arguments, "cond": cond[:, first : first + count]}


@pytest.mark.parametrize("name", STREAMED)
def test_streams_equal_the_grid(name: str) -> None:
    make, extent, arguments = STREAMED[name]
    module = randomized(make())
    channels = 12 if name == "stage" else module.embed_dim
    x = tensor(2, *extent, channels)
    want = module(x, **arguments)
    for sizes in ([1] * extent[0], [3, 1, extent[0] - 4]):
        state, results, first = None, [], 0
        for part in x.split(sizes, dim=1):
            before = None if state is None else [key.clone() for key in state.keys]
            result, after = module.stream(part, state, **parts_of(arguments, first, part.shape[1]))
            if state is not None:
                assert all(torch.equal(a, b) for a, b in zip(before, state.keys, strict=True))
            state, first = after, first + part.shape[1]
            if "registers" in arguments:
                result, registers = result
                assert_close(registers, want[1])
            results.append(result)
        got = torch.cat(results, 1)
        assert_close(got, want[0] if "registers" in arguments else want)
    assert state.frames == extent[0]
    assert len(state.keys) == (3 if name == "stage" else 1)
    for key, attn in zip(state.keys, (m for m in module.modules() if hasattr(m, "rpb"))):
        windows = attn.head_windows()
        reach = max((size[0] - 1) * dilation[0] for size, _, dilation in windows)
        whole = any(size[0] == -1 for size, *_ in windows)
        assert key.shape[1] == (extent[0] if whole else min(reach, extent[0]))


def test_state_moves_and_sizes_stay() -> None:
    module = randomized(NeighborhoodAttention3D(16, 2, 3, is_causal=(True, False, False)))
    _, state = module.stream(torch.randn(2, 1, 4, 5, 16))
    moved = state.to("meta", torch.bfloat16)
    assert {t.device.type for t in moved.keys + moved.values} == {"meta"}
    assert {t.dtype for t in moved.keys + moved.values} == {torch.bfloat16}
    assert (moved.frames, state.keys[0].device.type) == (1, "cpu")
    state.feature_sum = torch.ones(2, 3)
    assert state.to(torch.float64).feature_sum.dtype == torch.float64
    for shape in ((2, 1, 5, 4, 16), (1, 1, 4, 5, 16)):
        with pytest.raises(ValueError, match="must keep their batch size and extents, got batch"):
            module.stream(torch.randn(shape), state)


def test_refused_streams() -> None:
    x = torch.randn(1, 4, 4, 4, 16)
    with pytest.raises(ValueError, match=r"a stream needs is_causal=True and stride=1 along"):
        NeighborhoodAttention3D(16, 2, 3, is_causal=(False, True, True)).stream(x)
    causal = {"is_causal": (True, False, False)}
    with pytest.raises(ValueError, match="stride=1 along the first axis"):
        NeighborhoodAttention3D(16, 2, 3, stride=(2, 1, 1), **causal).stream(x)
    with pytest.raises(NotImplementedError, match="dropout of attention weights"):
        NeighborhoodAttention3D(16, 2, 3, attn_drop=0.1, **causal).stream(x)
    stage = NeighborhoodStage(
        16, 1, 2, 3, rank=3, downsample=PatchMerging(16, 16, rank=3), **causal
    )
    with pytest.raises(ValueError, match="needs a downsampler with stride 1"):
        stage.stream(x)


# --- contexts and conditions


def test_context_in_blocks_stages_and_backbones() -> None:
    block = randomized(NeighborhoodTransformerBlock(16, 2, 3, context_dim=6, **DOUBLE))
    x, context = tensor(2, 5, 6, 16), tensor(2, 4, 6)
    branch = block.attn(block.norm1(x), context)
    want = x + branch
    want = want + block.mlp(block.norm2(want))
    assert_close(block(x, context=context), want)
    lengths = torch.tensor([2, 4])
    assert_close(
        block(x, context=context, context_lengths=lengths)[:1],
        block(x[:1], context=context[:1, :2]),
    )
    with pytest.warns((FutureWarning, DeprecationWarning)):
        scripted = torch.jit.script(block)
    assert_close(scripted(x, None, None, context), want)
    backbone = randomized(NeighborhoodBackbone(3, 16, (1, 1), (1, 1), 3, context_dim=6, **DOUBLE))
    image = tensor(2, 3, 24, 28)
    maps = backbone(image, context=context)
    assert not torch.equal(maps[1], backbone(image)[1])
    with pytest.raises(ValueError, match="registers were given to a block with context_dim"):
        block(x, None, tensor(2, 1, 16), context)
    plain = NeighborhoodTransformerBlock(16, 2, 3, **DOUBLE)
    with pytest.raises(ValueError, match="a context was given to a block without context_dim"):
        plain(x, context=context)
    with pytest.warns(UserWarning, match=r"attn\.context_kv\.weight .* without context_dim"):
        plain.load_state_dict(block.state_dict(), strict=False)


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 5, 1), (1, 5, 6), (2, 1, 6)], ids=str)
def test_conditions_that_vary_over_the_grid(shape: tuple[int, ...]) -> None:
    block = randomized(NeighborhoodTransformerBlock(16, 2, 3, cond_dim=4, rotary=True, **DOUBLE))
    x, cond = tensor(2, 5, 6, 16), tensor(*shape, 4)
    out = block(x, cond)
    assert_close(block(x, cond.expand(2, 5, 6, 4)), out)
    if shape == (2, 1, 1):
        assert_close(block(x, cond[:, 0, 0]), out)
    else:
        assert not torch.allclose(block(x, cond.roll(1, -1)), out)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert_close(compiled(x, cond), out)
    torch.compiler.reset()  # it counts how often a function was compiled
    assert_close(torch.fx.symbolic_trace(block)(x, cond), out)
    for bad in (tensor(2, 3, 6, 4), tensor(2, 5, 4), tensor(2, 1, 1, 3)):
        with pytest.raises(
            ValueError, match=r"cond must have the shape .* it may vary over the grid"
        ):
            block(x, bad)
    with pytest.raises(ValueError, match="without registers it may vary over the grid"):
        block(x, cond, tensor(2, 1, 16))


def test_norms_of_conditioned_blocks() -> None:
    from timm.layers import RmsNorm

    for norm_layer in (nn.RMSNorm, RmsNorm):
        block = NeighborhoodTransformerBlock(16, 2, 3, cond_dim=4, norm_layer=norm_layer)
        assert isinstance(block.norm1, norm_layer)
        assert not list(block.norm1.parameters())
    with pytest.raises(ValueError, match="must take elementwise_affine"):
        NeighborhoodTransformerBlock(16, 2, 3, cond_dim=4, norm_layer=lambda n, device, dtype: None)


# --- up and down


@pytest.mark.parametrize(
    ("rank", "strides"), [(1, 2), (2, (2, 3)), (3, (1, 2, 2)), (3, 2)], ids=str
)
def test_expanding_is_the_way_back(rank: int, strides) -> None:
    """What merging puts into channels, expanding puts back, odd extents too."""
    extent = (3, 5, 7)[:rank]
    x = tensor(2, *extent, 4)
    merging = PatchMerging(4, rank=rank, strides=strides, norm_layer=None, **DOUBLE)
    count = merging.reduction.in_features // 4
    merging = PatchMerging(4, 4 * count, rank=rank, strides=strides, norm_layer=None, **DOUBLE)
    expanding = PatchExpanding(4 * count, 4, rank=rank, strides=strides, norm_layer=None, **DOUBLE)
    with torch.no_grad():
        for linear in (merging.reduction, expanding.expansion):
            linear.weight.copy_(torch.eye(4 * count))
    merged = merging(x)
    assert_close(expanding(merged, list(extent)), x)
    assert expanding(merged).shape[1:-1] == tuple(
        n * s for n, s in zip(merged.shape[1:-1], expanding.strides)
    )
    with pytest.raises(ValueError, match="extent must be at most"):
        expanding(merged, [99] * rank)
    with pytest.warns((FutureWarning, DeprecationWarning)):
        scripted = torch.jit.script(expanding)
    assert_close(scripted(merged, list(extent)), x)
    graph = torch.fx.symbolic_trace(expanding)
    assert_close(graph(merged), expanding(merged))


def test_merging_of_frames_is_merging_of_images() -> None:
    frames = PatchMerging(8, rank=3, strides=(1, 2, 2), **DOUBLE)
    images = PatchMerging(8, **DOUBLE)
    images.load_state_dict(frames.state_dict())
    x = tensor(2, 3, 5, 6, 8)
    assert_close(frames(x), images(x.flatten(0, 1)).unflatten(0, (2, 3)))
    down = natten.nn.ConvDownsampler(8, rank=3, strides=(1, 2, 2), **DOUBLE)
    changed = x.clone()
    changed[:, 1] = 0
    assert torch.equal(down(changed)[:, [0, 2]], down(x)[:, [0, 2]])


def test_channels_first() -> None:
    block = NeighborhoodTransformerBlock(16, 2, 3, cond_dim=4)
    x, cond = torch.randn(2, 16, 5, 6), torch.randn(2, 4)
    assert_close(
        ChannelsFirst(block)(x, cond), block(x.permute(0, 2, 3, 1), cond).permute(0, 3, 1, 2)
    )
    with pytest.raises(ValueError, match="x must have 16 channels"):
        ChannelsFirst(block)(x.permute(0, 2, 3, 1), cond)
