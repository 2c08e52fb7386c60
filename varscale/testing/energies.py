"""Independent replicates of a mean square whose law is unknown: is their expectation 1?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from varscale.testing.power import Resolution, samples_for, unknown_law_resolution
from varscale.testing.profiles import FULL
from varscale.testing.tails import batches_for, log_unknown_law
from varscale.testing.verdict import PARTS, Finding, Verdict

LEAST = 256
"""Replicates to begin with, and as many as one compiled program makes."""

Energies = Float[np.ndarray, " replicates"]
Outcome = tuple[Energies, Finding, Callable[[float], Resolution]]


def mean_is_one(draw: Callable[[int], Energies], alpha: float, beta: float, ratio: float) -> Outcome:
    """Draws as many replicates as their scatter turns out to require, and tests their mean by the logarithm of its ratio
    to 1.

    Args:
        draw: from a count to so many fresh replicates, or a few more; called again with a larger count while the scatter
            asks for it.
        alpha: the false-alarm rate of this test.
        beta: the rate of misses at `ratio`.
        ratio: the ratio of expectations to detect.

    Returns:
        The replicates, the finding, and what any number of them resolves.
    """
    __tracebackhide__ = True
    batches, count = batches_for(alpha), LEAST
    while True:
        energies = draw(count)
        mean = float(energies.mean())
        kurtosis = 1 + float(energies.var()) / mean**2 if mean > 0 else 1.0

        def resolve(count: float, kurtosis: float = kurtosis) -> Resolution:
            return unknown_law_resolution(kurtosis, count, alpha, beta)

        parts = np.array_split(energies, batches)
        means = np.array([part.mean() for part in parts])
        if not np.all(means > 0):
            return energies, Finding("second_moment", -math.inf, "E[y²] is 0 or not a number"), resolve
        errors = np.array([part.std() / part.mean() / math.sqrt(len(part)) for part in parts])
        # Where nothing scatters, what is left is the rounding of float32.
        log_p = log_unknown_law(np.log(means), np.maximum(errors, 1e-6))
        says = f"E[y²] is {mean:.6g} of the claim, scatter {math.sqrt(kurtosis - 1):.3g} a replicate"
        # A refutation stands whatever the power was; only an acquittal needs it.
        if log_p <= math.log(alpha) or resolve(len(energies))[2] <= ratio:
            return energies, Finding("second_moment", log_p, says), resolve
        needed = samples_for(resolve, ratio, least=count)
        count = max(needed + needed // 8, count + 1)


def check_energies(
    draw: Callable[[int], Energies],
    *,
    detectable_ratio: float = FULL.detectable_ratio,
    alpha: float = FULL.alpha,
    beta: float = FULL.beta,
    claim: str = "E = 1",
) -> Verdict:
    """The verdict on the claim that independent replicates have expectation 1; see `mean_is_one`."""
    energies, finding, resolve = mean_is_one(draw, alpha / PARTS, beta, detectable_ratio)
    ratio, (low, high, detectable) = float(energies.mean()), resolve(len(energies))
    return Verdict(claim, ratio, (ratio / high, ratio / low), len(energies), detectable, alpha, beta, (finding,))
