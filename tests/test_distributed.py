"""Attention over a grid that is sharded over ranks, against one process.

Ranks are processes over gloo, see ranks.py; what they check is in distributed_checks.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import distributed_checks as checks
import pytest
from ranks import Ranks

# Problems for each number of ranks.
RANDOM = {2: 60, 3: 30, 4: 30, 8: 8}
METHODS = ("halo", "merge", "ring")
TRANSPORTS = ("all_to_all", "p2p")


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    """A group of each size, started when it is first used."""
    groups = {world: Ranks(world, "distributed_checks") for world in RANDOM}
    yield groups
    for group in groups.values():
        group.stop()


@pytest.mark.parametrize("world", RANDOM)
def test_random_problems(ranks, world):
    ranks[world].run("random_problems", 1000 * world, RANDOM[world])


@pytest.mark.parametrize("world", [2, 4])
def test_random_problems_in_bfloat16(ranks, world):
    ranks[world].run("random_problems", 0, 15, "bfloat16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", RANDOM)
def test_many_random_problems(ranks, world):
    ranks[world].run("random_problems", 10**6, 10 * RANDOM[world])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [3, 8])
def test_ranks_out_of_order_and_empty_shards(ranks, world, method, transport):
    ranks[world].run("one_way_or_the_other", method, transport)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("name", checks.MISMATCHES)
def test_ranks_that_disagree_all_raise(ranks, name, culprit):
    ranks[2].run("mismatch", name, culprit)


def test_a_disagreement_says_who_has_what(ranks):
    ranks[3].run("names_the_differing")


@pytest.mark.parametrize(
    "check",
    [
        "autocasts",
        "counts_flops",
        "gradients_are_asked_for_one_by_one",
        "grid_is_explicit",
        "is_deterministic",
        "keys_are_kept_until_read",
        "saved_tensors_are_read_once",
        "shards_and_unshards",
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_of_ranks(ranks, world, check):
    ranks[world].run(check)


@pytest.mark.parametrize("layout", ["tokens and batch", "heads and tokens"])
def test_windows_of_other_kinds(ranks, layout):
    ranks[4].run("windows_of_other_kinds", layout)


@pytest.mark.parametrize("check", ["refuses_placements", "refuses_dtensors", "shards_and_unshards"])
def test_of_meshes(ranks, check):
    ranks[4].run(check)


@pytest.mark.parametrize(
    ("method", "transport", "heads_dim"),
    [
        ("halo", "all_to_all", None),
        ("halo", "p2p", 0),
        ("merge", "all_to_all", None),
        ("ring", "p2p", None),
    ],
)
def test_compiles_in_one_graph(ranks, method, transport, heads_dim):
    ranks[2].run("compiles", method, transport, heads_dim)


@pytest.mark.parametrize("function", ["distributed.na2d", "na2d"])
@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_dtensors(ranks, layout, function):
    ranks[4].run("dtensors", layout, function)


def test_operators_refuse_token_shards(ranks):
    ranks[2].run("operators_refuse_token_shards")


@pytest.mark.parametrize("what", ["dies", "hangs", "raises"])
def test_a_rank_that_fails_ends_the_others(what):
    group = Ranks(3, "distributed_checks")
    try:
        first, second, third = group.try_run("fails", what, 4)
    finally:
        group.stop()
    assert first is None, first
    assert second is None, second
    assert ("died" if what == "dies" else "ZeroDivisionError") in third
