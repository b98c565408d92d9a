"""What a program that is to run sharded says once: a context manager, and styles for
torch.distributed.tensor.parallel.parallelize_module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from natten.distributed.modules import Plan
from natten.distributed.sharding import GridSharding
from natten.functional import sharded
from natten.nn import PatchMerging
from natten.nn.attention import NeighborhoodAttention
from natten.nn.block import DropPath
from natten.nn.core import HeadNorm, NeighborhoodModule
from natten.nn.cross_attention import NeighborhoodCrossAttention


@contextmanager
def context_parallel(
    device_mesh: DeviceMesh,
    grid: Sequence[int],
    placements: Sequence[Placement],
    *,
    splits: Sequence[Sequence[int] | None] | None = None,
    **options: Any,
) -> Iterator[GridSharding]:
    """Inside, ``natten.na1d``, ``na2d``, ``na3d`` and attention modules take this rank's box.

    >>> with context_parallel(mesh, (30, 48, 80), (Shard(1), Shard(3))) as sharding:
    ...     out = natten.na3d(query, key, value, (18, 24, 24))  # boxes of sharding.own

    Run the backward pass inside, too: checkpointing recomputes there. A model whose levels have
    different grids needs :class:`NeighborhoodContextParallel`.

    Args:
        device_mesh, grid, placements, splits: As for :meth:`GridSharding.from_placements`.
        **options: Arguments for :func:`neighborhood_attention`, from ``method`` on.

    Yields:
        The sharding.
    """
    sharding = GridSharding.from_placements(grid, device_mesh, placements, splits=splits)
    before = sharded.current
    sharded.current = Plan(sharding, _checked(options))
    try:
        yield sharding
    finally:
        sharded.current = before


_OPTIONS = ("backend", "method", "transport", "heads_dim", "head_chunks", "save_halo")


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"options must be of {', '.join(_OPTIONS)}, got {name!r}")
    return options


class NeighborhoodContextParallel(ParallelStyle):
    """Attention modules inside of a module take this rank's box of a sharded grid of tokens.

    >>> parallelize_module(model, mesh, NeighborhoodContextParallel(sharding))

    Norms, projections and MLPs act on single tokens and need nothing; patches are merged where
    they lie, as long as no shard begins inside of one. Rotary embeddings get coordinates of the
    grid, padding is the last shard's, registers are the same on all ranks and attend to the tokens
    of all of them, and the mean over the tokens of a :class:`natten.models.video.VideoNAT` is that
    of all ranks.

    Parameters stay as they are, and their gradients are this rank's contribution: the loss is the
    sum of the ranks' losses, and DDP or FSDP add up. (They divide by the number of ranks, too. What
    every rank computes alike, as a loss of pooled features, counts as often as there are ranks.)

    Args:
        sharding: Of the first attention module's tokens. Where a module merges patches, those that
            follow it, in the order of their registration, have the coarser grid.
        **options: Arguments for :func:`neighborhood_attention`, from ``method`` on.

    Raises:
        ValueError: Shards begin inside of patches, or the mesh is not the sharding's.
        NotImplementedError: A module that mixes tokens otherwise, or draws other random numbers on
            every rank: convolutions, pooling, norms over tokens, dropout.
    """

    def __init__(self, sharding: GridSharding, **options: Any) -> None:
        self.sharding, self.options = sharding, _checked(options)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh != self.sharding.mesh:
            raise ValueError(
                f"device_mesh must be the sharding's, {self.sharding.mesh}, got {device_mesh}"
            )
        plan = Plan(self.sharding, self.options)
        for name, part in module.named_modules():
            _refuse(name, part)
            if isinstance(part, PatchMerging):
                # Frames of a video are merged one by one: its last axes are theirs.
                factors = (1,) * (len(plan.sharding.grid) - len(part.strides)) + part.strides
                plan = Plan(plan.sharding.coarsened(factors), self.options)
            elif hasattr(part, "plan"):
                part.plan = plan.of_module(part)
        return module


def _refuse(name: str, part: nn.Module) -> None:
    reason = None
    if isinstance(part, nn.modules.conv._ConvNd):
        if part.kernel_size != part.stride or any(d != 1 for d in part.dilation):
            reason = "overlapping convolutions need tokens of other ranks"
    elif isinstance(part, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        reason = "it norms over the tokens of this rank alone"
    elif "Pool" in type(part).__name__ or isinstance(part, nn.MultiheadAttention):
        reason = "it takes tokens of this rank alone"
    elif isinstance(part, (nn.modules.dropout._DropoutNd, DropPath)):
        probability = part.drop_prob if isinstance(part, DropPath) else part.p
        if probability:
            reason = "ranks would not drop the same; set its probability to 0"
    if reason is not None:
        raise NotImplementedError(
            f"{name or type(part).__name__} ({part}) in a sharded grid: {reason}"
        )


class NeighborhoodHeadParallel(ParallelStyle):
    """Attention modules inside of a module compute a part of their heads on every rank.

    >>> parallelize_module(model, mesh["tp"], NeighborhoodHeadParallel())

    The input projections are column-wise parallel and the output projection row-wise, so that
    input and output are whole on every rank, plain tensors both. One projection makes queries, keys
    and values, so that plain ``ColwiseParallel`` would cut it in the wrong places: some ranks would
    get queries alone. Here each has the rows of its own heads. State dicts keep the order of a
    module on one process, in both directions.

    Raises:
        ValueError: The number of key heads is no multiple of the number of ranks.
        NotImplementedError: A module with a list of windows for groups of heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for part in module.modules():
            if isinstance(part, (NeighborhoodAttention, NeighborhoodCrossAttention)):
                _shard_heads(part, device_mesh)
        return module


