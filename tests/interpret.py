"""Run a test script in a process of its own in which Triton interprets kernels, on the CPU.

Triton looks at TRITON_INTERPRET when it is imported, and kernels that it has wrapped before that
stay compiled ones: a process either interprets or compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_interpreted(script: str, name: str, timeout: float = 550.0) -> None:
    """Assert that ``python script name`` succeeds under Triton's interpreter."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
        ),
    }
    done = subprocess.run(
        [sys.executable, script, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, f"{Path(script).name} {name} failed:\n{output}"


def main(checks: dict[str, Callable[[], None]]) -> None:
    """Call the check that the command line names; all of them without a name."""
    for name in sys.argv[1:] or checks:
        checks[name]()
