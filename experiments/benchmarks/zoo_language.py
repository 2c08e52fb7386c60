"""Language architectures of the zoo, small: encoders, decoders and both, with the positions and norms that are in use."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.zoo_vision import EncoderBlock

WIDTH, HEADS, VOCABULARY = 64, 4, 256
SIZE = WIDTH // HEADS


def causal(length: int, window: int | None = None) -> np.ndarray:
    """Which keys a query reads: those before it, at most `window` of them."""
    behind = np.arange(length)[:, None] - np.arange(length)
    return (behind >= 0) & (behind < (window or length))


class Bert(nn.Module):
    """Post-norm encoder whose keys at paddings (id 0) are masked (arXiv 1810.04805)."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        small = nn.initializers.normal(0.02)
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=small)(ids)
        x = nn.LayerNorm()(x + nn.Embed(ids.shape[1], WIDTH, embedding_init=small)(jnp.arange(ids.shape[1])))
        mask = (ids != 0)[:, None, None]
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(HEADS, kernel_init=small)(x, mask=mask))
            y = nn.Dense(WIDTH, kernel_init=small)(nn.gelu(nn.Dense(4 * WIDTH, kernel_init=small)(x)))
            x = nn.LayerNorm()(x + y)
        return nn.Dense(2, kernel_init=small)(jnp.tanh(nn.Dense(WIDTH, kernel_init=small)(x[:, 0])))


class Gpt2(nn.Module):
    """Pre-norm decoder, projections scaled by depth, readout tied to the embedding."""

    depth: int = 2

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        small, last = nn.initializers.normal(0.02), nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
        table = nn.Embed(VOCABULARY, WIDTH, embedding_init=small)
        x = table(ids) + self.param("positions", small, (ids.shape[1], WIDTH))
        for _ in range(self.depth):
            y = nn.Dense(3 * WIDTH, kernel_init=small)(nn.LayerNorm()(x))
            q, k, v = (part.reshape(*part.shape[:2], HEADS, SIZE) for part in jnp.split(y, 3, axis=-1))
            y = nn.dot_product_attention(q, k, v, mask=causal(ids.shape[1])).reshape(x.shape)
            x = x + nn.Dense(WIDTH, kernel_init=last)(y)
            y = nn.gelu(nn.Dense(4 * WIDTH, kernel_init=small)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH, kernel_init=last)(y)
        return table.attend(nn.LayerNorm()(x))


class Bloom(nn.Module):
    """Decoder whose attention is biased by distance, a slope a head (ALiBi, arXiv 2108.12409)."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(nn.Embed(VOCABULARY, WIDTH)(ids))
        places = np.arange(ids.shape[1])
        slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)
        bias = jnp.asarray(-slopes[:, None, None] * np.abs(places[:, None] - places), jnp.float32)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            q, k, v = (nn.DenseGeneral((HEADS, SIZE))(y) for _ in range(3))
            y = nn.dot_product_attention(q, k, v, bias=bias, mask=causal(ids.shape[1]))
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of (batch, length, heads, size): halves turned by angles (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 1e4 ** (-np.arange(half) / half)
    cos, sin = (f(angle).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LlamaBlock(nnx.Module):
    """RMS norms, rotary positions, keys shared by groups of heads, gated feed-forward layer.

    Attributes:
        window: keys that a query reads at most, as Mistral's; None: all before it.
        query_norm: whether queries and keys are normalised a head, as Qwen's.
        post_norm: whether what a branch adds is normalised too, as Gemma's.
    """

    def __init__(self, rngs: nnx.Rngs, window: int | None, query_norm: bool, post_norm: bool):
        def linear(n: int, m: int) -> nnx.Linear:
            return nnx.Linear(n, m, use_bias=False, kernel_init=nnx.initializers.normal(0.05), rngs=rngs)

        groups = 2
        self.queries, self.keys, self.values = (linear(WIDTH, n * SIZE) for n in (HEADS, groups, groups))
        self.out = linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = linear(WIDTH, 3 * WIDTH), linear(WIDTH, 3 * WIDTH), linear(3 * WIDTH, WIDTH)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(4 if post_norm else 2)])
        self.head_norms = nnx.List([nnx.RMSNorm(SIZE, rngs=rngs) for _ in range(2 if query_norm else 0)])
        self.window = window

    def __call__(self, x: jax.Array) -> jax.Array:
        h, (batch, length) = self.norms[0](x), x.shape[:2]
        q, k, v = (f(h).reshape(batch, length, -1, SIZE) for f in (self.queries, self.keys, self.values))
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        q, k = rotated(q), rotated(k)
        k, v = (jnp.repeat(z, HEADS // z.shape[2], axis=2) for z in (k, v))
        y = self.out(jax.nn.dot_product_attention(q, k, v, mask=causal(length, self.window)[None, None]).reshape(x.shape))
        x = x + (self.norms[2](y) if len(self.norms) > 2 else y)
        h = self.norms[1](x)
        y = self.down(nnx.silu(self.gate(h)) * self.up(h))
        return x + (self.norms[3](y) if len(self.norms) > 2 else y)


class Llama(nnx.Module):
    """Blocks as Llama (arXiv 2302.13971), Mistral (2310.06825), Qwen (2505.09388) and Gemma (2408.00118) have them."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        window: int | None = None,
        query_norm: bool = False,
        post_norm: bool = False,
        scaled: bool = False,
    ):
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([LlamaBlock(rngs, window, query_norm, post_norm) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.scaled = scaled
        self.readout = None if scaled else nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.table(ids)
        x = x * WIDTH**0.5 if self.scaled else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.readout is None:
            return 30 * jnp.tanh(self.table.attend(x) / 30)
        return self.readout(x)


class Decoder(nn.Module):
    """Pre-norm decoder blocks that also read an encoder's output."""

    @nn.compact
    def __call__(self, x: jax.Array, read: jax.Array, mask: Any = None) -> jax.Array:
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=causal(x.shape[1])[None, None])
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), read, mask=mask)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


