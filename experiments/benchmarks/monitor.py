"""What `vs.Monitor` costs a training loop.

    python -m experiments.benchmarks.monitor [--repeats 20]

Two loops: a transformer of 12 blocks in flax's TrainState with adam, and an MLP of 50 layers with `nnx.Optimizer`. A plain and
a measured step run in turn; times are medians, compilation is reported apart. The overhead is that of one measured step in
100, with the record read back, written to a JSON lines file and kept; what the wrapper costs on the 99 others is timed on a
step that does nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

import varscale as vs
from experiments.benchmarks.architectures import Transformer

EVERY = 100
Loop = Callable[[Callable[..., Any]], Callable[[], Any]]


def linen_loop() -> tuple[Callable[..., Any], Loop]:
    """The compiled step, and what makes of a step a function that runs it once and waits."""
    key = jax.random.key(0)
    ids = jax.random.randint(key, (4, 256), 0, 1000)
    model = Transformer(depth=12, width=512, heads=8, vocabulary=1000)

    @jax.jit
    def step(state: TrainState, ids: jax.Array) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(state.apply_fn(params, ids).astype(jnp.float32)))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    def loop(step: Callable[..., Any]) -> Callable[[], Any]:
        state = [TrainState.create(apply_fn=model.apply, params=jax.jit(model.init)(key, ids), tx=optax.adam(1e-4))]

        def once() -> None:
            state[0], value = step(state[0], ids)
            jax.block_until_ready((state[0].params, value))

        return once

    return step, loop


def nnx_loop() -> tuple[Callable[..., Any], Loop]:
    """Likewise in nnx."""
    x = jax.random.normal(jax.random.key(0), (256, 512))

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(x))))(model)
        optimizer.update(model, gradients)
        return value

    def loop(step: Callable[..., Any]) -> Callable[[], Any]:
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(512, 512, kernel_init=nnx.initializers.he_normal(), rngs=rngs) for _ in range(50)]
        model = nnx.Sequential(*(part for layer in layers for part in (layer, nnx.relu)))
        optimizer = nnx.Optimizer(model, optax.adam(1e-4), wrt=nnx.Param)

        def once() -> None:
            value = step(model, optimizer, x)
            jax.block_until_ready((value, jax.tree.leaves(nnx.state(model))))

        return once

    return step, loop


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def wrapper_seconds(calls: int = 20_000) -> float:
    """What the wrapper adds to a step that is not measured."""

    def step() -> None:
        pass

    step.__wrapped__, step.lower = step, None  # pyright: ignore[reportFunctionMemberAccess]
    monitor = vs.Monitor(step, every=10 * calls, first_step=1)
    wrapped = seconds(lambda: [monitor() for _ in range(calls)])
    return (wrapped - seconds(lambda: [step() for _ in range(calls)])) / calls


def measure(name: str, step: Callable[..., Any], loop: Loop, repeats: int) -> str:
    """The row of the table for one loop."""
    with tempfile.TemporaryDirectory() as folder:
        monitor = vs.Monitor(step, every=1, sinks=[pathlib.Path(folder) / "run.jsonl"])
        plain, measured = loop(step), loop(monitor)
        first = seconds(plain), seconds(measured)
        times = [(seconds(plain), seconds(measured)) for _ in range(repeats)]
    a, b = (statistics.median(found) for found in zip(*times, strict=True))
    overhead = ((b - a) / EVERY + wrapper_seconds()) / a
    return (
        f"| {name} | {len(monitor.report.rows)} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {b / a:.2f} | {overhead:.2%} "
        f"| {first[0] - a:.1f} s | {first[1] - b:.1f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    print(
        "| loop | rows | plain step | measured step | ratio | overhead at k = 100 | plain compiled in | measured compiled in |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(measure("transformer, 12 blocks (TrainState, adam)", *linen_loop(), repeats), flush=True)
    print(measure("MLP, 50 layers (nnx.Optimizer, adam)", *nnx_loop(), repeats), flush=True)


if __name__ == "__main__":
    main()
