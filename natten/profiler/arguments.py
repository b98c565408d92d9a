"""The command line of the profiler."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from natten import devices, validation
from natten.devices import Device
from natten.functional.dispatch import FMHA, FNA, parse_name
from natten.functional.problem import DEFAULT_CONFIG, Config, Problem
from natten.simulator import make_problem

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# Implementations of others, of dense attention.
OTHERS = ("cudnn", "fav2", "xformers")
BASELINES = ("dense", *OTHERS, "flex")
DEFAULT_PROFILE = "natten-profile.json"


def boolean(text: str) -> bool:
    """ "False" is False, and what is neither true nor false is an error."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}") from None


def _flag(parser: Any, *names: str, **options: Any) -> None:
    """An option that is on by its name alone, and takes True or False."""
    parser.add_argument(
        *names, type=boolean, nargs="?", const=True, metavar="BOOL", **{"default": False, **options}
    )


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """What states a call: shared by `profile`, `simulate` and `explain`."""
    group = parser.add_argument_group("problem")
    integers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    group.add_argument(
        "-i", "--input-size", required=True, **integers, help="tokens along each of 1 to 3 axes"
    )
    group.add_argument("-b", "--batch-size", type=int, default=1, metavar="N")
    group.add_argument("-n", "--heads", type=int, default=1, metavar="N", help="query heads")
    group.add_argument("--heads-kv", type=int, metavar="N", help="default: as many as --heads")
    group.add_argument("-d", "--dim", type=int, default=64, metavar="N", help="of a head")
    group.add_argument("--dim-value", type=int, metavar="N", help="default: as --dim")
    group.add_argument(
        "-w", "--window-size", **integers, action="append",
        help="one value per axis, or one for all; -1, everything along it; default: all. Given "
        "several times, the windows of so many groups of heads",
    )  # fmt: skip
    for names, text in (
        (("-s", "--stride"), "default: 1; may be given for each group of heads, too"),
        (("--dilation",), "likewise"),
    ):
        group.add_argument(*names, **integers, action="append", help=text)
    for names in (("-c", "--causal"), ("--circular",)):
        group.add_argument(
            *names, type=boolean, nargs="*", default=[False], metavar="BOOL",
            help="one value per axis, or one for all; alone it means True",
        )  # fmt: skip
    group.add_argument(
        "--upsampling", **integers, default=[1],
        help="queries of each key, whose tokens are then --input-size; default: 1",
    )  # fmt: skip
    _flag(group, "--clip-window", help="make do with an input that is too small")
    group.add_argument(
        "--dtype", choices=DTYPES, help="default: fp32 on a CPU, which computes in it, else fp16"
    )
    group.add_argument(
        "--add-kv", type=int, default=0, metavar="N", help="additional keys that all queries see"
    )
    _flag(group, "--backprop", help="the backward pass, too")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """What else a call may have: which kernels run depends on it, and not how they are counted."""
    group = parser.add_argument_group("scores")
    group.add_argument("--softcap", type=float, metavar="C", help="bound of the scores")
    for name, text in (
        ("rpb", "a relative position bias"),
        ("sink", "a logit of each head for nothing"),
        ("key-mask", "a mask of keys"),
        ("query-mask", "a mask of queries"),
        ("lengths", "how many of the additional keys each batch entry has"),
    ):
        _flag(group, f"--{name}", help=text)


