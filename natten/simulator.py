"""What tiles cost, without a GPU: exact counts, bounds on the speedup, predicted times, advice.

Kernels compute attention a tile of queries and a tile of keys at a time. A query tile visits the
key tiles that its windows touch. Key tiles in sight of every query are *full*, the others are
*partial*: computed like the full ones, then masked. What is masked away is waste, and depends on
window, stride, dilation and tile shapes. All counts here follow from :mod:`natten.window` and are
exact.

In this library's kernels the key tiles of a query tile begin where the union of its windows does.
Others keep both kinds of tiles on multiples of their shapes: ``aligned=True`` counts so.

Method: Generalized Neighborhood Attention (https://arxiv.org/abs/2504.16922).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch

from natten import devices, validation
from natten.advice import Advice, advise
from natten.devices import Device
from natten.functional import geometry
from natten.functional.dispatch import tile_pairs
from natten.functional.geometry import Shape, needed_pairs
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.tables import table
from natten.types import BoolOrSequence, IntOrSequence


class _Costs(NamedTuple):
    """What a kind of kernel spends its time on; see `_terms`.

    Fitted to the times of our kernels on an H200 by `benchmarks/fit_costs.py`, which writes the
    lines below; `benchmarks/predictions.py` compares times and predictions. Other devices are
    scaled by their facts, untested.
    """

    efficiency: float  # share of the peak of matrix products, all pairs of a tile computed
    exponentials: float  # per pair that are not hidden behind the products
    mask_operations: float  # vector instructions per masked pair
    visit: float  # seconds of a multiprocessor for every tile that is visited
    row_tile: float  # and for every tile of rows
    column_loads: float  # of reading the tiles that are visited from the cache, not hidden
    row_loads: float  # of reading and writing tiles of rows in memory, not hidden
    step: float  # seconds of a program, however many run, for 256 features of every visited tile
    launch: float  # seconds of a kernel


_FORWARD_COSTS = _Costs(1, 0.924, 6.02, 3.2e-08, 5.33e-08, 0.127, 1.8, 1.19e-06, 5e-06)
_FORWARD_FLOAT32_COSTS = _Costs(0.974, 0.756, 0, 0, 0, 0.714, 3.01, 3.4e-06, 5e-06)
# The forward kernel of two groups of warps that take turns.
_PING_PONG_COSTS = _Costs(1, 0.0214, 0.422, 6.04e-07, 2.65e-06, 0, 0.295, 1.1e-06, 5e-06)
# The backward kernel that computes all gradients in one pass.
_FUSED_COSTS = _Costs(0.999, 1.68, 14, 5.43e-07, 0, 0.0091, 6.24, 2.91e-06, 2e-05)
_BACKWARD_COSTS = _Costs(1, 0, 4.66, 2.7e-08, 0, 0.442, 2.19, 1.04e-06, 3.6e-06)
_BACKWARD_FLOAT32_COSTS = _Costs(1, 0, 0, 1.63e-07, 0, 1.76, 1.52, 5.97e-06, 3.6e-06)
# Of a multiprocessor: lanes for arithmetic and for exponentials, bytes from the cache a clock.
_LANES, _EXPONENTIAL_LANES, _CACHE_BYTES = 128, 16, 24
# Shares of the maker's bandwidth that a copy reaches.
_BANDWIDTH_EFFICIENCY = 0.9


@dataclass(frozen=True)
class Pass:
    """One kernel: the tiles that it visits and what that costs, over all batch entries and heads.

    Attributes:
        name: "forward", "query gradient", "key and value gradient" or "gradient of additional
            keys".
        q_tile_shape: Tile of queries.
        kv_tile_shape: Tile of keys.
        row_tiles: Tiles whose results the kernel computes: of keys in the last of the three.
        visited: Pairs of a row tile and a column tile that are computed.
        full: Those of them in which every query sees every key.
        skipped: Pairs of tiles that are not computed, out of all that dense attention has.
        executed_flops: Floating-point operations of matrix products that are executed.
        ms: Predicted milliseconds.
        limit: What bounds them: "compute", "memory" or "occupancy" (too few tiles for the device).
        terms: Seconds that a unit of each cost of the model adds, of `efficiency` one over it.
        memory_ms: Milliseconds for what must be read and written.
        warp_specialized: Whether groups of its warps take turns in computing.
    """

    name: str
    q_tile_shape: Shape
    kv_tile_shape: Shape
    row_tiles: int
    visited: int
    full: int
    skipped: int
    executed_flops: int
    ms: float
    limit: str
    terms: tuple[float, ...] = field(repr=False)
    memory_ms: float
    warp_specialized: bool = False

    @property
    def partial(self) -> int:
        """Visited tiles that have to be masked."""
        return self.visited - self.full


def traffic(problem: Problem, backward: bool) -> int:
    """Bytes that must be read and written, each once."""
    queries, keys = problem.num_queries, problem.num_keys + problem.num_additional
    d, dv = problem.head_dim, problem.head_dim_v
    rows = queries * problem.heads * (d + dv) + keys * problem.heads_kv * (d + dv)
    # Backward: all of these, the gradients of output and inputs.
    elements = rows + (rows + queries * problem.heads * dv if backward else 0)
    statistics = 4 * queries * problem.heads
    return problem.batch * (elements * problem.dtype.itemsize + statistics)


def _backward_share(problem: Problem) -> float:
    # Two kernels share the traffic of the backward pass.
    return traffic(problem, True) / 2


def _fused_traffic(problem: Problem) -> float:
    # It fills, adds to and reads float32 sums.
    sums = 4 * problem.batch * problem.num_queries * problem.heads * problem.head_dim
    return traffic(problem, True) + 3 * sums


class _Kernel(NamedTuple):
    """What distinguishes the kernels.

    Attributes:
        name: Of its `Pass`.
        inverse: Whether its rows are keys.
        products: Of each pair, with head_dim and with head_dim_v features.
        traffic: Bytes that it must read and write.
        costs: What it spends its time on.
        float32_costs: The same with float32, whose products are three each; None where that has
            another kernel.
        warp_specialized: As of its `Pass`.
    """

    name: str
    inverse: bool
    products: tuple[int, int]
    traffic: Callable[[Problem], float]
    costs: _Costs
    float32_costs: _Costs | None = None
    warp_specialized: bool = False


_FORWARD = _Kernel(
    "forward", False, (1, 1), partial(traffic, backward=False), _FORWARD_COSTS,
    _FORWARD_FLOAT32_COSTS,
)  # fmt: skip
_PING_PONG = _FORWARD._replace(costs=_PING_PONG_COSTS, float32_costs=None, warp_specialized=True)
# Two passes, each of which computes the weights and their gradients again ...
_QUERY = _Kernel(
    "query gradient", False, (2, 1), _backward_share, _BACKWARD_COSTS, _BACKWARD_FLOAT32_COSTS
)
_KEY_VALUE = _QUERY._replace(name="key and value gradient", inverse=True, products=(2, 2))
# ... or one.
_FUSED = _Kernel("all gradients", True, (3, 2), _fused_traffic, _FUSED_COSTS, warp_specialized=True)
_SINGLE = _FUSED._replace(
    inverse=False,
    traffic=partial(traffic, backward=True),
    costs=_BACKWARD_COSTS,
    warp_specialized=False,
)
_CONTEXT = _KEY_VALUE._replace(name="gradient of additional keys")
# With the additional keys' part of the query's gradient.
_FUSED_CONTEXT = _FUSED._replace(name=_CONTEXT.name)
_BACKWARD_PRODUCTS = (3, 2)  # that cannot be avoided


class _Tiling(NamedTuple):
    """Tiles of one kernel, and whether full key tiles are computed without masks."""

    query: Shape
    key: Shape
    mask_edges: bool = False


# A kernel that runs, and how.
_Planned = tuple[_Kernel, _Tiling]


def gpu_backend(problem: Problem, device: Device) -> Any:
    """The backend that would run a problem on a device, which need not be here.

    Raises:
        RuntimeError: No GPU backend runs the problem there.
    """
    from natten.functional.backends import triton

    there = on_gpu(problem)
    with devices.pretending(device):
        for backend in (triton.BLACKWELL, triton.HOPPER, triton.CUTLASS):
            reason = backend.refusal(there, DEFAULT_CONFIG)
            if reason is None:
                return backend
    raise RuntimeError(
        f"no GPU backend runs this on {device.name} ({backend.name}: {reason}): to count tiles "
        "nevertheless, give q_tile_shape and kv_tile_shape"
    )


def on_gpu(problem: Problem) -> Problem:
    """The same problem for tensors on a GPU."""
    return problem if problem.device.type == "cuda" else replace(problem, device=_GPU)


_GPU = torch.device("cuda")


def _forward_kernel(problem: Problem, device: Device, config: Config) -> _Planned:
    asked = config.q_tile_shape, config.kv_tile_shape
    try:
        backend, there = gpu_backend(problem, device), on_gpu(problem)
        with devices.pretending(device):
            found = backend.forward_tiling(there, config)
    except RuntimeError:
        if asked[0] is None or asked[1] is None:
            raise
        return _FORWARD, _Tiling(asked[0], asked[1])
    return _PING_PONG if found.ping_pong else _FORWARD, _as_asked(found, *asked)


def _backward_kernels(problem: Problem, device: Device, config: Config) -> list[_Planned]:
    asked = config.backward_q_tile_shape, config.backward_kv_tile_shape
    try:
        backend, there = gpu_backend(problem, device), on_gpu(problem)
        with devices.pretending(device):
            found = backend.backward_tilings(there, config)
    except RuntimeError:
        if asked[0] is None or asked[1] is None:
            raise
        return [(kernel, _Tiling(asked[0], asked[1])) for kernel in (_QUERY, _KEY_VALUE)]
    if found.fused:
        return [(_FUSED, _as_asked(found.fused, *asked))]
    if found.single:
        return [(_SINGLE, _as_asked(found.single, *asked))]
    pairs = ((_QUERY, found.query), (_KEY_VALUE, found.key_value))
    return [(kernel, _as_asked(tiling, *asked)) for kernel, tiling in pairs]


def _as_asked(tiling: Any, query: Shape | None, key: Shape | None) -> _Tiling:
    # Kernels shrink tiles that do not fit the device; counts are of what was asked for.
    return _Tiling(query or tiling.query, key or tiling.key, tiling.mask_edges)


def _simulate_pass(problem: Problem, planned: _Planned, device: Device, aligned: bool) -> Pass:
    kernel, tiling = planned
    rows, columns = tiling.query, tiling.key
    if kernel.inverse:
        rows, columns = columns, rows
    boxes = geometry.boxes(problem, kernel.inverse)
    row_tiles, visited, full, everything = geometry.count_tiles(
        problem.axes, boxes, rows, columns, kernel.inverse, aligned
    )
    if problem.num_additional and not kernel.inverse:
        size = prod(columns)
        visited += row_tiles * -(-problem.num_additional // size)
        full += row_tiles * (problem.num_additional // size)
        everything += row_tiles * -(-problem.num_additional // size)
    times = problem.batch * problem.heads
    row_tiles *= problem.batch * (problem.heads_kv if kernel.inverse else problem.heads)
    visited, full, skipped = visited * times, full * times, (everything - visited) * times
    pairs = visited * prod(rows) * prod(columns)
    masked = pairs - (full * prod(rows) * prod(columns) if tiling.mask_edges else 0)
    d, dv = problem.head_dim, problem.head_dim_v
    flops = 2 * pairs * (kernel.products[0] * d + kernel.products[1] * dv)
    numbers = (pairs, masked, visited, row_tiles)
    terms = _terms(problem, device, kernel, numbers, prod(rows), prod(columns))
    costs = kernel.costs
    if problem.dtype == torch.float32 and kernel.float32_costs is not None:
        costs = kernel.float32_costs
    memory = kernel.traffic(problem) / (_BANDWIDTH_EFFICIENCY * device.bandwidth * 1e9)
    *busy, launch = (1 / costs.efficiency, *costs[1:])
    compute = sum(cost * term for cost, term in zip(busy, terms))
    limit = "occupancy" if 0 < row_tiles < device.multiprocessors else "compute"
    in_memory = costs.row_loads * terms[_Costs._fields.index("row_loads")]
    if max(memory, 2 * in_memory) > compute:
        limit = "memory"
    return Pass(
        kernel.name, tiling.query, tiling.key, row_tiles, visited, full, skipped, flops,
        (max(compute, memory) + launch) * 1e3, limit, terms, memory * 1e3,
        kernel.warp_specialized,
    )  # fmt: skip


def _terms(
    problem: Problem,
    device: Device,
    kernel: _Kernel,
    numbers: tuple[int, int, int, int],
    rows: int,
    columns: int,
) -> tuple[float, ...]:
    """`Pass.terms`: of all costs but `launch`, in the order of `_Costs`. ``numbers`` are those of
    pairs, masked pairs, visited tiles and row tiles, of so many ``rows`` and ``columns``."""
    from natten.functional.backends.triton import tiles

    pairs, masked, visited, row_tiles = numbers
    features = [problem.head_dim, problem.head_dim_v]
    if not kernel.warp_specialized:
        # Products are of whole tiles of features.
        features = [sum(tiles.parts(d, problem.dtype)) for d in features]
    products, width = kernel.products, sum(features) * problem.dtype.itemsize
    flops = 2 * pairs * (products[0] * features[0] + products[1] * features[1])
    clocks = device.multiprocessors * device.clock * 1e9
    # Rows are read, and what is written is as wide as they are in all.
    ways = 1 if kernel.name == _FORWARD.name else 2
    terms = (
        flops / (device.rate(problem.dtype) * 1e12),
        pairs / (_EXPONENTIAL_LANES * clocks),
        masked / (_LANES * clocks),
        visited / device.multiprocessors,
        row_tiles / device.multiprocessors,
        visited * columns * width / (_CACHE_BYTES * clocks),
    )
    # Multiprocessors without a tile of rows are idle.
    idle = max(device.multiprocessors / row_tiles, 1.0) if row_tiles else 1.0
    return (
        *(idle * term for term in terms),
        ways * row_tiles * rows * width / (device.bandwidth * 1e9),
        visited * sum(features) / (256 * row_tiles) if row_tiles else 0.0,
    )


def _rounded(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _times(shape: Iterable[Any]) -> str:
    return "x".join(str(n) for n in shape)


def _causal(is_causal: Sequence[bool]) -> str:
    if len(set(is_causal)) == 1:
        return "yes" if is_causal[0] else "no"
    return "axis " + ", ".join(str(axis) for axis, causal in enumerate(is_causal) if causal)


def _others(problem: Problem) -> str:
    """What few calls have."""
    circular = f", circular {_causal(problem.is_circular)}" if problem.is_circular else ""
    return circular + (f", upsampling {_times(problem.upsampling)}" if problem.upsampling else "")


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` found. ``str()`` is a table.

    Attributes:
        problem: The call without its data.
        device: For which times are predicted.
        aligned: Whether tiles of keys lie on multiples of their shape.
        forward: The forward kernel.
        backward: The kernels of the backward pass.
        needed_pairs: Pairs of a query and a key that it attends to, over batch and heads.
        dense_pairs: All pairs of a query and a key.
        dense_ms: Predicted milliseconds of dense attention with the same kernel.
    """

    problem: Problem
    device: Device
    aligned: bool
    forward: Pass
    backward: tuple[Pass, ...]
    needed_pairs: int
    dense_pairs: int
    dense_ms: float

    @property
    def needed_flops(self) -> int:
        """Floating-point operations that the forward pass cannot avoid."""
        return 2 * self.needed_pairs * (self.problem.head_dim + self.problem.head_dim_v)

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of a dense forward pass."""
        return 2 * self.dense_pairs * (self.problem.head_dim + self.problem.head_dim_v)

    @property
    def needed_backward_flops(self) -> int:
        """Floating-point operations that the backward pass cannot avoid: five products."""
        d, dv = self.problem.head_dim, self.problem.head_dim_v
        return 2 * self.needed_pairs * (_BACKWARD_PRODUCTS[0] * d + _BACKWARD_PRODUCTS[1] * dv)

    @property
    def waste(self) -> float:
        """Executed over needed operations of the forward pass; 1 is none."""
        return self.forward.executed_flops / max(self.needed_flops, 1)

    @property
    def ideal_speedup(self) -> float:
        """Speed over dense attention, if only what is needed were computed: a bound for tiles."""
        return self.dense_flops / max(self.needed_flops, 1)

    @property
    def speedup_bound(self) -> float:
        """Speed over dense attention at the same rate, with these tiles."""
        return self.dense_flops / max(self.forward.executed_flops, 1)

    @property
    def forward_ms(self) -> float:
        """Predicted milliseconds of the forward pass."""
        return self.forward.ms

    @property
    def backward_ms(self) -> float:
        """Predicted milliseconds of the backward pass."""
        return sum(kernel.ms for kernel in self.backward)

    @property
    def predicted_speedup(self) -> float:
        """Predicted time of dense attention over that of the forward pass."""
        return self.dense_ms / self.forward_ms

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Forward and backward kernels."""
        return (self.forward, *self.backward)

    def variant(self, problem: Problem, config: Config = DEFAULT_CONFIG) -> Simulation:
        """Another call on the same device."""
        return simulate_problem(problem, self.device, config)

    def listed_tiles(self) -> list[tuple[Shape, Shape]]:
        """Pairs of query and key tiles that the backend lists for the call.

        Raises:
            RuntimeError: No GPU backend runs the problem there.
        """
        problem = on_gpu(self.problem)
        backend = gpu_backend(problem, self.device)
        with devices.pretending(self.device):
            return list(dict.fromkeys(pair for pair, _ in tile_pairs(backend.configs(problem))))

    def advise(self) -> Advice:
        """Strides, dilations, windows and tile shapes that waste less: `natten.advice.advise`."""
        return advise(self)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists only, for JSON."""
        problem = self.problem
        return {
            "shape": list(problem.query_shape),
            "kernel_size": list(problem.kernel_size),
            "stride": list(problem.stride),
            "dilation": list(problem.dilation),
            "is_causal": list(problem.is_causal),
            "is_circular": list(problem.is_circular or (False,) * problem.rank),
            "upsampling": list(problem.upsampling or (1,) * problem.rank),
            "batch": problem.batch,
            "heads": problem.heads,
            "heads_kv": problem.heads_kv,
            "head_dim": problem.head_dim,
            "head_dim_v": problem.head_dim_v,
            "additional": problem.num_additional,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "device": self.device.name,
            "aligned": self.aligned,
            "passes": [
                {**{k: v for k, v in asdict(p).items() if k != "terms"}, "partial": p.partial}
                for p in self.passes
            ],
            "needed_flops": self.needed_flops,
            "needed_backward_flops": self.needed_backward_flops,
            "dense_flops": self.dense_flops,
            "waste": self.waste,
            "ideal_speedup": self.ideal_speedup,
            "speedup_bound": self.speedup_bound,
            "forward_ms": self.forward_ms,
            "backward_ms": self.backward_ms,
            "dense_ms": self.dense_ms,
            "predicted_speedup": self.predicted_speedup,
        }

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Notebooks show the table."""
        printer.text(str(self))

    def __str__(self) -> str:
        p = self.problem
        rows = [
            (
                kernel.name, _times(kernel.q_tile_shape), _times(kernel.kv_tile_shape),
                f"{kernel.row_tiles:,}", f"{kernel.visited:,}", f"{kernel.full:,}",
                f"{kernel.partial:,}", f"{kernel.skipped:,}",
                _rounded(kernel.executed_flops / 1e9), _rounded(kernel.ms), kernel.limit,
            )
            for kernel in self.passes
        ]  # fmt: skip
        header = (
            "kernel", "q tile", "kv tile", "row tiles", "visited", "full", "partial", "skipped",
            "GFLOP", "ms", "limit",
        )  # fmt: skip
        return "\n".join(
            (
                f"{_times(p.query_shape)} tokens, kernel_size {_times(p.kernel_size)}, stride "
                f"{_times(p.stride)}, dilation {_times(p.dilation)}, causal "
                f"{_causal(p.is_causal)}{_others(p)}; batch {p.batch}, heads "
                f"{p.heads}/{p.heads_kv}, head_dim {p.head_dim}/{p.head_dim_v}, "
                f"{str(p.dtype).removeprefix('torch.')}; {self.device.full_name}"
                + (", key tiles aligned to their shape" if self.aligned else ""),
                "",
                table(header, rows),
                "",
                f"needed          {_rounded(self.needed_flops / 1e9)} GFLOP forward, "
                f"{_rounded(self.needed_backward_flops / 1e9)} backward; dense "
                f"{_rounded(self.dense_flops / 1e9)} forward",
                f"executed        {self.waste:.2f} times what is needed, forward",
                f"best speedup    {_rounded(self.ideal_speedup)} over dense attention by needed "
                f"operations, {_rounded(self.speedup_bound)} with these tiles",
                f"predicted       {_rounded(self.forward_ms)} ms forward, "
                f"{_rounded(self.backward_ms)} ms backward, {_rounded(self.dense_ms)} ms dense "
                f"forward: speedup {_rounded(self.predicted_speedup)}",
            )
        )


