"""Findings about the random numbers that a model's own init draws from, and about the constants it fills in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from varscale.auditing.findings import Finding
from varscale.initialization.outline import Outline, outline
from varscale.initialization.tracing import trace
from varscale.initializers.scaling import lecun_normal
from varscale.report import Report
from varscale.usage.parameters import ParameterUses
from varscale.usage.table import Uses, ZeroSide

_LECUN = "kernel_init=vs.lecun_normal()"


def outlined(model: Any, x: Any, method: str | None, scheme: Any = None) -> Outline:
    """What a model's own init does for each leaf; nothing is drawn."""
    key = jax.random.key(0)
    return outline(trace(model, key, x, method), key, scheme="declared" if scheme is None else scheme)


def check_streams(plan: Outline) -> Iterator[Finding]:
    """Leaves that are drawn from the same random words, and leaves drawn from a key that is always the same."""
    once, again = plan.sources(jax.random.key(0)), plan.sources(jax.random.key(1))
    first: dict[tuple[bytes, bytes | None], str] = {}
    for leaf, words, others in zip(plan.trace.leaves, once, again, strict=True):
        path = leaf.path.removeprefix("params/")
        if not words or not leaf.is_weight or math.prod(leaf.shape) < 2:
            continue
        if words == others:
            yield Finding(
                "VS118", "warning", path, "its init draws from a key of its own that is always the same: every seed gives the "
                "same numbers, and so does every layer made this way.", None, "use the key that the initializer is given",
            )  # fmt: skip
        if (words, others) in first:  # with either key: a key of its own may be that of another leaf by chance
            told = (
                f"it is drawn from the same random numbers as {first[words, others]!r}: equal laws give equal numbers, others "
            )
            yield Finding(
                "VS114", "error", path, told + "proportional ones.", None,
                "give each its own key; in flax: rename one module, or set flax.config flax_fix_rng_separator to True",
            )  # fmt: skip
        first.setdefault((words, others), path)


def check_constants(plan: Outline, uses: Mapping[str, ParameterUses]) -> Iterator[Finding]:
    """Kernels that the init fills with one number that is not zero."""
    for path, value in constants(plan).items():
        use = uses[path].main if path in uses else None
        if use is None or not value or not use.reduction_axes or use.role in ("embedding", "depthwise"):
            continue
        if math.prod(uses[path].shape[axis] for axis in use.output_axes) > 1:
            yield Finding(
                "VS105", "error", path, f"all its numbers are {value:.4g}, so that its units compute the same, get the same "
                "gradient and stay equal in training.", value, _LECUN, {path: lecun_normal()},
            )  # fmt: skip


def constants(plan: Outline) -> dict[str, float]:
    """The one number of each leaf that the init fills with it; of a complex one the real part."""
    return {
        leaf.path.removeprefix("params/"): complex(task.number).real
        for leaf, task in zip(plan.trace.leaves, plan.tasks, strict=True)
        if task.number is not None
    }


def check_zeros(uses: Uses, zero: Collection[str], report: Report) -> Iterator[Finding]:
    """Zero parameters that are multiplied with each other, so that neither ever gets a gradient."""
    gradients = {row.path: row.gradient for row in report.rows}
    told: set[str] = set()

    def learns(side: ZeroSide) -> bool:
        """Whether something else reads what it computes, and gives it a gradient."""
        return side.computed and any(gradients.get(path.rpartition("/")[0]) for path in side.paths)

    for sides in uses.zeros_that_meet(zero):
        first, second = (_matrix(uses, side.paths) for side in sides)
        if {first, second} & told or any(map(learns, sides)):
            continue
        told |= {first, second}
        yield Finding(
            "VS105", "error", first, f"it and {second!r} are both zero, and what they make is multiplied: no gradient reaches "
            "either, and they stay zero.", 0.0, f"give one of the two {_LECUN}", {first: lecun_normal()},
        )  # fmt: skip


def _matrix(uses: Uses, paths: Sequence[str]) -> str:
    """Of the parameters of one zero the one that is a matrix, if one is."""
    return next((path for path in paths if (main := uses[path].main) is not None and main.reduction_axes), paths[0])
