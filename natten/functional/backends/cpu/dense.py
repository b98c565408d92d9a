"""Dense attention on torch's own CPU flash-attention operator, which returns the logsumexp.

The operator wants one head_dim and one number of heads, and its backward pass takes no gradient of
the logsumexp: views, zero columns and one telling column make up for that. It looks at few of the
properties that it rests on; `covers`, `tame` and `_heads_first` do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natten.functional.problem import Problem

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Beyond it, a logsumexp in float32 does not tell the weights any more.
_LARGEST_SCORE = 2.0**20


def covers(problem: Problem) -> bool:
    """Whether the operator computes this problem on tame numbers. It aborts on empty tensors."""
    if problem.softcap or problem.has_key_mask or problem.has_query_mask:
        return False
    if problem.has_rpb or problem.num_additional or 0 in (*problem.output_shape, problem.num_keys):
        return False
    causal = (
        problem.rank == 1
        and not problem.upsampling
        and problem.kernel_size == problem.grid
        and problem.query_origin == problem.key_origin == (0,)
    )
    if problem.head_dim == 0 or not (problem.is_dense or causal):
        return False
    # It scales the -inf of its causal mask.
    numbers, scale = torch.finfo(problem.accumulation_dtype), problem.scale
    return numbers.tiny <= scale <= numbers.max or (
        problem.is_dense and (scale == 0 or numbers.tiny <= -scale <= numbers.max)
    )


def _largest(tensor: Tensor | None, batch: int) -> list[float]:
    """The largest magnitude of each batch entry, NaN if there is one."""
    if tensor is None:
        return [0.0] * batch
    # The norm that does this takes ten times as long.
    return tensor.abs().amax(tuple(range(1, tensor.dim()))).tolist()


def tame(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> list[bool]:
    """For each batch entry, whether all that the operator computes for it is finite.

    It returns 0 for rows of NaN, multiplies masked tokens by zero, and rounds the gradients of
    scores to the dtype of the tensors.
    """
    largest = [_largest(t, problem.batch) for t in (query, key, value, grad_out, grad_lse)]
    scale, tokens = abs(problem.scale), problem.num_queries + problem.num_keys
    numbers = torch.finfo(problem.accumulation_dtype)
    limit, narrow = math.sqrt(numbers.max), torch.finfo(problem.dtype).max / 2
    entries = []
    for q, k, v, grad, shift in zip(*largest, strict=True):
        scores = problem.head_dim * q * k
        # Of a score: dO V^T less a mean of such.
        gradient = 2 * problem.head_dim_v * grad * v + shift
        entries.append(
            scores * max(scale, 1.0) < _LARGEST_SCORE
            and gradient < narrow
            and gradient * tokens * max(q, k, 1.0) * max(scale, 1.0) < limit
            and grad * tokens < limit
            and v < limit
        )
    return entries


def _heads_first(tensor: Tensor, part: int, group: int, features: int) -> Tensor:
    """`[B, *X, H, D]` as `[B, H, N, features]`: every `group`-th head from `part` on.

    The operator takes the features of a row to be neighbors in memory, whatever the strides say,
    and leaves rows that overlap to slow loops.
    """
    tensor = tensor.flatten(1, -3)[:, :, part::group].transpose(1, 2)
    size = tensor.shape[-1]
    if size < features:
        wide = tensor.new_empty((*tensor.shape[:-1], features))
        wide[..., :size] = tensor
        wide[..., size:] = 0
        return wide
    is_plain = tensor.stride(-1) == 1 and tensor.stride(-2) >= features
    return tensor if is_plain else tensor.clone(memory_format=torch.contiguous_format)


def _paired(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or each twice where the batch has one head in all.

    The products of one head alone would be left to all threads of oneDNN, which then sums in
    another order than for the same head in a larger batch.
    """
    alone = problem.batch * problem.heads_kv == 1 and problem.dtype.itemsize == 2
    if not alone or torch.get_num_threads() == 1:
        return tensors
    return tuple(t.expand(2, *t.shape[1:]) for t in tensors)


