"""Loading checkpoint files, and the command that converts them."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm")

from original_models import OriginalNAT  # noqa: E402

import natten.models  # noqa: E402
from natten.models import read_checkpoint  # noqa: E402
from natten.models.__main__ import main  # noqa: E402

SMALL = dict(embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1), num_classes=10)
PLAIN = dict(dilations=((1,),) * 4)
COUNT = dict(num_classes=10)  # the checkpoints of these tests have 10 classes


def small_model(**kwargs) -> torch.nn.Module:
    return timm.create_model("nat_mini", **{**SMALL, **PLAIN, **kwargs}).eval()


@pytest.fixture
def original() -> OriginalNAT:
    torch.manual_seed(1)
    return OriginalNAT(kernel_size=7, mlp_ratio=3, **PLAIN, **SMALL).eval()


@pytest.fixture(params=[".pth", ".safetensors"])
def checkpoint(original: OriginalNAT, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / f"original{request.param}"
    if request.param == ".pth":
        torch.save({"model": original.state_dict(), "epoch": 3}, path)
    else:
        save_file(original.state_dict(), path)
    return path


def load(path: Path, **kwargs) -> torch.nn.Module:
    overlay = dict(file=str(path), **COUNT)
    return small_model(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_file_of_either_kind(checkpoint: Path, original: OriginalNAT) -> None:
    model = load(checkpoint)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
    assert "state_dict" not in model.pretrained_cfg
    assert model.pretrained_cfg["file"] == str(checkpoint)


def test_other_classes_channels_and_features(checkpoint: Path, original: OriginalNAT) -> None:
    weights = original.state_dict()
    model = load(checkpoint, num_classes=3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(model.levels[0].blocks[0].attn.rpb, weights["levels.0.blocks.0.attn.rpb"])
    model = load(checkpoint, in_chans=1)
    torch.testing.assert_close(
        model.patch_embed.proj[0].weight, weights["patch_embed.proj.0.weight"].sum(1, keepdim=True)
    )
    x = torch.randn(1, 3, 64, 64)
    features = load(checkpoint, features_only=True)
    want = load(checkpoint).forward_intermediates(x, intermediates_only=True)
    for got, expected in zip(features.eval()(x), want, strict=True):
        torch.testing.assert_close(got.permute(0, 3, 1, 2), expected)


def test_other_window_resizes_the_bias(checkpoint: Path, original: OriginalNAT) -> None:
    model = load(checkpoint, kernel_size=11)
    table = original.state_dict()["levels.0.blocks.0.attn.rpb"]
    want = torch.nn.functional.interpolate(table[None], size=(21, 21), mode="bicubic")[0]
    torch.testing.assert_close(model.levels[0].blocks[0].attn.rpb.detach(), want)
    # Exact for a table that the interpolation cannot bend.
    flat = {
        k: torch.ones_like(v) if k.endswith("rpb") else v for k, v in model.state_dict().items()
    }
    resized = natten.models.checkpoint_filter_fn(flat, small_model(kernel_size=5))
    torch.testing.assert_close(resized["levels.0.blocks.0.attn.rpb"], torch.ones(1, 9, 9))


def test_timm_saves_and_loads_locally(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("nat_pico").eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_malicious_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"head.weight": Malicious()}}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth is refused.*could run any code"):
        load(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


def test_truncated_file_is_refused(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for kept in (0, 7, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"original\.(pth|safetensors) is"):
            load(checkpoint)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict, but list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "empty.pth")
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="none of the layouts"):
        load(tmp_path / "resnet.safetensors")


def test_files_with_some_bytes_changed_load_or_are_refused(tmp_path: Path) -> None:
    """Whatever torch's unpickler stumbles over is told as what it is: a damaged file."""
    state = small_model().state_dict()
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "x.safetensors")
    generator = torch.Generator().manual_seed(0)

    def number(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    refused = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(20):
                damaged[number(min(len(whole), 4000))] = number(256)
            path.write_bytes(damaged)
            try:
                read_checkpoint(path)
            except ValueError:
                refused += 1
    assert refused > 60
    (tmp_path / "empty.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"empty\.pth is truncated"):
        read_checkpoint(tmp_path / "empty.pth")


@pytest.mark.parametrize(
    ("layout", "end", "lacks"),
    [
        ("huggingface", "self.key.weight", "self.key.weight"),
        ("huggingface", "self.query.weight", "self.query.weight"),
        ("natten", "gamma2", "gamma2"),
        ("natten", "gamma1", "gamma1"),
    ],
)
def test_an_incomplete_checkpoint_is_not_converted(layout: str, end: str, lacks: str) -> None:
    state, _ = natten.models.convert(small_model(layer_scale=1e-5).state_dict(), layout)
    cut = {key: tensor for key, tensor in state.items() if not key.endswith(end)}
    with pytest.raises(ValueError, match=f"not complete: it lacks .*{lacks}"):
        natten.models.convert(cut, "natten" if layout == "huggingface" else "huggingface")


def test_averaged_weights_and_wrappers(original: OriginalNAT, tmp_path: Path) -> None:
    state = original.state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": wrapped}, tmp_path / "training.pth")
    read = read_checkpoint(tmp_path / "training.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def published_of(original: OriginalNAT) -> dict[str, torch.Tensor]:
    """As the toolboxes of detection and segmentation save a network with this backbone."""
    backbone = {
        k: v for k, v in original.state_dict().items() if not k.startswith(("head", "norm."))
    }
    norms = {f"norm{i}.{p}": torch.rand(16 * 2**i) for i in range(4) for p in ("weight", "bias")}
    heads = {"decode_head.conv_seg.weight": torch.ones(3), "neck.convs.0.weight": torch.ones(2)}
    return {**{f"backbone.{k}": v for k, v in {**backbone, **norms}.items()}, **heads}


def features_of(model: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 3, 64, 64))


def test_checkpoints_of_networks_around_a_backbone(
    original: OriginalNAT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = published_of(original)
    meta = {"epoch": 12, "mAP": np.float64(0.5), "args": Namespace(out=tmp_path), "size": (3, 4)}
    torch.save({"meta": meta, "state_dict": published}, tmp_path / "upernet.pth")
    torch.save({"state_dict": published}, tmp_path / "weights.pth")  # timm reads less than we do
    plain = small_model()
    plain.load_state_dict(original.state_dict())
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = plain.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    overlay = dict(file=str(tmp_path / "upernet.pth"))
    for model in (
        small_model(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True),
        small_model(features_only=True, checkpoint_path=tmp_path / "weights.pth"),
    ):
        for got, expected in zip(features_of(model), want, strict=True):
            torch.testing.assert_close(got, expected)
    assert "feature_cls='dense') has them" in caplog.text
    model = small_model()
    # There is no classifier in it, which a strict load says and another one takes.
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.fc\.weight"):
        model.load_state_dict(published)
    model.load_state_dict(published, strict=False)
    with torch.no_grad():
        got = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "prefix", ["model.pixel_level_module.encoder.", "dinat.", ""], ids=["oneformer", "model", "own"]
)
def test_huggingface_names_of_a_backbone(prefix: str, original: OriginalNAT) -> None:
    exported, _ = natten.models.convert(original.state_dict(), "huggingface")
    exported = {k.replace("dinat.", prefix): v for k, v in exported.items()}
    exported["transformer_module.queries.weight"] = torch.ones(2)
    if prefix:
        for part in ("weight", "bias"):
            exported[f"{prefix}hidden_states_norms.stage2.{part}"] = torch.ones(32)
    model, same = small_model(features_only=True), small_model(features_only=True)
    model.load_state_dict(original.state_dict())
    if not prefix:
        del exported["transformer_module.queries.weight"]
    same.load_state_dict(exported)
    torch.testing.assert_close(features_of(same), features_of(model), rtol=0, atol=0)


def test_training_checkpoints_of_timm(original: OriginalNAT, tmp_path: Path) -> None:
    from timm.utils import CheckpointSaver

    model = small_model()
    model.load_state_dict(original.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(
        model, optimizer, args=Namespace(model="nat_mini", data=tmp_path), checkpoint_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=0.5)
    last = tmp_path / "last.pth.tar"
    with torch.serialization.safe_globals([type(tmp_path)]):  # timm itself refuses a path in args
        loaded = [small_model(checkpoint_path=last), load(last)]
    for same in loaded:
        torch.testing.assert_close(features_of(same), features_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"features_only": True}], ids=["plain", "features"])
def test_nothing_is_not_loaded_silently(arguments: dict, original: OriginalNAT) -> None:
    state = original.state_dict()
    foreign = {"conv1.weight": torch.ones(2), "layer1.0.bn1.bias": torch.ones(2)}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="none of the layouts"):
            small_model(**arguments).load_state_dict(foreign, strict=strict)
        twice = {f"{name}.{k}": v for name in ("student", "teacher") for k, v in state.items()}
        with pytest.raises(RuntimeError, match=r"holds several backbones, under 'student\.'"):
            small_model(**arguments).load_state_dict(twice, strict=strict)
    # In a network of one's own.
    for key in ("original", "natten"):
        network = torch.nn.ModuleDict({"body": small_model(**arguments)})
        converted = natten.models.convert(state, key)[0]
        network.load_state_dict({f"body.{k}": v for k, v in converted.items()})
        plain = small_model(**arguments)
        plain.load_state_dict(state)
        assert torch.equal(features_of(network["body"])[0], features_of(plain)[0])
        copied = pickle.loads(pickle.dumps(network))
        copied.load_state_dict({f"body.{k}": v for k, v in state.items()})


