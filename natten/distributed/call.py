"""A call of attention over a sharded grid: its tensors, its plan, and the products of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from natten.distributed.boxes import Box, chunk_lengths, interior_first, needed
from natten.distributed.exchange import Exchange
from natten.distributed.sharding import Layout
from natten.functional.call import Parameters, encode_window
from natten.functional.operators import neighborhood_attention, neighborhood_attention_backward
from natten.functional.problem import accumulation_dtype
from natten.window import Axis

_ALL = slice(None)


class Inputs(NamedTuple):
    """The tensors of a call, in the operator's order."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    additional_lengths: Tensor | None

    def of_heads(self, heads: slice, heads_kv: slice) -> Inputs:
        """Some query heads and the key heads that they see."""
        query, key, value, rpb, *additional, lengths = self
        return Inputs._make(
            [
                query[..., heads, :],
                *[t[..., heads_kv, :] for t in (key, value)],
                None if rpb is None else rpb[heads],
                *[None if t is None else t[..., heads_kv, :] for t in additional],
                lengths,
            ]
        )

    def without_additional(self) -> Inputs:
        """For all but one part of the keys: additional keys count once."""
        return self._replace(additional_keys=None, additional_values=None, additional_lengths=None)


class Results(NamedTuple):
    """What the backward pass knows of the forward one."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor

    def of_heads(self, heads: slice) -> Results:
        grad_out, out = [t[..., heads, :] for t in (self.grad_out, self.out)]
        grad_lse = None if self.grad_lse is None else self.grad_lse[..., heads]
        return Results(grad_out, grad_lse, out, self.lse[..., heads])


class Gradients:
    """The gradients of the six differentiable inputs. Those of query, key and value are written
    once; the others are sums of what is added."""

    def __init__(self, inputs: Inputs, needs: Sequence[bool]) -> None:
        self.query, self.key, self.value = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs[:3]
        ]
        self._rest = [
            torch.zeros(t.shape, dtype=accumulation_dtype(t.dtype), device=t.device)
            if t is not None and need
            else None
            for t, need in zip(inputs[3:6], needs[3:])
        ]

    def of_keys(self, heads_kv: slice) -> list[Tensor]:
        """The gradients of keys and values of some heads."""
        return [t[..., heads_kv, :] for t in (self.key, self.value)]

    def add_rest(self, got: Sequence[Tensor], heads: slice = _ALL, heads_kv: slice = _ALL) -> None:
        """Add an operator's gradients of rpb and additional keys and values, of these heads."""
        for total, gradient, of_heads in zip(
            self._rest, got[3:], ((heads,), (..., heads_kv, _ALL), (..., heads_kv, _ALL))
        ):
            if total is not None and gradient.numel():
                total[of_heads] += gradient

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter([self.query, self.key, self.value, *self._rest])


