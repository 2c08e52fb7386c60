"""`predict(draws=n)`: networks drawn and measured beside the prediction. The draws are those of one fixed key."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs
from varscale.programs import faces
from varscale.theory.interpreter.draws import beside_draws

INPUT = jax.ShapeDtypeStruct((32, 64), jnp.float32)
COUNT = 40


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, kernel_init=vs.he_normal())(x))
        x = nn.Dropout(0.2, deterministic=False)(x)
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def report():
    return vs.predict(Net(), INPUT, draws=COUNT)


def test_a_right_prediction_holds_in_every_row(report):
    # Fixed draws; a sound row misses 4 standard errors once in 16000 times.
    assert [row.path for row in report.rows] == ["Dense_0", "Dropout_0", "Dense_1", ""]
    assert all(row.holds and row.gradient_holds for row in report.rows)
    assert all(abs(row.measured / row.second_moment - 1) < 0.1 for row in report.rows)
    assert np.mean([row.draws_in_band for row in report.rows]) > 0.9


def test_inputs_are_drawn_anew(report):
    # Relative variance over weights and inputs; of the weights alone it would be less than half of it.
    n, batch, m = 64, 32, 128
    expected = np.sqrt((2 * (1 / n + 1 / batch) / m + 2 / (n * batch)) / COUNT)
    assert report["Dense_0"].measured_error / report["Dense_0"].measured == pytest.approx(expected, rel=0.25)


def test_a_wrong_prediction_does_not_hold(report):
    factor = 1.4
    wrong = tuple(
        dataclasses.replace(row, second_moment=factor * row.second_moment, gradient=factor * row.gradient)
        for row in report.rows
    )
    found = beside_draws(dataclasses.replace(report, rows=wrong), Net(), faces.as_inputs(INPUT), None, COUNT, None)
    assert not any(row.holds for row in found.rows)
    assert not any(row.gradient_holds for row in found.rows if row.path)


def test_the_table_and_json_hold_what_was_measured(report):
    text = report.table(200)
    assert "Drawn networks: the prediction holds in 4 of 4 rows, of gradients in 4 of 4" in text
    assert "standard" in text
    assert vs.Report.from_json(report.to_json()) == report


def test_moments_are_drawn_with_their_correlation():
    # Samples that are alike to .9 keep the mean over samples: the first layer's outputs have correlation .9 too.
    moments = vs.Moments(1.0, 2.0, (16, 64), sample_correlation=0.9)
    found = vs.predict(lambda rngs: nnx.Linear(64, 128, rngs=rngs), moments, draws=COUNT)
    assert found.output.holds
    assert found.output.measured == pytest.approx(2.0, rel=0.1)


def test_laws_given_for_a_plain_function():
    laws = {"w": vs.Moments(0.0, 0.5, (64, 32))}
    found = vs.predict(lambda p, x: x @ p["w"], INPUT, params=laws, draws=COUNT)
    assert found.output.holds
    assert found.output.measured == pytest.approx(32.0, rel=0.1)


def test_ids_are_drawn_from_the_table_they_are_looked_up_in():
    net = nn.Sequential([nn.Embed(50, 16), nn.Dense(8)])
    found = vs.predict(net, jax.ShapeDtypeStruct((4, 8), jnp.int32), draws=COUNT)
    assert all(row.holds for row in found.rows)


@pytest.mark.parametrize("draws", [0, 1, -3, 2.5, True, "many"])
def test_a_count_that_is_none_is_refused(draws):
    with pytest.raises(ValueError, match="draws must be None or a whole number"):
        vs.predict(Net(), INPUT, draws=draws)


def test_given_arrays_are_refused():
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="draws needs parameters that are drawn"):
        vs.predict(model, INPUT, draws=4)


def test_whole_numbers_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="draws needs inputs of whole numbers as arrays"):
        vs.predict(
            nn.Sequential([lambda i: i.astype(jnp.float32), nn.Dense(4)]), jax.ShapeDtypeStruct((4, 8), jnp.int32), draws=4
        )


def test_a_model_too_large_is_noted(report, monkeypatch):
    monkeypatch.setattr("varscale.theory.interpreter.draws.MOST_BYTES", 1000)
    found = vs.predict(Net(), INPUT, draws=4)
    assert found["Dense_0"].measured is None
    assert "No networks drawn" in found.notes[-1]


def test_trust_tells_shares_by_error_bound(report):
    assert (report.trust.rows, report.trust.near, report.trust.flagged, report.trust.gradients) == (4, 1.0, 0.0, 4)
    assert str(report.trust) in report.table(120)
    assert dataclasses.replace(report, rows=()).trust is None
