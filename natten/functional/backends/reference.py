"""Eager neighborhood attention: any dtype that torch computes with, any device, every feature.

It is the oracle of all others.

Queries are worked on in tiles of one dilation group, against the box of all keys that some query
of the tile attends to, so that memory is linear in the number of tokens. Sums are done in float64
for float64 inputs and in float32 for all others, whatever their precision; results are rounded
once, at the end. Gradients come from the given output and logsumexp, as in fused kernels.

Batch entries are worked on one after the other: nothing that one holds, nor how many there are,
can change a bit of another's results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.functional import sink as sinks
from natten.functional.backend import Backend, Gradients, Inputs, Results, sequences
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.window import Axis, absent, bounds_table, cleared

# Scores that exist at once: 8 MB in float64, which stays in a CPU's cache.
_SCORES = 1 << 20
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Keys along one axis: on a circular one each of them, where they may come more than once.
_Keys = slice | Tensor


@dataclass(frozen=True)
class _Segment:
    """Queries of one tile along one axis, and the keys they attend to."""

    queries: slice
    keys: _Keys
    visible: Tensor | None  # bool [queries, keys]; None if all are
    distance: Tensor  # key position - query position, [queries, keys]


def _segments(
    axis: Axis,
    query_origin: int,
    query_extent: int,
    key_origin: int,
    key_extent: int,
    tile: int,
    device: torch.device,
) -> list[_Segment]:
    """Cut one axis: each dilation group into tiles of up to ``tile`` queries."""
    d = axis.dilation
    start, end = bounds_table(axis, query_origin, query_extent, key_origin, key_extent)
    position = torch.arange(query_origin, query_origin + query_extent, device="cpu") // d
    position = position // axis.upsampling
    segments = []
    for offset in range(min(d, query_extent)):
        token = query_origin + offset
        group = token % d
        for first in range(offset, query_extent, d * tile):
            queries = slice(first, min(first + d * tile, query_extent), d)
            low, high = start[queries], end[queries]
            filled = high > low
            if bool(filled.any()):
                keys_low, keys_high = int(low[filled].min()), int(high[filled].max())
                token = group + d * keys_low - key_origin
                keys: _Keys = slice(token, token + d * (keys_high - 1 - keys_low) + 1, d)
            else:
                keys_low = keys_high = 0
                keys = slice(0, 0)
            key_position = torch.arange(keys_low, keys_high, device="cpu")
            if axis.is_circular:
                keys = (group + d * (key_position % (axis.length // d))).to(device)
            visible = (key_position >= low[:, None]) & (key_position < high[:, None])
            segments.append(
                _Segment(
                    queries,
                    keys,
                    None if bool(visible.all()) else visible.to(device),
                    (key_position - position[queries, None]).to(device),
                )
            )
    return segments


def _tile_shape(problem: Problem, shared_window_only: bool) -> list[int]:
    """Extents of a tile of queries whose scores fit the budget."""
    axes = problem.axes
    # A tile has queries of one group, in positions.
    tile = [
        max(1, -(-n // axis.dilation)) for n, axis in zip(problem.query_shape, axes, strict=True)
    ]
    if shared_window_only:
        return [
            n if axis.kernel_size == axis.length and not (axis.is_causal or axis.is_circular) else 1
            for n, axis in zip(tile, axes, strict=True)
        ]

    def scores() -> int:
        keys = [
            min(
                axis.kernel_size + axis.stride + n - 2,
                (1 + axis.is_circular) * -(-axis.length // axis.dilation),
            )
            for n, axis in zip(tile, axes, strict=True)
        ]
        rows = problem.heads * prod(tile)
        return rows * (prod(keys) + problem.num_additional)

    while scores() > _SCORES and prod(tile) > 1:
        # The longest side relative to the window wastes most.
        ratios = [
            n / axis.kernel_size if n > 1 else 0.0 for n, axis in zip(tile, axes, strict=True)
        ]
        widest = ratios.index(max(ratios))
        tile[widest] = -(-tile[widest] // 2)
    return tile


@dataclass(frozen=True)
class _Tile:
    """One N-d tile: where its queries and keys are, what is visible, which bias applies."""

    queries: tuple[slice, ...]
    keys: tuple[_Keys, ...]
    visible: Tensor | None  # bool [queries, keys]
    bias_index: tuple[Tensor, ...] | None  # rpb indices per axis, that broadcast to [queries, keys]

    @staticmethod
    def of(segments: tuple[_Segment, ...], problem: Problem) -> _Tile:
        rank = len(segments)

        def spread(matrix: Tensor, axis: int) -> Tensor:
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = matrix.shape
            return matrix.view(shape)

        visible = None
        extents = [s.distance.shape for s in segments]
        full = [n for n, _ in extents] + [n for _, n in extents]
        for axis, segment in enumerate(segments):
            if segment.visible is not None:
                part = spread(segment.visible, axis)
                visible = part if visible is None else visible & part
        if visible is not None:
            num_queries = prod(full[:rank])
            visible = visible.expand(full).reshape(num_queries, prod(full[rank:]))
        index = None
        if problem.has_rpb:
            # Entries outside the window are masked, but must not index out of the table.
            index = tuple(
                spread((s.distance + k - 1).clamp(0, 2 * k - 2), axis)
                for axis, (s, k) in enumerate(zip(segments, problem.kernel_size, strict=True))
            )
        return _Tile(
            tuple(s.queries for s in segments), tuple(s.keys for s in segments), visible, index
        )

    def rows(self, tensor: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """``[B, *X, groups * G, D]`` to this tile's ``[B, groups, G, queries, D]``."""
        part = tensor[(slice(None), *self.queries)]
        part = part.flatten(1, -3).unflatten(-2, (groups, -1))
        return part.permute(0, 2, 3, 1, 4).to(dtype)

    def _part(self, tensor: Tensor) -> Tensor:
        """``[B, *X, ...]`` cut to the keys, but for circular axes: a view."""
        ranges = [keys if isinstance(keys, slice) else slice(None) for keys in self.keys]
        return tensor[(slice(None), *ranges)]

    def _rings(self) -> Iterator[tuple[int, Tensor]]:
        """The dimension of each circular axis, and its keys."""
        for axis, keys in enumerate(self.keys):
            if not isinstance(keys, slice):
                yield axis + 1, keys

    def seen(self, tensor: Tensor) -> Tensor:
        """``[B, *X, ...]`` cut to this tile's keys."""
        part = self._part(tensor)
        for dim, index in self._rings():
            part = part.index_select(dim, index)
        return part

    def columns(self, tensor: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``[B, *X, Hkv, D]`` to ``[B, Hkv, 1, keys + extra, D]``."""
        part = self.seen(tensor).flatten(1, -3)
        if extra is not None:
            part = torch.cat([part, extra], dim=1)
        return part.permute(0, 2, 1, 3).unsqueeze(2).to(dtype)

    def put_rows(self, target: Tensor, rows: Tensor) -> None:
        """Write ``[B, groups, G, queries, D]`` to this tile of ``[B, *X, groups * G, D]``."""
        part = target[(slice(None), *self.queries)]
        part.copy_(rows.permute(0, 3, 1, 2, 4).reshape(part.shape))

    def add_columns(self, target: Tensor, extra: Tensor | None, columns: Tensor) -> None:
        """Add ``[B, Hkv, keys + extra, D]`` to this tile's keys and the extra keys."""
        part, rings = self._part(target), list(self._rings())
        shape = list(part.shape)
        for dim, index in rings:
            shape[dim] = len(index)
        columns = columns.transpose(1, 2)
        count = prod(shape[1:-2])
        own = columns[:, :count].reshape(shape)
        for dim, index in rings:
            shape[dim] = part.shape[dim]
            own = own.new_zeros(shape).index_add_(dim, index, own)
        part += own
        if extra is not None:
            extra += columns[:, count:]


def _tiles(problem: Problem, shared_window_only: bool) -> Iterator[_Tile]:
    per_axis = [
        _segments(axis, *query_box, *key_box, tile, problem.device)
        for axis, query_box, key_box, tile in zip(
            problem.axes,
            zip(problem.query_origin, problem.query_shape, strict=True),
            zip(problem.key_origin, problem.key_shape, strict=True),
            _tile_shape(problem, shared_window_only),
            strict=True,
        )
    ]
    for segments in product(*per_axis):
        yield _Tile.of(segments, problem)


def _passes(
    problem: Problem, rpb: Tensor | None, *tensors: Tensor | None
) -> Iterator[tuple[_Tile, slice]]:
    """Every tile with every batch entry."""
    # A masked entry has weight zero, and zero times NaN is NaN: where an input is not finite, a
    # tile may hold only queries of one window, so that nothing reaches a query from outside of it.
    finite = torch.ones(problem.batch, dtype=torch.bool, device=problem.device)
    for tensor in tensors:
        if tensor is not None:
            finite &= tensor.isfinite().flatten(1).all(1)
    if rpb is not None:
        finite &= rpb.isfinite().all()
    flags = finite.tolist()
    for wanted in (True, False):
        entries = [slice(b, b + 1) for b, flag in enumerate(flags) if flag == wanted]
        if entries:
            for tile in _tiles(problem, shared_window_only=not wanted):
                for entry in entries:
                    yield tile, entry


def _entry(tensor: Tensor | None, entry: slice) -> Tensor | None:
    return None if tensor is None else tensor[entry]


class _Hidden(NamedTuple):
    """Which tokens of each batch entry are not there; None where all are."""

    queries: Tensor | None  # bool [B, *X]
    keys: Tensor | None  # bool [B, *X]
    additional: Tensor | None  # bool [B, additional]

    def of(self, tile: _Tile, entry: slice, k: Tensor) -> tuple[Tensor, ...]:
        """What to mask of the pairs of a tile and its keys ``k``, each to be spread over
        ``[B, Hkv, G, queries, keys + additional]``."""
        masks = []
        if self.queries is not None:
            rows = self.queries[(entry, *tile.queries)].flatten(1)
            masks.append(rows[:, None, None, :, None])
        columns = k.new_zeros(k.shape[0], k.shape[-2], dtype=torch.bool)
        if self.keys is not None:
            own = tile.seen(self.keys[entry]).flatten(1)
            columns[:, : own.shape[1]] = own
        if self.additional is not None:
            columns[:, k.shape[-2] - self.additional.shape[1] :] = self.additional[entry]
        if self.keys is not None or self.additional is not None:
            masks.append(columns[:, None, None, None, :])
        return tuple(masks)


def _present(problem: Problem, inputs: Inputs) -> tuple[_Hidden, Inputs]:
    """Which tokens are not there, and the inputs with zeros for those."""
    hidden = _Hidden(
        None if inputs.query_mask is None else ~inputs.query_mask,
        None if inputs.key_mask is None else ~inputs.key_mask,
        None
        if inputs.additional_lengths is None
        else absent(inputs.additional_lengths, problem.num_additional),
    )
    owners = (("query",), ("key", "value"), ("additional_keys", "additional_values"))
    changes = {
        name: cleared(getattr(inputs, name), absent_tokens)
        for names, absent_tokens in zip(owners, hidden, strict=True)
        if absent_tokens is not None
        for name in names
    }
    return hidden, inputs._replace(**changes)


def _scores(
    problem: Problem,
    tile: _Tile,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    hidden: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None]:
    """``[B, Hkv, G, queries, keys + additional]``, -inf where a key is not visible, and with a soft
    cap its derivative.

    The scale belongs to the product: where numbers are not finite, scaling a factor of it would not
    be the same.
    """
    scores, slope = (q @ k.transpose(-1, -2)).mul_(problem.scale), None
    if problem.softcap:
        scores = scores.div_(problem.softcap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(problem.softcap)
    own = scores.shape[-1] - problem.num_additional
    if rpb is not None and tile.bias_index is not None:
        index: tuple[Any, ...] = (slice(None), *tile.bias_index)
        bias = rpb[index]
        group = problem.heads // problem.heads_kv
        bias = bias.reshape(problem.heads_kv, group, scores.shape[-2], own)
        scores[..., :own] += bias
    _mask(problem, tile, scores, hidden, -torch.inf)
    return scores, slope


def _mask(
    problem: Problem, tile: _Tile, pairs: Tensor, hidden: tuple[Tensor, ...], number: float
) -> None:
    """Write a number where a query does not see a key, of ``[..., queries, keys + additional]``."""
    own = pairs.shape[-1] - problem.num_additional
    if tile.visible is not None:
        pairs[..., :own].masked_fill_(~tile.visible, number)
    for mask in hidden:
        pairs.masked_fill_(mask, number)


def _forward(problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    hidden, inputs = _present(problem, inputs)
    query, key, value, rpb, additional_keys, additional_values, sink, *_ = inputs
    dtype = problem.accumulation_dtype
    groups = problem.heads_kv
    rpb = None if rpb is None else rpb.to(dtype)
    for tile, entry in _passes(problem, rpb, query, key, value, additional_keys, additional_values):
        q = tile.rows(query[entry], groups, dtype)
        k = tile.columns(key[entry], _entry(additional_keys, entry), dtype)
        v = tile.columns(value[entry], _entry(additional_values, entry), dtype)
        row_out, row_lse = out[entry], lse[entry].unsqueeze(-1)
        masks = hidden.of(tile, entry, k)
        if k.shape[-2] == 0:
            result = q.new_zeros(*q.shape[:-1], problem.head_dim_v)
            logarithm = q.new_full((*q.shape[:-1], 1), -torch.inf)
        else:
            weights, _ = _scores(problem, tile, q, k, rpb, masks)
            top = weights.amax(-1, keepdim=True)
            # A row with nothing to attend to has no maximum to subtract, and takes nothing from a
            # value that is not finite.
            empty = top == -torch.inf
            top = top.masked_fill(empty, 0.0)
            weights = weights.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            result = ((weights @ v) / total).masked_fill_(empty, 0.0)
            logarithm = top + total.log()
        if sink is not None:
            # [B, Hkv, G, queries], and the sink of each head.
            of_heads = sink.to(dtype).reshape(groups, -1, 1)
            result, logarithm = sinks.join(result, logarithm.squeeze(-1), of_heads)
            logarithm = logarithm.unsqueeze(-1)
            if hidden.queries is not None:
                logarithm = logarithm.masked_fill(masks[0], -torch.inf)
        tile.put_rows(row_out, result)
        tile.put_rows(row_lse, logarithm)


def _backward(
    problem: Problem, inputs: Inputs, results: Results, gradients: list[Tensor | None]
) -> None:
    """Add to ``gradients``, zeros in the accumulation dtype; None is not wanted."""
    hidden, inputs = _present(problem, inputs)
    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    out, lse, grad_out, grad_lse = results
    if hidden.queries is not None:
        grad_out = cleared(grad_out, hidden.queries)
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(hidden.queries.unsqueeze(-1), 0.0)
    dtype = problem.accumulation_dtype
    groups = problem.heads_kv
    dq, dk, dv, drpb, dk_extra, dv_extra = gradients
    rpb = None if rpb is None else rpb.to(dtype)
    scale = problem.gradient_scale
    given = (query, key, value, additional_keys, additional_values, grad_out, grad_lse)
    # A logsumexp of -inf is tame: such rows are left out.
    known = lse.masked_fill(lse == -torch.inf, 0.0)
    for tile, entry in _passes(problem, rpb, *given, known):
        k = tile.columns(key[entry], _entry(additional_keys, entry), dtype)
        if k.shape[-2] == 0:
            continue
        v = tile.columns(value[entry], _entry(additional_values, entry), dtype)
        row_lse = tile.rows(lse[entry].unsqueeze(-1), groups, dtype)
        # A row that attends to nothing gives nothing, whatever it and its gradient hold.
        empty = row_lse == -torch.inf
        q = tile.rows(query[entry], groups, dtype).masked_fill(empty, 0.0)
        grad = tile.rows(grad_out[entry], groups, dtype).masked_fill(empty, 0.0)
        masks = hidden.of(tile, entry, k)
        scores, slope = _scores(problem, tile, q, k, rpb, masks)
        # No weight is above one, but the logsumexp of huge scores is not exact enough to say so.
        weights = scores.sub_(row_lse).clamp_(max=0.0).exp_().masked_fill_(empty, 0.0)
        delta = (grad * tile.rows(out[entry], groups, dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - tile.rows(grad_lse[entry].unsqueeze(-1), groups, dtype)
        if dv is not None or dv_extra is not None:
            sums = (_entry(dv, entry), _entry(dv_extra, entry))
            _add_columns(tile, *sums, weights, grad, problem)
        # From here on, the gradient of the scores.
        weights *= grad @ v.transpose(-1, -2) - delta
        _mask(problem, tile, weights.masked_fill_(empty, 0.0), masks, 0.0)
        # And that of the products, which a bias does not pass through.
        products = weights if slope is None else weights * slope
        if dq is not None:
            tile.put_rows(dq[entry], (products @ k).mul_(scale).masked_fill_(empty, 0.0))
        if dk is not None or dk_extra is not None:
            sums = (_entry(dk, entry), _entry(dk_extra, entry))
            _add_columns(tile, *sums, products, q, problem)
        if drpb is not None and tile.bias_index is not None:
            own = weights[..., : weights.shape[-1] - problem.num_additional].squeeze(0)
            spread = torch.broadcast_tensors(*tile.bias_index)
            drpb.index_put_(
                (torch.arange(problem.heads, device=drpb.device)[:, None], *_as_rows(spread)),
                own.reshape(problem.heads, -1),
                accumulate=True,
            )
    for keys in (dk, dk_extra):
        if keys is not None:
            keys *= scale
    for sums, absent_tokens in (
        ((dk, dv), hidden.keys), ((dk_extra, dv_extra), hidden.additional),
    ):  # fmt: skip
        for total in sums:
            if total is not None and absent_tokens is not None:
                total.masked_fill_(absent_tokens[..., None, None], 0.0)


def _as_rows(index: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(i.reshape(1, -1) for i in index)


def _add_columns(
    tile: _Tile,
    target: Tensor | None,
    extra: Tensor | None,
    weights: Tensor,
    rows: Tensor,
    problem: Problem,
) -> None:
    # Heads of one group sum into the key head that they share.
    columns = weights.flatten(2, 3).transpose(-1, -2) @ rows.flatten(2, 3)
    if target is not None:
        tile.add_columns(target, extra, columns)
    elif extra is not None:
        count = columns.shape[-2] - problem.num_additional
        extra += columns[:, :, count:].transpose(1, 2)


class Reference(Backend):
    """The eager backend. Declines nothing but dtypes that torch itself does not compute with."""

    name = "reference"

    def refusal(self, problem: Problem, config: Config) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"it computes float32, float64, bfloat16 and float16, not {problem.dtype}"
        return None

    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        query = inputs.query
        out = query.new_empty(problem.output_shape)
        lse = query.new_empty(problem.lse_shape, dtype=problem.accumulation_dtype)
        if out.numel() == 0 and lse.numel() == 0:
            return out, lse
        if not problem.varlen:
            _forward(problem, inputs, out, lse)
            return out, lse
        # Tokens behind the last sequence belong to none.
        out.zero_()
        lse.fill_(-torch.inf)
        for part in sequences(problem, inputs):
            rows = part.queries
            _forward(part.problem, part.inputs(inputs), out[:, rows], lse[:, rows])
        return out, lse

    def float8_refusal(self, problem: Problem, named: bool) -> str | None:
        return None if named else "in 8 bits it is only what results are compared with; name it"

    def float8_forward(
        self, problem: Problem, inputs: Inputs, scales: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            tensor.float() * scale.unsqueeze(-1)
            for tensor, scale in zip(inputs[:3], scales, strict=True)
        )
        exact = replace(problem, dtype=torch.float32)
        out, lse = self.forward(exact, DEFAULT_CONFIG, Inputs(query, key, value))
        return out.to(problem.dtype), lse

    def backward(
        self,
        problem: Problem,
        config: Config,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> Gradients:
        sums = [
            torch.zeros(tensor.shape, dtype=problem.accumulation_dtype, device=tensor.device)
            if need and tensor is not None
            else None
            for need, tensor in zip(needs, inputs.differentiable, strict=True)
        ]
        if results.lse.numel() == 0:
            pass
        elif not problem.varlen:
            _backward(problem, inputs, results, sums)
        else:
            for part in sequences(problem, inputs):
                places = (part.queries, part.keys, part.keys)
                own: list[Tensor | None] = [
                    None if s is None else s[:, where] for s, where in zip(sums, places)
                ]
                own += [None] * 3
                _backward(part.problem, part.inputs(inputs), part.results(results), own)
        dq, dk, dv, *rest = [None if s is None else s.to(problem.dtype) for s in sums]
        drpb = None if sums[3] is None or inputs.rpb is None else sums[3].to(inputs.rpb.dtype)
        return dq, dk, dv, drpb, rest[1], rest[2]


REFERENCE = Reference()
