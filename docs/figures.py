"""Draws the pictures in docs/figures: `make figures`. What is measured is read from benchmarks."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from matplotlib.animation import FuncAnimation
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import natten
from natten import demo, devices, viz
from natten.simulator import traffic

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import distributed as sharded  # noqa: E402
import predictions  # noqa: E402

FIGURES = Path(__file__).parent / "figures"
RESULTS = ROOT / "benchmarks" / "results" / "h100.json"
# What the model of times was fitted to.
FITTED = RESULTS.with_name("h200.json")
PEERS = ROOT / "benchmarks" / "peers" / "h100.json"
DISTRIBUTED = RESULTS.with_name("distributed.json")
TRAINING = [RESULTS.with_name(f"training-{device}.json") for device in ("cpu", "cuda")]


def neighborhoods() -> Figure:
    """What each parameter does to the neighborhoods of two queries of a 12 x 12 grid."""
    panels: tuple[dict[str, Any], ...] = (
        {"kernel_size": 5},
        {"kernel_size": 5, "stride": 3},
        {"kernel_size": 4, "dilation": 3},
        {"kernel_size": 5, "is_causal": True},
        {"kernel_size": (9, 3), "is_causal": (True, False)},
        {"kernel_size": 5, "is_circular": (False, True)},
    )
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    for axes, arguments in zip(figure.subplots(1, len(panels)), panels):
        viz.draw_neighborhood(axes, [(4, 4), (11, 10)], (12, 12), **arguments)
        axes.set_title(
            "\n".join(f"{n}={v}" for n, v in arguments.items()), fontsize=9, family="monospace"
        )
    return figure


def windows_of_modules() -> Figure:
    """Windows cut to a small grid, of whole axes, and of two groups of heads."""
    panels: tuple[tuple[str, tuple[int, int], Any], ...] = (
        ("clip_window=True\nkernel_size=(7, 7), 4 x 12", (4, 12), (4, 7)),
        ("kernel_size=(-1, 3)", (9, 12), (-1, 3)),
        ("kernel_size=[(3, 3), (7, 7)]\nthe first half of the heads", (9, 12), 3),
        ("kernel_size=[(3, 3), (7, 7)]\nthe second half", (9, 12), 7),
    )
    figure = Figure(figsize=(13, 3), layout="constrained")
    for axes, (title, shape, kernel_size) in zip(figure.subplots(1, len(panels)), panels):
        viz.draw_neighborhood(axes, [(2, 4)], shape, kernel_size)
        axes.set_title(title, fontsize=9, family="monospace")
    return figure


def upsampling() -> Figure:
    """Queries of a grid three times as fine as that of the keys, and the windows of their cells."""
    cells, factor = ((1, 1), (3, 4)), 3
    queries = torch.full((5 * factor, 6 * factor), -1)
    for number, cell in enumerate(cells):
        y, x = (factor * n for n in cell)
        queries[y : y + factor, x : x + factor] = number
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    viz._draw_grid(left, queries, [])
    left.set_title("query: 15 x 18 tokens", fontsize=9, family="monospace")
    viz.draw_neighborhood(right, cells, (5, 6), 3)
    right.set_title("key: 5 x 6 tokens, kernel_size=3", fontsize=9, family="monospace")
    return figure


def neighborhood_1d() -> Figure:
    """Two queries of a sequence, with context tokens that all queries see."""
    return viz.neighborhood_figure(
        [(4,), (20,)], (24,), 6, 2, context=4, title="kernel_size=6, stride=2"
    )


def neighborhood_3d() -> Figure:
    """Two queries of a video, causal in time."""
    return viz.neighborhood_figure(
        [(2, 3, 3), (5, 7, 6)], (6, 8, 8), (3, 5, 5), 1, 1, (True, False, False),
        title="kernel_size=(3, 5, 5), is_causal=(True, False, False)",
    )  # fmt: skip


def moving_window() -> FuncAnimation:
    """A query that walks over a grid, and its window, for four calls."""
    return viz.moving_window(
        (10, 10),
        {
            "kernel_size=5": {"kernel_size": 5},
            "stride=3": {"kernel_size": 5, "stride": 3},
            "dilation=2": {"kernel_size": 4, "dilation": 2},
            "is_causal=(True, False)": {"kernel_size": 5, "is_causal": (True, False)},
        },
    )


def masks() -> Figure:
    """The masks of dense attention that these calls stand for."""
    panels: tuple[dict[str, Any], ...] = (
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 3, "is_causal": True},
    )
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, arguments in zip(figure.subplots(1, len(panels)), panels):
        viz.draw_mask(axes, (8, 8), **arguments)
        axes.set_title(", ".join(f"{n}={v}" for n, v in arguments.items()), fontsize=9)
    return figure


def scores() -> Figure:
    """A soft cap, weights beside a sink, and what a query sees of tokens that are not all valid."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    capped, sunk, masked = figure.subplots(1, 3)
    s = torch.linspace(-12, 12, 200)
    for softcap in (2.0, 5.0):
        capped.plot(s, softcap * (s / softcap).tanh(), label=f"softcap={softcap:g}")
    capped.plot(s, s, linestyle=":", label="none")
    capped.set(xlabel="scaled product", ylabel="score", ylim=(-8, 8))
    capped.legend(frameon=False, fontsize=8)

    query, key = torch.tensor([[1.0]]), torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0])
    value = torch.eye(5)
    for number, sink in enumerate((-4.0, 1.0, 3.0)):
        weights = natten.na1d(
            query.expand(5, 1)[None, :, None], key[None, :, None, None], value[None, :, None], 5,
            scale=1.0, sink=torch.tensor([sink]),
        )[0, 0, 0]  # fmt: skip
        shown = torch.cat([weights, 1 - weights.sum(0, keepdim=True)])
        places = torch.arange(6) + 0.27 * (number - 1)
        sunk.bar(places.tolist(), shown.tolist(), 0.25, label=f"sink={sink:g}")
    sunk.set_xticks(range(6), [*(f"key {n}" for n in range(5)), "sink"], fontsize=8)
    sunk.set_ylabel("weight")
    sunk.legend(frameon=False, fontsize=8)

    valid = torch.zeros(12, 12, dtype=torch.bool)
    valid[:9, :8] = True
    valid[3:6, 2] = False
    places = torch.arange(144, dtype=torch.float32).view(1, 12, 12, 1, 1)
    seen = torch.zeros(12, 12)
    for position in ((2, 2), (7, 6)):
        leaf = torch.zeros_like(places).requires_grad_()
        out = natten.na2d(
            places * 0, places * 0, leaf, 5, key_mask=valid[None], query_mask=valid[None]
        )
        (gradient,) = torch.autograd.grad(out[0][position].sum(), leaf)
        seen += gradient[0, ..., 0, 0] > 0
        seen[position] = 3
    shades = torch.where(valid, 1.0 + (seen > 0) + (seen == 3), 0.0)
    colors = ["#8884", viz.TOKEN_COLORS[0], viz.TOKEN_COLORS[1], viz.TOKEN_COLORS[2]]
    masked.imshow(shades.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=3)
    masked.set_title("masks: two queries of a padded image", fontsize=9)
    masked.set_xlabel("token, axis 1", fontsize=8)
    masked.set_ylabel("token, axis 0", fontsize=8)
    return figure


