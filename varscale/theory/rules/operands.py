"""Operands of a product: masked weights and fixed matrices, whose rows have unequal energy, and an array read twice.

A triangular mask on a weight (an autoregressive net's) hides much of the first inputs and little of the last, so that outputs
differ in their second moments by position. Positions are classed by the mean square of what they read. Of products of an
array's rows with rows of its own the diagonal is no entry like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis, affordable, grouped, join
from varscale.theory.domain.tables import NEGLIGIBLE
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.layout import Value, align
from varscale.theory.graph.linear_nodes import Rearranged
from varscale.theory.graph.nodes import Array, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.propagation.cross_moments import dependent, mean_of_product
from varscale.theory.rules.softmax import Softmax


def classed_by_energy(x: Value) -> Value:
    """An operand of a product that is known, or a weight under a mask, with classes where the energy of its rows differs."""
    node = x.node
    own = roots(node)
    arrays = [
        (view.node, view.bind) for view in own if isinstance(view.node, Array) and len(view.node.axes) > 1
    ]
    weights = [view for view in own if isinstance(view.node, Leaf) and view.node.name[0] != "input"]
    if not arrays or len([view for view in own if isinstance(view.node, Array)]) + len(weights) < len(own):
        return x
    axes = list(node.axes)
    for known, bind in arrays:
        for k, place in enumerate(bind):
            axes[place] = join(axes[place], by_energy(known, k))
    finer = affordable(tuple(axes))
    return x if finer == node.axes else Value(_with_finer_classes(node, finer), x.dims)


@once_per_node
def by_energy(node: Array, k: int) -> Axis:
    """Axis k of known numbers, its positions classed by the sum of squares and the square of the sum along the others."""
    rows = np.moveaxis(np.asarray(node.values, float), k, 0).reshape(node.axes[k].size, -1)
    signatures = np.stack([np.mean(rows**2, axis=1), np.mean(rows, axis=1) ** 2], axis=1)
    scale = max(float(signatures[:, 0].mean()), 1e-300)
    return (
        node.axes[k] if np.ptp(signatures, axis=0).max() < NEGLIGIBLE * scale else grouped(signatures / scale)
    )


def _with_finer_classes(node: Node, axes: Sequence[Axis]) -> Node:
    """The same elementwise tree over axes with finer classes."""
    if isinstance(node, Array):
        return node.graph.make(Array, axes, (), node.params)
    if not isinstance(node, Apply):
        return node
    args = [
        View(_with_finer_classes(view.node, [axes[b] for b in view.bind]), view.bind) for view in node.args
    ]
    return node.graph.make(Apply, axes, args, node.params)


def _is_weight(node: Node) -> bool:
    """Whether it is zero-mean weights, their entries moved or not."""
    while isinstance(node, Rearranged):
        node = node.args[0].node
    return isinstance(node, Leaf) and bool(node.odd) and not node.is_input


def meets_itself(x: Value, y: Value, contracted: Any, batch: Any) -> bool:
    """Whether free dimensions of two arrays may be one, read twice: each of its positions then meets itself.

    They are where entries at equal positions are correlated: queries and keys made by parts of one packed kernel are not.
    """
    nodes = (x.node, y.node)
    if not dependent(*nodes) or any(isinstance(node, Softmax) or _is_weight(node) for node in nodes):
        return False
    (cx, cy), (bx, by) = contracted, batch
    left = [d for d, n in enumerate(y.shape) if n > 1 and d not in (*cy, *by)]
    pairs = list(zip((*bx, *cx), (*by, *cy), strict=True))
    for d, n in enumerate(x.shape):
        if (
            n > 1
            and d not in (*cx, *bx)
            and (same := next((e for e in left if y.shape[e] == n), None)) is not None
        ):
            left.remove(same)
            pairs.append((d, same))
    if len(pairs) == len(bx) + len(cx):
        return False
    alone = [d for d in range(len(x.dims)) if d not in dict(pairs)]
    xs = Value(x.node, (*(x.dims[d] for d, _ in pairs), *(x.dims[d] for d in alone), *[()] * len(left)))
    ys = Value(y.node, (*(y.dims[e] for _, e in pairs), *[()] * len(alone), *(y.dims[e] for e in left)))
    frame, (a, b), _ = align([xs, ys])
    apart = mean_of_product(a, b, tuple(frame)) - a.node.table.total_mean * b.node.table.total_mean
    return abs(apart) > NEGLIGIBLE * (a.node.table.variance * b.node.table.variance) ** 0.5
