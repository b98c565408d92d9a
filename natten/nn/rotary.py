"""Rotary position embedding on grids of any number of axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natten.validation import bool_tuple, check_is_tensor, check_positive_int
from natten.varlen import GridLayout


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels of queries and keys by angles proportional to their grid
    coordinates.

    RoFormer (https://arxiv.org/abs/2104.09864), axis by axis. Channel `j` pairs with channel `j +
    head_dim // 2`. The `head_dim // 2` pairs are shared out evenly between the axes, in order;
    pairs that are left over do not rotate. Pair n of the m pairs of an axis turns by

        angle = (coordinate + origin) / spacing * theta ** (-n / m)

    so that query · key depends on the difference of their coordinates alone. With `spacing` set to
    an attention's dilation, neighboring tokens of a window are at rotary distance 1. Along a
    circular axis, each frequency is the nearest one that turns whole times around the tokens that
    are rotated, at least once, so that the first and the last of them are neighbors.

    Args:
        head_dim: channels of a head; even, with at least one pair for each axis.
        rank: number of axes of the grid.
        theta: base of the frequencies, one number or one for each axis.
        spacing: coordinates are divided by it, one number or one for each axis.
        is_circular: whether an axis is a ring, one bool or one for each axis.

    `theta`, `spacing` and `is_circular` may be set; angles follow.

    There are no parameters and nothing in the state_dict. Angles are computed in float32 whatever
    the dtype of the module (in float64 for a float64 module), and the result is rounded once to the
    dtype of the input.

    Raises:
        ValueError: for a head_dim that cannot be split.
    """

    def __init__(
        self,
        head_dim: int,
        rank: int,
        theta: float | tuple[float, ...] = 10000.0,
        spacing: float | tuple[float, ...] = 1.0,
        *,
        is_circular: bool | Sequence[bool] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_positive_int("head_dim", head_dim)
        check_positive_int("rank", rank)
        if head_dim % 2 or head_dim // 2 < rank:
            raise ValueError(
                f"head_dim must be even and at least {2 * rank} to rotate with {rank} axes, got "
                f"{head_dim}"
            )
        self.head_dim = head_dim
        self.rank = rank
        self.theta: Any = theta
        self.spacing: Any = spacing
        self.is_circular: Any = is_circular
        # Annotated here, since TorchScript reads the annotations of the class.
        self.frequencies: Tensor
        self.register_buffer("frequencies", self._frequencies(device, dtype), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "is_circular":
            value = bool_tuple(name, value, self.rank)
        if name not in ("theta", "spacing"):
            super().__setattr__(name, value)
            return
        super().__setattr__(name, _for_each_axis(value, self.rank, name))
        if "frequencies" in self._buffers:
            self._recompute()

    def _recompute(self) -> None:
        self.frequencies = self._frequencies(self.frequencies.device, self.frequencies.dtype)

    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[rank, head_dim // 2]: every pair turns with the coordinate of one axis, so that the rest
        of its column is zero.
        """
        pairs = self.head_dim // 2 // self.rank
        # On the CPU, since not every device has float64.
        table = torch.zeros(self.rank, self.head_dim // 2, device="cpu", dtype=torch.float64)
        exponent = torch.arange(pairs, device="cpu", dtype=torch.float64) / -pairs
        for axis, (theta, spacing) in enumerate(zip(self.theta, self.spacing, strict=True)):
            table[axis, axis * pairs : (axis + 1) * pairs] = theta**exponent / spacing
        # Angles in half precision would be useless.
        return table.to(torch.promote_types(dtype, torch.float32)).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # The new device and dtype are kept, the values are not: they may have been rounded, or left
        # on the meta device.
        super()._apply(fn, recurse)
        self._recompute()
        return self

    def rotation(
        self, extent: list[int], origin: list[int] | None = None, grid: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of a grid, `[*extent, 1, head_dim // 2]`, for `rotate`;
        `origin` is where it lies in a larger grid (default 0), and `grid` the extents of that,
        which rings of which it holds a part need.
        """
        return rotation_of_grid(self.frequencies, extent, origin, self.is_circular, grid)

    @torch.jit.unused
    def rotation_of_grids(self, layout: GridLayout) -> tuple[Tensor, Tensor]:
        """`rotation` of each grid of a layout, for packed tokens: `[1, total, 1, head_dim // 2]`.
        Layers that turn alike share what the layout keeps of them.
        """

        def make() -> tuple[Tensor, ...]:
            parts = {size: self.rotation(list(size)) for size in dict.fromkeys(layout.sizes)}
            each = zip(*[parts[size] for size in layout.sizes], strict=True)
            return tuple(
                [torch.cat([t.flatten(0, -3) for t in all_]).unsqueeze(0) for all_ in each]
            )

        if type(self) is RotaryEmbedding:
            what = self.head_dim, self.theta, self.spacing, self.is_circular, self.frequencies.dtype
            cos, sin = layout.kept(what, self.frequencies.device, make)
        else:
            cos, sin = make()
        return cos, sin

    def forward(self, x: Tensor, origin: list[int] | None = None) -> Tensor:
        """Rotates `x`, `[B, *X, heads, head_dim]`, whose first token has the coordinates `origin`
        (default 0).
        """
        check_heads(x, self.rank, self.head_dim)
        cos, sin = self.rotation(x.shape[1:-2], origin)
        return rotate(x, cos, sin)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, rank={self.rank}, theta={self.theta}, "
            f"spacing={self.spacing}"
            + (f", is_circular={self.is_circular}" if any(self.is_circular) else "")
        )


def rotation_of_grid(
    table: Tensor,
    extent: list[int],
    origin: list[int] | None,
    is_circular: list[bool],
    grid: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """`RotaryEmbedding.rotation`, by its table of frequencies."""
    rank = len(extent)
    if origin is not None and len(origin) != rank:
        raise ValueError(f"origin must have {rank} values, one for each axis, got {origin}")
    angles = torch.zeros([1], device=table.device, dtype=table.dtype)
    for axis in range(rank):
        coordinate = torch.arange(extent[axis], device=table.device, dtype=table.dtype)
        if origin is not None:
            coordinate = coordinate + origin[axis]
        for _ in range(rank - axis):
            coordinate = coordinate.unsqueeze(-1)
        frequency = table[axis]
        if is_circular[axis]:
            once = 2.0 * math.pi / (extent[axis] if grid is None else grid[axis])
            around = (frequency / once).round().clamp(min=1.0)
            frequency = torch.where(frequency == 0.0, frequency, around * once)
        angles = angles + coordinate * frequency
    angles = angles.unsqueeze(-2)
    return angles.cos(), angles.sin()


def check_heads(x: Tensor, rank: int, head_dim: int) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor("x", x)
    if x.dim() != rank + 3 or x.shape[-1] != head_dim:
        raise ValueError(
            f"x must have {rank + 3} dimensions, [batch, {rank} spatial, heads, "
            f"head_dim={head_dim}], got a tensor of shape {list(x.shape)}"
        )


# In an fx graph each is one call.
torch.fx.wrap("check_heads")
torch.fx.wrap("rotation_of_grid")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs of `x`, `[B, *X, heads, head_dim]`, as `RotaryEmbedding` says."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def _for_each_axis(value: float | tuple[float, ...], rank: int, name: str) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    are_numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != rank or not are_numbers or any(not 0 < v < math.inf for v in values):
        raise ValueError(f"{name} must be one positive number, or {rank} of them, got {value}")
    return tuple(float(v) for v in values)
