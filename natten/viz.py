"""Pictures: the neighborhood of a token, and what its query attends to.

Matplotlib is imported by the functions that draw. The colours are those of Okabe and Ito and the
map "viridis", which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natten import window
from natten.validation import check_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

QUERY_COLOR = "#D55E00"
TOKEN_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
WEIGHT_MAP = "viridis"


def attended_tokens(
    position: Sequence[int],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> tuple[Tensor, ...]:
    """The indices, axis by axis, that the query at `position` of a grid of `shape` attends to.

    The neighborhood is their product: `torch.meshgrid(*attended_tokens(...), indexing="ij")`.
    """
    windows = check_window(tuple(shape), kernel_size, stride, dilation, is_causal)
    axes = [window.Axis(*axis) for axis in zip(shape, *windows)]
    return tuple(torch.tensor(window.attended(*pair)) for pair in zip(position, axes))


def attention_weights(
    query: Tensor,
    key: Tensor,
    position: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
) -> Tensor:
    """The attention weights of one query, laid over the grid.

    query, key: `[B, *X, H, D]` and `[B, *X, Hkv, D]`. `scale` defaults to `D ** -0.5`.
    Returns `[B, H, *X]`, zero outside of the neighborhood and of sum 1 over the grid.
    """
    shape = query.shape[1:-2]
    heads, head_dim = query.shape[-2:]
    tokens = attended_tokens(position, shape, kernel_size, stride, dilation, is_causal)
    box = tuple(torch.meshgrid(*tokens, indexing="ij"))
    batch = (slice(None),)
    near = key[batch + box].flatten(1, -3).repeat_interleave(heads // key.shape[-2], dim=-2)
    scores = torch.einsum("bhd,bnhd->bhn", query[batch + tuple(position)], near)
    weights = (scores * (head_dim**-0.5 if scale is None else scale)).softmax(-1)
    grid = weights.new_zeros(*weights.shape[:2], *shape)
    grid[batch + batch + box] = weights.unflatten(-1, box[0].shape)
    return grid


def draw_neighborhood(
    axes: Axes,
    positions: Sequence[Sequence[int]],
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> None:
    """Draw a 1-D or 2-D grid of tokens and the neighborhoods of the queries at `positions`.

    A query is a black square in a neighborhood of its own colour. Dots mark the other queries
    whose neighborhood is the same.
    """
    from matplotlib.colors import to_rgb

    if len(shape) not in (1, 2):
        raise ValueError(f"shape: a grid of 1 or 2 axes can be drawn, got {tuple(shape)}")
    row = len(shape) == 1  # drawn as a grid of one row

    def tokens_of(position: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        found = attended_tokens(position, shape, kernel_size, stride, dilation, is_causal)
        return tuple(tuple(axis.tolist()) for axis in found)

    image = torch.full((*shape, 3), 0.93)
    everyone = list(torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)))
    neighborhoods = {tuple(query.tolist()): tokens_of(query.tolist()) for query in everyone}
    for number, position in enumerate(positions):
        own = neighborhoods[tuple(position)]
        color = torch.tensor(to_rgb(TOKEN_COLORS[number % len(TOKEN_COLORS)]))
        image[torch.meshgrid(*(torch.tensor(axis) for axis in own), indexing="ij")] = color
        for query, tokens in neighborhoods.items():
            if tokens == own:
                y, x = (0, *query) if row else query
                mark, size = ("s", 60) if query == tuple(position) else (".", 14)
                axes.scatter([x], [y], marker=mark, s=size, c="black", linewidths=0, zorder=3)
    axes.imshow((image.unsqueeze(0) if row else image).numpy(), interpolation="nearest")
    height, width = (1, *shape) if row else shape
    axes.set_xticks([x - 0.5 for x in range(width + 1)], labels=[])
    axes.set_yticks([y - 0.5 for y in range(height + 1)], labels=[])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


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
