"""Sums by segment as nodes: which positions are added to which output."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import Fact


class Segments(NamedTuple):
    """The sum that each position is added to (−1: none), its weight there, and how many sums there are."""

    ids: np.ndarray
    weights: np.ndarray
    size: int


SEGMENTS: Fact[Hashable, Segments] = Fact()  # by digest


def sums(ids: np.ndarray, weights: np.ndarray, size: int, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the weights and of their squares, by output and by class of the summed axis, (size, classes) each."""
    first, second = np.zeros((size, axis.classes)), np.zeros((size, axis.classes))
    kept = (ids >= 0) & (ids < size)
    place = (ids[kept], axis.label_array[kept])
    np.add.at(first, place, weights[kept])
    np.add.at(second, place, weights[kept] ** 2)
    return first, second


def pair_counts(first: np.ndarray, second: np.ndarray, out: Axis, axis: Axis) -> np.ndarray:
    """Weight of the pairs of each type of the summed axis in a pair of outputs of each type, (types out, types in)."""
    members = np.eye(out.classes)[out.label_array].T
    matrix = np.zeros((out.types, axis.types))
    c, k = out.classes, axis.classes
    within = np.einsum("ci,ik,il->ckl", members, first, first)
    own = members @ second
    matrix[:c, :k] = own
    matrix[:c, k:] = (within - np.einsum("ck,kl->ckl", own, np.eye(k))).reshape(c, k * k)
    total = members @ first
    apart = np.einsum("ck,dl->cdkl", total, total)
    apart[np.arange(c), np.arange(c)] -= within
    matrix[c:, k:] = apart.reshape(c * c, k * k)
    return matrix / np.maximum(out.pairs, 1.0)[:, None]


class SegmentSum(Node):
    """Sums by segment over axis 0 of its argument; `params` is the key of (ids, weights, size) in the graph's store.

    A second argument is the summands as pairs within a segment see them: lookups that agree there agree more often.
    """

    collects = True

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    @property
    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each class of summands in an output's mean, and of each type of pair in its second moments."""
        ids, weights, size = SEGMENTS.of(self.graph)[self.params]
        axis, out = self.args[0].node.axes[0], self.axes[0]
        first, second = sums(ids, weights, size, axis)
        members = np.eye(out.classes)[out.label_array].T / out.counts[:, None]
        return members @ first, pair_counts(first, second, out, axis)


def per_position(node: Node) -> list[Node]:
    """What the summands read at their own positions: lookups and weights by segment, however many layers were put on them."""
    found: dict[int, Node] = {}
    seen, pending = {node.id}, [node]
    while pending:
        node = pending.pop()
        if isinstance(node, Gather | SegmentSum) or node.shares:
            found[node.id] = node
            continue
        before = {v.node.id: v.node for v in node.args if v.node.id not in seen}
        seen.update(before)
        pending += before.values()
    return list(found.values())
