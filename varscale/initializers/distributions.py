"""Unit-variance laws: what the entries of a weight array are drawn from, with what a statistician wants to know of each.

Each law carries its kurtosis, its bound and the log moment-generating function of z², from which `varscale.testing` takes
exact tails. Drawing mirrors `jax.nn.initializers` operation by operation, so that float32 and float64 give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Key

from varscale._compat import normal_scale, unscaled_normal
from varscale.initializers.sampling import OutSharding, Raw, drawn

DistributionName = Literal["normal", "truncated_normal", "uniform", "rademacher"]

# Standard deviation of a standard normal cut at ±2: √(1 − 4φ(2)/(2Φ(2) − 1)).
TRUNCATED_STD = 0.87962566103423978
# Root mean square modulus of a circular complex normal of unit variance cut at modulus 2: √(1 − 4e⁻⁴/(1 − e⁻⁴)).
COMPLEX_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-4) / (1 - math.exp(-4)))


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A symmetric law of mean 0 and variance 1.

    Attributes:
        name: as `variance_scaling` takes it.
        kurtosis: E[z⁴].
        bound: the largest |z|, infinite where there is none.
        log_mgf: θ ↦ ln E[exp(θ z²)], in float64; +inf beyond its domain.
    """

    name: DistributionName
    kurtosis: float
    bound: float
    log_mgf: Callable[[float], float] = dataclasses.field(repr=False, compare=False)

    def draw(
        self, key: Key[Array, ""], shape: Sequence[int], variance: float, dtype: np.dtype, out_sharding: OutSharding = None
    ) -> Inexact[Array, "*shape"]:
        """Entries of this law scaled to `variance`.

        Args:
            key: a PRNG key.
            shape: any shape.
            variance: of each entry; for complex dtypes E|w|².
            dtype: float32, float64, complex64 or complex128. (Lower precision is rounded from float32 by the caller.)
            out_sharding: layout of the result.
        """
        raw = self.raw(key, shape, dtype, out_sharding)
        # In NumPy: the same correctly rounded operations, without a dispatch to the device for each.
        return raw * self._recipe(dtype).scale(raw.dtype.type(variance))

    def raw(
        self, key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype, out_sharding: OutSharding = None
    ) -> Inexact[Array, "*shape"]:
        """Entries as they are drawn, before scaling: N(0, 1) up to `normal_scale`, N(0, 1) cut at ±2, U(−1, 1), ±1."""
        recipe = self._recipe(dtype)
        return drawn(recipe.raw, key, shape, dtype, recipe.arguments, out_sharding)

    def _recipe(self, dtype: np.dtype) -> _Recipe:
        return (_COMPLEX if jnp.issubdtype(dtype, jnp.complexfloating) else _REAL)[self.name]


class _Recipe(NamedTuple):
    """How a law is drawn, and by what a draw is multiplied to have a given variance."""

    raw: Raw
    scale: Callable[[np.inexact], np.inexact]
    arguments: tuple[float, ...] = ()


def cut_variance(cut: float) -> float:
    """Variance of a standard normal cut at ±cut: 1 − 2aφ(a)/(2Φ(a) − 1)."""
    # Past 38 standard deviations the density is 0 in float64, and so is what the cut takes away.
    if cut >= 38:
        return 1.0
    return 1 - 2 * cut * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi) / math.erf(cut / math.sqrt(2))


def cut_standard_normal(
    key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype, low: float, high: float
) -> Inexact[Array, "*shape"]:
    """N(0, 1) cut at low and high, before any rescaling."""
    return jax.random.truncated_normal(key, low, high, shape, dtype)


def _uniform(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    return jax.random.uniform(key, shape, dtype, -1)


def _rademacher(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    sign = jax.random.bits(key, shape, jnp.uint32) >> 31
    return 1 - 2 * sign.astype(dtype)


def _on_disk(
    key: Key[Array, ""],
    shape: Sequence[int],
    dtype: np.dtype,
    radius: Callable[[Inexact[Array, "*shape"]], Inexact[Array, "*shape"]],
) -> Inexact[Array, "*shape"]:
    """A uniform phase, and a modulus that `radius` makes of a uniform number in [0, 1)."""
    key_radius, key_phase = jax.random.split(key)
    real = jnp.finfo(dtype).dtype
    phase = 2 * math.pi * jax.random.uniform(key_phase, shape, real)
    modulus = radius(jax.random.uniform(key_radius, shape, real))
    return jax.lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase))


