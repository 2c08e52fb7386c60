"""A report as an HTML table, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

from varscale.reporting.layout import Column, Style

_COLORS = {"red": "color:#b3261e;font-weight:bold", "yellow": "color:#8a6100"}


def html_table(columns: Sequence[Column], styles: Sequence[Style], below: Sequence[str]) -> str:
    """All columns, in a box that scrolls; `below` are sentences under the table."""
    head = "".join(f'<th style="text-align:{_side(column)}">{html.escape(column.header)}</th>' for column in columns)
    lines = []
    for number, style in enumerate(styles):
        cells = "".join(
            f'<td style="text-align:{_side(column)};white-space:nowrap">{html.escape(column.cells[number])}</td>'
            for column in columns
        )
        marked = f' style="{_COLORS[style]}"' if style in _COLORS else ""
        lines.append(f"<tr{marked}>{cells}</tr>")
    text = "".join(f"<div>{html.escape(line)}</div>" for line in below)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div style="overflow:auto;max-height:40em">{body}</div>{text}'


def _side(column: Column) -> str:
    return "left" if column.is_left else "right"
