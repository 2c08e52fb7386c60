"""The one table that prediction and measurement both fill: a row for every module's output, in execution order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

from varscale.reporting.rows import Histogram, How, Row, Weight

__all__ = ["Histogram", "How", "Report", "Row", "Weight"]

_COLUMNS = (
    "path",
    "kind",
    "shape",
    "mean",
    "second_moment",
    "typical",
    "band",
    "sample_correlation",
    "gradient",
    "how",
    "error_bound",
)


def _cell(value: Any) -> str:
    if value is None:
        return "·"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) if all(isinstance(n, int) for n in value) else "–".join(map(_cell, value))
    return str(value)


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows in execution order, and the laws of the weights.

    Attributes:
        rows: one a module output.
        weights: parameter path to `Weight`.
        notes: what a reader must know beside the rows, such as why there are no gradients; one sentence each.
    """

    rows: tuple[Row, ...]
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> Row:
        """The row at `path`.

        Raises:
            KeyError: no row has this path; the nearest ones are named.
        """
        for row in self.rows:
            if row.path == path:
                return row
        import difflib

        paths = [row.path for row in self.rows]
        near = difflib.get_close_matches(path, paths, n=4, cutoff=0.3) or paths[:4]
        raise KeyError(f"no row {path!r} in this report of {len(paths)} rows; nearest: {', '.join(map(repr, near))}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def output(self) -> Row:
        """The model's own output: the row "", or the last one where the output is a tuple or a dict."""
        return next((row for row in self.rows if row.path == ""), self.rows[-1])

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows by how they were obtained; they sum to 1."""
        counts = Counter(row.how for row in self.rows)
        return {how: count / len(self.rows) for how, count in counts.items()}

    def table(self, width: int = 120) -> str:
        """The rows as text, `width` characters wide; the shares by `how` on the last line."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in _COLUMNS:
            text = column in ("path", "kind", "how")
            table.add_column(
                column.replace("_", " "), justify="left" if text else "right", overflow="fold" if text else "ellipsis"
            )
        for row in self.rows:
            table.add_row(*(_cell(getattr(row, column)) for column in _COLUMNS))
        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        shares = ", ".join(f"{share:.0%} {how}" for how, share in self.shares.items())
        return f"{capture.get()}{len(self.rows)} rows: {shares}"

    def __str__(self) -> str:
        return self.table()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain Python values."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_json(self, **options: Any) -> str:
        """Rows and weights as JSON; numbers that are not finite become null.

        Args:
            **options: passed on to `json.dumps`.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        weights = [dataclasses.asdict(weight) for weight in self.weights.values()]
        return json.dumps(plain({"rows": self.to_records(), "weights": weights}), **options)

    def diff(self, other: Report) -> dict[str, float]:
        """Relative difference of the second moments, other over this minus one, for the paths in both."""
        theirs = {row.path: row.second_moment for row in other.rows}
        return {
            row.path: theirs[row.path] / row.second_moment - 1
            if row.second_moment
            else math.inf * theirs[row.path]
            if theirs[row.path]
            else 0.0
            for row in self.rows
            if row.path in theirs
        }
