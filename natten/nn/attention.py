"""Neighborhood self-attention modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natten.functional.call import Tensors, unpacked
from natten.nn.core import (
    NeighborhoodModule,
    Rotary,
    attend_packed,
    attend_to_all,
    check_flags,
    check_grid,
    check_heads_whole,
    check_probability,
    check_sequence,
    crop,
    fit_mask,
    fitted,
    left_out,
    plan_of,
    refuse_beside_layout,
    refuse_sharded,
)
from natten.nn.explicit import AttentionMap, attention_map
from natten.nn.stream import StreamState, attend_to_stream, check_stream, fit_frames
from natten.older.modules import accepts_older_arguments
from natten.types import IntOrWindows, KernelSizes
from natten.varlen import GridLayout, check_packed

# Control flow on shapes cannot be traced symbolically: in an fx graph each is one call.
torch.fx.wrap("attend_packed")
torch.fx.wrap("attend_to_all")
torch.fx.wrap("check_grid")
torch.fx.wrap("check_sequence")
torch.fx.wrap("crop")
torch.fx.wrap("fit_mask")
torch.fx.wrap("fitted")


class NeighborhoodAttention(NeighborhoodModule):
    """Neighborhood self-attention over a grid of tokens.

    Every token attends to the window of tokens nearest to it
    (https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001,
    https://arxiv.org/abs/2504.16922):

        out = proj(softmax(scale * query · key + rpb) value),  query, key, value = qkv(x)

    Use `NeighborhoodAttention1D`, `2D` or `3D`; they differ in the number of axes alone.

    Args:
        embed_dim: channels of a token; a multiple of num_heads.
        num_heads: heads of the query.
        kernel_size: window size, an int or one for each axis; -1, or None of one axis, for a whole
            axis, however long it is, or the whole dilation group, if dilation divides the axis. A
            list of windows, as `[(3, 3), (7, 7)]`, gives each of so many equal groups of heads its
            own, and so do lists for stride and dilation; the smaller windows use the middle of the
            biases, and `rotary=True` needs one dilation.
        stride: queries that share a window, at most kernel_size. Default 1.
        dilation: distance between the tokens of a window. Default 1.
        is_causal: whether queries attend to no later token along an axis. Default False.
        qkv_bias: whether `qkv` has a bias.
        qk_scale: factor on query · key; None for `head_dim ** -0.5`.
        proj_drop: probability of dropping elements of the output.
        is_circular: whether windows wrap around along an axis (longitude, a panorama's columns).
            Dilation and stride divide its tokens, and it is neither causal nor padded.
        clip_window: make do with grids that are smaller than the window, instead of raising:
            dilation, kernel_size and stride are cut to the room that there is, axis by axis, as
            `natten.na2d` says. Not with pad.
        rel_pos_bias: learn a bias `rpb`, `[num_heads, 2 * kernel_size - 1, ...]`, added to the
            scaled products. No causal axes.
        num_kv_heads: heads of key and value, a divisor of num_heads (grouped-query attention);
            None for num_heads.
        qk_norm: RMS-normalize the channels of every query and key head, with learned weights
            (`q_norm`, `k_norm`; https://arxiv.org/abs/2302.05442).
        rotary: rotate queries and keys by their positions. True for a `RotaryEmbedding` whose
            spacing is the dilation, periodic along circular axes, or one of your own, which several
            modules may share; or any function that is called as it is, with heads `[B, *X, heads,
            head_dim]` and the coordinates of the first token, or None for 0.
        attn_drop: probability of dropping attention weights in training. No fused kernel stores
            the weights, so that training with attn_drop > 0 gathers the keys and values of every
            window (memory times the window size). Evaluation is fused.
        pad: zero-pad axes shorter than `kernel_size * dilation` on the right, before `qkv`, and
            crop before `proj`. Queries attend to the padding. Checkpoints trained with NATTEN up
            to 0.15 expect it for small inputs.
        head_dim: channels of a head; None for `embed_dim / num_heads`.
        learned_scale: learn a scale for each head, `logit_scale`, `[num_heads]`, from qk_scale on.
        softcap: bound c of the scaled products s, which become `c * tanh(s / c)`; None or 0 for
            none.
        sink: learn a logit for each head, `sink`, `[num_heads]`, that joins every softmax with a
            value of zero, so that tokens may attend to nothing.
        device, dtype: of the parameters.

    Arguments of NATTEN 0.14 to 0.17 (`dim`, `bias` for rel_pos_bias with padding, positional
    orders that can be told apart) are taken as well; `natten.older.modules` has the rules.

    Parameters: `qkv.*`, rows in the order query, key, value, each heads by head_dim; `proj.*`;
    and `rpb`, `q_norm.weight`, `k_norm.weight`, `logit_scale`, `sink` where asked for.

    `kernel_size`, `stride`, `dilation`, `is_causal`, `is_circular`, `clip_window`, `scale`,
    `softcap`, `pad`, `attn_drop` and `rotary` may be set to what the constructor takes, and are
    then as if it had been given there.

    A state dict that holds one of the parameters asked for, for a module without it, is warned of,
    since `load_state_dict(strict=False)` drops it.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

    _optional = {**NeighborhoodModule._optional, "qkv.bias": "qkv_bias=True"}  # noqa: RUF012

    @accepts_older_arguments
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
        channels = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(embed_dim, channels, bias=qkv_bias, device=device, dtype=dtype)
        inner = self.num_heads * self.head_dim
        self.proj = nn.Linear(inner, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    @overload
    def forward(
        self,
        x: Tensor,
        registers: None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
        mask: Tensor | None = None,
        layout: GridLayout | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        registers: Tensor,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
        mask: Tensor | None = None,
        layout: GridLayout | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    # TorchScript infers the type of the result from the branch without registers, and does not know
    # what a layout is.
    def forward(  # type: ignore[no-untyped-def]
        self,
        x: Tensor,
        registers: Tensor | None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
        mask: Tensor | None = None,
        layout: Any | None = None,
    ):
        """Attends.

        Args:
            x: `[B, *X, embed_dim]`, any floating-point dtype.
            registers: `[B, R, embed_dim]`, further tokens (class or register tokens) that every
                token attends to, in one softmax with its window, and that attend to every token
                of the grid (not to its padding) and to each other. With a causal axis they are
                earlier than the grid, and attend to each other alone.
            origin: coordinates of the first token in the grid that x is a crop of. Default 0.
            grid: extents of that grid. Windows are then placed in it: tokens whose windows lie
                inside of x get what they would get in the whole grid, others attend to the part
                of their window that is there. Default x's own extents, and origin then matters to
                the rotary embedding alone. There is no padding with it.
            mask: bool `[B, *X]`, True for valid tokens (of images padded to one size, of
                observations that are there). No token attends to the others, nor do registers, and
                what they get is the bias of `proj`. With it, padding (`pad=True`) is not valid.
            layout: a `natten.GridLayout` of grids of different sizes, whose packed tokens x holds,
                `[1, total, embed_dim]`, and mask likewise. Each grid attends to itself, and to
                registers of its own, `[grids, R, embed_dim]`. Not with origin and grid.

        Returns:
            The shape of x, and with registers a pair of it and of the shape of registers.

        Raises:
            ValueError: for another rank or number of channels, axes shorter than
                `kernel_size * dilation` without `pad`.
        """
        if not torch.jit.is_scripting():
            x, registers = left_out(x, "registers", registers)
            x, mask = left_out(x, "mask", mask)
            x, layout = left_out(x, "layout", layout)
        if layout is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention of packed grids")
            else:
                refuse_beside_layout(self, layout, origin=origin, grid=grid)
                return self._forward_packed(x, layout, registers, mask)
        check_grid(x, len(self.is_causal), self.embed_dim, "x")
        if not torch.jit.is_scripting():
            plan = plan_of(self.plan)
            if plan is not None:
                return plan.self_attention(self, x, registers, origin, grid, mask)
        if registers is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention with registers")
            else:
                return self._forward_with_registers(x, registers, origin, grid, mask)
        extent = x.shape[1:-1]
        x = self._placed(x, origin, grid)
        if mask is not None:
            mask = fit_mask(mask, x, extent)
        out = self._attend_heads(self._heads(x), origin, grid, mask)
        if self.pad:
            out = crop(out, extent)
        return self._output(out)

    def _attend_heads(
        self,
        heads: Tensor,
        origin: list[int] | None,
        grid: list[int] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of what one projection made, `[B, *X, heads, head_dim]`."""
        if self._is_packed():
            kernel_size, stride, dilation = fitted(
                heads, self.kernel_size, self.stride, self.dilation, self.clip_window, grid
            )
            return attend_packed(
                heads,
                self.num_kv_heads,
                kernel_size,
                stride,
                dilation,
                self.is_causal,
                self.is_circular,
                self.scale,
                self._bias(kernel_size),
                origin,
                grid,
                self.softcap,
                self._sink(),
                mask,
            )
        query, key, value = self._separated(heads, origin, True)
        return self._attend(query, key, value, None, None, origin, grid, None, mask)

    @overload
    def _forward_packed(
        self, x: Tensor, layout: GridLayout, registers: None, mask: Tensor | None
    ) -> Tensor: ...

    @overload
    def _forward_packed(
        self, x: Tensor, layout: GridLayout, registers: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def _forward_packed(
        self, x: Tensor, layout: GridLayout, registers: Tensor | None, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        masks = () if mask is None else (mask,)
        check_packed("x", x, layout)
        check_sequence(x, 1, self.embed_dim, "x")
        if registers is not None:
            check_sequence(registers, len(layout.sizes), self.embed_dim, "registers")
            if self.pad:  # tokens that have no place in x
                return layout.map_both(
                    lambda grids, *rest: self.forward(grids, rest[-1], None, None, *rest[:-1]),
                    x, *masks, each=[registers],
                )  # fmt: skip
            return self._attend_grids_and_registers(x, layout, registers, mask)
        if self.pad:
            return layout.map(
                lambda grids, *valid: self.forward(grids, None, None, None, *valid), x, *masks
            )
        heads = self._heads(x)
        if self._is_packed():
            tensors = Tensors(*unpacked(heads, self.num_kv_heads), key_mask=mask, query_mask=mask)
            out = self._attend_at_once(tensors, layout)
            if out is None:
                # As one tensor, which has one gradient.
                out = layout.map(
                    lambda grids, *valid: self._attend_heads(grids, None, None, *valid or (None,)),
                    heads, *masks,
                )  # fmt: skip
        else:
            out = self._attend_grids(*self._separated_grids(heads, layout), layout, mask=mask)
        return self._output(out)

    def _attend_grids_and_registers(
        self, x: Tensor, layout: GridLayout, registers: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value = self._separated_grids(self._heads(x), layout)
        of_registers = self._separated(self._heads(registers), None, False)
        out = self._attend_grids(query, key, value, layout, *of_registers[1:], mask=mask)

        def attend(key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
            *valid, query_r, key_r, value_r = rest
            key, value, *valid = (t.flatten(1, self.rank) for t in (key, value, *valid))
            return self._attend_registers(key, value, query_r, key_r, value_r, *valid)

        packed = (key, value) if mask is None else (key, value, mask)
        out_r = layout.map_to_each(attend, *packed, each=of_registers)
        return self._output(out), self._output(out_r)

    def _separated_grids(self, heads: Tensor, layout: GridLayout) -> tuple[Tensor, Tensor, Tensor]:
        """As `_separated`, of packed grids."""
        query, key, value = self._normed(heads)
        query, key = self._rotate_grids(query, key, layout)
        return self._scaled(query), key, value

    def _forward_with_registers(
        self,
        x: Tensor,
        registers: Tensor,
        origin: list[int] | None,
        grid: list[int] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        check_sequence(registers, x.shape[0], self.embed_dim, "registers")
        extent = x.shape[1:-1]
        heads, heads_r = self._heads(self._placed(x, origin, grid)), self._heads(registers)
        out, out_r = self._attend_with_registers(heads, heads_r, extent, origin, grid, mask)
        return self._output(crop(out, extent)), self._output(out_r)

    def _attend_with_registers(
        self,
        heads: Tensor,
        heads_r: Tensor,
        extent: Sequence[int],
        origin: list[int] | None,
        grid: list[int] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a grid, whose extents without padding are `extent`, and of registers."""
        query, key, value = self._separated(heads, origin, True)
        query_r, key_r, value_r = self._separated(heads_r, None, False)
        key_mask = None
        if mask is not None:
            key_mask, mask = mask.flatten(1), fit_mask(mask, heads, extent)
        out = self._attend(query, key, value, key_r, value_r, origin, grid, None, mask)

        key, value = (crop(t, extent).flatten(1, -3) for t in (key, value))
        return out, self._attend_registers(key, value, query_r, key_r, value_r, key_mask)

    def _attend_registers(
        self,
        key: Tensor,
        value: Tensor,
        query_r: Tensor,
        key_r: Tensor,
        value_r: Tensor,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of registers to the tokens of their grid, `[B, tokens, heads, head_dim]`, and
        to each other.
        """
        if any(self.is_causal):
            key, value = key[:, :0], value[:, :0]
            key_mask = None if key_mask is None else key_mask[:, :0]
        if self.attn_drop is not None and self.training:
            return F.scaled_dot_product_attention(
                query_r.transpose(1, 2),
                torch.cat([key, key_r], dim=1).transpose(1, 2),
                torch.cat([value, value_r], dim=1).transpose(1, 2),
                dropout_p=self.attn_drop.p,
                scale=self.scale,
                enable_gqa=self.num_kv_heads != self.num_heads,
            ).transpose(1, 2)
        return attend_to_all(
            query_r, key, value, key_r, value_r, self.scale, self.softcap, self._sink(), key_mask
        )

    def _check_registers(self, x: Tensor, registers: Tensor) -> None:
        check_sequence(registers, x.shape[0], self.embed_dim, "registers")
        if any(self.is_causal):
            raise NotImplementedError(
                "maps of registers, and registers of a grid that is sharded over ranks, are not "
                f"implemented for causal axes, got is_causal={self.is_causal}"
            )

    def _is_packed(self) -> bool:
        """Whether nothing lies between the projection and the attention."""
        has_norm = self.q_norm is not None or self.k_norm is not None
        is_changed = has_norm or self.rotary is not None or self.logit_scale is not None
        return not (is_changed or self._drops() or self.is_grouped)

    def _heads(self, x: Tensor) -> Tensor:
        """The heads of query, key and value, `[B, *X, heads, head_dim]`."""
        if not torch.jit.is_scripting():
            check_heads_whole("qkv", self.qkv, self.heads_mesh)
        # torch 2.10 does not compile the method of tensors while there is a default device.
        return torch.unflatten(
            self.qkv(x), -1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        )

    def _project(
        self, x: Tensor, origin: list[int] | None, is_grid: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[B, *X, heads, head_dim]`: views of one tensor where possible."""
        return self._separated(self._heads(x), origin, is_grid)

    def _separated(
        self,
        heads: Tensor,
        origin: list[int] | None,
        is_grid: bool,
        grid: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._normed(heads)
        if is_grid:
            query, key = self._rotate(query, key, origin, grid)
        return self._scaled(query), key, value

    def _normed(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, before they are rotated."""
        kv = self.num_kv_heads
        query, key, value = heads.split([self.num_heads, kv, kv], -2)
        if self.q_norm is not None:
            query = self.q_norm(query)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return query, key, value

    def _output(self, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out.flatten(-2)))

    @torch.no_grad()
    def stream(
        self, x: Tensor, state: StreamState | None = None, registers: Tensor | None = None
    ) -> tuple[Any, StreamState]:
        """Attention of the next frames of a grid that is causal along its first axis.

        Args:
            x: `[B, t, *X, embed_dim]`, one frame or several.
            state: what the call with the frames before returned; None at the start. It is not
                changed.
            registers: as for `forward`, the same in every call.

        Returns:
            What `forward` of the grid so far returns for these frames, and the state for the next
            call.

        Raises:
            ValueError: without a causal first axis, or for frames of another size than before.
        """
        check_stream(self)
        check_grid(x, self.rank, self.embed_dim, "x")
        extent = x.shape[1:-1]
        origin = [0 if state is None else state.frames, *[0] * (self.rank - 1)]
        query, key, value = self._project(fit_frames(self, x), origin, True)
        if registers is None:
            out, new = attend_to_stream(self, query, key, value, extent, state)
            return self._output(out), new
        check_sequence(registers, x.shape[0], self.embed_dim, "registers")
        query_r, key_r, value_r = self._project(registers, None, False)
        out, new = attend_to_stream(self, query, key, value, extent, state, key_r, value_r)
        empty = key_r[:, :0], value_r[:, :0]
        out_r = attend_to_all(
            query_r, *empty, key_r, value_r, self.scale, self.softcap, self._sink()
        )
        return (self._output(out), self._output(out_r)), new

    @torch.no_grad()
    def attention_map(
        self,
        x: Tensor,
        positions: Tensor | Sequence[Sequence[int]],
        registers: Tensor | None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
    ) -> AttentionMap:
        """The attention weights of some tokens of the grid, exactly, for pictures and debugging.

        Computes the rows of the chosen queries alone, in float32 or better; `forward` and its
        kernels are not involved. Dropout does not act.

        Args:
            x, registers, origin, grid: as for `forward`.
            positions: `[P, rank]`, indices of the queries in x.

        Returns:
            `AttentionMap(grid [B, P, num_heads, *X], additional [B, P, num_heads, R] or None)`.
            Both sum to 1 together, less what falls on padding (`pad=True`) and on the sink, which
            are not shown.
        """
        check_grid(x, self.rank, self.embed_dim, "x")
        extent = x.shape[1:-1]
        key_r = None
        if registers is not None:
            check_sequence(registers, x.shape[0], self.embed_dim, "registers")
            key_r = self._project(registers, None, False)[1]
        x = self._placed(x, origin, grid)
        query, key, _ = self._project(x, origin, True)
        return self._map(query, key, positions, extent, key_r, None, origin, grid)

    @torch.no_grad()
    def register_map(
        self, x: Tensor, registers: Tensor, origin: list[int] | None = None
    ) -> AttentionMap:
        """The attention weights of the registers: `grid [B, R, num_heads, *X]` and
        `additional [B, R, num_heads, R]`. Arguments are as for `forward`.
        """
        refuse_sharded(self.plan, "register_map")
        check_grid(x, self.rank, self.embed_dim, "x")
        self._check_registers(x, registers)
        _, key, _ = self._project(x, origin, True)
        query_r, key_r, _ = self._project(registers, None, False)
        return attention_map(
            query_r, key, None, None, self.scale, key_r, None, self.softcap, self._sink()
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """`NeighborhoodAttention` over sequences, `[B, X, C]`."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """`NeighborhoodAttention` over images, `[B, X, Y, C]`."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """`NeighborhoodAttention` over volumes and videos, `[B, X, Y, Z, C]`."""

    rank = 3


ATTENTION_OF_RANK: dict[int, type[NeighborhoodAttention]] = {
    1: NeighborhoodAttention1D,
    2: NeighborhoodAttention2D,
    3: NeighborhoodAttention3D,
}
