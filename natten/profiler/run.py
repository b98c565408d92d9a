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
from typing import Any

import natten
from natten import devices, profile_file
from natten.devices import Device
from natten.functional import dispatch
from natten.functional.problem import Config, Problem
from natten.profiler import configurations, measuring, optimize, report, subjects
from natten.profiler.arguments import OTHERS, Request, request_of
from natten.profiler.report import Report
from natten.simulator import needed_pairs, traffic
from natten.tables import Table, console, show


def _check_target(name: str, path: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it shall hold."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{name} {path}: that is a folder")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {target.absolute().parent}")


class _Output:
    """Where tables, progress, notes, JSON and CSV go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        machine = "-" in (options.json, options.csv)
        if options.json == "-" and options.csv == "-":
            raise ValueError("--json and --csv cannot both go to standard output: name a file")
        for name in ("json", "csv"):
            target = getattr(options, name)
            if target not in (None, "-"):
                _check_target(f"--{name}", target)
        # Progress must not mix with what a script reads.
        self.console = console(stderr=machine)
        self.tables = not machine
        if self.console is None and self.tables:
            self.note("rich is not installed: plain tables, and no progress bars")

    def show(self, *things: Table | str) -> None:
        if self.tables:
            for thing in things:
                show(thing, self.console)

    def note(self, text: str) -> None:
        """What whoever typed the command should know, and a script should not read."""
        sys.stderr.write(f"note: {text}\n")

    def write(self, document: dict[str, Any], table: str) -> None:
        text = json.dumps(document, indent=1) + "\n"
        for target, content in ((self.options.json, text), (self.options.csv, table)):
            if target == "-":
                sys.stdout.write(content)
            elif target is not None:
                Path(target).write_text(content, encoding="utf-8")

    @contextmanager
    def progress(self, total: float) -> Iterator[Any]:
        if self.console is None:
            yield lambda text, completed=None: None
            return
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
    with subjects.flex_allowed(request.config.torch_compile):
        listings = configurations.list_all(
            problem, device, named is not None, request.backend, limit, request.config
        )
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
    _check_target("--save", path)
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
    return profile_file.Profile(name, capability, (), natten.__version__)


def _optimize(
    request: Request, tensors: subjects.Tensors, profile: profile_file.Profile, output: _Output
) -> tuple[optimize.Search, str, Config]:
    problem, options = request.problem, request.options
    with output.progress(1.0) as tell, profile_file.without_profile():
        found = optimize.search(
            problem, tensors, _facts(problem), backend=request.backend, base=request.config,
            warmup=options.optimize_warmup_steps, seconds=options.optimize_seconds, progress=tell,
        )  # fmt: skip
    best = found.best
    if best is None:
        if found.interrupted:
            raise KeyboardInterrupt("before anything was timed")
        failures = [trial.failure for trial in found.trials if trial.failure]
        raise RuntimeError("no configuration ran" + (f": {failures[0]}" if failures else ""))
    name, config, ms = best
    entry = profile_file.Entry(problem, name, config, ms)
    profile_file.save_profile(options.save, profile_file.merged(profile, [entry]))
    output.show(report.search_table(found))
    output.show(
        f"Written to {options.save}: natten.load_profile({options.save!r}) or "
        f"{profile_file.VARIABLE}={options.save} applies it."
    )
    return found, name, config


def _check_settings(request: Request, output: _Output) -> None:
    """Say which of the options have no effect for this call."""
    problem, config = request.problem, request.config
    if request.fmha_backend and not (problem.num_additional or problem.is_dense):
        output.note(
            "--fmha-backend has no effect: it is for --add-kv and windows of the whole input"
        )
    backend = dispatch.resolve(problem, config, request.backend)
    for passes, tile, listed in (
        ("", config.q_tile_shape, backend.configs),
        ("backward-", config.backward_q_tile_shape, backend.backward_configs),
    ):
        if tile is not None and not listed(problem):
            output.note(
                f"--{passes}q-tile and --{passes}kv-tile have no effect: {backend.name}-fna "
                "has none to choose"
            )
    if config.kernel_schedule is not None and backend.name != "hopper":
        output.note(f"--schedule has no effect: {backend.name}-fna has one only")
    if not config.run_persistent_kernel and backend.name != "blackwell":
        output.note(f"--persistent has no effect: {backend.name}-fna has one scheduler only")
    if config.torch_compile and backend.name != "flex":
        output.note(f"--compile has no effect: {backend.name}-fna is compiled always or never")


def _profile(request: Request, output: _Output) -> int:
    with subjects.flex_allowed(request.config.torch_compile):
        return _measured(request, output)


def _measured(request: Request, output: _Output) -> int:
    problem, options = request.problem, request.options
    if request.backend in OTHERS:
        reason = subjects.unavailable(request.backend, problem)
        if reason is not None:
            raise RuntimeError(f"--backend {request.backend}: {reason}")
    else:
        _check_settings(request, output)
    profile = _existing(options.save, problem) if options.optimize else None
    tensors = subjects.make_tensors(problem)
    output.show(f"{report.title(problem)}, on {devices.driver_name(problem.device)}")
    backend, config, found = request.backend, request.config, None
    if profile is not None:
        found, backend, config = _optimize(request, tensors, profile, output)
    names = list(dict.fromkeys(options.baseline))
    with output.progress(len(names) + 2) as tell:
        tell("the device's limits")
        limits = measuring.limits(problem.device, problem.dtype)
        tell("the call")
        if backend in OTHERS:
            subject = subjects.measure_other(
                backend, problem, tensors, options.warmup_steps, operations=True
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
            baselines.append(subjects.measure_other(name, problem, tensors, options.warmup_steps))
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
