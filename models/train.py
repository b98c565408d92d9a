"""Trains a classifier of images in folders, or in another data set that timm reads, with timm's
data, optimizers, schedules, mixup, averages and checkpoints.

    python -m natten.models.train photographs --model dinat_mini --pretrained
    torchrun --nproc-per-node 4 -m natten.models.train imagenet --model dinat_tiny --epochs 300
    python -m natten.models.train wds/shards --model nat_mini --num-classes 10
    python -m natten.models.train hfds/beans --model nat_mini
    python -m natten.models.train photographs --evaluate --initial-checkpoint runs/a/last.pth.tar

A folder has `train/CLASS/*.jpg` and `validation/CLASS/*.jpg` (or `val`). `--pretrained` begins
with the model's own weights, `--initial-checkpoint` with those of a file of any layout. Everything
random follows from `--seed` and the epoch: a run that was killed and goes on with `--resume` ends
with the weights of one that was not. In the output folder:

    last.pth.tar         all that --resume needs; checkpoint-N.pth.tar, model_best.pth.tar: the best
    summary.csv          a line for each epoch; with --tensorboard also TensorBoard's files
    final.safetensors    the averaged weights at the end, in float16
    result.json          accuracies of these weights, time, settings
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.data import (
    IterableImageDataset,
    Mixup,
    create_dataset,
    create_loader,
    resolve_data_config,
)
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    CheckpointSaver,
    ModelEmaV3,
    init_distributed_device,
    random_seed,
    update_summary,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natten.command import Parser, guarded

from ._checkpoint import read_checkpoint, read_file
from .comparison import ATTENTIONS, replace_attention

PROG = "python -m natten.models.train"
# What may differ when a run goes on; everything else is a setting, which its weights depend on.
PLACES = ("output", "resume", "evaluate", "workers", "device", "tensorboard", "test_split")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="a folder, wds/FOLDER (webdataset), or hfds/NAME (Hugging Face, or a folder)")
    add("--model", default="dinat_mini", help="any model of timm (default: %(default)s)")
    add("--attention", choices=ATTENTIONS, default="neighborhood", help="instead of a NAT's own")
    add("--output", type=Path, default=Path("runs/train"), help="folder (default: %(default)s)")
    add("--num-classes", type=int, help="default: what the data say")
    add("--train-split", default="train")
    add("--val-split", default="validation", help="measured after each epoch")
    add("--val-data", help="where --val-split is (default: as the training data)")
    add("--test-split", help="measured once, at the end; where --val-split is")
    add("--evaluate", action="store_true", help="measure on --val-split; no training")
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
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="parts of an image in a crop")
    add("--reprob", type=float, default=0.25, help="of erasing a part of an image")
    add("--hflip", type=float, default=0.5)
    add("--ema-decay", type=float, default=0.9998, help="of the averaged weights, 0 for none")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on GPUs)")
    add("--compile", action="store_true", help="torch.compile the model")
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read images",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--tensorboard", action="store_true", help="needs pip install tensorboard")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "grad_accum_steps"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
            )
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        parser.error(f"--batch-size must be even to mix pairs of images, got {options.batch_size}")
    if options.amp is None:
        options.amp = options.device.startswith("cuda")
    options.scale = list(options.scale)
    options.settings = {k: v for k, v in vars(options).items() if k not in PLACES}
    return options


def open_split(
    options: argparse.Namespace, split: str, training: bool, class_map: Any = None
) -> Any:
    """A split of the data, as timm reads it, with the numbers that folders of classes have in
    `class_map`.

    Raises:
        ValueError: no data set of this kind, or a folder without this split.
        RuntimeError: the package that reads it is not installed.
    """
    data = options.data if training else options.val_data or options.data
    kind, _, place = data.partition("/")
    name, root = "", data
    if Path(data).is_dir():
        names = (split, "val") if split == "validation" else (split,)
        if not any((Path(data) / name).is_dir() for name in names):
            raise ValueError(f"{data} must hold a folder {split} of folders with images of a class")
    elif kind in ("wds", "hfds"):
        name, root, class_map = ("wds/", place, None) if kind == "wds" else (data, None, None)
    else:
        raise ValueError(f"data must be a folder, wds/FOLDER or hfds/NAME, got {data}")
    package = {"wds": "webdataset", "hfds": "datasets"}.get(kind if name else "")
    if package and find_spec(package) is None:
        raise RuntimeError(f"{kind}/ needs pip install {package}")
    found = create_dataset(
        name,
        root=root,
        split=split,
        class_map=class_map,
        is_training=training,
        batch_size=options.batch_size,
        seed=options.seed,
        input_img_mode="RGB",
    )
    shards, readers = shards_of(found), options.world_size * max(options.workers, 1)
    if options.world_size > 1 and shards is not None and shards % readers:
        # A process that reads more than another waits for it forever, or measures images twice.
        raise ValueError(
            f"{data}: {shards} shards of {split} cannot be shared evenly by {options.world_size} "
            f"processes of {options.workers} --workers"
        )
    return found


def shards_of(data: Any) -> int | None:
    """Files that processes share out among themselves; None where they share out images."""
    if not isinstance(data, IterableImageDataset):
        return None
    return len(data.reader.split_info.filenames)


def count(data: Any) -> int:
    """Images of a split; of shards, `len` is what readers make of it."""
    return len(data) if shards_of(data) is None else data.reader.num_samples


def classes_of(options: argparse.Namespace, data: Any) -> int:
    """Classes of the data.

    Raises:
        ValueError: nobody says how many there are.
    """
    count = options.num_classes or len(getattr(data.reader, "class_to_idx", None) or ())
    if not count:
        raise ValueError(f"--num-classes must be given for {options.data}")
    return count


def loader(options: argparse.Namespace, model: nn.Module, data: Any, training: bool) -> Any:
    """Batches of images as the model wants them, augmented in training.

    Raises:
        ValueError: there are fewer images than a batch has.
    """
    config = resolve_data_config({"img_size": options.img_size}, model=model)
    augmentation: dict[str, Any] = {"crop_pct": config["crop_pct"]}
    if training:
        augmentation = {
            "auto_augment": options.aa or None,
            "scale": options.scale,
            "re_prob": options.reprob,
            "re_mode": "pixel",
            "hflip": options.hflip,
        }
    batches = create_loader(
        data,
        is_training=training,
        input_size=config["input_size"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        batch_size=options.batch_size,
        num_workers=options.workers,
        # Workers that outlive an epoch would remember what they drew in it.
        persistent_workers=False,
        distributed=options.distributed,
        device=options.place,
        use_prefetcher=False,
        **augmentation,
    )
    if len(batches) == 0:
        raise ValueError(
            f"--batch-size must be at most the {len(data) // options.world_size} images of a "
            f"process, got {options.batch_size}"
        )
    return batches


def build(options: argparse.Namespace, num_classes: int) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if options.drop_path is not None:
        arguments["drop_path_rate"] = options.drop_path
    if options.initial_checkpoint:
        state = read_checkpoint(options.initial_checkpoint)
        # Its own number of classes: another one leaves the classifier out.
        heads = [v for k, v in state.items() if k.endswith(("head.weight", "head.fc.weight"))]
        overlay = {"state_dict": state, "num_classes": heads[0].shape[0] if heads else 0}
        arguments.update(pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        arguments["pretrained"] = options.pretrained
    model = timm.create_model(options.model, **arguments)
    if options.img_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=options.img_size)
    replace_attention(model, options.attention, model.pretrained_cfg["input_size"][1:])
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.compile:
        model.compile()
    return model.to(options.place)


def precision(options: argparse.Namespace) -> Any:
    if not options.amp:
        return nullcontext()
    return torch.autocast(options.place.type, torch.bfloat16)


@torch.no_grad()
def accuracy(options: argparse.Namespace, model: nn.Module, batches: Any) -> float:
    """Percentage of right answers, of all processes together, in float32."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=options.place)
    own = math.inf
    if options.distributed and shards_of(batches.dataset) is None:
        # timm's sampler repeats the first images, so that all processes have as many.
        own = len(range(options.rank, len(batches.dataset), options.world_size))
    for images, labels in batches:
        labels = labels.to(options.place)
        right = model(images.to(options.place)).argmax(1) == labels
        right = right[: int(min(own, len(right)))]
        own -= len(right)
        counts += torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.float64)])
    if options.distributed:
        dist.all_reduce(counts)
    return 100 * (counts[0] / counts[1]).item()


