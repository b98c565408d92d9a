"""What `races.py` makes of racecheck's reports."""

from __future__ import annotations

import pytest
import races

KERNEL = "hopper_forward_kernel"


@pytest.fixture(scope="module")
def places() -> tuple[int, int]:
    lines = (races.KERNELS / "hopper_forward.py").read_text().splitlines()
    (begin,) = (n for n, line in enumerate(lines, 1) if f"def {KERNEL}(" in line)
    (call,) = (n for n, line in enumerate(lines, 1) if "gl.warp_specialize(" in line)
    return begin, call


def report(read: int, write: int, kernel: str = KERNEL, file: str = "hopper_forward.py") -> str:
    return (
        f"========= Error: Race reported between Read access at {kernel}+0x120 in {file}:{read}\n"
        f"=========     and Write access at {kernel}+0x7420 in {file}:{write} [11 hazards]\n"
        "========= \n"
    )


def test_bytes_that_say_what_to_run_are_explained(places: tuple[int, int]) -> None:
    begin, call = places
    found = races.races(report(begin, begin) + report(begin, call))
    assert [len(race) for race in found] == [2, 2]
    assert all(map(races.is_explained, found))


def test_all_else_is_not(places: tuple[int, int]) -> None:
    begin, call = places
    others = [
        report(begin, call + 1),
        report(call, begin),
        report(begin - 60, begin),
        report(begin, begin, file="elsewhere.py"),
        report(begin, begin, kernel="attend"),
        "========= Error: Race reported between Read access at somewhere\n",
        report(begin, begin).partition("\n")[0],
    ]
    for text in others:
        (race,) = races.races(text)
        assert not races.is_explained(race), text


def test_a_report_must_be_whole(
    places: tuple[int, int], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    monkeypatch.setattr("sys.argv", ["races.py", str(path)])
    for text, code in (
        ("", 1),
        (report(*places), 1),
        (report(*places) + "========= RACECHECK SUMMARY: 1 hazards displayed\n", 0),
        (report(1, 1) + "========= RACECHECK SUMMARY: 1 hazards displayed\n", 1),
    ):
        path.write_text(text)
        assert races.main() == code
