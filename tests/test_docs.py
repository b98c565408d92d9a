"""The documentation: its code runs, its error texts exist, the site builds and links."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
BLOCK = re.compile(r"(<!-- gpu -->\n+)?```python\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    needs_gpu: bool
    code: str

    def compile(self):
        # Line numbers of the page, for tracebacks.
        return compile("\n" * self.line + self.code, str(self.page), "exec")


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start(2)), match[1] is not None, match[2])
        for match in BLOCK.finditer(text)
    ]


WITH_CODE = [page for page in PAGES if blocks_of(page)]


def test_pages_have_code():
    assert ROOT / "README.md" in WITH_CODE
    assert len(WITH_CODE) >= 8


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_runs(page, monkeypatch):
    # The blocks of a page are one program, as a reader types it.
    if page.stem == "models" or "import timm" in page.read_text():
        pytest.importorskip("timm")
    # Compilers import the module that a function is of.
    program = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, program.__name__, program)
    for block in blocks_of(page):
        code = block.compile()
        if torch.cuda.is_available() or not block.needs_gpu:
            exec(code, vars(program))


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_gpu_code_is_marked(page):
    for block in blocks_of(page):
        guarded = block.needs_gpu or "cuda.is_available()" in block.code
        assert guarded or "cuda" not in block.code, f"{page.name}, line {block.line}"


def commands() -> list[str]:
    """The `natten` commands in the pages, but for those that search for long."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = [
        line.split("  #")[0].strip()
        for page in PAGES
        for language, block in fenced.findall(page.read_text())
        if not language
        for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("natten ") and "--optimize" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    from natten.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


# --- error texts

SOURCES_IN_FULL = (
    "natten/validation.py",
    "natten/functional/dispatch.py",
    "natten/functional/neighborhood.py",
    "natten/functional/operators.py",
    "natten/nn/attention.py",
    "natten/nn/core.py",
    "natten/nn/cross_attention.py",
    "models/_checkpoint.py",
)


