"""Whether `vs.calibrate` does what it says on the architectures that people use: 66 models, each calibrated and predicted.

    python -m experiments.benchmarks.calibration [--draws 30] [--only llama] [--rows]

A line a model: kernels calibrated and kept; the largest |typical / target − 1| over the rows that calibrated kernels make, by
`vs.predict` under the plan; of a kernel with several uses, of their geometric mean; rows that drawn nets refute (further off
than error bound and four standard errors), unflagged and flagged; CPU time of calibration and of one forward prediction.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from experiments.benchmarks.zoo import cases
from experiments.nets.healthy_architectures import ARCHITECTURES
from varscale.programs.faces import Inputs
from varscale.reporting.trust import FLAGGED

CALIBRATED = ("typical", "forward")  # how the column `why` of a calibrated kernel begins


def models() -> Iterator[tuple[str, Any, Any]]:
    """Name, model and input of every architecture; ids as numbers, since nets are drawn."""

    def given(leaf: Any) -> Any:
        ids = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.integer)
        return jax.random.randint(jax.random.key(0), leaf.shape, 0, 50) if ids else leaf

    for name, (model, x) in ARCHITECTURES.items():
        if isinstance(x, Inputs):
            x = vs.inputs(*jax.tree.map(given, x.args), **jax.tree.map(given, dict(x.kwargs)))
        yield f"{name} (healthy)", model, x if isinstance(x, Inputs) else jax.tree.map(given, x)
    for case in cases():
        yield case.name, case.model, case.x()


def made(plan: vs.Plan, report: vs.Report) -> dict[str, list[Any]]:
    """Of each calibrated kernel the rows of its module: one a use, or one a layer of a stack."""
    found: dict[str, list[Any]] = {}
    for leaf in plan:
        if leaf.why.startswith(CALIBRATED) and not any(note.startswith(f"{leaf.path}: the bias") for note in plan.notes):
            module = leaf.path.rpartition("/")[0]
            kernels = [other for other in plan if other.path.rpartition("/")[0] == module and other.why.startswith(CALIBRATED)]
            rows = [row for row in report.rows if row.path.split("@")[0].split("#")[0] == module]
            if len(kernels) == 1 and rows:
                found[leaf.path] = rows
    return found


def worst(plan: vs.Plan, report: vs.Report, target: float = 1.0) -> tuple[float, str]:
    """The largest deviation from the target, and whose it is."""
    off = [(0.0, "")]
    for path, rows in made(plan, report).items():
        logs = [math.log(row.typical / target) if row.typical > 0 else -math.inf for row in rows]
        shared = "uses" in plan[path].why
        off += [(abs(math.expm1(np.mean(logs))), path)] if shared else [(abs(math.expm1(log)), path) for log in logs]
    return max(off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", action="store_true", help="name the rows that drawn nets refute, and the notes")
    options = parser.parse_args()
    print("| model | calibrated | kept | largest deviation | refuted | refuted, flagged | calibrate | predict |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model, x in models():
        if options.only.lower() not in name.lower():
            continue
        try:
            start = time.process_time()
            plan = vs.calibrate(model, x)
            calibrated = time.process_time()
            report = vs.predict(model, x, scheme=plan, backward=False)
            predicted = time.process_time()
            if options.draws:
                report = vs.predict(model, x, scheme=plan, backward=False, draws=options.draws)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:160]} |", flush=True)
            continue
        count = sum(leaf.why.startswith(CALIBRATED) for leaf in plan)
        kept = sum(leaf.why.startswith("as declared: ") for leaf in plan)
        deviation, path = worst(plan, report)
        refuted = [row for row in report.rows if row.holds is False]
        flagged = [row for row in refuted if not row.error_bound <= FLAGGED]
        line = f"| {name} | {count} | {kept} | {deviation:.1e} {path if deviation > 1e-6 else ''} "
        line += f"| {len(refuted) - len(flagged)} | {len(flagged)} "
        print(f"{line}| {calibrated - start:.1f} s | {predicted - calibrated:.1f} s |", flush=True)
        if options.rows:
            for row in refuted:
                print(f"    {row.path}: {row.typical:.4g}, drawn {row.measured:.4g} ± {row.measured_error:.2g}")
            for note in plan.notes:
                print(f"    {note}")


if __name__ == "__main__":
    main()
