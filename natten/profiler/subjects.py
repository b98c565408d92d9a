"""The calls that are timed: natten's own, and what others offer for the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from natten import context
from natten.functional import dispatch, neighborhood_attention_generic
from natten.functional.problem import Config, Problem
from natten.profiler import measuring
from natten.profiler.measuring import Measurement

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fav2": SDPBackend.FLASH_ATTENTION,
    # The kernel that torch has from xFormers.
    "xformers": SDPBackend.EFFICIENT_ATTENTION,
}
# FlexAttention in eager mode, and the reference on masks, hold so many bytes of a score.
_SCORE_BYTES = 12
_LABELS = {
    "dense": "dense attention (torch)",
    "cudnn": "dense attention, cuDNN",
    "fav2": "dense attention, FlashAttention 2",
    "xformers": "dense attention, memory-efficient (torch, of xFormers)",
    "flex": "FlexAttention",
}


@dataclass(frozen=True)
class Tensors:
    """The inputs of a call, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None
    additional_values: Tensor | None
    grad_out: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Those that gradients are taken of."""
        found = (self.query, self.key, self.value, self.additional_keys, self.additional_values)
        return tuple(t for t in found if t is not None)


def needed_bytes(problem: Problem) -> int:
    """Memory that a call and its tensors take at least."""
    keys = problem.num_keys + problem.num_additional
    elements = problem.num_queries * problem.heads * (problem.head_dim + 2 * problem.head_dim_v)
    elements += keys * problem.heads_kv * (problem.head_dim + problem.head_dim_v)
    return problem.batch * elements * problem.dtype.itemsize * (2 if problem.requires_grad else 1)


def _check_memory(device: torch.device, needed: int, what: str) -> None:
    free = measuring.free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs at least {needed / 2**30:.1f} GiB, and {device} has "
            f"{free / 2**30:.1f} GiB free"
        )


def make_tensors(problem: Problem) -> Tensors:
    """Random tensors for a problem.

    Raises:
        MemoryError: They do not fit.
    """
    _check_memory(problem.device, needed_bytes(problem), "the problem")

    def random(*shape: int, grad: bool = problem.requires_grad) -> Tensor:
        tensor = torch.randn(shape, device=problem.device, dtype=problem.dtype)
        return tensor.requires_grad_(grad)

    batch, heads_kv = problem.batch, problem.heads_kv
    count, dims = problem.num_additional, (problem.head_dim, problem.head_dim_v)
    additional_keys, additional_values = (
        random(batch, count, heads_kv, dim) if count else None for dim in dims
    )
    return Tensors(
        random(batch, *problem.query_shape, problem.heads, problem.head_dim),
        random(batch, *problem.key_shape, heads_kv, problem.head_dim),
        random(batch, *problem.key_shape, heads_kv, problem.head_dim_v),
        additional_keys,
        additional_values,
        random(*problem.output_shape, grad=False),
    )


def natten_call(
    problem: Problem,
    tensors: Tensors,
    backend: str,
    config: Config,
    fmha_backend: str | None = None,
) -> Callable[[], Tensor]:
    """natten's own, on the backend called so (without suffix), or on its choice for ""."""

    def call() -> Tensor:
        out = neighborhood_attention_generic(
            tensors.query, tensors.key, tensors.value,
            problem.kernel_size, problem.stride, problem.dilation, problem.is_causal,
            is_circular=problem.is_circular or None, upsampling=problem.upsampling or None,
            additional_keys=tensors.additional_keys, additional_values=tensors.additional_values,
            attention_kwargs=None if fmha_backend is None else {"backend": fmha_backend},
            backend=f"{backend}-fna" if backend else None,
            q_tile_shape=config.q_tile_shape, kv_tile_shape=config.kv_tile_shape,
            backward_q_tile_shape=config.backward_q_tile_shape,
            backward_kv_tile_shape=config.backward_kv_tile_shape,
            run_persistent_kernel=config.run_persistent_kernel,
            kernel_schedule=config.kernel_schedule, torch_compile=config.torch_compile,
        )  # fmt: skip
        if not isinstance(out, Tensor):
            raise RuntimeError("natten returned something else than a tensor")
        return out

    return call


