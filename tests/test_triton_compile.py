"""Compile the kernels ahead of time, without a GPU, for the GPUs that the backends are for.

The launches are the library's own, on tensors without memory, so that tilings and specializations
are what a GPU would get. `triton_resources.json` records what each kernel took when somebody last
looked; a kernel that takes more fails. To accept new numbers, with the Triton of the file:

    python tests/test_triton_compile.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import natten
from natten.functional.problem import Config, Grid, Grids, Problem

triton = pytest.importorskip("triton")

from compiling import compiling, without_memory  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from natten.functional.backends.triton import BLACKWELL, CUTLASS, HOPPER  # noqa: E402
from natten.functional.backends.triton.launcher import in_gluon  # noqa: E402

RECORDED = Path(__file__).with_name("triton_resources.json")
# Another patch of the same compiler may schedule a little differently.
SLACK_REGISTERS = 8
VERSION = triton.__version__.rpartition(".")[0]
# Bytes that one version's compiler alone spills from registers, by setting and kernel.
SPILLED = {
    ("3.9", "sm_90/1d_d128_causal", "hopper_forward_kernel"): 32,
    ("3.9", "sm_90/1d_d128_causal", "hopper_forward_kernel_2"): 16,
    ("3.9", "sm_90/2d_d128_dilated", "hopper_forward_kernel"): 24,
    ("3.9", "sm_90/1d_d64_dense", "hopper_gradients_kernel"): 488,
}
BACKEND = {80: CUTLASS, 90: HOPPER, 100: BLACKWELL}


@dataclass(frozen=True)
class Setting:
    """A representative problem; tuples have one value for each axis."""

    name: str
    arch: int
    tokens: tuple[int, ...]
    kernel_size: tuple[int, ...]
    head_dim: int
    heads: int = 8
    batch: int = 1
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    is_circular: tuple[bool, ...] = ()
    upsampling: tuple[int, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()  # grids of other sizes, smaller ones
    additional: int = 0
    lengths: bool = False  # of the additional keys
    rpb: bool = False
    scores: bool = False  # a soft cap, a sink and masks of tokens
    backward: bool = True
    knobs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        return f"sm_{self.arch}/{self.name}"

    def grids(self) -> Grids | None:
        if not self.others:
            return None
        ones = (1,) * len(self.tokens)
        sizes = (self.tokens, *self.others)
        return Grids(tuple([(Grid(size, self.kernel_size, ones, ones), 1) for size in sizes]))

    def problem(self) -> Problem:
        rank = len(self.tokens)
        ones, zeros = (1,) * rank, (0,) * rank
        queries = tuple(n * r for n, r in zip(self.tokens, self.upsampling or ones))
        return Problem(
            self.batch, queries, self.tokens, self.heads, self.heads, self.head_dim,
            self.head_dim, self.kernel_size, ones, self.dilation or ones,
            self.is_causal or (False,) * rank, self.tokens, zeros, zeros, self.head_dim**-0.5,
            self.additional, self.lengths, self.rpb,
            is_circular=self.is_circular, upsampling=self.upsampling,
            softcap=30.0 * self.scores, has_sink=self.scores, has_key_mask=self.scores,
            has_query_mask=self.scores, grids=self.grids(), dtype=torch.bfloat16,
            device=torch.device("cuda"), requires_grad=self.backward,
        )  # fmt: skip


SETTINGS = [
    Setting("2d_k7_d32", 90, (56, 56), (7, 7), 32, batch=64, rpb=True),
    Setting("1d_d64", 90, (32768,), (2048,), 64),
    Setting("1d_d128_causal", 90, (16384,), (16384,), 128, is_causal=(True,)),
    Setting("3d_d128", 90, (30, 48, 80), (18, 24, 24), 128),
    Setting("2d_k7_d32", 80, (56, 56), (7, 7), 32, batch=64),
    Setting("3d_d64", 80, (16, 32, 32), (9, 13, 13), 64),
    Setting("2d_d128", 100, (128, 128), (80, 80), 128),
    Setting("2d_k7_d32_grids", 90, (28, 28), (7, 7), 32, others=((24, 32), (14, 50))),
    Setting("2d_k7_d80", 90, (56, 56), (7, 7), 80, batch=8),
]
MORE_SETTINGS = [
    Setting("2d_d64_scores", 90, (128, 128), (13, 13), 64, scores=True),
    Setting("2d_k7_d32_scores", 80, (56, 56), (7, 7), 32, scores=True),
    Setting("2d_d128_scores", 100, (128, 128), (80, 80), 128, scores=True),
    Setting("2d_d64", 90, (128, 128), (13, 13), 64, additional=77),
    Setting("2d_d64_lengths", 90, (128, 128), (13, 13), 64, additional=77, lengths=True),
    Setting("2d_d128", 90, (256, 256), (80, 80), 128, heads=24),
    Setting("2d_d128_dilated", 90, (256, 256), (80, 40), 128, heads=24, dilation=(2, 4)),
    Setting("3d_d32", 90, (16, 32, 32), (5, 7, 7), 32),
    Setting("3d_d64", 90, (16, 32, 32), (9, 13, 13), 64, rpb=True),
    Setting("1d_d128", 90, (16384,), (16384,), 128),
    Setting("1d_d96", 90, (16384,), (16384,), 96),
    Setting("2d_d80", 90, (128, 128), (80, 80), 80),
    Setting("1d_d64_dense", 90, (16384,), (16384,), 64),
    Setting("1d_d128_two_passes", 90, (16384,), (16384,), 128,
            knobs={"backward_q_tile_shape": (64,), "backward_kv_tile_shape": (64,)}),
    Setting("2d_d256", 90, (64, 64), (13, 13), 256),
    Setting("2d_d64_coop", 90, (64, 64), (13, 13), 64, backward=False,
            knobs={"kernel_schedule": "coop"}),
    Setting("2d_d64_pp", 90, (64, 64), (13, 13), 64, backward=False,
            knobs={"kernel_schedule": "pp"}),
    Setting("1d_d64", 80, (32768,), (2048,), 64),
    Setting("2d_d128", 80, (128, 128), (33, 33), 128, additional=77),
    Setting("2d_k7_d32_lengths", 80, (56, 56), (7, 7), 32, batch=64, additional=32, lengths=True),
    Setting("2d_k7_d32_bias", 80, (56, 56), (7, 7), 32, batch=64, rpb=True),
    Setting("1d_d64", 100, (32768,), (2048,), 64),
    Setting("3d_d128", 100, (30, 48, 80), (18, 24, 24), 128),
    Setting("3d_d64", 100, (16, 32, 32), (9, 13, 13), 64),
    Setting("2d_d64_bias", 100, (64, 64), (13, 13), 64, rpb=True),
    Setting("2d_k7_d32_ring", 80, (56, 56), (7, 7), 32, batch=64, is_circular=(False, True)),
    Setting("2d_d64_ring", 90, (128, 128), (13, 13), 64, is_circular=(False, True)),
    Setting("3d_d128_rings", 90, (30, 48, 80), (18, 24, 24), 128, is_circular=(True,) * 3),
    Setting("2d_k7_d32_up", 80, (28, 28), (7, 7), 32, batch=16, upsampling=(4, 4)),
    Setting("2d_d64_up", 90, (32, 32), (9, 9), 64, upsampling=(14, 14)),
    Setting("2d_d64_up", 100, (32, 32), (9, 9), 64, upsampling=(14, 14)),
    Setting("1d_d64_ring", 100, (32768,), (2048,), 64, is_circular=(True,)),
    Setting("2d_k7_d32_grids", 80, (28, 28), (7, 7), 32, others=((24, 32), (14, 50)), rpb=True),
    Setting("2d_d128_grids", 90, (64, 48), (13, 13), 128, others=((50, 50),), additional=77),
    Setting("3d_d64_grids", 90, (8, 16, 16), (3, 5, 5), 64, others=((4, 20, 20),), scores=True),
    Setting("2d_d64_grids", 100, (64, 48), (13, 13), 64, others=((50, 50),)),
    Setting("2d_k7_d48", 80, (56, 56), (7, 7), 48, batch=8),
    Setting("3d_d96_scores", 90, (16, 32, 32), (5, 7, 7), 96, additional=77, scores=True),
    Setting("3d_d160", 80, (16, 32, 32), (5, 7, 7), 160),
]  # fmt: skip


def compile_setting(setting: Setting) -> dict[str, Any]:
    """All kernels of a forward and backward pass."""
    problem, config = setting.problem(), Config(**setting.knobs)
    backend = BACKEND[setting.arch]
    inputs, results, needs = without_memory(problem)
    with compiling(setting.arch) as kernels:
        assert backend.refusal(problem, config) is None
        backend.forward(problem, config, inputs)
        if setting.backward:
            backend.backward(problem, config, inputs, results, needs)
    return kernels


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, its stack (spilled registers) and shared memory, in bytes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(kernel.metadata.shared),
    }


def instructions(kernel: Any) -> str:
    """What the assembler made of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [str(tool), "-c", file.name], capture_output=True, text=True, check=True
        )
    return shown.stdout


