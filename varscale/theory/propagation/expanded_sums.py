"""Sums written out: a sum of functions of roots, beside a function of one of these, is not jointly Gaussian with it.

Of (relu a + relu b)·a, the sum goes apart into what it shares with the rest, relu a, and what it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import Node, View
from varscale.theory.graph.normal_form import affine, total
from varscale.theory.propagation.marginals import CONCENTRATED, marginal

Variable = tuple[int, tuple[int, ...]]
MOST_OPENED = 6  # variables, beyond which points in twice as many dimensions are too few: the sums stay closed, in doubt
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


def written_out(target: Sum, apart: Iterable[int] | None = None) -> Node:
    """A sum as an elementwise tree of its terms; where only some are wanted apart, what the others add up to is one root."""
    apart = range(len(target.args)) if apart is None else set(apart)
    graph, axes = target.graph, target.axes
    whole = tuple(range(len(axes)))
    terms = [View(affine(target.args[i].node, target.params[i], 0.0), target.args[i].bind) for i in apart]
    rest = [i for i in range(len(target.args)) if i not in apart]
    if rest:
        other = total(graph, [target.params[i] for i in rest], axes, [target.args[i] for i in rest])
        terms.append(View(other, whole[: len(other.axes)]))
    out = terms[0]
    for term in terms[1:]:
        out = View(graph.make(Apply, axes, [out, term], ("add", ())), whole)
    return out.node


def expanded(sides: Sequence[list[View]]) -> list[list[View]]:
    """Factors with every sum open that is not Gaussian and shares roots with another variable."""
    found = sides
    while True:
        own = roots_of([view for side in found for view in side])
        shared = _shared(own)
        if not shared:
            return [list(side) for side in found]
        for target, terms in shared:
            found = [
                [View(opened(v.node, target, lambda s, t=terms: written_out(s, t)), v.bind) for v in side] for side in found
            ]
        if len(roots_of([view for side in found for view in side])) > MOST_OPENED:
            next(iter(own.values())).node.graph.flag("assumed", _CLOSED_DOUBT)
            return [list(side) for side in sides]


def _shared(own: dict[Variable, View]) -> list[tuple[Sum, set[int]]]:
    """The sums among variables that are to be opened, each with the terms that have roots in common with another variable."""
    if len(own) < 2:
        return []
    inside = {key: [set(roots_of([t.within(v.bind)])) for t in v.node.args] for key, v in own.items() if _opens(v.node)}
    out: dict[Node, set[int]] = {}
    for key, terms in inside.items():
        others = (set(own) - {key}).union(*(roots_of for k, ts in inside.items() if k != key for roots_of in ts))
        common = {i for i, mine in enumerate(terms) if mine & others}
        if common:
            out.setdefault(own[key].node, set()).update(common)
    return [(node, terms) for node, terms in out.items() if isinstance(node, Sum)]


def _opens(node: Node) -> bool:
    """Whether a root is a sum that is not jointly Gaussian with its terms."""
    if not isinstance(node, Sum) or node.is_variance:
        return False
    return node.table.variance > CONCENTRATED * node.table.total_mean**2 and not marginal(node).gaussian
