"""Grids of different sizes in one launch: the tables that its programs read, on the device.

They follow from the grids and the shape of row tiles alone, and are made on first use and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natten.functional.backends.triton.arguments import pad, table
from natten.functional.backends.triton.tiles import Tiling
from natten.functional.problem import Grids, Problem

# Of which grids, and the shape of row tiles, or the number of additional keys of each grid.
_What = tuple[Grids | None, tuple[int, ...] | int]
# Tables on GPUs: by what they are of, device and stream, whose order they are made and freed in.
# The oldest are forgotten, which layouts that never repeat make many of.
_tables: OrderedDict[Any, Tensor] = OrderedDict()
_MAX_TABLES = 256
# Those that CUDA graphs read, for good.
_captured: list[Tensor] = []


@lru_cache(maxsize=64)
def _ends(grids: Grids, context: int) -> np.ndarray:
    """Where each grid ends, with 0 before: its own tokens, and ``context`` additional ones."""
    tokens = [0, *accumulate(grid.tokens for grid, count in grids.runs for _ in range(count))]
    return np.array([tokens, [n * context for n in range(len(tokens))]], np.int32)


def _numbers(what: _What) -> np.ndarray:
    grids, tile = what
    return _ends(grids, tile) if isinstance(tile, int) else table(grids, tile).numbers


def _somewhere(what: _What, device: torch.device) -> Tensor | None:
    """The numbers on a GPU, made on whichever stream."""
    return next((t for (*key, _), t in list(_tables.items()) if key == [what, device]), None)


def _placed(what: _What, device: torch.device) -> Tensor:
    """The numbers on a device. Neither does the host wait for a GPU, nor streams for each other."""
    if device.type != "cuda":
        return torch.from_numpy(_numbers(what)).to(device)
    if torch.cuda.is_current_stream_capturing():
        found = _somewhere(what, device)
        if found is None:
            raise RuntimeError(
                "a table of grids of different sizes is not on the GPU yet, and a CUDA graph that "
                "is captured cannot put it there: make the same call once before"
            )
        _captured.append(found)
        return found
    place = (what, device, torch.cuda.current_stream(device).cuda_stream)
    found = _tables.get(place)
    if found is None:
        found = torch.from_numpy(_numbers(what)).pin_memory().to(device, non_blocking=True)
        _tables[place] = found
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    return found


def placed_table(
    problem: Problem, row_tile: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """The table of row tiles of this shape, of three axes, on a device; None where grids are of one
    size."""
    return None if problem.grids is None else _placed((problem.grids, row_tile), device)


def placed_ends(grids: Grids, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each grid ends, as those of packed sequences: among all tokens, and among additional
    ones, ``context`` of each."""
    ends = _placed((grids, context), device)
    return ends[0], ends[1]


def can_place(problem: Problem, tilings: Iterable[Tiling], backward: bool) -> bool:
    """Whether the tables of kernels with these tilings can be had now, the forward one or those of
    the backward pass: a CUDA graph being captured has those alone that are on the GPU."""
    grids, device = problem.grids, problem.device
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return True
    query, *others = tilings
    needed: list[Any] = [pad(query.query, 1), *(pad(tiling.key, 1) for tiling in others)]
    if backward and problem.num_additional:
        needed.append(problem.num_additional)
    return all(_somewhere((grids, what), device) is not None for what in needed)
