"""Linear nodes: entries moved (an axis cut into factors, axes merged or permuted), contractions, maps of an axis, lookups.

Elementwise nodes and sums let what moves entries through to what they are made of, and means let through what happens to the
axes that they leave: the normal form in which equal things are equal nodes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, affordable, contract_axes, contract_axis
from varscale.theory.domain.axis_maps import AxisMap, entry_map, factor_classes, merge_types, split_axis
from varscale.theory.domain.tables import Table, full_types, lift, put_together
from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Array,
    Constant,
    Leaf,
    Node,
    View,
    array,
    cut_inside,
    pullback,
    rebuild,
    second_moments,
)
from varscale.theory.graph.store import BackwardNotes, Fact


class Rearranged(Node):
    """The entries of one array, each once, at other places."""

    moves = True

    def before(self, k: int) -> tuple[int, ...]:
        """The axes of its argument that axis k is, is made of, or is a factor of."""
        raise NotImplementedError


def unmoved(node: Node) -> Node:
    """What a rearranged array is rearranged from."""
    while isinstance(node, Rearranged):
        node = node.args[0].node
    return node


class Split(Rearranged):
    """One axis as row-major factors; `params` is (axis, sizes). Classes of the whole are theirs, if not too many."""

    def before(self, k: int) -> tuple[int, ...]:
        first, sizes = self.params
        return (k if k < first else max(first, k - len(sizes) + 1),)

    def finest(self) -> tuple[tuple[Axis, ...], np.ndarray]:
        """Its axes with all classes of the whole, and the type of the whole for each combination of the factors' types."""
        k, sizes = self.params
        whole = self.args[0].node.axes
        factors, types = split_axis(whole[k], sizes)
        return (*whole[:k], *factors, *whole[k + 1 :]), types

    def reindex(self, second: np.ndarray) -> np.ndarray:
        """A type array of the whole, read over the factors."""
        axes, types = self.finest()
        second = np.take(second, types, axis=self.params[0])
        return lift(second, axes, range(len(axes)), self.axes, pairs=True)


@second_moments.register(Split)
def second_moments_of_split(node: Split) -> Table:
    k, sizes = node.params
    table, (axes, _) = node.args[0].node.table, node.finest()
    factors = axes[k : k + len(sizes)]
    classes = factor_classes(table.axes[k], factors)
    read = classes[np.ix_(*[f.label_array for f in factors])].ravel()
    strangers = float(np.mean(read != table.axes[k].label_array))
    if strangers > 0:  # positions of other classes, which factors with few classes cannot tell apart
        doubt = strangers * float(np.ptp(table.diagonal)) / max(table.mean_square, 1e-300)
        node.graph.flag("assumed", min(doubt, UNKNOWN))
    mean = lift(np.take(table.mean, classes, axis=k), axes, range(len(axes)), node.axes, pairs=False)
    return Table(node.axes, mean, node.reindex(table.second))


