"""explain: its bytes against brute force, and what it says about meshes."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

import natten
from natten.distributed import Links, explain
from natten.distributed.boxes import chunk_lengths
from natten.window import Axis, attended

VIDEO = dict(grid=(30, 48, 80), kernel_size=(18, 24, 24), heads=24)


def received(grid, kernel_size, dilation, causal, shards, rings=(False, False)):
    """Keys that each rank of a small grid needs of others, counted one by one."""
    axes = [Axis(n, k, 1, d, c, r) for n, k, d, c, r in zip(
        grid, kernel_size, dilation, causal, rings)]  # fmt: skip
    counts = []
    splits = [chunk_lengths(n, s) for n, s in zip(grid, shards)]
    for place in product(*map(range, shards)):
        own = [range(sum(s[:i]), sum(s[: i + 1])) for s, i in zip(splits, place)]
        seen = {key for query in product(*own) for key in attended(query, axes)}
        counts.append(len(seen - set(product(*own))))
    return counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shards", [(2, 1), (1, 3), (2, 2), (4, 1)])
def test_bytes_are_those_that_are_needed(shards, causal):
    grid, kernel_size = (12, 9), (5, 4)
    report = explain(
        grid, kernel_size, is_causal=causal, ranks=prod(shards), heads=3, head_dim=16,
        shards=shards,
    )  # fmt: skip
    counts = received(grid, kernel_size, (1, 1), (causal, causal), shards)
    assert report.best.halo_bytes == max(counts) * 3 * 2 * 16 * 2
    assert report.best.far_bytes == 0
    assert report.best.heads_bytes == 0


@pytest.mark.parametrize("shards", [(2, 1), (1, 3), (2, 2), (4, 1)])
def test_bytes_of_rings(shards):
    """All ranks have neighbors on both sides there."""
    grid, kernel_size, rings = (12, 9), (5, 4), (True, True)
    report = explain(
        grid, kernel_size, is_circular=rings, ranks=prod(shards), heads=3, head_dim=16,
        shards=shards,
    )  # fmt: skip
    counts = received(grid, kernel_size, (1, 1), (False, False), shards, rings)
    assert report.best.halo_bytes == max(counts) * 3 * 2 * 16 * 2
    if shards == (4, 1):
        assert report.best.peers == 2


def test_heads_bytes_and_nodes():
    report = explain((64,), 9, ranks=4, heads=8, head_dim=16, shards=(2,), heads_ranks=2)
    # Half of query, key, value and output of 16 tokens.
    assert report.best.heads_bytes == 16 * 8 * 16 * 2 * 4 / 2
    assert report.best.halo_bytes == 4 * 4 * 2 * 16 * 2
    apart = explain((64,), 9, ranks=4, heads=8, head_dim=16, shards=(4,), ranks_per_node=2)
    # Of a rank inside, one neighbor is in its node and the other is not.
    assert apart.best.halo_bytes == 8 * 8 * 2 * 16 * 2
    assert apart.best.far_bytes == apart.best.halo_bytes / 2


def test_recommends_the_mesh_with_the_shortest_time():
    report = explain(**VIDEO, ranks=4, top=8)
    times = [e.forward_ms + e.backward_ms for e in report.estimates]
    assert times == sorted(times)
    assert all(e.ranks == 4 for e in report.estimates)
    assert 3.0 < report.best.speedup < 4.2
    # Columns and rows have the smallest halo; frames, of which a window has most, the largest.
    assert report.best.shards == (1, 2, 2)
    one = explain(**VIDEO, ranks=1)
    assert one.best.speedup == pytest.approx(1.0)
    assert one.best.hidden == 1.0


def test_slow_links_cost_time_and_heads_stay_in_nodes():
    slow = explain(**VIDEO, ranks=4, shards=(1, 2, 2), links=Links(node=1.0))
    fast = explain(**VIDEO, ranks=4, shards=(1, 2, 2))
    assert slow.best.forward_ms > fast.best.forward_ms
    assert slow.best.hidden < fast.best.hidden
    many = explain(**VIDEO, ranks=64)
    assert many.best.heads == many.best.nodes[-1] > 1


def test_prints_a_table():
    text = str(explain(**VIDEO, ranks=2))
    assert "1 x 1 x 2" in text
    assert "212.3" in text
    assert "efficiency" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ranks=0), "ranks must be a positive int"),
        (dict(ranks=4, shards=(1, 2, 3)), "shards must make 4 ranks"),
        (dict(ranks=4, shards=(2, 2)), "shards must have 3 values"),
        (dict(ranks=4, kernel_size=50), "kernel_size \\* dilation must be at most"),
        (dict(ranks=4, device="abacus"), "device name must be one of"),
        (dict(ranks=7919), "no way to share"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(**{**VIDEO, **arguments})


def test_is_found_without_importing_it():
    assert natten.distributed.explain is explain
