"""What a batch entry or a packed sequence gets depends on nothing else, bit for bit: not on its
neighbors, nor on how a process is set.

Gradients of a bias are sums over the batch and are left out.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from cases import Case
from checks import Inputs, make_inputs, run
from torch import Tensor

import natten

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]
WINDOWS = [
    Case("grid", (12, 13), (5, 3), batch=3),
    Case("grid_gqa_rpb", (9, 11), (3, 4), (1, 2), (2, 1), heads=4, heads_kv=2, rpb=True, batch=3),
    Case("causal", (40,), (9,), (3,), (2,), (True,), batch=3, head_dim_v=24),
    Case("context", (20, 20), (3, 3), batch=4, additional=5, head_dim=32),
    Case("context_lengths", (16,), (3,), batch=3, additional=5, additional_lengths=(5, 0, 3)),
]
DENSE = [
    Case("full_window", (7, 7), (7, 7), batch=5, heads=4, head_dim=32),
    Case("full_window_one_head", (784,), (784,), batch=3, heads=1, head_dim=40),
    Case("full_window_causal", (33,), (33,), is_causal=(True,), batch=3, head_dim_v=32),
    Case("dense_gqa", (40,), None, batch=3, heads=4, heads_kv=2, key_tokens=(300,)),
    Case("dense_one_head", (20,), None, batch=3, heads=1, key_tokens=(600,), head_dim=64),
]


@pytest.fixture(autouse=True)
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(case: Case, backend: str, inputs: Inputs, gradients: tuple[Tensor, Tensor]):
    """Output, logsumexp and gradients, those of the bias left out."""
    leaves = inputs.to(inputs.query.dtype)
    out, lse = run(case, leaves, backend)
    wanted = [t for name, t in leaves.tensors().items() if name != "rpb"]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], wanted, gradients)]


def random_gradients(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = case.batch, *case.tokens, case.heads
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(*rows, case.head_dim_v).to(dtype), torch.randn(rows, dtype=lse_dtype)


def entries(inputs: Inputs, which: list[int]) -> Inputs:
    return Inputs(
        **{n: t if n == "rpb" else t.detach()[which] for n, t in inputs.tensors().items()}
    )


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"number {i} differs by {float((a - b).abs().max()):.3g}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS + DENSE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_alone_and_among_others(backend, case, dtype, threads):
    if case in DENSE and os.environ.get("MKL_NUM_THREADS", str(threads)) != str(threads):
        pytest.skip("MKL_NUM_THREADS makes MKL add in another order on threads that torch starts")
    torch.set_num_threads(threads)
    inputs = make_inputs(case, dtype)
    gradients = random_gradients(case, dtype)
    whole = results(case, backend, inputs, gradients)
    for b in range(case.batch):
        lengths = case.additional_lengths
        alone = replace(
            case, batch=1, additional_lengths=None if lengths is None else lengths[b : b + 1]
        )
        part = results(alone, backend, entries(inputs, [b]), tuple(g[b : b + 1] for g in gradients))
        assert_equal([t[b : b + 1] for t in whole], part)


@pytest.mark.parametrize("case", WINDOWS + DENSE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_entry(backend, case):
    for dtype in (torch.float32, torch.float16):
        inputs = make_inputs(case, dtype)
        gradients = random_gradients(case, dtype)
        clean = results(case, backend, inputs, gradients)
        spoilt = inputs.to(dtype)
        with torch.no_grad():
            spoilt.query[0, 0] = math.nan
            spoilt.value[0, -1] = math.inf
            gradients[0][0] *= 1e4
            gradients[1][0] = -math.inf
        for before, after in zip(clean, results(case, backend, spoilt, gradients), strict=True):
            assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_threads_do_not_change_windows(case, dtype):
    """Dense attention is torch's, whose matrix products do depend on them."""
    case = replace(case, heads=2 * case.heads, heads_kv=2 * case.heads_kv)
    inputs = make_inputs(case, dtype)
    gradients = random_gradients(case, dtype)
    torch.set_num_threads(1)
    expected = results(case, "cpu", inputs, gradients)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_equal(results(case, "cpu", inputs, gradients), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_separate_ones(backend, causal, dtype):
    lengths_q, lengths_kv = (1, 33, 0, 64, 200, 5), (1, 40, 7, 64, 90, 0)
    ends_q, ends_kv = (torch.tensor((0, *n)).cumsum(0).tolist() for n in (lengths_q, lengths_kv))
    for heads, heads_kv, head_dim, head_dim_v in ((1, 1, 64, 64), (4, 2, 16, 24)):
        query = torch.randn(1, sum(lengths_q), heads, head_dim).to(dtype).requires_grad_()
        key = torch.randn(1, sum(lengths_kv), heads_kv, head_dim).to(dtype).requires_grad_()
        value = torch.randn(1, sum(lengths_kv), heads_kv, head_dim_v).to(dtype).requires_grad_()
        grad = torch.randn(*query.shape[:-1], head_dim_v).to(dtype)
        call = {"is_causal": causal, "backend": backend, "return_lse": True}
        out, lse = natten.attention(
            query, key, value, **call,
            seqlens_Q=torch.tensor(lengths_q, dtype=torch.int32),
            seqlens_KV=torch.tensor(lengths_kv, dtype=torch.int32),
        )  # fmt: skip
        grad_lse = torch.randn(lse.shape).to(lse.dtype)
        packed = torch.autograd.grad([out, lse], [query, key, value], [grad, grad_lse])
        for i in range(len(lengths_q)):
            q, kv = slice(*ends_q[i : i + 2]), slice(*ends_kv[i : i + 2])
            parts = [
                t.detach()[:, s].requires_grad_() for t, s in zip((query, key, value), (q, kv, kv))
            ]
            one, one_lse = natten.attention(*parts, **call)
            alone = torch.autograd.grad([one, one_lse], parts, [grad[:, q], grad_lse[:, q]])
            assert torch.equal(one, out[:, q])
            assert torch.equal(one_lse, lse[:, q])
            assert_equal(list(alone), [g[:, s] for g, s in zip(packed, (q, kv, kv))])


@pytest.fixture
def restored_defaults():
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


SETTINGS = {
    "device": lambda: torch.set_default_device("meta"),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.usefixtures("restored_defaults")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
def test_defaults_of_torch_do_not_matter(backend, setting):
    # Plans are kept: another shape makes new ones.
    i = list(SETTINGS).index(setting)
    cases = [
        Case("defaults", (9 + i, 7), (3, 2), (1, 2), (2, 1), rpb=True, additional=3),
        Case("defaults_full", (4 + i, 5), (4 + i, 5), head_dim_v=24),
        Case("defaults_dense", (8 + i,), None, is_causal=(True,), heads=4, heads_kv=2),
    ]
    for case in cases:
        inputs = make_inputs(case, torch.float32)
        gradients = random_gradients(case, torch.float32)
        if backend == "flex":
            name = "flex-fmha" if case.is_attention else "flex-fna"

            def call(case=case, name=name, inputs=inputs):
                with torch.no_grad():
                    return list(run(case, inputs, name))

        else:

            def call(case=case, inputs=inputs, gradients=gradients):
                return results(case, backend, inputs, gradients)

        SETTINGS[setting]()
        got = call()
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        assert_equal(got, call())
