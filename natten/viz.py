"""Pictures: neighborhoods, tiles, what a query attends to, what calls cost.

Matplotlib is imported by the functions that draw. Functions called ``draw_...`` draw into axes that
the caller has made; those called ``..._figure`` make their own. Inside ``with theme("dark"):`` they
draw for dark pages. A notebook shows returned figures after ``%matplotlib inline``.

The colours are those of Okabe and Ito and the map "viridis", which people with any kind of colour
vision can tell apart; what belongs to different things also differs in brightness, hatching or
markers, for prints in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from natten import window
from natten.functional import geometry
from natten.validation import check_circular, check_upsampling, check_window, int_tuple

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from natten.advice import Advice, Suggestion
    from natten.devices import Device

QUERY_COLOR = "#D55E00"
TOKEN_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
WEIGHT_MAP = "viridis"
# In brightness between skipped and full tiles, and hatched.
PARTIAL = "#E69F00"
SERIES_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "oo")
_MARKERS = "osD^vPX"

_DARK = {
    "figure.facecolor": "#16181D", "savefig.facecolor": "#16181D", "axes.facecolor": "#16181D",
    "text.color": "#E8E8E8", "axes.labelcolor": "#E8E8E8", "axes.edgecolor": "#9A9A9A",
    "xtick.color": "#C8C8C8", "ytick.color": "#C8C8C8", "grid.color": "#3A3D44",
    "legend.facecolor": "#22252C", "legend.edgecolor": "#3A3D44",
}  # fmt: skip


P = ParamSpec("P")
R = TypeVar("R")


def _drawing(function: Callable[P, R]) -> Callable[P, R]:
    """A function that needs matplotlib, and says so where it is missing."""

    @wraps(function)
    def draw(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise RuntimeError("matplotlib is not installed: pip install matplotlib") from error

    return draw


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Draw for "light" or "dark" pages inside the block, which should also save the figure."""
    import matplotlib

    if name not in ("light", "dark"):
        raise ValueError(f"theme must be 'light' or 'dark', got {name!r}")
    parameters: Any = {"hatch.linewidth": 0.7, **(_DARK if name == "dark" else {})}
    with matplotlib.rc_context(parameters):
        yield


def _is_dark() -> bool:
    import matplotlib
    from matplotlib.colors import to_rgb

    return sum(to_rgb(matplotlib.rcParams["figure.facecolor"])) < 1.5


def _empty_color() -> str:
    return "#30333B" if _is_dark() else "#EDEDED"


def _full_color() -> str:
    return "#BFE3F8" if _is_dark() else "#0072B2"


def _ink() -> str:
    return "white" if _is_dark() else "black"


