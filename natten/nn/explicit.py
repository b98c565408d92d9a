"""Attention weights computed explicitly, where the fused path cannot give them: dropout on weights,
and pictures of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from natten.window import Axis, absent, axis_mask, bounds, distance


class AttentionMap(NamedTuple):
    """Attention weights of some queries.

    grid: `[B, P, heads, *X]`, the weight of every token of the grid (zero outside of the query's
    window). additional: `[B, P, heads, S]`, the weights of registers or context, None where there
    are none.

    The weights of one query and head sum to 1 over both.
    """

    grid: Tensor
    additional: Tensor | None


class WindowTables(NamedTuple):
    """For N queries of a grid and windows of K tokens: which token is in which slot (flat indices),
    and which slots are real.
    """

    token: Tensor  # [N, K]
    valid: Tensor  # [N, K]
    bias: Tensor  # [N, K], flat indices in the table of relative position biases


def window_tables(
    extent: Sequence[int], axes: Sequence[Axis], origin: Sequence[int], device: torch.device
) -> WindowTables:
    """The tables of a box of tokens that begins at `origin` in the grid of `axes`."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    bias = token
    valid = torch.ones(1, 1, dtype=torch.bool, device=device)
    for length, axis, first in zip(extent, axes, origin, strict=True):
        index = torch.arange(first, first + length, device=device)[:, None]
        start, end = bounds(index, *axis)
        slot = start + torch.arange(axis.kernel_size, device=device)  # [length, kernel_size]
        d, k = axis.dilation, axis.kernel_size
        attended = index % d + slot * d
        if axis.is_circular:
            attended = attended % axis.length
        real = (slot < end) & (attended >= first) & (attended < first + length)
        relative = torch.where(real, slot - index // d + k - 1, 0)
        token = _outer(token * length, torch.where(real, attended, index) - first, torch.add)
        bias = _outer(bias * (2 * k - 1), relative, torch.add)
        valid = _outer(valid, real, torch.logical_and)
    return WindowTables(token, valid, bias)


def _outer(a: Tensor, b: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[N, K] and [M, J] to [N * M, K * J]."""
    return combine(a[:, None, :, None], b[None, :, None, :]).flatten(2).flatten(0, 1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    origin: Sequence[int],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    dropout: float,
) -> Tensor:
    """Neighborhood attention whose weights exist in memory, so that dropout can act on them.

    Gathers the K keys and values of every window: memory and time are K times those of the key and
    value.
    """
    rank = len(axes)
    tables = window_tables(query.shape[1:-2], axes, origin, query.device)
    heads, heads_kv = query.shape[-2], key.shape[-2]
    q = torch.unflatten(
        query.flatten(1, rank), -2, (heads_kv, heads // heads_kv)
    )  # [B, N, Hkv, G, D]
    k = key.flatten(1, rank)[:, tables.token]  # [B, N, K, Hkv, D]
    v = value.flatten(1, rank)[:, tables.token]
    scores = torch.einsum("bnhgd,bnkhd->bnhgk", q * scale, k)
    if rpb is not None:
        bias = torch.unflatten(rpb.flatten(1)[:, tables.bias], 0, (heads_kv, -1))  # [Hkv, G, N, K]
        scores = scores + bias.permute(2, 0, 1, 3)
    scores = scores.masked_fill(~tables.valid[:, None, None, :], -torch.inf)
    slots = scores.shape[-1]
    if additional_keys is not None:
        more = torch.einsum("bnhgd,bshd->bnhgs", q * scale, additional_keys)
        if additional_lengths is not None:
            hidden = absent(additional_lengths, additional_keys.shape[1])
            more = more.masked_fill(hidden[:, None, None, None, :], -torch.inf)
        scores = torch.cat([scores, more], dim=-1)
    weights = F.dropout(softmax(scores).to(v.dtype), dropout)
    out = torch.einsum("bnhgk,bnkhd->bnhgd", weights[..., :slots], v)
    if additional_values is not None:
        out = out + torch.einsum("bnhgs,bshd->bnhgd", weights[..., slots:], additional_values)
    return torch.unflatten(out.flatten(2, 3), 1, query.shape[1:-2])


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    additional_keys: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> AttentionMap:
    """Weights of some queries `[B, P, H, D]` over a whole grid of keys `[B, *X, Hkv, D]` and
    additional keys.

    mask: `[P, *X]`, True where the query sees the key; None for everywhere. bias: `[H, P, *X]`.
    softcap, sink: as of `natten.na2d`.
    """

    def capped(products: Tensor) -> Tensor:
        return softcap * (products / softcap).tanh() if softcap else products

    extent = key.shape[1:-2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads_kv = key.shape[-2]
    q = torch.unflatten(query.to(dtype), -2, (heads_kv, -1)) * scale
    scores = torch.einsum("bphgd,bnhd->bphgn", q, key.flatten(1, -3).to(dtype)).flatten(2, 3)
    scores = capped(scores)
    if bias is not None:
        scores = scores + bias.to(dtype).flatten(2).transpose(0, 1)
    if mask is not None:
        scores = scores.masked_fill(~mask.flatten(1)[:, None, :], -torch.inf)
    tokens = scores.shape[-1]
    if additional_keys is not None:
        more = torch.einsum("bphgd,bshd->bphgs", q, additional_keys.to(dtype)).flatten(2, 3)
        more = capped(more)
        if additional_lengths is not None:
            hidden = absent(additional_lengths, additional_keys.shape[1])
            more = more.masked_fill(hidden[:, None, None, :], -torch.inf)
        scores = torch.cat([scores, more], dim=-1)
    if sink is not None:
        logits = sink.to(dtype)[:, None].expand(*scores.shape[:-1], 1)
        weights = softmax(torch.cat([scores, logits], dim=-1))[..., :-1]
    else:
        weights = softmax(scores)
    additional = weights[..., tokens:] if additional_keys is not None else None
    return AttentionMap(torch.unflatten(weights[..., :tokens], -1, extent), additional)


def window_rows(
    positions: Tensor,
    extent: Sequence[int],
    axes: Sequence[Axis],
    origin: Sequence[int],
    rpb: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What queries at `[P, rank]` see of a box of tokens that begins at `origin` in a grid.

    Returns:
        A mask `[P, *extent]`, and the biases `[H, P, *extent]`.
    """
    count, rank = positions.shape
    mask = torch.ones([count] + [1] * rank, dtype=torch.bool, device=positions.device)
    bias = None if rpb is None else rpb[:, None].expand(-1, count, *rpb.shape[1:])
    for i, (length, axis, first) in enumerate(zip(extent, axes, origin, strict=True)):
        along = [length if j == i else 1 for j in range(rank)]
        index = positions[:, i, None] + first
        token = torch.arange(first, first + length, device=positions.device)
        mask = mask & axis_mask(index, token, axis).view([count] + along)
        if bias is not None:
            k = axis.kernel_size
            relative = (distance(index, token, axis) + k - 1).clamp(0, 2 * k - 2)  # [P, length]
            wanted = list(bias.shape)
            wanted[i + 2] = length
            bias = bias.gather(i + 2, relative.view([1, count] + along).expand(wanted))
    return mask, bias


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
