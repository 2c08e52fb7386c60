"""Small models with the initialization of published ones, written as their users write them; an audit must not flag any."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import varscale as vs

IDS = np.random.default_rng(0).integers(0, 200, (2, 16))
PICTURES = jax.ShapeDtypeStruct((4, 16, 16, 4), jnp.float32)
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 4)).astype(np.uint8)
normal, zeros, orthogonal = nn.initializers.normal, nn.initializers.zeros, nn.initializers.orthogonal


class NormFormer(nn.Module):
    """Norms behind attention and inside the feed-forward layer (Shleifer et al. 2021), fairseq's embedding."""

    @nn.compact
    def __call__(self, ids):
        init = normal(0.02)
        x = nn.Embed(200, 64, embedding_init=normal(64**-0.5))(ids) * 8
        for _ in range(2):
            a = nn.MultiHeadDotProductAttention(4, kernel_init=init)(nn.LayerNorm()(x))
            x = x + nn.LayerNorm()(a)
            h = nn.gelu(nn.Dense(256, kernel_init=init)(nn.LayerNorm()(x)))
            x = x + nn.Dense(64, kernel_init=init)(nn.LayerNorm()(h))
        return nn.Dense(200, kernel_init=init)(nn.LayerNorm()(x))


class FixupBlock(nn.Module):
    """Scalar biases, a first convolution smaller by the depth, a last one of zeros."""

    blocks: int

    @nn.compact
    def __call__(self, x):
        bias = [self.param(f"bias_{i}", zeros, ()) for i in range(4)]
        first = nn.initializers.variance_scaling(2 / self.blocks, "fan_in", "normal")
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False, kernel_init=first)(x + bias[0])
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False, kernel_init=zeros)(nn.relu(y + bias[1]) + bias[2])
        return nn.relu(x + y * self.param("scale", nn.initializers.ones, ()) + bias[3])


