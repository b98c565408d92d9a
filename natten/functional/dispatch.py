"""The table of backends: who runs a problem, and why the others do not.

Every backend is an object with

    name                          its name, without suffix
    refusal(problem, config)      None if it can run the problem, else the reason in one sentence
                                  (an Unavailable if the environment lacks something)
    forward(problem, config, query, key, value, rpb, additional_keys, additional_values,
            cumulative_seqlen_q, cumulative_seqlen_kv, additional_lengths) -> (out, logsumexp)
    backward(problem, config, grad_out, grad_lse, *the same tensors, out, logsumexp, needs)
            -> six gradients
    configs(problem), backward_configs(problem)
                                  (q_tile_shape, kv_tile_shape) pairs that it accepts, or
                                  ((q_tile_shape, kv_tile_shape), kernel_schedule); an empty list
                                  if it has no such knobs, which are then ignored

and, optionally,

    auto_refusal(problem, config) a reason not to be chosen unless named
    takes_destinations            true if backward takes ``destinations=``: views that it may write
                                  the gradients of query, key and value into, which are always
                                  needed then, and return
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from natten import tuned
from natten.context import Preferences, preferences
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem, Unavailable

logger = logging.getLogger("natten")

# In order of preference.
BACKENDS: dict[str, tuple[str, str]] = {
    "blackwell": ("natten.functional.backends.triton", "BLACKWELL"),
    "hopper": ("natten.functional.backends.triton", "HOPPER"),
    "cutlass": ("natten.functional.backends.triton", "CUTLASS"),
    "cpu": ("natten.functional.backends.cpu", "CPU"),
    "flex": ("natten.functional.backends.flex", "FLEX"),
    "reference": ("natten.functional.backends.reference", "REFERENCE"),
}
# Loaded only for tensors of the device they are for, or when named.
_DEVICES = {"blackwell": "cuda", "hopper": "cuda", "cutlass": "cuda", "cpu": "cpu"}
# Names that may be used without suffix: they have no counterpart elsewhere.
_UNSUFFIXED = ("cpu", "reference")
FNA, FMHA = "fna", "fmha"


class _Missing:
    """Stands in for a backend that this installation lacks."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = Unavailable(reason)

    def refusal(self, problem: Problem, config: Config) -> str | None:
        return self.reason

    def configs(self, problem: Problem) -> list[Any]:
        return []

    backward_configs = configs


@cache
def load(name: str) -> Any:
    """The backend object called ``name`` (without suffix); imports its module."""
    module, attribute = BACKENDS[name]
    if find_spec(module) is None:
        return _Missing(name, f"the {name} kernels are not part of this installation")
    try:
        backend = getattr(import_module(module), attribute, None)
    except ImportError as error:
        return _Missing(name, f"the {name} kernels cannot be imported: {error}")
    return backend or _Missing(name, f"the {name} kernels are not part of this installation")


def public_names(kind: str) -> list[str]:
    """The names that ``backend=`` takes for "fna" (na1d, na2d, na3d) or "fmha" (attention)."""
    return [f"{name}-{kind}" for name in BACKENDS] + list(_UNSUFFIXED)


def parse_name(backend: Any, kind: str) -> str:
    """A public backend name to the table's; "" for None.

    Raises:
        ValueError: not a string or None.
        NotImplementedError: no backend has this name.
    """
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise ValueError(f"backend must be a str or None, got {backend!r}")
    name, _, suffix = backend.partition("-")
    if name in BACKENDS and (suffix == kind or (not suffix and backend in _UNSUFFIXED)):
        return name
    raise NotImplementedError(
        f"backend must be None or one of {', '.join(public_names(kind))}, got {backend!r}"
    )


def _device_refusal(name: str, problem: Problem) -> str | None:
    device = _DEVICES.get(name)
    if device is None or problem.device.type == device:
        return None
    return Unavailable(f"it runs on {device} tensors, and these are on {problem.device.type}")


