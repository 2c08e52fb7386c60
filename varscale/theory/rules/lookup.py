"""Lookups: a row of a table for each index; two equal indices give the same row, so what counts is how often they repeat.

Whole numbers of which only the shape is given are ids and lengths. Ids are uniform, so a row of `ids == arange(n)` is a row of
the identity matrix, looked up by id. Masks are all true: an id is a valid one and no padding (`ids != 0`, `ids > 0`,
`ids < n`), a length is the whole (`arange(n) < lengths`). What else is done with such numbers takes them for standard normals,
in doubt.

Given ids may fill up rows to one length. Whether a place is padding depends on its row and its position together: rows of one
length are a class, and so are positions between two lengths. Of more lengths than a few, those most alike are one class, and
what that leaves out is in doubt.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axes, grouped, labelled, outer
from varscale.theory.domain.axis_maps import entry_map
from varscale.theory.domain.tables import LEADING_ORDER, Table, lift, per_pair
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.linear_nodes import INDICES, Concat, Gather, GatherParams, mapped
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Array,
    Graph,
    Leaf,
    Node,
    View,
    cross_by_kind,
    pullback,
    second_moments,
)
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.sampler import in_order
from varscale.theory.rules.axis import take
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region

MOST_LENGTHS = 3  # that rows are told apart by, and so positions into one class more
_CHANCE = 4.0  # standard deviations by which rows have to end in one value more often than by chance
_ALIKE = 1.0  # positions of a row by which two arrays may differ that are filled up alike
PADDED: Fact[None, frozenset[tuple[int, ...]]] = Fact()  # shapes of the model's inputs that are filled up
_CLASSED: Fact[None, list[Any]] = Fact()  # where ids are filled up, and axes with classes for it


@second_moments.register(Gather)
def second_moments_of_gather(node: Gather) -> Table:
    (row_axes, places, _, rows, _), (source, bind) = node.params, node.args[0]
    table, axes = source.table, source.axes
    ids = node.known if any(axis.labels for axis in node.indexed) else None
    field = None if ids is None else _paddings(node.graph, ids.reshape([a.size for a in node.indexed]))
    if field is not None and len(np.unique(field.sum(axis=1))) > MOST_LENGTHS + 1:  # than are told apart
        node.graph.flag("assumed", LEADING_ORDER)
    mean = contract_axes(table.mean, {k: axes[k].counts / axes[k].size for k in row_axes})
    same = contract_axes(table.second, {k: axes[k].same for k in row_axes})
    # Of two of the rows, which may agree along some axes but not along all.
    other = rows * contract_axes(table.second, {k: axes[k].any_pair for k in row_axes}) - same
    kept = [k for k in range(len(axes)) if k not in row_axes]
    own, at = [axes[k] for k in kept], [bind[k] for k in kept]
    rate = lift(node.rates(), node.indexed, places, node.axes, pairs=True)
    same, other = (lift(x, own, at, node.axes, pairs=True) for x in (same, other / max(rows - 1, 1)))
    second = np.broadcast_to(rate * same + (1 - rate) * other, node.frame_types)
    mean = np.broadcast_to(lift(mean, own, at, node.axes, pairs=False), [a.classes for a in node.axes])
    return Table(node.axes, np.array(mean), np.array(second))


@cross_by_kind.register(Gather)
def cross_by_kind_of_gather(node: Gather, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Two lookups of tables with the same rows: any index of one meets any of the other; in doubt where both are known."""
    other, x = b.node, node.args[0].node
    if not isinstance(other, Gather) or (node.known is not None and other.known is not None):
        return None
    y, rows = other.args[0].node, node.params.row_axes
    kept = [k for k in range(len(x.axes)) if k not in rows]
    if x.axes != y.axes or rows != other.params.row_axes:
        return None
    places, others = ([v.bind[v.node.args[0].bind[k]] for k in kept] for v in (a, b))
    table = contract_axes(cross(x.whole, y.whole, x.axes), {k: x.axes[k].any_pair for k in rows})
    return lift(table, [x.axes[k] for k in kept], places, frame, pairs=True) if places == others else None