@dataclass(frozen=True)
class Call:
    """A call without its tensors, and this rank's part of it."""

    layout: Layout
    axes: tuple[Axis, ...]
    scale: float
    backend: str
    method: str
    transport: str
    head_chunks: int
    save_halo: bool

    @property
    def own(self) -> Box:
        return self.layout.own

    @property
    def saves_halo(self) -> bool:
        """Whether the forward pass leaves the keys of other ranks for the backward one."""
        return self.save_halo and self.method != "ring"

    @cached_property
    def needed(self) -> Box:
        """The keys that this rank's queries see."""
        return needed(self.axes, self.own)

    @cached_property
    def incoming(self) -> tuple[Box, ...]:
        """What each rank has of them; nothing of this one, whose part is there."""
        return self._of_others([self.needed.intersection(box) for box in self.layout.boxes])

    @cached_property
    def outgoing(self) -> tuple[Box, ...]:
        """What each rank needs of this one's keys."""
        boxes = self.layout.boxes
        return self._of_others([needed(self.axes, b).intersection(self.own) for b in boxes])

    def _of_others(self, boxes: list[Box]) -> tuple[Box, ...]:
        nothing = Box(self.own.origin, (0,) * len(self.axes))
        return tuple([b if r != self.layout.rank else nothing for r, b in enumerate(boxes)])

    def is_local(self, queries: Box) -> bool:
        """Whether queries of this rank see its own keys alone."""
        return self.own.holds(needed(self.axes, queries))

    @cached_property
    def at_once(self) -> tuple[Box, ...]:
        """This rank's queries in one box, or in none."""
        return (self.own,) if self.own.tokens else ()

    @cached_property
    def interior_first(self) -> tuple[Box, ...]:
        """This rank's queries in boxes, the local ones first."""
        if self.is_local(self.own):
            return self.at_once
        boxes = interior_first(self.axes, self.own)
        return tuple(sorted(boxes, key=lambda box: not self.is_local(box)))

    def chunks(self, inputs: Inputs) -> list[tuple[slice, slice]]:
        """Query and key heads that are exchanged and computed together."""
        heads_kv = inputs.key.shape[-2]
        group = inputs.query.shape[-2] // heads_kv
        sizes = [n for n in chunk_lengths(heads_kv, min(self.head_chunks, heads_kv)) if n]
        return [
            (slice((end - size) * group, end * group), slice(end - size, end))
            for end, size in zip(accumulate(sizes), sizes)
        ]

    # --- products

    def parameters(self, queries: Box, keys: Box) -> Parameters:
        """The operator's, for a box of queries and one of keys."""
        _, kernel_size, stride, dilation, is_causal, *_ = zip(*self.axes)
        boxes = (self.layout.grid, queries.origin, keys.origin)
        window = encode_window(kernel_size, stride, dilation, is_causal, *boxes)
        return Parameters(0, window, self.scale, 0.0, 0, 0, self.backend, "", True)

    def attend(
        self, inputs: Inputs, queries: Box, keys: Box, pair: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Some of this rank's queries against a box of keys, which with its values is ``pair``:
        output and logsumexp."""
        query, (key, value) = inputs.query[queries.within(self.own)], pair
        *bias_and_additional, lengths = inputs[3:]
        return neighborhood_attention(
            query, key, value, *bias_and_additional, None, None, None, lengths, None, None,
            *self.parameters(queries, keys),
        )  # fmt: skip

    def attend_backward(
        self, inputs: Inputs, results: Results, queries: Box, keys: Box, pair: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The six gradients, by the logsumexp of all keys, whichever of them are given."""
        where, (key, value) = queries.within(self.own), pair
        grad_out, grad_lse, out, lse = [None if t is None else t[where] for t in results]
        *bias_and_additional, lengths = inputs[3:]
        *gradients, _ = neighborhood_attention_backward(
            grad_out, grad_lse, inputs.query[where], key, value, *bias_and_additional, None, None,
            None, lengths, None, None, out, lse, *self.parameters(queries, keys), [*needs, False],
        )  # fmt: skip
        return tuple(gradients)

    # --- exchanges

    def elements(self, inputs: Inputs, boxes: Sequence[Box]) -> list[int]:
        """Numbers in the keys and values of each box."""
        return [box.tokens * sum([_width(t) for t in inputs[1:3]]) for box in boxes]

    def fetch(self, inputs: Inputs, halo: Tensor) -> Exchange:
        """Starts to fill ``halo`` with the keys and values of other ranks that this one needs."""
        outgoing = [
            [t[box.within(self.own)] for t in inputs[1:3]] if box.tokens else []
            for box in self.outgoing
        ]
        sizes = self.elements(inputs, self.incoming)
        return Exchange(outgoing, halo, sizes, self.layout.group, self.transport)

    def fetched(self, inputs: Inputs, parts: Sequence[Tensor]) -> list[tuple[Box, list[Tensor]]]:
        """What came of each rank that this one needs something of."""
        return [
            (box, unpacked(part, box, inputs[1:3]))
            for box, part in zip(self.incoming, parts)
            if box.tokens
        ]

    def give_back(self, inputs: Inputs, gradients: Sequence[Sequence[Tensor]]) -> Exchange:
        """Starts to return to each rank the gradients of what came from it, in the dtype of keys:
        half the bytes of float32."""
        outgoing = [[g.to(inputs.key.dtype) for g in pair] for pair in gradients]
        sizes = self.elements(inputs, self.outgoing)
        received = inputs.key.new_empty(sum(sizes))
        return Exchange(outgoing, received, sizes, self.layout.group, self.transport)

    def add_returned(self, inputs: Inputs, totals: Sequence[Tensor], returned: Exchange) -> None:
        """Adds gradients that others had of this rank's keys: in the order of ranks, whenever they
        came."""
        for box, part in zip(self.outgoing, returned.wait()):
            if box.tokens:
                for total, gradient in zip(totals, unpacked(part, box, inputs[1:3])):
                    total[box.within(self.own)] += gradient


# Of all keys of other ranks: where a rank needs more, it does not pay to fetch them all at once.
_RING_SHARE = 0.75


def automatic_method(boxes: Sequence[Box], axes: tuple[Axis, ...]) -> str:
    """ "ring" where some rank of three or more needs about the whole grid, else "halo"."""
    total = sum([box.tokens for box in boxes])
    missing = [needed(axes, box).tokens - box.tokens for box in boxes if box.tokens]
    most = _RING_SHARE * total * (len(boxes) - 1) / len(boxes)
    return "ring" if len(boxes) > 2 and max(missing, default=0) > most else "halo"


def _width(tensor: Tensor) -> int:
    """Elements of one token."""
    return tensor.shape[0] * tensor.shape[-2] * tensor.shape[-1]


def unpacked(flat: Tensor, box: Box, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a box, of batch, heads and features as ``like``, sent one after the other."""
    shapes = [(t.shape[0], *box.extent, *t.shape[-2:]) for t in like]
    parts = flat.split([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


__all__ = [
    "Call",
    "Gradients",
    "Inputs",
    "Results",
    "automatic_method",
    "unpacked",
]
