"""Factors of a product that are not as they are taken: averages and terms of the others, what one weight makes twice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.accuracy import NEGLIGIBLE, ROUGH
from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots_of
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import UNKNOWN, Node, View
from varscale.theory.propagation.marginals import evaluate, marginal

_NORM = 0.1  # how far from −1 the logarithmic derivative of a norm's squared scale may be: its epsilon


def mark_average(f: Sequence[View], scale: View, frame: Sequence[Axis]) -> None:
    """Flag a product with a root that is held at its mean v and varies, unless a norm divides by it: mean(x²)/v is 1.

    With S = s² ∝ v^p, first order in Var[v] adds S′ Cov[g², v] + S″ E[g²] Var[v]/2 to E[g² s(v)²], relatively
    (|p| + p²/2) Var[v]/E[v]² where g² varies as v does.
    """
    table = scale.node.table
    varied = table.variance / max(table.total_mean**2, 1e-300)
    if varied <= NEGLIGIBLE:
        return
    of_scale = [x for x in f if roots_of(x) == [scale]]
    mixed = [x for x in f if scale in roots_of(x) and x not in of_scale]

    def log_square(ratio: float) -> float:
        found = [
            evaluate(x, frame, {scale: np.full((1,) * (len(frame) + 1), ratio * table.total_mean)})
            for x in of_scale
        ]
        return math.log(max(float(np.prod([np.max(np.abs(x)) for x in found])) ** 2, 1e-300))

    power = (
        -1.0
        if mixed or not of_scale
        else (log_square(1 + NEGLIGIBLE) - log_square(1 - NEGLIGIBLE)) / (2 * NEGLIGIBLE)
    )
    if not (_of_squares(scale.node) and abs(power + 1) < _NORM):
        scale.node.graph.flag("assumed", min((abs(power) + power**2 / 2) * varied, UNKNOWN))


def _of_squares(node: Node) -> bool:
    """Whether it is a mean of squares, or a variance: what a norm divides by."""
    if isinstance(node, Sum):
        return node.is_variance
    squares = node.args[0].node if isinstance(node, Mean) else None
    return isinstance(squares, Apply) and squares.params == ("integer_pow", (2,))


def mark_sums(views: Sequence[View]) -> None:
    """Flag factors of different roots made of one array, where one of those roots is a sum that is not Gaussian.

    Of (relu a + relu b)·a, the sum is not jointly Gaussian with a.
    """
    own = roots_of(*views)
    inside = [
        set(roots_of(*(t.within(x.bind) for t in x.node.args))) if _is_curved(x.node) else None for x in own
    ]
    for i, terms in enumerate(inside):
        if terms and any(terms & (inside[j] or {x}) for j, x in enumerate(own) if j != i):
            own[i].node.graph.flag("assumed", ROUGH)


def mark_weights(views: Sequence[View]) -> None:
    """Flag factors that one weight makes, or is: of u = Σ w x over n terms, E[w² u²] is (1 + 2/n) E[w²] E[u²].

    So it is of two sums whose inputs are alike in nothing but chance: their correlation is 0 on average, its square 1/n.
    """
    seen: dict[Node, View] = {}
    for view in roots_of(*views):
        if view.node.moves:
            continue  # parts of what one packed kernel makes
        weight = weight_of(view.node) or view.node
        other = seen.setdefault(weight, view)
        if other.node is not view.node:
            terms = min(x.node.width or math.inf for x in (view, other))
            view.node.graph.flag("assumed", 2 / terms)


def _is_curved(node: Node) -> bool:
    """Whether a root is a sum that is not jointly Gaussian with its terms."""
    if not isinstance(node, Sum) or node.is_variance:
        return False
    return node.table.variance > NEGLIGIBLE * node.table.total_mean**2 and not marginal(node).gaussian
