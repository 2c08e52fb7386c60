"""Claim: `vs.initialize` draws whole models several times faster than flax, in the memory of the result, with flax's bits.

    python -m experiments.benchmarks.initialization [--rounds N] [--models gpt2 resnet50 scanned] [--out FOLDER]
    python -m experiments.benchmarks.initialization --llama 1        (a Llama-shaped tree of so many billion parameters)

Every contender runs in a process of its own, timed after its imports. A round runs each once, one after the other, and takes
two to three minutes on two free cores. The tables show medians over rounds, and medians over rounds of the ratio to ours,
which other load on the machine disturbs less. `cold` is the first call, compilation included; `cpu` the processor's time in
it; `warm` the second call, with another key (measured once for contenders that recompile in it). `memory` is the peak above
that of the bare imports, as a multiple of the parameters' bytes; `largest` the share of the largest leaf in them; `temporary`
what the compiled programs reserve besides their results, in bytes, the most of any. PyTorch joins where it is installed. The
rounds are written to `initialization.json` and the tables to `initialization.md`, after every round.
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
from collections.abc import Callable, Mapping
from pathlib import Path
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

    initialize = vs.initialize  # imported here, as flax's init is
    keys = iter(jax.block_until_ready([jax.random.key(seed) for seed in range(2)]))
    if name in ("ours nnx", "nnx", "nnx jit"):
        factory = nnx_factory(model)
        build: dict[str, Callable[[], Any]] = {
            "ours nnx": lambda: initialize(factory, next(keys)),
            "nnx": lambda: factory(nnx.Rngs(next(keys))),
            "nnx jit": lambda: nnx.jit(lambda key: factory(nnx.Rngs(key)))(next(keys)),
        }
        return lambda: _ready(build[name]())
    module, x = linen_model(model, llama)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: initialize(module, next(keys), x),
        "flax eager": lambda: module.init(next(keys), x),
        "flax jit": lambda: jax.jit(module.init)(next(keys), x),
    }
    return lambda: _ready(calls[name]())


def _ready(result: Any) -> Any:
    """A result, once all arrays are computed: to take an nnx model apart first would take longer than to make some of it."""
    import jax

    jax.block_until_ready(jax.live_arrays())
    return result


def _sizes(result: Any) -> list[int]:
    """How many bytes each of a model's arrays takes."""
    if hasattr(result, "parameters"):
        return [p.numel() * p.element_size() for p in result.parameters()]
    import jax
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(result) if isinstance(result, nnx.Module) else result)
    return [x.nbytes for x in leaves if hasattr(x, "nbytes") and "key" not in str(x.dtype)]


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


def _measure(name: str, model: str, llama: tuple[int, int, int, int] | None, warms: bool) -> dict[str, float]:
    """What one process measures."""
    begin = time.perf_counter()
    call = _contender(name, model, llama)
    imported, bare = time.perf_counter() - begin, _peak()
    begin, processor = time.perf_counter(), time.process_time()
    result = call()
    cold, processor, peak = time.perf_counter() - begin, time.process_time() - processor, _peak()
    sizes = _sizes(result)
    del result
    found: dict[str, float] = {
        "import": imported, "cold": cold, "cpu": processor, "memory": (peak - bare) / sum(sizes),
        "largest": max(sizes) / sum(sizes), "bytes": sum(sizes),
    }  # fmt: skip
    if warms:
        begin = time.perf_counter()
        call()
        found["warm"] = time.perf_counter() - begin
    if name == "ours":
        found["temporary"] = _temporary(model, llama)
    return found


