"""Compare a backend with the float64 reference, within the error of eager attention."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from math import prod
from random import Random
from typing import Any

import numpy as np
import torch
from cases import Case
from memory import (
    DISTINCT,
    LAYOUTS,
    guarded,
    nan_filled_empties,
    nan_filled_replays,
    permuted,
)
from torch import Tensor

import natten
import natten.utils.varlen
from natten.functional import attention, neighborhood_attention_generic
from natten.functional.neighborhood import packed_attention
from natten.varlen import GridLayout, neighborhood_attention_varlen
from natten.window import Axis, grid_mask

# Where eager attention happens to be exact (a window of one key), others round: sums in float32,
# and the result in its own precision.
SUM_ROUNDING = 16.0
RESULT_ROUNDING = 2.0


@dataclass
class Inputs:
    """The tensors of a case that take gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        pairs = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in pairs.items() if t is not None}

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves of another dtype, with the same layout."""
        return Inputs(
            **{n: t.detach().to(dtype).requires_grad_() for n, t in self.tensors().items()}
        )


@dataclass
class Results:
    """Output, logsumexp and gradients."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse} | {
            f"gradient of {name}": g for name, g in self.gradients.items()
        }


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random tensors of a case, the same on every device, in memory as the case says."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def randn(*shape: int, magnitude: float = 1.0) -> Tensor:
        if case.contiguous:
            tensor = torch.randn(shape, generator=generator)
        else:
            # Heads first in memory, in a larger tensor, every second feature.
            rank = len(shape) - 3
            whole = torch.randn(
                shape[0], shape[-2], *shape[1:-2], 2 * shape[-1] + 2, generator=generator
            )
            tensor = whole[..., 2::2].movedim(1, rank + 1)
        tensor = (tensor * magnitude).to(dtype)
        return tensor.to(device).requires_grad_()

    batch, heads_kv = case.batch, case.heads_kv
    inputs = Inputs(
        randn(batch, *case.tokens, case.heads, case.head_dim, magnitude=case.magnitude),
        randn(batch, *case.key_tokens, heads_kv, case.head_dim, magnitude=case.magnitude),
        randn(batch, *case.key_tokens, heads_kv, case.head_dim_v),
    )
    if case.additional:
        inputs.additional_keys = randn(batch, case.additional, heads_kv, case.head_dim)
        inputs.additional_values = randn(batch, case.additional, heads_kv, case.head_dim_v)
        if case.additional_lengths is not None:
            absent = _absent(case, device)
            with torch.no_grad():
                for tensor in (inputs.additional_keys, inputs.additional_values):
                    tensor[absent] = torch.nan
    if case.rpb:
        table = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size), generator=generator)
        inputs.rpb = table.to(dtype).to(device).requires_grad_()
    if case.sink:
        logits = torch.randn(case.heads, generator=generator)
        inputs.sink = logits.to(dtype).to(device).requires_grad_()
    if case.layouts is not None:
        random = Random(case.layouts)
        for name, tensor in inputs.tensors().items():
            kinds = LAYOUTS
            if name.startswith("additional") and case.additional_lengths is not None:
                # What nobody has is NaN, and must not lie where something else does.
                kinds = DISTINCT
            if tensor.numel():
                setattr(inputs, name, random.choice(kinds)(tensor.detach(), random))
    for name, tensor in inputs.tensors().items():
        tensor.requires_grad_(name not in case.frozen)
    return inputs


