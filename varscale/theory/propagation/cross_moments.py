"""Cross-moments E[a_i b_j] of two arrays over one frame: zero by a fresh weight, the product of means, or expanded.

Two nodes may read one axis of an array, all of it or a span, entry by entry or as a mean. Then E[y_p z_q] is
Σ A_pi B_qj E[x_i x'_j] (`domain.axis_maps`): means, slices, splits and merges need counts of pairs alone.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axes, Axis, apply_axis, average, full_along, join, replaced, rest
from varscale.theory.domain.axis_maps import class_counts, entry_map, pair_counts, split_axis
from varscale.theory.domain.tables import full_types, lift, means_by_type, over_frame, regrouped
from varscale.theory.graph.convolutions import ONE, WindowSum
from varscale.theory.graph.expressions import IDENTITIES, Apply, Mean, Sum, roots, swapped
from varscale.theory.graph.known_arrays import known_cross
from varscale.theory.graph.layout import split
from varscale.theory.graph.linear_nodes import (
    AxisMapped,
    Concat,
    Gather,
    Mapped,
    Merge,
    Permute,
    Split,
    Take,
    mapped_over,
)
from varscale.theory.graph.nodes import Constant, Graph, Node, View, cross_by_kind
from varscale.theory.graph.normal_form import mean_node
from varscale.theory.graph.store import Marked, once_per_node

_MOST_TYPES = 100_000  # of pairs of indices, where two places of an axis differ: a matter of memory


@dataclasses.dataclass(eq=False)
class Pair(Marked):
    """E[a_i b_j] by type; `doubt` is how far the covariance may be off, relative to √(Var a · Var b), the largest there is."""

    moment: np.ndarray
    flagged: str | None = None
    doubt: float = 0.0


def dependent(a: Node, b: Node) -> bool:
    """Whether two nodes can be correlated at all."""
    return a is b or not (a.odd & b.unseen or b.odd & a.unseen or not a.deps & b.deps)


def cross(a: View, b: View, frame: Axes) -> np.ndarray:
    """E[a_i b_j] by type, broadcastable to the frame's types; what is being computed gets the flags of it."""
    found = pair(a, b, frame)
    if found.flagged:
        unsure(a.node.graph, found.flagged, found.doubt)
    return found.moment


def pair(a: View, b: View, frame: Axes) -> Pair:
    """The same with its flags, for those who know how much it matters to them."""
    if a.node.odd & b.node.unseen or b.node.odd & a.node.unseen:
        return Pair(np.zeros((1,) * len(frame)))
    if a == b or not dependent(a.node, b.node):
        return Pair(a.second(frame) if a == b else mean_product(a, b, frame))
    read = sorted({*a.bind, *b.bind})
    if len(read) == len(frame):
        return _expanded(a.node, a, b, tuple(frame))
    x, y = (View(v.node, tuple(map(read.index, v.bind))) for v in (a, b))
    found = pair(x, y, [frame[p] for p in read])
    return Pair(over_frame(found.moment, read, len(frame)), found.flagged, found.doubt)


@once_per_node
def _expanded(node: Node, a: View, b: View, frame: Axes) -> Pair:
    """Of a view of this node, by the first strategy that knows it."""
    found = Pair(np.zeros(()))
    node.graph.computing.append(found)
    try:
        worked_out = (work(a, b, frame) for work in STRATEGIES.values())
        moment = next((out for out in worked_out if out is not None), None)
        if moment is None:
            unsure(node.graph, "assumed", _largest_correlation(a, b))
        found.moment = mean_product(a, b, frame) if moment is None else moment
    finally:
        node.graph.computing.pop()
    return found


def mean_of_product(a: View, b: View, frame: Axes) -> float:
    """E[a_i b_i] over all elements of the frame."""
    return average(pair(a, b, frame).moment, frame)


def unsure(graph: Graph, how: str, doubt: float) -> None:
    """Mark what is being computed: a covariance in it is off by this share of the largest that there can be."""
    if doubt > 0:  # E[x²y²] = 1 + 2ρ² of two standard normals, and no node is more sensitive to ρ than that
        graph.flag(how, doubt * (1 if any(isinstance(x, Pair) for x in graph.computing[-1:]) else 2))


def cross_covariance(a: View, b: View, frame: Axes) -> np.ndarray:
    """E[a_i b_j] − E[a_i] E[b_j] by type."""
    return cross(a, b, frame) - mean_product(a, b, frame)


def mean_product(a: View, b: View, frame: Axes) -> np.ndarray:
    """E[a_i] E[b_j] by type."""
    return means_by_type(a.mean(frame), frame, b.mean(frame))


