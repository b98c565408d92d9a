"""Where messages of this package go.

They are those of the logger "natten" and of loggers below it, which belong to the program as any
logger does. Two environment variables, read when ``natten`` is imported, show them without one:

======================  ======================================================================
NATTEN_LOG_LEVEL        DEBUG, INFO, WARNING, ERROR or CRITICAL. DEBUG says once for each kind of
                        call which backend runs it, with which tiles, and why others do not
NATTEN_LOG_PIPE         stdout (the default if a level is set), stderr, a file to append to, or
                        /dev/null
======================  ======================================================================
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from enum import Enum
from typing import TextIO

log_format = "| %(asctime)s | [[ %(name)s ]] [ %(levelname)s ]: %(message)s"


class LogLevel(Enum):
    """What NATTEN_LOG_LEVEL may ask for."""

    Default = 0
    Debug = 1
    Info = 2
    Warnings = 3
    Errors = 4
    Critical = 5


_LEVELS = {
    "": (LogLevel.Default, logging.INFO),
    "debug": (LogLevel.Debug, logging.DEBUG),
    "info": (LogLevel.Info, logging.INFO),
    "warning": (LogLevel.Warnings, logging.WARNING),
    "error": (LogLevel.Errors, logging.ERROR),
    "critical": (LogLevel.Critical, logging.CRITICAL),
}


def _setting() -> tuple[LogLevel, int]:
    text = os.environ.get("NATTEN_LOG_LEVEL", "").strip().lower()
    if text not in _LEVELS:
        names = ", ".join(name.upper() for name in _LEVELS if name)
        warnings.warn(
            f"NATTEN_LOG_LEVEL must be one of {names}, got {text!r}", UserWarning, stacklevel=3
        )
        text = ""
    return _LEVELS[text]


def _get_log_level() -> LogLevel:
    return _setting()[0]


def _get_log_pipe() -> TextIO | str | None:
    """A stream, the path of a file that can be written to, or None for nowhere."""
    target = os.environ.get("NATTEN_LOG_PIPE", "").strip() or "stdout"
    if target.lower() in ("stdout", "stderr"):
        return getattr(sys, target.lower())
    if target == os.devnull:
        return None
    try:
        with open(target, "a", encoding="utf-8"):
            return target
    except OSError as error:
        warnings.warn(
            f"NATTEN_LOG_PIPE={target} cannot be written to, and nothing is logged: {error}",
            UserWarning,
            stacklevel=2,
        )
        return None


def _handler() -> logging.Handler:
    pipe = _get_log_pipe()
    if pipe is None:
        return logging.NullHandler()
    if isinstance(pipe, str):
        return logging.FileHandler(pipe, encoding="utf-8")
    return logging.StreamHandler(pipe)


class NattenLogger(logging.LoggerAdapter):
    """A logger that writes as the environment variables say now.

    Attributes:
        handler: What it added to ``logger``.
        log_level: Of both.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})
        _, self.log_level = _setting()
        self.handler = _handler()
        self.handler.setLevel(self.log_level)
        self.handler.setFormatter(logging.Formatter(log_format))
        self.logger.setLevel(self.log_level)
        self.logger.addHandler(self.handler)


def get_logger(name: str) -> logging.Logger:
    """The logger called ``name``; those below "natten" write as the environment variables say."""
    return logging.getLogger(name)


def configure() -> None:
    """Add a handler to "natten" if the environment asks for one."""
    names = ("NATTEN_LOG_LEVEL", "NATTEN_LOG_PIPE")
    asked = any(os.environ.get(name, "").strip() for name in names)
    # Not twice, where a program imports this package again.
    if asked and not logging.getLogger("natten").handlers:
        NattenLogger("natten")


__all__ = ["LogLevel", "NattenLogger", "configure", "get_logger", "log_format"]
