"""A call of the operator: its tensors, its parameters, and what follows from both but the data.

:class:`Call` is where arguments are validated, wherever they come from: the public functions, a
compiled or exported program, or ``torch.ops.natten``. One is made for each kind of call and then
looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, sym_max

from natten import validation
from natten.functional.backend import Inputs
from natten.functional.problem import Config, Grid, Grids, Problem, decode_config
from natten.window import Axis

# What the operator takes as kernel_size for a window of everything there is along an axis.
EVERYTHING = 0
# What it takes for the windows of an axis.
PLAIN, CAUSAL, CIRCULAR = 0, 1, 2


class Tensors(NamedTuple):
    """The tensors of a call; the first seven are differentiable.

    ``key`` and ``value`` are None where query, key and value are the heads of one tensor, in this
    order: then ``query`` is that tensor.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None
    cumulative_seqlen_q: Tensor | None = None
    cumulative_seqlen_kv: Tensor | None = None
    additional_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None


NUM_TENSORS = len(Tensors._fields)
NUM_DIFFERENTIABLE = Tensors._fields.index("sink") + 1


class Parameters(NamedTuple):
    """The other arguments of the operator, in the order of its schema.

    Attributes:
        heads_kv: Heads of key and of value in a packed query; 0 where they are tensors.
        window: kernel_size, stride, dilation and the kind of window (PLAIN, CAUSAL or CIRCULAR),
            one value per axis each, one after the other. Where the tensors hold boxes of a grid,
            also its extents and the origins of query and key; and after these upsampling, where
            there are more queries than keys. A kernel_size of EVERYTHING is the whole axis. For
            grids of different sizes, see `encode_grids`.
        scale: Factor on the dot products.
        softcap: Bound of the scaled products; 0 for none.
        max_seqlen_q: Longest packed query sequence; 0 without packed sequences.
        max_seqlen_kv: Longest packed key sequence.
        backend: A name of the table in :mod:`natten.functional.dispatch`, or "".
        config: An encoded Config.
        requires_grad: Whether a backward pass may follow.
    """

    heads_kv: int
    window: tuple[int, ...]
    scale: float
    softcap: float
    max_seqlen_q: int
    max_seqlen_kv: int
    backend: str
    config: str
    requires_grad: bool


class Window(NamedTuple):
    """The window's parameters and the boxes, one value per axis each."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    grid: tuple[int, ...]
    query_origin: tuple[int, ...]
    key_origin: tuple[int, ...]
    is_circular: tuple[bool, ...] = ()
    upsampling: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The same along each axis."""
        is_circular = self.is_circular or (False,) * len(self.grid)
        upsampling = self.upsampling or (1,) * len(self.grid)
        return tuple(map(Axis, self.grid, *self[:4], is_circular, upsampling))


def encode_window(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    *boxes: Sequence[int],
    is_circular: Sequence[bool] = (),
) -> tuple[int, ...]:
    """The operator's window; ``boxes`` are the grid and the origins in it of query and key, and
    upsampling, as far as they are needed, ``is_circular`` is empty if no axis is."""
    kinds = [CAUSAL if causal else PLAIN for causal in is_causal]
    for axis, wraps in enumerate(is_circular):
        kinds[axis] = CIRCULAR if wraps else kinds[axis]
    window = (*kernel_size, *stride, *dilation, *kinds)
    for box in boxes:
        window += tuple(box)
    return window


def _check_kinds(kinds: Sequence[int]) -> None:
    for kind in kinds:
        if kind not in (PLAIN, CAUSAL, CIRCULAR):
            raise ValueError(
                "window must hold 0 (plain), 1 (causal) or 2 (circular) for each axis, got "
                f"{list(kinds)}"
            )


