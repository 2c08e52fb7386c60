"""What `vs.probe` costs beside the plain forward pass and `value_and_grad`, and beside what people do today.

    python -m experiments.benchmarks.probe [--repeats 30]

A transformer of 12 blocks, a ResNet-18-like net and an MLP of 50 layers. Times are medians of interleaved runs of compiled
functions, as ratios to the plain function of the same kind; memory is what XLA says the compiled function allocates for
temporaries and outputs, as a ratio too. "captured" is `capture_intermediates=True` (linen) or `nnx.capture` (nnx) and the same
five statistics in NumPy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.architectures import Transformer
from varscale.measuring import reducers
from varscale.measuring.instrument import instrument
from varscale.programs.nnx_calls import recorded


class ResNet(nn.Module):
    """Four stages of two basic blocks, as in ResNet-18, at the resolution of CIFAR."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(64, (3, 3), use_bias=False)(x)))
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), stride, use_bias=False)(x)))
                y = nn.GroupNorm(8)(nn.Conv(width, (3, 3), use_bias=False)(y))
                if stride > 1:
                    x = nn.Conv(width, (1, 1), stride, use_bias=False)(x)
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class Layer(nnx.Module):
    """A dense layer and its activation."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(width, width, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.dense(x))


class MLP(nnx.Module):
    """Fifty layers, in nnx."""

    def __init__(self, rngs: nnx.Rngs, depth: int = 50, width: int = 512):
        self.layers = nnx.List([Layer(width, rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


Case = tuple[str, Callable[..., Any], Callable[..., Any], Any, Any]


def cases() -> list[Case]:
    """Name, forward pass of (weights, input), the same with its captured outputs, weights, input."""
    key = jax.random.key(0)
    found: list[Case] = []
    ids = jax.random.randint(key, (4, 256), 0, 1000)
    images = jax.random.normal(key, (16, 32, 32, 3))
    for name, model, x in (
        ("transformer, 12 blocks", Transformer(depth=12, width=512, heads=8, vocabulary=1000), ids),
        ("ResNet-18-like", ResNet(), images),
    ):
        weights = jax.jit(model.init)(key, x)

        def captured(weights: Any, x: Any, model: nn.Module = model) -> Any:
            return model.apply(weights, x, capture_intermediates=True, mutable=["intermediates"])

        found.append((name, model.apply, captured, weights, x))
    graph, state = nnx.split(MLP(nnx.Rngs(0)))

    def forward(state: Any, x: Any) -> Any:
        with recorded(model := nnx.merge(graph, state)):
            return model(x)

    def captured_nnx(state: Any, x: Any) -> Any:
        return nnx.capture(nnx.merge(graph, state), nnx.Intermediate, method_outputs=nnx.Intermediate)(x)

    found.append(("MLP, 50 layers (nnx)", forward, captured_nnx, state, jax.random.normal(key, (256, 512))))
    return found


def in_numpy(tree: Any) -> list[tuple[float, ...]]:
    """The fast statistics of every array, on the host."""
    found = []
    for x in map(np.asarray, jax.tree.leaves(tree)):
        zeros, nonfinite = np.mean(x == 0), np.mean(~np.isfinite(x))
        found.append((np.mean(x), np.mean(np.square(x)), np.max(np.abs(x)), zeros, nonfinite))
    return found


def compiled(f: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """A function of no arguments that runs it, and the bytes that it allocates for temporaries and outputs."""
    program = jax.jit(f).lower(*args).compile()
    memory = program.memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory is not None else float("nan")
    return lambda: jax.block_until_ready(program(*args)), size


def medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(case: Case, repeats: int) -> list[str]:
    """The rows of the table for one model."""
    name, forward, captured, weights, x = case

    def gradient(weights: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda w: jnp.mean(jnp.square(forward(w, x).astype(jnp.float32))))(weights)

    instrumented = {
        "fast forward": (forward, reducers.fast),
        "tight forward": (forward, reducers.tight),
        "full forward": (forward, reducers.full),
        "fast with gradients": (gradient, reducers.fast),
        "full with gradients": (gradient, reducers.full),
    }
    runs, sizes = {}, {}
    for kind, f in (("forward", forward), ("value_and_grad", gradient), ("capture", captured)):
        runs[kind], sizes[kind] = compiled(f, weights, x)
    for kind, (f, value) in instrumented.items():
        runs[kind], sizes[kind] = compiled(instrument(f, weights, x, value=value).run, weights, x)
    capture = runs.pop("capture")
    runs["capture, then NumPy"], sizes["capture, then NumPy"] = lambda: in_numpy(capture()), sizes.pop("capture")
    seconds = medians(runs, repeats)
    table = []
    for kind in runs:
        base = "value_and_grad" if "grad" in kind else "forward"
        time_ratio, memory_ratio = seconds[kind] / seconds[base], sizes[kind] / sizes[base]
        table.append(f"| {name} | {kind} | {seconds[kind] * 1e3:.1f} ms | {time_ratio:.2f} | {memory_ratio:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="part of the name of a model")
    options = parser.parse_args()
    print("| model | function | time | ratio of times | ratio of memory |")
    print("|---|---|---|---|---|")
    for case in cases():
        if options.only in case[0]:
            print("\n".join(measure(case, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
