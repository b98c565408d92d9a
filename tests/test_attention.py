"""attention and neighborhood attention's ways to it."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten.functional import dispatch, neighborhood
from natten.utils.varlen import generate_varlen_parameters


def qkv(queries=11, keys=11, heads=2, heads_kv=2, dim=8, dim_v=8, batch=2):
    shapes = ((queries, heads, dim), (keys, heads_kv, dim), (keys, heads_kv, dim_v))
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


def sdpa(query, key, value, **options):
    heads_first = (t.transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(11, 11), (7, 13), (13, 7), (1, 9)])
def test_is_scaled_dot_product_attention(lengths, is_causal):
    query, key, value = qkv(*lengths, heads=4, heads_kv=2, dim_v=3)
    got = natten.attention(query, key, value, is_causal=is_causal, scale=0.3)
    mask = torch.ones(lengths, dtype=torch.bool).tril() if is_causal else None
    expected = sdpa(query, key, value, scale=0.3, enable_gqa=True, attn_mask=mask)
    torch.testing.assert_close(got, expected)


def test_scale_by_position():
    query, key, value = qkv()
    torch.testing.assert_close(
        natten.attention(query, key, value, 0.1), natten.attention(query, key, value, scale=0.1)
    )


def test_lse():
    query, key, value = qkv()
    _, lse = natten.attention(query, key, value, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_varlen():
    lengths_q, lengths_kv = [4, 0, 6], [5, 2, 3]
    query, key, value = qkv(10, 10, batch=1)
    seqlens = [torch.tensor(n, dtype=torch.int32) for n in (lengths_q, lengths_kv)]
    got = natten.attention(query, key, value, seqlens_Q=seqlens[0], seqlens_KV=seqlens[1])
    parts = [
        natten.attention(q, k, v)
        for q, k, v in zip(
            query.split(lengths_q, 1), key.split(lengths_kv, 1), value.split(lengths_kv, 1)
        )
    ]
    torch.testing.assert_close(got, torch.cat(parts, 1))
    cumulative_q, cumulative_kv, max_q, max_kv = generate_varlen_parameters(
        query, key, value, *seqlens
    )
    assert cumulative_q.tolist() == [0, 4, 4, 10]
    assert cumulative_kv.tolist() == [0, 5, 7, 10]
    assert cumulative_q.dtype == torch.int32
    assert (max_q, max_kv) == (6, 5)
    again = natten.attention(
        query,
        key,
        value,
        cumulative_seqlen_Q=cumulative_q,
        cumulative_seqlen_KV=cumulative_kv,
        max_seqlen_Q=max_q,
        max_seqlen_KV=max_kv,
    )
    assert again.equal(got)


def test_varlen_all_empty():
    query, key, value = qkv(5, 5, batch=1)
    ends = torch.zeros(3, dtype=torch.int32)
    out, lse = natten.attention(
        query,
        key,
        value,
        cumulative_seqlen_Q=ends,
        cumulative_seqlen_KV=ends,
        max_seqlen_Q=0,
        max_seqlen_KV=0,
        return_lse=True,
    )
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
    assert generate_varlen_parameters(query, key, value, None, None) == (None, None, 0, 0)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlens_Q": int32(10)}, "seqlens_Q and seqlens_KV must both"),
        ({"seqlens_Q": int32(11), "seqlens_KV": int32(10)}, "seqlens_Q must sum to at most"),
        ({"seqlens_Q": int32(12, -2), "seqlens_KV": int32(4, 6)}, "lengths of at least 0"),
        ({"seqlens_Q": int32(5, 5), "seqlens_KV": int32(10)}, "one length for each sequence"),
        ({"seqlens_Q": [10], "seqlens_KV": [10]}, "seqlens_Q must be a torch.Tensor"),
        (
            {"seqlens_Q": int32(10).long(), "seqlens_KV": int32(10)},
            "seqlens_Q must be a 1-D tensor of int32",
        ),
        ({"cumulative_seqlen_Q": int32(0, 10)}, "cumulative_seqlen_KV must both"),
        (
            {"cumulative_seqlen_Q": int32(0, 10), "cumulative_seqlen_KV": int32(0, 10)},
            "max_seqlen_Q and max_seqlen_KV must be given",
        ),
        (
            {
                "cumulative_seqlen_Q": int32(0, 10),
                "cumulative_seqlen_KV": int32(0, 3, 10),
                "max_seqlen_Q": 10,
                "max_seqlen_KV": 7,
            },
            "must have the same length",
        ),
        ({"max_seqlen_Q": 10}, "must both be tensors"),
        (
            {"seqlens_Q": int32(4, 6), "seqlens_KV": int32(5, 5), "max_seqlen_Q": 5},
            "max_seqlen_Q must be at least the longest sequence 6, got 5",
        ),
        (
            {"seqlens_Q": int32(4, 6), "seqlens_KV": int32(5, 5), "max_seqlen_KV": 0},
            "max_seqlen_KV must be at least the longest sequence 5, got 0",
        ),
        (
            {"seqlens_Q": int32(4, 6), "seqlens_KV": int32(5, 5), "max_seqlen_KV": "5"},
            "max_seqlen_KV",
        ),
        (
            {
                "seqlens_Q": int32(10),
                "seqlens_KV": int32(10),
                "cumulative_seqlen_Q": int32(0, 10),
            },
            "not both",
        ),
    ],
)
def test_bad_varlen(arguments, message):
    query, key, value = qkv(10, 10, batch=1)
    with pytest.raises(ValueError, match=message):
        natten.attention(query, key, value, **arguments)


def test_longest_beside_all_lengths():
    """Which only may be more than needed."""
    query, key, value = qkv(10, 10, batch=1)
    lengths = {"seqlens_Q": int32(4, 6), "seqlens_KV": int32(5, 5)}
    expected = natten.attention(query, key, value, **lengths)
    module = sys.modules["natten.functional.attention"]  # its function has the same name
    with mock.patch.object(module, "attend", wraps=module.attend) as attend:
        out = natten.attention(query, key, value, **lengths, max_seqlen_Q=6, max_seqlen_KV=9)
    assert out.equal(expected)
    _, asked, _ = attend.call_args.args
    assert asked[-2:] == (6, 9)


@pytest.mark.parametrize(
    ("ends", "longest", "message"),
    [
        (int32(1, 10), 9, "must rise from 0"),
        (int32(0, 7, 5), 7, "must rise from 0"),
        (int32(0, 11), 11, "must rise from 0"),
        (int32(0, 10), 9, "max_seqlen_Q must be at least the longest sequence 10"),
    ],
)
def test_bad_cumulative_lengths(ends, longest, message):
    query, key, value = qkv(10, 10, batch=1)
    with pytest.raises(ValueError, match=message):
        natten.attention(
            query,
            key,
            value,
            cumulative_seqlen_Q=ends,
            cumulative_seqlen_KV=ends,
            max_seqlen_Q=longest,
            max_seqlen_KV=longest,
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tokens_behind_the_last_sequence(backend):
    query, key, value = qkv(10, 10, batch=1)
    query.requires_grad_()
    out, lse = natten.attention(
        query,
        key,
        value,
        cumulative_seqlen_Q=int32(0, 4, 6),
        cumulative_seqlen_KV=int32(0, 4, 6),
        max_seqlen_Q=4,
        max_seqlen_KV=4,
        return_lse=True,
        backend=backend,
    )
    assert not bool(out[:, 6:].any())
    assert bool((lse[:, 6:] == -torch.inf).all())
    out.sum().backward()
    assert not bool(query.grad[:, 6:].any())


def test_varlen_with_padding():
    """Lengths that sum to less than the packed tokens, forward and backward."""
    query, key, value = (t.requires_grad_() for t in qkv(10, 9, batch=1))
    seqlens = int32(4, 2), int32(5, 3)
    out, lse = natten.attention(
        query, key, value, seqlens_Q=seqlens[0], seqlens_KV=seqlens[1], return_lse=True
    )
    wanted = [
        natten.attention(query[:, a:b], key[:, c:d], value[:, c:d], return_lse=True)
        for a, b, c, d in ((0, 4, 0, 5), (4, 6, 5, 8))
    ]
    torch.testing.assert_close(out[:, :6], torch.cat([o for o, _ in wanted], 1))
    torch.testing.assert_close(lse[:, :6], torch.cat([l for _, l in wanted], 1))
    assert not bool(out[:, 6:].any())
    assert bool((lse[:, 6:] == -torch.inf).all())
    out.sum().backward()
    assert not bool(query.grad[:, 6:].any())
    assert not bool(key.grad[:, 8:].any())
    assert not bool(value.grad[:, 8:].any())


def test_varlen_parameters_have_defaults():
    query, key, value = qkv(10, 9, batch=3)
    assert generate_varlen_parameters(query, key, value) == (None, None, 0, 0)
    query, key, value = qkv(10, 9, batch=1)
    ends_q, ends_kv, *longest = generate_varlen_parameters(
        query, key, value, seqlens_KV=int32(5, 3), seqlens_Q=int32(4, 2)
    )
    assert (ends_q.tolist(), ends_kv.tolist(), longest) == ([0, 4, 6], [0, 5, 8], [4, 5])
    with pytest.raises(ValueError, match=r"key must be a torch\.Tensor, got list"):
        generate_varlen_parameters(query, [1], value, int32(4), int32(4))


def test_varlen_needs_batch_1():
    query, key, value = qkv(10, 10, batch=2)
    with pytest.raises(ValueError, match="batch size 1"):
        natten.attention(query, key, value, seqlens_Q=int32(10), seqlens_KV=int32(10))


def test_varlen_parameters_under_compile():
    query, key, value = qkv(10, 10, batch=1)
    compiled = torch.compile(
        lambda n: generate_varlen_parameters(query, key, value, n, n)[0],
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="under torch"):
        compiled(int32(10))


def test_bad_arguments():
    query, key, value = qkv()
    for tensors, arguments, message in (
        ((query[None], key, value), {}, "query must have 4 dimensions"),
        ((query, key[:1], value[:1]), {}, "key must have query's batch"),
        ((query, key, value[:, :5]), {}, "key and value must match"),
        ((query, key, value), {"is_causal": (True,)}, "is_causal must be a bool"),
        ((query, key, value), {"q_tile_size": 64}, "q_tile_size and kv_tile_size must be given"),
        ((query, key, value), {"kernel_schedule": "x"}, "kernel_schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            natten.attention(*tensors, **arguments)
    with pytest.raises(NotImplementedError, match="cutlass-fmha"):
        natten.attention(query, key, value, backend="cutlass-fna")


def grid(*shape, **options):
    return torch.randn(2, *shape, 2, 8, dtype=torch.float64, **options)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
def test_full_window_is_attention(shape):
    query, key, value = (grid(*shape) for _ in range(3))
    got = natten.functional.neighborhood_attention_generic(query, key, value, shape)
    flat = [t.flatten(1, -3) for t in (query, key, value)]
    torch.testing.assert_close(got.flatten(1, -3), sdpa(*flat))
    # It is handed on as one axis.
    backend = dispatch.load("reference")
    with mock.patch.object(backend, "forward", wraps=backend.forward) as spy:
        natten.functional.neighborhood_attention_generic(
            query, key, value, shape, backend="reference"
        )
    problem, _, inputs = spy.call_args.args
    assert problem.rank == 1
    assert inputs.query.dim() == 4


def test_full_window_with_context():
    query, key, value = (grid(3, 4) for _ in range(3))
    extra = [torch.randn(2, 5, 2, 8, dtype=torch.float64) for _ in range(2)]
    got = natten.na2d(
        query, key, value, (3, 4), additional_keys=extra[0], additional_values=extra[1]
    )
    keys = torch.cat([key.flatten(1, 2), extra[0]], 1)
    values = torch.cat([value.flatten(1, 2), extra[1]], 1)
    torch.testing.assert_close(got.flatten(1, 2), sdpa(query.flatten(1, 2), keys, values))


def test_causal_full_window():
    query, key, value = (grid(9) for _ in range(3))
    got = natten.na1d(query, key, value, 9, is_causal=True)
    torch.testing.assert_close(got, sdpa(query, key, value, is_causal=True))
    # Causal along an axis of a plane is not plain attention.
    plane = grid(3, 4)
    natten.na2d(plane, plane, plane, (3, 4), is_causal=(True, False))


@pytest.mark.parametrize("kernel_size", [(3, 3), (4, 5)])
def test_attention_kwargs(kernel_size):
    query, key, value = (grid(4, 5, requires_grad=True) for _ in range(3))
    extra = torch.randn(2, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    context = {"additional_keys": extra, "additional_values": extra}
    inputs = (query, key, value, extra)
    expected = natten.na2d(query, key, value, kernel_size, return_lse=True, **context)
    kwargs = {"backend": "reference"}
    with mock.patch.object(neighborhood, "attention", wraps=neighborhood.attention) as spy:
        got = natten.na2d(
            query, key, value, kernel_size, return_lse=True, attention_kwargs=kwargs, **context
        )
    assert kwargs == {"backend": "reference"}
    assert spy.call_count == (2 if kernel_size == (4, 5) else 1)
    assert all(c.kwargs["backend"] == "reference" for c in spy.call_args_list)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(o.sin().sum() + l.cos().sum(), inputs) for o, l in (got, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    with mock.patch.object(neighborhood, "attention", wraps=neighborhood.attention) as spy:
        natten.na2d(
            query,
            key,
            value,
            kernel_size,
            attention_kwargs=kwargs,
            try_fuse_additional_kv=True,
            **context,
        )
    assert spy.call_count == 0


def test_attention_kwargs_are_checked():
    query = grid(4, 5)
    with pytest.raises(NotImplementedError, match="backend must be"):
        natten.na2d(query, query, query, (4, 5), attention_kwargs={"backend": "nonsense"})
    with pytest.raises(TypeError, match="wrong"):
        natten.na2d(query, query, query, (4, 5), attention_kwargs={"wrong": 1})


def test_named_backend_carries_over():
    query = grid(4, 5)
    with mock.patch.object(neighborhood, "attention", wraps=neighborhood.attention) as spy:
        natten.na2d(
            query,
            query,
            query,
            (4, 5),
            backend="reference-fna",
            attention_kwargs={"run_persistent_kernel": False},
        )
    assert spy.call_args.kwargs["backend"] == "reference-fmha"
    assert spy.call_args.kwargs["run_persistent_kernel"] is False
