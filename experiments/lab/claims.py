"""A claim: a sentence, what its source leads one to expect, what was measured, and the verdict that follows.

The rule is the same for every claim. What is expected is a band of values, fixed in the source before the run; what is measured
is an estimate with a confidence interval over seeds. The claim

* holds where the whole interval lies in the band,
* does not hold where the whole interval lies outside it (or the measurement is not a number),
* is inconclusive otherwise: the measurement is too coarse to tell, and `Claim.to_decide` says what would decide it.

An inconclusive claim fails the run, unless the user gave data of their own or fewer seeds than the claims need. Build the two
sides with the functions below, and name the quantity that is measured, with its unit:

    Claim("the log-norm grows by the Lyapunov exponent", near(0.558, 0.005, source="Newman 1986"), over_seeds(slopes),
          unit="ln a step")
    Claim("He keeps the signal through 30 layers", at_least(0.5, source="He et al. 2015, section 2.2"), over_seeds(ratios),
          unit="E[y²] over the input's")
    Claim("hidden units stay equal, to the bit", exactly(0.0, source="symmetry"), known(largest), unit="largest difference")

Where the data refutes a statement of lecture notes, the claim says so, and it is the refutation that is checked:

    Claim("at width 4, 1/sqrt(n) does not keep the norm", at_most(-0.1, source=...), over_seeds(slopes), unit="ln a step",
          refutes=Refuted("scaling by 1/sqrt(n) keeps the norm at any width", "The typical draw is below the mean.", by=D2L))
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Verdict = Literal["holds", "does not hold", "inconclusive"]

LEVEL = 0.99  # of every confidence interval: a report has some hundred of them
MOST_SEEDS = 1e6  # more than anyone will run


@dataclass(frozen=True)
class Expected:
    """The band of values a claim allows, and who says so."""

    low: float
    high: float
    source: str
    centre: float | None = None

    def __str__(self) -> str:
        if self.low == self.high:
            return f"= {number(self.low)}"
        if self.centre is not None:
            return f"{number(self.centre)} ± {number(self.high - self.centre)}"
        if math.isinf(self.high):
            return f"≥ {number(self.low)}"
        if math.isinf(self.low):
            return f"≤ {number(self.high)}"
        return f"{number(self.low)} to {number(self.high)}"


def near(value: float, tolerance: float, *, source: str) -> Expected:
    """Expect `value`, give or take `tolerance` (absolute)."""
    return Expected(value - tolerance, value + tolerance, source, centre=value)


def between(low: float, high: float, *, source: str) -> Expected:
    """Expect a value from `low` to `high`."""
    return Expected(low, high, source)


def at_least(value: float, *, source: str) -> Expected:
    """Expect `value` or more."""
    return Expected(value, math.inf, source)


def at_most(value: float, *, source: str) -> Expected:
    """Expect `value` or less."""
    return Expected(-math.inf, value, source)


def exactly(value: float, *, source: str) -> Expected:
    """Expect `value` itself: for what is equal to the bit, or counted."""
    return Expected(value, value, source)


@dataclass(frozen=True)
class Measured:
    """An estimate with its confidence interval; `seeds` is how many independent draws it rests on (0: nothing random)."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.low == self.high == self.value:
            return number(self.value)
        if self.seeds == 1:
            return "one seed, no interval" if math.isnan(self.value) else f"{number(self.value)} (one seed, no interval)"
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"

    @property
    def half_width(self) -> float:
        """Half the interval's width; of one that is cut off at a limit of the quantity, the longer of its two sides."""
        return max(self.value - self.low, self.high - self.value)


def over_seeds(values: ArrayLike, *, within: tuple[float, float] = (-math.inf, math.inf)) -> Measured:
    """The mean of one value a seed, with Student's t interval. One seed alone gives an interval without bounds.

    Args:
      values: shape (seeds,). For a quantity that spreads over decades, give its logarithm.
      within: the limits of the quantity, where the interval is cut off: (0, 1) for an accuracy.
    """
    draws = np.asarray(values, np.float64).ravel()
    if not draws.size:
        raise ValueError("over_seeds: values is empty; give one value a seed")
    mean = float(draws.mean())
    if not np.isfinite(draws).all():
        return Measured(mean, math.nan, math.nan, draws.size)
    if draws.size == 1:
        return Measured(mean, *within, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, draws.size - 1) * draws.std(ddof=1) / math.sqrt(draws.size))
    return Measured(mean, max(mean - half, within[0]), min(mean + half, within[1]), draws.size)


def accuracy(values: ArrayLike) -> Measured:
    """The mean accuracy (or error rate) of one value a seed: its interval ends at 0 and at 1."""
    return over_seeds(values, within=(0.0, 1.0))


def share(successes: int, trials: int) -> Measured:
    """A proportion of independent trials, with the interval of Clopper and Pearson (1934)."""
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return Measured(successes / trials, low, high, trials)


def known(value: float) -> Measured:
    """A measurement without chance in it: a deterministic computation, a maximum over everything that was run."""
    return Measured(float(value), float(value), float(value), 0)