def steps_of(
    options: argparse.Namespace, batches: Any, mix: Mixup | None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of each step, the last one of fewer."""
    step = []
    for images, labels in batches:
        images, labels = images.to(options.place), labels.to(options.place)
        step.append((images, labels) if mix is None else mix(images, labels))
        if len(step) == options.grad_accum_steps:
            yield step
            step = []
    if step:
        yield step


def resume(
    options: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: ModelEmaV3 | None,
    saver: CheckpointSaver,
) -> int:
    """Gives everything the state after the last whole epoch; returns the next one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a run with other settings.
    """
    path = options.output / "last.pth.tar"
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    state = read_file(path)
    try:
        before = vars(state["args"])
        changed = [
            f"{name} {before.get(name)!r}, not {value!r}"
            for name, value in options.settings.items()
            if before.get(name) != value
        ]
        if not changed:
            model.load_state_dict(state["state_dict"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.module.load_state_dict(state["state_dict_ema"])
            if "saver" in state:  # which older versions of timm do not store
                saver.load_state_dict(state["saver"])
            return state["epoch"] + 1
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of this trainer: {error!r}") from error
    raise ValueError(
        f"--resume goes on with the run in {options.output}: {'; '.join(changed)}; another one may "
        "begin with its weights, --initial-checkpoint"
    )


def forget(path: Path, epoch: int) -> None:
    """Drops lines of epochs that are about to be run, and one that was not finished."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) < epoch]
    path.write_text("".join(lines[:1] + kept if kept else []))


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns what result.json holds."""
    if options.tensorboard and find_spec("tensorboard") is None:
        raise RuntimeError("--tensorboard needs pip install tensorboard")
    folder, is_first = options.output, options.rank == 0
    torch.manual_seed(options.seed)
    data = {"train": open_split(options, options.train_split, True)}
    # A class that has no images in another split keeps its number.
    class_map = data["train"].reader.class_to_idx
    for name in ("val", "test"):
        split = getattr(options, f"{name}_split")
        if split is not None:
            data[name] = open_split(options, split, False, class_map)
    num_classes = classes_of(options, data["train"])
    model = build(options, num_classes)
    loaders = {name: loader(options, model, data[name], name == "train") for name in data}
    training = loaders["train"]
    images_a_step = options.batch_size * options.grad_accum_steps * options.world_size
    optimizer = create_optimizer_v2(
        model,
        opt=options.opt,
        lr=options.lr * images_a_step / 1024,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
    )
    average = ModelEmaV3(model, options.ema_decay, use_warmup=True) if options.ema_decay else None
    saver = CheckpointSaver(
        model,
        optimizer,
        argparse.Namespace(**options.settings),
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        max_history=3,
    )
    first = resume(options, model, optimizer, average, saver) if options.resume else 0
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
    summary = folder / "summary.csv"
    writer = None
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        forget(summary, first)
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder))
    mix = None
    criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=options.smoothing)
    if options.mixup or options.cutmix:
        mix = Mixup(
            options.mixup,
            options.cutmix,
            label_smoothing=options.smoothing,
            num_classes=num_classes,
        )
        criterion = SoftTargetCrossEntropy()
    averaged = average.module if average is not None else model
    for epoch in range(first, options.epochs):
        # Whatever is drawn in an epoch does not depend on those before.
        random_seed(options.seed + 1009 * epoch, options.rank)
        for part in (training.sampler, training.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        start, total = time.perf_counter(), torch.zeros((), device=options.place)
        wrapped.train()
        done = 0
        for done, step in enumerate(steps_of(options, training, mix), 1):
            for i, (images, targets) in enumerate(step):
                # Gradients are summed over processes once a step.
                waits = options.distributed and i + 1 < len(step)
                with wrapped.no_sync() if waits else nullcontext():
                    with precision(options):
                        logits = wrapped(images)
                    loss = criterion(logits.float(), targets) / len(step)
                    loss.backward()
                total += loss.detach()
            if options.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(model, step=epoch * steps + done)
            scheduler.step_update(epoch * steps + done)
        loss_of_epoch, seconds = total.item() / max(done, 1), time.perf_counter() - start
        right = accuracy(options, averaged, loaders["val"])
        if is_first:
            row = {"loss": loss_of_epoch, "seconds": seconds}
            header = not summary.stat().st_size
            update_summary(epoch, row, {"top1": right}, str(summary), write_header=header)
            if writer is not None:
                for name, value in {**row, "top1": right}.items():
                    writer.add_scalar(name, value, epoch)
            saver.save_checkpoint(epoch, metric=right)
            sys.stderr.write(
                f"epoch {epoch + 1}/{options.epochs}: loss {loss_of_epoch:.3f}, validation "
                f"{right:.2f}%, {seconds:.0f} s\n"
            )
    # Half the size to ship, and what is measured is what is shipped.
    rounded = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous()
               for k, v in averaged.state_dict().items()}  # fmt: skip
    averaged.load_state_dict(rounded)
    measured = {
        f"{name}_accuracy": accuracy(options, averaged, loaders[name])
        for name in data
        if name != "train"
    }
    result = {
        "model": options.model,
        "attention": options.attention,
        "data": Path(options.data).name,
        "classes": num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": {name: count(part) for name, part in data.items()},
        **measured,
    }
    if is_first:
        save_file(rounded, folder / "final.safetensors", metadata={"model": options.model})
        with summary.open(newline="") as file:
            result["seconds"] = sum(float(row["train_seconds"]) for row in csv.DictReader(file))
        result["device"] = device_name(options)
        result["torch"], result["timm"] = torch.__version__, timm.__version__
        result["settings"] = options.settings
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def device_name(options: argparse.Namespace) -> str:
    one = f"CPU, {torch.get_num_threads()} threads"
    if options.place.type == "cuda":
        one = torch.cuda.get_device_name(options.place)
    return one if options.world_size == 1 else f"{options.world_size} x {one}"


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of `--pretrained` or `--initial-checkpoint` on `--val-split`."""
    if not (options.pretrained or options.initial_checkpoint):
        raise ValueError("--evaluate needs weights: --pretrained, or --initial-checkpoint FILE")
    data = open_split(options, options.val_split, False)
    model = build(options, classes_of(options, data))
    right = accuracy(options, model, loader(options, model, data, False))
    return {"model": options.model, "images": count(data), "accuracy": right}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    options.place = init_distributed_device(options)
    options.settings["world_size"] = options.world_size
    try:
        result = evaluate(options) if options.evaluate else train(options)
    finally:
        if options.distributed:
            dist.destroy_process_group()
    if options.rank == 0:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return result


def command() -> int:
    main()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROG, command))
