"""Transformer blocks around neighborhood attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natten.nn.attention import ATTENTION_OF_RANK
from natten.nn.core import (
    Rotary,
    check_flags,
    check_grid,
    check_probability,
    check_sequence,
    left_out,
    refuse_beside_layout,
    warn_of_dropped,
)
from natten.nn.cross_attention import CROSS_ATTENTION_OF_RANK
from natten.nn.stream import StreamState
from natten.types import IntOrWindows, KernelSizes
from natten.validation import check_is_tensor, check_positive_int
from natten.varlen import GridLayout, check_packed


class DropPath(nn.Module):
    """Drops the residual branch of whole samples in training (https://arxiv.org/abs/1603.09382).

    What is kept is divided by the probability of being kept. `[B, ...]` to the same.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_probability("drop_prob", drop_prob)
        if drop_prob == 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * _sample_mask(x, 1.0 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def _sample_mask(x: Tensor, keep: float) -> Tensor:
    """A number for each sample, `[B, 1, ...]`: 1 / keep with probability keep, else 0."""
    return x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


def _check_cond(cond: Tensor, channels: int, x: Tensor, has_registers: bool) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor("cond", cond)
    fits = cond.dim() == 2 or (cond.dim() == x.dim() and not has_registers)
    if fits and cond.dim() == x.dim():
        for axis in range(x.dim() - 1):
            if cond.shape[axis] != 1 and cond.shape[axis] != x.shape[axis]:
                fits = False
    if not fits or cond.shape[-1] != channels:
        raise ValueError(
            f"cond must have the shape [batch, cond_dim={channels}], got {list(cond.shape)}; "
            f"without registers it may vary over the grid {list(x.shape[1:-1])} along any axis: "
            "it then has all of its axes, of extent 1 where it does not"
        )


def _plain_norm(norm_layer: Callable[..., nn.Module], channels: int, **place: Any) -> nn.Module:
    """A norm without weights of its own."""
    names = inspect.signature(norm_layer).parameters
    # torch's name of the argument, and timm's.
    for name in ("elementwise_affine", "affine"):
        if name in names:
            return norm_layer(channels, **{name: False}, **place)
    raise ValueError(
        f"norm_layer of a block with cond_dim must take elementwise_affine, got {norm_layer!r}"
    )


# Neither rank nor values are known in symbolic traces: there each is one call.
torch.fx.wrap("_check_cond")
torch.fx.wrap("_sample_mask")
torch.fx.wrap("_spread")
torch.fx.wrap("check_grid")
torch.fx.wrap("check_sequence")


class Mlp(nn.Module):
    """Two linear layers with an activation between them: `fc2(act(fc1(x)))`.

    Shapes: `[..., embed_dim]` to the same. Parameters: `fc1`, `fc2`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class GatedMlp(nn.Module):
    """Gated linear unit: `fc2(act(a) * b)`, `a, b = fc1(x)` (https://arxiv.org/abs/2002.05202).

    SwiGLU with the default activation. Shapes: `[..., embed_dim]` to the same. Parameters: `fc1`
    with `2 * hidden_dim` rows, `fc2`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        drop: float = 0.0,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * hidden_dim, bias=bias, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, linear = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(self.act(gate) * linear)))


class AdaptiveModulation(nn.Module):
    """Shift, scale and gate of two residual branches from a conditioning vector.

    The adaLN-Zero of DiT (https://arxiv.org/abs/2212.09748): `linear(silu(cond))`, initialized to
    zero, so that a fresh block is the identity. `[B, ..., cond_dim]` to six of
    `[B, ..., embed_dim]`.
    """

    def __init__(
        self,
        cond_dim: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_dim, 6 * embed_dim, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> list[Tensor]:
        return self.linear(nn.functional.silu(cond)).chunk(6, dim=-1)


class NeighborhoodTransformerBlock(nn.Module):
    """Pre-norm transformer block with neighborhood attention.

        x = x + drop_path(gamma1 * attn(norm1(x)))
        x = x + drop_path(gamma2 * mlp(norm2(x)))

    With a conditioning vector (`cond_dim`), the norms have no weights of their own, their results
    are scaled and shifted and the branches gated as the vector says (`AdaptiveModulation`). With a
    context (`context_dim`), tokens attend to it and to their windows in one softmax
    (`NeighborhoodCrossAttention2D`).

    Parameters are named as in the checkpoints of NAT and DiNAT: `norm1`, `attn.qkv`, `attn.rpb`,
    `attn.proj`, `norm2`, `mlp.fc1`, `mlp.fc2`, `gamma1`, `gamma2`; and `modulation.linear`.

    Args:
        embed_dim, num_heads, kernel_size, stride, dilation, is_causal: as for
            `NeighborhoodAttention2D`.
        rank: number of axes of the grid: 1, 2 or 3. Default 2.
        mlp_ratio: hidden channels of the MLP over embed_dim.
        gated_mlp: use `GatedMlp` with 2/3 of the hidden channels, which has as many parameters.
        act_layer: activation of the MLP; None for GELU, or SiLU in the gated MLP.
        norm_layer: called as `norm_layer(embed_dim, device=, dtype=)`, with `cond_dim` also with
            `elementwise_affine=False` or timm's `affine=False`.
        layer_scale: initial value of gamma1 and gamma2; None for no such parameters.
        drop: dropout probability in the MLP and after `proj`.
        attn_drop: dropout probability of attention weights.
        drop_path: probability of dropping a residual branch of a sample.
        cond_dim: channels of the conditioning vector; None for none.
        context_dim: channels of a context, as of a text; None for none.
        is_circular, clip_window, qkv_bias, qk_scale, rel_pos_bias, num_kv_heads, qk_norm, rotary,
            pad, head_dim, learned_scale, softcap, sink: as for `NeighborhoodAttention2D`.
        device, dtype: of the parameters.

    A state dict that holds `gamma1` or `modulation`, for a block without, is warned of, since
    `load_state_dict(strict=False)` drops them.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: KernelSizes = 7,
        stride: IntOrWindows = 1,
        dilation: IntOrWindows = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        rank: int = 2,
        mlp_ratio: float = 4.0,
        gated_mlp: bool = False,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        layer_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        cond_dim: int | None = None,
        context_dim: int | None = None,
        is_circular: bool | Sequence[bool] = False,
        clip_window: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = False,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rotary: bool | Rotary = False,
        pad: bool = False,
        head_dim: int | None = None,
        learned_scale: bool = False,
        softcap: float | None = None,
        sink: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank not in ATTENTION_OF_RANK:
            raise ValueError(f"rank must be 1, 2 or 3, got {rank}")
        self.rank = rank
        check_flags(gated_mlp=gated_mlp)
        check_positive_int("embed_dim", embed_dim)
        for name, number in (("drop", drop), ("drop_path", drop_path)):
            check_probability(name, number)
        self.embed_dim = embed_dim
        if cond_dim is None:
            self.norm1 = norm_layer(embed_dim, device=device, dtype=dtype)
            self.norm2 = norm_layer(embed_dim, device=device, dtype=dtype)
            self.modulation = None
        else:
            check_positive_int("cond_dim", cond_dim)
            self.norm1 = _plain_norm(norm_layer, embed_dim, device=device, dtype=dtype)
            self.norm2 = _plain_norm(norm_layer, embed_dim, device=device, dtype=dtype)
            self.modulation = AdaptiveModulation(cond_dim, embed_dim, device=device, dtype=dtype)
        self.context_dim = context_dim
        attention: Callable[..., nn.Module] = ATTENTION_OF_RANK[rank]
        if context_dim is not None:
            attention = partial(CROSS_ATTENTION_OF_RANK[rank], context_dim=context_dim)
        self.attn: Any = attention(
            embed_dim,
            num_heads,
            kernel_size,
            stride,
            dilation,
            is_causal,
            is_circular=is_circular,
            clip_window=clip_window,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            proj_drop=drop,
            rel_pos_bias=rel_pos_bias,
            num_kv_heads=num_kv_heads,
            qk_norm=qk_norm,
            rotary=rotary,
            attn_drop=attn_drop,
            pad=pad,
            head_dim=head_dim,
            learned_scale=learned_scale,
            softcap=softcap,
            sink=sink,
            device=device,
            dtype=dtype,
        )
        hidden = int(embed_dim * mlp_ratio)
        self.mlp: nn.Module
        if gated_mlp:
            act_layer = nn.SiLU if act_layer is None else act_layer
            self.mlp = GatedMlp(
                embed_dim, hidden * 2 // 3, act_layer, drop, device=device, dtype=dtype
            )
        else:
            act_layer = nn.GELU if act_layer is None else act_layer
            self.mlp = Mlp(embed_dim, hidden, act_layer, drop, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None
            if layer_scale is not None:
                gamma = nn.Parameter(
                    torch.full((embed_dim,), float(layer_scale), device=device, dtype=dtype)
                )
            self.register_parameter(name, gamma)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        optional = {
            "gamma1": "layer_scale",
            "gamma2": "layer_scale",
            "modulation.linear.weight": "cond_dim",
        }
        warn_of_dropped(
            self.attn, {"context_kv.weight": "context_dim"}, state_dict, prefix + "attn."
        )
        warn_of_dropped(self, optional, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"layer_scale={self.gamma1 is not None}"

    # TorchScript infers the type of the result from the branch without registers.
    def forward(  # type: ignore[no-untyped-def]
        self,
        x: Tensor,
        cond: Tensor | None = None,
        registers: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        layout: Any | None = None,
    ):
        """Transforms `x`, `[B, *X, embed_dim]`.

        Args:
            x: the grid of tokens.
            cond: `[B, cond_dim]`, or with all axes of x, `[B, *X, cond_dim]`, of extent 1 where it
                does not vary (for a vector for each frame, `[B, T, 1, 1, cond_dim]`). Given if and
                only if the block has a `cond_dim`.
            registers: `[B, R, embed_dim]`, further tokens, see `NeighborhoodAttention2D.forward`;
                not beside a context.
            context, context_lengths: as for `NeighborhoodCrossAttention2D.forward`, of a block
                with a `context_dim`.
            mask: bool `[B, *X]`, which tokens are valid, see `NeighborhoodAttention2D.forward`;
                not of a block with a `context_dim`.
            layout: a `natten.GridLayout`, of whose grids x holds the packed tokens, `[1, total,
                embed_dim]`; mask likewise, and cond is `[grids, cond_dim]` or `[1, total,
                cond_dim]`; registers and contexts are those of each grid, `[grids, ...]`.

        Returns:
            The shape of x, and with registers a pair of it and of the shape of registers.
        """
        if not torch.jit.is_scripting():
            if self.modulation is None:
                x, cond = left_out(x, "cond", cond)
            x, registers = left_out(x, "registers", registers)
            x, context = left_out(x, "context", context)
            x, context_lengths = left_out(x, "context_lengths", context_lengths)
            x, mask = left_out(x, "mask", mask)
            x, layout = left_out(x, "layout", layout)
        if layout is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention of packed grids")
            else:
                refuse_beside_layout(self, layout)
                self._refuse_context(context, context_lengths, registers)
                return self._forward_packed(
                    x, cond, registers, context, context_lengths, mask, layout
                )
        check_grid(x, self.rank, self.embed_dim, "x")
        modulation = self._modulation(cond, x, registers is not None)
        if registers is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no attention with registers")
            else:
                self._refuse_context(context, context_lengths, registers)
                attend = partial(self.attn, mask=mask)
                return self._forward_with_registers(x, modulation, registers, attend)
        branch = self._modulate(self.norm1(x), modulation, 0, self.rank)
        if self.context_dim is not None:
            self._refuse_mask(mask)
            branch = self.attn(branch, context, context_lengths)
        else:
            self._refuse_context(context, context_lengths, None)
            # Whoever put another attention there need not know of masks.
            branch = self.attn(branch) if mask is None else self.attn(branch, mask=mask)
        return self._rest(x, branch, modulation, self.rank)

    def _rest(
        self,
        x: Tensor,
        branch: Tensor,
        modulation: list[Tensor],
        axes: int,
        layout: Any | None = None,
    ) -> Tensor:
        """What follows the attention, whose result is `branch`."""
        x = self._add(x, branch, self.gamma1, modulation, 0, axes, layout)
        branch = self.mlp(self._modulate(self.norm2(x), modulation, 3, axes))
        return self._add(x, branch, self.gamma2, modulation, 3, axes, layout)

    def _forward_packed(
        self,
        x: Tensor,
        cond: Tensor | None,
        registers: Tensor | None,
        context: Tensor | None,
        context_lengths: Tensor | None,
        mask: Tensor | None,
        layout: GridLayout,
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._refuse_mask(mask)
        check_packed("x", x, layout)
        check_sequence(x, 1, self.embed_dim, "x")
        of_grids = self._modulation(cond, x, registers is not None)
        modulation = of_grids
        if cond is not None and cond.dim() == 2:
            modulation = [layout.spread(values) for values in of_grids]
        of_registers = None
        branch = self._modulate(self.norm1(x), modulation, 0, 1)
        if registers is not None:
            check_sequence(registers, len(layout.sizes), self.embed_dim, "registers")
            branch_r = self._modulate(self.norm1(registers), of_grids, 0, 1)
            branch, branch_r = self.attn(branch, branch_r, mask=mask, layout=layout)
            of_registers = self._rest(registers, branch_r, of_grids, 1)
        elif self.context_dim is not None:
            branch = self.attn(branch, context, context_lengths, layout=layout)
        else:
            branch = self.attn(branch, mask=mask, layout=layout)
        x = self._rest(x, branch, modulation, 1, layout)
        return x if of_registers is None else (x, of_registers)

    def _refuse_mask(self, mask: Tensor | None) -> None:
        if self.context_dim is not None and mask is not None:
            raise NotImplementedError("a mask of a block with context_dim is not implemented")

    def _refuse_context(
        self, context: Tensor | None, context_lengths: Tensor | None, registers: Tensor | None
    ) -> None:
        if self.context_dim is not None and registers is not None:
            raise ValueError("registers were given to a block with context_dim")
        if self.context_dim is None and (context is not None or context_lengths is not None):
            raise ValueError("a context was given to a block without context_dim")

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        state: StreamState | None = None,
        cond: Tensor | None = None,
        registers: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> tuple[Any, StreamState]:
        """The next frames of a grid that is causal along its first axis.

        Args:
            x: `[B, t, *X, embed_dim]`, one frame or several.
            state: what the call with the frames before returned; None at the start. It is not
                changed.
            cond, registers, context, context_lengths: as for `forward`; cond that varies over
                frames is that of these frames, the others are the same in every call.

        Returns:
            What `forward` of the grid so far returns for these frames, and the state for the next
            call.
        """
        check_grid(x, self.rank, self.embed_dim, "x")
        modulation = self._modulation(cond, x, registers is not None)
        if registers is not None:
            self._refuse_context(context, context_lengths, registers)
            states = []

            def attend(tokens: Tensor, more: Tensor) -> Any:
                result, new = self.attn.stream(tokens, state, more)
                states.append(new)
                return result

            result = self._forward_with_registers(x, modulation, registers, attend)
            return result, states[0]
        branch = self._modulate(self.norm1(x), modulation, 0, self.rank)
        if self.context_dim is not None:
            branch, new = self.attn.stream(branch, state, context, context_lengths)
        else:
            self._refuse_context(context, context_lengths, None)
            branch, new = self.attn.stream(branch, state)
        return self._rest(x, branch, modulation, self.rank), new

    def _forward_with_registers(
        self,
        x: Tensor,
        modulation: list[Tensor],
        registers: Tensor,
        attend: Callable[[Tensor, Tensor], Any],
    ) -> tuple[Tensor, Tensor]:
        check_sequence(registers, x.shape[0], self.embed_dim, "registers")
        streams = [(x, self.rank), (registers, 1)]
        # Symbolic traces unpack a pair, and do not iterate over it.
        of_grid, of_registers = attend(
            *(self._modulate(self.norm1(t), modulation, 0, axes) for t, axes in streams)
        )
        of_grid = self._rest(x, of_grid, modulation, self.rank)
        return of_grid, self._rest(registers, of_registers, modulation, 1)

    def _modulation(self, cond: Tensor | None, x: Tensor, has_registers: bool) -> list[Tensor]:
        if self.modulation is not None:
            if cond is None:
                raise ValueError("a block with cond_dim needs cond, got None.")
            _check_cond(cond, self.modulation.linear.in_features, x, has_registers)
            return self.modulation(cond)
        if cond is not None:
            raise ValueError("cond was given to a block without cond_dim.")
        nothing: list[Tensor] = []
        return nothing

    def _modulate(self, x: Tensor, modulation: list[Tensor], first: int, axes: int) -> Tensor:
        if self.modulation is not None:
            shift, scale = modulation[first], modulation[first + 1]
            return x * (1 + _spread(scale, axes)) + _spread(shift, axes)
        return x

    def _add(
        self,
        x: Tensor,
        branch: Tensor,
        gamma: Tensor | None,
        modulation: list[Tensor],
        first: int,
        axes: int,
        layout: Any | None,
    ) -> Tensor:
        if gamma is not None:
            branch = branch * gamma
        if self.modulation is not None:
            branch = branch * _spread(modulation[first + 2], axes)
        if not torch.jit.is_scripting() and layout is not None:
            drops = self.training and isinstance(self.drop_path, DropPath)
            # Grids are dropped, as the entries of a batch are.
            return x + (layout.map(self.drop_path, branch) if drops else branch)
        return x + self.drop_path(branch)


def _spread(values: Tensor, axes: int) -> Tensor:
    """`[B, C]` to `[B, 1, ..., C]` over the axes of a grid, if they are not there."""
    if values.dim() == 2:
        for _ in range(axes):
            values = values.unsqueeze(1)
    return values
