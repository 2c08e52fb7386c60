"""Lookups: a row of a table for each index; two equal indices give the same row, so what counts is how often they repeat.

Whole numbers of which only the shape is given are ids and lengths. Ids are uniform, so a row of `ids == arange(n)` is a row of
the identity matrix, looked up by id. Masks are all true: an id is a valid one and no padding (`ids != 0`, `ids < n`), a length
is the whole (`arange(n) < lengths`). What else is done with such numbers takes them for standard normals, in doubt.

Given token ids may be padded to one length. Whether a place is padding depends on its row and position together: rows of a
length are a class, and so are positions between two lengths. Of many lengths the closest are merged, with a doubt.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axes, grouped, outer, over_classes, replaced, rest
from varscale.theory.domain.axis_maps import taken_map
from varscale.theory.domain.tables import LEADING_ORDER, Table, lift, per_pair, table_over
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.linear_nodes import INDICES, Concat, Gather, GatherParams, mapped
from varscale.theory.graph.nodes import UNKNOWN, Array, Graph, Leaf, Node, View, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact, Flows
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.sampler import in_order
from varscale.theory.rules.axis import take
from varscale.theory.rules.registry import Context, rule

MOST_LENGTHS = 3  # that rows are told apart by, and so positions into one class more
_CHANCE = 4.0  # standard deviations by which runs of one value have to be longer than chance has them
_ALIKE = 1.0  # positions of a row by which two padding masks may differ that are taken for one
PADDED: Fact[None, frozenset[tuple[int, ...]]] = Fact()  # shapes of the model's padded inputs
_CLASSED: Fact[None, list[Any]] = Fact()  # padding masks of ids, and the axes with classes for each


@second_moments.register
def second_moments_of_gather(node: Gather) -> Table:
    (row_axes, places, _, rows, _), (source, bind) = node.params, node.args[0]
    table, axes = source.table, source.axes
    ids, sizes = node.known, [axis.size for axis in node.indexed]
    field = None if ids is None else _padding_of(node.graph, ids.reshape(sizes))
    if field is not None and len(np.unique(field.sum(axis=1))) > MOST_LENGTHS + 1:  # than are told apart
        node.graph.flag("assumed", LEADING_ORDER)
    mean = over_classes(table.mean, axes, row_axes)
    same = contract_axes(table.second, {k: axes[k].same for k in row_axes})
    # Of two of the rows, which may agree along some axes but not along all.
    other = rows * contract_axes(table.second, {k: axes[k].any_pair for k in row_axes}) - same
    kept = rest(axes, row_axes)
    own, at = [axes[k] for k in kept], [bind[k] for k in kept]
    rate = lift(node.rates(), node.indexed, places, node.axes, pairs=True)
    same, other = (lift(x, own, at, node.axes, pairs=True) for x in (same, other / max(rows - 1, 1)))
    mean = lift(mean, own, at, node.axes, pairs=False)
    return table_over(node.axes, mean, rate * same + (1 - rate) * other)


@pullback.register
def pullback_of_gather(node: Gather, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Cotangents add up in the rows they came from: a row gets as many pairs of them as there are indices that agree."""
    row_axes, index_axes, _, rows, _ = node.params
    (source, bind), rate = node.args[0], node.rates()
    pairs = outer(a.pairs for a in node.indexed)
    parts = pairs * rate / rows, pairs * (1 - rate) / max(rows * (rows - 1), 1)
    same, other = (np.tensordot(part, cotangent, axes=len(index_axes)) for part in parts)
    picked = sorted(row_axes)  # come first, then the others in the order of this node's axes
    kept = sorted(rest(bind, picked), key=bind.__getitem__)
    own = outer(source.axes[k].agrees for k in picked)
    out = np.multiply.outer(own, same) + np.multiply.outer(1 - own, other)
    return [out.transpose(np.argsort([*picked, *kept]))]


