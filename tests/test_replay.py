"""Calls that are done again on other tensors give what they give the first time."""

from __future__ import annotations

import ctypes
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import natten
from natten.functional import known, operators
from natten.simulator import make_problem

pytest.importorskip("triton")

from compiling import compiling, without_memory

from natten.functional.backends.triton import CUTLASS, replay
from natten.functional.neighborhood import packed_attention
from natten.functional.problem import DEFAULT_CONFIG

# PTX names of Triton's types.
PTX = {"i32": ".u32", "i64": ".u64", "fp32": ".f32", "i1": ".u8"}


@pytest.mark.parametrize(
    ("grid", "kernel_size", "num_additional"), [((12, 14), (3, 5), 0), ((40,), (5,), 9)]
)
def test_arguments_are_those_of_the_kernel(grid, kernel_size, num_additional):
    """One by one, in number and type, what the compiled kernel declares."""
    problem = make_problem(
        grid, kernel_size, heads=2, head_dim=64, dtype=torch.float16, device="cuda"
    )
    problem = replace(problem, num_additional=num_additional, requires_grad=True)
    given = without_memory(problem)
    with compiling(90) as kernels:
        CUTLASS.forward(problem, DEFAULT_CONFIG, given.inputs)
        CUTLASS.backward(problem, DEFAULT_CONFIG, given.inputs, given.results, given.needs)
    assert len(kernels) >= 3
    for kernel in kernels.values():
        signature = tuple(kernel.src.signature.values())
        leaves = replay.flat(signature, _as_wide_as(signature))
        entry = re.search(r"\.entry \w+\((.*?)\)", kernel.asm["ptx"], re.DOTALL)
        expected = [".u64" if kind.startswith("*") else PTX[kind] for kind, _ in leaves]
        # And two scratch buffers.
        assert re.findall(r"\.param (\.\w+)", entry.group(1)) == [*expected, ".u64", ".u64"]


def _as_wide_as(signature: Any) -> Any:
    return tuple(_as_wide_as(s) if isinstance(s, tuple) else 0 for s in signature)


