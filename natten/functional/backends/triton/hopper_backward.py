"""The backward kernel for Hopper that computes all three gradients in one pass, in Gluon.

Two groups of four warps own half of a key tile each and visit the queries that see it, as in
`hopper_forward.py`. Each sums the gradients of its own keys and values in registers. The gradients
of queries are sums over all key tiles: the halves share the scores' gradients in memory, each
multiplies them with half the features of the keys, and the memory accelerator adds the product to a
sum in global memory. That is five matrix products where the kernels of `backward.py` compute
seven, but the order of the additions is left to chance. Additional keys have a launch of their own,
as of dense attention, which adds to the same sums.

Time goes down: what each half does in step i, both at their own pace.

    wait     queries[i].full
    start    S = K Q(i)^T
    wait     gradients[i].full
    start    dP = V dO(i)^T
    wait     statistics[i].full, and for S
    compute  P
    wait     for dP
    compute  dS
    wait     empty[i-1], by when dS of step i-2 has been read, and score_gradients[i-1].full
    store    dS
    start    dV += P dO(i)
    arrive   score_gradients[i].full
    start    dQ of step i-1, half the features
    start    dK += dS Q(i)
    wait     for dV and dQ
    start    to add dQ to memory
    wait     for dK
    arrive   empty[i]
    wait     empty[i], of both halves
    load     queries[i+STAGES] in its place (half 0), gradients and statistics[i+STAGES] (half 1)

A step's product for the query runs in the next step, so that neither half waits long for the other.
Query tiles and all that comes with them are in rings of `STAGES` places, scores' gradients in one
of two. A warp group arrives at a barrier together, for which its warps meet: one barrier says that
all of a step has been read.

A half computes tiles that it sees nothing of as well. Programs that take as long for each of their
tiles stay side by side, and find the queries, and the sums of their gradients, in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from natten.functional.backends.triton import arguments, launcher
from natten.functional.backends.triton.hopper import (
    Places,
    Ring,
    add_products,
    as_numbers,
    barriers,
    descriptor,
    group_start,
    in_flight,
    load_async,
    loaded_places,
    loaded_ring,
    multiply,
    row_corner,
    scaled,
    seen,
    sights,
    store_sums,
    sums_layout,
    sums_widths,
    wait,
    wait_for,
    wait_for_both,
    zero_sums,
)
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.primitives import (
    column_steps,
    column_tile,
    in_sight,
    row_tile,
    sequence_of,
    unravel,
)
from natten.functional.backends.triton.tiles import (
    FUSED,
    Tiling,
    additional_problem,
    block,
)
from natten.functional.problem import Problem


class Strides(NamedTuple):
    """Strides of batch, three axes of tokens, and heads, see `arguments.Common.steps`; of what has
    descriptors, `arguments.group_steps`."""

    key_gradient: Any
    value_gradient: Any
    query: Any
    key: Any
    value: Any
    out_gradient: Any
    statistics: Any
    query_sums: Any


class Data(NamedTuple):
    """Tensors that pointers lead to, their strides, and windows. None for what there is not."""

    key_gradient: Any
    value_gradient: Any
    cumulative_query: Any
    cumulative_key: Any
    strides: Any
    window: Any


class Sources(NamedTuple):
    """Descriptors: of query and the output's gradient, in query tiles; of key and value, in key
    tiles; of four statistics per query, logsumexp and delta first; and of the sums that the
    gradients of queries are added to."""

    query: Any
    key: Any
    value: Any
    out_gradient: Any
    statistics: Any
    query_sums: Any


class Starts(NamedTuple):
    """What coordinates of queries begin with: of tokens, the first of a sequence; of features,
    `group_start` in each tensor."""

    sequence: Any
    query: Any
    out_gradient: Any
    statistics: Any
    query_sums: Any


class Shared(NamedTuple):
    """Shared memory: the rows, barriers that say that they are there, places, and per half the
    query gradients that are on their way to memory."""

    key: Any
    value: Any
    rows_full: Any
    queries: Ring
    gradients: Places
    statistics: Places
    score_gradients: Places
    sums: Any


def sums_descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """As `descriptor`, but of float32 sums, in tiles of half the features."""
    tile = [*tile[:-1], tile[-1] // 2]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.float32)
    return TensorDescriptor(tensor, shape, strides, tile, layout)


def statistics_descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], tile: list[int]
) -> TensorDescriptor:
    """As `descriptor`, but of a few numbers per token, contiguous in shared memory."""
    return TensorDescriptor(tensor, shape, strides, tile, gl.NVMMASharedLayout(0, 32, len(tile)))


if hasattr(tma, "async_atomic_add"):
    add_to_global = tma.async_atomic_add
else:
    # Triton 3.6 and 3.7 have the operation, but no name for it.
    @builtin
    def add_to_global(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Starts to add a tile in shared memory to global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def place_of(i, steps, kv_head, box, V: gl.constexpr):
    """The head and the corner of the i-th tile of queries, of `steps` tiles per head."""
    QUERY_TILE: gl.constexpr = V.QUERY_TILE
    head = kv_head * V.HEADS_PER_KV
    if V.HEADS_PER_KV > 1:
        head += i // steps
        i = i % steps
    corner, _whole = column_tile(i, box, QUERY_TILE, V)
    return head, corner


@gluon.jit
def load_queries(
    HALF: gl.constexpr, i, place, starts, sources, batch, heads, shared, V: gl.constexpr
):  # fmt: skip
    """Starts to load the i-th tile: the first half queries, the second all else about them."""
    head, corner = place
    stage = i % V.STAGES
    z = starts.sequence + corner[2]
    feature = head * V.FEATURES
    if HALF == 0:
        full = shared.queries.full.index(stage)
        mbarrier.expect(full, sources.query.block_type.nbytes)
        load_async(
            sources.query, [batch, corner[0], corner[1], z, starts.query + feature], full,
            shared.queries.buffers.index(stage),
        )  # fmt: skip
    else:
        full = shared.gradients.full.index(stage)
        statistics_full = shared.statistics.full.index(stage)
        mbarrier.expect(full, sources.out_gradient.block_type.nbytes)
        mbarrier.expect(statistics_full, sources.statistics.block_type.nbytes)
        load_async(
            sources.out_gradient,
            [batch, corner[0], corner[1], z, starts.out_gradient + feature], full,
            shared.gradients.buffers.index(stage),
        )  # fmt: skip
        load_async(
            sources.statistics, [batch * heads + head, corner[0], corner[1], z, starts.statistics],
            statistics_full, shared.statistics.buffers.index(stage),
        )  # fmt: skip


@gluon.jit
def statistic(pairs, which: gl.constexpr, COLUMNS: gl.constexpr, column_layout: gl.constexpr):
    """One of the numbers of each query."""
    # That of products along their columns, with an axis of one.
    NEXT: gl.constexpr = [[1, 0], [8, 0], [16, 0], [32, 0]]
    layout: gl.constexpr = gl.DistributedLinearLayout(
        NEXT if COLUMNS == 64 else NEXT + [[64, 0]],
        [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [COLUMNS, 1],
    )  # fmt: skip
    numbers = pairs.slice(which, 1, 1).load(layout).reshape([COLUMNS])
    return gl.convert_layout(numbers, column_layout)


@gluon.constexpr_function
def share(HALF, FEATURES):
    """Columns of the queries' gradients that a half of the program computes: the first, and how
    many."""
    widths = sums_widths(FEATURES)
    if len(widths) == 1:
        return HALF * (widths[0] // 2), widths[0] // 2
    return (widths[0], widths[1]) if HALF else (0, widths[0])


@gluon.jit
def multiply_keys(score_gradients, keys, COLUMNS: gl.constexpr):
    """Starts the product of a tile's score gradients with some features of the keys."""
    PART: gl.constexpr = keys.shape[1]
    zeros = gl.full([COLUMNS, PART], 0.0, gl.float32, sums_layout(PART))
    return warpgroup_mma(score_gradients.permute((1, 0)), keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def add_queries(
    part, place, starts, query_sums, sums, batch, first_head, HALF: gl.constexpr,
    V: gl.constexpr,
):  # fmt: skip
    """Starts to add a half's share of a tile's query gradients to memory."""
    head, corner = place
    WIDTH: gl.constexpr = V.BLOCK // 2
    sums.reshape([V.QUERIES, WIDTH]).slice(0, part.shape[1], 1).store(part)
    fence_async_shared()
    add_to_global(
        query_sums,
        [
            batch, corner[0], corner[1], starts.sequence + corner[2],
            starts.query_sums + (head - first_head) * V.BLOCK + HALF * WIDTH,
        ],
        sums,
    )  # fmt: skip


@gluon.jit
def attend_back(
    HALF: gl.constexpr, sources, data, heads, first_head, group_heads, scales, shared,
    V: gl.constexpr,
):  # fmt: skip
    """Four warps with half of a key tile."""
    queries, gradients, statistics = shared.queries, shared.gradients, shared.statistics
    score_gradients = shared.score_gradients
    QUERY_TILE: gl.constexpr = V.QUERY_TILE
    KEY_TILE: gl.constexpr = V.KEY_TILE
    STAGES: gl.constexpr = V.STAGES
    FEATURES: gl.constexpr = V.FEATURES
    ALL: gl.constexpr = V.KEYS
    ROWS: gl.constexpr = ALL // 2
    COLUMNS: gl.constexpr = V.QUERIES
    SHARE: gl.constexpr = share(HALF, FEATURES)
    # Products that a product with sums for all features is made of.
    PARTS: gl.constexpr = len(sums_widths(FEATURES))
    dtype: gl.constexpr = queries.buffers.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout(sums_widths(FEATURES)[0]), 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    at, rows, box, grid = row_tile(
        gl.program_id(0), HALF * ROWS + gl.arange(0, ROWS, row_layout), data, group_heads, True, V
    )
    kv_head, batch, memory_batch = at
    kv_head += first_head
    width = rows.width
    group, steps_of = grid.memory, data.strides
    starts = Starts(
        grid.sequence,
        group_start(group, steps_of.query, V.RANK),
        group_start(group, steps_of.out_gradient, V.RANK),
        group_start(group, steps_of.statistics, V.RANK),
        group_start(group, steps_of.query_sums, V.RANK),
    )
    row_start = group_start(group, steps_of.value if HALF else steps_of.key, V.RANK)
    own = sights(rows.begin, width, rows.exists, V.RANK)
    # Rows that do not exist see nothing: unmasked, they would add to the queries' gradients.
    widths = width[2]
    if V.RANK >= 2:
        widths = gl.minimum(widths, width[1])
    if V.RANK == 3:
        widths = gl.minimum(widths, width[0])
    see_some = gl.min(widths, 0) > 0
    steps = column_steps(box)
    total = steps * V.HEADS_PER_KV

    row_first, _length = sequence_of(data.cumulative_key, batch, 2**30, V.VARLEN)
    x, y, z = row_corner(0, rows.corner, data.window.key_origins, row_first, KEY_TILE)
    mbarrier.expect(shared.rows_full.index(HALF), sources.key.block_type.nbytes)
    load_async(
        sources.key if HALF == 0 else sources.value,
        [memory_batch, x, y, z, row_start + kv_head * FEATURES],
        shared.rows_full.index(HALF), shared.key if HALF == 0 else shared.value,
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        if i < total:
            load_queries(
                HALF, i, place_of(i, steps, kv_head, box, V), starts, sources, memory_batch,
                heads * V.HEADS_PER_KV, shared, V,
            )  # fmt: skip

    all_keys = shared.key.reshape([ALL, V.BLOCK])
    keys = all_keys.slice(HALF * ROWS, ROWS, 0)
    key_features = all_keys.slice(SHARE[0], SHARE[1], 1)
    values = shared.value.reshape([ALL, V.BLOCK]).slice(HALF * ROWS, ROWS, 0)
    sums = shared.sums.index(HALF)
    if SHARE[1] < V.BLOCK // 2:
        # What is behind the share is added, too.
        WIDTH: gl.constexpr = V.BLOCK // 2
        nothing = gl.full([COLUMNS, WIDTH], 0.0, gl.float32, sums_layout(WIDTH))
        sums.reshape([COLUMNS, WIDTH]).store(nothing)
    place = unravel(gl.arange(0, COLUMNS, column_layout), QUERY_TILE)
    zeros = gl.full([ROWS, COLUMNS], 0.0, gl.float32, scores_layout)
    key_sums = zero_sums(ROWS, FEATURES)
    value_sums = zero_sums(ROWS, FEATURES)
    # Step -1 adds nothing to the gradients of queries, and all others are alike.
    score_gradients.buffers.index(0).slice(HALF * ROWS, ROWS, 0).store(zeros.to(dtype))
    fence_async_shared()
    mbarrier.arrive(score_gradients.full.index(0))
    mbarrier.wait(shared.rows_full.index(0), 0)
    mbarrier.wait(shared.rows_full.index(1), 0)
    for i in range(total):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        here = (i + 1) & 1
        _head, corner = place_of(i, steps, kv_head, box, V)
        whole = seen(corner, own, QUERY_TILE, V.RANK)[1]
        query_tile = queries.buffers.index(stage).reshape([COLUMNS, V.BLOCK])
        gradient_tile = gradients.buffers.index(stage).reshape([COLUMNS, V.BLOCK])
        pairs = as_numbers(statistics.buffers.index(stage), gl.float32, [COLUMNS, 4], flat)
        mbarrier.wait(queries.full.index(stage), phase)
        scores = multiply(keys, query_tile, zeros, FEATURES)
        mbarrier.wait(gradients.full.index(stage), phase)
        weight_gradient = multiply(values, gradient_tile, zeros, FEATURES)
        mbarrier.wait(statistics.full.index(stage), phase)
        column_lse = statistic(pairs, 0, COLUMNS, column_layout)
        scores = warpgroup_mma_wait(PARTS, deps=[scores])
        if V.NEGATE:
            scores = -scores
        if not (whole & see_some):
            scores = gl.where(
                in_sight(corner, place, rows.begin, width, V.RANK), scores, float("-inf")
            )
        weights = gl.exp2(scores * scales.scores - column_lse[None, :])
        weight_operand = gl.convert_layout(weights.to(dtype), operand_layout)
        weight_gradient = warpgroup_mma_wait(0, deps=[weight_gradient])
        column_delta = statistic(pairs, 1, COLUMNS, column_layout)
        score_gradient = weights * (weight_gradient - column_delta[None, :])
        score_gradient = score_gradient.to(dtype)
        mbarrier.wait(
            queries.empty.index((i + STAGES - 1) % STAGES), ((i + STAGES - 1) // STAGES + 1) & 1,
            pred=i > 0,
        )  # fmt: skip
        mbarrier.wait(score_gradients.full.index(1 - here), (i >> 1) & 1)
        score_gradients.buffers.index(here).slice(HALF * ROWS, ROWS, 0).store(score_gradient)
        value_sums = add_products(weight_operand, gradient_tile, value_sums, FEATURES)
        operand = gl.convert_layout(score_gradient, operand_layout)
        fence_async_shared()
        mbarrier.arrive(score_gradients.full.index(here))
        part = multiply_keys(score_gradients.buffers.index(1 - here), key_features, COLUMNS)
        key_sums = add_products(operand, query_tile, key_sums, FEATURES)
        tma.store_wait(0)
        part, value_sums = wait_for(PARTS, part, value_sums)
        value_sums = in_flight(value_sums)
        add_queries(
            part, place_of(gl.maximum(i - 1, 0), steps, kv_head, box, V), starts,
            sources.query_sums, sums, memory_batch, first_head * V.HEADS_PER_KV, HALF, V,
        )  # fmt: skip
        key_sums = wait(key_sums)
        mbarrier.arrive(queries.empty.index(stage))
        key_sums = in_flight(key_sums)
        if i + STAGES < total:
            mbarrier.wait(queries.empty.index(stage), phase)
            load_queries(
                HALF, i + STAGES, place_of(i + STAGES, steps, kv_head, box, V), starts, sources,
                memory_batch, heads * V.HEADS_PER_KV, shared, V,
            )  # fmt: skip
    key_sums, value_sums = wait_for_both(key_sums, value_sums)
    if total > 0:
        mbarrier.wait(score_gradients.full.index(total & 1), (total >> 1) & 1)
        part = multiply_keys(score_gradients.buffers.index(total & 1), key_features, COLUMNS)
        tma.store_wait(0)
        part = warpgroup_mma_wait(0, deps=[part])
        add_queries(
            part, place_of(total - 1, steps, kv_head, box, V), starts, sources.query_sums, sums,
            memory_batch, first_head * V.HEADS_PER_KV, HALF, V,
        )  # fmt: skip
    key_sums = scaled(key_sums, gl.full([ROWS], 1.0, gl.float32, row_layout) * scales.gradients)
    store_sums(
        data.key_gradient,
        key_sums,
        memory_batch,
        kv_head,
        rows,
        data.strides.key_gradient,
        FEATURES,
        V,
    )
    store_sums(
        data.value_gradient,
        value_sums,
        memory_batch,
        kv_head,
        rows,
        data.strides.value_gradient,
        FEATURES,
        V,
    )
    # Shared memory must not go before it has been read.
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "first_head", "group_heads"])
def hopper_gradients_kernel(
    query, key, value, out_gradient, statistics, query_sums, data,
    heads, first_head, group_heads, scales, V: gl.constexpr,
):  # fmt: skip
    """The descriptors of `Sources`, and arguments as those of `key_value_gradient_kernel`. Of the
    `heads` of keys, programs are for `group_heads`, from `first_head` on."""
    STAGES: gl.constexpr = V.STAGES
    KEYS: gl.constexpr = V.KEYS
    QUERIES: gl.constexpr = V.QUERIES
    shape: gl.constexpr = [KEYS, QUERIES]
    queries = loaded_ring(query, STAGES)
    score_gradients = gl.allocate_shared_memory(
        query.dtype, [2] + shape, gl.NVMMASharedLayout.get_default_for(shape, query.dtype)
    )
    sources = Sources(query, key, value, out_gradient, statistics, query_sums)
    shared = Shared(
        gl.allocate_shared_memory(key.dtype, key.block_type.shape, key.layout),
        gl.allocate_shared_memory(value.dtype, value.block_type.shape, value.layout),
        barriers(2, 1),
        queries,
        loaded_places(out_gradient, STAGES),
        loaded_places(statistics, STAGES),
        Places(score_gradients, barriers(2, 2)),
        gl.allocate_shared_memory(gl.float32, [2] + query_sums.block_type.shape, query_sums.layout),
    )
    gl.warp_specialize(
        [
            (attend_back, (
                0, sources, data, heads, first_head, group_heads, scales, shared, V,
            )),
            (attend_back, (
                1, sources, data, heads, first_head, group_heads, scales, shared, V,
            )),
        ],
        [4],
        [240],
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _launch(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    strides: tuple[tuple[int, ...], ...],
    sums: tuple[tuple[int, ...], ...],
    gradients: tuple[tuple[int, ...], ...],
    first_head: int,
    group_heads: int,
) -> Launch:
    """``strides`` are those of query, key, value and the output's gradient, ``sums`` those of
    statistics and the sums for the query's gradient, ``gradients`` those of the gradients of key
    and value."""
    common = arguments.common(
        problem, tiling, sequences, "tf32", strides, *gradients, inverse=True
    )  # fmt: skip
    key_gradient, value_gradient = map(common.steps, gradients)
    by_tiles, _by_heads, *others = common.window.divisions
    divisions = (by_tiles, arguments.division(group_heads), *others)
    return Launch(
        hopper_gradients_kernel,
        common.tiles // problem.heads_kv * group_heads,
        (common.heads, first_head, group_heads, common.scales, common.variant),
        group=Data,
        alone=6,
        grouped=(
            Strides(
                key_gradient, value_gradient,
                *(arguments.group_steps(problem, stride) for stride in (*strides, *sums)),
            ),
            common.window._replace(bias_paddings=None, divisions=divisions),
        ),
        options=common.options,
        tiles=(tiling, FUSED),
    )  # fmt: skip


def _launches(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    tensors: tuple[Tensor, ...],
    statistics: Tensor,
    cumulative: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, ...],
) -> Callable[[Tensor, int, int], None]:
    """What launches the kernel: given sums of queries to add to, the first of the heads of keys
    that are theirs, and how many these are. Writes to ``results``, the gradients of key and value.
    """
    query, key, value, grad_out = tensors
    strides, gradients = tuple([t.stride() for t in tensors]), tuple([t.stride() for t in results])
    statistics = statistics.view(-1, *problem.query_shape, 1, statistics.shape[-1])
    query_tile, key_tile = arguments.pad(tiling.query, 1), arguments.pad(tiling.key, 1)
    dilation = problem.dilation
    descriptors = (
        launcher.descriptor(query, query_tile, descriptor, dilation),
        launcher.descriptor(key, key_tile, descriptor, dilation),
        launcher.descriptor(value, key_tile, descriptor, dilation),
        launcher.descriptor(grad_out, query_tile, descriptor, dilation),
        launcher.descriptor(statistics, query_tile, statistics_descriptor, dilation),
    )

    def run(sums: Tensor, first: int, heads: int) -> None:
        sums = sums.view(-1, *problem.query_shape, *sums.shape[-2:])
        launch = _launch(
            problem, tiling, sequences, strides, (statistics.stride(), sums.stride()), gradients,
            first, heads,
        )  # fmt: skip
        launch.run(
            *descriptors, launcher.descriptor(sums, query_tile, sums_descriptor, dilation),
            *results, *cumulative,
        )  # fmt: skip

    return run


def _additional_launches(
    problem: Problem,
    tiling: Tiling,
    tensors: tuple[Tensor, ...],
    statistics: Tensor,
    additional: tuple[Tensor, ...],
    parts: Sequence[Tensor],
) -> Callable[[Tensor, int, int], None]:
    """`_launches` for additional keys and values. Each of ``tiling.splits`` shares of the queries
    has a copy of them, and writes one of the ``parts`` of their gradients."""
    query, *_, grad_out = tensors
    splits = tiling.splits
    dense = additional_problem(problem, splits)
    query, grad_out = [t.reshape(-1, *dense.query_shape, *t.shape[-2:]) for t in (query, grad_out)]
    key, value = [
        t.unsqueeze(1).expand(-1, splits, -1, -1, -1).reshape(-1, *dense.key_shape, *t.shape[-2:])
        for t in additional
    ]
    results = tuple([
        part.view(splits, *t.shape).transpose(0, 1).view(-1, *dense.key_shape, *t.shape[-2:])
        for part, t in zip(parts, additional, strict=True)
    ])  # fmt: skip
    tensors = tuple(map(launcher.describable, (query, key, value, grad_out)))
    return _launches(dense, tiling, dense.batch, tensors, statistics, (None, None), results)


def gradients(
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    launches: int,
    tensors: tuple[Tensor, ...],
    statistics: Tensor,
    cumulative: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor, Tensor],
    additional_tiling: Tiling | None,
    additional: tuple[Tensor, ...],
    additional_results: Sequence[Tensor],
) -> None:
    """Write the gradients of query, key and value, ``results``, in so many launches.

    Args:
        problem, tiling, sequences: As of all kernels.
        launches: They divide the heads.
        tensors: Query, key, value and the output's gradient, which descriptors can view.
        statistics: Four numbers of each ``[batch, head, token]``, logsumexp and delta first.
        cumulative: Where packed sequences of queries and keys begin.
        results: Memory for them.
        additional_tiling: For additional keys, in as many launches more; None if there are none.
        additional: Additional keys and values.
        additional_results: Memory for their gradients, those of each of the tiling's splits.
    """
    query, *_ = tensors
    query_gradient, *others = results
    group = -(-problem.heads_kv // launches)
    members = problem.heads // problem.heads_kv
    sums = torch.empty(
        (*query.shape[:-2], group * members, block(problem.head_dim)),
        dtype=torch.float32, device=query.device,
    )  # fmt: skip
    keys = tuple(others)
    runs = [_launches(problem, tiling, sequences, tensors, statistics, cumulative, keys)]
    if additional_tiling is not None:
        runs.append(
            _additional_launches(
                problem, additional_tiling, tensors, statistics, additional, additional_results
            )
        )
    for first in range(0, problem.heads_kv, group):
        heads = min(group, problem.heads_kv - first)
        part = sums.narrow(-2, 0, heads * members).zero_()
        for run in runs:
            run(part, first, heads)
        target = query_gradient.narrow(-2, first * members, heads * members)
        torch.mul(part[..., : problem.head_dim], problem.scale, out=target)
