"""A forecast on a sphere: windows that go around the globe, and end at the poles.

    python examples/weather.py --steps 300

Fields are on a grid of latitudes and longitudes. Windows end at borders, and longitude has none:
`is_circular=(False, True)`. Turning the globe turns the forecast. The weather is made up: waves
that drift with the latitude.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natten.nn import Mlp, NeighborhoodAttention2D, PatchTokenizer


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            heads,
            kernel_size,
            dilation=(1, dilation),
            is_circular=(False, True),
            rel_pos_bias=True,
        )
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Forecaster(nn.Module):
    """The fields `[B, C, latitudes, longitudes]` one step later."""

    def __init__(self, channels: int = 2, dim: int = 48, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        # A row of patches knows its latitude; no place knows its longitude.
        self.tokens = PatchTokenizer(channels + 1, dim, 2)
        self.blocks = nn.Sequential(*(Block(dim, heads, 5, 1 + i % 2) for i in range(depth)))
        self.fields = nn.Linear(dim, 4 * channels)
        nn.init.zeros_(self.fields.weight)

    def forward(self, x: Tensor) -> Tensor:
        latitude = torch.linspace(-1, 1, x.shape[2])[:, None].expand(x.shape[0], 1, -1, x.shape[3])
        tokens = self.blocks(self.tokens(torch.cat([x, latitude], 1)))
        return x + nn.functional.pixel_shuffle(self.fields(tokens).permute(0, 3, 1, 2), 2)


def weather(count: int, rows: int = 24, columns: int = 48) -> tuple[Tensor, Tensor]:
    """Fields of waves, `[count, 2, rows, columns]`, now and one step later."""
    latitude = torch.linspace(-1, 1, rows)[:, None]
    longitude = 2 * torch.pi * torch.arange(columns) / columns
    wave = torch.randint(1, 5, (count, 2, 1, 1))
    phase, tilt = torch.rand(2, count, 2, 1, 1) * 2 * torch.pi
    drift = 0.6 * torch.cos(latitude * torch.pi / 2) - 0.1  # east at the equator, west at the poles
    height = torch.cos(latitude * torch.pi / 2)

    def at(time: int) -> Tensor:
        return height * torch.sin(wave * (longitude - drift * time) + tilt * latitude + phase)

    return at(0), at(1)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dim", type=int, default=48)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Forecaster(dim=options.dim)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(options.steps):
        now, later = weather(16)
        loss = (model(now) - later).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        now, later = weather(16)
        forecast = model.eval()(now)
        turned = model(now.roll(10, -1))  # by five patches
    result = {
        "error": (forecast - later).square().mean().item(),
        "error_of_persistence": (now - later).square().mean().item(),
        "turning_differs_by": (turned - forecast.roll(10, -1)).abs().max().item(),
    }
    print(result)
    return result


if __name__ == "__main__":
    main()
