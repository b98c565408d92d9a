"""Fits the constants of the simulator's cost model to measured times.

    python benchmarks/fit_costs.py [RESULTS]     # prints them, and how well they predict
    python benchmarks/fit_costs.py --write       # also puts them into natten/simulator.py

RESULTS is what `benchmarks/gpu.py --output` writes on a Hopper GPU; by default results/h200.json.
The random problems in realistic.json beside it are cases, too. Run it when kernels or their choice
of tiles have changed, then `benchmarks/predictions.py`. No GPU is needed: tiles are counted here,
and times are read.

All constants of each kind of kernel but one are fitted, none of them negative, no efficiency above
one, by the least sum of logarithms of ratios, squared where they are small. The last, `launch`, is
what a launch costs the GPU; it stays, because short cases would tell of the host instead. So many
numbers may describe the cases instead of the kernels. Hence the column "left out": the prediction
of a case by constants that were fitted without it and its relatives (the same case in another
dtype; dense attention of other lengths; a tenth of the random problems). `--write` refuses
constants whose left-out predictions are much worse than those of the fit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from predictions import HERE, LEAST_MS, WAYS, drawn, host_bound, is_near, rows
from scipy.optimize import least_squares

from natten import simulator
from natten.simulator import Pass

SOURCE = HERE.parent / "natten" / "simulator.py"
# Of the cases that the fit predicts within 15 %, so many at least have to be when left out.
LEAST_SHARE = 0.75
# Where the search begins if a cost is zero at present, all but the last in the order of the model.
FALLBACK = np.array([1.6, 0.1, 5.0, 5e-8, 1e-6, 0.5, 0.5, 1e-6])
# Logarithms of ratios that count as small.
SMALL = 0.1


@dataclass(frozen=True)
class Case:
    """One measured pass: what it is called, whose relative it is, its kernels, its seconds."""

    name: str
    family: str
    kernels: tuple[Pass, ...]
    seconds: float


def cases_of(path: Path) -> dict[str, list[Case]]:
    """The cases that the host does not limit, by the constants that predict them: "forward",
    "ping_pong" (the forward kernel of two groups of warps that take turns), "backward" and "fused"
    (all gradients in one pass); "forward_float32" and "backward_float32"."""
    results = json.loads(path.read_text())["cases"]
    kinds = ("forward", "forward_float32", "ping_pong", "backward", "backward_float32", "fused")
    found: dict[str, list[Case]] = {kind: [] for kind in kinds}
    measured = [(*row, host_bound(row[-1], results)) for row in rows(path)]
    random = path.with_name("realistic.json")
    if random.exists():
        for row in drawn(random):
            is_short = tuple([row[-1][f"{key}_ms"] < LEAST_MS for key, _ in WAYS])
            measured.append((*row, is_short))
    for name, dtype, simulation, result, by_host in measured:
        family = re.sub(r"^(dense|causal) \d+", r"\1", name)
        family = re.sub(r"^\d*(\d):.*", r"random \1", family)
        kernels = ((simulation.forward,), simulation.backward)
        for (key, kind), own, special, bound in zip(WAYS, kernels, ("ping_pong", "fused"), by_host):
            if bound or result.get(f"{key}_ms") is None:
                continue
            if dtype == "float32":
                kind = f"{kind}_float32"
            if own[0].warp_specialized:
                kind = special
            found[kind].append(Case(f"{name}, {dtype}", family, own, result[f"{key}_ms"] / 1e3))
    return found


def seconds_of(case: Case, costs: np.ndarray) -> float:
    """The prediction by costs, the first of which is one over the efficiency."""
    return sum(
        max(float(np.dot(costs[:-1], kernel.terms)), kernel.memory_ms / 1e3) + costs[-1]
        for kernel in case.kernels
    )


def fit(cases: list[Case], start: np.ndarray) -> np.ndarray:
    """The costs, none negative, with the least sum of logarithms of ratios."""

    def errors(scales: np.ndarray) -> np.ndarray:
        costs = np.append(scales * unit, start[-1])
        return np.log([seconds_of(case, costs) / case.seconds for case in cases])

    # In units of the present costs, so that all of them are about one; one that is zero may grow.
    unit = np.where(start[:-1] > 0, start[:-1], FALLBACK)
    # Products take no less than the peak allows.
    least = np.append(1.0, np.zeros(len(unit) - 1)) / unit
    found = least_squares(
        errors, np.maximum(1.0, least), bounds=(least, np.inf), loss="soft_l1", f_scale=SMALL
    )
    return np.append(found.x * unit, start[-1])


def as_vector(costs: simulator._Costs) -> np.ndarray:
    return np.array([1 / costs.efficiency, *costs[1:]])


def line_of(name: str, costs: np.ndarray) -> str:
    """The line of the simulator's source."""
    kept = np.where(costs[:-1] > 1e-3 * FALLBACK, costs[:-1], 0.0)
    values = [1 / costs[0], *kept[1:], costs[-1]]
    return f"{name} = _Costs({', '.join(f'{value:.3g}' for value in values)})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="?", type=Path, default=HERE / "results" / "h200.json", metavar="RESULTS"
    )
    parser.add_argument("--write", action="store_true", help="change natten/simulator.py")
    options = parser.parse_args()
    if not options.results.is_file():
        parser.error(f"{options.results}: no such file")
    source = SOURCE.read_text()
    accepted = True
    for kind, cases in cases_of(options.results).items():
        name = f"_{kind.upper()}_COSTS"
        present = as_vector(getattr(simulator, name))
        if len(cases) < 2 * len(present):
            print(f"{kind}: {len(cases)} cases are too few to fit, {name} stays\n")
            continue
        fitted = fit(cases, present)
        if fitted[0] <= 0:
            parser.error(f"{kind}: no time is left for matrix products; these are no usable times")
        without = {
            family: fit([c for c in cases if c.family != family], present)
            for family in {c.family for c in cases}
        }
        print(f"| {kind} | measured ms | present | fitted | left out |\n|-|-:|-:|-:|-:|")
        ratios = []
        for case in cases:
            ratios.append(
                [
                    seconds_of(case, c) / case.seconds
                    for c in (present, fitted, without[case.family])
                ]
            )
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios[-1])
            print(f"| {case.name} | {case.seconds * 1e3:.3f} | {cells} |")
        counts = [sum(map(is_near, column)) for column in zip(*ratios)]
        typical = [float(np.median([abs(r - 1) for r in column])) for column in zip(*ratios)]
        worst = [max(max(r, 1 / r) for r in column) - 1 for column in zip(*ratios)]
        print(f"\n{kind}, of {len(cases)}:")
        for label, count, middle, most in zip(
            ("present", "fitted", "left out"), counts, typical, worst
        ):
            print(
                f"  {label:8}  {count} within 15 %, typical error {middle:.1%}, largest {most:.0%}"
            )
        good = counts[2] >= LEAST_SHARE * counts[1]
        accepted = accepted and good
        print(
            f"  {line_of(name, fitted)}{'' if good else '  # REFUSED: describes the cases only'}\n"
        )
        if not good:
            continue
        source, changed = re.subn(
            rf"^{name} = _Costs\(.*\)$", line_of(name, fitted), source, flags=re.MULTILINE
        )
        if changed != 1:
            raise RuntimeError(f"{SOURCE} has no single line that begins with {name}")
    if options.write:
        SOURCE.write_text(source)
        print(f"written to {SOURCE}{'' if accepted else ', but for what was refused'}")
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
