"""The laws of sparse maps of an axis: all of them are counts of pairs (`domain.axis_maps`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis
from varscale.theory.domain.axis_maps import adjoint, entry_map, identity_map, pair_counts
from varscale.theory.domain.tables import Table, full_along
from varscale.theory.graph.axis_nodes import AxisMapped
from varscale.theory.graph.nodes import View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.cross_moments import cross


@second_moments.register(AxisMapped)
def second_moments_of_axis_mapped(node: AxisMapped) -> Table:
    k, table = node.params[0], node.args[0].node.table
    mean = apply_axis(table.mean, k, node.axis_map.means())
    return Table(node.axes, mean, apply_axis(table.second, k, pair_counts(node.axis_map)))


@pullback.register(AxisMapped)
def pullback_of_axis_mapped(
    node: AxisMapped, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    own = node.axis_map
    return [apply_axis(cotangent, node.params[0], adjoint(pair_counts(own), own.out, own.inner))]


@cross_by_kind.register(AxisMapped)
def cross_by_kind_of_axis_mapped(
    node: AxisMapped, a: View, b: View, frame: Sequence[Axis]
) -> np.ndarray | None:
    """E[y_p b_q] from E[x_i b_q], of a map whose outputs are as many as its inputs."""
    own, place = node.axis_map, a.bind[node.params[0]]
    if own.out.size != own.inner.size:
        return None
    axis = frame[place]
    found = cross(View(node.args[0].node, a.bind), b, frame)
    counts = pair_counts(entry_map(own.rows, own.columns, axis, axis, own.weights), identity_map(axis))
    return apply_axis(full_along(found, place, axis), place, counts)
