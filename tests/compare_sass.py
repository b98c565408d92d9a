"""Compare what the assembler makes of the kernels before and after a change, without a GPU.

    python tests/compare_sass.py REVISION

compiles the launches below in a checkout of the revision and in this one. A kernel has to keep its
instructions, every one of them. No more instructions, registers, stack (spilled registers) and
shared memory are enough for kernels that are compiled to other instructions at every try, and with
`--counts` for those in Gluon. Exits with 1 if a kernel differs.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Compilers do not make the same of a source on every run: so often kernels that differ are compiled
# anew, before and after.
ATTEMPTS = 3
GLUON = "hopper_"


class Setting(NamedTuple):
    """A launch of the forward and backward pass; tuples have one value per axis."""

    name: str
    arch: int
    tokens: tuple[int, ...]
    kernel_size: tuple[int, ...]
    head_dim: int = 64
    problem: dict[str, Any] = {}  # what else its problem has  # noqa: RUF012
    knobs: dict[str, Any] = {}  # noqa: RUF012
    backward: bool = True
    packed: bool = False  # query, key and value, and their gradients, in one tensor
    preferences: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"sm_{self.arch}/{self.name}"


def _box(origin: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, Any]:
    """Queries that are a box of the grid."""
    return {"query_origin": origin, "query_shape": shape}


CAUSAL = {"is_causal": (True,)}
NAMED = {f"{p}{n}_tile_shape": (64,) for p in ("", "backward_") for n in ("q", "kv")}
NON, COOP, PP = ({"kernel_schedule": name} for name in ("non", "coop", "pp"))
SETTINGS = [
    # Gluon: large windows on Hopper.
    Setting("1d_d64", 90, (32768,), (2048,)),
    Setting("1d_d128_causal", 90, (16384,), (16384,), 128, CAUSAL),
    Setting("1d_d96", 90, (16384,), (16384,), 96),
    Setting("2d_d80_values", 90, (128, 128), (80, 80), 80, {"head_dim_v": 48}, backward=False),
    Setting("2d_gqa", 90, (128, 128), (80, 80), 128, {"heads_kv": 2}),
    Setting("3d_d128", 90, (30, 48, 80), (18, 24, 24), 128),
    Setting("1d_varlen", 90, (4096,), (4096,), 128, {"varlen": True}),
    Setting("1d_negative", 90, (16384,), (4096,), 64, {"scale": -0.5}),
    Setting("2d_additional", 90, (128, 128), (80, 80), 64, {"num_additional": 77}),
    Setting("2d_packed", 90, (128, 128), (80, 80), 128, packed=True),
    Setting("2d_dilated", 90, (128, 128), (64, 32), 128, {"dilation": (2, 4), "heads_kv": 2}),
    # Triton on Hopper: descriptors and warp-group products.
    Setting("2d_bias", 90, (56, 56), (7, 7), 32, {"has_rpb": True}),
    Setting("2d_bias_in_order", 90, (56, 56), (7, 7), 32, {"has_rpb": True}, {}, True, False,
            ("deterministic",)),
    Setting("1d_two_passes", 90, (16384,), (16384,), 128, {}, NAMED),
    Setting("2d_dilated_gqa", 90, (96, 80), (9, 7), 64, {"dilation": (2, 3), "heads_kv": 2}),
    Setting("2d_lengths", 90, (128, 128), (13, 13), 64,
            {"num_additional": 77, "has_lengths": True}),
    Setting("3d_strided", 90, (16, 32, 32), (9, 13, 13), 64, {"stride": (1, 2, 3)}, NON),
    Setting("2d_box", 90, (96, 96), (13, 11), 128, _box((8, 16), (40, 50)), NON),
    Setting("2d_coop", 90, (64, 64), (13, 13), 64, {}, COOP, backward=False),
    Setting("1d_d256_pp", 90, (2048,), (64,), 256, {}, PP, backward=False),
    Setting("2d_persistent_gradient", 90, (64, 64), (13, 13), 64, {},
            {"backward_kv_splits": (2, 2)}),
    # Triton with pointers.
    Setting("1d", 80, (32768,), (2048,)),
    Setting("1d_causal_varlen", 80, (1024,), (1024,), 64, {**CAUSAL, "varlen": True}),
    Setting("2d_k7_packed", 80, (56, 56), (7, 7), 32, packed=True),
    Setting("2d_bias", 80, (56, 56), (7, 7), 32, {"has_rpb": True}),
    Setting("2d_lengths", 80, (56, 56), (7, 7), 32, {"num_additional": 32, "has_lengths": True}),
    Setting("2d_odd_dilated", 80, (57, 55), (7, 5), 40, {"dilation": (4, 2), "heads_kv": 2}),
    Setting("2d_wide_value", 80, (32, 32), (7, 7), 64, {"head_dim_v": 640}),
    Setting("2d_pt_reduction", 80, (56, 56), (7, 7), 32, {}, {"backward_use_pt_reduction": True}),
    Setting("3d", 80, (16, 32, 32), (9, 13, 13), 64),
    Setting("3d_bias_causal", 80, (8, 16, 16), (3, 5, 5), 32,
            {"is_causal": (True, False, False), "stride": (1, 2, 1)}),
    Setting("2d_float32", 80, (56, 56), (7, 7), 32, {"dtype": "float32", "has_rpb": True}),
    # Triton on Blackwell: specialized warps.
    Setting("2d", 100, (128, 128), (80, 80), 128),
    Setting("2d_bias", 100, (64, 64), (13, 13), 64, {"has_rpb": True}),
    Setting("3d_persistent", 100, (16, 32, 32), (9, 13, 13), 64, {},
            {"run_persistent_kernel": True}),
]  # fmt: skip
# Products over windows, of architectures and windows' ranks.
PRODUCTS = [(90, 1), (90, 2), (80, 3)]


def _problem(setting: Setting) -> Any:
    import torch

    from natten.functional.problem import Problem

    rank, changes = len(setting.tokens), dict(setting.problem)
    dtype = getattr(torch, changes.pop("dtype", "bfloat16"))
    settings: dict[str, Any] = {
        "batch": 1, "query_shape": setting.tokens, "key_shape": setting.tokens, "heads": 8,
        "heads_kv": 8, "head_dim": setting.head_dim, "head_dim_v": setting.head_dim,
        "kernel_size": setting.kernel_size, "stride": (1,) * rank, "dilation": (1,) * rank,
        "is_causal": (False,) * rank, "grid": setting.tokens, "query_origin": (0,) * rank,
        "key_origin": (0,) * rank, "scale": setting.head_dim**-0.5, "dtype": dtype,
        "device": torch.device("cuda"), "requires_grad": setting.backward,
    }  # fmt: skip
    if changes.get("varlen"):
        changes |= {"max_seqlen_q": 900, "max_seqlen_kv": 900}
    return Problem(**settings | changes)


def _packed(problem: Any) -> tuple[Any, ...]:
    """Query, key and value as parts of one tensor."""
    import torch

    shape = (1, *problem.query_shape, 3, problem.heads, problem.head_dim)
    return torch.empty(shape, dtype=problem.dtype, device="meta").unbind(-3)


def _attention(setting: Setting) -> dict[str, Any]:
    from contextlib import ExitStack

    from compiling import compiling, without_memory

    import natten
    from natten.functional.backends.triton import BLACKWELL, CUTLASS, HOPPER
    from natten.functional.problem import Config

    backend = {80: CUTLASS, 90: HOPPER, 100: BLACKWELL}[setting.arch]
    problem, config = _problem(setting), Config(**setting.knobs)
    inputs, results, needs = without_memory(problem)
    destinations = None
    if setting.packed:
        query, key, value = _packed(problem)
        inputs = inputs._replace(query=query, key=key, value=value)
        destinations = _packed(problem)
    with ExitStack() as stack:
        if "deterministic" in setting.preferences:
            stack.enter_context(natten.use_deterministic_algorithms())
        kernels = stack.enter_context(compiling(setting.arch))
        assert backend.refusal(problem, config) is None, setting.title
        backend.forward(problem, config, inputs)
        if setting.backward:
            backend.backward(problem, config, inputs, results, needs, destinations)
    return kernels


def _products(arch: int, rank: int) -> dict[str, Any]:
    import torch
    from compiling import compiling

    from natten.functional.window_products import operators
    from natten.window import Axis

    axes = tuple(Axis(20 + axis, 5, 1, 1 + axis, axis == 1) for axis in range(rank))
    tokens, slots = 1, 5**rank
    for axis in axes:
        tokens *= axis.length
    a = torch.empty((3, tokens, 40), dtype=torch.bfloat16, device="meta")
    weights = torch.empty((3, tokens, slots), dtype=torch.bfloat16, device="meta")
    with compiling(arch) as kernels:
        products = operators._kernels()
        products.dot(a, a, axes, -1.0)
        products.weighted_sum(weights, a, axes)
        products.scatter(weights, a, axes)
    return kernels


def _shown(kernel: Any) -> dict[str, Any]:
    """Instructions of a kernel without their encodings, and what it takes of a multiprocessor."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    lines = [line for line in listing.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    return {
        "name": kernel.metadata.name,
        "instructions": [re.sub(r"/\*.*?\*/", "", line).strip() for line in lines],
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(kernel.metadata.shared),
    }


