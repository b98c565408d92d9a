"""Host time of warm calls on Triton's backends: microseconds, the fastest of many short loops.

    python benchmarks/host.py          # on any machine: no kernel is compiled or launched
    python benchmarks/host.py --gpu    # on a GPU, beside torch's own attention

Without a GPU, tensors are small and on the CPU, and what takes time is all that happens until the
driver is asked to launch a kernel, and torch's work around it; processor time, as others use the
machine too. Calls from scratch are the second of their kind, which nothing is recorded of yet;
others do again what was recorded.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.jit import JITFunction

import natten
from natten import devices
from natten.functional import known, operators
from natten.functional.backends import triton as backends
from natten.functional.backends.triton import replay


def _type(argument: Any) -> Any:
    """Triton's name of an argument's type, as far as launches depend on it."""
    if isinstance(argument, torch.Tensor):
        return "*fp16"
    if isinstance(argument, tuple):
        return tuple(map(_type, argument))
    if hasattr(argument, "base"):
        return "tensordesc"
    return {int: "i32", float: "fp32"}.get(type(argument), "constexpr")


class _Kernel:
    """Stands in for a compiled kernel, and counts launches."""

    packed_metadata, function, name, count = None, 0, "kernel", 0
    metadata = SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
        profile_scratch_size=0, num_warps=4, shared=0,
    )  # fmt: skip

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.src = SimpleNamespace(signature=dict(enumerate(map(_type, arguments))))

    def run(self, *arguments: Any) -> None:
        _Kernel.count += 1


def _compiled(
    self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any
) -> _Kernel:
    return _Kernel(arguments)


def _from_scratch(self: known.Known, tensors: Any) -> Any:
    return self.compute(tensors)


@contextmanager
def faked(recorded: bool) -> Iterator[None]:
    """Inside, Triton's backends take CPU tensors for those of an H100, and results are whatever is
    in memory."""
    make_call = operators.make_call

    def on_gpu(*arguments: Any) -> Any:
        call = make_call(*arguments)
        return replace(call, problem=replace(call.problem, device=torch.device("cuda")))

    # A function of C that does nothing but return 0, as the driver's does: for a function's handle
    # of 0 that is what it finds of the address before it.
    launch = ctypes.CDLL(None).pthread_equal
    fakes = [
        (JITFunction, "run", _compiled),
        (operators, "make_call", on_gpu),
        (backends._Backend, "record", lambda self, *call: replay.record(*call)),
        (backends._Backend, "_compile_backward", lambda *_: None),
        (replay, "_driver", lambda: launch),
        (replay, "empty_cuda", torch._C._dynamo.guards._empty_strided_cpu),
        # Functions of C here too: there are none of the device's number and stream.
        (torch._C, "_cuda_getDevice", [].clear),
        (torch._C, "_cuda_getCurrentRawStream", [].count),
    ]
    if not recorded:
        fakes.append((known.Known, "run", _from_scratch))
    operators.forget()
    with ExitStack() as stack:
        for target, name, value in fakes:
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(devices.pretending(devices.find("h100")))
        yield
    operators.forget()


def fastest(
    call: Callable[[], Any],
    seconds: float,
    clock: Callable[[], float] = time.thread_time,
    loops: int = 20,
) -> float:
    """Microseconds a call."""
    on_gpu = clock is time.perf_counter
    for _ in range(20):
        call()
    best, stop = float("inf"), time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < stop:
        if on_gpu:
            # So that no call waits for a place in the driver's queue.
            torch.cuda.synchronize()
        start = clock()
        for _ in range(loops):
            call()
        best = min(best, (clock() - start) / loops)
    gc.enable()
    return best * 1e6


ONE_PASS = {
    "kernel_schedule": "pp", "backward_q_tile_shape": (64,), "backward_kv_tile_shape": (128,),
}  # fmt: skip
# Calls by what is special about them: operation, shape, what else.
CALLS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "pointers": (natten.na2d, (1, 8, 8, 2, 32), {"kernel_size": 5, "backend": "cutlass-fna"}),
    # Not in one pass, which fills memory with zeros: that takes a processor long.
    "descriptors": (
        natten.na2d, (1, 128, 128, 1, 64),
        {"kernel_size": 120, "kernel_schedule": "non", "backward_kv_splits": (1, 1)},
    ),
    "Gluon": (
        natten.na1d, (1, 256, 1, 128), {"kernel_size": 255, "backend": "hopper-fna", **ONE_PASS},
    ),
}  # fmt: skip


def passes(operation: Callable[..., Any], leaves: list[torch.Tensor]) -> list[Callable[[], Any]]:
    """A call without gradients, one that may have them, and one with its backward pass."""
    frozen = [leaf.detach() for leaf in leaves]
    gradient = torch.ones_like(operation(*frozen))

    def both() -> None:
        torch.autograd.grad(operation(*leaves), leaves, gradient)

    return [lambda: operation(*frozen), lambda: operation(*leaves), both]


def leaves(shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    """Query, key and value."""
    return [
        torch.zeros(shape, dtype=torch.half, device=device, requires_grad=True) for _ in range(3)
    ]


def _row(name: str, times: list[float], more: str = "") -> None:
    print(f"{name:26}", *[f"{t:13.1f}" for t in times], more)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number")
    parser.add_argument("--gpu", action="store_true", help="launch kernels, beside torch's")
    options = parser.parse_args()
    print(f"{'':26} {'forward':>13} {'for gradients':>13} {'and backward':>13}")
    if options.gpu:
        clock = time.perf_counter
        grid = leaves((1, 8, 8, 2, 32), "cuda")
        heads_first = leaves((1, 2, 64, 32), "cuda")
        for name, operation, tensors in (
            ("na2d", lambda *qkv: natten.na2d(*qkv, 5), grid),
            ("torch", scaled_dot_product_attention, heads_first),
        ) * 2:
            _row(name, [fastest(c, options.seconds, clock) for c in passes(operation, tensors)])
        return
    for name, (operation, shape, arguments) in CALLS.items():
        for recorded in (False, True):
            with faked(recorded):
                calls = passes(
                    lambda *qkv, o=operation, a=arguments: o(*qkv, **a), leaves(shape, "cpu")
                )
                times = [fastest(call, options.seconds) for call in calls]
                _Kernel.count = 0
                calls[-1]()
            what = "again" if recorded else "from scratch"
            _row(f"{name}, {what}", times, "" if recorded else f"{_Kernel.count:3d} launches")


if __name__ == "__main__":
    main()
