"""Trains one image and one video model in many ways, from the same weights on the same batches.

    python benchmarks/training.py                    a quarter of an hour on two cores
    python benchmarks/training.py --device cuda      adds NCCL runs where there are two GPUs
    python benchmarks/training.py --jobs 8           so many runs at a time, each in its process
    python benchmarks/training.py --runs reference cpu --steps 50

Images of noisy gratings are classified by their angle, and clips of moving spots are denoised; both
are drawn from the number of the step, so that all runs see the same. What a run is compared with,
and how close it has to come, stands in `runs`: the same bits, or losses within `BOUNDS`. "one
rounding" is the reference once more from weights that are off by at most one rounding: how far
curves part by themselves. Exits with 1 if a run is further away than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import natten
import natten.distributed as nd
from natten.functional import dispatch, operators
from natten.models._base import init_weights
from natten.models.isotropic import IsotropicNAT
from natten.models.video import VideoDenoiser

RESULTS = Path(__file__).parent / "results"
RANKS = 2
CLASSES = 8
# Steps of a mean of losses: single batches are noisier than any difference between runs.
WINDOW = 25
# Largest relative differences of losses: in the first ten steps, of any mean of WINDOW steps,
# and of the mean of the last fifth.
BOUNDS = {"float32": (1e-4, 0.1, 0.05), "bfloat16": (0.02, 0.2, 0.1)}


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        name: What is shown.
        backend: Runs all windows.
        autocast: To bfloat16.
        like: The run with the same bits; "" where it is compared with the reference.
        compiled: By torch.compile.
        checkpointing: Activations of blocks are computed again.
        resumed: Half of the steps, a file, and the other half by a new model.
        off: Weights are off by at most one rounding.
        parallel: "ddp" and "fsdp" share the batch among ranks, "context" the tokens.
    """

    name: str
    backend: str
    autocast: bool = False
    like: str = ""
    compiled: bool = False
    checkpointing: bool = False
    resumed: bool = False
    off: bool = False
    parallel: str = ""


def runs(device: str) -> list[Run]:
    fast, autocast = "cpu", False
    found = [Run("reference", "reference"), Run("one rounding", "reference", off=True)]
    if device == "cuda":
        found += [Run("cutlass", "cutlass"), Run("cutlass, bf16", "cutlass", autocast=True)]
        # The backend of sm_90 takes 16-bit types only.
        fast = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "cutlass"
        autocast = True
    name = f"{fast}, bf16" if autocast else fast
    if all(name != run.name for run in found):
        found += [Run(name, fast, autocast)]
    if device == "cpu":
        found += [Run(f"{way}, bf16", way, autocast=True) for way in ("reference", "cpu")]
    more = partial(Run, backend=fast, autocast=autocast)
    found += [
        more("again", like=name),
        more("checkpointed", like=name, checkpointing=True),
        more("resumed", like=name, resumed=True),
        more("compiled", compiled=True),
        more("compiled, checkpointed", compiled=True, checkpointing=True),
    ]
    if device == "cpu" or torch.cuda.device_count() >= RANKS:
        found += [more(f"{way}, {RANKS} ranks", parallel=way) for way in ("ddp", "fsdp", "context")]
    return found


