"""Measured numbers as the rows and weights of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from varscale.measuring import selection
from varscale.measuring.instrument import Measured
from varscale.report import Report
from varscale.reporting.rows import Histogram, Row, Weight

AS_THEY_ARE = (  # statistics that a `Row` has under the same name
    "largest_magnitude",
    "zero_share",
    "nonfinite_share",
    "overflow_share",
    "underflow_share",
    "channel_mean_squared",
    "dead_share",
    "saturated_share",
    "sample_correlation",
    "position_correlation",
    "kurtosis",
)


def report(
    measured: Iterable[Measured], weights: Sequence[tuple[tuple[str, Any], Any]] = (), notes: tuple[str, ...] = ()
) -> Report:
    """The report of what was measured.

    Args:
        measured: rows in execution order.
        weights: of each parameter ((path, array), (mean, second moment, non-finite share, second moment of the gradient,
            non-finite share of the gradient)); without a gradient the first three.
        notes: what a reader must know beside the rows.
    """
    return Report(tuple(map(row, measured)), {path: _weight(path, x, numbers) for (path, x), numbers in weights}, notes)


def row(measured: Measured) -> Row:
    """The row of a report."""
    value, gradient = measured.value, measured.cotangent
    mean, second = float(value["mean"]), float(value["second_moment"])
    others: dict[str, Any] = {name: float(value[name]) for name in AS_THEY_ARE if name in value}
    return Row(
        path=measured.path,
        kind=measured.kind,
        shape=measured.shape,
        mean=mean,
        second_moment=second,
        variance=_variance(mean, second),
        dtype=measured.dtype,
        gradient=None if gradient is None else float(gradient["second_moment"]),
        gradient_nonfinite_share=None if gradient is None else float(gradient["nonfinite_share"]),
        histogram=_histogram(value),
        custom=selection.custom(value),
        **others,
    )


def _variance(mean: float, second: float) -> float:
    return second - mean * mean if not np.isfinite(second) else max(second - mean * mean, 0.0)


def _histogram(value: Mapping[str, Any]) -> Histogram | None:
    edges = value.get("histogram_edges")
    if edges is None or not np.all(np.isfinite(edges)):
        return None
    return Histogram(tuple(map(float, value["histogram_counts"])), tuple(map(float, edges)))


def _weight(path: str, x: Any, numbers: Sequence[Any]) -> Weight:
    mean, second, nonfinite, *of_gradient = map(float, numbers)
    gradient, gradient_nonfinite = of_gradient or (None, None)
    ratio = None
    if gradient is not None:
        ratio = float(np.sqrt(gradient / second)) if second else float("inf") if gradient else 0.0
    return Weight(
        path,
        tuple(np.shape(x)),
        mean=mean,
        variance=_variance(mean, second),
        dtype=str(x.dtype),
        nonfinite_share=nonfinite,
        gradient=gradient,
        gradient_nonfinite_share=gradient_nonfinite,
        gradient_ratio=ratio,
    )
