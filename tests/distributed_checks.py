"""What tests/test_distributed.py has several ranks check: all of them run the same function."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from random import Random
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import natten
import natten.distributed as nd
from natten.distributed import halo
from natten.distributed.boxes import whole
from natten.distributed.exchange import agree
from natten.functional import neighborhood_attention_generic, operators
from natten.varlen import neighborhood_attention_varlen

F64 = torch.float64
DEVICE = torch.device(os.environ.get("RANKS_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
# On CPUs, nothing is compiled; on GPUs, it is their kernels that are checked.
BACKEND = None if ON_GPU else "reference"


@cache
def meshes() -> dict[str, DeviceMesh]:
    """Meshes over all ranks; of some, the ranks are not in order."""
    world = dist.get_world_size()
    backwards = list(range(world))[::-1]
    found = {
        "line": init_device_mesh(DEVICE.type, (world,), mesh_dim_names=("x",)),
        "backwards": DeviceMesh(DEVICE.type, backwards, mesh_dim_names=("z",)),
    }
    if world == 4:
        found["square"] = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("a", "b"))
        found["turned"] = DeviceMesh(DEVICE.type, [[2, 0], [3, 1]], mesh_dim_names=("c", "d"))
    if world == 8:
        found["oblong"] = init_device_mesh(DEVICE.type, (2, 4), mesh_dim_names=("e", "f"))
        found["cube"] = init_device_mesh(DEVICE.type, (2, 2, 2), mesh_dim_names=("g", "h", "i"))
    return found


# --- random problems


# Of heads. On GPUs few, since each needs kernels of its own.
_WIDTHS = [64] if ON_GPU else [4, 8]


def _split(random: Random, length: int, parts: int) -> tuple[int, ...] | None:
    """As DTensor cuts it, or at random, empty shards among them."""
    if random.random() < 0.35:
        return None
    cuts = sorted(random.randint(0, length) for _ in range(parts - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True))


def draw(seed: int) -> dict[str, Any]:
    """A problem: the same on every rank."""
    random = Random(seed)
    name = random.choice(sorted(meshes()))
    mesh = meshes()[name]
    rank = random.randint(mesh.ndim, 3)
    most = {1: 400, 2: 40, 3: 16}[rank] if ON_GPU else {1: 60, 2: 20, 3: 11}[rank]
    window: dict[str, list[Any]] = {
        "kernel_size": [], "stride": [], "dilation": [], "is_causal": [], "is_circular": []
    }  # fmt: skip
    grid = []
    for _ in range(rank):
        length = random.randint(1, most)
        dilation = min(random.choice([1, 1, 1, 2, 3]), length)
        kernel = random.randint(1, length // dilation)
        if random.random() < 0.15:
            kernel, dilation = length, 1
        grid.append(length)
        window["kernel_size"].append(kernel)
        window["stride"].append(random.choice([1, 1, random.randint(1, kernel)]))
        window["dilation"].append(dilation)
        window["is_causal"].append(random.random() < 0.3)
        is_ring = not window["is_causal"][-1] and random.random() < 0.4
        window["is_circular"].append(is_ring)
        if is_ring:
            unit = window["stride"][-1] * dilation
            grid[-1] = -(-length // unit) * unit
    axes = random.sample(range(rank), mesh.ndim)
    heads_kv = random.randint(1, 3)
    heads_dim = None
    if random.random() < 0.25:
        heads_dim = random.randrange(mesh.ndim)
        heads_kv = mesh.size(heads_dim) * random.randint(1, 2)
    additional = random.choice([0, 0, 3])
    return dict(
        mesh=name,
        grid=tuple(grid),
        placements=tuple(Shard(axis + 1) for axis in axes),
        splits=[_split(random, grid[axis], mesh.size(i)) for i, axis in enumerate(axes)],
        window=window,
        batch=random.randint(1, 2),
        heads=heads_kv * random.randint(1, 2),
        heads_kv=heads_kv,
        dims=(random.choice(_WIDTHS), random.choice([*_WIDTHS, 2 * _WIDTHS[-1]])),
        additional=additional,
        lengths=bool(additional) and random.random() < 0.5,
        rpb=not any(window["is_causal"]) and random.random() < (0.2 if ON_GPU else 0.4),
        softcap=random.choice([None, None, 1.5]),
        sink=random.random() < 0.3,
        masks=random.choice([(), (), ("key_mask",), ("query_mask", "key_mask")]),
        grad_lse=random.random() < 0.5,
        options=dict(
            method=random.choice(["auto", "halo", "halo", "merge", "ring"]),
            transport=random.choice(["all_to_all", "p2p"]),
            head_chunks=random.choice([None, 1, 2, 3]),
            save_halo=random.random() < 0.5,
            heads_dim=heads_dim,
        ),
    )


def random_problem(seed: int, dtype: torch.dtype = F64) -> dict[str, Any]:
    """Check one against one process: output, logsumexp and all gradients."""
    problem = draw(seed)
    check_problem(problem, seed, dtype)
    return problem


def check_problem(problem: dict[str, Any], seed: int, dtype: torch.dtype = F64) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(DEVICE)

    grid, batch, window = problem["grid"], problem["batch"], problem["window"]
    heads, heads_kv, (dim, dim_v) = problem["heads"], problem["heads_kv"], problem["dims"]
    query = normal(batch, *grid, heads, dim)
    key, value = normal(batch, *grid, heads_kv, dim), normal(batch, *grid, heads_kv, dim_v)
    grad_out, grad_lse = normal(batch, *grid, heads, dim_v), normal(batch, *grid, heads)
    keys = values = lengths = rpb = None
    if number := problem["additional"]:
        keys, values = normal(batch, number, heads_kv, dim), normal(batch, number, heads_kv, dim_v)
    if problem["lengths"]:
        lengths = torch.randint(0, number + 1, (batch,), generator=generator).to(DEVICE)
    if problem["rpb"]:
        rpb = normal(heads, *[2 * k - 1 for k in window["kernel_size"]])
    sink = normal(heads) if problem["sink"] else None
    masks = {
        name: (torch.rand(batch, *grid, generator=generator) < 0.7).to(DEVICE)
        for name in problem["masks"]
    }
    tensors = [query, key, value, keys, values, rpb, sink]

    def results(operation: Any, parts: list[Any], of: Any, to: torch.dtype, **more: Any) -> Any:
        leaves = [
            None if t is None else t.detach().to(to, copy=True).requires_grad_() for t in parts
        ]
        out, lse = operation(
            *leaves[:3], **window, additional_keys=leaves[3], additional_values=leaves[4],
            rpb=leaves[5], sink=leaves[6], additional_lengths=lengths, return_lse=True,
            softcap=problem["softcap"], backend="reference" if to == F64 else BACKEND,
            **{name: of(mask) for name, mask in masks.items()}, **more,
        )  # fmt: skip
        lse = lse.masked_fill(lse.isneginf(), 0) if masks else lse
        loss = (out * of(grad_out).to(to)).sum()
        if problem["grad_lse"]:
            loss = loss + (lse * of(grad_lse).to(lse.dtype)).sum()
        loss.backward()
        return out.detach(), lse.detach(), *[None if t is None else t.grad for t in leaves]

    exact = results(neighborhood_attention_generic, tensors, lambda t: t, F64)
    sharding = nd.GridSharding.from_placements(
        grid, meshes()[problem["mesh"]], problem["placements"], splits=problem["splits"]
    )
    own = sharding.own.within(whole(grid))
    parts = [t[own] if i < 3 else t for i, t in enumerate(tensors)]
    local = results(
        nd.neighborhood_attention, parts, lambda t: t[own], dtype, sharding=sharding,
        **problem["options"],
    )  # fmt: skip
    alone = exact
    if dtype != F64:
        alone = results(neighborhood_attention_generic, tensors, lambda t: t, dtype)
    names = (
        "out", "lse", "query", "key", "value", "additional_keys", "additional_values", "rpb",
        "sink",
    )  # fmt: skip
    for name, found, true, single in zip(names, local, exact, alone, strict=True):
        if found is None:
            continue
        if name in names[:5]:
            true, single = true[own], single[own]
        else:
            # This rank's contribution.
            found = found.to(F64)
            dist.all_reduce(found, group=sharding.group)
        check_close(f"{name} of {problem}", found, true, single)


def check_close(name: str, found: Tensor, true: Tensor, single: Tensor) -> None:
    """In float64 equal. In other types no worse than twice what one process has, and a rounding:
    partial sums travel."""
    assert found.shape == true.shape, name
    if not found.numel():
        return
    finite = true.isfinite()
    assert torch.equal(found.isfinite(), finite), name
    rounding = 0.0 if single.dtype == F64 else torch.finfo(single.dtype).eps / 2
    found, true, single = (t.to(F64)[finite] for t in (found, true, single))
    if not finite.any():
        return
    error, scale = (found - true).abs().max().item(), max(1.0, true.abs().max().item())
    allowed = (1e-12 + rounding) * scale + 2 * (single - true).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def random_problems(first: int, number: int, dtype: str = "float64") -> None:
    for seed in range(first, first + number):
        random_problem(seed, getattr(torch, dtype))


# --- traps


@contextmanager
def raises(kind: type[Exception], pattern: str) -> Iterator[None]:
    """pytest.raises, which the processes of the ranks need not import."""
    try:
        yield
    except kind as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"{error} does not match {pattern!r}") from error
    else:
        raise AssertionError(f"no {kind.__name__}")


def line_of(*grid: int, axis: int = 0, splits: Any = None) -> nd.GridSharding:
    """A grid of which all ranks share one axis."""
    return nd.GridSharding.from_placements(
        grid, meshes()["line"], (Shard(axis + 1),), splits=splits and [splits]
    )


def boxes(sharding: nd.GridSharding, *features: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Query, key and value of this rank, of the same numbers on every number of ranks."""
    generator = torch.Generator().manual_seed(7)
    shape = (1, *sharding.grid, *features)
    whole_grid = [torch.randn(shape, generator=generator, dtype=F64) for _ in range(3)]
    return [sharding.shard(t).to(DEVICE, dtype, copy=True).requires_grad_() for t in whole_grid]


