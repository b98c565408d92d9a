"""A diffusion model of images by text: flow matching of handwritten digits, asked for by name.

    python examples/diffuse.py --steps 2000 --picture digits.png

Local blocks alternate with global ones. Every token is told the time and what is known of its own
pixels (part of an image may be given, and is then continued), and all attend to the letters of the
digit's name, in one softmax with their window. The digits come with scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from natten.models.video import TimestepEmbedding
from natten.nn import NeighborhoodTransformerBlock, PatchTokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TextDiffusion(nn.Module):
    """Velocity of noisy images `[B, 1, H, W]` at times `[B]`, given a text and known pixels."""

    def __init__(self, dim: int = 96, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.letters = nn.Embedding(27, 32)
        # Noisy pixels; known pixels and which of them are known.
        self.tokens = PatchTokenizer(1, dim, 2, norm_layer=None)
        self.known = PatchTokenizer(2, dim, 2, norm_layer=None)
        self.time = TimestepEmbedding(dim, scale=1000.0)
        self.blocks = nn.ModuleList(
            NeighborhoodTransformerBlock(
                dim,
                heads,
                -1 if i % 3 == 2 else 3,  # every third block sees everything
                cond_dim=dim,
                context_dim=32,
                rotary=True,
                qk_norm=True,
                gated_mlp=True,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, 4)

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, lengths: Tensor, known: Tensor
    ) -> Tensor:
        tokens = self.tokens(x)
        cond = self.time(time)[:, None, None] + self.known(known)  # [B, H/2, W/2, dim]
        context = self.letters(text)
        for block in self.blocks:
            tokens = block(tokens, cond, context=context, context_lengths=lengths)
        pixels = self.pixels(self.norm(tokens)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(pixels, 2)


def spell(labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Letters of the names, `[B, 5]`, 0 where there is none, and how many there are."""
    names = [NAMES[label] for label in labels]
    rows = [[ord(c) - 96 for c in name] + [0] * (5 - len(name)) for name in names]
    return torch.tensor(rows), torch.tensor([len(name) for name in names])


@torch.no_grad()
def sample(model: TextDiffusion, labels: Sequence[int], known: Tensor, steps: int = 20) -> Tensor:
    """Images of the labels, with the known pixels in them, by Euler's method from noise on."""
    text, lengths = spell(labels)
    x = torch.randn(len(labels), 1, *known.shape[2:])
    for i in range(steps):
        time = torch.full((len(labels),), i / steps)
        x = x + model.eval()(x, time, text, lengths, known) / steps
    return x


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--picture", help="file for a sample of each digit")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    model = TextDiffusion(options.dim, options.depth)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(options.steps):
        chosen = torch.randint(len(images), (64,))
        image, noise, time = images[chosen], torch.randn(64, 1, 8, 8), torch.rand(64)
        t = time[:, None, None, None]
        # Of one image in four the upper half is known.
        mask = torch.zeros_like(image)
        mask[:16, :, :4] = 1
        known = torch.cat([image * mask, mask], 1)
        velocity = model.train()((1 - t) * noise + t * image, time, *spell(labels[chosen]), known)
        loss = (velocity - (image - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    drawn = sample(model, range(10), torch.zeros(10, 2, 8, 8))
    if options.picture:
        from matplotlib.image import imsave

        imsave(options.picture, drawn[:, 0].permute(1, 0, 2).flatten(1).numpy(), cmap="gray")
    result = {"first": losses[0], "last": sum(losses[-5:]) / len(losses[-5:])}
    print(result)
    return result


if __name__ == "__main__":
    main()
