"""Findings about the signal and the gradient by depth, from predicted or measured rows."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from scipy import stats

from varscale.auditing.findings import ERROR_FACTOR, WARNING_FACTOR, Finding, Level
from varscale.auditing.maps import Map, Mend
from varscale.report import Report, Row

# In the squared norm. Steps of the first layers are then ten times smaller than those of the last, and any one learning rate is
# off by √10 for one of the two. Batch norms before relu alone reach it in 12 layers, π/(π − 1) each (Yang et al. 2019).
GRADIENT_WARNING = 100.0
_GROWN = 8.0  # factor of a stream's second moment: what the last branch changes is then an eighth, relative, of the first's
_CHANCE = 5e-7  # of a false finding about the rows of one draw
_FEWEST = 4  # layers of a kind that make a trend
_ALIKE = 0.995  # correlation at which samples count as one
_LOST = 0.98  # and which all later rows must exceed
_FORMATS = (("float16", float(jnp.finfo(jnp.float16).tiny), 65504.0), ("float32", float(np.finfo(np.float32).tiny), 3.4e38))


@dataclasses.dataclass(frozen=True)
class Trend:
    """How a statistic of layers of one kind changes with depth.

    Attributes:
        rows: the layers, in execution order.
        values: their statistic, positive.
        factor: geometric mean of the ratio of one layer's to the one's before.
        total: the last one's over the first one's.
    """

    rows: tuple[Row, ...]
    values: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.values[-1] / self.values[0]

    @property
    def factor(self) -> float:
        return self.total ** (1 / (len(self.values) - 1))

    @property
    def steady(self) -> bool:
        """Whether both halves change the same way, each by a fifth of the whole at least."""
        middle = len(self.values) // 2
        whole = math.log(self.total)
        parts = (math.log(self.values[middle] / self.values[0]), math.log(self.values[-1] / self.values[middle]))
        return whole != 0 and all(part / whole > 0.2 for part in parts)


def signal(row: Row) -> float | None:
    """What a single draw shows of a row: the typical mean square where it is predicted."""
    return row.second_moment if row.typical is None else row.typical


def gradient(row: Row) -> float | None:
    """The squared norm of the gradient at a row, where its bound says anything.

    A map whose fan-in and Var[w] are reciprocal keeps this norm whatever its fan-out. Of a norm's output it is no measure:
    that is in units of its own.
    """
    if row.gradient is None or "Norm" in row.kind or (row.gradient_error_bound is not None and row.gradient_error_bound > 1):
        return None
    return row.gradient * math.prod(row.shape)


def trends(rows: Sequence[Row], statistic: Callable[[Row], float | None]) -> list[Trend]:
    """The trends over layers that have one name but for their numbers, and equally many axes: "layers_*", "blocks/*"."""
    groups: dict[tuple[str, str, int], list[tuple[Row, float]]] = {}
    for row in rows:
        value = statistic(row)
        if value is not None and 0 < value < math.inf and row.error_bound <= 1 and re.search(r"\d", row.path):
            groups.setdefault((re.sub(r"\d+", "*", row.path), row.kind, len(row.shape)), []).append((row, value))
    found = [Trend(*map(tuple, zip(*members, strict=True))) for members in groups.values() if len(members) >= _FEWEST]
    return [trend for trend in found if trend.steady]


def check_signal(report: Report, mend: Mend, scales: Mapping[str, float]) -> Iterator[Finding]:
    """Second moments that vanish or explode over the depth: the worst kind of layer.

    Args:
        report: the predicted rows.
        mend: what keeps the signal.
        scales: by row, the constant that the program multiplies it by before it is read, as SIREN's 30.
    """

    def scaled(row: Row) -> float | None:
        return None if (value := signal(row)) is None else value * scales.get(row.path, 1.0) ** 2

    worst = max(trends(report.rows, scaled), key=lambda trend: abs(math.log(trend.total)), default=None)
    if worst is None or (level := _level(worst.total)) is None:
        return
    verb = "shrinks" if worst.total < 1 else "grows"
    first, last = worst.rows[0].path, worst.rows[-1].path
    told = f"the signal {verb} by a factor of {worst.factor:.3g} a layer in its second moment, from {worst.values[0]:.3g} at "
    told += f"{first} to {worst.values[-1]:.3g} at {last} ({worst.total:.2g} over {len(worst.values)} layers)"
    told += _reach(worst) + "."
    at = next(row.path for row, value in zip(worst.rows, worst.values, strict=True) if _level(value / worst.values[0]) == level)
    yield Finding("VS101", level, at, told, worst.total, mend.line, mend.scheme)


def check_ends(
    report: Report, found: Sequence[Map], mend: Mend, scales: Mapping[str, float], *, chained: bool
) -> Iterator[Finding]:
    """The signal of the last hidden layer against what the first one reads: of nets that are too shallow for a trend.

    Args:
        report: the predicted rows.
        found: the model's random maps.
        mend: what keeps the signal.
        scales: by row, the constant that the program multiplies it by before it is read.
        chained: whether each layer reads the one before alone: no norms, no residual additions. Elsewhere a small map may be
            one that little depends on, and only what explodes is told.
    """
    hidden = {m.module: m for m in found if m.use.role in ("input", "hidden") and m.plain}
    rows = [row for row in report.rows if row.path in hidden and row.error_bound <= 1 and 0 < row.second_moment < math.inf]
    read = [row.second_moment / (m.use.fan_in * m.second_moment) for row in rows for m in (hidden[row.path],)]
    first = [value for row, value in zip(rows, read, strict=True) if hidden[row.path].use.reads_input]
    if not first or len(rows) < 2:
        return
    made = [(row.typical or row.second_moment) * scales.get(row.path, 1.0) ** 2 for row in rows]
    start = min(first, key=lambda value: abs(math.log(made[-1] / value)))  # of several inputs the one nearest to the end
    shrinks = made[-1] < start
    # A constant between a layer and a function that is not homogeneous, as SIREN's 30, shows only in what the next layer reads.
    values = [(max if shrinks else min)(pair) for pair in zip(made, read, strict=True)]
    if _level(values[-1] / start) != "error" or (shrinks and not chained):
        return
    # What averages or sums over places does is not the laws' doing.
    laws = sum(math.log(m.use.fan_in * m.second_moment * (m.scale or 1.0) ** 2) for m in (hidden[row.path] for row in rows))
    if abs(laws) < math.log(WARNING_FACTOR) or (laws < 0) != shrinks:
        return
    at, value = next((row.path, v) for row, v in zip(rows, values, strict=True) if _level(v / start) == "error")
    last = "" if at == rows[-1].path else f" and {values[-1]:.3g} at {rows[-1].path}"
    told = f"the second moment is {start:.3g} where the first layer reads it, {value:.3g} here{last}: the signal "
    told += f"{'shrinks' if shrinks else 'grows'} by a factor of {(values[-1] / start) ** (1 / len(rows)):.3g} a layer."
    yield Finding("VS101", "error", at, told, values[-1] / start, mend.line, mend.scheme)


def check_gradient(report: Report, mend: Mend) -> Iterator[Finding]:
    """Gradients of the first layers that are far from those of the last."""
    worst = max(trends(report.rows, gradient), key=lambda trend: abs(math.log(trend.total)), default=None)
    if worst is None or (level := _level(worst.total)) is None:
        return
    ratio = worst.values[0] / worst.values[-1]
    if level == "warning" and abs(math.log(ratio)) < math.log(GRADIENT_WARNING):
        return
    first, last = worst.rows[0].path, worst.rows[-1].path
    less = "smaller" if ratio < 1 else "larger"
    told = f"the gradient at {first} has a squared norm {max(ratio, 1 / ratio):.2g} times {less} than at {last} (a factor of "
    told += f"{1 / worst.factor:.3g} a layer backward): by gradient descent the first layers learn "
    told += f"{math.sqrt(max(ratio, 1 / ratio)):.2g} times {'slower' if ratio < 1 else 'faster'} than the last."
    yield Finding("VS102", level, first, told, ratio, mend.line, mend.scheme)


def check_stream(report: Report, additions: int, mend: Mend) -> Iterator[Finding]:
    """A residual stream that grows with depth without vanishing or exploding."""
    grown = [trend for trend in trends(report.rows, signal) if _GROWN < trend.total < WARNING_FACTOR]
    if additions < _FEWEST or not grown:
        return
    worst = max(grown, key=lambda trend: trend.total)
    told = (
        f"its second moment grows from {worst.values[0]:.3g} to {worst.values[-1]:.3g} over {len(worst.values)} blocks: later "
    )
    told += "branches change the stream less than earlier ones."
    yield Finding("VS107", "info", worst.rows[-1].path, told, worst.total, mend.line, mend.scheme)


def check_rank(report: Report, readouts: Collection[str], mend: Mend) -> Iterator[Finding]:
    """Samples, or positions of one sample, that the depth makes alike: what follows cannot tell them apart.

    Args:
        report: the predicted rows.
        readouts: the modules that make the outputs; small logits beside a bias are alike, and do no harm.
        mend: what keeps samples apart.
    """
    for name, statistic in (("samples", "sample_correlation"), ("positions of a sample", "position_correlation")):
        inner = [row for row in report.rows if row.path and row.path[0] != "[" and row.path not in readouts]
        rows = [(row, value) for row in inner if (value := getattr(row, statistic)) is not None and row.error_bound < 0.5]
        # A branch that averages may well make positions alike; the net has lost them where no later row tells them apart.
        lost = [i for i, (_, value) in enumerate(rows) if value > _ALIKE and min(later for _, later in rows[i:]) > _LOST]
        if not lost or rows[0][1] > 0.5:
            continue
        row, value = rows[lost[0]]
        told = f"two {name} have a correlation of {value:.4f} here, where the first layer has {rows[0][1]:.3g}: the net "
        told += "tells them apart by what is left, and gradients mostly move what they have in common."
        yield Finding("VS108", "warning", row.path, told, value, mend.line, mend.scheme)


def check_draw(measured: Report, predicted: Report) -> Iterator[Finding]:
    """Rows of one draw that its law does not give, to a chance of 5e-7 for all rows together.

    The logarithm of a draw's mean square is taken to be normal about that of `typical`, with the band's width of 2.576
    deviations to either side; deviations enough for that chance, six at least, and the
    prediction's own bound are allowed.
    """
    expected = {row.path: row for row in predicted.rows}
    allowed = max(6.0, float(stats.norm.isf(_CHANCE / (2 * max(1, len(expected))))))
    for row in measured.rows:
        other = expected.get(row.path)
        if other is None or not other.typical or not other.band or not other.band[0] > 0 or other.error_bound > 0.5:
            continue
        if not 0 < row.second_moment < math.inf:
            continue
        deviation = math.log(other.band[1] / other.band[0]) / (2 * 2.5758)
        off = abs(math.log(row.second_moment / other.typical))
        if off > allowed * deviation + math.log1p(other.error_bound):
            told = f"this draw has a second moment of {row.second_moment:.3g}, where its laws give {other.band[0]:.3g} to "
            told += f"{other.band[1]:.3g} in 99 of 100 draws: its parameters are not what the model's init draws."
            yield Finding("VS123", "error", row.path, told, row.second_moment / other.typical, "vs.initialize(model, key, x)")
            return


def _level(total: float) -> Level | None:
    size = abs(math.log(total))
    return "error" if size > math.log(ERROR_FACTOR) else "warning" if size > math.log(WARNING_FACTOR) else None


def _reach(trend: Trend) -> str:
    """Where a format ends, if the trend goes on: numbers are about the root of the second moment."""
    rate = math.log(trend.factor)
    for name, low, high in _FORMATS:
        end = 2 * math.log(low if rate < 0 else high)
        layers = (end - math.log(trend.values[0])) / rate
        if 0 < layers < 4 * len(trend.values):
            side = "below the smallest normal number" if rate < 0 else "above the largest number"
            return f"; at layer {math.ceil(layers)} it is {side} of {name}"
    return ""
