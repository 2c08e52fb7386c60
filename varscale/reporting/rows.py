"""The rows of a report: what is known of one module's output, and of one parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

How = Literal["exact", "quadrature", "sampled", "assumed", "measured"]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of the values of one array between edges; the values outside the edges are not counted.

    Attributes:
        counts: number of values in each of the n bins.
        edges: the n + 1 edges, ascending; the last bin includes its upper edge, as `numpy.histogram` has it.
    """

    counts: tuple[float, ...]
    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"edges must have one more element than counts, not {len(self.edges)} for {len(self.counts)} counts"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """Statistics of one module's output.

    A predicted row holds expectations over all elements and over initializations. A measured row (`how="measured"`) holds
    means over the elements of one array. A statistic that was not predicted or not measured is None.

    Attributes:
        path: module path joined with "/" as flax's capture gives it; the model itself is "".
        kind: class name of the module, or of the operation.
        shape: shape of the output.
        mean: E[x].
        second_moment: E[x²].
        variance: E[x²] − E[x]².
        typical: exp E[ln mean x²]: the mean square that a typical single initialization shows; None in a measured row.
        band: interval that holds the mean square of one initialization in 99 of 100 draws; None in a measured row.
        sample_correlation: E[x x'] / E[x²] for the same unit in two different samples (first axis); None where there is one
            sample.
        position_correlation: likewise for two positions of one sample (axes between the first and the last).
        gradient: second moment of the loss gradient at this output; predicted for a cotangent of unit variance at the model's
            output, measured for the loss that was given.
        how: how second_moment was obtained; of a predicted row the worst of the steps that led to it.
        error_bound: bound on the relative error of second_moment.
        gradient_error_bound: bound on the relative error of gradient.
        dtype: name of the output's dtype.
        largest_magnitude: max |x|.
        zero_share: share of elements that are exactly zero.
        nonfinite_share: share of elements that are NaN or infinite.
        overflow_share: share of elements at the overflow end of the output's own dtype.
        underflow_share: share of elements at its underflow end.
        channel_mean_squared: mean over the channels (last axis) of (mean of the channel)².
        dead_share: share of the units (last axis) that are zero over the whole batch.
        saturated_share: share of elements in the saturated range of a bounded activation.
        kurtosis: E[(x − E[x])⁴] / Var[x]²; 3 for a Gaussian.
        histogram: counts of the values.
        gradient_nonfinite_share: share of elements of the gradient that are NaN or infinite.
        custom: results of the caller's own reducers, by name.
        measured: of `predict(draws=n)`: mean over n drawn networks of the mean square.
        measured_error: its standard error.
        holds: whether `second_moment` is as near to `measured` as `error_bound` and 4 standard errors say; where the
            logarithm of the networks' mean squares has a standard deviation above 1/2, whether `typical` is as near to its
            mean: rare networks rule the mean there.
        draws_in_band: share of the networks whose mean square lies in `band`.
        measured_gradient: mean over the networks of the mean squared gradient.
        measured_gradient_error: its standard error.
        gradient_holds: whether `gradient` is as near to it as `gradient_error_bound` says, likewise.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    second_moment: float
    variance: float
    typical: float | None = None
    band: tuple[float, float] | None = None
    sample_correlation: float | None = None
    position_correlation: float | None = None
    gradient: float | None = None
    how: How = "measured"
    error_bound: float = 0.0
    gradient_error_bound: float | None = None
    dtype: str | None = None
    largest_magnitude: float | None = None
    zero_share: float | None = None
    nonfinite_share: float | None = None
    overflow_share: float | None = None
    underflow_share: float | None = None
    channel_mean_squared: float | None = None
    dead_share: float | None = None
    saturated_share: float | None = None
    kurtosis: float | None = None
    histogram: Histogram | None = None
    gradient_nonfinite_share: float | None = None
    custom: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    measured: float | None = None
    measured_error: float | None = None
    holds: bool | None = None
    draws_in_band: float | None = None
    measured_gradient: float | None = None
    measured_gradient_error: float | None = None
    gradient_holds: bool | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """Statistics of one parameter: its law, the law its use asks for, and its measured gradient.

    What is not known is None.

    Attributes:
        path: parameter path joined with "/".
        shape: its shape.
        law: the declared law in words, such as "normal(std=0.0625)".
        mean: E[w].
        variance: Var[w].
        fan_in: inputs that meet in one output, as used: contraction, groups, stride and padding's coverage included; of several
            uses that with the most.
        fan_out: outputs that one input reaches, in that use.
        uses: how many times the forward pass applies it.
        ratio: variance that would keep the second moment from the map's input to its output, 1/fan_in whatever activation comes
            after, over the variance it has; None where it has none or is not applied as a linear map.
        dtype: name of its dtype.
        nonfinite_share: share of its elements that are NaN or infinite.
        gradient: second moment of the loss gradient of its elements.
        gradient_nonfinite_share: share of elements of that gradient that are NaN or infinite.
        gradient_ratio: ‖gradient‖ / ‖w‖, Euclidean norms.
    """

    path: str
    shape: tuple[int, ...]
    law: str | None = None
    mean: float | None = None
    variance: float | None = None
    fan_in: float | None = None
    fan_out: float | None = None
    uses: int = 0
    ratio: float | None = None
    dtype: str | None = None
    nonfinite_share: float | None = None
    gradient: float | None = None
    gradient_nonfinite_share: float | None = None
    gradient_ratio: float | None = None
