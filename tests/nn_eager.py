"""Plain eager definitions that the tests of natten.nn compare with: dense, masked, in float64."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from natten.window import Axis, attended


def window_mask(extent, kernel_size, stride, dilation, is_causal) -> Tensor:
    """[N, N], from the lists of attended tokens."""
    axes = list(map(Axis, extent, kernel_size, stride, dilation, is_causal))
    mask = torch.zeros(*extent, *extent, dtype=torch.bool)
    for query in product(*map(range, extent)):
        for key in attended(query, axes):
            mask[(*query, *key)] = True
    n = torch.Size(extent).numel()
    return mask.view(n, n)


def window_bias(rpb: Tensor, extent, kernel_size, stride, dilation, is_causal) -> Tensor:
    """[H, N, N], zero outside of the windows."""
    axes = list(map(Axis, extent, kernel_size, stride, dilation, is_causal))
    n = torch.Size(extent).numel()
    index = torch.full((*extent, *extent), rpb[0].numel())
    for query in product(*map(range, extent)):
        for key in attended(query, axes):
            flat = 0
            for q, k, axis in zip(query, key, axes, strict=True):
                step = (k - q) // axis.dilation
                flat = flat * (2 * axis.kernel_size - 1) + step + axis.kernel_size - 1
            index[(*query, *key)] = flat
    table = torch.cat([rpb.flatten(1), rpb.new_zeros(rpb.shape[0], 1)], dim=1)
    return table[:, index.view(n, n)]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of [B, N, H, D], mask [N, M] or [B, N, M]: output, weights [B, H, N, M]."""
    heads = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(heads, 2), value.repeat_interleave(heads, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask[:, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value), weights


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, origin, theta: float, spacing) -> Tensor:
    """Rotary embedding of [B, *X, H, D], one complex number at a time."""
    rank = x.dim() - 3
    half = x.shape[-1] // 2
    pairs = half // rank
    out = x.clone()
    for position in product(*map(range, x.shape[1:-2])):
        for axis, n in product(range(rank), range(pairs)):
            coordinate = (position[axis] + origin[axis]) / spacing[axis]
            turn = torch.polar(
                torch.tensor(1.0, dtype=torch.float64),
                torch.tensor(coordinate * theta ** (-n / pairs), dtype=torch.float64),
            )
            j = axis * pairs + n
            at = (slice(None), *position)
            turned = torch.complex(x[at][..., j], x[at][..., j + half]) * turn
            out[(*at, slice(None), j)] = turned.real
            out[(*at, slice(None), j + half)] = turned.imag
    return out


def project(module, x: Tensor, origin=None) -> tuple[Tensor, Tensor, Tensor]:
    """What NeighborhoodAttention documents its projections to be; no rotation if origin is None."""
    qkv = x @ module.qkv.weight.T
    if module.qkv.bias is not None:
        qkv = qkv + module.qkv.bias
    heads, kv, dim = module.num_heads, module.num_kv_heads, module.head_dim
    q = qkv[..., : heads * dim].unflatten(-1, (heads, dim))
    k = qkv[..., heads * dim : (heads + kv) * dim].unflatten(-1, (kv, dim))
    v = qkv[..., (heads + kv) * dim :].unflatten(-1, (kv, dim))
    if module.q_norm is not None:
        q, k = rms_norm(q, module.q_norm.weight), rms_norm(k, module.k_norm.weight)
    if module.rotary is not None and origin is not None:
        theta, spacing = module.rotary.theta[0], module.rotary.spacing
        q, k = rotate(q, origin, theta, spacing), rotate(k, origin, theta, spacing)
    return q, k, v


def self_attention(
    module, x: Tensor, registers: Tensor | None = None, origin=None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """NeighborhoodAttention of x and registers, and all attention weights [B, H, N + R, N + R]."""
    rank = len(module.kernel_size)
    extent = x.shape[1:-1]
    needed = [k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padded = [max(a, b) for a, b in zip(extent, needed, strict=True)]
    grid = x.new_zeros(x.shape[0], *padded, x.shape[-1])
    inside = tuple(slice(0, length) for length in extent)
    grid[(slice(None), *inside)] = x
    window = (padded, module.kernel_size, module.stride, module.dilation, module.is_causal)
    n = torch.Size(padded).numel()
    real = torch.zeros(padded, dtype=torch.bool)
    real[inside] = True

    q, k, v = project(module, grid, origin or [0] * rank)
    q, k, v = (t.flatten(1, rank) for t in (q, k, v))
    count = 0 if registers is None else registers.shape[1]
    mask = torch.ones(n + count, n + count, dtype=torch.bool)
    mask[:n, :n] = window_mask(*window)
    mask[n:, :n] = real.flatten()
    bias = x.new_zeros(module.num_heads, n + count, n + count)
    if module.rpb is not None:
        bias[:, :n, :n] = window_bias(module.rpb, *window)
    if registers is not None:
        more = project(module, registers)
        q, k, v = (torch.cat([a, b], 1) for a, b in zip((q, k, v), more, strict=True))
    out, weights = attention(q, k, v, module.scale, mask, bias)
    out = out.flatten(-2) @ module.proj.weight.T + module.proj.bias
    grid_out = out[:, :n].unflatten(1, padded)[(slice(None), *inside)]
    return grid_out, None if registers is None else out[:, n:], weights
