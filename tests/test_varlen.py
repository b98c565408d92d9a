"""Grids of different sizes in one batch."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten import varlen
from natten.functional import operators
from natten.varlen import GridLayout, configure_varlen, neighborhood_attention_varlen
from natten.window import Axis, grid_mask

LAYOUTS = {
    "1-D": [(7,), (12,), (12,), (5,)],
    "2-D": [(5, 8), (9, 4), (9, 4), (6, 6), (5, 8)],
    "3-D": [(3, 4, 5), (2, 6, 4), (3, 4, 5)],
    "of one size": [(6, 5)] * 3,
    "with an empty one": [(4, 6), (0, 6), (5, 4)],
}


def _tensors(layout: GridLayout, seed: int = 0, heads_kv: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            1, layout.total, heads, features, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads, features in ((4, 8), (heads_kv, 8), (heads_kv, 6))
    ]


def _dense(layout: GridLayout, tensors: list[Tensor], windows: list[Any], causal: Any) -> Tensor:
    """Grid by grid, with the window as a mask of all pairs."""
    rows = []
    for size, window, (q, k, v) in zip(
        layout.sizes, windows, zip(*map(layout.unpack, tensors), strict=True), strict=True
    ):
        axes = [
            Axis(n, *(w[axis] for w in window), causal[axis])
            for axis, n in enumerate(size)
        ]  # fmt: skip
        tokens = prod(size)
        q, k, v = (t.reshape(tokens, *t.shape[-2:]) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if tokens:
            scores = scores.masked_fill(~grid_mask(axes), -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(rows)[None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_grid_attends_to_itself(name: str) -> None:
    """With a window of its own; values and gradients are those of dense attention with masks."""
    layout = GridLayout(LAYOUTS[name])
    tensors = _tensors(layout)
    kernels = [tuple(min(3, n) if i % 2 else min(2, n) for n in size)
               for i, size in enumerate(layout.sizes)]  # fmt: skip
    kernels = [k if all(k) else (2,) * layout.rank for k in kernels]
    ones = (1,) * layout.rank
    strides = [ones if i % 2 else k for i, k in enumerate(kernels)]
    causal = (True,) + (False,) * (layout.rank - 1)
    out = neighborhood_attention_varlen(
        *tensors, layout, kernel_size_list=kernels, stride_list=strides, is_causal=causal
    )
    windows = [(k, s, ones) for k, s in zip(kernels, strides, strict=True)]
    expected = _dense(layout, tensors, windows, causal)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, tensors, weights)
    for mine, true in zip(found, torch.autograd.grad(expected, tensors, weights), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)


def test_all_that_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each grid alone; grids of one size that follow each other are one call."""
    layout = GridLayout([(5, 8), (9, 4), (9, 4), (2, 3)])
    query, key, value = _tensors(layout)
    more = [torch.randn(4, 3, 2, n, dtype=torch.float64) for n in (8, 6)]
    lengths = torch.tensor([3, 0, 2, 1])
    masks = [torch.rand(1, layout.total) > 0.3 for _ in range(2)]
    shared: dict[str, Any] = {
        "is_circular": (False, True), "softcap": 3.0, "clip_window": True, "scale": 0.4,
        "sink": torch.randn(4, dtype=torch.float64), "return_lse": True,
    }  # fmt: skip
    calls = []
    generic = natten.varlen.neighborhood_attention_generic

    def counting(**arguments: Any) -> Any:
        calls.append(tuple(arguments["query"].shape))
        return generic(**arguments)

    monkeypatch.setattr(natten.varlen, "neighborhood_attention_generic", counting)
    out, lse = neighborhood_attention_varlen(
        query, key, value, layout, kernel_size=4, additional_keys=more[0],
        additional_values=more[1], additional_lengths=lengths, key_mask=masks[0],
        query_mask=masks[1], **shared,
    )  # fmt: skip
    assert calls == [(1, 5, 8, 4, 8), (2, 9, 4, 4, 8), (1, 2, 3, 4, 8)]
    parts = zip(
        layout.unpack(out), layout.unpack(lse),
        *[layout.unpack(t) for t in (query, key, value, *masks)], strict=True,
    )  # fmt: skip
    for i, (mine, mine_lse, q, k, v, key_mask, query_mask) in enumerate(parts):
        alone, alone_lse = natten.na2d(
            q[None], k[None], v[None], 4, additional_keys=more[0][i : i + 1],
            additional_values=more[1][i : i + 1], additional_lengths=lengths[i : i + 1],
            key_mask=key_mask[None], query_mask=query_mask[None], **shared,
        )  # fmt: skip
        torch.testing.assert_close(mine, alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine_lse, alone_lse[0], rtol=1e-12, atol=1e-12)


