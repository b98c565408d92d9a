"""The Triton backends: one set of kernels, loaded through pointers or through TMA descriptors.

`cutlass` runs on any NVIDIA GPU that Triton supports; `hopper` reads its tiles with the tensor
memory accelerator and multiplies with warp-group instructions; `blackwell` does the same with a
persistent, warp-specialized loop. The names are those of NATTEN's CUTLASS backends, whose place
they take; there is no C++ here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from natten import devices
from natten.context import Preferences, preferences
from natten.devices import Device
from natten.devices import capability as _capability
from natten.devices import multiprocessors as _multiprocessors
from natten.devices import shared_memory as _device_memory
from natten.functional.backend import Backend, Gradients, Inputs, Replay, Results
from natten.functional.backends.triton import tiles
from natten.functional.backends.triton.tiles import (
    BackwardTilings,
    Chip,
    Kernel,
    Tiling,
    dense_problem,
)
from natten.functional.backends.triton.value_slices import sliced
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem, Unavailable

# In float32, operands of wider heads would not stay in registers.
MAX_HEAD_DIM, MAX_FLOAT32_HEAD_DIM = 1024, 256
# The GPU that is planned for where the interpreter runs kernels.
_INTERPRETED = Chip(227 * 1024)
# Bytes of float32 sums of a backward pass that are not worth a second launch, and most of one.
_SMALL_SUMS, _LARGE_SUMS = 2**26, 2**28


@cache
def _kernels() -> Any:
    """The module that launches kernels, or the reason why it cannot be imported. Planning, which
    the simulator asks for as well, does without Triton."""
    try:
        from natten.functional.backends.triton import runtime
    except ImportError as error:
        return error
    return runtime


def _lacks_kernels() -> bool:
    return isinstance(_kernels(), ImportError)


def _has_gluon(name: str) -> bool:
    """Whether there is a kernel in that dialect here, or would be on a GPU that is planned for."""
    return _lacks_kernels() or _kernels().in_gluon(name) is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not _lacks_kernels() and bool(_kernels().knobs.runtime.interpret)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, which Triton launches on, unless it is."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _chip(problem: Problem) -> Chip:
    """What the problem's GPU offers to a program."""
    if problem.device.type != "cuda":
        return _INTERPRETED
    index = problem.device.index
    return Chip(_device_memory(index), tiles.products(_capability(index)))


def _most_splits(now: Preferences) -> int:
    """How many programs may share the queries of additional keys: each takes float32 memory."""
    if not now.kv_parallelism or now.memory == "strict":
        return 1
    return 64 if now.memory == "unrestricted" else 16


def _narrow(problem: Problem) -> Problem:
    """The problem that kernels run: values that are too wide come in slices."""
    slices = sliced(problem)
    return problem if slices is None else slices.problem


