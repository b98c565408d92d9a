"""DTensors in and out, and what DTensor may do with natten's operators.

Batch and heads may be sharded as they come: every rank computes its own. Tokens may not, without
an exchange of keys: `attend` makes one, and the rules of the operators refuse, so that no grid is
gathered unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from natten.distributed.call import Inputs
from natten.distributed.sharding import GridSharding
from natten.functional.call import NUM_TENSORS, Tensors

_Placements = list[Placement]


# --- DTensors in and out


def attend(
    sharded: Callable[..., tuple[Tensor, Tensor]],
    unsharded: Callable[..., tuple[Tensor, Tensor]],
    inputs: Inputs,
    sharding: GridSharding | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of DTensors, computed by ``sharded(inputs, sharding)`` of local ones, or
    ``unsharded(inputs)`` where no mesh dimension shards tokens."""
    mesh, placements = _common(inputs)
    query: Any = inputs.query
    grid = tuple(query.shape[1:-2])
    rank = len(grid)
    roles = [_role(placement, rank) for placement in placements]
    heads_kv = inputs.key.shape[-2]
    for dim, role in enumerate(roles):
        if role == "heads" and heads_kv % mesh.size(dim):
            raise ValueError(
                f"mesh dimension {dim} shares out key heads among {mesh.size(dim)} ranks, got "
                f"{heads_kv} heads"
            )
    local = Inputs._make(
        [_localized(name, t, roles, placements) for name, t in zip(Inputs._fields, inputs)]
    )
    if "tokens" in roles:
        derived = _sharding(grid, mesh, tuple(placements))
        if sharding is not None and sharding != derived:
            raise ValueError(f"sharding must be that of the DTensors, {derived}, got {sharding}")
        out, lse = sharded(local, derived)
    else:
        out, lse = unsharded(local)
    shape = (*query.shape[:-1], inputs.value.shape[-1])
    return _global(out, mesh, placements, shape), _global(lse, mesh, placements, shape[:-1])


_sharding = lru_cache(maxsize=1024)(GridSharding.from_placements)


def _common(inputs: Inputs) -> tuple[DeviceMesh, Sequence[Placement]]:
    """Mesh and placements of query, key and value."""
    query: Any = inputs.query
    for name, tensor in zip(Inputs._fields, inputs):
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor) or tensor.device_mesh != query.device_mesh:
            raise ValueError(f"{name} must be a DTensor on the same mesh as query")
        if name in ("key", "value") and tensor.placements != query.placements:
            raise ValueError(
                f"{name} must be placed as query, {query.placements}, got {tensor.placements}"
            )
    return query.device_mesh, query.placements


def _role(placement: Placement, rank: int) -> str:
    """What a mesh dimension does, by its placement of query."""
    if type(placement) is Replicate:
        return "nothing"
    if type(placement) is Shard and placement.dim <= rank + 1:
        return "batch" if placement.dim == 0 else "tokens" if placement.dim <= rank else "heads"
    raise NotImplementedError(
        f"query must be replicated, or sharded along batch, tokens or heads, got {placement}"
    )


# Of what is not a grid: the dimensions of batch and heads.
_DIMENSIONS: dict[str, dict[str, int]] = {
    "rpb": {"heads": 0},
    "additional_keys": {"batch": 0, "heads": 2},
    "additional_values": {"batch": 0, "heads": 2},
    "sink": {"heads": 0},
    "additional_lengths": {"batch": 0},
}


def _localized(
    name: str, tensor: Any, roles: Sequence[str], placements: Sequence[Placement]
) -> Any:
    """This rank's part of an argument."""
    if tensor is None:
        return None
    if name in ("query", "key", "value"):
        return tensor.to_local()
    if name.endswith("_mask"):
        # Placed as query, which has heads.
        as_query: _Placements = [
            placement if role in ("batch", "tokens") else Replicate()
            for placement, role in zip(placements, roles)
        ]
        return tensor.redistribute(placements=as_query).to_local()
    dimensions = _DIMENSIONS[name]
    placed: _Placements = [
        Shard(dimensions[role]) if role in dimensions else Replicate() for role in roles
    ]
    # Replicated over ranks that compute different parts, each has a part of its gradient.
    gradients = [
        Partial() if type(p) is Replicate and role != "nothing" else p
        for p, role in zip(placed, roles)
    ]
    return tensor.redistribute(placements=placed).to_local(grad_placements=gradients)


