"""Dot product attention: dense, causal, and over packed sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from natten import validation
from natten.functional.dispatch import FMHA, parse_name
from natten.functional.ops import autocast, autocast_dtype, call
from natten.functional.problem import encode_config
from natten.types import KernelSchedule
from natten.utils.varlen import generate_varlen_parameters


def _check_cumulative(name: str, cumulative: Any, tensor: Tensor) -> None:
    if not isinstance(cumulative, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(cumulative).__name__}")
    if cumulative.dim() != 1 or cumulative.dtype != torch.int32 or cumulative.shape[0] < 2:
        raise ValueError(
            f"{name} must be a 1-D tensor of int32 with one entry more than sequences, got shape "
            f"{tuple(cumulative.shape)} and {cumulative.dtype}"
        )
    if cumulative.device != tensor.device:
        raise ValueError(f"{name} must be on {tensor.device}, got {cumulative.device}")


def _check_ends(name: str, cumulative: Tensor, tokens: int, longest: int) -> None:
    """Check what the tensor holds where looking costs nothing: on a CPU, outside of a compiler."""
    if torch.compiler.is_compiling() or type(cumulative) is not Tensor or not cumulative.is_cpu:
        return
    ends = cumulative.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    if ends[0] != 0 or min(lengths) < 0 or ends[-1] > tokens:
        raise ValueError(
            f"cumulative_seqlen_{name} must rise from 0 to at most the number of packed tokens "
            f"{tokens}, got {ends}"
        )
    if max(lengths) > longest:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest sequence {max(lengths)}, got {longest}"
        )


def _max_seqlen(name: str, value: Any) -> int:
    (number,) = validation.int_tuple(name, value, 1, minimum=0)
    return number


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None,
    seqlens_KV: Tensor | None,
    cumulative_seqlen_Q: Tensor | None,
    cumulative_seqlen_KV: Tensor | None,
    max_seqlen_Q: int | None,
    max_seqlen_KV: int | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The checked varlen arguments; (None, None, 0, 0) for plain batches."""
    if seqlens_Q is not None or seqlens_KV is not None:
        if cumulative_seqlen_Q is not None or cumulative_seqlen_KV is not None:
            raise ValueError(
                "give either seqlens_Q and seqlens_KV, or cumulative_seqlen_Q and "
                "cumulative_seqlen_KV, not both"
            )
        return generate_varlen_parameters(query, key, value, seqlens_Q, seqlens_KV)
    given = [cumulative_seqlen_Q is not None, cumulative_seqlen_KV is not None]
    given += [max_seqlen_Q not in (None, 0), max_seqlen_KV not in (None, 0)]
    if not any(given):
        return None, None, 0, 0
    if cumulative_seqlen_Q is None or cumulative_seqlen_KV is None:
        raise ValueError(
            "cumulative_seqlen_Q and cumulative_seqlen_KV must both be tensors when packed "
            "sequences are described"
        )
    if max_seqlen_Q is None or max_seqlen_KV is None:
        raise ValueError(
            "max_seqlen_Q and max_seqlen_KV must be given with cumulative_seqlen_Q and "
            "cumulative_seqlen_KV"
        )
    if query.shape[0] != 1:
        raise ValueError(
            "query, key and value must have batch size 1 (sequences are packed along the tokens), "
            f"got {query.shape[0]}"
        )
    _check_cumulative("cumulative_seqlen_Q", cumulative_seqlen_Q, query)
    _check_cumulative("cumulative_seqlen_KV", cumulative_seqlen_KV, query)
    if cumulative_seqlen_Q.shape != cumulative_seqlen_KV.shape:
        raise ValueError(
            "cumulative_seqlen_Q and cumulative_seqlen_KV must have the same length, got "
            f"{cumulative_seqlen_Q.shape[0]} and {cumulative_seqlen_KV.shape[0]}"
        )
    longest_q = _max_seqlen("max_seqlen_Q", max_seqlen_Q)
    longest_kv = _max_seqlen("max_seqlen_KV", max_seqlen_KV)
    _check_ends("Q", cumulative_seqlen_Q, query.shape[1], longest_q)
    _check_ends("KV", cumulative_seqlen_KV, key.shape[1], longest_kv)
    return cumulative_seqlen_Q, cumulative_seqlen_KV, longest_q, longest_kv


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    is_causal: bool = False,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dot product attention: ``softmax(scale * query @ key.T) @ value``.

    Packed sequences: with batch size 1, tokens of all sequences follow one another, and no token
    sees another sequence. Give ``seqlens_*``, or what
    :func:`natten.utils.varlen.generate_varlen_parameters` makes of them once for many layers.

    Args:
        query: ``[batch, seqlen, heads, head_dim]``, any floating dtype.
        key: ``[batch, seqlen_kv, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, seqlen_kv, heads_kv, head_dim_v]``.
        scale: Factor on the dot products; None means head_dim ** -0.5.
        backend: None for the first that can run the call, or a name such as "cutlass-fmha".
        q_tile_size: Query tile of the forward pass, one of
            ``natten.get_configs_for_cutlass_fmha(query, key, value)`` and its like.
        kv_tile_size: Key tile that goes with it.
        backward_q_tile_size: Query tile of the backward pass.
        backward_kv_tile_size: Key tile that goes with it.
        backward_kv_splits: Key tiles that the backward pass may work on in parallel.
        backward_use_pt_reduction: Compute the backward pass's row sums with torch.
        run_persistent_kernel: Persistent tile scheduling, where the backend has both.
        kernel_schedule: "non", "coop", "pp" (Hopper) or None.
        torch_compile: Compile FlexAttention, if ``natten.allow_flex_compile()`` allows it.
        return_lse: Also return the logsumexp.
        is_causal: Whether query i sees the keys 0 to i only (aligned at the first token).
        seqlens_Q: int32 ``[sequences]``, lengths of packed sequences.
        seqlens_KV: Likewise, of the keys.
        cumulative_seqlen_Q: int32 ``[sequences + 1]``, where each sequence starts, and the end;
            tokens behind the end attend to nothing. What it holds is checked on the CPU only.
        cumulative_seqlen_KV: Likewise, of the keys.
        max_seqlen_Q: Longest query sequence.
        max_seqlen_KV: Longest key sequence.

    Returns:
        ``[batch, seqlen, heads, head_dim_v]`` in query's dtype, and with ``return_lse`` the
        natural logarithm of the sum of exponentials, ``[batch, seqlen, heads]`` in float32
        (float64 for float64). A query with no key gets 0 and -inf. Both are differentiable.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
        NotImplementedError: No backend, or not the one named, runs such a call.
        RuntimeError: The backend named needs something that this machine lacks.
    """
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = autocast(dtype, query, key, value)
    validation.check_qkv(query, key, value, 1)
    name = parse_name(backend, FMHA)
    causal = validation.optional_bool("is_causal", is_causal)
    knobs = validation.check_knobs(
        1,
        (
            q_tile_size,
            kv_tile_size,
            backward_q_tile_size,
            backward_kv_tile_size,
            backward_kv_splits,
            backward_use_pt_reduction,
            run_persistent_kernel,
            kernel_schedule,
            torch_compile,
        ),
        suffix="size",
    )
    cumulative_q, cumulative_kv, max_q, max_kv = _varlen(
        query,
        key,
        value,
        seqlens_Q,
        seqlens_KV,
        cumulative_seqlen_Q,
        cumulative_seqlen_KV,
        max_seqlen_Q,
        max_seqlen_KV,
    )
    # Attention is neighborhood attention with a window as long as the axis.
    grid = (max(query.shape[1], key.shape[1], 1),)
    requires_grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    out, lse = call(
        query,
        key,
        value,
        None,
        None,
        None,
        cumulative_q,
        cumulative_kv,
        None,
        grid,
        (1,),
        (1,),
        (causal,),
        validation.check_scale(scale, query.shape[-1]),
        grid,
        (0,),
        (0,),
        max_q,
        max_kv,
        name,
        encode_config(*knobs),
        requires_grad,
    )
    return (out, lse) if return_lse else out


__all__ = ["attention"]
