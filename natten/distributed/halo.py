"""All keys of a rank's queries in one box: the rank's own and the halo, which others own.

Every query sees all of its keys at once, so that results are those of one process, row by row.
Heads are exchanged in chunks, each computed while the next ones travel. While the first travels,
queries that see local keys alone are computed; in the backward pass they come last, while the last
gradients travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from natten.distributed.boxes import Box
from natten.distributed.call import Call, Gradients, Inputs, Results, accumulation_dtype
from natten.distributed.exchange import Exchange

Wait = Callable[[], Sequence[Tensor]]


def forward(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp, and the halo, for the backward pass."""
    query, value = inputs.query, inputs.value
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    chunks = call.chunks(inputs)
    parts = [inputs.of_heads(*chunk) for chunk in chunks]
    halo, waits = _halos(call, parts, None)
    for (heads, _), part, wait in zip(chunks, parts, waits):
        keys = _Keys(call, part, wait)
        for box in call.interior_first if part is parts[0] else call.at_once:
            where = box.within(call.own)
            out[..., heads, :][where], lse[..., heads][where] = call.attend(
                part, box, *keys.seen_by(box)
            )
        wait()
    return out, lse, halo


def backward(
    call: Call, inputs: Inputs, results: Results, halo: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """The gradients. Where the halo was not saved, it is fetched again."""
    chunks = call.chunks(inputs)
    parts = [inputs.of_heads(*chunk) for chunk in chunks]
    _, waits = _halos(call, parts, halo)
    gradients = Gradients(inputs, needs)
    finish: Callable[[], None] = _nothing
    for chunk, part, wait in zip(chunks, parts, waits):
        given, keys = results.of_heads(chunk[0]), _Keys(call, part, wait)
        sums: dict[Box, list[Tensor]] = {}
        returned: Exchange | None = None
        for box in call.interior_first[::-1] if part is parts[-1] else call.at_once:
            seen, pair = keys.seen_by(box)
            if seen == call.own:
                # Nothing more is added to what others wait for.
                returned = returned or _give_back(call, part, sums)
            got = call.attend_backward(part, given, box, seen, pair, needs)
            gradients.query[..., chunk[0], :][box.within(call.own)] = got[0]
            gradients.add_rest(got, *chunk)
            sums[seen] = _added(sums.get(seen), got[1:3])
        returned = returned or _give_back(call, part, sums)
        wait()
        # The gradients of a chunk travel while the next one is computed.
        finish()
        finish = partial(_finish, call, part, sums, returned, gradients.of_keys(chunk[1]))
    finish()
    return gradients


def _nothing() -> None:
    pass


class _Keys:
    """The keys and values of a chunk."""

    def __init__(self, call: Call, part: Inputs, wait: Wait) -> None:
        self._call, self._part, self._wait = call, part, wait
        self._all: list[Tensor] = []

    def seen_by(self, queries: Box) -> tuple[Box, Sequence[Tensor]]:
        """A box that holds what these queries see, with its keys and values."""
        call, part = self._call, self._part
        if call.is_local(queries):
            return call.own, part[1:3]
        if not self._all:
            extents = call.needed.extent
            self._all = [t.new_empty((t.shape[0], *extents, *t.shape[-2:])) for t in part[1:3]]
            # The own part goes there while the others are on their way.
            self._put(call.own, part[1:3])
            for box, pair in call.fetched(part, self._wait()):
                self._put(box, pair)
        return call.needed, self._all

    def _put(self, box: Box, pair: Sequence[Tensor]) -> None:
        common = box.intersection(self._call.needed)
        for target, source in zip(self._all, pair):
            target[common.within(self._call.needed)] = source[common.within(box)]


def _halos(call: Call, parts: Sequence[Inputs], saved: Tensor | None) -> tuple[Tensor, list[Wait]]:
    """What comes of other ranks for each chunk: as saved, or by exchanges, which are all started
    here and travel in order."""
    sizes = [call.elements(part, call.incoming) for part in parts]
    totals = [sum(of_part) for of_part in sizes]
    if saved is not None:
        return saved, [partial(f.split, size) for f, size in zip(saved.split(totals), sizes)]
    halo = parts[0].key.new_empty(sum(totals))
    return halo, [call.fetch(*each).wait for each in zip(parts, halo.split(totals))]


def _added(total: list[Tensor] | None, more: Sequence[Tensor]) -> list[Tensor]:
    if total is None:
        return list(more)
    return [t.to(accumulation_dtype(t.dtype)).add_(m) for t, m in zip(total, more)]


def _give_back(call: Call, part: Inputs, sums: dict[Box, list[Tensor]]) -> Exchange:
    """Starts to return the gradients of what was fetched."""
    total = sums.get(call.needed, [])
    return call.give_back(
        part, [[t[box.within(call.needed)] for t in total] for box in call.incoming]
    )


def _finish(
    call: Call,
    part: Inputs,
    sums: dict[Box, list[Tensor]],
    returned: Exchange,
    gradients: Sequence[Tensor],
) -> None:
    """Adds up the gradients of this rank's keys: its own, then those that others return."""
    totals = [torch.zeros_like(g, dtype=accumulation_dtype(g.dtype)) for g in gradients]
    for box, pair in sums.items():
        common = box.intersection(call.own)
        for total, gradient in zip(totals, pair):
            total[common.within(call.own)] += gradient[common.within(box)]
    call.add_returned(part, totals, returned)
    for gradient, total in zip(gradients, totals):
        gradient.copy_(total)


__all__ = ["backward", "forward"]
