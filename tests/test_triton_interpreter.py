"""The Triton kernels in Triton's interpreter, on the CPU: every feature, in small problems.

The interpreter does not compute bfloat16; the GPU tests do. It costs some 12 ms a program, so that
most cases run with batch 1 and one or two tiles. All cases with all backends are marked
``exhaustive``. Run with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import CASES, Case
from checks import check_packed, check_problem, make_inputs, run
from problems import sharing

import natten

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from natten.functional.backends.triton import CUTLASS, arguments, tiles
from natten.functional.backends.triton.launcher import Launch
from natten.functional.backends.triton.norms import PARTS, longest
from natten.simulator import make_problem

pytestmark = pytest.mark.interpreted


@triton.jit
def _squares(numbers):
    at = numbers + tl.arange(0, 8)
    tl.store(at, tl.load(at) * tl.load(at))


def test_overflow_is_noticed() -> None:
    """Of signed numbers: those of the windows' divisions are unsigned, and wrap."""
    numbers = torch.full((8,), 46_340, dtype=torch.int32)
    _squares[(1,)](numbers)
    assert numbers.tolist() == [46_340**2] * 8
    numbers[:] = 46_341
    with pytest.raises(InterpreterError, match="mul exceeds int32"):
        _squares[(1,)](numbers)


NAMED = {case.name: case for case in CASES}
HALF, SINGLE = torch.float16, torch.float32
# The error of eager attention, times this, is the budget.
FACTOR = 1.5


def _thin(name: str) -> Case:
    """A named case with batch 1."""
    return replace(NAMED[name], batch=1)


def _wide(name: str, **changes: object) -> Case:
    """A named case with heads of 64 features, which are loaded through descriptors."""
    case = replace(NAMED[name], batch=1, head_dim=64, head_dim_v=64)
    return replace(case, **{"heads": 1, "heads_kv": 1, **changes})  # type: ignore[arg-type]


