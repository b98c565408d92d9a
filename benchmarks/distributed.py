"""Speed of attention over a grid that is sharded over GPUs.

    for n in 1 2 4; do
        torchrun --nproc-per-node $n benchmarks/distributed.py --output results/distributed.json
    done
    torchrun --nproc-per-node 2 benchmarks/distributed.py --toy     # on CPUs, to try the script

Each run adds the results for its number of ranks to the file. Every way is first compared with the
operator on one GPU, on boxes of the first case's output and gradients; a way that fails is not
timed. Times are those of the slowest rank in rounds of four calls one after another, as in
training, medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import natten.distributed as nd
from natten.distributed.boxes import needed
from natten.functional import neighborhood_attention_generic
from natten.window import Axis

HEADS, HEAD_DIM = 24, 128
KERNEL_SIZE = (18, 24, 24)
CASES = {"hunyuan_na": (30, 48, 80), "four times as long": (120, 48, 80)}
# Of each number of ranks: ways to cut frames, rows and columns, and the cut that is exchanged for
# heads, if any.
WAYS: dict[int, dict[str, tuple[tuple[int, int, int], int | None]]] = {
    1: {},
    2: {
        "halo, columns in 2": ((1, 1, 2), None),
        "halo, frames in 2": ((2, 1, 1), None),
        "heads": ((1, 1, 2), 2),
    },
    4: {
        "halo, rows and columns in 2": ((1, 2, 2), None),
        "halo, columns in 4": ((1, 1, 4), None),
        "halo, frames in 4": ((4, 1, 1), None),
        "heads": ((1, 1, 4), 2),
        "heads of 2, columns in 2": ((1, 2, 2), 1),
    },
}
# Grids with as many tokens for each rank as the first case has on one.
WEAK = {1: (30, 48, 80), 2: (30, 48, 160), 4: (30, 96, 160)}


@dataclass
class Way:
    """A function of this rank's query, key and value, and the sharding of its tensors."""

    name: str
    sharding: nd.GridSharding | None
    function: Callable[..., Tensor]
    sent: dict[str, float] = field(default_factory=dict)

    def tensors(self, grid: tuple[int, ...], device: torch.device) -> list[Tensor]:
        """Query, key, value and the gradient of the output."""
        extent = grid if self.sharding is None else self.sharding.own.extent
        rank = 0 if self.sharding is None else dist.get_rank()
        generator = torch.Generator(device).manual_seed(rank)
        shape = (1, *extent, HEADS, HEAD_DIM)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tensors = [
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
        ]
        for tensor in tensors[:3]:
            tensor.requires_grad_()
        return tensors


def shard(grid: tuple[int, ...], cuts: tuple[int, int, int], device: str) -> nd.GridSharding:
    axes = [axis for axis, n in enumerate(cuts) if n > 1]
    mesh = init_device_mesh(
        device, tuple(cuts[a] for a in axes), mesh_dim_names=tuple("thw"[a] for a in axes)
    )
    return nd.GridSharding.from_placements(grid, mesh, [Shard(axis + 1) for axis in axes])


def ways(grid: tuple[int, ...], device: torch.device) -> Iterator[Way]:
    """All for this number of ranks."""
    world = dist.get_world_size()
    if world == 1:
        yield Way("one GPU", None, lambda *t: neighborhood_attention_generic(*t, KERNEL_SIZE))
    found: Any = None
    for name, (cuts, heads_axis) in WAYS[world].items():
        sharding = shard(grid, cuts, device.type)
        found = found or sharding
        heads_dim = None if heads_axis is None else sharding.axes.index(heads_axis)
        yield Way(name, sharding, attend(sharding, heads_dim=heads_dim), sent(sharding, heads_dim))
    if found is not None:
        for method in ("merge", "ring"):
            yield Way(f"{method}, as the first", found, attend(found, method=method))
        p2p = attend(found, transport="p2p")
        yield Way("batch_isend_irecv, as the first", found, p2p)
        for chunks in (1, 2, 8):
            yield Way(f"heads in {chunks}, as the first", found, attend(found, head_chunks=chunks))
        yield Way("all keys gathered, as the first", found, gather(found))


def attend(sharding: nd.GridSharding, **options: Any) -> Callable[..., Tensor]:
    options = {"method": "halo", **options}
    return lambda *t: nd.neighborhood_attention(*t, KERNEL_SIZE, sharding=sharding, **options)


