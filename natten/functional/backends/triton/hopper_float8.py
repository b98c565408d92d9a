"""The forward kernel for Hopper in 8 bits (e4m3), in Gluon: that of `hopper_forward.py` but for the
values, which it turns around.

Products of 8-bit numbers sum over what is adjacent in memory: features of queries and keys, but
keys of the weights and values, of which memory has the features adjacent. So the halves of the
program each turn half the features of a tile of values around, through registers, while their own
product of queries and keys runs.

Weights are in registers, and a thread's keys are not those that it has to give to the next product.
What has an order is only their sum: the turned values have the keys in the order in which the
threads hold the weights, and no weight moves. With `key` and `position` in binary,

    key       6 5 4 3 2 1 0     a thread holds keys that differ in bits 0 and 3 to 6,
    position  6 5 0 2 1 4 3     and gives positions that differ in bits 0, 1 and 4 to 6

Tensor cores keep no more than about 14 bits of sums of 8-bit products, and cut off the rest: over
thousands of keys, that would be a larger error than what is rounded to 8 bits. So the product of
each tile of values starts at zero, and is added up in float32. It takes registers that the next
product of queries and keys needs: a half has one product at a time, and computes its softmax while
the other half has its products.

Time goes down, half a step for each half in turn:

    half 0                                      half 1

    start    S = Q K(t)^T                       softmax of step t-1
    load     keys[t-1+STAGES] for keys[t-1]
    turn     half of V(t)
    arrive   turned[t]                          wait     half 0's turned[t]
    wait     for S                              compute  O += P V(t-1)
    arrive   keys[t].empty                      start    S = Q K(t)^T
    softmax of step t                           load     values[t-1+STAGES] for values[t-1]
                                                turn     the other half of V(t)
    wait     half 1's turned[t]                 arrive   turned[t]
    compute  O += P V(t)                        wait     for S
                                                arrive   keys[t].empty
    start    S = Q K(t+1)^T                     softmax of step t

A product waits for what it reads. Whoever loads in the place of tile t-1, or turns V(t) in that of
V(t-2), waits for keys[t-1].empty: by then both halves have turned V(t-1), and multiplied with
V(t-2). Half 1 could start O += P V(t-1) as soon as V(t-1) is turned. It waits for V(t), by when
half 0's products are all started: if products of both ran at once, so would both softmaxes, and the
tensor cores would stand still meanwhile.

Weights go up to 256: what is below a two hundred thousandth of the largest is lost, and not what is
below a thousandth.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from natten.functional.backend import Inputs
from natten.functional.backends.triton import arguments, launcher
from natten.functional.backends.triton.hopper import (
    Ring,
    as_numbers,
    barriers,
    descriptor,
    load_async,
    loaded_ring,
    multiply,
    row_corner,
    scaled,
    seen,
    sights,
    spread,
    store_sums,
)
from natten.functional.backends.triton.launcher import Launch, describable
from natten.functional.backends.triton.primitives import (
    LN_2,
    column_steps,
    column_tile,
    head_offset,
    in_sight,
    row_offsets,
    row_tile,
    unravel,
)
from natten.functional.backends.triton.tiles import FLOAT8, Tiling, half
from natten.functional.problem import Problem

# What the largest weight is, in base 2.
LARGEST = gl.constexpr(8)
# A square of 4 words, which are 4 keys of 4 features each, to 4 features of 4 keys each.
TRANSPOSE = gl.constexpr("""{
    .reg .b32 low, high, lower, higher;
    prmt.b32 low, $4, $5, 0x5140;
    prmt.b32 high, $4, $5, 0x7362;
    prmt.b32 lower, $6, $7, 0x5140;
    prmt.b32 higher, $6, $7, 0x7362;
    prmt.b32 $0, low, lower, 0x5410;
    prmt.b32 $1, low, lower, 0x7632;
    prmt.b32 $2, high, higher, 0x5410;
    prmt.b32 $3, high, higher, 0x7632;
}""")


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`."""

    out: Any
    lse: Any


