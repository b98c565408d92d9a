"""Triton's fingerprint of itself, remembered from one process to the next.

What Triton calls a compiled kernel in its cache depends on a hash of Triton, which is half a
gigabyte: to read all that took more than half of the first call of a process whose kernels were
compiled already. Whether files have changed, their sizes and times tell as well; one of the times
is that of the last change of any kind, which nobody can set.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import triton
from triton import knobs
from triton.runtime import cache

# Of the package, what goes into the hash, and more.
_FOLDERS = ("_C", "backends", "compiler", "language", "runtime")
_SUFFIXES = (".py", ".so", ".pyd")


def _files() -> list[tuple[str | int, ...]]:
    """Paths, sizes and times."""
    root = os.path.dirname(triton.__file__)
    found: list[tuple[str | int, ...]] = []
    for folder in _FOLDERS:
        for path, _, names in os.walk(os.path.join(root, folder)):
            for name in names:
                if name.endswith(_SUFFIXES):
                    file = os.path.join(path, name)
                    is_now = os.stat(file)
                    times = is_now.st_mtime_ns, is_now.st_ctime_ns
                    found.append((file, is_now.st_size, *times))
    return sorted(found)


def _state() -> str:
    """What changes with any of the files."""
    return sha256(repr((triton.__version__, _files())).encode()).hexdigest()


def _place() -> Path:
    """Where it is kept: beside the kernels, as trustworthy as they are."""
    return Path(knobs.cache.dir) / f"natten-fingerprint-{triton.__version__}"


def _keep(state: str, fingerprint: str) -> None:
    """Write it for processes to come. Where that is not possible, they compute it again."""
    with suppress(OSError):
        place = _place()
        place.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may be reading it, or writing it too.
        part = place.with_name(f"{place.name}-{uuid4()}")
        part.write_text(f"{state} {fingerprint}", encoding="utf-8")
        os.replace(part, place)


def remember() -> None:
    """Have Triton use the fingerprint that an earlier process computed, if it has not changed, and
    else keep the one that it will compute."""
    compute = cache.triton_key
    if compute.cache_info().currsize:
        # That was what takes long.
        return

    @lru_cache
    def fingerprint() -> str:
        state = _state()
        with suppress(OSError, ValueError):
            kept, _, found = _place().read_text(encoding="utf-8").partition(" ")
            if kept == state and found:
                return found
        found = compute()
        _keep(state, found)
        return found

    cache.triton_key = fingerprint


__all__ = ["remember"]
