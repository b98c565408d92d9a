"""Trains a classifier of images in folders or in any other data set that timm reads, with timm's
data, optimizers, schedules, mixup, averages and checkpoints.

    python -m natten.models.finetune photographs --model dinat_mini --output runs/photographs
    torchrun --nproc-per-node 4 -m natten.models.finetune imagenet --model dinat_tiny --epochs 300
    python -m natten.models.finetune wds/shards --model nat_mini --num-classes 10
    python -m natten.models.finetune hfds/beans --model nat_mini --num-classes 3

A folder has `train/CLASS/*.jpg` and `validation/CLASS/*.jpg` (or `val`). `--pretrained` begins with
the model's own weights, `--initial-checkpoint` with those of a file of any layout. `--resume` goes
on after the last whole epoch in the output folder, where timm's `CheckpointSaver` writes
`last.pth.tar` and the best ones, `summary.csv` has a line for each epoch, and TensorBoard's files
are with `--tensorboard`. Validation is of the averaged weights, unless `--ema-decay 0`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, init_distributed_device, update_summary
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natten.models
from natten.command import Parser, guarded

PROG = "python -m natten.models.finetune"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="a folder, or a data set as timm names it: wds/FOLDER, hfds/NAME, torch/NAME")
    add("--model", default="dinat_mini", help="any model of timm (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/finetune"), help="folder (default: %(default)s)")
    add("--num-classes", type=int, help="default: the number of folders")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--pretrained", action="store_true", help="begin with the model's weights")
    add("--initial-checkpoint", default="", help="begin with the weights of a file")
    add("--resume", action="store_true", help="go on where the run in the output folder stopped")
    add("--img-size", type=int, help="default: the model's")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=128, help="of a process and a forward pass")
    add("--grad-accum-steps", type=int, default=1, help="batches of a step")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")
    add("--opt", default="adamw", help="timm's name of an optimizer")
    add("--lr", type=float, default=1e-3, help="for 1024 images a step; it grows with their number")
    add("--layer-decay", type=float, help="factor on the rate of each block in front of another")
    add("--weight-decay", type=float, default=0.05)
    add("--sched", default="cosine", help="timm's name of a schedule")
    add("--warmup-epochs", type=int, default=5)
    add("--clip-grad", type=float, default=5.0, help="largest norm of the gradient")
    add("--drop-path", type=float, help="default: the model's")
    add("--smoothing", type=float, default=0.1)
    add("--mixup", type=float, default=0.8, help="alpha, 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha, 0 for none")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy, '' for none")
    add("--reprob", type=float, default=0.25, help="of erasing a part of an image")
    add("--hflip", type=float, default=0.5)
    add("--ema-decay", type=float, default=0.9998, help="of the averaged weights, 0 for none")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on GPUs)")
    add("--workers", type=int, default=4, help="processes that read images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--tensorboard", action="store_true", help="needs pip install tensorboard")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "grad_accum_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.amp is None:
        options.amp = options.device.startswith("cuda")
    return options


def dataset(options: argparse.Namespace, training: bool) -> Any:
    """A split, as timm reads it.

    Raises:
        ValueError: a folder without this split.
    """
    split = options.train_split if training else options.val_split
    name, root = "", options.data
    if not Path(options.data).is_dir():
        name, _, rest = options.data.partition("/")
        # timm's names are of a data set in the folder root, or on the Hugging Face Hub.
        name, root = (f"{name}/", rest) if name == "wds" else (options.data, None)
    elif not any((Path(root) / s).is_dir() for s in (split, split[:5], split[:3])):
        raise ValueError(f"{root} must hold a folder {split} of folders with images of a class")
    return create_dataset(
        name,
        root=root,
        split=split,
        is_training=training,
        batch_size=options.batch_size,
        seed=options.seed,
        input_img_mode="RGB",
    )


def classes_of(options: argparse.Namespace, train: Any) -> int:
    """Classes of the data.

    Raises:
        ValueError: nobody says how many there are.
    """
    if options.num_classes:
        return options.num_classes
    found = getattr(train.reader, "class_to_idx", None)
    if not found:
        raise ValueError(f"--num-classes must be given for {options.data}")
    return len(found)


def loaders(options: argparse.Namespace, model: nn.Module, train: Any) -> tuple[Any, Any]:
    config = resolve_data_config({"img_size": options.img_size}, model=model)
    shared = {
        "input_size": config["input_size"],
        "interpolation": config["interpolation"],
        "mean": config["mean"],
        "std": config["std"],
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
        "distributed": options.distributed,
        "device": options.place,
        "use_prefetcher": False,
    }
    training = create_loader(
        train,
        is_training=True,
        auto_augment=options.aa or None,
        re_prob=options.reprob,
        re_mode="pixel",
        hflip=options.hflip,
        **shared,
    )
    return training, create_loader(dataset(options, False), crop_pct=config["crop_pct"], **shared)


def batches(
    options: argparse.Namespace, loader: Any, mix: Mixup
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of each step, the last one of fewer."""
    step = []
    for images, labels in loader:
        images, labels = images.to(options.place), labels.to(options.place)
        if len(images) % 2:
            # timm's mixup pairs images up.
            images, labels = images[:-1], labels[:-1]
        if len(images) == 0:
            continue
        step.append(mix(images, labels))
        if len(step) == options.grad_accum_steps:
            yield step
            step = []
    if step:
        yield step


