"""natten.nn on a GPU, in half precision, against the float64 definitions on the CPU."""

from __future__ import annotations

import copy

import pytest
import test_nn_attention
import test_nn_cross_attention
import torch
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Rounding of inputs, weights and results to 11 (8) bits, over sums of some 100 terms of order 1.
BOUNDS = {torch.float16: 0.02, torch.bfloat16: 0.15}


def compare(module: nn.Module, inputs: list[Tensor | None], run, dtype: torch.dtype) -> None:
    """Output and gradients of run(module, *inputs), in dtype on the GPU and float64 on the CPU."""
    # Both see the same, rounded numbers.
    module = module.to(dtype).double()
    inputs = [t if t is None else t.detach().to(dtype).double() for t in inputs]
    results = []
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        here = copy.deepcopy(module).to(device, precision)
        tensors = [t if t is None else t.to(device, precision).requires_grad_() for t in inputs]
        out = run(here, *tensors)
        leaves = [t for t in tensors if t is not None] + list(here.parameters())
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        gradients = torch.autograd.grad((out.float() * weight).sum(), leaves)
        results.append([t.double().cpu() for t in (out, *gradients)])
    for got, wanted in zip(results[1], results[0], strict=True):
        size = wanted.square().mean().sqrt().clamp(min=1e-3)
        worst = (got - wanted).abs().max()
        assert worst < 8 * BOUNDS[dtype] * size.clamp(min=wanted.abs().max() / 8), worst


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", test_nn_attention.CASES)
def test_attention(name, dtype):
    extent, arguments, registers, origin = test_nn_attention.CASES[name]
    module, x, tokens = test_nn_attention.build(extent, arguments, registers)

    def run(module, x, tokens):
        out, out_r = test_nn_attention.run(module, x, tokens, origin)
        return out if out_r is None else torch.cat([out.flatten(1), out_r.flatten(1)], 1)

    compare(module, [x, tokens], run, dtype)


@pytest.mark.parametrize("name", test_nn_cross_attention.CASES)
def test_cross_attention(name):
    module, x, context, lengths, source = test_nn_cross_attention.build(name)

    def run(module, x, context, source):
        return module(x, context, lengths if lengths is None else lengths.to(x.device), source)

    compare(module, [x, context, source], run, torch.bfloat16)


@pytest.mark.parametrize("name", ["rpb", "everything"])
def test_compiled(name):
    extent, arguments, registers, origin = test_nn_attention.CASES[name]
    module, x, tokens = test_nn_attention.build(extent, arguments, registers)

    def run(module, x, tokens):
        if x.is_cuda:
            module = torch.compile(module, fullgraph=True)
        return test_nn_attention.run(module, x, tokens, origin)[0]

    compare(module, [x, tokens], run, torch.bfloat16)
