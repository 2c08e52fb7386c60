"""Second moment and mean of weights: the two parts of a claim that every claim has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from varscale.testing.power import detectable_mean, known_law_resolution, samples_for, unknown_law_resolution
from varscale.testing.tails import Law, batches_for, log_mean_square, log_symmetric_sum, log_unknown_law
from varscale.testing.verdict import PARTS, Finding, equality


@dataclass(frozen=True)
class Resolution:
    """What error rates and sizes a test is asked for.

    Attributes:
        alpha: the false-alarm rate of a whole claim.
        beta: the rate of misses at the detectable sizes.
        ratio: the variance ratio to detect, above 1; its inverse is detected too.
        mean: the common mean to detect, in standard deviations.
    """

    alpha: float
    beta: float
    ratio: float
    mean: float

    def of_ratio(self, law: Law | None, kurtosis: float, count: float) -> tuple[float, float, float]:
        """Acceptance region and detectable ratio of `count` weights, of a known law or of one with this kurtosis."""
        if law is None:
            return unknown_law_resolution(kurtosis, count, self.alpha / PARTS, self.beta)
        return known_law_resolution(law, count, self.alpha / PARTS, self.beta)

    def of_mean(self, count: float, spread: float = 1.0) -> float:
        """Detectable mean of `count` units whose mean weights have the standard deviation `spread`."""
        return spread * detectable_mean(count, self.alpha / PARTS, self.beta)

    def samples_for_mean(self, spread: float = 1.0) -> int:
        """How many units the detectable mean requires."""
        return math.ceil((self.of_mean(1, spread) / self.mean) ** 2)

    def samples_for_ratio(self, law: Law | None, kurtosis: float = 3.0) -> int:
        """How many units the detectable ratio requires; 1 for a law whose second moment is an equality."""
        return samples_for(lambda count: self.of_ratio(law, kurtosis, count), self.ratio, least=1)

    def samples(self, law: Law | None, kurtosis: float = 3.0, spread: float = 1.0) -> int:
        """How many units both sizes require."""
        for_mean = self.samples_for_mean(spread)
        return samples_for(lambda count: self.of_ratio(law, kurtosis, count), self.ratio, least=for_mean)

    def shortage(self, allowed: int, law: Law | None, kurtosis: float = 3.0, spread: float = 1.0) -> str:
        """Which of the two sizes asks for more units than are allowed, what these reveal, and what would do, in words."""
        for_ratio, for_mean = self.samples_for_ratio(law, kurtosis), self.samples_for_mean(spread)
        reveals, mean = self.of_ratio(law, kurtosis, allowed)[2], self.of_mean(allowed, spread)
        asked = [f"a mean of {self.mean:g} std asks for {for_mean}"] * (for_mean > allowed)
        asked += [f"a ratio of {self.ratio:g} asks for {for_ratio}"] * (for_ratio > allowed)
        mend = [f"detectable_mean={_rounded_up(mean):g}"] * (for_mean > allowed)
        # Beyond a factor of some hundreds nothing is worth detecting.
        mend += [f"detectable_ratio={_rounded_up(reveals):g}"] * (for_ratio > allowed and reveals < 100)
        return (
            f"{' and '.join(asked)} samples (alpha {self.alpha:g}, beta {self.beta:g}); {allowed} reveal a ratio of "
            f"{reveals:.4g} and a mean of {mean:.3g} std. Pass {' and '.join(mend)}, or allow more samples"
        )


def _rounded_up(size: float) -> float:
    """The next larger number of three digits."""
    step = 10.0 ** (math.floor(math.log10(size)) - 2)
    return math.ceil(size / step) * step


@dataclass(frozen=True)
class Sums:
    """Sums over disjoint batches of units: the unit is a weight, or a whole draw where the weights of a draw depend on
    each other.

    Attributes:
        counts: units in each batch.
        signed: sum of the unit's mean weight.
        signed_squares: sum of its square.
        squares: sum of the unit's mean square.
        fourths: sum of the square of that.
    """

    counts: Float[np.ndarray, " batches"]
    signed: Float[np.ndarray, " batches"]
    signed_squares: Float[np.ndarray, " batches"]
    squares: Float[np.ndarray, " batches"]
    fourths: Float[np.ndarray, " batches"]

    @classmethod
    def over(cls, units: Iterator[tuple[int, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]], batches: int) -> Sums:
        """Adds up `(batch, mean weights, mean squares)` chunk by chunk."""
        table = np.zeros((5, batches))
        for batch, signed, squares in units:
            table[:, batch] += [len(signed), signed.sum(), signed @ signed, squares.sum(), squares @ squares]
        return cls(*table)

    @property
    def ratio(self) -> float:
        """Mean square over all batches."""
        return float(self.squares.sum() / self.counts.sum())

    @property
    def spread(self) -> float:
        """Root mean square of the units' mean weights: 1 for single weights as claimed."""
        return math.sqrt(self.signed_squares.sum() / self.counts.sum())

    @property
    def kurtosis(self) -> float:
        """`1 + Var R·N` of the mean square `R` of `N` units, estimated: of single weights, their kurtosis."""
        square = self.ratio**2
        return max(1.0, float(self.fourths.sum() / self.counts.sum() / square)) if square else 1.0


def second_moment(sums: Sums, law: Law | None, snap: float, expected: tuple[float, float] = (1.0, 1.0)) -> Finding:
    """Mean square of standardized weights against what the claim expects of them as stored.

    Args:
        sums: of disjoint batches, at least `batches_needed` for an unknown law.
        law: the law claimed; None uses the log ratio of the batches.
        snap: relative rounding error of a weight, which bounds that of an equality.
        expected: the second moments that the rounding to storage may leave; of a known law both are the same number.
    """
    low, high = expected
    says = f"E[w²] is {sums.ratio:.6g} of the claim" + ("" if low == high == 1 else f", {low:.6g} to {high:.6g} after rounding")
    if law is not None and law.kurtosis == 1:
        return equality("second_moment", abs(sums.ratio / low - 1) <= 2 * snap, says)
    if law is not None:
        return Finding("second_moment", min(0.0, math.log(2) + min(log_mean_square(law, sums.ratio, sums.counts.sum()))), says)
    ratios = sums.squares / sums.counts
    if np.any(ratios <= 0):
        return Finding("second_moment", -math.inf, says)
    excess = sums.fourths / sums.counts / ratios**2 - 1
    # Units of equal magnitude have no scatter to judge a deviation by; what remains is rounding.
    errors = np.where(excess > 4 * snap**2, np.sqrt(np.maximum(excess, 0.0) / sums.counts), 2 * snap)
    excursions = np.log(ratios) - np.clip(np.log(ratios), math.log(low), math.log(high))
    return Finding("second_moment", log_unknown_law(excursions, errors), says)


def mean(sums: Sums) -> Finding:
    """Sum of standardized weights over the root of their sum of squares, for units of any symmetric laws."""
    norm = math.sqrt(sums.signed_squares.sum())
    score = abs(float(sums.signed.sum())) / norm if norm else 0.0
    center = float(sums.signed.sum() / sums.counts.sum())
    says = f"mean is {center:.3g} standard deviations from the claim, {score:.3g} standard errors"
    return Finding("mean", float(log_symmetric_sum(score)), says)


def batches_needed(law: Law | None, alpha: float) -> int:
    """Disjoint batches that `second_moment` needs at a claim's false-alarm rate."""
    return 1 if law is not None else batches_for(alpha / PARTS)
