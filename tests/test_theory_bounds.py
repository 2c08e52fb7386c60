"""What a prediction may not claim: moments that no array has, terms taken for uncorrelated, doubts that cancel."""

from __future__ import annotations

import jax
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


WIDTH = 64
X = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)


def kernels(n):
    """Independent square kernels of variance 1/width."""
    return lambda key: tuple(jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in jax.random.split(key, n))


def ranked(p, x):
    """Two independent projections in rising order: nearly equal, of which theory knows nothing."""
    return tuple(jnp.sort(x @ w, -1) for w in p)


def test_terms_that_may_be_equal_are_in_doubt():
    """Equal ones have E[(u + v)²] = 4, E[(u − v)²] = 0 and E[u²v²] = 3 where 2, 2 and 1 are predicted of unrelated ones."""
    for f, doubt in ((jnp.add, 1.0), (jnp.subtract, 1.0), (jnp.multiply, 2.0)):
        row = output(lambda p, x, f=f: f(*ranked(p, x)), X, params=kernels(2))
        assert row.how == "assumed"
        assert doubt <= row.confidence < doubt + 0.5
    slight = output(lambda p, x: 10 * ranked(p, x)[0] + 0.1 * ranked(p, x)[1], X, params=kernels(2))
    alone = output(lambda p, x: ranked(p, x)[0], X, params=kernels(1))
    assert slight.confidence == pytest.approx(alone.confidence + 0.02, abs=2e-3)  # 2 · 10 · .1 / 100


def test_what_is_read_again_is_as_doubtful_as_the_first_time():
    """Both of a sum and a difference rest on one cross-moment."""
    both = lambda u, v, *more: [sum(more, u + v), sum(more, u - v)]  # noqa: E731
    for f in (lambda p, x: both(*ranked(p, x)), lambda p, x: both(*ranked(p, x), x @ p[0])):
        one, other = vs.predict(f, X, params=kernels(2), backward=False).rows[:2]
        assert one.confidence == pytest.approx(other.confidence, rel=1e-3)
        assert one.confidence > 0.5
        assert one.how == other.how == "assumed"


def test_doubts_of_unrelated_roots_do_not_cancel():
    """A numerator is as doubtful over a denominator that rises as it does."""

    def quotient(p, x, y):
        return jnp.sort(x @ p[0], -1) * jax.lax.rsqrt(jnp.sort(y @ p[1], -1) ** 2 + 1)

    alone = output(lambda p, x: jnp.sort(x @ p[0], -1), X, params=kernels(1))
    assert alone.confidence > 0.15
    assert output(quotient, X, X, params=kernels(2)).confidence > 1.2 * alone.confidence


def test_doubt_grows_where_terms_cancel():
    """Of numbers with mean 5 and variance 1 an error of 15 % in E[x²] = 26 may be one of 390 % in what is left of them."""
    row = output(lambda p, x: (lambda y: y - y.mean(-1, keepdims=True))(jnp.sort(x @ p[0] + 5, -1)), X, params=kernels(1))
    assert row.confidence > 3.5
