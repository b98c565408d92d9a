"""Every example runs at toy size, and does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *words: str) -> dict[str, float]:
    return load(name)["main"](list(words))


def load(name: str) -> dict[str, Any]:
    pytest.importorskip("timm")
    pytest.importorskip({"diffuse": "sklearn", "video": "sklearn"}.get(name, "skimage"))
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_segment() -> None:
    result = run("segment", "--steps", "12", "--crop", "32")
    assert result["loss"] < 0.65  # of an even guess 0.69
    assert result["overlap"] > 0.2


def test_diffuse(tmp_path: Path) -> None:
    words = ["--steps", "25", "--dim", "36", "--depth", "3"]
    pytest.importorskip("matplotlib")
    result = run("diffuse", *words, "--picture", str(tmp_path / "digits.png"))
    assert result["last"] < 0.75 * result["first"]
    assert (tmp_path / "digits.png").is_file()
    # The text, and what is known of single pixels, matter.
    names = load("diffuse")
    torch.manual_seed(0)
    model = names["TextDiffusion"](36, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, time, known = torch.randn(1, 1, 8, 8), torch.rand(1), torch.zeros(1, 2, 8, 8)
    out = model(x, time, *names["spell"]([3]), known)
    assert not torch.allclose(out, model(x, time, *names["spell"]([8]), known))
    known[:, :, 6:, 6:] = 1
    assert not torch.allclose(out, model(x, time, *names["spell"]([3]), known))


def test_video() -> None:
    result = run("video", "--steps", "8", "--dim", "24", "--frames", "5")
    assert result["stream_differs_by"] < 1e-4
    assert result["error"] < 2 * result["error_of_copying"]


def test_weather() -> None:
    result = run("weather", "--steps", "8", "--dim", "24")
    assert result["turning_differs_by"] < 1e-4
    assert result["error"] < result["error_of_persistence"]


def test_volume() -> None:
    result = run("volume", "--steps", "12", "--dim", "12", "--size", "13")
    assert result["right"] > 0.5


def test_upscale() -> None:
    result = run("upscale", "--steps", "8", "--dim", "12", "--size", "48")
    assert result["psnr"] > result["psnr_of_bicubic"] - 0.3