MISMATCHES: dict[str, Callable[[], Any]] = {
    "kernel_size": lambda: call(kernel_size=(3, 5)),
    "kernel_size of the same reach": lambda: call(kernel_size=(5, 3)),
    "stride": lambda: call(stride=2),
    "dilation": lambda: call(dilation=2),
    "is_causal": lambda: call(is_causal=(False, True)),
    "is_circular": lambda: call(is_circular=(False, True)),
    "softcap": lambda: call(softcap=2.0),
    "a sink": lambda: call(sink=torch.zeros(2, dtype=F64)),
    "key_mask": lambda: call(masked=True),
    "scale": lambda: call(scale=0.7),
    "dtype": lambda: call(dtype=torch.float32),
    "the batch size": lambda: call(batch=2),
    "grid": lambda: call(grid=(12, 9)),
    "splits": lambda: call(grid=(12, 10), splits=(12, *[0] * (dist.get_world_size() - 1))),
    "heads": lambda: call(heads=4),
    "key heads": lambda: call(heads_kv=1),
    "head_dim": lambda: call(dim=8),
    "value's head_dim": lambda: call(dim_v=8),
    "additional keys": lambda: call(additional=3),
    "fewer additional keys": lambda: call(additional=2),
    "additional_lengths": lambda: call(additional=3, lengths=True),
    "rpb": lambda: call(rpb=True),
    "method": lambda: call(method="merge"),
    "transport": lambda: call(transport="p2p"),
    "head_chunks": lambda: call(head_chunks=1),
    "save_halo": lambda: call(save_halo=False),
    "gradients": lambda: call(requires_grad=False),
    "the number of axes": lambda: call(grid=(120,), kernel_size=5),
    "a wrong argument": lambda: call(kernel_size=50),
    "a wrong shape": lambda: call(cut=True),
    "a wrong backend": lambda: call(backend="nonsense"),
    "heads_dim": lambda: call(heads_dim=0),
}


