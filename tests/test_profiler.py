"""The profiler on the CPU, its search, its listings for devices elsewhere, and profile files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

import natten
from natten import cli, devices, profile_file, tuned
from natten.command import Parser
from natten.functional import dispatch
from natten.functional.problem import Config, Problem
from natten.profile_file import Entry, Profile
from natten.profiler import arguments, configurations, measuring, optimize, subjects
from natten.simulator import make_problem

CPU = ["--device", "cpu"]
SMALL = ["-i", "10", "12", "-w", "3", "5", "-n", "2", "-d", "16", "--dtype", "fp32", *CPU]


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(profile_file.VARIABLE, raising=False)
    natten.load_profile(None)
    yield
    natten.load_profile(None)


def request(*words: str) -> arguments.Request:
    parser = Parser()
    arguments.add_arguments(parser)
    return arguments.request_of(parser.parse_args(words))


# The command line


def test_options_become_a_problem() -> None:
    found = request(
        "-i", "8", "12", "-w", "3", "-s", "1", "2", "--dilation", "2", "-b", "3", "-n", "4",
        "--heads-kv", "2", "-d", "32", "--dim-value", "16", "--dtype", "bf16", "--add-kv", "5",
        "--backprop", "--backend", "cpu-fna", "-c", "True", "False", *CPU,
    )  # fmt: skip
    assert found.backend == "cpu"
    assert found.problem == Problem(
        3, (8, 12), (8, 12), 4, 2, 32, 16, (3, 3), (1, 2), (2, 2), (True, False), (8, 12), (0, 0),
        (0, 0), 32**-0.5, num_additional=5, dtype=torch.bfloat16, requires_grad=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "causal"),
    [
        ([], False), (["-c", "False"], False), (["-c", "false"], False), (["-c", "0"], False),
        (["-c"], True), (["-c", "True"], True), (["--causal", "yes"], True),
    ],
)  # fmt: skip
def test_causal_takes_words(words: list[str], causal: bool) -> None:
    assert request("-i", "8", "8", "-w", "3", *words, *CPU).problem.is_causal == (causal,) * 2


def test_types_default_to_what_the_device_computes_in() -> None:
    problem = request("-i", "8", "8", "-w", "3", *CPU).problem
    assert problem.dtype == torch.float32
    words = ["--dry-run", "--device-name", "h100"]
    assert request("-i", "8", "8", "-w", "3", *words).problem.dtype == torch.float16
    assert request("-i", "8", "8", "-w", "3", "--dtype", "bf16", *CPU).problem.dtype == (
        torch.bfloat16
    )


def test_half_precision_has_the_limit_of_its_arithmetic(monkeypatch) -> None:
    """Products of float16 matrices themselves are many times slower on a CPU."""
    multiplied = set()
    mm = torch.mm

    def noted(*factors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        multiplied.update(t.dtype for t in (*factors, out))
        return mm(*factors, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    found = measuring.limits.__wrapped__(torch.device("cpu"), torch.float16)
    assert multiplied == {torch.float32}
    assert found.tflops > 0
    assert found.bandwidth > 0


def test_flags_take_words() -> None:
    assert request(*SMALL).config == Config()
    config = request(*SMALL, "--persistent", "False", "--compile", "--schedule", "pp").config
    assert config == Config(run_persistent_kernel=False, torch_compile=True, kernel_schedule="pp")
    assert not request(*SMALL, "--backprop", "False").problem.requires_grad


def test_the_window_defaults_to_the_whole_input() -> None:
    assert request("-i", "8", "6", *CPU).problem.is_dense


# Measuring


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("forward_kernel", "attention, forward"),
        ("hopper_forward_kernel", "attention, forward"),
        ("hopper_float8_kernel", "attention, forward"),
        ("bias_table_kernel", "table of biases"),
        ("query_gradient_kernel", "gradient of queries"),
        ("key_value_gradient_kernel", "gradients of keys and values"),
        ("hopper_gradients_kernel", "gradients of queries, keys and values"),
        ("statistics_kernel", "row sums for the backward pass"),
        ("merge_kernel", "shares of keys joined"),
        ("longest_kernel", "lengths of queries and keys"),
        ("natten::neighborhood_attention", "attention, forward"),
        ("natten::neighborhood_attention_backward", "attention, backward"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("Memset (Device)", "fill"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
         "std::array<char*, 1ul>>(int)", "fill"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(params)",
         "FlashAttention, forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "cuDNN attention"),
        ("triton_tem_fused_flex_attention_0", "FlexAttention, forward"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>(int)", "copy"),
        ("nvjet_tst_128x64", "nvjet_tst_128x64"),
    ],
)  # fmt: skip
def test_kernels_have_readable_names(kernel: str, name: str) -> None:
    assert measuring.readable(kernel)[0] == name


def test_peak_memory_of_a_call_on_the_cpu() -> None:
    def call() -> None:
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        torch.empty(1 << 18, dtype=torch.uint8)
        del kept

    peak = measuring.peak_bytes(call, torch.device("cpu"))
    assert peak is not None
    assert (1 << 20) + (1 << 18) <= peak < (1 << 20) + (1 << 18) + 4096


def test_recorded_operations_are_those_of_the_call() -> None:
    a = torch.randn(200, 200)
    operations = measuring.record(lambda: torch.softmax(a @ a, -1), torch.device("cpu"), calls=2)
    by_name = {o.name: o for o in operations}
    assert by_name["matrix product"].calls >= 1
    assert by_name["softmax"].calls >= 1
    assert all(o.ms > 0 for o in operations)


def test_profile_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", *SMALL, "--backprop", "--add-kv", "3", "--warmup-steps", "1"]
    assert cli.main([*words, "--baseline", "dense", "cudnn", "flex"]) == 0
    # Captions are folded.
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "10x12 tokens, window 3x5", "attention, forward", "attention, backward", "total ms",
        "dense attention (torch)", "it runs on CUDA devices", "TFLOP/s", "GB/s", "peak MiB",
        "By needed operations, dense attention is",
    ):  # fmt: skip
        assert part in printed


def test_profile_writes_json_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    words = ["profile", *SMALL, "--warmup-steps", "1", "--json", "--csv", str(table)]
    assert cli.main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["subject"]["forward_ms"] > 0
    assert document["subject"]["peak_bytes"] >= 10 * 12 * 2 * 16 * 4
    assert document["tflops"] > 0
    assert document["ideal_speedup"] == pytest.approx(120 / 15)
    assert document["speedup_over_dense"] > 0
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["kind"] for row in rows[:2]] == ["subject", "baseline"]
    assert float(rows[0]["forward_ms"]) == document["subject"]["forward_ms"]


def test_a_dense_baseline_that_would_take_minutes_is_skipped() -> None:
    problem = make_problem((384, 384), 3, heads=8, head_dim=64, dtype=torch.float32)
    query = torch.zeros(1, 1, 1, 1, 1).expand(1, *problem.query_shape, 8, 64)
    tensors = subjects.Tensors(query, query, query, None, None, query)
    found = subjects.measure_other("dense", problem, tensors, 1)
    assert found.failure is not None
    assert "one call would take about" in found.failure


def test_xformers_means_the_kernel_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem((9,), 9, heads=2, heads_kv=1, head_dim=16, dtype=torch.float32)
    tensors = subjects.make_tensors(problem)
    chosen: list[object] = []

    @contextmanager
    def record(backend: object) -> Iterator[None]:
        chosen.append(backend)
        yield

    monkeypatch.setattr(subjects, "sdpa_kernel", record)
    out = subjects._dense_call("xformers", problem, tensors)()
    torch.testing.assert_close(out, subjects._dense_call("dense", problem, tensors)())
    assert chosen == [SDPBackend.EFFICIENT_ATTENTION]
    assert subjects.unavailable("xformers", problem) == "it runs on CUDA devices"
    assert subjects.unavailable("xformers", replace(problem, device=torch.device("cuda"))) is None


# Listings


def test_dry_run_lists_configurations_of_an_absent_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton")
    words = ["profile", "-i", "16", "32", "-w", "7", "--dtype", "bf16", "--dry-run"]
    assert cli.main([*words, "--device-name", "h100", "--max-configs", "3", "--json"]) == 0
    listings = {b["backend"]: b for b in json.loads(capsys.readouterr().out)["backends"]}
    assert "h100 has 9.0" in listings["blackwell"]["reason"]
    for name in ("hopper", "cutlass"):
        assert listings[name]["reason"] is None
        for kind in ("forward", "backward"):
            assert len(listings[name][kind]) == 3
            assert listings[name][kind][0]["ms"] > 0
    assert cli.main([*words, "--device-name", "a100", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["backend"] for row in rows if not row["reason"]} == {"cutlass", "flex"}


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    assert cli.main(["profile", *words, "--dry-run", "--max-configs", "0", "--json"]) == 0
    return {b["backend"]: b for b in json.loads(capsys.readouterr().out)["backends"]}


H100 = ["-i", "16", "32", "-w", "7", "--dtype", "bf16", "--device-name", "h100"]


def test_dry_run_lists_what_has_the_settings_given(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    every = dry_run(capsys, *H100)
    tiles = ["--q-tile", "8", "8", "--kv-tile", "8", "8"]
    for words, matches in (
        (tiles, lambda c: c["q_tile_shape"] == c["kv_tile_shape"] == [8, 8]),
        (["--schedule", "pp"], lambda c: c["kernel_schedule"] == "pp"),
        (
            [*tiles, "--schedule", "pp"],
            lambda c: c["q_tile_shape"] == c["kv_tile_shape"] == [8, 8]
            and c["kernel_schedule"] == "pp",
        ),
    ):  # fmt: skip
        found = dry_run(capsys, *H100, *words)
        assert found["hopper"]["forward"]
        for name in ("hopper", "cutlass", "flex"):
            wanted = [c for c in every[name]["forward"] if matches(c)]
            if wanted:
                pairs = [
                    [(c["q_tile_shape"], c["kv_tile_shape"], c["kernel_schedule"]) for c in listed]
                    for listed in (found[name]["forward"], wanted)
                ]
                assert sorted(pairs[0], key=str) == sorted(pairs[1], key=str)
            else:
                assert found[name]["reason"] == "it has no such tiles or schedule"
    nothing = dry_run(capsys, *H100, "--q-tile", "3", "3", "--kv-tile", "3", "3")
    assert not any(b["forward"] for b in nothing.values())
    listed = every["cutlass"]["backward"][1]
    tiles = ["--backward-q-tile", *map(str, listed["q_tile_shape"])]
    tiles += ["--backward-kv-tile", *map(str, listed["kv_tile_shape"])]
    (one,) = dry_run(capsys, *H100, "--backend", "cutlass-fna", *tiles).values()
    assert [c["q_tile_shape"] for c in one["backward"]] == [listed["q_tile_shape"]]


def test_dry_run_takes_compile_and_persistent(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled FlexAttention is allowed meanwhile, and not afterwards."""
    found = dry_run(capsys, *H100, "--compile", "--persistent", "False")
    assert found["flex"]["reason"] is None
    assert found["flex"]["forward"]
    assert not natten.is_flex_compile_allowed()
    found = dry_run(capsys, *SMALL, "--compile")
    assert "does not return the logsumexp on the CPU" in found["flex"]["reason"]
    assert found["cpu"]["reason"] is None


