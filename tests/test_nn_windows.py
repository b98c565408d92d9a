"""Modules and models whose windows are cut to small grids, differ between groups of heads, or wrap
around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import natten
from natten.models._count import count_macs
from natten.models.denoiser import ImageDenoiser
from natten.models.isotropic import IsotropicNAT
from natten.models.nat import NAT
from natten.models.video import VideoDenoiser, VideoNAT
from natten.nn import (
    ConvTokenizer,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodBackbone,
    NeighborhoodCrossAttention2D,
    NeighborhoodStage,
    NeighborhoodTransformerBlock,
    PatchMerging,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
CLASSES = [NeighborhoodAttention2D, NeighborhoodCrossAttention2D]
# What it is cut to on a grid of 5 x 9 tokens.
CLIPPED = [
    ({"kernel_size": 7}, {"kernel_size": (5, 7)}),
    (
        {"kernel_size": (7, 3), "dilation": (6, 4), "stride": (3, 3)},
        {"kernel_size": (1, 2), "dilation": (5, 4), "stride": (1, 2)},
    ),
    ({"kernel_size": (-1, 3), "stride": (2, 1)}, {"kernel_size": (5, 3), "stride": (2, 1)}),
]


@pytest.mark.parametrize(("asked", "cut"), CLIPPED, ids=str)
@pytest.mark.parametrize("make", CLASSES)
def test_windows_are_cut_to_small_grids(
    make: Any, asked: dict[str, Any], cut: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    has_bias = -1 not in (asked["kernel_size"] if asked["kernel_size"] != 7 else ())
    module = make(16, 2, clip_window=True, rel_pos_bias=has_bias, **asked, **DOUBLE)
    same = make(16, 2, rel_pos_bias=has_bias, **cut, **DOUBLE)
    weights = module.state_dict()
    if has_bias:
        center = [(n + 1) // 2 - 1 for n in module.rpb.shape[1:]]
        middle = [slice(c + 1 - k, c + k) for c, k in zip(center, same.kernel_size)]
        weights["rpb"] = module.rpb[:, middle[0], middle[1]]
    same.load_state_dict(weights)
    x = torch.randn(2, 5, 9, 16, **DOUBLE)
    assert_close(module(x), same(x), **EXACT)
    assert_close(torch.jit.script(module)(x), same(x), **EXACT)
    maps = [m.attention_map(x, [[4, 8], [0, 3]]).grid for m in (module, same)]
    assert_close(*maps, **EXACT)
    # In a grid that it fits in, it is what it is.
    large = torch.randn(1, 42, 14, 16, **DOUBLE)
    plain = make(16, 2, rel_pos_bias=has_bias, **asked, **DOUBLE)
    plain.load_state_dict(module.state_dict())
    assert_close(module(large), plain(large), **EXACT)
    assert "clip_window=True" in repr(module)


def test_a_whole_dilation_group() -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention1D(8, 1, -1, dilation=3, **DOUBLE)
    same = NeighborhoodAttention1D(8, 1, 4, dilation=3, **DOUBLE)
    same.load_state_dict(module.state_dict())
    x = torch.randn(2, 12, 8, **DOUBLE)
    for f in (module, torch.jit.script(module)):
        assert_close(f(x), same(x), **EXACT)
    with pytest.raises(ValueError, match="dilation that divides its tokens, got dilation=3 for 13"):
        module(torch.randn(1, 13, 8, **DOUBLE))


GROUPS: list[dict[str, Any]] = [
    {"kernel_size": [(3, 3), (5, 7)]},
    {"kernel_size": [(2, 5), (5, 3)], "rel_pos_bias": True},
    {"kernel_size": [(9, 2), (5, 7)], "rel_pos_bias": True, "clip_window": True},
    {"kernel_size": [(3, None), (2, 3)], "stride": [(1, 1), (2, 1)], "dilation": [(1, 1), (2, 3)]},
    {"kernel_size": 3, "dilation": [(1, 1), (1, 2)], "rel_pos_bias": True},
    {"kernel_size": [(9, 9), (3, 20)], "clip_window": True, "rotary": True, "qk_norm": True},
    {"kernel_size": [(3, 3), (3, 5)], "sink": True, "softcap": 2.0, "num_kv_heads": 2},
]


@pytest.mark.parametrize("arguments", GROUPS, ids=str)
@pytest.mark.parametrize("make", CLASSES)
def test_groups_of_heads(make: Any, arguments: dict[str, Any]) -> None:
    """Each as a module of its heads alone, with the gradient of every parameter."""
    torch.manual_seed(0)
    module = make(32, 4, **arguments, **DOUBLE)
    kernel_size, stride, dilation = module.kernel_size, module.stride, module.dilation
    x = torch.randn(2, 6, 9, 32, **DOUBLE, requires_grad=True)
    args = (x, None, True) if make is NeighborhoodAttention2D else (x, None, None, None)
    query, key, value = module._project(*args)
    kv = module.num_kv_heads // 2
    parts = []
    for group in range(2):
        windows = [
            w[group] if isinstance(w[0], tuple) else w for w in (kernel_size, stride, dilation)
        ]
        heads, heads_kv = slice(2 * group, 2 * group + 2), slice(kv * group, kv * group + kv)
        rpb = module.rpb
        if rpb is not None:  # of the largest window
            rpb = rpb[
                (
                    slice(None),
                    *(
                        slice((n + 1) // 2 - k, (n + 1) // 2 + k - 1)
                        for n, k in zip(rpb.shape[1:], windows[0], strict=True)
                    ),
                )
            ]
        own = {"rpb": rpb, "sink": module.sink}
        parts.append(
            natten.na2d(
                query[..., heads, :], key[..., heads_kv, :], value[..., heads_kv, :], *windows,
                clip_window=module.clip_window, softcap=module.softcap,
                **{name: None if t is None else t[heads] for name, t in own.items()},
            )
        )  # fmt: skip
    expected = module.proj(torch.cat(parts, -2).flatten(-2))
    found = module(x)
    assert_close(found, expected, **EXACT)
    inputs = (x, *module.parameters())
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (found, expected)]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads_kv", [4, 1])
def test_attention_map_of_groups_of_heads(heads_kv: int) -> None:
    """The weights, times the values, are the attention."""
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(
        32, 4, [(3, 9), (5, 2)], (1, 2), [(2, 1), (1, 3)], num_kv_heads=heads_kv, clip_window=True,
        rel_pos_bias=True, softcap=2.0, sink=True, **DOUBLE,
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, registers = torch.randn(2, 6, 7, 32, **DOUBLE), torch.randn(2, 3, 32, **DOUBLE)
    expected, _ = module(x, registers)
    positions = torch.tensor([[0, 0], [5, 2], [3, 6]])
    grid, additional = module.attention_map(x, positions, registers)
    value = module._project(x, None, True)[2].repeat_interleave(4 // heads_kv, -2)
    more = module._project(registers, None, False)[2].repeat_interleave(4 // heads_kv, -2)
    out = torch.einsum("bphxy,bxyhd->bphd", grid, value)
    out = module.proj((out + torch.einsum("bphs,bshd->bphd", additional, more)).flatten(-2))
    assert_close(out, expected[:, positions[:, 0], positions[:, 1]], **EXACT)
    # Two windows, each of its own tokens.
    assert [(w > 0).any(0).sum().item() for w in (grid[0, 0, 0], grid[0, 0, 2])] == [7, 2]


def test_what_windows_of_modules_do_not_go_with() -> None:
    groups: Any = [(3, 3), (3, 5)]
    make = NeighborhoodAttention2D
    for arguments, message in (
        ({"kernel_size": groups * 2}, "4 windows for 2 and 2 heads"),
        ({"kernel_size": [(3, 3), (3, -1)], "rel_pos_bias": True}, "needs a kernel_size"),
        ({"kernel_size": 3, "dilation": [(1, 1), (2, 1)], "rotary": True}, "one dilation"),
        ({"kernel_size": 3, "clip_window": True, "pad": True}, "clipped to or padded"),
        ({"kernel_size": 3, "clip_window": 1}, "clip_window"),
        ({"kernel_size": [(3, 3), (3, 5, 7)]}, "one for each axis"),
        ({"kernel_size": groups, "stride": [(1, 1)] * 3}, "lists of as many windows"),
    ):
        with pytest.raises(ValueError, match=message):
            make(16, 2, **arguments)
    x = torch.randn(1, 6, 6, 16)
    module = make(16, 2, groups, attn_drop=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout .* groups of heads"):
        module(x)
    with pytest.raises(NotImplementedError, match="TorchScript has no windows of groups of heads"):
        torch.jit.script(torch.nn.Sequential(module))
    with pytest.raises(NotImplementedError, match="a stream is not implemented with clip"):
        make(16, 2, 3, is_causal=(True, False), clip_window=True).stream(x)
    with pytest.raises(ValueError, match="stride=1 along the first axis"):
        make(16, 2, 3, [(1, 1), (2, 1)], is_causal=(True, False)).stream(x)
    # Set one by one, they are checked when the module is called.
    module = make(16, 4, 3)
    module.kernel_size = [(3, 3), (5, 5)]
    assert module.eval()(x).shape == x.shape
    assert "kernel_size=((3, 3), (5, 5))" in repr(module)
    module.kernel_size = [(3, 3)] * 3
    with pytest.raises(ValueError, match="3 windows for 4 and 4 heads"):
        module(x)
    with pytest.raises(ValueError, match="stride must be at most kernel_size"):
        make(16, 4, 3, 4)
    padded = make(16, 2, [(3, 3), (2, 9)], pad=True, qkv_bias=False, rotary=True)
    assert padded(x).shape == x.shape


def test_attention_with_dropout_in_small_grids() -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(
        16, 2, 7, clip_window=True, rel_pos_bias=True, attn_drop=0.5, **DOUBLE
    )
    x = torch.randn(1, 4, 9, 16, **DOUBLE)
    expected = module.eval()(x)
    module.train()
    mean = torch.stack([module(x) for _ in range(500)]).mean(0)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


def test_stages_and_models_take_them() -> None:
    groups = [(3, 3), (5, 5)]
    stage = NeighborhoodStage(16, 2, 2, [groups, 3], clip_window=True)
    assert [b.attn.kernel_size for b in stage.blocks] == [((3, 3), (5, 5)), (3, 3)]
    assert stage(torch.randn(1, 4, 7, 16)).shape == (1, 4, 7, 16)
    sizes = [[groups, groups], [3, (7, 5)]]
    shared: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    torch.manual_seed(0)
    nat = NAT(num_classes=3, kernel_size=7, clip_window=True, **shared).double().eval()
    # 4 x 6 and 2 x 3 tokens: as with windows of that size.
    fitted: Any = [[(4, 6)] * 2, [(2, 3)] * 2]
    same = NAT(num_classes=3, kernel_size=fitted, **shared).double().eval()
    weights = nat.state_dict()
    for name, bias in same.state_dict().items():
        if name.endswith("rpb"):
            weights[name] = weights[name][
                (..., *(slice(7 - (n + 1) // 2, 6 + (n + 1) // 2) for n in bias.shape[1:]))
            ]
    same.load_state_dict(weights)
    images = torch.randn(2, 3, 16, 24, **DOUBLE)
    assert_close(nat(images), same(images), **EXACT)
    clips = torch.randn(1, 3, 2, 16, 24)
    video = VideoNAT(
        num_classes=3, kernel_size=[[(2, 3, 3), (2, 3, 3)], 5], clip_window=True, **shared
    )
    assert video(clips).shape == (1, 3)
    backbone = NeighborhoodBackbone(3, 16, (2, 2), (2, 2), sizes, clip_window=True)
    assert [f.shape[1:3] for f in backbone(images.float())] == [(4, 6), (2, 3)]


def _rolled(model: Any, x: Tensor, pixels: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Rolling the input rolls the output."""
    axes = [axis + 2 for axis in range(len(pixels))]
    found = model(x.roll(pixels, axes))
    expected = model(x).roll(tokens, [axis - 1 for axis in axes])
    assert expected.abs().max() > 0.1
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rings_of_models() -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    ring = (True, False, True)
    video = VideoNAT(is_circular=ring, kernel_size=(2, 3, 3), **shared).double().eval()
    assert video.levels[0].blocks[0].attn.rotary.is_circular == ring
    clips = torch.randn(1, 3, 4, 20, 32, **DOUBLE)
    _rolled(video.forward_features, clips, (1, 0, 16), (1, 0, 2))
    with pytest.raises(ValueError, match="a circular axis is not padded, got extent 36 of axis 2"):
        VideoNAT(is_circular=ring, patch_size=(1, 4, 8), **shared)(torch.randn(1, 3, 4, 16, 36))
    with pytest.raises(ValueError, match="a circular axis is not padded, got extent 5 of axis 2"):
        VideoNAT(is_circular=ring, kernel_size=2, **shared)(torch.randn(1, 3, 4, 16, 20))
    with pytest.raises(ValueError, match="causal or circular but not both"):
        VideoNAT(is_circular=ring, is_causal=True, **shared)
    for stem in ("conv", "patch"):
        nat = NAT(is_circular=(False, True), kernel_size=3, stem=stem, **shared).double().eval()
        _rolled(nat.forward_features, torch.randn(2, 3, 21, 48, **DOUBLE), (0, 8), (0, 1))
    denoiser = VideoDenoiser(
        embed_dim=24, depth=2, num_heads=2, kernel_size=3, is_circular=(False, True, True)
    )
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moved = denoiser.double()(torch.randn(1, 3, 2, 8, 12, **DOUBLE)).movedim(1, -1)
    assert moved.shape == (1, 2, 8, 12, 3)
    _rolled(
        lambda x: denoiser(x).movedim(1, -1),
        torch.randn(1, 3, 3, 8, 12, **DOUBLE), (0, 2, 4), (0, 2, 4),
    )  # fmt: skip
    isotropic = IsotropicNAT(
        embed_dim=16, depth=2, num_heads=2, patch_size=4, kernel_size=3, dilations=(1, 2),
        is_circular=(False, True),
    ).double()  # fmt: skip
    _rolled(isotropic.forward_features, torch.randn(2, 3, 22, 24, **DOUBLE), (0, 8), (0, 2))
    with pytest.raises(ValueError, match="a circular axis is not padded, got extent 22"):
        isotropic(torch.randn(1, 3, 24, 22, **DOUBLE))
    for ring in ((False, True), True):
        cleaner = ImageDenoiser(
            embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, is_circular=ring
        ).double()
        pixels = (4 if ring is True else 0, 8)
        image = torch.rand(1, 3, 12 if ring is True else 11, 20, **DOUBLE)
        _rolled(lambda x: cleaner(x).movedim(1, -1), image, pixels, pixels)  # noqa: B023
        with pytest.raises(ValueError, match="a circular axis is not padded"):
            cleaner(image[..., 1:])
    stage = NeighborhoodStage(
        32, 1, 2, 3, rank=1, rotary=True, is_circular=True,
        downsample=PatchMerging(16, rank=1, is_circular=True),
    ).double()  # fmt: skip
    _rolled(lambda x: stage(x.movedim(1, -1)), torch.randn(1, 16, 12, **DOUBLE), (4,), (2,))
    backbone = NeighborhoodBackbone(
        2, 16, (1, 1), (2, 2), 3, rank=1, is_circular=True, rotary=True
    ).double()
    _rolled(lambda x: backbone(x)[1], torch.randn(1, 2, 64, **DOUBLE), (8,), (1,))
    script = torch.jit.script(backbone)
    x = torch.randn(1, 2, 64, **DOUBLE)
    assert_close(script(x)[1], backbone(x)[1], **EXACT)
    with pytest.raises(ValueError, match="got extent 63 of axis 0, which is no multiple of 2"):
        backbone(x[..., 1:])
    plain, wrapping = (ConvTokenizer(3, 8, is_circular=flag).double() for flag in (False, True))
    wrapping.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 16, 12, **DOUBLE)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    assert_close(wrapping(image)[inner], plain(image)[inner], **EXACT)


