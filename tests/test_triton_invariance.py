"""Packed sequences and batch entries have the bits that they have alone (Triton's interpreter)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from interpret import main, run_interpreted
from invariance import check_batch_entries, check_packed_sequences, tiles, tiles_1d

pytest.importorskip("triton")

HALF, SINGLE = torch.float16, torch.float32
SMALL, LARGE = tiles_1d(32, 32, 32, 64), tiles_1d(64, 64, 64, 64)


def _packed() -> None:
    check = partial(check_packed_sequences, heads=(1, 1))
    check("cutlass", HALF, **SMALL, head_dim=16)
    check("cutlass", SINGLE, **SMALL, head_dim=16, is_causal=True)
    check("cutlass", HALF, **LARGE, head_dim=16, lengths_kv=(20, 70, 0, 33, 64))
    # Sequences in whole tiles: alone, none needs a mask.
    check("cutlass", SINGLE, **SMALL, head_dim=32, lengths=(64, 32, 128))
    check("hopper", HALF, **LARGE, lengths=(64, 30))


def _grouped() -> None:
    check_packed_sequences("cutlass", HALF, **LARGE, heads=(4, 2), head_dim=24, lengths=(70, 33))
    check_packed_sequences("hopper", HALF, **LARGE, lengths=(70, 33), is_causal=True)


def _entries() -> None:
    shapes = tiles((4, 8), (4, 8), (4, 8), (8, 8))
    check = partial(check_batch_entries, tokens=(5, 9), batch=2, heads=(2, 1))
    check("cutlass", HALF, head_dim=16, rpb=True, additional=5, **shapes)
    check("cutlass", SINGLE, head_dim=16, stride=(1, 2), **shapes)
    check("hopper", HALF, **tiles((4, 16), (4, 8), (4, 8), (8, 8)))


CHECKS = {"packed": _packed, "grouped": _grouped, "entries": _entries}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str) -> None:
    run_interpreted(__file__, name)


if __name__ == "__main__":
    main(CHECKS)
