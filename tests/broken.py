"""Broken initializers, each with a strength: what `varscale.testing` must catch, and what it may overlook at a tenth of
the strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Init = Callable[..., jax.Array]
SHAPE = (192, 96)
"""Neither square nor small: swapped fans differ by 2, and a draw alone is not enough."""


def good(key, shape, dtype, variance=None):
    """Independent normal weights of variance 1/fan_in."""
    variance = 1 / np.prod(shape[:-1]) if variance is None else variance
    return jax.random.normal(key, shape, dtype) * jnp.asarray(math.sqrt(variance), dtype)


def truncated(key, shape, dtype):
    std = math.sqrt(1 / np.prod(shape[:-1])) / 0.87962566103423978
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) * jnp.asarray(std, dtype)


@dataclass(frozen=True)
class Broken:
    """A kind of defect.

    Attributes:
        name: of the defect.
        make: from a strength to an initializer; strength 1 is the defect as people commit it.
        part: the parts of the claim any of which may catch it.
        claim: arguments of `assert_variance` besides the initializer.
        shape: of the kernel.
        smallest: a strength at which it is caught too: the measured threshold, rounded up.
    """

    name: str
    make: Callable[[float], Init]
    part: tuple[str, ...]
    smallest: float
    claim: dict[str, Any] = field(default_factory=lambda: {"distribution": "normal"})
    shape: tuple[int, ...] = SHAPE


def _variance(factor: Callable[[float, tuple[int, ...]], float]) -> Callable[[float], Init]:
    """Normal weights whose variance is off by a factor."""
    return lambda strength: lambda key, shape, dtype: good(key, shape, dtype, factor(strength, shape) / np.prod(shape[:-1]))


def _change(change: Callable[..., jax.Array]) -> Callable[[float], Init]:
    """Good weights in units of their standard deviation, changed: `change(z, key, strength)`."""

    def make(strength: float) -> Init:
        def init(key, shape, dtype):
            first, second = jax.random.split(key)
            std = jnp.asarray(np.prod(shape[:-1]) ** -0.5, dtype)
            return change(jax.random.normal(first, shape, dtype), second, strength) * std

        return init

    return make


def _twins(z, key, strength):
    """That share of the rows repeats the row half the kernel away; of a row that the share cuts, a correlation remains."""
    half = z.shape[0] // 2
    copied = jnp.clip(strength * half - jnp.arange(half, dtype=z.dtype), 0, 1)[:, None]
    return z.at[half : 2 * half].set(copied * z[:half] + jnp.sqrt(1 - copied**2) * z[half : 2 * half])


def _common(axis: int):
    """A common random part along an axis, of that share of the variance."""

    def change(z, key, strength):
        shape = tuple(1 if position == axis else length for position, length in enumerate(z.shape))
        shared = jax.random.normal(key, shape, z.dtype)
        return math.sqrt(1 - strength) * z + math.sqrt(strength) * jnp.broadcast_to(shared, z.shape)

    return change


def _smoothed(z, key, strength):
    """Each weight mixed with its neighbour: correlation `strength/2` or so at lag one."""
    mixed = z + strength * jnp.roll(z, 1, axis=-1)
    return mixed / math.sqrt(1 + strength**2)


def _sign_bias(z, key, strength):
    """P(w > 0) = (1 + strength)/2."""
    return jnp.abs(z) * jnp.where(jax.random.uniform(key, z.shape, z.dtype) < (1 + strength) / 2, 1, -1).astype(z.dtype)


def _wrong_law(z, key, strength):
    """That share of the weights uniform instead of normal, of the same variance."""
    pick, draw = jax.random.split(key)
    other = jax.random.uniform(draw, z.shape, z.dtype, -math.sqrt(3), math.sqrt(3))
    return jnp.where(jax.random.uniform(pick, z.shape, z.dtype) < strength, other, z)


def _heavy_tail(z, key, strength):
    """Scale mixture: a tenth of that share of the weights 3 times as large, the whole rescaled."""
    big = jax.random.uniform(key, z.shape, z.dtype) < strength / 10
    return jnp.where(big, 3 * z, z) / math.sqrt(1 + 0.8 * strength)


def _nan(z, key, strength):
    """NaN where a uniform number is below a hundredth of the strength squared."""
    return jnp.where(jax.random.uniform(key, z.shape, z.dtype) < strength**2 / 100, jnp.nan, z)


def _row_scales(z, key, strength):
    """Every other row larger by √(1 + s), the rows between smaller, the mean square right."""
    sign = jnp.where(jnp.arange(z.shape[0]) % 2 == 0, strength, -strength).astype(z.dtype)
    return z * jnp.sqrt(1 + sign)[:, None]


def _dead_column(z, key, strength):
    """One column shrunk to 1 − strength of itself, the others grown to make up for it."""
    columns = z.shape[1]
    kept = (1 - strength) ** 2
    scales = jnp.full((columns,), math.sqrt((columns - kept) / (columns - 1)), z.dtype).at[0].set(1 - strength)
    return z * scales[None, :]


def _draw_scale(z, key, strength):
    """A random scale common to a draw: its mean square fluctuates from key to key."""
    spread = jax.random.bernoulli(key, 0.5).astype(z.dtype) * 2 - 1
    return z * jnp.sqrt(1 + strength * spread)


def _tiled(z, key, strength):
    """That share of the kernel, in memory order, filled with copies of its first 700 weights."""
    flat = z.reshape(-1)
    copies = jnp.tile(flat[:700], flat.size // 700 + 1)[: flat.size]
    return jnp.where(jnp.arange(flat.size) < round(strength * flat.size), copies, flat).reshape(z.shape)


def _centred(z, key, strength):
    """The mean of each column subtracted, in part: outputs on constant inputs vanish."""
    return z - strength * z.mean(axis=0, keepdims=True)


def _antithetic(z, key, strength):
    """The second half of the rows is minus the first, mixed with fresh noise of the same variance."""
    half = z.shape[0] // 2
    return z.at[half : 2 * half].set(-strength * z[:half] + math.sqrt(1 - strength**2) * z[half : 2 * half])


def _coarse(z, key, strength):
    """Rounded to a grid of that many standard deviations."""
    step = strength / 4
    return jnp.round(z / step) * step / math.sqrt(1 + step**2 / 12) if step else z


def _random_signs(z, key, strength):
    """Each pair of rows half the kernel apart agrees up to one random sign, in that share of the columns."""
    half = z.shape[0] // 2
    sign = jax.random.rademacher(key, (half, 1), z.dtype)
    columns = jnp.arange(z.shape[1]) < round(strength * z.shape[1])
    return z.at[half : 2 * half].set(jnp.where(columns[None, :], sign * z[:half], z[half : 2 * half]))


def _few_keys(strength: float) -> Init:
    """Only the lowest bits of the key are used."""
    bits = round(2 ** (20 - 18 * strength))

    def init(key, shape, dtype):
        return good(jax.random.key(jax.random.key_data(key)[..., -1] % bits), shape, dtype)

    return init


def _same_key(strength: float) -> Init:
    """The key decides that share of the variance only."""

    def init(key, shape, dtype):
        own, fixed = good(key, shape, dtype), good(jax.random.key(5), shape, dtype)
        return math.sqrt(1 - strength) * own + math.sqrt(strength) * fixed

    return init


def _low_precision_sampling(strength: float) -> Init:
    """Sampled in bfloat16 as `jax.nn.initializers` does, in that share of the rows; then cast."""

    def init(key, shape, dtype):
        coarse = truncated(key, shape, jnp.bfloat16).astype(dtype)
        fine = truncated(key, shape, jnp.float32).astype(dtype)
        return jnp.where(jnp.arange(shape[0])[:, None] < round(strength * shape[0]), coarse, fine)

    return init


def _truncation_constant(strength: float) -> Init:
    def init(key, shape, dtype):
        return truncated(key, shape, dtype) * jnp.asarray(0.87962566103423978**strength, dtype)

    return init


def _uniform(factor: float) -> Callable[[float], Init]:
    def make(strength: float) -> Init:
        def init(key, shape, dtype):
            bound = math.sqrt(3 / np.prod(shape[:-1])) * factor**strength
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return init

    return make


BROKEN = [
    Broken("fans swapped", _variance(lambda s, shape: (shape[0] / shape[1]) ** s), ("second_moment",), 0.02),
    Broken("receptive field dropped", _variance(lambda s, shape: 9.0**s), ("second_moment",), 0.007, shape=(3, 3, 32, 16)),
    Broken("truncation constant missing", _truncation_constant, ("second_moment",), 0.05, {"distribution": "truncated_normal"}),
    Broken("truncation constant missing, law unnamed", _truncation_constant, ("second_moment",), 0.06, {}),
    Broken("√3 off", _uniform(3**-0.5), ("second_moment",), 0.01, {"distribution": "uniform"}),
    Broken("scale off by √2", _variance(lambda s, shape: 2 ** (s / 2)), ("second_moment",), 0.04),
    Broken("variance taken for deviation", _variance(lambda s, shape: (1 / shape[0]) ** s), ("second_moment",), 0.003),
    Broken("mean shift", _change(lambda z, key, s: z + 0.1 * s), ("mean",), 0.12),
    Broken("mean shift, law unnamed", _change(lambda z, key, s: z + 0.1 * s), ("mean",), 0.12, {}),
    Broken("sampled in bfloat16", _low_precision_sampling, ("mean",), 0.7, {}),
    Broken(
        "sampled in bfloat16, law named",
        _low_precision_sampling,
        ("collisions", "distribution"),
        0.15,
        {"distribution": "truncated_normal"},
    ),
    Broken("common part in columns", _change(_common(0)), ("output_second_moment",), 0.01),
    Broken("common part in rows", _change(_common(1)), ("output_second_moment",), 0.01),
    Broken("smoothed", _change(_smoothed), ("autocorrelation",), 0.03),
    Broken("duplicated rows", _change(_twins), ("paired_slices",), 0.011),
    Broken("tiled", _change(_tiled), ("autocorrelation", "collisions"), 0.2),
    Broken("columns centred", _change(_centred), ("output_second_moment",), 0.2),
    Broken("antithetic rows", _change(_antithetic), ("autocorrelation", "output_second_moment"), 0.05),
    Broken("rows equal up to sign", _change(_random_signs), ("paired_slices",), 0.5),
    Broken("sign bias", _change(_sign_bias), ("mean",), 0.015),
    Broken("wrong law", _change(_wrong_law), ("distribution",), 0.2),
    Broken("heavy tail", _change(_heavy_tail), ("distribution", "extremes"), 0.02),
    Broken("coarse grid", _change(_coarse), ("distribution", "collisions"), 4e-5),
    Broken("NaN", _change(_nan), ("finite",), 0.035),
    Broken("rows of unequal scale", _change(_row_scales), ("slice_second_moments",), 0.4),
    Broken("dead column", _change(_dead_column), ("slice_second_moments",), 0.1),
    Broken("scale common to a draw", _change(_draw_scale), ("slice_second_moments",), 0.1),
    Broken("few keys", _few_keys, ("paired_slices", "collisions", "autocorrelation"), 0.8),
    Broken("key ignored in part", _same_key, ("output_second_moment",), 0.02),
]
