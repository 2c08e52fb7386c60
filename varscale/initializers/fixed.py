"""Laws of a fixed variance: what the weights are, whatever their shape."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key

from varscale._compat import normal_scale
from varscale.initializers.distributions import (
    COMPLEX_TRUNCATED_STD,
    TRUNCATED_STD,
    cut_standard_normal,
    cut_variance,
    distribution,
)
from varscale.initializers.initializer import Initializer, checked_number, checked_std_fits, settle
from varscale.initializers.sampling import OutSharding, drawn


@dataclasses.dataclass(frozen=True, repr=False)
class Normal(Initializer):
    """Normal weights of a fixed standard deviation. Made by `normal`."""

    maker: ClassVar[str] = "normal"

    stddev: float = 1e-2
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, stddev=checked_number("stddev", self.stddev, above=0.0))

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("stddev", self.stddev, math.inf, dtype)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        raw = distribution("normal").raw(key, shape, dtype, out_sharding)
        return raw * normal_scale(raw.dtype.type(self.stddev))


@dataclasses.dataclass(frozen=True, repr=False)
class TruncatedNormal(Initializer):
    """Truncated normal weights whose standard deviation is the true one. Made by `truncated_normal`."""

    maker: ClassVar[str] = "truncated_normal"

    stddev: float = 1e-2
    dtype: np.dtype | None = None
    lower: float = -2.0
    upper: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(
            self,
            stddev=checked_number("stddev", self.stddev, above=0.0),
            lower=checked_number("lower", self.lower, below=0.0),
            upper=checked_number("upper", self.upper, above=0.0),
        )
        if self.lower != -self.upper:
            raise ValueError(
                f"lower must be −upper, not {self.lower:g} with upper {self.upper:g}: cut unevenly, a normal law has a mean, "
                "and E[y²] = n · Var[w] · E[x²] needs a mean of 0; jax.nn.initializers.truncated_normal draws such weights"
            )

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("stddev", self.stddev, self.upper / math.sqrt(cut_variance(self.upper)), dtype)

    def _check_dtype(self, dtype: np.dtype) -> None:
        if self.upper != 2 and jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"dtype must be real for truncated_normal with upper {self.upper:g}, not {dtype.name}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        if self.upper != 2:
            raw = drawn(cut_standard_normal, key, shape, dtype, (self.lower, self.upper), out_sharding)
            return raw * jnp.array(self.stddev / math.sqrt(cut_variance(self.upper)), dtype)
        raw_std = COMPLEX_TRUNCATED_STD if jnp.issubdtype(dtype, jnp.complexfloating) else TRUNCATED_STD
        raw = distribution("truncated_normal").raw(key, shape, dtype, out_sharding)
        return raw * jnp.array(self.stddev / raw_std, dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class SymmetricUniform(Initializer):
    """Uniform weights between −bound and bound. Made by `symmetric_uniform`."""

    maker: ClassVar[str] = "symmetric_uniform"

    bound: float = 1e-2
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, bound=checked_number("bound", self.bound, above=0.0))

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("bound", self.bound, 1.0, dtype)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        # On the complex plane the raw law is the uniform disk of radius √2.
        radius = math.sqrt(2) if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
        return distribution("uniform").raw(key, shape, dtype, out_sharding) * jnp.array(self.bound / radius, dtype)


def normal(stddev: float = 1e-2, dtype: DTypeLike | None = None) -> Normal:
    """Normal weights of mean 0 and the given standard deviation, whatever the shape; bits as `jax.nn.initializers.normal`.

    Args:
        stddev: finite and positive.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: stddev is no number, or dtype not floating or complex.
        ValueError: stddev is not finite and positive.

    >>> import jax
    >>> round(float(normal(0.02)(jax.random.key(0), (1000, 1000)).std()), 4)
    0.02
    """
    return Normal(stddev, dtype)  # pyright: ignore[reportArgumentType]


def truncated_normal(
    stddev: float = 1e-2, dtype: DTypeLike | None = None, lower: float = -2.0, upper: float = 2.0
) -> TruncatedNormal:
    """Normal weights cut at ±upper and rescaled, so that their standard deviation IS stddev; none beyond 2.274 stddev by
    default.

    Two things differ from `jax.nn.initializers.truncated_normal`, whose arguments these are. There stddev is that of the normal
    before the cut, so that the weights have .88 of it (write `truncated_normal(0.88 * s)` for jax's `truncated_normal(s)`); and
    lower may differ from −upper, which gives the weights a mean: that is an error here.

    Args:
        stddev: of the result, finite and positive.
        dtype: the default dtype of the weights.
        lower: −upper.
        upper: the cut, in standard deviations of the normal before it; finite and positive. 3 for OLMo's and MaxText's.

    Raises:
        TypeError: stddev, lower or upper is no number, or dtype not floating or complex; when called: a complex dtype
            with another upper than 2.
        ValueError: stddev or upper is not finite and positive, or lower is not −upper.

    Source: for the constant, Johnson, Kotz & Balakrishnan 1994, "Continuous Univariate Distributions" 1, section 13.10.1.

    >>> import jax
    >>> w = truncated_normal(0.02)(jax.random.key(0), (1000, 1000))
    >>> round(float(w.std()), 4), round(float(abs(w).max() / w.std()), 2)
    (0.02, 2.28)
    >>> round(float(jax.nn.initializers.truncated_normal(0.02)(jax.random.key(0), (1000, 1000)).std()), 4)
    0.0176
    """
    return TruncatedNormal(stddev, dtype, lower, upper)  # pyright: ignore[reportArgumentType]


def symmetric_uniform(bound: float = 1e-2, dtype: DTypeLike | None = None) -> SymmetricUniform:
    """Uniform weights in [−bound, bound), of variance bound²/3; on complex dtypes in the disk of radius bound.

    (`jax.nn.initializers.uniform` is one-sided, [0, scale), and so has a mean; there is no such law here.)

    Args:
        bound: finite and positive.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: bound is no number, or dtype not floating or complex.
        ValueError: bound is not finite and positive.

    >>> import jax
    >>> w = symmetric_uniform(0.3)(jax.random.key(0), (1000, 1000))
    >>> round(float(w.min()), 2), round(float(w.max()), 2), round(float(w.var()), 3)
    (-0.3, 0.3, 0.03)
    """
    return SymmetricUniform(bound, dtype)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, repr=False)
class CutNormal(Initializer):
    """A normal law cut at absolute borders, and not rescaled. Made by `cut_normal`."""

    maker: ClassVar[str] = "cut_normal"

    stddev: float = 0.02
    cut: float = 2.0
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(
            self,
            stddev=checked_number("stddev", self.stddev, above=0.0),
            cut=checked_number("cut", self.cut, above=0.0),
        )

    def variance(self) -> float:
        """Of the weights: stddev² · (1 − 2aφ(a)/(2Φ(a) − 1)) with a = cut/stddev."""
        return self.stddev**2 * cut_variance(self.cut / self.stddev)

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("stddev", self.stddev, self.cut / self.stddev, dtype)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        a = self.cut / self.stddev
        raw = drawn(cut_standard_normal, key, shape, dtype, (-a, a), out_sharding)
        return raw * jnp.array(self.stddev, dtype)

    def _check_dtype(self, dtype: np.dtype) -> None:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"dtype must be real for cut_normal, not {dtype.name}")


def cut_normal(stddev: float = 0.02, cut: float = 2.0, dtype: DTypeLike | None = None) -> CutNormal:
    """N(0, stddev²) cut at ±cut, both in the weights' own units: PyTorch's and timm's `trunc_normal_(std, a=-cut, b=cut)`.

    ViT's default cuts at ±2 with a standard deviation of .02, a hundred of them: it is a plain normal. Where the cut bites,
    the weights' standard deviation is less than stddev; `truncated_normal` has the one it is given.

    Args:
        stddev: of the normal before the cut, finite and positive.
        cut: the largest |w|, finite and positive.
        dtype: the default dtype of the weights, real.

    Raises:
        TypeError: stddev or cut is no number, or the dtype is not floating.
        ValueError: stddev or cut is not finite and positive.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", as timm initializes it.

    >>> round(cut_normal(1.0, 2.0).variance(), 4), round(cut_normal(0.02, 2.0).variance() ** 0.5, 4)
    (0.7737, 0.02)
    """
    return CutNormal(stddev, cut, dtype)  # pyright: ignore[reportArgumentType]
