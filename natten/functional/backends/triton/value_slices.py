"""Values wider than a tile: every slice of the value becomes a head of its own.

Everything is linear in the value. With the query, key and bias of a head repeated for each slice of
its value, the slices' outputs side by side are the head's output, their logsumexps are equal, and
the gradients of what was repeated are sums over the slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from natten.functional.backend import Gradients, Inputs, Results
from natten.functional.problem import Problem

_SLICE = 128


def _widest(head_dim: int) -> int:
    """The widest value that is left whole. Scores of wide heads take too long to compute twice."""
    return 256 if head_dim <= 256 else 512


@dataclass(frozen=True)
class Slices:
    """How heads become heads with narrower values.

    Attributes:
        problem: The problem of the slices.
        number: Slices of each head.
        features: Of a value before it is sliced.
        neighbors: Whether the slices of a head follow each other, so that values are sliced without
            a copy. Where queries share keys, all heads of the first slice come first: kernels find
            a query's key by division.
    """

    problem: Problem
    number: int
    features: int
    neighbors: bool

    def _unflatten(self, tensor: Tensor, axis: int) -> tuple[Tensor, int]:
        """The axis of heads as two, and which of them counts the slices; ``axis`` is negative."""
        sizes = (-1, self.number) if self.neighbors else (self.number, -1)
        return tensor.unflatten(axis, sizes), axis if self.neighbors else axis - 1

    def repeat(self, tensor: Tensor, axis: int = -2) -> Tensor:
        """Heads once for each slice; a view of a single one."""
        head = tensor.dim() + axis
        slices = head + 1 if self.neighbors else head
        shape = [*tensor.shape[:slices], self.number, *tensor.shape[slices:]]
        return tensor.unsqueeze(slices).expand(shape).flatten(head, head + 1)

    def split(self, tensor: Tensor) -> Tensor:
        """[..., heads, features] to [..., slices as heads, width], with zeros behind the last."""
        width = self.problem.head_dim_v
        missing = self.number * width - self.features
        if missing:
            tensor = F.pad(tensor, (0, missing))
        tensor = tensor.unflatten(-1, (self.number, width))
        return (tensor if self.neighbors else tensor.transpose(-3, -2)).flatten(-3, -2)

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `split`."""
        tensor, _axis = self._unflatten(tensor, -2)
        tensor = tensor if self.neighbors else tensor.transpose(-3, -2)
        return tensor.flatten(-2)[..., : self.features]

    def add(self, tensor: Tensor, axis: int = -2) -> Tensor:
        """The gradient of `repeat`, summed in float32."""
        tensor, slices = self._unflatten(tensor, axis)
        return tensor.float().sum(slices)

    def first(self, lse: Tensor) -> Tensor:
        """What each head's first slice has, of statistics [..., slices as heads]."""
        lse, slices = self._unflatten(lse, -1)
        return lse.select(slices, 0)

    def only_first(self, lse_gradient: Tensor) -> Tensor:
        """The gradient of `first`: the slices share a logsumexp, whose gradient counts once."""
        if self.neighbors:
            return F.pad(lse_gradient.unsqueeze(-1), (0, self.number - 1)).flatten(-2)
        return F.pad(lse_gradient, (0, (self.number - 1) * lse_gradient.shape[-1]))

    def inputs(self, inputs: Inputs) -> Inputs:
        """The tensors of the problem as those of its slices."""
        query, key, value, rpb, context_key, context_value, sink, *rest = inputs
        return Inputs(
            self.repeat(query),
            self.repeat(key),
            self.split(value),
            # Its gradient, a sum over slices, comes in this dtype.
            None if rpb is None else self.repeat(rpb.float(), -rpb.dim()),
            self._if_any(self.repeat, context_key),
            self._if_any(self.split, context_value),
            None if sink is None else self.repeat(sink, -1),
            *rest,
        )

    def results(self, results: Results) -> Results:
        """What the forward pass gave, and its gradients, as those of its slices."""
        out, lse, grad_out, grad_lse = results
        return Results(
            self.split(out),
            self.repeat(lse, -1),
            self.split(grad_out),
            self._if_any(self.only_first, grad_lse),
        )

    @staticmethod
    def _if_any(change: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    def gradients(self, tensors: Gradients) -> Gradients:
        """The gradients of the six inputs from those of their slices."""
        query, key, value, rpb, context_key, context_value = tensors
        return (
            self._if_any(self.add, query),
            self._if_any(self.add, key),
            self._if_any(self.join, value),
            None if rpb is None else self.add(rpb, -rpb.dim()),
            self._if_any(self.add, context_key),
            self._if_any(self.join, context_value),
        )


@lru_cache(maxsize=4096)
def sliced(problem: Problem) -> Slices | None:
    """How to slice the values of a problem; None if they are narrow enough."""
    if problem.head_dim_v <= _widest(problem.head_dim):
        return None
    number = -(-problem.head_dim_v // _SLICE)
    narrow = replace(
        problem,
        heads=problem.heads * number,
        heads_kv=problem.heads_kv * number,
        head_dim_v=-(-problem.head_dim_v // (8 * number)) * 8,
    )
    return Slices(narrow, number, problem.head_dim_v, problem.heads == problem.heads_kv)
