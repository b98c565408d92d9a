"""Names and call forms of NATTEN 0.14 to 0.17 that programs still use.

Their tensors are heads-first, ``[batch, heads, *tokens, head_dim]``; what they compute is
:mod:`natten.functional.window_products.functions`. Modules take the arguments of that time as well
(:mod:`natten.older.modules`).

Functions that once chose among kernels are here so that programs start. There is nothing left to
choose: :func:`natten.explain` says what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from natten.functional.window_products.functions import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    window_scores,
    window_values,
)
from natten.validation import check_is_tensor

# Flags that programs set and ask for. Fused attention is what there is by default.
_flags = {
    "autotuner": False,
    "flex_attention": False,
    "fused_na": True,
    "gemm_na": False,
    "tf32_in_gemm_na": False,
    "tiled_na": False,
}


def _int(name: str, value: Any) -> Any:
    """Up to 0.14.4, dilation could be a str."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be an int, got {value!r}") from None


def _window(
    rank: int,
    name: str,
    positional: tuple[Any, ...],
    named: dict[str, Any],
    inferred: tuple[int, ...] | None,
) -> tuple[Any, Any]:
    """kernel_size and dilation, as every version passed them.

    Args:
        rank: Axes of tokens.
        name: Of the function, for errors.
        positional: ``(dilation)``, where the window follows from a tensor, ``(kernel_size)``,
            ``(kernel_size, dilation)``, or in three dimensions
            ``(kernel_size_d, kernel_size, dilation_d, dilation)``.
        named: The same, by name.
        inferred: The window that a tensor of the call implies, None if none does.
    """
    names: tuple[str, ...] = ("kernel_size", "dilation")
    if len(positional) == 4 and rank == 3:
        names = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")
    elif len(positional) == 1 and "dilation" not in named:
        is_dilation = inferred is not None or "kernel_size" in named
        names = ("dilation",) if is_dilation else ("kernel_size",)
    given = dict(zip(names, positional)) | named
    known = {"kernel_size", "dilation"} | ({"kernel_size_d", "dilation_d"} if rank == 3 else set())
    repeated = set(names[: len(positional)]) & set(named)
    if len(positional) > len(names) or repeated or not set(given) <= known:
        raise ValueError(
            f"{name} takes kernel_size and dilation after its tensors, got {positional} and {named}"
        )
    kernel_size = given.get("kernel_size", inferred)
    if kernel_size is None:
        raise ValueError(f"{name} needs kernel_size: no tensor of this call implies it")
    dilation = _int("dilation", given.get("dilation", 1))
    if "kernel_size_d" in given:
        kernel_size = (given["kernel_size_d"], kernel_size, kernel_size)
    if "dilation_d" in given:
        dilation = (_int("dilation_d", given["dilation_d"]), dilation, dilation)
    return kernel_size, dilation


def _check_tensors(**tensors: Any) -> None:
    """Before their shapes are looked at; what else is wrong with them, the operation says."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            check_is_tensor(name, tensor)


def _window_of_bias(rpb: Tensor | None) -> tuple[int, ...] | None:
    return None if rpb is None else tuple((n + 1) // 2 for n in rpb.shape[1:])


def _window_of_slots(attn: Tensor, rank: int, extra: int) -> tuple[int, ...] | None:
    slots = attn.shape[-1] - extra
    size = round(slots ** (1 / rank))
    return (size,) * rank if size**rank == slots else None


def _is_heads_last_swapped(tensor: Tensor) -> bool:
    """Whether the memory is that of ``[batch, height, width, heads, head_dim]`` and the shape
    ``[batch, width, height, heads, head_dim]``: what transformers 5.6 to 5.23 passes.
    """
    width, heads, dim = tensor.shape[1], tensor.shape[3], tensor.shape[4]
    return tensor.stride()[1:4] == (heads * dim, width * heads * dim, dim)


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 2, 1, 4)


def _heads_first_scores_input(query: Tensor, key: Tensor, rpb: Tensor | None) -> tuple[Any, Any]:
    """query and key of natten2dqkrpb, heads-first."""
    if query.dim() != 5 or rpb is None:
        return query, key
    first, last = query.shape[1] == rpb.shape[0], query.shape[3] == rpb.shape[0]
    # Where the number of heads fits both, strides tell.
    if last and (not first or _is_heads_last_swapped(query)):
        return _heads_first(query), _heads_first(key)
    return query, key


def _heads_first_value(attn: Tensor, value: Tensor) -> Tensor:
    """value of natten2dav, heads-first: attn always is."""
    if value.dim() != 5 or attn.dim() != 5:
        return value
    expected = attn.shape[1:4]
    first, last = value.shape[1:4] == expected, _heads_first(value).shape[1:4] == expected
    if last and (not first or _is_heads_last_swapped(value)):
        return _heads_first(value)
    return value


def _take_tensor(positional: tuple[Any, ...], tensor: Tensor | None) -> tuple[Any, Any]:
    """Additional keys or values may come last by position."""
    if positional and (positional[-1] is None or isinstance(positional[-1], Tensor)):
        return positional[:-1], positional[-1]
    return positional, tensor


def _qk_with_bias(rank: int, name: str) -> Callable[..., Tensor]:
    def function(
        query: Tensor,
        key: Tensor,
        rpb: Tensor | None,
        *window: Any,
        additional_keys: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        _check_tensors(query=query, key=key, **({} if rpb is None else {"rpb": rpb}))
        window, additional_keys = _take_tensor(window, additional_keys)
        size = _window(rank, name, window, named, _window_of_bias(rpb))
        if rank == 2:
            query, key = _heads_first_scores_input(query, key, rpb)
        return window_scores(rank, query, key, *size, additional_keys, rpb=rpb)

    return _named(
        function,
        name,
        f"``na{rank}d_qk(query, key, kernel_size, dilation, rpb=rpb)``, with kernel_size and "
        "dilation in the order of any older version; kernel_size may be left out where rpb is "
        "given.",
    )


def _qk(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dqk"

    def function(query: Tensor, key: Tensor, *window: Any, **named: Any) -> Tensor:
        return window_scores(rank, query, key, *_window(rank, name, window, named, None))

    return _named(function, name, f"``na{rank}d_qk(query, key, kernel_size, dilation)``.")


def _av(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dav"

    def function(
        attn: Tensor,
        value: Tensor,
        *window: Any,
        additional_values: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        _check_tensors(attn=attn, value=value)
        window, additional_values = _take_tensor(window, additional_values)
        extra = 0 if additional_values is None else additional_values.shape[2]
        size = _window(rank, name, window, named, _window_of_slots(attn, rank, extra))
        if rank == 2:
            value = _heads_first_value(attn, value)
        return window_values(rank, attn, value, *size, additional_values)

    return _named(
        function,
        name,
        f"``na{rank}d_av(attn, value, kernel_size, dilation)``, with kernel_size and dilation in "
        "the order of any older version; kernel_size may be left out.",
    )


def _named(function: Callable[..., Any], name: str, doc: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


na1d_qk_with_bias = _qk_with_bias(1, "na1d_qk_with_bias")
na2d_qk_with_bias = _qk_with_bias(2, "na2d_qk_with_bias")
na3d_qk_with_bias = _qk_with_bias(3, "na3d_qk_with_bias")
natten1dqkrpb = _qk_with_bias(1, "natten1dqkrpb")
natten2dqkrpb = _qk_with_bias(2, "natten2dqkrpb")
natten3dqkrpb = _qk_with_bias(3, "natten3dqkrpb")
natten1dqk, natten2dqk, natten3dqk = map(_qk, (1, 2, 3))
natten1dav, natten2dav, natten3dav = map(_av, (1, 2, 3))


def has_cuda(device: Any = None) -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def has_half(device: Any = None) -> bool:
    """Whether float16 works: on every device."""
    return True


def has_bfloat(device: Any = None) -> bool:
    """Whether bfloat16 works: on every device."""
    return True


def has_fna(device: Any = None) -> bool:
    """Whether there is fused neighborhood attention: on every device."""
    return True


def has_gemm(device: Any = None) -> bool:
    """Whether there are unfused kernels for tensor cores to choose from: no longer."""
    return False


def get_device_cc(device: Any = None) -> int:
    """The compute capability of a CUDA device as one number, 90 for 9.0; 0 without a device."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