def test_listed_configurations_are_those_that_the_backend_accepts() -> None:
    pytest.importorskip("triton")
    problem = make_problem((16, 32), 7, device="cuda", head_dim=64, requires_grad=True)
    device = devices.find("h100")
    listing = configurations.list_backend("hopper", problem, device, absent=True)
    backend = dispatch.load("hopper")
    with devices.pretending(device):
        for c in listing.forward[:5]:
            config = Config(c.q_tile_shape, c.kv_tile_shape, kernel_schedule=c.kernel_schedule)
            dispatch.check_tiles(backend, problem, config)
        for c in listing.backward[:5]:
            dispatch.check_tiles(
                backend, problem,
                Config(
                    backward_q_tile_shape=c.q_tile_shape, backward_kv_tile_shape=c.kv_tile_shape
                ),
            )  # fmt: skip
    times = [c.ms for c in listing.forward[1:]]
    assert times == sorted(times)


# The search


def problem_and_tensors(**changes: object) -> tuple[Problem, subjects.Tensors]:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32)
    problem = replace(problem, **changes)  # type: ignore[arg-type]
    return problem, subjects.make_tensors(problem)


def test_search_times_the_default_first_and_finds_the_fastest() -> None:
    problem, tensors = problem_and_tensors()
    told: list[str] = []
    found = optimize.search(
        problem, tensors, None, backend="flex", warmup=1, seconds=20,
        progress=lambda text, share: told.append(text),
    )  # fmt: skip
    assert found.trials[0].config == Config()
    assert len(found.trials) > 2
    assert found.best is not None
    name, config, ms = found.best
    assert name == "flex"
    assert ms == min(t.ms for t in found.trials if t.ms is not None)
    assert config in [t.config for t in found.trials]
    assert any("tiles" in text for text in told)


