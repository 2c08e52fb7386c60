"""Do the weights follow the law that is claimed? Distribution function, extremes and bound, each with a proven error rate."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from varscale.testing.laws import cdf, upper_tail
from varscale.testing.tails import Law
from varscale.testing.verdict import Finding, equality


def distribution_function(values: Float[np.ndarray, " n"], law: Law, snap: float) -> Finding:
    """Largest distance of the empirical from the claimed distribution function.

    `P(sup |F_N − F| ≥ d) ≤ 2·exp(−2Nd²)` for any law, discrete ones included (Dvoretzky, Kiefer & Wolfowitz 1956, with
    the constant of Massart 1990).

    Args:
        values: standardized weights.
        law: the claimed law, rounded to the storage dtype where that shows.
        snap: relative width of the neighbourhood in which values count as equal to an atom of the law.
    """
    atoms = getattr(law, "values", None)
    unique, counts = np.unique(values if atoms is None else _snapped(values, atoms, snap), return_counts=True)
    below = np.cumsum(counts) / len(values)
    at = cdf(law, unique)
    distance = float(np.max(np.abs(below - at)))
    if atoms is None:
        # A continuous distribution function is compared on both sides of each step.
        distance = max(distance, float(np.max(np.abs(below - counts / len(values) - at))))
    says = f"distribution function off by {distance:.4g} from {law.name}, {len(values)} weights"
    return Finding("distribution", min(0.0, math.log(2) - 2 * len(values) * distance**2), says)


def _snapped(values: Float[np.ndarray, " n"], atoms: Float[np.ndarray, " m"], snap: float) -> Float[np.ndarray, " n"]:
    """Values that lie within a relative `snap` of an atom (arithmetic of the deviation, not of the law) put on it."""
    signed = np.concatenate([-atoms[::-1], atoms])
    right = np.clip(np.searchsorted(signed, values), 1, len(signed) - 1)
    nearest = np.where(values - signed[right - 1] < signed[right] - values, signed[right - 1], signed[right])
    return np.where(np.abs(values - nearest) <= snap * np.abs(nearest), nearest, values)


def extremes(values: Float[np.ndarray, " n"], law: Law, least: float, most: float) -> Finding:
    """The largest magnitude: `P(max |z| ≤ m) = (1 − P(|z| > m))^N`, which misses neither tails cut short nor tails too long.

    Args:
        values: standardized weights.
        law: the claimed law.
        least: smallest factor by which the scale of the weights may differ from the claim's.
        most: largest such factor.
    """
    largest = float(np.max(np.abs(values)))
    beyond, reaching = (2 * float(upper_tail(law, np.array([largest / factor]))[0]) for factor in (least, most))
    log_short = len(values) * math.log1p(-beyond) if beyond < 1 else -math.inf
    log_long = math.log(len(values) * reaching) if reaching else -math.inf
    log_p = min(0.0, math.log(2) + min(log_short, log_long))
    return Finding("extremes", log_p, f"largest weight {largest:.4g} standard deviations of {law.name}, {len(values)} weights")


def within_bound(largest: float, bound: float) -> Finding:
    """No weight exceeds the bound."""
    return equality("bound", largest <= bound, f"largest weight {largest:.6g}, at most {bound:.6g} claimed")