# By what they are about: backend, dtype, cases.
GROUPS: dict[str, tuple[str, torch.dtype, list[Case]]] = {
    "cutlass_windows": (
        "cutlass",
        HALF,
        [
            *map(
                _thin,
                (
                    "2d",
                    "1d_long_window",
                    "1d_k1",
                    "2d_even",
                    "1d_one_token",
                    "2d_window_is_length_one_axis",
                    "3d_flat_axis",
                    "1d_s3_d2_causal",
                    "2d_s25_d23_cb",
                    "2d_dilation_ragged_groups",
                    "2d_blocked_partial",
                    "2d_causal_window_is_length",
                ),
            ),
            replace(NAMED["3d"], batch=1, heads=1, heads_kv=1),
            replace(NAMED["3d_s213_d122_causal"], batch=1, heads=1, heads_kv=1),
            NAMED["1d"],
        ],
    ),
    "cutlass_heads": (
        "cutlass",
        HALF,
        [
            _thin("2d_gqa"),
            _thin("2d_mqa"),
            _thin("1d_gqa_causal_strided"),
            _thin("2d_dv_larger"),
            _thin("2d_dv_smaller"),
            _thin("2d_head_dim_8"),
            _thin("2d_head_dim_40"),
            NAMED["2d_head_dim_256"],
            Case("2d_head_dim_264", (5, 4), (3, 3), head_dim=264, batch=1, heads=1),
            Case("1d_head_dim_1024", (20,), (5,), head_dim=1024, batch=1, heads=1),
            _thin("2d_non_contiguous_gqa"),
            _thin("2d_scale_0"),
            _thin("2d_scale_negative"),
            _thin("2d_large_scores"),
            Case("2d_dv_320", (6, 5), (3, 3), head_dim_v=320, heads=1, batch=1),
        ],
    ),
    # Heads of two tiles of features.
    "cutlass_parts": (
        "cutlass",
        HALF,
        [
            Case("1d_40", (20,), (5,), head_dim=40, heads_kv=1, batch=1),
            Case(
                "2d_48_72_dilated_rpb",
                (7, 6),
                (3, 3),
                (),
                (2, 1),
                head_dim=48,
                head_dim_v=72,
                heads=1,
                batch=1,
                rpb=True,
            ),
            Case(
                "1d_80_48_additional",
                (20,),
                (5,),
                head_dim=80,
                head_dim_v=48,
                batch=1,
                additional=3,
            ),
            replace(_thin("2d_everything"), head_dim=96, head_dim_v=80, additional_lengths=(4,)),
            replace(_thin("2d_masks_circular"), head_dim=72, head_dim_v=32),
            replace(NAMED["3d"], batch=1, heads=1, heads_kv=1, head_dim=48, head_dim_v=96),
            replace(NAMED["varlen"], head_dim=160, head_dim_v=80),
            Case("1d_80_280", (20,), (5,), head_dim=80, head_dim_v=280, heads=1, batch=1),
        ],
    ),
    "cutlass_parts_float32": (
        "cutlass",
        SINGLE,
        [
            Case(
                "1d_72_96_causal",
                (20,),
                (5,),
                is_causal=(True,),
                head_dim=72,
                head_dim_v=96,
                batch=1,
            ),
            Case(
                "2d_96_40_rpb_additional",
                (7, 6),
                (3, 3),
                (),
                (2, 1),
                head_dim=96,
                head_dim_v=40,
                heads=1,
                batch=1,
                rpb=True,
                additional=3,
            ),
        ],
    ),
    "cutlass_extras": (
        "cutlass",
        HALF,
        [
            NAMED["1d_additional"],
            _thin("2d_additional_many"),
            _thin("2d_additional_dilated_strided"),
            _thin("2d_additional_gqa_dv"),
            _thin("2d_additional_full_window"),
            NAMED["1d_additional_lengths"],
            replace(NAMED["2d_additional_lengths"], heads=1, heads_kv=1),
            Case(
                "1d_additional_lengths_tiles",
                (70,),
                (3,),
                heads=1,
                batch=3,
                additional=150,
                additional_lengths=(150, 65, 0),
            ),
            NAMED["2d_additional_lengths_gqa_dv"],
            replace(NAMED["2d_additional_lengths_full_window"], heads=1, heads_kv=1),
            _thin("2d_rpb"),
            _thin("2d_rpb_strided"),
            _thin("2d_rpb_gqa"),
            _thin("2d_rpb_additional"),
            NAMED["1d_rpb"],
            Case(
                "2d_dv_320_additional_rpb",
                (6, 5),
                (3, 3),
                head_dim_v=320,
                heads=1,
                batch=1,
                additional=3,
                additional_lengths=(2,),
                rpb=True,
            ),
            Case("1d_rpb_additional_negative", (9,), (3,), scale=-0.3, rpb=True, additional=2),
        ],
    ),
    "cutlass_scores": (
        "cutlass",
        HALF,
        [
            _thin("2d_softcap_small"),
            _thin("2d_softcap_rpb_additional"),
            _thin("2d_sink_gqa_dv"),
            replace(NAMED["2d_key_mask"], heads=1, heads_kv=1, tokens=(11, 9), key_tokens=(11, 9)),
            replace(NAMED["3d_key_mask_causal"], batch=1, heads=1, heads_kv=1),
            replace(NAMED["2d_masks_dilated_strided"], heads=1, heads_kv=1, batch=1),
            _thin("2d_masks_rpb"),
            replace(NAMED["2d_masks_additional_lengths"], heads=1, heads_kv=1),
            replace(NAMED["2d_masks_full_window"], heads=1, heads_kv=1),
            _thin("2d_masks_non_contiguous"),
            _thin("2d_masks_circular"),
            _thin("2d_sub_masks"),
            replace(_thin("2d_everything"), additional_lengths=(4,)),
            _thin("attention_causal_masks_sink"),
            NAMED["varlen_softcap_sink"],
            Case(
                "2d_dv_320_masks_sink",
                (6, 5),
                (3, 3),
                head_dim_v=320,
                heads=2,
                heads_kv=1,
                batch=1,
                sink=True,
                softcap=2.0,
                key_mask=True,
                query_mask=True,
            ),
        ],
    ),
    "hopper_scores": (
        "hopper",
        HALF,
        [
            _wide("2d_masks_rpb"),
            _wide("2d_everything", additional_lengths=(4,)),
            _wide("attention_causal_masks_sink", batch=2),
        ],
    ),
    "cutlass_boxes": (
        "cutlass",
        HALF,
        [
            *map(
                _thin,
                (
                    "1d_sub_queries",
                    "1d_sub_disjoint",
                    "1d_sub_causal",
                    "2d_sub",
                    "2d_sub_dilated",
                    "2d_sub_additional",
                    "2d_sub_rpb",
                    "3d_sub",
                ),
            ),
            replace(NAMED["2d_sub_additional_lengths"], heads=1, heads_kv=1),
            NAMED["attention_cross"],
            NAMED["attention_causal_cross_long"],
            NAMED["attention_no_keys"],
            NAMED["attention_gqa"],
            NAMED["attention_non_contiguous"],
            NAMED["varlen"],
            NAMED["varlen_cross"],
            NAMED["varlen_causal"],
            NAMED["varlen_empty_sequences"],
            NAMED["varlen_gqa"],
        ],
    ),
    "cutlass_rings": (
        "cutlass",
        HALF,
        [
            *map(
                _thin,
                (
                    "1d_ring_strided",
                    "1d_ring_dilated_strided",
                    "1d_ring_almost_whole",
                    "1d_ring_whole_rpb",
                    "1d_ring_long",
                    "2d_ring",
                    "2d_ring_additional",
                    "2d_ring_sub",
                ),
            ),
            replace(NAMED["2d_ring_causal"], batch=1, heads=1, heads_kv=1),
            replace(NAMED["2d_ring_rpb"], batch=1, heads=1, heads_kv=1),
            replace(NAMED["3d_rings"], batch=1, heads=1, heads_kv=1),
        ],
    ),
    "cutlass_upsampled": (
        "cutlass",
        HALF,
        [
            *map(
                _thin,
                (
                    "1d_up4_causal_strided",
                    "1d_up2_whole",
                    "1d_up16",
                    "2d_up_gqa_additional",
                    "2d_up_causal_ring",
                    "3d_up",
                ),
            ),
            replace(NAMED["2d_up_rings"], batch=1, heads=1, heads_kv=1),
        ],
    ),
    "cutlass_float32": (
        "cutlass",
        SINGLE,
        [
            _thin("2d"),
            _thin("1d_s3_d2_causal"),
            _thin("2d_gqa"),
            _thin("2d_dv_smaller"),
            _thin("2d_non_contiguous"),
            _thin("2d_additional"),
            _thin("2d_rpb_dilated"),
            _thin("2d_sub"),
            _thin("2d_large_scores"),
            NAMED["attention_causal"],
            NAMED["varlen_cross"],
        ],
    ),
    "hopper": (
        "hopper",
        HALF,
        [
            _wide("1d", heads=2, heads_kv=2),
            _wide("2d"),
            _wide("3d"),
            _wide("2d_s25_d11_cb"),
            _wide("2d_dilation_ragged_groups"),
            _wide("2d_gqa", heads=4, heads_kv=2),
            _wide("2d_non_contiguous", heads=2, heads_kv=2),
            _wide("2d_dv_smaller", head_dim_v=32, heads=2, heads_kv=2),
            _wide("2d_additional"),
            _wide("2d_rpb"),
            _wide("2d_sub_strided"),
            _wide("2d_ring"),
            _wide("2d_up_one_axis"),
            _wide("1d_ring_almost_whole"),
            _wide("attention_cross"),
            _wide("attention_causal"),
            _wide("varlen_cross"),
            _wide("varlen_causal"),
            _wide("2d_scale_negative"),
            _thin("2d_window_is_length"),
            NAMED["2d_head_dim_256"],
            NAMED["1d_head_dim_128"],
        ],
    ),
    "blackwell": (
        "blackwell",
        HALF,
        [
            _wide("1d_s3_d1_causal", heads=2, heads_kv=2),
            _wide("2d"),
            _wide("2d_gqa", heads=4, heads_kv=2),
            _wide("2d_additional"),
            _wide("2d_rpb"),
            _wide("3d_sub"),
            _wide("attention_causal"),
            _wide("varlen"),
            NAMED["1d_head_dim_128"],
        ],
    ),
}


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    [
        pytest.param(case, backend, dtype, id=f"{group}-{case.name}")
        for group, (backend, dtype, cases) in GROUPS.items()
        for case in cases
    ],
)
def test_case(case: Case, backend: str, dtype: torch.dtype) -> None:
    check_problem(case, backend, dtype, factor=FACTOR)