def test_no_network_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"nat_mini could not be downloaded.*dict\(file=\.\.\.\)"
    ):
        timm.create_model("nat_mini", pretrained=True)


@pytest.mark.parametrize("layout", ["huggingface", "original", "natten"])
def test_convert_command(
    layout: str, checkpoint: Path, original: OriginalNAT, capsys: pytest.CaptureFixture[str]
) -> None:
    there = checkpoint.with_name(f"there{checkpoint.suffix}")
    back = checkpoint.with_name("back.safetensors")
    assert main(["convert", str(checkpoint), str(there), "--to", layout]) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    for key in original.state_dict():
        assert key in printed
    for key in read_checkpoint(there):
        assert key in printed
    assert main(["convert", str(there), str(back), "--to", "original"]) == 0
    for key, tensor in load_file(back).items():
        assert torch.equal(tensor, original.state_dict()[key])


def test_convert_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pth").write_bytes(b"PK")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "y.pth")]) == 2
    assert "x.pth is" in capsys.readouterr().err


def test_list_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "nat_mini"]) == 0
    printed = capsys.readouterr().out
    assert "dinat_mini.shi_in1k" in printed
    assert "19.98 M" in printed
    assert "81.8" in printed
    assert "nat_base" not in printed


def test_list_command_without_a_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "swin"]) == 2
    assert capsys.readouterr().err.startswith("python -m natten.models: error: no model's name")