def tiles() -> Figure:
    """Which key tiles one tile of queries visits: aligned tiles and ours, and the block mask."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    call = dict(shape=(32, 32), kernel_size=(13, 13), q_tile_shape=(4, 4), kv_tile_shape=(4, 4))
    for axes, aligned, title in (
        (panels[0], True, "key tiles on a fixed grid"),
        (panels[1], False, "key tiles from the union of the windows"),
    ):
        viz.draw_tiles(axes, (3, 4), **call, aligned=aligned)
        axes.set_title(f"{title}\n{axes.get_title()}", fontsize=10)
        axes.set_xlabel("token, axis 1")
        axes.set_ylabel("token, axis 0")
    viz.draw_block_mask(panels[2], (16, 16), 7, q_tile_shape=(4, 4), kv_tile_shape=(4, 4))
    panels[2].set_title(f"all tiles of a 16 x 16 grid, window 7 x 7\n{panels[2].get_title()}")
    panels[2].title.set_fontsize(10)
    viz.draw_tile_legend(figure)
    return figure


def advice() -> Figure:
    """Stride and window advice for a video model's attention."""
    return viz.advice_figure(natten.simulate((30, 48, 80), (18, 24, 24), heads=24).advise())


def _measured() -> list[tuple[str, natten.simulator.Simulation, dict[str, Any]]]:
    """Names, simulations and measurements of the neighborhood cases in bfloat16."""
    return [
        (name, found, result)
        for name, dtype, found, result in predictions.rows(RESULTS)
        if dtype == "bfloat16" and "case" in result
    ]


