"""Tables, drawn by rich where it is installed, in plain text where it is not."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


def terminal_width() -> int | None:
    """Columns of the terminal, or of the environment variable COLUMNS; None where nothing says."""
    return shutil.get_terminal_size((0, 0)).columns or None


def wrapped(text: str) -> str:
    """Text whose lines are broken, and indented, where the terminal is too narrow for them."""
    width = terminal_width()
    lines: list[str] = []
    for line in text.split("\n"):
        if width is None or len(line) <= width:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Columns of text under a header; the first ``left`` are aligned to the left.

    Where the terminal is too narrow, the columns that do not fit go on below, after those on the
    left.
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    room = (terminal_width() or sys.maxsize) - sum(widths[:left]) - 2 * left + 2
    blocks: list[list[int]] = [[]]
    for n in range(left, len(widths)):
        if blocks[-1] and sum(widths[m] + 2 for m in (*blocks[-1], n)) > room:
            blocks.append([])
        blocks[-1].append(n)
    return "\n\n".join(
        _block([[row[n] for n in (*range(left), *block)] for row in cells], left)
        for block in blocks
    )


def _block(cells: list[list[str]], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


@dataclass
class Table:
    """A table with a title. ``str()`` is plain text, :meth:`drawn` needs rich.

    Attributes:
        title: Above it.
        columns: Their names.
        left: How many columns, from the first, are aligned to the left.
        rows: Texts, as many as columns.
        sections: Numbers of rows that a line is drawn above.
        caption: Below it.
    """

    title: str
    columns: Sequence[str]
    left: int
    rows: list[Sequence[str]] = field(default_factory=list)
    sections: list[int] = field(default_factory=list)
    caption: str = ""

    def add(self, *cells: str) -> None:
        """Append a row."""
        self.rows.append(cells)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self.sections.append(len(self.rows))

    def drawn(self) -> RichTable:
        """For rich's console."""
        from rich.table import Table as RichTable

        drawn = RichTable(title=self.title, title_justify="left", caption=self.caption or None)
        for n, column in enumerate(self.columns):
            justify: Any = "left" if n < self.left else "right"
            drawn.add_column(column, justify=justify, overflow="fold")
        for n, row in enumerate(self.rows):
            if n in self.sections:
                drawn.add_section()
            drawn.add_row(*row)
        drawn.caption_justify = "left"
        return drawn

    def __str__(self) -> str:
        lines = table(self.columns, self.rows, self.left).split("\n")
        if len(lines) == 2 + len(self.rows):
            for n in sorted(self.sections, reverse=True):
                lines.insert(2 + n, lines[1])
        return "\n".join([self.title, *lines, *([self.caption] if self.caption else []), ""])


def console(stderr: bool = False, width: int = 120) -> Console | None:
    """Rich's console, `width` wide where nothing says how wide it is; None without rich."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    # Names of files and texts of errors hold brackets, which are not meant for rich.
    plainly: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    found = Console(stderr=stderr, **plainly)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        # A pipe has no width: do not fold.
        return Console(stderr=stderr, width=width, **plainly)
    return found


def show(thing: Table | str, console: Console | None) -> None:
    """Print to a console, or plainly to standard output."""
    if console is None:
        sys.stdout.write(wrapped(str(thing)) + "\n")
    else:
        console.print(thing.drawn() if isinstance(thing, Table) else thing)


__all__ = ["Table", "console", "show", "table", "terminal_width", "wrapped"]
