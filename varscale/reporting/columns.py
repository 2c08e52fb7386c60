"""The columns of a report's table: what each shows, how its numbers are written, and which are left out first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from varscale.reporting.folding import Line
from varscale.reporting.layout import Column
from varscale.reporting.rows import Row, Weight

ABSENT = "·"
_WORST_LAST = ("measured", "exact", "quadrature", "sampled", "assumed")


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share with three significant digits."""
    return f"{100 * value:.3g}%"


def bound(value: float) -> str:
    """A bound on a relative error; two digits say enough."""
    return f"{100 * value:.2g}%"


def shape(value: tuple[int, ...]) -> str:
    return "×".join(map(str, value)) or "scalar"


def interval(value: tuple[float, float]) -> str:
    return f"{number(value[0])}..{number(value[1])}"


def several(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """One number where they are written alike, otherwise the smallest and the largest; NaN is the largest of all."""
    ends = [min(values, key=_order), max(values, key=_order)]
    low, high = map(write, ends)
    return low if low == high else f"{low}..{high}"


def _order(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def _intervals(values: Sequence[tuple[float, float]]) -> str:
    return interval((min(low for low, _ in values), max(high for _, high in values)))


def _texts(values: Sequence[str]) -> str:
    return max(values, key=lambda value: _WORST_LAST.index(value) if value in _WORST_LAST else 0)


def _percents(values: Sequence[float]) -> str:
    return several(values, percent)


def _bounds(values: Sequence[float]) -> str:
    return several(values, bound)


def _verdicts(values: Sequence[bool]) -> str:
    return "yes" if all(values) else "NO"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A column: an attribute of the rows, its header, its rank (the highest is left out first) and how it is written."""

    attribute: str
    header: str
    rank: int
    write: Callable[[Sequence[Any]], str] = several
    is_left: bool = False
    is_alarm: bool = False  # shown only where a share is above zero


_KINDS = (
    _Kind("kind", "kind", 19, _texts, is_left=True),
    _Kind("shape", "shape", 18, lambda values: shape(values[0])),
    _Kind("dtype", "dtype", 33, _texts, is_left=True),
    _Kind("mean", "mean", 15),
    _Kind("second_moment", "second moment", 1),
    _Kind("variance", "variance", 32),
    _Kind("typical", "typical", 20),
    _Kind("measured", "measured", 5),
    _Kind("measured_error", "standard error", 6),
    _Kind("holds", "holds", 7, _verdicts, is_left=True),
    _Kind("band", "band", 8, _intervals),
    _Kind("error_bound", "error bound", 9, _bounds),
    _Kind("draws_in_band", "draws in band", 14, _percents),
    _Kind("how", "how", 10, _texts, is_left=True),
    _Kind("largest_magnitude", "largest magnitude", 16),
    _Kind("zero_share", "zeros", 17, _percents),
    _Kind("nonfinite_share", "not finite", 2, _percents, is_alarm=True),
    _Kind("overflow_share", "overflow", 24, _percents),
    _Kind("underflow_share", "underflow", 25, _percents),
    _Kind("dead_share", "dead units", 26, _percents),
    _Kind("saturated_share", "saturated", 27, _percents),
    _Kind("sample_correlation", "sample correlation", 22),
    _Kind("position_correlation", "position correlation", 23),
    _Kind("channel_mean_squared", "channel mean²", 29),
    _Kind("kurtosis", "kurtosis", 28),
    _Kind("gradient", "gradient", 3),
    _Kind("gradient_nonfinite_share", "gradient not finite", 4, _percents, is_alarm=True),
    _Kind("gradient_error_bound", "gradient error bound", 21, _bounds),
    _Kind("measured_gradient", "measured gradient", 11),
    _Kind("measured_gradient_error", "gradient standard error", 12),
    _Kind("gradient_holds", "gradient holds", 13, _verdicts, is_left=True),
)
_CUSTOM_RANK = 30


def row_columns(lines: Sequence[Line]) -> list[Column]:
    """The columns that hold anything, the paths first."""
    rows = [row for line in lines for row in line.rows]
    columns = [Column("path", tuple(line.label for line in lines), is_left=True)]
    for kind in _KINDS:
        values = [getattr(row, kind.attribute) for row in rows]
        if all(value is None for value in values) or (kind.is_alarm and not any(values)):
            continue
        if kind.attribute in ("how", "error_bound") and all(row.how == "measured" for row in rows):
            continue
        cells = tuple(_cell([getattr(row, kind.attribute) for row in line.rows], kind.write) for line in lines)
        columns.append(Column(kind.header, cells, kind.rank, kind.is_left))
    for name in dict.fromkeys(name for row in rows for name in row.custom):
        cells = tuple(_cell([row.custom.get(name) for row in line.rows], several) for line in lines)
        columns.append(Column(name, cells, _CUSTOM_RANK))
    return columns


def _cell(values: Sequence[Any], write: Callable[[Sequence[Any]], str]) -> str:
    present = [value for value in values if value is not None]
    return write(present) if present else ABSENT


_WEIGHT_KINDS = (
    _Kind("shape", "shape", 4, lambda values: shape(values[0])),
    _Kind("law", "law", 5, _texts, is_left=True),
    _Kind("mean", "mean", 9),
    _Kind("variance", "variance", 1),
    _Kind("fan_in", "fan in", 6),
    _Kind("fan_out", "fan out", 10),
    _Kind("uses", "uses", 11),
    _Kind("ratio", "ratio", 7),
    _Kind("nonfinite_share", "not finite", 0, _percents, is_alarm=True),
    _Kind("gradient", "gradient", 2),
    _Kind("gradient_nonfinite_share", "gradient not finite", 0, _percents, is_alarm=True),
    _Kind("gradient_ratio", "gradient / weight", 3),
)


def weight_columns(weights: Sequence[Weight]) -> list[Column]:
    """Likewise for parameters."""
    columns = [Column("path", tuple(weight.path for weight in weights), is_left=True)]
    for kind in _WEIGHT_KINDS:
        values = [getattr(weight, kind.attribute) for weight in weights]
        if any(values) or (not kind.is_alarm and any(value is not None for value in values)):
            cells = tuple(_cell([value], kind.write) for value in values)
            columns.append(Column(kind.header, cells, kind.rank, kind.is_left))
    return columns


def is_finite(row: Row | Weight) -> bool:
    """Whether neither the values nor their gradients were seen to hold a NaN or an infinity."""
    return not (row.nonfinite_share or row.gradient_nonfinite_share)
