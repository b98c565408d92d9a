"""Modules, blocks, stages and models of grids of different sizes in one batch: each as alone."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.testing import assert_close

import natten.models
from natten import GridLayout
from natten.models.denoiser import ImageDenoiser
from natten.models.isotropic import IsotropicNAT
from natten.models.nat import NAT
from natten.models.video import VideoDenoiser, VideoNAT
from natten.nn import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodBackbone,
    NeighborhoodCrossAttention2D,
    NeighborhoodStage,
    NeighborhoodTransformerBlock,
    PatchMerging,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(5, 8), (9, 6), (9, 6), (2, 12)]
LAYOUT = GridLayout(SIZES)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 2},
    "strided": {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (1, 2)},
    "clipped": {"kernel_size": 5, "clip_window": True, "rel_pos_bias": True},
    "whole": {"kernel_size": (-1, 3), "is_causal": (False, True)},
    "padded": {"kernel_size": (3, 7), "pad": True, "rel_pos_bias": True},
    "groups": {"kernel_size": [(2, 2), (2, 5)], "rotary": True},
    "circular": {"kernel_size": 2, "is_circular": (False, True), "rotary": True},
    "scores": {"kernel_size": 2, "qk_norm": True, "sink": True, "softcap": 3.0, "num_kv_heads": 1},
}


def _same_as_alone(module: Any, x: Tensor, mask: Tensor | None = None) -> None:
    """The results, and the gradients of everything."""
    inputs = (x, *module.parameters())
    masks = [None] * len(SIZES) if mask is None else LAYOUT.unpack(mask)
    found = module(x, mask=mask, layout=LAYOUT)
    each = [
        module(grid[None], mask=None if valid is None else valid[None])[0]
        for grid, valid in zip(LAYOUT.unpack(x), masks, strict=True)
    ]
    alone = LAYOUT.pack(each)
    assert_close(found, alone, **EXACT)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (found, alone)]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_attention(setting: str) -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(16, 2, **SETTINGS[setting], **DOUBLE)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE, requires_grad=True)
    _same_as_alone(module, x)
    mask = torch.rand(1, LAYOUT.total) < 0.7
    _same_as_alone(module, x, mask)


@pytest.mark.parametrize("setting", ["clipped", "padded", "circular"])
def test_blocks(setting: str) -> None:
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(16, 2, **SETTINGS[setting], layer_scale=0.5, **DOUBLE)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE, requires_grad=True)
    _same_as_alone(block, x)
    _same_as_alone(block, x, torch.rand(1, LAYOUT.total) < 0.7)


@pytest.mark.parametrize("setting", [*SETTINGS, "conditioned", "stage", "compiled"])
def test_registers_of_grids(setting: str) -> None:
    torch.manual_seed(0)
    mask, more = torch.rand(1, LAYOUT.total) < 0.7, {}
    cond = torch.randn(len(SIZES), 6, **DOUBLE)
    module: Any
    if setting in SETTINGS:
        module = NeighborhoodAttention2D(16, 2, **SETTINGS[setting], **DOUBLE)
        more["mask"] = mask
    elif setting == "stage":
        down = PatchMerging(16, 16, **DOUBLE)
        module = NeighborhoodStage(16, 2, 2, 3, downsample=down, pad=True, **DOUBLE)
    else:
        module = NeighborhoodTransformerBlock(16, 2, 2, cond_dim=6, layer_scale=0.5, **DOUBLE)
        torch.nn.init.normal_(module.modulation.linear.weight)
        more["cond"] = cond
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE, requires_grad=True)
    registers = torch.randn(len(SIZES), 3, 16, **DOUBLE, requires_grad=True)
    call = module
    if setting == "compiled":
        call = torch.compile(module, backend="eager", fullgraph=True)
    found, found_r, *layout = call(x, registers=registers, layout=LAYOUT, **more)
    each = []
    for i, grid in enumerate(LAYOUT.unpack(x)):
        own = {"cond": cond[i : i + 1], "mask": LAYOUT.unpack(mask)[i][None]}
        own = {name: own[name] for name in more}
        each.append(module(grid[None], registers=registers[i : i + 1], **own))
    (packed,) = layout or [LAYOUT]
    alone = packed.pack([grid[0] for grid, _ in each]), torch.cat([r for _, r in each])
    assert_close((found, found_r), alone, **EXACT)
    inputs = (x, registers, *module.parameters())
    gradients = [
        torch.autograd.grad(a.sin().sum() + b.square().sum(), inputs)
        for a, b in ((found, found_r), alone)
    ]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"attn_drop": 0.3}, {"pad": True}], ids=str)
def test_everything_at_once(options: dict[str, Any]) -> None:
    """Norms, scales, rotary positions of dilated windows and a ring, registers, and dropout of
    nothing: one set of rotations for all layers."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"qk_norm": True, "rotary": True, "num_kv_heads": 1, **DOUBLE}
    first = NeighborhoodAttention2D(
        16, 2, (2, 3), (1, 2), (1, 2), is_circular=(True, False), learned_scale=True, **shared
    )
    second = NeighborhoodAttention2D(16, 2, (2, 3), **shared, **options)
    if second.attn_drop is not None:
        second.attn_drop.p = 0.0
    modules = torch.nn.ModuleList([first, second])
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE, requires_grad=True)
    registers = torch.randn(len(SIZES), 3, 16, **DOUBLE, requires_grad=True)

    def run(x: Tensor, registers: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        for module in (first, second, first):
            x, registers = module(x, registers, **more)
        return x, registers

    layout = GridLayout(SIZES)
    with torch.inference_mode():
        run(x, registers, layout=layout)
    assert len(layout._kept) == (1 if "pad" in options else 2)
    found = run(x, registers, layout=layout)
    parts = LAYOUT.unpack(x)
    each = [run(grid[None], registers[i : i + 1]) for i, grid in enumerate(parts)]
    alone = LAYOUT.pack([grid[0] for grid, _ in each]), torch.cat([r for _, r in each])
    assert_close(found, alone, **EXACT)
    inputs = (x, registers, *modules.parameters())
    gradients = [
        torch.autograd.grad(a.sin().sum() + b.square().sum(), inputs)
        for a, b in (found, alone)
    ]  # fmt: skip
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("has_lengths", [False, True])
def test_contexts_of_grids(has_lengths: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    cross = NeighborhoodCrossAttention2D(16, 2, 2, context_dim=6, source_dim=8, **options, **DOUBLE)
    block = NeighborhoodTransformerBlock(16, 2, 2, context_dim=6, rotary=True, **DOUBLE)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE, requires_grad=True)
    source = torch.randn(1, LAYOUT.total, 8, **DOUBLE, requires_grad=True)
    context = torch.randn(len(SIZES), 5, 6, **DOUBLE, requires_grad=True)
    lengths = torch.tensor([3, 5, 0, 1]) if has_lengths else None
    found = cross(x, context, lengths, source, layout=LAYOUT)
    through = block(x, context=context, context_lengths=lengths, layout=LAYOUT)
    parts = zip(LAYOUT.unpack(x), LAYOUT.unpack(source), range(len(SIZES)), strict=True)
    each = []
    for grid, other, i in parts:
        own = (context[i : i + 1], None if lengths is None else lengths[i : i + 1])
        each.append(cross(grid[None], *own, other[None])[0])
        alone = block(grid[None], None, None, *own)[0]
        assert_close(LAYOUT.unpack(through)[i], alone, **EXACT)
    packed = LAYOUT.pack(each)
    assert_close(found, packed, **EXACT)
    inputs = (x, source, context, *cross.parameters())
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (found, packed)]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_conditions_of_grids_and_of_tokens() -> None:
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(16, 2, 2, cond_dim=6, gated_mlp=True, **DOUBLE)
    torch.nn.init.normal_(block.modulation.linear.weight)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE)
    of_grids = torch.randn(len(SIZES), 6, **DOUBLE)
    expected = LAYOUT.pack([
        block(grid[None], cond[None])[0] for grid, cond in zip(LAYOUT.unpack(x), of_grids)
    ])  # fmt: skip
    assert_close(block(x, of_grids, layout=LAYOUT), expected, **EXACT)
    of_tokens = LAYOUT.spread(of_grids)
    assert of_tokens.shape == (1, LAYOUT.total, 6)
    assert_close(block(x, of_tokens, layout=LAYOUT), expected, **EXACT)
    with pytest.raises(ValueError, match="entries must have one for each of 4 grids"):
        block(x, of_grids[:3], layout=LAYOUT)


