"""Cross-moments of slices: which pairs of positions of the whole two slices of an axis have, or a slice and all of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, join, pair_map, sliced
from varscale.theory.domain.axis_maps import pair_counts, slice_map
from varscale.theory.domain.tables import lift
from varscale.theory.graph.axis_nodes import Concat, Take
from varscale.theory.graph.nodes import Node, View, cross_by_kind
from varscale.theory.propagation.cross_moments import cross

Span = tuple[Any, ...]


def crossed_slices(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """E[a_i b_j] by type of a slice a; None where it is not known how b's positions and those of the whole meet."""
    k, *own = a.node.params
    whole, at = before(a)
    if type(b.node) is type(a.node):
        theirs = b.node.params[0]
        other, there = before(b)
        if whole.node.axes[k].size == other.node.axes[theirs].size:
            return _two_slices(
                whole, other, (k, theirs), (at, there), (tuple(own), tuple(b.node.params[1:])), frame
            )
        return _of_the_whole(whole, b, k, at, tuple(own), frame)
    if whole.node.axes == b.node.axes:
        rest = tuple(p for i, p in enumerate(whole.bind) if i != k)
        if rest == (*b.bind[:k], *b.bind[k + 1 :]):
            span = (0, whole.node.axes[k].size, 1)
            return _two_slices(whole, b, (k, k), (at, b.bind[k]), (tuple(own), span), frame)
    return _of_the_whole(whole, b, k, at, tuple(own), frame)


def before(a: View) -> tuple[View, int | None]:
    """What a slice was cut from, with −1 for the place of the axis that was cut; and the place of what is left of it."""
    k = a.node.params[0]
    source = a.node.args[0].node
    gone = len(a.node.axes) < len(source.axes)
    return View(source, (*a.bind[:k], -1, *a.bind[k + (not gone) :])), None if gone else a.bind[k]


def _filled(view: View, k: int, place: int) -> View:
    return View(view.node, (*view.bind[:k], place, *view.bind[k + 1 :]))


def _of_the_whole(
    x: View, b: View, k: int, at: int | None, span: Span, frame: Sequence[Axis]
) -> np.ndarray | None:
    """A slice against what does not run over the axis: as the whole, of which the slice's classes are read."""
    if (at is not None and at in b.bind) or is_cut(b.node):
        return None
    axis = x.node.axes[k]
    new, classes = sliced(axis, *span)
    place = len(frame) if at is None else at
    wide = (*frame[:place], axis, *frame[place + 1 :])
    table = np.broadcast_to(cross(_filled(x, k, place), b, wide), [a.types for a in wide])
    if new is None:
        return apply_axis(table, place, pair_map(classes)[:1]).squeeze(place)
    return lift(
        apply_axis(table, place, pair_map(classes)),
        (*wide[:place], new, *wide[place + 1 :]),
        range(len(wide)),
        frame,
        pairs=True,
    )


def is_cut(node: Node) -> bool:
    """Whether a node is made from given positions of an axis that it may no longer have, which a slice can have too or lack."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node.moves and _entries(node) < _entries(node.args[0].node):
            return True
        if node.id not in seen and (
            node.moves or node.averages or node.entrywise or isinstance(node, Concat)
        ):
            seen.add(node.id)
            pending += [view.node for view in node.args]
    return False


def _entries(node: Node) -> int:
    return math.prod(axis.size for axis in node.axes)


def _two_slices(
    x: View,
    y: View,
    cut: tuple[int, int],
    at: tuple[int | None, int | None],
    spans: tuple[Span, Span],
    frame: Sequence[Axis],
) -> np.ndarray | None:
    """Slices of two axes of one size, taken as one axis, read at one place of the frame or at two, or at none.

    Args:
        x: what the first is a slice of, without the place of the axis that is cut.
        y: likewise.
        cut: the axis of each that is cut.
        at: where in the frame what is left of it is; None where one position is left.
        spans: the positions of it that each has.
        frame: the frame.
    """
    old = join(x.node.axes[cut[0]], y.node.axes[cut[1]])
    rest = [place for view, k in zip((x, y), cut, strict=True) for i, place in enumerate(view.bind) if i != k]
    if any(place in rest for place in at if place is not None):
        return None
    kept = [p for p in range(len(frame)) if p not in at]
    place = {p: i for i, p in enumerate(kept)}
    wide = (*(frame[p] for p in kept), old)
    last = len(kept)
    views = [
        View(v.node, tuple(last if i == k else place[p] for i, p in enumerate(v.bind)))
        for v, k in zip((x, y), cut, strict=True)
    ]
    table = np.broadcast_to(cross(views[0], views[1], wide), [a.types for a in wide])
    if at[0] is not None and at[0] == at[1]:
        table = apply_axis(table, last, _shifted(frame[at[0]], old, spans[0], spans[1]))
        return lift(table, (*wide[:-1], frame[at[0]]), (*kept, at[0]), frame, pairs=True)
    table = np.tensordot(_meeting(old, spans, at, tuple(frame)), table, axes=(2, last))
    places = [p for p in at if p is not None]
    for side, (p, reads) in enumerate(zip(at, ("first", "second"), strict=True)):
        table = np.take(table, np.zeros(1, int) if p is None else getattr(frame[p], reads), axis=side)
    table = table[tuple(slice(None) if p is not None else 0 for p in at)]
    return lift(table, [*(frame[p] for p in places), *wide[:-1]], [*places, *kept], frame, pairs=True)


@functools.cache
def _meeting(
    old: Axis, spans: tuple[Span, Span], at: tuple[int | None, int | None], frame: tuple[Axis, ...]
) -> np.ndarray:
    """The share of each type of pair of the whole among the pairs of positions of two slices, by the class that each has."""
    chosen = [np.arange(old.size)[slice(*span)] for span in spans]
    labels = [np.zeros(1, int) if p is None else frame[p].label_array for p in at]
    sides = [1 if p is None else frame[p].classes for p in at]
    shares = np.zeros((sides[0], sides[1], old.types))
    first, second = np.meshgrid(chosen[0], chosen[1], indexing="ij")
    kind = old.classes + old.label_array[first] * old.classes + old.label_array[second]
    kind = np.where(first == second, old.label_array[first], kind)
    np.add.at(shares, (labels[0][:, None], labels[1][None], kind), 1.0)
    return shares / shares.sum(axis=-1, keepdims=True)


@functools.cache
def _shifted(new: Axis, old: Axis, span: Span, theirs: Span) -> np.ndarray:
    """Which pairs of positions of the whole two slices of one length have, by type of pair of their own places."""
    counts = pair_counts(slice_map(span, new, old), slice_map(theirs, new, old))
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)


@cross_by_kind.register(Take)
def cross_by_kind_of_take(node: Take, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Two slices of things over one axis (or a whole one), which meet where one position is in both."""
    return crossed_slices(a, b, frame)