def test_search_has_time_for_at_least_one_trial_of_each_pass() -> None:
    problem, tensors = problem_and_tensors(requires_grad=True)
    found = optimize.search(problem, tensors, None, warmup=0, seconds=0)
    assert found.forward
    assert found.backward
    assert found.best is not None


def test_an_interrupted_search_keeps_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = optimize._time, []

    def interrupted(*args: object) -> optimize.Trial:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(optimize, "_time", interrupted)
    path = tmp_path / "profile.json"
    words = ["-i", "64", "-w", "9", "-d", "16", "--dtype", "fp32", *CPU, "--backend", "flex-fna"]
    assert cli.main(["profile", *words, "--optimize", "--save", str(path), "--baseline"]) == 0
    assert "interrupted" in capsys.readouterr().out
    (entry,) = profile_file.read_profile(path).entries
    assert (entry.backend, entry.config) == ("flex", Config())


def test_a_trial_that_is_interrupted_counts_if_it_was_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, tensors = problem_and_tensors()
    real, calls = measuring.median_ms, []

    def interrupted(*args: object, **kwargs: object) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "median_ms", interrupted)
    found = optimize.search(problem, tensors, None, backend="flex", warmup=0, seconds=20)
    assert found.interrupted
    assert [t.config for t in found.trials] == [Config()]
    assert found.best is not None


