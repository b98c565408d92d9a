"""torch's FlexAttention, with the window as its mask: runs wherever it does.

The forward pass calls FlexAttention on row-major flattened tokens, additional keys appended. Where
tiles are named, tokens of several axes are reordered first, so that every block is a tile of the
grid; that pays for large windows, and where FlexAttention is compiled. Its BlockMask is built a row
of blocks at a time, so that no N x N mask exists; without ``torch_compile=True`` FlexAttention
itself still holds all N x N scores. The backward pass runs FlexAttention again under autograd.

FlexAttention: https://arxiv.org/abs/2412.05496
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten._internals import AUTOGRAD
from natten.context import is_flex_compile_allowed, is_flex_compile_backprop_allowed
from natten.functional.backend import Backend, Gradients, Inputs, Results
from natten.functional.problem import Config, Problem, Unavailable
from natten.functional.sink import join
from natten.window import absent, cleared, distance, mask

_BLOCK = 128
# (query, key) tiles by the number of axes, of 128 or 64 tokens. The first of one axis is what there
# is without a choice; of more axes, blocks are rows of flattened tokens then.
_TILES: dict[int, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    1: (((128,), (128,)), ((64,), (128,)), ((128,), (64,)), ((64,), (64,))),
    2: (
        ((8, 16), (8, 16)),
        ((8, 8), (8, 16)),
        ((8, 16), (8, 8)),
        ((8, 8), (8, 8)),
        ((4, 16), (4, 16)),
        ((4, 16), (8, 8)),
    ),
    3: (
        ((4, 4, 8), (4, 4, 8)),
        ((4, 4, 4), (4, 4, 8)),
        ((4, 4, 8), (4, 4, 4)),
        ((4, 4, 4), (4, 4, 4)),
        ((2, 4, 8), (2, 4, 8)),
        ((2, 4, 8), (4, 4, 4)),
    ),
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What a program with many different windows may compile: each is a program of its own.
_MAX_PROGRAMS = 256


def _coordinates(index: Tensor, shape: tuple[int, ...], origin: tuple[int, ...]) -> list[Tensor]:
    """Global coordinates of row-major flattened tokens of a box."""
    coordinates = []
    for extent, start in zip(reversed(shape), reversed(origin), strict=True):
        coordinates.append(index % extent + start)
        index = index // extent
    return coordinates[::-1]


class _Order(NamedTuple):
    """Tokens of a box tile by tile, so that those of each tile follow one another.

    Tiles that reach out of the box are filled up.
    """

    token: Tensor  # [places], the row-major index of the token there; 0 for what fills up
    is_real: Tensor  # [places]
    place: Tensor  # [tokens]


@lru_cache(maxsize=64)
def _order(shape: tuple[int, ...], tile: tuple[int, ...], device: torch.device) -> _Order:
    rank = len(shape)
    token = torch.zeros((1,) * 2 * rank, dtype=torch.int64, device=device)
    is_real = torch.ones((1,) * 2 * rank, dtype=torch.bool, device=device)
    for axis, (extent, size) in enumerate(zip(shape, tile, strict=True)):
        # [number of the tile, place in it], each along its own dimension.
        view = [1] * 2 * rank
        view[axis], view[axis + rank] = -(-extent // size), size
        index = torch.arange(view[axis] * size, device=device).view(view)
        token = token * extent + index
        is_real = is_real & (index < extent)
    token, is_real = token.masked_fill(~is_real, 0).flatten(), is_real.flatten()
    place = torch.empty(prod(shape), dtype=torch.int64, device=device)
    place[token[is_real]] = is_real.nonzero().flatten()
    return _Order(token, is_real, place)


@lru_cache(maxsize=64)
def _orders(
    problem: Problem, tiles: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[_Order, _Order]:
    """The orders of queries and of keys, with additional keys at the end."""
    query = _order(problem.query_shape, tiles[0], problem.device)
    key = _order(problem.key_shape, tiles[1], problem.device)
    more = torch.arange(problem.num_additional, device=problem.device)
    return query, _Order(
        torch.cat([key.token, more + problem.num_keys]),
        torch.cat([key.is_real, torch.ones_like(more, dtype=torch.bool)]),
        key.place,
    )


def _reordered(
    visible: Callable[[Tensor, Tensor], Tensor], orders: tuple[_Order, _Order]
) -> Callable[[Tensor, Tensor], Tensor]:
    (query, query_is_real, _), (key, key_is_real, _) = orders

    def reordered(q: Tensor, kv: Tensor) -> Tensor:
        return visible(query[q], key[kv]) & query_is_real[q] & key_is_real[kv]

    return reordered


def _visible(
    problem: Problem, sequences: tuple[Tensor, Tensor, Tensor, Tensor] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The mask over flattened query and key indices, additional keys last."""
    own, axes = problem.num_keys, problem.axes

    def visible(q: Tensor, kv: Tensor) -> Tensor:
        if sequences is not None:
            q_sequence, q_start, kv_sequence, kv_start = sequences
            seen = (q_sequence[q] == kv_sequence[kv]) & (q_sequence[q] >= 0)
            if problem.is_causal[0]:
                seen = seen & (kv - kv_start[kv] <= q - q_start[q])
            return seen
        if not own:
            return (q >= 0) & (kv >= 0)
        inside = kv.clamp(max=own - 1) if problem.num_additional else kv
        queries = _coordinates(q, problem.query_shape, problem.query_origin)
        keys = _coordinates(inside, problem.key_shape, problem.key_origin)
        seen = mask(queries, keys, axes)
        return seen | (kv >= own) if problem.num_additional else seen

    return visible


