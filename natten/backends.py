"""Which backends can run given tensors, and the tiles that each lists."""

from __future__ import annotations

import torch
from torch import Tensor

from natten import validation
from natten.functional import configs
from natten.functional.configs import (
    get_bwd_configs_for_cutlass_blackwell_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)
from natten.functional.dispatch import BACKENDS, FMHA, FNA, can_run, resolve
from natten.functional.problem import Config, Problem


def _problem(
    kind: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool
) -> Problem:
    causal = validation.optional_bool("is_causal", is_causal)
    varlen = validation.optional_bool("is_varlen", is_varlen)
    needs_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (query, key, value)
    )
    return configs.problem_of_tensors(kind, query, key, value, needs_grad, causal, varlen)


def _config(torch_compile: bool) -> Config:
    return Config(torch_compile=validation.optional_bool("torch_compile", torch_compile))


def get_compatible_backends(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[str]:
    """Names that ``backend=`` of na1d, na2d and na3d may have for such tensors.

    Args:
        query: ``[batch, *tokens, heads, head_dim]``.
        key: ``[batch, *tokens, heads_kv, head_dim]``.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``.
        torch_compile: As it will be given with ``backend="flex-fna"``.

    Returns:
        The names in order of preference. ``natten.explain`` has the reasons of the others, and
        knows the window.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    problem, config = _problem(FNA, query, key, value, False, False), _config(torch_compile)
    return [f"{name}-{FNA}" for name in BACKENDS if can_run(name, problem, config)]


def get_compatible_fmha_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> list[str]:
    """Names that ``backend=`` of :func:`natten.attention` may have for such tensors.

    Args:
        query: ``[batch, seqlen, heads, head_dim]``.
        key: ``[batch, seqlen_kv, heads_kv, head_dim]``.
        value: ``[batch, seqlen_kv, heads_kv, head_dim_v]``.
        is_causal: As for ``attention``.
        is_varlen: Whether sequences of different lengths are packed.
        torch_compile: As it will be given with ``backend="flex-fmha"``.

    Returns:
        The names in order of preference.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    problem = _problem(FMHA, query, key, value, is_causal, is_varlen)
    config = _config(torch_compile)
    return [f"{name}-{FMHA}" for name in BACKENDS if can_run(name, problem, config)]


def choose_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> str:
    """The name of the backend that ``backend=None`` stands for, arguments as for
    :func:`get_compatible_backends`.

    Raises:
        ValueError: The tensors do not fit each other.
        NotImplementedError: No backend runs such tensors.
    """
    problem = _problem(FNA, query, key, value, False, False)
    return f"{resolve(problem, _config(torch_compile)).name}-{FNA}"


def choose_fmha_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """The same for :func:`natten.attention`."""
    problem = _problem(FMHA, query, key, value, is_causal, is_varlen)
    return f"{resolve(problem, _config(torch_compile)).name}-{FMHA}"


__all__ = [
    "choose_backend",
    "choose_fmha_backend",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_compatible_backends",
    "get_compatible_fmha_backends",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
]
