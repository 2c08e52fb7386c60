"""Many seeds at once: experiments 1 and 4 against the same programs in plain NumPy and in PyTorch, side by side in one run.

    python -m experiments.benchmarks.seeds [--rounds 3] [--seeds 20] [--iterations 3000]

Each program is written as its authors would write it: NumPy and PyTorch run one net after the other in a Python loop, the
experiment runs all of them in one compiled program. So times are given for one net. Rounds are interleaved; medians are shown,
and the time of the first call, compilation included, for as many nets as the experiment itself trains.
"""

import argparse
import functools
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.activation_statistics import BINS, layer_statistics
from experiments.lab import data
from experiments.lab.published import NARROW
from experiments.nets.photograph_net import LAWS, Span, draw, train

RATE = 0.01
NETS = [
    ("He 2/n", True),
    ("He 2/n", False),
    ("Xavier 1/n", True),
    ("Xavier 1/n", False),
    ("normal ×10", True),
    ("normal ×10", False),
]


def statistics_numpy(seed: int, dtype: Any = np.float64) -> None:
    """Experiment 1 for one seed: five nets of ten layers, and of each layer its moments, shares and histogram.

    As the lecture's program does it, with `randn` and in float64; in float32 with the newer generator, which draws it directly.
    """
    found, old, new = [], np.random.RandomState(seed), np.random.default_rng(seed)
    randn = (lambda *shape: new.standard_normal(shape, np.float32)) if dtype is np.float32 else old.randn
    for net in NARROW.nets:
        h = randn(NARROW.batch, NARROW.width)
        for _ in range(NARROW.depth):
            w = randn(NARROW.width, NARROW.width) * dtype(net.std)
            h = np.maximum(h @ w, 0) if net.relu else np.tanh(h @ w)
            seen = [h.mean(), h.var(), np.mean(h**2), np.mean(h == 0), np.mean(np.abs(h) > 0.99)]
            found.append((*seen, np.histogram(h, BINS, (0, 3) if net.relu else (-1, 1))))


def statistics_torch(seed: int) -> None:
    """The same in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    found = []
    with torch.no_grad():
        for net in NARROW.nets:
            h = torch.randn(NARROW.batch, NARROW.width)
            for _ in range(NARROW.depth):
                w = torch.randn(NARROW.width, NARROW.width) * net.std
                h = torch.relu(h @ w) if net.relu else torch.tanh(h @ w)
                seen = [h.mean(), h.var(), (h**2).mean(), (h == 0).float().mean(), (h.abs() > 0.99).float().mean()]
                found.append((*seen, torch.histc(h, BINS, 0.0 if net.relu else -1.0, 3.0 if net.relu else 1.0)))


def statistics_ours(seeds: int) -> None:
    """The experiment's own function, for many seeds."""
    stds = jnp.asarray([net.std for net in NARROW.nets])
    relus = jnp.asarray([int(net.relu) for net in NARROW.nets])
    found = [
        layer_statistics(key, False, stds, relus, width=NARROW.width, depth=NARROW.depth, batch=NARROW.batch)
        for key in jax.random.split(jax.random.key(0), seeds)
    ]
    jax.block_until_ready(found)


def descent_numpy(seed: int, x: np.ndarray, y: np.ndarray, iterations: int) -> None:
    """Experiment 4 for one net: forward, backward and update by hand."""
    law, relu = NETS[seed % len(NETS)]
    rng = np.random.default_rng(seed)
    widths = (len(x), 5, 5, 1)
    std = [10.0 if "10" in law else math.sqrt((2 if "He" in law else 1) / fan_in) for fan_in in widths]
    pairs = zip(widths[:-1], widths[1:], std[:-1], strict=True)
    w = [rng.standard_normal((fan_out, fan_in)).astype(np.float32) * np.float32(s) for fan_in, fan_out, s in pairs]
    b = [np.zeros((fan_out, 1), np.float32) for fan_out in widths[1:]]
    costs = []
    for _ in range(iterations):
        a = [x]
        for layer in range(2):
            z = w[layer] @ a[-1] + b[layer]
            a.append(np.maximum(z, 0) if relu else np.tanh(z))
        z = w[2] @ a[-1] + b[2]
        costs.append(np.mean(np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))))
        dz = (1 / (1 + np.exp(-np.clip(z, -80, 80))) - y) / y.size
        for layer in (2, 1, 0):
            dw, db = dz @ a[layer].T, dz.sum(axis=1, keepdims=True)
            if layer:
                da = w[layer].T @ dz
                dz = da * (a[layer] > 0) if relu else da * (1 - a[layer] ** 2)
            w[layer] -= np.float32(RATE) * dw
            b[layer] -= np.float32(RATE) * db


