"""Attention over sharded grids on several GPUs, over NCCL: bfloat16 kernels against float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> Iterator[Ranks]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    group = Ranks(request.param, "distributed_checks", timeout=240, device="cuda")
    yield group
    group.stop()


@pytest.mark.parametrize(
    "check",
    [
        "agreement_without_a_cpu_backend",
        "is_deterministic",
        "compiles_with_inductor",
        "mismatches_on_gpus",
        "takes_little_memory",
    ],
)
def test_of_gpus(ranks, check):
    ranks.run(check)


@pytest.mark.parametrize("first", [0, 100, 200])
def test_random_problems(ranks, first):
    ranks.run("random_problems", first, 8, "bfloat16")


@pytest.mark.parametrize("options", [["--mesh", "1,1,-1"], ["--mesh", "1,2,-1", "--fsdp"]])
def test_example_trains_as_one_process_does(options):
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
            str(torch.cuda.device_count()),
            str(ROOT / "examples" / "train_video_context_parallel.py"), "--compare", "--dim", "64",
            *options,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = re.findall(r"loss (\S+), one process (\S+)", run.stdout)
    assert len(losses) == 3
    for loss, alone in losses:
        # float32 products in TF32, in another order.
        assert float(loss) == pytest.approx(float(alone), rel=2e-3)
