"""Training, compiled once: whole runs are one `lax.scan`, so seeds, scales and learning rates are arguments to vmap over."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = Any


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """The share of samples whose largest logit is their label's."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


def fit(
    loss: Callable[..., Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Any,
) -> tuple[Params, Float[Array, " steps"]]:
    """Train for one step a batch.

    Args:
      loss: `loss(params, batch)`, a scalar.
      optimizer: any optax optimizer; its learning rate may be traced.
      params: where to start.
      batches: a pytree of arrays whose leading axis is the step: data, indices into data, keys, or just `jnp.arange(steps)`.

    Returns:
      The parameters after the last step, and the loss before each step.
    """

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params, losses


def minibatches(key: jax.Array, samples: int, size: int, steps: int) -> Int[Array, "steps size"]:
    """Indices of the samples of each step: epochs in fresh random order, without the remainder."""
    if not 1 <= size <= samples:
        raise ValueError(f"size is {size}; give 1 to the number of samples, {samples}")
    a_round = samples // size
    orders = jax.vmap(lambda key: jax.random.permutation(key, samples)[: a_round * size])(
        jax.random.split(key, -(-steps // a_round))
    )
    return orders.reshape(-1, size)[:steps]
