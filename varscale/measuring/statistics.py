"""What is measured of a layer's output, reduced inside jit: only a handful of numbers a layer ever leaves the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one array; under vmap or scan every field gains a leading axis.

    Attributes:
      mean: E[x]; of |x| for complex x.
      second_moment: E[|x|²], which is what the law is about.
      variance: E[(x − E[x])²] (of the population: divided by the count).
      zeros: share of entries that are exactly zero: a ReLU's dead half.
      saturated: share of entries with |x| above the threshold: a tanh's flat ends.
      finite: share of entries that are neither infinite nor NaN.
      histogram: counts in equal bins over the range, as `numpy.histogram` counts them; what lies outside is not counted.
    """

    mean: Float[Array, "*batch"]
    second_moment: Float[Array, "*batch"]
    variance: Float[Array, "*batch"]
    zeros: Float[Array, "*batch"]
    saturated: Float[Array, "*batch"]
    finite: Float[Array, "*batch"]
    histogram: Int[Array, "*batch bins"]

    @property
    def standard_deviation(self) -> Float[Array, "*batch"]:
        """√variance."""
        return jnp.sqrt(self.variance)


def measure(
    x: Inexact[Array, "..."],
    *,
    saturation: Float[Array, ""] | float = 0.99,
    low: Float[Array, ""] | float = -1.0,
    high: Float[Array, ""] | float = 1.0,
    bins: int = 64,
) -> LayerStatistics:
    """Reduce an array to its statistics, in float32 at least, whatever the array's own precision.

    Args:
      x: any shape, floating or complex (of which the modulus is measured). An empty array has the moments NaN.
      saturation: the threshold on |x| for `saturated`; .99 is the usual one for tanh.
      low: lower end of the histogram's range.
      high: upper end; the last bin includes it.
      bins: how many bins; static.

    Returns:
      Scalars, and the histogram of shape (bins,).

    Raises:
      TypeError: x is not of a floating or complex dtype.
      ValueError: bins is not positive.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x has dtype {x.dtype}; give a floating or complex array")
    if bins < 1:
        raise ValueError(f"bins is {bins}; give 1 or more")
    modulus = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    values = modulus.astype(jnp.float32 if modulus.dtype.itemsize < 4 else modulus.dtype)
    mean = _mean(values)
    return LayerStatistics(
        mean=mean,
        second_moment=_mean(values * values),
        # About the mean rather than from the second moment: the difference of two large numbers keeps no digits.
        variance=_mean(jnp.square(values - mean)),
        zeros=_share(values == 0),
        saturated=_share(jnp.abs(values) > saturation),
        finite=_share(jnp.isfinite(values)),
        histogram=_histogram(values, low, high, bins),
    )


def _mean(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean, one axis at a time: one long float32 sum over 10⁸ entries would lose the small ones."""
    while values.ndim:
        values = jnp.mean(values, axis=-1)
    return values


def _share(condition: Array) -> Float[Array, ""]:
    return _mean(condition.astype(jnp.float32))


def _histogram(
    values: Float[Array, "..."], low: Float[Array, ""] | float, high: Float[Array, ""] | float, bins: int
) -> Int[Array, " bins"]:
    low, high = jnp.asarray(low, values.dtype), jnp.asarray(high, values.dtype)
    inside = (values >= low) & (values <= high)
    place = jnp.floor((values - low) / (high - low) * bins)
    place = jnp.where(inside, jnp.clip(place, 0, bins - 1), bins).astype(jnp.int32)
    return jnp.zeros(bins, jnp.int32).at[place.ravel()].add(1, mode="drop")
