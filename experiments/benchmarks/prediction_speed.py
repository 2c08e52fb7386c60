"""How long prediction takes: a GPT-like stack, deeper and wider, up to 96 layers of width 12288 (175 B parameters).

    python -m experiments.benchmarks.prediction_speed [--full]

Seconds that flax takes to trace init and forward pass once each, seconds of the prediction in all (which traces blocks that do
the same once, and so may take less), and the peak memory of the process; nothing of the model is allocated.
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import jax.numpy as jnp

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
    measure(1, 128, 128)
    print("| layers | width | tokens | parameters | tracing | prediction in all | peak memory |\n|---|---|---|---|---|---|---|")
    for depth, width, length in cases + [(96, 12288, 2048)] * options.full:
        count, tracing, seconds, memory = measure(depth, width, length)
        print(
            f"| {depth} | {width} | {length} | {count / 1e9:.2f} B | {tracing:.1f} s | {seconds:.1f} s | {memory:.2f} GiB |",
            flush=True,
        )
    print(f"an LSTM of 128 units over 48 steps, with gradients: {recurrent(48, 128):.1f} s")


if __name__ == "__main__":
    main()