def call(
    grid: tuple[int, ...] = (12, 10),
    splits: Any = None,
    batch: int = 1,
    heads: int = 2,
    heads_kv: int = 2,
    dim: int = 4,
    dim_v: int = 4,
    dtype: torch.dtype = F64,
    additional: int = 0,
    lengths: bool = False,
    rpb: bool = False,
    kernel_size: Any = (5, 5),
    requires_grad: bool = True,
    cut: bool = False,
    masked: bool = False,
    **options: Any,
) -> None:
    """A call and its backward pass."""
    sharding = line_of(*grid, splits=splits)
    extent = list(sharding.own.extent)
    if cut:
        extent[-1] -= 1
    with DEVICE:
        query = torch.randn(batch, *extent, heads, dim, dtype=dtype)
        key = torch.randn(batch, *extent, heads_kv, dim, dtype=dtype)
        value = torch.randn(
            batch, *extent, heads_kv, dim_v, dtype=dtype, requires_grad=requires_grad
        )
        if additional:
            options["additional_keys"] = torch.randn(batch, additional, heads_kv, dim, dtype=dtype)
            options["additional_values"] = torch.randn(
                batch, additional, heads_kv, dim_v, dtype=dtype
            )
        if masked:
            options["key_mask"] = torch.ones(batch, *extent, dtype=torch.bool)
        if lengths:
            options["additional_lengths"] = torch.ones(batch, dtype=torch.int64)
        if rpb:
            options["rpb"] = torch.randn(heads, 9, 9, dtype=dtype)
    options.setdefault("backend", "reference")
    out: Any = nd.neighborhood_attention(
        query, key, value, kernel_size, sharding=sharding, **options
    )
    if requires_grad:
        out.sum().backward()


def mismatch(name: str, culprit: int) -> None:
    """One rank makes another call than the others: a ValueError on all of them, also where each
    call was made by all ranks before, and the group is as good as before."""
    other = MISMATCHES[name]
    for _ in range(2):
        with raises(ValueError, "rank"):
            other() if dist.get_rank() == culprit else call()
        call()
        # What all of them do alike is an error of their own or none at all.
        with suppress(ValueError, NotImplementedError):
            other()


