"""The modules import each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules_of(root: Path) -> dict[str, Path]:
    """Module names of natten and natten.models, and their files."""
    found = {}
    for folder, package in (("natten", "natten"), ("models", "natten.models")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _is_for_type_checkers(child):
            yield child
            yield from _walk(child)


def imports_of(source: str, package: str, modules: Collection[str]) -> set[str]:
    """What a module imports, at its top or inside functions, and names in strings, which an
    ``import_module`` may take.

    Args:
        source: Its text.
        package: What its relative imports start from.
        modules: Which names are modules: ``from package import module`` imports no more than that.
    """
    found = set()
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            origin = ".".join((*base, *filter(None, [node.module])))
            members = {f"{origin}.{alias.name}" for alias in node.names}
            found |= members if members <= set(modules) else members | {origin}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found.add(node.value)
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    """Each module and those that it imports; not the package around a module, which Python runs
    first in any case.
    """
    modules = modules_of(root)
    graph = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        text = path.read_text(encoding="utf-8")
        graph[name] = imports_of(text, package, modules) & set(modules) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected sets of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            members = sorted(stack[at:])
            del stack[at:]
            if len(members) > 1:
                found.append(members)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        (
            {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}},
            [["b", "c"], ["d", "e"]],
        ),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert sorted(circles(graph)) == expected


SOURCE = """
from . import near
from ..far.deep import thing
if TYPE_CHECKING:
    import only_for_mypy
def f():
    import inside
    return import_module("by.name")
"""


def test_imports_are_found_wherever_they_stand() -> None:
    assert imports_of(SOURCE, "a.b", {"a.b.near"}) == {
        "a.b.near", "a.far.deep", "a.far.deep.thing", "inside", "by.name",
    }  # fmt: skip


def test_no_module_imports_what_imports_it() -> None:
    graph = graph_of(ROOT)
    assert "natten.functional.dispatch" in graph["natten.profile_file"]
    assert "natten.functional.backends.flex" in graph["natten.functional.dispatch"]
    assert "natten.models._checkpoint" in graph["natten.models.nat"]
    assert circles(graph) == []
