"""explain: what a sharded call costs before there is a cluster to run it on, and the best mesh.

Bytes are exact, from the boxes that the ranks would have. Times of products are
:func:`natten.simulate`'s, for the same boxes, and what packing, joining and adding up moves in a
rank's own memory; the exchange takes its bytes over the bandwidth of links, of which those of a
node were measured and those between nodes are assumed; and the two are laid over each other as the
halo method does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import inf, prod
from typing import Any, NamedTuple

import torch

from natten import devices, validation
from natten.devices import Device
from natten.distributed.boxes import (
    Box,
    chunk_lengths,
    interior_first,
    margin,
    needed,
    turns,
    unrolled,
    whole,
)
from natten.functional.problem import Problem
from natten.simulator import make_problem, on_gpu, simulate_problem
from natten.tables import Table
from natten.types import BoolOrSequence, IntOrSequence
from natten.window import Axis


class Links(NamedTuple):
    """What connects ranks.

    Attributes:
        node: GB/s that a rank sends, and receives, inside of its node.
        between: GB/s that it does between nodes.
        latency: Microseconds of an exchange inside of a node.
        latency_between: Microseconds of an exchange between nodes.
    """

    node: float = 250.0
    between: float = 43.0
    latency: float = 100.0
    latency_between: float = 120.0

    def ms(self, near: float, far: float) -> float:
        """Milliseconds of one exchange of so many bytes; both kinds travel at once."""
        if not near and not far:
            return 0.0
        latency = self.latency_between if far else self.latency
        return max(near / self.node, far / self.between) / 1e6 + latency / 1e3


@dataclass(frozen=True)
class Estimate:
    """One way to share a call out.

    Attributes:
        shards: Ranks along each axis of tokens.
        heads: Ranks that share out the heads of one box of tokens (``heads_dim``).
        nodes: Ranks of one node along each axis of tokens, and of its heads.
        halo_bytes: Keys and values that the rank with the slowest exchange receives, forward.
        far_bytes: Those of them that come from other nodes.
        heads_bytes: Bytes of query, key, value and output that it exchanges for heads.
        peers: Ranks that it receives keys of.
        ratio: Keys that it holds over its own.
        forward_ms, backward_ms: Predicted, with what of the exchange is not hidden.
        products_ms: Of both, the products alone.
        exchange_ms: Of both, the exchanges alone.
        speedup: Over one rank.
    """

    shards: tuple[int, ...]
    heads: int
    nodes: tuple[int, ...]
    halo_bytes: float
    far_bytes: float
    heads_bytes: float
    peers: int
    ratio: float
    forward_ms: float
    backward_ms: float
    products_ms: float
    exchange_ms: float
    speedup: float

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return prod(self.shards) * self.heads

    @property
    def efficiency(self) -> float:
        """Speedup over the number of ranks."""
        return self.speedup / self.ranks

    @property
    def hidden(self) -> float:
        """The share of the exchanges that goes on beside products."""
        exposed = self.forward_ms + self.backward_ms - self.products_ms
        return 1.0 - exposed / self.exchange_ms if self.exchange_ms else 1.0


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found. ``print`` it for a table.

    Attributes:
        estimates: The best ways first.
        alone_ms: Forward and backward pass on one rank.
        device: What they were predicted for.
        links: Likewise.
    """

    estimates: tuple[Estimate, ...]
    alone_ms: float
    device: Device
    links: Links

    @property
    def best(self) -> Estimate:
        """The fastest."""
        return self.estimates[0]

    def __str__(self) -> str:
        columns = (
            "ranks", "tokens over", "heads over", "halo MB", "between nodes", "heads MB", "peers",
            "keys / own", "forward ms", "backward ms", "hidden", "speedup", "efficiency",
        )  # fmt: skip
        shown = Table(
            f"Forward and backward pass, predicted for {self.device.full_name}: "
            f"{self.alone_ms:.1f} ms on one",
            columns,
            3,
            caption=f"Links of {self.links.node:g} GB/s inside of nodes, {self.links.between:g} "
            "between them. Bytes are those that the busiest rank receives in the forward pass.",
        )
        for e in self.estimates:
            shown.add(
                str(e.ranks), " x ".join(map(str, e.shards)), str(e.heads),
                f"{e.halo_bytes / 1e6:.1f}", f"{e.far_bytes / 1e6:.1f}",
                f"{e.heads_bytes / 1e6:.1f}", str(e.peers), f"{e.ratio:.2f}",
                f"{e.forward_ms:.2f}", f"{e.backward_ms:.2f}", f"{e.hidden:.0%}",
                f"{e.speedup:.2f}", f"{e.efficiency:.0%}",
            )  # fmt: skip
        return str(shown)