def _largest_correlation(a: View, b: View) -> float:
    """A bound on |Cov(a, b)| / √(Var a · Var b): what one of them has along the other's axes alone, it only has by its mean."""
    bound = 1.0
    for mine, other in ((a, b), (b, a)):
        table = mine.node.table
        averaged = average(table.second, table.axes, mine.axes_beyond(other)) - table.total_mean**2
        bound *= (min(max(averaged, 0.0), table.variance) / max(table.variance, 1e-300)) ** 0.5
    return bound


Strategy = Callable[[View, View, Axes], np.ndarray | None]


def _either_way(work: Strategy) -> Strategy:
    """A strategy that opens its first argument, for both: one that is further from the leaves before the other.

    An average is opened before a function, by projection, which needs no law of it, and a function before all else.
    """

    def order(pair: tuple[View, View]) -> tuple[int, ...]:
        (x, _), (y, _) = pair
        averaged = isinstance(x, Mean | WindowSum) and isinstance(y, Apply)
        return -averaged, -isinstance(x, Apply), -x.depth, -x.id

    def opened(a: View, b: View, frame: Axes) -> np.ndarray | None:
        for x, y in sorted(((a, b), (b, a)), key=order):
            if (out := work(x, y, frame)) is not None:
                return out if x is a else swapped(out, frame)
        return None

    return opened


def _permuted(a: View, b: View, frame: Axes) -> np.ndarray | None:
    x, y = (v.node.args[0].within(v.bind) if isinstance(v.node, Permute) else v for v in (a, b))
    return None if (x, y) == (a, b) else cross(x, y, frame)


def _terms(x: View, y: View, frame: Axes) -> np.ndarray | None:
    """A weighted sum term by term, but against functions of it; a term's doubt counts by the term's share of the sum."""
    node, read = x.node, roots(y.node) if isinstance(y.node, Apply) else ()
    if isinstance(node, Sum) and all(root.node.depth < node.depth for root in read):
        weights, offset = node.params, 0.0
    elif node.primitive in ("affine", *IDENTITIES):
        *weights, offset = node.params[1] or (1.0, 0.0)
    else:
        return None
    shift = np.full((1,) * len(frame), offset)
    out = means_by_type(shift, frame, y.mean(frame)) if offset else shift
    for c, term in zip(weights, node.args, strict=False):
        found = pair(term.within(x.bind), y, frame)
        out = out + c * found.moment
        if found.flagged:
            share = abs(c) * (term.node.table.variance / max(node.table.variance, 1e-300)) ** 0.5
            unsure(node.graph, found.flagged, min(share * found.doubt, 1.0))
    return out


class Reading(NamedTuple):
    """How one axis of an array is read: the entries of a span in their order, or their mean."""

    axis: int | None  # of the array; None where it does not have it, and so is the same at all positions
    place: int | None  # where in the frame the entries are; None of a mean, and of a single entry
    span: tuple[int, int, int]  # start, stop, step


