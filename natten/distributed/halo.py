"""All keys of a rank's queries in one box: the rank's own and the halo, which others own.

Every query sees all of its keys at once, so that results are those of one process, row by row.
Heads are exchanged in chunks, each computed while the next ones travel. Where there is one chunk,
queries that see local keys alone are computed first; in the backward pass they come last, while the
gradients travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from natten.distributed.boxes import Box
from natten.distributed.call import Call, Gradients, Inputs, Results
from natten.distributed.exchange import Beside, Exchange
from natten.functional.problem import accumulation_dtype

Wait = Callable[[], Sequence[Tensor]]


def forward(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logsumexp, and the halo, for the backward pass."""
    query, value = inputs.query, inputs.value
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    chunks = call.chunks(inputs)
    parts = [inputs.of_heads(*chunk) for chunk in chunks]
    halo, waits = _halos(call, parts, None)
    keys = [_Keys(call, *each) for each in zip(parts, waits)]
    for i, (heads, _) in enumerate(chunks):
        _prepare(keys[i : i + 2])
        for box in _queries(call, parts):
            where = box.within(call.own)
            out[..., heads, :][where], lse[..., heads][where] = call.attend(
                parts[i], box, *keys[i].seen_by(box)
            )
        keys[i].release()
    return out, lse, halo


def backward(
    call: Call, inputs: Inputs, results: Results, halo: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """The gradients. Where the halo was not saved, it is fetched again."""
    chunks = call.chunks(inputs)
    parts = [inputs.of_heads(*chunk) for chunk in chunks]
    _, waits = _halos(call, parts, halo)
    keys = [_Keys(call, *each) for each in zip(parts, waits)]
    gradients = Gradients(inputs, needs)
    for i, (chunk, part) in enumerate(zip(chunks, parts)):
        _prepare(keys[i : i + 2])
        given = results.of_heads(chunk[0])
        sums: dict[Box, list[Tensor]] = {}
        returned: Exchange | None = None
        for box in _queries(call, parts)[::-1]:
            seen, pair = keys[i].seen_by(box)
            if seen == call.own:
                # Nothing more is added to what others wait for.
                returned = returned or _give_back(call, part, sums)
            got = call.attend_backward(part, given, box, seen, pair, needs)
            gradients.query[..., chunk[0], :][box.within(call.own)] = got[0]
            gradients.add_rest(got, *chunk)
            sums[seen] = _added(sums.get(seen), got[1:3])
        keys[i].release()
        returned = returned or _give_back(call, part, sums)
        # The gradients of a chunk travel, and are added up, while the next one is computed.
        reads = [*returned.tensors, *[t for pair in sums.values() for t in pair]]
        finished = Beside(inputs.key.device, reads)
        with finished:
            _add_up(call, part, sums, returned, gradients.of_keys(chunk[1]))
    finished.wait()
    return gradients


def _queries(call: Call, parts: Sequence[Inputs]) -> tuple[Box, ...]:
    """A rank's queries in the boxes that are computed one after the other, local ones first. With
    several chunks there is one: what is exchanged is hidden behind others, and tiles stay full."""
    return call.at_once if len(parts) > 1 else call.interior_first


class _Keys:
    """The keys and values of a chunk."""

    def __init__(self, call: Call, part: Inputs, wait: Wait) -> None:
        self._call, self._part, self._wait = call, part, wait
        # Kept until they have been read, on another stream: a mask is there as numbers made for it.
        self._own = part.keys
        self._all: list[Tensor] = []
        self._joining = Beside(part.key.device)

    def prepare(self) -> None:
        """Begins to put own and other ranks' keys together, if any query sees others'."""
        call = self._call
        if self._all or call.is_local(call.own):
            return
        extents = call.needed.extent
        self._all = [t.new_empty((t.shape[0], *extents, *t.shape[-2:])) for t in self._own]
        with self._joining:
            for image in call.images(call.own):
                self._put(image, self._own)
            for of_rank in call.fetched(self._part, self._wait()):
                for box, pair in of_rank:
                    self._put(box, pair)

    def _put(self, box: Box, pair: Sequence[Tensor]) -> None:
        common = box.intersection(self._call.needed)
        for target, source in zip(self._all, pair):
            target[common.within(self._call.needed)] = source[common.within(box)]

    def seen_by(self, queries: Box) -> tuple[Box, Sequence[Tensor]]:
        """A box that holds what these queries see, with its keys and values."""
        if self._call.is_local(queries):
            return self._call.own, self._own
        self._joining.wait()
        return self._call.needed, self._all

    def release(self) -> None:
        """They are not needed any more, but others' keys are to have come before the end."""
        self._joining.wait() if self._all else self._wait()
        self._all = self._own = []


def _prepare(keys: Sequence[_Keys]) -> None:
    """Those of a chunk and of the next, which are put together while this one is computed."""
    for of_chunk in keys:
        of_chunk.prepare()


def _halos(call: Call, parts: Sequence[Inputs], saved: Tensor | None) -> tuple[Tensor, list[Wait]]:
    """What comes of other ranks for each chunk: as saved, or by exchanges, which are all started
    here and travel in order."""
    sizes = [call.elements(part.keys, call.incoming) for part in parts]
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
        part,
        [[t[box.within(call.needed)] for box in boxes for t in total] for boxes in call.incoming],
    )


def _add_up(
    call: Call,
    part: Inputs,
    sums: dict[Box, list[Tensor]],
    returned: Exchange,
    gradients: Sequence[Tensor],
) -> None:
    """The gradients of this rank's keys: its own, then those that others return."""
    totals = [torch.zeros_like(g, dtype=accumulation_dtype(g.dtype)) for g in gradients]
    for box, pair in sums.items():
        for image in call.images(call.own):
            common = box.intersection(image)
            for total, gradient in zip(totals, pair):
                total[common.within(image)] += gradient[common.within(box)]
    call.add_returned(part, totals, returned)
    for gradient, total in zip(gradients, totals):
        gradient.copy_(total)


__all__ = ["backward", "forward"]
