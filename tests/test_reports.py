"""What `reports.py` makes of compute-sanitizer's reports, and `sanitize.sh` of it all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reports

KERNEL = "hopper_forward_kernel"
ENDED = "7 checked, 0 failed, 0 left, 0 of 7 units not started, 3 s; natten\n"
SUMMARY = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "initcheck": "========= ERROR SUMMARY: 9 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 1 hazards displayed\n",
}


@pytest.fixture(scope="module")
def places() -> tuple[int, int]:
    lines = (reports.KERNELS / "hopper_forward.py").read_text().splitlines()
    (begin,) = (n for n, line in enumerate(lines, 1) if f"def {KERNEL}(" in line)
    (call,) = (n for n, line in enumerate(lines, 1) if "gl.warp_specialize(" in line)
    return begin, call


def race(read: int, write: int, kernel: str = KERNEL, file: str = "hopper_forward.py") -> str:
    return (
        f"========= Error: Race reported between Read access at {kernel}+0x120 in {file}:{read}\n"
        f"=========     and Write access at {kernel}+0x7420 in {file}:{write} [11 hazards]\n"
        "========= \n"
    )


def entry(kernel: str, what: str = "Uninitialized __global__ memory read of size 2 bytes") -> str:
    return (
        f"========= {what}\n"
        f"=========     at {kernel}+0x70\n"
        "=========     by thread (0,0,0) in block (0,0,0)\n"
        "========= \n"
    )


TORCH = "void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor>(int)"


def test_kernels_are_those_that_are_launched() -> None:
    launched: set[str] = set()
    for path in reports.FUNCTIONAL.rglob("*.py"):
        launched |= set(re.findall(r"\b(?:Launch\(|_launch\((?=_))\s*(\w+),", path.read_text()))
    assert launched == set(reports.kernels())
    assert {"forward_kernel", "hopper_gradients_kernel", "bias_table_kernel", "_dot"} <= launched


def test_bytes_that_say_what_to_run_are_explained(places: tuple[int, int]) -> None:
    begin, call = places
    found = reports.races(race(begin, begin) + race(begin, call))
    assert [len(accesses) for accesses in found] == [2, 2]
    assert all(map(reports.is_explained, found))


def test_all_other_races_are_not(places: tuple[int, int]) -> None:
    begin, call = places
    others = [
        race(begin, call + 1),
        race(call, begin),
        race(begin - 60, begin),
        race(begin, begin, file="elsewhere.py"),
        race(begin, begin, kernel="attend"),
        "========= Error: Race reported between Read access at somewhere\n",
        race(begin, begin).partition("\n")[0],
    ]
    for text in others:
        (accesses,) = reports.races(text)
        assert not reports.is_explained(accesses), text


def test_initcheck_is_asked_of_these_kernels_alone() -> None:
    text = entry(TORCH) + entry("forward_kernel") + entry("my_forward_kernels") + entry(TORCH)
    found, left_out = reports.faults("initcheck", "begin\n" + text + SUMMARY["initcheck"])
    assert left_out == 3
    assert [fault.split(" / ")[1] for fault in found] == ["at forward_kernel+0x70"]
    found, left_out = reports.faults("memcheck", text)
    assert (len(found), left_out) == (4, 0)


def verdicts(folder: Path, tool: str, report: str, wrong: str | None) -> int:
    """What the program returns for a report, and one on the wrong kernel."""
    paths = [folder / f"{tool}.0.log"]
    paths[0].write_text(report)
    if wrong is not None:
        paths.append(folder / f"{tool}.wrong.log")
        paths[1].write_text(wrong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["reports.py", tool, *map(str, paths)])
        return reports.main()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_a_verdict_needs_whole_reports(tool: str, tmp_path: Path, places: tuple[int, int]) -> None:
    begin = places[0]
    fine = {"racecheck": race(begin, begin), "initcheck": entry(TORCH), "memcheck": ""}[tool]
    bad = race(1, 2, "forward_kernel") if tool == "racecheck" else entry("forward_kernel")
    whole = fine + ENDED + SUMMARY[tool]
    assert verdicts(tmp_path, tool, whole, bad) == 0
    others = [
        "",
        fine + ENDED,
        fine + SUMMARY[tool],
        bad + ENDED + SUMMARY[tool],
        whole + "========= ERROR SUMMARY: 3 errors were not printed\n",
        whole.replace("0 failed", "1 failed"),
        whole.replace("0 of 7", "2 of 7"),
        whole.replace("7 checked", "0 checked"),
    ]
    for text in others:
        assert verdicts(tmp_path, tool, text, bad) == 1, text
    # Nothing was looked at, or nobody asked.
    assert verdicts(tmp_path, tool, whole, fine) == 1
    assert verdicts(tmp_path, tool, whole, None) == 1


def test_memcheck_counts_what_it_does_not_explain(tmp_path: Path) -> None:
    report = ENDED + "========= ERROR SUMMARY: 1 error\n"
    assert verdicts(tmp_path, "memcheck", report, entry("forward_kernel")) == 1


FAKE = """#!{python}
import sys
arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit({version})
tool = arguments[arguments.index("--tool") + 1]
filters = arguments.count("--kernel-name")
assert filters == (0 if tool == "initcheck" or {version} else {kernels}), arguments
if "tests/wrong_kernel.py" in arguments:
    print({wrong!r}[tool])
else:
    assert "--each" in arguments and ("--unfilled" in arguments) == (tool == "initcheck")
    print("share", arguments[arguments.index("--share") + 1])
    print({right!r}[tool])
"""


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("finds", [None, "racecheck"])
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_tools_run_side_by_side(version: int, finds: str | None, tmp_path: Path) -> None:
    """With a tool that says what it is told to, and checks that do not run."""
    bad = {tool: entry("forward_kernel") for tool in SUMMARY}
    bad["racecheck"] = race(1, 2, "forward_kernel")
    right = {tool: (bad[tool] if tool == finds else "") + ENDED + SUMMARY[tool] for tool in SUMMARY}
    text = FAKE.format(
        python=sys.executable, version=version, kernels=len(reports.kernels()), wrong=bad,
        right=right,
    )  # fmt: skip
    python = f"#!{sys.executable}\nimport os, sys\n" + (
        "if sys.argv[1] in ('tests/run_gpu.py', 'tests/wrong_kernel.py') or "
        "sys.argv[2] == 'reached': sys.exit()\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    for name, script in (("compute-sanitizer", text), ("checking-python", python)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    reported = tmp_path / "reports"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "checking-python",
        "REPORTS": str(reported), "PARTS": "2",
    }  # fmt: skip
    for name in ("TOOLS", "LIMIT"):
        environment.pop(name, None)
    ran = subprocess.run(
        ["bash", "tests/sanitize.sh"], cwd=reports.FUNCTIONAL.parents[1], env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == (finds is not None), ran.stdout + ran.stderr
    for tool in SUMMARY:
        assert f"{tool}: {'NOT RIGHT' if tool == finds else 'nothing found'}" in ran.stdout
        shares = [(reported / f"{tool}.{part}.log").read_text().split()[1] for part in (0, 1)]
        assert shares == ["0/2", "1/2"]