def names_the_differing() -> None:
    with raises(
        ValueError,
        r"but scale is 0\.5 on rank 0, 0\.5 on rank 1, 2\.0 on rank 2; method is ring on rank 0, "
        "halo on rank 1, halo on rank 2$",
    ):
        last = dist.get_rank() == 2
        call(scale=2.0 if last else 0.5, method="ring" if dist.get_rank() == 0 else "halo")
    with raises(ValueError, r"^rank 1 of the group: kernel_size \* dilation must be at most"):
        call(kernel_size=50 if dist.get_rank() == 1 else 5)


def fails(what: str, seconds: int) -> None:
    """The last rank fails between two calls over a group of its own timeout; the others say so."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    mesh = DeviceMesh.from_group(group, DEVICE.type, mesh_dim_names=("x",))
    sharding = nd.GridSharding.from_placements((24,), mesh, (Shard(1),))
    tensors = boxes(sharding, 2, 4)
    nd.na1d(*tensors, 9, sharding=sharding, backend="reference")
    if dist.get_rank() == dist.get_world_size() - 1:
        if what == "dies":
            os._exit(1)
        if what == "hangs":
            time.sleep(3 * seconds)
        raise ZeroDivisionError
    begin = time.monotonic()
    with raises(RuntimeError, "Timed out|timed out|Connection|closed"):
        nd.na1d(*tensors, 9, sharding=sharding, backend="reference")
    assert time.monotonic() - begin < 2 * seconds


def one_way_or_the_other(method: str, transport: str) -> None:
    """Named problems on meshes whose ranks are not in order, with more ranks than tokens, and with
    windows that reach over several ranks."""
    window = dict(kernel_size=(7,), stride=(2,), dilation=(1,), is_causal=(False,))
    problem = dict(
        mesh="backwards", grid=(23,), placements=(Shard(1),), splits=[None], window=window,
        batch=2, heads=4, heads_kv=2, dims=(4, 8), additional=3, lengths=True, rpb=True,
        grad_lse=True, softcap=2.0, sink=True, masks=("key_mask",),
        options=dict(method=method, transport=transport),
    )  # fmt: skip
    check_problem(problem, 1)
    # Rings: windows of about all of it, and one token of each other.
    for size, step, distance in ((11, 2, 2), (24, 1, 1), (1, 1, 3), (2, 1, 12)):
        ring = dict(
            kernel_size=(size,), stride=(step,), dilation=(distance,), is_causal=(False,),
            is_circular=(True,),
        )  # fmt: skip
        check_problem({**problem, "grid": (24,), "window": ring}, size)
    # Fewer tokens than ranks, then all on one rank.
    few = {**problem, "grid": (2,), "window": {**window, "kernel_size": (2,)}}
    check_problem(few, 2)
    alone = [0] * dist.get_world_size()
    alone[-1] = 23
    check_problem({**problem, "splits": [tuple(alone)]}, 3)


def grid_is_explicit() -> None:
    """Boxes are checked against the sharding, whose grid shapes of shards say nothing of."""
    query, key, value = boxes(line_of(24), 2, 4)
    other = line_of(30)
    with raises(ValueError, "must hold this rank's box"):
        nd.na1d(query, key, value, 5, sharding=other)
    with raises(ValueError, "sharding must say"):
        nd.na1d(query, key, value, 5)
    with raises(ValueError, "query must have 5 dimensions"):
        nd.na2d(query, key, value, 5, sharding=line_of(24))
    with raises(ValueError, "method must be one of"):
        nd.na1d(query, key, value, 5, sharding=line_of(24), method="nonsense")
    with raises(ValueError, "heads_dim must be a dimension"):
        nd.na1d(query, key, value, 5, sharding=line_of(24), heads_dim="y")


def shards_and_unshards() -> None:
    """GridSharding against what DTensor makes of the same placements; unshard inverts shard."""
    for name, mesh in meshes().items():
        if mesh.ndim > 2:
            continue
        placements = (Shard(2), Shard(1))[: mesh.ndim]
        whole_grid = torch.arange(2 * 7 * 9 * 3, dtype=F64).view(2, 7, 9, 3)
        sharding = nd.GridSharding.from_placements((7, 9), mesh, placements)
        ours = sharding.shard(whole_grid)
        theirs = distribute_tensor(whole_grid, mesh, placements, src_data_rank=None).to_local()
        assert torch.equal(ours.reshape(-1), theirs.reshape(-1)), name
        local = ours.clone().requires_grad_()
        gathered = sharding.unshard(local)
        assert torch.equal(gathered, whole_grid), name
        # Every rank uses every token: its gradient is the sum.
        (gathered * whole_grid).sum().backward()
        assert torch.equal(local.grad, ours * dist.get_world_size()), name
        # Channels first.
        first = whole_grid.movedim(-1, 1)
        assert torch.equal(sharding.unshard(sharding.shard(first, 2), 2), first), name
    world = dist.get_world_size()
    sharding = line_of(4 * world - 2, splits=(*[4] * (world - 1), 2))
    assert sharding.coarsened((2,)).refined((2,)) == sharding
    assert sharding.coarsened((4,)).splits == ((1,) * world,)
    assert sharding.padded((4 * world,)).boxes[-1].extent == (4,)
    with raises(ValueError, "must begin where patches"):
        sharding.coarsened((3,))
    with raises(ValueError, "must have the grid"):
        sharding.shard(torch.zeros(1, 5))


def refuses_placements() -> None:
    mesh = meshes()["square"]
    make = nd.GridSharding.from_placements
    with raises(NotImplementedError, "must be Shard or Replicate"):
        make((8, 8), mesh, (Shard(1), Partial()))
    with raises(NotImplementedError, "two dimensions of the mesh shard token axis 0"):
        make((8, 8), mesh, (Shard(1), Shard(1)))
    with raises(ValueError, "no dimension of the mesh shards tokens"):
        make((8, 8), mesh, (Shard(0), Shard(3)))
    with raises(ValueError, "placements must have one value for each of the 2"):
        make((8, 8), mesh, (Shard(1),))
    with raises(ValueError, "must be 2 extents that add up to the 8"):
        make((8, 8), mesh, (Shard(1), Shard(2)), splits=[(3, 4), None])
    with raises(ValueError, "is for a dimension that shards no tokens"):
        make((8, 8), mesh, (Shard(1), Shard(0)), splits=[None, (4, 4)])
    with raises(ValueError, "extents of 1, 2 or 3 axes"):
        make((2, 2, 2, 2), mesh, (Shard(1), Shard(2)))
    # One dimension shards tokens, the other the batch: two grids, each of two ranks.
    placed = make((8, 8), mesh, (Shard(0), Shard(-4)))
    assert len(placed.boxes) == 2
    assert placed.own.extent == (4, 8)


def keys_are_kept_until_read() -> None:
    """What is put together may be read later, on another stream: it is there until it was used."""
    sharding = line_of(24)
    given = boxes(sharding, 2, 4)
    mask = torch.arange(given[0].shape[1], device=DEVICE)[None] % 3 > 0
    read: dict[Any, list[StorageWeakRef]] = defaultdict(list)
    put, release = halo._Keys._put, halo._Keys.release
    numbers = 0

    def noted(keys: Any, box: Any, parts: Sequence[Tensor]) -> None:
        read[keys] += [StorageWeakRef(part.untyped_storage()) for part in parts]
        put(keys, box, parts)

    def released(keys: Any) -> None:
        nonlocal numbers
        numbers += len(read[keys])
        assert not any(storage.expired() for storage in read[keys])
        release(keys)

    with (
        mock.patch.object(halo._Keys, "_put", noted),
        mock.patch.object(halo._Keys, "release", released),
    ):
        out = nd.na1d(*given, 9, sharding=sharding, key_mask=mask, method="halo")
        forward = numbers
        out.sum().backward()
    # Of own and others' keys, values and masks.
    assert forward >= 6, forward
    assert numbers == 2 * forward, numbers


def saved_tensors_are_read_once() -> None:
    """With checkpointing, every look at a saved tensor computes the forward pass again."""
    for method in ("halo", "merge", "ring"):
        query, key, value = boxes(line_of(24), 2, 4)
        packs, looks = [], []

        def pack(tensor: Tensor, packs: list[int] = packs) -> Tensor:
            packs.append(1)
            return tensor

        def unpack(tensor: Tensor, looks: list[int] = looks) -> Tensor:
            looks.append(1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = nd.na1d(query, key, value, 9, sharding=line_of(24), method=method)
        out.backward(torch.ones_like(out))
        assert len(packs) == len(looks) > 0, method
        expected = [t.grad for t in (query, key, value)]
        for t in (query, key, value):
            t.grad = None
        runs = []

        def attend(*tensors: Tensor, method: str = method, runs: list[int] = runs) -> Tensor:
            runs.append(1)
            return nd.na1d(*tensors, 9, sharding=line_of(24), method=method)

        checkpoint(attend, query, key, value, use_reentrant=False).sum().backward()
        assert len(runs) == 2, method
        assert all(torch.equal(t.grad, e) for t, e in zip((query, key, value), expected))


def is_deterministic() -> None:
    """Twice the same call, bit by bit: messages are added in the order of the ranks."""
    torch.use_deterministic_algorithms(True)
    try:
        for method in ("halo", "merge", "ring"):
            runs = []
            for _ in range(3):
                tensors = boxes(line_of(40, 6), 4, 32, dtype=torch.bfloat16)
                out = nd.na2d(*tensors, (31, 5), sharding=line_of(40, 6), method=method)
                out.square().sum().backward()
                runs.append([out, *[t.grad for t in tensors]])
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other)), method
    finally:
        torch.use_deterministic_algorithms(False)


def gradients_are_asked_for_one_by_one() -> None:
    """Any of the inputs may be without a gradient, on every rank another."""
    sharding = line_of(24)
    full = boxes(sharding, 2, 4)
    nd.na1d(*full, 9, sharding=sharding, backend="reference").sum().backward()
    for wanted in range(3):
        some = boxes(sharding, 2, 4)
        index = (wanted + dist.get_rank()) % 3
        for i, t in enumerate(some):
            t.requires_grad_(i == index)
        nd.na1d(*some, 9, sharding=sharding, backend="reference").sum().backward()
        torch.testing.assert_close(some[index].grad, full[index].grad, rtol=0, atol=1e-12)
    # The logsumexp's alone; none at all.
    _, lse = nd.na1d(*full, 9, sharding=sharding, return_lse=True)
    lse.sum().backward()
    with torch.no_grad():
        assert not nd.na1d(*full, 9, sharding=sharding).requires_grad
    out = nd.na1d(*full, 9, sharding=sharding)
    (first,) = torch.autograd.grad(out.square().sum(), full[0], create_graph=True)
    with raises(NotImplementedError, "cannot be differentiated twice"):
        first.sum().backward()
    plain = [t.detach() for t in full]
    with raises(NotImplementedError, "forward mode"):
        torch.func.jvp(lambda q: nd.na1d(q, *plain[1:], 9, sharding=sharding), *[(plain[0],)] * 2)


def autocasts() -> None:
    """Exchanged in bfloat16, as the operator on one process computes."""
    sharding = line_of(24)
    tensors = boxes(sharding, 2, 8, dtype=torch.float32)
    bias = torch.randn(2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        out = nd.na1d(*tensors, 9, sharding=sharding, rpb=bias, backend="reference")
    assert out.dtype == torch.bfloat16
    low = [t.detach().bfloat16() for t in tensors]
    expected = nd.na1d(*low, 9, sharding=sharding, rpb=bias, backend="reference")
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def compiles(method: str, transport: str, heads_dim: int | None = None) -> None:
    """One graph, forward and backward, with the same results."""
    sharding = line_of(24, 6)
    options = dict(method=method, transport=transport, heads_dim=heads_dim, backend="reference")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = nd.na2d(query * 2, key, value, (9, 3), sharding=sharding, **options)
        return out.sin()

    expected, found = [], []
    for function, results in (
        (attend, expected),
        (torch.compile(attend, fullgraph=True, backend="aot_eager"), found),
    ):
        tensors = boxes(sharding, 8, 4)
        out = function(*tensors)
        out.square().sum().backward()
        results += [out, *[t.grad for t in tensors]]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    # A rank that differs at run time is met there, too.
    if dist.get_rank() == 0:
        tensors = [t.expand(2, *t.shape[1:]) for t in tensors]
    with raises(ValueError, "the batch size is 2 on rank 0, 1 on rank 1"):
        torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)


def counts_flops() -> None:
    """All ranks together count what one process does."""
    sharding = line_of(24, 6)
    tensors = boxes(sharding, 2, 4)
    window = dict(kernel_size=(9, 3), is_causal=(True, False))
    with FlopCounterMode(display=False) as counter:
        nd.na2d(*tensors, **window, sharding=sharding).sum().backward()
    total = torch.tensor(counter.get_total_flops())
    dist.all_reduce(total)
    whole_grid = [torch.randn(1, 24, 6, 2, 4, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as alone:
        natten.na2d(*whole_grid, **window).sum().backward()
    assert total.item() == alone.get_total_flops() > 0


# --- DTensors


def distributed(placements: tuple[Any, ...], mesh: DeviceMesh, heads: int = 4) -> list[Any]:
    """Query, key, value, additional keys and values, and a bias, as DTensors and as leaves of one
    process."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 12, 9, heads, 4)] * 3 + [(2, 3, heads, 4)] * 2 + [(heads, 9, 5)]
    found = []
    for i, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=generator, dtype=F64)
        placed = placements if i < 3 else [Replicate()] * mesh.ndim
        dtensor = distribute_tensor(tensor, mesh, placed, src_data_rank=None)
        found.append((dtensor.requires_grad_(), tensor.clone().requires_grad_()))
    return found