def explain(
    grid: Sequence[int],
    kernel_size: IntOrSequence,
    stride: IntOrSequence = 1,
    dilation: IntOrSequence = 1,
    is_causal: BoolOrSequence = False,
    *,
    is_circular: BoolOrSequence | None = False,
    ranks: int,
    heads: int,
    heads_kv: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    shards: Sequence[int] | None = None,
    heads_ranks: int | None = None,
    ranks_per_node: int = 8,
    head_chunks: int = 4,
    device: str = "h100",
    links: Links | None = None,
    top: int = 5,
) -> Report:
    """What a call costs on a mesh of ``ranks``: bytes, peers, what overlaps, and the best meshes.

    >>> print(natten.distributed.explain((30, 48, 80), (18, 24, 24), ranks=8, heads=24))

    Nothing is run, and no process group is needed.

    Args:
        grid: Extents of the whole grid.
        kernel_size, stride, dilation, is_causal, is_circular: Of the call.
        ranks: How many.
        heads, heads_kv, head_dim, head_dim_v, batch, dtype: Of the tensors.
        shards: Ranks along each axis of tokens; None for all ways there are.
        heads_ranks: Ranks that exchange tokens for heads; None for all numbers that divide
            heads_kv, if ``shards`` is None, else 1.
        ranks_per_node: How many share the links of a node.
        head_chunks: As of :func:`neighborhood_attention`.
        device: A name as :func:`natten.simulate` takes it.
        links: Between ranks; default: NVLink as measured on H100s, and 400 Gb/s a rank.
        top: How many ways to report.

    Raises:
        ValueError: Arguments that are wrong, or no way to share the grid out among so many ranks.
    """
    problem = make_problem(
        grid, kernel_size, stride, dilation, is_causal, is_circular=is_circular, batch=batch,
        heads=heads, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
        requires_grad=True,
    )  # fmt: skip
    for name, value in (("ranks", ranks), ("ranks_per_node", ranks_per_node), ("top", top)):
        validation.check_positive_int(name, value)
    found, links = devices.find(device), links or Links()
    model = _Model(on_gpu(problem), found, links, min(ranks_per_node, ranks), head_chunks)
    ways = list(_ways(problem, ranks, shards, heads_ranks))
    # The simulator is asked about those that exchange the fewest bytes for each number of heads.
    kept = []
    for group in {w[-1]: None for w in ways}:
        kept += sorted((w for w in ways if w[-1] == group), key=model.bytes_of)[: max(top, 3)]
    estimates = [model.estimate(w[:-1], w[-1], n) for w in kept for n in model.placements(w)]
    best: dict[tuple[int, ...], Estimate] = {}
    for e in sorted(estimates, key=lambda e: e.forward_ms + e.backward_ms):
        best.setdefault((*e.shards, e.heads), e)
    if not best:
        raise ValueError(f"no way to share {problem.grid} tokens and {heads} heads among {ranks}")
    return Report(tuple(list(best.values())[:top]), sum(model.alone), found, links)


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)


def _ways(
    problem: Problem, ranks: int, shards: Sequence[int] | None, heads_ranks: int | None
) -> Iterator[tuple[int, ...]]:
    """Ranks along each axis of tokens, and along heads."""
    if shards is not None:
        heads = heads_ranks or 1
        wanted = validation.int_tuple("shards", shards, problem.rank)
        if prod(wanted) * heads != ranks:
            raise ValueError(f"shards must make {ranks} ranks, got {wanted} and {heads} of heads")
        yield (*wanted, heads)
        return
    for way in _factors(ranks, problem.rank + 1):
        *cuts, heads = way
        if heads_ranks not in (None, heads) or problem.heads_kv % heads:
            continue
        # No rank without tokens.
        if all(chunk_lengths(n, c)[-1] for n, c in zip(problem.grid, cuts)):
            yield way


