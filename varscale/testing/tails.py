"""Tail probabilities of a mean square, each either exact or a proven upper bound, as natural logarithms.

`R` is the mean of `N` independent copies of `z²` with `E[z²] = 1`. A test that rejects when a probability below is at most
`alpha` has a false-alarm rate of at most `alpha`: that is what "conservative" means throughout this package.

* normal weights: `N·R ~ χ²_N`, exactly;
* any law whose moment-generating function is known: Chernoff, `ln P ≤ −N·I(r)` with `I(r) = sup_θ {θr − ln E[exp(θz²)]}`
  (Cramér 1938; Boucheron, Lugosi & Massart, "Concentration Inequalities", 2013, section 2.2);
* any law symmetric about zero: a sum divided by the root of its sum of squares has tails below 3.178 times the Gaussian's
  (Bentkus & Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables", Bernoulli 2015), and
  a mean of squares of such sums is bounded as a mean of `χ²₁` above, and by its fourth moment below (Maurer, JIPAM 2003);
* an unknown law: the logarithm of the ratio with an estimated kurtosis, which is calibrated down to `CALIBRATED_P` and is
  therefore asked no more than that: smaller levels are reached by the agreement of several disjoint batches.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

CALIBRATED_P = 1e-4
"""The smallest one-batch p-value at which the log-ratio statistic of an unknown law is trusted."""

_RADEMACHER_CONSTANT = 1 / (4 * special.ndtr(-math.sqrt(2)))  # 3.178, the best possible


class Law(Protocol):
    """A symmetric law of standardized weights, as `varscale.initializers.distributions` provides them."""

    @property
    def name(self) -> str: ...
    @property
    def kurtosis(self) -> float: ...
    @property
    def bound(self) -> float: ...
    def log_mgf(self, theta: float, /) -> float:
        """`ln E[exp(θz²)]`, `inf` where the expectation diverges."""
        ...


def rate(law: Law, ratio: float) -> float:
    """Cramér's rate function `I(r) = sup_θ {θr − ln E[exp(θz²)]}` of the mean square of a law.

    Args:
        law: the law of the standardized weights `z`.
        ratio: the mean square `r ≥ 0`.

    Returns:
        A float in `[0, inf]`: 0 at the law's own second moment, `inf` where no sample can fall, which for a continuous law
        includes both edges of its support. The supremum is found numerically; any value of `θ` gives a valid bound, so a
        numerical shortfall only makes the test more conservative.
    """
    if ratio < 0 or math.isnan(ratio):
        raise ValueError(f"ratio must be a non-negative number, got {ratio!r}")
    if law.kurtosis == 1:
        return 0.0 if ratio == second_moment_of(law) else math.inf
    if law.name == "normal":
        return math.inf if ratio in (0, math.inf) else (ratio - 1 - math.log(ratio)) / 2
    if ratio > law.bound**2 or (ratio in (0, law.bound**2) and not getattr(law, "atoms", False)):
        return math.inf
    sign = 1.0 if ratio > second_moment_of(law) else -1.0

    def negative(log_theta: float) -> float:
        theta = sign * math.exp(log_theta)
        value = theta * ratio - float(law.log_mgf(theta))
        return -value if math.isfinite(value) else 1e300

    found = optimize.minimize_scalar(negative, bounds=(-16.0, 25.0), method="bounded", options={"xatol": 1e-5})
    return max(0.0, -float(found.fun))  # pyright: ignore[reportAttributeAccessIssue]


def second_moment_of(law: Law) -> float:
    """`E[z²]`: 1 but for a law that was rounded."""
    return float(getattr(law, "second_moment", 1.0))


def log_chi_square(ratio: float, degrees: float) -> tuple[float, float]:
    """`ln P(χ²_k/k ≤ r)` and `ln P(χ²_k/k ≥ r)`: exact while a double holds them, beyond that the Chernoff bound."""
    bound = -degrees * (math.inf if ratio in (0, math.inf) else (ratio - 1 - math.log(ratio)) / 2)
    lower, upper = special.gammainc(degrees / 2, degrees * ratio / 2), special.gammaincc(degrees / 2, degrees * ratio / 2)
    return (
        math.log(lower) if lower > 1e-290 else min(bound, 0.0),
        math.log(upper) if upper > 1e-290 else min(bound, 0.0),
    )


def log_mean_square(law: Law, ratio: float, count: float) -> tuple[float, float]:
    """`ln P(R ≤ r)` and `ln P(R ≥ r)` for the mean square of `count` draws of a known law: exact or bounded above."""
    if law.name == "normal":
        return log_chi_square(ratio, count)
    exponent = -count * rate(law, ratio)
    return (exponent, 0.0) if ratio < second_moment_of(law) else (0.0, exponent)


def log_symmetric_sum(statistic: Float[np.ndarray, "*n"] | float) -> Float[np.ndarray, "*n"]:
    """`ln P(|S| ≥ s)` at most, for `S = Σw/√(Σw²)` of independent weights of any symmetric laws, two-sided."""
    size = np.abs(np.asarray(statistic, np.float64))
    return np.minimum(0.0, math.log(2 * _RADEMACHER_CONSTANT) + special.log_ndtr(-size))


def log_symmetric_squares(ratio: float, count: float) -> tuple[float, float]:
    """`ln P(R ≤ r)` and `ln P(R ≥ r)` at most, for `R` the mean of `count` independent `(Σw)²/Σw²` of symmetric weights.

    Given the magnitudes such a sum is a Rademacher sum of unit variance: sub-Gaussian, so its square has a moment-generating
    function below that of `χ²₁`, and its fourth moment is at most 3.
    """
    if ratio >= 1:
        return 0.0, -math.inf if ratio == math.inf else -count * (ratio - 1 - math.log(ratio)) / 2
    return -count * (1 - ratio) ** 2 / 6, 0.0


def log_bernstein(deviation, count, variance: float, span: float):
    """`ln P(mean − μ ≥ t)` at most, for `count` draws WITHOUT replacement from a finite population (Hoeffding 1963).

    Args:
        deviation: `t ≥ 0`; scalar or array.
        count: the sample size; scalar or array.
        variance: the population's variance.
        span: the largest deviation from the mean in the direction of `t`.
    """
    scale = 2 * (variance + span * deviation / 3)
    return -np.divide(count * deviation**2, scale, out=np.zeros_like(scale, dtype=np.float64), where=scale > 0)


def batches_for(alpha: float) -> int:
    """How many disjoint batches must agree for the log-ratio statistic to reach the two-sided level `alpha`."""
    return max(1, math.ceil(math.log(alpha / 2) / math.log(CALIBRATED_P) - 1e-9))


def log_unknown_law(log_ratios: Float[np.ndarray, " batches"], standard_errors: Float[np.ndarray, " batches"]) -> float:
    """Two-sided `ln p` of disjoint batches whose log ratios are asymptotically normal: all must lie on the same side.

    With `k` batches `P(every one-sided p ≤ t) = t^k`; each one-sided p-value is cut off at `CALIBRATED_P`.
    """
    scores = np.divide(
        log_ratios, standard_errors, out=np.where(np.abs(log_ratios) > 1e-6, np.inf, 0.0) * np.sign(log_ratios),
        where=standard_errors > 0,
    )  # fmt: skip
    sides = [float(np.max(np.maximum(special.log_ndtr(-sign * scores), math.log(CALIBRATED_P)))) for sign in (1, -1)]
    return min(0.0, math.log(2) + len(scores) * min(sides))
