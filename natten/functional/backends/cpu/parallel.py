"""A pool of threads that outlives calls, survives fork, and may be used by many threads at once.

The compiled loops release the GIL and draw pieces of work from a shared counter, so that a plain
Python thread for each core is all they need. Unlike numba's own threading layers, this cannot
abort the process when two threads call it or when a process that used it forks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    # The threads of a pool do not exist in a forked child.
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run(task: Callable[[], None], threads: int) -> None:
    """Run `task` on the calling thread and on up to `threads - 1` others; return when all are done.

    A task must do its share of whatever work is left. It is not called on a thread that gets free
    only after the calling thread is done.
    """
    global _pool
    helpers: list[Future[None]] = []
    if threads > 1:
        if _pool is None:
            workers = max(os.cpu_count() or 1, threads)
            _pool = ThreadPoolExecutor(workers, thread_name_prefix="natten-cpu")
        try:
            helpers = [_pool.submit(task) for _ in range(threads - 1)]
        except RuntimeError:
            # The interpreter is shutting down and starts no more threads.
            helpers = []
    try:
        task()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()
