"""``natten.experimental`` of 0.17: fused attention with the arguments of that version."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from natten.functional import neighborhood_attention_generic
from natten.types import AttentionKwargs, BoolOrSequence, IntOrSequence
from natten.validation import check_qkv


def _of_rank(rank: int) -> Callable[..., Tensor]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntOrSequence,
        dilation: IntOrSequence | None = 1,
        is_causal: BoolOrSequence | None = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: AttentionKwargs | None = None,
    ) -> Tensor:
        check_qkv(query, key, value, rank)
        out = neighborhood_attention_generic(
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            rpb=rpb,
        )
        return out

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = (
        f":func:`natten.na{rank}d` as 0.17 had it: dilation is the fifth argument by position, and "
        "there is no stride. xformers_kwargs chose a kernel for the additional keys and is ignored."
    )
    return function


na1d, na2d, na3d = map(_of_rank, (1, 2, 3))

__all__ = ["na1d", "na2d", "na3d"]
