"""What reports of compute-sanitizer say of this library's kernels.

    python tests/reports.py TOOL REPORT...     its verdict; one report is wrong_kernel.py's
    python tests/reports.py names              the kernels
    python tests/reports.py reached FOLDER     whether Triton's cache there has all of them

memcheck's and racecheck's reports count whole, and initcheck's of these kernels alone: it does not
see all that torch's own kernels write, and so reports those that read it.

Of races, those are left out that Triton's own code explains. The warps that `warp_specialize` sets
apart wait at a named barrier for a byte in shared memory that says what to run, and at another
before it may change. racecheck does not follow such barriers from one branch to another, and
reports each of these bytes. They are read where the kernel begins, and written there or at the call
of `warp_specialize`: only races between these places are left out.

Exits with 1 if anything is wrong, or a report is not whole.
"""

# ruff: noqa: T201

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

FUNCTIONAL = Path(__file__).parents[1] / "natten" / "functional"
KERNELS = FUNCTIONAL / "backends" / "triton"
# The report on wrong_kernel.py.
WRONG = ".wrong."
# Faults of a report that are shown; of one that is not whole, its last lines.
SHOWN = 20


@cache
def kernels() -> tuple[str, ...]:
    """The names of all kernels: compiled functions that no other one calls."""
    compiled: set[str] = set()
    called: set[str] = set()
    for path in FUNCTIONAL.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            decorators = [ast.unparse(d).partition("(")[0] for d in function.decorator_list]
            if not {"triton.jit", "gluon.jit"} & set(decorators):
                continue
            compiled.add(function.name)
            # Also those that are handed on: warps set apart get theirs as arguments.
            inside = [node for statement in function.body for node in ast.walk(statement)]
            called |= {node.id for node in inside if isinstance(node, ast.Name)}
            called |= {node.attr for node in inside if isinstance(node, ast.Attribute)}
    return tuple(sorted(compiled - called))


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


def entries(report: str) -> Iterator[str]:
    """What memcheck and initcheck report, each with all of its lines as one."""
    lines: list[str] = []
    for line in [*report.splitlines(), "========= end"]:
        if re.match("=========     ", line) and lines:
            lines.append(line.strip("= "))
        elif line.startswith("========= "):
            if len(lines) > 1:
                yield " / ".join(lines)
            lines = [line.strip("= ")]


def faults(tool: str, report: str) -> tuple[list[str], int]:
    """What is wrong with these kernels, and how many entries of a report are left out."""
    if tool == "racecheck":
        found = races(report)
        left = [race for race in found if not is_explained(race)]
        shown = [
            "race of " + " / ".join(f"{a.kind} {a.kernel} {a.file}:{a.line}" for a in race)
            for race in left
        ]
        return shown, len(found) - len(left)
    everything = list(entries(report))
    if tool == "memcheck":
        return everything, 0
    ours = re.compile(rf"\b({'|'.join(kernels())})\b")
    found_here = [entry for entry in everything if ours.search(entry)]
    return found_here, len(everything) - len(found_here)


def gaps(tool: str, report: str) -> list[str]:
    """What a report lacks that is said of a run that came to its end."""
    found = []
    if "SUMMARY" not in report:
        found.append("it has no summary")
    if "not printed" in report:
        found.append("not all is printed")
    ended = re.search(
        r"^[1-9]\d* checked, 0 failed, 0 left, 0 of \d+ units not started", report, re.M
    )
    if ended is None:
        found.append("not all was checked")
    if tool == "memcheck" and "ERROR SUMMARY: 0 errors" not in report:
        found.append("it counts errors")
    return found


def is_right(tool: str, path: Path) -> bool:
    """Whether a report finds nothing, or, of what is wrong, something; prints why not."""
    report = path.read_text(errors="replace")
    wrong, left_out = faults(tool, report)
    if WRONG in path.name:
        mine = [fault for fault in wrong if "forward_kernel" in fault]
        print(f"{path.name}: {len(mine)} faults of what is wrong")
        return bool(mine)
    lacks = gaps(tool, report)
    checked = sum(map(int, re.findall(r"^(\d+) checked", report, re.M)))
    print(
        f"{path.name}: {checked} checked, {len(wrong)} faults, {left_out} entries left out"
        + "".join(f"; {gap}" for gap in lacks)
    )
    for line in wrong[:SHOWN] or (report.splitlines()[-SHOWN:] if lacks else ()):
        print(f"    {line}")
    return not wrong and not lacks


def main() -> int:
    command, *rest = sys.argv[1:]
    if command == "names":
        print("\n".join(kernels()))
        return 0
    if command == "reached":
        there = {path.stem for path in Path(rest[0]).rglob("*.cubin")}
        missing = set(kernels()) - there
        print(f"{len(there & set(kernels()))} kernels; not reached: {sorted(missing) or 'none'}")
        return 1 if missing else 0
    # Without the wrong kernel's, nobody knows whether anything was looked at.
    right = [is_right(command, Path(name)) for name in rest]
    ok = all(right) and any(WRONG in name for name in rest)
    print(f"{command}: {'nothing found' if ok else 'NOT RIGHT'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
