"""What a prediction may not claim: moments that no array has, terms taken for uncorrelated, doubts that cancel."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import varscale as vs

NONE = {"w": jnp.zeros(1)}


def output(f, *inputs, params=NONE, **kwargs):
    """The last row of a function of parameters and inputs."""
    return vs.predict(f, vs.inputs(*inputs), params=params, backward=False, **kwargs).output


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 64, 3)])
def test_positions_are_correlated_along_every_axis(shape, mean):
    """The mean of 64 positions has E[m²] = ρ q + (1 − ρ) q / 64."""
    given = vs.Moments(mean, 1.0, shape, position_correlation=0.9)
    row = output(lambda _, x: x.mean(axis=tuple(range(1, len(shape) - 1))), given)
    assert row.second_moment == pytest.approx(0.9 + 0.1 / 64, rel=1e-6)


def test_samples_and_positions_may_be_correlated_at_once():
    """About the mean .5 the correlations are .6 and .8: of two positions of two samples .48."""
    q, square = 1.0, 0.25
    given = vs.Moments(0.5, q, (16, 64, 3), sample_correlation=(0.25 + 0.6 * 0.75), position_correlation=(0.25 + 0.8 * 0.75))
    row = output(lambda _, x: x.mean(axis=(0, 1)), given)
    expected = square + 0.75 * (1 / 16 + 15 / 16 * 0.6) * (1 / 64 + 63 / 64 * 0.8)
    assert row.second_moment == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["sample_correlation", "position_correlation"])
def test_correlations_that_no_numbers_have_are_refused(name):
    shape = (4, 2, 2, 3)
    with pytest.raises(ValueError, match=rf"{name} of 4 entries .* \[-0\.333333, 1\], not -0\.5"):
        vs.Moments(0.0, 1.0, shape, **{name: -0.5})
    with pytest.raises(ValueError, match=rf"{name} of 4 entries .* \[0\.3, 1\], not 0\.2"):
        vs.Moments(0.475**0.5, 1.0, shape, **{name: 0.2})
    least = vs.Moments(0.0, 1.0, shape, **{name: -1 / 3})
    summed = 0 if name == "sample_correlation" else (1, 2)
    assert output(lambda _, x: x.mean(axis=summed), least).second_moment == pytest.approx(0, abs=1e-9)
