"""Grids of different sizes in one batch: images at native resolution, clips of different lengths.

Their tokens lie one grid after the other, ``[1, total, heads, head_dim]``, and a
:class:`GridLayout` says where. Nothing is padded. On a GPU, the Triton backends compute all grids
in one launch where that is estimated to take less time (`_pays_at_once`). Else grids of one size
that follow each other, with one window, are one call of
:func:`~natten.functional.neighborhood_attention_generic`, on a view of the packed tensors: sorted
by size, a batch takes as many calls as it has sizes.

The names of the last two functions, and their arguments, are those of NATTEN's proposal.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from natten import validation
from natten._internals import in_forward_mode, is_watched, transforming
from natten.functional import sharded
from natten.functional.call import Parameters, Tensors, encode_grids
from natten.functional.dispatch import FNA, parse_name
from natten.functional.neighborhood import neighborhood_attention_generic
from natten.functional.operators import attend, autocast, autocast_dtype
from natten.functional.problem import Grid, Grids
from natten.types import BoolOrSequence, IntOrSequence, KernelSchedule

_Key = TypeVar("_Key")
_Result = TypeVar("_Result")
_Sizes = Sequence[IntOrSequence | None]
# What a layout remembers of calls, and of what is as large as its tokens. Cleared when full, which
# windows that never repeat can cause.
_MAX_KNOWN = 256
_MAX_KEPT = 8


def _once(
    known: dict[Any, Any], what: Any, make: Callable[[], _Result], most: int | None = None
) -> _Result:
    """What ``make`` returns, made once for each ``what``."""
    found: _Result | None = known.get(what)
    if found is None:
        found = make()
        if len(known) >= (_MAX_KNOWN if most is None else most):
            known.clear()
        known[what] = found
    return found


class GridLayout:
    """The sizes of packed grids.

    Made once, from numbers alone: nothing waits for a GPU, then or later.

    Attributes:
        sizes: Extents of each grid, in their order.
        tokens: How many tokens each grid has.
    """

    def __init__(self, sizes: Sequence[IntOrSequence]) -> None:
        """Makes a layout.

        Args:
            sizes: Extents of each grid, in their order; all of one rank, which is 1, 2 or 3.

        Raises:
            ValueError: There is no grid, or they differ in rank, or an extent is no integer of at
                least 0.
        """
        if not isinstance(sizes, Sequence) or not sizes:
            raise ValueError(
                "sizes must be the extents of at least one grid, such as [(14, 20), (9, 31)], got "
                f"{validation.shown(sizes)}"
            )
        first = sizes[0]
        rank = len(first) if isinstance(first, Sequence) else 1
        if not 1 <= rank <= 3:
            raise ValueError(f"sizes must have 1, 2 or 3 extents each, got {first}")
        self.sizes = tuple([validation.int_tuple("sizes", size, rank, minimum=0) for size in sizes])
        self.tokens = tuple(map(prod, self.sizes))
        # Windows of calls.
        self._known: dict[str, PackedWindows] = {}
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}

    def configured(self, arguments: dict[str, Any]) -> PackedWindows:
        """:func:`configure_varlen` with these arguments, looked up: a layout serves many layers."""
        if torch.compiler.is_compiling():
            return configure_varlen(self, **arguments)
        return _once(self._known, repr(arguments), lambda: configure_varlen(self, **arguments))

    def kept(
        self, what: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Tensors that follow from the layout and ``what`` alone, made once for all layers; a few
        of them. Programs and CUDA graphs make their own.
        """
        if is_watched():
            return make()
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            # Streams do not wait for each other.
            stream = torch.cuda.current_stream(device).cuda_stream
        # Training may follow what was made without gradients.
        with torch.inference_mode(False), torch.no_grad():
            return _once(self._kept, (what, device, stream), make, _MAX_KEPT)

    def __reduce__(self) -> tuple[type[GridLayout], tuple[Any, ...]]:
        # Without what calls left there.
        return GridLayout, (self.sizes,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GridLayout) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __repr__(self) -> str:
        return f"GridLayout({list(self.sizes)})"

    @property
    def rank(self) -> int:
        """Axes of each grid."""
        return len(self.sizes[0])

    @property
    def total(self) -> int:
        """Tokens of all grids."""
        return sum(self.tokens)

    def pack(self, grids: Sequence[Tensor]) -> Tensor:
        """Tensors ``[*size, ...]``, one for each grid, as one ``[1, total, ...]``.

        Raises:
            ValueError: Their number or extents are others.
        """
        found = tuple([tuple(grid.shape[: self.rank]) for grid in grids])
        if found != self.sizes:
            raise ValueError(f"grids must have the sizes {self.sizes}, got {found}")
        return torch.cat([grid.flatten(0, self.rank - 1) for grid in grids]).unsqueeze(0)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse of :meth:`pack`: views ``[*size, ...]``.

        Raises:
            ValueError: ``packed`` is not ``[1, total, ...]``.
        """
        check_packed("packed", packed, self)
        parts = packed.squeeze(0).split(self.tokens)
        return [
            torch.unflatten(part, 0, size) for part, size in zip(parts, self.sizes, strict=True)
        ]

    def spread(self, entries: Tensor) -> Tensor:
        """What each grid has, ``[grids, ...]``, for each of its tokens, ``[1, total, ...]``.

        Raises:
            ValueError: There are not as many as grids.
        """
        self._check_each(entries)
        each = zip(entries.split(1), self.tokens, strict=True)
        return torch.cat([entry.expand(n, *entry.shape[1:]) for entry, n in each]).unsqueeze(0)

    def map(
        self, function: Callable[..., Tensor], *packed: Tensor, each: Sequence[Tensor] = ()
    ) -> Tensor:
        """What a function of grids makes of packed ones: any module of this package, a block with
        norms and rotary positions as well as attention alone.

        Args:
            function: From ``[grids, *size, ...]``, one for each of ``packed``, to as many tokens;
                called once for grids of one size that follow each other.
            packed: ``[1, total, ...]``, one or several.
            each: Further arguments of the function, of which each grid has its own,
                ``[grids, ...]``.

        Returns:
            ``[1, total, ...]``.

        Raises:
            ValueError: ``packed`` is something else, or the function's result.
        """
        return self._tokens(self._results(function, packed, each))

    def map_both(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        *packed: Tensor,
        each: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`map`, of a function that also returns something of each grid,
        ``[grids, ...]``, as attention with registers does: a pair of both.
        """
        tokens, entries = zip(*self._results(function, packed, each), strict=True)
        found = torch.cat(entries)
        self._check_each(found)
        return self._tokens(tokens), found

    def map_to_each(
        self, function: Callable[..., Tensor], *packed: Tensor, each: Sequence[Tensor]
    ) -> Tensor:
        """As :meth:`map`, of a function that returns something of each grid, ``[grids, ...]``."""
        found = torch.cat(self._results(function, packed, each))
        self._check_each(found)
        return found

    def resize(
        self, function: Callable[[Tensor], Tensor], packed: Tensor
    ) -> tuple[Tensor, GridLayout]:
        """As :meth:`map`, of a function that returns grids of another size, as tokenizers and
        downsamplers do: also the layout of what it returns.
        """
        found = self._results(function, (packed,), ())
        sizes = [tuple(result.shape[1 : 1 + self.rank]) for result in found]
        layout = GridLayout([s for s, part in zip(sizes, found) for _ in range(part.shape[0])])
        return _joined(found, self.rank), layout

    def _tokens(self, results: Sequence[Tensor]) -> Tensor:
        """What a function made of grids of a size, packed."""
        for result, (size, grids) in zip(results, _runs(self.sizes), strict=True):
            if result.shape[: 1 + self.rank] != (grids, *size):
                raise ValueError(
                    f"function must return as many tokens as it is given, [{grids}, *{size}, ...], "
                    f"got shape {tuple(result.shape)}"
                )
        return _joined(results, self.rank)

    def _results(
        self, function: Callable[..., _Result], packed: Sequence[Tensor], each: Sequence[Tensor]
    ) -> list[_Result]:
        for tensor in packed:
            check_packed("packed", tensor, self)
        for tensor in each:
            self._check_each(tensor)
        runs = _runs(self.sizes)
        counts = [grids for _, grids in runs]
        lengths = [grids * prod(size) for size, grids in runs]
        tokens = [tensor.split_with_sizes(lengths, 1) for tensor in packed]
        entries = [tensor.split_with_sizes(counts) for tensor in each]
        return [
            function(
                *[torch.unflatten(parts[i], 1, (grids, *size)).squeeze(0) for parts in tokens],
                *[parts[i] for parts in entries],
            )
            for i, (size, grids) in enumerate(runs)
        ]

    def _check_each(self, entries: Tensor) -> None:
        if entries.shape[:1] != (len(self.sizes),):
            raise ValueError(
                f"entries must have one for each of {len(self.sizes)} grids, got shape "
                f"{tuple(entries.shape)}"
            )