def _complex_truncated_normal(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    return _on_disk(key, shape, dtype, lambda u: jnp.sqrt(-jnp.log1p((math.exp(-4) - 1) * u)))


def _complex_uniform(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    return _on_disk(key, shape, dtype, lambda u: jnp.sqrt(2 * u))


def _complex_rademacher(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    key_re, key_im = jax.random.split(key)
    real = jnp.finfo(dtype).dtype
    both = jax.lax.complex(_rademacher(key_re, shape, real), _rademacher(key_im, shape, real))
    return both * jnp.array(math.sqrt(0.5), dtype)


def _divided_by(std: float) -> Callable[[np.inexact], np.inexact]:
    return lambda variance: np.sqrt(variance) / variance.dtype.type(std)


# The same operations in the same order as in jax.nn.initializers.variance_scaling, whose bits are promised.
_REAL = {
    "normal": _Recipe(unscaled_normal, lambda variance: normal_scale(np.sqrt(variance))),
    "truncated_normal": _Recipe(cut_standard_normal, _divided_by(TRUNCATED_STD), (-2, 2)),
    "uniform": _Recipe(_uniform, lambda variance: np.sqrt(variance.dtype.type(3) * variance)),
    "rademacher": _Recipe(_rademacher, np.sqrt),
}
# On the complex plane the laws are circular: E[w²] = 0 and E|w|² is the variance.
_COMPLEX = {
    "normal": _Recipe(unscaled_normal, lambda variance: normal_scale(np.sqrt(variance))),
    "truncated_normal": _Recipe(_complex_truncated_normal, _divided_by(COMPLEX_TRUNCATED_STD)),
    "uniform": _Recipe(_complex_uniform, np.sqrt),
    "rademacher": _Recipe(_complex_rademacher, np.sqrt),
}


def _normal_log_mgf(theta: float) -> float:
    """χ²₁: −½ ln(1 − 2θ)."""
    return -0.5 * math.log1p(-2 * theta) if theta < 0.5 else math.inf


def _log_mean_exp_square(a: float) -> float:
    """ln ∫₀¹ exp(a s²) ds, for any real a: erf and Dawson's function are its two halves."""
    if a == 0:
        return 0.0
    import scipy.special  # here, for it takes as long to import as the rest of the package

    root = math.sqrt(abs(a))
    if a < 0:
        return math.log(math.sqrt(math.pi) / 2 * math.erf(root) / root)
    return a + math.log(float(scipy.special.dawsn(root)) / root)


def _uniform_log_mgf(theta: float) -> float:
    return _log_mean_exp_square(3 * theta)


def _truncated_log_mgf(theta: float, cut: float = 2.0) -> float:
    """For z = t/s with t ~ N(0, 1) cut at ±cut and s its standard deviation.

    E[exp(θz²)] ∝ ∫₀¹ exp(−(½ − θ/s²) cut² u²) du, one formula on both sides of θ/s² = ½.
    """
    return _log_mean_exp_square(-(0.5 - theta / TRUNCATED_STD**2) * cut**2) - _log_mean_exp_square(-(cut**2) / 2)


def _rademacher_log_mgf(theta: float) -> float:
    return theta


def _truncated_kurtosis(cut: float = 2.0) -> float:
    """E[z⁴] of the same law: (3 − (cut³ + 3cut)·h)/s⁴ with h = 2φ(cut)/(2Φ(cut) − 1)."""
    hazard = 2 * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi) / math.erf(cut / math.sqrt(2))
    return (3 - (cut**3 + 3 * cut) * hazard) / (1 - cut * hazard) ** 2


NORMAL = Distribution("normal", 3.0, math.inf, _normal_log_mgf)
TRUNCATED_NORMAL = Distribution("truncated_normal", _truncated_kurtosis(), 2 / TRUNCATED_STD, _truncated_log_mgf)
UNIFORM = Distribution("uniform", 1.8, math.sqrt(3), _uniform_log_mgf)
RADEMACHER = Distribution("rademacher", 1.0, 1.0, _rademacher_log_mgf)

DISTRIBUTIONS = {law.name: law for law in (NORMAL, TRUNCATED_NORMAL, UNIFORM, RADEMACHER)}


@functools.cache
def distribution(name: str) -> Distribution:
    """The law of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))}, not {name!r}")
    return DISTRIBUTIONS[name]