def precision(options: argparse.Namespace) -> Any:
    if not options.amp:
        return nullcontext()
    return torch.autocast(options.place.type, torch.bfloat16)


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, options: argparse.Namespace) -> float:
    """Percentage of right answers, of all processes together."""
    model.eval()
    counts = torch.zeros(2, device=options.place)
    for images, labels in loader:
        with precision(options):
            answers = model(images.to(options.place)).argmax(1)
        counts[0] += (answers == labels.to(options.place)).sum()
        counts[1] += len(labels)
    if options.distributed:
        dist.all_reduce(counts)
    return 100 * (counts[0] / counts[1]).item()


def build(options: argparse.Namespace, num_classes: int) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if options.drop_path is not None:
        arguments["drop_path_rate"] = options.drop_path
    if options.img_size is not None:
        arguments["img_size"] = options.img_size
    if options.initial_checkpoint:
        state = natten.models.read_checkpoint(options.initial_checkpoint)
        # Its own number of classes: another one leaves the classifier out.
        heads = [v for k, v in state.items() if k.endswith(("head.weight", "head.fc.weight"))]
        count = heads[0].shape[0] if heads else 0
        overlay = {"state_dict": state, "num_classes": count}
        arguments.update(pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        arguments["pretrained"] = options.pretrained
    model = timm.create_model(options.model, **arguments)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(options.place)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns what result.json holds."""
    options.place = init_distributed_device(options)
    torch.manual_seed(options.seed + options.rank)
    is_first = options.rank == 0
    train = dataset(options, True)
    num_classes = classes_of(options, train)
    model = build(options, num_classes)
    training, validation = loaders(options, model, train)
    images_a_step = options.batch_size * options.grad_accum_steps * options.world_size
    optimizer = create_optimizer_v2(
        model,
        opt=options.opt,
        lr=options.lr * images_a_step / 1024,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
    )
    average = ModelEmaV3(model, options.ema_decay, use_warmup=True) if options.ema_decay else None
    folder = options.output
    last = folder / "last.pth.tar"
    first = 0
    if options.resume:
        if not last.is_file():
            raise FileNotFoundError(f"nothing to resume: {last} does not exist")
        first = resume_checkpoint(model, str(last), optimizer, log_info=False) or 0
        if average is not None:
            average.module.load_state_dict(natten.models.read_checkpoint(last))
    steps = math.ceil(len(training) / options.grad_accum_steps)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,
        warmup_epochs=min(options.warmup_epochs, options.epochs - 1),
        warmup_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scheduler.step_update(first * steps)
    wrapped = model
    if options.distributed:
        devices = [options.place] if options.place.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices)
    saver = writer = None
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(
            model,
            optimizer,
            argparse.Namespace(model=options.model),
            model_ema=average,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=3,
        )
        if options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RuntimeError("--tensorboard needs pip install tensorboard") from error
            writer = SummaryWriter(str(folder))
    mix = Mixup(
        options.mixup, options.cutmix, prob=float(options.mixup > 0 or options.cutmix > 0),
        label_smoothing=options.smoothing, num_classes=num_classes,
    )  # fmt: skip
    criterion = SoftTargetCrossEntropy()
    result: dict[str, Any] = {"model": options.model, "classes": num_classes}
    for epoch in range(first, options.epochs):
        if hasattr(training.sampler, "set_epoch"):
            training.sampler.set_epoch(epoch)
        start, total = time.perf_counter(), torch.zeros((), device=options.place)
        wrapped.train()
        done = 0
        for done, step in enumerate(batches(options, training, mix), 1):
            for i, (images, targets) in enumerate(step):
                # Gradients are summed over processes once a step.
                waits = options.distributed and i + 1 < len(step)
                with wrapped.no_sync() if waits else nullcontext(), precision(options):
                    loss = criterion(wrapped(images).float(), targets) / len(step)
                    loss.backward()
                total += loss.detach()
            if options.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(model, step=epoch * steps + done)
            scheduler.step_update(epoch * steps + done)
        right = accuracy(average.module if average else model, validation, options)
        if is_first:
            row = {"loss": total.item() / max(done, 1), "seconds": time.perf_counter() - start}
            result.update(epoch=epoch, val_accuracy=right, **row)
            update_summary(epoch, row, {"top1": right}, str(folder / "summary.csv"),
                           write_header=epoch == first and not options.resume)  # fmt: skip
            if writer is not None:
                for name, value in {**row, "top1": right}.items():
                    writer.add_scalar(name, value, epoch)
            saver.save_checkpoint(epoch, metric=right)
    if is_first:
        text = json.dumps(result, indent=2)
        (folder / "result.json").write_text(text + "\n")
        sys.stdout.write(text + "\n")
    if options.distributed:
        dist.destroy_process_group()
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    return run(parse(arguments))


def command() -> int:
    main()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROG, command))
