"""natten.models against the published models: sizes, logits, checkpoints, and timm's interface."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")

from original_models import OriginalIsotropic, OriginalNAT  # noqa: E402

import natten.models  # noqa: E402
from natten.models._checkpoint import checkpoint_filter_fn, convert, detect_layout  # noqa: E402
from natten.models._count import count_macs  # noqa: E402

# name: millions of parameters, giga-MACs, input size
PUBLISHED = {
    "nat_mini": (19.984, 2.7, 224),
    "nat_tiny": (27.902, 4.3, 224),
    "nat_small": (50.743, 7.8, 224),
    "nat_base": (89.770, 13.7, 224),
    "dinat_mini": (19.984, 2.7, 224),
    "dinat_tiny": (27.902, 4.3, 224),
    "dinat_small": (50.720, 7.8, 224),
    "dinat_base": (89.770, 13.7, 224),
    "dinat_large": (200.944, 30.6, 224),
    "dinat_large_384": (200.944, 89.7, 384),
    "dinat_large_384_11x11": (201.144, 92.4, 384),
    "dinat_s_tiny": (28.288, 4.5, 224),
    "dinat_s_small": (49.606, 8.7, 224),
    "dinat_s_base": (87.768, 15.4, 224),
    "dinat_s_large": (196.532, 34.5, 224),
    "dinat_s_large_384": (196.532, 101.5, 384),
}
ISOTROPIC = {
    "nat_isotropic_small": 22.00,
    "nat_isotropic_base": 86.47,
    "dinat_isotropic_small": 22.00,
    "dinat_isotropic_base": 86.47,
    "vitrpb_small": 22.08,
    "vitrpb_base": 86.63,
}
D224 = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
D384 = [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
DS384 = [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]


def parameters(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    millions, gmacs, size = PUBLISHED[name]
    model = timm.create_model(name, device="meta").eval()
    assert round(parameters(model), 3) == pytest.approx(millions, abs=1e-9)
    assert model.pretrained_cfg["input_size"] == (3, size, size)
    # The published number has one decimal.
    assert count_macs(model) / 1e9 == pytest.approx(gmacs, rel=0.01, abs=0.05)


@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropic_size(name: str) -> None:
    model = timm.create_model(name, device="meta").eval()
    assert round(parameters(model), 2) == pytest.approx(ISOTROPIC[name], abs=1e-9)


def randomize(model: torch.nn.Module) -> None:
    """Weights for which every part of a model matters to its output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.endswith("rpb"):
                p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5))
            elif ("norm" in name and name.endswith("weight")) or "gamma" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.3 * torch.randn_like(p))


def assert_same_logits(original, model, size: tuple[int, int]) -> None:
    randomize(original)
    original.eval()
    model.eval()
    model.load_state_dict(checkpoint_filter_fn(original.state_dict(), model), strict=True)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        want, got = original(x), model(x)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# (registered model, arguments that shrink it, the same for the original)
SMALL = dict(embed_dim=32, num_heads=(1, 2, 4, 8), num_classes=10)
VARIANTS = {
    "nat_mini": (
        SMALL,
        dict(depths=(3, 4, 6, 5), dilations=[[1] * n for n in (3, 4, 6, 5)], mlp_ratio=3),
    ),
    "nat_small": (
        SMALL,
        dict(
            depths=(3, 4, 18, 5),
            dilations=[[1] * n for n in (3, 4, 18, 5)],
            mlp_ratio=2,
            layer_scale=1e-5,
        ),
    ),
    "dinat_mini": (
        SMALL,
        dict(depths=(3, 4, 6, 5), dilations=[*D224[:2], [1, 2] * 3, D224[3]], mlp_ratio=3),
    ),
    "dinat_small": (SMALL, dict(depths=(3, 4, 18, 5), dilations=D224, mlp_ratio=2)),
    "dinat_base": (
        SMALL,
        dict(depths=(3, 4, 18, 5), dilations=D224, mlp_ratio=2, layer_scale=1e-5),
    ),
    "dinat_large": (SMALL, dict(depths=(3, 4, 18, 5), dilations=D224, mlp_ratio=2)),
    "dinat_large_21k_11x11": (
        SMALL,
        dict(depths=(3, 4, 18, 5), dilations=D224, mlp_ratio=2, kernel_size=11),
    ),
    "dinat_s_tiny": (
        SMALL,
        dict(
            depths=(2, 2, 6, 2),
            dilations=[[1, 8], [1, 4], [1, 2] * 3, [1, 1]],
            mlp_ratio=4,
            merging=True,
        ),
    ),
    "dinat_s_small": (
        SMALL,
        dict(
            depths=(2, 2, 18, 2),
            dilations=[[1, 8], [1, 4], [1, 2] * 9, [1, 1]],
            mlp_ratio=4,
            merging=True,
        ),
    ),
}


