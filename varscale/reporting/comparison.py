"""Predicted beside measured: each row inside its band or outside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from varscale.reporting.columns import ABSENT, interval, number
from varscale.reporting.columns import shape as write_shape
from varscale.reporting.folding import MODEL
from varscale.reporting.html import html_table
from varscale.reporting.layout import Column, Style, terminal_width, text_table, wrapped
from varscale.reporting.plots import Expected, propagation
from varscale.reporting.rows import Row

_REACH = 2.5758  # standard deviations of a normal that hold 99 draws in 100


@dataclasses.dataclass(frozen=True)
class ComparedRow:
    """One row, measured and predicted.

    Attributes:
        path: module path.
        kind: class name of the module.
        shape: shape of the output.
        measured: E[x²] as measured.
        predicted: E[x²] of a typical initialization, as predicted.
        band: interval in which the measured value is expected: the predicted one of 99 draws in 100, widened by the bound on
            the prediction's own error.
        inside: whether it is there; a value that is not finite is outside.
        gradient: second moment of the gradient as measured; None where either report has none.
        predicted_gradient: as predicted, times the comparison's `gradient_scale`.
        gradient_band: interval in which it is expected.
        gradient_inside: whether it is there.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    measured: float
    predicted: float
    band: tuple[float, float]
    inside: bool
    gradient: float | None = None
    predicted_gradient: float | None = None
    gradient_band: tuple[float, float] | None = None
    gradient_inside: bool | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A measured report beside a predicted one; print it to see the table.

    Attributes:
        rows: the rows in both reports, in execution order.
        gradient_scale: second moment of the measured gradient at the model's output over the predicted one. Predicted
            gradients, which are for a cotangent of unit variance, are multiplied by it.
        only_measured: paths that the predicted report has not.
        only_predicted: paths that the measured report has not.
        measured: all rows of the measured report.
    """

    rows: tuple[ComparedRow, ...]
    gradient_scale: float | None
    only_measured: tuple[str, ...]
    only_predicted: tuple[str, ...]
    measured: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> ComparedRow:
        """The row at `path`.

        Raises:
            KeyError: no row of both reports has it.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no row {path!r} is in both reports")

    @property
    def outside(self) -> tuple[ComparedRow, ...]:
        """The rows outside their band, forward or backward."""
        return tuple(row for row in self.rows if not row.inside or row.gradient_inside is False)

    def table(self, width: int | None = None, *, color: bool = False) -> str:
        """The rows as text, those outside marked in words.

        Columns that do not fit are left out, the last of this list first: measured, predicted, forward (inside or outside),
        gradient, predicted gradient, backward, band, gradient band, shape, kind.

        Args:
            width: columns of the terminal; None for the terminal's own.
            color: whether to mark rows outside with ANSI escape sequences.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        text, missing = text_table(self._columns(), width, styles=self._styles(), color=color)
        return "\n".join([text, *(wrapped(line, width) for line in self._summary(missing))])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Comparison({len(self)} rows, {len(self.outside)} outside)"

    def _repr_html_(self) -> str:
        return html_table(self._columns(), self._styles(), self._summary(()))

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain Python values."""
        return [dataclasses.asdict(row) for row in self.rows]

    def plot(self) -> Any:
        """Measured points on the predicted line and band, as `Report.plot` draws them.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        expected = [Expected(row.path, row.predicted, row.band, row.predicted_gradient, row.gradient_band) for row in self.rows]
        return propagation(self.measured, expected, [row.path for row in self.measured])

    def _columns(self) -> list[Column]:
        def cells(read: Callable[[ComparedRow], Any], write: Callable[[Any], str] = number) -> tuple[str, ...]:
            values = [read(row) for row in self.rows]
            return tuple(ABSENT if value is None else write(value) for value in values)

        columns = [
            Column("path", cells(lambda row: row.path or MODEL, str), is_left=True),
            Column("kind", cells(lambda row: row.kind, str), 10, is_left=True),
            Column("shape", cells(lambda row: row.shape, write_shape), 9),
            Column("measured", cells(lambda row: row.measured), 1),
            Column("predicted", cells(lambda row: row.predicted), 2),
            Column("band", cells(lambda row: row.band, interval), 7),
            Column("forward", cells(lambda row: row.inside, _verdict), 3, is_left=True),
        ]
        if any(row.gradient is not None for row in self.rows):
            columns += [
                Column("gradient", cells(lambda row: row.gradient), 4),
                Column("predicted gradient", cells(lambda row: row.predicted_gradient), 5),
                Column("gradient band", cells(lambda row: row.gradient_band, interval), 8),
                Column("backward", cells(lambda row: row.gradient_inside, _verdict), 6, is_left=True),
            ]
        return columns

    def _styles(self) -> list[Style]:
        return ["red" if not row.inside or row.gradient_inside is False else "plain" for row in self.rows]

    def _summary(self, missing: Sequence[str]) -> list[str]:
        backward = [row for row in self.rows if row.gradient_inside is not None]
        lines = [f"Forward: {sum(row.inside for row in self.rows)} of {len(self.rows)} rows inside their band."]
        if backward:
            inside = sum(bool(row.gradient_inside) for row in backward)
            lines[0] += f" Backward: {inside} of {len(backward)}."
        for name, paths in (("measured", self.only_measured), ("predicted", self.only_predicted)):
            if paths:
                some = ", ".join(path or MODEL for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
                lines.append(f"Only {name}: {len(paths)} rows ({some}).")
        return [*lines, f"Not shown at this width: {', '.join(missing)}."] if missing else lines


def _verdict(inside: bool) -> str:
    return "inside" if inside else "OUTSIDE"


def compare(measured: Sequence[Row], predicted: Sequence[Row]) -> Comparison:
    """See `Report.compare`."""
    theirs = {row.path: row for row in predicted}
    if not any(row.band is not None for row in predicted):
        raise ValueError("predicted must be a report with bands, which vs.predict gives; this one has none")
    if any(row.how != "measured" for row in measured):
        raise ValueError("compare is called on the measured report, which vs.probe gives: measured.compare(predicted)")
    pairs = [(row, theirs[row.path]) for row in measured if row.path in theirs and theirs[row.path].band is not None]
    if not pairs:
        ours = ", ".join(repr(row.path) for row in measured[:2]) or "no rows"
        raise ValueError(f"predicted must have paths in common with this report; it has {predicted[0].path!r}, this one {ours}")
    scale = _gradient_scale(pairs)
    reaches = _gradient_reaches(predicted)
    ours = {row.path for row in measured}
    return Comparison(
        tuple(_compared(row, expected, scale, reaches[row.path]) for row, expected in pairs),
        scale,
        tuple(row.path for row in measured if row.path not in theirs),
        tuple(row.path for row in predicted if row.path not in ours),
        tuple(measured),
    )


def _gradient_scale(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Measured over predicted gradient at the last row that has both, the model's own output where it is one array."""
    for row, expected in reversed(pairs):
        if row.gradient and expected.gradient and math.isfinite(row.gradient):
            return row.gradient / expected.gradient
    return None


