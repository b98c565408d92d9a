"""Attention over windows in operators of torch's own: tables of indices, gathers, products of
matrices and a softmax.

It serves where a fused kernel cannot: derivatives of every order are made of its parts
(:mod:`natten.functional.derivatives`), and programs for runtimes without this library's operators
consist of it (:func:`attention`, which exported programs are decomposed into).

Queries are worked on in tiles of one dilation group, against a box of all keys that some query of
the tile sees, as many tiles at a time as fit a budget: memory is linear in the number of tokens.
Nothing here looks at what a tensor holds, so that all of it can be traced, batched and
differentiated. Numbers that are not finite may reach other queries of their tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from natten._internals import is_known
from natten.functional.backend import Inputs
from natten.functional.problem import Problem
from natten.window import Axis, absent, bounds_table, cleared

# Numbers at a time: a core's cache, or enough to fill a GPU.
_CHUNK = {"cpu": 1 << 20}
_DEFAULT_CHUNK = 1 << 24
# Queries of a tile: more of them share more keys, and see fewer of those in their box.
_TILE = 64
_SHORTEST = 8


class AxisTiles(NamedTuple):
    """Tiles along one axis; tokens are counted in the boxes of queries and of keys."""

    queries: Tensor  # int64 [tiles, size]; what fills a tile up repeats its first query
    real: Tensor | None  # bool [tiles, size]: what does not fill up; None if nothing does
    keys: Tensor  # int64 [tiles, width]
    visible: Tensor | None  # bool [tiles, size, width]; None if all are
    distance: Tensor  # int64 [tiles, size, width]: key position - query position
    tile: Tensor  # int64 [extent]: which tile a query is in
    slot: Tensor  # int64 [extent]: its place there


def _axis_tiles(
    axis: Axis,
    query_box: tuple[int, int],
    key_box: tuple[int, int],
    size: int | None,
    device: torch.device,
) -> AxisTiles:
    """Cut an axis into tiles of ``size`` queries.

    Args:
        axis: The axis.
        query_box: Origin and extent.
        key_box: Likewise.
        size: None for one tile of all queries and all keys, where every window is the whole axis;
            else of symbolic extents only 1.
        device: Of the tables.
    """
    (query_origin, extent), (key_origin, key_extent) = query_box, key_box
    d = axis.dilation
    token = torch.arange(extent, device=device)
    is_whole = size is None
    if size is None:
        size, width = extent, key_extent
        tile, slot = torch.zeros_like(token), token
        offset = first = tile[:1]
    elif size == 1:
        width = axis.kernel_size
        tile, slot = token, torch.zeros_like(token)
        offset, first = (token % d, token // d) if d > 1 else (slot, token)
    else:
        lengths = [-(-(extent - group) // d) for group in range(min(d, extent))]
        starts = [(g, p) for g, length in enumerate(lengths) for p in range(0, length, size)]
        offset, first = torch.tensor(starts, device=device).unbind(1)
        before = [0]
        for length in lengths:
            before.append(before[-1] + -(-length // size))
        tile = torch.tensor(before, device=device)[token % d] + token // d // size
        slot = token // d % size
        # Windows of queries side by side start at most so far from each other.
        width = axis.kernel_size + axis.stride - 1 - (1 - size) // axis.upsampling
        if not axis.is_circular:
            width = min(width, -(-key_extent // d))
    if isinstance(key_extent, int) and key_extent == 0:
        width = 0
    start, end = bounds_table(axis, query_origin, extent, key_origin, key_extent, device)
    real = None
    if is_whole:
        queries, low, high = token[None], start[None], end[None]
        begin = torch.full_like(offset, key_origin)[:, None]
    elif size == 1:
        queries, low, high = token[:, None], start[:, None], end[:, None]
        begin = low
    else:
        queries = offset[:, None] + d * (first[:, None] + torch.arange(size, device=device))
        real = queries < extent
        queries = torch.where(real, queries, (offset + d * first)[:, None])
        low, high = start[queries], end[queries]
        begin = torch.where(high > low, low, 2 * axis.length).amin(1, keepdim=True)
    position = begin + torch.arange(width, device=device)
    group = (query_origin + offset[:, None]) % d if d > 1 else 0
    if axis.is_circular:
        # A box that is longer than the ring has a key at more than one position.
        keys = group + d * (position % (axis.length // d))
    else:
        keys = group + d * position - key_origin
    inside = position[:, None]
    distance = inside - ((query_origin + queries) // d // axis.upsampling)[..., None]
    if not axis.is_causal and (is_whole or (real is None and is_known(key_extent == axis.length))):
        return AxisTiles(queries, real, keys, None, distance, tile, slot)
    if not axis.is_circular:
        keys = keys.clamp(0, max=key_extent - 1)
    visible = (inside >= low[..., None]) & (inside < high[..., None])
    if real is not None:
        visible = visible & real[..., None]
    return AxisTiles(queries, real, keys, visible, distance, tile, slot)


class _Sequences(NamedTuple):
    """Which of the packed sequences each token belongs to, and its place there."""

    number: Tensor
    place: Tensor
    exists: Tensor

    @staticmethod
    def of(ends: Tensor, tokens: int) -> _Sequences:
        token = torch.arange(tokens, device=ends.device)
        # As torch.searchsorted, which not all runtimes have.
        number = (ends[1:] <= token[:, None]).sum(1)
        exists = number < ends.shape[0] - 1
        return _Sequences(number, token - ends.long()[number], exists)


class Columns(NamedTuple):
    """Numbers of the keys that a chunk's tiles see."""

    own: Tensor  # [batch, tiles, heads_kv, width, features]
    extra: Tensor | None  # of keys that all see, [batch, 1, heads_kv, number, features]


