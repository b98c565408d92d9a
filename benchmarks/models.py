"""Images a second of NAT-Tiny and DiNAT-Tiny beside Swin-T and ConvNeXt-T, in one run.

    python benchmarks/models.py --output models.json

Inference and training step (forward, backward, AdamW), eager, compiled, and compiled into CUDA
graphs, which the host launches at once, in bfloat16 on random images. Every number is the median of
the rounds; models take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import natten.models  # noqa: F401  registers ours

# What torch.compile is given; None: not compiled.
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "graphs": {"mode": "reduce-overhead"},
}
TASKS = ("inference", "training")
MODELS = ("nat_tiny", "dinat_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")


def inference(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.eval()

    def step() -> object:
        with torch.inference_mode():
            return model(x)

    return step


def training(model: torch.nn.Module, x: torch.Tensor, autocast: bool) -> Callable[[], object]:
    model.train()
    fused = x.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)
    target = torch.randint(1000, (len(x),), device=x.device)

    def step() -> object:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def seconds(step: Callable[[], object], device: str, repeats: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def profile(step: Callable[[], object], device: str, rows: int = 15) -> str:
    """The kernels (on a CPU: operators) that one step spends most time in."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as recorded:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true", help="show where a step spends its time")
    options = parser.parse_args()
    device, batch = options.device, options.batch_size
    images = torch.randn(batch, 3, options.size, options.size, device=device)
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        for task in options.tasks:
            steps = {}
            for name in options.models:
                model = timm.create_model(name, num_classes=1000).to(device)
                if task == "inference":
                    model = model.to(torch.bfloat16)
                how = MODES[mode]
                run = model if how is None else torch.compile(model, **how)
                if task == "inference":
                    step = inference(run, images.to(torch.bfloat16))
                else:
                    step = training(run, images, autocast=True)
                for _ in range(3):
                    step()
                steps[name] = step
                if options.profile:
                    sys.stdout.write(f"{name} {mode} {task}\n{profile(step, device)}\n")
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(options.rounds):
                for name, step in steps.items():
                    times[name].append(seconds(step, device, options.repeats))
            for name, rounds in times.items():
                row = {
                    "model": name,
                    "mode": mode,
                    "task": task,
                    "images_per_second": batch / statistics.median(rounds),
                    "slowest_round": batch / max(rounds),
                    "fastest_round": batch / min(rounds),
                }
                rows.append(row)
                sys.stdout.write(
                    f"{name:32} {mode:9} {task:10} {row['images_per_second']:9.0f} images/s\n"
                )
                sys.stdout.flush()
            steps.clear()
            if device == "cuda":
                torch.cuda.empty_cache()
    device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = {
        "device": device_name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "batch_size": batch,
        "size": options.size,
        "dtype": "bfloat16",
        "rows": rows,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
