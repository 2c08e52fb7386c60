"""The laws of the weights as they lie in memory: their distribution functions, and what rounding to few bits does to them.

A weight in bfloat16, float16 or float8 is a real number rounded once. Its second moment then differs from the claim by a
small amount that is known: about `ulp²/12` a weight where the grid is finer than the law, and anything at all below the
smallest subnormal. So the rounded law is written down exactly, value by value, instead of widening a tolerance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float
from scipy import special

from varscale.initializers import distributions
from varscale.testing.tails import Law, second_moment_of

_TRUNCATED_MASS = math.erf(math.sqrt(2))  # of a standard normal within ±2

_TAIL: dict[str, Callable[[Float[np.ndarray, "*n"]], Float[np.ndarray, "*n"]]] = {
    "normal": lambda z: special.ndtr(-z),
    "truncated_normal": lambda z: np.clip(
        (special.ndtr(-distributions.TRUNCATED_STD * z) - special.ndtr(-2.0)) / _TRUNCATED_MASS, 0, 1
    ),
    "uniform": lambda z: np.clip((1 - z / math.sqrt(3)) / 2, 0, 1),
    "rademacher": lambda z: np.where(z < 1, 0.5, 0.0),
}


def known_law(distribution: str | None) -> Law | None:
    """The law of that name; None stands for an unknown law.

    Raises:
        ValueError: no law has this name.
    """
    return None if distribution is None else distributions.distribution(distribution)


def upper_tail(law: Law, z: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """`P(weight > z)` of a standardized law, for `z ≥ 0`, accurate far out in the tail."""
    if isinstance(law, RoundedLaw):
        position = np.searchsorted(law.values, np.asarray(z), side="right")
        return np.append(np.cumsum(law.masses[::-1])[::-1], 0.0)[position] / 2
    return _TAIL[law.name](np.asarray(z, np.float64))


def cdf(law: Law, z: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """`P(weight ≤ z)` of a standardized law, where `z` is a value the law takes."""
    tail = upper_tail(law, np.abs(z))
    if isinstance(law, RoundedLaw):
        return np.where(z >= 0, 1 - tail, tail + _mass_at(law, np.abs(z)) / 2)
    return np.where(z >= 0, 1 - tail, tail)


def _mass_at(law: RoundedLaw, size: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    position = np.minimum(np.searchsorted(law.values, size, side="left"), len(law.values) - 1)
    return np.where(law.values[position] == size, law.masses[position], 0.0)


@dataclass(frozen=True, eq=False)
class RoundedLaw:
    """A symmetric law rounded to the nearest value of a floating-point format, in units of the unrounded standard deviation.

    Attributes:
        name: the name of the law that was rounded, with the format.
        values: the non-negative magnitudes it takes, rising; the weights are these with either sign.
        masses: the probability of each magnitude.
    """

    name: str
    values: Float[np.ndarray, " magnitudes"]
    masses: Float[np.ndarray, " magnitudes"]
    atoms = True

    @functools.cached_property
    def _moments(self) -> tuple[float, float]:
        """`E[z²]` and `E[z⁴]`."""
        return float(self.masses @ self.values**2), float(self.masses @ self.values**4)

    @property
    def second_moment(self) -> float:
        """`E[z²]`: 1, plus what rounding adds."""
        return self._moments[0]

    @property
    def kurtosis(self) -> float:
        """`E[z⁴]/E[z²]²`, infinite where every weight rounds to zero."""
        square, fourth = self._moments
        if np.count_nonzero(self.masses) == 1 and square:
            return 1.0  # exactly: the second moment is then an equality, not a statistic
        return fourth / square**2 if square else math.inf

    @property
    def bound(self) -> float:
        """The largest magnitude with positive probability."""
        return float(self.values[self.masses > 0][-1])

    @functools.cached_property
    def _squares(self) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
        """Squares with the logarithms of their probabilities, magnitudes below 1e-5 counted as 0: their share of `E[z²]` is
        below 1e-10.
        """
        near, far = self.values < 1e-5, (self.values >= 1e-5) & (self.masses > 0)
        zero = self.masses[near].sum()
        squares, masses = self.values[far] ** 2, self.masses[far]
        return (np.append(0.0, squares), np.log(np.append(zero, masses))) if zero > 0 else (squares, np.log(masses))

    def log_mgf(self, theta: float) -> float:
        """`ln E[exp(θz²)]`; see `varscale.testing.tails.Law`."""
        squares, log_masses = self._squares
        exponents = theta * squares + log_masses
        peak = float(exponents.max())
        return peak + math.log(float(np.exp(exponents - peak).sum()))


def is_low_precision(dtype: DTypeLike) -> bool:
    """Whether a real dtype has so few bits that rounding shows in the moments."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16


@functools.lru_cache(maxsize=256)
def stored(law: Law, deviation: float, dtype: DTypeLike) -> Law:
    """The law of `round(deviation · z)/deviation` in a storage dtype; a continuous law itself where 24 bits or more are kept.

    Args:
        law: the law of the standardized weight `z`.
        deviation: the standard deviation claimed, positive.
        dtype: bfloat16, float16 or a float8 or float4 format give a `RoundedLaw`.
    """
    if not is_low_precision(dtype):
        return RoundedLaw(law.name, np.ones(1), np.ones(1)) if law.kurtosis == 1 else law
    bits = jnp.finfo(dtype).bits
    codes = np.arange(2**bits, dtype=np.uint16 if bits == 16 else np.uint8)
    # Formats of fewer than 8 bits occupy a whole byte each in NumPy; their codes are its low bits.
    with np.errstate(invalid="ignore"):
        grid = codes.view(jnp.dtype(dtype)).astype(np.float64)
    grid = np.unique(np.abs(grid[np.isfinite(grid)]))
    edges = np.concatenate([(grid[:-1] + grid[1:]) / 2 / deviation, [math.inf]])
    beyond = np.concatenate([[1.0], 2 * upper_tail(law, edges[:-1]), [0.0]])
    return RoundedLaw(f"{law.name} in {jnp.dtype(dtype).name}", grid / deviation, beyond[:-1] - beyond[1:])


def rounded_second_moments(law: Law | None, deviation: float, dtype: DTypeLike) -> tuple[float, float]:
    """Smallest and largest `E[z²]` after storage: of the law as stored, or of an unknown law, over the continuous laws."""
    if law is not None:
        square = second_moment_of(law)
        return square, square
    if not is_low_precision(dtype):
        return 1.0, 1.0
    continuous = (each for each in distributions.DISTRIBUTIONS.values() if each.kurtosis > 1)
    squares = [second_moment_of(stored(each, deviation, dtype)) for each in continuous]
    return min(squares), max(squares)
