"""Places that copy or share numbers with their neighbours, which moments by type take for as alike as any two.

Backward it is windows that make near cotangents alike, and copies and windows that overlap that add them up. What that may
change is bounded here; where it is much the whole model is drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import pool
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.convolutions import WindowSum
from varscale.theory.graph.expressions import Mean
from varscale.theory.graph.linear_nodes import Contract, Gather
from varscale.theory.graph.nodes import Array, Leaf, Node
from varscale.theory.graph.reshapes import Merge, constant_along


class Near(NamedTuple):
    """What cotangents of near places have in common beyond any two.

    Attributes:
        excess: at most, relative to their mean square, after a pullback.
        doubt: relative error of the mean square that the pullback adds for it.
    """

    excess: float
    doubt: float = 0.0


@functools.singledispatch
def pulled_back(node: Node, i: int, excess: float, back: np.ndarray) -> Near:
    """`Near` of argument i of a kind of node, given the excess of its own cotangent and the moments of the argument's.

    Most kinds pass cotangents on place by place; a convolution with fresh weights at places as far apart.
    """
    return Near(excess)


@pulled_back.register(Mean)
def pulled_back_of_mean(node: Mean, i: int, excess: float, back: np.ndarray) -> Near:
    return Near(0.0)


@pulled_back.register(WindowSum)
def pulled_back_of_window_sum(node: WindowSum, i: int, excess: float, back: np.ndarray) -> Near:
    """An entry is in as many windows as there are taps a stride, and those of one window have its cotangent."""
    windows = [(k, w) for w, k in zip(*node.params[:2], strict=True) if w is not None and k is not None]
    met = math.prod(max(w.taps / w.stride, 1.0) for _, w in windows)
    alike = _less_alike(node.args[0].node, back, [k for k, w in windows if w.taps > 1])
    return Near(max(alike, excess), excess * (met - 1))


@pulled_back.register(Gather)
def pulled_back_of_gather(node: Gather, i: int, excess: float, back: np.ndarray) -> Near:
    return Near(excess, excess * (copies(node) - 1) if i == 0 else 0.0)


@pulled_back.register(Merge)
def pulled_back_of_merge(node: Merge, i: int, excess: float, back: np.ndarray) -> Near:
    return Near(excess, excess * (copies(node) - 1))


@pulled_back.register(Contract)
def pulled_back_of_contract(node: Contract, i: int, excess: float, back: np.ndarray) -> Near:
    """A known matrix along an axis: of a cotangent's terms the products of any two are in doubt, too."""
    x, matrix = node.args[i], node.args[1 - i].node
    if not isinstance(matrix, Array) or not node.params:
        return Near(excess)
    sums, squares = np.square(matrix.values.sum()), np.square(matrix.values).sum() * matrix.axes[0].size
    axes = [k for k, place in enumerate(x.bind) if place >= len(node.axes)]
    return Near(max(_less_alike(x.node, back, axes), excess), excess * max(float(sums / squares) - 1, 0.0))


def _less_alike(node: Node, back: np.ndarray, axes: Sequence[int]) -> float:
    """How much less alike than the same two places along some axes are on average, relative to a mean square."""
    if not axes:
        return 0.0
    table = pool(full_types(back, node.axes), node.axes)
    own = float(table[(0,) * table.ndim])
    other = float(table[tuple(1 if k in axes else 0 for k in range(table.ndim))])
    return float(np.clip(1 - other / own, 0.0, 1.0)) if own > 0 else 0.0


def copies(node: Node) -> float:
    """How many places near one another hold one and the same entry: of what is looked up, or merged with repeats of itself."""
    if isinstance(node, Merge):
        k, count = node.params
        source = node.args[0].node
        return math.prod(source.axes[j].size for j in range(k, k + count) if constant_along(source, j))
    source = node.args[0].node
    if (
        not isinstance(node, Gather)
        or node.line is None
        or (isinstance(source, Leaf) and not source.is_input)
    ):
        return 1.0
    return len(node.line) / len(np.unique(node.line))


def repeats(node: Node) -> bool:
    """Whether near places of an array may be copies of one another, or averages of the same numbers, by known weights."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if isinstance(node, Merge | Gather) and copies(node) > 1:
            return True
        if isinstance(node, Contract) and node.params and any(isinstance(v.node, Array) for v in node.args):
            return True
        if node.id not in seen and not isinstance(node, Mean):
            seen.add(node.id)
            pending += [view.node for view in node.args]
    return False
