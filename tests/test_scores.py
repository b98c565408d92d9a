"""Soft cap, sink and masks of tokens, against loops over queries and keys."""

from __future__ import annotations

from itertools import product
from math import exp, inf, log, tanh
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten.window import Axis, axis_mask

BACKENDS = ["reference", "cpu", "flex-fna"]
TOKENS, KERNEL, DILATION = (7, 6), (3, 5), (2, 1)
BATCH, HEADS, HEADS_KV, FEATURES, CONTEXT = 2, 4, 2, 3, 2
SOFTCAP = 0.7


def tensors(requires_grad: bool = False) -> dict[str, Tensor]:
    """All tensors of a call, of which those of floats are leaves."""
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_(requires_grad)

    key_mask, query_mask = (torch.rand(BATCH, *TOKENS) < 0.6 for _ in range(2))
    # A query whose window holds no valid key.
    key_mask[1] = False
    key_mask[1, 6, 5] = query_mask[1] = True
    return {
        "query": randn(BATCH, *TOKENS, HEADS, FEATURES),
        "key": randn(BATCH, *TOKENS, HEADS_KV, FEATURES),
        "value": randn(BATCH, *TOKENS, HEADS_KV, FEATURES),
        "additional_keys": randn(BATCH, CONTEXT, HEADS_KV, FEATURES),
        "additional_values": randn(BATCH, CONTEXT, HEADS_KV, FEATURES),
        "rpb": randn(HEADS, 5, 9),
        "sink": randn(HEADS),
        "additional_lengths": torch.tensor([2, 0]),
        "key_mask": key_mask,
        "query_mask": query_mask,
    }


# What a call is given beside query, key and value.
FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "softcap": ("softcap",),
    "sink": ("sink",),
    "key_mask": ("key_mask",),
    "query_mask": ("query_mask",),
    "masks": ("key_mask", "query_mask", "sink"),
    "context": ("key_mask", "query_mask", "additional_keys", "additional_values"),
    "everything": (
        "softcap", "sink", "key_mask", "query_mask", "rpb", "additional_keys",
        "additional_values", "additional_lengths",
    ),
}  # fmt: skip


def chosen(given: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Any]:
    extras: dict[str, Any] = {name: given[name] for name in names if name != "softcap"}
    return extras | ({"softcap": SOFTCAP} if "softcap" in names else {})


def attend(given: dict[str, Tensor], names: tuple[str, ...], **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = natten.na2d(
        given["query"], given["key"], given["value"], KERNEL, dilation=DILATION, return_lse=True,
        **chosen(given, names), **more,
    )  # fmt: skip
    return out, lse


def by_loops(given: dict[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """One score at a time."""
    query, key, value = given["query"], given["key"], given["value"]
    axes = [Axis(n, k, 1, d, False) for n, k, d in zip(TOKENS, KERNEL, DILATION)]
    sees = [axis_mask(torch.arange(a.length)[:, None], torch.arange(a.length), a) for a in axes]
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:-1], -inf, dtype=torch.float64)

    def score(q: Tensor, k: Tensor) -> float:
        s = float(q @ k) * FEATURES**-0.5
        return SOFTCAP * tanh(s / SOFTCAP) if "softcap" in names else s

    for b, x, y, h in product(range(BATCH), *map(range, TOKENS), range(HEADS)):
        if "query_mask" in names and not given["query_mask"][b, x, y]:
            continue
        kv_head, pairs = h // (HEADS // HEADS_KV), []
        for i, j in product(*map(range, TOKENS)):
            valid = "key_mask" not in names or bool(given["key_mask"][b, i, j])
            if valid and sees[0][x, i] and sees[1][y, j]:
                s = score(query[b, x, y, h], key[b, i, j, kv_head])
                if "rpb" in names:
                    distance = (i // 2 - x // 2 + 2, j - y + 4)
                    s += float(given["rpb"][h][distance])
                pairs.append((s, value[b, i, j, kv_head]))
        if "additional_keys" in names:
            lengths = "additional_lengths" in names
            count = int(given["additional_lengths"][b]) if lengths else CONTEXT
            for n in range(count):
                s = score(query[b, x, y, h], given["additional_keys"][b, n, kv_head])
                pairs.append((s, given["additional_values"][b, n, kv_head]))
        if "sink" in names:
            pairs.append((float(given["sink"][h]), torch.zeros(FEATURES, dtype=torch.float64)))
        if pairs:
            total = sum(exp(s) for s, _ in pairs)
            lse[b, x, y, h] = log(total)
            out[b, x, y, h] = sum(exp(s) / total * v for s, v in pairs)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", FEATURE_SETS.values(), ids=FEATURE_SETS)
def test_loops(names: tuple[str, ...], backend: str) -> None:
    given = tensors()
    assert_close(attend(given, names, backend=backend), by_loops(given, names))


@pytest.mark.parametrize("names", FEATURE_SETS.values(), ids=FEATURE_SETS)
def test_gradients_of_the_reference(names: tuple[str, ...]) -> None:
    given = tensors(requires_grad=True)
    used = ["query", "key", "value", *names]
    leaves = [given[n] for n in used if n in given and given[n].is_floating_point()]

    def call(*changed: Tensor) -> tuple[Tensor, Tensor]:
        fresh = dict(given)
        for name, tensor in given.items():
            for leaf, change in zip(leaves, changed):
                if tensor is leaf:
                    fresh[name] = change
        out, lse = attend(fresh, names, backend="reference")
        return out, lse.masked_fill(lse == -inf, 0.0)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_invalid_tokens_hold_does_not_matter(backend: str) -> None:
    """NaN there changes no bit of the others' results, and gradients are zero there."""
    names = ("key_mask", "query_mask", "sink", "softcap", "rpb")
    results = []
    for fill in (0.0, torch.nan):
        given = tensors()
        for name, mask in (("query", "query_mask"), ("key", "key_mask"), ("value", "key_mask")):
            given[name] = given[name].masked_fill(~given[mask][..., None, None], fill)
        leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
        out, lse = attend(given, names, backend=backend)
        grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
        grad_out[~given["query_mask"]] = grad_lse[~given["query_mask"]] = fill
        grads = torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse], allow_unused=True)
        results.append([out, lse, *[g for g in grads if g is not None]])
        dq, dk, dv = grads[:3]
        assert not out[~given["query_mask"]].any()
        assert bool((lse[~given["query_mask"]] == -inf).all())
        assert not dq[~given["query_mask"]].any()
        assert not dk[~given["key_mask"]].any()
        assert not dv[~given["key_mask"]].any()
    for zeros, nans in zip(*results):
        assert torch.equal(zeros, nans)


