"""What tests/test_distributed_modules.py has several ranks check of modules and models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_checks import F64, meshes, raises
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import natten
import natten.distributed as nd
from natten.nn import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodCrossAttention2D,
    NeighborhoodTransformerBlock,
)


def sharded(grid: tuple[int, ...], axis: int = 0, splits: Any = None) -> nd.GridSharding:
    return nd.GridSharding.from_placements(
        grid, meshes()["line"], (Shard(axis + 1),), splits=splits and [splits]
    )


def randomized(module: nn.Module, seed: int = 5) -> nn.Module:
    """In float64, with parameters that leave nothing out: models begin with gates of zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.to(F64)


def full(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def compare(module: nn.Module, single: nn.Module, group: Any, reduced: bool = False) -> None:
    """Gradients of parameters: each rank's contribution, or what is already their sum."""
    for (name, parameter), true in zip(module.named_parameters(), single.parameters(), strict=True):
        gradient = full(parameter.grad).clone()
        if not reduced:
            dist.all_reduce(gradient, group=group)
        torch.testing.assert_close(gradient, true.grad, rtol=1e-10, atol=1e-10, msg=name)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: NeighborhoodAttention2D(16, 2, 5),
    "strided, dilated, with a bias and fewer key heads": lambda: NeighborhoodAttention2D(
        32, 4, (3, 5), stride=(1, 2), dilation=(2, 1), rel_pos_bias=True, num_kv_heads=2
    ),
    "rotary and normed, causal": lambda: NeighborhoodAttention2D(
        16, 2, 5, is_causal=(True, False), qk_norm=True, rotary=True
    ),
    "padded": lambda: NeighborhoodAttention2D(16, 2, (15, 3), pad=True, rotary=True),
    "a whole axis": lambda: NeighborhoodAttention2D(16, 2, (-1, 3), learned_scale=True),
    "a ring": lambda: NeighborhoodAttention2D(
        16, 2, (3, 5), is_circular=True, rotary=True, rel_pos_bias=True
    ),
    "scores": lambda: NeighborhoodAttention2D(
        16, 2, (5, 3), softcap=2.0, sink=True, dilation=(2, 1), is_circular=(False, True)
    ),
    "clipped, of groups of heads": lambda: NeighborhoodAttention2D(
        16, 4, [(15, 3), (3, 9)], num_kv_heads=1, clip_window=True, rel_pos_bias=True
    ),
    "groups of heads, padded": lambda: NeighborhoodAttention2D(
        16, 2, [(15, 3), (3, 9)], pad=True, sink=True
    ),
    "the other, padded": lambda: NeighborhoodAttention2D(16, 2, (15, -1), pad=True),
}


def attention_module(name: str, in_context: bool) -> None:
    grid = (11, 7)
    sharding = sharded(grid)
    single = randomized(MODULES[name]())
    module = copy.deepcopy(single)
    x, upstream = torch.randn(2, 2, *grid, single.embed_dim, dtype=F64)
    (single(x) * upstream).sum().backward()
    if in_context:
        with nd.context_parallel(sharding.mesh, grid, (Shard(1),)) as placed:
            assert placed == sharding
            out = module(placed.shard(x))
            (out * placed.shard(upstream)).sum().backward()
        assert natten.functional.sharded.current is None
    else:
        plan = nd.NeighborhoodContextParallel(sharding, save_halo=False)
        parallelize_module(module, sharding.mesh, plan)
        # A copy keeps its plan, and is its own.
        module = copy.deepcopy(module)
        out = module(sharding.shard(x))
        (out * sharding.shard(upstream)).sum().backward()
    torch.testing.assert_close(out, sharding.shard(single(x)), rtol=1e-10, atol=1e-10)
    compare(module, single, sharding.group)


