"""Draws the pictures in docs/figures: `make figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from natten import demo, viz

FIGURES = Path(__file__).parent / "figures"


def neighborhoods() -> Figure:
    """What each parameter does to the neighborhoods of two queries of a 12 x 12 grid."""
    panels: tuple[dict[str, Any], ...] = (
        {"kernel_size": 5},
        {"kernel_size": 5, "stride": 3},
        {"kernel_size": 4, "dilation": 3},
        {"kernel_size": 5, "is_causal": True},
        {"kernel_size": (9, 3), "is_causal": (True, False)},
    )
    figure = Figure(figsize=(13, 3.1), layout="constrained")
    for axes, arguments in zip(figure.subplots(1, len(panels)), panels):
        viz.draw_neighborhood(axes, [(4, 4), (11, 10)], (12, 12), **arguments)
        axes.set_title(
            "\n".join(f"{n}={v}" for n, v in arguments.items()), fontsize=9, family="monospace"
        )
    return figure


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    neighborhoods().savefig(FIGURES / "neighborhoods.png", dpi=80)
    demo.main(["--output", str(FIGURES / "attention.png")])
