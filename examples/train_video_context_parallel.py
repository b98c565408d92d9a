"""Trains a video denoiser on clips whose tokens are sharded over GPUs, and their batch too.

    cd examples
    torchrun --nproc-per-node 4 train_video_context_parallel.py --mesh 1,2,2
    torchrun --nproc-per-node 4 train_video_context_parallel.py --mesh 2,1,2 --fsdp --compare

The mesh has three dimensions: clips of the batch, frames, and columns. Each rank has its clips, and
of them its frames and columns. Gloo and CPUs are taken where there is no GPU. With ``--compare``
every rank also trains the model alone, on whole clips, and the losses are printed side by side.
"""

from __future__ import annotations

import argparse
import copy
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import natten.distributed as nd
from natten.models.video import VideoDenoiser
from natten.nn import NeighborhoodTransformerBlock

PATCH = (1, 2, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="1,1,-1", help="ranks for clips, frames, columns")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--clip", default="9,16,24", help="frames, rows, columns of a clip")
    parser.add_argument("--kernel-size", default="3,5,5")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--method", default="auto", choices=("auto", "halo", "merge", "ring"))
    parser.add_argument("--fsdp", action="store_true", help="shard parameters, too")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compare", action="store_true", help="with one process")
    return parser.parse_args()


def integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def build(options: argparse.Namespace, device: torch.device) -> VideoDenoiser:
    torch.manual_seed(0)
    model = VideoDenoiser(
        embed_dim=options.dim,
        depth=options.depth,
        num_heads=options.heads,
        kernel_size=integers(options.kernel_size),
        dilations=[(1, 1, 1), (2, 1, 1)],
        is_causal=True,
    )
    # A fresh denoiser is the identity: its gates are zero, and there would be nothing to see.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def main() -> None:
    options = arguments()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A CPU backend beside NCCL lets ranks compare their calls without stopping the GPUs.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=2)
    )
    device = torch.device("cuda" if on_gpu else "cpu")
    world = dist.get_world_size()
    clips, times, columns = integers(options.mesh)
    columns = world // (clips * times) if columns == -1 else columns
    mesh = init_device_mesh(
        device.type, (clips, times, columns), mesh_dim_names=("batch", "time", "width")
    )

    clip = integers(options.clip)
    grid = tuple(n // p for n, p in zip(clip, PATCH, strict=True))
    # Dimensions of [batch, time, height, width, heads, head_dim].
    tokens = nd.GridSharding.from_placements(grid, mesh, (Shard(0), Shard(1), Shard(3)))
    pixels = tokens.refined(PATCH)
    own_clip = mesh["batch"].get_local_rank()

    model: nn.Module = build(options, device)
    alone = copy.deepcopy(model) if options.compare else None
    parallelize_module(model, mesh, nd.NeighborhoodContextParallel(tokens, method=options.method))
    if options.checkpointing:
        apply_activation_checkpointing(
            model, check_fn=lambda part: isinstance(part, NeighborhoodTransformerBlock)
        )
    # Parameters are the same on all ranks, whichever tokens and clips these have.
    if options.fsdp:
        everyone = mesh._flatten("all")
        for block in model.blocks:
            fully_shard(block, mesh=everyone)
        fully_shard(model, mesh=everyone)
    else:
        model = DistributedDataParallel(model)
    if options.compile:
        model = torch.compile(model)

    def loss_of(network: nn.Module, noisy: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            predicted = network(noisy, time)
        return (predicted - noise).square().sum()

    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-3) for n in (model, alone) if n]
    generator = torch.Generator().manual_seed(1)
    for step in range(options.steps):
        shape = (clips, 3, *clip)
        frames, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        time = torch.rand(clips, generator=generator).to(device)
        own = slice(own_clip, own_clip + 1)
        noisy, target = (pixels.shard(t[own], dim=2) for t in (frames + noise, noise))
        # Sums over own pixels by the number of all: uneven boxes weigh what they hold. DDP and FSDP
        # take the mean over ranks, and the loss is a sum over them.
        loss = loss_of(model, noisy, target, time[own]) / noise.numel()
        (loss * world).backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        text = f"step {step}: loss {total.item():.6f}"
        if alone is not None:
            single = loss_of(alone, frames + noise, noise, time) / noise.numel()
            single.backward()
            text += f", one process {single.item():.6f}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(text, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
