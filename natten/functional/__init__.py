"""The operations as functions."""

from natten.functional.attention import attention
from natten.functional.merge import merge_attentions
from natten.functional.neighborhood import (
    explain,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)

__all__ = [
    "attention",
    "explain",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
]
