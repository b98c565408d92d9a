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
# # 7. Coming from older code
#
# **Goal: move a layer that was written for NATTEN 0.14, one for 0.17, and one for FlexAttention to today's
# operations, step by step, with equal outputs at every step; then see what it was good for.**
#
# *Hardware: any CPU, seconds. On a GPU, put modules and inputs there and time with
# `triton.testing.do_bench`.*

# %%
import time

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import natten
from natten.nn import NeighborhoodAttention2D

torch.manual_seed(0)
torch.set_num_threads(1)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    print(f"equal to {(a - b).abs().max():.1e}")


# %% [markdown]
# ## A layer of 0.14
#
# Two calls, with the weights of all windows in memory between them, heads first, and a bias for relative
# positions. This is how NAT, DiNAT, and their copies in transformers are written. The names are still here, so
# that it runs as it is.

# %%
from natten.functional import natten2dav, natten2dqkrpb


class Attention014(nn.Module):
    def __init__(self, dim, kernel_size, num_heads, dilation=1):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.kernel_size, self.dilation = kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        attn = natten2dqkrpb(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        x = natten2dav(attn.softmax(-1), v, self.kernel_size, self.dilation)
        return self.proj(x.permute(0, 2, 3, 1, 4).reshape(B, H, W, C))


x = torch.randn(2, 28, 28, 64)
old = Attention014(64, kernel_size=7, num_heads=2, dilation=2)
expected = old(x)

# %% [markdown]
# **Step 1: one fused call.** `na2d` takes heads last, scales by itself, and adds the bias. Both permutations
# disappear, and so do the weights in memory.


# %%
class Fused(Attention014):
    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = natten.na2d(
            *qkv.unbind(-3),
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            rpb=self.rpb,
        )
        return self.proj(out.flatten(-2))


fused = Fused(64, kernel_size=7, num_heads=2, dilation=2)
fused.load_state_dict(old.state_dict())
same(fused(x), expected)

# %% [markdown]
# **Step 2: the module.** It has the same parameters, under the same names.

# %%
module = NeighborhoodAttention2D(64, num_heads=2, kernel_size=7, dilation=2, rel_pos_bias=True)
print(module.load_state_dict(old.state_dict()))
same(module(x), expected)

# %% [markdown]
# The gradients are the same as well, the bias's among them.

# %%
for layer in (old, module):
    layer.zero_grad()
    layer(x).square().sum().backward()
same(module.rpb.grad, old.rpb.grad)
same(module.qkv.weight.grad, old.qkv.weight.grad)

# %% [markdown]
# One thing changes silently if you let it: modules up to 0.15 padded inputs smaller than a window. `bias=True`,
# their name for the bias, brings that back; in new code, it is `pad=True`.

# %%
small = torch.randn(1, 9, 9, 64)
try:
    module(small)
except ValueError as error:
    print(error)
as_then = NeighborhoodAttention2D(dim=64, num_heads=2, kernel_size=7, dilation=2, bias=True)
print(as_then.pad, tuple(as_then(small).shape))

# %% [markdown]
# ## A layer of 0.17
#
# Programs asked whether fused kernels were there, and wrote the call twice. The fifth positional argument of
# `na2d` was the dilation. It is the **stride** now, so that such a call would run, and mean something else.

# %%
from natten.functional import na2d_av, na2d_qk


def attention_017(q, k, v, kernel_size, dilation):
    if natten.has_fused_na():
        return natten.experimental.na2d(q, k, v, kernel_size, dilation)
    q, k, v = (t.permute(0, 3, 1, 2, 4) for t in (q, k, v))
    attn = na2d_qk(q * q.shape[-1] ** -0.5, k, kernel_size, dilation).softmax(-1)
    return na2d_av(attn, v, kernel_size, dilation).permute(0, 2, 3, 1, 4)


q, k, v = (torch.randn(1, 28, 28, 2, 32) for _ in range(3))
expected_017 = attention_017(q, k, v, 7, 2)
same(natten.na2d(q, k, v, kernel_size=7, dilation=2), expected_017)
print(
    "as the fifth argument:",
    torch.allclose(natten.na2d(q, k, v, 7, 2), expected_017, atol=1e-5),
)

# %% [markdown]
# ## A layer on FlexAttention
#
# A 1-D causal sliding window with a shared set of sink tokens that everybody sees. In FlexAttention, both are
# in the mask, and the sinks are in front of the sequence.

# %%
length, sinks, window, heads, dim = 512, 4, 64, 2, 32
q, k, v = (torch.randn(1, heads, sinks + length, dim) for _ in range(3))


def sliding(batch, head, query, key):
    near = (query - key < window) & (key <= query) & (key >= sinks)
    return near | (key < sinks)


mask = create_block_mask(sliding, None, None, sinks + length, sinks + length, device="cpu")
flex = flex_attention(q, k, v, block_mask=mask)[:, :, sinks:]

# %% [markdown]
# **Step 1: the same mask, in words.** The sinks become additional keys, and the window is two arguments. There
# is no mask to build, and nothing to rebuild for another length.

# %%
q1, k1, v1 = (t.transpose(1, 2) for t in (q, k, v))  # heads last
ours = natten.na1d(
    q1[:, sinks:],
    k1[:, sinks:],
    v1[:, sinks:],
    kernel_size=window,
    is_causal=True,
    additional_keys=k1[:, :sinks],
    additional_values=v1[:, :sinks],
)
same(ours.transpose(1, 2), flex)

# %% [markdown]
# **Step 2: leave the transposition out.** A projection gives heads last anyway, so a model that was written
# for FlexAttention can drop its own `transpose(1, 2)`, before and behind.
#
# FlexAttention can do what has no counterpart here: any `score_mod`, any mask. And it remains reachable, with
# our masks:

# %%
via_flex = natten.na1d(q1, k1, v1, kernel_size=window, is_causal=True, backend="flex-fna")
same(via_flex, natten.na1d(q1, k1, v1, kernel_size=window, is_causal=True))

# %% [markdown]
# ## What it was good for


# %%
def measure(function, rounds=5):
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[rounds // 2]


def step(layer):
    layer(image).square().sum().backward()


image = torch.randn(4, 56, 56, 64)
for name, layer in {"0.14": old, "fused": fused, "module": module}.items():
    with torch.no_grad():
        forward = measure(lambda: layer(image))
    both = measure(lambda: step(layer))
    print(f"{name:8s} forward {forward:6.2f} ms, with backward {both:6.2f} ms")

# %%
print(f"FlexAttention, eager {measure(lambda: flex_attention(q, k, v, block_mask=mask)):6.2f} ms")
print(
    f"na1d                 {measure(lambda: natten.na1d(q1, k1, v1, window, is_causal=True)):6.2f} ms"
)

# %% [markdown]
# These are this machine's numbers, on one thread. Eager FlexAttention computes all pairs; compiled, it skips
# blocks that its mask leaves empty (`python benchmarks/cpu.py` compares with that).
#
# ## Exercises
#
# 1. Your own 0.14 layer calls `natten1dqkrpb`. What is `rpb`'s shape, and what replaces the pair of calls?
# 2. Replace `window` by a bidirectional one, `abs(query - key) <= 32`. Where do the outputs differ, and why?
#    (The page on migrating has a way to make them equal.)
# 3. Load a DiNAT checkpoint of transformers with `natten.models.convert`, and compare logits.