@dataclass(frozen=True)
class Refuted:
    """A statement that the data refutes: why it fails, and `by` whom it is said (the lecture notes or the paper)."""

    statement: str
    reason: str
    by: str


@dataclass(frozen=True)
class Claim:
    """A sentence that the measurement bears out or not; its verdict follows from the two sides.

    Attributes:
      sentence: what is claimed.
      expected: the band.
      measured: the estimate.
      unit: the quantity on both sides, with its unit: "nats", "ln a layer", "ratio of standard deviations".
      refutes: the statement that this claim refutes, if any.
    """

    sentence: str
    expected: Expected
    measured: Measured
    unit: str = field(kw_only=True)
    refutes: Refuted | None = field(default=None, kw_only=True)

    @property
    def verdict(self) -> Verdict:
        low, high = self.measured.low, self.measured.high
        if math.isnan(low) or math.isnan(high):
            return "does not hold"
        if self.expected.low <= low and high <= self.expected.high:
            return "holds"
        return "does not hold" if high < self.expected.low or low > self.expected.high else "inconclusive"

    @property
    def holds(self) -> bool:
        return self.verdict == "holds"

    @property
    def margin(self) -> float:
        """How far inside the band the interval's nearer end lies, in half-widths of the interval; below 0 it is outside."""
        low, high = self.measured.low, self.measured.high
        room = min(low - self.expected.low, self.expected.high - high)
        if math.isnan(room):
            return -math.inf
        half = (high - low) / 2
        if math.isinf(half):
            return -math.inf
        return room / half if half else math.copysign(math.inf, room)

    @property
    def to_decide(self) -> str:
        """What would decide an inconclusive claim; empty where the claim is decided."""
        if self.verdict != "inconclusive":
            return ""
        measured = self.measured
        if measured.seeds < 2:
            return "2 seeds or more would give an interval"
        distance = min(abs(limit - measured.value) for limit in (self.expected.low, self.expected.high))
        # The half-width is t·s/√seeds; with many seeds Student's t is the normal quantile.
        spread = measured.half_width / float(stats.t.ppf((1 + LEVEL) / 2, measured.seeds - 1))
        wanted = measured.seeds * (float(stats.norm.ppf((1 + LEVEL) / 2)) * spread / distance) ** 2 if distance else math.inf
        if wanted > MOST_SEEDS:
            return f"no practical number of seeds would: the estimate lies within {number(distance)} of the limit"
        step = 10 ** max(0, math.floor(math.log10(wanted)) - 1)  # two digits: the estimate is no better
        count = max(measured.seeds + 1, math.ceil(wanted / step) * step)
        return f"about {count} seeds would, if the mean stays (here: {measured.seeds})"

    def to_record(self) -> dict[str, Any]:
        """The claim as JSON has it: no infinities, which JSON cannot say (absent bounds are null)."""
        record: dict[str, Any] = {
            "sentence": self.sentence,
            "verdict": self.verdict,
            "unit": self.unit,
            "expected": {
                "text": str(self.expected),
                "low": _finite(self.expected.low),
                "high": _finite(self.expected.high),
                "centre": self.expected.centre,
                "source": self.expected.source,
            },
            "measured": {
                "text": str(self.measured),
                "value": _finite(self.measured.value),
                "low": _finite(self.measured.low),
                "high": _finite(self.measured.high),
                "seeds": self.measured.seeds,
            },
        }
        if self.to_decide:
            record["to_decide"] = self.to_decide
        if self.refutes is not None:
            record["refutes"] = asdict(self.refutes)
        return record


def every(
    sentence: str, cases: Iterable[tuple[str, Expected, Measured]], *, unit: str, refutes: Refuted | None = None
) -> Claim:
    """One claim over many cases (layers, settings): it stands with its weakest case, which is the one that is shown.

    Args:
      sentence: what is claimed of every case.
      cases: (label, expected, measured) of each.
      unit: of all cases.
      refutes: the statement that this claim refutes, if any.

    Raises:
      ValueError: there are no cases.
    """
    order: Sequence[Verdict] = ("does not hold", "inconclusive", "holds")
    claims = [(label, Claim(sentence, expected, measured, unit=unit)) for label, expected, measured in cases]
    if not claims:
        raise ValueError(f"every: no cases given for {sentence!r}")
    label, weakest = min(claims, key=lambda entry: (order.index(entry[1].verdict), entry[1].margin))
    sentence = f"{sentence} ({label})" if len(claims) == 1 else f"{sentence} (weakest of {len(claims)}: {label})"
    return Claim(sentence, weakest.expected, weakest.measured, unit=unit, refutes=refutes)


def number(value: float) -> str:
    """Four significant digits, no trailing zeros."""
    if not math.isfinite(value):
        return {True: "not a number", False: "∞" if value > 0 else "−∞"}[math.isnan(value)]
    text = f"{value:.4g}"
    return "0" if text == "-0" else text.replace("-", "−")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