def _compile(wanted: set[str]) -> None:
    """Print what the kernels of settings are, in order of their launches, a setting a line."""
    for setting in SETTINGS:
        if setting.title in wanted:
            kernels = _attention(setting)
            print(json.dumps([setting.title, [_shown(k) for k in kernels.values()]]), flush=True)
    for arch, rank in PRODUCTS:
        title = f"sm_{arch}/products_{rank}d"
        if title in wanted:
            kernels = _products(arch, rank)
            print(json.dumps([title, [_shown(k) for k in kernels.values()]]), flush=True)


def _compiled(root: Path, titles: list[str], anew: bool) -> Iterator[tuple[str, list[Any]]]:
    """`_compile` with the library, and what the tests know of it, of a checkout."""
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if anew:
        environment["TRITON_ALWAYS_COMPILE"] = "1"
    # Not by its path: that of this script's folder would come first.
    code = f"import sys, runpy; sys.argv[1:] = {['--compile', *titles]!r}; sys.path.pop(0); "
    code += f"runpy.run_path({__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            title, kernels = json.loads(line)
            yield title, kernels
    if process.returncode:
        raise SystemExit(f"the kernels of {root} do not compile")


NUMBERS = ("registers", "stack", "shared")


def _judge(before: list[Any], after: list[Any], counts: bool) -> tuple[bool, str]:
    """Whether some version of a kernel after is one of those before, and what to say of it."""
    if any(new == old | {"name": new["name"]} for old in before for new in after):
        return True, "identical"

    def numbers(version: dict[str, Any]) -> tuple[int, ...]:
        return (len(version["instructions"]), *(version[name] for name in NUMBERS))

    old, new = min(map(numbers, before)), min(map(numbers, after))
    said = f"{old} -> {new}" if new != old else f"{new}, other instructions"
    varies = any(version != before[0] for version in before)
    if varies:
        said += ", and others at every try"
    lenient = varies or (counts and after[0]["name"].startswith(GLUON))
    return lenient and all(b <= a for a, b in zip(old, new, strict=True)), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", default="main", help="before; or a folder with it")
    parser.add_argument("--only", default="", help="settings whose titles this pattern matches")
    parser.add_argument("--counts", action="store_true", help="for Gluon, numbers are enough")
    parser.add_argument("--compile", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        return _compile(set(options.compile))
    titles = [s.title for s in SETTINGS] + [f"sm_{a}/products_{r}d" for a, r in PRODUCTS]
    titles = [title for title in titles if re.search(options.only, title)]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(options.revision).resolve()
        if not before.is_dir():
            before = Path(folder, "before")
            command = ["git", "worktree", "add", "--quiet", "--detach", str(before)]
            subprocess.run([*command, options.revision], cwd=ROOT, check=True)
        try:
            failed = _compare(before, titles, options.counts)
        finally:
            if before.is_relative_to(folder):
                command = ["git", "worktree", "remove", "--force", str(before)]
                subprocess.run(command, cwd=ROOT, check=True)
    print(f"{failed} kernels differ" if failed else "no kernel differs")
    raise SystemExit(failed > 0)


def _compare(before: Path, titles: list[str], counts: bool) -> int:
    """Print a line for each kernel; returns how many differ."""
    print("instructions, " + ", ".join(NUMBERS))
    versions: dict[str, tuple[list[Any], list[Any]]] = {}
    judged: dict[str, list[tuple[bool, str]]] = {}
    unequal = 0
    for attempt in range(ATTEMPTS):
        again = [t for t in titles if not all(ok for ok, _ in judged.get(t, [(False, "")]))]
        if not again:
            break
        sides = (_compiled(root, again, attempt > 0) for root in (before, ROOT))
        for (title, old), (_, new) in zip(*sides, strict=True):
            if len(old) != len(new):
                judged[title] = [(True, "")]
                unequal += 1
                print(f"DIFFERS {title}: {len(old)} kernels before, {len(new)} after", flush=True)
                continue
            seen = versions.setdefault(title, ([], []))
            seen[0].append(old)
            seen[1].append(new)
            judged[title] = [
                _judge([v[i] for v in seen[0]], [v[i] for v in seen[1]], counts)
                for i in range(len(old))
            ]
            if attempt == ATTEMPTS - 1 or all(ok for ok, _ in judged[title]):
                for kernel, (ok, said) in zip(new, judged[title], strict=True):
                    print("" if ok else "DIFFERS", title, kernel["name"], said, flush=True)
    return unequal + sum(not ok for kernels in judged.values() for ok, _ in kernels)


if __name__ == "__main__":
    main()
