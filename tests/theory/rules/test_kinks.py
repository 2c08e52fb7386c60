"""Derivatives at kinks: at numbers that are exactly zero they are JAX's own, whichever way a function is written.

Agreement is asked for to what a grid leaves of the jump of a clipped slope; on another side of a kink they are half as large.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs

WIDTH, SAMPLES, PADDED = 16, 8, 4
FUNCTIONS = {
    "relu": nn.relu,
    "maximum": lambda x: jnp.maximum(x, 0.0),
    "minimum": lambda x: jnp.minimum(0.0, x),
    "clip": lambda x: jnp.clip(x, 0.0, 1.0),
    "clamp": lambda x: jax.lax.clamp(0.0, x, 1.0),
    "abs": jnp.abs,
    "leaky relu": nn.leaky_relu,
    "relu6": nn.relu6,
    "elu": nn.elu,
    "softplus": nn.softplus,
    "chosen": lambda x: jnp.where(x > 0, x, 0.0),
}
every_function = pytest.mark.parametrize("f", [pytest.param(f, id=name) for name, f in FUNCTIONS.items()])


class At(nn.Module):
    """A row of zeros, or of zeros and others, is read by a function, and that by a layer that keeps the scale of gradients."""

    f: object
    zeros: str

    @nn.compact
    def __call__(self, x):
        if self.zeros == "layer":
            made = nn.Dense(WIDTH, kernel_init=nn.initializers.zeros, name="row")(x)
        elif self.zeros == "input":
            made = nn.Dense(WIDTH, name="row")(jnp.zeros_like(x))
        elif self.zeros == "embedded":
            made = nn.Embed(SAMPLES, WIDTH, embedding_init=nn.initializers.zeros, name="row")(jnp.arange(SAMPLES))
            made = jnp.concatenate([nn.Dense(WIDTH)(x), made])
        elif self.zeros == "padded":
            made = Padded(name="row")(nn.Dense(WIDTH)(x))
        else:
            made = Rectified(name="row")(nn.Dense(WIDTH)(x))
        return nn.Dense(WIDTH)(self.f(made))


class Padded(nn.Module):
    def __call__(self, x):
        return jnp.pad(x, ((0, PADDED), (0, 0)))


class Rectified(nn.Module):
    def __call__(self, x):
        return nn.relu(x)


def gradient(f, zeros):
    return vs.predict(At(f, zeros), jax.ShapeDtypeStruct((SAMPLES, WIDTH), jnp.float32))["row"].gradient


@every_function
@pytest.mark.parametrize("zeros", ["layer", "input", "embedded"])
def test_a_row_of_zeros(f, zeros):
    assert gradient(f, zeros) == pytest.approx(float(jax.grad(f)(0.0)) ** 2, rel=0.02, abs=1e-6)


@every_function
def test_places_that_are_padded_and_units_that_are_off(f):
    """Standard normal numbers are half of those that a rectifier lets pass."""
    slope = jax.vmap(jax.grad(f))
    at_zero, z = float(jax.grad(f)(0.0)) ** 2, jax.scipy.special.ndtri(jnp.linspace(0.0, 1.0, 20002)[1:-1])
    everywhere, above = (float(jnp.mean(slope(x) ** 2)) for x in (z, z[z > 0]))
    padded = (SAMPLES * everywhere + PADDED * at_zero) / (SAMPLES + PADDED)
    assert gradient(f, "padded") == pytest.approx(padded, rel=0.025, abs=1e-6)
    assert gradient(f, "rectified") == pytest.approx((at_zero + above) / 2, rel=0.025, abs=1e-6)


def test_given_numbers_that_a_function_leaves_as_they_are():
    """No gradient is known of what given numbers are computed from, also where a rectifier leaves one-hot ones as they are."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH)(nn.relu(Padded(name="row")(x)))

    assert vs.predict(Net(), jnp.eye(WIDTH))["row"].gradient is None
