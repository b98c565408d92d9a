"""Derivatives of neighborhood attention beyond the gradient: tangents of its results, and tangents
of its gradients, which are what differentiates the backward pass in either direction.

With S the scores, P their softmax, O = P V, and a dot for what changes in some direction::

    S' = scale * (Q' K^T + Q K'^T) + bias'      P' = P * (S' - r),  r = sum of P * S'
    O' = P' V + P V'                            logsumexp' = r

    A = dO V^T      E = P * (A - sum of P * A + dlse)     the gradient of S
    dQ = scale * E K      dK = scale * E^T Q      dV = P^T dO      dbias = E

and the latter's tangents by the product rule. A gradient of <dx, x'>, of gradients dx and any x',
is with respect to dO and dlse the tangents O' and logsumexp', and, as second derivatives are
symmetric, with respect to x the tangent of dx: both are there.

All of it is made of torch's own operators over tiles of queries
(:mod:`natten.functional.decomposition`): memory is linear in the number of tokens, and there are
derivatives of these derivatives.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.functional.backend import Inputs
from natten.functional.call import NUM_DIFFERENTIABLE, Call, Tensors, in_order, joined, runs
from natten.functional.decomposition import (
    Chunk,
    Columns,
    Operands,
    Tiles,
    column_sum,
    dot,
    scores,
    weighted_sum,
)

MaybeTensors = tuple[Tensor | None, ...]


class _Weights(NamedTuple):
    """Softmax in a point and what changes of it: pairs, but for ``lse_tangent``."""

    weights: Tensor
    tangent: Tensor
    lse_tangent: Tensor
    slope: Tensor | None  # of the scores by the products; None where no soft cap bends them
    slope_tangent: Tensor | None

    def of_products(self, gradient: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the scores, and its tangent, as those of the products."""
        if self.slope is None or self.slope_tangent is None:
            return gradient, change
        return gradient * self.slope, change * self.slope + gradient * self.slope_tangent


def _weights(chunk: Chunk, x: Operands, dx: Operands) -> _Weights:
    problem = chunk.problem
    point, slope, curvature = scores(problem, x)
    weights, _ = chunk.softmax(point)
    change = problem.scale * (dot(dx.query, x.key) + dot(x.query, dx.key))
    slope_tangent = None
    if slope is not None and curvature is not None:
        change, slope_tangent = slope * change, curvature * change
    if dx.bias is not None:
        change = change + dx.bias
    mean = (weights * change).sum(-1, keepdim=True)
    return _Weights(weights, weights * (change - mean), mean, slope, slope_tangent)


class _Sums:
    """Sums over the chunks of what belongs to keys and to the bias, in the accumulation dtype."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        total = self._totals.get(name)
        self._totals[name] = part if total is None else total + part

    def add_at(self, name: str, size: int, index: Tensor, part: Tensor) -> None:
        """Add along dimension 1 at an index each. In place, but for the first time: then it is as
        ``part`` is, to whatever transform that may belong."""
        total = self._totals.get(name)
        if total is None:
            zeros = part.new_zeros(part.shape[0], size, *part.shape[2:])
            self._totals[name] = zeros.index_add(1, index, part)
        else:
            total.index_add_(1, index, part)

    def add_columns(self, chunk: Chunk, name: str, columns: Columns) -> None:
        """Of the tiles' keys, and the additional ones."""
        own = columns.own.permute(0, 1, 3, 2, 4)
        own = own.reshape(own.shape[0], own.shape[1] * own.shape[2], *own.shape[3:])
        self.add_at(name, chunk.problem.num_keys, chunk.keys.reshape(-1), own)
        if columns.extra is not None and chunk.problem.num_additional:
            extra = columns.extra.squeeze(1).transpose(1, 2)
            self.add(f"additional {name}", extra.narrow(1, 0, chunk.problem.num_additional))

    def add_bias(self, chunk: Chunk, pairs: Tensor) -> None:
        """Pairs, of which each adds to the entry of the table that it took, or to the sink."""
        if chunk.bias_index is not None:
            own = pairs.narrow(-1, 0, chunk.keys.shape[1]).sum(0).permute(1, 2, 0, 3, 4)
            size = prod([2 * k - 1 for k in chunk.problem.kernel_size])
            part = own.reshape(chunk.problem.heads, -1)
            self.add_at("bias", size, chunk.bias_index.reshape(-1), part)
        if chunk.problem.has_sink:
            last = pairs.narrow(-1, pairs.shape[-1] - 1, 1)
            self.add("sink", last.sum((0, 1, 4, 5)).reshape(chunk.problem.heads))

    def __getitem__(self, name: str) -> Tensor:
        return self._totals[name]

    def __contains__(self, name: str) -> bool:
        return name in self._totals


