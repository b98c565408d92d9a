"""What ranks send each other: tensors, and whether they mean the same call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import _resolve_process_group

Statement = tuple[tuple[str, Any], ...]


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """A context for work that goes on beside the products: on another stream of a GPU, after all
    that was asked for before; on a CPU at once.

    Args:
        device: Where.
        reads: Tensors that are read there and let go before `wait`.
    """

    def __init__(self, device: torch.device, reads: Iterable[Tensor] = ()) -> None:
        self._device = device if device.type == "cuda" else None
        self._reads = reads
        self._context: Any = nullcontext()
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._device is not None:
            stream = _stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in self._reads:
                tensor.record_stream(stream)
            self._context = torch.cuda.stream(stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if self._device is not None:
            self._done = _stream(self._device).record_event()

    def wait(self) -> None:
        """All that is asked for from here on comes after."""
        if self._done is not None:
            self._done.wait()


class Exchange:
    """Tensors on their way between the ranks of a group: started when made, there after `wait`.

    Args:
        outgoing: For each rank of the group, the tensors that go to it.
        received: Takes what comes, one dimension: ``sizes`` elements of each rank, in their order.
        sizes: Elements that come from each rank.
        group: The group.
        transport: "all_to_all" for one all_to_all_single, "p2p" for one batch_isend_irecv.

    Attributes:
        tensors: All that is read and written meanwhile.
    """

    def __init__(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        received: Tensor,
        sizes: Sequence[int],
        group: dist.ProcessGroup,
        transport: str,
    ) -> None:
        self._received = received.split(list(sizes))
        self._works: list[Any]
        sent: Any
        everything = [t for tensors in outgoing for t in tensors]
        # Not only the transfer but the packing before it.
        with Beside(received.device, everything):
            if transport == "all_to_all":
                sent = _packed(everything, received)
                sent_sizes = [sum([t.numel() for t in tensors]) for tensors in outgoing]
                work = dist.all_to_all_single(
                    received, sent, list(sizes), sent_sizes, group=group, async_op=True
                )
                self._works = [work]
            else:
                sent = [_packed(tensors, received) for tensors in outgoing]
                operations = [
                    dist.P2POp(kind, tensor, group=group, group_peer=peer)
                    for kind, tensors in ((dist.irecv, self._received), (dist.isend, sent))
                    for peer, tensor in enumerate(tensors)
                    if tensor.numel()  # both sides know what is empty
                ]
                self._works = dist.batch_isend_irecv(operations) if operations else []
        # Until it is on its way, its memory must not be anything else's.
        self._sent = sent
        self.tensors = [received, *everything]

    def wait(self) -> tuple[Tensor, ...]:
        """What came from each rank, in one dimension."""
        for work in self._works:
            work.wait()
        self._works, self._sent, self.tensors = [], None, []
        return self._received


def _packed(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else like.new_empty(0)


# Up to torch 2.13 by another name, which later versions warn of.
if hasattr(collectives, "all_gather_single_autograd"):
    _all_gather = collectives.all_gather_single_autograd
else:
    _all_gather = collectives.all_gather_tensor_autograd


class _ContiguousGradient(torch.autograd.Function):
    """What gathers back takes no other gradient, up to torch 2.11."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.contiguous()


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, stacked. Differentiable: the gradient of each is the
    sum of what the ranks have for it."""
    return _ContiguousGradient.apply(_all_gather(tensor[None].contiguous(), 0, group))


class Line(NamedTuple):
    """The ranks along one dimension of a mesh, which share an axis of tokens.

    Attributes:
        group: Their group, which sorts them.
        places: The place along the dimension of each rank of the group.
        lengths: Tokens at each place.
    """

    group: dist.ProcessGroup
    places: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def own(self) -> int:
        """This rank's place."""
        return self.places[dist.get_rank(self.group)]


def _redistributed(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], dim: int, line: Line
) -> Tensor:
    """Part i goes to place i; what comes, of these shapes, is put together along ``dim``."""
    sizes = [prod(shapes[place]) for place in line.places]
    received = collectives.all_to_all_single_autograd(
        torch.cat([parts[place].reshape(-1) for place in line.places]),
        sizes,
        [parts[place].numel() for place in line.places],
        line.group,
    )
    by_place = dict(zip(line.places, received.split(sizes)))
    return torch.cat([by_place[i].view(shape) for i, shape in enumerate(shapes)], dim)


def tokens_to_heads(tensor: Tensor, dim: int, line: Line) -> Tensor:
    """All tokens of a dimension and one rank's heads, for its tokens and all heads.

    ``[batch, *tokens, heads, features]``; the number of heads is a multiple of that of ranks.
    """
    heads = tensor.shape[-2] // len(line.lengths)
    before, after = tensor.shape[:dim], (*tensor.shape[dim + 1 : -2], heads, tensor.shape[-1])
    shapes = [(*before, length, *after) for length in line.lengths]
    return _redistributed(tensor.split(heads, -2), shapes, dim, line)


def heads_to_tokens(tensor: Tensor, dim: int, line: Line) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    parts = tensor.split(list(line.lengths), dim)
    return _redistributed(parts, [parts[line.own].shape] * len(parts), -2, line)


# --- agreement

# On groups without a CPU backend: what all of their ranks stated once.
_agreed: set[tuple[str, Statement]] = set()


@lru_cache(maxsize=4096)
def _digest(statement: Statement) -> int:
    return int.from_bytes(blake2b(repr(statement).encode(), digest_size=7).digest(), "big")


@lru_cache(maxsize=1024)
def _has_cpu(group_name: Any) -> bool:
    try:
        _resolve_process_group(group_name)._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def agree(group: dist.ProcessGroup, statement: Statement, error: Exception | None = None) -> None:
    """Raise on all ranks unless all of them state the same call, and none has an error.

    Ranks that differ would read each other's messages as what they are not: wrong numbers on some,
    and the end of the process on others. Where the group has a CPU backend ("cpu:gloo,cuda:nccl"),
    ranks compare at every call, which keeps their hosts in step and their GPUs busy; where it has
    none, at the first call of each kind, since it would stop the GPU.

    Raises:
        ValueError: They do not agree, or one of them raised one.
    """
    if error is not None:
        statement = (("error", str(error)),)
    at_every_call = _has_cpu(group.group_name)
    if not at_every_call and (group.group_name, statement) in _agreed:
        return
    digest = _digest(statement)
    # The largest, and the smallest.
    ends = torch.tensor([digest, -digest], device="cpu" if at_every_call else "cuda")
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    high, low = ends.tolist()
    if high == -low and error is None:
        if not at_every_call:
            _agreed.add((group.group_name, statement))
        return
    stated: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stated, statement, group)
    if error is not None and all(other == statement for other in stated):
        raise error
    raise ValueError(_disagreement(stated)) from error


def _disagreement(stated: Sequence[Statement]) -> str:
    failed = {r: dict(s)["error"] for r, s in enumerate(stated) if s[0][0] == "error"}
    if failed:
        return "; ".join(f"rank {rank} of the group: {text}" for rank, text in failed.items())
    names = [name for name, _ in stated[0]]
    columns = zip(*[[value for _, value in s] for s in stated], strict=True)
    differing = [
        f"{name} is " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        for name, values in zip(names, columns)
        if any(value != values[0] for value in values)
    ]
    return "all ranks of a sharded grid must make the same call, but " + "; ".join(differing)


__all__ = [
    "Beside",
    "Exchange",
    "Line",
    "Statement",
    "agree",
    "gathered",
    "heads_to_tokens",
    "tokens_to_heads",
]
