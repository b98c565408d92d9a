# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Diffusion
#
# **Goal: build and train a small denoiser in pixel space out of neighborhood attention, with the condition in
# the same softmax, and draw samples from it.**
#
# *Hardware: any CPU, half a minute. On a GPU, set `device = "cuda"`, double width and depth, train
# a hundred times as long, and use the digits at their full size of 28 × 28: nothing else changes.*
#
# The shape is that of HDiT (https://arxiv.org/abs/2401.11605): an hourglass. Where tokens are many, attention
# is local; at the bottom, where they are few, it is global.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from natten.models import data
from natten.nn import (
    GatedMlp,
    NeighborhoodCrossAttention2D,
    NeighborhoodTransformerBlock,
)

torch.manual_seed(0)
device = "cpu"

# %% [markdown]
# ## The data
#
# Digits, 16 × 16, in [-1, 1].

# %%
digits = data.load("mnist5k")
images, labels = data.tensors(digits, "train", (16, 16), 1)
images, labels = (2 * images - 1).to(device), labels.to(device)
print(tuple(images.shape))

# %% [markdown]
# ## What it learns
#
# Between an image $x$ and noise $\varepsilon$ lies $x_t = (1 - t)\,x + t\,\varepsilon$. The network sees $x_t$,
# $t$ and the digit, and predicts the direction $\varepsilon - x$ (a rectified flow). Samples follow it from
# noise to an image.
#
# ## The network
#
# Two kinds of condition, in two ways. The time scales and shifts every norm (`cond_dim`). The digit is a
# context: `NeighborhoodCrossAttention2D` gives every query its window *and* the context, in one softmax, so
# that it weighs "what is around me" against "what I am to be".


# %%
class LocalBlock(nn.Module):
    """Window and context in one softmax, then an MLP; both modulated by the time."""

    def __init__(self, dim, heads, context_dim, cond_dim, kernel_size=5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = NeighborhoodCrossAttention2D(
            dim, heads, kernel_size, context_dim=context_dim, qk_norm=True, rotary=True
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = GatedMlp(dim, 2 * dim)
        self.modulation = nn.Linear(cond_dim, 4 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, time, context):
        shift1, scale1, shift2, scale2 = (
            m[:, None, None] for m in self.modulation(F.silu(time)).chunk(4, -1)
        )
        x = x + self.attn(self.norm1(x) * (1 + scale1) + shift1, context)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    def __init__(self, dim=32, classes=10):
        super().__init__()
        wide = 2 * dim
        self.time = nn.Sequential(nn.Linear(32, wide), nn.SiLU(), nn.Linear(wide, wide))
        # The last entry stands for "no digit given".
        self.digit = nn.Embedding(classes + 1, 2 * wide)
        self.patch = nn.Conv2d(1, dim, 2, stride=2)
        self.down_blocks = nn.ModuleList(LocalBlock(dim, 2, wide, wide) for _ in range(2))
        self.down = nn.Linear(4 * dim, wide)
        # A window as large as the grid is global attention.
        self.middle = nn.ModuleList(
            NeighborhoodTransformerBlock(wide, 4, 4, mlp_ratio=2, cond_dim=wide, rotary=True)
            for _ in range(2)
        )
        self.up = nn.Linear(wide, 4 * dim)
        self.mix = nn.Parameter(torch.tensor(0.5))
        self.up_blocks = nn.ModuleList(LocalBlock(dim, 2, wide, wide) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.unpatch = nn.ConvTranspose2d(dim, 1, 2, stride=2)
        nn.init.zeros_(self.unpatch.weight)

    def forward(self, x, t, digit):
        frequencies = torch.exp(torch.linspace(0, 5, 16, device=x.device))
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        context = self.digit(digit).unflatten(-1, (2, -1))  # two tokens
        time = time + context.mean(1)
        x = self.patch(x).movedim(1, -1)
        for block in self.down_blocks:
            x = block(x, time, context)
        skip = x
        x = F.pixel_unshuffle(x.movedim(-1, 1), 2).movedim(1, -1)
        x = self.down(x)
        for block in self.middle:
            x = block(x, time)
        x = F.pixel_shuffle(self.up(x).movedim(-1, 1), 2).movedim(1, -1)
        x = torch.lerp(skip, x, self.mix)
        for block in self.up_blocks:
            x = block(x, time, context)
        return self.unpatch(self.norm(x).movedim(-1, 1))


model = Denoiser().to(device)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Training
#
# One digit in ten is hidden from the network, so that it learns both with and without. An average of the
# weights over the last hundreds of steps (EMA) draws better than the weights themselves.

# %%
steps, batch_size, rate = 400, 24, 4e-3
optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.99))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
average = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
)
losses = []
for step in range(steps):
    chosen = torch.randint(len(images), (batch_size,), device=device)
    clean = images[chosen]
    digit = torch.where(torch.rand(batch_size, device=device) < 0.1, 10, labels[chosen])
    t = torch.sigmoid(torch.randn(batch_size, device=device))
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, t[:, None, None, None])
    loss = F.mse_loss(model(mixed, t, digit), noise - clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    losses.append(loss.item())
    if (step + 1) % 100 == 0:
        print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.4f}")