def test_configured_ahead() -> None:
    """The same numbers by every spelling; and compiled, without a break."""
    sizes = [(6, 7), (4, 9)]
    tensors = _tensors(GridLayout(sizes))
    plan = configure_varlen(
        sizes, head_dim=8, device=torch.device("cpu"), dtype=torch.float64, requires_grad=True,
        kernel_size=3, dilation_list=[(2, 1), (1, 3)],
    )  # fmt: skip
    out = neighborhood_attention_varlen(*tensors, metadata=plan)
    for again in (
        neighborhood_attention_varlen(
            *tensors, token_layout_list=sizes, kernel_size=3, dilation_list=[(2, 1), (1, 3)]
        ),
        neighborhood_attention_varlen(
            *tensors, GridLayout(sizes), kernel_size_list=[(3, 3), 3],
            dilation_list=[(2, 1), (1, 3)],
        ),
        torch.compile(neighborhood_attention_varlen, fullgraph=True, backend="aot_eager")(
            *tensors, plan
        ),
    ):  # fmt: skip
        assert torch.equal(out, again)


def test_packing() -> None:
    layout = GridLayout([(2, 3), (4, 1)])
    assert (layout.rank, layout.total, layout.tokens) == (2, 10, (6, 4))
    assert layout == GridLayout([[2, 3], (4, 1)])
    assert hash(layout) == hash(GridLayout(((2, 3), (4, 1))))
    assert GridLayout([5, 3]).sizes == ((5,), (3,))
    grids = [torch.randn(*size, 5) for size in layout.sizes]
    packed = layout.pack(grids)
    assert packed.shape == (1, 10, 5)
    unpacked = layout.unpack(packed)
    for grid, again in zip(grids, unpacked, strict=True):
        assert torch.equal(grid, again)
        assert again.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"grids must have the sizes \(\(2, 3\), \(4, 1\)\), got"):
        layout.pack(grids[::-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one grid"),
        ({"sizes": [(3, 4), (5,)]}, "sizes must"),
        ({"sizes": [(3, -4)]}, "sizes must"),
        ({"sizes": [(1, 2, 3, 4)]}, "1, 2 or 3 extents"),
        ({"total": 11}, r"query must hold 10 packed tokens, \[1, 10, ...\], got shape \(1, 11,"),
        ({"kernel_size": None}, "kernel_size or kernel_size_list must be given"),
        ({"kernel_size_list": [2]}, "kernel_size_list must have one value for each of 2 grids"),
        ({"kernel_size": 3}, "kernel_size"),
        ({"additional_keys": torch.zeros(1, 2, 4, 8)}, "one entry for each of 2 grids"),
        ({"metadata": None}, "either metadata or token_layout_list"),
        ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, "key_mask must hold 10 packed tokens"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"sizes": [(2, 3), (2, 2)], "total": 10, "kernel_size": 2, **arguments}
    sizes, total = given.pop("sizes"), given.pop("total")
    tensors = [torch.zeros(1, total, 4, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_varlen(*tensors, **{"metadata": GridLayout(sizes), **given})


def test_what_was_configured_is_not_given_again() -> None:
    plan = configure_varlen([(3, 3)], kernel_size=2)
    tensors = [torch.zeros(1, 9, 4, 8) for _ in range(3)]
    for more in (
        {"kernel_size": 3},
        {"stride": 2},
        {"backend": "cpu-fna"},
        {"q_tile_shape": (2, 2)},
    ):
        with pytest.raises(ValueError, match="must not be given here"):
            neighborhood_attention_varlen(*tensors, plan, **more)


def test_modules_of_packed_grids() -> None:
    """Each grid as alone, with the gradients of everything; one call for each run."""
    layout = GridLayout([(5, 8), (9, 4), (9, 4), (6, 6)])
    torch.manual_seed(0)
    block = natten.nn.NeighborhoodTransformerBlock(16, 2, kernel_size=(3, 3)).double()
    x = torch.randn(1, layout.total, 16, dtype=torch.float64, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def noted(grids: Tensor) -> Tensor:
        shapes.append(tuple(grids.shape))
        return block(grids)

    inputs = (x, *block.parameters())
    out = layout.map(noted, x)
    assert shapes == [(1, 5, 8, 16), (2, 9, 4, 16), (1, 6, 6, 16)]
    alone = layout.pack([block(grid[None])[0] for grid in layout.unpack(x)])
    torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, inputs, weights) for y in (out, alone))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="as many tokens as it is given"):
        layout.map(lambda grids: grids[:, 1:], x)


@pytest.mark.parametrize(
    "options", [{}, {"rel_pos_bias": True, "num_kv_heads": 1}, {"sink": True}], ids=str
)
def test_modules_attend_at_once(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By one call of the operator, where there is a kernel for that; else the operator itself goes
    from size to size, as here."""
    layout = GridLayout([(5, 8), (9, 4), (9, 4), (6, 6)])
    torch.manual_seed(0)
    module = natten.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, **options)
    x = torch.randn(1, layout.total, 16, requires_grad=True)
    valid = torch.rand(1, layout.total) > 0.3
    inputs = (x, *module.parameters())
    problems = []
    compute = operators._compute

    def noted(call: Any, tensors: Any) -> Any:
        problems.append(call.problem)
        return compute(call, tensors)

    monkeypatch.setattr(operators, "_compute", noted)
    for mask in (None, valid):
        apart = module(x, layout=layout, mask=mask)
        expected = torch.autograd.grad(apart.sin().sum(), inputs)
        problems.clear()
        with monkeypatch.context() as context:
            context.setattr(natten.varlen, "_AT_ONCE", (None,))
            together = module(x, layout=layout, mask=mask)
        assert [p.grids is None for p in problems] == [False, True, True, True]
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad(together.sin().sum(), inputs)
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_flops_of_all_grids_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as those of the calls for each size."""
    from torch.utils.flop_counter import FlopCounterMode

    layout = GridLayout([(7, 8), (9, 4), (9, 4), (0, 6)])
    tensors = [t.float().detach().requires_grad_() for t in _tensors(layout)]
    more = [torch.randn(4, 3, 2, n) for n in (8, 6)]
    counts = []
    for names in ((), (None,)):
        monkeypatch.setattr(natten.varlen, "_AT_ONCE", names)
        with FlopCounterMode(display=False) as counter:
            out = neighborhood_attention_varlen(
                *tensors, layout, kernel_size=3, dilation=(1, 1), additional_keys=more[0],
                additional_values=more[1], additional_lengths=torch.tensor([3, 0, 2, 1]),
                is_causal=(True, False),
            )  # fmt: skip
            out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_operator_checks_layouts() -> None:
    """Whoever calls it."""
    query = torch.randn(1, 6, 2, 8)

    def call(window: list[int], heads_kv: int = 0, query: Tensor = query) -> Any:
        key = None if heads_kv else query
        numbers = (heads_kv, window, 0.3, 0.0, 0, 0, "", "", False)
        return torch.ops.natten.neighborhood_attention(query, key, key, *[None] * 9, *numbers)

    out, _ = call([-1, 0, 2, 3, 2, 1, 1])
    assert out.shape == query.shape
    for window, message in (
        ([-1, 0, 2, 3, 2, 1], "must hold a negative rank"),
        ([-4, 0, 0, 0, 0], "must hold a negative rank"),
        ([-1, 3, 2, 3, 2, 1, 1], "must hold 0"),
        ([-1, 0, 0, 3, 2, 1, 1], "number of grids"),
        ([-1, 0, 2, 4, 2, 1, 1], "must hold the tokens of all grids, .1, 8,"),
        ([-1, 0, 2, 3, 4, 1, 1], "kernel_size"),
    ):
        with pytest.raises(ValueError, match=message):
            call(window)
    with pytest.raises(ValueError, match="no packed query"):
        call([-1, 0, 2, 3, 2, 1, 1], 1, torch.randn(1, 6, 4, 8))


def test_when_all_grids_are_one_launch() -> None:
    """Many sizes and small grids; not one size, nor few large grids."""

    def pays(sizes: list[tuple[int, ...]], kernel_size: int, features: int) -> bool:
        plan = GridLayout(sizes).configured({"kernel_size": kernel_size})
        return plan._pays_at_once(plan._all_grids(None, False).grids, features)

    assert pays([(32 + n, 40) for n in range(64)], 7, 8 * 32)
    assert pays([(20, 30), (30, 20)], 7, 4 * 64)
    assert not pays([(20, 30)] * 64, 7, 4 * 64)
    assert not pays([(128, 256), (256, 128)], 63, 16 * 64)
    assert pays([(128, 256), *[(16 + n, 20) for n in range(40)]], 13, 8 * 64)


def test_layouts_remember_a_bounded_number_of_windows(monkeypatch):
    """Calls after that are as those before."""
    monkeypatch.setattr(varlen, "_MAX_KNOWN", 3)
    layout = GridLayout([(7,), (9,)])
    tensors = _tensors(layout)

    def results() -> list[Tensor]:
        return [
            neighborhood_attention_varlen(*tensors, layout, kernel_size=3, dilation=dilation)
            for dilation in (1, 2, 1, 2)
        ]

    before = results()
    plan = layout.configured({"kernel_size": 3})
    for number in range(9):
        layout.configured({"kernel_size": 3, "scale": number})
        plan._all_grids(False, number % 2 == 0)
        plan._pays_at_once(plan._all_grids(False, False).grids, number)
        assert 0 < len(layout._known) <= 3
        assert 0 < len(plan._known) <= 3
    for got, expected in zip(results(), before, strict=True):
        assert torch.equal(got, expected)
