"""A call of attention over a sharded grid: its tensors, its plan, and the products of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.distributed.boxes import (
    Box,
    chunk_lengths,
    interior_first,
    margin,
    moved,
    needed,
    parts,
    turns,
    unrolled,
)
from natten.distributed.exchange import Exchange
from natten.distributed.sharding import Layout
from natten.functional.call import Parameters, Tensors, encode_window
from natten.functional.operators import neighborhood_attention, neighborhood_attention_backward
from natten.functional.problem import accumulation_dtype
from natten.window import Axis

_ALL = slice(None)
Block = tuple[Box, list[Tensor]]  # a box, and what `Inputs.keys` has of it


class Inputs(NamedTuple):
    """The tensors of a call, in the operator's order."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None
    additional_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None

    @property
    def keys(self) -> list[Tensor]:
        """What other ranks see of keys: keys, values, and which are valid, as numbers of theirs."""
        if self.key_mask is None:
            return [self.key, self.value]
        return [self.key, self.value, as_numbers(self.key_mask, self.key)]

    def of_heads(self, heads: slice, heads_kv: slice) -> Inputs:
        """Some query heads and the key heads that they see."""

        def part(tensor: Tensor | None, *where: Any) -> Tensor | None:
            return None if tensor is None else tensor[where]

        return self._replace(
            query=self.query[..., heads, :],
            key=self.key[..., heads_kv, :],
            value=self.value[..., heads_kv, :],
            rpb=part(self.rpb, heads),
            additional_keys=part(self.additional_keys, ..., heads_kv, _ALL),
            additional_values=part(self.additional_values, ..., heads_kv, _ALL),
            sink=part(self.sink, heads),
        )

    def without_additional(self) -> Inputs:
        """For all but one part of the keys: additional keys and the sink count once."""
        return self._replace(
            additional_keys=None, additional_values=None, sink=None, additional_lengths=None
        )


NUM_TENSORS, NUM_DIFFERENTIABLE = len(Inputs._fields), 7


def as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    """A mask ``[batch, *tokens]`` as a tensor with heads and features."""
    return mask.to(like.dtype)[..., None, None]


def as_mask(numbers: Tensor) -> Tensor:
    """The inverse of `as_numbers`."""
    return numbers[..., 0, 0] != 0


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
    """The gradients of the differentiable inputs. Those of query, key and value are written
    once; the others are sums of what is added."""

    def __init__(self, inputs: Inputs, needs: Sequence[bool]) -> None:
        self.query, self.key, self.value = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs[:3]
        ]
        self._rest = [
            torch.zeros(t.shape, dtype=accumulation_dtype(t.dtype), device=t.device)
            if t is not None and need
            else None
            for t, need in zip(inputs[3:NUM_DIFFERENTIABLE], needs[3:])
        ]

    def of_keys(self, heads_kv: slice) -> list[Tensor]:
        """The gradients of keys and values of some heads."""
        return [t[..., heads_kv, :] for t in (self.key, self.value)]

    def add_rest(self, got: Sequence[Tensor], heads: slice = _ALL, heads_kv: slice = _ALL) -> None:
        """Add an operator's gradients of what is no grid, of these heads."""
        of_keys = (..., heads_kv, _ALL)
        for total, gradient, of_heads in zip(
            self._rest, got[3:], ((heads,), of_keys, of_keys, (heads,))
        ):
            if total is not None and gradient.numel():
                total[of_heads] += gradient

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter([self.query, self.key, self.value, *self._rest])


