"""Arguments of the attention modules as NATTEN 0.14 to 0.17 took them.

======================  ========================================================================
up to 0.14.4            dim, kernel_size, num_heads, ...
0.14.5 to 0.15          dim, num_heads, kernel_size, dilation, bias, qkv_bias, qk_scale, ...
0.14.5 to 0.15, 3-D     dim, num_heads, kernel_size, kernel_size_d, dilation, dilation_d, bias, ...
0.17                    dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, ...
now                     embed_dim, num_heads, kernel_size, stride, dilation, is_causal, ...
======================  ========================================================================

By name there is no doubt. By position, what only an older version can mean is taken so, and what
two versions read differently is an error.

Up to 0.14.4 every module had a bias and padded small inputs, up to 0.15 every one padded: what only
those can mean brings ``rel_pos_bias=True`` and ``pad=True``. What 0.17 could mean as well brings
neither, and a bias in a state dict then has no place: that is told when it is loaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from natten.validation import optional_bool

_BY_NAME = (
    "write them by name: embed_dim=, num_heads=, kernel_size=, dilation=, is_causal=, rel_pos_bias="
)


def accepts_older_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Let the ``__init__`` of an attention module take older arguments too."""

    @functools.wraps(init)
    def wrapper(self: Any, *arguments: Any, **named: Any) -> None:
        arguments, named = translate(arguments, named, self.rank)
        init(self, *arguments, **named)

    return wrapper


def translate(
    arguments: tuple[Any, ...], named: dict[str, Any], rank: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Older arguments of a module to those of today.

    Raises:
        ValueError: The same argument twice, or positions that versions read differently.
    """
    named = dict(named)
    # It chose kernels.
    named.pop("use_experimental_ops", None)
    if "dim" in named:
        if arguments or "embed_dim" in named:
            raise ValueError("dim is the older name of embed_dim: give one of them")
        named["embed_dim"] = named.pop("dim")
    has_bias = "bias" in named
    if has_bias:
        if "rel_pos_bias" in named:
            raise ValueError("bias is the older name of rel_pos_bias: give one of them")
        named["rel_pos_bias"] = optional_bool("bias", named.pop("bias"))
        # Modules that had it padded small inputs.
        named.setdefault("pad", True)
    if rank == 3:
        arguments, named = _with_depth(arguments, named, has_bias)
    if len(arguments) > 2:
        ordered = _in_order(arguments, has_bias)
        if ordered is not arguments:
            return _of_0_14(ordered, named)
    if len(arguments) > 3 and (has_bias or _is_flag(arguments[4:5])):
        arguments, named = _without_stride(arguments, named)
    return arguments, named


def _with_depth(
    arguments: tuple[Any, ...], named: dict[str, Any], has_bias: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """kernel_size_d and dilation_d, which 3-D modules up to 0.15 had, joined with the others."""
    order = ("kernel_size_d", "dilation", "dilation_d")
    if has_bias and len(arguments) > 3:
        values = dict(zip(order, arguments[3:]))
        repeated = set(values) & set(named)
        if repeated or len(arguments) > 3 + len(order):
            raise ValueError(
                f"after kernel_size, 3-D modules with bias took {', '.join(order)} by position, "
                "got "
                f"{arguments[3:]} and by name {', '.join(sorted(named))}; {_BY_NAME}"
            )
        arguments, named = arguments[:3], named | values
    if not {"kernel_size_d", "dilation_d"} & set(named):
        return arguments, named
    if len(arguments) > 2:
        arguments, named = arguments[:2], named | {"kernel_size": arguments[2]}
    for name, default in (("kernel_size", None), ("dilation", 1)):
        plane, depth = named.get(name, default), named.pop(f"{name}_d", None)
        if depth is not None:
            named[name] = (depth, plane, plane)
    return arguments, {"rel_pos_bias": True, "pad": True} | named


def _is_flag(values: tuple[Any, ...]) -> bool:
    """Whether the position that is dilation today holds a bool, or a sequence of them."""
    if not values:
        return False
    flags = values[0] if isinstance(values[0], (tuple, list)) else values
    return bool(flags) and all(isinstance(flag, bool) for flag in flags)


def _is_old_window(size: Any) -> bool:
    return size in (3, 5, 7, 9, 11, 13)


def _in_order(arguments: tuple[Any, ...], has_bias: bool) -> tuple[Any, ...]:
    """With num_heads before kernel_size; the same object if they are."""
    embed_dim, second, third, *rest = arguments

    def may_be_heads(number: Any) -> bool:
        is_count = isinstance(number, int) and isinstance(embed_dim, int)
        return is_count and number > 0 and embed_dim % number == 0

    heads_first = may_be_heads(second)
    # Versions that had the window first had these windows only; one for each axis is no number of
    # heads in any version.
    window_first = may_be_heads(third) and (
        _is_old_window(second) or (isinstance(second, (tuple, list)) and not has_bias)
    )
    if has_bias:
        heads_first = heads_first and _is_old_window(third)
        if heads_first and window_first and second != third:
            raise ValueError(
                f"{second} and {third} may be num_heads and kernel_size, or the reverse as up to "
                f"0.14.4; {_BY_NAME}"
            )
    if heads_first or not window_first:
        return arguments
    warnings.warn(
        f"kernel_size={second!r} comes before num_heads={third!r}, as up to NATTEN 0.14.4: taken "
        f"with rel_pos_bias=True and pad=True unless told otherwise, which all modules had then; "
        f"{_BY_NAME}",
        UserWarning,
        stacklevel=4,
    )
    return (embed_dim, third, second, *rest)


def _of_0_14(
    arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The order up to 0.14.4, and what every module had then."""
    order = ("qkv_bias", "qk_scale", "attn_drop", "proj_drop", "dilation")
    values = dict(zip(order, arguments[3:]))
    repeated = set(values) & set(named)
    if repeated or len(arguments) > 3 + len(order):
        raise ValueError(
            f"after kernel_size and num_heads, versions up to 0.14.4 took {', '.join(order)} by "
            f"position, got {arguments[3:]} and by name {', '.join(sorted(named)) or 'nothing'}; "
            f"{_BY_NAME}"
        )
    return arguments[:3], {"rel_pos_bias": True, "pad": True} | named | values


def _without_stride(
    arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The fourth position is dilation, and a fifth one is is_causal in 0.17, bias in 0.15."""
    first, dilation, more = arguments[:3], arguments[3], arguments[4:]
    values = {"dilation": dilation}
    if more:
        # A sequence can only be is_causal, and False is what both have by default.
        if more[0] is True or len(more) > 1:
            raise ValueError(
                f"the arguments {arguments} have no stride, and versions up to 0.17 differ in what "
                f"comes after dilation; {_BY_NAME}"
            )
        values["is_causal"] = more[0]
    repeated = set(values) & set(named)
    if repeated:
        raise ValueError(f"{', '.join(sorted(repeated))} is given by position and by name")
    return first, named | values


__all__ = ["accepts_older_arguments", "translate"]
