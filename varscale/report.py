"""The one table that prediction and measurement both fill: a row for every module's output, in execution order."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from varscale.programs.patterns import Pattern, rows_caught
from varscale.reporting import records
from varscale.reporting.columns import is_finite, row_columns, weight_columns
from varscale.reporting.comparison import ComparedRow, Comparison, compare
from varscale.reporting.folding import folded, one_each
from varscale.reporting.html import html_table
from varscale.reporting.layout import Style, terminal_width, text_table, wrapped
from varscale.reporting.nonfinite import FirstNonfinite, first_nonfinite
from varscale.reporting.plots import expectation, propagation
from varscale.reporting.rows import Histogram, How, Row, Weight
from varscale.reporting.trust import Trust, held, trust

__all__ = ["ComparedRow", "Comparison", "FirstNonfinite", "Histogram", "How", "Report", "Row", "Trust", "Weight"]


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Rows in execution order, and the parameters.

    >>> report = Report((Row("Dense_0", "Dense", (8, 4), 0.0, 2.0, 2.0), Row("", "Net", (8, 4), 0.0, 1.0, 1.0)))
    >>> report["Dense_0"].second_moment, report.output.second_moment
    (2.0, 1.0)

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
        paths = [row.path for row in self.rows]
        near = difflib.get_close_matches(str(path), paths, n=4, cutoff=0.3) or paths[:4]
        raise KeyError(f"no row {path!r} in this report of {len(paths)} rows; nearest: {', '.join(map(repr, near))}")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def output(self) -> Row:
        """The model's own output: the row "", or the last one where the output is a tuple or a dict.

        Raises:
            ValueError: the report has no rows.
        """
        if not self.rows:
            raise ValueError("this report has no rows, so it has no output")
        return next((row for row in self.rows if row.path == ""), self.rows[-1])

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows by how they were obtained; they sum to 1."""
        counts = Counter(row.how for row in self.rows)
        return {how: count / len(self.rows) for how, count in counts.items()}

    @property
    def trust(self) -> Trust | None:
        """How far to trust a prediction: shares of rows within 15 %, flagged and sampled; None of a measured report."""
        return trust(self.rows)

    @property
    def first_nonfinite(self) -> FirstNonfinite | None:
        """The first row in execution order that holds a NaN or an infinity, with the rows before it; None if all are finite.

        The forward pass comes first, then the backward pass, from the last row to the first. Print it to see one screen.
        """
        return first_nonfinite(self.rows, self.weights)

    def select(self, pattern: Pattern | Sequence[Pattern]) -> Report:
        """The rows and weights that a pattern catches, as a report.

        Args:
            pattern: one or several globs or compiled `re.Pattern`: see `varscale.programs.patterns.matches_row`.

        Raises:
            TypeError: `pattern` is neither.
            ValueError: a pattern matches neither a row nor a weight.
        """
        paths = [row.path for row in self.rows]
        chosen = set(rows_caught(pattern, dict.fromkeys((*paths, *self.weights)), "pattern"))
        weights = {path: weight for path, weight in self.weights.items() if path in chosen}
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row.path in chosen), weights=weights)

    def table(self, width: int | None = None, *, fold: bool = False, color: bool = False) -> str:
        """The rows as text that fits the terminal; how they were obtained on the last lines.

        Numbers are never cut short. Columns that do not fit are left out, the last of this list first: second moment, not
        finite, gradient, gradient not finite, measured, its standard error, holds, band, error bound, how, measured gradient,
        its standard error, gradient holds, draws in band, mean, largest magnitude, zeros, shape, kind, typical, gradient error
        bound, sample correlation, position correlation, overflow, underflow, dead units, saturated, kurtosis,
        channel mean², own reducers, variance, dtype. The last lines name them. Paths continue on further lines.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.
            fold: join rows that repeat in a pattern, such as those of thirty equal blocks: one line for all, with the smallest
                and the largest value.
            color: mark rows that are not finite (red) or predicted by assumption (yellow) with ANSI escape sequences.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        lines = folded(self.rows) if fold else one_each(self.rows)
        styles: list[Style] = [_style(line.rows) for line in lines]
        text, missing = text_table(row_columns(lines), width, styles=styles, color=color)
        return "\n".join([text, *(wrapped(line, width) for line in self._summary(missing))])

    def weight_table(self, width: int | None = None, *, color: bool = False) -> str:
        """The parameters as text that fits the terminal.

        Columns that do not fit are left out, the last of this list first: not finite, gradient not finite, variance, gradient,
        gradient / weight (their norms), shape, law, fan in, ratio, mean, fan out, uses.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.
            color: mark parameters that are not finite with ANSI escape sequences.

        Raises:
            ValueError: `width` is below 40.
        """
        weights = list(self.weights.values())
        styles: list[Style] = ["plain" if is_finite(weight) else "red" for weight in weights]
        text, missing = text_table(weight_columns(weights), terminal_width(width), styles=styles, color=color)
        return "\n".join([text, *(wrapped(line, terminal_width(width)) for line in _left_out(missing))])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Report({self._shares()}, {len(self.weights)} weights)"

    def __rich__(self) -> Any:
        """The colored table for `rich.print`."""
        from rich.text import Text

        return Text.from_ansi(self.table(color=True))

    def _repr_html_(self) -> str:
        """The table for notebooks, with all columns."""
        lines = one_each(self.rows)
        return html_table(row_columns(lines), [_style(line.rows) for line in lines], self._summary(()))

    def plot(self) -> Any:
        """The signal-propagation plot: second moment and gradient by depth on log axes, and the histograms by layer, if any.

        Predicted rows are a line with the band of 99 draws in 100, measured rows are points colored by kind. Zeros are
        triangles on the lower edge; rows that are not finite are red. `measured.compare(predicted).plot()` draws both.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the report has no rows.
        """
        measured = [row for row in self.rows if row.how == "measured"]
        expected = [expectation(row) for row in self.rows if row.how != "measured"]
        return propagation(measured, expected, [row.path for row in self.rows])

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain Python values."""
        return [records.record(row) for row in self.rows]

    def to_json(self, **options: Any) -> str:
        """Rows, weights and notes as JSON; `Report.from_json` reads it.

        Numbers that are not finite become null; the record's "nonfinite" says which they were.

        Args:
            **options: passed on to `json.dumps`.
        """
        return records.to_json(self.rows, self.weights, self.notes, **options)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: `text` is not the JSON of a report.
        """
        return cls(*records.from_json(text))

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

    def compare(self, predicted: Report) -> Comparison:
        """This measured report beside a predicted one: each row inside its band or outside.

        A row's band is the predicted one, which holds 99 draws in 100, widened by `error_bound`. Predicted gradients are
        multiplied by the measured gradient at the model's output, because they are for a cotangent of unit variance there.
        A prediction has no band of its own for gradients: the width of theirs is the part of the forward bands that the layers
        after the row add, and the sampling variance of the cotangent's mean square, widened by `gradient_error_bound`.

        Raises:
            TypeError: `predicted` is no report.
            ValueError: this report is not a measured one, `predicted` has no bands, or they have no path in common.
        """
        if not isinstance(predicted, Report):
            raise TypeError(f"predicted must be a Report, not {type(predicted).__name__}")
        return compare(self.rows, predicted.rows)

    def _shares(self) -> str:
        shares = ", ".join(f"{share:.0%} {how}" for how, share in self.shares.items())
        return f"{len(self.rows)} rows: {shares}" if shares else "0 rows"

    def _summary(self, missing: Sequence[str]) -> list[str]:
        bad = sum(not is_finite(row) for row in self.rows)
        finite = f" {bad} rows hold a NaN or an infinity: see first_nonfinite." if bad else ""
        about = [str(line) for line in (self.trust, held(self.rows)) if line is not None]
        return [f"{self._shares()}.{finite}", *about, *_left_out(missing), *self.notes]


def _left_out(missing: Sequence[str]) -> list[str]:
    return [f"Not shown at this width: {', '.join(missing)}."] if missing else []


def _style(rows: Sequence[Row]) -> Style:
    if not all(map(is_finite, rows)):
        return "red"
    return "yellow" if any(row.how == "assumed" for row in rows) else "plain"
