"""Dot product attention: dense, causal, and over packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from natten import validation
from natten.functional.call import EVERYTHING, Parameters, Tensors, separated
from natten.functional.dispatch import FMHA, parse_name
from natten.functional.operators import attend, autocast, autocast_dtype
from natten.functional.problem import NO_KNOBS, encode_config
from natten.types import KernelSchedule
from natten.utils.varlen import generate_varlen_parameters

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _max_seqlen(name: str, value: Any) -> int:
    if isinstance(value, Sequence):
        raise ValueError(f"{name} must be an int, got {value!r}")
    (number,) = validation.int_tuple(name, value, 1, minimum=0)
    return number


def _at_least(name: str, given: Any, longest: int) -> int:
    """The length that is given beside those of all sequences, if any, or of the longest."""
    if given is None:
        return longest
    number = _max_seqlen(name, given)
    if number < longest:
        raise ValueError(f"{name} must be at least the longest sequence {longest}, got {number}")
    return number


def _longest(tensors: Tensors, max_seqlen_Q: Any, max_seqlen_KV: Any) -> tuple[int, int]:
    """The checked lengths of the longest packed sequences; (0, 0) for plain batches."""
    query, cumulative_q, cumulative_kv = tensors.query, *tensors[7:9]
    is_packed = cumulative_q is not None or cumulative_kv is not None
    # Only without them it is looked at what the lengths are: compilers may keep them symbolic.
    if not is_packed and max_seqlen_Q in (None, 0) and max_seqlen_KV in (None, 0):
        return 0, 0
    validation.check_cumulative(cumulative_q, cumulative_kv, query, suffixes=("Q", "KV"))
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
    longest_q = _max_seqlen("max_seqlen_Q", max_seqlen_Q)
    return longest_q, _max_seqlen("max_seqlen_KV", max_seqlen_KV)


def _parameters(
    tensors: Tensors,
    scale: Any,
    softcap: Any,
    backend: Any,
    knobs: tuple[Any, ...],
    is_causal: Any,
    max_seqlen_Q: Any,
    max_seqlen_KV: Any,
) -> Parameters:
    """The operator's parameters for attention's arguments, which are checked; whether gradients are
    needed is left open."""
    query, key, value = separated(tensors, 0)
    validation.check_qkv(query, key, value, 1)
    causal = validation.optional_bool("is_causal", is_causal)
    checked_knobs = validation.check_knobs(1, knobs, suffix="size")
    longest = _longest(tensors, max_seqlen_Q, max_seqlen_KV)
    validation.check_sink(tensors.sink, query)
    validation.check_mask("key_mask", tensors.key_mask, key)
    validation.check_mask("query_mask", tensors.query_mask, query)
    # Attention is neighborhood attention with a window as long as the axis.
    window = (EVERYTHING, 1, 1, int(causal))
    scale = validation.check_scale(scale, query.shape[-1])
    name, config = parse_name(backend, FMHA), encode_config(*checked_knobs)
    cap = validation.check_softcap(softcap)
    return Parameters(0, window, scale, cap, *longest, name, config, False)


class Options(TypedDict, total=False):
    """What type checkers take by name only."""

    q_tile_size: int | None
    kv_tile_size: int | None
    backward_q_tile_size: int | None
    backward_kv_tile_size: int | None
    backward_kv_splits: int | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: str | KernelSchedule | None
    torch_compile: bool
    is_causal: bool
    softcap: float | None
    sink: Tensor | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    seqlens_Q: Tensor | None
    seqlens_KV: Tensor | None
    cumulative_seqlen_Q: Tensor | None
    cumulative_seqlen_KV: Tensor | None
    max_seqlen_Q: int | None
    max_seqlen_KV: int | None


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    backend: str | None = None, *, return_lse: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    backend: str | None = None, *, return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    backend: str | None = None, *, return_lse: bool, **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
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
        softcap: Bound c of the scaled dot products s, which become ``c * tanh(s / c)``; None or 0
            for none.
        sink: A logit of each head ``[heads]`` that joins every query's softmax with a value of
            zero, and the logsumexp; differentiable.
        key_mask: bool ``[batch, seqlen_kv]``, True for valid keys. The others are seen by no query
            and get gradients of 0, whatever they hold. Not of packed sequences.
        query_mask: bool ``[batch, seqlen]``, True for valid queries. The others get 0 and -inf,
            and gradients of 0. Not of packed sequences.
        seqlens_Q: int32 ``[sequences]``, lengths of packed sequences.
        seqlens_KV: Likewise, of the keys.
        cumulative_seqlen_Q: int32 ``[sequences + 1]``, where each sequence starts, and the end;
            tokens behind the end attend to nothing. What it holds is checked on the CPU only.
        cumulative_seqlen_KV: Likewise, of the keys.
        max_seqlen_Q: Longest query sequence, or more; None with ``seqlens_*``, which say it.
        max_seqlen_KV: Longest key sequence, likewise.

    Returns:
        ``[batch, seqlen, heads, head_dim_v]`` in query's dtype, and with ``return_lse`` the
        natural logarithm of the sum of exponentials, ``[batch, seqlen, heads]`` in float32
        (float64 for float64). A query with no key gets 0 and -inf, or with a sink 0 and the sink.
        Both are differentiable.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
        NotImplementedError: No backend, or not the one named, runs such a call.
        RuntimeError: The backend named needs something that this machine lacks.
    """
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = autocast(dtype, query, key, value)
    validation.optional_bool("return_lse", return_lse)
    knobs = (
        q_tile_size,
        kv_tile_size,
        backward_q_tile_size,
        backward_kv_tile_size,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    if seqlens_Q is not None or seqlens_KV is not None:
        if cumulative_seqlen_Q is not None or cumulative_seqlen_KV is not None:
            raise ValueError(
                "give either seqlens_Q and seqlens_KV, or cumulative_seqlen_Q and "
                "cumulative_seqlen_KV, not both"
            )
        validation.check_qkv(query, key, value, 1)
        cumulative_seqlen_Q, cumulative_seqlen_KV, *longest = generate_varlen_parameters(
            query, key, value, seqlens_Q, seqlens_KV
        )
        max_seqlen_Q = _at_least("max_seqlen_Q", max_seqlen_Q, longest[0])
        max_seqlen_KV = _at_least("max_seqlen_KV", max_seqlen_KV, longest[1])
    tensors = Tensors(
        query, key, value, None, None, None, sink, cumulative_seqlen_Q, cumulative_seqlen_KV,
        key_mask=key_mask, query_mask=query_mask,
    )  # fmt: skip
    asked = (scale, softcap, backend, knobs, is_causal, max_seqlen_Q, max_seqlen_KV)
    out, lse = attend(tensors, asked, _parameters)
    return (out, lse) if return_lse else out


def attention_with_context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor,
    additional_values: Tensor,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """:func:`attention` to ``key`` and to additional keys, in one softmax; nothing is copied or
    merged."""
    tensors = Tensors(
        query, key, value, None, additional_keys, additional_values, sink, key_mask=key_mask
    )
    asked = (scale, softcap, None, NO_KNOBS, False, None, None)
    return attend(tensors, asked, _parameters)[0]


__all__ = ["attention", "attention_with_context"]
