"""Neighborhood cross-attention modules: to a context, and between two grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natten.functional import neighborhood_attention_generic
from natten.nn.core import (
    NeighborhoodModule,
    Rotary,
    check_flags,
    check_grid,
    check_heads_whole,
    check_probability,
    check_sequence,
    crop,
    left_out,
    map_named,
    plan_of,
    refuse_beside_layout,
)
from natten.nn.explicit import AttentionMap
from natten.nn.stream import StreamState, attend_to_stream, check_stream, fit_frames
from natten.types import IntOrWindows, KernelSizes
from natten.validation import check_length_values, check_positive_int, int_tuple
from natten.varlen import GridLayout, check_packed


def check_source(source: Tensor, x: Tensor) -> None:
    if source.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"source must have x's batch size and extents {list(x.shape[:-1])}, got "
            f"{list(source.shape[:-1])}"
        )


def lengths_of(lengths: Tensor, context: Tensor) -> Tensor:
    """context_lengths, checked, where the context is."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript would compile what "and" joins
        if not isinstance(lengths, Tensor):
            raise ValueError(
                f"context_lengths must be a torch.Tensor, got {type(lengths).__name__}"
            )
    # TorchScript does not know the tuple that natten.validation has.
    is_integer = lengths.dtype in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    if lengths.shape != context.shape[:1] or not is_integer:
        raise ValueError(
            f"context_lengths must be {context.shape[0]} integers, got {lengths.dtype} of the "
            f"shape {list(lengths.shape)}"
        )
    if not torch.jit.is_scripting():
        check_length_values("context_lengths", lengths, context.shape[1])
    return lengths.to(context.device)


# Control flow on shapes cannot be traced symbolically: in an fx graph each is one call.
torch.fx.wrap("check_grid")
torch.fx.wrap("check_sequence")
torch.fx.wrap("check_source")
torch.fx.wrap("crop")
torch.fx.wrap("lengths_of")


