"""Cumulative sums: lower triangles of ones along an axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, grouped
from varscale.theory.domain.axis_maps import AxisMap, entry_map
from varscale.theory.domain.tables import LEADING_ORDER
from varscale.theory.graph.layout import Value, materialize, merged
from varscale.theory.graph.linear_nodes import mapped
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import placeholder


def lower_triangle(axis: Axis, *, reverse: bool = False) -> AxisMap:
    """y_p = Σ_{i ≤ p} x_i, or i ≥ p in reverse; outputs are classed by how many terms they have."""
    rows, columns = np.tril_indices(axis.size)
    if reverse:
        rows, columns = columns, rows
    terms = np.bincount(rows, minlength=axis.size).astype(float)
    return entry_map(rows, columns, grouped(terms[:, None]), axis)


@rule("cumsum")
def cumsum(interpreter: Context, eqn: Any, x: Value) -> Value:
    d = eqn.params["axis"]
    x = merged(materialize(x, [d]), d)
    if not x.dims[d]:
        return x  # one position
    k = x.dims[d][0].axis
    assert k is not None
    table = x.node.table
    drifts = x.node.axes[k].size > MOST_CLASSES and table.total_mean**2 > LEADING_ORDER * table.mean_square
    if drifts and interpreter.ask("running sums that drift over more places than are told apart"):
        return placeholder(interpreter, eqn.outvars[0].aval)
    return Value(mapped(x.node, k, lower_triangle(x.node.axes[k], reverse=eqn.params["reverse"])), x.dims)
