"""Modules and models over sharded grids and heads, against one process."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import distributed_module_checks as checks
import forks
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_video_context_parallel.py"


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    """A group of each size, started when it is first used."""
    groups = {world: Ranks(world, "distributed_module_checks") for world in (2, 3, 4)}
    yield groups
    for group in groups.values():
        group.stop()


@pytest.mark.parametrize("in_context", [False, True], ids=["style", "context"])
@pytest.mark.parametrize("name", checks.MODULES)
def test_attention_modules(ranks, name, in_context):
    ranks[3].run("attention_module", name, in_context)


@pytest.mark.parametrize("name", checks.HEADS)
def test_head_parallel(ranks, name):
    ranks[2].run("head_parallel", name)


@pytest.mark.parametrize(
    "check",
    [
        "context_parallel_functions",
        "cross_attention",
        "head_parallel_cross_attention",
        "masked",
        "refuses_modules",
        "registers",
        "video_nat",
        "wrong_plans_raise",
    ],
)
def test_of_two(ranks, check):
    ranks[2].run(check)


@pytest.mark.parametrize("check", ["cross_attention", "registers", "video_nat"])
def test_of_three(ranks, check):
    ranks[3].run(check)


def test_heads_and_tokens(ranks):
    ranks[4].run("heads_and_tokens")


@pytest.mark.slow
def test_video_denoiser_compiles(ranks):
    ranks[2].run("video_denoiser", "compile")


@pytest.mark.parametrize("how", ["plain", "checkpointing", "amp", "ddp", "fsdp and checkpointing"])
def test_video_denoiser(ranks, how):
    ranks[2].run("video_denoiser", how)


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp and checkpointing"])
def test_video_denoiser_over_tokens_and_batch(ranks, how):
    ranks[4].run("video_denoiser", how)


def _started(world: int, options: list[str], folder: Path) -> str:
    """What the example prints, started as its users do."""
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(world), str(EXAMPLE), *options,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def _rank(rank: int, world: int, port: int, options: list[str], output: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
        # Whoever started them has the store.
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_ATTEMPT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    sys.argv = [str(EXAMPLE), *options]
    with Path(output if rank == 0 else os.devnull).open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def _forked(world: int, options: list[str], folder: Path) -> str:
    """Likewise, in processes that need not import what takes longer than the example."""
    output = folder / "output"
    # At a port that was free when it began to listen: one that is looked for may be taken before.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        _rank, (world, store.port, options, output), world,
        start_method=forks.FORKS.get_start_method(),
    )  # fmt: skip
    return output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "world", "options"),
    [
        (_started, 2, ["--mesh", "1,1,2"]),
        (_forked, 4, ["--mesh", "2,1,2", "--fsdp", "--checkpointing"]),
    ],
)
def test_example_trains_as_one_process_does(run, world, options, tmp_path):
    output = run(world, ["--compare", *options], tmp_path)
    losses = re.findall(r"loss (\S+), one process (\S+)", output)
    assert len(losses) == 3
    for loss, alone in losses:
        assert float(loss) == pytest.approx(float(alone), abs=2e-6)
    assert float(losses[0][0]) != float(losses[2][0])