def decode_window(
    window: Sequence[int], query_shape: Sequence[int], key_shape: Sequence[int]
) -> Window:
    """The operator's window for boxes of these extents.

    Raises:
        ValueError: Not four, seven or eight values per axis, or boxes of different extents without
            a grid.
    """
    rank = len(query_shape)
    if len(window) not in (4 * rank, 7 * rank, 8 * rank):
        raise ValueError(
            f"window must hold 4, 7 or 8 values for each of {rank} axes, got {list(window)}"
        )
    parts = [tuple(window[i : i + rank]) for i in range(0, len(window), rank)]
    kernel_size, stride, dilation, kinds = parts[:4]
    kernel_size = validation.int_tuple("kernel_size", kernel_size, rank, minimum=EVERYTHING)
    _check_kinds(kinds)
    is_causal = tuple([kind == CAUSAL for kind in kinds])
    is_circular = tuple([kind == CIRCULAR for kind in kinds]) if CIRCULAR in kinds else ()
    zeros = (0,) * rank
    if len(parts) > 4:
        grid, query_origin, key_origin = (
            validation.int_tuple(name, part, rank, minimum=0)
            for name, part in zip(Window._fields[4:7], parts[4:7], strict=True)
        )
    else:
        if tuple(query_shape) != tuple(key_shape) and any(k != EVERYTHING for k in kernel_size):
            raise ValueError(
                "query and key must have the same token shape (or boxes of one grid=), got "
                f"{tuple(query_shape)} and {tuple(key_shape)}"
            )
        grid = tuple(
            [sym_max(sym_max(q, k), 1) for q, k in zip(query_shape, key_shape, strict=True)]
        )
        query_origin = key_origin = zeros
        if EVERYTHING not in kernel_size:
            grid = tuple(query_shape)
    kernel_size = tuple(
        [g if k == EVERYTHING else k for k, g in zip(kernel_size, grid, strict=True)]
    )
    upsampling = validation.int_tuple("upsampling", parts[7], rank) if len(parts) > 7 else ()
    return Window(
        kernel_size, stride, dilation, is_causal, grid, query_origin, key_origin, is_circular,
        upsampling,
    )  # fmt: skip


def encode_grids(
    grids: Grids, is_causal: Sequence[bool], is_circular: Sequence[bool]
) -> tuple[int, ...]:
    """The operator's window for grids of different sizes, one after the other in one batch entry of
    one axis of tokens: the negative rank, the kinds of window of each axis, and for each run of
    grids that are alike their number, and extents, kernel_size, stride and dilation, one value per
    axis each."""
    rank = len(is_causal)
    window = (-rank, *encode_window((), (), (), is_causal, is_circular=is_circular))
    for grid, count in grids.runs:
        window += (count, *[number for part in grid for number in part])
    return window


def decode_grids(window: Sequence[int]) -> tuple[Grids, tuple[bool, ...], tuple[bool, ...]] | None:
    """Grids, and which axes are causal and circular, of a window that `encode_grids` made; None of
    another.

    Raises:
        ValueError: No such numbers.
    """
    if not window or window[0] >= 0:
        return None
    rank = -window[0]
    kinds, numbers = window[1 : 1 + rank], window[1 + rank :]
    size = 1 + 4 * rank
    if rank > 3 or not numbers or len(numbers) % size:
        raise ValueError(
            "window of grids of different sizes must hold a negative rank, a kind for each axis, "
            f"and {size} values for each run of them, got {validation.shown(list(window))}"
        )
    _check_kinds(kinds)
    runs = []
    for start in range(0, len(numbers), size):
        count, *rest = numbers[start : start + size]
        parts = [tuple(rest[i : i + rank]) for i in range(0, 4 * rank, rank)]
        validation.check_positive_int("number of grids", count)
        for name, part, least in zip(Grid._fields, parts, (0, 1, 1, 1), strict=True):
            validation.int_tuple(name, part, rank, least)
        runs.append((Grid(*parts), int(count)))
    is_circular = tuple([kind == CIRCULAR for kind in kinds]) if CIRCULAR in kinds else ()
    return Grids(tuple(runs)), tuple([kind == CAUSAL for kind in kinds]), is_circular


