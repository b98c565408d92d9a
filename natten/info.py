"""What `natten info` tells: text that can be pasted into a bug report."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import natten
from natten import context, devices
from natten.functional import dispatch, neighborhood_attention_generic
from natten.functional.problem import DEFAULT_CONFIG
from natten.profile_file import VARIABLE, check_device, read_profile, without_profile
from natten.simulator import make_problem

_PACKAGES = ("torch", "triton", "numba", "numpy", "timm", "safetensors", "rich")
_VARIABLES = ("NATTEN_LOG_LEVEL", VARIABLE, "TRITON_INTERPRET", "TRITON_CACHE_DIR")
# Half precision holds products of numbers around 1 to this.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2}


def _versions() -> list[tuple[str, str]]:
    found = [
        ("natten", f"{natten.__version__}, {Path(natten.__file__).parent}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("system", platform.platform()),
    ]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "not installed"))
    cuda = torch.version.cuda or torch.version.hip
    found.append(("torch built for", f"{'CUDA' if torch.version.cuda else 'ROCm'} {cuda}" if cuda
                  else "CPU"))  # fmt: skip
    return found


def _devices() -> list[tuple[str, str]]:
    processor = f"{devices.driver_name('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()}"
    found = [("cpu", f"{processor} threads in torch")]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            (
                f"cuda:{index}",
                f"{p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} "
                f"multiprocessors, {p.total_memory / 2**30:.0f} GiB",
            )
        )
    return found if len(found) > 1 else [*found, ("cuda", "no device")]


def _size(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: none"
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    return f"{folder}: {len(files)} files, {total / 2**20:.1f} MiB"


def _caches() -> list[tuple[str, str]]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    found = [("triton", _size(Path(triton))), ("torch.compile", _size(Path(inductor)))]
    return [*found, ("numba", _numba_cache())]


def _numba_cache() -> str:
    """The folder that numba has chosen: beside the kernels where it may write, or the user's."""
    try:
        from natten.functional.backends.cpu.rows import forward_loop
    except ImportError as error:
        return f"none: {error.name} is not installed"
    folder = getattr(getattr(forward_loop, "_cache", None), "cache_path", None)
    if folder is None:
        return "none: numba has no folder that it may write to"
    files = sorted(Path(folder).glob("*.nb[ic]"))
    return f"{folder}: {len(files)} files, {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"


def _variable(name: str) -> str:
    value = os.environ[name]
    if name != VARIABLE or not value:
        return value
    try:
        profile = read_profile(value)
        check_device(value, profile)
    except (OSError, ValueError) as error:
        return f"{value}: REFUSED, {' '.join(str(error).split())}"
    return f"{value}: {len(profile.entries)} entries, of {profile.device}"


def _check(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, bool]:
    """One line of the report, and whether the check failed."""
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(
            1, 9, 12, 2, 32, generator=generator, device="cpu", dtype=torch.float32
        ).to(device, dtype)
        for _ in range(3)
    )  # fmt: skip

    def attend(dtype: torch.dtype, backend: str) -> Any:
        return neighborhood_attention_generic(
            query.to(dtype), key.to(dtype), value.to(dtype), (3, 5), (1, 2), (2, 1),
            backend=backend,
        )  # fmt: skip

    exact = attend(torch.float64, "reference")
    try:
        out = attend(dtype, f"{name}-fna")
    except Exception as error:
        # A broken compiler or driver is what this line is for.
        return f"FAILED: {' '.join(str(error).split())[:120]}", True
    difference = float((out.double() - exact).abs().max())
    good = difference <= _TOLERANCE[dtype]
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{'ok' if good else 'WRONG'}, differs from the reference by {difference:.1e} in {kind}"
    ), not good


def _backends(check: bool) -> tuple[list[tuple[str, str]], bool]:
    failed = False
    found = []
    places = [torch.device("cpu")]
    if torch.cuda.is_available():
        places.insert(0, torch.device("cuda"))
    for name in dispatch.BACKENDS:
        reasons = []
        for device in places:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
            problem = make_problem((9, 12), 3, heads=2, head_dim=32, dtype=dtype, device=device)
            try:
                reason = dispatch.refusal(name, problem, DEFAULT_CONFIG)
            except Exception as error:
                reason = f"it cannot be asked: {error}"
            if reason is None:
                text = "available"
                if check:
                    text, bad = _check(name, device, dtype)
                    failed |= bad
                reasons = [f"{device.type}: {text}"]
                break
            reasons.append(str(reason))
        found.append((f"{name}-fna", reasons[0]))
    return found, failed


def info(check: bool = True) -> tuple[str, bool]:
    """Versions, devices, backends and caches as text, and whether a backend's check failed.

    Args:
        check: Whether to run every available backend and compare it with the reference.
    """
    # A profile that cannot be used must not keep this text from being written.
    with without_profile():
        backends, failed = _backends(check)
    now = context.preferences()
    settings = [
        ("preferences", ", ".join(f"{name}={value}" for name, value in asdict(now).items())),
        *((name, _variable(name)) for name in _VARIABLES if name in os.environ),
    ]
    sections = (
        ("versions", _versions()), ("devices", _devices()), ("backends", backends),
        ("caches", _caches()), ("settings", settings),
    )  # fmt: skip
    width = max(len(name) for _, lines in sections for name, _ in lines)
    text = []
    for title, lines in sections:
        text += [title, *(f"  {name:<{width}}  {line}" for name, line in lines)]
    return "\n".join(text), failed


__all__ = ["info"]