def _slice_at(x: Value, starts: Mapping[int, Any], sizes: Sequence[int]) -> Value:
    """x from some place on along each dimension, 0 where none is given, moved so that all of these sizes is within x."""
    for d, size in enumerate(sizes):
        start = int(np.clip(starts.get(d, 0), 0, x.shape[d] - size))
        x = take(x, d, start, start + size)
    return x


@rule("dynamic_slice")
def dynamic_slice(interpreter: Context, eqn: Any, x: Value, *starts: Value) -> Value:
    """From known starts on a slice; from random ones on it is drawn."""
    sizes = eqn.params["slice_sizes"]
    known = {d: interpreter.concrete(at) for d, at in enumerate(starts) if sizes[d] < x.shape[d]}
    if any(at is None for at in known.values()):
        raise NotImplementedError("a slice from a random place on")
    return _slice_at(x, known, sizes)


@rule("gather")
def gather(interpreter: Context, eqn: Any, x: Value, ids: Value) -> Value:
    """One known index is a slice, rows by index are a lookup; what is picked otherwise is sampled."""
    d, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.outvars[0].aval.shape
    if x.constant is not None:
        return layout.full(interpreter.graph, x.constant, shape)
    known, picked = interpreter.concrete(ids), d.start_index_map
    if known is not None and known.size == known.shape[-1]:
        starts = dict(zip(picked, known.ravel(), strict=True))
        return layout.reshape(_slice_at(x, starts, sizes), shape)
    if in_order(x.node):
        raise NotImplementedError("steps of a loop are picked, which differ")
    cut = {k for k, (size, n) in enumerate(zip(sizes, x.shape, strict=True)) if size < n}
    if not cut <= set(picked) == set(d.collapsed_slice_dims) or d.operand_batching_dims:
        raise NotImplementedError("entries are looked up one by one")
    return rows_by_index(interpreter, x, ids, picked, d.offset_dims)


def rows_by_index(
    interpreter: Context, x: Value, ids: Value, picked: Sequence[int], offsets: Sequence[int]
) -> Value:
    """Rows of a table x along dimensions `picked`, by the indices' last; its others are at `offsets` of the result's shape."""
    graph, known, count = interpreter.graph, interpreter.concrete(ids), len(picked)
    x = layout.transpose(x, [*picked, *rest(x.dims, picked)])
    x, sizes, rows = layout.separated(x), ids.shape[:-1], x.shape[:count]
    order = np.argsort([*rest(range(len(sizes) + len(offsets)), offsets), *offsets]).tolist()
    cut = x.dims[:count], x.dims[count:]
    row_axes, kept = map(layout.axes_along, cut)
    if known is None:
        own = layout.axes_along(ids.dims[:-1])
        axes, rates, which = [Axis(ids.node.axes[k].size) for k in own], None, ids.node
        lines = layout.renumbered(ids.dims[:-1], {k: i for i, k in enumerate(own)})
        while len(inner := roots(which)) == 1 and inner[0].node is not which:
            which = inner[0].node  # behind the wrap-around of negative ones
    else:
        line = np.ravel_multi_index(tuple(known.reshape(-1, count).astype(int).T), rows, mode="clip")
        table, places = line.reshape([n for n in sizes if n > 1]), itertools.count()
        lines = [(Atom(n, next(places)),) if n > 1 else () for n in sizes]
        if table.ndim == count == len(row_axes) == 1 and (axis := x.node.axes[row_axes[0]]).classes > 1:
            found = taken_map(line, axis)
            dims = (*layout.renumbered(lines, {0: row_axes[0]}), *x.dims[1:])
            return layout.transpose(Value(mapped(x.node, row_axes[0], found), dims), order)
        axes, which = classed_axes(graph, table), hashlib.sha1(line.tobytes()).hexdigest()
        rates = tuple(np.round(repeat_rates(table, axes), 12).ravel())
        INDICES.put(graph, which, line)
    place = {k: len(axes) + i for i, k in enumerate(kept)}
    view = View(x.node, tuple(place.get(k, -1) for k in range(len(x.node.axes))))
    params = GatherParams(tuple(row_axes), tuple(range(len(axes))), rates, math.prod(rows), which)
    node = graph.make(Gather, [*axes, *(x.node.axes[k] for k in kept)], [view], params)
    return layout.transpose(Value(node, (*lines, *layout.renumbered(x.dims[count:], place))), order)