def gather(sharding: nd.GridSharding) -> Callable[..., Tensor]:
    """What is often done: every rank gets all keys and values."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (sharding.unshard(t) for t in (key, value))
        return neighborhood_attention_generic(
            query, keys, values, KERNEL_SIZE, grid=sharding.grid, query_origin=sharding.own.origin
        )

    return function


def sent(sharding: nd.GridSharding, heads_dim: int | None) -> dict[str, float]:
    """Megabytes that the rank with the most receives in the forward pass, and the least possible:
    every key and value that it needs once."""
    token = HEADS * HEAD_DIM * 2 * 2
    axes = tuple(map(Axis, sharding.grid, KERNEL_SIZE))
    inner, share, moved = sharding, 1, 0.0
    if heads_dim is not None:
        share = len(sharding.splits[heads_dim])
        # Query, key and value there, the output back.
        moved = max(b.tokens for b in sharding.boxes) * token * 2 * (share - 1) / share
        inner = sharding.without[heads_dim]
    halo = 0.0
    if inner is not None:
        halo = max(needed(axes, b).tokens - b.tokens for b in inner.boxes) * token / share
    least = max(needed(axes, b).tokens - b.tokens for b in sharding.boxes) * token
    return {"halo MB": halo / 1e6, "heads MB": moved / 1e6, "halo alone MB": least / 1e6}


def predicted(grid: tuple[int, ...], heads_ranks: int | None = None) -> dict[int, Any]:
    """The best meshes of 1 to 1,024 ranks, as `natten.distributed.explain` has them."""
    found = {}
    for ranks in (2**n for n in range(11)):
        with suppress(ValueError):
            found[ranks] = nd.explain(
                grid, KERNEL_SIZE, ranks=ranks, heads=HEADS, heads_ranks=heads_ranks, top=1
            ).best
    return found


# --- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def slowest(value: float, device: torch.device) -> float:
    total = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.item()


def milliseconds(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median of the slowest rank."""
    function()
    times: list[float] = []
    enough = False
    while not enough:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(slowest((time.perf_counter() - start) * 1e3 / 4, device))
        # The same on every rank, since the slowest one's times are.
        enough = len(times) >= 3 and (4 * sum(times) > seconds * 1e3 or len(times) >= 20)
    return statistics.median(times)


def measure(
    way: Way, grid: tuple[int, ...], device: torch.device, seconds: float
) -> dict[str, Any]:
    *tensors, upstream = way.tensors(grid, device)

    def both() -> None:
        out = way.function(*tensors)
        torch.autograd.grad(out, tensors, upstream)

    with torch.no_grad():
        forward = milliseconds(lambda: way.function(*tensors), device, seconds)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    total = milliseconds(both, device, seconds)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return {
        "way": way.name, "grid": grid, "forward_ms": forward, "both_ms": total,
        "memory_GB": slowest(memory, device), **way.sent,
    }  # fmt: skip


def check(way: Way, grid: tuple[int, ...], device: torch.device) -> str | None:
    """What is wrong with the output and the gradients of a way, compared with one process."""
    if way.sharding is None:
        return None
    generator = torch.Generator(device).manual_seed(5)
    shape = (1, *grid, HEADS, HEAD_DIM)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = [
        torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
        for _ in range(3)
    ]
    local = [way.sharding.shard(t).detach().clone().requires_grad_() for t in whole]
    out, single = way.function(*local), neighborhood_attention_generic(*whole, KERNEL_SIZE)
    found = [out, *torch.autograd.grad(out.sin().sum(), local)]
    true = [single, *torch.autograd.grad(single.sin().sum(), whole)]
    for name, a, b in zip(("out", "query", "key", "value"), found, true, strict=True):
        b = way.sharding.shard(b).float()
        error = (a.float() - b).abs().max() / b.abs().max()
        if not error < 2e-2:
            return f"{name}: error {error:.3g}"
    return None


