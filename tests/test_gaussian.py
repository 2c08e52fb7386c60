"""Expectations under a Gaussian against closed forms: 1e-9 where smooth, 1e-6 where kinked, under any flag and inside jit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varscale import gaussian

RELU_PAIR = {
    rho: (math.sqrt(1 - rho**2) + (math.pi - math.acos(rho)) * rho) / (2 * math.pi) for rho in (-0.999, -0.5, 0.3, 0.9999)
}


@pytest.mark.parametrize("x64", [False, True])
def test_smooth_and_kinked_moments_under_either_flag(x64):
    with jax.enable_x64(x64):
        assert gaussian.second_moment(jnp.exp, 0.3, 0.5) == pytest.approx(math.exp(2 * 0.3 + 2 * 0.5), rel=1e-9)
        assert gaussian.mean(jnp.cos, 0.7, 2.0) == pytest.approx(math.cos(0.7) * math.exp(-1), rel=1e-9)
        # relu at N(m, 1): m·Φ(m) + φ(m), the kink away from every panel border.
        m = 0.7
        cdf, density = 0.5 * math.erfc(-m / math.sqrt(2)), math.exp(-(m**2) / 2) / math.sqrt(2 * math.pi)
        assert gaussian.mean(jax.nn.relu, m) == pytest.approx(m * cdf + density, rel=1e-9)
        assert gaussian.derivative_second_moment(jax.nn.relu, m) == pytest.approx(cdf, rel=1e-9)
        assert gaussian.derivative_second_moment(jax.nn.hard_tanh) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-9)


def test_inside_jit():
    @jax.jit
    def f(x):
        return x * gaussian.second_moment(jax.nn.relu, variance=3.0)

    assert float(f(jnp.float32(2))) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e8])
def test_extreme_variances(variance):
    assert gaussian.second_moment(jax.nn.relu, 0.0, variance) == pytest.approx(variance / 2, rel=1e-9)


def test_a_jump_and_steps():
    assert gaussian.mean(lambda x: jnp.where(x > 0.123, 1.0, 0.0)) == pytest.approx(
        0.5 * math.erfc(0.123 / math.sqrt(2)), rel=1e-8
    )
    expected = sum(0.5 * math.erfc(k / 3 / math.sqrt(2)) for k in range(1, 120)) - sum(
        0.5 * math.erfc(k / 3 / math.sqrt(2)) for k in range(120)
    )
    assert gaussian.mean(lambda x: jnp.floor(3 * x)) == pytest.approx(expected, abs=1e-6)


def test_fast_oscillation_as_in_sirens():
    assert gaussian.second_moment(lambda x: jnp.sin(30 * x)) == pytest.approx(0.5, rel=1e-9)


def test_python_scalar_callables():
    assert gaussian.second_moment(lambda x: max(x, 0.0)) == pytest.approx(0.5, rel=1e-9)
    assert gaussian.mean(math.tanh, 0.4) == pytest.approx(gaussian.mean(jnp.tanh, 0.4), rel=1e-9)


def test_float32_arithmetic_reaches_1e_6():
    narrow = gaussian.second_moment(lambda x: jax.nn.gelu(x.astype(jnp.float32)))
    assert narrow == pytest.approx(gaussian.second_moment(jax.nn.gelu), rel=1e-6)


@pytest.mark.parametrize("rho", RELU_PAIR)
def test_pair_of_relus(rho):
    """Cho & Saul's arc-cosine kernel of degree 1, up to correlations at which a series would need ten thousand terms."""
    assert gaussian.pair(jax.nn.relu, jax.nn.relu, rho) == pytest.approx(RELU_PAIR[rho], abs=1e-9)


def test_pair_of_signs_and_of_sines():
    for rho in (0.5, -0.99):
        assert gaussian.pair(jnp.sign, jnp.sign, rho) == pytest.approx(2 / math.pi * math.asin(rho), abs=1e-9)
        assert gaussian.pair(jnp.sin, jnp.sin, rho) == pytest.approx(math.exp(-1) * math.sinh(rho), rel=1e-9)


def test_pair_at_the_ends():
    for rho, expected in ((1.0, 0.5), (-1.0, 0.0), (0.0, 1 / (2 * math.pi))):
        assert gaussian.pair(jax.nn.relu, jax.nn.relu, rho) == pytest.approx(expected, abs=1e-9)


def test_hermite_series_is_the_pair():
    a = gaussian.hermite_coefficients(jnp.tanh, 60, 0.2, 1.3)
    series = float(np.sum(a**2 * 0.6 ** np.arange(61)))
    assert series == pytest.approx(gaussian.pair(jnp.tanh, jnp.tanh, 0.6, 0.2, 1.3), rel=1e-9)
    np.testing.assert_allclose(gaussian.hermite_coefficients(lambda x: x**3, 4), [0, 3, 0, math.sqrt(6), 0], atol=1e-12)


def test_cached():
    gaussian.second_moment(jnp.arctan)
    hits = gaussian._tabulate.cache_info().hits
    gaussian.mean(jnp.arctan)
    assert gaussian._tabulate.cache_info().hits == hits + 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gaussian.mean(3), TypeError, "callable"),
        (lambda: gaussian.mean(jnp.tanh, 0.0, -1.0), ValueError, "variance"),
        (lambda: gaussian.mean(jnp.tanh, math.nan), ValueError, "mean"),
        (lambda: gaussian.mean(lambda x: 1 / x), ValueError, "pole"),
        (lambda: gaussian.mean(jnp.log), ValueError, "not finite"),
        (lambda: gaussian.mean(lambda x: x.sum()), ValueError, "elementwise"),
        (lambda: gaussian.mean(lambda x: x + 1j), TypeError, "real"),
        (lambda: gaussian.pair(jnp.tanh, jnp.tanh, 1.5), ValueError, "correlation"),
        (lambda: gaussian.hermite_coefficients(jnp.tanh, -1), ValueError, "degree"),
        (lambda: jax.jit(lambda v: gaussian.mean(jnp.tanh, 0.0, v))(1.0), TypeError, "concrete"),
        (lambda: jax.jit(lambda v: gaussian.mean(lambda x: x * v))(1.0), TypeError, "concrete"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
