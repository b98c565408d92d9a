"""Packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natten.validation import check_is_tensor


def _check_lengths(name: str, seqlens: Any, tensor: Tensor) -> list[int]:
    if not isinstance(seqlens, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(seqlens).__name__}")
    if seqlens.dim() != 1 or seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} must be a 1-D tensor of int32, got shape {tuple(seqlens.shape)} and "
            f"{seqlens.dtype}"
        )
    if seqlens.device != tensor.device:
        raise ValueError(f"{name} must be on {tensor.device}, got {seqlens.device}")
    lengths = seqlens.tolist()
    if not lengths:
        raise ValueError(f"{name} must hold at least one length, got none")
    if min(lengths) < 0:
        raise ValueError(f"{name} must hold lengths of at least 0, got {lengths}")
    if sum(lengths) > tensor.shape[1]:
        raise ValueError(
            f"{name} must sum to at most the number of packed tokens {tensor.shape[1]}, got "
            f"{sum(lengths)}"
        )
    return lengths


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What :func:`natten.attention` needs about packed sequences, from their lengths.

    Compute it once and pass the results to every layer. It reads the lengths, and so waits for
    the device.

    Args:
        query: ``[1, total tokens, heads, head_dim]``.
        key: ``[1, total tokens, heads_kv, head_dim]``.
        value: ``[1, total tokens, heads_kv, head_dim_v]``.
        seqlens_Q: int32 ``[sequences]`` on query's device, or None together with seqlens_KV.
            Tokens behind the last sequence are padding: they attend to nothing, and nothing to
            them.
        seqlens_KV: Likewise, of the keys.

    Returns:
        cumulative_seqlen_Q, cumulative_seqlen_KV (int32 ``[sequences + 1]``), max_seqlen_Q and
        max_seqlen_KV; (None, None, 0, 0) without lengths.

    Raises:
        ValueError: Lengths of the wrong kind, or that sum to more than the packed tokens.
        RuntimeError: Under torch.compile, which cannot read lengths.
    """
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generate_varlen_parameters reads the lengths and cannot run under torch.compile; "
            "call it outside and pass cumulative_seqlen_* and max_seqlen_*"
        )
    if seqlens_Q is None or seqlens_KV is None:
        raise ValueError("seqlens_Q and seqlens_KV must both be tensors or both None")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
    if query.shape[0] != 1 or key.shape[0] != 1 or value.shape[0] != 1:
        raise ValueError(
            "query, key and value must have batch size 1 (sequences are packed along the tokens), "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    lengths_q = _check_lengths("seqlens_Q", seqlens_Q, query)
    lengths_kv = _check_lengths("seqlens_KV", seqlens_KV, key)
    if len(lengths_q) != len(lengths_kv):
        raise ValueError(
            "seqlens_Q and seqlens_KV must have one length for each sequence, got "
            f"{len(lengths_q)} and {len(lengths_kv)}"
        )
    cumulative = [
        torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        for lengths in (seqlens_Q, seqlens_KV)
    ]
    return cumulative[0], cumulative[1], max(lengths_q), max(lengths_kv)


__all__ = ["generate_varlen_parameters"]
