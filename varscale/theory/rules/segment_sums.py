"""Sums by segment as nodes: which positions are added to which output."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axis_maps import entry_map, pair_counts
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import Fact


class Segments(NamedTuple):
    """The sum that each position is added to (−1: none), its weight there, and how many sums there are."""

    ids: np.ndarray
    weights: np.ndarray
    size: int


SEGMENTS: Fact[Hashable, Segments] = Fact()  # by digest


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
        ids, weights, _ = SEGMENTS.of(self.graph)[self.params]
        added = entry_map(ids, np.arange(len(ids)), self.axes[0], self.args[0].node.axes[0], weights)
        return added.means(), pair_counts(added)


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