class Operands(NamedTuple):
    """What the scores and the output of some tiles are made of."""

    query: Tensor  # rows
    key: Columns
    value: Columns
    bias: Tensor | None  # [tiles, heads_kv, group, size, keys]


class Chunk(NamedTuple):
    """Some tiles.

    Rows are what there is for each query, ``[batch, tiles, heads_kv, group, size, features]`` with
    the heads of a group that share a key head; pairs are rows with one feature for each key: those
    of the tile, the additional ones, and the sink, which is a key of zeros with a bias.
    """

    problem: Problem
    queries: Tensor  # int64 [tiles, size]: flat tokens
    real: Tensor | None  # bool [1 or batch, tiles, size]: queries that may see something
    keys: Tensor  # int64 [tiles, width]
    visible: Tensor | None  # bool [1 or batch, tiles, size, width]
    bias_index: Tensor | None  # int64 [tiles, size, width]: flat entries of a head's rpb
    hidden: Tensor | None  # bool [batch, tiles, width]: keys that are not valid
    absent: Tensor | None  # bool [batch, additional keys]: likewise
    query_mask: Tensor | None  # bool [batch, tiles, size]

    # Only reshape and permute, which all of torch's batched tensors know.

    @property
    def num_extra(self) -> int:
        """Keys that all see: the additional ones, and the sink."""
        return self.problem.num_additional + self.problem.has_sink

    def rows(self, tensor: Tensor) -> Tensor:
        """Rows of ``[batch, *query_shape, heads, features]``; 0 where a query is not valid."""
        problem, (*_, heads, features) = self.problem, tensor.shape
        tokens = tensor.reshape(problem.batch, problem.num_queries, heads, features)
        part = tokens.index_select(1, self.queries.reshape(-1)).reshape(
            problem.batch, *self.queries.shape, problem.heads_kv, heads // problem.heads_kv,
            features,
        )  # fmt: skip
        part = part.permute(0, 1, 3, 4, 2, 5).to(problem.accumulation_dtype)
        if self.query_mask is not None:
            part = part.masked_fill(~self.query_mask[:, :, None, None, :, None], 0.0)
        return part

    def columns(self, tensor: Tensor, extra: Tensor | None) -> Columns:
        """Columns of ``[batch, *key_shape, heads_kv, features]`` and ``[batch, additional keys,
        heads_kv, features]``; 0 where a key is not valid."""
        problem, features = self.problem, tensor.shape[-1]
        tokens = tensor.reshape(problem.batch, problem.num_keys, problem.heads_kv, features)
        part = tokens.index_select(1, self.keys.reshape(-1)).reshape(
            problem.batch, *self.keys.shape, problem.heads_kv, features
        )
        if self.hidden is not None:
            part = cleared(part, self.hidden)
        own = part.permute(0, 1, 3, 2, 4).to(problem.accumulation_dtype)
        if extra is not None and self.absent is not None:
            extra = cleared(extra, self.absent)
        if problem.has_sink:
            zeros = tensor.new_zeros(problem.batch, 1, problem.heads_kv, features)
            extra = zeros if extra is None else torch.cat([extra, zeros], 1)
        if extra is None:
            return Columns(own, None)
        return Columns(own, extra.transpose(1, 2).unsqueeze(1).to(problem.accumulation_dtype))

    def operands(self, inputs: Inputs) -> Operands:
        """The inputs, or tangents of them."""
        return Operands(
            self.rows(inputs.query),
            self.columns(inputs.key, inputs.additional_keys),
            self.columns(inputs.value, inputs.additional_values),
            self._bias(inputs.rpb, inputs.sink),
        )

    def _bias(self, rpb: Tensor | None, sink: Tensor | None) -> Tensor | None:
        """What is added to the scores."""
        if rpb is None and sink is None:
            return None
        problem, (tiles, size) = self.problem, self.queries.shape
        heads = (problem.heads_kv, problem.heads // problem.heads_kv)
        dtype = problem.accumulation_dtype

        def zeros(number: int) -> Tensor:
            shape = (tiles, *heads, size, number)
            return torch.zeros(shape, dtype=dtype, device=self.queries.device)

        parts = [zeros(self.keys.shape[1])]
        if rpb is not None and self.bias_index is not None:
            table = rpb.reshape(problem.heads, -1).to(dtype)
            bias = table.index_select(1, self.bias_index.reshape(-1))
            parts = [bias.reshape(*heads, *self.bias_index.shape).permute(2, 0, 1, 3, 4)]
        parts.append(zeros(problem.num_additional))
        if sink is not None:
            logits = sink.reshape(*heads, 1, 1).to(dtype)
            parts.append(logits.expand(tiles, *heads, size, 1))
        return torch.cat(parts, -1)

    def softmax(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, 0 where a query does not see a key, and logsumexp, rows of one feature."""
        if self.visible is None and self.real is None and self.absent is None:
            return pairs.softmax(-1), pairs.logsumexp(-1, keepdim=True)
        tiles, size, width = *self.queries.shape, self.keys.shape[1]
        seen = more = pairs.new_ones((1, 1, 1, 1, 1, 1), dtype=torch.bool)
        if self.visible is not None:
            seen = self.visible[:, :, None, None]
        if self.real is not None:
            more = self.real[:, :, None, None, :, None]
        if self.num_extra:
            if self.absent is not None:
                own = more & ~self.absent[:, None, None, None, None]
                sinks = more.expand(*own.shape[:-1], self.problem.has_sink)
                more = torch.cat([own, sinks], -1)
            batch = max(seen.shape[0], more.shape[0])
            parts = [
                part.expand(batch, tiles, 1, 1, size, number)
                for part, number in ((seen, width), (more, self.num_extra))
            ]
            seen = torch.cat(parts, -1)
        nothing = ~seen.any(-1, keepdim=True)
        # A query without a key has no maximum to subtract, and its weights have no derivative.
        pairs = pairs.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0.0)
        weights = pairs.softmax(-1).masked_fill(nothing, 0.0)
        return weights, pairs.logsumexp(-1, keepdim=True).masked_fill(nothing, -torch.inf)


def _merged(rows: Tensor) -> Tensor:
    """Rows with the heads of a group behind one another: what goes into products of matrices."""
    *_, group, size, features = rows.shape
    return rows.reshape(*rows.shape[:3], group * size, features)


def dot(rows: Tensor, columns: Columns) -> Tensor:
    """Products of every query with every key: pairs."""
    matrices = _merged(rows)
    products = matrices @ columns.own.transpose(-1, -2)
    if columns.extra is not None:
        products = torch.cat([products, matrices @ columns.extra.transpose(-1, -2)], -1)
    return products.reshape(*rows.shape[:-1], products.shape[-1])


def weighted_sum(pairs: Tensor, columns: Columns) -> Tensor:
    """Sums over the keys: rows."""
    matrices, width = _merged(pairs), columns.own.shape[-2]
    if columns.extra is None:
        sums = matrices @ columns.own
    else:
        own, extra = matrices.split_with_sizes([width, matrices.shape[-1] - width], -1)
        sums = own @ columns.own + extra @ columns.extra
    return sums.reshape(*pairs.shape[:-1], sums.shape[-1])


def column_sum(pairs: Tensor, rows: Tensor, width: int) -> Columns:
    """Sums over the queries, and of additional keys over the tiles: columns."""
    sums = _merged(pairs).transpose(-1, -2) @ _merged(rows)
    if pairs.shape[-1] == width:
        return Columns(sums, None)
    own, extra = sums.split_with_sizes([width, pairs.shape[-1] - width], -2)
    return Columns(own, extra.sum(1, keepdim=True))


class Scores(NamedTuple):
    """What the softmax is of, and how a soft cap bends the products: None without."""

    scores: Tensor
    slope: Tensor | None  # first derivative of scores by products
    curvature: Tensor | None  # the second


def scores(problem: Problem, x: Operands) -> Scores:
    """The scaled products, capped, and the bias."""
    pairs = problem.scale * dot(x.query, x.key)
    slope = curvature = None
    if problem.softcap:
        bent = (pairs / problem.softcap).tanh()
        pairs, slope = problem.softcap * bent, 1 - bent.square()
        curvature = (-2 / problem.softcap) * bent * slope
    return Scores(pairs if x.bias is None else pairs + x.bias, slope, curvature)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``[tiles, n]`` and ``[tiles, m]`` to their sums ``[tiles, n * m]``."""
    return (a[:, :, None] + b[:, None]).flatten(1)


def _spread(pairs: Tensor, is_inner: bool = False) -> Tensor:
    """``[tiles, q, k]`` of outer axes or of an inner one, for ``[tiles, q, q', k, k']``."""
    return pairs[:, None, :, None] if is_inner else pairs[:, :, None, :, None]


def _ones(like: Tensor, *sizes: int) -> Tensor:
    return torch.ones(like.shape[0], *sizes, dtype=torch.bool, device=like.device)


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _at(mask: Tensor, tokens: Tensor) -> Tensor:
    """``[batch, *tokens]`` at flat tokens ``[tiles, n]``: ``[batch, tiles, n]``."""
    found = mask.flatten(1).index_select(1, tokens.reshape(-1))
    return found.reshape(mask.shape[0], *tokens.shape)


def _sizes(problem: Problem) -> list[int]:
    """Tiles that are not much smaller than the window."""
    sizes = [
        min(-(-extent // axis.dilation), max(axis.kernel_size * axis.upsampling, _SHORTEST))
        for extent, axis in zip(problem.query_shape, problem.axes, strict=True)
    ]
    while prod(sizes) > _TILE:
        ratios = [
            size / axis.kernel_size if size > 1 else 0.0
            for size, axis in zip(sizes, problem.axes, strict=True)
        ]
        widest = ratios.index(max(ratios))
        sizes[widest] = -(-sizes[widest] // 2)
    return sizes


class Tiles:
    """All tiles of a problem.

    Args:
        problem: What is asked for.
        inputs: Its tensors, of which those of integers are looked at.
        sizes: Of a tile along each axis, as `_axis_tiles` takes it; default by the window.
    """

    def __init__(
        self, problem: Problem, inputs: Inputs, sizes: Sequence[int | None] | None = None
    ) -> None:
        self.problem = problem
        self.inputs = inputs
        axes = problem.axes
        self._sequences: tuple[_Sequences, _Sequences] | None = None
        if inputs.cumulative_seqlen_q is not None and inputs.cumulative_seqlen_kv is not None:
            # Causality is within a sequence.
            axes = tuple([axis._replace(is_causal=False) for axis in axes])
            self._sequences = (
                _Sequences.of(inputs.cumulative_seqlen_q, problem.query_shape[0]),
                _Sequences.of(inputs.cumulative_seqlen_kv, problem.key_shape[0]),
            )
        sizes = _sizes(problem) if sizes is None else sizes
        self._is_in_order = all(n == 1 for n in sizes) or all(n is None for n in sizes)
        self._axes = [
            _axis_tiles(axis, query_box, key_box, size, inputs.query.device)
            for axis, query_box, key_box, size in zip(
                axes,
                zip(problem.query_origin, problem.query_shape, strict=True),
                zip(problem.key_origin, problem.key_shape, strict=True),
                sizes,
                strict=True,
            )
        ]

    def whole(self) -> Chunk:
        """All tiles at once."""
        counts = [axis.queries.shape[0] for axis in self._axes]
        ranges = [torch.arange(count, device=self.inputs.query.device) for count in counts]
        return self._chunk([t.flatten() for t in torch.meshgrid(*ranges, indexing="ij")])

    def chunks(self) -> Iterator[Chunk]:
        """As many tiles at a time as fit the budget."""
        problem, device = self.problem, self.inputs.query.device
        counts = [axis.queries.shape[0] for axis in self._axes]
        queries = prod([axis.queries.shape[1] for axis in self._axes])
        keys = prod([axis.keys.shape[1] for axis in self._axes])
        pairs = problem.heads * queries * (keys + problem.num_additional + 1)
        gathered = (
            problem.heads_kv
            * (keys + problem.num_additional)
            * (problem.head_dim + problem.head_dim_v)
        )
        budget = _CHUNK.get(device.type, _DEFAULT_CHUNK)
        step = max(1, budget // max(1, problem.batch * max(pairs, gathered)))
        total = prod(counts)
        for begin in range(0, total, step):
            number = torch.arange(begin, min(begin + step, total), device=device)
            numbers = []
            for count in reversed(counts):
                numbers.append(number % count)
                number = number // count
            yield self._chunk(numbers[::-1])

    def _chunk(self, numbers: Sequence[Tensor]) -> Chunk:
        """Tiles by their numbers along each axis."""
        problem, lengths = self.problem, self.inputs.additional_lengths
        queries = keys = index = torch.zeros_like(numbers[0])[:, None]
        index = index[..., None]
        shapes = [(axis.queries[own], axis.keys[own]) for axis, own in zip(self._axes, numbers)]
        real = visible = None
        for i, (axis, own) in enumerate(zip(self._axes, numbers, strict=True)):
            outer, inner = (queries.shape[1], keys.shape[1]), shapes[i]
            queries = _outer(queries * problem.query_shape[i], inner[0])
            keys = _outer(keys * problem.key_shape[i], inner[1])
            if real is not None or axis.real is not None:
                parts = [
                    _ones(own, outer[0]) if real is None else real,
                    _ones(own, inner[0].shape[1]) if axis.real is None else axis.real[own],
                ]
                real = (parts[0][:, :, None] & parts[1][:, None]).flatten(1)
            if visible is not None or axis.visible is not None:
                sizes = [t.shape[1] for t in inner]
                parts = [
                    _ones(own, *outer) if visible is None else visible,
                    _ones(own, *sizes) if axis.visible is None else axis.visible[own],
                ]
                visible = _spread(parts[0]) & _spread(parts[1], True)
                visible = visible.flatten(3, 4).flatten(1, 2)
            if problem.has_rpb:
                size = 2 * problem.kernel_size[i] - 1
                # Pairs that are not visible must not leave the table.
                entry = (axis.distance[own] + problem.kernel_size[i] - 1).clamp(0, size - 1)
                index = _spread(index * size) + _spread(entry, True)
                index = index.flatten(3, 4).flatten(1, 2)
        if self._sequences is not None:
            q, k = self._sequences
            q, k = (_Sequences(*[t[i] for t in s]) for s, i in ((q, queries), (k, keys)))
            same = (q.number[..., None] == k.number[:, None]) & q.exists[..., None]
            if problem.is_causal[0]:
                same = same & (q.place[..., None] >= k.place[:, None])
            visible = _both(visible, same)
            real = _both(real, q.exists)
        real, visible = (None if t is None else t[None] for t in (real, visible))
        hidden = query_mask = None
        if self.inputs.key_mask is not None:
            valid = _at(self.inputs.key_mask, keys)
            visible, hidden = _both(visible, valid[:, :, None]), ~valid
        if self.inputs.query_mask is not None:
            query_mask = _at(self.inputs.query_mask, queries)
            real, visible = _both(real, query_mask), _both(visible, query_mask[..., None])
        missing = None if lengths is None else absent(lengths, problem.num_additional)
        return Chunk(
            problem, queries, real, keys, visible, index if problem.has_rpb else None, hidden,
            missing, query_mask,
        )  # fmt: skip

    def in_order(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of all chunks as ``[batch, *query_shape, heads, features]``."""
        problem = self.problem
        parts = [
            r.permute(0, 1, 4, 2, 3, 5).reshape(
                r.shape[0], r.shape[1] * r.shape[4], problem.heads, r.shape[-1]
            )
            for r in rows
        ]
        found = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if not self._is_in_order:
            found = found.index_select(1, self._places())
        return found.reshape(problem.batch, *problem.query_shape, *found.shape[2:])

    def _places(self) -> Tensor:
        """Which row of all tiles' each query is."""
        first, *others = self._axes
        tile, slot = first.tile, first.slot
        for axis in others:
            tiles, size = axis.queries.shape
            tile = (tile[:, None] * tiles + axis.tile).flatten()
            slot = (slot[:, None] * size + axis.slot).flatten()
        size = prod([axis.queries.shape[1] for axis in self._axes])
        return tile * size + slot


def attention(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out ``[batch, *query_shape, heads, head_dim_v]`` in the problem's dtype, and logsumexp
    ``[batch, *query_shape, heads]``, in one program for all sizes: a query is a tile, and each
    gathers the keys of its window. Along axes that a window covers, all queries share all keys.
    """
    sizes = [
        None
        if axis.dilation == 1 and not axis.is_circular and is_known(axis.kernel_size == axis.length)
        else 1
        for axis in problem.axes
    ]
    tiles = Tiles(problem, inputs, sizes)
    chunk = tiles.whole()
    x = chunk.operands(inputs)
    weights, lse = chunk.softmax(scores(problem, x).scores)
    out = weighted_sum(weights, x.value).to(problem.dtype)
    return tiles.in_order([out]), tiles.in_order([lse]).squeeze(-1)


__all__ = [
    "Chunk",
    "Columns",
    "Operands",
    "Scores",
    "Tiles",
    "attention",
    "column_sum",
    "dot",
    "scores",
    "weighted_sum",
]
