"""Neighborhood attention in a diffusers model whose attention is dense, by an attention processor.

    pip install diffusers
    python examples/diffusers_processor.py

A small diffusion transformer with random weights runs three times: dense; with a window of the
whole grid, which is the same; and with a window of 7 x 7 tokens. The processor takes any diffusers
`Attention` over image tokens, those of a trained model too: fine-tune after the change.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

import natten


class NeighborhoodProcessor:
    """Self-attention of each token to its window.

    Args:
        grid: Rows and columns of tokens.
        kernel_size: Of the window; and the other parameters of `natten.na2d` by name.
    """

    def __init__(
        self, grid: tuple[int, int], kernel_size: int | tuple[int, int], **window: object
    ) -> None:
        self.grid = grid
        self.window = {"kernel_size": kernel_size, **window}

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("NeighborhoodProcessor is for self-attention without a mask")
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).unflatten(1, self.grid)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        out = natten.na2d(query, key, value, scale=attn.scale, **self.window)
        out = out.flatten(3).flatten(1, 2)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def localize(model: DiTTransformer2DModel, kernel_size: int | tuple[int, int]) -> None:
    """Give every self-attention of a model this window."""
    side = model.config.sample_size // model.config.patch_size
    for block in model.transformer_blocks:
        block.attn1.set_processor(NeighborhoodProcessor((side, side), kernel_size))


def main() -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 4, 32, 32), timestep=torch.tensor([10]),
        class_labels=torch.tensor([3]),
    )  # fmt: skip
    with torch.no_grad():
        dense = model(**inputs).sample
        localize(model, 16)
        whole = model(**inputs).sample
        localize(model, 7)
        local = model(**inputs).sample
    torch.testing.assert_close(whole, dense, atol=1e-5, rtol=1e-5)
    print(f"a window of all 16 x 16 tokens: as dense, within {(whole - dense).abs().max():.1e}")
    print(f"a window of 7 x 7 tokens: {tuple(local.shape)}, differs by {(local - dense).std():.3f}")


if __name__ == "__main__":
    main()