class NeighborhoodCrossAttention(NeighborhoodModule):
    """Attention of a grid of tokens to neighborhoods and a context sequence, in one softmax.

    Queries come from `x`. Keys and values are the window of every query, in `x` itself or in a
    second grid `source` of the same extents, and all tokens of `context`:

        out = proj(softmax(scale * [q(x) · kv(source), q(x) · context_kv(context)]) ...)

    Use `NeighborhoodCrossAttention1D`, `2D` or `3D`; they differ in the number of axes alone.

    Args:
        embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale,
            proj_drop: as for `NeighborhoodAttention2D`. The context is never masked by is_causal.
        context_dim: channels of the context; None for a module without one.
        source_dim: channels of the grid of keys and values; None for embed_dim.
        upsampling: queries of each key, an int or one for each axis: x has that many times as many
            tokens as source, and every token attends to the window of its cell, as `natten.na2d`
            says. Default 1. Not with biases, rotation, padding or dropout of weights.
        is_circular, clip_window, rel_pos_bias, num_kv_heads, qk_norm, rotary, attn_drop, pad,
            head_dim, learned_scale, softcap, sink: as for `NeighborhoodAttention2D`. Biases and
            rotation act between grids, not on the context; `k_norm` on both.
        device, dtype: of the parameters.

    Parameters: `q`, `kv` (rows in the order key, value), `context_kv` (likewise), `proj`; and
    `rpb`, `q_norm.weight`, `k_norm.weight`, `logit_scale`, `sink` where asked for.

    Attributes may be set, and parameters without a place are told of, as there.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

    _optional = {  # noqa: RUF012
        **NeighborhoodModule._optional,
        "q.bias": "qkv_bias=True",
        "kv.bias": "qkv_bias=True",
        "context_kv.weight": "context_dim",
        "context_kv.bias": "context_dim",
    }

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: KernelSizes,
        stride: IntOrWindows = 1,
        dilation: IntOrWindows = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        is_circular: bool | Sequence[bool] = False,
        clip_window: bool = False,
        context_dim: int | None = None,
        source_dim: int | None = None,
        upsampling: int | Sequence[int] = 1,
        rel_pos_bias: bool = False,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rotary: bool | Rotary = False,
        attn_drop: float = 0.0,
        pad: bool = False,
        head_dim: int | None = None,
        learned_scale: bool = False,
        softcap: float | None = None,
        sink: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            kernel_size,
            stride,
            dilation,
            is_causal,
            is_circular,
            clip_window,
            qk_scale,
            rel_pos_bias,
            num_kv_heads,
            qk_norm,
            rotary,
            attn_drop,
            pad,
            head_dim,
            learned_scale,
            softcap,
            sink,
            device,
            dtype,
        )
        check_flags(qkv_bias=qkv_bias)
        check_probability("proj_drop", proj_drop)
        for name, number in (("context_dim", context_dim), ("source_dim", source_dim)):
            if number is not None:
                check_positive_int(name, number)
        self.upsampling: tuple[int, ...] = int_tuple("upsampling", upsampling, self.rank)
        self.is_upsampled = any(factor > 1 for factor in self.upsampling)
        if self.is_upsampled and (rel_pos_bias or rotary or pad or attn_drop):
            raise NotImplementedError(
                "upsampling is not implemented with rel_pos_bias, rotary, pad and attn_drop, got "
                f"upsampling={self.upsampling}"
            )
        self.source_dim = embed_dim if source_dim is None else source_dim
        self.context_dim = context_dim
        kv_channels = 2 * self.num_kv_heads * self.head_dim
        inner = self.num_heads * self.head_dim
        self.q = nn.Linear(embed_dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(self.source_dim, kv_channels, bias=qkv_bias, device=device, dtype=dtype)
        self.context_kv = None
        if context_dim is not None:
            self.context_kv = nn.Linear(
                context_dim, kv_channels, bias=qkv_bias, device=device, dtype=dtype
            )
        self.proj = nn.Linear(inner, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
        source: Tensor | None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
        layout: Any | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: `[B, *X, embed_dim]`, where queries come from.
            context: `[B, S, context_dim]`, which every query attends to; None for none.
            context_lengths: integers `[B]` from 0 to S, how many tokens of each context are there;
                the others have no influence on the result, and no gradient. None for all.
            source: `[B, *X, source_dim]`, where the keys and values of windows come from; None
                for x. With upsampling, `[B, *(X / upsampling), source_dim]`, and not None.
            origin, grid: as for `NeighborhoodAttention2D.forward`, where x and source are crops.
                Not with upsampling.
            layout: a `natten.GridLayout`, of whose grids x and source hold the packed tokens,
                `[1, total, channels]`, and context what each of them attends to, `[grids, S,
                context_dim]`. Not with upsampling, origin and grid.

        Returns:
            The shape of x.

        Raises:
            ValueError: for tensors that do not fit the module or each other, and axes shorter than
                `kernel_size * dilation` without `pad`. What context_lengths hold is checked on the
                CPU only; elsewhere what is out of range counts as 0 or S.
        """
        if not torch.jit.is_scripting():
            x, context = left_out(x, "context", context)
            x, context_lengths = left_out(x, "context_lengths", context_lengths)
            x, source = left_out(x, "source", source)
            x, layout = left_out(x, "layout", layout)
        if layout is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention of packed grids")
            else:
                refuse_beside_layout(self, layout, origin=origin, grid=grid)
                self._refuse_upsampling("a layout")
                return self._forward_packed(x, layout, context, context_lengths, source)
        check_grid(x, len(self.is_causal), self.embed_dim, "x")
        if not torch.jit.is_scripting():
            plan = plan_of(self.plan)
            if plan is not None:
                self._refuse_upsampling("a grid that is sharded over ranks")
                return plan.cross_attention(self, x, context, context_lengths, source, origin, grid)
        if self.is_upsampled:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention with upsampling")
            else:
                return self._forward_upsampled(x, context, context_lengths, source, origin, grid)
        extent = x.shape[1:-1]
        query, key, value = self._project(x, source, origin, grid)
        key_c, value_c, lengths = self._contexts(x.shape[0], context, context_lengths)
        out = self._attend(query, key, value, key_c, value_c, origin, grid, lengths)
        if self.pad:
            out = crop(out, extent)
        return self._output(out)

    def _forward_packed(
        self,
        x: Tensor,
        layout: GridLayout,
        context: Tensor | None,
        context_lengths: Tensor | None,
        source: Tensor | None,
    ) -> Tensor:
        check_packed("x", x, layout)
        check_sequence(x, 1, self.embed_dim, "x")
        if context is not None and self.context_kv is not None:
            check_sequence(context, len(layout.sizes), self.context_kv.in_features, "context")
        if self.pad:  # tokens that have no place in x
            packed = {"x": x, "source": source}
            each = {"context": context, "context_lengths": context_lengths}
            return map_named(layout, self.forward, packed, each)
        if source is None:
            source = x
        check_packed("source", source, layout)
        check_sequence(source, 1, self.source_dim, "source")
        query, key, value = self._normed(x, source)
        query, key = self._rotate_grids(query, key, layout)
        additional = self._contexts(len(layout.sizes), context, context_lengths)
        out = self._attend_grids(self._scaled(query), key, value, layout, *additional)
        return self._output(out)

    def _forward_upsampled(
        self,
        x: Tensor,
        context: Tensor | None,
        context_lengths: Tensor | None,
        source: Tensor | None,
        origin: list[int] | None,
        grid: list[int] | None,
    ) -> Tensor:
        if source is None or origin is not None or grid is not None:
            raise ValueError("a module with upsampling takes a source, and no origin and grid")
        check_grid(source, self.rank, self.source_dim, "source")
        query, key, value = self._normed(x, source)
        key_c, value_c, lengths = self._contexts(x.shape[0], context, context_lengths)
        out = neighborhood_attention_generic(
            self._scaled(query), key, value, self.kernel_size, self.stride, self.dilation,
            self.is_causal, self.scale, key_c, value_c, additional_lengths=lengths,
            softcap=self.softcap, sink=self._sink(), is_circular=self.is_circular,
            upsampling=self.upsampling, clip_window=self.clip_window,
        )  # fmt: skip
        return self._output(out)

    def _output(self, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _refuse_upsampling(self, name: str) -> None:
        if self.is_upsampled:
            raise NotImplementedError(
                f"{name} with upsampling is not implemented, got upsampling={self.upsampling}"
            )

    def _contexts(
        self, batch: int, context: Tensor | None, context_lengths: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Keys, values and lengths of the context."""
        if context is None:
            if context_lengths is not None:
                raise ValueError("context_lengths was given without a context")
            return None, None, None
        key, value = self._project_context(batch, context)
        if context_lengths is None:
            return key, value, None
        return key, value, lengths_of(context_lengths, key)

    def _project(
        self,
        x: Tensor,
        source: Tensor | None,
        origin: list[int] | None,
        grid: list[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if source is None:
            source = x
        check_grid(source, len(self.is_causal), self.source_dim, "source")
        check_source(source, x)
        x = self._placed(x, origin, grid)
        source = self._placed(source, origin, grid)
        query, key, value = self._normed(x, source)
        query, key = self._rotate(query, key, origin, grid)
        return self._scaled(query), key, value

    def _normed(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, before they are rotated."""
        if not torch.jit.is_scripting():
            check_heads_whole("kv", self.kv, self.heads_mesh)
        query = torch.unflatten(self.q(x), -1, (self.num_heads, self.head_dim))
        key, value = self._split(self.kv(source))
        if self.q_norm is not None:
            query = self.q_norm(query)
        return query, key, value

    def _project_context(self, batch: int, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.context_kv is None:
            raise ValueError("a context was given to a module without context_dim")
        else:
            check_sequence(context, batch, self.context_kv.in_features, "context")
            if not torch.jit.is_scripting():
                check_heads_whole("context_kv", self.context_kv, self.heads_mesh)
            return self._split(self.context_kv(context))

    def _split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value, `[B, *X, heads, head_dim]`: views of one tensor where possible."""
        heads = self.num_kv_heads
        key, value = torch.unflatten(kv, -1, (2 * heads, self.head_dim)).split([heads, heads], -2)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return key, value

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        state: StreamState | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> tuple[Tensor, StreamState]:
        """As `NeighborhoodAttention2D.stream`, with a context that is the same in every call."""
        check_stream(self)
        self._refuse_upsampling("a stream")
        check_grid(x, self.rank, self.embed_dim, "x")
        extent = x.shape[1:-1]
        x = fit_frames(self, x)
        seen = 0 if state is None else state.frames
        origin = [seen, *[0] * (self.rank - 1)]
        reaches = [size[0] * dilation[0] for size, _, dilation in self.head_windows()]
        grid = [max(seen + extent[0], *reaches), *x.shape[2:-1]]
        query, key, value = self._project(x, None, origin, grid)
        additional = self._contexts(x.shape[0], context, context_lengths)
        out, new = attend_to_stream(self, query, key, value, extent, state, *additional)
        return self._output(out), new

    @torch.no_grad()
    def attention_map(
        self,
        x: Tensor,
        positions: Tensor | Sequence[Sequence[int]],
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
        source: Tensor | None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
    ) -> AttentionMap:
        """The attention weights of some tokens of the grid, exactly, for pictures and debugging.

        Computes the rows of the chosen queries alone, in float32 or better; `forward` and its
        kernels are not involved. Dropout does not act.

        Args:
            positions: `[P, rank]`, indices of the queries in x.
            x, context, context_lengths, source, origin, grid: as for `forward`.

        Returns:
            `AttentionMap(grid [B, P, num_heads, *X], additional [B, P, num_heads, S] or None)`.
            Both sum to 1 together, less what falls on padding (`pad=True`), which is not shown.
        """
        check_grid(x, self.rank, self.embed_dim, "x")
        self._refuse_upsampling("attention_map")
        query, key, _ = self._project(x, source, origin, grid)
        key_c = lengths = None
        if context is not None:
            key_c = self._project_context(x.shape[0], context)[0]
            if context_lengths is not None:
                lengths = lengths_of(context_lengths, key_c)
        return self._map(query, key, positions, x.shape[1:-1], key_c, lengths, origin, grid)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.context_dim is not None:
            text += f", context_dim={self.context_dim}"
        if self.source_dim != self.embed_dim:
            text += f", source_dim={self.source_dim}"
        if self.is_upsampled:
            text += f", upsampling={self.upsampling}"
        return text


class NeighborhoodCrossAttention1D(NeighborhoodCrossAttention):
    """`NeighborhoodCrossAttention` over sequences, `[B, X, C]`."""

    rank = 1


class NeighborhoodCrossAttention2D(NeighborhoodCrossAttention):
    """`NeighborhoodCrossAttention` over images, `[B, X, Y, C]`."""

    rank = 2


class NeighborhoodCrossAttention3D(NeighborhoodCrossAttention):
    """`NeighborhoodCrossAttention` over volumes and videos, `[B, X, Y, Z, C]`."""

    rank = 3


CROSS_ATTENTION_OF_RANK: dict[int, type[NeighborhoodCrossAttention]] = {
    1: NeighborhoodCrossAttention1D,
    2: NeighborhoodCrossAttention2D,
    3: NeighborhoodCrossAttention3D,
}
