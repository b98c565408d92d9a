"""Triton's hash of itself, which is remembered from one process to the next."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import cache

from natten.functional.backends.triton import fingerprint


class Triton:
    """Its files and function in place of the real ones."""

    def __init__(self, folder: Path) -> None:
        self.package, self.computed = folder, 0
        for name in ("__init__.py", "_C/libtriton.so", "language/core.py", "language/a/b.py"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text(name)
        self.__file__, self.__version__ = str(folder / "__init__.py"), "3.14"

    def start(self) -> str:
        """What a new process gets, twice."""

        @lru_cache
        def compute() -> str:
            self.computed += 1
            return f"hash {self.computed}"

        cache.triton_key = compute
        fingerprint.remember()
        assert cache.triton_key() == cache.triton_key()
        return cache.triton_key()


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Triton:
    found = Triton(tmp_path / "triton")
    monkeypatch.setattr(fingerprint, "triton", found)
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "not there yet" / "cache"))
    return found


def test_it_is_computed_once(triton: Triton) -> None:
    assert [triton.start() for _ in range(3)] == ["hash 1"] * 3
    (kept,) = Path(knobs.cache.dir).iterdir()
    assert kept.name == "natten-fingerprint-3.14"


@pytest.mark.parametrize("name", ["_C/libtriton.so", "language/core.py", "language/a/b.py"])
@pytest.mark.parametrize("what", ["content", "size", "time", "gone", "new"])
def test_changes_are_seen(triton: Triton, name: str, what: str) -> None:
    assert triton.start() == "hash 1"
    path = triton.package / name
    if what in ("content", "size"):
        before = path.stat()
        # File systems note times a few times in a hundredth of a second.
        time.sleep(0.02)
        path.write_text(name.upper() if what == "content" else name + " ")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif what == "gone":
        path.unlink()
    else:
        path.with_name("more.py").touch()
    assert triton.start() == "hash 2"
    assert triton.start() == "hash 2"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"something else", None])
def test_what_is_unreadable_is_computed_again(triton: Triton, content: bytes | None) -> None:
    triton.start()
    (kept,) = Path(knobs.cache.dir).iterdir()
    if content is None:
        content = kept.read_bytes().partition(b" ")[0]
    kept.write_bytes(content)
    assert [triton.start() for _ in range(2)] == ["hash 2"] * 2


def test_without_a_place_to_keep_it(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(knobs.cache.dir).parent.mkdir()
    Path(knobs.cache.dir).write_text("a file")
    assert [triton.start() for _ in range(2)] == ["hash 1", "hash 2"]


def test_what_was_computed_already_stays(triton: Triton) -> None:
    cache.triton_key = computed = lru_cache(lambda: "hash")
    computed()
    fingerprint.remember()
    assert cache.triton_key is computed


def test_it_is_the_one_that_triton_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Triton as it is here, and changes with every file that is read for it."""
    spec = spec_from_file_location("triton.runtime.another", cache.__file__)
    another = module_from_spec(spec)
    spec.loader.exec_module(another)
    read = set()

    def watched(file, mode):
        read.add(os.path.realpath(file))
        return open(file, mode)

    another.open = watched
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(cache, "triton_key", another.triton_key)
    fingerprint.remember()
    computed = cache.triton_key()
    assert computed == another.triton_key()
    assert len(read) > 20
    assert read <= {os.path.realpath(path) for path, *_ in fingerprint._files()}
    cache.triton_key = lru_cache(lambda: pytest.fail("computed again"))
    fingerprint.remember()
    assert cache.triton_key() == computed
