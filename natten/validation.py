"""Checks of arguments: ints to tuples, tensors against each other, texts of errors.

The caller's mistakes raise ValueError here, kinds of tensors that no backend takes raise
NotImplementedError. Texts name the argument, what was expected and what was got.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from natten.types import KernelSchedule

# Kernels count tokens along an axis in 32 bits.
_LARGEST = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# Sequences, but of letters and bytes.
_TEXTS = (str, bytes, bytearray, memoryview)


def shown(value: object) -> str:
    """What an error says of a wrong value: tensors by their shapes, and nothing at length."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({type(value).__name__})"


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt, Integral))


def int_tuple(name: str, value: Any, rank: int, minimum: int = 1) -> tuple[Any, ...]:
    """One integer per axis, from an int (repeated) or a sequence of ``rank`` of them."""
    if _is_int(value):
        values: tuple[Any, ...] = (value,) * rank
    elif isinstance(value, Sequence) and not isinstance(value, _TEXTS):
        values = tuple(value)
    else:
        raise ValueError(f"{name} must be an int or a sequence of {rank} ints, got {shown(value)}")
    if len(values) != rank:
        raise ValueError(f"{name} must have {rank} values, one for each axis, got {shown(value)}")
    for v in values:
        if not _is_int(v) or v < minimum:
            raise ValueError(f"{name} must hold integers of at least {minimum}, got {shown(value)}")
        if not isinstance(v, torch.SymInt) and v > _LARGEST:
            raise ValueError(f"{name} must hold integers of at most {_LARGEST}, got {shown(value)}")
    # int() turns bools and numpy's integers into plain ones; a SymInt must stay what it is.
    return tuple([v if isinstance(v, torch.SymInt) else int(v) for v in values])


def bool_tuple(name: str, value: Any, rank: int) -> tuple[bool, ...]:
    """One bool per axis, from a bool (repeated) or a sequence of ``rank`` of them."""
    values = value if isinstance(value, (tuple, list)) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name} must have {rank} values, one for each axis, got {shown(value)}")
    for v in values:
        if not isinstance(v, bool):
            raise ValueError(
                f"{name} must be a bool or a sequence of {rank} bools, got {shown(value)}"
            )
    return tuple(values)


def optional_bool(name: str, value: Any) -> bool:
    """Check a flag, which is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {shown(value)}")
    return value


def check_mapping(name: str, value: Any) -> None:
    """Arguments by name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict of arguments by name or None, got {shown(value)}")


