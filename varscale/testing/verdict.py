"""What a test found: a `Verdict`, which says what was claimed, what was measured, and what the measurement could have
seen.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

PARTS = 16
"""The error budget of every claim is split among this many parts, used or not, so that stating more about an initializer
(its law, say) leaves the power of the other parts as it was."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one part of a claim.

    Attributes:
        name: which part, such as `"second_moment"` or `"mean"`.
        log_p: natural logarithm of its p-value before the correction for their number; −inf where an equality is violated.
        says: what was measured, beside what was claimed.
        open: whether the number measured is off by more than a factor of 2, yet from so few weights that chance explains it.
    """

    name: str
    log_p: float
    says: str
    open: bool = False


def equality(name: str, holds: bool, says: str) -> Finding:
    """A part that is not a matter of chance: it holds or it does not."""
    return Finding(name, 0.0 if holds else -math.inf, says)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a test of a variance claim.

    Attributes:
        claim: the claim in words.
        ratio: measured second moment over claimed second moment (1 where both are zero); NaN where no number could be had.
        confidence_interval: the ratios that the measurement leaves open, at confidence `1 − alpha / PARTS`.
        p_value: of the whole claim: the smallest p-value of its parts times `PARTS` (Bonferroni), at most 1.
        samples: how many numbers the second moment was measured from.
        detectable_ratio: the smallest variance ratio that this test reveals with probability `1 − beta`.
        detectable_mean: likewise the smallest common mean, in standard deviations; NaN where no mean is claimed.
        alpha: the false-alarm rate of the whole claim.
        beta: the rate of misses at the detectable sizes.
        findings: one `Finding` a part, each judged at `alpha / PARTS`.
        mean: measured mean of the weights, in standard deviations of the claim; NaN where no mean is claimed.
        hints: usual mistakes that explain a refuted ratio or mean.
        blind: what the profile of the test cannot see, in words.
    """

    claim: str
    ratio: float
    confidence_interval: tuple[float, float]
    samples: int
    detectable_ratio: float
    alpha: float
    beta: float
    findings: tuple[Finding, ...]
    detectable_mean: float = math.nan
    mean: float = math.nan
    hints: tuple[str, ...] = ()
    blind: str = ""

    @property
    def log_p_value(self) -> float:
        """Natural logarithm of `p_value`, for p-values below the smallest double."""
        return min([0.0, *(finding.log_p + math.log(PARTS) for finding in self.findings)])

    @property
    def p_value(self) -> float:
        """Of the whole claim; uniform or conservative where the claim is true."""
        return math.exp(self.log_p_value)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the parts that do not hold, most damning first."""
        level = math.log(self.alpha / PARTS)
        broken = sorted((finding.log_p, finding.name) for finding in self.findings if finding.log_p <= level)
        return tuple(name for _, name in broken)

    @property
    def holds(self) -> bool:
        """Whether no part of the claim was refuted."""
        return not self.failed

    def and_also(self, findings: tuple[Finding, ...]) -> Verdict:
        """The verdict with more parts, put first."""
        return dataclasses.replace(self, findings=(*findings, *self.findings))

    def __str__(self) -> str:
        low, high = self.confidence_interval
        failed = self.failed
        lines = [
            f"{'refuted: ' + ', '.join(failed) if failed else 'holds'} | {self.claim}",
            f"  ratio {self.ratio:.6g}, interval [{low:.6g}, {high:.6g}], p = {_power_of_ten(self.log_p_value)}, "
            f"{self.samples} samples",
            f"  false alarms {self.alpha:g}, misses {self.beta:g} at a ratio of {self.detectable_ratio:.4g}"
            + ("" if math.isnan(self.detectable_mean) else f" or a mean of {self.detectable_mean:.3g} std"),
        ]
        for finding in self.findings:
            mark = "✗" if finding.name in failed else "○" if finding.open else "✓"
            lines.append(f"  {mark} {finding.name}: {finding.says} (p = {_power_of_ten(finding.log_p)})")
        if any(finding.open and finding.name not in failed for finding in self.findings):
            lines.append("  ○: off by more than a factor of 2, which chance explains: too few numbers to tell")
        lines += [f"  hint: {hint}" for hint in self.hints]
        lines += [f"  cannot see: {self.blind}"] if self.blind and not failed else []
        return "\n".join(lines)


def _power_of_ten(log_p: float) -> str:
    if log_p == -math.inf:
        return "0"
    if log_p > -600:
        return f"{math.exp(log_p):.2g}"
    return f"1e{log_p / math.log(10):.0f}"


def demand(verdict: Verdict) -> Verdict:
    """The verdict itself where it holds.

    Raises:
        AssertionError: it does not hold; the message is the verdict in words, and `error.verdict` the verdict.
    """
    __tracebackhide__ = True  # pytest shows the test, not the library
    if verdict.holds:
        return verdict
    error = AssertionError(str(verdict))
    error.verdict = verdict  # pyright: ignore[reportAttributeAccessIssue]
    raise error
