"""`make demo`: neighborhood attention over a photograph, checked, timed and drawn.

The tokens are the pixels of a photograph with noise added. Queries and keys describe the patch
around a pixel so that query · key is largest where two patches look alike, and the values are the
colours. Attention then is non-local means, a denoiser (Buades et al., 2005,
https://doi.org/10.1109/CVPR.2005.38), restricted to a neighborhood: without any training, the
weights show which pixels look like the query, and the output is a cleaner picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import natten
from natten import devices, viz
from natten.command import Parser, guarded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

PATCH = 3  # pixels on a side of a patch
HEAD_DIM = 32  # the 3 * 3 * 3 numbers of a patch, one more, and padding
NOISE = 0.1  # standard deviation, for colours in [0, 1]
SHARPNESS = (1.4, 1.1)  # one head a value: how fast weights fall off as patches differ
# By dtype, how far the output may be from the reference: colours are in [0, 1].
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3}


@dataclass(frozen=True)
class Setting:
    """One row of the table, one column of the picture."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    is_causal: tuple[bool, bool] = (False, False)

    def __str__(self) -> str:
        parts = ["{}x{}".format(*self.kernel_size)]
        for name, steps in (("stride", self.stride), ("dilation", self.dilation)):
            if steps != (1, 1):
                parts.append(f"{name} {'x'.join(map(str, dict.fromkeys(steps)))}")
        if any(self.is_causal):
            parts.append(
                "causal" if all(self.is_causal) else f"causal axis {self.is_causal.index(True)}"
            )
        return ", ".join(parts)


SETTINGS = (
    Setting((13, 13)),
    Setting((25, 9)),
    Setting((13, 13), stride=(6, 6)),
    Setting((11, 11), dilation=(3, 3)),
    Setting((17, 17), is_causal=(True, True)),
    Setting((11, 17), stride=(3, 5), dilation=(2, 1), is_causal=(True, False)),
)


@dataclass(frozen=True)
class Row:
    """What was measured of one setting."""

    setting: Setting
    backend: str
    milliseconds: float
    difference: float
    psnr: float


def photograph(height: int) -> Tensor:
    """Grace Hopper, as shipped with matplotlib: `[height, width, 3]` in [0, 1]."""
    import numpy as np
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(path) as picture:
        width = round(height * picture.width / picture.height)
        small = picture.convert("RGB").resize((width, height))
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def add_noise(image: Tensor) -> Tensor:
    """The picture with the same noise every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(image.shape, generator=generator, device="cpu", dtype=image.dtype)
    return image + NOISE * noise


def tokens(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, `[1, height, width, heads, 32]`, of a picture `[height, width, 3]`.

    With f the patch of a pixel, the score is f·g - |g|²/2 = (|f|² - |f - g|²)/2, and |f|² does
    not change a softmax over g. Attention is to be called with scale=1.
    """
    height, width, _ = image.shape
    padded = F.pad(image.permute(2, 0, 1).unsqueeze(0), [PATCH // 2] * 4, mode="reflect")
    patches = F.unfold(padded, PATCH)[0].T.view(1, height, width, 1, -1)
    channels = patches.shape[-1]
    patches = patches - patches.mean((1, 2), keepdim=True)
    patches = patches * patches.new_tensor(SHARPNESS).view(-1, 1) / (NOISE * channels**0.5)
    lengths = patches.square().sum(-1, keepdim=True)
    query = torch.cat([patches, torch.ones_like(lengths)], -1)
    key = torch.cat([patches, -lengths / 2], -1)
    # Some backends want as many channels in a value as in a key, and a power of two.
    value = image[None, :, :, None].expand(-1, -1, -1, len(SHARPNESS), -1)
    query, key, value = (F.pad(x, [0, HEAD_DIM - x.shape[-1]]) for x in (query, key, value))
    return query, key, value


def denoised(output: Tensor) -> Tensor:
    """The picture `[height, width, 3]` of an output: the mean of the heads."""
    return output[0, ..., :3].float().mean(2)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibel."""
    return float(-10 * (image - truth).square().mean().log10())


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median time of a call that has run before: at least 3 runs, and 0.2 seconds of them."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.2:
        start = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


def measure(setting: Setting, query: Tensor, key: Tensor, value: Tensor, truth: Tensor) -> Row:
    """Run one setting with the backend that natten chooses, and again with the reference."""
    arguments = {**asdict(setting), "scale": 1.0}
    backend = natten.explain(query, key, value, **arguments).chosen
    output = natten.na2d(query, key, value, **arguments)
    expected = natten.na2d(
        query.double(), key.double(), value.double(), **arguments, backend="reference"
    )
    return Row(
        setting,
        backend,
        milliseconds(lambda: natten.na2d(query, key, value, **arguments)),
        float((output - expected).abs().max()),
        psnr(denoised(output), truth),
    )


def dense_milliseconds(query: Tensor, key: Tensor, value: Tensor) -> float:
    """The time of PyTorch's attention of every pixel to every pixel."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (query, key, value))
    return milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, scale=1.0))


