"""What the attention modules share: window, checks, and the one call of the operator."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natten._internals import is_exporting, is_known, scripted
from natten.functional import neighborhood_attention_generic, sharded
from natten.functional.attention import attention_with_context
from natten.functional.call import Tensors
from natten.functional.head_groups import of_groups
from natten.functional.neighborhood import middle, packed_attention
from natten.nn.explicit import AttentionMap, attention_map, window_attention, window_rows
from natten.nn.rotary import RotaryEmbedding, rotate
from natten.types import IntOrWindows, KernelSizes
from natten.validation import (
    bool_tuple,
    check_circular,
    check_head_groups,
    check_is_tensor,
    check_positive_int,
    check_rpb,
    check_scale,
    check_softcap,
    check_window,
    head_windows,
    int_tuple,
    optional_bool,
    shown,
)
from natten.varlen import GridLayout, attend_at_once
from natten.window import Axis


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    is_circular: list[bool],
    scale: float,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    origin: list[int] | None = None,
    grid: list[int] | None = None,
    additional_lengths: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    clip_window: bool = False,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention and its logsumexp, in eager mode, under torch.compile and in
    TorchScript, where there are no groups of heads and windows have been clipped.
    """
    if torch.jit.is_scripting():
        # CAUSAL and CIRCULAR of natten.functional.call; no axis is both.
        kinds = [int(c) + 2 * int(r) for c, r in zip(is_causal, is_circular)]
        window = kernel_size + stride + dilation + kinds
        if grid is not None:
            corner = [0] * len(grid) if origin is None else origin
            window = window + grid + corner + corner
        # TorchScript knows the operator itself, not the Python around it.
        return torch.ops.natten.neighborhood_attention(
            query,
            key,
            value,
            rpb,
            additional_keys,
            additional_values,
            sink,
            None,
            None,
            additional_lengths,
            mask,
            mask,
            0,
            window,
            scale,
            softcap,
            0,
            0,
            "",
            "",
            torch.is_grad_enabled(),
        )
    out, lse = neighborhood_attention_generic(
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        is_circular=is_circular,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        additional_lengths=additional_lengths,
        rpb=rpb,
        softcap=softcap,
        sink=sink,
        key_mask=mask,
        query_mask=mask,
        grid=grid,
        query_origin=None if grid is None else origin,
        key_origin=None if grid is None else origin,
        clip_window=clip_window,
        return_lse=True,
    )
    return out, lse


def attend_to_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor,
    additional_values: Tensor,
    scale: float,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of tokens to others and to additional ones, `[B, tokens, heads, head_dim]`."""
    if torch.jit.is_scripting():
        return torch.ops.natten.neighborhood_attention(
            query,
            key,
            value,
            None,
            additional_keys,
            additional_values,
            sink,
            None,
            None,
            None,
            key_mask,
            None,
            0,
            [0, 1, 1, 0],
            scale,
            softcap,
            0,
            0,
            "",
            "",
            torch.is_grad_enabled(),
        )[0]
    return attention_with_context(
        query, key, value, additional_keys, additional_values, scale, softcap, sink, key_mask
    )


def attend_packed(
    qkv: Tensor,
    heads_kv: int,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    is_circular: list[bool],
    scale: float,
    rpb: Tensor | None = None,
    origin: list[int] | None = None,
    grid: list[int] | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Neighborhood attention of heads that one projection made: first those of query, then those of
    key and of value. Their gradient is one tensor too.
    """
    if torch.jit.is_scripting():
        heads = qkv.shape[-2] - 2 * heads_kv
        query, key, value = qkv.split([heads, heads_kv, heads_kv], -2)
        return attend(
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            is_circular,
            scale,
            rpb,
            None,
            None,
            origin,
            grid,
            None,
            softcap,
            sink,
            mask,
        )[0]
    out, _ = packed_attention(
        qkv, heads_kv, kernel_size, stride, dilation, is_causal, scale, rpb, origin, grid,
        is_circular=is_circular, softcap=softcap, sink=sink, key_mask=mask, query_mask=mask,
    )  # fmt: skip
    return out


def window_axes(
    extent: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_circular: Sequence[bool],
) -> list[Axis]:
    """The window of a grid, checked: attributes of a module may have been set one by one."""
    window = check_window(
        tuple(extent), tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal)
    )
    check_circular(tuple(is_circular), tuple(extent), *window)
    return list(map(Axis, extent, *window, is_circular))


def attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_circular: Sequence[bool],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    origin: list[int] | None,
    grid: list[int] | None,
    additional_lengths: Tensor | None,
    dropout: float,
) -> Tensor:
    """As `attend`, with dropout of weights."""
    # No fused kernel can drop weights it never stores, and dropping anything else would be
    # another regularizer.
    extent = query.shape[1:-2] if grid is None else grid
    check_rpb(rpb, query, tuple(kernel_size), tuple(is_causal))
    return window_attention(
        query,
        key,
        value,
        window_axes(extent, kernel_size, stride, dilation, is_causal, is_circular),
        [0] * len(extent) if origin is None or grid is None else origin,
        scale,
        rpb,
        additional_keys,
        additional_values,
        additional_lengths,
        dropout,
    )


def left_out(x: Tensor, name: str, argument: Any) -> tuple[Tensor, Any]:
    """x and an optional argument; None for one that `torch.fx` leaves open where it traces the
    module itself, and x is then refused together with another value.
    """
    is_open = (
        isinstance(argument, torch.fx.Proxy)
        and argument.node.op == "placeholder"
        and argument.node.args == (None,)
    )
    return (without(x, name, argument), None) if is_open else (x, argument)


def without(x: Tensor, name: str, argument: object) -> Tensor:
    """x, in graphs of calls without an optional argument, which must not get it afterwards."""
    if argument is not None:
        raise ValueError(
            f"{name} must be None: this graph is of a call without; trace a module that passes "
            f"{name} instead"
        )
    return x


# In an fx graph each is one call.
torch.fx.wrap("attend")
torch.fx.wrap("attend_with_dropout")
torch.fx.wrap("fitted")
torch.fx.wrap("clipped_biases")
torch.fx.wrap("place")
torch.fx.wrap("without")


def check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        optional_bool(name, flag)


