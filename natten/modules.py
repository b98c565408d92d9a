"""Attention modules where programs for NATTEN 0.20 and 0.21 import them."""

from __future__ import annotations

from typing import Any

from natten.nn.attention import (
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from natten.validation import check_positive_int


class NeighborhoodAttentionGeneric(NeighborhoodAttention):
    """``NeighborhoodAttention1D``, ``2D`` or ``3D`` as the first argument says.

    Args:
        na_dim: axes of tokens: 1, 2 or 3.
        arguments, named: as those modules take them.
    """

    def __init__(self, na_dim: int, *arguments: Any, **named: Any) -> None:
        check_positive_int("na_dim", na_dim)
        if na_dim > 3:
            raise ValueError(f"na_dim must be 1, 2 or 3, got {na_dim}")
        self.rank = na_dim
        super().__init__(*arguments, **named)


__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodAttentionGeneric",
]
