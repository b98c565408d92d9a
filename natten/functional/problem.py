"""A call of neighborhood attention without its data: what backends decide and plan by."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch

from natten.window import Axis


class Unavailable(str):
    """The reason of a backend that lacks something in the environment (hardware, a package).

    A named backend that declines with it raises RuntimeError; with a plain string,
    NotImplementedError.
    """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Grid(NamedTuple):
    """One of several grids, and its window; one value per axis each."""

    extents: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return prod(self.extents)


@dataclass(frozen=True)
class Grids:
    """Grids of different sizes, whose tokens lie one grid after the other.

    Attributes:
        runs: The grids in their order; those that follow each other and are alike once, with their
            number.
    """

    runs: tuple[tuple[Grid, int], ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.runs)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def number(self) -> int:
        """How many grids there are."""
        return sum([count for _, count in self.runs])

    @cached_property
    def tokens(self) -> int:
        """Those of all grids."""
        return sum([count * grid.tokens for grid, count in self.runs])

    @cached_property
    def longest(self) -> int:
        """Most tokens of a grid."""
        return max([grid.tokens for grid, _ in self.runs])

    @cached_property
    def heaviest(self) -> Grid:
        """The grid with most pairs of queries and keys."""
        return max([grid for grid, _ in self.runs], key=lambda g: g.tokens * prod(g.kernel_size))


@dataclass(frozen=True)
class Problem:
    """Everything about one call but its data. Tuples have one value for each axis.

    Attributes:
        batch: Batch size.
        query_shape: Extents of the query tensor's box of tokens.
        key_shape: Extents of the key tensor's box of tokens.
        heads: Query heads.
        heads_kv: Key and value heads; divides ``heads``.
        head_dim: Features of a query or key head.
        head_dim_v: Features of a value head.
        kernel_size: Window sizes.
        stride: Queries that share a window.
        dilation: Distances of neighbors.
        is_causal: Whether queries attend to no later token.
        grid: Extents of the global grid, of keys; windows are clamped to it.
        query_origin: Where the query box starts in the grid.
        key_origin: Where the key box starts in the grid. Keys outside the box do not exist.
        scale: Factor on the dot products.
        num_additional: Additional keys that every query sees; 0 for none.
        has_lengths: Whether batch entries have only so many of them as a tensor says.
        has_rpb: Whether a relative position bias is added.
        softcap: Bound c of the scaled products s, which become c * tanh(s / c); 0 for none.
        has_sink: Whether heads have a logit beside those of the keys, whose value is zero.
        has_key_mask: Whether a tensor says which keys are valid.
        has_query_mask: Whether a tensor says which queries are.
        is_circular: Whether windows wrap around; () where they do along no axis.
        upsampling: Queries of each key along the axes, each in the window of its key; () where
            there are as many of both.
        grids: All grids, where batch 1 holds several of different sizes, one after the other:
            shapes and window are those of the heaviest then. None for one size.
        varlen: Whether batch 1 holds packed sequences, each a problem of its own.
        max_seqlen_q: Longest packed query sequence; 0 if not varlen.
        max_seqlen_kv: Longest packed key sequence; 0 if not varlen.
        dtype: Of query, key, value and output.
        device: Of all tensors.
        requires_grad: Whether a backward pass may follow.
    """

    batch: int
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    grid: tuple[int, ...]
    query_origin: tuple[int, ...]
    key_origin: tuple[int, ...]
    scale: float
    num_additional: int = 0
    has_lengths: bool = False
    has_rpb: bool = False
    softcap: float = 0.0
    has_sink: bool = False
    has_key_mask: bool = False
    has_query_mask: bool = False
    is_circular: tuple[bool, ...] = ()
    upsampling: tuple[int, ...] = ()
    grids: Grids | None = None
    varlen: bool = False
    max_seqlen_q: int = 0
    max_seqlen_kv: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    requires_grad: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        # Plans are looked up by problems at every call.
        return self._hash

    @property
    def rank(self) -> int:
        """Axes of tokens."""
        return len(self.kernel_size)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The window's parameters along each axis, as :mod:`natten.window` takes them."""
        is_circular = self.is_circular or (False,) * self.rank
        upsampling = self.upsampling or (1,) * self.rank
        window = self.kernel_size, self.stride, self.dilation, self.is_causal
        return tuple(map(Axis, self.grid, *window, is_circular, upsampling))

    @cached_property
    def num_queries(self) -> int:
        """Query tokens of one batch entry."""
        return prod(self.query_shape) if self.grids is None else self.grids.tokens

    @cached_property
    def num_keys(self) -> int:
        """Key tokens of one batch entry, without the additional ones."""
        return prod(self.key_shape) if self.grids is None else self.grids.tokens

    @property
    def tokens(self) -> tuple[int, ...]:
        """The axes of tokens of the query tensor."""
        return self.query_shape if self.grids is None else (self.grids.tokens,)

    @property
    def entries(self) -> int:
        """Entries of additional keys and their lengths: of the batch, or one for each grid."""
        return self.batch if self.grids is None else self.grids.number

    @cached_property
    def is_dense(self) -> bool:
        """Whether every query attends to every key of its box: attention without a mask."""
        return self.kernel_size == self.grid and not any(self.is_causal)

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Dtype of logsumexp and of intermediate results: float64 for float64, else float32."""
        return accumulation_dtype(self.dtype)

    @property
    def gradient_scale(self) -> float:
        """What gradients are multiplied by: the scale, in the range of the accumulation dtype, for
        where it is beyond, zero has to stay zero."""
        largest = torch.finfo(self.accumulation_dtype).max
        return min(max(self.scale, -largest), largest)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``[batch, *tokens, heads, head_dim_v]``."""
        return (self.batch, *self.tokens, self.heads, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """``[batch, *tokens, heads]``."""
        return (self.batch, *self.tokens, self.heads)


@dataclass(frozen=True)
class Config:
    """Performance knobs. None, or the default, leaves the choice to the backend.

    Attributes:
        q_tile_shape: Query tile of the forward pass.
        kv_tile_shape: Key tile of the forward pass; given with ``q_tile_shape`` or not at all.
        backward_q_tile_shape: Query tile of the backward pass.
        backward_kv_tile_shape: Key tile of the backward pass.
        backward_kv_splits: Parallel key tiles of the backward pass, for each axis.
        backward_use_pt_reduction: Compute the row sums of grad_out * out with torch.
        run_persistent_kernel: Persistent tile scheduling, where the backend has both.
        kernel_schedule: "non", "coop", "pp" or None.
        torch_compile: Compile FlexAttention.
    """

    q_tile_shape: tuple[int, ...] | None = None
    kv_tile_shape: tuple[int, ...] | None = None
    backward_q_tile_shape: tuple[int, ...] | None = None
    backward_kv_tile_shape: tuple[int, ...] | None = None
    backward_kv_splits: tuple[int, ...] | None = None
    backward_use_pt_reduction: bool = False
    run_persistent_kernel: bool = True
    kernel_schedule: str | None = None
    torch_compile: bool = False

    def encode(self) -> str:
        """A canonical string for the operator's schema; "" for the defaults."""
        return encode_config(
            self.q_tile_shape,
            self.kv_tile_shape,
            self.backward_q_tile_shape,
            self.backward_kv_tile_shape,
            self.backward_kv_splits,
            self.backward_use_pt_reduction,
            self.run_persistent_kernel,
            self.kernel_schedule,
            self.torch_compile,
        )


DEFAULT_CONFIG = Config()
NO_KNOBS = tuple(f.default for f in fields(Config))


def encode_config(*values: object) -> str:
    """The values of Config's fields, in order, as one string: "" when all are defaults.

    A tuple becomes "4x8", True and False "1" and "0", None "".
    """
    if values == NO_KNOBS:
        return ""
    parts = []
    for value in values:
        if value is None:
            parts.append("")
        elif isinstance(value, tuple):
            parts.append("x".join([str(v) for v in value]))
        elif isinstance(value, bool):
            parts.append("1" if value else "0")
        else:
            parts.append(str(value))
    return ",".join(parts)


@lru_cache(maxsize=1024)
def decode_config(text: str) -> Config:
    """The inverse of :meth:`Config.encode`."""
    if not text:
        return DEFAULT_CONFIG
    parts = text.split(",")
    if len(parts) != len(NO_KNOBS):
        raise ValueError(f"config must hold {len(NO_KNOBS)} values, as encode_config writes them")
    *tiles, reduction, persistent, schedule, compiled = parts
    try:
        shapes = [tuple(int(n) for n in tile.split("x")) if tile else None for tile in tiles]
    except ValueError:
        raise ValueError(f"config must hold tile shapes like 4x8, got {text!r}") from None
    return Config(  # type: ignore[misc]
        *shapes,  # type: ignore[arg-type]
        backward_use_pt_reduction=reduction == "1",
        run_persistent_kernel=persistent == "1",
        kernel_schedule=schedule or None,
        torch_compile=compiled == "1",
    )


__all__ = [
    "DEFAULT_CONFIG",
    "NO_KNOBS",
    "Config",
    "Grid",
    "Grids",
    "Problem",
    "Unavailable",
    "accumulation_dtype",
    "decode_config",
    "encode_config",
]
