"""How many of the additional keys each batch entry has: against calls of one entry each."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten.functional import operators

LENGTHS = [4, 0, 6, 1]
BACKENDS = ["reference", "cpu", "flex-fna"]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def tensors(requires_grad=False):
    """query, key, value, additional keys and values."""
    torch.manual_seed(0)
    shapes = [(4, 7, 6, 4, 8), (4, 7, 6, 2, 8), (4, 7, 6, 2, 8), (4, 6, 2, 8), (4, 6, 2, 8)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [t.requires_grad_(requires_grad) for t in made]


def attend(given, lengths, **arguments):
    query, key, value, *context = given
    return natten.na2d(
        query, key, value, (3, 5), dilation=(2, 1), return_lse=True,
        additional_keys=context[0], additional_values=context[1],
        additional_lengths=lengths, **arguments,
    )  # fmt: skip


def one_by_one(given):
    """Every batch entry by itself, with a context cut to its length."""
    results = []
    for entry, length in enumerate(LENGTHS):
        *grids, keys, values = (t[entry : entry + 1] for t in given)
        results.append(attend([*grids, keys[:, :length], values[:, :length]], None))
    return [torch.cat(part) for part in zip(*results)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_are_those_of_shorter_contexts(backend):
    if backend == "cpu":
        pytest.importorskip("numba")
    backward = backend != "flex-fna"
    given = tensors(requires_grad=backward)
    got = attend(given, torch.tensor(LENGTHS), backend=backend)
    expected = one_by_one(given)
    assert_close(got, tuple(expected))
    if backward:
        grads = [
            torch.autograd.grad(out.sin().sum() + lse.cos().sum(), given)
            for out, lse in (got, expected)
        ]
        assert_close(*grads)
        for grad in grads[0][3:]:
            for entry, length in enumerate(LENGTHS):
                assert not grad[entry, length:].any()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_and_layouts(backend, dtype):
    if backend == "cpu":
        pytest.importorskip("numba")
    given = tensors()
    lengths = torch.tensor(LENGTHS, dtype=dtype).repeat_interleave(2)[::2]
    assert not lengths.is_contiguous()
    assert_close(attend(given, lengths, backend=backend), tuple(one_by_one(given)))


@pytest.mark.parametrize("backend", ["reference", "cpu", "flex"])
def test_the_operator_cuts_what_nobody_checked(backend):
    if backend == "cpu":
        pytest.importorskip("numba")
    backward = backend != "flex"
    query, key, value, *context = tensors(requires_grad=backward)
    parameters = (0, [3, 5, 1, 1, 2, 1, 0, 0], 0.3, 0.0, 0, 0, backend, "", backward)

    def call(lengths):
        return operators.neighborhood_attention(
            query,
            key,
            value,
            None,
            *context,
            None,
            None,
            None,
            torch.tensor(lengths),
            None,
            None,
            *parameters,
        )

    got, expected = call([-3, 2**40, 2, 7]), call([0, 6, 2, 6])
    assert_close(got, expected)
    if not backward:
        return
    inputs = (query, key, value, *context)
    grads = [
        torch.autograd.grad(out.sin().sum() + lse.sum(), inputs) for out, lse in (got, expected)
    ]
    assert_close(*grads)


def test_full_window_and_empty_context():
    query, key, value, *context = tensors()
    lengths = torch.tensor(LENGTHS)
    got = natten.na2d(
        query, key, value, (7, 6), additional_keys=context[0], additional_values=context[1],
        additional_lengths=lengths,
    )  # fmt: skip
    keys = torch.cat([key.flatten(1, 2), context[0]], 1).transpose(1, 2)
    values = torch.cat([value.flatten(1, 2), context[1]], 1).transpose(1, 2)
    seen = torch.arange(48) < 42 + lengths[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(1, 2).transpose(1, 2), keys, values, seen[:, None, None, :], enable_gqa=True
    )
    assert_close(got.flatten(1, 2), expected.transpose(1, 2))
    none = context[0][:, :0]
    got = natten.na2d(
        query, key, value, 3, additional_keys=none, additional_values=none,
        additional_lengths=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip
    assert_close(got, natten.na2d(query, key, value, 3))


def test_separate_context_is_refused():
    given = tensors()
    lengths = torch.tensor(LENGTHS)
    kwargs = {"backend": "reference"}
    with pytest.raises(NotImplementedError, match="try_fuse_additional_kv=True"):
        attend(given, lengths, attention_kwargs=kwargs)
    got = attend(given, lengths, attention_kwargs=kwargs, try_fuse_additional_kv=True)
    assert_close(got, attend(given, lengths))


def test_explain():
    query, key, value, *context = tensors()
    context = {"additional_keys": context[0], "additional_values": context[1]}
    told = natten.explain(query, key, value, 3, **context, additional_lengths=torch.tensor(LENGTHS))
    assert told.problem.has_lengths
    assert not natten.explain(query, key, value, 3, **context).problem.has_lengths
    with pytest.raises(ValueError, match="additional_lengths"):
        natten.explain(query, key, value, 3, additional_lengths=torch.tensor(LENGTHS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_lengths_are_not_constants(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    given = tensors(requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for values in (LENGTHS, [6, 6, 0, 2]):
            lengths = torch.tensor(values)
            got, expected = compiled(given, lengths), attend(given, lengths)
            assert_close(got, expected)
            grads = [torch.autograd.grad(out.sin().sum(), given) for out, _ in (got, expected)]
            assert_close(*grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_trace_and_vmap():
    class Module(torch.nn.Module):
        def forward(self, query, key, value, keys, values, lengths):
            return attend((query, key, value, keys, values), lengths)[0]

    given = (*tensors(), torch.tensor(LENGTHS))
    other = (*given[:5], torch.tensor([1, 2, 3, 4]))
    expected = Module()(*other)
    assert_close(torch.export.export(Module(), given).module()(*other), expected)
    assert_close(torch.jit.trace(Module(), given, check_trace=False)(*other), expected)
    stacked = [torch.stack(pair) for pair in zip(given, other)]
    with pytest.warns(UserWarning, match="performance drop"):
        got = torch.vmap(Module())(*stacked)
    assert_close(got, torch.stack([Module()(*given), expected]))


def test_autocast_leaves_integers_alone():
    given = [t.float() for t in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(given, torch.tensor(LENGTHS), backend="reference")
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), attend(given, torch.tensor(LENGTHS))[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backward", [False, True])
def test_counted_operations(backward):
    given = tensors(requires_grad=backward)

    def count(lengths):
        with FlopCounterMode(display=False) as counter:
            out, _ = attend(given, lengths)
            if backward:
                out.sum().backward()
        return counter.get_total_flops()

    none, some, every = (count(torch.tensor(lengths)) for lengths in ([0] * 4, LENGTHS, [6] * 4))
    assert every == count(None)
    assert (some - none) * 6 * 4 == (every - none) * sum(LENGTHS)
    assert none < some < every


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_long_contexts_are_counted_with_narrow_integers(dtype):
    query = torch.randn(2, 4, 1, 2)
    context = torch.randn(2, 300, 1, 2)
    with FlopCounterMode(display=False) as counter:
        natten.na1d(
            query, query, query, 1, additional_keys=context, additional_values=context,
            additional_lengths=torch.tensor([3, 100], dtype=dtype),
        )  # fmt: skip
    pairs = 2 * 4 + 4 * (3 + 100)
    assert counter.get_total_flops() == 2 * pairs * (2 + 2)
