"""What every backend accepts for a problem, on a device that may not be here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from natten import devices
from natten.devices import Device
from natten.functional import dispatch
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import predict

Shape = tuple[int, ...]
GPU_BACKENDS = ("blackwell", "hopper", "cutlass")


@dataclass(frozen=True)
class Configuration:
    """One valid choice of tiles and schedule.

    Attributes:
        q_tile_shape: Query tile.
        kv_tile_shape: Key tile.
        kernel_schedule: "non", "coop", "pp"; None where there is only one.
        waste: Simulated: executed over needed operations; None without a simulation.
        ms: Predicted milliseconds; None without a simulation.
    """

    q_tile_shape: Shape
    kv_tile_shape: Shape
    kernel_schedule: str | None = None
    waste: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class Listing:
    """What one backend accepts.

    Attributes:
        backend: Its name, without suffix.
        reason: Why it cannot run the problem there; None if it can.
        forward: Valid configurations of the forward pass, the default first; empty if none can
            be chosen.
        backward: Those of the backward pass.
    """

    backend: str
    reason: str | None
    forward: tuple[Configuration, ...] = ()
    backward: tuple[Configuration, ...] = ()


def _pairs(listed: list[Any]) -> list[tuple[Shape, Shape, str | None]]:
    return [
        (q, kv, schedule and str(schedule)) for (q, kv), schedule in dispatch.tile_pairs(listed)
    ]


def rank(
    problem: Problem, device: Device | None, listed: list[Any], backward: bool, limit: int = 0
) -> tuple[Configuration, ...]:
    """Listed configurations: the default, then by predicted time if the device is known.

    ``limit`` ends the list, 0 does not.
    """
    pairs = _pairs(listed)
    found = [Configuration(*pair) for pair in pairs]
    if device is not None:
        # Predictions do not know schedules.
        predicted = {
            pair: predict(problem, device, _config(*pair, backward), backward)
            for pair in dict.fromkeys((c.q_tile_shape, c.kv_tile_shape) for c in found)
        }
        found = [
            Configuration(q, kv, schedule, predicted[q, kv][1], predicted[q, kv][0])
            for q, kv, schedule in pairs
        ]
        found[1:] = sorted(found[1:], key=lambda c: c.ms or 0.0)
    return tuple(found[:limit] if limit else found)


def _config(query: Shape, key: Shape, backward: bool) -> Config:
    if backward:
        return Config(backward_q_tile_shape=query, backward_kv_tile_shape=key)
    return Config(q_tile_shape=query, kv_tile_shape=key)


def _asked(listed: list[Any], query: Shape | None, key: Shape | None, schedule: Any) -> list[Any]:
    """Those of the listed configurations that have the tiles and the schedule asked for."""
    return [
        entry
        for entry, (q, kv, s) in zip(listed, _pairs(listed), strict=True)
        if query in (None, q) and key in (None, kv) and schedule in (None, s)
    ]


def list_backend(
    name: str,
    problem: Problem,
    device: Device | None,
    absent: bool,
    limit: int = 0,
    asked: Config = DEFAULT_CONFIG,
) -> Listing:
    """What the backend ``name`` accepts for ``problem``.

    Args:
        name: Without suffix.
        problem: The problem.
        device: Facts for predictions; None for the CPU.
        absent: Whether the device is not here.
        limit: The most configurations of each pass; 0 for all.
        asked: Only what has these tiles and this schedule, and how FlexAttention is asked for.
    """
    there = devices.pretending(device) if absent and device is not None else nullcontext()
    with there:
        backend = dispatch.load(name)
        reason = dispatch.refusal(name, problem, Config(torch_compile=asked.torch_compile))
        if reason is not None:
            return Listing(name, reason.replace("this GPU", device.name if device else "this GPU"))
        forward = _asked(
            backend.configs(problem),
            asked.q_tile_shape, asked.kv_tile_shape, asked.kernel_schedule,
        )  # fmt: skip
        backward = _asked(
            backend.backward_configs(problem),
            asked.backward_q_tile_shape, asked.backward_kv_tile_shape, None,
        )  # fmt: skip
        if not forward and (asked.q_tile_shape or asked.kernel_schedule):
            return Listing(name, "it has no such tiles or schedule")
        if not backward and asked.backward_q_tile_shape:
            return Listing(name, "it has no such tiles of the backward pass")
    known = device if name in GPU_BACKENDS else None
    return Listing(
        name, None, rank(problem, known, forward, False, limit),
        rank(problem, known, backward, True, limit),
    )  # fmt: skip


def list_all(
    problem: Problem,
    device: Device | None,
    absent: bool,
    backend: str = "",
    limit: int = 0,
    asked: Config = DEFAULT_CONFIG,
) -> tuple[Listing, ...]:
    """:func:`list_backend` for all backends, or for one."""
    names = [backend] if backend else list(dispatch.BACKENDS)
    return tuple(list_backend(name, problem, device, absent, limit, asked) for name in names)


__all__ = ["GPU_BACKENDS", "Configuration", "Listing", "list_all", "list_backend", "rank"]
