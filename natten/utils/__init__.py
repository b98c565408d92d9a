"""Helpers around the public functions."""

from __future__ import annotations

from natten.utils import checks, log
from natten.utils.checks import check_all_args

__all__ = ["check_all_args", "checks", "log"]
