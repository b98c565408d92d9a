"""Trains the denoiser of photographs, measures it, and removes noise from a photograph.

    python -m natten.models.restore train --output runs/restore
    python -m natten.models.restore measure --picture denoised.png
    python -m natten.models.restore denoise noisy.jpg clean.png --noise 25

The photographs come with scikit-image and scikit-learn. Two of them, astronaut and chelsea, are
left out of the training; on these the model is measured, beside scikit-image's filters. Noise is
Gaussian, independent in every pixel and channel, and in steps of 8-bit pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from natten.command import Parser, guarded

PROG = "python -m natten.models.restore"
NAME = "image_denoiser_pico.photographs"
TRAINING = ("coffee", "rocket", "motorcycle_left", "motorcycle_right", "china", "flower")
HELD_OUT = ("astronaut", "chelsea")
NOISES = (15, 25, 50)
# The face of the astronaut: first row and column, rows and columns.
FACE = (0, 150, 192, 160)


def photograph(name: str) -> Tensor:
    """`[3, H, W]` in [0, 1].

    Raises:
        RuntimeError: the package that it comes with is not installed.
    """
    try:
        if name in ("china", "flower"):
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(f"{name}.jpg")
        else:
            from skimage import data

            if name.startswith("motorcycle"):
                pixels = data.stereo_motorcycle()[name.endswith("right")]
            else:
                pixels = getattr(data, name)()
    except ImportError as error:
        raise RuntimeError(
            "the photographs come with scikit-image and scikit-learn: "
            "pip install scikit-image scikit-learn"
        ) from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def crops(photographs: Sequence[Tensor], count: int, size: int) -> Tensor:
    """Random squares, mirrored and turned: `[count, 3, size, size]`."""
    found = []
    areas = torch.tensor([float(p[0].numel()) for p in photographs])
    for i in areas.multinomial(count, replacement=True).tolist():
        y, x = (int(torch.randint(n - size + 1, ())) for n in photographs[i].shape[1:])
        crop = photographs[i][:, y : y + size, x : x + size].rot90(
            int(torch.randint(4, ())), (1, 2)
        )
        found.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    return torch.stack(found)


def psnr(x: Tensor, clean: Tensor) -> float:
    return -10 * math.log10((x.clamp(0, 1) - clean).square().mean().item())


def noisy(name: str, noise: int) -> tuple[Tensor, Tensor]:
    """A photograph, and the same with noise, which is the same every time."""
    clean = photograph(name)
    generator = torch.Generator().manual_seed(noise)
    return clean, clean + noise / 255 * torch.randn(clean.shape, generator=generator)


@torch.no_grad()
def remove(model: nn.Module, image: Tensor, noise: float) -> Tensor:
    """The denoised `[3, H, W]`; noise in steps of 8-bit pixels."""
    return model.eval()(image[None], noise / 255)[0]


def filters(noise: int) -> dict[str, list[Callable[[np.ndarray], np.ndarray]]]:
    """scikit-image's filters, each with several strengths, for `[H, W, 3]` in [0, 1]."""
    from skimage import restoration

    sigma = noise / 255

    def means(h: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: restoration.denoise_nl_means(
            x, 5, 6, h=h * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
        )

    def variation(weight: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: restoration.denoise_tv_chambolle(x, weight * sigma, channel_axis=-1)

    return {
        "total variation": [variation(weight) for weight in (0.7, 1.0, 1.4)],
        "non-local means": [means(h) for h in (0.4, 0.6, 0.8)],
    }


def measure(model: nn.Module, names: Sequence[str] = HELD_OUT) -> dict[str, Any]:
    """PSNR in dB of each method, by photograph and noise. Of the filters, the strength that is best
    for the very photograph.
    """
    results: dict[str, Any] = {}
    for name in names:
        for noise in NOISES:
            clean, seen = noisy(name, noise)
            row = {"noisy": psnr(seen, clean)}
            pixels = seen.permute(1, 2, 0).numpy()
            for method, variants in filters(noise).items():
                row[method] = max(
                    psnr(torch.from_numpy(variant(pixels)).permute(2, 0, 1), clean)
                    for variant in variants
                )
            row["this model"] = psnr(remove(model, seen, noise), clean)
            results.setdefault(name, {})[str(noise)] = row
    return results


def draw(model: nn.Module, path: Path, noise: int = 25) -> None:
    """The face of the astronaut: noisy, by non-local means, by the model, clean."""
    from matplotlib.figure import Figure

    clean, seen = noisy("astronaut", noise)
    best = max(
        (
            torch.from_numpy(variant(seen.permute(1, 2, 0).numpy())).permute(2, 0, 1)
            for variant in filters(noise)["non-local means"]
        ),
        key=lambda x: psnr(x, clean),
    )
    y, x, height, width = FACE
    face = clean[:, y : y + height, x : x + width]
    figure = Figure(figsize=(12, 4), layout="constrained")
    pictures = {
        "noisy": seen,
        "non-local means": best,
        "image_denoiser_pico": remove(model, seen, noise),
        "clean": clean,
    }
    for axes, (title, picture) in zip(figure.subplots(1, 4), pictures.items(), strict=True):
        part = picture[:, y : y + height, x : x + width]
        axes.imshow(part.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        value = "" if title == "clean" else f", {psnr(part, face):.1f} dB"
        axes.set_title(f"{title}{value}")
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_CARD = """# {name}

An `ImageDenoiser` of {parameters:.2f} million parameters that removes Gaussian noise of a known
strength from photographs. The weights are in the package, so this works offline:

```python
import timm
import torch
import natten.models

model = timm.create_model("{name}", pretrained=True).eval()
noisy = torch.rand(1, 3, 200, 301)  # [batch, 3, height, width], any size; clean values in [0, 1]
with torch.no_grad():
    clean = model(noisy, 25 / 255)  # the standard deviation of the noise
```

PSNR in dB of two photographs that nothing was trained on, by the standard deviation of the noise in
steps of 8-bit pixels. The filters are scikit-image's, with the strength of three that is best for
the very photograph:

| photograph | noise | {methods} |
|-|-|{dashes}
{rows}

`python -m natten.models.restore measure` gives these numbers again, and a picture with `--picture`.

## Data

{count} photographs that come with scikit-image and scikit-learn: {training}. Held out: {held_out}.
Few photographs, and noise that is made: the model shows what the implementation learns in minutes,
and is no match for one that is trained on many.

## Training

`python -m natten.models.restore train`: {steps} steps of {batch_size} crops of {size} x {size}
pixels with noise of 5 to 55, mean absolute error, AdamW with a peak learning rate of {lr}, seed
{seed}; {minutes:.0f} minutes on {device}, which other programs used too, torch {torch}. The weights
are stored in float16, and the numbers are of these.
Between two forms of the network the training loss and the astronaut's face decided, so that of the
two held-out photographs only chelsea is untouched by choices.
"""


def write_card(result: dict[str, Any]) -> str:
    rows = [
        (name, noise, row)
        for name, noises in result["psnr"].items()
        for noise, row in noises.items()
    ]
    methods = list(rows[0][2])
    return _CARD.format(
        **{**result, **result["settings"], "parameters": result["parameters"] / 1e6},
        methods=" | ".join(methods),
        dashes="-|" * len(methods),
        rows="\n".join(
            f"| {name} | {noise} | {' | '.join(f'{row[m]:.2f}' for m in methods)} |"
            for name, noise, row in rows
        ),
        count=len(TRAINING),
        training=", ".join(TRAINING),
        held_out=" and ".join(HELD_OUT),
        minutes=result["seconds"] / 60,
    )


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns what the .json file holds."""
    torch.manual_seed(options.seed)
    photographs = [photograph(name) for name in TRAINING]
    model = timm.create_model(NAME.split(".")[0]).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, options.steps + 1, pct_start=0.1
    )
    start, total = time.perf_counter(), torch.zeros((), device=options.device)
    for step in range(1, options.steps + 1):
        clean = crops(photographs, options.batch_size, options.size).to(options.device)
        noise = (5 + 50 * torch.rand(len(clean), device=clean.device)) / 255
        seen = clean + noise.view(-1, 1, 1, 1) * torch.randn_like(clean)
        loss = (model(seen, noise) - clean).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % 100 == 0:
            sys.stderr.write(
                f"step {step}/{options.steps}: loss {total.item() / 100:.4f}, "
                f"{time.perf_counter() - start:.0f} s\n"
            )
            total.zero_()
    seconds = time.perf_counter() - start
    # Half the size to ship, and what is measured is what is shipped.
    rounded = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items()}
    model.cpu().load_state_dict(rounded)
    is_gpu = options.device.startswith("cuda")
    result = {
        "name": NAME,
        "parameters": sum(p.numel() for p in model.parameters()),
        "psnr": measure(model),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU core",
        "torch": torch.__version__,
        "settings": {k: getattr(options, k) for k in ("steps", "batch_size", "size", "lr", "seed")},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(rounded, options.output / f"{NAME}.safetensors")
    (options.output / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / f"{NAME}.md").write_text(write_card(result))
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="weights, their card and numbers")
    trainer.add_argument("--output", type=Path, default=Path("runs/restore"), help="folder")
    trainer.add_argument("--steps", type=int, default=1800)
    trainer.add_argument("--batch-size", type=int, default=8)
    trainer.add_argument("--size", type=int, default=48, help="of a crop")
    trainer.add_argument("--lr", type=float, default=3e-3)
    trainer.add_argument("--seed", type=int, default=0)
    trainer.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measurer = commands.add_parser("measure", help="PSNR of the weights in the package")
    measurer.add_argument("--picture", type=Path, help="a figure, in this file")
    denoiser = commands.add_parser("denoise", help="a photograph in a file")
    denoiser.add_argument("input", type=Path)
    denoiser.add_argument("output", type=Path)
    denoiser.add_argument("--noise", type=float, default=25, help="steps of 8-bit pixels")
    options = parser.parse_args(arguments)
    if options.command == "train":
        result = train(options)
    else:
        model = timm.create_model(NAME, pretrained=True)
        if options.command == "measure":
            result = measure(model)
            if options.picture:
                draw(model, options.picture)
        else:
            pixels = np.array(Image.open(options.input).convert("RGB"))
            image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
            clean = remove(model, image, options.noise).clamp(0, 1).mul(255).round().byte()
            Image.fromarray(clean.permute(1, 2, 0).numpy()).save(options.output)
            result = {"size": list(image.shape[1:]), "noise": options.noise}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return result


def command() -> int:
    main()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROG, command))
