"""Types shared by the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

IntOrSequence = int | Sequence[int]
BoolOrSequence = bool | Sequence[bool]
# One for all axes or one for each; or that for each of some groups of heads.
IntOrWindows = IntOrSequence | Sequence[Sequence[int]]
KernelSizes = int | Sequence[int | None] | Sequence[Sequence[int | None]]
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


class _Choice(str, Enum):
    """Members that are strings and have numbers as values: clients compare with either."""

    # The number has a default for calls with a string alone, which find a member.
    def __new__(cls, text: str, number: int = 0) -> _Choice:
        member = str.__new__(cls, text)
        member._value_ = number
        return member

    @classmethod
    def _missing_(cls, value: object) -> _Choice | None:
        return next((member for member in cls if str.__eq__(member, value) is True), None)

    __str__ = str.__str__

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class KernelSchedule(_Choice):
    """Schedules of the Hopper kernels.

    ``kernel_schedule`` takes a member or the string that it is equal to; ``.value`` is its number.
    """

    NonPersistent = "non", 0
    WarpSpecializedCooperative = "coop", 1
    WarpSpecializedPingpong = "pp", 2


class MemoryUsagePreference(_Choice):
    """How much memory backward passes may use: see ``natten.set_memory_usage_preference``.

    A member is equal to the string that the setter takes; ``.value`` is its number.
    """

    Default = "default", 0
    Strict = "strict", 1
    Unrestricted = "unrestricted", 2


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
    "MemoryUsagePreference",
    "NoneType",
]
