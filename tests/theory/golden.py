"""The golden record: every row that is predicted of the zoo and of the accuracy grid, to twelve digits.

    PYTHONPATH=. python tests/theory/golden.py            # which rows differ
    PYTHONPATH=. python tests/theory/golden.py --write    # write them down anew: the commit says which rows changed, and why

A row is [second_moment, mean, typical, low, high, sample_correlation, position_correlation, gradient, error_bound,
gradient_error_bound, how]; what is sampled is compared within its own bound, since it depends on which numbers are drawn.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zoo

import varscale as vs
from experiments.benchmarks.accuracy import grid
from varscale.report import Row

FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-10
NAMES = "second_moment mean typical low high sample_correlation position_correlation gradient error_bound gradient_error_bound"
Numbers = list[float | None]


def models() -> Iterator[tuple[str, Any, Any]]:
    """Name, model and input of everything recorded."""
    for name, made in zoo.MODELS.items():
        yield name, *made()
    for case in grid():
        yield case.name, case.model, case.struct()


def numbers(row: Row) -> list[Any]:
    """What is recorded of a row."""
    found = [getattr(row, name) for name in NAMES.replace("low high ", "").split()]
    return [None if x is None else float(f"{x:.12g}") for x in [*found[:3], *row.band, *found[3:]]] + [row.how]


def predicted(model: Any, x: Any) -> dict[str, list[Any]]:
    """The rows of one model."""
    return {row.path: numbers(row) for row in vs.predict(model, x).rows}


def differences(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> Iterator[str]:
    """What differs between two records of one model, in words.

    Of a sampled row the second moment and the gradient are compared, each within the larger of the two bounds.
    """
    for path in sorted(found.keys() | expected.keys()):
        if path not in found or path not in expected:
            yield f"{path!r}: {'no longer there' if path in expected else 'is new'}"
            continue
        (*new, how), (*old, was) = found[path], expected[path]
        if how != was:
            yield f"{path!r}: how {was} -> {how}"
        bounds = dict.fromkeys(NAMES.split(), TOLERANCE)
        if how == "sampled":
            bounds = {"second_moment": max(new[8], old[8]), "gradient": max(new[9] or 0.0, old[9] or 0.0)}
        # What zero is measured by: correlations are relative to the second moment already, and round at 1e-16 of 1.
        zeros = {"mean": max(abs(old[0]) ** 0.5, 1e-300), "sample_correlation": 1.0, "position_correlation": 1.0}
        for name, x, y in zip(NAMES.split(), new, old, strict=True):
            if name in bounds and not _alike(x, y, bounds[name], zeros.get(name, 0.0)):
                yield f"{path!r}: {name} {y} -> {x}"


def _alike(x: float | None, y: float | None, bound: float, scale: float) -> bool:
    """Whether two numbers are one but for `bound`; `scale` is what zero is measured by."""
    if x is None or y is None:
        return x is y
    return x == y or math.isclose(x, y, rel_tol=bound, abs_tol=bound * scale)


def recorded() -> dict[str, dict[str, list[Any]]]:
    """The record, by model and row."""
    return json.loads(FILE.read_text())


def written(record: dict[str, dict[str, list[Any]]]) -> str:
    """One line a row."""
    blocks = []
    for name, rows in record.items():
        lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in rows.items())
        blocks.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    record = {name: predicted(model, x) for name, model, x in models()}
    if "--write" in sys.argv:
        FILE.write_text(written(record))
        return
    old = recorded()
    for name, rows in record.items():
        for line in differences(rows, old.get(name, {})):
            print(f"{name}: {line}")


if __name__ == "__main__":
    main()
