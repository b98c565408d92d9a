"""The operators do not trust their arguments: whatever a schema allows either computes or raises.

Nothing is read or written outside of the tensors, and nothing is returned that nobody wrote.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import natten

ATTENTION = torch.ops.natten.neighborhood_attention.default
BACKWARD = torch.ops.natten.neighborhood_attention_backward.default
NUM_TENSORS = 12
NUM_DIFFERENTIABLE = 7
NAMES = [argument.name for argument in ATTENTION._schema.arguments]

REFUSED = (ValueError, NotImplementedError, RuntimeError)


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers in the midst of NaN, which a kernel that reads outside would meet."""
    outer = torch.full([n + 4 for n in shape], torch.nan, dtype=dtype)
    inner = outer[tuple(slice(2, n + 2) for n in shape)]
    return inner.copy_(torch.randn(shape))


def arguments(backend: str = "reference", **changes: Any) -> list[Any]:
    """Arguments of a call with everything but packed sequences, by name."""
    named = dict.fromkeys(NAMES)
    named |= {
        "query": guarded(2, 6, 7, 4, 8),
        "key": guarded(2, 6, 7, 2, 8),
        "value": guarded(2, 6, 7, 2, 8),
        "rpb": guarded(4, 5, 5),
        "additional_keys": guarded(2, 3, 2, 8),
        "additional_values": guarded(2, 3, 2, 8),
        "sink": guarded(4),
        "additional_lengths": torch.tensor([2, 3]),
        "key_mask": torch.rand(2, 6, 7) < 0.8,
        "query_mask": torch.rand(2, 6, 7) < 0.8,
        "heads_kv": 0,
        "window": [3, 3, 1, 2, 2, 1, 0, 0],
        "scale": 0.3,
        "softcap": 2.5,
        "max_seqlen_q": 0,
        "max_seqlen_kv": 0,
        "backend": backend,
        "config": "",
        "requires_grad": False,
    }
    assert set(changes) <= set(named)
    return list((named | changes).values())