def _in_a_process(name: str, model: str, llama: tuple[int, int, int, int] | None, warms: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.benchmarks.initialization", "--measure", name, model]
    done = subprocess.run([*command, json.dumps([llama, warms])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {model}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Speed and memory of whole models' initialization, side by side with its peers."""

    rounds: int = 5
    """Times that each contender is run; the tables show medians."""
    models: tuple[str, ...] = ("gpt2", "resnet50", "scanned")
    """Which models: gpt2 (GPT-2 small, 163 million parameters), resnet50, scanned (a transformer of 24 layers in a loop)."""
    contenders: tuple[str, ...] = CONTENDERS
    """Which contenders."""
    llama: float = 0.0
    """In place of the models: a Llama-shaped tree in bfloat16 of so many billion parameters (8 takes 16 GB), ours alone."""
    out: Path = Path("results")
    """Folder that the tables and the figures of every round are written to."""


def _llama_sizes(billions: float) -> tuple[int, int, int, int]:
    """Depth, width, inner width and vocabulary: those of the 8-billion model, cut in depth; below 2 billion a narrower one."""
    width = 4096 if billions >= 2 else 2048 if billions >= 0.5 else 768
    inner, vocabulary = 7 * width // 2, 128256 if width == 4096 else 32000
    layer, ends = 2.5 * width * width + 3 * width * inner, 2 * vocabulary * width
    return max(1, round((billions * 1e9 - ends) / layer)), width, inner, vocabulary


Rounds = Mapping[str, list[dict[str, float]]]
"""What each contender measured, a row a round."""


def _middle(rounds: Rounds, name: str, field: str) -> float | None:
    """The median over rounds; None for what was not measured."""
    found = [row[field] for row in rounds.get(name, []) if field in row]
    return statistics.median(found) if found else None


def _ratio(rounds: Rounds, field: str, name: str, other: str) -> float | None:
    """The median over rounds of one contender's figure over another's."""
    pairs = zip(rounds.get(name, []), rounds.get(other, []), strict=False)
    found = [mine[field] / theirs[field] for mine, theirs in pairs if field in mine and field in theirs]
    return statistics.median(found) if found else None


def _ours(name: str) -> str:
    return "ours nnx" if "nnx" in name else "ours"


def targets(rounds: Rounds) -> list[tuple[str, float, str, float, bool]]:
    """What is asked of one model: (claim, found, "at least" or "at most", asked, whether it is met)."""
    cold = {"flax jit": 3.0, "nnx jit": 3.0, "flax eager": 2.5, "nnx": 2.5}
    least = {
        f"cold: {name} / {_ours(name)}": (_ratio(rounds, "cold", name, _ours(name)), asked) for name, asked in cold.items()
    }
    most: dict[str, tuple[float | None, float]] = {}
    for name in ("ours", "ours nnx"):
        most[f"cold: {name} / PyTorch"] = _ratio(rounds, "cold", name, "PyTorch"), 2.5
        most[f"warm: {name} / PyTorch"] = _ratio(rounds, "warm", name, "PyTorch"), 1.0
        most[f"memory: {name}"] = _middle(rounds, name, "memory"), 1.15 + (_middle(rounds, name, "largest") or 0.0)
    most["temporary bytes: ours"] = _middle(rounds, "ours", "temporary"), 0.0
    found = [(claim, x, "at least", asked, x >= asked) for claim, (x, asked) in least.items() if x is not None]
    return found + [(claim, x, "at most", asked, x <= asked) for claim, (x, asked) in most.items() if x is not None]


def tables(model: str, rounds: Rounds) -> str:
    """The figures of one model and what is asked of them, as Markdown."""
    size = _middle(rounds, next(iter(rounds)), "bytes") or 0.0
    lines = [
        f"### {model}: {size / 1e6:.0f} MB", "",
        "| contender | cold, s | cold, times ours | cpu, s | warm, s | warm, times ours | memory | largest |", "|---" * 8 + "|",
    ]  # fmt: skip
    for name in rounds:
        figures = [
            _middle(rounds, name, "cold"), _ratio(rounds, "cold", name, _ours(name)), _middle(rounds, name, "cpu"),
            _middle(rounds, name, "warm"), _ratio(rounds, "warm", name, _ours(name)), _middle(rounds, name, "memory"),
            _middle(rounds, name, "largest"),
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join("" if x is None else f"{x:.2f}" for x in figures) + " |")
    lines += ["", "| target | asked | found | met |", "|---" * 4 + "|"]
    for claim, found, word, asked, met in targets(rounds):
        lines.append(f"| {claim} | {word} {asked:.2f} | {found:.2f} | {'yes' if met else '**no**'} |")
    return "\n".join(lines) + "\n"


def main(settings: Settings) -> None:
    """Measures, prints and writes."""
    import jax

    llama = _llama_sizes(settings.llama) if settings.llama else None
    names = ("ours",) if llama else settings.contenders
    names = tuple(n for n in names if n != "PyTorch" or importlib.util.find_spec("torch") is not None)
    models = ("llama",) if llama else settings.models
    measured: dict[str, dict[str, list[dict[str, float]]]] = {model: {name: [] for name in names} for model in models}
    settings.out.mkdir(parents=True, exist_ok=True)
    text = ""
    for done in range(1, settings.rounds + 1):
        for model in models:
            for name in names:
                warms = done == 1 or name in ("ours", "ours nnx", "PyTorch")
                measured[model][name].append(_in_a_process(name, model, llama, warms))
        head = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, medians of {done} rounds\n"
        text = "\n".join([head, *(tables(model, measured[model]) for model in models)])
        (settings.out / "initialization.json").write_text(json.dumps(measured, indent=1))
        (settings.out / "initialization.md").write_text(text)
        print(f"round {done} of {settings.rounds}", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sizes, asks_warm = json.loads(sys.argv[4])
        print(json.dumps(_measure(sys.argv[2], sys.argv[3], None if sizes is None else tuple(sizes), asks_warm)))
    else:
        import tyro

        main(tyro.cli(Settings))