def check_positive_int(name: str, value: Any) -> None:
    """Check a count, which is at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {shown(value)}")


def check_scale(scale: Any, head_dim: int, name: str = "scale") -> float:
    """The scale as a float; None means ``head_dim ** -0.5``, and 0.0 is 0.0."""
    if scale is None:
        return float(head_dim) ** -0.5 if head_dim else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymFloat)):
        raise ValueError(f"{name} must be a number or None, got {shown(scale)}")
    try:
        number = float(scale)
    except OverflowError:
        number = inf
    # Compilers may keep it symbolic; the operator looks again.
    if not torch.compiler.is_compiling() and not isfinite(number):
        raise ValueError(f"{name} must be a finite number or None, got {shown(scale)}")
    return number


def _warn_of_flags(dilation: Any) -> None:
    """Warn if dilation is what only is_causal can be: the sixth argument up to NATTEN 0.17."""
    values = dilation if isinstance(dilation, (tuple, list)) else (dilation,)
    if any(isinstance(v, bool) for v in values):
        warnings.warn(
            f"dilation got {shown(dilation)}: by position, the arguments after kernel_size are "
            "stride, dilation and is_causal, and were dilation and is_causal up to NATTEN 0.17. "
            "Write dilation= and is_causal= by name",
            UserWarning,
            stacklevel=2,
        )


def _kernel_tuple(kernel_size: Any, rank: int) -> tuple[int, ...]:
    """Window sizes, with -1 for everything along an axis."""
    given = kernel_size
    if isinstance(given, (tuple, list)):
        given = [-1 if k is None else k for k in given]
    if not any(_is_int(k) and k == -1 for k in (given if isinstance(given, list) else [given])):
        return int_tuple("kernel_size", given, rank)
    sizes = int_tuple("kernel_size", given, rank, minimum=-1)
    if 0 in sizes:
        raise ValueError(
            "kernel_size must hold integers of at least 1, or -1 for everything along an axis, "
            f"got {shown(kernel_size)}"
        )
    return sizes


def _everything(length: int, dilation: int) -> int:
    """The window of all tokens along an axis, or of all that have its dilation."""
    if length % dilation:
        raise ValueError(
            "kernel_size=-1, everything along an axis, goes with a dilation that divides its "
            f"tokens, got dilation={dilation} for {length} tokens"
        )
    # An axis without tokens has no windows to fit.
    return max(length // dilation, 1)


def clipped_window(
    grid: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """kernel_size, stride and dilation no larger than ``grid`` has room for.

    Along each axis dilation is at most the number of tokens, then kernel_size at most the tokens of
    the smallest dilation group, then stride at most kernel_size.
    """
    rank = len(grid)
    lengths = [max(n, 1) for n in grid]
    dilations = int_tuple("dilation", 1 if dilation is None else dilation, rank)
    dilations = tuple(map(min, dilations, lengths))
    room = [n // d for n, d in zip(lengths, dilations, strict=True)]
    # -1 stays what it is.
    kernel = tuple(map(min, _kernel_tuple(kernel_size, rank), room))
    strides = int_tuple("stride", 1 if stride is None else stride, rank)
    most = [n if k == -1 else k for k, n in zip(kernel, room, strict=True)]
    return kernel, tuple(map(min, strides, most)), dilations


def head_windows(*sizes: Any) -> list[tuple[Any, ...]] | None:
    """kernel_size, stride and dilation of each group of heads, where one of them is a list of
    windows; else None."""
    lists = [
        isinstance(size, (tuple, list)) and len(size) > 0 and isinstance(size[0], (tuple, list))
        for size in sizes
    ]
    if not any(lists):
        return None
    counts = {len(size) for size, is_list in zip(sizes, lists, strict=True) if is_list}
    if len(counts) > 1:
        raise ValueError(
            "kernel_size, stride and dilation must be lists of as many windows, or one window for "
            f"all heads, got {', '.join(map(shown, sizes))}"
        )
    (groups,) = counts
    each = [
        size if is_list else [size] * groups for size, is_list in zip(sizes, lists, strict=True)
    ]
    return list(zip(*each, strict=True))


def check_head_groups(groups: int, heads: int, heads_kv: int) -> None:
    """Check that so many windows go with the heads of query and of key and value."""
    if heads % groups or (heads_kv % groups and groups % heads_kv):
        raise ValueError(
            "windows of groups of heads must divide query's heads, and divide key's or be a "
            f"multiple of them, got {groups} windows for {heads} and {heads_kv} heads"
        )


def check_window(
    grid: tuple[int, ...],
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """kernel_size, stride, dilation and is_causal as tuples that fit ``grid``; a kernel_size of -1
    or None on an axis becomes everything along it."""
    rank = len(grid)
    kernel = _kernel_tuple(kernel_size, rank)
    strides = int_tuple("stride", 1 if stride is None else stride, rank)
    _warn_of_flags(dilation)
    dilations = int_tuple("dilation", 1 if dilation is None else dilation, rank)
    causal = bool_tuple("is_causal", False if is_causal is None else is_causal, rank)
    if -1 in kernel:
        kernel = tuple([
            _everything(n, d) if k == -1 else k
            for k, n, d in zip(kernel, grid, dilations, strict=True)
        ])  # fmt: skip
    for axis in range(rank):
        if strides[axis] > kernel[axis]:
            raise ValueError(
                f"stride must be at most kernel_size along every axis, got stride={strides} and "
                f"kernel_size={kernel}; if dilation is meant, which was the fifth argument up to "
                "NATTEN 0.17, write dilation="
            )
        # An axis without tokens has no windows to fit.
        if kernel[axis] * dilations[axis] > grid[axis] > 0:
            raise ValueError(
                "kernel_size * dilation must be at most the number of tokens along every axis, "
                f"got kernel_size={kernel} and dilation={dilations} for tokens of shape "
                f"{tuple(grid)}; if the first of these is the heads, put them behind the tokens, "
                "[batch, *tokens, heads, head_dim]: x.movedim(1, -2)"
            )
    return kernel, strides, dilations, causal


def check_circular(
    is_circular: Any,
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> tuple[bool, ...]:
    """is_circular as a tuple that fits ``grid`` and a checked window; () if no axis is circular."""
    # Nothing is compared: an array compares to another.
    is_empty = isinstance(is_circular, tuple) and not is_circular
    if is_circular is None or is_circular is False or is_empty:
        return ()
    rank = len(grid)
    rings = bool_tuple("is_circular", is_circular, rank)
    for axis in range(rank):
        if not rings[axis]:
            continue
        if is_causal[axis]:
            raise ValueError(
                "an axis is causal or circular but not both, got "
                f"is_causal={is_causal} and is_circular={rings}"
            )
        if grid[axis] % (dilation[axis] * stride[axis]):
            raise ValueError(
                "along a circular axis, dilation must divide the number of tokens, and stride that "
                f"of each dilation group, got dilation={dilation} and stride={stride} for tokens "
                f"of shape {tuple(grid)}"
            )
    return rings if any(rings) else ()


def check_upsampling(
    factors: tuple[int, ...],
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    dilation: tuple[int, ...],
    rpb: Tensor | None,
) -> None:
    """Check upsampling against the tokens and the window."""
    if query_shape != tuple([factor * n for factor, n in zip(factors, key_shape)]):
        raise ValueError(
            "query must have upsampling times as many tokens as key along every axis, got "
            f"upsampling={factors} with query's token shape {query_shape} and key's {key_shape}"
        )
    if any(factor > 1 and d > 1 for factor, d in zip(factors, dilation)):
        raise ValueError(
            f"dilation must be 1 along an axis with upsampling, got dilation={dilation} and "
            f"upsampling={factors}"
        )
    if rpb is not None:
        raise NotImplementedError(
            f"rpb and upsampling do not go together, got upsampling={factors}"
        )


def check_rings(
    is_circular: tuple[bool, ...],
    grid: tuple[int, ...],
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    query_origin: tuple[int, ...],
    key_origin: tuple[int, ...],
) -> None:
    """Check that query and key hold all of each circular axis."""
    for axis, is_ring in enumerate(is_circular):
        whole = (0, 0, grid[axis], grid[axis])
        if is_ring and whole != (
            query_origin[axis], key_origin[axis], query_shape[axis], key_shape[axis]
        ):  # fmt: skip
            raise ValueError(
                "query and key must hold all tokens along a circular axis, got "
                f"is_circular={is_circular}, grid={grid}, query_origin={query_origin}, key_origin="
                f"{key_origin} and token shapes {query_shape} and {key_shape}"
            )


def check_is_tensor(name: str, tensor: Any) -> None:
    """Accept dense floating-point tensors only."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise NotImplementedError(
            f"{name} is a nested tensor, which is not supported; pack sequences and use "
            "attention's varlen arguments, or pad"
        )
    if tensor.layout is not torch.strided:
        raise NotImplementedError(
            f"{name} must be a dense (strided) tensor, got layout {tensor.layout}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dtype.itemsize < 2:
        raise NotImplementedError(
            f"{name} is {tensor.dtype}, and 8-bit numbers are for natten.float8_attention, with "
            "their scales: cast to bfloat16"
        )


def _check_same(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, rank: int | None = None) -> int:
    """Check query, key and value against each other; returns the number of token axes.

    The extents of the tokens are not compared: that is the caller's part.
    """
    check_is_tensor("query", query)
    check_is_tensor("key", key)
    check_is_tensor("value", value)
    found = query.dim() - 3
    if rank is not None and found != rank:
        raise ValueError(
            f"query must have {rank + 3} dimensions, [batch, {rank} of tokens, heads, head_dim], "
            f"got shape {tuple(query.shape)}; axes of tokens are not flattened, and channels come "
            "last and are split into heads: x.unflatten(-1, (heads, head_dim))"
        )
    if not 1 <= found <= 3:
        raise ValueError(
            "query must have 4, 5 or 6 dimensions, [batch, *tokens, heads, head_dim], got shape "
            f"{tuple(query.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != found + 3:
            raise ValueError(
                f"{name} must have as many dimensions as query ({found + 3}), got shape "
                f"{tuple(tensor.shape)}"
            )
        _check_same(name, tensor, query)
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have query's batch size {query.shape[0]}, got {tensor.shape[0]}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "key and value must match in all dimensions but the last, got "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    check_heads(query, key)
    return found


def check_heads(query: Tensor, key: Tensor) -> None:
    """Check head_dim and the ratio of heads."""
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]}, got {key.shape[-1]}")
    heads, heads_kv = query.shape[-2], key.shape[-2]
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"query's heads must be a multiple of key's and value's, got {heads} and {heads_kv}"
        )


