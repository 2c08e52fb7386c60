"""Statistics of one array, reduced inside jit in float32 at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

Statistics = dict[str, Any]  # name -> array; a scalar, but for histograms and what a caller's own reducer returns
Reducer = Callable[[Array], Statistics]

SATURATION = 0.99  # of |x|: where tanh has lost 98 % of its slope
BINS = 32
_SPREAD = 4.0  # of a histogram on either side of the mean, in standard deviations
_LONGEST = 1 << 14  # axis that is summed in one run: rounding errors add up to √n · 2⁻²⁴, below 1e-5
_MOST_COUNTED = 1 << 14  # values of an array that its histogram counts


def fast(x: Num[Array, "..."]) -> Statistics:
    """Mean, second moment, largest magnitude, shares of zeros and of non-finite values.

    On a CPU, XLA keeps a copy of the array for each statistic that is a reduction of its own: there all are one reduction.
    """
    return jax.lax.platform_dependent(x, cpu=tight, default=_separate)


def _separate(x: Num[Array, "..."]) -> Statistics:
    """A reduction a statistic, which XLA fuses on accelerators."""
    values = widened(x)
    second = mean(values * values)
    return {
        "mean": mean(values),
        "second_moment": second,
        "largest_magnitude": jnp.max(jnp.abs(values), initial=0.0),
        "zero_share": share(values == 0),
        "nonfinite_share": nonfinite_share(values, second),
    }


def tight(x: Num[Array, "..."]) -> Statistics:
    """What `fast` measures, in one reduction that needs no memory of the array's size."""
    values = _in_short_axes(widened(x))
    zero, dtype = jnp.zeros((), values.dtype), values.dtype
    operands = (
        values,
        values * values,
        jnp.abs(values),
        (values == 0).astype(dtype),
        (~jnp.isfinite(values)).astype(dtype),
    )

    def join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        return (a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2]), a[3] + b[3], a[4] + b[4])

    for axis in reversed(range(values.ndim)):  # one at a time: this reduction is no tree, and a long sum loses small numbers
        operands = jax.lax.reduce(operands, (zero,) * 5, join, (axis,))
    total, squares, largest, zeros, nonfinite = operands
    return {
        "mean": total / values.size,
        "second_moment": squares / values.size,
        "largest_magnitude": largest,
        "zero_share": zeros / values.size,
        "nonfinite_share": nonfinite / values.size,
    }


