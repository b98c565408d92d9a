"""Shared fixtures: a clean state for every test, and tests only where what they need is there."""

from __future__ import annotations

import os

import pytest
import torch

from natten.context import NattenContext
from natten.functional.backends.triton import tiles

# Triton looks at it when it is imported, and kernels that it has wrapped stay what they are: a
# process either interprets kernels or compiles them.
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    import interpreting

    interpreting.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    compiles = pytest.mark.skip(reason="needs TRITON_INTERPRET=1, with which `make test` runs it")
    interprets = pytest.mark.skip(reason="needs TRITON_INTERPRET to be unset")
    for item in items:
        if "interpreted" in item.keywords:
            if not INTERPRETS:
                item.add_marker(compiles)
        elif INTERPRETS:
            item.add_marker(interprets)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _clean_state():
    torch.manual_seed(0)
    yield
    NattenContext.reset()
    torch.use_deterministic_algorithms(False)
    # Calls run with tilings of earlier ones.
    tiles._used.clear()
    tiles.reuse.cache_clear()


@pytest.fixture(autouse=True)
def wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded to the width that test runners set."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def untraced_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention runs as it is, where torch would trace every mask first: for numbers alone."""
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True,
        raising=False,
    )  # fmt: skip