def test_ctrl_c_before_anything_was_timed_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> optimize.Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "_time", interrupted)
    path = tmp_path / "profile.json"
    assert cli.main(["profile", *SMALL, "--optimize", "--save", str(path)]) == 130
    assert capsys.readouterr().err == "natten profile: interrupted: before anything was timed\n"
    assert not path.exists()


def test_the_search_keeps_what_was_asked_for() -> None:
    problem, _ = problem_and_tensors()
    base = Config((64,), (128,))
    assert optimize.candidates(problem, "flex", None, base) == ([base], [base])
    base = Config(backward_q_tile_shape=(64,), backward_kv_tile_shape=(64,))
    forward, backward = optimize.candidates(problem, "flex", None, base)
    assert len(forward) > 2
    assert {c.backward_q_tile_shape for c in forward} == {(64,)}
    assert backward == [base]
    pytest.importorskip("triton")
    problem = make_problem((64, 64), 9, heads=2, head_dim=64, device="cuda", requires_grad=True)
    with devices.pretending(devices.find("h100")):
        base = Config(kernel_schedule="pp")
        forward, backward = optimize.candidates(problem, "hopper", devices.find("h100"), base)
    assert {c.kernel_schedule for c in forward} == {"pp"}
    assert len(forward) > 1 < len(backward)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--q-tile", "2", "--kv-tile", "2"], ["--q-tile and --kv-tile have no effect: cpu-fna"]),
        (
            ["--schedule", "pp", "--persistent", "False", "--compile"],
            ["--schedule has no", "--persistent has no", "--compile has no"],
        ),
        (["--fmha-backend", "reference-fmha"], ["--fmha-backend has no effect: it is for --add"]),
        (["--fmha-backend", "reference-fmha", "--add-kv", "2"], []),
    ],
)
def test_settings_without_effect_are_told(
    capsys: pytest.CaptureFixture[str], words: list[str], texts: list[str]
) -> None:
    pytest.importorskip("numba")
    words = [*SMALL, "--backend", "cpu-fna", "--warmup-steps", "0", *words]
    assert cli.main(["profile", *words, "--baseline"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "rich is not" not in line]
    assert len(notes) == len(texts)
    for note, text in zip(notes, texts):
        assert note.startswith("note: ")
        assert text in note


def test_compiled_flex_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """The command may compile it: what is refused is what FlexAttention itself cannot."""
    words = ["profile", *SMALL, "--backend", "flex-fna", "--compile"]
    assert cli.main(words) == 2
    assert "does not return the logsumexp on the CPU" in capsys.readouterr().err
    assert not natten.is_flex_compile_allowed()


def test_flex_lists_what_it_takes_on_a_device_elsewhere() -> None:
    device = devices.find("h100")
    problem = make_problem((64,), 9, head_dim=16, device="cuda", dtype=torch.float32)
    listing = configurations.list_backend("flex", problem, device, absent=True)
    assert listing.reason is None
    assert listing.forward
    assert configurations.list_backend("cpu", problem, device, absent=True).reason is not None


def test_configurations_that_fail_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = optimize.natten_call

    def sometimes(problem, tensors, backend, config, *rest):
        if config.q_tile_shape == (64,):

            def fail() -> None:
                raise RuntimeError("out of resources:\nshared memory")

            return fail
        return real(problem, tensors, backend, config, *rest)

    monkeypatch.setattr(optimize, "natten_call", sometimes)
    problem, tensors = problem_and_tensors()
    found = optimize.search(problem, tensors, None, backend="flex", warmup=0, seconds=20)
    failures = [t.failure for t in found.trials if t.ms is None]
    assert failures
    assert set(failures) == {"out of resources: shared memory"}
    assert found.best is not None


# Profile files


def saved(path: Path, *entries: Entry, device: str | None = None) -> Path:
    here = devices.driver_name("cpu")
    profile_file.save_profile(path, Profile(device or here, None, entries, "1.0"))
    return path


def entry(backend: str = "reference", config: Config | None = None, **changes: object) -> Entry:
    problem = make_problem((6, 8), 3, heads=2, head_dim=16, dtype=torch.float32)
    return Entry(replace(problem, **changes), backend, config or Config(), 1.5)  # type: ignore[arg-type]


def chosen(batch: int = 1, heads: int = 2, kernel_size: int = 3) -> str:
    tensor = torch.randn(batch, 6, 8, heads, 16)
    return natten.explain(tensor, tensor, tensor, kernel_size).chosen


def test_profiles_survive_the_file(tmp_path: Path) -> None:
    first = entry(config=Config((2, 4), (4, 4), kernel_schedule="pp", run_persistent_kernel=False))
    other = entry(is_causal=(True, False), dtype=torch.bfloat16, num_additional=3)
    path = saved(tmp_path / "p.json", first, other)
    assert profile_file.read_profile(path).entries == (first, other)


def test_a_profile_applies_to_its_shape_class(tmp_path: Path) -> None:
    before = chosen()
    assert natten.load_profile(saved(tmp_path / "p.json", entry())) == 1
    assert chosen() == chosen(batch=3, heads=5) == "reference-fna"
    assert chosen(kernel_size=4) == before
    tensor = torch.randn(1, 6, 8, 2, 16)
    expected = natten.na2d(tensor, tensor, tensor, 3, backend="reference")
    assert natten.na2d(tensor, tensor, tensor, 3).equal(expected)
    natten.load_profile(None)
    assert chosen() == before


def test_lengths_are_a_shape_class_of_their_own(tmp_path: Path) -> None:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32, additional=5)
    natten.load_profile(saved(tmp_path / "p.json", Entry(problem, "flex", Config(), 1.0)))
    assert profile_file.lookup(problem, "flex") is not None
    assert profile_file.lookup(replace(problem, has_lengths=True), "flex") is None