# Sides of the grids, the window, and how long dense attention may take before it is left out.
_SIDES, _WINDOW, _PATIENCE = (16, 24, 32, 48, 64, 96, 128), 13, 300.0


def growth(device: str, dtype: torch.dtype) -> list[tuple[int, float, float | None]]:
    """Tokens of square grids, milliseconds of a window of 13 x 13 and of dense attention."""
    rows: list[tuple[int, float, float | None]] = []
    dense: float | None = 0.0
    for side in _SIDES:
        query, key, value = (
            torch.randn(1, side, side, 2, HEAD_DIM, device=device, dtype=dtype) for _ in range(3)
        )
        local = partial(natten.na2d, query, key, value, kernel_size=_WINDOW)
        local()
        windowed = milliseconds(local)
        if dense is not None:
            dense = dense_milliseconds(query, key, value) if dense < _PATIENCE else None
        rows.append((side**2, windowed, dense))
    return rows


def growth_figure(rows: Sequence[tuple[int, float, float | None]], where: str) -> Figure:
    """Time over tokens, on this machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [n for n, *_ in rows]
    dense = [(n, ms) for n, _, ms in rows if ms is not None]
    axes.loglog(*zip(*dense), "s--", color=viz.SERIES_COLORS[1], label="dense attention (PyTorch)")
    axes.loglog(
        tokens, [ms for _, ms, _ in rows], "o-", color=viz.SERIES_COLORS[0],
        label=f"window of {_WINDOW} x {_WINDOW} (natten)",
    )  # fmt: skip
    axes.set_xticks(tokens, labels=[f"{n:,}" for n in tokens], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="milliseconds, forward", title=where)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def table_of(rows: Sequence[Row], dense: float, noisy: float) -> Table:
    """What `make demo` prints."""
    from rich.table import Table

    table = Table(
        title="2-D neighborhood attention over a photograph",
        caption="Dense: scaled_dot_product_attention over all pixels. Difference: from the "
        f"reference in float64. PSNR of the noisy photograph: {noisy:.1f} dB.",
    )
    table.add_column("setting")
    table.add_column("backend")
    for name in ("ms", "dense\nattention\nms", "maximum\ndifference", "output\nPSNR dB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.setting),
            row.backend,
            f"{row.milliseconds:.2f}",
            f"{dense:.1f}",
            f"{row.difference:.1e}",
            f"{row.psnr:.1f}",
        )
    return table


def queries_of(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The pixels of the picture: the blue of the flag, the brim of the cap, and the corner."""
    places = ((0.21, 0.17), (0.183, 0.40), (1.0, 1.0))
    return tuple((round(y * (height - 1)), round(x * (width - 1))) for y, x in places)