def unpacked(qkv: Tensor, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value, the heads of one tensor."""
    # Tensor.split is Python around this.
    sizes = [qkv.shape[-2] - 2 * heads_kv, heads_kv, heads_kv]
    query, key, value = qkv.split_with_sizes(sizes, -2)
    return query, key, value


def separated(tensors: Tensors, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, whether they are one tensor, of ``heads_kv`` heads, or three."""
    if heads_kv:
        return unpacked(tensors.query, heads_kv)
    # What is missing all the same is for validation to tell.
    return tensors[:3]  # type: ignore[return-value]


def flat(tensor: Tensor) -> Tensor:
    """``[batch, *tokens, heads, features]`` with one axis of tokens."""
    return tensor.flatten(1, -3)


@dataclass(frozen=True, eq=False)
class Call:
    """A validated call.

    Attributes:
        parameters: As the operator takes them.
        problem: What a backend is asked to run: over flattened tokens where every query sees every
            key, whatever the grid.
        config: How.
        is_packed: Whether query, key and value are the heads of one tensor.
        is_flat: Whether the tokens are to be flattened.
        out_shape: Of the output.
    """

    parameters: Parameters
    problem: Problem
    config: Config
    is_packed: bool
    is_flat: bool
    out_shape: tuple[int, ...]

    @cached_property
    def is_empty(self) -> bool:
        """Whether there is no query, or no query sees a key: no backend is asked to run that."""
        problem = self.problem
        has_queries = problem.batch and problem.num_queries and problem.heads
        has_keys = problem.num_keys or problem.num_additional
        if problem.varlen:
            has_queries = has_queries and problem.max_seqlen_q
            # Whose rows see a sink, backends know.
            has_keys = problem.has_sink or (has_keys and problem.max_seqlen_kv)
        return not has_queries or not has_keys

    def prepared(self, tensors: Tensors) -> Inputs:
        """The tensors as backends take them."""
        query, key, value = separated(tensors, self.parameters.heads_kv)
        if self.is_flat:
            query, key, value = flat(query), flat(key), flat(value)
            masks = [None if m is None else m.flatten(1) for m in tensors[-2:]]
            tensors = tensors._replace(key_mask=masks[0], query_mask=masks[1])
        inputs = Inputs(query, key, value, *tensors[3:])
        if inputs.additional_keys is not None and not self.problem.num_additional:
            inputs = inputs._replace(
                additional_keys=None, additional_values=None, additional_lengths=None
            )
        return inputs

    def result(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A result of a backend as the operator returns it."""
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        return tensor.view(shape) if self.is_flat else tensor

    def check_results(
        self, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> None:
        """Check what a backward pass is given beside the tensors.

        Raises:
            ValueError: A tensor that is not the forward pass's result or a gradient of it.
        """
        problem = self.problem
        for name, tensor, shape, dtype in (
            ("out", out, self.out_shape, problem.dtype),
            ("logsumexp", lse, self.out_shape[:-1], problem.accumulation_dtype),
            ("grad_out", grad_out, self.out_shape, problem.dtype),
            ("grad_logsumexp", grad_lse, self.out_shape[:-1], problem.accumulation_dtype),
        ):
            if tensor is not None and (
                tensor.shape != shape or tensor.dtype != dtype or tensor.device != problem.device
            ):
                raise ValueError(
                    f"{name} must have shape {tuple(shape)} and be {dtype} on {problem.device}, "
                    f"got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
                )

    def check_values(self, tensors: Tensors) -> None:
        """Check what integer tensors hold, where looking costs next to nothing: on a CPU."""
        if self.problem.varlen and self.problem.device.type == "cpu":
            for name, ends, tokens, longest in (
                ("Q", tensors.cumulative_seqlen_q, self.problem.num_queries,
                 self.problem.max_seqlen_q),
                ("KV", tensors.cumulative_seqlen_kv, self.problem.num_keys,
                 self.problem.max_seqlen_kv),
            ):  # fmt: skip
                check_ends(name, ends, tokens, longest)


class Run(NamedTuple):
    """Grids of one size that follow each other among others, as a call of its own.

    Attributes:
        call: The call.
        grid: One of them.
        tokens: Where theirs are among all.
        entries: Which of all grids they are.
    """

    call: Call
    grid: Grid
    tokens: slice
    entries: slice

    def of_tokens(self, tensor: Tensor) -> Tensor:
        """``[grids, *extents, ...]`` of ``[1, tokens, ...]``."""
        count = self.entries.stop - self.entries.start
        return tensor[0, self.tokens].unflatten(0, (count, *self.grid.extents))

    def of(self, tensors: Sequence[Tensor | None]) -> Tensors:
        """Their part of a call's tensors, or of what is like them."""
        parts: dict[str, Any] = {}
        for name, tensor in zip(Tensors._fields, tensors, strict=False):
            if tensor is None or name in ("rpb", "sink"):
                parts[name] = tensor
            elif name.startswith("additional"):
                parts[name] = tensor[self.entries]
            else:
                parts[name] = self.of_tokens(tensor)
        return Tensors(**parts)


def runs(call: Call, tensors: Tensors) -> Iterator[Run]:
    """A call of grids of different sizes as calls of those of one size."""
    problem, parameters = call.problem, call.parameters
    token = entry = 0
    for grid, count in problem.grids.runs if problem.grids else ():
        tokens, entries = slice(token, token + count * grid.tokens), slice(entry, entry + count)
        token, entry = tokens.stop, entries.stop
        window = encode_window(
            grid.kernel_size, grid.stride, grid.dilation, problem.is_causal,
            is_circular=problem.is_circular,
        )  # fmt: skip
        run = Run(call, grid, tokens, entries)
        yield run._replace(call=make_call(run.of(tensors), parameters._replace(window=window)))


def in_order(parts: Sequence[Sequence[Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """out and logsumexp of grids of different sizes, of those of their `runs`."""
    out, lse = (
        torch.cat([part.flatten(0, rank) for part in of_runs]).unsqueeze(0)
        for of_runs in zip(*parts, strict=True)
    )
    return out, lse


def joined(
    call: Call, tensors: Tensors, parts: Sequence[Sequence[Tensor | None]]
) -> tuple[Tensor | None, ...]:
    """What is like each of the first seven tensors of a call, of parts of its `runs`: sums for what
    all grids share."""
    found: list[Tensor | None] = []
    for name, tensor, own in zip(Tensors._fields, tensors, zip(*parts, strict=True)):
        given = [part for part in own if part is not None]
        if tensor is None or not given:
            found.append(None)
        elif name in ("rpb", "sink"):
            found.append(torch.stack(given).sum(0))
        else:
            found.append(torch.cat([part.flatten(0, -3) for part in given]).view(tensor.shape))
    return tuple(found)


def check_ends(name: str, cumulative: Tensor | None, tokens: int, longest: int) -> None:
    """Check where packed sequences end.

    Raises:
        ValueError: They do not rise from 0 to at most ``tokens``, or a sequence is longer than
            ``longest``.
    """
    ends = [] if cumulative is None else cumulative.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    if not lengths or ends[0] != 0 or min(lengths) < 0 or ends[-1] > tokens:
        raise ValueError(
            f"cumulative_seqlen_{name} must rise from 0 to at most the number of packed tokens "
            f"{tokens}, got {ends}"
        )
    if max(lengths) > longest:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest sequence {max(lengths)}, got {longest}"
        )


def _check_packed(tensors: Tensors, heads_kv: int) -> None:
    """Check that query, key and value are three tensors, or the heads of one."""
    qkv, key, value, *_ = tensors
    if (key is None) != (value is None) or (key is None) != (heads_kv != 0):
        raise ValueError(
            "key and value must both be tensors with heads_kv=0, or both None with heads_kv heads "
            f"in a packed query, got heads_kv={heads_kv} and "
            f"{'no key' if key is None else 'a key'}, {'no value' if value is None else 'a value'}"
        )
    if key is not None:
        return
    validation.check_is_tensor("query", qkv)
    if qkv.dim() < 4 or not 1 <= heads_kv <= (qkv.shape[-2] - 1) // 2:
        raise ValueError(
            "a packed query must be [batch, *tokens, heads + 2 * heads_kv, head_dim] with at least "
            f"one head of each, got shape {tuple(qkv.shape)} and heads_kv={heads_kv}"
        )


def _check_varlen(tensors: Tensors, query: Tensor, parameters: Parameters, window: Window) -> bool:
    """Whether the call is one of packed sequences, which are checked but for their values."""
    cumulative = (tensors.cumulative_seqlen_q, tensors.cumulative_seqlen_kv)
    longest = (parameters.max_seqlen_q, parameters.max_seqlen_kv)
    if cumulative[0] is None and cumulative[1] is None:
        if any(longest):
            raise ValueError(
                f"max_seqlen_q and max_seqlen_kv are of packed sequences, and must be 0 without "
                f"cumulative_seqlen_q and cumulative_seqlen_kv, got {longest}"
            )
        return False
    validation.check_cumulative(*cumulative, query)
    for name, length in zip(("max_seqlen_q", "max_seqlen_kv"), longest, strict=True):
        validation.int_tuple(name, length, 1, minimum=0)
    plain = Window(window.grid, (1,), (1,), window.is_causal, window.grid, (0,), (0,))
    if query.shape[0] != 1 or window != plain:
        raise ValueError(
            "packed sequences must be one batch entry on one axis, with a window of everything, "
            f"got batch size {query.shape[0]} and {window}"
        )
    if tensors.rpb is not None or tensors.additional_keys is not None:
        raise ValueError("packed sequences go with no rpb and no additional keys")
    if tensors.key_mask is not None or tensors.query_mask is not None:
        raise ValueError("packed sequences go with no key_mask and no query_mask")
    return True


def _facts(
    tensors: Tensors, parameters: Parameters, query: Tensor, key: Tensor, value: Tensor
) -> dict[str, Any]:
    """What a problem says of its tensors, whatever grids their tokens are of."""
    context = tensors.additional_keys
    return {
        "heads": query.shape[-2],
        "heads_kv": key.shape[-2],
        "head_dim": query.shape[-1],
        "head_dim_v": value.shape[-1],
        "scale": validation.check_scale(parameters.scale, query.shape[-1]),
        "softcap": validation.check_softcap(parameters.softcap),
        "num_additional": 0 if context is None else context.shape[1],
        "has_lengths": tensors.additional_lengths is not None,
        "has_rpb": tensors.rpb is not None,
        "has_sink": tensors.sink is not None,
        "has_key_mask": tensors.key_mask is not None,
        "has_query_mask": tensors.query_mask is not None,
        "dtype": query.dtype,
        "device": query.device,
        "requires_grad": parameters.requires_grad,
    }


def make_problem(tensors: Tensors, parameters: Parameters) -> Problem:
    """The problem that a call states, once everything about it but its data is checked.

    Raises:
        ValueError, NotImplementedError: As the public functions do, for whatever does not fit.
    """
    _check_packed(tensors, parameters.heads_kv)
    query, key, value = separated(tensors, parameters.heads_kv)
    validation.check_qkv(query, key, value)
    grids = decode_grids(parameters.window)
    if grids is not None:
        return _problem_of_grids(tensors, parameters, *grids)
    query_shape, key_shape = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    window = decode_window(parameters.window, query_shape, key_shape)
    if window.upsampling:
        if window.query_origin != window.key_origin or any(window.key_origin):
            raise ValueError("upsampling is of a whole grid, which begins at 0 along every axis")
        validation.check_upsampling(
            window.upsampling, query_shape, key_shape, window.dilation, tensors.rpb
        )
    else:
        validation.check_boxes(
            window.grid, query_shape, window.query_origin, key_shape, window.key_origin
        )
    checked = validation.check_window(window.grid, *window[:4])
    kernel_size, stride, dilation, is_causal = checked
    is_circular = validation.check_circular(window.is_circular, window.grid, *checked)
    if is_circular:
        shapes, origins = (query_shape, key_shape), (window.query_origin, window.key_origin)
        if not window.upsampling:
            validation.check_rings(is_circular, window.grid, *shapes, *origins)
        if tensors.rpb is None:
            is_circular = _wrapped(is_circular, window.grid, kernel_size, dilation)
    additional_keys = tensors.additional_keys
    validation.check_additional(query, key, value, additional_keys, tensors.additional_values)
    validation.check_lengths(tensors.additional_lengths, query, additional_keys)
    validation.check_rpb(tensors.rpb, query, kernel_size, is_causal)
    validation.check_sink(tensors.sink, query)
    validation.check_mask("key_mask", tensors.key_mask, key)
    validation.check_mask("query_mask", tensors.query_mask, query)
    return Problem(
        batch=query.shape[0],
        query_shape=query_shape,
        key_shape=key_shape,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        grid=window.grid,
        query_origin=window.query_origin,
        key_origin=window.key_origin,
        **_facts(tensors, parameters, query, key, value),
        is_circular=is_circular,
        upsampling=window.upsampling,
        varlen=_check_varlen(tensors, query, parameters, window),
        max_seqlen_q=parameters.max_seqlen_q,
        max_seqlen_kv=parameters.max_seqlen_kv,
    )


def _problem_of_grids(
    tensors: Tensors,
    parameters: Parameters,
    grids: Grids,
    is_causal: tuple[bool, ...],
    is_circular: tuple[bool, ...],
) -> Problem:
    """`make_problem` for grids of different sizes."""
    query, key, value = tensors[:3]
    if key is None or value is None:
        raise ValueError("grids of different sizes go with no packed query, key and value")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or tensor.shape[:2] != (1, grids.tokens):
            raise ValueError(
                f"{name} must hold the tokens of all grids, [1, {grids.tokens}, heads, head_dim], "
                f"got shape {tuple(tensor.shape)}"
            )
    if tensors.cumulative_seqlen_q is not None or tensors.cumulative_seqlen_kv is not None:
        raise ValueError("grids of different sizes go with no cumulative_seqlen")
    for grid, _ in grids.runs:
        checked = validation.check_window(*grid, is_causal)
        validation.check_circular(is_circular, grid.extents, *checked)
    # Each grid has additional keys and values of its own.
    each, each_key, each_value = (t.expand(grids.number, -1, -1, -1) for t in (query, key, value))
    more_keys, more_values = tensors.additional_keys, tensors.additional_values
    validation.check_additional(each, each_key, each_value, more_keys, more_values)
    validation.check_lengths(tensors.additional_lengths, each, more_keys)
    heaviest = grids.heaviest
    for kernel_size in {grid.kernel_size for grid, _ in grids.runs}:
        validation.check_rpb(tensors.rpb, query, kernel_size, is_causal)
    validation.check_sink(tensors.sink, query)
    validation.check_mask("key_mask", tensors.key_mask, key)
    validation.check_mask("query_mask", tensors.query_mask, query)
    origin = (0,) * len(is_causal)
    return Problem(
        batch=1,
        query_shape=heaviest.extents,
        key_shape=heaviest.extents,
        kernel_size=heaviest.kernel_size,
        stride=heaviest.stride,
        dilation=heaviest.dilation,
        is_causal=is_causal,
        grid=heaviest.extents,
        query_origin=origin,
        key_origin=origin,
        **_facts(tensors, parameters, query, key, value),
        is_circular=is_circular,
        grids=grids,
    )


def _wrapped(
    is_circular: tuple[bool, ...],
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[bool, ...]:
    """The circular axes on which that makes a difference: a window of the whole ring is one of
    everything."""
    wraps = [
        is_ring and k * d != n
        for is_ring, n, k, d in zip(is_circular, grid, kernel_size, dilation, strict=True)
    ]
    return tuple(wraps) if any(wraps) else ()


def is_full_window(problem: Problem) -> bool:
    """Whether every query sees every key of the whole grid, without a bias."""
    if problem.grids is not None:
        return False
    whole = problem.query_shape == problem.key_shape == problem.grid
    return whole and problem.is_dense and not problem.has_rpb


def _flattened(problem: Problem) -> Problem:
    """A problem with a full window, over one axis of tokens."""
    length, one, zero = (problem.num_queries,), (1,), (0,)
    return replace(
        problem, query_shape=length, key_shape=length, kernel_size=length, stride=one,
        dilation=one, is_causal=(False,), is_circular=(), grid=length, query_origin=zero,
        key_origin=zero,
    )  # fmt: skip


def make_call(tensors: Tensors, parameters: Parameters) -> Call:
    """The call of the operator with these tensors, whose data is not looked at, and parameters.

    Raises:
        ValueError, NotImplementedError: As :func:`make_problem`.
    """
    problem, config = make_problem(tensors, parameters), decode_config(parameters.config)
    validation.check_knobs(problem.rank, astuple(config))
    # Tile shapes are of the given rank.
    has_tiles = any(
        shape is not None
        for shape in (config.q_tile_shape, config.backward_q_tile_shape, config.backward_kv_splits)
    )
    is_flat = problem.rank > 1 and is_full_window(problem) and not has_tiles
    return Call(
        parameters,
        _flattened(problem) if is_flat else problem,
        config,
        tensors.key is None,
        is_flat,
        problem.output_shape,
    )


__all__ = [
    "EVERYTHING",
    "NUM_DIFFERENTIABLE",
    "NUM_TENSORS",
    "Call",
    "Parameters",
    "Run",
    "Tensors",
    "Window",
    "check_ends",
    "decode_grids",
    "decode_window",
    "encode_grids",
    "encode_window",
    "flat",
    "in_order",
    "is_full_window",
    "joined",
    "make_call",
    "make_problem",
    "runs",
    "separated",
    "unpacked",
]