LAYOUTS: dict[str, tuple[Any, ...]] = {
    "tokens": (Shard(1), Shard(2)),
    "tokens and batch": (Shard(1), Shard(0)),
    "heads and tokens": (Shard(3), Shard(2)),
    "tokens, counted from the end": (Shard(-4), Replicate()),
    "batch and heads": (Shard(0), Shard(3)),
    "nothing": (Replicate(), Replicate()),
}


def dtensors(layout: str, function: str) -> None:
    """DTensors of true global shapes in and out; gradients, of what is replicated too, in full."""
    placements = LAYOUTS[layout]
    pairs = distributed(placements, meshes()["square"])
    results = []
    ours = natten.na2d if function == "na2d" else nd.na2d
    for which, attend in ((0, ours), (1, neighborhood_attention_generic)):
        query, key, value, keys, values, rpb = (pair[which] for pair in pairs)
        options = dict(rpb=rpb, additional_keys=keys, additional_values=values)
        out, lse = attend(
            query, key, value, (5, 3), **options, return_lse=True, backend="reference"
        )
        (out.sin().sum() + lse.cos().sum()).backward()
        results.append((out, lse))
    (out, lse), (true_out, true_lse) = results
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    for found, true in ((out, true_out), (lse, true_lse)):
        torch.testing.assert_close(found.full_tensor(), true, rtol=0, atol=1e-12)
    with raises(NotImplementedError, "query_origin is not implemented where the grid is sharded"):
        natten.functional.neighborhood_attention_generic(
            *[pair[0] for pair in pairs[:3]], 3, query_origin=(0, 0)
        )
    for dtensor, leaf in pairs:
        assert dtensor.grad.shape == leaf.shape
        torch.testing.assert_close(dtensor.grad.full_tensor(), leaf.grad, rtol=0, atol=1e-12)


