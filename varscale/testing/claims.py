"""What is claimed of the weights of an initializer, and the test of it on draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from varscale.testing import goodness, independence, moments
from varscale.testing.laws import is_low_precision, known_law, rounded_second_moments, stored
from varscale.testing.moments import Resolution, Sums
from varscale.testing.power import Underpowered
from varscale.testing.profiles import FULL, Profile, profile_of
from varscale.testing.tails import Law, log_symmetric_sum
from varscale.testing.verdict import Finding, Verdict, equality

_CHUNK_ENTRIES, _HAAR_ENTRIES, _HAAR_DRAWS = 2**22, 2**20, 96
_BLOCK_DRAWS = 16


@dataclass(frozen=True)
class VarianceClaim:
    """A claim about the entries of a weight array.

    Attributes:
        second_moment: `E[w²]`; 0 claims that every weight is zero.
        mean: `E[w]`; where it is not zero, every other part concerns `w − mean`, whose second moment is `second_moment −
            mean²`.
        distribution: the law of the entries: `"normal"`, `"truncated_normal"` (at ±2 of its underlying standard
            deviation), `"uniform"`, `"rademacher"`; None claims none, and then only symmetry about the mean is assumed.
        bound: a magnitude that no weight exceeds; a `distribution` with a bound implies it.
        independent: the entries are independent and identically distributed, and so are draws of different keys.
        orthogonal_axis: the array, flattened to a matrix whose columns lie along this axis, has orthogonal rows or
            columns (whichever are fewer) of equal length. An equality, not a statistic; independence is then not claimed.
        words: the claim in words, for the verdict; by default they follow from the other attributes.
    """

    second_moment: float
    mean: float = 0.0
    distribution: str | None = None
    bound: float | None = None
    independent: bool = True
    orthogonal_axis: int | None = None
    words: str = field(default="", repr=False, compare=False)

    def __post_init__(self):
        for name in ("second_moment", "mean"):
            if not math.isfinite(value := getattr(self, name)) or (name == "second_moment" and value < 0):
                raise ValueError(f"{name} must be finite{' and not negative' * (name == 'second_moment')}, got {value!r}")
        if self.variance < -1e-12 * self.second_moment:
            raise ValueError(f"second_moment must be at least mean² = {self.mean**2!r}, got {self.second_moment!r}")
        if self.bound is not None and not self.bound >= 0:
            raise ValueError(f"bound must be None or not negative, got {self.bound!r}")
        known_law(self.distribution)

    def __str__(self) -> str:
        if self.words:
            return self.words
        parts = [f"variance {max(self.variance, 0.0):.6g}" if self.deviation else f"constant {self.mean:.6g}"]
        parts += [f"mean {self.mean:.6g}"] if self.mean and self.deviation else []
        parts += [self.distribution] if self.distribution else []
        parts += [f"at most {self.bound:.6g} large"] if self.bound is not None else []
        parts += [f"orthogonal with columns along axis {self.orthogonal_axis}"] if self.orthogonal_axis is not None else []
        return ", ".join(parts)

    @property
    def variance(self) -> float:
        """`E[w²] − E[w]²`."""
        return self.second_moment - self.mean**2

    @property
    def deviation(self) -> float:
        """Standard deviation claimed; 0 where the weights are claimed to be constant, whatever the rounding of `mean²`."""
        return math.sqrt(self.variance) if self.variance > 1e-12 * self.second_moment else 0.0

    def law(self, dtype: DTypeLike = jnp.float32) -> Law | None:
        """The law of the standardized weights as stored in a dtype."""
        law = known_law(self.distribution)
        if law is None or not self.deviation or jnp.issubdtype(dtype, jnp.complexfloating):
            return None
        return stored(law, self.deviation, dtype)

    def samples(self, resolution: Resolution, size: int, dtype: DTypeLike = jnp.float32) -> int:
        """How many weights the test of an initializer needs, for a kernel of `size` weights."""
        if not self.deviation:
            return 1
        if self.orthogonal_axis is not None:
            return min(_HAAR_DRAWS * size, _HAAR_ENTRIES)
        return resolution.samples(self.law(dtype))

    def check(
        self,
        weights: Shaped[np.ndarray, "replicates *shape"],
        *,
        profile: Profile | str = FULL,
        detectable_ratio: float | None = None,
        detectable_mean: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        contractions: tuple[tuple[int, ...], ...] = (),
    ) -> Verdict:
        """Tests the claim on given weights.

        Args:
            weights: independent draws of one kernel, stacked along a leading axis (one draw: shape `(1, ...)`), in the
                dtype they are stored in.
            profile: the error rates and detectable sizes: "full", "quick" or a `Profile`.
            detectable_ratio: the variance ratio that must be detected, above 1, in place of the profile's.
            detectable_mean: the mean that must be detected, in standard deviations, in place of the profile's.
            alpha: the false-alarm rate of the whole claim, in place of the profile's.
            beta: the rate of misses at the detectable sizes, in place of the profile's.
            contractions: axes of `weights` that a layer sums over together, for the test of independence.

        Returns:
            The verdict, whether it holds or not.

        Raises:
            Underpowered: the weights are too few for the rates and sizes asked.
            ValueError: an argument is outside its range, or there are no weights.

        Example:
            >>> weights = np.random.default_rng(0).normal(0.0, 0.5, (1, 1000, 1000))
            >>> VarianceClaim(0.25, distribution="normal").check(weights).holds
            True
        """
        __tracebackhide__ = True
        chosen = profile_of(profile).but(
            detectable_ratio=detectable_ratio, detectable_mean=detectable_mean, alpha=alpha, beta=beta
        )
        weights = np.asarray(weights)
        if not weights.size:
            raise ValueError(f"weights must not be empty, got shape {weights.shape}")
        words = f"{self}, in {weights.dtype} {weights.shape[1:]}, {len(weights)} draws"
        outcome = _Outcome(words, chosen)
        infinite = _not_finite(weights)
        outcome.add(equality("finite", not infinite, f"{infinite} of {weights.size} weights are not finite"))
        if infinite:
            return outcome.verdict(math.nan, (0.0, math.inf), weights.size, math.inf)
        if self.bound is not None:
            largest = float(np.max(np.abs(weights)).astype(np.float64))
            outcome.add(goodness.within_bound(largest, self.bound * (1 + _snap(weights.dtype))))
        if not self.deviation:
            return _constant(self, weights, outcome)
        if self.orthogonal_axis is not None:
            return _orthogonal(self, weights, outcome)
        return _random(self, weights, outcome, contractions)


class _Outcome:
    """Collects the findings of one test."""

    def __init__(self, words: str, profile: Profile):
        self.words, self.profile, self.findings = words, profile, []
        self.resolution = Resolution(profile.alpha, profile.beta, profile.detectable_ratio, profile.detectable_mean)

    def add(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def verdict(
        self,
        ratio: float,
        interval: tuple[float, float],
        samples: int,
        detectable_ratio: float,
        detectable_mean: float = math.nan,
        mean: float = math.nan,
    ) -> Verdict:
        rates, seen = (self.profile.alpha, self.profile.beta), (detectable_mean, mean)
        findings, blind = tuple(self.findings), self.profile.blind
        return Verdict(self.words, ratio, interval, samples, detectable_ratio, *rates, findings, *seen, blind=blind)


def _snap(dtype: np.dtype) -> float:
    """Relative error of a weight whose deviation went through a few roundings: four in float32 or more, one in fewer bits."""
    if is_low_precision(dtype):
        return float(jnp.finfo(dtype).eps)
    return 4 * float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _not_finite(weights: Shaped[np.ndarray, "..."]) -> int:
    return sum(int(np.sum(~np.isfinite(chunk))) for chunk in _chunks(weights.reshape(-1)))


def _constant(claim: VarianceClaim, weights: Shaped[np.ndarray, "..."], outcome: _Outcome) -> Verdict:
    """Every weight equals the mean; with a mean of 0, exactly."""
    distance = float(np.max(np.abs(_as_double(weights) - claim.mean)))
    says = f"largest distance from {claim.mean:.6g} is {distance:.6g}"
    outcome.add(equality("second_moment", distance <= _snap(weights.dtype) * abs(claim.mean), says))
    measured = float(np.mean(np.abs(_as_double(weights)) ** 2))
    ratio = 1.0 if measured == claim.second_moment else math.inf if not claim.second_moment else measured / claim.second_moment
    return outcome.verdict(ratio, (1.0, 1.0), weights.size, 1.0)


def _orthogonal(claim: VarianceClaim, weights: Shaped[np.ndarray, "replicates *shape"], outcome: _Outcome) -> Verdict:
    """`WᵀW` (or `WWᵀ`, whichever is smaller) is `g²·I` with `g² = E[w²]·max(m, n)`, and no entry prefers a sign over the
    draws.

    The tolerance is the rounding error: Householder QR in float32 or better is orthogonal to `max(m, n)·ε` (Higham,
    "Accuracy and Stability of Numerical Algorithms", 2002, theorem 19.4), and one rounding to storage moves an entry of
    the Gram matrix by at most its `ε` (Cauchy-Schwarz) and half a subnormal step an entry.
    """
    assert claim.orthogonal_axis is not None
    matrices = np.moveaxis(_as_double(weights), 1 + claim.orthogonal_axis % (weights.ndim - 1), -1)
    matrices = matrices.reshape(len(weights), -1, matrices.shape[-1])
    rows, columns = matrices.shape[1:]
    square = claim.second_moment * max(rows, columns)
    info = jnp.finfo(weights.dtype)
    computed = min(float(info.eps), float(jnp.finfo(jnp.float32).eps))
    step = float(info.smallest_subnormal) / math.sqrt(square)
    tolerance = (
        float(info.eps) + computed * max(rows, columns) + step * math.sqrt(max(rows, columns)) + step**2 * max(rows, columns)
    )
    error = 0.0
    for matrix in matrices:
        gram = matrix.conj().T @ matrix if columns <= rows else matrix @ matrix.conj().T
        error = max(error, float(np.max(np.abs(gram / square - np.eye(len(gram))))))
    outcome.add(
        equality(
            "orthogonal",
            error <= tolerance,
            f"Gram matrix over g² is off the identity by {error:.3g}, at most {tolerance:.3g} by rounding",
        )
    )
    ratio = float(np.mean(np.abs(matrices) ** 2)) / claim.second_moment
    outcome.add(equality("second_moment", abs(ratio - 1) <= tolerance, f"mean square is {ratio:.8g} of the claim, an equality"))
    parts = np.stack([np.real(matrices), np.imag(matrices)]) if np.iscomplexobj(matrices) else matrices[None]
    sums, norms = parts.sum(axis=1), np.sqrt(np.square(parts).sum(axis=1))
    score = float(np.max(np.divide(np.abs(sums), norms, out=np.zeros_like(sums), where=norms > 0)))
    log_p = min(0.0, float(log_symmetric_sum(score)) + math.log(sums.size))
    outcome.add(Finding("signs", log_p, f"an entry's mean over {len(weights)} draws is {score:.3g} standard errors from 0"))
    return outcome.verdict(ratio, (ratio - tolerance, ratio + tolerance), weights.size, 1 + tolerance)


def _random(
    claim: VarianceClaim,
    weights: Shaped[np.ndarray, "replicates *shape"],
    outcome: _Outcome,
    contractions: tuple[tuple[int, ...], ...],
) -> Verdict:
    __tracebackhide__ = True
    law = claim.law(weights.dtype)
    resolution, snap = outcome.resolution, _snap(weights.dtype)
    sums = _sums(claim, weights, moments.batches_needed(law, resolution.alpha))
    expected = rounded_second_moments(law, claim.deviation, weights.dtype)
    outcome.add(moments.second_moment(sums, law, snap, expected), moments.mean(sums))
    if claim.independent:
        block = _block(claim, weights, outcome.profile.entries)
        outcome.add(
            independence.output_second_moment(block, contractions), independence.autocorrelation(block),
            independence.paired_slices(block), *independence.homogeneity(block),
        )  # fmt: skip
    count = float(sums.counts.sum())
    low, high, detectable = resolution.of_ratio(law, sums.kurtosis, count)
    if law is not None and law.kurtosis == 1:
        # An equality leaves open what rounding does.
        low, high = low * (1 - 2 * snap), high * (1 + 2 * snap)
    spread = 1.0 if claim.independent else sums.spread
    smallest_mean = resolution.of_mean(count, spread)
    interval = (sums.ratio / high, sums.ratio / low)
    if law is not None:
        _follow(law, claim, weights, interval, outcome)
    center = float(sums.signed.sum() / count)
    verdict = outcome.verdict(sums.ratio, interval, int(count), detectable, smallest_mean, center)
    # A refutation stands whatever the power was; only an acquittal needs it.
    if verdict.holds and (detectable > resolution.ratio or smallest_mean > resolution.mean):
        needed = resolution.samples(law, sums.kurtosis, spread)
        shortage = resolution.shortage(int(count), law, sums.kurtosis, spread)
        message = f"{int(count)} samples are too few for the claim {verdict.claim}: {shortage}"
        raise Underpowered(message, allowed=int(count), needed=needed)
    return verdict


def _follow(
    law: Law, claim: VarianceClaim, weights: Shaped[np.ndarray, "..."], interval: tuple[float, float], outcome: _Outcome
) -> None:
    """The parts that a named law adds. They judge the law's form; its scale, which only the second moment judges, is
    left to its interval.
    """
    flat, snap = weights.reshape(-1), _snap(weights.dtype)
    values = _standardized(claim, flat[:: -(-flat.size // outcome.profile.entries)])
    least, most = min(1.0, math.sqrt(interval[0])) * (1 - snap), max(1.0, math.sqrt(interval[1])) * (1 + snap)
    outcome.add(goodness.distribution_function(values, law, snap), goodness.extremes(values, law, least, most))
    if math.isfinite(law.bound):
        largest = max(float(np.max(np.abs(_standardized(claim, chunk)))) for chunk in _chunks(flat))
        outcome.add(goodness.within_bound(largest, law.bound * most))
    if law.kurtosis > 1 and not is_low_precision(weights.dtype):
        outcome.add(independence.collisions(values))


def _as_double(weights: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return weights.astype(np.complex128 if np.iscomplexobj(weights) else np.float64)


def _standardized(claim: VarianceClaim, weights: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*real"]:
    """`(w − mean)/std` in float64; a complex weight is two real ones, along a new last axis, of half the variance each."""
    if np.iscomplexobj(weights):
        parts = np.stack([np.real(weights) - claim.mean, np.imag(weights)], axis=-1).astype(np.float64)
        return parts * (math.sqrt(2) / claim.deviation)
    return (weights.astype(np.float64) - claim.mean) / claim.deviation


def _chunks(flat: Shaped[np.ndarray, " n"]) -> Iterator[Shaped[np.ndarray, " m"]]:
    for start in range(0, len(flat), _CHUNK_ENTRIES):
        yield flat[start : start + _CHUNK_ENTRIES]


def _sums(claim: VarianceClaim, weights: Shaped[np.ndarray, "replicates *shape"], batches: int) -> Sums:
    def entries() -> Iterator[tuple[int, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        for batch, part in enumerate(np.array_split(weights.reshape(-1), batches)):
            for chunk in _chunks(part):
                values = _standardized(claim, chunk).reshape(-1)
                yield batch, values, np.square(values)

    def draws() -> Iterator[tuple[int, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        for batch, part in enumerate(np.array_split(weights, batches)):
            for one in part:
                values = _standardized(claim, one)
                yield batch, np.atleast_1d(values.mean()), np.atleast_1d(np.square(values).mean())

    return Sums.over(entries() if claim.independent else draws(), batches)


def _block(
    claim: VarianceClaim, weights: Shaped[np.ndarray, "replicates *shape"], entries: int
) -> Float[np.ndarray, "replicates *part"]:
    """The standardized weights, or of more than fit the budget a part: fewer draws, then fewer slices of the longest axis.

    Neighbours stay together in pairs, and the pairs are scattered.
    """
    generator = np.random.default_rng(0)
    while weights.size > entries:
        axis = 0 if len(weights) > _BLOCK_DRAWS else int(np.argmax(weights.shape))
        starts = 2 * np.sort(generator.permutation(weights.shape[axis] // 2)[: max(1, weights.shape[axis] // 4)])
        weights = np.take(weights, np.stack([starts, starts + 1], axis=1).reshape(-1), axis=axis)
    return _standardized(claim, weights)