class _Backend(Backend):
    """An entry of the dispatch table; subclasses differ in what they run."""

    name: str
    tma = False
    largest_tile = 128
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def _device_refusal(self, capability: tuple[int, int]) -> str | None:
        raise NotImplementedError

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why this backend does not run the problem, or None if it does."""
        if _lacks_kernels() and devices.pretended() is None:
            return Unavailable(f"the {self.name} kernels cannot be imported: {_kernels()}")
        if interpreted():
            if problem.device.type != "cpu":
                return Unavailable("Triton's interpreter is on, which runs CPU tensors only")
            if problem.dtype == torch.bfloat16:
                return "Triton's interpreter does not compute bfloat16"
        elif problem.device.type != "cuda":
            return Unavailable(f"it runs on cuda tensors, and these are on {problem.device.type}")
        elif torch.version.hip is None:
            reason = self._device_refusal(_capability(problem.device.index))
            if reason is not None:
                return Unavailable(reason)
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"it takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
        most = MAX_FLOAT32_HEAD_DIM if problem.dtype == torch.float32 else MAX_HEAD_DIM
        if problem.head_dim > most:
            return f"head_dim must be at most {most} in {problem.dtype}, got {problem.head_dim}"
        reason = self._problem_refusal(problem)
        if reason is not None:
            return reason
        if not tiles.any_fit(_narrow(problem), _chip(problem)):
            return (
                f"head_dim {problem.head_dim} in {problem.dtype} takes more shared memory than "
                "this GPU has"
            )
        return None

    def _problem_refusal(self, problem: Problem) -> str | None:
        return None

    def _choose(
        self, problem: Problem, kernel: Kernel, query: Any = None, key: Any = None
    ) -> Tiling:
        return self._existing(problem, kernel, self.tma, query, key)

    def _existing(
        self,
        problem: Problem,
        kernel: Kernel,
        tma: bool,
        query: Any = None,
        key: Any = None,
    ) -> Tiling:
        """What `tiles.choose` finds, or the reason why it finds nothing."""
        chip = _chip(problem)
        tiling = tiles.choose(problem, kernel, tma, chip, query, key)
        if tiling is not None:
            return tiling
        room = f"{chip.shared_memory} bytes of shared memory that a program has on this GPU"
        if query is None:
            raise NotImplementedError(
                f"no tiles of head_dim {problem.head_dim} and head_dim_v {problem.head_dim_v} in "
                f"{problem.dtype} fit into the {room}"
            )
        prefix, valid = "backward_", self.backward_configs(problem)
        if kernel.general is tiles.FORWARD:
            prefix, valid = "", _Backend.configs(self, problem)
        raise ValueError(
            f"{prefix}q_tile_shape and {prefix}kv_tile_shape must be a pair that fits into the "
            f"{room}, got {query}/{key}" + "".join(f"; {q}/{kv} does" for q, kv in valid[:1])
        )

    def _first_fitting(self, problem: Problem, sizes: Iterable[tuple[int, int]]) -> Tiling:
        """The forward tiling of the first of these numbers of queries and keys that fits."""
        chip = _chip(problem)
        for queries, keys in sizes:
            pair = tiles.best_shapes(problem, tiles.FORWARD, queries, keys)
            tiling = tiles.choose(problem, tiles.FORWARD, self.tma, chip, *pair)
            if tiling is not None:
                return tiling
        return self._choose(problem, tiles.FORWARD)

    def forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """The tiling of the forward pass: the caller's tiles, or the cost model's."""
        return self._forward_tiling(problem, config, devices.pretended())

    # Backends are few and live as long as the process.
    @lru_cache(maxsize=4096)  # noqa: B019
    def _forward_tiling(self, problem: Problem, config: Config, _: Device | None) -> Tiling:
        return self._new_forward_tiling(_narrow(problem), config)

    def _new_forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        return self._choose(problem, tiles.FORWARD, config.q_tile_shape, config.kv_tile_shape)

    def backward_tilings(self, problem: Problem, config: Config) -> BackwardTilings:
        """The tilings of the backward pass."""
        return self._backward_tilings(problem, config, preferences(), devices.pretended())

    def takes_grids(self, problem: Problem, config: Config, backward: bool) -> bool:
        if problem.grids is None or config != DEFAULT_CONFIG or problem.grids.tokens >= 2**31:
            return False
        if backward:
            found = self._running_backward(problem, config)
            tilings = [found.query, found.key_value]
        else:
            tilings = [self._running(problem, config)]
        return bool(_kernels().can_place(problem, tilings, backward))

    def _refuse(self, problem: Problem, error: Any) -> None:
        """Never again choose tiles that turned out to be too large. Next time others are found, or
        it is said why there are none."""
        if not tiles.refuse(error.tiling, problem, error.kind, _chip(problem)):
            raise error
        self._forward_tiling.cache_clear()
        self._backward_tilings.cache_clear()

    @lru_cache(maxsize=4096)  # noqa: B019
    def _backward_tilings(
        self, problem: Problem, config: Config, now: Preferences, _: Device | None
    ) -> BackwardTilings:
        problem = _narrow(problem)
        fixed = (config.backward_q_tile_shape, config.backward_kv_tile_shape)
        query = self._choose(problem, tiles.QUERY_GRADIENT, *fixed)
        key_value = self._choose(problem, tiles.KEY_VALUE_GRADIENT, *fixed)
        persistent = 0 if config.backward_kv_splits is None else prod(config.backward_kv_splits)
        additional, splits = key_value, 1
        if problem.num_additional:
            additional, splits = self._additional(problem, now)
        found = BackwardTilings(query, key_value, additional, splits, persistent)
        found = self._fused(problem, config, now, found)
        if found.fused is None:
            found = replace(found, single=self._single(problem, config, found))
        return found

    def _additional(self, problem: Problem, now: Preferences) -> tuple[Tiling, int]:
        """The tiling of additional keys, and how many programs share the queries of a tile."""
        longest = problem.num_queries if problem.grids is None else problem.grids.longest
        dense = dense_problem(problem, longest, problem.num_additional)
        additional = self._existing(dense, tiles.KEY_VALUE_GRADIENT, False)
        # Few tiles of additional keys, each with all queries to visit: divide the queries.
        rows = -(-problem.num_additional // additional.key[0])
        programs = rows * problem.heads_kv * problem.entries
        most, wanted = _most_splits(now), 512 // max(programs, 1)
        if now.deterministic:
            # The order of additions must not depend on how many other entries there are.
            most, wanted = min(most, 4), 4
        return additional, max(1, min(most, wanted, longest // 256))

    def _fused(
        self, problem: Problem, config: Config, now: Preferences, found: BackwardTilings
    ) -> BackwardTilings:
        """The same, with those of a kernel that computes all gradients in one pass if that is to
        run instead."""
        return found

    @staticmethod
    def _single(problem: Problem, config: Config, found: BackwardTilings) -> Tiling | None:
        """The tiling of programs that have all queries of a head, if they are to run instead. Only
        on Hopper GPUs was it measured when that is."""
        chip = _chip(problem)
        if (
            config.backward_q_tile_shape is not None
            or config.backward_kv_splits is not None
            or chip.products != "hopper"
            or not tiles.is_single_faster(problem, found)
        ):
            return None
        tiling = tiles.single_tiling(problem)
        return tiling if tiles.fits(tiling, problem, tiles.SINGLE, chip) else None

    @staticmethod
    def _must_be_best(problem: Problem, tile: Any) -> bool:
        """Whether no shapes of earlier calls will do: somebody named a ``tile``, asked for the same
        bits whatever ran before, or has kernels compiled for whatever will have run before."""
        return (
            tile is not None
            or problem.device.type != "cuda"
            or preferences().deterministic
            or _kernels().for_any_order()
        )

    def _running(self, problem: Problem, config: Config) -> Tiling:
        """The tiling that a forward pass runs with."""
        tiling = self.forward_tiling(problem, config)
        if not self._must_be_best(problem, config.q_tile_shape):
            kernel = tiles.PING_PONG if tiling.ping_pong else tiles.FORWARD
            tiling = tiles.reuse(problem, kernel, tiling)
        if config.kernel_schedule is not None or config.q_tile_shape is not None:
            # Named tiles give the same bits whatever else is in a batch.
            return tiling
        if tiling.ping_pong:
            if self._split(problem, tiles.PING_PONG, tiling).splits == 1:
                return tiling
            tiling = self._choose(problem, tiles.FORWARD)
        return self._split(problem, tiles.FORWARD, tiling)

    def _split(self, problem: Problem, kernel: Kernel, tiling: Tiling) -> Tiling:
        """The tiling of programs that share columns where few programs would leave most of the GPU
        without work, unless something asks for one order of additions, or no extra memory."""
        now = preferences()
        if (
            now.deterministic
            or now.memory == "strict"
            or not now.kv_parallelism
            or problem.varlen
            or problem.grids is not None
            or tiling.programs
            or tiling.warp_specialize
        ):
            return tiling
        multiprocessors = 0 if interpreted() else _multiprocessors(problem.device.index)
        splits = tiles.splits(problem, kernel, tiling, multiprocessors)
        return replace(tiling, splits=splits)

    def _running_backward(self, problem: Problem, config: Config) -> BackwardTilings:
        """The tilings that a backward pass runs with."""
        found = self.backward_tilings(problem, config)
        if not self._must_be_best(problem, config.backward_q_tile_shape):
            if found.fused is not None:
                found = replace(found, fused=tiles.reuse(problem, tiles.FUSED, found.fused))
            else:
                found = replace(
                    found,
                    query=tiles.reuse(problem, tiles.QUERY_GRADIENT, found.query),
                    key_value=tiles.reuse(problem, tiles.KEY_VALUE_GRADIENT, found.key_value),
                )
        if config.backward_kv_splits is not None or config.backward_q_tile_shape is not None:
            return found
        if found.fused and self._split(problem, tiles.FUSED, found.fused).splits == 1:
            return found
        return replace(
            found,
            query=self._split(problem, tiles.QUERY_GRADIENT, found.query),
            key_value=self._split(problem, tiles.KEY_VALUE_GRADIENT, found.key_value),
            fused=None,
        )

    def forward(
        self, problem: Problem, config: Config, inputs: Inputs, destination: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out and logsumexp."""
        kernels, slices = _kernels(), sliced(problem)
        if slices is not None:
            problem, inputs, destination = slices.problem, slices.inputs(inputs), None
        with _on(problem.device):
            while True:
                tiling = self._running(problem, config)
                try:
                    run = (
                        kernels.in_gluon("hopper_forward").forward
                        if tiling.ping_pong
                        else kernels.forward
                    )
                    out, lse = run(problem, tiling, inputs, destination)
                    break
                except kernels.TooLargeError as error:
                    self._refuse(problem, error)
            is_real = problem.device.type == "cuda" and not kernels.is_collecting()
            if problem.requires_grad and is_real:
                self._compile_backward(problem, config, preferences())
        return (out, lse) if slices is None else (slices.join(out), slices.first(lse))

    @lru_cache(maxsize=4096)  # noqa: B019
    def _compile_backward(self, problem: Problem, config: Config, _: Preferences) -> None:
        """Have the kernels of the backward pass compiled by the time that it comes."""
        _kernels().compile_backward(self, problem, config)

    def backward(
        self,
        problem: Problem,
        config: Config,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None = None,
    ) -> Gradients:
        """The six gradients."""
        kernels, slices = _kernels(), sliced(problem)
        if slices is not None:
            problem, destinations = slices.problem, None
            inputs, results = slices.inputs(inputs), slices.results(results)
        options = config.backward_use_pt_reduction, preferences().deterministic
        with _on(problem.device):
            while True:
                tilings = self._running_backward(problem, config)
                try:
                    gradients = kernels.BackwardPass(
                        problem, tilings, *options, inputs, results, needs, destinations
                    ).run()
                    break
                except kernels.TooLargeError as error:
                    self._refuse(problem, error)
        return gradients if slices is None else slices.gradients(gradients)

    def record(
        self, function: Callable[[], Any], inputs: list[Tensor]
    ) -> tuple[Any, Replay | None]:
        if inputs[0].device.type != "cuda" or torch.version.hip is not None:
            return function(), None
        found: tuple[Any, Replay | None] = _kernels().record(function, inputs)
        return found

    def configs(self, problem: Problem) -> list[Any]:
        """(query tile, key tile) pairs of the forward pass; the default first."""
        default = self.forward_tiling(problem, DEFAULT_CONFIG)
        return self._listed(problem, (tiles.FORWARD,), default)

    def backward_configs(self, problem: Problem) -> list[Any]:
        """(query tile, key tile) pairs of the backward pass; the default first."""
        found = self.backward_tilings(problem, DEFAULT_CONFIG)
        # A named pair is that of both kernels.
        kinds = tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT
        return self._listed(problem, kinds, found.fused or found.key_value)

    def _listed(self, problem: Problem, kernels: tuple[Kernel, ...], default: Tiling) -> list[Any]:
        return tiles.listed(_narrow(problem), kernels, default, _chip(problem), self.largest_tile)


