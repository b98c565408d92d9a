"""Random problems of the kinds that people have, each beside what a GPU allows at most.

    python benchmarks/realistic.py --output results/realistic.json

Windows, grids, types, heads and everything else are drawn as in models of images, video, sequences
and the weather, which nobody tuned tiles for. Each problem is first compared with the float64
reference on parts of its grid. Then the GPU's time of a CUDA graph of the call, and the time of the
eager call, are divided by the limit: the larger of the needed products at the chip's rate, and of
all tensors read and written once at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from math import exp, log, prod
from pathlib import Path
from random import Random
from typing import Any

import torch
from gpu import TOLERANCE, Problem, median_ms
from rich.console import Console
from rich.table import Table
from semantics import graphed
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten.simulator import make_problem

# Products a second of an H100's tensor cores; three tf32 products make one of float32.
RATES = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 495e12 / 3}
BANDWIDTH = 3.0e12
# Smaller ones are the host's, larger ones take the time of all others.
LEAST_SECONDS, MOST_SECONDS, MOST_BYTES = 1e-5, 2e-2, 6e9
DTYPES = [torch.bfloat16] * 7 + [torch.float16] * 2 + [torch.float32] * 2


def _extent(draw: Random, least: int, most: int, multiple: int = 1) -> int:
    """Small ones are as frequent as large ones."""
    number = round(exp(draw.uniform(log(least), log(most))))
    return max(number // multiple, 1) * multiple


def _vision(draw: Random) -> dict[str, Any]:
    """A stage of a backbone for images."""
    side = _extent(draw, 14, 160)
    return {
        "shape": [side, draw.choice([side, _extent(draw, 14, 160)])],
        "kernel_size": [draw.choice([3, 5, 7, 7, 9, 11, 13])] * 2,
        "batch": draw.choice([1, 4, 16, 64, 128]),
        "heads": draw.choice([2, 3, 4, 6, 8, 12, 16]),
        "head_dim": draw.choice([16, 24, 32, 32, 32, 48, 64]),
        "dilation": draw.choice([1, 1, 1, 2, 4, 8]),
    }


def _images(draw: Random) -> dict[str, Any]:
    """A diffusion transformer for images."""
    shape = [_extent(draw, 32, 160, 8), _extent(draw, 32, 160, 8)]
    size = _extent(draw, 7, min(shape))
    return {
        "shape": shape, "kernel_size": [size, size], "batch": draw.choice([1, 2, 4]),
        "heads": draw.choice([8, 16, 24]), "head_dim": draw.choice([64, 72, 80, 96, 128]),
        "stride": draw.choice([1, 1, min(size, 4), min(size, 8), min(size, 16)]),
        "additional_kv": draw.choice([0, 0, 77, 256, 512]),
    }  # fmt: skip


def _video(draw: Random) -> dict[str, Any]:
    """A video model, possibly causal in time."""
    shape = [_extent(draw, 5, 32), _extent(draw, 16, 64, 2), _extent(draw, 16, 90, 2)]
    size = [max(2, round(n * draw.choice([0.1, 0.25, 0.5, 0.6, 1.0]))) for n in shape]
    return {
        "shape": shape, "kernel_size": size, "batch": draw.choice([1, 1, 2]),
        "heads": draw.choice([8, 12, 24]), "head_dim": draw.choice([64, 64, 96, 128, 128]),
        "is_causal": draw.choice([[False] * 3, [True, False, False]]),
        "stride": draw.choice([1, 1, [min(size[0], 2), min(size[1], 4), min(size[2], 4)]]),
    }  # fmt: skip


def _sequence(draw: Random) -> dict[str, Any]:
    """A sliding window over text or sound."""
    length = _extent(draw, 1024, 65536)
    return {
        "shape": [length], "kernel_size": [_extent(draw, 32, min(4096, length))],
        "batch": draw.choice([1, 1, 4, 8]), "heads": draw.choice([8, 16, 32]),
        "heads_kv": draw.choice([1, 2, 4, 8]), "head_dim": draw.choice([64, 128, 128, 256]),
        "is_causal": [draw.random() < 0.7],
    }  # fmt: skip


def _upsampler(draw: Random) -> dict[str, Any]:
    """Few features decide where many come from; or attention of an autoencoder."""
    side = _extent(draw, 16, 128)
    return {
        "shape": [side, side], "kernel_size": [draw.choice([5, 7, 9, 13])] * 2,
        "batch": draw.choice([1, 4, 8]), "heads": draw.choice([1, 2, 4]),
        "head_dim": draw.choice([16, 32, 64, 256, 512]),
        "head_dim_v": draw.choice([64, 128, 256, 384, 512]),
    }  # fmt: skip


def _weather(draw: Random) -> dict[str, Any]:
    """Levels, latitudes and longitudes."""
    shape = [_extent(draw, 4, 16), _extent(draw, 45, 91), _extent(draw, 90, 180)]
    return {
        "shape": shape, "kernel_size": [draw.choice([2, 3, 4]), *[draw.choice([5, 7, 9, 13])] * 2],
        "batch": draw.choice([1, 2]), "heads": draw.choice([4, 6, 8, 16]),
        "head_dim": draw.choice([32, 48, 64, 80]),
        "dilation": draw.choice([1, 1, [1, 2, 2], [1, 4, 4]]),
    }  # fmt: skip


KINDS = (_vision, _vision, _images, _video, _video, _sequence, _upsampler, _weather)


def drawn(seed: int) -> tuple[dict[str, Any], torch.dtype]:
    """A valid case, in the form of `peers/h100.json`, and its dtype."""
    draw = Random(seed)
    while True:
        kind = draw.choice(KINDS)
        case = {"stride": 1, "dilation": 1, "is_causal": False, **kind(draw)}
        dtype = draw.choice(DTYPES)
        case["name"] = f"{seed}: {kind.__name__.strip('_')}"
        case.setdefault("heads_kv", case["heads"])
        case.setdefault("head_dim_v", case["head_dim"])
        case.setdefault("additional_kv", 0)
        try:
            least = max(limits(case, dtype))
        except ValueError:
            continue
        if LEAST_SECONDS < least < MOST_SECONDS and max(_bytes(case, dtype)) < MOST_BYTES:
            return case, dtype


def _bytes(case: dict[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Of all tensors that the passes read and write."""
    tokens, heads, heads_kv = prod(case["shape"]), case["heads"], case["heads_kv"]
    features, value_features = case["head_dim"], case["head_dim_v"]
    keys = (tokens + case["additional_kv"]) * heads_kv * (features + value_features)
    rows = tokens * heads
    forward = dtype.itemsize * (keys + rows * (features + value_features)) + 4 * rows
    gradients = dtype.itemsize * (keys + rows * (features + value_features))
    return case["batch"] * forward, case["batch"] * (forward + gradients)


