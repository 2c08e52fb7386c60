"""Products and sums of what shares its terms, against Monte Carlo of the function itself.

Error rates: 2²⁰ draws with a fixed key; second moments are asked for within the stated error bound and four standard errors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import varscale as vs

SIZE = 1 << 12


def skip_of_a_sum(a, b):
    """relu(a) is in both terms."""
    return (nn.relu(a) + nn.relu(b)) + nn.relu(a)


def difference_of_a_sum(a, b):
    """This is −relu(b)."""
    return (nn.relu(a) - nn.relu(b)) - nn.relu(a)


@pytest.mark.parametrize("f", [skip_of_a_sum, difference_of_a_sum])
def test_second_moments(f):
    struct = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    row = vs.predict(lambda params, a, b: f(a, b), vs.inputs(struct, struct), params={}, backward=False).output
    squares = np.asarray(f(*jax.random.normal(jax.random.key(0), (2, 1 << 20)))) ** 2
    error = squares.std() / squares.mean() / 1024
    assert abs(row.second_moment / squares.mean() - 1) <= row.error_bound + 4 * error
    assert row.error_bound <= 0.1


def test_a_gate_of_few_terms_varies():
    """Squeeze and excitation of a sum of two: its gate is not taken for its mean."""

    def f(params, a, b):
        s = nn.relu(a) + nn.relu(b)
        return nn.sigmoid(s @ params["w"])

    struct = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    init = lambda key: {"w": jax.random.normal(key, (256, 256)) / 16}  # noqa: E731
    row = vs.predict(f, vs.inputs(struct, struct), params=init, backward=False).output

    def one(key):
        k_w, k_a, k_b = jax.random.split(key, 3)
        return jnp.mean(f(init(k_w), jax.random.normal(k_a, struct.shape), jax.random.normal(k_b, struct.shape)) ** 2)

    squares = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(0), 50)))
    error = squares.std() / squares.mean() / 7
    assert abs(row.second_moment / squares.mean() - 1) <= row.error_bound + 4 * error