def windows_of_other_kinds(layout: str) -> None:
    """Each as one process computes it; the others decline by name."""
    mesh = meshes()["square"]
    generator = torch.Generator().manual_seed(5)
    masks = {
        name: torch.rand(2, 12, 9, generator=generator) < 0.7 for name in ("key_mask", "query_mask")
    }
    sink, rpb = (torch.randn(shape, generator=generator, dtype=F64) for shape in (4, (4, 29, 5)))
    settings: list[dict[str, Any]] = [
        {"kernel_size": [(5, 3), (-1, 2)]},
        {"kernel_size": (5, 9), "is_circular": True, "stride": (2, 1), "dilation": (2, 1)},
        {"kernel_size": (5, 3), "softcap": 2.0, "sink": sink, **masks},
        {"kernel_size": [(15, 3), (3, 3)], "clip_window": True, "rpb": rpb},
        {"kernel_size": (3, 4), "is_circular": (False, True), "key_mask": masks["key_mask"]},
    ]
    for options in settings:
        pairs = distributed(LAYOUTS[layout], mesh)[:3]
        results = []
        for which in (0, 1):
            given = {
                name: distribute_tensor(t, mesh, [Replicate()] * 2, src_data_rank=None)
                if isinstance(t, Tensor) and not which
                else t
                for name, t in options.items()
            }
            out = natten.na2d(*[pair[which] for pair in pairs], **given)
            out.sin().sum().backward()
            results.append(out)
        torch.testing.assert_close(results[0].full_tensor(), results[1], rtol=0, atol=1e-12)
        for dtensor, leaf in pairs:
            torch.testing.assert_close(dtensor.grad.full_tensor(), leaf.grad, rtol=0, atol=1e-12)
    tensors = [pair[0] for pair in pairs]
    with raises(NotImplementedError, "upsampling is not implemented where the grid is sharded"):
        natten.na2d(*tensors, 3, upsampling=2)
    with raises(ValueError, "key_mask must be a DTensor"):
        natten.na2d(*tensors, 3, key_mask=masks["key_mask"])
    packed = [t.detach().flatten(1, 2)[:1] for t in (pair[1] for pair in pairs)]
    mesh = meshes()["line"]
    with raises(NotImplementedError, "a layout of tokens that are sharded over ranks"):
        neighborhood_attention_varlen(
            *[distribute_tensor(t, mesh, [Shard(1)]) for t in packed],
            natten.GridLayout([(12, 4), (12, 5)]),
            kernel_size=3,
        )


