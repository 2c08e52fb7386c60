"""Arrays whose entries are moved, none dropped or repeated: an axis cut into factors, axes merged, axes in another order.

Elementwise nodes and sums let such a move through to what they are made of, and means let through what happens to the axes
that they leave: the normal form in which equal things are equal nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, affordable, contract_axis
from varscale.theory.domain.axis_maps import factor_classes, merge_types, split_axis
from varscale.theory.domain.tables import Table, lift, put_together
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Array,
    Node,
    View,
    array,
    cut_inside,
    pullback,
    rebuild,
    second_moments,
)
from varscale.theory.graph.store import BackwardNotes, once_per_node


class Rearranged(Node):
    """The entries of one array, each once, at other places."""

    moves = True

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

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
    k, count = node.params
    factors = node.args[0].node.axes[k : k + count]
    _, types = split_axis(node.axes[k], tuple(f.size for f in factors))
    out = np.take(cotangent, types, axis=k)
    for i, factor in enumerate(factors):
        if factor.classes > 1:
            out = np.take(out, np.where(factor.agrees, 0, 1), axis=k + i)
    return [out]


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
    graph = node.graph
    factors, _ = split_axis(node.axes[k], sizes)
    axes = affordable((*node.axes[:k], *factors, *node.axes[k + 1 :]))
    if node.entrywise:
        shift = len(sizes) - 1
        args = []
        for child, bind in node.args:
            if k in bind:
                j = bind.index(k)
                child = split(child, j, sizes)
                bind = (*bind[:j], *range(k, k + shift + 1), *bind[j + 1 :])
                keep = range(j, j + shift + 1)
            else:
                keep = range(0)
            args.append(
                View(child, tuple(b if i in keep or b < k else b + shift for i, b in enumerate(bind)))
            )
        rebuilt = rebuild(node, axes, args)
        return graph.derive(node, rebuilt, lambda g: put_together(g, rebuilt.axes, node.axes, k, sizes))
    inside = cut_inside(node, k, lambda x, j: split(x, j, sizes))
    if inside is not None:
        return graph.derive(node, inside, lambda g: put_together(g, inside.axes, node.axes, k, sizes))
    if isinstance(node, Merge) and node.params[0] == k:
        source = node.args[0].node
        if tuple(a.size for a in source.axes[k : k + node.params[1]]) == sizes:
            return source
    if isinstance(node, Array):
        return _reshaped(node, axes)
    return graph.make(Split, axes, [node.whole], (k, sizes))


def merge(node: Node, k: int, count: int) -> Node:
    """`node` with axes k, ..., k + count − 1 as one."""
    if count == 1:
        return node
    graph, factors = node.graph, node.axes[k : k + count]
    if isinstance(node, Split) and node.params[0] == k and tuple(a.size for a in factors) == node.params[1]:
        return node.args[0].node
    size = int(np.prod([a.size for a in factors]))
    whole = Axis(size)
    axes = (*node.axes[:k], whole, *node.axes[k + count :])
    if isinstance(node, Array):
        return _reshaped(node, axes)
    return graph.make(Merge, axes, [node.whole], (k, count))


def constant_along(node: Node, k: int) -> bool:
    """Whether all entries along an axis are one: an elementwise node or a sum of what has no such axis."""
    return node.entrywise and all(
        k not in v.bind or constant_along(v.node, v.bind.index(k)) for v in node.args
    )


def permute(node: Node, order: Sequence[int]) -> Node:
    """`node` with its axes in another order, for the few rules that need a given one."""
    if tuple(order) == tuple(range(len(order))):
        return node
    inverse = tuple(int(i) for i in np.argsort(order))
    axes = tuple(node.axes[k] for k in order)
    if isinstance(node, Array):
        return _transposed(node, tuple(order))
    if isinstance(node, Permute):
        source, bind = node.args[0]
        return permute(source, [bind.index(k) for k in order])
    return node.graph.make(Permute, axes, [View(node, inverse)], tuple(order))


@once_per_node
def _reshaped(node: Array, axes: tuple[Axis, ...]) -> Node:
    """Known numbers over other axes, row-major."""
    return array(node.graph, node.values.reshape([a.size for a in axes]), axes)


@once_per_node
def _transposed(node: Array, order: tuple[int, ...]) -> Node:
    """Known numbers with their axes in another order."""
    return array(node.graph, node.values.transpose(order), tuple(node.axes[k] for k in order))
