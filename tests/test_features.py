"""The table of docs/operations.md that says which features go with what: every cell is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import GridLayout, viz
from natten.functional import na2d_qk
from natten.nn import (
    NeighborhoodAttention2D,
    NeighborhoodBackbone,
    NeighborhoodCrossAttention2D,
    NeighborhoodTransformerBlock,
)
from natten.varlen import neighborhood_attention_varlen

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
GRID = (6, 8)
LAYOUT = GridLayout([(6, 4), (5, 8)])
MASK = torch.arange(2 * 6 * 8).view(2, 6, 8) % 5 > 0
# Window and further arguments of each column. Masks and sinks are tensors of a call, and flags or
# an argument of the call of modules.
FEATURES: dict[str, dict[str, Any]] = {
    "circular": {"kernel_size": 3, "is_circular": (False, True)},
    "upsampling": {"kernel_size": 3, "upsampling": (2, 1)},
    "small grids": {"kernel_size": 7, "clip_window": True},
    "whole axes": {"kernel_size": (-1, 3)},
    "groups of heads": {"kernel_size": [(3, 3), (5, 3)]},
    "masks": {"kernel_size": 3, "key_mask": MASK, "query_mask": MASK},
    "soft cap": {"kernel_size": 3, "softcap": 2.0},
    "sink": {"kernel_size": 3, "sink": torch.ones(4, dtype=torch.float64)},
    "layouts": {"kernel_size": 3},
}


def rows() -> Iterator[tuple[str, str, str]]:
    """Row, column and text of each cell."""
    text = PAGE.read_text().partition("## What goes with what")[2]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    columns = [name.strip() for name in lines[0][1:]]
    assert columns == list(FEATURES)
    for name, *cells in lines[2 : 2 + len(DOORS)]:
        for column, cell in zip(columns, cells, strict=True):
            yield name.strip(), column, cell.strip()


def call(feature: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A call of the feature, and its tensors."""
    torch.manual_seed(0)
    options = FEATURES[feature]
    to: Any = {"dtype": torch.float64}
    if feature == "layouts":
        packed = [torch.randn(1, LAYOUT.total, 4, 8, **to) for _ in range(3)]
        return lambda *t: neighborhood_attention_varlen(*t, LAYOUT, **options), packed
    factors = options.get("upsampling", (1, 1))
    fine = [n * factor for n, factor in zip(GRID, factors, strict=True)]
    tensors = [torch.randn(2, *shape, 4, 8, **to) for shape in (fine, GRID, GRID)]
    return lambda *t: natten.na2d(*t, **options), tensors


def derivatives(feature: str) -> None:
    attend, tensors = call(feature)
    tangents = [torch.randn_like(t) for t in tensors]
    out, slope = torch.func.jvp(attend, tuple(tensors), tuple(tangents))
    weights = torch.randn_like(out)
    _, pull = torch.func.vjp(attend, *tensors)
    inner = sum((g * t).sum() for g, t in zip(pull(weights), tangents, strict=True))
    assert_close((weights * slope).sum(), inner, rtol=1e-9, atol=1e-9)
    both = torch.func.vmap(attend)(*[torch.stack([t, t.flip(0)]) for t in tensors])
    assert_close(both[0], out)
    assert_close(both[1], attend(*[t.flip(0) for t in tensors]))


def programs(feature: str) -> None:
    attend, tensors = call(feature)
    expected = attend(*tensors)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert_close(compiled(*tensors), expected)
    torch.compiler.reset()

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    program = torch.export.export(Module(), tuple(tensors), strict=False)
    assert_close(program.module()(*tensors), expected)
    assert_close(torch.func.functionalize(attend)(*tensors), expected)


def precompile(feature: str) -> None:
    pytest.importorskip("triton")
    attend, tensors = call(feature)
    options = FEATURES[feature]
    if "sink" in options:
        attend = lambda *t: natten.na2d(*t, **{**options, "sink": torch.ones(4)})  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        # Which kernels, and not what becomes of them.
        patch.setattr("natten.precompiling._compile", lambda *_: [])
        halves = [t.half() for t in tensors]
        assert natten.precompile(attend, *halves, gpu="h100") >= 1


def explain(feature: str) -> None:
    _, tensors = call(feature)
    assert natten.explain(*tensors, **FEATURES[feature]).chosen


def flops(feature: str) -> None:
    attend, tensors = call(feature)
    with FlopCounterMode(display=False) as counter:
        attend(*tensors)
    keys = {"small grids": 6 * 7, "whole axes": 6 * 3, "groups of heads": (9 + 15) / 2}
    queries = 2 * tensors[0].shape[0] * tensors[0].shape[1:-2].numel() // 2
    expected = 2 * 2 * 8 * 4 * queries * keys.get(feature, 9)
    assert counter.get_total_flops() == expected


def of_numbers(feature: str) -> dict[str, Any]:
    return {n: v for n, v in FEATURES[feature].items() if n != "kernel_size"}


def simulate(feature: str) -> None:
    pytest.importorskip("triton")
    found = natten.simulate(GRID, FEATURES[feature]["kernel_size"], **of_numbers(feature))
    assert found.needed_pairs > 0


def pictures(feature: str) -> None:
    options = of_numbers(feature)
    assert viz.attended_tokens((0, 0), GRID, FEATURES[feature]["kernel_size"], **options)


def boxes(feature: str) -> None:
    attend, (query, key, value) = call(feature)
    options = dict(FEATURES[feature])
    if "query_mask" in options:
        options["query_mask"] = MASK[:, 2:4]
    part = natten.na2d(query[:, 2:4], key, value, **options, grid=GRID, query_origin=(2, 0))
    assert_close(part, attend(query, key, value)[:, 2:4])