def limits(case: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds that no kernel can be faster than, forward and backward.

    Raises:
        ValueError: The case is not valid.
    """
    rank = len(case["shape"])

    def meta(tokens: list[int], heads: int, features: int) -> torch.Tensor:
        return torch.empty(case["batch"], *tokens, heads, features, dtype=dtype, device="meta")

    context = case["additional_kv"]
    more = {}
    if context:
        more = {
            "additional_keys": meta([context], case["heads_kv"], case["head_dim"]),
            "additional_values": meta([context], case["heads_kv"], case["head_dim_v"]),
        }
    with FlopCounterMode(display=False) as counter:
        getattr(natten, f"na{rank}d")(
            meta(case["shape"], case["heads"], case["head_dim"]),
            meta(case["shape"], case["heads_kv"], case["head_dim"]),
            meta(case["shape"], case["heads_kv"], case["head_dim_v"]),
            tuple(case["kernel_size"]), case["stride"], case["dilation"], case["is_causal"], **more,
        )  # fmt: skip
    flops = counter.get_total_flops()
    features, value_features = case["head_dim"], case["head_dim_v"]
    # Of five products, those with the query's features are three.
    backward = flops * (3 * features + 2 * value_features) / (features + value_features)
    read = _bytes(case, dtype)
    return (
        max(flops / RATES[dtype], read[0] / BANDWIDTH),
        max(backward / RATES[dtype], read[1] / BANDWIDTH),
    )


def _graphed(function: Any) -> float:
    """Seconds of a CUDA graph of a call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    return median_ms(graphed(function), rep=100) / 1e3


def measured(seed: int) -> dict[str, Any]:
    """Times of a case over its limits."""
    case, dtype = drawn(seed)
    least = limits(case, dtype)
    torch.cuda.empty_cache()
    problem = Problem(case, dtype)
    row: dict[str, Any] = {**case, "dtype": str(dtype), "limits": least, "error": problem.check()}
    row["device"] = torch.cuda.get_device_name()
    if not row["error"] <= TOLERANCE[dtype]:
        return row
    with torch.no_grad():
        row["forward"] = _graphed(problem.forward)
        row["forward_eager"] = median_ms(problem.forward, rep=100) / 1e3
    out = problem.forward()
    row["backward"] = _graphed(lambda: problem.backward(out))
    row["backward_eager"] = median_ms(lambda: problem.backward(out), rep=100) / 1e3
    return row


def compile_all(seeds: list[int], workers: int) -> None:
    """Compile what the seeds need, in processes that leave it in Triton's cache."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import realistic; "
        "realistic.compile_some([int(s) for s in sys.argv[2:]])"
    )
    here = str(Path(__file__).parent)
    parts = [seeds[i::workers] for i in range(workers)]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, here, *map(str, part)])
        for part in parts
        if part
    ]
    for process in processes:
        process.wait()


def compile_some(seeds: list[int]) -> None:
    """Compile what the seeds need."""
    for seed in seeds:
        case, dtype = drawn(seed)
        rank = len(case["shape"])
        problem = make_problem(
            tuple(case["shape"]), tuple(case["kernel_size"]), batch=case["batch"],
            heads=case["heads"], heads_kv=case["heads_kv"], head_dim=case["head_dim"],
            head_dim_v=case["head_dim_v"], dtype=dtype, additional=case["additional_kv"],
            **{
                name: tuple(value) if isinstance(value, list) else (value,) * rank
                for name, value in case.items() if name in ("stride", "dilation", "is_causal")
            },
        )  # fmt: skip
        try:
            natten.precompile(problem, workers=1)
        except NotImplementedError:
            continue


def summary(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
    """The geometric mean over the limit, and how many are under 3, 5 and 10 times."""
    index = way.startswith("backward")
    ratios = [row[way] / row["limits"][index] for row in rows if row.get(way, 0) > 1e-4]
    return {
        "cases": len(ratios),
        "mean": exp(sum(map(log, ratios)) / max(len(ratios), 1)),
        **{f"under {n}": sum(r < n for r in ratios) / max(len(ratios), 1) for n in (3, 5, 10)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=200, help="of problems")
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seeds = list(range(options.first, options.first + options.number))
    compile_all(seeds, options.workers)
    # Backward passes run on the stream of the forward pass, and the default one is not captured.
    torch.cuda.set_stream(torch.cuda.Stream())
    rows = []
    for seed in seeds:
        rows.append(measured(seed))
        if options.output is not None:
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in rows if "backward" not in row]
    console = Console(width=120)
    for row in failed:
        console.print(f"{row['name']}: error {row['error']:.3g}")
    table = Table("pass", "cases", "mean over the limit", "under 3", "under 5", "under 10")
    for way in ("forward", "backward", "forward_eager", "backward_eager"):
        found = summary(rows, way)
        table.add_row(
            way, f"{found['cases']:.0f}", f"{found['mean']:.2f}",
            *[f"{found[f'under {n}']:.0%}" for n in (3, 5, 10)],
        )  # fmt: skip
    console.print(table)
    for way in ("forward", "backward"):
        index = way == "backward"
        worst = sorted(
            (row for row in rows if row.get(way, 0) > 1e-4),
            key=lambda row: row["limits"][index] / row[way],
        )
        for row in worst[:10]:
            shown = {k: v for k, v in row.items() if k not in ("limits", "name", "error")}
            console.print(f"{way} {row[way] / row['limits'][index]:.1f}  {row['name']}  {shown}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