PLANE = replace(NAMED["2d_k7"], batch=1, heads=1, heads_kv=1)
SPACE = replace(NAMED["3d"], batch=1, heads=1, heads_kv=1)
# Tiles that callers choose, in both passes, and the names that known clients use.
TILES: dict[str, tuple[Case, str, dict[str, Any]]] = {
    "square": (
        PLANE, "cutlass",
        dict(
            q_tile_shape=(8, 8), kv_tile_shape=(8, 8),
            backward_q_tile_shape=(8, 8), backward_kv_tile_shape=(8, 8),
        ),
    ),
    "rows_and_columns": (
        PLANE, "cutlass",
        dict(
            q_tile_shape=(2, 64), kv_tile_shape=(32, 1),
            backward_q_tile_shape=(1, 32), backward_kv_tile_shape=(128, 1),
        ),
    ),
    "3d": (
        SPACE, "cutlass",
        dict(
            q_tile_shape=(4, 4, 4), kv_tile_shape=(4, 4, 4),
            backward_q_tile_shape=(2, 4, 8), backward_kv_tile_shape=(4, 4, 4),
        ),
    ),
    "3d_hopper": (
        replace(SPACE, head_dim=64, head_dim_v=64), "hopper",
        dict(
            q_tile_shape=(4, 4, 8), kv_tile_shape=(4, 4, 8),
            backward_q_tile_shape=(4, 4, 4), backward_kv_tile_shape=(4, 4, 8),
        ),
    ),
    "sizes": (
        _wide("attention_causal"), "hopper",
        dict(
            q_tile_size=64, kv_tile_size=32, backward_q_tile_size=32, backward_kv_tile_size=64,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "backend", "tiles"), TILES.values(), ids=TILES)
def test_tile_shapes(case: Case, backend: str, tiles: dict[str, Any]) -> None:
    check_problem(case, backend, HALF, factor=FACTOR, **tiles)


def test_tile_shapes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="q_tile_shape"):
        check_problem(PLANE, "cutlass", HALF, q_tile_shape=(3, 8), kv_tile_shape=(8, 8))


