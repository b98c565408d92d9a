"""na1d, na2d, na3d over one N-dimensional function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, overload

import torch
from torch import Tensor

from natten import validation
from natten._internals import is_known
from natten.functional import sharded
from natten.functional.attention import attention
from natten.functional.call import (
    CAUSAL,
    Parameters,
    Tensors,
    encode_window,
    flat,
    make_problem,
    separated,
)
from natten.functional.dispatch import FMHA, FNA, Explanation, parse_name
from natten.functional.dispatch import explain as explain_problem
from natten.functional.head_groups import attend_groups, of_groups
from natten.functional.merge import merge_attentions
from natten.functional.operators import (
    attend,
    autocast,
    autocast_dtype,
    needs_grad,
)
from natten.functional.problem import DEFAULT_CONFIG, NO_KNOBS, decode_config, encode_config
from natten.functional.ranks import without_rank
from natten.types import (
    AttentionKwargs,
    BoolOrSequence,
    IntOrSequence,
    IntOrWindows,
    KernelSchedule,
    KernelSizes,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _boxes(
    query: Tensor, key: Tensor, grid: Any, query_origin: Any, key_origin: Any
) -> tuple[tuple[int, ...], ...]:
    """The global grid and the origins of the query and key boxes in it; none without a grid."""
    query_shape, key_shape = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    rank = len(query_shape)
    if grid is None:
        if query_origin is not None or key_origin is not None:
            raise ValueError("query_origin and key_origin need grid, the extents of the whole grid")
        if query_shape != key_shape:
            raise ValueError(
                "query and key must have the same token shape (or boxes of one grid=), got "
                f"{query_shape} and {key_shape}"
            )
        return ()
    extents = validation.int_tuple("grid", grid, rank, minimum=0)
    origins = [
        validation.int_tuple(name, 0 if origin is None else origin, rank, minimum=0)
        for name, origin in (("query_origin", query_origin), ("key_origin", key_origin))
    ]
    validation.check_boxes(extents, query_shape, origins[0], key_shape, origins[1])
    return extents, *origins


# What a public function is asked for beside its tensors: the seven parameters of the window, scale
# and softcap, backend, the values of Config's fields, and grid, query_origin and key_origin.
_Asked = tuple[tuple[Any, ...], tuple[Any, Any], Any, tuple[Any, ...], tuple[Any, Any, Any]]


def _parameters(tensors: Tensors, rank: int | None, heads_kv: int, asked: _Asked) -> Parameters:
    """The operator's parameters for the arguments of a public function, which are checked; whether
    gradients are needed is left open."""
    window, (scale, softcap), backend, knobs, boxes = asked
    query, key, value = separated(tensors, heads_kv)
    rank = validation.check_qkv(query, key, value, rank)
    *sizes, is_circular, upsampling, clip_window = window
    query_shape, key_shape = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    factors = validation.int_tuple("upsampling", 1 if upsampling is None else upsampling, rank)
    is_upsampled = any(factor != 1 for factor in factors)
    if is_upsampled and any(box is not None for box in boxes):
        raise ValueError("upsampling is of a whole grid, and does not go with grid=")
    placed = () if is_upsampled else _boxes(query, key, *boxes)
    grid = placed[0] if placed else key_shape
    if validation.optional_bool("clip_window", clip_window):
        sizes = [*validation.clipped_window(grid, *sizes[:3]), *sizes[3:]]
    kernel_size, stride, dilation, is_causal = validation.check_window(grid, *sizes)
    rings = validation.check_circular(is_circular, grid, kernel_size, stride, dilation, is_causal)
    if is_upsampled:
        validation.check_upsampling(factors, query_shape, key_shape, dilation, tensors.rpb)
        placed = (grid, (0,) * rank, (0,) * rank, factors)
    elif rings and placed:
        validation.check_rings(rings, grid, query_shape, key_shape, *placed[1:])
    validation.check_additional(query, key, value, *tensors[4:6])
    validation.check_lengths(tensors.additional_lengths, query, tensors.additional_keys)
    validation.check_rpb(tensors.rpb, query, kernel_size, is_causal)
    validation.check_sink(tensors.sink, query)
    validation.check_mask("key_mask", tensors.key_mask, key)
    validation.check_mask("query_mask", tensors.query_mask, query)
    checked_knobs = validation.check_knobs(rank, knobs)
    name = parse_name(backend, FNA)
    encoded = encode_window(kernel_size, stride, dilation, is_causal, *placed, is_circular=rings)
    return Parameters(
        heads_kv,
        encoded,
        validation.check_scale(scale, query.shape[-1]),
        validation.check_softcap(softcap),
        0,
        0,
        name,
        encode_config(*checked_knobs),
        False,
    )


def _is_full(tensors: Tensors, window: tuple[Any, ...], knobs: tuple[Any, ...], grid: Any) -> bool:
    """Whether plain attention computes the call: every query sees every key, or every earlier one
    on one axis, and nothing else is asked for."""
    query, key = tensors.query, tensors.key
    shapes = [tuple(tensor.shape[1:-2]) for tensor in (query, key) if tensor is not None]
    rank = len(shapes[0])
    shapes.append(shapes[0] if grid is None else validation.int_tuple("grid", grid, rank, 0))
    kernel_size, stride, dilation, is_causal, *_, clip_window = window
    if clip_window:
        sizes = (kernel_size, stride, dilation)
        kernel_size, stride, dilation = validation.clipped_window(shapes[-1], *sizes)
    checked = validation.check_window(shapes[-1], kernel_size, stride, dilation, is_causal)
    kernel_size, _, _, is_causal = checked
    if any(is_causal) and (rank > 1 or tensors.additional_keys is not None):
        return False
    if tensors.rpb is not None or any(knob is not None for knob in knobs[:5]):
        return False
    return all(
        is_known(size == extent)
        for shape in shapes
        for size, extent in zip(kernel_size, shape, strict=True)
    )


def _refuse_separate(softcap: Any, sink: Any, key_mask: Any, query_mask: Any) -> None:
    """Decline what the attention that users set up by themselves does not take."""
    given = {"softcap": validation.check_softcap(softcap) or None, "sink": sink}
    for name, value in (given | {"key_mask": key_mask, "query_mask": query_mask}).items():
        if value is not None:
            raise NotImplementedError(
                f"{name} and attention_kwargs, which make a part an attention of its own, do not "
                "go together without try_fuse_additional_kv=True"
            )


def _attend_separately(
    rank: int | None,
    tensors: Tensors,
    asked: _Asked,
    parameters: Parameters,
    is_full: bool,
    attention_kwargs: AttentionKwargs,
) -> tuple[Tensor, Tensor]:
    """With the user's attention_kwargs, for whatever is plain attention."""
    query, key, value, _, additional_keys, additional_values, *_ = tensors
    config = decode_config(parameters.config)

    def attend_to(keys: Tensor, values: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        named = {
            "scale": parameters.scale,
            "backend": f"{parameters.backend}-{FMHA}" if parameters.backend else None,
            "backward_use_pt_reduction": config.backward_use_pt_reduction,
            "run_persistent_kernel": config.run_persistent_kernel,
            "kernel_schedule": config.kernel_schedule,
            "torch_compile": config.torch_compile,
            "is_causal": is_causal,
            **attention_kwargs,
            "return_lse": True,
        }
        out, lse = attention(flat(query), flat(keys), flat(values), **named)
        return out, lse

    if is_full and key is not None and value is not None:
        # On one axis, is_causal is the last of four values.
        is_causal = query.dim() == 4 and parameters.window[3] == CAUSAL
        out, lse = attend_to(key, value, is_causal)
    else:
        own = tensors._replace(additional_keys=None, additional_values=None)
        out, lse = attend(own, (rank, 0, asked), _parameters)
        out, lse = flat(out), lse.flatten(1, -2)
    if additional_keys is not None and additional_values is not None:
        context = attend_to(additional_keys, additional_values, False)
        out, lse = merge_attentions([out, context[0]], [lse, context[1]], return_lse=True)
    tokens = query.shape[1:-2]
    return torch.unflatten(out, 1, tokens), torch.unflatten(lse, 1, tokens)


def _unless(default: Any, value: Any) -> Any:
    """A value, or one for each axis; None where that is the default throughout."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return None if all(v is None or v == default for v in values) else value


def _attend_sharded(
    rank: int | None, tensors: Tensors, asked: _Asked, attention_kwargs: AttentionKwargs | None
) -> tuple[Tensor, Tensor]:
    """Where the grid is sharded over ranks."""
    (*window, is_circular, upsampling, clip_window), scores, backend, knobs, placed = asked
    grid, query_origin, key_origin = placed
    named = zip(fields(DEFAULT_CONFIG), knobs, NO_KNOBS, strict=True)
    given = {f.name: None if knob == default else knob for f, knob, default in named}
    given |= dict(
        attention_kwargs=attention_kwargs, grid=grid, query_origin=query_origin,
        key_origin=key_origin, upsampling=_unless(1, upsampling),
    )  # fmt: skip
    if validation.optional_bool("clip_window", clip_window):
        window[:3] = validation.clipped_window(sharded.grid_of(tensors.query), *window[:3])
    parts = (*tensors[:7], tensors.additional_lengths, tensors.key_mask, tensors.query_mask)
    return sharded.attend(rank, parts, (*window, is_circular), scores, backend, given)


def _neighborhood_attention(
    rank: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: KernelSizes,
    stride: IntOrWindows | None = 1,
    dilation: IntOrWindows | None = 1,
    is_causal: BoolOrSequence | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: AttentionKwargs | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    torch_compile: bool = False,
    try_fuse_additional_kv: bool = False,
    *,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_circular: BoolOrSequence | None = False,
    upsampling: IntOrSequence | None = 1,
    clip_window: bool = False,
    grid: Sequence[int] | None = None,
    query_origin: Sequence[int] | None = None,
    key_origin: Sequence[int] | None = None,
) -> Any:
    """The functions below; ``rank`` is how many axes of tokens there must be, None for any."""
    windows = validation.head_windows(kernel_size, stride, dilation)
    if windows is not None:
        tensors = Tensors(
            query, key, value, rpb, additional_keys, additional_values, sink,
            additional_lengths=additional_lengths, key_mask=key_mask, query_mask=query_mask,
        )  # fmt: skip
        return _over_heads(
            rank, tensors, windows, return_lse, is_causal=is_causal, scale=scale,
            attention_kwargs=attention_kwargs, backend=backend, q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape, backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape, backward_kv_splits=backward_kv_splits,
            backward_use_pt_reduction=backward_use_pt_reduction,
            run_persistent_kernel=run_persistent_kernel, kernel_schedule=kernel_schedule,
            torch_compile=torch_compile, try_fuse_additional_kv=try_fuse_additional_kv,
            softcap=softcap, is_circular=is_circular, upsampling=upsampling,
            clip_window=clip_window, grid=grid, query_origin=query_origin, key_origin=key_origin,
        )  # fmt: skip
    if clip_window and rpb is not None:
        rpb = _middle(rpb, query, key, (kernel_size, stride, dilation, is_causal), grid)
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value, additional_keys, additional_values = autocast(
            dtype, query, key, value, additional_keys, additional_values
        )
    tensors = Tensors(
        query, key, value, rpb, additional_keys, additional_values, sink,
        additional_lengths=additional_lengths, key_mask=key_mask, query_mask=query_mask,
    )  # fmt: skip
    window = (kernel_size, stride, dilation, is_causal, is_circular, upsampling, clip_window)
    knobs = (
        q_tile_shape,
        kv_tile_shape,
        backward_q_tile_shape,
        backward_kv_tile_shape,
        backward_kv_splits,
        backward_use_pt_reduction,
        run_persistent_kernel,
        kernel_schedule,
        torch_compile,
    )
    asked = (window, (scale, softcap), backend, knobs, (grid, query_origin, key_origin))
    validation.optional_bool("try_fuse_additional_kv", try_fuse_additional_kv)
    validation.optional_bool("return_lse", return_lse)
    if sharded.current is not None or sharded.is_dtensor(query):
        out, lse = _attend_sharded(rank, tensors, asked, attention_kwargs or None)
        return (out, lse) if return_lse else out
    if attention_kwargs and not try_fuse_additional_kv:
        validation.check_mapping("attention_kwargs", attention_kwargs)
        _refuse_separate(softcap, sink, key_mask, query_mask)
        parameters = _parameters(tensors, rank, 0, asked)
        is_full = _is_full(tensors, window, knobs, grid)
        if is_full or additional_keys is not None:
            if additional_lengths is not None:
                raise NotImplementedError(
                    "additional_lengths and attention_kwargs, which make additional keys an "
                    "attention of their own, do not go together without try_fuse_additional_kv=True"
                )
            out, lse = _attend_separately(
                rank, tensors, asked, parameters, is_full, attention_kwargs
            )
            return (out, lse) if return_lse else out
    if (
        isinstance(additional_lengths, Tensor)
        and isinstance(additional_keys, Tensor)
        and additional_keys.dim() == 4
    ):
        # What they hold; all else is remembered once it is checked.
        most = additional_keys.shape[1]
        validation.check_length_values("additional_lengths", additional_lengths, most)
    out, lse = attend(tensors, (rank, 0, asked), _parameters)
    return (out, lse) if return_lse else out


def _middle(rpb: Tensor, query: Tensor, key: Tensor, window: tuple[Any, ...], grid: Any) -> Tensor:
    """The biases of a window that is clipped, of those of the whole one."""
    extents = sharded.grid_of(key)
    if grid is not None:
        extents = validation.int_tuple("grid", grid, len(extents), minimum=0)
    sizes = validation.int_tuple("kernel_size", window[0], len(extents))
    is_causal = validation.bool_tuple("is_causal", window[3] or False, len(extents))
    validation.check_rpb(rpb, query, sizes, is_causal)
    return middle(rpb, list(validation.clipped_window(extents, *window[:3])[0]))


def middle(rpb: Tensor, kernel_size: list[int]) -> Tensor:
    """The biases of a window, of those of a larger one; also in TorchScript."""
    for axis in range(len(kernel_size)):
        k = kernel_size[axis]
        rpb = rpb.narrow(axis + 1, (rpb.shape[axis + 1] + 1) // 2 - k, 2 * k - 1)
    return rpb


def _over_heads(
    rank: int | None,
    tensors: Tensors,
    windows: list[tuple[Any, ...]],
    return_lse: bool,
    **options: Any,
) -> Any:
    """Where each of some equal groups of heads has a window of its own: launches for each on views
    of shared tensors, where `_shared` takes the call, or a call each."""
    query, key, value = separated(tensors, 0)
    validation.check_qkv(query, key, value, rank)
    validation.check_additional(query, key, value, *tensors[4:6])
    heads, heads_kv, groups = query.shape[-2], key.shape[-2], len(windows)
    validation.check_head_groups(groups, heads, heads_kv)
    shared = None if heads_kv % groups else _shared(rank, tensors, windows, options)
    if shared is not None:
        out, statistics = shared
        return (out, torch.cat([*statistics], -1)) if return_lse else out
    biases = [None] * groups if tensors.rpb is None else _biases(tensors, windows, options)
    validation.check_sink(tensors.sink, query)
    of_heads = [
        ("query", query, -2), ("key", key, -2), ("value", value, -2), ("sink", tensors.sink, 0),
        ("additional_keys", tensors.additional_keys, -2),
        ("additional_values", tensors.additional_values, -2),
    ]  # fmt: skip
    parts = {name: of_groups(tensor, groups, dim) for name, tensor, dim in of_heads}
    parts["rpb"] = [of_groups(bias, groups, 0)[group] for group, bias in enumerate(biases)]
    results = [
        _neighborhood_attention(
            rank, **{name: of_group[group] for name, of_group in parts.items()},
            kernel_size=kernel_size, stride=stride, dilation=dilation, return_lse=True,
            additional_lengths=tensors.additional_lengths, key_mask=tensors.key_mask,
            query_mask=tensors.query_mask, **options,
        )
        for group, (kernel_size, stride, dilation) in enumerate(windows)
    ]  # fmt: skip
    out = torch.cat([out for out, _ in results], -2)
    return (out, torch.cat([lse for _, lse in results], -1)) if return_lse else out


def _shared(
    rank: int | None, tensors: Tensors, windows: list[tuple[Any, ...]], options: dict[str, Any]
) -> tuple[Tensor, Sequence[Tensor]] | None:
    """`attend_groups`, for what it takes."""
    others = (*tensors[3:9], options["attention_kwargs"], sharded.current)
    if any(other is not None for other in others) or sharded.is_dtensor(tensors.query):
        return None
    validation.optional_bool("try_fuse_additional_kv", options["try_fuse_additional_kv"])
    dtype = autocast_dtype(tensors.query)
    if dtype is not None:
        query, key, value = autocast(dtype, *tensors[:3])
        tensors = tensors._replace(query=query, key=key, value=value)
    names = ("is_causal", "is_circular", "upsampling", "clip_window")
    more = tuple([options[name] for name in names])
    knobs = tuple([options[field.name] for field in fields(DEFAULT_CONFIG)])
    boxes = tuple([options[name] for name in ("grid", "query_origin", "key_origin")])
    scores = (options["scale"], options["softcap"])
    asked = [((*window, *more), scores, options["backend"], knobs, boxes) for window in windows]
    return attend_groups(tensors, [(rank, 0, part) for part in asked], _parameters)


def _biases(tensors: Tensors, windows: list[tuple[Any, ...]], options: dict[str, Any]) -> list[Any]:
    """The biases of all heads for the window of each group, of those of the largest window."""
    query, key, rpb = tensors.query, tensors.key, tensors.rpb
    grid = options["grid"]
    extents = sharded.grid_of(query if key is None else key)
    if grid is not None:
        extents = validation.int_tuple("grid", grid, len(extents), minimum=0)
    is_causal = validation.bool_tuple("is_causal", options["is_causal"] or False, len(extents))
    sizes = [
        # What is clipped, is so later.
        validation.int_tuple("kernel_size", kernel_size, len(extents))
        if options["clip_window"]
        else validation.check_window(extents, kernel_size, stride, dilation, is_causal)[0]
        for kernel_size, stride, dilation in windows
    ]
    largest = tuple(map(max, *sizes)) if len(sizes) > 1 else sizes[0]
    validation.check_rpb(rpb, query, largest, is_causal)
    return [rpb if rpb is None else middle(rpb, list(size)) for size in sizes]


def packed_attention(
    qkv: Tensor,
    heads_kv: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float | None = None,
    rpb: Tensor | None = None,
    origin: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    backend: str | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_circular: BoolOrSequence | None = False,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention of heads that one projection made, and its logsumexp.

    As :func:`neighborhood_attention_generic` of the three parts of ``qkv``, with one gradient: the
    backward pass writes the three parts where they belong, and there is nothing to concatenate.

    Args:
        qkv: ``[batch, *tokens, heads + 2 * heads_kv, head_dim]``: the heads of query, of key and
            of value, in this order.
        heads_kv: Heads of key and of value; heads is a multiple of it.
        kernel_size, stride, dilation, is_causal, scale, rpb, backend, softcap, sink, key_mask,
            query_mask, is_circular: As there.
        origin: Where the box starts in the grid.
        grid: Extents of the whole grid, of which the tokens are a box; default the tokens' own.
    """
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = autocast(dtype, qkv)
    tensors = Tensors(
        qkv, None, None, rpb, sink=sink, key_mask=key_mask, query_mask=query_mask
    )  # fmt: skip
    validation.check_positive_int("heads_kv", heads_kv)
    window = (kernel_size, stride, dilation, is_causal, is_circular, 1, False)
    boxes = (grid, origin, origin)
    asked = (window, (scale, softcap), backend, NO_KNOBS, boxes)
    if sharded.current is not None or sharded.is_dtensor(qkv):
        unpacked = tensors._replace(**dict(zip(Tensors._fields, separated(tensors, heads_kv))))
        return _attend_sharded(None, unpacked, asked, None)
    return attend(tensors, (None, heads_kv, asked), _parameters)


# As Python names it where an argument is missing or unknown.
_neighborhood_attention.__qualname__ = "neighborhood_attention"


class Options(TypedDict, total=False):
    """What type checkers take by name only."""

    attention_kwargs: AttentionKwargs | None
    backend: str | None
    q_tile_shape: Sequence[int] | None
    kv_tile_shape: Sequence[int] | None
    backward_q_tile_shape: Sequence[int] | None
    backward_kv_tile_shape: Sequence[int] | None
    backward_kv_splits: Sequence[int] | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: str | KernelSchedule | None
    torch_compile: bool
    try_fuse_additional_kv: bool
    rpb: Tensor | None
    additional_lengths: Tensor | None
    softcap: float | None
    sink: Tensor | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    is_circular: BoolOrSequence | None
    upsampling: IntOrSequence | None
    clip_window: bool
    grid: Sequence[int] | None
    query_origin: Sequence[int] | None
    key_origin: Sequence[int] | None


class NeighborhoodAttention(Protocol):
    """The signature of the functions below, whose result depends on ``return_lse``."""

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: KernelSizes,
        stride: IntOrWindows | None = 1, dilation: IntOrWindows | None = 1,
        is_causal: BoolOrSequence | None = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: Literal[False] = False, **options: Unpack[Options],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: KernelSizes,
        stride: IntOrWindows | None = 1, dilation: IntOrWindows | None = 1,
        is_causal: BoolOrSequence | None = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: Literal[True], **options: Unpack[Options],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel_size: KernelSizes,
        stride: IntOrWindows | None = 1, dilation: IntOrWindows | None = 1,
        is_causal: BoolOrSequence | None = False, scale: float | None = None,
        additional_keys: Tensor | None = None, additional_values: Tensor | None = None,
        *, return_lse: bool, **options: Unpack[Options],
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


_without_rank = without_rank(_neighborhood_attention)
_public: Callable[[Callable[..., Any]], NeighborhoodAttention] = _without_rank


@_public
def neighborhood_attention_generic(*arguments: Any, **named: Any) -> Any:
    """Neighborhood attention over 1, 2 or 3 axes of tokens, as many as the tensors have.

    Every query attends to the window of ``kernel_size`` keys around it (:mod:`natten.window` has
    the definition), and to all additional keys, in one softmax::

        out = softmax(scale * query @ keys.T + bias) @ values

    Args:
        query: ``[batch, *tokens, heads, head_dim]``, any floating dtype.
        key: ``[batch, *tokens, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``.
        kernel_size: Window size; at most the number of tokens along the axis. -1 (or None, of one
            axis) is everything along it, where dilation divides the tokens. A list of windows, as
            ``[(3, 3), (7, 7)]``, gives each of so many equal groups of heads its own, one launch
            of each kernel for each; so do lists for stride and dilation.
        stride: Queries that share one window; at most kernel_size. stride == kernel_size is
            blocked attention.
        dilation: Distance of neighbors; kernel_size * dilation is at most the number of tokens.
        is_causal: Whether queries attend to no later token, for each axis.
        scale: Factor on the dot products; None means head_dim ** -0.5.
        additional_keys: ``[batch, context, heads_kv, head_dim]``, seen by every query.
        additional_values: ``[batch, context, heads_kv, head_dim_v]``.
        attention_kwargs: Arguments for :func:`natten.attention` where it computes a part: the
            additional keys, or all where the window is the whole grid. If given and not empty,
            additional keys are computed separately and merged.
        backend: None for the first that can run the call, or a name such as "cutlass-fna".
        q_tile_shape: Query tile of the forward pass, one of
            ``natten.get_configs_for_cutlass_fna(query, key, value)`` and its like.
        kv_tile_shape: Key tile that goes with it.
        backward_q_tile_shape: Query tile of the backward pass.
        backward_kv_tile_shape: Key tile that goes with it.
        backward_kv_splits: Key tiles that the backward pass may work on in parallel.
        backward_use_pt_reduction: Compute the backward pass's row sums with torch.
        run_persistent_kernel: Persistent tile scheduling, where the backend has both.
        kernel_schedule: "non", "coop", "pp" (Hopper; see the page on backends) or None.
        torch_compile: Compile FlexAttention, if ``natten.allow_flex_compile()`` allows it.
        try_fuse_additional_kv: Keep additional keys in one kernel even if attention_kwargs are
            given, which are then not used.
        return_lse: Also return the logsumexp.
        rpb: Relative position bias ``[heads, 2 * kernel_size - 1 for each axis]``; entry
            ``key position - query position + kernel_size - 1`` of the dilation group is added to
            the scaled dot product. Of windows of groups of heads, it is that of the largest along
            each axis, and smaller ones use its middle. Not for causal axes; around a circular one,
            the position of
            the key is the one inside the window, before the first or after the last as need be.
        additional_lengths: Integers ``[batch]``, from 0 to context: how many of the additional
            keys, the first ones, each batch entry has. The others are neither read nor get a
            gradient other than 0, whatever they hold; short contexts cost less than long ones.
            None: all. Values out of range raise where looking is free, on the CPU; elsewhere they
            count as 0 and context.
        softcap: Bound c of the scaled dot products s, which become ``c * tanh(s / c)`` before the
            bias is added and the window is cut out, as in FlashAttention and Gemma; None or 0 for
            none. Those of additional keys as well.
        sink: A logit of each head ``[heads]``, any floating dtype, that joins every query's softmax
            with a value of zero: queries may attend to nothing. It takes part in the logsumexp and
            gets a gradient.
        key_mask: bool ``[batch, *tokens of key]``, True for valid keys. The others are seen by no
            query and get gradients of 0, whatever they hold.
        query_mask: bool ``[batch, *tokens of query]``, True for valid queries. The others get
            0 and -inf, with a sink too, and gradients of 0, whatever they hold.
        is_circular: Whether windows wrap around, for each axis: the last token is a neighbor of
            the first. There, dilation divides the number of tokens, and stride that of each
            dilation group; query and key hold all tokens.
        upsampling: Queries of each key, for each axis: query has upsampling times as many tokens
            as key, and query i the window of key ``i // upsampling``, whose kernel_size, stride
            and kind are those of the grid of keys. Dilation is 1 there; not with rpb or grid.
        clip_window: Make do with a grid that is too small instead of raising: along each axis
            dilation is at most the number of tokens, kernel_size at most the tokens of the
            smallest dilation group, and stride at most kernel_size. Of rpb, which is that of the
            whole window, the middle is used.
        grid: Extents of the whole grid, where query and key hold boxes of it. Windows are
            placed in the grid, and keys outside of the key box are left out.
        query_origin: Where query's box starts in the grid; default 0.
        key_origin: Where key's box starts in the grid; default 0.

    Returns:
        ``[batch, *tokens, heads, head_dim_v]`` in query's dtype, and with ``return_lse`` the
        natural logarithm of the sum of exponentials, ``[batch, *tokens, heads]`` in float32
        (float64 for float64). A query with no key gets 0 and -inf, or with a sink 0 and the sink.
        Both are differentiable.

    Raises:
        ValueError: An argument is wrong by itself, or does not fit the others.
        NotImplementedError: No backend, or not the one named, runs such a call.
        RuntimeError: The backend named needs something that this machine lacks.

    References: https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001,
    https://arxiv.org/abs/2504.16922
    """
    return _neighborhood_attention(None, *arguments, **named)


@_public
def na1d(*arguments: Any, **named: Any) -> Any:
    """1-D neighborhood attention.

    :func:`neighborhood_attention_generic` for tensors with one axis of tokens:

    Args:
        query: ``[batch, X, heads, head_dim]``, any floating dtype.
        key: ``[batch, X, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, X, heads_kv, head_dim_v]``.
        kernel_size: Window size; an int stands for every axis.

    All other arguments, what is returned and what is raised are as documented there.

    Raises:
        ValueError: The tensors do not have 4 dimensions, or as documented there.
    """
    return _neighborhood_attention(1, *arguments, **named)


@_public
def na2d(*arguments: Any, **named: Any) -> Any:
    """2-D neighborhood attention.

    :func:`neighborhood_attention_generic` for tensors with 2 axes of tokens:

    Args:
        query: ``[batch, X, Y, heads, head_dim]``, any floating dtype.
        key: ``[batch, X, Y, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, X, Y, heads_kv, head_dim_v]``.
        kernel_size: Window size; an int stands for every axis.

    All other arguments, what is returned and what is raised are as documented there.

    Raises:
        ValueError: The tensors do not have 5 dimensions, or as documented there.
    """
    return _neighborhood_attention(2, *arguments, **named)


@_public
def na3d(*arguments: Any, **named: Any) -> Any:
    """3-D neighborhood attention.

    :func:`neighborhood_attention_generic` for tensors with 3 axes of tokens:

    Args:
        query: ``[batch, X, Y, Z, heads, head_dim]``, any floating dtype.
        key: ``[batch, X, Y, Z, heads_kv, head_dim]``; heads is a multiple of heads_kv.
        value: ``[batch, X, Y, Z, heads_kv, head_dim_v]``.
        kernel_size: Window size; an int stands for every axis.

    All other arguments, what is returned and what is raised are as documented there.

    Raises:
        ValueError: The tensors do not have 6 dimensions, or as documented there.
    """
    return _neighborhood_attention(3, *arguments, **named)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrSequence,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_circular: BoolOrSequence | None = False,
    upsampling: IntOrSequence | None = 1,
    clip_window: bool = False,
    torch_compile: bool = False,
    grid: Sequence[int] | None = None,
    query_origin: Sequence[int] | None = None,
    key_origin: Sequence[int] | None = None,
) -> Explanation:
    """Who would run :func:`neighborhood_attention_generic` so called, and why the others would not.

    Nothing is computed. ``print(natten.explain(query, key, value, 7))`` shows a table; the result
    also has the fields ``chosen`` (a name for ``backend=``) and ``decisions``.

    Raises:
        ValueError, NotImplementedError: As the call itself would, for wrong arguments.
        NotImplementedError: Windows of groups of heads, of which each is a call of its own.
    """
    if validation.head_windows(kernel_size, stride, dilation) is not None:
        raise NotImplementedError(
            "explain is of one call, and windows of groups of heads are one for each group: give "
            f"one of them, got kernel_size={kernel_size}, stride={stride}, dilation={dilation}"
        )
    if clip_window and rpb is not None:
        rpb = _middle(rpb, query, key, (kernel_size, stride, dilation, is_causal), grid)
    knobs = (None, None, None, None, None, False, True, None, torch_compile)
    tensors = Tensors(
        query, key, value, rpb, additional_keys, additional_values, sink,
        additional_lengths=additional_lengths, key_mask=key_mask, query_mask=query_mask,
    )  # fmt: skip
    window = (kernel_size, stride, dilation, is_causal, is_circular, upsampling, clip_window)
    asked = (window, (scale, softcap), None, knobs, (grid, query_origin, key_origin))
    parameters = _parameters(tensors, None, 0, asked)
    problem = make_problem(tensors, parameters._replace(requires_grad=needs_grad(tensors)))
    return explain_problem(problem, decode_config(parameters.config))
