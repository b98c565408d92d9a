"""The demo and the drawing code, on small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import natten
from natten import demo, viz

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def test_attended_tokens_of_a_dilated_clamped_window() -> None:
    # Group 1 of axis 0 holds tokens 1, 4, 7, 10: its last query keeps three of them.
    rows, columns = viz.attended_tokens((10, 0), (12, 9), (3, 5), dilation=(3, 1))
    assert rows.tolist() == [4, 7, 10]
    assert columns.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("setting", demo.SETTINGS, ids=str)
def test_attention_weights_give_the_output(setting: demo.Setting) -> None:
    torch.manual_seed(0)
    shape = (35, 34)
    query = torch.randn(1, *shape, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, *shape, 2, 8, dtype=torch.float64)
    arguments = {
        "kernel_size": setting.kernel_size,
        "stride": setting.stride,
        "dilation": setting.dilation,
        "is_causal": setting.is_causal,
    }
    output = natten.na2d(query, key, value, **arguments, backend="reference")
    for position in ((0, 0), (17, 20), (34, 33)):
        weights = viz.attention_weights(query, key, position, **arguments)
        assert weights.shape == (1, 4, *shape)
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 4, dtype=torch.float64))
        values = value.repeat_interleave(2, dim=-2)
        expected = torch.einsum("bhxy,bxyhd->bhd", weights, values)
        torch.testing.assert_close(output[(slice(None), *position)], expected)


def test_tokens_score_the_distance_of_patches() -> None:
    image = torch.rand(6, 7, 3, generator=torch.Generator().manual_seed(0))
    query, key, value = demo.tokens(image)
    assert query.shape == key.shape == value.shape == (1, 6, 7, 2, demo.HEAD_DIM)
    scores = torch.einsum("hd,yxhd->hyx", query[0, 3, 3], key[0])
    own = image[2:5, 2:5]
    other = image[1:4, 3:6]  # the patch around (2, 4)
    gap = (own - other).square().mean() / demo.NOISE**2 / 2
    for head, sharpness in enumerate(demo.SHARPNESS):
        difference = scores[head, 3, 3] - scores[head, 2, 4]
        torch.testing.assert_close(difference, gap * sharpness**2, rtol=1e-4, atol=1e-4)


def test_a_neighborhood_is_drawn_where_its_tokens_are() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    viz.draw_neighborhood(axes, [(1, 2)], (5, 6), 3)
    drawn = torch.tensor(axes.get_images()[0].get_array().tolist())
    colored = (drawn != drawn[4, 5]).any(-1)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[0:3, 1:4] = True
    assert colored.equal(expected)
    # The query, and query (0, 2), whose window is clamped to the same rows.
    assert len(axes.collections) == 2


def test_drawing_refuses_three_axes() -> None:
    from matplotlib.figure import Figure

    with pytest.raises(ValueError, match=r"shape: a grid of 1 or 2 axes .* got \(4, 4, 4\)"):
        viz.draw_neighborhood(Figure().subplots(), [(0, 0, 0)], (4, 4, 4), 3)


def test_demo_checks_every_setting_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    path = tmp_path / "picture.png"
    times = tmp_path / "times.png"
    words = ["--height", "44", "--device", "cpu", "--output", str(path), "--times", str(times)]
    monkeypatch.setattr(demo, "_SIDES", (13, 16))
    assert demo.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("-fna") == len(demo.SETTINGS)
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 500
    with Image.open(times) as picture:
        assert picture.width > 500


def test_dense_attention_is_left_out_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SIDES", (13, 14, 15))
    monkeypatch.setattr(demo, "dense_milliseconds", lambda *tensors: 200.0 * tensors[0].shape[1])
    rows = demo.growth("cpu", torch.float32)
    assert [(tokens, dense) for tokens, _, dense in rows] == [
        (169, 2600.0), (196, None), (225, None)
    ]  # fmt: skip
    (line, other) = demo.growth_figure(rows, "here").axes[0].lines
    assert (len(line.get_xdata()), len(other.get_xdata())) == (1, 3)


def test_demo_fails_when_an_output_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS[:1])
    right = natten.na2d

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        output = right(*args, **kwargs)
        return output if kwargs.get("backend") else output + 0.01

    monkeypatch.setattr(natten, "na2d", wrong)
    path = tmp_path / "picture.png"
    assert (
        demo.main(["--height", "44", "--device", "cpu", "--no-times", "--output", str(path)]) == 1
    )
    assert "differs from the reference by 1.0e-02" in " ".join(capsys.readouterr().out.split())
