"""Healthy constructions that an audit must not flag, small: each a model and an input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import varscale as vs

ROWS = jax.ShapeDtypeStruct((8, 32), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6, 32), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
PICTURES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
FRAMES = jax.ShapeDtypeStruct((2, 36, 36, 4), jnp.float32)
zeros, normal = nn.initializers.zeros, nn.initializers.normal


def attention(x, *, query_scale=1.0, out_init=None, cap=None):
    """Self-attention of two heads, in the module that calls it."""
    q = nn.DenseGeneral((2, 16), kernel_init=vs.scaled(vs.lecun_normal(), query_scale), name="q")(x)
    k, v = nn.DenseGeneral((2, 16), name="k")(x), nn.DenseGeneral((2, 16), name="v")(x)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (1.0 if query_scale != 1.0 else 0.25)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return nn.DenseGeneral(32, axis=(-2, -1), kernel_init=out_init or nn.initializers.lecun_normal(), name="o")(y)


class Block(nn.Module):
    """A pre-norm block with the switches of the healthy list."""

    zero_projections: bool = False
    layer_scale: float | None = None
    folded: bool = False
    cap: float | None = None

    @nn.compact
    def __call__(self, x):
        out = zeros if self.zero_projections else None
        y = attention(nn.RMSNorm()(x), query_scale=0.25 if self.folded else 1.0, out_init=out, cap=self.cap)
        x = x + self.scaled(y, "a")
        h = nn.gelu(nn.Dense(64)(nn.RMSNorm()(x)))
        return x + self.scaled(nn.Dense(32, kernel_init=out or nn.initializers.lecun_normal())(h), "b")

    def scaled(self, y, name):
        if self.layer_scale is None:
            return y
        return y * self.param(f"gamma_{name}", nn.initializers.constant(self.layer_scale), (1, 1, 32))


class Stack(nn.Module):
    """Five equal blocks and a head."""

    settings: tuple[tuple[str, Any], ...] = ()
    head: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        for _ in range(5):
            x = Block(**dict(self.settings))(x)
        return nn.Dense(12, kernel_init=self.head)(nn.RMSNorm()(x))


class Rezero(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(5):
            x = x + self.param(f"alpha_{i}", zeros, (1, 1)) * nn.relu(nn.Dense(32, kernel_init=vs.he_normal())(x))
        return nn.Dense(3)(x)


class SkipInit(nn.Module):
    """Branches multiplied by a learned scalar that starts at 0, behind batch norms' absence."""

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            h = nn.Conv(3, (3, 3), kernel_init=vs.he_normal())(nn.relu(x))
            x = x + self.param(f"alpha_{_}", zeros, ()) * h
        return nn.Dense(4)(x.mean((1, 2)))


class AdaLnZero(nn.Module):
    @nn.compact
    def __call__(self, x, condition):
        for _ in range(3):
            shift, scale, gate = jnp.split(nn.Dense(96, kernel_init=zeros)(nn.silu(condition))[:, None, :], 3, axis=-1)
            h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale) + shift
            x = x + gate * nn.Dense(32)(nn.gelu(nn.Dense(64)(h)))
        return nn.Dense(32, kernel_init=zeros)(nn.LayerNorm()(x))


class ControlNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        control = nn.relu(nn.Conv(16, (3, 3))(x))
        y = nn.relu(nn.Conv(16, (3, 3))(x) + nn.Conv(16, (1, 1), kernel_init=zeros)(control))
        return nn.Dense(4)(y.mean((1, 2)))


class Lora(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            low = nn.Dense(4, use_bias=False)(x)
            x = nn.relu(nn.Dense(32, kernel_init=vs.he_normal())(x) + nn.Dense(32, use_bias=False, kernel_init=zeros)(low))
        return nn.Dense(3)(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda **k: nn.BatchNorm(use_running_average=False, **k)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for _ in range(4):
            y = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
            y = norm(scale_init=zeros)(nn.Conv(8, (3, 3), use_bias=False)(y))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(100, 32, embedding_init=normal(32**-0.5))
        x = embed(ids) * 32**0.5
        for _ in range(2):
            x = Block()(x)
        scale = self.param("scale", zeros, (1, 1, 32))
        x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * (1 + scale)
        return 30 * jnp.tanh(embed.attend(x) / 30)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(100, 32, embedding_init=normal(1.0))(ids) + self.param("positions", normal(0.02), (1, 6, 32))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(100)(nn.LayerNorm()(x))


class Policy(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.tanh(nn.Dense(64, kernel_init=vs.orthogonal(2**0.5))(x))
        return nn.Dense(4, kernel_init=vs.orthogonal(0.01))(x), nn.Dense(1, kernel_init=vs.orthogonal(1.0))(x)


class Detector(nn.Module):
    """A head whose bias holds a prior of .01: RetinaNet's."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Conv(16, (3, 3), kernel_init=vs.he_normal())(x))
        return nn.Conv(5, (3, 3), kernel_init=normal(0.01), bias_init=vs.prior_bias(0.01))(x)


class Siren(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.sin(30 * nn.Dense(64, kernel_init=vs.siren_first())(x))
        for _ in range(3):
            x = jnp.sin(30 * nn.Dense(64, kernel_init=vs.siren(30.0))(x))
        return nn.Dense(3, kernel_init=vs.siren(30.0))(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        weights = jax.nn.softmax(nn.Dense(4, use_bias=False, kernel_init=normal(0.02))(x))
        up = self.param("up", vs.lecun_normal(batch_axis=0), (4, 32, 64))
        down = self.param("down", vs.lecun_normal(batch_axis=0), (4, 64, 32))
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, up))
        return nn.Dense(3)(x + jnp.einsum("btef,efd,bte->btd", h, down, weights))


class Cnn(nn.Module):
    """The convolutional net of flax's own MNIST example."""

    @nn.compact
    def __call__(self, x):
        for features in (32, 64):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1))))


