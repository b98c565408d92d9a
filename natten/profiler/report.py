"""What the profiler prints and writes: tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from natten.functional.problem import Config, Problem
from natten.profiler.configurations import Configuration, Listing
from natten.profiler.measuring import Limits, Measurement
from natten.profiler.optimize import Search, describe
from natten.tables import Table

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What was measured of a call.

    Attributes:
        problem: The call.
        config: Its knobs.
        device: What the driver calls the device.
        limits: What the device reaches.
        subject: What was profiled, with its operations.
        baselines: What it is compared with.
        needed_flops: Operations that cannot be avoided, forward and as far as asked backward.
        needed_bytes: Bytes that must be read and written.
        ideal_speedup: Over dense attention, by operations.
        search: What --optimize tried; None without.
    """

    problem: Problem
    config: Config
    device: str
    limits: Limits
    subject: Measurement
    baselines: tuple[Measurement, ...]
    needed_flops: int
    needed_bytes: int
    ideal_speedup: float
    search: Search | None = None

    @property
    def tflops(self) -> float:
        """Needed operations a second."""
        return self.needed_flops / self.subject.total_ms / 1e9

    @property
    def bandwidth(self) -> float:
        """Needed GB a second."""
        return self.needed_bytes / self.subject.total_ms / 1e6

    @property
    def dense(self) -> Measurement | None:
        """The fastest dense attention that was measured."""
        found = [b for b in self.baselines if b.failure is None and b.name.startswith("dense")]
        return min(found, key=lambda b: b.total_ms, default=None)

    @property
    def speedup(self) -> float | None:
        """Speed over the fastest dense attention that was measured."""
        return None if self.dense is None else self.dense.total_ms / self.subject.total_ms

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists only, for JSON."""
        p = self.problem
        best = None if self.search is None else self.search.best
        return {
            "problem": {
                "shape": list(p.query_shape), "batch": p.batch, "heads": p.heads,
                "heads_kv": p.heads_kv, "head_dim": p.head_dim, "head_dim_v": p.head_dim_v,
                "kernel_size": list(p.kernel_size), "stride": list(p.stride),
                "dilation": list(p.dilation), "is_causal": list(p.is_causal),
                "is_circular": list(p.is_circular or (False,) * p.rank),
                "upsampling": list(p.upsampling or (1,) * p.rank),
                "additional": p.num_additional, "backprop": p.requires_grad,
                "dtype": str(p.dtype).removeprefix("torch."),
            },
            "device": self.device,
            "torch": torch.__version__,
            "settings": describe(self.config),
            "limits": asdict(self.limits),
            "subject": {**asdict(self.subject), "total_ms": self.subject.total_ms},
            "baselines": [
                {k: v for k, v in asdict(b).items() if k != "operations"} for b in self.baselines
            ],
            "tflops": self.tflops,
            "gb_per_s": self.bandwidth,
            "speedup_over_dense": self.speedup,
            "ideal_speedup": self.ideal_speedup,
            "optimized": None if self.search is None else {
                "backend": best and best[0],
                "config": best and {k: v for k, v in asdict(best[1]).items() if v is not None},
                "ms": best and best[2],
                "seconds": self.search.seconds,
                "interrupted": self.search.interrupted,
                "trials": len(self.search.trials),
            },
        }  # fmt: skip


def _shape(values: Iterable[Any] | None) -> str:
    return "" if values is None else "x".join(map(str, values))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def title(problem: Problem) -> str:
    """A line about a problem."""
    p = problem
    parts = [f"{_shape(p.query_shape)} tokens, window {_shape(p.kernel_size)}"]
    for name, values in (("stride", p.stride), ("dilation", p.dilation)):
        if any(v != 1 for v in values):
            parts.append(f"{name} {_shape(values)}")
    if any(p.is_causal):
        parts.append("causal " + _shape(int(c) for c in p.is_causal))
    if any(p.is_circular):
        parts.append("circular " + _shape(int(c) for c in p.is_circular))
    if p.upsampling:
        parts.append(f"upsampling {_shape(p.upsampling)}")
    heads = str(p.heads) if p.heads == p.heads_kv else f"{p.heads}/{p.heads_kv}"
    dims = str(p.head_dim) if p.head_dim == p.head_dim_v else f"{p.head_dim}/{p.head_dim_v}"
    parts += [f"batch {p.batch}", f"heads {heads}", f"head_dim {dims}"]
    if p.num_additional:
        parts.append(f"{p.num_additional} additional keys")
    parts.append(str(p.dtype).removeprefix("torch."))
    return ", ".join(parts)


def operations_table(report: Report) -> Table:
    """Where the time goes: shares alone, since torch's profiler slows what it records."""
    table = Table("operations of one call", ("operation", "kind", "called", "calls", "share"), 3)
    operations = report.subject.operations
    total = sum(o.ms for o in operations)
    for o in operations:
        table.add(o.name, o.kind, o.kernels, f"{o.calls:.3g}", f"{o.ms / total:.0%}")
    return table


