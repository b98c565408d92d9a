"""Windows of groups of heads: launches for each group, on views of the same tensors, that write
into views of one output and of one gradient of each tensor. Nothing is copied or concatenated.

So it is where nobody but autograd watches; elsewhere each group is a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten._internals import is_dense, is_watched, plain_apply
from natten.functional import known as knowns
from natten.functional import operators
from natten.functional.call import NUM_TENSORS, Call, Parameters, Tensors
from natten.functional.known import Known, Results


def of_groups(tensor: Tensor | None, groups: int, dim: int) -> Sequence[Any]:
    """What each of some equal groups of query's heads has of a tensor with heads along an axis;
    groups that share a head each have it. None of None."""
    if tensor is None:
        return [None] * groups
    # One node of autograd, whose gradient is one concatenation.
    parts = tensor.split(max(tensor.shape[dim] // groups, 1), dim)
    return [parts[group * len(parts) // groups] for group in range(groups)]


def _parts(tensors: Tensors, groups: int) -> list[Tensors]:
    """What each group has: its heads, and the masks."""
    query, key, value = (of_groups(tensor, groups, -2) for tensor in tensors[:3])
    each = zip(query, key, value, strict=True)
    return [tensors._replace(query=q, key=k, value=v) for q, k, v in each]


class _KnownGroups(Known):
    """The forward passes of all groups: out, and the logsumexp of each."""

    __slots__ = ("calls",)

    def __init__(
        self, calls: tuple[Call, ...], places: tuple[int, ...], tensors: Sequence[Tensor]
    ) -> None:
        super().__init__(calls[0], places, tensors, self._forward)
        self.calls = calls

    def tensors(self, given: Sequence[Tensor]) -> Tensors:
        """In their places among the operator's."""
        return Tensors(*operators._spread(given, self.places, NUM_TENSORS))

    def _forward(self, given: Sequence[Tensor]) -> Results:
        tensors, groups = self.tensors(given), len(self.calls)
        *rows, heads, features = self.calls[0].out_shape
        out = tensors.query.new_empty((*rows, heads * groups, features))
        each = zip(self.calls, _parts(tensors, groups), of_groups(out, groups, -2), strict=True)
        statistics = []
        for call, part, view in each:
            found, lse = operators._compute(call, part, view)
            if found is not view:
                view.copy_(found)
            statistics.append(lse)
        return (out, *statistics)

    def backward(self, tensors: Sequence[Tensor], missing: Any, needs: tuple[bool, ...]) -> Known:
        """The backward passes, of the forward passes' tensors and results and the gradients of
        these, of which some are missing."""
        groups = len(self.calls)
        count = len(self.places) + 1 + groups
        places = (*range(count), *[count + i for i, m in enumerate(missing) if not m])

        def compute(given: Sequence[Tensor]) -> Results:
            all_tensors = operators._spread(given, places, count + 1 + groups)
            inputs, results = all_tensors[: len(self.places)], all_tensors[len(self.places) :]
            out, *lse, grad_out = results[: groups + 2]
            grad_lse = results[groups + 2 :]
            own = self.tensors(inputs)
            wholes = [
                torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
                for t, need in zip(inputs, needs, strict=True)
            ]
            views = [of_groups(whole, groups, -2) for whole in wholes[:3]]
            given_out = of_groups(grad_out, groups, -2)
            asked = (*needs[:3], False, False, False, False)
            for number, (call, part, out_part, *destinations) in enumerate(
                zip(
                    self.calls, _parts(own, groups), of_groups(out, groups, -2), *views, strict=True
                )
            ):
                found = operators._compute_backward(
                    call, given_out[number], grad_lse[number], part, out_part, lse[number], asked,
                    tuple(destinations) if all(needs[:3]) else None,
                )  # fmt: skip
                for destination, gradient in zip(destinations, found[:3], strict=True):
                    if destination is not None and gradient is not destination:
                        destination.copy_(gradient)
            return tuple(wholes)

        return Known(self.call, places, tensors, compute)


class _PlainGroups(operators._PlainAttention):
    """The derivative of these."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        forward: _KnownGroups = ctx.known
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled() and not is_watched():
            given = [t for t in (*saved, *gradients) if t is not None]
            missing = [g is None for g in gradients]
            key = (forward, needs, *missing)
            known = knowns.find(key, given)
            if known is None and is_dense(given):
                known = knowns.add(key, forward.backward(given, missing, needs))
            if known is not None:
                return (None, *known.run(given))
        return (None, *_composed(forward, saved[: len(needs)], gradients, needs))


def _composed(
    forward: _KnownGroups,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of saved tensors by calls of the operator, which have derivatives again."""
    groups = len(forward.calls)
    with torch.enable_grad():
        # As many tensors, even where one is given twice.
        own = [t.view_as(t) if need else t for t, need in zip(saved, needs, strict=True)]
        each = zip(forward.calls, _parts(forward.tensors(own), groups), strict=True)
        found = [operators.neighborhood_attention(*part, *call.parameters) for call, part in each]
        results = [torch.cat([out for out, _ in found], -2), *[lse for _, lse in found]]
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None]
    wanted = [t for t, need in zip(own, needs, strict=True) if need]
    if not pairs:
        return [None] * len(needs)
    computed = iter(
        torch.autograd.grad(
            [r for r, _ in pairs], wanted, [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(), allow_unused=True,
        )
    )  # fmt: skip
    return [next(computed) if need else None for need in needs]


_apply_plainly = plain_apply(_PlainGroups)


def attend_groups(
    tensors: Tensors, arguments: Sequence[tuple[Any, ...]], check: Callable[..., Parameters]
) -> tuple[Tensor, Sequence[Tensor]] | None:
    """out of all heads, and the logsumexp of each group; None where they have to be calls of their
    own.

    Args:
        tensors: Query, key, value and masks.
        arguments: All others, of each group.
        check: As of :func:`natten.functional.operators.attend`, of the tensors of a group.
    """
    if is_watched():
        return None
    present, missing = operators._present(tensors)
    text = operators._text(tuple(arguments))
    key = (check, text, torch.is_grad_enabled(), tensors.query.shape, *missing)
    known = knowns.find(key, present)
    if known is None:
        if not is_dense(present):
            return None
        needs = operators.needs_grad(tensors)
        parts = zip(_parts(tensors, len(arguments)), arguments, strict=True)
        calls = [operators._make(part, own, check, needs) for part, own in parts]
        places = operators._places(missing)
        known = knowns.add(key, _KnownGroups(tuple(calls), places, present))
    if known.call.parameters.requires_grad:
        out, *statistics = _apply_plainly(known, *present)
    else:
        out, *statistics = known.run(present)
    return out, statistics


__all__ = ["attend_groups", "of_groups"]