def descent_torch(seed: int, x: np.ndarray, y: np.ndarray, iterations: int) -> None:
    """The same in PyTorch: modules, autograd, an optimizer."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    law, relu = NETS[seed % len(NETS)]
    act = nn.ReLU if relu else nn.Tanh
    layers = [nn.Linear(len(x), 5), nn.Linear(5, 5), nn.Linear(5, 1)]
    net = nn.Sequential(layers[0], act(), layers[1], act(), layers[2])
    for layer in layers:
        std = 10.0 if "10" in law else math.sqrt((2 if "He" in law else 1) / layer.in_features)
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    samples, labels = torch.tensor(x.T.copy()), torch.tensor(y)
    optimizer, loss_of = torch.optim.SGD(net.parameters(), lr=RATE), nn.BCEWithLogitsLoss()
    costs = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = loss_of(net(samples)[:, 0], labels)
        loss.backward()
        optimizer.step()
        costs.append(loss.item())


def descent_ours(seeds: int, x: np.ndarray, y: np.ndarray, iterations: int, *, in_span: bool) -> None:
    """The experiment's own functions: draw and train `seeds` nets of each of the laws and activations."""
    keys = jax.random.split(jax.random.key(0), seeds)
    nets = [draw(keys, law=law, features=len(x)) for law, _ in NETS]
    start = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *nets)
    relu = jnp.repeat(jnp.array([relu for _, relu in NETS]), seeds)
    weights = jnp.full((len(relu), len(y)), 1 / len(y), jnp.float32)
    if in_span:
        span = Span.of(x)
        trained, costs = train(span.enter(start), relu, weights, RATE, span.basis.T @ x, y, iterations=iterations)
        trained = span.leave(trained, start)
    else:
        trained, costs = train(start, relu, weights, RATE, x, y, iterations=iterations)
    jax.block_until_ready((trained, costs))


def timed(program: Callable[[], None]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    program()
    return time.perf_counter() - begin


def compare(ours: dict[str, tuple[Callable[[], None], int]], peers: dict[str, Callable[[int], None]], rounds: int):
    """Milliseconds a net: of each of our programs (first call, then the median), and of each peer (median)."""
    first = {}
    for name, (program, nets) in ours.items():
        jax.clear_caches()
        first[name] = timed(program) / nets * 1e3
    jax.clear_caches()
    for program, _ in ours.values():
        program()
    times: dict[str, list[float]] = {name: [] for name in [*ours, *peers]}
    for turn in range(rounds):
        for name, (program, nets) in ours.items():
            times[name].append(timed(program) / nets * 1e3)
        for name, program in peers.items():
            times[name].append(timed(lambda program=program, turn=turn: program(turn)) * 1e3)
    return first, {name: statistics.median(values) for name, values in times.items()}


def show(console: Console, title: str, first: dict[str, float], warm: dict[str, float]) -> None:
    """Times, and how many times faster ours are."""
    peers = [name for name in warm if name not in first]
    table = Table(title=title, title_justify="left")
    for column in ("program", "ms a net", *(f"faster than {peer}" for peer in peers)):
        table.add_column(column)
    for name, time_first in first.items():
        table.add_row(f"{name}, warm", f"{warm[name]:.3g}", *(f"{warm[peer] / warm[name]:.1f}x" for peer in peers))
        table.add_row(f"{name}, with compilation", f"{time_first:.3g}", *(f"{warm[peer] / time_first:.1f}x" for peer in peers))
    for peer in peers:
        table.add_row(peer, f"{warm[peer]:.3g}", *[""] * len(peers))
    console.print(table)


def main() -> None:
    """Measure both experiments and print two tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=3000)
    options = parser.parse_args()
    console, torch = Console(), importlib.util.find_spec("torch") is not None
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {len(LAWS)} laws known, {len(NETS)} settings timed")

    peers = {"NumPy": statistics_numpy, "NumPy in float32": functools.partial(statistics_numpy, dtype=np.float32)}
    peers |= {"PyTorch": statistics_torch} if torch else {}
    ours = {"layer statistics": (lambda: statistics_ours(options.seeds), options.seeds)}
    show(console, "Experiment 1: five nets of ten layers, one seed", *compare(ours, peers, options.rounds))

    faces = data.faces()
    kept = ~data.held_out(faces.labels, 0.25)
    x, y = np.ascontiguousarray(faces.features[kept].T), faces.labels[kept].astype(np.float32)

    def one(program):
        return lambda seed: program(seed, x, y, options.iterations)

    peers = {"NumPy": one(descent_numpy)} | ({"PyTorch": one(descent_torch)} if torch else {})
    nets = options.seeds * len(NETS)
    ours = {
        "in the images' span": (lambda: descent_ours(options.seeds, x, y, options.iterations, in_span=True), nets),
        "in all features": (lambda: descent_ours(options.seeds, x, y, options.iterations, in_span=False), nets),
    }
    title = f"Experiment 4: one net, {options.iterations} iterations"
    show(console, title, *compare(ours, peers, options.rounds * 2))


if __name__ == "__main__":
    main()
