"""numba's disk cache, whatever its state: results are right, and a warning names the file once.

Most tests compile a loop of one line, since the cache is the same for all loops; the last one
damages the kernels' own.
"""

from __future__ import annotations

import errno
import importlib.util
import linecache
import logging
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import forks
import numpy as np
import pytest

numba = pytest.importorskip("numba")

from numba.core import caching  # noqa: E402

from natten.functional.backends.cpu import cache, vectors  # noqa: E402


def affine(x):
    for i in range(len(x)):
        x[i] = 2 * x[i] + 1


def check(loop, dtype):
    x = np.arange(5, dtype=dtype)
    loop(x)
    assert x.dtype == dtype
    assert x.tolist() == [1, 3, 5, 7, 9]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes the loop that a new process has: nothing is compiled, and nothing was said."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def start():
        monkeypatch.setattr(cache, "_warned", False)
        return vectors.entry(affine)

    return start


@pytest.fixture
def said(caplog):
    """The warnings since the last call."""
    caplog.set_level(logging.WARNING, logger="natten")

    def said():
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return texts

    return said


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
        *((damage, "*.nbc") for damage in (empty, truncate, garbage, flip_a_bit, lock)),
        *((damage, "*.nbi") for damage in (empty, truncate, garbage, lock)),
    ],
)
def test_damaged_files(damage, pattern, start, said, tmp_path):
    check(start(), "float32")
    assert said() == []
    (file,) = tmp_path.rglob(pattern)
    damage(file)
    check(start(), "float32")
    (text,) = said()
    assert "numba's cache" in text
    # A data file that cannot be opened counts as missing, and then cannot be replaced.
    named = file.parent if damage is lock and pattern == "*.nbc" else file
    assert str(named) in text
    if damage is not lock:
        # What was damaged has been written anew.
        loop = start()
        check(loop, "float32")
        assert said() == []
        assert loop.stats.cache_hits


def test_damage_while_a_process_runs(start, said, tmp_path):
    """Loops of another type are looked for when they are first needed."""
    check(start(), "float32")
    loop = start()
    check(loop, "float32")
    (file,) = tmp_path.rglob("*.nbi")
    file.write_bytes(b"nonsense")
    check(loop, "float64")
    check(loop, "float32")
    (text,) = said()
    assert str(file) in text


