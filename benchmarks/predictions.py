"""The simulator's predictions beside measured times: python benchmarks/predictions.py [RESULTS]

RESULTS is what `benchmarks/gpu.py --output` writes; by default results/h100.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import natten
from natten.simulator import Simulation

HERE = Path(__file__).parent


def simulated(case: dict[str, Any], dtype: torch.dtype, device: str = "h100") -> Simulation:
    """A case of the peers' table."""
    return natten.simulate(
        case["shape"], case["kernel_size"], case["stride"], case["dilation"], case["is_causal"],
        batch=case["batch"], heads=case["heads"], heads_kv=case.get("heads_kv"),
        head_dim=case["head_dim"], head_dim_v=case.get("head_dim_v"),
        additional=case.get("additional_kv", 0), dtype=dtype, device=device,
    )  # fmt: skip


def rows(path: Path) -> list[tuple[str, str, Simulation, dict[str, Any]]]:
    """Name, dtype, simulation and measurement of each case and each dense one."""
    results = json.loads(path.read_text())
    cases = {c["name"]: c for c in json.loads((HERE / "peers" / "h100.json").read_text())["cases"]}
    found = []
    for result in results["cases"]:
        if "fwd_ms" in result and result["case"] in cases:
            name = result["dtype"].removeprefix("torch.")
            simulation = simulated(cases[result["case"]], getattr(torch, name))
            found.append((result["case"], name, simulation, result))
    for result in results.get("dense", []):
        if "fwd_ms" in result:
            length = result["length"]
            simulation = natten.simulate(
                (length,), length, is_causal=result["causal"], heads=result["heads"],
                head_dim=result["head_dim"],
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


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "h100.json"
    if not path.exists():
        print(f"{path}: no such file", file=sys.stderr)
        return 2
    print("| case | dtype | forward ms | predicted | ratio | backward ms | predicted | ratio |")
    print("|-|-|-:|-:|-:|-:|-:|-:|")
    near: dict[str, list[bool]] = {"forward": [], "backward": []}
    results = json.loads(path.read_text())["cases"]
    for name, dtype, found, result in rows(path):
        cells = []
        for kind, measured, predicted, by_host in zip(
            near,
            (result["fwd_ms"], result.get("bwd_ms")),
            (found.forward_ms, found.backward_ms),
            host_bound(result, results),
        ):
            if measured is None:
                cells.append(" | | ")
                continue
            ratio = predicted / measured
            cells.append(
                f"{measured:.3f} | {predicted:.3f} | {'host' if by_host else f'{ratio:.2f}'}"
            )
            if not by_host:
                near[kind].append(1 / 1.15 <= ratio <= 1.15)
        print(f"| {name} | {dtype} | {cells[0]} | {cells[1]} |")
    for kind, within in near.items():
        print(f"{kind}: {sum(within)} of {len(within)} within 15 %")
    print("host: the time is about what the host needs to launch the call, and is not predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
