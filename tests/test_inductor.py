"""Programs that Inductor writes give what eager calls give, without the dispatcher."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.export import Dim

import natten


def _tensors(*tokens: int, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, *tokens, heads, 8, generator=generator, requires_grad=True) for _ in range(3)
    ]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_no_dispatcher_in_compiled_programs():
    """Neither forward nor backward, and one program serves all sizes."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = natten.na2d(query.sin(), key, value, (3, 5), return_lse=True)
        return out.sin() + lse[..., None]

    def gradients(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).square().sum(), tensors)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    tensors = _tensors(6, 7)
    found, (forward, backward) = run_and_get_code(gradients, compiled, tensors)
    assert "= torch.ops.natten.neighborhood_attention_compiled(" in forward
    assert "= torch.ops.natten.neighborhood_attention_backward_compiled(" in backward
    for code in (forward, backward):
        assert not re.search(r"= torch.ops.natten.\w+.default\(", code)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in ((6, 7), (9, 10)):
            tensors = _tensors(*tokens)
            found = gradients(compiled, tensors)
            for mine, true in zip(found, gradients(attend, tensors), strict=True):
                torch.testing.assert_close(mine, true)


def test_unfused_products_compile():
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return natten.na2d_av(natten.na2d_qk(query, key, 3, 1).softmax(-1), value, 3, 1)

    tensors = [torch.randn(1, 2, 5, 6, 8) for _ in range(3)]
    compiled = torch.compile(attend, fullgraph=True)
    found, (code,) = run_and_get_code(compiled, *tensors)
    torch.testing.assert_close(found, attend(*tensors))
    assert len(re.findall(r"= torch.ops.natten.\w+_compiled\(", code)) == 2


def test_module_compiles():
    """A packed projection and a bias."""
    torch.manual_seed(0)
    module = natten.NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 5, 6, 16, requires_grad=True)
    leaves = [x, *module.parameters()]
    found, expected = (
        torch.autograd.grad(function(x).square().sum(), leaves) for function in (compiled, module)
    )
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_package_of_aot_inductor(tmp_path):
    """A program in C++, for other sizes too."""
    torch.manual_seed(0)
    module = natten.NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True).eval()
    x = torch.randn(2, 6, 7, 16)
    sizes = {0: Dim("batch", max=64), 1: Dim("rows", min=3), 2: Dim("columns", min=3)}
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"x": sizes})
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "module.pt2")
        )
        run = torch._inductor.aoti_load_package(package)
        for shape in (x.shape, (3, 9, 5, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x), module(x))
