"""Maps of an axis: their laws, and cross-moments of means, slices, splits and merges; all are counts of pairs.

Two nodes that read one axis, each all of it or a span, the entries in their order or the mean of them, have moments
E[y_p z_q] = Σ A_pi B_qj E[x_i x'_j] (`domain.axis_maps`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterable, Sequence
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
    slice_map,
    split_axis,
)
from varscale.theory.domain.tables import NEGLIGIBLE, Table, full_along, full_types, lift, regrouped
from varscale.theory.graph.convolutions import ONE
from varscale.theory.graph.expressions import Mean
from varscale.theory.graph.layout import split
from varscale.theory.graph.linear_nodes import AxisMapped, Concat, Merge, Split, Take
from varscale.theory.graph.nodes import Constant, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import mean_node
from varscale.theory.graph.store import BackwardNotes, once_per_node
from varscale.theory.propagation.cross_moments import cross, strategy, unsure

_MOST_TYPES = 100_000  # of pairs of indices, where two places of an axis differ: a matter of memory
Span = tuple[int, int, int]


class Reading(NamedTuple):
    """How one axis of an array is read: the entries of a span in their order, or their mean."""

    axis: int | None  # of the array; None where it does not have it, and so is the same at all positions
    place: int | None  # where in the frame the entries are; None of a mean, and of a single entry
    span: Span  # start, stop, step


@cross_by_kind.register(Mean)
def cross_by_kind_of_mean(node: Mean, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
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
    spare = [k for k, place in enumerate(b.bind) if place not in a.bind]
    met = _matched(mine, _all_entries(b, spare))
    if met is not None:
        return _read_together(x, mine, b, met, frame)
    if not spare or any(b.node.axes[k].labels is not None for k in spare):
        return None
    averaged = mean_node(b.node, spare)
    rest = tuple(place for k, place in enumerate(b.bind) if k not in spare)
    return None if isinstance(averaged, Constant) else cross(a, View(averaged, rest), frame)


@cross_by_kind.register(Take)
def cross_by_kind_of_take(node: Take, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Two slices of things over one axis, or a slice and all of it, which meet where one position is in both."""
    x, mine = _opened(a)
    k, size = node.params[0], x.node.axes[node.params[0]].size
    if (x.node.axes, x.bind) == (b.node.axes, (*b.bind[:k], -1, *b.bind[k + 1 :])):
        return _read_together(x, mine, b, _all_entries(b, [k]), frame)
    if isinstance(b.node, Take):
        y, theirs = _opened(b)
        if y.node.axes[b.node.params[0]].size == size:
            return _read_together(x, mine, y, theirs, frame)
    if mine[0].place in b.bind or _is_cut(b.node):
        return None
    return _read_together(x, mine, b, [Reading(None, None, (0, size, 1))], frame)


