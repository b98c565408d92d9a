"""Trains a small image classifier, and evaluates one.

    python -m natten.models.train --model dinat_pico --data mnist5k --output RUN
    python -m natten.models.train --model dinat_pico --data mnist5k --output RUN --resume
    python -m natten.models.train --model dinat_pico --data mnist5k --evaluate RUN/final.safetensors

AdamW with a cosine schedule after a linear warm-up, mixed precision (bfloat16, on GPUs), an
exponential moving average of the weights, random affine crops, flips, mixup and label smoothing.
Everything random follows from `--seed` and the epoch, so that a run that was interrupted and
resumed ends with the weights of one that was not.

The data is split once and for all (`natten.models.data.split`). Training reports accuracy on "val"
as it goes; "test" is evaluated once, when it has ended. In the output folder:

    log.csv              a line an epoch
    last.pt              all that --resume needs; written after an epoch unless writing takes more
                         than a twentieth of the time since it was written before
    last.safetensors     weights of the same epoch; last-ema.safetensors their average
    final.safetensors    the averaged weights at the end, in float16
    result.json          accuracies, speed, settings
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from natten.command import Parser, guarded

from . import data as image_data
from ._checkpoint import checkpoint_filter_fn, read_checkpoint
from .comparison import ATTENTIONS, replace_attention
from .nat import NAT

PROG = "python -m natten.models.train"
# What the weights of a run depend on: reported, and the same when it is resumed.
SETTINGS = (
    *("epochs", "batch_size", "lr", "warmup_epochs", "weight_decay", "clip_grad"),
    *("drop_path", "label_smoothing", "mixup", "rotate", "scale", "shear", "shift"),
    *("hflip", "ema_decay", "amp", "compile", "seed"),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="dinat_pico", help="a registered NAT or DiNAT (default: %(default)s)")
    add("--attention", choices=ATTENTIONS, default="neighborhood", help="replace the attention")
    add(
        "--data",
        default="mnist5k",
        help="mnist5k, digits, or an .npz file (see natten.models.data)",
    )
    add("--output", type=Path, default=Path("runs/train"), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on where the run in the output folder stopped")
    add(
        "--evaluate",
        metavar="FILE",
        help="evaluate a checkpoint, or 'pretrained', on test; no training",
    )
    add("--epochs", type=int, default=120)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    add("--warmup-epochs", type=float, default=10)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, default=5.0, help="largest norm of the gradient")
    add("--drop-path", type=float, default=0.1)
    add("--label-smoothing", type=float, default=0.1)
    add("--mixup", type=float, default=0.2, help="alpha of mixup, 0 for none")
    add("--rotate", type=float, default=12.0, help="degrees of random rotation, either way")
    add("--scale", type=float, default=0.12, help="random zoom of each axis, either way")
    add("--shear", type=float, default=0.12)
    add("--shift", type=float, default=0.1, help="random crop: shift as a part of the image")
    add(
        "--hflip",
        type=float,
        default=0.0,
        help="probability of a horizontal flip; 0 for digits, which a flip makes other signs",
    )
    add("--ema-decay", type=float, default=0.995)
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 instead of float32 (default: on a GPU; few CPUs are faster with it)",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--tensorboard", action="store_true", help="log for TensorBoard too, if it is installed")
    add("--stop-after", type=int, metavar="EPOCHS", help="interrupt after this many epochs")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "stop_after"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.amp is None:
        options.amp = options.device.startswith("cuda")
    return options


def augment(images: Tensor, options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Random affine crops and flips, an own one for every image: `[B, C, H, W]` to the same."""

    def uniform(extent: float) -> Tensor:
        u = torch.rand(len(images), generator=generator, device=generator.device)
        return ((2 * u - 1) * extent).to(images.device)

    angle = uniform(math.radians(options.rotate))
    zoom_x, zoom_y = 1 + uniform(options.scale), 1 + uniform(options.scale)
    shear = uniform(options.shear)
    # A shift by the whole image is 2 in the coordinates of affine_grid.
    shift_x, shift_y = uniform(2 * options.shift), uniform(2 * options.shift)
    mirror = 1 - 2 * (uniform(1.0).abs() < options.hflip).float()
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([mirror * cos * zoom_x, (shear * cos - sin) * zoom_y, shift_x], -1),
            torch.stack([mirror * sin * zoom_x, (shear * sin + cos) * zoom_y, shift_y], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def batches(
    images: Tensor, labels: Tensor, options: argparse.Namespace, num_classes: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images and soft targets of an epoch; the order and all chances follow from seed and
    epoch.
    """
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    smooth = options.label_smoothing
    for chosen in order.split(options.batch_size):
        x = augment(images[chosen], options, generator)
        target = F.one_hot(labels[chosen], num_classes).float()
        target = target * (1 - smooth) + smooth / num_classes
        if options.mixup > 0:
            # Beta(a, a) as a ratio of two Gamma(a): torch.distributions takes no generator.
            gamma = torch._standard_gamma(torch.full((2,), options.mixup), generator=generator)
            weight = (gamma[0] / gamma.sum().clamp_min(1e-20)).item()
            x = weight * x + (1 - weight) * x.flip(0)
            target = weight * target + (1 - weight) * target.flip(0)
        yield x, target


def learning_rate(options: argparse.Namespace, progress: float) -> float:
    """Linear warm-up, then half a cosine to zero; `progress` in epochs."""
    if progress < options.warmup_epochs:
        return options.lr * (progress + 1e-3) / options.warmup_epochs
    rest = max(options.epochs - options.warmup_epochs, 1e-9)
    return options.lr * 0.5 * (1 + math.cos(math.pi * (progress - options.warmup_epochs) / rest))


def create(options: argparse.Namespace, num_classes: int, drop_path: float) -> nn.Module:
    model = timm.create_model(options.model, num_classes=num_classes, drop_path_rate=drop_path)
    if not isinstance(model, NAT):
        raise ValueError(f"--model must be a NAT or DiNAT, got {options.model}")
    replace_attention(model, options.attention, model.pretrained_cfg["input_size"][1:])
    for module in model.modules():
        # The published standard deviation of 0.02 is for wide models: in narrow ones branches would
        # begin too faint to learn.
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def precision(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if not options.amp:
        return nullcontext()
    return torch.autocast(torch.device(options.device).type, torch.bfloat16)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> float:
    """Percentage of right answers, in float32 so that it does not depend on the machine."""
    model.eval()
    right = 0
    for x, y in zip(images.split(options.batch_size), labels.split(options.batch_size)):
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(labels)


@torch.no_grad()
def inference_speed(model: nn.Module, images: Tensor, options: argparse.Namespace) -> float:
    """Images a second, in the precision of training: the median of 7 rounds over at least one
    batch.
    """
    model.eval()
    x = images[: options.batch_size]
    rounds = []
    repeats = 10 if torch.device(options.device).type == "cuda" else 1
    for _ in range(9):
        synchronize(options.device)
        start = time.perf_counter()
        with precision(options):
            for _ in range(repeats):
                model(x)
        synchronize(options.device)
        rounds.append(len(x) * repeats / (time.perf_counter() - start))
    return sorted(rounds[2:])[3]


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


class Log:
    """log.csv in the output folder, and TensorBoard where it is wanted and installed."""

    FIELDS = ("epoch", "lr", "train_loss", "val_accuracy", "images_per_second", "seconds")

    def __init__(self, folder: Path, resume: bool, tensorboard: bool) -> None:
        self.path = folder / "log.csv"
        if not resume or not self.path.is_file():
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerow(self.FIELDS)
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                sys.stderr.write("TensorBoard is not installed: log.csv alone is written\n")
            else:
                self.writer = SummaryWriter(str(folder))

    def drop_from(self, epoch: int) -> None:
        """Forgets epochs that are about to be run again, and a line that was not finished."""
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        kept = [row for row in rows if len(row) == len(self.FIELDS) and int(row[0]) < epoch]

        def save(path: Path) -> None:
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([self.FIELDS, *kept])

        save_atomically(self.path, save)

    def write(self, **values: float) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([f"{values[name]:.6g}" for name in self.FIELDS])
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, int(values["epoch"]))

    def rows(self) -> list[dict[str, float]]:
        with self.path.open(newline="") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def save_atomically(path: Path, save: Any) -> None:
    """A run that is killed while saving leaves the old file whole."""
    unfinished = path.with_name(path.name + ".partial")
    save(unfinished)
    unfinished.replace(path)


def progress_bar(total: int, done: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, mininterval=1.0)


def identity(options: argparse.Namespace, data: str) -> dict[str, Any]:
    """What must not change when a run is resumed."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    return {"model": options.model, "attention": options.attention, "data": data, **settings}


def read_state(path: Path, options: argparse.Namespace, data: str) -> dict[str, Any]:
    """What a run saved for `--resume`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a run of another model, data or other settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location=options.device, weights_only=True)
        before = dict(state["run"])
        state = {name: state[name] for name in ("epoch", "model", "averaged", "optimizer")}
    except Exception as error:
        # Of damaged files torch's unpickler raises whatever it stumbles over.
        raise ValueError(f"{path} is damaged, or not of this version: {error!r:.120}") from error
    now = identity(options, data)
    changed = [f"{k} {before.get(k)!r}, not {v!r}" for k, v in now.items() if before.get(k) != v]
    if changed:
        raise ValueError(f"--resume goes on with the run in {path.parent}: {'; '.join(changed)}")
    return state


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns what result.json holds."""
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    device = options.device
    dataset = image_data.load(options.data)
    num_classes = dataset.num_classes
    torch.manual_seed(options.seed)
    model = create(options, num_classes, options.drop_path)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))

    def split(name: str) -> tuple[Tensor, Tensor]:
        images, labels = image_data.tensors(dataset, name, cfg["input_size"][1:])
        return images.to(device), labels.to(device)

    model.to(device)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    skip = {n for n, p in model.named_parameters() if p.dim() < 2} | model.no_weight_decay()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n not in skip]},
            {"params": [p for n, p in model.named_parameters() if n in skip], "weight_decay": 0.0},
        ],
        lr=options.lr,
        weight_decay=options.weight_decay,
        fused=torch.device(device).type == "cuda",
    )
    first = 0
    if options.resume:
        state = read_state(folder / "last.pt", options, dataset.name)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    log = Log(folder, options.resume, options.tensorboard)
    log.drop_from(first)
    run = torch.compile(model) if options.compile else model

    images, labels = split("train")
    val = split("val")
    mean, std = mean.to(device), std.to(device)
    steps = math.ceil(len(images) / options.batch_size)
    bar = progress_bar(options.epochs * steps, first * steps)
    last = min(options.epochs, first + (options.stop_after or options.epochs))
    saved, cost = -math.inf, 0.0
    for epoch in range(first, last):
        model.train()
        torch.manual_seed(options.seed * 1_000_003 + epoch)  # stochastic depth
        synchronize(device)
        start = time.perf_counter()
        total = torch.zeros((), device=device)
        for step, (x, target) in enumerate(batches(images, labels, options, num_classes, epoch)):
            lr = learning_rate(options, epoch + step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with precision(options):
                logits = run((x - mean) / std)
            loss = F.cross_entropy(logits.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
            optimizer.step()
            # A short memory at first, when the weights still move fast.
            done = epoch * steps + step + 1
            decay = min(options.ema_decay, done / (done + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            total += loss.detach()
            if bar is not None:
                bar.update()
        synchronize(device)
        seconds = time.perf_counter() - start
        val_accuracy = accuracy(averaged, (val[0] - mean) / std, val[1], options)
        mean_loss = total.item() / steps
        log.write(
            epoch=epoch,
            lr=lr,
            train_loss=mean_loss,
            val_accuracy=val_accuracy,
            images_per_second=len(images) / seconds,
            seconds=seconds,
        )
        if bar is not None:
            bar.set_postfix(epoch=epoch, loss=f"{mean_loss:.3f}", val=f"{val_accuracy:.1f}%")
        # Short epochs would spend more time on the disk than on the device.
        if epoch + 1 == last or time.perf_counter() - saved > 20 * cost:
            start = time.perf_counter()
            save_atomically(folder / "last.safetensors", partial(save_file, _state(model)))
            save_atomically(folder / "last-ema.safetensors", partial(save_file, _state(averaged)))
            # One file, so that a run that is killed in between resumes from one epoch.
            state = {
                "run": identity(options, dataset.name),
                "epoch": epoch,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_atomically(folder / "last.pt", partial(torch.save, state))
            saved = time.perf_counter()
            cost = saved - start
    if bar is not None:
        bar.close()
    if last < options.epochs:
        sys.stdout.write(f"stopped after epoch {last - 1}; go on with --resume\n")
        return {}

    # Half the size to ship, and what is measured is what is shipped.
    rounded = {name: tensor.half() for name, tensor in _state(averaged).items()}
    averaged.load_state_dict(rounded)
    save_atomically(
        folder / "final.safetensors",
        lambda p: save_file(rounded, p, metadata={"model": options.model}),
    )
    test = split("test")
    rows = log.rows()
    if len(rows) != options.epochs:
        raise ValueError(
            f"{folder / 'log.csv'} must have a row for each of the {options.epochs} epochs, "
            f"got {len(rows)}: the result is made from it"
        )
    # The first epochs compile and allocate.
    speeds = sorted(row["images_per_second"] for row in rows[min(2, len(rows) - 1) :])
    result = {
        "model": options.model,
        "attention": options.attention,
        "data": dataset.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "val_accuracy": rows[-1]["val_accuracy"],
        "test_accuracy": accuracy(averaged, (test[0] - mean) / std, test[1], options),
        "images": {name: len(image_data.split(dataset.labels, name)) for name in image_data.SPLITS},
        "images_per_second_training": speeds[len(speeds) // 2],
        "images_per_second_inference": inference_speed(averaged, (images - mean) / std, options),
        "seconds_training": sum(row["seconds"] for row in rows),
        "device": device_name(device),
        "torch": torch.__version__,
        "settings": {name: getattr(options, name) for name in SETTINGS},
    }
    return _report(result, folder / "result.json")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of a checkpoint on the test split, and its speed."""
    dataset = image_data.load(options.data)
    if options.evaluate == "pretrained":
        model = timm.create_model(options.model, pretrained=True)
    else:
        model = create(options, dataset.num_classes, 0.0)
        state = checkpoint_filter_fn(read_checkpoint(options.evaluate), model)
        model.load_state_dict(state, strict=True)
    model.to(options.device)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    images, labels = image_data.tensors(dataset, "test", cfg["input_size"][1:])
    images = ((images - mean) / std).to(options.device)
    result = {
        "model": options.model,
        "attention": options.attention,
        "data": dataset.name,
        "test_accuracy": accuracy(model, images, labels.to(options.device), options),
        "images_per_second_inference": inference_speed(model, images, options),
        "device": device_name(options.device),
        "torch": torch.__version__,
    }
    return _report(result, None)


def _report(result: dict[str, Any], path: Path | None) -> dict[str, Any]:
    text = json.dumps(result, indent=2)
    if path is not None:
        path.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{PROG} is for one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: "
            "natten.models.finetune trains with several"
        )
    return evaluate(options) if options.evaluate else train(options)


def command() -> int:
    main()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROG, command))
