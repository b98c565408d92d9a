"""Dense attention on torch's own CPU flash-attention operator, which returns the logsumexp.

The operator wants one head_dim and one number of heads, and its backward pass takes no gradient of
the logsumexp: views, zero columns and one telling column make up for that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from natten.functional.problem import Problem

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def suits(problem: Problem, *tensors: Tensor) -> bool:
    """Whether the operator computes exactly this problem on these tensors.

    It aborts on empty tensors, returns 0 for rows of NaN, and multiplies masked tokens by zero.
    """
    if problem.has_rpb or problem.num_additional or 0 in (*problem.output_shape, problem.num_keys):
        return False
    causal = (
        problem.rank == 1
        and problem.kernel_size == problem.grid
        and problem.query_origin == problem.key_origin == (0,)
    )
    if problem.head_dim == 0 or not (problem.is_dense or causal):
        return False
    precise = problem.accumulation_dtype
    return all(bool(tensor.sum(dtype=precise).isfinite()) for tensor in tensors)


def _heads_first(tensor: Tensor, part: int, group: int, features: int) -> Tensor:
    """`[B, *X, H, D]` as `[B, H, N, features]`: every `group`-th head from `part` on."""
    tensor = tensor.flatten(1, -3)[:, :, part::group].transpose(1, 2)
    if tensor.shape[-1] < features:
        return pad(tensor, (0, features - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the logsumexp."""
    group = problem.heads // problem.heads_kv
    features = max(problem.head_dim, problem.head_dim_v)
    key, value = (_heads_first(t, 0, 1, features) for t in (key, value))
    outs, lses = [], []
    for part in range(group):
        out, lse = _attention(
            _heads_first(query, part, group, features),
            key, value, 0.0, any(problem.is_causal), scale=problem.scale,
        )  # fmt: skip
        outs.append(out.transpose(1, 2)[..., : problem.head_dim_v])
        lses.append(lse.transpose(1, 2))
    out, lse = _interleave(outs, 2), _interleave(lses, 2)
    return out.reshape(problem.output_shape), lse.reshape(problem.lse_shape)


def _interleave(parts: list[Tensor], axis: int) -> Tensor:
    """Undo the slicing of heads: head i of part p is head i * len(parts) + p."""
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    group = problem.heads // problem.heads_kv
    # The operator subtracts rowsum(grad_out * out) from the gradients of the weights, where
    # grad_logsumexp has to be added: columns of out that hold -grad_logsumexp, of grad_out that
    # hold one and of value that hold zero do it. 16-bit types take two columns to be exact enough.
    shifts: list[Tensor] = []
    if grad_lse is not None:
        rest = -grad_lse.flatten(1, -2).unsqueeze(-1).to(problem.accumulation_dtype)
        for _ in range(1 if problem.dtype == problem.accumulation_dtype else 2):
            shifts.append(rest.to(problem.dtype))
            rest = rest - shifts[-1]
    size_v = problem.head_dim_v
    features = max(problem.head_dim, size_v + len(shifts))
    out, grad_out = out.flatten(1, -3), grad_out.flatten(1, -3)
    lse = lse.flatten(1, -2)
    if shifts:
        ones = torch.ones_like(shifts[0])
        out = torch.cat([out, *shifts], -1)
        grad_out = torch.cat([grad_out, *[ones] * len(shifts)], -1)
    keys, values = (_heads_first(t, 0, 1, features) for t in (key, value))
    grads_query = []
    grad_key = grad_value = None
    for part in range(group):
        grad_query, grad_k, grad_v = _attention_backward(
            _heads_first(grad_out, part, group, features),
            _heads_first(query, part, group, features),
            keys,
            values,
            _heads_first(out, part, group, features),
            lse[:, :, part::group].transpose(1, 2),
            0.0,
            any(problem.is_causal),
            scale=problem.scale,
        )
        grads_query.append(grad_query.transpose(1, 2)[..., : problem.head_dim])
        if group > 1:
            # Sums over a group's heads are rounded once.
            grad_k, grad_v = (g.to(problem.accumulation_dtype) for g in (grad_k, grad_v))
        grad_key = grad_k if grad_key is None else grad_key.add_(grad_k)
        grad_value = grad_v if grad_value is None else grad_value.add_(grad_v)
    grad_query = _interleave(grads_query, 2).reshape(query.shape)
    grad_key = grad_key.transpose(1, 2)[..., : problem.head_dim].to(key.dtype)
    grad_value = grad_value.transpose(1, 2)[..., :size_v].to(value.dtype)
    return grad_query, grad_key.reshape(key.shape), grad_value.reshape(value.shape)