def two_steps(feature: str) -> None:
    query, key = (torch.randn(2, 4, *GRID, 8) for _ in range(2))
    na2d_qk(query, key, FEATURES[feature]["kernel_size"], **of_numbers(feature))


def settings(feature: str) -> dict[str, Any]:
    """Arguments of modules."""
    options = {n: v for n, v in FEATURES[feature].items() if not n.endswith("_mask")}
    return {**options, "sink": True} if feature == "sink" else options


def of_modules(make: Callable[..., Any]) -> Callable[[str], None]:
    def check(feature: str) -> None:
        module = make(16, 4, **settings(feature)).eval()
        given: dict[str, Any] = {}
        if feature == "masks":
            given["mask"] = MASK
        if feature == "layouts":
            given["layout"] = LAYOUT
        shape = (1, LAYOUT.total) if given.get("layout") else (2, *GRID)
        if feature == "upsampling":
            given["source"], shape = torch.randn(2, *GRID, 16), (2, 12, 8)
        x = torch.randn(*shape, 16)
        assert module(x, **given).shape == x.shape

    return check


def scripted(feature: str) -> None:
    module = NeighborhoodAttention2D(16, 4, **settings(feature)).eval()
    x = torch.randn(2, *GRID, 16)
    script = torch.jit.script(module)
    if feature == "layouts":
        try:
            script(x, layout=1)
        except torch.jit.Error as error:
            raise NotImplementedError(str(error)) from error
    given = {"mask": MASK} if feature == "masks" else {}
    assert_close(script(x, **given), module(x, **given))


def streams(feature: str) -> None:
    module = NeighborhoodAttention2D(16, 4, **settings(feature), is_causal=(True, False)).eval()
    if feature in ("masks", "layouts"):
        given = {"mask": MASK} if feature == "masks" else {"layout": LAYOUT}
        module.stream(torch.randn(2, *GRID, 16), **given)
    x = torch.randn(2, *GRID, 16)
    first, state = module.stream(x[:, :4])
    second, _ = module.stream(x[:, 4:], state)
    assert_close(torch.cat([first, second], 1), module(x))


def backbones(feature: str) -> None:
    module = NeighborhoodBackbone(
        3, 16, (1,), (4,), kernel_size=[_entry(feature)], **_rest(feature)
    )
    images: Any = torch.randn(1, 3, 24, 32)
    if feature == "layouts":
        images = [torch.randn(3, 24, 32), torch.randn(3, 16, 12)]
    given = {"mask": MASK} if feature == "masks" else {}
    assert module(images, **given)


def _entry(feature: str) -> Any:
    """The window of the only stage, whose only block has it."""
    return [FEATURES[feature]["kernel_size"]]


def _rest(feature: str) -> dict[str, Any]:
    return {n: v for n, v in settings(feature).items() if n != "kernel_size"}


def dtensors(feature: str) -> None:
    attend, tensors = call(feature)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        placed = [distribute_tensor(t, mesh, [Shard(1)]) for t in tensors]
        expected, options = attend(*tensors), FEATURES[feature]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in options.items():
                if isinstance(value, Tensor):
                    patch.setitem(options, name, distribute_tensor(value, mesh, [Replicate()]))
            assert_close(attend(*placed).full_tensor(), expected)
    finally:
        dist.destroy_process_group()


DOORS: dict[str, Callable[[str], None]] = {
    "gradients, `jvp`, `vmap`": derivatives,
    "`torch.compile`, `torch.export`, `functionalize`": programs,
    "`natten.precompile`": precompile,
    "`natten.explain`": explain,
    "FLOP counters": flops,
    "`natten.simulate`": simulate,
    "pictures, `natten.viz`": pictures,
    "boxes of a `grid`": boxes,
    "scores and weights, `na2d_qk`": two_steps,
    "attention modules": of_modules(NeighborhoodAttention2D),
    "cross-attention modules": of_modules(NeighborhoodCrossAttention2D),
    "transformer blocks": of_modules(NeighborhoodTransformerBlock),
    "TorchScript of modules": scripted,
    "streams of modules": streams,
    "backbones": backbones,
    "DTensors, sharded grids": dtensors,
}
# What an error says of a feature; one of them.
NAMES = {
    "circular": ("is_circular",),
    "small grids": ("clip_window",),
    "groups of heads": ("kernel_size",),
    "masks": ("mask",),
    "soft cap": ("softcap",),
    "layouts": ("layout", "packed grids"),
}


@pytest.mark.parametrize(("row", "feature", "cell"), list(rows()), ids=str)
def test_cell(row: str, feature: str, cell: str) -> None:
    door = DOORS[row]
    if cell == "yes":
        door(feature)
        return
    assert cell in ("–", "")
    kind: Any = (NotImplementedError, ValueError) if cell else TypeError
    if not cell and (row, feature) in NOT_THERE:
        return
    with pytest.raises(kind) as error:
        door(feature)
    assert any(name in str(error.value) for name in NAMES.get(feature, (feature,)))


# Functions that do not take what they would have to be called with.
NOT_THERE = {
    (row, "layouts")
    for row in (
        "`natten.explain`", "`natten.simulate`", "pictures, `natten.viz`", "boxes of a `grid`",
        "scores and weights, `na2d_qk`",
    )
}  # fmt: skip


def test_rows() -> None:
    assert {row for row, *_ in rows()} == set(DOORS)
