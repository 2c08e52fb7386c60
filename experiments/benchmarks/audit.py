"""What `vs.audit` finds, what it does not flag, and how long it takes.

    python -m experiments.benchmarks.audit [--keys 20] [--only healthy|defects|speed] [--numbers 1e9]

Healthy: every construction and architecture of `experiments.nets`, audited from its trace and with each of 20 keys; findings
of level error or warning are false alarms. Defects: every planted defect must be found at its place, with each of 20 keys where
it shows in the numbers alone, and its mended twin must have neither that finding nor any error or warning, with any key.
Speed: a transformer of 12 blocks from its trace, and parameters of 10⁹ numbers with the memory that takes.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from experiments.benchmarks.architectures import Transformer
from experiments.nets.healthy_architectures import ARCHITECTURES
from experiments.nets.healthy_constructions import HEALTHY
from experiments.nets.healthy_publications import PUBLICATIONS
from experiments.nets.planted_defects import DEFECTS, Defect
from varscale.auditing.findings import Audit, Finding, ordered
from varscale.auditing.measured import drawn, measuring
from varscale.programs.patterns import matches


def hits(audit: Audit, defect: Defect) -> list[Finding]:
    """The findings that name a defect at its place."""
    return [f for f in audit.findings if f.code == defect.code and (f.path == defect.path or matches(defect.path, f.path))]


def alarms(audit: Audit, defect: Defect | None = None) -> list[Finding]:
    """The findings that a healthy model, or the mended twin of a defect, must not have."""
    serious = audit.at_least("warning")
    return [f for f in audit.findings if f in serious or (defect is not None and f.code == defect.code)]


def of_keys(model: Any, x: Any, of_trace: Audit, seeds: Iterable[int]) -> Iterator[Audit]:
    """What `vs.audit(model, x, key=...)` finds with each key; the trace is audited and the run compiled once."""
    assert of_trace.report is not None
    measure = None
    for seed in seeds:
        params = drawn(model, jax.random.key(seed), x)
        measure = measure or measuring(model, x, params, of_trace.report)
        yield Audit(ordered([*of_trace.findings, *measure(params)]), of_trace.report)


def healthy(seeds: Iterable[int]) -> int:
    """Audit the healthy models from the trace and with each key; how many audits had a false alarm."""
    models, false, audits = {**HEALTHY, **ARCHITECTURES, **PUBLICATIONS}, 0, 0
    for name, (model, x) in models.items():
        of_trace = vs.audit(model, x)
        found = [of_trace, *of_keys(model, x, of_trace, seeds)]
        wrong = [f for audit in found for f in alarms(audit)]
        audits, false = audits + len(found), false + sum(bool(alarms(audit)) for audit in found)
        infos = sorted({f.code for f in found[0].at_least("info")} - {f.code for f in wrong})
        print(f"| {name} | {len(wrong)} | {', '.join(infos)} |", *map(str, wrong[:2]), flush=True)
    print(f"{len(models)} healthy models, {audits} audits, {false} with a false alarm.", flush=True)
    return false


def defects(seeds: Sequence[int]) -> int:
    """Audit the planted defects and their twins; in how many audits one was missed, or flagged in the twin.

    The twins, and defects that show in numbers alone, are audited with each key; the others from the trace, which has nothing
    random in it.
    """
    wrong = audits = 0
    for name, defect in DEFECTS.items():
        mended_x = defect.x if defect.mended_x is None else defect.mended_x
        broken = vs.audit(defect.broken, defect.x, scheme=defect.laws(defect.broken))
        mended = vs.audit(defect.mended, mended_x, scheme=defect.laws(defect.mended))
        of_broken = [*of_keys(defect.broken, defect.x, broken, seeds)] if defect.drawn else [broken]
        of_mended = [mended, *of_keys(defect.mended, mended_x, mended, seeds)]
        missed, flagged = sum(not hits(audit, defect) for audit in of_broken), sum(bool(alarms(a, defect)) for a in of_mended)
        wrong, audits = wrong + missed + flagged, audits + len(of_broken) + len(of_mended)
        print(f"| {name} | {defect.code} | {missed} of {len(of_broken)} | {flagged} of {len(of_mended)} |", flush=True)
    print(f"{len(DEFECTS)} defects, {audits} audits, {wrong} missed one or flagged its mended twin.", flush=True)
    return wrong


def speed(numbers: float) -> None:
    """Print the time of a cold audit from the trace, and the time and memory of an audit of many parameters."""
    model, ids = Transformer(depth=12, width=768, heads=12, vocabulary=50257), jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    start, spent = time.perf_counter(), time.process_time()
    vs.audit(model, ids)
    wall, cpu = time.perf_counter() - start, time.process_time() - spent
    print(f"audit of a 12-block transformer from its trace, cold: {wall:.1f} s ({cpu:.1f} s of CPU)")
    tree = _parameters(numbers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, spent = time.perf_counter(), time.process_time()
    vs.audit_parameters(tree)
    wall, cpu = time.perf_counter() - start, time.process_time() - spent
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"audit of {numbers:.3g} parameters: {wall:.1f} s ({cpu:.1f} s of CPU), {grown:.0f} MiB beside the parameters")


def _parameters(numbers: float) -> dict[str, Any]:
    """Matrices of 4096 × 4096 normal numbers, each a shuffled copy of one draw."""
    rng, tree = np.random.default_rng(0), {}
    drawn = rng.standard_normal((4096, 4096), np.float32) / 64
    for i in range(max(1, round(numbers / drawn.size))):
        tree[f"layer_{i}"] = {"kernel": rng.permutation(drawn) * rng.choice([-1, 1], 4096).astype(np.float32)}
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--only", choices=("healthy", "defects", "speed"))
    parser.add_argument("--numbers", type=float, default=1e9)
    chosen = parser.parse_args()
    wrong = 0
    if chosen.only in (None, "speed"):
        speed(chosen.numbers)
    with tempfile.TemporaryDirectory() as cache, jax.numpy_dtype_promotion("standard"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if chosen.only in (None, "healthy"):
            wrong += healthy(range(chosen.keys))
        if chosen.only in (None, "defects"):
            wrong += defects(range(chosen.keys))
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
