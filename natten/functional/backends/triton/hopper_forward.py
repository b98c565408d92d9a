"""The forward kernel for Hopper, in Triton's Gluon dialect: warp-specialized, ping-pong.

Two groups of four warps own half of a query tile each and visit the same tiles of keys and values,
in two rings of places in shared memory. In `forward.py` all warps of a program meet at every step,
so that no product runs during the softmax; here nothing but the rings ties the halves, and one
multiplies while the other computes its softmax. Where many tiles are seen by the rows of one half
alone, the other skips them. There is no interpreter for Gluon: `forward.py` is this kernel's equal,
and what runs everywhere else.

Time goes down. Half 1 does the same as half 0, at its own pace, here half a step later:

    half 0, which also loads keys               half 1, which also loads values

    wait     keys[t].full                       softmax of step t-1
    compute  S = Q K(t)^T                       wait     values[t-1].full
    wait     for S, and O of step t-1           start    O += P V(t-1)
    arrive   empty[t]                           wait     empty[t-1], of both halves
    softmax of step t                           load     values[t-2+STAGES] in its place
    wait     values[t].full                     wait     keys[t].full
    start    O += P V(t), which runs on         compute  S = Q K(t)^T
    wait     empty[t], of both halves           wait     for S, and O of step t-1
    load     keys[t+STAGES] in its place        arrive   empty[t]
    wait     keys[t+1].full                     softmax of step t

Tile t is in place t % STAGES of its ring, and completes phase (t // STAGES) & 1 of its barriers.
One barrier says that both the keys of step t and the values of step t-1 have been read.

The running maximum keeps weights in the range of numbers. Lengths of queries and keys bound the
scores, and where a head's bound is small, its weights need no maximum: large problems are launched
twice, for heads with a small bound and without, and each head's programs of one launch end at once.
Both kinds of loops in one kernel would not keep their products in flight.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from natten.functional.backend import Inputs
from natten.functional.backends.triton import arguments, launcher, norms
from natten.functional.backends.triton.hopper import (
    Places,
    Ring,
    add_products,
    barriers,
    descriptor,
    divided,
    group_start,
    in_flight,
    kept,
    load_async,
    loaded_places,
    loaded_ring,
    multiply,
    row_corner,
    scaled,
    seen,
    sights,
    store_sums,
    wait,
    wait_for,
    zero_sums,
)
from natten.functional.backends.triton.launcher import Launch, describable
from natten.functional.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    ceil_div,
    column_steps,
    column_tile,
    decode,
    head_offset,
    in_sight,
    program_place,
    row_offsets,
    row_tile,
    sequence_of,
    unravel,
    valid_rows,
)
from natten.functional.backends.triton.tiles import FORWARD, Tiling, half
from natten.functional.problem import Problem

# Products of numbers of an entry's scores and weights, and keys of a window, from which on it pays
# to read all queries and keys once, and to start programs that end at once.
_LEAST_PRODUCTS, _LEAST_KEYS = 4e11, 4096
# The largest bound of scores, in base 2, that counts as small: weights are then between 2**-40 and
# 2**40, and their sums with values in the range of bfloat16.
_LARGEST_BOUND = gl.constexpr(40.0)
_PARTS = gl.constexpr(norms.PARTS)


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`; of what
    descriptors load, `arguments.group_steps`."""

    out: Any
    lse: Any
    query_mask: Any
    query: Any
    key: Any
    value: Any


class Data(NamedTuple):
    """Tensors that pointers lead to, their strides, and windows. None for what there is not."""

    out: Any
    lse: Any
    squares: Any
    cumulative_query: Any
    cumulative_key: Any
    sink: Any
    query_mask: Any
    strides: Any
    window: Any


class Sources(NamedTuple):
    """Descriptors: of halves of query tiles, of key tiles, of as many tokens in a row."""

    query: Any
    key: Any
    value: Any
    additional_key: Any
    additional_value: Any


class Shared(NamedTuple):
    """Shared memory: both halves' rows, barriers that say that they are there, a ring of keys, and
    places for values."""

    query: Any
    query_full: Any
    key_ring: Ring
    value_places: Places


