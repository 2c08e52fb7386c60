"""`assert_output_variance` and the strategies."""

import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import varscale as vs
from varscale import testing
from varscale.programs import faces
from varscale.testing import Underpowered, assert_output_variance, strategies
from varscale.testing.quadratic import quadratic_form

RELU = jax.nn.relu(jax.random.normal(jax.random.key(1), (6, 128)))
NORMAL = vs.variance_scaling(1.0, "fan_in", "normal")


@pytest.mark.parametrize(
    "layer",
    [
        linen.Dense(32, kernel_init=NORMAL),
        lambda rngs: nnx.Linear(128, 32, kernel_init=NORMAL, rngs=rngs),
        (lambda key, x: NORMAL(key, (128, 32)), lambda kernel, x: x @ kernel),
        lambda key, x: x @ NORMAL(key, (128, 32)),
    ],
    ids=["linen", "nnx", "pair", "function"],
)
def test_each_kind_of_layer_holds_and_is_refuted_at_twice_the_claim(layer):
    assert assert_output_variance(layer, RELU, distribution="normal").holds
    with pytest.raises(AssertionError) as caught:
        assert_output_variance(layer, RELU, scale=2.0, distribution="normal")
    assert caught.value.verdict.failed == ("second_moment",)
    assert caught.value.verdict.ratio == pytest.approx(0.5, rel=0.1)


def test_the_p_value_of_one_example_through_normal_weights_is_exact():
    """`m·R·S ~ χ²`: 400 sets of 4 fresh kernels on one input; the Kolmogorov-Smirnov test of their p-values has an error
    rate of 1e-9.
    """
    x = np.asarray(RELU[0], np.float64)
    form = quadratic_form(
        lambda key: NORMAL(key, (128, 16)), lambda kernel: RELU[:1] @ kernel, jax.random.key(0), gaussian=True
    )
    assert form is not None
    assert form.eigenvalues == pytest.approx(np.full(16, 1 / 16), rel=1e-4)
    kernels = np.asarray(NORMAL(jax.random.key(2), (1600, 128, 16)), np.float64) * 1600**0.5
    ratios = np.square(np.einsum("i,kio->ko", x, kernels)).sum(axis=1) * 128 / (16 * x @ x)
    p_values = [min(1.0, 2 * np.exp(min(form.log_tails(ratio, 4)))) for ratio in ratios.reshape(400, 4).mean(axis=1)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-9


def test_a_batch_that_shares_its_weights_has_fewer_degrees_of_freedom_than_outputs():
    form = quadratic_form(lambda key: NORMAL(key, (128, 16)), lambda kernel: RELU @ kernel, jax.random.key(0), gaussian=True)
    assert form is not None
    assert len(form.eigenvalues) == 6 * 16
    gram = np.linalg.eigvalsh(np.asarray(RELU @ RELU.T, np.float64))
    assert form.kurtosis == pytest.approx(1 + 2 * np.square(gram / gram.sum()).sum() / 16, rel=1e-4)


def test_laws_lighter_than_normal_hold_with_proven_bounds():
    layer = linen.Dense(16, kernel_init=vs.he_uniform())
    assert assert_output_variance(layer, RELU, scale=2.0, distribution="uniform", detectable_ratio=1.3).holds
    for scale in (1.5, 2.7):
        with pytest.raises(AssertionError):
            assert_output_variance(layer, RELU, scale=scale, distribution="uniform", detectable_ratio=1.3)


def test_what_is_not_linear_in_one_kernel_is_judged_by_its_scatter():
    """A two-layer net and its claim by the theory: `E[y²] = 2·E[relu(h)²] = E[h²] = 2·E[x²]` for He's weights."""

    def net(key, x):
        first, second = jax.random.split(key)
        return jax.nn.relu(x @ vs.he_normal()(first, (128, 64))) @ vs.he_normal()(second, (64, 16))

    verdict = assert_output_variance(net, RELU, scale=4.0 / 2.0)
    assert "scatter" in verdict.claim
    with pytest.raises(AssertionError):
        assert_output_variance(net, RELU, scale=4.0)


def test_weights_sampled_in_bfloat16_show_in_the_output():
    """At 4096 inputs from a ReLU the mean of -.018 standard deviations makes E[y²] 1.4 times the claim; rounded once, it
    holds.
    """
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (1, 4096)))

    def layer(init):
        return lambda key, x: x @ init(key, (4096, 32), jnp.bfloat16).astype(jnp.float32)

    with pytest.raises(AssertionError) as caught:
        assert_output_variance(layer(jax.nn.initializers.he_normal()), x, scale=2.0)
    assert caught.value.verdict.ratio == pytest.approx(1.4, abs=0.1)
    assert assert_output_variance(layer(vs.he_normal()), x, scale=2.0).holds


def test_claims_of_zero_are_equalities():
    zeros = linen.Dense(8, kernel_init=linen.initializers.zeros)
    assert assert_output_variance(zeros, RELU, scale=0.0).ratio == 1.0
    assert assert_output_variance(linen.Dense(8, kernel_init=NORMAL), 0 * RELU).holds
    for layer, scale in ((zeros, 1.0), (linen.Dense(8, kernel_init=NORMAL), 0.0)):
        with pytest.raises(AssertionError, match="second_moment"):
            assert_output_variance(layer, RELU, scale=scale)


