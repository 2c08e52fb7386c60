"""Maps of an axis: their laws, and cross-moments of means, slices, splits and merges; all are counts of pairs.

Two nodes that read one axis, each all of it or a span, the entries in their order or the mean of them, have moments
E[y_p z_q] = Σ A_pi B_qj E[x_i x'_j] (`domain.axis_maps`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, join
from varscale.theory.domain.axis_maps import (
    AxisMap,
    adjoint,
    class_counts,
    entry_map,
    identity_map,
    pair_counts,
    split_axis,
)
from varscale.theory.domain.tables import Table, full_along, lift, put_together
from varscale.theory.graph.convolutions import ONE
from varscale.theory.graph.expressions import Mean
from varscale.theory.graph.layout import split
from varscale.theory.graph.linear_nodes import AxisMapped, Concat, Merge, Split, Take
from varscale.theory.graph.nodes import Constant, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import mean_node
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.cross_moments import cross

Span = tuple[int, int, int]


class Reading(NamedTuple):
    """How one axis of an array is read: the entries of a span in their order, or their mean.

    Attributes:
        axis: the axis of the array; None where it does not have it, and so is the same at all positions.
        place: where in the frame the entries are; None of a mean, and of a single entry.
        span: start, stop, step.
    """

    axis: int | None
    place: int | None
    span: Span


@cross_by_kind.register(Mean)
def cross_by_kind_of_mean(node: Mean, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """E[mean(x) y] where y is a mean or a slice over the same axes, or runs over them; else y, too, is averaged."""
    x, mine = _before_means(a)
    if isinstance(b.node, Mean):
        y, theirs = _before_means(b)
        met = _matched(mine, [(k, reading.span[1]) for k, reading in enumerate(theirs)])
        if met is not None and len(met) == len(theirs):
            return _read_together(x, mine, y, [theirs[k] for k in met], frame)
    if isinstance(b.node, Take):
        y, reading = _before_slice(b)
        if y.node.axes == x.node.axes and node.params == (reading.axis,) and reading.place not in a.bind:
            return _read_together(x, mine, y, [reading], frame)
    # Axes of y that mean(x) does not run over: what x is averaged over, or y may be averaged over them, too.
    spare = [k for k, place in enumerate(b.bind) if place not in a.bind]
    met = _matched(mine, [(k, b.node.axes[k].size) for k in spare])
    if met is not None:
        y = View(b.node, tuple(-1 if k in met else place for k, place in enumerate(b.bind)))
        return _read_together(x, mine, y, [_all_entries(b, k) for k in met], frame)
    if not spare or any(b.node.axes[k].labels is not None for k in spare):
        return None
    averaged = mean_node(b.node, spare)
    rest = tuple(place for k, place in enumerate(b.bind) if k not in spare)
    return None if isinstance(averaged, Constant) else cross(a, View(averaged, rest), frame)


@cross_by_kind.register(Take)
def cross_by_kind_of_take(node: Take, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Two slices of things over one axis, or a slice and all of it, which meet where one position is in both."""
    x, reading = _before_slice(a)
    k, size = node.params[0], x.node.axes[node.params[0]].size
    y, other = _before_slice(b) if isinstance(b.node, Take) else (b, None)
    if x.node.axes == b.node.axes and (*x.bind[:k], *x.bind[k + 1 :]) == (*b.bind[:k], *b.bind[k + 1 :]):
        y, other = View(b.node, x.bind), _all_entries(b, k)
    if other is None or y.node.axes[other.axis or 0].size != size:
        if reading.place in b.bind or _is_cut(b.node):
            return None
        y, other = b, Reading(None, None, (0, size, 1))
    return _read_together(x, [reading], y, [other], frame)


def _before_means(view: View) -> tuple[View, list[Reading]]:
    """What is averaged, −1 for the places of the axes that are, and these."""
    source, reduced, own = view.node.args[0].node, view.node.params, iter(view.bind)
    bind = tuple(-1 if k in reduced else next(own) for k in range(len(source.axes)))
    return View(source, bind), [Reading(k, None, (0, source.axes[k].size, 1)) for k in reduced]


