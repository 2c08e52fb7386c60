"""Healthy architectures as public packages write them, small: each a model and an input, which an audit must not flag."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import varscale as vs
from experiments.nets.healthy_constructions import IDS, PICTURES, ROWS, TOKENS, normal, zeros

XAVIER, SMALL_BIAS = nn.initializers.xavier_uniform(), normal(1e-6)


class Vit(nn.Module):
    """Patches, a class token of zeros, learned positions, a head of zeros."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (4, 4), strides=(4, 4), padding="VALID")(images)
        x = x.reshape(x.shape[0], -1, 32)
        x = jnp.concatenate([jnp.tile(self.param("cls", zeros, (1, 1, 32)), (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", normal(0.02), (1, x.shape[1], 32))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2, kernel_init=XAVIER)(y, y)
            h = nn.gelu(nn.Dense(64, kernel_init=XAVIER, bias_init=SMALL_BIAS)(nn.LayerNorm()(x)))
            x = x + nn.Dense(32, kernel_init=XAVIER, bias_init=SMALL_BIAS)(h)
        return nn.Dense(10, kernel_init=zeros)(nn.LayerNorm()(x)[:, 0])


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(nn.Dense(x.shape[1])(nn.gelu(nn.Dense(16)(y))), 1, 2)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10, kernel_init=zeros)(nn.LayerNorm()(x).mean(1))


class ConvNext(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = vs.truncated_normal(0.02)
        x = nn.LayerNorm()(nn.Conv(16, (2, 2), strides=(2, 2), kernel_init=init)(x))
        for i in range(3):
            y = nn.LayerNorm()(nn.Conv(16, (7, 7), feature_group_count=16, kernel_init=init)(x))
            y = nn.Dense(16, kernel_init=init)(nn.gelu(nn.Dense(64, kernel_init=init)(y)))
            x = x + y * self.param(f"gamma_{i}", nn.initializers.constant(1e-6), (16,))
        return nn.Dense(10, kernel_init=init)(nn.LayerNorm()(x.mean((1, 2))))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=False)  # noqa: E731
        x = nn.relu6(norm()(nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False)(x)))
        for _ in range(3):
            y = nn.relu6(norm()(nn.Conv(32, (1, 1), use_bias=False)(x)))
            y = nn.relu6(norm()(nn.Conv(32, (3, 3), feature_group_count=32, use_bias=False)(y)))
            x = x + norm()(nn.Conv(8, (1, 1), use_bias=False)(y))
        return nn.Dense(10)(x.mean((1, 2)))


class DiffusionUnet(nn.Module):
    """A small U-Net of a diffusion model: time embedding, group norms, last convolutions of zeros."""

    @nn.compact
    def __call__(self, x, time):
        angles = time[:, None] * jnp.exp(-jnp.arange(8) / 2)
        t = nn.Dense(32)(nn.silu(nn.Dense(32)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))))
        x = skip = nn.Conv(16, (3, 3))(x)
        for _ in range(2):
            h = nn.Conv(16, (3, 3))(nn.silu(nn.GroupNorm(4)(x))) + nn.Dense(16)(nn.silu(t))[:, None, None]
            x = x + nn.Conv(16, (3, 3), kernel_init=zeros)(nn.silu(nn.GroupNorm(4)(h)))
        x = nn.Conv(16, (3, 3))(jnp.concatenate([x, skip], axis=-1))
        return nn.Conv(3, (3, 3), kernel_init=zeros)(nn.silu(nn.GroupNorm(4)(x)))


