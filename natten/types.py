"""Types shared by the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

IntOrSequence = int | Sequence[int]
BoolOrSequence = bool | Sequence[bool]
AttentionKwargs = dict[str, Any]
MemoryPreference = Literal["default", "strict", "unrestricted"]

# As clients annotate with, by the names of earlier versions.
NoneType = type(None)
Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
DimensionTypeOrDed = int | DimensionType
CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType
CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType


class KernelSchedule(str, Enum):
    """Schedules of the Hopper kernels; the values are the names that ``kernel_schedule`` takes."""

    NonPersistent = "non"
    WarpSpecializedCooperative = "coop"
    WarpSpecializedPingpong = "pp"


__all__ = [
    "AttentionKwargs",
    "BoolOrSequence",
    "CausalArg1DType",
    "CausalArg1DTypeOrDed",
    "CausalArg2DType",
    "CausalArg2DTypeOrDed",
    "CausalArg3DType",
    "CausalArg3DTypeOrDed",
    "CausalArgType",
    "CausalArgTypeOrDed",
    "Dimension1DType",
    "Dimension1DTypeOrDed",
    "Dimension2DType",
    "Dimension2DTypeOrDed",
    "Dimension3DType",
    "Dimension3DTypeOrDed",
    "DimensionType",
    "DimensionTypeOrDed",
    "IntOrSequence",
    "KernelSchedule",
    "MemoryPreference",
    "NoneType",
]
