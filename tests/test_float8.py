"""8-bit queries, keys and values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpu_checks
import numpy as np
import pytest
import torch
from torch import Tensor

import natten
from natten import devices
from natten.float8 import Rounded
from natten.functional.backends.triton import CUTLASS, HOPPER
from natten.functional.problem import Problem, Unavailable
from natten.simulator import make_problem

E4M3 = torch.float8_e4m3fn
FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def inputs(
    tokens: Sequence[int], heads: int = 4, heads_kv: int = 4, head_dim: int = 64, batch: int = 2,
    device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value, whose heads differ in size."""
    generator = torch.Generator().manual_seed(len(tokens) + heads * head_dim)
    made = []
    for number in (heads, heads_kv, heads_kv):
        tensor = torch.randn(batch, *tokens, number, head_dim, generator=generator)
        made.append((tensor * 2.0 ** torch.arange(number)[:, None] / 4).to(device, dtype))
    # Scores of all sizes, but no softmax of one key alone.
    made[1] /= made[1].float().abs().amax().item() / 4
    return made[0], made[1], made[2]


def exact(rounded: Sequence[Rounded], *window: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """In float64."""
    query, key, value = (part.to(torch.float64) for part in rounded)
    function = FUNCTIONS[query.dim() - 3]
    out, lse = function(query, key, value, *window, backend="reference", return_lse=True, **options)
    return out, lse


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_scales_are_those_of_heads() -> None:
    tensor = torch.randn(2, 5, 6, 3, 16) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    tensor[:, :, :, 1] = 0
    found = natten.to_float8(tensor)
    assert found.tensor.dtype == E4M3
    assert found.tensor.shape == tensor.shape
    torch.testing.assert_close(found.scale[[0, 2]], tensor.abs().amax((0, 1, 2, 4))[[0, 2]] / 448)
    assert found.scale[1] == 1
    assert found.tensor.float().abs().amax() == 448
    # Half a step of a mantissa of three bits; below 2**-6 steps are all alike.
    least = found.scale[:, None] * 2.0**-6
    error = (found.to(torch.float32) - tensor).abs()
    assert bool((error <= 2.0**-4 * torch.maximum(tensor.abs(), least)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_rounded_rounds_to_itself(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 7, 2, 8).to(dtype)
    first = natten.to_float8(tensor)
    again = natten.to_float8(first.to(torch.float32), first.scale)
    assert torch.equal(first.tensor.view(torch.uint8), again.tensor.view(torch.uint8))
    assert first.to(dtype).dtype == dtype


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.5, 0.5])])
def test_given_scales(scale: Any) -> None:
    tensor = torch.tensor([1.0, -3.0, 1000.0, -torch.inf]).reshape(1, 1, 1, 4).repeat(1, 1, 2, 1)
    found = natten.to_float8(tensor, scale)
    assert found.scale.tolist() == [0.5, 0.5]
    assert found.to(torch.float32)[0, 0, 1].tolist() == [1.0, -3.0, 224.0, -224.0]


def test_numbers_that_are_not_finite_make_their_head_nan() -> None:
    tensor = torch.randn(1, 3, 3, 4)
    tensor[0, 1, 0, 2], tensor[0, 2, 1, 0] = torch.nan, torch.inf
    found = natten.to_float8(tensor).to(torch.float32)
    assert bool(found[:, :, :2].isnan().all())
    assert bool(found[:, :, 2].isfinite().all())


def test_no_tokens() -> None:
    empty = natten.to_float8(torch.randn(2, 0, 3, 64))
    assert empty.scale.tolist() == [1, 1, 1]
    out, lse = natten.float8_attention(empty, empty, empty, 3, backend="reference", return_lse=True)
    assert out.shape == (2, 0, 3, 64)
    assert lse.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("tokens", "window", "options"),
    [
        ((33,), (7, 3), {"is_causal": True}),
        ((12, 9), ((5, 3), 1, (2, 1)), {"scale": 0.3}),
        ((4, 6, 5), ((2, 3, 5), (1, 2, 1)), {"is_causal": (True, False, False)}),
        ((4, 6, 5), (-1,), {}),
        ((12, 9), ((3, None),), {}),
    ],
)
def test_reference(tokens: tuple[int, ...], window: Any, options: Any) -> None:
    rounded = [natten.to_float8(t) for t in inputs(tokens, heads_kv=2, head_dim=32)]
    out, lse = natten.float8_attention(
        *rounded, *window, backend="reference", return_lse=True, **options
    )
    expected, expected_lse = exact(rounded, *window, **options)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_are_rounded_on_the_way(dtype: torch.dtype) -> None:
    given = inputs((20,), dtype=dtype)
    rounded = [natten.to_float8(t) for t in given]
    expected = natten.float8_attention(*rounded, 5, backend="reference")
    for mixed in (given, (given[0], rounded[1], given[2])):
        found = natten.float8_attention(*mixed, 5, backend="reference")
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-3)