@pullback.register(Split)
def pullback_of_split(node: Split, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    return [put_together(cotangent, node.axes, node.args[0].node.axes, *node.params)]


class Merge(Rearranged):
    """Adjacent axes as one, row-major; `params` is (first axis, how many)."""

    def before(self, k: int) -> tuple[int, ...]:
        first, count = self.params
        return tuple(range(first, first + count)) if k == first else (k if k < first else k + count - 1,)

    def reindex(self, second: np.ndarray) -> np.ndarray:
        """A type array of the factors, averaged over the pairs of each type of the whole."""
        k, count = self.params
        return merge_types(second, k, self.args[0].node.axes[k : k + count], self.axes[k])


@second_moments.register(Merge)
def second_moments_of_merge(node: Merge) -> Table:
    k, count = node.params
    table = node.args[0].node.table
    mean = table.mean
    for axis in table.axes[k : k + count]:
        mean = contract_axis(mean, k, axis.counts / axis.size)
    return Table(node.axes, np.expand_dims(mean, k), node.reindex(table.second))


@pullback.register(Merge)
def pullback_of_merge(node: Merge, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    (k, count), inner = node.params, node.args[0].node.axes
    factors, types = split_axis(node.axes[k], tuple(f.size for f in inner[k : k + count]))
    axes = (*inner[:k], *factors, *inner[k + count :])
    return [lift(np.take(cotangent, types, axis=k), axes, range(len(axes)), inner, pairs=True)]


class Permute(Rearranged):
    """Axes in another order; `params` is the order."""

    def before(self, k: int) -> tuple[int, ...]:
        return (self.params[k],)


@second_moments.register(Permute)
def second_moments_of_permute(node: Permute) -> Table:
    table = node.args[0].node.table
    return Table(node.axes, table.mean.transpose(node.params), table.second.transpose(node.params))


@pullback.register(Permute)
def pullback_of_permute(
    node: Permute, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    return [cotangent.transpose(np.argsort(node.params))]


def split(node: Node, k: int, sizes: tuple[int, ...]) -> Node:
    """`node` with axis k as row-major factors of these sizes (each ≥ 2)."""
    graph, more = node.graph, len(sizes) - 1
    axes = affordable((*node.axes[:k], *split_axis(node.axes[k], sizes)[0], *node.axes[k + 1 :]))
    if node.entrywise:
        views = []
        for child, bind in node.args:
            places = (range(b, b + more + 1) if b == k else [b + more * (b > k)] for b in bind)
            child = split(child, bind.index(k), sizes) if k in bind else child
            views.append(View(child, tuple(itertools.chain(*places))))
        made = rebuild(node, axes, views)
    else:
        made = cut_inside(node, k, lambda x, j: split(x, j, sizes))
    if made is not None:
        return graph.derive(node, made, lambda g: put_together(g, made.axes, node.axes, k, sizes))
    if isinstance(node, Merge) and node.params[0] == k:
        source = node.args[0].node
        if tuple(a.size for a in source.axes[k : k + node.params[1]]) == sizes:
            return source
    if isinstance(node, Array):
        return array(graph, node.values.reshape([a.size for a in axes]), axes)
    return graph.make(Split, axes, [node.whole], (k, sizes))


def merge(node: Node, k: int, count: int) -> Node:
    """`node` with axes k, ..., k + count − 1 as one."""
    sizes = tuple(a.size for a in node.axes[k : k + count])
    if count == 1:
        return node
    if isinstance(node, Split) and node.params == (k, sizes):
        return node.args[0].node
    axes = (*node.axes[:k], Axis(math.prod(sizes)), *node.axes[k + count :])
    if isinstance(node, Array):
        return array(node.graph, node.values.reshape([a.size for a in axes]), axes)
    return node.graph.make(Merge, axes, [node.whole], (k, count))


def constant_along(node: Node, k: int) -> bool:
    """Whether all entries along an axis are one: an elementwise node or a sum of what has no such axis."""
    return node.entrywise and all(
        k not in v.bind or constant_along(v.node, v.bind.index(k)) for v in node.args
    )


def permute(node: Node, order: Sequence[int]) -> Node:
    """`node` with its axes in another order, for the few rules that need a given one."""
    if tuple(order) == tuple(range(len(order))):
        return node
    axes = tuple(node.axes[k] for k in order)
    if isinstance(node, Array):
        return array(node.graph, node.values.transpose(order), axes)
    if isinstance(node, Permute):
        source, bind = node.args[0]
        return permute(source, [bind.index(k) for k in order])
    inverse = tuple(int(i) for i in np.argsort(order))
    return node.graph.make(Permute, axes, [View(node, inverse)], tuple(order))


class Contract(Node):
    """Σ x·y over the last `len(params)` axes of a frame; `params` is those axes (the frame is this node's axes and them).

    For independent x and y second moments are exact: over the types t of the pairs of contracted indices (agreeing or not),

        E[(Σ_a x_ia y_aj) (Σ_b x_i'b y_bj')] = Σ_t (pairs of type t) M_x(i i', t) M_y(t, j j').

    As a sum over many terms it is taken for Gaussian.
    """

    def prepare(self) -> None:
        x, y = (v.node for v in self.args)
        own = weight_of(self)  # applied before, it is as good as fresh: what that leaves is of order 1/width
        self.odd = (x.odd & y.unseen) | (y.odd & x.unseen) | (own.odd if own else 0)
        self.positive = x.positive and y.positive

    @property
    def frame(self) -> tuple[Axis, ...]:
        """What its arguments are read over: its own axes, then the contracted ones."""
        return (*self.axes, *self.params)

    @property
    def width(self) -> int:
        """Terms in a sum."""
        return math.prod(a.size for a in self.params)

    def contract(self, second: np.ndarray) -> np.ndarray:
        """Sum a type array of the frame over the contracted axes."""
        frame = self.frame
        pairs = {k: frame[k].pairs for k in range(len(self.axes), len(frame))}
        return contract_axes(full_types(second, frame), pairs)


class AppliedWeights(NamedTuple):
    """Random weights that a node applies."""

    leaf: Leaf  # as they were drawn
    view: View  # as they are read
    x: View  # what they multiply
    units: tuple[int, ...]  # axes of the node along which it has weights of its own


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
    """The random weight that a linear node applies, if it applies one; looking up, adding up and cutting are linear too."""
    while node.args and (node.moves or node.collects):
        node = node.args[0].node
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
            seen.update(v.node for v in node.args)
    return False


class Take(Node):
    """A slice of one axis; `params` is (axis, start, stop, step). One position left drops the axis."""

    moves = True


class Concat(Node):
    """Arrays one after another along an axis, each part a class; `params` is (axis, sizes)."""

    def prepare(self) -> None:
        parts = [v.node for v in self.args if not (isinstance(v.node, Constant) and v.node.params == 0)]
        self.odd = max(functools.reduce(lambda bits, node: bits & node.odd, parts, -1), 0)
        self.positive = all(v.node.positive for v in self.args)

    def parts(self) -> list[tuple[View, tuple[Axis, ...], np.ndarray]]:
        """Each argument, its frame, and the share of each class of the whole that its classes take (whole, own)."""
        k, sizes = self.params
        out, start = [], 0
        for view, n in zip(self.args, sizes, strict=True):
            own = next((view.node.axes[j] for j, b in enumerate(view.bind) if b == k), None)
            axis = own or Axis(max(n, 2))
            shares = entry_map(np.arange(start, start + n), np.arange(n), self.axes[k], axis).means()
            out.append((view, (*self.axes[:k], axis, *self.axes[k + 1 :]), shares))
            start += n
        return out


_MAPS: Fact[Hashable, AxisMap] = Fact()  # by a digest of the entries, and the axes


class AxisMapped(Node):
    """y_p = Σ_i A_pi x_i along one axis; `params` is (axis, key of the map)."""

    @property
    def axis_map(self) -> AxisMap:
        """A."""
        return _MAPS.of(self.graph)[self.params[1]]

    def prepare(self) -> None:
        x = self.args[0].node
        self.odd, self.positive = x.odd, x.positive and bool(np.all(self.axis_map.weights >= 0))


def mapped(node: Node, k: int, axis_map: AxisMap) -> AxisMapped:
    """A map of axis k of a node.

    Args:
        node: x.
        k: which of its axes the map is of, `axis_map.inner`.
        axis_map: A; its `out` is the axis of y, of size 2 or more.
    """
    entries = [np.ascontiguousarray(x) for x in (axis_map.rows, axis_map.columns, axis_map.weights)]
    digest = hashlib.sha1(b"".join(x.tobytes() for x in entries)).hexdigest()
    key = (digest, axis_map.out, axis_map.inner)
    _MAPS.put(node.graph, key, axis_map)
    axes = (*node.axes[:k], axis_map.out, *node.axes[k + 1 :])
    return node.graph.make(AxisMapped, axes, [View(node, tuple(range(len(axes))))], (k, key))


INDICES: Fact[Any, np.ndarray] = Fact()  # known indices by digest


class GatherParams(NamedTuple):
    """What is looked up where.

    Attributes:
        row_axes: the axes of the table along which rows are.
        index_axes: the axes of the output that are the indices'.
        rates: P(same row) over the types of the indices, flat; None: rows are as likely as one another.
        rows: how many rows there are.
        ids: the indices: the key of known ones in the store, or the node of unknown ones.
    """

    row_axes: tuple[int, ...]
    index_axes: tuple[int, ...]
    rates: Any
    rows: Any
    ids: Any


class Gather(Node):
    """Rows of a table by index; the frame of its view is this node's axes and then the rows' own."""

    params: GatherParams
    collects = True

    def prepare(self) -> None:
        """What indices are computed from decides, too: the nearest row is no row like others, and may turn with the table."""
        picker = self.params.ids
        if isinstance(picker, Node):
            self.deps |= picker.deps
            self.odd &= picker.unseen
            self.even &= picker.unseen

    @property
    def known(self) -> np.ndarray | None:
        """The indices, flat, where they are known."""
        return INDICES.get(self.graph, self.params.ids)

    @property
    def line(self) -> np.ndarray | None:
        """The known indices where they run over one axis and pick along one."""
        return self.known if len(self.params.row_axes) == len(self.params.index_axes) == 1 else None

    @property
    def indexed(self) -> list[Axis]:
        """The axes of the indices."""
        return [self.axes[k] for k in self.params.index_axes]

    def rates(self) -> np.ndarray:
        """P(same row) over the types of the indices."""
        rates, rows = self.params.rates, self.params.rows
        if rates is not None:
            return np.array(rates).reshape([axis.types for axis in self.indexed])
        same = functools.reduce(np.logical_and.outer, [axis.agrees for axis in self.indexed], np.array(True))
        return np.where(same, 1.0, 1.0 / rows)
