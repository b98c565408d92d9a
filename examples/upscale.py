"""An image upscaler: what a photograph lost when it was made half as large.

    python examples/upscale.py --steps 500 --picture upscaled.png

Trained on crops of photographs that come with scikit-image, measured on one that was left out,
beside bicubic interpolation, whose error the model learns. Convolutions of channels-first images
and attention of channels-last grids meet in `ChannelsFirst`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

from natten.nn import ChannelsFirst, NeighborhoodStage


class Upscaler(nn.Module):
    """`[B, 3, H, W]` in [0, 1] to `[B, 3, 2H, 2W]`, of any size: bicubic, and what it lacks."""

    def __init__(self, dim: int = 48, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        stage = NeighborhoodStage(
            dim, depth, heads, 7, dilation=[1 + i % 2 for i in range(depth)], rel_pos_bias=True,
            layer_scale=0.1, pad=True, mlp_ratio=2,
        )  # fmt: skip
        self.body = nn.Sequential(
            nn.Conv2d(3, dim, 3, padding=1),
            ChannelsFirst(stage),
            nn.Conv2d(dim, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        nn.init.zeros_(self.body[2].weight)  # so that training begins with bicubic interpolation

    def forward(self, x: Tensor) -> Tensor:
        return bicubic(x) + 0.1 * self.body(x - 0.5)


def bicubic(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic")


def halved(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)


def photograph(name: str) -> Tensor:
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    return image[..., : image.shape[2] // 2 * 2, : image.shape[3] // 2 * 2]


def psnr(x: Tensor, y: Tensor) -> float:
    return -10 * math.log10((x.clamp(0, 1) - y).square().mean().item())


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--size", type=int, default=160, help="of what is measured")
    parser.add_argument("--picture", help="file for the original, bicubic and model's images")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train = [photograph(name) for name in ("coffee", "rocket", "chelsea")]
    model = Upscaler(options.dim)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(options.steps, 1) + 1)
    for step in range(options.steps):
        image = train[step % len(train)]
        crops = []
        for _ in range(8):
            y, x = (int(torch.randint(n - 64, ())) for n in image.shape[2:])
            crops.append(image[..., y : y + 64, x : x + 64])
        large = torch.cat(crops)
        loss = (model(halved(large)) - large).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # The face of the astronaut.
    large = photograph("astronaut")[..., : options.size, 150 : 150 + options.size]
    with torch.no_grad():
        small = halved(large)
        upscaled = model.eval()(small)
    if options.picture:
        from matplotlib.image import imsave

        images = torch.cat([large, bicubic(small), upscaled], 3).clamp(0, 1)
        imsave(options.picture, images[0].permute(1, 2, 0).numpy())
    result = {"psnr": psnr(upscaled, large), "psnr_of_bicubic": psnr(bicubic(small), large)}
    print(result)
    return result


if __name__ == "__main__":
    main()