def _before_slice(view: View) -> tuple[View, Reading]:
    """What a slice was cut from, −1 for the place of the axis that was cut, and that."""
    k, *span = view.node.params
    source = view.node.args[0].node
    left = len(view.node.axes) == len(source.axes)
    bind = (*view.bind[:k], -1, *view.bind[k + left :])
    return View(source, bind), Reading(k, view.bind[k] if left else None, (span[0], span[1], span[2]))


def _all_entries(view: View, k: int) -> Reading:
    """All entries of an axis."""
    return Reading(k, view.bind[k], (0, view.node.axes[k].size, 1))


def _read_together(
    x: View, mine: Sequence[Reading], y: View, theirs: Sequence[Reading], frame: Sequence[Axis]
) -> np.ndarray | None:
    """E[x_i y_j] by type where both are read along some axes, pair by pair the same ones; None where others are in their place.

    Args:
        x: the first array, −1 for the places of the axes that are read.
        mine: how they are.
        y: the second.
        theirs: likewise.
        frame: the frame.
    """
    read = {reading.place for reading in (*mine, *theirs)} - {None}
    if read & {*x.bind, *y.bind}:
        return None
    places = [p for p in range(len(frame)) if p not in read]
    axes, inner, at = [frame[p] for p in places], [], len(places)
    binds = [[places.index(p) if p >= 0 else -1 for p in view.bind] for view in (x, y)]
    for i, pair in enumerate(zip(mine, theirs, strict=True)):
        own = []
        for view, bind, reading in zip((x, y), binds, pair, strict=True):
            if reading.axis is not None:
                bind[reading.axis] = at + i
                own.append(view.node.axes[reading.axis])
        inner.append(functools.reduce(join, own))
    views = [View(view.node, tuple(bind)) for view, bind in zip((x, y), binds, strict=True)]
    table = cross(views[0], views[1], (*axes, *inner))
    for axis, pair in zip(inner, zip(mine, theirs, strict=True), strict=True):
        outs = [None if reading.place is None else frame[reading.place] for reading in pair]
        together = pair[0].place is not None and pair[0].place == pair[1].place
        counts = _pairs_read(axis, (pair[0].span, pair[1].span), (outs[0], outs[1]), together)
        table = np.tensordot(full_along(table, at, axis), counts, axes=(at, -1))
        here = dict.fromkeys(reading.place for reading in pair if reading.place is not None)
        axes, places = [*axes, *(frame[p] for p in here)], [*places, *here]
    return lift(table, axes, places, frame, pairs=True)


@functools.cache
def _pairs_read(
    axis: Axis, spans: tuple[Span, Span], outs: tuple[Axis | None, Axis | None], together: bool
) -> np.ndarray:
    """The share of each type of pair of an axis in what two spans have, by type of the axes that their entries are over.

    Args:
        axis: the axis.
        spans: the spans.
        outs: the axis of each one's entries; None where the mean of them is read.
        together: whether both are over one axis, and so by one type.
    """
    a, b = (_axis_map(span, out, axis) for span, out in zip(spans, outs, strict=True))
    if together:
        counts = pair_counts(a, b)
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    first, second = 0 if outs[0] is None else a.out.first, 0 if outs[1] is None else b.out.second
    return class_counts(a, b)[first][..., second, :]


def _axis_map(span: Span, out: Axis | None, axis: Axis) -> AxisMap:
    """The entries of a span in their order, over an axis, or the mean of them."""
    columns = np.arange(axis.size)[slice(*span)]
    if out is None:
        return entry_map(np.zeros(len(columns), int), columns, ONE, axis, 1 / len(columns))
    return entry_map(np.arange(len(columns)), columns, out, axis)