def test_drop_path_drops_grids() -> None:
    torch.manual_seed(0)
    block = NeighborhoodTransformerBlock(16, 2, 2, drop_path=0.5, **DOUBLE)
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE)
    kept = {tuple(not torch.equal(a, b) for a, b in zip(
        LAYOUT.unpack(block(x, layout=LAYOUT)), LAYOUT.unpack(x))) for _ in range(20)}  # fmt: skip
    assert len(kept) > 3  # not all or none


def test_stages_and_backbones() -> None:
    torch.manual_seed(0)
    stage = NeighborhoodStage(32, 2, 2, 3, downsample=PatchMerging(16), pad=True).double()
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE)
    packed, layout = stage(x, layout=LAYOUT)
    assert layout == GridLayout([(3, 4), (5, 3), (5, 3), (1, 6)])
    for grid, found in zip(LAYOUT.unpack(x), layout.unpack(packed), strict=True):
        assert_close(found, stage(grid[None])[0], **EXACT)
    stage.grad_checkpointing = True
    again, _ = stage(x, layout=LAYOUT)
    assert_close(again, packed, **EXACT)
    backbone = NeighborhoodBackbone(
        3, 16, (1, 1), (2, 2), 3, rotary=True, cond_dim=4, pad=True, channels_first=True
    ).double()
    images = [torch.randn(3, *size, **DOUBLE) for size in ((20, 17), (40, 30), (40, 30))]
    cond = torch.randn(3, 4, **DOUBLE)
    maps = backbone(images, cond)
    for i, image in enumerate(images):
        for level, expected in enumerate(backbone(image[None], cond[i : i + 1])):
            assert_close(maps[level][i], expected[0], **EXACT)
    backbone = NeighborhoodBackbone(3, 16, (1, 1), (2, 2), 3, pad=True, num_registers=2).double()
    maps = backbone(images)
    for i, image in enumerate(images):
        for level, expected in enumerate(backbone(image[None])):
            assert_close(maps[level][i], expected[0], **EXACT)