def test_an_explicit_backend_wins_over_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    natten.load_profile(saved(tmp_path / "p.json", entry()))
    problem = entry().problem
    assert dispatch.resolve(problem, Config(), "flex").name == "flex"
    assert dispatch.resolve(problem, Config()).name == "reference"


def test_lookup_gives_the_tiles_of_the_backend(tmp_path: Path) -> None:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32)
    config = Config((128,), (64,))
    assert profile_file.lookup(problem, "flex") is None
    natten.load_profile(saved(tmp_path / "p.json", Entry(problem, "flex", config, 1.0)))
    assert profile_file.lookup(problem, "flex") == config
    assert profile_file.lookup(replace(problem, batch=7, requires_grad=True), "flex") == config
    assert profile_file.lookup(problem, "cpu") is None
    assert profile_file.lookup(replace(problem, stride=(2,)), "flex") is None


def test_calls_use_the_tiles_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32)
    natten.load_profile(
        saved(tmp_path / "p.json", Entry(problem, "flex", Config((64,), (128,)), 1.0))
    )
    backend, seen = dispatch.load("flex"), []
    real = backend.forward

    def forward(problem: Problem, config: Config, *tensors: object) -> object:
        seen.append(config)
        return real(problem, config, *tensors)

    monkeypatch.setattr(backend, "forward", forward)
    tensor = torch.randn(1, 64, 2, 16)
    natten.na1d(tensor, tensor, tensor, 9)
    natten.na1d(tensor, tensor, tensor, 9, backend="flex-fna")
    own = dict(backend="flex-fna", q_tile_shape=(64,), kv_tile_shape=(64,))
    natten.na1d(tensor, tensor, tensor, 9, **own)
    assert seen == [Config((64,), (128,))] * 2 + [Config((64,), (64,))]


