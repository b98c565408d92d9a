"""What loaded profiles say: the fastest backend and tiles of calls of one shape class.

:mod:`natten.profile_file` reads them from files. An entry holds for calls with the same grid,
window, head sizes, dtype and kind of call, for any batch size and number of heads. What the caller
asks for always wins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from natten.functional.problem import DEFAULT_CONFIG, Config, Problem

VARIABLE = "NATTEN_PROFILE"

ShapeClass = tuple[Any, ...]
_CLASS_FIELDS = (
    "grid", "query_shape", "key_shape", "query_origin", "key_origin",
    "kernel_size", "stride", "dilation", "is_causal", "head_dim", "head_dim_v",
)  # fmt: skip


def shape_class(problem: Problem) -> ShapeClass:
    """What a problem shares with those that an entry holds for."""
    return (
        *(getattr(problem, name) for name in _CLASS_FIELDS),
        problem.dtype,
        problem.device.type,
        problem.num_additional > 0,
        problem.has_rpb,
        problem.has_lengths,
        problem.softcap > 0,
        problem.has_sink,
        problem.has_key_mask,
        problem.has_query_mask,
        problem.varlen,
    )


@dataclass(frozen=True)
class Entry:
    """The fastest way found for one shape class, forward or forward and backward.

    Attributes:
        problem: The problem that was measured.
        backend: The fastest backend, without suffix.
        config: Its knobs.
        ms: Measured milliseconds.
    """

    problem: Problem
    backend: str
    config: Config
    ms: float


# The entries in use, by shape class and whether gradients follow. None before the first look, which
# reads the file that the environment variable names.
entries: dict[tuple[ShapeClass, bool], Entry] | None = None

# Loads that file: natten.profile_file.load_profile, which natten/__init__.py puts here because it
# is built on the dispatcher, and the dispatcher on this module.
load_file: Any = None


def _read_environment() -> None:
    global entries
    entries = {}
    path = os.environ.get(VARIABLE)
    if path:
        try:
            load_file(path)
        except (OSError, ValueError) as error:
            entries = None
            raise ValueError(f"the environment variable {VARIABLE}: {error}") from error


def _entry(problem: Problem) -> Entry | None:
    if entries is None:
        _read_environment()
    if not entries:
        return None
    key = shape_class(problem)
    found = entries.get((key, problem.requires_grad))
    # Tiles of a forward pass that was measured with its backward pass are as good without.
    return found or entries.get((key, not problem.requires_grad))


def lookup(problem: Problem, backend: str) -> Config | None:
    """The knobs that a loaded profile has for a problem on a backend (a name without suffix)."""
    entry = _entry(problem)
    return entry.config if entry is not None and entry.backend == backend else None


def with_profile(config: Config, problem: Problem, backend: str) -> Config:
    """The caller's knobs for a problem, and a loaded profile's where the caller gave none."""
    found = lookup(problem, backend)
    if found is None:
        return config
    if config == DEFAULT_CONFIG:
        return found
    changes: dict[str, Any] = {}
    if config.q_tile_shape is None and config.kernel_schedule is None:
        for name in ("q_tile_shape", "kv_tile_shape", "kernel_schedule"):
            changes[name] = getattr(found, name)
        if config.run_persistent_kernel:
            changes["run_persistent_kernel"] = found.run_persistent_kernel
    if config.backward_q_tile_shape is None:
        for name in ("backward_q_tile_shape", "backward_kv_tile_shape"):
            changes[name] = getattr(found, name)
    return replace(config, **changes)


def preferred_backend(problem: Problem) -> str | None:
    """The backend (without suffix) that a loaded profile has for a problem."""
    entry = _entry(problem)
    return None if entry is None else entry.backend


__all__ = [
    "VARIABLE",
    "Entry",
    "ShapeClass",
    "entries",
    "load_file",
    "lookup",
    "preferred_backend",
    "shape_class",
    "with_profile",
]