def check_additional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> None:
    """Check additional_keys and additional_values, both given or both None."""
    if additional_keys is None and additional_values is None:
        return
    if additional_keys is None or additional_values is None:
        raise ValueError(
            "additional_keys and additional_values must both be tensors or both None, got only "
            + ("additional_values" if additional_keys is None else "additional_keys")
        )
    for name, tensor, like in (
        ("additional_keys", additional_keys, key),
        ("additional_values", additional_values, value),
    ):
        check_is_tensor(name, tensor)
        _check_same(name, tensor, query)
        batch, heads, dim = query.shape[0], like.shape[-2], like.shape[-1]
        expected = f"[{batch}, tokens, {heads}, {dim}]"
        if (
            tensor.dim() != 4
            or tensor.shape[0] != batch
            or tensor.shape[2] != heads
            or tensor.shape[3] != dim
        ):
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if additional_keys.shape[1] != additional_values.shape[1]:
        raise ValueError(
            "additional_keys and additional_values must have as many tokens, got "
            f"{additional_keys.shape[1]} and {additional_values.shape[1]}"
        )


def check_lengths(lengths: Tensor | None, query: Tensor, additional_keys: Tensor | None) -> None:
    """Check additional_lengths: how many of the additional keys each batch entry has."""
    if lengths is None:
        return
    if additional_keys is None:
        raise ValueError("additional_lengths needs additional_keys and additional_values")
    if not isinstance(lengths, Tensor):
        raise ValueError(f"additional_lengths must be a torch.Tensor, got {type(lengths).__name__}")
    if lengths.shape != query.shape[:1] or lengths.dtype not in _INTEGERS:
        raise ValueError(
            f"additional_lengths must be a tensor of {query.shape[0]} integers, one for each batch "
            f"entry, got shape {tuple(lengths.shape)} and {lengths.dtype}"
        )
    if lengths.device != query.device:
        raise ValueError(
            f"additional_lengths must be on query's device {query.device}, got {lengths.device}"
        )