def _joined(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Flat tokens with the additional ones at the end."""
    query, key, value = (t.flatten(1, -3) for t in (tensors.query, tensors.key, tensors.value))
    if tensors.additional_keys is not None and tensors.additional_values is not None:
        key = torch.cat([key, tensors.additional_keys], 1)
        value = torch.cat([value, tensors.additional_values], 1)
    return query, key, value


def is_causal_dense(problem: Problem) -> bool:
    """Whether dense attention is compared with as causal: other kinds cannot tell what is later."""
    return problem.rank == 1 and problem.is_causal[0] and not problem.num_additional


def _dense_call(name: str, problem: Problem, tensors: Tensors) -> Callable[[], Tensor]:
    causal = is_causal_dense(problem)
    grouped = problem.heads != problem.heads_kv

    def sdpa() -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in _joined(tensors))
        out = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).unflatten(1, problem.query_shape)

    def chosen() -> Tensor:
        with sdpa_kernel(_SDPA[name]):
            return sdpa()

    return sdpa if name == "dense" else chosen


def unavailable(name: str, problem: Problem) -> str | None:
    """Why an implementation of others cannot be used here."""
    if name in ("cudnn", "xformers") and problem.device.type != "cuda":
        return "it runs on CUDA devices"
    return None


@contextmanager
def flex_allowed(compiled: bool) -> Iterator[None]:
    """FlexAttention may be compiled inside."""
    before = context.is_flex_compile_allowed(), context.is_flex_compile_backprop_allowed()
    if compiled:
        context.allow_flex_compile()
        context.allow_flex_compile_backprop()
    try:
        yield
    finally:
        if not before[0]:
            context.disable_flex_compile()
        if not before[1]:
            context.disable_flex_compile_backprop()


def measure_call(
    name: str,
    problem: Problem,
    tensors: Tensors,
    call: Callable[[], Tensor],
    warmup: int,
    *,
    operations: bool = False,
) -> Measurement:
    """Time a call and, if the problem asks for gradients, its backward pass."""
    device = problem.device
    with torch.set_grad_enabled(problem.requires_grad):
        _warm(call, device, warmup)
        forward_ms = measuring.median_ms(call, device)
        backward_ms = None
        if problem.requires_grad:
            backward = measuring.gradients(call(), tensors.inputs, tensors.grad_out)
            _warm(backward, device, warmup)
            backward_ms = measuring.median_ms(backward, device)
            del backward

        def both() -> None:
            out = call()
            if problem.requires_grad:
                torch.autograd.grad(out, tensors.inputs, tensors.grad_out)

        peak = measuring.peak_bytes(both, device)
        recorded = tuple(measuring.record(both, device)) if operations else ()
    return Measurement(name, forward_ms, backward_ms, peak, recorded)


def _warm(call: Callable[[], Any], device: torch.device, times: int) -> None:
    """Call until everything is compiled and awake; slow calls less often."""
    spent = 0.0
    for _ in range(max(times, 1)):
        spent += measuring.median_ms(call, device, seconds=0, least=1)
        if spent > 5e3:
            break


def measure_natten(
    problem: Problem,
    tensors: Tensors,
    backend: str,
    config: Config,
    warmup: int,
    fmha_backend: str | None = None,
    *,
    operations: bool = True,
) -> Measurement:
    """Time natten on a backend, or on its own choice."""
    chosen = dispatch.resolve(problem, config, backend).name
    if chosen == "flex" and not config.torch_compile:
        scores = problem.batch * problem.heads * problem.num_queries * problem.num_keys
        _check_memory(problem.device, scores * _SCORE_BYTES, "FlexAttention without --compile")
    call = natten_call(problem, tensors, backend, config, fmha_backend)
    return measure_call(
        f"natten, {chosen}-fna", problem, tensors, call, warmup, operations=operations
    )


# What a probe of dense attention computes: milliseconds of a GPU, and of a core.
_PROBE_FLOPS = {"cuda": 1e11, "cpu": 1e9}


def _too_slow(problem: Problem, tensors: Tensors, seconds: float) -> str | None:
    """Whether dense attention takes longer, by the time of some of its queries."""
    query, key, value = (t.detach().transpose(1, 2) for t in _joined(tensors))
    flops = 2 * problem.batch * problem.heads * (problem.head_dim + problem.head_dim_v)
    flops *= problem.num_keys + problem.num_additional
    count = int(min(max(_PROBE_FLOPS[problem.device.type] / flops, 1), problem.num_queries))
    grouped = problem.heads != problem.heads_kv

    def probe() -> Tensor:
        return scaled_dot_product_attention(query[:, :, :count], key, value, enable_gqa=grouped)

    ms = min(measuring.times_ms(probe, problem.device, seconds=0, least=2))
    # The backward pass takes about two and a half times as long.
    passes = 3.5 if problem.requires_grad else 1.0
    estimate = ms / 1e3 * passes * problem.num_queries / count
    return f"one call would take about {estimate:.0f} s" if estimate > seconds else None


def measure_other(
    name: str,
    problem: Problem,
    tensors: Tensors,
    warmup: int,
    *,
    operations: bool = False,
) -> Measurement:
    """Time an implementation of others. What keeps it from running is reported, not raised."""
    label = _LABELS[name]
    reason = unavailable(name, problem) or _too_slow(problem, tensors, 10.0)
    if reason is not None:
        return Measurement(label, failure=reason)
    try:
        if name != "flex":
            call = _dense_call(name, problem, tensors)
            return measure_call(label, problem, tensors, call, warmup, operations=operations)
        compiled = problem.device.type == "cuda"
        with flex_allowed(compiled):
            found = measure_natten(
                problem, tensors, "flex", Config(torch_compile=compiled), warmup,
                operations=operations,
            )  # fmt: skip
        suffix = "compiled" if compiled else "not compiled"
        return Measurement(
            f"{label}, {suffix}", found.forward_ms, found.backward_ms, found.peak_bytes,
            found.operations,
        )  # fmt: skip
    except Exception as error:
        # Whatever goes wrong in a library that is only compared with.
        return Measurement(label, failure=" ".join(str(error).split())[:120] or repr(error))


__all__ = [
    "Tensors",
    "flex_allowed",
    "is_causal_dense",
    "make_tensors",
    "measure_call",
    "measure_natten",
    "measure_other",
    "natten_call",
    "needed_bytes",
    "unavailable",
]
