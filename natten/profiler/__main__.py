"""`python -m natten.profiler`."""

from __future__ import annotations

import sys

from natten.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]], prog="python -m natten.profiler"))
