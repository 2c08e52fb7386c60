"""Cumulative sums against their exact moments, and a rule for a primitive of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

STEPS, WIDTH = 6, 16


def program(reverse):
    def f(w, x):
        y = jax.lax.cumsum(x, axis=1, reverse=reverse)
        return {"sum": y, "beside": y + x, "out": jnp.tanh(y) @ w}

    return f


@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_sums(reverse):
    """Of independent x with E[x²] = 1 the p-th sum has E[y²] = p and E[y x] = 1: 3.5 and 3.5 + 2 + 1 on average over 6."""
    given = vs.inputs(jax.ShapeDtypeStruct((4, STEPS, WIDTH), jnp.float32))

    def init(key):
        return jax.random.normal(key, (WIDTH, WIDTH)) / 4

    def output(name):
        return vs.predict(lambda w, x: program(reverse)(w, x)[name], given, params=init).output

    assert output("sum").second_moment == pytest.approx(3.5, rel=1e-9)
    assert output("beside").second_moment == pytest.approx(6.5, rel=1e-9)
    z = np.linspace(-8, 8, 4001)
    squares = [np.average(np.tanh(np.sqrt(p) * z) ** 2, weights=np.exp(-(z**2) / 2)) for p in range(1, STEPS + 1)]
    assert output("out").second_moment == pytest.approx(np.mean(squares), rel=1e-3)


def test_gradients_of_a_cumulative_sum():
    """Each input feeds the sums from its own on: E[g²] = 6, 5, ..., 1 for independent gradients of mean square 1."""
    given = vs.inputs(jax.ShapeDtypeStruct((4, STEPS, WIDTH), jnp.float32))

    def f(params, x):
        with jax.named_scope("input"):
            x = x * 1.5
        return jax.lax.cumsum(x, axis=1)

    report = vs.predict(f, given, params={})
    assert report["input"].gradient == pytest.approx(3.5, rel=1e-6)
