"""Gains against the constants of the literature, and PyTorch's table as PyTorch has it."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs
from varscale import gaussian

SECOND_MOMENT = {
    "relu": math.sqrt(2), "tanh": 1.5925374197, "silu": 1.6765324703, "mish": 1.4868475813, "elu": 1.2451983007,
    "softplus": 1.0418668355, "sigmoid": 1.8462285453, "hard_tanh": 1.3920361404, "hard_swish": 1.7366572128, "selu": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND_MOMENT)
def test_second_moment(name):
    assert vs.gain(getattr(jax.nn, name)) == pytest.approx(SECOND_MOMENT[name], rel=1e-9)


def test_both_gelus_leaky_relu_and_squared_relu():
    assert vs.gain(lambda x: jax.nn.gelu(x, approximate=False)) == pytest.approx(1.5335304412, rel=1e-9)
    assert vs.gain(jax.nn.gelu) == pytest.approx(1.5335805217, rel=1e-9)
    assert vs.gain(lambda x: jax.nn.leaky_relu(x, 0.2)) == pytest.approx(math.sqrt(2 / 1.04), rel=1e-9)
    assert vs.gain(lambda x: jax.nn.relu(x) ** 2) == pytest.approx(0.8164965809, rel=1e-9)


def test_other_criteria():
    assert vs.gain(jnp.tanh, "slope") == pytest.approx(1.0)
    assert vs.gain(jax.nn.sigmoid, "slope") == pytest.approx(4.0)
    assert vs.gain(jax.nn.relu, "derivative") == pytest.approx(math.sqrt(2), rel=1e-9)
    # NF-Nets' constant for a centred ReLU.
    assert vs.gain(jax.nn.relu, "variance") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-9)


SLOPES = {
    "tanh": 0.461, "selu": 0.783, "elu": 0.891, "softplus": 0.492, "sigmoid": 0.106, "hard_tanh": 0.385, "relu": 1.0,
    "leaky_relu": 1.0, "gelu": 1.144, "silu": 1.173, "mish": 1.076, "hard_swish": 1.224,
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_stable_is_the_second_moment_where_its_slope_is_at_most_one(name):
    activation = getattr(jax.nn, name)
    assert gaussian.second_moment_slope(activation) == pytest.approx(SLOPES[name], abs=6e-4)
    if SLOPES[name] <= 1:
        assert vs.gain(activation, "stable") == vs.gain(activation)
        assert vs.for_activation(activation, criterion="stable") == vs.for_activation(activation)
    else:
        with pytest.raises(ValueError, match=rf"stable.* is {SLOPES[name]}.*times in 50.*Normalize.*residual.*LSUV"):
            vs.for_activation(activation, criterion="stable")


def test_the_table_of_activations_in_the_readme():
    """Gains and slopes to the digits printed; "stable" is a slope below 1."""
    readme = pathlib.Path(vs.initializers.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 13
    for name, gain, slope, depth in rows:
        activation = getattr(jax.nn, name, None) or getattr(jnp, name)
        assert f"{vs.gain(activation):.4f}" == gain
        assert f"{gaussian.second_moment_slope(activation):.3f}".lstrip("0") == slope
        assert (depth == "stable") == (float(slope) < 1)


def test_the_slope_is_that_of_the_map_at_any_mean_and_variance():
    step = 1e-4
    for mean, variance in ((0.0, 1.0), (0.7, 0.4), (-1.0, 3.0)):
        up, down = (gaussian.second_moment(jax.nn.gelu, mean, variance * math.exp(d)) for d in (step, -step))
        slope = gaussian.second_moment_slope(jax.nn.gelu, mean, variance)
        assert slope == pytest.approx((math.log(up) - math.log(down)) / (2 * step), abs=1e-6)
    with pytest.raises(ValueError, match="must not vanish"):
        gaussian.second_moment_slope(lambda x: 0 * x)


WIDTH, NETS, DEPTH = 128, 16, 50


@functools.cache
def _weights():
    return vs.normal(1.0)(jax.random.key(3), (DEPTH, NETS, WIDTH, WIDTH))


@functools.cache
def _logs_by_depth(activation):
    """ln E[x²] of 16 plain nets of width 128 at the exact gain, by layer; the first layer reads inputs of mean square 1."""
    x = vs.normal(1.0)(jax.random.key(4), (NETS, 4, WIDTH))
    scale = vs.gain(activation) / math.sqrt(WIDTH)

    def layer(h, w):
        h = scale * jnp.einsum("nbi,nio->nbo", activation(h), w)
        return h, jnp.log(jnp.mean(h**2, axis=(1, 2)))

    return np.asarray(jax.lax.scan(layer, x / jnp.sqrt(jnp.mean(x**2, axis=(1, 2), keepdims=True)), _weights())[1])


@pytest.mark.parametrize("activation", [jnp.tanh, jnp.sin, jax.nn.selu], ids=["tanh", "sin", "selu"])
def test_fifty_layers_at_a_stable_gain_end_where_they_began(activation):
    """Their logarithms scatter by .09 at most: a factor of 2 is more than 7 standard deviations away."""
    assert vs.gain(activation, "stable")
    assert np.abs(_logs_by_depth(activation)[-1]).max() < math.log(2)


def test_fifty_layers_of_relu_drift_as_a_finite_width_does_and_no_more():
    """ln E[x²] is N(−β/2, β) with β = 5 · 50/128 = 1.95: the mean over 16 nets lies within 6 standard errors (2e-9)."""
    beta = 5 * DEPTH / WIDTH
    assert _logs_by_depth(jax.nn.relu)[-1].mean() == pytest.approx(-beta / 2, abs=6 * math.sqrt(beta / NETS))


def test_silu_holds_to_ten_layers_and_not_to_fifty():
    """The power of the tests above: nets at silu's exact gain scatter over many powers of e."""
    logs = _logs_by_depth(jax.nn.silu)
    assert np.median(np.abs(logs[9])) < math.log(4)
    assert np.sqrt(np.mean(logs[-1] ** 2)) > 4


