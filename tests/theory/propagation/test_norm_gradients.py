"""Gradients at the input of a norm over units, and of a softmax that ends a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import varscale as vs

UNITS = 16


class Normed(nn.Module):
    """The layer norm of a sum of linear maps, read out."""

    terms: int

    @nn.compact
    def __call__(self, x):
        x = sum(nn.Dense(UNITS, name=f"term_{i}")(x) for i in range(self.terms))
        return nn.Dense(8, name="out")(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("features", [6, 1000])
def test_the_mean_and_the_scale_of_a_sum_take_their_part_of_the_gradient(terms, features):
    """Of n Gaussian units scaled by the inputs' |x|²/d: E|Jᵀg|²/E|g|² = (n − 2)/(n − 3) · d/(d − 2), over E[v]."""
    report = vs.predict(Normed(terms), jax.ShapeDtypeStruct((4, features), "float32"))
    rows = {row.path: row for row in report.rows}
    ratio = rows["term_0"].gradient / rows["norm"].gradient
    expected = (UNITS - 2) / (UNITS - 3) * features / (features - 2) / terms
    np.testing.assert_allclose(ratio, expected, rtol=0.01)


class NormedBehind(nn.Module):
    """The layer norm of a linear map of `width` linear units."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(UNITS, name="last")(nn.Dense(self.width, name="before")(x))
        return nn.Dense(8, name="out")(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("width", [12, 64])
def test_the_units_before_a_norm_vary_its_scale(width):
    """Given |h|² of m units, v is a mean of n − 1 squares: E[1/v] E[v] = (n − 1)/(n − 3) · m/(m − 2), at both layers.

    Of the gradient at h nothing is along h: (m − 1)/m.
    """
    rows = vs.predict(NormedBehind(width), jax.ShapeDtypeStruct((4, 10_000), "float32"))
    expected = (UNITS - 2) / (UNITS - 3) * width / (width - 2)
    for path, scale in (("last", 1.0), ("before", UNITS / width * (width - 1) / width)):
        assert rows[path].gradient / rows["norm"].gradient == pytest.approx(scale * expected, rel=0.01)


class ReluNormed(nn.Module):
    """The norm of what ReLU leaves, which is as long as any, and another norm behind a linear map of it."""

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="inner")(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(8)(nn.RMSNorm(name="outer")(nn.Dense(UNITS, name="last")(x)))


def test_units_that_a_norm_divides_do_not_vary_the_next_ones_scale():
    """E[1/v] E[v] = n/(n − 2) of the linear map alone, and (n − 1)/n of it is across the norm's output."""
    rows = vs.predict(ReluNormed(), jax.ShapeDtypeStruct((4, 10_000), "float32"))
    assert rows["last"].gradient / rows["outer"].gradient == pytest.approx((UNITS - 1) / (UNITS - 2), rel=0.01)


class BesideZeros(nn.Module):
    """The layer norm of rows of numbers beside rows of zeros."""

    @nn.compact
    def __call__(self, x):
        rows = [nn.Dense(UNITS, name="full")(x), nn.Dense(UNITS, kernel_init=nn.initializers.zeros, name="zeros")(x)]
        return nn.Dense(8)(nn.LayerNorm(epsilon=1e-3, name="norm")(jnp.concatenate(rows, axis=1)))


def test_a_norm_of_zeros_divides_by_its_epsilon():
    """Which varies by nothing, whatever the scale of the other rows does."""
    rows = vs.predict(BesideZeros(), jax.ShapeDtypeStruct((4, 6, 10_000), "float32"))
    assert rows["zeros"].gradient / rows["norm"].gradient == pytest.approx((1 - 1 / UNITS) / 1e-3, rel=1e-3)


class NormedOverSamples(nn.Module):
    """The batch norm of a sum of linear maps with normal weights."""

    terms: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(x.shape[-1], use_bias=False, name="in")(x)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = sum(nn.Dense(64, kernel_init=init, name=f"term_{i}")(x) for i in range(self.terms))
        return nn.Dense(8, name="out")(nn.BatchNorm(use_running_average=False, name="norm")(x))


def ratio(terms, width, over, under):
    """Of the gradients of two rows, for 32 samples."""
    report = vs.predict(NormedOverSamples(terms), jax.ShapeDtypeStruct((32, width), "float32"))
    return report[over].gradient / report[under].gradient


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("width", [16, 256])
def test_a_norm_over_samples_sees_how_they_overlap(terms, width):
    """Samples of d features make v a mean of n − 1 squares, times |w|²: E|Jᵀg|²/E|g|² = (n − 2)/(n − 3) · d/(d − 2), over E[v].

    Here d is half the width: the overlaps of the input and of the layer behind it add up.
    """
    features = width / 2
    expected = 30 / 29 * features / (features - 2) / terms
    np.testing.assert_allclose(ratio(terms, width, "term_0", "norm"), expected, rtol=0.01)


@pytest.mark.parametrize("width", [16, 256])
def test_gradients_before_a_norm_over_samples_go_with_the_weights_of_a_unit(width):
    """They go by 1/|w|, w the d normal weights of a unit: of g² ∝ |w|⁻² a product has E[|w|² g²] = (1 − 2/d) E[|w|²] E[g²]."""
    np.testing.assert_allclose(ratio(1, width, "in", "term_0"), 64 / width * (1 - 2 / width), rtol=0.005)


class Classifier(nn.Module):
    """A softmax ends it."""

    scale: float

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(10, kernel_init=nn.initializers.normal(self.scale / 8), name="logits")(x))


@pytest.mark.parametrize(("scale", "known"), [(1.0, True), (4.0, False)])
def test_softmax_at_the_end_of_a_model_is_flagged_where_one_class_has_the_weight(scale, known):
    """Drawn with 100 networks: within 3 % where logits have a deviation of 1, off by 63 % where it is 4."""
    row = vs.predict(Classifier(scale), jax.ShapeDtypeStruct((8, 64), "float32")).rows[0]
    assert row.path == "logits"
    assert (row.gradient_error_bound < 0.5) is known
