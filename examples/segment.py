"""Trains a segmentation head on the dense backbone of a NAT, on a photograph of stained tissue.

    python examples/segment.py --steps 200

The image comes with scikit-image. Its brown stain, found by colour, is the label; the model sees
the gray image alone. The left part trains, the right part measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from skimage import color, data, filters
from torch import Tensor, nn

import natten.models  # noqa: F401, registers the models


class Segmenter(nn.Module):
    """A backbone and a head that adds its maps from the coarsest to the finest."""

    def __init__(self, backbone: nn.Module, classes: int, width: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        channels = backbone.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = [conv(m) for conv, m in zip(self.lateral, self.backbone(image), strict=True)]
        total = maps[-1]
        for finer in reversed(maps[:-1]):
            total = finer + F.interpolate(total, finer.shape[2:], mode="bilinear")
        logits = self.classify(F.gelu(self.smooth(total)))
        return F.interpolate(logits, image.shape[2:], mode="bilinear")


def tissue() -> tuple[Tensor, Tensor]:
    """The gray image [1, 1, H, W] and its labels [1, H, W]."""
    image = data.immunohistochemistry()
    stain = color.rgb2hed(image)[..., 2]
    labels = torch.from_numpy(stain > filters.threshold_otsu(stain)).long()
    gray = torch.from_numpy(color.rgb2gray(image)).float()
    return (gray - gray.mean())[None, None] / gray.std(), labels[None]


def overlap(logits: Tensor, labels: Tensor) -> float:
    """Intersection over union of the stained pixels."""
    found, wanted = logits.argmax(1) == 1, labels == 1
    return ((found & wanted).sum() / (found | wanted).sum().clamp_min(1)).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinat_pico.mnist5k")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--frozen-stages", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    image, labels = tissue()
    backbone = timm.create_model(
        options.model,
        pretrained="." in options.model,
        in_chans=1,
        stem_strides=(2, 2),
        features_only=True,
        feature_cls="dense",
        frozen_stages=options.frozen_stages,
    )
    model = Segmenter(backbone, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.05)
    border, size = image.shape[3] * 3 // 4, options.crop
    for _ in range(options.steps):
        tops = torch.randint(image.shape[2] - size + 1, (4,)).tolist()
        lefts = torch.randint(border - size + 1, (4,)).tolist()
        places = [(slice(t, t + size), slice(l, l + size)) for t, l in zip(tops, lefts)]
        x = torch.cat([image[:, :, rows, columns] for rows, columns in places])
        y = torch.cat([labels[:, rows, columns] for rows, columns in places])
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(image[:, :, :size, border:])
    result = {"loss": loss.item(), "overlap": overlap(right, labels[:, :size, border:])}
    print(result)
    return result


if __name__ == "__main__":
    main()