@dataclass(frozen=True)
class Call:
    """A call without its tensors, and this rank's part of it.

    Boxes of queries and keys are those of a grid without rings: a ring that is sharded is unrolled,
    with room on both sides for tokens of the other end, of which there are images then.

    Attributes:
        window: The axes as the call has them.
    """

    layout: Layout
    window: tuple[Axis, ...]
    scale: float
    softcap: float
    backend: str
    method: str
    transport: str
    head_chunks: int
    save_halo: bool

    @cached_property
    def margins(self) -> tuple[int, ...]:
        """The room on both sides of each axis; 0 where nothing is unrolled."""
        shards = {box.extent for box in self.layout.boxes}
        return tuple(
            [
                margin(axis)
                if axis.is_circular and any(extent[i] != axis.length for extent in shards)
                else 0
                for i, axis in enumerate(self.window)
            ]
        )

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that boxes are of."""
        return tuple([unrolled(a) if room else a for a, room in zip(self.window, self.margins)])

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The box of each rank."""
        return tuple([moved(box, self.margins) for box in self.layout.boxes])

    @property
    def own(self) -> Box:
        return self.boxes[self.layout.rank]

    def images(self, box: Box) -> list[Box]:
        """Where the tokens of a rank's box are: first there, then further around unrolled rings."""
        around = [turns(a) if room else (0,) for a, room in zip(self.window, self.margins)]
        return [moved(box, offset) for offset in product(*around)]

    @property
    def saves_halo(self) -> bool:
        """Whether the forward pass leaves the keys of other ranks for the backward one."""
        return self.save_halo and self.method != "ring"

    @cached_property
    def needed(self) -> Box:
        """The keys that this rank's queries see."""
        return needed(self.axes, self.own)

    @cached_property
    def incoming(self) -> tuple[tuple[Box, ...], ...]:
        """What each rank has of them; nothing of this one, whose part is there."""
        return tuple(
            [
                tuple(parts(self.images(box), self.needed)) if rank != self.layout.rank else ()
                for rank, box in enumerate(self.boxes)
            ]
        )

    @cached_property
    def outgoing(self) -> tuple[tuple[Box, ...], ...]:
        """What each rank needs of this one's keys, in the order in which it has them there."""
        own = self.own
        return tuple(
            [
                tuple(
                    [
                        moved(part, [a - b for a, b in zip(own.origin, image.origin)])
                        for image in self.images(own)
                        for part in parts([image], needed(self.axes, box))
                    ]
                )
                if rank != self.layout.rank
                else ()
                for rank, box in enumerate(self.boxes)
            ]
        )

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
        grid, kernel_size, stride, dilation, is_causal, is_circular, _ = zip(*self.axes)
        rings = is_circular if any(is_circular) else ()
        boxes = (grid, queries.origin, keys.origin)
        window = encode_window(kernel_size, stride, dilation, is_causal, *boxes, is_circular=rings)
        return Parameters(0, window, self.scale, self.softcap, 0, 0, self.backend, "", True)

    def attend(
        self, inputs: Inputs, queries: Box, keys: Box, pair: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Some of this rank's queries against a box of keys, of which ``pair`` holds what
        `Inputs.keys` does: output and logsumexp."""
        tensors = self._tensors(inputs, queries, pair)
        return neighborhood_attention(*tensors, *self.parameters(queries, keys))

    def attend_backward(
        self, inputs: Inputs, results: Results, queries: Box, keys: Box, pair: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The gradients, by the logsumexp of all keys, whichever of them are given."""
        where, tensors = queries.within(self.own), self._tensors(inputs, queries, pair)
        grad_out, grad_lse, out, lse = [None if t is None else t[where] for t in results]
        return tuple(
            neighborhood_attention_backward(
                grad_out, grad_lse, *tensors, out, lse, *self.parameters(queries, keys), [*needs]
            )
        )

    def _tensors(self, inputs: Inputs, queries: Box, pair: Sequence[Tensor]) -> Tensors:
        where, (key, value, *mask) = queries.within(self.own), pair
        query_mask = inputs.query_mask
        given = Tensors(inputs.query[where], key, value, *inputs[3:NUM_DIFFERENTIABLE])
        return given._replace(
            additional_lengths=inputs.additional_lengths,
            key_mask=as_mask(mask[0]) if mask else None,
            query_mask=None if query_mask is None else query_mask[where],
        )

    # --- exchanges

    def elements(self, tensors: Sequence[Tensor], boxes: Iterable[Sequence[Box]]) -> list[int]:
        """Numbers in the parts of the tensors that are in the boxes of each rank."""
        width = sum([_width(t) for t in tensors])
        return [sum([box.tokens for box in of_rank]) * width for of_rank in boxes]

    def fetch(self, inputs: Inputs, halo: Tensor) -> Exchange:
        """Starts to fill ``halo`` with the keys and values of other ranks that this one needs."""
        tensors = inputs.keys
        outgoing = [
            [t[box.within(self.own)] for box in boxes for t in tensors] for boxes in self.outgoing
        ]
        sizes = self.elements(tensors, self.incoming)
        return Exchange(outgoing, halo, sizes, self.layout.group, self.transport)

    def fetched(self, inputs: Inputs, received: Sequence[Tensor]) -> list[list[Block]]:
        """What came of each rank."""
        tensors = inputs.keys
        return [
            unpacked_boxes(flat, boxes, tensors) for boxes, flat in zip(self.incoming, received)
        ]

    def give_back(self, inputs: Inputs, gradients: Sequence[Sequence[Tensor]]) -> Exchange:
        """Starts to return to each rank the gradients of what came from it, in the dtype of keys:
        half the bytes of float32."""
        outgoing = [[g.to(inputs.key.dtype) for g in of_rank] for of_rank in gradients]
        sizes = self.elements(inputs[1:3], self.outgoing)
        received = inputs.key.new_empty(sum(sizes))
        return Exchange(outgoing, received, sizes, self.layout.group, self.transport)

    def add_returned(self, inputs: Inputs, totals: Sequence[Tensor], returned: Exchange) -> None:
        """Adds gradients that others had of this rank's keys: in the order of ranks, whenever they
        came."""
        for boxes, flat in zip(self.outgoing, returned.wait()):
            for box, pair in unpacked_boxes(flat, boxes, inputs[1:3]):
                for total, gradient in zip(totals, pair):
                    total[box.within(self.own)] += gradient


# Of all keys of other ranks: where a rank needs more, it does not pay to fetch them all at once.
_RING_SHARE = 0.75


def automatic_method(call: Call) -> str:
    """ "ring" where some rank of three or more needs about the whole grid, else "halo"."""
    boxes = call.boxes
    total = sum([box.tokens for box in boxes])
    missing = [needed(call.axes, box).tokens - box.tokens for box in boxes if box.tokens]
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


def unpacked_boxes(flat: Tensor, boxes: Sequence[Box], like: Sequence[Tensor]) -> list[Block]:
    """Tensors of several boxes, sent one box after the other."""
    width = sum([_width(t) for t in like])
    each = flat.split([box.tokens * width for box in boxes])
    return [(box, unpacked(part, box, like)) for box, part in zip(boxes, each)]


__all__ = [
    "NUM_DIFFERENTIABLE",
    "NUM_TENSORS",
    "Block",
    "Call",
    "Gradients",
    "Inputs",
    "Results",
    "as_mask",
    "as_numbers",
    "automatic_method",
    "unpacked",
]
