"""A claim: a sentence, what its source leads one to expect, what was measured, and the verdict that follows.

The rule is the same for every claim. What is expected is a band of values, fixed in the source before the run; what is measured
is an estimate with a confidence interval over seeds. The claim

* holds where the whole interval lies in the band,
* does not hold where the whole interval lies outside it (or the measurement is not a number),
* is inconclusive otherwise: the measurement is too coarse to tell. That counts as a failure.

So a claim that holds has been given every chance to fail. Build the two sides with the functions below:

    Claim("the log-norm grows by the Lyapunov exponent", near(0.558, 0.005, source="maths, section 4"), over_seeds(slopes))
    Claim("He keeps the signal through 30 layers", at_least(0.5, source="He et al. 2015, section 2.2"), over_seeds(ratios))
    Claim("hidden units stay equal, to the bit", exactly(0.0, source="symmetry"), known(largest_difference))

A statement of the notes that the data refutes is recorded as such, and it is the refutation that is checked:

    Claim("at width 4, 1/sqrt(n) does not keep the norm", at_most(-0.1, source=...), over_seeds(slopes),
          refutes=Refuted("scaling the weights by 1/sqrt(n) keeps the norm at any width", "the typical draw is below the mean"))
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Verdict = Literal["holds", "does not hold", "inconclusive"]

LEVEL = 0.99  # of every confidence interval: a report has some hundred of them


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
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


def over_seeds(values: ArrayLike) -> Measured:
    """The mean of one value a seed, with Student's t interval. One seed alone gives an interval without bounds.

    Args:
      values: shape (seeds,). For a quantity that spreads over decades, give its logarithm.
    """
    draws = np.asarray(values, np.float64).ravel()
    if not draws.size:
        raise ValueError("over_seeds: values is empty; give one value a seed")
    mean = float(draws.mean())
    if not np.isfinite(draws).all():
        return Measured(mean, math.nan, math.nan, draws.size)
    if draws.size == 1:
        return Measured(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, draws.size - 1) * draws.std(ddof=1) / math.sqrt(draws.size))
    return Measured(mean, mean - half, mean + half, draws.size)


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
    """A statement of the notes that the data refutes, and why it fails."""

    statement: str
    reason: str


@dataclass(frozen=True)
class Claim:
    """A sentence that the measurement bears out or not; its verdict follows from the two sides."""

    sentence: str
    expected: Expected
    measured: Measured
    refutes: Refuted | None = None

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
        return room / half if half else math.copysign(math.inf, room)

    def to_record(self) -> dict[str, Any]:
        """The claim as JSON has it: no infinities, which JSON cannot say (absent bounds are null)."""
        record: dict[str, Any] = {
            "sentence": self.sentence,
            "verdict": self.verdict,
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
        if self.refutes is not None:
            record["refutes"] = {"statement": self.refutes.statement, "reason": self.refutes.reason}
        return record


def every(sentence: str, cases: Iterable[tuple[str, Expected, Measured]], *, refutes: Refuted | None = None) -> Claim:
    """One claim over many cases (layers, settings): it stands with its weakest case, which is the one that is shown.

    Args:
      sentence: what is claimed of every case.
      cases: (label, expected, measured) of each.
      refutes: the statement of the notes that this claim refutes, if any.
    """
    order: Sequence[Verdict] = ("does not hold", "inconclusive", "holds")
    claims = [(label, Claim(sentence, expected, measured, refutes)) for label, expected, measured in cases]
    if not claims:
        raise ValueError(f"every: no cases given for {sentence!r}")
    label, weakest = min(claims, key=lambda entry: (order.index(entry[1].verdict), entry[1].margin))
    return Claim(f"{sentence} (weakest of {len(claims)}: {label})", weakest.expected, weakest.measured, refutes)


def number(value: float) -> str:
    """Four significant digits, no trailing zeros."""
    if not math.isfinite(value):
        return {True: "not a number", False: "∞" if value > 0 else "−∞"}[math.isnan(value)]
    text = f"{value:.4g}"
    return "0" if text == "-0" else text.replace("-", "−")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
