"""Pictures: that what is drawn is what the windows say. The demo's pictures are in test_demo.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import natten
from natten import devices, viz, window
from natten.nn import NeighborhoodAttention1D, NeighborhoodAttention2D

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure


@pytest.fixture(params=["light", "dark"], autouse=True)
def _theme(request: pytest.FixtureRequest) -> Iterator[None]:
    with viz.theme(request.param):
        yield


def saved(figure: Figure, folder: Path) -> Path:
    path = folder / "figure.png"
    figure.savefig(path, dpi=40)
    assert path.stat().st_size > 500
    return path


def luminance(color: str) -> float:
    r, g, b = to_rgb(color)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_themes_are_named() -> None:
    refused = pytest.raises(ValueError, match="theme must be 'light' or 'dark', got 'grey'")
    with refused, viz.theme("grey"):
        pass


def test_kinds_of_tiles_differ_in_grey() -> None:
    dark, middle, bright = sorted(
        luminance(c) for c in (viz._empty_color(), viz.PARTIAL, viz._full_color())
    )
    assert dark + 0.15 < middle < bright - 0.15


@pytest.mark.parametrize(
    ("positions", "shape", "arguments", "panels"),
    [
        ([(4,), (20,)], (24,), (6, 2), 1),
        ([(0, 0), (5, 6)], (6, 7), (3, 1, 2), 1),
        ([(2, 3, 3), (3, 0, 5)], (4, 6, 6), ((2, 3, 3), 1, 1, (True, False, False)), 4),
    ],
    ids=["1d", "2d", "3d"],
)
def test_neighborhoods_are_drawn_in_every_plane(
    positions: list, shape: tuple, arguments: tuple, panels: int, tmp_path: Path
) -> None:
    figure = viz.neighborhood_figure(positions, shape, *arguments, context=3, title="title")
    saved(figure, tmp_path)
    drawn = [axes for axes in figure.axes if axes.get_images()]
    assert len(drawn) == panels
    empty = torch.tensor(to_rgb(viz._empty_color()))
    colored = torch.stack(
        [
            (torch.tensor(axes.get_images()[0].get_array().tolist()) - empty).abs().amax(-1) > 1e-3
            for axes in drawn
        ]
    ).view(shape)
    expected = torch.zeros(shape, dtype=torch.bool)
    for position in positions:
        tokens = viz.attended_tokens(position, shape, *arguments)
        expected[torch.meshgrid(*tokens, indexing="ij")] = True
    assert colored.equal(expected)
    # The context tokens stand apart.
    assert len(figure.axes) == panels + 1
    assert len(figure.axes[-1].patches) == 3


def test_a_grid_of_four_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 3 axes"):
        viz.neighborhood_figure([(0, 0, 0, 0)], (3, 3, 3, 3), 2)


@pytest.mark.parametrize("is_causal", [False, (True, False)])
def test_the_block_mask_is_that_of_the_mask(is_causal: object, tmp_path: Path) -> None:
    shape, kernel_size, stride, tile = (10, 9), (5, 4), (2, 1), (4, 3)
    figure = Figure()
    axes = figure.subplots()
    viz.draw_block_mask(
        axes, shape, kernel_size, stride, is_causal, q_tile_shape=tile, kv_tile_shape=tile
    )
    saved(figure, tmp_path)
    causal = is_causal if isinstance(is_causal, tuple) else (is_causal,) * 2
    axes_of = [window.Axis(*v) for v in zip(shape, kernel_size, stride, (1, 1), causal)]
    mask = window.grid_mask(axes_of).view(*shape, *shape)
    corners = [(y, x) for y in range(0, shape[0], tile[0]) for x in range(0, shape[1], tile[1])]
    expected = torch.zeros(len(corners), len(corners), dtype=torch.int64)
    for i, (y, x) in enumerate(corners):
        for j, (v, u) in enumerate(corners):
            part = mask[y : y + 4, x : x + 3, v : v + 4, u : u + 3]
            expected[i, j] = int(part.any()) + int(part.all())
    drawn = torch.tensor(axes.get_images()[0].get_array().tolist())
    assert drawn.equal(expected)
    counts = [int((expected == n).sum()) for n in (2, 1, 0)]
    assert axes.get_title() == "{} full, {} partial, {} skipped".format(*counts)


@pytest.mark.parametrize("aligned", [False, True])
def test_tiles_of_a_query_tile_are_those_that_are_counted(aligned: bool) -> None:
    shape, kernel_size = (16, 12), (5, 6)
    call = dict(q_tile_shape=(4, 4), kv_tile_shape=(2, 4))
    totals = [0, 0]
    for tile in [(y, x) for y in range(4) for x in range(3)]:
        axes = Figure().subplots()
        viz.draw_tiles(axes, tile, shape, kernel_size, **call, aligned=aligned)
        words = axes.get_title().split()
        totals[0] += int(words[0])
        totals[1] += int(words[2])
    found = natten.simulate(shape, kernel_size, **call, aligned=aligned).forward
    assert totals == [found.full, found.partial]


def test_tiles_of_one_axis_and_wrong_tiles(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    viz.draw_tiles(axes, (2,), (64,), 16, q_tile_shape=(8,), kv_tile_shape=(8,))
    viz.draw_tile_legend(figure)
    saved(figure, tmp_path)
    with pytest.raises(ValueError, match="tile must lie in the grid"):
        viz.draw_tiles(axes, (8,), (64,), 16, q_tile_shape=(8,), kv_tile_shape=(8,))
    with pytest.raises(ValueError, match="1 or 2 axes"):
        viz.draw_tiles(
            axes, (0, 0, 0), (8, 8, 8), 3, q_tile_shape=(2, 2, 2), kv_tile_shape=(2, 2, 2)
        )


def test_attention_of_a_module_over_a_picture(tmp_path: Path) -> None:
    module = NeighborhoodAttention2D(16, 2, 3)
    x, image = torch.randn(1, 6, 8, 16), torch.rand(30, 40, 3)
    figure = viz.module_attention_figure(module, x, image, [(0, 0), (5, 7)])
    saved(figure, tmp_path)
    # The mean and two heads, for two queries, and the colour bar.
    assert len(figure.axes) == 2 * 3 + 1
    layer = figure.axes[1].get_images()[1].get_array()
    assert int((~layer.mask).sum()) == 9
    assert len(viz.module_attention_figure(module, x, image, [(0, 0)], heads=[1]).axes) == 2
    with pytest.raises(ValueError, match="must have an attention_map method, got Linear"):
        viz.module_attention_figure(torch.nn.Linear(2, 2), x, image, [(0, 0)])
    with pytest.raises(ValueError, match=r"x must have the shape \[1, X, Y, channels\]"):
        viz.module_attention_figure(
            NeighborhoodAttention1D(16, 2, 3), torch.randn(1, 6, 16), image, [(0,)]
        )


def test_roofline_and_benchmark_charts(tmp_path: Path) -> None:
    figure = Figure(layout="constrained")
    axes = figure.subplots(2)
    viz.draw_roofline(
        axes[0], devices.find("h100"), torch.bfloat16, {"a": (10.0, 20.0), "b": (900.0, 500.0)}
    )
    viz.draw_benchmark(axes[1], ["a", "b"], {"ours": [1, 2], "theirs": [30.0, None]}, "ms")
    saved(figure, tmp_path)
    for ax in axes:
        assert ax.get_xlabel()
    assert len(axes[1].patches) == 3
    assert axes[1].get_xscale() == "log"


def test_advice_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    advice = natten.simulate((64, 64), 16, heads=8).advise()
    figure = viz.advice_figure(advice)
    saved(figure, tmp_path)
    left, right = figure.axes
    assert len(left.collections) == len(advice.strides)
    assert len(right.collections) == len(advice.windows)
    for axes in (left, right):
        assert axes.get_xlabel()
        assert axes.get_ylabel()


@pytest.mark.parametrize(
    ("position", "text"),
    [((9, 3), "must lie in the grid"), ((-1, 3), "at least 0"), ((3,), "must have 2 values")],
)
def test_positions_outside_of_the_grid_are_refused(position: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        viz.attended_tokens(position, (8, 8), 3)
    with pytest.raises(ValueError, match=text):
        viz.neighborhood_figure([position], (8, 8), 3)


def test_other_arguments_of_pictures_are_checked() -> None:
    with pytest.raises(ValueError, match="context must be at least 0, got -1"):
        viz.neighborhood_figure([(1, 1)], (8, 8), 3, context=-1)
    with pytest.raises(ValueError, match="series 'x' must have 1 values, got 2"):
        viz.draw_benchmark(Figure().subplots(), ["a"], {"x": [1.0, 2.0]}, "ms")


def test_grids_have_labelled_axes() -> None:
    for shape, labels in (((9,), ("axis 0", "")), ((6, 6), ("axis 1", "axis 0"))):
        axes = viz.neighborhood_figure([(1,) * len(shape)], shape, 3).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == labels
    panels = viz.neighborhood_figure([(1, 1, 1)], (2, 5, 5), (1, 3, 3)).axes
    assert (panels[0].get_xlabel(), panels[0].get_ylabel()) == ("axis 2", "axis 1")
    assert [axes.get_title() for axes in panels] == ["0 on axis 0", "1 on axis 0"]


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        viz.neighborhood_figure([(4, 4)], (9, 9), 3)


def test_a_drawn_mask_is_that_of_the_call():
    arguments = dict(kernel_size=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True))
    axes = Figure().subplots()
    mask = viz.draw_mask(axes, (6, 5), **arguments)
    for query in range(30):
        rows, columns = viz.attended_tokens(divmod(query, 5), (6, 5), **arguments)
        expected = (rows[:, None] * 5 + columns).flatten()
        assert torch.equal(mask[query].nonzero().flatten(), expected.sort().values)
    assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), mask)


def test_a_window_moves_over_the_grid(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    calls = {"window": {"kernel_size": 3}, "causal": {"kernel_size": 2, "is_causal": True}}
    animation = viz.moving_window((3, 4), calls, every=5)
    animation.save(tmp_path / "window.gif", writer="pillow", dpi=40)
    with Image.open(tmp_path / "window.gif") as picture:
        assert picture.n_frames == 3


def test_upsampling_is_drawn(tmp_path: Path) -> None:
    shape, arguments = (5, 6), {"kernel_size": 3, "upsampling": (3, 2)}
    own = viz.attended_tokens((4, 5), shape, **arguments)
    assert [axis.tolist() for axis in own] == [[0, 1, 2], [1, 2, 3]]
    key, query = torch.randn(1, 5, 6, 1, 8), torch.randn(1, 15, 12, 2, 8)
    weights = viz.attention_weights(query, key, (4, 5), **arguments)
    assert weights.shape == (1, 2, 5, 6)
    near = torch.zeros(5, 6, dtype=torch.bool)
    near[torch.meshgrid(*own, indexing="ij")] = True
    assert torch.equal(weights[0, 0] > 0, near)
    assert weights.sum((2, 3)) == pytest.approx(1, abs=1e-5)
    values = torch.eye(30).view(1, 5, 6, 1, 30)
    out = natten.na2d(query, key, values, **arguments)
    torch.testing.assert_close(out[0, 4, 5].view(2, 5, 6), weights[0], rtol=1e-4, atol=1e-5)
    figure = viz.neighborhood_figure([(4, 5), (14, 0)], shape, **arguments)
    saved(figure, tmp_path)
    points = [tuple(p) for c in figure.axes[0].collections for p in c.get_offsets().tolist()]
    assert (2.25, 1.0) in points  # (4, 5) in its cell, x first
    # Queries of one window: those of whole cells, at borders of two rows or columns of cells.
    assert len(points) == (2 + 4) * 6
    cube = viz.neighborhood_figure([(3, 0, 0)], (2, 3, 3), 2, upsampling=2)
    assert len([axes for axes in cube.axes if axes.get_images()]) == 2
    mask = viz.draw_mask(Figure().subplots(), (5,), 3, upsampling=2)
    assert mask.shape == (10, 5)
    with pytest.raises(ValueError, match="position must lie in the grid"):
        viz.attended_tokens((15, 0), shape, **arguments)
    with pytest.raises(NotImplementedError, match="upsampling of a moving window"):
        viz.moving_window((4, 4), {"call": arguments})
