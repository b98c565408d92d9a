"""Eager neighborhood attention: any floating dtype, any device, every feature; the oracle.

Queries are worked on in tiles of one dilation group, against the box of all keys that some query
of the tile attends to, so that memory is linear in the number of tokens. Sums are done in float64
for float64 inputs and in float32 for all others, whatever their precision; results are rounded
once, at the end. Gradients come from the given output and logsumexp, as in fused kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from natten.functional.problem import Config, Problem
from natten.window import Axis, absent, bounds_table, cleared

# Scores that exist at once: 8 MB in float64, which stays in a CPU's cache.
_SCORES = 1 << 20

Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


@dataclass(frozen=True)
class _Segment:
    """Queries of one tile along one axis, and the keys they attend to."""

    queries: slice
    keys: slice
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
                keys = slice(token, token + d * (keys_high - 1 - keys_low) + 1, d)
            else:
                keys_low = keys_high = 0
                keys = slice(0, 0)
            key_position = torch.arange(keys_low, keys_high)
            visible = (key_position >= low[:, None]) & (key_position < high[:, None])
            query_position = (torch.arange(query_origin, query_origin + query_extent) // d)[queries]
            segments.append(
                _Segment(
                    queries,
                    keys,
                    None if bool(visible.all()) else visible.to(device),
                    (key_position - query_position[:, None]).to(device),
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
            n if axis.kernel_size == axis.length and not axis.is_causal else 1
            for n, axis in zip(tile, axes, strict=True)
        ]

    def scores() -> int:
        keys = [
            min(axis.kernel_size + axis.stride + n - 2, -(-axis.length // axis.dilation))
            for n, axis in zip(tile, axes, strict=True)
        ]
        rows = problem.batch * problem.heads * prod(tile)
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
    keys: tuple[slice, ...]
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

    def columns(self, tensor: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``[B, *X, Hkv, D]`` to ``[B, Hkv, 1, keys + extra, D]``."""
        part = tensor[(slice(None), *self.keys)].flatten(1, -3)
        if extra is not None:
            part = torch.cat([part, extra], dim=1)
        return part.permute(0, 2, 1, 3).unsqueeze(2).to(dtype)

    def put_rows(self, target: Tensor, rows: Tensor) -> None:
        """Write ``[B, groups, G, queries, D]`` to this tile of ``[B, *X, groups * G, D]``."""
        part = target[(slice(None), *self.queries)]
        part.copy_(rows.permute(0, 3, 1, 2, 4).reshape(part.shape))

    def add_columns(self, target: Tensor, extra: Tensor | None, columns: Tensor) -> None:
        """Add ``[B, Hkv, keys + extra, D]`` to this tile's keys and the extra keys."""
        part = target[(slice(None), *self.keys)]
        columns = columns.transpose(1, 2)
        count = prod(part.shape[1:-2])
        part += columns[:, :count].reshape(part.shape)
        if extra is not None:
            extra += columns[:, count:]


def _tiles(problem: Problem, *tensors: Tensor | None) -> Iterator[_Tile]:
    # A masked entry has weight zero, and zero times NaN is NaN: where an input is not finite, a
    # tile may hold only queries of one window, so that nothing reaches a query from outside of it.
    finite = all(bool(t.isfinite().all()) for t in tensors if t is not None)
    per_axis = [
        _segments(axis, *boxes, problem.device)
        for axis, *boxes in zip(
            problem.axes,
            problem.query_origin,
            problem.query_shape,
            problem.key_origin,
            problem.key_shape,
            _tile_shape(problem, shared_window_only=not finite),
            strict=True,
        )
    ]
    for segments in product(*per_axis):
        yield _Tile.of(segments, problem)


