"""A DiNAT of Hugging Face transformers, moved into natten.models with its weights.

    pip install 'transformers==5.23.0'
    python examples/transformers_dinat.py [folder or Hub name]

Without a name it makes a small DiNAT with random weights, and needs no network. The model here
computes attention fused, has timm's interface, and gives the same logits.
"""

from __future__ import annotations

import sys

import torch
from transformers import DinatConfig, DinatForImageClassification

import natten.models
from natten.models import NAT


def source(name: str | None) -> DinatForImageClassification:
    if name is not None:
        return DinatForImageClassification.from_pretrained(name).eval()
    torch.manual_seed(0)
    config = DinatConfig(
        embed_dim=32, depths=[2, 2], num_heads=[2, 4], kernel_size=5, num_labels=10,
        dilations=[[1, 3], [1, 2]], mlp_ratio=2.0, layer_scale_init_value=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return DinatForImageClassification(config).eval()


def moved(model: DinatForImageClassification) -> NAT:
    """The same model of natten.models."""
    c = model.config
    found = NAT(
        embed_dim=c.embed_dim, depths=c.depths, num_heads=c.num_heads, kernel_size=c.kernel_size,
        dilations=c.dilations, mlp_ratio=c.mlp_ratio, num_classes=c.num_labels,
        layer_scale=c.layer_scale_init_value or None,
    )  # fmt: skip
    found.load_state_dict(natten.models.checkpoint_filter_fn(model.state_dict(), found))
    return found.eval()


def main() -> None:
    theirs = source(sys.argv[1] if len(sys.argv) > 1 else None)
    ours = moved(theirs)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, logits = theirs(images).logits, ours(images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    difference = (logits - expected).abs().max()
    print(f"logits around {expected.std():.2f} agree within {difference:.1e}")
    print(f"features: {[tuple(f.shape) for f in ours.forward_intermediates(images)[1]]}")


if __name__ == "__main__":
    main()