def _prepared(call: Call, tangents: MaybeTensors, tensors: Tensors) -> tuple[Inputs, Inputs]:
    """What backends take, and tangents of it; zeros where there are none."""
    filled: list[Any] = [
        torch.zeros_like(t) if t is not None and tangent is None else tangent
        for t, tangent in zip(tensors, tangents[:NUM_DIFFERENTIABLE])
    ]
    return call.prepared(tensors), call.prepared(Tensors(*filled))


def _tangent_rows(x: Operands, dx: Operands, w: _Weights) -> Tensor:
    return weighted_sum(w.tangent, x.value) + weighted_sum(w.weights, dx.value)


def _is_constant(call: Call) -> bool:
    """Whether nothing that the results depend on is there: neither a query, nor a key or sink."""
    problem = call.problem
    has_rows = problem.batch and problem.num_queries and problem.heads
    return call.is_empty and not (has_rows and problem.has_sink)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def output_tangents(call: Call, tensors: Tensors, tangents: MaybeTensors) -> tuple[Tensor, Tensor]:
    """Tangents of out and logsumexp.

    Args:
        call: The call.
        tensors: Its tensors.
        tangents: Tangents of the first seven; None for zero.

    Returns:
        Of out, ``[batch, *query_shape, heads, head_dim_v]`` in its dtype, and of logsumexp,
        ``[batch, *query_shape, heads]`` in its own.
    """
    problem = call.problem
    if problem.grids is not None:
        each = [
            output_tangents(run.call, run.of(tensors), run.of(tangents))
            for run in runs(call, tensors)
        ]
        return in_order(each, problem.rank)
    if _is_constant(call):
        return (
            tensors.query.new_zeros(call.out_shape),
            tensors.query.new_zeros(call.out_shape[:-1], dtype=problem.accumulation_dtype),
        )
    inputs, changes = _prepared(call, tangents, tensors)
    tiles = Tiles(problem, inputs)
    outs, lses = [], []
    for chunk in tiles.chunks():
        x, dx = chunk.operands(inputs), chunk.operands(changes)
        w = _weights(chunk, x, dx)
        outs.append(_tangent_rows(x, dx, w).to(problem.dtype))
        lses.append(w.lse_tangent)
    out, lse = tiles.in_order(outs), tiles.in_order(lses).squeeze(-1)
    return call.result(out, call.out_shape), call.result(lse, call.out_shape[:-1])


class SecondOrder(NamedTuple):
    """What `gradient_tangents` finds."""

    out: Tensor
    lse: Tensor
    gradients: MaybeTensors


