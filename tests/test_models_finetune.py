"""Training on folders of images with timm's parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

from natten.models import finetune, train  # noqa: E402

SMALL = ["--model", "nat_pico", "--img-size", "16", "--workers", "0", "--device", "cpu", "--aa", ""]
FAST = [
    *("--batch-size", "8", "--warmup-epochs", "1", "--mixup", "0", "--cutmix", "0"),
    *("--reprob", "0", "--lr", "0.2", "--ema-decay", "0.5"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of red and of blue, in RGB and other modes."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("validation", 7)):
        for name, channel in (("red", 0), ("blue", 2)):
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
    create = timm.create_model
    small = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), kernel_size=3)

    def tiny(name: str, **kwargs) -> torch.nn.Module:
        return create(name, **small, **kwargs)

    monkeypatch.setattr(finetune.timm, "create_model", tiny)


def test_a_folder_trains_and_resumes(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), *SMALL, *FAST, "--output", str(tmp_path)]
    result = finetune.main([*words, "--epochs", "3", "--layer-decay", "0.9"])
    assert result["classes"] == 2
    assert result["val_accuracy"] > 85
    first = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    assert first["epoch"] == 2
    # Sampling from the same weights on.
    again = finetune.main(
        [*words, "--epochs", "5", "--resume", "--layer-decay", "0.9", "--grad-accum-steps", "2"]
    )
    assert again["epoch"] == 4
    rows = (tmp_path / "summary.csv").read_text().split()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3", "4"]
    # What it wrote begins another run, with another number of classes too.
    other = tmp_path / "other"
    more = finetune.main(
        [str(folder), *SMALL, *FAST, "--output", str(other), "--epochs", "1", "--lr", "0",
         "--initial-checkpoint", str(tmp_path / "last.pth.tar"), "--grad-checkpointing"]
    )  # fmt: skip
    assert more["val_accuracy"] == pytest.approx(again["val_accuracy"])
    finetune.main(
        [str(folder), *SMALL, *FAST, "--output", str(other), "--epochs", "1", "--num-classes", "3",
         "--initial-checkpoint", str(tmp_path / "last.pth.tar")]
    )  # fmt: skip


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a folder test of folders"):
        finetune.main([str(folder), *SMALL, "--val-split", "test", "--output", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        finetune.main([str(folder), *SMALL, "--resume", "--output", str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"natten\.models\.finetune trains on folders"):
        train.main(["--data", str(folder)])


def test_the_small_trainer_refuses_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one process, got WORLD_SIZE=2.*finetune"):
        train.main(["--data", "digits"])


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, timm\n"
        "from natten.models import finetune\n"
        "create = timm.create_model\n"
        "finetune.timm.create_model = lambda n, **k: create(n, embed_dim=16, depths=(1, 1),\n"
        "    num_heads=(1, 2), kernel_size=3, **k)\n"
        "finetune.main(sys.argv[1:])\n"
    )
    words = [*SMALL, *FAST, "--epochs", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "last.pth.tar").is_file()