class Data(NamedTuple):
    """Tensors that pointers lead to, their strides, and windows. None for what there is not."""

    out: Any
    lse: Any
    query_scale: Any
    key_scale: Any
    value_scale: Any
    cumulative_query: Any
    cumulative_key: Any
    strides: Any
    window: Any


class Sources(NamedTuple):
    """Descriptors: of halves of query tiles, and of key tiles."""

    query: Any
    key: Any
    value: Any


class Shared(NamedTuple):
    """Shared memory: both halves' rows, a ring of keys, values as they are loaded and turned, and
    barriers that say what is there."""

    query: Any
    query_full: Any
    key_ring: Ring
    value: Any
    value_full: Any
    turned: Any
    turned_full: Any


@gluon.constexpr_function
def product_layout(COLUMNS):
    """How a warp group holds a product of 8-bit numbers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])


@gluon.constexpr_function
def words_layout(WORDS):
    """How a warp group reads so many words of 128 keys: a thread those that a square takes of keys
    8 and 16 apart, and squares of features next to each other. Neighboring threads have neighboring
    keys, which are in other banks of memory, both here and where they are written."""
    squares = [[0, 1], [0, 2]] if WORDS == 16 else [[0, 1]]
    return gl.DistributedLinearLayout(
        squares + [[8, 0], [16, 0]], [[1, 0], [2, 0], [4, 0], [32, 0], [64, 0]],
        [[0, WORDS // 4], [0, WORDS // 2]], [], [128, WORDS],
    )  # fmt: skip


@gluon.jit
def in_order(weights, ROWS: gl.constexpr):
    """Weights by the positions of their keys."""
    parts = weights.reshape([ROWS, 4, 2, 2, 4, 2])
    return parts.permute((0, 1, 5, 4, 2, 3)).reshape([ROWS, 128])


@gluon.jit
def turn(values, turned, HALF: gl.constexpr, FEATURES: gl.constexpr):
    """Turns half the features of a tile of values around."""
    WORDS: gl.constexpr = FEATURES // 8
    words_layout_of_tile: gl.constexpr = gl.NVMMASharedLayout(FEATURES, 32, 2)
    turned_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    tile = as_numbers(values, gl.int32, [128, FEATURES // 4], words_layout_of_tile)
    words = tile.slice(HALF * WORDS, WORDS, 1).load(words_layout(WORDS))
    # Bits of the key: 6 and 5, 2 to 0, then 4, 3.
    squares = words.reshape([4, 2, 2, 8, WORDS]).permute((0, 3, 4, 1, 2))
    even, odd = gl.split(squares)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    first, second, third, fourth = gl.inline_asm_elementwise(
        TRANSPOSE, "=r,=r,=r,=r,r,r,r,r", [first, second, third, fourth],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    squares = gl.join(gl.join(first, third), gl.join(second, fourth))
    squares = squares.reshape([4, 4, 2, WORDS, 4]).permute((3, 4, 0, 2, 1))
    place = as_numbers(turned, gl.int32, [FEATURES, 32], turned_layout)
    place.slice(HALF * (FEATURES // 2), FEATURES // 2, 0).store(
        squares.reshape([FEATURES // 2, 32])
    )


@gluon.jit
def load_tile(t, box, source, at, feature, HALF: gl.constexpr, shared, V: gl.constexpr):
    """Starts to load the t-th tile of keys, if it is the first half that does, or of values."""
    KEY_TILE: gl.constexpr = V.KEY_TILE
    buffers, full = shared.key_ring.buffers, shared.key_ring.full
    if HALF == 1:
        buffers, full = shared.value, shared.value_full
    bar = full.index(t % V.STAGES)
    mbarrier.expect(bar, source.block_type.nbytes)
    corner, _whole = column_tile(t, box, KEY_TILE, V)
    load_async(
        source, [at.memory_batch, corner[0], corner[1], corner[2], feature], bar,
        buffers.index(t % V.STAGES),
    )  # fmt: skip


@gluon.jit
def supply(
    t, steps, box, source, at, feature, shared, HALF: gl.constexpr, V: gl.constexpr
):  # fmt: skip
    """Turns a half's share of the t-th tile of values around, when it is there and has a place; and
    starts to load what comes in the place of the tile before."""
    stage = t % V.STAGES
    later = t + V.STAGES - 1
    if t > 0:
        # By now both halves have turned tile t - 1, and need no turned values of earlier tiles.
        mbarrier.wait(shared.key_ring.empty.index(later % V.STAGES), (later // V.STAGES + 1) & 1)
        if later < steps:
            load_tile(later, box, source, at, feature, HALF, shared, V)
    mbarrier.wait(shared.value_full.index(stage), (t // V.STAGES) & 1)
    turn(
        shared.value.index(stage).reshape([V.KEYS, V.VALUE_BLOCK]), shared.turned.index(t & 1),
        HALF, V.VALUE_FEATURES,
    )  # fmt: skip
    fence_async_shared()
    mbarrier.arrive(shared.turned_full.index(2 * HALF + (t & 1)))


@gluon.jit
def wait_until_turned(t, shared, HALF: gl.constexpr):
    """Waits for a half's share of the t-th tile of values."""
    mbarrier.wait(shared.turned_full.index(2 * HALF + (t & 1)), (t >> 1) & 1)


