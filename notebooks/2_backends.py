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
# # 2. The operations and their backends
#
# **Goal: find out who computes a call, how long it takes, and why one shape is fast and another slow.**
#
# *Hardware: any CPU, under a minute; the times printed are this machine's. On a GPU, put the tensors
# there and replace `measure` by `triton.testing.do_bench`, since kernels run while Python goes on.*

# %%
import os
import time

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler reports that there is no GPU

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import scaled_dot_product_attention

import natten

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Who would run it?
#
# `explain` asks every backend, in the order in which they are tried. The first that can, does.

# %%
query, key, value = (torch.randn(1, 56, 56, 4, 32) for _ in range(3))
print(natten.explain(query, key, value, kernel_size=7))

# %% [markdown]
# A backend that is named never falls back to another. It says why it cannot.

# %%
for backend in ("hopper-fna", "nonesuch"):
    try:
        natten.na2d(query, key, value, kernel_size=7, backend=backend)
    except (RuntimeError, NotImplementedError) as error:
        print(type(error).__name__, "-", error)

# %% [markdown]
# Backends agree. `reference` is plain PyTorch in any precision, and what all others are tested against.

# %%
answers = {
    name: natten.na2d(query, key, value, kernel_size=7, backend=name)
    for name in ("cpu", "flex-fna", "reference")
}
exact = natten.na2d(
    query.double(), key.double(), value.double(), kernel_size=7, backend="reference"
)
for name, answer in answers.items():
    print(f"{name:9s} {(answer - exact).abs().max():.1e} from float64")

# %% [markdown]
# ## Time
#
# The first call loads compiled code, so it does not count. Of the others the fastest does: whatever else the
# machine is doing can only slow a call.


# %%
def measure(function, rounds=7):
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def dense(query, key, value):
    flat = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    return scaled_dot_product_attention(*flat)


sides = [16, 24, 32, 48, 64]
windowed, full = [], []
for side in sides:
    q, k, v = (torch.randn(1, side, side, 2, 32) for _ in range(3))
    windowed.append(measure(lambda: natten.na2d(q, k, v, kernel_size=7)))
    full.append(measure(lambda: dense(q, k, v)))
    print(f"{side:3d}²  window 7: {windowed[-1]:6.2f} ms   all tokens: {full[-1]:6.2f} ms")
times_dense, times_windowed = full[-1] / full[0], windowed[-1] / windowed[0]
print(
    f"16 times the tokens: window {times_windowed:.0f} times as long, dense {times_dense:.0f} times"
)
assert times_dense > 3 * times_windowed

# %%
tokens = [side**2 for side in sides]
plt.figure(figsize=(6, 3.5), layout="constrained")
plt.loglog(tokens, full, "o-", label="dense attention")
plt.loglog(tokens, windowed, "o-", label="window of 7 × 7")
plt.xlabel("tokens")
plt.ylabel("ms, forward")
plt.legend()
plt.show()

# %% [markdown]
# The slope is what counts: for twice the tokens, dense attention costs four times as much, a window twice.
# Where the lines cross depends on the machine.
#
# ## Why a shape is fast or slow: tiles
#
# GPU kernels compute a tile of queries against tiles of keys. A tile has to load every key that *any* of
# its queries sees, and masks away the rest. `natten.simulate` counts that, without a GPU: `waste` is
# executed over needed work.

# %%
tiles = dict(q_tile_shape=(8, 8), kv_tile_shape=(8, 16), head_dim=32, heads=4)
tiles |= dict(backward_q_tile_shape=(8, 8), backward_kv_tile_shape=(8, 16))
print(natten.simulate((56, 56), kernel_size=7, **tiles))

# %% [markdown]
# A larger window, or queries that share one (`stride`), waste less:

# %%
windows = [3, 5, 7, 9, 13, 17, 25, 33]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.3), layout="constrained")
left.plot(windows, [natten.simulate((56, 56), w, **tiles).waste for w in windows], "o-")
left.set(xlabel="kernel_size", ylabel="executed / needed", ylim=(0, None))
strides = [1, 2, 4, 8, 16]
right.plot(strides, [natten.simulate((56, 56), 16, s, **tiles).waste for s in strides], "o-")
right.set(xlabel="stride, kernel_size=16", ylim=(0, None))
plt.show()

# %% [markdown]
# Where the tiles do not matter: the CPU kernels work on one query at a time, and compute no pair that is
# not needed. There, time follows the number of keys, beside a part that every query takes: a window of 33
# has 22 times the keys of one of 7. Sizes are measured in turns, as the machine may be busy for a while.

# %%
q, k, v = (torch.randn(1, 48, 48, 2, 32) for _ in range(3))
times = dict.fromkeys((3, 7, 13, 25, 33), float("inf"))
for _ in range(5):
    for size, best in times.items():
        times[size] = min(best, measure(lambda: natten.na2d(q, k, v, kernel_size=size)))
for size, ms in times.items():
    print(f"window {size:2d}: {ms:6.2f} ms, {ms / times[7]:5.1f} times that of 7")
assert 4 < times[33] / times[7] < 40

# %% [markdown]
# ## Profiling
#
# `python -m natten.profiler` times a call with all that goes with it, compares with dense attention, lists
# the tiles that each backend takes, and searches for the best. In a notebook, torch's own profiler shows
# where a call spends its time:

# %%
from torch.profiler import ProfilerActivity, profile

with profile(activities=[ProfilerActivity.CPU]) as trace:
    q.requires_grad_()
    natten.na2d(q, k, v, kernel_size=7).sum().backward()
for event in sorted(trace.key_averages(), key=lambda e: -e.self_cpu_time_total)[:5]:
    print(f"{event.self_cpu_time_total / 1e3:8.2f} ms  {event.key}")

# %% [markdown]
# ## Exercises
#
# 1. Which of `float32`, `bfloat16`, `float64` is fastest on your machine? `explain` first, then measure.
# 2. Find a `kv_tile_shape` with less waste than (8, 16) for window 7. Why do GPUs not like small ones?
# 3. A clip has 16 × 32 × 32 tokens. Which window of about 500 tokens wastes least with tiles of 64 queries?
# 4. Give `explain` tensors of 512 features a head on a GPU machine, and read who is left.
