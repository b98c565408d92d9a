"""Time windows and scores of other kinds beside what users do instead, if both are the same.

    python benchmarks/semantics.py                    on the CPU, in float32
    python benchmarks/semantics.py --device cuda      in bfloat16
    python benchmarks/semantics.py --cases ring       those whose names hold a word

A case is one call of natten and its alternatives, forward and backward. Each alternative is
compared with the call first, output and gradients; then they take turns, and medians are shown: of
eager calls, and on a GPU of CUDA graphs of them, which leave the host out. FlexAttention is
compiled, on a GPU only; dense attention gets the window as a mask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu import in_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from natten import GridLayout, na2d
from natten.functional import neighborhood_attention_generic
from natten.varlen import neighborhood_attention_varlen
from natten.window import Axis, axis_mask, grid_mask

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Largest difference, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEADS, HEAD_DIM = 4, 64


@dataclass
class Case:
    """A call and what users do instead.

    Attributes:
        name: What is measured.
        queries: Tokens of the query.
        keys: Tokens of key and value.
        call: By natten.
        instead: By name.
    """

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    call: Attention
    instead: dict[str, Attention]

    def tensors(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return [
            torch.randn(1, *tokens, HEADS, HEAD_DIM, generator=generator)
            .to(device, dtype)
            .requires_grad_()
            for tokens in (self.queries, self.keys, self.keys)
        ]


def dense(mask: Callable[[], Tensor]) -> Attention:
    """Dense attention with a mask ``[queries, keys]``, or one for each head, made once."""
    made: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not made:
            made.append(mask().to(query.device))
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=made[0])
        return out.transpose(1, 2).unflatten(1, query.shape[1:-2])

    return attend


def flex(
    axes: Sequence[Sequence[Axis]], valid: Tensor | None = None, softcap: float = 0.0
) -> Attention:
    """Compiled FlexAttention with the windows, of each group of heads, as its mask, valid tokens in
    it, and a soft cap as its score_mod."""
    compiled = torch.compile(flex_attention, dynamic=False)
    made: list[Any] = []

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen: Any = None
        for number, group in enumerate(axes):
            inside, query, key = None, q, kv
            for axis in reversed(group):
                queries = axis.length * axis.upsampling
                part = axis_mask(query % queries, key % axis.length, axis)
                inside = part if inside is None else inside & part
                query, key = query // queries, key // axis.length
            own = inside if len(axes) == 1 else inside & (h * len(axes) // HEADS == number)
            seen = own if seen is None else seen | own
        return seen if valid is None else seen & valid[q] & valid[kv]

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2).contiguous() for t in (query, key, value))
        if not made:
            heads = None if len(axes) == 1 else HEADS
            sizes = q.shape[2], k.shape[2]
            made.append(create_block_mask(visible, None, heads, *sizes, device=str(q.device)))
        out = compiled(q, k, v, score_mod=capped if softcap else None, block_mask=made[0])
        return out.transpose(1, 2).unflatten(1, query.shape[1:-2])

    return attend


def others(axes: Sequence[Sequence[Axis]], device: str) -> dict[str, Attention]:
    """What goes without natten, for windows of each group of heads."""

    def mask() -> Tensor:
        masks = [grid_mask(group) for group in axes]
        if len(masks) == 1:
            return masks[0]
        return torch.stack(masks).repeat_interleave(HEADS // len(masks), 0)

    found = {"dense with a mask": dense(mask)}
    return found if device == "cpu" else {"FlexAttention": flex(axes), **found}


def ring(device: str) -> Case:
    """Longitude: a halo of keys from the other side, and where it lies in a wider grid."""
    rows, columns = (48, 96) if device == "cpu" else (90, 180)
    size = 7

    def halo(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        side = size // 2
        key, value = (torch.cat([t[:, :, -side:], t, t[:, :, :side]], 2) for t in (key, value))
        out: Tensor = neighborhood_attention_generic(
            query, key, value, size, grid=(rows, columns + 2 * side), query_origin=(0, side),
            key_origin=(0, 0),
        )  # fmt: skip
        return out

    tokens = (rows, columns)
    axes = (Axis(rows, size), Axis(columns, size, is_circular=True))
    return Case(
        f"ring: {rows}x{columns}, window {size}, is_circular=(False, True)", tokens, tokens,
        lambda *t: na2d(*t, size, is_circular=(False, True)),
        {"halo of keys": halo, **others([axes], device)},
    )  # fmt: skip


def finer_queries(side: int, factor: int, size: int, device: str) -> Case:
    """An upsampler: keys repeated, of which dilation leaves one each."""

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for axis in (1, 2):
            key, value = (t.repeat_interleave(factor, axis) for t in (key, value))
        return na2d(query, key, value, size, dilation=factor)

    fine = (side * factor,) * 2
    return Case(
        f"upsampling: {side}x{side} keys, upsampling {factor}, window {size}", fine, (side, side),
        lambda *t: na2d(*t, size, upsampling=factor),
        {
            "repeated keys, dilation": repeated,
            **others([(Axis(side, size, upsampling=factor),) * 2], device),
        },
    )  # fmt: skip


def head_groups(device: str) -> Case:
    """Half of the heads look farther than the others."""
    side = 56 if device == "cpu" else 112
    sizes = (7, 7), (13, 13)
    axes = [tuple(Axis(side, k) for k in window) for window in sizes]
    return Case(
        f"groups of heads: {side}x{side}, windows 7 and 13", (side, side), (side, side),
        lambda *t: na2d(*t, list(sizes)), others(axes, device),
    )  # fmt: skip


def _masked(name: str, valid: Tensor, device: str) -> Case:
    """Tokens of a square grid of which some are not valid."""
    side, size, valid = len(valid), 9, valid.to(device)
    axes = (Axis(side, size),) * 2

    def seen() -> Tensor:
        mask = grid_mask(axes).to(device) & valid.flatten()
        # Rows without any key are NaN in some of torch's kernels.
        return mask | ~mask.any(1, keepdim=True)

    by_mask = dense(seen)

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return by_mask(query, key, value).masked_fill(~valid[..., None, None], 0.0)

    instead: dict[str, Attention] = {"dense with a mask": masked}
    if device != "cpu":
        instead = {"FlexAttention": flex([axes], valid.flatten()), **instead}
    return Case(
        f"{name}: {side}x{side}, {int(valid.sum())} valid, window {size}", (side, side),
        (side, side), lambda *t: na2d(*t, size, key_mask=valid[None], query_mask=valid[None]),
        instead,
    )  # fmt: skip


def padded_image(device: str) -> Case:
    """An image in a batch that is padded to the size of the largest."""
    side = 48 if device == "cpu" else 112
    valid = torch.zeros(side, side, dtype=torch.bool)
    valid[: side * 5 // 8, : side * 3 // 4] = True
    return _masked("padded image", valid, device)


def sea(device: str) -> Case:
    """The sea and no land, which has coasts."""
    side = 48 if device == "cpu" else 112
    waves = torch.linspace(0, 9, side)
    height = torch.sin(waves)[:, None] + torch.cos(1.7 * waves + waves[:, None])
    return _masked("sea", height < 0.3, device)


def soft_cap(device: str) -> Case:
    """Bounded scores, which torch's dense attention does not have."""
    side, size, softcap = (48 if device == "cpu" else 112), 9, 5.0
    axes, made = (Axis(side, size),) * 2, []

    def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not made:
            made.append(~grid_mask(axes).to(device))
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        scores = softcap * (q @ k.transpose(-1, -2) * (HEAD_DIM**-0.5 / softcap)).tanh()
        weights = scores.masked_fill(made[0], -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).unflatten(1, query.shape[1:-2])

    instead: dict[str, Attention] = {"dense by hand": by_hand}
    if device != "cpu":
        instead = {"FlexAttention": flex([axes], softcap=softcap), **instead}
    return Case(
        f"soft cap: {side}x{side}, window {size}", (side, side), (side, side),
        lambda *t: na2d(*t, size, softcap=softcap), instead,
    )  # fmt: skip


