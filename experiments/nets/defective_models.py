"""Small models in which a defect of initialization can be planted, and mended."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import varscale as vs

ROWS = jax.ShapeDtypeStruct((16, 64), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
PICTURES = jax.ShapeDtypeStruct((4, 8, 8, 16), jnp.float32)
lecun, zeros, normal = nn.initializers.lecun_normal(), nn.initializers.zeros, nn.initializers.normal


def plain(init: Any, act: Any = nn.relu, depth: int = 10, **kwargs: Any) -> nn.Module:
    """A plain net whose first layer reads data."""
    kernels = [vs.lecun_normal(), *[init] * (depth - 1)]
    return nn.Sequential([f for k in kernels for f in (nn.Dense(64, kernel_init=k, **kwargs), act)] + [nn.Dense(10)])


class Weight(nn.Module):
    """An einsum with a kernel of its own between two dense layers."""

    spec: str
    shape: tuple[int, ...]
    kernel_init: Any
    heads: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="first")(x)
        x = x.reshape(*x.shape[:-1], self.heads, -1) if self.heads > 1 else x
        y = jnp.einsum(self.spec, x, self.param("kernel", self.kernel_init, self.shape))
        return nn.Dense(3, name="last")(y.reshape(*x.shape[:1], -1))


class Pictures(nn.Module):
    """Two layers over pictures: a given one, and a convolution before it."""

    layer: nn.Module
    smaller: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (1, 1), strides=(self.smaller, self.smaller))(x)
        return nn.Dense(4, name="last")(nn.relu(self.layer(x)).mean((1, 2)))


class DeepPictures(nn.Module):
    """Eight convolutions."""

    kernel_init: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            x = nn.relu(nn.Conv(16, (3, 3), kernel_init=self.kernel_init, padding="CIRCULAR")(x))
        return nn.Dense(4)(x.mean((1, 2)))


def fan_of_all_axes(key, shape, dtype=jnp.float32):
    """A fan-in that counts the outputs too."""
    return jax.random.normal(key, shape, dtype) * (2 / np.prod(shape)) ** 0.5


def one_column(key, shape, dtype=jnp.float32):
    """One column for all units."""
    return jnp.broadcast_to(jax.random.normal(key, (shape[0], 1), dtype) / shape[0] ** 0.5, shape)


def own_key(key, shape, dtype=jnp.float32):
    """A key of its own, the same for every seed."""
    return jax.random.normal(jax.random.key(3), shape, dtype) / shape[0] ** 0.5


class Packed(nn.Module):
    """Attention whose query, key and value are one matrix."""

    kernel_init: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            q, k, v = jnp.split(nn.Dense(96, kernel_init=self.kernel_init, name=None)(nn.LayerNorm()(x)), 3, axis=-1)
            x = x + nn.Dense(32)(jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 32**0.5) @ v)
        return nn.Dense(10)(nn.LayerNorm()(x))


class Gates(nn.Module):
    """A recurrent cell whose four gates are one matrix."""

    kernel_init: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (64, 128))

        def step(state, now):
            c, h = state
            i, f, g, o = jnp.split(jnp.concatenate([now, h], -1) @ kernel, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        _, states = jax.lax.scan(step, (jnp.zeros((2, 32)), jnp.zeros((2, 32))), jnp.swapaxes(x, 0, 1))
        return nn.Dense(3)(states[-1])


class Stream(nn.Module):
    """Residual blocks without norms."""

    last: float
    blocks: int = 12

    @nn.compact
    def __call__(self, x):
        for i in range(self.blocks):
            x = Branch(self.last, name=f"block_{i}")(x)
        return nn.Dense(3)(x)


class Branch(nn.Module):
    last: float

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(64)(x))
        return x + nn.Dense(64, kernel_init=vs.scaled(vs.he_normal(), self.last))(h)


class Averages(nn.Module):
    """Attention, with or without the residual stream around it."""

    residual: bool
    blocks: int = 6

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x = x + y if self.residual else y
        return nn.Dense(3)(nn.LayerNorm()(x))


class Language(nn.Module):
    """A pre-norm transformer: its embedding's deviation, scores' scale, norms' epsilon and logits' temperature to choose."""

    deviation: float = 0.02
    scale: float = 1.0
    epsilon: float = 1e-6
    temperature: float = 1.0

    @nn.compact
    def __call__(self, ids):
        norm = lambda **k: nn.RMSNorm(epsilon=self.epsilon, **k)  # noqa: E731
        embed = nn.Embed(100, 64, embedding_init=normal(self.deviation))
        x = embed(ids)
        for i in range(2):
            h = norm()(x)
            q, k, v = (nn.Dense(64, use_bias=False)(h) for _ in range(3))
            scores = jnp.einsum("btd,bsd->bts", q, k) * (self.scale / 8)
            x = x + nn.Dense(64, kernel_init=normal(0.02), name=f"out_{i}")(jax.nn.softmax(scores) @ v)
            x = x + nn.Dense(64, kernel_init=normal(0.02))(nn.gelu(nn.Dense(128)(norm()(x))))
        return embed.attend(norm(name="final")(x)) / self.temperature


class OneKey(nnx.Module):
    """Embedding and readout, drawn from one key or from two."""

    def __init__(self, keys: int, rngs: nnx.Rngs):
        first = rngs.params()
        second = first if keys == 1 else rngs.params()
        self.embedding = nnx.Param(jax.random.truncated_normal(first, -2, 2, (64, 32)))
        self.head = nnx.Param(jax.random.truncated_normal(second, -2, 2, (64, 32)) / 32**0.5)

    def __call__(self, ids):
        return self.embedding[...][ids] @ self.head[...].T


class Named(nn.Module):
    """A Dense layer of a given name."""

    layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name=self.layer)(x)


class Paths(nn.Module):
    """Modules at "abc/def" and "ab/cdef", or at paths that differ when the separators are left out."""

    second: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(Named(self.second, name="ab")(nn.relu(Named("def", name="abc")(x))))


class Configured(nn.Module):
    """A setting that the layers read, or do not."""

    initializer_range: float = 0.05
    read: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, kernel_init=normal(self.initializer_range if self.read else 0.02))(x)


class Leftover(nn.Module):
    """A parameter that nothing reads."""

    read: bool

    @nn.compact
    def __call__(self, x):
        gate = self.param("gate", nn.initializers.ones, (64,))
        return nn.Dense(3)(x * gate if self.read else x)


class Overflow(nn.Module):
    """Squares in float16."""

    scale: float

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, dtype=jnp.float16)(x * self.scale)
        return nn.Dense(3)((x * x).astype(jnp.float32))


def pixels(mended: bool) -> np.ndarray:
    """Sixteen pictures of 64 pixels."""
    raw = np.random.default_rng(0).integers(0, 256, (16, 64)).astype(np.float32)
    return raw / 128 - 1 if mended else raw


def columns(mended: bool) -> np.ndarray:
    """Features of which four are constant."""
    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    return x if mended else np.where(np.arange(64) < 4, 1, x).astype(np.float32)


def shifted(mended: bool) -> np.ndarray:
    """Features with a common mean."""
    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    return x if mended else x + 6


def fans(m: float, n: float) -> Any:
    """Lecun's law with the fans of use."""
    return vs.variance_scaling(1.0, fans=vs.Fans(m, n))