def operators_refuse_token_shards() -> None:
    """What would gather the grid raises; batch and heads are shared out."""
    mesh = meshes()["line"]
    window = (5, 3, 1, 1, 1, 1, 0, 0)
    rest = (window, 0.5, 0.0, 0, 0, "reference", "", True)
    for placement in (Shard(1), Shard(2), Shard(0), Shard(3), Replicate()):
        (query, _), (key, _), (value, _), *_, (rpb, _) = distributed((placement,), mesh)
        arguments = (query, key, value, rpb, *[None] * 8, 0)
        qkv = torch.cat([query, key, value], -2) if placement != Shard(3) else None
        packed = (qkv, *[None] * 11, 4)
        if placement.is_shard() and placement.dim in (1, 2):
            with raises(NotImplementedError, "is sharded along tokens"):
                operators.neighborhood_attention(*arguments, *rest)
            with raises(NotImplementedError, "is sharded along tokens"):
                operators.neighborhood_attention(*packed, *rest)
            continue
        out, lse = operators.neighborhood_attention(*arguments, *rest)
        assert out.placements == lse.placements == (placement,)
        (out.sum() + lse.sum()).backward()
        alone = [t.full_tensor().detach().requires_grad_() for t in (query, key, value, rpb)]
        true, true_lse = neighborhood_attention_generic(
            *alone[:3], (5, 3), scale=0.5, rpb=alone[3], return_lse=True, backend="reference"
        )
        (true.sum() + true_lse.sum()).backward()
        torch.testing.assert_close(out.full_tensor(), true, rtol=0, atol=1e-12)
        for found, leaf in zip((query, key, value, rpb), alone, strict=True):
            torch.testing.assert_close(found.grad.full_tensor(), leaf.grad, rtol=0, atol=1e-12)
        if qkv is not None:
            packed_out, _ = operators.neighborhood_attention(*packed, *rest)
            plain = neighborhood_attention_generic(
                *alone[:3], (5, 3), scale=0.5, backend="reference"
            )
            torch.testing.assert_close(packed_out.full_tensor(), plain, rtol=0, atol=1e-12)
            assert packed_out.placements == (placement,)


