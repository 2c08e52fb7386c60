"""Findings about inputs that are given as numbers: pixels, means, constant columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from varscale.auditing.findings import Finding
from varscale.auditing.maps import Map
from varscale.report import Report
from varscale.usage.parameters import ParameterUses

_LARGE = 100.0  # mean square from which on an input is too large for a first layer's law


def check_inputs(
    parameters: Sequence[ParameterUses], linear: Sequence[Map], report: Report, inputs: Sequence[tuple[str, object]]
) -> Iterator[Finding]:
    """Given inputs whose scale or mean is far from what a first layer expects.

    Args:
        parameters: the model's.
        linear: those that are random linear maps.
        report: the predicted rows; that of a first layer tells the mean square it reads, whatever the program does before.
        inputs: name and array of each.
    """
    first = [use for p in parameters for use in p.uses if use.reads_input and use.reduction_axes and use.role != "embedding"]
    if not first:
        return
    read = _read(linear, report)
    normed = all(use.normalised_after for use in first)
    as_it_is = any(use.input_scale == 1 and not use.before for use in first)
    for name, x in inputs:
        numbers = np.asarray(x)
        if numbers.dtype.kind not in "fui" or not numbers.size or (numbers.dtype.kind in "iu" and numbers.max() < 64):
            continue
        numbers = numbers.astype(np.float64)
        square, mean = float(np.mean(numbers**2)), float(np.mean(numbers))
        if square > _LARGE and (as_it_is if read is None else read > _LARGE):
            told = f"{name} has a mean square of {square:.4g}: the first layer's law expects about 1, so "
            told += "what it makes is" if normed else "everything after it is"
            told += f" {math.sqrt(square):.3g} times too large{', until the norm behind it' if normed else ''}."
            fix = "x = x / 255 - 0.5" if numbers.min() >= 0 and numbers.max() <= 255 else "x = (x - x.mean(0)) / x.std(0)"
            yield Finding("VS119", "info" if normed else "warning", "", told, square, fix)
        elif mean**2 > 0.9 * square > 0 and as_it_is:
            told = (
                f"{name} has mean {mean:.3g} and mean square {square:.3g}: nearly all of it is a constant, which samples share."
            )
            yield Finding("VS119", "info", "", told, mean, "x = (x - x.mean(0)) / x.std(0)")
        if numbers.ndim == 2 and numbers.shape[0] >= 8 and (constant := int(np.sum(np.ptp(numbers, axis=0) == 0))):
            told = f"{constant} of the {numbers.shape[1]} columns of {name} are constant: they tell samples nothing apart."
            yield Finding("VS119", "info", "", told, float(constant), "x = x[:, x.std(0) > 0]")


def _read(linear: Sequence[Map], report: Report) -> float | None:
    """The largest mean square that a first layer reads, from what it puts out; None where no row tells."""
    rows = {row.path: row for row in report.rows}
    found = [
        row.second_moment / (m.use.fan_in * m.second_moment)
        for m in linear
        if m.use.reads_input and (row := rows.get(m.path.rpartition("/")[0])) is not None and row.second_moment < math.inf
    ]
    return max(found, default=None)
