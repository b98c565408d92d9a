"""Grids whose first axis arrives bit by bit, as frames of a video or tokens of a text do: what is
remembered of them, and attention of the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from natten.functional import neighborhood_attention_generic
from natten.nn.core import NeighborhoodModule, crop, place, refuse_sharded, whole_axes


@dataclass
class StreamState:
    """What causal modules remember of the frames so far. A frame is what has one coordinate along
    the first axis of the grid, whatever it is.

    keys, values: for every attention, `[B, T, *X, heads, head_dim]` of the last frames that its
        window can reach: their number does not grow with the stream (unless the window is the
        whole axis).
    sizes: of every attention, batch and extents of a frame, without padding.
    frames: frames seen.
    feature_sum: sum over them of the pooled features of a classifier, `[B, C]`.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    frames: int = 0
    feature_sum: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> StreamState:
        """A copy on another device or of another dtype; arguments are those of `Tensor.to`."""
        return replace(
            self,
            keys=[key.to(*args, **kwargs) for key in self.keys],
            values=[value.to(*args, **kwargs) for value in self.values],
            feature_sum=None if self.feature_sum is None else self.feature_sum.to(*args, **kwargs),
        )

    def part(self, first: int, count: int = 1) -> StreamState:
        """The state of `count` attentions from the one with index `first` on."""
        end = first + count
        return StreamState(
            self.keys[first:end], self.values[first:end], self.sizes[first:end], self.frames
        )

    def add(self, part: StreamState) -> None:
        """Appends the attentions of `part`."""
        self.keys += part.keys
        self.values += part.values
        self.sizes += part.sizes
        self.frames = part.frames


def check_stream(module: NeighborhoodModule) -> None:
    windows = module.head_windows()
    if not module.is_causal[0] or any(stride[0] != 1 for _, stride, _ in windows):
        raise ValueError(
            "a stream needs is_causal=True and stride=1 along the first axis, got "
            f"is_causal={module.is_causal} and stride={module.stride}"
        )
    if module.clip_window:
        raise NotImplementedError("a stream is not implemented with clip_window, got True")
    if module._drops():
        raise NotImplementedError("dropout of attention weights is not implemented for streams")
    refuse_sharded(module.plan, "a stream")


def fit_frames(module: NeighborhoodModule, x: Tensor) -> Tensor:
    """Pads frames to the window. Time needs none: frames that do not exist are before the grid."""
    for kernel_size, _, dilation in module.head_windows():
        size = [1, *whole_axes(x, kernel_size, None)[1:]]
        x = place(x, size, [1, *dilation[1:]], module.pad, None, None, module.is_circular)
    return x


def attend_to_stream(
    module: NeighborhoodModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extent: torch.Size,
    state: StreamState | None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
) -> tuple[Tensor, StreamState]:
    """Attention of new frames, whose extents without padding are `extent`, to themselves and to
    those remembered; also the new state.
    """
    seen = 0 if state is None else state.frames
    frames = seen + extent[0]
    size = (query.shape[0], *extent[1:])
    if state is not None and state.keys:
        if state.sizes[0] != size:
            raise ValueError(
                "the frames of a stream must keep their batch size and extents, got batch "
                f"{size[0]} and {list(size[1:])} after {state.sizes[0][0]} and "
                f"{list(state.sizes[0][1:])}"
            )
        key = torch.cat([state.keys[0], key], dim=1)
        value = torch.cat([state.values[0], value], dim=1)
    grid = [frames, *query.shape[2:-2]]
    windows = module.head_windows()
    sizes = [whole_axes(query, kernel_size, grid) for kernel_size, *_ in windows]
    # The windows of all heads in frames; those of one group need not reach as far as of another.
    reaches = [size[0] * window[2][0] for size, window in zip(sizes, windows, strict=True)]
    # A causal window depends on no later frame, so the grid may end with this one, or where the
    # window first fits.
    grid[0] = max(frames, *reaches)
    corner = [0] * (module.rank - 1)
    out = neighborhood_attention_generic(
        query,
        key,
        value,
        sizes if module.is_grouped else sizes[0],
        stride=module.stride,
        dilation=module.dilation,
        is_causal=module.is_causal,
        is_circular=module.is_circular,
        scale=module.scale,
        softcap=module.softcap,
        sink=module._sink(),
        additional_keys=additional_keys,
        additional_values=additional_values,
        additional_lengths=additional_lengths,
        grid=grid,
        query_origin=(seen, *corner),
        key_origin=(frames - key.shape[1], *corner),
    )
    keep = key.shape[1]
    if all(kernel_size[0] != -1 for kernel_size, *_ in windows):
        keep = min(max(r - d[0] for r, (*_, d) in zip(reaches, windows, strict=True)), keep)
    # Copies: a view would keep every frame's keys alive.
    first = key.shape[1] - keep
    new = StreamState([key[:, first:].clone()], [value[:, first:].clone()], [size], frames)
    return crop(out, extent), new