@pytest.mark.parametrize("schedule", ["non", "coop", "pp"])
@pytest.mark.parametrize(
    "case", [_wide("1d", heads=2, heads_kv=2), _wide("2d_s25_d11_cb")], ids=str
)
def test_schedules(case: Case, schedule: str) -> None:
    check_problem(case, "hopper", HALF, factor=FACTOR, backward=False, kernel_schedule=schedule)


def test_one_program_for_each_tile() -> None:
    check_problem(
        _wide("2d_gqa", heads=4, heads_kv=2), "blackwell", HALF, factor=FACTOR, backward=False,
        run_persistent_kernel=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "backend", "splits"),
    [(_thin("2d_gqa"), "cutlass", (1, 2)), (_wide("1d_long_window"), "hopper", (1,))],
    ids=str,
)
def test_splits_of_the_key_tiles(case: Case, backend: str, splits: tuple[int, ...]) -> None:
    check_problem(case, backend, HALF, factor=FACTOR, backward_kv_splits=splits)


@pytest.mark.parametrize(("splits", "dtype"), [(2, HALF), (3, SINGLE)])
@pytest.mark.parametrize(
    "case",
    [
        *map(_thin, ("2d_gqa", "2d_rpb_additional", "2d_masks_circular", "3d_sub")),
        *map(_thin, ("1d_sub_disjoint", "2d_up", "2d_dv_larger", "attention_causal_masks_sink")),
        replace(NAMED["2d_sink_gqa_dv"], contiguous=False), NAMED["1d_long_window"],
        NAMED["1d_additional_lengths"], NAMED["attention_no_keys"], NAMED["2d_everything"],
    ],
    ids=str,
)  # fmt: skip
def test_programs_that_share_columns(case: Case, splits: int, dtype: torch.dtype) -> None:
    """More of them than tiles of columns as well."""
    with sharing(splits):
        check_problem(case, "cutlass", dtype, factor=FACTOR)