def picture(image: Tensor, query: Tensor, key: Tensor, output: Tensor) -> Figure:
    """What chosen pixels attend to, a row for each pixel and a column for each setting."""
    from matplotlib.figure import Figure

    height, width, _ = image.shape
    positions = queries_of(height, width)
    figure = Figure(figsize=(2.1 * len(SETTINGS) + 3.6, 6.9), layout="constrained")
    parts = figure.add_gridspec(1, 2, width_ratios=(3.2, 2.1 * len(SETTINGS)))
    left, right = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    photo, cleaned = left.subplots(2, 1)
    for axes, shown, title in (
        (photo, image, "tokens: the pixels"),
        (cleaned, denoised(output), "output of the first setting"),
    ):
        axes.imshow(shown.clamp(0, 1).cpu().numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    for name, (y, x) in zip("ABC", positions):
        photo.scatter([x], [y], marker="s", s=26, c=viz.QUERY_COLOR, edgecolors="white")
        photo.annotate(
            name, (x, y), (-9 if x > width / 2 else 9, -3), textcoords="offset points",
            color="white", weight="bold", ha="center",
            bbox={"facecolor": viz.QUERY_COLOR, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip

    panels = right.subplots(len(positions), len(SETTINGS), squeeze=False)
    for name, position, panel_row in zip("ABC", positions, panels):
        for setting, axes in zip(SETTINGS, panel_row):
            weights = viz.attention_weights(query, key, position, **asdict(setting), scale=1.0)
            layer = viz.draw_attention(axes, image, weights[0].mean(0), position, margin=18)
            if position == positions[0]:
                axes.set_title(str(setting).replace(", ", "\n"), fontsize=10)
        panel_row[0].set_ylabel(name, rotation=0, labelpad=10, weight="bold", va="center")
    right.colorbar(
        layer, ax=panels, location="bottom", shrink=0.4, aspect=40, pad=0.02,
        label="attention weight, relative to the strongest of the query",
    )  # fmt: skip
    return figure


def main(arguments: Sequence[str] | None = None, prog: str = "python -m natten.demo") -> int:
    """Run the demo.

    Returns:
        0; 1 if an output is too far from the reference; 2 after a wrong request.
    """
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where to draw")
    parser.add_argument(
        "--times", type=Path, default=Path("demo-time.png"), metavar="FILE",
        help="where to draw time over tokens, beside dense attention",
    )  # fmt: skip
    parser.add_argument("--no-times", action="store_true", help="without that")
    parser.add_argument("--height", type=int, default=120, help="of the photograph, in tokens")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help=f"default: {default_device}")
    options = parser.parse_args(arguments)
    return guarded(prog, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.height < 1:
        raise ValueError(f"--height must be at least 1, got {options.height}")
    for name, target in (("output", options.output), ("times", options.times)):
        if not target.absolute().parent.is_dir():
            raise ValueError(f"--{name} {target}: there is no such folder")
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the demo needs {error.name}, which is not installed: pip install rich matplotlib"
        ) from error

    console = Console(markup=False, emoji=False)
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    truth = photograph(options.height)
    for setting in SETTINGS:
        for tokens_there, k, d in zip(truth.shape, setting.kernel_size, setting.dilation):
            if k * d > tokens_there:
                raise ValueError(
                    f"--height {options.height} gives {truth.shape[0]} x {truth.shape[1]} tokens, "
                    f"too few for the setting {setting}"
                )
    image = add_noise(truth)
    query, key, value = (tensor.to(options.device, dtype) for tensor in tokens(image))
    console.print(
        f"{image.shape[0]} x {image.shape[1]} pixels, {len(SHARPNESS)} heads of {HEAD_DIM} "
        f"channels, {dtype} on {options.device}; the first call of a backend also compiles it"
    )
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, torch.inference_mode():
        task = progress.add_task("dense attention", total=len(SETTINGS) + 3)
        dense = dense_milliseconds(query, key, value)
        for setting in SETTINGS:
            progress.update(task, advance=1, description=str(setting))
            rows.append(measure(setting, query, key, value, truth.to(options.device)))
        progress.update(task, advance=1, description="picture")
        output = natten.na2d(query, key, value, **asdict(SETTINGS[0]), scale=1.0)
        picture(image, query, key, output).savefig(options.output, dpi=100)
        progress.update(task, advance=1, description="time over tokens")
        if not options.no_times:
            rows_of_times = growth(options.device, dtype)
            growth_figure(rows_of_times, devices.driver_name(options.device)).savefig(
                options.times, dpi=100
            )
        progress.update(task, advance=1)
    console.print(table_of(rows, dense, psnr(image, truth)))
    console.print(f"What pixels A, B and C attend to: {options.output}")
    if not options.no_times:
        console.print(f"Time over tokens, beside dense attention: {options.times}")

    failed = [row for row in rows if not row.difference <= TOLERANCE[dtype]]
    for row in failed:
        console.print(
            f"{row.setting}: {row.backend} differs from the reference by {row.difference:.1e}, "
            f"more than {TOLERANCE[dtype]:.0e}",
            style="bold red",
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
