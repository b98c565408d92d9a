"""GridSharding: how a grid of tokens lies on a device mesh."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import Placement, Replicate, Shard

from natten.distributed.boxes import Box, chunk_lengths, shards, whole
from natten.distributed.exchange import Line, gathered


class Layout(NamedTuple):
    """What an operator needs of a sharding; `layout` makes it of a text, as compiled programs
    carry it.

    Attributes:
        group: The ranks that share the grid.
        grid: Its extents.
        boxes: The box of each of them, in the order of the group.
        rank: This one's number in the group.
    """

    group: dist.ProcessGroup
    grid: tuple[int, ...]
    boxes: tuple[Box, ...]
    rank: int

    @property
    def own(self) -> Box:
        return self.boxes[self.rank]


@lru_cache(maxsize=4096)
def layout(key: str) -> Layout:
    """The layout that `GridSharding.key` describes."""
    name, ranks, grid, axes, splits = literal_eval(key)
    group = _resolve_process_group(name)
    # Groups sort their ranks, meshes need not.
    boxes = dict(zip(ranks, shards(grid, axes, splits), strict=True))
    order = dist.get_process_group_ranks(group)
    return Layout(group, grid, tuple([boxes[rank] for rank in order]), dist.get_rank(group))


@dataclass(frozen=True)
class GridSharding:
    """How a grid of tokens lies on a device mesh: every rank has one box of it.

    Made by :meth:`from_placements`. All ranks of the mesh make the same one; that takes no
    communication.

    Attributes:
        grid: Extents of the whole grid.
        mesh: The device mesh, with all its dimensions.
        dims: The dimensions of the mesh that shard tokens.
        axes: For each of them, the token axis that it shards.
        splits: For each of them, the tokens of its ranks along that axis.
        boxes: The box of every rank of ``group``, in the group's order.
        own: This rank's box.
        group: The ranks that share one grid, whatever else the mesh does.
        lines: For each of ``dims``, the ranks along it.
        without: For each of ``dims``, the sharding without it; None where there is no other.
        key: All this as text.
    """

    grid: tuple[int, ...]
    mesh: DeviceMesh
    dims: tuple[int, ...]
    axes: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    group: dist.ProcessGroup = field(init=False, repr=False, compare=False)
    boxes: tuple[Box, ...] = field(init=False, repr=False, compare=False)
    own: Box = field(init=False, repr=False, compare=False)
    lines: tuple[Line, ...] = field(init=False, repr=False, compare=False)
    without: tuple[GridSharding | None, ...] = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    @classmethod
    def from_placements(
        cls,
        grid: Sequence[int],
        device_mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        splits: Sequence[Sequence[int] | None] | None = None,
    ) -> GridSharding:
        """From DTensor's placements of ``[batch, *grid, heads, head_dim]``.

        Args:
            grid: Extents of the whole grid: one, two or three. Never those of a shard.
            device_mesh: The mesh.
            placements: One for each dimension of the mesh. ``Shard(1)`` is the first token axis.
                Dimensions that replicate, or shard the batch or the heads, have no part in the
                exchange: each of their ranks has a grid of its own.
            splits: For each dimension of the mesh, the tokens of each of its ranks along the axis
                that it shards, or None for what DTensor makes of it, as ``torch.chunk``: the same
                for all but the last ones. A rank may have none.

        Raises:
            ValueError: Arguments that do not fit each other, no dimension that shards tokens, or a
                rank outside of the mesh.
            NotImplementedError: Two dimensions shard one axis, or a placement is of another kind.
        """
        grid = tuple(int(n) for n in grid)
        rank = len(grid)
        if not 1 <= rank <= 3 or min(grid) < 0:
            raise ValueError(f"grid must be the extents of 1, 2 or 3 axes, got {grid}")
        for name, values in (("placements", placements), ("splits", splits)):
            if values is not None and len(values) != device_mesh.ndim:
                raise ValueError(
                    f"{name} must have one value for each of the {device_mesh.ndim} dimensions of "
                    f"the mesh, got {tuple(values)}"
                )
        dims, axes, lengths = [], [], []
        for dim, placement in enumerate(placements):
            # Kinds of Shard that torch derives from it order tokens otherwise.
            if type(placement) not in (Shard, Replicate):
                raise NotImplementedError(f"placements must be Shard or Replicate, got {placement}")
            given = None if splits is None else splits[dim]
            axis = placement.dim % (rank + 3) - 1 if isinstance(placement, Shard) else -1
            if not 0 <= axis < rank:
                if given is not None:
                    raise ValueError(f"splits[{dim}] is for a dimension that shards no tokens")
                continue
            if axis in axes:
                raise NotImplementedError(f"two dimensions of the mesh shard token axis {axis}")
            size = device_mesh.size(dim)
            split = chunk_lengths(grid[axis], size) if given is None else tuple(given)
            if len(split) != size or sum(split) != grid[axis] or min(split) < 0:
                raise ValueError(
                    f"splits[{dim}] must be {size} extents that add up to the {grid[axis]} tokens "
                    f"of axis {axis}, got {split}"
                )
            dims.append(dim)
            axes.append(axis)
            lengths.append(split)
        if not dims:
            raise ValueError(f"no dimension of the mesh shards tokens, got {tuple(placements)}")
        return cls(grid, device_mesh, tuple(dims), tuple(axes), tuple(lengths))

    def __post_init__(self) -> None:
        place = self.mesh.get_coordinate()
        if place is None:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh {self.mesh}")
        index = tuple([slice(None) if d in self.dims else i for d, i in enumerate(place)])
        ranks = tuple(self.mesh.mesh[index].flatten().tolist())
        group = _group(self.mesh, self.dims)
        key = repr((group.group_name, ranks, self.grid, self.axes, self.splits))
        made = layout(key)
        every = range(len(self.dims))
        # Plain attributes, which compilers read without running code.
        for name, value in (
            ("group", group),
            ("key", key),
            ("boxes", made.boxes),
            ("own", made.own),
            ("lines", tuple([_line(self.mesh, self.dims[i], self.splits[i]) for i in every])),
            ("without", tuple([self._without(i) for i in every])),
        ):
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> GridSharding:
        # Modules are copied, process groups are not.
        return self

    def _without(self, index: int) -> GridSharding | None:
        if len(self.dims) == 1:
            return None
        dims, axes, splits = [
            (*values[:index], *values[index + 1 :])
            for values in (self.dims, self.axes, self.splits)
        ]
        return GridSharding(self.grid, self.mesh, dims, axes, splits)

    def resharded(self, grid: Sequence[int], splits: Sequence[Sequence[int]]) -> GridSharding:
        """The same mesh and axes, with another grid and other extents of the shards."""
        return GridSharding(tuple(grid), self.mesh, self.dims, self.axes, tuple(map(tuple, splits)))

    def coarsened(self, factors: Sequence[int]) -> GridSharding:
        """The grid of patches: ``factors`` tokens along each axis become one, the last ones padded.

        Raises:
            ValueError: A shard begins inside of a patch.
        """
        splits = []
        for axis, split in zip(self.axes, self.splits):
            size, ends = factors[axis], [sum(split[: i + 1]) for i in range(len(split))]
            if any(end % size and end != self.grid[axis] for end in ends):
                raise ValueError(
                    f"shards must begin where patches of {size} tokens do along axis {axis}, got "
                    f"extents {split}"
                )
            patches = [-(-end // size) for end in ends]
            splits.append([b - a for a, b in zip([0, *patches], patches)])
        return self.resharded([-(-n // f) for n, f in zip(self.grid, factors)], splits)

    def refined(self, factors: Sequence[int]) -> GridSharding:
        """The grid of pixels, where each token is a patch of ``factors`` of them."""
        splits = [[n * factors[axis] for n in split] for axis, split in zip(self.axes, self.splits)]
        return self.resharded([n * f for n, f in zip(self.grid, factors)], splits)

    def padded(self, minimum: Sequence[int]) -> GridSharding:
        """The grid with every axis of at least ``minimum`` tokens: the last shard has the rest."""
        missing = [max(m - n, 0) for m, n in zip(minimum, self.grid)]
        if not any(missing):
            return self
        splits = [
            [*split[:-1], split[-1] + missing[axis]] for axis, split in zip(self.axes, self.splits)
        ]
        return self.resharded([n + m for n, m in zip(self.grid, missing)], splits)

    def shard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's box of a tensor of the whole grid, whose token axes begin at ``dim``: a view.

        ``dim=2`` is for channels first. No communication.

        Raises:
            ValueError: The tensor is not of the whole grid.
        """
        if tuple(tensor.shape[dim : dim + len(self.grid)]) != self.grid:
            raise ValueError(
                f"tensor must have the grid {self.grid} from dimension {dim} on, got shape "
                f"{tuple(tensor.shape)}"
            )
        for axis, (start, extent) in enumerate(zip(*self.own)):
            tensor = tensor.narrow(dim + axis, start, extent)
        return tensor

    def unshard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The whole grid, on every rank, of this rank's box: the inverse of :meth:`shard`.

        Differentiable: a box's gradient is the sum of what the ranks have for it.

        Raises:
            ValueError: The tensor is not this rank's box.
        """
        rank = len(self.grid)
        check_own(
            tensor.movedim(tuple(range(dim, dim + rank)), tuple(range(1, rank + 1))),
            "tensor",
            self.own,
        )
        before, after = tensor.shape[:dim], tensor.shape[dim + rank :]
        size = before.numel() * after.numel()
        # Gathered with the same size from everyone, which every backend can.
        most = max(box.tokens for box in self.boxes) * size
        flat = F.pad(tensor.flatten(), (0, most - tensor.numel()))
        result = tensor.new_zeros(*before, *self.grid, *after)
        for part, box in zip(gathered(flat, self.group).unbind(), self.boxes):
            piece = part[: box.tokens * size].view(*before, *box.extent, *after)
            where = (slice(None),) * dim + box.within(whole(self.grid))[1:]
            result[where] = piece
        return result


def check_own(tensor: Tensor, name: str, own: Box) -> None:
    """Raise unless a tensor ``[batch, *tokens, ...]`` is of this rank's box."""
    if tuple(tensor.shape[1 : 1 + len(own.extent)]) != own.extent:
        raise ValueError(
            f"{name} must hold this rank's box, of extents {own.extent}, got shape "
            f"{tuple(tensor.shape)}"
        )


def _line(mesh: DeviceMesh, dim: int, split: tuple[int, ...]) -> Line:
    group = mesh.get_group(dim)
    place: Any = mesh.get_coordinate()
    ranks = mesh.mesh[(*place[:dim], slice(None), *place[dim + 1 :])].tolist()
    places = [ranks.index(rank) for rank in dist.get_process_group_ranks(group)]
    return Line(group, tuple(places), split)


def _group(mesh: DeviceMesh, dims: tuple[int, ...]) -> dist.ProcessGroup:
    """The ranks that differ in these dimensions of the mesh alone."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(dims) < mesh.ndim:
        if mesh.mesh_dim_names is None:
            raise ValueError("a mesh of which some dimensions shard tokens needs mesh_dim_names")
        mesh = mesh[tuple([mesh.mesh_dim_names[d] for d in dims])]
    return mesh._flatten().get_group()


__all__ = ["GridSharding", "Layout", "check_own", "layout"]
