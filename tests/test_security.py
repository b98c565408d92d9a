"""Files are data, nothing is fetched unasked, and nothing in the sources could do otherwise."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import natten

ROOT = Path(__file__).resolve().parents[1]


class Payload:
    """What unpickling it would do, and must not."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def checkpoint(path: Path) -> Path:
    torch.save({"state_dict": {"head.fc.weight": Payload()}, "epoch": 0}, path)
    return path


def _model(**arguments) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("natten.models")
    timm.create_model("nat_pico", **arguments)


def _timm_loads_a_checkpoint(folder: Path) -> None:
    _model(checkpoint_path=str(checkpoint(folder / "weights.pth")))


def _timm_loads_a_folder(folder: Path) -> None:
    config = {"architecture": "nat_pico", "pretrained_cfg": {"num_classes": 10}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint(folder / "pytorch_model.bin")
    timm = pytest.importorskip("timm")
    pytest.importorskip("natten.models")
    timm.create_model(f"local-dir:{folder}", pretrained=True)


def _a_model_is_made_of_a_file(folder: Path) -> None:
    path = checkpoint(folder / "weights.pth")
    _model(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def _a_checkpoint_is_converted(folder: Path) -> None:
    from natten.models.__main__ import main

    assert main(["convert", str(checkpoint(folder / "a.pth")), str(folder / "b.pth")]) != 0
    raise ValueError("exit status")


def _training_goes_on(folder: Path) -> None:
    from argparse import Namespace

    from natten.models.train import resume

    checkpoint(folder / "last.pth.tar")
    resume(Namespace(output=folder, settings={}), None, None, None, None)


def _a_clip_is_read(folder: Path) -> None:
    from natten.models.clip import read

    np.savez(folder / "clip.npz", frames=np.array([Payload()], dtype=object))
    read(folder / "clip.npz", (8, 8))


def _a_profile_is_loaded(folder: Path) -> None:
    (folder / "profile.json").write_bytes(pickle.dumps(Payload()))
    natten.load_profile(folder / "profile.json")


@pytest.mark.parametrize(
    "door",
    [
        _timm_loads_a_checkpoint, _timm_loads_a_folder, _a_model_is_made_of_a_file,
        _a_checkpoint_is_converted, _training_goes_on, _a_clip_is_read, _a_profile_is_loaded,
    ],
)  # fmt: skip
def test_no_file_is_executed(
    door: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, pickle.UnpicklingError, RuntimeError)):
        door(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_payload_would_be_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(checkpoint(tmp_path / "weights.pth"), weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["../weights", "/etc/passwd", "a/../../b"])
def test_names_of_models_are_no_paths(place: str) -> None:
    pytest.importorskip("timm")
    from natten.models._checkpoint import WEIGHTS, packaged_weights

    for name in (place, f"nat_pico.{place}"):
        found = packaged_weights(name)
        assert found is None or Path(found).resolve().parent == WEIGHTS.resolve()
        with pytest.raises(RuntimeError):
            _model(pretrained=True, pretrained_cfg=name)


# --- no network

SILENT = """
import sys
asked = []
def hook(event, arguments):
    # A port of one's own is no network; neither is a pair of pipes.
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        asked.append((event, arguments[-1]))
        raise OSError("no network here")
sys.addaudithook(hook)

import torch, natten, natten.cli, natten.distributed, natten.profiler
x = torch.randn(1, 6, 7, 2, 8, requires_grad=True)
for backend in (None, "cpu", "reference"):
    natten.na2d(x, x, x, 3, backend=backend).sum().backward()
natten.na2d(*[x.detach()] * 3, 3, backend="flex-fna")
natten.NeighborhoodAttention2D(16, 2, 3)(torch.randn(1, 6, 7, 16))
natten.explain(x, x, x, 3)
import timm, natten.models
from natten.models import nat, dinat, dinat_s, isotropic, video, denoiser
from timm.models import list_models
for module in (nat, dinat, dinat_s, isotropic, video, denoiser):
    for name in list_models(module=module.__name__.rpartition(".")[2]):
        timm.create_model(name, device="meta")
timm.create_model("nat_pico.mnist5k", pretrained=True)
assert not asked, asked
try:
    timm.create_model("nat_mini", pretrained=True)
except Exception:
    pass
assert asked, "the hook sees nothing"
"""


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


# --- what the sources may call

SOURCES = [
    path
    for pattern in ("*.py", "natten/**/*.py", "models/**/*.py", "benchmarks/**/*.py",
                    "examples/*.py", "docs/*.py", "notebooks/*.py", "tests/run_*.py")
    for path in sorted(ROOT.glob(pattern))
]  # fmt: skip
# numba has unpickled the file already that this is in.
KNOWN = {("natten/functional/backends/cpu/cache.py", "pickle.loads")}
NEEDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "extractall": ("filter", "data"),
}
FORBIDDEN = {
    *("eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp"),
    *("pickle.load", "pickle.loads", "yaml.load", "joblib.load", "shutil.unpack_archive"),
}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "huggingface_hub"}
# Asks what an error of timm's download is.
MAY_IMPORT = {("models/_base.py", "urllib")}


def complaints(path: Path) -> list[str]:
    """Calls in a file that run data, or that fetch some."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                node.module if node.module and not node.level else ""
            ]  # fmt: skip
            tops = {module.partition(".")[0] for module in modules} & NETWORK
            found += [
                f"{name}:{node.lineno}: {top}" for top in tops if (name, top) not in MAY_IMPORT
            ]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: k.value for k in node.keywords}
        if called in FORBIDDEN and (name, called) not in KNOWN:
            found.append(f"{name}:{node.lineno}: {called}")
        for end, (argument, value) in NEEDS.items():
            if called == end or called.endswith(f".{end}"):
                constant = given.get(argument)
                if not (isinstance(constant, ast.Constant) and constant.value == value):
                    found.append(f"{name}:{node.lineno}: {called} without {argument}={value!r}")
        shell = given.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and not shell.value):
            found.append(f"{name}:{node.lineno}: {called} with a shell")
    return found


def test_sources_run_no_data() -> None:
    assert len(SOURCES) > 100
    assert [text for path in SOURCES for text in complaints(path)] == []


def test_what_would_run_data_is_found(tmp_path: Path) -> None:
    bad = (
        "eval(x)", "pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "import urllib.request",
        "from requests import get", "archive.extractall(x)", "yaml.load(x)",
    )  # fmt: skip
    for line in bad:
        (tmp_path / "bad.py").write_text(line)
        assert len(complaints(tmp_path / "bad.py")) == 1, line
    for line in ("model.eval()", "re.compile(x)", "archive.extractall(x, filter='data')"):
        (tmp_path / "good.py").write_text(line)
        assert complaints(tmp_path / "good.py") == []
