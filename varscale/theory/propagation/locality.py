"""What is lost of nearness where axes become one: places of one window are more alike than any two of the picture.

A merged axis knows how alike two of its places are on average. Where it is cut otherwise than it was made, into windows that
meet several of the old ones, places of a new window may be as alike as the most alike of the old.
"""

from __future__ import annotations

import functools

import numpy as np

from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node
from varscale.theory.graph.reshapes import Merge
from varscale.theory.graph.store import once_per_node
from varscale.theory.propagation.marginals import concentrated


@once_per_node
def lost_excess(node: Node) -> float:
    """By how much of a mean square two near places may share more than two places of the merged axes do on average."""
    return lost_excess_of(node)


@functools.singledispatch
def lost_excess_of(node: Node) -> float:
    """`lost_excess` of a kind of node, worked out: what a linear map of one array leaves of its input's."""
    if isinstance(node, Leaf | Array | Constant):
        return 0.0
    given = [v.node for v in node.args if not isinstance(v.node, Leaf | Array | Constant)]
    linear = node.width is not None and len(given) == 1
    return max(map(lost_excess, given), default=0.0) if linear or node.moves else 0.0


@lost_excess_of.register(Merge)
def lost_excess_of_merge(node: Merge) -> float:
    source = node.args[0].node
    k, count = node.params
    table = source.table
    second = table.second[tuple(slice(None) if k <= d < k + count else 0 for d in range(len(source.axes)))]
    pairs = functools.reduce(
        np.multiply.outer, [axis.pairs for axis in source.axes[k : k + count]], np.array(1.0)
    )
    agree = functools.reduce(
        np.logical_and.outer, [a.agrees for a in source.axes[k : k + count]], np.array(True)
    )
    apart = np.where(agree, 0.0, pairs)
    if not apart.any():
        return lost_excess(source)
    usual = float((apart * second).sum() / apart.sum())
    most = float(second[apart > 0].max())
    return (most - usual) / max(table.mean_square, 1e-300) + lost_excess(source)


@lost_excess_of.register(Sum)
def lost_excess_of_sum(node: Sum) -> float:
    terms = [(c, v.node) for c, v in zip(node.params, node.args, strict=True) if not v.node.averages]
    whole = sum(c * c * x.table.mean_square for c, x in terms)
    return sum(c * c * x.table.mean_square / max(whole, 1e-300) * lost_excess(x) for c, x in terms)


@lost_excess_of.register(Apply)
def lost_excess_of_apply(node: Apply) -> float:
    return max((lost_excess(r.node) for r in roots(node) if not concentrated(r.node)), default=0.0)
