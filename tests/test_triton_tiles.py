"""Which tiles the kernels get: what is left unmasked must need no mask."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from random import Random

import pytest
import torch
from test_simulator import count_by_mask

from natten import devices
from natten.simulator import make_problem

pytest.importorskip("triton")

from natten.functional.backends.triton import tiles


@pytest.mark.parametrize("seed", range(60))
def test_tiles_without_masks_are_in_full_sight(seed: int) -> None:
    random = Random(seed)
    rank = random.choice((1, 2, 3))
    tile = {1: (4,), 2: (2, 4), 3: (2, 2, 2)}[rank]
    # Multiples of the tile, mostly: else some tile is cut off, and there is nothing to find.
    shape = tuple(n * random.choice((1, 2, 3, 4)) + (random.random() < 0.1) for n in tile)
    kernel_size = tuple(random.choice((s, n, min(2 * n, s))) for n, s in zip(tile, shape))
    stride = tuple(random.choice((1, k)) for k in kernel_size)
    problem = make_problem(shape, kernel_size, stride, heads=1, head_dim=16)
    for inverse in (False, True):
        _row_tiles, visited, full = count_by_mask(problem, tile, tile, inverse, False)
        tiling = tiles.Tiling(tile, tile)
        assert tiles._whole(problem, tiling, inverse) == (visited == full), (shape, kernel_size)


def test_some_problems_need_no_masks() -> None:
    blocked = make_problem((256, 256), (80, 80), (16, 16), heads=1, head_dim=128)
    dense = make_problem((4096,), (4096,), heads=1, head_dim=64)
    for problem in (blocked, dense):
        for kind in (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT):
            assert tiles.choose(problem, kind, True, 227 * 1024).whole
    ragged = make_problem((4097,), (4097,), heads=1, head_dim=64)
    causal = make_problem((4096,), (4096,), is_causal=True, heads=1, head_dim=64)
    for problem in (ragged, causal):
        assert not tiles.choose(problem, tiles.FORWARD, True, 227 * 1024).whole


@pytest.mark.parametrize("device", ["t4", "rtx3090", "rtx4090"])
@pytest.mark.parametrize("kind", [tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT])
def test_two_programs_fit_where_shared_memory_is_small(device: str, kind: str) -> None:
    problem = make_problem((64, 64), (13, 13), heads=4, head_dim=64, dtype=torch.float16)
    limit = devices.find(device).shared_memory
    tiling = tiles.choose(problem, kind, False, limit)
    taken = tiles._shared_memory(tiling, problem, kind)
    assert taken <= limit
    assert 2 * taken <= limit or tiling.stages <= 2
    assert prod(tiling.query) * prod(tiling.key) >= 32 * 64


def test_lengths_need_a_kernel_that_reads_no_more() -> None:
    """The kernel whose warp groups run apart loads whole tiles of additional keys."""
    problem = make_problem(
        (64, 64), 13, heads=8, head_dim=64, dtype=torch.bfloat16, device="cuda", additional=77
    )
    assert tiles.suits_apart(problem)
    assert not tiles.suits_apart(replace(problem, has_lengths=True))
