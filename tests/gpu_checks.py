"""What is tested on a GPU, as plain functions: `test_triton_gpu.py` and `run_gpu.py` call them.

Compiling takes seconds a kernel and running it milliseconds. So random problems come in families:
what kernels are specialized on is drawn once for a family, everything else for each problem.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import prod
from random import Random
from typing import Any
from unittest import mock

import problems
import torch
from cases import (
    CASES,
    Case,
    around_rings,
    random_frozen,
    random_grids,
    random_lengths,
    random_plain_case,
    upsampled,
)
from checks import (
    check_derivatives,
    check_grids,
    check_groups,
    check_packed,
    check_problem,
    compute,
    make_inputs,
    run,
)
from invariance import check_batch_entries, check_packed_sequences, tiles_1d
from invariance import tiles as shapes_2d
from memory import nan_filled_empties
from torch import Tensor

import natten
from natten.functional import neighborhood_attention_generic
from natten.functional.backends import triton as triton_backends
from natten.functional.backends.triton import arguments, tiles
from natten.functional.backends.triton.launcher import Launch, is_collecting
from natten.nn import NeighborhoodAttention2D, NeighborhoodCrossAttention2D
from natten.simulator import make_problem
from natten.varlen import GridLayout, neighborhood_attention_varlen

# Descriptors for small problems too, which by default are too small to be worth it.
tiles.MIN_TMA_PRODUCTS = 0.0
# And their order of tiles.
arguments.LEAST_UNCACHED = 0

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOPPER_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)
# The error of eager attention in the same dtype, times this, is the budget.
FACTOR = 1.5
# Of a float32 product made of three tf32 products, whose parts have 11 bits each.
TF32X3 = 2.0**-21
BF16, FP16, FP32 = DTYPES.values()
Check = Callable[[], None]
DEVICE = "cuda"


def check(case: Case, backend: str | None, dtype: torch.dtype, **knobs: Any) -> None:
    """Assert that a backend computes a case on the GPU."""
    rounding = TF32X3 if dtype == FP32 else 0.0
    check_problem(case, backend, dtype, DEVICE, factor=FACTOR, product_rounding=rounding, **knobs)


def has_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def backends() -> list[str]:
    """The Triton backends of this GPU."""
    return ["cutlass", "hopper"] if has_hopper() else ["cutlass"]


# ---------------------------------------------------------------- named cases


def _through_descriptors(case: Case) -> Case:
    """The case with heads wide enough to be loaded through descriptors."""
    wide = 64 if case.head_dim_v == case.head_dim else 128
    if case.head_dim >= 64:
        return case
    return replace(case, head_dim=64, head_dim_v=wide, name=f"{case.name}_wide")


def named_checks(all_dtypes: bool) -> Iterator[tuple[str, Check]]:
    """All named cases with every backend: in one dtype each, in turn, or in all."""
    for number, case in enumerate(CASES):
        for name in backends():
            wide = name == "hopper"
            dtypes = (BF16, FP16) if wide else (BF16, FP16, FP32)
            if not all_dtypes:
                dtypes = (dtypes[number % len(dtypes)],)
            for dtype in dtypes:
                chosen = _through_descriptors(case) if wide else case
                title = f"{name} {chosen.name} {str(dtype).removeprefix('torch.')}"
                yield title, partial(check, chosen, name, dtype)


def larger_cases() -> list[Case]:
    """Many tiles a program: loops that are pipelined, and inner tiles without masks."""
    one = dict(batch=1, heads=2)
    return [
        Case("1d_2000_d64", (2000,), (701,), head_dim=64, **one),
        Case("1d_2000_d128", (2000,), (701,), head_dim=128, **one),
        Case("1d_2000_d128_causal", (2000,), (900,), is_causal=(True,), head_dim=128, **one),
        Case("1d_1500_strided_d64", (1500,), (512,), (256,), head_dim=64, **one),
        Case("2d_48x40_k31_d128", (48, 40), (31, 29), head_dim=128, **one),
        Case("2d_48x40_k17_d64", (48, 40), (17, 17), head_dim=64, **one),
        Case("2d_48x40_k17_d32", (48, 40), (17, 17), head_dim=32, **one),
        Case("2d_48x40_dilated_d64", (48, 40), (13, 11), dilation=(3, 2), head_dim=64, **one),
        Case("2d_48x40_causal_d128", (48, 40), (31, 29), is_causal=(True, True), head_dim=128),
        Case("2d_48x40_rpb_d64", (48, 40), (25, 25), head_dim=64, rpb=True, **one),
        Case("2d_48x40_rpb_d128", (48, 40), (39, 33), head_dim=128, rpb=True, **one),
        Case("2d_48x40_additional_d64", (48, 40), (9, 9), head_dim=64, additional=700, **one),
        Case(
            "2d_48x40_additional_lengths_d64", (48, 40), (9, 9), head_dim=64, batch=4,
            additional=700, additional_lengths=(700, 0, 131, 64),
        ),
        Case("1d_ring_2000_d64", (2000,), (701,), is_circular=(True,), head_dim=64, **one),
        Case(
            "1d_ring_2000_d128", (2000,), (1900,), (50,), is_circular=(True,), head_dim=128, **one
        ),
        Case(
            "2d_ring_48x40_d64", (48, 40), (17, 17), is_circular=(False, True), head_dim=64, **one
        ),
        Case("2d_rings_48x40_d128", (48, 40), (31, 29), is_circular=(True, True), head_dim=128),
        Case(
            "2d_ring_48x40_dilated_rpb_d32", (48, 40), (13, 11), dilation=(3, 2), head_dim=32,
            is_circular=(True, False), rpb=True, **one,
        ),
        Case(
            "3d_ring_10x12x14_d64", (10, 12, 14), (7, 9, 8), (1, 3, 1), head_dim=64,
            is_causal=(True, False, False), is_circular=(False, True, True), **one,
        ),
        upsampled(
            Case("2d_up14_d64", (16, 12), (9, 7), head_dim=64, **one), (14, 14)
        ),
        upsampled(
            Case("2d_up4_ring_d128", (16, 12), (5, 4), (1, 2), is_circular=(False, True),
                 head_dim=128, **one),
            (4, 4),
        ),
        upsampled(
            Case("1d_up3_causal_d32", (300,), (65,), is_causal=(True,), head_dim=32, **one), (3,)
        ),
        Case("2d_48x40_softcap_d64", (48, 40), (17, 17), head_dim=64, softcap=2.0, **one),
        Case("2d_48x40_softcap_rpb_d32", (48, 40), (9, 9), softcap=2.0, rpb=True, head_dim=32),
        Case("1d_2000_sink_d64", (2000,), (701,), head_dim=64, sink=True, **one),
        Case(
            "2d_48x40_masks_d64", (48, 40), (17, 17), head_dim=64, batch=3, key_mask=True,
            query_mask=True,
        ),
        Case(
            "2d_48x40_masks_everything_d128", (48, 40), (31, 29), head_dim=128, batch=2, heads=4,
            heads_kv=2, softcap=4.0, sink=True, key_mask=True, query_mask=True, additional=70,
        ),
        Case("1d_2000_query_mask_d128", (2000,), (900,), head_dim=128, query_mask=True),
        Case("3d_10x12x14_d64", (10, 12, 14), (7, 9, 11), head_dim=64, **one),
        Case("3d_10x12x14_d128", (10, 12, 14), (7, 9, 11), head_dim=128, **one),
        Case("3d_10x12x14_strided_d128", (10, 12, 14), (8, 8, 8), (4, 4, 8), head_dim=128, **one),
        Case("2d_gqa_d128", (32, 30), (17, 17), head_dim=128, batch=1, heads=8, heads_kv=2),
        Case("2d_d256", (32, 30), (17, 17), head_dim=256, **one),
        Case("2d_dv_320", (20, 18), (9, 9), head_dim=64, head_dim_v=320, additional=9, **one),
        Case("attention_2000_d128", (2000,), None, head_dim=128, **one),
        Case("attention_2000_d64_causal", (2000,), None, is_causal=(True,), head_dim=64, **one),
        Case(
            "varlen_long", (1900,), None, batch=1, key_tokens=(1800,), head_dim=64,
            lengths_q=(700, 0, 1200), lengths_kv=(900, 100, 800),
        ),
        Case(
            "varlen_long_causal", (1900,), None, batch=1, key_tokens=(1900,), head_dim=128,
            lengths_q=(700, 3, 1197), lengths_kv=(700, 3, 1197), is_causal=(True,),
        ),
        Case("1d_300_scores_of_100", (300,), (150,), head_dim=64, magnitude=4.0, scale=1.0, **one),
        Case("1d_300_negative_scale", (300,), (250,), head_dim=64, scale=-0.125, **one),
    ]  # fmt: skip


def larger_checks() -> Iterator[tuple[str, Check]]:
    for number, case in enumerate(larger_cases()):
        for name in backends():
            if name == "hopper" and case.head_dim_v not in HOPPER_DIMS:
                continue
            dtype = (BF16, FP16)[number % 2]
            title = f"{name} {case.name} {str(dtype).removeprefix('torch.')}"
            yield title, partial(check, case, name, dtype)
    for case in larger_cases()[::5]:
        yield f"cutlass {case.name} float32", partial(check, case, "cutlass", FP32)


# ---------------------------------------------------------------- random problems


PLAIN_SCORES = {"softcap": 0.0, "sink": False, "key_mask": False, "query_mask": False}


@dataclass(frozen=True)
class Family:
    """What compiled kernels depend on."""

    rank: int
    is_causal: tuple[bool, ...]
    backend: str | None
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    group: int  # query heads for each key head
    strided: tuple[bool, ...]
    dilated: tuple[bool, ...]
    contiguous: bool
    rpb: bool
    additional: bool
    lengths: bool  # of the additional keys
    negative: bool
    deterministic: bool
    is_circular: tuple[bool, ...]
    upsampling: tuple[int, ...]
    scores: tuple[tuple[str, Any], ...]  # soft cap, sink and masks of its cases
    knobs: tuple[tuple[str, Any], ...]


@lru_cache
def family(number: int) -> Family:
    """The ``number``-th family, the same on every machine with the same backends."""
    random = Random(number)
    rank = (1, 2, 3, 2)[number % 4]
    backend = ("cutlass", "hopper", None)[number // 4 % 3]
    if backend == "hopper" and not has_hopper():
        backend = "cutlass"
    dtype = (BF16, FP16, FP32)[number // 12 % 3]
    if backend == "hopper" and dtype == FP32:
        dtype = random.choice((BF16, FP16))
    if backend == "hopper":
        head_dim = random.choice((64, 64, 128, 128, 32, 256))
        head_dim_v = random.choice((head_dim, head_dim, head_dim, 64, 128, 32))
    else:
        head_dim = random.choice((8, 16, 24, 32, 32, 64, 64, 80, 128))
        head_dim_v = random.choice((head_dim, head_dim, head_dim, 8, 32, 48, 64))
    causal = tuple(random.random() < 0.25 for _ in range(rank))
    dilated = 0.15 if backend == "hopper" else 0.35
    made = Family(
        rank, causal, backend, dtype, head_dim, head_dim_v,
        group=random.choice((1, 1, 1, 2, 4)),
        strided=tuple(random.random() < 0.4 for _ in range(rank)),
        dilated=tuple(random.random() < dilated for _ in range(rank)),
        contiguous=random.random() < 0.7,
        rpb=not any(causal) and random.random() < 0.3,
        additional=random.random() < 0.3,
        negative=random.random() < 0.1,
        deterministic=random.random() < 0.2,
        lengths=random.random() < 0.5,
        is_circular=(False,) * rank,
        upsampling=(1,) * rank,
        scores=tuple(PLAIN_SCORES.items()),
        knobs=(),
    )  # fmt: skip
    made = replace(made, knobs=tuple(_tiles(made, random).items()))
    random = Random(f"rings of {number}")
    if random.random() < 0.3:
        rings = tuple(not c and random.random() < 0.6 for c in causal)
        made = replace(made, is_circular=rings)
    if random.random() < 0.3 and not made.rpb:
        factors = tuple(1 if d else random.choice((1, 2, 3, 4)) for d in made.dilated)
        made = replace(made, upsampling=factors)
    random = Random(f"scores of {number}")
    if random.random() < 0.4:
        scores = {
            "softcap": random.choice((0.0, 0.5, 4.0)),
            "sink": random.random() < 0.4,
            "key_mask": random.random() < 0.6,
            "query_mask": random.random() < 0.4,
        }
        made = replace(made, scores=tuple(scores.items()))
    return made


def _tiles(family: Family, random: Random) -> dict[str, Any]:
    """Tile shapes among those listed: the default ones would depend on each problem."""
    shape = (1, *(4,) * family.rank, family.group, family.head_dim)
    query = torch.zeros(shape, dtype=family.dtype, device=DEVICE)
    key = query[..., :1, :]
    value = query.new_zeros((*shape[:-2], 1, family.head_dim_v))
    on_hopper = family.backend == "hopper" or (family.backend is None and _takes_hopper(family))

    def listed(backward: bool) -> list[Any]:
        pairs = listed_pairs("hopper" if on_hopper else "cutlass", backward, query, key, value)
        # The first is the default of this shape alone.
        return [pair for pair in pairs[1:] if max(map(prod, pair)) <= 128]

    knobs: dict[str, Any] = {}
    for prefix, pairs in (("", listed(False)), ("backward_", listed(True))):
        if pairs:
            pair = random.choice(pairs)
            knobs |= {f"{prefix}q_tile_shape": pair[0], f"{prefix}kv_tile_shape": pair[1]}
    if random.random() < 0.15:
        knobs["backward_kv_splits"] = tuple(random.randint(1, 3) for _ in range(family.rank))
    if random.random() < 0.15:
        knobs["backward_use_pt_reduction"] = True
    return knobs


def _takes_hopper(family: Family) -> bool:
    dims = {family.head_dim, family.head_dim_v}
    return has_hopper() and family.dtype != FP32 and dims <= set(HOPPER_DIMS)


def listed_entries(
    backend: str, backward: bool, query: Tensor, key: Tensor, value: Tensor, kind: str = "fna"
) -> list[Any]:
    """What natten's function of this backend lists."""
    prefix = "get_bwd_configs_for" if backward else "get_configs_for"
    infix = "cutlass" if backend == "cutlass" else f"cutlass_{backend}"
    return getattr(natten, f"{prefix}_{infix}_{kind}")(query, key, value)


