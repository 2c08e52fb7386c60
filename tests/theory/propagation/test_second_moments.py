"""Functions of several roots and of awkward ones, against integrals over a fine grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.graph.nodes import Graph, Leaf, View
from varscale.theory.integrals.hermite_series import Z, mehler
from varscale.theory.integrals.primitives import function
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.propagation.marginals import factored
from varscale.theory.propagation.second_moments import product_second

relu = jax.nn.relu


def row(f, count, shape=(64, 256)):
    """The predicted moments of f of independent standard normal arrays."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
    return vs.predict(lambda _, xs: f(*xs), vs.inputs(arrays), params={}, backward=False).output


def integral(f, count, points=120):
    """E[f²] of independent standard normals: the trapezoidal rule, an even number of points, exact to .2 % at a corner."""
    z = np.linspace(-7, 7, points)
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    grids = np.meshgrid(*[z] * count, indexing="ij")
    density = np.prod(np.meshgrid(*[weights] * count, indexing="ij"), axis=0)
    return float(np.sum(density * np.asarray(f(*(jnp.asarray(g, jnp.float32) for g in grids)), float) ** 2))


@pytest.mark.parametrize(
    ("f", "count"),
    [
        pytest.param(lambda a, b: (relu(a) + relu(b)) * relu(a), 2, id="sum times its term"),
        pytest.param(lambda a, b: (relu(a) + relu(b)) * jnp.tanh(a), 2, id="sum times a function of its root"),
        pytest.param(lambda a, b: jax.nn.softplus(a) / (jax.nn.softplus(a) + jax.nn.softplus(b)), 2, id="share"),
        pytest.param(lambda a, b, c: jnp.tanh(relu(a) - relu(b)) * (relu(a) - relu(c)), 3, id="two sums with one term"),
        pytest.param(lambda a, b: jnp.tanh(relu(a) + relu(b)) + relu(a), 2, id="function of a sum plus its term"),
    ],
)
def test_a_sum_beside_one_of_its_own_roots_is_in_doubt(f, count):
    """Taking the two for jointly Gaussian is off by up to 25 %."""
    found = row(f, count)
    assert abs(found.second_moment / integral(f, count) - 1) <= found.error_bound
    assert found.how == "assumed"


def test_sums_of_too_many_terms_stay_together_in_doubt():
    def f(*xs):
        total = sum(relu(x) for x in xs)
        return total * jnp.tanh(sum(relu(x) * jnp.sin(x) for x in xs))

    found = row(f, 8)
    assert found.how == "assumed"
    assert found.error_bound > 0.2


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda a, b: jnp.square(relu(a) + relu(a + 0.05 * b)), id="nearly the same"),
        pytest.param(lambda a, b: jnp.square(relu(a) + relu(0.5 * a + 0.86 * b)), id="half the same"),
        pytest.param(lambda a, b: jnp.square(relu(a) + 0.5 * a + 0.86 * b), id="one of them Gaussian"),
    ],
)
def test_sums_of_correlated_parts_have_the_law_of_correlated_parts(f):
    """The points are good to 1 %; parts taken for independent are off by 8 to 20 %."""
    assert row(f, 2).second_moment == pytest.approx(integral(f, 2, 300), rel=0.015)


def test_correlations_that_cannot_be_are_mended_in_doubt():
    """Three variables with correlations −.8 between any two: the least eigenvalue is −.6, and −.5 is as far as they can go."""
    graph = Graph()
    node = graph.make(Leaf, (), (), "x")
    graph.computing.append(node)
    root = factored(np.full((3, 3), -0.8) + 1.8 * np.eye(3), graph)
    np.testing.assert_allclose(root @ root.T, 1.5 * np.eye(3) - 0.5, atol=1e-12)
    assert (node.flagged, node.doubt) == ("assumed", pytest.approx(0.6))


def on_a_sphere(units):
    """400000 layer-normalised rows: relative standard errors below .3 %."""
    x = np.random.default_rng(0).standard_normal((400_000, units))
    x -= x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("units", [3, 4, 8, 16])
