"""Entries that keep their values and change places: slices, joins, reversals, broadcasts, reshapes; and cumulative sums."""

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axes, Axis, apply_axis, grouped, labelled, replaced
from varscale.theory.domain.axis_maps import AxisMap, entry_map, identity_map, pair_counts, slice_map
from varscale.theory.domain.tables import LEADING_ORDER, Table, full_types
from varscale.theory.graph import layout
from varscale.theory.graph.layout import Atom, Value, materialize, merged, permute
from varscale.theory.graph.linear_nodes import Concat, Permute, Take, carried_back, mapped
from varscale.theory.graph.nodes import (
    Array,
    Constant,
    Leaf,
    Node,
    View,
    array,
    cross_by_kind,
    pullback,
    second_moments,
)
from varscale.theory.graph.normal_form import broadcast, cut_inside
from varscale.theory.graph.store import BackwardNotes, Fact, Flows
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.registry import Context, rule

_MANY_PARTS = 24  # parts above which they are drawn with what they are joined for, where that can be
# By leaf: along which axis it is sliced; it and what scales it entrywise, if weights only read in slices.
_SLICED: Fact[int, tuple[int, list[Node] | None]] = Fact()

MOVES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "tile")


@rule(*MOVES, entrywise=True)
def moved(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    """Entries of one array at other places."""
    p = eqn.params
    match eqn.primitive.name:
        case "broadcast_in_dim":
            return layout.broadcast_in_dim(x, p["shape"], p["broadcast_dimensions"])
        case "transpose":
            return layout.transpose(x, p["permutation"])
        case "rev":  # each position meets another one of the array it was made from
            return reduce(lambda x, d: take(x, d, x.shape[d] - 1, None, -1), p["dimensions"], x)
        case "slice":
            ends, steps = (p["start_indices"], p["limit_indices"]), p["strides"] or itertools.repeat(1)
            spans = zip(itertools.count(), *ends, steps, strict=False)
            return reduce(lambda x, span: take(x, *span), spans, x)
        case "tile":  # a leading factor of the dimension along which nothing changes
            copies = zip(p["reps"], x.dims, strict=True)
            return Value(x.node, tuple((Atom(n, None), *dim) if n > 1 else dim for n, dim in copies))
    return layout.reshape(x, eqn.outvars[0].aval.shape)


def take(x: Value, d: int, start: int, stop: int | None, step: int = 1) -> Value:
    """x[start:stop:step] along dimension d."""
    (n, *after), before = x.shape[d:], x.shape[:d]
    size = len(range(n)[start:stop:step])
    if size == n and (step == 1 or n == 1):
        return x
    if not size:
        return layout.full(x.node.graph, 0.0, (*before, 0, *after))
    if step > 1 and n % step == 0 and start < step and size == n // step:
        cut = layout.reshape(x, (*before, n // step, step, *after))  # one index of a factor of the axis
        return layout.reshape(take(cut, d + 1, start, start + 1), (*before, size, *after))
    x = layout.merged(x, d)
    k, node = x.dims[d][0].axis, x.node
    place = {j: j - (size == 1 and k is not None and j > k) for j in range(len(node.axes))}
    if k is not None:
        node = take_node(node, k, start, stop, step)
    dims = list(layout.renumbered(x.dims, {} if isinstance(node, Constant) else place))
    dims[d] = tuple(Atom(size, atom.axis) for atom in dims[d] if size > 1)
    return Value(node, tuple(dims))


def take_view(view: View, place: int, start: int, stop: int) -> View:
    """A slice along one place of a view's frame; an axis of one position is gone, though its place in the frame is not."""
    node, bind = view
    if place not in bind:
        return view
    j = bind.index(place)
    part = take_node(node, j, start, stop)
    gone = len(part.axes) < len(bind)
    return View(part, () if isinstance(part, Constant) else (*bind[:j], *bind[j + gone :]))


def take_node(node: Node, k: int, start: int, stop: int | None, step: int = 1) -> Node:
    """A slice of axis k, pushed through elementwise nodes to their roots."""
    graph, old, span = node.graph, node.axes[k], (start, stop, step)
    if span == (0, old.size, 1):
        return node
    new = slice_map(span, old).out
    alone = new.size == 1
    axes = replaced(node.axes, k, *([] if alone else [new]))
    if isinstance(node, Array):
        numbers = node.values[(slice(None),) * k + (slice(*span),)]
        return array(graph, numbers.squeeze(k) if alone else numbers, axes)
    inside = cut_inside(node, k, axes, lambda x, j: take_node(x, j, *span))
    if inside is not None or (inside := _taken_inside(node, k, span)) is not None:
        return graph.derive(node, inside, lambda g: carried_back(g, k, slice_map(span, old)))
    # Of a matrix rows may be read alone and together (positions): only stacked matrices are taken apart.
    if alone and len(node.axes) > 2 and (part := slice_of_weights(node, k, start)) is not None:
        return part
    if isinstance(node, Concat) and node.params[0] == k and step == 1 and stop is not None:
        return _part_of_concat(node, k, start, stop)
    return graph.make(Take, axes, [node.whole], (k, *span))


def slice_of_weights(node: Node, k: int, position: int) -> Leaf | None:
    """One position of an axis of independent weights: weights of their own, on which the whole depends; None of other nodes."""
    if not isinstance(node, Leaf) or node.kind == "orthonormal":
        return None
    graph = node.graph
    along, whole = _SLICED.once(graph, node.id, lambda: (k, _only_sliced(node, k)))
    if along != k or whole is None:
        return None
    axes = replaced(node.axes, k)
    part = graph.make(Leaf, axes, (), ("step", node, position))
    table = Table(axes, node.table.mean.take(0, k), node.table.second.take(0, k))
    part.settle(table, odd=True, kurtosis=node.kurtosis, transport=node.transport)
    for other in whole:
        other.deps, other.odd = other.deps | part.deps, 0
    return part


def _only_sliced(node: Leaf, k: int) -> list[Node] | None:
    """Independent weights and what multiplies them entry by entry, where nothing else was made of them so far; else None."""
    if not node.odd or node.is_input or node.axes[k].classes > 1:
        return None
    whole: list[Node] = [node]
    for other in node.graph.nodes.values():  # what uses a node comes after it
        if any(view.node in whole for view in other.args):
            if not other.entrywise:
                return None
            whole.append(other)
    return whole


def _taken_inside(node: Node, k: int, span: tuple[int, int | None, int]) -> Node | None:
    """The slice of what axes in another order, or a slice, are made from; None of other nodes."""
    source = node.argument if node.args else node
    if isinstance(node, Permute):
        at = node.params[k]
        part = take_node(source, at, *span)
        gone = len(part.axes) < len(source.axes)
        order = [j - (gone and j > at) for j in node.params if not gone or j != at]
        return permute(part, order) if part.axes else part
    if isinstance(node, Take) and node.params[0] == k and len(node.axes) == len(source.axes):
        left = range(source.axes[k].size)[slice(*node.params[1:])][slice(*span)]
        return take_node(source, k, left.start, left.stop if left.stop >= 0 else None, left.step)
    return None


@rule("split", "unstack", entrywise=True)
def split_rule(interpreter: Context, eqn: Any, x: Value) -> list[Value]:
    d = eqn.params["axis"]
    edges = itertools.accumulate(eqn.params.get("sizes", (1,) * x.shape[d]), initial=0)
    spans = zip(itertools.pairwise(edges), eqn.outvars, strict=True)
    return [layout.reshape(take(x, d, *span), v.aval.shape) for span, v in spans]


@rule("iota", entrywise=True)
def iota(interpreter: Context, eqn: Any, *_: Value) -> Value:
    shape, d = eqn.params["shape"], eqn.params["dimension"]
    return layout.broadcast_in_dim(interpreter.known(np.arange(shape[d])), shape, (d,))


def lower_triangle(axis: Axis, *, reverse: bool = False) -> AxisMap:
    """y_p = Σ_{i ≤ p} x_i, or i ≥ p in reverse; outputs are classed by how many terms they have."""
    rows, columns = np.tril_indices(axis.size)[:: -1 if reverse else 1]
    terms = np.bincount(rows, minlength=axis.size).astype(float)
    return entry_map(rows, columns, grouped(terms[:, None]), axis)


@rule("cumsum")
def cumsum(interpreter: Context, eqn: Any, x: Value) -> Value:
    d = eqn.params["axis"]
    x = merged(materialize(x, d), d)
    k, table = x.dims[d][0].axis if x.dims[d] else None, x.node.table
    if k is None:
        return x  # one position
    drifts = x.node.axes[k].size > MOST_CLASSES and table.total_mean**2 > LEADING_ORDER * table.mean_square
    if drifts:
        interpreter.ask("running sums that drift over more places than are told apart")
    return Value(mapped(x.node, k, lower_triangle(x.node.axes[k], reverse=eqn.params["reverse"])), x.dims)


Joined = tuple[View, AxisMap]  # one of several joined arrays, and the map of its axis to the whole one


def _parts(xs: Sequence[View], sizes: Sequence[int], axes: Axes, k: int) -> list[Joined]:
    """Arrays over a frame, one after another along axis k."""
    parts = zip(xs, sizes, itertools.accumulate(sizes, initial=0), strict=False)
    found = ((x, x.node.axes[x.bind.index(k)] if k in x.bind else Axis(n), at) for x, n, at in parts)
    return [(x, identity_map(axes[k], own, at)) for x, own, at in found]


def _part_of_concat(node: Concat, k: int, start: int, stop: int) -> Node:
    """Positions start, ..., stop − 1 of axis k, along which parts are joined: what is left of each, joined."""
    sizes = node.params[1]
    parts = zip(node.args, itertools.accumulate(sizes, initial=0), sizes, strict=False)
    spans = [(view, max(start - at, 0), min(stop - at, n)) for view, at, n in parts]
    cut = [(take_view(view, k, first, last), last - first) for view, first, last in spans if first < last]
    whole = Axis(stop - start) if len(cut) == 1 else labelled(node.axes[k].label_array[start:stop])
    axes = replaced(node.axes, k, whole)
    if len(cut) > 1:
        return node.graph.make(Concat, axes, [view for view, _ in cut], (k, tuple(n for _, n in cut)))
    child, bind = cut[0][0]
    missing = [j for j, axis in enumerate(axes) if j not in bind and axis.size > 1]
    if missing and not isinstance(child, Constant):  # along those axes it is constant
        child, bind = broadcast(child, (*child.axes, *(axes[j] for j in missing))), (*bind, *missing)
    return permute(child, np.argsort(bind).tolist())


@second_moments.register
def second_moments_of_concat(node: Concat) -> Table:
    (k, sizes), axes = node.params, node.axes
    mean, parts = np.zeros([a.classes for a in axes]), _parts(node.args, sizes, axes, k)
    for view, where in parts:
        own = replaced(axes, k, where.inner)
        mean += apply_axis(np.broadcast_to(view.mean(own), [a.classes for a in own]), k, where.means())
    return Table(axes, mean, _joined_pairs(parts, parts, axes, k))


def _joined_pairs(ours: list[Joined], others: list[Joined], axes: Axes, k: int) -> np.ndarray:
    """E[x_i y_j] by type, for x and y joined of parts along axis k: every part with every part."""
    second, (classes, pairs) = np.zeros([a.types for a in axes]), (axes[k].classes, axes[k].pairs)
    for (a, mine), (b, theirs) in itertools.product(ours, others):
        if mine.inner == theirs.inner:
            own = replaced(axes, k, mine.inner)
            second += apply_axis(full_types(cross(a, b, own), own), k, pair_counts(mine, theirs))
            continue
        # Positions of unlike axes never agree: a last axis for each, of which pairs of classes count.
        last = len(axes) - 1
        frame = (*replaced(axes, k), mine.inner, theirs.inner)
        place = {p: p - (p > k) for p in range(last + 1)}
        x, y = (v.within(place | {k: last + i}) for i, v in enumerate((a, b)))
        # Each axis is one array's alone, and what counts along it is that array's class.
        table = full_types(cross(x, y, frame), frame)[..., : mine.inner.classes, : theirs.inner.classes]
        members = (where.means() * where.out.counts[:, None] for where in (mine, theirs))
        matrix = np.kron(*members) / np.maximum(pairs[classes:, None], 1.0)
        table = np.moveaxis(table.reshape(*table.shape[:last], -1), -1, k)
        second[(slice(None),) * k + (slice(classes, None),)] += apply_axis(table, k, matrix)
    return second


@cross_by_kind.register
def cross_by_kind_of_concat(node: Concat, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """Against anything that runs over the same axis: cut that where the parts meet."""
    (k, sizes), starts = node.params, itertools.accumulate(node.params[1], initial=0)
    place, mine = a.bind[k], [v.within(a.bind) for v in node.args]
    cut = [take_view(b, place, at, at + n) for at, n in zip(starts, sizes, strict=False)]
    ours, theirs = (_parts(views, sizes, frame, place) for views in (mine, cut))
    return _joined_pairs(ours, theirs, frame, place)


@pullback.register
def pullback_of_concat(node: Concat, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Of each part the slice of the cotangent."""
    (k, sizes), axes = node.params, node.axes
    parts = _parts(node.args, sizes, axes, k)
    return [sum_out(carried_back(cotangent, k, at), replaced(axes, k, at.inner), v) for v, at in parts]


def concatenate(graph: Any, xs: Sequence[Value], d: int) -> Value:
    """Values one after another along dimension d."""
    xs = [layout.merged(x, d) for x in xs]
    sizes, rank = [x.shape[d] for x in xs], len(xs[0].dims)
    # The other dimensions must be factored alike: align them, each one's own being a further dimension.
    empty = [()] * len(xs)
    apart = [
        Value(x.node, (*replaced(x.dims, d, ()), *replaced(empty, i, x.dims[d]))) for i, x in enumerate(xs)
    ]
    frame, views, dims = layout.align(apart)
    own = [next((atom.axis for atom in dim), None) for dim in dims[rank:]]
    others = [k for k in range(len(frame)) if k not in own]
    parts = [np.zeros(n, int) if k is None else frame[k].label_array for k, n in zip(own, sizes, strict=True)]
    offsets = itertools.accumulate((int(part.max()) + 1 for part in parts), initial=0)
    labels = np.concatenate([part + offset for part, offset in zip(parts, offsets, strict=False)])
    whole = labelled(labels) if len(set(labels)) <= 2 * MOST_CLASSES else Axis(sum(sizes))
    place = {k: i + 1 for i, k in enumerate(others)} | {k: 0 for k in own if k is not None}
    binds = [view.within(place) for view in views]
    node = graph.make(Concat, (whole, *(frame[k] for k in others)), binds, (0, tuple(sizes)))
    out = layout.renumbered(dims[:rank], place)
    return Value(node, replaced(out, d, (Atom(sum(sizes), 0),)))


def concatenated(interpreter: Context, xs: Sequence[Value], d: int) -> Value:
    """One after another along dimension d; empty parts left out. Very many, unless they are known or inputs, are drawn."""
    live = [x for x in xs if x.shape[d] > 0]
    made = [x for x in live if not isinstance(x.node, Array | Constant | Leaf)]
    if len(made) > _MANY_PARTS:
        interpreter.ask("many arrays are joined")
    return live[0] if len(live) == 1 else concatenate(interpreter.graph, live, d)


@rule("concatenate", "stack")
def concatenate_rule(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    """One after another along a dimension, a new one of a stack."""
    (d,) = eqn.params.values()
    if eqn.primitive.name == "stack":
        xs = tuple(layout.reshape(x, (*x.shape[:d], 1, *x.shape[d:])) for x in xs)
    return concatenated(interpreter, xs, d)


@rule("pad")
def pad(interpreter: Context, eqn: Any, x: Value, fill: Value) -> Value:
    """A concatenation with the fill; negative padding cuts. Entries spread apart (by an associative scan) are drawn."""
    config = eqn.params["padding_config"]
    if any(spread and n > 1 for n, (*_, spread) in zip(x.shape, config, strict=True)):
        raise NotImplementedError("entries are spread apart, as in a recurrence")
    for d, (low, high, _) in enumerate(config):
        x = take(x, d, max(-low, 0), x.shape[d] - max(-high, 0))
        before, after = (
            layout.broadcast_in_dim(fill, [max(n, 0) if k == d else m for k, m in enumerate(x.shape)], ())
            for n in (low, high)
        )
        x = concatenated(interpreter, (before, x, after), d)
    return x
