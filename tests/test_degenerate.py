"""Degenerate numbers are in the same class everywhere: tables of placements, and random ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case
from degenerate import (
    CASES,
    NUMBERS,
    PLACES,
    SCALES,
    all_minus_infinity,
    check,
    mask_by_bias,
    put,
    put_many,
)

BACKENDS = ["cpu", "reference"]
# FlexAttention has no backward pass on the CPU.
FLEX = [c for c in CASES if c.name in ("grid_gqa_rpb", "context_lengths", "full_window_causal")]
FLEX_ATTENTION = [c for c in CASES if c.name in ("dense_causal", "packed")]
untraced = pytest.mark.usefixtures("untraced_flex")


def names(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number(backend, case, place):
    for number in NUMBERS.values():
        for seed in (0, 1):
            check(case, backend, spoil=put(number, place, seed))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales(backend, case, scale):
    for dtype in (torch.float32, torch.float64):
        check(replace(case, scale=scale), backend, dtype, values=abs(scale) < 1)
        check(replace(case, scale=scale), backend, dtype, spoil=put_many(7), values=False)


@pytest.mark.parametrize("case", [c for c in CASES if c.rpb], ids=names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_a_bias_masks(backend, case):
    for dtype in (torch.float32, torch.float16):
        check(case, backend, dtype, spoil=mask_by_bias)


@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_scores_are_all_minus_infinity(backend, case):
    check(case, backend, spoil=all_minus_infinity)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("backend", BACKENDS)
def test_anywhere(backend, seed):
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[seed % 4]
    for case in CASES[seed % 3 :: 3]:
        check(case, backend, dtype, spoil=put_many(seed))


@untraced
@pytest.mark.parametrize("place", PLACES[:6])
@pytest.mark.parametrize("case", FLEX, ids=names)
def test_flex(case, place):
    for number in NUMBERS.values():
        check(case, "flex-fna", spoil=put(number, place), backward=False)


@untraced
@pytest.mark.parametrize("case", FLEX_ATTENTION, ids=names)
def test_flex_attention(case):
    for place in ("query", "key", "value"):
        check(case, "flex-fmha", spoil=put(torch.nan, place), backward=False)


@untraced
def test_flex_named_tiles():
    """They reorder tokens."""
    tiles = {"q_tile_shape": (8, 8), "kv_tile_shape": (8, 16)}
    for seed in range(4):
        check(FLEX[0], "flex-fna", spoil=put_many(seed), backward=False, **tiles)


@untraced
@pytest.mark.parametrize("case", FLEX[:1], ids=names)
def test_flex_masked_rows_and_scales(case):
    check(case, "flex-fna", spoil=mask_by_bias, backward=False)
    check(case, "flex-fna", spoil=all_minus_infinity, backward=False)
    for scale in SCALES:
        check(replace(case, scale=scale), "flex-fna", backward=False, values=abs(scale) < 1)
