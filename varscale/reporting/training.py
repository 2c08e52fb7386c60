"""Statistics of a training run by step and depth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from varscale.reporting.folding import MODEL
from varscale.reporting.plots import pyplot, short, style

_ALARM = "#d62728"
_MOST_LABELS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One statistic.

    Attributes:
        title: its name.
        paths: the rows from the input to the output; one of a statistic without depth.
        values: by row and step.
    """

    title: str
    paths: tuple[str, ...]
    values: Float[np.ndarray, "rows steps"]

    @property
    def is_constant(self) -> bool:
        """Whether it is the same number at every row and step, such as a share of zeros that is zero."""
        return bool(np.isfinite(self.values).all() and np.ptp(self.values) == 0)


def training_plot(steps: Int[np.ndarray, " steps"], panels: Sequence[Panel]) -> Any:
    """A picture of each statistic: depth downwards, steps to the right, the value as a color; of one row a line.

    Args:
        steps: the step of each column.
        panels: the statistics.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not len(steps) or not panels:
        raise ValueError("there are no records to plot")
    plt = pyplot()
    heights = [0.12 if panel.is_constant else min(max(1.6, 0.16 * len(panel.paths)), 6.0) for panel in panels]
    figure, grid = plt.subplots(
        len(panels),
        1,
        squeeze=False,
        sharex=True,
        figsize=(8.5, sum(heights) + 0.7 * len(panels) + 0.4),
        height_ratios=heights,
        layout="constrained",
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        title = panel.title
        if panel.is_constant:
            title += f": {panel.values.flat[0]:.3g} at every row and step"
            axes.set_yticks([])
        elif len(panel.paths) == 1:
            _line(axes, steps, panel)
        else:
            _image(figure, axes, steps, panel)
        axes.set_title(title, loc="left", fontsize=9)
    grid[-1, 0].set_xlabel("step")
    return figure


def _line(axes: Any, steps: Int[np.ndarray, " steps"], panel: Panel) -> None:
    values = panel.values[0]
    axes.plot(steps, np.where(np.isfinite(values), values, np.nan), marker=".", color="#1f5fa8", linewidth=1.2)
    for step in steps[~np.isfinite(values)]:
        axes.axvline(step, color=_ALARM, alpha=0.5)
    if _is_log(panel.values):
        axes.set_yscale("log")
    style(axes, short(panel.paths[0]))


def _image(figure: Any, axes: Any, steps: Int[np.ndarray, " steps"], panel: Panel) -> None:
    from matplotlib import colormaps, colors

    finite = panel.values[np.isfinite(panel.values)]
    palette = colormaps["viridis"].with_extremes(bad=_ALARM, under="#000000")
    if _is_log(panel.values):
        low, high = _span(finite[finite > 0])
        norm = colors.LogNorm(low, high)
        values = np.where(panel.values == 0, low / 10, panel.values)  # a zero is black, not red
    else:
        norm, values = colors.Normalize(*_span(finite)), panel.values
    image = axes.pcolormesh(
        _edges(steps), np.arange(len(panel.paths) + 1) - 0.5, np.ma.masked_invalid(values), norm=norm, cmap=palette
    )
    axes.invert_yaxis()
    ticks = list(range(0, len(panel.paths), math.ceil(len(panel.paths) / _MOST_LABELS)))
    axes.set_yticks(ticks, [short(panel.paths[tick] or MODEL) for tick in ticks], fontsize=6.5)
    figure.colorbar(image, ax=axes, pad=0.01)


def _is_log(values: Float[np.ndarray, "rows steps"]) -> bool:
    """Whether the values are positive and span more than a decade."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    return bool(len(positive) and finite.min() >= 0 and positive.max() > 10 * positive.min())


def _span(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Lowest and highest value, apart also where all are equal."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - abs(low) / 2 - 1e-12, high + abs(high) / 2 + 1e-12)


def _edges(steps: Int[np.ndarray, " steps"]) -> Float[np.ndarray, " steps+1"]:
    """Borders between the columns, half way between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middle[0] - steps[0])], middle, [steps[-1] + (steps[-1] - middle[-1])]])
