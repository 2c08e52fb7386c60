"""Models of published sizes for `experiments.benchmarks.initialization`: in linen, nnx and, where it is installed, PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

GPT2 = {"depth": 12, "width": 768, "vocabulary": 50257}
STACK = {"depth": 24, "width": 512, "vocabulary": 32000}
TOKENS = 1024
STAGES = (3, 4, 6, 3)


class Block(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = x + linen.MultiHeadDotProductAttention(self.width // 64)(linen.LayerNorm()(x))
        h = linen.Dense(4 * self.width)(linen.LayerNorm()(x))
        return x + linen.Dense(self.width)(linen.gelu(h)), None


class Transformer(linen.Module):
    depth: int
    width: int
    vocabulary: int
    scanned: bool = False

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = linen.Embed(TOKENS, self.width, name="places")(jnp.arange(tokens.shape[1]))
        x = linen.Embed(self.vocabulary, self.width, name="tokens")(tokens) + places[None]
        if self.scanned:
            stack = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = stack(self.width)(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Block(self.width)(x)
        return linen.Dense(self.vocabulary, use_bias=False, name="head")(linen.LayerNorm()(x))


class Bottleneck(linen.Module):
    width: int
    stride: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return linen.BatchNorm(use_running_average=False)(x)

        h = linen.relu(norm(linen.Conv(self.width, (1, 1), use_bias=False)(x)))
        h = linen.relu(norm(linen.Conv(self.width, (3, 3), self.stride, use_bias=False)(h)))
        h = norm(linen.Conv(4 * self.width, (1, 1), use_bias=False)(h))
        if x.shape != h.shape:
            x = norm(linen.Conv(4 * self.width, (1, 1), self.stride, use_bias=False)(x))
        return linen.relu(x + h)


class ResNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.BatchNorm(use_running_average=False)(linen.Conv(64, (7, 7), 2, use_bias=False)(x)))
        x = linen.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(STAGES):
            for i in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not i else 1)(x)
        return linen.Dense(1000)(x.mean((1, 2)))


class Layer(linen.Module):
    """A block of Llama's shape: grouped-query attention and a gated feed-forward net, no biases."""

    width: int
    inner: int

    @linen.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        def dense(size: int, name: str) -> linen.Dense:
            return linen.Dense(size, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name=name)

        def norm(x: jax.Array) -> jax.Array:
            return linen.RMSNorm(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)

        h = norm(x)
        kept = dense(self.width, "q")(h) + jnp.tile(dense(self.width // 4, "k")(h) + dense(self.width // 4, "v")(h), 4)
        x = x + dense(self.width, "o")(kept)
        h = norm(x)
        return x + dense(self.width, "down")(linen.silu(dense(self.inner, "gate")(h)) * dense(self.inner, "up")(h)), None


class Llama(linen.Module):
    """The tree of a Llama in bfloat16; its forward pass has the shapes and not the attention."""

    depth: int = 32
    width: int = 4096
    inner: int = 14336
    vocabulary: int = 128256

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(self.vocabulary, self.width, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(tokens)
        for i in range(self.depth):
            x, _ = Layer(self.width, self.inner, name=f"layer_{i}")(x)
        return linen.Dense(self.vocabulary, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)


class NnxBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(width // 64, width, decode=False, rngs=rngs)
        self.second = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)


class NnxTransformer(nnx.Module):
    def __init__(self, depth: int, width: int, vocabulary: int, scanned: bool, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(TOKENS, width, rngs=rngs)
        if scanned:
            many = nnx.split_rngs(splits=depth)(nnx.vmap(lambda rngs: NnxBlock(width, rngs), axis_size=depth))
            self.blocks = many(rngs)
        else:
            self.blocks = nnx.List([NnxBlock(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)


class NnxBottleneck(nnx.Module):
    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(inputs, width, (1, 1), use_bias=False, rngs=rngs),
                nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs),
                nnx.Conv(width, 4 * width, (1, 1), use_bias=False, rngs=rngs),
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size in (width, width, 4 * width)])
        if inputs != 4 * width:
            self.shortcut = nnx.Conv(inputs, 4 * width, (1, 1), use_bias=False, rngs=rngs)
            self.shortcut_norm = nnx.BatchNorm(4 * width, rngs=rngs)


class NnxResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 64, (7, 7), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        blocks, inputs = [], 64
        for stage, count in enumerate(STAGES):
            for _ in range(count):
                blocks.append(NnxBottleneck(inputs, 64 * 2**stage, rngs))
                inputs = 4 * 64 * 2**stage
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 1000, rngs=rngs)


def linen_model(name: str, llama: tuple[int, int, int, int] | None = None) -> tuple[linen.Module, jax.Array]:
    """A model and an input: "gpt2", "resnet50", "scanned" or "llama" (of depth, width, inner width and vocabulary)."""
    tokens = jnp.zeros((1, TOKENS), jnp.int32)
    if name == "llama":
        return Llama(*(llama or ())), tokens[:, :8]
    if name == "resnet50":
        return ResNet(), jnp.zeros((1, 224, 224, 3))
    sizes = GPT2 if name == "gpt2" else STACK
    return Transformer(sizes["depth"], sizes["width"], sizes["vocabulary"], name == "scanned"), tokens


def nnx_factory(name: str) -> Callable[[nnx.Rngs], nnx.Module]:
    """The factory of the same model in nnx."""
    if name == "resnet50":
        return NnxResNet
    sizes = GPT2 if name == "gpt2" else STACK
    return lambda rngs: NnxTransformer(**sizes, scanned=name == "scanned", rngs=rngs)


def torch_model(name: str) -> Any:
    """The same layers, built and initialized by PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    nn = torch.nn
    if name == "resnet50":
        layers, inputs = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)], 64
        for stage, count in enumerate(STAGES):
            for _ in range(count):
                width = 64 * 2**stage
                sizes = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
                sizes += [(inputs, 4 * width, 1)] * (inputs != 4 * width)
                for before, after, window in sizes:
                    layers += [nn.Conv2d(before, after, window, bias=False), nn.BatchNorm2d(after)]
                inputs = 4 * width
        return nn.ModuleList([*layers, nn.Linear(inputs, 1000)])
    sizes = GPT2 if name == "gpt2" else STACK
    width = sizes["width"]
    blocks = [
        layer
        for _ in range(sizes["depth"])
        for layer in (
            nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(4)), nn.LayerNorm(width),
            nn.Linear(width, 4 * width), nn.Linear(4 * width, width),
        )
    ]  # fmt: skip
    ends = [nn.Embedding(sizes["vocabulary"], width), nn.Embedding(TOKENS, width), nn.LayerNorm(width)]
    return nn.ModuleList([*ends, *blocks, nn.Linear(width, sizes["vocabulary"], bias=False)])
