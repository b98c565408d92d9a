"""The console script `natten`. It lies outside of the package, whose import loads torch for
seconds: an interruption of that is quiet, too."""

from __future__ import annotations


def main() -> int:
    """Run the command line; the exit code."""
    try:
        from natten.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
