"""Contractions: linear nodes of two arguments, one of which is often weights."""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.nodes import Leaf, Node, View
from varscale.theory.graph.reshapes import Rearranged


class Contract(Node):
    """Σ x·y over the last `len(params)` axes of a frame; `params` is those axes (the frame is this node's axes and them).

    For independent x and y second moments are exact: over the types t of the pairs of contracted indices (agreeing or not),

        E[(Σ_a x_ia y_aj) (Σ_b x_i'b y_bj')] = Σ_t (pairs of type t) M_x(i i', t) M_y(t, j j').

    As a sum over many terms it is taken for Gaussian.
    """

    def prepare(self) -> None:
        x, y = (v.node for v in self.args)
        own = weight_of(self)
        # A weight that was applied before is as good as fresh: what its earlier uses leave behind is of order
        # 1/width.
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
        second = full_types(second, frame)
        for k in reversed(range(len(self.axes), len(frame))):
            second = contract_axis(second, k, frame[k].pairs)
        return second


def weight_of(node: Node) -> Leaf | None:
    """The random weight that a linear node applies, if it applies one; looking up, adding up and cutting are linear too."""
    while len(node.args) >= 1 and (node.moves or node.collects):
        node = node.args[0].node
    if node.width is None:
        return None
    for source, _ in node.args:
        while isinstance(source, Rearranged):
            source = source.args[0].node
        if isinstance(source, Leaf) and source.odd and not source.is_input:
            return source
    return None


def applies_weights(node: Node) -> TypeGuard[Contract]:
    return isinstance(node, Contract) and weight_of(node) is not None


def operands(node: Contract) -> tuple[View, View]:
    """The weights of a product, and what they multiply."""
    x, y = node.args
    return (x, y) if weight_of(node) in (x.node, *_sources(x.node)) else (y, x)


def _sources(node: Node) -> list[Node]:
    """What a rearranged array is rearranged from."""
    out = []
    while len(node.args) == 1:
        node = node.args[0].node
        out.append(node)
    return out
