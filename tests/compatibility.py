"""The suite in fresh environments, with the oldest and the newest of what natten runs on.

    python tests/compatibility.py                    all environments of ENVIRONMENTS
    python tests/compatibility.py oldest -- -k flex   one of them, with arguments for pytest

`make compat`. Environments are made with uv in a temporary folder, one after the other, and
removed: each takes some 5 GB. Their Python must be installed, or be one that uv may download. Exits
with 1 if the tests of one of them fail; one whose Python or packages are not to be had is told and
left out.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = (
    "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "einops", "mlxtend", "setuptools",
    "rich", "tqdm", "matplotlib", "scikit-image", "scikit-learn", "safetensors",
)  # fmt: skip
# name: Python, and what differs from the newest packages. The first is what pyproject.toml names.
ENVIRONMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "oldest": ("3.10", ("torch==2.10.0", "timm==1.0.26", "numba==0.61.0", "numpy<2")),
    "torch-2.11": ("3.12", ("torch==2.11.0", "timm", "numba", "numpy")),
    "newest": ("3.13", ("torch", "timm", "numba", "numpy")),
    "python-3.14": ("3.14", ("torch", "timm", "numba", "numpy")),
}


def run(name: str, uv: str, workers: str, arguments: list[str]) -> bool | None:
    """Whether the tests passed; None where the environment is not to be had."""
    python, packages = ENVIRONMENTS[name]
    with tempfile.TemporaryDirectory(prefix=f"natten-{name}-") as folder:
        interpreter = Path(folder) / "bin" / "python"
        made = (
            [uv, "venv", "--quiet", "--clear", "--python", python, folder],
            [uv, "pip", "install", "--quiet", "--python", interpreter, *packages, *TOOLS],
        )
        for command in made:
            if subprocess.run(command).returncode:
                return None
        # Nothing that this process was started with belongs there.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment |= {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": f"{folder}/numba"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "OMP_NUM_THREADS": "1"}
        environment |= {"NUMBA_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        tests = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers]
        tests += ["--dist", "worksteal"]
        selection = ["-m", "not gpu and not exhaustive and not interpreted", *arguments]
        return subprocess.run([*tests, *selection], cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    parser.add_argument("--workers", default="2", help="processes of pytest (default: 2)")
    own = sys.argv[1:]
    end = own.index("--") if "--" in own else len(own)
    options = parser.parse_args(own[:end])
    unknown = set(options.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"names must be of {', '.join(ENVIRONMENTS)}, got {', '.join(unknown)}")
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        parser.error("uv makes the environments: pip install uv")
    names = options.names or list(ENVIRONMENTS)
    results = {name: run(name, uv, options.workers, own[end + 1 :]) for name in names}
    for name, passed in results.items():
        python, packages = ENVIRONMENTS[name]
        word = {True: "passed", False: "FAILED", None: "not to be had"}[passed]
        print(f"{name:12} {word:14} Python {python}, {', '.join(packages)}")
    return 0 if False not in results.values() and True in results.values() else 1


if __name__ == "__main__":
    sys.exit(main())