def _sequence_of_tokens(cumulative: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed token (-1 behind the last one), and where that starts."""
    index = torch.arange(tokens, device=cumulative.device)
    number = torch.searchsorted(cumulative[1:].long(), index, right=True)
    beyond = number >= cumulative.shape[0] - 1
    start = cumulative.long()[number.clamp(max=cumulative.shape[0] - 2)]
    return number.masked_fill(beyond, -1), start


def _of_entries(
    visible: Callable[[Tensor, Tensor], Tensor],
    problem: Problem,
    inputs: Inputs,
    orders: tuple[_Order, _Order] | None,
) -> Callable[..., Tensor]:
    """FlexAttention's mask where batch entries differ: in valid tokens, and in how many of the
    additional keys they have."""
    own = problem.num_keys
    lengths = inputs.additional_lengths
    key_mask, query_mask = (
        None if mask is None else mask.flatten(1).contiguous()
        for mask in (inputs.key_mask, inputs.query_mask)
    )

    def masked(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = visible(q, kv)
        if orders is not None:
            q, kv = orders[0].token[q], orders[1].token[kv]
        if lengths is not None:
            # Below zero they would take away keys of the grid.
            seen = seen & (kv < own + lengths[b].long().clamp(min=0))
        if key_mask is not None and own:
            seen = seen & (key_mask[b, kv.clamp(max=own - 1)] | (kv >= own))
        return seen if query_mask is None else seen & query_mask[b, q]

    return masked


def _without_absent(problem: Problem, inputs: Inputs) -> Inputs:
    """The inputs with zeros for tokens that do not exist or are not valid."""
    changes: dict[str, Tensor] = {}

    def clear(hidden: Tensor, *names: str) -> None:
        for name in names:
            changes[name] = cleared(getattr(inputs, name), hidden)

    if inputs.additional_lengths is not None:
        hidden = absent(inputs.additional_lengths, problem.num_additional)
        clear(hidden, "additional_keys", "additional_values")
    if inputs.key_mask is not None:
        clear(~inputs.key_mask, "key", "value")
    if inputs.query_mask is not None:
        clear(~inputs.query_mask, "query")
    return inputs._replace(**changes)


def _block_mask(
    problem: Problem,
    visible: Callable[[Tensor, Tensor], Tensor],
    blocks: tuple[int, int],
    orders: tuple[_Order, _Order] | None = None,
) -> Any:
    """FlexAttention's BlockMask, from one row of blocks at a time."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = problem.num_queries, problem.num_keys + problem.num_additional
    if orders is not None:
        queries, keys = (len(order.token) for order in orders)
    q_block, kv_block = blocks
    kv = torch.arange(keys, device=problem.device)
    padding = -keys % kv_block
    some, every = [], []
    for first in range(0, queries, q_block):
        q = torch.arange(first, min(first + q_block, queries), device=problem.device)
        seen = visible(q[:, None], kv[None, :])
        any_seen = torch.nn.functional.pad(seen.any(0), (0, padding))
        # Blocks that the border cuts count as partial.
        all_seen = torch.nn.functional.pad(seen.all(0), (0, padding))
        full = all_seen.view(-1, kv_block).all(-1) & (len(q) == q_block)
        # Who sees additional keys in a block, or is valid in it, is not known here.
        if problem.has_lengths:
            full[(keys - problem.num_additional) // kv_block :] = False
        if problem.has_key_mask or problem.has_query_mask:
            full = torch.zeros_like(full)
        every.append(full)
        some.append(any_seen.view(-1, kv_block).any(-1) & ~full)

    def ordered(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        table = torch.stack(rows)[None, None].to(torch.int32)
        indices = table.argsort(dim=-1, descending=True, stable=True)
        return table.sum(-1, dtype=torch.int32), indices.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *ordered(some),
        *ordered(every),
        BLOCK_SIZE=blocks,
        mask_mod=lambda b, h, q, kv: visible(q, kv),
        seq_lengths=(queries, keys),
    )


@lru_cache(maxsize=64)
def _cached_block_mask(
    problem: Problem,
    blocks: tuple[int, int],
    tiles: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> Any:
    visible = _visible(problem, None)
    if tiles is None:
        return _block_mask(problem, visible, blocks)
    orders = _orders(problem, tiles)
    return _block_mask(problem, _reordered(visible, orders), blocks, orders)


def _geometry(problem: Problem) -> Problem:
    """The part of a problem that decides its mask."""
    return replace(
        problem,
        batch=1,
        heads=1,
        heads_kv=1,
        head_dim=1,
        head_dim_v=1,
        scale=1.0,
        has_rpb=False,
        softcap=0.0,
        has_sink=False,
        dtype=torch.float32,
        requires_grad=False,
    )


ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _score_mod(
    problem: Problem, rpb: Tensor | None, orders: tuple[_Order, _Order] | None
) -> ScoreMod | None:
    """What caps scores and adds the bias, None if there is nothing to do."""
    own, axes, softcap = problem.num_keys, problem.axes, problem.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    if rpb is None or not own:
        return capped if softcap else None

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if softcap:
            score = capped(score, b, h, q, kv)
        if orders is not None:
            q, kv = orders[0].token[q], orders[1].token[kv]
        inside = kv.clamp(max=own - 1)
        queries = _coordinates(q, problem.query_shape, problem.query_origin)
        keys = _coordinates(inside, problem.key_shape, problem.key_origin)
        index = [
            (distance(query, key, axis) + axis.kernel_size - 1).clamp(0, 2 * axis.kernel_size - 2)
            for query, key, axis in zip(queries, keys, axes, strict=True)
        ]
        bias = rpb[(h, *index)].to(score.dtype)
        return score + torch.where(kv < own, bias, 0.0) if problem.num_additional else score + bias

    return biased


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@contextmanager
def _autograd_allowed() -> Iterator[None]:
    """Undo what an operator's kernel runs under, so that FlexAttention may use autograd itself."""
    # What hides autograd, and nothing else: the excluded keys also keep autocast off.
    exclude = torch._C._dispatch_tls_local_exclude_set() - AUTOGRAD
    include = torch._C._dispatch_tls_local_include_set()
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude),
        # FlexAttention is traced even without torch.compile, and scores take no symbolic numbers.
        torch._dynamo.config.patch(recompile_limit=_MAX_PROGRAMS, specialize_float=True),
        warnings.catch_warnings(),
    ):
        # That it is slow without torch.compile is documented where it is asked for.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def _attend(
    problem: Problem,
    config: Config,
    inputs: Inputs,
    weigh: Callable[..., ScoreMod] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, in the layouts of the operator.

    ``weigh`` makes other scores of those that there would be.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    inputs = _without_absent(problem, inputs)
    query, key, value, rpb, additional_keys, additional_values, sink, *_ = inputs
    cumulative = (inputs.cumulative_seqlen_q, inputs.cumulative_seqlen_kv)
    q, k, v = (t.flatten(1, -3) for t in (query, key, value))
    tiles: tuple[tuple[int, ...], tuple[int, ...]] = ((_BLOCK,), (_BLOCK,))
    if config.q_tile_shape is not None and config.kv_tile_shape is not None:
        tiles = config.q_tile_shape, config.kv_tile_shape
    blocks = (prod(tiles[0]), prod(tiles[1]))
    geometry, orders = _geometry(problem), None
    if len(tiles[0]) > 1:
        orders = _orders(geometry, tiles)
        q = q.index_select(1, orders[0].token)
        own = orders[1].token[: len(orders[1].token) - problem.num_additional]
        k, v = k.index_select(1, own), v.index_select(1, own)
    if additional_keys is not None and additional_values is not None:
        k, v = torch.cat([k, additional_keys], dim=1), torch.cat([v, additional_values], dim=1)
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    if cumulative[0] is not None and cumulative[1] is not None:
        sequences = (
            *_sequence_of_tokens(cumulative[0], problem.num_queries),
            *_sequence_of_tokens(cumulative[1], problem.num_keys),
        )
        block_mask = _block_mask(problem, _visible(problem, sequences), blocks)
    else:
        block_mask = _cached_block_mask(geometry, blocks, None if orders is None else tiles)
        if problem.has_lengths or problem.has_key_mask or problem.has_query_mask:
            visible = _visible(problem, None)
            block_mask = copy(block_mask)
            block_mask.mask_mod = _of_entries(
                visible if orders is None else _reordered(visible, orders), problem, inputs, orders
            )
    attend: Any = _compiled() if config.torch_compile else flex_attention
    score_mod = _score_mod(problem, rpb, orders)
    # Programs of torch 2.10 read numbers out of tensors that they make on the default device.
    is_elsewhere = torch.get_default_device() not in (torch.device("cpu"), problem.device)
    with torch.device(problem.device) if is_elsewhere else nullcontext():
        out, aux = attend(
            q,
            k,
            v,
            score_mod=score_mod if weigh is None else weigh(score_mod, orders),
            block_mask=block_mask,
            scale=problem.scale,
            enable_gqa=problem.heads != problem.heads_kv,
            kernel_options=_kernel_options(blocks),
            return_aux=AuxRequest(lse=True),
        )
    tokens = problem.query_shape
    lse = aux.lse.to(problem.accumulation_dtype)
    if orders is not None:
        out, lse = (t.index_select(2, orders[0].place) for t in (out, lse))
    out, lse = out.transpose(1, 2).unflatten(1, tokens), lse.transpose(1, 2).unflatten(1, tokens)
    if sink is not None and weigh is None:
        of_no_query = None if inputs.query_mask is None else ~inputs.query_mask[..., None]
        if cumulative[0] is not None:
            of_no_query = (sequences[0] < 0)[None, :, None]
        out, lse = join(out, lse, sink)
        lse = lse if of_no_query is None else lse.masked_fill(of_no_query, -torch.inf)
    return out, lse


def _kernel_options(blocks: tuple[int, int]) -> Any:
    """None for FlexAttention's own, which fit its own block size."""
    if blocks == (_BLOCK, _BLOCK):
        return None
    # What a kernel works on at once must divide the blocks. Its other kernel, for few queries, has
    # blocks of its own.
    sizes = {"BLOCK_M": min(blocks[0], 64), "BLOCK_N": min(blocks[1], 64)}
    return {**sizes, "FORCE_USE_FLEX_ATTENTION": True}


def _finite(*tensors: Tensor | None) -> bool:
    """Whether all numbers are finite. Waits for a GPU, which graph capture does not allow."""
    given = [t for t in tensors if t is not None and t.numel()]
    if given and given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return all(bool(t.isfinite().all()) for t in given)


def _with_infinite_values(
    problem: Problem, config: Config, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """As `_attend`, where only those see a value that is not finite whose window holds it.

    FlexAttention multiplies masked values by zero, and zero times NaN is NaN: it gets finite values
    here, and is asked apart who sees the others, with a weight above zero or of zero.
    """

    def run(change: Callable[[Tensor], Tensor], weigh: Any = None) -> tuple[Tensor, Tensor]:
        changed = inputs._replace(value=change(inputs.value).to(problem.dtype))
        if inputs.additional_values is not None:
            more = change(inputs.additional_values).to(problem.dtype)
            changed = changed._replace(additional_values=more)
        return _attend(problem, config, changed, weigh)

    out, lse = run(lambda v: v.masked_fill(~v.isfinite(), 0.0))
    kept = lse.flatten(1, -2).transpose(1, 2).contiguous()

    def equal_weights(above_zero: bool) -> Callable[..., ScoreMod]:
        def weigh(score_mod: ScoreMod | None, orders: tuple[_Order, _Order] | None) -> ScoreMod:
            def only(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
                full = score if score_mod is None else score_mod(score, b, h, q, kv)
                row = q if orders is None else orders[0].token[q]
                weight = (full - kept[b, h, row]).exp()
                return torch.where((weight > 0) if above_zero else (weight == 0), 0.0, -torch.inf)

            return only

        return weigh

    def sees(number: float, above_zero: bool) -> Tensor:
        is_it = torch.isnan if number != number else (lambda v: v == number)
        return run(is_it, equal_weights(above_zero))[0] > 0

    numbers = (torch.nan, torch.inf, -torch.inf)
    is_nan, is_inf, is_minus_inf = (sees(number, True) for number in numbers)
    for number in numbers:
        is_nan |= sees(number, False)
    out = out.masked_fill(is_inf, torch.inf).masked_fill(is_minus_inf, -torch.inf)
    return out.masked_fill(is_nan | (is_inf & is_minus_inf), torch.nan), lse


class Flex(Backend):
    """The FlexAttention backend."""

    name = "flex"

    def refusal(self, problem: Problem, config: Config) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"FlexAttention does not take {problem.dtype}"
        if problem.requires_grad and problem.device.type != "cuda":
            return f"FlexAttention has no backward pass on {problem.device.type}"
        if not config.torch_compile:
            return None
        if not is_flex_compile_allowed():
            return Unavailable(
                "torch_compile=True compiles FlexAttention, which has to be allowed first: "
                "natten.allow_flex_compile()"
            )
        if problem.requires_grad and not is_flex_compile_backprop_allowed():
            return Unavailable(
                "torch_compile=True compiles FlexAttention's backward pass, which has to be "
                "allowed first: natten.allow_flex_compile_backprop()"
            )
        if problem.device.type == "cpu":
            return "compiled FlexAttention does not return the logsumexp on the CPU"
        if problem.dtype == torch.float64:
            return "compiled FlexAttention does not take torch.float64"
        dims = (problem.head_dim, problem.head_dim_v)
        if problem.device.type == "cuda" and any(d < 16 or d & (d - 1) for d in dims):
            return f"compiled FlexAttention takes head_dim 16, 32, 64, ..., and these are {dims}"
        return None

    def auto_refusal(self, problem: Problem, config: Config) -> str | None:
        if config.torch_compile:
            return None
        return "without torch_compile=True it holds all scores at once; name it to use it so"

    def configs(self, problem: Problem) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return list(_TILES[problem.rank])

    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with _autograd_allowed(), torch.no_grad():
            plain = Inputs._make([None if t is None else t.detach() for t in inputs])
            attend = (
                _attend if _finite(plain.value, plain.additional_values) else _with_infinite_values
            )
            out, lse = attend(problem, config, plain)
            # Uncompiled, it says inf where the output is NaN.
            return out, lse.masked_fill(lse == torch.inf, torch.nan)

    def backward(
        self,
        problem: Problem,
        config: Config,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> Gradients:
        grad_out, grad_lse = results.grad_out, results.grad_lse
        if inputs.query_mask is not None:
            grad_out = cleared(grad_out, ~inputs.query_mask)
            if grad_lse is not None:
                grad_lse = grad_lse.masked_fill(~inputs.query_mask[..., None], 0.0)
        # Tiles are named for the forward pass. Of the backward pass not all compile: it has none.
        config = replace(config, q_tile_shape=None, kv_tile_shape=None)
        with _autograd_allowed(), torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(inputs.differentiable, needs, strict=True)
            ]
            again = _attend(problem, config, Inputs._make([*leaves, *inputs[6:]]))
            wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
            gradients = iter(
                torch.autograd.grad(
                    again if grad_lse is not None else again[:1],
                    wanted,
                    (grad_out, grad_lse) if grad_lse is not None else (grad_out,),
                    allow_unused=True,
                )
            )
        found = [next(gradients) if need else None for need in needs]
        return found[0], found[1], found[2], found[3], found[4], found[5]


FLEX = Flex()
