"""What a backend is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from natten.functional.problem import Config, Problem

Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]

Tensors = tuple[Tensor | None, ...]
# A call done again on other tensors, which come with their addresses. Returns its results, or None
# where it has to be done as the first time.
Replay = Callable[[list[Tensor], list[int]], Tensors | None]


class Inputs(NamedTuple):
    """The tensors of a call as backends take them.

    Backends may trust them: they are checked, and those of an empty context are left out.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None
    cumulative_seqlen_q: Tensor | None = None
    cumulative_seqlen_kv: Tensor | None = None
    additional_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that a backend is asked for gradients of: that of the sink follows from the results
        (`natten.functional.sink`)."""
        return self[:6]


class Results(NamedTuple):
    """What the forward pass gave, and the gradients of that."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None


class Sequence(NamedTuple):
    """One of the packed sequences of a call, as a problem of its own."""

    problem: Problem
    queries: slice
    keys: slice

    def inputs(self, inputs: Inputs) -> Inputs:
        """Its tensors."""
        query, key, value, *_ = inputs
        parts = (query[:, self.queries], key[:, self.keys], value[:, self.keys])
        return Inputs(*parts, sink=inputs.sink)

    def results(self, results: Results) -> Results:
        """Its results and their gradients."""
        out, lse, grad_out, grad_lse = results
        rows = self.queries
        last = None if grad_lse is None else grad_lse[:, rows]
        return Results(out[:, rows], lse[:, rows], grad_out[:, rows], last)


def sequences(problem: Problem, inputs: Inputs) -> Iterator[Sequence]:
    """The packed sequences of a call. Looks at where they end, which waits for a GPU.

    Raises:
        ValueError: There are none.
    """
    if inputs.cumulative_seqlen_q is None or inputs.cumulative_seqlen_kv is None:
        raise ValueError("packed sequences need cumulative_seqlen_q and cumulative_seqlen_kv")
    ends = (inputs.cumulative_seqlen_q.tolist(), inputs.cumulative_seqlen_kv.tolist())
    for (q, q_end), (kv, kv_end) in zip(*map(pairwise, ends), strict=True):
        grid = (max(q_end - q, kv_end - kv, 1),)
        part = replace(
            problem, query_shape=(q_end - q,), key_shape=(kv_end - kv,), grid=grid,
            kernel_size=grid, varlen=False, max_seqlen_q=0, max_seqlen_kv=0,
        )  # fmt: skip
        yield Sequence(part, slice(q, q_end), slice(kv, kv_end))


class Backend(ABC):
    """An implementation of attention, which says what it cannot compute.

    Attributes:
        name: As in the table of :mod:`natten.functional.dispatch`.
    """

    name: str

    @abstractmethod
    def refusal(self, problem: Problem, config: Config) -> str | None:
        """The reason, in one sentence, why it cannot run the problem; None if it can.

        An :class:`~natten.functional.problem.Unavailable` if the environment lacks something.
        """

    def auto_refusal(self, problem: Problem, config: Config) -> str | None:
        """A reason not to be chosen unless named."""
        return None

    def configs(self, problem: Problem) -> list[Any]:
        """(q_tile_shape, kv_tile_shape) pairs that the forward pass accepts, the default first, or
        ((q_tile_shape, kv_tile_shape), kernel_schedule). Without any, these knobs are ignored."""
        return []

    def backward_configs(self, problem: Problem) -> list[Any]:
        """(q_tile_shape, kv_tile_shape) pairs that the backward pass accepts, the default first."""
        return []

    def takes_grids(self, problem: Problem, config: Config, backward: bool) -> bool:
        """Whether it computes grids of different sizes at once, in the forward or the backward
        pass; else it is given those of one size at a time."""
        return False

    @abstractmethod
    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out ``[batch, *query_shape, heads, head_dim_v]`` in the problem's dtype, and logsumexp
        ``[batch, *query_shape, heads]`` in its accumulation dtype, which counts the sink.

        ``destination`` is a view that out may be written into, and that is returned then.
        """

    @abstractmethod
    def backward(
        self,
        problem: Problem,
        config: Config,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> Gradients:
        """The gradients of the six differentiable inputs.

        Args:
            problem, config, inputs: As of the forward pass.
            results: Its results and their gradients.
            needs: Which gradients are asked for. Others, and those that are zero, may be None.
            destinations: Views that the gradients of query, key and value, which are all asked for
                then, may be written into and that are returned then.
        """

    def float8_refusal(self, problem: Problem, named: bool) -> str | None:
        """The reason why it does not run the problem with 8-bit inputs and results in the problem's
        dtype, be it ``named`` or chosen; None if it does."""
        return "it computes no 8-bit numbers"

    def float8_forward(
        self, problem: Problem, inputs: Inputs, scales: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """`forward` of query, key and value in float8_e4m3fn, which are multiplied by the scales of
        their heads."""
        raise NotImplementedError

    def record(
        self, function: Callable[[], Tensors], inputs: list[Tensor]
    ) -> tuple[Tensors, Replay | None]:
        """The results of a call on ``inputs``, and how to do it again on others of the same sizes,
        strides and alignment, of which the same are the same; None if that is no faster."""
        return function(), None


__all__ = ["Backend", "Gradients", "Inputs", "Replay", "Results", "Sequence", "sequences"]
