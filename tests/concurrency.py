"""What tests/test_concurrency.py runs in a process of its own, with an empty cache of numba.

Threads make the first calls of the process all at once, then processes that are forks of it, and
others that are not, do the same calls: all get the bits that one thread gets afterwards.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import natten

WINDOWS = (
    dict(kernel_size=3), dict(kernel_size=(3, 5), dilation=(2, 1)), dict(kernel_size=5, stride=2),
    dict(kernel_size=3, is_causal=(True, False)),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
CALLS = [(window, dtype) for window in WINDOWS for dtype in DTYPES]


def results(number: int) -> list[list[float]]:
    """Output and gradients of a call, as numbers, which every process can send."""
    window, dtype = CALLS[number]
    generator = torch.Generator().manual_seed(number)
    query, key, value = (
        torch.randn(1, 9, 11, 2, 8, generator=generator).to(dtype).requires_grad_()
        for _ in range(3)
    )
    out = natten.na2d(query, key, value, backend="cpu", **window)
    gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    return [t.detach().double().flatten().tolist() for t in (out, *gradients)]


def main() -> None:
    torch.set_num_threads(1)
    ready = threading.Barrier(len(CALLS))

    def first(number: int) -> list[list[float]]:
        ready.wait()
        return results(number)

    with ThreadPoolExecutor(len(CALLS)) as threads:
        at_once = list(threads.map(first, range(len(CALLS))))
    expected = [results(number) for number in range(len(CALLS))]
    assert at_once == expected, "threads"
    for method in ("fork", "spawn", "forkserver"):
        if method in multiprocessing.get_all_start_methods():
            with multiprocessing.get_context(method).Pool(2) as pool:
                got = pool.map_async(results, range(len(CALLS)), 1).get(timeout=240)
            assert got == expected, method


if __name__ == "__main__":
    main()
    sys.stdout.write("same bits\n")
