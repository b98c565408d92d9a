"""The simulator's counts against masks written out, and its predictions against measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import natten
from natten import devices, window
from natten.functional.backends.triton import tiles
from natten.functional.problem import DEFAULT_CONFIG, Problem
from natten.simulator import make_problem, needed_pairs, predict, simulate

pytest.importorskip("triton")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h200.json"

CASES = [
    dict(shape=(23,), kernel_size=7),
    dict(shape=(23,), kernel_size=8, stride=3),
    dict(shape=(29,), kernel_size=5, dilation=3),
    dict(shape=(31,), kernel_size=6, stride=4, dilation=2, is_causal=True),
    dict(shape=(9, 14), kernel_size=(4, 5), stride=(1, 5)),
    dict(shape=(11, 10), kernel_size=(3, 4), dilation=(3, 2), is_causal=(True, False)),
    dict(shape=(5, 6, 9), kernel_size=(3, 4, 5), stride=(2, 1, 4)),
    dict(shape=(12, 8), kernel_size=(12, 8)),
    dict(shape=(11,), kernel_size=5, stride=2, upsampling=3),
    dict(shape=(5, 7), kernel_size=(3, 4), is_causal=(False, True), upsampling=(2, 3)),
    dict(shape=(4, 3, 5), kernel_size=(2, 3, 3), dilation=(2, 1, 1), upsampling=(1, 2, 1)),
]


def groups_of(problem: Problem) -> list[tuple[int, ...]]:
    return (
        torch.cartesian_prod(*(torch.arange(d) for d in problem.dilation))
        .view(-1, problem.rank)
        .tolist()
    )


def count_by_mask(
    problem: Problem, rows: tuple[int, ...], columns: tuple[int, ...], inverse: bool, aligned: bool
) -> tuple[int, int, int]:
    """Row tiles, visited and full tiles, from the whole mask."""
    shape = problem.grid
    mask = window.grid_mask(problem.axes).view(*problem.query_shape, *shape)
    if inverse:
        rank = problem.rank
        mask = mask.permute(*range(rank, 2 * rank), *range(rank))
    row_tiles = visited = full = 0
    for group in groups_of(problem):
        own = mask
        for axis, (g, d) in enumerate(zip(group * 2, problem.dilation * 2)):
            own = own.index_select(axis, torch.arange(g, mask.shape[axis], d))
        lengths = own.shape[: problem.rank]
        starts = [range(0, n, t) for n, t in zip(lengths, rows)]
        for start in (
            torch.cartesian_prod(*(torch.tensor(list(s)) for s in starts))
            .view(-1, problem.rank)
            .tolist()
        ):
            tile = own[tuple(slice(s, s + t) for s, t in zip(start, rows))]
            tile = tile.reshape(-1, *own.shape[problem.rank :])
            row_tiles += 1
            seen = tile.any(0).nonzero()
            if not len(seen):
                continue
            first, last = seen.amin(0).tolist(), seen.amax(0).tolist()
            corners = [
                range(f // t * t if aligned else f, e + 1, t)
                for f, e, t in zip(first, last, columns)
            ]
            for corner in (
                torch.cartesian_prod(*(torch.tensor(list(c)) for c in corners))
                .view(-1, problem.rank)
                .tolist()
            ):
                visited += 1
                box = (slice(None), *(slice(c, c + t) for c, t in zip(corner, columns)))
                part = tile[box]
                full += bool(part.all()) and part[0].numel() == prod(columns)
    return row_tiles, visited, full


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_are_those_of_the_mask(case: dict, aligned: bool) -> None:
    rank = len(case["shape"])
    q_tile, kv_tile = {1: ((4,), (8,)), 2: ((2, 4), (4, 2)), 3: ((2, 2, 4), (1, 2, 4))}[rank]
    found = simulate(
        **case, q_tile_shape=q_tile, kv_tile_shape=kv_tile, backward_q_tile_shape=q_tile,
        backward_kv_tile_shape=kv_tile, aligned=aligned, batch=2, heads=4, heads_kv=2,
        head_dim=16, head_dim_v=8,
    )  # fmt: skip
    problem = found.problem
    assert found.needed_pairs == 8 * int(window.grid_mask(problem.axes).sum())
    row_tiles, visited, full = count_by_mask(problem, q_tile, kv_tile, False, aligned)
    for kernel in (found.forward, found.backward[0]):
        assert (kernel.row_tiles, kernel.visited, kernel.full) == (
            8 * row_tiles, 8 * visited, 8 * full,
        )  # fmt: skip
        assert kernel.partial == 8 * (visited - full)
    pairs = 8 * visited * prod(q_tile) * prod(kv_tile)
    assert found.forward.executed_flops == 2 * pairs * (16 + 8)
    assert found.backward[0].executed_flops == 2 * pairs * (2 * 16 + 8)
    row_tiles, visited, full = count_by_mask(problem, kv_tile, q_tile, True, aligned)
    kernel = found.backward[1]
    # A program computes one head of keys and visits all heads of queries.
    assert (kernel.row_tiles, kernel.visited, kernel.full) == (
        4 * row_tiles, 8 * visited, 8 * full,
    )  # fmt: skip


def test_counts_agree_with_the_kernels_own_cost_model() -> None:
    from natten.functional.backends.triton import tiles

    for case in CASES:
        problem = make_problem(**case, heads=1, head_dim=64)
        found = simulate(**case, heads=1, head_dim=64)
        kernel = found.forward
        covered = tiles.work(problem, kernel.q_tile_shape, kernel.kv_tile_shape).covered
        assert kernel.executed_flops / (2 * 128) == covered


def test_upsampling_and_rings_are_told() -> None:
    found = simulate(
        (16, 24), (3, 5), is_circular=(False, True), upsampling=(2, 4), heads=2, head_dim=64
    )
    assert "circular axis 1, upsampling 2x4; batch" in str(found)
    facts = found.as_dict()
    assert (facts["shape"], facts["is_circular"], facts["upsampling"]) == (
        [32, 96], [False, True], [2, 4],
    )  # fmt: skip
    assert found.needed_pairs == 2 * 32 * 96 * 15
    advice = found.advise()
    assert {s.dilation for s in advice.dilations} == {(1, 1)}
    assert all(24 % s.stride[1] == 0 for s in advice.strides)
    with pytest.raises(ValueError, match="dilation must be 1 along an axis with upsampling"):
        simulate((16,), 3, dilation=2, upsampling=2)
    with pytest.raises(ValueError, match="upsampling must hold integers of at least 1"):
        simulate((16,), 3, upsampling=0)


def test_additional_keys_are_visited_by_every_row_tile() -> None:
    without = simulate((16, 16), 5, q_tile_shape=(4, 4), kv_tile_shape=(4, 4))
    found = simulate((16, 16), 5, q_tile_shape=(4, 4), kv_tile_shape=(4, 4), additional=20)
    assert found.forward.visited - without.forward.visited == 16 * 2
    assert found.forward.full - without.forward.full == 16
    assert found.needed_pairs - without.needed_pairs == 256 * 20


def test_gradients_of_additional_keys_are_as_planned() -> None:
    """In one pass, and by a kernel of their own; either way the same pairs are needed."""
    call = dict(shape=(128, 128), kernel_size=(80, 80), heads=8, additional=512)
    tiles = {"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (8, 8)}
    one, two = (simulate(**call, **named) for named in ({}, tiles))
    names = ["all gradients", "gradient of additional keys"]
    assert [p.name for p in one.backward] == names
    assert [p.name for p in two.backward] == ["query gradient", "key and value gradient", names[1]]
    fused, alone = one.backward[1], two.backward[2]
    assert (fused.warp_specialized, alone.warp_specialized) == (True, False)
    assert (fused.q_tile_shape, fused.kv_tile_shape) == ((1, 64), (1, 128))
    pairs = 8 * 128 * 128 * 512
    assert (fused.executed_flops, alone.executed_flops) == (
        2 * 5 * 128 * pairs,
        2 * 4 * 128 * pairs,
    )
    assert fused.skipped == alone.skipped == 0
    # Programs that share queries: four tiles of keys of each head, in each of four shares.
    assert fused.row_tiles == 4 * 8 * 4
    assert predict(one.problem, one.device, DEFAULT_CONFIG, True)[0] == one.backward_ms


def test_boxes_of_a_grid_add_up_to_the_grid() -> None:
    from dataclasses import replace

    whole = make_problem((24, 20), (7, 5), stride=(2, 1), dilation=(2, 3))
    parts = [replace(whole, query_shape=(8, 20), query_origin=(first, 0)) for first in (0, 8, 16)]
    assert sum(map(needed_pairs, parts)) == needed_pairs(whole)
    cut = replace(whole, key_shape=(9, 20), key_origin=(5, 0))
    mask = window.grid_mask(whole.axes, key_shape=(9, 20), key_origin=(5, 0))
    assert needed_pairs(cut) == int(mask.sum())


def test_blocked_attention_wastes_nothing() -> None:
    found = simulate((64, 64), 16, 16, q_tile_shape=(8, 8), kv_tile_shape=(16, 8))
    assert found.waste == 1
    assert found.forward.partial == 0
    assert found.ideal_speedup == found.speedup_bound == 16


def test_the_peer_visits_more_tiles_than_we_do() -> None:
    tiles = dict(q_tile_shape=(4, 4, 8), kv_tile_shape=(4, 4, 8))
    shape = ((30, 48, 80), (18, 24, 24))
    assert simulate(*shape, **tiles).waste < simulate(*shape, **tiles, aligned=True).waste


def test_predictions_follow_the_device() -> None:
    case = dict(shape=(256, 256), kernel_size=80, heads=24)
    h100, a100 = (simulate(**case, device=name) for name in ("h100", "a100"))
    assert a100.forward_ms > 2 * h100.forward_ms
    assert h100.forward.limit == "compute"
    assert simulate((4096,), 2, heads=64, head_dim=256).forward.limit == "memory"
    assert simulate((32, 32), 7).forward.limit == "occupancy"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(shape=(8, 8), kernel_size=9), r"kernel_size \* dilation must be at most"),
        (dict(shape=(8, 8), kernel_size=(3, 3, 3)), "kernel_size must have 2 values"),
        (dict(shape=(2, 2, 2, 2), kernel_size=2), "shape must have 1, 2 or 3 axes"),
        (dict(shape=(8,), kernel_size=3, heads=3, heads_kv=2), "heads must be a multiple"),
        (dict(shape=(8,), kernel_size=3, batch=0), "batch must be an int of at least 1, got 0"),
        (dict(shape=(8,), kernel_size=3, device="abacus"), "device name must be one of .*h100"),
        (dict(shape=(8,), kernel_size=3, q_tile_shape=(4,)), "must be given together"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        simulate(**arguments)


def test_the_result_is_text_and_json() -> None:
    found = natten.simulate((16, 16), 5, is_causal=(True, False))
    assert "causal axis 0" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["waste"] == found.waste


def test_advice_removes_waste(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests on a GPU set it to zero. A size that no other test has asked for.
    monkeypatch.setattr(tiles, "MIN_TMA_PRODUCTS", 1.2e10)
    found = simulate((64, 64), 16, heads=7)
    advice = found.advise()
    assert advice.strides[0].stride == (1, 1)
    assert advice.strides[0].speedup == pytest.approx(1)
    assert advice.strides[-1].waste < 1.05 < found.waste
    sizes = [prod(s.kernel_size) for s in advice.windows]
    assert sizes == sorted(sizes, reverse=True)
    assert (16, 16) in [s.kernel_size for s in advice.windows]
    assert {s.dilation for s in advice.dilations} == {(1, 1), (2, 2), (4, 4)}
    assert advice.tiles[0].ms <= min(s.ms for s in advice.tiles)
    assert "tile shapes" in str(advice)
    for result in (found, advice):
        shown: list[str] = []
        result._repr_pretty_(SimpleNamespace(text=shown.append), False)
        assert shown == [str(result)]
    json.dumps(advice.as_dict())


def test_devices_are_found_by_the_names_of_their_drivers() -> None:
    assert devices.find("NVIDIA H100 80GB HBM3").name == "h100"
    assert devices.find("NVIDIA H100 PCIe").name == "h100-pcie"
    assert devices.find("H200").name == "h200"
    assert devices.find("NVIDIA A100-SXM4-40GB").name == "a100-40gb"
    for device in devices.DEVICES.values():
        assert devices.find(device.full_name) == device
        assert devices.find(device.name.upper()) == device


@pytest.mark.skipif(not RESULTS.exists(), reason="no measurements in benchmarks/results")
def test_predictions_are_near_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parents[1]))
    import predictions

    results = json.loads(RESULTS.read_text())["cases"]
    ratios: dict[str, list[float]] = {"forward": [], "backward": []}
    for _, dtype, found, result in predictions.rows(RESULTS):
        if dtype != "bfloat16" or found.problem.head_dim_v > 256:
            continue
        by_host = predictions.host_bound(result, results)
        if not by_host[0]:
            ratios["forward"].append(found.forward_ms / result["fwd_ms"])
        if not by_host[1] and "bwd_ms" in result:
            ratios["backward"].append(found.backward_ms / result["bwd_ms"])
    for found_ratios in ratios.values():
        assert len(found_ratios) >= 8
        # Measurements change with every change of a kernel; the model's constants need not.
        near = [1 / 1.2 <= ratio <= 1.2 for ratio in found_ratios]
        assert sum(near) >= 0.8 * len(near)


@pytest.mark.skipif(not RESULTS.exists(), reason="no measurements in benchmarks/results")
def test_the_fit_finds_the_costs_that_times_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(RESULTS.parents[1]))
    from dataclasses import replace

    import fit_costs

    from natten import simulator

    present = fit_costs.as_vector(simulator._PING_PONG_COSTS)
    cases = fit_costs.cases_of(RESULTS)["ping_pong"]
    for case in cases:
        # The simulator and the script compute the same from the same.
        assert fit_costs.seconds_of(case, present) == pytest.approx(
            sum(kernel.ms for kernel in case.kernels) / 1e3
        )
    truth = present * [1.2, 0.8, 1.3, 0.7, 1.1, 1.0, 0.9, 1.2, 1.0]
    made = [replace(case, seconds=fit_costs.seconds_of(case, truth)) for case in cases]
    found = fit_costs.fit(made, present)
    for case in made:
        assert fit_costs.seconds_of(case, found) == pytest.approx(case.seconds, rel=0.01)
    # No more than the peak.
    assert found[0] >= 1
    assert found[-1] == present[-1]
    family = {case.family for case in cases}
    assert len(family) < len(cases)
    assert "dense, head_dim 64" in family


def test_triton_is_not_needed():
    """Neither for default tiles, nor to say that its kernels are missing."""
    code = """
import sys
sys.modules["triton"] = None
import torch, natten
assert natten.simulate((30, 48, 80), (18, 24, 24), heads=4, head_dim=128).forward_ms > 0
q = torch.randn(1, 8, 2, 16)
try:
    natten.na1d(q, q, q, 3, backend="cutlass-fna")
except RuntimeError as error:
    assert "kernels cannot be imported" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