def texts(source: Path) -> Iterator[str]:
    """The messages that a module raises, with … for what is filled in."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = literal(node.exc.args[0])
            if text.strip("… "):
                yield text


def literal(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return "…"


def pieces(text: str) -> list[str]:
    """The fixed parts of a message."""
    return [piece for piece in (part.strip(" ,;:") for part in text.split("…")) if len(piece) > 3]


def page_texts() -> list[str]:
    return re.findall(r"^\| `(.*?)` (?:\(a warning\) )?\|", TROUBLES.read_text(), re.MULTILINE)


@pytest.mark.parametrize("source", SOURCES_IN_FULL)
def test_errors_are_documented(source):
    page = "\n".join(page_texts())
    for text in texts(ROOT / source):
        # What follows the first gap may be listed in short.
        first = max(pieces(text.split(", got")[0]), key=len)
        assert first in page, f"docs/troubleshooting.md lacks {text!r}"


def test_documented_errors_exist():
    sources = [*(ROOT / "natten").rglob("*.py"), *(ROOT / "models").glob("*.py")]
    code = "\n".join(path.read_text() for path in sources)
    # Adjacent string literals are one text.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    code = re.sub(r"\{[^{}]*\}", "…", code)
    listed = page_texts()
    assert len(listed) > 40
    for text in listed:
        for piece in pieces(text):
            assert piece in code, f"no such error: {text!r} ({piece!r})"


# --- the site


def build_site(folder: Path) -> None:
    pytest.importorskip("material", reason="needs pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs pip install '.[docs]'")
    pytest.importorskip("latex2mathml", reason="needs pip install '.[docs]'")
    pytest.importorskip("nbconvert", reason="needs pip install '.[notebooks]'")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def check_tables(site: Path) -> None:
    for page in PAGES[1:]:
        built = (site / page.with_suffix(".html").name).read_text()
        assert not re.search(r"<!-- table: [a-z-]+ -->", built), page
    assert (site / "backends.html").read_text().count("✓") > 40
    assert "<math" in (site / "semantics.html").read_text()
    assert "dinat_large_384" in (site / "models.html").read_text()


def check_links(site: Path) -> None:
    link = re.compile(r'(?:href|src)="([^"]+)"')
    texts = {page: page.read_text() for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'id="([^"]+)"', text)) for page, text in texts.items()}
    for page, text in texts.items():
        if page.name == "404.html":  # its links are absolute: it is shown anywhere
            continue
        for target in link.findall(text):
            if re.match(r"(https?:|mailto:|data:|javascript:)", target):
                continue
            path, _, anchor = target.partition("#")
            path = path.partition("?")[0]
            goal = (page.parent / path).resolve() if path else page
            if goal.is_dir():
                goal = goal / "index.html"
            assert goal.exists(), f"{page.relative_to(site)} links to {target}"
            if anchor and goal.suffix == ".html":
                assert anchor in anchors[goal], f"{page.relative_to(site)} links to {target}"


def check_names(site: Path) -> None:
    """Every public name is a heading of the reference, with an anchor, and the search knows it."""
    sections = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {
        section["location"].rpartition(".")[2]: re.sub(r"<[^>]*>|¶", "", section["title"]).strip()
        for section in sections
        if ".html#natten." in section["location"]
    }
    for module in (
        "natten",
        "natten.functional",
        "natten.nn",
        "natten.models",
        "natten.distributed",
    ):
        loaded = importlib.import_module(module)
        for name in loaded.__all__:
            if callable(getattr(loaded, name)):
                assert found.get(name) == name, f"{module}.{name} has no heading of its own"


def check_docstrings_are_drawn(site: Path) -> None:
    """Nothing of another markup, of an interpreter's session or of an address is left as text."""
    for page in ("operations", "modules", "models", "distributed", "profiler"):
        text = (site / f"{page}.html").read_text()
        assert not re.search(r"={6,}|:func:|&gt;&gt;&gt; .*</p>", text), page
        assert not re.search(r"(?<![\"/>])https?://arxiv[^<]*</p>", text), page
    cross = (site / "modules.html").read_text().split('id="natten.nn.cross_attention')[1]
    for name in ("embed_dim", "num_heads", "kernel_size", "rotary", "context_dim", "device"):
        assert f"<code>{name}</code>" in cross or f">{name}</" in cross, name
    window = (site / "operations.html").read_text().split('id="natten.window"')[1]
    assert "<td>bidirectional</td>" in window


def check_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?://[^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]*href="(https?://[^"]+)"', text
        )
        assert not loaded, f"{page.name} loads {loaded}"


# One test, because it takes a build.
@pytest.mark.slow
def test_site(tmp_path):
    build_site(tmp_path)
    check_tables(tmp_path)
    check_names(tmp_path)
    check_docstrings_are_drawn(tmp_path)
    check_links(tmp_path)
    check_nothing_comes_from_elsewhere(tmp_path)


# --- figures of the README


def test_speeds_in_the_readme_are_those_of_the_benchmarks():
    text = " ".join((ROOT / "README.md").read_text().split())
    cases = json.loads((ROOT / "benchmarks" / "results" / "h100.json").read_text())["cases"]
    ratios = [
        [case[f"peer_{kind}_ms"] / case[f"{kind}_ms"] for kind in ("fwd", "bwd")] for case in cases
    ]
    forward, backward = zip(*ratios, strict=True)
    assert min(forward) > 1
    assert min(backward) > 1
    claim = re.search(
        r"In all (\d+) rows of that table natten is faster than the fastest of them, "
        r"([\d.]+) to (\d+) times in the forward and ([\d.]+) to ([\d.]+) times in the backward "
        r"pass. On two CPU cores, it is (\d+) to (\d+) times",
        text,
    )
    assert claim is not None
    cpu = json.loads((ROOT / "benchmarks" / "cpu.json").read_text())
    assert cpu["machine"]["threads"] == 2
    faster = [case["times_faster"] for case in cpu["cases"]]
    assert min(faster) > 1
    assert list(claim.groups()) == [
        str(len(cases)),
        f"{min(forward):.1f}", f"{max(forward):.0f}",
        f"{min(backward):.1f}", f"{max(backward):.1f}",
        f"{min(faster):.0f}", f"{max(faster):.0f}",
    ]  # fmt: skip
