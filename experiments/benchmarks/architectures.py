"""The architectures of the validation grid: small linen modules that name everything they do."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "selu": nn.selu,
    "sigmoid": nn.sigmoid,
    "elu": nn.elu,
    "softplus": nn.softplus,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
}


class Act(nn.Module):
    """An activation as a module, so that its output is a row."""

    name_: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.name_](x)


def norm(kind: str) -> Any:
    """A fresh normalization module, or the identity."""
    match kind:
        case "layer":
            return nn.LayerNorm()
        case "rms":
            return nn.RMSNorm()
        case "batch":
            return nn.BatchNorm(use_running_average=False)
        case "group":
            return nn.GroupNorm(8)
        case _:
            return lambda x: x


def kernel(gain: float) -> Any:
    """Fan-in scaling."""
    return nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal")


class MLP(nn.Module):
    act: str = "relu"
    width: int = 256
    depth: int = 10
    norm: str = "none"
    gain: float = 2.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = Act(self.act)(norm(self.norm)(nn.Dense(self.width, kernel_init=kernel(self.gain))(x)))
        return x


class Residual(nn.Module):
    order: str = "pre"
    norm: str = "none"
    width: int = 256
    depth: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda: nn.Dense(self.width, kernel_init=kernel(1.0 if self.norm == "none" else 2.0))  # noqa: E731
        x = dense()(x)
        for _ in range(self.depth):
            if self.order == "pre":
                h = dense()(Act("relu")(norm(self.norm)(x)))
                x = x + dense()(Act("relu")(norm(self.norm)(h)))
            else:
                h = norm(self.norm)(dense()(x))
                h = norm(self.norm)(dense()(Act("relu")(h)))
                x = Act("relu")(x + h)
        return x


class CNN(nn.Module):
    act: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = lambda n, k=3, **kw: nn.Conv(n, (k, k), kernel_init=kernel(2.0), **kw)  # noqa: E731
        x = Act(self.act)(conv(64)(x))
        x = Act(self.act)(conv(64, strides=2)(x))
        x = Act(self.act)(conv(64, feature_group_count=64)(x))
        x = Act(self.act)(conv(128, 1)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = Act(self.act)(conv(128)(x))
        x = Act(self.act)(conv(128, feature_group_count=4)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class ResNet(nn.Module):
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = lambda n, k=3, s=1: nn.Conv(n, (k, k), (s, s), use_bias=False, kernel_init=kernel(2.0))  # noqa: E731
        x = Act("relu")(norm(self.norm)(conv(32)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            h = Act("relu")(norm(self.norm)(conv(width, 3, stride)(x)))
            h = norm(self.norm)(conv(width)(h))
            if stride > 1:
                x = norm(self.norm)(conv(width, 1, stride)(x))
            x = Act("relu")(x + h)
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    heads: int = 4
    feedforward: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any) -> jax.Array:
        width = x.shape[-1]
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")(h, h, mask=mask)
        if self.feedforward == "gelu":
            h = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        else:
            a, b = jnp.split(nn.Dense(8 * width, use_bias=False, name="up")(nn.RMSNorm()(x)), 2, -1)
            h = nn.silu(a) * b
        return x + nn.Dense(width, name="down")(h)


class Transformer(nn.Module):
    depth: int = 6
    width: int = 128
    heads: int = 4
    causal: bool = True
    feedforward: str = "gelu"
    vocabulary: int = 1000

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width)(ids)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, ids.shape[1], self.width))
        mask = nn.make_causal_mask(ids) if self.causal else None
        for i in range(self.depth):
            x = Block(self.heads, self.feedforward, name=f"block_{i}")(x, mask)
        return nn.Dense(self.vocabulary, use_bias=False)(nn.LayerNorm()(x))


class Recurrent(nn.Module):
    """Layers of recurrent cells, as they are or as normalised branches of a stream, and a readout of every step."""

    cell: str
    width: int
    depth: int = 2
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cells = {"LSTM": nn.OptimizedLSTMCell, "GRU": nn.GRUCell, "tanh": nn.SimpleCell}
        x = nn.Dense(self.width, name="in")(x)
        for k in range(self.depth):
            layer: Any = nn.RNN(cells[self.cell](self.width, recurrent_kernel_init=kernel(1.0)), name=f"layer_{k}")
            x = x + layer(nn.LayerNorm()(x)) if self.residual else layer(x)
        return nn.Dense(10)(x)
