"""The Triton kernels on a GPU: named cases, 2,000 random problems, and what only a GPU can show.

`gpu_checks` has the checks; `python tests/run_gpu.py` runs them in parallel.
"""

from __future__ import annotations

from collections.abc import Callable

import gpu_checks
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

FAMILIES, PROBLEMS = 72, 2000


def _titled(make: Callable[[], object]) -> dict[str, Callable[[], None]]:
    """Checks by title; which ones there are depends on the GPU."""
    return dict(make()) if torch.cuda.is_available() else {}  # type: ignore[call-overload]


NAMED = _titled(lambda: gpu_checks.named_checks(all_dtypes=True))
LARGER = _titled(gpu_checks.larger_checks)
LISTED = _titled(gpu_checks.listed_checks)


@pytest.mark.parametrize("title", NAMED)
def test_named(title: str) -> None:
    NAMED[title]()


@pytest.mark.parametrize("title", LARGER)
def test_larger(title: str) -> None:
    LARGER[title]()


@pytest.mark.parametrize("title", LISTED)
def test_listed_tiles(title: str) -> None:
    LISTED[title]()


@pytest.mark.parametrize("name", gpu_checks.SINGLE)
def test_single(name: str) -> None:
    gpu_checks.SINGLE[name]()


@pytest.mark.parametrize("number", range(FAMILIES))
def test_random(number: int) -> None:
    failures = []
    for seed in range(number, PROBLEMS, FAMILIES):
        try:
            gpu_checks.check_family_problem(number, seed)
        except AssertionError as error:
            failures.append(f"seed {seed}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("number", range(18))
def test_random_for_gluon(number: int) -> None:
    if not gpu_checks.has_hopper():
        pytest.skip("kernels for Hopper")
    for seed in range(20 * number, 20 * number + 20):
        gpu_checks.check_gluon_problem(number, seed)


@pytest.mark.parametrize("number", range(gpu_checks.GRIDS_FAMILIES))
def test_grids_of_different_sizes(number: int) -> None:
    for seed in range(10):
        gpu_checks.check_grids_problem(number, seed)


@pytest.mark.parametrize("number", range(gpu_checks.SPECIAL_FAMILIES))
@pytest.mark.parametrize("kind", gpu_checks.SPECIAL)
def test_special_problems(kind: str, number: int) -> None:
    for seed in range(10 * number, 10 * number + 10):
        gpu_checks.check_special_problem(kind, number, seed)


@pytest.mark.parametrize("seed", range(48))
def test_random_with_default_tiles(seed: int) -> None:
    gpu_checks.check_free_problem(seed)
