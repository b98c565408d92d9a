"""Runs timm's own model tests, from its source distribution, on the models of natten.

    python tests/run_timm_suite.py [-m PART_OF_A_NAME ...] [-- pytest arguments]

timm's wheel has no tests, so the source distribution of the installed version is downloaded once
(pip, network) and kept under `build/`. Its `tests/test_models.py` runs unchanged but for one line:
our modules join the list of those that have `forward_intermediates`. Tests that download released
weights are left out; those of the weights in the package run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("nat", "dinat", "dinat_s", "isotropic", "video")
SMALL_MODELS = (
    "nat_pico",
    "dinat_pico",
    "nat_mini",
    "dinat_mini",
    "dinat_s_tiny",
    "dinat_isotropic_small",
    "vitrpb_small",
    "video_nat_pico",
    "video_nat_pico_causal",
)


def fetch(folder: Path) -> Path:
    """Folder of timm's sources, of the version that is installed."""
    release = version("timm")
    sources = folder / f"timm-{release}"
    if not sources.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        requirement = f"timm=={release}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run(
            [*command, "--no-binary", "timm", "--dest", str(folder), requirement], check=True
        )
        with tarfile.open(folder / f"timm-{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return sources


def patched(sources: Path) -> Path:
    """A copy of timm's test file that knows our modules."""
    text = (sources / "tests" / "test_models.py").read_text()
    anchor = "FEAT_INTER_FILTERS = ["
    if text.count(anchor) != 1:
        raise RuntimeError(f"timm's test file has changed: no single {anchor!r}")
    names = ", ".join(repr(name) for name in MODULES)
    copy = sources / "tests" / "test_models_natten.py"
    copy.write_text(text.replace(anchor, f"{anchor}{names}, "))
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--models", nargs="+", default=SMALL_MODELS, metavar="PART_OF_A_NAME")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "timm-suite")
    parser.add_argument("pytest_arguments", nargs="*", help="behind --")
    arguments = parser.parse_args()
    test_file = patched(fetch(arguments.folder))
    selection = " or ".join(arguments.models)
    command = [
        *(sys.executable, "-m", "pytest", "-p", "natten.models", str(test_file)),
        # timm's own settings, which name its markers.
        *("-c", str(test_file.parent.parent / "pyproject.toml"), "-p", "no:cacheprovider", "-q"),
        *("-k", f"({selection}) and (not pretrained or mnist5k or digits)"),
        *arguments.pytest_arguments,
    ]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
