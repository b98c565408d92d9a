"""Launches of the kernels: what each one is given, and in which order they run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from importlib import import_module
from math import gcd, prod
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from natten.devices import capability
from natten.functional.backend import Gradients, Inputs, Results
from natten.functional.backends.triton.backward import (
    key_value_gradient_kernel,
    query_gradient_kernel,
    statistics_kernel,
)
from natten.functional.backends.triton.bias import bias_gradient_kernel, bias_table_kernel
from natten.functional.backends.triton.forward import forward_kernel
from natten.functional.backends.triton.replay import note, observed
from natten.functional.backends.triton.tiles import (
    FORWARD,
    KEY_VALUE_GRADIENT,
    QUERY_GRADIENT,
    Kernel,
    Tiling,
    block,
    half,
)
from natten.functional.problem import Problem

# Tables that the bias gradient is summed in, and how many numbers they hold at most.
_BIAS_COPIES = 8
_BIAS_ENTRIES = 2**20
# Registers of a thread where it is summed: three programs on a multiprocessor instead of two.
_BIAS_REGISTERS = 168
_STATISTICS_ROWS = 64
_BIAS_BLOCK = 512
_LOG2_E = 1.4426950408889634
# Beyond this factor of the scores, what a fused multiplication and subtraction rounds less often
# than the product alone would be an exponent of its own: kernels round both.
_LARGEST_FUSED_SCALE = 2.0**16
_NO_STRIDES = (0,) * 5
_NO_PADDINGS = (0,) * 3


@cache
def _in_gluon(name: str) -> Any:
    """A module of kernels in Gluon; None where this Triton has another dialect."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return None
    try:
        return import_module(f"natten.functional.backends.triton.{name}")
    except (ImportError, AttributeError):
        return None


def specialized() -> Any:
    """The module of the forward kernel in Gluon, or None."""
    return _in_gluon("specialized")


def specialized_backward() -> Any:
    """The module of the backward kernel in Gluon, or None."""
    return _in_gluon("specialized_backward")


