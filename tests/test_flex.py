"""FlexAttention as a backend, and the permission that compiling it needs."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, GROUPS, Case
from checks import check_problem, make_inputs, run

import natten
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
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_forward(case):
    check_problem(case, "flex", torch.float32, backward=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    check_problem(Case("dtype", (9,), (4,), additional=2), "flex", dtype, backward=False)


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
