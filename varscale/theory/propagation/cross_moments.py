"""Cross-moments E[a_i b_j] of two arrays over one frame: zero by a fresh weight, the product of means, or expanded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, averaging, contract_axis
from varscale.theory.domain.axis_maps import class_shares
from varscale.theory.domain.tables import NEGLIGIBLE, lift, means_by_type
from varscale.theory.graph.convolutions import WindowSum
from varscale.theory.graph.expressions import IDENTITIES, Apply, Mean, Sum, roots, swapped
from varscale.theory.graph.known_arrays import known_cross
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, cross_by_kind, number
from varscale.theory.graph.reshapes import Permute
from varscale.theory.graph.store import Marked, evaluated


class Pair(Marked):
    """E[a_i b_j] by type; `doubt` is how far the covariance may be off, relative to √(Var a · Var b), the largest there is."""

    def __init__(self, moment: np.ndarray, flagged: str | None = None, doubt: float = 0.0):
        self.moment, self.flagged, self.doubt = moment, flagged, doubt


def dependent(a: Node, b: Node) -> bool:
    """Whether two nodes can be correlated at all."""
    if a is b:
        return True
    if isinstance(a, Array) or isinstance(b, Array):
        return False
    if a.odd & b.unseen or b.odd & a.unseen:
        return False
    return bool(a.deps & b.deps)


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
    if len(read) < len(frame):
        return _over_more(a, b, frame, read)
    key = ("cross", na.id, a.bind, nb.id, b.bind, tuple(frame))
    graph = na.graph

    def work() -> Pair:
        if key not in graph.pairs:
            found = Pair(np.zeros(()))
            graph.computing.append(found)
            try:
                found.moment = _expand(a, b, tuple(frame))
            finally:
                graph.computing.pop()
            graph.pairs[key] = found
        return graph.pairs[key]

    return graph.pairs[key] if key in graph.pairs else evaluated(graph, work)


def _over_more(a: View, b: View, frame: Sequence[Axis], read: Sequence[int]) -> Pair:
    """A frame of which some axes are read by neither."""
    place = [read.index(p) if p in read else -1 for p in range(len(frame))]
    found = pair(a.within(place), b.within(place), [frame[p] for p in read])
    if found.moment.ndim == 0:
        return found
    own = iter(found.moment.shape)
    return Pair(
        found.moment.reshape([next(own) if p in read else 1 for p in range(len(frame))]),
        found.flagged,
        found.doubt,
    )


def mean_of_product(a: View, b: View, frame: tuple[Axis, ...]) -> float:
    """E[a_i b_i] over all elements of the frame."""
    moment = np.broadcast_to(pair(a, b, frame).moment, [axis.types for axis in frame])
    return float(averaging(frame, frozenset()) @ moment.ravel())


def unsure(graph: Graph, how: str, doubt: float) -> None:
    """Mark what is being computed: a covariance in it is off by this share of the largest that there can be.

    Of a product of two standard normals E[x²y²] = 1 + 2ρ², and other nodes are no more sensitive to it than that.
    """
    if doubt > 0:
        graph.flag(
            how, doubt if any(isinstance(marked, Pair) for marked in graph.computing[-1:]) else 2 * doubt
        )


def largest_correlation(a: View, b: View) -> float:
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


def mean_product(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray:
    """E[a_i] E[b_j] by type."""
    return means_by_type(a.mean(frame), frame, b.mean(frame))


Strategy = Callable[[View, View, tuple[Axis, ...]], np.ndarray | None]
# How E[a_i b_j] is worked out, the first that knows it: an order by what is exact before what is assumed, not
# by node ids.
ORDER = (
    "known numbers",
    "axes in another order",
    "one node twice",
    "affine functions",
    "terms of a sum",
    "average against a function",
    "law of functions",
    "kinds of nodes",
    "other places",
)
STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Register a way to work out cross-moments under a name of `ORDER`.

    Args:
        name: one of `ORDER`.

    Returns:
        A decorator of a function of two views over a frame (tuple of axes): E[a_i b_j] by type, or None.

    Raises:
        ValueError: the name is none of `ORDER`, or taken.
    """
    if name not in ORDER or name in STRATEGIES:
        raise ValueError(f"name must be one of {[n for n in ORDER if n not in STRATEGIES]}, not {name!r}")

    def register(work: Strategy) -> Strategy:
        STRATEGIES[name] = work
        return work

    return register