_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def unknown(interpreter: Context, name: str, shape: Sequence[int]) -> Value:
    """Whole numbers described by their shape."""
    x = interpreter.leaf(("ids", name), shape, 0.0, 1.0, odd=False)
    x.node.mark("assumed", UNKNOWN)
    return x


def compared(interpreter: Context, name: str, shape: Sequence[int], x: Value, y: Value) -> Value | None:
    """A comparison of unknown whole numbers with known numbers; None where it is none."""
    if name not in _TURNED:
        return None
    if _is_unknown(y.node):
        name, x, y = _TURNED[name], y, x
    known = interpreter.concrete(y) if _is_unknown(x.node) else None
    if known is None:
        return None
    none, every = (layout.full(interpreter.graph, number, shape) for number in (0.0, 1.0))
    if name in ("eq", "ne"):
        found = _one_hot(interpreter, shape, x, y) or none
        return found if name == "eq" else interpreter.elementwise("sub", every, found)
    # Below a bound, but not below the positions that it is the number of, nor below zero.
    return every if name in ("gt", "ge") or (known.size == 1 and known.item() > 0) else none


def _is_unknown(node: Node) -> bool:
    """Whether it is whole numbers of which only the shape is given, moved, shifted or beside others."""
    if isinstance(node, Leaf):
        return node.kind == "ids"
    if isinstance(node, Concat):
        return any(map(_is_unknown, node.sources))
    shifted = node.primitive == "affine" and node.params[1][0] > 0
    return (shifted or node.moves) and _is_unknown(node.argument)


def _one_hot(interpreter: Context, shape: Sequence[int], x: Value, y: Value) -> Value | None:
    """Rows of the identity by id, where the known numbers are all different and along a dimension of their own."""
    along = [d for d, dim in enumerate(y.dims) for atom in dim if atom.axis is not None]
    if len(along) != 1 or not isinstance(y.node, Array) or len(np.unique(y.node.values)) < shape[along[0]]:
        return None
    (d,) = along
    if layout.axes_along([x.dims[d]]):
        return None
    left = replaced(shape, d)
    ids = layout.broadcast_in_dim(Value(x.node, replaced(x.dims, d)), (*left, 1), range(len(left)))
    found = rows_by_index(interpreter, interpreter.known(np.eye(shape[d])), ids, (0,), (d,))
    found.node.drawn = (special.ndtr(Z) >= 1 - 1 / shape[d]).astype(float)  # one or nothing
    return found


def padding_mask(ids: Int[np.ndarray, "rows positions"]) -> Bool[np.ndarray, "rows positions"] | None:
    """The padding mask of token ids: where rows end, or begin, in runs of one value; None where those may be chance.

    Runs of a value that is a share q of the other ids have by chance the mean length q/(1 − q) and the variance q/(1 − q)².
    """
    if len(np.unique(ids)) < 3:  # a mask is no array of ids
        return None
    for step in (-1, 1):
        turned = ids[:, ::step]
        runs = np.logical_and.accumulate(turned == turned[:, :1], axis=1)
        values, ends = np.unique(turned[:, 0], return_inverse=True)
        repeated = runs.sum(axis=1)
        most = int(np.argmax(np.bincount(ends.ravel(), weights=repeated)))
        runs &= (ends.ravel() == most)[:, None]
        others, each_its_own = turned[~runs], 2 * runs.sum() < repeated[repeated > 1].sum()
        if each_its_own or runs.sum(axis=1).max() < 2 or len(np.unique(others)) < 2:
            continue  # positions that stand still, say
        q = max(np.mean(others == values[most]), 1 / len(np.unique(ids)))
        mean, deviation = len(ids) * q / (1 - q), math.sqrt(len(ids) * q) / (1 - q)
        if runs.sum() > mean + _CHANCE * deviation + 1:
            return runs[:, ::step]
    return None


