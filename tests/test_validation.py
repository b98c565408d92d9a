"""What is refused, with which exception and text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import natten
from natten.functional import neighborhood_attention_generic


def tensor(*shape, **options):
    return torch.randn(shape, **options)


Q1 = tensor(1, 8, 2, 4)
Q2 = tensor(1, 8, 9, 2, 4)
Q3 = tensor(1, 4, 5, 6, 2, 4)
CONTEXT = tensor(1, 3, 2, 4)


@pytest.mark.parametrize("kernel_size", [3, (3, 3), [3, 3], torch.Size((3, 3)), np.int64(3)])
def test_forms_of_kernel_size(kernel_size):
    assert natten.na2d(Q2, Q2, Q2, kernel_size).equal(natten.na2d(Q2, Q2, Q2, (3, 3)))


def test_none_means_default():
    expected = natten.na2d(Q2, Q2, Q2, 3)
    got = natten.na2d(Q2, Q2, Q2, 3, stride=None, dilation=None, is_causal=None, scale=None)
    assert got.equal(expected)
    assert natten.na2d(Q2, Q2, Q2, 3, stride=True).equal(expected)


def test_scale_zero_is_zero():
    out = natten.na2d(Q2, Q2, Q2, (8, 9), scale=0.0)
    torch.testing.assert_close(out, Q2.mean((1, 2), keepdim=True).expand_as(Q2))


BAD_WINDOWS = [
    ({"kernel_size": 0}, "kernel_size must hold integers of at least 1"),
    ({"kernel_size": -3}, "kernel_size must hold integers of at least 1"),
    ({"kernel_size": 3.0}, "kernel_size must be an int"),
    ({"kernel_size": "3"}, "kernel_size must be an int"),
    ({"kernel_size": None}, "kernel_size must be an int"),
    ({"kernel_size": (3, 3.0)}, "kernel_size must hold integers"),
    ({"kernel_size": (3,)}, "kernel_size must have 2 values"),
    ({"kernel_size": (3, 3, 3)}, "kernel_size must have 2 values"),
    ({"kernel_size": 3, "stride": 0}, "stride must hold integers of at least 1"),
    ({"kernel_size": 3, "stride": (1,)}, "stride must have 2 values"),
    ({"kernel_size": 3, "stride": 4}, "stride must be at most kernel_size"),
    ({"kernel_size": 3, "stride": (1, 4)}, "stride must be at most kernel_size"),
    ({"kernel_size": 3, "dilation": 0}, "dilation must hold integers of at least 1"),
    ({"kernel_size": 3, "dilation": 3}, r"kernel_size \* dilation must be at most"),
    ({"kernel_size": 9}, r"kernel_size \* dilation must be at most"),
    ({"kernel_size": 3, "is_causal": 1}, "is_causal must be a bool"),
    ({"kernel_size": 3, "is_causal": (True,)}, "is_causal must have 2 values"),
    ({"kernel_size": 3, "is_causal": (True, 0)}, "is_causal must be a bool"),
    ({"kernel_size": 3, "is_causal": "yes"}, "is_causal must be a bool"),
    ({"kernel_size": 3, "is_circular": 1}, "is_circular must be a bool"),
    ({"kernel_size": 3, "is_circular": (True,)}, "is_circular must have 2 values"),
    ({"kernel_size": 3, "is_circular": np.True_}, "is_circular must be a bool"),
    ({"kernel_size": 3, "is_circular": True, "is_causal": True}, "causal or circular but not both"),
    ({"kernel_size": 2, "is_circular": True, "dilation": 3}, "dilation must divide the number of"),
    ({"kernel_size": 3, "is_circular": True, "stride": 3}, "stride that of each dilation group"),
    (
        {"kernel_size": 3, "is_circular": True, "grid": (9, 9)},
        "query and key must hold all tokens along a circular axis",
    ),
    ({"kernel_size": 3, "scale": "1"}, "scale must be a number"),
    ({"kernel_size": 3, "backend": 3}, "backend must be a str or None"),
    ({"kernel_size": 3, "kernel_schedule": "fast"}, "kernel_schedule must be None or one of"),
    ({"kernel_size": 3, "torch_compile": 1}, "torch_compile must be a bool"),
    ({"kernel_size": 3, "run_persistent_kernel": None}, "run_persistent_kernel must be a bool"),
    ({"kernel_size": 3, "q_tile_shape": (8, 8)}, "q_tile_shape and kv_tile_shape must be given"),
    (
        {"kernel_size": 3, "backward_kv_tile_shape": (8, 8)},
        "backward_q_tile_shape and backward_kv_tile_shape must be given",
    ),
    ({"kernel_size": 3, "q_tile_shape": (8,), "kv_tile_shape": (8, 8)}, "q_tile_shape must have 2"),
    ({"kernel_size": 3, "backward_kv_splits": (0, 1)}, "backward_kv_splits must hold integers"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_WINDOWS)
def test_bad_parameters(arguments, message):
    # A good call first: what validation remembers must not hide a bad one.
    natten.na2d(Q2, Q2, Q2, 3, 1, 1, True)
    with pytest.raises(ValueError, match=message):
        natten.na2d(Q2, Q2, Q2, **arguments)


BOTH = {"additional_keys": CONTEXT, "additional_values": CONTEXT}
BAD_TENSORS = [
    ((Q1, Q1, Q1), {}, "query must have 5 dimensions"),
    ((Q3, Q3, Q3), {}, "query must have 5 dimensions"),
    ((Q2, Q1, Q1), {}, "key must have as many dimensions"),
    (([1], Q2, Q2), {}, "query must be a torch.Tensor"),
    ((Q2, None, Q2), {}, "key must be a torch.Tensor"),
    ((Q2, Q2.double(), Q2), {}, "key must have query's dtype"),
    ((Q2, Q2, Q2.half()), {}, "value must have query's dtype"),
    ((Q2.int(), Q2.int(), Q2.int()), {}, "query must have a floating-point dtype"),
    ((Q2, Q2.to("meta"), Q2), {}, "key must be on query's device"),
    ((Q2, Q2[:, :7], Q2), {}, "key and value must match"),
    ((Q2, Q2[:, :7], Q2[:, :7]), {}, "same token shape"),
    ((Q2, Q2.repeat(2, 1, 1, 1, 1), Q2.repeat(2, 1, 1, 1, 1)), {}, "key must have query's batch"),
    ((Q2, Q2[..., :3], Q2), {}, "key must have query's head_dim"),
    ((Q2, Q2.repeat(1, 1, 1, 2, 1), Q2.repeat(1, 1, 1, 2, 1)), {}, "multiple of key's"),
    ((Q2,) * 3, {"additional_keys": CONTEXT}, "both be tensors or both None"),
    ((Q2,) * 3, {"additional_values": CONTEXT}, "both be tensors or both None"),
    (
        (Q2,) * 3,
        {"additional_keys": CONTEXT[:, :2], "additional_values": CONTEXT},
        "as many tokens",
    ),
    (
        (Q2,) * 3,
        {"additional_keys": CONTEXT[0], "additional_values": CONTEXT},
        r"additional_keys must have shape \[1, tokens, 2, 4\]",
    ),
    (
        (Q2,) * 3,
        {"additional_keys": CONTEXT, "additional_values": CONTEXT.double()},
        "additional_values must have query's dtype",
    ),
    ((Q2,) * 3, {"additional_lengths": torch.tensor([1])}, "needs additional_keys"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": [1]}, "must be a torch.Tensor, got list"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor(1)}, r"1 integers, .* got shape \(\)"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor([1, 1])}, r"got shape \(2,\)"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor([1.0])}, "and torch.float32"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor([True])}, "and torch.bool"),
    (
        (Q2,) * 3,
        {**BOTH, "additional_lengths": torch.tensor([1], device="meta")},
        "additional_lengths must be on query's device cpu, got meta",
    ),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor([-1])}, r"integers from 0 .*\[-1\]"),
    ((Q2,) * 3, {**BOTH, "additional_lengths": torch.tensor([99])}, r"integers from 0 .*\[99\]"),
    (
        (Q2,) * 3,
        {
            "additional_keys": CONTEXT[None],
            "additional_values": CONTEXT,
            "additional_lengths": torch.tensor([1]),
        },
        "additional_keys must have shape",
    ),
    ((Q2,) * 3, {"rpb": tensor(2, 5, 4)}, r"rpb must have shape .* = \(2, 5, 5\)"),
    ((Q2,) * 3, {"rpb": tensor(2, 5, 5), "is_causal": True}, "rpb is defined for bidirectional"),
    ((Q2,) * 3, {"rpb": tensor(2, 5, 5).int()}, "rpb must have a floating-point dtype"),
]


@pytest.mark.parametrize(("tensors", "arguments", "message"), BAD_TENSORS)
def test_bad_tensors(tensors, arguments, message):
    with pytest.raises(ValueError, match=message):
        natten.na2d(*tensors, 3, **arguments)


def test_each_rank_checks_its_own():
    for function, good in ((natten.na1d, Q1), (natten.na2d, Q2), (natten.na3d, Q3)):
        for query in (Q1, Q2, Q3):
            assert neighborhood_attention_generic(query, query, query, 3).shape == query.shape
            if query is good:
                assert function(query, query, query, 3).shape == query.shape
            else:
                with pytest.raises(ValueError, match=f"query must have {good.dim()} dimensions"):
                    function(query, query, query, 3)
    with pytest.raises(ValueError, match="4, 5 or 6 dimensions"):
        neighborhood_attention_generic(Q1[0], Q1[0], Q1[0], 3)


def test_unsupported_kinds_of_tensors():
    sparse = Q1.to_sparse()
    with pytest.raises(NotImplementedError, match=r"query must be a dense"):
        natten.na1d(sparse, sparse, sparse, 3)
    nested = torch.nested.nested_tensor([Q1[0], Q1[0, :5]])
    with pytest.raises(NotImplementedError, match="query is a nested tensor"):
        natten.na1d(nested, nested, nested, 3)


@pytest.mark.parametrize("name", ["fast", "cutlass", "cutlass-fmha", "CPU-fna", "cpu-", ""])
def test_unknown_backend(name):
    with pytest.raises(NotImplementedError, match=r"backend must be None or one of .*cutlass-fna"):
        natten.na2d(Q2, Q2, Q2, 3, backend=name)
    # The path for full windows looks at the name too.
    with pytest.raises(NotImplementedError, match="backend must be None or one of"):
        natten.na2d(Q2, Q2, Q2, (8, 9), backend=name)


def test_sub_grids():
    part = Q1[:, :3]
    good = {"grid": (8,), "query_origin": 5, "key_origin": 0}
    assert neighborhood_attention_generic(part, Q1, Q1, 3, **good).shape == part.shape
    for change, message in (
        ({"grid": None}, "need grid"),
        ({"grid": (8, 8)}, "grid must have 1 values"),
        ({"query_origin": 6}, "query's box must lie inside the grid"),
        ({"key_origin": 1}, "key's box must lie inside the grid"),
        ({"query_origin": -1}, "query_origin must hold integers of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            neighborhood_attention_generic(part, Q1, Q1, 3, **{**good, **change})


@pytest.mark.parametrize("shape", [(0, 8, 9, 2, 4), (1, 0, 9, 2, 4), (2, 8, 9, 0, 4)])
def test_empty_tensors(shape):
    query = torch.randn(shape, requires_grad=True)
    if shape[3] == 0:
        with pytest.raises(ValueError, match="heads"):
            natten.na2d(query, query, query, 3)
        return
    out, lse = natten.na2d(query, query, query, 3, return_lse=True)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    (out.sum() + lse.sum()).backward()
    assert query.grad.shape == shape


def test_empty_context():
    empty = torch.randn(1, 0, 2, 4, requires_grad=True)
    expected = natten.na2d(Q2, Q2, Q2, 3)
    got = natten.na2d(Q2, Q2, Q2, 3, additional_keys=empty, additional_values=empty)
    assert got.equal(expected)
    got.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kernel_size": torch.randn(50, 50)}, "got a tensor of shape (50, 50)"),
        ({"stride": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"is_causal": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"scale": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"backend": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"kernel_schedule": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"return_lse": torch.randn(500)}, "got a tensor of shape (500,)"),
        ({"q_tile_shape": torch.randn(500), "kv_tile_shape": 4}, "got a tensor of shape (500,)"),
        ({"kernel_size": list(range(5000))}, "… (list)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_short(arguments, text):
    x = torch.randn(1, 14, 14, 2, 16)
    with pytest.raises(ValueError, match="must ") as error:
        natten.na2d(x, x, x, **{"kernel_size": 7, **arguments})
    assert text in str(error.value)
    assert len(str(error.value)) < 300


def test_tensors_of_other_layouts_are_helped():
    heads_first = torch.randn(1, 4, 28, 28, 16)
    with pytest.raises(ValueError, match=r"heads.* behind the tokens.*movedim\(1, -2\)"):
        natten.na2d(heads_first, heads_first, heads_first, kernel_size=7)
    channels_first = torch.randn(1, 64, 28, 28)
    with pytest.raises(ValueError, match=r"channels come last.*unflatten"):
        natten.na2d(channels_first, channels_first, channels_first, kernel_size=7)
    module = natten.NeighborhoodAttention2D(64, 4, 7)
    with pytest.raises(ValueError, match=r"channels-first: x.movedim\(1, -1\)"):
        module(channels_first)


@pytest.mark.parametrize("backend", [None, "cpu-fna", "flex-fna", "reference"])
def test_eight_bit_numbers_are_refused(backend):
    x = torch.randn(1, 14, 14, 2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"are for natten\.float8_attention"):
        natten.na2d(x, x, x, kernel_size=7, backend=backend)
