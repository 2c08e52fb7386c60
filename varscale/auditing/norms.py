"""Findings about what stands between the maps: norms whose epsilon counts, softmaxes, and the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from scipy import stats

from varscale.auditing.findings import Finding
from varscale.report import Report, Row
from varscale.usage.parameters import ParameterUses

_LARGEST_EPSILON = 0.1  # what is added to a variance and is larger is no guard against division by zero
_COLLAPSED = 3.0  # deviations of scores from which on one key has most of the weight


def check_epsilon(rows: Sequence[Row]) -> Iterator[Finding]:
    """Norms whose epsilon is larger than the variance that it is added to.

    Args:
        rows: those of equations, in execution order.
    """
    for i, row in enumerate(rows):
        if row.kind not in ("rsqrt", "sqrt") or i == 0 or rows[i - 1].kind != "add":
            continue
        shifted = rows[i - 1].mean
        before = (r for r in rows[max(0, i - 8) : i - 1][::-1] if r.shape == row.shape and 0 < r.mean < shifted)
        read = next(before, None)  # the variance, which the epsilon was added to
        if read is None or read.error_bound > 0.5 or not read.mean < (epsilon := shifted - read.mean) < _LARGEST_EPSILON:
            continue
        left = read.mean / shifted
        told = f"it normalises a variance of {read.mean:.3g} with an epsilon of {epsilon:.3g}, which dominates: its output has "
        told += f"root mean square {math.sqrt(left):.3g} in place of 1."
        larger = 10 * math.sqrt(epsilon / read.mean)
        yield Finding(
            "VS111", "warning", _parent(row.path), told, left,
            f"scale what it reads by {larger:.2g} or more, or give it an epsilon below {read.mean / 10:.2g}",
        )  # fmt: skip


def check_softmax(rows: Sequence[Row]) -> Iterator[Finding]:
    """Softmaxes of scores so large that one key gets most of the weight.

    The mean of the largest of n scores of deviation s is s times that of n standard normals (Blom 1958).
    """
    for i, row in enumerate(rows):
        if row.kind != "reduce_max" or not row.shape:
            continue
        after = next((later for later in rows[i : i + 8] if later.kind == "exp"), None)
        if after is None or row.error_bound > 0.5:
            continue
        keys = math.prod(after.shape) / math.prod(row.shape)
        if keys < 2:
            continue
        deviation = row.mean / float(stats.norm.ppf((keys - 0.375) / (keys + 0.25)))
        if deviation > _COLLAPSED:
            told = f"its scores have a standard deviation of about {deviation:.3g} over {keys:.0f} keys: the softmax is nearly "
            told += "one-hot, and its gradient vanishes for all keys but one."
            yield Finding(
                "VS109", "warning", _parent(row.path), told, deviation, "divide the scores by the root of the head's width"
            )


def check_logits(parameters: Sequence[ParameterUses], report: Report) -> Iterator[Finding]:
    """Outputs of a readout that are too large for logits: the cross-entropy of C classes starts near ln C + E[y²]/2."""
    readouts = [p for p in parameters if any(use.role == "readout" for use in p.uses)]
    output = report.output
    if len(readouts) != 1 or not output.shape or output.shape[-1] < 10 or output.error_bound > 0.5:
        return
    classes, extra = output.shape[-1], output.second_moment / 2
    if extra > math.log(classes):
        told = f"its {classes} outputs have a second moment of {output.second_moment:.3g}: as logits they give a cross-entropy "
        told += (
            f"of about {math.log(classes) + extra:.3g} at step 0; knowing nothing gives ln {classes} = {math.log(classes):.3g}."
        )
        yield Finding(
            "VS110",
            "warning",
            readouts[0].path,
            told,
            math.log(classes) + extra,
            "multiply the logits by 1/√features, or draw the readout smaller",
        )


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
