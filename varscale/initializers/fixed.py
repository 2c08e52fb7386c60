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
from varscale.initializers.distributions import COMPLEX_TRUNCATED_STD, TRUNCATED_STD, cut_standard_normal, distribution
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

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, stddev=checked_number("stddev", self.stddev, above=0.0))

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("stddev", self.stddev, distribution("truncated_normal").bound, dtype)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
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
    """
    return Normal(stddev, dtype)  # pyright: ignore[reportArgumentType]


def truncated_normal(stddev: float = 1e-2, dtype: DTypeLike | None = None) -> TruncatedNormal:
    """Truncated normal weights whose standard deviation IS stddev; none beyond 2.27 of it.

    (`jax.nn.initializers.truncated_normal` has .88 of the stddev it is given: there it means the normal before the cut.)

    Args:
        stddev: of the result, finite and positive.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: stddev is no number, or dtype not floating or complex.
        ValueError: stddev is not finite and positive.
    """
    return TruncatedNormal(stddev, dtype)  # pyright: ignore[reportArgumentType]


def symmetric_uniform(bound: float = 1e-2, dtype: DTypeLike | None = None) -> SymmetricUniform:
    """Uniform weights in [−bound, bound), of variance bound²/3; on complex dtypes in the disk of radius bound.

    (`jax.nn.initializers.uniform` is one-sided, [0, scale), and so has a mean; there is no such law here.)

    Args:
        bound: finite and positive.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: bound is no number, or dtype not floating or complex.
        ValueError: bound is not finite and positive.
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
        a = self.cut / self.stddev
        # Past 38 standard deviations the density is 0 in float64, and so is what the cut takes away.
        taken = 2 * a * math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi) / math.erf(a / math.sqrt(2)) if a < 38 else 0.0
        return self.stddev**2 * (1 - taken)

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
    """
    return CutNormal(stddev, cut, dtype)  # pyright: ignore[reportArgumentType]
