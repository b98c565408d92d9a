"""Named problems that every backend is checked on, and random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from random import Random
from typing import Any


@dataclass(frozen=True)
class Case:
    """A problem by its arguments. Tuples have one value for each axis.

    ``tokens`` are the extents of the query tensor, ``key_tokens`` those of the key tensor if they
    differ. ``kernel_size`` None stands for ``attention``, with ``causal[0]`` as its is_causal.
    """

    name: str
    tokens: tuple[int, ...]
    kernel_size: tuple[int, ...] | None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    batch: int = 2
    heads: int = 2
    heads_kv: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None
    additional: int = 0
    # Of each batch entry; what the inputs hold behind them is NaN.
    additional_lengths: tuple[int, ...] | None = None
    rpb: bool = False
    is_circular: tuple[bool, ...] = ()
    upsampling: tuple[int, ...] = ()
    softcap: float = 0.0
    sink: bool = False
    key_mask: bool = False
    query_mask: bool = False
    scale: float | None = None
    contiguous: bool = True
    grid: tuple[int, ...] | None = None
    query_origin: tuple[int, ...] | None = None
    key_tokens: tuple[int, ...] | None = None
    key_origin: tuple[int, ...] | None = None
    lengths_q: tuple[int, ...] | None = None
    lengths_kv: tuple[int, ...] | None = None
    magnitude: float = 1.0
    # Seeds of the layouts of tensors in memory, and of how the call is written.
    layouts: int | None = None
    spelling: int | None = None
    # Tensors that get no gradient.
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        rank = len(self.tokens)
        defaults = {
            "stride": (1,) * rank,
            "dilation": (1,) * rank,
            "is_causal": (False,) * rank,
            "is_circular": (False,) * rank,
            "upsampling": (1,) * rank,
            "heads_kv": self.heads,
            "head_dim_v": self.head_dim,
            "key_tokens": self.tokens,
        }
        for name, value in defaults.items():
            if not getattr(self, name) and getattr(self, name) != 0:
                object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return len(self.tokens)

    @property
    def is_attention(self) -> bool:
        return self.kernel_size is None

    def __str__(self) -> str:
        return self.name


def _plain() -> list[Case]:
    return [
        Case("1d", (37,), (7,)),
        Case("2d", (11, 13), (5, 3)),
        Case("3d", (5, 6, 7), (3, 5, 3)),
        Case("1d_long_window", (130,), (65,)),
        Case("2d_k7", (19, 17), (7, 7)),
        Case("2d_wide", (3, 41), (3, 9)),
        Case("3d_flat_axis", (1, 9, 10), (1, 4, 5)),
        Case("1d_k1", (9,), (1,)),
        Case("2d_k1_one_axis", (9, 8), (1, 5)),
        Case("2d_even", (12, 10), (4, 6)),
        Case("3d_even", (6, 5, 8), (2, 4, 6)),
        Case("1d_one_token", (1,), (1,)),
        Case("1d_window_is_length", (23,), (23,)),
        Case("2d_window_is_length", (7, 9), (7, 9)),
        Case("2d_window_is_length_one_axis", (7, 9), (3, 9)),
        Case("3d_window_is_length", (3, 4, 5), (3, 4, 5)),
        Case("2d_batch_1_head_1", (9, 9), (3, 3), batch=1, heads=1),
        Case("2d_scale", (9, 9), (5, 5), scale=0.7),
        Case("2d_scale_0", (9, 9), (5, 5), scale=0.0),
        Case("2d_scale_negative", (9, 9), (5, 5), scale=-0.5),
        Case("2d_large_scores", (9, 9), (5, 5), magnitude=6.0),
    ]


def _windows() -> list[Case]:
    """Stride, dilation and causality, each alone and combined, different along each axis."""
    cases = []
    for stride, dilation, causal in product((1, 3), (1, 2), (False, True)):
        cases.append(
            Case(
                f"1d_s{stride}_d{dilation}{'_causal' * causal}",
                (31,),
                (5,),
                (stride,),
                (dilation,),
                (causal,),
            )
        )
    for stride, dilation, causal in product(
        ((1, 1), (2, 5)),
        ((1, 1), (2, 3)),
        ((False,) * 2, (True, False), (False, True), (True,) * 2),
    ):
        if (stride, dilation, causal) == ((1, 1), (1, 1), (False, False)):
            continue
        marks = "".join("c" if c else "b" for c in causal)
        cases.append(
            Case(
                f"2d_s{stride[0]}{stride[1]}_d{dilation[0]}{dilation[1]}_{marks}",
                (13, 17),
                (4, 5),
                stride,
                dilation,
                causal,
            )
        )
    for stride, dilation, causal in product(
        ((1, 1, 1), (2, 1, 3)), ((1, 1, 1), (1, 2, 2)), ((False,) * 3, (True, False, False))
    ):
        if (stride, dilation, any(causal)) == ((1, 1, 1), (1, 1, 1), False):
            continue
        cases.append(
            Case(
                f"3d_s{''.join(map(str, stride))}_d{''.join(map(str, dilation))}"
                f"{'_causal' * causal[0]}",
                (5, 7, 9),
                (3, 3, 4),
                stride,
                dilation,
                causal,
            )
        )
    cases += [
        Case("1d_blocked", (24,), (6,), (6,)),
        Case("1d_blocked_partial", (26,), (6,), (6,)),
        Case("2d_blocked_partial", (10, 11), (4, 3), (4, 3)),
        Case("1d_causal_long_stride", (40,), (9,), (9,), (1,), (True,)),
        Case("1d_causal_window_is_length", (21,), (21,), is_causal=(True,)),
        Case("2d_causal_window_is_length", (5, 6), (5, 6), is_causal=(True, False)),
        Case("2d_dilation_fills", (14, 12), (7, 4), dilation=(2, 3)),
        Case("2d_dilation_ragged_groups", (15, 14), (3, 4), dilation=(4, 3)),
    ]
    return cases


def _heads() -> list[Case]:
    return [
        Case("2d_gqa", (9, 8), (5, 3), heads=6, heads_kv=2),
        Case("2d_mqa", (9, 8), (5, 3), heads=4, heads_kv=1),
        Case("1d_gqa_causal_strided", (33,), (8,), (4,), is_causal=(True,), heads=4, heads_kv=2),
        Case("2d_dv_larger", (9, 8), (5, 3), head_dim=16, head_dim_v=32),
        Case("2d_dv_smaller", (9, 8), (5, 3), head_dim=32, head_dim_v=8),
        Case("3d_gqa_dv", (4, 5, 6), (3, 3, 3), heads=4, heads_kv=2, head_dim_v=24),
        Case("2d_head_dim_8", (9, 8), (5, 3), head_dim=8),
        Case("2d_head_dim_40", (9, 8), (5, 3), head_dim=40),
        Case("2d_head_dim_64", (9, 8), (5, 3), head_dim=64, heads=1),
        Case("1d_head_dim_128", (33,), (9,), head_dim=128, heads=1),
        Case("2d_head_dim_256", (8, 7), (3, 3), head_dim=256, heads=1, batch=1),
        Case("2d_non_contiguous", (9, 8), (5, 3), contiguous=False),
        Case("3d_non_contiguous", (4, 5, 6), (3, 3, 3), contiguous=False, head_dim_v=24),
        Case("2d_non_contiguous_gqa", (9, 8), (5, 3), heads=4, heads_kv=2, contiguous=False),
    ]


def _extras() -> list[Case]:
    return [
        Case("1d_additional", (21,), (5,), additional=3),
        Case("2d_additional", (9, 8), (5, 3), additional=7),
        Case("3d_additional", (4, 5, 6), (3, 3, 3), additional=1),
        Case("2d_additional_many", (6, 6), (3, 3), additional=150),
        Case("2d_additional_dilated_strided", (11, 12), (4, 3), (2, 3), (2, 3), additional=5),
        Case("2d_additional_causal", (9, 8), (5, 3), is_causal=(True, True), additional=5),
        Case(
            "2d_additional_gqa_dv", (9, 8), (5, 3), heads=4, heads_kv=2, head_dim_v=24, additional=9
        ),
        Case("2d_additional_full_window", (5, 6), (5, 6), additional=4),
        Case("2d_additional_non_contiguous", (9, 8), (5, 3), additional=7, contiguous=False),
        Case("1d_additional_lengths", (21,), (5,), additional=5, additional_lengths=(5, 2)),
        Case("2d_additional_lengths", (9, 8), (5, 3), additional=7, additional_lengths=(0, 4)),
        Case(
            "2d_additional_lengths_many",
            (18, 16),
            (3, 3),
            batch=4,
            additional=150,
            additional_lengths=(150, 3, 0, 65),
        ),
        Case(
            "2d_additional_lengths_gqa_dv",
            (9, 8),
            (5, 3),
            heads=4,
            heads_kv=2,
            head_dim_v=24,
            additional=9,
            additional_lengths=(1, 8),
            rpb=True,
            contiguous=False,
        ),
        Case(
            "2d_additional_lengths_full_window",
            (5, 6),
            (5, 6),
            additional=4,
            additional_lengths=(3, 0),
        ),
        Case("1d_rpb", (21,), (5,), rpb=True),
        Case("2d_rpb", (9, 8), (5, 3), rpb=True),
        Case("2d_rpb_k7", (15, 14), (7, 7), rpb=True, heads=3),
        Case("3d_rpb", (4, 5, 6), (3, 3, 3), rpb=True),
        Case("2d_rpb_even", (9, 8), (4, 6), rpb=True),
        Case("2d_rpb_dilated", (13, 14), (5, 3), dilation=(2, 4), rpb=True),
        Case("2d_rpb_strided", (13, 14), (5, 4), (2, 3), rpb=True),
        Case("2d_rpb_gqa", (9, 8), (5, 3), heads=4, heads_kv=2, rpb=True),
        Case("2d_rpb_full_window", (5, 6), (5, 6), rpb=True),
        Case("2d_rpb_additional", (9, 8), (5, 3), rpb=True, additional=6),
        Case(
            "3d_rpb_additional_dilated_strided",
            (5, 7, 8),
            (3, 3, 4),
            (2, 1, 3),
            (1, 2, 2),
            rpb=True,
            additional=2,
        ),
    ]


def _scores() -> list[Case]:
    """Soft cap, sink and masks of tokens, each alone and combined."""
    boxes: dict[str, Any] = {
        "grid": (17, 15), "query_origin": (6, 9), "key_tokens": (9, 10), "key_origin": (4, 5),
    }  # fmt: skip
    masks = {"key_mask": True, "query_mask": True}
    return [
        Case("1d_softcap", (21,), (5,), softcap=1.5),
        Case("2d_softcap_large_scores", (9, 8), (5, 3), softcap=20.0, magnitude=6.0),
        Case("2d_softcap_small", (9, 8), (5, 3), softcap=0.05, scale=-0.5),
        Case("2d_softcap_scale_0", (9, 8), (5, 3), softcap=2.0, scale=0.0),
        Case("2d_softcap_rpb_additional", (9, 8), (5, 3), softcap=1.0, rpb=True, additional=6),
        Case("1d_sink", (21,), (5,), sink=True),
        Case("2d_sink_gqa_dv", (9, 8), (5, 3), heads=4, heads_kv=2, head_dim_v=24, sink=True),
        Case("2d_sink_full_window", (5, 6), (5, 6), sink=True, additional=4),
        Case("1d_key_mask", (37,), (7,), key_mask=True),
        Case("2d_key_mask", (19, 17), (7, 7), batch=3, key_mask=True),
        Case("3d_key_mask_causal", (5, 6, 7), (3, 5, 3), is_causal=(True, False, False),
             key_mask=True),
        Case("2d_query_mask", (11, 13), (5, 3), query_mask=True),
        Case("2d_masks_dilated_strided", (13, 17), (4, 5), (2, 3), (2, 3), batch=3, **masks),
        Case("2d_masks_rpb", (9, 8), (5, 3), heads=4, heads_kv=2, rpb=True, **masks),
        Case("2d_masks_additional_lengths", (9, 8), (5, 3), additional=7,
             additional_lengths=(0, 4), **masks),
        Case("2d_masks_full_window", (7, 9), (7, 9), batch=3, **masks),
        Case("2d_masks_non_contiguous", (9, 8), (5, 3), contiguous=False, head_dim_v=24, **masks),
        Case("2d_masks_circular", (12, 13), (3, 5), dilation=(2, 1), is_circular=(True, False),
             heads=1, **masks),
        Case("2d_sub_masks", (5, 6), (5, 4), **boxes, **masks),
        Case("2d_everything", (9, 8), (5, 3), softcap=1.0, sink=True, rpb=True, additional=7,
             additional_lengths=(0, 4), **masks),
        Case("attention_masks", (37,), None, key_tokens=(45,), batch=3, **masks),
        Case("attention_causal_masks_sink", (70,), None, is_causal=(True,), sink=True, **masks),
        _varlen("varlen_softcap_sink", (7, 20, 0, 13), (7, 20, 5, 0), softcap=1.0, sink=True),
    ]  # fmt: skip


def _subgrids() -> list[Case]:
    return [
        Case("1d_sub_queries", (9,), (7,), grid=(30,), query_origin=(12,), key_tokens=(30,)),
        Case("1d_sub_keys", (30,), (7,), grid=(30,), key_tokens=(11,), key_origin=(5,)),
        Case(
            "1d_sub_disjoint",
            (8,),
            (5,),
            grid=(40,),
            query_origin=(2,),
            key_tokens=(9,),
            key_origin=(30,),
        ),
        Case(
            "1d_sub_causal",
            (10,),
            (6,),
            (3,),
            (2,),
            (True,),
            grid=(37,),
            query_origin=(14,),
            key_tokens=(17,),
            key_origin=(7,),
        ),
        Case(
            "2d_sub",
            (5, 6),
            (5, 4),
            grid=(17, 15),
            query_origin=(6, 9),
            key_tokens=(9, 10),
            key_origin=(4, 5),
        ),
        Case(
            "2d_sub_strided",
            (6, 7),
            (5, 4),
            (2, 3),
            grid=(17, 15),
            query_origin=(11, 0),
            key_tokens=(9, 10),
            key_origin=(8, 1),
        ),
        Case(
            "2d_sub_dilated",
            (6, 7),
            (4, 3),
            (1, 2),
            (2, 3),
            grid=(17, 19),
            query_origin=(3, 5),
            key_tokens=(11, 13),
            key_origin=(2, 4),
        ),
        Case(
            "2d_sub_additional",
            (5, 6),
            (5, 4),
            grid=(17, 15),
            query_origin=(6, 9),
            key_tokens=(4, 5),
            key_origin=(0, 0),
            additional=3,
        ),
        Case(
            "2d_sub_additional_lengths",
            (5, 6),
            (5, 4),
            grid=(17, 15),
            query_origin=(6, 9),
            key_tokens=(4, 5),
            key_origin=(0, 0),
            additional=3,
            additional_lengths=(0, 2),
        ),
        Case(
            "2d_sub_rpb",
            (5, 6),
            (5, 4),
            grid=(17, 15),
            query_origin=(6, 9),
            key_tokens=(9, 10),
            key_origin=(4, 5),
            rpb=True,
        ),
        Case(
            "3d_sub",
            (2, 4, 5),
            (3, 3, 4),
            grid=(5, 8, 9),
            query_origin=(1, 2, 4),
            key_tokens=(4, 6, 8),
            key_origin=(0, 1, 1),
            is_causal=(True, False, False),
        ),
    ]


def _circular() -> list[Case]:
    ring, rings = (True,), (True, True)
    return [
        Case("1d_ring", (21,), (5,), is_circular=ring),
        Case("1d_ring_even", (20,), (6,), is_circular=ring),
        Case("1d_ring_strided", (24,), (5,), (4,), is_circular=ring),
        Case("1d_ring_dilated_strided", (36,), (5,), (2,), (3,), is_circular=ring),
        Case("1d_ring_blocked", (24,), (6,), (6,), is_circular=ring),
        Case("1d_ring_almost_whole", (70,), (69,), is_circular=ring),
        Case("1d_ring_whole", (23,), (23,), is_circular=ring),
        Case("1d_ring_whole_rpb", (23,), (23,), is_circular=ring, rpb=True),
        Case("1d_ring_k1", (9,), (1,), is_circular=ring),
        Case("1d_ring_long", (200,), (31,), is_circular=ring),
        Case("2d_ring", (11, 12), (5, 4), is_circular=(False, True)),
        Case("2d_rings", (9, 12), (4, 5), (3, 2), (1, 2), is_circular=rings),
        Case(
            "2d_ring_causal",
            (9, 12),
            (4, 5),
            (2, 3),
            (1, 2),
            (True, False),
            is_circular=(False, True),
        ),
        Case("2d_ring_rpb", (10, 9), (5, 3), dilation=(2, 3), is_circular=rings, rpb=True),
        Case(
            "2d_ring_rpb_gqa",
            (8, 9),
            (5, 4),
            (2, 1),
            is_circular=(True, False),
            heads=4,
            heads_kv=2,
            rpb=True,
        ),
        Case(
            "2d_ring_additional",
            (9, 8),
            (5, 3),
            is_circular=(False, True),
            additional=7,
            contiguous=False,
        ),
        Case(
            "3d_ring", (4, 6, 8), (3, 3, 5), (1, 2, 2), (1, 1, 1), is_circular=(False, True, True)
        ),
        Case(
            "3d_rings",
            (4, 6, 10),
            (3, 3, 4),
            (2, 1, 1),
            (1, 2, 2),
            is_circular=(True, True, True),
            heads_kv=1,
        ),
        Case(
            "2d_ring_sub",
            (5, 12),
            (5, 4),
            grid=(17, 12),
            query_origin=(6, 0),
            key_tokens=(9, 12),
            key_origin=(4, 0),
            is_circular=(False, True),
        ),
    ]


def _upsampled() -> list[Case]:
    """Tokens of queries and keys are those of two grids."""

    def case(name: str, keys: tuple[int, ...], factors: tuple[int, ...], *window: Any, **more: Any):
        tokens = tuple(n * r for n, r in zip(keys, factors))
        return Case(name, tokens, *window, key_tokens=keys, upsampling=factors, **more)

    return [
        case("1d_up3", (11,), (3,), (5,)),
        case("1d_up2_strided", (13,), (2,), (6,), (4,)),
        case("1d_up4_causal_strided", (12,), (4,), (5,), (3,), is_causal=(True,)),
        case("1d_up2_ring_strided", (12,), (2,), (5,), (3,), is_circular=(True,)),
        case("1d_up2_whole", (9,), (2,), (9,)),
        case("1d_up2_whole_causal", (9,), (2,), (9,), is_causal=(True,)),
        case("1d_up16", (9,), (16,), (3,), head_dim=32),
        case("2d_up", (5, 6), (2, 3), (3, 4)),
        case("2d_up_gqa_additional", (5, 4), (2, 2), (3, 3), additional=5, heads=4, heads_kv=2),
        case("2d_up_one_axis", (7, 8), (1, 3), (3, 4), (2, 1), (2, 1)),
        case(
            "2d_up_rings",
            (6, 4),
            (2, 3),
            (5, 3),
            (2, 1),
            is_circular=(True, True),
            contiguous=False,
        ),
        case(
            "2d_up_causal_ring",
            (6, 4),
            (2, 4),
            (4, 3),
            is_causal=(True, False),
            is_circular=(False, True),
        ),
        case("3d_up", (3, 4, 5), (1, 2, 3), (3, 2, 4), (1, 1, 3), heads=1),
    ]


def _varlen(
    name: str, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], **arguments: Any
) -> Case:
    return Case(
        name,
        (sum(lengths_q),),
        None,
        batch=1,
        key_tokens=(sum(lengths_kv),),
        lengths_q=lengths_q,
        lengths_kv=lengths_kv,
        **arguments,
    )


def _attention() -> list[Case]:
    return [
        Case("attention", (37,), None),
        Case("attention_cross", (19,), None, key_tokens=(45,)),
        Case("attention_one_query", (1,), None, key_tokens=(33,)),
        Case("attention_causal", (37,), None, is_causal=(True,)),
        Case("attention_causal_cross_short", (19,), None, is_causal=(True,), key_tokens=(45,)),
        Case("attention_causal_cross_long", (45,), None, is_causal=(True,), key_tokens=(19,)),
        Case("attention_gqa", (29,), None, heads=6, heads_kv=2, head_dim_v=24),
        Case("attention_no_keys", (7,), None, key_tokens=(0,)),
        Case("attention_non_contiguous", (29,), None, key_tokens=(31,), contiguous=False),
        _varlen("varlen", (7, 20, 13), (7, 20, 13)),
        _varlen("varlen_cross", (1, 20, 9), (30, 3, 11)),
        _varlen("varlen_causal", (10, 20), (12, 19), is_causal=(True,)),
        _varlen("varlen_empty_sequences", (0, 12, 8, 0), (5, 12, 0, 0)),
        _varlen("varlen_gqa", (11, 19), (11, 19), heads=4, heads_kv=2),
    ]


GROUPS: dict[str, list[Case]] = {
    "plain": _plain(),
    "windows": _windows(),
    "heads": _heads(),
    "extras": _extras(),
    "scores": _scores(),
    "subgrids": _subgrids(),
    "circular": _circular(),
    "upsampled": _upsampled(),
    "attention": _attention(),
}
CASES: list[Case] = [case for group in GROUPS.values() for case in group]
NEIGHBORHOOD_CASES = [case for case in CASES if not case.is_attention]


def random_lengths(random: Random, batch: int, additional: int) -> tuple[int, ...]:
    """How many of the additional keys each batch entry has: none, all, or some."""
    return tuple(
        random.choice((0, additional, random.randint(0, additional))) for _ in range(batch)
    )


def around_rings(case: Case, rings: tuple[bool, ...]) -> Case:
    """The case with these axes circular, of as many tokens as its windows need there, and whole."""
    grid = case.grid or case.tokens
    units = [s * d for s, d in zip(case.stride, case.dilation)]
    tokens = tuple(
        max(n // unit, -(-k * d // unit)) * unit if is_ring else n
        for n, unit, k, d, is_ring in zip(grid, units, case.kernel_size, case.dilation, rings)
    )
    causal = tuple(c and not is_ring for c, is_ring in zip(case.is_causal, rings))
    return replace(
        case,
        tokens=tokens,
        key_tokens=tokens,
        grid=None,
        query_origin=None,
        key_origin=None,
        is_causal=causal,
        is_circular=rings,
    )


def upsampled(case: Case, factors: tuple[int, ...]) -> Case:
    """The case with so many queries of each key."""
    tokens = tuple(n * factor for n, factor in zip(case.key_tokens, factors))
    return replace(case, tokens=tokens, upsampling=factors)


def random_case(seed: int, rank: int | None = None, max_tokens: int = 600) -> Case:
    """A valid neighborhood attention problem drawn from all features."""
    case = random_plain_case(seed, rank, max_tokens)
    random = Random(f"rings of {seed}")
    rings = tuple(random.random() < 0.3 for _ in case.tokens)
    if any(rings) and case.grid is None:
        circular = around_rings(case, rings)
        case = circular if prod(circular.tokens) <= max_tokens else case
    factors = tuple(random.choice((1, 2, 3)) if d == 1 else 1 for d in case.dilation)
    if random.random() < 0.7 or case.grid is not None or case.rpb:
        return case
    finer = upsampled(case, factors)
    return finer if prod(finer.tokens) <= max_tokens else case


def random_plain_case(seed: int, rank: int | None, max_tokens: int) -> Case:
    """The same with as many queries as keys, and a border around all axes."""
    random = Random(seed)
    rank = rank or random.choice((1, 2, 2, 3))
    while True:
        limit = {1: max_tokens, 2: int(2 * max_tokens**0.5), 3: int(2 * max_tokens ** (1 / 3))}[
            rank
        ]
        tokens = tuple(random.randint(1, limit) for _ in range(rank))
        if prod(tokens) <= max_tokens:
            break
    dilation = tuple(random.choice((1, 1, 2, 3, max(1, n // 2))) for n in tokens)
    dilation = tuple(min(d, n) for d, n in zip(dilation, tokens))
    kernel_size = tuple(random.randint(1, max(1, n // d)) for n, d in zip(tokens, dilation))
    stride = tuple(random.choice((1, random.randint(1, k), k)) for k in kernel_size)
    causal = tuple(random.random() < 0.3 for _ in range(rank))
    heads_kv = random.choice((1, 2, 3))
    head_dim = random.choice((8, 16, 32, 64))
    case = Case(
        f"random_{seed}",
        tokens,
        kernel_size,
        stride,
        dilation,
        causal,
        batch=random.choice((1, 2, 3)),
        heads=heads_kv * random.choice((1, 1, 2, 4)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=random.choice((head_dim, head_dim, 8, 16, 48)),
        additional=random.choice((0, 0, 0, 1, 5, 70)),
        rpb=not any(causal) and random.random() < 0.3,
        contiguous=random.random() < 0.7,
    )
    if case.additional and random.random() < 0.4:
        lengths = random_lengths(random, case.batch, case.additional)
        case = replace(case, additional_lengths=lengths)
    if random.random() < 0.2:
        boxes = {}
        for box in ("query", "key"):
            low = tuple(random.randint(0, n - 1) for n in tokens)
            boxes[f"{box}_origin"] = low
            boxes[box] = tuple(random.randint(1, n - o) for n, o in zip(tokens, low))
        case = replace(
            case,
            grid=tokens,
            tokens=boxes["query"],
            key_tokens=boxes["key"],
            query_origin=boxes["query_origin"],
            key_origin=boxes["key_origin"],
        )
    if random.random() < 0.25:
        case = replace(
            case,
            softcap=random.choice((0.0, 0.5, 4.0)),
            sink=random.random() < 0.5,
            key_mask=random.random() < 0.6,
            query_mask=random.random() < 0.3,
        )
    return case


def random_grids(number: int, seed: int, max_tokens: int = 900) -> list[Case]:
    """Grids of different sizes for one call; what kernels are compiled for is drawn for a number
    alone."""
    random = Random(f"family of grids {number}")
    rank = (2, 1, 3)[number % 3]
    rings = tuple(random.random() < 0.2 for _ in range(rank))
    causal = tuple(random.random() < 0.25 and not ring for ring in rings)
    rpb = not any(causal) and random.random() < 0.4
    heads_kv, head_dim = random.choice((1, 2, 3)), random.choice((16, 32, 32, 40, 64, 64, 128))
    common: dict[str, Any] = {
        "is_causal": causal, "batch": 1, "heads": heads_kv * random.choice((1, 1, 2)),
        "heads_kv": heads_kv, "head_dim": head_dim,
        "head_dim_v": random.choice((head_dim, head_dim, 24, 64)),
        "additional": random.choice((0, 0, 5, 70)), "rpb": rpb,
        "softcap": random.choice((0.0, 0.0, 0.0, 2.0)), "sink": random.random() < 0.25,
        "key_mask": random.random() < 0.25, "query_mask": random.random() < 0.25,
    }  # fmt: skip
    has_lengths = random.random() < 0.5
    random = Random(f"grids {number} {seed}")
    common |= {"contiguous": random.random() < 0.6, "scale": random.choice((None, None, 0.3, -0.2))}
    most = int(max_tokens ** (1 / rank) * 1.5)
    shared = tuple(random.randint(1, max(most // 3, 1)) for _ in range(rank))
    cases: list[Case] = []
    for grid in range(random.randint(2, 6)):
        kernel = shared if rpb or random.random() < 0.5 else tuple(
            random.randint(1, k) for k in shared
        )  # fmt: skip
        tokens = tuple(random.randint(k, max(most, k)) for k in kernel)
        case = Case(
            f"grid_{number}_{seed}_{grid}", tokens, kernel,
            tuple(random.choice((1, 1, random.randint(1, k))) for k in kernel),
            tuple(random.choice((1, 1, random.randint(1, n // k)))
                  for k, n in zip(kernel, tokens)),
            **common,
        )  # fmt: skip
        if any(rings):
            case = around_rings(case, rings)
        if case.additional and has_lengths:
            case = replace(case, additional_lengths=random_lengths(random, 1, case.additional))
        # Some follow others of their size.
        if cases and random.random() < 0.2:
            case = replace(cases[-1], name=case.name)
        cases.append(case)
    return cases


def random_attention(seed: int, max_tokens: int = 200) -> Case:
    """Attention: dense, causal, or of packed sequences, some of them empty."""
    random = Random(f"attention {seed}")
    heads_kv = random.choice((1, 2, 3))
    head_dim = random.choice((8, 16, 24, 32, 64))
    named: dict[str, Any] = {
        "is_causal": (random.random() < 0.4,),
        "heads": heads_kv * random.choice((1, 1, 2, 4)),
        "heads_kv": heads_kv,
        "head_dim": head_dim,
        "head_dim_v": random.choice((head_dim, head_dim, 8, 16, 48)),
        "softcap": random.choice((0.0, 0.0, 0.5, 4.0)),
        "sink": random.random() < 0.2,
        "scale": random.choice((None, None, 0.3, -0.2)),
    }
    if random.random() < 0.4:
        sequences = random.randint(1, 5)
        lengths = [
            tuple(random.choice((0, random.randint(1, max_tokens // 3))) for _ in range(sequences))
            for _ in range(2)
        ]
        behind = random.choice((0, 0, 3))
        return Case(
            f"sequences_{seed}", (max(sum(lengths[0]) + behind, 1),), None, batch=1,
            key_tokens=(max(sum(lengths[1]) + behind, 1),), lengths_q=lengths[0],
            lengths_kv=lengths[1], **named,
        )  # fmt: skip
    masked = random.random() < 0.3
    return Case(
        f"attention_{seed}", (random.randint(1, max_tokens),), None,
        key_tokens=(random.choice((random.randint(1, max_tokens), random.randint(0, 3))),),
        batch=random.choice((1, 2, 3)), key_mask=masked,
        query_mask=masked and random.random() < 0.5,
        **named,
    )  # fmt: skip


def random_frozen(random: Random) -> tuple[str, ...]:
    """Tensors without gradients; one of those that every case has gets one."""
    names = ["query", "key", "value", "rpb", "additional_keys", "additional_values", "sink"]
    names.remove(random.choice(names[:3]))
    return tuple(name for name in names if random.random() < 0.5)


def varied(case: Case, seed: int) -> Case:
    """The case in any memory, written in any way, and perhaps without some gradients."""
    random = Random(f"variation {seed}")
    drawn: dict[str, Any] = {}
    if random.random() < 0.7:
        drawn["layouts"] = random.randrange(1 << 30)
    if random.random() < 0.7:
        drawn["spelling"] = random.randrange(1 << 30)
    if random.random() < 0.3:
        drawn["frozen"] = random_frozen(random)
    if case.scale is None and random.random() < 0.2:
        drawn["scale"] = random.choice((0.3, -0.2, 0.0))
    return replace(case, **drawn)