EVERYTHING = FEATURE_SETS["everything"]


def test_explain_tells_problems_apart() -> None:
    given = tensors()
    told = natten.explain(
        given["query"], given["key"], given["value"], KERNEL, dilation=DILATION,
        **chosen(given, EVERYTHING),
    )  # fmt: skip
    problem = told.problem
    assert (problem.softcap, problem.has_sink) == (SOFTCAP, True)
    assert problem.has_key_mask
    assert problem.has_query_mask
    plain = natten.explain(given["query"], given["key"], given["value"], KERNEL, softcap=None)
    problem = plain.problem
    assert not any((problem.softcap, problem.has_sink, problem.has_key_mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_masks_are_not_constants(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    given = tensors(requires_grad=True)
    leaves = [t for t in given.values() if t.requires_grad]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in (given["key_mask"], ~given["key_mask"]):
            results = [f(given | {"key_mask": mask}, EVERYTHING) for f in (compiled, attend)]
            assert_close(*results)
            assert_close(*[torch.autograd.grad(out.sin().sum(), leaves) for out, _ in results])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_trace_and_vmap() -> None:
    names = ("softcap", "sink", "key_mask")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, sink: Tensor, key_mask: Tensor) -> Tensor:
            given = {"query": x, "key": x, "value": x, "sink": sink, "key_mask": key_mask}
            return attend(given, names)[0]

    drawn = tensors()
    given = (drawn["query"], drawn["sink"], drawn["key_mask"])
    other = (given[0] + 1, given[1] - 1, ~given[2])
    expected = Module()(*other)
    assert_close(torch.export.export(Module(), given).module()(*other), expected)
    assert_close(torch.jit.trace(Module(), given, check_trace=False)(*other), expected)
    stacked = [torch.stack(pair) for pair in zip(given, other)]
    with pytest.warns(UserWarning, match="performance drop"):
        got = torch.vmap(Module())(*stacked)
    assert_close(got, torch.stack([Module()(*given), expected]))


def test_autocast_leaves_sinks_and_masks_alone() -> None:
    given = tensors()
    given = {n: t.float() if t.is_floating_point() else t for n, t in given.items()}
    given["sink"].requires_grad_()
    names = ("sink", "key_mask")
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(given, names, backend="reference")
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), given["sink"])
    assert gradient.dtype == torch.float32
    assert_close(out.float(), attend(given, names)[0], atol=0.05, rtol=0.05)


def test_counted_operations_are_those_of_the_window() -> None:
    """Masks are data: what they spare depends on it, and is not counted."""
    given, counts = tensors(), []
    for names in ((), EVERYTHING[:4]):
        with FlopCounterMode(display=False) as counter:
            attend(given, names)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_rows_that_see_nothing_but_the_sink() -> None:
    """Also where no backend is asked, as there is no key at all."""
    query = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    none = query[:, :0]
    sink = torch.tensor([0.5, -1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 2:] = False
    for mask in (None, valid):
        out, lse = natten.attention(query, none, none, sink=sink, query_mask=mask, return_lse=True)
        assert not out.any()
        expected = sink.detach().expand(2, 5, 3)
        if mask is not None:
            expected = expected.masked_fill(~mask[..., None], -inf)
        assert_close(lse, expected)
    hidden, hidden_lse = natten.attention(
        query, query, query, sink=sink, key_mask=torch.zeros_like(valid), query_mask=valid,
        return_lse=True,
    )  # fmt: skip
    assert not hidden.any()
    assert_close(hidden_lse, expected)
    finite = hidden_lse.masked_fill(hidden_lse == -inf, 0.0)
    (gradient,) = torch.autograd.grad(finite.sum(), sink)
    assert_close(gradient, torch.tensor([7.0, 7.0, 0.0], dtype=torch.float64))


def test_what_goes_separately_is_refused() -> None:
    given = tensors()
    for names in (("softcap",), ("sink",), ("key_mask",), ("query_mask",)):
        with pytest.raises(NotImplementedError, match=f"{names[0]} and attention_kwargs"):
            attend(given, names, attention_kwargs={"backend": "reference"})
