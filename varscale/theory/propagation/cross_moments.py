"""Cross-moments E[a_i b_j] of two arrays over one frame: zero by a fresh weight, the product of means, or expanded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, averaging
from varscale.theory.domain.tables import full_types, means_by_type, over_frame
from varscale.theory.graph.convolutions import WindowSum
from varscale.theory.graph.expressions import IDENTITIES, Apply, Mean, Sum, roots, swapped
from varscale.theory.graph.known_arrays import known_cross
from varscale.theory.graph.linear_nodes import Permute
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, cross_by_kind, number
from varscale.theory.graph.store import Marked, once_per_node


class Pair(Marked):
    """E[a_i b_j] by type; `doubt` is how far the covariance may be off, relative to √(Var a · Var b), the largest there is."""

    def __init__(self, moment: np.ndarray, flagged: str | None = None, doubt: float = 0.0):
        self.moment, self.flagged, self.doubt = moment, flagged, doubt


def dependent(a: Node, b: Node) -> bool:
    """Whether two nodes can be correlated at all."""
    apart = isinstance(a, Array) or isinstance(b, Array) or a.odd & b.unseen or b.odd & a.unseen
    return a is b or (not apart and bool(a.deps & b.deps))


def cross(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray:
    """E[a_i b_j] by type, broadcastable to the frame's types; what is being computed gets the flags of it."""
    found = pair(a, b, frame)
    if found.flagged:
        unsure(a.node.graph, found.flagged, found.doubt)
    return found.moment


def pair(a: View, b: View, frame: Sequence[Axis]) -> Pair:
    """The same with its flags, for those who know how much it matters to them."""
    na, nb = a.node, b.node
    if na.odd & nb.unseen or nb.odd & na.unseen:
        return Pair(np.zeros((1,) * len(frame)))
    if isinstance(na, Constant) or isinstance(nb, Constant) or not dependent(na, nb):
        return Pair(mean_product(a, b, frame))
    if a == b:
        return Pair(a.second(frame))
    read = sorted({*a.bind, *b.bind})
    if len(read) == len(frame):
        return _expanded(na, a, b, tuple(frame))
    views = [View(view.node, tuple(map(read.index, view.bind))) for view in (a, b)]
    found = pair(views[0], views[1], [frame[p] for p in read])
    return Pair(over_frame(found.moment, read, len(frame)), found.flagged, found.doubt)


@once_per_node
def _expanded(node: Node, a: View, b: View, frame: tuple[Axis, ...]) -> Pair:
    """Of a view of this node, by the first strategy that knows it."""
    found = Pair(np.zeros(()))
    node.graph.computing.append(found)
    try:
        worked_out = (STRATEGIES[name](a, b, frame) for name in ORDER)
        moment = next((out for out in worked_out if out is not None), None)
        if moment is None:
            unsure(node.graph, "assumed", _largest_correlation(a, b))
        found.moment = mean_product(a, b, frame) if moment is None else moment
    finally:
        node.graph.computing.pop()
    return found


def mean_of_product(a: View, b: View, frame: tuple[Axis, ...]) -> float:
    """E[a_i b_i] over all elements of the frame."""
    return float(averaging(frame) @ full_types(pair(a, b, frame).moment, frame).ravel())


def unsure(graph: Graph, how: str, doubt: float) -> None:
    """Mark what is being computed: a covariance in it is off by this share of the largest that there can be.

    Of a product of two standard normals E[x²y²] = 1 + 2ρ², and other nodes are no more sensitive to it than that.
    """
    if doubt > 0:
        graph.flag(
            how, doubt if any(isinstance(marked, Pair) for marked in graph.computing[-1:]) else 2 * doubt
        )


def mean_product(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray:
    """E[a_i] E[b_j] by type."""
    return means_by_type(a.mean(frame), frame, b.mean(frame))


Strategy = Callable[[View, View, tuple[Axis, ...]], np.ndarray | None]
# How E[a_i b_j] is worked out, by the first that knows it: what is exact comes before what is assumed.
ORDER = (
    "known numbers",
    "axes in another order",
    "one node twice",
    "weighted sums",
    "average against a function",
    "law of functions",
    "kinds of nodes",
)
STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Register a way to work out E[a_i b_j] by type of two views over a frame, or None, under a name of `ORDER`."""

    def register(work: Strategy) -> Strategy:
        STRATEGIES[name] = work
        return work

    return register


def either_way(work: Strategy) -> Strategy:
    """A strategy that opens its first argument, for both: the node that is further from the leaves is opened first."""

    @functools.wraps(work)
    def opened(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
        for x, y in sorted(((a, b), (b, a)), key=lambda pair: (-pair[0].node.depth, -pair[0].node.id)):
            if (out := work(x, y, frame)) is not None:
                return out if x is a else swapped(out, frame)
        return None

    return opened


def _largest_correlation(a: View, b: View) -> float:
    """A bound on |Cov(a, b)| / √(Var a · Var b): what one of them has along the other's axes alone, it only has by its mean."""
    bound = 1.0
    for mine, other in ((a, b), (b, a)):
        table = mine.node.table
        spare = frozenset(k for k, place in enumerate(mine.bind) if place not in other.bind)
        if table.variance <= 0:
            return 0.0
        averaged = float(averaging(table.axes, spare) @ table.second.ravel()) - table.total_mean**2
        bound *= min(max(averaged, 0.0) / table.variance, 1.0) ** 0.5
    return bound


strategy("known numbers")(known_cross)


@strategy("axes in another order")
def _permuted(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    x, y = (v.node.args[0].within(v.bind) if isinstance(v.node, Permute) else v for v in (a, b))
    return None if (x, y) == (a, b) else cross(x, y, frame)


@strategy("weighted sums")
@either_way
def _terms(x: View, y: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """A sum is not opened against a function of it or of what is made of it; a term's doubt weighs what the term does in it."""
    node, read = x.node, roots(y.node) if isinstance(y.node, Apply) else ()
    if isinstance(node, Sum) and all(root.node.depth < node.depth for root in read):
        weights, offset = node.params, 0.0
    elif isinstance(node, Apply) and node.params[0] in ("affine", *IDENTITIES):
        c, offset = node.params[1] or (1.0, 0.0)
        weights = (c,)
    else:
        return None
    one = View(number(node.graph, 1.0), ())
    out = offset * mean_product(one, y, frame) if offset else np.zeros((1,) * len(frame))
    for c, term in zip(weights, node.args, strict=True):
        found = pair(term.within(x.bind), y, frame)
        out = out + c * found.moment
        if found.flagged:
            share = abs(c) * (term.node.table.variance / max(node.table.variance, 1e-300)) ** 0.5
            unsure(node.graph, found.flagged, min(share * found.doubt, 1.0))
    return out


@strategy("average against a function")
@either_way
def _projected(x: View, y: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """An average of a function of x against a function of x: by projection, which needs no law of the average."""
    known = isinstance(x.node, Mean | WindowSum) and isinstance(y.node, Apply)
    return cross_by_kind(x.node, x, y, frame) if known else None


@strategy("kinds of nodes")
@either_way
def _by_kind(x: View, y: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    return cross_by_kind(x.node, x, y, frame)