def test_autocast() -> None:
    given = inputs((20,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = natten.float8_attention(*given, 5, backend="reference")
    assert found.dtype == torch.bfloat16


def test_compiled() -> None:
    def attend(*given: Tensor) -> tuple[Tensor, Tensor]:
        rounded = [natten.to_float8(t) for t in given]
        return natten.float8_attention(*rounded, (3, 5), backend="reference", return_lse=True)

    given = inputs((8, 9), head_dim=16)
    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, attend(*given))


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs((8, 9), head_dim=16)
    with FlopCounterMode(display=False) as expected:
        natten.na2d(*given, 3)
    with FlopCounterMode(display=False) as found:
        natten.float8_attention(*given, 3, backend="reference")
    assert found.get_total_flops() == expected.get_total_flops()


def test_operator() -> None:
    rounded = [natten.to_float8(t) for t in inputs((8, 9), head_dim=16)]
    tensors, scales = zip(*rounded)
    window = [3, 3, 1, 1, 1, 1, 0, 0]
    arguments = (*tensors, *scales, window, 0.25, "reference", torch.bfloat16)
    # Other checks compare 8-bit tensors, which torch cannot.
    operator = torch.ops.natten.float8_attention
    torch.library.opcheck(operator, arguments, test_utils=("test_faketensor",))
    with pytest.raises(ValueError, match="dtype must be torch"):
        operator(*arguments[:-1], torch.float32)
    with pytest.raises(ValueError, match=r"key must be in torch\.float8_e4m3fn"):
        operator(tensors[0], tensors[0].float(), *arguments[2:])
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        operator(tensors[0].to("meta"), *arguments[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "tensor must be a torch.Tensor, got int"),
        ((torch.ones(1, 2, 3, 4, dtype=torch.int32),), "floating-point dtype"),
        ((torch.ones(3, 4),), "tensor must have 4, 5 or 6 dimensions"),
        ((torch.ones(1, 2, 3, 4), "1"), "scale must be a number or None"),
        ((torch.ones(1, 2, 3, 4), True), "scale must be a number or None"),
        ((torch.ones(1, 2, 3, 4), 0), "scale must be positive"),
        ((torch.ones(1, 2, 3, 4), torch.inf), "scale must be a finite number"),
        ((torch.ones(1, 2, 3, 4), torch.ones(2)), r"shape \[heads\] = \(3,\)"),
        ((torch.ones(1, 2, 3, 4), torch.ones(3).double()), r"torch.float32, got .* torch.float64"),
        ((torch.ones(1, 2, 3, 4), torch.ones(3).to("meta")), "scale must be on cpu"),
        ((torch.ones(1, 2, 3, 4), torch.tensor([1.0, -1.0, 1.0])), "positive for every head"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_rounding(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natten.to_float8(*arguments)


X = torch.randn(1, 8, 2, 64).bfloat16()
R = natten.to_float8(X)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": 3}, "query must be a torch.Tensor, or what natten.to_float8 returns, got int"),
        ({"key": None}, "key must be a torch.Tensor, or"),
        ({"key": (X, X[0])}, "key must be a torch.Tensor, or what natten.to_float8 returns, got t"),
        ({"value": X.float()}, "value must be in float16 or bfloat16, or what natten.to_float8"),
        ({"query": R.tensor}, "query must be in float16 or bfloat16, or what natten.to_float8"),
        ({"query": Rounded(X, R.scale)}, "query must be in torch.float8_e4m3fn"),
        ({"query": Rounded(R.tensor, 1.0)}, "query's scale must be a torch.Tensor"),
        ({"key": Rounded(R.tensor, R.scale[:1])}, "key's scale must have shape"),
        ({"key": Rounded(R.tensor[0], R.scale)}, "key must have 4, 5 or 6 dimensions"),
        ({"query": X, "key": X.half()}, "one dtype where they are not rounded"),
        ({"key": X[:, :7]}, "query and key must have the same token shape"),
        ({"value": X[:, :7]}, "key and value must match in all dimensions but the last"),
        ({"key": X[..., :32]}, "key must have query's head_dim"),
        ({"query": X[:, :, :1]}, "query's heads must be a multiple"),
        ({"kernel_size": 9}, "kernel_size"),
        ({"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": (3, 3)}, "kernel_size must have 1 values"),
        ({"stride": 4}, "stride must be at most kernel_size"),
        ({"dilation": 0}, "dilation"),
        ({"is_causal": 1}, "is_causal"),
        ({"scale": "1"}, "scale must be a number"),
        ({"backend": 3}, "backend must be a str"),
        ({"return_lse": 1}, "return_lse must be a bool"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    given = {"query": X, "key": X, "value": X, "kernel_size": 3, "backend": "reference"}
    with pytest.raises(ValueError, match=message):
        natten.float8_attention(**given | changes)


def test_gradients_are_refused() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="tensor requires a gradient"):
        natten.to_float8(x)
    with pytest.raises(NotImplementedError, match=r"key requires a gradient.*key\.detach\(\)"):
        natten.float8_attention(X, x, X, 3, backend="reference")
    with torch.no_grad():
        assert not natten.float8_attention(x, x, x, 3, backend="reference").requires_grad


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="in 8 bits all heads have one window"):
        natten.float8_attention(X, X, X, [(3,), (5,)], backend="reference")
    for backend in ("cpu-fna", "cutlass-fna", "flex-fmha"):
        with pytest.raises(NotImplementedError, match="it computes no 8-bit numbers"):
            natten.float8_attention(X, X, X, 3, backend=backend)
    with pytest.raises(NotImplementedError, match="backend must be None or one of"):
        natten.float8_attention(X, X, X, 3, backend="hopper")
    with pytest.raises(NotImplementedError, match=r"hopper: it runs on cuda tensors.*reference: "):
        natten.float8_attention(X, X, X, 3)
    with pytest.raises(RuntimeError, match="hopper: it runs on cuda tensors"):
        natten.float8_attention(X, X, X, 3, backend="hopper-fmha")


def _problem(**changes: Any) -> Problem:
    settings = {"heads": 4, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"} | changes
    return make_problem((48, 48), (13, 13), **settings)


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("h100", {}, None),
        ("h200", {"heads_kv": 2, "head_dim": 64, "is_causal": True}, None),
        ("a100", {}, "needs a Hopper GPU"),
        ("b200", {}, "needs a Hopper GPU"),
        ("h100", {"head_dim": 96}, r"must be equal and one of \(64, 128\), got 96 and 96"),
        ("h100", {"head_dim_v": 64}, "got 128 and 64"),
        ("h100", {"dilation": (1, 2)}, r"dilation must be 1, got \(1, 2\)"),
    ],
)
def test_refusals(device: str, changes: dict[str, Any], reason: str | None) -> None:
    pytest.importorskip("triton")
    with devices.pretending(devices.find(device)):
        found = HOPPER.float8_refusal(_problem(**changes), False)
    assert (found is None) == (reason is None)
    assert reason is None or re.search(reason, str(found))
    assert isinstance(found, Unavailable) == ("needs" in str(reason))
    assert CUTLASS.float8_refusal(_problem(**changes), True) is not None


def test_signature() -> None:
    parameters = list(inspect.signature(natten.float8_attention).parameters)
    expected = list(inspect.signature(natten.functional.neighborhood_attention_generic).parameters)
    assert parameters[:8] == expected[:8]
    assert {"float8_attention", "to_float8"} <= set(natten.__all__)


class _Words:
    """Shared memory, as numbers of 32 bits."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def slice(self, start: int, length: int, axis: int) -> _Words:
        index = [slice(None), slice(None)]
        index[axis] = slice(start, start + length)
        return _Words(self.numbers[tuple(index)])

    def load(self, layout: Any) -> Tensor:
        return torch.from_numpy(self.numbers.copy())

    def store(self, tensor: Tensor) -> None:
        self.numbers[...] = tensor.numpy()


def _execute(text: str, words: list[Tensor]) -> list[Tensor]:
    """What a program of byte permutations alone gives."""
    registers = {f"${4 + n}": w.numpy().astype("<i4") for n, w in enumerate(words)}
    for to, first, second, selector in re.findall(r"prmt\.b32 (\S+), (\S+), (\S+), (\w+);", text):
        pair = [registers[name][..., None].view(np.uint8) for name in (first, second)]
        source = np.concatenate(pair, -1)
        order = [int(selector, 16) >> shift & 15 for shift in (0, 4, 8, 12)]
        registers[to] = np.ascontiguousarray(source[..., order]).view("<i4")[..., 0]
    return [torch.from_numpy(registers[f"${n}"]) for n in range(4)]


@pytest.mark.parametrize("features", [64, 128])
def test_turned_values_go_with_weights(features: int) -> None:
    """The kernel's own functions, of numpy's memory and torch's tensors."""
    launcher = pytest.importorskip("natten.functional.backends.triton.launcher")
    kernels = launcher.in_gluon("hopper_float8")
    if kernels is None:
        pytest.skip("this Triton has no Gluon")
    language = SimpleNamespace(
        split=lambda x: x.unbind(-1),
        join=lambda a, b: torch.stack([a, b], -1),
        inline_asm_elementwise=lambda text, _, words, **__: _execute(text.value, words),
        NVMMASharedLayout=lambda *_: None,
        int32=None, constexpr=None,
    )  # fmt: skip
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (128, features), dtype=np.uint8)
    turned = np.zeros((features, 128), np.uint8)

    def as_numbers(memory: np.ndarray, dtype: Any, shape: list[int], layout: Any) -> _Words:
        words = memory.view("<i4")
        assert list(words.shape) == shape
        return _Words(words)

    with (
        mock.patch.object(kernels, "gl", language),
        mock.patch.object(kernels, "as_numbers", as_numbers),
        mock.patch.object(kernels, "words_layout", return_value=None),
    ):
        for half in (0, 1):
            kernels.turn.fn(values, turned, half, features)
    weights = torch.from_numpy(random.integers(0, 256, (64, 128)))
    found = kernels.in_order.fn(weights, 64) @ torch.from_numpy(turned.astype(np.int64)).T
    assert torch.equal(found, weights @ torch.from_numpy(values.astype(np.int64)))


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "head_dim"),
    [((4096,), (4096,), 128), ((64, 64), (40, 40), 64), ((16, 24, 40), (9, 12, 12), 128)],
)
def test_kernel(tokens: tuple[int, ...], kernel_size: tuple[int, ...], head_dim: int) -> None:
    """What the compiler makes of it, without a GPU."""
    pytest.importorskip("triton")
    import test_triton_compile as compiler
    from compiling import compiling

    from natten.functional.backend import Inputs

    if compiler.in_gluon("hopper_float8") is None:
        pytest.skip("this Triton has no Gluon")
    problem = make_problem(
        tokens, kernel_size, heads=4, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    tensor = torch.empty((1, *tokens, 4, head_dim), dtype=E4M3, device="meta")
    scale = torch.empty(4, device="meta")
    with compiling(90) as kernels:
        assert HOPPER.float8_refusal(problem, True) is None
        HOPPER.float8_forward(problem, Inputs(tensor, tensor, tensor), (scale,) * 3)
    (kernel,) = kernels.values()
    taken, text = compiler.resources(kernel), compiler.instructions(kernel)
    assert taken["stack"] == 0
    assert taken["shared"] <= devices.find("h100").shared_memory
    assert not compiler.register_operands(kernel.asm["ttgir"])
    # Weights move neither between threads nor through memory.
    assert "SHFL.IDX" not in text
    # Two products of 32 features or keys at a time, by each of two groups of warps, which wait for
    # each product once: the assembler does not wait for each instruction.
    assert len(re.findall(r"\bQGMMA\.64x", text)) == 2 * (head_dim // 32 + 128 // 32)
    assert len(re.findall(r"WARPGROUP\.DEPBAR", text)) == 2 * 2


# Tokens, what follows query, key and value, and options.
GPU_CASES: dict[str, tuple[Any, ...]] = {
    "1d": ((700,), (129,), {}),
    "1d_strided": ((1000,), (200, 16), {}),
    "1d_causal": ((600,), (333, 2), {"is_causal": True}),
    "1d_short": ((37,), (5,), {}),
    "2d": ((50, 43), ((21, 17),), {}),
    "2d_narrow": ((90, 5), ((30, 3),), {"scale": 0.4}),
    "2d_strided": ((48, 64), ((16, 24), (8, 3)), {}),
    "2d_causal": ((40, 40), ((33, 20),), {"is_causal": (False, True)}),
    "2d_negative": ((40, 40), ((13, 20),), {"scale": -0.1}),
    "3d": ((10, 14, 18), ((5, 7, 9),), {}),
    "3d_causal": ((9, 15, 12), ((4, 8, 12),), {"is_causal": (True, False, False)}),
    "3d_strided": ((12, 16, 16), ((6, 8, 8), (2, 4, 8)), {}),
    "dense": ((19, 23), (-1,), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_a_gpu(case: str, heads: tuple[int, int], head_dim: int) -> None:
    if not gpu_checks.has_hopper():
        pytest.skip("a kernel for Hopper")
    tokens, window, options = GPU_CASES[case]
    given = inputs(tokens, *heads, head_dim, device="cuda")
    rounded = [natten.to_float8(t) for t in given]
    out, lse = natten.float8_attention(*rounded, *window, return_lse=True, **options)
    expected, expected_lse = exact(rounded, *window, **options)
    assert out.dtype == torch.bfloat16
    for head in range(heads[0]):
        # Weights are rounded to a mantissa of three bits.
        assert relative(out[..., head, :], expected[..., head, :]) <= 0.04
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=5e-3)


@pytest.mark.gpu
def test_layouts_on_a_gpu() -> None:
    """Views into other tensors, heads of zeros, results in float16, and tensors as they are."""
    if not gpu_checks.has_hopper():
        pytest.skip("a kernel for Hopper")
    packed = torch.randn(2, 30, 30, 3, 4, 64, device="cuda", dtype=torch.float16)
    packed[..., 1, :] = 0
    given = packed.unbind(3)
    rounded = [natten.to_float8(t) for t in given]
    expected, _ = exact(rounded, 11)
    found = natten.float8_attention(*given, 11)
    assert found.dtype == torch.float16
    assert not found[..., 1, :].any()
    assert relative(found, expected) <= 0.04
    whole = torch.stack([part.tensor.view(torch.uint8) for part in rounded], 3).view(E4M3)
    views = [Rounded(t, part.scale) for t, part in zip(whole.unbind(3), rounded)]
    assert torch.equal(natten.float8_attention(*views, 11), natten.float8_attention(*rounded, 11))
    odd = [Rounded(part.tensor.movedim(1, 2), part.scale) for part in rounded]
    assert relative(natten.float8_attention(*odd, 11), expected.movedim(1, 2)) <= 0.04


@pytest.mark.gpu
def test_known_weights_on_a_gpu() -> None:
    """One key has all the weight: it comes with its own values, wherever it is in a tile."""
    if not gpu_checks.has_hopper():
        pytest.skip("a kernel for Hopper")
    for key in range(0, 384, 5):
        keys = torch.zeros(1, 384, 1, 128, device="cuda")
        keys[0, key, 0] = 8
        values = torch.zeros(1, 384, 1, 128, device="cuda")
        values[0, key, 0] = torch.arange(128) % 15 + 1
        queries = torch.full((1, 384, 1, 128), 8.0, device="cuda")
        rounded = [natten.to_float8(t, 1.0) for t in (queries, keys, values)]
        out = natten.float8_attention(*rounded, -1)
        assert torch.equal(out.float(), values[:, key : key + 1].expand_as(out))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tiles_on_a_gpu(head_dim: int) -> None:
    """Rings turn around often, and halves of programs drift apart."""
    if not gpu_checks.has_hopper():
        pytest.skip("a kernel for Hopper")
    given = inputs((5000,), 8, 8, head_dim, device="cuda")
    rounded = [natten.to_float8(t) for t in given]
    first, first_lse = natten.float8_attention(*rounded, -1, return_lse=True)
    expected, expected_lse = exact(rounded, -1)
    assert relative(first, expected) <= 0.04
    torch.testing.assert_close(first_lse.double(), expected_lse, rtol=1e-3, atol=5e-3)
    for _ in range(20):
        again, again_lse = natten.float8_attention(*rounded, -1, return_lse=True)
        assert torch.equal(again, first)
        assert torch.equal(again_lse, first_lse)


@pytest.mark.gpu
def test_in_a_graph_and_compiled_on_a_gpu() -> None:
    if not gpu_checks.has_hopper():
        pytest.skip("a kernel for Hopper")

    def attend(*given: Tensor) -> Tensor:
        return natten.float8_attention(*[natten.to_float8(t) for t in given], 15)

    given = inputs((40, 40), device="cuda")
    expected = attend(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(*given)
    graph.replay()
    assert torch.equal(found, expected)
    compiled = torch.compile(attend, fullgraph=True)(*given)
    assert relative(compiled, expected.double()) <= 0.02