def check_probability(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a dropout probability from 0 to 1, got {value!r}")


def warn_of_dropped(
    module: nn.Module, arguments: dict[str, str], state_dict: dict[str, Any], prefix: str
) -> None:
    """Say which parameters of a state dict a module has no place for, though it could have.

    Loaded non-strictly they are dropped, and without a word results would be others. (Modules
    cannot know: they are always told to be strict, and what they collect is ignored later.)

    Args:
        module: That loads.
        arguments: Of the constructor, by the parameter that is there for it.
        state_dict, prefix: As `nn.Module._load_from_state_dict` has them.
    """
    for name, argument in arguments.items():
        place: Any = module
        for part in name.split("."):
            place = getattr(place, part, None)
        if place is None and prefix + name in state_dict:
            warnings.warn(
                f"{prefix}{name} of the state dict has no place in a {type(module).__name__} that "
                f"was built without {argument}, and is dropped",
                UserWarning,
                stacklevel=2,
            )


def check_grid(x: Tensor, rank: int, channels: int, name: str) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor(name, x)
    if x.dim() != rank + 2:
        raise ValueError(
            f"{name} must have {rank + 2} dimensions, [batch, {rank} spatial, channels], "
            f"got a tensor of shape {list(x.shape)}"
        )
    if x.shape[-1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels in its last dimension, "
            f"got a tensor of shape {list(x.shape)}; if it is channels-first: x.movedim(1, -1)"
        )


def check_sequence(x: Tensor, batch: int, channels: int, name: str) -> None:
    if not torch.jit.is_scripting():
        check_is_tensor(name, x)
    if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != channels:
        raise ValueError(
            f"{name} must have the shape [batch={batch}, tokens, channels={channels}], "
            f"got {list(x.shape)}"
        )


def fit_window(x: Tensor, kernel_size: list[int], dilation: list[int], pad: bool) -> Tensor:
    """Zero-pads axes shorter than the dilated window on the right, or refuses them."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return scripted(_fit_window)(x, list(kernel_size), list(dilation), pad)
        if pad and is_exporting():
            # An exported program is one for all sizes.
            amounts: list[Any] = [0, 0]
            for extent, k, d in zip(x.shape[1:], kernel_size, dilation):
                amounts = [0, 0, 0, torch.sym_max(k * d - extent, 0), *amounts[2:]]
            return F.pad(x, amounts)
    return _fit_window(x, kernel_size, dilation, pad)


def _fit_window(x: Tensor, kernel_size: list[int], dilation: list[int], pad: bool) -> Tensor:
    amounts = [0, 0]
    short = False
    for axis in range(len(kernel_size)):
        extent = x.shape[axis + 1]
        needed = kernel_size[axis] * dilation[axis]
        missing = 0
        # Not max(): compilers would carry it through every size that follows.
        if extent < needed:
            missing = needed - extent
            short = True
            if not pad:
                raise ValueError(
                    f"the input has {extent} tokens along axis {axis}, fewer than kernel_size * "
                    f"dilation = {kernel_size[axis]} * {dilation[axis]} = {needed}; use a smaller "
                    "kernel_size or dilation, a larger input, or pad=True to zero-pad the input "
                    "to the window, as modules did up to NATTEN 0.15"
                )
        amounts = [0, 0] + [0, missing] + amounts[2:]
    return F.pad(x, amounts) if short else x


def place(
    x: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    pad: bool,
    origin: list[int] | None,
    grid: list[int] | None,
    is_circular: list[bool],
) -> Tensor:
    """`fit_window`, or where x is a crop of a larger grid, a check that both fit in there."""
    if grid is None:
        for axis in range(len(kernel_size)):
            if pad and is_circular[axis]:
                reach = kernel_size[axis] * dilation[axis]
                if x.shape[axis + 1] < reach:
                    raise ValueError(
                        f"a circular axis is not padded, got {x.shape[axis + 1]} tokens for "
                        f"kernel_size * dilation = {reach} along axis {axis}"
                    )
        return fit_window(x, kernel_size, dilation, pad)
    rank = len(kernel_size)
    corner = [0] * rank if origin is None else origin
    if not torch.jit.is_scripting():
        # Tracers make tensors of sizes.
        numbers = (int, torch.SymInt, Tensor)
        for name, values in (("grid", grid), ("origin", corner)):
            is_list = isinstance(values, Sequence)
            if not is_list or not all(isinstance(v, numbers) for v in values):
                raise ValueError(f"{name} must be a list of {rank} ints, got {shown(values)}")
    if len(grid) != rank or len(corner) != rank:
        raise ValueError(f"grid and origin must have {rank} values, got {grid} and {corner}")
    for axis in range(rank):
        extent = x.shape[axis + 1]
        if corner[axis] < 0 or corner[axis] + extent > grid[axis]:
            raise ValueError(
                f"{extent} tokens from origin {corner[axis]} on are not inside the grid, which has "
                f"{grid[axis]} tokens along axis {axis}"
            )
        if kernel_size[axis] * dilation[axis] > grid[axis]:
            raise ValueError(
                f"kernel_size * dilation = {kernel_size[axis]} * {dilation[axis]} must be at most "
                f"the {grid[axis]} tokens of grid along axis {axis}"
            )
    return x


def fit_mask(mask: Tensor, x: Tensor, extent: list[int]) -> Tensor:
    """Which tokens of a grid of these extents, which x pads, are valid; padding is not."""
    shape = [x.shape[0]] + list(extent)
    if not torch.jit.is_scripting() and not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a torch.Tensor or None, got {shown(mask)}")
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        raise ValueError(
            f"mask must be bools of the shape {shape}, True where a token is valid, got "
            f"{mask.dtype} of the shape {list(mask.shape)}"
        )
    amounts: list[int] = []
    missing = 0
    for axis in range(len(extent)):
        more = x.shape[axis + 1] - extent[axis]
        missing += more
        amounts = [0, more] + amounts
    return F.pad(mask, amounts, value=False) if missing else mask


def crop(x: Tensor, extent: list[int]) -> Tensor:
    """The first `extent` tokens of every axis of `[B, *X, ...]`, a view but in exported programs.

    Those are one for all sizes, and whether a view is contiguous would be a condition on the size.
    """
    for axis in range(len(extent)):
        if torch.jit.is_scripting():
            needed = x.shape[axis + 1] != extent[axis]
        else:
            # A tracer would take the answer for that of all sizes.
            is_tracing = torch.jit.is_tracing()
            needed = is_tracing or not is_known(x.shape[axis + 1] == extent[axis])
            if needed and is_exporting():
                amounts = [0, 0] * (x.dim() - axis - 2)
                x = F.pad(x, [*amounts, 0, extent[axis] - x.shape[axis + 1]])
                continue
        # A view of everything would still fill a tensor with zeros and copy in the backward pass.
        if needed:
            x = x.narrow(axis + 1, 0, extent[axis])
    return x


def whole_axes(x: Tensor, kernel_size: list[int], grid: list[int] | None) -> list[int]:
    """kernel_size with the number of tokens of an axis, `[B, *X, C]`, in place of -1."""
    if -1 not in kernel_size:
        return kernel_size
    sizes: list[int] = []
    for axis in range(len(kernel_size)):
        extent = x.shape[axis + 1] if grid is None else grid[axis]
        sizes.append(extent if kernel_size[axis] == -1 else kernel_size[axis])
    return sizes


def fitted(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    clip_window: bool,
    grid: list[int] | None,
) -> tuple[list[int], list[int], list[int]]:
    """kernel_size, stride and dilation for the grid of x, `[B, *X, C]`: a window of -1 is the
    whole axis, or the whole dilation group, and clipped ones are no larger than there is room for,
    as `natten.na2d` says. Windows of groups of heads stay what they are.
    """
    if not clip_window and -1 not in kernel_size:
        return kernel_size, stride, dilation
    if not torch.jit.is_scripting():
        if head_windows(kernel_size, stride, dilation) is not None:
            return kernel_size, stride, dilation
        if torch.jit.is_tracing():
            window = list(kernel_size), list(stride), list(dilation)
            return scripted(_fitted)(x, *window, clip_window, grid)
    return _fitted(x, kernel_size, stride, dilation, clip_window, grid)


def _fitted(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    clip_window: bool,
    grid: list[int] | None,
) -> tuple[list[int], list[int], list[int]]:
    sizes: list[int] = []
    strides: list[int] = []
    dilations: list[int] = []
    for axis in range(len(kernel_size)):
        extent = x.shape[axis + 1] if grid is None else grid[axis]
        k, s, d = kernel_size[axis], stride[axis], dilation[axis]
        if clip_window:
            d = min(d, max(extent, 1))
        if k == -1:
            if d > 1 and extent % d != 0:
                raise ValueError(
                    "kernel_size=-1, everything along an axis, goes with a dilation that divides "
                    f"its tokens, got dilation={d} for {extent} tokens along axis {axis}"
                )
            k = extent if d == 1 else extent // d
        if clip_window:
            k = min(k, max(extent, 1) // d)
            s = min(s, k)
        sizes.append(k)
        strides.append(s)
        dilations.append(d)
    return sizes, strides, dilations


def clipped_biases(rpb: Tensor, kernel_size: list[int]) -> Tensor:
    """The biases of a window that was clipped, of those of the whole one; all of those of groups
    of heads.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript would compile what "and" joins
        if head_windows(kernel_size) is not None:
            return rpb
    return middle(rpb, kernel_size)


def plan_of(plan: Any) -> Any:
    """A module's plan of a sharded grid, or that of the context; None where it attends alone."""
    return sharded.current if plan is None else plan


def refuse_sharded(plan: Any, name: str) -> None:
    """For what takes the tokens of one rank for those of the grid."""
    if plan_of(plan) is not None:
        raise NotImplementedError(
            f"{name} of a grid that is sharded over ranks is not implemented: use an unsharded copy"
        )


def refuse_beside_layout(module: Any, layout: Any, **given: Any) -> None:
    """For packed grids: what is a layout, and goes with none of these."""
    if not isinstance(layout, GridLayout):
        raise ValueError(f"layout must be a natten.GridLayout, got {shown(layout)}")
    if layout.rank != module.rank:
        raise ValueError(f"layout must hold grids of {module.rank} axes, got {layout}")
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name} beside a layout is not implemented")
    if isinstance(module, NeighborhoodModule):
        refuse_sharded(module.plan, "a layout")