def original_of(name: str) -> OriginalNAT:
    small, arguments = VARIANTS[name]
    return OriginalNAT(**{"kernel_size": 7, **small, **arguments})


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_the_original(name: str) -> None:
    # Narrow, with the depths, dilations and windows of the variant itself; 224 wide and 96 high, so
    # that one axis is padded.
    model = timm.create_model(name, **VARIANTS[name][0])
    assert_same_logits(original_of(name), model, (96, 224))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dinat_large_384", dict(depths=(3, 4, 18, 5), dilations=D384, mlp_ratio=2)),
        (
            "dinat_large_384_11x11",
            dict(depths=(3, 4, 18, 5), dilations=D224, mlp_ratio=2, kernel_size=11),
        ),
        (
            "dinat_s_large_384",
            dict(depths=(2, 2, 18, 2), dilations=DS384, mlp_ratio=4, merging=True),
        ),
    ],
)
def test_logits_of_the_original_at_384(name: str, arguments: dict) -> None:
    small = dict(embed_dim=8, num_heads=(1, 1, 2, 2), num_classes=10)
    original = OriginalNAT(**{"kernel_size": 7, **small, **arguments})
    assert_same_logits(original, timm.create_model(name, **small), (384, 384))


@pytest.mark.parametrize("size", [(70, 45), (33, 130)])
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_logits_at_odd_and_small_sizes(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name, **VARIANTS[name][0])
    assert_same_logits(original_of(name), model, size)


def test_logits_of_patch_merging_with_odd_grids() -> None:
    model = timm.create_model("dinat_s_tiny", **SMALL)
    assert_same_logits(original_of("dinat_s_tiny"), model, (100, 76))


def test_logits_of_a_full_size_model() -> None:
    original = OriginalNAT(
        embed_dim=64,
        depths=(3, 4, 6, 5),
        num_heads=(2, 4, 8, 16),
        kernel_size=7,
        dilations=[*D224[:2], [1, 2] * 3, D224[3]],
        mlp_ratio=3,
    )
    assert_same_logits(original, timm.create_model("dinat_mini"), (224, 224))


@pytest.mark.parametrize("name", ["nat_isotropic_small", "dinat_isotropic_small"])
def test_logits_of_isotropic_models(name: str) -> None:
    dilations = [1, 2] * 6 if name.startswith("dinat") else [1] * 12
    small = dict(embed_dim=32, num_heads=2, num_classes=10)
    original = OriginalIsotropic(depth=12, dilations=dilations, **small)
    assert_same_logits(original, timm.create_model(name, **small), (224, 160))


def test_logits_of_vitrpb() -> None:
    small = dict(embed_dim=32, num_heads=2, num_classes=10)
    original = OriginalIsotropic(depth=12, size=14, **small)
    model = timm.create_model("vitrpb_small", **small)
    assert_same_logits(original, model, (224, 224))
    # A checkpoint whose index goes by query - key, with its table the other way round.
    flipped = copy.deepcopy(original)
    with torch.no_grad():
        for layer in flipped.layers:
            layer.attn.rpb.copy_(layer.attn.rpb.flip(1, 2))
            layer.attn.relative_position_index.copy_(
                27 * 27 - 1 - layer.attn.relative_position_index
            )
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(flipped(x), original(x))
    for key, tensor in checkpoint_filter_fn(flipped.state_dict(), model).items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("name", VARIANTS)
