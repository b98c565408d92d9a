"""Exported programs in torch's own operators, and in ONNX."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import CASES
from checks import make_inputs, run
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import natten
from natten.functional import decompositions

D = Dim.DYNAMIC


class Decomposing(TorchDispatchMode):
    """Runs the decomposition in the operator's place."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        function = decompositions().get(function, function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_cases(case):
    inputs = make_inputs(case, torch.float64)
    with torch.no_grad():
        expected = run(case, inputs, "reference")
        with Decomposing():
            found = run(case, inputs, "reference")
    for mine, true in zip(found, expected):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


class Calls(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def grid(*tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, *tokens, 2, 8)


def _everything(q: Tensor, context: Tensor, rpb: Tensor, sink: Tensor, valid: Tensor) -> Any:
    return natten.na2d(
        q, q, q, (3, 2), stride=(2, 1), dilation=(1, 2), additional_keys=context,
        additional_values=context, rpb=rpb, sink=sink, softcap=3.0, key_mask=valid,
        return_lse=True,
    )  # fmt: skip


# A module, how many of the first dimensions of its inputs are dynamic, and inputs, the first of
# which are traced: some at the full window, which is a size like any other.
PROGRAMS: dict[str, tuple[Any, tuple[int, ...], list[tuple[Tensor, ...]]]] = {
    "na1d": (
        Calls(lambda q: natten.na1d(q, q, q, 5, is_causal=True)),
        (2,),
        [(grid(5),), (grid(9, batch=3),)],
    ),
    "na2d": (
        Calls(lambda q: natten.na2d(q, q, q, (3, 5), dilation=(2, 1), return_lse=True)),
        (3,),
        [(grid(8, 5),), (grid(6, 9, batch=3),), (grid(7, 5, batch=1),)],
    ),
    "attention": (
        Calls(lambda q, k: natten.attention(q, k, k, return_lse=True)),
        (2, 2),
        [(grid(8), grid(5)), (grid(3, batch=4), grid(7, batch=4))],
    ),
    "everything": (
        Calls(_everything),
        (3, 1, 0, 0, 3),
        [
            (grid(*size), grid(3), torch.randn(2, 5, 3), torch.randn(2), torch.rand(2, *size) < 0.7)
            for size in ((6, 8), (9, 5))
        ],
    ),
    "module": (
        natten.NeighborhoodAttention2D(16, 2, (3, 5), rel_pos_bias=True).eval(),
        (3,),
        [(torch.randn(2, 3, 5, 16),), (torch.randn(3, 9, 7, 16),)],
    ),
    "block": (
        natten.nn.NeighborhoodTransformerBlock(16, 2, kernel_size=(2, 3, 3), rank=3).eval(),
        (4,),
        [(torch.randn(2, 4, 5, 6, 16),), (torch.randn(1, 2, 7, 3, 16),)],
    ),
}


def _sizes(dynamic: tuple[int, ...], module: torch.nn.Module) -> Any:
    sizes = tuple(dict.fromkeys(range(number), D) for number in dynamic)
    return (sizes,) if isinstance(module, Calls) else sizes


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    module, dynamic, (traced, *others) = PROGRAMS[name]
    program = torch.export.export(module, traced, dynamic_shapes=_sizes(dynamic, module))
    table = torch.export.default_decompositions() | decompositions()
    program = program.run_decompositions(table)
    assert not any("natten" in str(node.target) for node in program.graph.nodes)
    for tensors in (traced, *others):
        torch.testing.assert_close(
            program.module()(*tensors), module(*tensors), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("tracing", ["real", "symbolic"])
def test_make_fx(tracing):
    query = grid(6, 7)
    function = PROGRAMS["na2d"][0].function
    traced = make_fx(function, decompositions(), tracing)(query)
    assert "natten" not in traced.code
    other = query if tracing == "real" else grid(9, 5, batch=3)
    torch.testing.assert_close(traced(other), function(other))


def test_functionalize():
    """The operator and its derivatives."""
    query = grid(6, 7).double()

    def gradient(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: natten.na2d(q, q, q, 3).square().sum())(q)

    def slope(q: Tensor) -> Any:
        return torch.func.jvp(gradient, (q,), (q.cos(),))

    for function in (lambda q: natten.na2d(q, q, q, 3), gradient, slope):
        torch.testing.assert_close(torch.func.functionalize(function)(query), function(query))
    traced = make_fx(torch.func.functionalize(slope))(query)
    torch.testing.assert_close(traced(query), slope(query))


def check_onnx(module: Any, dynamic: Any, traced: tuple[Tensor, ...], *others: Any) -> None:
    """What ONNX Runtime makes of a program."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            module, traced, dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        names = [value.name for value in session.get_inputs()]
        for tensors in (traced, *others):
            given = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
            found = [torch.from_numpy(array) for array in session.run(None, given)]
            expected = module(*tensors)
            expected = [expected] if isinstance(expected, Tensor) else list(expected)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _packed(query: Tensor, ends: Tensor) -> Tensor:
    return natten.attention(
        query, query, query, is_causal=True, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends,
        max_seqlen_Q=12, max_seqlen_KV=12,
    )  # fmt: skip


def test_packed_sequences_in_onnx():
    """Any number of them; tokens behind the last one see nothing."""
    packed = [
        (grid(sum(lengths) + 2, batch=1), torch.tensor([0, *lengths]).cumsum(0).int())
        for lengths in ([5, 0, 9], [3, 12, 1, 4])
    ]
    check_onnx(Calls(_packed), (({1: D}, {0: D}),), *packed)


@pytest.mark.parametrize("name", PROGRAMS)
def test_onnx(name):
    module, dynamic, tensors = PROGRAMS[name]
    check_onnx(module, _sizes(dynamic, module), *tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nat_mini", dict(depths=(1, 1, 1, 1))),
        ("dinat_mini", dict(depths=(2, 1, 1, 1), dilations=((1, 8), (4,), (2,), (1,)))),
    ],
)
def test_models_in_onnx(name, options):
    timm = pytest.importorskip("timm")
    import natten.models  # noqa: F401

    model = timm.create_model(name, num_classes=3, **options).eval()
    images = [(torch.randn(2, 3, 224, 224),), (torch.randn(1, 3, 288, 256),)]
    check_onnx(model, ({0: D, 2: D, 3: D},), *images)
