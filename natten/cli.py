"""The command `natten`: profile, simulate, explain, precompile, info, hub-kernel and demo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from natten.command import Parser, guarded


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    from natten.profiler.arguments import add_arguments

    add_arguments(parser)


def _profile(options: argparse.Namespace) -> int:
    from natten.profiler.run import run

    return run(options)


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    from natten import devices
    from natten.profiler.arguments import add_problem_arguments

    add_problem_arguments(parser)
    group = parser.add_argument_group("simulation")
    for name in ("q-tile", "kv-tile", "backward-q-tile", "backward-kv-tile"):
        group.add_argument(
            f"--{name}", type=int, nargs="+", metavar="N", help="default: what kernels would use"
        )
    group.add_argument(
        "--aligned", action="store_true", help="key tiles on multiples of their shape"
    )
    group.add_argument(
        "--device-name", default="h100", metavar="NAME",
        help=f"one of {', '.join(devices.DEVICES)}; default: h100",
    )  # fmt: skip
    group.add_argument(
        "--advise", action="store_true", help="strides, windows and tiles that waste less"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the advice (needs matplotlib)"
    )
    group.add_argument("--json", action="store_true", help="print JSON, a list for groups of heads")


def _simulate(options: argparse.Namespace) -> int:
    from natten.profiler.arguments import DTYPES, calls_of
    from natten.simulator import simulate

    def tile(values: list[int] | None) -> tuple[int, ...] | None:
        rank = len(options.input_size)
        return None if values is None else tuple(values) * (rank if len(values) == 1 else 1)

    calls = calls_of(options)
    if options.plot is not None and len(calls) > 1:
        raise NotImplementedError("--plot is of one window, got those of groups of heads")
    documents = []
    for number, call in enumerate(calls):
        found = simulate(
            tuple(options.input_size), **call, batch=options.batch_size, head_dim=options.dim,
            head_dim_v=options.dim_value, additional=options.add_kv,
            dtype=DTYPES[options.dtype or "fp16"],
            q_tile_shape=tile(options.q_tile), kv_tile_shape=tile(options.kv_tile),
            backward_q_tile_shape=tile(options.backward_q_tile),
            backward_kv_tile_shape=tile(options.backward_kv_tile),
            aligned=options.aligned, device=options.device_name,
        )  # fmt: skip
        advice = found.advise() if options.advise or options.plot else None
        if options.plot is not None and advice is not None:
            from natten import viz

            viz.advice_figure(advice).savefig(options.plot, dpi=120)
        documents.append(found.as_dict())
        if advice is not None:
            documents[-1]["advice"] = advice.as_dict()
        if not options.json:
            text = f"{found}" if advice is None else f"{found}\n\n{advice}"
            _write_of_heads(number, len(calls), text)
    if options.json:
        document = documents if len(calls) > 1 else documents[0]
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    from natten.profiler.arguments import add_problem_arguments, add_score_arguments

    add_problem_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda; default: a GPU if any")


def _explain(options: argparse.Namespace) -> int:
    import torch

    from natten.functional.dispatch import explain
    from natten.functional.problem import DEFAULT_CONFIG
    from natten.profiler.arguments import device_of, problems_of

    device = device_of(options)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here")
    problems = problems_of(options, device)
    for number, problem in enumerate(problems):
        _write_of_heads(number, len(problems), str(explain(problem, DEFAULT_CONFIG)))
    return 0


def _precompile_arguments(parser: argparse.ArgumentParser) -> None:
    from natten.profiler.arguments import add_problem_arguments, add_score_arguments

    add_problem_arguments(parser)
    add_score_arguments(parser)
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--more-sizes", nargs="+", default=[], metavar="NxN",
        help="other sizes of the input, as 32x48 for 32 by 48 tokens",
    )  # fmt: skip
    group.add_argument(
        "--gpu", metavar="NAME", help="to compile for, which need not be here; default: that here"
    )
    group.add_argument("--workers", type=int, metavar="N", help="default: as many as CPUs")


def _precompile(options: argparse.Namespace) -> int:

    from natten.precompiling import precompile
    from natten.profiler.arguments import problems_of

    sizes = [options.input_size]
    for text in options.more_sizes:
        try:
            sizes.append([int(part) for part in text.split("x")])
        except ValueError:
            raise ValueError(f"--more-sizes takes sizes such as 32x48, got {text!r}") from None
    options.dtype = options.dtype or "fp16"
    problems = [
        problem
        for size in sizes
        for problem in problems_of(argparse.Namespace(**{**vars(options), "input_size": size}))
    ]
    number = precompile(
        problems, gpu=options.gpu, backward=options.backprop, workers=options.workers, progress=True
    )
    _write(f"{number} kernels for {len(sizes)} sizes")
    return 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", action="store_true", help="skip the check of the backends")


def _info(options: argparse.Namespace) -> int:
    from natten.info import info

    text, failed = info(check=not options.no_check)
    _write(text)
    return 1 if failed else 0


def _hub_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="to write; made if it does not exist")


def _hub_kernel(options: argparse.Namespace) -> int:
    from natten.hub_kernel import REPOSITORY, write_hub_kernel

    folder = write_hub_kernel(options.folder)
    _write(f"Programs that load {REPOSITORY} load this natten where they are started with")
    sys.stdout.write(f"LOCAL_KERNELS={REPOSITORY}={folder}\n")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from natten import demo

    return demo.main(options.rest, prog="natten demo")


def _write_of_heads(number: int, groups: int, text: str) -> None:
    """What there is to say of a group of heads, of which there may be one."""
    title = f"Heads of group {number + 1} of {groups}:\n" if groups > 1 else ""
    _write(f"{title}{text}" + "\n" * (number + 1 < groups))


def _write(text: str) -> None:
    from natten.tables import wrapped

    sys.stdout.write(wrapped(text) + "\n")


# name: what it does, its arguments, its function
_Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Any], int]]
_COMMANDS: dict[str, _Command] = {
    "profile": ("time a call, list or search settings", _profile_arguments, _profile),
    "simulate": ("count tiles, predict times, give advice", _simulate_arguments, _simulate),
    "explain": ("who would run a call, and why others would not", _explain_arguments, _explain),
    "precompile": (
        "compile the kernels of a call before it is made",
        _precompile_arguments,
        _precompile,
    ),
    "info": ("versions, devices, backends: for a bug report", _info_arguments, _info),
    "hub-kernel": (
        "a folder that Hugging Face kernels loads this library from",
        _hub_kernel_arguments,
        _hub_kernel,
    ),
}


def _parser(prog: str, command: str | None) -> Parser:
    """The parser of one command, or of all."""
    if command is not None:
        text, add_arguments, _ = _COMMANDS[command]
        parser = Parser(prog=prog, description=text)
        add_arguments(parser)
        return parser
    import natten

    parser = Parser(prog=prog, description="Neighborhood attention on the command line.")
    parser.add_argument("--version", action="version", version=f"natten {natten.__version__}")
    names = {name: text for name, (text, *_) in _COMMANDS.items()}
    names["demo"] = "attention over a photograph: a table and a picture"
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in names.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line. Returns the exit code.

    0 is success; 1 a check that failed; 2 a wrong request, explained in one line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else None
    title = prog or (f"natten {name}" if name else "natten")

    def run() -> int:
        if name is None:
            _parser("natten", None).print_help()
            return 0
        if name == "demo":
            return _demo(argparse.Namespace(rest=words[1:]))
        if name not in _COMMANDS:
            _parser("natten", None).parse_args(words)
            return 0
        options = _parser(title, name).parse_args(words[1:])
        return _COMMANDS[name][2](options)

    return guarded(title, run)


if __name__ == "__main__":
    sys.exit(main())