def check_length_values(name: str, lengths: Tensor, most: int) -> None:
    """Check what lengths hold where looking costs next to nothing: on a CPU, outside of compilers,
    tracers and transforms."""
    # Compilers first: they cannot follow the rest.
    if (
        torch.compiler.is_compiling()
        or type(lengths) is not Tensor
        or not lengths.is_cpu
        or lengths.dim() != 1
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return
    values = lengths.tolist()
    if values and not 0 <= min(values) <= max(values) <= most:
        raise ValueError(f"{name} must hold integers from 0 to {most}, got {values}")


def check_boxes(
    grid: tuple[int, ...],
    query_shape: tuple[int, ...],
    query_origin: tuple[int, ...],
    key_shape: tuple[int, ...],
    key_origin: tuple[int, ...],
) -> None:
    """Check that the boxes of query and key lie inside the grid."""
    for name, origin, shape in (
        ("query", query_origin, query_shape),
        ("key", key_origin, key_shape),
    ):
        if any(o < 0 or o + n > g for o, n, g in zip(origin, shape, grid, strict=True)):
            raise ValueError(
                f"{name}'s box must lie inside the grid, got {name}_origin={origin}, token shape "
                f"{shape} and grid={grid}"
            )


def check_cumulative(
    cumulative_q: Any, cumulative_kv: Any, query: Tensor, suffixes: tuple[str, str] = ("q", "kv")
) -> None:
    """Check the ends of packed sequences, but for what they hold."""
    if cumulative_q is None or cumulative_kv is None:
        raise ValueError(
            f"cumulative_seqlen_{suffixes[0]} and cumulative_seqlen_{suffixes[1]} must both be "
            "tensors when packed sequences are described"
        )
    for suffix, cumulative in zip(suffixes, (cumulative_q, cumulative_kv), strict=True):
        name = f"cumulative_seqlen_{suffix}"
        if not isinstance(cumulative, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(cumulative).__name__}")
        if cumulative.dim() != 1 or cumulative.dtype != torch.int32 or cumulative.shape[0] < 2:
            raise ValueError(
                f"{name} must be a 1-D tensor of int32 with one entry more than sequences, got "
                f"shape {tuple(cumulative.shape)} and {cumulative.dtype}"
            )
        if cumulative.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, got {cumulative.device}")
    if cumulative_q.shape != cumulative_kv.shape:
        raise ValueError(
            f"cumulative_seqlen_{suffixes[0]} and cumulative_seqlen_{suffixes[1]} must have the "
            f"same length, got {cumulative_q.shape[0]} and {cumulative_kv.shape[0]}"
        )


def check_rpb(
    rpb: Tensor | None, query: Tensor, kernel_size: tuple[int, ...], is_causal: tuple[bool, ...]
) -> None:
    """Check the relative position bias."""
    if rpb is None:
        return
    check_is_tensor("rpb", rpb)
    if rpb.device != query.device:
        raise ValueError(f"rpb must be on query's device {query.device}, got {rpb.device}")
    if any(is_causal):
        raise ValueError(f"rpb is defined for bidirectional axes only, got is_causal={is_causal}")
    expected = (query.shape[-2], *[2 * k - 1 for k in kernel_size])
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb must have shape [heads, 2 * kernel_size - 1 for each axis] = {expected}, got "
            f"{tuple(rpb.shape)}"
        )


