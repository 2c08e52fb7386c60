"""Nodes that are linear along one axis: slices, concatenations, and any other sparse map of it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np

from varscale.theory.domain.axes import Axis, pair_map
from varscale.theory.domain.axis_maps import AxisMap
from varscale.theory.graph.nodes import Constant, Node, View
from varscale.theory.graph.store import Fact


class Take(Node):
    """A slice of one axis; `params` is (axis, start, stop, step). One position left drops the axis."""

    moves = True

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def types_map(self, new: Axis | None, classes: np.ndarray) -> np.ndarray:
        """The map from types of the whole axis to those of the slice, (new, old); of one position "the same" alone."""
        return pair_map(classes) if new is not None else pair_map(classes)[:1]


class Concat(Node):
    """Arrays one after another along an axis, each part a class; `params` is (axis, sizes)."""

    def prepare(self) -> None:
        odd = -1
        for view in self.args:
            odd &= view.node.odd if not (isinstance(view.node, Constant) and view.node.params == 0) else -1
        self.odd = max(odd, 0)
        self.positive = all(v.node.positive for v in self.args)

    def parts(self) -> list[tuple[View, tuple[Axis, ...], np.ndarray]]:
        """Each argument, its frame, and the share of each class of the whole that its classes take (whole, own)."""
        k, sizes = self.params
        out, start = [], 0
        whole = self.axes[k]
        for view, n in zip(self.args, sizes, strict=True):
            own = next((view.node.axes[j] for j, b in enumerate(view.bind) if b == k), None)
            axis = own or Axis(max(n, 2))
            shares = np.zeros((whole.classes, axis.classes))
            np.add.at(shares, (whole.label_array[start : start + n], axis.label_array[:n]), 1.0)
            out.append((view, (*self.axes[:k], axis, *self.axes[k + 1 :]), shares / whole.counts[:, None]))
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
