"""Processes that run checks together, one a rank: over gloo, or over NCCL with a GPU each. They are
started once for many checks."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import FORKS

TIMEOUT = 60


class Ranks:
    """A group of ranks. They are started at the first check, and after one that failed anew.

    Args:
        world: How many.
        module: Where the checks are: functions of what `run` is given.
        timeout: Seconds of a rank that waits for another.
        device: "cpu" or "cuda"; checks find it in the environment, as RANKS_DEVICE.
    """

    def __init__(
        self, world: int, module: str, timeout: int = TIMEOUT, device: str = "cpu"
    ) -> None:
        self.world, self.module, self.timeout, self.device = world, module, timeout, device
        self._members: list[tuple[Any, Any]] = []

    def run(self, check: str, *arguments: Any) -> None:
        """Run a check on all ranks; AssertionError with what any of them raised."""
        results = self.try_run(check, *arguments)
        if any(results):
            self.stop()
            failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(results) if text]
            raise AssertionError("\n".join(failed))

    def try_run(self, check: str, *arguments: Any) -> list[str | None]:
        """What each rank raised, or None. A rank that died raised "died"."""
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send((check, arguments))
        results: list[str | None] = []
        for _, pipe in self._members:
            try:
                results.append(pipe.recv() if pipe.poll(2 * self.timeout) else "hangs")
            except EOFError:
                results.append("died")
        return results

    def stop(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
            process.join()
        self._members = []

    def _start(self) -> None:
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.world):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(
                target=_serve,
                args=(rank, self.world, store, self.module, self.timeout, self.device, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))


def _serve(
    rank: int, world: int, store: str, module: str, timeout: int, device: str, pipe: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ["RANKS_DEVICE"] = device
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    checks = importlib.import_module(module)
    while True:
        try:
            check, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        torch.manual_seed(0)
        try:
            getattr(checks, check)(*arguments)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
