"""Linear nodes: entries moved (an axis cut into factors, axes merged or permuted), contractions, maps of an axis, lookups.

Elementwise nodes and sums let what moves entries through to what they are made of, and means let through what happens to the
axes that they leave: the normal form in which equal things are equal nodes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axes, Axis, apply_axis, contract_axes, outer, replaced
from varscale.theory.domain.axis_maps import (
    AxisMap,
    cotangent_counts,
    entry_map,
    identity_map,
    pair_counts,
    slice_map,
    split_axis,
)
from varscale.theory.domain.tables import Table, full_types, regrouped
from varscale.theory.graph.convolutions import Conv, WindowSum, window_map
from varscale.theory.graph.expressions import as_affine
from varscale.theory.graph.nodes import UNKNOWN, Constant, Leaf, Node, View, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact, Flows, once_per_node


class Rearranged(Node):
    """The entries of one array, each once, at other places; `params` is an axis of the whole and the sizes of its factors."""

    moves = True

    def carried(self, array: np.ndarray, *, pairs: bool, back: bool = False) -> np.ndarray:
        """A class (with `pairs` a type) array of the argument, read over its own axes; or back."""
        axes, out = (self.argument.axes, self.axes)[:: -1 if back else 1]
        return regrouped(array, axes, out, *self.params, pairs=pairs)


class Split(Rearranged):
    """One axis as row-major factors. Classes of the whole are theirs, if not too many."""


class Merge(Rearranged):
    """Adjacent axes as one, row-major."""


class Permute(Rearranged):
    """Axes in another order; `params` is the order."""

    def carried(self, array: np.ndarray, *, pairs: bool, back: bool = False) -> np.ndarray:
        return array.transpose(np.argsort(self.params) if back else self.params)


def axes_before(node: Node, k: int) -> Sequence[int]:
    """The axes of its argument that axis k of a rearranged node comes from: itself, its factors, or what it is a factor of."""
    first, more = node.params[0], len(node.argument.axes) - len(node.axes)
    if isinstance(node, Permute):
        return [node.params[k]]
    if isinstance(node, Merge) and k == first:
        return range(first, first + more + 1)
    return [k if k < first else max(first, k + more)]


def unmoved(node: Node) -> Node:
    """What a rearranged array is rearranged from."""
    while isinstance(node, Rearranged):
        node = node.argument
    return node


@second_moments.register(Permute | Merge | Split)
def second_moments_of_rearranged(node: Rearranged) -> Table:
    table = node.argument.table
    k, *sizes = node.params
    if isinstance(node, Split) and (strangers := split_axis(table.axes[k], *sizes).strangers):
        # Whom factors with few classes cannot tell apart.
        doubt = strangers * float(np.ptp(table.diagonal)) / table.divisor
        node.graph.flag("assumed", min(doubt, UNKNOWN))
    return Table(node.axes, node.carried(table.mean, pairs=False), node.carried(table.second, pairs=True))


@pullback.register(Permute | Merge | Split)
def pullback_of_rearranged(node: Rearranged, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    return [node.carried(cotangent, pairs=True, back=True)]


def constant_along(node: Node, k: int) -> bool:
    """Whether all entries along an axis are one: of an elementwise node or a sum of what has no such axis, however laid out."""
    if isinstance(node, Rearranged):
        return all(constant_along(node.argument, j) for j in axes_before(node, k))
    return node.entrywise and all(
        k not in v.bind or constant_along(v.node, v.bind.index(k)) for v in node.args
    )


class Contract(Node):
    """Σ x·y over the last axes of a frame, its `params`; a sum over many terms (`width`), and so taken for Gaussian.

    For independent x and y second moments are exact: over the types t of the pairs of contracted indices,

        E[(Σ_a x_ia y_aj) (Σ_b x_i'b y_bj')] = Σ_t (pairs of type t) M_x(i i', t) M_y(t, j j').
    """

    width: float  # pyright: ignore[reportIncompatibleVariableOverride] set by prepare

    def prepare(self) -> None:
        x, y = self.sources
        self.width = math.prod(a.size for a in self.params)
        own = weight_of(self)  # applied before, it is as good as fresh: what that leaves is of order 1/width
        self.odd = (x.odd & y.unseen) | (y.odd & x.unseen) | (own.odd if own else 0)
        self.positive = x.positive and y.positive

    @property
    def frame(self) -> Axes:
        """Its own axes, then the contracted ones."""
        return (*self.axes, *self.params)

    @property
    def summed(self) -> range:
        """The contracted axes of the frame."""
        return range(len(self.axes), len(self.frame))

    def contract(self, second: np.ndarray) -> np.ndarray:
        """Sum a type array of the frame over the contracted axes."""
        return contract_axes(full_types(second, self.frame), {k: self.frame[k].pairs for k in self.summed})


class AppliedWeights(NamedTuple):
    """Random weights that a node applies."""

    leaf: Leaf  # as they were drawn
    view: View  # as they are read
    x: View  # what they multiply
    units: tuple[int, ...]  # axes of the node along which it has weights of its own


@once_per_node
def applied_weights(node: Node) -> list[AppliedWeights]:
    """The arguments of a contraction or convolution that are random weights of mean zero; of other nodes none."""
    found = []
    for view, x in (node.args, node.args[::-1]) if node.width is not None else ():
        leaf = unmoved(view.node)
        if isinstance(leaf, Leaf) and leaf.odd and not leaf.is_input:
            own = [k for k in view.bind if k < len(node.axes) and k not in x.bind]
            units = node.params.out_dims[1:2] if isinstance(node, Conv) else sorted(own)
            found.append(AppliedWeights(leaf, view, x, tuple(k for k in units if k is not None)))
    return found


def weight_of(node: Node) -> Leaf | None:
    """The random weight that a linear node applies, if it applies one; lookups, sums and slices are linear too."""
    while node.args and (node.moves or node.collects):
        node = node.argument
    return next((applied.leaf for applied in applied_weights(node)), None)


def feeds_itself(*factors: View) -> bool:
    """Whether one of two factors is what weights make of the other: of x (w·x), whose scale is one for all features."""
    for (x, _), (y, _) in (factors, factors[::-1]):
        seen: set[Node] = set()
        reached = [y] if x.deps and weight_of(y) is not None else []
        for node in reached:  # grows: each node once
            if node is x:
                return True
            reached += {v.node: None for v in node.args if v.node.depth >= x.depth and v.node not in seen}
            seen.update(node.sources)
    return False


class Concat(Node):
    """Arrays one after another along an axis, each part a class; `params` is (axis, sizes)."""

    def prepare(self) -> None:
        parts = [x for x in self.sources if not (isinstance(x, Constant) and x.params == 0)]
        self.odd = max(functools.reduce(lambda bits, node: bits & node.odd, parts, -1), 0)
        self.positive = all(x.positive for x in self.sources)


_MAPS: Fact[Hashable, AxisMap] = Fact()  # by a digest of the entries, and the axes


class AxisMapped(Node):
    """y_p = Σ_i A_pi x_i along one axis, A its `axis_map`; `params` is (axis, key of the map)."""

    axis_map: AxisMap

    def prepare(self) -> None:
        self.axis_map, x = _MAPS.of(self.graph)[self.params[1]], self.argument
        self.odd, self.positive = x.odd, x.positive and bool(np.all(self.axis_map.matrix.data >= 0))


class Take(AxisMapped):
    """A slice of one axis; `params` is (axis, start, stop, step). One position left drops the axis."""

    moves = True

    def prepare(self) -> None:
        k, *span = self.params
        self.axis_map = slice_map(tuple(span), self.argument.axes[k])


@second_moments.register
def second_moments_of_axis_mapped(node: AxisMapped | Take) -> Table:
    k, own, table = node.params[0], node.axis_map, node.argument.table
    pairs = own.pair_means() if node.moves else pair_counts(own)
    mean = apply_axis(table.mean, k, own.means()).reshape([axis.classes for axis in node.axes])
    return Table(node.axes, mean, apply_axis(table.second, k, pairs).reshape(node.frame_types))


@pullback.register
def pullback_of_axis_mapped(node: AxisMapped | Take, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    return [carried_back(cotangent, node.params[0], node.axis_map)]


def carried_back(cotangent: np.ndarray, k: int, axis_map: AxisMap) -> np.ndarray:
    """Cotangents behind a map of axis k; where that leaves one position, they do not have the axis."""
    cotangent = cotangent if axis_map.out.size > 1 else np.expand_dims(cotangent, k)
    return apply_axis(cotangent, k, cotangent_counts(axis_map))


def mapped(node: Node, k: int, axis_map: AxisMap) -> AxisMapped:
    """A map of axis k of a node, to two positions or more."""
    matrix = axis_map.matrix
    entries = b"".join(x.tobytes() for x in (matrix.indptr, matrix.indices, matrix.data))
    key = (hashlib.sha1(entries).hexdigest(), axis_map.out, axis_map.inner)
    _MAPS.put(node.graph, key, axis_map)
    axes = replaced(node.axes, k, axis_map.out)
    return node.graph.make(AxisMapped, axes, [node.whole], (k, key))


class Mapped(NamedTuple):
    """An array of which another is made by maps of axes of its frame, one after another, and by a factor."""

    factor: float
    view: View
    maps: Mapping[int, AxisMap] = {}  # by place

    def before(self) -> Mapped | None:
        """One map earlier: windows, maps of an axis, known lookups; None of what is none of these."""
        c, d, (node, bind) = as_affine(self.view)
        if d or not (found := _axis_maps(node)):
            return None
        maps = dict(self.maps)
        bind = tuple(bind[own] for own, _ in found)
        for place, x in ((place, x) for place, (_, x) in zip(bind, found, strict=True) if x is not None):
            y = maps.get(place)
            maps[place] = replace(y, matrix=y.matrix @ x.matrix, inner=x.inner) if y else x
        return Mapped(self.factor * c, View(node.argument, bind), maps)

    def earliest(self) -> Mapped:
        """All maps earlier."""
        before = self.before()
        return before.earliest() if before else self


def _axis_maps(node: Node) -> list[tuple[int, AxisMap | None]]:
    """By axis of its argument: the node's own, and how it is made of that; none of other nodes, and where an axis is gone."""
    axes = node.argument.axes if node.args else ()
    if isinstance(node, AxisMapped) and len(axes) == len(node.axes):
        return [(k, node.axis_map if k == node.params[0] else None) for k in range(len(axes))]
    if isinstance(node, Gather) and node.line is not None:
        (row,), (at,) = node.params[:2]
        own = entry_map(np.arange(len(node.line)), node.line, node.axes[at], axes[row])
        return [(at, own) if k == row else (b, None) for k, b in enumerate(node.args[0].bind)]
    if type(node) is WindowSum:
        windows, xd, od = node.params
        read = zip(axes, ((od[d], windows[d]) for d in map(xd.index, range(len(axes)))), strict=True)
        maps = [(o, w and window_map(w, axis, node.axes[o])) for axis, (o, w) in read if o is not None]
        return maps if len(maps) == len(axes) else []
    return []


