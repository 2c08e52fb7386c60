"""Claim: the initializers sample several times faster than their peers on the CPU, with the same bits, and compile no slower.

    python -m experiments.benchmarks.sampling [--rounds N]

Every row is measured interleaved with its peers, in one process: a round times each contender once, and the table shows
medians over rounds and their ratios. `bits` is `jax.random.bits` as jax draws them, `our bits` the same bits by the unrolled
hash, and `full` writes a constant: the floor of memory. PyTorch joins where it is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen
from rich.console import Console
from rich.progress import track
from rich.table import Table

import varscale as vs
from varscale.initializers.sampling import drawn

SHAPES = ((4096, 4096), (1021, 3, 1031), (64, 64))
DISTRIBUTIONS = ("normal", "truncated_normal", "uniform", "rademacher")
Contenders = dict[str, Callable[[], Any]]


def _milliseconds(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Median wall time of each, one after the other in every round; short calls are repeated within a round."""
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(200, int(0.01 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _called(f: Callable[..., jax.Array], *arguments: Any) -> Callable[[], jax.Array]:
    return lambda: jax.block_until_ready(f(*arguments))


def _pytorch(distribution: str, shape: tuple[int, ...], dtype: str) -> Contenders:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    weights = torch.empty(shape, dtype=getattr(torch, dtype))
    std = (2 / shape[-2]) ** 0.5
    fill: dict[str, Callable[[], Any]] = {
        "normal": lambda: torch.nn.init.normal_(weights, 0.0, std),
        "truncated_normal": lambda: torch.nn.init.trunc_normal_(weights, 0.0, std, -2 * std, 2 * std),
        "uniform": lambda: torch.nn.init.uniform_(weights, -std, std),
        "rademacher": lambda: weights.bernoulli_(0.5).mul_(2 * std).sub_(std),
    }
    return {"PyTorch": fill[distribution]}


def _theirs(distribution: str) -> Callable[..., jax.Array]:
    if distribution != "rademacher":
        return jax.nn.initializers.variance_scaling(2.0, "fan_in", distribution)  # pyright: ignore[reportArgumentType]
    # jax.nn.initializers has no such law: what one would write.
    return lambda key, shape, dtype: (
        jax.random.rademacher(key, shape, dtype) * jnp.array((2 / (math.prod(shape) / shape[-1])) ** 0.5, dtype)
    )


def _contenders(distribution: str, shape: tuple[int, ...], dtype: str, jitted: bool) -> Contenders:
    key = jax.random.key(0)
    ours = vs.variance_scaling(2.0, "fan_in", distribution)  # pyright: ignore[reportArgumentType]
    theirs = _theirs(distribution)
    word = np.dtype(np.uint32)
    calls: dict[str, Callable[..., jax.Array]] = {
        "ours": lambda key: ours(key, shape, dtype),
        "jax": lambda key: theirs(key, shape, dtype),
        "bits": lambda key: jax.random.bits(key, shape, word),
        "our bits": lambda key: drawn(jax.random.bits, key, shape, word),
        "full": lambda key: jnp.full(shape, 1.0, dtype),
    }
    wrapped = {name: _called(jax.jit(call) if jitted else call, key) for name, call in calls.items()}
    return wrapped | _pytorch(distribution, shape, dtype)


def _same_bits(distribution: str, shape: tuple[int, ...], jitted: bool) -> bool:
    contenders = _contenders(distribution, shape, "float32", jitted)
    return bool((contenders["ours"]() == contenders["jax"]()).all())


class _Block(linen.Module):
    """A transformer block of GPT-2's small size."""

    kernel_init: Callable[..., Any]
    width: int = 768

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = linen.LayerNorm()(x)
        x = x + linen.SelfAttention(12, kernel_init=self.kernel_init, qkv_features=self.width)(h)
        h = linen.Dense(4 * self.width, kernel_init=self.kernel_init)(linen.LayerNorm()(x))
        return x + linen.Dense(self.width, kernel_init=self.kernel_init)(linen.gelu(h))


def _compile_seconds(kernel_init: Callable[..., Any]) -> float:
    model = linen.Sequential([_Block(kernel_init) for _ in range(12)])
    lowered = jax.jit(model.init).lower(jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 768), jnp.float32))
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling speed, side by side with its peers."""

    rounds: int = 9
    """Times that each contender is measured in turn; the table shows medians."""
    only: str = ""
    """Part of the names of rows, such as "64x64 float32 normal": only those are measured, and no compilation."""


def main(settings: Settings) -> None:
    """Measures and prints."""
    console = Console(width=110)
    console.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {settings.rounds} rounds")
    table = Table(title="time relative to ours (above 1: ours is faster); ours in ms")
    for column in ("shape", "dtype", "law", "call", "ours ms", "jax", "PyTorch", "bits", "our bits", "full", "same bits"):
        table.add_column(column, justify="left" if column in ("shape", "dtype", "law", "call") else "right")
    cases = [
        (shape, dtype, law, jitted)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
        for law in DISTRIBUTIONS
        for jitted in (False, True)
        if settings.only in f"{'x'.join(map(str, shape))} {dtype} {law} {'jit' if jitted else 'eager'}"
    ]
    for shape, dtype, law, jitted in track(cases, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        times = _milliseconds(_contenders(law, shape, dtype, jitted), settings.rounds)
        ratio = {name: f"{value / times['ours']:.2f}" for name, value in times.items()}
        promised = dtype == "float32" and law != "rademacher"
        same = str(_same_bits(law, shape, jitted)) if promised else "-"
        table.add_row(
            "x".join(map(str, shape)), dtype, law, "jit" if jitted else "eager", f"{times['ours']:.3f}",
            ratio["jax"], ratio.get("PyTorch", "-"), ratio["bits"], ratio["our bits"], ratio["full"], same,
        )  # fmt: skip
    console.print(table)
    if settings.only:
        return
    compiled: dict[str, list[float]] = {"ours": [], "jax": []}
    for _ in range(3):
        compiled["ours"].append(_compile_seconds(vs.lecun_normal()))
        compiled["jax"].append(_compile_seconds(jax.nn.initializers.lecun_normal()))
        jax.clear_caches()
    ours, theirs = (statistics.median(compiled[name]) for name in ("ours", "jax"))
    console.print(
        f"compiling the init of a 12-block transformer: ours {ours:.2f} s, jax {theirs:.2f} s: ratio {theirs / ours:.2f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
