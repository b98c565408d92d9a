"""Runs tests/test_hub_kernel.py with kernels, diffusers and transformers.

    python tests/run_hub_kernel.py [pytest arguments]

They are installed once (pip, network) in a folder under `build/`, and the environment stays as it
is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Without what they share with this environment: PyTorch, numpy and the Hub's client.
PACKAGES = ("kernels==0.17.*", "diffusers==0.42.*", "transformers==5.23.*")
DEPENDENCIES = (
    "sigstore", "tomli", "tomlkit", "tokenizers", "regex", "requests", "importlib_metadata"
)  # fmt: skip


def main() -> int:
    folder = ROOT / "build" / "hub-kernel"
    done = folder / ".installed"
    if not done.is_file():
        sys.stdout.write(f"installing {', '.join(PACKAGES)} in {folder}\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
        pip += ["--disable-pip-version-check", "--target", str(folder)]
        subprocess.run([*pip, "--no-deps", *PACKAGES], check=True)
        subprocess.run([*pip, *DEPENDENCIES], check=True)
        done.touch()
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_hub_kernel.py", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