@gluon.jit
def attend(HALF: gl.constexpr, sources, data, heads, scale, shared, V: gl.constexpr):
    """Four warps with half of a query tile. The first half loads keys, the second values."""
    keys = shared.key_ring
    KEY_TILE: gl.constexpr = V.KEY_TILE
    QUERY_TILE: gl.constexpr = V.QUERY_TILE
    STAGES: gl.constexpr = V.STAGES
    COLUMNS: gl.constexpr = V.KEYS
    ROWS: gl.constexpr = V.QUERIES // 2
    FEATURES: gl.constexpr = V.FEATURES
    scores_layout: gl.constexpr = product_layout(COLUMNS)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(FEATURES), 4)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)

    at, rows, box, _grid = row_tile(
        gl.program_id(0), HALF * ROWS + gl.arange(0, ROWS, row_layout), data, heads, False, V
    )
    head, _batch, memory_batch = at
    kv_head = head // V.HEADS_PER_KV
    steps = column_steps(box)

    x, y, z = row_corner(HALF, rows.corner, data.window.query_origins, 0, QUERY_TILE)
    mbarrier.expect(shared.query_full.index(HALF), sources.query.block_type.nbytes)
    load_async(
        sources.query, [memory_batch, x, y, z, head * FEATURES], shared.query_full.index(HALF),
        shared.query.index(HALF),
    )  # fmt: skip
    source = sources.value if HALF else sources.key
    for t in gl.static_range(STAGES):
        if t < steps:
            load_tile(t, box, source, at, kv_head * FEATURES, HALF, shared, V)

    # Zero would make NaN of -inf.
    scale = gl.maximum(
        scale * gl.load(data.query_scale + head) * gl.load(data.key_scale + kv_head), 1e-30
    )
    own = sights(rows.begin, rows.width, rows.exists, V.RANK)
    place = unravel(gl.arange(0, COLUMNS, column_layout), KEY_TILE)
    queries = shared.query.index(HALF).reshape([ROWS, V.BLOCK])
    maximum = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, scores_layout)
    nothing = gl.full([ROWS, FEATURES], 0.0, gl.float32, product_layout(FEATURES))
    sums = nothing
    mbarrier.wait(shared.query_full.index(HALF), 0)
    for t in range(steps):
        stage = t % STAGES
        phase = (t // STAGES) & 1
        corner, _whole = column_tile(t, box, KEY_TILE, V)
        needed, whole = seen(corner, own, KEY_TILE, V.RANK)
        mbarrier.wait(keys.full.index(stage), phase)
        if needed:
            key_tile = keys.buffers.index(stage).reshape([COLUMNS, V.BLOCK])
            scores = multiply(queries, key_tile, zeros, FEATURES)
            supply(t, steps, box, source, at, kv_head * FEATURES, shared, HALF, V)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(keys.empty.index(stage))
            if V.NEGATE:
                scores = -scores
            if not whole:
                scores = gl.where(
                    in_sight(corner, place, rows.begin, rows.width, V.RANK), scores, float("-inf")
                )
            new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
            # Keep -inf - -inf, of a row that has seen nothing yet, out of the exponent.
            pivot = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = gl.exp2(scores * scale - (pivot - LARGEST)[:, None])
            shrink = gl.exp2(maximum - pivot)
            total = total * shrink + gl.sum(weights, 1)
            maximum = new_maximum
            # Rounded last: threads then round what they pack.
            operand = gl.convert_layout(in_order(weights, ROWS), operand_layout)
            if HALF == 0:
                wait_until_turned(t, shared, 1)
            else:
                wait_until_turned(gl.minimum(t + 1, steps - 1), shared, 0)
            turned = shared.turned.index(t & 1).permute((1, 0))
            product = warpgroup_mma(
                operand.to(gl.float8e4nv), turned, nothing, use_acc=False, is_async=True
            )
            sums = sums * spread(shrink, sums) + warpgroup_mma_wait(0, deps=[product])
        else:
            supply(t, steps, box, source, at, kv_head * FEATURES, shared, HALF, V)
            mbarrier.arrive(keys.empty.index(stage))

    # A query that sees nothing has output 0 and logsumexp -inf.
    value_scale = gl.load(data.value_scale + kv_head)
    sums = scaled((sums,), value_scale / gl.where(total == 0.0, 1.0, total))
    offset, all_exist = row_offsets(rows.memory, rows.exists, data.strides.lse, 1, V.WIDE, V.RANK)
    offset += head_offset(memory_batch, head, data.strides.lse, 1, V.WIDE)
    lse = (maximum + gl.log2(total) - LARGEST) * LN_2
    gl.store(data.lse + offset, lse, mask=all_exist)
    store_sums(data.out, sums, memory_batch, head, rows, data.strides.out, FEATURES, V)


@gluon.jit(do_not_specialize=["heads"])
def hopper_float8_kernel(query, key, value, data, heads, scale, V: gl.constexpr):
    """The descriptors of `Sources`, and arguments as those of `forward_kernel`."""
    turned_layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    sources = Sources(query, key, value)
    shared = Shared(
        gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout),
        barriers(2, 1),
        loaded_ring(key, V.STAGES),
        gl.allocate_shared_memory(value.dtype, [V.STAGES] + value.block_type.shape, value.layout),
        barriers(V.STAGES, 1),
        gl.allocate_shared_memory(value.dtype, [2, V.VALUE_BLOCK, V.KEYS], turned_layout),
        barriers(4, 1),
    )
    gl.warp_specialize(
        [
            (attend, (0, sources, data, heads, scale, shared, V)),
            (attend, (1, sources, data, heads, scale, shared, V)),
        ],
        [4],
        [240],
    )


