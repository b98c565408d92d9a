"""A folder from which programs that load NATTEN from the Hugging Face Hub load this library.

The package `kernels` takes folders in place of repositories that the environment variable
LOCAL_KERNELS names: `LOCAL_KERNELS=shi-labs/natten=FOLDER`. It loads the one of
`FOLDER/build/torch-*` that fits the PyTorch that is installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

BACKENDS = ("cpu", "cuda", "rocm")
REPOSITORY = "shi-labs/natten"

_PACKAGE = '''"""The natten that is installed, as a kernel of the Hugging Face Hub."""

from importlib import import_module
from importlib.util import find_spec

import natten
from natten import *


def __getattr__(name):
    if hasattr(natten, name) or find_spec("natten." + name) is None:
        return getattr(natten, name)
    return import_module("natten." + name)
'''


def write_hub_kernel(folder: str | Path) -> Path:
    """Write such a folder, or write its files anew.

    Args:
        folder: Made if it does not exist. Files that are not of a hub kernel are left alone.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: ``folder`` is a file.
        OSError: It cannot be written to.
    """
    root = Path(folder).absolute()
    if root.exists() and not root.is_dir():
        raise ValueError(f"folder must be a folder, and {folder} is a file")
    digest = base64.b64encode(hashlib.sha256(_PACKAGE.encode()).digest()).decode()
    for backend in BACKENDS:
        variant = root / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        (variant / "__init__.py").write_text(_PACKAGE, encoding="utf-8")
        metadata = {
            "name": "natten",
            "id": f"natten_{backend}",
            "version": 1,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {"__init__.py": digest}},
        }
        text = json.dumps(metadata, indent=1) + "\n"
        (variant / "metadata.json").write_text(text, encoding="utf-8")
    return root


__all__ = ["BACKENDS", "REPOSITORY", "write_hub_kernel"]
