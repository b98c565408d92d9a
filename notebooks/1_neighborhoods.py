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
# # 1. Neighborhoods from first principles
#
# **Goal: know exactly which tokens a query attends to, for every setting of `kernel_size`, `stride`,
# `dilation` and `is_causal`, and check that nothing else is computed.**
#
# *Hardware: any CPU, seconds. On a GPU, put the tensors there with `.cuda()`; not a line changes else.*
#
# Why local? In images, sound and video, what explains a token mostly lies near it, and attention of all tokens to
# all costs the square of their number: 16 times as much for twice the side of an image. A window around every
# token costs the same for each, so that the whole grows as the image does.

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten import viz, window

torch.manual_seed(0)

# %% [markdown]
# ## One axis
#
# Ten tokens, a window of five. `natten.window` is the definition that all kernels follow. A query in
# the middle has two neighbors on each side; at a border, the window is shifted inwards, so that every
# query sees five tokens.


# %%
def table(length, **arguments):
    for token in range(length):
        axis = window.Axis(length, **arguments)
        seen = window.attended(token, axis)
        print(
            f"{token:2d} sees ",
            "".join("█" if key in seen else "·" for key in range(length)),
        )


table(10, kernel_size=5)

# %% [markdown]
# ## Stride, dilation, causality
#
# With `stride=3`, three queries in a row share the window of the one in their middle.

# %%
table(12, kernel_size=5, stride=3)

# %% [markdown]
# `stride == kernel_size` is attention in blocks:

# %%
table(12, kernel_size=4, stride=4)

# %% [markdown]
# With `dilation=3`, every third token is a neighbor. Each of the three residue classes is a little
# axis of its own, with its own borders.

# %%
table(12, kernel_size=3, dilation=3)

# %% [markdown]
# A causal window ends at its query. There is nothing before the first token to shift it to, so it is
# shorter there.

# %%
table(10, kernel_size=4, is_causal=True)

# %% [markdown]
# ## Two axes
#
# On a grid, the neighborhood is the product of both axes' windows, and every axis has its own settings.
# Black squares are queries; dots mark other queries that see the very same tokens.


# %%
def titled(arguments, between=", "):
    return between.join(f"{name}={value}" for name, value in arguments.items())


panels = [
    dict(kernel_size=5),
    dict(kernel_size=5, stride=3),
    dict(kernel_size=4, dilation=3),
    dict(kernel_size=(9, 3), is_causal=(True, False)),
]
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for panel, arguments in zip(axes, panels):
    viz.draw_neighborhood(panel, [(4, 4), (11, 10)], (12, 12), **arguments)
    panel.set_title(titled(arguments, "\n"), fontsize=9)
plt.show()

# %% [markdown]
# ## It is masked attention
#
# The same numbers come out of dense attention with a mask, which computes all pairs of tokens and
# throws most of them away.

# %%
side, heads, dim = 16, 2, 32
query, key, value = (torch.randn(1, side, side, heads, dim) for _ in range(3))


def masked_attention(query, key, value, **arguments):
    shape = query.shape[1:3]
    mask = torch.zeros(*shape, *shape, dtype=torch.bool)
    for y in range(shape[0]):
        for x in range(shape[1]):
            rows, columns = viz.attended_tokens((y, x), shape, **arguments)
            mask[y, x][rows[:, None], columns] = True
    flat = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    out = scaled_dot_product_attention(*flat, attn_mask=mask.flatten(2).flatten(0, 1))
    return out.transpose(1, 2).unflatten(1, shape), mask


for arguments in panels:
    ours = natten.na2d(query, key, value, **arguments)
    dense, mask = masked_attention(query, key, value, **arguments)
    share = mask.float().mean().item()
    error = (ours - dense).abs().max().item()
    print(f"{error:.1e} apart, {share:5.1%} of all pairs needed: {titled(arguments)}")
    assert error < 1e-5

# %% [markdown]
# ## What a query sees in a picture
#
# Here the tokens are pixels of a photograph, described by the patch around them, and a query prefers pixels that
# look like its own surroundings. The window limits where it may look.

# %%
from sklearn.datasets import load_sample_image

photo = torch.tensor(load_sample_image("china.jpg")).float() / 255
photo = photo[20:404:4, 60:572:4]  # 96 x 128 pixels
patches = torch.nn.functional.unfold(photo.permute(2, 0, 1)[None], kernel_size=5, padding=2)
features = patches[0].T.reshape(1, 96, 128, 1, 75).contiguous()
features = features - features.mean((1, 2), keepdim=True)
features = 6 * torch.nn.functional.normalize(features, dim=-1)

position = (40, 63)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for panel, arguments in zip(
    axes, [dict(kernel_size=31), dict(kernel_size=15, dilation=4), dict(kernel_size=95)]
):
    weights = viz.attention_weights(features, features, position, **arguments)[0, 0]
    layer = viz.draw_attention(panel, photo, weights, position)
    panel.set_title(titled(arguments))
figure.colorbar(layer, ax=axes, label="weight, relative to the largest", shrink=0.8)
plt.show()

# %% [markdown]
# ## Gradients
#
# Only the window has a share in the result, so only the window gets a gradient: the derivative of one
# query's output is zero at every other key.

# %%
key.requires_grad_()
out = natten.na2d(query, key, value, kernel_size=5)
out[0, 0, 8].sum().backward()
touched = key.grad[0].abs().sum((-1, -2)) > 0
print(touched[:7].int())

# %% [markdown]
# ## Exercises
#
# 1. Predict `table(9, kernel_size=4)`: on which side is the token more? Then print it.
# 2. For which `stride` does `kernel_size=6` on 12 tokens have the fewest different windows?
# 3. Write `table` for two axes, and find two queries that are far apart and share all their neighbors.
# 4. Two layers of window 5 see how far? And if the second one has `dilation=2`? Check with a gradient.
