"""Tiles fit: all that are listed, and all that are chosen, for every kernel, head and GPU.

Kernels are compiled so far that their memory is known, for GPUs that need not be here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch

from natten import devices
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import make_problem

pytest.importorskip("triton")

from compiling import DEVICE, Memory, launches, measuring, without_memory
from triton.runtime.errors import OutOfResources

from natten.functional.backends.triton import BLACKWELL, CUTLASS, HOPPER, tiles
from natten.functional.backends.triton.launcher import Launch, TooLargeError, in_gluon

BACKENDS = {"cutlass": CUTLASS, "hopper": HOPPER, "blackwell": BLACKWELL}
GRIDS = {1: ((2000,), (555,)), 2: ((60, 50), (23, 17)), 3: ((12, 14, 18), (5, 7, 9))}


@dataclass(frozen=True)
class Draw:
    """A random problem, and tiles listed for its query, key and value."""

    arch: int
    backend: str
    problem: Problem
    config: Config
    backward: bool


def _bare(problem: Problem) -> Problem:
    """What is known to those who ask for a list: query, key and value."""
    ones = (1,) * problem.rank
    return replace(
        problem, kernel_size=problem.grid, stride=ones, dilation=ones,
        is_causal=(False,) * problem.rank, num_additional=0, has_lengths=False, has_rpb=False,
    )  # fmt: skip


@cache
def _listed(arch: int, backend: str, bare: Problem, backward: bool) -> list[Any]:
    with devices.pretending(devices.find(DEVICE[arch])):
        listing = BACKENDS[backend]
        return listing.backward_configs(bare) if backward else listing.configs(bare)


def draw(random: Random) -> Draw | None:
    """None where the backend declines."""
    arch = random.choice((75, 80, 86, 89, 90, 90, 90, 100, 100, 120))
    backend = random.choice(
        {90: ("cutlass", "hopper"), 100: ("cutlass", "blackwell")}.get(arch, ("cutlass",))
    )
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float32))
    rank = random.choice((1, 2, 3))
    if backend == "cutlass":
        head_dim = random.choice((16, 40, 32, 64, 96, 80, 128, 160, 256, 512, 1024))
        head_dim_v = random.choice((head_dim, head_dim, head_dim, 16, 64, 128, 256))
    else:
        head_dim = random.choice((32, 64, 64, 128, 128, 256))
        head_dim_v = random.choice((head_dim, head_dim, 64, 128))
    grid, kernel_size = GRIDS[rank]
    dilated = random.random() < 0.3
    causal = random.random() < 0.2
    additional = random.choice((0, 0, 0, 77))
    heads_kv = random.choice((4, 4, 2))
    problem = make_problem(
        grid, kernel_size, dilation=tuple(random.choice((1, 1 + dilated)) for _ in grid),
        is_causal=tuple(causal and random.random() < 0.7 for _ in grid),
        heads=4, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, batch=1,
        dtype=dtype, additional=additional, device="cuda",
    )  # fmt: skip
    problem = replace(
        problem,
        requires_grad=True,
        has_lengths=additional > 0 and random.random() < 0.3,
        has_rpb=not any(problem.is_causal) and random.random() < 0.3,
    )
    if (
        rank == 1
        and not problem.has_rpb
        and not dilated
        and not additional
        and random.random() < 0.3
    ):
        problem = replace(problem, varlen=True, max_seqlen_q=900, max_seqlen_kv=900)
        problem = replace(problem, kernel_size=problem.grid)
    with devices.pretending(devices.find(DEVICE[arch])):
        if BACKENDS[backend].refusal(problem, DEFAULT_CONFIG) is not None:
            return None
    backward = random.random() < 0.6
    knobs: dict[str, Any] = {}
    if random.random() < 0.8:
        entry = random.choice(_listed(arch, backend, _bare(problem), backward))
        if backend == "hopper" and not backward:
            entry, knobs["kernel_schedule"] = entry
        names = ("q_tile_shape", "kv_tile_shape")
        knobs |= {("backward_" if backward else "") + name: t for name, t in zip(names, entry)}
    return Draw(arch, backend, problem, Config(**knobs), backward)


def measure(drawn: Draw) -> list[Memory]:
    backend, problem = BACKENDS[drawn.backend], drawn.problem
    inputs, results, needs = without_memory(problem)
    with measuring(drawn.arch) as found:
        if drawn.backward:
            backend.backward(problem, drawn.config, inputs, results, needs)
        else:
            backend.forward(problem, drawn.config, inputs)
    return found


def check(seed: int) -> bool:
    """Check a random problem; False if there was none."""
    drawn = draw(Random(seed))
    if drawn is None:
        return False
    limit = devices.find(DEVICE[drawn.arch]).shared_memory
    found = measure(drawn)
    assert found, drawn
    for kernel in found:
        assert kernel.shared <= limit, (kernel, limit, drawn)
        assert kernel.tensor <= 512, (kernel, drawn)
    return True


# The last one took more than was estimated.
@pytest.mark.parametrize("seed", [*range(12), 1981])
def test_some_tiles_fit(seed: int) -> None:
    check(seed)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_many_tiles_fit(first: int) -> None:
    checked = sum(check(seed) for seed in range(first, first + 50))
    assert checked >= 20


def _problem(**changes: Any) -> Problem:
    settings: dict[str, Any] = dict(heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    made = make_problem((2000,), (555,), **(settings | changes))
    return replace(made, requires_grad=True)


# Pairs that the peer lists, or that people name.
@pytest.mark.parametrize(
    ("device", "backend", "rank", "head_dim", "dtype", "pair", "schedule", "backward"),
    [
        ("h100", "hopper", 3, 64, torch.float16, ((4, 16, 2), (1, 8, 8)), "pp", False),
        ("h100", "hopper", 3, 128, torch.bfloat16, ((4, 4, 8), (4, 4, 8)), "pp", False),
        ("h100", "hopper", 3, 128, torch.bfloat16, ((2, 4, 8), (1, 2, 32)), "non", False),
        ("h100", "hopper", 1, 256, torch.float16, ((128,), (64,)), "coop", False),
        ("h100", "hopper", 1, 256, torch.float16, ((64,), (64,)), None, True),
        ("h100", "hopper", 2, 128, torch.float16, ((1, 128), (128, 1)), None, True),
        ("h100", "cutlass", 2, 128, torch.float32, ((64, 1), (2, 16)), None, True),
        ("h100", "cutlass", 1, 128, torch.float32, ((64,), (64,)), None, True),
        ("h100", "cutlass", 1, 256, torch.float32, ((32,), (64,)), None, False),
        ("b200", "blackwell", 3, 128, torch.bfloat16, ((8, 4, 8), (4, 4, 8)), None, False),
        ("b200", "blackwell", 3, 64, torch.bfloat16, ((8, 4, 8), (4, 4, 8)), None, False),
    ],
)
def test_listed(
    device: str, backend: str, rank: int, head_dim: int, dtype: torch.dtype, pair: Any,
    schedule: str | None, backward: bool,
) -> None:  # fmt: skip
    grid, _kernel = GRIDS[rank]
    problem = make_problem(grid, grid, heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    problem = replace(problem, requires_grad=backward)
    with devices.pretending(devices.find(device)):
        listing = BACKENDS[backend]
        found = listing.backward_configs(problem) if backward else listing.configs(problem)
    assert (pair if schedule is None else (pair, schedule)) in found


@pytest.mark.parametrize("backend", ["hopper", "cutlass"])
def test_what_is_listed_does_not_depend_on_what_else_is_given(backend: str) -> None:
    listing = BACKENDS[backend]
    for dtype in (torch.float16, torch.float32):
        bare = replace(
            make_problem((40, 30), (40, 30), heads=2, head_dim=64, dtype=dtype, device="cuda"),
            requires_grad=True,
        )
        given = replace(
            bare, kernel_size=(7, 9), dilation=(2, 1), has_rpb=True, num_additional=5,
            has_lengths=True,
        )  # fmt: skip
        with devices.pretending(devices.find("h100")):
            if listing.refusal(bare, DEFAULT_CONFIG) is not None:
                continue
            assert set(listing.configs(bare)) <= set(listing.configs(given))
            assert set(listing.backward_configs(bare)) <= set(listing.backward_configs(given))


@pytest.mark.parametrize("device", ["a100", "l4", "h100"])
def test_wide_heads(device: str) -> None:
    """Tiles are those of the slices of values, which kernels run."""
    problem = make_problem((40, 30), 7, heads=2, head_dim=512, dtype=torch.float16, device="cuda")
    problem = replace(problem, head_dim_v=1024, requires_grad=True)
    with devices.pretending(devices.find(device)):
        assert CUTLASS.refusal(problem, DEFAULT_CONFIG) is None
        assert len(CUTLASS.configs(problem)) > 20
        assert len(CUTLASS.backward_configs(problem)) > 20
        reason = CUTLASS.refusal(replace(problem, dtype=torch.float32), DEFAULT_CONFIG)
    assert reason is not None
    assert "head_dim must be at most 256 in torch.float32, got 512" in reason


def _too_large(names: set[str], largest: int) -> Any:
    """A stand-in for launches that fail where tiles of a kernel have more tokens than ``largest``
    or are loaded ahead."""
    run = Launch.run

    def failing(launch: Launch, *tensors: Any) -> None:
        if launch.kernel.fn.__name__ in names:
            variant = launch.variant
            if largest < variant.QUERIES * variant.KEYS or variant.STAGES > 1:
                error = OutOfResources(262144, 232448, "shared memory")
                raise TooLargeError(*launch.tiles, error)
        run(launch, *tensors)

    return mock.patch.object(Launch, "run", failing)


@pytest.fixture
def _forgetful() -> Any:
    """Forgets afterwards which tiles were too large."""
    yield
    tiles._refused.clear()
    tiles.choose.cache_clear()
    for cached in (CUTLASS._forward_tiling, CUTLASS._backward_tilings):
        cached.cache_clear()


ROOM = 32 * 64
KERNELS = {"forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
GLUON = {"hopper_forward_kernel", "hopper_gradients_kernel"}


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize(
    ("backend", "arch", "names"),
    [
        (CUTLASS, 80, KERNELS),
        (HOPPER, 90, KERNELS | GLUON),
        (BLACKWELL, 100, KERNELS),
    ],
    ids=["cutlass", "hopper", "blackwell"],
)
def test_default_tiles_that_do_not_fit_become_smaller(
    backend: Any, arch: int, names: set[str]
) -> None:
    problem = replace(_problem(), num_additional=9)
    inputs, results, needs = without_memory(problem)
    launched = set()
    with launches(arch, lambda name, _: launched.add(name)), _too_large(names, ROOM):
        backend.forward(problem, DEFAULT_CONFIG, inputs)
        backend.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
        assert launched >= KERNELS
        # It is remembered.
        refused = set(tiles._refused)
        backend.forward(problem, DEFAULT_CONFIG, inputs)
        backend.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
        assert tiles._refused == refused
        assert len(refused) >= 3
        tilings = [
            backend.forward_tiling(problem, DEFAULT_CONFIG),
            backend.backward_tilings(problem, DEFAULT_CONFIG).query,
            backend.backward_tilings(problem, DEFAULT_CONFIG).key_value,
        ]
    for tiling in tilings:
        assert prod(tiling.query) * prod(tiling.key) <= ROOM
        assert tiling.stages == 1


@pytest.mark.skipif(in_gluon("hopper_backward") is None, reason="another dialect of Gluon")
@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize("additional", [0, 77])
def test_where_one_pass_does_not_fit_there_are_two(additional: int) -> None:
    problem = make_problem(
        (16384,), 16384, heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda",
        additional=additional,
    )  # fmt: skip
    problem = replace(problem, requires_grad=True)
    inputs, results, needs = without_memory(problem)
    launched: list[str] = []
    with launches(90, lambda name, _: launched.append(name)):
        assert HOPPER.backward_tilings(problem, DEFAULT_CONFIG).fused is not None
        with _too_large({"hopper_gradients_kernel"}, ROOM):
            HOPPER.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
        assert HOPPER.backward_tilings(problem, DEFAULT_CONFIG).fused is None
    assert {"query_gradient_kernel", "key_value_gradient_kernel"} <= set(launched)
    assert "hopper_gradients_kernel" not in launched


@pytest.mark.usefixtures("_forgetful")
def test_where_one_program_for_a_head_does_not_fit_there_are_more() -> None:
    problem = make_problem((8, 8), 7, heads=16, head_dim=64, dtype=torch.bfloat16, device="cuda")
    problem = replace(problem, batch=32, requires_grad=True)
    inputs, results, needs = without_memory(problem)
    launched: list[str] = []
    with launches(90, lambda name, _: launched.append(name)):
        assert CUTLASS.backward_tilings(problem, DEFAULT_CONFIG).single is not None
        CUTLASS.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
        assert launched == ["query_gradient_kernel"]
        with _too_large({"query_gradient_kernel"}, 64 * 64 - 1):
            CUTLASS.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
        found = CUTLASS.backward_tilings(problem, DEFAULT_CONFIG)
    assert found.single is None
    assert "key_value_gradient_kernel" in launched


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize("backward", [False, True])
def test_named_tiles_that_do_not_fit(backward: bool) -> None:
    problem = _problem()
    inputs, results, needs = without_memory(problem)
    prefix = "backward_" if backward else ""

    def attend(query: int, key: int) -> None:
        config = Config(**{f"{prefix}q_tile_shape": (query,), f"{prefix}kv_tile_shape": (key,)})  # type: ignore[arg-type]
        if backward:
            CUTLASS.backward(problem, config, inputs, results, needs)
        else:
            CUTLASS.forward(problem, config, inputs)

    with launches(80, lambda name, _: None), _too_large(KERNELS, ROOM):
        # Its tiles are not loaded ahead, but they are those that were named.
        attend(32, 64)
        tried = (128, 64)
        for _ in range(4):
            with pytest.raises(ValueError, match=f"{prefix}q_tile_shape and ") as raised:
                attend(*tried)
            assert "got ({},)/({},); ".format(*tried) in str(raised.value)
            # What is said to fit does, unless that is an error of the estimate, too.
            named = str(raised.value).rpartition("; ")[2].removesuffix(" does")
            query, key = (int(part.strip("(),")) for part in named.split("/"))
            tried = query, key
            if query * key <= ROOM:
                break
        attend(*tried)
        listed = CUTLASS.backward_configs(problem) if backward else CUTLASS.configs(problem)
        assert ((128,), (64,)) not in listed


@pytest.mark.usefixtures("_forgetful")
def test_nothing_fits() -> None:
    problem = _problem()
    inputs, *_ = without_memory(problem)
    with (
        launches(80, lambda name, _: None),
        _too_large(KERNELS, 0),
        pytest.raises(NotImplementedError, match="no tiles of head_dim 64"),
    ):
        CUTLASS.forward(problem, DEFAULT_CONFIG, inputs)


def test_launches_say_that_tiles_are_too_large() -> None:
    """What Triton raises where it loads a kernel."""
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.side_effect = OutOfResources(262144, 232448, "shared memory")
    tiling = tiles.Tiling((64,), (64,))
    launch = Launch(kernel, 1, (), tiles=(tiling, tiles.FORWARD))
    with pytest.raises(TooLargeError, match=r"\(64,\)/\(64,\).*262144") as caught:
        launch.run()
    assert (caught.value.tiling, caught.value.kind) == (tiling, tiles.FORWARD)
    with pytest.raises(OutOfResources):
        Launch(kernel, 1, ()).run()


def test_devices_do_not_share_their_tiles() -> None:
    """What is planned for one device is not taken for another's."""
    problem = _problem(head_dim=128, dtype=torch.float32)
    found = {}
    for device in ("h100", "t4", "h100"):
        with devices.pretending(devices.find(device)):
            planned = (
                CUTLASS.forward_tiling(problem, DEFAULT_CONFIG),
                CUTLASS.backward_tilings(problem, DEFAULT_CONFIG),
            )
        assert found.setdefault(device, planned) == planned
    assert found["t4"][0] != found["h100"][0]
    assert found["t4"][1] != found["h100"][1]


def test_lists_take_no_time() -> None:
    """Thousands of pairs, each of which costs microseconds."""
    problem = make_problem(
        (30, 48, 80), (18, 24, 24), heads=24, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    with devices.pretending(devices.find("h100")):
        start = time.process_time()
        listed = HOPPER.configs(problem)
        took = time.process_time() - start
    assert len(listed) > 1000
    assert took < 2.0
