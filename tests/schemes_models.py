"""Models of the families that schemes are for, in linen and nnx; none knows of any scheme."""

import functools

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


class Attention(nn.Module):
    """Attention by plain kernels; `scale` multiplies the scores."""

    scale: float = (WIDTH // HEADS) ** -0.5

    @nn.compact
    def __call__(self, x, y):
        shape = (HEADS, WIDTH // HEADS)
        q, k, v = (nn.DenseGeneral(shape, use_bias=False, name=name)(z) for name, z in zip("qkv", (x, y, y), strict=True))
        weights = jax.nn.softmax(self.scale * jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
        return nn.DenseGeneral(WIDTH, (-2, -1), use_bias=False, name="o")(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


class FeedForward(nn.Module):
    """Two kernels with a ReLU between."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="fc2")(nn.relu(nn.Dense(4 * WIDTH, name="fc1")(x)))


class PostNormStack(nn.Module):
    """Post-norm blocks; the stream is multiplied by `alpha`; with a memory, each block attends to it too."""

    blocks: int
    alpha: float = 1.0
    norm: bool = True
    scale: float = (WIDTH // HEADS) ** -0.5

    @nn.compact
    def __call__(self, ids, memory=None):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        for i in range(self.blocks):
            branches = [Attention(self.scale, name=f"self{i}")] + [Attention(self.scale, name=f"cross{i}")] * (
                memory is not None
            )
            for branch in branches:
                x = self._added(x, branch(x, memory if branch.name.startswith("cross") else x))
            x = self._added(x, FeedForward(name=f"ff{i}")(x))
        return x

    def _added(self, x, y):
        return nn.LayerNorm()(self.alpha * x + y) if self.norm else self.alpha * x + y


class EncoderDecoder(nn.Module):
    """An encoder of 4 blocks and a decoder of 2 that attends to it."""

    alphas: tuple = (1.0, 1.0)
    norm: bool = True

    @nn.compact
    def __call__(self, ids, targets):
        memory = PostNormStack(4, self.alphas[0], self.norm, name="encoder")(ids)
        x = PostNormStack(2, self.alphas[1], self.norm, name="decoder")(targets, memory)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(x)


class ResidualNet(nn.Module):
    """A pre-activation net of two stages; `alpha`, `betas`, `gain`: an NF-ResNet's numbers; `gated`: ReZero's scalars."""

    layers: int = 2
    alpha: float = 1.0
    betas: tuple = (1.0,) * 4
    gain: float = 1.0
    gated: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), use_bias=False, name="stem")(x)
        for i, width in enumerate((16, 16, 32, 32)):
            h = nn.relu(x) * (self.betas[i] * self.gain)
            if width != x.shape[-1]:
                x = nn.Conv(width, (1, 1), use_bias=False, name=f"shortcut{i}")(h)
            for k in range(self.layers):
                h = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}{k}")(h)
                h = nn.relu(h) * self.gain if k < self.layers - 1 else h
            if self.gated:
                h = h * self.param(f"scale{i}", nn.initializers.ones, ())
            x = x + self.alpha * h
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


class ActorCritic(nnx.Module):
    """Two towers: a policy of four actions and a value."""

    def __init__(self, rngs):
        self.pi1, self.pi2 = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.v1, self.v2 = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.policy, self.value = nnx.Linear(32, 4, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)
        self.log_std = nnx.Param(jnp.zeros((4,)))

    def __call__(self, x):
        actions = self.policy(jnp.tanh(self.pi2(jnp.tanh(self.pi1(x)))))
        return actions, jnp.exp(self.log_std.get_value()), self.value(jnp.tanh(self.v2(jnp.tanh(self.v1(x)))))


PICTURES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class NnxResidualNet(nnx.Module):
    """The pre-activation net in nnx; all arguments as in `ResidualNet`."""

    def __init__(self, rngs, layers=2, alpha=1.0, betas=(1.0,) * 4, gain=1.0, gated=False):
        self.layers, self.alpha, self.betas, self.gain = layers, alpha, betas, gain
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.stem, self.head = conv(3, 16, (3, 3)), nnx.Linear(32, 10, rngs=rngs)
        self.shortcut, self.scales = conv(16, 32, (1, 1)), nnx.List([nnx.Param(jnp.ones(())) for _ in range(4 * gated)])
        widths = (16, 16, 16, 32, 32)
        self.convs = nnx.List([
            nnx.List([conv(widths[i] if k == 0 else widths[i + 1], widths[i + 1], (3, 3)) for k in range(layers)])
            for i in range(4)
        ])  # fmt: skip

    def __call__(self, x):
        x = self.stem(x)
        for i, convs in enumerate(self.convs):
            h = nnx.relu(x) * (self.betas[i] * self.gain)
            if i == 2:
                x = self.shortcut(h)
            for k, conv in enumerate(convs):
                h = conv(h)
                h = nnx.relu(h) * self.gain if k < self.layers - 1 else h
            x = x + self.alpha * (h * self.scales[i].get_value() if self.scales else h)
        return self.head(nnx.relu(x).mean((1, 2)))


class NnxPostNormStack(nnx.Module):
    """Post-norm blocks in nnx; all arguments as in `PostNormStack`."""

    def __init__(self, rngs, blocks=2, alpha=1.0, norm=True, scale=(WIDTH // HEADS) ** -0.5):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.alpha, self.scale = alpha, scale
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = nnx.List([nnx.List([linear(WIDTH, WIDTH) for _ in "qkvo"]) for _ in range(blocks)])
        self.fc1 = nnx.List([linear(WIDTH, 4 * WIDTH) for _ in range(blocks)])
        self.fc2 = nnx.List([linear(4 * WIDTH, WIDTH) for _ in range(blocks)])
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2 * blocks * norm)])

    def __call__(self, ids):
        x = self.embed(ids)
        for i, (wq, wk, wv, wo) in enumerate(self.attention):
            q, k, v = (w(x).reshape(*x.shape[:-1], HEADS, -1) for w in (wq, wk, wv))
            weights = jax.nn.softmax(self.scale * jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
            x = self._added(x, wo(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)), 2 * i)
            x = self._added(x, self.fc2[i](nnx.relu(self.fc1[i](x))), 2 * i + 1)
        return x

    def _added(self, x, y, i):
        return self.norms[i](self.alpha * x + y) if self.norms else self.alpha * x + y
