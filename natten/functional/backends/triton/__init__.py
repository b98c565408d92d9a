"""The Triton backends: one set of kernels, loaded through pointers or through TMA descriptors.

`cutlass` runs on any NVIDIA GPU that Triton supports; `hopper` reads its tiles with the tensor
memory accelerator and multiplies with warp-group instructions; `blackwell` does the same with a
persistent, warp-specialized loop. The names are those of NATTEN's CUTLASS backends, whose place
they take; there is no C++ here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from natten.context import Preferences, preferences
from natten.devices import capability as _capability
from natten.devices import multiprocessors as _multiprocessors
from natten.devices import shared_memory as _device_memory
from natten.functional.backends.triton import launch, tiles, wide
from natten.functional.backends.triton.launch import BackwardTilings
from natten.functional.backends.triton.tiles import Tiling
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem, Unavailable

MAX_HEAD_DIM = 256
# Shared memory of a program on the smallest GPU that can run a backend, in bytes.
_DEFAULT_SHARED_MEMORY = 64 * 1024
# Bytes of float32 sums of a backward pass that are not worth a second launch.
_SMALL_SUMS = 2**26


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return bool(knobs.runtime.interpret)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, which Triton launches on, unless it is."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


class _Backend:
    """An entry of the dispatch table; subclasses differ in what they run."""

    name: str
    tma = False
    largest_tile = 128
    takes_destinations = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def _device_refusal(self, capability: tuple[int, int]) -> str | None:
        raise NotImplementedError

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why this backend does not run the problem, or None if it does."""
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
        if problem.head_dim > MAX_HEAD_DIM:
            return f"head_dim must be at most {MAX_HEAD_DIM}, got {problem.head_dim}"
        return self._problem_refusal(problem)

    def _problem_refusal(self, problem: Problem) -> str | None:
        return None

    def _shared_memory(self, problem: Problem) -> int:
        if problem.device.type != "cuda":
            return _DEFAULT_SHARED_MEMORY
        return _device_memory(problem.device.index)

    def _choose(
        self, problem: Problem, kind: str, query: Any = None, key: Any = None, apart: bool = False
    ) -> Tiling:
        memory = self._shared_memory(problem)
        return tiles.choose(problem, kind, self.tma, memory, query, key, apart)

    def forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """The tiling of the forward pass: the caller's tiles, or the cost model's."""
        return self._choose(problem, tiles.FORWARD, config.q_tile_shape, config.kv_tile_shape)

    def backward_tilings(self, problem: Problem, config: Config) -> BackwardTilings:
        """The tilings of the backward pass."""
        return self._backward_tilings(problem, config, preferences())

    # Backends are few and live as long as the process.
    @lru_cache(maxsize=4096)  # noqa: B019
    def _backward_tilings(
        self, problem: Problem, config: Config, now: Preferences
    ) -> BackwardTilings:
        fixed = (config.backward_q_tile_shape, config.backward_kv_tile_shape)
        query = self._choose(problem, tiles.QUERY_GRADIENT, *fixed)
        key_value = self._choose(problem, tiles.KEY_VALUE_GRADIENT, *fixed)
        memory = self._shared_memory(problem)
        loops = 0 if config.backward_kv_splits is None else prod(config.backward_kv_splits)
        if not problem.num_additional:
            together = self._together(problem, config, now, query, key_value)
            sums = 4 * problem.batch * problem.num_queries * problem.heads * problem.head_dim
            launches = 1 if now.memory == "unrestricted" or sums <= _SMALL_SUMS else 2
            return BackwardTilings(query, key_value, key_value, 1, loops, together, launches)
        dense = launch.dense_problem(problem, problem.num_queries, problem.num_additional)
        additional = tiles.choose(dense, tiles.KEY_VALUE_GRADIENT, False, memory)
        splits = 1
        if now.kv_parallelism and now.memory != "strict":
            # Few tiles of additional keys, each with all queries to visit: divide the queries.
            rows = -(-problem.num_additional // additional.key[0])
            programs = rows * problem.heads_kv * problem.batch
            most = 64 if now.memory == "unrestricted" else 16
            splits = max(1, min(most, 512 // max(programs, 1), problem.num_queries // 256))
        return BackwardTilings(query, key_value, additional, splits, loops)

    def _together(
        self, problem: Problem, config: Config, now: Preferences, query: Tiling, key_value: Tiling
    ) -> Tiling | None:
        """The tiling of a kernel that computes all gradients in one pass, if that is to run instead
        of those with the other two tilings."""
        return None

    def forward(
        self, problem: Problem, config: Config, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out and logsumexp; see the backend protocol in `natten.functional.dispatch`."""
        slices = wide.sliced(problem)
        if slices is not None:
            problem, tensors = slices.problem, slices.inputs(tensors)
        tiling = self.forward_tiling(problem, config)
        with _on(problem.device):
            out, lse = launch.forward(problem, tiling, *tensors)  # type: ignore[arg-type]
        if slices is None:
            return out, lse
        return slices.join(out), slices.first(lse)  # type: ignore[return-value]

    def backward(
        self,
        problem: Problem,
        config: Config,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        *tensors: Any,
        destinations: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The six gradients; see the backend protocol in `natten.functional.dispatch`."""
        slices = wide.sliced(problem)
        if slices is not None:
            *inputs, out, lse, needs = tensors
            problem, destinations = slices.problem, None
            grad_out, grad_lse = slices.split(grad_out), slices.only_first(grad_lse)  # type: ignore[assignment]
            outputs = slices.split(out), slices.repeat(lse, -1)
            tensors = (*slices.inputs(tuple(inputs)), *outputs, needs)
        tilings = self.backward_tilings(problem, config)
        options = tilings, config.backward_use_pt_reduction, preferences().deterministic
        with _on(problem.device):
            gradients = launch.backward(
                problem, *options, grad_out, grad_lse, *tensors, destinations
            )
        return gradients if slices is None else slices.gradients(gradients)

    def configs(self, problem: Problem) -> list[Any]:
        """(query tile, key tile) pairs of the forward pass; the default first."""
        return self._listed(problem, tiles.FORWARD, self.forward_tiling(problem, DEFAULT_CONFIG))

    def backward_configs(self, problem: Problem) -> list[Any]:
        """(query tile, key tile) pairs of the backward pass; the default first."""
        found = self.backward_tilings(problem, DEFAULT_CONFIG)
        return self._listed(problem, tiles.KEY_VALUE_GRADIENT, found.together or found.key_value)

    def _listed(self, problem: Problem, kind: str, default: Tiling) -> list[Any]:
        return tiles.listed(problem, kind, default, self._shared_memory(problem), self.largest_tile)


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
    head_dims = (16, 32, 64, 128, 256)

    def _has_apart(self) -> bool:
        """Whether there is a kernel whose groups of warps run apart; no interpreter knows it."""
        return not interpreted() and launch.specialized() is not None

    def forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """The tiling that the schedule asks for, among those the caller's tiles allow.

        "non": a program for each tile. "coop": programs that stay, and two warp groups share a
        tile of 128 queries. "pp": warp groups with 64 queries each whose products and softmax
        alternate, two in a program where there is a kernel for that, else as programs that stay,
        two or more on a multiprocessor. None: the cost model's.
        """
        schedule = config.kernel_schedule
        query, key = config.q_tile_shape, config.kv_tile_shape
        if schedule in (None, "non"):
            apart = self._has_apart() and schedule is None
            return self._choose(problem, tiles.FORWARD, query, key, apart)
        apart = self._has_apart() and schedule == "pp" and tiles.suits_apart(problem)
        if query is None:
            if apart:
                query, key = tiles.best_apart_shapes(problem, 128, 128)
            else:
                columns = 64 if schedule == "pp" or problem.head_dim > 64 else 128
                rows = 64 if schedule == "pp" else 128
                query, key = tiles.best_shapes(problem, rows, columns)
        tiling = self._choose(problem, tiles.FORWARD, query, key, apart)
        if tiling.apart:
            return tiling
        warps = 8 if schedule == "coop" else 4
        resident = 1 if schedule == "coop" else 2
        programs = resident * (132 if interpreted() else _multiprocessors(problem.device.index))
        return tiles.persistent(tiling, programs, False, warps)

    def _together(
        self, problem: Problem, config: Config, now: Preferences, query: Tiling, key_value: Tiling
    ) -> Tiling | None:
        """Where that is faster, or tiles of its size are asked for, unless something asks for what
        it does not do: the same order of additions on every run, no extra memory, splits."""
        if (
            now.deterministic
            or now.memory == "strict"
            or config.backward_kv_splits is not None
            or not self._has_apart()
            or launch.specialized_backward() is None
            or not tiles.suits_together(problem)
        ):
            return None
        asked = config.backward_q_tile_shape, config.backward_kv_tile_shape
        if asked[0] is None or asked[1] is None:
            faster = tiles.is_faster_together(problem, query, key_value)
            return tiles.together(problem) if faster else None
        return tiles.together(problem, *asked) if tiles.are_together(problem, *asked) else None

    def configs(self, problem: Problem) -> list[Any]:
        """((query tile, key tile), schedule) of the forward pass; the default first."""
        rows = {"non": (64, 128), "coop": (128,), "pp": (64,)}
        apart = self._has_apart() and tiles.suits_apart(problem)
        return [
            (pair, schedule)
            for pair in super().configs(problem)
            for schedule, sizes in rows.items()
            if prod(pair[0]) in sizes
            or (apart and schedule == "pp" and tiles.is_apart(*map(prod, pair)))
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

    def forward_tiling(self, problem: Problem, config: Config) -> Tiling:
        """Tiles of 128 queries, a matrix instruction's rows, and specialized warps."""
        query, key = config.q_tile_shape, config.kv_tile_shape
        if query is None:
            query, key = tiles.best_shapes(problem, 128, 64)
        tiling = self._choose(problem, tiles.FORWARD, query, key)
        warps = 8 if problem.head_dim > 64 or prod(query) > 128 else 4
        # Warps specialize around descriptor loads.
        specialize = tiling.tma and not interpreted()
        programs = 0
        if config.run_persistent_kernel:
            programs = 148 if interpreted() else _multiprocessors(problem.device.index)
        return tiles.persistent(tiling, programs, specialize, warps)


CUTLASS, HOPPER, BLACKWELL = _Cutlass(), _Hopper(), _Blackwell()

__all__ = ["BLACKWELL", "CUTLASS", "HOPPER"]
