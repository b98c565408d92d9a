"""The operations as functions."""

from __future__ import annotations

from natten.functional.attention import attention
from natten.functional.merge import merge_attentions
from natten.functional.neighborhood import (
    explain,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)
from natten.functional.operators import decompositions
from natten.functional.window_products.functions import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
)

__all__ = [
    "attention",
    "decompositions",
    "explain",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_attention_generic",
]
