"""Lookups: a row of a table for each index; two equal indices give the same row, so what counts is how often they repeat.

Whole numbers of which only the shape is given are ids and lengths. Ids are uniform, so a row of `ids == arange(n)` is a row of
the identity matrix, looked up by id. Masks are all true: an id is a valid one and no padding (`ids != 0`, `ids > 0`,
`ids < n`), a length is the whole (`arange(n) < lengths`). What else is done with such numbers takes them for standard normals,
in doubt.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axis, labelled
from varscale.theory.domain.axis_maps import entry_map
from varscale.theory.domain.tables import LEADING_ORDER, Table, lift
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
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.sampler import in_order
from varscale.theory.rules.axis import take
from varscale.theory.rules.padding import classed_axes, has_more_lengths, repeat_rates
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region


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
    other = b.node
    if not isinstance(other, Gather) or node.args[0].node.axes != other.args[0].node.axes:
        return None
    if node.line is not None and other.line is not None and a.bind == b.bind:
        return None  # how often two lookups of one line agree is in doubt
    x, y = node.args[0].node, other.args[0].node
    row_axes, rows = node.params.row_axes, node.params.rows
    kept = [k for k in range(len(x.axes)) if k not in row_axes]
    places = [[view.bind[n.args[0].bind[k]] for k in kept] for n, view in ((node, a), (other, b))]
    if row_axes != other.params.row_axes or places[0] != places[1]:
        return None
    own = tuple(range(len(x.axes)))
    table = np.broadcast_to(cross(View(x, own), View(y, own), x.axes), x.frame_types)
    same, different = _same_and_different(table, x.axes, row_axes, rows)
    rate = 1 / rows
    if node.known is not None and other.known is not None:
        one, two = (np.bincount(i, minlength=rows) / len(i) for i in (node.known, other.known))
        rate = float(one[:rows] @ two[:rows])
    second = rate * same + (1 - rate) * different
    return lift(second, [x.axes[k] for k in kept], places[0], frame, pairs=True)


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
    while not isinstance(node, Array | Leaf):
        own = roots(node)
        if len(own) != 1 or own[0].node is node:
            return node
        node = own[0].node
    return node


@rule("gather")
def gather(interpreter: Context, eqn: Any, x: Value, ids: Value) -> Any:
    """One known index is a slice, rows by index are a lookup; what is picked otherwise is sampled."""
    p, shape = eqn.params, eqn.outvars[0].aval.shape
    d = p["dimension_numbers"]
    if x.constant is not None:
        return layout.full(interpreter.graph, x.constant, shape)
    known, sizes = interpreter.concrete(ids), p["slice_sizes"]
    if known is not None and known.reshape(-1, known.shape[-1]).shape[0] == 1:
        starts = dict(zip(d.start_index_map, known.ravel().astype(int), strict=True))
        for dim, size in enumerate(sizes):
            start = int(np.clip(starts.get(dim, 0), 0, x.shape[dim] - size))
            x = take(x, dim, start, start + size)
        return layout.reshape(x, shape)
    if in_order(x.node):
        return drawn_region(interpreter, eqn, (x, ids), "steps of a loop are picked, which differ")[0]
    collapsed = set(d.collapsed_slice_dims)
    whole = all(s == n for k, (s, n) in enumerate(zip(sizes, x.shape, strict=True)) if k not in collapsed)
    if set(d.start_index_map) == collapsed and whole and not d.operand_batching_dims:
        return rows_by_index(interpreter, d, shape, x, ids)

    return drawn_region(interpreter, eqn, (x, ids), "entries are looked up one by one")[0]


def rows_by_index(interpreter: Context, d: Any, shape: Sequence[int], x: Value, ids: Value) -> Value:
    """Rows of a table, its axes `d.start_index_map`, by index."""
    known, picked = interpreter.concrete(ids), tuple(d.start_index_map)
    for dim in range(len(x.dims)):
        x = layout.merged(layout.materialize(x, [dim]), dim)
    batch = [k for k in range(len(shape)) if k not in d.offset_dims]
    rows = math.prod(x.shape[k] for k in picked)
    if known is not None and known.size == max(known.shape) and len(picked) == 1:
        axis = x.node.axes[x.dims[picked[0]][0].axis] if x.dims[picked[0]] else Axis(1)
        if axis.classes > 1:
            return _mapped_rows(x, d, shape, batch, np.clip(known.ravel().astype(int), 0, axis.size - 1))
    axes, rates, index_atoms = _index_axes(interpreter.graph, ids, known, [shape[k] for k in batch])
    dims: list[tuple[Atom, ...]] = [()] * len(shape)
    for k, atoms in zip(batch, index_atoms, strict=True):
        dims[k] = atoms
    index_axes = tuple(range(len(axes)))
    bind: dict[int, int] = {}
    row_axes: list[int] = []
    kept = [k for k in range(len(x.dims)) if k not in picked]
    for k, out in zip(kept, d.offset_dims, strict=True):
        if x.dims[k]:
            axis = x.dims[k][0].axis
            assert axis is not None
            bind[axis] = len(axes)
            dims[out] = (Atom(x.shape[k], len(axes)),)
            axes.append(x.node.axes[axis])
    for k in picked:
        if x.dims[k] and (axis := x.dims[k][0].axis) is not None:
            row_axes.append(axis)
            bind[axis] = -1
    view = View(x.node, tuple(bind[k] for k in range(len(x.node.axes))))
    frozen = None if rates is None else tuple(np.round(rates, 12).ravel())
    which = (
        base_ids(ids.node)
        if known is None
        else _stored(interpreter.graph, known, [x.shape[k] for k in picked])
    )
    node = interpreter.graph.make(
        Gather, axes, [view], GatherParams(tuple(row_axes), index_axes, frozen, rows, which)
    )
    return Value(node, tuple(dims))


def _stored(graph: Graph, known: np.ndarray, sizes: Sequence[int]) -> str:
    """The key of known indices, flat and as numbers of whole rows, in the graph's store."""
    flat = known.reshape(-1, known.shape[-1]).astype(int)
    codes = np.ravel_multi_index(tuple(flat.T), tuple(sizes), mode="clip")
    key = hashlib.sha1(codes.tobytes()).hexdigest()
    INDICES.put(graph, key, codes)
    return key


