"""What the documentation site computes when it is built.

Pages ask for tables by a comment, `<!-- table: NAME -->`, so that nothing typed by hand goes stale:
they come from running the dispatch table, from the registered models, and from the files in
`benchmarks/`. Equations become MathML, which browsers draw without scripts, and the notebooks
become pages with their stored outputs.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
import torch
from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from natten import devices
from natten.context import NattenContext, allow_flex_compile, allow_flex_compile_backprop
from natten.functional import dispatch
from natten.functional.problem import Config, Problem

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import distributed  # noqa: E402

YES = "✓"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# --- what runs where

_GPUS = {
    "Hopper (9.0)": (9, 0),
    "Blackwell (10.0)": (10, 0),
    "Ampere (8.0)": (8, 0),
    "Turing (7.5)": (7, 5),
}


def _problem(device: str = "cpu", **changes: Any) -> Problem:
    """2-D, 56 x 56 tokens, a window of 7 x 7, 4 heads of 64, float16."""
    grid = (56, 56)
    values: dict[str, Any] = dict(
        batch=1, query_shape=grid, key_shape=grid, heads=4, heads_kv=4, head_dim=64, head_dim_v=64,
        kernel_size=(7, 7), stride=(1, 1), dilation=(1, 1), is_causal=(False, False), grid=grid,
        query_origin=(0, 0), key_origin=(0, 0), scale=0.125, dtype=torch.float16,
        device=torch.device(device), requires_grad=True,
    )  # fmt: skip
    return Problem(**{**values, **changes})


# Torch's determinism belongs to the process, so these are calls as they are by default.
_CALLS: dict[str, dict[str, Any]] = {
    "float16, bfloat16": {},
    "float32": dict(dtype=torch.float32),
    "float64": dict(dtype=torch.float64),
    "stride, dilation, causal": dict(stride=(2, 2), dilation=(2, 1), is_causal=(True, False)),
    "head_dim 256": dict(head_dim=256, head_dim_v=256),
    "head_dim 24": dict(head_dim=24, head_dim_v=24),
    "head_dim 512": dict(head_dim=512, head_dim_v=512),
    "values of another head_dim (64 and 128)": dict(head_dim_v=128),
    "fewer key heads (GQA)": dict(heads_kv=2),
    "additional keys": dict(num_additional=16),
    "relative position bias": dict(has_rpb=True),
    "boxes of a grid": dict(grid=(112, 56)),
    "packed sequences (`attention`)": dict(
        query_shape=(256,), key_shape=(256,), grid=(256,), kernel_size=(256,), stride=(1,),
        dilation=(1,), is_causal=(False,), query_origin=(0,), key_origin=(0,), varlen=True,
        max_seqlen_q=128, max_seqlen_kv=128,
    ),
}  # fmt: skip


def _on_gpu(capability: tuple[int, int], ask: Callable[[], Any]) -> Any:
    """`ask`, with the kernels told that the GPU has this compute capability."""
    known = (d for d in devices.DEVICES.values() if d.capability == capability)
    like = next(known, devices.DEVICES["h100"])
    with devices.pretending(replace(like, capability=capability)):
        return ask()


def _refusal(name: str, problem: Problem, config: Config) -> str | None:
    """Like `natten.explain`; a reason to run only when named does not count as one."""
    device = dispatch._device_refusal(name, problem)
    return device or dispatch.load(name).refusal(problem, config)


_HOMES = {"blackwell": (10, 0), "hopper": (9, 0), "cutlass": (9, 0), "flex": (9, 0)}


def support_by_call() -> str:
    """Every backend on hardware that it is for, asked about every kind of call."""
    notes: dict[str, int] = {}
    rows = []
    for title, changes in _CALLS.items():
        row = [title]
        for name in dispatch.BACKENDS:
            on_gpu = name in _HOMES
            problem = _problem("cuda" if on_gpu else "cpu", **changes)
            reason = _on_gpu(
                _HOMES.get(name, (9, 0)),
                lambda name=name, problem=problem: _refusal(name, problem, Config()),
            )
            if reason is None:
                row.append(YES)
            else:
                row.append(f"[{notes.setdefault(reason, len(notes) + 1)}]")
        rows.append(row)
    table = markdown_table(["call, with gradients", *(f"`{n}`" for n in dispatch.BACKENDS)], rows)
    listed = "\n".join(f"- [{number}] {reason}" for reason, number in notes.items())
    return f"{table}\n\n{listed}"


def support_by_device() -> str:
    """The backend that `backend=None` takes, and all that could be named."""
    rows = []
    for title, capability in [("CPU", None), *_GPUS.items()]:
        problem = _problem("cuda" if capability else "cpu")

        def ask(problem: Problem = problem) -> list[str]:
            return [n for n in dispatch.BACKENDS if _refusal(n, problem, Config()) is None]

        able = ask() if capability is None else _on_gpu(capability, ask)
        rows.append([title, f"`{able[0]}`", ", ".join(f"`{name}`" for name in able[1:])])
    return markdown_table(["tensors on", "`backend=None` runs", "can be named too"], rows)


def support_of_compiled_flex() -> str:
    """What FlexAttention says when compiled."""
    config = Config(torch_compile=True)
    with allow_flex_compile(), allow_flex_compile_backprop():
        rows = []
        for title, problem in {
            "GPU, float16, head_dim 64": _problem("cuda"),
            "GPU, float16, head_dim 24": _problem("cuda", head_dim=24, head_dim_v=24),
            "GPU, float64": _problem("cuda", dtype=torch.float64),
            "CPU, forward": _problem("cpu", requires_grad=False),
        }.items():
            rows.append([title, dispatch.load("flex").refusal(problem, config) or YES])
    NattenContext.reset()
    return markdown_table(["`torch_compile=True`", "`flex`"], rows)


# --- models


def model_table() -> str:
    from natten.models.__main__ import listing

    table = listing("")
    return markdown_table(list(table.columns), table.rows)


def shipped_weights() -> str:
    """One row for every model whose weights are in the package."""
    rows = []
    for path in sorted((ROOT / "models" / "weights").glob("*nat_pico.*.json")):
        result = json.loads(path.read_text())
        rows.append(
            [
                f"`{path.stem}`",
                f"{result['parameters'] / 1e6:.2f} M",
                f"{result['test_accuracy']:.2f}% of {result['images']['test']} images",
                result["device"],
            ]
        )
    if not rows:
        return "No weights are in the package yet."
    return markdown_table(["model", "parameters", "test accuracy", "trained on"], rows)


def model_speeds() -> str:
    """What `benchmarks/models.py` measured."""
    results = _benchmark("models.json")
    if results is None:
        return "Not measured yet: `python benchmarks/models.py`."
    kinds = list(dict.fromkeys((row["mode"], row["task"]) for row in results["rows"]))
    speeds: dict[str, dict[tuple[str, str], float]] = {}
    for row in results["rows"]:
        found = speeds.setdefault(row["model"], {})
        found[row["mode"], row["task"]] = row["images_per_second"]
    table = markdown_table(
        ["model", *(f"{task}, {mode}" for mode, task in kinds)],
        [
            [f"`{name}`", *(f"{found[kind]:,.0f}" if kind in found else "" for kind in kinds)]
            for name, found in speeds.items()
        ],
    )
    return (
        f"{table}\n\n*Images a second: {results['device']}, torch {results['torch']}, timm "
        f"{results['timm']}, {results['dtype']}, batches of {results['batch_size']}, "
        f"{results['size']} × {results['size']}.*"
    )


# --- benchmarks


def _benchmark(name: str) -> dict[str, Any] | None:
    path = ROOT / "benchmarks" / name
    return json.loads(path.read_text()) if path.is_file() else None


def _shape(values: Iterable[int]) -> str:
    return "×".join(map(str, values))


def cpu_results() -> str:
    results = _benchmark("cpu.json")
    if results is None:
        return "Not measured yet: `python benchmarks/cpu.py`."
    machine = results["machine"]
    rivals = list(dict.fromkeys(name for case in results["cases"] for name in case["others_ms"]))
    rows = []
    for case in results["cases"]:
        batch, heads, *grid, head_dim = case["case"]
        rows.append(
            [
                f"{batch}, {_shape(grid)}, {heads} heads of {head_dim}",
                _shape([case["kernel_size"]] * len(grid)),
                case["pass"],
                f"{case['natten_ms']:.1f}",
                *(
                    f"{case['others_ms'][name]:.0f}" if name in case["others_ms"] else "–"
                    for name in rivals
                ),
                f"{case['times_faster']:.1f}",
            ]
        )
    table = markdown_table(
        ["batch, tokens, heads", "window", "pass", "natten, ms", *(f"{n}, ms" for n in rivals)]
        + ["times faster"],
        rows,
    )
    tokens = "; ".join(
        f"{c['n']}²: {c['forward_ms'] * 1e6 / c['n'] ** 2:.0f} ns" for c in results["linearity"]
    )
    return (
        f"{table}\n\nForward time of one token on square grids: {tokens}. Dense attention's would "
        "be 64 times as long on the last as on the first.\n\n"
        f"*{machine['processor']} ({machine['instructions']}), {machine['threads']} threads, torch "
        f"{machine['torch']}, numba {machine['numba']}, {machine['time'][:10]}; load "
        f"{machine['load'][0]:.1f} on {machine['cores']} cores. "
        f"First call {results['footprint']['first_call_s']:.1f} s with an empty cache, "
        f"{results['footprint']['cached_call_s']:.1f} s in the next process.*"
    )


def gpu_results() -> str:
    """What `benchmarks/gpu.py` measured, beside the best peer of every case."""
    results = _benchmark("results/h100.json")
    if results is None:
        return "Not measured yet: `python benchmarks/gpu.py`."
    rows = []
    for case in results["cases"]:
        row = [f"`{case['case']}`", case["dtype"].removeprefix("torch.")]
        for kind in ("fwd_ms", "bwd_ms"):
            ours, best = case.get(kind), case.get(f"peer_{kind}")
            row += [_number(ours), _number(best), f"{best / ours:.2f}" if ours and best else "–"]
        rows.append(row)
    header = ["case", "dtype", "forward, ms", "best peer, ms", "ratio"]
    header += ["backward, ms", "best peer, ms", "ratio"]
    parts = [markdown_table(header, rows)]
    dense = [case for case in results.get("dense", []) if case.get("fwd_ms")]
    if dense:
        parts.append("Dense attention (`natten.attention`), beside cuDNN in the same process:")
        header = ["tokens", "heads", "head_dim", "causal", "forward, ms", "cuDNN, ms"]
        parts.append(
            markdown_table(
                [*header, "backward, ms", "cuDNN, ms"],
                [
                    [
                        *(case["length"], case["heads"], case["head_dim"]),
                        "yes" if case["causal"] else "no",
                        *(_number(case.get(k)) for k in ("fwd_ms", "cudnn_fwd_ms")),
                        *(_number(case.get(k)) for k in ("bwd_ms", "cudnn_bwd_ms")),
                    ]
                    for case in dense
                ],
            )
        )
    facts = ", ".join(
        f"{name} {results[name]}" if name != "device" else results[name]
        for name in ("device", "torch", "triton", "natten", "commit", "date")
        if name in results
    )
    parts.append(f"*{facts}; from `benchmarks/results/h100.json`.*")
    return "\n\n".join(parts)


def accuracy() -> str:
    """What `benchmarks/accuracy.py` measured: the worst of its calls, by type and backend."""
    results = _benchmark("accuracy.json")
    if results is None:
        return "Not measured yet: `python benchmarks/accuracy.py`."
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in results["rows"]:
        found = worst.setdefault((row["dtype"], row["backend"]), {})
        for name, error in row["errors"].items():
            found[name] = max(error, found.get(name, 0.0))
    table = markdown_table(
        ["type", "backend", "output", "query's gradient", "key's", "value's"],
        [
            [dtype, name if " " in name else f"`{name}`"]
            + [f"{errors[k]:.1e}" if k in errors else "–" for k in ("out", "query", "key", "value")]
            for (dtype, name), errors in worst.items()
            if any(errors.values())  # not the reference in float64 beside itself
        ],
    )
    return f"{table}\n\n*{results['device']}, torch {results['torch']}, {results['date']}.*"


def gpu_accuracy() -> str:
    """The largest error of the cases of `benchmarks/gpu.py`, by type."""
    results = _benchmark("results/h100.json")
    if results is None:
        return "Not measured yet: `python benchmarks/gpu.py`."
    found: dict[str, list[float]] = {}
    for case in results["cases"]:
        found.setdefault(case["dtype"].removeprefix("torch."), []).append(case["error"])
    rows = [[d, len(e), f"{min(e):.1e}", f"{max(e):.1e}"] for d, e in found.items()]
    table = markdown_table(["type", "cases", "smallest error", "largest error"], rows)
    return f"{table}\n\n*{results['device']}, torch {results['torch']}, {results['date']}.*"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def distributed_results() -> str:
    """What `benchmarks/distributed.py` measured on 1, 2 and 4 GPUs."""
    results = _benchmark("results/distributed.json")
    if results is None:
        return "Not measured yet: `benchmarks/distributed.py`."
    worlds = [world for world in ("1", "2", "4") if world in results]
    parts = []
    for case in results["1"]["cases"]:
        (alone,) = results["1"]["cases"][case]
        rows = []
        for world in worlds:
            for row in results[world]["cases"][case]:
                moved = row.get("halo MB", 0.0) + row.get("heads MB", 0.0)
                rows.append(
                    [
                        world,
                        row["way"],
                        f"{row['forward_ms']:.1f}",
                        f"{row['both_ms']:.1f}",
                        f"{alone['both_ms'] / row['both_ms']:.2f}",
                        f"{moved:.0f}" if "halo MB" in row else "",
                        f"{row['hidden']:.0%}" if "hidden" in row else "",
                        f"{row['memory_GB']:.1f}",
                    ]
                )
        header = ["GPUs", "way", "forward, ms", "and backward", "speedup", "MB received"]
        table = markdown_table([*header, "hidden", "peak GB"], rows)
        parts.append(f"{_shape(alone['grid'])} tokens, {_CALL}:\n\n{table}")
    weak = "; ".join(
        f"{_shape(results[w]['weak']['grid'])} on {w}: {results[w]['weak']['both_ms']:.0f} ms"
        for w in worlds
    )
    fits = "; ".join(f"{results[w]['largest']['frames']} on {w}" for w in worlds)
    links = "; ".join(
        f"{results[w]['links']['GB_per_s']:.0f} GB/s and {results[w]['links']['latency_us']:.0f} "
        f"microseconds on {w}"
        for w in worlds[1:]
    )
    parts.append(
        f"As many tokens on every GPU, forward and backward: {weak}. The most frames of 48 × 80 "
        f"tokens whose forward and backward pass fit: {fits}. `all_to_all_single`: {links}.\n\n"
        f"*{results['device']}s of one node, torch {results['torch']}, {results['date']}; from "
        "`benchmarks/results/distributed.json`.*"
    )
    return "\n\n".join(parts)


_CALL = "windows of 18×24×24, 24 heads of 128, bfloat16"


def distributed_predictions() -> str:
    """The cost model, to 1,024 GPUs."""
    rows = []
    for ranks, best in distributed.predicted((30, 48, 80)).items():
        rows.append(
            [
                ranks,
                _shape(best.shards),
                best.heads,
                f"{best.halo_bytes / 1e6:.0f}",
                f"{best.far_bytes / 1e6:.0f}",
                f"{best.heads_bytes / 1e6:.0f}",
                f"{best.ratio:.1f}",
                f"{best.forward_ms:.2f}",
                f"{best.backward_ms:.2f}",
                f"{best.speedup:.1f}",
                f"{best.efficiency:.0%}",
            ]
        )
    header = ["GPUs", "tokens over", "heads over", "halo MB", "of other nodes", "heads MB"]
    header += ["keys over own", "forward, ms", "backward, ms", "speedup", "efficiency"]
    return "30×48×80 tokens, the best mesh of each number:\n\n" + markdown_table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "support-by-call": support_by_call,
    "support-by-device": support_by_device,
    "support-of-compiled-flex": support_of_compiled_flex,
    "models": model_table,
    "shipped-weights": shipped_weights,
    "model-speeds": model_speeds,
    "cpu-results": cpu_results,
    "gpu-results": gpu_results,
    "accuracy": accuracy,
    "gpu-accuracy": gpu_accuracy,
    "distributed-results": distributed_results,
    "distributed-predictions": distributed_predictions,
}
_table = cache(lambda name: TABLES[name]())


# --- notebooks


def _notebook_pages(config: MkDocsConfig, files: Files) -> None:
    import nbformat
    from nbconvert import MarkdownExporter

    listing = ["# Notebooks", "", (ROOT / "notebooks" / "README.md").read_text().split("\n", 1)[1]]
    pages = ["notebooks/index.md"]
    exporter = MarkdownExporter()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.outputs = _joined(cell.get("outputs", []))
        text, resources = exporter.from_notebook_node(
            notebook, resources={"output_files_dir": path.stem, "unique_key": path.stem}
        )
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        note = (
            f"\n\n*This page shows `notebooks/{path.name}` with its stored outputs; run it from a "
            "clone.*\n"
        )
        title, _, rest = text.lstrip().partition("\n")
        files.append(
            File.generated(config, f"notebooks/{path.stem}.md", content=title + note + rest)
        )
        pages.append(f"notebooks/{path.stem}.md")
    files.append(File.generated(config, "notebooks/index.md", content="\n".join(listing)))
    for section in config.nav or []:
        if "Notebooks" in section:
            section["Notebooks"] = pages


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with what was printed in one piece, however the kernel sent it."""
    joined: list[Any] = []
    for output in outputs:
        printed = output.output_type == "stream"
        if printed and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