@pullback.register(Gather)
def pullback_of_gather(node: Gather, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """Cotangents add up in the rows they came from: a row gets as many pairs of them as there are indices that agree."""
    row_axes, index_axes, _, rows = node.params[:4]
    source, bind, rate = node.args[0].node.axes, node.args[0].bind, node.rates()
    pairs = outer(a.pairs for a in node.indexed)
    same, other = (
        np.tensordot(w, cotangent, axes=(range(len(index_axes)), index_axes))
        for w in (pairs * rate / rows, pairs * (1 - rate) / max(rows * (rows - 1), 1))
    )
    own = outer(source[k].agrees for k in sorted(row_axes))
    out = np.multiply.outer(own, same) + np.multiply.outer(1 - own, other)
    # Row axes come first here, then the others in the order of this node's axes; they go where the table has
    # them.
    kept = [k for k in range(len(source)) if k not in row_axes]
    order = [*sorted(row_axes), *sorted(kept, key=lambda k: bind[k])]
    return [out.transpose(np.argsort(order))]


@rule("gather")
def gather(interpreter: Context, eqn: Any, x: Value, ids: Value) -> Any:
    """One known index is a slice, rows by index are a lookup; what is picked otherwise is sampled."""
    d, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.outvars[0].aval.shape
    if x.constant is not None:
        return layout.full(interpreter.graph, x.constant, shape)
    known, picked = interpreter.concrete(ids), d.start_index_map
    if known is not None and known.size == known.shape[-1]:
        starts = dict(zip(picked, known.ravel().astype(int), strict=True))
        for dim, size in enumerate(sizes):
            start = int(np.clip(starts.get(dim, 0), 0, x.shape[dim] - size))
            x = take(x, dim, start, start + size)
        return layout.reshape(x, shape)
    if in_order(x.node):
        return drawn_region(interpreter, eqn, (x, ids), "steps of a loop are picked, which differ")
    collapsed = set(d.collapsed_slice_dims)
    whole = all(s == n for k, (s, n) in enumerate(zip(sizes, x.shape, strict=True)) if k not in collapsed)
    if set(picked) != collapsed or not whole or d.operand_batching_dims:
        return drawn_region(interpreter, eqn, (x, ids), "entries are looked up one by one")
    return rows_by_index(interpreter, x, ids, picked, d.offset_dims, shape)


def rows_by_index(
    interpreter: Context,
    x: Value,
    ids: Value,
    picked: Sequence[int],
    offsets: Sequence[int],
    shape: Sequence[int],
) -> Value:
    """Rows of a table by index.

    Args:
        interpreter: the walk.
        x: the table.
        ids: the indices, its last dimension being along which of `picked` they are.
        picked: the dimensions of the table that rows are along.
        offsets: where the others are in the result.
        shape: of the result; its other dimensions are those of the indices.
    """
    graph, known = interpreter.graph, interpreter.concrete(ids)
    x = layout.separated(x)
    axis_of: Any = [dim[0].axis if dim else None for dim in x.dims]
    kept = list(zip((k for k in range(len(x.dims)) if k not in picked), offsets, strict=True))
    batch, rows = [k for k in range(len(shape)) if k not in offsets], [x.shape[k] for k in picked]
    places, axes, rates = itertools.count(), list[Axis](), None
    if known is None:
        # They differ along the axes that they run over, and repeat along those that they are broadcast on.
        own = ids.dims[: len(batch)]
        axes = [Axis(atom.size) for dim in own for atom in dim if atom.axis is not None]
        atoms = [tuple(Atom(n, None if k is None else next(places)) for n, k in dim) for dim in own]
        which = ids.node  # or, behind the wrap-around of negative ones, the random or known index
        while (
            not isinstance(which, Array | Leaf)
            and len(inner := roots(which)) == 1
            and inner[0].node is not which
        ):
            which = inner[0].node
    else:
        line = np.ravel_multi_index(tuple(known.reshape(-1, len(rows)).astype(int).T), rows, mode="clip")
        k = axis_of[picked[0]] if known.size == max(known.shape) and len(rows) == 1 else None
        if k is not None and (axis := x.node.axes[k]).classes > 1:
            # Rows of unlike classes: a map of the axis.
            found = entry_map(np.arange(len(line)), line, labelled(axis.label_array[line]), axis)
            dims = {j: (Atom(shape[j], k),) if shape[j] > 1 else () for j in batch}
            dims |= {out: x.dims[own] for own, out in kept}
            return Value(mapped(x.node, k, found), tuple(dims[j] for j in range(len(shape))))
        table = line.reshape([shape[k] for k in batch if shape[k] > 1])
        axes, which = classed_axes(graph, table), hashlib.sha1(line.tobytes()).hexdigest()
        rates = tuple(np.round(repeat_rates(table, axes), 12).ravel())
        atoms = [(Atom(shape[k], next(places)),) if shape[k] > 1 else () for k in batch]
        INDICES.put(graph, which, line)
    dims, indices, bind = dict(zip(batch, atoms, strict=True)), tuple(range(len(axes))), {}
    for k, out in kept:
        dims[out] = (Atom(x.shape[k], len(axes)),) if x.dims[k] else ()
        if x.dims[k]:
            bind[axis_of[k]] = len(axes)
            axes.append(x.node.axes[axis_of[k]])
    view = View(x.node, tuple(bind.get(k, -1) for k in range(len(x.node.axes))))
    row_axes = tuple(axis_of[k] for k in picked if x.dims[k])
    params = GatherParams(row_axes, indices, rates, math.prod(rows), which)
    return Value(graph.make(Gather, axes, [view], params), tuple(dims[k] for k in range(len(shape))))


_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def unknown(interpreter: Context, name: str, shape: Sequence[int]) -> Value:
    """Whole numbers described by their shape."""
    x = interpreter.leaf(("ids", name), shape, 0.0, 1.0, odd=False)
    x.node.flagged, x.node.doubt = "assumed", UNKNOWN
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
        found = _one_hot(interpreter, shape, x, known) or none
        return found if name == "eq" else interpreter.elementwise("sub", every, found)
    # Below a bound, but not below the positions that it is the number of, nor below zero.
    return every if name in ("gt", "ge") or (known.size == 1 and known.item() > 0) else none


def _is_unknown(node: Node) -> bool:
    """Whether it is whole numbers of which only the shape is given, moved, shifted or beside others."""
    if isinstance(node, Leaf):
        return node.name[0] == "ids"
    if isinstance(node, Concat):
        return any(_is_unknown(view.node) for view in node.args)
    shifted = isinstance(node, Apply) and node.params[0] == "affine" and node.params[1][0] > 0
    return (shifted or node.moves) and _is_unknown(node.args[0].node)


def _one_hot(interpreter: Context, shape: Sequence[int], x: Value, known: np.ndarray) -> Value | None:
    """Rows of the identity by id, where the known numbers are all different and along a dimension of their own."""
    along = [d for d, n in enumerate(known.shape) if n > 1 and np.ptp(known, axis=d).any()]
    if len(along) != 1 or any(atom.axis is not None for atom in x.dims[along[0]]):
        return None
    (d,) = along
    line = np.moveaxis(known, d, 0).reshape(known.shape[d], -1)[:, 0]
    if len(np.unique(line)) < len(line):
        return None
    rest = [n for k, n in enumerate(shape) if k != d]
    ids = layout.broadcast_in_dim(Value(x.node, (*x.dims[:d], *x.dims[d + 1 :])), rest, range(len(rest)))
    found = rows_by_index(interpreter, interpreter.known(np.eye(len(line))), ids, (0,), (d,), shape)
    # One or nothing, and neither normal nor lognormal.
    found.node.drawn = (special.ndtr(Z) >= 1 - 1 / len(line)).astype(float)
    return found


def filled_up(ids: Int[np.ndarray, "rows positions"]) -> Bool[np.ndarray, "rows positions"] | None:
    """Where rows are filled up, behind or in front, by one value; None where they are not.

    Where a share q of the other ids is of that value, rows end by chance in runs of it of mean length q/(1 − q) and variance
    q/(1 − q)².
    """
    if len(np.unique(ids)) < 3:  # a mask is no array of ids
        return None
    for step in (1, -1):
        turned = ids[:, ::step]
        runs = np.logical_and.accumulate((turned == turned[:, -1:])[:, ::-1], axis=1)[:, ::-1]
        values, last = np.unique(turned[:, -1], return_inverse=True)
        repeated = runs.sum(axis=1)
        most = int(np.argmax(np.bincount(last.ravel(), weights=repeated)))
        runs &= (last.ravel() == most)[:, None]
        others, each_its_own = turned[~runs], 2 * runs.sum() < repeated[repeated > 1].sum()
        if each_its_own or runs.sum(axis=1).max() < 2 or len(np.unique(others)) < 2:
            continue  # positions that stand still, say
        q = max(float(np.mean(others == values[most])), 1 / len(np.unique(ids)))
        mean, deviation = len(ids) * q / (1 - q), math.sqrt(len(ids) * q) / (1 - q)
        if runs.sum() > mean + _CHANCE * deviation + 1:
            return runs[:, ::step]
    return None


def filled_shapes(given: Sequence[Any]) -> frozenset[tuple[int, ...]]:
    """The shapes (rows, positions) of given arrays of ids that are filled up."""
    arrays = (x for x in given if isinstance(x, np.ndarray | jax.Array) and np.ndim(x) > 1 and np.size(x) > 1)
    ids = [_as_rows(x) for x in arrays if jnp.issubdtype(x.dtype, jnp.integer)]
    return frozenset(rows.shape for rows in ids if filled_up(rows) is not None)


def _as_rows(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])