def _context(
    problem: Problem, keys: Tensor | None, values: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Which additional keys each batch entry lacks, if any, and keys and values without those."""
    if keys is None or values is None or lengths is None:
        return None, keys, values
    hidden = absent(lengths, problem.num_additional)
    return hidden, cleared(keys, hidden), cleared(values, hidden)


def _scores(
    problem: Problem,
    tile: _Tile,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    hidden: Tensor | None,
) -> Tensor:
    """``[B, Hkv, G, queries, keys + additional]``, -inf where a key is not visible.

    ``q`` is already scaled.
    """
    scores = q @ k.transpose(-1, -2)
    own = scores.shape[-1] - problem.num_additional
    if tile.bias_index is not None:
        bias = rpb[(slice(None), *tile.bias_index)]
        group = problem.heads // problem.heads_kv
        bias = bias.reshape(problem.heads_kv, group, scores.shape[-2], own)
        scores[..., :own] += bias
    if tile.visible is not None:
        scores[..., :own].masked_fill_(~tile.visible, -torch.inf)
    if hidden is not None:
        scores[..., own:].masked_fill_(hidden[:, None, None, None, :], -torch.inf)
    return scores


def _forward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    dtype = problem.accumulation_dtype
    groups = problem.heads_kv
    hidden, additional_keys, additional_values = _context(
        problem, additional_keys, additional_values, lengths
    )
    rpb = None if rpb is None else rpb.to(dtype)
    for tile in _tiles(problem, query, key, value, rpb, additional_keys, additional_values):
        q = tile.rows(query, groups, dtype) * problem.scale
        k = tile.columns(key, additional_keys, dtype)
        v = tile.columns(value, additional_values, dtype)
        if k.shape[-2] == 0:
            tile.put_rows(out, out.new_zeros(()).expand(*q.shape[:-1], problem.head_dim_v))
            tile.put_rows(lse[..., None], lse.new_full((), -torch.inf).expand(*q.shape[:-1], 1))
            continue
        weights = _scores(problem, tile, q, k, rpb, hidden)
        top = weights.amax(-1, keepdim=True)
        # A row with nothing to attend to has no maximum to subtract.
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = weights.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        result = (weights @ v) / total.masked_fill(total == 0, 1.0)
        tile.put_rows(out, result)
        tile.put_rows(lse[..., None], top + total.log())


def _backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gradients: Gradients,
) -> None:
    """Add to ``gradients``, zeros in the accumulation dtype; None is not wanted."""
    dtype = problem.accumulation_dtype
    groups = problem.heads_kv
    hidden, additional_keys, additional_values = _context(
        problem, additional_keys, additional_values, lengths
    )
    dq, dk, dv, drpb, dk_extra, dv_extra = gradients
    rpb = None if rpb is None else rpb.to(dtype)
    inputs = (query, key, value, rpb, additional_keys, additional_values, grad_out, grad_lse)
    for tile in _tiles(problem, *inputs):
        q = tile.rows(query, groups, dtype) * problem.scale
        k = tile.columns(key, additional_keys, dtype)
        v = tile.columns(value, additional_values, dtype)
        if k.shape[-2] == 0:
            continue
        weights = _scores(problem, tile, q, k, rpb, hidden)
        row_lse = tile.rows(lse[..., None], groups, dtype)
        empty = row_lse == -torch.inf
        weights = weights.sub_(row_lse.masked_fill(empty, 0.0)).exp_().masked_fill_(empty, 0.0)
        grad = tile.rows(grad_out, groups, dtype)
        delta = (grad * tile.rows(out, groups, dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - tile.rows(grad_lse[..., None], groups, dtype)
        if dv is not None or dv_extra is not None:
            _add_columns(tile, dv, dv_extra, weights, grad, problem)
        # From here on, the gradient of the scores.
        weights *= grad @ v.transpose(-1, -2) - delta
        if dq is not None:
            tile.put_rows(dq, (weights @ k) * problem.scale)
        if dk is not None or dk_extra is not None:
            _add_columns(tile, dk, dk_extra, weights, q, problem)
        if drpb is not None and tile.bias_index is not None:
            own = weights[..., : weights.shape[-1] - problem.num_additional].sum(0)
            spread = torch.broadcast_tensors(*tile.bias_index)
            drpb.index_put_(
                (torch.arange(problem.heads, device=drpb.device)[:, None], *_flat(spread)),
                own.reshape(problem.heads, -1),
                accumulate=True,
            )
    if hidden is not None:
        for extra in (dk_extra, dv_extra):
            if extra is not None:
                extra.masked_fill_(hidden[:, :, None, None], 0.0)


def _flat(index: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
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
    if target is None:
        count = columns.shape[-2] - problem.num_additional
        extra += columns[:, :, count:].transpose(1, 2)
    else:
        tile.add_columns(target, extra, columns)


def _sequences(
    problem: Problem, cumulative_q: Tensor, cumulative_kv: Tensor
) -> Iterator[tuple[Problem, slice, slice]]:
    """The problem of each packed sequence, and where its tokens are."""
    q_ends, kv_ends = cumulative_q.tolist(), cumulative_kv.tolist()
    for i in range(len(q_ends) - 1):
        queries = slice(q_ends[i], q_ends[i + 1])
        keys = slice(kv_ends[i], kv_ends[i + 1])
        lengths = (queries.stop - queries.start, keys.stop - keys.start)
        grid = (max(*lengths, 1),)
        yield (
            replace(
                problem,
                query_shape=lengths[:1],
                key_shape=lengths[1:],
                grid=grid,
                kernel_size=grid,
                varlen=False,
            ),
            queries,
            keys,
        )


class Reference:
    """The eager backend. Never declines."""

    name = "reference"

    def refusal(self, problem: Problem, config: Config) -> str | None:
        return None

    def configs(self, problem: Problem) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return []

    def backward_configs(self, problem: Problem) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return []

    def forward(
        self,
        problem: Problem,
        config: Config,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        cumulative_seqlen_q: Tensor | None,
        cumulative_seqlen_kv: Tensor | None,
        additional_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = query.new_empty(problem.output_shape)
        lse = query.new_empty(problem.lse_shape, dtype=problem.accumulation_dtype)
        if out.numel() == 0 and lse.numel() == 0:
            return out, lse
        if not problem.varlen:
            extra = (additional_keys, additional_values, additional_lengths)
            _forward(problem, query, key, value, rpb, *extra, out, lse)
            return out, lse
        # Tokens behind the last sequence belong to none.
        out.zero_()
        lse.fill_(-torch.inf)
        for part, q, kv in _sequences(problem, cumulative_seqlen_q, cumulative_seqlen_kv):
            tensors = (query[:, q], key[:, kv], value[:, kv])
            _forward(part, *tensors, None, None, None, None, out[:, q], lse[:, q])
        return out, lse

    def backward(
        self,
        problem: Problem,
        config: Config,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        cumulative_seqlen_q: Tensor | None,
        cumulative_seqlen_kv: Tensor | None,
        additional_lengths: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: tuple[bool, bool, bool, bool, bool, bool],
    ) -> Gradients:
        inputs = (query, key, value, rpb, additional_keys, additional_values)
        dtype = problem.accumulation_dtype
        sums = [
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
            if need and tensor is not None
            else None
            for need, tensor in zip(needs, inputs, strict=True)
        ]
        if lse.numel() == 0:
            pass
        elif not problem.varlen:
            _backward(
                problem, grad_out, grad_lse, *inputs, additional_lengths, out, lse, tuple(sums)
            )
        else:
            for part, q, kv in _sequences(problem, cumulative_seqlen_q, cumulative_seqlen_kv):
                rows = [None if t is None else t[:, q] for t in (grad_out, grad_lse, out, lse)]
                _backward(
                    part,
                    *rows[:2],
                    query[:, q],
                    key[:, kv],
                    value[:, kv],
                    None,
                    None,
                    None,
                    None,
                    *rows[2:],
                    tuple(
                        None if s is None else s[:, where]
                        for s, where in zip(sums[:3], (q, kv, kv), strict=True)
                    )
                    + (None, None, None),
                )
        return tuple(
            None if s is None else s.to(tensor.dtype)
            for s, tensor in zip(sums, inputs, strict=True)
        )


REFERENCE = Reference()
