"""Reads a report of compute-sanitizer's racecheck, and leaves out what Triton's own code explains.

    python tests/races.py REPORT

The warps that `warp_specialize` sets apart wait at a named barrier for a byte in shared memory that
says what to run, and at another before it may change. racecheck does not follow such barriers from
one branch to another, and reports each of these bytes. They are read where the kernel begins, and
written there or at the call of `warp_specialize`: only races between these places are left out.
Exits with 1 if there are others.
"""

# ruff: noqa: T201

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parents[1] / "natten" / "functional" / "backends" / "triton"


class Access(NamedTuple):
    kind: str  # "Read" or "Write"
    kernel: str
    file: str
    line: int


def races(report: str) -> list[list[Access]]:
    """Each race as the access that was found first and those that it clashes with."""
    found: list[list[Access]] = []
    for text in report.splitlines():
        access = re.search(r"(Read|Write) access at (\w+)\+\w+ in (\S+?):(\d+)", text)
        if access is None:
            # Races without places in a source are none that could be explained.
            if "Race reported" in text:
                found.append([])
            continue
        if "Race reported" in text:
            found.append([])
        if found:
            found[-1].append(Access(access[1], access[2], access[3], int(access[4])))
    return found


def places(access: Access) -> tuple[int, int] | None:
    """The lines where the kernel of an access begins and where it sets warps apart, if it does."""
    source = KERNELS / Path(access.file).name
    if not source.is_file():
        return None
    lines = source.read_text().splitlines()
    begin = next((n for n, line in enumerate(lines, 1) if f"def {access.kernel}(" in line), None)
    if begin is None:
        return None
    body = enumerate(lines[begin:], begin + 1)
    return begin, next((n for n, line in body if "gl.warp_specialize(" in line), begin)


def is_explained(race: list[Access]) -> bool:
    for access in race:
        known = places(access)
        if known is None or access.line not in (known if access.kind == "Write" else known[:1]):
            return False
    return len(race) > 1 and {access.kind for access in race} == {"Read", "Write"}


def main() -> int:
    report = Path(sys.argv[1]).read_text()
    if "RACECHECK SUMMARY" not in report:
        print(f"{sys.argv[1]} has no summary of racecheck")
        return 1
    found = races(report)
    left = [race for race in found if not is_explained(race)]
    for race in left:
        print("RACE " + " / ".join(f"{a.kind} {a.kernel} {a.file}:{a.line}" for a in race))
    print(f"{len(found)} races reported, {len(left)} of them not those of Triton's warp_specialize")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