class _Cutlass(_Backend):
    name = "cutlass"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def _device_refusal(self, capability: tuple[int, int]) -> str | None:
        if capability < (7, 5):
            return (
                f"it needs compute capability 7.5 or newer, and this GPU has {_dotted(capability)}"
            )
        return None

    def _problem_refusal(self, problem: Problem) -> str | None:
        if problem.dtype == torch.bfloat16 and torch.version.hip is None:
            capability = _capability(problem.device.index)
            if capability < (8, 0):
                return (
                    f"bfloat16 needs compute capability 8.0, and this GPU has {_dotted(capability)}"
                )
        return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


class _Descriptors(_Backend):
    """Backends that read whole boxes of [token, head * feature] through descriptors."""

    tma = True
    head_dims: tuple[int, ...]

    def _problem_refusal(self, problem: Problem) -> str | None:
        for name, size in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
            if size not in self.head_dims:
                return f"{name} must be one of {self.head_dims}, got {size}"
        return None


class _Hopper(_Descriptors):
    name = "hopper"
    head_dims = (16, 32, 48, 64, 80, 96, 128, 256)

    def _has_ping_pong(self) -> bool:
        """Whether there is a ping-pong kernel: not in the interpreter, nor in an older Triton."""
        return not interpreted() and _has_gluon("hopper_forward")

    def float8_refusal(self, problem: Problem, named: bool) -> str | None:
        reason = self.refusal(problem, DEFAULT_CONFIG)
        if reason is not None:
            return reason
        if interpreted() or not _has_gluon("hopper_float8"):
            return Unavailable("its kernel for 8-bit numbers is in Gluon, of Triton 3.6 or newer")
        widths = tuple(tiles.FLOAT8.sizes)
        if problem.head_dim not in widths or problem.head_dim_v != problem.head_dim:
            return (
                f"in 8 bits, head_dim and head_dim_v must be equal and one of {widths}, got "
                f"{problem.head_dim} and {problem.head_dim_v}"
            )
        if tiles.is_dilated(problem):
            return f"in 8 bits, dilation must be 1, got {problem.dilation}"
        return None

    def float8_forward(
        self, problem: Problem, inputs: Inputs, scales: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        tiling = tiles.float8_tiling(problem)
        if not self._must_be_best(problem, None):
            tiling = tiles.reuse(problem, tiles.FLOAT8, tiling)
        with _on(problem.device):
            forward = _kernels().in_gluon("hopper_float8").forward
            found: tuple[Tensor, Tensor] = forward(problem, tiling, inputs, scales)
        return found

    def _new_forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """The tiling that the schedule asks for, among those the caller's tiles allow.

        "non": a program for each tile. "coop": programs that stay, and two warp groups share a
        tile of 128 queries. "pp": warp groups with 64 queries each whose products and softmax
        alternate, two in a program where there is a kernel for that, else as programs that stay,
        two or more on a multiprocessor. None: the cost model's.
        """
        schedule = config.kernel_schedule
        query, key = config.q_tile_shape, config.kv_tile_shape
        if schedule is None:
            tiling = self._choose(problem, tiles.PING_PONG, query, key)
            # Whether there is such a kernel is asked last: that imports Gluon.
            if not tiling.ping_pong or self._has_ping_pong():
                return tiling
        if schedule in (None, "non"):
            return self._choose(problem, tiles.FORWARD, query, key)
        ping_pong = self._has_ping_pong() and schedule == "pp" and tiles.PING_PONG.suits(problem)
        kernel = tiles.PING_PONG if ping_pong else tiles.FORWARD
        if query is None and ping_pong:
            (size,) = kernel.sizes[max(problem.head_dim, problem.head_dim_v)]
            query, key = tiles.best_shapes(problem, kernel, size.rows, size.columns)
        if query is None:
            rows = 64 if schedule == "pp" else 128
            columns = 64 if schedule == "pp" or problem.head_dim > 64 else 128
            tiling = self._first_fitting(problem, ((rows, columns), (rows, 32)))
        else:
            tiling = self._choose(problem, kernel, query, key)
        if tiling.ping_pong:
            return tiling
        warps = 8 if schedule == "coop" else tiling.warps
        resident = 1 if schedule == "coop" else 2
        programs = resident * (132 if interpreted() else _multiprocessors(problem.device.index))
        return tiles.persistent(tiling, programs, warps)

    def _fused(
        self, problem: Problem, config: Config, now: Preferences, found: BackwardTilings
    ) -> BackwardTilings:
        """Where that is faster, or tiles of its size are asked for, unless something asks for what
        it does not do: the same order of additions on every run, no extra memory, splits."""
        if (
            now.deterministic
            or now.memory == "strict"
            or config.backward_kv_splits is not None
            or interpreted()
            or not tiles.FUSED.suits(problem)
        ):
            return found
        rows, columns = config.backward_q_tile_shape, config.backward_kv_tile_shape
        is_named = rows is not None and columns is not None
        fused, additional = tiles.fused_tiling(problem, rows, columns), None
        if is_named and not tiles.is_fused_size(problem, fused.query, fused.key):
            return found
        width = tiles.block(problem.head_dim)
        sums = 4 * problem.batch * problem.num_queries * problem.heads * width
        launches = max(2, -(-sums // _LARGE_SUMS))
        if now.memory == "unrestricted" or sums <= _SMALL_SUMS:
            launches = 1
        if problem.num_additional:
            multiprocessors = _multiprocessors(problem.device.index)
            additional = tiles.fused_additional(
                problem, launches, multiprocessors, _most_splits(now)
            )
        if not (is_named or tiles.is_fused_faster(problem, found, fused, additional)):
            return found
        if not tiles.fits(fused, problem, tiles.FUSED, _chip(problem)):
            return found
        if not _has_gluon("hopper_backward"):
            return found
        return replace(found, fused=fused, launches=launches, fused_additional=additional)

    def configs(self, problem: Problem) -> list[Any]:
        """((query tile, key tile), schedule) of the forward pass; the default first."""
        rows = {"non": (64, 128), "coop": (128,), "pp": (64,)}
        # With a bias, say, the ping-pong kernel does not run, and the same tiles are those of
        # persistent programs: whether a pair is listed depends on query, key and value.
        ping_pong = self._has_ping_pong() and tiles.has_ping_pong_heads(problem)
        return [
            (pair, schedule)
            for pair in super().configs(problem)
            for schedule, sizes in rows.items()
            if prod(pair[0]) in sizes
            or (ping_pong and schedule == "pp" and tiles.is_ping_pong_size(*map(prod, pair)))
        ]

    def _device_refusal(self, capability: tuple[int, int]) -> str | None:
        if capability[0] != 9:
            return f"it needs a Hopper GPU (9.0), and this GPU has {_dotted(capability)}"
        return None


class _Blackwell(_Descriptors):
    name = "blackwell"
    head_dims = (16, 32, 64, 128)
    largest_tile = 256

    def _device_refusal(self, capability: tuple[int, int]) -> str | None:
        if capability not in ((10, 0), (10, 3)):
            return f"it needs a Blackwell GPU (10.0, 10.3), and this GPU has {_dotted(capability)}"
        return None

    def _new_forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """Tiles of 128 queries, a matrix instruction's rows, and specialized warps."""
        if problem.grids is not None:
            # Loads through pointers need more programs than stay.
            return super()._new_forward_tiling(problem, config)
        if config.q_tile_shape is None:
            tiling = self._first_fitting(problem, ((128, 64), (128, 32)))
        else:
            named = config.q_tile_shape, config.kv_tile_shape
            tiling = self._choose(problem, tiles.FORWARD, *named)
        rows = prod(tiling.query)
        warps = 8 if problem.head_dim > 64 or rows > 128 else 4
        programs = 0
        if config.run_persistent_kernel:
            programs = 148 if interpreted() else _multiprocessors(problem.device.index)
        tiling = tiles.persistent(tiling, programs, warps)
        # Warps specialize around descriptor loads and the products of Blackwell, but not where a
        # mask may skip these.
        is_uniform = tiling.tma and rows >= 64 and not problem.has_key_mask
        specialized = replace(tiling, warp_specialize=is_uniform and not interpreted())
        return (
            specialized
            if tiles.fits(specialized, problem, tiles.FORWARD, _chip(problem))
            else tiling
        )


CUTLASS, HOPPER, BLACKWELL = _Cutlass(), _Hopper(), _Blackwell()

__all__ = ["BLACKWELL", "CUTLASS", "HOPPER"]
