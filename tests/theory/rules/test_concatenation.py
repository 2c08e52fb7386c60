"""Arrays joined along an axis: what position i of one part has to do with position i of another, against sums known exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import varscale as vs

INPUT = jax.ShapeDtypeStruct((4, 16), jnp.float32)


def output(f):
    """The prediction for a function of two products that have the input in common."""
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
    joined = output(lambda h, g: jnp.concatenate(parts(h, g), axis).sum(axis))
    summed = output(lambda h, g: whole(h, g).sum(axis))
    assert joined.second_moment == pytest.approx(summed.second_moment, rel=0.005, abs=1e-9)


def test_so_many_parts_that_not_every_pair_is_computed_are_drawn():
    """Of 30 parts half are the opposites of the others: the truth is 0."""
    found = output(lambda h, g: jnp.concatenate([h, -h] * 15, 1).sum(1))
    assert (found.how, found.second_moment) == ("sampled", pytest.approx(0.0, abs=1e-6))
