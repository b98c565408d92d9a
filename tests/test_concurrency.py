"""First calls by many threads, and calls by processes of every kind: the bits of one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")


@pytest.mark.slow
def test_first_calls_at_once_and_processes_of_every_kind(tmp_path: Path) -> None:
    script = Path(__file__).with_name("concurrency.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "numba's cache" not in run.stderr
    assert run.stdout == "same bits\n"
