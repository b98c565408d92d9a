"""What programs for NATTEN 0.20 and 0.21 import, call and compare with."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natten
from natten.functional import dispatch
from natten.types import KernelSchedule
from natten.utils import checks, log

ROOT = Path(__file__).resolve().parents[1]

NAMES = {
    "natten.attn_merge": ["merge_attentions"],
    "natten.backends": [
        "choose_backend",
        "choose_fmha_backend",
        "get_bwd_configs_for_cutlass_fna",
        "get_compatible_backends",
        "get_compatible_fmha_backends",
        "get_configs_for_cutlass_hopper_fna",
        "get_configs_for_flex_fmha",
    ],
    "natten.context": ["MemoryUsagePreference", "NattenContext", "set_memory_usage_preference"],
    "natten.functional": ["attention", "merge_attentions", "na1d", "na2d", "na3d"],
    "natten.modules": [
        "NeighborhoodAttention1D",
        "NeighborhoodAttention2D",
        "NeighborhoodAttention3D",
        "NeighborhoodAttentionGeneric",
    ],
    "natten.types": [
        "CausalArg2DTypeOrDed",
        "Dimension3DTypeOrDed",
        "DimensionType",
        "KernelSchedule",
        "NoneType",
    ],
    "natten.utils": ["check_all_args", "checks", "get_device_cc", "log"],
    "natten.utils.checks": [
        "check_all_args",
        "check_args_against_input",
        "check_causal_arg",
        "check_dilation_arg",
        "check_input_size_arg",
        "check_kernel_schedule",
        "check_kernel_size_arg",
        "check_stride_arg",
    ],
    "natten.utils.log": ["LogLevel", "NattenLogger", "get_logger"],
    "natten.utils.varlen": ["generate_varlen_parameters"],
    "natten.version": ["__version__"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_programs_import_them(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_names_are_the_same_objects():
    from natten import attn_merge, backends, modules, nn, version

    assert attn_merge.merge_attentions is natten.merge_attentions
    assert modules.NeighborhoodAttention2D is nn.NeighborhoodAttention2D
    assert version.__version__ == natten.__version__
    assert backends.get_configs_for_flex_fna is natten.get_configs_for_flex_fna


SCHEDULES = {
    "NonPersistent": ("non", 0),
    "WarpSpecializedCooperative": ("coop", 1),
    "WarpSpecializedPingpong": ("pp", 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_kernel_schedules(name):
    text, number = SCHEDULES[name]
    member = KernelSchedule[name]
    assert member.value == number
    assert member == text
    assert hash(member) == hash(text)
    assert str(member) == f"{member}" == text
    assert repr(member) == f"KernelSchedule.{name}"
    for same in (KernelSchedule(number), KernelSchedule(text), KernelSchedule(member)):
        assert same is member
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert checks.check_kernel_schedule(text) is checks.check_kernel_schedule(member) is member
    for given in (text, member):
        out = natten.na1d(*[torch.ones(1, 9, 1, 8)] * 3, 3, kernel_schedule=given)
        assert out.eq(1).all()


@pytest.mark.parametrize("bad", [0, 2, True, "other", b"pp", ["pp"]])
def test_other_schedules_are_refused(bad):
    q = torch.randn(1, 9, 1, 8)
    with pytest.raises(ValueError, match=r"kernel_schedule must be None or one of \['non', 'coop'"):
        natten.na1d(q, q, q, 3, kernel_schedule=bad)
    assert checks.check_kernel_schedule(None) is None


def test_checks_of_arguments():
    assert checks.check_all_args(2, 7, None, (1, 2), None) == (
        (7, 7), (1, 1), (1, 2), (False, False),
    )  # fmt: skip
    assert checks.check_all_args(3, [3, 5, 7], 2, True) == (
        (3, 5, 7), (2, 2, 2), (True, True, True),
    )  # fmt: skip
    assert checks.check_input_size_arg(2, torch.Size([4, 5])) == (4, 5)
    assert checks.check_kernel_size_arg(1, 7) == (7,)
    assert checks.check_stride_arg(2, None) == checks.check_dilation_arg(2, None) == (1, 1)
    assert checks.check_causal_arg(2, [True, False]) == (True, False)
    for function, value, name in (
        (checks.check_input_size_arg, "8", "input_size"),
        (checks.check_kernel_size_arg, (3, 3, 3), "kernel_size"),
        (checks.check_stride_arg, 0, "stride"),
        (checks.check_dilation_arg, 1.5, "dilation"),
        (checks.check_causal_arg, 1, "is_causal"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            function(2, value)
    grid = torch.empty(1, 8, 9, 2, 4)
    checks.check_args_against_input(grid, (8, 3), (1, 1), (1, 3), (False, True))
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must be at most"):
        checks.check_args_against_input(grid, (8, 3), (1, 1), (1, 4), (False, True))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_generic_module(rank):
    from natten.modules import NeighborhoodAttentionGeneric

    own = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D,
           natten.NeighborhoodAttention3D)[rank - 1]  # fmt: skip
    arguments = dict(embed_dim=16, num_heads=2, kernel_size=3, dilation=2, is_causal=True)
    module = NeighborhoodAttentionGeneric(na_dim=rank, **arguments)
    same = own(**arguments)
    same.load_state_dict(module.state_dict())
    x = torch.randn(1, *(6, 7, 8)[:rank], 16)
    assert module(x).equal(same(x))
    assert NeighborhoodAttentionGeneric(rank, 16, 2, 3).rank == rank
    with pytest.raises(ValueError, match="na_dim"):
        NeighborhoodAttentionGeneric(4, 16, 2, 3)


def test_compatible_backends():
    from natten.backends import (
        choose_backend,
        choose_fmha_backend,
        get_compatible_backends,
        get_compatible_fmha_backends,
    )

    grid = [torch.randn(1, 6, 7, 2, 16) for _ in range(3)]
    assert get_compatible_backends(*grid, torch_compile=False) == [
        "cpu-fna", "flex-fna", "reference-fna",
    ]  # fmt: skip
    # What it names runs, and backend=None is the first that is chosen unasked.
    for name in get_compatible_backends(*grid, False):
        torch.testing.assert_close(
            natten.na2d(*grid, 3, backend=name), natten.na2d(*grid, 3), atol=1e-5, rtol=1e-5
        )
    assert choose_backend(*grid, torch_compile=False) == "cpu-fna"
    # Compiled FlexAttention has to be allowed, and gradients rule it out here.
    assert "flex-fna" not in get_compatible_backends(*grid, torch_compile=True)
    assert "flex-fna" not in get_compatible_backends(grid[0].requires_grad_(), *grid[1:], False)
    with torch.no_grad():
        assert "flex-fna" in get_compatible_backends(*grid, False)
    rows = [torch.randn(1, 9, 2, 16) for _ in range(3)]
    for causal in (False, True):
        for varlen in (False, True):
            names = get_compatible_fmha_backends(
                *rows, is_causal=causal, is_varlen=varlen, torch_compile=False
            )
            assert names[0] == "cpu-fmha" == choose_fmha_backend(*rows, causal, varlen, False)
            for name in names:
                packed = {}
                if varlen:
                    lengths = torch.tensor([4, 5], dtype=torch.int32)
                    packed = {"seqlens_Q": lengths, "seqlens_KV": lengths}
                got = natten.attention(*rows, is_causal=causal, backend=name, **packed)
                wanted = natten.attention(*rows, is_causal=causal, **packed)
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="query must have 4 dimensions"):
        get_compatible_fmha_backends(*grid, False, False, False)
    with pytest.raises(ValueError, match="torch_compile must be a bool"):
        get_compatible_backends(*grid, 1)
    with pytest.raises(ValueError, match=r"query must be a torch\.Tensor"):
        get_compatible_backends(None, None, None, False)


# --- messages


@pytest.fixture
def environment(monkeypatch):
    def set_to(level, pipe):
        for name, value in (("NATTEN_LOG_LEVEL", level), ("NATTEN_LOG_PIPE", pipe)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_to


def test_log_pipes(environment, tmp_path):
    path = str(tmp_path / "natten.log")
    for pipe, expected in (
        (None, sys.stdout), ("stdout", sys.stdout), ("STDERR", sys.stderr), ("/dev/null", None),
        (path, path), ("", sys.stdout),
    ):  # fmt: skip
        environment(None, pipe)
        assert log._get_log_pipe() is expected or log._get_log_pipe() == expected
    environment(None, str(tmp_path / "missing" / "natten.log"))
    with pytest.warns(UserWarning, match="cannot be written to, and nothing is logged"):
        logger = log.NattenLogger("test.nowhere")
    assert isinstance(logger.handler, logging.NullHandler)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", "diwe"), ("INFO", "iwe"), (None, "iwe"), ("warning", "we"), ("Error", "e")],
)
def test_log_levels(environment, tmp_path, level, expected):
    path = tmp_path / "natten.log"
    environment(level, str(path))
    logger = log.NattenLogger(f"test.level.{level}")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("<%s>", name[0])
    logger.handler.close()
    written = path.read_text()
    assert "".join(c for c in "diwe" if f"<{c}>" in written) == expected
    assert f"[[ test.level.{level} ]]" in written


def test_unknown_levels_are_told(environment):
    environment("loud", "/dev/null")
    with pytest.warns(UserWarning, match="NATTEN_LOG_LEVEL must be one of DEBUG, .*, got 'loud'"):
        log.NattenLogger("test.loud")


def test_decisions_are_logged_once(caplog):
    dispatch.forget()
    q = torch.randn(1, 7, 9, 2, 8)
    with caplog.at_level(logging.DEBUG, logger="natten"):
        for _ in range(3):
            natten.na2d(q, q, q, 3)
        messages = [r.getMessage() for r in caplog.records if "runs calls like" in r.getMessage()]
        assert len(messages) == 1
        assert messages[0].startswith("cpu runs calls like this one, no tiles to choose")
        assert "kernel_size=(3, 3)" in messages[0]
        assert "not cutlass: it runs on cuda tensors" in messages[0]
        rows = q[:, 0]
        natten.na1d(
            rows, rows, rows, 3, backend="flex-fna", q_tile_shape=(64,), kv_tile_shape=(128,)
        )
        assert "flex runs calls like this one, tiles (64,)/(128,), as asked for" in caplog.text
        natten.na1d(rows, rows, rows, 3, backend="flex-fna")
        assert "flex runs calls like this one, tiles (128,)/(128,) by default" in caplog.text
    dispatch.forget()


def test_nothing_is_said_or_done_otherwise(monkeypatch):
    from natten.functional import messages

    monkeypatch.setattr(messages, "report", lambda *_: pytest.fail("nobody listens"))
    dispatch.forget()
    q = torch.randn(1, 7, 9, 2, 8)
    natten.na2d(q, q, q, 3)


PROGRAM = """
import time, torch, natten
q = torch.randn(1, 7, 9, 2, 8, requires_grad=True)
start = time.perf_counter()
natten.na2d(q, q, q, 3).sum().backward()
seconds = time.perf_counter() - start
natten.na2d(q, q, q, 3)
print(f"end of the program, {seconds} s")
"""
END = re.compile(r"end of the program, (.*) s\n")


def run_program(**environment: str) -> tuple[str, str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith("NATTEN_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=known | environment, cwd=ROOT, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr


def test_messages_and_cache_of_a_program(tmp_path):
    """With a cache that holds nothing, and with what the first run left there."""
    cache = tmp_path / "cache"
    environment = {"NUMBA_CACHE_DIR": str(cache)}
    path = tmp_path / "natten.log"
    out, _ = run_program(NATTEN_LOG_LEVEL="DEBUG", NATTEN_LOG_PIPE=str(path), **environment)
    first = END.fullmatch(out)
    assert first, out
    written = path.read_text()
    assert written.count("cpu runs calls like this one") == 1
    assert written.count("numba compiled forward_loop, which was not in its cache") == 1
    stored = {file: file.stat().st_mtime_ns for file in cache.rglob("*.nbc")}
    assert len(stored) == 3
    out, _ = run_program(NATTEN_LOG_LEVEL="DEBUG", **environment)
    assert out.count("cpu runs calls like this one") == 1
    assert "numba compiled" not in out
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.nbc")} == stored
    out, err = run_program(**environment)
    second = END.fullmatch(out)
    assert second, out
    assert "natten" not in err
    assert float(second[1]) < float(first[1]) / 2
