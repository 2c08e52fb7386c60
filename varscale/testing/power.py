"""How many samples a claim needs, what a given number can see, and the interval that a measured ratio leaves open."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from scipy import optimize, special

from varscale.testing.tails import Law, batches_for, log_mean_square, second_moment_of


class Underpowered(ValueError):
    """The samples allowed cannot see the deviation asked for: the claim is neither confirmed nor refuted.

    Attributes:
        allowed: the samples allowed.
        needed: the samples that the error rates and the detectable ratio require.
    """

    def __init__(self, message: str, *, allowed: int, needed: int):
        super().__init__(message)
        self.allowed, self.needed = allowed, needed

    def __reduce__(self):
        return _underpowered, (str(self), self.allowed, self.needed)


def _underpowered(message: str, allowed: int, needed: int) -> Underpowered:
    return Underpowered(message, allowed=allowed, needed=needed)


def check_error_rates(alpha: float, beta: float) -> None:
    """Raises ValueError unless both error rates lie in (0, ½)."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < 0.5:
            raise ValueError(f"{name} must lie strictly between 0 and 0.5, got {value!r}")


def check_detectable(name: str, value: float, above: float) -> None:
    """Raises ValueError unless a detectable size is finite and larger than `above`."""
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} must be finite and larger than {above:g}, got {value!r}")


def plan_samples(alpha: float, beta: float, ratio: float, kurtosis: float = 3.0) -> int:
    """Smallest number of independent weights that tells a variance ratio from 1.

    Exact for normal weights (kurtosis 3), where `N·R ~ χ²_N`: the two-sided level-`alpha` test rejects both a variance
    `ratio` times the claim and one `1/ratio` times it with probability at least `1 − beta`. Since `Var R = (κ − 1)/N`,
    other laws need `(κ − 1)/2` times as many. To first order this is `(κ − 1)(z_{α/2} + z_β)²/(ln ρ)²`.

    Args:
        alpha: the false-alarm rate, two-sided, in (0, ½).
        beta: the rate of misses at `ratio`, in (0, ½).
        ratio: the variance ratio ρ to detect, positive and not 1; ρ and 1/ρ are the same request.
        kurtosis: `E[w⁴]/E[w²]²`, at least 1: normal 3, ±2σ truncated normal 2.36554, uniform 1.8, Rademacher 1.

    Returns:
        The number of weights; 1 for kurtosis 1, where the mean square is an equality.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> plan_samples(1e-9, 1e-6, 1.1)
        26087
    """
    check_error_rates(alpha, beta)
    if not (math.isfinite(ratio) and ratio > 0 and ratio != 1):
        raise ValueError(f"ratio must be positive, finite and different from 1, got {ratio!r}")
    if not (math.isfinite(kurtosis) and kurtosis >= 1):
        raise ValueError(f"kurtosis must be finite and at least 1, got {kurtosis!r}")
    if kurtosis == 1:
        return 1
    target = abs(math.log(ratio))
    first_order = 2 * ((_normal_quantile(alpha / 2) + _normal_quantile(beta)) / target) ** 2

    def excess(log_count: float) -> float:
        return math.log(_chi_square_detectable(math.exp(log_count), alpha, beta)) - target

    # At few degrees of freedom χ² is far from log-normal; the bracket is generous on both sides.
    low, high = math.log(max(first_order, 1e-2)) - 3, math.log(first_order + 1) + 4
    exact = math.exp(optimize.brentq(excess, low, high, xtol=1e-9))  # pyright: ignore[reportArgumentType]
    return max(1, math.ceil(exact * (kurtosis - 1) / 2 - 1e-6))


def _chi_square_detectable(degrees: float, alpha: float, beta: float) -> float:
    # `scipy.stats` calls the same functions, after checks that take longer than they do.
    lower, upper = (lambda p: 2 * special.gammaincinv(degrees / 2, p)), (lambda p: special.chdtri(degrees, p))
    return float(max(upper(alpha / 2) / max(lower(beta), 1e-300), upper(beta) / max(lower(alpha / 2), 1e-300)))


def _normal_quantile(tail: float) -> float:
    """Where `P(z > x)` is `tail`."""
    return -float(special.ndtri(tail))


Resolution = tuple[float, float, float]
"""The acceptance region `(low, high)` of a mean square, and the variance ratio detected with power `1 − beta`."""


def thresholds(log_tails: Callable[[float], tuple[float, float]], level: float, center: float = 1.0) -> tuple[float, float]:
    """The ratios `(low, high)` around `center` beyond which `log_tails(ratio)` gives a one-sided probability of at most
    `level`.
    """
    target, start = math.log(level), math.log(center)
    edges = []
    for side, step in ((0, -1e-4), (1, 1e-4)):

        def excess(shift: float, side: int = side) -> float:
            return max(log_tails(math.exp(start + shift))[side], -1e6) - target

        while excess(step) > 0 and abs(step) < 600:
            step *= 2
        far = abs(step) >= 600
        shift = step if far else optimize.brentq(excess, 0.0, step, xtol=1e-9)
        edges.append(math.exp(start + shift))  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    return edges[0], edges[1]


def resolution(log_tails: Callable[[float], tuple[float, float]], alpha: float, beta: float, center: float = 1.0) -> Resolution:
    """What a mean square with these log tails, and this expectation, resolves at level `alpha`."""
    low, high = thresholds(log_tails, alpha / 2, center)
    quantile_low, quantile_high = thresholds(log_tails, beta, center)
    return low, high, max(high / quantile_low, quantile_high / low) if low and quantile_low else math.inf


@functools.lru_cache(maxsize=512)
def known_law_resolution(law: Law, count: float, alpha: float, beta: float) -> Resolution:
    """What `count` weights of a known law resolve."""
    center = second_moment_of(law)
    if law.kurtosis == 1:
        return center, center, 1.0
    return resolution(lambda ratio: log_mean_square(law, ratio, count), alpha, beta, center)


def unknown_law_resolution(kurtosis: float, count: float, alpha: float, beta: float) -> Resolution:
    """As `known_law_resolution`, from an estimated kurtosis, by batches that must agree."""
    batches = batches_for(alpha)
    error = math.sqrt(max(kurtosis - 1, 0.0) * batches / count)
    width = _normal_quantile((alpha / 2) ** (1 / batches)) * error
    detectable = width + _normal_quantile(beta / batches) * error
    return math.exp(-width), math.exp(width), math.exp(min(detectable, 700.0))


def samples_for(resolve: Callable[[float], Resolution], ratio: float, least: int) -> int:
    """Smallest count, to a tenth of a percent and no less than `least`, whose resolution detects `ratio`."""
    if resolve(least)[2] <= ratio:
        return least
    low, high = float(least), 2.0 * least
    while resolve(high)[2] > ratio:
        low, high = high, 2 * high
    while high - low > max(1.0, 1e-3 * high):
        middle = (low + high) / 2
        low, high = (low, middle) if resolve(middle)[2] <= ratio else (middle, high)
    return math.ceil(high)


def detectable_mean(count: float, alpha: float, beta: float) -> float:
    """The common mean, in standard deviations, that `count` symmetric weights reveal with power `1 − beta`."""
    # The symmetric bound exceeds the Gaussian tail by 3.178: its threshold is the Gaussian's at a level so much smaller.
    return (_normal_quantile(alpha / 2 / 3.179) + _normal_quantile(beta)) / math.sqrt(count)