class Config(ctypes.Structure):
    """CUlaunchConfig, as CUDA's header declares it."""

    _fields_ = (
        *[(f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"],
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )

    def fields(self) -> list[Any]:
        return [getattr(self, name) for name, _ in self._fields_]


class _Driver:
    """Does what a kernel of two addresses and three numbers would: twelve numbers times the scale,
    plus the factor."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, config: Any, function: Any, places: Any, _extra: Any) -> int:
        *extents, stream, attributes, count = Config.from_address(config.value).fields()
        assert (attributes, count) == (None, 0)
        table = (ctypes.c_void_p * 6).from_address(places.value)
        source, target, factor, scale = (ctypes.string_at(table[i], 8) for i in range(4))
        numbers = struct.unpack("<q", source) + struct.unpack("<q", target)
        numbers += struct.unpack("<i4x", factor) + struct.unpack("<f4x", scale)
        # Scratch buffers are null pointers.
        assert all(ctypes.string_at(table[i], 8) == bytes(8) for i in (4, 5))
        self.seen.append((function.value, tuple(extents), stream, numbers))
        _kernel(*numbers)
        return 0


def _kernel(source: int, target: int, factor: int, scale: float) -> None:
    row = ctypes.c_float * 12
    row.from_address(target)[:] = [x * scale + factor for x in row.from_address(source)]


def _compiled(function: int) -> Any:
    metadata = SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
        profile_scratch_size=0, num_warps=4, shared=128,
    )  # fmt: skip
    signature = {"source": "*fp32", "more": ("*fp32", ("i32", "constexpr")), "scale": "fp32"}
    return SimpleNamespace(
        metadata=metadata,
        function=function,
        src=SimpleNamespace(signature=signature),
        name="kernel",
    )


@pytest.fixture
def driver():
    found = _Driver()

    def empty(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype)

    with (
        mock.patch.object(replay, "_driver", return_value=found),
        mock.patch.object(replay, "empty_cuda", empty),
        mock.patch.object(torch._C, "_cuda_getDevice", return_value=None, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=77, create=True),
    ):
        yield found


def test_launches_on_other_tensors(driver):
    """Addresses follow the tensors: of an input, inside of one, of memory allocated on the way."""

    def call(x: Tensor) -> tuple[Tensor, None]:
        between = torch.empty(4, 4)
        out = x.new_empty(12)
        replay.note(_compiled(1), 5, (x, (between, (7, None)), 0.5))
        replay.note(_compiled(2), 6, (between.view(16)[4:], (out, (-9, None)), 0.25))
        return out.view(3, 4), None

    x = torch.randn(2, 6)
    (out, nothing), again = replay.record(lambda: call(x), [x])
    assert nothing is None
    assert again is not None
    for _ in range(2):
        y = torch.randn(2, 6)
        out, nothing = again([y], [y.data_ptr()])
        assert nothing is None
        assert out.shape == (3, 4)
        assert out.is_contiguous()
        (first, second), driver.seen = driver.seen, []
        assert first[:3] == (1, (5, 1, 1, 128, 1, 1, 128), 77)
        assert second[:3] == (2, (6, 1, 1, 128, 1, 1, 128), 77)
        assert first[3][0] == y.data_ptr()
        assert first[3][2:] == (7, 0.5)
        assert second[3][0] == first[3][1] + 16
        assert second[3][1:] == (out.data_ptr(), -9, 0.25)


def _launch(source: Tensor, target: Tensor, factor: int, scale: float) -> None:
    _kernel(source.data_ptr(), target.data_ptr(), factor, scale)
    replay.note(_compiled(1), 5, (source, (target, (factor, None)), scale))


def _of_a_part(x: Tensor) -> tuple[Tensor, ...]:
    """Kernels on views of an input, and of what an operation gave."""
    out, padded = torch.empty(2, 12), F.pad(x[1], (4, 0))
    _launch(x[0], out[1], 3, 2.0)
    _launch(padded[4:], out[0], 1, -1.0)
    return (out,)


def _sums(x: Tensor) -> tuple[Tensor, ...]:
    """Results that operations made, one of them a view, from what kernels wrote."""
    between = torch.empty(12)
    between.zero_()
    _launch(x[1], between, 5, 0.5)
    parts = between.view(3, 4)
    return parts.sum(0), torch.cat([parts, x[0].view(3, 4)]).t(), None


def _in_place(x: Tensor) -> tuple[Tensor, ...]:
    """Memory that operations change before and after a kernel, through views too; returned whole,
    in another shape, and in part."""
    out, more = torch.empty(12), torch.full((12,), 2.0)
    out.copy_(x[0])
    _launch(out, out, 1, 3.0)
    out.view(3, 4)[1].mul_(more.view(3, 4)[2])
    return out.view(4, 3), out[2:5]


def _sliced(x: Tensor) -> tuple[Tensor, ...]:
    """Memory of which a part is returned."""
    out = torch.empty(16)
    _launch(x[0], out, 1, 3.0)
    return (out[:12],)


def _unused(x: Tensor) -> tuple[Tensor, ...]:
    """Operations that nobody needs."""
    out = torch.empty(12)
    _launch(x.contiguous()[1], out, 1, 3.0)
    (x + 1).exp()
    return (out,)


def _empty(x: Tensor) -> tuple[Tensor, ...]:
    """Results without memory, as gradients that nobody asks for."""
    out = torch.empty(12)
    _launch(x[1], out, 1, 3.0)
    return x.new_empty(0), out, x.new_empty(0)


@pytest.mark.parametrize("call", [_of_a_part, _sums, _in_place, _sliced, _unused, _empty])
def test_operations_of_torch_are_done_again(driver, call):
    """Between launches and after, on other tensors, with the results of a call from scratch."""
    x = torch.randn(2, 12)
    _, again = replay.record(lambda: call(x), [x])
    assert again is not None
    assert len(again.steps) == 1 or call is not _unused
    for _ in range(2):
        y = torch.randn(2, 12)
        found, expected = again([y], [y.data_ptr()]), call(y)
        assert len(found) == len(expected)
        for mine, true in zip(found, expected, strict=True):
            assert (mine is None) == (true is None)
            if true is not None:
                assert mine.stride() == true.stride()
                assert torch.equal(mine, true)
                assert mine.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


def test_a_tensor_that_is_given_twice(driver):
    """And two tensors at one address."""

    def call(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor]:
        out = torch.empty(12)
        _launch(x, out, 3, 2.0)
        return (out + y * z,)

    for same in (lambda x: (x, x, x), lambda x: (x, x[:], x.view(12))):
        x, y = same(torch.randn(12)), same(torch.randn(12))
        _, again = replay.record(lambda x=x: call(*x), list(x))
        (found,) = again(list(y), [t.data_ptr() for t in y])
        assert torch.equal(found, call(*y)[0])


_ELSEWHERE = torch.ones(12)


@pytest.mark.parametrize(
    "more",
    [
        lambda x, out: _launch(_ELSEWHERE, out, 7, 0.5),
        lambda x, out: out.add_(_ELSEWHERE),
        lambda x, out: out.mul_(float(x.sum())),
        lambda x, out: replay.note(None, 5, ()),
    ],
)
def test_what_may_change_is_not_done_again(driver, more):
    """A call that looks at values or at tensors from elsewhere."""

    def call(x: Tensor) -> tuple[Tensor]:
        out = torch.empty(12)
        _launch(x, out, 7, 0.5)
        more(x, out)
        return (out,)

    x = torch.randn(2, 6)
    (out,), again = replay.record(lambda: call(x), [x])
    assert out.shape == (12,)
    assert again is None
    assert replay.record(lambda: (x.view(12),), [x])[1] is None


# --- on a GPU


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return natten.attention(
        q, k, v, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends, max_seqlen_Q=569,
        max_seqlen_KV=569, return_lse=True,
    )  # fmt: skip


KINDS: dict[str, Any] = {
    "2-D": lambda q, k, v: natten.na2d(q, k, v, (5, 7), return_lse=True),
    "2-D, dilated and causal": lambda q, k, v: natten.na2d(
        q, k, v, (5, 3), dilation=(2, 3), is_causal=(True, False), return_lse=True
    ),
    "strided, with a scale": lambda q, k, v: natten.na2d(
        q, k, v, (8, 8), stride=(4, 2), scale=-0.3, return_lse=True
    ),
    "cutlass": lambda q, k, v: natten.na2d(q, k, v, (9, 7), backend="cutlass-fna"),
    "hopper": lambda q, k, v: natten.na2d(q, k, v, (9, 7), backend="hopper-fna"),
    "ping-pong": lambda q, k, v: natten.na2d(q, k, v, (20, 18), return_lse=True),
    "everything": lambda q, k, v: natten.na2d(q, k, v, (24, 30)),
    "rpb": lambda q, k, v: natten.na2d(q, k, v, (5, 7), rpb=q.new_ones(q.shape[-2], 9, 13)),
    "groups of heads": lambda q, k, v: natten.na2d(
        q, k.repeat(1, 1, 1, 2, 1), v.repeat(1, 1, 1, 2, 1), [(5, 7), (20, 18)], return_lse=True
    ),
    "wide values": lambda q, k, v: natten.na2d(q, k, v.repeat(1, 1, 1, 1, 5), (5, 7)),
    "packed heads": lambda q, k, v: packed_attention(
        torch.cat([q, k, v], -2), k.shape[-2], (5, 7), (1, 1), (1, 1), (False, False)
    ),
    "packed sequences": lambda q, k, v: _attend_packed(
        *(t[:1].flatten(1, 2) for t in (q, k, v)),
        q.new_tensor([0, 100, 131, 700], dtype=torch.int32),
    ),
    "one tensor for all": lambda q, k, v: natten.na2d(q, q, q, (5, 7)) + 0 * (k + v).sum(),
    "additional keys": lambda q, k, v: natten.na2d(
        q, k, v, (5, 7), additional_keys=k[:, 0, :9], additional_values=v[:, 0, :9]
    ),
}


def _data(seed: int, heads_kv: int, packed: bool, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = 4 + 2 * heads_kv if packed else 4
    counts = [heads] if packed else [heads, heads_kv, heads_kv]
    shapes = [(2, 24, 30, count, 64) for count in counts]
    tensors = [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes]
    if packed:
        tensors = list(tensors[0].split([4, heads_kv, heads_kv], -2))
    return [t.detach().requires_grad_() for t in tensors]


def _both(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    found = function(*tensors)
    found = list(found) if isinstance(found, tuple) else [found]
    return [*found, *torch.autograd.grad([f.float().square().sum() for f in found], tensors)]


def _from_scratch(known, tensors):
    return known.compute(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ["bfloat16", "float32", "views of one tensor", "in order"])
@pytest.mark.parametrize("kind", KINDS)
def test_again_on_a_gpu(kind, settings):
    """The third and later calls give the bits of a call that is made from scratch."""
    dtype = torch.float32 if settings == "float32" else torch.bfloat16
    if kind in ("hopper", "ping-pong") and dtype == torch.float32:
        pytest.skip("half precision only")
    packed = settings == "views of one tensor"
    with natten.use_deterministic_algorithms(settings == "in order" or kind == "everything"):
        for seed in range(5):
            tensors = _data(seed, 2, packed, dtype)
            found = _both(KINDS[kind], tensors)
            with mock.patch.object(known.Known, "run", _from_scratch):
                true = _both(KINDS[kind], tensors)
            for mine, exact in zip(found, true, strict=True):
                if settings == "in order" or mine.shape == found[0].shape:
                    assert torch.equal(mine, exact)
                torch.testing.assert_close(mine, exact)


@pytest.mark.gpu
def test_again_on_streams_and_devices():
    """On the stream of the moment, in a CUDA graph, and from several threads at once."""

    def attend(seed: int) -> tuple[Tensor, Tensor]:
        tensors = _data(seed, 4, False, torch.bfloat16)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            out = natten.na2d(*tensors, (5, 7))
        torch.cuda.synchronize()
        with mock.patch.object(known.Known, "run", _from_scratch):
            return out, natten.na2d(*tensors, (5, 7))

    for seed in range(3):
        torch.testing.assert_close(*attend(seed), rtol=0, atol=0)

    def many(seed: int) -> Tensor:
        tensors = _data(seed, 4, False, torch.bfloat16)
        for _ in range(50):
            out = natten.na2d(*tensors, (5, 7))
        return out

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(many, range(8)))
    for seed, out in enumerate(found):
        assert torch.equal(out, many(seed))
    tensors = _data(11, 4, False, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = natten.na2d(*tensors, (5, 7))
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor.flip(1))
    graph.replay()
    assert torch.equal(out, natten.na2d(*tensors, (5, 7)))


def test_profiles_change_who_runs_a_call():
    """Nothing that was recorded before a profile is loaded is done again after."""
    natten.na1d(*(torch.randn(1, 9, 1, 8) for _ in range(3)), 3)
    assert operators._calls
    assert known._known
    natten.load_profile(None)
    assert not operators._calls
    assert not known._known