# --- what mkdocs and griffe call


def on_files(files: Files, config: MkDocsConfig) -> Files:
    _notebook_pages(config, files)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"<!-- table: ([a-z-]+) -->", lambda match: _table(match[1]), markdown)


_EQUATION = re.compile(r'<(div|span) class="arithmatex">(\\[\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def _drawn(match: re.Match[str]) -> str:
    display = "block" if match[2] == r"\[" else "inline"
    return (
        f'<{match[1]} class="arithmatex">'
        f"{mathml(html.unescape(match[3]).strip(), display=display)}</{match[1]}>"
    )


_FIGURE = re.compile(r'<img [^>]*?src="[^"]*figures/([\w-]+)\.(png|gif)"[^>]*>')


def _for_both_themes(match: re.Match[str]) -> str:
    """A figure and its twin for dark pages, of which the theme shows one."""
    name, kind = match.groups()
    if not (ROOT / "docs" / "figures" / f"{name}-dark.{kind}").is_file():
        return match[0]
    light = match[0].replace(f"{name}.{kind}", f"{name}.{kind}#only-light")
    return light + match[0].replace(f"{name}.{kind}", f"{name}-dark.{kind}#only-dark")


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _FIGURE.sub(_for_both_themes, _EQUATION.sub(_drawn, content))


_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
_DOCTEST = re.compile(r"(?:^ *>>> .*\n(?:^ *(?:>>>|\.\.\.|\S).*(?:\n|$))*)", re.MULTILINE)
# An entry of Args that describes several parameters, which may go on in the next line.
_TOGETHER = re.compile(r"^( +)(\w+(?:,\s+\w+)+):((?: .*)?(?:\n\1 .*|\n *(?=\n\1 ))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """What docstrings say for readers of code, as the site's Markdown says it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _TOGETHER.sub(_one_by_one, text)
            text = _DOCTEST.sub(_fenced, text)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """What cannot be read from the folder of the package: `natten.models`, which is another
        folder, and functions whose signature is written once, which get what `help` shows."""
        if pkg.name != "natten":
            return
        pkg.set_member("models", loader.load("models"))
        for module in _WITH_ONE_SIGNATURE:
            shown = pkg[module.removeprefix("natten.")]
            for name, value in vars(import_module(module)).items():
                if not inspect.isfunction(value) or not hasattr(value, "__signature__"):
                    continue
                made = _as_help_shows(name, value)
                shown.set_member(name, made)
                self.on_object(obj=made)


_WITH_ONE_SIGNATURE = (
    "natten.distributed.attention",
    "natten.functional.neighborhood",
    "natten.functional.window_products.functions",
)


def _one_by_one(match: re.Match[str]) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}:{text}" for name in re.split(r",\s+", names))


def _fenced(match: re.Match[str]) -> str:
    lines = match[0].rstrip("\n").split("\n")
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    lines = [line.split("  # doctest:")[0] for line in lines]
    return "\n".join([f"{indent}```pycon", *lines, f"{indent}```", ""])


def _as_help_shows(name: str, function: Callable[..., Any]) -> griffe.Function:
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    return griffe.Function(
        name,
        parameters=griffe.Parameters(
            *(
                griffe.Parameter(
                    p.name,
                    annotation=None if p.annotation is empty else str(p.annotation),
                    kind=griffe.ParameterKind(p.kind.description),
                    default=None if p.default is empty else repr(p.default),
                )
                for p in signature.parameters.values()
            )
        ),
        returns=None if signature.return_annotation is empty else str(signature.return_annotation),
        docstring=griffe.Docstring(inspect.getdoc(function) or ""),
    )
