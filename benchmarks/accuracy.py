"""Errors against float64, by backend and type: `python benchmarks/accuracy.py`, seconds on a CPU.

What is compared is the largest error relative to the largest exact value, of the output and of the
gradients, for inputs that are rounded to the type first. Beside the backends stands PyTorch's
attention with a mask, in the same type.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten import devices, window

GRID, HEADS, HEAD_DIM = (28, 28), 4, 64
CALLS = {
    "window 7": dict(kernel_size=7),
    "window 13, stride 4": dict(kernel_size=13, stride=4),
    "window 9, dilation 3, causal": dict(kernel_size=9, dilation=3, is_causal=True),
}
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "query", "key", "value")
OUTPUT = Path(__file__).with_name("accuracy.json")


def mask_of(call: dict) -> Tensor:
    """`[queries, keys]`: which pairs attend."""
    values = {"stride": 1, "dilation": 1, "is_causal": False, **call}
    axes = [window.Axis(length, **values) for length in GRID]
    return window.grid_mask(axes)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).unflatten(1, GRID)


def results(
    attend: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, gradients: bool
) -> list[Tensor]:
    tensors = [t.clone().requires_grad_(gradients) for t in tensors]
    out = attend(*tensors)
    return [out.detach(), *(torch.autograd.grad(out, tensors, grad) if gradients else ())]


def errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    return {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(NAMES, found, exact, strict=False)
    }


def measure(device: str) -> list[dict]:
    rows = []
    shape = (2, *GRID, HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    source = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    for title, call in CALLS.items():
        mask = mask_of(call).to(device)
        for dtype in TYPES:
            *tensors, grad = (t.to(device, dtype) for t in source)
            wide = [t.double() for t in tensors]
            exact = results(
                lambda q, k, v, call=call: natten.na2d(q, k, v, **call, backend="reference"),
                wide, grad.double(), True,
            )  # fmt: skip
            ways: dict[str, Callable[..., Tensor]] = {
                name: lambda q, k, v, name=name, call=call: natten.na2d(
                    q, k, v, **call, backend=name
                )
                for name in ("hopper-fna", "cutlass-fna", "cpu-fna", "flex-fna", "reference-fna")
            }
            ways["PyTorch with a mask"] = lambda q, k, v, mask=mask: masked_attention(q, k, v, mask)
            for name, attend in ways.items():
                for gradients in (True, False):
                    try:
                        found = results(attend, tensors, grad, gradients)
                    except (NotImplementedError, RuntimeError):
                        continue  # another device's, or no backward pass
                    rows.append(
                        {"call": title, "dtype": str(dtype).removeprefix("torch."),
                         "backend": name, "errors": errors(found, exact)}
                    )  # fmt: skip
                    break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    document = {
        "device": devices.driver_name(options.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
        "grid": GRID, "heads": HEADS, "head_dim": HEAD_DIM,
        "rows": measure(options.device),
    }  # fmt: skip
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
