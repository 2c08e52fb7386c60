"""Other architectures of the zoo, small: recurrences, graphs, latent variables, control, physics, fields."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 64


class Mamba2(nn.Module):
    """State-space duality in its quadratic form: a scalar decay a head (arXiv 2405.21060)."""

    heads: int = 4
    states: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner, past = 2 * WIDTH, np.tril(np.ones((x.shape[1],) * 2, bool))[None, :, :, None]
        x = nn.Dense(WIDTH)(x)
        for i in range(2):
            y = nn.RMSNorm()(x)
            gate = nn.silu(nn.Dense(inner, use_bias=False)(y))
            u = nn.Dense(inner + 2 * self.states, use_bias=False)(y)
            u = nn.silu(nn.Conv(u.shape[-1], (4,), padding=((3, 0),), feature_group_count=u.shape[-1])(u))
            u, b, c = jnp.split(u, [inner, inner + self.states], axis=-1)
            step = nn.softplus(nn.Dense(self.heads)(y))
            rate = jnp.exp(self.param(f"log_rate_{i}", lambda key: jnp.log(jnp.arange(1.0, self.heads + 1))))
            total = jnp.cumsum(-rate * step, axis=1)
            decay = jnp.exp(jnp.where(past, total[:, :, None] - total[:, None], -jnp.inf))
            weights = (c @ jnp.swapaxes(b, 1, 2))[..., None] * decay * step[:, None]
            u = u.reshape(*u.shape[:2], self.heads, -1)
            out = jnp.einsum("btsh,bshd->bthd", weights, u)
            out = out + u * self.param(f"skip_{i}", nn.initializers.ones, (self.heads, 1))
            x = x + nn.Dense(WIDTH, use_bias=False)(nn.RMSNorm()(out.reshape(gate.shape) * gate))
        return nn.Dense(10)(nn.RMSNorm()(x).mean(1))


class Lru(nn.Module):
    """Linear recurrent units: a complex diagonal recurrence by an associative scan (arXiv 2303.06349)."""

    states: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def join(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        def nu(key: Any) -> jax.Array:
            return jnp.log(-0.5 * jnp.log(jax.random.uniform(key, (self.states,), minval=0.81, maxval=0.98)))

        x = nn.Dense(WIDTH)(x)
        for i in range(2):
            size = jnp.exp(-jnp.exp(self.param(f"nu_{i}", nu)))
            turn = self.param(f"theta_{i}", nn.initializers.uniform(6.28), (self.states,))
            decay = size * jnp.exp(1j * turn)
            drive = jnp.sqrt(1 - size**2) * nn.Dense(self.states)(x) + 1j * nn.Dense(self.states)(x)
            _, state = jax.lax.associative_scan(join, (jnp.broadcast_to(decay, drive.shape), drive), axis=1)
            y = nn.Dense(WIDTH)(jnp.concatenate([state.real, state.imag], axis=-1))
            x = nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(y)))
        return nn.Dense(10)(x.mean(1))


class Lstm(nn.Module):
    """Two layers of LSTM cells and a readout of the last state."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(WIDTH))(x))
        return nn.Dense(10)(x[:, -1])


class Translation(nn.Module):
    """Two LSTMs, the second started from the first's state at each sample's own length (arXiv 1409.3215)."""

    @nn.compact
    def __call__(self, source: jax.Array, lengths: jax.Array, target: jax.Array) -> jax.Array:
        table = nn.Embed(256, WIDTH)
        carry, _ = nn.RNN(nn.OptimizedLSTMCell(WIDTH), return_carry=True)(table(source), seq_lengths=lengths)
        return nn.Dense(256)(nn.RNN(nn.OptimizedLSTMCell(WIDTH))(table(target), initial_carry=carry))


EDGES = np.random.default_rng(0).integers(0, 40, (2, 160)).astype(np.int32)