assert sum(losses[-50:]) < 0.5 * sum(losses[:50])

# %%
smooth = torch.tensor(losses).unfold(0, 25, 5).mean(-1)
plt.figure(figsize=(6, 2.5), layout="constrained")
plt.semilogy(torch.arange(len(smooth)) * 5, smooth)
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Samples
#
# From noise at $t = 1$ in small steps to $t = 0$. The direction with the digit is exaggerated beyond the one
# without (classifier-free guidance).


# %%
@torch.no_grad()
def sample(model, digit, guidance=2.0, steps=16, seed=0):
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(digit), 1, 16, 16, generator=generator).to(device)
    times = torch.linspace(1, 0, steps + 1)
    nothing = torch.full_like(digit, 10)
    for now, then in pairwise(times):
        t = torch.full((2 * len(digit),), now.item(), device=device)
        both = model(torch.cat([x, x]), t, torch.cat([digit, nothing]))
        given, free = both.chunk(2)
        x = x + (then - now).item() * torch.lerp(free, given, guidance)
    return x


wanted = torch.arange(10, device=device).repeat(3)
samples = sample(average.module, wanted)
figure, axes = plt.subplots(3, 10, figsize=(8, 2.6), layout="constrained")
for panel, image in zip(axes.flat, samples):
    panel.imshow(image[0].cpu(), cmap="gray_r", vmin=-1, vmax=1)
    panel.axis("off")
for i, panel in enumerate(axes[0]):
    panel.set_title(i, fontsize=9)
plt.show()

# %% [markdown]
# ## What the condition does to the attention
#
# How much of its weight does a token give to the two context tokens, instead of to its window? Where the digit
# is drawn, and how early, is up to the network.

# %%
block = average.module.up_blocks[0]
caught = []
hook = block.attn.register_forward_pre_hook(lambda module, inputs: caught.append(inputs))
clean = images[labels == 3][:1]
positions = torch.cartesian_prod(torch.arange(8), torch.arange(8))
figure, axes = plt.subplots(1, 5, figsize=(10, 2.2), layout="constrained")
axes[0].imshow(clean[0, 0].cpu(), cmap="gray_r")
axes[0].set_title("image")
noise = torch.randn_like(clean)
for panel, t in zip(axes[1:], (0.2, 0.5, 0.8, 1.0)):
    with torch.no_grad():
        average.module(
            torch.lerp(clean, noise, t),
            torch.tensor([t], device=device),
            torch.tensor([3], device=device),
        )
    x, context = caught[-1]
    weights = block.attn.attention_map(x, positions, context).additional
    share = weights[0].sum(-1).mean(-1).view(8, 8)
    layer = panel.imshow(share.cpu(), vmin=0, vmax=1)
    panel.set_title(f"t = {t}, mean {share.mean():.2f}", fontsize=9)
for panel in axes:
    panel.axis("off")
figure.colorbar(layer, ax=axes, label="weight of the context", shrink=0.9)
hook.remove()
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. `guidance` 1 and 4: what is gained, and what is lost?
# 2. Give the time to the context as a third token, instead of modulating norms. Does it learn as fast?
# 3. At 28 × 28 the first level has 14 × 14 tokens. Which windows would you take there, and which dilations?
# 4. Replace the windows of the local blocks by the whole grid (`kernel_size=8`), and compare loss and time.
