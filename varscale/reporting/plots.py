"""The signal-propagation plot: second moment and gradient by depth on log axes, and the histograms by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from varscale.reporting.folding import MODEL
from varscale.reporting.rows import Row

COLORS = ("#1f5fa8", "#d9622b", "#2a9d77", "#8e4ea8", "#c9a227", "#c2417c", "#35b0c9", "#7a4b21")
_PREDICTED, _ALARM, _INK = "#5b6770", "#d62728", "#22272e"
_MARKERS = "osD^vPX*"
_MOST_LABELS = 48  # below the axis; of more rows every n-th is named
_LONGEST_LABEL = 28


def pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ImportError: matplotlib is not installed; the message says how to.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'varscale[plot]'") from error
    return plt


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is predicted at a row: the values of the line and of the band around it."""

    path: str
    value: float
    band: tuple[float, float] | None = None
    gradient: float | None = None
    gradient_band: tuple[float, float] | None = None


def expectation(row: Row) -> Expected:
    """The line and the bands of a predicted row; the gradient's band is the bound on its error."""
    value = row.second_moment if row.typical is None else row.typical
    if row.gradient is None:
        return Expected(row.path, value, row.band)
    error = row.gradient_error_bound or 0.0
    return Expected(row.path, value, row.band, row.gradient, (row.gradient * (1 - error), row.gradient * (1 + error)))


def propagation(measured: Sequence[Row], expected: Sequence[Expected], order: Sequence[str]) -> Any:
    """One panel for E[x²], one for the gradient's and one for histograms, each only where there is anything to show.

    Args:
        measured: rows drawn as points, colored by kind.
        expected: drawn as a line with its band.
        order: paths from left to right; what is expected elsewhere is not drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not order:
        raise ValueError("a report without rows cannot be plotted")
    plt = pyplot()
    places = {path: place for place, path in enumerate(order)}
    expected = [row for row in expected if row.path in places]
    has_gradient = any(row.gradient is not None for row in (*measured, *expected))
    has_histogram = any(row.histogram is not None for row in measured)
    heights = [3.0, *([3.0] if has_gradient else []), *([2.4] if has_histogram else [])]
    figure, grid = plt.subplots(
        len(heights),
        1,
        sharex=True,
        squeeze=False,
        figsize=(min(max(7.0, 3 + 0.22 * len(order)), 16.0), sum(heights) + 1.2),
        height_ratios=heights,
        layout="constrained",
    )
    panels = list(grid[:, 0])
    _line(panels[0], [(places[row.path], row.value, row.band) for row in expected])
    _points(panels[0], measured, [row.second_moment for row in measured], places)
    _finish(panels[0], "E[x²]", [(places[row.path], row.second_moment) for row in measured])
    if has_gradient:
        _line(panels[1], [(places[row.path], row.gradient, row.gradient_band) for row in expected if row.gradient is not None])
        rows = [row for row in measured if row.gradient is not None]
        gradients = [row.gradient or 0.0 for row in rows]
        _points(panels[1], rows, gradients, places)
        _finish(panels[1], "E[gradient²]", [(places[row.path], y) for row, y in zip(rows, gradients, strict=True)])
    if has_histogram:
        _histograms(panels[-1], measured, places)
    _labels(panels[-1], order)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False, fontsize=8)
    return figure


def _line(axes: Any, points: Sequence[tuple[int, float, tuple[float, float] | None]]) -> None:
    if not points:
        return
    axes.plot([x for x, _, _ in points], _drawn([y for _, y, _ in points]), color=_PREDICTED, linewidth=1.4, label="predicted")
    banded = [(x, *band) for x, _, band in points if band is not None and band[0] > 0 and math.isfinite(band[1])]
    if banded:
        x, low, high = zip(*banded, strict=True)
        axes.fill_between(x, low, high, color=_PREDICTED, alpha=0.25, linewidth=0, label="predicted band")


def _points(axes: Any, rows: Sequence[Row], values: Sequence[float], places: dict[str, int]) -> None:
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for number, kind in enumerate(kinds):
        x, y = zip(*((places[row.path], v) for row, v in zip(rows, values, strict=True) if row.kind == kind), strict=True)
        axes.plot(
            x,
            _drawn(y),
            linestyle="none",
            marker=_MARKERS[number // len(COLORS) % len(_MARKERS)],
            markersize=4.5,
            color=COLORS[number % len(COLORS)],
            label=kind,
        )


def _drawn(values: Sequence[float]) -> list[float]:
    """NaN for what a log axis cannot show."""
    return [value if value > 0 and math.isfinite(value) else math.nan for value in values]


def _finish(axes: Any, label: str, values: Sequence[tuple[int, float]]) -> None:
    axes.set_yscale("log")
    style(axes, label)
    low, high = axes.get_ylim()
    if high / low < 10:  # the ticks of less than a decade would carry no labels
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 4, middle * 4)
    bottom = axes.get_ylim()[0]
    for place, value in values:
        if value == 0:
            axes.plot([place], [bottom], marker="v", color=_INK, clip_on=False, markersize=5)
        elif not math.isfinite(value):
            axes.axvspan(place - 0.5, place + 0.5, color=_ALARM, alpha=0.25, linewidth=0)
            axes.text(place, 0.97, "not finite", rotation=90, transform=axes.get_xaxis_transform(), color=_ALARM, fontsize=7,
                      ha="center", va="top")  # fmt: skip


def _histograms(axes: Any, rows: Sequence[Row], places: dict[str, int]) -> None:
    for row in rows:
        if row.histogram is None or not row.second_moment > 0 or not math.isfinite(row.second_moment):
            continue
        root = math.sqrt(row.second_moment)
        edges = [edge / root for edge in row.histogram.edges]
        heights = [
            count / (upper - lower) if upper > lower else 0.0
            for count, lower, upper in zip(row.histogram.counts, edges[:-1], edges[1:], strict=True)
        ]
        most, place = max(heights, default=0.0) or 1.0, places[row.path]
        axes.pcolormesh(
            [place - 0.45, place + 0.45], edges, [[height / most] for height in heights], cmap="Blues", vmin=0, vmax=1
        )
    axes.set_ylim(-4, 4)
    style(axes, "x / rms, histogram")
    axes.grid(visible=False)


def style(axes: Any, label: str) -> None:
    """Light grid, no box, and the name of the quantity."""
    axes.set_ylabel(label)
    axes.grid(visible=True, color="#d5dae0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(axes: Any, paths: Sequence[str]) -> None:
    ticks = list(range(0, len(paths), math.ceil(len(paths) / _MOST_LABELS)))
    axes.set_xticks(ticks, [short(paths[tick] or MODEL) for tick in ticks], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(paths) - 0.3)


def short(path: str) -> str:
    """The end of a path that is too long for a label."""
    return path if len(path) <= _LONGEST_LABEL else "…" + path[1 - _LONGEST_LABEL :]
