"""Gradients of values that a cotangent reaches by two paths, held against drawn networks."""

import jax
import jax.numpy as jnp
import pytest

import varscale as vs

INPUT = jax.ShapeDtypeStruct((32, 64), jnp.float32)
WEIGHTS = {name: vs.Moments(0.0, 1 / 64, (64, 64)) for name in ("m", "h")}


def kl(m, h):
    return -0.5 * jnp.sum(1 + h - m**2 - jnp.exp(h), -1)


def highway(m, h):
    gate = jax.nn.sigmoid(h)
    return gate * jax.nn.relu(m) + (1 - gate) * jax.nn.relu(m[:, ::-1])


FUNCTIONS = {
    "through a function, subtracted": lambda m, h: (m + h) - jnp.exp(h),
    "through a function, added": lambda m, h: m + h + jax.nn.relu(h),
    "through means": kl,
    "a gate": highway,
    "through a sum inside a function": lambda m, h: h + jax.nn.relu(m + h),
    "through two sums": lambda m, h: jnp.tanh((m + h) + (h + m[:, ::-1])),
    "two functions": lambda m, h: jnp.tanh(h) * m + jax.nn.relu(h) * m[:, ::-1],
}
BESIDE_REDUCTIONS = {
    "mean": lambda m, h: h + 3 * h.mean(-1, keepdims=True),
    "log sum exp": lambda m, h: jax.nn.log_softmax(h[:, :4]),
    "largest": lambda m, h: h[:, :4] - h[:, :4].max(-1, keepdims=True),
}


def predicted(function):
    """The row of h."""

    def net(p, x):
        with jax.named_scope("m"):
            m = x @ p["m"]
        with jax.named_scope("h"):
            h = x @ p["h"]
        return function(m, h)

    return vs.predict(net, INPUT, params=WEIGHTS, draws=60)["h"]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_of_paths_that_meet_are_correlated(function):
    # Fixed draws: a sound row misses its bound and four standard errors once in 16000 times; each of these was off by a third
    # at least where paths were taken for independent.
    row = predicted(function)
    assert row.gradient_holds
    assert row.gradient == pytest.approx(row.measured_gradient, rel=0.15)


@pytest.mark.parametrize("function", BESIDE_REDUCTIONS.values(), ids=BESIDE_REDUCTIONS)
def test_gradients_beside_reductions_are_in_doubt(function):
    assert predicted(function).gradient_holds
