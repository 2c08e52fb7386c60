"""The law of logits that are functions of others, or few, or positive: softmax takes what is Gaussian for Gaussian alone."""

from __future__ import annotations

import numpy as np
from scipy import special

from varscale.theory.domain.accuracy import NEGLIGIBLE
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import Array, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.marginals import along, concentrated, marginal, over_classes
from varscale.theory.rules.drawn_nodes import draw

_DRAWS = 50_000
_DIGITS = 3


@once_per_node
def standard_law(node: Node) -> tuple[float, ...] | None:
    """Values on the normal grid with mean 0 and variance 1; None where they are a straight line."""
    if isinstance(node, Sum) and any(isinstance(view.node, Array) for view in node.args):
        return None  # known numbers have a doubt of their own
    line = _values_on_grid(node)
    if line is None or len(line) != len(Z):
        return None
    line = line - line @ WEIGHTS
    deviation = float(np.sqrt(line**2 @ WEIGHTS))
    if deviation <= 0:
        return None
    line = line / deviation
    if float((line - np.sign(line @ (WEIGHTS * Z)) * Z) ** 2 @ WEIGHTS) < NEGLIGIBLE**2:
        return None
    return tuple(np.round(line, _DIGITS).tolist())


def _values_on_grid(node: Node) -> np.ndarray | None:
    """Values on the normal grid; None where they are Gaussian."""
    if not isinstance(node, Apply):
        law = marginal(node)
        return None if law.gaussian else over_classes(law.values, node.axes)
    live = [r for r in roots(node) if not concentrated(r.node)]
    if len(live) == 1:
        return over_classes(along(View(node, tuple(range(len(node.axes)))), node.axes, *live), node.axes)

    drawn = draw(node, [1] * len(node.axes), _DRAWS, np.random.default_rng(0)).ravel()
    return np.quantile(drawn, special.ndtr(Z))
