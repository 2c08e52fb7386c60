"""Drawn networks, to hold predictions against: mean squares of outputs and of gradients, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# A sound prediction is further off than its bound and this many standard errors once in 30000 times; draws have fixed keys.
SCORES = 4.0


def drawn(one: Callable[[jax.Array], Any], count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws of what `one` makes of a key, and its standard error."""
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), count)), float)
    return found.mean(0), found.std(0) / math.sqrt(count - 1)


def output(model: nn.Module, shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean square of a linen model's output on normal inputs."""

    def one(key: jax.Array) -> jax.Array:
        k_weights, k_input = jax.random.split(key)
        x = jax.random.normal(k_input, shape)
        return jnp.mean(model.apply(model.init(k_weights, x), x, mutable=["batch_stats"])[0] ** 2)

    return drawn(one, count)


def gradients(model: nn.Module, shape: tuple[int, ...], paths: dict[str, tuple[int, ...]], count: int) -> Any:
    """Mean squared gradients at the outputs (of these shapes) of modules, for normal inputs and cotangents."""

    def one(key: jax.Array) -> jax.Array:
        k_weights, k_input, k_cotangent = jax.random.split(key, 3)
        x = jax.random.normal(k_input, shape)
        variables = model.init(k_weights, x)

        def nudged(nudges: dict[str, jax.Array]) -> jax.Array:
            def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                out, path = call(*args, **kwargs), "/".join(context.module.path)
                return out + nudges[path] if path in nudges and context.method_name == "__call__" else out

            with nn.intercept_methods(add):
                return model.apply(variables, x, mutable=["batch_stats"])[0]

        y, back = jax.vjp(nudged, {path: jnp.zeros(own) for path, own in paths.items()})
        found = back(jax.random.normal(k_cotangent, y.shape))[0]
        return jnp.stack([jnp.mean(found[path] ** 2) for path in paths])

    return drawn(one, count)


def agrees(predicted: float, bound: float, measured: float, error: float) -> bool:
    """Whether a prediction lies within its bound and `SCORES` standard errors of a measurement."""
    return abs(predicted - measured) <= bound * max(abs(predicted), abs(measured)) + SCORES * error
