"""Vision architectures of the zoo, small: convolutional nets, transformers and mixers over patches."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

WIDTH, HEADS = 64, 4


class Lenet(nn.Module):
    """Convolutions and pools, then dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(16, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(32, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(WIDTH)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Vgg(nn.Module):
    """Stacks of 3 x 3 convolutions between max-pools (arXiv 1409.1556)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, count in ((16, 2), (32, 2), (64, 3)):
            for _ in range(count):
                x = nn.relu(nn.Conv(width, (3, 3), kernel_init=nn.initializers.he_normal())(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(WIDTH)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Resnet(nn.Module):
    """Basic blocks with batch norm; `train` says whose statistics are used (arXiv 1512.03385)."""

    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normed(width: int, y: jax.Array, size: int = 3, stride: int = 1) -> jax.Array:
            y = nn.Conv(width, (size, size), stride, use_bias=False, kernel_init=nn.initializers.he_normal())(y)
            return nn.BatchNorm(use_running_average=not self.train)(y)

        x = nn.relu(normed(16, x))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            y = normed(width, nn.relu(normed(width, x, stride=stride)))
            x = nn.relu(y + (x if x.shape == y.shape else normed(width, x, 1, stride)))
        return nn.Dense(10)(x.mean((1, 2)))


class Densenet(nn.Module):
    """Every layer reads all before it in its block (arXiv 1608.06993)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(16, (3, 3))(x)
        for block in range(2):
            for _ in range(3):
                y = nn.relu(nn.BatchNorm(use_running_average=False)(x))
                x = jnp.concatenate([x, nn.Conv(8, (3, 3), use_bias=False)(y)], axis=-1)
            if not block:
                y = nn.relu(nn.BatchNorm(use_running_average=False)(x))
                x = nn.avg_pool(nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(y), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Convnext(nn.Module):
    """Depthwise convolution, norm, inverted bottleneck, layer scale (arXiv 2201.03545)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(nn.Conv(32, (4, 4), (4, 4))(x))
        for i in range(2):
            y = nn.LayerNorm()(nn.Conv(32, (7, 7), feature_group_count=32)(x))
            y = nn.Dense(32)(nn.gelu(nn.Dense(128)(y)))
            x = x + y * self.param(f"layer_scale_{i}", nn.initializers.constant(1e-2), (32,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Efficientnet(nn.Module):
    """Inverted residuals with squeeze and excitation (arXiv 1905.11946)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normed(y: jax.Array, width: int, size: int, stride: int = 1, groups: int = 1) -> jax.Array:
            y = nn.Conv(width, (size, size), stride, feature_group_count=groups, use_bias=False)(y)
            return nn.BatchNorm(use_running_average=False)(y)

        x = nn.silu(normed(x, 16, 3, 2))
        for width, stride in ((16, 1), (24, 2), (24, 1)):
            y = nn.silu(normed(x, 4 * x.shape[-1], 1))
            y = nn.silu(normed(y, y.shape[-1], 3, stride, y.shape[-1]))
            squeezed = nn.silu(nn.Dense(8)(y.mean((1, 2))))
            y = y * nn.sigmoid(nn.Dense(y.shape[-1])(squeezed))[:, None, None]
            y = normed(y, width, 1)
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(nn.silu(normed(x, 96, 1)).mean((1, 2)))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward layer."""

    mlp: int = 4 * WIDTH
    mask: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=self.mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.mlp)(nn.LayerNorm()(x))))


class Vit(nn.Module):
    """Patches, a class token and registers, pre-norm blocks (arXiv 2010.11929; registers: arXiv 2309.16588)."""

    registers: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = nn.initializers.normal(0.02)
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(x).reshape(len(x), -1, WIDTH)
        x = x + self.param("positions", small, (1, x.shape[1], WIDTH))
        extra = self.param("tokens", small, (1, 1 + self.registers, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(extra, (len(x), *extra.shape[1:])), x], axis=1)
        for _ in range(2):
            x = EncoderBlock()(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class Mixer(nn.Module):
    """Dense layers over places and over channels in turn (arXiv 2105.01601)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(x).reshape(len(x), -1, WIDTH)
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(nn.Dense(x.shape[1])(nn.gelu(nn.Dense(32)(y))), 1, 2)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class DiffusionUnet(nn.Module):
    """Residual blocks shifted by an embedding of the time, skips from the way down (arXiv 2006.11239)."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        angle = time[:, None] * jnp.exp(-jnp.arange(16) * jnp.log(1e4) / 16)
        embedded = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        embedded = nn.Dense(WIDTH)(nn.silu(nn.Dense(WIDTH)(embedded)))

        def block(width: int, y: jax.Array) -> jax.Array:
            h = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(4)(y)))
            h = h + nn.Dense(width)(nn.silu(embedded))[:, None, None]
            h = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(4)(h)))
            return h + (y if y.shape[-1] == width else nn.Conv(width, (1, 1))(y))

        x, skips = nn.Conv(16, (3, 3))(x), []
        for width in (16, 32):
            x = block(width, x)
            skips.append(x)
            x = nn.Conv(width, (3, 3), 2)(x)
        x = block(32, x)
        for width, skip in ((32, skips[1]), (16, skips[0])):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "nearest")
            x = block(width, jnp.concatenate([nn.Conv(width, (3, 3))(x), skip], axis=-1))
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))


class Generator(nnx.Module):
    """Transposed convolutions with batch norm from a latent vector (arXiv 1511.06434)."""

    def __init__(self, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.start = nnx.Linear(WIDTH, 4 * 4 * WIDTH, rngs=rngs, kernel_init=small)
        widths = (WIDTH, 32, 16)
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths])
        self.layers = nnx.List(
            [
                nnx.ConvTranspose(n, m, (4, 4), (2, 2), use_bias=False, kernel_init=small, rngs=rngs)
                for n, m in zip(widths, (32, 16, 3), strict=True)
            ]
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.start(z).reshape(len(z), 4, 4, WIDTH)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(nnx.relu(norm(x)))
        return jnp.tanh(x)
