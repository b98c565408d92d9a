"""The tile shapes that each backend accepts, as lists to choose from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from natten import validation
from natten.functional.call import EVERYTHING, Parameters, Tensors, make_problem
from natten.functional.dispatch import FMHA, FNA, can_run, load
from natten.functional.problem import DEFAULT_CONFIG, Problem
from natten.types import KernelSchedule

TileShapes = tuple[tuple[int, ...], tuple[int, ...]]
TileSizes = tuple[int, int]
Schedule = KernelSchedule | None


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
    parameters = Parameters(0, window, scale, 0.0, 0, 0, "", "", requires_grad)
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
    entries = backend.backward_configs(problem) if backward else backend.configs(problem)
    return [_public(entry, kind) for entry in entries]


def _public(entry: Any, kind: str) -> Any:
    """One entry with ints for one-axis tiles of attention, and schedules as the enumeration."""
    first, second = entry
    if first and isinstance(first[0], (tuple, list)):
        return _public(first, kind), second if second is None else KernelSchedule(second)
    return (first[0], second[0]) if kind == FMHA else (tuple(first), tuple(second))


def get_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list[TileShapes]:
    """Tile shapes of the forward pass that ``backend="cutlass-fna"`` accepts.

    Args:
        query: As na1d, na2d or na3d takes it.
        key: Likewise.
        value: Likewise.

    Returns:
        A list of (q_tile_shape, kv_tile_shape), the default first; [] where the backend cannot run
        such tensors.
    """
    return _list("cutlass", FNA, False, query, key, value)


def get_bwd_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list[TileShapes]:
    """Tile shapes of the backward pass that ``backend="cutlass-fna"`` accepts."""
    return _list("cutlass", FNA, True, query, key, value)


def get_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[TileSizes]:
    """Tile sizes of the forward pass that ``backend="cutlass-fmha"`` accepts.

    Args:
        query: As attention takes it.
        key: Likewise.
        value: Likewise.

    Returns:
        A list of (q_tile_size, kv_tile_size), the default first; [] where the backend cannot run
        such tensors.
    """
    return _list("cutlass", FMHA, False, query, key, value)


def get_bwd_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[TileSizes]:
    """Tile sizes of the backward pass that ``backend="cutlass-fmha"`` accepts."""
    return _list("cutlass", FMHA, True, query, key, value)


def get_configs_for_cutlass_hopper_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[TileShapes, Schedule]]:
    """Tile shapes of the forward pass that ``backend="hopper-fna"`` accepts, as
    ((q_tile_shape, kv_tile_shape), KernelSchedule)."""
    return _list("hopper", FNA, False, query, key, value)


def get_bwd_configs_for_cutlass_hopper_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileShapes]:
    """Tile shapes of the backward pass that ``backend="hopper-fna"`` accepts."""
    return _list("hopper", FNA, True, query, key, value)


def get_configs_for_cutlass_hopper_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[TileSizes, Schedule]]:
    """Tile sizes of the forward pass that ``backend="hopper-fmha"`` accepts, as
    ((q_tile_size, kv_tile_size), KernelSchedule)."""
    return _list("hopper", FMHA, False, query, key, value)


def get_bwd_configs_for_cutlass_hopper_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileSizes]:
    """Tile sizes of the backward pass that ``backend="hopper-fmha"`` accepts."""
    return _list("hopper", FMHA, True, query, key, value)


def get_configs_for_cutlass_blackwell_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileShapes]:
    """Tile shapes of the forward pass that ``backend="blackwell-fna"`` accepts."""
    return _list("blackwell", FNA, False, query, key, value)


def get_bwd_configs_for_cutlass_blackwell_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileShapes]:
    """Tile shapes of the backward pass that ``backend="blackwell-fna"`` accepts."""
    return _list("blackwell", FNA, True, query, key, value)


def get_configs_for_cutlass_blackwell_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileSizes]:
    """Tile sizes of the forward pass that ``backend="blackwell-fmha"`` accepts."""
    return _list("blackwell", FMHA, False, query, key, value)


def get_bwd_configs_for_cutlass_blackwell_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[TileSizes]:
    """Tile sizes of the backward pass that ``backend="blackwell-fmha"`` accepts."""
    return _list("blackwell", FMHA, True, query, key, value)


def get_configs_for_flex_fna(query: Tensor, key: Tensor, value: Tensor) -> list[TileShapes]:
    """Tile shapes of the forward pass that ``backend="flex-fna"`` accepts.

    Along one axis the first is the default; without a choice, grids of more axes are cut into rows
    of 128 tokens instead of tiles.
    """
    return _list("flex", FNA, False, query, key, value)


def get_configs_for_flex_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[TileSizes]:
    """Tile sizes of the forward pass that ``backend="flex-fmha"`` accepts."""
    return _list("flex", FMHA, False, query, key, value)