# What a reader knows, beside names of cases.
_FAMOUS = {
    "nat_t_s1": "NAT-Tiny\n56x56, window 7x7",
    "hdit_64_w7_d64": "HDiT\n64x64, window 7x7",
    "ltx_3x7x7": "video decoder\n16x68x120, window 3x7x7",
    "1d_32k_h24_w2k": "sequence\n32,768, window 2,048",
    "flux_w80": "image\n256x256, window 80x80",
    "hunyuan_na": "video\n30x48x80, window 18x24x24",
}
_OTHERS = {
    "NATTEN 0.21.7, its fastest kernel": "natten 0.21.7",
    "FlexAttention, compiled": "torch.compile(flex_attention)",
    "dense attention, the fastest of torch": "torch SDPA",
}


def times_of_others() -> dict[str, dict[str, float]]:
    """By case and other: forward and backward time in bfloat16 over that of natten."""
    peers = {case["name"]: case["peers"] for case in json.loads(PEERS.read_text())["cases"]}
    found = {}
    for name, _, result in _measured():
        ours = result["fwd_ms"] + result["bwd_ms"]
        found[name] = {
            label: sum(
                min(times[kind] for peer, times in peers[name]["bfloat16"].items()
                    if peer.startswith(prefix))
                for kind in ("fwd_ms", "bwd_ms")
            ) / ours
            for label, prefix in _OTHERS.items()
            if any(peer.startswith(prefix) for peer in peers[name]["bfloat16"])
        }  # fmt: skip
    return found


def speed() -> Figure:
    """How many times as long others take, forward and backward, for calls that models make."""
    times = times_of_others()
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(("natten", *_OTHERS)):
        heights = [1.0 if number == 0 else times[case].get(label) for case in _FAMOUS]
        places = [place + (number - 1.5) * 0.21 for place in range(len(heights))]
        shown = [(x, height) for x, height in zip(places, heights) if height is not None]
        bars = axes.bar(
            *zip(*shown), 0.2, label=label, color=viz.SERIES_COLORS[number],
            hatch=("", "////", "....", "xxxx")[number], edgecolor=(0, 0, 0, 0.4), linewidth=0,
        )  # fmt: skip
        axes.bar_label(bars, fmt="{:.1f}" if number else "1", fontsize=8, padding=1)
    axes.set_xticks(range(len(_FAMOUS)), labels=list(_FAMOUS.values()), fontsize=8.5)
    axes.set_ylabel("time over natten's\nforward and backward", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", ncols=2)
    axes.set_ylim(0, 9.5)
    return figure


def roofline() -> Figure:
    """The measured forward passes below the limits of the device."""
    points = {}
    results = json.loads(RESULTS.read_text())["cases"]
    for name, found, result in _measured():
        if predictions.host_bound(result, results)[0]:
            continue
        points[name] = (
            found.needed_flops / traffic(found.problem, False),
            found.needed_flops / result["fwd_ms"] / 1e9,
        )
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    viz.draw_roofline(figure.subplots(), devices.find("h100"), torch.bfloat16, points)
    return figure


def benchmark() -> Figure:
    """Measured times beside the best that others reach."""
    measured = _measured()
    names = [name for name, _, _ in measured]
    figure = Figure(figsize=(12, 0.42 * len(names) + 1.4), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True), ("fwd_ms", "bwd_ms"), ("forward", "backward")
    ):
        peers = [r.get(f"peer_{key}") for _, _, r in measured]
        viz.draw_benchmark(
            axes, names,
            {
                "natten": [r.get(key) for _, _, r in measured],
                "the best of the others": [v if v and isfinite(v) else None for v in peers],
            },
            f"milliseconds, {title}",
        )  # fmt: skip
    return figure


