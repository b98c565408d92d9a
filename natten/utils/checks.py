"""Arguments of neighborhood attention as tuples, for programs that call this themselves."""

from __future__ import annotations

from typing import Any

from natten.validation import bool_tuple, int_tuple


def check_all_args(na_dim: int, kernel_size: Any, *window: Any) -> tuple[tuple[Any, ...], ...]:
    """One value an axis of each argument; None stands for the default.

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
    *sizes, is_causal = window
    names = ("stride", "dilation")[-len(sizes) :]
    return (
        int_tuple("kernel_size", kernel_size, na_dim),
        *(int_tuple(n, 1 if v is None else v, na_dim) for n, v in zip(names, sizes)),
        bool_tuple("is_causal", False if is_causal is None else is_causal, na_dim),
    )


__all__ = ["check_all_args"]
