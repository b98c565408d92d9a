"""Speed of the GPU backends beside what their peers reached on the same kind of GPU.

    python benchmarks/gpu.py                      # all cases, forward and backward
    python benchmarks/gpu.py --cases flux_w80 nat_t_s1 --no-dense
    python benchmarks/gpu.py --output results.json --markdown results.md

Every case is first compared with the float64 reference on parts of the grid; a case that fails is
reported and not timed. Times are medians of `triton.testing.do_bench`, of eager calls of the
public functions with default tiles, as in `peers/h100.json`, which says how the peers were timed;
and of CUDA graphs of the same calls, which leave the host out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from semantics import graphed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten.functional import neighborhood_attention_generic
from natten.window import Axis, inverse_bounds

PEERS = Path(__file__).parent / "peers" / "h100.json"
# Relative to the largest value: bfloat16 inputs and weights, float32 sums.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}


def median_ms(function: Callable[[], Any], rep: int = 200) -> float:
    """Milliseconds of one call."""
    return triton.testing.do_bench(function, warmup=50, rep=rep, return_mode="median")


def per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * rank


class Problem:
    """One case of the peers' table, with its tensors."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        self.name, self.dtype = case["name"], dtype
        self.tokens = tuple(case["shape"])
        rank = len(self.tokens)
        self.window = {
            "kernel_size": per_axis(case["kernel_size"], rank),
            "stride": per_axis(case["stride"], rank),
            "dilation": per_axis(case["dilation"], rank),
            "is_causal": per_axis(case["is_causal"], rank),
        }
        batch, heads, features = case["batch"], case["heads"], case["head_dim"]
        heads_kv = case.get("heads_kv", heads)
        value_features = case.get("head_dim_v", features)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

        self.query = randn(batch, *self.tokens, heads, features)
        self.key = randn(batch, *self.tokens, heads_kv, features)
        self.value = randn(batch, *self.tokens, heads_kv, value_features)
        self.grad_out = torch.randn(
            (batch, *self.tokens, heads, value_features), device="cuda", dtype=dtype
        )
        self.context: dict[str, Tensor] = {}
        if case.get("additional_kv"):
            count = case["additional_kv"]
            self.context = {
                "additional_keys": randn(batch, count, heads_kv, features),
                "additional_values": randn(batch, count, heads_kv, value_features),
            }

    def forward(self, **knobs: Any) -> Tensor:
        return neighborhood_attention_generic(
            self.query, self.key, self.value, **self.window, **self.context, **knobs
        )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, *self.context.values())

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grad_out, retain_graph=True)

    def check(self) -> float:
        """Largest error against float64 on boxes of the grid, relative to the largest value."""
        out = self.forward()
        gradients = self.backward(out)
        rank = len(self.tokens)
        edge = {1: 64, 2: 6, 3: 3}[rank]
        extent = tuple(min(n, edge) for n in self.tokens)
        worst = 0.0
        for origin in ((0,) * rank, tuple((n - e) // 2 for n, e in zip(self.tokens, extent))):
            box = _slices(origin, extent)
            exact, exact_gradient = self._reference(origin, extent)
            worst = max(worst, _error(out[:1][box][..., :1, :], exact))
            worst = max(worst, _error(gradients[0][:1][box][..., :1, :], exact_gradient[0]))
        # Keys in the corner: all queries that see them, and no others, decide their gradients.
        axes = [Axis(*axis) for axis in zip(self.tokens, *self.window.values())]
        small = tuple(min(n, 2 if rank == 3 else 4) for n in self.tokens)
        stop = []
        for axis, size in zip(axes, small):
            last = inverse_bounds(torch.arange(size), *axis)[1] * axis.dilation
            stop.append(min(axis.length, int(last.max())))
        if self.query.shape[-2] == self.key.shape[-2]:
            exact_gradient = self._reference((0,) * rank, tuple(stop))[1]
            box = _slices((0,) * rank, small)
            for got, exact in zip(gradients[1:3], exact_gradient[1:3]):
                worst = max(worst, _error(got[:1][box][..., :1, :], exact[box]))
        return worst

    def _reference(
        self, origin: tuple[int, ...], extent: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients of one box of queries, first batch entry and head, in float64."""
        box = _slices(origin, extent)

        def first(tensor: Tensor) -> Tensor:
            return tensor.detach()[:1, ..., :1, :].double()

        query = first(self.query)[box].requires_grad_()
        key, value = first(self.key).requires_grad_(), first(self.value).requires_grad_()
        out = neighborhood_attention_generic(
            query, key, value, **self.window,
            **{name: first(t) for name, t in self.context.items()},
            scale=self.query.shape[-1] ** -0.5,
            grid=self.tokens, query_origin=origin, backend="reference",
        )  # fmt: skip
        grad_out = self.grad_out[:1][box][..., :1, :].double()
        return out.detach(), torch.autograd.grad(out, (query, key, value), grad_out)


def _slices(origin: tuple[int, ...], extent: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), *(slice(o, o + e) for o, e in zip(origin, extent)))


def _error(got: Tensor, exact: Tensor) -> float:
    error = (got.double() - exact).abs().max() / exact.abs().max()
    return float(error) if math.isfinite(float(error)) else math.inf


def host_microseconds(function: Callable[[], Any], calls: int = 200) -> float:
    """Median time that a call keeps the host, without waiting for the GPU."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return sorted(times)[calls // 2] * 1e6


def best(peers: dict[str, Any], key: str) -> tuple[float, str]:
    """The least value of ``key`` among the peers, and whose it is."""
    found = [(entry[key], name) for name, entry in peers.items() if key in entry]
    return min(found) if found else (math.nan, "")


def run_case(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    peers = case["peers"][str(dtype).removeprefix("torch.")]
    torch.cuda.empty_cache()
    problem = Problem(case, dtype)
    result: dict[str, Any] = {"case": case["name"], "dtype": str(dtype), "error": problem.check()}
    if not result["error"] <= TOLERANCE[dtype]:
        return result
    slow = math.prod(problem.tokens) > 60000
    with torch.no_grad():
        result["fwd_ms"] = median_ms(problem.forward)
        result["fwd_graph_ms"] = median_ms(graphed(problem.forward), 100)
        if not slow:
            result["host_us"] = host_microseconds(problem.forward)
    out = problem.forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    problem.backward(out)
    torch.cuda.synchronize()
    result["bwd_peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    result["bwd_ms"] = median_ms(lambda: problem.backward(out))
    result["bwd_graph_ms"] = median_ms(graphed(lambda: problem.backward(out)), 100)
    if not slow:
        result["bwd_host_us"] = host_microseconds(lambda: problem.backward(out))
    for key in ("fwd_ms", "bwd_ms", "bwd_peak_mb"):
        result[f"peer_{key}"], result[f"peer_{key}_of"] = best(peers, key)
    return result


def run_dense(length: int, heads: int, features: int, causal: bool) -> dict[str, Any]:
    """natten.attention beside cuDNN through torch's scaled_dot_product_attention."""
    shape = (1, length, heads, features)
    query, key, value = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    grad_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def ours() -> Tensor:
        return natten.attention(query, key, value, is_causal=causal)

    heads_first = [t.transpose(1, 2) for t in (query, key, value)]

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*heads_first, is_causal=causal)

    out, other = ours(), cudnn()
    error = _error(out.detach(), other.detach().transpose(1, 2).double())
    result: dict[str, Any] = {
        "length": length, "heads": heads, "head_dim": features, "causal": causal, "error": error,
    }  # fmt: skip
    if not error <= TOLERANCE[torch.bfloat16]:
        return result
    inputs = (query, key, value)
    grad_other = grad_out.transpose(1, 2)
    with torch.no_grad():
        result["fwd_ms"], result["cudnn_fwd_ms"] = median_ms(ours, 100), median_ms(cudnn, 100)
    result["bwd_ms"] = median_ms(
        lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True), 100
    )
    result["cudnn_bwd_ms"] = median_ms(
        lambda: torch.autograd.grad(other, inputs, grad_other, retain_graph=True), 100
    )
    return result


def geometric_mean(values: list[float]) -> float:
    values = [v for v in values if math.isfinite(v)]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def case_table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | dtype | forward ms | graph | peer's best | ratio "
        "| backward ms | graph | peer's best | ratio "
        "| backward MB | peer's least | host µs | error |",
        "|-|-|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for r in results:
        if "fwd_ms" not in r:
            lines.append(f"| {r['case']} | {r['dtype'][6:]} | failed: error {r['error']:.2g} |")
            continue
        host = f"{r['host_us']:.0f}" if "host_us" in r else ""
        lines.append(
            f"| {r['case']} | {r['dtype'][6:]} | {r['fwd_ms']:.3f} | {r['fwd_graph_ms']:.3f} "
            f"| {r['peer_fwd_ms']:.3f} | {r['peer_fwd_ms'] / r['fwd_ms']:.2f} "
            f"| {r['bwd_ms']:.3f} | {r['bwd_graph_ms']:.3f} | {r['peer_bwd_ms']:.3f} "
            f"| {r['peer_bwd_ms'] / r['bwd_ms']:.2f} | {r['bwd_peak_mb']:.0f} "
            f"| {r['peer_bwd_peak_mb']:.0f} | {host} | {r['error']:.1e} |"
        )
    timed = [r for r in results if "fwd_ms" in r and r["dtype"] == "torch.bfloat16"]
    forward = geometric_mean([r["peer_fwd_ms"] / r["fwd_ms"] for r in timed])
    backward = geometric_mean([r["peer_bwd_ms"] / r["bwd_ms"] for r in timed])
    lines += ["", f"Geometric mean in bfloat16: forward {forward:.2f}, backward {backward:.2f}."]
    return lines


def dense_table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens | heads | head_dim | causal | forward ms | TFLOP/s | of cuDNN "
        "| backward ms | TFLOP/s | of cuDNN |",
        "|-:|-:|-:|-|-:|-:|-:|-:|-:|-:|",
    ]
    for r in results:
        if "fwd_ms" not in r:
            lines.append(f"| {r['length']} | failed: error {r['error']:.2g} |")
            continue
        flop = 4 * r["length"] ** 2 * r["heads"] * r["head_dim"] / (2 if r["causal"] else 1)
        lines.append(
            f"| {r['length']} | {r['heads']} | {r['head_dim']} | {'yes' if r['causal'] else 'no'} "
            f"| {r['fwd_ms']:.3f} | {flop / r['fwd_ms'] / 1e9:.0f} "
            f"| {r['cudnn_fwd_ms'] / r['fwd_ms']:.2f} | {r['bwd_ms']:.3f} "
            f"| {2.5 * flop / r['bwd_ms'] / 1e9:.0f} | {r['cudnn_bwd_ms'] / r['bwd_ms']:.2f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", help="names of cases; default all")
    parser.add_argument("--quick", action="store_true", help="bfloat16 only")
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 16384, 65536])
    parser.add_argument("--no-dense", action="store_true", help="skip dense attention")
    parser.add_argument("--output", type=Path, help="write all numbers as JSON")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    # The default stream cannot be captured.
    torch.cuda.set_stream(torch.cuda.Stream())
    results = []
    for case in json.loads(PEERS.read_text())["cases"]:
        if arguments.cases is not None and case["name"] not in arguments.cases:
            continue
        for name in case["peers"]:
            if arguments.quick and name != "bfloat16":
                continue
            results.append(run_case(case, getattr(torch, name)))
            print(case_table(results[-1:])[2], flush=True)
    dense = []
    if not arguments.no_dense:
        for features, heads in ((64, 32), (128, 16)):
            for length in arguments.lengths:
                for causal in (False, True):
                    dense.append(run_dense(length, heads, features, causal))
                    print(dense_table(dense[-1:])[2], flush=True)
    lines = case_table(results) + [""] + dense_table(dense)
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")
    if arguments.output:
        versions = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "natten": natten.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        arguments.output.write_text(
            json.dumps({**versions, "cases": results, "dense": dense}, indent=1) + "\n"
        )
    failed = [r for r in results + dense if "fwd_ms" not in r]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
