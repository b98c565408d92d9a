"""Loggers, for programs that write to that of this package."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger called ``name``; NATTEN_LOG_LEVEL acts on those below "natten"."""
    return logging.getLogger(name)


__all__ = ["get_logger"]
