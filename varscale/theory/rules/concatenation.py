"""Joining: arrays one after another along an axis, each part a class of positions; paddings are such arrays too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, labelled, sliced
from varscale.theory.domain.axis_maps import entry_map, pair_counts, slice_map
from varscale.theory.domain.tables import LEADING_ORDER, Table
from varscale.theory.graph import layout
from varscale.theory.graph.convolutions import ONE
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
from varscale.theory.propagation.doubts import lost_excess, lost_excess_of
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, inherited, propagated
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.axis import take, take_view
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region

_MANY_PARTS = 24  # parts up to which every pair is computed; more are drawn where that can be


@part_of.register(Concat)
def part_of_concat(node: Concat, k: int, start: int, stop: int) -> Node | None:
    """Positions start, ..., stop − 1 of axis k, where the parts are joined along it: what is left of each, joined."""
    along, sizes = node.params
    if k != along:
        return None
    spans = [(max(start - at, 0), min(stop - at, n)) for at, n in _starts(sizes)]
    left = [
        (take_view(view, k, *span), span[1] - span[0])
        for view, span in zip(node.args, spans, strict=True)
        if span[0] < span[1]
    ]
    if len(left) > 1:
        whole, _ = sliced(node.axes[k], start, stop, 1)
        assert whole is not None
        axes = (*node.axes[:k], whole, *node.axes[k + 1 :])
        return node.graph.make(Concat, axes, [view for view, _ in left], (k, tuple(n for _, n in left)))
    ((child, bind), n) = left[0]
    missing = [j for j in range(len(node.axes)) if j not in bind and (j != k or n > 1)]
    if missing and not isinstance(child, Constant):  # along those axes it is constant
        along_them = (Axis(n) if j == k else node.axes[j] for j in missing)
        child, bind = broadcast(child, (*child.axes, *along_them)), (*bind, *missing)
    return permute(child, [int(m) for m in np.argsort(bind)])


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each part begins, and its size."""
    return zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)


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
    starts, ours, others = [at for at, _ in _starts(sizes)], node.parts(), other.parts()
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
    place, graph, axes = a.bind[k], node.graph, tuple(frame)
    mine = graph.make(Concat, axes, [v.within(a.bind) for v in node.args], (place, sizes))
    pieces = [take_view(b, place, at, at + n) for at, n in _starts(sizes)]
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
    """Of each part the slice of the cotangent."""
    out: list[np.ndarray | None] = []
    k, sizes = node.params
    for (view, frame, _), (at, n) in zip(node.parts(), _starts(sizes), strict=True):
        if isinstance(view.node, Constant):
            out.append(None)
            continue
        gone, axis = n == 1, ONE if n == 1 else frame[k]
        part = apply_axis(cotangent, k, pair_counts(slice_map((at, at + n, 1), axis, node.axes[k])))
        rest = View(view.node, tuple(b - (gone and b > k) for b in view.bind))
        out.append(sum_out(part.take(0, k) if gone else part, (*frame[:k], *frame[k + gone :]), rest))
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
    sizes, rank = [x.shape[d] for x in xs], len(xs[0].dims)
    # The other dimensions must be factored alike: align them, each one's own being a further dimension.
    apart = [
        Value(
            x.node,
            (*x.dims[:d], (), *x.dims[d + 1 :], *(x.dims[d] if i == j else () for j in range(len(xs)))),
        )
        for i, x in enumerate(xs)
    ]
    frame, views, dims = layout.align(apart)
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
    return [layout.transpose(take(x, d, i, i + 1), kept) for i in range(x.shape[d])]


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
        x = take(x, d, max(-low, 0), x.shape[d] - max(-high, 0))
        before, after = (
            layout.broadcast_in_dim(fill, [max(n, 0) if k == d else m for k, m in enumerate(x.shape)], ())
            for n in (low, high)
        )
        x = concatenated(interpreter, (before, x, after), d)
    return x


def _part_pair_shares(a: np.ndarray, b: np.ndarray, whole: Axis) -> np.ndarray:
    """Share of the pairs of each two classes of the whole that two parts' classes make up, (C², ca·cb)."""
    pairs = np.einsum("ac,bd->abcd", a * whole.counts[:, None], b * whole.counts[:, None])
    total = whole.pairs[whole.classes :].reshape(whole.classes, whole.classes, 1, 1)
    return (pairs / np.maximum(total, 1.0)).reshape(whole.classes**2, -1)