def _shard_heads(module: NeighborhoodModule, mesh: DeviceMesh) -> None:
    ranks = mesh.size()
    if module.is_grouped:
        raise NotImplementedError(
            "heads that are sharded over ranks have one window, got "
            f"kernel_size={module.kernel_size}, stride={module.stride}, "
            f"dilation={module.dilation}"
        )
    heads, heads_kv = module.num_heads, module.num_kv_heads
    if heads_kv % ranks:
        raise ValueError(f"num_kv_heads must be a multiple of {ranks} ranks, got {heads_kv}")
    packed = {
        "qkv": (heads, heads_kv, heads_kv),
        "q": (heads,),
        "kv": (heads_kv, heads_kv),
        "context_kv": (heads_kv, heads_kv),
    }
    orders = {
        name: _order(parts, module.head_dim, ranks)
        for name, parts in packed.items()
        if getattr(module, name, None) is not None
    }
    for name, order in orders.items():
        linear = getattr(module, name)
        for parameter in linear.parameters():
            parameter.data = parameter.data[order.to(parameter.device)]
        ColwiseParallel()._apply(linear, mesh)
    RowwiseParallel()._apply(module.proj, mesh)  # type: ignore[arg-type]
    for norm in (module.q_norm, module.k_norm):
        if norm is not None:
            _shard_norm(norm, mesh)
    for name in ("rpb", "logit_scale", "sink"):
        whole = getattr(module, name)
        if whole is not None:
            sharded = distribute_tensor(whole.data, mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(sharded, requires_grad=whole.requires_grad))
    module.num_heads, module.num_kv_heads = heads // ranks, heads_kv // ranks
    module.heads_mesh = mesh
    module.register_state_dict_post_hook(_Reordered(orders, inverse=True))
    module.register_load_state_dict_pre_hook(_Reordered(orders, inverse=False))


def _order(heads: Sequence[int], head_dim: int, ranks: int) -> Tensor:
    """The rows of a packed projection, those of a rank's heads together."""
    rows = torch.arange(sum(heads) * head_dim, device="cpu").split([n * head_dim for n in heads])
    return torch.cat([part for parts in zip(*[r.chunk(ranks) for r in rows]) for part in parts])


class _Reordered:
    """Hook that reorders rows of a state dict: to those of one process, or from them."""

    def __init__(self, orders: dict[str, Tensor], inverse: bool) -> None:
        self._orders = {n: o.argsort() if inverse else o for n, o in orders.items()}

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, order in self._orders.items():
            for parameter, own in getattr(module, name).named_parameters():
                key = f"{prefix}{name}.{parameter}"
                value = state_dict.get(key)
                if value is None:
                    continue
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                whole = whole.detach()[order.to(whole.device)]
                if isinstance(own, DTensor):
                    placements = [
                        Shard(0) if isinstance(p, Shard) else Replicate() for p in own.placements
                    ]
                    whole = distribute_tensor(
                        whole, own.device_mesh, placements, src_data_rank=None
                    )
                state_dict[key] = whole


def _shard_norm(norm: HeadNorm, mesh: DeviceMesh) -> None:
    """A norm of heads whose weight is the same on all ranks, with a gradient of all of them."""
    weight = distribute_tensor(norm.weight.data, mesh, [Replicate()])
    norm.weight = nn.Parameter(weight, requires_grad=norm.weight.requires_grad)

    def globally(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[DTensor]:
        (x,) = inputs
        return (DTensor.from_local(x, mesh, [Shard(x.dim() - 2)], run_check=False),)

    def locally(_: nn.Module, inputs: Any, output: DTensor) -> Tensor:
        return output.to_local()

    norm.register_forward_pre_hook(globally)
    norm.register_forward_hook(locally)


__all__ = ["NeighborhoodContextParallel", "NeighborhoodHeadParallel", "context_parallel"]
