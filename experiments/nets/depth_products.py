"""What `numerical-stability` multiplies: Gaussian matrices, gradients of the sigmoid, and the Jacobians of deep nets."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab.mean_field import propagate
from experiments.nets.stacks import Tower, rescale

ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}
SCALES = ("0.01", "1.0", "Xavier", "He")


@dataclass(frozen=True)
class Sizes:
    """Of the nets whose gradients are measured."""

    width: int = 256
    depth: int = 16
    batch: int = 32

    def std(self, scale: str) -> float:
        """The weights' standard deviation under a setting; Xavier's and He's for a square layer."""
        return {"0.01": 0.01, "1.0": 1.0, "Xavier": self.width**-0.5, "He": (2 / self.width) ** 0.5}[scale]


SIZES = Sizes()


@functools.partial(jax.jit, static_argnames=("init", "width", "steps"))
def matrix_products(keys, *, init: vs.initializers.Initializer, width: int, steps: int) -> Float[Array, "seeds steps"]:
    """ln of the Frobenius norm of the product of 1, 2, ... matrices. The product is kept at norm 1, so nothing overflows."""

    def one(key):
        def step(product, key):
            product = product @ init(key, (width, width))
            norm = jnp.linalg.norm(product)
            return product / norm, jnp.log(norm)

        start = jnp.eye(width) / math.sqrt(width)
        return jnp.cumsum(jax.lax.scan(step, start, jax.random.split(key, steps))[1])

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnames=("init", "width", "steps"))
def vector_products(keys, *, init: vs.initializers.Initializer, width: int, steps: int) -> Float[Array, "seeds steps"]:
    """ln ‖xW₁W₂…‖/‖x‖ after 1, 2, ... matrices."""

    def one(key):
        def step(x, key):
            x = x @ init(key, (width, width))
            norm = jnp.linalg.norm(x)
            return x / norm, jnp.log(norm)

        key_start, key_steps = jax.random.split(key)
        start = jax.random.normal(key_start, (width,))
        return jnp.cumsum(jax.lax.scan(step, start / jnp.linalg.norm(start), jax.random.split(key_steps, steps))[1])

    return jax.vmap(one)(keys)


@jax.jit
def sigmoid_products(keys) -> Float[Array, "seeds layers"]:
    """ln of the product of the sigmoid's gradients along a path through layers whose pre-activations are standard normal."""
    z = jax.vmap(lambda key: jax.random.normal(key, (50,)))(keys)
    return jnp.cumsum(jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z), axis=1)  # σ' = σ(z)·σ(−z)


@functools.partial(jax.jit, static_argnames=("sizes",))
def gradient_norms(key, stds, activations, *, sizes: Sizes) -> Float[Array, "settings depth"]:
    """ln of the gradient's norm at every layer's pre-activation, for a standard normal gradient at the output.

    Args:
      key: of weights, inputs and the output's gradient.
      stds: the weights' standard deviation, shape (settings,).
      activations: the place in ACTIVATIONS, shape (settings,).
      sizes: of the net.
    """
    key_weights, key_inputs, key_gradient = jax.random.split(key, 3)
    x = jax.random.normal(key_inputs, (sizes.batch, sizes.width))
    cotangent = jax.random.normal(key_gradient, x.shape)
    unit = Tower(sizes.width, sizes.depth, jnp.tanh, kernel_init=vs.normal(1.0)).init(key_weights, x)

    def one(setting):
        std, activation = setting
        tower = Tower(sizes.width, sizes.depth, lambda y: jax.lax.switch(activation, list(ACTIVATIONS.values()), y))
        params = rescale(unit["params"], std)

        def output(perturbations):
            y: Any = tower.apply({"params": params, "perturbations": perturbations}, x)
            return jnp.sum(y * cotangent)

        return jax.vmap(_log_norm)(jax.grad(output)(unit["perturbations"])["layers"]["preactivation"])

    return jax.lax.map(one, (stds, activations))


def _log_norm(x: Array) -> Array:
    """ln ‖x‖ where the squares would leave float32's range."""
    largest = jnp.max(jnp.abs(x))
    return jnp.log(largest) + 0.5 * jnp.log(jnp.sum(jnp.square(x / largest)))


def predicted_slopes(stds: Array, activations: Array, sizes: Sizes) -> list[float]:
    """What the law says of the gradient's norm: the mean of ½ln(n·Var[w]·E[φ'(y)²]) over layers 1 to L − 1.

    The gradient at layer l's pre-activation is φ'(y_l) times what comes through the next layer's weights; the last layer's own
    φ' is in both of the norms that are compared.
    """
    factor = sizes.width * jnp.square(stds)
    _, slopes = propagate(tuple(ACTIVATIONS.values()), activations, factor, factor, depth=sizes.depth - 1)
    return np.mean(0.5 * np.log(slopes), axis=1).round(6).tolist()
