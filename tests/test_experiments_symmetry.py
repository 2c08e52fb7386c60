"""The tied net: equal units stay equal to the bit, dropout and chance part them; logistic regression has one optimum."""

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from experiments import symmetry
from experiments.lab import data
from experiments.nets.tied_units import OPTIMIZERS, Setting, distance, in_order, spread, start, train

SAMPLES = data.synthetic(samples=64, shape=(4, 4), classes=3)
X, LABELS = jnp.asarray(SAMPLES.features), jnp.asarray(SAMPLES.labels)


def test_equal_units_stay_equal_to_the_bit_and_dropout_parts_them():
    inits = [vs.constant(0.1)] * 3 + [vs.zeros, vs.constant(0.1), vs.glorot_uniform()]
    params = [start(jax.random.key(seed), init, 16) for seed, init in enumerate(inits)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    settings = Setting(jnp.array([0, 1, 2, 0, 0, 0]), jnp.array([False, False, False, False, True, False]))
    orders = jnp.tile(jnp.arange(16), (6, 20, 1))
    keys = jax.random.split(jax.random.key(7), (6, 20))
    states = jax.vmap(OPTIMIZERS["gradient descent"].init)(params)
    trained, _, losses, spreads = train(params, states, settings, orders, keys, X, LABELS, optimizer="gradient descent")
    for series in spreads:
        assert not np.any(series[:4])
        assert np.all(series[4:, 3:] > 0)
    assert not np.any(trained["dense_0"]["kernel"][3])  # zeros do not even move
    assert np.any(trained["dense_0"]["kernel"][0] != params["dense_0"]["kernel"][0])  # a constant does
    assert losses.shape == (6, 20)


def test_in_order_is_the_matrix_product():
    kernel, x = jax.random.normal(jax.random.key(0), (16, 10)), X.T
    np.testing.assert_allclose(in_order(kernel, x), kernel.T @ x, rtol=1e-4, atol=1e-5)


def test_spread_and_distance_see_one_unit_that_differs():
    params = start(jax.random.key(0), vs.constant(0.5), 16)
    assert float(spread(params)) == float(distance(params)) == 0
    params["dense_1"]["kernel"] = params["dense_1"]["kernel"].at[2, 3].add(0.25)
    assert float(spread(params)) == 0.25
    assert float(distance(params)) == 0  # the others are equal still
    assert float(distance(start(jax.random.key(0), vs.normal(1.0), 16))) > 0


def test_logistic_regression_has_one_optimum():
    # optax's line search mixes dtypes, which the strict session forbids.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.asarray(SAMPLES.features, jnp.float64)
        ends = []
        for value in (0.0, 1.0):
            params = {"kernel": jnp.full((16, 3), value), "bias": jnp.zeros(3)}
            ends.append(symmetry.solve(params, x, LABELS)[1])
    assert abs(float(ends[0][-1] - ends[1][-1])) < 1e-9
    assert float(ends[1][0] - ends[1][-1]) > 0.1  # it had a way to go