def refusal(name: str, problem: Problem, config: Config) -> str | None:
    """Why the backend called ``name`` (without suffix) would not run ``problem`` if named."""
    if _DEVICES.get(name) == "cpu":
        reason = _device_refusal(name, problem)
        if reason is not None:
            return reason
    return load(name).refusal(problem, config)


def _auto_refusal(name: str, problem: Problem, config: Config) -> str | None:
    # Nothing is imported for tensors of another device.
    reason = _device_refusal(name, problem)
    if reason is not None:
        return reason
    backend = load(name)
    reason = backend.refusal(problem, config)
    if reason is None and hasattr(backend, "auto_refusal"):
        reason = backend.auto_refusal(problem, config)
    return reason


def can_run(name: str, problem: Problem, config: Config) -> bool:
    """Whether the backend called ``name`` (without suffix) would run ``problem`` if named."""
    return refusal(name, problem, config) is None


def tile_pairs(configs: list[Any]) -> list[tuple[Any, str | None]]:
    """(tile pair, kernel schedule or None) of each listed configuration."""
    return [
        ((tuple(c[0][0]), tuple(c[0][1])), c[1])
        if isinstance(c[0][0], (tuple, list))
        else ((tuple(c[0]), tuple(c[1])), None)
        for c in configs
    ]


# Pairs that an error names; there may be thousands.
_SHOWN = 24


def _check_pair(
    knobs: tuple[str, str],
    pair: tuple[Any, Any],
    schedule: str | None,
    name: str,
    list_configs: Callable[[], list[Any]],
) -> None:
    if pair[0] is None:
        return
    listed = tile_pairs(list_configs())
    if not listed or any(
        p == pair and (schedule is None or s in (None, schedule)) for p, s in listed
    ):
        return
    valid = ", ".join(f"{q}/{kv}" + (f" ({s})" if s else "") for (q, kv), s in listed[:_SHOWN])
    if len(listed) > _SHOWN:
        valid += f" and {len(listed) - _SHOWN} more"
    raise ValueError(
        f"{knobs[0]} and {knobs[1]} must be a pair that backend {name!r} lists, got "
        f"{pair[0]}/{pair[1]}"
        + (f" with kernel_schedule={schedule!r}" if schedule else "")
        + f"; valid: {valid}"
    )


def check_tiles(backend: Any, problem: Problem, config: Config) -> None:
    """Raise ValueError if the tile shapes in ``config`` are not among the backend's own."""
    _check_pair(
        ("q_tile_shape", "kv_tile_shape"),
        (config.q_tile_shape, config.kv_tile_shape),
        config.kernel_schedule,
        backend.name,
        lambda: backend.configs(problem),
    )
    _check_pair(
        ("backward_q_tile_shape", "backward_kv_tile_shape"),
        (config.backward_q_tile_shape, config.backward_kv_tile_shape),
        None,
        backend.name,
        lambda: backend.backward_configs(problem),
    )


_suggested: set[str] = set()


def _suggest_once(name: str, reason: str) -> None:
    if name not in _suggested:
        _suggested.add(name)
        logger.warning("the fast backend %r is not used here: %s", name, reason)


def resolve(problem: Problem, config: Config, name: str = "") -> Any:
    """The backend that runs ``problem``: the one named, or the first that can.

    Raises:
        NotImplementedError: the named backend declines the problem, or all do.
        RuntimeError: the named backend needs what this machine lacks.
        ValueError: tile shapes that the backend does not list.
    """
    return _resolve(problem, config, name, preferences())


def _preferred(problem: Problem, config: Config) -> str | None:
    """The backend that a loaded profile found fastest, unless the caller asks for something."""
    name = tuned.preferred_backend(problem) if config == DEFAULT_CONFIG else None
    return name if name is not None and refusal(name, problem, config) is None else None