def masked() -> None:
    """Valid tokens, of attention alone and beside registers, softly capped and with a sink."""
    grid = (11, 7)
    sharding = sharded(grid)
    single = randomized(
        NeighborhoodAttention2D(16, 2, (15, 3), pad=True, softcap=2.0, sink=True, rotary=True)
    )
    x, tokens = torch.randn(2, *grid, 16, dtype=F64), torch.randn(2, 3, 16, dtype=F64)
    mask = torch.rand(2, *grid) < 0.7
    for given, share in (({}, 1), ({"registers": tokens}, dist.get_world_size())):
        module = copy.deepcopy(single)
        module.zero_grad()
        single.zero_grad()
        parallelize_module(module, sharding.mesh, nd.NeighborhoodContextParallel(sharding))
        local = module(sharding.shard(x), mask=sharding.shard(mask), **given)
        true = single(x, mask=mask, **given)
        out, more = (local, None) if torch.is_tensor(local) else local
        whole, of_registers = (true, None) if torch.is_tensor(true) else true
        torch.testing.assert_close(out, sharding.shard(whole), rtol=1e-10, atol=1e-10)
        loss, expected = out.square().sum(), whole.square().sum()
        if more is not None:
            torch.testing.assert_close(more, of_registers, rtol=1e-10, atol=1e-10)
            loss = loss + more.square().sum() / share
            expected = expected + of_registers.square().sum()
        loss.backward()
        expected.backward()
        compare(module, single, sharding.group)


