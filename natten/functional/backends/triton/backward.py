"""The backward pass: which kernels run, in which order, on what.

The gradients of query and bias, and those of key and value, have a kernel each, which reads the
gradient of the scores in one of the two directions. The scores are computed twice, seven matrix
products instead of five. In return every sum has a fixed order, so that results are bitwise
reproducible, and but for the bias nothing is added to memory atomically: one kernel in this dialect
that also adds dS K to dQ in memory took 1.2 to 2.6 times as long on an H100. `hopper_backward.py`
has one that takes less, for large windows.
"""

from __future__ import annotations

from functools import cached_property, lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten.functional.backend import Gradients, Inputs, Results
from natten.functional.backends.triton import arguments, launcher
from natten.functional.backends.triton.bias import bias_tables
from natten.functional.backends.triton.grids import placed_ends, placed_table
from natten.functional.backends.triton.key_value_gradient import key_value_gradient_launch
from natten.functional.backends.triton.launcher import Launch, describable, descriptor, readable
from natten.functional.backends.triton.primitives import base2_lse, ceil_div, load_rows
from natten.functional.backends.triton.query_gradient import query_gradient_launch
from natten.functional.backends.triton.splits import merge
from natten.functional.backends.triton.tiles import (
    BackwardTilings,
    Tiling,
    additional_problem,
    block,
)
from natten.functional.problem import Problem

_ROWS = 64