def register_operands(ttgir: str) -> list[str]:
    """Warp-group products in a loop whose left operand is in registers since before the loop.

    The assembler may reuse the registers of such an operand inside the loop, and has: results were
    wrong by 70 percent. What stays through a loop must come from shared memory.
    """
    suspects = []
    loops: list[tuple[int, int]] = []  # indentation and line of the loops around a line
    defined: dict[str, int] = {}
    for number, line in enumerate(ttgir.splitlines()):
        text = line.lstrip()
        indent = len(line) - len(text)
        if text.startswith("}"):
            while loops and loops[-1][0] >= indent:
                loops.pop()
        assigned = re.match(r"(%[\w#]+)(?::\d+)? = ", text)
        if assigned:
            defined[assigned[1]] = number
        if " scf.for " in f" {text}":
            loops.append((indent, number))
            for name in re.findall(r"(%\w+) = ", text.partition("iter_args")[2]):
                defined[name] = number
        product = re.search(r"ttng\.warp_group_dot (%[\w#]+), .*: (\S+)", text)
        if product and loops and not product[2].startswith("!ttg.memdesc"):
            origin = defined.get(product[1].partition("#")[0], -1)
            if origin < loops[-1][1]:
                suspects.append(text[:200])
    return suspects


def _exceeds(got: dict[str, int], limit: dict[str, int]) -> list[str]:
    """What a kernel takes more of than when it was recorded."""
    slack = {"registers": SLACK_REGISTERS, "stack": 0, "shared": 0}
    return [what for what, most in limit.items() if got[what] > most + slack[what]]


