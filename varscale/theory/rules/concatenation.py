"""Joining: arrays one after another along an axis, each part a class of positions; paddings are such arrays too."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, labelled, sliced
from varscale.theory.domain.axis_maps import entry_map, pair_counts, pair_map
from varscale.theory.domain.tables import LEADING_ORDER, Table
from varscale.theory.graph import layout
from varscale.theory.graph.layout import Atom, Value
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
from varscale.theory.graph.reshapes import permute
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.doubts import lost_excess, lost_excess_of
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, inherited, propagated
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.axis import take, take_node
from varscale.theory.rules.registry import Context, elementwise_or_layout, rule
from varscale.theory.rules.sampled_regions import drawn_region

_MANY_PARTS = 24  # parts up to which every pair is computed; more are drawn where that can be


@part_of.register(Concat)
def part_of_concat(node: Concat, k: int, start: int, stop: int) -> Node | None:
    """The positions start, ..., stop − 1 of axis k, where that is what the parts are joined along."""
    along, sizes = node.params
    edges = np.cumsum([0, *sizes])
    i = int(np.searchsorted(edges, start, side="right")) - 1
    if k != along:
        return None
    if stop > edges[i + 1]:
        return _across(node, start, stop)
    child, bind = node.args[i]
    if isinstance(child, Constant):
        return child
    whole = k not in bind or stop - start == sizes[i]
    missing = [j for j in range(len(node.axes)) if j not in bind and (j != k or stop - start > 1)]
    if missing:  # along those axes it is constant
        along_them = (Axis(stop - start) if j == k else node.axes[j] for j in missing)
        child, bind = broadcast(child, (*child.axes, *along_them)), (*bind, *missing)
    own = permute(child, [int(m) for m in np.argsort(bind)])
    return own if whole else take_node(own, k, start - int(edges[i]), stop - int(edges[i]), 1)


def _across(node: Concat, start: int, stop: int) -> Node:
    """Positions that several parts hold: what is left of each, joined."""
    k, sizes = node.params
    left, views, at = [], [], 0
    for (child, bind), n in zip(node.args, sizes, strict=True):
        low, high = max(start - at, 0), min(stop - at, n)
        at += n
        if low >= high:
            continue
        if k in bind and high - low < n:
            j = bind.index(k)
            child = take_node(child, j, low, high, 1)
            bind = (
                () if isinstance(child, Constant) else bind if high - low > 1 else (*bind[:j], *bind[j + 1 :])
            )
        left.append(high - low)
        views.append(View(child, bind))
    whole, _ = sliced(node.axes[k], start, stop, 1)
    assert whole is not None
    return node.graph.make(Concat, (*node.axes[:k], whole, *node.axes[k + 1 :]), views, (k, tuple(left)))


@second_moments.register(Concat)
def second_moments_of_concat(node: Concat) -> Table:
    k, _ = node.params
    mean = np.zeros([a.classes for a in node.axes])
    for view, frame, shares in node.parts():
        mean += apply_axis(np.broadcast_to(view.mean(frame), [a.classes for a in frame]), k, shares)
    return Table(node.axes, mean, _pairs_with(node, node))


def _pairs_with(node: Concat, other: Concat) -> np.ndarray:
    """E[x_i y_j] by type, for y made of parts of the same sizes: every part with every part."""
    k, sizes = node.params
    whole = node.axes[k]
    second = np.zeros([a.types for a in node.axes])
    starts, ours, others = np.cumsum([0, *sizes]), node.parts(), other.parts()
    if many := len(sizes) > _MANY_PARTS:
        node.graph.flag("assumed", LEADING_ORDER)
    for i, (view, mine, shares) in enumerate(ours):
        for j, (that, theirs, other_shares) in enumerate(others):
            if mine[k] == theirs[k]:
                first, last = _stand_in(i, j) if many and i != j else (i, j)
                table = cross(ours[first][0], others[last][0], mine)
                table = np.broadcast_to(table, [a.types for a in mine])
                second += apply_axis(table, k, _part_pairs(whole, mine[k], sizes[i], starts[i], starts[j]))
            else:
                table = _unlike_parts(node, view, that, mine[k], theirs[k])
                matrix = _part_pair_shares(shares, other_shares, whole)
                second[(slice(None),) * k + (slice(whole.classes, None),)] += apply_axis(table, k, matrix)
    return second


def _stand_in(i: int, j: int) -> tuple[int, int]:
    """Of many parts (the steps of a recurrence), those a power of two apart stand for those up to the next one."""
    lag = 1 << (abs(i - j).bit_length() - 1)
    return (i, i - lag) if i > j else (j - lag, j)


@functools.cache
def _part_pairs(whole: Axis, part: Axis, size: int, first: int, second: int) -> np.ndarray:
    """Pairs behind those of a joined axis of which one is in a part that begins here and one in a part that begins there."""
    inside = np.arange(size)
    return pair_counts(*(entry_map(start + inside, inside, whole, part) for start in (first, second)))


@cross_by_kind.register(Concat)
def cross_by_kind_of_concat(node: Concat, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Against anything that runs over the same axis: cut that where the parts meet."""
    k, sizes = node.params
    place = a.bind[k]
    pieces, start = [], 0
    for n in sizes:
        child, bind = b
        if place in bind:
            j = bind.index(place)
            child = take_node(child, j, start, start + n, 1)
            gone = isinstance(child, Constant) or len(child.axes) < len(bind)
            bind = () if isinstance(child, Constant) else (*bind[:j], *bind[j + gone :])
        pieces.append(View(child, bind))
        start += n
    graph, axes = node.graph, tuple(frame)
    mine = graph.make(Concat, axes, [v.within(a.bind) for v in node.args], (place, sizes))
    return _pairs_with(mine, graph.make(Concat, axes, pieces, (place, sizes)))


