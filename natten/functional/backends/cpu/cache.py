"""numba's disk cache, which must never be what a call fails by.

numba raises whatever opening, reading or writing its files does: after a crash, on a full disk, or
where somebody else wrote into them, every call would fail until they are removed. Here the loops
are compiled instead, and what is damaged is written anew where that is possible.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numba
from numba.core import serialize, sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache

logger = logging.getLogger("natten")
_warned = False


@cache
def _source_of(module: ModuleType | None) -> bytes:
    """What the loops of a module are compiled from, and by whom."""
    try:
        text = inspect.getsource(module) if module is not None else ""
    except OSError:
        text = ""  # a frozen program has none, and is not upgraded by halves
    # Loops call into each other's files, which numba does not look at.
    shared = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return sha256(b"\n".join([f"{numba.__version__}\n{text}".encode(), *shared])).digest()


# Its name has changed from one numba to another; its place has not.
_UserProvided: Any = CompileResultCacheImpl._locator_classes[0]


class _ReadableFolder(_UserProvided):
    """NUMBA_CACHE_DIR, also where it is there but cannot be written, as in a container."""

    def ensure_cache_path(self) -> None:
        try:
            super().ensure_cache_path()
        except OSError:
            if not os.path.isdir(self.get_cache_path()):
                raise


class _Checked(CompileResultCacheImpl):
    """Compiled code with a checksum and its source: bytes that changed must not run, nor code of
    another version.

    numba writes the index before the code that it names. Whoever is interrupted between them, or
    reads meanwhile, finds the code that an earlier version left under that name.
    """

    _locator_classes: ClassVar = [_ReadableFolder, *CompileResultCacheImpl._locator_classes[1:]]

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        self._source = _source_of(inspect.getmodule(function))

    def reduce(self, cres: Any) -> tuple[bytes, bytes, bytes]:
        data = serialize.dumps(super().reduce(cres))
        return sha256(data).digest(), self._source, data

    def rebuild(self, target_context: Any, payload: tuple[bytes, bytes, bytes]) -> Any:
        """The compiled loop, or None if it is another version's."""
        digest, source, data = payload
        if sha256(data).digest() != digest:
            raise ValueError("its checksum is wrong")
        if source != self._source:
            return None
        return super().rebuild(target_context, pickle.loads(data))


class Cache(FunctionCache):
    """The cache of one compiled loop. Does without where its files cannot be used, and says so
    once in a process."""

    _impl_class = _Checked

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled loop for a signature, or None."""
        try:
            found = super().load_overload(sig, target_context)
            # Two processes that start together may both choose one file for different signatures.
            if found is None or found.signature.args == sigutils.normalize_signature(sig)[0]:
                return found
            error: Exception = ValueError("it holds another function's code")
        except Exception as raised:
            error = raised
        _warn(self._file_of(sig, target_context), error)
        try:
            self.flush()
        except Exception:
            self.disable()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a compiled loop to the disk, if possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(self._cache_file._index_path, error)
            self.disable()

    def _file_of(self, sig: Any, target_context: Any) -> str:
        """The file that holds a signature's loop; the index if that does not say."""
        try:
            key = self._index_key(sig, target_context.codegen())
            return self._cache_file._data_path(self._cache_file._load_index()[key])
        except Exception:
            return self._cache_file._index_path


def _warn(file: str, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "numba's cache cannot be used, so that the CPU kernels are compiled now, in some "
            "seconds: %s: %s: %s",
            file, type(error).__name__, error,
        )  # fmt: skip


__all__ = ["Cache"]
