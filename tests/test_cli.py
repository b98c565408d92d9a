"""The command `natten`: every subcommand, and one line and exit code 2 for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natten
from natten import cli, info, tables

SMALL = ["-i", "10", "12", "-w", "3", "5", "-n", "2", "-d", "16", "--dtype", "fp32"]


def failure_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The text for a command line that is refused."""
    try:
        code = cli.main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    text = capsys.readouterr().err
    assert code == 2
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fly",), "invalid choice: 'fly'"),
        (("profile", "-w", "3"), "arguments are required: -i"),
        (("profile", "-i", "8", "8", "-w", "9"), "kernel_size * dilation must be at most"),
        (("profile", "-i", "8", "8", "-w", "3", "3", "3"), "--window-size must have one"),
        (("profile", "-i", "8", "8", "-w", "3", "-c", "maybe"), "expected True or False"),
        (("profile", *SMALL, "--backend", "nope"), "cutlass-fna, cpu-fna"),
        (("profile", *SMALL, "--fmha-backend", "nope"), "cutlass-fmha"),
        (("profile", *SMALL, "--heads-kv", "3"), "heads must be a multiple of heads_kv"),
        (("profile", *SMALL, "--dry-run", "--optimize"), "exclude each other"),
        (("profile", *SMALL, "--device", "sun"), "--device must be cpu or cuda, got 'sun'"),
        (("profile", *SMALL, "--device", "cuda:77"), "CUDA devices here"),
        (("profile", *SMALL, "--device", "cpu", "--backend", "cudnn"), "runs on CUDA devices"),
        (("profile", *SMALL, "--device", "cpu", "--backend", "hopper-fna"), "cannot run"),
        (("profile", *SMALL, "--device-name", "h100"), "--device-name is for --dry-run"),
        (("profile", *SMALL, "--dry-run", "--device-name", "abacus"), "must be one of v100, t4"),
        (("profile", *SMALL, "--q-tile", "2", "2"), "must be given together"),
        (("profile", *SMALL, "--warmup-steps", "-1"), "--warmup-steps must not be negative"),
        (("profile", *SMALL, "--json", "--csv"), "cannot both go to standard output"),
        (("profile", "-i", "8", "-w", "3", "--dtype", "e4m3"), "no backend computes e4m3"),
        (("profile", "-i", "100000", "100000", "-w", "3", "--device", "cpu"), "GiB free"),
        (("simulate", "-i", "8", "-w", "9"), "kernel_size * dilation must be at most"),
        (("simulate", "-i", "8", "-w", "3", "--device-name", "x"), "device name must be one of"),
        (("explain", "-i", "8", "8", "8", "8", "-w", "3"), "1, 2 or 3 axes"),
        (("explain", *SMALL, "--circular", "--causal"), "causal or circular but not both"),
        (("explain", *SMALL, "--rpb", "--causal"), "not for causal axes"),
        (("explain", *SMALL, "--lengths"), "--lengths is of the additional keys of --add-kv"),
        (("explain", *SMALL, "--softcap", "-1"), "softcap"),
        (("simulate", *SMALL, "--upsampling", "2", "2", "2"), "--upsampling must have one"),
        (("simulate", *SMALL, "--upsampling", "2", "--dilation", "2"), "dilation"),
        (("simulate", *SMALL, "-w", "5", "-s", "1", "-s", "1", "-s", "1"), "got 2, 3, 1"),
        (("simulate", *SMALL, "-w", "5", "-w", "5"), "3 windows for 2 and 2 heads"),
        (("simulate", *SMALL, "-w", "5", "--plot", "x.png"), "--plot is of one window"),
        (("profile", *SMALL, "-w", "5", "--device", "cpu"), "give --window-size, --stride and"),
        (("profile", *SMALL, "--optimize", "--optimize-seconds", "nan"), "must not be negative"),
        (("profile", *SMALL, "--save", "x.json"), "--save is for --optimize"),
        (("profile", *SMALL, "--optimize", "--save", "/nowhere/x"), "there is no folder /nowhere"),
        (("profile", *SMALL, "--optimize", "--compile"), "does not search what --compile"),
        (("profile", *SMALL, "--json", "/nowhere/x"), "--json /nowhere/x: there is no folder"),
        (("profile", *SMALL, "--csv", "/"), "--csv /: that is a folder"),
        (("profile", *SMALL, "--device", "cpu", "--backend", "xformers"), "runs on CUDA devices"),
        (("profile", *SMALL, "--backend", "fav2", "--schedule", "pp"), "fav2 has no tiles"),
        (("demo", "--fly"), "natten demo: error: unrecognized arguments: --fly"),
        (("demo", "--height", "0"), "--height must be at least 1, got 0"),
        (("demo", "--height", "20"), "too few for the setting 25x9"),
        (("demo", "--output", "/nowhere/x.png"), "there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    assert text in failure_of(capsys, *words)


def test_running_out_of_memory_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from natten.profiler import run

    def fail(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB.")

    monkeypatch.setattr(run, "_profile", fail)
    line = failure_of(capsys, "profile", *SMALL, "--device", "cpu")
    assert line == "natten profile: error: CUDA out of memory. Tried to allocate 1 GiB."


def test_without_rich_tables_are_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rich", "rich.console", "rich.table", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["profile", *SMALL, "--device", "cpu", "--warmup-steps", "1", "--backprop"]
    assert cli.main([*words, "--baseline", "dense", "cudnn"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "note: rich is not installed: plain tables, and no progress bars\n"
    for part in (
        "attention, backward", "dense attention (torch)", "TFLOP/s", "dense attention, cuDNN: it",
    ):  # fmt: skip
        assert part in captured.out
    assert cli.main(["profile", *SMALL, "--dry-run", "--device", "cpu"]) == 0
    assert "cpu-fna: runs it" in capsys.readouterr().out


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """What torch writes when memory is short, and what files may be called."""
    pytest.importorskip("rich")
    failure, file = "[enforce fail at alloc_cpu.cpp:124]", "out[/tmp] :x: [ema].pt"
    table = tables.Table("found", ("file", "what"), 2, caption=failure)
    table.add(file, failure)
    out = tables.console()
    tables.show(table, out)
    tables.show(file, out)
    # The caption is folded.
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(file) == printed.count("[enforce fail at") == 2


def test_a_missing_package_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    line = failure_of(capsys, "simulate", *SMALL, "--plot", str(tmp_path / "x.png"))
    assert line.endswith("error: matplotlib is not installed: pip install matplotlib")


def test_no_command_is_a_question_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("profile", "simulate", "explain", "info", "demo"))


def test_an_interrupted_import_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
import natten_command
sys.exit(natten_command.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("has_rich", [True, False], ids=["rich", "plain"])
def test_tables_keep_to_the_width_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, has_rich: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COLUMNS", str(width))
    if not has_rich:
        for name in ("rich", "rich.console", "rich.table", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)
    for words in (
        ["simulate", *SMALL, "--advise"],
        ["explain", *SMALL, "--device", "cpu"],
        ["profile", *SMALL, "--dry-run", "--device-name", "h100", "--max-configs", "3"],
        ["profile", *SMALL, "--device", "cpu", "--warmup-steps", "1", "--baseline"],
    ):
        assert cli.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width, max(lines, key=len)


def test_columns_that_do_not_fit_go_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "14")
    found = tables.table(("name", "one", "two", "three"), [("a", 1, 22, 333)])
    assert found.split("\n") == [
        "name  one  two", "----  ---  ---", "a       1   22", "",
        "name  three", "----  -----", "a       333",
    ]  # fmt: skip


def test_the_module_reports_under_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "natten.profiler", "-i", "8", "-w", "9"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("python -m natten.profiler: error: kernel_size")
    assert "Traceback" not in run.stderr


def test_explain_says_who_would_run_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *SMALL, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "> " in printed
    assert "reference-fna" in printed


def test_explain_knows_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--circular", "True", "False", "--softcap", "5", "--sink", "--key-mask", "--rpb"]
    more += ["--query-mask", "--add-kv", "3", "--lengths", "-w", "30", "-1", "--clip-window"]
    assert cli.main(["explain", *SMALL, *more, "--device", "cpu"]) == 0
    of_groups = capsys.readouterr().out.split("Heads of group 2 of 2:")
    for text, size in zip(of_groups, ("(3, 5)", "(10, 12)"), strict=True):
        for part in (
            f"kernel_size={size}", "is_circular=(True, False)", "softcap=5", "a sink",
            "lengths of these", "a mask of keys", "a mask of queries", "heads 1/1", "> ",
        ):  # fmt: skip
            assert part in text


def test_simulate_counts_the_windows_of_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    words = ["-w", "11", "3", "--circular", "False", "True", "--upsampling", "2", "--clip-window"]
    assert cli.main(["simulate", *SMALL, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pairs = (3 * 5, 10 * 3)  # of a query, in each of the groups
    flops = [2 * 2 * 16 * (20 * 24) * count for count in pairs]
    assert [group["needed_flops"] for group in found] == flops
    same = natten.simulate(
        (10, 12), (11, 3), is_circular=(False, True), upsampling=2, clip_window=True, head_dim=16,
        dtype=torch.float32,
    )  # fmt: skip
    assert found[1] == json.loads(json.dumps(same.as_dict()))


def test_profile_times_rings_and_upsampling(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--circular", "False", "True", "--upsampling", "2", "1", "--clip-window", "-w", "11"]
    words = ["-i", "10", "12", "-n", "2", "-d", "16", "--device", "cpu", *words, "--backprop"]
    assert cli.main(["profile", *words, "--warmup-steps", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    problem = document["problem"]
    assert problem["kernel_size"] == [10, 11]
    assert problem["is_circular"] == [False, True]
    assert problem["upsampling"] == [2, 1]
    assert problem["shape"] == [20, 12]


def test_simulate_prints_a_table_or_json_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    assert cli.main(["simulate", *SMALL, "--advise"]) == 0
    printed = capsys.readouterr().out
    assert "key and value gradient" in printed
    assert "windows near 3x5" in printed
    plot = tmp_path / "advice.png"
    words = ["--json", "--plot", str(plot), "--q-tile", "4", "--kv-tile", "4", "-c", "False"]
    assert cli.main(["simulate", *SMALL, *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passes"][0]["q_tile_shape"] == [4, 4]
    assert document["is_causal"] == [False, False]
    assert document["advice"]["strides"]
    assert plot.stat().st_size > 1000


def test_info_can_be_pasted_and_checks_the_backends() -> None:
    text, failed = info.info()
    assert not failed
    for part in (
        natten.__version__,
        torch.__version__.partition("+")[0],
        "caches",
        "reference-fna",
    ):
        assert part in text
    assert "ok, differs from the reference by" in text


def test_info_tells_of_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    right = info.neighborhood_attention_generic

    def wrong(*args: object, **kwargs: object) -> object:
        out = right(*args, **kwargs)  # type: ignore[arg-type]
        return out if kwargs["backend"] == "reference" else out + 1  # type: ignore[operator]

    monkeypatch.setattr(info, "neighborhood_attention_generic", wrong)
    text, failed = info.info()
    assert failed
    assert "WRONG, differs" in text


def test_info_tells_of_a_profile_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from natten import profile_file, tuned

    path = tmp_path / "profile.json"
    path.write_text("{}")
    monkeypatch.setenv(profile_file.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "entries", None)
    assert cli.main(["info"]) == 0
    assert "REFUSED" in capsys.readouterr().out
    # For everything else the variable counts as before.
    assert cli.main(["explain", *SMALL, "--device", "cpu"]) == 2


def test_demo_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from natten import demo

    given = []
    monkeypatch.setattr(demo, "main", lambda words, prog: given.extend(words) or 0)
    assert cli.main(["demo", "--height", "20"]) == 0
    assert given == ["--height", "20"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"natten {natten.__version__}"


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "natten.cli", "simulate", "-i", "64", "64", "-w", "7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait() == 0
    assert told == b""