@cross_by_kind.register
def cross_by_kind_of_mean(node: Mean, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """E[mean(x) y] where y is a mean or a slice over the same axes, or runs over them; else y, too, is averaged."""
    x, mine = _opened(a)
    if isinstance(b.node, Mean | Take):
        y, theirs = _opened(b)
        met = _matched(mine, theirs)
        if isinstance(b.node, Take):
            alike = (y.node.axes, (theirs[0].axis,)) == (x.node.axes, node.params)
            met = theirs if alike and theirs[0].place not in a.bind else None
        if met is not None and len(met) == len(theirs):
            return _read_together(x, mine, y, met, frame)
    # Axes of y that mean(x) does not run over: what x is averaged over, or y may be averaged over them, too.
    spare = b.axes_beyond(a)
    if (met := _matched(mine, _all_entries(b, spare))) is not None:
        return _read_together(x, mine, b, met, frame)
    if not spare or any(b.node.axes[k].labels is not None for k in spare):
        return None
    averaged = mean_node(b.node, spare)
    left = tuple(place for place in b.bind if place in a.bind)
    return None if isinstance(averaged, Constant) else cross(a, View(averaged, left), frame)


@cross_by_kind.register
def cross_by_kind_of_take(node: Take, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """Two slices of things over one axis, or a slice and all of it, which meet where one position is in both."""
    (x, mine), k = _opened(a), node.params[0]
    if (x.node.axes, x.bind) == (b.node.axes, replaced(b.bind, k, -1)):
        return _read_together(x, mine, b, _all_entries(b, [k]), frame)
    if isinstance(b.node, Take) and b.node.argument.axes[b.node.params[0]].size == x.node.axes[k].size:
        return _read_together(x, mine, *_opened(b), frame)
    if mine[0].place in b.bind or _is_cut(b.node):
        return None
    return _read_together(x, mine, b, [Reading(None, None, (0, x.node.axes[k].size, 1))], frame)


@once_per_node
def _is_cut(node: Node) -> bool:
    """Whether a node is made from given positions of an axis that it may no longer have, which a slice can have too or lack."""
    if isinstance(node, Take) and node.axes != node.argument.axes:
        return True
    through = node.moves or node.averages or node.entrywise or isinstance(node, Concat)
    return through and any(map(_is_cut, node.sources))


def _same_node(a: View, b: View, frame: Axes) -> np.ndarray | None:
    """One node with its axes in two places: along those its indices are unrelated, equal one time in n, if of one class."""
    if a.node is not b.node:
        return None
    many = math.prod(axis.types for axis in frame) > _MOST_TYPES
    apart = [k for k, (p, q) in enumerate(zip(a.bind, b.bind, strict=True)) if p != q]
    told = [k for k in apart if a.bind[k] not in b.bind and b.bind[k] not in a.bind]
    if many and any(a.node.axes[k].classes > 1 for k in told):
        if not a.node.graph.undrawn:
            raise NotImplementedError("two places of an axis of many classes")
        unsure(a.node.graph, "assumed", 1.0)
    averaged = [k for k in apart if many or k not in told or a.node.axes[k].classes == 1]
    mine, theirs = (_all_entries(view, apart, averaged) for view in (a, b))
    return _read_together(a, mine, b, theirs, frame)


# How E[a_i b_j] is worked out, by the first that knows it: what is exact comes before what is assumed.
STRATEGIES: dict[str, Strategy] = {
    "known numbers": known_cross,
    "axes in another order": _permuted,
    "one node twice": _same_node,
    "weighted sums": _either_way(_terms),
    "kinds of nodes": _either_way(lambda x, y, frame: cross_by_kind(x.node, x, y, frame)),
}


def _opened(view: View) -> tuple[View, list[Reading]]:
    """What is averaged or was sliced, −1 for the places of the axes that are, and these."""
    source, bind, node = view.node.argument, list(view.bind), view.node
    read = _all_entries(source.whole, node.reduced, averaged=node.reduced)
    if isinstance(node, Take):
        k, *span = node.params
        read = [Reading(k, bind.pop(k) if len(source.axes) == len(bind) else None, tuple(span))]
    for reading in read:
        bind.insert(reading.axis or 0, -1)
    return View(source, tuple(bind)), read


def _all_entries(view: View, axes: Iterable[int], averaged: Container[int] = ()) -> list[Reading]:
    """All entries of some axes, or the mean of them."""
    return [Reading(k, None if k in averaged else view.bind[k], (0, view.node.axes[k].size, 1)) for k in axes]


def _matched(mine: Sequence[Reading], theirs: Sequence[Reading]) -> list[Reading] | None:
    """Those of `theirs` that are of axes as large as mine, each taken once; None where one is missing."""
    out = list[Reading]()
    for reading in mine:
        out += [r for r in theirs if r.span[1] == reading.span[1] and r not in out][:1]
    return out if len(out) == len(mine) else None


def _axis_at(place: int, views: Iterable[View], *known: Axis) -> Axis:
    """The axis that views over a frame have at a place of it: one with the classes of all."""
    own = (v.node.axes[v.bind.index(place)] for v in views if place in v.bind)
    return functools.reduce(join, (*known, *own))


def _read_together(
    x: View, mine: Sequence[Reading], y: View, theirs: Sequence[Reading], frame: Axes
) -> np.ndarray | None:
    """E[x_i y_j] by type, both read along some axes, pair by pair the same; placed as the readings; None if others are."""
    pairs, views = list(zip(mine, theirs, strict=True)), list[View]()
    read = {reading.place for reading in (*mine, *theirs)}
    places = rest(frame, read)
    for view, own in ((x, mine), (y, theirs)):
        at = {reading.axis: len(places) + i for i, reading in enumerate(own)}
        if any(p in read for k, p in enumerate(view.bind) if k not in at):
            return None
        bind = (at[k] if k in at else places.index(p) for k, p in enumerate(view.bind))
        views.append(View(view.node, tuple(bind)))
    at, axes = len(places), [frame[p] for p in places]
    inner = [_axis_at(at + i, views) for i in range(len(pairs))]
    table = cross(views[0], views[1], (*axes, *inner))
    for axis, (one, other) in zip(inner, pairs, strict=True):
        here = dict.fromkeys(r.place for r in (one, other) if r.place is not None)
        outs = tuple(None if r.place is None else frame[r.place] for r in (one, other))
        counts = _pairs_read(axis, (one.span, other.span), outs, one.place == other.place)
        table = np.tensordot(full_along(table, at, axis), counts, axes=(at, -1))
        axes, places = [*axes, *(frame[p] for p in here)], [*places, *here]
    return lift(table, axes, places, frame, pairs=True)


@functools.cache
def _pairs_read(
    axis: Axis, spans: tuple[tuple[int, int, int], ...], outs: tuple[Axis | None, ...], together: bool
) -> np.ndarray:
    """The share of each type of pair of an axis in what two spans have, by type of the axes that their entries are over.

    These are `outs`, None where the mean of a span is read; `together`: both are one axis, and so by one type.
    """
    maps = []
    for span, out in zip(spans, outs, strict=True):
        at = np.arange(axis.size)[slice(*span)]
        rows, weight = (0 * at, 1 / len(at)) if out is None else (np.arange(len(at)), 1.0)
        maps.append(entry_map(rows, at, out or ONE, axis, weight))
    a, b = maps
    if together and outs[0] is not None:
        return pair_counts(a, b)
    first, second = 0 if outs[0] is None else a.out.first, 0 if outs[1] is None else b.out.second
    return class_counts(a, b)[first][..., second, :]


@cross_by_kind.register
def cross_by_kind_of_split(node: Split, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """The factors of an axis as the axis that they are of: b's too, if it has them all; None where it has others of them."""
    gone = _factor_places(a)
    if {*gone} & {*b.bind} and not (isinstance(b.node, Split) and _factor_places(b) == gone):
        return None
    kept = rest(frame, gone)
    place = {p: i for i, p in enumerate([*kept, gone[0]])}
    views = []
    for x, bind in (a, b):
        source = x.argument if gone[0] in bind else x
        views.append(View(source, tuple(place[p] for p in bind if p in place)))
    wide = (*(frame[p] for p in kept), _axis_at(len(kept), views))
    places, table = (*kept, *gone), full_types(cross(views[0], views[1], wide), wide)
    out = [frame[p] for p in places]
    table = regrouped(table, wide, out, len(kept), node.params[1], pairs=True)
    return over_frame(table, places, len(frame))


def _factor_places(view: View) -> tuple[int, ...]:
    k, sizes = view.node.params
    return view.bind[k : k + len(sizes)]


@cross_by_kind.register
def cross_by_kind_of_merge(node: Merge, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """An axis that was put together, read as its factors, into which b's is split."""
    sizes, at = node.params[1], a.bind[node.params[0]]
    other = split(b.node, b.bind.index(at), sizes) if at in b.bind else b.node
    views, more = [], len(sizes) - 1
    for x, bind in ((node.argument, a.bind), (other, b.bind)):
        wide = (range(at, at + more + 1) if p == at else [p + more * (p > at)] for p in bind)
        views.append(View(x, tuple(itertools.chain(*wide))))
    factors = (_axis_at(p, views, axis) for p, axis in enumerate(split_axis(frame[at], sizes).axes, at))
    wide = replaced(frame, at, *factors)
    return regrouped(cross(views[0], views[1], wide), wide, frame, at, sizes, pairs=True)


@cross_by_kind.register
def cross_by_kind_of_maps(
    node: AxisMapped | WindowSum | Gather, a: View, b: View, frame: Axes
) -> np.ndarray | None:
    """Arrays made by maps of axes of others over the same places: E[y_p z_q] from E[x_i x'_j]."""
    (c, x, mine), (d, y, theirs) = Mapped(1.0, a).earliest(), Mapped(1.0, b).earliest()
    inner = list(frame)
    for place in {*mine, *theirs}:
        axes = [v.node.axes[v.bind.index(place)] for v in (x, y) if place in v.bind]
        axes += [] if place in mine and place in theirs else [frame[place]]
        if len({axis.size for axis in axes}) > 1:
            return None
        inner[place] = functools.reduce(join, axes)
    if not mine:
        return None
    out = c * d * cross(x, y, inner)
    for place in {*mine, *theirs}:
        own, axis = frame[place], inner[place]
        maps = (mapped_over(maps.get(place), own, axis) for maps in (mine, theirs))
        out = apply_axis(full_along(out, place, axis), place, pair_counts(*maps))
    if isinstance(node, WindowSum):
        unsure(node.graph, "quadrature", max(x.node.near, y.node.near))
    return out
