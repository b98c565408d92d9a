"""The keys of one rank after the other, joined by logsumexp: the methods merge and ring.

In merge every rank fetches what it needs of the others, and computes with its own keys meanwhile.
In ring the keys of all ranks are passed on from one to the next, and each rank computes with what
it holds while the next ones come: memory for two boxes of keys, whatever the window is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from natten.distributed.boxes import Box, viewers
from natten.distributed.call import Block, Call, Gradients, Inputs, Results, unpacked
from natten.distributed.exchange import Exchange
from natten.functional.problem import accumulation_dtype


def forward(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp, and the halo, for the backward pass."""
    sizes = call.elements(inputs.keys, call.incoming) if call.method == "merge" else []
    halo = inputs.key.new_empty(sum(sizes))
    blocks = _ring(call, inputs) if call.method == "ring" else _fetched(call, inputs, halo)
    own, pair = next(blocks)
    out, lse = call.attend(inputs, own, own, pair)
    total = out.to(lse.dtype), lse
    for box, pair in blocks:
        seeing = viewers(call.axes, own, box)
        if seeing.tokens:
            part = call.attend(inputs.without_additional(), seeing, box, pair)
            _merge(total, part, seeing.within(own))
    return total[0].to(out.dtype), lse, halo


def _merge(
    total: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor], where: tuple[slice, ...]
) -> None:
    """Adds, in place, what further keys contribute to output and logsumexp of some queries."""
    out, lse = total[0][where], total[1][where]
    joined = torch.logaddexp(lse, part[1])
    top = joined.masked_fill(joined == -torch.inf, 0.0)  # of queries that saw no key so far
    out.mul_((lse - top).exp().unsqueeze(-1))
    out.addcmul_((part[1] - top).exp().unsqueeze(-1), part[0].to(out.dtype))
    lse.copy_(joined)


def backward(
    call: Call, inputs: Inputs, results: Results, halo: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """The gradients, each part by the logsumexp of all keys."""
    gradients = Gradients(inputs, needs)
    grad_query = torch.zeros_like(inputs.query, dtype=accumulation_dtype(inputs.query.dtype))

    def add(seeing: Box, block: Block, is_own: bool) -> Sequence[Tensor]:
        """Adds the part of one block; returns that of its keys and values."""
        tensors = inputs if is_own else inputs.without_additional()
        asked = needs if is_own else [*needs[:4], False, False, False]
        got = call.attend_backward(tensors, results, seeing, *block, asked)
        grad_query[seeing.within(call.own)] += got[0]
        gradients.add_rest(got)
        return got[1:3]

    back = _ring_back if call.method == "ring" else _fetched_back
    totals = (grad_query, *back(call, inputs, halo, add))
    for gradient, total in zip((gradients.query, gradients.key, gradients.value), totals):
        gradient.copy_(total)
    return gradients


Where = tuple[slice, ...]


def _images(call: Call, box: Box, tensors: Sequence[Tensor]) -> Iterator[tuple[Block, Where]]:
    """A rank's keys wherever this rank's queries may see them, each with where it is in the
    tensors: first all of them, where they are."""
    for image in call.images(box):
        part = box if image == box else image.intersection(call.needed)
        if part.tokens or image == box:
            where = part.within(image)
            yield (part, [t[where] for t in tensors]), where


def _add_images(
    call: Call,
    box: Box,
    tensors: Sequence[Tensor],
    add: Callable[..., Sequence[Tensor]],
) -> list[tuple[Where, Sequence[Tensor]]]:
    """Adds the parts of all images of a rank's keys; the gradients of these, and where they are."""
    found = []
    for number, (block, where) in enumerate(_images(call, box, tensors)):
        is_first = box == call.own and not number
        seeing = call.own if is_first else viewers(call.axes, call.own, block[0])
        if is_first or seeing.tokens:
            found.append((where, add(seeing, block, is_first)))
    return found


def _sum(
    totals: Sequence[Tensor], found: Sequence[tuple[Where, Sequence[Tensor]]]
) -> Sequence[Tensor]:
    for where, gradients in found:
        for total, gradient in zip(totals, gradients):
            total[where] += gradient
    return totals


# --- merge


def _fetched(call: Call, inputs: Inputs, halo: Tensor) -> Iterator[Block]:
    exchange = call.fetch(inputs, halo)
    for block, _ in _images(call, call.own, inputs.keys):
        yield block
    for of_rank in call.fetched(inputs, exchange.wait()):
        yield from of_rank


def _fetched_back(
    call: Call, inputs: Inputs, halo: Tensor | None, add: Callable[..., Sequence[Tensor]]
) -> Sequence[Tensor]:
    sizes = call.elements(inputs.keys, call.incoming)
    if halo is None:
        halo = inputs.key.new_empty(sum(sizes))
        call.fetch(inputs, halo).wait()
    # What others wait for comes first.
    parts_back = [
        [g for box, keys in of_rank
         for g in add(viewers(call.axes, call.own, box), (box, keys), False)]
        for of_rank in call.fetched(inputs, halo.split(sizes))
    ]  # fmt: skip
    returned = call.give_back(inputs, parts_back)
    (_, own), *others = _add_images(call, call.own, inputs.keys, add)
    totals = _sum(_wide(own), others)
    call.add_returned(inputs, totals, returned)
    return totals


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(accumulation_dtype(t.dtype)) for t in tensors]


# --- ring


def _pass_on(
    call: Call, tensors: Sequence[Tensor], step: int
) -> tuple[Box, Callable[[], Sequence[Tensor]]]:
    """Sends what was held before a step to the next rank: the box that comes, and what waits for
    its tensors."""
    size = len(call.boxes)
    before, after = (call.layout.rank - 1) % size, (call.layout.rank + 1) % size
    box = call.boxes[(call.layout.rank - step) % size]
    if size == 1:
        return box, lambda: tensors
    sizes = [0] * size
    (sizes[before],) = call.elements(tensors, [[box]])
    outgoing: list[Sequence[Tensor]] = [[]] * size
    outgoing[after] = tensors
    received = tensors[0].new_empty(sizes[before])
    exchange = Exchange(outgoing, received, sizes, call.layout.group, call.transport)
    return box, lambda: unpacked(exchange.wait()[before], box, tensors)


def _held(call: Call, tensors: Sequence[Tensor]) -> Iterator[Block]:
    """The box of every rank in turn, this one's first."""
    box, held = call.own, list(tensors)
    for step in range(1, len(call.boxes)):
        following, arrive = _pass_on(call, held, step)
        yield box, held
        box, held = following, list(arrive())
    yield box, held


def _ring(call: Call, inputs: Inputs) -> Iterator[Block]:
    for held in _held(call, inputs.keys):
        for block, _ in _images(call, *held):
            yield block


def _ring_back(
    call: Call, inputs: Inputs, halo: Tensor | None, add: Callable[..., Sequence[Tensor]]
) -> Sequence[Tensor]:
    held = _held(call, inputs.keys)
    (_, own), *others = _add_images(call, *next(held), add)
    totals = _sum(_wide(own), others)
    # Gradients follow their keys one step behind, and are at home after the last.
    for step, block in enumerate(held, 1):
        _, arrive = _pass_on(call, totals, step)
        found = _add_images(call, *block, add)
        totals = _sum(arrive(), found)
    return _pass_on(call, totals, len(call.boxes))[1]()


__all__ = ["backward", "forward"]
