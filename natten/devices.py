"""Facts about devices: what plans, predicts or lists configurations without having one reads them.

Rates and bandwidths are the makers' own peaks, without sparsity; nothing reaches them entirely.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

KIB = 1024


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: As :func:`find` takes it.
        full_name: As people write it; the driver's name starts alike.
        capability: CUDA compute capability; None for a CPU.
        multiprocessors: Streaming multiprocessors, or cores.
        clock: Boost clock in GHz.
        shared_memory: Bytes that one program may use.
        memory: GB of memory.
        bandwidth: GB/s of memory.
        half_rate: TFLOP/s of fp16 and bf16 matrix products that sum in fp32.
        tf32_rate: TFLOP/s of fp32 matrix products in TF32; 0 if there is none.
        float_rate: TFLOP/s of fp32 arithmetic.
    """

    name: str
    full_name: str
    capability: tuple[int, int] | None
    multiprocessors: int
    clock: float
    shared_memory: int
    memory: float
    bandwidth: float
    half_rate: float
    tf32_rate: float
    float_rate: float

    def rate(self, dtype: torch.dtype) -> float:
        """Peak TFLOP/s of matrix products of ``dtype``."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half_rate
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return self.tf32_rate or self.float_rate
        return self.float_rate


_TABLE = (
    # name, full name, capability, SMs, GHz, KiB shared, GB, GB/s, half, tf32, fp32
    ("v100", "Tesla V100-SXM2", (7, 0), 80, 1.53, 96, 32, 900, 125, 0, 15.7),
    ("t4", "Tesla T4", (7, 5), 40, 1.59, 64, 16, 320, 65, 0, 8.1),
    ("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 163, 80, 2039, 312, 156, 19.5),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 163, 40, 1555, 312, 156, 19.5),
    ("a10", "NVIDIA A10", (8, 6), 72, 1.70, 99, 24, 600, 125, 62.5, 31.2),
    ("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 1.70, 99, 24, 936, 71, 35.6, 35.6),
    ("l4", "NVIDIA L4", (8, 9), 58, 2.04, 99, 24, 300, 121, 60, 30.3),
    ("l40s", "NVIDIA L40S", (8, 9), 142, 2.52, 99, 48, 864, 362, 183, 91.6),
    ("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 99, 24, 1008, 165, 82.6, 82.6),
    ("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.83, 227, 80, 3350, 989, 495, 66.9),
    ("h100-pcie", "NVIDIA H100 PCIe", (9, 0), 114, 1.76, 227, 80, 2000, 756, 378, 51.2),
    ("h200", "NVIDIA H200", (9, 0), 132, 1.83, 227, 141, 4800, 989, 495, 66.9),
    ("b200", "NVIDIA B200", (10, 0), 148, 1.97, 227, 180, 8000, 2250, 1125, 75),
    ("b300", "NVIDIA B300", (10, 3), 148, 1.97, 227, 288, 8000, 2500, 1250, 76),
    ("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 2.41, 99, 32, 1792, 210, 105, 105),
)  # fmt: skip
DEVICES: dict[str, Device] = {row[0]: Device(*row[:5], row[5] * KIB, *row[6:]) for row in _TABLE}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find(name: str) -> Device:
    """The device called ``name``: a name of the table, or one that a driver reports.

    Raises:
        ValueError: The table has no such device.
    """
    wanted = _plain(name)
    # The longest name first, so that "h100-pcie" is not taken for an "h100".
    for device in sorted(DEVICES.values(), key=lambda d: -len(d.name)):
        if wanted in (_plain(device.name), _plain(device.full_name)):
            return device
    for device in sorted(DEVICES.values(), key=lambda d: -len(d.name)):
        short = _plain(device.name)
        if wanted.startswith(_plain(device.full_name)) or short in wanted:
            return device
    raise ValueError(f"device name must be one of {', '.join(DEVICES)}, got {name!r}")


def driver_name(device: torch.device | str) -> str:
    """What the driver, or the operating system, calls a device of this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor()


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def current(device: torch.device | str) -> Device:
    """The facts of a CUDA device of this machine; those of the driver where it has them."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    properties = torch.cuda.get_device_properties(device)
    try:
        like = find(properties.name)
    except ValueError:
        # An unknown device is taken for a slower or faster H100.
        share = properties.multi_processor_count / DEVICES["h100"].multiprocessors
        h100 = DEVICES["h100"]
        like = Device(
            "unknown", properties.name, None, 0, h100.clock, 0, 0, h100.bandwidth * share,
            h100.half_rate * share, h100.tf32_rate * share, h100.float_rate * share,
        )  # fmt: skip
    return Device(
        like.name,
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        like.clock,
        getattr(properties, "shared_memory_per_block_optin", 99 * KIB),
        properties.total_memory / 1e9,
        like.bandwidth,
        like.half_rate,
        like.tf32_rate,
        like.float_rate,
    )


# GPU backends ask for the facts of a device through the functions below.
_pretended: ContextVar[Device | None] = ContextVar("pretended device", default=None)


@contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Inside, backends decide and plan as if every CUDA device were this one; nothing may run."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def pretended() -> Device | None:
    """The device that all are pretended to be; what is remembered of one is not true of another."""
    return _pretended.get()


def capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    device = _pretended.get()
    if device is None:
        return _properties(index)[0]
    return device.capability or (0, 0)


def shared_memory(index: int | None) -> int:
    """The bytes of shared memory that one program may use on a CUDA device."""
    device = _pretended.get()
    return _properties(index)[1] if device is None else device.shared_memory


def multiprocessors(index: int | None) -> int:
    """The multiprocessors of a CUDA device."""
    device = _pretended.get()
    return _properties(index)[2] if device is None else device.multiprocessors


@cache
def _properties(index: int | None) -> tuple[tuple[int, int], int, int]:
    p = torch.cuda.get_device_properties(index)
    memory = getattr(p, "shared_memory_per_block_optin", 64 * KIB)
    return (p.major, p.minor), memory, p.multi_processor_count


__all__ = [
    "DEVICES",
    "Device",
    "capability",
    "current",
    "driver_name",
    "find",
    "multiprocessors",
    "pretended",
    "pretending",
    "shared_memory",
]