def check_heads_whole(name: str, projection: nn.Module, heads_mesh: Any) -> None:
    """Refuse rows of a packed projection that were cut regardless of heads."""
    weight = getattr(projection, "weight", None)
    if heads_mesh is not None or type(weight) is nn.Parameter or not isinstance(weight, Tensor):
        return
    if any(placement.is_shard() for placement in getattr(weight, "placements", ())):
        raise ValueError(
            f"{name} holds the rows of several kinds of heads, and a plan as ColwiseParallel gives "
            "ranks the wrong ones; use natten.distributed.NeighborhoodHeadParallel"
        )


Rotary = Callable[[Tensor, list[int] | None], Tensor]


def _takes_two(function: Any) -> bool:
    """Whether it can be called with two arguments."""
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


class HeadNorm(nn.RMSNorm):
    """RMSNorm whose weight follows the dtype of the input, as it is under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# Attributes that are stored as the constructor stores them, however they are set.
_SETTABLE = frozenset(
    (
        "kernel_size", "stride", "dilation", "is_causal", "is_circular", "clip_window", "scale",
        "softcap", "pad", "attn_drop", "rotary",
    )
)  # fmt: skip


_WINDOW = ("kernel_size", "stride", "dilation")


def map_named(
    layout: GridLayout,
    function: Callable[..., Tensor],
    packed: dict[str, Tensor | None],
    each: dict[str, Tensor | None],
) -> Tensor:
    """`GridLayout.map` of a function that takes tensors by name, those that there are."""
    tokens, entries = (
        {name: t for name, t in part.items() if t is not None} for part in (packed, each)
    )

    def call(*parts: Tensor) -> Tensor:
        return function(**dict(zip((*tokens, *entries), parts, strict=True)))

    return layout.map(call, *tokens.values(), each=[*entries.values()])


class NeighborhoodModule(nn.Module):
    """Base of the attention modules: heads, window, bias table, rotary embedding, and the attention
    itself.

    Subclasses add projections; their rank classes set `rank` and nothing else.

    `kernel_size`, `stride`, `dilation`, `is_causal`, `is_circular`, `clip_window`, `scale`,
    `softcap`, `pad`, `attn_drop` and `rotary` may be set to what the constructor takes, and are
    then as if it had been given there.
    What they hold must fit each other when the module is called.
    """

    rank: int
    # Parameters that there are for an argument of the constructor only.
    _optional = {  # noqa: RUF012
        "rpb": "rel_pos_bias=True",
        "q_norm.weight": "qk_norm=True",
        "k_norm.weight": "qk_norm=True",
        "logit_scale": "learned_scale=True",
        "sink": "sink=True",
    }

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: KernelSizes,
        stride: IntOrWindows,
        dilation: IntOrWindows,
        is_causal: bool | Sequence[bool],
        is_circular: bool | Sequence[bool],
        clip_window: bool,
        qk_scale: float | None,
        rel_pos_bias: bool,
        num_kv_heads: int | None,
        qk_norm: bool,
        rotary: bool | Rotary,
        attn_drop: float,
        pad: bool,
        head_dim: int | None,
        learned_scale: bool,
        softcap: float | None,
        sink: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_flags(
            rel_pos_bias=rel_pos_bias, qk_norm=qk_norm, learned_scale=learned_scale, sink=sink
        )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, number in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", 1 if head_dim is None else head_dim),
        ):
            check_positive_int(name, number)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        self.kernel_size = self._normalized("kernel_size", kernel_size)
        self.is_circular = self._normalized("is_circular", is_circular)
        groups = head_windows(self.kernel_size, stride, dilation)
        if groups is not None:
            check_head_groups(len(groups), num_heads, num_kv_heads)
        for size, step, distance in groups or [(self.kernel_size, stride, dilation)]:
            # The grid is not known yet, and an empty one fits any window.
            checked = tuple(2**30 if k == -1 else k for k in size)
            window = check_window((0,) * self.rank, checked, step, distance, is_causal)
            units = tuple(s * d for s, d in zip(*window[1:3], strict=True))
            check_circular(self.is_circular, units, *window)
        self.stride = self._normalized("stride", stride)
        self.dilation = self._normalized("dilation", dilation)
        self.is_causal = self._normalized("is_causal", is_causal)
        self.clip_window = clip_window
        if self.clip_window and pad:
            raise ValueError("a small grid is clipped to or padded, got clip_window=True, pad=True")
        sizes = head_windows(self.kernel_size) or [(self.kernel_size,)]
        if rel_pos_bias and any(-1 in size for (size,) in sizes):
            raise ValueError(f"rel_pos_bias=True needs a kernel_size, got {self.kernel_size}")
        if rel_pos_bias and any(self.is_causal):
            raise ValueError("rel_pos_bias=True needs is_causal=False on every axis")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.scale = check_scale(qk_scale, self.head_dim, "qk_scale")
        self.softcap = softcap
        self.pad = pad
        # Modules that are absent are None, so that TorchScript compiles no code for them.
        self.attn_drop: nn.Dropout | None = self._normalized("attn_drop", attn_drop)
        self.rotary: Any = None
        if rotary is True:
            self.rotary = RotaryEmbedding(
                self.head_dim, self.rank, spacing=self._spacing(self.dilation),
                is_circular=self.is_circular, device=device, dtype=dtype,
            )  # fmt: skip
            self._rotary_is_own = True
        else:
            self.rotary = self._normalized("rotary", rotary)
        # Set by natten.distributed, where tokens are sharded over ranks, and where heads are.
        self.plan: Any = None
        self.heads_mesh: Any = None
        norm = {"eps": 1e-6, "device": device, "dtype": dtype}
        self.q_norm = HeadNorm(self.head_dim, **norm) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, **norm) if qk_norm else None
        self.register_parameter("logit_scale", None)
        if learned_scale:
            self.logit_scale = nn.Parameter(
                torch.full((num_heads,), self.scale, device=device, dtype=dtype)
            )
        self.register_parameter("sink", None)
        if sink:
            self.sink = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))
        if rel_pos_bias:
            shape = [2 * max(k) - 1 for k in zip(*(size for (size,) in sizes))]
            self.rpb = nn.Parameter(torch.empty(num_heads, *shape, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTABLE:
            value = self._normalized(name, value)
            if value is not None and not isinstance(value, nn.Module):
                self._modules.pop(name, None)  # torch would have a module follow a module alone
        super().__setattr__(name, value)
        if name in _WINDOW:
            # Whether groups of heads have windows of their own.
            own = [getattr(self, part, ()) for part in _WINDOW]
            self.is_grouped = any(head_windows(part) is not None for part in own)
        if name == "rotary":
            super().__setattr__("_rotary_is_own", False)
        elif getattr(self, "_rotary_is_own", False) and self.rotary:
            # What rotary=True stands for.
            if name == "dilation":
                self.rotary.spacing = self._spacing(value)
            elif name == "is_circular":
                self.rotary.is_circular = value

    def _spacing(self, dilation: tuple[Any, ...]) -> tuple[int, ...]:
        """What coordinates are divided by to turn heads."""
        if head_windows(dilation) is None:
            return dilation
        if len(set(dilation)) > 1:
            raise ValueError(
                "rotary=True turns all heads alike, and needs one dilation for all of them, got "
                f"{dilation}; give a rotary of your own"
            )
        return dilation[0]

    def head_windows(self) -> list[tuple[Any, Any, Any]]:
        """kernel_size, stride and dilation of each group of heads."""
        window = self.kernel_size, self.stride, self.dilation
        groups: list[Any] = head_windows(*window) or [window]
        return groups

    def __prepare_scriptable__(self) -> NeighborhoodModule:
        """Of torch.jit.script, before it compiles."""
        if self.is_grouped:
            raise NotImplementedError(
                "TorchScript has no windows of groups of heads, got "
                f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
            )
        return self

    def _normalized(self, name: str, value: Any) -> Any:
        """An attribute as the constructor stores it."""
        if name in _WINDOW and head_windows(value) is not None:
            return tuple([self._normalized(name, window) for window in value])
        if name == "kernel_size":
            if isinstance(value, (tuple, list)):
                value = [-1 if k is None else k for k in value]
            sizes = int_tuple(name, value, self.rank, minimum=-1)
            if 0 in sizes:
                raise ValueError(
                    f"kernel_size must hold integers of at least 1, or -1 for a whole axis, "
                    f"got {value}"
                )
            return sizes
        if name in ("stride", "dilation"):
            return int_tuple(name, 1 if value is None else value, self.rank)
        if name in ("is_causal", "is_circular"):
            return bool_tuple(name, False if value is None else value, self.rank)
        if name == "scale":
            return check_scale(value, self.head_dim)
        if name == "softcap":
            return check_softcap(value)
        if name in ("pad", "clip_window"):
            return optional_bool(name, value)
        if name == "attn_drop":
            if value is None or isinstance(value, nn.Module):
                return value
            check_probability(name, value)
            return nn.Dropout(value) if value else None
        if value is None or value is False:
            return None
        if not isinstance(value, RotaryEmbedding):
            if not _takes_two(value):
                raise ValueError(
                    "rotary must be a bool or a RotaryEmbedding, or a function of heads and the "
                    f"coordinates of the first of them, got {value!r}"
                )
            return value
        if value.head_dim != self.head_dim or value.rank != self.rank:
            raise ValueError(
                f"rotary must be of head_dim {self.head_dim} and rank {self.rank}, got {value}"
            )
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        warn_of_dropped(self, self._optional, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _bias(self, kernel_size: list[int]) -> Tensor | None:
        """The bias table of the heads of this rank, for a window that may have been clipped."""
        if self.rpb is not None:
            rpb = self._own_heads(self.rpb)
            return clipped_biases(rpb, kernel_size) if self.clip_window else rpb
        return None

    def _own_heads(self, parameter: Tensor) -> Tensor:
        """What this rank has of a parameter with a row for each head."""
        if torch.jit.is_scripting():
            return parameter
        else:
            local: Any = parameter
            return local if self.heads_mesh is None else local.to_local()

    def _sink(self) -> Tensor | None:
        """The logits of the sink of the heads of this rank."""
        if self.sink is not None:
            return self._own_heads(self.sink)
        return None

    def _placed(self, x: Tensor, origin: list[int] | None, grid: list[int] | None) -> Tensor:
        """x where the window fits."""
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript would compile what "and" joins
            if self.is_grouped:
                # Clipped ones fit anything, and are so when attention is computed.
                for size, _, distance in [] if self.clip_window else self.head_windows():
                    x = place(x, size, distance, self.pad, origin, grid, self.is_circular)
                return x
        kernel_size, _, dilation = fitted(
            x, self.kernel_size, self.stride, self.dilation, self.clip_window, grid
        )
        return place(x, kernel_size, dilation, self.pad, origin, grid, self.is_circular)

    def _rotate(
        self,
        query: Tensor,
        key: Tensor,
        origin: list[int] | None,
        grid: list[int] | None,
    ) -> tuple[Tensor, Tensor]:
        """By the positions in the grid that begin at origin."""
        if torch.jit.is_scripting():
            if self.rotary is not None:
                cos, sin = self.rotary.rotation(query.shape[1:-2], origin, grid)
                return rotate(query, cos, sin), rotate(key, cos, sin)
        elif isinstance(self.rotary, RotaryEmbedding):
            cos, sin = self.rotary.rotation(query.shape[1:-2], origin, grid)
            return rotate(query, cos, sin), rotate(key, cos, sin)
        elif self.rotary is not None:
            rotary: Any = self.rotary
            return rotary(query, origin), rotary(key, origin)
        return query, key

    def _rotate_grids(
        self, query: Tensor, key: Tensor, layout: GridLayout
    ) -> tuple[Tensor, Tensor]:
        """As `_rotate`, by the positions in grids whose packed tokens these are."""
        if isinstance(self.rotary, RotaryEmbedding):
            cos, sin = self.rotary.rotation_of_grids(layout)
            return rotate(query, cos, sin), rotate(key, cos, sin)
        if self.rotary is not None:
            rotary: Any = self.rotary
            query, key = (layout.map(lambda grids: rotary(grids, None), t) for t in (query, key))
        return query, key

    def _scaled(self, query: Tensor) -> Tensor:
        """The query of heads that learn their scales, for an attention with `scale`."""
        if self.logit_scale is not None:
            scale = self._own_heads(self.logit_scale)
            return query * (scale / self.scale).to(query.dtype).unsqueeze(-1)
        return query

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        origin: list[int] | None = None,
        grid: list[int] | None = None,
        additional_lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        kernel_size, stride, dilation = fitted(
            query,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.clip_window,
            grid,
        )
        if self.attn_drop is not None and self.training:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript has no dropout of attention weights")
            else:
                scored = self.softcap or self.sink is not None or mask is not None
                if scored or self.is_grouped:
                    raise NotImplementedError(
                        "dropout of attention weights is not implemented with softcap, sink or "
                        "mask, and not with a list of windows for groups of heads"
                    )
                return attend_with_dropout(
                    query,
                    key,
                    value,
                    kernel_size,
                    stride,
                    dilation,
                    self.is_causal,
                    self.is_circular,
                    self.scale,
                    self._bias(kernel_size),
                    additional_keys,
                    additional_values,
                    origin,
                    grid,
                    additional_lengths,
                    self.attn_drop.p,
                )
        out, _ = attend(
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            self.is_causal,
            self.is_circular,
            self.scale,
            self._bias(kernel_size),
            additional_keys,
            additional_values,
            origin,
            grid,
            additional_lengths,
            self.softcap,
            self._sink(),
            mask,
            self.clip_window,
        )
        return out

    def _drops(self) -> bool:
        """Whether attention weights are dropped."""
        return self.attn_drop is not None and self.training

    def _attend_at_once(self, tensors: Tensors, layout: GridLayout) -> Tensor | None:
        """Attention of packed grids by one launch of a kernel; None where there is none, or a call
        for each size is estimated to take less time.

        Args:
            tensors: Without the bias and the sink, which are the module's.
            layout: Of the grids.
        """
        # Of a window as wide as the grid, each has a table of biases of its own.
        if self._drops() or self.is_grouped or (self.rpb is not None and -1 in self.kernel_size):
            return None
        rpb = None if self.rpb is None else self._bias(self.kernel_size)
        windows = {
            "kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation,
            "is_causal": self.is_causal,
        }  # fmt: skip
        found = attend_at_once(
            tensors._replace(rpb=rpb, sink=self._sink()), layout.configured(windows), self.scale,
            softcap=self.softcap, is_circular=self.is_circular, clip_window=self.clip_window,
        )  # fmt: skip
        return None if found is None else found[0]

    def _attend_grids(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: GridLayout,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        additional_lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `_attend`, of packed grids, and of additional keys of each: all at once, or neighbors
        of one size.
        """
        tensors = Tensors(
            query, key, value, None, additional_keys, additional_values,
            additional_lengths=additional_lengths, key_mask=mask, query_mask=mask,
        )  # fmt: skip
        found = self._attend_at_once(tensors, layout)
        if found is not None:
            return found
        packed = {"query": query, "key": key, "value": value, "mask": mask}
        each = {
            "additional_keys": additional_keys, "additional_values": additional_values,
            "additional_lengths": additional_lengths,
        }  # fmt: skip
        return map_named(layout, self._attend, packed, each)

    def _map(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor | Sequence[Sequence[int]],
        extent: Sequence[int],
        additional_keys: Tensor | None,
        additional_lengths: Tensor | None,
        origin: list[int] | None,
        grid: list[int] | None,
    ) -> AttentionMap:
        """`extent` is the grid without padding; query and key are grids with it."""
        refuse_sharded(self.plan, "attention_map")
        positions = torch.as_tensor(positions, device=query.device)
        is_integer = positions.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
        if positions.dim() != 2 or positions.shape[1] != self.rank or not is_integer:
            raise ValueError(
                f"positions must be integers of the shape [queries, {self.rank}], got {positions}"
            )
        limit = torch.tensor(list(extent), device=positions.device)
        if ((positions < 0) | (positions >= limit)).any():
            raise ValueError(f"positions must lie in the grid {tuple(extent)}, got {positions}")
        index: tuple[Any, ...] = (slice(None), *positions.unbind(1))
        chosen = query[index]  # [B, P, H, D]
        windows = self.head_windows()
        rpb = None if self.rpb is None else self._own_heads(self.rpb)
        if rpb is not None:
            whole = [fitted(key, *window, False, grid)[0] for window in windows]
            largest = tuple([max(sizes) for sizes in zip(*whole, strict=True)])
            check_rpb(rpb, query, largest, self.is_causal)
        of_heads = [(chosen, -2), (key, -2), (additional_keys, -2), (rpb, 0), (self._sink(), 0)]
        parts = [of_groups(tensor, len(windows), dim) for tensor, dim in of_heads]
        fits = [fitted(key, *window, self.clip_window, grid) for window in windows]
        extents = key.shape[1:-2]
        maps = []
        for window, query, key, additional_keys, rpb, sink in zip(fits, *parts, strict=True):
            kernel_size, stride, dilation = window
            axes = window_axes(
                extents if grid is None else grid, kernel_size, stride, dilation, self.is_causal,
                self.is_circular,
            )  # fmt: skip
            mask, bias = window_rows(
                positions, extents, axes,
                [0] * self.rank if origin is None or grid is None else origin,
                None if rpb is None else middle(rpb, list(kernel_size)),
            )  # fmt: skip
            maps.append(
                attention_map(
                    query, key, mask, bias, self.scale, additional_keys, additional_lengths,
                    self.softcap, sink,
                )
            )  # fmt: skip
        weights = torch.cat([m.grid for m in maps], 2)
        for axis, length in enumerate(extent):
            weights = weights.narrow(axis + 3, 0, length)
        additional = [m.additional for m in maps if m.additional is not None]
        return AttentionMap(weights, torch.cat(additional, 2) if additional else None)

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"kernel_size={self.kernel_size}")
        defaults = {"stride": 1, "dilation": 1, "is_causal": False, "is_circular": False}
        for name, default in defaults.items():
            value = getattr(self, name)
            if any(v != default for v in value):
                parts.append(f"{name}={value}")
        if self.clip_window:
            parts.append("clip_window=True")
        if self.scale != self.head_dim**-0.5:
            parts.append(f"qk_scale={self.scale}")
        if self.head_dim * self.num_heads != self.embed_dim and self.heads_mesh is None:
            parts.append(f"head_dim={self.head_dim}")
        if self.rpb is not None:
            parts.append("rel_pos_bias=True")
        if self.logit_scale is not None:
            parts.append("learned_scale=True")
        if self.softcap:
            parts.append(f"softcap={self.softcap:g}")
        if self.sink is not None:
            parts.append("sink=True")
        if self.pad:
            parts.append("pad=True")
        return ", ".join(parts)
