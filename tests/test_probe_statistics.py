"""What is measured of a layer, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from varscale.measuring.statistics import LayerStatistics, measure

jitted = jax.jit(measure, static_argnames="bins")
SHAPE = (3, 8)  # one shape for all drawn arrays: one compilation


@given(
    hnp.arrays(
        np.float32,
        SHAPE,
        elements=st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.99, -2.5]), st.floats(-3, 3, width=32)),
    )
)
def test_agrees_with_numpy(x):
    got = jitted(jnp.asarray(x), saturation=0.99, low=-1.0, high=1.0, bins=10)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got.mean, wide.mean(), atol=1e-6)
    np.testing.assert_allclose(got.second_moment, np.mean(wide**2), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(got.variance, wide.var(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.standard_deviation, wide.std(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got.zeros, np.mean(x == 0), atol=1e-6)
    np.testing.assert_allclose(got.saturated, np.mean(np.abs(x) > np.float32(0.99)), atol=1e-6)
    assert got.finite == 1.0
    assert np.sum(got.histogram) == np.sum((x >= -1) & (x <= 1))


def test_histogram_is_numpys_away_from_the_edges():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    got = jitted(jnp.asarray(x), saturation=0.99, low=-1.0, high=1.0, bins=10)
    np.testing.assert_array_equal(got.histogram, np.histogram(x, 10, (-1, 1))[0])


def test_last_bin_includes_the_upper_end():
    got = measure(jnp.array([1.0, 1.0, -1.0, 1.5]), bins=4)
    np.testing.assert_array_equal(got.histogram, [1, 0, 0, 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_measured_in_float32(dtype):
    x = jnp.full((64, 64), 0.1, dtype)
    got = jitted(x)
    assert got.mean.dtype == jnp.float32
    np.testing.assert_allclose(got.mean, float(x[0, 0]), rtol=1e-6)
    assert got.variance < 1e-12


def test_variance_about_the_mean_keeps_its_digits():
    x = 1000.0 + jax.random.normal(jax.random.key(0), (64, 256))
    np.testing.assert_allclose(jitted(x).variance, np.asarray(x, np.float64).var(), rtol=1e-4)


def test_ten_million_entries_keep_the_mean():
    got = jitted(jnp.full((4096, 2560), 0.1), bins=1)
    np.testing.assert_allclose(got.mean, np.float32(0.1), rtol=1e-6)


def test_complex_is_measured_by_its_modulus():
    got = measure(jnp.array([3 + 4j, 0j]), high=10.0)
    assert (got.mean, got.second_moment, got.zeros) == (2.5, 12.5, 0.5)


def test_what_is_not_finite_is_counted_and_shows():
    got = measure(jnp.array([1.0, jnp.nan, jnp.inf, 0.0]))
    assert got.finite == 0.5
    assert np.isnan(got.mean)
    assert np.sum(got.histogram) == 2


def test_vmap_gives_every_field_a_leading_axis():
    got = jax.vmap(lambda x: measure(x, bins=5))(jnp.ones((7, 2, 3)))
    assert isinstance(got, LayerStatistics)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(got)} == {7}
    assert got.histogram.shape == (7, 5)


def test_empty_and_scalar_arrays():
    assert np.isnan(measure(jnp.zeros((0, 3))).mean)
    assert measure(jnp.float32(2.0)).second_moment == 4.0


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="x has dtype int32"):
        measure(jnp.arange(3))
    with pytest.raises(ValueError, match="bins is 0"):
        measure(jnp.ones(3), bins=0)