def test_knobs_of_the_caller_win_over_those_of_a_profile(tmp_path: Path) -> None:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32)
    config = Config((128,), (64,), run_persistent_kernel=False)
    assert profile_file.with_profile(Config(), problem, "flex") == Config()
    natten.load_profile(saved(tmp_path / "p.json", Entry(problem, "flex", config, 1.0)))
    assert profile_file.with_profile(Config(), problem, "flex") == config
    own = Config((64,), (64,))
    assert profile_file.with_profile(own, problem, "flex") == own
    own = Config(backward_q_tile_shape=(64,), backward_kv_tile_shape=(32,))
    both = replace(config, backward_q_tile_shape=(64,), backward_kv_tile_shape=(32,))
    assert profile_file.with_profile(own, problem, "flex") == both


def test_the_environment_variable_loads_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(profile_file.VARIABLE, str(saved(tmp_path / "p.json", entry())))
    monkeypatch.setattr(tuned, "entries", None)
    dispatch.forget()
    assert chosen() == "reference-fna"
    monkeypatch.setenv(profile_file.VARIABLE, str(tmp_path / "nowhere.json"))
    monkeypatch.setattr(tuned, "entries", None)
    dispatch.forget()
    with pytest.raises(ValueError, match=r"NATTEN_PROFILE.*nowhere\.json"):
        chosen()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda text: text[:100], "is not a usable natten profile"),
        (lambda text: "[]", "is not a usable natten profile"),
        (lambda text: "\x00\x01", "is not a usable natten profile"),
        (lambda text: text.replace('"natten profile"', '"shopping list"'), "'shopping list'"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "version is 99"),
        (lambda text: text.replace('"entries"', '"entrees"'), "'entries' is missing"),
        (lambda text: text.replace('"reference"', '"abacus"'), "no backend is called 'abacus'"),
        (lambda text: text.replace('"float32"', '"float3"'), "not a usable natten profile"),
        (lambda text: text.replace('"ms": 1.5', '"ms": NaN'), "ms must be a positive number"),
        (lambda text: text.replace('"ms": 1.5', '"ms": "1.5"'), "ms must be a positive number"),
        (lambda text: text.replace('"batch": 1', '"batch": -1'), "batch must be an int"),
        (lambda text: text.replace('"heads": 2', '"heads": "2"'), "heads must be an int"),
        (lambda text: text.replace('"has_rpb": false', '"has_rpb": 0'), "has_rpb must be a bool"),
        (
            lambda text: text.replace('"has_lengths": false', '"has_lengths": 0'),
            "has_lengths must be a bool",
        ),
        (lambda text: text.replace("     3,\n", "     9,\n"), r"kernel_size \* dilation must be"),
        (
            lambda text: text.replace('"kernel_schedule": null', '"kernel_schedule": "x"'),
            "kernel_schedule must be",
        ),
        (lambda text: text.replace('"torch_compile": false', '"turbo": true'), "is missing"),
        (lambda text: text.replace('"capability": null', '"capability": [9]'), "capability must"),
    ],
)
def test_damaged_profiles_are_refused(tmp_path: Path, change, text: str) -> None:
    path = saved(tmp_path / "p.json", entry())
    path.write_text(change(path.read_text()))
    before = chosen()
    with pytest.raises(ValueError, match=text):
        natten.load_profile(path)
    assert chosen() == before


