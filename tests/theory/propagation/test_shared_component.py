"""What places have in common fluctuates by itself: nets that average over places, and convolutions that read few channels.

For 400 drawn nets, the typical mean square of every layer lies within its stated error bound and four standard errors of the
measured one (error rate below 1e-4 a row), and the 99 % band holds at least 97 % of draws (four binomial deviations; 3e-5 a
row, were the law known). That it has power: with all of a mean square moving as one, heads were typically 30 % (depthwise), 5 %
(a mean over tokens) and −74 % (a pool of eight channels, its law taken for lognormal) off, and bands held 92 %.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.propagation import shared_component as common_part

DRAWS = 400
he = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
Conv = functools.partial(nn.Conv, kernel_init=he)


class Pooled(nn.Module):
    """Few channels, two levels of pictures."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(Conv(8, (3, 3))(x))
        x = nn.relu(Conv(16, (3, 3))(nn.avg_pool(x, (2, 2), (2, 2))))
        return nn.Dense(10)(x.mean((1, 2)))


class Separable(nn.Module):
    """Depthwise convolutions between pointwise ones."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(Conv(32, (3, 3))(x))
        for _ in range(2):
            x = nn.relu(Conv(32, (3, 3), feature_group_count=32)(x))
            x = nn.relu(Conv(32, (1, 1))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Bag(nn.Module):
    """A function of every token, and their mean."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.gelu(nn.Dense(64, kernel_init=he)(x))
        return nn.Dense(10)(nn.gelu(nn.Dense(64, kernel_init=he)(x.mean(1))))


def _squares(model: nn.Module, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    def one(key: jax.Array) -> dict[str, jax.Array]:
        own, data = jax.random.split(key)
        x = jax.random.normal(data, shape)
        _, state = model.apply(model.init(own, x), x, capture_intermediates=True)
        return {name: jnp.mean(y["__call__"][0] ** 2) for name, y in state["intermediates"].items() if name != "__call__"}

    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(jax.random.split(jax.random.key(5), DRAWS))
    return {name: np.asarray(x, float) for name, x in found.items()}


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Pooled(), (8, 8, 8, 3)), (Separable(), (8, 8, 8, 3)), (Bag(), (8, 16, 32))],
    ids=["pool", "depthwise", "bag"],
)
def test_typical_sizes_and_bands_of_averages(model: nn.Module, shape: tuple[int, ...]) -> None:
    with jax.numpy_dtype_promotion("standard"):  # flax divides a window's sum by an integer
        report = vs.predict(model, jax.ShapeDtypeStruct(shape, jnp.float32), backward=False)
        measured = _squares(model, shape)
    for name, squares in measured.items():
        row, logs = report[name], np.log(squares)
        off = np.log(row.typical) - logs.mean()
        assert abs(off) < np.log1p(row.error_bound) + 4 * logs.std() / np.sqrt(DRAWS), name
        assert np.mean((squares >= row.band[0]) & (squares <= row.band[1])) >= 0.97, name


def test_a_channel_scaled_has_the_scale_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    mean, own = rng.normal(size=(64, 2)), rng.random((64, 2))
    channels = common_part.Channels(mean, mean**2 + own, 8, np.zeros((2, 2)))
    for asked in ((3.0, 1.0), (2.0, 1.9)):
        given = channels.of(*asked)
        assert np.allclose(given.totals(), asked)
        assert np.allclose([np.mean(given.own) + np.mean(given.mean**2), np.mean(given.mean**2)], asked)
    for _ in range(50):  # places that share all but rounding: K − C is as often below 0 as above
        rounded = channels._replace(square=mean**2 + 1e-16 * rng.normal(size=mean.shape))
        assert np.allclose(rounded.of(3.0 + 1e-9, 3.0).square, 3.0 * mean**2 / np.mean(mean**2), atol=1e-6)


def test_hundreds_of_layers_before_an_average() -> None:
    """From an average back to the input it is no recursion: Python's stack holds a thousand calls."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(400):
                x = nn.tanh(nn.Dense(8)(x))
            return x.mean(1)

    report = vs.predict(Deep(), jax.ShapeDtypeStruct((2, 4, 8), jnp.float32), backward=False)
    assert 0 < report.output.second_moment < report["Dense_0"].second_moment