def registers() -> None:
    """Class tokens: the same on all ranks, of all tokens."""
    grid = (11, 7)
    for axis, splits in ((0, None), (1, (7, *[0] * (dist.get_world_size() - 1)))):
        sharding = sharded(grid, axis, splits)
        single = randomized(NeighborhoodTransformerBlock(16, 2, (15, 3), pad=True, rotary=True))
        module = copy.deepcopy(single)
        x, upstream = torch.randn(2, 2, *grid, 16, dtype=F64)
        tokens, upstream_r = torch.randn(2, 2, 3, 16, dtype=F64)
        out, out_r = single(x, registers=tokens)
        ((out * upstream).sum() + (out_r * upstream_r).sum()).backward()
        parallelize_module(module, sharding.mesh, nd.NeighborhoodContextParallel(sharding))
        local, local_r = module(sharding.shard(x), registers=tokens)
        torch.testing.assert_close(local, sharding.shard(out), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(local_r, out_r, rtol=1e-10, atol=1e-10)
        # What all ranks compute alike counts once for each.
        loss = (local * sharding.shard(upstream)).sum()
        (loss + (local_r * upstream_r).sum() / dist.get_world_size()).backward()
        compare(module, single, sharding.group)


def cross_attention() -> None:
    grid = (11, 7)
    sharding = sharded(grid, 1)
    single = randomized(
        NeighborhoodCrossAttention2D(
            16, 2, (3, 9), context_dim=8, source_dim=4, pad=True, rotary=True, qk_norm=True
        )
    )
    module = copy.deepcopy(single)
    x, source = torch.randn(2, *grid, 16, dtype=F64), torch.randn(2, *grid, 4, dtype=F64)
    context, lengths = torch.randn(2, 5, 8, dtype=F64), torch.tensor([2, 5])
    out = single(x, context, lengths, source)
    out.square().sum().backward()
    parallelize_module(module, sharding.mesh, nd.NeighborhoodContextParallel(sharding))
    local = module(sharding.shard(x), context, lengths, sharding.shard(source))
    torch.testing.assert_close(local, sharding.shard(out), rtol=1e-10, atol=1e-10)
    local.square().sum().backward()
    compare(module, single, sharding.group)


def refuses_modules() -> None:
    """What would be wrong without a word."""
    sharding = sharded((12, 8))
    style = nd.NeighborhoodContextParallel(sharding)

    def apply(module: nn.Module) -> nn.Module:
        return parallelize_module(module, sharding.mesh, style)

    for module, reason in (
        (nn.Conv2d(4, 4, 3, padding=1), "overlapping convolutions"),
        (nn.BatchNorm2d(4), "norms over the tokens of this rank"),
        (nn.AdaptiveAvgPool2d(1), "takes tokens of this rank alone"),
        (nn.Dropout(0.1), "ranks would not drop the same"),
        (NeighborhoodAttention2D(8, 2, 3, attn_drop=0.1), "ranks would not drop the same"),
        (NeighborhoodTransformerBlock(8, 2, 3, drop_path=0.1), "ranks would not drop the same"),
    ):
        with raises(NotImplementedError, reason):
            apply(nn.Sequential(module))
    # As nothing is dropped, nothing is wrong; patches that do not overlap are as good.
    apply(nn.Sequential(nn.Dropout(0.0), nn.Conv2d(4, 4, 2, stride=2), nn.LayerNorm(4)))
    attention = apply(NeighborhoodAttention2D(8, 2, 3))
    x = sharding.shard(torch.randn(1, 12, 8, 8))
    with raises(ValueError, "origin and grid must be None"):
        attention(x, origin=[0, 0], grid=[12, 8])
    with raises(ValueError, "x must hold this rank's box"):
        attention(torch.randn(1, 12, 8, 8))
    with raises(NotImplementedError, "attention_map of a grid that is sharded"):
        attention.attention_map(x, [[0, 0]])
    attention.attn_drop = 0.5
    with raises(NotImplementedError, "dropout of attention weights"):
        attention(x)
    attention.eval()(x)
    with raises(ValueError, "device_mesh must be the sharding's"):
        parallelize_module(attention, meshes()["backwards"], style)
    with raises(TypeError, "options must be of"):
        nd.NeighborhoodContextParallel(sharding, methd="halo")
    sizes = (5, *[(12 - 5) // (dist.get_world_size() - 1)] * (dist.get_world_size() - 1))
    if sum(sizes) == 12:
        uneven = sharded((12, 8), 0, sizes)
        merging = nn.Sequential(NeighborhoodAttention2D(8, 2, 3), natten.nn.PatchMerging(8))
        with raises(ValueError, "shards must begin where patches"):
            parallelize_module(merging, uneven.mesh, nd.NeighborhoodContextParallel(uneven))


def context_parallel_functions() -> None:
    """natten's own functions, in the context and after it."""
    sharding = sharded((24,))
    tensors = torch.randn(3, 1, 24, 2, 4, dtype=F64)
    true = natten.na1d(*tensors, 9)
    with nd.context_parallel(sharding.mesh, (24,), (Shard(1),), method="merge"):
        local = [sharding.shard(t) for t in tensors]
        out = natten.na1d(*local, 9)
        assert torch.equal(out, nd.na1d(*local, 9, method="merge"))
        with raises(NotImplementedError, "q_tile_shape"):
            natten.na1d(*local, 9, q_tile_shape=(64,), kv_tile_shape=(64,))
        with raises(NotImplementedError, "grid"):
            natten.na1d(*local, 9, grid=(24,))
    torch.testing.assert_close(out, sharding.shard(true), rtol=0, atol=1e-12)
    assert natten.na1d(*tensors, 9).shape == true.shape


# --- heads


HEADS: dict[str, Callable[[], nn.Module]] = {
    "many": lambda: NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True),
    "grouped": lambda: NeighborhoodAttention2D(32, 8, 3, num_kv_heads=2, qkv_bias=False),
    "normed": lambda: NeighborhoodAttention2D(16, 4, 3, qk_norm=True, rotary=True),
    "with scales": lambda: NeighborhoodAttention2D(
        16, 4, 3, qk_norm=True, learned_scale=True, rel_pos_bias=True
    ),
}


def head_parallel(name: str) -> None:
    mesh = meshes()["line"]
    single = randomized(HEADS[name]())
    module = copy.deepcopy(single)
    x, upstream = torch.randn(2, 2, 6, 5, single.embed_dim, dtype=F64)
    x.requires_grad_()
    (single(x) * upstream).sum().backward()
    parallelize_module(module, mesh, nd.NeighborhoodHeadParallel())
    local = x.detach().clone().requires_grad_()
    out = module(local)
    torch.testing.assert_close(out, single(x), rtol=1e-10, atol=1e-10)
    (out * upstream).sum().backward()
    torch.testing.assert_close(local.grad, x.grad, rtol=1e-10, atol=1e-10)
    # State dicts are those of one process.
    state = module.state_dict()
    for key, value in single.state_dict().items():
        assert torch.equal(full(state[key]), value), key
    gradients = copy.deepcopy(module)
    for target, source in zip(gradients.parameters(), module.parameters(), strict=True):
        target.data.copy_(source.grad)
    for key, true in single.named_parameters():
        torch.testing.assert_close(
            full(gradients.state_dict()[key]), true.grad, rtol=1e-10, atol=1e-10, msg=key
        )
    for loaded, options in (
        (state, StateDictOptions()),
        (single.state_dict(), StateDictOptions(full_state_dict=True)),
    ):
        other = parallelize_module(
            randomized(HEADS[name](), 6), mesh, nd.NeighborhoodHeadParallel()
        )
        set_model_state_dict(other, loaded, options=options)
        torch.testing.assert_close(other(x), out, rtol=1e-10, atol=1e-10)


def head_parallel_cross_attention() -> None:
    mesh = meshes()["line"]
    single = randomized(
        NeighborhoodCrossAttention2D(16, 4, 3, context_dim=8, num_kv_heads=2, rel_pos_bias=True)
    )
    module = copy.deepcopy(single)
    with torch.device("meta"):
        # Whatever the default device is.
        parallelize_module(module, mesh, nd.NeighborhoodHeadParallel())
    x, context = torch.randn(2, 6, 5, 16, dtype=F64), torch.randn(2, 5, 8, dtype=F64)
    torch.testing.assert_close(module(x, context), single(x, context), rtol=1e-10, atol=1e-10)


def wrong_plans_raise() -> None:
    """The natural plan for heads: its ranks would get parts of other heads' rows."""
    mesh, size = meshes()["line"], dist.get_world_size()
    cross = natten.nn.NeighborhoodCrossAttention1D
    sources = {"source": torch.randn(1, 3, 16)}
    cases: list[tuple[Any, str, dict[str, Tensor]]] = [
        (NeighborhoodAttention1D(16, 4, 3), "qkv", {}),
        (cross(16, 4, 3), "kv", {}),
        (cross(16, 4, 3, upsampling=3), "kv", sources),
    ]
    for module, name, more in cases:
        plan = {name: ColwiseParallel(), "proj": RowwiseParallel()}
        if name == "kv":
            plan["q"] = ColwiseParallel()
        parallelize_module(module, mesh, plan)
        x = torch.randn(1, 9, 16)
        with raises(ValueError, f"{name} holds the rows of several kinds of heads"):
            module(x, **more)
        # As such plans go on.
        module.num_heads //= size
        module.num_kv_heads //= size
        with raises(ValueError, f"{name} holds the rows of several kinds of heads"):
            module(x, **more)
    module = cross(16, 4, 3, context_dim=8)
    parallelize_module(module, mesh, {"context_kv": ColwiseParallel()})
    with raises(ValueError, "context_kv holds the rows of several kinds of heads"):
        module(torch.randn(1, 9, 16), torch.randn(1, 5, 8))
    with raises(ValueError, "num_kv_heads must be a multiple"):
        odd = NeighborhoodAttention1D(16, 4, 3, num_kv_heads=1)
        parallelize_module(odd, mesh, nd.NeighborhoodHeadParallel())
    with raises(NotImplementedError, "heads that are sharded over ranks have one window"):
        groups = NeighborhoodAttention1D(16, 4, [(3,), (5,)])
        parallelize_module(groups, mesh, nd.NeighborhoodHeadParallel())


# --- models


def video_denoiser(how: str) -> None:
    """A denoiser over shards, with what programs compose with it."""
    from natten.models.video import VideoDenoiser

    world = dist.get_world_size()
    grid, patch = (5, 8, 12), (1, 2, 2)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        placements: Any = (Shard(0), Shard(3))
    else:
        mesh, placements = meshes()["line"], (Shard(3),)
    sharding = nd.GridSharding.from_placements(grid, mesh, placements)
    single = randomized(
        VideoDenoiser(
            embed_dim=24, depth=2, num_heads=2, kernel_size=(3, 5, 5), is_causal=True,
            dilations=[(1, 1, 1), (2, 1, 2)],
        )
    )  # fmt: skip
    model: Any = copy.deepcopy(single)
    clip, noise = torch.randn(2, world, 3, 5, 16, 24, dtype=F64)
    time = torch.rand(world, dtype=F64)
    (single(clip + noise, time) - noise).square().mean().backward()

    parallelize_module(model, mesh, nd.NeighborhoodContextParallel(sharding))
    if "checkpointing" in how:
        apply_activation_checkpointing(
            model, check_fn=lambda m: isinstance(m, NeighborhoodTransformerBlock)
        )
    pixels = sharding.refined(patch)
    rows = slice(None)
    if world == 4:
        share = mesh["dp"].get_local_rank()
        rows = slice(share * 2, share * 2 + 2)
    noisy, target = (pixels.shard(t[rows], 2) for t in (clip + noise, noise))
    factor = 1
    if "fsdp" in how:
        everyone = mesh._flatten("all") if world == 4 else mesh
        for block in model.blocks:
            fully_shard(block, mesh=everyone)
        fully_shard(model, mesh=everyone)
        factor = world
    elif "ddp" in how:
        model, factor = DistributedDataParallel(model), world
    if "compile" in how:
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled="amp" in how):
        error = model(noisy, time[rows]) - target
    loss = error.square().sum() / noise.numel()
    (loss * factor).backward()
    if "amp" in how:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        return
    compare(model, single, None, reduced=factor > 1)


def heads_and_tokens() -> None:
    """One mesh dimension for tokens, one for heads."""
    mesh = meshes()["square"]
    sharding = nd.GridSharding.from_placements((12, 5), mesh, (Shard(1), Shard(3)))
    single = randomized(NeighborhoodAttention2D(16, 4, 5, rotary=True, rel_pos_bias=True))
    module = copy.deepcopy(single)
    parallelize_module(module, mesh, nd.NeighborhoodContextParallel(sharding))
    parallelize_module(module, mesh["b"], nd.NeighborhoodHeadParallel())
    x = torch.randn(2, 12, 5, 16, dtype=F64)
    true = single(x)
    local = module(sharding.shard(x))
    torch.testing.assert_close(local, sharding.shard(true), rtol=1e-10, atol=1e-10)
    true.square().sum().backward()
    local.square().sum().backward()
    gradient = module.proj.bias.grad.full_tensor()
    dist.all_reduce(gradient, group=sharding.group)
    torch.testing.assert_close(gradient, single.proj.bias.grad, rtol=1e-10, atol=1e-10)


def video_nat() -> None:
    """A hierarchy: every level has a coarser grid; the classes are of all tokens."""
    from natten.models.video import VideoNAT

    mesh, world = meshes()["line"], dist.get_world_size()
    grid = (3, 8, 8 * world - 4)
    single = randomized(
        VideoNAT(
            num_classes=5, embed_dim=12, depths=(1, 2, 1), num_heads=(2, 2, 4),
            kernel_size=(3, 3, 5), is_causal=True,
        )
    )  # fmt: skip
    model: Any = copy.deepcopy(single)
    splits = (*[8] * (world - 1), 4)
    sharding = nd.GridSharding.from_placements(grid, mesh, (Shard(3),), splits=[splits])
    clip = torch.randn(2, 3, 3, 32, 4 * grid[2], dtype=F64)
    true = single(clip)
    true.square().sum().backward()
    parallelize_module(model, mesh, nd.NeighborhoodContextParallel(sharding))
    local = model(sharding.refined((1, 4, 4)).shard(clip, 2))
    torch.testing.assert_close(local, true, rtol=1e-9, atol=1e-9)
    (local.square().sum() / world).backward()
    compare(model, single, sharding.group)
    with raises(NotImplementedError, "stream of a grid that is sharded"):
        model.stream(clip)