class Fixup(nn.Module):
    """A ResNet without norms (Zhang et al. 2019)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), kernel_init=nn.initializers.he_normal())(x))
        for _ in range(4):
            x = FixupBlock(4)(x)
        return nn.Dense(10, kernel_init=zeros)(x.mean((1, 2)))


class Standardised(nn.Module):
    """A convolution with standardised weights (Brock et al. 2021)."""

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        w = self.param("kernel", nn.initializers.variance_scaling(1.0, "fan_in", "normal"), shape)
        w = (w - w.mean((0, 1, 2))) * jax.lax.rsqrt(jnp.maximum(w.var((0, 1, 2)) * np.prod(shape[:3]), 1e-4))
        w = w * self.param("gain", nn.initializers.ones, (self.features,))
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class NfNet(nn.Module):
    """A ResNet without norms: scaled branches, SkipInit, activations with a gain (Brock et al. 2021)."""

    @nn.compact
    def __call__(self, x):
        def act(x: Any) -> Any:
            return nn.relu(x) * 1.7139588594436646

        x, variance = Standardised(16)(x), 1.0
        for i in range(4):
            y = Standardised(16)(act(Standardised(8, 1)(act(x) / variance**0.5)))
            x, variance = x + 0.2 * y * self.param(f"skip_{i}", zeros, ()), variance + 0.04
        return nn.Dense(10, kernel_init=normal(0.01))(act(x).mean((1, 2)))


class Discriminator(nn.Module):
    """DCGAN's: N(0, .02), norms whose scale is N(1, .02)."""

    @nn.compact
    def __call__(self, x):
        init = {"kernel_init": normal(0.02), "use_bias": False}
        for i, features in enumerate((32, 64, 128)):
            x = nn.Conv(features, (4, 4), (2, 2), **init)(x)
            if i:
                x = nn.BatchNorm(use_running_average=False, scale_init=lambda *args: 1 + normal(0.02)(*args))(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (2, 2), padding="VALID", **init)(x)


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie 2023): modulations and the last layer are zero."""

    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(16) / 16)
        c = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        c = nn.Dense(32, kernel_init=normal(0.02))(nn.silu(nn.Dense(32, kernel_init=normal(0.02))(c)))
        xavier = nn.initializers.xavier_uniform()
        x = nn.Conv(32, (4, 4), (4, 4), kernel_init=xavier)(x).reshape(x.shape[0], -1, 32)
        for _ in range(2):
            made = nn.Dense(192, kernel_init=zeros)(nn.silu(c))[:, None]
            shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(made, 6, -1)
            h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale) + shift
            x = x + gate * nn.MultiHeadDotProductAttention(4, kernel_init=xavier)(h)
            h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale_2) + shift_2
            x = x + gate_2 * nn.Dense(32, kernel_init=xavier)(nn.gelu(nn.Dense(128, kernel_init=xavier)(h)))
        return nn.Dense(64, kernel_init=zeros)(nn.LayerNorm()(x))


class Bert(nn.Module):
    """Post-norm, N(0, .02) cut at two deviations, a norm behind the embeddings."""

    @nn.compact
    def __call__(self, ids):
        init = nn.initializers.truncated_normal(0.02)
        x = nn.Embed(200, 64, embedding_init=init)(ids) + nn.Embed(16, 64, embedding_init=init)(jnp.arange(ids.shape[1]))
        x = nn.LayerNorm(epsilon=1e-12)(x)
        for _ in range(2):
            x = nn.LayerNorm(epsilon=1e-12)(x + nn.MultiHeadDotProductAttention(4, kernel_init=init)(x))
            h = nn.Dense(64, kernel_init=init)(nn.gelu(nn.Dense(256, kernel_init=init)(x)))
            x = nn.LayerNorm(epsilon=1e-12)(x + h)
        return nn.Dense(2, kernel_init=init)(jnp.tanh(nn.Dense(64, kernel_init=init)(x[:, 0])))


class Nature(nn.Module):
    """The convolutional net of deep Q-learning: it divides pixels of 0 to 255 itself; orthogonal kernels, small heads."""

    @nn.compact
    def __call__(self, x):
        x, init = x / 255.0, orthogonal(2**0.5)
        for features, size, stride in ((16, 8, 4), (32, 4, 2)):
            x = nn.relu(nn.Conv(features, (size, size), (stride, stride), padding="VALID", kernel_init=init)(x))
        x = nn.relu(nn.Dense(64, kernel_init=init)(x.reshape(x.shape[0], -1)))
        return nn.Dense(6, kernel_init=orthogonal(0.01))(x), nn.Dense(1, kernel_init=orthogonal(1.0))(x)


class SirenOfLayers(nn.Module):
    """SIREN as its code has it: the frequency 30 outside of the layers, random biases (Sitzmann et al. 2020)."""

    @nn.compact
    def __call__(self, x):
        for width, bound in ((64, 1 / x.shape[-1]), (64, (6 / 64) ** 0.5 / 30), (64, (6 / 64) ** 0.5 / 30)):
            bias = vs.symmetric_uniform(x.shape[-1] ** -0.5)
            x = jnp.sin(30 * nn.Dense(width, kernel_init=vs.symmetric_uniform(bound), bias_init=bias)(x))
        return nn.Dense(1, kernel_init=vs.symmetric_uniform((6 / 64) ** 0.5 / 30), bias_init=vs.symmetric_uniform(0.125))(x)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, sums of skips (van den Oord et al. 2016)."""

    @nn.compact
    def __call__(self, x):
        x, skips = nn.Conv(16, (1,))(x), 0
        for i in range(4):
            a, b = (nn.Conv(16, (2,), kernel_dilation=2**i, padding="CAUSAL")(x) for _ in range(2))
            h = jnp.tanh(a) * nn.sigmoid(b)
            x, skips = x + nn.Conv(16, (1,))(h), skips + nn.Conv(32, (1,))(h)
        return nn.Conv(64, (1,))(nn.relu(nn.Conv(32, (1,))(nn.relu(skips))))


PUBLICATIONS = {
    "NormFormer": (NormFormer(), IDS),
    "Fixup": (Fixup(), PICTURES),
    "NF-net": (NfNet(), PICTURES),
    "DCGAN's discriminator": (Discriminator(), PICTURES),
    "DiT": (DiT(), vs.inputs(PICTURES, jax.ShapeDtypeStruct((4,), jnp.float32))),
    "BERT": (Bert(), IDS),
    "deep Q-learning": (Nature(), FRAMES),
    "SIREN with 30 outside": (SirenOfLayers(), jax.ShapeDtypeStruct((64, 2), jnp.float32)),
    "WaveNet": (WaveNet(), jax.ShapeDtypeStruct((2, 64, 1), jnp.float32)),
}
