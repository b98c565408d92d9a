"""Counting the multiply-accumulates of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from natten.nn import NeighborhoodAttention2D, NeighborhoodAttention3D


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
        attended = 1
        tokens = 1
        for length, kernel_size, dilation in zip(
            inputs[0].shape[1:-1], module.kernel_size, module.dilation
        ):
            tokens *= max(length, kernel_size * dilation)
            attended *= kernel_size
        windows += 2 * inputs[0].shape[0] * tokens * attended * module.embed_dim

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