def _paddings(graph: Graph, ids: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "rows positions"] | None:
    """Where ids are filled up, of a shape of inputs that are; None where they are not."""
    return filled_up(_as_rows(ids)) if ids.ndim and _as_rows(ids).shape in padded(graph) else None


def classed_axes(graph: Graph, ids: Int[np.ndarray, "..."]) -> list[Axis]:
    """Axes of an array of ids, classed where given ids are filled up and these are, too; of others, by the same axes."""
    seen = _CLASSED.once(graph, None, list)
    if (field := _paddings(graph, ids)) is None:
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
    """The shapes of the model's inputs that are filled up."""
    return PADDED.get(graph, None) or frozenset()


def repeat_rates(ids: Int[np.ndarray, "..."], axes: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """P(ids_i = ids_j) by type of pair, of ids that are not negative: counts of equal pairs, axis by axis.

    Pairs that agree on some axes and are of one value are Σ n_c n_c', with n_c of that value there in class c of the others.
    """
    out, cells = np.zeros([axis.types for axis in axes]), [axis.classes for axis in axes]
    places = np.indices(ids.shape).reshape(ids.ndim, -1)
    classes = [axis.label_array[at] for axis, at in zip(axes, places, strict=True)]
    for agree in itertools.product((True, False), repeat=ids.ndim):
        fixed, free = ([k for k in range(ids.ndim) if agree[k] is which] for which in (True, False))
        outer, inner = ([cells[k] for k in ks] for ks in (fixed, free))
        sizes = [int(ids.max()) + 1, *(ids.shape[k] for k in fixed)]
        lines = _as_one([ids.ravel(), *(places[k] for k in fixed)], sizes, ids.size)
        _, first, line = np.unique(lines, return_index=True, return_inverse=True)
        table = np.zeros((len(first), math.prod(inner)))
        np.add.at(table, (line.ravel(), _as_one([classes[k] for k in free], inner, ids.size)), 1.0)
        outside = _as_one([classes[k][first] for k in fixed], outer, len(first))
        rows = [table[outside == c] for c in range(math.prod(outer))]
        pairs = np.stack([n.T @ n for n in rows]).reshape([*outer, *inner, *inner])
        # From (classes that agree, classes of i, classes of j) to classes, or pairs of them, of each axis in
        # turn.
        ahead, behind = [*fixed, *free].index, free.index
        order = [
            p for k in range(ids.ndim) for p in ([ahead(k)] if agree[k] else [ahead(k), ids.ndim + behind(k)])
        ]
        block = tuple(slice(0, c) if same else slice(c, None) for c, same in zip(cells, agree, strict=True))
        out[block] = pairs.transpose(order).reshape(out[block].shape)
    return per_pair(out, axes)


def _as_one(numbers: Sequence[np.ndarray], sizes: Sequence[int], count: int) -> np.ndarray:
    """Several numbers of each of `count` things as one, row-major."""
    return np.ravel_multi_index((np.zeros(count, int), *numbers), (1, *sizes))