def _tile_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--backend", metavar="NAME",
        help="of natten, such as cutlass-fna, or one of torch's for dense attention: cudnn, fav2, "
        "xformers; default: natten chooses",
    )  # fmt: skip
    group.add_argument(
        "--fmha-backend", metavar="NAME", help="for additional keys and windows of the whole input"
    )
    for name, text in (
        ("q-tile", "query tile of the forward pass"),
        ("kv-tile", "key tile of the forward pass"),
        ("backward-q-tile", "query tile of the backward pass"),
        ("backward-kv-tile", "key tile of the backward pass"),
    ):
        group.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help=text)
    group.add_argument("--schedule", choices=("non", "coop", "pp"), help="of Hopper kernels")
    _flag(group, "--persistent", default=True, help="persistent scheduling; default: True")
    _flag(group, "--compile", help="compile FlexAttention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of `natten profile`."""
    add_problem_arguments(parser)
    _tile_arguments(parser)
    group = parser.add_argument_group("profiling")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")
    group.add_argument("--warmup-steps", type=int, default=10, metavar="N", help="default: 10")
    group.add_argument(
        "--baseline", nargs="*", choices=BASELINES, default=["dense"], metavar="NAME",
        help=f"to compare with: {', '.join(BASELINES)}; default: dense",
    )  # fmt: skip
    group = parser.add_argument_group("choosing settings")
    _flag(
        group,
        "--dry-run",
        help="list the valid configurations, of those given if tiles or a schedule are, and run "
        "nothing",
    )
    group.add_argument(
        "--device-name", metavar="NAME",
        help=f"with --dry-run: a device that need not be here ({', '.join(devices.DEVICES)})",
    )  # fmt: skip
    group.add_argument(
        "--max-configs", type=int, default=10, metavar="N", help="listed; 0: all; default: 10"
    )
    _flag(
        group,
        "--optimize",
        help="search for the fastest backend, tiles and schedule, keeping those that are given, "
        "and profile them",
    )
    group.add_argument(
        "--optimize-warmup-steps", type=int, default=5, metavar="N", help="default: 5"
    )
    group.add_argument(
        "--optimize-seconds", type=float, default=45.0, metavar="T", help="to search; default: 45"
    )
    group.add_argument(
        "--save", metavar="FILE",
        help=f"with --optimize: the profile file to write; default: {DEFAULT_PROFILE}",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    for kind in ("json", "csv"):
        group.add_argument(
            f"--{kind}", nargs="?", const="-", metavar="FILE",
            help=f"write {kind.upper()}; without a file, to standard output instead of tables",
        )  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Attributes:
        problem: The call to profile.
        config: Its knobs.
        backend: A natten backend without suffix, one of ``OTHERS``, or "" for natten's choice.
        fmha_backend: The public name for attention, or None.
        named_device: A device that configurations are listed for without having it.
        options: The remaining options, as argparse has them.
    """

    problem: Problem
    config: Config
    backend: str
    fmha_backend: str | None
    named_device: Device | None
    options: argparse.Namespace


def _per_axis(name: str, values: list[Any], rank: int) -> Any:
    if len(values) not in (1, rank):
        raise ValueError(
            f"{name} must have one value or {rank}, as many as --input-size, got "
            f"{' '.join(map(str, values))}"
        )
    return values[0] if len(values) == 1 else tuple(values)


def calls_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Heads and window of each group of heads, for the functions that take them: mostly of one.

    Raises:
        ValueError: They do not fit each other.
    """
    rank = len(options.input_size)
    given = {
        "--window-size": options.window_size or [list(options.input_size)],
        "--stride": options.stride or [[1]],
        "--dilation": options.dilation or [[1]],
    }
    counts = {len(windows) for windows in given.values()} - {1}
    if len(counts) > 1:
        raise ValueError(
            "--window-size, --stride and --dilation must be given once, or each for as many groups "
            f"of heads, got {', '.join(str(len(windows)) for windows in given.values())}"
        )
    groups = max(counts, default=1)
    heads_kv = options.heads if options.heads_kv is None else options.heads_kv
    if groups > 1:
        validation.check_head_groups(groups, options.heads, heads_kv)
    return [
        {
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
            "is_causal": _per_axis("--causal", options.causal or [True], rank),
            "is_circular": _per_axis("--circular", options.circular or [True], rank),
            "upsampling": _per_axis("--upsampling", options.upsampling, rank),
            "clip_window": options.clip_window,
            "heads": options.heads // groups,
            "heads_kv": max(heads_kv // groups, 1),
        }
        for kernel_size, stride, dilation in zip(
            *(
                [_per_axis(name, values, rank) for values in windows * (groups // len(windows))]
                for name, windows in given.items()
            ),
            strict=True,
        )
    ]


def problems_of(options: argparse.Namespace, device: torch.device | str = "cpu") -> list[Problem]:
    """The problems that the options state, of each group of heads: mostly one.

    Raises:
        ValueError: They do not fit each other.
    """
    device = torch.device(device)
    dtype = options.dtype or ("fp32" if device.type == "cpu" else "fp16")
    scores = {}
    if hasattr(options, "softcap"):
        has = ("rpb", "sink", "key_mask", "query_mask", "lengths")
        scores = {f"has_{name}": getattr(options, name) for name in has}
        scores["softcap"] = options.softcap
        if options.lengths and not options.add_kv:
            raise ValueError("--lengths is of the additional keys of --add-kv")
    return [
        make_problem(
            tuple(options.input_size), **call, batch=options.batch_size, head_dim=options.dim,
            head_dim_v=options.dim_value, additional=options.add_kv, dtype=DTYPES[dtype],
            device=device, requires_grad=options.backprop, **scores,
        )
        for call in calls_of(options)
    ]  # fmt: skip


def device_of(options: argparse.Namespace) -> torch.device:
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {options.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {options.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"--device {options.device}: there are {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def _config(options: argparse.Namespace, rank: int) -> Config:
    def tile(name: str) -> Any:
        values = getattr(options, name)
        return None if values is None else _per_axis("--" + name.replace("_", "-"), values, rank)

    values = (
        tile("q_tile"), tile("kv_tile"), tile("backward_q_tile"), tile("backward_kv_tile"), None,
        False, options.persistent, options.schedule, options.compile,
    )  # fmt: skip
    return Config(*validation.check_knobs(rank, values))


def request_of(options: argparse.Namespace) -> Request:
    """Check a command line.

    Raises:
        ValueError, NotImplementedError, RuntimeError: With a text for whoever typed it.
    """
    if options.dry_run and options.optimize:
        raise ValueError("--dry-run and --optimize exclude each other: give one of them")
    for name in ("warmup_steps", "optimize_warmup_steps", "max_configs", "optimize_seconds"):
        value = getattr(options, name)
        # Written so that not-a-number is refused, too.
        if not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if options.save is not None and not options.optimize:
        raise ValueError("--save is for --optimize: nothing else writes a profile file")
    options.save = options.save or DEFAULT_PROFILE
    named = None
    if options.device_name is not None:
        if not options.dry_run:
            raise ValueError("--device-name is for --dry-run: nothing runs on an absent device")
        named = devices.find(options.device_name)
    device = torch.device("cuda") if named is not None else device_of(options)
    problem, *more = problems_of(options, device)
    if more:
        raise NotImplementedError(
            "windows of groups of heads are a call each: give --window-size, --stride and "
            f"--dilation once, and --heads {problem.heads}"
        )
    if problem.dtype.itemsize < 2:
        raise NotImplementedError(f"no backend computes {options.dtype}: give fp16, bf16 or fp32")
    backend = options.backend or ""
    if backend and backend not in OTHERS:
        try:
            backend = parse_name(backend, FNA)
        except NotImplementedError as error:
            text = f"{error}; or one of {', '.join(OTHERS)}"
            raise NotImplementedError(text) from None
    if backend in OTHERS and (options.dry_run or options.optimize):
        raise ValueError(f"--backend {backend} has no settings to list or to search")
    if options.fmha_backend is not None:
        parse_name(options.fmha_backend, FMHA)
    config = _config(options, problem.rank)
    if config != DEFAULT_CONFIG and backend in OTHERS:
        raise ValueError(
            f"--backend {backend} has no tiles and schedules: leave out the tiles, --schedule, "
            "--persistent and --compile"
        )
    if options.optimize and config.torch_compile:
        raise ValueError("--optimize does not search what --compile compiles: give one of them")
    return Request(problem, config, backend, options.fmha_backend, named, options)


__all__ = [
    "BASELINES",
    "DTYPES",
    "OTHERS",
    "Request",
    "add_arguments",
    "add_problem_arguments",
    "add_score_arguments",
    "boolean",
    "calls_of",
    "device_of",
    "problems_of",
    "request_of",
]
