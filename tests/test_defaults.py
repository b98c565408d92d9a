"""torch's defaults, the working directory and the locale are the caller's, and results the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import natten
from natten import devices, info, profile_file, token_permute, viz
from natten.functional.problem import Config
from natten.profiler import configurations, subjects
from natten.simulator import make_problem, simulate

Q = torch.randn(1, 6, 7, 2, 16)
ROWS = Q.flatten(1, 2)
FIRST = Q.movedim(3, 1)
OUTPUTS, LSES = [torch.randn(2, 3, 2, 4)] * 2, [torch.randn(2, 3, 2)] * 2
LENGTHS = torch.tensor([20, 22], dtype=torch.int32)
PROBLEM = make_problem((6, 7), 3, heads=2, head_dim=16, dtype=torch.float32)

CALLS: dict[str, Callable[[], Any]] = {
    "na2d": lambda: natten.na2d(Q, Q, Q, 3, return_lse=True),
    "attention": lambda: natten.attention(ROWS, ROWS, ROWS, is_causal=True),
    "varlen": lambda: natten.attention(ROWS, ROWS, ROWS, seqlens_Q=LENGTHS, seqlens_KV=LENGTHS),
    "varlen-parameters": lambda: natten.utils.varlen.generate_varlen_parameters(
        ROWS, ROWS, ROWS, LENGTHS, LENGTHS
    ),
    "merge": lambda: natten.merge_attentions(OUTPUTS, LSES, return_lse=True),
    "qk": lambda: natten.na2d_qk(FIRST, FIRST, 3, rpb=torch.ones(2, 5, 5, device="cpu")),
    "experimental": lambda: natten.experimental.na2d(Q, Q, Q, 3, 2),
    "permute": lambda: token_permute.token_permute_operation(Q, (2, 4))[0],
    "flex": lambda: natten.na2d(
        Q, Q, Q, 3, backend="flex-fna", q_tile_shape=(4, 16), kv_tile_shape=(8, 8)
    ),
    "configs": lambda: natten.get_configs_for_flex_fna(Q, Q, Q),
    "compatible": lambda: natten.backends.get_compatible_backends(Q, Q, Q),
    "explain": lambda: str(natten.explain(Q, Q, Q, 3)),
    "simulate": lambda: str(simulate((64, 64), 7, head_dim=64, device="h100")),
    "attended": lambda: viz.attended_tokens((2, 3), (6, 7), 3),
    "weights": lambda: viz.attention_weights(Q, Q, (2, 3), 3),
    "neighborhoods": lambda: viz._neighborhoods([(2, 3)], (6, 7), (3, 1, 1, False)),
    "tiles": lambda: viz._tile_states(natten.window.Axis(17, 5, 1, 1, False), 4, 8),
    "info": lambda: info._check("cpu", torch.device("cpu"), torch.float32),
    "listings": lambda: [
        replace(b, reason=None) for b in configurations.list_all(PROBLEM, None, False)
    ],
    "profiled": lambda: subjects.natten_call(
        PROBLEM, replace(subjects.make_tensors(PROBLEM), query=Q, key=Q, value=Q), "", Config()
    )(),
}


@contextmanager
def default_device() -> Iterator[None]:
    # Stands for any device that the tensors are not on.
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def device_context() -> Iterator[None]:
    with torch.device("meta"):
        yield


def forget() -> None:
    """Plans, masks and tables that earlier calls made."""
    natten.functional.dispatch.forget()
    natten.functional.operators.forget()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("natten."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and value is not natten.functional.dispatch.load:
                    value.cache_clear()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("default", [default_device, device_context, default_dtype])
def test_results_do_not_follow(name, default):
    call = CALLS[name]
    if name == "weights":
        pytest.importorskip("matplotlib")
    torch.manual_seed(1)
    expected = call()
    forget()
    with default():
        torch.manual_seed(1)
        got = call()
    forget()
    assert len(tree_leaves(got)) == len(tree_leaves(expected))
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            assert a.device.type == "cpu"
            assert a.dtype == b.dtype
            assert a.equal(b)
        else:
            assert a == b


@pytest.mark.parametrize("default", [default_device, default_dtype])
def test_the_profiler_measures_on_the_device_asked_for(default, capsys):
    from natten import cli

    words = ["profile", "-i", "6", "7", "-w", "3", "-d", "16", "--device", "cpu", "--add-kv", "2"]
    words += ["--dtype", "fp32", "--backprop", "--warmup-steps", "1", "--baseline", "dense"]
    with default():
        assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problem"]["dtype"] == "float32"
    assert document["device"] == devices.driver_name("cpu")
    assert document["subject"]["name"].startswith("natten, cpu-fna")


LOCALE = """
import locale, os, sys
import torch, natten
from natten import profile_file
folder = sys.argv[1]
os.chdir(folder)
q = torch.ones(1, 9, 1, 8)
natten.load_profile("profile.json")
os.chdir("/")
assert natten.na1d(q, q, q, 3, backend="flex-fna").eq(1).all()
assert profile_file.read_profile(folder + "/profile.json").device
print(natten.__version__)
"""


def test_profiles_do_not_depend_on_locale_or_folder(tmp_path):
    """A file with other than ASCII letters, in a locale that has no others."""
    problem = make_problem((9,), 3, head_dim=8, dtype=torch.float32)
    entry = profile_file.Entry(problem, "flex", Config((64,), (64,)), 1.0)
    device = devices.driver_name("cpu")
    path = tmp_path / "profile.json"
    profile_file.save_profile(path, profile_file.Profile(device, None, (entry,), "é"))
    path.write_text(path.read_text(encoding="utf-8").replace("\\u00e9", "é"), encoding="utf-8")
    assert "é" in path.read_text(encoding="utf-8")
    assert profile_file.read_profile(path).natten_version == "é"
    result = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", LOCALE, str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
             "PYTHONPATH": str(Path(natten.__file__).parents[1]), "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == natten.__version__
