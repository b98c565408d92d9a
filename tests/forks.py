"""Processes that are copies of one that has imported what takes seconds, and called nothing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

FORKS: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if FORKS.get_start_method() == "forkserver":
    # There is one such server in a process.
    FORKS.set_forkserver_preload(["numba", "timm", "natten.distributed", "natten.nn"])


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module, or a builtin, returns in a process of its own; or it raises."""
    with ProcessPoolExecutor(1, FORKS) as process:
        return process.submit(function, *arguments).result()
