"""Gains against the constants of the literature, and PyTorch's table as PyTorch has it."""

import math

import jax
import jax.numpy as jnp
import pytest

import varscale as vs

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


def test_pytorch_table():
    table = {"linear": 1, "conv2d": 1, "conv_transpose3d": 1, "sigmoid": 1, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
    for name, value in table.items():
        assert vs.pytorch_gain(name) == value
    assert vs.pytorch_gain("leaky_relu", 0.2) == pytest.approx(math.sqrt(2 / 1.04))


def test_for_activation_is_an_ordinary_scaling():
    assert vs.for_activation(jax.nn.relu) == vs.he_normal()
    assert vs.for_activation(jnp.tanh, "fan_avg", "uniform").scale == pytest.approx(1.5925374197**2, rel=1e-9)


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
