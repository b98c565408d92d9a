"""numba's disk cache, whatever its state: results are right, and a warning names the file once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("numba")

CALL = """
    import sys, torch
    from natten import na2d
    torch.manual_seed(0)
    def check(dtype):
        x = torch.randn(1, 6, 7, 2, 8, dtype=dtype)
        out, exact = (na2d(x, x, x, 3, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(out, exact, rtol=0.01, atol=0.01)
    for name in sys.argv[1:]:
        check(getattr(torch, name))
"""


def start(cache, *dtypes, code=CALL):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *dtypes],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout + stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A cache that holds the forward loop of float32."""
    cache = tmp_path_factory.mktemp("good")
    assert "cache" not in finish(start(cache, "float32"))
    assert len(list(cache.rglob("*.nbc"))) == 1
    return cache


def empty(file):
    file.write_bytes(b"")


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


def garbage(file):
    file.write_bytes(os.urandom(4000))


def flip_a_bit(file):
    """In the middle of the machine code, where unpickling does not notice."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def lock(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (truncate, "*.nbc"),
        (flip_a_bit, "*.nbc"),
        (garbage, "*.nbi"),
        *(
            pytest.param(damage, pattern, marks=pytest.mark.slow)
            for damage, pattern in (
                (empty, "*.nbc"), (garbage, "*.nbc"), (lock, "*.nbc"),
                (empty, "*.nbi"), (truncate, "*.nbi"), (lock, "*.nbi"),
            )
        ),
    ],
)  # fmt: skip
def test_damaged_files(damage, pattern, good, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(good, cache)
    (file,) = cache.rglob(pattern)
    damage(file)
    said = finish(start(cache, "float32"))
    assert said.count("numba's cache") == 1
    # A data file that cannot be opened counts as missing, and then cannot be replaced.
    named = file.parent if damage is lock and pattern == "*.nbc" else file
    assert str(named) in said
    if damage is not lock:
        # What was damaged has been written anew.
        assert "cache" not in finish(start(cache, "float32"))


@pytest.mark.slow
def test_damage_while_a_process_runs(good, tmp_path):
    """Loops of another type are looked for when they are first needed."""
    cache = tmp_path / "cache"
    shutil.copytree(good, cache)
    code = textwrap.dedent(CALL) + textwrap.dedent(
        """
        import os, pathlib
        for file in pathlib.Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbi"):
            file.write_bytes(b"nonsense")
        check(torch.float64)
        check(torch.float32)
        """
    )
    said = finish(start(cache, "float32", code=code))
    assert said.count("numba's cache") == 1
    assert ".nbi" in said


def test_full_disk(tmp_path):
    """Nothing can be written, though the folder looks as if it could."""
    code = """
        import errno, numba.core.caching as caching
        def full(self, name, data):
            raise OSError(errno.ENOSPC, "No space left on device")
        caching.IndexDataCacheFile._save_data = full
    """
    said = finish(start(tmp_path, "float32", code=textwrap.dedent(code) + textwrap.dedent(CALL)))
    assert said.count("numba's cache") == 1
    assert "No space left" in said


@pytest.mark.slow
def test_code_of_another_signature_is_not_run(good, tmp_path):
    """As two processes may leave it that chose one file at the same time."""
    cache = tmp_path / "cache"
    shutil.copytree(good, cache)
    finish(start(cache, "float64"))
    for first in cache.rglob("*.1.nbc"):
        second = first.with_name(first.name.replace(".1.nbc", ".2.nbc"))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    said = finish(start(cache, "float32", "float64"))
    assert said.count("numba's cache") == 1
    assert "another" in said


@pytest.mark.slow
def test_many_processes_at_once(tmp_path):
    """They compile into one empty cache; then all find whole loops in it, or none."""
    for _ in range(2):
        processes = [
            start(tmp_path, *dtypes)
            for dtypes in (("float32",), ("float64",), ("bfloat16", "float32"), ("float64",))
        ]
        for process in processes:
            finish(process)
    assert not list(tmp_path.rglob("*.tmp.*"))