def test_packed_gradients_of_shares() -> None:
    with sharing(2):
        check_packed(("cutlass",), SINGLE, "cpu")


def test_who_shares_columns() -> None:
    """Programs that are few and have many columns."""
    tiling = tiles.Tiling((64,), (64,))

    def splits(
        kernel: tiles.Kernel, queries: int, keys: int, heads: int = 1, additional: int = 0
    ) -> int:
        longest = (max(queries, keys),)
        problem = make_problem((keys,), (keys,), heads=heads, additional=additional)
        problem = replace(problem, query_shape=(queries,), grid=longest, kernel_size=longest)
        return tiles.splits(problem, kernel, tiling, 132)

    assert splits(tiles.FORWARD, 64, 8192) == 32
    assert splits(tiles.FORWARD, 640, 8192) == 26
    assert splits(tiles.FORWARD, 640, 1536) == 6
    assert splits(tiles.FORWARD, 640, 1472) == 1
    assert splits(tiles.FORWARD, 640, 1472, additional=64) == 6
    assert splits(tiles.FORWARD, 64 * 100, 8192) == 1
    assert splits(tiles.FORWARD, 64, 8192, heads=100) == 1
    assert splits(tiles.FORWARD, 64, 8192, heads=66) == 4
    assert splits(tiles.QUERY_GRADIENT, 640, 6144) == 24
    assert splits(tiles.QUERY_GRADIENT, 640, 5120) == 1
    assert splits(tiles.KEY_VALUE_GRADIENT, 640, 8192) == 1
    assert splits(tiles.KEY_VALUE_GRADIENT, 8192, 640) == 26


@pytest.mark.parametrize("case", [_thin("2d_rpb_additional"), NAMED["varlen"]], ids=str)
def test_row_sums_by_torch(case: Case) -> None:
    check_problem(case, "cutlass", HALF, factor=FACTOR, backward_use_pt_reduction=True)


MANY_QUERIES = Case("1d_splits", (600,), (3,), batch=1, heads=1, additional=4)


@pytest.mark.parametrize("preference", ["strict", "unrestricted"])
def test_memory_preferences(preference: str) -> None:
    with natten.set_memory_usage_preference(preference):
        check_problem(MANY_QUERIES, "cutlass", HALF, factor=FACTOR)


def test_without_kv_parallelism() -> None:
    case = replace(MANY_QUERIES, tokens=(520,), key_tokens=(520,))
    with natten.use_kv_parallelism_in_fused_na(False):
        check_problem(case, "cutlass", HALF, factor=FACTOR)