def _expand(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray:
    for name in ORDER:
        if (out := STRATEGIES[name](a, b, frame)) is not None:
            return out
    unsure(a.node.graph, "assumed", largest_correlation(a, b))
    return mean_product(a, b, frame)


def _later_first(a: View, b: View) -> list[tuple[View, View, bool]]:
    """Both orders of two views, and whether they are turned; first the node that is further from the leaves."""
    return sorted(((a, b, False), (b, a, True)), key=lambda t: (-t[0].node.depth, -t[0].node.id))


strategy("known numbers")(known_cross)


@strategy("axes in another order")
def _permuted(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    if not (isinstance(a.node, Permute) or isinstance(b.node, Permute)):
        return None
    x, y = (v.node.args[0].within(v.bind) if isinstance(v.node, Permute) else v for v in (a, b))
    return cross(x, y, frame)


@strategy("one node twice")
def _same_node(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """One node read with its axes in two places."""
    return _placed(a.node.table.second, a, b, frame) if a.node is b.node else None


@strategy("affine functions")
def _affine(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    for x, y, turn in ((a, b, False), (b, a, True)):
        if isinstance(x.node, Apply) and x.node.params[0] in ("affine", *IDENTITIES):
            c, d = x.node.params[1] or (1.0, 0.0)
            inner = x.node.args[0].within(x.bind)
            one = View(number(x.node.graph, 1.0), ())
            out = c * cross(inner, y, frame) + (d * mean_product(one, y, frame) if d else 0.0)
            return swapped(out, frame) if turn else out
    return None


@strategy("terms of a sum")
def _terms(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """The later node is the one to open, but a sum is not, against an elementwise function of it or of what is made of it."""
    for x, y, turn in _later_first(a, b):
        read = isinstance(y.node, Apply) and any(root.node.depth >= x.node.depth for root in roots(y.node))
        if isinstance(x.node, Sum) and not read:
            out = _of_terms(x, y, frame)
            return swapped(out, frame) if turn else out
    return None


@strategy("average against a function")
def _projected(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """An average of a function of x against a function of x: by projection, which needs no law of the average."""
    for x, y, turn in ((a, b, False), (b, a, True)):
        if isinstance(x.node, Mean | WindowSum) and isinstance(y.node, Apply):
            out = cross_by_kind(x.node, x, y, frame)
            if out is not None:
                return swapped(out, frame) if turn else out
    return None


@strategy("kinds of nodes")
def _by_kind(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """What the kind of one of the nodes knows."""
    for x, y, turn in _later_first(a, b):
        if (out := cross_by_kind(x.node, x, y, frame)) is not None:
            return swapped(out, frame) if turn else out
    return None


@strategy("other places")
def _elsewhere(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """Two nodes over the same axes, read in different places."""
    if a.bind == b.bind or a.node.axes != b.node.axes:
        return None
    axes, own = a.node.axes, tuple(range(len(a.node.axes)))
    second = np.broadcast_to(cross(View(a.node, own), View(b.node, own), axes), a.node.frame_types)
    return _placed(second, a, b, frame)


def _of_terms(x: View, y: View, frame: tuple[Axis, ...]) -> np.ndarray:
    """A sum against y, term by term; each one's doubt weighs what the term weighs in the sum."""
    out, graph = np.zeros((1,) * len(frame)), x.node.graph
    for c, term in zip(x.node.params, x.node.args, strict=True):
        found = pair(term.within(x.bind), y, frame)
        out = out + c * found.moment
        if found.flagged:
            share = abs(c) * (term.node.table.variance / max(x.node.table.variance, 1e-300)) ** 0.5
            unsure(graph, found.flagged, min(share * found.doubt, 1.0))
    return out


def _placed(second: np.ndarray, a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray:
    """Where two places of an axis differ, its indices are unrelated: equal one time in n, if of one class."""
    axes, bind = list(a.node.axes), list(a.bind)
    many = math.prod(axis.types for axis in frame) > _MOST_TYPES
    for k in reversed(range(len(axes))):
        axis, p, q = axes[k], a.bind[k], b.bind[k]
        if p == q:
            continue
        if many or axis.classes == 1 or p in b.bind or q in a.bind:
            others = second.take(range(axis.classes, axis.types), axis=k)
            apart = float(np.max(np.ptp(others, axis=k)) / max(np.max(np.abs(others)), 1e-300))
            if apart > NEGLIGIBLE and p not in b.bind and q not in a.bind:
                if not a.node.graph.undrawn:
                    raise NotImplementedError("two places of an axis of many classes")
                unsure(a.node.graph, "assumed", min(apart, 1.0))
            second = contract_axis(second, k, axis.any_pair)
            del axes[k], bind[k]
            continue
        apart = apply_axis(second, k, _free_pairs(axis))
        apart = apart.reshape(*second.shape[:k], axis.classes, axis.classes, *second.shape[k + 1 :])
        for d, place in ((k, p), (k + 1, q)):
            apart = apply_axis(apart, d, class_shares(frame[place], axis))
            apart = np.take(apart, frame[place].first if d == k else frame[place].second, axis=d)
        second = apart
        axes[k : k + 1], bind[k : k + 1] = [frame[p], frame[q]], [p, q]
    return lift(second, axes, bind, frame, pairs=True)


_MOST_TYPES = 100_000  # of pairs of indices, where two places of an axis differ: a matter of memory


@functools.cache
def _free_pairs(axis: Axis) -> np.ndarray:
    """Weights of types for an index of one class and an unrelated one of another, (classes², types)."""
    c = axis.classes
    equal = np.diag(1 / axis.counts)
    weights = np.zeros((c, c, axis.types))
    weights[np.arange(c), np.arange(c), np.arange(c)] = np.diag(equal)
    weights.reshape(c * c, -1)[:, c:] = np.diag((1 - equal).ravel())
    return weights.reshape(c * c, -1)
