"""Nothing that a call does is visible on its tensors afterwards, and its results are like any."""

from __future__ import annotations

from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from cases import GROUPS, Case
from checks import make_inputs, run
from torch import Tensor

import natten

CASES = [
    Case("grid", (6, 7), (3, 3), rpb=True, additional=3, additional_lengths=(3, 1)),
    Case("full_window", (4, 5), (4, 5), head_dim_v=24),
    Case("dense_gqa", (9,), None, heads=4, heads_kv=2),
    *(c for c in GROUPS["attention"] if c.name in ("varlen_gqa", "attention_no_keys")),
]
BACKENDS = ["cpu", "reference", None]


def state(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()
    return (
        storage.resizable(), storage.nbytes(), tensor.data_ptr(), tensor._version,
        tensor.requires_grad, tensor.is_leaf, tensor.shape, tensor.stride(),
        tensor.storage_offset(), tensor.dtype, tensor.grad_fn is None,
        tensor.grad is None if tensor.is_leaf else None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, backend, dtype):
    inputs = make_inputs(case, dtype)
    tensors = list(inputs.tensors().values())
    before = [(state(t), t.detach().clone()) for t in tensors]
    out, lse = run(case, inputs, backend)
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    states = [state(t) for t in (*grads, out, lse)]
    gradients = torch.autograd.grad([out, lse], tensors, grads)
    assert [state(t) for t in (*grads, out, lse)] == states
    for tensor, (was, values) in zip(tensors, before, strict=True):
        assert state(tensor) == was
        assert torch.equal(tensor.nan_to_num(), values.nan_to_num())
    for tensor in (*tensors, *grads, out, lse, *gradients):
        assert tensor.untyped_storage().resizable()


def test_lengths_stay_as_they_are():
    lengths = torch.tensor([3, 1])
    cumulative = torch.tensor([0, 4, 9], dtype=torch.int32)
    before = [state(lengths), state(cumulative)]
    x, more = torch.randn(2, 9, 2, 8), torch.randn(2, 3, 2, 8)
    natten.functional.neighborhood_attention_generic(
        x, x, x, 3, additional_keys=more, additional_values=more, additional_lengths=lengths,
        backend="cpu",
    )  # fmt: skip
    natten.attention(
        x[:1], x[:1], x[:1], cumulative_seqlen_Q=cumulative, cumulative_seqlen_KV=cumulative,
        max_seqlen_Q=5, max_seqlen_KV=5,
    )  # fmt: skip
    assert [state(lengths), state(cumulative)] == before
    assert lengths.tolist() == [3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products(dtype):
    query, key, value = (torch.randn(1, 2, 6, 7, 8).to(dtype).requires_grad_() for _ in range(3))
    rpb = torch.randn(2, 5, 5).to(dtype).requires_grad_()
    tensors = [query, key, value, rpb]
    before = [state(t) for t in tensors]
    scores = natten.functional.na2d_qk(query, key, 3, rpb=rpb)
    weights = scores.softmax(-1)
    was = state(weights)
    out = natten.functional.na2d_av(weights, value, 3)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert state(weights) == was
    assert [state(t) for t in tensors] == before
    for tensor in (*tensors, scores, weights, out, *gradients):
        assert tensor.untyped_storage().resizable()


def _shard(rank: int, store: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 7, 16)
    for version in (2, 1):
        sharded = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
        sharded.load_state_dict(alone.state_dict())
        if version == 2:
            fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        else:
            sharded = FullyShardedDataParallel(sharded, device_id=torch.device("cpu"))
        for _ in range(2):
            alone.zero_grad()
            sharded.zero_grad()
            expected = alone(x)
            out = sharded(x)
            torch.testing.assert_close(out, expected)
            expected.square().mean().backward()
            out.square().mean().backward()
        if version == 2:
            for got, right in zip(sharded.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(got.grad.full_tensor(), right.grad)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_fully_sharded_modules(tmp_path):
    """Sharding frees parameters by resizing their storage; gradients are those of one process."""
    torch.multiprocessing.start_processes(
        _shard, (tmp_path / "store",), 2, start_method=forks.FORKS.get_start_method()
    )
