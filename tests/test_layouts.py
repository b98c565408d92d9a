"""Every layout that torch can express gives what a contiguous copy gives, whatever is around it."""

from __future__ import annotations

import zlib
from dataclasses import replace
from random import Random

import pytest
import torch
from cases import Case
from checks import Inputs, make_inputs, run
from memory import LAYOUTS, expanded, heads_innermost, overlapping, permuted
from torch import Tensor

from natten.functional.backends.cpu import dense

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-10,
    torch.bfloat16: 0.06,
    torch.float16: 0.01,
}
CASES = [
    Case("window", (11,), (3,), head_dim=8),
    Case("grid_dilated", (6, 7), (3, 2), (2, 1), (1, 3), (False, True), head_dim=12, head_dim_v=8),
    Case("grid_gqa_rpb", (5, 6), (3, 3), heads=4, heads_kv=2, rpb=True, head_dim_v=24),
    Case("cube_context", (3, 4, 5), (3, 3, 3), additional=3, additional_lengths=(3, 1)),
    Case("context_gqa", (7,), (3,), heads=4, heads_kv=2, additional=5, head_dim_v=8),
    Case("full_window", (5, 6), (5, 6), head_dim_v=32),
    Case("full_window_narrow_value", (40,), (40,), head_dim=32, head_dim_v=8),
    Case("full_window_causal", (35,), (35,), is_causal=(True,), head_dim_v=40),
    Case("one_token", (1, 1), (1, 1), head_dim=8, head_dim_v=1),
    Case("one_head", (1, 6), (1, 3), batch=1, heads=1, head_dim=1),
    Case("dense_gqa", (13,), None, heads=4, heads_kv=2, head_dim_v=24, key_tokens=(1,)),
    Case("dense_causal", (33,), None, head_dim=1, head_dim_v=3, is_causal=(True,)),
    Case("packed", (30,), None, batch=1, key_tokens=(26,), lengths_q=(9, 0, 20, 1),
         lengths_kv=(9, 3, 13, 1), head_dim_v=24),
    Case("box", (4, 3), (3, 3), grid=(9, 5), query_origin=(3, 1), key_tokens=(6, 4),
         key_origin=(1, 0), head_dim_v=8),
]  # fmt: skip


def check(case: Case, backend: str, dtype: torch.dtype, layouts, seed: int, backward: bool):
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def laid_out(values: Tensor) -> Tensor:
        if not values.numel():
            return values
        return random.choice(layouts)(values, random)

    plain = make_inputs(case, dtype)
    tensors = {n: laid_out(t.detach()) for n, t in plain.tensors().items()}
    if case.additional_lengths is not None:
        # What nobody has may hold anything, but rows that share memory hold the same.
        for name in ("additional_keys", "additional_values"):
            tensors[name] = permuted(plain.tensors()[name].detach(), random)
    rows = case.batch, *case.tokens, case.heads
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_out = laid_out(torch.randn(*rows, case.head_dim_v, generator=generator).to(dtype))
    grad_lse = laid_out(torch.randn(rows, generator=generator).to(lse_dtype))
    results = []
    for name in (backend, "reference"):
        exact = name == "reference" and results
        leaves = {
            n: (t.clone(memory_format=torch.contiguous_format).double() if exact else t)
            .detach()
            .requires_grad_(backward)
            for n, t in tensors.items()
        }
        out, lse = run(case, Inputs(**leaves), name)
        found = [out.detach(), lse.detach()]
        if backward:
            given = [grad_out.to(out.dtype), grad_lse.to(lse.dtype)]
            if exact:
                given = [t.clone(memory_format=torch.contiguous_format) for t in given]
            found += torch.autograd.grad([out, lse], list(leaves.values()), given)
        results.append(found)
    for i, (got, right) in enumerate(zip(*results, strict=True)):
        limit = TOLERANCE[dtype] * (1 + float(right.nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(
            got.double(), right, rtol=0, atol=limit, msg=lambda m, i=i: f"{case} number {i}: {m}"
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_layout_for_all(case, layout):
    seed = zlib.crc32(f"{case} {layout.__name__}".encode())
    check(case, "cpu", TYPES[seed % 4], [layout], seed, True)
    check(case, "cpu", torch.float32, [layout], seed + 1, True)
    check(case, "reference", torch.float32, [layout], seed, True)


@pytest.mark.parametrize("seed", range(60))
def test_any_layouts_together(seed):
    for case in CASES[seed % 2 :: 2]:
        check(case, "cpu", TYPES[seed // 2 % 4], LAYOUTS, seed, True)


@pytest.mark.parametrize("name", ["grid_gqa_rpb", "cube_context", "full_window"])
def test_flex(name):
    case = next(c for c in CASES if c.name == name)
    for layout in LAYOUTS:
        check(case, "flex-fna", torch.float32, [layout], 0, False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_long_dense_attention(dtype, causal):
    """More than a block of torch's operator, and both orders of head_dim and head_dim_v."""
    for head_dim, head_dim_v in ((32, 64), (64, 32), (40, 40)):
        case = Case(
            "long", (200,), None, batch=1, key_tokens=(530,), head_dim=head_dim,
            head_dim_v=head_dim_v, is_causal=(causal,),
        )  # fmt: skip
        for layout in (heads_innermost, expanded, overlapping):
            check(case, "cpu", dtype, [layout], head_dim, True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, 1e-45, 30.0])
def test_scales_of_dense_attention(scale):
    for case in CASES:
        if case.kernel_size in (None, case.tokens):
            # Of the order of its values, whose error it multiplies.
            check(replace(case, scale=scale, magnitude=0.3), "cpu", torch.float64, [permuted], 0,
                  True)  # fmt: skip


def test_small_gradients_of_the_logsumexp_survive_16_bits():
    """They are float32 numbers, though the operator is told of them by columns of 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        query, key, value = (torch.randn(1, 30, 2, 16).to(dtype) for _ in range(3))
        for size in (1e-7, 1e-3, 1.0, 3e4):
            grads = []
            for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
                x, y, z = (t.to(kind).requires_grad_() for t in (query, key, value))
                _, lse = run(Case("lse", (30,), None, batch=1), Inputs(x, y, z), backend)
                grad = torch.linspace(-size, size, lse.numel()).view(lse.shape).to(lse.dtype)
                # Large enough not to vanish in the gradients of the query themselves.
                (g,) = torch.autograd.grad(lse, x, grad)
                grads.append(g.double())
            error = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
            floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            allowed = 0.02 + float(floor / grads[1].abs().max())
            assert float(error) <= allowed, (dtype, size, float(error))


def test_dense_attention_is_what_is_tested():
    """The cases above reach torch's operator."""
    from natten.functional.problem import Problem

    problem = Problem(
        1, (8,), (8,), 2, 2, 16, 16, (8,), (1,), (1,), (False,), (8,), (0,), (0,), 0.25
    )
    assert dense.covers(problem)
    assert dense.tame(problem, *(torch.randn(1, 8, 2, 16) for _ in range(4))) == [True]
    causal = replace(problem, is_causal=(True,))
    assert dense.covers(causal)
    for scale in (0.0, -0.25, 1e-45):
        assert not dense.covers(replace(causal, scale=scale))
