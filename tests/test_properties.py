"""Random problems, valid and invalid, as tests/fuzz.py draws them at length; and properties of
neighborhood attention, said without its window."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import torch
import wrong_calls
from cases import random_plain_case
from checks import make_inputs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten.functional import neighborhood_attention_generic

FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 10**6)
BACKENDS = ["reference", None]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(FEW, max_examples=60)
@given(kind=st.sampled_from(list(problems.KINDS)), seed=SEEDS)
def test_random_problems(backend, kind, seed):
    """Every parameter of the public functions, in any memory, within the error of eager attention;
    `python tests/fuzz.py --kinds KIND --seed SEED --problems 1` does one again."""
    problems.check(kind, seed, problems.On(backend))


@settings(FEW, max_examples=60)
@given(kind=st.sampled_from(wrong_calls.REFUSING), seed=SEEDS)
def test_wrong_calls(kind, seed):
    """Ten calls of one kind, each with one thing wrong, which an exception names."""
    wrong_calls.refuse(kind, seed, problems.On(("cpu", "reference", None)[seed % 3]))


def draw(seed: int, **changes):
    """A random problem in float64, without boxes, rings, upsampling, masks and sinks."""
    case = random_plain_case(seed, None, 120)
    whole = {"grid": None, "query_origin": None, "key_origin": None}
    if case.grid is not None:
        whole |= {"tokens": case.grid, "key_tokens": case.grid}
    lengths = case.additional_lengths
    if lengths is not None:
        lengths = None if "additional" in changes else (lengths * 2)[:2]
    same = {"head_dim": 8, "head_dim_v": 8, "batch": 2, "additional_lengths": lengths}
    same |= {"softcap": 0.0, "sink": False, "key_mask": False, "query_mask": False}
    case = replace(case, **{**same, **whole, **changes})
    return case, make_inputs(case, torch.float64)


def sdpa(query, key, value):
    heads_first = [t.flatten(1, -3).transpose(1, 2) for t in (query, key, value)]
    out = scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
    return out.unflatten(1, query.shape[1:-2])


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS)
def test_window_of_everything_is_attention(backend, seed):
    case, inputs = draw(seed, rpb=False, additional=0)
    tensors = (inputs.query, inputs.key, inputs.value)
    got = neighborhood_attention_generic(*tensors, case.tokens, backend=backend)
    torch.testing.assert_close(got, sdpa(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(blocks=st.integers(1, 5), block=st.integers(1, 6), width=st.integers(1, 4))
def test_stride_of_the_window_is_blocked_attention(backend, blocks, block, width):
    tensors = torch.randn(3, 1, blocks * block, width, 2, 8, dtype=torch.float64)
    size = (block, width)
    got = natten.na2d(*tensors, size, stride=size, backend=backend)
    parts = [sdpa(*part) for part in zip(*(t.split(block, 1) for t in tensors))]
    torch.testing.assert_close(got, torch.cat(parts, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS)
def test_dilation_is_independent_sub_grids(backend, seed):
    case, inputs = draw(seed, additional=0, rpb=False)
    got, got_lse = run(case, inputs, backend)
    plain = replace(case, dilation=(1,) * case.rank)
    for offset in torch.cartesian_prod(*map(torch.arange, case.dilation)).view(-1, case.rank):
        where = (slice(None),) + tuple(
            slice(int(o), None, d) for o, d in zip(offset, case.dilation)
        )
        part = replace(inputs, query=inputs.query[where], key=inputs.key[where],
                       value=inputs.value[where])  # fmt: skip
        tokens = tuple(part.query.shape[1:-2])
        out, lse = run(replace(plain, tokens=tokens, key_tokens=tokens), part, backend)
        torch.testing.assert_close(got[where], out)
        torch.testing.assert_close(got_lse[where], lse)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS)
def test_batches_and_heads_are_independent(backend, seed):
    case, inputs = draw(seed)
    got, _ = run(case, inputs, backend)
    group = case.heads // case.heads_kv
    one = {"batch": 1, "heads": group, "heads_kv": 1}
    for b, h in ((0, 0), (1, case.heads_kv - 1)):
        heads = slice(h * group, (h + 1) * group)
        part = {"query": inputs.query[b : b + 1, ..., heads, :]}
        for name in ("key", "value", "additional_keys", "additional_values"):
            tensor = getattr(inputs, name)
            part[name] = None if tensor is None else tensor[b : b + 1, ..., h : h + 1, :]
        part["rpb"] = None if inputs.rpb is None else inputs.rpb[heads]
        if case.additional_lengths is not None:
            one["additional_lengths"] = case.additional_lengths[b : b + 1]
        out, _ = run(replace(case, **one), type(inputs)(**part), backend)
        torch.testing.assert_close(got[b : b + 1, ..., heads, :], out)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS)
def test_axes_are_alike(backend, seed):
    """Transposing the grid and the arguments transposes the result."""
    case, inputs = draw(seed)
    got, got_lse = run(case, inputs, backend)

    def turn(values):
        return tuple(reversed(values))

    def turned(tensor, last):
        """Reverse the axes of tokens, which ``last`` dimensions follow."""
        axes = range(1, tensor.dim() - last)
        return tensor.permute(0, *reversed(axes), *range(tensor.dim() - last, tensor.dim()))

    arguments = ("tokens", "key_tokens", "kernel_size", "stride", "dilation", "is_causal")
    turned_case = replace(case, **{name: turn(getattr(case, name)) for name in arguments})
    turned_inputs = replace(
        inputs,
        query=turned(inputs.query, 2),
        key=turned(inputs.key, 2),
        value=turned(inputs.value, 2),
        rpb=None if inputs.rpb is None else turned(inputs.rpb, 0),
    )
    out, lse = run(turned_case, turned_inputs, backend)
    torch.testing.assert_close(turned(out, 2), got)
    torch.testing.assert_close(turned(lse, 1), got_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS)
def test_context_is_attention_merged(backend, seed):
    case, inputs = draw(seed, additional=5)
    got, got_lse = run(case, inputs, backend)
    alone = replace(inputs, additional_keys=None, additional_values=None)
    near, near_lse = run(replace(case, additional=0), alone, backend)
    far = natten.attention(
        inputs.query.flatten(1, -3),
        inputs.additional_keys,
        inputs.additional_values,
        return_lse=True,
        backend=backend,
    )
    out, lse = natten.merge_attentions(
        [near.flatten(1, -3), far[0]], [near_lse.flatten(1, -2), far[1]], return_lse=True
    )
    torch.testing.assert_close(got.flatten(1, -3), out)
    torch.testing.assert_close(got_lse.flatten(1, -2), lse)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seed=SEEDS, cut=st.integers(1, 100))
def test_boxes_of_keys_merge_to_the_whole(backend, seed, cut):
    """Half of the keys at a time: what context parallelism rests on."""
    case, inputs = draw(seed, additional=0)
    expected, expected_lse = run(case, inputs, backend)
    length = case.tokens[0]
    cut %= length + 1
    parts = []
    for start, end in ((0, cut), (cut, length)):
        box = replace(
            case,
            grid=case.tokens,
            key_tokens=(end - start, *case.tokens[1:]),
            key_origin=(start,) + (0,) * (case.rank - 1),
        )
        keys = replace(inputs, key=inputs.key[:, start:end], value=inputs.value[:, start:end])
        parts.append(run(box, keys, backend))
    out, lse = natten.merge_attentions(
        [o.flatten(1, -3) for o, _ in parts],
        [l.flatten(1, -2) for _, l in parts],
        return_lse=True,
    )
    torch.testing.assert_close(out, expected.flatten(1, -3))
    torch.testing.assert_close(lse, expected_lse.flatten(1, -2))