@triton.jit(do_not_specialize=["tokens", "heads"])
def statistics_kernel(
    out, out_gradient, lse, lse_gradient, statistics, tokens, heads,
    VALUE_FEATURES: tl.constexpr, VALUE_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """The base-2 logsumexp and delta, the first of `WIDTH` numbers of each [batch, head, token].

    Only where no kernel for the query's gradient computes them in passing.
    """
    blocks = ceil_div(tokens, ROWS)
    program = tl.program_id(0)
    rest = program // blocks
    head = rest % heads
    batch = (rest // heads).to(tl.int64)
    token = (program % blocks) * ROWS + tl.arange(0, ROWS)
    exists = token < tokens
    row = (batch * tokens + token) * heads + head
    row_lse = base2_lse(lse + row, exists)
    target = statistics + WIDTH * ((batch * heads + head) * tokens + token)
    tl.store(target, row_lse, mask=exists)
    if HAS_DELTA:
        offset = row * VALUE_FEATURES
        product = load_rows(out, offset, exists, VALUE_FEATURES, VALUE_BLOCK).to(tl.float32)
        product *= load_rows(out_gradient, offset, exists, VALUE_FEATURES, VALUE_BLOCK)
        row_delta = tl.sum(product, 1)
        if lse_gradient is not None:
            row_delta -= tl.load(lse_gradient + row, mask=exists, other=0.0)
        tl.store(target + 1, row_delta, mask=exists)


@lru_cache(maxsize=4096)
def _statistics_launch(
    batch: int,
    tokens: int,
    heads: int,
    features: int,
    width: int,
    has_delta: bool,
    device: torch.device,
) -> Launch:
    """Compiled kernels, which it keeps, belong to a device."""
    return Launch(
        statistics_kernel,
        triton.cdiv(tokens, _ROWS) * heads * batch,
        (tokens, heads, features, block(features), _ROWS, width, has_delta),
    )


def _parts(problem: Problem, found: list[Tensor], splits: int) -> list[Tensor]:
    """Memory for what each of several splits sums, in order; of one, the gradients' own."""
    if splits == 1:
        return found
    return [launcher.allocate(problem, (splits, *t.shape), torch.float32, t.device) for t in found]


def _join(parts: list[Tensor], found: list[Tensor], splits: int) -> None:
    """Write the gradients, given the sums of each split."""
    if splits > 1:
        for part, gradient in zip(parts, found, strict=True):
            merge(part, gradient)


class BackwardPass:
    """One backward pass: its tensors in readable layouts, and the launches on them."""

    def __init__(
        self,
        problem: Problem,
        tilings: BackwardTilings,
        torch_reduction: bool,
        deterministic: bool,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None,
    ) -> None:
        query, key, value, rpb, additional_keys, additional_values, *_ = inputs
        cumulative = (inputs.cumulative_seqlen_q, inputs.cumulative_seqlen_kv)
        out, lse, grad_out, grad_lse = results
        self.needs, self.destinations = needs, destinations
        self.problem, self.tilings, self.dtype = problem, tilings, query.dtype
        self.deterministic = deterministic
        # One pass pays off where it computes all three.
        self.fused = tilings.fused if all(needs[:3]) else None
        self.single = tilings.single if all(needs[:3]) else None
        # Each of them is read as columns by one of the kernels.
        describe = self.fused is not None
        separate = self.single is None
        described = partial(describable, dilation=problem.dilation)
        query_layout = described if describe or (separate and tilings.key_value.tma) else readable
        key_layout = described if describe or (separate and tilings.query.tma) else readable
        self.query, self.grad_out = query_layout(query), query_layout(grad_out)
        self.key, self.value = key_layout(key), key_layout(value)
        self.rpb = rpb
        self.bias_paddings: tuple[int, ...] = arguments.NO_PADDINGS
        self.bias: Tensor | None = None
        self.bias_sums: Tensor | None = None
        if rpb is not None:
            self.bias_paddings = tilings.bias_paddings(self.single)
            sums = None
            if needs[3]:
                sums = torch.int64 if deterministic else torch.float32
            self.bias, self.bias_sums, self.bias_tables = bias_tables(
                rpb, problem, self.bias_paddings, sums
            )
        self.additional: tuple[Tensor, ...] = ()
        if additional_keys is not None and additional_values is not None:
            self.additional = (readable(additional_keys), readable(additional_values))
        self.cumulative = (launcher.adjacent(cumulative[0]), launcher.adjacent(cumulative[1]))
        self.counts = launcher.adjacent(inputs.additional_lengths)
        self.sequences = launcher.sequences(problem, cumulative[0])
        self.precision = arguments.precision(problem)
        self.key_mask = inputs.key_mask
        if problem.has_query_mask:
            # Scores of queries that are not valid are masked by this alone.
            lse = torch.where(lse == -torch.inf, torch.inf, lse)
        needs_bias = self.bias_sums is not None
        # Whether the kernel for the query's gradient computes the statistics. The bounds of
        # integers follow from them.
        self.in_passing = (
            self.fused is None
            and (needs[0] or needs_bias)
            and not torch_reduction
            and not (needs_bias and deterministic)
        )
        if not self.in_passing or out.stride() != self.grad_out.stride():
            out, self.grad_out = out.contiguous(), query_layout(grad_out.contiguous())
        self.out, self.lse = out, lse.contiguous()
        self.grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self.torch_reduction = torch_reduction

    @cached_property
    def statistics(self) -> Tensor:
        """Memory for logsumexp and delta, and as much again where the memory accelerator is to load
        them."""
        problem, width = self.problem, 2 if self.fused is None else 4
        shape = (problem.batch, problem.heads, problem.num_queries, width)
        return torch.empty(shape, dtype=torch.float32, device=self.out.device)

    def _statistics(self) -> None:
        """Fill in the statistics."""
        tokens, heads, features = self.problem.num_queries, self.problem.heads, self.out.shape[-1]
        if self.torch_reduction:
            rows = (self.grad_out.float() * self.out.float()).sum(-1)
            if self.grad_lse is not None:
                rows = rows - self.grad_lse
            self.statistics[..., 1].copy_(rows.view(-1, tokens, heads).transpose(1, 2))
        _statistics_launch(
            self.problem.batch, tokens, heads, features, self.statistics.shape[-1],
            not self.torch_reduction, self.out.device,
        ).run(self.out, self.grad_out, self.lse, self.grad_lse, self.statistics)  # fmt: skip

    def run(self) -> Gradients:
        if self.fused is not None:
            self._statistics()
            return self._all(self.fused)
        query = key = value = bias = additional_key = additional_value = None
        needs = self.needs
        if not self.in_passing:
            self._statistics()
        if self.single is not None:
            return (*self._single(self.single, self.in_passing), None, None)
        if needs[0] or self.bias_sums is not None:
            query, bias = self._query(self.tilings.query, self.in_passing)
        if needs[1] or needs[2]:
            key, value = self._key_value(
                self.problem, self.tilings.key_value, self.tilings.key_value.splits,
                self.tilings.persistent_programs,
                (self.query, self.key, self.value, self.grad_out), self.bias, self.cumulative,
                (None, self.key_mask),
                None if self.destinations is None else self.destinations[1:],
            )  # fmt: skip
        if needs[4] or needs[5]:
            # Every query sees every additional token: plain attention over flat queries.
            problem, additional = additional_problem(self.problem), self.additional
            cumulative: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.problem.grids is not None:
                context, device = self.problem.num_additional, self.query.device
                cumulative = placed_ends(self.problem.grids, context, device)
                additional = tuple([t.flatten(0, 1).unsqueeze(0) for t in additional])
            found = self._key_value(
                problem, self.tilings.additional, self.tilings.splits, 0,
                (self.query.flatten(1, -3), *additional, self.grad_out.flatten(1, -3)),
                None, cumulative, (self.counts, None),
            )  # fmt: skip
            if self.problem.grids is not None:
                found = (found[0].view_as(self.additional[0]), found[1].view_as(self.additional[1]))
            additional_key, additional_value = found
        return query if needs[0] else None, key, value, bias, additional_key, additional_value

    def _destination(self, number: int, tensor: Tensor) -> Tensor:
        """Memory for the gradient of query, key or value, which is the ``number``-th."""
        if self.destinations is not None:
            return self.destinations[number]
        return launcher.allocate(self.problem, tensor.shape, self.dtype, tensor.device)

    def _all(self, tiling: Tiling) -> Gradients:
        """All gradients but that of a bias, in one pass."""
        tensors = (self.query, self.key, self.value)
        query, key, value = (self._destination(*numbered) for numbered in enumerate(tensors))
        more = self.tilings.fused_additional
        splits = 1 if more is None else more.splits
        found = [
            launcher.allocate(self.problem, t.shape, self.dtype, t.device) for t in self.additional
        ]
        parts = _parts(self.problem, found, splits)
        launcher.in_gluon("hopper_backward").gradients(
            self.problem, tiling, self.sequences, self.tilings.launches, (*tensors, self.grad_out),
            self.statistics, self.cumulative, (query, key, value), more, self.additional, parts,
        )  # fmt: skip
        # Queries need the launch for additional keys even where nobody needs these' own gradients.
        if not (self.needs[4] or self.needs[5]):
            return query, key, value, None, None, None
        _join(parts, found, splits)
        return query, key, value, None, found[0], found[1]

    def _single(
        self, tiling: Tiling, with_statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of query, key, value and bias, where one tile holds a head's queries."""
        key, value = self._destination(1, self.key), self._destination(2, self.value)
        query, bias = self._query(tiling, with_statistics, (key, value))
        return query, key, value, bias

    def _query(
        self, tiling: Tiling, with_statistics: bool, others: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of query and bias; fills in the statistics in passing, or the gradients of
        key and value, ``others``."""
        gradient = target = self._destination(0, self.query)
        if tiling.splits > 1:
            # The sums of each of the splits.
            shape = (tiling.splits, *gradient.shape)
            target = torch.empty(shape, dtype=torch.float32, device=gradient.device)
        sums = self.bias_sums
        launch = query_gradient_launch(
            self.problem, tiling, self.sequences, self.precision,
            (self.query.stride(), self.key.stride(), self.value.stride(), self.grad_out.stride()),
            tuple([t.stride() for t in self.additional]), target.stride()[-gradient.dim() :],
            arguments.mask_strides(self.key_mask), self.bias_paddings,
            0 if sums is None else self.bias_tables.copies,
            tuple([t.stride() for t in others]),
        )  # fmt: skip
        key_tile = launch.variant.KEY_TILE
        factor = self._fixed_point() if self.deterministic and sums is not None else None
        launch.run(
            self.query,
            descriptor(self.key, key_tile) if tiling.tma else self.key,
            descriptor(self.value, key_tile) if tiling.tma else self.value,
            self.grad_out, None if others and with_statistics else self.statistics, target,
            self.bias, *(self.additional or (None, None)), *self.cumulative,
            placed_table(self.problem, launch.variant.QUERY_TILE, gradient.device), self.counts,
            *((self.out, self.lse, self.grad_lse) if with_statistics else (None, None, None)),
            sums, factor, arguments.as_bytes(self.key_mask), *(others or (None, None)),
        )  # fmt: skip
        if tiling.splits > 1:
            merge(target, gradient)
        if sums is None or self.rpb is None:
            return gradient, None
        bias_gradient = torch.empty(self.rpb.shape, dtype=self.rpb.dtype, device=gradient.device)
        self.bias_tables.gradient.run(sums, bias_gradient, factor)
        return gradient, bias_gradient

    def _key_value(
        self,
        problem: Problem,
        tiling: Tiling,
        splits: int,
        persistent_programs: int,
        tensors: tuple[Tensor, ...],
        bias: Tensor | None,
        cumulative: tuple[Tensor | None, Tensor | None],
        present: tuple[Tensor | None, Tensor | None],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``present`` is how many of the keys there are, and which are valid."""
        query, key, value, grad_out = tensors
        counts, key_mask = present
        found = list(destinations or ())
        if destinations is None:
            found = [
                launcher.allocate(problem, t.shape, self.dtype, t.device) for t in (key, value)
            ]
        targets = _parts(problem, found, splits)
        gradients = tuple([t.stride()[-key.dim() :] for t in targets])
        launch = key_value_gradient_launch(
            problem, tiling, launcher.sequences(problem, cumulative[0]), self.precision,
            (query.stride(), key.stride(), value.stride(), grad_out.stride()), gradients,
            arguments.mask_strides(key_mask), self.bias_paddings, splits, persistent_programs,
        )  # fmt: skip
        query_tile = launch.variant.QUERY_TILE
        launch.run(
            descriptor(query, query_tile) if tiling.tma else query,
            key, value,
            descriptor(grad_out, query_tile) if tiling.tma else grad_out,
            self.statistics, *targets, bias, *cumulative,
            placed_table(problem, launch.variant.KEY_TILE, key.device), counts,
            arguments.as_bytes(key_mask),
        )  # fmt: skip
        _join(targets, found, splits)
        return found[0], found[1]

    def _fixed_point(self) -> Tensor:
        """A power of two that turns the bias gradient into integers of 62 bits without overflow.

        A score's gradient is at most |dO| |V| + |delta|; a bias has one of each query.
        """
        norms = [t.float().norm(dim=-1).amax() for t in (self.grad_out, self.value)]
        bound = norms[0] * norms[1] + self.statistics[..., 1].abs().amax()
        bits = torch.log2(bound * (self.problem.batch * self.problem.num_queries)).ceil()
        return torch.exp2((61 - bits).clamp(-126, 126))
