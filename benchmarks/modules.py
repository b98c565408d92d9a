"""What the modules of natten.nn cost over the operation inside them.

    python benchmarks/modules.py

On a GPU, bfloat16 and the sizes of NAT-Tiny at 224 x 224 with batch 128; on a CPU, float32 and
batch 2. The module is first compared with the composition of its parts. Times are medians of calls
that are timed one by one, the variants in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import natten
from natten.nn import (
    NeighborhoodAttention2D,
    NeighborhoodCrossAttention2D,
    NeighborhoodTransformerBlock,
)

# name: height and width, channels, heads, window
CASES = {
    "NAT-Tiny, stage 1": (56, 64, 2, 7),
    "NAT-Tiny, stage 3": (14, 256, 8, 7),
    "64 x 64, head_dim 64": (64, 512, 8, 13),
}
ROUNDS = 5


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat."""
    times = []
    for _ in range(3):
        call()
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def both_passes(call: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    gradient = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), inputs, gradient)


def measure(
    name: str, batch: int, place: dict[str, Any], repeats: int
) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows of the table: variant, forward, over its parts, both passes, over its parts."""
    extent, channels, heads, window = CASES[name]
    torch.manual_seed(0)
    plain = NeighborhoodAttention2D(channels, heads, window, **place)
    biased = NeighborhoodAttention2D(channels, heads, window, rel_pos_bias=True, **place)
    cross = NeighborhoodCrossAttention2D(channels, heads, window, context_dim=channels, **place)
    block = NeighborhoodTransformerBlock(
        channels, heads, window, rel_pos_bias=True, mlp_ratio=3, **place
    )
    x = torch.randn(batch, extent, extent, channels, **place, requires_grad=True)
    registers = torch.randn(batch, 4, channels, **place)
    context = torch.randn(batch, 32, channels, **place)
    lengths = torch.arange(batch, device=place["device"]) % 33
    qkv = plain.qkv(x).detach().unflatten(-1, (3 * heads, -1)).requires_grad_()
    hidden = torch.randn_like(x).requires_grad_()

    def attention(rpb: Tensor | None = None) -> Tensor:
        query, key, value = qkv.split([heads] * 3, -2)
        return natten.na2d(query, key, value, window, rpb=rpb)

    expected = plain.proj(attention().flatten(-2))
    torch.testing.assert_close(plain(x), expected, atol=1e-2, rtol=1e-2)
    operation = "operation"
    layers = ("first layer", "last layer")
    variants: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        operation: (attention, [qkv]),
        layers[0]: (lambda: plain.qkv(x), [x, *plain.qkv.parameters()]),
        layers[1]: (lambda: plain.proj(hidden), [hidden, *plain.proj.parameters()]),
        "operation, bias": (lambda: attention(biased.rpb), [qkv, biased.rpb]),
        "module": (lambda: plain(x), [x, *plain.parameters()]),
        "module, bias": (lambda: biased(x), [x, *biased.parameters()]),
        "module, 4 registers": (lambda: plain(x, registers)[0], [x, *plain.parameters()]),
        "cross, context of 32": (lambda: cross(x, context), [x, *cross.parameters()]),
        "cross, lengths": (lambda: cross(x, context, lengths), [x, *cross.parameters()]),
        "block, bias": (lambda: block(x), [x, *block.parameters()]),
    }
    both = {name: both_passes(*variant) for name, variant in variants.items()}
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in variants}
    # In turns, so that a busy host hurts all of them.
    for _ in range(ROUNDS):
        for name, (call, _inputs) in variants.items():
            with torch.no_grad():
                samples[name][0].extend(milliseconds(call, repeats // ROUNDS))
            samples[name][1].extend(milliseconds(both[name], repeats // ROUNDS))
    times = {name: [median(column) for column in found] for name, found in samples.items()}
    parts = [sum(column) for column in zip(times[operation], *(times[name] for name in layers))]
    yield operation, f"{times[operation][0]:.3f}", "", f"{times[operation][1]:.3f}", ""
    yield "operation and linear layers", f"{parts[0]:.3f}", "", f"{parts[1]:.3f}", ""
    for name, found in times.items():
        if name != operation and name not in layers:
            base = times[operation] if name.startswith(operation) else parts
            over = [f"{mine / its:.2f}" for mine, its in zip(found, base, strict=True)]
            yield name, f"{found[0]:.3f}", over[0], f"{found[1]:.3f}", over[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, help="default 128 on a GPU, else 2")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    batch = arguments.batch or (128 if on_gpu else 2)
    place: dict[str, Any] = {
        "device": "cuda" if on_gpu else "cpu",
        "dtype": torch.bfloat16 if on_gpu else torch.float32,
    }
    kind = torch.cuda.get_device_name() if on_gpu else "CPU"
    console = Console(width=110)
    console.print(f"{kind}, {place['dtype']}, batch {batch}, torch {torch.__version__}")
    table = Table("case", "variant", "forward ms", "over parts", "both passes ms", "over parts")
    for name in CASES:
        for i, row in enumerate(measure(name, batch, place, arguments.repeats)):
            table.add_row("" if i else name, *row)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
