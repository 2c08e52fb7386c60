"""Lookups: a row of a table for each index; two equal indices give the same row, so what counts is how often they repeat.

Whole numbers of which only the shape is given are ids and lengths. Ids are uniform, so a row of `ids == arange(n)` is a row of
the identity matrix, looked up by id. Masks are all true: an id is a valid one and no padding (`ids != 0`, `ids > 0`,
`ids < n`), a length is the whole (`arange(n) < lengths`). What else is done with such numbers takes them for standard normals,
in doubt.

Given ids may fill up rows to one length. Whether a place is padding depends on its row and its position together: rows of one
length are a class, and so are positions between two lengths. Of more lengths than a few, those most alike are one class, and
what that leaves out is in doubt (`has_more_lengths`).
"""

from __future__ import annotations

import functools
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

from varscale.theory.domain.axes import Axis, contract_axis, grouped, labelled
from varscale.theory.domain.axis_maps import entry_map
from varscale.theory.domain.tables import LEADING_ORDER, Table, lift, per_pair
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.linear_nodes import INDICES, Concat, Gather, GatherParams, mapped, weight_of
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
    row_axes, places = node.params[:2]
    table = node.args[0].node.table
    if node.known is not None and any(axis.labels for axis in node.indexed):
        ids = node.known.reshape([axis.size for axis in node.indexed])
        if has_more_lengths(node.graph, ids):
            node.graph.flag("assumed", LEADING_ORDER)
    mean = table.mean
    for k in sorted(row_axes, reverse=True):
        mean = contract_axis(mean, k, table.axes[k].counts / table.axes[k].size)
    same, other = _same_and_different(table.second, table.axes, row_axes, node.params.rows)
    kept = [k for k in range(len(table.axes)) if k not in row_axes]
    own, bind = [table.axes[k] for k in kept], [node.args[0].bind[k] for k in kept]
    rate = lift(node.rates(), node.indexed, places, node.axes, pairs=True)
    same, other = (lift(x, own, bind, node.axes, pairs=True) for x in (same, other))
    second = np.broadcast_to(rate * same + (1 - rate) * other, node.frame_types)
    mean = np.broadcast_to(lift(mean, own, bind, node.axes, pairs=False), [a.classes for a in node.axes])
    return Table(node.axes, np.array(mean), np.array(second))


