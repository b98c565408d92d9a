"""Degenerate numbers in the Triton kernels, in Triton's interpreter: what they keep of the rule.

A masked weight is zero, and zero times NaN is NaN: in what a product sums over the columns of a
tile, numbers that are not finite reach the other rows of their tile. Scores do not pass a product
after the mask: query, key and bias may hold anything in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case
from checks import Inputs, make_inputs
from degenerate import NUMBERS, SCALES, check, put
from torch import Tensor

pytest.importorskip("triton")

CASES = [
    Case("window_rpb", (10,), (5,), head_dim=16, batch=1, rpb=True),
    Case("grid_gqa", (4, 5), (3, 3), head_dim=16, heads=2, heads_kv=1, batch=1),
    Case("context", (9,), (3,), head_dim=16, additional=3, batch=1),
]


each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@pytest.mark.parametrize(
    ("case", "spoil"),
    [
        *(pytest.param(case, None, id=f"{case}-finite") for case in CASES),
        *(
            pytest.param(case, put(number, place), id=f"{case}-{place}-{name}")
            for case in CASES
            for place in ("query", "key", "rpb", "additional_keys")
            if place in make_inputs(case, torch.float32).tensors()
            for name, number in NUMBERS.items()
        ),
    ],
)
@each_device
def test_scores(case: Case, spoil: Callable[..., None] | None, device: str) -> None:
    check(case, "cutlass-fna", spoil=spoil, backward=False, device=device)


@pytest.mark.parametrize("scale", SCALES)
@each_case
@each_device
def test_scales(case: Case, scale: float, device: str) -> None:
    is_small = abs(scale) < 1
    check(
        replace(case, scale=scale), "cutlass-fna", backward=is_small, values=is_small,
        device=device,
    )  # fmt: skip


def _mask(inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> None:
    """Queries that a bias lets see nothing, with gradients that are finite."""
    assert inputs.rpb is not None
    inputs.rpb[:, inputs.rpb.shape[1] // 2 :] = -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("additional", [0, 2])
@each_device
def test_masks(additional: int, dtype: torch.dtype, device: str) -> None:
    case = replace(CASES[0], additional=additional)
    check(case, "cutlass-fna", dtype, spoil=_mask, device=device)


@each_device
def test_masks_of_hopper(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100")
    wide = replace(CASES[0], head_dim=64, head_dim_v=64)
    check(wide, "hopper-fna", torch.float16, spoil=_mask, device=device)