class Images:
    """Gratings of one of eight angles, in noise."""

    size, patch, batch = 16, 2, 16
    grid = (size // patch,) * 2

    def model(self) -> nn.Module:
        model = IsotropicNAT(
            in_chans=1, num_classes=CLASSES, patch_size=self.patch, embed_dim=32, depth=2,
            num_heads=2, kernel_size=((5, 5), (3, 3)), dilations=(1, 2), mlp_ratio=2.0,
        )  # fmt: skip
        return model.apply(partial(init_weights, weight_init="xavier"))

    def data(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        angle = labels * torch.pi / CLASSES
        wave, phase = torch.rand(2, self.batch, generator=generator)
        y, x = torch.meshgrid(*(torch.arange(float(self.size)),) * 2, indexing="ij")
        along = torch.cos(angle)[:, None, None] * x + torch.sin(angle)[:, None, None] * y
        waves = torch.sin((0.6 + 0.8 * wave)[:, None, None] * along + 6.28 * phase[:, None, None])
        noise = torch.randn(waves.shape, generator=generator)
        return (waves + 0.6 * noise)[:, None], labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels)

    def loss_of_own_tokens(
        self, model: nn.Module, sharding: nd.GridSharding, images: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of all tokens, of which each rank has a box."""
        pixels = sharding.refined((self.patch,) * 2).shard(images, 2)
        return F.cross_entropy(model(pixels).float(), labels)


class PooledOverRanks(nn.Module):
    """A classifier of images whose tokens are sharded: its pooling is over the tokens of all."""

    def __init__(self, model: IsotropicNAT, tokens: int) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, pixels: Tensor) -> Tensor:
        own = self.model.forward_features(pixels).float().sum((1, 2)) / self.tokens
        pooled = own.detach().clone()
        dist.all_reduce(pooled)
        # Zeros, whose gradient is as many times a rank's own as DDP divides it by.
        return self.model.head.fc(pooled + dist.get_world_size() * (own - own.detach()))


class Clips:
    """Spots that move at a constant speed, and the noise that was added to them."""

    size, frames, patch, batch = 16, 4, 2, 4
    grid = (frames, size // patch, size // patch)

    def model(self) -> nn.Module:
        model = VideoDenoiser(
            in_chans=1, patch_size=(1, self.patch, self.patch), embed_dim=32, depth=2,
            num_heads=2, kernel_size=(2, 5, 5), dilations=[(1, 1, 1), (2, 1, 1)], is_causal=True,
            mlp_ratio=2.0, time_scale=1000.0,
        )  # fmt: skip
        # A fresh denoiser is the identity: its gates are zero.
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def data(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clips, noise, and how much of it each of them has."""
        place, speed = torch.rand(2, self.batch, 2, 1, generator=generator)
        at = (place + (speed - 0.5) / 4 * torch.arange(self.frames)) % 1
        lines = torch.arange(self.size) / self.size
        away = (lines - at[..., None] + 0.5) % 1 - 0.5  # [batch, axis, frame, line]
        y, x = torch.exp(-((away / 0.12) ** 2)).unbind(1)
        clean = (y[..., :, None] * x[..., None, :])[:, None]
        noise = torch.randn(clean.shape, generator=generator)
        return clean, noise, torch.linspace(0.05, 0.95, self.batch)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Clips on the way to noise, and in which direction that is."""
        share = times.view(-1, 1, 1, 1, 1)
        return (1 - share) * clean + share * noise, noise - clean

    def loss(self, model: nn.Module, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        mixed, wanted = self.noisy(clean, noise, times)
        return (model(mixed, times).float() - wanted).square().mean()

    def loss_of_own_tokens(
        self,
        model: nn.Module,
        sharding: nd.GridSharding,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
    ) -> Tensor:
        """This rank's part of the loss, as many times as there are ranks: they are averaged."""
        mixed, wanted = self.noisy(clean, noise, times)
        pixels = sharding.refined((1, self.patch, self.patch))
        errors = model(pixels.shard(mixed, 2), times).float() - pixels.shard(wanted, 2)
        return errors.square().sum() * dist.get_world_size() / wanted.numel()


TASKS: dict[str, Any] = {"image": Images(), "video": Clips()}


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Inside, no other backend is there: who declines a window fails the run."""
    kept = dict(dispatch.BACKENDS)
    try:
        dispatch.BACKENDS.clear()
        dispatch.BACKENDS[backend] = kept[backend]
        _forget()
        yield
    finally:
        dispatch.BACKENDS.clear()
        dispatch.BACKENDS.update(kept)
        _forget()


def _forget() -> None:
    dispatch.forget()
    operators.forget()


class Trainer:
    """A model and its optimizer on this process, as a run says."""

    def __init__(self, run: Run, task: Any, device: str, seed: int = 0) -> None:
        self.run, self.task, self.device = run, task, device
        torch.manual_seed(seed)
        plain = task.model().to(device)
        if run.off:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in plain.parameters():
                    signs = torch.randint(-1, 2, parameter.shape, generator=generator).to(device)
                    parameter.mul_(1 + signs * torch.finfo(torch.float32).eps / 2)
        if run.checkpointing:
            plain.set_grad_checkpointing()
        self.model, self.loss = plain, task.loss
        if run.parallel == "context":
            mesh = init_device_mesh(device, (RANKS,))
            sharding = nd.GridSharding.from_placements(task.grid, mesh, (Shard(2),))
            blocks = plain.layers if isinstance(plain, IsotropicNAT) else plain.blocks
            parallelize_module(blocks, mesh, nd.NeighborhoodContextParallel(sharding))
            if isinstance(plain, IsotropicNAT):
                self.model = PooledOverRanks(plain, sharding.grid[0] * sharding.grid[1])
            self.loss = partial(self._sharded_loss, sharding)
        if run.parallel == "fsdp":
            mesh = init_device_mesh(device, (RANKS,))
            for block in plain.layers if isinstance(plain, IsotropicNAT) else plain.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(plain, mesh=mesh)
        elif run.parallel:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.01)
        if run.compiled:
            torch.compiler.reset()
            self.model = torch.compile(self.model)

    def _sharded_loss(self, sharding: nd.GridSharding, model: nn.Module, *batch: Tensor) -> Tensor:
        return self.task.loss_of_own_tokens(model, sharding, *batch)

    def steps(self, numbers: range) -> list[float]:
        """The losses of these steps."""
        losses = []
        for number in numbers:
            batch = self.task.data(torch.Generator().manual_seed(number))
            if self.run.parallel in ("ddp", "fsdp"):
                batch = tuple(t[dist.get_rank() :: RANKS] for t in batch)
            batch = tuple(t.to(self.device) for t in batch)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.run.autocast):
                loss = self.loss(self.model, *batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss = loss.detach().clone()
            if self.run.parallel:
                dist.all_reduce(loss)
                loss /= RANKS
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def losses_of(run: Run, task: Any, device: str, steps: int) -> list[float]:
    """Trains; every step's loss, of this process or, on many, of all."""
    with only(run.backend), natten.use_deterministic_algorithms():
        trainer = Trainer(run, task, device)
        if not run.resumed:
            return trainer.steps(range(steps))
        first = trainer.steps(range(steps // 2))
        with tempfile.TemporaryDirectory() as folder:
            trainer.save(Path(folder) / "half.pth")
            trainer = Trainer(run, task, device, seed=1)
            trainer.load(Path(folder) / "half.pth")
        return first + trainer.steps(range(steps // 2, steps))


def _rank(rank: int, folder: str, run: Run, name: str, device: str, steps: int) -> None:
    torch.set_num_threads(1)
    _prepare(device)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store",
        rank=rank, world_size=RANKS, timeout=timedelta(minutes=5),
    )  # fmt: skip
    losses = losses_of(run, TASKS[name], device, steps)
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def train(run: Run, name: str, device: str, steps: int) -> tuple[list[float], float]:
    """Trains the model of a task, on as many processes as the run has: losses and seconds."""
    start = time.perf_counter()
    if run.parallel:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (folder, run, name, device, steps), nprocs=RANKS)
            losses = json.loads((Path(folder) / "losses.json").read_text())
    else:
        losses = losses_of(run, TASKS[name], device, steps)
    return losses, time.perf_counter() - start


def means(losses: list[float], window: int) -> Tensor:
    """Of `window` losses each, one behind the other; of what is there if that is less."""
    curve = torch.tensor(losses, dtype=torch.float64)
    return curve.unfold(0, min(window, len(curve)), min(window, len(curve))).mean(1)


def differences(losses: list[float], wanted: list[float]) -> tuple[float, float, float]:
    """Largest relative differences: of the first steps, of means, of the last fifth."""
    found = []
    for part, window in (
        (slice(10), 1),
        (slice(None), WINDOW),
        (slice(-len(wanted) // 5, None), 0),
    ):
        pair = [means(curve[part], window or len(curve)) for curve in (losses, wanted)]
        found.append(float(((pair[0] - pair[1]) / pair[1]).abs().max()))
    return found[0], found[1], found[2]


def verdict(run: Run, losses: list[float], curves: dict[str, list[float]]) -> tuple[str, bool]:
    """How far a run is from what it is compared with, in words, and whether it may be."""
    if run.like:
        count = sum(a != b for a, b in zip(losses, curves[run.like], strict=True))
        return f"{count} losses are not those of {run.like!r}" if count else "same bits", not count
    found = differences(losses, curves["reference"])
    bounds = BOUNDS["bfloat16" if run.autocast else "float32"]
    text = "first steps {:.1e}, means {:.1%}, end {:.1%}".format(*found)
    return text, all(a <= b for a, b in zip(found, bounds))


def _prepare(device: str) -> None:
    if device == "cuda":
        # Without it, cuBLAS is not deterministic; it is read when CUDA is initialized.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--runs", nargs="+", help="names of runs; the reference is always one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, help="default: results/training-DEVICE.json")
    options = parser.parse_args()
    _prepare(options.device)
    chosen = [r for r in runs(options.device) if not options.runs or r.name in options.runs]
    needed = {"reference", *(r.name for r in chosen), *(r.like for r in chosen)}
    chosen = [r for r in runs(options.device) if r.name in needed]
    unknown = set(options.runs or ()) - {r.name for r in chosen}
    if unknown:
        parser.error(f"--runs must be of {', '.join(r.name for r in runs(options.device))}")
    device = "CPU"
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    document: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "natten": natten.__version__,
        "steps": options.steps, "window": WINDOW, "bounds": BOUNDS, "tasks": {},
    }  # fmt: skip
    right = True
    pool = ProcessPoolExecutor(
        options.jobs, torch.multiprocessing.get_context("spawn"), _prepare, (options.device,)
    )
    trained = {
        (task, run.name): pool.submit(train, run, task, options.device, options.steps)
        for task in options.tasks
        for run in chosen
    }
    for task in options.tasks:
        curves: dict[str, list[float]] = {}
        rows = document["tasks"][task] = {}
        for run in chosen:
            losses, seconds = trained[task, run.name].result()
            curves[run.name] = losses
            text, is_right = verdict(run, losses, curves)
            right &= is_right
            rows[run.name] = {
                "losses": [round(x, 5) for x in means(losses, 10).tolist()],
                "compared": text, "right": is_right, "seconds": round(seconds, 1),
            }  # fmt: skip
            print(
                f"{task}  {run.name:24} {losses[0]:.4f} to {means(losses[-50:], 50)[0]:.4f}  "
                f"{text}  {seconds:.0f} s{'' if is_right else '  WRONG'}",
                flush=True,
            )
    pool.shutdown()
    path = options.output or RESULTS / f"training-{options.device}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
