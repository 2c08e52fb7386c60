"""Mainstream models, small, each as (model, input): what predictions must keep right whatever is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH, HEADS, VOCABULARY = 64, 4, 200
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 16)).astype(np.int32)
IMAGES = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)


def features(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Perceptron(nn.Module):
    """Dense layers, each with an activation."""

    activation: Callable[[jax.Array], jax.Array]
    depth: int = 5

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = self.activation(nn.Dense(WIDTH)(x))
        return nn.Dense(10)(x)


class NnxPerceptron(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])
        self.readout = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return self.readout(x)


class Convolutional(nn.Module):
    """Convolutions with a max-pool, an average pool and a stride, flattened into dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(WIDTH)(x.reshape(len(x), -1))))


class Residual(nn.Module):
    """A ResNet of basic blocks, some of them strided."""

    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        def conv(n, size=3, stride=1):
            return nn.Conv(n, (size, size), (stride, stride), use_bias=False)

        x = nn.max_pool(nn.relu(self.norm()(conv(16)(x))), (3, 3), (2, 2), padding="SAME")
        for n, stride in ((16, 1), (32, 2), (32, 1)):
            h = self.norm()(conv(n)(nn.relu(self.norm()(conv(n, 3, stride)(x)))))
            x = nn.relu(h + (x if x.shape == h.shape else self.norm()(conv(n, 1, stride)(x))))
        return nn.Dense(10)(x.mean((1, 2)))


class Separable(nn.Module):
    """ConvNeXt blocks: depthwise convolutions, a norm, an inverted bottleneck, a small scale a channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(32, (4, 4), (4, 4))(x))
        for k in range(2):
            h = nn.LayerNorm()(nn.Conv(32, (3, 3), feature_group_count=32)(x))
            h = nn.Dense(32)(nn.gelu(nn.Dense(128)(h)))
            x = x + h * self.param(f"scale_{k}", nn.initializers.constant(0.01), (32,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, mask=None):
        drop = nn.Dropout(self.dropout, deterministic=self.dropout == 0)
        h = nn.LayerNorm()(x)
        x = x + drop(nn.MultiHeadDotProductAttention(HEADS)(h, h, mask=mask))
        h = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))))
        return x + drop(h)


class VisionTransformer(nn.Module):
    """Patches, a class token that starts at zero, learned positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(x).reshape(len(x), -1, WIDTH)
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class Decoder(nn.Module):
    """A causal language model that reads out by its embedding."""

    dropout: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(0.02))
        x = table(ids) + nn.Embed(32, WIDTH, embedding_init=nn.initializers.normal(0.02))(jnp.arange(ids.shape[1]))
        block = nn.remat(Block) if self.remat else Block
        for _ in range(2):
            x = block(self.dropout)(x, nn.make_causal_mask(ids))
        return table.attend(nn.LayerNorm()(x))


class Encoder(nn.Module):
    """A post-norm encoder of ids, averaged over places."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        x = nn.LayerNorm()(x + self.param("positions", nn.initializers.normal(0.02), (1, ids.shape[1], WIDTH)))
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(HEADS)(x, x))
            x = nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x))))
        return nn.Dense(2)(jnp.tanh(nn.Dense(WIDTH)(x.mean(1))))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of (batch, places, heads, features)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 100.0 ** (-np.arange(half) / half)
    cos, sin = (np.float32(f(angle))[None, :, None] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class GroupedBlock(nnx.Module):
    """A block as Llama has it: RMS norms, rotary positions, keys shared by groups of heads, a gated feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs, groups: int = 2):
        def linear(n, m):
            return nnx.Linear(n, m, use_bias=False, rngs=rngs)

        self.groups, size = groups, WIDTH // HEADS
        self.queries, self.keys, self.values = (linear(WIDTH, n * size) for n in (HEADS, groups, groups))
        self.out, self.gate, self.up, self.down = (
            linear(n, m) for n, m in ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH))
        )
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        h, (batch, length) = self.norms[0](x), x.shape[:2]
        q, k, v = (f(h).reshape(batch, length, -1, WIDTH // HEADS) for f in (self.queries, self.keys, self.values))
        k, v = (jnp.repeat(z, HEADS // self.groups, axis=2) for z in (rotated(k), v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", rotated(q), k) / (WIDTH // HEADS) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -1e30))
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        h = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class GroupedDecoder(nnx.Module):
    """Two such blocks between an embedding and a readout."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([GroupedBlock(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.readout = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


class Mixer(nn.Module):
    """Dense layers along places and along channels in turn."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(x).reshape(len(x), -1, WIDTH)
        for _ in range(2):
            h = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(nn.Dense(x.shape[1])(nn.gelu(nn.Dense(32)(h))), 1, 2)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class UNet(nn.Module):
    """Strided convolutions down, transposed ones up, joined with what went down."""

    @nn.compact
    def __call__(self, x):
        def block(n, x):
            return nn.relu(nn.GroupNorm(4)(nn.Conv(n, (3, 3))(x)))

        skips = []
        for n in (8, 16):
            skips.append(block(n, x))
            x = nn.Conv(n, (3, 3), strides=2)(skips[-1])
        x = block(32, x)
        for n, skip in zip((16, 8), skips[::-1], strict=True):
            x = block(n, jnp.concatenate([nn.ConvTranspose(n, (2, 2), strides=(2, 2))(x), skip], axis=-1))
        return nn.Conv(3, (1, 1))(x)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "perceptron, relu": lambda: (Perceptron(nn.relu), features(16, WIDTH)),
    "perceptron, tanh": lambda: (Perceptron(jnp.tanh), features(16, WIDTH)),
    "perceptron in nnx": lambda: (lambda rngs: NnxPerceptron(rngs), features(16, WIDTH)),
    "convolutional": lambda: (Convolutional(), IMAGES),
    "residual, batch norm": lambda: (Residual(lambda: nn.BatchNorm(use_running_average=False)), IMAGES),
    "residual, group norm": lambda: (Residual(lambda: nn.GroupNorm(8)), IMAGES),
    "separable": lambda: (Separable(), IMAGES),
    "vision transformer": lambda: (VisionTransformer(), IMAGES),
    "decoder": lambda: (Decoder(), IDS),
    "decoder, dropout and remat": lambda: (Decoder(dropout=0.1, remat=True), IDS),
    "encoder": lambda: (Encoder(), IDS),
    "grouped decoder in nnx": lambda: (lambda rngs: GroupedDecoder(rngs), IDS),
    "mixer": lambda: (Mixer(), IMAGES),
    "u-net": lambda: (UNet(), IMAGES),
}
