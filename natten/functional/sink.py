"""The sink: one logit per head beside those of the keys, whose value is zero.

With it, ``out = softmax(concat(scores, sink)) @ concat(values, 0)``, and the logsumexp counts it. A
weight is thus smaller than without by one factor in each row, and nothing but this file and the
forward passes need know: backward passes recompute the weights from the logsumexp.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp with a sink, of those without; differentiable.

    Args:
        out: ``[..., heads, features]``.
        lse: ``[..., heads]``; -inf where no key is seen.
        sink: ``[heads]``.
    """
    total = torch.logaddexp(lse, sink.to(lse.dtype))
    # Where there is neither a key nor a sink, the difference would be NaN.
    share = torch.where(lse == -torch.inf, 0.0, lse - total).exp()
    return (out * share.unsqueeze(-1)).to(out.dtype), total


def gradient(
    sink: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None
) -> Tensor:
    """The gradient of the sink, in its dtype; the order of additions is always the same.

    Args:
        sink: ``[heads]``.
        out, lse: The results with it, ``[batch, *tokens, heads, features]`` and without features.
        grad_out, grad_lse: Gradients of these.
    """
    dtype = lse.dtype
    shift = lse.new_zeros(lse.shape) if grad_lse is None else grad_lse
    if grad_out is not None:
        shift = shift - (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    # A row whose logsumexp is -inf has no sink either: it is not valid, or of no sequence.
    shift = ((sink.to(dtype) - lse).exp() * shift).masked_fill(lse == -torch.inf, 0.0)
    return shift.flatten(0, -2).sum(0).to(sink.dtype)


__all__ = ["gradient", "join"]