def test_layouts_round_trip(name: str) -> None:
    original = original_of(name)
    state = original.state_dict()
    assert detect_layout(state) == "original"
    native, moves = convert(state, "natten")
    assert detect_layout(native) == "natten"
    assert [old for old, _ in moves] == [(key,) for key in state]
    model = timm.create_model(name, **VARIANTS[name][0])
    model.load_state_dict(native, strict=True)
    assert checkpoint_filter_fn(native, model).keys() == native.keys()
    back, _ = convert(model.state_dict(), "original")
    original.load_state_dict(back, strict=True)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_layout_of_vitrpb_round_trips() -> None:
    original = OriginalIsotropic(depth=2, size=14, embed_dim=16, num_heads=2, num_classes=3)
    state = original.state_dict()
    native, moves = convert(state, "natten")
    assert (("layers.0.attn.relative_position_index",), ()) in moves
    back, _ = convert(native, "original")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def huggingface_keys(depths: tuple[int, ...], layer_scale: bool) -> set[str]:
    """State dict keys of transformers' DinatForImageClassification, from its documentation of the
    layout.
    """
    keys = {
        f"dinat.embeddings.patch_embeddings.projection.{i}.{p}"
        for i in (0, 1)
        for p in ("weight", "bias")
    }
    keys |= {
        f"{m}.{p}"
        for m in ("dinat.embeddings.norm", "dinat.layernorm", "classifier")
        for p in ("weight", "bias")
    }
    for i, depth in enumerate(depths):
        level = f"dinat.encoder.levels.{i}"
        for j in range(depth):
            layer = f"{level}.layers.{j}"
            modules = [f"attention.self.{p}" for p in ("query", "key", "value")]
            modules += ["attention.output.dense", "intermediate.dense", "output.dense"]
            modules += ["layernorm_before", "layernorm_after"]
            keys |= {f"{layer}.{m}.{p}" for m in modules for p in ("weight", "bias")}
            keys.add(f"{layer}.attention.self.rpb")
            if layer_scale:
                keys.add(f"{layer}.layer_scale_parameters")
        if i < len(depths) - 1:
            keys |= {
                f"{level}.downsample.{k}" for k in ("reduction.weight", "norm.weight", "norm.bias")
            }
    return keys


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_base"])
def test_huggingface_layout(name: str) -> None:
    original = original_of(name)
    randomize(original)
    state = original.state_dict()
    exported, moves = convert(state, "huggingface")
    depths = VARIANTS[name][1]["depths"]
    assert set(exported) == huggingface_keys(depths, "layer_scale" in VARIANTS[name][1])
    assert {key for old, _ in moves for key in old} == set(state)
    assert {key for _, new in moves for key in new} == set(exported)
    layer = "dinat.encoder.levels.1.layers.2.attention.self"
    qkv = state["levels.1.blocks.2.attn.qkv.weight"]
    assert torch.equal(
        torch.cat([exported[f"{layer}.{p}.weight"] for p in ("query", "key", "value")]), qkv
    )
    assert detect_layout(exported) == "huggingface"
    back, _ = convert(exported, "original")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    model = timm.create_model(name, **VARIANTS[name][0])
    model.load_state_dict(checkpoint_filter_fn(exported, model), strict=True)


def test_huggingface_backbone_norms(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("dinat_mini", **SMALL)
    exported, _ = convert(model.state_dict(), "huggingface", prefix="nat")
    assert "nat.encoder.levels.0.layers.0.attention.self.rpb" in exported
    exported["hidden_states_norms.stage2.weight"] = torch.ones(64)
    native, _ = convert(exported, "natten")
    assert "norm1.weight" in native
    assert set(checkpoint_filter_fn(exported, model)) == set(model.state_dict())
    assert "detection" in caplog.text


def test_conversion_refusals() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        convert({"patch_embed.proj.weight": torch.ones(1)}, "keras")
    with pytest.raises(ValueError, match="none of the layouts"):
        convert({"conv1.weight": torch.ones(1)}, "natten")
    with pytest.raises(ValueError, match="transformers has NAT and DiNAT alone"):
        convert(original_of("dinat_s_tiny").state_dict(), "huggingface")


@pytest.mark.parametrize("name", ["nat_pico", "dinat_pico", "video_nat_pico"])
def test_timm_interface(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size)
    levels = len(model.levels)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert logits.shape == (2, 7)
        assert features.shape == (2, *model.pretrained_cfg["pool_size"], model.num_features)
        torch.testing.assert_close(model.forward_head(features), logits)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        normed = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
        torch.testing.assert_close(normed[0].permute(0, 2, 3, 1), features)
        channels_last = model.forward_intermediates(
            x, 1, output_fmt="NHWC", intermediates_only=True
        )
        torch.testing.assert_close(channels_last[0], maps[-1].permute(0, 2, 3, 1))
        early, _ = model.forward_intermediates(x, [0], stop_early=True)
        torch.testing.assert_close(early.permute(0, 3, 1, 2), maps[0])
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(x, output_fmt="NLC")

        extractor = timm.create_model(name, features_only=True).eval()
        assert extractor.feature_info.reduction() == [i["reduction"] for i in model.feature_info]
        extracted = extractor(x)
        assert [m.dim() for m in extracted] == [4] * levels

        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([0])
        assert len(pruned.levels) == 1
        torch.testing.assert_close(pruned(x).permute(0, 3, 1, 2), maps[0])

        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)
        model.reset_classifier(3, "")
        assert model(x).shape == (2, *model.pretrained_cfg["pool_size"], 3)
    if hasattr(model.levels[0].blocks[0].attn, "rpb") and not name.startswith("video"):
        assert all(n.endswith(".rpb") for n in model.no_weight_decay())
        assert len(model.no_weight_decay()) == sum(len(level.blocks) for level in model.levels)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = timm.create_model("dinat_pico").train()
    x = torch.randn(2, 3, 28, 28)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dinat_pico", "nat_isotropic_small", "video_nat_pico_causal"])
