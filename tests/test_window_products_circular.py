"""Scores and weights of windows that wrap around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from natten import na1d, na2d, na3d
from natten.functional import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

CASES: list[tuple[Any, ...]] = [
    (na1d, na1d_qk, na1d_av, (12,), {"kernel_size": 5, "is_circular": True}),
    (na1d, na1d_qk, na1d_av, (12,), {"kernel_size": 6, "stride": 3, "dilation": 2}),
    (na1d, na1d_qk, na1d_av, (8,), {"kernel_size": 8, "stride": 4}),
    (na1d, na1d_qk, na1d_av, (9,), {"kernel_size": 1, "dilation": 3}),
    (
        na2d, na2d_qk, na2d_av, (7, 12),
        {"kernel_size": (3, 4), "stride": (2, 2), "is_circular": (False, True)},
    ),
    (
        na2d, na2d_qk, na2d_av, (6, 10),
        {"kernel_size": (2, 5), "dilation": (3, 2), "is_causal": (True, False),
         "is_circular": (False, True)},
    ),
    (
        na3d, na3d_qk, na3d_av, (4, 5, 6),
        {"kernel_size": (3, 2, 3), "stride": (1, 1, 2), "is_circular": (True, False, True)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("whole", "qk", "av", "tokens", "window"), CASES)
def test_two_steps_are_one(
    whole: Callable[..., Tensor],
    qk: Callable[..., Tensor],
    av: Callable[..., Tensor],
    tokens: tuple[int, ...],
    window: dict[str, Any],
) -> None:
    """With a bias and additional keys, and their gradients."""
    torch.manual_seed(0)
    window = {"is_circular": True, **window}
    to: Any = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(2, 2, *tokens, 6, **to) for _ in range(3))
    more_k, more_v = (torch.randn(2, 2, 3, 6, **to) for _ in range(2))
    inputs = [q, k, v, more_k, more_v]
    given: dict[str, Any] = {}
    if "is_causal" not in window:
        size = window["kernel_size"]
        sizes = (size,) * len(tokens) if isinstance(size, int) else size
        given["rpb"] = torch.randn(2, *(2 * n - 1 for n in sizes), **to)
        inputs.append(given["rpb"])
    scores = qk(q * 6**-0.5, k, **window, additional_keys=more_k, **given)
    out = av(scores.softmax(-1), v, **window, additional_values=more_v)
    last = [t.movedim(1, -2) for t in (q, k, v, more_k, more_v)]
    expected = whole(
        *last[:3], **window, additional_keys=last[3], additional_values=last[4], **given
    ).movedim(-2, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (out, expected)]
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_slots_are_in_the_order_of_the_window() -> None:
    q = torch.ones(1, 1, 6, 1)
    k = torch.arange(6.0).view(1, 1, 6, 1)
    scores = na1d_qk(q, k, 3, is_circular=True)[0, 0]
    assert scores.tolist() == [[(n + j) % 6 for j in (-1, 0, 1)] for n in range(6)]


def test_derivatives_and_programs() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return na1d_av(na1d_qk(q, k, 3, is_circular=True).softmax(-1), k, 3, is_circular=True)

    assert torch.autograd.gradcheck(attend, (q, k), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, (q, k))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), attend(q, k))
    torch.compiler.reset()
    batched = torch.func.vmap(attend)(*(t[None].expand(3, -1, -1, -1, -1) for t in (q, k)))
    torch.testing.assert_close(batched[1], attend(q, k))


def test_errors() -> None:
    x = torch.randn(1, 1, 10, 2)
    with pytest.raises(ValueError, match="causal or circular but not both"):
        na1d_qk(x, x, 3, is_causal=True, is_circular=True)
    with pytest.raises(ValueError, match="dilation must divide the number of tokens"):
        na1d_qk(x, x, 3, dilation=3, is_circular=True)
    with pytest.raises(ValueError, match="is_circular must have 1 values"):
        na1d_av(x[..., :1].expand(1, 1, 10, 3), x, 3, is_circular=(True, False))
