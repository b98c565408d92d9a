"""What a type checker sees of the public functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[1]
# A line that must be an error ends with the code that mypy gives it.
PROGRAM = """
from __future__ import annotations

import torch
import natten
from natten import functional

x = torch.randn(1, 8, 2, 16)
natten.na1d(x, x, x, 3, 2, dilation=2, is_causal=True, return_lse=True)
natten.na1d(x, x, x, 3, strid=2)  # call-arg
natten.na1d(x, x, x)  # call-arg
natten.na1d(x, x, x, "3")  # arg-type

q = torch.randn(1, 8, 8, 2, 16)
natten.na2d(q, q, q, 3, stride=2)
natten.na2d(q, q, q, (3, 5), (1, 2), rpb=None, scale=1.0, backend="reference")
natten.na2d(q, q, q, 3, strid=2)  # call-arg
natten.na2d(q, q, q, 3.0)  # arg-type
natten.na2d(q, q, q, 3, stride=[1, "2"])  # list-item
functional.na2d(q, q, q, 3, causal=True)  # call-arg

v = torch.randn(1, 4, 8, 8, 2, 16)
natten.na3d(v, v, v, (3, 5, 5), is_causal=(True, False, False))
natten.na3d(v, v, v, 3, kernel=3)  # call-arg

natten.attention(x, x, x, is_causal=True)
natten.attention(x, x, x, causal=True)  # call-arg
natten.explain(q, q, q, 3, dilation=2).chosen.upper()
natten.explain(q, q, q, 3, dilatoin=2)  # call-arg
natten.merge_attentions([q, q], [q[..., 0], q[..., 0]])
natten.merge_attentions([q, q], lse=[q[..., 0], q[..., 0]])  # call-arg
"""


@pytest.mark.slow
def test_wrong_calls_are_type_errors_and_right_ones_are_not(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent"),
            *("--config-file", os.devnull, "--no-error-summary", "--hide-error-context"),
            *("--cache-dir", str(tmp_path / "cache"), str(program)),
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = [line for line in run.stdout.splitlines() if ": error:" in line]
    numbered = enumerate(PROGRAM.splitlines(), 1)
    expected = [(n, line.partition("  # ")[2]) for n, line in numbered if "  # " in line]
    assert [
        (int(line.split(":")[1]), line.rpartition("[")[2][:-1]) for line in found
    ] == expected, run.stdout + run.stderr