def test_pytorch_table():
    table = {"linear": 1, "conv2d": 1, "conv_transpose3d": 1, "sigmoid": 1, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
    for name, value in table.items():
        assert vs.pytorch_gain(name) == value
    assert vs.pytorch_gain("leaky_relu", 0.2) == pytest.approx(math.sqrt(2 / 1.04))


def test_for_activation_is_an_ordinary_scaling():
    assert vs.for_activation(jax.nn.relu) == vs.he_normal()
    assert vs.for_activation(jnp.tanh, "fan_avg", "uniform").scale == pytest.approx(1.5925374197**2, rel=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.softmax,
        jax.nn.log_softmax,
        nnx.softmax,
        jax.nn.standardize,
        jax.nn.glu,
        jnp.sort,
        jnp.flip,
        lambda x: jnp.cumsum(x, axis=0),
        lambda x: x / jnp.sqrt(jnp.mean(x**2)),
        lambda x: jnp.roll(x, 1, axis=-1),
        lambda x: x * jnp.arange(x.shape[-1]),
        lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
        nnx.LayerNorm(16, rngs=nnx.Rngs(0)),
    ],
)
def test_what_is_not_elementwise_is_refused(function):
    for call in (vs.gain, vs.for_activation, lambda f: vs.mean_field(f, 1.0)):
        with pytest.raises(ValueError, match="must be elementwise"):
            call(function)


def test_elementwise_callables_of_any_kind_are_taken():
    for function in (
        math.tanh,
        lambda x: max(x, 0.0),
        lambda x: jnp.tanh(x.astype(jnp.bfloat16)),
        functools.partial(jax.nn.elu),
    ):
        assert vs.gain(function) > 1
    with pytest.raises(TypeError, match=r"<lambda> \(test_initializers_gains.py:\d+\) must be elementwise"):
        vs.gain(lambda x, y: x + y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: vs.gain("relu"), TypeError, "callable"),
        (lambda: vs.gain(jnp.tanh, "mean"), ValueError, "criterion"),
        (lambda: vs.gain(lambda x: 0 * x), ValueError, "no gain"),
        (lambda: vs.gain(jax.nn.relu, "slope"), ValueError, "no gain"),
        (lambda: vs.gain(lambda x: 0 * x + 3, "variance"), ValueError, "no gain"),
        (lambda: vs.pytorch_gain("gelu"), ValueError, "name"),
        (lambda: vs.pytorch_gain("leaky_relu", math.inf), ValueError, "negative_slope"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
