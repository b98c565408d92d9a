"""Problems drawn at random, over every parameter of the public functions, and what is right.

A problem is a kind and a seed; :func:`check` computes it and compares. wrong_calls.py has those
that are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import inf, nan
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import Case, random_attention, random_case, random_lengths, varied
from checks import check_problem
from memory import DISTINCT, LAYOUTS, nan_filled_empties
from torch import Tensor

import natten
from natten.functional import neighborhood_attention_generic
from natten.functional.neighborhood import packed_attention
from natten.varlen import GridLayout, configure_varlen, neighborhood_attention_varlen
from natten.window import Axis, bounds

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the largest number, where a result is compared with one in float64 alone.
TOLERANCE = {
    torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.06, torch.float16: 0.01,
}  # fmt: skip


class On(NamedTuple):
    """Where problems are computed."""

    backend: str | None = None
    device: str = "cpu"
    max_tokens: int = 300
    dtypes: tuple[torch.dtype, ...] = FLOATS
    backward: bool = True
    factor: float = 2.0
    product_rounding: float = 0.0  # of check_problem
    changed: Callable[[Case], Case] = lambda case: case  # of windows and attention

    def named(self, kind: str = "fna") -> str | None:
        """As functions take it."""
        has_suffix = self.backend not in (None, "cpu", "reference")
        return f"{self.backend}-{kind}" if has_suffix else self.backend


@contextmanager
def sharing(splits: int) -> Iterator[None]:
    """Inside, so many programs share the columns of a row tile, on GPUs and in the interpreter,
    however many there are."""
    from natten.functional.backends.triton import tiles

    with mock.patch.object(tiles, "splits", return_value=splits):
        yield


def _window(seed: int, on: On) -> None:
    case = varied(random_case(seed, max_tokens=on.max_tokens), seed)
    _check_case(case, seed, on)


def _attention(seed: int, on: On) -> None:
    _check_case(varied(random_attention(seed, on.max_tokens), seed), seed, on)


def _check_case(case: Case, seed: int, on: On) -> None:
    dtype = on.dtypes[seed // 4 % len(on.dtypes)]
    case = on.changed(case)
    if not on.backward:
        case = replace(case, frozen=())
    # Differences of products cancel, those of equal rows to nothing; in float64, what is taken for
    # exact is rounded as well.
    rounding = 2.0**-50 if dtype == torch.float64 else 2.0**-22
    if dtype == torch.float32:
        rounding = max(rounding, on.product_rounding)
    check_problem(
        case, on.backend, dtype, on.device, factor=on.factor, backward=on.backward,
        product_rounding=rounding,
    )  # fmt: skip


def _compare(
    title: str,
    seed: int,
    on: On,
    tensors: dict[str, Tensor],
    compute: Callable[..., Any],
    exact: Callable[..., Any],
    fixed: tuple[str, ...] = (),
) -> None:
    """``compute`` gives what ``exact`` gives in float64, with all gradients.

    Args:
        title: For errors.
        seed: Of layouts and the dtype.
        on: Where.
        tensors: By name, the arguments of both.
        compute: Returns floating-point tensors.
        exact: Likewise.
        fixed: Tensors whose numbers must not move: they get plain layouts.
    """
    random = Random(f"layouts of {seed}")
    dtype = on.dtypes[seed % len(on.dtypes)]
    leaves = {}
    for name, tensor in tensors.items():
        tensor = tensor.to(on.device)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if tensor.numel() and tensor.dim() and random.random() < 0.7:
            kinds = DISTINCT if name in fixed else LAYOUTS
            if tensor.is_floating_point():
                tensor = random.choice(kinds)(tensor, random)
        leaves[name] = tensor.detach().requires_grad_(on.backward and tensor.is_floating_point())
    doubles = {
        name: t.detach().clone(memory_format=torch.contiguous_format).double().requires_grad_()
        if t.is_floating_point() else t
        for name, t in leaves.items()
    }  # fmt: skip
    # FlexAttention cannot be traced through patched functions.
    filled = nullcontext if on.backend == "flex" else nan_filled_empties
    with filled():
        got = compute(**leaves)
    right = exact(**doubles)
    pairs = [(f"result {i}", *pair) for i, pair in enumerate(zip(got, right, strict=True))]
    if on.backward:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in right]

        def gradients(results: Any, inputs: dict[str, Tensor]) -> Any:
            loss = sum(
                (t.masked_fill(t == -inf, 0.0) * w.to(t.dtype)).sum()
                for t, w in zip(results, weights)
            )
            wanted = [t for t in inputs.values() if t.requires_grad]
            return torch.autograd.grad(loss, wanted, allow_unused=True)

        with filled():
            mine = gradients(got, leaves)
        names = [name for name, t in leaves.items() if t.requires_grad]
        for name, a, b in zip(names, mine, gradients(right, doubles), strict=True):
            if a is not None or b is not None:
                like = doubles[name]
                a, b = (torch.zeros_like(like) if g is None else g for g in (a, b))
                pairs.append((f"gradient of {name}", a, b))
    for name, a, b in pairs:
        assert a.shape == b.shape, f"{title}: {name} has shape {a.shape}, expected {b.shape}"
        if not b.numel():
            continue
        limit = TOLERANCE[dtype] * (1 + float(b.detach().nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(
            a.detach().double(), b.detach().double(), rtol=0, atol=limit, equal_nan=True,
            msg=lambda text, name=name: f"{title}: {name}: {text}",
        )  # fmt: skip


def _packed_heads(seed: int, on: On) -> None:
    """One tensor of the heads of query, key and value."""
    case = random_case(seed, max_tokens=on.max_tokens)
    case = on.changed(case)
    random = Random(f"packed {seed}")
    heads, heads_kv, dim = case.heads, case.heads_kv, case.head_dim
    tokens = case.key_tokens
    tensors = {"qkv": torch.randn(case.batch, *tokens, heads + 2 * heads_kv, dim)}
    if case.rpb:
        tensors["rpb"] = torch.randn(heads, *(2 * k - 1 for k in case.kernel_size))
    if case.sink:
        tensors["sink"] = torch.randn(heads)
    for name in ("key_mask", "query_mask"):
        if getattr(case, name):
            tensors[name] = torch.rand(case.batch, *tokens) < 0.7
    window = {
        name: getattr(case, name)
        for name in ("kernel_size", "stride", "dilation", "is_causal", "is_circular")
    }
    window |= {"softcap": case.softcap, "scale": random.choice((None, 0.3))}
    origin = None if case.grid is None else case.key_origin
    window["grid"] = case.grid

    def compute(qkv: Tensor, **more: Tensor) -> Any:
        return packed_attention(qkv, heads_kv, origin=origin, backend=on.named(), **window, **more)

    def exact(qkv: Tensor, **more: Tensor) -> Any:
        return neighborhood_attention_generic(
            *qkv.split([heads, heads_kv, heads_kv], -2), query_origin=origin, key_origin=origin,
            backend="reference", return_lse=True, **window, **more,
        )  # fmt: skip

    _compare(f"packed heads {seed}: {window}", seed, on, tensors, compute, exact)


def _grids(seed: int, on: On) -> None:
    """Grids of different sizes in one batch."""
    random = Random(f"grids {seed}")
    rank = random.choice((1, 2, 2, 3))
    longest = max(2, int(on.max_tokens ** (1 / rank) / 2))
    kinds = [tuple(random.randint(1, longest) for _ in range(rank)) for _ in range(3)]
    if random.random() < 0.1:
        kinds[0] = (0, *kinds[0][1:])
    sizes = [random.choice(kinds) for _ in range(random.randint(1, 5))]
    layout = GridLayout(sizes)
    heads_kv = random.choice((1, 2))
    heads, dim, dim_v = heads_kv * random.choice((1, 2)), random.choice((8, 16)), 8
    tensors = {
        "query": torch.randn(1, layout.total, heads, dim),
        "key": torch.randn(1, layout.total, heads_kv, dim),
        "value": torch.randn(1, layout.total, heads_kv, dim_v),
    }
    if random.random() < 0.3:
        context = random.choice((1, 5))
        tensors["additional_keys"] = torch.randn(len(sizes), context, heads_kv, dim)
        tensors["additional_values"] = torch.randn(len(sizes), context, heads_kv, dim_v)
        if random.random() < 0.5:
            lengths = random_lengths(random, len(sizes), context)
            tensors["additional_lengths"] = torch.tensor(lengths)
    for name in ("key_mask", "query_mask"):
        if random.random() < 0.2:
            tensors[name] = torch.rand(1, layout.total) < 0.7
    options: dict[str, Any] = {"scale": random.choice((None, 0.3))}
    if random.random() < 0.3:
        options["softcap"] = 2.0
    if random.random() < 0.3:
        tensors["sink"] = torch.randn(heads)
    causal = tuple(random.random() < 0.2 for _ in range(rank))
    clip = random.random() < 0.5
    windows: list[tuple[Any, Any, Any]] = []
    for size in layout.sizes:
        # The same for grids of one size, or not.
        drawn = Random(f"window {seed} {size}") if random.random() < 0.7 else random
        room = [max(n, 1) for n in size]
        dilation = [drawn.randint(1, max(n // 2, 1)) for n in room]
        kernel = [drawn.randint(1, n // d) for n, d in zip(room, dilation)]
        windows.append((tuple(kernel), tuple(drawn.randint(1, k) for k in kernel), tuple(dilation)))
    given: dict[str, Any] = {"is_causal": causal}
    if clip:
        options["clip_window"] = True
        kernel = tuple(random.randint(1, longest + 3) for _ in range(rank))
        given |= {"kernel_size": kernel, "stride": min(kernel), "dilation": random.choice((1, 2))}
        windows = [tuple(given[name] for name in ("kernel_size", "stride", "dilation"))] * len(
            sizes
        )
    else:
        names = ("kernel_size_list", "stride_list", "dilation_list")
        given |= dict(zip(names, map(list, zip(*windows, strict=True))))
    packing = random.randrange(3)

    def compute(**parts: Tensor) -> Any:
        named = {"backend": on.named(), **given}
        if packing == 0:
            named = {"metadata": configure_varlen(sizes, **named)}
        else:
            named["metadata" if packing == 1 else "token_layout_list"] = (
                layout if packing == 1 else sizes
            )
        return neighborhood_attention_varlen(**parts, **named, **options, return_lse=True)

    def exact(**parts: Tensor) -> Any:
        whole = {name: parts.pop(name) for name in ("sink",) if name in parts}
        own = {n: t.split(1) for n, t in parts.items() if n.startswith("additional")}
        rows = {n: layout.unpack(t) for n, t in parts.items() if n not in own}
        found = []
        for i, (kernel, stride, dilation) in enumerate(windows):
            out, lse = neighborhood_attention_generic(
                **{n: t[i][None] for n, t in rows.items()}, **{n: t[i] for n, t in own.items()},
                **whole, **options, kernel_size=kernel, stride=stride, dilation=dilation,
                is_causal=causal, backend="reference", return_lse=True,
            )  # fmt: skip
            found.append((out[0], lse[0]))
        return [layout.pack(list(results)) for results in zip(*found, strict=True)]

    title = f"grids {seed}: {sizes} {given} {options}"
    _compare(title, seed, on, tensors, compute, exact, ("additional_keys", "additional_values"))


def _groups(seed: int, on: On) -> None:
    """Groups of heads with windows of their own."""
    random = Random(f"groups {seed}")
    rank = random.choice((1, 2, 3))
    longest = max(2, int(on.max_tokens ** (1 / rank)))
    tokens = tuple(random.randint(1, longest) for _ in range(rank))
    groups = random.choice((1, 2, 3))
    heads_kv = groups * random.choice((1, 2)) if random.random() < 0.7 else 1
    heads = max(heads_kv, groups) * random.choice((1, 2))
    batch, dim = random.choice((1, 2)), random.choice((8, 16))
    windows = []
    for _ in range(groups):
        dilation = tuple(random.randint(1, max(n // 2, 1)) for n in tokens)
        kernel = tuple(random.randint(1, n // d) for n, d in zip(tokens, dilation))
        windows.append((kernel, tuple(random.randint(1, k) for k in kernel), dilation))
    tensors = {
        "query": torch.randn(batch, *tokens, heads, dim),
        "key": torch.randn(batch, *tokens, heads_kv, dim),
        "value": torch.randn(batch, *tokens, heads_kv, 8),
    }
    if random.random() < 0.4:
        tensors["sink"] = torch.randn(heads)
    if random.random() < 0.4:
        tensors["additional_keys"] = torch.randn(batch, 3, heads_kv, dim)
        tensors["additional_values"] = torch.randn(batch, 3, heads_kv, 8)
    if random.random() < 0.3:
        tensors["key_mask"] = torch.rand(batch, *tokens) < 0.7
    sizes = [list(values) for values in zip(*windows, strict=True)]

    def compute(**parts: Tensor) -> Any:
        function = getattr(natten, f"na{rank}d")
        return function(**parts, kernel_size=sizes[0], stride=sizes[1], dilation=sizes[2],
                        backend=on.named(), return_lse=True)  # fmt: skip

    def exact(**parts: Tensor) -> Any:
        # Every query head with a key head of its own.
        for name in ("key", "value", "additional_keys", "additional_values"):
            if name in parts:
                parts[name] = parts[name].repeat_interleave(heads // heads_kv, -2)
        mask = {"key_mask": parts.pop("key_mask")} if "key_mask" in parts else {}
        found = []
        for group, (kernel, stride, dilation) in enumerate(windows):
            own = slice(group * heads // groups, (group + 1) * heads // groups)
            found.append(
                neighborhood_attention_generic(
                    **{n: t[own] if n == "sink" else t[..., own, :] for n, t in parts.items()},
                    **mask, kernel_size=kernel, stride=stride, dilation=dilation,
                    backend="reference", return_lse=True,
                )
            )  # fmt: skip
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs, -2), torch.cat(lses, -1)

    _compare(f"groups {seed}: {tokens} {windows}", seed, on, tensors, compute, exact)


def _merge(seed: int, on: On) -> None:
    """Attention over several contexts; some saw nothing, and their outputs may hold anything."""
    random = Random(f"merge {seed}")
    branches = random.randint(2, 4)
    shape = [random.choice((1, 2, 3)), random.randint(1, 40), random.choice((1, 3)),
             random.choice((1, 8, 24))]  # fmt: skip
    tensors = {}
    for i in range(branches):
        out, lse = torch.randn(shape), torch.randn(shape[:-1]) * random.choice((1, 30))
        unseen = torch.rand(shape[:-1]) < random.choice((0.0, 0.3))
        tensors[f"out_{i}"] = out.masked_fill(unseen[..., None], nan)
        tensors[f"lse_{i}"] = lse.masked_fill(unseen, -inf)

    def parts(named: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outs, lses = ([named[f"{n}_{i}"] for i in range(branches)] for n in ("out", "lse"))
        return outs, lses

    def compute(**named: Tensor) -> Any:
        outs, lses = parts(named)
        return natten.merge_attentions(outs, lses, return_lse=True, torch_compile=seed % 2 == 0)

    def exact(**named: Tensor) -> Any:
        outs, lses = (torch.stack(tensors) for tensors in parts(named))
        unseen = lses == -inf
        nothing = unseen.all(0)
        lses = lses.masked_fill(nothing, 0.0)
        shares = lses.softmax(0).masked_fill(unseen, 0.0)
        out = (shares[..., None] * outs.masked_fill(unseen[..., None], 0.0)).sum(0)
        return out, lses.logsumexp(0).masked_fill(nothing, -inf)

    names = tuple(tensors)
    _compare(f"merge {seed}: {branches} of {shape}", seed, on, tensors, compute, exact, names)


def _neighbors(axes: list[Axis]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of each slot of every query, the key token, whether there is one, and the entry of a bias
    along each axis: all [tokens, slots]."""
    tokens, exist = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    entries: list[Tensor] = []

    def joined(before: Tensor, own: Tensor) -> Tensor:
        both = before[:, None, :, None] + own[None, :, None, :]
        return both.flatten(2).flatten(0, 1)

    for axis in axes:
        index = torch.arange(axis.length)
        start, end = bounds(index, *axis)
        position = start[:, None] + torch.arange(axis.kernel_size)
        there = position < end[:, None]
        entry = position - (index // axis.dilation)[:, None] + axis.kernel_size - 1
        # Around a ring, positions beyond its ends are those at the others.
        position = position % (-(-axis.length // axis.dilation)) if axis.is_circular else position
        own = (index % axis.dilation)[:, None] + axis.dilation * position
        own, entry = own.masked_fill(~there, 0), entry.masked_fill(~there, 0)
        entries = [joined(before, torch.zeros_like(own)) for before in entries]
        entries.append(joined(torch.zeros_like(tokens), entry))
        tokens = joined(tokens * axis.length, own)
        exist = ~joined((~exist).long(), (~there).long()).bool()
    return tokens, exist, entries


def _products(seed: int, on: On) -> None:
    """The two steps with the scores in between."""
    random = Random(f"products {seed}")
    rank = random.choice((1, 2, 2, 3))
    longest = max(2, int((on.max_tokens / 3) ** (1 / rank)))
    tokens = [random.randint(1, longest) for _ in range(rank)]
    dilation = tuple(random.choice((1, 1, random.randint(1, n))) for n in tokens)
    kernel = tuple(random.randint(1, min(n // d, 7)) for n, d in zip(tokens, dilation))
    stride = tuple(random.choice((1, random.randint(1, k))) for k in kernel)
    causal = tuple(random.random() < 0.3 for _ in range(rank))
    rings = tuple(not is_causal and random.random() < 0.25 for is_causal in causal)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
        if rings[axis]:
            tokens[axis] = max(tokens[axis] // (s * d), -(-k // s)) * s * d
    batch, heads, dim = random.choice((1, 2)), random.choice((1, 3)), random.choice((1, 8, 20))
    tensors = {
        name: torch.randn(batch, heads, *tokens, dim) for name in ("query", "key", "value")
    }  # fmt: skip
    if random.random() < 0.3:
        tensors["additional_keys"] = torch.randn(batch, heads, 4, dim)
        tensors["additional_values"] = torch.randn(batch, heads, 4, dim)
    if not any(causal) and random.random() < 0.4:
        tensors["rpb"] = torch.randn(heads, *(2 * k - 1 for k in kernel))
    axes = [Axis(*axis) for axis in zip(tokens, kernel, stride, dilation, causal, rings)]
    window = {
        "kernel_size": kernel, "stride": stride, "dilation": dilation, "is_causal": causal,
        "is_circular": rings,
    }  # fmt: skip

    def compute(query: Tensor, key: Tensor, value: Tensor, **more: Tensor) -> Any:
        values = {n: more.pop(n) for n in ("additional_values",) if n in more}
        scores = getattr(natten.functional, f"na{rank}d_qk")(query, key, **window, **more)
        out = getattr(natten.functional, f"na{rank}d_av")(
            scores.softmax(-1).to(value.dtype), value, **window, **values
        )
        return scores, out

    def exact(query: Tensor, key: Tensor, value: Tensor, **more: Tensor) -> Any:
        at, exist, entries = _neighbors(axes)
        at, exist = at.to(query.device), exist.to(query.device)
        query, key, value = (t.flatten(2, -2) for t in (query, key, value))
        scores = (query[:, :, :, None] * key[:, :, at]).sum(-1)
        if "rpb" in more:
            scores = scores + more["rpb"][(slice(None), *(e.to(query.device) for e in entries))]
        scores = scores.masked_fill(~exist, -inf)
        if "additional_keys" in more:
            scores = torch.cat([scores, query @ more["additional_keys"].mT], -1)
        weights = scores.softmax(-1)
        out = (weights[..., : at.shape[1], None] * value[:, :, at]).sum(-2)
        if "additional_values" in more:
            out = out + weights[..., at.shape[1] :] @ more["additional_values"]
        return scores.unflatten(2, tokens), out.unflatten(2, tokens)

    _compare(f"products {seed}: {tokens} {window}", seed, on, tensors, compute, exact)


def _modules(seed: int, on: On) -> None:
    """A module, and what its projections and the operation give."""
    case = random_case(seed, max_tokens=min(on.max_tokens, 120))
    random = Random(f"module {seed}")
    rank, heads, heads_kv, dim = case.rank, case.heads, case.heads_kv, case.head_dim
    tokens = case.grid or case.key_tokens
    window = {
        name: getattr(case, name)
        for name in ("kernel_size", "stride", "dilation", "is_causal", "is_circular")
    }
    scale = random.choice((None, 0.3))
    dtype = on.dtypes[seed % len(on.dtypes)]
    torch.manual_seed(seed)
    module = getattr(natten, f"NeighborhoodAttention{rank}D")(
        12, heads, **window, qkv_bias=random.random() < 0.5, qk_scale=scale, head_dim=dim,
        rel_pos_bias=case.rpb, num_kv_heads=heads_kv, softcap=case.softcap, sink=case.sink,
        dtype=dtype, device=on.device,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    tensors = {"x": torch.randn(case.batch, *tokens, 12)}
    if case.key_mask:
        tensors["mask"] = torch.rand(case.batch, *tokens) < 0.7
    weights = dict(module.named_parameters())
    exact_weights = {name: p.detach().double() for name, p in weights.items()}

    def compute(x: Tensor, **more: Tensor) -> Any:
        return [module(x, **more)]

    def exact(x: Tensor, mask: Tensor | None = None) -> Any:
        def linear(name: str, x: Tensor) -> Tensor:
            bias = exact_weights.get(f"{name}.bias")
            return torch.nn.functional.linear(x, exact_weights[f"{name}.weight"], bias)

        qkv = linear("qkv", x).unflatten(-1, (heads + 2 * heads_kv, dim))
        out = neighborhood_attention_generic(
            *qkv.split([heads, heads_kv, heads_kv], -2), **window, scale=scale,
            rpb=exact_weights.get("rpb"), sink=exact_weights.get("sink"), softcap=case.softcap,
            key_mask=mask, query_mask=mask, backend="reference",
        )  # fmt: skip
        return [linear("proj", out.flatten(-2))]

    _compare(f"module {seed}: {window}", seed, on, tensors, compute, exact)


def _float8(seed: int, on: On) -> None:
    """8-bit numbers, rounded before or on the way, beside their products in float64."""
    random = Random(f"float8 {seed}")
    case = random_case(seed, max_tokens=on.max_tokens)
    tokens, dilation = case.grid or case.key_tokens, case.dilation
    features, values, backend = case.head_dim, case.head_dim_v, "reference"
    on_hopper = on.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    if on_hopper:
        features = values = random.choice((64, 128))
        dilation, backend = (1,) * case.rank, None
    dtype = random.choice((torch.bfloat16, torch.float16))
    given, rounded = [], []
    for heads, width in (
        (case.heads, features), (case.heads_kv, features), (case.heads_kv, values),
    ):  # fmt: skip
        magnitudes = torch.tensor(
            [random.choice((0.0, 0.01, 1.0, 1.0, 30.0)) for _ in range(heads)]
        )
        tensor = torch.randn(case.batch, *tokens, heads, width) * magnitudes[:, None]
        tensor = tensor.to(on.device, dtype)
        scale = random.choice((None, 0.25, magnitudes.to(on.device) + 0.1))
        tensor = random.choice(LAYOUTS)(tensor, random) if tensor.numel() else tensor
        rounded.append(natten.to_float8(tensor, scale))
        given.append(tensor if scale is None and random.random() < 0.5 else rounded[-1])
    window = {
        "kernel_size": case.kernel_size, "stride": case.stride, "dilation": dilation,
        "is_causal": case.is_causal, "scale": case.scale, "return_lse": True,
    }  # fmt: skip
    got = natten.float8_attention(*given, **window, backend=backend)
    doubles = [r.to(torch.float64) for r in rounded]
    right = getattr(natten, f"na{case.rank}d")(*doubles, **window, backend="reference")
    assert got[0].dtype == (dtype if len({*map(type, given)}) == 2 or given[0] is not rounded[0]
                            else torch.bfloat16)  # fmt: skip
    # Weights of three bits on a GPU, float32 and the result's rounding in the reference.
    largest = float(doubles[2].abs().max()) if doubles[2].numel() else 0.0
    limits = (0.07 if on_hopper else 0.01) * largest + 1e-7, 1e-3
    for name, a, b, limit in zip(("result", "logsumexp"), got, right, limits, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-3, atol=limit,
            msg=lambda text, name=name: f"float8 {seed}: {window}: {name}: {text}",
        )  # fmt: skip


KINDS: dict[str, Callable[[int, On], None]] = {
    "window": _window,
    "attention": _attention,
    "packed": _packed_heads,
    "grids": _grids,
    "groups": _groups,
    "merge": _merge,
    "products": _products,
    "modules": _modules,
    "float8": _float8,
}
# Those that let a backend be named.
NAMING = ("window", "attention", "packed", "grids", "groups")


def check(kind: str, seed: int, on: On) -> None:
    """Compute a valid problem, and compare it with what is right."""
    torch.manual_seed(seed)
    KINDS[kind](seed, on)