def _reach(row: Row) -> float:
    """Half the width of the band of the logarithm."""
    if row.band is None or row.band[0] <= 0 or not math.isfinite(row.band[1]):
        return math.inf
    return math.log(row.band[1] / row.band[0]) / 2


def _gradient_reaches(predicted: Sequence[Row]) -> dict[str, float]:
    """Half the width of the band of each gradient's logarithm.

    The draws of the layers after a row are what its gradient depends on: their part in the variance of the logarithm is the
    largest of a later row, less the row's own. A cotangent of n random numbers has a mean square of relative variance 2/n.
    """
    output = next((row for row in predicted if row.path == ""), predicted[-1])
    sampling = _REACH**2 * 2 / max(math.prod(output.shape), 1)
    largest, reaches = 0.0, {}
    for row in reversed(predicted):
        own = _reach(row) ** 2
        largest = max(largest, own)
        after = largest - own if math.isfinite(own) else math.inf
        reaches[row.path] = math.sqrt(after + sampling)
    return reaches


def _widened(low: float, high: float, error: float) -> tuple[float, float]:
    return (low * max(1 - error, 0.0), high * (1 + error)) if math.isfinite(error) else (0.0, math.inf)


def _compared(row: Row, expected: Row, scale: float | None, reach: float) -> ComparedRow:
    assert expected.band is not None
    band = _widened(*expected.band, expected.error_bound)
    typical = expected.second_moment if expected.typical is None else expected.typical
    found = ComparedRow(
        row.path, row.kind, row.shape, row.second_moment, typical, band, band[0] <= row.second_moment <= band[1]
    )
    if row.gradient is None or expected.gradient is None or scale is None:
        return found
    centre = expected.gradient * scale
    low, high = (0.0, math.inf) if reach > 300 else (centre * math.exp(-reach), centre * math.exp(reach))
    gradient_band = _widened(low, high, expected.gradient_error_bound or 0.0)
    return dataclasses.replace(
        found,
        gradient=row.gradient,
        predicted_gradient=centre,
        gradient_band=gradient_band,
        gradient_inside=gradient_band[0] <= row.gradient <= gradient_band[1],
    )
