"""A net whose hidden units can be told apart to the bit, and its training under many starts, optimizers and activations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab.training import accuracy, cross_entropy

WIDTH, CLASSES, DROPOUT = 10, 10, 0.2
ACTIVATIONS = (jnp.tanh, jax.nn.relu, jax.nn.sigmoid)
# Each is a program of its own: chosen by a traced switch, XLA fuses their arithmetic, and rounds one unit unlike the next.
OPTIMIZERS = {"gradient descent": optax.sgd(0.3), "Adam": optax.adam(0.01)}


class Setting(NamedTuple):
    """What may differ from run to run; leaves are traced, so that runs are one program.

    Attributes:
      activation: position in `ACTIVATIONS`.
      dropout: whether hidden units are dropped.
    """

    activation: Any
    dropout: Any


class Spread(NamedTuple):
    """The largest difference between a layer's first unit and another, over both hidden layers.

    Attributes:
      weights: of the weights and biases into a unit, and of the weights out of it.
      forward: of their outputs on the batch.
      backward: of the gradients of those weights and biases.
    """

    weights: Any
    forward: Any
    backward: Any


def in_order(kernel: Float[Array, "inputs units"], x: Float[Array, "inputs batch"]) -> Float[Array, "units batch"]:
    """kernelᵀ·x, with every unit's sums taken in the same order.

    A matrix library may sum one unit's products differently from the next one's (in blocks, with what is left over apart); then
    equal units give unequal sums, right to rounding but not to the bit. The samples lie innermost for the same reason.
    """
    return jnp.sum(kernel[:, :, None] * x[:, None, :], axis=0)


class Layer(nn.Module):
    """A dense layer, one column a sample."""

    units: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "inputs batch"]) -> Float[Array, "units batch"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[0], self.units))
        return in_order(kernel, x) + self.param("bias", nn.initializers.zeros, (self.units,))[:, None]


class Net(nn.Module):
    """Two hidden layers and the classes; gives the logits and the hidden layers' outputs, one column a sample."""

    setting: Setting
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "features batch"]) -> tuple[Float[Array, "classes batch"], list[Array]]:
        hidden = []
        for layer in range(2):
            x = Layer(WIDTH, self.kernel_init, name=f"dense_{layer}")(x)
            x = jax.lax.switch(self.setting.activation, ACTIVATIONS, x)
            hidden.append(x)
            x = jnp.where(self.setting.dropout, nn.Dropout(DROPOUT, deterministic=False)(x), x)
        return Layer(CLASSES, self.kernel_init, name="head")(x), hidden


def start(key: Array, init: nn.initializers.Initializer, features: int) -> Any:
    """The parameters of one net."""
    net = Net(Setting(0, False), init)
    return net.init({"params": key, "dropout": key}, jnp.zeros((features, 1)))["params"]


def nearly_constant(value: float, noise: float) -> nn.initializers.Initializer:
    """A constant plus normal numbers of standard deviation `noise`."""

    def init(key, shape, dtype=None, out_sharding=None):
        return vs.constant(value)(key, shape, dtype) + vs.normal(noise)(key, shape, dtype)

    return init


def difference(values: Array, axis: int) -> Float[Array, ""]:
    """The largest distance from the first entry along an axis."""
    return jnp.max(jnp.abs(values - jax.lax.slice_in_dim(values, 0, 1, axis=axis)))


def spread(params: Any) -> Float[Array, ""]:
    """The largest difference between hidden units in a tree of parameters (or their gradients)."""
    into = [difference(params[f"dense_{layer}"][name], -1) for layer in range(2) for name in ("kernel", "bias")]
    out = [difference(params[name]["kernel"], 0) for name in ("dense_1", "head")]
    return jnp.max(jnp.stack(into + out))


def distance(params: Any) -> Float[Array, ""]:
    """How far apart the two most alike units are, in a layer where they are most alike."""

    def nearest(kernel):
        apart = jnp.max(jnp.abs(kernel[:, :, None] - kernel[:, None]), axis=0)
        return jnp.min(apart + jnp.where(jnp.eye(WIDTH, dtype=bool), jnp.inf, 0.0))

    return jnp.minimum(nearest(params["dense_0"]["kernel"]), nearest(params["dense_1"]["kernel"]))


@functools.partial(jax.jit, static_argnames=("optimizer",))
def train(params, states, settings: Setting, orders, keys, x, labels, *, optimizer: str):
    """Some steps of many runs.

    Args:
      params: of the runs, along a leading axis.
      states: of the optimizer, along a leading axis.
      settings: each entry of shape (runs,).
      orders: the samples of each step, shape (runs, steps, batch).
      keys: for dropout, shape (runs, steps).
      x: all samples, shape (samples, features).
      labels: shape (samples,).
      optimizer: its name in `OPTIMIZERS`.

    Returns:
      Parameters and states after the steps; loss and `Spread` at each step, (runs, steps).
    """

    def one(params, state, setting, orders, keys):
        def loss(params, rows, key):
            net = Net(setting, vs.zeros)
            logits, hidden = net.apply({"params": params}, x[rows].T, rngs={"dropout": key})
            return cross_entropy(logits.T, labels[rows]), hidden

        def step(carry, inputs):
            params, state = carry
            (value, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params, *inputs)
            updates, state = OPTIMIZERS[optimizer].update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            forward = jnp.max(jnp.stack([difference(layer, 0) for layer in hidden]))
            return (params, state), (value, Spread(spread(params), forward, spread(gradient)))

        return jax.lax.scan(step, (params, state), (orders, keys))

    (params, states), (losses, spreads) = jax.vmap(one)(params, states, settings, orders, keys)
    return params, states, losses, spreads


@jax.jit
def test(params, settings: Setting, x, labels):
    """Accuracy on other samples (none dropped), and the distance between the most alike units; each of shape (runs,)."""

    def one(params, setting):
        net = Net(setting._replace(dropout=False), vs.zeros)
        logits, _ = net.apply({"params": params}, x.T, rngs={"dropout": jax.random.key(0)})
        return accuracy(logits.T, labels), distance(params)

    return jax.vmap(one)(params, settings)