def hidden(way: Way, grid: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """The share of the exchange's time in which products are computed, of a profiler's trace."""
    *tensors, upstream = way.tensors(grid, device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):
        torch.autograd.grad(way.function(*tensors), tensors, upstream)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(way.function(*tensors), tensors, upstream)
        torch.cuda.synchronize()
    exchanges, others = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (exchanges if "nccl" in event.name.lower() else others).append(span)
    total = sum(end - start for start, end in exchanges)
    covered = sum(overlap(span, merged(others)) for span in exchanges)
    return {
        "exchange_ms": total / 1e3,
        "hidden": covered / max(total, 1e-9),
        "kernels_ms": sum(end - start for start, end in others) / 1e3,
        "span_ms": (max(e for _, e in others) - min(s for s, _ in others)) / 1e3,
    }


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def overlap(span: tuple[float, float], spans: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in spans)


def largest(device: torch.device, cuts: tuple[int, int, int]) -> dict[str, Any]:
    """The most frames of 48 x 80 tokens whose forward and backward pass fit."""

    def way_of(frames: int) -> tuple[Way, tuple[int, ...]]:
        grid = (frames, 48, 80)
        if dist.get_world_size() == 1:
            function = lambda *t: neighborhood_attention_generic(*t, KERNEL_SIZE)  # noqa: E731
            return Way("one", None, function), grid
        sharding = shard(grid, cuts, device.type)
        return Way("halo", sharding, attend(sharding)), grid

    def run(frames: int) -> float | None:
        """Gigabytes taken, or None if there are not as many."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        way, grid = way_of(frames)
        failed = 0.0
        try:
            *tensors, upstream = way.tensors(grid, device)
            torch.autograd.grad(way.function(*tensors), tensors, upstream)
        except torch.OutOfMemoryError:
            failed = 1.0
        tensors = upstream = None
        return None if slowest(failed, device) else slowest(
            torch.cuda.max_memory_allocated() / 1e9, device
        )  # fmt: skip

    world = dist.get_world_size()
    few, more = 48 * world, 96 * world
    first, second = run(few), run(more)
    if first is None or second is None:
        return {"frames": few if first else 0}
    per_frame = (second - first) / (more - few)
    torch.cuda.empty_cache()
    # What all ranks have, less what NCCL and CUDA take.
    limit = -slowest(-torch.cuda.mem_get_info()[0] / 1e9, device) - 1.0
    frames, memory = int(more + (limit - second) / per_frame), None
    while memory is None and frames > more:
        frames = int(frames * 0.98) // world * world
        memory = run(frames)
    return {"frames": frames, "GB_per_frame": per_frame, "memory_GB": memory}


def links(device: torch.device) -> dict[str, float]:
    """Bytes a second and rank of large all_to_all_singles, and microseconds of a small one."""
    world = dist.get_world_size()
    sizes = {"large": 2**27, "small": 2**10}
    times = {}
    for name, size in sizes.items():
        tensor = torch.zeros(size // world * world, device=device, dtype=torch.bfloat16)
        target = torch.empty_like(tensor)
        times[name] = milliseconds(
            lambda t=tensor, o=target: dist.all_to_all_single(o, t), device, 1
        )
    moved = sizes["large"] * 2 * (world - 1) / world
    return {"GB_per_s": moved / times["large"] / 1e6, "latency_us": times["small"] * 1e3}


def main() -> None:
    global HEADS, HEAD_DIM, KERNEL_SIZE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="ways whose names begin so, of the first case")
    parser.add_argument("--no-largest", action="store_true", help="do not fill the memory")
    parser.add_argument("--toy", action="store_true", help="small grids")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=2))
    world = dist.get_world_size()
    cases, weak = CASES, WEAK[world]
    if options.toy:
        HEADS, HEAD_DIM, KERNEL_SIZE = 4, 16, (3, 4, 4)
        cases = {name: (n // 15 * 4, 8, 16) for name, (n, _, _) in CASES.items()}
        weak = (8, 8, 16 * world)
    result: dict[str, Any] = {"links": links(device), "cases": {}}
    if options.only:
        cases = dict([next(iter(cases.items()))])
    for name, grid in cases.items():
        rows = result["cases"][name] = []
        for way in ways(grid, device):
            if not way.name.startswith(options.only):
                continue
            first = name == next(iter(cases))
            wrong = check(way, grid, device) if first else None
            wrong = (
                "another rank" if slowest(float(wrong is not None), device) and not wrong else wrong
            )
            if wrong is not None:
                print(f"rank {dist.get_rank()}: {way.name} is wrong: {wrong}", flush=True)
                continue
            row = measure(way, grid, device, options.seconds)
            if on_gpu and way.sharding is not None:
                row |= hidden(way, grid, device)
            rows.append(row)
            if dist.get_rank() == 0:
                print(name, row, flush=True)
    if options.only:
        dist.destroy_process_group()
        return
    way = next(iter(ways(weak, device)))
    result["weak"] = measure(way, weak, device, options.seconds)
    if on_gpu and not options.no_largest:
        result["largest"] = largest(device, (world, 1, 1))
    if dist.get_rank() == 0:
        print(result["weak"], result.get("largest"), result["links"], flush=True)
        if options.output:
            everything = json.loads(options.output.read_text()) if options.output.exists() else {}
            everything |= {
                "device": torch.cuda.get_device_name() if on_gpu else "CPU",
                "torch": torch.__version__,
                "date": date.today().isoformat(),
                str(world): result,
            }
            options.output.write_text(json.dumps(everything, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