FEATURES: dict[str, dict[str, Any]] = {
    "clip_window": {"kernel_size": 9, "clip_window": True, "rel_pos_bias": True},
    "groups": {"kernel_size": [(3, 3), (5, 3)]},
    "is_circular": {"kernel_size": 3, "is_circular": (False, True), "rotary": True},
    "whole axis": {"kernel_size": (3, -1)},
    "scores": {"kernel_size": 3, "sink": True, "softcap": 5.0},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_programs_of_blocks(feature: str) -> None:
    """torch.compile, torch.export and functionalize of each."""
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(16, 2, **FEATURES[feature], **DOUBLE).eval()
    x = torch.randn(2, 6, 8, 16, **DOUBLE)
    expected = block(x)
    torch.compiler.reset()  # it counts how often a function was compiled
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected, **EXACT)
    gradients = [torch.autograd.grad(f(x).sum(), block.parameters()) for f in (compiled, block)]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()
    program = torch.export.export(block, (x,))
    assert_close(program.module()(x), expected, **EXACT)
    assert_close(torch.func.functionalize(block)(x), expected, **EXACT)


def test_programs_of_upsampling() -> None:
    torch.manual_seed(0)
    module = NeighborhoodCrossAttention2D(16, 2, 3, upsampling=2, clip_window=True, **DOUBLE)
    source = torch.randn(1, 2, 5, 16, **DOUBLE)
    x = torch.randn(1, 4, 10, 16, **DOUBLE)
    expected = module(x, source=source)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, source=source), expected, **EXACT)
    torch.compiler.reset()
    program = torch.export.export(module, (x,), {"source": source})
    assert_close(program.module()(x, source=source), expected, **EXACT)
    assert_close(torch.func.functionalize(module)(x, None, None, source), expected, **EXACT)


def test_older_arguments_and_newer_ones() -> None:
    """Older names of arguments go with windows that older versions had not."""
    older = NeighborhoodAttention2D(
        dim=16, num_heads=2, kernel_size=[(3, 3), (3, 5)], use_experimental_ops=True
    )
    assert older.kernel_size == ((3, 3), (3, 5))
    module = NeighborhoodAttention3D(
        16, 2, kernel_size=7, kernel_size_d=3, clip_window=True, pad=False
    )
    assert module(torch.randn(1, 2, 4, 5, 16)).shape == (1, 2, 4, 5, 16)


def test_multiplications_of_a_model_are_counted() -> None:
    shared: dict[str, Any] = {"embed_dim": 16, "depths": (1,), "num_heads": (2,), "num_classes": 0}
    sizes: Any = {"clipped": 9, "small": 4, "groups": [[[(4, 4), (2, 4)]]]}
    counts = {}
    for name, kernel_size in sizes.items():
        model = NAT(kernel_size=kernel_size, clip_window=name == "clipped", **shared)
        counts[name] = count_macs(model, (3, 16, 16))
    assert counts["clipped"] == counts["small"]
    assert counts["small"] - counts["groups"] == 2 * 16 * 8 * 8  # half of the heads, half as many