@pytest.mark.parametrize(
    ("case", "query", "key"),
    [
        (Case("1d_runs", (37,), (9,), batch=2, heads=1, rpb=True), (32,), (64,)),
        (Case("2d_runs", (9, 17), (3, 5), batch=1, heads=2, rpb=True), (2, 16), (4, 8)),
        (Case("2d_mixed", (9, 17), (5, 4), batch=1, heads=1, rpb=True), (8, 4), (4, 8)),
        (Case("2d_columns", (17, 9), (5, 4), batch=1, heads=1, rpb=True), (16, 2), (32, 1)),
        (Case("3d_runs", (3, 5, 9), (2, 3, 4), batch=1, heads=1, rpb=True), (1, 4, 8), (2, 2, 8)),
    ],
    ids=str,
)
def test_bias_gradient(case: Case, query: tuple[int, ...], key: tuple[int, ...]) -> None:
    """Tiles with runs of eight, of four and of fewer tokens."""
    check_problem(
        case, "cutlass", HALF, factor=FACTOR, backward_q_tile_shape=query,
        backward_kv_tile_shape=key,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (
            Case(
                "3d_last_least_dilated", (4, 5, 14), (4, 2, 3), (2, 1, 3), (1, 2, 2), batch=1,
                heads=1,
            ),
            "cutlass",
        ),
        (Case("3d_last_least", (4, 5, 17), (4, 3, 5), batch=1, heads=2, head_dim=64), "hopper"),
    ],
    ids=str,
)  # fmt: skip
def test_first_axis_fastest(case: Case, backend: str) -> None:
    """The order of tiles that large problems have whose windows cover least of the last axis."""
    with (
        mock.patch.object(arguments, "LEAST_UNCACHED", 0),
        mock.patch.object(Launch, "run", autospec=True, side_effect=Launch.run) as runs,
    ):
        check_problem(case, backend, HALF, factor=FACTOR)
    assert all(call.args[0].variant.FIRST_AXIS_FASTEST for call in runs.call_args_list)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case("1d", (100,), (77,), batch=1, head_dim=64),
        Case("2d_rpb", (7, 6), (5, 3), batch=2, head_dim=32, rpb=True),
        Case("2d_softcap_sink", (7, 7), (7, 5), batch=1, softcap=1.5, sink=True),
        Case("2d_dilated_causal", (9, 15), (3, 4), (1, 1), (1, 2), (True, False), batch=1, heads=3),
        Case("2d_values", (8, 8), (8, 8), batch=1, head_dim=24, head_dim_v=40),
        Case("1d_parts", (40,), (7,), batch=1, head_dim=48, head_dim_v=40),
        Case("3d", (2, 7, 6), (2, 3, 5), is_causal=(True, False, False), batch=1, head_dim=20),
    ],
    ids=str,
)
def test_programs_that_have_all_queries(
    case: Case, single: bool, request: pytest.FixtureRequest
) -> None:
    """All gradients by one kernel, and by two."""
    CUTLASS._backward_tilings.cache_clear()
    request.addfinalizer(CUTLASS._backward_tilings.cache_clear)
    with (
        mock.patch.object(tiles, "is_single_faster", return_value=single),
        mock.patch.object(Launch, "run", autospec=True, side_effect=Launch.run) as runs,
    ):
        check_problem(case, "cutlass", HALF, factor=FACTOR)
    names = {call.args[0].kernel.fn.__name__ for call in runs.call_args_list}
    assert ("key_value_gradient_kernel" in names) is not single


@pytest.mark.parametrize("name", ["2d_rpb", "1d_additional"])
def test_determinism(name: str) -> None:
    """Determinism asked for: correct, and the same bits again, with a bias too."""
    case = _thin(name)
    with natten.use_deterministic_algorithms():
        check_problem(case, "cutlass", HALF, factor=FACTOR)
        inputs = make_inputs(case, HALF)
        reruns = []
        for _ in range(2):
            out, lse = run(case, inputs, "cutlass-fna")
            loss = out.float().sum() + lse.sum()
            reruns.append(torch.autograd.grad(loss, list(inputs.tensors().values())))
        for first, second in zip(*reruns):
            assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cutlass", "hopper"])
def test_packed(backend: str) -> None:
    check_packed((backend,), HALF, "cpu")


def test_awkward_memory() -> None:
    """Descriptors take no odd address, and no odd stride even of an axis of one token: tensors that
    torch calls contiguous may have both."""
    from natten.functional.backends.triton import launcher

    shape = (1, 70, 1, 64)
    tiles = {"q_tile_shape": (64,), "kv_tile_shape": (64,)}
    tiles |= {f"backward_{name}": tile for name, tile in tiles.items()}
    plain = [torch.randn(shape, dtype=HALF) for _ in range(4)]
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(shape) for t in plain]
    strided = [t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for t in plain]
    results = []
    for tensors in (plain, shifted, strided):
        assert all(t.is_contiguous() for t in tensors)
        *inputs, gradient = tensors
        leaves = [t.requires_grad_() for t in inputs]
        out = natten.na1d(*leaves, 65, backend="hopper-fna", **tiles)
        results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

    most, launcher._MAX_DESCRIPTORS = launcher._MAX_DESCRIPTORS, 3
    launcher._descriptors.clear()
    for length in range(70, 90):
        launcher.descriptor(torch.zeros(1, length, 1, 64, dtype=HALF), (1, 1, 64))
        assert 0 < len(launcher._descriptors) <= 3
    launcher._MAX_DESCRIPTORS = most


