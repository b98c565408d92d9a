"""Calls with one thing wrong, and the exception that has to say so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, nan
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Case, random_attention, random_case
from checks import call, make_inputs
from problems import On
from torch import Tensor

import natten
from natten.varlen import GridLayout, neighborhood_attention_varlen


class Wrong(NamedTuple):
    """A call that has to raise.

    Attributes:
        what: In words.
        changes: Arguments that replace those of a valid call; ``...`` leaves one out.
        mentions: One of these is in the exception's text.
        kind: What is raised.
    """

    what: str
    changes: dict[str, Any]
    mentions: tuple[str, ...]
    kind: type[Exception] | tuple[type[Exception], ...] = ValueError


HUGE = (2**31, 2**63, 10**30)
NO_INTEGERS = (
    3.0, "3", b"\3", 3j, nan, {3}, {"3": 3}, object(), torch.tensor([3]), np.float64(3), int, inf,
)  # fmt: skip
NO_BOOLS = (1, 0, "yes", 1.0, b"", torch.tensor(True), np.True_, object(), {})
NO_NUMBERS = (nan, inf, -inf, "1", True, 10**400, 1j, [1.0], torch.tensor([1.0, 2.0]), object())
NO_TENSORS = (None, 3, [1.0], np.zeros(3), "tensor", object)


def _wrong_integers(name: str, rank: int, minimum: int) -> Iterator[Wrong]:
    """What is wrong with one integer for each axis, whatever the others are."""
    low = minimum - 1 if name != "kernel_size" else -2
    for value in (low, -(2**40), *HUGE, *NO_INTEGERS):
        yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))
        inside = [max(minimum, 1)] * (rank - 1) + [value]
        yield Wrong(f"{name} with {value!r}"[:60], {name: inside}, (name,))
    for size in (0, rank + 1, rank + 5):
        yield Wrong(f"{name} of {size} values", {name: (max(minimum, 1),) * size}, (name,))


def _wrong_tensors(name: str, tensor: Tensor, mentions: tuple[str, ...]) -> Iterator[Wrong]:
    """What is wrong with a tensor of floating-point numbers, whatever the others are."""
    for value in NO_TENSORS[1:] if name not in ("query", "key", "value") else NO_TENSORS:
        yield Wrong(f"{name} of {type(value).__name__}", {name: value}, mentions)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        yield Wrong(f"{name} of {dtype}", {name: tensor.detach().to(dtype)}, mentions)
    small = tensor.detach().to(torch.float8_e5m2)
    both = (ValueError, NotImplementedError)
    yield Wrong(f"{name} of float8", {name: small}, mentions, both)
    yield Wrong(f"{name} without data", {name: tensor.detach().to("meta")}, mentions)
    yield Wrong(f"sparse {name}", {name: tensor.detach().to_sparse()}, mentions, both)
    yield Wrong(f"{name} with an axis more", {name: tensor[None]}, mentions)
    yield Wrong(f"{name} with an axis less", {name: tensor[:1].squeeze(0)}, mentions)
    yield Wrong(f"{name} of no dimensions", {name: tensor.new_zeros(())}, mentions)
    for axis in range(tensor.dim() if tensor.numel() else 0):
        larger = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        yield Wrong(f"{name} with more along {axis}", {name: larger}, mentions)


def _wrong_masks(name: str, mask: Tensor) -> Iterator[Wrong]:
    for value in (*NO_TENSORS[1:], mask.float(), mask.long(), mask[None], mask.any(-1),
                  torch.cat([mask, mask], -1), torch.cat([mask, mask]), mask.to("meta"),
                  mask.flatten()):  # fmt: skip
        if not isinstance(value, Tensor) or value.shape != mask.shape or value.dtype != mask.dtype \
                or value.device != mask.device:  # fmt: skip
            yield Wrong(f"{name} of {type(value).__name__}", {name: value}, (name,))


def _wrong_options(given: dict[str, Any], kind: str) -> Iterator[Wrong]:
    """Arguments that windows and attention share."""
    for name in ("return_lse", "backward_use_pt_reduction", "run_persistent_kernel",
                 "torch_compile"):  # fmt: skip
        for value in NO_BOOLS:
            yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))
    for name in ("scale", "softcap"):
        for value in NO_NUMBERS:
            yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))
    yield Wrong("negative softcap", {"softcap": -1.0}, ("softcap",))
    for value in (3, 1.5, b"cpu", ["cpu"], object(), torch.zeros(2)):
        yield Wrong("backend of no text", {"backend": value}, ("backend",))
    other = "fmha" if kind == "fna" else "fna"
    for value in ("", "nobody", "cpu-", "CPU", f"cpu-{other}", f"cutlass-{other}", "cutlass", "é"):
        yield Wrong(f"backend {value!r}", {"backend": value}, ("backend",), NotImplementedError)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        for value in ("cutlass", "hopper", "blackwell"):
            lacking = (RuntimeError, NotImplementedError)
            yield Wrong(f"{value} here", {"backend": f"{value}-{kind}"}, (value,), lacking)
    for value in ("fast", 3, True, object()):
        yield Wrong("a schedule", {"kernel_schedule": value}, ("kernel_schedule",))
    unit = "shape" if kind == "fna" else "size"
    rank = given["query"].dim() - 3
    tile = (8,) * rank if kind == "fna" else 8
    for prefix in ("", "backward_"):
        first, second = f"{prefix}q_tile_{unit}", f"{prefix}kv_tile_{unit}"
        yield Wrong("half a pair", {first: tile}, (first,))
        yield Wrong("half a pair", {second: tile}, (second,))
        for value in (0, -8, "8", 8.0, (8,) * (rank + 1), (), 2**40):
            yield Wrong(f"a tile of {value!r}", {first: value, second: tile}, (first,))
            yield Wrong(f"a tile of {value!r}", {first: tile, second: value}, (second,))
    for value in (0, -1, "1", 1.0, (1,) * (rank + 1), (), 2**40):
        yield Wrong("splits", {"backward_kv_splits": value}, ("backward_kv_splits",))
    yield Wrong("an unknown argument", {"kernel_sise": 3}, ("kernel_sise",), TypeError)
    yield Wrong("no query", {"query": ...}, ("query",), TypeError)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    three = ("query", "key", "value")
    yield from _wrong_tensors("key", key, three)
    for wrong in _wrong_tensors("query", query, (*three, "sink", "rpb", "additional", "mask")):
        # More heads may be right, and so are more queries of attention, or in a grid.
        is_longer = " along " in wrong.what and "along 0" not in wrong.what
        is_wider = f"along {query.dim() - 1}" in wrong.what
        if not is_longer or is_wider:
            yield wrong
    for wrong in _wrong_tensors("value", value, (*three, "additional_values")):
        if f"along {value.dim() - 1}" not in wrong.what:
            yield wrong
    for name in three:
        half = torch.float64 if query.dtype != torch.float64 else torch.float32
        yield Wrong(f"{name} of another dtype", {name: given[name].to(half)}, three)
    no_heads = {name: given[name][..., :0, :] for name in ("key", "value")}
    yield Wrong("no heads", no_heads, ("heads",))
    if given.get("sink") is not None:
        yield from _wrong_tensors("sink", given["sink"], ("sink",))
    for name in ("key_mask", "query_mask"):
        if given.get(name) is not None:
            yield from _wrong_masks(name, given[name])


def _wrong_windows(case: Case, given: dict[str, Any]) -> Iterator[Wrong]:
    rank, grid = case.rank, case.grid or case.key_tokens
    yield from _wrong_options(given, "fna")
    for name in ("kernel_size", "stride", "dilation", "upsampling"):
        yield from _wrong_integers(name, rank, 1)
    yield Wrong("no kernel_size", {"kernel_size": ...}, ("kernel_size",), TypeError)
    yield Wrong("kernel_size of None", {"kernel_size": None}, ("kernel_size",))
    for axis in range(rank):
        kernel, stride, dilation = (
            list(getattr(case, name)) for name in ("kernel_size", "stride", "dilation")
        )
        kernel[axis] = grid[axis] // dilation[axis] + 1
        yield Wrong("a window beyond the grid", {"kernel_size": kernel}, ("kernel_size",))
        stride[axis] = case.kernel_size[axis] + 1
        yield Wrong("a stride beyond the window", {"stride": stride}, ("stride", "kernel_size"))
        dilation[axis] = grid[axis] // case.kernel_size[axis] + 1
        far = {"dilation": dilation}
        yield Wrong("a dilation beyond the grid", far, ("dilation",))
        if grid[axis] % 2 and not case.is_circular[axis] and max(case.upsampling) == 1:
            everything = [-1 if i == axis else 1 for i in range(rank)]
            dilated = [2 if i == axis else 1 for i in range(rank)]
            yield Wrong(
                "everything, dilated", {"kernel_size": everything, "dilation": dilated, "stride": 1,
                                        "rpb": None}, ("kernel_size",),
            )  # fmt: skip
        if case.is_circular[axis]:
            causal = [i == axis for i in range(rank)]
            yield Wrong("a causal ring", {"is_causal": causal, "rpb": None}, ("circular",))
        elif not case.is_causal[axis] and grid[axis] > 2 and case.grid is None:
            kernel = [2 if i == axis else 1 for i in range(rank)]
            parts = [2 if i == axis else 1 for i in range(rank)]
            ring = [i == axis for i in range(rank)]
            if grid[axis] % 2 and max(case.upsampling) == 1:
                what = {"kernel_size": kernel, "stride": parts, "dilation": 1, "is_circular": ring,
                        "rpb": None}  # fmt: skip
                yield Wrong("a ring of parts", what, ("circular",))
    for name in ("is_causal", "is_circular"):
        for value in (*NO_BOOLS, (True,) * (rank + 1), [None] * rank, [False] * (rank - 1) + [0]):
            yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))
    for value in NO_BOOLS:
        for name in ("clip_window", "try_fuse_additional_kv"):
            yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))
    many = case.heads + 1
    yield Wrong("many groups", {"kernel_size": [case.kernel_size] * many}, ("windows", "groups"))
    yield Wrong(
        "lists of two lengths",
        {"kernel_size": [case.kernel_size] * 2, "stride": [case.stride] * 3}, ("lists",),
    )  # fmt: skip
    yield Wrong("attention_kwargs", {"attention_kwargs": [("scale", 1.0)]}, ("attention_kwargs",))
    origins = ("query_origin", "key_origin")
    if case.grid is None and max(case.upsampling) == 1:
        yield Wrong("an origin without grid", {"query_origin": 0}, origins)
        yield Wrong("an origin without grid", {"key_origin": 0}, origins)
        yield Wrong("a small grid", {"grid": [n - 1 for n in grid]}, ("grid",))
        yield from _wrong_integers("grid", rank, 0)
    if case.grid is not None:
        for name in origins:
            yield from _wrong_integers(name, rank, 0)
            yield Wrong("a box outside", {name: grid}, ("box", name))
        yield Wrong("upsampling and a grid", {"upsampling": 2}, ("upsampling",))
        yield Wrong("no grid", {"grid": None}, ("grid",))
    elif max(case.upsampling) == 1:
        yield Wrong("upsampling of as many queries", {"upsampling": 2}, ("upsampling",))
    else:
        more = [n + 1 for n in case.upsampling]
        yield Wrong("other upsampling", {"upsampling": more}, ("upsampling",))
        table = torch.zeros(case.heads, *(2 * k - 1 for k in case.kernel_size))
        declined = (ValueError, NotImplementedError)
        yield Wrong("upsampling and a bias", {"rpb": table}, ("rpb",), declined)
    if given["rpb"] is not None:
        yield from _wrong_tensors("rpb", given["rpb"], ("rpb",))
        yield Wrong("a causal bias", {"is_causal": True, "is_circular": False}, ("rpb",))
    two = ("additional_keys", "additional_values")
    if case.grid is None:
        longer = torch.cat([given["query"], given["query"].narrow(1, 0, 1)], 1)
        yield Wrong("more queries", {"query": longer}, ("query", "mask"))
    if given["additional_keys"] is None:
        yield Wrong("lengths alone", {"additional_lengths": torch.ones(case.batch).long()}, two)
        return
    for name in two:
        yield Wrong(f"no {name}", {name: None}, two)
        yield from _wrong_tensors(name, given[name], two)
    for value in (
        torch.full((case.batch,), -1), torch.full((case.batch,), case.additional + 1),
        torch.ones(case.batch), torch.ones(case.batch + 1).long(), torch.tensor(1),
        torch.ones(case.batch, 1).long(), torch.ones(case.batch).bool(), [1] * case.batch, 1,
    ):  # fmt: skip
        name = "additional_lengths"
        yield Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,))


def _wrong_attention(case: Case, given: dict[str, Any]) -> Iterator[Wrong]:
    yield from _wrong_options(given, "fmha")
    for value in NO_BOOLS:
        yield Wrong(f"is_causal of {value!r}"[:60], {"is_causal": value}, ("is_causal",))
    names = ("seqlens_Q", "seqlens_KV")
    ends = ("cumulative_seqlen_Q", "cumulative_seqlen_KV")
    longest = ("max_seqlen_Q", "max_seqlen_KV")
    any_of = (*names, *ends, *longest, "batch")
    queries, keys = case.tokens[0], case.key_tokens[0]
    ints = {"dtype": torch.int32}
    whole = dict(zip(ends, (torch.tensor([0, queries], **ints), torch.tensor([0, keys], **ints))))
    whole |= dict(zip(longest, (queries, keys)))
    if case.lengths_q is None:
        for name in longest:
            yield Wrong(f"{name} alone", {name: 3}, any_of)
        yield Wrong("one kind of lengths", {names[0]: torch.tensor([1], **ints)}, any_of)
        yield Wrong("one kind of ends", {ends[0]: torch.tensor([0, 1], **ints)}, any_of)
        if case.batch > 1:
            yield Wrong("packed batches", whole, any_of)
        if case.key_mask or case.query_mask:
            declined = (ValueError, NotImplementedError)
            if case.batch == 1:
                yield Wrong("masks of packed sequences", whole, ("mask",), declined)
        return
    for name in names:
        lengths = given[name]
        for value in (
            [1, 2], lengths.long(), lengths.float(), lengths[None], lengths[:0], lengths - 50,
            torch.cat([lengths, lengths.new_tensor([1000])]), lengths.to("meta"), lengths + 1000,
        ):  # fmt: skip
            yield Wrong(f"{name} of {value!r}"[:60], {name: value}, any_of)
        yield Wrong(f"no {name}", {name: None}, any_of)
    yield Wrong("both kinds", whole, any_of)
    packed: dict[str, Any] = dict.fromkeys(names) | whole
    for name, tokens in zip(ends, (queries, keys)):
        for value in (
            [0, 3], torch.tensor([0, tokens]), torch.tensor([0], **ints), None,
            torch.tensor([0, tokens + 1], **ints), torch.tensor([1, tokens], **ints),
            torch.tensor([0, -1], **ints), torch.tensor([[0, tokens]], **ints),
            torch.tensor([0, 2**31 - 1], **ints),
        ):  # fmt: skip
            yield Wrong(f"{name} of {value!r}"[:60], {**packed, name: value}, any_of)
    for name in longest:
        for value in (-1, 1.0, "3", [3], None, 2**31, object()):
            yield Wrong(f"{name} of {value!r}"[:60], {**packed, name: value}, any_of)
        if max(queries, keys) > 0 and packed[name] > 0:
            yield Wrong(f"{name} too small", {**packed, name: packed[name] - 1}, any_of)


def _wrong_grids(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    layout = GridLayout([(4, 5), (6, 3), (6, 3)])
    given: dict[str, Any] = {
        name: torch.randn(1, layout.total, 2, 8) for name in ("query", "key", "value")
    }  # fmt: skip
    given |= {"metadata": layout, "kernel_size": 3}
    wrongs = []
    for name in ("query", "key", "value"):
        for value in (
            *NO_TENSORS[:4], given[name][:, 1:], given[name][0], given[name].expand(2, -1, -1, -1),
        ):  # fmt: skip
            wrongs.append(Wrong(f"{name} of {type(value).__name__}", {name: value}, (name,)))
        wrongs.append(Wrong(f"{name} of integers", {name: given[name].long()}, (name,)))
    for name in ("kernel_size", "stride", "dilation"):
        wrongs += [
            wrong for wrong in _wrong_integers(name, 2, 1) if wrong.changes[name] is not None
        ]
        for value in ([1], [1] * 4, 3, "333", {1, 2, 3}):
            wrongs.append(Wrong(f"{name}_list", {f"{name}_list": value}, (f"{name}_list", name)))
    wrongs += [
        Wrong("no window", {"kernel_size": None}, ("kernel_size",)),
        Wrong("a window beyond", {"kernel_size": 4}, ("kernel_size",)),
        Wrong("two layouts", {"token_layout_list": [(4, 5)]}, ("token_layout_list", "metadata")),
        Wrong("no layout", {"metadata": None}, ("token_layout_list", "metadata")),
        Wrong("an unknown argument", {"kernel_sise": 3}, ("kernel_sise",), TypeError),
        Wrong("a mask", {"key_mask": torch.ones(1, 3).bool()}, ("key_mask",)),
        Wrong("one context", {
            name: torch.zeros(1, 4, 2, 8) for name in ("additional_keys", "additional_values")
        }, ("additional",)),
    ]  # fmt: skip
    for sizes in ([], [()], [(1, 2, 3, 4)], [(4, 5), (3,)], [(4, -1)], [("4", 5)], [(4.0, 5)], 3,
                  "45", [2**40], {(4, 5): 1}, [(4, 5), (6, 3)]):  # fmt: skip
        mentions = ("sizes", "metadata", "layout", "query")
        wrongs.append(Wrong(f"sizes of {sizes}", {"metadata": sizes}, mentions))
    return neighborhood_attention_varlen, given, wrongs


def _wrong_merge(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    outs = [torch.randn(2, 5, 3, 4) for _ in range(2)]
    lses = [torch.randn(2, 5, 3) for _ in range(2)]
    given: dict[str, Any] = {"outputs": outs, "lse_tensors": lses, "return_lse": True}
    two = ("outputs", "lse_tensors")
    wrongs = [
        Wrong(f"{name} of {type(value).__name__}", {name: value}, two)
        for name, tensors in (("outputs", outs), ("lse_tensors", lses))
        for value in (
            *NO_TENSORS, torch.stack(tensors), tensors[:1], [*tensors, tensors[0]], [],
            [tensors[0], None], [tensors[0], tensors[1].double()[:1]],
            [tensors[0], tensors[1].long()], [tensors[0], tensors[1][None]],
            [tensors[0], tensors[1][..., :2]], [tensors[0], tensors[1].to("meta")],
            [tensors[0], tensors[1].to_sparse()],
        )
    ]  # fmt: skip
    wrongs = [
        w._replace(kind=(ValueError, NotImplementedError)) if "list" in w.what else w
        for w in wrongs
    ]
    for name in ("return_lse", "torch_compile", "use_autograd_fix"):
        wrongs += [Wrong(f"{name} of {v!r}"[:60], {name: v}, (name,)) for v in NO_BOOLS]
    wrongs.append(Wrong("an unknown argument", {"lse": lses}, ("lse",), TypeError))
    return natten.merge_attentions, given, wrongs


def _wrong_products(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    a, b = torch.randn(2, 3, 5, 6, 4), torch.randn(2, 3, 5, 6, 4)
    window: dict[str, Any] = {"kernel_size": 3, "dilation": 1, "stride": 1, "is_causal": False}
    if random.random() < 0.5:
        function, names = natten.functional.na2d_qk, ("query", "key")
        given = {"query": a, "key": b, "rpb": torch.zeros(3, 5, 5), **window}
        more = [
            *_wrong_tensors("rpb", given["rpb"], ("rpb",)),
            Wrong("a causal bias", {"is_causal": True}, ("rpb",)),
        ]
    else:
        function, names = natten.functional.na2d_av, ("attn", "value")
        given = {"attn": torch.randn(2, 3, 5, 6, 9), "value": b, **window}
        more = [Wrong("fewer slots", {"attn": given["attn"][..., 1:]}, ("attn",))]
    wrongs = list(more)
    for name in names:
        for wrong in _wrong_tensors(name, given[name], names):
            # A value has any number of features, and a batch more is one that does not fit.
            if name != "value" or "along 4" not in wrong.what:
                wrongs.append(wrong)
    for name in ("kernel_size", "stride", "dilation"):
        wrongs += _wrong_integers(name, 2, 1)
    for value in ({"kernel_size": 6}, {"dilation": 3}, {"stride": 4}):
        wrongs.append(Wrong(f"{value}", value, ("kernel_size", "rpb", "attn")))
    wrongs += [Wrong(f"{v!r}"[:60], {"is_causal": v}, ("is_causal",)) for v in NO_BOOLS]
    return function, given, wrongs


def _wrong_float8(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    """Of attention in 8 bits, or of what rounds to them."""
    tensors = [torch.randn(2, 5, 6, heads, 8).bfloat16() for heads in (4, 2, 2)]
    three = ("query", "key", "value")
    scales = (
        torch.ones(4), torch.ones(2, 1), torch.ones(2).double(), torch.ones(2, device="meta"),
        *NO_NUMBERS,
    )  # fmt: skip
    if random.random() < 0.3:
        tensor = tensors[1]
        # Any shape and device are right by themselves.
        wrongs = [
            wrong
            for wrong in _wrong_tensors("tensor", tensor, ("tensor",))
            if not any(part in wrong.what for part in ("along", "float8", "axis", "data"))
        ]
        for scale in (*scales, 0.0, -1.0, torch.tensor([1.0, 0.0]), torch.tensor([1.0, nan])):
            if not isinstance(scale, Tensor) or scale.is_meta or scale.tolist() != [1.0, 2.0]:
                wrongs.append(Wrong(f"scale of {scale!r}"[:60], {"scale": scale}, ("scale",)))
        wrongs.append(Wrong("an unknown argument", {"scales": 1.0}, ("scales",), TypeError))
        return natten.to_float8, {"tensor": tensor}, wrongs
    given: dict[str, Any] = dict(zip(three, map(natten.to_float8, tensors)))
    given |= {"kernel_size": 3, "backend": "reference"}
    wrongs = []
    for name, tensor in zip(three, tensors):
        rounded = given[name]
        for wrong in _wrong_tensors(name, tensor, three):
            # A value has any number of features.
            if f"value with more along {tensor.dim() - 1}" != wrong.what:
                wrongs.append(wrong)
        for scale in (*scales, None):
            if not isinstance(scale, Tensor) or scale.shape != rounded.scale.shape \
                    or scale.dtype != torch.float32 or scale.is_meta:  # fmt: skip
                changed = rounded._replace(scale=scale)
                wrongs.append(Wrong(f"{name} times {scale!r}"[:60], {name: changed}, (name,)))
        for value in (tensor, None, rounded.tensor.to(torch.float8_e5m2)):
            changed = rounded._replace(tensor=value)
            wrongs.append(Wrong(f"{name} rounded to nothing", {name: changed}, (name,)))
        wrongs.append(Wrong(f"{name} of float32", {name: tensor.float()}, (name,)))
    for name in ("kernel_size", "stride", "dilation"):
        wrongs += [w for w in _wrong_integers(name, 2, 1) if w.changes[name] is not None]
    for value in ({"kernel_size": 6}, {"dilation": 3}, {"stride": 4}):
        wrongs.append(Wrong(f"{value}", value, ("kernel_size",)))
    for name in ("is_causal", "return_lse"):
        wrongs += [Wrong(f"{name} of {v!r}"[:60], {name: v}, (name,)) for v in NO_BOOLS]
    wrongs += [Wrong(f"scale of {v!r}"[:60], {"scale": v}, ("scale",)) for v in NO_NUMBERS]
    for backend in (3, b"reference", ["reference"], object()):
        wrongs.append(Wrong("backend of no text", {"backend": backend}, ("backend",)))
    for backend in ("", "nobody", "hopper", "cpu-fna"):
        declined = (ValueError, NotImplementedError)
        wrongs.append(
            Wrong(f"backend {backend!r}", {"backend": backend}, ("backend", "8-bit"), declined)
        )
    if not torch.cuda.is_available():
        lacking = (RuntimeError, NotImplementedError)
        for backend in (None, "hopper-fna", "hopper-fmha", "cutlass-fna", "cpu"):
            wrongs.append(Wrong(f"{backend} here", {"backend": backend}, ("8-bit",), lacking))
    wrongs += [
        Wrong("groups of heads", {"kernel_size": [3, (3, 5)]}, ("kernel_size", "heads"),
              (ValueError, NotImplementedError)),
        Wrong("an unknown argument", {"kernel_sise": 3}, ("kernel_sise",), TypeError),
        Wrong("no query", {"query": ...}, ("query",), TypeError),
    ]  # fmt: skip
    return natten.float8_attention, given, wrongs


def _wrong_inputs(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    """Of a module."""
    module = natten.NeighborhoodAttention2D(12, 3, 3)
    given: dict[str, Any] = {
        "x": torch.randn(2, 5, 6, 12), "mask": torch.ones(2, 5, 6, dtype=torch.bool),
    }  # fmt: skip
    x = given["x"]
    wrongs = [
        Wrong(f"x of {type(value).__name__}", {"x": value}, ("x", "kernel_size"))
        for value in (
            *NO_TENSORS, x[0], x[None], x[..., :11], x[:, :2], x[:, :, :2], x.long(),
            x.transpose(1, 3), x.to_sparse(),
        )
    ]  # fmt: skip
    wrongs = [
        w._replace(kind=(ValueError, NotImplementedError)) if isinstance(w.changes["x"], Tensor)
        else w for w in wrongs
    ]  # fmt: skip
    wrongs += _wrong_masks("mask", given["mask"])
    for name in ("origin", "grid"):
        for value in ([1], [1, 2, 3], ["1", "2"], [1.0, 2.0], [-1, 2], 2.5, [2**40, 1]):
            changes = {"mask": None, "origin": [0, 0], "grid": [9, 9], name: value}
            wrongs.append(Wrong(f"{name} of {value}", changes, (name, "box")))
    wrongs.append(Wrong("a small grid", {"mask": None, "grid": [4, 4]}, ("grid", "box")))
    return module, given, wrongs


def _wrong_modules(random: Random) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    given: dict[str, Any] = {"embed_dim": 12, "num_heads": 3, "kernel_size": 3}
    wrongs = []
    for name in ("kernel_size", "stride", "dilation"):
        wrongs += _wrong_integers(name, 2, 1)
    for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim"):
        for value in (0, -3, 1.5, "3", [3], object()):
            wrongs.append(Wrong(f"{name} of {value!r}"[:60], {name: value}, (name,)))
    for name, value in (("num_heads", 5), ("num_kv_heads", 2), ("stride", 4)):
        wrongs.append(Wrong(f"{name} of {value}", {name: value}, (name,)))
    for name in ("qk_scale", "softcap"):
        wrongs += [Wrong(f"{name} of {v!r}"[:60], {name: v}, (name, "scale")) for v in NO_NUMBERS]
    for name in ("is_causal", "is_circular", "qkv_bias", "rel_pos_bias", "qk_norm", "pad",
                 "learned_scale", "sink"):  # fmt: skip
        wrongs += [Wrong(f"{name} of {v!r}"[:60], {name: v}, (name,)) for v in NO_BOOLS[:6]]
    for name in ("proj_drop", "attn_drop"):
        wrongs += [Wrong(f"{name} of {v!r}", {name: v}, (name,)) for v in (-0.1, 1.5, nan, "0")]
    wrongs.append(Wrong("an unknown argument", {"kernel_sise": 3}, ("kernel_sise",), TypeError))
    return natten.NeighborhoodAttention2D, given, wrongs


def _wrong_calls(
    kind: str, seed: int, on: On
) -> tuple[Callable[..., Any], dict[str, Any], list[Wrong]]:
    """A valid call, and what makes it a wrong one."""
    random = Random(f"wrong {kind} {seed}")
    if kind in ("window", "attention"):
        draw = random_case if kind == "window" else random_attention
        case = replace(draw(seed, max_tokens=40), batch=1 if kind == "attention" else 2)
        if case.additional_lengths is not None:
            case = replace(case, additional_lengths=(0, case.additional))
        inputs = make_inputs(case, on.dtypes[seed % len(on.dtypes)], on.device)
        function, given = call(case, inputs, on.named("fna" if kind == "window" else "fmha"))
        if kind == "window" and random.random() < 0.5:
            function = getattr(natten, f"na{case.rank}d")
        wrong = _wrong_windows if kind == "window" else _wrong_attention
        return function, given, list(wrong(case, given))
    make = {
        "grids": _wrong_grids, "merge": _wrong_merge, "products": _wrong_products,
        "float8": _wrong_float8,
        "modules": random.choice((_wrong_modules, _wrong_inputs)),
    }[kind]  # fmt: skip
    return make(random)


def _raised(function: Callable[..., Any], named: dict[str, Any]) -> Exception | None:
    try:
        function(**named)
    except Exception as error:
        return error
    return None


REFUSING = ("window", "window", "attention", "grids", "merge", "products", "modules", "float8")


def refuse(kind: str, seed: int, on: On, count: int = 10) -> None:
    """Make ``count`` calls with one thing wrong, each after a valid one, whose checks are
    remembered."""
    function, given, wrongs = _wrong_calls(kind, seed, on)
    random = Random(f"refused {seed}")
    with torch.no_grad():
        function(**given)
    for wrong in random.sample(wrongs, min(count, len(wrongs))):
        named = {n: v for n, v in (given | wrong.changes).items() if v is not ...}
        title = f"{kind} {seed}: {wrong.what} ({', '.join(wrong.changes)})"
        error = _raised(function, named)
        kinds = wrong.kind if isinstance(wrong.kind, tuple) else (wrong.kind,)
        # Neither a subclass, such as UnicodeError, nor anything that torch says by itself.
        assert type(error) in kinds, f"{title}: {type(error).__name__}: {str(error)[:300]}"
        assert any(name in str(error) for name in wrong.mentions), f"{title}: {str(error)[:300]}"
        assert len(str(error)) < 4000, f"{title}: {len(str(error))} letters"