def make_problem(
    shape: Sequence[int],
    kernel_size: IntOrSequence,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    *,
    is_circular: BoolOrSequence | None = False,
    upsampling: IntOrSequence | None = 1,
    clip_window: bool = False,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    additional: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    softcap: float | None = None,
    **has: Any,
) -> Problem:
    """The problem that a call over a whole grid states, checked; see :func:`simulate`. ``has`` are
    flags of :class:`Problem`, such as has_sink."""
    if isinstance(shape, int):
        shape = (shape,)
    shape = validation.int_tuple("shape", tuple(shape), len(shape))
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape must have 1, 2 or 3 axes of tokens, got {shape}")
    heads_kv = heads if heads_kv is None else heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, value, minimum in (
        ("batch", batch, 1), ("heads", heads, 1), ("heads_kv", heads_kv, 1),
        ("head_dim", head_dim, 1), ("head_dim_v", head_dim_v, 1), ("additional", additional, 0),
    ):  # fmt: skip
        if not isinstance(value, int) or value < minimum:
            got = validation.shown(value)
            raise ValueError(f"{name} must be an int of at least {minimum}, got {got}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        got = validation.shown(dtype)
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {got}")
    if heads % heads_kv:
        raise ValueError(f"heads must be a multiple of heads_kv, got {heads} and {heads_kv}")
    zeros = (0,) * len(shape)
    sizes = kernel_size, stride, dilation
    if validation.optional_bool("clip_window", clip_window):
        sizes = validation.clipped_window(shape, *sizes)
    windows = validation.check_window(shape, *sizes, is_causal)
    rings = validation.check_circular(is_circular, shape, *windows)
    factors = validation.int_tuple(
        "upsampling", 1 if upsampling is None else upsampling, len(shape)
    )
    queries = tuple([factor * n for factor, n in zip(factors, shape, strict=True)])
    validation.check_upsampling(factors, queries, shape, windows[2], None)
    if has.get("has_rpb") and (any(windows[3]) or queries != shape):
        raise ValueError(
            "a relative position bias is not for causal axes nor for upsampling, got "
            f"is_causal={windows[3]} and upsampling={factors}"
        )
    return Problem(
        batch, queries, shape, heads, heads_kv, head_dim, head_dim_v, *windows, shape, zeros, zeros,
        validation.check_scale(None, head_dim), num_additional=additional, is_circular=rings,
        upsampling=factors if queries != shape else (), dtype=dtype, device=torch.device(device),
        requires_grad=requires_grad, softcap=validation.check_softcap(softcap), **has,
    )  # fmt: skip


def dense_of(problem: Problem) -> Problem:
    """Attention of all queries to all keys, with the other facts of ``problem``."""
    length = (max(problem.num_queries, problem.num_keys),)
    return replace(
        problem,
        query_shape=(problem.num_queries,),
        key_shape=(problem.num_keys,),
        kernel_size=length, stride=(1,), dilation=(1,), is_causal=(False,), is_circular=(),
        upsampling=(), grid=length, query_origin=(0,), key_origin=(0,), has_rpb=False,
    )  # fmt: skip


def simulate_problem(
    problem: Problem,
    device: Device,
    config: Config = DEFAULT_CONFIG,
    aligned: bool = False,
) -> Simulation:
    """:func:`simulate` for a problem, which may also be one of boxes of a grid.

    Tile shapes come from ``config``, or are the backends' own choice.
    """
    if problem.varlen or problem.grids is not None:
        raise ValueError(
            "packed sequences, and grids of different sizes, cannot be simulated: give one of them "
            "as a problem"
        )
    forward = _forward_kernel(problem, device, config)
    try:
        kernels = _backward_kernels(problem, device, config)
    except RuntimeError:
        if config.backward_q_tile_shape is not None or config.q_tile_shape is None:
            raise
        _, tiling = forward
        kernels = [(_QUERY, tiling), (_KEY_VALUE, tiling)]
    backward = [_simulate_pass(problem, planned, device, aligned) for planned in kernels]
    if problem.num_additional:
        backward.append(_simulate_context(problem, device, config))
    times = problem.batch * problem.heads
    dense = dense_of(problem)
    try:
        dense_forward = _forward_kernel(dense, device, DEFAULT_CONFIG)
    except RuntimeError:
        dense_forward = (_FORWARD, _Tiling((128,), (128,)))
    return Simulation(
        problem, device, aligned,
        _simulate_pass(problem, forward, device, aligned),
        tuple(backward),
        needed_pairs(problem) * times,
        problem.num_queries * (problem.num_keys + problem.num_additional) * times,
        _simulate_pass(dense, dense_forward, device, False).ms,
    )  # fmt: skip


def _simulate_context(problem: Problem, device: Device, config: Config) -> Pass:
    """The kernel of the gradients of additional keys: dense attention of all queries to them."""
    from natten.functional.backends.triton import tiles

    kernel, tiling, splits = _CONTEXT, _Tiling((64,), (64,)), 1
    with suppress(RuntimeError):
        backend, there = gpu_backend(problem, device), on_gpu(problem)
        with devices.pretending(device):
            chosen = backend.backward_tilings(there, config)
        if chosen.fused:
            kernel, splits = _FUSED_CONTEXT, chosen.fused_additional.splits
        tiling = _as_asked(chosen.fused_additional or chosen.additional, None, None)
    context = tiles.additional_problem(problem, splits)
    found = _simulate_pass(context, (kernel, tiling), device, False)
    # Queries of one share do not skip the copies of the keys that are for others.
    return replace(found, skipped=0)


def predict(
    problem: Problem, device: Device, config: Config, backward: bool = False
) -> tuple[float, float]:
    """Milliseconds and waste of one pass: the part of :func:`simulate_problem` that ranks tiles."""
    if backward:
        kernels = _backward_kernels(problem, device, config)
    else:
        kernels = [_forward_kernel(problem, device, config)]
    passes = [_simulate_pass(problem, planned, device, False) for planned in kernels]
    if backward and problem.num_additional:
        passes.append(_simulate_context(problem, device, config))
    d, dv = problem.head_dim, problem.head_dim_v
    products = _BACKWARD_PRODUCTS if backward else _FORWARD.products
    needed = 2 * needed_pairs(problem) * (products[0] * d + products[1] * dv)
    executed = sum(p.executed_flops for p in passes)
    return sum(p.ms for p in passes), executed / max(needed * problem.batch * problem.heads, 1)


def simulate(
    shape: Sequence[int],
    kernel_size: IntOrSequence,
    stride: IntOrSequence | None = 1,
    dilation: IntOrSequence | None = 1,
    is_causal: BoolOrSequence | None = False,
    *,
    is_circular: BoolOrSequence | None = False,
    upsampling: IntOrSequence | None = 1,
    clip_window: bool = False,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    additional: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    aligned: bool = False,
    device: str | Device = "h100",
) -> Simulation:
    """Count the tiles and operations of a call and predict its time; nothing is computed.

    >>> print(natten.simulate((30, 48, 80), (18, 24, 24), heads=24).waste)  # doctest: +SKIP
    1.43

    Args:
        shape: Tokens along each of 1, 2 or 3 axes; with upsampling, those of keys.
        kernel_size: Window size; an int stands for every axis.
        stride: Queries that share one window.
        dilation: Distance of neighbors.
        is_causal: Whether queries attend to no later token.
        is_circular: Whether windows wrap around.
        upsampling: Queries of each key.
        clip_window: Make do with a grid that is too small for the window.
        batch: Batch size.
        heads: Query heads.
        heads_kv: Key and value heads; default as many.
        head_dim: Features of a head.
        head_dim_v: Features of a value head; default as many.
        additional: Additional keys that every query sees.
        dtype: Of the tensors.
        q_tile_shape: Query tile of the forward pass; default what the kernels would choose.
        kv_tile_shape: Key tile that goes with it. Tiles of any size are counted.
        backward_q_tile_shape: Query tile of the backward pass.
        backward_kv_tile_shape: Key tile of the backward pass.
        aligned: Count key tiles on multiples of their shape, as in other libraries, instead of
            from the start of the union of a query tile's windows.
        device: A name of ``natten.devices.DEVICES``, or what a driver calls the device.

    Returns:
        A :class:`Simulation`. Times are those that kernels keep the device busy: short calls take
        as long as the host needs to launch them. Predictions are fitted to half precision on an
        H100; elsewhere the facts of the device scale them.

    Raises:
        ValueError: An argument is wrong by itself or does not fit the others.
        RuntimeError: No tile shapes are given, and no GPU backend runs the problem there.
    """
    problem = make_problem(
        shape, kernel_size, stride, dilation, is_causal, is_circular=is_circular,
        upsampling=upsampling, clip_window=clip_window, batch=batch, heads=heads,
        heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, additional=additional,
        dtype=dtype,
    )  # fmt: skip
    config = Config(
        *validation.check_tiles(
            ("q_tile_shape", "kv_tile_shape"), q_tile_shape, kv_tile_shape, problem.rank
        ),
        *validation.check_tiles(
            ("backward_q_tile_shape", "backward_kv_tile_shape"),
            backward_q_tile_shape,
            backward_kv_tile_shape,
            problem.rank,
        ),
    )
    facts = device if isinstance(device, Device) else devices.find(device)
    return simulate_problem(problem, facts, config, aligned)


__all__ = [
    "Pass",
    "Simulation",
    "dense_of",
    "gpu_backend",
    "make_problem",
    "needed_pairs",
    "on_gpu",
    "predict",
    "simulate",
    "simulate_problem",
    "traffic",
]