def _model(kind: str) -> Any:
    shared: dict[str, Any] = {"num_classes": 5, "num_heads": (2, 2), "depths": (1, 2)}
    if kind == "video":
        return VideoNAT(embed_dim=32, kernel_size=(2, 3, 3), **shared)
    if kind == "isotropic":
        return IsotropicNAT(num_classes=5, embed_dim=32, depth=2, num_heads=2, patch_size=8)
    return NAT(embed_dim=16, stem=kind, clip_window=kind == "patch", **shared)


@pytest.mark.parametrize("kind", ["conv", "patch", "isotropic", "video"])
def test_models_of_lists_of_images(kind: str) -> None:
    torch.manual_seed(0)
    model = _model(kind).double().eval()
    sizes = [(32, 40), (60, 24), (60, 24)]
    images = [torch.randn(3, *((4,) if kind == "video" else ()), *s, **DOUBLE) for s in sizes]
    for image, found in zip(images, model.forward_features(images), strict=True):
        assert_close(found, model.forward_features(image[None])[0], **EXACT)
    logits = torch.cat([model(image[None]) for image in images])
    assert_close(model(images), logits, **EXACT)
    model.set_grad_checkpointing()
    model.train()
    gradients = [
        torch.autograd.grad(y.square().sum(), model.parameters())
        for y in (model(images), torch.cat([model(image[None]) for image in images]))
    ]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match="forward_intermediates of a list"):
        model.forward_intermediates(images)
    model.reset_classifier(5, "")
    per_token = model.eval()(images)
    assert [len(t.shape) for t in per_token] == [len(images[0].shape)] * 3


@pytest.mark.parametrize("more", [{"num_registers": 2}, {"context_dim": 6, "cond_dim": 4}], ids=str)
def test_denoisers_of_lists_of_clips(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "kernel_size": 3}
    model = VideoDenoiser(**shared, **more).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clips = [torch.randn(3, *size, **DOUBLE) for size in ((3, 8, 6), (2, 4, 12), (2, 4, 12))]
    clips.append(torch.randn(3, 10, 6, **DOUBLE))  # an image
    timestep = torch.rand(4, **DOUBLE)
    given = [timestep]
    if "cond_dim" in more:
        lengths = torch.tensor([3, 5, 0, 1])
        given += [torch.randn(4, 4, **DOUBLE), torch.randn(4, 5, 6, **DOUBLE), lengths]
    found = model(clips, *given)
    alone = [model(c[None], *(t[i : i + 1] for t in given))[0] for i, c in enumerate(clips)]
    assert_close(found, alone, rtol=1e-11, atol=1e-11)
    model.set_grad_checkpointing()
    gradients = [
        torch.autograd.grad(sum(part.square().sum() for part in parts), model.parameters())
        for parts in (model(clips, *given), alone)
    ]
    for mine, true in zip(*gradients, strict=True):
        assert_close(mine, true, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="timestep of a list of 4 clips must have one entry"):
        model(clips, torch.rand(1, **DOUBLE))
    with pytest.raises(NotImplementedError, match="stream of a list"):
        model.stream(clips)