def _in_short_axes(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array with long axes cut into several, where their length has divisors."""
    shape: list[int] = []
    for n in values.shape:
        while n > _LONGEST and (part := next((d for d in range(_LONGEST, 1, -1) if n % d == 0), None)):
            shape.append(part)
            n //= part
        shape.append(n)
    return values.reshape(shape)


def full(x: Num[Array, "..."]) -> Statistics:
    """What `fast` measures, and what takes a second pass over the array; see `varscale.probe`."""
    values = widened(x)
    found = fast(x)
    centred = values - found["mean"]
    variance = mean(centred * centred)
    found["kurtosis"] = mean(jnp.square(centred * centred)) / (variance * variance)
    found |= _ends(x, values)
    if values.ndim:
        channels = values.reshape(-1, values.shape[-1])
        found["channel_mean_squared"] = jnp.mean(jnp.square(jnp.mean(channels, axis=0)))
        found["dead_share"] = share(jnp.max(jnp.abs(channels), axis=0, initial=0.0) == 0)
    squares = jnp.maximum(found["second_moment"] * values.size, jnp.finfo(values.dtype).tiny)
    if values.ndim > 1 and values.shape[0] > 1:
        found["sample_correlation"] = _correlation(values.reshape(values.shape[0], -1), 0, squares)
    if (positions := math.prod(values.shape[1:-1])) > 1:
        found["position_correlation"] = _correlation(values.reshape(values.shape[0], positions, values.shape[-1]), 1, squares)
    counts, edges = histogram(values, found["mean"], jnp.sqrt(variance))
    return found | {"histogram_counts": counts, "histogram_edges": edges}


def cotangent(x: Num[Array, "..."]) -> Statistics:
    """Second moment and share of non-finite values: what is measured of a gradient."""
    values = widened(x)
    second = mean(values * values)
    return {"second_moment": second, "nonfinite_share": nonfinite_share(values, second)}


def _ends(x: Num[Array, "..."], values: Float[Array, "..."]) -> Statistics:
    """Shares at the ends of the array's own dtype, a factor of 2 wide each, and of saturated values."""
    magnitude = jnp.abs(values)
    found = {"saturated_share": share(magnitude > SATURATION)}
    if jnp.issubdtype(x.dtype, jnp.inexact):
        info = jnp.finfo(x.dtype)
        found["overflow_share"] = share(magnitude >= float(info.max) / 2)
        found["underflow_share"] = share((magnitude > 0) & (magnitude < 2 * float(info.tiny)))
    return found


def _correlation(values: Float[Array, "..."], axis: int, squares: Float[Array, ""]) -> Float[Array, ""]:
    """E[x x'] / E[x²] of all pairs that differ along one axis: (Σ (Σ x)² − Σ x²) / ((n − 1) Σ x²)."""
    size = values.shape[axis]
    return (jnp.sum(jnp.square(jnp.sum(values, axis=axis))) / squares - 1) / (size - 1)


def histogram(
    values: Float[Array, "..."], centre: Float[Array, ""], deviation: Float[Array, ""]
) -> tuple[Float[Array, " bins"], Float[Array, " edges"]]:
    """Counts in `BINS` equal bins of ±4 standard deviations about the mean, of at most 2¹⁴ evenly spaced values."""
    stride = -(-values.size // _MOST_COUNTED)
    some = values.ravel()[:: stride + (stride + 1) % 2]  # odd: a stride of 2ⁿ would take few channels
    reach = jnp.maximum(_SPREAD * deviation, 1e-6 * jnp.abs(centre) + jnp.finfo(values.dtype).tiny)
    place = jnp.floor((some - centre + reach) / (2 * reach) * BINS)
    place = jnp.where((place >= 0) & (place < BINS), place, BINS).astype(jnp.int32)  # NaN too is outside
    counts = jnp.zeros(BINS, jnp.int32).at[place].add(1, mode="drop")
    return counts.astype(values.dtype), centre + reach * jnp.linspace(-1, 1, BINS + 1, dtype=values.dtype)


def widened(x: Num[Array, "..."]) -> Float[Array, "..."]:
    """The values in float32 at least; of complex numbers the modulus."""
    modulus = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    return modulus.astype(jnp.float64 if modulus.dtype == jnp.float64 else jnp.float32)


def mean(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean. XLA sums in a tree, on CPUs too: of 10⁷ float32 entries to a relative error below 1e-7."""
    return jnp.mean(values)


def nonfinite_share(values: Float[Array, "..."], second_moment: Float[Array, ""]) -> Float[Array, ""]:
    """The share of values that are NaN or infinite.

    On a CPU, where every statistic is a pass of its own, they are counted only if the second moment is not finite.
    """

    def counted(values: Array, _: Array) -> Array:
        return share(~jnp.isfinite(values))

    def counted_if_there(values: Array, second_moment: Array) -> Array:
        none = jnp.zeros((), jnp.float32)
        return jax.lax.cond(jnp.isfinite(second_moment), lambda _: none, lambda v: counted(v, second_moment), values)

    return jax.lax.platform_dependent(values, second_moment, cpu=counted_if_there, default=counted)


def share(condition: Bool[Array, "..."]) -> Float[Array, ""]:
    """The share of true entries."""
    return jnp.mean(condition, dtype=jnp.float32)


def combined(statistics: Mapping[str, Any]) -> Statistics:
    """Statistics of equal parts, stacked along a first axis, as those of the whole; parts that did not run do not count.

    That is exact for means, shares and the largest magnitude; of other statistics it is the mean over the parts.
    """
    ran = statistics.get("ran")

    def mean_of(x: Array) -> Array:
        return jnp.mean(x, axis=0) if ran is None else jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(ran), 1).astype(x.dtype)

    found = {name: jax.tree.map(mean_of, x) for name, x in statistics.items()}
    if "largest_magnitude" in statistics:
        found["largest_magnitude"] = jnp.max(statistics["largest_magnitude"], axis=0)
    if ran is not None:
        found["ran"] = jnp.max(ran, axis=0)
    return found