# Of the bandwidth of memory, what copies of boxes reach.
_COPY_EFFICIENCY = 0.85


class _Along(NamedTuple):
    """One shard along one axis: tokens it owns, needs, and finds in its node, and their owners."""

    origin: int
    own: int
    low: int
    needed: int
    near: int
    owners: int


class _Model:
    def __init__(
        self, problem: Problem, device: Device, links: Links, per_node: int, chunks: int
    ) -> None:
        self.problem, self.device, self.links = problem, device, links
        self.per_node, self.chunks = per_node, chunks
        size = problem.dtype.itemsize * problem.batch
        self.kv_bytes = size * problem.heads_kv * (problem.head_dim + problem.head_dim_v)
        self.q_bytes = size * problem.heads * (problem.head_dim + problem.head_dim_v)
        everything = whole(problem.grid)
        self.alone = self.products(everything, everything, 1)

    def products(self, own: Box, keys: Box, heads: int) -> tuple[float, float]:
        """Milliseconds of one rank's forward and backward products."""
        p, axes = self.problem, self.axes_of(own)
        rings = tuple([axis.is_circular for axis in axes])
        return _products(
            replace(
                p, grid=tuple([axis.length for axis in axes]),
                is_circular=rings if any(rings) else (), query_shape=own.extent,
                query_origin=own.origin, key_shape=keys.extent, key_origin=keys.origin,
                heads=p.heads // heads, heads_kv=p.heads_kv // heads,
            ),
            self.device,
        )  # fmt: skip

    def axes_of(self, own: Box) -> tuple[Axis, ...]:
        """The axes, with rings that the boxes of ranks cut unrolled."""
        return tuple(
            [
                unrolled(axis) if axis.is_circular and n != axis.length else axis
                for axis, n in zip(self.problem.axes, own.extent)
            ]
        )

    def along(self, axis: int, cuts: int, in_node: int) -> list[_Along]:
        lengths = chunk_lengths(self.problem.grid[axis], cuts)
        ends = [sum(lengths[:i]) for i in range(cuts + 1)]
        whole_axis = self.problem.axes[axis]
        is_cut_ring = whole_axis.is_circular and cuts > 1
        around = turns(whole_axis) if is_cut_ring else (0,)
        ends = [end + (margin(whole_axis) if is_cut_ring else 0) for end in ends]
        axes = [unrolled(whole_axis) if is_cut_ring else whole_axis]
        result = []
        for i in range(cuts):
            (low,), (extent,) = needed(axes, Box((ends[i],), (lengths[i],)))

            def seen(start: int, end: int, low: int = low, high: int = low + extent) -> int:
                return sum(max(min(high, end + t) - max(low, start + t), 0) for t in around)

            first = i // in_node * in_node
            near = seen(ends[first], ends[first + in_node])
            owners = sum(seen(a, b) > 0 for a, b in pairwise(ends))
            result.append(_Along(ends[i], lengths[i], low, extent, near, owners))
        return result

    def bytes_of(self, way: tuple[int, ...]) -> float:
        """What the busiest rank receives."""
        *cuts, heads = way
        tables = [self.along(axis, n, n) for axis, n in enumerate(cuts)]
        most = max(
            prod(a.needed for a in place) - prod(a.own for a in place)
            for place in product(*map(_distinct, tables))
        )
        return most * self.kv_bytes / heads + self._heads_bytes(tables, heads)

    def _heads_bytes(self, tables: list[list[_Along]], heads: int) -> float:
        own = prod(max(a.own for a in table) for table in tables)
        return own / heads * (self.kv_bytes + self.q_bytes) * (heads - 1) / heads

    def _copied(self, own: Box, keys: Box, heads: int) -> tuple[float, float]:
        """Milliseconds that one rank spends in its own memory: keys packed, joined and written
        out, each read and written; and in the backward pass, sums of own keys in float32."""
        halo = (keys.tokens - own.tokens) * self.kv_bytes / heads
        joined = keys.tokens * self.kv_bytes / heads
        written = own.tokens * self.q_bytes / 2 / heads
        sums = own.tokens * self.kv_bytes / heads * 20 / self.problem.dtype.itemsize
        rate = _COPY_EFFICIENCY * self.device.bandwidth * 1e6
        return 2 * (halo + joined + written) / rate, (
            2 * (2 * halo + joined + written) + sums
        ) / rate

    def placements(self, way: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Which ranks share a node: so many along each axis and along heads."""
        return (
            nodes for nodes in _factors(self.per_node, len(way))
            if all(n % m == 0 for n, m in zip(way, nodes))
        )  # fmt: skip

    def estimate(self, cuts: tuple[int, ...], heads: int, nodes: tuple[int, ...]) -> Estimate:
        tables = [self.along(axis, n, m) for axis, (n, m) in enumerate(zip(cuts, nodes))]
        token = self.kv_bytes / heads
        slowest: Any = (-inf,)
        for place in product(*map(_distinct, tables)):
            own, need, close, owners = (
                prod(getattr(a, name) for a in place)
                for name in ("own", "needed", "near", "owners")
            )
            near, far = (close - own) * token, (need - close) * token
            slowest = max(slowest, (self.links.ms(near, far), near, far, owners - 1, need / own))
        exchange, near, far, peers, ratio = slowest
        place = max(
            product(*map(_distinct, tables)),
            key=lambda p: (prod(a.own for a in p), prod(a.needed for a in p)),
        )
        own_box = Box(tuple(a.origin for a in place), tuple(a.own for a in place))
        keys = Box(tuple(a.low for a in place), tuple(a.needed for a in place))
        forward, backward = self.products(own_box, keys, heads)
        if exchange:
            copied = self._copied(own_box, keys, heads)
            forward, backward = forward + copied[0], backward + copied[1]
        moved = self._heads_bytes(tables, heads)
        inside = (nodes[-1] - 1) / max(heads - 1, 1)
        # Twice forward, there and back; four times backward. Nothing is computed meanwhile.
        swap = self.links.ms(moved * inside, moved * (1 - inside))
        inner = 0.0
        if self.chunks == 1:
            inner = sum(
                box.tokens for box in interior_first(self.axes_of(own_box), own_box)
                if own_box.holds(needed(self.axes_of(own_box), box))
            ) / max(own_box.tokens, 1)  # fmt: skip
        forward_ms = _overlapped(exchange, forward, self.chunks, inner) + swap
        backward_ms = _overlapped(exchange, backward, self.chunks, inner) + 2 * swap
        return Estimate(
            cuts, heads, nodes, near + far, far, moved, peers, ratio, forward_ms, backward_ms,
            products_ms=forward + backward,
            exchange_ms=2 * exchange + 3 * swap,
            speedup=sum(self.alone) / (forward_ms + backward_ms),
        )  # fmt: skip


def _distinct(table: list[_Along]) -> list[_Along]:
    """One shard of each kind: where it lies does not matter to its bytes."""
    return list({(a.own, a.needed, a.near, a.owners): a for a in table}.values())


def _overlapped(exchange: float, products: float, chunks: int, inner: float) -> float:
    """Milliseconds until all chunks have come and are computed; the first begins with the share of
    queries that need nothing."""
    if not exchange:
        return products
    now = inner * products / chunks
    for chunk in range(chunks):
        share = 1 - inner if chunk == 0 else 1
        now = max(now, (chunk + 1) * exchange / chunks) + share * products / chunks
    return now


@lru_cache(maxsize=4096)
def _products(problem: Problem, device: Device) -> tuple[float, float]:
    simulated = simulate_problem(problem, device)
    return simulated.forward.ms, sum(kernel.ms for kernel in simulated.backward)


__all__ = ["Estimate", "Links", "Report", "explain"]
