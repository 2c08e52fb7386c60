"""How long prediction takes: a GPT-like stack, deeper and wider, up to 96 layers of width 12288 (175 B parameters).

    python -m experiments.benchmarks.prediction_speed [--full]

Seconds that flax takes to trace init and forward pass once each, seconds of the prediction in all (which traces linen blocks
that do the same once, and so may take less), and the peak memory of the process; nothing of the model is allocated. The same
stack in nnx, where every block is traced, is made and called in one pass.
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.architectures import Recurrent, Transformer
from varscale.theory import predict


def measure(depth: int, width: int, length: int) -> tuple[float, float, float, float]:
    """Parameters, seconds of tracing init and apply, seconds of prediction in all, and peak memory in GiB."""
    model = Transformer(depth=depth, width=width, heads=max(width // 128, 1), vocabulary=50_000)
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)
    start = time.perf_counter()
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    jax.make_jaxpr(model.apply)(shapes, ids)
    middle = time.perf_counter()
    predict(model, ids, backward=False)
    seconds = time.perf_counter() - middle
    count = sum(x.size for x in jax.tree.leaves(shapes))
    return count, middle - start, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Block(nnx.Module):
    """A pre-LN block of a decoder, as `architectures.Block` in linen."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
    """Embeddings of tokens and positions, blocks, a norm and a readout, as `architectures.Transformer` in linen."""

    def __init__(self, depth: int, width: int, length: int, rngs: nnx.Rngs, vocabulary: int = 50_000):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, length, width)))
        self.blocks = nnx.List([Block(width, max(width // 128, 1), rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions
        mask = nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.readout(self.norm(x))


def measure_nnx(depth: int, width: int, length: int) -> tuple[float, float, float, float]:
    """Parameters, seconds of tracing the making and a call, seconds of prediction in all, and peak memory in GiB."""
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def make(rngs: nnx.Rngs) -> Decoder:
        return Decoder(depth, width, length, rngs)

    start = time.perf_counter()
    shapes = jax.eval_shape(lambda key: nnx.state(make(nnx.Rngs(key)), nnx.Param), jax.random.key(0))
    jax.make_jaxpr(lambda key, ids: make(nnx.Rngs(key))(ids))(jax.random.key(0), ids)
    middle = time.perf_counter()
    predict(make, ids, backward=False)
    seconds = time.perf_counter() - middle
    count = sum(x.size for x in jax.tree.leaves(shapes))
    return count, middle - start, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recurrent(steps: int, width: int) -> float:
    """Seconds of prediction, gradients included, of an LSTM and its readout over this many steps."""
    start = time.perf_counter()
    predict(Recurrent("LSTM", width, depth=1), jax.ShapeDtypeStruct((8, steps, 32), jnp.float32))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 96 layers of width 12288")
    options = parser.parse_args()
    cases = [(6, 512, 128), (12, 512, 128), (12, 2048, 128), (24, 512, 128)]
    print("| flax | layers | width | tokens | parameters | tracing | prediction in all | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    large = {"linen": [(96, 12288, 2048)], "nnx": [(48, 12288, 2048), (96, 12288, 2048)]}
    for api, measured in (("linen", measure), ("nnx", measure_nnx)):
        measured(1, 128, 128)
        for depth, width, length in cases + large[api] * options.full:
            count, tracing, seconds, memory = measured(depth, width, length)
            print(
                f"| {api} | {depth} | {width} | {length} | {count / 1e9:.2f} B | {tracing:.1f} s | {seconds:.1f} s | "
                f"{memory:.2f} GiB |",
                flush=True,
            )
    print(f"an LSTM of 128 units over 48 steps, with gradients: {recurrent(48, 128):.1f} s")


if __name__ == "__main__":
    main()
