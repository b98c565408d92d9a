"""Kernels compiled before the first call needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from natten import devices, validation
from natten.functional import operators
from natten.functional.call import Call
from natten.functional.dispatch import resolve
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem


def precompile(
    what: Callable[..., Any] | Problem | Iterable[Problem],
    *inputs: Any,
    gpu: str | None = None,
    backward: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> int:
    """Compile all kernels that calls will need, in parallel, into Triton's cache on disk.

    The first call of a process then loads them in milliseconds; without, each kernel takes a second
    or more. Nothing runs on a GPU.

    Args:
        what: A module or function, which is called on ``inputs`` without computing anything, to
            find the calls of this package's operations that it makes; or problems, as
            :func:`natten.simulator.make_problem` makes them.
        inputs: Example inputs of a function: their shapes and dtypes matter, not their device.
        gpu: The GPU to compile for, a name of ``natten.devices.DEVICES`` ("h100"), which need not
            be here; None: the current one.
        backward: Whether gradients will be asked for.
        workers: Kernels that are compiled at a time; None: as many as there are CPUs.
        progress: Whether to show a progress bar on a terminal (with rich).

    Returns:
        The number of kernels compiled.

    Raises:
        ValueError: No call of this package's operations was found, or an unknown ``gpu``.
        NotImplementedError: A call that no Triton backend runs on that GPU.
        RuntimeError: There is no GPU here and none is named, Triton is missing, or kernels could
            not be compiled: which, and why.
    """
    try:
        from natten.functional.backends.triton import ahead
    except ImportError as error:
        raise RuntimeError("precompile needs Triton, which PyTorch brings for Linux") from error
    if gpu is None and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here; name one to compile for, as gpu='h100'")
    calls = _calls_of(what, inputs)
    workers = workers or os.cpu_count() or 1
    validation.int_tuple("workers", workers, 1)
    with ExitStack() as elsewhere:
        if gpu is None:
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device, named = torch.device("cuda"), devices.find(gpu)
            elsewhere.enter_context(devices.pretending(named))
            elsewhere.enter_context(ahead.target(named.capability or (0, 0)))
        wanted: dict[Any, list[Any]] = {}
        for problem, config, name in calls:
            problem = replace(problem, device=device, requires_grad=backward)
            if (problem, config, name) not in wanted:
                backend = resolve(problem, config, name)
                if not hasattr(backend, "forward_tiling"):
                    raise NotImplementedError(
                        f"no kernel to compile: backend {backend.name!r} runs {problem}"
                    )
                wanted[problem, config, name] = ahead.kernels(backend, problem, config)
        compilations = [kernel for kernels in wanted.values() for kernel in kernels]
        failed = _compile(ahead, compilations, workers, progress, None if gpu else device)
    if failed:
        reasons = "; ".join(f"{c.kernel.__name__}: {error}" for c, error in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(compilations)} kernels could not be compiled: {reasons}"
        )
    return len(compilations)


def _calls_of(what: Any, inputs: tuple[Any, ...]) -> list[tuple[Problem, Config, str]]:
    if isinstance(what, Problem):
        return [(what, DEFAULT_CONFIG, "")]
    if not callable(what):
        problems = list(what)
        for problem in problems:
            if not isinstance(problem, Problem):
                raise ValueError(f"problems must be Problems, got {validation.shown(problem)}")
        if not problems:
            raise ValueError("there is no problem to compile for")
        return [(problem, DEFAULT_CONFIG, "") for problem in problems]
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    calls: list[Call] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, operators.observing(calls.append):
        what(*tree_map_only(Tensor, mode.from_tensor, inputs))
    if not calls:
        raise ValueError("the function makes no call of this package's operations")
    return [
        (call.problem, call.config, call.parameters.backend) for call in calls if not call.is_empty
    ]


def _compile(
    ahead: Any,
    compilations: list[Any],
    workers: int,
    progress: bool,
    device: torch.device | None,
) -> list[tuple[Any, Exception]]:
    if not progress:
        found: list[tuple[Any, Exception]] = ahead.compile_all(
            compilations, workers, lambda: None, device
        )
        return found
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("compiling kernels", total=len(compilations))
        found = ahead.compile_all(compilations, workers, lambda: bar.advance(task), device)
        return found


__all__ = ["precompile"]