def _pad(values: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    """One value for each of three axes; leading axes that the grid lacks get ``fill``."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _hidden(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Integers that Triton finds nothing special about; kernels undo it with `revealed`.

    Of a tuple's members Triton makes a kernel of its own for each pattern of ones and multiples of
    16, whatever `do_not_specialize` says: one for almost every image size. Odd numbers above 1 are
    neither.
    """
    return tuple([2 * number + 3 for number in numbers])


def _strides(stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of batch, three axes of tokens, and heads, from those of a tensor."""
    batch, *tokens, head, _ = stride
    return (batch, *_pad(tokens, 0), head)


def _statistic_strides(shape: Sequence[int], heads: int, heads_last: bool) -> tuple[int, ...]:
    """Strides of one number a token and head: [batch, tokens, heads] or [batch, heads, tokens]."""
    tokens = prod(shape)
    unit = heads if heads_last else 1
    steps = [unit * prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return (tokens * heads, *_pad(steps, 0), 1 if heads_last else tokens)


def _unit(*strides: tuple[int, ...]) -> int:
    """Largest power of two up to 16 that divides all strides: what the compiler may assume."""
    return gcd(16, *(s for group in strides for s in group))


def _steps(strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Strides as kernels take them: in multiples of the unit."""
    return _hidden(tuple([s // unit for s in strides]))


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself unless its features are not adjacent."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _counts(numbers: Tensor | None) -> Tensor | None:
    """Numbers of tokens, one after the other in memory, as kernels read them."""
    return None if numbers is None else numbers.contiguous()


def _describable(tensor: Tensor) -> Tensor:
    """The tensor itself if a TMA descriptor can view it as [batch, tokens, heads * features]."""
    size = tensor.element_size()
    suits = (
        tensor.stride(-1) == 1
        and (tensor.shape[-2] == 1 or tensor.stride(-2) == tensor.shape[-1])
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * size % 16 == 0 for s in tensor.stride()[:-2])
    )
    # contiguous() keeps strides of axes of one token, whatever they are, and addresses. Nor would a
    # stride of 0 (an expanded tensor) go away by clone() alone.
    return tensor if suits else tensor.clone(memory_format=torch.contiguous_format)


# Kinds of checked descriptors and what they hold but their tensors, by layout, tile and maker.
# Cleared when full, which shapes that never repeat can cause.
_descriptors: dict[Any, tuple[Any, dict[str, Any]]] = {}
_MAX_DESCRIPTORS = 4096


def _descriptor(tensor: Tensor, tile: tuple[int, ...], make: Any = TensorDescriptor) -> Any:
    """A descriptor of the tensor that loads tiles."""
    identity = (tensor.shape, tensor.stride(), tensor.dtype, tile, make)
    found = _descriptors.get(identity)
    if found is None:
        batch, *tokens, heads, features = tensor.shape
        batch_stride, *steps = tensor.stride()[:-2]
        # Axes that the grid lacks are never stepped along; any valid stride will do.
        checked = make(
            tensor,
            [batch, *_pad(tokens, 1), heads * features],
            [batch_stride, *_pad(steps, batch_stride), 1],
            [1, *tile, features],
        )
        if len(_descriptors) >= _MAX_DESCRIPTORS:
            _descriptors.clear()
        found = _descriptors[identity] = type(checked), {**vars(checked), "base": None}
    kind, fields = found
    # The class checks its arguments at every construction, as long as all the rest here takes.
    descriptor = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


def _tile_counts(
    origin: Sequence[int], extent: Sequence[int], dilation: Sequence[int], tile: Sequence[int]
) -> tuple[int, ...]:
    """Tiles along each axis that cover the box, in the dilation group that needs most."""
    counts = []
    for begin, size, step, width in zip(origin, extent, dilation, tile, strict=True):
        most = 0
        # First and last position of a group change from group to group at these places only.
        for group in {0, begin % step, (begin + size - 1) % step, step - 1}:
            first = -(-max(begin - group, 0) // step)
            last = -(-max(begin + size - group, 0) // step)
            most = max(most, -(-last // width) - first // width)
        counts.append(most)
    return tuple(counts)


def _check_steps(problem: Problem, row_tile: tuple[int, ...], column_tile: tuple[int, ...]) -> None:
    """Decline windows of so many tiles that kernels would divide their numbers inexactly."""
    if problem.rank == 1:
        return
    grid, kernel_size = _pad(problem.grid, 1), _pad(problem.kernel_size, 1)
    # An inverse window reaches as far as a window and two strides, which are no longer.
    counts = [
        -(-min(length, 3 * size + rows) // columns) + 1
        for length, size, rows, columns in zip(
            grid, kernel_size, row_tile, column_tile, strict=True
        )
    ]
    if prod(counts) * max(counts) >= 2**32:
        raise NotImplementedError(
            f"kernel_size {problem.kernel_size} on a grid of {problem.grid} makes windows of more "
            "tiles than the Triton kernels can number"
        )


def _bias_paddings(*tilings: Tiling) -> tuple[int, ...]:
    """How far beyond the table of biases the pairs of the tiles of these kernels reach."""
    reaches = [
        [q + k - 2 for q, k in zip(tiling.query, tiling.key, strict=True)] for tiling in tilings
    ]
    return _pad([max(axis) for axis in zip(*reaches, strict=True)], 0)


@dataclass(frozen=True)
class _BiasPlan:
    """A padded table of biases, and the kernels around it.

    Attributes:
        shape: Of the table.
        copies: Tables that its gradient is summed in.
        table: Fills in the table, and zeros in those of the gradient.
        gradient: Sums the tables of the gradient.
    """

    shape: tuple[int, ...]
    copies: int
    table: _Plan
    gradient: _Plan


@lru_cache(maxsize=4096)
def _bias_plan(
    heads: int,
    sizes: tuple[int, ...],
    paddings: tuple[int, ...],
    factor: float,
    device: torch.device,
) -> _BiasPlan:
    """The plan for a bias. Compiled kernels, which it keeps, belong to a device."""
    shape = (heads, *(s + 2 * p for s, p in zip(_pad(sizes, 1), paddings, strict=True)))
    size, inside = prod(shape), heads * prod(sizes)
    copies = max(1, min(_BIAS_COPIES, _BIAS_ENTRIES // size))
    options: dict[str, Any] = {
        "kernels": _hidden(tuple([(s + 1) // 2 for s in _pad(sizes, 1)])),
        "paddings": _hidden(paddings),
        "COPIES": copies,
        "BLOCK": _BIAS_BLOCK,
    }
    return _BiasPlan(
        shape,
        copies,
        _Plan(triton.cdiv(size, _BIAS_BLOCK), {**options, "size": size, "factor": factor}),
        _Plan(triton.cdiv(inside, _BIAS_BLOCK), {**options, "size": inside, "padded_size": size}),
    )


def _bias_table(rpb: Tensor, problem: Problem, paddings: tuple[int, ...]) -> Tensor:
    """Biases as kernels read them: padded, and divided by what scores are multiplied with."""
    return _bias_tables(rpb, problem, paddings, None)[0]


def _bias_tables(
    rpb: Tensor, problem: Problem, paddings: tuple[int, ...], sums: torch.dtype | None
) -> tuple[Tensor, Tensor | None, _BiasPlan]:
    """Such a table, and unless ``sums`` is None tables of zeros of that dtype, which the gradient
    is to be added to."""
    scale, negate = _scales(problem.scale)
    factor = (-_LOG2_E if negate else _LOG2_E) / scale
    plan = _bias_plan(rpb.shape[0], tuple(rpb.shape[1:]), paddings, factor, rpb.device)
    bias = torch.empty(plan.shape, dtype=torch.float32, device=rpb.device)
    tables = None
    if sums is not None:
        tables = torch.empty((plan.copies, *plan.shape), dtype=sums, device=rpb.device)
    _run(bias_table_kernel, plan.table.programs, plan.table, rpb.contiguous(), bias, tables)
    return bias, tables, plan


def _precision(tensor: Tensor) -> str:
    """Of float32 products: torch's float32 matmul precision decides.

    Full precision takes three products on tensor cores that know tf32, or none at all.
    """
    if tensor.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    tensor_cores = (
        tensor.is_cuda and torch.version.hip is None and capability(tensor.device.index) >= (8, 0)
    )
    return "tf32x3" if tensor_cores else "ieee"


def _scales(scale: float) -> tuple[float, bool]:
    """Factor of the scores in base 2, positive, and whether they are negated first.

    The running maximum is taken before scaling, so the factor must keep the order, and a product
    with -inf must stay -inf: zero becomes a factor too small to change any weight.
    """
    return max(abs(scale) * _LOG2_E, 1e-30), scale < 0


def _mask(problem: Problem, tiling: Tiling) -> str:
    """Which tiles a kernel masks. The branch around a mask costs more than it saves with a bias."""
    if tiling.whole:
        return "never"
    return "edges" if tiling.split and not problem.has_rpb else "always"


def _register_limit(tiling: Tiling, sums_bias: bool) -> dict[str, int]:
    """A launch option; AMD's compiler does not know it."""
    if not sums_bias or tiling.warps > 4 or torch.version.hip is not None:
        return {}
    return {"maxnreg": _BIAS_REGISTERS}


class TooLargeError(RuntimeError):
    """The tiles of a kernel take more of a GPU than it has.

    Attributes:
        tiling: How the kernel was to divide its work.
        kind: Which kernel it was.
    """

    def __init__(self, tiling: Tiling, kind: Kernel, reason: OutOfResources) -> None:
        super().__init__(f"tiles {tiling.query}/{tiling.key} of the {kind} kernel: {reason}")
        self.tiling, self.kind = tiling, kind


@dataclass(frozen=True)
class _Plan:
    """A kernel's programs, and all its arguments but the tensors."""

    programs: int
    options: dict[str, Any]
    # What the programs are made of, and for which kernel; None where no tiles are chosen.
    tiles: tuple[Tiling, Kernel] | None = None
    # Compiled kernels, by what Triton specializes on besides `options`.
    compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)


@cache
def _own_cache() -> TemporaryDirectory[str]:
    """A place for compiled kernels that lasts as long as the process."""
    return TemporaryDirectory(prefix="natten-triton-")


def _launch(
    kernel: Any, programs: int, plan: _Plan, tensors: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Launch a kernel by way of Triton, which compiles it if need be.

    Where Triton cannot read or write its cache, kernels are kept for this process alone.
    """
    try:
        return kernel[(programs,)](*tensors, **plan.options, **options)
    except OSError as error:
        if _own_cache.cache_info().currsize:
            raise
        place = knobs.cache.dir
        knobs.cache.dir = _own_cache().name
        warnings.warn(
            f"Triton cannot use its cache, {place} (TRITON_CACHE_DIR): {error}. Kernels are "
            "compiled for this process alone, at every start anew",
            stacklevel=2,
        )
    return kernel[(programs,)](*tensors, **plan.options, **options)


def _run(kernel: Any, programs: int, plan: _Plan, *tensors: Any, **options: Any) -> None:
    """Launch a kernel, whose first parameters are ``tensors``.

    Triton works out anew at every launch which compiled kernel the arguments call for, at a
    hundred microseconds for as many arguments as there are here. A plan fixes all but types and
    alignment of the tensors, so the compiled kernel is kept with it.
    """
    if programs == 0:
        return
    # `_kind` of each tensor, without a call for the most usual type: this is for every launch.
    kinds = [
        None
        if tensor is None
        else (tensor.dtype, tensor.data_ptr() % 16 == 0)
        if type(tensor) is Tensor
        else _kind(tensor)
        for tensor in tensors
    ]
    identity = (programs, *kinds, *options.values())
    found = plan.compiled.get(identity)
    if found is None or observed():
        try:
            compiled = _launch(kernel, programs, plan, tensors, options)
        except OutOfResources as error:
            if plan.tiles is None:
                raise
            raise TooLargeError(*plan.tiles, error) from error
        if compiled is not None and hasattr(compiled, "packed_metadata"):
            values = {**plan.options, **options}
            rest = kernel.arg_names[len(tensors) :]
            plan.compiled[identity] = compiled, tuple(values[name] for name in rest)
        note(None, programs, ())
        return
    compiled, rest = found
    note(compiled, programs, (*tensors, *rest))
    # torch.cuda.current_device() first sees to it that CUDA is initialized, as it is by now.
    stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *tensors, *rest,
    )  # fmt: skip


def _kind(tensor: Any) -> Any:
    """What Triton specializes on: the type, and whether the address is a multiple of 16."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        return tensor.base.dtype
    return tensor.dtype, tensor.data_ptr() % 16 == 0


@lru_cache(maxsize=4096)
def _plan(
    kernel: Any,
    problem: Problem,
    tiling: Tiling,
    sequences: int,
    head_dim_v: int,
    precision: str,
    inverse: bool,
    strides: tuple[tuple[int, ...], ...],
    additional: tuple[tuple[int, ...], ...],
    outputs: tuple[tuple[str, tuple[int, ...]], ...],
    splits: int = 1,
    bias_paddings: tuple[int, ...] = _NO_PADDINGS,
) -> _Plan:
    """What follows from problem, tiling and layout.

    ``strides`` are those of query, key, value and, in the backward pass, the output's gradient;
    ``additional`` those of additional keys and values, if any; ``outputs`` name the strides of
    what the kernel writes. ``inverse`` says that key tiles own the programs, ``splits`` of them
    each.
    """
    strides, additional = tuple(map(_strides, strides)), tuple(map(_strides, additional))
    query_tile, key_tile = _pad(tiling.query, 1), _pad(tiling.key, 1)
    dilations = _pad(problem.dilation, 1)
    query_box = (_pad(problem.query_origin, 0), _pad(problem.query_shape, 1))
    key_box = (_pad(problem.key_origin, 0), _pad(problem.key_shape, 1))
    row_box, row_tile, column_tile = query_box, query_tile, key_tile
    heads, columns_read = problem.heads, strides[1:3]
    if inverse:
        row_box, row_tile, column_tile = key_box, key_tile, query_tile
        heads, columns_read = problem.heads_kv, (strides[0], strides[-1])
    if problem.varlen:
        # As many programs for each sequence as the longest needs.
        row_box = row_box[0], _pad((problem.max_seqlen_kv if inverse else problem.max_seqlen_q,), 1)
    tiles = _tile_counts(*row_box, dilations, row_tile)
    _check_steps(problem, row_tile, column_tile)
    written = {name: _strides(stride) for name, stride in outputs}
    unit = _unit(*strides, *additional, *written.values())
    scale, negate = _scales(problem.scale)
    programs = prod(tiles) * prod(dilations) * heads * sequences * splits
    options = {
        "lengths": _hidden(_pad(problem.grid, 1)),
        "kernels": _hidden(_pad(problem.kernel_size, 1)),
        "bias_paddings": _hidden(bias_paddings),
        "strides": _pad(problem.stride, 1),
        "dilations": dilations,
        "query_origins": _hidden(query_box[0]),
        "query_extents": _hidden(query_box[1]),
        "key_origins": _hidden(key_box[0]),
        "key_extents": _hidden(key_box[1]),
        "tiles": _hidden(tiles),
        "programs": programs,
        "heads": heads,
        "splits": splits,
        "num_additional": problem.num_additional,
        "scale": scale,
        "gradient_scale": problem.scale,
        "query_strides": _steps(strides[0], unit),
        "key_strides": _steps(strides[1], unit),
        "value_strides": _steps(strides[2], unit),
        "out_gradient_strides": _steps(strides[-1], unit),
        "additional_key_strides": _steps(additional[0] if additional else _NO_STRIDES, unit),
        "additional_value_strides": _steps(additional[1] if additional else _NO_STRIDES, unit),
        "lse_strides": _hidden(_statistic_strides(problem.query_shape, problem.heads, True)),
        "statistic_strides": _hidden(_statistic_strides(problem.query_shape, problem.heads, False)),
        "HEADS_PER_KV": problem.heads // problem.heads_kv,
        "QUERY_TILE": query_tile,
        "KEY_TILE": key_tile,
        "FEATURES": problem.head_dim,
        "VALUE_FEATURES": head_dim_v,
        "BLOCK": block(problem.head_dim),
        "VALUE_BLOCK": block(head_dim_v),
        "RANK": problem.rank,
        "CAUSAL": _pad(problem.is_causal, False),
        "TMA": tiling.tma,
        "UNIT": unit,
        "WIDE": any(
            sum(t * d * s for t, d, s in zip(column_tile, dilations, group[1:4], strict=True))
            >= 2**31
            for group in columns_read
        ),
        "VARLEN": problem.varlen,
        "HAS_RPB": problem.has_rpb,
        "HAS_ADDITIONAL": bool(additional),
        "NEGATE": negate,
        "MASK": _mask(problem, tiling),
        "STAGES": tiling.stages,
        "PRECISION": precision,
        "PERSISTENT": tiling.programs > 0,
        "WARP_SPECIALIZE": tiling.specialize,
        "num_warps": tiling.warps,
        **{name: _steps(stride, unit) for name, stride in written.items()},
    }
    if scale > _LARGEST_FUSED_SCALE:
        options["enable_fp_fusion"] = False
    accepted = {*kernel.arg_names, "num_warps", "enable_fp_fusion"}
    kind = KEY_VALUE_GRADIENT if inverse else FORWARD
    if kernel is query_gradient_kernel:
        kind = QUERY_GRADIENT
    return _Plan(
        programs,
        {name: v for name, v in options.items() if name in accepted},
        (tiling, kind),
    )


def _allocate(
    problem: Problem, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a result: zeros where tokens may belong to no sequence, else uninitialized."""
    return (torch.zeros if problem.varlen else torch.empty)(shape, dtype=dtype, device=device)


def _sequences(problem: Problem, cumulative: Tensor | None) -> int:
    return problem.batch if cumulative is None else cumulative.shape[0] - 1


def forward(problem: Problem, tiling: Tiling, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out and logsumexp."""
    query, key, value, rpb, additional_keys, additional_values, *cumulative, lengths = inputs
    cumulative_query, cumulative_key = map(_counts, cumulative)
    out = _allocate(problem, problem.output_shape, query.dtype, query.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=query.device)
    if problem.varlen:
        lse.fill_(-torch.inf)
    columns = _describable if tiling.tma else _readable
    rows = _describable if tiling.apart else _readable
    query, key, value = rows(query), columns(key), columns(value)
    additional: tuple[tuple[int, ...], ...] = ()
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = rows(additional_keys), rows(additional_values)
        additional = (additional_keys.stride(), additional_values.stride())
    paddings: tuple[int, ...] = _NO_PADDINGS
    bias = None
    if rpb is not None:
        paddings = _bias_paddings(tiling)
        bias = _bias_table(rpb, problem, paddings)
    kernel = specialized().specialized_forward_kernel if tiling.apart else forward_kernel
    plan = _plan(
        kernel, problem, tiling, _sequences(problem, cumulative_query), problem.head_dim_v,
        _precision(query), False, (query.stride(), key.stride(), value.stride()), additional,
        (("out_strides", out.stride()),), 1, paddings,
    )  # fmt: skip
    key_tile = plan.options["KEY_TILE"]
    if tiling.apart:
        make, context = specialized().descriptor, (1, 1, prod(key_tile))
        _run(
            kernel, plan.programs, plan,
            _descriptor(query, half(plan.options["QUERY_TILE"]), make),
            _descriptor(key, key_tile, make),
            _descriptor(value, key_tile, make),
            out, lse,
            *(
                None if tensor is None else _descriptor(tensor, context, make)
                for tensor in (additional_keys, additional_values)
            ),
            cumulative_query, cumulative_key,
        )  # fmt: skip
        return out, lse
    _run(
        kernel, min(tiling.programs or plan.programs, plan.programs), plan,
        query,
        _descriptor(key, key_tile) if tiling.tma else key,
        _descriptor(value, key_tile) if tiling.tma else value,
        out, lse, bias, additional_keys, additional_values, cumulative_query, cumulative_key,
        _counts(lengths),
    )  # fmt: skip
    return out, lse


@dataclass(frozen=True)
class BackwardTilings:
    """Tilings of the kernels of a backward pass, by the gradients they compute.

    Attributes:
        query: Of the query.
        key_value: Of key and value.
        additional: Of additional keys and values.
        splits: Programs that share the queries of one tile of additional keys; each needs
            float32 memory of its own for what it sums.
        loops: Programs for each head that take turns on its key tiles; 0 for one a tile.
        together: Of query, key and value in one pass, where that runs instead.
        launches: Of that pass, which divide the heads: the fewer heads at a time, the less memory
            for float32 sums.
    """

    query: Tiling
    key_value: Tiling
    additional: Tiling
    splits: int = 1
    loops: int = 0
    together: Tiling | None = None
    launches: int = 1

    @cached_property
    def bias_paddings(self) -> tuple[int, ...]:
        """Of the one table of biases that the kernels share."""
        return _bias_paddings(self.query, self.key_value)


@lru_cache(maxsize=4096)
def _statistics_plan(
    tokens: int,
    heads: int,
    features: int,
    width: int,
    has_lse_gradient: bool,
    has_delta: bool,
    device: torch.device,
) -> _Plan:
    """The plan of the statistics kernel. Compiled kernels, which it keeps, belong to a device."""
    options = {
        "tokens": tokens,
        "heads": heads,
        "VALUE_FEATURES": features,
        "VALUE_BLOCK": block(features),
        "ROWS": _STATISTICS_ROWS,
        "WIDTH": width,
        "HAS_LSE_GRADIENT": has_lse_gradient,
        "HAS_DELTA": has_delta,
    }
    return _Plan(0, options)


class BackwardPass:
    """One backward pass: its tensors in readable layouts, and the launches on them."""

    def __init__(
        self,
        problem: Problem,
        tilings: BackwardTilings,
        torch_reduction: bool,
        deterministic: bool,
        inputs: Inputs,
        results: Results,
        needs: tuple[bool, ...],
        destinations: tuple[Tensor, ...] | None,
    ) -> None:
        query, key, value, rpb, additional_keys, additional_values, *cumulative, lengths = inputs
        out, lse, grad_out, grad_lse = results
        self.needs, self.destinations = needs, destinations
        self.problem, self.tilings, self.dtype = problem, tilings, query.dtype
        self.deterministic = deterministic
        # One pass pays off where it computes all three.
        self.together = tilings.together if all(needs[:3]) else None
        # Each of them is read as columns by one of the kernels.
        describe = self.together is not None
        query_layout = _describable if describe or tilings.key_value.tma else _readable
        key_layout = _describable if describe or tilings.query.tma else _readable
        self.query, self.grad_out = query_layout(query), query_layout(grad_out.contiguous())
        self.key, self.value = key_layout(key), key_layout(value)
        self.rpb = rpb
        self.bias_paddings: tuple[int, ...] = _NO_PADDINGS
        self.bias: Tensor | None = None
        self.bias_sums: Tensor | None = None
        if rpb is not None:
            self.bias_paddings = tilings.bias_paddings
            sums = None
            if needs[3]:
                sums = torch.int64 if deterministic else torch.float32
            self.bias, self.bias_sums, self.bias_plan = _bias_tables(
                rpb, problem, self.bias_paddings, sums
            )
        self.additional: tuple[Tensor, ...] = ()
        if additional_keys is not None and additional_values is not None:
            self.additional = (_readable(additional_keys), _readable(additional_values))
        self.cumulative = (_counts(cumulative[0]), _counts(cumulative[1]))
        self.counts = _counts(lengths)
        self.sequences = _sequences(problem, cumulative[0])
        self.precision = _precision(query)
        self.out, self.lse = out.contiguous(), lse.contiguous()
        self.grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self.torch_reduction = torch_reduction
        shape = (problem.batch, problem.heads, problem.num_queries)
        # Logsumexp and delta, and as much again where the memory accelerator is to load them.
        self.statistics = torch.empty(
            (*shape, 4 if describe else 2), dtype=torch.float32, device=out.device
        )

    def _statistics(self) -> None:
        """Fill in the statistics."""
        tokens, heads, features = self.problem.num_queries, self.problem.heads, self.out.shape[-1]
        if self.torch_reduction:
            rows = (self.grad_out.float() * self.out.float()).sum(-1)
            if self.grad_lse is not None:
                rows = rows - self.grad_lse
            self.statistics[..., 1].copy_(rows.view(-1, tokens, heads).transpose(1, 2))
        plan = _statistics_plan(
            tokens, heads, features, self.statistics.shape[-1], self.grad_lse is not None,
            not self.torch_reduction, self.out.device,
        )  # fmt: skip
        _run(
            statistics_kernel, triton.cdiv(tokens, _STATISTICS_ROWS) * heads * self.problem.batch,
            plan, self.out, self.grad_out, self.lse, self.grad_lse, self.statistics,
        )  # fmt: skip

    def run(self) -> Gradients:
        if self.together is not None:
            self._statistics()
            return (*self._all(self.together), None, None, None)
        query = key = value = bias = additional_key = additional_value = None
        needs = self.needs
        needs_bias = self.bias_sums is not None
        needs_query = needs[0] or needs_bias
        # The bounds of integers follow from the statistics.
        in_passing = needs_query and not self.torch_reduction
        in_passing = in_passing and not (needs_bias and self.deterministic)
        if not in_passing:
            self._statistics()
        if needs_query:
            query, bias = self._query(in_passing)
        if needs[1] or needs[2]:
            key, value = self._key_value(
                self.problem, self.tilings.key_value, 1, self.tilings.loops,
                (self.query, self.key, self.value, self.grad_out), self.bias, self.cumulative, None,
                None if self.destinations is None else self.destinations[1:],
            )  # fmt: skip
        if needs[4] or needs[5]:
            # Every query sees every additional token: plain attention over flat queries.
            tokens, context = self.problem.num_queries, self.problem.num_additional
            additional_key, additional_value = self._key_value(
                dense_problem(self.problem, tokens, context), self.tilings.additional,
                self.tilings.splits, 0,
                (self.query.flatten(1, -3), *self.additional, self.grad_out.flatten(1, -3)),
                None, (None, None), self.counts,
            )  # fmt: skip
        return query if needs[0] else None, key, value, bias, additional_key, additional_value

    def _plan(
        self,
        kernel: Any,
        problem: Problem,
        tiling: Tiling,
        tensors: Sequence[Tensor],
        additional: Sequence[Tensor] = (),
        inverse: bool = False,
        splits: int = 1,
        **outputs: Tensor,
    ) -> _Plan:
        return _plan(
            kernel, problem, tiling, self.sequences, self.value.shape[-1], self.precision, inverse,
            tuple([t.stride() for t in tensors]), tuple([t.stride() for t in additional]),
            tuple([(name, output.stride()) for name, output in outputs.items()]), splits,
            self.bias_paddings,
        )  # fmt: skip

    def _destination(self, number: int, tensor: Tensor) -> Tensor:
        """Memory for the gradient of query, key or value, which is the ``number``-th."""
        if self.destinations is not None:
            return self.destinations[number]
        return _allocate(self.problem, tensor.shape, self.dtype, tensor.device)

    def _all(self, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value, in one pass."""
        problem, inputs = self.problem, (self.query, self.key, self.value)
        query_gradient, key_gradient, value_gradient = (
            self._destination(number, tensor) for number, tensor in enumerate(inputs)
        )
        kernel = specialized_backward().specialized_gradients_kernel
        plan = self._plan(
            kernel, problem, tiling, (*inputs, self.grad_out), inverse=True,
            key_gradient_strides=key_gradient, value_gradient_strides=value_gradient,
        )  # fmt: skip
        query_tile, key_tile = plan.options["QUERY_TILE"], plan.options["KEY_TILE"]
        make = specialized().descriptor
        statistics = self.statistics.view(-1, *problem.query_shape, 1, self.statistics.shape[-1])
        tensors = (
            _descriptor(self.query, query_tile, make),
            _descriptor(self.key, key_tile, make),
            _descriptor(self.value, key_tile, make),
            _descriptor(self.grad_out, query_tile, make),
            _descriptor(statistics, query_tile, specialized_backward().statistics_descriptor),
        )
        group = -(-problem.heads_kv // self.tilings.launches)
        members = problem.heads // problem.heads_kv
        sums = torch.empty(
            (*self.query.shape[:-2], group * members, problem.head_dim),
            dtype=torch.float32, device=self.query.device,
        )  # fmt: skip
        for first in range(0, problem.heads_kv, group):
            heads = min(group, problem.heads_kv - first)
            part = sums.narrow(-2, 0, heads * members).zero_()
            _run(
                kernel, plan.programs // problem.heads_kv * heads, plan, *tensors,
                _descriptor(part, query_tile, specialized_backward().sums_descriptor),
                key_gradient, value_gradient, *self.cumulative, first_head=first, group_heads=heads,
            )  # fmt: skip
            target = query_gradient.narrow(-2, first * members, heads * members)
            torch.mul(part, problem.scale, out=target)
        return query_gradient, key_gradient, value_gradient

    def _query(self, with_statistics: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients of query and bias; fills in the statistics in passing."""
        tiling = self.tilings.query
        gradient = self._destination(0, self.query)
        plan = self._plan(
            query_gradient_kernel, self.problem, tiling,
            (self.query, self.key, self.value, self.grad_out), self.additional,
            query_gradient_strides=gradient,
        )  # fmt: skip
        key_tile = plan.options["KEY_TILE"]
        sums = self.bias_sums
        factor = self._fixed_point() if self.deterministic and sums is not None else None
        _run(
            query_gradient_kernel, plan.programs, plan,
            self.query,
            _descriptor(self.key, key_tile) if tiling.tma else self.key,
            _descriptor(self.value, key_tile) if tiling.tma else self.value,
            self.grad_out, self.statistics, gradient, self.bias,
            *(self.additional or (None, None)), *self.cumulative, self.counts,
            *((self.out, self.lse, self.grad_lse) if with_statistics else (None, None, None)),
            sums, factor, bias_copies=1 if sums is None else self.bias_plan.copies,
            **_register_limit(tiling, sums is not None),
        )  # fmt: skip
        if sums is None or self.rpb is None:
            return gradient, None
        bias_gradient = torch.empty(self.rpb.shape, dtype=self.rpb.dtype, device=gradient.device)
        last = self.bias_plan.gradient
        _run(bias_gradient_kernel, last.programs, last, sums, bias_gradient, factor)
        return gradient, bias_gradient

    def _key_value(
        self,
        problem: Problem,
        tiling: Tiling,
        splits: int,
        loops: int,
        tensors: tuple[Tensor, ...],
        bias: Tensor | None,
        cumulative: tuple[Tensor | None, Tensor | None],
        counts: Tensor | None,
        destinations: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        query, key, value, grad_out = tensors
        if destinations is None:
            dtype = self.dtype if splits == 1 else torch.float32
            # The sums of each of the splits, one behind the other.
            shape = key.shape if splits == 1 else (splits, *key.shape)
            key_gradient = _allocate(problem, shape, dtype, key.device)
            shape = value.shape if splits == 1 else (splits, *value.shape)
            value_gradient = _allocate(problem, shape, dtype, key.device)
        else:
            key_gradient, value_gradient = destinations
        plan = self._plan(
            key_value_gradient_kernel, problem, tiling, tensors, inverse=True, splits=splits,
            key_gradient_strides=key_gradient if splits == 1 else key_gradient[0],
            value_gradient_strides=value_gradient if splits == 1 else value_gradient[0],
        )  # fmt: skip
        query_tile, unit = plan.options["QUERY_TILE"], plan.options["UNIT"]
        launched = plan.programs
        if loops:
            launched = min(launched, loops * problem.heads_kv * self.sequences)
        _run(
            key_value_gradient_kernel, launched, plan,
            _descriptor(query, query_tile) if tiling.tma else query,
            key, value,
            _descriptor(grad_out, query_tile) if tiling.tma else grad_out,
            self.statistics, key_gradient, value_gradient, bias, *cumulative, counts,
            split_size=key.numel() // unit, value_split_size=value.numel() // unit,
            LOOP=launched < plan.programs,
        )  # fmt: skip
        if splits == 1:
            return key_gradient, value_gradient
        return key_gradient.sum(0).to(self.dtype), value_gradient.sum(0).to(self.dtype)

    def _fixed_point(self) -> Tensor:
        """A power of two that turns the bias gradient into integers of 62 bits without overflow.

        A score's gradient is at most |dO| |V| + |delta|; a bias has one of each query.
        """
        norms = [t.float().norm(dim=-1).amax() for t in (self.grad_out, self.value)]
        bound = norms[0] * norms[1] + self.statistics[..., 1].abs().amax()
        bits = torch.log2(bound * (self.problem.batch * self.problem.num_queries)).ceil()
        return torch.exp2((61 - bits).clamp(-126, 126))


@lru_cache(maxsize=4096)
def dense_problem(problem: Problem, num_queries: int, num_keys: int) -> Problem:
    """Attention of all queries to ``num_keys`` tokens, with the other facts of ``problem``."""
    length = (max(num_queries, num_keys),)
    return replace(
        problem,
        query_shape=(num_queries,),
        key_shape=(num_keys,),
        kernel_size=length,
        stride=(1,),
        dilation=(1,),
        is_causal=(False,),
        grid=length,
        query_origin=(0,),
        key_origin=(0,),
        num_additional=0,
        has_lengths=False,
        has_rpb=False,
    )