class ActorCritic(nn.Module):
    """The convolutional policy and value of flax's PPO example."""

    @nn.compact
    def __call__(self, x):
        x = x / 255.0
        for features, size, stride in ((32, 8, 4), (64, 4, 2)):
            x = nn.relu(nn.Conv(features, (size, size), strides=(stride, stride), padding="VALID")(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(4)(x)), nn.Dense(1)(x)


class GaussianPolicy(nn.Module):
    """A squashed Gaussian policy with a small last layer and a learned deviation."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(64, kernel_init=vs.orthogonal(2**0.5))(x))
        mean = nn.Dense(4, kernel_init=vs.symmetric_uniform(3e-3))(x)
        return jnp.tanh(mean), jnp.exp(self.param("log_std", nn.initializers.constant(-0.5), (4,)))


class Vae(nn.Module):
    """The decoder and encoder of flax's example, without its sampling."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(50)(x))
        mean, log_variance = nn.Dense(8)(h), nn.Dense(8)(h)
        return nn.Dense(32)(nn.relu(nn.Dense(50)(mean + jnp.exp(0.5 * log_variance))))


class Flow(nn.Module):
    """Affine couplings whose last layers are zero."""

    @nn.compact
    def __call__(self, x):
        log_det = 0.0
        for _ in range(3):
            a, b = jnp.split(x, 2, axis=-1)
            scale, shift = jnp.split(nn.Dense(32, kernel_init=zeros)(nn.relu(nn.Dense(64)(a))), 2, axis=-1)
            x, log_det = jnp.concatenate([b * jnp.exp(jnp.tanh(scale)) + shift, a], -1), log_det + jnp.tanh(scale).sum(-1)
        return x, log_det


HEALTHY = {
    "pre-norm": (Stack(), TOKENS),
    "zero projections": (Stack((("zero_projections", True),)), TOKENS),
    "zero head": (Stack(head=zeros), TOKENS),
    "LayerScale": (Stack((("layer_scale", 1e-6),)), TOKENS),
    "1/√d in the query kernel": (Stack((("folded", True),)), TOKENS),
    "capped scores": (Stack((("cap", 50.0),)), TOKENS),
    "ReZero": (Rezero(), ROWS),
    "SkipInit": (SkipInit(), PICTURES),
    "adaLN-Zero": (AdaLnZero(), vs.inputs(TOKENS, jax.ShapeDtypeStruct((2, 32), jnp.float32))),
    "ControlNet": (ControlNet(), PICTURES),
    "LoRA": (Lora(), ROWS),
    "last norm's scale 0": (ResNet(), PICTURES),
    "Gemma": (Gemma(), IDS),
    "position table": (Positions(), IDS),
    "policy": (Policy(), ROWS),
    "flax's PPO": (ActorCritic(), FRAMES),
    "Gaussian policy": (GaussianPolicy(), ROWS),
    "flax's VAE": (Vae(), ROWS),
    "normalizing flow": (Flow(), ROWS),
    "prior in the bias": (Detector(), PICTURES),
    "SIREN": (Siren(), jax.ShapeDtypeStruct((64, 2), jnp.float32)),
    "experts": (Experts(), TOKENS),
    "flax's CNN": (Cnn(), jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)),
    "LSTM": (nn.Sequential([nn.RNN(nn.LSTMCell(16)), nn.Dense(3)]), TOKENS),
    "GRU": (nn.Sequential([nn.RNN(nn.GRUCell(16)), nn.Dense(3)]), TOKENS),
    "flax's attention": (nn.Sequential([nn.MultiHeadDotProductAttention(2), nn.LayerNorm(), nn.Dense(3)]), TOKENS),
    "linear regression": (nn.Dense(1), ROWS),
    "width 1": (nn.Sequential([nn.Dense(1), nn.relu, nn.Dense(1)]), ROWS),
}
