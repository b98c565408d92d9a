"""Neighborhood attention of a grid that is sharded over ranks: the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, overload

import torch
from torch import Tensor

from natten import validation
from natten._internals import has_tangents
from natten.distributed import dtensors
from natten.distributed.call import Inputs, as_mask, as_numbers
from natten.distributed.exchange import agree, heads_to_tokens, tokens_to_heads
from natten.distributed.operator import sharded_agreement, sharded_attention
from natten.distributed.sharding import GridSharding, check_own
from natten.functional import sharded
from natten.functional.call import Parameters, Tensors, encode_window
from natten.functional.dispatch import FNA, parse_name
from natten.functional.neighborhood import neighborhood_attention_generic
from natten.functional.operators import attend, autocast, autocast_dtype, needs_grad
from natten.functional.ranks import without_rank
from natten.types import BoolOrSequence, IntOrSequence

if TYPE_CHECKING:
    from typing_extensions import Unpack

METHODS = ("auto", "halo", "merge", "ring")
TRANSPORTS = ("all_to_all", "p2p")

# Enough to hide three quarters of an exchange behind products, and few enough to fill a GPU.
_HEAD_CHUNKS = 4


def _one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _checked(
    rank: int | None,
    inputs: Inputs,
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    sharding: GridSharding,
    backend: Any,
    method: Any,
    transport: Any,
    head_chunks: Any,
    save_halo: Any,
) -> tuple[Any, ...]:
    """The operator's parameters."""
    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    lengths, (scale, softcap) = inputs.additional_lengths, scores
    rank = validation.check_qkv(query, key, value, rank)
    if len(sharding.grid) != rank:
        raise ValueError(f"query has {rank} axes of tokens, the sharded grid is {sharding.grid}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_own(tensor, name, sharding.own)
    # A shard may be smaller than the window.
    *sizes, is_circular = window
    checked = validation.check_window(sharding.grid, *sizes)
    rings = validation.check_circular(is_circular, sharding.grid, *checked)
    validation.check_additional(query, key, value, additional_keys, additional_values)
    validation.check_lengths(lengths, query, additional_keys)
    if lengths is not None and additional_keys is not None:
        validation.check_length_values("additional_lengths", lengths, additional_keys.shape[1])
    validation.check_rpb(rpb, query, checked[0], checked[3])
    validation.check_sink(inputs.sink, query)
    validation.check_mask("key_mask", inputs.key_mask, key)
    validation.check_mask("query_mask", inputs.query_mask, query)
    if head_chunks is None:
        head_chunks = _HEAD_CHUNKS
    validation.check_positive_int("head_chunks", head_chunks)
    return (
        sharding.key,
        *checked,
        rings or (False,) * rank,
        validation.check_scale(scale, query.shape[-1]),
        validation.check_softcap(softcap),
        parse_name(backend, FNA),
        _one_of("method", method, METHODS),
        _one_of("transport", transport, TRANSPORTS),
        head_chunks,
        validation.optional_bool("save_halo", save_halo),
        needs_grad(inputs),
    )


def _attend(
    rank: int | None,
    inputs: Inputs,
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    sharding: GridSharding,
    heads_dim: int | str | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of plain tensors, this rank's boxes."""
    if has_tangents(inputs):
        # Under torch.func ranks cannot talk to each other, not even of this.
        raise NotImplementedError(
            "forward mode is not implemented where the grid is sharded over ranks"
        )
    try:
        parameters = _checked(rank, inputs, window, scores, sharding, **options)
        index = None if heads_dim is None else _heads_index(heads_dim, sharding, inputs)
    except (ValueError, NotImplementedError) as error:
        if not torch.compiler.is_compiling():
            # The other ranks are about to wait for this one.
            agree(sharding.group, (), error)
        raise
    with torch.autocast(inputs.query.device.type, enabled=False):
        if index is not None:
            return _over_heads(inputs, window, scores, sharding, index, parameters, options)
        out, lse, _ = sharded_attention(*inputs, *parameters)
    return out, lse


def _alone(
    rank: int | None,
    inputs: Inputs,
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp where no tokens are sharded."""
    validation.check_qkv(*inputs[:3], rank)
    (*sizes, is_circular), (scale, softcap) = window, scores
    kernel_size, stride, dilation, is_causal = sizes
    out, lse = neighborhood_attention_generic(
        **inputs._asdict(), kernel_size=kernel_size, stride=stride, dilation=dilation,
        is_causal=is_causal, is_circular=is_circular, scale=scale, softcap=softcap,
        backend=backend, return_lse=True,
    )  # fmt: skip
    return out, lse


def _heads_index(heads_dim: int | str, sharding: GridSharding, inputs: Inputs) -> int:
    """Which of the sharding's dims shards heads instead of tokens while attention runs."""
    names = sharding.mesh.mesh_dim_names or ()
    dim = names.index(heads_dim) if heads_dim in names else heads_dim
    if dim not in sharding.dims:
        raise ValueError(
            f"heads_dim must be a dimension of the mesh that shards tokens, one of {sharding.dims} "
            f"or its name, got {heads_dim!r}"
        )
    index = sharding.dims.index(dim)
    size, heads_kv = len(sharding.splits[index]), inputs.key.shape[-2]
    if heads_kv % size:
        raise ValueError(
            f"heads_dim={heads_dim!r} shares out key heads among {size} ranks, got {heads_kv} heads"
        )
    return index


def _as_given(tensors: Tensors, *parameters: Any) -> Parameters:
    """Parameters of the operator that were checked when they were made."""
    return Parameters(*parameters)


def _over_heads(
    inputs: Inputs,
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    sharding: GridSharding,
    index: int,
    parameters: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Tokens of one axis are exchanged for heads, and back after attention."""
    detached = [t if t is None else t.detach() for t in inputs]
    zero = sharded_agreement(*detached, *parameters, sharding.dims[index])
    if torch.compiler.is_compiling():
        inputs = inputs._replace(query=inputs.query + zero)
    line, dim = sharding.lines[index], sharding.axes[index] + 1
    ranks = len(line.lengths)

    def share(tensor: Tensor | None, heads: int) -> Tensor | None:
        return None if tensor is None else tensor.chunk(ranks, heads)[line.own]

    def whole_mask(mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        each = as_numbers(mask, inputs.query).expand(*mask.shape, ranks, 1)
        return as_mask(tokens_to_heads(each, dim, line))

    query, key, value = [tokens_to_heads(t, dim, line) for t in inputs[:3]]
    moved = Inputs(
        query,
        key,
        value,
        share(inputs.rpb, 0),
        share(inputs.additional_keys, -2),
        share(inputs.additional_values, -2),
        share(inputs.sink, 0),
        inputs.additional_lengths,
        whole_mask(inputs.key_mask),
        whole_mask(inputs.query_mask),
    )
    inner = sharding.without[index]
    if inner is not None:
        out, lse = _attend(None, moved, window, scores, inner, None, **options)
    else:
        # Each rank has the whole grid, of some heads.
        *sizes, rings, factor, cap, name = parameters[1:9]
        encoded = encode_window(*sizes, is_circular=rings if any(rings) else ())
        given = Parameters(0, encoded, factor, cap, 0, 0, name, "", False)
        out, lse = attend(Tensors(**moved._asdict()), given, _as_given)
    return heads_to_tokens(out, dim, line), heads_to_tokens(lse.unsqueeze(-1), dim, line).squeeze(
        -1
    )


def _attend_somewhere(
    rank: int | None,
    inputs: Inputs,
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    sharding: GridSharding | None,
    heads_dim: int | str | None,
    return_lse: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = autocast_dtype(inputs.query)
    if dtype is not None:
        # Before the exchange: half of its bytes. Bias and sink keep their own.
        names = ("query", "key", "value", "additional_keys", "additional_values")
        cast = autocast(dtype, *[getattr(inputs, name) for name in names])
        inputs = inputs._replace(**dict(zip(names, cast, strict=True)))
    if sharded.is_dtensor(inputs.query):
        if sharded.current is not None:
            raise ValueError("tensors must be plain inside of context_parallel, got DTensors")
        out, lse = dtensors.attend(
            lambda local, placed: _attend(
                rank, local, window, scores, placed, heads_dim, **options
            ),
            lambda local: _alone(rank, local, window, scores, options["backend"]),
            inputs,
            sharding,
        )
    else:
        if sharding is None:
            if sharded.current is None:
                raise ValueError(
                    "sharding must say which box of the grid is whose: give a GridSharding, or "
                    "DTensors, or call this inside of context_parallel"
                )
            sharding = sharded.current.sharding
        out, lse = _attend(rank, inputs, window, scores, sharding, heads_dim, **options)
    return (out, lse) if return_lse else out


def _neighborhood_attention(
    rank: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrSequence,
    stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1,
    is_causal: BoolOrSequence = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    sharding: GridSharding | None = None,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_circular: BoolOrSequence | None = False,
    backend: str | None = None,
    method: str = "auto",
    transport: str = "all_to_all",
    heads_dim: int | str | None = None,
    head_chunks: int | None = None,
    save_halo: bool = True,
) -> Any:
    """The functions below; ``rank`` is how many axes of tokens there must be, None for any."""
    return _attend_somewhere(
        rank,
        Inputs(
            query,
            key,
            value,
            rpb,
            additional_keys,
            additional_values,
            sink,
            additional_lengths,
            key_mask,
            query_mask,
        ),
        (kernel_size, stride, dilation, is_causal, is_circular),
        (scale, softcap),
        sharding,
        heads_dim,
        return_lse,
        backend=backend,
        method=method,
        transport=transport,
        head_chunks=head_chunks,
        save_halo=save_halo,
    )


# As Python names it where an argument is missing or unknown.
_neighborhood_attention.__qualname__ = "neighborhood_attention"


class AttentionOptions(TypedDict, total=False):
    """What :func:`attention` takes by name only."""

    sharding: GridSharding | None
    backend: str | None
    method: str
    transport: str
    heads_dim: int | str | None
    head_chunks: int | None
    save_halo: bool


class Options(AttentionOptions, total=False):
    """What the functions of windows take by name only."""

    rpb: Tensor | None
    additional_lengths: Tensor | None
    softcap: float | None
    sink: Tensor | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    is_circular: BoolOrSequence | None


class NeighborhoodAttention(Protocol):
    """The signature of the functions below, whose result depends on ``return_lse``."""

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: IntOrSequence,
        stride: IntOrSequence = 1, dilation: IntOrSequence = 1,
        is_causal: BoolOrSequence = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: Literal[False] = False, **options: Unpack[Options],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: IntOrSequence,
        stride: IntOrSequence = 1, dilation: IntOrSequence = 1,
        is_causal: BoolOrSequence = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: Literal[True], **options: Unpack[Options],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: IntOrSequence,
        stride: IntOrSequence = 1, dilation: IntOrSequence = 1,
        is_causal: BoolOrSequence = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: bool, **options: Unpack[Options],
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


_without_rank = without_rank(_neighborhood_attention)
_public: Callable[[Callable[..., Any]], NeighborhoodAttention] = _without_rank


@_public
def neighborhood_attention(*arguments: Any, **named: Any) -> Any:
    """Neighborhood attention of a grid of tokens that is sharded over the ranks of a device mesh.

    What :func:`natten.functional.neighborhood_attention_generic` computes of the whole grid, where
    every rank has one box of it. All ranks of the sharding call it, with the same arguments but
    for their tensors. Tensors are either all DTensors, in true global shapes, or all plain ones:

    - Plain tensors are this rank's box, masks as well, and so are out and logsumexp.
      ``additional_*``, ``rpb`` and ``sink`` are the same on all ranks; their gradients are this
      rank's contribution: add them up, as DDP and FSDP do.
    - DTensors are the grid, sharded along tokens, batch or heads, query, key and value alike; out
      and logsumexp are placed as query. All else has any placements; gradients of what is
      replicated over ranks with different tokens are ``Partial``.

    Args:
        query: ``[batch, *tokens, heads, head_dim]``.
        key: ``[batch, *tokens, heads_kv, head_dim]``.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``.
        kernel_size, stride, dilation, is_causal, is_circular, scale, additional_keys,
            additional_values, rpb, additional_lengths, softcap, sink, key_mask, query_mask,
            backend: As there. A window may be larger than a shard, up to the whole grid, and a ring
            may be sharded, too: then the halo wraps around.
        sharding: Which box is whose. Default: of DTensors their placements, of plain tensors what
            :func:`context_parallel` says. It is never derived from the shapes of shards.
        return_lse: Also return the logsumexp.
        method: "halo" fetches all keys that the rank's queries see, and computes as one process
            does, row by row. "merge" and "ring" compute with the keys of one rank after the other
            and join by logsumexp; "ring" holds the keys of two ranks at a time. "auto" is "ring"
            where some rank needs about the whole grid, and else "halo".
        transport: "all_to_all", one ``all_to_all_single``, or "p2p", one ``batch_isend_irecv``.
        heads_dim: A dimension of the mesh, by number or name, that exchanges its tokens for heads
            before attention and back after it: for the ranks of one node, whose number divides
            heads_kv, with halos between nodes.
        head_chunks: Parts of the heads, of which one travels while another is computed ("halo");
            default 4, and 1 where nothing travels.
        save_halo: Keep the keys of other ranks for the backward pass, instead of fetching them
            again.

    Returns:
        This rank's box of the output, ``[batch, *tokens, heads, head_dim_v]``, and with
        ``return_lse`` the logsumexp ``[batch, *tokens, heads]``. Both are differentiable; every
        rank has to run the backward pass, since gradients of keys go back to their owners.

    Raises:
        ValueError: An argument is wrong, or does not fit the others; on all ranks, whichever has
            it. Ranks that differ in anything but their tensors' values, likewise.
        NotImplementedError: As for one process; and DTensors that shard head_dim.
    """
    return _neighborhood_attention(None, *arguments, **named)


@_public
def na1d(*arguments: Any, **named: Any) -> Any:
    """:func:`neighborhood_attention` of a sequence, ``[batch, X, heads, head_dim]``."""
    return _neighborhood_attention(1, *arguments, **named)


@_public
def na2d(*arguments: Any, **named: Any) -> Any:
    """:func:`neighborhood_attention` of a plane, ``[batch, X, Y, heads, head_dim]``."""
    return _neighborhood_attention(2, *arguments, **named)


@_public
def na3d(*arguments: Any, **named: Any) -> Any:
    """:func:`neighborhood_attention` of a volume, ``[batch, X, Y, Z, heads, head_dim]``."""
    return _neighborhood_attention(3, *arguments, **named)


def attend_where_sharded(
    rank: int | None,
    tensors: Sequence[Any],
    window: tuple[Any, ...],
    scores: tuple[Any, Any],
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of a call of natten's own functions, on DTensors or inside of
    `context_parallel`."""
    options = dict(_DEFAULTS)
    if sharded.current is not None:
        options |= sharded.current.options
    if backend is not None:
        options["backend"] = backend
    heads_dim = options.pop("heads_dim")
    out, lse = _attend_somewhere(
        rank, Inputs._make(tensors), window, scores, None, heads_dim, True, **options
    )
    return out, lse


_DEFAULTS: dict[str, Any] = dict(
    backend=None, method="auto", transport="all_to_all", heads_dim=None, head_chunks=None,
    save_halo=True,
)  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    *, is_causal: bool = False, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    *, is_causal: bool = False, return_lse: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None,
    *, is_causal: bool = False, return_lse: bool, **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    sharding: GridSharding | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    method: str = "auto",
    transport: str = "all_to_all",
    heads_dim: int | str | None = None,
    head_chunks: int | None = None,
    save_halo: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dot product attention of a sequence that is sharded over ranks: a window of everything.

    ``[batch, tokens, heads, head_dim]``; arguments, results and errors as of
    :func:`neighborhood_attention`. By default a ring, on three ranks or more.
    """
    placed = sharding or (sharded.current and sharded.current.sharding)
    length = query.shape[1] if sharded.is_dtensor(query) or placed is None else placed.grid[0]
    return _attend_somewhere(
        1,
        Inputs(query, key, value),
        (length, 1, 1, is_causal, False),
        (scale, None),
        sharding,
        heads_dim,
        return_lse,
        backend=backend,
        method=method,
        transport=transport,
        head_chunks=head_chunks,
        save_halo=save_halo,
    )


__all__ = ["attention", "na1d", "na2d", "na3d", "neighborhood_attention"]
