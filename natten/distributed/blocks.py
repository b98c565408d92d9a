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
from natten.distributed.call import Call, Gradients, Inputs, Results, unpacked
from natten.distributed.exchange import Exchange
from natten.functional.problem import accumulation_dtype

Block = tuple[Box, Sequence[Tensor]]  # a box, its keys and values


def forward(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp, and the halo, for the backward pass."""
    sizes = call.elements(inputs, call.incoming) if call.method == "merge" else []
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
        asked = needs if is_own else [*needs[:4], False, False]
        got = call.attend_backward(tensors, results, seeing, *block, asked)
        grad_query[seeing.within(call.own)] += got[0]
        gradients.add_rest(got)
        return got[1:3]

    back = _ring_back if call.method == "ring" else _fetched_back
    totals = (grad_query, *back(call, inputs, halo, add))
    for gradient, total in zip((gradients.query, gradients.key, gradients.value), totals):
        gradient.copy_(total)
    return gradients


# --- merge


def _fetched(call: Call, inputs: Inputs, halo: Tensor) -> Iterator[Block]:
    exchange = call.fetch(inputs, halo)
    yield call.own, inputs[1:3]
    yield from call.fetched(inputs, exchange.wait())


def _fetched_back(
    call: Call, inputs: Inputs, halo: Tensor | None, add: Callable[..., Sequence[Tensor]]
) -> list[Tensor]:
    if halo is None:
        halo = inputs.key.new_empty(sum(call.elements(inputs, call.incoming)))
        call.fetch(inputs, halo).wait()
    parts = halo.split(call.elements(inputs, call.incoming))
    blocks = dict(call.fetched(inputs, parts))
    # What others wait for comes first.
    parts_back = [
        add(viewers(call.axes, call.own, box), (box, blocks[box]), False) if box.tokens else []
        for box in call.incoming
    ]
    returned = call.give_back(inputs, parts_back)
    totals = _wide(add(call.own, (call.own, inputs[1:3]), True))
    call.add_returned(inputs, totals, returned)
    return totals


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(accumulation_dtype(t.dtype)) for t in tensors]


# --- ring


def _pass_on(
    call: Call, inputs: Inputs, pair: Sequence[Tensor], step: int
) -> tuple[Box, Callable[[], Sequence[Tensor]]]:
    """Sends what was held before a step to the next rank: the box that comes, and what waits for
    its tensors."""
    boxes, size = call.layout.boxes, len(call.layout.boxes)
    before, after = (call.layout.rank - 1) % size, (call.layout.rank + 1) % size
    box = boxes[(call.layout.rank - step) % size]
    if size == 1:
        return box, lambda: pair
    sizes = [0] * size
    (sizes[before],) = call.elements(inputs, [box])
    outgoing: list[Sequence[Tensor]] = [[]] * size
    outgoing[after] = pair
    received = pair[0].new_empty(sizes[before])
    exchange = Exchange(outgoing, received, sizes, call.layout.group, call.transport)
    return box, lambda: unpacked(exchange.wait()[before], box, pair)


def _ring(call: Call, inputs: Inputs) -> Iterator[Block]:
    box, pair = call.own, list(inputs[1:3])
    for step in range(1, len(call.layout.boxes)):
        following, arrive = _pass_on(call, inputs, pair, step)
        yield box, pair
        box, pair = following, list(arrive())
    yield box, pair


def _ring_back(
    call: Call, inputs: Inputs, halo: Tensor | None, add: Callable[..., Sequence[Tensor]]
) -> Sequence[Tensor]:
    blocks = _ring(call, inputs)
    own, pair = next(blocks)
    totals: Sequence[Tensor] = _wide(add(own, (own, pair), True))
    # Gradients follow their keys one step behind, and are at home after the last.
    for step, (box, pair) in enumerate(blocks, 1):
        _, arrive = _pass_on(call, inputs, totals, step)
        seeing = viewers(call.axes, call.own, box)
        got = add(seeing, (box, pair), False) if seeing.tokens else []
        totals = arrive()
        for total, gradient in zip(totals, got):
            total += gradient
    return _pass_on(call, inputs, totals, len(call.layout.boxes))[1]()


__all__ = ["backward", "forward"]
