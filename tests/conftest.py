"""Shared fixtures: a clean state for every test, and GPU tests only where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from natten.context import NattenContext


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _clean_state():
    torch.manual_seed(0)
    yield
    NattenContext.reset()
    torch.use_deterministic_algorithms(False)
