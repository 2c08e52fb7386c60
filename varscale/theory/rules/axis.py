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
from varscale.theory.graph.convolutions import ONE
from varscale.theory.graph.layout import Atom, Value, materialize, merged, permute
from varscale.theory.graph.linear_nodes import Permute, Take, mapped
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View, array, part_of, pullback
from varscale.theory.graph.normal_form import cut_inside
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region, placeholder

# By leaf: along which axis it is sliced, and it and what multiplies it entry by entry where it is weights
# only read in slices.
_SLICED: Fact[int, tuple[int, list[Node] | None]] = Fact()


@rule("broadcast_in_dim", entrywise=True)
def broadcast_rule(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    return layout.broadcast_in_dim(x, eqn.params["shape"], eqn.params["broadcast_dimensions"])


@rule("reshape", "squeeze", "expand_dims", entrywise=True)
def reshape_rule(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    if eqn.primitive.name == "squeeze":
        kept = [d for d in range(len(x.dims)) if d not in {k % len(x.dims) for k in eqn.params["dimensions"]}]
        return layout.transpose(x, kept)
    return layout.reshape(x, eqn.outvars[0].aval.shape)


@rule("transpose", entrywise=True)
def transpose_rule(interpreter: Context, eqn: Any, x: Value) -> Value:
    return layout.transpose(x, eqn.params["permutation"])


@rule("rev", entrywise=True)
def rev(interpreter: Context, eqn: Any, x: Value) -> Value:
    """Reversal renumbers positions: each meets another one of the array it was made from."""
    return functools.reduce(lambda x, d: take(x, d, x.shape[d] - 1, None, -1), eqn.params["dimensions"], x)


@pullback.register(Take)
def pullback_of_take(node: Take, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    k, *span = node.params
    return [part_pullback(cotangent, k, node.args[0].node.axes[k], span)]


def part_pullback(cotangent: np.ndarray, k: int, old: Axis, span: Sequence[Any]) -> np.ndarray:
    """Cotangents of a slice of axis k read over the whole axis, averaged over each class."""
    matrix = _slice_adjoint(old, tuple(span))
    return apply_axis(cotangent if matrix.shape[1] > 1 else np.expand_dims(cotangent, k), k, matrix)


@functools.cache
def _slice_adjoint(old: Axis, span: tuple[Any, ...]) -> np.ndarray:
    new = sliced(old, *span)[0] or ONE
    return adjoint(pair_counts(slice_map(span, new, old)), new, old)


def take(x: Value, d: int, start: int, stop: int | None, step: int = 1) -> Value:
    """x[start:stop:step] along dimension d."""
    n, dim = x.shape[d], x.dims[d]
    size = len(range(n)[start:stop:step])
    if size == n and (step == 1 or n == 1):
        return x
    if not size:
        return layout.full(x.node.graph, 0.0, [0 if k == d else m for k, m in enumerate(x.shape)])
    if step > 1 and n % step == 0 and start < step and size == n // step:
        # Every step-th position is one index of a factor of the axis.
        cut = layout.reshape(x, (*x.shape[:d], n // step, step, *x.shape[d + 1 :]))
        one = take(cut, d + 1, start, start + 1)
        return layout.transpose(one, [k for k in range(len(one.dims)) if k != d + 1])
    inner = math.prod(a.size for a in dim[1:])
    if len(dim) > 1 and step == 1 and stop is not None and start % inner == stop % inner == 0:
        # A slice along the leading factor of a product, or of blocks of it, is a slice of that factor.
        apart = layout.reshape(x, (*x.shape[:d], n // inner, inner, *x.shape[d + 1 :]))
        lead = take(apart, d, start // inner, stop // inner)
        return layout.reshape(lead, (*x.shape[:d], size, *x.shape[d + 1 :]))
    x = layout.merged(x, d)
    k, node = x.dims[d][0].axis, x.node
    place = {j: j - (size == 1 and k is not None and j > k) for j in range(len(node.axes))}
    if k is not None:
        node = take_node(node, k, start, stop, step)
    dims = list(layout.renumbered(x.dims, {} if isinstance(node, Constant) else place))
    dims[d] = (Atom(size, None if isinstance(node, Constant) else k),) if size > 1 else ()
    return Value(node, tuple(dims))


def take_view(view: View, place: int, start: int, stop: int | None, step: int = 1) -> View:
    """A slice along one place of a view's frame; an axis of one position is gone, though its place in the frame is not."""
    node, bind = view
    if place not in bind:
        return view
    j = bind.index(place)
    part = take_node(node, j, start, stop, step)
    gone = len(part.axes) < len(bind)
    return View(part, () if isinstance(part, Constant) else (*bind[:j], *bind[j + gone :]))


def take_node(node: Node, k: int, start: int, stop: int | None, step: int = 1) -> Node:
    """A slice of axis k, pushed through elementwise nodes to their roots."""
    graph, old, span = node.graph, node.axes[k], (start, stop, step)
    if span == (0, old.size, 1):
        return node
    new, _ = sliced(old, *span)
    axes = (*node.axes[:k], *([] if new is None else [new]), *node.axes[k + 1 :])
    if isinstance(node, Array):
        numbers = node.values[(slice(None),) * k + (slice(*span),)]
        return array(graph, numbers.squeeze(k) if new is None else numbers, axes)
    inside = cut_inside(node, k, axes, lambda x, j: take_node(x, j, *span))
    if inside is not None or (inside := _taken_inside(node, k, span)) is not None:
        return graph.derive(node, inside, lambda g: part_pullback(g, k, old, span))
    # Of a matrix rows may be read alone and together (positions): only stacked matrices are taken apart.
    if new is None and len(node.axes) > 2 and (part := slice_of_weights(node, k, start)) is not None:
        return part
    if step == 1 and stop is not None and (part := part_of(node, k, start, stop)) is not None:
        return part
    return graph.make(Take, axes, [node.whole], (k, *span))


def slice_of_weights(node: Node, k: int, position: int) -> Leaf | None:
    """One position of an axis of independent weights: weights of their own. None of other nodes, or of one used as a whole.

    What reads the whole afterwards depends on the slices, and is not taken for independent of them.
    """
    if not isinstance(node, Leaf) or node.name[0] == "orthonormal":
        return None
    graph = node.graph
    along, whole = _SLICED.once(graph, node.id, lambda: (k, _only_sliced(node, k)))
    if along != k or whole is None:
        return None
    axes = (*node.axes[:k], *node.axes[k + 1 :])
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
    source = node.args[0].node if node.args else node
    if isinstance(node, Permute):
        at = node.params[k]
        part = take_node(source, at, *span)
        if len(part.axes) == len(source.axes):
            return permute(part, node.params)
        return permute(part, [j - (j > at) for j in node.params if j != at]) if part.axes else part
    if isinstance(node, Take) and node.params[0] == k and len(node.axes) == len(source.axes):
        left = range(source.axes[k].size)[slice(*node.params[1:])][slice(*span)]
        return take_node(source, k, left.start, left.stop if left.stop >= 0 else None, left.step)
    return None


@rule("slice", entrywise=True)
def slice_(interpreter: Context, eqn: Any, x: Value) -> Value:
    p = eqn.params
    spans = zip(p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(x.dims), strict=True)
    return functools.reduce(lambda x, span: take(x, span[0], *span[1]), enumerate(spans), x)


@rule("split", entrywise=True)
def split_rule(interpreter: Context, eqn: Any, x: Value) -> list[Value]:
    edges = np.cumsum([0, *eqn.params["sizes"]])
    return [take(x, eqn.params["axis"], int(a), int(b)) for a, b in itertools.pairwise(edges)]


@rule("dynamic_slice")
def dynamic_slice(interpreter: Context, eqn: Any, x: Value, *starts: Value) -> Any:
    """From known starts on a slice; from random ones on it is drawn."""
    out = x
    for d, (size, start) in enumerate(zip(eqn.params["slice_sizes"], starts, strict=True)):
        known = 0 if size == x.shape[d] else interpreter.concrete(start)
        if known is None:
            return drawn_region(interpreter, eqn, (x, *starts), "a slice from a random place on")
        first = int(np.clip(known, 0, x.shape[d] - size))
        out = take(out, d, first, first + size)
    return out


@rule("iota", entrywise=True)
def iota(interpreter: Context, eqn: Any, *_: Value) -> Value:
    p = eqn.params
    numbers = interpreter.known(np.arange(p["shape"][p["dimension"]]))
    return layout.broadcast_in_dim(numbers, p["shape"], (p["dimension"],))


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
    x = merged(materialize(x, d), d)
    k, table = x.dims[d][0].axis if x.dims[d] else None, x.node.table
    if k is None:
        return x  # one position
    drifts = x.node.axes[k].size > MOST_CLASSES and table.total_mean**2 > LEADING_ORDER * table.mean_square
    if drifts and interpreter.ask("running sums that drift over more places than are told apart"):
        return placeholder(interpreter, eqn.outvars[0].aval)
    return Value(mapped(x.node, k, lower_triangle(x.node.axes[k], reverse=eqn.params["reverse"])), x.dims)
