"""The notebooks: every script runs, and its twin is the same with stored outputs."""

from __future__ import annotations

import json
import os
import runpy
import warnings
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import forks
import pytest
import torch

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
# What each needs besides natten and its dependencies: module, and the package it comes in.
NEEDS = {
    "1_neighborhoods": {"matplotlib": "matplotlib", "sklearn": "scikit-learn"},
    "2_backends": {"matplotlib": "matplotlib", "numba": "numba"},
    "3_train": {"matplotlib": "matplotlib", "mlxtend": "mlxtend"},
    "4_pretrained": {"matplotlib": "matplotlib", "mlxtend": "mlxtend", "sklearn": "scikit-learn"},
    "5_video": {"matplotlib": "matplotlib", "skvideo": "sk-video", "av": "av"},
    "6_diffusion": {"matplotlib": "matplotlib", "mlxtend": "mlxtend"},
    "7_older_code": {},
}
WEIGHTS = NOTEBOOKS.parent / "models" / "weights" / "dinat_pico.mnist5k.safetensors"
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def skip_without_weights(script: Path) -> None:
    if script.stem == "4_pretrained" and not WEIGHTS.is_file():
        pytest.skip(f"needs weights that are not in the package: {WEIGHTS.name}")


def cells_of(script: Path) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    found: list[tuple[str, list[str]]] = []
    for line in script.read_text().splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            kind, lines = found[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [(kind, "\n".join(lines).strip()) for kind, lines in found]


def run(script: Path, folder: Path) -> None:
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with redirect_stdout(None):
        runpy.run_path(str(script), run_name="__main__")


def test_all_are_here():
    assert [path.stem for path in SCRIPTS] == sorted(NEEDS)


@pytest.mark.slow
@each
def test_runs(script, tmp_path):
    skip_without_weights(script)
    for module, package in NEEDS[script.stem].items():
        if find_spec(module) is None:
            pytest.skip(f"needs pip install {package}")
    forks.call(run, script, tmp_path)


@each
def test_reads_well(script):
    cells = cells_of(script)
    kind, first = cells[0]
    assert kind == "markdown"
    assert first.startswith(f"# {script.stem[0]}. ")
    assert "**Goal: " in first
    assert "*Hardware: " in first
    assert cells[-1][0] == "markdown"
    assert "## Exercises" in cells[-1][1]
    for kind, text in cells:
        if kind == "code":
            compile(text, script.name, "exec")
            assert text.strip() not in ("", "pass")


@each
def test_twin_has_outputs(script):
    skip_without_weights(script)
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    stored = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert stored == cells_of(script), "run `make notebooks`"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
