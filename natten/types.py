"""Types shared by the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

IntOrSequence = int | Sequence[int]
BoolOrSequence = bool | Sequence[bool]
AttentionKwargs = dict[str, Any]
MemoryPreference = Literal["default", "strict", "unrestricted"]


class KernelSchedule(str, Enum):
    """Schedules of the Hopper kernels; the values are the names that ``kernel_schedule`` takes."""

    NonPersistent = "non"
    WarpSpecializedCooperative = "coop"
    WarpSpecializedPingpong = "pp"


__all__ = [
    "AttentionKwargs",
    "BoolOrSequence",
    "IntOrSequence",
    "KernelSchedule",
    "MemoryPreference",
]
