"""Findings about the random numbers that a model's own init draws from, and about the constants it fills in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from varscale.auditing.findings import Finding
from varscale.initialization.outline import Outline, outline
from varscale.initialization.tracing import trace
from varscale.report import Report
from varscale.usage.parameters import ParameterUses


def outlined(model: Any, x: Any, method: str | None) -> Outline:
    """What a model's own init does for each leaf; nothing is drawn."""
    key = jax.random.key(0)
    return outline(trace(model, key, x, method), key)


def check_streams(plan: Outline) -> Iterator[Finding]:
    """Leaves that are drawn from the same random words, and leaves drawn from a key that is always the same."""
    once, again = plan.sources(jax.random.key(0)), plan.sources(jax.random.key(1))
    first: dict[bytes, str] = {}
    for leaf, words, others in zip(plan.trace.leaves, once, again, strict=True):
        path = leaf.path.removeprefix("params/")
        if not words or not leaf.is_weight or math.prod(leaf.shape) < 2:
            continue
        if words == others:
            yield Finding(
                "VS118", "warning", path, "its init draws from a key of its own that is always the same: every seed gives the "
                "same numbers, and so does every layer made this way.", None, "use the key that the initializer is given",
            )  # fmt: skip
        if words in first:
            yield Finding(
                "VS114", "error", path, f"it is drawn from the same random numbers as {first[words]!r}: equal laws give equal "
                "numbers, others proportional ones.", None,
                "give each its own key; in flax: rename one module, or set flax.config flax_fix_rng_separator to True",
            )  # fmt: skip
        first.setdefault(words, path)


def check_constants(plan: Outline, uses: Mapping[str, ParameterUses], report: Report) -> Iterator[Finding]:
    """Kernels that the init fills with one number, and maps that neither pass a signal nor get a gradient."""
    rows = {row.path: row for row in report.rows}
    for leaf, task in zip(plan.trace.leaves, plan.tasks, strict=True):
        path = leaf.path.removeprefix("params/")
        use = uses[path].main if path in uses else None
        if task.number is None or use is None or not use.reduction_axes or use.role in ("embedding", "depthwise"):
            continue
        value = complex(task.number).real
        row = rows.get(path.rpartition("/")[0])
        stuck = value == 0 and row is not None and row.second_moment == 0 and row.gradient == 0
        if stuck or (value != 0 and _units(leaf.shape, use.output_axes) > 1):
            why = "it and what reads it are zero: no gradient reaches either" if stuck else f"all its numbers are {value:.4g}"
            yield Finding(
                "VS105", "error", path, f"{why}, so that its units compute the same and stay equal in training.", value,
                "kernel_init=vs.lecun_normal()",
            )  # fmt: skip


def _units(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)
