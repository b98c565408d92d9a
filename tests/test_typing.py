"""What a type checker sees of the public functions."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import natten
from natten import distributed
from natten.distributed.attention import AttentionOptions as DistributedAttentionOptions
from natten.distributed.attention import Options as DistributedOptions
from natten.functional.attention import Options as AttentionOptions
from natten.functional.neighborhood import Options

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[1]
# A line that must be an error ends with the code that mypy gives it.
PROGRAM = """
from __future__ import annotations

import torch
import natten
from natten import functional
from torch import Tensor
from typing_extensions import assert_type

Pair = tuple[Tensor, Tensor]

x = torch.randn(1, 8, 2, 16)
natten.na1d(x, x, x, 3, 2, dilation=2, is_causal=True, return_lse=True)
natten.na1d(x, x, x, 3, strid=2)  # call-overload
natten.na1d(x, x, x)  # call-overload
natten.na1d(x, x, x, "3")  # arg-type

q = torch.randn(1, 8, 8, 2, 16)
natten.na2d(q, q, q, 3, stride=2)
natten.na2d(q, q, q, (3, 5), (1, 2), rpb=None, scale=1.0, backend="reference")
natten.na2d(q, q, q, 3, strid=2)  # call-overload
natten.na2d(q, q, q, 3.0)  # call-overload
natten.na2d(q, q, q, 3, stride=[1, "2"])  # arg-type
natten.na2d(q, q, q, 3, return_lse=1)  # call-overload
functional.na2d(q, q, q, 3, causal=True)  # call-overload

v = torch.randn(1, 4, 8, 8, 2, 16)
natten.na3d(v, v, v, (3, 5, 5), is_causal=(True, False, False))
natten.na3d(v, v, v, 3, kernel=3)  # call-overload

assert_type(natten.na2d(q, q, q, 3), Tensor)
assert_type(natten.na2d(q, q, q, 3, return_lse=False), Tensor)
assert_type(natten.na2d(q, q, q, 3, return_lse=True), Pair)
assert_type(natten.na1d(x, x, x, 3), Pair)  # assert-type
assert_type(functional.neighborhood_attention_generic(v, v, v, 3, return_lse=True), Pair)


def ask(flag: bool) -> None:
    assert_type(natten.na3d(v, v, v, 3, return_lse=flag), Tensor | Pair)
    assert_type(natten.attention(x, x, x, return_lse=flag), Tensor | Pair)


assert_type(natten.attention(x, x, x, is_causal=True), Tensor)
assert_type(natten.attention(x, x, x, 0.5, "reference", return_lse=True), Pair)
natten.attention(x, x, x, causal=True)  # call-overload
natten.explain(q, q, q, 3, dilation=2).chosen.upper()
natten.explain(q, q, q, 3, dilatoin=2)  # call-arg
assert_type(natten.merge_attentions([q, q], [q[..., 0], q[..., 0]]), Tensor)
assert_type(natten.merge_attentions([q, q], [q[..., 0], q[..., 0]], return_lse=True), Pair)
natten.merge_attentions([q, q], lse=[q[..., 0], q[..., 0]])  # call-overload

rounded = natten.to_float8(q, 0.1)
assert_type(natten.float8_attention(rounded, rounded, q, 3, stride=2), Tensor)
assert_type(natten.float8_attention(rounded, rounded, rounded, -1, return_lse=True), Pair)
natten.float8_attention(rounded, rounded, (q, q), 3)  # call-overload
natten.float8_attention(rounded, rounded, rounded, 3, softcap=1.0)  # call-overload

assert_type(functional.na2d_qk(q, q, 3, rpb=None, stride=1), Tensor)
assert_type(functional.na2d_av(q, q, (3, 3), additional_values=None), Tensor)
functional.na1d_qk(x, x, 3, bias=None)  # call-arg
functional.na3d_av(v, v, "3")  # arg-type

natten.get_configs_for_cutlass_fna(q, q, value=q)[0][0][0].bit_length()
natten.get_bwd_configs_for_cutlass_hopper_fmha(x, x, x)[0][1].bit_length()
natten.get_configs_for_cutlass_hopper_fna(q, q, q)[0][1]
natten.get_configs_for_flex_fmha(x, x)  # call-arg
natten.get_configs_for_flex_fna(x, x, 3)  # arg-type

import natten.distributed as nd

assert_type(nd.na2d(q, q, q, 3, method="ring"), Tensor)
assert_type(nd.na1d(x, x, x, 3, return_lse=True), Pair)
assert_type(nd.attention(x, x, x, is_causal=True, return_lse=True), Pair)
nd.na3d(v, v, v, 3, methd="ring")  # call-overload
nd.attention(x, x, x, rpb=None)  # call-overload

natten.na2dd(q, q, q, 3)  # attr-defined
natten.get_config_for_flex_fna(x, x, x)  # attr-defined
natten.functional.na4d(q)  # attr-defined
natten.NeighborhoodAttention2D(dim=16, kernel_size=3, num_heads=2)
natten.nn.NeighborhoodAttention1D(dim=16, kernel_size=3, num_heads=2)
natten.simulate((8, 8), 3)
natten.viz
natten.natten2dav
"""


@pytest.mark.slow
def test_wrong_calls_are_type_errors_and_right_ones_are_not(
    tmp_path: Path, cache: pytest.Cache
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent"),
            *("--config-file", os.devnull, "--no-error-summary", "--hide-error-context"),
            # What mypy makes of torch is kept for the next run.
            *("--cache-dir", str(cache.mkdir("mypy")), str(program)),
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = [line for line in run.stdout.splitlines() if ": error:" in line]
    numbered = enumerate(PROGRAM.splitlines(), 1)
    expected = [(n, line.partition("  # ")[2]) for n, line in numbered if "  # " in line]
    lines = [(int(line.split(":")[1]), line.rpartition("[")[2][:-1]) for line in found]
    # mypy has two errors for an argument that no overload has.
    assert sorted(set(lines)) == expected, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("function", "options", "others"),
    [
        (natten.na2d, Options, "kernel_size stride dilation is_causal scale "
         "additional_keys additional_values return_lse"),
        (distributed.na2d, DistributedOptions, "kernel_size stride dilation is_causal scale "
         "additional_keys additional_values return_lse"),
        (natten.attention, AttentionOptions, "scale backend return_lse"),
        (distributed.attention, DistributedAttentionOptions, "scale is_causal return_lse"),
    ],
)  # fmt: skip
def test_static_signatures_have_every_parameter(function, options, others) -> None:
    named = set(options.__annotations__)
    parameters = list(inspect.signature(function).parameters)
    left = [name for name in parameters if name not in named]
    assert left == ["query", "key", "value", *others.split()]
    assert named <= set(parameters)
