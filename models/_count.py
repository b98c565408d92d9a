"""Counting the multiply-accumulates of a model."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from natten.nn import NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.validation import clipped_window, head_windows


def count_macs(model: nn.Module, input_size: tuple[int, ...] | None = None) -> int:
    """Multiply-accumulates of the products of one forward pass with a batch of one.

    Linear layers, convolutions, and the two products of neighborhood attention over its windows;
    not norms, activations and softmax. Models on the meta device are counted without computing.

    Args:
        model: a model of this package.
        input_size: of one input, without the batch; None for the `input_size` of its
            pretrained_cfg.
    """
    size = tuple(input_size or model.pretrained_cfg["input_size"])
    parameter = next(model.parameters())
    windows = 0

    def count_attention(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal windows
        extent = inputs[0].shape[1:-1]
        sizes = (module.kernel_size, module.stride, module.dilation)
        groups = head_windows(*sizes) or [sizes]
        for kernel_size, stride, dilation in groups:
            if module.clip_window:
                kernel_size, _, dilation = clipped_window(extent, kernel_size, stride, dilation)
            attended = [n // d if k == -1 else k for k, n, d in zip(kernel_size, extent, dilation)]
            tokens = prod(max(n, k * d) for n, k, d in zip(extent, attended, dilation))
            pairs = 2 * inputs[0].shape[0] * tokens * prod(attended)
            windows += pairs * module.embed_dim // len(groups)

    hooks = [
        module.register_forward_hook(count_attention)
        for module in model.modules()
        if isinstance(module, (NeighborhoodAttention2D, NeighborhoodAttention3D))
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    # The operator may bring a formula of its own to torch's counter: what the hooks found replaces
    # it.
    per_operator = counter.get_flop_counts().get("Global", {})
    products = sum(n for op, n in per_operator.items() if not str(op).startswith("natten."))
    return products // 2 + windows
