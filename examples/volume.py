"""A 3-D U-Net: finds blobs in noisy volumes whose slices are thick, as those of scanners are.

    python examples/volume.py --steps 200

Patches and strides differ between axes (slices are not merged at first), and extents may be odd:
the way up cuts what the way down padded. The blobs are scikit-image's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from skimage.data import binary_blobs
from torch import Tensor, nn

from natten.nn import NeighborhoodStage, PatchExpanding, PatchMerging, PatchTokenizer


class VolumeUNet(nn.Module):
    """Logits `[B, classes, D, H, W]` of volumes `[B, channels, D, H, W]` of any size."""

    def __init__(
        self,
        channels: int = 1,
        classes: int = 2,
        dim: int = 24,
        depths: Sequence[int] = (1, 1, 2),
        heads: Sequence[int] = (2, 4, 8),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        strides: Sequence[tuple[int, int, int]] = ((1, 2, 2), (2, 2, 2)),
    ) -> None:
        super().__init__()
        self.patch_size, self.classes = patch_size, classes
        self.tokens = PatchTokenizer(channels, dim, patch_size, rank=3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = [dim * 2**i for i in range(len(depths))]
        window = {"kernel_size": ((3, 5, 5),) * max(depths), "rank": 3, "rotary": True, "pad": True}

        def stage(i: int, downsample: nn.Module | None = None) -> NeighborhoodStage:
            arguments = {**window, "kernel_size": window["kernel_size"][: depths[i]]}
            return NeighborhoodStage(
                widths[i], depths[i], heads[i], downsample=downsample, **arguments
            )

        for i in range(len(depths)):
            merging = PatchMerging(widths[i - 1], rank=3, strides=strides[i - 1]) if i else None
            self.down.append(stage(i, merging))
        for i in reversed(range(len(depths) - 1)):
            expanding = PatchExpanding(widths[i + 1], rank=3, strides=strides[i])
            join = nn.Linear(2 * widths[i], widths[i])
            self.up.append(nn.ModuleList([expanding, join, stage(i)]))
        self.head = PatchExpanding(dim, classes, rank=3, strides=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        extent = list(x.shape[2:])
        x, skipped = self.tokens(x), []
        for stage in self.down:
            x = stage(x)
            skipped.append(x)
        skipped.pop()
        for expanding, join, stage in self.up:
            skip = skipped.pop()
            x = expanding(x, list(skip.shape[1:-1]))
            x = stage(join(torch.cat([x, skip], -1)))
        return self.head(x, extent).movedim(-1, 1)


def volumes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy volumes `[count, 1, size / 2, size, size]` and their labels; every second slice."""
    blobs = [
        torch.from_numpy(binary_blobs(size, blob_size_fraction=0.3, n_dim=3, rng=seed + i)[::2])
        for i in range(count)
    ]
    labels = torch.stack(blobs).long()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(labels.shape, generator=generator)
    return (labels + 0.8 * noise - 0.5)[:, None], labels


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dim", type=int, default=24)
    parser.add_argument("--size", type=int, default=29, help="rows and columns; odd ones are fine")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = VolumeUNet(dim=options.dim)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(options.steps):
        x, y = volumes(2, options.size, 1000 + 2 * step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = volumes(2, options.size, 0)
    with torch.no_grad():
        found = model.eval()(x).argmax(1)
    result = {
        "right": (found == y).float().mean().item(),
        "right_by_threshold": ((x[:, 0] > 0).long() == y).float().mean().item(),
    }
    print(result)
    return result


if __name__ == "__main__":
    main()
