"""Slices, splits, reversals, broadcasts and reshapes, where entries keep their values and change places; cumulative sums."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, grouped, sliced
from varscale.theory.domain.axis_maps import AxisMap, adjoint, entry_map, pair_counts, slice_map
from varscale.theory.domain.tables import LEADING_ORDER, Table
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Atom, Value, materialize, merged
from varscale.theory.graph.linear_nodes import Take, mapped
from varscale.theory.graph.nodes import (
    Array,
    Constant,
    Leaf,
    Node,
    View,
    array,
    cut_inside,
    part_of,
    pullback,
    rebuild,
)
from varscale.theory.graph.reshapes import Permute, permute
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.rules.registry import Context, elementwise_or_layout, rule
from varscale.theory.rules.sampled_regions import drawn_region, placeholder

# By leaf: along which axis it is sliced, and it and what multiplies it entry by entry where it is weights
# only read in slices.
_SLICED: Fact[int, tuple[int, list[Node] | None]] = Fact()


@rule("broadcast_in_dim")
def broadcast_rule(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    return layout.broadcast_in_dim(x, eqn.params["shape"], eqn.params["broadcast_dimensions"])


@rule("reshape", "squeeze", "expand_dims")
def reshape_rule(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    if eqn.primitive.name == "squeeze":
        kept = [d for d in range(len(x.dims)) if d not in {k % len(x.dims) for k in eqn.params["dimensions"]}]
        return layout.transpose(x, kept)
    return layout.reshape(x, eqn.outvars[0].aval.shape)


@rule("transpose")
def transpose_rule(interpreter: Context, eqn: Any, x: Value) -> Value:
    return layout.transpose(x, eqn.params["permutation"])


@rule("rev")
def rev(interpreter: Context, eqn: Any, x: Value) -> Value:
    """Reversal renumbers positions: each meets another one of the array it was made from."""
    for d in eqn.params["dimensions"]:
        x = take(x, d, x.shape[d] - 1, -1, -1)
    return x


@pullback.register(Take)
def pullback_of_take(node: Take, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    k, *span = node.params
    return [part_pullback(cotangent, k, node.args[0].node.axes[k], span)]


def part_pullback(cotangent: np.ndarray, k: int, old: Axis, span: Sequence[Any]) -> np.ndarray:
    """Cotangents of a slice of axis k read over the whole axis, averaged over each class."""
    matrix, is_axis = _slice_adjoint(old, tuple(span))
    return apply_axis(cotangent if is_axis else np.expand_dims(cotangent, k), k, matrix)


@functools.cache
def _slice_adjoint(old: Axis, span: tuple[Any, ...]) -> tuple[np.ndarray, bool]:
    """Of a slice the map of cotangents, and whether it has an axis left, and not one position with the type "same" alone."""
    new, _ = sliced(old, *span)
    out = new or Axis(1)
    matrix = adjoint(pair_counts(slice_map(span, out, old)), out, old)
    return (matrix if new is not None else matrix[:, :1]), new is not None


def _slice(span: Sequence[int]) -> tuple[int, int | None, int]:
    start, stop, step = span
    return start, (None if step < 0 and stop < 0 else stop), step


def take(x: Value, d: int, start: int, stop: int, step: int) -> Value:
    """x[start:stop:step] along dimension d (stop = −1 with a negative step means to the beginning)."""
    n = x.shape[d]
    positions = range(n)[slice(*_slice((start, stop, step)))]
    if len(positions) == n and step == 1:
        return x
    if not positions:
        return layout.full(x.node.graph, 0.0, [0 if k == d else m for k, m in enumerate(x.shape)])
    if step > 1 and n % step == 0 and start < step and len(positions) == n // step:
        # Every step-th position is one index of a factor of the axis.
        cut = layout.reshape(x, (*x.shape[:d], n // step, step, *x.shape[d + 1 :]))
        one = take(cut, d + 1, start, start + 1, 1)
        return layout.transpose(one, [k for k in range(len(one.dims)) if k != d + 1])
    dim = x.dims[d]
    # A slice along the leading factor of a product, or of blocks of it, is a slice of that factor.
    if len(dim) > 1 and step == 1 and dim:
        inner = math.prod(a.size for a in dim[1:])
        if start % inner == 0 and stop % inner == 0:
            a, b = start // inner, stop // inner
            lead = take(Value(x.node, (*x.dims[:d], dim[:1], dim[1:], *x.dims[d + 1 :])), d, a, b, 1)
            return Value(lead.node, (*lead.dims[:d], (*lead.dims[d], *lead.dims[d + 1]), *lead.dims[d + 2 :]))
    x = layout.merged(x, d)
    (atom,) = x.dims[d] or (Atom(1, None),)
    if atom.axis is None:
        new: tuple[Atom, ...] = (Atom(len(positions), None),) if len(positions) > 1 else ()
        return Value(x.node, (*x.dims[:d], new, *x.dims[d + 1 :]))
    node = take_node(x.node, atom.axis, start, stop, step)
    return _resized(x, node, d, atom.axis, len(positions))


def _resized(x: Value, node: Node, d: int, k: int, size: int) -> Value:
    """`x` over `node`, in which axis k (dimension d) has another size; an axis of size 1 is gone."""
    if isinstance(node, Constant):
        dims = [tuple(Atom(a.size, None) for a in dim) for dim in x.dims]
        dims[d] = (Atom(size, None),) if size > 1 else ()
        return Value(node, tuple(dims))
    gone = size == 1
    dims = [
        tuple(a if a.axis is None or a.axis < k or not gone else Atom(a.size, a.axis - 1) for a in dim)
        for dim in x.dims
    ]
    dims[d] = () if gone else (Atom(size, k),)
    return Value(node, tuple(dims))


def take_node(node: Node, k: int, start: int, stop: int, step: int) -> Node:
    """A slice of axis k, pushed through elementwise nodes to their roots."""
    graph, old = node.graph, node.axes[k]
    new, _ = sliced(old, *_slice((start, stop, step)))
    axes = (*node.axes[:k], *([new] if new is not None else []), *node.axes[k + 1 :])
    if isinstance(node, Array):
        index = [slice(None)] * len(node.axes)
        index[k] = slice(*_slice((start, stop, step)))
        numbers = node.values[tuple(index)]
        return array(graph, numbers.squeeze(k) if new is None else numbers, axes)
    if node.entrywise:
        args = []
        for child, bind in node.args:
            if k in bind:
                j = bind.index(k)
                child = take_node(child, j, start, stop, step)
                if new is None and not isinstance(child, Constant):
                    bind = (*bind[:j], *bind[j + 1 :])
                bind = () if isinstance(child, Constant) else bind
            args.append(View(child, tuple(b - (new is None and b > k) for b in bind)))
        span = _slice((start, stop, step))
        return graph.derive(node, rebuild(node, axes, args), lambda g: part_pullback(g, k, old, span))
    inside = _taken_inside(node, k, start, stop, step)
    if inside is not None:
        span = _slice((start, stop, step))
        return graph.derive(node, inside, lambda g: part_pullback(g, k, old, span))
    # Of a matrix rows may be read alone and together (positions): only stacked matrices are taken apart.
    if new is None and len(node.axes) > 2 and (part := slice_of_weights(node, k, start)) is not None:
        return part
    if step == 1 and (part := part_of(node, k, start, stop)) is not None:
        return part
    return graph.make(
        Take, axes, [View(node, tuple(range(len(node.axes))))], (k, *_slice((start, stop, step)))
    )


def slice_of_weights(node: Node, k: int, position: int) -> Leaf | None:
    """One position of an axis of independent weights: weights of their own. None of other nodes, or of one used as a whole.

    What reads the whole afterwards depends on the slices, and is not taken for independent of them.
    """
    if not isinstance(node, Leaf) or node.orthonormal:
        return None
    graph = node.graph
    along, whole = _SLICED.once(graph, node.id, lambda: (k, _only_sliced(node, k)))
    if along != k or whole is None:
        return None
    axes = (*node.axes[:k], *node.axes[k + 1 :])
    part = graph.make(Leaf, axes, (), ("step", node, position))
    table = Table(axes, np.take(node.table.mean, 0, axis=k), np.take(node.table.second, 0, axis=k))
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


def _taken_inside(node: Node, k: int, start: int, stop: int, step: int) -> Node | None:
    """The slice of what a node is made from, made into such a node again: of averages, of axes in another order, of slices."""
    inside = cut_inside(node, k, lambda x, j: take_node(x, j, start, stop, step))
    if inside is not None:
        return inside
    if isinstance(node, Permute):
        source, at = node.args[0].node, node.params[k]
        part = take_node(source, at, start, stop, step)
        if len(part.axes) == len(source.axes):
            return permute(part, node.params)
        return permute(part, [j - (j > at) for j in node.params if j != at]) if part.axes else part
    if isinstance(node, Take) and node.params[0] == k and len(node.axes) == len(node.args[0].node.axes):
        source, span = node.args[0].node, node.params[1:]
        left = range(source.axes[k].size)[slice(*span)][slice(*_slice((start, stop, step)))]
        return take_node(source, k, left.start, left.stop, left.step)
    return None


@rule("slice")
def slice_(interpreter: Context, eqn: Any, x: Value) -> Value:
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.dims)
    for d, (start, stop, step) in enumerate(
        zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    ):
        x = take(x, d, start, stop, step)
    return x


@rule("split")
def split_rule(interpreter: Context, eqn: Any, x: Value) -> list[Value]:
    edges = np.cumsum([0, *eqn.params["sizes"]])
    return [take(x, eqn.params["axis"], int(a), int(b), 1) for a, b in itertools.pairwise(edges)]


@rule("dynamic_slice")
def dynamic_slice(interpreter: Context, eqn: Any, x: Value, *starts: Value) -> Any:
    """A start that is known is a slice; of positions that are all alike the first are as good as any, else it is drawn."""
    known = [interpreter.concrete(start) for start in starts]
    out = x
    for d, (size, start) in enumerate(zip(eqn.params["slice_sizes"], known, strict=True)):
        if start is None and size < x.shape[d] and _differ_along(x, d):
            return drawn_region(
                interpreter, eqn, (x, *starts), "a slice of unlike positions from a random one on"
            )
        first = int(np.clip(0 if start is None else start, 0, x.shape[d] - size))
        out = take(out, d, first, first + size, 1)
    return out


def _differ_along(x: Value, d: int) -> bool:
    """Whether positions of a dimension are told apart, by classes or by known numbers."""
    axes = [a.axis for a in x.dims[d] if a.axis is not None]
    known = [set(root.bind) for root in roots(x.node) if isinstance(root.node, Array)]
    return any(x.node.axes[k].classes > 1 or any(k in bind for bind in known) for k in axes)


@rule("iota")
def iota(interpreter: Context, eqn: Any, *_: Value) -> Value:
    p = eqn.params
    numbers = interpreter.known(np.arange(p["shape"][p["dimension"]]))
    return layout.broadcast_in_dim(numbers, p["shape"], (p["dimension"],))


elementwise_or_layout(
    "tile",
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "slice",
    "split",
    "iota",
    "rev",
)


def lower_triangle(axis: Axis, *, reverse: bool = False) -> AxisMap:
    """y_p = Σ_{i ≤ p} x_i, or i ≥ p in reverse; outputs are classed by how many terms they have."""
    rows, columns = np.tril_indices(axis.size)
    if reverse:
        rows, columns = columns, rows
    terms = np.bincount(rows, minlength=axis.size).astype(float)
    return entry_map(rows, columns, grouped(terms[:, None]), axis)


@rule("cumsum")
def cumsum(interpreter: Context, eqn: Any, x: Value) -> Value:
    d = eqn.params["axis"]
    x = merged(materialize(x, [d]), d)
    if not x.dims[d]:
        return x  # one position
    k = x.dims[d][0].axis
    assert k is not None
    table = x.node.table
    drifts = x.node.axes[k].size > MOST_CLASSES and table.total_mean**2 > LEADING_ORDER * table.mean_square
    if drifts and interpreter.ask("running sums that drift over more places than are told apart"):
        return placeholder(interpreter, eqn.outvars[0].aval)
    return Value(mapped(x.node, k, lower_triangle(x.node.axes[k], reverse=eqn.params["reverse"])), x.dims)