def check_softcap(softcap: Any) -> float:
    """The bound of scores as a float; 0.0, which None stands for, is none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (Real, torch.SymFloat)):
        raise ValueError(f"softcap must be a number or None, got {shown(softcap)}")
    try:
        number = float(softcap)
    except OverflowError:
        number = inf
    if not torch.compiler.is_compiling() and not (isfinite(number) and number >= 0):
        raise ValueError(
            f"softcap must be a finite number of at least 0, or None, got {shown(softcap)}"
        )
    return number


def check_sink(sink: Tensor | None, query: Tensor) -> None:
    """Check the sink: one logit for each head."""
    if sink is None:
        return
    check_is_tensor("sink", sink)
    if sink.device != query.device:
        raise ValueError(f"sink must be on query's device {query.device}, got {sink.device}")
    if sink.shape != query.shape[-2:-1]:
        raise ValueError(
            f"sink must have shape [heads] = {tuple(query.shape[-2:-1])}, got {tuple(sink.shape)}"
        )


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Check which ``tokens``, the query or the key, are valid."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:-2] or mask.is_nested:
        raise ValueError(
            f"{name} must be a tensor of bools [batch, *tokens] = {tuple(tokens.shape[:-2])}, True "
            f"where a token is valid, got shape {tuple(mask.shape)} and {mask.dtype}"
        )
    if mask.device != tokens.device:
        raise ValueError(f"{name} must be on query's device {tokens.device}, got {mask.device}")


def check_tiles(
    names: tuple[str, str], q_tile: Any, kv_tile: Any, rank: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """A pair of tile shapes, both given or both None."""
    if q_tile is None and kv_tile is None:
        return None, None
    if q_tile is None or kv_tile is None:
        raise ValueError(
            f"{names[0]} and {names[1]} must be given together, got {shown(q_tile)} and "
            f"{shown(kv_tile)}"
        )
    return int_tuple(names[0], q_tile, rank), int_tuple(names[1], kv_tile, rank)


def check_schedule(kernel_schedule: Any) -> str | None:
    """The kernel schedule as a string or None."""
    if kernel_schedule is None:
        return None
    names = list(map(str, KernelSchedule))
    if not isinstance(kernel_schedule, str) or kernel_schedule not in names:
        raise ValueError(
            f"kernel_schedule must be None or one of {names}, got {shown(kernel_schedule)}"
        )
    return str(kernel_schedule)


def check_knobs(rank: int, values: Sequence[Any], suffix: str = "shape") -> tuple[Any, ...]:
    """The values of Config's fields, checked, with tile shapes as tuples.

    Args:
        rank: Axes of tokens.
        values: As the public functions take them, in the order of Config's fields.
        suffix: What the caller's parameters call a tile: "shape" or "size".
    """
    q, kv, backward_q, backward_kv, splits, reduction, persistent, schedule, compiled = values
    tile = ("q_tile_" + suffix, "kv_tile_" + suffix)
    backward_tile = ("backward_" + tile[0], "backward_" + tile[1])
    return (
        *check_tiles(tile, q, kv, rank),
        *check_tiles(backward_tile, backward_q, backward_kv, rank),
        None if splits is None else int_tuple("backward_kv_splits", splits, rank),
        optional_bool("backward_use_pt_reduction", reduction),
        optional_bool("run_persistent_kernel", persistent),
        check_schedule(schedule),
        optional_bool("torch_compile", compiled),
    )