def test_profiles_of_other_devices_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.json", entry(), device="Abacus 9000")
    with pytest.raises(ValueError, match="of another device: it was measured on 'Abacus 9000'"):
        natten.load_profile(path)


def test_profiles_with_tiles_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    problem = make_problem((64,), 9, heads=2, head_dim=16, dtype=torch.float32)
    path = saved(tmp_path / "p.json", Entry(problem, "flex", Config((3,), (5,)), 1.0))
    with pytest.raises(ValueError, match="must be a pair that backend 'flex' lists"):
        natten.load_profile(path)


def test_optimize_writes_a_profile_that_applies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    words = ["profile", *SMALL, "--optimize", "--optimize-seconds", "1", "--save", str(path)]
    assert cli.main([*words, "--backend", "reference", "--baseline"]) == 0
    printed = capsys.readouterr().out
    assert "fastest settings" in printed
    assert str(path) in printed.replace("\n", "")
    assert natten.load_profile(path) == 1
    tensor = torch.randn(1, 10, 12, 2, 16)
    assert natten.explain(tensor, tensor, tensor, (3, 5)).chosen == "reference-fna"
    # A second search adds to the file, one of another device does not.
    words[1:7] = ["-i", "8", "8"]
    assert cli.main([*words, "-w", "3", "--backend", "reference", "--baseline"]) == 0
    assert natten.load_profile(path) == 2
    saved(path, entry(), device="Abacus 9000")
    assert cli.main([*words, "--backend", "reference"]) == 2
    assert "is a profile of 'Abacus 9000'" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu
def test_gpu_profile_names_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-i", "64", "64", "-w", "13", "-b", "4", "-n", "8", "-d", "64", "--dtype", "bf16"]
    baselines = ["--baseline", "dense", "cudnn", "fav2", "flex", "xformers"]
    assert cli.main(["profile", *words, "--backprop", "--json", *baselines]) == 0
    document = json.loads(capsys.readouterr().out)
    names = {o["name"]: o for o in document["subject"]["operations"]}
    assert names["attention, forward"]["kind"] == "natten"
    assert any(name.startswith("gradient") for name in names)
    recorded = sum(o["ms"] for o in document["subject"]["operations"])
    assert 0.3 < recorded / document["subject"]["total_ms"] < 1.5
    assert document["subject"]["peak_bytes"] > 4 * 64 * 64 * 8 * 64 * 2
    failures = {b["name"]: b["failure"] for b in document["baselines"] if b["failure"]}
    assert set(failures) <= {"dense attention, xFormers", "dense attention, cuDNN"}
    assert document["limits"]["tflops"] > 1


@pytest.mark.gpu
def test_gpu_search_is_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    words = ["-i", "64", "64", "-w", "13", "-n", "8", "-d", "64", "--dtype", "bf16", "--backprop"]
    search = ["--optimize", "--optimize-seconds", "30", "--save", str(path), "--baseline"]
    assert cli.main(["profile", *words, *search]) == 0
    (entry,) = profile_file.read_profile(path).entries
    assert natten.load_profile(path) == 1
    assert profile_file.lookup(entry.problem, entry.backend) == entry.config
    tensors = subjects.make_tensors(entry.problem)
    out = subjects.natten_call(entry.problem, tensors, "", Config())()
    exact = natten.na2d(
        tensors.query.double(), tensors.key.double(), tensors.value.double(), 13,
        backend="reference",
    )  # fmt: skip
    assert (out.double() - exact).abs().max() < 2e-2


@pytest.mark.gpu
def test_gpu_memory_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "-i", "4096", "4096", "-w", "3", "-n", "512", "--device", "cuda"]
    assert cli.main(words) == 2
    assert "GiB free" in capsys.readouterr().err