def _checked_position(position: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    found = int_tuple("position", tuple(position), len(shape), minimum=0)
    if any(p >= n for p, n in zip(found, shape)):
        raise ValueError(f"position must lie in the grid {tuple(shape)}, got {tuple(position)}")
    return found


def _axes(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
) -> list[window.Axis]:
    """The window of a call, checked."""
    windows = check_window(tuple(shape), kernel_size, stride, dilation, is_causal)
    rings = check_circular(is_circular, tuple(shape), *windows) or (False,) * len(shape)
    factors = int_tuple("upsampling", upsampling, len(shape))
    axes = list(map(window.Axis, shape, *windows, rings, factors))
    check_upsampling(factors, window.queries_of(axes), tuple(shape), windows[2], None)
    return axes


def attended_tokens(
    position: Sequence[int],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
) -> tuple[Tensor, ...]:
    """The indices, axis by axis, that the query at `position` attends to in a grid of `shape`.

    With upsampling, position is that in the grid of queries, which is that many times as fine.
    The neighborhood is their product: `torch.meshgrid(*attended_tokens(...), indexing="ij")`.
    """
    axes = _axes(shape, kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    place = _checked_position(position, window.queries_of(axes))
    return tuple(torch.tensor(window.attended(*p), device="cpu") for p in zip(place, axes))


def attention_weights(
    query: Tensor,
    key: Tensor,
    position: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
) -> Tensor:
    """The attention weights of one query, laid over the grid.

    query, key: `[B, *X, H, D]` and `[B, *X, Hkv, D]`; with upsampling, query is of a finer grid.
    `scale` defaults to `D ** -0.5`.
    Returns `[B, H, *X]`, zero outside of the neighborhood and of sum 1 over the grid.
    """
    shape = key.shape[1:-2]
    heads, head_dim = query.shape[-2:]
    arguments = (kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    tokens = attended_tokens(position, shape, *arguments)
    box = tuple(torch.meshgrid(*tokens, indexing="ij"))
    batch = (slice(None),)
    near = key[batch + box].flatten(1, -3).repeat_interleave(heads // key.shape[-2], dim=-2)
    scores = torch.einsum("bhd,bnhd->bhn", query[batch + tuple(position)], near)
    weights = (scores * (head_dim**-0.5 if scale is None else scale)).softmax(-1)
    grid = weights.new_zeros(*weights.shape[:2], *shape)
    grid[batch + batch + box] = weights.unflatten(-1, box[0].shape)
    return grid


def _neighborhoods(
    positions: Sequence[Sequence[int]], shape: Sequence[int], arguments: Sequence[Any]
) -> tuple[Tensor, list[list[tuple[int, ...]]]]:
    """Which of the neighborhoods a token is in, -1 for none, and the queries that share each."""

    def tokens_of(position: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        found = attended_tokens(position, shape, *arguments)
        return tuple(tuple(axis.tolist()) for axis in found)

    owner = torch.full(tuple(shape), -1, device="cpu")
    queries = window.queries_of(_axes(shape, *arguments))
    everyone = list(product(*(range(n) for n in queries)))
    tokens = {query: tokens_of(query) for query in everyone}
    sharing = []
    for number, position in enumerate(positions):
        own = tokens[_checked_position(position, queries)]
        box = (torch.tensor(axis, device="cpu") for axis in own)
        owner[torch.meshgrid(*box, indexing="ij")] = number
        sharing.append([query for query, theirs in tokens.items() if theirs == own])
    return owner, sharing


def _draw_grid(
    axes: Axes, owner: Tensor, marks: Sequence[tuple[tuple[float, float], bool]], size: float = 1.0
) -> None:
    """A plane of tokens in the colours of their neighborhoods, and queries: (place, is chosen)."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    image = torch.tensor(to_rgb(_empty_color()), device="cpu").repeat(*owner.shape, 1)
    for y, x in (owner >= 0).nonzero().tolist():
        number = int(owner[y, x]) % len(TOKEN_COLORS)
        image[y, x] = torch.tensor(to_rgb(TOKEN_COLORS[number]), device="cpu")
        if number:
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5), 1, 1, fill=False, linewidth=0,
                    edgecolor=(0, 0, 0, 0.35), hatch=_HATCHES[number],
                )
            )  # fmt: skip
    for (y, x), chosen in marks:
        mark, area = ("s", 60 * size) if chosen else (".", 14 * size)
        axes.scatter([x], [y], marker=mark, s=area, c="black", linewidths=0, zorder=3)
    axes.imshow(image.numpy(), interpolation="nearest")
    height, width = owner.shape
    axes.set_xticks([x - 0.5 for x in range(width + 1)], labels=[])
    axes.set_yticks([y - 0.5 for y in range(height + 1)], labels=[])
    axes.grid(color=axes.get_facecolor(), linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@_drawing
def draw_neighborhood(
    axes: Axes,
    positions: Sequence[Sequence[int]],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
) -> None:
    """Draw a 1-D or 2-D grid of tokens and the neighborhoods of the queries at `positions`.

    A query is a black square in a neighborhood of its own colour. Dots mark the other queries
    whose neighborhood is the same. With upsampling, shape is the grid of keys, and positions are
    those in the finer grid of queries, of which several lie in the cell of a key.
    """
    if len(shape) not in (1, 2):
        raise ValueError(f"shape: a grid of 1 or 2 axes can be drawn, got {tuple(shape)}")
    arguments = (kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    owner, sharing = _neighborhoods(positions, shape, arguments)
    marks = []
    for position, queries in zip(positions, sharing):
        for query in queries:
            y, x = (0.0,) * (2 - len(shape)) + _in_cells(query, shape, upsampling)
            marks.append(((y, x), query == tuple(position)))
    # A single axis is drawn as a grid of one row.
    finest = max(int_tuple("upsampling", upsampling, len(shape)))
    _draw_grid(axes, owner.unsqueeze(0) if len(shape) == 1 else owner, marks, 1 / finest)
    _label_grid(axes, len(shape))


def _in_cells(
    query: Sequence[int], shape: Sequence[int], upsampling: int | Sequence[int]
) -> tuple[float, ...]:
    """Where a query lies among the tokens of keys."""
    factors = int_tuple("upsampling", upsampling, len(shape))
    return tuple((n + 0.5) / factor - 0.5 for n, factor in zip(query, factors))


def _label_grid(axes: Axes, rank: int) -> None:
    axes.set_xlabel(f"axis {rank - 1}", fontsize=8)
    if rank > 1:
        axes.set_ylabel(f"axis {rank - 2}", fontsize=8)


@_drawing
def neighborhood_figure(
    positions: Sequence[Sequence[int]],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
    *,
    context: int = 0,
    title: str = "",
) -> Figure:
    """The neighborhoods of queries in a grid of 1, 2 or 3 axes, 3-D grids as a row of planes.

    context: additional tokens that every query sees, drawn to the right, with a bold outline.
    """
    from matplotlib.figure import Figure

    shape = int_tuple("shape", tuple(shape), len(shape))
    if len(shape) not in (1, 2, 3):
        raise ValueError(f"shape: a grid of 1 to 3 axes can be drawn, got {shape}")
    if context < 0:
        raise ValueError(f"context must be at least 0, got {context}")
    arguments = (kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    owner, sharing = _neighborhoods(positions, shape, arguments)
    finest = max(int_tuple("upsampling", upsampling, len(shape)))
    planes = owner.view(-1, *owner.shape[-2:]) if len(shape) > 1 else owner.view(1, 1, -1)
    count, height, width = planes.shape
    cell = min(0.3, 12 / (count * (width + 1)))
    extra = 2.5 * cell + 0.6 if context else 0
    size = (count * (width + 1) * cell + extra, height * cell + 0.95)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [width] * count + ([max(extra / cell - 1, 2)] if context else [])
    panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    for number in range(count):
        marks = []
        for position, queries in zip(positions, sharing):
            for query in queries:
                plane, y, x = (0.0,) * (3 - len(shape)) + _in_cells(query, shape, upsampling)
                if round(plane) == number:
                    marks.append(((y, x), query == tuple(position)))
        _draw_grid(panels[number], planes[number], marks, size=(cell / 0.3) ** 2 / finest)
        if not number:
            _label_grid(panels[number], len(shape))
        if len(shape) == 3:
            panels[number].set_title(f"{number} on axis 0", fontsize=9)
    if context:
        _draw_context(panels[-1], context)
    if title:
        figure.suptitle(title, fontsize=9, family="monospace")
    return figure


@_drawing
def draw_mask(
    axes: Axes,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    is_circular: bool | Sequence[bool] = False,
    upsampling: int | Sequence[int] = 1,
) -> Tensor:
    """Draw which keys (columns) each query (row) of a grid attends to, tokens in row-major order.

    Returns that mask, bool `[queries, keys]`: what a call with these arguments computes is dense
    attention with it.
    """
    from matplotlib.colors import ListedColormap

    shape = int_tuple("shape", tuple(shape), len(shape))
    mask = window.grid_mask(
        _axes(shape, kernel_size, stride, dilation, is_causal, is_circular, upsampling)
    )
    axes.imshow(
        mask.numpy(), cmap=ListedColormap([_empty_color(), _full_color()]), vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    return mask


@_drawing
def moving_window(
    shape: tuple[int, int], calls: Mapping[str, Mapping[str, Any]], every: int = 1
) -> FuncAnimation:
    """The neighborhood of one query after the other, row by row, for calls side by side.

    Args:
        shape: Rows and columns of tokens.
        calls: By title, arguments of :func:`draw_neighborhood` from kernel_size on.
        every: Only each so many queries.

    Returns:
        An animation of matplotlib: ``.save("window.gif", writer="pillow")``, or, in a notebook,
        ``IPython.display.HTML(animation.to_jshtml())``. Keep a reference to it until then.
    """
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(calls), 2.9), layout="constrained")
    panels = figure.subplots(1, len(calls), squeeze=False)[0]
    if any("upsampling" in arguments for arguments in calls.values()):
        raise NotImplementedError(
            "upsampling of a moving window is not implemented: all walk alike"
        )
    queries = list(product(*(range(n) for n in shape)))[::every]

    def draw(query: tuple[int, int]) -> list[Any]:
        for axes, (title, arguments) in zip(panels, calls.items()):
            axes.clear()
            draw_neighborhood(axes, [query], shape, **arguments)
            axes.set_title(title, fontsize=9)
        return []

    return FuncAnimation(figure, draw, frames=queries, interval=150)


def _draw_context(axes: Axes, count: int) -> None:
    from matplotlib.patches import Rectangle

    shown = min(count, 6)
    for row in range(shown):
        axes.add_patch(
            Rectangle(
                (-0.5, row - 0.5), 1, 1, facecolor=TOKEN_COLORS[2], edgecolor=_ink(), linewidth=1.5
            )
        )
    axes.set_xlim(-0.7, 0.7)
    axes.set_ylim(shown - 0.3, -0.7)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"{count} context", fontsize=9)


def _row_tiles(axis: window.Axis, q_tile: int) -> geometry.RowTiles:
    whole = geometry.Box(0, axis.length, 0, axis.length)
    return geometry.row_tiles((axis,), (whole,), (q_tile,))


def _tile_states(axis: window.Axis, q_tile: int, kv_tile: int) -> Tensor:
    """States of tiles on multiples of their shapes along an axis: 0 skipped, 1 partial, 2 full."""
    tiles = _row_tiles(axis, q_tile)
    begin = np.arange(0, axis.length, kv_tile)
    end = np.minimum(begin + kv_tile, axis.length)
    seen = (end > tiles.begin[:, None]) & (begin < tiles.stop[:, None])
    full = (begin >= tiles.sight[:, None]) & (end <= tiles.sight_stop[:, None])
    return torch.from_numpy(seen.astype(int) + full)


@_drawing
def draw_block_mask(
    axes: Axes,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    q_tile_shape: Sequence[int],
    kv_tile_shape: Sequence[int],
) -> None:
    """Draw the block-sparse mask: which pairs of tiles are full, partial (hatched) or skipped.

    Tiles lie on multiples of their shapes and are in row-major order. Title: how many there are.
    """
    from matplotlib.colors import ListedColormap

    windows = check_window(tuple(shape), kernel_size, stride, 1, is_causal)
    rank = len(shape)
    q_tile = int_tuple("q_tile_shape", q_tile_shape, rank)
    kv_tile = int_tuple("kv_tile_shape", kv_tile_shape, rank)
    states = torch.full((1, 1), 2, device="cpu")
    for values in zip(shape, *windows, q_tile, kv_tile):
        own = _tile_states(window.Axis(*values[:5]), *values[5:])
        # A pair is skipped if it is along any axis, and full if it is along all.
        states = torch.minimum(
            states.repeat_interleave(own.shape[0], 0).repeat_interleave(own.shape[1], 1),
            own.repeat(*states.shape),
        )
    colors = ListedColormap([_empty_color(), PARTIAL, _full_color()])
    axes.imshow(states.numpy(), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    if states.numel() <= 4096:
        _hatch(axes, [(y, x, 1, 1) for y, x in (states == 1).nonzero().tolist()])
    counts = [int((states == n).sum()) for n in range(3)]
    axes.set_title(f"{counts[2]} full, {counts[1]} partial, {counts[0]} skipped", fontsize=9)
    axes.set_xlabel("tiles of keys")
    axes.set_ylabel("tiles of queries")
    axes.tick_params(labelsize=8)


def _hatch(axes: Axes, boxes: Sequence[tuple[float, float, float, float]]) -> None:
    """Hatch boxes of (y, x, height, width) cells."""
    from matplotlib.patches import Rectangle

    for y, x, height, width in boxes:
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), width, height, fill=False, linewidth=0,
                edgecolor=(0, 0, 0, 0.55), hatch="////",
            )
        )  # fmt: skip


@_drawing
def draw_tiles(
    axes: Axes,
    tile: Sequence[int],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    q_tile_shape: Sequence[int],
    kv_tile_shape: Sequence[int],
    aligned: bool = False,
) -> None:
    """Draw the key tiles that one tile of queries visits, over a 1-D or 2-D grid.

    tile: which query tile, counted along each axis. Its queries are outlined, full key tiles dark,
    partial ones hatched. aligned: key tiles on multiples of their shape, instead of from the start
    of the union of the windows.
    """
    from matplotlib.patches import Rectangle

    shape = tuple(shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"shape: a grid of 1 or 2 axes can be drawn, got {shape}")
    windows = check_window(shape, kernel_size, stride, 1, is_causal)
    rank = len(shape)
    q_tile = int_tuple("q_tile_shape", q_tile_shape, rank)
    kv_tile = int_tuple("kv_tile_shape", kv_tile_shape, rank)
    spans: list[list[tuple[int, int, bool]]] = []
    queries = []
    for n, values in enumerate(zip(shape, *windows)):
        axis = window.Axis(*values)
        first = tile[n] * q_tile[n]
        if not 0 <= first < axis.length:
            raise ValueError(f"tile must lie in the grid {shape}, got {tuple(tile)} of {q_tile}")
        tiles = _row_tiles(axis, q_tile[n])
        last, start, end, sight, sight_end = (
            int(part[tile[n]])
            for part in (tiles.end - 1, tiles.begin, tiles.stop, tiles.sight, tiles.sight_stop)
        )
        origin = start // kv_tile[n] * kv_tile[n] if aligned else start
        spans.append(
            [
                (corner, kv_tile[n], sight <= corner and corner + kv_tile[n] <= sight_end)
                for corner in range(origin, end, kv_tile[n])
            ]
        )
        queries.append((first, last + 1 - first))
    if rank == 1:
        spans.insert(0, [(0, 1, True)])
        queries.insert(0, (0, 1))
        shape = (1, *shape)
    full_color = _full_color()
    height, width = shape
    axes.add_patch(Rectangle((-0.5, -0.5), width, height, facecolor=_empty_color(), zorder=0))
    counts = [0, 0]
    for (y, tall, y_full), (x, wide, x_full) in product(*spans):
        full = y_full and x_full
        counts[full] += 1
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), wide, tall, facecolor=full_color if full else PARTIAL,
                edgecolor=axes.get_facecolor(), linewidth=1, zorder=1,
            )
        )  # fmt: skip
        if not full:
            _hatch(axes, [(y, x, tall, wide)])
    (y, tall), (x, wide) = queries
    axes.add_patch(
        Rectangle(
            (x - 0.5, y - 0.5), wide, tall, fill=False, edgecolor=QUERY_COLOR, linewidth=2.5,
            zorder=3,
        )
    )  # fmt: skip
    axes.set_xlim(-1.5, width + 0.5)
    axes.set_ylim(height + 0.5, -1.5)
    axes.set_aspect("equal")
    axes.set_title(f"{counts[1]} full, {counts[0]} partial", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[:].set_visible(False)


@_drawing
def draw_tile_legend(figure: Figure) -> None:
    """What the colours of :func:`draw_tiles` and :func:`draw_block_mask` mean, below a figure."""
    from matplotlib.patches import Patch

    full = _full_color()
    figure.legend(
        handles=[
            Patch(facecolor=full, label="full: no mask"),
            Patch(facecolor=PARTIAL, hatch="////", edgecolor="black", label="partial: masked"),
            Patch(facecolor=_empty_color(), label="skipped"),
        ],
        loc="outside lower center", ncols=3, fontsize=9, frameon=False,
    )  # fmt: skip


@_drawing
def draw_attention(
    axes: Axes,
    image: Tensor,
    weights: Tensor,
    position: Sequence[int],
    *,
    margin: int | None = None,
) -> AxesImage:
    """Draw the attention weights of one query over a picture.

    image: `[X, Y, 3]` in [0, 1], drawn in pale grey. weights: `[X, Y]`, coloured where they are
    not zero, by the square root of their ratio to the largest. position: the query, outlined.
    margin: how many tokens to show on each side of the query (default: the whole picture).
    Returns the coloured layer, for a colour bar.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    height, width = weights.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = 0.55 + 0.45 * image.float().mean(-1).cpu()
    axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    shares = (weights / weights.max()).float().cpu()
    layer = axes.imshow(
        torch.where(shares > 0, shares, torch.nan).numpy(),
        cmap=WEIGHT_MAP, norm=PowerNorm(0.5, 0, 1), extent=extent, interpolation="nearest",
    )  # fmt: skip
    y, x = position
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=QUERY_COLOR, linewidth=1.8)
    )
    if margin is not None:
        # The box stays inside of the picture, as the neighborhood does.
        side = 2 * margin + 1
        top = min(max(y - margin, 0), max(height - side, 0))
        left = min(max(x - margin, 0), max(width - side, 0))
        axes.set_ylim(min(top + side, height) - 0.5, top - 0.5)
        axes.set_xlim(left - 0.5, min(left + side, width) - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    return layer


@_drawing
def module_attention_figure(
    module: nn.Module,
    x: Tensor,
    image: Tensor,
    positions: Sequence[Sequence[int]],
    *,
    heads: Sequence[int] | None = None,
) -> Figure:
    """What queries of a 2-D module of `natten.nn` attend to in a picture, a column for each head.

    module: with an `attention_map(x, positions)`, such as `NeighborhoodAttention2D`.
    x: `[1, X, Y, channels]`, its input. image: `[height, width, 3]` in [0, 1], resized to the grid.
    positions: tokens, a row for each. heads: which to show (default: all, and their mean first).
    """
    from matplotlib.figure import Figure

    if not callable(getattr(module, "attention_map", None)):
        raise ValueError(f"module must have an attention_map method, got {type(module).__name__}")
    if x.dim() != 4 or x.shape[0] != 1:
        raise ValueError(f"x must have the shape [1, X, Y, channels], got {tuple(x.shape)}")
    with torch.no_grad():
        weights = module.attention_map(x, positions).grid[0]  # type: ignore[operator]
    small = torch.nn.functional.interpolate(
        image.movedim(-1, 0)[None].float(), size=tuple(x.shape[1:3]), mode="area"
    )[0].movedim(0, -1)
    columns = [("mean of heads", weights.mean(1))] if heads is None else []
    shown = range(weights.shape[1]) if heads is None else heads
    columns += [(f"head {head}", weights[:, head]) for head in shown]
    figure = Figure(figsize=(2.1 * len(columns) + 0.6, 2.2 * len(positions)), layout="constrained")
    panels = figure.subplots(len(positions), len(columns), squeeze=False)
    for row, position in enumerate(positions):
        for axes, (title, maps) in zip(panels[row], columns):
            layer = draw_attention(axes, small, maps[row], position)
            if not row:
                axes.set_title(title, fontsize=10)
        panels[row][0].set_ylabel(f"query {tuple(position)}", fontsize=9)
    figure.colorbar(
        layer, ax=panels, location="right", shrink=0.8,
        label="attention weight, relative to the strongest",
    )  # fmt: skip
    return figure


@_drawing
def draw_roofline(
    axes: Axes,
    device: Device,
    dtype: torch.dtype,
    points: Mapping[str, tuple[float, float]],
) -> None:
    """Draw calls below what a device can reach.

    points: by name, operations per byte and TFLOP/s.
    """
    peak, bandwidth = device.rate(dtype), device.bandwidth
    ridge = peak * 1e3 / bandwidth
    intensities = [intensity for intensity, _ in points.values()] or [ridge]
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    axes.plot([low, ridge, high], [low * bandwidth / 1e3, peak, peak], color=_ink(), linewidth=1.5)
    for n, (name, (intensity, rate)) in enumerate(points.items()):
        axes.scatter(
            [intensity], [rate], marker=_MARKERS[n % len(_MARKERS)], s=42,
            color=SERIES_COLORS[n % len(SERIES_COLORS)], edgecolors=_ink(), linewidths=0.6,
            label=name, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.annotate(
        f"{peak:.0f} TFLOP/s", (high, peak), (-4, -12), textcoords="offset points", ha="right",
        fontsize=8,
    )  # fmt: skip
    axes.annotate(
        f"{bandwidth:.0f} GB/s", (low, low * bandwidth / 1e3), (8, 0), textcoords="offset points",
        fontsize=8,
    )  # fmt: skip
    axes.set_xlabel("needed operations per needed byte")
    axes.set_ylabel("needed TFLOP/s")
    axes.set_title(device.full_name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


@_drawing
def draw_benchmark(
    axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str
) -> None:
    """Draw a horizontal bar for each name and series, with its value; None leaves a bar out.

    unit: of the values, the label of the axis, which is logarithmic if they differ much.
    """
    for label, row in series.items():
        if len(row) != len(names):
            raise ValueError(f"series {label!r} must have {len(names)} values, got {len(row)}")
    thick = 0.8 / max(len(series), 1)
    values = [v for row in series.values() for v in row if v is not None]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
    for n, (label, row) in enumerate(series.items()):
        places = [i + (n - (len(series) - 1) / 2) * thick for i in range(len(names))]
        given = [(place, value) for place, value in zip(places, row) if value is not None]
        axes.barh(
            [place for place, _ in given], [value for _, value in given], height=thick, label=label,
            color=SERIES_COLORS[n % len(SERIES_COLORS)], hatch=_HATCHES[n % len(_HATCHES)],
            edgecolor=(0, 0, 0, 0.5), linewidth=0.3,
        )  # fmt: skip
        for place, value in given:
            axes.annotate(
                f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
    axes.margins(x=0.12)
    axes.set_yticks(range(len(names)), labels=names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


@_drawing
def advice_figure(advice: Advice) -> Figure:
    """Speedup against stride, and the Pareto front of window size and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    problem = advice.simulation.problem
    _draw_suggestions(
        left, advice.strides, [prod(s.stride) for s in advice.strides],
        [s.speedup for s in advice.strides], "stride", problem.stride,
    )  # fmt: skip
    left.plot(
        [prod(s.stride) for s in advice.strides], [s.speedup for s in advice.strides],
        color=SERIES_COLORS[0], linewidth=1, zorder=1,
    )  # fmt: skip
    # Beyond this line masks are saved, too: tiles become full.
    left.axhline(advice.simulation.waste, color=_ink(), linestyle="--", linewidth=1)
    left.annotate(
        "no wasted operations", (0.02, advice.simulation.waste), (0, 4),
        textcoords="offset points", xycoords=("axes fraction", "data"), fontsize=8,
    )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_xlabel("queries that share a window (product of strides)")
    left.set_ylabel("predicted speedup over the call as asked for")
    left.set_title(f"window {'x'.join(map(str, problem.kernel_size))}", fontsize=10)
    windows = sorted(advice.windows, key=lambda s: prod(s.kernel_size))
    _draw_suggestions(
        right, windows, [prod(s.kernel_size) for s in windows], [s.ms for s in windows],
        "kernel_size", problem.kernel_size,
    )  # fmt: skip
    front = [
        window
        for n, window in enumerate(windows)
        if all(larger.ms >= window.ms for larger in windows[n + 1 :])
    ]
    right.plot(
        [prod(s.kernel_size) for s in front], [s.ms for s in front], color=SERIES_COLORS[0],
        linewidth=1, zorder=1,
    )  # fmt: skip
    right.set_xlabel("keys in a window")
    right.set_ylabel("predicted milliseconds, forward")
    right.set_title("nearby windows: no other has more keys in less time", fontsize=10)
    grid = "x".join(map(str, problem.query_shape))
    figure.suptitle(f"{grid} tokens on {advice.simulation.device.full_name}", fontsize=11)
    return figure


def _draw_suggestions(
    axes: Axes,
    suggestions: Sequence[Suggestion],
    x: Sequence[float],
    y: Sequence[float],
    of: str,
    asked: tuple[int, ...],
) -> None:
    for n, suggestion in enumerate(suggestions):
        value = getattr(suggestion, of)
        same = value == asked
        axes.scatter(
            [x[n]], [y[n]], marker="*" if same else "o", s=150 if same else 36,
            color=QUERY_COLOR if same else SERIES_COLORS[0], edgecolors=_ink(), linewidths=0.6,
            zorder=3, label="as asked for" if same else None,
        )  # fmt: skip
        axes.annotate(
            "x".join(map(str, value)), (x[n], y[n]), (6, -11), textcoords="offset points",
            fontsize=7.5,
        )  # fmt: skip
    axes.margins(x=0.18, y=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