def prediction() -> Figure:
    """Predicted over measured times."""
    results = json.loads(FITTED.read_text())["cases"]
    measured = predictions.rows(FITTED)
    bound = [predictions.host_bound(result, results) for _, _, _, result in measured]
    shown = [n for n in range(len(measured)) if not all(bound[n])]
    figure = Figure(figsize=(8, 0.3 * len(shown) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(1 / 1.15, 1.15, color="#9A9A9A", alpha=0.25, label="within 15 %")
    for kind, marker in enumerate("os"):
        points = []
        for place, n in enumerate(shown):
            _, _, found, result = measured[n]
            ms = result.get(("fwd_ms", "bwd_ms")[kind])
            if ms is not None and not bound[n][kind]:
                points.append(((found.forward_ms, found.backward_ms)[kind] / ms, place))
        axes.scatter(
            [x for x, _ in points], [y for _, y in points], marker=marker, s=40, zorder=3,
            color=viz.SERIES_COLORS[kind], edgecolors="black", linewidths=0.6,
            label=("forward", "backward")[kind],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    names = [name + (", fp32" if dtype == "float32" else "") for name, dtype, *_ in measured]
    axes.set_yticks(range(len(shown)), labels=[names[n] for n in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#9A9A9A", linewidth=1)
    axes.set_xlabel("predicted over measured time")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def distributed() -> Figure:
    """Speedup over ranks of a sharded grid, measured and predicted."""
    results = json.loads(DISTRIBUTED.read_text())
    cases = {
        "hunyuan_na": ("30 x 48 x 80 tokens", (30, 48, 80)),
        "four times as long": ("120 x 48 x 80 tokens", (120, 48, 80)),
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (case, (title, grid)) in zip(figure.subplots(1, 2), cases.items()):
        many = [2**n for n in range(11)]
        axes.plot(many, many, color="#9A9A9A", linewidth=1, label="as many as ranks")
        for number, (label, heads) in enumerate((("halos alone", 1), ("halos and heads", None))):
            found = sharded.predicted(grid, heads)
            axes.plot(
                list(found), [e.speedup for e in found.values()], linewidth=1.5,
                color=viz.SERIES_COLORS[number], label=f"predicted, {label}",
            )  # fmt: skip
        alone = results["1"]["cases"][case][0]["both_ms"]
        measured = [
            (int(ranks), alone / min(row["both_ms"] for row in results[ranks]["cases"][case]))
            for ranks in ("1", "2", "4")
        ]
        axes.scatter(
            *zip(*measured, strict=True), s=45, zorder=3, edgecolors="black", linewidths=0.6,
            color=viz.SERIES_COLORS[2], label="measured",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("GPUs, 8 in a node")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("times as fast, forward and backward")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def sizes() -> Figure:
    """Kernels that calls on ever new sizes compile, and that they would with the best tiles."""
    rows = json.loads(RESULTS.with_name("sizes.json").read_text(encoding="utf-8"))
    shown = ("2-D, 7 x 7", "2-D, 40 x 40", "3-D, 3 x 7 x 7", "3-D, 16 x 12 x 24")
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, row in zip(panels, [row for row in rows if row["case"] in shown], strict=True):
        axes.plot(row["alone_after"], color="0.6", label="with the best tiles of each")
        axes.plot(row["kernels_after"], label="as calls run")
        axes.set_title(row["case"], fontsize=10)
        axes.set_xlabel("sizes")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("kernels, both passes")
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def realistic() -> Figure:
    """Kernels' times of random problems beside what the GPU allows at least, by head_dim."""
    rows = json.loads(RESULTS.with_name("realistic.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    groups = {
        "half precision": [r for r in rows if r["dtype"] != "torch.float32"],
        "float32": [r for r in rows if r["dtype"] == "torch.float32"],
    }
    panels = figure.subplots(1, 2, sharey=True)
    for number, (axes, way) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        for color, (label, group) in zip(viz.SERIES_COLORS, groups.items()):
            axes.scatter(
                [1e3 * r["limits"][number] for r in group],
                [r[way] / r["limits"][number] for r in group],
                s=14, label=label, color=color, alpha=0.7,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=way, xlabel="least time that an H100 allows, ms")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("times that")
    panels[0].legend(frameon=False)
    return figure


def training() -> Figure:
    """Losses of the same models, trained in many ways: what benchmarks/training.py wrote."""
    measured = [json.loads(path.read_text()) for path in TRAINING if path.exists()]
    figure = Figure(figsize=(9, 3.6 * len(measured)), layout="constrained")
    panels = figure.subplots(len(measured), 2, squeeze=False)
    for row, document in zip(panels, measured):
        for axes, (task, runs) in zip(row, document["tasks"].items()):
            for number, (name, run) in enumerate(runs.items()):
                steps = [10 * i + 5 for i in range(len(run["losses"]))]
                # Wide lines below and narrow ones above: curves that lie on each other show.
                axes.plot(
                    steps, run["losses"], label=name, linewidth=max(5 - 0.35 * number, 0.6),
                    color=viz.SERIES_COLORS[number % len(viz.SERIES_COLORS)],
                )  # fmt: skip
            axes.set(title=f"{task}, {document['device']}", xlabel="training step", ylabel="loss")
            axes.grid(alpha=0.3)
            if task == "video":
                axes.set_yscale("log")
        row[-1].legend(frameon=False, fontsize=6.5, loc="upper right", ncols=2)
    return figure


def video_curve() -> Figure:
    """How a causal denoiser learns to predict frames: what `natten.models.clip train` wrote."""
    with (FIGURES / "video-curve.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for number, (key, label) in enumerate(
        (("psnr_held_out", "causal neighborhood attention"),
         ("psnr_of_copying", "copy of the frame before"))
    ):  # fmt: skip
        axes.plot(
            steps, [row[key] for row in rows], "--" if number else "-", label=label,
            color=viz.SERIES_COLORS[number],
        )  # fmt: skip
    axes.set(xlabel="training step", ylabel="PSNR of held-out next frames, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


# name: its function, whether it needs measurements
DRAWN: dict[str, tuple[Callable[[], Figure], bool]] = {
    "neighborhoods": (neighborhoods, False),
    "masks": (masks, False),
    "scores": (scores, False),
    "neighborhood-1d": (neighborhood_1d, False),
    "windows-of-modules": (windows_of_modules, False),
    "upsampling": (upsampling, False),
    "neighborhood-3d": (neighborhood_3d, False),
    "tiles": (tiles, False),
    "advice": (advice, False),
    "speed": (speed, True),
    "roofline": (roofline, True),
    "benchmark": (benchmark, True),
    "prediction": (prediction, True),
    "distributed": (distributed, True),
    "sizes": (sizes, False),
    "realistic": (realistic, False),
    "training": (training, False),
    "video-curve": (video_curve, False),
}

_THEMES = (("light", ""), ("dark", "-dark"))


def main() -> None:
    """Draw all figures, or those that are named, for light and dark pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(DRAWN)}, moving-window, attention; default: all"
    )
    parser.add_argument("--output", type=Path, default=FIGURES)
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    for name, (draw, is_measured) in DRAWN.items():
        if (options.names and name not in options.names) or (is_measured and not RESULTS.exists()):
            continue
        for theme, suffix in _THEMES:
            with viz.theme(theme):
                draw().savefig(options.output / f"{name}{suffix}.png", dpi=80)
    if not options.names or "moving-window" in options.names:
        for theme, suffix in _THEMES:
            with viz.theme(theme):
                target = options.output / f"moving-window{suffix}.gif"
                moving_window().save(target, writer="pillow", dpi=72)
    if not options.names or "attention" in options.names:
        for theme, suffix in _THEMES:
            with viz.theme(theme):
                demo.main(
                    ["--no-times", "--output", str(options.output / f"attention{suffix}.png")]
                )


if __name__ == "__main__":
    main()
