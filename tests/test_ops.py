"""The operators under torch's transforms, compilers, autocast and gradcheck."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import Case
from checks import make_inputs, run
from torch.autograd import forward_ad, gradcheck
from torch.library import opcheck

import natten
from natten.functional import operators
from natten.functional.neighborhood import packed_attention

OPERATOR = torch.ops.natten.neighborhood_attention.default
NUM_TENSORS = 12
BACKWARD = torch.ops.natten.neighborhood_attention_backward.default


def arguments(requires_grad=True, everything=True):
    """The operator's arguments for a small 2-D problem."""
    query, key, value = (torch.randn(1, 6, 5, 2, 8, requires_grad=requires_grad) for _ in range(3))
    extras = [None] * 4
    others = [None] * 3
    if everything:
        others = [torch.tensor([2]), torch.rand(1, 6, 5) < 0.8, torch.rand(1, 6, 5) < 0.8]
        extras = [
            torch.randn(2, 5, 5, requires_grad=requires_grad),
            *(torch.randn(1, 3, 2, 8, requires_grad=requires_grad) for _ in range(2)),
            torch.randn(2, requires_grad=requires_grad),
        ]
    window = [3, 3, 1, 2, 1, 1, 0, 0]
    softcap = 1.5 if everything else 0.0
    parameters = (0, window, 0.3, softcap, 0, 0, "reference", "", requires_grad)
    return (query, key, value, *extras, None, None, *others, *parameters)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_forward(requires_grad, everything):
    opcheck(OPERATOR, arguments(requires_grad, everything))


@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck_backward(with_lse):
    given = arguments(requires_grad=False)
    out, lse = OPERATOR(*given)
    grads = (torch.randn_like(out), torch.randn_like(lse) if with_lse else None)
    needs = [True, True, False, True, False, True, True]
    opcheck(BACKWARD, (*grads, *given[:NUM_TENSORS], out, lse, *given[NUM_TENSORS:], needs))


def packed_arguments(requires_grad=True, bias=True, heads_kv=1, qkv_needs=True):
    """The operator's arguments for a small 2-D problem whose heads are in one tensor."""
    qkv = torch.randn(1, 6, 5, 2 + 2 * heads_kv, 8, requires_grad=requires_grad and qkv_needs)
    rpb = torch.randn(2, 5, 5, requires_grad=requires_grad) if bias else None
    window = [3, 3, 1, 2, 1, 1, 0, 0, 7, 5, 1, 0, 1, 0]
    parameters = (heads_kv, window, 0.3, 0.0, 0, 0, "reference", "", requires_grad)
    return (qkv, None, None, rpb, *[None] * 8, *parameters)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_packed(requires_grad, bias):
    opcheck(OPERATOR, packed_arguments(requires_grad, bias))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_packed_backward(needs):
    given = packed_arguments(requires_grad=False)
    out, lse = OPERATOR(*given)
    grads = (torch.randn_like(out), torch.randn_like(lse) if all(needs) else None)
    needs = [needs[0], False, False, needs[1], False, False, False]
    opcheck(BACKWARD, (*grads, *given[:NUM_TENSORS], out, lse, *given[NUM_TENSORS:], needs))


