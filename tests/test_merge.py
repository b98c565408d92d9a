"""merge_attentions: values, exact gradients, branches that saw nothing."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import natten
from natten.functional import merge


def branches(count, dtype=torch.float64, shape=(2, 5, 3, 4), requires_grad=True):
    outputs = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(count)]
    lses = [torch.randn(shape[:-1], dtype=dtype, requires_grad=requires_grad) for _ in range(count)]
    return outputs, lses


@pytest.mark.parametrize("count", [2, 3, 5])
def test_is_attention_over_all_keys(count):
    query, key, value = (torch.randn(2, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    expected = natten.attention(query, key, value, return_lse=True)
    parts = [
        natten.attention(query, k, v, return_lse=True)
        for k, v in zip(key.tensor_split(count, 1), value.tensor_split(count, 1))
    ]
    got = natten.merge_attentions(*zip(*parts), return_lse=True)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    inputs = (query, key, value)
    grads = [
        torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs)
        for out, lse in (got, expected)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_gradcheck(count):
    outputs, lses = branches(count)

    def function(*tensors):
        return natten.merge_attentions(tensors[:count], tensors[count:], return_lse=True)

    assert gradcheck(function, (*outputs, *lses))


def test_gradients_where_a_branch_saw_nothing():
    outputs, lses = branches(3)
    with torch.no_grad():
        lses[0][0] = -torch.inf
        outputs[0][0] = torch.nan  # what an undefined output may hold
        for lse in lses:
            lse[1, 2] = -torch.inf
    out, lse = natten.merge_attentions(outputs, lses, return_lse=True)
    assert bool(out.isfinite().all())
    assert not bool(out[1, 2].any())
    assert bool((lse[1, 2] == -torch.inf).all())
    rest = natten.merge_attentions(outputs[1:], lses[1:], return_lse=True)
    torch.testing.assert_close(out[0], rest[0][0])
    torch.testing.assert_close(lse[0], rest[1][0])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    gradients = torch.autograd.grad(out.sin().sum() + finite.sum(), [*outputs, *lses])
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert not bool(gradients[0][0].any())
    assert not bool(gradients[3][0].any())


def test_precision_and_dtype():
    outputs, lses = branches(2, torch.bfloat16, requires_grad=False)
    lses = [lse.float() * 30 for lse in lses]
    out, lse = natten.merge_attentions(outputs, lses, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = natten.merge_attentions([o.double() for o in outputs], [l.double() for l in lses])
    assert float((out.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())
    assert isinstance(natten.merge_attentions(outputs, lses), torch.Tensor)


def test_large_lse_does_not_overflow():
    outputs, _ = branches(2, requires_grad=False)
    lses = [torch.full((2, 5, 3), 1e4), torch.full((2, 5, 3), -1e4)]
    out, lse = natten.merge_attentions(outputs, lses, return_lse=True)
    torch.testing.assert_close(out, outputs[0].float().to(out.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, lses[0])


def test_non_contiguous():
    outputs, lses = branches(2, shape=(2, 6, 3, 4), requires_grad=False)
    strided = [o.transpose(1, 2).contiguous().transpose(1, 2) for o in outputs]
    expected = natten.merge_attentions(outputs, lses)
    assert natten.merge_attentions(strided, lses).equal(expected)


def test_under_compile():
    torch._dynamo.reset()
    outputs, lses = branches(3)

    def function(outputs, lses):
        out, lse = natten.merge_attentions(outputs, lses, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(outputs, lses), [*outputs, *lses]) for f in (compiled, function)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_missing_compiler_does_not_matter(monkeypatch, caplog):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    outputs, lses = branches(2, requires_grad=False)
    fused = merge._Fused()
    for _ in range(2):
        got = fused(outputs, lses)
        torch.testing.assert_close(got[0], natten.merge_attentions(outputs, lses))
    assert caplog.text.count("no compiler here") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, l: (o[:1], l[:1]), "at least 2"),
        (lambda o, l: (o, l[:1]), "same length"),
        (lambda o, l: (o[0], l), "must be lists"),
        (lambda o, l: ([o[0], o[1][0]], l), r"outputs\[1\] must have 4 dimensions"),
        (lambda o, l: (o, [l[0], l[1][0]]), r"lse_tensors\[1\] must have 3 dimensions"),
        (lambda o, l: ([o[0], o[1][:, :3]], l), r"outputs\[1\] must match outputs\[0\]"),
        (lambda o, l: ([o[0], o[1].float()], l), r"outputs\[1\] must match outputs\[0\]"),
        (lambda o, l: (o, [l[0], l[1][:, :3]]), r"lse_tensors\[1\] must have shape"),
        (lambda o, l: ([o[0], o[1].to("meta")], l), "must be on cpu"),
        (lambda o, l: ([o[0], None], l), r"outputs\[1\] must be a torch.Tensor"),
    ],
)
def test_bad_arguments(change, message):
    outputs, lses = branches(2, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        natten.merge_attentions(*change(outputs, lses))


@pytest.mark.parametrize("flag", ["torch_compile", "return_lse", "use_autograd_fix"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_flags_are_bools(flag, value):
    with pytest.raises(ValueError, match=f"{flag} must be a bool"):
        natten.merge_attentions(*branches(2, requires_grad=False), **{flag: value})


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_one_tensor_is_not_taken_for_two(batch):
    """Programs for versions that return a pair do not go on with the entries of the batch."""
    outputs, lses = branches(2, shape=(batch, 5, 3, 4))
    with pytest.raises(ValueError, match="return_lse=True for output and logsumexp"):
        out, lse = natten.merge_attentions(outputs, lses)
    with pytest.raises(ValueError, match="return_lse=True"):
        out, _ = natten.merge_attentions(
            outputs=outputs, lse_tensors=lses, torch_compile=False, use_autograd_fix=True
        )
    options = {"torch_compile": True}
    with pytest.raises(ValueError, match="return_lse=True"):
        out, _ = natten.functional.merge_attentions(*(outputs, lses), **options)
    out, lse = natten.merge_attentions(outputs, lses, return_lse=True)
    # What is not unpacked at once is a tensor like any other.
    entries = list(natten.merge_attentions(outputs, lses))
    assert len(entries) == batch
    assert entries[0].equal(out[0])
    first, shape = natten.merge_attentions(outputs, lses)[0], lse.shape
    assert first.equal(out[0])
    assert shape == (batch, 5, 3)


def test_autograd_fix_changes_nothing():
    """Neither gradients nor, as versions did that had to, the outputs of the branches."""
    outputs, lses = branches(2)
    before = [t.detach().clone() for t in (*outputs, *lses)]
    grads = []
    for fix in (True, False):
        out, lse = natten.merge_attentions(outputs, lses, use_autograd_fix=fix, return_lse=True)
        grads.append(torch.autograd.grad(out.sin().sum() + lse.cos().sum(), [*outputs, *lses]))
    assert all(a.equal(b) for a, b in zip(*grads))
    assert all(a.equal(b) for a, b in zip(before, (*outputs, *lses)))


@pytest.mark.gpu
def test_fused_on_a_gpu():
    shape = (1, 4096, 8, 64)
    outputs, lses = branches(3, torch.float32, shape)
    inputs = [t.detach().cuda().requires_grad_() for t in (*outputs, *lses)]
    results = []
    for fuse in (True, False):
        out, lse = natten.merge_attentions(inputs[:3], inputs[3:], fuse, return_lse=True)
        results.append([out, *torch.autograd.grad(out.sin().sum() + lse.sum(), inputs)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
