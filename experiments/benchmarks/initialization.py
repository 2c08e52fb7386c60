"""Claim: `vs.initialize` draws whole models several times faster than flax, in the memory of the result, with flax's bits.

    python -m experiments.benchmarks.initialization [--rounds N] [--models gpt2 resnet50 scanned]
    python -m experiments.benchmarks.initialization --llama 1        (a Llama-shaped tree of so many billion parameters)

Every contender runs in a process of its own, timed after its imports; a round runs each once, one after the other, and the
table shows medians over rounds. `cold` is the first call, compilation included; `warm` the second, with another key. `memory`
is the peak above that of the bare imports, as a multiple of the parameters' bytes; `largest` the share of the largest leaf in
them; `temporary` what the compiled programs reserve besides their results, in bytes, the most of any. PyTorch joins where it
is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CONTENDERS = ("ours", "flax eager", "flax jit", "ours nnx", "nnx", "nnx jit", "PyTorch")


def _peak() -> int:
    """The most memory that this process held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _contender(name: str, model: str, llama: tuple[int, int, int, int] | None) -> Callable[[], Any]:
    """The call that is timed; what it needs is imported here."""
    if name == "PyTorch":
        from experiments.nets.whole_models import torch_model

        return lambda: torch_model(model)
    import jax
    from flax import nnx

    import varscale as vs
    from experiments.nets.whole_models import linen_model, nnx_factory

    keys = iter(jax.block_until_ready([jax.random.key(seed) for seed in range(2)]))
    if name in ("ours nnx", "nnx", "nnx jit"):
        factory = nnx_factory(model)
        build: dict[str, Callable[[], Any]] = {
            "ours nnx": lambda: vs.initialize(factory, next(keys)),
            "nnx": lambda: factory(nnx.Rngs(next(keys))),
            "nnx jit": lambda: nnx.jit(lambda key: factory(nnx.Rngs(key)))(next(keys)),
        }
        return lambda: jax.block_until_ready(jax.tree.leaves(nnx.state(build[name]())))
    module, x = linen_model(model, llama)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: vs.initialize(module, next(keys), x),
        "flax eager": lambda: module.init(next(keys), x),
        "flax jit": lambda: jax.jit(module.init)(next(keys), x),
    }
    return lambda: jax.block_until_ready(calls[name]())


def _sizes(result: Any) -> list[int]:
    """How many bytes each of a model's arrays takes."""
    if hasattr(result, "parameters"):
        return [p.numel() * p.element_size() for p in result.parameters()]
    import jax

    return [x.nbytes for x in jax.tree.leaves(result) if hasattr(x, "nbytes") and "key" not in str(x.dtype)]


def _temporary(model: str, llama: tuple[int, int, int, int] | None) -> int:
    """The bytes that our programs reserve besides their results, the most of any."""
    import jax

    from experiments.nets.whole_models import linen_model
    from varscale.initialization.drawing import compiled
    from varscale.initialization.outline import outline
    from varscale.initialization.tracing import trace

    module, x = linen_model(model, llama)
    key = jax.random.key(0)
    programs = outline(trace(module, key, x, None), key).programs(key)
    return max(compiled(program).memory_analysis().temp_size_in_bytes for program in programs)


def _measure(name: str, model: str, llama: tuple[int, int, int, int] | None) -> dict[str, float]:
    """What one process measures."""
    begin = time.perf_counter()
    call = _contender(name, model, llama)
    imported, bare = time.perf_counter() - begin, _peak()
    begin = time.perf_counter()
    result = call()
    cold, peak, sizes = time.perf_counter() - begin, _peak(), _sizes(result)
    del result
    begin = time.perf_counter()
    call()
    warm = time.perf_counter() - begin
    temporary, size = _temporary(model, llama) if name == "ours" else 0, sum(sizes)
    return {
        "import": imported, "cold": cold, "warm": warm, "memory": (peak - bare) / size, "largest": max(sizes) / size,
        "bytes": size, "temporary": temporary,
    }  # fmt: skip


def _in_a_process(name: str, model: str, llama: tuple[int, int, int, int] | None) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.benchmarks.initialization", "--measure", name, model, json.dumps(llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {model}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Speed and memory of whole models' initialization, side by side with its peers."""

    rounds: int = 5
    """Times that each contender is run; the table shows medians."""
    models: tuple[str, ...] = ("gpt2", "resnet50", "scanned")
    """Which models: gpt2 (GPT-2 small, 163 million parameters), resnet50, scanned (a transformer of 24 layers in a loop)."""
    contenders: tuple[str, ...] = CONTENDERS
    """Which contenders."""
    llama: float = 0.0
    """In place of the models: a Llama-shaped tree in bfloat16 of so many billion parameters (8 takes 16 GB), ours alone."""


def _llama_sizes(billions: float) -> tuple[int, int, int, int]:
    """Depth, width, inner width and vocabulary: that of the 8-billion model, cut in depth."""
    layer, ends = 4096 * 4096 * 2.5 + 3 * 4096 * 14336, 2 * 128256 * 4096
    return max(1, round((billions * 1e9 - ends) / layer)), 4096, 14336, 128256


def main(settings: Settings) -> None:
    """Measures and prints."""
    import jax
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {settings.rounds} rounds")
    llama = _llama_sizes(settings.llama) if settings.llama else None
    names = ("ours",) if llama else settings.contenders
    names = tuple(n for n in names if n != "PyTorch" or importlib.util.find_spec("torch") is not None)
    for model in ("llama",) if llama else settings.models:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(settings.rounds):
            for name in names:
                rows[name].append(_in_a_process(name, model, llama))
        middle = {
            name: {field: statistics.median(row[field] for row in found) for field in found[0]} for name, found in rows.items()
        }
        ours = middle.get("ours", next(iter(middle.values())))
        table = Table(title=f"{model}: {ours['bytes'] / 1e6:.0f} MB; seconds, and times ours")
        for column in ("contender", "import s", "cold s", "cold", "warm s", "warm", "memory", "largest", "temporary"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for name, row in middle.items():
            base = middle["ours nnx"] if "nnx" in name and "ours nnx" in middle else ours
            seconds = {field: f"{row[field]:.2f}" for field in ("import", "cold", "warm")}
            ratios = {field: f"{row[field] / base[field]:.2f}" for field in ("cold", "warm")}
            temporary = f"{row['temporary']:.0f}" if name == "ours" else ""
            table.add_row(
                name, seconds["import"], seconds["cold"], ratios["cold"], seconds["warm"], ratios["warm"],
                f"{row['memory']:.2f}", f"{row['largest']:.2f}", temporary,
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sizes = json.loads(sys.argv[4])
        print(json.dumps(_measure(sys.argv[2], sys.argv[3], None if sizes is None else tuple(sizes))))
    else:
        import tyro

        main(tyro.cli(Settings))
