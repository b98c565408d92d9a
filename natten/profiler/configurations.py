"""What every backend accepts for a problem, on a device that may not be here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from natten import devices
from natten.devices import Device
from natten.functional import dispatch
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import simulate_problem

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
        (q, kv, getattr(schedule, "value", schedule))
        for (q, kv), schedule in dispatch.tile_pairs(listed)
    ]


def rank(
    problem: Problem, device: Device | None, listed: list[Any], backward: bool, limit: int = 0
) -> tuple[Configuration, ...]:
    """Listed configurations: the default, then by predicted time if the device is known.

    ``limit`` ends the list, 0 does not. Backends list theirs by work, so that only the first few
    times as many have to be predicted.
    """
    pairs = _pairs(listed)
    if device is None or not pairs:
        found = [Configuration(*pair) for pair in pairs]
        return tuple(found[:limit] if limit else found)
    found = []
    for q, kv, schedule in pairs[: 8 * limit] if limit else pairs:
        if backward:
            config = Config(backward_q_tile_shape=q, backward_kv_tile_shape=kv)
        else:
            config = Config(q_tile_shape=q, kv_tile_shape=kv)
        result = simulate_problem(problem, device, config)
        needed = result.needed_backward_flops if backward else result.needed_flops
        executed = sum(
            kernel.executed_flops for kernel in (result.backward if backward else (result.forward,))
        )
        ms = result.backward_ms if backward else result.forward_ms
        found.append(Configuration(q, kv, schedule, executed / max(needed, 1), ms))
    ordered = [found[0], *sorted(found[1:], key=lambda c: c.ms or 0.0)]
    return tuple(ordered[:limit] if limit else ordered)


def list_backend(
    name: str, problem: Problem, device: Device | None, absent: bool, limit: int = 0
) -> Listing:
    """What the backend ``name`` accepts for ``problem``.

    Args:
        name: Without suffix.
        problem: The problem.
        device: Facts for predictions; None for the CPU.
        absent: Whether the device is not here.
        limit: The most configurations of each pass; 0 for all.
    """
    if absent and device is not None and name not in GPU_BACKENDS:
        reason = "it runs on cpu tensors" if name == "cpu" else None
        return Listing(name, reason)
    there = devices.pretending(device) if absent and device is not None else nullcontext()
    with there:
        backend = dispatch.load(name)
        reason = dispatch.refusal(name, problem, DEFAULT_CONFIG)
        if reason is not None:
            return Listing(name, reason.replace("this GPU", device.name if device else "this GPU"))
        forward, backward = backend.configs(problem), backend.backward_configs(problem)
    known = device if name in GPU_BACKENDS else None
    return Listing(
        name, None, rank(problem, known, forward, False, limit),
        rank(problem, known, backward, True, limit),
    )  # fmt: skip


def list_all(
    problem: Problem, device: Device | None, absent: bool, backend: str = "", limit: int = 0
) -> tuple[Listing, ...]:
    """:func:`list_backend` for all backends, or for one."""
    names = [backend] if backend else list(dispatch.BACKENDS)
    return tuple(list_backend(name, problem, device, absent, limit) for name in names)


__all__ = ["GPU_BACKENDS", "Configuration", "Listing", "list_all", "list_backend", "rank"]
