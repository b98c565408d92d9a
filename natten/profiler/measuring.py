"""Times, operations and memory of a call, on a GPU or on the CPU; and what the device can reach."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

# What kernels and operators are called by those who wrote them, and what they do.
_OURS, _EXTRA, _MEMORY, _OTHER = "natten", "additional pass", "memory", "other"
_NAMES: tuple[tuple[str, str, str], ...] = (
    # The longer of two names that one pattern matches comes first.
    (r"hopper_gradients_kernel", "gradients of queries, keys and values", _OURS),
    (r"key_value_gradient_kernel", "gradients of keys and values", _OURS),
    (r"query_gradient_kernel", "gradient of queries", _OURS),
    (r"(\b|hopper_)forward_kernel|hopper_float8_kernel", "attention, forward", _OURS),
    (r"bias_gradient_kernel", "sum of the bias gradient", _EXTRA),
    (r"bias_table_kernel", "table of biases", _EXTRA),
    (r"statistics_kernel", "row sums for the backward pass", _EXTRA),
    (r"merge_kernel", "shares of keys joined", _EXTRA),
    (r"longest_kernel", "lengths of queries and keys", _EXTRA),
    (r"natten::(neighborhood|packed)_attention_backward", "attention, backward", _OURS),
    (r"natten::(neighborhood|packed)_attention$", "attention, forward", _OURS),
    (r"cudnn.*(sdpa|flash|fprop|bprop)|_cudnn_attention", "cuDNN attention", _OTHER),
    (r"flash_(bwd|backward)|_flash_attention.*backward", "FlashAttention, backward", _OTHER),
    (r"flash_(fwd|forward)|_flash_attention", "FlashAttention, forward", _OTHER),
    (r"fmha_cutlassB|efficient_attention.*backward", "efficient attention, backward", _OTHER),
    (r"fmha_cutlassF|efficient_attention", "efficient attention, forward", _OTHER),
    (r"triton_tem_fused.*backward|flex.*backward", "FlexAttention, backward", _OTHER),
    (r"triton_tem_fused|flex_attention", "FlexAttention, forward", _OTHER),
    (r"memcpy|aten::(copy_|clone|contiguous|_to_copy|cat)", "copy", _MEMORY),
    (r"memset|aten::(zero_|fill_|zeros|full|ones)|fillfunctor", "fill", _MEMORY),
    (r"direct_copy|copy_kernel|cat(array|_)", "copy", _MEMORY),
    (r"aten::(empty|resize_)", "allocation", _MEMORY),
    (
        r"aten::(as_strided|_?unsafe_view|_reshape_alias|view|transpose|permute|select|slice|t$"
        r"|reshape|expand|detach|flatten|unflatten|squeeze|unsqueeze|alias)|detach$",
        "views",
        _MEMORY,
    ),
    (r"softmax", "softmax", _EXTRA),
    (r"gemm|aten::(b?mm|baddbmm|addmm|matmul)|cutlass|sm\d\d_xmma", "matrix product", _EXTRA),
    (r"reduce|aten::(sum|amax|mean|norm)", "reduction", _EXTRA),
    (r"elementwise|aten::(mul|add|sub|div|exp|where|masked_fill)", "elementwise", _EXTRA),
    (r"index|gather|scatter|sort", "indexing", _EXTRA),
)
_PATTERNS = tuple((re.compile(p, re.IGNORECASE), name, kind) for p, name, kind in _NAMES)
# Shares of the total below this are summed up.
_SMALL = 0.005


@dataclass(frozen=True)
class Operation:
    """What kernels of one kind took, per call.

    Attributes:
        name: What they do.
        kind: "natten", "additional pass", "memory" or "other".
        kernels: What they are called, shortened.
        calls: How many run per call.
        ms: Milliseconds per call, all of them together.
    """

    name: str
    kind: str
    kernels: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Measurement:
    """What one way to compute the call takes here.

    Attributes:
        name: Of the way: a backend, or an implementation of others.
        forward_ms: Median milliseconds of the forward pass, with its host work.
        backward_ms: Of the backward pass; None if it was not asked for.
        peak_bytes: Memory above the inputs; None if unknown.
        operations: The longest first; empty if they were not recorded.
        failure: Why there are no times; None if there are.
    """

    name: str
    forward_ms: float = 0.0
    backward_ms: float | None = None
    peak_bytes: int | None = None
    operations: tuple[Operation, ...] = ()
    failure: str | None = None

    @property
    def total_ms(self) -> float:
        """Forward and, if asked for, backward."""
        return self.forward_ms + (self.backward_ms or 0.0)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(
    call: Callable[[], Any], device: torch.device, *, seconds: float = 0.3, least: int = 3
) -> float:
    """Median milliseconds of calls that take ``seconds`` together, ``least`` or more of them."""
    return median(times_ms(call, device, seconds=seconds, least=least))


def times_ms(
    call: Callable[[], Any], device: torch.device, *, seconds: float, least: int = 3
) -> list[float]:
    """The milliseconds of each of such calls."""
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds * 1e3 and len(times) < 1000):
        times.append(_once(call, device))
    return times


def _once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def readable(kernel: str) -> tuple[str, str]:
    """What a kernel or operator does, and of which kind it is."""
    for pattern, name, kind in _PATTERNS:
        if pattern.search(kernel):
            return name, kind
    return _short(kernel), "other"


def _short(kernel: str) -> str:
    name = re.sub(r"<.*|\(.*", "", kernel.removeprefix("void ")).strip()
    return name if len(name) <= 48 else name[:47] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Kineto, below torch's profiler, writes to stderr of every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def record(call: Callable[[], Any], device: torch.device, calls: int = 3) -> list[Operation]:
    """The operations of a call, from torch's profiler: kernels on a GPU, operators on the CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with _quiet(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: dict[tuple[str, str], list[Any]] = {}
    for event in profiler.key_averages():
        if event.device_type != wanted:
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took <= 0:
            continue
        entry = found.setdefault(readable(event.key), [set(), 0, 0.0])
        entry[0].add(_short(event.key))
        entry[1] += event.count
        entry[2] += took
    operations = [
        Operation(name, kind, ", ".join(sorted(names)[:3]), count / calls, us / calls / 1e3)
        for (name, kind), (names, count, us) in found.items()
    ]
    total = sum(o.ms for o in operations)
    large = [o for o in operations if o.ms >= _SMALL * total]
    small = [o for o in operations if o.ms < _SMALL * total]
    if small:
        calls_of_small = sum(o.calls for o in small)
        large.append(
            Operation(f"{len(small)} others", "other", "", calls_of_small, sum(o.ms for o in small))
        )
    return sorted(large, key=lambda o: (o.kind == "other" and not o.kernels, -o.ms))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call holds at most, above what was held before: torch's allocations only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    from torch.profiler import ProfilerActivity, profile

    cpu = [ProfilerActivity.CPU]
    with _quiet(), profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        call()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        return None
    held = peak = 0
    memory = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Limits:
    """What a device reaches, measured.

    Attributes:
        tflops: TFLOP/s of a large matrix product in the type that attention is computed in.
        bandwidth: GB/s of a large copy, reads and writes counted.
    """

    tflops: float
    bandwidth: float


@cache
def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the rate of matrix products and the bandwidth of memory: the best of some calls.

    GPUs multiply ``dtype``; on a CPU, half precision is storage, and the arithmetic float32's.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    if not on_gpu and dtype.itemsize < 4:
        dtype = torch.float32
    factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
    product = torch.empty_like(factors[0])
    torch.mm(*factors, out=product)
    ms = min(times_ms(lambda: torch.mm(*factors, out=product), device, seconds=0.2))
    tflops = 2 * size**3 / ms / 1e9
    count = (1 << 30) if on_gpu else (1 << 26)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms = min(times_ms(lambda: target.copy_(source), device, seconds=0.2))
    return Limits(tflops, 2 * count / ms / 1e6)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def gradients(
    output: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the backward pass that can be repeated."""
    return lambda: torch.autograd.grad(output, inputs, grad_out, retain_graph=True)


__all__ = [
    "Limits",
    "Measurement",
    "Operation",
    "free_bytes",
    "gradients",
    "limits",
    "median_ms",
    "peak_bytes",
    "readable",
    "record",
    "synchronize",
    "times_ms",
]
