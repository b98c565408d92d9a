"""Runs tests/test_transformers.py on releases of transformers whose DiNAT works.

    python tests/run_transformers.py [pytest arguments]

Each release is installed once (pip, network) in a folder of its own under `build/`, with those of
its dependencies that it pins, and the environment stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The last release with the heads-first calls and Nat, and one of the later layout.
RELEASES = {
    "4.53.3": ("huggingface_hub==0.36.*", "tokenizers==0.21.*"),
    "5.23.0": (),
}


def install(release: str, pins: tuple[str, ...]) -> Path:
    """The folder that has this release."""
    folder = ROOT / "build" / f"transformers-{release}"
    done = folder / ".installed"
    if not done.is_file():
        sys.stdout.write(f"installing transformers {release} in {folder}\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
        pip += ["--disable-pip-version-check", "--target", str(folder)]
        # What it shares with this environment is not installed again.
        needed = [f"transformers=={release}", *pins, "regex"]
        subprocess.run([*pip, "--no-deps", *needed], check=True)
        shared = ["requests"] if pins else ["tokenizers"]
        subprocess.run([*pip, *shared], check=True)
        done.touch()
    return folder


def main() -> int:
    failures = 0
    for release, pins in RELEASES.items():
        environment = os.environ | {"PYTHONPATH": str(install(release, pins))}
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_transformers.py"]
        run = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, env=environment)
        failures += run.returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main())