@cross_by_kind.register(Gather)
def cross_by_kind_of_gather(node: Gather, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Two lookups of tables with the same rows: any index of one meets any of the other."""
    weights = weight_of(node), weight_of(b.node)
    if None not in weights and weights[0] is not weights[1]:
        return np.zeros((1,) * len(frame))
    other, x = b.node, node.args[0].node
    if not isinstance(other, Gather) or x.axes != other.args[0].node.axes:
        return None
    if node.known is not None and other.known is not None:
        return None  # how often they agree is in doubt
    row_axes, rows = node.params.row_axes, node.params.rows
    kept = [k for k in range(len(x.axes)) if k not in row_axes]
    places, others = ([v.bind[v.node.args[0].bind[k]] for k in kept] for v in (a, b))
    if row_axes != other.params.row_axes or places != others:
        return None
    table = np.broadcast_to(cross(x.whole, other.args[0].node.whole, x.axes), x.frame_types)
    same, different = _same_and_different(table, x.axes, row_axes, rows)
    return lift((same + (rows - 1) * different) / rows, [x.axes[k] for k in kept], places, frame, pairs=True)


@pullback.register(Gather)
def pullback_of_gather(node: Gather, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """Cotangents add up in the rows they came from: a row gets as many pairs of them as there are indices that agree."""
    row_axes, index_axes, _, rows = node.params[:4]
    source, bind = node.args[0].node.axes, node.args[0].bind
    axes = [node.axes[k] for k in index_axes]
    pairs = functools.reduce(np.multiply.outer, [a.pairs for a in axes], np.array(1.0))
    rate = node.rates()
    same, other = (
        np.tensordot(w, cotangent, axes=(range(len(axes)), index_axes))
        for w in (pairs * rate / rows, pairs * (1 - rate) / max(rows * (rows - 1), 1))
    )
    own = functools.reduce(np.logical_and.outer, [source[k].agrees for k in sorted(row_axes)], np.array(True))
    out = np.multiply.outer(own, same) + np.multiply.outer(~own, other)
    # Row axes come first here, then the others in the order of this node's axes; they go where the table has
    # them.
    kept = [k for k in range(len(source)) if k not in row_axes]
    order = [*sorted(row_axes), *sorted(kept, key=lambda k: bind[k])]
    return [out.transpose(np.argsort(order))]


def _same_and_different(
    second: np.ndarray, axes: Sequence[Axis], row_axes: Sequence[int], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means over pairs of a row and itself, and of two of the `rows`, which may agree along some axes but not along all."""
    same, any_two = second, second
    for k in sorted(row_axes, reverse=True):
        same, any_two = contract_axis(same, k, axes[k].same), contract_axis(any_two, k, axes[k].any_pair)
    return same, (rows * any_two - same) / max(rows - 1, 1)


def base_ids(node: Node) -> Node:
    """The random or known index behind the wrap-around of negative ones."""
    while not isinstance(node, Array | Leaf) and len(own := roots(node)) == 1 and own[0].node is not node:
        node = own[0].node
    return node


@rule("gather")
def gather(interpreter: Context, eqn: Any, x: Value, ids: Value) -> Any:
    """One known index is a slice, rows by index are a lookup; what is picked otherwise is sampled."""
    d, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.outvars[0].aval.shape
    if x.constant is not None:
        return layout.full(interpreter.graph, x.constant, shape)
    known = interpreter.concrete(ids)
    if known is not None and known.size == known.shape[-1]:
        starts = dict(zip(d.start_index_map, known.ravel().astype(int), strict=True))
        for dim, size in enumerate(sizes):
            start = int(np.clip(starts.get(dim, 0), 0, x.shape[dim] - size))
            x = take(x, dim, start, start + size)
        return layout.reshape(x, shape)
    if in_order(x.node):
        return drawn_region(interpreter, eqn, (x, ids), "steps of a loop are picked, which differ")
    collapsed = set(d.collapsed_slice_dims)
    whole = all(s == n for k, (s, n) in enumerate(zip(sizes, x.shape, strict=True)) if k not in collapsed)
    if set(d.start_index_map) == collapsed and whole and not d.operand_batching_dims:
        return rows_by_index(interpreter, d, shape, x, ids)
    return drawn_region(interpreter, eqn, (x, ids), "entries are looked up one by one")


def rows_by_index(interpreter: Context, d: Any, shape: Sequence[int], x: Value, ids: Value) -> Value:
    """Rows of a table, its axes `d.start_index_map`, by index."""
    graph, known, picked = interpreter.graph, interpreter.concrete(ids), tuple(d.start_index_map)
    x = layout.separated(x)
    axis_of: Any = [dim[0].axis if dim else None for dim in x.dims]
    batch = [k for k in range(len(shape)) if k not in d.offset_dims]
    kept = list(zip((k for k in range(len(x.dims)) if k not in picked), d.offset_dims, strict=True))
    if known is not None and known.size == max(known.shape) and len(picked) == 1:
        k = axis_of[picked[0]]
        if k is not None and x.node.axes[k].classes > 1:  # rows of unlike classes: a map of the axis
            axis = x.node.axes[k]
            line = np.clip(known.ravel().astype(int), 0, axis.size - 1)
            rows = entry_map(np.arange(len(line)), line, labelled(axis.label_array[line]), axis)
            places = {j: (Atom(shape[j], k),) if shape[j] > 1 else () for j in batch}
            places |= {out: x.dims[own] for own, out in kept}
            return Value(mapped(x.node, k, rows), tuple(places[j] for j in range(len(shape))))
    axes, rates, index_atoms = _index_axes(graph, ids, known, [shape[k] for k in batch])
    dims, indices, bind = dict(zip(batch, index_atoms, strict=True)), tuple(range(len(axes))), {}
    for k, out in kept:
        dims[out] = (Atom(x.shape[k], len(axes)),) if x.dims[k] else ()
        if x.dims[k]:
            bind[axis_of[k]] = len(axes)
            axes.append(x.node.axes[axis_of[k]])
    view = View(x.node, tuple(bind.get(k, -1) for k in range(len(x.node.axes))))
    frozen = None if rates is None else tuple(np.round(rates, 12).ravel())
    which = base_ids(ids.node) if known is None else _stored(graph, known, [x.shape[k] for k in picked])
    row_axes = tuple(axis_of[k] for k in picked if x.dims[k])
    params = GatherParams(row_axes, indices, frozen, math.prod(x.shape[k] for k in picked), which)
    return Value(graph.make(Gather, axes, [view], params), tuple(dims[k] for k in range(len(shape))))


def _stored(graph: Graph, known: np.ndarray, sizes: Sequence[int]) -> str:
    """The key of known indices, flat and as numbers of whole rows, in the graph's store."""
    flat = known.reshape(-1, known.shape[-1]).astype(int)
    codes = np.ravel_multi_index(tuple(flat.T), tuple(sizes), mode="clip")
    INDICES.put(graph, key := hashlib.sha1(codes.tobytes()).hexdigest(), codes)
    return key


def _index_axes(
    graph: Graph, ids: Value, known: np.ndarray | None, shape: Sequence[int]
) -> tuple[list[Axis], np.ndarray | None, list[tuple[Atom, ...]]]:
    """Axes of the indices, their repeat rates (None: unknown, as good as uniform) and the atoms of the batch dimensions."""
    if known is not None:
        _, codes = np.unique(known.reshape(-1, known.shape[-1]), axis=0, return_inverse=True)
        codes, count = codes.reshape([n for n in shape if n > 1]), itertools.count()
        axes = classed_axes(graph, codes)
        return axes, repeat_rates(codes, axes), [(Atom(n, next(count)),) if n > 1 else () for n in shape]
    # Unknown indices differ along the axes they run over, and repeat along those they are broadcast on.
    own = ids.dims[: len(shape)]
    sizes = [atom.size for dim in own for atom in dim if atom.axis is not None]
    place = itertools.count()
    atoms = [tuple(Atom(n, None if k is None else next(place)) for n, k in dim) for dim in own]
    return [Axis(n) for n in sizes], None, atoms


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
    if not _is_unknown(x.node) or (known := interpreter.concrete(y)) is None:
        return None
    if name in ("eq", "ne"):
        found = _one_hot(interpreter, shape, x, known) or layout.full(interpreter.graph, 0.0, shape)
        one = layout.full(interpreter.graph, 1.0, shape)
        return found if name == "eq" else interpreter.elementwise("sub", one, found)
    if name in ("gt", "ge"):
        return layout.full(interpreter.graph, 1.0, shape)
    # Below a bound, but not below the positions that it is the number of, nor below zero.
    return layout.full(interpreter.graph, float(known.size == 1 and known.item() > 0), shape)


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
    ids = Value(x.node, (*x.dims[:d], *x.dims[d + 1 :]))
    rows = jax.lax.GatherDimensionNumbers(
        offset_dims=(len(rest),), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    spread = layout.broadcast_in_dim(ids, rest, range(len(rest)))
    found = rows_by_index(interpreter, rows, (*rest, len(line)), interpreter.known(np.eye(len(line))), spread)
    # One or nothing, and neither normal nor lognormal.
    found.node.drawn = (special.ndtr(Z) >= 1 - 1 / len(line)).astype(float)
    return layout.transpose(found, [*range(d), len(rest), *range(d, len(rest))])


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
        most = int(np.argmax(np.bincount(last.ravel(), weights=runs.sum(axis=1))))
        repeated = runs.sum(axis=1)
        runs &= (last.ravel() == most)[:, None]
        if 2 * runs.sum() < repeated[repeated > 1].sum():  # each row by its own: positions that stand still
            continue
        others = turned[~runs]
        if runs.sum(axis=1).max() < 2 or len(np.unique(others)) < 2:
            continue
        q = max(float(np.mean(others == values[most])), 1 / len(np.unique(ids)))
        mean, variance = q / (1 - q), q / (1 - q) ** 2
        if runs.sum() > len(ids) * mean + _CHANCE * math.sqrt(len(ids) * variance) + 1:
            return runs[:, ::step]
    return None


def filled_shapes(given: Sequence[Any]) -> frozenset[tuple[int, ...]]:
    """The shapes (rows, positions) of given arrays of ids that are filled up."""
    arrays = (x for x in given if isinstance(x, np.ndarray | jax.Array) and np.ndim(x) > 1 and np.size(x) > 1)
    rows = (_as_rows(x) for x in arrays if jnp.issubdtype(x.dtype, jnp.integer))
    return frozenset(ids.shape for ids in rows if filled_up(ids) is not None)


def _as_rows(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])


def classed_axes(graph: Graph, ids: Int[np.ndarray, "..."]) -> list[Axis]:
    """Axes of an array of ids, classed where given ids are filled up and these are, too; of others, by the same axes."""
    seen = _CLASSED.once(graph, None, list)
    field = filled_up(_as_rows(ids)) if ids.ndim and _as_rows(ids).shape in padded(graph) else None
    if field is None:
        known = [
            {axis for _, axes in seen for axis in axes if axis.size == n and axis.labels is not None}
            for n in ids.shape
        ]
        return [axes.pop() if len(axes) == 1 else Axis(n) for axes, n in zip(known, ids.shape, strict=True)]
    marks = field.reshape(ids.shape)
    for other, axes in seen:
        if other.shape == marks.shape and np.mean(other != marks) * ids.shape[-1] <= _ALIKE:
            return list(axes)
    views = [np.moveaxis(marks, k, 0).reshape(n, -1).astype(float) for k, n in enumerate(ids.shape)]
    axes = [grouped(view, MOST_LENGTHS + 1) for view in views]
    seen.append((marks, tuple(axes)))
    return axes


def has_more_lengths(graph: Graph, ids: Int[np.ndarray, "..."]) -> bool:
    """Whether ids are filled up from more lengths than rows are told apart by."""
    rows = _as_rows(ids)
    field = filled_up(rows) if rows.shape in padded(graph) else None
    return field is not None and len(np.unique(field.sum(axis=1))) > MOST_LENGTHS + 1


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
    cells, labels = [axis.classes for axis in axes], [axis.label_array for axis in axes]
    out = np.zeros([axis.types for axis in axes])
    span = int(ids.max()) + 1
    for agree in itertools.product((True, False), repeat=ids.ndim):
        fixed = [k for k in range(ids.ndim) if agree[k]]
        free = [k for k in range(ids.ndim) if not agree[k]]
        inside = math.prod(cells[k] for k in free)
        values = _numbered(fixed, [np.arange(n) for n in ids.shape], ids.shape) * span + ids
        keys, counts = np.unique(values * inside + _numbered(free, labels, cells), return_counts=True)
        value, cell = np.divmod(keys, inside)
        group = np.cumsum(np.diff(value, prepend=-1) > 0) - 1
        table, outside = np.zeros((group[-1] + 1, inside)), np.zeros(group[-1] + 1, int)
        table[group, cell] = counts
        outside[group] = _numbered(
            range(len(fixed)), [labels[k] for k in fixed], [cells[k] for k in fixed]
        ).ravel()[value // span]
        rows = [table[outside == c] for c in range(math.prod(cells[k] for k in fixed))]
        pairs = np.stack([n.T @ n for n in rows]).reshape([cells[k] for k in (*fixed, *free, *free)])
        # From (classes that agree, classes of i, classes of j) to classes, or pairs of them, of each axis in
        # turn.
        ahead, behind = [*fixed, *free].index, free.index
        order = [
            p for k in range(ids.ndim) for p in ([ahead(k)] if agree[k] else [ahead(k), ids.ndim + behind(k)])
        ]
        block = tuple(slice(0, c) if same else slice(c, None) for c, same in zip(cells, agree, strict=True))
        out[block] = pairs.transpose(order).reshape(
            [c if same else c * c for c, same in zip(cells, agree, strict=True)]
        )
    return per_pair(out, axes)


def _numbered(dims: Sequence[int], numbers: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """For every place of an array, what it has along some dimensions as one number, row-major."""
    out = np.zeros([len(x) for x in numbers], int)
    for k in dims:
        out = out * sizes[k] + numbers[k].reshape([-1 if d == k else 1 for d in range(len(numbers))])
    return out