@lru_cache(maxsize=4096)
def _launch(
    problem: Problem, tiling: Tiling, strides: tuple[tuple[int, ...], ...], out: tuple[int, ...]
) -> Launch:
    """``strides`` are those of query, key and value."""
    common = arguments.common(problem, tiling, problem.batch, "tf32", strides, out)
    lse = arguments.statistic_strides(problem.query_shape, problem.heads, True)
    return Launch(
        hopper_float8_kernel,
        common.tiles,
        (common.heads, common.scales.scores, common.variant),
        group=Data,
        alone=3,
        grouped=(Strides(common.steps(out), lse), common.window._replace(bias_paddings=None)),
        options=common.options,
        tiles=(tiling, FLOAT8),
    )


def forward(
    problem: Problem, tiling: Tiling, inputs: Inputs, scales: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """out, in the problem's dtype, and logsumexp, of 8-bit inputs and the scales of their heads."""
    query, key, value = map(describable, inputs[:3])
    out = torch.empty(problem.output_shape, dtype=problem.dtype, device=query.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=query.device)
    strides = (query.stride(), key.stride(), value.stride())
    launch = _launch(problem, tiling, strides, out.stride())
    key_tile = launch.variant.KEY_TILE
    launch.run(
        launcher.descriptor(query, half(launch.variant.QUERY_TILE), descriptor),
        launcher.descriptor(key, key_tile, descriptor),
        launcher.descriptor(value, key_tile, descriptor),
        out, lse, *scales, None, None,
    )  # fmt: skip
    return out, lse
