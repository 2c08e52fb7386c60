"""Second moments of the core kinds of nodes, elementwise trees among them."""

from __future__ import annotations

import numpy as np

from varscale.theory.domain.axes import apply_axis, contract_axis, sliced
from varscale.theory.domain.tables import Table, by_type
from varscale.theory.graph.expressions import IDENTITIES, Apply, Mean, Sum, swapped
from varscale.theory.graph.linear_nodes import Take
from varscale.theory.graph.nodes import UNKNOWN, View, second_moments
from varscale.theory.propagation.cross_moments import pair
from varscale.theory.propagation.doubts import mark_undefined, refuse_two_places
from varscale.theory.propagation.products import product_moments
from varscale.theory.propagation.shared_tokens import gained_in_common


@second_moments.register(Sum)
def second_moments_of_sum(node: Sum) -> Table:

    refuse_two_places(node.args)
    mean, unsure = np.zeros([a.classes for a in node.axes]), []
    second = np.zeros([a.types for a in node.axes])
    for c, x in zip(node.params, node.args, strict=True):
        mean = mean + c * x.mean(node.axes)
        second = second + c * c * x.second(node.axes)
    for i, (c, x) in enumerate(zip(node.params, node.args, strict=True)):
        for d, y in zip(node.params[:i], node.args[:i], strict=True):
            found = pair(x, y, node.axes)
            product = c * d * np.broadcast_to(found.moment, second.shape)
            second = second + product + swapped(product, node.axes)
            if found.flagged:
                both = (x.node.table.variance * y.node.table.variance) ** 0.5
                unsure.append((found.flagged, 2 * abs(c * d) * both * found.doubt))
    table = Table(node.axes, mean, second)
    for how, error in unsure:
        node.graph.flag(how, min(error / max(table.mean_square, 1e-300), UNKNOWN))
    return table


@second_moments.register(Mean)
def second_moments_of_mean(node: Mean) -> Table:
    table = node.args[0].node.table
    mean, second = table.mean, table.second
    for k in reversed(node.params):
        axis = table.axes[k]
        mean, second = (
            contract_axis(mean, k, axis.counts / axis.size),
            contract_axis(second, k, axis.any_pair),
        )
    return Table(node.axes, mean, second)


@second_moments.register(Take)
def second_moments_of_take(node: Take) -> Table:
    k, *span = node.params
    table = node.args[0].node.table
    new, classes = sliced(table.axes[k], *span)
    mean, second = (
        apply_axis(table.mean, k, classes),
        apply_axis(table.second, k, node.types_map(new, classes)),
    )
    if new is None:
        mean, second = mean.squeeze(k), second.squeeze(k)
    return Table(node.axes, mean, second)


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