@gluon.jit
def load_tile(
    t, steps, box, source, additional, at, sequence, start, feature, ring, V: gl.constexpr
):  # fmt: skip
    """Starts to load the t-th tile of keys or values, of a sequence or a dilation group that has
    its `group_start`."""
    KEY_TILE: gl.constexpr = V.KEY_TILE
    bar = ring.full.index(t % V.STAGES)
    buffer = ring.buffers.index(t % V.STAGES)
    mbarrier.expect(bar, source.block_type.nbytes)
    corner, _whole = column_tile(t, box, KEY_TILE, V)
    in_grid = True
    if additional is not None:
        in_grid = t < steps
        load_async(
            additional, [at.batch, 0, 0, (t - steps) * V.KEYS, feature], bar,
            buffer.reshape(additional.block_type.shape), pred=t >= steps,
        )  # fmt: skip
    load_async(
        source, [at.memory_batch, corner[0], corner[1], sequence + corner[2], start + feature], bar,
        buffer, pred=in_grid,
    )  # fmt: skip


@gluon.jit
def attend(
    HALF: gl.constexpr, sources, data, heads, num_additional, scale, shared,
    IS_BOUNDED: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Four warps with half of a query tile. The first half loads keys, the second values."""
    keys, values = shared.key_ring, shared.value_places
    # Of the keys of step t and the values of step t-1.
    empty = keys.empty
    KEY_TILE: gl.constexpr = V.KEY_TILE
    QUERY_TILE: gl.constexpr = V.QUERY_TILE
    STAGES: gl.constexpr = V.STAGES
    COLUMNS: gl.constexpr = V.KEYS
    ROWS: gl.constexpr = V.QUERIES // 2
    FEATURES: gl.constexpr = V.FEATURES
    VALUE_FEATURES: gl.constexpr = V.VALUE_FEATURES
    dtype: gl.constexpr = shared.query.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)

    at, rows, box, grid = row_tile(
        gl.program_id(0), HALF * ROWS + gl.arange(0, ROWS, row_layout), data, heads, False, V
    )
    head, batch, memory_batch = at
    sequence = grid.sequence
    query_start = group_start(grid.memory, data.strides.query, V.RANK)
    start = group_start(grid.memory, data.strides.value if HALF else data.strides.key, V.RANK)
    kv_head = head // V.HEADS_PER_KV
    steps = column_steps(box)
    all_steps = steps
    if sources.additional_key is not None:
        all_steps += ceil_div(num_additional, COLUMNS)

    row_first, _length = sequence_of(data.cumulative_query, batch, 2**30, V.VARLEN)
    x, y, z = row_corner(HALF, rows.corner, data.window.query_origins, row_first, QUERY_TILE)
    mbarrier.expect(shared.query_full.index(HALF), sources.query.block_type.nbytes)
    load_async(
        sources.query, [memory_batch, x, y, z, query_start + head * FEATURES],
        shared.query_full.index(HALF), shared.query.index(HALF),
    )  # fmt: skip
    for t in gl.static_range(STAGES):
        if t < all_steps:
            if HALF == 0:
                load_tile(
                    t, steps, box, sources.key, sources.additional_key, at, sequence,
                    start, kv_head * FEATURES, keys, V,
                )  # fmt: skip
            else:
                load_tile(
                    t, steps, box, sources.value, sources.additional_value, at, sequence,
                    start, kv_head * VALUE_FEATURES, values, V,
                )  # fmt: skip

    exists = rows.exists
    if data.query_mask is not None:
        valid = valid_rows(data.query_mask, at, rows, data.strides.query_mask, V)
        exists = (exists[0], exists[1], exists[2] & valid)
    own = sights(rows.begin, rows.width, exists, V.RANK)
    place = unravel(gl.arange(0, COLUMNS, column_layout), KEY_TILE)
    queries = shared.query.index(HALF).reshape([ROWS, V.BLOCK])
    maximum = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    if data.sink is not None:
        # As if it had been seen already.
        sink = gl.load(data.sink + head).to(gl.float32) * LOG2_E
        maximum = gl.full([ROWS], 0.0, gl.float32, row_layout) + sink
        total += gl.where(sink == float("-inf"), 0.0, 1.0)
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, scores_layout)
    sums = zero_sums(ROWS, VALUE_FEATURES)
    mbarrier.wait(shared.query_full.index(HALF), 0)
    for t in range(all_steps):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        corner, _whole = column_tile(t, box, KEY_TILE, V)
        needed, whole = seen(corner, own, KEY_TILE, V.RANK)
        if not V.SKIPS:
            needed = True
        elif sources.additional_key is not None:
            needed = needed | (t >= steps)
        if sources.additional_key is not None:
            whole = whole | (t >= steps)
        mbarrier.wait(keys.full.index(stage), phase)
        if needed:
            key_tile = keys.buffers.index(stage).reshape([COLUMNS, V.BLOCK])
            scores = multiply(queries, key_tile, zeros, FEATURES)
            scores, sums = wait_for(0, scores, sums)
            mbarrier.arrive(empty.index(stage))
            if V.NEGATE:
                scores = -scores
            if not whole:
                scores = gl.where(
                    in_sight(corner, place, rows.begin, rows.width, V.RANK), scores, float("-inf")
                )
            if sources.additional_key is not None:
                token = (t - steps) * COLUMNS + gl.arange(0, COLUMNS, column_layout)
                scores = gl.where((token < num_additional)[None, :], scores, float("-inf"))
            if IS_BOUNDED:
                weights = gl.exp2(scores * scale)
                total += gl.sum(weights, 1)
            else:
                new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
                # Keep -inf - -inf, of a row that has seen nothing yet, out of the exponent.
                pivot = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weights = gl.exp2(scores * scale - pivot[:, None])
                shrink = gl.exp2(maximum - pivot)
                total = total * shrink + gl.sum(weights, 1)
                maximum = new_maximum
                sums = scaled(sums, shrink)
            mbarrier.wait(values.full.index(stage), phase)
            value_tile = values.buffers.index(stage).reshape([COLUMNS, V.VALUE_BLOCK])
            sums = add_products(weights.to(dtype), value_tile, sums, VALUE_FEATURES)
        else:
            sums = wait(sums)
            mbarrier.arrive(empty.index(stage))
            # A buffer is filled again only after it has been full.
            mbarrier.wait(values.full.index(stage), phase)
            sums = in_flight(sums)
        if HALF == 0:
            if t + STAGES < all_steps:
                mbarrier.wait(empty.index(stage), phase)
                load_tile(
                    t + STAGES, steps, box, sources.key, sources.additional_key, at, sequence,
                    start, kv_head * FEATURES, keys, V,
                )  # fmt: skip
        else:
            # The product with the last tile of values runs until the next step.
            if (t > 0) & (t + STAGES - 1 < all_steps):
                mbarrier.wait(empty.index(stage), phase)
                load_tile(
                    t + STAGES - 1, steps, box, sources.value, sources.additional_value, at,
                    sequence, start, kv_head * VALUE_FEATURES, values, V,
                )  # fmt: skip
    sums = wait(sums)

    if data.query_mask is not None:
        sums = kept(sums, valid)
        total = gl.where(valid, total, 0.0)
        maximum = gl.where(valid, maximum, 0.0)
    # A query that sees nothing has output 0 and logsumexp -inf.
    sums = divided(sums, gl.where(total == 0.0, 1.0, total))
    offset, all_exist = row_offsets(rows.memory, rows.exists, data.strides.lse, 1, V.WIDE, V.RANK)
    offset += head_offset(memory_batch, head, data.strides.lse, 1, V.WIDE)
    lse = gl.log2(total)
    if not IS_BOUNDED:
        lse += maximum
    gl.store(data.lse + offset, lse * LN_2, mask=all_exist)
    store_sums(data.out, sums, memory_batch, head, rows, data.strides.out, VALUE_FEATURES, V)


@gluon.jit
def largest(squares, row):
    """Of the squares of one head's lengths."""
    part = gl.arange(0, _PARTS, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.max(gl.load(squares + (row * _PARTS + part)), 0)


@gluon.jit
def has_small_bound(data, heads, scale, V: gl.constexpr):
    """Whether the scores of a program's head have one."""
    window = data.window
    _tile, head, batch = program_place(
        gl.program_id(0), decode(window.tiles), window.dilations, heads, window.divisions, V, False
    )
    heads_kv = heads // V.HEADS_PER_KV
    first = batch * (heads + heads_kv)
    of_query = largest(data.squares, first + head)
    of_key = largest(data.squares, first + heads + head // V.HEADS_PER_KV)
    # Neither infinities nor NaN, of which none is less.
    return gl.sqrt(of_query) * gl.sqrt(of_key) * scale <= _LARGEST_BOUND


@gluon.jit(do_not_specialize=["heads", "num_additional"])
def hopper_forward_kernel(
    query, key, value, additional_key, additional_value, data, heads, num_additional, scale,
    IS_BOUNDED: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """The descriptors of `Sources`, and arguments as those of `forward_kernel`. With `squares`,
    programs are for heads with a small bound if `IS_BOUNDED`, else for the others."""
    # `and` would compute both sides.
    if data.squares is not None:  # noqa: SIM102
        if has_small_bound(data, heads, scale, V) != IS_BOUNDED:
            return
    STAGES: gl.constexpr = V.STAGES
    keys = loaded_ring(key, STAGES)
    sources = Sources(query, key, value, additional_key, additional_value)
    shared = Shared(
        gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout),
        barriers(2, 1),
        keys,
        loaded_places(value, STAGES),
    )
    gl.warp_specialize(
        [
            (attend, (0, sources, data, heads, num_additional, scale, shared, IS_BOUNDED, V)),
            (attend, (1, sources, data, heads, num_additional, scale, shared, IS_BOUNDED, V)),
        ],
        [4],
        [240],
    )


@lru_cache(maxsize=4096)
def _launch(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    strides: tuple[tuple[int, ...], ...],
    additional: tuple[tuple[int, ...], ...],
    out: tuple[int, ...],
    query_mask: tuple[int, ...] | None,
    is_bounded: bool,
) -> Launch:
    """``strides`` are those of query, key and value, ``additional`` those of additional ones,
    ``query_mask`` those of `arguments.mask_strides`."""
    common = arguments.common(problem, tiling, sequences, "tf32", strides, *additional, out)
    lse = arguments.statistic_strides(problem.query_shape, problem.heads, True)
    return Launch(
        hopper_forward_kernel,
        common.tiles,
        (
            common.heads, problem.num_additional, common.scales.scores, is_bounded, common.variant,
        ),
        group=Data,
        alone=5,
        grouped=(
            Strides(
                common.steps(out), lse, query_mask,
                *(arguments.group_steps(problem, stride) for stride in strides),
            ),
            common.window._replace(bias_paddings=None),
        ),
        options=common.options,
        tiles=(tiling, FORWARD),
    )  # fmt: skip


def _pays_bound(problem: Problem) -> bool:
    """Whether the running maximum takes longer than to look for what makes it superfluous."""
    width, keys = problem.head_dim + problem.head_dim_v, prod(problem.kernel_size)
    scores = problem.heads * problem.num_queries * keys
    return (
        # float16 has no range for weights without a maximum.
        problem.dtype == torch.bfloat16
        and not (problem.varlen or problem.num_additional or problem.has_sink)
        and scores * width >= _LEAST_PRODUCTS
        and keys >= _LEAST_KEYS
    )


def forward(
    problem: Problem, tiling: Tiling, inputs: Inputs, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out, written into a view if one is given, and logsumexp."""
    query, key, value = (describable(tensor, problem.dilation) for tensor in inputs[:3])
    cumulative_query = launcher.adjacent(inputs.cumulative_seqlen_q)
    if out is None:
        out = launcher.allocate(problem, problem.output_shape, query.dtype, query.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=query.device)
    if problem.varlen:
        lse.fill_(-torch.inf)
    context = [
        None if tensor is None else describable(tensor)
        for tensor in (inputs.additional_keys, inputs.additional_values)
    ]
    layout = (
        problem, tiling, launcher.sequences(problem, cumulative_query),
        (query.stride(), key.stride(), value.stride()),
        tuple([tensor.stride() for tensor in context if tensor is not None]), out.stride(),
        arguments.mask_strides(inputs.query_mask),
    )  # fmt: skip
    launches, squares = [_launch(*layout, False)], None
    if _pays_bound(problem):
        launches.append(_launch(*layout, True))
        squares = norms.longest(problem, query, key)
    variant = launches[0].variant
    tokens = (1, 1, variant.KEYS)
    launcher.run_all(
        launches,
        launcher.descriptor(query, half(variant.QUERY_TILE), descriptor, problem.dilation),
        launcher.descriptor(key, variant.KEY_TILE, descriptor, problem.dilation),
        launcher.descriptor(value, variant.KEY_TILE, descriptor, problem.dilation),
        *(
            None if tensor is None else launcher.descriptor(tensor, tokens, descriptor)
            for tensor in context
        ),
        out, lse, squares, cumulative_query, launcher.adjacent(inputs.cumulative_seqlen_kv),
        launcher.adjacent(inputs.sink), arguments.as_bytes(inputs.query_mask),
    )  # fmt: skip
    return out, lse
