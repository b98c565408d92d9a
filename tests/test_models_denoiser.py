"""The denoiser of photographs, its training, and its weights in the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from safetensors.torch import load_file  # noqa: E402

from natten.models import ImageDenoiser, restore  # noqa: E402


@pytest.fixture
def small_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = restore.photograph
    monkeypatch.setattr(restore, "photograph", lambda name: whole(name)[:, 20:68, 170:226])
    monkeypatch.setattr(restore, "FACE", (0, 0, 48, 56))


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (5, 64)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = ImageDenoiser(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = model(x, torch.tensor([0.05, 0.2]))
        assert out.shape == x.shape
        # Each image has its own noise.
        for i, noise in enumerate((0.05, 0.2)):
            torch.testing.assert_close(out[i : i + 1], model(x[i : i + 1], noise))
        assert not torch.allclose(model(x, 0.05)[1], out[1])
        # What is far away does not matter to a model of these windows, what is near does.
        changed = x.clone()
        changed[..., -1, -1] += 0.3
        assert not torch.equal(model(changed, 0.1)[..., -1, -1], model(x, 0.1)[..., -1, -1])
    with pytest.raises(ValueError, match=r"noise must be a number or have the shape \[2\]"):
        model(x, torch.rand(3))


def test_gradients_reach_all_parameters() -> None:
    model = ImageDenoiser(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3)
    model(torch.rand(1, 3, 14, 14)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_training_writes_weights_and_card(
    small_photographs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    tiny = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3)
    monkeypatch.setattr(restore.timm, "create_model", lambda name, **k: create(name, **tiny, **k))
    words = ["--steps", "200", "--size", "16", "--device", "cpu", "--lr", "0.02"]
    result = restore.main(["train", "--output", str(tmp_path), *words])
    assert json.loads((tmp_path / f"{restore.NAME}.json").read_text()) == result
    assert {t.dtype for t in load_file(tmp_path / f"{restore.NAME}.safetensors").values()} == {
        torch.float16
    }
    card = (tmp_path / f"{restore.NAME}.md").read_text()
    for name in restore.HELD_OUT:
        for noise in restore.NOISES:
            row = result["psnr"][name][str(noise)]
            assert f"| {name} | {noise} | {row['noisy']:.2f} |" in card
            # Noise of this deviation has this PSNR, but for what is clipped.
            assert row["noisy"] == pytest.approx(-20 * np.log10(noise / 255), abs=1.5)
            assert row["non-local means"] > row["noisy"] + 2
        assert result["psnr"][name]["50"]["this model"] > result["psnr"][name]["50"]["noisy"] + 2


def test_training_is_repeatable(
    small_photographs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "measure", lambda model: {"x": {"1": {"this model": 0.0}}})
    words = ["--steps", "2", "--size", "16", "--device", "cpu"]
    for folder in ("one", "two"):
        restore.main(["train", "--output", str(tmp_path / folder), *words])
    one, two = (load_file(tmp_path / f / f"{restore.NAME}.safetensors") for f in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_shipped_weights_have_the_stated_quality() -> None:
    model = timm.create_model(restore.NAME, pretrained=True)
    path = Path(model.pretrained_cfg["file"])
    assert path.stat().st_size < 2e6
    stated = json.loads(path.with_suffix(".json").read_text())["psnr"]["chelsea"]["25"]
    clean, noisy = restore.noisy("chelsea", 25)
    got = restore.psnr(restore.remove(model, noisy, 25), clean)
    assert got == pytest.approx(stated["this model"], abs=0.02)
    for method in ("noisy", "total variation", "non-local means"):
        assert got > stated[method]


def test_measure_and_denoise(small_photographs: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = restore.main(["measure", "--picture", str(tmp_path / "picture.png")])
    assert set(result) == set(restore.HELD_OUT)
    assert Image.open(tmp_path / "picture.png").size[0] > 1000
    clean, noisy = restore.noisy("astronaut", 25)
    pixels = noisy.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "noisy.png")
    restore.main(
        ["denoise", str(tmp_path / "noisy.png"), str(tmp_path / "clean.png"), "--noise", "25"]
    )
    denoised = torch.from_numpy(np.array(Image.open(tmp_path / "clean.png"))).permute(2, 0, 1)
    assert restore.psnr(denoised / 255, clean) > restore.psnr(noisy, clean) + 5