@pytest.mark.parametrize("norm", ["layer", "rms", "group", "batch"])
def test_what_a_norm_over_few_units_puts_out_lies_on_a_sphere(norm, units):
    """Taken for Gaussian, tanh of it is .394 at any width, and relu² 1.5. A root mean square of n is as free as n + 1 units."""
    norms = {
        "layer": (nn.LayerNorm(use_bias=False, use_scale=False), units),
        "rms": (nn.RMSNorm(use_scale=False), units - 1),
        "group": (nn.GroupNorm(num_groups=16, use_bias=False, use_scale=False), 16 * units),
        "batch": (nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False, axis=0), units),
    }
    module, width = norms[norm]
    shape = (256, width)
    y = on_a_sphere(units)
    for f in (jnp.tanh, lambda x: jnp.square(relu(x))):
        found = row(lambda x, f=f: f(module.apply({}, x, mutable=["batch_stats"])[0]), 1, shape)
        error = abs(found.second_moment / np.mean(np.asarray(f(y), float) ** 2) - 1)
        assert error <= found.error_bound < 0.05 + 2 / units
        assert error < 0.012 or units < 16


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(jnp.log, id="logarithm of a normal"),
        pytest.param(jnp.sqrt, id="root of a normal"),
        pytest.param(lambda a: a**1.5, id="fractional power of a normal"),
        pytest.param(lambda a: a / 0.0, id="division by zero"),
        pytest.param(lambda a: 1 / a, id="reciprocal, whose square has no integral"),
    ],
)
def test_what_has_no_value_is_in_infinite_doubt(f):
    found = row(f, 1)
    assert found.how == "assumed"
    assert found.error_bound == np.inf
    report = vs.Report((found,))
    assert "inf" in str(report)
    assert '"error_bound": null' in report.to_json()


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda a: jnp.where(a > 0.1, jnp.log(a), 0), id="logarithm where it is chosen"),
        pytest.param(lambda a: jnp.where(a > 0.1, jnp.log(a), 1), id="or something else is"),
        pytest.param(lambda a: jnp.sqrt(relu(a)), id="root of what is not negative"),
        pytest.param(lambda a: jnp.tanh(1 / a), id="bounded function of a reciprocal"),
        pytest.param(lambda a: jnp.where(a > 2, 1.0, 0.0), id="rare event"),
    ],
)
def test_what_has_a_value_is_not_in_doubt(f):
    assert row(f, 1).how == "quadrature"
    assert row(f, 1).error_bound < 0.2


@pytest.mark.parametrize("x", [0.0, 1e-6, 1e-3, 0.1, 1.0, 5.0])
def test_second_derivatives_are_right_near_zero(x):
    y = 1 / (1 + np.exp(-x))
    assert function("∂0∂0logistic", ())(np.array([x]))[0] == pytest.approx(y * (1 - y) * (1 - 2 * y), abs=1e-4)


def test_a_step_and_its_mirror_image_never_meet():
    """P(z > 0, −z > 0) = 0; P(z > 0, z' > 0) = 1/4 + arcsin(ρ)/2π, of which the tail beyond the series' degree is ≤ .01."""
    step = (Z > 0).astype(float)
    rho = np.array([-1.0, -0.99, -0.9, -0.5, 0.0, 0.5, 0.9, 0.99, 1.0])
    found = mehler(step, step, ()).at(rho)
    assert found[0] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found, 0.25 + np.arcsin(rho) / (2 * np.pi), atol=0.01)


def test_a_product_with_something_apart_is_one_of_means():
    """E[f(x, b)_i g(y)_j] = E[f] E[g] of a function of two roots, of which none is in g."""
    interpreter = Interpreter()
    x, b, y = (interpreter.leaf(name, (64, 32), 0.0, 1.0, odd=True) for name in "xby")
    f = interpreter.elementwise("exp", interpreter.elementwise("max", x, b))
    g = interpreter.elementwise("exp", y)
    found = product_second(View(f.node, (0, 1)), View(g.node, (0, 1)), f.node.axes)
    np.testing.assert_allclose(found, f.node.table.total_mean * g.node.table.total_mean, rtol=1e-3)


@pytest.mark.parametrize("units", [4, 16])
@pytest.mark.parametrize(
    ("f", "truth"),
    [
        pytest.param(lambda x, mean: x * jnp.sqrt(mean(jnp.square(x))), lambda n: 1 + 2 / n, id="times its norm"),
        pytest.param(lambda x, mean: x * mean(jnp.square(x)), lambda n: (1 + 2 / n) * (1 + 4 / n), id="times its square"),
        pytest.param(lambda x, mean: x * jax.lax.rsqrt(mean(jnp.square(x))), lambda n: 1.0, id="normed"),
        pytest.param(
            lambda x, mean: x * mean(jnp.abs(x)),
            lambda n: (3 + (n - 1) * (1 + 4 * 2 / np.pi) + (n - 1) * (n - 2) * 2 / np.pi) / n**2,
            id="times its mean size",
        ),
    ],
)
def test_an_average_of_few_numbers_is_in_doubt(f, truth, units):
    """It is taken for its mean, and off by 33 to 67 % at 4 units."""
    found = row(lambda x: f(x, lambda y: jnp.mean(y, axis=1, keepdims=True)), 1, (64, units))
    assert abs(found.second_moment / truth(units) - 1) <= found.error_bound
