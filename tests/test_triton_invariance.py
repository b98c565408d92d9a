"""Packed sequences and batch entries have the bits that they have alone (Triton's interpreter)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invariance import check_batch_entries, check_packed_sequences, tiles, tiles_1d

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

HALF, SINGLE = torch.float16, torch.float32
SMALL, LARGE = tiles_1d(32, 32, 32, 64), tiles_1d(64, 64, 64, 64)


SHAPES = tiles((4, 8), (4, 8), (4, 8), (8, 8))
# By name: backend, dtype, and the arguments of the check.
PACKED: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "half": ("cutlass", HALF, dict(**SMALL, heads=(1, 1), head_dim=16)),
    "causal": ("cutlass", SINGLE, dict(**SMALL, heads=(1, 1), head_dim=16, is_causal=True)),
    "cross": (
        "cutlass", HALF,
        dict(**LARGE, heads=(1, 1), head_dim=16, lengths_kv=(20, 70, 0, 33, 64)),
    ),
    # Alone, none of these sequences needs a mask.
    "whole_tiles": (
        "cutlass", SINGLE, dict(**SMALL, heads=(1, 1), head_dim=32, lengths=(64, 32, 128)),
    ),
    "hopper": ("hopper", HALF, dict(**LARGE, heads=(1, 1), lengths=(64, 30))),
    "grouped": ("cutlass", HALF, dict(**LARGE, heads=(4, 2), head_dim=24, lengths=(70, 33))),
    "hopper_causal_grouped": ("hopper", HALF, dict(**LARGE, lengths=(70, 33), is_causal=True)),
}  # fmt: skip
ENTRIES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "bias_and_context": ("cutlass", HALF, dict(**SHAPES, head_dim=16, rpb=True, additional=5)),
    "strided": ("cutlass", SINGLE, dict(**SHAPES, head_dim=16, stride=(1, 2))),
    "hopper": ("hopper", HALF, tiles((4, 16), (4, 8), (4, 8), (8, 8))),
}


@pytest.mark.parametrize(("backend", "dtype", "arguments"), PACKED.values(), ids=PACKED)
def test_packed_sequences(backend: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    check_packed_sequences(backend, dtype, **arguments)


@pytest.mark.parametrize(("backend", "dtype", "arguments"), ENTRIES.values(), ids=ENTRIES)
def test_batch_entries(backend: str, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    check_batch_entries(backend, dtype, tokens=(5, 9), batch=2, heads=(2, 1), **arguments)