def sink(device: str) -> Case:
    """A logit of each head that attends to nothing, afterwards by the logsumexp."""
    side, size = (56 if device == "cpu" else 112), 9
    logits = torch.linspace(-1, 2, HEADS, device=device)

    def afterwards(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = na2d(query, key, value, size, return_lse=True)
        return out * torch.sigmoid(lse - logits).unsqueeze(-1).to(out.dtype)

    return Case(
        f"sink: {side}x{side}, window {size}", (side, side), (side, side),
        lambda *t: na2d(*t, size, sink=logits), {"by the logsumexp": afterwards},
    )  # fmt: skip


def one_by_one(layout: GridLayout, size: int) -> Attention:
    """A call for each of some packed images."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grids = zip(*map(layout.unpack, (query, key, value)), strict=True)
        return layout.pack([na2d(*(t[None] for t in grid), size)[0] for grid in grids])

    return attend


def many_sizes(device: str) -> Case:
    """Photographs at native resolution, no two of one size."""
    images, least, step = (12, 12, 2) if device == "cpu" else (64, 28, 4)
    layout = GridLayout([(least + n % 8 * step, 2 * least - n // 8 * step) for n in range(images)])
    size = 7
    return Case(
        f"many sizes: {images} grids, {layout.total} tokens, window {size}",
        (layout.total,), (layout.total,),
        lambda *t: neighborhood_attention_varlen(*t, layout, kernel_size=size),
        {"one by one": one_by_one(layout, size)},
    )  # fmt: skip


def packed_grids(device: str) -> Case:
    """Images at native resolution: a call for those of one size, or for each, or all pairs."""
    scale = 1 if device == "cpu" else 2
    sizes = [(24, 32)] * 2 + [(28, 28)] * 2 + [(20, 40)] * 2
    layout = GridLayout([(scale * rows, scale * columns) for rows, columns in sizes])
    size = 7

    def mask() -> Tensor:
        masks = [grid_mask([Axis(n, size) for n in grid]) for grid in layout.sizes]
        return torch.block_diag(*masks)

    return Case(
        f"grids of different sizes: {len(sizes)}, {layout.total} tokens, window {size}",
        (layout.total,), (layout.total,),
        lambda *t: neighborhood_attention_varlen(*t, layout, kernel_size=size),
        {"one by one": one_by_one(layout, size), "dense with a mask": dense(mask)},
    )  # fmt: skip


def cases(device: str) -> list[Callable[[str], Case]]:
    """What makes the cases."""
    upsamplers = [(16, 4, 7)] if device == "cpu" else [(32, 8, 9), (32, 14, 7)]
    return [
        ring, *[partial(finer_queries, *sizes) for sizes in upsamplers], head_groups, packed_grids,
        many_sizes, padded_image, sea, soft_cap, sink,
    ]  # fmt: skip


def results(attend: Attention, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, out.detach())]


def finished(attend: Callable[[], Any]) -> Callable[[], None]:
    """A call that waits for the GPU."""

    def run() -> None:
        attend()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def graphed(attend: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        attend()
    return graph.replay


def check(case: Case, tensors: list[Tensor]) -> None:
    expected = results(case.call, tensors)
    for name, attend in case.instead.items():
        for got, wanted in zip(results(attend, tensors), expected, strict=True):
            error = float((got - wanted).abs().max() / wanted.abs().max())
            if not error <= TOLERANCE[got.dtype]:
                raise SystemExit(f"{case.name}: {name} differs by {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="*", help="words in names of cases; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    console, found = Console(), []
    if options.device == "cuda":
        # Backward passes run on the stream of the forward pass, and the default one has no graphs.
        torch.cuda.set_stream(torch.cuda.Stream())
    for make in cases(options.device):
        case = make(options.device)
        if options.cases and not any(word in case.name for word in options.cases):
            continue
        tensors = case.tensors(options.device)
        check(case, tensors)
        contenders = {
            name: partial(results, attend, tensors)
            for name, attend in {"natten": case.call, **case.instead}.items()
        }
        eager = {name: finished(call) for name, call in contenders.items()}
        columns = {"ms": in_turns(eager, options.seconds, 5)}
        if options.device == "cuda":
            graphs = {name: finished(graphed(call)) for name, call in contenders.items()}
            columns["graph ms"] = in_turns(graphs, options.seconds, 5)
        table = Table(title=case.name, title_justify="left")
        table.add_column("")
        for title in columns:
            table.add_column(title, justify="right")
            table.add_column("times natten's", justify="right")
        for name in contenders:
            cells = [(times[name], times["natten"]) for times in columns.values()]
            table.add_row(name, *[t for ms, own in cells for t in (f"{ms:.3f}", f"{ms / own:.2f}")])
        console.print(table)
        found.append({"case": case.name, "device": options.device, **columns})
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
