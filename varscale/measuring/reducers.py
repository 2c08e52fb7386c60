"""Statistics of one array, reduced inside jit in float32 at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

Statistics = dict[str, Any]  # name -> array; scalars, but for what a caller's own reducer returns
Reducer = Callable[[Array], Any]


def fast(x: Inexact[Array, "..."]) -> Statistics:
    """Mean, second moment, largest magnitude, shares of zeros and of non-finite values."""
    values = widened(x)
    magnitude = jnp.abs(values)
    return {
        "mean": mean(values),
        "second_moment": mean(values * values),
        "largest_magnitude": jnp.max(magnitude, initial=0.0),
        "zero_share": share(values == 0),
        "nonfinite_share": share(~jnp.isfinite(values)),
    }


def cotangent(x: Inexact[Array, "..."]) -> Statistics:
    """What is measured of a gradient."""
    values = widened(x)
    return {"second_moment": mean(values * values), "nonfinite_share": share(~jnp.isfinite(values))}


def widened(x: Inexact[Array, "..."]) -> Float[Array, "..."]:
    """The values in float32 at least; of complex numbers the modulus."""
    modulus = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    return modulus.astype(jnp.promote_types(modulus.dtype, jnp.float32))


def mean(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean, one axis at a time: one long float32 sum over 10⁸ entries would lose the small ones."""
    while values.ndim:
        values = jnp.mean(values, axis=-1)
    return values


def share(condition: Array) -> Float[Array, ""]:
    """The share of true entries."""
    return mean(condition.astype(jnp.float32))


def combined(statistics: Mapping[str, Any]) -> Statistics:
    """Statistics of equal parts, stacked along a first axis, as those of the whole; parts that did not run do not count."""
    ran = statistics.get("ran")

    def mean_of(x: Array) -> Array:
        return jnp.mean(x, axis=0) if ran is None else jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(ran), 1).astype(x.dtype)

    found = {name: jax.tree.map(mean_of, x) for name, x in statistics.items()}
    if "largest_magnitude" in statistics:
        found["largest_magnitude"] = jnp.max(statistics["largest_magnitude"], axis=0)
    if ran is not None:
        found["ran"] = jnp.max(ran, axis=0)
    return found