def test_denoiser_of_a_list_of_images() -> None:
    torch.manual_seed(0)
    model = ImageDenoiser(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3).double()
    images = [torch.rand(3, *size, **DOUBLE) for size in ((16, 12), (9, 21), (9, 21))]
    noise = torch.tensor([0.1, 0.2, 0.3])
    for one, image, strength in zip(model(images, noise), images, noise, strict=True):
        assert_close(one, model(image[None], strength[None].double())[0], **EXACT)
    assert_close(model(images, 0.1)[1], model(images[1][None], 0.1)[0], rtol=1e-6, atol=1e-6)


def test_timm_makes_them() -> None:
    assert natten.models
    model = timm.create_model("nat_pico", num_classes=4).eval()
    assert model([torch.randn(3, 28, 28), torch.randn(3, 14, 40)]).shape == (2, 4)


def test_programs() -> None:
    """torch.compile with the layout as argument, and torch.export of a module that holds it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"rotary": True, "qk_norm": True, **DOUBLE}
    block = NeighborhoodTransformerBlock(16, 2, 2, **options).eval()
    x = torch.randn(1, LAYOUT.total, 16, **DOUBLE)
    cross = NeighborhoodCrossAttention2D(16, 2, 2, context_dim=6, **options)
    context, lengths = torch.randn(4, 5, 6, **DOUBLE), torch.tensor([3, 5, 0, 1])
    through = torch.compile(cross, backend="aot_eager", fullgraph=True)
    expected = cross(x, context, lengths, layout=LAYOUT)
    assert_close(through(x, context, lengths, layout=LAYOUT), expected, **EXACT)
    expected = block(x, layout=LAYOUT)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, layout=LAYOUT), expected, **EXACT)
    other = GridLayout([(10, 4), (4, 10)])
    y = torch.randn(1, other.total, 16, **DOUBLE)
    assert_close(compiled(y, layout=other), block(y, layout=other), **EXACT)
    torch.compiler.reset()

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, layout=LAYOUT)

    assert_close(torch.export.export(Packed(), (x,)).module()(x), expected, **EXACT)
    functional = torch.func.functionalize(lambda x: block(x, layout=LAYOUT))
    assert_close(functional(x), expected, **EXACT)


def test_errors() -> None:
    module = NeighborhoodAttention2D(16, 2, 3)
    block = NeighborhoodTransformerBlock(16, 2, 3)
    x = torch.randn(1, LAYOUT.total, 16)
    for f in (module, block):
        with pytest.raises(ValueError, match=r"layout must be a natten.GridLayout, got"):
            f(x, layout=SIZES)
        with pytest.raises(ValueError, match="layout must hold grids of 2 axes"):
            f(x, layout=GridLayout([LAYOUT.total]))
        with pytest.raises(ValueError, match=r"x must hold 172 packed tokens"):
            f(x[:, 1:], layout=LAYOUT)
        with pytest.raises(ValueError, match=r"channels=16"):
            f(x[..., 1:], layout=LAYOUT)
        with pytest.raises(ValueError, match=r"registers must have the shape \[batch=4,"):
            f(x, registers=torch.randn(1, 2, 16), layout=LAYOUT)
        with pytest.raises(ValueError, match="kernel_size"):  # (2, 12) tokens
            f(x, layout=LAYOUT)
    with pytest.raises(NotImplementedError, match="grid beside a layout"):
        module(x, grid=[20, 20], layout=LAYOUT)
    with pytest.raises(NotImplementedError, match="a mask of a block with context_dim"):
        NeighborhoodTransformerBlock(16, 2, 2, context_dim=4)(
            x, mask=torch.ones(1, LAYOUT.total, dtype=torch.bool), layout=LAYOUT
        )
    with pytest.raises(ValueError, match="a context was given to a block without context_dim"):
        block(x, context=torch.randn(4, 3, 4), layout=LAYOUT)
    for pad in (False, True):
        cross = NeighborhoodCrossAttention2D(16, 2, 2, context_dim=4, pad=pad)
        with pytest.raises(ValueError, match=r"context must have the shape \[batch=4, tokens, "):
            cross(x, torch.randn(3, 5, 4), layout=LAYOUT)
    with pytest.raises(NotImplementedError, match="a layout with upsampling"):
        NeighborhoodCrossAttention2D(16, 2, 2, upsampling=2)(x, source=x, layout=LAYOUT)
    script = torch.jit.script(NeighborhoodAttention1D(16, 2, 3))
    assert script(x).shape == x.shape
    with pytest.raises(torch.jit.Error, match="TorchScript has no attention of packed grids"):
        script(x, layout=1)