class Gpt2(nn.Module):
    """normal(.02), what ends a branch smaller by the root of their number, tied logits."""

    blocks: int = 3

    @nn.compact
    def __call__(self, ids):
        init, last = normal(0.02), normal(0.02 / (2 * self.blocks) ** 0.5)
        embed = nn.Embed(100, 32, embedding_init=init)
        x = embed(ids) + nn.Embed(6, 32, embedding_init=normal(0.01))(jnp.arange(6))
        mask = nn.make_causal_mask(ids)
        for _ in range(self.blocks):
            q, k, v = jnp.split(nn.Dense(96, kernel_init=init)(nn.LayerNorm()(x)).reshape(2, 6, 2, 48), 3, axis=-1)
            y = nn.dot_product_attention(q, k, v, mask=mask).reshape(2, 6, 32)
            x = x + nn.Dense(32, kernel_init=last)(y)
            x = x + nn.Dense(32, kernel_init=last)(nn.gelu(nn.Dense(128, kernel_init=init)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def rotary(x):
    """Rotated pairs of features, by position."""
    angles = jnp.arange(x.shape[1])[:, None] * 100.0 ** -jnp.linspace(0, 1, x.shape[-1] // 2)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU, an untied head."""

    @nn.compact
    def __call__(self, ids):
        dense = lambda n, std=0.02: nn.Dense(n, use_bias=False, kernel_init=normal(std))  # noqa: E731
        x = nn.Embed(100, 32, embedding_init=normal(0.02))(ids)
        for _ in range(2):
            h = nn.RMSNorm()(x)
            q, k, v = (dense(n)(h).reshape(2, 6, -1, 8) for n in (32, 16, 16))
            k, v = (jnp.repeat(y, 2, axis=2) for y in (rotary(k), v))
            x = x + dense(32)(nn.dot_product_attention(rotary(q), k, v).reshape(2, 6, 32))
            h = nn.RMSNorm()(x)
            x = x + dense(32)(nn.silu(dense(64)(h)) * dense(64)(h))
        return dense(100)(nn.RMSNorm()(x))


class T5(nn.Module):
    """No 1/√d on the scores but in the query's law; a relative bias; tied logits over √d."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(100, 32, embedding_init=normal(1.0))
        x = embed(ids)
        bias = self.param("relative", normal(1.0), (2, 6, 6))
        dense = lambda n, fan: nn.DenseGeneral(n, use_bias=False, kernel_init=normal(fan**-0.5))  # noqa: E731
        for _ in range(2):
            h = nn.RMSNorm()(x)
            q, k, v = dense((2, 16), 32 * 16)(h), dense((2, 16), 32)(h), dense((2, 16), 32)(h)
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) + bias)
            y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(2, 6, 32)
            x = x + dense(32, 32)(y)
            x = x + dense(32, 64)(nn.relu(dense(64, 32)(nn.RMSNorm()(x))))
        return embed.attend(nn.RMSNorm()(x) * 32**-0.5)


def log_range(key, shape, dtype=jnp.float32):
    """Mamba's A: the logarithm of 1 to N in every row."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def step_bias(key, shape, dtype=jnp.float32):
    """Mamba's bias of Δ: softplus⁻¹ of steps between .001 and .1."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype) * 4.6 - 6.9)
    return steps + jnp.log(-jnp.expm1(-steps))


class Mamba(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            u, gate = jnp.split(nn.Dense(64, use_bias=False)(nn.RMSNorm()(x)), 2, axis=-1)
            u = nn.silu(nn.Conv(32, (3,), feature_group_count=32, padding=((2, 0),))(u))
            b, c = jnp.split(nn.Dense(8, use_bias=False)(u), 2, axis=-1)
            delta = nn.softplus(nn.Dense(32, bias_init=step_bias)(nn.Dense(2, use_bias=False)(u)))
            a = -jnp.exp(self.param(f"A_log_{i}", log_range, (32, 4)))
            decay, drive = jnp.exp(delta[..., None] * a), delta[..., None] * b[:, :, None] * u[..., None]

            def step(h, now):
                h = now[0] * h + now[1]
                return h, jnp.einsum("bdn,bn->bd", h, now[2])

            over_time = [jnp.swapaxes(v, 0, 1) for v in (decay, drive, c)]
            _, y = jax.lax.scan(step, jnp.zeros((2, 32, 4)), tuple(over_time))
            y = jnp.swapaxes(y, 0, 1) + u * self.param(f"D_{i}", nn.initializers.ones, (32,))
            x = x + nn.Dense(32, use_bias=False)(y * nn.silu(gate))
        return nn.Dense(10)(nn.RMSNorm()(x))


class Generator(nn.Module):
    """DCGAN's."""

    @nn.compact
    def __call__(self, z):
        x = nn.Dense(4 * 4 * 32, kernel_init=normal(0.02))(z).reshape(-1, 4, 4, 32)
        for features in (16, 8):
            x = nn.ConvTranspose(features, (4, 4), strides=(2, 2), kernel_init=normal(0.02))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return jnp.tanh(nn.ConvTranspose(3, (4, 4), strides=(2, 2), kernel_init=normal(0.02))(x))


class Tagger(nn.Module):
    """Embedding, LSTM, attention pooling: flax's text classifier."""

    @nn.compact
    def __call__(self, ids):
        h: Any = nn.RNN(nn.LSTMCell(16))(nn.Embed(100, 16, embedding_init=normal(0.1))(ids))
        weights = jax.nn.softmax(nn.Dense(1)(jnp.tanh(nn.Dense(16)(h))), axis=1)
        return nn.Dense(2)(jnp.tanh(nn.Dense(16)((weights * h).sum(1))))


class Translator(nn.Module):
    """Encoder and decoder with shared embeddings and logits from them over √d: flax's WMT example."""

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(100, 32, embedding_init=normal(1.0))
        x, y = embed(source), embed(target)
        dense = lambda n: nn.Dense(n, kernel_init=XAVIER, bias_init=SMALL_BIAS)  # noqa: E731
        attend = lambda: nn.MultiHeadDotProductAttention(2, kernel_init=XAVIER, use_bias=False)  # noqa: E731
        for _ in range(2):
            x = x + attend()(nn.LayerNorm()(x))
            x = x + dense(32)(nn.relu(dense(64)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        for _ in range(2):
            h = nn.LayerNorm()(y)
            y = y + attend()(h, mask=nn.make_causal_mask(target))
            y = y + attend()(nn.LayerNorm()(y), x)
            y = y + dense(32)(nn.relu(dense(64)(nn.LayerNorm()(y))))
        return embed.attend(nn.LayerNorm()(y)) / 32**0.5


class GraphNet(nn.Module):
    """Messages summed over edges, as in flax's graph example."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        for _ in range(3):
            edges = nn.relu(nn.LayerNorm()(nn.Dense(32)(jnp.concatenate([nodes[senders], nodes[receivers]], -1))))
            told = jax.ops.segment_sum(edges, receivers, nodes.shape[0])
            nodes = nn.LayerNorm()(nodes + nn.Dense(32)(nn.relu(nn.Dense(32)(jnp.concatenate([nodes, told], -1)))))
        return nn.Dense(3)(nodes.mean(0))


class Recommender(nn.Module):
    """Tables of users and items, and a small net over both."""

    @nn.compact
    def __call__(self, users, items):
        u, v = (nn.Embed(50, 16, embedding_init=normal(0.05))(ids) for ids in (users, items))
        h = nn.relu(nn.Dense(16)(jnp.concatenate([u, v], axis=-1)))
        return nn.Dense(1)(h)[..., 0] + (u * v).sum(-1)


class Nerf(nn.Module):
    """Fourier features, relu layers, the input joined again half way."""

    @nn.compact
    def __call__(self, points):
        scaled = jnp.concatenate([points * 2.0**i for i in range(4)], axis=-1)
        x = features = jnp.concatenate([jnp.sin(scaled), jnp.cos(scaled)], axis=-1)
        for i in range(6):
            x = nn.relu(nn.Dense(64, kernel_init=vs.he_normal())(x))
            x = jnp.concatenate([x, features], axis=-1) if i == 3 else x
        return nn.sigmoid(nn.Dense(3)(x)), nn.relu(nn.Dense(1)(x))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            h = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            x = jnp.concatenate([x, nn.Conv(8, (3, 3), use_bias=False)(h)], axis=-1)
        return nn.Dense(10)(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3))(x)
        for _ in range(3):
            h = nn.silu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
            gate = nn.sigmoid(nn.Dense(16)(nn.silu(nn.Dense(4)(h.mean((1, 2))))))
            x = x + h * gate[:, None, None]
        return nn.Dense(10)(x.mean((1, 2)))


class TwoTowers(nn.Module):
    """Two encoders, unit vectors, a learned temperature."""

    @nn.compact
    def __call__(self, images, words):
        def tower(x):
            y = nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

        temperature = self.param("logit_scale", nn.initializers.constant(2.6592), ())
        return jnp.exp(temperature) * tower(images) @ tower(words).T


class Latents(nn.Module):
    """Learned queries that attend to the tokens."""

    @nn.compact
    def __call__(self, x):
        z = jnp.tile(self.param("latents", normal(0.02), (1, 4, 32)), (x.shape[0], 1, 1))
        for _ in range(2):
            z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z), nn.LayerNorm()(x))
            z = z + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(z))))
        return nn.Dense(10)(nn.LayerNorm()(z).mean(1))


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers: Any = nn.scan(ScannedBlock, {"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(10)(nn.LayerNorm()(layers()(x, None)[0]))


class NnxBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(100, 32, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(32, rngs=rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(32, rngs=rngs), nnx.Linear(32, 100, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def stack(init, act, depth=5, width=64, out=3):
    """A plain net."""
    return nn.Sequential([f for _ in range(depth) for f in (nn.Dense(width, kernel_init=init), act)] + [nn.Dense(out)])


NODES = jax.ShapeDtypeStruct((12, 32), jnp.float32)
EDGES = (jnp.arange(24) % 12, jnp.arange(24) * 5 % 12)

ARCHITECTURES = {
    "ViT": (Vit(), PICTURES),
    "MLP-Mixer": (Mixer(), TOKENS),
    "ConvNeXt": (ConvNext(), PICTURES),
    "MobileNet": (MobileNet(), PICTURES),
    "diffusion U-Net": (DiffusionUnet(), vs.inputs(PICTURES, jax.ShapeDtypeStruct((2,), jnp.float32))),
    "GPT-2": (Gpt2(), IDS),
    "Llama": (Llama(), IDS),
    "T5": (T5(), IDS),
    "Mamba": (Mamba(), TOKENS),
    "DCGAN's generator": (Generator(), jax.ShapeDtypeStruct((4, 16), jnp.float32)),
    "text classifier": (Tagger(), IDS),
    "flax's WMT": (Translator(), vs.inputs(IDS, IDS)),
    "graph net": (GraphNet(), vs.inputs(NODES, *EDGES)),
    "recommender": (Recommender(), vs.inputs(IDS, IDS)),
    "NeRF": (Nerf(), jax.ShapeDtypeStruct((64, 3), jnp.float32)),
    "DenseNet": (DenseNet(), PICTURES),
    "squeeze and excitation": (SqueezeExcite(), PICTURES),
    "two towers": (TwoTowers(), vs.inputs(ROWS, ROWS)),
    "learned queries": (Latents(), TOKENS),
    "scanned blocks": (Scanned(), TOKENS),
    "nnx transformer": (lambda rngs: NnxTransformer(rngs=rngs), IDS),
    "SELU": (stack(vs.lecun_normal(), nn.selu), ROWS),
    "glorot and tanh": (stack(vs.glorot_uniform(), jnp.tanh, depth=4), ROWS),
    "He and leaky relu": (stack(vs.he_normal(), nn.leaky_relu), ROWS),
    "flax's default and relu": (stack(nn.initializers.lecun_normal(), nn.relu, depth=3), ROWS),
    "he_uniform and elu": (stack(vs.he_uniform(), nn.elu, depth=4), ROWS),
}
