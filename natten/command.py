"""What the commands of this package share: wrong requests end with one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

FAILED = 2
# What brings a module, where that is called otherwise.
_PACKAGES = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "skvideo": "sk-video",
}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {' '.join(message.split())}\n")


def guarded(title: str, call: Callable[[], int | None]) -> int:
    """The exit code of ``call``, or that of what it raises, which is told in one line.

    Args:
        title: Of the command, begins the line.
        call: Returns the exit code; None is 0.
    """
    try:
        code = call() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads has enough: `natten ... | head`. Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        text = f"interrupted{f': {error}' if str(error) else ''}"
        sys.stderr.write(f"{title}: {text}\n")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        text = str(error)
        if error.name is not None:
            module = error.name.partition(".")[0]
            text = f"{module} is not installed: pip install {_PACKAGES.get(module, module)}"
    except (ValueError, NotImplementedError, RuntimeError, MemoryError, OSError) as error:
        # torch.OutOfMemoryError is a RuntimeError.
        text = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"{title}: error: {text}\n")
    return FAILED


__all__ = ["FAILED", "INTERRUPTED", "Parser", "guarded"]
