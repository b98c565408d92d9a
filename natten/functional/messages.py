"""What NATTEN_LOG_LEVEL=DEBUG says: who runs a call, with which tiles, and what compilers do.

Nothing here is imported, and no compiler is listened to, unless the logger "natten" is at DEBUG.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

from natten.functional.problem import Config, Problem

if TYPE_CHECKING:
    from natten.functional.dispatch import Explanation

logger = logging.getLogger("natten")


def _tiles(backend: Any, problem: Problem, config: Config) -> str:
    """The pair of forward tiles: the caller's, or the backend's default."""
    if config.q_tile_shape is not None:
        return f"tiles {config.q_tile_shape}/{config.kv_tile_shape}, as asked for"
    listed = backend.configs(problem)
    if not listed:
        return "no tiles to choose"
    if backend.name == "flex" and problem.rank > 1:
        return "blocks of flattened tokens by default"
    pair = listed[0][0] if isinstance(listed[0][0][0], (tuple, list)) else listed[0]
    return f"tiles {tuple(pair[0])}/{tuple(pair[1])} by default"


def report(explanation: Explanation, backend: Any, problem: Problem, config: Config) -> None:
    """One message for a decision, which all calls like this one share."""
    _listen()
    lines = [f"{backend.name} runs calls like this one, {_tiles(backend, problem, config)}"]
    lines += [f"  {line}" for line in str(explanation).splitlines()[:2]]
    for decision in explanation.decisions:
        name = decision.backend.partition("-")[0]
        if decision.reason is not None and name != backend.name:
            lines.append(f"  not {name}: {decision.reason}")
    logger.debug("\n".join(lines))


@cache
def _listen() -> None:
    """Report what the compilers of kernels do, as far as they are imported by now."""
    if "numba" in sys.modules:
        _listen_to_numba()
    if "triton" in sys.modules:
        _listen_to_triton()


def _is_ours(module: Any) -> bool:
    return str(module).startswith("natten.")


def _listen_to_numba() -> None:
    from numba.core import event

    class Listener(event.Listener):
        """Functions that others call are compiled within those, which alone are worth a line."""

        def __init__(self) -> None:
            self.started: list[float] = []

        def on_start(self, event: Any) -> None:
            self.started.append(perf_counter())

        def on_end(self, event: Any) -> None:
            seconds = perf_counter() - self.started.pop()
            function = event.data["dispatcher"].py_func
            if not self.started and _is_ours(function.__module__):
                logger.debug(
                    "numba compiled %s, which was not in its cache, in %.1f s",
                    function.__qualname__, seconds,
                )  # fmt: skip

    event.register("numba:compile", Listener())


def _listen_to_triton() -> None:
    from triton import knobs

    before = getattr(knobs.compilation, "listener", None)

    def listener(**facts: Any) -> None:
        if before is not None:
            before(**facts)
        function: Any = getattr(facts["src"], "fn", None)
        if _is_ours(getattr(function, "__module__", "")):
            did = "took from its cache" if facts["cache_hit"] else "compiled"
            logger.debug("Triton %s %s", did, function.__name__)

    knobs.compilation.listener = listener


__all__ = ["report"]