def gradient_tangents(
    call: Call,
    tensors: Tensors,
    tangents: MaybeTensors,
    grads: MaybeTensors,
    grad_tangents: MaybeTensors = (None, None),
) -> SecondOrder:
    """Tangents of out and logsumexp, and of the seven gradients that a backward pass gives.

    Args:
        call: The call.
        tensors: Its tensors.
        tangents: Tangents of the first seven; None for zero.
        grads: Gradients of out and logsumexp; None for zero.
        grad_tangents: Tangents of those.

    Returns:
        As `output_tangents`, and a tensor like each of the first seven tensors; None for None.
    """
    problem = call.problem
    if problem.grids is not None:
        return _of_runs(call, tensors, tangents, grads, grad_tangents)
    if _is_constant(call):
        zeros = tuple([None if t is None else _zeros(t) for t in tensors[:NUM_DIFFERENTIABLE]])
        return SecondOrder(*output_tangents(call, tensors, tangents), zeros)
    inputs, changes = _prepared(call, tangents, tensors)
    (grad_out, grad_lse), (out_change, lse_change) = grads, grad_tangents
    tiles, sums = Tiles(problem, inputs), _Sums()
    outs, lses, queries = [], [], []
    for chunk in tiles.chunks():
        x, dx = chunk.operands(inputs), chunk.operands(changes)
        w = _weights(chunk, x, dx)
        outs.append(_tangent_rows(x, dx, w).to(problem.dtype))
        lses.append(w.lse_tangent)
        # A: the gradient of the weights, and E: that of the scores.
        products = products_change = torch.zeros_like(w.weights)
        if grad_out is not None:
            g = chunk.rows(grad_out)
            products, products_change = dot(g, x.value), dot(g, dx.value)
        if out_change is not None:
            dg = chunk.rows(out_change)
            products_change = products_change + dot(dg, x.value)
        centered = products - (w.weights * products).sum(-1, keepdim=True)
        mean_change = w.tangent * products + w.weights * products_change
        centered_change = products_change - mean_change.sum(-1, keepdim=True)
        if grad_lse is not None:
            centered = centered + chunk.rows(grad_lse.unsqueeze(-1))
        if lse_change is not None:
            centered_change = centered_change + chunk.rows(lse_change.unsqueeze(-1))
        e = w.weights * centered
        e_change = w.tangent * centered + w.weights * centered_change
        sums.add_bias(chunk, e_change)
        e, e_change = w.of_products(e, e_change)
        dq = problem.scale * (weighted_sum(e_change, x.key) + weighted_sum(e, dx.key))
        queries.append(dq.to(problem.dtype))
        width = chunk.keys.shape[1]
        for pairs, rows in ((e_change, x.query), (e, dx.query)):
            sums.add_columns(chunk, "key", column_sum(problem.scale * pairs, rows, width))
        if grad_out is not None:
            sums.add_columns(chunk, "value", column_sum(w.tangent, g, width))
        if out_change is not None:
            sums.add_columns(chunk, "value", column_sum(w.weights, dg, width))
    found: list[Tensor | None] = [tiles.in_order(queries)]
    names = ("key", "value", "bias", "additional key", "additional value", "sink")
    for name, like in zip(names, inputs[1:NUM_DIFFERENTIABLE], strict=True):
        if like is None:
            found.append(None)
        else:
            found.append(
                sums[name].reshape(like.shape).to(like.dtype) if name in sums else _zeros(like)
            )
    if call.is_packed:
        found[:3] = [torch.cat([f for f in found[:3] if f is not None], -2), None, None]
    gradients = [
        None if t is None else _zeros(t) if f is None else f.reshape(t.shape)
        for f, t in zip(found, tensors[:NUM_DIFFERENTIABLE], strict=True)
    ]
    return SecondOrder(
        call.result(tiles.in_order(outs), call.out_shape),
        call.result(tiles.in_order(lses).squeeze(-1), call.out_shape[:-1]),
        tuple(gradients),
    )


def _of_runs(
    call: Call,
    tensors: Tensors,
    tangents: MaybeTensors,
    grads: MaybeTensors,
    grad_tangents: MaybeTensors,
) -> SecondOrder:
    """`gradient_tangents` of grids of different sizes, those of one size at a time."""
    found = []
    for run in runs(call, tensors):
        of_rows = [
            tuple([None if g is None else run.of_tokens(g) for g in pair])
            for pair in (grads, grad_tangents)
        ]
        own = run.of(tensors), run.of(tangents)[:NUM_DIFFERENTIABLE]
        found.append(gradient_tangents(run.call, *own, *of_rows))
    out, lse = in_order([(f.out, f.lse) for f in found], call.problem.rank)
    return SecondOrder(out, lse, joined(call, tensors, [f.gradients for f in found]))


__all__ = ["SecondOrder", "gradient_tangents", "output_tangents"]
