"""How long queries and keys are, which bounds their scores."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten.functional.backends.triton.arguments import pad, strides_of, unspecialized
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import ceil_div, decode
from natten.functional.backends.triton.tiles import block
from natten.functional.problem import Problem

# Programs that share the tokens of a head, each with a number of its own.
PARTS = 64
# Elements that all strides of tensors that descriptors can view are multiples of.
_UNIT = 8
_ROWS = 32


class Tokens(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, and extents of the axes."""

    strides: Any
    extents: Any


class Data(NamedTuple):
    """Tensors and where their tokens are."""

    query: Any
    key: Any
    squares: Any
    of_query: Tokens
    of_key: Tokens


@triton.jit
def largest_square(
    tensor, tokens, batch, head, part,
    PARTS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest sum of squares among a part of one head's tokens."""
    batch_stride, stride_x, stride_y, stride_z, head_stride = decode(tokens.strides)
    extent_x, extent_y, extent_z = decode(tokens.extents)
    number = extent_x * extent_y * extent_z
    each = ceil_div(number, PARTS)
    first = part * each
    last = tl.minimum(first + each, number)
    place = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    feature = tl.arange(0, BLOCK)[None, :]
    largest = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        row = token // extent_z
        offset = place + (token % extent_z).to(tl.int64) * stride_z
        offset += (row % extent_y).to(tl.int64) * stride_y
        offset += (row // extent_y).to(tl.int64) * stride_x
        loaded = tl.load(
            tensor + (offset * UNIT)[:, None] + feature,
            mask=(token < last)[:, None] & (feature < FEATURES), other=0.0,
        ).to(tl.float32)  # fmt: skip
        largest = tl.maximum(largest, tl.sum(loaded * loaded, 1))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["heads", "heads_kv"])
def longest_kernel(
    data, heads, heads_kv,
    PARTS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts of all heads of queries, and behind them of keys, of each batch entry."""
    program = tl.program_id(0)
    part = program % PARTS
    head = program // PARTS % (heads + heads_kv)
    batch = program // PARTS // (heads + heads_kv)
    if head < heads:
        largest = largest_square(
            data.query, data.of_query, batch, head, part, PARTS, UNIT, ROWS, FEATURES, BLOCK
        )
    else:
        largest = largest_square(
            data.key, data.of_key, batch, head - heads, part, PARTS, UNIT, ROWS, FEATURES, BLOCK
        )
    tl.store(data.squares + program, largest)


def _tokens(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tokens:
    steps = tuple([step // _UNIT for step in strides_of(stride)])
    return Tokens(unspecialized(steps), unspecialized(pad(shape, 1)))


@lru_cache(maxsize=4096)
def _launch(problem: Problem, query: tuple[int, ...], key: tuple[int, ...]) -> Launch:
    return Launch(
        longest_kernel,
        problem.batch * (problem.heads + problem.heads_kv) * PARTS,
        (
            problem.heads, problem.heads_kv, PARTS, _UNIT, _ROWS, problem.head_dim,
            block(problem.head_dim),
        ),
        group=Data,
        grouped=(_tokens(problem.query_shape, query), _tokens(problem.key_shape, key)),
    )  # fmt: skip


def longest(problem: Problem, query: Tensor, key: Tensor) -> Tensor:
    """Squares of lengths of which the largest of each head's ``PARTS`` is that of its longest
    query, and behind these of its longest key: ``[batch, heads + heads_kv, PARTS]``, float32.

    Query and key are such that descriptors can view them.
    """
    shape = (problem.batch, problem.heads + problem.heads_kv, PARTS)
    squares = torch.empty(shape, dtype=torch.float32, device=query.device)
    _launch(problem, query.stride(), key.stride()).run(query, key, squares)
    return squares