def test_full_disk(start, said, monkeypatch):
    """Nothing can be written, though the folder looks as if it could."""

    def full(self, name, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    check(start(), "float32")
    (text,) = said()
    assert "No space left" in text


@contextmanager
def disk(folder, **options):
    """A file system of its own, in memory; only root has one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if subprocess.run([*mount, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_disk_that_is_full(start, said, tmp_path, monkeypatch):
    """A real one: whatever numba writes last is cut off."""
    for free in (0, 4096, 8192):
        with disk(tmp_path / str(free), size="64k") as folder:
            monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
            stuffing = folder / "stuffing"
            loop = start()  # makes the folder
            stuffing.write_bytes(bytes(os.statvfs(folder).f_bavail * 4096 - free))
            check(loop, "float32")
            (text,) = said()
            assert "No space left" in text
            assert not list(folder.rglob("*.tmp.*"))
            stuffing.unlink()
            check(start(), "float32")
            assert said() == []
            loop = start()
            check(loop, "float32")
            assert loop.stats.cache_hits


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_folder_that_can_only_be_read(start, said, tmp_path, monkeypatch):
    """As in a container: what is in it is used, and what is missing is compiled."""
    with disk(tmp_path / "disk", size="256k") as folder:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
        check(start(), "float32")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        loop = start()
        check(loop, "float32")
        assert loop.stats.cache_hits
        assert said() == []
        check(loop, "float64")
        (text,) = said()
        assert "Read-only file system" in text
        assert str(folder) in text


def module_of(path, factor):
    """A module with a loop, all versions of which have the same size and age."""
    path.write_text(f"def scale(x):\n    for i in range(len(x)):\n        x[i] *= {factor}\n")
    os.utime(path, (1, 1))
    linecache.clearcache()  # of a new process
    spec = importlib.util.spec_from_file_location("scaling", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scale(start, tmp_path, monkeypatch):
    """By what the loop of a new process multiplies, after the file has been written anew."""
    monkeypatch.setitem(sys.modules, "scaling", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def scale(factor):
        x = np.ones(3)
        vectors.entry(module_of(tmp_path / "scaling.py", factor).scale)(x)
        return x.tolist()

    return scale


def test_upgraded_in_place(scale, said):
    for factor in (2, 3, 2):
        assert scale(factor) == 3 * [factor]
    assert said() == []


def test_upgrade_that_was_interrupted(scale, said, tmp_path, monkeypatch):
    """The index is of the new version, and the code that it names of the old one."""
    assert scale(2) == [2, 2, 2]

    def interrupted(self, name, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_save_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scale(3)
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
    assert scale(3) == [3, 3, 3]
    assert scale(3) == [3, 3, 3]
    assert said() == []


def test_no_folder_can_be_written(start, said, monkeypatch):
    """numba has no cache to offer then, and loops are compiled in every process."""

    def refuse(*arguments, **more):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(caching.FunctionCache, "__init__", refuse)
    loop = start()
    check(loop, "float32")
    assert not loop.stats.cache_path
    assert said() == []


def test_code_of_another_signature_is_not_run(start, said, tmp_path):
    """As two processes may leave it that chose one file at the same time."""
    loop = start()
    check(loop, "float32")
    check(loop, "float64")
    first, second = tmp_path.rglob("*.nbc")
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    loop = start()
    check(loop, "float32")
    check(loop, "float64")
    (text,) = said()
    assert "another" in text


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout + stderr


def race(folders: Connection, dtypes: list[str]) -> None:
    """Fills or reads the cache of each folder that it is sent."""
    while folder := folders.recv():
        numba.config.CACHE_DIR = folder
        loop = vectors.entry(affine)
        for dtype in dtypes:
            check(loop, dtype)
        folders.send("done")


@pytest.mark.slow
def test_many_processes_at_once(tmp_path):
    """They compile into one empty cache; then all find whole loops in it, or none."""
    processes = []
    for dtypes in (["float32"], ["float64"], ["int64", "float32"], ["float64"]):
        ours, theirs = forks.FORKS.Pipe()
        processes.append((forks.FORKS.Process(target=race, args=(theirs, dtypes)), ours))
        processes[-1][0].start()
        theirs.close()
    for number in range(20):
        # Each folder is empty at first, and full the second time.
        for _, pipe in processes:
            pipe.send(str(tmp_path / str(number // 2)))
        for _, pipe in processes:
            assert pipe.recv() == "done"
    for process, pipe in processes:
        pipe.send("")
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.rglob("*.nbi"))) == 10
    assert not list(tmp_path.rglob("*.tmp.*"))


INTERRUPTED = """
    import random, signal, sys, time, numba
    from natten.functional.backends.cpu import cache, vectors
    from test_numba_cache import affine, check
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    random.seed(0)
    def start(folder):
        numba.config.CACHE_DIR = f"{sys.argv[1]}/{folder}"
        return vectors.entry(affine)
    check(start("first"), "float32")  # what numba prepares once in a process
    began = time.perf_counter()
    check(start("timed"), "float32")
    seconds, interrupted = time.perf_counter() - began, 0
    for number in range(15):
        loop = start(number)
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0, seconds))
            check(loop, "float32")
            time.sleep(seconds)
        except KeyboardInterrupt:
            interrupted += 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        check(loop, "float32")
        check(start(number), "float32")
        assert not cache._warned, number
    print(interrupted)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_interrupted_at_any_moment(tmp_path):
    """As by Ctrl-C: what is on the disk is right, or not there, and so is the loop in memory."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert int(stdout) > 10


# --- a loop of the kernels, in processes of their own

CALL = """
    import torch
    from natten import na2d
    torch.manual_seed(0)
    x = torch.randn(1, 6, 7, 2, 8)
    out, exact = (na2d(x, x, x, 3, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(out, exact, rtol=0.01, atol=0.01)
"""


def call(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CALL)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return finish(process)


def test_damaged_file_of_the_kernels(tmp_path):
    assert "cache" not in call(tmp_path)
    (file,) = tmp_path.rglob("*.nbc")
    flip_a_bit(file)
    output = call(tmp_path)
    assert output.count("numba's cache") == 1
    assert str(file) in output
    # What was damaged has been written anew.
    assert "cache" not in call(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_interrupted_while_the_kernels_are_compiled(tmp_path):
    """Ctrl-C, or the end of a process, while it fills the cache; the next one finds no fault."""
    random = np.random.default_rng(0)
    # Processes in the background of a shell ignore it, and so do theirs.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    for number in range(20):
        folder = tmp_path / str(number // 4)  # some of it is there
        process = subprocess.Popen(
            [sys.executable, "-c", heeds + textwrap.dedent(CALL)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            process.communicate(timeout=random.uniform(2, 20))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if number % 2 else signal.SIGKILL)
            process.communicate()
        if number % 4 == 3:
            assert "cache" not in call(folder)
