"""One joint draw of a model in its order in time: what its layers have in common, the draws of all of them have in common.

Each array is drawn once, at all steps and at some of its units and samples, from what it is made of: so every layer costs the
same, however deep it lies, and of a sum whose terms belong together, or a norm and what it divides, nothing is drawn apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.nodes import Array, Graph, Leaf
from varscale.theory.graph.store import Fact
from varscale.theory.propagation.sampler import TERMS, Drawing, evenly

_BUDGET = 1_000_000  # numbers drawn for one array
_FEWEST, _MOST = 8, 64  # draws
_BATCH_SAMPLES = 4  # of a batch
_KNOWN = 128  # positions, up to which an axis is drawn whole along which something is known number by number


def steps(graph: Graph) -> set[int]:
    """How many steps the recurrences and loops of a graph have: such axes are drawn whole."""
    return _STEPS.once(graph, None, set)


def joint_drawing(graph: Graph, frame: Sequence[Axis]) -> Drawing:
    """The draws of a graph; where there are none yet, as many as can be had of an array over this frame."""

    def work() -> Drawing:
        leaves = [x for x in graph.nodes.values() if isinstance(x, Leaf) and not x.is_bits]
        units = {a.size for x in leaves if not x.is_input for a in x.axes}
        samples = {a.size for x in leaves if x.is_input for a in x.axes} - units
        known = {x.axes[0].size for x in graph.nodes.values() if isinstance(x, Array) and len(x.axes) == 1}

        @functools.cache
        def some(axis: Axis) -> Int[np.ndarray, " kept"]:
            n = axis.size
            if n in steps(graph) or (n <= _KNOWN and n in known):
                return np.arange(n)
            return _with_all_classes(axis, evenly(n, _BATCH_SAMPLES if n in samples else TERMS))

        numbers = math.prod(len(some(axis)) for axis in frame)
        return Drawing(int(np.clip(_BUDGET // max(numbers, 1), _FEWEST, _MOST)), 0, some)

    return _DRAWINGS.once(graph, None, work)


def _with_all_classes(axis: Axis, kept: Int[np.ndarray, " kept"]) -> Int[np.ndarray, " more"]:
    """Positions, and the first one of every class that none of them is of."""
    labels = axis.label_array
    missing = set(range(axis.classes)) - set(labels[kept].tolist())
    return np.union1d(kept, [int(np.argmax(labels == c)) for c in missing]).astype(int) if missing else kept


_STEPS: Fact[None, set[int]] = Fact()
_DRAWINGS: Fact[None, Drawing] = Fact()
