"""Calls of neighborhood attention whose grid of tokens is sharded over ranks: which they are, and
the way to what computes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from natten import validation

# What `natten.distributed.context_parallel` says of all calls inside of it, else None.
current: Any = None

# natten.distributed.attention's function of this name. natten/__init__.py puts it here, imported at
# first use, because it is built on this package.
attend_where_sharded: Any = None


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Without importing DTensors: then there is none."""
    if type(tensor) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def grid_of(tensor: Tensor) -> tuple[int, ...]:
    """The extents of the whole grid of ``[batch, *tokens, heads, head_dim]``."""
    if current is not None:
        grid: tuple[int, ...] = current.sharding.grid
        return grid
    return tuple(tensor.shape[1:-2])


def attend(
    rank: int | None,
    tensors: Sequence[Any],
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    backend: Any,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp.

    Args:
        rank: Axes of tokens that there must be; None for any.
        tensors: query, key, value, rpb, additional keys and values, sink, lengths, and the masks of
            keys and queries.
        window: kernel_size, stride, dilation, is_causal and is_circular.
        scores: scale and softcap.
        backend: As the public functions take it.
        given: Arguments that are for calls of one process, by name; None for those not given.
    """
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not implemented where the grid is sharded over ranks, got "
                f"{validation.shown(value)}"
            )
    return attend_where_sharded(rank, tensors, window, scores, backend)


__all__ = ["attend", "attend_where_sharded", "current", "grid_of", "is_dtensor"]
