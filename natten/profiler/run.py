"""From a checked command line to tables and files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import natten
from natten import devices, profile_file
from natten.devices import Device
from natten.functional import dispatch
from natten.functional.problem import Config, Problem
from natten.profiler import configurations, measuring, optimize, report, subjects
from natten.profiler.arguments import OTHERS, Request, request_of
from natten.profiler.report import Report
from natten.simulator import needed_pairs, traffic

if TYPE_CHECKING:
    from rich.console import Console


def _console(stderr: bool = False) -> Console:
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the profiler's tables need {error.name}: pip install 'natten[profiler]'"
        ) from error
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and console.width < 120:
        # A pipe has no width: do not fold.
        return Console(stderr=stderr, highlight=False, width=120)
    return console


class _Output:
    """Where tables, progress, JSON and CSV go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        machine = "-" in (options.json, options.csv)
        if options.json == "-" and options.csv == "-":
            raise ValueError("--json and --csv cannot both go to standard output: name a file")
        # Progress must not mix with what a script reads.
        self.console = _console(stderr=machine)
        self.tables = not machine

    def show(self, *things: Any) -> None:
        if self.tables:
            for thing in things:
                self.console.print(thing)

    def write(self, document: dict[str, Any], table: str) -> None:
        text = json.dumps(document, indent=1) + "\n"
        for target, content in ((self.options.json, text), (self.options.csv, table)):
            if target == "-":
                sys.stdout.write(content)
            elif target is not None:
                Path(target).write_text(content)

    @contextmanager
    def progress(self, total: float) -> Iterator[Any]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Of older versions, which drew with tqdm.
        hidden = not self.console.is_terminal or bool(os.environ.get("NATTEN_DISABLE_TQDM"))
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=total)

            def tell(text: str, completed: float | None = None) -> None:
                if completed is None:
                    bar.update(task, description=text, advance=1)
                else:
                    bar.update(task, description=text, completed=completed)

            yield tell


def _facts(problem: Problem) -> Device | None:
    return devices.current(problem.device) if problem.device.type == "cuda" else None


def _dry_run(request: Request, output: _Output) -> int:
    named, problem = request.named_device, request.problem
    device = named or _facts(problem)
    limit = request.options.max_configs
    listings = configurations.list_all(problem, device, named is not None, request.backend, limit)
    where = device.full_name if device is not None else devices.driver_name("cpu")
    output.show(f"{report.title(problem)}, on {where}")
    output.show(*report.listing_tables(listings))
    if limit:
        output.show(f"At most {limit} of each pass; --max-configs 0 lists all.")
    document = {"device": where, "backends": [asdict(listing) for listing in listings]}
    output.write(document, report.listings_csv(listings))
    return 0


def _flops(problem: Problem) -> int:
    """Needed operations of what is measured: two products forward, five more backward."""
    pairs = needed_pairs(problem) * problem.batch * problem.heads
    d, dv = problem.head_dim, problem.head_dim_v
    return 2 * pairs * (d + dv + (3 * d + 2 * dv if problem.requires_grad else 0))


def _bytes(problem: Problem) -> int:
    return traffic(problem, False) + (traffic(problem, True) if problem.requires_grad else 0)


def _existing(path: str, problem: Problem) -> profile_file.Profile:
    """The profile that a search adds to; refused before the search if it cannot be added to."""
    name = devices.driver_name(problem.device)
    facts = _facts(problem)
    capability = None if facts is None else facts.capability
    if Path(path).exists():
        found = profile_file.read_profile(path)
        if found.device != name:
            raise ValueError(
                f"{path} is a profile of {found.device!r}, and the device here is {name!r}: "
                "name another file with --save"
            )
        return replace(found, natten_version=natten.__version__)
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise ValueError(f"--save {path}: there is no folder {parent}")
    return profile_file.Profile(name, capability, (), natten.__version__)


def _optimize(
    request: Request, tensors: subjects.Tensors, output: _Output
) -> tuple[optimize.Search, str, Config]:
    problem, options = request.problem, request.options
    profile = _existing(options.save, problem)
    with output.progress(1.0) as tell, profile_file.without_profile():
        found = optimize.search(
            problem, tensors, _facts(problem), backend=request.backend,
            warmup=options.optimize_warmup_steps, seconds=options.optimize_seconds, progress=tell,
        )  # fmt: skip
    best = found.best
    if best is None:
        failures = [trial.failure for trial in found.trials if trial.failure]
        raise RuntimeError(
            "no configuration ran"
            + (", the search was interrupted" if found.interrupted else "")
            + (f": {failures[0]}" if failures else "")
        )
    name, config, ms = best
    entry = profile_file.Entry(problem, name, config, ms)
    profile_file.save_profile(options.save, profile_file.merged(profile, [entry]))
    output.show(report.search_table(found))
    output.show(
        f"Written to {options.save}: natten.load_profile({options.save!r}) or "
        f"{profile_file.VARIABLE}={options.save} applies it."
    )
    return found, name, config


def _profile(request: Request, output: _Output) -> int:
    problem, options = request.problem, request.options
    if request.backend in OTHERS:
        reason = subjects.unavailable(request.backend, problem)
        if reason is not None:
            raise RuntimeError(f"--backend {request.backend}: {reason}")
    else:
        dispatch.resolve(problem, request.config, request.backend)
    output.show(f"{report.title(problem)}, on {devices.driver_name(problem.device)}")
    tensors = subjects.make_tensors(problem)
    backend, config, found = request.backend, request.config, None
    if options.optimize:
        found, backend, config = _optimize(request, tensors, output)
    names = list(dict.fromkeys(options.baseline))
    with output.progress(len(names) + 2) as tell:
        tell("the device's limits")
        limits = measuring.limits(problem.device, problem.dtype)
        tell("the call")
        if backend in OTHERS:
            subject = subjects.measure_other(
                backend, problem, tensors, options.warmup_steps, limits, operations=True
            )
            if subject.failure is not None:
                raise RuntimeError(f"--backend {backend}: {subject.failure}")
        else:
            subject = subjects.measure_natten(
                problem, tensors, backend, config, options.warmup_steps, request.fmha_backend
            )
        baselines = []
        for name in names:
            tell(name)
            baselines.append(
                subjects.measure_other(name, problem, tensors, options.warmup_steps, limits)
            )
    dense_pairs = problem.num_queries * (problem.num_keys + problem.num_additional)
    if subjects.is_causal_dense(problem):
        dense_pairs = problem.num_queries * (problem.num_queries + 1) // 2
    result = Report(
        problem, config, devices.driver_name(problem.device), limits, subject, tuple(baselines),
        _flops(problem), _bytes(problem), dense_pairs / max(needed_pairs(problem), 1), found,
    )  # fmt: skip
    if subject.operations:
        output.show(report.operations_table(result))
    output.show(report.comparison_table(result), report.summary_table(result))
    output.write(result.as_dict(), report.report_csv(result))
    return 0


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Raises:
        ValueError, NotImplementedError, RuntimeError, MemoryError: With a text for whoever typed
            it.
    """
    request = request_of(options)
    output = _Output(options)
    return _dry_run(request, output) if options.dry_run else _profile(request, output)


__all__ = ["run"]
