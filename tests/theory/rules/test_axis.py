"""Cumulative sums and joined arrays against what is known exactly, and a rule for a primitive of one's own."""

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


INPUT = jax.ShapeDtypeStruct((4, 16), jnp.float32)


def output_of_two(f):
    """The prediction for a function of two products that have the input in common: position i of one part and i of another."""
    init = lambda key: jax.random.normal(key, (2, 16, 16)) / 4  # noqa: E731
    return vs.predict(lambda w, x: f(x @ w[0], x @ w[1]), INPUT, params=init, backward=False).output


@pytest.mark.parametrize(
    ("parts", "axis", "whole"),
    [
        pytest.param(lambda h, g: [h, h], 1, lambda h, g: 2 * h, id="twice"),
        pytest.param(lambda h, g: [h, -h], 1, lambda h, g: 0 * h, id="cancels"),
        pytest.param(lambda h, g: [jax.nn.relu(h), jax.nn.relu(-h)], 1, lambda h, g: jnp.abs(h), id="both signs"),
        pytest.param(lambda h, g: [h, g, h], 0, lambda h, g: 2 * h + g, id="along the samples"),
        pytest.param(lambda h, g: [h, g] * 4, 1, lambda h, g: 4 * (h + g), id="many in turn"),
        pytest.param(lambda h, g: [h, g, -h, g, g, g, g, h], 1, lambda h, g: h + 5 * g, id="many out of turn"),
    ],
)
def test_a_sum_over_joined_parts_is_the_sum_of_their_sums(parts, axis, whole):
    """The law of |h| is an integral with a corner; taking equal positions for unrelated ones is off by 2 or more."""
    joined = output_of_two(lambda h, g: jnp.concatenate(parts(h, g), axis).sum(axis))
    summed = output_of_two(lambda h, g: whole(h, g).sum(axis))
    assert joined.second_moment == pytest.approx(summed.second_moment, rel=0.005, abs=1e-9)


def test_so_many_parts_that_not_every_pair_is_computed_are_drawn():
    """Of 30 parts half are the opposites of the others: the truth is 0."""
    found = output_of_two(lambda h, g: jnp.concatenate([h, -h] * 15, 1).sum(1))
    assert (found.how, found.second_moment) == ("sampled", pytest.approx(0.0, abs=1e-6))
