"""What finds failures finds them: wrong numbers, crashes, hangs, and calls that are not refused."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from unittest import mock

import problems
import pytest
import torch
import wrong_calls
from memory import guarded, nan_filled_empties
from workers import Titled, Unit, work

from natten import validation
from natten.functional.backends.cpu import CpuBackend


def _read_behind() -> None:
    tensor = guarded(torch.zeros(3, 5))
    ctypes.string_at(tensor.data_ptr() + tensor.nbytes, 1)


def _write_behind() -> None:
    with nan_filled_empties():
        out = torch.empty(7)
    ctypes.memset(out.data_ptr() + out.nbytes, 1, 1)


def _read_before() -> None:
    tensor = guarded(torch.zeros(3, 5), at_end=False)
    ctypes.string_at(tensor.data_ptr() - 1, 1)


def _be_wrong() -> None:
    raise AssertionError("wrong")


def checks(unit: Unit) -> Iterable[Titled]:
    functions = {
        "right": lambda: None, "wrong": _be_wrong, "behind": _read_behind, "before": _read_before,
        "written": _write_behind, "slow": lambda: time.sleep(60),
        "nap": lambda: time.sleep(0.6),
    }  # fmt: skip
    return [(name, functions[name]) for name in unit.items]


def test_crashes_and_hangs_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    units = [
        Unit("a", ("right", "wrong", "right")), Unit("a", ("right", "written", "right")),
        Unit("a", ("before",)), Unit("a", ("behind",)), Unit("b", ("slow", "right")),
    ]  # fmt: skip
    tally = work(units, checks, workers=2, seconds=120.0, patience=3.0)
    failures = {title: why for part in tally.parts.values() for title, why in part.failures}
    assert set(failures) == {"wrong", "before", "behind", "written", "slow"}
    for title in ("before", "behind", "written"):
        assert "died (exit code -11)" in failures[title]
    assert "took too long" in failures["slow"]
    assert "FAILED slow: took too long" in capfd.readouterr().out
    assert (tally.finished, tally.checked, tally.failed) == (5, 8, 5)


def test_nothing_is_begun_after_the_limit() -> None:
    """Nor in the middle of a unit, whose other checks count."""
    units = [Unit("a", ("right", "nap", "right", "right")), Unit("a", ("right",))]
    tally = work(units, checks, workers=0, seconds=0.5)
    assert (tally.finished, tally.checked, tally.left, tally.failed) == (1, 2, 2, 0)


@pytest.mark.parametrize("kind", problems.NAMING)
def test_wrong_numbers_are_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CpuBackend.forward

    def wrong(backend, problem, config, inputs, *views):
        out, lse = forward(backend, problem, config, inputs, *views)
        return out * 1.5, lse

    monkeypatch.setattr(CpuBackend, "forward", wrong)
    found = 0
    for seed in range(5):
        try:
            problems.check(kind, seed, problems.On("cpu"))
        except AssertionError:
            found += 1
    # Where there are no keys, zero is right.
    assert found >= 3


def test_calls_that_are_not_refused_are_found() -> None:
    def lenient(name: str, value: object) -> bool:
        return bool(value)

    with (
        mock.patch.object(validation, "optional_bool", lenient),
        pytest.raises(AssertionError, match="NoneType"),
    ):
        wrong_calls.refuse("window", 0, problems.On("cpu"), count=1000)
