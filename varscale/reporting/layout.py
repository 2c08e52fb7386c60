"""Text tables that fit a terminal: columns are left out in a stated order, numbers are never cut short."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len, chop_cells

NARROWEST = 40  # columns of a terminal; below it a path and a number do not fit beside each other
Style = Literal["plain", "bold", "red", "yellow"]
_CODES: dict[Style, str] = {"bold": "1", "red": "31", "yellow": "33"}
_GAP = 2
_SMALLEST_PATH = 16


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a text table.

    Attributes:
        header: its name; the words stand below each other.
        cells: one a line of the table.
        rank: the columns of the highest rank are left out first. The first column of a table always stays.
        is_left: whether the cells are aligned left.
    """

    header: str
    cells: tuple[str, ...]
    rank: int = 0
    is_left: bool = False

    @property
    def width(self) -> int:
        """Columns of the terminal that the widest cell or word of the header takes."""
        return max(map(cell_len, (*self.cells, *self.header.split())), default=0)


def terminal_width(width: int | None) -> int:
    """`width`, or the terminal's where it is None (80 where there is no terminal).

    Raises:
        ValueError: `width` is below 40.
    """
    if width is None:
        return max(shutil.get_terminal_size((80, 24)).columns, NARROWEST)
    if width < NARROWEST:
        raise ValueError(f"width must be at least {NARROWEST} columns, not {width}")
    return width


def text_table(
    columns: Sequence[Column], width: int, *, styles: Sequence[Style] | None = None, color: bool = False
) -> tuple[str, tuple[str, ...]]:
    """The columns side by side, and the headers of those that did not fit.

    Args:
        columns: the first holds paths, which are continued on further lines where they are long; all others stay whole.
        width: columns of the terminal.
        styles: one a line.
        color: whether to write the styles as ANSI escape sequences.
    """
    paths, *others = columns
    smallest = min(paths.width, max(_SMALLEST_PATH, 2 * width // 5))
    kept: list[Column] = []
    free = width - smallest
    for column in sorted(others, key=lambda column: column.rank):
        if column.width + _GAP > free:
            break  # what ranks lower does not overtake
        kept.append(column)
        free -= column.width + _GAP
    shown = [column for column in others if column in kept]
    first = min(paths.width, smallest + free)
    widths = [first, *(column.width for column in shown)]
    headers = [column.header.split() for column in (paths, *shown)]
    height = max(map(len, headers))
    lines = []
    for number in range(height):
        words = [([""] * (height - len(header)) + header)[number] for header in headers]
        lines.append(_painted(_line(words, widths, [paths, *shown]), "bold", color))
    for number, path in enumerate(paths.cells):
        style = styles[number] if styles else "plain"
        start, *rest = broken(path, first)
        line = _line([start, *(column.cells[number] for column in shown)], widths, [paths, *shown])
        lines += [_painted(line, style, color), *(_painted(more, style, color) for more in rest)]
    return "\n".join(lines), tuple(column.header for column in others if column not in kept)


def broken(path: str, width: int) -> list[str]:
    """The path on as many lines as it takes, broken after "/" where that is possible."""
    lines = [""]
    for key in path.replace("/", "/\n").split("\n"):
        indent = "  " if lines[1:] else ""
        if cell_len(lines[-1]) + cell_len(key) <= width:
            lines[-1] += key
        elif cell_len(key) + 2 <= width:
            lines.append("  " + key)
        else:
            pieces = chop_cells(key, width - 2)
            lines += [("  " if lines[-1] or indent else "") + piece for piece in pieces]
    return [line for line in lines if line] or [""]


def wrapped(text: str, width: int) -> str:
    """A sentence under a table, on lines of at most `width` columns."""
    return "\n".join(textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False))


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    parts = []
    for cell, width, column in zip(cells, widths, columns, strict=True):
        space = " " * (width - cell_len(cell))
        parts.append(cell + space if column.is_left else space + cell)
    return (" " * _GAP).join(parts).rstrip()


def _painted(line: str, style: Style, color: bool) -> str:
    return f"\x1b[{_CODES[style]}m{line}\x1b[0m" if color and style != "plain" else line
