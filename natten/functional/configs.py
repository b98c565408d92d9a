"""The tile shapes that each backend accepts, as lists to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from natten import validation
from natten.functional.call import EVERYTHING, Parameters, Tensors, make_problem
from natten.functional.dispatch import FMHA, FNA, can_run, load
from natten.functional.problem import DEFAULT_CONFIG, Problem
from natten.types import KernelSchedule

_FORWARD = """Tile shapes of the forward pass that backend="{public}" accepts.

Args:
    query: As {function} takes it.
    key: Likewise.
    value: Likewise.

Returns:
    {entries}; [] where the backend cannot run such tensors. {default}
"""
_BACKWARD = _FORWARD.replace("forward", "backward")


def problem_of_tensors(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    requires_grad: bool,
    is_causal: bool = False,
    is_varlen: bool = False,
) -> Problem:
    """A problem of such tensors, where the window does not matter.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    rank = validation.check_qkv(query, key, value, 1 if kind == FMHA else None)
    # The window does not decide which tiles there are; the largest fits every grid.
    window = (EVERYTHING,) * rank + (1,) * 2 * rank + (int(is_causal),) * rank
    scale = validation.check_scale(None, query.shape[-1])
    parameters = Parameters(0, window, scale, 0, 0, "", "", requires_grad)
    problem = make_problem(Tensors(query, key, value), parameters)
    if not is_varlen:
        return problem
    (longest,) = problem.grid
    return replace(problem, varlen=True, max_seqlen_q=longest, max_seqlen_kv=longest)


def _list(
    backend_name: str, kind: str, backward: bool, query: Tensor, key: Tensor, value: Tensor
) -> list[Any]:
    problem = problem_of_tensors(kind, query, key, value, backward)
    if not can_run(backend_name, problem, DEFAULT_CONFIG):
        return []
    backend = load(backend_name)
    return backend.backward_configs(problem) if backward else backend.configs(problem)


def _public(entry: Any, kind: str) -> Any:
    """One entry with ints for one-axis tiles of attention, and schedules as the enumeration."""
    first, second = entry
    if first and isinstance(first[0], (tuple, list)):
        return _public(first, kind), second if second is None else KernelSchedule(second)
    return (first[0], second[0]) if kind == FMHA else (tuple(first), tuple(second))


def _getter(backend_name: str, kind: str, backward: bool) -> Callable[..., list[Any]]:
    def getter(query: Tensor, key: Tensor, value: Tensor) -> list[Any]:
        entries = _list(backend_name, kind, backward, query, key, value)
        return [_public(entry, kind) for entry in entries]

    family = backend_name if backend_name in ("cutlass", "flex") else f"cutlass_{backend_name}"
    prefix = "get_bwd_configs_for" if backward else "get_configs_for"
    getter.__name__ = getter.__qualname__ = f"{prefix}_{family}_{kind}"
    pair = "(q_tile_size, kv_tile_size)" if kind == FMHA else "(q_tile_shape, kv_tile_shape)"
    if backend_name == "hopper" and not backward:
        pair = f"({pair}, KernelSchedule)"
    getter.__doc__ = (_BACKWARD if backward else _FORWARD).format(
        public=f"{backend_name}-{kind}",
        function="attention" if kind == FMHA else "na1d, na2d or na3d",
        entries=f"A list of {pair}",
        default=(
            "Along one axis the first is the default; without a choice, grids of more axes are cut "
            "into rows of 128 tokens instead of tiles."
            if (backend_name, kind) == ("flex", FNA)
            else "The first is the default."
        ),
    )
    return getter


get_configs_for_cutlass_fna = _getter("cutlass", FNA, False)
get_bwd_configs_for_cutlass_fna = _getter("cutlass", FNA, True)
get_configs_for_cutlass_fmha = _getter("cutlass", FMHA, False)
get_bwd_configs_for_cutlass_fmha = _getter("cutlass", FMHA, True)
get_configs_for_cutlass_hopper_fna = _getter("hopper", FNA, False)
get_bwd_configs_for_cutlass_hopper_fna = _getter("hopper", FNA, True)
get_configs_for_cutlass_hopper_fmha = _getter("hopper", FMHA, False)
get_bwd_configs_for_cutlass_hopper_fmha = _getter("hopper", FMHA, True)
get_configs_for_cutlass_blackwell_fna = _getter("blackwell", FNA, False)
get_bwd_configs_for_cutlass_blackwell_fna = _getter("blackwell", FNA, True)
get_configs_for_cutlass_blackwell_fmha = _getter("blackwell", FMHA, False)
get_bwd_configs_for_cutlass_blackwell_fmha = _getter("blackwell", FMHA, True)
get_configs_for_flex_fna = _getter("flex", FNA, False)
get_configs_for_flex_fmha = _getter("flex", FMHA, False)