def _runs(keys: Iterable[_Key]) -> list[tuple[_Key, int]]:
    """Keys that differ from the one before, and how often they follow each other."""
    found: list[tuple[_Key, int]] = []
    # Not itertools.groupby, which torch.compile does not trace.
    for key in keys:
        if found and found[-1][0] == key:
            found[-1] = key, found[-1][1] + 1
        else:
            found.append((key, 1))
    return found


def _joined(parts: Sequence[Tensor], rank: int) -> Tensor:
    """What runs gave as one tensor of packed tokens."""
    flat = [part.flatten(0, rank) for part in parts]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).unsqueeze(0)


def check_packed(name: str, tensor: Any, layout: GridLayout) -> None:
    """Check a tensor of packed tokens."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() < 2 or tensor.shape[:2] != (1, layout.total):
        raise ValueError(
            f"{name} must hold {layout.total} packed tokens, [1, {layout.total}, ...], got shape "
            f"{tuple(tensor.shape)}"
        )


class _Window(NamedTuple):
    """Of one grid."""

    size: tuple[int, ...]
    kernel_size: Any
    stride: Any
    dilation: Any


class _AllGrids(NamedTuple):
    """A layout and its windows, checked, for one call of the operator.

    Attributes:
        grids: The grids.
        encoded: The operator's window.
        packed: The same as bytes, which are looked up faster than numbers; none in a program.
    """

    grids: Grids
    encoded: tuple[int, ...]
    packed: bytes

    @property
    def window(self) -> tuple[int, ...] | bytes:
        return self.packed or self.encoded


@dataclass(frozen=True)
class PackedWindows:
    """What :func:`configure_varlen` returns: a layout, and a window for each of its grids."""

    layout: GridLayout
    windows: tuple[_Window, ...]
    is_causal: BoolOrSequence | None
    knobs: dict[str, Any]
    # What follows from all this. Not in a program: there it would be one more thing to guard.
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def _once(self, what: Any, make: Callable[..., _Result], *arguments: Any) -> _Result:
        """``make(*arguments)``, made once for each ``what``."""
        if torch.compiler.is_compiling():
            return make(*arguments)
        return _once(self._known, what, lambda: make(*arguments))

    def _runs(self) -> list[tuple[_Window, int]]:
        """Grids of one size and window that follow each other."""
        return self._once("runs", _runs, self.windows)

    def _all_grids(self, is_circular: Any, clip_window: Any) -> _AllGrids:
        """All grids as one call takes them.

        Raises:
            ValueError: A window that does not fit its grid.
        """
        given = (self._runs(), self.is_causal, is_circular, clip_window)
        return self._once(repr((is_circular, clip_window)), _checked_grids, *given)

    def _pays_at_once(self, grids: Grids, features: int) -> bool:
        """`_pays_at_once`, looked up."""
        return self._once((grids, features), _pays_at_once, grids, features)


def _each(name: str, one: Any, many: _Sizes | None, layout: GridLayout) -> tuple[Any, ...]:
    """A parameter of the window for each grid."""
    if many is None:
        return (tuple(one) if isinstance(one, Sequence) else one,) * len(layout.sizes)
    if not isinstance(many, Sequence) or len(many) != len(layout.sizes):
        raise ValueError(
            f"{name}_list must have one value for each of {len(layout.sizes)} grids, got "
            f"{validation.shown(many)}"
        )
    return tuple([tuple(value) if isinstance(value, Sequence) else value for value in many])


def configure_varlen(
    token_layout_list: GridLayout | Sequence[IntOrSequence],
    head_dim: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    requires_grad: bool | None = None,
    head_dim_v: int | None = None,
    kernel_size: IntOrSequence | None = None,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    kernel_size_list: _Sizes | None = None,
    stride_list: _Sizes | None = None,
    dilation_list: _Sizes | None = None,
    backend: str | None = None,
    **knobs: Any,
) -> PackedWindows:
    """The layout and the windows of packed grids, for :func:`neighborhood_attention_varlen`.

    Args:
        token_layout_list: A layout, or the sizes that it is made of.
        head_dim, device, dtype, requires_grad, head_dim_v: Not needed, and not looked at: calls
            choose by their tensors.
        kernel_size: Window size of all grids.
        stride: Queries that share one window, of all grids.
        dilation: Distance of neighbors, of all grids.
        is_causal: Whether queries attend to no later token, for each axis.
        kernel_size_list, stride_list, dilation_list: Instead of these, one for each grid.
        backend: As in :func:`natten.na2d`.
        knobs: Tile shapes and schedules, as there.

    Raises:
        ValueError: No kernel_size, or lists of another length than the layout.
    """
    layout = token_layout_list
    if not isinstance(layout, GridLayout):
        layout = GridLayout(layout)
    if kernel_size is None and kernel_size_list is None:
        raise ValueError("kernel_size or kernel_size_list must be given")
    windows = map(
        _Window,
        layout.sizes,
        _each("kernel_size", kernel_size, kernel_size_list, layout),
        _each("stride", stride, stride_list, layout),
        _each("dilation", dilation, dilation_list, layout),
    )
    return PackedWindows(layout, tuple(windows), is_causal, {"backend": backend, **knobs})


# Products (pairs of queries and keys, times heads, times features) that a GPU computes in the time
# of a call, and of those that larger tiles, loaded by the memory accelerator, take less time for.
_CALL, _LARGE, _LARGE_TIME = 2e9, 1.2e10, 0.7
_AT_ONCE = tuple([f"{name}-{FNA}" for name in ("blackwell", "hopper", "cutlass")])
_NO_KNOBS = {
    "q_tile_shape": None, "kv_tile_shape": None, "backward_q_tile_shape": None,
    "backward_kv_tile_shape": None, "run_persistent_kernel": True, "kernel_schedule": None,
}  # fmt: skip


def _pays_at_once(grids: Grids, features: int) -> bool:
    """Whether one launch for all grids is estimated to take less time than a call for each run of
    them; ``features`` are those of all heads.

    A call takes the time of ``_CALL`` products at least. Those of calls for grids that are large
    enough take less time each, in kernels for one size.
    """
    together = apart = 0.0
    for grid, count in grids.runs:
        products = count * grid.tokens * prod(grid.kernel_size) * features
        together += products
        apart += max(products * (_LARGE_TIME if products >= _LARGE else 1.0), _CALL)
    return together + _CALL < apart


def _checked_grids(
    runs: list[tuple[_Window, int]], is_causal: Any, is_circular: Any, clip_window: Any
) -> _AllGrids:
    """The grids of a layout as the operator takes them.

    Raises:
        ValueError: A window that does not fit its grid.
    """
    clips = validation.optional_bool("clip_window", clip_window)
    found = []
    causal: tuple[bool, ...] = ()
    rings: tuple[bool, ...] = ()
    for (size, kernel_size, stride, dilation), count in runs:
        if clips:
            kernel_size, stride, dilation = validation.clipped_window(
                size, kernel_size, stride, dilation
            )
        *sizes, causal = validation.check_window(size, kernel_size, stride, dilation, is_causal)
        grid = Grid(size, *sizes)
        rings = validation.check_circular(is_circular, *grid, causal)
        found.append((grid, count))
    grids = Grids(tuple(found))
    encoded = encode_grids(grids, causal, rings)
    packed = b"" if torch.compiler.is_compiling() else array("q", encoded).tobytes()
    return _AllGrids(grids, encoded, packed)


def _is_at_once(tensors: Tensors, plan: PackedWindows, options: dict[str, Any]) -> bool:
    """Whether one launch can compute the call, as far as can be told without looking at sizes.

    Tile shapes and schedules are those of one size, and what transforms tensors, traces or exports
    programs gets a call for each size, too.
    """
    query, knobs = tensors.query, dict(plan.knobs)
    backend = knobs.pop("backend")
    return (
        (backend in _AT_ONCE or (backend is None and query.is_cuda))
        and all(knob == _NO_KNOBS.get(name, NotImplemented) for name, knob in knobs.items())
        and options.keys() <= {"softcap", "is_circular", "clip_window"}
        and sharded.current is None
        and not sharded.is_dtensor(query)
        and query.dtype != torch.float64
        and not plan._once("groups", _has_head_windows, plan.windows)
        and not (tensors.rpb is not None and options.get("clip_window"))
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not in_forward_mode()
        and not transforming()
    )


def _has_head_windows(windows: tuple[_Window, ...]) -> bool:
    """Whether groups of heads have windows of their own."""
    return any(validation.head_windows(*window[1:]) is not None for window in windows)


def _grids_parameters(
    tensors: Tensors, window: tuple[int, ...] | bytes, scale: Any, softcap: Any, backend: str | None
) -> Parameters:
    """The operator's parameters for grids of different sizes; whether gradients are needed is left
    open."""
    if isinstance(window, bytes):
        window = tuple(array("q", window))
    scale = validation.check_scale(scale, tensors.query.shape[-1])
    softcap = validation.check_softcap(softcap)
    return Parameters(0, window, scale, softcap, 0, 0, parse_name(backend, FNA), "", False)


def attend_at_once(
    tensors: Tensors, plan: PackedWindows, scale: float | None, **options: Any
) -> tuple[Tensor, Tensor] | None:
    """out and logsumexp of packed grids, by one call of the operator; None where there is none, or
    a call for each size is estimated to take less time.

    Args:
        tensors: Packed, and additional ones and their lengths of each grid.
        plan: The layout and the windows.
        scale: As in :func:`natten.na2d`.
        options: ``softcap``, ``is_circular`` and ``clip_window``, as there.

    Raises:
        ValueError: As there.
    """
    if not _is_at_once(tensors, plan, options):
        return None
    all_grids = plan._all_grids(options.get("is_circular"), options.get("clip_window", False))
    if not plan._pays_at_once(all_grids.grids, prod(tensors.query.shape[-2:])):
        return None
    dtype = autocast_dtype(tensors.query)
    if dtype is not None:
        names = ("query", "key", "value", "additional_keys", "additional_values")
        cast = autocast(dtype, *[getattr(tensors, name) for name in names])
        tensors = tensors._replace(**dict(zip(names, cast, strict=True)))
    lengths, more_keys = tensors.additional_lengths, tensors.additional_keys
    if lengths is not None and more_keys is not None:
        validation.check_length_values("additional_lengths", lengths, more_keys.shape[1])
    arguments = (all_grids.window, scale, options.get("softcap"), plan.knobs["backend"])
    return attend(tensors, arguments, _grids_parameters)


def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: PackedWindows | GridLayout | None = None,
    token_layout_list: Sequence[IntOrSequence] | None = None,
    kernel_size: IntOrSequence | None = None,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    kernel_size_list: _Sizes | None = None,
    stride_list: _Sizes | None = None,
    dilation_list: _Sizes | None = None,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    return_lse: bool = False,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention of packed grids, each to itself.

    >>> layout = natten.GridLayout([(14, 20), (9, 31)])
    >>> q, k, v = (torch.randn(1, layout.total, 4, 32) for _ in range(3))
    >>> neighborhood_attention_varlen(q, k, v, layout, kernel_size=7).shape
    torch.Size([1, 559, 4, 32])

    Args:
        query: ``[1, total, heads, head_dim]``.
        key: ``[1, total, heads_kv, head_dim]``.
        value: ``[1, total, heads_kv, head_dim_v]``.
        metadata: The layout; or what :func:`configure_varlen` returned, with the windows and the
            backend, which must not be given here then.
        token_layout_list: The sizes of the grids, instead of a layout.
        kernel_size, stride, dilation, is_causal: The window of all grids, as in
            :func:`natten.na2d`. With ``clip_window=True`` it is cut to grids that are smaller.
        kernel_size_list, stride_list, dilation_list: Instead of these, one for each grid.
        scale, backend: As there, and so are the tile shapes and schedules.
        return_lse: Also return the logsumexp.
        additional_keys: ``[grids, context, heads_kv, head_dim]``, seen by the grid's queries.
        additional_values: ``[grids, context, heads_kv, head_dim_v]``.
        additional_lengths: ``[grids]``, how many of them each grid has.
        key_mask: Bools ``[1, total]``, which keys are valid.
        query_mask: Bools ``[1, total]``, which queries are.
        options: ``rpb``, ``sink``, ``softcap``, ``is_circular`` and ``clip_window``, of all grids.

    Returns:
        ``[1, total, heads, head_dim_v]``, and with ``return_lse`` ``[1, total, heads]``.

    Raises:
        ValueError: Tensors that do not hold the layout's tokens; as :func:`natten.na2d`.
    """
    knobs: dict[str, Any] = {
        "q_tile_shape": q_tile_shape, "kv_tile_shape": kv_tile_shape,
        "backward_q_tile_shape": backward_q_tile_shape,
        "backward_kv_tile_shape": backward_kv_tile_shape,
        "run_persistent_kernel": run_persistent_kernel, "kernel_schedule": kernel_schedule,
    }  # fmt: skip
    if isinstance(metadata, PackedWindows):
        lists = kernel_size_list, stride_list, dilation_list, token_layout_list
        window = kernel_size, stride, dilation, is_causal, backend, *lists, *knobs.values()
        if window != (None, 1, 1, False, *(None,) * 9, True, None):
            raise ValueError(
                "layout, windows, backend, tile shapes and schedule are those that "
                "configure_varlen was given, and must not be given here"
            )
        plan = metadata
    else:
        sizes = metadata if token_layout_list is None else token_layout_list
        if sizes is None or (metadata is not None and token_layout_list is not None):
            raise ValueError("either metadata or token_layout_list must be given")
        knobs |= {
            "kernel_size": kernel_size, "stride": stride, "dilation": dilation,
            "is_causal": is_causal, "kernel_size_list": kernel_size_list,
            "stride_list": stride_list, "dilation_list": dilation_list, "backend": backend,
        }  # fmt: skip
        layout = sizes if isinstance(sizes, GridLayout) else GridLayout(sizes)
        plan = layout.configured(knobs)
    layout = plan.layout
    if sharded.current is not None or sharded.is_dtensor(query):
        raise NotImplementedError(
            f"a layout of tokens that are sharded over ranks is not implemented, got {layout}"
        )
    packed = {"query": query, "key": key, "value": value}
    masks = {"key_mask": key_mask, "query_mask": query_mask}
    packed |= {name: mask for name, mask in masks.items() if mask is not None}
    for name, tokens in packed.items():
        check_packed(name, tokens, layout)
    entries = {
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "additional_lengths": additional_lengths,
    }
    for name, tensor in entries.items():
        if tensor is not None and tensor.shape[:1] != (len(layout.sizes),):
            raise ValueError(
                f"{name} must have one entry for each of {len(layout.sizes)} grids, got shape "
                f"{tuple(tensor.shape)}"
            )
    tensors = Tensors(
        query, key, value, options.get("rpb"), additional_keys, additional_values,
        options.get("sink"), additional_lengths=additional_lengths, key_mask=key_mask,
        query_mask=query_mask,
    )  # fmt: skip
    others = {name: value for name, value in options.items() if name not in ("rpb", "sink")}
    at_once = attend_at_once(tensors, plan, scale, **others)
    if at_once is not None:
        return at_once if return_lse else at_once[0]
    runs = plan._runs()
    counts = [grids for _, grids in runs]
    lengths = [grids * prod(window.size) for window, grids in runs]
    # One node of autograd each, whose gradient is one concatenation.
    parts = {name: tokens.split_with_sizes(lengths, 1) for name, tokens in packed.items()}
    parts |= {
        name: tensor.split_with_sizes(counts)
        for name, tensor in entries.items()
        if tensor is not None
    }
    attend: Any = neighborhood_attention_generic
    results = []
    for number, (window, grids) in enumerate(runs):
        given = {name: tensors[number] for name, tensors in parts.items()}
        for name in packed:
            given[name] = torch.unflatten(given[name], 1, (grids, *window.size)).squeeze(0)
        results.append(
            attend(
                **given, kernel_size=window.kernel_size, stride=window.stride,
                dilation=window.dilation, is_causal=plan.is_causal, scale=scale,
                return_lse=True, **plan.knobs, **options,
            )
        )  # fmt: skip
    out, lse = (_joined(found, layout.rank) for found in zip(*results, strict=True))
    return (out, lse) if return_lse else out


__all__ = [
    "GridLayout",
    "PackedWindows",
    "configure_varlen",
    "neighborhood_attention_varlen",
]
