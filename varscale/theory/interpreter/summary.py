"""Rows of a Report, from the values of every module's output."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from scipy import special

from varscale.programs.faces import Program
from varscale.report import How, Report, Row, Weight
from varscale.theory.domain.axes import averaging
from varscale.theory.domain.tables import NEXT_ORDER, Table
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.rows import Through
from varscale.theory.propagation.cotangents import cotangents
from varscale.theory.propagation.error_bounds import doubt_of, provenance
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.rules.elementwise import modulus
from varscale.theory.rules.registry import Complex
from varscale.usage.parameters import ParameterUses

_BAND, _BELOW = 2.5758, 0.005  # 99 % of a normal, and the share below them
_WIDEST_BAND = (
    25.0  # of ln(mean square): beyond that a draw can be anything, and the row's error_bound says so
)
# Set on the validation grid, not derived, both: of gradient independence itself, at width 256; of a band
# where first order finds no fluctuation at all, what second order and a norm's epsilon leave.
GRADIENT_BASE, _ROUNDING = 0.05, 4e-3
# A relative error of gradients, and the share of rows that may have it, beyond which the model is drawn.
_MUCH, _MANY = 0.1, 0.1
_UNBOUNDED = 1e50  # a mean square that only the large numbers which stand for infinities have


def summarize(
    interpreter: Interpreter,
    program: Program,
    outputs: Iterable[tuple[str, str | None, Any]],
    weights: Mapping[str, Weight],
    shares: Mapping[str, Through],
    *,
    backward: bool,
) -> Report:
    """The report of a walk: `outputs` as (path, kind where it is no module's, value).

    `shares` says what of the gradient at a row's array flows through the row.
    """
    # Of complex numbers it is the modulus that is measured and predicted.
    found = [
        (path, kind, modulus(interpreter, x) if isinstance(x, Complex) else x) for path, kind, x in outputs
    ]
    kinds = {path: kind or _kind(program, path) for path, kind, _ in found}
    values = {path: x for path, _, x in found if isinstance(x, Value) and math.prod(x.shape) > 0}
    for x in values.values():
        _ = x.node.table
    gradients = _gradients(interpreter, values) if backward else {}
    at_rows = {
        path: _at_row(x, gradients[x.node.id], shares.get(path))
        for path, x in values.items()
        if x.node.id in gradients
    }
    rows = tuple(_row(path, kinds[path], x, at_rows.get(path)) for path, x in values.items())
    return Report(rows, dict(weights))


def with_gradients(
    interpreter: Interpreter,
    report: Report,
    nudged: Iterable[tuple[str, str | None, Any]],
    shares: Mapping[str, Through],
) -> Report:
    """The report with the gradients, where it has none, of a walk in which what is one known number was nudged."""
    values = {path: x for path, _, x in nudged if isinstance(x, Value) and math.prod(x.shape) > 0}
    gradients, rows = _gradients(interpreter, values), list(report.rows)
    for i, row in enumerate(rows):
        x = values.get(row.path)
        if x is not None and row.gradient is None and x.node.id in gradients:
            gradient, doubt = _at_row(x, gradients[x.node.id], shares.get(row.path))
            rows[i] = dataclasses.replace(
                row, gradient=gradient, gradient_error_bound=float(GRADIENT_BASE + doubt)
            )
    return dataclasses.replace(report, rows=tuple(rows))


def _kind(program: Program, path: str) -> str:
    module = re.sub(r"(#\d+|@\d+|\[.*\]|\.\w+)+$", "", path)
    return program.kinds.get(module, program.kind if module == "" else "array")


def _row(path: str, kind: str, x: Value, gradient: tuple[float, float] | None) -> Row:
    table = x.node.table
    mean, infinite = table.total_mean, math.inf
    if table.mean_square >= _UNBOUNDED:  # infinities, which masks put there and a softmax takes away
        band = (0.0, infinite)
        return Row(
            path, kind, x.shape, mean, infinite, infinite, infinite, band, how="assumed", error_bound=infinite
        )
    second, typical, band = of_one_draw(x.node)
    how, error_bound = provenance(x.node)
    # The middle of a band is in doubt, too: of what was drawn by two of the standard errors that bound it.
    reach = math.exp(min(doubt_of(x.node), 1.0) / (2 if how == "sampled" else 1))
    band = (band[0] / reach, band[1] * reach)
    return Row(
        path=path,
        kind=kind,
        shape=x.shape,
        mean=mean,
        second_moment=second,
        variance=max(second - mean**2, 0.0),
        typical=typical,
        band=band,
        sample_correlation=correlation(x, [0]) if len(x.shape) > 1 and x.shape[0] > 1 else None,
        position_correlation=correlation(x, list(range(1, len(x.shape) - 1)))
        if math.prod(x.shape[1:-1]) > 1
        else None,
        gradient=None if gradient is None else gradient[0],
        how=cast(How, how),
        error_bound=error_bound,
        gradient_error_bound=None if gradient is None else GRADIENT_BASE + gradient[1],
    )


def of_one_draw(node: Node) -> tuple[float, float, tuple[float, float]]:
    """Of a node's mean square over initializations: its mean, its median, and what 99 % of them lie between."""
    spread = fluctuations(node)
    second = node.table.mean_square * (1 + spread.shift)
    variance = min(spread.variance, _WIDEST_BAND)
    skew = float(np.clip(spread.skew, -(variance**1.5), variance**1.5))
    typical = second * math.exp(-variance / 2 - skew / 6)
    reach = _BAND * math.sqrt(variance) + _ROUNDING
    lean = (_BAND**2 - 1) * skew / 6 / max(variance, 1e-300)  # Cornish and Fisher
    down = reach
    few = min(max((c * c for c in spread.sources.values()), default=0.0), variance)
    if (
        few > 2 * NEXT_ORDER
    ):  # the largest part may be one of few squares, a gamma variable: more of it is below
        shape = max(1 / few, 0.5)
        gamma = -math.log(float(special.gammaincinv(shape, _BELOW)) / shape) - few / 2
        down = math.sqrt(reach**2 + max(gamma**2 - _BAND**2 * few, 0.0))
    return second, typical, (typical * math.exp(lean - down), typical * math.exp(lean + reach))


def _at_row(x: Value, found: tuple[float, float], share: Through | None) -> tuple[float, float]:
    """The gradient at a row and its doubt, from those at the row's node."""
    # Copies share the node's evenly, if independent; if all n are one, each has 1/n² of it rather than 1/n.
    copies = math.prod(a.size for dim in x.dims for a in dim if a.axis is None)
    gradient, doubt = found[0] / copies, found[1] + (copies - 1)
    return (gradient, doubt) if share is None else share.of(gradient, doubt, UNKNOWN)


def correlation(x: Value, dims: list[int]) -> float | None:
    """E[x x'] / E[x²] for pairs that differ in position along `dims` and agree elsewhere."""
    table: Table = x.node.table
    if table.mean_square == 0:
        return None
    axes = [a.axis for d in dims for a in x.dims[d] if a.axis is not None]
    if not axes:
        return 1.0
    free = float(averaging(table.axes, frozenset(axes)) @ table.second.ravel())
    size = math.prod(table.axes[k].size for k in axes)
    # All pairs of positions, less those that agree.
    return (size * free / table.mean_square - 1) / (size - 1)


def _gradients(interpreter: Interpreter, values: Mapping[str, Value]) -> dict[int, tuple[float, float]]:
    """Gradients by node, with their doubts; asks for a region where windows and copies of near places leave many in doubt."""
    paths = [p for p in values if p == "" or p.startswith("[")] or list(values)[-1:]
    seeds = []
    aliases: dict[int, set[Any]] = {}
    for path in paths:
        x = values[path]
        node = x.node
        second = np.zeros(node.frame_types)
        repeat = math.prod(a.size for dim in x.dims for a in dim if a.axis is None)
        second[tuple(slice(0, a.classes) for a in node.axes)] = float(repeat)
        seeds.append((node, second))
        aliases.setdefault(node.id, set()).add(x.dims)
    found = cotangents(seeds, [x.node for x in values.values()])
    # Of several outputs that are one array in other shapes, a change of one is no change of the others.
    if sum(lost > _MUCH for *_, lost in found.values()) > _MANY * len(found):
        interpreter.regions.ask("", "gradients of windows over near places")
    return {i: (g, doubt + len(aliases.get(i, {None})) - 1) for i, (g, doubt, _) in found.items()}


# E[w⁴]/E[w²]² of the laws that are told by name: a normal one, one truncated at ±2 deviations, a uniform one.
_KURTOSIS = {"normal": 3.0, "truncated normal": 2.3655, "uniform": 1.8}
_MAPS = ("linear", "convolution", "depthwise", "lookup")


def weights(parameters: Iterable[tuple[str, Any]], uses: Mapping[str, ParameterUses]) -> dict[str, Weight]:
    """The law and the use of every parameter that is random, by path.

    Args:
        parameters: path and value of each.
        uses: what the forward pass does with those that it takes.
    """
    out: dict[str, Weight] = {}
    for path, value in parameters:
        if not isinstance(value, Value) or not isinstance(value.node, Leaf):
            continue
        found = [use for use in uses[path].uses if use.kind in _MAPS] if path in uses else []
        # A table that is looked up and read out by is a linear map where it is read out.
        main = max(found, key=lambda use: (use.fan_in, use.fan_out), default=None)
        fan_in, fan_out = (main.fan_in, main.fan_out) if main is not None else (None, None)
        variance = value.node.table.variance
        ratio = 1 / (fan_in * variance) if fan_in and variance > 0 else None
        times = sum(use.times * use.layers for use in found)
        kurtosis = value.node.kurtosis
        name = next((name for name, known in _KURTOSIS.items() if abs(kurtosis - known) < 0.02), "random")
        law = f"{name}(std={variance**0.5:.4g})"
        out[path] = Weight(
            path, value.shape, law, value.node.table.total_mean, variance, fan_in, fan_out, times, ratio
        )
    return out
