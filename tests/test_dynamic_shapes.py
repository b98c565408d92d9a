"""Sizes that compilers keep symbolic: one program for the whole domain of an operation or module.

The domain along an axis is extent >= kernel_size * dilation, the full window included.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch._dynamo.testing
from torch.export import Dim

import natten
from natten.functional.neighborhood import packed_attention


@pytest.fixture(autouse=True)
def _quiet():
    torch._dynamo.reset()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


class Calls(torch.nn.Module):
    """A function as a module, for torch.export."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def check_export(module, traced, dims, others):
    """Export with the first inputs; the program has to be right for the others."""
    program = torch.export.export(module, traced, dynamic_shapes=dims, strict=False).module()
    for tensors in (traced, *others):
        torch.testing.assert_close(program(*tensors), module(*tensors), atol=1e-5, rtol=1e-5)


def grid(*tokens):
    return torch.randn(2, *tokens, 2, 8)


def image(height, width=None):
    return (torch.randn(2, height, height if width is None else width, 16),)


MODULES = {
    "plain": {},
    "bias": {"rel_pos_bias": True},
    "dilated": {"dilation": (1, 2), "kernel_size": (7, 3)},
    "strided, causal": {"stride": 2, "is_causal": (True, False)},
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [7, 12])
def test_export_of_modules(name, size):
    settings = {"kernel_size": 7} | MODULES[name]
    module = natten.NeighborhoodAttention2D(16, 2, **settings).eval()
    # From the smallest grid on, which is the full window, whatever size is traced.
    dims = ({1: Dim("h", min=7, max=64), 2: Dim("w", min=7, max=64)},)
    check_export(module, image(size), dims, [image(7), image(9, 13), image(7, 30)])


def test_export_with_automatic_dims():
    module = natten.NeighborhoodAttention2D(16, 2, 7).eval()
    check_export(module, image(7), ({1: Dim.AUTO, 2: Dim.AUTO},), [image(9), image(7, 12)])


def test_export_of_modules_that_pad():
    """Grids smaller than the window are in the domain, too."""
    module = natten.NeighborhoodAttention2D(16, 2, 7, dilation=(1, 2), pad=True).eval()
    dims = ({1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    others = [image(*size) for size in ((9, 30), (3, 5), (7, 14), (12, 4))]
    check_export(module, image(8, 6), dims, others)
    tokens = natten.nn.PatchTokenizer(3, 16, 4, pad=True).eval()
    images = [(torch.randn(1, 3, *size),) for size in ((32, 32), (33, 70), (64, 7))]
    check_export(tokens, images[0], ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},), images)


def test_export_with_registers():
    module = natten.NeighborhoodAttention2D(16, 2, 3).eval()
    pairs = [(*image(*size), torch.randn(2, 5, 16)) for size in ((4, 5), (9, 8), (3, 3))]
    check_export(module, pairs[0], ({1: Dim.DYNAMIC, 2: Dim.DYNAMIC}, None), pairs)


def test_compile_marked_dynamic_at_the_full_window():
    module = natten.NeighborhoodAttention2D(16, 2, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (7, 9, 12):
        (x,) = image(size)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


FUNCTIONS = {
    "na1d, full window": (lambda q: natten.na1d(q, q, q, 5), (5,)),
    "na2d": (lambda q: natten.na2d(q, q, q, 5, return_lse=True), (5, 6)),
    "na3d": (lambda q: natten.na3d(q, q, q, (2, 5, 5), is_causal=(True, False, False)), (2, 5, 6)),
    "packed": (
        lambda q: packed_attention(
            torch.cat([q, q, q], -2), 2, (5, 5), (1, 1), (1, 1), (False, False)
        ),
        (6, 5),
    ),
    "attention": (lambda q: natten.attention(q, q, q, is_causal=True), (5,)),
    "unfused": (
        lambda q: natten.functional.na2d_av(
            natten.functional.na2d_qk(q.movedim(3, 1), q.movedim(3, 1), 5).softmax(-1),
            q.movedim(3, 1),
            5,
        ),
        (5, 6),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export_of_functions(name):
    function, tokens = FUNCTIONS[name]
    # The batch is traced at 2, where a broadcast of 1 would be another program.
    dims = (dict.fromkeys(range(len(tokens) + 1), Dim.AUTO),)
    larger = tuple(n + 3 for n in tokens)
    others = [(grid(*larger),), (torch.cat([grid(*larger)] * 2),)]
    check_export(Calls(function), (grid(*tokens),), (dims,), others)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (7, 7)])
def test_attention_of_two_lengths(lengths):
    """Which of both is longer is not part of the program."""

    def function(query, key):
        return natten.attention(query, key, key, return_lse=True)

    dims = (({1: Dim("queries", min=2, max=99)}, {1: Dim("keys", min=2, max=99)}),)
    others = [(grid(q), grid(k)) for q, k in ((3, 8), (8, 3), (6, 6))]
    check_export(Calls(function), tuple(map(grid, lengths)), dims, others)


def test_one_program_for_all_packed_batches():
    """Empty ones, too, and sequences of any number and length."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query, ends, longest):
        return natten.attention(
            query, query, query, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends,
            max_seqlen_Q=longest, max_seqlen_KV=longest,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths, total in (
        ([10, 5, 3], 25),
        ([7, 1, 5, 6], 25),
        ([7, 13], 20),
        ([0, 0, 0], 25),
        ([0] * 5, 25),
        ([1, 1], 20),
    ):
        query = torch.randn(1, total, 2, 16, requires_grad=True)
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        got, expected = (f(query, ends, max(lengths)) for f in (compiled, function))
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(out.sum(), query)[0] for out in (got, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


def test_compiled_calls_of_new_sizes_do_not_compile_again():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query, key):
        out = natten.na2d(query, query, query, 3)
        return out + natten.attention(query.flatten(1, 2), key, key).unflatten(1, query.shape[1:3])

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for height, width, keys in ((5, 11, 40), (3, 3, 4), (11, 5, 9), (9, 9, 200)):
        tensors = (grid(height, width), grid(keys))
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nat_mini", dict(depths=(2, 1, 1, 1))),
        ("dinat_mini", dict(depths=(2, 1, 2, 1), dilations=((1, 8), (4,), (1, 2), (1,)))),
    ],
)
def test_export_of_models(name, options):
    """Of each level one block of each kind: others are traced the same way."""
    timm = pytest.importorskip("timm")
    import natten.models  # noqa: F401

    model = timm.create_model(name, num_classes=3, **options).eval()
    traced = (torch.randn(1, 3, 224, 224),)
    dims = ({2: Dim.AUTO, 3: Dim.AUTO},)
    with torch.no_grad():
        check_export(model, traced, dims, [(torch.randn(1, 3, 288, 256),)])
