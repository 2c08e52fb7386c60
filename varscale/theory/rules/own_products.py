"""Products of an array's rows with rows of its own: the diagonal is no entry like the others."""

from __future__ import annotations

from typing import Any

from varscale.theory.domain.tables import NEGLIGIBLE
from varscale.theory.graph.layout import Value, align
from varscale.theory.graph.nodes import Leaf, Node
from varscale.theory.graph.reshapes import Rearranged
from varscale.theory.propagation.cross_moments import dependent, mean_of_product
from varscale.theory.rules.softmax import Softmax


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
    _, frame, (a, b), _ = align([xs, ys])
    apart = mean_of_product(a, b, tuple(frame)) - a.node.table.total_mean * b.node.table.total_mean
    return abs(apart) > NEGLIGIBLE * (a.node.table.variance * b.node.table.variance) ** 0.5