def padded_shapes(given: Sequence[Any]) -> frozenset[tuple[int, ...]]:
    """The shapes (rows, positions) of given arrays of padded ids."""
    arrays = (x for x in given if isinstance(x, np.ndarray | jax.Array) and x.ndim > 1 and x.size > 1)
    ids = [_as_rows(x) for x in arrays if jnp.issubdtype(x.dtype, jnp.integer)]
    return frozenset(rows.shape for rows in ids if padding_mask(rows) is not None)


def _as_rows(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])


def _padding_of(graph: Graph, ids: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "rows positions"] | None:
    """The padding mask of ids that have the shape of a padded input; None of others."""
    return padding_mask(_as_rows(ids)) if ids.ndim and _as_rows(ids).shape in padded(graph) else None


def classed_axes(graph: Graph, ids: Int[np.ndarray, "..."]) -> list[Axis]:
    """Axes of an array of ids, with classes for the padding of padded ones; of others, those known of axes of their sizes."""
    seen = _CLASSED.once(graph, None, list)
    if (field := _padding_of(graph, ids)) is None:
        classed = {axis for _, axes in seen for axis in axes if axis.labels is not None}
        known = [[axis for axis in classed if axis.size == n] for n in ids.shape]
        return [axes[0] if len(axes) == 1 else Axis(n) for axes, n in zip(known, ids.shape, strict=True)]
    marks = field.reshape(ids.shape)
    for other, axes in seen:
        if other.shape == marks.shape and np.mean(other != marks) * ids.shape[-1] <= _ALIKE:
            return list(axes)
    views = [np.moveaxis(marks, k, 0).reshape(n, -1).astype(float) for k, n in enumerate(ids.shape)]
    axes = [grouped(view, MOST_LENGTHS + 1) for view in views]
    seen.append((marks, tuple(axes)))
    return axes


def is_mask(graph: Graph, numbers: Float[np.ndarray, "..."]) -> bool:
    """Whether a given array is of two numbers, one of them perhaps for the paddings of another: it is known as it is."""
    return bool(numbers.ndim) and _as_rows(numbers).shape in padded(graph) and len(np.unique(numbers)) == 2


def padded(graph: Graph) -> frozenset[tuple[int, ...]]:
    """The shapes of the model's padded inputs."""
    return PADDED.get(graph, None) or frozenset()


def repeat_rates(ids: Int[np.ndarray, "..."], axes: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """P(ids_i = ids_j) by type of pair, of ids ≥ 0: Σ n_c n_c' over values and what axes agree on, n_c of them in class c."""
    rank, places, cells = ids.ndim, np.indices(ids.shape).reshape(ids.ndim, -1), [a.classes for a in axes]
    labels = tuple(axis.label_array[at] for axis, at in zip(axes, places, strict=True))
    out, classes = np.zeros([axis.types for axis in axes]), np.ravel_multi_index(labels, cells)
    for agree in itertools.product((True, False), repeat=rank):
        fixed = [k for k, same in enumerate(agree) if same]
        sizes = int(ids.max()) + 1, *(ids.shape[k] for k in fixed)
        lines = np.unique(np.ravel_multi_index((ids.ravel(), *places[fixed]), sizes), return_inverse=True)[1]
        table = np.zeros((lines.max() + 1, math.prod(cells)))
        np.add.at(table, (lines.ravel(), classes), 1.0)
        theirs = [k if same else rank + k for k, same in enumerate(agree)]
        kept = [p for k in range(rank) for p in dict.fromkeys((k, theirs[k]))]
        block = tuple(slice(c) if same else slice(c, None) for c, same in zip(cells, agree, strict=True))
        pairs: Any = (table.T @ table).reshape(cells * 2)
        out[block] = np.einsum(pairs, [*range(rank), *theirs], kept).reshape(out[block].shape)
    return per_pair(out, axes)
