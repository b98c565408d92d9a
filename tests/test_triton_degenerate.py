"""Degenerate numbers in the Triton kernels, in Triton's interpreter: what they keep of the rule.

A masked weight is zero, and zero times NaN is NaN: in what a product sums over the columns of a
tile, numbers that are not finite reach the other rows of their tile. Scores do not pass a product
after the mask: query, key and bias may hold anything in the forward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Case
from degenerate import NUMBERS, SCALES, check, put
from interpret import main, run_interpreted
from torch import Tensor

pytest.importorskip("triton")

CASES = [
    Case("window_rpb", (10,), (5,), head_dim=16, batch=1, rpb=True),
    Case("grid_gqa", (4, 5), (3, 3), head_dim=16, heads=2, heads_kv=1, batch=1),
    Case("context", (9,), (3,), head_dim=16, additional=3, batch=1),
]


def _scores(device: str = "cpu") -> None:
    for case in CASES:
        for place in ("query", "key", "rpb", "additional_keys"):
            for number in NUMBERS.values():
                spoil = put(number, place)
                check(case, "cutlass-fna", spoil=spoil, backward=False, device=device)


def _scales(device: str = "cpu") -> None:
    for case in CASES:
        for scale in SCALES:
            is_small = abs(scale) < 1
            check(
                replace(case, scale=scale), "cutlass-fna", backward=is_small, values=is_small,
                device=device,
            )  # fmt: skip


def _masks(device: str = "cpu") -> None:
    """Queries that a bias lets see nothing, with gradients that are finite."""

    def mask(inputs: object, grad_out: Tensor, grad_lse: Tensor) -> None:
        table = inputs.rpb  # type: ignore[attr-defined]
        table[:, table.shape[1] // 2 :] = -math.inf

    case = CASES[0]
    for dtype in (torch.float32, torch.float16):
        check(case, "cutlass-fna", dtype, spoil=mask, device=device)
        check(replace(case, additional=2), "cutlass-fna", dtype, spoil=mask, device=device)
    if device == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        wide = replace(case, head_dim=64, head_dim_v=64)
        check(wide, "hopper-fna", torch.float16, spoil=mask, device=device)


CHECKS = {"scores": _scores, "scales": _scales, "masks": _masks}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str) -> None:
    run_interpreted(__file__, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


if __name__ == "__main__":
    main(CHECKS)