@strategy("one node twice")
def _same_node(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """One node with its axes in two places: along those its indices are unrelated, equal one time in n, if of one class."""
    if a.node is not b.node:
        return None
    many = math.prod(axis.types for axis in frame) > _MOST_TYPES
    apart = [k for k, (p, q) in enumerate(zip(a.bind, b.bind, strict=True)) if p != q]
    told = [k for k in apart if a.bind[k] not in b.bind and b.bind[k] not in a.bind]
    for k in told if many else ():
        axis = a.node.axes[k]
        second = a.node.table.second.take(range(axis.classes, axis.types), axis=k)
        varied = float(np.max(np.ptp(second, axis=k)) / max(np.max(np.abs(second)), 1e-300))
        if varied > NEGLIGIBLE and not a.node.graph.undrawn:
            raise NotImplementedError("two places of an axis of many classes")
        if varied > NEGLIGIBLE:
            unsure(a.node.graph, "assumed", min(varied, 1.0))
    averaged = [k for k in apart if many or k not in told or a.node.axes[k].classes == 1]
    mine, theirs = (_all_entries(view, apart, averaged) for view in (a, b))
    return _read_together(a, mine, b, theirs, frame)


def _opened(view: View) -> tuple[View, list[Reading]]:
    """What is averaged or was sliced, −1 for the places of the axes that are, and these."""
    source, bind = view.node.args[0].node, list(view.bind)
    read = [Reading(k, None, (0, source.axes[k].size, 1)) for k in view.node.reduced]
    if isinstance(view.node, Take):
        k, start, stop, step = view.node.params
        place = bind.pop(k) if len(source.axes) == len(bind) else None
        read = [Reading(k, place, (start, stop, step))]
    for reading in read:
        bind.insert(reading.axis or 0, -1)
    return View(source, tuple(bind)), read


def _all_entries(view: View, axes: Iterable[int], averaged: Container[int] = ()) -> list[Reading]:
    """All entries of some axes, or the mean of them."""
    return [Reading(k, None if k in averaged else view.bind[k], (0, view.node.axes[k].size, 1)) for k in axes]


def _matched(mine: Sequence[Reading], theirs: Sequence[Reading]) -> list[Reading] | None:
    """Those of `theirs` that are of axes as large as mine, each taken once; None where one is missing."""
    left, out = list(theirs), []
    for reading in mine:
        out += [other for other in left if other.span[1] == reading.span[1]][:1]
        left = [other for other in left if other not in out]
    return out if len(out) == len(mine) else None


def _read_together(
    x: View, mine: Sequence[Reading], y: View, theirs: Sequence[Reading], frame: Sequence[Axis]
) -> np.ndarray | None:
    """E[x_i y_j] by type where both are read along some axes, pair by pair the same ones; None where others are in their place.

    The places that x and y name for these axes do not count: those of the readings do.
    """
    pairs, views = list(zip(mine, theirs, strict=True)), []
    read = {reading.place for pair in pairs for reading in pair}
    places = [p for p in range(len(frame)) if p not in read]
    for view, own in ((x, mine), (y, theirs)):
        at = {reading.axis: len(places) + i for i, reading in enumerate(own)}
        if any(p in read for k, p in enumerate(view.bind) if k not in at):
            return None
        bind = (at[k] if k in at else places.index(p) for k, p in enumerate(view.bind))
        views.append(View(view.node, tuple(bind)))
    at, axes = len(places), [frame[p] for p in places]
    inner = [
        functools.reduce(join, (v.node.axes[v.bind.index(i)] for v in views if i in v.bind))
        for i in range(at, at + len(pairs))
    ]
    table = cross(views[0], views[1], (*axes, *inner))
    for axis, (one, other) in zip(inner, pairs, strict=True):
        outs = [None if r.place is None else frame[r.place] for r in (one, other)]
        counts = _pairs_read(axis, (one.span, other.span), (outs[0], outs[1]), one.place == other.place)
        table = np.tensordot(full_along(table, at, axis), counts, axes=(at, -1))
        here = dict.fromkeys(r.place for r in (one, other) if r.place is not None)
        axes, places = [*axes, *(frame[p] for p in here)], [*places, *here]
    return lift(table, axes, places, frame, pairs=True)


@functools.cache
def _pairs_read(
    axis: Axis, spans: tuple[Span, Span], outs: tuple[Axis | None, Axis | None], together: bool
) -> np.ndarray:
    """The share of each type of pair of an axis in what two spans have, by type of the axes that their entries are over.

    These are `outs`, None where the mean of a span is read; `together`: both are one axis, and so by one type.
    """
    maps = []
    for span, out in zip(spans, outs, strict=True):
        at = np.arange(axis.size)[slice(*span)]
        one = entry_map(np.zeros_like(at), at, ONE, axis, 1 / len(at))
        maps.append(one if out is None else slice_map(span, out, axis))
    a, b = maps
    if together and outs[0] is not None:
        counts = pair_counts(a, b)
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    first, second = 0 if outs[0] is None else a.out.first, 0 if outs[1] is None else b.out.second
    return class_counts(a, b)[first][..., second, :]


@once_per_node
def _is_cut(node: Node) -> bool:
    """Whether a node is made from given positions of an axis that it may no longer have, which a slice can have too or lack."""
    if isinstance(node, Take) and node.axes != node.args[0].node.axes:
        return True
    through = node.moves or node.averages or node.entrywise or isinstance(node, Concat)
    return through and any(_is_cut(view.node) for view in node.args)


@cross_by_kind.register(Split)
def cross_by_kind_of_split(node: Split, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """The factors of an axis as the axis that they are of: b's too, if it has them all; None where it has others of them."""
    gone = _factor_places(a)
    if set(gone) & set(b.bind) and not (isinstance(b.node, Split) and _factor_places(b) == gone):
        return None
    kept = [p for p in range(len(frame)) if p not in gone]
    place = {p: i for i, p in enumerate([*kept, gone[0]])}
    views = [
        View(
            v.node.args[0].node if gone[0] in v.bind else v.node,
            tuple(place[p] for p in v.bind if p in place),
        )
        for v in (a, b)
    ]
    axis = functools.reduce(
        join, (v.node.axes[v.bind.index(len(kept))] for v in views if len(kept) in v.bind)
    )
    wide = (*(frame[p] for p in kept), axis)
    factors = split_axis(axis, tuple(frame[p].size for p in gone))
    table = np.take(full_types(cross(views[0], views[1], wide), wide), factors.types, axis=-1)
    return lift(table, (*wide[:-1], *factors.axes), (*kept, *gone), frame, pairs=True)


def _factor_places(view: View) -> tuple[int, ...]:
    k, sizes = view.node.params
    return view.bind[k : k + len(sizes)]


@cross_by_kind.register(Merge)
def cross_by_kind_of_merge(node: Merge, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """An axis that was put together, read as its factors, into which b's is split."""
    sizes, at = node.params[1], a.bind[node.params[0]]
    other = split(b.node, b.bind.index(at), sizes) if at in b.bind else b.node
    views, count = [], len(sizes)
    for x, bind in ((node.args[0].node, a.bind), (other, b.bind)):
        wide = (range(at, at + count) if p == at else [p + (count - 1) * (p > at)] for p in bind)
        views.append(View(x, tuple(itertools.chain(*wide))))
    factors = list(split_axis(frame[at], sizes).axes)
    for axis, p in ((axis, p) for v in views for axis, p in zip(v.node.axes, v.bind, strict=True)):
        if at <= p < at + count:
            factors[p - at] = join(factors[p - at], axis)
    wide = (*frame[:at], *factors, *frame[at + 1 :])
    return regrouped(cross(views[0], views[1], wide), wide, frame, at, sizes, pairs=True)


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
    axis, found = frame[place], cross(View(node.args[0].node, a.bind), b, frame)
    counts = pair_counts(AxisMap(own.matrix, axis, axis), identity_map(axis))
    return apply_axis(full_along(found, place, axis), place, counts)
