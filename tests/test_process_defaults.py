"""Defaults of the process (device, dtype, printing, threads, folder) change no result."""

from __future__ import annotations

import os
import subprocess
import sys

import forks
import pytest
import torch

import natten

CALLS = {
    "na2d": "na2d(q, q, q, 3)",
    "backward": "torch.autograd.grad(na2d(q, q, q, 3, rpb=b).sum(), [q, b])[0]",
    "additional keys": "na2d(q, q, q, 3, rpb=b, additional_keys=a, additional_values=a)",
    "lengths": "na2d(q, q, q, 3, additional_keys=a, additional_values=a, additional_lengths=n)",
    "reference": "na2d(q, q, q, 3, dilation=2, backend='reference')",
    "flex": "na2d(q.detach(), q.detach(), q.detach(), 3, dilation=2, backend='flex-fna')",
    "attention": "natten.attention(q[0], q[0], q[0], is_causal=True)",
    "packed sequences": "natten.attention(q[:, 0], q[:, 0], q[:, 0], seqlens_Q=s, seqlens_KV=s)",
    "unfused": "qk(h, h, 3)",
    "unfused, gradient": "torch.autograd.grad(qk(h, h, 3, dilation=2).square().sum(), q)[0]",
    "unfused with a bias": "qk(h, h, 3, rpb=b).softmax(-1)",
    "module": "m(x)",
    "module with dropout": "d(x)",
    "module with rotary positions": "r(x)",
    "attention map": "m.attention_map(x, [[1, 1]])[0]",
    "merge": "natten.merge_attentions([q[0], q[0]], [q[0][..., 0]] * 2)",
}
PREPARE = """
import torch, natten
from natten import na2d
from natten.functional import na2d_qk as qk
torch.manual_seed(0)
q = torch.randn(1, 6, 7, 2, 8, requires_grad=True)
h, x, a = q.movedim(3, 1), torch.randn(1, 6, 7, 16), torch.randn(1, 3, 2, 8)
b = torch.randn(2, 5, 5, requires_grad=True)
n, s = torch.tensor([2]), torch.tensor([3, 4], dtype=torch.int32)
m, d, r = (
    natten.NeighborhoodAttention2D(16, 2, 3, **named).eval()
    for named in ({"rel_pos_bias": True}, {"attn_drop": 1e-9}, {"rotary": True})
)
d.train()
def results():
    found = []
    for call in CALLS.values():
        torch.manual_seed(0)
        out = eval(call)
        assert out.device.type == "cpu", call
        found.append(out.detach())
    return found
"""
SETTINGS = {
    "default device": "torch.set_default_device('meta')",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "half default dtype": "torch.set_default_dtype(torch.float16)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "print options": "torch.set_printoptions(precision=1, threshold=1, profile='short')",
    "threads": "torch.set_num_threads(3)",
    "folder": "import os, tempfile; os.chdir(tempfile.mkdtemp())",
}


def _program(setting: str, warm: bool = False) -> str:
    code = f"CALLS = {CALLS!r}\n{PREPARE}\n"
    # In a fresh process tables are made under the setting; in a warm one they are there.
    if warm:
        code += f"before = results()\n{setting}\nafter = results()\n"
    else:
        code += f"{setting}\nafter = results()\n"
        code += "torch.set_default_device('cpu'); torch.set_default_dtype(torch.float32)\n"
        code += "torch.set_num_threads(1); before = results()\n"
    return code + (
        "for name, a, b in zip(CALLS, before, after):\n"
        "    assert a.dtype == b.dtype and torch.equal(a, b), name\n"
    )


def _run_anew(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    program = _program(SETTINGS[name])
    if name == "default device":
        # Modules that are imported late may make tensors, too.
        _run_anew(program)
    else:
        forks.call(exec, program, {})


def test_default_device_of_a_warm_process():
    forks.call(exec, _program(SETTINGS["default device"], warm=True), {})


def test_locale():
    setting = "import locale; locale.setlocale(locale.LC_ALL, '')"
    _run_anew(_program(setting), LC_ALL="C", LANG="C")


def test_blocks_compile_under_a_default_device():
    """torch 2.10 does not trace all methods of tensors there."""
    torch.manual_seed(0)
    self_attention = natten.nn.NeighborhoodTransformerBlock(16, 2, kernel_size=3).eval()
    cross_attention = natten.nn.NeighborhoodCrossAttention2D(16, 2, 3, upsampling=2)
    x, source = torch.randn(1, 6, 8, 16), torch.randn(1, 3, 4, 16)
    expected = self_attention(x), cross_attention(x, source=source)
    torch.set_default_device("cpu")
    try:
        blocks = (self_attention, cross_attention)
        compiled = [torch.compile(b, backend="aot_eager", fullgraph=True) for b in blocks]
        got = compiled[0](x), compiled[1](x, source=source)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, expected)


def test_device_as_context():
    query = torch.randn(1, 11, 2, 8)
    expected = natten.na1d(query, query, query, 3)
    with torch.device("meta"):
        # A window that no test before has used.
        got = natten.na1d(query, query, query, 3, dilation=3)
        assert natten.na1d(query, query, query, 3).equal(expected)
    assert got.equal(natten.na1d(query, query, query, 3, dilation=3, backend="cpu"))