def masks(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Which keys and queries are valid: of the first batch entry some here and there, of the second
    a corner, of the third none."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    found = {}
    for name, tokens in (("key_mask", case.key_tokens), ("query_mask", case.tokens)):
        if not getattr(case, name):
            continue
        mask = torch.rand(case.batch, *tokens, generator=generator) < 0.6
        if case.batch > 1:
            mask[1] = False
            mask[(1, *(slice(-(-2 * n // 3)) for n in tokens))] = True
        if case.batch > 2:
            mask[2] = False
        if not case.contiguous:
            mask = torch.stack([mask, ~mask], -1)[..., 0]
        mask = mask.to(device)
        if case.layouts is not None and mask.numel():
            mask = guarded(permuted(mask, Random(case.layouts)))
        found[name] = mask
    return found


def _absent(case: Case, device: str | torch.device) -> Tensor:
    """Which additional keys do not exist: bool ``[batch, additional]``."""
    lengths = torch.tensor(case.additional_lengths, device=device)
    return torch.arange(case.additional, device=device) >= lengths[:, None]


def call(
    case: Case, inputs: Inputs, backend: str | None = None, **knobs: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The public function that computes a case, and its arguments."""
    device = inputs.query.device
    given: dict[str, Any] = {
        "query": inputs.query, "key": inputs.key, "value": inputs.value, "scale": case.scale,
        "softcap": case.softcap, "sink": inputs.sink, "backend": backend, "return_lse": True,
        **masks(case, device),
    }  # fmt: skip
    if case.is_attention:
        given["is_causal"] = case.is_causal[0]
        if case.lengths_q is not None:
            for name, lengths in (("seqlens_Q", case.lengths_q), ("seqlens_KV", case.lengths_kv)):
                given[name] = torch.tensor(lengths, dtype=torch.int32, device=device)
        function: Callable[..., Any] = attention
    else:
        for name in (
            "kernel_size", "stride", "dilation", "is_causal", "is_circular", "upsampling", "grid",
            "query_origin", "key_origin",
        ):  # fmt: skip
            given[name] = getattr(case, name)
        for name in ("additional_keys", "additional_values", "rpb"):
            given[name] = getattr(inputs, name)
        if case.additional_lengths is not None:
            given["additional_lengths"] = torch.tensor(case.additional_lengths, device=device)
        function = neighborhood_attention_generic
    given |= knobs
    return function, given


def run(
    case: Case, inputs: Inputs, backend: str | None = None, **knobs: Any
) -> tuple[Tensor, Tensor]:
    """Call the public function for a case."""
    function, given = call(case, inputs, backend, **knobs)
    if case.spelling is not None:
        function, given = spelled(case, function, given)
    found: tuple[Tensor, Tensor] = function(**given)
    return found


def spelled(
    case: Case, function: Callable[..., Any], given: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Another way to write the same call, drawn at random."""
    random = Random(case.spelling)
    given = dict(given)

    def sometimes() -> bool:
        return random.random() < 0.5

    for name, default in (("scale", None), ("softcap", 0.0), ("sink", None), ("rpb", None)):
        if given.get(name, ...) == default and sometimes():
            del given[name]
    if sometimes():
        given["run_persistent_kernel"] = sometimes()
    if sometimes():
        given["backward_use_pt_reduction"] = sometimes()
    if case.is_attention:
        if case.lengths_q is not None and sometimes():
            ends = natten.utils.varlen.generate_varlen_parameters(
                *(given[name] for name in ("query", "key", "value")),
                given.pop("seqlens_Q"), given.pop("seqlens_KV"),
            )  # fmt: skip
            names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
            given |= dict(zip(names, ends))
            # It is a bound.
            given["max_seqlen_Q"] += random.choice((0, 3))
        return function, given
    rank, grid = case.rank, case.grid or case.key_tokens
    plain = not (case.softcap or case.sink or case.key_mask or case.query_mask)
    plain = plain and case.additional_lengths is None
    if plain and given["query"].dtype.itemsize > 2 and random.random() < 0.3:
        # What is an attention by itself is computed as one, or is not.
        given["attention_kwargs"] = {"run_persistent_kernel": False}
        given["try_fuse_additional_kv"] = sometimes()
    if sometimes():
        function = getattr(natten, f"na{rank}d")
    if "additional_lengths" in given:
        kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
        given["additional_lengths"] = given["additional_lengths"].to(random.choice(kinds))
    if case.grid is None and max(case.upsampling) == 1 and sometimes():
        given |= {"grid": grid, "query_origin": 0, "key_origin": [0] * rank}
    sizes = {name: list(getattr(case, name)) for name in ("kernel_size", "stride", "dilation")}
    if sometimes():
        given["clip_window"] = True
        for axis, (n, k, s, d) in enumerate(zip(grid, *sizes.values())):
            # Windows that are clipped to what is meant.
            if s == k and sometimes():
                sizes["stride"][axis] += random.randint(0, 9)
            if k == max(n // d, 1) and sometimes():
                sizes["kernel_size"][axis] += random.randint(0, 9)
            if d == n and sometimes():
                sizes["dilation"][axis] += random.randint(0, 9)
        if "rpb" in given and given["rpb"] is not None:
            # Of which the middle counts.
            more = [new - k for new, k in zip(sizes["kernel_size"], case.kernel_size)]
            edges = [edge for extra in reversed(more) for edge in (extra, extra)]
            given["rpb"] = torch.nn.functional.pad(given["rpb"], edges, value=torch.nan)
    elif given.get("rpb") is None:
        for axis, (n, k, d) in enumerate(zip(grid, case.kernel_size, case.dilation)):
            if k * d == n and sometimes():
                sizes["kernel_size"][axis] = random.choice((-1, None))
    groups = [
        n for n in range(1, case.heads + 1)
        if case.heads % n == 0 and (case.heads_kv % n == 0 or n % case.heads_kv == 0)
    ]  # fmt: skip
    groups = random.choice(groups) if random.random() < 0.2 else 0

    def written(values: list[Any], default: Any = None) -> Any:
        if default is not None and all(v == default for v in values) and sometimes():
            return None
        if len(set(values)) == 1 and values[0] is not None and sometimes():
            return values[0] if isinstance(values[0], bool) else np.int32(values[0])
        return random.choice((tuple, list))(values)

    for name, values in sizes.items():
        in_groups = groups and (name == "kernel_size" or sometimes())
        given[name] = [tuple(values)] * groups if in_groups else (
            written(values, None if name == "kernel_size" else 1)
        )  # fmt: skip
    for name, default in (("is_causal", False), ("is_circular", False), ("upsampling", 1)):
        given[name] = written(list(given[name]), default)
    return function, given


def full_mask(case: Case, device: str | torch.device = "cpu") -> Tensor:
    """What every query of a small case sees: bool ``[queries, keys]``, without context."""
    if not case.is_attention:
        axes = [
            Axis(*axis)
            for axis in zip(
                case.grid or (case.key_tokens if max(case.upsampling) > 1 else case.tokens),
                case.kernel_size,
                case.stride,
                case.dilation,
                case.is_causal,
                case.is_circular,
                case.upsampling,
            )
        ]
        boxes = (case.tokens, case.key_tokens, case.query_origin, case.key_origin)
        return grid_mask(axes, *boxes, device=device)
    (queries,), (keys,) = case.tokens, case.key_tokens
    visible = torch.zeros(queries, keys, dtype=torch.bool, device=device)
    q = kv = 0
    for n_q, n_kv in zip(case.lengths_q or (queries,), case.lengths_kv or (keys,)):
        block = torch.ones(n_q, n_kv, dtype=torch.bool, device=device)
        visible[q : q + n_q, kv : kv + n_kv] = block.tril() if case.is_causal[0] else block
        q, kv = q + n_q, kv + n_kv
    return visible


def eager(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Plain attention with a full mask, every operation in the inputs' dtype."""
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    repeat = case.heads // case.heads_kv
    visible = full_mask(case, q.device)
    valid = {name: mask.flatten(1) for name, mask in masks(case, q.device).items()}
    scores_bias = q.new_zeros(case.heads, *visible.shape)
    if inputs.rpb is not None:
        scores_bias = _full_bias(case, inputs.rpb)
    scores_bias = scores_bias.masked_fill(~visible, -torch.inf)
    if "key_mask" in valid:
        hidden = ~valid["key_mask"][:, None, None, :]
        scores_bias = scores_bias.expand(case.batch, -1, -1, -1).masked_fill(hidden, -torch.inf)
    if inputs.additional_keys is not None:
        more_k, more_v = inputs.additional_keys, inputs.additional_values
        scores_bias = torch.nn.functional.pad(scores_bias, (0, case.additional))
        if case.additional_lengths is not None:
            absent = _absent(case, q.device)
            more_k, more_v = (t.masked_fill(absent[:, :, None, None], 0) for t in (more_k, more_v))
            absent = torch.nn.functional.pad(absent, (visible.shape[1], 0))
            scores_bias = scores_bias.masked_fill(absent[:, None, None, :], -torch.inf)
        k = torch.cat([k, more_k.transpose(1, 2)], dim=2)
        v = torch.cat([v, more_v.transpose(1, 2)], dim=2)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = (q * scale) @ k.transpose(-1, -2)
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = scores + scores_bias
    if inputs.sink is not None:
        logits = inputs.sink[:, None, None].expand(*scores.shape[:-1], 1)
        if case.lengths_q is not None:
            # Tokens behind the last sequence are of none.
            logits = logits.masked_fill(
                torch.arange(len(visible), device=q.device)[:, None] >= sum(case.lengths_q),
                -torch.inf,
            )
        scores = torch.cat([scores, logits], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    if "query_mask" in valid:
        scores = scores.masked_fill(~valid["query_mask"][:, None, :, None], -torch.inf)
    # Rows without keys have no softmax; torch's own attention gives zeros for them too.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    out = weights @ v
    lse = scores.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)
    tokens = inputs.query.shape[1:-2]
    return out.transpose(1, 2).unflatten(1, tokens), lse.transpose(1, 2).unflatten(1, tokens)


def _full_bias(case: Case, rpb: Tensor) -> Tensor:
    """The relative position bias of every pair: ``[heads, queries, keys]``."""
    rank = case.rank
    index: list[Tensor] = []
    for axis in range(rank):
        d, k = case.dilation[axis], case.kernel_size[axis]
        q = torch.arange(case.tokens[axis]) + (case.query_origin or (0,) * rank)[axis]
        kv = torch.arange(case.key_tokens[axis]) + (case.key_origin or (0,) * rank)[axis]
        distance = (kv // d)[None, :] - (q // d)[:, None] + k - 1
        if case.is_circular[axis]:
            # What the first position of each window is at.
            s = case.stride[axis]
            start = ((q // d) // s * s + s // 2 - k // 2 - q // d + k - 1)[:, None]
            distance = (distance - start) % (case.tokens[axis] // d) + start
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = distance.shape
        index.append(distance.clamp(0, 2 * k - 2).view(shape).to(rpb.device))
    bias = rpb[(slice(None), *index)]
    return bias.flatten(rank + 1).flatten(1, rank)


def differentiate(
    inputs: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> Results:
    """Pull both gradients back to the inputs."""
    # A row without keys has a constant logsumexp of -inf.
    loss = (out * grad_out.to(out.dtype)).sum()
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = loss + (finite * grad_lse.to(lse.dtype)).sum().to(loss.dtype)
    leaves = {name: t for name, t in inputs.tensors().items() if t.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = [
        torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves.values())
    ]  # fmt: skip
    return Results(out.detach(), lse.detach(), dict(zip(leaves, zeros)))


def assert_within_budget(
    name: str,
    got: Tensor,
    exact: Tensor,
    eager: Tensor,
    factor: float,
    rounding: float = 0.0,
    slack: float = 0.0,
) -> None:
    """``got`` is as close to ``exact`` as eager attention is, up to ``factor``.

    Both the largest error and the root mean square are compared. ``rounding`` is a relative error
    that comes on top, ``slack`` an absolute one.
    """
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    got64, eager64 = got.double(), eager.double()
    assert bool((got64.isinf() == exact.isinf()).all()), f"{name}: infinities differ"
    assert bool((got64.isnan() == exact.isnan()).all()), f"{name}: NaNs differ"
    finite = exact.isfinite()
    got64, exact, eager64 = got64[finite], exact[finite], eager64[finite]
    if exact.numel() == 0:
        return
    error, allowed = (got64 - exact).abs(), (eager64 - exact).abs()
    eps = torch.finfo(got.dtype).eps
    sum_eps = min(eps, torch.finfo(torch.float32).eps)
    relative = SUM_ROUNDING * sum_eps + RESULT_ROUNDING * eps + rounding
    floor = relative * float(exact.abs().max())
    floor += torch.finfo(got.dtype).tiny + slack
    worst = int(error.argmax())
    budget = factor * float(allowed.max()) + floor
    assert float(error.max()) <= budget, (
        f"{name}: error {float(error.max()):.3g} at flat index {worst} "
        f"(got {float(got64[worst]):.6g}, exact {float(exact[worst]):.6g}) exceeds {budget:.3g}; "
        f"eager attention's is {float(allowed.max()):.3g}"
    )
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert float(rms) <= factor * float(allowed_rms) + floor / 2, (
        f"{name}: root mean square error {float(rms):.3g}; eager attention's is "
        f"{float(allowed_rms):.3g}"
    )


def _product_slack(
    case: Case, inputs: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor
) -> dict[str, float]:
    """What a relative error of 1 of dO V^T does to the gradients that come from the scores'.

    A score's gradient is its weight times the difference of such a product and a mean of them,
    which may cancel: with one key in the window it is zero. Errors of different queries are taken
    for independent.
    """

    def present(*tensors: Tensor | None) -> list[Tensor]:
        return [t for t in tensors if t is not None and t.numel()]

    def longest(*tensors: Tensor | None) -> float:
        given = [t.detach().double().nan_to_num() for t in present(*tensors)]
        return max((float(t.norm(dim=-1).max()) for t in given), default=0.0)

    def largest(*tensors: Tensor | None) -> float:
        given = [t.detach().nan_to_num().abs() for t in present(*tensors)]
        return max((float(t.max()) for t in given), default=0.0)

    scale = abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    error = longest(grad_out) * longest(inputs.value, inputs.additional_values)
    values = [t for t in (inputs.value, inputs.additional_values) if t is not None]
    # The weights of a key, summed over the queries that see it.
    weights = largest(*torch.autograd.grad(out.sum(), values, retain_graph=True))
    keys = scale * error * weights**0.5 * largest(inputs.query)
    slack = {
        "gradient of query": scale * error * largest(inputs.key, inputs.additional_keys),
        "gradient of key": keys,
        "gradient of additional_keys": keys,
    }
    if inputs.rpb is not None:
        seen = lse.masked_fill(lse.isinf(), 0.0).sum()
        (biases,) = torch.autograd.grad(seen, [inputs.rpb], retain_graph=True)
        slack["gradient of rpb"] = error * largest(biases) ** 0.5
    return slack


def _output_slack(
    case: Case, inputs: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor
) -> dict[str, float]:
    """What a relative error of 1 of the output, as it is kept for the backward pass, does to
    gradients beside which that of eager attention says little: sums over all queries, a few numbers
    whose errors may all happen to be small, and gradients of scores where windows, or the box of
    keys, hold one key, which are nothing else. Errors of features and queries are taken for
    independent.
    """
    errors = (out.detach() * grad_out.double()).nan_to_num().norm(dim=-1)
    if not errors.numel():
        return {}
    slack = {}
    largest_error = float(errors.max())
    alone = all(min(sizes) == 1 for sizes in zip(case.kernel_size or case.tokens, case.tokens))
    alone |= prod(case.key_tokens) == 1
    names = ("rpb", *(("query", "key") if alone else ()))
    leaves = {n: t for n, t in inputs.tensors().items() if n in names and t.requires_grad}
    if leaves:
        seen = lse.masked_fill(lse.isinf(), 0.0).sum()
        found = torch.autograd.grad(seen, list(leaves.values()), retain_graph=True)
        for name, by_lse in zip(leaves, found, strict=True):
            largest = float(by_lse.nan_to_num().abs().max()) if by_lse.numel() else 0.0
            # Weights are at most 1: so is their sum over queries, squared one by one.
            share = largest**0.5 if name == "rpb" else largest
            slack[f"gradient of {name}"] = largest_error * share
    if inputs.sink is not None:
        weights = torch.exp(inputs.sink.detach().double() - lse.detach()).nan_to_num(posinf=0.0)
        slack["gradient of sink"] = float((weights * errors).flatten(0, -2).norm(dim=0).max())
    return slack


def _slack(
    case: Case,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    eps: float,
    product_rounding: float,
) -> dict[str, float]:
    """Absolute errors that come on top of the budget, from all of the above."""
    # Rounding is off by 0.3 units of the last place in the mean, and a sum by more than four times
    # its mean error once in 16,000 times.
    slack = {n: 1.2 * eps * s for n, s in _output_slack(case, inputs, out, lse, grad_out).items()}
    if case.scale == 0:
        # Kernels take a number for it that changes no weight, and a logsumexp of 0 a little.
        slack["lse"] = 1e-27
    if product_rounding:
        for name, size in _product_slack(case, inputs, out, lse, grad_out).items():
            slack[name] = slack.get(name, 0.0) + product_rounding * size
    return slack


def _recomputed(exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """What the rounding of logsumexps adds to gradients: backward passes recompute the weights from
    them, where eager attention has kept these."""
    finite = [lse.detach()[lse.isfinite()].abs() for lse in exact]
    return torch.finfo(dtype).eps * max((float(t.max()) for t in finite if t.numel()), default=0.0)


def _suffixed(backend: str | None, case: Case) -> str | None:
    """A backend as the function that computes a case takes it."""
    if backend in (None, "cpu", "reference") or "-" in backend:
        return backend
    return backend + ("-fmha" if case.is_attention else "-fna")


def compute(
    case: Case, backend: str, dtype: torch.dtype, device: str, backward: bool = True, **knobs: Any
) -> None:
    """Compute a case as `check_problem` does, and compare it with nothing: for tools that check
    whatever runs."""
    inputs = make_inputs(case, dtype, device)
    with nan_filled_empties(), nan_filled_replays(), torch.set_grad_enabled(backward):
        for _ in range(3):
            out, lse = run(case, inputs, _suffixed(backend, case), **knobs)
            if backward:
                differentiate(inputs, out, lse, torch.ones_like(out), torch.ones_like(lse))


def check_problem(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    factor: float = 2.0,
    backward: bool = True,
    reference: str = "reference",
    product_rounding: float = 0.0,
    **knobs: Any,
) -> None:
    """Assert that ``backend`` computes a case, with all gradients, as exactly as eager attention.

    Args:
        case: The problem.
        backend: As in ``backend=``; "flex" and the like get the suffix that the case needs.
        dtype: Of the inputs.
        device: Where to run; the float64 reference runs there too.
        factor: Allowed error, in units of the error of eager attention in the same dtype.
        backward: Whether to check gradients.
        reference: The backend that computes the exact result in float64.
        product_rounding: Relative error of a product of two rows, where that is more than eager
            attention's: what it can change is added to what is allowed.
        knobs: Further arguments of the public function.
    """
    backend = _suffixed(backend, case)
    inputs = make_inputs(case, dtype, device)
    exact_inputs, eager_inputs = inputs.to(torch.float64), inputs.to(dtype)
    exact_out, exact_lse = run(case, exact_inputs, reference)
    eager_out, eager_lse = eager(case, eager_inputs)
    # A compiler must not see the patched functions.
    compiles = backend is not None and backend.startswith("flex")
    with nullcontext() if compiles else nan_filled_empties():
        if not backward:
            with torch.no_grad():
                out, lse = run(case, inputs, backend, **knobs)
            assert out.dtype == dtype, f"out has dtype {out.dtype}, expected {dtype}"
            assert_within_budget("out", out, exact_out.detach(), eager_out.detach(), factor)
            assert_within_budget("lse", lse, exact_lse.detach(), eager_lse.detach(), factor)
            return
        out, lse = run(case, inputs, backend, **knobs)
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(out.shape, generator=generator).to(dtype).to(device)
        grad_lse = torch.randn(lse.shape, generator=generator).to(device)
        found = [differentiate(inputs, out, lse, grad_out, grad_lse)]
    if device.startswith("cuda") and not compiles:
        with nan_filled_replays():
            for _ in range(2):
                # Recorded, then done again.
                out, lse = run(case, inputs, backend, **knobs)
                found.append(differentiate(inputs, out, lse, grad_out, grad_lse))
    assert out.dtype == dtype, f"out has dtype {out.dtype}, expected {dtype}"
    expected_lse = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == expected_lse, f"lse has dtype {lse.dtype}, expected {expected_lse}"
    slack = _slack(
        case, exact_inputs, exact_out, exact_lse, grad_out, torch.finfo(dtype).eps, product_rounding
    )
    exact = differentiate(exact_inputs, exact_out, exact_lse, grad_out, grad_lse)
    plain = differentiate(eager_inputs, eager_out, eager_lse, grad_out, grad_lse)
    recomputed = _recomputed([exact.lse], lse.dtype)
    for number, got in enumerate(found):
        for name, tensor in got.tensors().items():
            assert_within_budget(
                f"{case.name}: {name}" + (f", time {number + 1}" if number else ""),
                tensor,
                exact.tensors()[name],
                plain.tensors()[name],
                factor,
                recomputed if name.startswith("gradient") else 0.0,
                slack.get(name, 0.0),
            )


def check_groups(
    cases: Sequence[Case],
    backend: str | None,
    dtype: torch.dtype,
    device: str,
    *,
    factor: float = 2.0,
    product_rounding: float = 0.0,
    **knobs: Any,
) -> None:
    """As `check_problem`, for windows of equal groups of heads in one call: the cases have but
    kernel sizes of their own, and no bias."""
    first, groups = cases[0], len(cases)
    inputs = make_inputs(first, dtype, device)

    def of_each(inputs: Inputs) -> list[tuple[Case, Inputs]]:
        parts: list[dict[str, Tensor]] = [{} for _ in cases]
        for name, tensor in inputs.tensors().items():
            chunks = tensor.chunk(groups, 0 if name == "sink" else -2)
            for part, chunk in zip(parts, chunks, strict=True):
                part[name] = chunk
        heads = {"heads": first.heads // groups, "heads_kv": first.heads_kv // groups}
        named = zip(cases, parts, strict=True)
        return [(replace(case, **heads), Inputs(**part)) for case, part in named]

    def joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.cat([out for out, _ in found], -2), torch.cat([lse for _, lse in found], -1)

    exact_inputs, eager_inputs = inputs.to(torch.float64), inputs.to(dtype)
    exact_parts = of_each(exact_inputs)
    exact_results = [run(*part, "reference") for part in exact_parts]
    exact_found = joined(exact_results)
    eager_found = joined([eager(*part) for part in of_each(eager_inputs)])
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(device) for t in exact_found]
    grads[0] = grads[0].to(dtype)
    sizes = [case.kernel_size for case in cases]
    found = []
    # From scratch, recorded, and done again.
    for _ in range(3 if device.startswith("cuda") else 1):
        with nan_filled_empties(), nan_filled_replays():
            results = run(first, inputs, _suffixed(backend, first), **knobs, kernel_size=sizes)
            found.append(differentiate(inputs, *results, *grads))
    slack: Counter[str] = Counter()
    eps = torch.finfo(dtype).eps
    each = zip(exact_parts, exact_results, grads[0].chunk(groups, -2), strict=True)
    for part, pair, grad in each:
        slack.update(_slack(*part, *pair, grad, eps, product_rounding))
    exact = differentiate(exact_inputs, *exact_found, *grads)
    plain = differentiate(eager_inputs, *eager_found, *grads)
    recomputed = _recomputed([exact.lse], results[1].dtype)
    for got in found:
        for name, tensor in got.tensors().items():
            assert_within_budget(
                f"{first.name} {sizes}: {name}", tensor, exact.tensors()[name],
                plain.tensors()[name], factor, recomputed if name.startswith("gradient") else 0.0,
                slack.get(name, 0.0),
            )  # fmt: skip


def check_derivatives(
    case: Case, backend: str | None, dtype: torch.dtype, device: str, factor: float, **knobs: Any
) -> None:
    """Tangents of the results, and derivatives of gradients along them, are as exact as those that
    torch makes of eager attention, up to ``factor``."""
    inputs = make_inputs(case, dtype, device)
    names = list(inputs.tensors())
    generator = torch.Generator().manual_seed(2)
    tangents = [torch.randn(t.shape, generator=generator) for t in inputs.tensors().values()]

    def derivatives(precision: torch.dtype, function: Callable[..., Any]) -> list[Tensor]:
        own = inputs.to(precision).tensors().values()
        leaves = tuple(t.detach().requires_grad_() for t in own)
        along = tuple(t.to(device, dtype).to(precision) for t in tangents)

        def finite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = function(case, Inputs(**dict(zip(names, tensors, strict=True))))
            return out, lse.masked_fill(lse == -torch.inf, 0.0)

        _, changes = torch.func.jvp(finite, tuple(t.detach() for t in leaves), along)
        out, lse = finite(*leaves)
        loss = out.double().square().sum() + lse.double().square().sum()
        zeros = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, **zeros)
        slope = sum((g.double() * t).sum() for g, t in zip(gradients, along, strict=True))
        return [*changes, *torch.autograd.grad(slope, leaves, **zeros)]

    suffixed = _suffixed(backend, case)
    found = derivatives(dtype, lambda *call: run(*call, suffixed, **knobs))
    exact = derivatives(torch.float64, lambda *call: run(*call, "reference"))
    plain = derivatives(dtype, eager)
    largest = max(float(t.abs().max()) for t in exact if t.numel())
    # Where all cancels but rounding, as of windows of one key.
    rounding = 8 * torch.finfo(dtype).eps * largest
    titles = ["tangent of out", "tangent of lse", *[f"second derivative of {n}" for n in names]]
    for title, mine, true, usual in zip(titles, found, exact, plain, strict=True):
        assert_within_budget(
            f"{case.name}: {title}", mine.detach(), true.detach(), usual.detach(), factor,
            2.0**-9, rounding,
        )  # fmt: skip


def check_grids(
    cases: Sequence[Case],
    backend: str,
    dtype: torch.dtype,
    device: str,
    *,
    factor: float = 2.0,
    product_rounding: float = 0.0,
) -> None:
    """As `check_problem`, for grids of different sizes in one call. All cases are of batch 1 and
    have but windows, sizes and lengths of their own."""
    first, rank = cases[0], cases[0].rank
    inputs = [make_inputs(case, dtype, device) for case in cases]
    for own in inputs:
        own.rpb, own.sink = inputs[0].rpb, inputs[0].sink
    layout = GridLayout([case.tokens for case in cases])

    def joined(tensors: Sequence[Tensor | None], axes: int) -> Tensor | None:
        given = [t for t in tensors if t is not None]
        return torch.cat([t.flatten(1, axes) for t in given], 1) if given else None

    options = {
        name: getattr(first, name) for name in ("softcap", "is_circular", "is_causal", "scale")
    }
    windows = {
        f"{name}_list": [getattr(case, name) for case in cases]
        for name in ("kernel_size", "stride", "dilation")
    }
    for name in ("key_mask", "query_mask"):
        options[name] = joined([masks(case, device).get(name) for case in cases], rank)
    for name in ("additional_keys", "additional_values"):
        more = [t for t in [getattr(own, name) for own in inputs] if t is not None]
        options[name] = torch.cat(more) if more else None
    if first.additional_lengths is not None:
        lengths = [case.additional_lengths[0] for case in cases if case.additional_lengths]
        options["additional_lengths"] = torch.tensor(lengths, device=device)
    query, key, value = (
        torch.cat([getattr(own, name).flatten(1, rank) for own in inputs], 1)
        for name in ("query", "key", "value")
    )
    with nan_filled_empties():
        out, lse = neighborhood_attention_varlen(
            query, key, value, layout, **windows, **options, rpb=inputs[0].rpb,
            sink=inputs[0].sink, backend=f"{backend}-fna", return_lse=True,
        )  # fmt: skip
        ends = zip(layout.unpack(out), layout.unpack(lse), strict=True)
        found = [(o.unsqueeze(0), s.unsqueeze(0)) for o, s in ends]
        generator = torch.Generator().manual_seed(1)
        grads = [
            tuple(torch.randn(t.shape, generator=generator).to(t.dtype).to(device) for t in pair)
            for pair in found
        ]
        got = _differentiated(inputs, found, grads)
    exact_inputs, eager_inputs = _shared(inputs, torch.float64), _shared(inputs, dtype)
    exact_found = [
        run(case, own, "reference") for case, own in zip(cases, exact_inputs, strict=True)
    ]
    eager_found = [eager(case, own) for case, own in zip(cases, eager_inputs, strict=True)]
    slack: Counter[str] = Counter()
    eps = torch.finfo(dtype).eps
    for case, own, pair, grad in zip(cases, exact_inputs, exact_found, grads, strict=True):
        slack.update(_slack(case, own, *pair, grad[0], eps, product_rounding))
    exact = _differentiated(exact_inputs, exact_found, grads)
    plain = _differentiated(eager_inputs, eager_found, grads)
    recomputed = _recomputed([exact_lse for _, exact_lse in exact_found], lse.dtype)
    for case, results, right, usual in zip(cases, got, exact, plain, strict=True):
        for name, tensor in results.tensors().items():
            assert_within_budget(
                f"{case.name}: {name}", tensor, right.tensors()[name], usual.tensors()[name],
                factor, recomputed if name.startswith("gradient") else 0.0,
                slack.get(name, 0.0),
            )  # fmt: skip


def _shared(inputs: Sequence[Inputs], dtype: torch.dtype) -> list[Inputs]:
    """`Inputs.to` for each, with one bias and one sink."""
    found = [own.to(dtype) for own in inputs]
    for own in found:
        own.rpb, own.sink = found[0].rpb, found[0].sink
    return found


def _differentiated(
    inputs: Sequence[Inputs],
    found: Sequence[tuple[Tensor, Tensor]],
    grads: Sequence[tuple[Tensor, ...]],
) -> list[Results]:
    """`differentiate`, of all grids at once: what they share has one gradient."""
    losses = []
    for (out, lse), (grad_out, grad_lse) in zip(found, grads, strict=True):
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (out * grad_out.to(out.dtype)).sum()
        losses.append(loss + (finite * grad_lse.to(lse.dtype)).sum().to(loss.dtype))
    leaves = [t for own in inputs for t in own.tensors().values()]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)
    each = iter([torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves)])
    return [
        Results(out.detach(), lse.detach(), {name: next(each) for name in own.tensors()})
        for own, (out, lse) in zip(inputs, found, strict=True)
    ]


def check_packed(backends: Sequence[str], dtype: torch.dtype, device: str) -> None:
    """One tensor of query, key and value heads: what three tensors give, bit for bit, in one
    gradient."""
    torch.manual_seed(0)
    for backend, heads, heads_kv, head_dim, options in (
        ("cutlass", 2, 2, 16, {"dilation": (2, 1)}),
        ("cutlass", 4, 2, 24, {"stride": (1, 2), "is_causal": (True, False)}),
        ("cutlass", 2, 1, 16, {"grid": (14, 11), "origin": (3, 2)}),
        ("hopper", 2, 1, 64, {}),
    ):
        if backend not in backends:
            continue
        window: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "is_causal": (False, False)}
        window.update(options)
        to: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
        qkv = torch.randn(1, 9, 7, heads + 2 * heads_kv, head_dim, **to)
        rpb = None
        if not any(window["is_causal"]):
            rpb = torch.randn(heads, 5, 7, **to)
        leaves = [qkv] if rpb is None else [qkv, rpb]
        with natten.use_deterministic_algorithms(), nan_filled_empties():
            packed = packed_attention(
                qkv, heads_kv, (3, 4), **window, rpb=rpb, backend=f"{backend}-fna"
            )
            origin = window.pop("origin", None)
            query, key, value = qkv.split([heads, heads_kv, heads_kv], -2)
            parts = neighborhood_attention_generic(
                query, key, value, (3, 4), **window, query_origin=origin, key_origin=origin,
                rpb=rpb, backend=f"{backend}-fna", return_lse=True,
            )  # fmt: skip
            results = [
                [out, lse, *torch.autograd.grad(out.float().sin().sum() + lse.sum(), leaves)]
                for out, lse in (packed, parts)
            ]
        for a, b in zip(*results):
            assert bool(a.isfinite().all())
            assert torch.equal(a, b), (backend, options, float((a - b).abs().max()))
