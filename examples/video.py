"""A causal video transformer: trained on whole clips, used frame by frame.

    python examples/video.py --steps 300

Digits of scikit-learn drift and bounce; the model tells the next frame from those before. Positions
are rotary, learned registers are earlier than all frames, and in use keys and values of the frames
that a window can still reach are kept: a stream costs the same for every frame and equals the clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from natten.nn import NeighborhoodStage, PatchTokenizer, StreamState


class FramePredictor(nn.Module):
    """The frame after each frame of `[B, 1, T, H, W]`, from the frames up to it."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 2, registers: int = 4) -> None:
        super().__init__()
        self.tokens = PatchTokenizer(1, dim, (1, 4, 4), rank=3)
        self.registers = nn.Parameter(torch.randn(registers, dim) * 0.02)
        self.stage = NeighborhoodStage(
            dim,
            depth,
            heads,
            # Frames, rows, columns: short windows of blocks, and one that sees every frame.
            [(3, 3, 3)] * (depth - 1) + [(-1, 3, 3)],
            rank=3,
            is_causal=(True, False, False),
            rotary=True,
            qk_norm=True,
        )
        self.pixels = nn.Linear(dim, 16)

    def forward(self, clip: Tensor) -> Tensor:
        x, _ = self.stage(self.tokens(clip), None, self._registers(clip))
        return clip + self._unpatch(x)

    @torch.no_grad()
    def stream(
        self, frames: Tensor, state: StreamState | None = None
    ) -> tuple[Tensor, StreamState]:
        """The same of the next frames, and the state for those after them."""
        registers = self._registers(frames)
        (x, _), state = self.stage.stream(self.tokens(frames), state, registers=registers)
        return frames + self._unpatch(x), state

    def _registers(self, clip: Tensor) -> Tensor:
        return self.registers.expand(clip.shape[0], -1, -1)

    def _unpatch(self, x: Tensor) -> Tensor:
        pixels = self.pixels(x).permute(0, 1, 4, 2, 3)  # [B, T, 16, H', W']
        return F.pixel_shuffle(pixels, 4).transpose(1, 2)


def clips(count: int, frames: int, size: int = 24) -> Tensor:
    """Digits that drift and bounce, `[count, 1, frames, size, size]`."""
    digits = torch.from_numpy(load_digits().images).float() / 16
    out = torch.zeros(count, 1, frames, size, size)
    reach = size - 8
    for i in range(count):
        place, speed = torch.rand(2) * reach, torch.randint(-3, 4, (2,))
        digit = digits[int(torch.randint(len(digits), ()))]
        for t in range(frames):
            # A path in a box is one on a circle of twice its length, seen from the side.
            y, x = (reach - ((place + t * speed) % (2 * reach) - reach).abs()).long().tolist()
            out[i, 0, t, y : y + 8, x : x + 8] = digit
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--frames", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = FramePredictor(options.dim)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(options.steps):
        batch = clips(8, options.frames + 1)
        loss = (model(batch[:, :, :-1]) - batch[:, :, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip = clips(1, options.frames + 1)
    with torch.no_grad():
        predicted = model.eval()(clip[:, :, :-1])
    state, streamed = None, []
    for frame in clip[:, :, :-1].split(1, dim=2):
        out, state = model.stream(frame, state)
        streamed.append(out)
    result = {
        "error": (predicted - clip[:, :, 1:]).square().mean().item(),
        "error_of_copying": (clip[:, :, :-1] - clip[:, :, 1:]).square().mean().item(),
        "stream_differs_by": (torch.cat(streamed, 2) - predicted).abs().max().item(),
    }
    print(result)
    return result


if __name__ == "__main__":
    main()