def _mapped_rows(x: Value, d: Any, shape: Sequence[int], batch: Sequence[int], line: np.ndarray) -> Value:
    """Rows of unlike classes by known indices along one axis, as a map of that axis."""
    (picked,) = d.start_index_map
    k = x.dims[picked][0].axis
    assert k is not None
    axis = x.node.axes[k]
    rows = entry_map(np.arange(len(line)), line, labelled(axis.label_array[line]), axis)
    dims: list[tuple[Atom, ...]] = [
        (Atom(n, k),) if j in batch and n > 1 else () for j, n in enumerate(shape)
    ]
    for own, out in zip([j for j in range(len(x.dims)) if j != picked], d.offset_dims, strict=True):
        dims[out] = x.dims[own]
    return Value(mapped(x.node, k, rows), tuple(dims))


def _index_axes(
    graph: Graph, ids: Value, known: np.ndarray | None, shape: Sequence[int]
) -> tuple[list[Axis], np.ndarray | None, list[tuple[Atom, ...]]]:
    """Axes of the indices, their repeat rates (None: unknown, as good as uniform) and the atoms of the batch dimensions."""
    atoms: list[tuple[Atom, ...]] = []
    count = 0
    for k, n in enumerate(shape):
        # Unknown indices differ along the axes they run over, and repeat along those they are broadcast on.
        mine = ids.dims[k] if known is None else (Atom(n, 0),) if n > 1 else ()
        atoms.append(
            tuple(atom if atom.axis is None else Atom(atom.size, count + i) for i, atom in enumerate(mine))
        )
        count += sum(atom.axis is not None for atom in mine)
    if known is None:
        return [Axis(a.size) for dim in atoms for a in dim if a.axis is not None], None, atoms
    _, codes = np.unique(known.reshape(-1, known.shape[-1]), axis=0, return_inverse=True)
    codes = codes.reshape([n for n in shape if n > 1])
    axes = classed_axes(graph, codes)
    return axes, repeat_rates(codes, axes), atoms


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
        return (
            found
            if name == "eq"
            else interpreter.elementwise("sub", layout.full(interpreter.graph, 1.0, shape), found)
        )
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
    line = np.moveaxis(known, d, 0).reshape(len(known) if d == 0 else known.shape[d], -1)[:, 0]
    if len(np.unique(line)) < len(line):
        return None
    rest = [n for k, n in enumerate(shape) if k != d]
    ids = layout.broadcast_in_dim(
        Value(x.node, tuple(dim for k, dim in enumerate(x.dims) if k != d)), rest, range(len(rest))
    )
    rows = lax.GatherDimensionNumbers(
        offset_dims=(len(rest),), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    found = rows_by_index(interpreter, rows, (*rest, len(line)), interpreter.known(np.eye(len(line))), ids)
    found.node.drawn = (special.ndtr(Z) >= 1 - 1 / len(line)).astype(
        float
    )  # one or nothing, and neither normal nor lognormal
    return layout.transpose(found, [*range(d), len(rest), *range(d, len(rest))])