def listed_pairs(*arguments: Any, **more: Any) -> list[Any]:
    """The (query tile, key tile) pairs alone, without kernel schedules."""
    entries = listed_entries(*arguments, **more)
    nested = entries and isinstance(entries[0][0], tuple) and isinstance(entries[0][0][0], tuple)
    # attention's pairs are of ints: there, an entry with a schedule is a pair in a pair.
    nested = nested or (entries and isinstance(entries[0][0], tuple) and more.get("kind") == "fmha")
    return [entry[0] for entry in entries] if nested else entries


def family_case(family: Family, seed: int) -> Case:
    """A random problem of a family."""
    random = Random(seed)
    most = random.choice((300, 600, 900))
    case = random_plain_case(seed, family.rank, most)
    # Kernels are specialized on whether these are 1 (or a multiple of 16).
    dilation = tuple(
        random.choice((2, 2 + (n > 5))) if dilated and n > 3 else 1
        for n, dilated in zip(case.grid or case.tokens, family.dilated)
    )
    kernel_size = tuple(
        max(min(k, n // d), min(n, 1 + s))
        for n, d, k, s in zip(case.grid or case.tokens, dilation, case.kernel_size, family.strided)
    )
    stride = tuple(
        random.choice([n for n in range(2, k + 1) if n % 16] or [1]) if strided else 1
        for k, strided in zip(kernel_size, family.strided)
    )
    heads_kv = random.choice((1, 2, 3))
    additional = random.choice((1, 5, 70, 200)) if family.additional else 0
    lengths = None
    if additional and family.lengths:
        lengths = random_lengths(random, case.batch, additional)
    case = replace(
        case,
        kernel_size=kernel_size,
        stride=stride,
        is_causal=family.is_causal,
        is_circular=(False,) * family.rank,
        upsampling=(1,) * family.rank,
        **dict(family.scores),
        dilation=dilation,
        contiguous=family.contiguous,
        heads=heads_kv * family.group,
        heads_kv=heads_kv,
        head_dim=family.head_dim,
        head_dim_v=family.head_dim_v,
        rpb=family.rpb,
        additional=additional,
        additional_lengths=lengths,
        scale=random.choice((-0.2, -0.05)) if family.negative else random.choice((None, None, 0.3)),
    )
    random = Random(f"frozen of {seed}")
    if random.random() < 0.3:
        case = replace(case, frozen=random_frozen(random))
    if any(family.is_circular):
        case = around_rings(case, family.is_circular)
    if max(family.upsampling) == 1:
        return case
    whole = around_rings(case, family.is_circular)
    return upsampled(whole, family.upsampling)


def check_family_problem(number: int, seed: int) -> None:
    """Check problem ``seed`` of family ``number``."""
    chosen = family(number)
    case = family_case(chosen, seed)
    mode = natten.use_deterministic_algorithms() if chosen.deterministic else nullcontext()
    with mode:
        check(case, chosen.backend, chosen.dtype, **dict(chosen.knobs))


# What windows, grids and derivatives there are beyond plain ones: each in families of its own.
SPECIAL = ("rings", "masks", "scores", "windows", "upsampling", "derivatives")
SPECIAL_FAMILIES = 6


@lru_cache
def special_family(kind: str, number: int) -> Family:
    """The ``number``-th family of problems that all are of a kind."""
    random = Random(f"{kind} {number}")
    # Of every rank, backend and dtype.
    made = family(5 * number)
    one = random.randrange(made.rank)
    made = replace(
        made, is_circular=(False,) * made.rank, upsampling=(1,) * made.rank,
        scores=tuple(PLAIN_SCORES.items()),
    )  # fmt: skip
    if kind == "rings":
        causal = tuple(c and axis != one for axis, c in enumerate(made.is_causal))
        rings = tuple(axis == one or (not c and random.random() < 0.5)
                      for axis, c in enumerate(causal))  # fmt: skip
        return replace(made, is_causal=causal, is_circular=rings)
    if kind == "masks":
        masks = {"key_mask": number % 3 != 1, "query_mask": number % 3 != 0}
        return replace(made, scores=tuple((PLAIN_SCORES | masks).items()))
    if kind == "scores":
        scores = {"softcap": random.choice((0.5, 2.0, 4.0)), "sink": True}
        return replace(made, scores=tuple((PLAIN_SCORES | scores).items()))
    if kind == "upsampling":
        dilated = tuple(d and axis != one for axis, d in enumerate(made.dilated))
        factors = tuple(1 if d else random.choice((1, 2, 3)) for d in dilated)
        factors = (*factors[:one], random.choice((2, 3, 4)), *factors[one + 1 :])
        return replace(made, rpb=False, dilated=dilated, upsampling=factors)
    # Biases are of the size of one window.
    return replace(made, rpb=False)


def check_special_problem(kind: str, number: int, seed: int) -> None:
    """Check problem ``seed`` of such a family."""
    chosen = special_family(kind, number)
    case = family_case(chosen, seed)
    knobs = dict(chosen.knobs)
    mode = natten.use_deterministic_algorithms() if chosen.deterministic else nullcontext()
    with mode:
        if kind == "windows":
            _check_windows(case, chosen, knobs, Random(f"windows {seed}"))
        elif kind == "derivatives":
            lengths = case.additional_lengths
            lengths = None if lengths is None else lengths[:1]
            case = replace(case, batch=1, additional_lengths=lengths, frozen=())
            check_derivatives(case, chosen.backend, chosen.dtype, DEVICE, FACTOR, **knobs)
        else:
            check(case, chosen.backend, chosen.dtype, **knobs)


def _check_windows(case: Case, chosen: Family, knobs: dict[str, Any], random: Random) -> None:
    """Windows that are clipped to the grid, whole axes, or those of groups of heads."""
    grid, kernel_size = case.grid or case.tokens, list(case.kernel_size)
    kind = random.choice(("clipped", "whole", "groups"))
    if kind == "groups":
        # Of the same stride and dilation, as kernels are specialized on these.
        longest = [n // d for n, d in zip(grid, case.dilation)]
        other = tuple(random.randint(s, n) for s, n in zip(case.stride, longest))
        case = replace(case, heads_kv=2, heads=2 * chosen.group)
        check_groups(
            [case, replace(case, kernel_size=other)], chosen.backend, chosen.dtype, DEVICE,
            factor=FACTOR, product_rounding=TF32X3 if chosen.dtype == FP32 else 0.0, **knobs,
        )  # fmt: skip
        return
    called: list[Any] = list(kernel_size)
    for axis in random.sample(range(case.rank), random.randint(1, case.rank)):
        n, d = grid[axis], case.dilation[axis]
        if kind == "clipped":
            kernel_size[axis] = n // d
            called[axis] = n // d + random.randint(1, 9)
        elif n % d == 0:
            kernel_size[axis] = n // d
            called[axis] = random.choice((-1, None))
    case = replace(case, kernel_size=tuple(kernel_size))
    clips = {"clip_window": True} if kind == "clipped" else {}
    check(case, chosen.backend, chosen.dtype, **knobs, **clips, kernel_size=tuple(called))


@lru_cache
def gluon_family(number: int) -> Family:
    """The ``number``-th family for the Gluon kernels for Hopper."""
    random = Random(number)
    rank, head_dim = (1, 2, 3)[number % 3], (64, 128, 96, 80, 48)[number // 3 % 5]

    def tile(tokens: int) -> tuple[int, ...]:
        longest = 16 if rank == 3 else 128
        return random.choice([s for s in tiles.shapes(tokens, rank) if max(s) <= longest])

    knobs = {
        "q_tile_shape": tile(128),
        "kv_tile_shape": tile(random.choice((64, 128))),
        "backward_q_tile_shape": tile(8192 // tiles.block(head_dim)),
        "backward_kv_tile_shape": tile(128),
    }
    # The gradients' kernel takes these, the forward one does not.
    drawn = Random(f"scores of {number}")
    scores = {name: drawn.random() < 0.15 for name in ("sink", "query_mask")}
    scores = {**PLAIN_SCORES, **scores}
    drawn = Random(f"dilation of {number}")
    likely = drawn.choice((0.0, 0.8))
    return Family(
        rank, tuple(random.random() < 0.25 for _ in range(rank)), "hopper",
        random.choice((BF16, FP16)), head_dim, head_dim,
        group=random.choice((1, 1, 3)),
        strided=tuple(random.random() < 0.4 for _ in range(rank)),
        dilated=tuple(drawn.random() < likely for _ in range(rank)),
        contiguous=random.random() < 0.7,
        rpb=False,
        additional=random.random() < 0.4,
        negative=random.random() < 0.2,
        deterministic=False,
        lengths=False,
        is_circular=(False,) * rank,
        upsampling=(1,) * rank,
        scores=tuple(scores.items()),
        knobs=tuple(knobs.items()),
    )  # fmt: skip


def in_equal_groups(case: Case) -> Case:
    """The case on a whole grid whose dilation groups have as many tokens each."""
    extents = case.grid or case.tokens
    grid = tuple(-(-n // d) * d for n, d in zip(extents, case.dilation))
    return replace(
        case, tokens=grid, key_tokens=grid, grid=None, query_origin=None, key_origin=None
    )


def check_gluon_problem(number: int, seed: int) -> None:
    """Check problem ``seed`` of such a family, and that these kernels computed what they can."""
    chosen = gluon_family(number)
    # All gradients, which one kernel computes.
    case = replace(family_case(chosen, seed), frozen=())
    if any(d > 1 for d in case.dilation):
        case = in_equal_groups(case)
    # Of every other family, scores are bounded, where they are in bfloat16.
    with _bounding() if number % 2 else nullcontext(), _sharing_queries(), _launched() as names:
        check(case, "hopper", chosen.dtype, **dict(chosen.knobs))
    wanted = {"hopper_forward_kernel"}
    if case.head_dim in tiles.FUSED.sizes:
        wanted.add("hopper_gradients_kernel")
    assert wanted <= names.keys(), f"{wanted - names.keys()} did not run, but {names}"


@contextmanager
def _sharing_queries() -> Iterator[None]:
    """Inside, programs with additional keys share queries in one pass of all gradients however few
    there are."""
    triton_backends.HOPPER._backward_tilings.cache_clear()
    with mock.patch.object(tiles, "_LEAST_QUERIES", 1):
        yield
    triton_backends.HOPPER._backward_tilings.cache_clear()


# Kernels for grids of different sizes are compiled for each of these.
GRIDS_FAMILIES = 12


def check_grids_problem(number: int, seed: int) -> None:
    """Check grids of different sizes in one call, which launches each kernel once, unless one size
    alone was drawn."""
    cases = random_grids(number, seed)
    dtype = DTYPES[("bfloat16", "float16", "bfloat16", "float32")[number % 4]]
    backend = "cutlass"
    if (
        has_hopper()
        and dtype != FP32
        and {cases[0].head_dim, cases[0].head_dim_v} <= {*HOPPER_DIMS}
    ):
        backend = ("cutlass", "hopper")[number // 4 % 2]
    rounding = TF32X3 if dtype == FP32 else 0.0
    with _launched() as names:
        check_grids(cases, backend, dtype, "cuda", factor=FACTOR, product_rounding=rounding)
    windows = {(c.tokens, c.kernel_size, c.stride, c.dilation) for c in cases}
    if len(windows) > 1:
        for name in ("forward_kernel", "query_gradient_kernel"):
            assert names[name] == 1, names


def _captured(
    step: Callable[[], list[Tensor]], is_cold: bool = False
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of a step, and the results that replays fill; not ``is_cold``, the step has run
    before, on a side stream."""
    if not is_cold:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def _replays(graph: torch.cuda.CUDAGraph, leaves: list[Tensor]) -> Iterator[None]:
    """Two replays, with other numbers in the leaves."""
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
        graph.replay()
        torch.cuda.synchronize()
        yield


def check_grids_graph() -> None:
    """Captured as a CUDA graph after the same call, and with nothing prepared, and replayed with
    other numbers; tables that come later do not disturb it. In order, and so bit for bit."""

    def step(leaves: list[Tensor], layout: GridLayout) -> list[Tensor]:
        out = neighborhood_attention_varlen(*leaves, layout, kernel_size=5)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    def tensors(layout: GridLayout) -> list[Tensor]:
        shape = (1, layout.total, 2, 64)
        return [torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]

    for is_cold in (False, True):
        layout = GridLayout([(9 + is_cold, 14), (30, 7), (17, 18)])
        leaves = tensors(layout)
        graph, captured = _captured(partial(step, leaves, layout), is_cold)
        for n in range(300):
            # As many tables as are kept, and memory for them.
            other = GridLayout([(5, 6 + n), (6, 5)])
            step(tensors(other), other)
        for _ in _replays(graph, leaves):
            for got, wanted in zip(captured, step(leaves, layout)):
                if is_cold:
                    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)
                else:
                    assert torch.equal(got, wanted)


def check_modules_graph() -> None:
    """A step of modules with norms, rotary positions, registers and contexts of grids of different
    sizes, captured as a CUDA graph and replayed with other numbers, lengths included, when what
    calls left with the layout is gone."""
    torch.manual_seed(0)
    layout = GridLayout([(9, 14), (30, 7), (17, 18)])
    shared: dict[str, Any] = {"qk_norm": True, "rotary": True, "device": "cuda", "dtype": BF16}
    first = NeighborhoodAttention2D(128, 2, 5, **shared)
    second = NeighborhoodCrossAttention2D(128, 2, 5, context_dim=32, **shared)
    leaves = [
        torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True)
        for shape in ((1, layout.total, 128), (3, 4, 128), (3, 9, 32))
    ]
    lengths = torch.tensor([9, 0, 4], device="cuda")
    wanted = [*leaves, *first.parameters(), *second.parameters()]

    def step() -> list[Tensor]:
        x, registers, context = leaves
        x, registers = first(x, registers, layout=layout)
        out = second(x, context, lengths, layout=layout)
        loss = out.float().square().sum() + registers.float().sum()
        return [out, registers, *torch.autograd.grad(loss, wanted)]

    with _launched() as names:
        step()
    # Registers attend once for each size.
    forward = [name for name in names.elements() if "forward" in name]
    assert len(forward) <= 2 + len(layout.sizes), names
    graph, captured = _captured(step)
    layout._kept.clear()
    # Whose memory these would get, were it that of the graph.
    others = [torch.randn(layout.total, 32, device="cuda") for _ in range(50)]
    for number, _ in enumerate(_replays(graph, leaves)):
        for got, right in zip(captured, step(), strict=True):
            scale = right.abs().max().item()
            torch.testing.assert_close(got, right, atol=2e-2 * scale, rtol=2e-2)
        lengths.copy_(torch.tensor([number, 9, 3]))
    del others


@contextmanager
def _bounding(least: float = 0.0) -> Iterator[None]:
    """Inside, problems of so many products are large enough to bound scores for."""
    from natten.functional.backends.triton import hopper_forward

    sizes = {"_LEAST_PRODUCTS": least, "_LEAST_KEYS": 0}
    with mock.patch.multiple(hopper_forward, **sizes):
        yield


@contextmanager
def _launched() -> Iterator[Counter[str]]:
    """How often each kernel is launched inside, by name."""
    names: Counter[str] = Counter()
    run = Launch.run

    def noted(launch: Launch, *tensors: Any) -> None:
        if not is_collecting():  # then it is only compiled
            names[launch.kernel.fn.__name__] += 1
        run(launch, *tensors)

    with mock.patch.object(Launch, "run", noted):
        yield names


def check_free_problem(seed: int) -> None:
    """A random problem of any kind with nothing fixed, default tiles, and the backend chosen for
    it."""
    kinds = list(problems.KINDS)
    dtypes = (BF16, FP16, FP32)
    on = problems.On(
        device="cuda", max_tokens=600, dtypes=dtypes, factor=FACTOR, product_rounding=TF32X3
    )
    # Half of the windows through descriptors.
    wide = _through_descriptors if seed % 2 else lambda case: case
    # Of every third, programs share columns, which in so small problems they do not by themselves.
    with problems.sharing(2 + seed % 2) if seed % 3 == 1 else nullcontext():
        problems.check(kinds[seed // 2 % len(kinds)], seed, on._replace(changed=wide))


# ---------------------------------------------------------------- single checks


def check_determinism() -> None:
    """The same bits on every run when asked for, with a bias and additional tokens."""
    cases = [
        Case("rpb", (56, 56), (7, 7), batch=8, heads=4, head_dim=32, rpb=True),
        Case("rpb_3d", (8, 16, 16), (3, 5, 7), batch=3, heads=4, head_dim=64, rpb=True),
        Case("additional", (64, 64), (9, 9), batch=2, heads=4, head_dim=64, additional=300),
        Case("causal", (4096,), (1024,), is_causal=(True,), batch=1, heads=4, head_dim=128),
        # Large enough for one pass of gradients, if the order of additions may change.
        Case("large", (8192,), (8192,), batch=1, heads=4, head_dim=128),
    ]
    for case in cases:
        for name in backends():
            inputs = make_inputs(case, BF16, "cuda")
            torch.manual_seed(0)
            reruns = []
            with natten.use_deterministic_algorithms():
                for _ in range(4):
                    out, lse = run(case, inputs, f"{name}-fna")
                    grad = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)
                    loss = (out.float() * grad).sum() + lse.sum()
                    gradients = torch.autograd.grad(loss, list(inputs.tensors().values()))
                    reruns.append((out, lse, *gradients))
            for again in reruns[1:]:
                for a, b in zip(reruns[0], again):
                    assert torch.equal(a, b), f"{case.name} with {name} differs between runs"


def check_deterministic_bias() -> None:
    """The bias gradient of the deterministic mode is as exact as the other."""
    with natten.use_deterministic_algorithms():
        for case in CASES:
            if case.rpb:
                check(case, "cutlass", FP16)


def _exact_corner(
    tensors: list[Tensor], low: list[int], high: list[int], outer: list[int], window: dict[str, Any]
) -> list[Tensor]:
    """out, dq of the queries in ``[low, high)``, and dk, dv of the keys there, in float64.

    Of the last batch entry and heads. ``outer`` is where a box begins that holds all queries that
    see these keys; a window further holds all keys that those see.
    """
    query, key, value, grad_out = tensors
    grid = list(query.shape[1:-2])
    reach = [max(o - k, 0) for o, k in zip(outer, window["kernel_size"])]
    queries = tuple(slice(o, n) for o, n in zip(outer, grid))
    keys = tuple(slice(o, n) for o, n in zip(reach, grid))
    # Heads enough for a largest value that means something where a corner is two tokens.
    one = (slice(-1, None), *queries, slice(-16, None))
    other = (slice(-1, None), *keys, slice(-16, None))
    q, g = query[one].double().requires_grad_(), grad_out[one].double()
    k, v = (t[other].double().requires_grad_() for t in (key, value))
    out = neighborhood_attention_generic(
        q, k, v, **window, grid=grid, query_origin=outer, key_origin=reach, backend="reference"
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), g)

    def crop(tensor: Tensor, origin: list[int]) -> Tensor:
        return tensor[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(low, high, origin)))]

    return [crop(out.detach(), outer), crop(dq, outer), crop(dk, reach), crop(dv, reach)]


def _check_corner(shape: tuple[int, ...], backend: str, **window: Any) -> None:
    """Compare the last tokens of the last batch entry and heads of a tensor of any size."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(shape, dtype=BF16, device="cuda", generator=generator)

    tensors = [randn() for _ in range(4)]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out = neighborhood_attention_generic(*leaves, **window, backend=backend)
    gradients = torch.autograd.grad(out, leaves, tensors[3])
    grid = list(shape[1:-2])
    kernel, dilation = window["kernel_size"], window.get("dilation", (1,) * len(grid))
    reach = [k * d for k, d in zip(kernel, dilation)]
    low = [max(n - 8, 0) for n in grid]
    outer = [max(n - 2 * r, 0) for n, r in zip(low, reach)]
    window = {**window, "kernel_size": kernel}
    with torch.no_grad():
        plain = [t.detach() for t in tensors]
    with torch.enable_grad():
        exact = _exact_corner(plain, low, grid, outer, window)
    corner = (slice(-1, None), *(slice(a, b) for a, b in zip(low, grid)), slice(-16, None))
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), (out, *gradients), exact):
        error = (got[corner].detach().double() - wanted).abs().max()
        bound = 0.03 * wanted.abs().max()
        assert error <= bound, f"{name} of {backend}: error {error:.3g}, allowed {bound:.3g}"


def check_huge_grid() -> None:
    """One image of more than 2**31 elements; rows of tiles are 2**31 elements apart."""
    for name in backends():
        _check_corner((1, 8, 66000, 32, 128), f"{name}-fna", kernel_size=(7, 7))
        torch.cuda.empty_cache()


def check_huge_batch() -> None:
    """A batch of more than 2**31 elements."""
    for name in backends():
        _check_corner((5, 330, 333, 32, 128), f"{name}-fna", kernel_size=(5, 5))
        torch.cuda.empty_cache()


def check_huge_heads() -> None:
    """More than 2**31 elements of two tokens, and 18 million programs."""
    _check_corner((70000, 2, 256, 64), "cutlass-fna", kernel_size=(2,))
    torch.cuda.empty_cache()


def check_many_programs() -> None:
    """More programs than the 65535 that a grid's second and third axis can have."""
    shape = (1100, 64, 64, 16)
    for name in backends():
        _check_corner(shape, f"{name}-fna", kernel_size=(9,))
        _check_corner((40000, 5, 2, 16), f"{name}-fna", kernel_size=(3,))


def check_empty_batch() -> None:
    for name in backends():
        for rank in (1, 2, 3):
            shape = (0, *(6,) * rank, 2, 64)
            leaves = [
                torch.zeros(shape, dtype=BF16, device="cuda", requires_grad=True) for _ in range(3)
            ]
            rpb = torch.zeros(2, *(5,) * rank, dtype=BF16, device="cuda", requires_grad=True)
            out = neighborhood_attention_generic(*leaves, 3, rpb=rpb, backend=f"{name}-fna")
            gradients = torch.autograd.grad(out.sum(), [*leaves, rpb])
            assert out.shape == shape
            assert bool((gradients[-1] == 0).all())


def check_large_scores() -> None:
    """Scores in the thousands, and rows whose first tiles are all masked: no NaN anywhere."""
    for name in backends():
        for dtype in (BF16, FP16):
            case = Case("large", (700,), (33,), batch=1, head_dim=64, magnitude=30.0)
            check(case, name, dtype)
            case = Case(
                "late_windows", (300,), (11,), (11,), (2,), (True,), batch=1, head_dim=64,
                magnitude=8.0,
            )  # fmt: skip
            check(case, name, dtype)
            query, key, value = torch.randn(3, 1, 20, 20, 2, 64, device="cuda").to(dtype)
            key[:, 10:] = torch.nan
            out = natten.na2d(query, key, value, 5, backend=f"{name}-fna")
            assert not bool(out[:, :8].isnan().any()), "keys out of sight must not matter"


def check_bounded_scores() -> None:
    """Heads whose scores have a small bound, and others in the same call: as exact as without."""
    if not has_hopper():
        return
    factors = torch.tensor([1.0, 8.0, 0.0, 1.0, 1e-18, 1e6], device="cuda")[:, None]
    window: dict[str, Any] = {"kernel_size": (30, 17), "is_causal": (True, False)}
    fast = {"backend": "hopper-fna", "kernel_schedule": "pp", "return_lse": True}
    for heads_kv, head_dim in ((6, 128), (2, 64), (3, 96)):
        shape = (2, 40, 45, 6, head_dim)
        query, key, value = torch.randn(3, *shape, device="cuda")
        query = (query * factors).to(BF16)
        key, value = (t[..., :heads_kv, :].to(BF16) for t in (key, value))
        key[0, 3, 3, 0], key[1, 0, 0, 1] = 100.0, torch.inf
        doubles = [t.double() for t in (query, key, value)]
        exact, exact_lse = natten.na2d(*doubles, **window, backend="reference", return_lse=True)
        finite = exact.isfinite()
        rows = finite[..., 0] & exact_lse.isfinite()
        errors = []
        for least, launches in ((torch.inf, 1), (0.0, 2)):
            with _bounding(least), _launched() as names:
                out, lse = natten.na2d(query, key, value, **window, **fast)
            assert names["hopper_forward_kernel"] == launches, names
            assert names["longest_kernel"] == launches - 1, names
            errors.append((out.double() - exact)[finite].abs().max())
            torch.testing.assert_close(lse[rows], exact_lse[rows].float(), rtol=1e-3, atol=1e-3)
        assert errors[1] <= 1.1 * errors[0], errors


def check_dilation_groups() -> None:
    """Hopper's own kernels read nothing of other dilation groups and batch entries: NaN stays in
    its group. Of packed tensors, and of contiguous ones."""
    if not has_hopper():
        return
    for grid, dilation in (((600,), (3,)), ((40, 36), (2, 3)), ((10, 12, 16), (2, 3, 4))):
        rank, kernel_size = len(grid), tuple(n // d - 1 for n, d in zip(grid, dilation))
        packed = torch.randn(3, *grid, 3, 2, 128, device="cuda", dtype=BF16)
        group = (1, *(slice(d - 1, None, d) for d in dilation))
        spoilt = packed.clone()
        spoilt[group] = torch.nan
        others = torch.ones(3, *grid, dtype=torch.bool, device="cuda")
        others[group] = False
        fast = {"kernel_size": kernel_size, "dilation": dilation, "kernel_schedule": "pp"}
        tile = (1,) * (rank - 1)
        fast |= {"backward_q_tile_shape": (*tile, 64), "backward_kv_tile_shape": (*tile, 128)}
        for is_packed in (True, False):
            results = []
            for tensor in (packed, spoilt):
                views = [t if is_packed else t.contiguous() for t in tensor.unbind(-3)]
                leaves = [t.detach().requires_grad_() for t in views]
                with _launched() as names:
                    out = getattr(natten, f"na{rank}d")(*leaves, backend="hopper-fna", **fast)
                    gradients = torch.autograd.grad(out.sum(), leaves)
                assert {"hopper_forward_kernel", "hopper_gradients_kernel"} <= names.keys(), names
                results.append([t[others] for t in (out, *gradients)])
            for got, wanted in zip(*results):
                # Sums for queries are added in any order.
                torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def check_shared_keys() -> None:
    """Few queries with many keys, which programs share by default, and not if told so; in backward
    passes also few keys with many queries."""
    cases = [
        Case("keys", (7000,), None, batch=1, heads=8, head_dim=64, key_tokens=(77,)),
        Case("queries", (40,), None, batch=1, head_dim=64, key_tokens=(7000,)),
        Case("one_query", (1,), None, heads=8, heads_kv=2, head_dim=128, key_tokens=(5000,)),
        Case("dense", (2600,), (2600,), batch=1, heads=1, head_dim=128),
        Case("plane", (60, 50), (60, 33), batch=1, heads=1, head_dim_v=32, sink=True),
        Case("context", (9, 9), (5, 5), (2, 1), additional=1700, additional_lengths=(1700, 9)),
        Case("space", (6, 20, 16), (6, 20, 14), batch=1, heads=1, head_dim=80, query_mask=True),
    ]  # fmt: skip
    for case in cases:
        for dtype in (BF16, FP32):
            for name, takes in (("hopper", dtype != FP32), ("cutlass", True)):
                if name not in backends() or not takes or (name == "hopper" and case.head_dim < 64):
                    continue
                for is_parallel in (True, False):
                    with natten.use_kv_parallelism_in_fused_na(is_parallel), _launched() as names:
                        check(case, name, dtype)
                    assert (names["merge_kernel"] > 0) == is_parallel, (case.name, name, names)


def check_layouts() -> None:
    """Views of other tensors give what their contiguous copies give."""
    for name in backends():
        packed = torch.randn(2, 20, 18, 3, 4, 64, device="cuda", dtype=BF16)
        heads_first = torch.randn(3, 2, 4, 20, 18, 64, device="cuda", dtype=BF16)
        shifted = torch.randn(3, 2, 20, 18, 4, 65, device="cuda", dtype=BF16)[..., 1:]
        spread = torch.randn(3, 1, 20, 18, 4, 64, device="cuda", dtype=BF16).expand(
            3, 2, 20, 18, 4, 64
        )
        shared_heads = torch.randn(3, 2, 20, 18, 1, 64, device="cuda", dtype=BF16).expand(
            3, 2, 20, 18, 4, 64
        )
        every_other = torch.randn(3, 2, 40, 36, 8, 64, device="cuda", dtype=BF16)
        for views in (
            packed.unbind(3),
            heads_first.movedim(2, 4).unbind(0),
            shifted.unbind(0),
            spread.unbind(0),
            shared_heads.unbind(0),
            every_other[:, :, ::2, 1::2, ::2].unbind(0),
        ):
            results = []
            for tensors in (views, [t.contiguous() for t in views]):
                leaves = [t.detach().requires_grad_() for t in tensors]
                out = natten.na2d(*leaves, kernel_size=7, backend=f"{name}-fna")
                grad = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=BF16)
                # A gradient that is not contiguous either.
                grad = grad.view(2, 4, 20, 18, 64).movedim(1, 3)
                results.append((out, *torch.autograd.grad(out, leaves, grad)))
            for got, wanted in zip(*results):
                torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)
        out = natten.na2d(*views, kernel_size=7, backend=f"{name}-fna")
        loss = natten.na2d(*leaves, kernel_size=7, backend=f"{name}-fna").sum()
        loss.backward()  # a gradient of stride 0
        assert out.isfinite().all()


def check_schedules() -> None:
    """kernel_schedule of `hopper`: three different loops, each right."""
    if not has_hopper():
        return
    for schedule in ("non", "coop", "pp"):
        for case in (
            Case("1d", (1000,), (333,), head_dim=128, batch=1),
            Case("2d", (40, 36), (13, 11), head_dim=64),
            Case("3d_causal", (8, 12, 14), (5, 7, 9), is_causal=(True, False, False), head_dim=128),
            Case("2d_rpb_additional", (24, 20), (9, 9), head_dim=64, rpb=True, additional=50),
            Case("attention", (700,), None, head_dim=128, is_causal=(True,)),
        ):
            check(case, "hopper", BF16, kernel_schedule=schedule)


def check_listed_names() -> None:
    """The tile shapes that known clients ask for are listed."""
    for backend, kind, rank, pair in (
        ("cutlass", "fmha", 1, (64, 64)),
        ("cutlass", "fna", 2, ((8, 8), (8, 8))),
        ("cutlass", "fna", 3, ((4, 4, 4), (4, 4, 4))),
        ("hopper", "fna", 3, ((4, 4, 8), (4, 4, 8))),
    ):
        if backend not in backends():
            continue
        for head_dim in (64, 128):
            tensor = torch.zeros(1, *(16,) * rank, 2, head_dim, dtype=BF16, device="cuda")
            for backward in (False, True):
                pairs = listed_pairs(backend, backward, tensor, tensor, tensor, kind=kind)
                direction = "backward" if backward else "forward"
                assert pair in pairs, f"{backend}-{kind} must list {pair} ({direction})"


def listed_checks(count: int = 6) -> Iterator[tuple[str, Check]]:
    """A sample of the listed tile shapes, each run forward and backward."""
    random = Random(3)
    cases = {
        1: Case("1d", (500,), (201,), batch=1, head_dim=64),
        2: Case("2d", (30, 34), (13, 11), batch=1, head_dim=64),
        3: Case("3d", (7, 12, 10), (5, 7, 9), batch=1, head_dim=128),
    }
    for name in backends():
        for rank, case in cases.items():
            tensor = torch.zeros(1, *case.tokens, 2, case.head_dim, dtype=BF16, device="cuda")
            forward, backward = (
                listed_entries(name, back, tensor, tensor, tensor) for back in (False, True)
            )
            for _ in range(count):
                entry, pair = random.choice(forward[1:]), random.choice(backward[1:])
                knobs: dict[str, Any] = {}
                if name == "hopper":
                    entry, schedule = entry
                    knobs["kernel_schedule"] = schedule
                knobs |= {
                    "q_tile_shape": entry[0],
                    "kv_tile_shape": entry[1],
                    "backward_q_tile_shape": pair[0],
                    "backward_kv_tile_shape": pair[1],
                }
                title = f"{name} rank {rank} {entry} {pair} {knobs.get('kernel_schedule', '')}"
                yield title, partial(check, case, name, BF16, **knobs)


@dataclass(frozen=True)
class Pairs:
    """A problem, and a pair of tiles for its forward and one for its backward pass."""

    case: Case
    backend: str
    dtype: torch.dtype
    knobs: tuple[tuple[str, Any], ...]

    @property
    def cost(self) -> int:
        """Grows with the time to compile its kernels."""
        tokens = [prod(shape) for name, shape in self.knobs if name.endswith("tile_shape")]
        return (6 if self.dtype == FP32 else 1) * self.case.head_dim * sum(tokens)


def _one_of(random: Random, entries: list[Any], pair: Callable[[Any], Any]) -> Any:
    """An entry, all sizes of tiles alike, however many shapes they have."""
    by_size: dict[Any, list[Any]] = {}
    for entry in entries:
        by_size.setdefault(tuple(map(prod, pair(entry))), []).append(entry)
    return random.choice(by_size[random.choice(sorted(by_size))])


@cache
def listed_pair(seed: int) -> Pairs:
    """The ``seed``-th problem with listed pairs: all kernels, dtypes, heads, ranks and features."""
    random = Random(1000 + seed)
    backend = backends()[seed % len(backends())]
    rank = (1, 2, 2, 3, 3)[seed // 2 % 5]
    dtype = random.choice((BF16, FP16))
    head_dim = random.choice((32, 64, 64, 128, 128, 256))
    head_dim_v = random.choice((head_dim, head_dim, head_dim, 64))
    if backend == "cutlass":
        dtype = random.choice((BF16, FP16, FP32, FP32))
        head_dim = random.choice((32, 48, 64, 64, 128, 128, 256))
        if dtype != FP32 and random.random() < 0.15:
            head_dim = random.choice((320, 512, 1024))
        head_dim_v = random.choice((head_dim, head_dim, head_dim, 32, 128))
    tokens = {1: (333,), 2: (19, 21), 3: (7, 9, 10)}[rank]
    dilation = tuple(random.choice((1, 1, 2)) if random.random() < 0.3 else 1 for _ in tokens)
    kernel_size = tuple(random.randint(2, n // d) for n, d in zip(tokens, dilation))
    causal = tuple(random.random() < 0.2 for _ in tokens)
    heads_kv = random.choice((1, 2))
    case = Case(
        f"pair {seed}", tokens, kernel_size,
        tuple(random.randint(1, k) if random.random() < 0.3 else 1 for k in kernel_size),
        dilation, causal, batch=random.choice((1, 2)), heads=2, heads_kv=heads_kv,
        head_dim=head_dim, head_dim_v=head_dim_v,
        additional=random.choice((0, 0, 0, 40)),
        rpb=not any(causal) and random.random() < 0.25,
        contiguous=random.random() < 0.8,
    )  # fmt: skip
    # Asked for as people do: with query, key and value alone.
    query = torch.zeros(1, *tokens, 2, head_dim, dtype=dtype, device="cuda")
    key = query[..., :heads_kv, :]
    value = query.new_zeros(1, *tokens, heads_kv, head_dim_v)
    knobs: dict[str, Any] = {}
    schedules = backend == "hopper"
    entry = _one_of(
        random, listed_entries(backend, False, query, key, value),
        lambda entry: entry[0] if schedules else entry,
    )  # fmt: skip
    if schedules:
        entry, knobs["kernel_schedule"] = entry
    knobs["q_tile_shape"], knobs["kv_tile_shape"] = entry
    entry = _one_of(random, listed_entries(backend, True, query, key, value), lambda entry: entry)
    knobs["backward_q_tile_shape"], knobs["backward_kv_tile_shape"] = entry
    return Pairs(case, backend, dtype, tuple(knobs.items()))


def check_listed_pair(seed: int) -> None:
    """Check the ``seed``-th problem with these tiles, forward and backward."""
    chosen = listed_pair(seed)
    try:
        check(chosen.case, chosen.backend, chosen.dtype, **dict(chosen.knobs))
    except Exception as error:
        error.args = (f"{chosen}: {error}",)
        raise


def check_packed_bits(
    backend: str, head_dim: int, knobs: dict[str, Any], is_causal: tuple[bool, ...] = (False, True)
) -> None:
    """Packed sequences have the bits of the same sequences one at a time, with the same tiles."""
    if backend not in backends():
        return
    failures = []
    for causal in is_causal:
        # Gradients in two kernels, and where the tiles are its own, in one pass.
        for deterministic in (True, False):
            try:
                check_packed_sequences(
                    backend, BF16, "cuda", lengths=(700, 3, 1, 0, 512, 128), head_dim=head_dim,
                    is_causal=causal, deterministic=deterministic, **knobs,
                )  # fmt: skip
            except AssertionError as error:
                failures.append(f"head_dim {head_dim} {causal=} {deterministic=}: {error}")
    assert not failures, f"{len(failures)} differ: " + " | ".join(failures)


PACKED_BITS: dict[str, Check] = {
    f"packed_bits_{backend}_{schedule}": partial(
        check_packed_bits, backend, head_dim,
        tiles_1d(*sizes) | ({"kernel_schedule": schedule} if schedule else {}),
    )
    for backend, schedule, head_dim, sizes in (
        ("cutlass", None, 64, (64, 64, 64, 64)),
        ("hopper", "non", 64, (64, 64, 64, 64)),
        ("hopper", "coop", 64, (128, 64, 128, 64)),
        ("hopper", "pp", 64, (64, 64, 128, 128)),
        ("hopper", None, 128, (128, 128, 64, 128)),
    )
}  # fmt: skip


def check_entries_bits() -> None:
    """Batch entries have the bits that they have alone, in deterministic mode."""
    shapes = shapes_2d((8, 8), (8, 8), (8, 8), (8, 8))
    for name in backends():
        for head_dim in (64, 128):
            for knobs in ({}, {"rpb": True}, {"additional": 70}, {"stride": (2, 1)}):
                check_batch_entries(
                    name, BF16, "cuda", tokens=(40, 36), kernel_size=(13, 11), batch=5,
                    heads=(4, 2), head_dim=head_dim, **knobs, **shapes,
                )  # fmt: skip
    check_batch_entries("cutlass", FP32, "cuda", tokens=(40, 36), kernel_size=(13, 11), **shapes)


def check_explain() -> None:
    """explain names the backend that runs a call."""
    half = torch.zeros(1, 16, 16, 2, 64, dtype=BF16, device="cuda")
    expected = "hopper-fna" if has_hopper() else "cutlass-fna"
    if torch.cuda.get_device_capability()[0] <= 9:
        explanation = natten.explain(half, half, half, 7)
        assert explanation.chosen == expected, str(explanation)
        single = half.float()
        explanation = natten.explain(single, single, single, 7)
        assert explanation.chosen == "cutlass-fna", str(explanation)
        reasons = {d.backend: d.reason for d in explanation.decisions}
        assert reasons["cutlass-fna"] is None
        assert reasons["blackwell-fna"] is not None


def check_backward_knobs() -> None:
    """Splits, row sums by torch, memory preference and KV parallelism keep the result."""
    case = Case("2d", (30, 34), (13, 11), batch=2, head_dim=64, heads=4, heads_kv=2)
    for name in backends():
        check(case, name, BF16, backward_kv_splits=(2, 3))
        check(case, name, BF16, backward_use_pt_reduction=True)
        many = Case("1d_splits", (3000,), (33,), batch=1, heads=1, additional=40, head_dim=64)
        for preference in ("strict", "default", "unrestricted"):
            with natten.set_memory_usage_preference(preference):
                check(many, name, FP16)
        with natten.use_kv_parallelism_in_fused_na(False):
            check(many, name, FP16)


def check_one_pass() -> None:
    """All gradients in one pass: by default where that is faster, unless something forbids it."""
    if not has_hopper():
        return
    name = "hopper_gradients_kernel"
    for head_dim in (48, 64, 80, 96, 128):
        case = Case("large", (8192,), None, batch=1, heads=3, heads_kv=3, head_dim=head_dim)
        for preference in ("strict", "default", "unrestricted"):
            with natten.set_memory_usage_preference(preference), _launched() as names:
                check(case, "hopper", BF16)
            assert (name in names) == (preference != "strict"), (preference, names)
        with natten.use_deterministic_algorithms(), _launched() as names:
            check(case, "hopper", BF16)
        assert name not in names
        with _launched() as names:
            check(case, "hopper", BF16, backward_use_pt_reduction=True)
        assert name in names
        # Sums of so many heads as to be made in two launches, of two heads and of one.
        with mock.patch.object(triton_backends, "_SMALL_SUMS", 0):
            check(case, "hopper", BF16)
        # Another launch for additional keys, so few that programs share queries unless forbidden.
        for more in (
            replace(case, kernel_size=(8192,), additional=77),
            replace(case, kernel_size=(4000,), additional=300, batch=2, heads=6),
            Case("frozen", (64, 128), (64, 128), batch=1, heads=3, heads_kv=3, head_dim=head_dim,
                 additional=1, frozen=("additional_keys", "additional_values")),
        ):  # fmt: skip
            for is_parallel in (True, False):
                with natten.use_kv_parallelism_in_fused_na(is_parallel), _launched() as names:
                    check(more, "hopper", BF16)
                assert names[name] == 2 * names["statistics_kernel"], names
                assert ("merge_kernel" in names) == (is_parallel and not more.frozen), names
            with mock.patch.object(triton_backends, "_SMALL_SUMS", 0):
                check(more, "hopper", BF16)


def check_precision() -> None:
    """float32 products follow torch's float32 matmul precision."""
    case = Case("2d", (24, 20), (9, 9), head_dim=64)
    inputs = make_inputs(case, FP32, "cuda")
    exact, _ = run(case, inputs.to(torch.float64), "reference")
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            out, _ = run(case, inputs, "cutlass-fna")
            errors[precision] = float((out.double() - exact).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 5e-6 < errors["high"] < 5e-3, errors


def check_streams() -> None:
    """Calls on several streams at once do not disturb one another."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(3, 2, 40, 40, 4, 64, device="cuda", generator=generator).to(BF16)
        for _ in range(6)
    ]

    def step(tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = natten.na2d(*leaves, kernel_size=11)
        return (out, *torch.autograd.grad(out.float().square().sum(), leaves))

    expected = [step(tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(3):
        results = []
        for tensors, stream in zip(inputs, streams):
            with torch.cuda.stream(stream):
                results.append(step(tensors))
        torch.cuda.synchronize()
        for got, wanted in zip(results, expected):
            for a, b in zip(got, wanted):
                assert torch.equal(a, b)


def check_graph() -> None:
    """A forward and backward pass captured as a CUDA graph, replayed with other inputs."""
    for name in backends():
        leaves = [
            torch.randn(2, 24, 24, 4, 64, device="cuda", dtype=BF16, requires_grad=True)
            for _ in range(3)
        ]
        grad = torch.randn(2, 24, 24, 4, 64, device="cuda", dtype=BF16)

        def step(
            leaves: list[Tensor] = leaves, name: str = name, grad: Tensor = grad
        ) -> list[Tensor]:
            out = natten.na2d(*leaves, kernel_size=7, backend=f"{name}-fna")
            return [out, *torch.autograd.grad(out, leaves, grad)]

        graph, captured = _captured(step)
        for _ in _replays(graph, leaves):
            for got, wanted in zip(captured, step()):
                assert torch.equal(got, wanted)


def check_cold_graph() -> None:
    """Calls that nothing was compiled or planned for are captured; what cannot be says so."""
    for number, name in enumerate(backends()):
        shape = (1, 19 + 2 * number, 23, 2, 64)
        leaves = [
            torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)
        ]
        rpb = torch.randn(2, 9, 13, device="cuda", requires_grad=name == "cutlass")
        named = {"rpb": rpb} if name == "cutlass" else {}
        inputs = [*leaves, *named.values()]

        def step(
            leaves: list[Tensor] = leaves,
            inputs: list[Tensor] = inputs,
            name: str = name,
            named: dict[str, Tensor] = named,
        ) -> list[Tensor]:
            out = natten.na2d(*leaves, kernel_size=(5, 7), backend=f"{name}-fna", **named)
            return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

        graph, captured = _captured(step, is_cold=True)
        for _ in _replays(graph, inputs):
            wanted = step()
            for got, true in zip(captured[:4], wanted):
                torch.testing.assert_close(got, true, atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(captured[4:], wanted[4:], atol=0.5, rtol=5e-2)


def check_compiling_again() -> None:
    """What has been compiled for calls is not launched by what compiles beforehand."""
    for name in backends():
        leaves = [
            torch.randn(2, 40, 48, 2, 64, device="cuda", dtype=BF16, requires_grad=True)
            for _ in range(3)
        ]
        for _ in range(3):
            out = natten.na2d(*leaves, 7, backend=f"{name}-fna")
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            problem = make_problem(
                (40, 48), 7, batch=2, heads=2, head_dim=64, device="cuda", requires_grad=True
            )
            natten.precompile(problem)
            torch.cuda.synchronize()


def check_default_device() -> None:
    """A default device other than the tensors' changes nothing."""
    tensors = torch.randn(1, 13, 17, 2, 64, device="cuda", dtype=BF16).requires_grad_()
    rpb = torch.randn(2, 5, 5, device="cuda")

    def step() -> list[Tensor]:
        out = natten.na2d(tensors, tensors, tensors, 3, rpb=rpb)
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    with torch.device("meta"):
        cold = step()
    for got, wanted in zip(cold, step()):
        assert torch.equal(got, wanted)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = natten.NeighborhoodAttention2D(128, 2, kernel_size=7, dilation=2)
        self.head = torch.nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x)).mean((1, 2))


def check_packed_gradients() -> None:
    """Query, key and value in one tensor, and one gradient, whichever way they are loaded."""
    for dtype in (BF16, FP16):
        check_packed(backends(), dtype, "cuda")


def check_training_step() -> None:
    """Steps under autocast, compiled and not, agree."""
    x = torch.randn(4, 28, 28, 128, device="cuda")
    target = torch.randint(10, (4,), device="cuda")
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = _Block().cuda()
        step = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[compiled] = []
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(step(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[compiled].append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    worst = max(abs(a - b) for a, b in zip(losses[False], losses[True]))
    assert worst < 0.02, losses
    assert losses[True][-1] < losses[True][0], losses


# The first take longest.
SINGLE: dict[str, Check] = {
    "training_step": check_training_step,
    "schedules": check_schedules,
    "dilation_groups": check_dilation_groups,
    **PACKED_BITS,
    "entries_bits": check_entries_bits,
    "packed": check_packed_gradients,
    "deterministic_bias": check_deterministic_bias,
    "backward_knobs": check_backward_knobs,
    "one_pass": check_one_pass,
    "huge_grid": check_huge_grid,
    "huge_batch": check_huge_batch,
    "huge_heads": check_huge_heads,
    "determinism": check_determinism,
    "large_scores": check_large_scores,
    "bounded_scores": check_bounded_scores,
    "shared_keys": check_shared_keys,
    "layouts": check_layouts,
    "many_programs": check_many_programs,
    "empty_batch": check_empty_batch,
    "listed_names": check_listed_names,
    "explain": check_explain,
    "precision": check_precision,
    "streams": check_streams,
    "graph": check_graph,
    "cold_graph": check_cold_graph,
    "grids_graph": check_grids_graph,
    "modules_graph": check_modules_graph,
    "compiling_again": check_compiling_again,
    "default_device": check_default_device,
}
# These need half the memory of a GPU: one at a time.
HUGE = ("huge_grid", "huge_batch", "huge_heads")


def _compute_grids(backend: str) -> None:
    """Grids of different sizes in one launch, and their gradients."""
    layout = GridLayout([(9, 14), (5, 7), (11, 6)])
    shape = (1, layout.total, 1, 64)
    leaves = [torch.randn(shape).to("cuda", FP16).requires_grad_() for _ in range(3)]
    with nan_filled_empties(), _launched() as names:
        out = neighborhood_attention_varlen(
            *leaves, layout, kernel_size=5, backend=f"{backend}-fna"
        )
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert names["query_gradient_kernel"] == 1, names


def _compute_within(context: Any, *problem: Any, **knobs: Any) -> None:
    with context:
        compute(*problem, **knobs)


def sanitized_cases() -> Iterator[tuple[str, Check]]:
    """A few small problems that reach every kernel and every way of loading, for sanitizers."""
    named = {case.name: case for case in CASES}
    one = dict(batch=1, heads=1)
    chosen = [
        ("cutlass", named["2d_s25_d23_cb"]),
        ("cutlass", named["2d_rpb_additional"]),
        ("cutlass", named["3d_rpb"]),
        ("cutlass", named["2d_additional_lengths_gqa_dv"]),
        ("cutlass", named["2d_sub_dilated"]),
        ("cutlass", named["varlen_cross"]),
        ("cutlass", named["2d_dilation_ragged_groups"]),
        ("cutlass", named["2d_head_dim_40"]),
        # Inner tiles without masks.
        ("cutlass", Case("1d_split", (300,), (250,), head_dim=64, rpb=True, **one)),
        ("cutlass", Case("1d_split_causal", (333,), (300,), is_causal=(True,), head_dim=64, **one)),
        ("cutlass", Case("1d_splits", (600,), (5,), additional=9, **one)),
        ("cutlass", named["2d_rings"]),
        ("cutlass", named["2d_ring_rpb_gqa"]),
        ("cutlass", named["2d_up_gqa_additional"]),
        ("cutlass", named["2d_up_causal_ring"]),
        ("cutlass", named["2d_everything"]),
        ("cutlass", named["2d_masks_dilated_strided"]),
        ("cutlass", named["2d_sub_masks"]),
        ("cutlass", named["varlen_softcap_sink"]),
        ("cutlass", named["2d_head_dim_256"]),
        # Slices of values.
        ("cutlass", Case("2d_dv_320", (9, 8), (3, 3), head_dim_v=320, rpb=True, **one)),
        ("hopper", replace(named["2d_ring"], head_dim=64, head_dim_v=64)),
        ("hopper", replace(named["2d_up"], head_dim=64, head_dim_v=64)),
        ("hopper", replace(named["2d_masks_rpb"], head_dim=64, head_dim_v=64)),
        ("hopper", Case("1d_tma", (300,), (250,), head_dim=64, **one)),
        ("hopper", Case("2d_tma", (21, 19), (13, 11), head_dim=64, rpb=True, **one)),
        ("hopper", Case("3d_tma", (7, 8, 9), (3, 5, 7), head_dim=64, additional=70, **one)),
        ("hopper", Case("attention_tma", (200,), None, (), (), (True,), head_dim=128, **one)),
    ]
    for name, case in chosen:
        if name in backends():
            yield f"{name} {case.name}", partial(compute, case, name, FP16, "cuda")
            if case.name == "2d_rings":
                yield f"{name} {case.name} float32", partial(compute, case, name, FP32, "cuda")
    for name in backends():
        yield f"{name} grids", partial(_compute_grids, name)
        for case in (
            named["2d_rpb_additional"],
            replace(named["2d_sink_gqa_dv"], head_dim=80, head_dim_v=48),
        ):
            shared = partial(_compute_within, problems.sharing(2), case)
            yield f"{name} shared {case.name}", partial(shared, name, FP16, "cuda")
    yield "packed heads", partial(check_packed, backends(), FP16, "cuda")
    small = problems.On(device="cuda", max_tokens=100, dtypes=(FP16,))
    for seed in range(4):
        yield f"products {seed}", partial(problems.check, "products", seed, small)
    schedules = [
        ("coop", Case("2d_coop", (21, 19), (13, 11), head_dim=64, **one)),
        ("pp", Case("2d_pp", (21, 19), (13, 11), head_dim=64, **one)),
        ("pp", Case("3d_pp", (7, 8, 9), (3, 5, 7), head_dim=128, additional=70, **one)),
        ("pp", Case("attention_pp", (333,), None, (), (), (True,), head_dim=64, **one)),
        ("pp", replace(named["varlen_cross"], head_dim=64, head_dim_v=64)),
    ]
    for schedule, case in schedules if has_hopper() else ():
        yield (
            f"hopper {schedule} {case.name}",
            partial(compute, case, "hopper", FP16, "cuda", False, kernel_schedule=schedule),
        )
    if has_hopper():
        for schedule, case in schedules[1:4:2]:
            bounded = partial(_compute_within, _bounding(), case, "hopper", BF16, "cuda", False)
            yield f"hopper bounded {case.name}", partial(bounded, kernel_schedule=schedule)
        for seed in range(3):
            yield f"float8 {seed}", partial(problems.check, "float8", seed, small)
    gradients: list[tuple[Case, str, Any, Any]] = [
        (Case("1d", (300,), (250,), head_dim=128, **one), "shape", (64,), (128,)),
        (Case("2d", (21, 19), (13, 11), head_dim=64, **one), "shape", (8, 16), (16, 8)),
        (Case("3d", (7, 8, 9), (3, 5, 7), head_dim=128, **one), "shape", (4, 4, 4), (4, 4, 8)),
        (replace(named["varlen_gqa"], head_dim=128, head_dim_v=128), "size", 64, 128),
    ]
    for case, unit, query, key in gradients if has_hopper() else ():
        knobs = {f"backward_q_tile_{unit}": query, f"backward_kv_tile_{unit}": key}
        yield (
            f"hopper one pass {case.name}",
            partial(compute, case, "hopper", FP16, "cuda", **knobs),
        )
        if case.name in ("1d", "2d"):
            more = replace(case, additional=70)
            shared = partial(_compute_within, _sharing_queries(), more, "hopper", FP16, "cuda")
            yield f"hopper one pass {case.name} additional", partial(shared, **knobs)
