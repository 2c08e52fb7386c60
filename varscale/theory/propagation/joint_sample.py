"""One joint draw of a model in its order in time: what its layers have in common, the draws of all of them have in common.

Each array is drawn once, at all steps and at some of its units and samples, from what it is made of: so every layer costs the
same, however deep it lies, and of a sum whose terms belong together, or a norm and what it divides, nothing is drawn apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.nodes import Array, Graph, Leaf, View
from varscale.theory.graph.store import Fact
from varscale.theory.propagation.sampler import TERMS, Drawing, evenly

_BUDGET = 1_000_000  # numbers drawn for one array
_FEWEST, _MOST = 8, 64  # draws
_BATCH_SAMPLES = 4  # of a batch
_KNOWN = 128  # positions, up to which an axis is drawn whole along which something is known number by number


class Ensemble:
    """The draws of one graph.

    Attributes:
        graph: the graph.
        replicates: how many there are.
    """

    def __init__(self, graph: Graph, frame: Sequence[Axis]):
        self.graph = graph
        self._at: dict[Axis, np.ndarray] = {}
        numbers = math.prod(len(self.positions(axis)) for axis in frame)
        self.replicates = int(np.clip(_BUDGET // max(numbers, 1), _FEWEST, _MOST))
        self.drawing = Drawing((), self.replicates, 0, self.positions)

    def positions(self, axis: Axis) -> Int[np.ndarray, " kept"]:
        """The positions of an axis that are drawn, the same wherever it is met."""
        if axis not in self._at:
            self._at[axis] = self._chosen(axis)
        return self._at[axis]

    def _chosen(self, axis: Axis) -> Int[np.ndarray, " kept"]:
        n = axis.size
        if n in steps(self.graph) or (n <= _KNOWN and n in self._sizes[1]):
            return np.arange(n)
        return _with_all_classes(axis, evenly(n, _BATCH_SAMPLES if n in self._sizes[0] else TERMS))

    @functools.cached_property
    def _sizes(self) -> tuple[set[int], set[int]]:
        """Of axes that inputs have and no parameter, and of those along which something is known number by number."""
        nodes = list(self.graph.nodes.values())
        units = {
            a.size for x in nodes if isinstance(x, Leaf) and not x.is_input and not x.is_bits for a in x.axes
        }
        samples = {a.size for x in nodes if isinstance(x, Leaf) and x.is_input for a in x.axes}
        return samples - units, {
            a.size for x in nodes if isinstance(x, Array) and len(x.axes) == 1 for a in x.axes
        }

    def values(self, view: View, frame: Sequence[Axis]) -> Float[np.ndarray, "..."]:
        """A view over a frame, (positions..., replicates)."""
        positions = [self.positions(axis) for axis in frame]
        found = self.drawing.over(frame).values(view, positions)
        return np.broadcast_to(found, [*map(len, positions), self.replicates])


def _with_all_classes(axis: Axis, kept: Int[np.ndarray, " kept"]) -> Int[np.ndarray, " more"]:
    """Positions, and the first one of every class that none of them is of."""
    missing = set(range(axis.classes)) - set(axis.label_array[kept].tolist())
    return (
        np.union1d(kept, [int(np.argmax(axis.label_array == c)) for c in missing]).astype(int)
        if missing
        else kept
    )


def steps(graph: Graph) -> set[int]:
    """How many steps the recurrences and loops of a graph have: such axes are drawn whole."""
    return _STEPS.once(graph, None, set)


def ensemble(graph: Graph, frame: Sequence[Axis]) -> Ensemble:
    """The draws of a graph; as many as can be had of an array over this frame, where there are none yet."""
    return _ENSEMBLES.once(graph, None, lambda: Ensemble(graph, frame))


_STEPS: Fact[None, set[int]] = Fact()
_ENSEMBLES: Fact[None, Ensemble] = Fact()
