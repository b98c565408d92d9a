"""FlexAttention as a backend, and the permission that compiling it needs."""

from __future__ import annotations

from math import prod

import pytest
import torch
from cases import CASES, GROUPS, Case
from checks import check_problem, make_inputs, run

import natten
from natten.functional.backends import flex
from natten.functional.backends.flex import _block_mask, _visible
from natten.functional.problem import Problem
from natten.window import grid_mask

# Each takes about a second: FlexAttention traces every new mask.
SOME = [
    GROUPS["plain"][2],
    *(c for c in CASES if c.name in ("2d_s25_d23_cb", "2d_non_contiguous_gqa", "2d_sub_dilated")),
    *(c for c in CASES if c.name in ("3d_rpb_additional_dilated_strided", "1d_sub_disjoint")),
    *(c for c in CASES if "additional_lengths" in c.name),
    *(c for c in CASES if c.name in ("attention_causal_cross_long", "varlen_empty_sequences")),
    *(c for c in CASES if c.name in ("2d_softcap_rpb_additional", "2d_everything")),
    *(c for c in CASES if c.name in ("attention_causal_masks_sink", "varlen_softcap_sink")),
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_forward(case):
    check_problem(case, "flex", torch.float32, backward=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    check_problem(Case("dtype", (9,), (4,), additional=2), "flex", dtype, backward=False)


def test_soft_caps_that_differ():
    """The second of them is not taken for something that changes from call to call."""
    for softcap in (0.5, 2.0, 3.0):
        case = Case("cap", (9,), (4,), softcap=softcap)
        check_problem(case, "flex", torch.float32, backward=False)


@pytest.mark.parametrize("blocks", [(16, 16), (8, 32)])
def test_block_mask_covers_the_mask(blocks):
    problem = Problem(
        batch=1,
        query_shape=(9, 10),
        key_shape=(9, 10),
        heads=1,
        heads_kv=1,
        head_dim=8,
        head_dim_v=8,
        kernel_size=(4, 5),
        stride=(2, 1),
        dilation=(1, 2),
        is_causal=(False, True),
        grid=(9, 10),
        query_origin=(0, 0),
        key_origin=(0, 0),
        scale=1.0,
    )
    visible = _visible(problem, None)
    block_mask = _block_mask(problem, visible, blocks)
    expected = grid_mask(problem.axes)
    index = torch.arange(90)
    assert torch.equal(visible(index[:, None], index[None, :]), expected)
    some, full = torch.zeros(2, 90 // blocks[0] + 1, 90 // blocks[1] + 1, dtype=torch.bool)
    for row in range(some.shape[0]):
        for table, counts, indices in (
            (some, block_mask.kv_num_blocks, block_mask.kv_indices),
            (full, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        ):
            table[row, indices[0, 0, row, : int(counts[0, 0, row])].long()] = True
        for column in range(some.shape[1]):
            q, kv = row * blocks[0], column * blocks[1]
            part = expected[q : q + blocks[0], kv : kv + blocks[1]]
            assert bool(some[row, column] | full[row, column]) == bool(part.any())
            if full[row, column]:
                assert bool(part.all())


@pytest.mark.parametrize("keys", [0, 1])
@pytest.mark.parametrize("additional", [0, 3])
def test_empty_boxes_of_keys(keys, additional):
    """What the reference gives, where queries see additional keys alone, or nothing."""
    query, key, more = torch.randn(1, 4, 1, 8), torch.randn(1, keys, 1, 8), None
    if additional:
        more = torch.randn(1, additional, 1, 8)
    rpb = torch.randn(1, 3)
    for bias in (None, rpb):
        results = [
            natten.functional.neighborhood_attention_generic(
                query, key, key, 2, grid=4, query_origin=0, key_origin=1, additional_keys=more,
                additional_values=more, rpb=bias, backend=backend, return_lse=True,
            )
            for backend in ("flex-fna", "reference")
        ]  # fmt: skip
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected)


TILED = {
    "2d_k7": ((4, 16), (8, 8)),
    "2d_s25_d23_cb": ((8, 8), (8, 16)),
    "2d_gqa": ((8, 16), (8, 8)),
    "2d_additional": ((8, 16), (8, 16)),
    "2d_additional_lengths": ((4, 16), (4, 16)),
    "2d_sub_dilated": ((8, 8), (8, 8)),
    "3d_rpb_additional_dilated_strided": ((2, 4, 8), (4, 4, 4)),
}


@pytest.mark.parametrize("name", TILED)
def test_tiles_of_several_axes(name):
    case = next(c for c in CASES if c.name == name)
    q_tile, kv_tile = TILED[name]
    tiles = {"q_tile_shape": q_tile, "kv_tile_shape": kv_tile}
    check_problem(case, "flex", torch.float32, backward=False, **tiles)


def test_tiles_and_values_that_are_not_finite():
    query, key, value = torch.randn(3, 1, 9, 10, 2, 8).unbind()
    value[0, 2, 3, 1, 4], value[0, 7, 7, 0, 0] = torch.nan, torch.inf
    got, expected = (
        natten.na2d(query, key, value, (3, 5), dilation=(2, 1), return_lse=True, **knobs)
        for knobs in (
            dict(backend="flex-fna", q_tile_shape=(8, 8), kv_tile_shape=(8, 16)),
            dict(backend="reference"),
        )
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert bool(got[0].isnan().any())
    assert bool(got[0].isfinite().any())


@pytest.mark.usefixtures("untraced_flex")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_listed_tiles_are_honoured(rank, monkeypatch):
    """What is listed decides the blocks and what lies in them; anything else is refused."""
    tensors = [torch.randn(1, *(19, 9, 10)[:rank], 2, 16) for _ in range(3)]
    operation = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    listed = natten.get_configs_for_flex_fna(*tensors)
    assert listed
    expected = operation(*tensors, 3)
    made = []
    real = flex._block_mask
    monkeypatch.setattr(flex, "_block_mask", lambda *a: made.append(real(*a)) or made[-1])
    flex._cached_block_mask.cache_clear()
    for q_tile, kv_tile in listed:
        assert {prod(q_tile), prod(kv_tile)} <= {64, 128}
        out = operation(*tensors, 3, backend="flex-fna", q_tile_shape=q_tile, kv_tile_shape=kv_tile)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert (prod(q_tile), prod(kv_tile)) == made[-1].BLOCK_SIZE
    assert len(made) == len(listed)
    for q_tile, kv_tile in (
        ((5,) * rank, (5,) * rank),
        ((1,) * rank, (1,) * rank),
        (listed[0][0], (3,) * rank),
        ((1024,) * rank, listed[0][1]),
    ):
        with pytest.raises(ValueError, match=r"must be a pair that backend 'flex' lists.*valid: "):
            operation(*tensors, 3, backend="flex-fna", q_tile_shape=q_tile, kv_tile_shape=kv_tile)


@pytest.mark.parametrize("shape", [(9, 10), (3, 5, 7)])
def test_order_is_tile_by_tile(shape):
    tile = (4, 8) if len(shape) == 2 else (2, 4, 4)
    order = flex._order(shape, tile, torch.device("cpu"))
    assert order.token[order.place].tolist() == list(range(prod(shape)))
    assert bool(order.is_real[order.place].all())
    assert int(order.is_real.sum()) == prod(shape)
    tiles = order.token.view(-1, prod(tile))
    for number, (tokens, real) in enumerate(zip(tiles, order.is_real.view_as(tiles))):
        corner = torch.unravel_index(
            torch.tensor(number), tuple(-(-n // t) for n, t in zip(shape, tile))
        )
        for axis, coordinate in enumerate(torch.unravel_index(tokens[real], shape)):
            first = int(corner[axis]) * tile[axis]
            assert bool(((coordinate >= first) & (coordinate < first + tile[axis])).all())


def test_tiles_visit_fewer_blocks():
    """Large windows, counted by hand: 29 x 29 on 64 x 64 in tiles of 8 x 16."""
    problem = Problem(
        batch=1, query_shape=(64, 64), key_shape=(64, 64), heads=1, heads_kv=1, head_dim=8,
        head_dim_v=8, kernel_size=(29, 29), stride=(1, 1), dilation=(1, 1),
        is_causal=(False, False), grid=(64, 64), query_origin=(0, 0), key_origin=(0, 0), scale=1.0,
    )  # fmt: skip

    def visited(*arguments):
        mask = flex._cached_block_mask(problem, (128, 128), *arguments)
        return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())

    # Tiles of 8 reach from their first query's window to their last's: 0..28, 0..29, 2..37, ...
    rows = sum(
        min(max(8 * t + 7 - 14, 0) + 28, 63) // 8 - min(max(8 * t - 14, 0), 35) // 8 + 1
        for t in range(8)
    )
    columns = sum(
        min(max(16 * t + 15 - 14, 0) + 28, 63) // 16 - min(max(16 * t - 14, 0), 35) // 16 + 1
        for t in range(4)
    )
    # Flattened tokens: 32 blocks of two rows, of which every column is visited.
    flat = sum(
        min(max(2 * b + 1 - 14, 0) + 28, 63) // 2 - min(max(2 * b - 14, 0), 35) // 2 + 1
        for b in range(32)
    )
    assert visited(((8, 16), (8, 16))) == rows * columns
    assert visited(None) == flat > rows * columns


def test_compiling_needs_permission():
    query = torch.randn(1, 9, 2, 16)
    call = {"kernel_size": 3, "backend": "flex-fna", "torch_compile": True}
    with pytest.raises(RuntimeError, match=r"natten.allow_flex_compile\(\)"):
        natten.na1d(query, query, query, **call)
    with natten.allow_flex_compile(), pytest.raises(NotImplementedError, match="logsumexp"):
        natten.na1d(query, query, query, **call)
    with pytest.raises(RuntimeError, match="allow_flex_compile"):
        natten.attention(query, query, query, backend="flex-fmha", torch_compile=True)


def test_no_backward_on_the_cpu():
    query = torch.randn(1, 9, 2, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no backward pass on cpu"):
        natten.na1d(query, query, query, 3, backend="flex-fna")
    with torch.no_grad():
        natten.na1d(query, query, query, 3, backend="flex-fna")


def test_is_not_chosen_uncompiled():
    query = torch.randn(1, 9, 2, 16)
    decisions = {d.backend: d.reason for d in natten.explain(query, query, query, 3).decisions}
    assert "holds all scores" in decisions["flex-fna"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim_v == c.head_dim][::4], ids=str)
def test_backward_on_a_gpu(case):
    check_problem(case, "flex", torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["2d_k7", "2d_s25_d23_cb", "2d_gqa", "2d_additional", "2d_additional_lengths", "2d_rpb"]
)
def test_compiled_on_a_gpu(name):
    case = next(c for c in CASES if c.name == name)
    natten.allow_flex_compile()
    inputs = make_inputs(case, torch.float16, "cuda")
    with pytest.raises(RuntimeError, match="allow_flex_compile_backprop"):
        run(case, inputs, "flex-fna", torch_compile=True)
    natten.allow_flex_compile_backprop()
    check_problem(case, "flex", torch.float16, "cuda", torch_compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_listed_tiles_compile_on_a_gpu(rank, head_dim):
    tokens, window = ((300,), (20, 18), (9, 10, 9))[rank - 1], (7, 5, 3)[:rank]
    case = Case("tiles", tokens, window, head_dim=head_dim, additional=3)
    inputs = make_inputs(case, torch.float16, "cuda")
    natten.allow_flex_compile(backprop=True)
    tensors = inputs.query, inputs.key, inputs.value
    for q_tile, kv_tile in natten.get_configs_for_flex_fna(*tensors):
        tiles = {"q_tile_shape": q_tile, "kv_tile_shape": kv_tile}
        check_problem(case, "flex", torch.float16, "cuda", torch_compile=True, **tiles)
