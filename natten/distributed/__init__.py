"""Attention over one grid of tokens that is sharded over many GPUs."""

from __future__ import annotations

from natten.distributed.attention import (
    attention,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
)
from natten.distributed.cost import Links, explain
from natten.distributed.parallel import (
    NeighborhoodContextParallel,
    NeighborhoodHeadParallel,
    context_parallel,
)
from natten.distributed.sharding import GridSharding

__all__ = [
    "GridSharding",
    "Links",
    "NeighborhoodContextParallel",
    "NeighborhoodHeadParallel",
    "attention",
    "context_parallel",
    "explain",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]
