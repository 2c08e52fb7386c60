"""Maps of an axis: nodes of equal entries over axes of other classes are other nodes."""

import numpy as np
import pytest

from varscale.theory.domain.axes import Axis, labelled
from varscale.theory.domain.axis_maps import entry_map
from varscale.theory.graph.linear_nodes import mapped
from varscale.theory.graph.nodes import Graph, leaf
from varscale.theory.graph.normal_form import apply
from varscale.theory.interpreter import interpreter  # noqa: F401  (registers the laws of kinds of nodes)
from varscale.theory.rules.axis import lower_triangle


def test_maps_of_equal_entries_over_axes_of_other_classes():
    """Cumulative sums of four independent numbers with E[x²] = 1: E[y_p²] = p + 1, 2.5 on average, whatever the classes."""
    graph = Graph()
    axes = (Axis(4), labelled([0, 0, 1, 1]), Axis(4))
    nodes = [mapped(leaf(graph, f"x{i}", (axis,), 0.0, 1.0, odd=True), 0, lower_triangle(axis)) for i, axis in enumerate(axes)]
    assert [node.table.mean_square for node in nodes] == pytest.approx([2.5] * 3)
    assert [node.axis_map.inner for node in nodes] == list(axes)
    assert np.allclose(nodes[0].table.second, nodes[2].table.second)


@pytest.mark.parametrize(("weight", "positive"), [(1.0, True), (-1.0, False)])
def test_sums_of_what_is_positive_are_positive_where_the_weights_are(weight, positive):
    graph, axis = Graph(), Axis(4)
    x = apply(graph, "exp", (), (axis,), [leaf(graph, "x", (axis,), 0.0, 1.0, odd=True).whole])
    assert mapped(x, 0, entry_map(np.arange(4), np.arange(4), axis, axis, weight)).positive is positive