def varlen(backend: str = "reference", **changes: Any) -> list[Any]:
    """Arguments of a call with packed sequences."""
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    return arguments(
        backend,
        **{
            "query": guarded(1, 9, 2, 8),
            "key": guarded(1, 9, 2, 8),
            "value": guarded(1, 9, 2, 8),
            "rpb": None,
            "additional_keys": None,
            "additional_values": None,
            "sink": guarded(2),
            "additional_lengths": None,
            "key_mask": None,
            "query_mask": None,
            "cumulative_seqlen_q": ends,
            "cumulative_seqlen_kv": ends,
            "window": [0, 1, 1, 0],
            "max_seqlen_q": 6,
            "max_seqlen_kv": 6,
        }
        | changes,
    )


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WHOLE = [3, 3, 1, 2, 2, 1, 0, 0]
WRONG = {
    "no window": {"window": []},
    "window of another rank": {"window": [3, 1, 1, 0]},
    "window cut short": {"window": WHOLE[:-1]},
    "kernel_size of -1": {"window": [-1, *WHOLE[1:]]},
    "kernel_size beyond the grid": {"window": [7, *WHOLE[1:]]},
    "dilated beyond the grid": {"window": [3, 3, 1, 2, 3, 1, 0, 0]},
    "huge kernel_size": {"window": [2**62, *WHOLE[1:]]},
    "kernel_size and dilation that overflow": {"window": [3, 2**40, 1, 2, 2, 2**40, 0, 0]},
    "stride of 0": {"window": [3, 3, 0, 2, 2, 1, 0, 0]},
    "stride beyond the kernel": {"window": [3, 3, 4, 2, 2, 1, 0, 0]},
    "dilation of 0": {"window": [3, 3, 1, 2, 0, 1, 0, 0]},
    "kind of window 3": {"window": [3, 3, 1, 2, 2, 1, 3, 0], "rpb": None},
    "ring of parts": {"window": [3, 3, 2, 2, 2, 1, 2, 0], "rpb": None},
    "bias of a causal axis": {"window": [3, 3, 1, 2, 2, 1, 1, 0]},
    "grid smaller than the box": {"window": [*WHOLE, 6, 6, 0, 0, 0, 0]},
    "query box outside": {"window": [*WHOLE, 9, 9, 4, 0, 0, 0]},
    "key box outside": {"window": [*WHOLE, 9, 9, 0, 0, 0, 3]},
    "negative origin": {"window": [*WHOLE, 9, 9, -1, 0, 0, 0]},
    "huge origin": {"window": [*WHOLE, 9, 9, 2**62, 0, 0, 0]},
    "huge grid": {"window": [*WHOLE, 2**33, 9, 0, 0, 0, 0]},
    "negative grid": {"window": [*WHOLE, -9, 9, 0, 0, 0, 0]},
    "scale of NaN": {"scale": float("nan")},
    "infinite scale": {"scale": float("inf")},
    "negative softcap": {"softcap": -1.0},
    "softcap of NaN": {"softcap": float("nan")},
    "infinite softcap": {"softcap": float("inf")},
    "sink of other heads": {"sink": guarded(2)},
    "sink of integers": {"sink": torch.ones(4, dtype=torch.int64)},
    "sink of two dimensions": {"sink": guarded(4, 1)},
    "mask of numbers": {"key_mask": torch.ones(2, 6, 7)},
    "mask of heads": {"key_mask": torch.ones(2, 6, 7, 4, dtype=torch.bool)},
    "mask of another batch": {"query_mask": torch.ones(1, 6, 7, dtype=torch.bool)},
    "mask of another grid": {"query_mask": torch.ones(2, 7, 6, dtype=torch.bool)},
    "mask of flat tokens": {"key_mask": torch.ones(2, 42, dtype=torch.bool)},
    "mask on another device": {"key_mask": torch.ones(2, 6, 7, dtype=torch.bool, device="meta")},
    "max_seqlen without sequences": {"max_seqlen_q": 4},
    "unknown backend": {"backend": "nobody"},
    "empty config": {"config": ","},
    "config of letters": {"config": "a,b,c,d,e,f,g,h,i"},
    "tile of another rank": {"config": "8,8,,,,0,1,,0"},
    "tile of 0": {"config": "0x8,8x8,,,,0,1,,0"},
    "splits of -1": {"config": ",,,,-1x1,0,1,,0"},
    "unknown schedule": {"config": ",,,,,0,1,zigzag,0"},
    "rpb of another window": {"rpb": guarded(4, 5, 3)},
    "rpb of other heads": {"rpb": guarded(2, 5, 5)},
    "rpb of integers": {"rpb": torch.ones(4, 5, 5, dtype=torch.int64)},
    "key of another grid": {"key": guarded(2, 6, 6, 2, 8), "value": guarded(2, 6, 6, 2, 8)},
    "value of another grid": {"value": guarded(2, 6, 6, 2, 8)},
    "value of other heads": {"value": guarded(2, 6, 7, 1, 8)},
    "key of another batch": {"key": guarded(1, 6, 7, 2, 8), "value": guarded(1, 6, 7, 2, 8)},
    "key of another head_dim": {"key": guarded(2, 6, 7, 2, 4)},
    "heads that do not divide": {"query": guarded(2, 6, 7, 3, 8), "rpb": None},
    "no heads": {"key": guarded(2, 6, 7, 0, 8), "value": guarded(2, 6, 7, 0, 8)},
    "key of another dtype": {"key": guarded(2, 6, 7, 2, 8, dtype=torch.float64)},
    "query of integers": {"query": torch.ones(2, 6, 7, 4, 8, dtype=torch.int32)},
    "sparse query": {"query": torch.randn(2, 6, 7, 4, 8).to_sparse()},
    "too few dimensions": {"query": guarded(2, 6, 8)},
    "too many dimensions": {"query": guarded(1, 1, 1, 2, 6, 4, 8)},
    "key on another device": {"key": torch.empty(2, 6, 7, 2, 8, device="meta")},
    "value alone": {"key": None},
    "key alone": {"value": None},
    "heads_kv with key and value": {"heads_kv": 2},
    "packed without heads": {"key": None, "value": None},
    "packed with too many heads": {"key": None, "value": None, "heads_kv": 2},
    "packed with negative heads": {"key": None, "value": None, "heads_kv": -1},
    "additional keys alone": {"additional_values": None},
    "additional values of other tokens": {"additional_values": guarded(2, 4, 2, 8)},
    "additional keys of another batch": {
        "additional_keys": guarded(1, 3, 2, 8),
        "additional_values": guarded(1, 3, 2, 8),
    },
    "additional keys of other heads": {
        "additional_keys": guarded(2, 3, 4, 8),
        "additional_values": guarded(2, 3, 4, 8),
    },
    "lengths of another batch": {"additional_lengths": torch.tensor([1])},
    "lengths of another kind": {"additional_lengths": torch.tensor([1.0, 2.0])},
    "lengths without keys": {"additional_keys": None, "additional_values": None},
}
WRONG_VARLEN = {
    "one cumulative": {"cumulative_seqlen_kv": None},
    "cumulative of another length": {"cumulative_seqlen_kv": int32(0, 9)},
    "cumulative of one entry": {"cumulative_seqlen_q": int32(0), "cumulative_seqlen_kv": int32(0)},
    "cumulative of int64": {"cumulative_seqlen_q": torch.tensor([0, 3, 9])},
    "cumulative of two dimensions": {"cumulative_seqlen_q": int32(0, 3, 9)[None]},
    "ends beyond the tokens": {"cumulative_seqlen_kv": int32(0, 3, 10)},
    "ends far beyond the tokens": {"cumulative_seqlen_q": int32(0, 2**30, 2**30 + 2)},
    "ends that fall": {"cumulative_seqlen_q": int32(0, 5, 3)},
    "negative ends": {"cumulative_seqlen_q": int32(-2, 3, 9)},
    "not from zero": {"cumulative_seqlen_q": int32(1, 3, 9)},
    "max_seqlen too small": {"max_seqlen_kv": 5},
    "negative max_seqlen": {"max_seqlen_q": -1},
    "batch of two": {name: guarded(2, 9, 2, 8) for name in ("query", "key", "value")},
    "a window": {"window": [3, 1, 1, 0]},
    "a stride": {"window": [0, 2, 1, 0]},
    "a box": {"window": [12, 1, 1, 0, 12, 1, 0]},
    "a bias": {"rpb": guarded(2, 17)},
    "a mask": {"key_mask": torch.ones(1, 9, dtype=torch.bool)},
    "a mask of queries": {"query_mask": torch.ones(1, 9, dtype=torch.bool)},
    "additional keys": {
        "additional_keys": guarded(1, 3, 2, 8),
        "additional_values": guarded(1, 3, 2, 8),
    },
}
BACKENDS = ["reference", "cpu", "flex", ""]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, backend):
    changes = dict(WRONG[name])
    with pytest.raises((ValueError, NotImplementedError)):
        ATTENTION(*arguments(changes.pop("backend", backend), **changes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRONG_VARLEN)
def test_wrong_packed_sequences(name, backend):
    with pytest.raises((ValueError, NotImplementedError)):
        ATTENTION(*varlen(backend, **WRONG_VARLEN[name]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_wrong_arguments_of_the_backward_pass(backend):
    given = arguments(backend, requires_grad=True)
    out, lse = ATTENTION(*given)
    needs = [True] * NUM_DIFFERENTIABLE

    def backward(**changes: Any) -> Any:
        named = {"out": out, "lse": lse, "grad_out": out, "grad_lse": lse, "needs": needs}
        named |= changes
        return BACKWARD(
            named["grad_out"], named["grad_lse"], *given[:NUM_TENSORS], named["out"], named["lse"],
            *given[NUM_TENSORS:], named["needs"],
        )  # fmt: skip

    assert [g.shape for g in backward()] == [t.shape for t in given[:NUM_DIFFERENTIABLE]]
    for changes in (
        {"out": out[:, :5]},
        {"out": out.double()},
        {"lse": lse[..., :1]},
        {"lse": lse.half()},
        {"grad_out": out[..., :4]},
        {"grad_out": out.double()},
        {"grad_out": torch.empty_like(out, device="meta")},
        {"grad_lse": lse[:1]},
        {"grad_lse": lse.double()},
        {"needs": [True] * 6},
        {"needs": []},
    ):
        with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
            backward(**changes)
    for changes in WRONG.values():
        if "backend" in changes:
            continue
        wrong = arguments(backend, requires_grad=True, **changes)
        with pytest.raises((ValueError, NotImplementedError)):
            BACKWARD(out, lse, *wrong[:NUM_TENSORS], out, lse, *wrong[NUM_TENSORS:], needs)


def random_call(random: Random) -> tuple[list[Any], bool]:
    """A call with one to three of its arguments changed at random, and whether it is varlen."""
    backend = random.choice(BACKENDS)
    packed = random.random() < 0.3
    given = varlen(backend) if packed else arguments(backend)
    number = [-1, 0, 1, 2, 3, 5, 6, 7, 8, 9, 2**31, 2**62]
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(given))
        value = given[place]
        if isinstance(value, Tensor):
            kind = random.randrange(5)
            if kind == 0:
                given[place] = None if place else value[:0]
            elif kind == 1 and value.is_floating_point():
                shape = list(value.shape)
                shape[random.randrange(len(shape))] += random.choice([-1, 1, 2])
                given[place] = guarded(*[max(n, 0) for n in shape])
            elif kind == 2:
                given[place] = value.to(random.choice([torch.float64, torch.int32, torch.float32]))
            elif kind == 3:
                given[place] = value.flip(0).movedim(0, -1).contiguous().movedim(-1, 0)
            elif not value.is_floating_point():
                given[place] = torch.tensor(
                    [random.choice(number[:-2]) for _ in range(value.numel())], dtype=value.dtype
                )
        elif isinstance(value, list):
            values = list(value)
            if random.random() < 0.8:
                values[random.randrange(len(values))] = random.choice(number)
            else:
                values += [random.choice(number) for _ in range(random.choice([1, 3, 6]))]
            given[place] = values
        elif isinstance(value, bool):
            given[place] = not value
        elif isinstance(value, int):
            given[place] = random.choice(number)
        elif isinstance(value, float):
            given[place] = random.choice([0.0, -1.0, 1e30])
    return given, packed


def test_random_arguments():
    """What is not refused is right: equal to the reference's, forward and backward."""
    random = Random(0)
    torch.manual_seed(0)
    ran = refused = 0
    for _ in range(400):
        given, _ = random_call(random)
        try:
            out, lse = ATTENTION(*given)
        except REFUSED:
            refused += 1
            continue
        ran += 1
        exact = list(given)
        exact[NAMES.index("backend")] = "reference"
        expected = ATTENTION(*exact)
        torch.testing.assert_close((out, lse), expected, equal_nan=True, atol=1e-4, rtol=1e-4)
        if given[NAMES.index("scale")] != 1e30:
            assert out.isfinite().all()
        if given[NAMES.index("backend")] == "flex":
            continue
        needs = [t is not None for t in given[:NUM_DIFFERENTIABLE]]
        both = [
            BACKWARD(
                out, lse.clamp(min=-1), *call[:NUM_TENSORS], out, lse, *call[NUM_TENSORS:], needs
            )
            for call in (given, exact)
        ]
        if given[NAMES.index("scale")] != 1e30:
            torch.testing.assert_close(*both, atol=1e-3, rtol=1e-3)
    assert ran > 60
    assert refused > 100


def window_call(name: str) -> list[Any]:
    window = ([3, 3], [1, 1], [2, 1], [0, 0])
    a, b = guarded(2, 2, 6, 7, 8), guarded(2, 2, 6, 7, 8)
    weights = guarded(2, 2, 6, 7, 9)
    return {
        "window_dot": [a, b, *window, 0.0],
        "window_sum": [weights, b, *window],
        "window_scatter": [weights, a, *window],
        "window_bias": [guarded(2, 5, 5), [6, 7], *window],
        "window_bias_sum": [weights[0], *window],
    }[name]


WRONG_WINDOWS = {
    "beyond the grid": [[4, 3], [1, 1], [2, 1], [0, 0]],
    "one axis": [[3], [1], [1], [0]],
    "missing": [[3, 3], [1, 1], [2], [0, 0]],
    "none": [[], [], [], []],
    "dilation of 0": [[3, 3], [1, 1], [0, 1], [0, 0]],
    "stride of 0": [[3, 3], [0, 1], [2, 1], [0, 0]],
    "negative": [[-3, -3], [1, 1], [2, 1], [0, 0]],
    "huge": [[2**62, 3], [1, 1], [1, 1], [0, 0]],
    "is_causal of 3": [[3, 3], [1, 1], [2, 1], [3, 0]],
}


@pytest.mark.parametrize(
    "name", ["window_dot", "window_sum", "window_scatter", "window_bias", "window_bias_sum"]
)
def test_wrong_arguments_of_products(name):
    operator = getattr(torch.ops.natten, name).default
    given = window_call(name)
    assert operator(*given).isfinite().all()
    start = next(
        i for i, value in enumerate(given) if value == [3, 3]
    ) if name != "window_bias" else 2  # fmt: skip
    for window in WRONG_WINDOWS.values():
        with pytest.raises((ValueError, NotImplementedError)):
            operator(*given[:start], *window, *given[start + 4 :])
    for place in range(start):
        value = given[place]
        if isinstance(value, Tensor):
            changed = [value[..., :-1], value.long(), value[0], value.to("meta")]
            if place == 1 and name != "window_dot":
                # Values have any number of features.
                changed = changed[1:]
            if place == 0 and name in ("window_bias", "window_bias_sum"):
                changed.pop()
            if name not in ("window_bias", "window_bias_sum"):
                changed += [value[:, :1], value.double(), value.to_sparse()]
        else:
            changed = [[6], [5, 7], [2**40, 7]]
        for wrong in changed:
            with pytest.raises((ValueError, NotImplementedError)):
                operator(*given[:place], wrong, *given[place + 1 :])


def test_numbers_beyond_what_kernels_count():
    query = torch.randn(1, 5, 2, 8)
    for changes in (
        {"grid": 2**63, "query_origin": 0},
        {"grid": 2**31},
        {"dilation": 2**63},
        {"stride": 2**64},
        {"scale": 10**400},
        {"scale": float("nan")},
        {"scale": -float("inf")},
        {"kernel_size": b"\x03"},
        {"kernel_size": bytearray(b"\x03")},
    ):
        named = {"kernel_size": 3} | changes
        with pytest.raises(ValueError, match=next(iter(changes))):
            natten.functional.neighborhood_attention_generic(query, query, query, **named)
    # Far away in a large grid is a place like any other.
    far = natten.functional.neighborhood_attention_generic(
        query, query, query, 3, grid=2**31 - 1, query_origin=2**30, key_origin=2**30
    )
    near = natten.functional.neighborhood_attention_generic(
        query, query, query, 3, grid=25, query_origin=10, key_origin=10
    )
    assert far.equal(near)


def test_flags_and_counts_of_the_wrong_kind():
    query = torch.randn(1, 5, 2, 8)
    for flag in (1, None, "yes", torch.tensor(True)):
        for name in ("return_lse", "try_fuse_additional_kv", "run_persistent_kernel"):
            with pytest.raises(ValueError, match=name):
                natten.na1d(query, query, query, 3, **{name: flag})
        with pytest.raises(ValueError, match="return_lse"):
            natten.attention(query, query, query, return_lse=flag)
    with pytest.raises(ValueError, match="attention_kwargs"):
        natten.na1d(query, query, query, 3, attention_kwargs=[("backend", None)])
    ends = int32(0, 5)
    for longest in (b"\x05", [5], 5.0, "5", None, -1):
        with pytest.raises(ValueError, match="max_seqlen"):
            natten.attention(
                query, query, query, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends,
                max_seqlen_Q=longest, max_seqlen_KV=5,
            )  # fmt: skip


def test_calls_that_differ_in_type_alone_are_told_apart():
    query = torch.randn(1, 9, 2, 8)
    for good, bad in ((1, 1.0), (2, "2"), (False, 0)):
        name = "is_causal" if good is False else "dilation"
        natten.na1d(query, query, query, 3, **{name: good})
        with pytest.raises(ValueError, match=name):
            natten.na1d(query, query, query, 3, **{name: bad})
