"""A test that may look after every sample: e-values, for runs that go on as long as the night."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from scipy import special


def log_e_value(sum_of_squares: float, count: float, prior_shape: float = 1.0) -> float:
    """Logarithm of the e-value of normal weights against the claim that their variance is 1.

    It is the likelihood of a gamma mixture over precisions, of shape and rate `prior_shape`, divided by the likelihood
    of the claim:
    a martingale of expectation 1 where the claim is true, so that it ever reaches `1/alpha` with probability at most `alpha`
    (Ville 1939; Ramdas, Grünwald, Vovk & Shafer, "Game-theoretic statistics and safe anytime-valid inference", 2023).

    Args:
        sum_of_squares: `Σw²/v₀`, of standardized weights.
        count: how many weights.
        prior_shape: the gamma mixture's shape `a`; larger looks for smaller deviations.

    Returns:
        `ln Eₙ` with `Eₙ = aᵃ Γ(a + n/2) e^{S/2} / (Γ(a) (a + S/2)^{a + n/2})`.

    Raises:
        ValueError: an argument is negative, or the shape not positive.
    """
    if not (sum_of_squares >= 0 and count >= 0 and prior_shape > 0):
        raise ValueError(
            "sum_of_squares and count must not be negative and prior_shape must be positive, "
            f"got {sum_of_squares!r}, {count!r}, {prior_shape!r}"
        )
    a, half = prior_shape, count / 2
    mixture = a * math.log(a) + special.gammaln(a + half) - special.gammaln(a) - (a + half) * math.log(a + sum_of_squares / 2)
    return float(mixture + sum_of_squares / 2)


@dataclasses.dataclass(frozen=True)
class SequentialVerdict:
    """The outcome of a sequential test.

    Attributes:
        refuted: whether the e-value reached `1/alpha`.
        samples: weights seen until then, or until they ended.
        ratio: their mean square over the claim's.
        log_e: the logarithm of the last e-value.
        alpha: the false-alarm rate, whenever one stops.
    """

    refuted: bool
    samples: int
    ratio: float
    log_e: float
    alpha: float


def sequential_test(
    batches: Iterable[Float[np.ndarray, "..."]], variance: float, *, alpha: float = 1e-9, prior_shape: float = 1.0
) -> SequentialVerdict:
    """Tests the variance of independent normal weights of mean 0 until it is refuted or the batches end.

    Args:
        batches: arrays of weights, drawn lazily if they come from a generator; the test looks after each.
        variance: the variance claimed, positive.
        alpha: the false-alarm rate of all looks together.
        prior_shape: see `log_e_value`.

    Raises:
        ValueError: `variance` is not positive, or `alpha` not in (0, 1).
    """
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"variance must be positive and finite, got {variance!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    squares, count, log_e = 0.0, 0, 0.0
    for batch in batches:
        values = np.asarray(batch, np.float64).reshape(-1)
        squares, count = squares + float(values @ values) / variance, count + values.size
        log_e = log_e_value(squares, count, prior_shape) if math.isfinite(squares) else math.inf
        if log_e >= -math.log(alpha):
            return SequentialVerdict(True, count, squares / count, log_e, alpha)
    return SequentialVerdict(False, count, squares / count if count else math.nan, log_e, alpha)
