"""Neighborhood attention for PyTorch: 1-D, 2-D and 3-D, fused on GPUs and CPUs.

>>> import torch, natten
>>> q, k, v = (torch.randn(1, 32, 32, 4, 64) for _ in range(3))
>>> natten.na2d(q, k, v, kernel_size=7).shape
torch.Size([1, 32, 32, 4, 64])
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from natten import context, flops, functional, older, tuned, utils
from natten.context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from natten.float8 import float8_attention, to_float8
from natten.functional import (
    attention,
    explain,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    sharded,
)
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
from natten.utils import log
from natten.version import __version__

if TYPE_CHECKING:
    # What __getattr__ imports, so that a misspelled name is a type error.
    from natten import attn_merge as attn_merge
    from natten import backends as backends
    from natten import distributed as distributed
    from natten import experimental as experimental
    from natten import legacy as legacy
    from natten import models as models  # type: ignore[attr-defined]
    from natten import modules as modules
    from natten import nn as nn
    from natten import varlen as varlen
    from natten import viz as viz
    from natten.nn import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )
    from natten.older.functions import *  # noqa: F403
    from natten.precompiling import precompile
    from natten.profile_file import load_profile
    from natten.simulator import simulate
    from natten.varlen import GridLayout

# Clients ask this before they rely on fused kernels. Here those are Triton and numba programs
# without a compiled library: they are always part of the installation, and whether one runs a
# given call is natten.explain's to say.
HAS_LIBNATTEN = True

log.configure()

# In a bare checkout, natten.models lies next to this package and not in it.
_here = Path(__file__).resolve().parent
if (
    not (_here / "models").exists()
    and (_here.parent / "models" / "__init__.py").exists()
    and (_here.parent / "pyproject.toml").exists()
):
    __path__.append(str(_here.parent))  # noqa: F405


def _load_profile(path: str) -> int:
    from natten.profile_file import load_profile

    return load_profile(path)


def _attend_where_sharded(*arguments: Any) -> tuple[Tensor, Tensor]:
    from natten.distributed.attention import attend_where_sharded

    return attend_where_sharded(*arguments)


# What modules ask of others that are built on them, so that none imports what imports it.
tuned.load_file = _load_profile
sharded.attend_where_sharded = _attend_where_sharded
older.add_names(context, functional, utils)
flops.register()

# Imported at first use, so that importing natten stays fast.
_LAZY = {
    "GridLayout": "natten.varlen",
    "NeighborhoodAttention1D": "natten.nn",
    "NeighborhoodAttention2D": "natten.nn",
    "NeighborhoodAttention3D": "natten.nn",
    "load_profile": "natten.profile_file",
    "precompile": "natten.precompiling",
    "simulate": "natten.simulator",
}
_LAZY_MODULES = (
    "attn_merge",
    "backends",
    "distributed",
    "experimental",
    "flops",
    "legacy",
    "models",
    "modules",
    "nn",
    "varlen",
    "viz",
)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        if name in _LAZY_MODULES:
            return import_module(f"natten.{name}")
        return older.find(__name__, name)


__all__ = [
    "HAS_LIBNATTEN",
    "GridLayout",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "explain",
    "float8_attention",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "load_profile",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "precompile",
    "set_memory_usage_preference",
    "simulate",
    "to_float8",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
