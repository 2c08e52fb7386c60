"""Models of the families that schemes are for, in linen and nnx; none knows of any scheme."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

WIDTH, HEADS, VOCABULARY, LENGTH, BLOCKS = 64, 4, 200, 6, 3
IDS = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(h, h)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(h)


class Decoder(nn.Module):
    """Learned positions, pre-norm blocks, an untied readout."""

    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, LENGTH, WIDTH))
        for i in range(self.blocks):
            x = Block(name=f"block{i}")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.LayerNorm(name="final")(x))


class Step(nn.Module):
    """A block as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class ScannedDecoder(nn.Module):
    """The same with its blocks stacked in one leaf."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        layers = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=BLOCKS)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.LayerNorm(name="final")(x))


class NnxBlock(nnx.Module):
    """A pre-norm block with packed query, key and value, and a gated feed-forward layer."""

    def __init__(self, rngs):
        self.norm, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.w1 = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.w3 = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.w2 = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        shape = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (y.reshape(shape) for y in jnp.split(self.qkv(self.norm(x)), 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(shape[-1]), axis=-1)
        x = x + self.wo(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        h = self.norm2(x)
        return x + self.w2(jax.nn.silu(self.w1(h)) * self.w3(h))


class NnxDecoder(nnx.Module):
    """Packed attention, gated feed-forward layers, an untied readout."""

    def __init__(self, rngs, blocks=BLOCKS):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(blocks)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nnx_decoder(rngs):
    return NnxDecoder(rngs)


def stds(plan):
    """The standard deviations of the matrices of a plan, by path."""
    return {leaf.path: leaf.std for leaf in plan if leaf.std}