@pytest.mark.parametrize("backend", ["reference", "cpu", "flex-fna"])
def test_packed_equals_three_tensors(backend):
    if backend == "cpu":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    # FlexAttention has no backward pass on the CPU, and this library gives it no bias.
    differentiates = backend != "flex-fna"
    qkv = torch.randn(2, 6, 5, 8, 16, requires_grad=differentiates)
    rpb = torch.randn(4, 5, 5, requires_grad=True) if differentiates else None
    window = {
        "kernel_size": (3, 3),
        "stride": (1, 2),
        "dilation": (2, 1),
        "is_causal": (False,) * 2,
    }
    packed = packed_attention(qkv, 2, **window, rpb=rpb, backend=backend)
    query, key, value = qkv.split([4, 2, 2], -2)
    parts = natten.na2d(query, key, value, **window, rpb=rpb, backend=backend, return_lse=True)
    for a, b in zip(packed, parts):
        assert a.equal(b)
    if differentiates:
        sums = [out.sin().sum() + lse.cos().sum() for out, lse in (packed, parts)]
        for a, b in zip(*[torch.autograd.grad(total, (qkv, rpb)) for total in sums]):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_packed_under_transforms():
    torch.manual_seed(0)
    qkv = torch.randn(1, 6, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def function(qkv, rpb):
        out, lse = packed_attention(qkv, 1, (3, 3), (1, 1), (2, 1), (False, False), rpb=rpb)
        return out, lse

    assert gradcheck(function, (qkv, rpb), fast_mode=True)

    def loss(qkv):
        out, lse = function(qkv, rpb.detach())
        return out.sin().sum() + lse.sum()

    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    torch.testing.assert_close(torch.func.grad(loss)(qkv.detach()), expected)
    batch = torch.stack([qkv.detach(), 2 * qkv.detach()])
    with pytest.warns(UserWarning, match="performance drop"):
        got = torch.vmap(lambda t: function(t, rpb.detach())[0])(batch)
    torch.testing.assert_close(got[1], function(batch[1], rpb)[0].detach())


@pytest.mark.parametrize("dynamic", [True, False])
def test_packed_compiles(dynamic):
    torch._dynamo.reset()

    def function(qkv, rpb):
        out, lse = packed_attention(qkv, 1, (3, 3), (1, 1), (1, 1), (False, False), rpb=rpb)
        return out.sin().sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    for length in (6, 8, 11):
        qkv = torch.randn(1, length, 7, 4, 8, requires_grad=True)
        got, expected = compiled(qkv, rpb), function(qkv, rpb)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(value, (qkv, rpb)) for value in (got, expected)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_autocast(dtype):
    qkv = torch.randn(1, 6, 5, 4, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out, _ = packed_attention(qkv, 1, (3, 3), (1, 1), (1, 1), (False, False), rpb=rpb)
        assert out.dtype == dtype
        assert operators.neighborhood_attention(*packed_arguments())[0].dtype == dtype
    out.float().sum().backward()
    assert qkv.grad.dtype == rpb.grad.dtype == torch.float32


GRADCHECKS = [
    Case("plain", (4, 5), (3, 3), heads=2, heads_kv=1, head_dim=3, head_dim_v=2, batch=1),
    Case("window", (7,), (3,), (2,), (2,), (False,), heads=1, head_dim=2, batch=2),
    Case("causal", (5, 3), (3, 3), (2, 1), is_causal=(True, False), heads=1, head_dim=2, batch=1),
    Case("all", (4, 3), (3, 2), rpb=True, additional=2, heads=2, head_dim=2, batch=1),
    Case("lengths", (4, 3), (3, 2), additional=3, additional_lengths=(2, 0), heads=2, heads_kv=1,
         head_dim=2),
    Case("boxes", (3,), (4,), grid=(9,), query_origin=(5,), key_tokens=(4,), key_origin=(4,),
         heads=1, head_dim=2, batch=1),
    Case("attention", (4,), None, key_tokens=(6,), heads=2, heads_kv=1, head_dim=2, batch=1),
    Case("varlen", (5,), None, batch=1, heads=1, head_dim=2, lengths_q=(2, 3), key_tokens=(4,),
         lengths_kv=(3, 1), is_causal=(True,)),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck(case):
    inputs = make_inputs(case, torch.float64)
    names = list(inputs.tensors())

    def function(*tensors):
        leaves = type(inputs)(**dict(zip(names, tensors)))
        out, lse = run(case, leaves, "reference")
        return out, lse

    assert gradcheck(function, tuple(inputs.tensors().values()), fast_mode=case.name == "all")


def test_gradients_through_lse_alone_and_frozen_inputs():
    query, key, value = (torch.randn(1, 9, 1, 4, dtype=torch.float64) for _ in range(3))
    key.requires_grad_()
    value.requires_grad_()
    _, lse = natten.na1d(query, key, value, 3, return_lse=True)
    lse.sum().backward()
    assert query.grad is None
    assert float(key.grad.abs().sum()) > 0
    assert float(value.grad.abs().sum()) == 0


def loss(query, key, value):
    out, lse = natten.na2d(query, key, value, 3, dilation=(1, 2), return_lse=True)
    return (out.sin().sum() + lse.square().sum()).float()


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (6, 8, 11):
        inputs = [torch.randn(2, length, 7, 2, 8, requires_grad=True) for _ in range(3)]
        got = compiled(*inputs)
        expected = loss(*inputs)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(value, inputs) for value in (got, expected)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)


def test_compile_everything():
    """Every argument, attention and a merge in one graph."""
    torch._dynamo.reset()

    def function(query, context, lengths, rpb):
        out, lse = natten.na2d(
            query,
            query,
            query,
            kernel_size=(3, 5),
            scale=0.2,
            additional_keys=context,
            additional_values=context,
            additional_lengths=lengths,
            rpb=rpb,
            return_lse=True,
            q_tile_shape=(8, 8),
            kv_tile_shape=(8, 8),
            backend="reference",
        )
        flat = query.flatten(1, 2)
        branch = natten.attention(flat, flat, flat, is_causal=True, return_lse=True)
        merged = natten.merge_attentions(
            [out.flatten(1, 2), branch[0]], [lse.flatten(1, 2), branch[1]]
        )
        return merged + natten.na1d(flat, flat, flat, flat.shape[1])

    query = torch.randn(2, 6, 7, 2, 8, requires_grad=True)
    context = torch.randn(2, 3, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 9, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([3, 1], dtype=torch.int32)
    inputs = (query, context, lengths, rpb)
    got, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(t.sin().sum(), (query, context, rpb)) for t in (got, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_compile_raises_for_bad_arguments():
    compiled = torch.compile(lambda q: natten.na2d(q, q, q, 9), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="kernel_size"):
        compiled(torch.randn(1, 6, 7, 2, 8))


def test_vmap():
    query, key, value = (torch.randn(3, 1, 6, 5, 2, 8) for _ in range(3))
    with pytest.warns(UserWarning, match="performance drop"):
        got = torch.vmap(lambda q, k, v: natten.na2d(q, k, v, 3))(query, key, value)
    expected = torch.stack([natten.na2d(*t, 3) for t in zip(query, key, value)])
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_grad_and_jacrev():
    query, key = torch.randn(2, 1, 6, 5, 1, 4)

    def function(q):
        return natten.na2d(q, key, key, 3).sin().sum((1, 2, 3))

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: function(q).sum())(query), expected)
    jacobian = torch.func.jacrev(function)(query)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(function, query))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients():
    """vmap over a backward pass whose forward pass no transform has seen."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 6, 5, 4, 8, requires_grad=True)
    query, key, value = (t.detach().requires_grad_() for t in qkv.split([2, 1, 1], -2))
    packed = packed_attention(qkv, 1, (3, 3), (1, 1), (1, 1), (False, False))[0]
    parts = natten.na2d(query, key, value, 3)
    for out, leaves in ((packed, [qkv]), (parts, [query, key, value])):
        grads = torch.randn(3, *out.shape)
        got = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]
        for a, b in zip(got, zip(*each)):
            torch.testing.assert_close(a, torch.stack(b))


def test_a_forward_mode_level_without_tangents_changes_nothing():
    query = torch.randn(1, 6, 5, 1, 4)
    with forward_ad.dual_level():
        out = natten.na2d(query, query, query, 3)
    assert out.equal(natten.na2d(query, query, query, 3))


def test_meta_and_fake():
    from torch._subclasses import FakeTensorMode

    query = torch.empty(2, 64, 48, 6, 32, device="meta", requires_grad=True)
    kv = torch.empty(2, 64, 48, 3, 32, device="meta")
    out, lse = natten.na2d(query, kv, kv[..., :24], 7, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 64, 48, 6, 24), (2, 64, 48, 6))
    assert lse.dtype == torch.float32
    out.sum().backward()
    assert query.grad.shape == query.shape
    assert natten.attention(*(torch.empty(1, 5, 2, 8, device="meta"),) * 3).is_meta
    with FakeTensorMode():
        fake = torch.empty(1, 9, 2, 8)
        assert natten.na1d(fake, fake, fake, 3).shape == fake.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    query = torch.randn(1, 6, 5, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    flat = query.flatten(1, 2)
    with torch.autocast("cpu", dtype):
        # As scaled_dot_product_attention: mixed inputs are cast, float64 is left alone.
        out = natten.na2d(query, query.to(dtype), query, 3, rpb=rpb)
        assert out.dtype == dtype
        assert natten.attention(flat, flat, flat).dtype == dtype
        double = flat.double()
        assert natten.attention(double, double, double).dtype == torch.float64
        assert operators.neighborhood_attention(*arguments())[0].dtype == dtype
    out.float().sum().backward()
    assert query.grad.dtype == rpb.grad.dtype == torch.float32


def test_bias_of_another_dtype():
    query = torch.randn(1, 6, 5, 2, 8).half().requires_grad_()
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    natten.na2d(query, query, query, 3, rpb=rpb, backend="reference").float().sum().backward()
    assert rpb.grad.dtype == torch.float32
    assert query.grad.dtype == torch.float16


def test_torch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    query = torch.randn(1, 9, 2, 8, requires_grad=True)
    with Record():
        natten.na1d(query, query, query, 3).sum().backward()
    assert OPERATOR in seen
    assert BACKWARD in seen


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    query = torch.randn(1, 9, 2, 8, requires_grad=True)

    def block(q):
        return natten.na1d(q, q, q, 3).sin()

    (expected,) = torch.autograd.grad(block(query).sum(), query)
    (got,) = torch.autograd.grad(checkpoint(block, query, use_reentrant=False).sum(), query)
    assert got.equal(expected)


@pytest.mark.filterwarnings("ignore")
def test_trace_does_not_record_constants():
    """The deprecated tracer records the operator, and not a kernel's result."""
    traced = torch.jit.trace(
        lambda q: natten.na1d(q, q, q, 3, is_causal=True), torch.randn(1, 9, 2, 8)
    )
    assert "natten::neighborhood_attention_traced" in str(traced.graph)
    query = torch.randn(1, 9, 2, 8, requires_grad=True)
    expected = natten.na1d(query, query, query, 3, is_causal=True)
    torch.testing.assert_close(traced(query), expected)
    grads = [torch.autograd.grad(out.sum(), query)[0] for out in (traced(query), expected)]
    torch.testing.assert_close(*grads)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, query):
            return natten.na1d(query, query, query, 3)

    query = torch.randn(1, 9, 2, 8)
    program = torch.export.export(Module(), (query,))
    assert any("neighborhood_attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(query), natten.na1d(query, query, query, 3))


def test_import_is_light():
    # What torch itself imports is not ours to answer for.
    code = (
        "import sys, torch; before = set(sys.modules); import natten; "
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "heavy = added & {'triton', 'numba', 'timm', 'matplotlib', 'torchvision'}; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_log_level_from_the_environment():
    code = "import logging, natten; print(logging.getLogger('natten').level)"
    environment = {**os.environ, "NATTEN_LOG_LEVEL": "debug"}
    run_ = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert run_.stdout.strip() == "10"
