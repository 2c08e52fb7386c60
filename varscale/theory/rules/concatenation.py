"""Joining: arrays one after another along an axis, each part a class of positions; paddings are such arrays too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, labelled
from varscale.theory.domain.axis_maps import AxisMap, adjoint, entry_map, pair_counts
from varscale.theory.domain.tables import Table, full_types
from varscale.theory.graph import layout
from varscale.theory.graph.layout import Atom, Value, permute
from varscale.theory.graph.linear_nodes import Concat
from varscale.theory.graph.nodes import (
    Array,
    Constant,
    Leaf,
    Node,
    View,
    cross_by_kind,
    part_of,
    pullback,
    second_moments,
)
from varscale.theory.graph.normal_form import broadcast
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, inherited, propagated
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.axis import take, take_view
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region

_MANY_PARTS = 24  # parts above which they are drawn with what they are joined for, where that can be


def _parts(
    views: Sequence[View], sizes: Sequence[int], axes: Sequence[Axis], k: int
) -> list[tuple[View, AxisMap]]:
    """Arrays over a frame, one after another along axis k, each with the map of its axis to the whole one."""
    own = [
        v.node.axes[v.bind.index(k)] if k in v.bind else Axis(n) for v, n in zip(views, sizes, strict=True)
    ]
    starts = itertools.accumulate(sizes, initial=0)
    return [(v, _placed(axis, at, axes[k])) for v, axis, at in zip(views, own, starts, strict=False)]


@functools.cache
def _placed(part: Axis, start: int, whole: Axis) -> AxisMap:
    return entry_map(start + np.arange(part.size), np.arange(part.size), whole, part)


@part_of.register(Concat)
def part_of_concat(node: Concat, k: int, start: int, stop: int) -> Node | None:
    """Positions start, ..., stop − 1 of axis k, where parts are joined along it: what is left of each, joined."""
    along, sizes = node.params
    if k != along:
        return None
    starts = itertools.accumulate(sizes, initial=0)
    spans = [(max(start - at, 0), min(stop - at, n)) for at, n in zip(starts, sizes, strict=False)]
    cut = [(view, *span) for view, span in zip(node.args, spans, strict=True) if span[0] < span[1]]
    left = [take_view(view, k, first, last) for view, first, last in cut]
    whole = Axis(stop - start) if len(left) == 1 else labelled(node.axes[k].label_array[start:stop])
    axes = (*node.axes[:k], whole, *node.axes[k + 1 :])
    if len(left) > 1:
        return node.graph.make(Concat, axes, left, (k, tuple(last - first for _, first, last in cut)))
    child, bind = left[0]
    missing = [j for j, axis in enumerate(axes) if j not in bind and axis.size > 1]
    if missing and not isinstance(child, Constant):  # along those axes it is constant
        child, bind = broadcast(child, (*child.axes, *(axes[j] for j in missing))), (*bind, *missing)
    return permute(child, np.argsort(bind).tolist())


@second_moments.register(Concat)
def second_moments_of_concat(node: Concat) -> Table:
    (k, sizes), axes = node.params, node.axes
    mean, parts = np.zeros([a.classes for a in axes]), _parts(node.args, sizes, axes, k)
    for view, where in parts:
        own = [where.inner if i == k else a for i, a in enumerate(axes)]
        mean += apply_axis(np.broadcast_to(view.mean(own), [a.classes for a in own]), k, where.means())
    return Table(axes, mean, _joined_pairs(parts, parts, axes, k))


def _joined_pairs(
    ours: list[tuple[View, AxisMap]], others: list[tuple[View, AxisMap]], axes: Sequence[Axis], k: int
) -> np.ndarray:
    """E[x_i y_j] by type, for x and y joined of parts along axis k: every part with every part."""
    second, (classes, pairs) = np.zeros([a.types for a in axes]), (axes[k].classes, axes[k].pairs)
    for (a, mine), (b, theirs) in itertools.product(ours, others):
        if mine.inner == theirs.inner:
            own = (*axes[:k], mine.inner, *axes[k + 1 :])
            second += apply_axis(full_types(cross(a, b, own), own), k, pair_counts(mine, theirs))
            continue
        # Positions of unlike axes never agree: a last axis for each, of which pairs of classes count.
        last = len(axes) - 1
        frame = (*axes[:k], *axes[k + 1 :], mine.inner, theirs.inner)
        views = (
            View(v.node, tuple(last + i if p == k else p - (p > k) for p in v.bind))
            for i, v in enumerate((a, b))
        )
        # Of two classes along one of them only its own counts.
        (c, n), (d, m) = ((axis.classes, axis.types) for axis in frame[last:])
        at = np.minimum(c * np.arange(1, c + 1), n - 1)[:, None], np.minimum(d + np.arange(d), m - 1)
        table = full_types(cross(*views, frame), frame)[(..., *at)]
        members = (where.means() * where.out.counts[:, None] for where in (mine, theirs))
        matrix = np.kron(*members) / np.maximum(pairs[classes:, None], 1.0)
        table = np.moveaxis(table.reshape(*table.shape[:last], -1), -1, k)
        second[(slice(None),) * k + (slice(classes, None),)] += apply_axis(table, k, matrix)
    return second


@cross_by_kind.register(Concat)
def cross_by_kind_of_concat(node: Concat, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Against anything that runs over the same axis: cut that where the parts meet."""
    (k, sizes), starts = node.params, itertools.accumulate(node.params[1], initial=0)
    place, mine = a.bind[k], [v.within(a.bind) for v in node.args]
    cut = [take_view(b, place, at, at + n) for at, n in zip(starts, sizes, strict=False)]
    ours, theirs = (_parts(views, sizes, frame, place) for views in (mine, cut))
    return _joined_pairs(ours, theirs, frame, place)


