"""Bitwise: packed sequences against the same sequences alone, batch entries against themselves.

With the same tiles, what is computed of a sequence does not depend on what is computed with it.
Plain functions, which tests call on the CPU, in Triton's interpreter, and on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import natten
from natten.functional import attention, neighborhood_attention_generic

NAMES = ("out", "logsumexp", "dq", "dk", "dv")


def _gradients(
    call: Any, inputs: Sequence[Tensor], grad_out: Tensor, grad_lse: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = call(*leaves)
    # A row that sees nothing has a constant logsumexp.
    seen = lse.masked_fill(lse.isinf(), 0.0)
    loss = (out.float() * grad_out).sum() + (seen * grad_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def _assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    different = []
    for name, a, b in zip(NAMES, got, wanted):
        if not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
            share = float((a != b).double().mean())
            different.append(f"{name} in {share:.2%} of numbers, by {float(difference.max()):.2g}")
    assert not different, f"{what}: {'; '.join(different)}"


def check_packed_sequences(
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    lengths: Sequence[int] = (37, 5, 64, 0, 90),
    lengths_kv: Sequence[int] | None = None,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    is_causal: bool = False,
    deterministic: bool = True,
    **knobs: Any,
) -> None:
    """Packed sequences have the bits of the same sequences one at a time, with the same tiles.

    ``knobs`` are those of :func:`natten.attention`. Gradients of the query are compared in
    deterministic mode only.
    """
    lengths_kv = lengths if lengths_kv is None else lengths_kv
    generator = torch.Generator().manual_seed(0)

    def randn(tokens: int, heads: int, *features: int) -> Tensor:
        made = torch.randn(1, tokens, heads, *features, generator=generator)
        return made.to(device=device, dtype=dtype)

    queries, keys = sum(lengths), sum(lengths_kv)
    inputs = (
        randn(queries, heads[0], head_dim),
        randn(keys, heads[1], head_dim),
        randn(keys, heads[1], head_dim),
    )
    grad_out, grad_lse = (
        randn(queries, heads[0], head_dim).float(),
        randn(queries, heads[0]).float(),
    )
    common = dict(backend=f"{backend}-fmha", is_causal=is_causal, return_lse=True, **knobs)

    def packed(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return attention(
            *leaves, **common,
            seqlens_Q=torch.tensor(lengths, dtype=torch.int32, device=device),
            seqlens_KV=torch.tensor(lengths_kv, dtype=torch.int32, device=device),
        )  # fmt: skip

    def alone(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*leaves, **common)

    compared = (0, 1, 2, 3, 4) if deterministic else (0, 1, 3, 4)
    with natten.use_deterministic_algorithms(deterministic):
        together = _gradients(packed, inputs, grad_out, grad_lse)
        first = first_kv = 0
        for number, (n, n_kv) in enumerate(zip(lengths, lengths_kv)):
            rows, columns = slice(first, first + n), slice(first_kv, first_kv + n_kv)
            first, first_kv = first + n, first_kv + n_kv
            if not n or not n_kv:
                continue
            places = (rows, rows, rows, columns, columns)
            one = (inputs[0][:, rows], inputs[1][:, columns], inputs[2][:, columns])
            separate = _gradients(alone, one, grad_out[:, rows], grad_lse[:, rows])
            part = [tensor[:, place] for tensor, place in zip(together, places)]
            what = f"{backend} {dtype} sequence {number} of {tuple(lengths)}, {knobs}"
            _assert_same([part[i] for i in compared], [separate[i] for i in compared], what)


def check_batch_entries(
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    tokens: tuple[int, ...] = (9, 12),
    kernel_size: tuple[int, ...] = (5, 7),
    batch: int = 3,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    additional: int = 0,
    rpb: bool = False,
    **knobs: Any,
) -> None:
    """A batch entry has the same bits whatever the others hold, and as a batch of its own.

    ``knobs`` are those of :func:`natten.na2d`, with tiles. In deterministic mode.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    def entries(number: int) -> list[Tensor]:
        shape = (number, *tokens)
        made = [
            randn(*shape, heads[0], head_dim),
            *(randn(*shape, heads[1], head_dim) for _ in "kv"),
        ]
        if additional:
            made += [randn(number, additional, heads[1], head_dim) for _ in "kv"]
        return [*made, randn(*shape, heads[0], head_dim).float(), randn(*shape, heads[0]).float()]

    table = randn(heads[0], *(2 * k - 1 for k in kernel_size)) if rpb else None

    def attend(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        more_keys, more_values = more or (None, None)
        return neighborhood_attention_generic(
            query, key, value, kernel_size, backend=f"{backend}-fna", return_lse=True, rpb=table,
            additional_keys=more_keys, additional_values=more_values, **knobs,
        )  # fmt: skip

    some = entries(batch)
    others = [torch.cat([t[:1], 3 * o]) for t, o in zip(some, entries(batch - 1))]
    with natten.use_deterministic_algorithms():
        results = []
        for tensors in (some, others, [t[:1] for t in some]):
            *inputs, grad_out, grad_lse = tensors
            found = _gradients(attend, inputs, grad_out, grad_lse)
            results.append([t[:1] for t in found])
    what = f"{backend} {dtype}, {knobs}"
    _assert_same(results[1], results[0], f"{what}, with other entries")
    _assert_same(results[2], results[0], f"{what}, alone")


def tiles_1d(query: int, key: int, backward_query: int, backward_key: int) -> dict[str, Any]:
    """The knobs of :func:`natten.attention` that fix all tiles."""
    return {
        "q_tile_size": query, "kv_tile_size": key,
        "backward_q_tile_size": backward_query, "backward_kv_tile_size": backward_key,
    }  # fmt: skip


def tiles(
    query: tuple[int, ...],
    key: tuple[int, ...],
    backward_query: tuple[int, ...],
    backward_key: tuple[int, ...],
) -> dict[str, Any]:
    """The knobs of :func:`natten.na2d` that fix all tiles."""
    return {
        "q_tile_shape": query, "kv_tile_shape": key,
        "backward_q_tile_shape": backward_query, "backward_kv_tile_shape": backward_key,
    }  # fmt: skip
