"""The simulator's predictions beside measured times: python benchmarks/predictions.py [RESULTS]

RESULTS is what `benchmarks/gpu.py --output` writes; by default results/h200.json. Of the random
problems in realistic.json beside it, it is counted how many predictions are near.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import natten
from natten import devices
from natten.simulator import Simulation

HERE = Path(__file__).parent
# Names of passes in results, and in those of random problems.
WAYS = (("fwd", "forward"), ("bwd", "backward"))
# Random problems of less time are those of launches.
LEAST_MS = 0.05


def simulated(case: dict[str, Any], dtype: torch.dtype, device: str = "h100") -> Simulation:
    """A case of the peers' table."""
    return natten.simulate(
        case["shape"], case["kernel_size"], case["stride"], case["dilation"], case["is_causal"],
        batch=case["batch"], heads=case["heads"], heads_kv=case.get("heads_kv"),
        head_dim=case["head_dim"], head_dim_v=case.get("head_dim_v"),
        additional=case.get("additional_kv", 0), dtype=dtype, device=device,
    )  # fmt: skip


def drawn(path: Path) -> list[tuple[str, str, Simulation, dict[str, Any]]]:
    """The same of the problems that `realistic.py` drew, in milliseconds."""
    found = []
    for result in json.loads(path.read_text()):
        if "backward" in result:
            dtype = result["dtype"].removeprefix("torch.")
            device = devices.find(result.get("device", "h100")).name
            simulation = simulated(result, getattr(torch, dtype), device)
            times = {f"{key}_ms": 1e3 * result[way] for key, way in WAYS}
            found.append((result["name"], dtype, simulation, {**result, **times}))
    return found


def rows(path: Path) -> list[tuple[str, str, Simulation, dict[str, Any]]]:
    """Name, dtype, simulation and measurement of each case and each dense one."""
    results = json.loads(path.read_text())
    cases = {c["name"]: c for c in json.loads((HERE / "peers" / "h100.json").read_text())["cases"]}
    device = devices.find(results["device"]).name
    found = []
    for result in results["cases"]:
        if "fwd_ms" in result and result["case"] in cases:
            name = result["dtype"].removeprefix("torch.")
            simulation = simulated(cases[result["case"]], getattr(torch, name), device)
            found.append((result["case"], name, simulation, result))
    for result in results.get("dense", []):
        if "fwd_ms" in result:
            length = result["length"]
            simulation = natten.simulate(
                (length,), length, is_causal=result["causal"], heads=result["heads"],
                head_dim=result["head_dim"], device=device,
            )  # fmt: skip
            kind = "causal" if result["causal"] else "dense"
            name = f"{kind} {length}, head_dim {result['head_dim']}"
            found.append((name, "bfloat16", simulation, result))
    return found


def host_bound(result: dict[str, Any], results: list[dict[str, Any]]) -> tuple[bool, bool]:
    """Whether forward and backward times are about those that the host needs for a call.

    Host times are measured. In results that lack those of the backward pass, the smallest case
    stands for all: its kernels take a hundredth of a millisecond.
    """
    if "host_us" not in result:
        return False, False
    forward = result["fwd_ms"] < 1.35e-3 * result["host_us"]
    if "bwd_host_us" in result:
        return forward, result["bwd_ms"] < 1.35e-3 * result["bwd_host_us"]
    floor = min(r["bwd_ms"] for r in results if r.get("case") == "small_b1" and "bwd_ms" in r)
    return forward, result["bwd_ms"] < 1.6 * floor


def is_near(ratio: float, most: float = 1.15) -> bool:
    """Whether a prediction is within 15 % of the measured time."""
    return 1 / most <= ratio <= most


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "h200.json"
    if not path.exists():
        print(f"{path}: no such file", file=sys.stderr)
        return 2
    print("| case | dtype | forward ms | predicted | ratio | backward ms | predicted | ratio |")
    print("|-|-|-:|-:|-:|-:|-:|-:|")
    near: dict[str, list[bool]] = {"forward": [], "backward": []}
    results = json.loads(path.read_text())["cases"]
    for name, dtype, found, result in rows(path):
        cells = []
        for (key, kind), by_host in zip(WAYS, host_bound(result, results)):
            measured, predicted = result.get(f"{key}_ms"), getattr(found, f"{kind}_ms")
            if measured is None:
                cells.append(" | | ")
                continue
            ratio = predicted / measured
            cells.append(
                f"{measured:.3f} | {predicted:.3f} | {'host' if by_host else f'{ratio:.2f}'}"
            )
            if not by_host:
                near[kind].append(is_near(ratio))
        print(f"| {name} | {dtype} | {cells[0]} | {cells[1]} |")
    for kind, within in near.items():
        print(f"{kind}: {sum(within)} of {len(within)} within 15 %")
    random = path.with_name("realistic.json")
    if random.exists():
        problems = drawn(random)
        for key, kind in WAYS:
            ratios = [
                getattr(found, f"{kind}_ms") / result[f"{key}_ms"]
                for _, _, found, result in problems
                if result[f"{key}_ms"] > LEAST_MS
            ]
            print(
                f"{kind} of random problems: {sum(map(is_near, ratios))} of {len(ratios)} within "
                f"15 %, {sum(is_near(ratio, 1.3) for ratio in ratios)} within 30 %"
            )
    print("host: the time is about what the host needs to launch the call, and is not predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