def _unlike_parts(node: Concat, a: View, b: View, mine: Axis, theirs: Axis) -> np.ndarray:
    """E[a_i b_j] of parts of unlike axes, by type of the other axes and pair of classes along this one.

    Their positions never agree: the product of class means on this axis, types elsewhere.
    """
    k = node.params[0]
    frame = (*node.axes[:k], *node.axes[k + 1 :], mine, theirs)
    last = len(frame) - 2

    def place(view: View, at: int) -> View:
        return View(view.node, tuple(at if b == k else b - (b > k) for b in view.bind))

    table = np.broadcast_to(cross(place(a, last), place(b, last + 1), frame), [ax.types for ax in frame])
    table = np.take(table, mine.classes + mine.classes * np.arange(mine.classes), axis=last)
    table = np.take(table, theirs.classes + np.arange(theirs.classes), axis=last + 1)
    return np.moveaxis(table.reshape(*table.shape[:last], -1), -1, k)


@pullback.register(Concat)
def pullback_of_concat(node: Concat, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:

    out: list[np.ndarray | None] = []
    k, sizes = node.params
    whole = node.axes[k]
    for (view, frame, shares), n in zip(node.parts(), sizes, strict=True):
        if isinstance(view.node, Constant):
            out.append(None)
            continue
        axis = frame[k]
        back = (shares * whole.counts[:, None]).T
        back /= np.maximum(back.sum(axis=1, keepdims=True), 1e-300)
        part = apply_axis(cotangent, k, pair_map(back))
        if n == 1:
            part = np.take(part, [0], axis=k).squeeze(k)
            rest = (*frame[:k], *frame[k + 1 :])
            out.append(sum_out(part, rest, View(view.node, tuple(b - (b > k) for b in view.bind))))
        else:
            out.append(sum_out(part, (*frame[:k], axis, *frame[k + 1 :]), view))
    return out


@propagated.register(Concat)
def propagated_of_concat(node: Concat) -> Spread:
    """Of a mean of the parts' mean squares, each logarithm counts by its part's share: a padding of zeros changes nothing."""
    shares = [n * view.node.table.mean_square for view, n in zip(node.args, node.params[1], strict=True)]
    whole = max(sum(shares), 1e-300)
    return combine(
        [(share / whole, inherited(view.node)) for share, view in zip(shares, node.args, strict=True)]
    )


@lost_excess_of.register(Concat)
def lost_excess_of_concat(node: Concat) -> float:
    return max(lost_excess(view.node) for view in node.args)


def concatenate(graph: Any, xs: Sequence[Value], d: int) -> Value:
    """Values one after another along dimension d."""
    xs = [layout.merged(x, d) for x in xs]
    sizes = [x.shape[d] for x in xs]
    # The other dimensions must be factored alike: align them with this one taken out of the way.
    rest = [Value(x.node, (*x.dims[:d], (), *x.dims[d + 1 :], x.dims[d])) for x in xs]
    pieces: list[Value] = []
    for x in rest:
        pieces.append(Value(x.node, x.dims[:-1] + tuple(x.dims[-1] if y is x else () for y in rest)))
    pieces, frame, views, dims = layout.align(pieces)
    own = [next((atom.axis for atom in dims[len(xs[0].dims) + i]), None) for i in range(len(xs))]
    others = [k for k in range(len(frame)) if k not in own]
    place = {k: i + 1 for i, k in enumerate(others)}
    labels: list[int] = []
    offset = 0
    for k, n in zip(own, sizes, strict=True):
        axis = frame[k] if k is not None else None
        part = axis.label_array if axis is not None else np.zeros(n, int)
        labels += [offset + int(c) for c in part]
        offset += int(max(part)) + 1
    whole = labelled(labels) if len(set(labels)) <= 2 * MOST_CLASSES else Axis(sum(sizes))
    binds = [View(v.node, tuple(0 if b == own[i] else place[b] for b in v.bind)) for i, v in enumerate(views)]
    node = graph.make(Concat, (whole, *(frame[k] for k in others)), binds, (0, tuple(sizes)))
    out = [
        tuple(a if a.axis is None else Atom(a.size, place[a.axis]) for a in dim)
        for dim in dims[: len(xs[0].dims)]
    ]
    out[d] = (Atom(sum(sizes), 0),)
    for j in range(len(out)):  # a dimension along which every part is constant
        if not out[j] and xs[0].shape[j] > 1:
            out[j] = (Atom(xs[0].shape[j], None),)
    return Value(node, tuple(out))


@rule("concatenate")
def concatenate_rule(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    return concatenated(interpreter, xs, eqn.params["dimension"])


def concatenated(interpreter: Context, xs: Sequence[Value], d: int) -> Value:
    """One after another along dimension d; empty parts left out. Very many, unless they are known or inputs, are drawn."""
    live = [x for x in xs if x.shape[d] > 0]
    made = [x for x in live if not isinstance(x.node, Array | Constant | Leaf)]
    if len(made) > _MANY_PARTS and interpreter.ask("many arrays are joined"):
        shape = [sum(x.shape[d] for x in live) if k == d else n for k, n in enumerate(live[0].shape)]
        return layout.full(interpreter.graph, 0.0, shape)
    return live[0] if len(live) == 1 else concatenate(interpreter.graph, live, d)


@rule("stack")
def stack_rule(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    """A concatenation along a new axis."""
    d = eqn.params["axis"]
    shape = (*xs[0].shape[:d], 1, *xs[0].shape[d:])
    return concatenated(interpreter, [layout.reshape(x, shape) for x in xs], d)


@rule("unstack")
def unstack(interpreter: Context, eqn: Any, x: Value) -> list[Value]:
    d = eqn.params["axis"]
    kept = [k for k in range(len(x.dims)) if k != d]
    return [layout.transpose(take(x, d, i, i + 1, 1), kept) for i in range(x.shape[d])]


@rule("tile")
def tile(interpreter: Context, eqn: Any, x: Value) -> Value:
    """Copies one after another: a leading factor of the dimension along which nothing changes."""
    dims = [
        ((Atom(n, None),) if n > 1 else ()) + dim for n, dim in zip(eqn.params["reps"], x.dims, strict=True)
    ]
    return Value(x.node, tuple(dims))


@rule("pad")
def pad(interpreter: Context, eqn: Any, x: Value, fill: Value) -> Any:
    """A concatenation with the fill; negative padding cuts. Entries spread apart (by an associative scan) are drawn."""
    config = eqn.params["padding_config"]
    if any(inner and n > 1 for n, (_, _, inner) in zip(x.shape, config, strict=True)):
        return drawn_region(interpreter, eqn, (x, fill), "entries are spread apart, as in a recurrence")
    for d, (low, high, _) in enumerate(config):
        x = take(x, d, max(-low, 0), x.shape[d] - max(-high, 0), 1)
        before, after = (
            layout.broadcast_in_dim(fill, [max(n, 0) if k == d else m for k, m in enumerate(x.shape)], ())
            for n in (low, high)
        )
        x = concatenated(interpreter, (before, x, after), d)
    return x


elementwise_or_layout("tile")


def _part_pair_shares(a: np.ndarray, b: np.ndarray, whole: Axis) -> np.ndarray:
    """Share of the pairs of each two classes of the whole that two parts' classes make up, (C², ca·cb)."""
    pairs = np.einsum("ac,bd->abcd", a * whole.counts[:, None], b * whole.counts[:, None])
    total = whole.pairs[whole.classes :].reshape(whole.classes, whole.classes, 1, 1)
    return (pairs / np.maximum(total, 1.0)).reshape(whole.classes**2, -1)