has_fused_na = has_fna
has_gemm_na = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm


def _flag(flag: str) -> tuple[Callable[..., None], Callable[[], bool]]:
    def use(mode: bool = True, *arguments: Any, **named: Any) -> None:
        _flags[flag] = bool(mode)

    def is_enabled() -> bool:
        return _flags[flag]

    _named(use, f"use_{flag}", f"Remembered for is_{flag}_enabled, and without effect otherwise.")
    _named(is_enabled, f"is_{flag}_enabled", f"What use_{flag} was last called with.")
    return use, is_enabled


use_autotuner, is_autotuner_enabled = _flag("autotuner")
use_flex_attention, is_flex_attention_enabled = _flag("flex_attention")
use_fused_na, is_fused_na_enabled = _flag("fused_na")
use_gemm_na, is_gemm_na_enabled = _flag("gemm_na")
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _flag("tf32_in_gemm_na")
use_tiled_na, is_tiled_na_enabled = _flag("tiled_na")
use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


def _switch(use: Callable[..., None], mode: bool) -> Callable[..., None]:
    def switch(*arguments: Any, **named: Any) -> None:
        use(mode)

    verb = "enable" if mode else "disable"
    return _named(
        switch, use.__name__.replace("use", verb, 1), f"``{use.__name__}({mode})``, of 0.15."
    )


enable_autotuner, disable_autotuner = _switch(use_autotuner, True), _switch(use_autotuner, False)
enable_fused_na, disable_fused_na = _switch(use_fused_na, True), _switch(use_fused_na, False)
enable_fna, disable_fna = enable_fused_na, disable_fused_na
enable_gemm_na, disable_gemm_na = _switch(use_gemm_na, True), _switch(use_gemm_na, False)
enable_tf32, disable_tf32 = _switch(use_tf32_in_gemm_na, True), _switch(use_tf32_in_gemm_na, False)
enable_tiled_na, disable_tiled_na = _switch(use_tiled_na, True), _switch(use_tiled_na, False)


def make_attn_tensor_from_input(
    input_tensor: Tensor, kernel_size: int | tuple[int, ...], num_additional: int = 0
) -> Tensor:
    """An uninitialized tensor for the scores of a heads-first query."""
    _check_tensors(input_tensor=input_tensor)
    rank = input_tensor.dim() - 3
    slots = kernel_size**rank if isinstance(kernel_size, int) else prod(kernel_size)
    return input_tensor.new_empty(*input_tensor.shape[:-1], slots + num_additional)


# natten, natten.context, natten.functional and natten.utils find these at first use.
__all__ = [
    "disable_autotuner",
    "disable_fna",
    "disable_fused_na",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_autotuner",
    "enable_fna",
    "enable_fused_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "get_device_cc",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_gemm_na",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_flex_attention_enabled",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "make_attn_tensor_from_input",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "use_autotuner",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]