def forget() -> None:
    """Decide again who runs which problem: profiles have changed."""
    _resolve.cache_clear()


# Refusals may depend on the preferences, which are part of the key for that reason.
@lru_cache(maxsize=4096)
def _resolve(problem: Problem, config: Config, name: str, _: Preferences) -> Any:
    backend = _decide(problem, config, name)
    if logger.isEnabledFor(logging.DEBUG):
        from natten.functional import messages

        messages.report(explain(problem, config), backend, problem, config)
    return backend


def _decide(problem: Problem, config: Config, name: str) -> Any:
    if name:
        if name not in BACKENDS:
            raise NotImplementedError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        reason = refusal(name, problem, config)
        if reason is not None:
            kind = RuntimeError if isinstance(reason, Unavailable) else NotImplementedError
            raise kind(f"backend {name!r} cannot run this problem: {reason}")
        backend = load(name)
        check_tiles(backend, problem, config)
        return backend
    preferred = _preferred(problem, config)
    if preferred is not None:
        return load(preferred)
    reasons = []
    for candidate in BACKENDS:
        reason = _auto_refusal(candidate, problem, config)
        if reason is None:
            backend = load(candidate)
            check_tiles(backend, problem, config)
            return backend
        reasons.append(f"{candidate}: {reason}")
        # These two are what a CPU or a GPU ought to run on.
        lacks = isinstance(reason, Unavailable) and _device_refusal(candidate, problem) is None
        if lacks and candidate in ("cpu", "cutlass"):
            _suggest_once(candidate, reason)
    raise NotImplementedError("no backend can run this problem; " + "; ".join(reasons))


@dataclass(frozen=True)
class Decision:
    """What one backend said.

    Attributes:
        backend: Its public name.
        reason: Why it would not run the call; None if it could.
    """

    backend: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """Who would run a call and why the others would not. ``str()`` is a table.

    Attributes:
        problem: The call without its data.
        config: Its performance knobs.
        decisions: One for each backend, in order of preference.
        chosen: The backend that would run it, as in ``backend=``.
    """

    problem: Problem
    config: Config
    decisions: tuple[Decision, ...]
    chosen: str

    def __str__(self) -> str:
        p = self.problem
        width = max(len(d.backend) for d in self.decisions)
        lines = [
            f"{'x'.join(map(str, p.query_shape))} queries, {'x'.join(map(str, p.key_shape))} keys, "
            f"kernel_size={p.kernel_size}, stride={p.stride}, dilation={p.dilation}, "
            f"is_causal={p.is_causal}",
            f"batch {p.batch}, heads {p.heads}/{p.heads_kv}, head_dim {p.head_dim}/{p.head_dim_v}, "
            f"{p.dtype} on {p.device}, {'with' if p.requires_grad else 'without'} gradients",
        ]
        for d in self.decisions:
            mark = ">" if d.backend == self.chosen else " "
            could = "runs it" if d.backend == self.chosen else "could run it"
            lines.append(f"{mark} {d.backend:<{width}}  {d.reason or could}")
        return "\n".join(lines)


def explain(problem: Problem, config: Config, kind: str = FNA) -> Explanation:
    """Ask every backend about ``problem``."""
    decisions = []
    preferred = _preferred(problem, config)
    chosen = "" if preferred is None else f"{preferred}-{kind}"
    for name in BACKENDS:
        reason = _auto_refusal(name, problem, config)
        decisions.append(Decision(f"{name}-{kind}", reason))
        if reason is None and not chosen:
            chosen = f"{name}-{kind}"
    return Explanation(problem, config, tuple(decisions), chosen)


__all__ = [
    "BACKENDS",
    "FMHA",
    "FNA",
    "Decision",
    "Explanation",
    "can_run",
    "check_tiles",
    "explain",
    "forget",
    "load",
    "parse_name",
    "public_names",
    "refusal",
    "resolve",
    "tile_pairs",
]