def mapped_over(own: AxisMap | None, out: Axis, inner: Axis) -> AxisMap:
    """A map of an axis, or none, over axes with other classes."""
    return replace(own, out=out, inner=inner) if own else identity_map(out, inner)


INDICES: Fact[Any, np.ndarray] = Fact()  # known indices by digest


class GatherParams(NamedTuple):
    """What is looked up where."""

    row_axes: tuple[int, ...]  # of the table, along which rows are
    index_axes: tuple[int, ...]  # of the output, which are the indices'
    rates: Any  # P(same row) over the types of the indices, flat; None: rows are as likely as one another
    rows: Any  # how many there are
    ids: Any  # the key of known indices, or the node of unknown ones


class Gather(Node):
    """Rows of a table by index; the frame of its view is this node's axes and then the rows' own."""

    params: GatherParams
    collects = True

    def prepare(self) -> None:
        """Depend on random indices too: the nearest row is not a typical one, and may change its sign with the table."""
        row_axes, index_axes, _, _, picker = self.params
        self.known = INDICES.get(self.graph, picker)  # indices, flat
        self.line = self.known if len(row_axes) == len(index_axes) == 1 else None
        self.indexed = [self.axes[k] for k in index_axes]
        if isinstance(picker, Node):
            self.deps |= picker.deps
            self.odd &= picker.unseen
            self.even &= picker.unseen

    def rates(self) -> np.ndarray:
        """P(same row) over the types of the indices."""
        same, rates = outer(axis.agrees for axis in self.indexed), self.params.rates
        return np.where(same, 1.0, 1.0 / self.params.rows) if rates is None else np.reshape(rates, same.shape)