def _is_cut(node: Node) -> bool:
    """Whether a node is made from given positions of an axis that it may no longer have, which a slice can have too or lack."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node.moves and _entries(node) < _entries(node.args[0].node):
            return True
        if node.id not in seen and (
            node.moves or node.averages or node.entrywise or isinstance(node, Concat)
        ):
            pending += [view.node for view in node.args]
        seen.add(node.id)
    return False


def _entries(node: Node) -> int:
    return math.prod(axis.size for axis in node.axes)


def _matched(readings: Sequence[Reading], axes: Sequence[tuple[int, int]]) -> list[int] | None:
    """Axes (each with its size) as large as those that are read, each taken once; None where one is missing."""
    out: list[int] = []
    for reading in readings:
        found = next((k for k, n in axes if n == reading.span[1] and k not in out), None)
        if found is None:
            return None
        out.append(found)
    return out


@cross_by_kind.register(Merge)
def cross_by_kind_of_merge(node: Merge, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    return _taken_apart(a, b, frame)


@cross_by_kind.register(Split)
def cross_by_kind_of_split(node: Split, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """None where b cannot be read over the axis that was split."""
    own = _factor_places(a)
    if not set(own) & set(b.bind) or (isinstance(b.node, Split) and _factor_places(b) == own):
        return _put_together(a, b, frame)
    return None


def _factor_places(view: View) -> tuple[int, ...]:
    k, sizes = view.node.params
    return view.bind[k : k + len(sizes)]


def _put_together(x: View, y: View, frame: Sequence[Axis]) -> np.ndarray:
    """The factors of an axis, read as the axis that they are of: y's too, where it has them."""
    gone = _factor_places(x)
    place = {p: i for i, p in enumerate(p for p in range(len(frame)) if p not in gone)}
    last = len(place)

    def whole(view: View) -> View:
        rest = tuple(place[p] for p in view.bind if p not in gone)
        if len(rest) == len(view.bind):
            return View(view.node, rest)
        k = view.node.params[0]
        return View(view.node.args[0].node, (*rest[:k], last, *rest[k:]))

    views = whole(x), whole(y)
    (axis, *others) = [view.node.axes[view.bind.index(last)] for view in views if last in view.bind]
    axis = join(axis, *others) if others else axis
    wide = (*(frame[p] for p in place), axis)
    factors = split_axis(axis, tuple(frame[p].size for p in gone))
    table = np.take(np.broadcast_to(cross(*views, wide), [a.types for a in wide]), factors.types, axis=last)
    return lift(table, (*wide[:-1], *factors.axes), (*place, *gone), frame, pairs=True)


def _taken_apart(x: View, y: View, frame: Sequence[Axis]) -> np.ndarray:
    """An axis that was put together, read as its factors, into which y's is split."""
    (k, sizes), source, count = x.node.params, x.node.args[0].node, len(x.node.params[1])
    at, more = x.bind[k], count - 1

    def widened(bind: Sequence[int], cut: int | None) -> tuple[int, ...]:
        """Places in the wider frame; the axis `cut`, if any, becomes the factors."""
        own: list[tuple[int, ...]] = [((p,) if p < at else (p + more,)) for p in bind]
        if cut is not None:
            own[cut] = tuple(range(at, at + count))
        return tuple(p for places in own for p in places)

    cut = y.bind.index(at) if at in y.bind else None
    views = (
        View(source, widened(x.bind, k)),
        View(y.node if cut is None else split(y.node, cut, sizes), widened(y.bind, cut)),
    )
    factors = list(split_axis(frame[at], sizes).axes)
    for node, bind in views:
        for axis, p in zip(node.axes, bind, strict=True):
            if at <= p < at + count:
                factors[p - at] = join(factors[p - at], axis)
    wide = (*frame[:at], *factors, *frame[at + 1 :])
    return put_together(cross(*views, wide), wide, at, sizes, frame, pairs=True)


@second_moments.register(AxisMapped)
def second_moments_of_axis_mapped(node: AxisMapped) -> Table:
    k, table = node.params[0], node.args[0].node.table
    mean = apply_axis(table.mean, k, node.axis_map.means())
    return Table(node.axes, mean, apply_axis(table.second, k, pair_counts(node.axis_map)))


@pullback.register(AxisMapped)
def pullback_of_axis_mapped(
    node: AxisMapped, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    own = node.axis_map
    return [apply_axis(cotangent, node.params[0], adjoint(pair_counts(own), own.out, own.inner))]


@cross_by_kind.register(AxisMapped)
def cross_by_kind_of_axis_mapped(
    node: AxisMapped, a: View, b: View, frame: Sequence[Axis]
) -> np.ndarray | None:
    """E[y_p b_q] from E[x_i b_q], of a map whose outputs are as many as its inputs."""
    own, place = node.axis_map, a.bind[node.params[0]]
    if own.out.size != own.inner.size:
        return None
    axis = frame[place]
    found = cross(View(node.args[0].node, a.bind), b, frame)
    counts = pair_counts(AxisMap(own.matrix, axis, axis), identity_map(axis))
    return apply_axis(full_along(found, place, axis), place, counts)
