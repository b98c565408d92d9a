"""What runs on a GPU of all that the Triton backends are; importing it needs Triton."""

from triton import knobs

from natten.functional.backends.triton.ahead import compile_backward
from natten.functional.backends.triton.backward import BackwardPass
from natten.functional.backends.triton.fingerprint import remember
from natten.functional.backends.triton.forward import forward
from natten.functional.backends.triton.grids import can_place
from natten.functional.backends.triton.launcher import (
    TooLargeError,
    for_any_order,
    in_gluon,
    is_collecting,
)
from natten.functional.backends.triton.replay import record

remember()

__all__ = [
    "BackwardPass",
    "TooLargeError",
    "can_place",
    "compile_backward",
    "for_any_order",
    "forward",
    "in_gluon",
    "is_collecting",
    "knobs",
    "record",
]