def test_meta_device_and_dtype(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16).eval()
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    size = model.pretrained_cfg["input_size"]
    out = model(torch.randn(2, *size, device="meta", dtype=torch.bfloat16))
    assert out.shape == (2, model.num_classes)
    assert out.dtype == torch.bfloat16


def test_layer_decay_groups() -> None:
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("dinat_pico")
    groups = param_groups_layer_decay(
        model,
        weight_decay=0.05,
        layer_decay=0.8,
        no_weight_decay_list=model.no_weight_decay(),
    )
    depth = sum(len(level.blocks) for level in model.levels)
    assert len({group["lr_scale"] for group in groups}) > depth
    rpb = {id(p) for n, p in model.named_parameters() if n.endswith("rpb")}
    assert all(
        group["weight_decay"] == 0 for group in groups if rpb & {id(p) for p in group["params"]}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinat_pico", dict(depths=(2, 1, 1), dilations=((1, 4), (2,), (1,)))),
        ("video_nat_pico_causal", {}),
    ],
)
def test_compiles_without_graph_breaks(name: str, options: dict[str, Any]) -> None:
    """Of each level one block of each kind: others are traced the same way."""
    torch.compiler.reset()
    model = timm.create_model(name, **options).train()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["dinat_pico", "nat_isotropic_small", "video_nat_pico"])
def test_torchscript(name: str) -> None:
    with timm.layers.set_scriptable(True):
        model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


def test_importing_natten_does_not_import_timm() -> None:
    code = "import sys, natten; assert not {'timm', 'natten.models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_are_registered_once_under_their_family() -> None:
    names = timm.list_models(module="dinat")
    assert {"dinat_mini", "dinat_large_384_11x11", "dinat_large_21k"} <= set(names)
    assert timm.list_models(module="nat") == [
        "nat_base",
        "nat_mini",
        "nat_pico",
        "nat_small",
        "nat_tiny",
    ]
    assert natten.models.nat.nat_base.__module__ == "natten.models.nat"


def test_pretrained_cfg_of_every_released_model() -> None:
    for name in [
        *PUBLISHED,
        *ISOTROPIC,
        "dinat_large_21k",
        "dinat_large_21k_11x11",
        "dinat_s_large_21k",
    ]:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url.startswith("https://shi-labs.com/projects/"), name
        assert cfg.license == "mit"
        assert cfg.origin_url
        assert cfg.paper_ids
        assert cfg.tag.startswith("shi_in")
        if name in PUBLISHED:
            assert cfg.notes[0].startswith("ImageNet-1k top-1 8")


def test_argument_errors() -> None:
    with pytest.raises(ValueError, match="num_heads needs one entry for each of the 3 levels"):
        timm.create_model("nat_pico", num_heads=(1, 2))
    with pytest.raises(
        ValueError, match=r"dilations\[1\] needs one dilation for each of the 3 blocks"
    ):
        timm.create_model("nat_pico", dilations=((1, 1), (1, 1), (1,) * 5))
    with pytest.raises(ValueError, match="stem must be"):
        timm.create_model("nat_pico", stem="fourier")
    with pytest.raises(TypeError):
        timm.create_model("nat_pico", windows=3)
