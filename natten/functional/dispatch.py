"""The table of backends: who runs a problem, and why the others do not.

:class:`natten.functional.backend.Backend` says what each of them is. Nothing but this table names
one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor

from natten import tuned, validation
from natten.context import Preferences, preferences
from natten.functional.backend import Backend, Gradients, Inputs
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem, Unavailable

logger = logging.getLogger("natten")


class Entry(NamedTuple):
    """Where a backend is, and what is known of it before its module is imported.

    Attributes:
        module: Its module.
        attribute: The object in it.
        device: The tensors that it is for; it is loaded for others only when named. None for any.
        is_bare: Whether its name may be used without suffix: it has no counterpart elsewhere.
        is_expected: Whether this is what such a device ought to run on.
    """

    module: str
    attribute: str
    device: str | None = None
    is_bare: bool = False
    is_expected: bool = False


_TRITON = "natten.functional.backends.triton"
# In order of preference.
BACKENDS: dict[str, Entry] = {
    "blackwell": Entry(_TRITON, "BLACKWELL", "cuda"),
    "hopper": Entry(_TRITON, "HOPPER", "cuda"),
    "cutlass": Entry(_TRITON, "CUTLASS", "cuda", is_expected=True),
    "cpu": Entry("natten.functional.backends.cpu", "CPU", "cpu", is_bare=True, is_expected=True),
    "flex": Entry("natten.functional.backends.flex", "FLEX"),
    "reference": Entry("natten.functional.backends.reference", "REFERENCE", is_bare=True),
}
FNA, FMHA = "fna", "fmha"


class _Missing(Backend):
    """Stands in for a backend that this installation lacks."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = Unavailable(reason)

    def refusal(self, problem: Problem, config: Config) -> str | None:
        return self.reason

    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raise RuntimeError(self.reason)

    def backward(self, problem: Problem, config: Config, *arguments: Any) -> Gradients:
        raise RuntimeError(self.reason)


@cache
def load(name: str) -> Backend:
    """The backend object called ``name`` (without suffix); imports its module."""
    module, attribute, *_ = BACKENDS[name]
    if find_spec(module) is None:
        return _Missing(name, f"the {name} kernels are not part of this installation")
    try:
        backend = getattr(import_module(module), attribute, None)
    except ImportError as error:
        return _Missing(name, f"the {name} kernels cannot be imported: {error}")
    return backend or _Missing(name, f"the {name} kernels are not part of this installation")


def public_names(kind: str) -> list[str]:
    """The names that ``backend=`` takes for "fna" (na1d, na2d, na3d) or "fmha" (attention)."""
    bare = [name for name, entry in BACKENDS.items() if entry.is_bare]
    return [f"{name}-{kind}" for name in BACKENDS] + bare


def parse_name(backend: Any, kind: str) -> str:
    """A public backend name to the table's; "" for None.

    Raises:
        ValueError: not a string or None.
        NotImplementedError: no backend has this name.
    """
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise ValueError(f"backend must be a str or None, got {validation.shown(backend)}")
    name, _, suffix = backend.partition("-")
    entry = BACKENDS.get(name)
    if entry is not None and (suffix == kind or (entry.is_bare and backend == name)):
        return name
    raise NotImplementedError(
        f"backend must be None or one of {', '.join(public_names(kind))}, got {backend!r}"
    )


def _device_refusal(name: str, problem: Problem) -> str | None:
    device = BACKENDS[name].device
    if device is None or problem.device.type == device:
        return None
    return Unavailable(f"it runs on {device} tensors, and these are on {problem.device.type}")


def refusal(name: str, problem: Problem, config: Config) -> str | None:
    """Why the backend called ``name`` (without suffix) would not run ``problem`` if named."""
    if BACKENDS[name].device == "cpu":
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
    return backend.auto_refusal(problem, config) if reason is None else reason


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


def check_tiles(backend: Backend, problem: Problem, config: Config) -> None:
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


def resolve(problem: Problem, config: Config, name: str = "") -> Backend:
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
def _resolve(problem: Problem, config: Config, name: str, _: Preferences) -> Backend:
    backend = _decide(problem, config, name)
    if logger.isEnabledFor(logging.DEBUG):
        from natten.functional import messages

        messages.report(explain(problem, config), backend, problem, config)
    return backend


def _decide(problem: Problem, config: Config, name: str) -> Backend:
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
        lacks = isinstance(reason, Unavailable) and _device_refusal(candidate, problem) is None
        if lacks and BACKENDS[candidate].is_expected:
            _suggest_once(candidate, reason)
    raise NotImplementedError("no backend can run this problem; " + "; ".join(reasons))


def resolve_float8(problem: Problem, name: str = "") -> Backend:
    """The backend that runs ``problem`` with 8-bit inputs: the one named, or the first that can.

    Raises:
        NotImplementedError: the named backend declines the problem, or all do.
        RuntimeError: the named backend needs what this machine lacks.
    """
    reasons = []
    for candidate in [name] if name else BACKENDS:
        lacking = None if name else _device_refusal(candidate, problem)
        reason = lacking or load(candidate).float8_refusal(problem, bool(name))
        if reason is None:
            return load(candidate)
        reasons.append(f"{candidate}: {reason}")
    kind = RuntimeError if name and isinstance(reason, Unavailable) else NotImplementedError
    raise kind(f"8-bit numbers are not computed here; {'; '.join(reasons)}")


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
            f"is_causal={p.is_causal}"
            + f", is_circular={p.is_circular}" * bool(p.is_circular)
            + f", upsampling={p.upsampling}" * bool(p.upsampling),
            f"batch {p.batch}, heads {p.heads}/{p.heads_kv}, head_dim {p.head_dim}/{p.head_dim_v}, "
            f"{p.dtype} on {p.device}, {'with' if p.requires_grad else 'without'} gradients",
        ]
        extras = (
            (f"{p.num_additional} additional keys", p.num_additional),
            ("lengths of these", p.has_lengths),
            ("a bias", p.has_rpb),
            (f"softcap={p.softcap:g}", p.softcap),
            ("a sink", p.has_sink),
            ("a mask of keys", p.has_key_mask),
            ("a mask of queries", p.has_query_mask),
            ("packed sequences", p.varlen),
            (
                f"{p.grids.number if p.grids else 0} grids of {p.num_queries} tokens, of which "
                "this is the heaviest",
                p.grids is not None,
            ),
        )
        if any(is_there for _, is_there in extras):
            lines.append(f"with {', '.join([name for name, is_there in extras if is_there])}")
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
    "resolve_float8",
    "tile_pairs",
]
