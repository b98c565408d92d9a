"""Helpers around the public functions."""

from __future__ import annotations

from natten._older import find_older
from natten.utils import checks, log
from natten.utils.checks import check_all_args

__getattr__ = find_older(__name__)


__all__ = ["check_all_args", "checks", "log"]