def test_a_refuted_layer_is_told_the_usual_mistake():
    x = jax.random.normal(jax.random.key(2), (8, 4, 16))

    def layer(rngs):
        return nnx.LinearGeneral(16, 16, batch_axis={0: 8}, kernel_init=jax.nn.initializers.lecun_normal(), rngs=rngs)

    with pytest.raises(AssertionError) as caught:
        assert_output_variance(layer, x, profile="quick")
    assert any(hint.startswith("1/8: axis 0 of x has 8") for hint in caught.value.verdict.hints)
    with pytest.raises(AssertionError) as caught:
        assert_output_variance(linen.Dense(32, kernel_init=vs.he_normal()), RELU, profile="quick")
    assert caught.value.verdict.hints == ("2: twice the claim, as He's 2/fan where LeCun's 1/fan is claimed",)


def test_wrong_questions_are_answered_by_name():
    layer = linen.Dense(2, kernel_init=NORMAL)
    with pytest.raises(Underpowered, match="max_replicates is 10"):
        assert_output_variance(layer, RELU, distribution="normal", max_replicates=10)
    with pytest.raises(TypeError, match="factory"):
        assert_output_variance(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), RELU)
    with pytest.raises(ValueError, match="scale"):
        assert_output_variance(layer, RELU, scale=-1.0)
    with pytest.raises(ValueError, match="detectable_ratio"):
        assert_output_variance(layer, RELU, detectable_ratio=0.9)
    with pytest.raises(ValueError, match=r"E\[y²\]"):
        assert_output_variance(layer, RELU * jnp.nan)


@given(case=strategies.layers())
def test_layers_have_readable_hashable_cases_and_the_fans_of_their_kernels(case):
    kernel_shape = []

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        kernel_shape.append(tuple(shape))
        return jnp.zeros(shape, dtype)

    face = faces.program(case.build(init))
    x = faces.as_inputs(jnp.ones(case.input_shape))
    jax.eval_shape(lambda key: face.apply(face.init(key, x), x)[0], jax.random.key(0))
    assert eval(repr(case), {"LayerCase": type(case)}) == case
    assert hash(case) == hash(eval(repr(case), {"LayerCase": type(case)}))
    assert kernel_shape
    assert 0 < case.fans.fan_in <= np.prod(kernel_shape[-1])


@given(data=st.data(), kind=st.sampled_from(("dense", "conv", "general", "any")))
def test_axes_fit_their_shapes_and_every_name_draws(data, kind):
    shape = data.draw(strategies.kernel_shapes(kind=kind))
    roles = data.draw(strategies.axes(shape))
    fans = vs.compute_fans(shape, **roles)
    assert fans.fan_in >= 1
    assert fans.fan_out >= 1
    assert data.draw(strategies.modes()).startswith("fan_")
    assert data.draw(strategies.distributions()) in ("normal", "truncated_normal", "uniform", "rademacher")
    assert jnp.issubdtype(data.draw(strategies.dtypes(complex_numbers=True)), jnp.inexact)
    assert np.isfinite(data.draw(strategies.activations())(jnp.float32(0.3)))
    init = data.draw(strategies.initializers())
    assert jax.eval_shape(lambda key: init(key, (4, 6), jnp.float32), jax.random.key(0)).shape == (4, 6)


@pytest.mark.parametrize("kind", ["dense", "conv", "general", "any"])
def test_a_failing_shape_prints_as_a_shape(kind):
    @settings(derandomize=True, database=None, max_examples=50)
    @given(shape=strategies.kernel_shapes(kind))
    def fails(shape):
        raise AssertionError(shape)

    with pytest.raises(AssertionError) as caught:
        fails()
    notes = "".join(caught.value.__notes__)
    assert re.search(r"shape=\((1, )+1\)", notes), notes
    assert "lambda" not in notes


def test_the_test_to_paste_passes_and_fails_where_it_should():
    """The guide's block for authors of an initializer, as it stands; and with the window forgotten."""
    readme = pathlib.Path(inspect.getfile(testing)).with_name("README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import math.*?)```", readme, re.DOTALL).group(1)
    namespace = {}
    exec(code, namespace)
    for shape in ((256, 128), (3, 3, 16, 32)):
        namespace["test_variance"](shape)
    namespace["test_variance_of_any_shape"]()
    namespace["test_a_layer_keeps_the_signal_behind_a_relu"]()
    exec(code.replace("math.prod(shape[:-1])", "shape[-2]"), namespace)
    with pytest.raises(AssertionError, match="9 = 3·3: the receptive field is missing"):
        namespace["test_variance"]((3, 3, 16, 32))


def test_kinds_are_checked():
    with pytest.raises(ValueError, match="kind"):
        strategies.kernel_shapes(kind="cube")


def test_testing_works_without_hypothesis_until_its_strategies_are_touched():
    program = """
import sys
sys.modules["hypothesis"] = None
from varscale import testing
assert testing.plan_samples(1e-9, 1e-6, 1.1) == 26087
try:
    testing.strategies
except ModuleNotFoundError as error:
    assert "varscale[testing]" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
