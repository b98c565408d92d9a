"""Host time of warm calls on Triton's backends, on any machine: no kernel is compiled or run.

    python benchmarks/host.py

Tensors are small and on the CPU, so that what takes time is all that happens until a kernel is
handed to Triton's launcher, and torch's work around it. Prints microseconds a call: the fastest of
many short loops, as others use the machine too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import natten
from natten.functional.backends import triton as backends


class _Counter:
    """Stands in for a compiled kernel, and counts launches."""

    packed_metadata = function = None
    count = 0

    def run(self, *arguments: Any) -> None:
        self.count += 1


@contextmanager
def no_kernels() -> Iterator[_Counter]:
    """Inside, Triton's backends take CPU tensors and results are whatever is in memory."""
    kernel = _Counter()

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return kernel

    with ExitStack() as stack:
        for target, name, value in (
            (JITFunction, "run", run),
            (backends, "interpreted", lambda: True),
            (backends.HOPPER, "_has_ping_pong", lambda: True),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            (torch._C, "_cuda_getDevice", lambda: 0),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        yield kernel


def fastest(call: Callable[[], Any], seconds: float, loops: int = 5) -> float:
    """Microseconds a call."""
    for _ in range(20):
        call()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(loops):
            call()
        best = min(best, (time.perf_counter() - start) / loops)
    return best * 1e6


def _tensors(*shape: int, count: int = 3, grad: bool = False) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=torch.half, requires_grad=grad) for _ in range(count))


ONE_PASS = {
    "kernel_schedule": "pp", "backward_q_tile_shape": (64,), "backward_kv_tile_shape": (128,),
}  # fmt: skip
# Calls by what is special about them: operation, shape, what else.
CALLS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "pointers": (natten.na2d, (1, 8, 8, 2, 32), {"kernel_size": 5, "backend": "cutlass-fna"}),
    "descriptors": (natten.na2d, (1, 8, 8, 2, 64), {"kernel_size": 5, "backend": "hopper-fna"}),
    "Gluon": (
        natten.na1d, (1, 256, 1, 128), {"kernel_size": 255, "backend": "hopper-fna", **ONE_PASS},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number")
    options = parser.parse_args()
    print(f"{'':12} {'forward':>8} {'and backward':>13}   launches")
    with no_kernels() as kernel:
        for name, (operation, shape, arguments) in CALLS.items():
            frozen, leaves = _tensors(*shape), _tensors(*shape, grad=True)
            gradient = torch.ones(shape, dtype=torch.half)

            def both(
                operation: Any = operation, leaves: Any = leaves, gradient: Any = gradient,
                arguments: dict[str, Any] = arguments,
            ) -> None:  # fmt: skip
                torch.autograd.grad(operation(*leaves, **arguments), leaves, gradient)

            def forward(
                operation: Any = operation, tensors: Any = frozen,
                arguments: dict[str, Any] = arguments,
            ) -> None:  # fmt: skip
                operation(*tensors, **arguments)

            times = fastest(forward, options.seconds), fastest(both, options.seconds)
            kernel.count = 0
            both()
            print(f"{name:12} {times[0]:8.1f} {times[1]:13.1f} {kernel.count:10d}")


if __name__ == "__main__":
    main()
