"""Backbones of detectors and segmenters, and timm's keywords."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")

from original_models import OriginalBackbone  # noqa: E402

import natten  # noqa: E402
import natten.models  # noqa: E402
from natten.nn import NeighborhoodBackbone  # noqa: E402

SMALL = dict(embed_dim=16, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4))
DILATIONS = ((1, 3), (2,), (1, 2), (1,))
# name: arguments of ours, arguments of the original
KINDS = {
    "nat_small": (
        dict(dilations=((1,) * 2, (1,), (1,) * 2, (1,))), dict(mlp_ratio=2, layer_scale=1e-5),
    ),
    "dinat_mini": (dict(dilations=DILATIONS), dict(mlp_ratio=3)),
    "dinat_s_tiny": (dict(dilations=DILATIONS), dict(mlp_ratio=4, merging=True)),
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))


def pair(name: str, **kwargs) -> tuple[OriginalBackbone, torch.nn.Module]:
    ours, arguments = KINDS[name]
    torch.manual_seed(0)
    original = OriginalBackbone(
        **SMALL, kernel_size=5, **{"dilations": ours["dilations"], **arguments}, **kwargs
    ).eval()
    randomize(original)
    model = timm.create_model(
        name, **SMALL, **ours, kernel_size=5, features_only=True, feature_cls="dense", **kwargs
    )
    return original, model.eval()


@pytest.mark.parametrize("size", [(64, 64), (90, 53), (33, 130)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_maps_of_the_original_backbone(name: str, size: tuple[int, int]) -> None:
    original, model = pair(name)
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        for got, want in zip(model(x), original(x), strict=True):
            assert want.std() > 0.1
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_published_checkpoints_load(name: str, tmp_path: Path) -> None:
    original, model = pair(name, out_indices=(1, 3))
    network = {f"backbone.{k}": v for k, v in original.state_dict().items()}
    network |= {"decode_head.conv_seg.bias": torch.ones(2), "auxiliary_head.x.bias": torch.ones(2)}
    torch.save({"meta": {"CLASSES": ("wall",)}, "state_dict": network}, tmp_path / "upernet.pth")
    ours = KINDS[name][0]
    overlay = dict(file=str(tmp_path / "upernet.pth"))
    loaded = timm.create_model(
        name, **SMALL, **ours, kernel_size=5, features_only=True, feature_cls="dense",
        out_indices=(1, 3), pretrained=True, pretrained_cfg_overlay=overlay,
    ).eval()  # fmt: skip
    model.load_state_dict(network)
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        for a, b, c in zip(model(x), loaded(x), original(x), strict=True):
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)


def test_weights_of_a_classifier_and_frozen_stages() -> None:
    arguments = dict(features_only=True, feature_cls="dense", frozen_stages=1)
    model = timm.create_model("dinat_pico.mnist5k", pretrained=True, **arguments)
    classifier = timm.create_model("dinat_pico.mnist5k", pretrained=True)
    assert model.feature_info.channels() == [32, 64, 128]
    assert model.feature_info.reduction() == [1, 2, 4]
    x = torch.randn(2, 3, 28, 28)
    maps = model.train()(x)
    raw = classifier.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(
        maps[0], torch.nn.functional.layer_norm(raw[0], (32,)).movedim(-1, 1)
    )
    sum(m.square().mean() for m in maps).backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert frozen
    assert all(n.startswith(("patch_embed.", "levels.0.")) for n in frozen)
    assert not any(n.startswith(("levels.1.", "norms.")) for n in frozen)
    assert not model.levels[0].training
    assert not model.patch_embed.training
    assert model.levels[1].training
    with pytest.raises(ValueError, match="frozen_stages must be from -1 to 3, got 4"):
        timm.create_model("dinat_pico", **{**arguments, "frozen_stages": 4})
    with pytest.raises(ValueError, match="out_indices must be indices of 3 stages"):
        timm.create_model("dinat_pico", **arguments, out_indices=(0, 3))
    with pytest.raises(ValueError, match="needs levels, which IsotropicNAT has not"):
        timm.create_model("nat_isotropic_small", **arguments)


@pytest.mark.parametrize("channels_first", [False, True])
def test_backbone_outputs(channels_first: bool) -> None:
    backbone = NeighborhoodBackbone(
        3, 8, (1, 2), (1, 2), 3, out_indices=(-1,), channels_first=channels_first, frozen_stages=0,
        norm_layer=torch.nn.RMSNorm, rank=3, overlapping=False, patch_size=(1, 2, 4),
        downsample_strides=(1, 2, 2),
    )  # fmt: skip
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in backbone.modules())
    x = torch.randn(1, 3, 3, 13, 17)
    (features,) = backbone(x)
    want = (1, 3, 4, 3, 16)
    assert features.shape == ((1, 16, 3, 4, 3) if channels_first else want)
    with pytest.warns((FutureWarning, DeprecationWarning)):
        scripted = torch.jit.script(backbone)
    torch.testing.assert_close(scripted(x)[0], features)
    assert not any(p.requires_grad for p in backbone.patch_embed.parameters())
    with pytest.raises(ValueError, match="patch_size=2 needs overlapping=False"):
        NeighborhoodBackbone(patch_size=2)


# --- timm's keywords


@pytest.mark.parametrize("name", ["nat_pico", "nat_isotropic_small", "video_nat_pico"])
def test_keywords_of_timm(name: str) -> None:
    keywords = dict(
        in_chans=2, num_classes=5, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.2,
        drop_path_rate=0.1, qkv_bias=False, qk_scale=0.3, norm_layer="rmsnorm", act_layer="silu",
        img_size=(48, 32), global_pool="avg",
    )  # fmt: skip
    if not name.startswith("video"):
        keywords["stride"] = 2
    model = timm.create_model(name, **keywords)
    blocks = [m for m in model.modules() if isinstance(m, natten.nn.NeighborhoodTransformerBlock)]
    for block in blocks:
        assert block.attn.scale == 0.3
        assert block.attn.attn_drop.p == 0.2
        assert block.attn.qkv.bias is None
        assert isinstance(block.mlp.act, torch.nn.SiLU)
        assert block.attn.stride[-1] == keywords.get("stride", 1)
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"][1:] == (48, 32)
    x = torch.randn(2, 2, 48, 32)
    assert model(x).shape == (2, 5)
    model.set_input_size(img_size=64)
    assert timm.data.resolve_model_data_config(model)["input_size"][1:] == (64, 64)
    with pytest.raises(ValueError, match="patches of a model keep their size"):
        model.set_input_size(patch_size=2)
    for keyword, value in (("norm_layer", "nonorm"), ("act_layer", "noact")):
        with pytest.raises(ValueError, match=f"{keyword}='{value}' is not one of timm's layers"):
            timm.create_model(name, **{keyword: value})
    with pytest.raises(ValueError, match="img_size must be one or two positive integers"):
        timm.create_model(name, img_size=0)


def test_size_of_a_model_whose_windows_are_the_grid() -> None:
    small = dict(embed_dim=16, num_heads=2, depth=2, num_classes=3)
    model = timm.create_model("vitrpb_small", img_size=64, **small).eval()
    assert model.layers[0].attn.kernel_size == (4, 4)
    before = model.layers[0].attn.rpb.detach().clone()
    model.set_input_size(96)
    assert model.layers[0].attn.kernel_size == (6, 6)
    assert model.layers[0].attn.rpb.shape == (2, 11, 11)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    # What is frozen stays so.
    model.requires_grad_(False).set_input_size(64)
    assert model.layers[0].attn.rpb.shape == before.shape
    assert not any(parameter.requires_grad for parameter in model.parameters())
    local = timm.create_model("nat_isotropic_small", img_size=160, **small)
    assert local.layers[0].attn.kernel_size == (7, 7)
    with pytest.raises(ValueError, match="img_size must be square"):
        timm.create_model("vitrpb_small", img_size=(64, 96), **small)


def sizes(model: torch.nn.Module, name: str = "kernel_size") -> list[tuple[int, ...]]:
    modules = [m for m in model.modules() if hasattr(m, "rpb")]
    return [getattr(m, name) for m in modules]


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (3, [(3, 3)] * 6),
        ((3, 5, 5, 7), [(3, 3)] * 2 + [(5, 5)] + [(5, 5)] * 2 + [(7, 7)]),  # of levels
        ((3, 5), [(3, 5)] * 6),  # of axes
        (((3, 5), 5, 3, 3), [(3, 5)] * 2 + [(5, 5)] + [(3, 3)] * 3),
        ((((3, 5), (5, 3)), 5, 3, 3), [(3, 5), (5, 3), (5, 5)] + [(3, 3)] * 3),
    ],
    ids=str,
)
def test_sequences_mean_the_same_everywhere(value, want) -> None:
    # Of the first level (3, 5) may be for its two blocks or two axes.
    if value == ((3, 5), 5, 3, 3):
        value = (((3, 5), (3, 5)), *value[1:])
    nat = timm.create_model("nat_mini", **SMALL, dilations=DILATIONS, kernel_size=value)
    backbone = NeighborhoodBackbone(3, **SMALL, kernel_size=value)
    strided = NeighborhoodBackbone(3, **SMALL, kernel_size=9, stride=value)
    assert sizes(nat) == sizes(backbone) == sizes(strided, "stride") == want


def test_sequences_that_may_mean_two_things() -> None:
    def stage(**window):
        return natten.nn.NeighborhoodStage(16, 2, 1, **{"kernel_size": 3, **window})

    message = (
        r"kernel_size=\(3, 5\) may be for 2 blocks or for 2 axes: write \(\(3, 3\), \(5, 5\)\) or"
    )
    with pytest.raises(ValueError, match=message):
        stage(kernel_size=(3, 5))
    assert sizes(stage(kernel_size=((3, 3), (5, 5)))) == [(3, 3), (5, 5)]
    assert sizes(stage(kernel_size=((3, 5), (3, 5)))) == [(3, 5)] * 2
    assert sizes(stage(dilation=(1, 2)), "dilation") == [(1, 1), (2, 2)]  # blocks, as always
    with pytest.raises(ValueError, match="may be for 2 stages or for 2 axes"):
        NeighborhoodBackbone(depths=(1, 1), num_heads=(1, 1), kernel_size=(3, 5))
    with pytest.raises(
        ValueError, match="one value, have an entry for each of 2 blocks, or one for each of 2"
    ):
        stage(kernel_size=(3, 5, 7))


# --- the original files, where there is a copy of them

ORIGINAL = os.environ.get("NATTEN_ORIGINAL_MODELS")


@pytest.mark.skipif(not ORIGINAL, reason="set NATTEN_ORIGINAL_MODELS to a copy of their repository")
@pytest.mark.parametrize("folder", ["segmentation", "detection"])
@pytest.mark.parametrize("name", KINDS)
def test_unmodified_original_files(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on this package, and equal its backbones."""
    for module in ("nat", "dinat", "dinats"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    attributes = {"load_checkpoint": None, "get_root_logger": None, "BACKBONES": registry}
    toolbox = "mmseg" if folder == "segmentation" else "mmdet"
    parents = (f"{toolbox}.{part}" for part in ("utils", "models", "models.builder"))
    for module in ("mmcv", "mmcv.runner", toolbox, *parents):
        stub = types.ModuleType(module)
        vars(stub).update(attributes)
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.syspath_prepend(Path(ORIGINAL) / folder)
    source, cls = {
        "nat_small": ("nat", "NAT"),
        "dinat_mini": ("dinat", "DiNAT"),
        "dinat_s_tiny": ("dinats", "DiNAT_s"),
    }[name]
    ours, arguments = KINDS[name]
    arguments = {k: v for k, v in arguments.items() if k != "merging"}
    arguments |= ours if name.startswith("dinat") else {}
    original = getattr(__import__(source), cls)(**SMALL, kernel_size=5, **arguments)
    original.train(False)
    randomize(original)
    _, model = pair(name)
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(1, 3, 192, 170)  # this version of them does not pad
    with torch.no_grad():
        for got, want in zip(model(x), original(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_layer_decay_of_the_backbone() -> None:
    """timm's optimizers give each block its own rate, the norms of the outputs the largest."""
    from timm.optim import param_groups_layer_decay

    backbone = NeighborhoodBackbone(
        embed_dim=8, depths=(2, 1), num_heads=(1, 2), kernel_size=3, rel_pos_bias=True,
        num_registers=2,
    )  # fmt: skip
    groups = param_groups_layer_decay(backbone, 0.1, backbone.no_weight_decay(), layer_decay=0.5)
    names = {id(p): name for name, p in backbone.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    order = [
        "patch_embed.proj.0.weight",
        "levels.0.blocks.0.attn.qkv.weight",
        "levels.0.blocks.1.mlp.fc1.weight",
        "widen.0.weight",
        "levels.1.downsample.reduction.weight",
        "norms.0.weight",
    ]
    found = [scales[name] for name in order]
    assert found == sorted(found)
    assert len(set(found)) == len(found) - 1  # timm counts norms to the last block
    assert scales["registers"] == found[0]
    assert scales["levels.1.downsample.reduction.weight"] == scales["levels.1.blocks.0.attn.rpb"]
    assert scales["norms.1.weight"] == 1.0
    unwanted = ("registers", "levels.0.blocks.0.attn.rpb", "norms.0.weight")
    assert all(decays[name] == 0 for name in unwanted)
    assert decays["levels.0.blocks.0.attn.qkv.weight"] == 0.1
    coarse = param_groups_layer_decay(
        timm.create_model("nat_pico", features_only=True, feature_cls="dense"), layer_decay=0.5
    )
    assert sum(len(group["params"]) for group in coarse) > 0
