"""Moments of elementwise trees."""

from __future__ import annotations

import numpy as np

from varscale.theory.domain.tables import Table, by_type
from varscale.theory.graph.expressions import IDENTITIES, Apply
from varscale.theory.graph.nodes import View, second_moments
from varscale.theory.propagation.function_domains import mark_undefined
from varscale.theory.propagation.products import product_moments
from varscale.theory.propagation.shared_tokens import gained_in_common


def elementwise_table(node: Apply) -> Table:
    """Mean and second moments of an elementwise node."""
    view = View(node, tuple(range(len(node.axes))))
    name, extra = node.params
    if name == "affine" or name in IDENTITIES:
        c, d = extra or (1.0, 0.0)
        x = node.args[0]
        mean, second = x.mean(node.axes), x.second(node.axes)
        mean = np.array(np.broadcast_to(mean, [a.classes for a in node.axes]))
        if d:
            both = by_type(mean, node.axes, second=False) + by_type(mean, node.axes, second=True)
            second = c * c * second + c * d * both + d * d
        else:
            second = c * c * second
        return Table(node.axes, c * mean + d, np.array(np.broadcast_to(second, node.frame_types)))
    mark_undefined(node)
    mean, second = product_moments(view, node.axes)
    classes = [a.classes for a in node.axes]
    return Table(
        node.axes,
        np.array(np.broadcast_to(mean, classes)),
        np.array(np.broadcast_to(second, node.frame_types)),
    )


@second_moments.register(Apply)
def second_moments_of_apply(node: Apply) -> Table:

    table = elementwise_table(node)
    gain = gained_in_common(node) if node.params[0] in ("mul", "add", "sub") else 0.0
    return Table(table.axes, table.mean, table.second + gain) if np.any(gain) else table