class EncoderDecoder(nn.Module):
    """Translation: encoder and decoder over one table of embeddings (arXiv 1706.03762, pre-norm)."""

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        table = nn.Embed(VOCABULARY, WIDTH)
        x = table(source) * WIDTH**0.5
        mask = (source != 0)[:, None, None]
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=mask)
            x = x + nn.Dense(WIDTH)(nn.relu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return table.attend(Decoder()(table(target) * WIDTH**0.5, nn.LayerNorm()(x), mask))


class T5(nn.Module):
    """Encoder with RMS norms, logits without a scale and a learned bias by distance (arXiv 1910.10683)."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(1.0))(ids)
        places = np.arange(ids.shape[1])
        bias = nn.Embed(32, HEADS, name="bias")(np.clip(places[:, None] - places + 16, 0, 31)).transpose(2, 0, 1)
        mask = jnp.where(ids != 0, 0.0, -1e9)[:, None, None]
        for _ in range(2):
            y = nn.RMSNorm()(x)
            scale = (WIDTH * SIZE) ** -0.5
            q = nn.DenseGeneral((HEADS, SIZE), use_bias=False, kernel_init=nn.initializers.normal(scale))(y)
            k, v = (nn.DenseGeneral((HEADS, SIZE), use_bias=False)(y) for _ in range(2))
            weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias + mask)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False)(y)
            y = nn.RMSNorm()(x)
            y = nn.gelu(nn.Dense(2 * WIDTH, use_bias=False)(y)) * nn.Dense(2 * WIDTH, use_bias=False)(y)
            x = x + nn.Dense(WIDTH, use_bias=False)(y)
        return nn.RMSNorm()(x)


class Whisper(nn.Module):
    """Convolutions over a spectrogram, sinusoidal positions, encoder and decoder (arXiv 2212.04356)."""

    @nn.compact
    def __call__(self, spectrogram: jax.Array, ids: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Conv(WIDTH, (3,))(spectrogram))
        x = nn.gelu(nn.Conv(WIDTH, (3,), 2)(x))
        angle = np.arange(x.shape[1])[:, None] * 1e4 ** (-np.arange(WIDTH // 2) / (WIDTH // 2 - 1))
        x = x + np.float32(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1))
        for _ in range(2):
            x = EncoderBlock()(x)
        table = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(0.02))
        y = table(ids) + self.param("positions", nn.initializers.normal(0.01), (ids.shape[1], WIDTH))
        return table.attend(Decoder()(y, nn.LayerNorm()(x)))


class Experts(nn.Module):
    """Mixture of experts: the two of the largest gates, renormalised, stacked kernels (arXiv 2401.04088)."""

    experts: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = nn.softmax(nn.Dense(self.experts, use_bias=False)(x))
        top, which = jax.lax.top_k(gates, 2)
        chosen = jnp.sum(jax.nn.one_hot(which, self.experts) * (top / top.sum(-1, keepdims=True))[..., None], axis=-2)
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", init, (self.experts, WIDTH, 2 * WIDTH))
        down = self.param("down", init, (self.experts, 2 * WIDTH, WIDTH))
        y = nn.silu(jnp.einsum("btd,edf->btef", x, up))
        return jnp.einsum("btef,efd,bte->btd", y, down, chosen)


class Mixtral(nn.Module):
    """Decoder with mixtures of experts in place of feed-forward layers."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=causal(ids.shape[1])[None, None])
            x = x + Experts()(nn.RMSNorm()(x))
        return nn.Dense(VOCABULARY)(nn.RMSNorm()(x))


class LatentAttention(nn.Module):
    """Keys and values from one narrow latent, a rotary part beside it (arXiv 2405.04434)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(size: int, y: jax.Array) -> jax.Array:
            return nn.DenseGeneral((HEADS, size), use_bias=False)(y)

        latent = nn.RMSNorm()(nn.Dense(24, use_bias=False)(x))
        shared = rotated(nn.Dense(8, use_bias=False)(x)[:, :, None])
        q = nn.RMSNorm()(nn.Dense(32, use_bias=False)(x))
        q = jnp.concatenate([heads(SIZE, q), rotated(heads(8, q))], axis=-1)
        k = jnp.concatenate([heads(SIZE, latent), jnp.broadcast_to(shared, (*shared.shape[:2], HEADS, 8))], axis=-1)
        y = nn.dot_product_attention(q, k, heads(SIZE, latent), mask=causal(x.shape[1]))
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False)(y)


class Deepseek(nn.Module):
    """Decoder with latent attention and gated feed-forward layers."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        for _ in range(2):
            x = x + LatentAttention()(nn.RMSNorm()(x))
            y = nn.RMSNorm()(x)
            x = x + nn.Dense(WIDTH)(nn.silu(nn.Dense(2 * WIDTH)(y)) * nn.Dense(2 * WIDTH)(y))
        return nn.Dense(VOCABULARY)(nn.RMSNorm()(x))