@pytest.mark.parametrize("backend", ["cutlass-fna", "hopper-fna"])
def test_missing_values(backend: str) -> None:
    """What a row does not see has no effect, even if it is NaN or infinite."""
    query, key, value = torch.randn(3, 1, 20, 1, 64, dtype=HALF)
    out = natten.na1d(query, key, value, 5, backend=backend)
    key[:, 10], value[:, 10] = torch.inf, torch.nan
    marred = natten.na1d(query, key, value, 5, backend=backend)
    sees = torch.zeros(20, dtype=torch.bool)
    sees[8:13] = True
    assert bool(marred[:, sees].isnan().all())
    # A masked weight is 0, and 0 * NaN is NaN: only whole tiles are skipped. Keys alone may
    # hold anything.
    value[:, 10] = 0.0
    marred = natten.na1d(query, key, value, 5, backend=backend)
    torch.testing.assert_close(marred[:, ~sees], out[:, ~sees])


@pytest.mark.parametrize("shape", [(0, 7, 2, 16), (0, 5, 6, 2, 16)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Batch 0 has empty results and zero gradients of the parameters."""
    tensors = [torch.randn(shape, dtype=HALF, requires_grad=True) for _ in range(3)]
    rank = len(shape) - 3
    rpb = torch.randn(2, *(5,) * rank, dtype=HALF, requires_grad=True)
    out = natten.functional.neighborhood_attention_generic(
        *tensors, 3, rpb=rpb, backend="cutlass-fna"
    )
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), [*tensors, rpb])
    assert all(g.shape == t.shape for g, t in zip(gradients, tensors))
    assert bool((gradients[-1] == 0).all())


@contextmanager
def _guarded() -> Iterator[list[str]]:
    """Inside, note every address that kernels touch outside the storage of their tensors."""
    from triton.runtime.interpreter import InterpreterBuilder
    from triton.tools.tensor_descriptor import TensorDescriptor

    trespasses: list[str] = []
    ranges: dict[str, tuple[int, int]] = {}
    kernels: list[str] = []
    launch_run = Launch.run

    def run(launch: Launch, *tensors: Any) -> None:
        ranges.clear()
        kernels[:] = [launch.kernel.fn.__name__]
        names = launch.kernel.arg_names
        if launch.group is not None:
            names = (*names[: launch.alone], *launch.group._fields)
        for name, tensor in zip(names, tensors):
            tensor = tensor.base if isinstance(tensor, TensorDescriptor) else tensor
            if tensor is not None:
                storage = tensor.untyped_storage()
                ranges[name] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        launch_run(launch, *tensors)

    def watch(method: Any, pointer: int, mask: int) -> Any:
        def function(self: Any, *arguments: Any, **more: Any) -> Any:
            addresses = arguments[pointer].data
            addresses = addresses[np.broadcast_to(arguments[mask].data, addresses.shape) != 0]
            inside = np.zeros(addresses.shape, dtype=bool)
            for low, high in ranges.values():
                inside |= (addresses >= low) & (addresses < high)
            if not inside.all():
                wrong = addresses[~inside].astype(np.int64)
                near = {
                    name: (int(wrong.min()) - low, int(wrong.max()) - high)
                    for name, (low, high) in ranges.items()
                    if abs(int(wrong.min()) - low) < 1 << 14
                }
                trespasses.append(f"{kernels[0]}: {method.__name__} near {near}")
            return method(self, *arguments, **more)

        return function

    with (
        mock.patch.object(Launch, "run", run),
        mock.patch.object(
            InterpreterBuilder,
            "create_masked_load",
            watch(InterpreterBuilder.create_masked_load, 0, 1),
        ),
        mock.patch.object(
            InterpreterBuilder,
            "create_masked_store",
            watch(InterpreterBuilder.create_masked_store, 0, 2),
        ),
        mock.patch.object(
            InterpreterBuilder,
            "create_atomic_rmw",
            watch(InterpreterBuilder.create_atomic_rmw, 1, 3),
        ),
    ):
        yield trespasses


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("cutlass", Case("1d_inner_rpb", (130,), (100,), batch=1, heads=1, rpb=True)),
        ("cutlass", replace(_thin("2d_rpb_gqa"), heads=2, heads_kv=1)),
        ("cutlass", replace(_thin("3d_rpb"), heads=1, heads_kv=1)),
        ("cutlass", replace(_thin("2d_sub_dilated"), heads=1, heads_kv=1)),
        ("cutlass", replace(_thin("2d_additional_dilated_strided"), heads=1, heads_kv=1)),
        ("cutlass", NAMED["varlen_empty_sequences"]),
        ("hopper", _wide("2d_sub_rpb")),
    ],
    ids=str,
)
def test_bounds(backend: str, case: Case) -> None:
    """Kernels touch no memory but that of their tensors."""
    with _guarded() as trespasses:
        inputs = make_inputs(case, HALF)
        suffix = "fmha" if case.is_attention else "fna"
        out, lse = run(case, inputs, f"{backend}-{suffix}")
        loss = out.float().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        torch.autograd.grad(loss, list(inputs.tensors().values()))
    assert not trespasses, "\n".join(sorted(set(trespasses)))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cutlass", HALF), ("cutlass", SINGLE), ("hopper", HALF), ("blackwell", HALF)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_cases(case: Case, backend: str, dtype: torch.dtype) -> None:
    try:
        check_problem(case, backend, dtype, factor=FACTOR)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


def test_tiles_without_valid_keys_are_skipped() -> None:
    """Not even NaN of keys and values in such tiles reaches a sum."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 160, 1, 16, dtype=HALF) for _ in range(3))
    valid = torch.ones(1, 160, dtype=torch.bool)
    valid[:, 32:96] = valid[:, 100:105] = False
    tiles = {f"{p}q_tile_size": 64 for p in ("", "backward_")}
    tiles |= {f"{p}kv_tile_size": 32 for p in ("", "backward_")}
    results = []
    for fill in (0.0, torch.nan):
        leaves = [query.clone(), key.clone(), value.clone()]
        for tensor in leaves[1:]:
            tensor[:, 32:96] = fill
        for tensor in leaves:
            tensor.requires_grad_()
        out = natten.attention(*leaves, key_mask=valid, backend="cutlass-fmha", **tiles)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    for zeros, nans in zip(*results):
        assert bool(zeros.isfinite().all())
        assert torch.equal(zeros, nans)
    for gradient in results[0][2:]:
        assert not gradient[~valid].any()


@pytest.mark.parametrize(
    ("tokens", "heads", "heads_kv", "head_dim"),
    [((70,), 3, 3, 16), ((5, 9), 4, 2, 48), ((3, 4, 7), 2, 1, 80)],
)
def test_longest_queries_and_keys(
    tokens: tuple[int, ...], heads: int, heads_kv: int, head_dim: int
) -> None:
    problem = make_problem(
        tokens, tokens, batch=2, heads=heads, heads_kv=heads_kv, head_dim=head_dim, dtype=HALF
    )
    query = torch.randn(2, *tokens, 2 * heads, head_dim, dtype=HALF)[..., :heads, :]
    key = torch.randn(2, *tokens, heads_kv, head_dim, dtype=HALF).transpose(0, 1).contiguous()
    key = key.transpose(0, 1)
    found = longest(problem, query, key)
    assert found.shape == (2, heads + heads_kv, PARTS)
    squares = [t.flatten(1, -3).float().square().sum(-1).amax(1) for t in (query, key)]
    torch.testing.assert_close(found.amax(-1), torch.cat(squares, 1))