def forward(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the logsumexp."""
    group = problem.heads // problem.heads_kv
    features = max(problem.head_dim, problem.head_dim_v)
    key, value = (_heads_first(t, 0, 1, features) for t in (key, value))
    outs, lses = [], []
    for part in range(group):
        tensors = _paired(problem, _heads_first(query, part, group, features), key, value)
        out, lse = _attention(*tensors, 0.0, any(problem.is_causal), scale=problem.scale)
        outs.append(out[: problem.batch].transpose(1, 2)[..., : problem.head_dim_v])
        lses.append(lse[: problem.batch].transpose(1, 2))
    out, lse = _interleave(outs, 2), _interleave(lses, 2)
    return out.reshape(problem.output_shape), lse.reshape(problem.lse_shape)


def _interleave(parts: list[Tensor], axis: int) -> Tensor:
    """Undo the slicing of heads: head i of part p is head i * len(parts) + p."""
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def _shifts(problem: Problem, grad_lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Columns of out and of grad_out whose products sum to -grad_logsumexp.

    16-bit types take two to be exact enough, of mantissas alone: their exponents go to the other
    side, so that small gradients do not vanish in float16.
    """
    rest = -grad_lse.flatten(1, -2).unsqueeze(-1).to(problem.accumulation_dtype)
    if problem.dtype == problem.accumulation_dtype:
        return [rest], [torch.ones_like(rest)]
    exponent = torch.frexp(rest).exponent.clamp(-14, 14)
    rest = torch.ldexp(rest, -exponent)
    first = rest.to(problem.dtype)
    second = (rest - first).to(problem.dtype)
    power = torch.ldexp(torch.ones_like(rest), exponent).to(problem.dtype)
    return [first, second], [power, power]


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
    size_v = problem.head_dim_v
    out, grad_out = out.flatten(1, -3), grad_out.flatten(1, -3)
    lse = lse.flatten(1, -2).to(problem.accumulation_dtype)
    features = max(problem.head_dim, size_v)
    if grad_lse is not None:
        # The operator subtracts rowsum(grad_out * out) from the gradients of the weights, where
        # grad_logsumexp has to be added: more columns of both, whose values are zero, do it.
        columns, factors = _shifts(problem, grad_lse)
        features = max(features, size_v + len(columns))
        out, grad_out = torch.cat([out, *columns], -1), torch.cat([grad_out, *factors], -1)
    keys, values = (_heads_first(t, 0, 1, features) for t in (key, value))
    grads_query = []
    grads_key_value: list[Tensor] = []
    for part in range(group):
        tensors = _paired(
            problem,
            _heads_first(grad_out, part, group, features),
            _heads_first(query, part, group, features),
            keys,
            values,
            _heads_first(out, part, group, features),
            lse[:, :, part::group].transpose(1, 2),
        )
        causal = any(problem.is_causal)
        grads = _attention_backward(*tensors, 0.0, causal, scale=problem.scale)
        grad_query, grad_k, grad_v = (grad[: problem.batch] for grad in grads)
        grads_query.append(grad_query.transpose(1, 2)[..., : problem.head_dim])
        if group > 1:
            # Sums over a group's heads are rounded once.
            grad_k, grad_v = (g.to(problem.accumulation_dtype) for g in (grad_k, grad_v))
        if not grads_key_value:
            grads_key_value = [grad_k, grad_v]
        else:
            for total, grad in zip(grads_key_value, (grad_k, grad_v), strict=True):
                total.add_(grad)
    grad_key, grad_value = grads_key_value
    grad_query = _interleave(grads_query, 2).reshape(query.shape)
    grad_key = grad_key.transpose(1, 2)[..., : problem.head_dim].to(key.dtype)
    grad_value = grad_value.transpose(1, 2)[..., :size_v].to(value.dtype)
    return grad_query, grad_key.reshape(key.shape), grad_value.reshape(value.shape)