@pullback.register(Concat)
def pullback_of_concat(node: Concat, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """Of each part the slice of the cotangent."""
    (k, sizes), out = node.params, list[np.ndarray | None]()
    for view, where in _parts(node.args, sizes, node.axes, k):
        own = (*node.axes[:k], where.inner, *node.axes[k + 1 :])
        part = apply_axis(cotangent, k, adjoint(pair_counts(where), where.out, where.inner))
        out.append(None if isinstance(view.node, Constant) else sum_out(part, own, view))
    return out


@propagated.register(Concat)
def propagated_of_concat(node: Concat) -> Spread:
    """Of a mean of the parts' mean squares, each logarithm counts by its part's share: a padding of zeros changes nothing."""
    shares = [n * view.node.table.mean_square for view, n in zip(node.args, node.params[1], strict=True)]
    parts = zip(shares, node.args, strict=True)
    return combine([(share / max(sum(shares), 1e-300), inherited(view.node)) for share, view in parts])


def concatenate(graph: Any, xs: Sequence[Value], d: int) -> Value:
    """Values one after another along dimension d."""
    xs = [layout.merged(x, d) for x in xs]
    sizes, rank = [x.shape[d] for x in xs], len(xs[0].dims)
    # The other dimensions must be factored alike: align them, each one's own being a further dimension.
    apart = [
        (*x.dims[:d], (), *x.dims[d + 1 :], *(x.dims[d] if i == j else () for j in range(len(xs))))
        for i, x in enumerate(xs)
    ]
    frame, views, dims = layout.align([Value(x.node, own) for x, own in zip(xs, apart, strict=True)])
    own = [next((atom.axis for atom in dim), None) for dim in dims[rank:]]
    others = [k for k in range(len(frame)) if k not in own]
    parts = [np.zeros(n, int) if k is None else frame[k].label_array for k, n in zip(own, sizes, strict=True)]
    offsets = itertools.accumulate((int(part.max()) + 1 for part in parts), initial=0)
    labels = np.concatenate([part + offset for part, offset in zip(parts, offsets, strict=False)])
    whole = labelled(labels) if len(set(labels)) <= 2 * MOST_CLASSES else Axis(sum(sizes))
    place = {k: i + 1 for i, k in enumerate(others)} | {k: 0 for k in own if k is not None}
    binds = [View(child, tuple(place[b] for b in bind)) for child, bind in views]
    node = graph.make(Concat, (whole, *(frame[k] for k in others)), binds, (0, tuple(sizes)))
    out = layout.renumbered(dims[:rank], place)
    return Value(node, (*out[:d], (Atom(sum(sizes), 0),), *out[d + 1 :]))


def concatenated(interpreter: Context, xs: Sequence[Value], d: int) -> Value:
    """One after another along dimension d; empty parts left out. Very many, unless they are known or inputs, are drawn."""
    live = [x for x in xs if x.shape[d] > 0]
    made = [x for x in live if not isinstance(x.node, Array | Constant | Leaf)]
    if len(made) > _MANY_PARTS and interpreter.ask("many arrays are joined"):
        shape = [sum(x.shape[d] for x in live) if k == d else n for k, n in enumerate(live[0].shape)]
        return layout.full(interpreter.graph, 0.0, shape)
    return live[0] if len(live) == 1 else concatenate(interpreter.graph, live, d)


@rule("concatenate", "stack")
def concatenate_rule(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    """One after another along a dimension, which of a stack is a new one."""
    (d,) = eqn.params.values()
    if eqn.primitive.name == "stack":
        xs = tuple(layout.reshape(x, (*x.shape[:d], 1, *x.shape[d:])) for x in xs)
    return concatenated(interpreter, xs, d)


@rule("unstack")
def unstack(interpreter: Context, eqn: Any, x: Value) -> list[Value]:
    d = eqn.params["axis"]
    return [layout.reshape(take(x, d, i, i + 1), v.aval.shape) for i, v in enumerate(eqn.outvars)]


@rule("tile", entrywise=True)
def tile(interpreter: Context, eqn: Any, x: Value) -> Value:
    """Copies one after another: a leading factor of the dimension along which nothing changes."""
    copies = zip(eqn.params["reps"], x.dims, strict=True)
    return Value(x.node, tuple((Atom(n, None), *dim) if n > 1 else dim for n, dim in copies))


@rule("pad")
def pad(interpreter: Context, eqn: Any, x: Value, fill: Value) -> Any:
    """A concatenation with the fill; negative padding cuts. Entries spread apart (by an associative scan) are drawn."""
    config = eqn.params["padding_config"]
    if any(inner and n > 1 for n, (_, _, inner) in zip(x.shape, config, strict=True)):
        return drawn_region(interpreter, eqn, (x, fill), "entries are spread apart, as in a recurrence")
    for d, (low, high, _) in enumerate(config):
        x = take(x, d, max(-low, 0), x.shape[d] - max(-high, 0))
        before, after = (
            layout.broadcast_in_dim(fill, [max(n, 0) if k == d else m for k, m in enumerate(x.shape)], ())
            for n in (low, high)
        )
        x = concatenated(interpreter, (before, x, after), d)
    return x
