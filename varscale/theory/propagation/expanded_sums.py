"""Sums beside functions of their own terms, with which they are not jointly Gaussian."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import Node, View
from varscale.theory.graph.normal_form import affine
from varscale.theory.propagation.marginals import CONCENTRATED, marginal

Variable = tuple[int, tuple[int, ...]]
_CLOSED_DOUBT = 0.3  # of (relu a + relu b)·a with its sum taken as jointly Gaussian with a: computed here, a quarter


def roots_of(views: Iterable[View]) -> dict[Variable, View]:
    """The roots of trees over one frame."""
    found: dict[Variable, View] = {}
    for view in views:
        for root in roots(view.node):
            placed = root.within(view.bind)
            found[placed.node.id, placed.bind] = placed
    return found


def opened(node: Node, target: Sum, written: Callable[[Sum], Node]) -> Node:
    """An elementwise tree with one of its roots, a sum, written in other terms."""
    if node is target:
        return written(target)
    if not isinstance(node, Apply) or all(root.node is not target for root in roots(node)):
        return node
    args = [View(opened(child, target, written), bind) for child, bind in node.args]
    return node.graph.make(Apply, node.axes, args, node.params)


def written_out(target: Sum) -> Node:
    """A sum as an elementwise tree of its terms."""
    whole = tuple(range(len(target.axes)))
    terms = [View(affine(x.node, c, 0.0), x.bind) for c, x in zip(target.params, target.args, strict=True)]
    return functools.reduce(lambda a, b: View(target.graph.make(Apply, target.axes, [a, b], ("add", ())), whole), terms).node


def mark_closed_sums(views: Iterable[View]) -> None:
    """Flag factors of different variables that share roots, where one of those variables is a sum that is not Gaussian."""
    own = list(roots_of(views).values())
    inside = [set(roots_of(t.within(x.bind) for t in x.node.args)) if len(own) > 1 and _opens(x.node) else None for x in own]
    for i, terms in enumerate(inside):
        others = (inside[j] or {(x.node.id, x.bind)} for j, x in enumerate(own) if j != i)
        if terms and any(terms & other for other in others):
            own[i].node.graph.flag("assumed", _CLOSED_DOUBT)


def _opens(node: Node) -> bool:
    """Whether a root is a sum that is not jointly Gaussian with its terms."""
    if not isinstance(node, Sum) or node.is_variance:
        return False
    return node.table.variance > CONCENTRATED * node.table.total_mean**2 and not marginal(node).gaussian