class Convolution(nn.Module):
    """Graph convolutions: sums over edges, scaled by both degrees (arXiv 1609.02907)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        here, there = (np.concatenate([end, np.arange(len(x))]) for end in EDGES)
        scale = (np.bincount(there, minlength=len(x)) ** -0.5).astype(np.float32)
        for width in (WIDTH, WIDTH, 7):
            x = nn.Dense(width)(x)
            x = jax.ops.segment_sum((x * scale[:, None])[here], there, len(x)) * scale[:, None]
            x = nn.relu(x) if width == WIDTH else x
        return x


class Attention(nn.Module):
    """Graph attention: a softmax over the edges into each node (arXiv 1710.10903)."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (here, there), nodes = EDGES, len(x)
        for i in range(2):
            y = nn.DenseGeneral((self.heads, WIDTH // self.heads))(x)
            own, other = (
                jnp.sum(y * self.param(f"{end}_{i}", nn.initializers.glorot_normal(), y.shape[1:]), -1)
                for end in ("to", "from")
            )
            logits = nn.leaky_relu(own[there] + other[here], 0.2)
            top = jax.lax.stop_gradient(jax.ops.segment_max(logits, there, nodes))
            weights = jnp.exp(logits - top[there])
            weights = weights / (jax.ops.segment_sum(weights, there, nodes)[there] + 1e-9)
            x = nn.elu(jax.ops.segment_sum(weights[..., None] * y[here], there, nodes).reshape(nodes, -1))
        return nn.Dense(7)(x)


class Isomorphism(nn.Module):
    """Graph isomorphism network: sums of neighbours through a small net, a sum over nodes (arXiv 1810.00826)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        here, there = EDGES
        for i in range(2):
            own = 1 + self.param(f"epsilon_{i}", nn.initializers.zeros, ())
            x = own * x + jax.ops.segment_sum(x[here], there, len(x))
            x = nn.relu(nn.Dense(WIDTH)(nn.relu(nn.Dense(WIDTH)(x))))
        return nn.Dense(2)(x.sum(0))


class Vae(nn.Module):
    """Encoder to a mean and a log variance, a normal draw, decoder (arXiv 1312.6114)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(WIDTH)(x))
        mean, log_variance = nn.Dense(8)(h), nn.Dense(8)(h)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(self.make_rng("params"), mean.shape)
        return nn.sigmoid(nn.Dense(x.shape[-1])(nn.relu(nn.Dense(WIDTH)(z))))


class VectorQuantized(nn.Module):
    """Encoder, the nearest row of a code book with straight-through gradients, decoder (arXiv 1711.00937)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = nn.Conv(8, (1, 1))(nn.relu(nn.Conv(32, (4, 4), 2)(nn.relu(nn.Conv(16, (4, 4), 2)(x)))))
        codes = self.param("codes", nn.initializers.uniform(2.0), (32, 8)) - 1
        distances = jnp.sum(z**2, -1, keepdims=True) - 2 * z @ codes.T + jnp.sum(codes**2, -1)
        nearest = codes[jnp.argmin(distances, -1)]
        z = z + jax.lax.stop_gradient(nearest - z)
        return nn.ConvTranspose(3, (4, 4), (2, 2))(nn.relu(nn.ConvTranspose(16, (4, 4), (2, 2))(z)))


class Policy(nnx.Module):
    """Actor and critic with orthogonal kernels: √2, the policy's last .01, the value's 1 (arXiv 1707.06347)."""

    def __init__(self, rngs: nnx.Rngs):
        def linear(n: int, m: int, gain: float) -> nnx.Linear:
            return nnx.Linear(n, m, kernel_init=nnx.initializers.orthogonal(gain), rngs=rngs)

        self.actor = nnx.List([linear(17, WIDTH, 2**0.5), linear(WIDTH, WIDTH, 2**0.5), linear(WIDTH, 6, 0.01)])
        self.critic = nnx.List([linear(17, WIDTH, 2**0.5), linear(WIDTH, WIDTH, 2**0.5), linear(WIDTH, 1, 1.0)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for layers in (self.actor, self.critic):
            y = jnp.tanh(layers[1](jnp.tanh(layers[0](x))))
            outputs.append(layers[2](y))
        return outputs[0], outputs[1]


class Pinn(nn.Module):
    """A tanh net of two coordinates (arXiv 1711.10561)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jnp.tanh(nn.Dense(WIDTH, kernel_init=nn.initializers.glorot_normal())(x))
        return nn.Dense(1, kernel_init=nn.initializers.glorot_normal())(x)


class Nerf(nn.Module):
    """Sines and cosines of positions, a skip to the middle, a colour that also sees the direction (arXiv 2003.08934)."""

    @nn.compact
    def __call__(self, position: jax.Array, direction: jax.Array) -> jax.Array:
        def encoded(x: jax.Array, octaves: int) -> jax.Array:
            angles = (x[..., None] * 2.0 ** np.arange(octaves)).reshape(len(x), -1)
            return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)

        start = encoded(position, 6)
        x = start
        for i in range(4):
            x = nn.relu(nn.Dense(WIDTH)(jnp.concatenate([x, start], -1) if i == 2 else x))
        density = nn.relu(nn.Dense(1)(x))
        x = nn.relu(nn.Dense(WIDTH // 2)(jnp.concatenate([nn.Dense(WIDTH)(x), encoded(direction, 4)], -1)))
        return jnp.concatenate([nn.sigmoid(nn.Dense(3)(x)), density], axis=-1)
