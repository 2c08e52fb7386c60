"""`vs.schemes.critical`: known critical points on the nets that have these activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs

X = jax.ShapeDtypeStruct((8, 100), "float32")


def net(function, bias=True):
    return nn.Sequential([nn.Dense(100, use_bias=bias), function, nn.Dense(80, use_bias=bias), function, nn.Dense(10)])


@pytest.mark.parametrize(
    ("function", "bias_variance", "weight_variance"),
    [(jnp.tanh, 0.05, 1.76095), (jnp.tanh, 2.01e-5, 1.05), (nn.relu, 0.0, 2.0), (jnp.tanh, 0.0, 1.0)],
)
def test_known_points(function, bias_variance, weight_variance):
    plan = vs.schemes.critical(bias_variance)(net(function), X)
    assert 100 * plan["layers_2/kernel"].std ** 2 == pytest.approx(weight_variance, rel=1e-4)
    assert 80 * plan["layers_4/kernel"].std ** 2 == pytest.approx(weight_variance, rel=1e-4)
    assert plan["layers_2/bias"].std ** 2 == pytest.approx(bias_variance)


def test_the_signal_stays_at_the_fixed_point_and_the_gradient_too():
    plan = vs.schemes.critical(0.05)(net(jnp.tanh), X)
    q = vs.critical(jnp.tanh, 0.05).q
    report = vs.predict(net(jnp.tanh), X, scheme=plan)
    assert [report[f"layers_{i}"].second_moment for i in (0, 2, 4)] == pytest.approx([q] * 3, rel=0.02)


def test_activations_without_a_name_and_without_a_point():
    softsign = lambda x: x / (1 + jnp.abs(x))  # noqa: E731
    with pytest.raises(ValueError, match="activation="):
        vs.schemes.critical(0.1)(net(lambda x: jnp.exp(-jnp.square(x))), X)
    plan = vs.schemes.critical(0.1, activation=softsign)(net(softsign), X)
    expected = vs.critical(softsign, 0.1).weight_variance
    assert 100 * plan["layers_2/kernel"].std ** 2 == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="no critical point"):
        vs.schemes.critical(0.3)(net(nn.relu), X)
    with pytest.raises(ValueError, match="bias_variance"):
        vs.schemes.critical(-1.0)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(100)(x)), None


class Repeated(nn.Module):
    """Layers that a scan stacks, and one that is used three times: the first of each reads a linear layer's output."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = layers(name="layers")(nn.Dense(100)(x), None)[0]
        x, shared = nn.Dense(100)(x), nn.Dense(100, name="shared")
        for _ in range(3):
            x = nn.relu(shared(x))
        return x


def test_layers_of_a_scan_and_shared_ones_read_the_activation_before_most_of_them():
    plan = vs.schemes.critical()(Repeated(), X)
    assert 100 * plan["layers/Dense_0/kernel"].std ** 2 == pytest.approx(2)
    assert 100 * plan["shared/kernel"].std ** 2 == pytest.approx(2)