def refuses_dtensors() -> None:
    mesh = meshes()["square"]
    (query, plain), (key, _), (value, _), *_, (_, plain_rpb) = distributed(
        (Shard(1), Shard(2)), mesh
    )
    attend = nd.na2d
    with raises(ValueError, "key must be a DTensor"):
        attend(query, plain, value, 3)
    with raises(ValueError, "rpb must be a DTensor"):
        attend(query, key, value, (5, 3), rpb=plain_rpb)
    with raises(ValueError, "value must be placed as query"):
        attend(query, key, value.redistribute(placements=(Shard(1), Replicate())), 3)
    with raises(NotImplementedError, "query must be replicated, or sharded along batch"):
        attend(*[t.redistribute(placements=(Shard(4), Shard(1))) for t in (query, key, value)], 3)
    with raises(ValueError, "shares out key heads among 2 ranks, got 3"):
        attend(*[pair[0] for pair in distributed((Shard(3), Shard(1)), mesh, 3)[:3]], 3)
    with raises(ValueError, "sharding must be that of the DTensors"):
        other = nd.GridSharding.from_placements(
            (12, 9), mesh, (Shard(1), Shard(2)), splits=[(5, 7), None]
        )
        attend(query, key, value, 3, sharding=other)


# --- GPUs


def compiles_with_inductor() -> None:
    sharding = line_of(64, 32)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nd.na2d(query * 2, key, value, (17, 5), sharding=sharding).sin()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        tensors = boxes(sharding, 4, 64, dtype=torch.bfloat16)
        out = function(*tensors)
        out.float().square().sum().backward()
        results.append([out, *[t.grad for t in tensors]])
    for eager, compiled in zip(*results, strict=True):
        # A compiler rounds less often between its operations.
        assert (compiled - eager).abs().max() < 2e-2 * eager.abs().max()


def takes_little_memory() -> None:
    """The halo method holds its own tensors and keys with their halo, and no copy of the grid."""
    world = dist.get_world_size()
    sharding = line_of(64 * world, 64, 8)
    extent = (1, *sharding.own.extent, 8, 64)
    tensors = [
        torch.randn(extent, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    one = tensors[0].numel() * 2

    def peak(function: Callable[[], Any]) -> float:
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / one

    def call(**options: Any) -> Tensor:
        return nd.na3d(*tensors, (9, 9, 5), sharding=sharding, **options)

    with torch.no_grad():
        forward = peak(call)
    both = peak(lambda: torch.autograd.grad(call().sum(), tensors))
    gathered = peak(lambda: sharding.unshard(tensors[0].detach()))
    # The output, a quarter of keys and values with eight more rows, and the rows sent and received.
    assert forward < 3, forward
    # And three gradients, those of a chunk with its halo, and sums in float32.
    assert both < 10, both
    assert gathered > world


def agreement_without_a_cpu_backend() -> None:
    """Groups of NCCL alone compare what is new to them, on their GPUs."""
    group = dist.new_group(backend="nccl")
    for turn in range(2):
        agree(group, (("window", 3),))
        with raises(ValueError, "window is 3 on rank 0, 4 on rank 1"):
            # A call that none of them made before.
            agree(group, (("window", 3 if dist.get_rank() != 1 else 4), ("turn", turn)))


def mismatches_on_gpus() -> None:
    for name in ("kernel_size", "dtype", "the batch size", "grid", "method", "a wrong shape"):
        mismatch(name, 1)
