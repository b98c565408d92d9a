"""Whatever the strides, offsets and alignment of tensors: the bits of contiguous ones, in Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from natten.functional import attention, neighborhood_attention_generic

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted


def _permuted(tensor: Tensor) -> Tensor:
    """Last axis outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def _heads_first(tensor: Tensor) -> Tensor:
    if tensor.dim() < 3:
        return _permuted(tensor)
    return tensor.movedim(-2, 0).contiguous().movedim(0, -2)


def _sliced(tensor: Tensor) -> Tensor:
    """Every second number of a tensor with others between them."""
    between = torch.stack([tensor, torch.full_like(tensor, 77)], -1)
    return between.flatten(-2)[..., ::2]


def _inside(tensor: Tensor) -> Tensor:
    """A corner of a larger tensor: odd strides, and an odd address."""
    larger = tensor.new_full([n + 1 for n in tensor.shape], 77)
    corner = larger[tuple(slice(1, None) for _ in tensor.shape)]
    corner.copy_(tensor)
    return corner


def _shifted(tensor: Tensor) -> Tensor:
    """Contiguous, one number behind an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def _expanded(tensor: Tensor) -> Tensor:
    """The first of the first axis, again and again: a stride of 0."""
    return tensor[:1].expand_as(tensor)


def _spread(tensor: Tensor) -> Tensor:
    """One number everywhere: strides of 0, also of features."""
    return tensor.flatten()[:1].view([1] * tensor.dim()).expand_as(tensor)


def _overlapping(tensor: Tensor) -> Tensor:
    """Each token begins in the middle of the one before."""
    if tensor.dim() < 3:
        return _expanded(tensor)
    strides = [max(tensor.shape[-1] // 2, 1) * (n + 1) for n in range(tensor.dim() - 1)]
    return tensor.flatten().as_strided(tensor.shape, (*strides, 1))


def _turned(tensor: Tensor) -> Tensor:
    """What a flip and a transposition leave behind."""
    return tensor.flip(0, -1).transpose(0, -1).contiguous().transpose(0, -1).flip(0, -1)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    _permuted, _heads_first, _sliced, _inside, _shifted, _expanded, _spread, _overlapping, _turned,
]  # fmt: skip

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__[1:])
ENDS = torch.tensor([0, 20, 20, 55], dtype=torch.int32)


def _same(
    call: Callable[..., Any], views: dict[str, Tensor], gradients: tuple[Tensor, ...]
) -> None:
    """The same bits for views as for contiguous copies of them."""
    results = []
    for tensors in (views, {name: t.contiguous().clone() for name, t in views.items()}):
        leaves = {name: t.detach() for name, t in tensors.items()}
        wanted = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
        out, lse = call(**leaves)
        given = gradients
        if tensors is not views:
            given = tuple(g.contiguous().clone() for g in gradients)
        found = torch.autograd.grad((out, lse), wanted, given)
        results.append([out.detach(), lse.detach(), *found])
    for number, (got, right) in enumerate(zip(*results)):
        assert bool(right.isfinite().all())
        assert torch.equal(got, right), number


@each_layout
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [pytest.param("cutlass", 16, id="pointers"), pytest.param("hopper", 64, id="descriptors")],
)
def test_grids(backend: str, head_dim: int, layout: Callable[[Tensor], Tensor]) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).half()

    def attend(**tensors: Tensor) -> Any:
        return neighborhood_attention_generic(
            **tensors, kernel_size=(3, 4), backend=f"{backend}-fna", return_lse=True
        )

    tensors = {
        "query": randn(2, 5, 6, 2, head_dim), "key": randn(2, 5, 6, 2, head_dim),
        "value": randn(2, 5, 6, 2, head_dim),
    }  # fmt: skip
    if backend == "cutlass":
        tensors |= {
            "additional_keys": randn(2, 3, 2, head_dim),
            "additional_values": randn(2, 3, 2, head_dim),
            "rpb": randn(2, 5, 7),
        }
    views = {name: layout(tensor) for name, tensor in tensors.items()}
    if backend == "cutlass":
        views["additional_lengths"] = _sliced(torch.tensor([3, 1]))
    gradients = layout(randn(2, 5, 6, 2, head_dim)), layout(torch.randn(2, 5, 6, 2))
    _same(attend, views, gradients)


def _attend(cumulative: Tensor, **tensors: Tensor) -> Any:
    return attention(
        **tensors, backend="cutlass-fmha", return_lse=True,
        cumulative_seqlen_Q=cumulative, cumulative_seqlen_KV=cumulative,
        max_seqlen_Q=35, max_seqlen_KV=35,
    )  # fmt: skip


@each_layout
def test_packed(layout: Callable[[Tensor], Tensor]) -> None:
    """Cumulative lengths that are not contiguous, and packed tokens of any layout."""
    views = {name: layout(torch.randn(1, 60, 2, 16).half()) for name in ("query", "key", "value")}
    for cumulative in (_sliced(ENDS), _shifted(ENDS), torch.stack([ENDS, ENDS + 7], 1)[:, 0]):
        assert cumulative.tolist() == ENDS.tolist()
        out, _lse = _attend(cumulative, **views)
        contiguous, _lse = _attend(ENDS, **views)
        assert torch.equal(out, contiguous)


def test_packed_gradients() -> None:
    views = {name: _turned(torch.randn(1, 60, 2, 16).half()) for name in ("query", "key", "value")}
    gradients = _permuted(torch.randn(1, 60, 2, 16).half()), _sliced(torch.zeros(1, 60, 2))

    def attend(**tensors: Tensor) -> Any:
        out, lse = _attend(_sliced(ENDS), **tensors)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    _same(attend, views, gradients)