def _global(
    tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return DTensor.from_local(
        tensor, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


# --- rules of the operators


def _refuse_tokens(specs: Sequence[Any], names: Sequence[str]) -> None:
    for name, spec in zip(names, specs):
        for placement in () if spec is None else spec.placements:
            if placement.is_shard() and 1 <= placement.dim % spec.ndim <= spec.ndim - 3:
                raise NotImplementedError(
                    f"{name} is sharded along tokens, {spec.placements}: the operator would gather "
                    "the grid. Call natten.distributed.neighborhood_attention, which exchanges the "
                    "keys that are needed, or redistribute it"
                )


def _present(tensors: Sequence[Any], placements: Sequence[Placement]) -> list[Placement | None]:
    return [None if t is None else p for t, p in zip(tensors, placements)]


def _kinds(rank: int) -> list[tuple[Placement, _Placements]]:
    """Ways to share out a call along one mesh dimension: the placement of query, key, value and
    results, and those of rpb, additional keys, additional values, sink, additional_lengths and the
    two masks."""
    whole, batch = Replicate(), Shard(0)
    return [
        (whole, [whole] * 7),
        (batch, [whole, batch, batch, whole, batch, batch, batch]),
        (Shard(rank + 1), [batch, Shard(2), Shard(2), batch, whole, whole, whole]),
    ]


def _rules(tensors: Sequence[Any], of_gradients: bool) -> list[tuple[Any, Any]]:
    """Placements of what the operator gives, and of its tensors."""
    given_tensors = Tensors(*tensors)
    query = given_tensors.query
    _refuse_tokens(tensors[:3], Tensors._fields[:3])
    kinds = _kinds(query.ndim - 3)
    # Packed sequences are one batch entry, with boundaries that all ranks need.
    if given_tensors.cumulative_seqlen_q is not None:
        kinds = [kinds[0], kinds[2]]
    # A part of the heads of query, key and value in one tensor is no call.
    if given_tensors.key is None:
        kinds = kinds[:2]
    rules = []
    for grid, (rpb, keys, values, sink, *others) in kinds:
        placed = [grid, grid, grid, rpb, keys, values, sink, Replicate(), Replicate(), *others]
        given: list[Placement] = [grid, grid]
        if of_gradients:
            # What is replicated while the batch is shared out has a part of its gradient.
            bias, logit = [Partial() if grid == Shard(0) else p for p in (rpb, sink)]
            given = [grid, grid, grid, bias, keys, values, logit]
        rules.append((given, _present(tensors, placed)))
    return rules


@register_sharding(torch.ops.natten.neighborhood_attention.default)
def _forward_rules(*arguments: Any) -> list[tuple[Any, Any]]:
    tensors, rest = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
    return [(given, [*placed, *[None] * len(rest)]) for given, placed in _rules(tensors, False)]


@register_sharding(torch.ops.natten.neighborhood_attention_backward.default)
def _backward_rules(grad_out: Any, grad_lse: Any, *arguments: Any) -> list[tuple[Any, Any]]:
    tensors = arguments[:NUM_TENSORS]
    _, _, *rest = arguments[NUM_TENSORS:]  # out, logsumexp
    rules = []
    for given, placed in _rules(tensors, True):
        needed = [
            g if need and t is not None else Replicate()
            for g, need, t in zip(given, rest[-1], tensors)
        ]
        gradients = _present((grad_out, grad_lse), [placed[0]] * 2)
        rules.append((needed, [*gradients, *placed, placed[0], placed[0], *[None] * len(rest)]))
    return rules


__all__ = ["attend"]
