"""What the experiments compute, at sizes of a second: against NumPy, against `varscale.gaussian`, and end to end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import low_precision, normalization, numerical_stability
from experiments.activation_statistics import comparison, layer_statistics
from experiments.lab.claims import LEVEL
from experiments.lab.experiment import Run, Settings
from experiments.lab.mean_field import propagate
from experiments.lab.published import NARROW, WIDE, agreement
from experiments.lab.training import fit, minibatches
from experiments.nets import activation_laws
from experiments.nets.activation_nets import ACTIVATIONS, EXACT_GAINS, GUESS, Outcome
from experiments.nets.normalization_formulas import formula_errors
from varscale import gaussian


def test_mean_field_agrees_with_gaussian():
    which, variance = jnp.arange(len(ACTIVATIONS)), 1.7
    forward, slope = propagate(tuple(ACTIVATIONS.values()), which, jnp.full(7, 2.0), jnp.full(7, variance), depth=2)
    for n, f in enumerate(ACTIVATIONS.values()):
        np.testing.assert_allclose(forward[n, 1], 2 * gaussian.second_moment(f, variance=variance), rtol=1e-5)
        np.testing.assert_allclose(slope[n, 0], 2 * gaussian.derivative_second_moment(f, variance=variance), rtol=1e-5)


def test_exact_gains_are_the_expectations():
    for name, value in EXACT_GAINS.items():
        np.testing.assert_allclose(gaussian.second_moment(ACTIVATIONS[name]), 1 / value**2, rtol=1e-9)


def test_layer_statistics_are_those_of_the_net_that_is_described():
    """Two laws, two scales, two activations from one program; the law's own second moment in the first layer within 6 sigma."""
    stds, relus = jnp.array([0.1, 0.3, 0.3]), jnp.array([0, 0, 1])
    for uniform in (False, True):
        got = layer_statistics(jax.random.key(1), uniform, stds, relus, width=100, depth=2, batch=50)
        assert got.mean.shape == (3, 2)
        for n, (std, relu) in enumerate(zip(stds, relus, strict=True)):
            f = jax.nn.relu if relu else jnp.tanh
            expected = gaussian.second_moment(f, variance=float(100 * std**2))
            # 5000 outputs of 100 shared columns: relative standard deviation below √(5/5000 + 2/5000 + 2/5000) ≈ 4.3 %
            np.testing.assert_allclose(got.second_moment[n, 0], expected, rtol=0.26)


def test_published_agreement_is_a_prediction_interval():
    """A value drawn like the others is rejected at 4 standard deviations in less than 1 % of cases; one 10 away always is."""
    rng = np.random.default_rng(0)
    far = [agreement(rng.normal(), rng.normal(size=30), 1e-6).value > 4 for _ in range(300)]
    assert np.mean(far) < 0.01
    assert agreement(10.0, rng.normal(size=30), 1e-6).low > 4
    assert agreement(0.5, np.full(5, 0.5004), 1e-3).value == 0.0  # equal to the printed digits
    assert LEVEL == 0.99


def test_published_tables_are_whole():
    assert all(len(net.published_std) == NARROW.depth for net in NARROW.nets)
    assert [len(net.published_std) for net in WIDE.nets] == [6, 3, 6, 0, 0]


def test_one_seed_leaves_published_values_open():
    shape = (1, len(NARROW.nets), NARROW.depth)
    table = comparison(NARROW, {"mean": np.zeros(shape), "variance": np.ones(shape)})
    assert {row[-1] for row in table.rows} == {"open"}


def test_matrix_products_are_products():
    key, init = jax.random.key(0), jax.nn.initializers.normal(1.0)
    got = numerical_stability.matrix_products(key[None], init=init, width=4, steps=5)[0]
    product = np.eye(4) / 2
    for n, step in enumerate(jax.random.split(key, 5)):
        product = product @ np.asarray(init(step, (4, 4)), np.float64)
        np.testing.assert_allclose(got[n], np.log(np.linalg.norm(product)), rtol=1e-4)


def test_one_layer_has_the_variances_of_the_law():
    got = activation_laws.one_layer(jax.random.key(0), jnp.array([8, 64]), jnp.array([64, 16]), width=64, batch=128)
    expected = np.array([[8, 64], [64, 16]])  # unit weights: fan_in forward, fan_out backward
    np.testing.assert_allclose(got, expected, rtol=0.6)  # 8·64 weights: √(2/512) = 6 % and the batch's share, times 6 and more


def test_chi_square_logarithm():
    np.testing.assert_allclose(activation_laws.log_chi_square(64), stats.loggamma(32, scale=1).mean() - math.log(32), rtol=1e-9)


def test_formulas_are_flaxs():
    with jax.numpy_dtype_promotion("standard"):  # flax keeps running averages in float32 and adds float64 to them
        errors = formula_errors(jax.random.key(3))
    assert max(errors["modules"].max(), errors["running"], errors["inference"]) < normalization.ROUNDING
    assert errors["wrong"].min() > 0.05


def test_weight_statistics_are_numpys():
    got = low_precision.weight_statistics(jax.random.key(0), law="uniform", side="varscale", shape=(64, 32), dtype=jnp.bfloat16)
    drawn = low_precision.LAWS["uniform", "varscale"](jax.random.key(0), (64, 32), jnp.bfloat16)
    w = np.asarray(drawn, np.float64) / math.sqrt(2 / 64)
    np.testing.assert_allclose(got, [len(np.unique(w)), w.mean(), np.abs(w).max(), np.mean(w**2)], rtol=1e-4, atol=1e-6)


class TestTraining:
    def test_minibatches_are_epochs_without_repetition(self):
        batches = np.asarray(minibatches(jax.random.key(0), 10, 3, 7))
        assert batches.shape == (7, 3)
        for epoch in (batches[:3], batches[3:6]):
            assert len(np.unique(epoch)) == 9
        with pytest.raises(ValueError, match="size is 11"):
            minibatches(jax.random.key(0), 10, 11, 1)

    def test_fit_is_gradient_descent(self):
        import optax

        params, losses = fit(lambda p, target: jnp.square(p - target), optax.sgd(0.25), jnp.array(4.0), jnp.zeros(3))
        np.testing.assert_allclose(losses, [16.0, 4.0, 1.0])
        np.testing.assert_allclose(params, 0.5)

    def test_outcome_takes_the_better_rate_and_survives_divergence(self):
        steps = np.arange(60)
        falling = np.where(steps < 30, GUESS, 0.1)
        losses = np.stack([[[falling]], [[np.full(60, np.nan)]]], axis=1)  # (1 setting, 2 rates, 1 seed, 60 steps)
        outcome = Outcome.of(losses)
        assert outcome.best.tolist() == [0]
        np.testing.assert_allclose(outcome.final, [[0.1]])
        assert outcome.steps.tolist() == [[36]]  # the first ten in a row with more than half of them low: 26 to 35
        assert Outcome.of(losses[:, 1:]).steps.tolist() == [[60]]


def test_numerical_stability_end_to_end():
    """A tiny run has every claim, table and figure; of the claims, those without chance in them hold."""
    sizes = numerical_stability.Sizes(width=16, depth=4, batch=4)
    result = numerical_stability.run(Run(Settings(seeds=2)), sizes)
    assert len(result.claims) >= 14
    assert [claim.verdict for claim in result.claims if claim.measured.seeds == 0] == ["holds"] * 3
    assert {figure.name for figure in result.figures} == {"sigmoid", "matrix-products", "gradient-norms"}
