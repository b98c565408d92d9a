"""Which tiles the kernels get: what is left unmasked must need no mask."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from test_simulator import count_by_mask

import natten
from natten import devices
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import make_problem

pytest.importorskip("triton")

from natten.functional.backends.triton import CUTLASS, HOPPER, tiles
from natten.functional.backends.triton.launcher import in_gluon


@pytest.mark.parametrize("seed", range(60))
def test_tiles_without_masks_are_in_full_sight(seed: int) -> None:
    random = Random(seed)
    rank = random.choice((1, 2, 3))
    tile = {1: (4,), 2: (2, 4), 3: (2, 2, 2)}[rank]
    # Multiples of the tile, mostly: else some tile is cut off, and there is nothing to find.
    shape = tuple(n * random.choice((1, 2, 3, 4)) + (random.random() < 0.1) for n in tile)
    kernel_size = tuple(random.choice((s, n, min(2 * n, s))) for n, s in zip(tile, shape))
    stride = tuple(random.choice((1, k)) for k in kernel_size)
    problem = make_problem(shape, kernel_size, stride, heads=1, head_dim=16)
    for inverse in (False, True):
        _row_tiles, visited, full = count_by_mask(problem, tile, tile, inverse, False)
        tiling = tiles.Tiling(tile, tile)
        assert tiles._whole(problem, tiling, inverse) == (visited == full), (shape, kernel_size)


def test_some_problems_need_no_masks() -> None:
    blocked = make_problem((256, 256), (80, 80), (16, 16), heads=1, head_dim=128)
    dense = make_problem((4096,), (4096,), heads=1, head_dim=64)
    for problem in (blocked, dense):
        for kind in (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT):
            assert tiles.choose(problem, kind, True, tiles.Chip(227 * 1024)).whole
    ragged = make_problem((4097,), (4097,), heads=1, head_dim=64)
    causal = make_problem((4096,), (4096,), is_causal=True, heads=1, head_dim=64)
    for problem in (ragged, causal):
        assert not tiles.choose(problem, tiles.FORWARD, True, tiles.Chip(227 * 1024)).whole


def test_heads_are_two_tiles_where_these_take_less() -> None:
    found = {n: tiles.parts(n, torch.float16) for n in range(1, 1025)}
    for features, widths in found.items():
        assert features <= sum(widths) <= tiles.block(features)
        assert all(width >= 16 and width == tiles.block(width) for width in widths)
        if len(widths) == 2:
            main, rest = widths
            assert rest < main < features
            assert sum(widths) < tiles.block(features)
    wanted = {
        40: (32, 16), 48: (32, 16), 72: (64, 16), 80: (64, 16), 96: (64, 32), 160: (128, 32),
        192: (128, 64), 384: (256, 128), 24: (32,), 56: (64,), 120: (128,),
    }  # fmt: skip
    assert found | wanted == found
    assert all(found[2**n] == (max(2**n, 16),) for n in range(11))
    single = {n: tiles.parts(n, torch.float32) for n in (40, 64, 80, 96)}
    assert single == {40: (64,), 64: (64,), 80: (64, 16), 96: (64, 32)}


@pytest.mark.parametrize("device", ["t4", "rtx3090", "rtx4090"])
@pytest.mark.parametrize("kind", [tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT])
def test_two_programs_fit_where_shared_memory_is_small(device: str, kind: str) -> None:
    problem = make_problem((64, 64), (13, 13), heads=4, head_dim=64, dtype=torch.float16)
    facts = devices.find(device)
    assert facts.capability is not None
    limit, products = facts.shared_memory, tiles.products(facts.capability)
    tiling = tiles.choose(problem, kind, False, tiles.Chip(limit, products))
    assert tiling is not None
    taken = tiles._shared_memory(tiling, problem, kind, products)
    assert taken <= limit
    assert 2 * taken <= limit or tiling.stages <= 2
    assert prod(tiling.query) * prod(tiling.key) >= 32 * 64


def test_lengths_need_a_kernel_that_reads_no_more() -> None:
    """The kernel whose warp groups play ping-pong loads whole tiles of additional keys."""
    problem = make_problem(
        (64, 64), 13, heads=8, head_dim=64, dtype=torch.bfloat16, device="cuda", additional=77
    )
    assert tiles.PING_PONG.suits(problem)
    assert not tiles.PING_PONG.suits(replace(problem, has_lengths=True))


def _on_gpu(problem: Problem) -> Problem:
    return replace(problem, device=torch.device("cuda"))


def _large(**changes: object) -> Problem:
    settings: dict[str, object] = dict(batch=1, heads=8, head_dim=128, dtype=torch.bfloat16)
    window = {"shape": (128, 128), "kernel_size": (60, 60), "dilation": 1}
    window |= {name: changes.pop(name) for name in tuple(changes) if name in window}
    made = make_problem(**window, **(settings | changes))  # type: ignore[arg-type]
    return _on_gpu(made)


needs_gluon = pytest.mark.skipif(
    in_gluon("hopper_forward") is None, reason="another dialect of Gluon"
)


@needs_gluon
def test_warp_groups_run_apart_where_that_is_faster() -> None:
    with devices.pretending(devices.find("h100")):
        chosen = {
            "large": _large(),
            "dense": _large(shape=(16384,), kernel_size=(16384,)),
            "head_dim 64": _large(head_dim=64),
            "values": _large(head_dim=64, head_dim_v=128),
            "head_dim 96": _large(head_dim=96),
            "head_dim 80": _large(kernel_size=(80, 80), head_dim=80, head_dim_v=48),
            "head_dim 112": _large(head_dim=112),
            "small window": _large(kernel_size=(7, 7)),
            "head_dim 32": _large(head_dim=32),
            "dilation": _large(kernel_size=(60, 30), dilation=(1, 2)),
            "dilation in space": _large(
                shape=(32, 48, 80), kernel_size=(16, 24, 20), dilation=(2, 1, 4)
            ),
            "unequal groups": _large(kernel_size=(60, 40), dilation=(1, 3)),
            "a box": replace(_large(kernel_size=(60, 30), dilation=(1, 2)), query_shape=(64, 128)),
            "small groups": _large(kernel_size=(4, 4), dilation=(32, 32)),
            "float32": _large(dtype=torch.float32),
            "bias": replace(_large(), has_rpb=True),
            "lengths": replace(_large(), num_additional=64, has_lengths=True),
        }
        ping_pong = {
            name: HOPPER.forward_tiling(problem, DEFAULT_CONFIG).ping_pong
            for name, problem in chosen.items()
        }
    assert [name for name, chosen in ping_pong.items() if chosen] == [
        "large", "dense", "head_dim 64", "values", "head_dim 96", "head_dim 80", "dilation",
        "dilation in space",
    ]  # fmt: skip


@needs_gluon
def test_gradients_come_in_one_pass_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests on a GPU set it to zero.
    monkeypatch.setattr(tiles, "MIN_TMA_PRODUCTS", 1.2e10)
    with devices.pretending(devices.find("h100")):
        chosen = {
            "large": _large(),
            "dense": _large(shape=(16384,), kernel_size=(16384,)),
            "head_dim 64": _large(shape=(16384,), kernel_size=(16384,), head_dim=64),
            "values": _large(head_dim=64, head_dim_v=128),
            "head_dim 96": _large(head_dim=96),
            "head_dim 48": _large(head_dim=48),
            "small window": _large(kernel_size=(7, 7)),
            "space": _large(shape=(30, 48, 80), kernel_size=(18, 24, 24)),
            "dilation": _large(shape=(256, 256), kernel_size=(128, 64), dilation=(1, 2)),
            "unequal groups": _large(shape=(256, 256), kernel_size=(128, 64), dilation=(1, 3)),
            "bias": replace(_large(), has_rpb=True),
            "context": replace(_large(), num_additional=64),
            "lengths": replace(_large(), num_additional=64, has_lengths=True),
            "context of a small window": replace(_large(kernel_size=(7, 7)), num_additional=77),
            "small": _large(shape=(2048,), kernel_size=(2048,)),
        }
        together = {
            name: HOPPER.backward_tilings(problem, DEFAULT_CONFIG).fused
            for name, problem in chosen.items()
        }
    assert [name for name, tiling in together.items() if tiling] == [
        "large",
        "dense",
        "head_dim 64",
        "head_dim 96",
        "head_dim 48",
        "space",
        "dilation",
        "context",
    ]
    assert (prod(together["dense"].query), prod(together["dense"].key)) == (64, 128)
    assert (prod(together["head_dim 64"].query), prod(together["head_dim 64"].key)) == (128, 128)


@needs_gluon
def test_one_pass_is_not_for_all_that_may_be_asked() -> None:
    problem = _large(shape=(256, 256), kernel_size=(80, 80), heads=8)
    with devices.pretending(devices.find("h100")):

        def found(**knobs: Any) -> Any:
            return HOPPER.backward_tilings(problem, Config(**knobs))

        assert found().fused is not None
        # Half of the heads at a time: their sums take less memory.
        assert found().launches == 2
        assert found(backward_kv_splits=(2, 2)).fused is None
        shapes = {"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (8, 8)}
        assert found(**shapes).fused is None
        shapes = {"backward_q_tile_shape": (4, 16), "backward_kv_tile_shape": (16, 8)}
        assert (found(**shapes).fused.query, found(**shapes).fused.key) == ((4, 16), (16, 8))
        assert HOPPER.backward_configs(problem)[0] == (
            found().fused.query, found().fused.key,
        )  # fmt: skip
        with natten.use_deterministic_algorithms():
            assert found().fused is None
        with natten.set_memory_usage_preference("strict"):
            assert found().fused is None
        with natten.set_memory_usage_preference("unrestricted"):
            assert found().launches == 1


@needs_gluon
def test_the_schedule_decides() -> None:
    with devices.pretending(devices.find("h100")):
        for problem, suits in ((_large(), True), (_large(head_dim=32), False)):
            for schedule in ("non", "coop", "pp"):
                tiling = HOPPER.forward_tiling(problem, Config(kernel_schedule=schedule))
                assert tiling.ping_pong == (suits and schedule == "pp")
                assert bool(tiling.programs) == (schedule != "non" and not tiling.ping_pong)
            listed = [
                (prod(query), prod(key))
                for (query, key), schedule in HOPPER.configs(problem)
                if schedule == "pp"
            ]
            assert ((128, 128) in listed) == suits
            for query, key in {*listed}:
                assert query == 64 or tiles.is_ping_pong_size(query, key)


@pytest.mark.parametrize("shape", [(4096,), (64, 48), (12, 20, 24)])
def test_halves_of_tiles(shape: tuple[int, ...]) -> None:
    kernel_size = tuple(n // 2 for n in shape)
    problem = make_problem(shape, kernel_size, heads=1, head_dim=128)
    query, key = tiles.best_shapes(problem, tiles.PING_PONG, 128, 128)
    half = tiles.half(query)
    assert prod(half) == 64
    # In memory's order, the first half of the tokens of a tile is the half that is a box.
    inside = torch.zeros(query, dtype=torch.bool)
    inside[tuple(slice(n) for n in half)] = True
    assert inside.flatten()[:64].all()
    # What the halves skip: they never compute more than whole tiles would.
    assert tiles.work(problem, half, key).covered <= tiles.work(problem, query, key).covered


def test_the_order_of_additions_does_not_depend_on_the_batch() -> None:
    """Where it is asked to be the same on every run."""
    problem = make_problem((64, 64), 7, heads=4, head_dim=32, additional=20, device="cuda")
    with devices.pretending(devices.find("h100")):
        for deterministic in (False, True):
            with natten.use_deterministic_algorithms(deterministic):
                splits = {
                    CUTLASS.backward_tilings(
                        replace(problem, batch=batch, requires_grad=True), DEFAULT_CONFIG
                    ).splits
                    for batch in (1, 64)
                }
            assert (len(splits) == 1) == deterministic


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "head_dim", "most"),
    [((2000,), (1,), 64, 3), ((7, 7), (1, 3), 32, 8), ((40, 56), (1, 1), 128, 8),
     ((16, 12, 24), (1, 1, 1), 128, 14)],
)  # fmt: skip
def test_few_shapes_for_many_grids(kernel_size, dilation, head_dim, most):
    """Calls on other grids run with shapes of earlier ones: few kernels, and little is lost."""
    random = Random(3)
    with mock.patch.dict(tiles._used, clear=True):
        tiles.reuse.cache_clear()
        for kernel in (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT):
            seen, best_seen, ratios = set(), set(), []
            for _ in range(60):
                largest = {1: 32768, 2: 256, 3: 64}[len(kernel_size)]
                grid = tuple(
                    min(largest, int(k * d * random.uniform(1, 6)))
                    for k, d in zip(kernel_size, dilation, strict=True)
                )
                problem = make_problem(
                    grid, kernel_size, dilation=dilation, heads=4, head_dim=head_dim,
                    dtype=torch.bfloat16, device="cuda",
                )  # fmt: skip
                best = tiles.choose(problem, kernel, True, tiles.Chip(227 * 1024))
                found = tiles.reuse(problem, kernel, best)
                sizes = {"query": best.query, "key": best.key}
                sizes |= {"warps": best.warps, "stages": best.stages}
                assert replace(found, **sizes) == best
                assert tiles.reuse(problem, kernel, best) == found
                seen.add(found)
                best_seen.add(best)
                costs = [kernel.time_of(problem, tiling) for tiling in (found, best)]
                ratios.append(costs[0] / costs[1])
            assert len(seen) <= min(most, len(best_seen))
            assert max(ratios) <= 1.1
            assert prod(ratios) ** (1 / len(ratios)) <= 1.03
        tiles.reuse.cache_clear()