def _compiled_again(setting: Setting, name: str) -> dict[str, int]:
    """Resources of one kernel, compiled anew: the assembler does not spill alike every time."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("natten.functional.backends.triton"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        return resources(compile_setting(setting)[name])


def _check(setting: Setting) -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    same_compiler = recorded.get("triton") == triton.__version__
    complaints = []
    for name, kernel in compile_setting(setting).items():
        got = resources(kernel)
        title = f"{setting.title}/{name}"
        limit = recorded.get("kernels", {}).get(title)
        if same_compiler and limit is None:
            complaints.append(f"{title} is not in {RECORDED.name}: {got}")
        elif same_compiler:
            for _ in range(3):
                if _exceeds(got, limit):
                    got = _compiled_again(setting, name)
            for what in _exceeds(got, limit):
                complaints.append(f"{title}: {what} {got[what]}, recorded {limit[what]}")
        ttgir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
        if name.startswith(("statistics", "bias_", "longest", "merge")):
            continue
        if setting.arch == 90:
            # They have 64 rows and more; tiles of wide heads may have 32.
            is_large = max(map(int, re.findall(r"dot .*-> tensor<(\d+)x", ttgir))) >= 64
            if is_large and not re.search(r"warp_group_dot .*: !ttg\.memdesc", ttgir):
                complaints.append(f"{title} has no warp-group products from shared memory")
            complaints += [f"{title}: {line}" for line in register_operands(ttgir)]
        if setting.arch == 100 and "tcgen05.mma" not in ptx:
            complaints.append(f"{title} has no tcgen05.mma")
    assert not complaints, "\n".join(complaints)


def test_arguments_travel_in_groups() -> None:
    """No kernel, and no function that kernels call, has a long list of parameters."""
    found = 0
    for path in Path(natten.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith(("triton.jit", "gluon.jit"))
                for decorator in node.decorator_list
            ):
                found += 1
                assert len(node.args.args) <= 12, f"{path.name}: {node.name}"
    assert found > 50


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.title)
def test_resources(setting: Setting) -> None:
    _check(setting)


def test_descriptors() -> None:
    """Wide heads are loaded by the tensor memory accelerator, undivided tiles of the grid."""
    setting = Setting(
        "3d_d128_non", 90, (30, 48, 80), (18, 24, 24), 128, backward=False,
        knobs={"kernel_schedule": "non"},
    )  # fmt: skip
    ttgir = compile_setting(setting)["forward_kernel"].asm["ttgir"]
    assert "ttng.async_tma_copy_global_to_local" in ttgir


@pytest.mark.parametrize("title", [
    "sm_90/1d_d64", "sm_90/1d_d128_causal", "sm_90/3d_d128", "sm_90/1d_d96", "sm_90/2d_d80",
    "sm_90/2d_d128_dilated",
])  # fmt: skip
def test_products_of_the_ping_pong_kernel_stay_in_flight(title: str) -> None:
    """Products of the warp-specialized kernel stay in flight: the assembler waits for each of them
    where it takes them for unsafe, or short of registers, which makes the kernel useless."""
    if in_gluon("hopper_forward") is None:
        pytest.skip(f"Triton {triton.__version__} has another dialect of Gluon")
    setting = next(s for s in SETTINGS + MORE_SETTINGS if s.title == title)
    kernels = compile_setting(replace(setting, backward=False))
    # The second is for heads with a bound, which large problems alone have.
    for name in {"hopper_forward_kernel", "hopper_forward_kernel_2"} & kernels.keys():
        sass = instructions(kernels[name])
        products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR")
        assert products >= 16
        assert waits <= products // 2
        if (spilled := SPILLED.get((VERSION, title, name))) is None:
            assert "STL" not in sass
        else:
            assert resources(kernels[name])["stack"] <= spilled


@pytest.mark.parametrize("title", [
    "sm_90/1d_d128_causal", "sm_90/2d_d128", "sm_90/1d_d64_dense", "sm_90/1d_d96",
    "sm_90/2d_d128_dilated",
])  # fmt: skip
def test_gradients_in_one_pass(title: str) -> None:
    """The same of the kernel for all gradients, of the grid's keys and of additional ones; it is
    short of registers outside its products."""
    if in_gluon("hopper_forward") is None:
        pytest.skip(f"Triton {triton.__version__} has another dialect of Gluon")
    setting = next(s for s in SETTINGS + MORE_SETTINGS if s.title == title)
    kernels = compile_setting(replace(setting, additional=77))
    assert "query_gradient_kernel" not in kernels
    spilled = SPILLED.get((VERSION, title, "hopper_gradients_kernel"), 400)
    for name in ("hopper_gradients_kernel", "hopper_gradients_kernel_2"):
        sass = instructions(kernels[name])
        products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR")
        assert products >= 64
        assert waits <= products // 3
        assert "UTMAREDG" in sass
        assert resources(kernels[name])["stack"] <= spilled


@pytest.mark.exhaustive
@pytest.mark.parametrize("setting", MORE_SETTINGS, ids=lambda s: s.title)
def test_more_resources(setting: Setting) -> None:
    _check(setting)


def test_register_operands_are_found() -> None:
    before = """
      %q = ttg.local_load %m : !ttg.memdesc<128x64xf16> -> tensor<128x64xf16>
      %r = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (tensor<128x64xf32>) : i32 {
        %s = ttng.warp_group_dot %q, %k, %z : tensor<128x64xf16> * !ttg.memdesc<64x64xf16>
        %t = ttng.warp_group_dot %x, %k, %z : tensor<128x64xf16> * !ttg.memdesc<64x64xf16>
        %u = ttng.warp_group_dot %m, %k, %z : !ttg.memdesc<128x64xf16> * !ttg.memdesc<64x64xf16>
      }
      %v = ttng.warp_group_dot %q, %k, %z : tensor<128x64xf16> * !ttg.memdesc<64x64xf16>
    """
    assert len(register_operands(before)) == 1
    assert "%q" in register_operands(before)[0]


_IN_BAD_CACHE = """
import warnings
from dataclasses import replace
from test_triton_compile import SETTINGS, compile_setting

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kernels = compile_setting(replace(SETTINGS[4], backward=False))
    kernels |= compile_setting(replace(SETTINGS[4], backward=False, head_dim=16))
    assert list(kernels) == ["forward_kernel"], kernels
texts = [str(w.message) for w in caught if "cache" in str(w.message)]
assert len(texts) == 1, texts
assert "TRITON_CACHE_DIR" in texts[0] and {place!r} in texts[0], texts
"""


def test_a_cache_that_cannot_be_written_fails_no_call(tmp_path: Path) -> None:
    """Kernels are compiled without it, and it is said once."""
    place = tmp_path / "file" / "cache"
    place.parent.write_text("no folder")
    here = Path(__file__).parent
    paths = (str(here.parent), str(here), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, "-c", _IN_BAD_CACHE.replace("{place!r}", repr(str(place)))],
        env={
            **os.environ, "TRITON_CACHE_DIR": str(place), "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def _record() -> None:
    """Write down what every kernel takes now."""
    kernels = {}
    for setting in SETTINGS + MORE_SETTINGS:
        for name, kernel in compile_setting(setting).items():
            kernels[f"{setting.title}/{name}"] = resources(kernel)
            sys.stdout.write(f"{setting.title}/{name}: {kernels[f'{setting.title}/{name}']}\n")
            sys.stdout.flush()
    RECORDED.write_text(
        json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n"
    )


if __name__ == "__main__":
    _record()
