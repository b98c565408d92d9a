"""Arguments of neighborhood attention as tuples, for programs that call this themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten.types import KernelSchedule
from natten.validation import bool_tuple, check_schedule, check_window, int_tuple


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """``input_size`` as a tuple of ``na_dim`` positive ints; ValueError if it is none."""
    return int_tuple("input_size", input_size, na_dim)


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """``kernel_size`` as a tuple of ``na_dim`` positive ints; ValueError if it is none."""
    return int_tuple("kernel_size", kernel_size, na_dim)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """``stride`` likewise; None stands for 1."""
    return int_tuple("stride", 1 if stride is None else stride, na_dim)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """``dilation`` likewise; None stands for 1."""
    return int_tuple("dilation", 1 if dilation is None else dilation, na_dim)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """``is_causal`` as a tuple of ``na_dim`` bools, None for False; ValueError if it is none."""
    return bool_tuple("is_causal", False if is_causal is None else is_causal, na_dim)


def check_kernel_schedule(kernel_schedule: Any) -> KernelSchedule | None:
    """A kernel schedule, by its name or itself, as the enumeration; ValueError if it is none."""
    schedule = check_schedule(kernel_schedule)
    return None if schedule is None else KernelSchedule(schedule)


def check_all_args(na_dim: int, kernel_size: Any, *window: Any) -> tuple[tuple[Any, ...], ...]:
    """One value per axis of each argument; None stands for the default.

    Args:
        na_dim: Axes of tokens.
        kernel_size: Window size.
        window: ``dilation, is_causal`` (up to 0.17) or ``stride, dilation, is_causal``.

    Returns:
        The same arguments, as tuples, in the same order.

    Raises:
        ValueError: A wrong type, number of values or sign, or another number of arguments.
    """
    if len(window) not in (2, 3):
        raise ValueError(
            "check_all_args takes na_dim, kernel_size, [stride,] dilation and is_causal, got "
            f"{len(window) + 2} arguments"
        )
    *stride, dilation, is_causal = window
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        *(check_stride_arg(na_dim, value) for value in stride),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def check_args_against_input(
    input_tensor: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> None:
    """Check the window against the tokens of ``[batch, *tokens, heads, head_dim]``.

    Raises:
        ValueError: An argument is wrong by itself, or the window does not fit.
    """
    check_window(tuple(input_tensor.shape[1:-2]), kernel_size, stride, dilation, is_causal)


__all__ = [
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_schedule",
    "check_kernel_size_arg",
    "check_stride_arg",
]
