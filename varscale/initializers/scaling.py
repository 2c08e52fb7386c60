"""The law as an initializer: variance scaling, and its presets by name."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key

from varscale import gaussian
from varscale.initializers.distributions import DistributionName, distribution
from varscale.initializers.fans import MODES, Axes, Fans, Mode, compute_fans, normalized_axes
from varscale.initializers.gains import Criterion, gain
from varscale.initializers.initializer import (
    Initializer,
    checked_number,
    checked_std_fits,
    settle,
)
from varscale.initializers.sampling import OutSharding


@dataclasses.dataclass(frozen=True, repr=False)
class VarianceScaling(Initializer):
    """Zero-mean weights of variance scale / n, n a fan or a mean of fans. Made by `variance_scaling`."""

    maker: ClassVar[str] = "variance_scaling"

    scale: float = 1.0
    mode: Mode = "fan_in"
    distribution: DistributionName = "truncated_normal"
    in_axis: int | tuple[int, ...] = -2
    out_axis: int | tuple[int, ...] = -1
    batch_axis: int | tuple[int, ...] = ()
    dtype: np.dtype | None = None
    fans: Fans | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {self.mode!r}")
        if self.fans is not None and not isinstance(self.fans, Fans):
            raise TypeError(f"fans must be a varscale.Fans, not {self.fans!r}")
        if self.fans is not None and not self.fans.of(self.mode) > 0:
            raise ValueError(f"fans must be positive for mode {self.mode!r}, not {self.fans}")
        distribution(self.distribution)
        super().__post_init__()
        settle(
            self,
            scale=checked_number("scale", self.scale, above=0.0),
            in_axis=normalized_axes("in_axis", self.in_axis),
            out_axis=normalized_axes("out_axis", self.out_axis),
            batch_axis=normalized_axes("batch_axis", self.batch_axis),
        )

    def variance(self, shape: tuple[int, ...]) -> float:
        """Var[w] of a kernel of this shape.

        Raises:
            ValueError: the axes do not fit the shape, or a size is 0.
        """
        fans = self.fans or compute_fans(shape, self.in_axis, self.out_axis, self.batch_axis)
        n = fans.of(self.mode)
        if not n > 0:
            raise ValueError(f"shape {shape} has no variance by mode {self.mode!r}: its fans are {fans}")
        return self.scale / n

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.fans is None:
            compute_fans(shape, self.in_axis, self.out_axis, self.batch_axis)

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        checked_std_fits("scale", math.sqrt(self.variance(shape)), distribution(self.distribution).bound, dtype)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        return distribution(self.distribution).draw(key, shape, self.variance(shape), dtype, out_sharding)


def variance_scaling(
    scale: float = 1.0,
    mode: Mode = "fan_in",
    distribution: DistributionName = "truncated_normal",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: DTypeLike | None = None,
    *,
    fans: Fans | None = None,
) -> VarianceScaling:
    """Weights of mean 0 and variance scale / n: the law E[y²] = n · Var[w] · E[x²], solved for the variance.

    In float32 and float64 the same bits as `jax.nn.initializers.variance_scaling`; right in bfloat16, float16 and float8,
    where that is not.

    Args:
        scale: E[y²]/E[x²] of one layer for mode "fan_in"; gain² for the activation before it.
        mode: what n is: "fan_in" keeps the signal, "fan_out" the gradient; "fan_avg" and "fan_geo_avg" are means of both.
        distribution: "truncated_normal" (cut at 2 standard deviations of its parent, rescaled), "normal", "uniform" or
            "rademacher" (±σ). On complex dtypes all are circular, with E|w|² = scale / n.
        in_axis: axis or axes contracted with the input.
        out_axis: axis or axes of the output.
        batch_axis: axis or axes over which independent kernels are stacked, for a parameter that is drawn as one stack, such as
            (layers, in, out). Inside nnx.vmap, nn.scan and the like each layer draws its own (in, out): leave it out there. All
            axes without a role are the receptive field.
        dtype: the default dtype of the weights.
        fans: fans of use (`einsum_fans`, `conv_fans`), in place of those from shape and axes.

    Returns:
        The initializer.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: scale not finite and positive, unknown mode or distribution, a repeated axis.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2; Glorot & Bengio 2010, section 4.2.1.

    >>> import jax
    >>> kernel = variance_scaling(2.0, "fan_in", "normal")(jax.random.key(0), (512, 2048))
    >>> round(float(512 * kernel.var()), 2)
    2.0
    """
    return VarianceScaling(scale, mode, distribution, in_axis, out_axis, batch_axis, dtype, fans)  # pyright: ignore[reportArgumentType]


def for_activation(
    activation: gaussian.Elementwise,
    mode: Mode = "fan_in",
    distribution: DistributionName = "truncated_normal",
    criterion: Criterion = "second_moment",
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: DTypeLike | None = None,
    *,
    fans: Fans | None = None,
) -> VarianceScaling:
    """`variance_scaling` with scale = gain(activation, criterion)², for any elementwise callable.

    For a layer whose input went through the activation: it keeps E[y²] = 1 where the layer before has E[y²] = 1. The
    FIRST layer's input has been through no activation: give it `lecun_normal()` (or `variance_scaling(1.0,
    distribution=...)`) and inputs of E[x²] = 1. Applied to that layer too, gelu's gain multiplies E[x²] by 2.35, silu's
    by 2.81.

    At depth: gelu, silu, mish and hard_swish have no stable fixed point (the slope of E[φ²] in ln q exceeds 1), so the
    deviations that a finite width causes grow as slope^depth: 1.14^depth for gelu, 1.17^depth for silu, whose plain nets
    hold to about ten layers. Deeper, normalize, use residual branches, or rescale on data (LSUV). `criterion="stable"`
    refuses such activations; tanh, sin, selu, elu and relu pass. The table of activations:
    varscale/initializers/README.md.

    The callable is resolved to a number here, so that what is returned pickles and compares as any other.

    Args:
        activation: what the layer's input went through; any elementwise callable.
        mode: as in `variance_scaling`.
        distribution: as in `variance_scaling`.
        criterion: what is to be kept; see `gain`.
        in_axis: as in `variance_scaling`.
        out_axis: as in `variance_scaling`.
        batch_axis: as in `variance_scaling`.
        dtype: as in `variance_scaling`.
        fans: as in `variance_scaling`.

    Raises:
        TypeError: activation is not callable, or as `variance_scaling`.
        ValueError: the activation is not elementwise (softmax, a normalization), has no gain by this criterion (by
            "stable": none at which deviations do not grow), or as `variance_scaling`.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2, for any activation; the slope: Poole et al. 2016,
    section 3.

    >>> import jax
    >>> for_activation(jax.nn.relu, distribution="normal")
    variance_scaling(scale=2.0, distribution='normal')
    >>> key_1, key_2 = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(jax.random.key(1), (64, 256))
    >>> h = x @ lecun_normal()(key_1, (256, 256))  # the first layer: x has been through no activation
    >>> y = jax.nn.gelu(h) @ for_activation(jax.nn.gelu)(key_2, (256, 256))
    >>> f"{(h**2).mean():.1f}, {(y**2).mean():.1f}"
    '1.0, 1.0'
    """
    scale = gain(activation, criterion) ** 2
    # Quadrature ends within rounding of the closed form; relu's 2 should be he_normal's 2.
    scale = float(f"{scale:.12g}")
    return variance_scaling(scale, mode, distribution, in_axis, out_axis, batch_axis, dtype, fans=fans)


def he_normal(
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: DTypeLike | None = None,
    *,
    mode: Mode = "fan_in",
    negative_slope: float = 0.0,
) -> VarianceScaling:
    """Variance 2 / ((1 + a²) fan_in), truncated normal: keeps E[y²] through (leaky) ReLUs of negative slope a.

    For a layer whose input went through the ReLU. The first layer's input has not: give it `lecun_normal`.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> from flax import nnx
    >>> layer = nnx.Linear(512, 512, kernel_init=he_normal(), rngs=nnx.Rngs(0))
    >>> h = jax.random.normal(jax.random.key(1), (128, 512))
    >>> y = layer(jax.nn.relu(h))  # relu halves E[h²] = 1, the weights' variance 2/512 gives it back
    >>> round(float((y**2).mean()), 1)
    1.0
    """
    slope = checked_number("negative_slope", negative_slope)
    return variance_scaling(2.0 / (1.0 + slope**2), mode, "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def he_uniform(
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: DTypeLike | None = None,
    *,
    mode: Mode = "fan_in",
    negative_slope: float = 0.0,
) -> VarianceScaling:
    """Variance 2 / ((1 + a²) fan_in), uniform. With a = √5 it is PyTorch's default of Linear and Conv, ±1/√fan_in.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> round(float(abs(he_uniform()(jax.random.key(0), (600, 256))).max()), 2)  # √(6/fan_in)
    0.1
    """
    slope = checked_number("negative_slope", negative_slope)
    return variance_scaling(2.0 / (1.0 + slope**2), mode, "uniform", in_axis, out_axis, batch_axis, dtype)


def glorot_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """Variance 2 / (fan_in + fan_out), truncated normal.

    Source: Glorot & Bengio 2010, section 4.2.1, equation 16. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> w = glorot_normal()(jax.random.key(0), (300, 500))
    >>> round(float(w.var() * (300 + 500) / 2), 1)
    1.0
    """
    return variance_scaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def glorot_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """Variance 2 / (fan_in + fan_out), uniform.

    Source: Glorot & Bengio 2010, section 4.2.1, equation 16. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> round(float(abs(glorot_uniform()(jax.random.key(0), (200, 400))).max()), 2)  # √(6/(fan_in + fan_out))
    0.1
    """
    return variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis, batch_axis, dtype)


def lecun_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """Variance 1 / fan_in, truncated normal: keeps E[y²] through linear layers; flax's default.

    For a first layer, and for any whose input has mean square 1 and went through no activation.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> key_x, key_w = jax.random.split(jax.random.key(0))
    >>> y = jax.random.normal(key_x, (64, 784)) @ lecun_normal()(key_w, (784, 256))
    >>> round(float((y**2).mean()), 1)
    1.0
    """
    return variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def lecun_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """Variance 1 / fan_in, uniform.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> round(float(abs(lecun_uniform()(jax.random.key(0), (300, 256))).max()), 2)  # √(3/fan_in)
    0.1
    """
    return variance_scaling(1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


kaiming_normal, kaiming_uniform = he_normal, he_uniform
xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