def comparison_table(report: Report) -> Table:
    """The subject beside its baselines."""
    backward = report.problem.requires_grad
    columns = ["", "forward ms", *(["backward ms", "total ms"] if backward else []), "peak MiB"]
    table = Table("beside others", [*columns, "times natten's"], 1)
    failures = []
    for m in (report.subject, *report.baselines):
        if m.failure is not None:
            failures.append(f"{m.name}: {m.failure}")
            continue
        times = [_ms(m.forward_ms)]
        if backward:
            times += [_ms(m.backward_ms), _ms(m.total_ms)]
        over = "" if m is report.subject else f"{m.total_ms / report.subject.total_ms:.2f}"
        table.add(m.name, *times, _mib(m.peak_bytes), over)
    if report.dense is not None:
        failures.append(
            f"By needed operations, dense attention is {report.ideal_speedup:.3g} times the work."
        )
    table.caption = "\n".join(failures)
    return table


def summary_table(report: Report) -> Table:
    """What was reached, and what there is to reach."""
    table = Table("reached", ("", "reached", "limit", "share"), 1)
    limits = report.limits
    table.add(
        "TFLOP/s (needed operations; a large matrix product)",
        f"{report.tflops:.3g}", f"{limits.tflops:.3g}", f"{report.tflops / limits.tflops:.0%}",
    )  # fmt: skip
    table.add(
        "GB/s (needed bytes; a large copy)",
        f"{report.bandwidth:.3g}", f"{limits.bandwidth:.3g}",
        f"{report.bandwidth / limits.bandwidth:.0%}",
    )  # fmt: skip
    return table


def _configurations(table: Table, name: str, found: Sequence[Configuration]) -> None:
    for n, c in enumerate(found):
        table.add(
            f"{name}{', default' if n == 0 else ''}", _shape(c.q_tile_shape),
            _shape(c.kv_tile_shape), c.kernel_schedule or "",
            "" if c.waste is None else f"{c.waste:.2f}", _ms(c.ms),
        )  # fmt: skip


def listing_tables(listings: Sequence[Listing]) -> list[Table | str]:
    """What every backend accepts."""
    shown: list[Table | str] = []
    for listing in listings:
        public = f"{listing.backend}-fna"
        if listing.reason is not None:
            shown.append(f"{public}: {listing.reason}")
        elif not listing.forward and not listing.backward:
            shown.append(f"{public}: runs it, and has no tiles to choose")
        else:
            table = Table(
                public, ("pass", "q tile", "kv tile", "schedule", "waste", "ms, predicted"), 4
            )
            _configurations(table, "forward", listing.forward)
            table.add_section()
            _configurations(table, "backward", listing.backward)
            shown.append(table)
    return shown


def search_table(found: Search) -> Table:
    """The best settings of each backend."""
    table = Table("fastest settings", ("backend", "pass", "settings", "ms"), 3)
    for name, trials in (("forward", found.forward), ("backward", found.backward)):
        for trial in sorted(trials.values(), key=lambda t: t.ms or 0.0):
            table.add(f"{trial.backend}-fna", name, describe(trial.config), _ms(trial.ms))
    table.caption = (
        f"{len(found.trials)} configurations in {found.seconds:.0f} s"
        f"{', interrupted' if found.interrupted else ''}"
        + "".join(f"; {n} failed" for n in [sum(t.ms is None for t in found.trials)] if n)
    )
    return table


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def report_csv(report: Report) -> str:
    """One line for the subject and each baseline, then one for each operation."""
    rows: list[Sequence[Any]] = []
    for kind, m in (("subject", report.subject), *(("baseline", b) for b in report.baselines)):
        rows.append(
            (kind, m.name, m.forward_ms, m.backward_ms, m.total_ms, m.peak_bytes, m.failure or "")
            if m.failure is None
            else (kind, m.name, "", "", "", "", m.failure)
        )
    rows += [("operation", o.name, "", "", o.ms, "", "") for o in report.subject.operations]
    columns = ("kind", "name", "forward_ms", "backward_ms", "total_ms", "peak_bytes", "failure")
    return _csv(columns, rows)


def listings_csv(listings: Sequence[Listing]) -> str:
    """One line for each configuration."""
    rows: list[Sequence[Any]] = []
    for listing in listings:
        if listing.reason is not None:
            rows.append((listing.backend, "", "", "", "", "", "", listing.reason))
        for name, found in (("forward", listing.forward), ("backward", listing.backward)):
            rows += [
                (
                    listing.backend, name, _shape(c.q_tile_shape), _shape(c.kv_tile_shape),
                    c.kernel_schedule or "", c.waste, c.ms, "",
                )
                for c in found
            ]  # fmt: skip
    columns = (
        "backend", "pass", "q_tile", "kv_tile", "schedule", "waste", "predicted_ms", "reason",
    )  # fmt: skip
    return _csv(columns, rows)


__all__ = [
    "Report",
    "comparison_table",
    "listing_tables",
    "listings_csv",
    "operations_table",
    "report_csv",
    "search_table",
    "summary_table",
    "title",
]
