"""Numbers that are not tame: what attention has to give for them, and a check that a backend does.

The rule (docs/semantics.md states it for users). All arithmetic is IEEE arithmetic in the
accumulation dtype, float64 for float64 and float32 for all others, to which the scale is rounded.
Only the keys that a query sees take part: its window inside the key box, its sequence, and the
additional keys that its batch entry has. Nothing else can change a result, whatever it holds.

For one query, with scores ``s_j = (q · k_j) * scale + bias_j`` (the product first, then the scale):

- It sees nothing if there is no key or all scores are -inf. Then ``out`` is 0, ``lse`` is -inf, and
  it adds exactly zero to every gradient: whatever its gradients, and the values behind the scores
  of -inf, hold.
- A score that is NaN or +inf makes ``out`` and ``lse`` NaN, all of ``out``.
- Otherwise ``lse = log(sum(exp(s_j)))``, the weights are ``p_j = exp(s_j - lse)``, at most 1, and
  ``out = sum(p_j * v_j)``. A weight of zero times an infinite value is NaN, as anywhere else.

Gradients come from ``out`` and ``lse``, with ``delta = sum(grad_out * out) - grad_lse``:
``ds_j = p_j * (grad_out · v_j - delta)``, where p_j is NaN if lse is; then ``ds_j * k_j`` to the
query, ``ds_j * q`` to the key, ``p_j * grad_out`` to the value, ``ds_j`` to the bias. The sums of
the first two are multiplied by the scale at last; where that is infinite, by the largest finite
number.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from cases import Case
from checks import Inputs, Results, _full_bias, full_mask, make_inputs, run
from torch import Tensor

CLASSES = ("finite", "NaN", "+inf", "-inf")


def classes(tensor: Tensor) -> Tensor:
    """What each number is, as an index into CLASSES."""
    kinds = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
    kinds[tensor.isnan()] = 1
    kinds[tensor == torch.inf] = 2
    kinds[tensor == -torch.inf] = 3
    return kinds


def by_the_rule(case: Case, inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> Results:
    """Output, logsumexp and gradients, all pairs at once: nothing of one that is not seen enters a
    sum."""
    dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    q, k, v = (
        t.detach().cpu().to(dtype).flatten(1, -3) for t in (inputs.query, inputs.key, inputs.value)
    )
    batch, queries, heads, head_dim = q.shape
    own, heads_kv = k.shape[1:3]
    visible = full_mask(case)
    seen = visible.expand(batch, -1, -1)
    bias = torch.zeros(heads, queries, own, dtype=dtype)
    if inputs.rpb is not None:
        bias = _full_bias(case, inputs.rpb.detach().cpu().to(dtype))
    if inputs.additional_keys is not None:
        more = (inputs.additional_keys, inputs.additional_values)
        more_k, more_v = (t.detach().cpu().to(dtype) for t in more)
        k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
        lengths = torch.tensor(case.additional_lengths or (case.additional,) * batch)
        there = torch.arange(case.additional) < lengths[:, None]
        seen = torch.cat([seen, there[:, None].expand(-1, queries, -1)], -1)
        bias = torch.nn.functional.pad(bias, (0, case.additional))
    grad_out = grad_out.cpu().to(dtype).reshape(batch, queries, 1, heads, -1)
    grad_lse = grad_lse.cpu().to(dtype).reshape(batch, queries, 1, heads)
    # As a number of that dtype, so that the product overflows as a kernel's does.
    scale = case.scale if case.scale is not None else head_dim**-0.5
    factor = torch.tensor(scale, dtype=torch.float64).to(dtype)
    limit = torch.finfo(dtype).max
    # [batch, queries, keys, heads, features] from here on.
    q = q[:, :, None]
    keys, values = (t[:, None].repeat_interleave(heads // heads_kv, -2) for t in (k, v))
    scores = (keys * q).sum(-1) * factor + bias.permute(1, 2, 0)
    scores = scores.masked_fill(~seen[..., None], -math.inf)
    sees_nothing = (scores == -math.inf).all(2, keepdim=True)
    apart = ~seen[..., None] | sees_nothing

    def taken(terms: Tensor) -> Tensor:
        return terms.masked_fill(apart[..., None] if terms.dim() == 5 else apart, 0.0)

    top = scores.amax(2, keepdim=True)
    lse = top + (scores - top).exp().sum(2, keepdim=True).log()
    weights = taken((scores - lse).clamp(max=0).exp())
    out = taken(weights[..., None] * values).sum(2, keepdim=True)
    delta = (grad_out * out.to(inputs.query.dtype).to(dtype)).sum(-1) - grad_lse
    ds = taken(weights * ((values * grad_out).sum(-1) - delta))
    dq = taken(ds[..., None] * keys).sum(2)
    dk, dv = (
        taken(terms).sum(1).unflatten(2, (heads_kv, -1)).sum(3)
        for terms in (ds[..., None] * q, weights[..., None] * grad_out)
    )
    dbias = ds[:, :, :own].sum(0).permute(2, 0, 1)
    out, lse = out[:, :, 0], lse.masked_fill(sees_nothing, -math.inf)[:, :, 0]
    factor = factor.clamp(-limit, limit)
    dq, dk = dq * factor, dk * factor
    gradients = {
        "query": dq.view(inputs.query.shape),
        "key": dk[:, :own].reshape(inputs.key.shape),
        "value": dv[:, :own].reshape(inputs.value.shape),
    }
    if inputs.rpb is not None:
        gradients["rpb"] = _bias_gradient(case, visible, dbias)
    if inputs.additional_keys is not None:
        gradients["additional_keys"], gradients["additional_values"] = dk[:, own:], dv[:, own:]
    tokens = inputs.query.shape[1:-2]
    return Results(out.unflatten(1, tokens), lse.unflatten(1, tokens), gradients)


def _bias_gradient(case: Case, visible: Tensor, dbias: Tensor) -> Tensor:
    """Sums over the pairs that read the same entry of the table."""
    shape = (case.heads, *(2 * size - 1 for size in case.kernel_size))
    entries = torch.arange(math.prod(shape[1:]), dtype=torch.float64).view(1, *shape[1:])
    entry = _full_bias(case, entries.expand(shape))[0].long()
    table = torch.zeros(case.heads, math.prod(shape[1:]), dtype=dbias.dtype)
    table.index_add_(1, entry[visible], dbias[:, visible])
    return table.view(shape)


def check(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    *,
    spoil: Callable[[Inputs, Tensor, Tensor], None] | None = None,
    backward: bool = True,
    device: str = "cpu",
    values: bool = True,
    **knobs: Any,
) -> None:
    """Assert that every number of output, logsumexp and gradients is in the class of the rule's.

    Args:
        case: The problem; small, the rule holds all pairs.
        backend: As in ``backend=``, with its suffix.
        dtype: Of the inputs.
        spoil: Called without gradients with the inputs, the gradient of the output and that of the
            logsumexp, to write into them.
        backward: Whether to check gradients.
        device: Where to run.
        values: Whether finite numbers have to be close, too.
        knobs: Further arguments of the public function.
    """
    inputs = make_inputs(case, dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rows = inputs.query.shape[:-1]
    grad_out = torch.randn(*rows, case.head_dim_v, generator=generator).to(dtype)
    grad_lse = torch.randn(rows, generator=generator).to(lse_dtype)
    if spoil is not None:
        with torch.no_grad():
            spoil(inputs, grad_out, grad_lse)
    expected = by_the_rule(case, inputs, grad_out, grad_lse)
    there = Inputs(
        **{n: t.detach().to(device).requires_grad_(backward) for n, t in inputs.tensors().items()}
    )
    out, lse = run(case, there, backend, **knobs)
    gradients: dict[str, Tensor] = {}
    if backward:
        given = [grad_out.to(device), grad_lse.to(device)]
        leaves = there.tensors()
        parts = torch.autograd.grad([out, lse], list(leaves.values()), given)
        gradients = dict(zip(leaves, parts))
    else:
        expected = replace(expected, gradients={})
    got = Results(out.detach(), lse.detach(), gradients).tensors()
    for name, right in expected.tensors().items():
        assert_same_class(f"{case.name}: {name}", got[name].cpu(), right.to(got[name].dtype))
        finite = right.to(got[name].dtype).isfinite()
        if values and bool(finite.any()):
            right = right.double()[finite]
            tolerance = 64 * torch.finfo(got[name].dtype).eps * (1 + float(right.abs().max()))
            error = float((got[name].cpu().double()[finite] - right).abs().max())
            assert error <= tolerance, f"{case.name}: {name} is wrong by {error:.3g}"


def assert_same_class(name: str, got: Tensor, right: Tensor) -> None:
    """Finite, NaN, +inf and -inf stand in the same places."""
    assert got.shape == right.shape, f"{name}: shape {got.shape}, expected {right.shape}"
    ours, theirs = classes(got), classes(right)
    if torch.equal(ours, theirs):
        return
    wrong = (ours != theirs).nonzero()
    at = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{name}: {len(wrong)} of {got.numel()} numbers are in another class, the first at {at} is "
        f"{CLASSES[int(ours[at])]} instead of {CLASSES[int(theirs[at])]}"
    )


NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Where a number can be put; not all cases have all of them.
PLACES = (
    "query", "key", "value", "rpb", "additional_keys", "additional_values", "grad_out", "grad_lse",
)  # fmt: skip


def put(number: float, place: str, seed: int = 0) -> Callable[[Inputs, Tensor, Tensor], None]:
    """A `spoil` for :func:`check` that writes a number somewhere into one tensor, if the case has
    it."""

    def spoil(inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> None:
        tensors = inputs.tensors() | {"grad_out": grad_out, "grad_lse": grad_lse}
        if place in tensors and tensors[place].numel():
            index = [Random(seed + i).randrange(n) for i, n in enumerate(tensors[place].shape)]
            tensors[place][tuple(index)] = number

    return spoil


def put_many(seed: int) -> Callable[[Inputs, Tensor, Tensor], None]:
    """A `spoil` with one to four numbers that are not finite, anywhere."""
    random = Random(seed)

    def spoil(inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> None:
        for _ in range(random.randint(1, 4)):
            number, place = random.choice(list(NUMBERS.values())), random.choice(PLACES)
            put(number, place, random.randrange(1 << 30))(inputs, grad_out, grad_lse)

    return spoil


def mask_by_bias(inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> None:
    """A `spoil` that lets a query see earlier tokens of the first axis alone: the first see none,
    though their gradients are not finite."""
    middle = inputs.rpb.shape[1] // 2
    inputs.rpb[:, middle:] = -math.inf
    grad_out[:, 0] = math.nan
    grad_lse[:, 0] = math.inf


def all_minus_infinity(inputs: Inputs, grad_out: Tensor, grad_lse: Tensor) -> None:
    """A `spoil` with scores of -inf in one batch entry, and values that must not be seen there."""
    inputs.query[0] = 1.0
    inputs.key[0] = -math.inf
    inputs.value[0] = math.nan
    if inputs.additional_keys is not None:
        inputs.additional_keys[0] = -math.inf


# Small, since the rule holds all pairs; one for each way that a backend may take.
CASES = [
    Case("window", (11,), (3,), head_dim=8),
    Case("window_rpb", (10,), (5,), head_dim=8, rpb=True),
    Case("dilated_strided", (12,), (4,), (2,), (2,), head_dim=8),
    Case("causal", (12,), (4,), (2,), (2,), (True,), head_dim=8),
    Case("grid", (5, 6), (3, 2), dilation=(1, 2), head_dim=8, head_dim_v=16, batch=1),
    Case("grid_gqa_rpb", (4, 5), (3, 3), head_dim=8, heads=4, heads_kv=2, rpb=True, batch=1),
    Case("context", (9,), (3,), head_dim=8, additional=3),
    Case("context_lengths", (9,), (3,), head_dim=8, additional=3, additional_lengths=(2, 0)),
    Case("context_rpb", (6,), (3,), head_dim=8, additional=2, rpb=True),
    Case("full_window", (3, 4), (3, 4), head_dim=8),
    Case("full_window_rpb", (3, 3), (3, 3), head_dim=8, rpb=True),
    Case("full_window_causal", (9,), (9,), is_causal=(True,), head_dim=8, head_dim_v=16),
    Case("box", (4,), (5,), grid=(16,), query_origin=(2,), key_tokens=(7,), key_origin=(3,)),
    Case("dense", (7,), None, head_dim=8, key_tokens=(9,)),
    Case("dense_gqa", (7,), None, head_dim=8, heads=4, heads_kv=2, head_dim_v=16),
    Case("dense_causal", (9,), None, head_dim=8, is_causal=(True,), key_tokens=(6,)),
    Case("packed", (12,), None, head_dim=8, batch=1, key_tokens=(11,), lengths_q=(5, 0, 3, 4),
         lengths_kv=(4, 2, 0, 5)),
]  # fmt: skip
SCALES = (0.0, -0.5, 1e-45, 1e30, -1e30, 1e308, -1e308)
