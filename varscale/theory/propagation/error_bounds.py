"""How a node's second moment was obtained, and how far off it may be: the steps that led to it, and what they pass on.

A doubt is a relative error of a second moment. Most are derived where they are flagged, as what the next term of an expansion
would add, or as the error of so many draws. Those that are not are constants of which it is said, beside each: "Set on the
validation grid, not derived". The grid is that of `experiments/benchmarks/accuracy.py`; they were chosen so that no row of it
lies outside its error bound.
"""

from __future__ import annotations

import math

from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import UNKNOWN, Array, Constant, Leaf, Node, View
from varscale.theory.graph.store import HOWS, once_per_node
from varscale.theory.propagation.cross_moments import mean_of_product
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.propagation.inherited_fluctuations import responses
from varscale.theory.propagation.marginals import cofactors, concentrated

# Set on the validation grid, not derived, both: what is left where every rule is exact (the cell of a kink,
# second order in 1/width, a norm's epsilon).
_BASE = 0.02
# Of the variance v of ln(mean square), as v (1 + v): what is not lognormal in it, beside what two laws of a
# layer's scale differ by (`integrals.lognormal`). Set on nets of width 64, too.
_SCATTER = 0.1
_NO_BOUND = 1e3  # a relative error above which there is no bound at all


def provenance(node: Node) -> tuple[str, float]:
    """The worst way in which a step that matters was taken, and a bound on the relative error of the second moment."""
    how, doubt = _steps(node)
    spread = fluctuations(node)
    if doubt > _NO_BOUND:
        doubt = math.inf
    return how, _BASE + doubt + spread.bend + _SCATTER * spread.variance * (1 + spread.variance)


def doubt_of(node: Node) -> float:
    """The relative error of the second moment that the steps leading to it may have added."""
    return _steps(node)[1]


@once_per_node
def _steps(node: Node) -> tuple[str, float]:
    how, doubt = max(type(node).how, node.flagged or "exact", key=HOWS.index), node.doubt
    if isinstance(node, Leaf | Array | Constant):
        return how, doubt
    if isinstance(node, Apply):
        # A normalised function of a root forgets an error of its scale; an expansive one magnifies it.
        slopes = responses(node)
        inner = [(_steps(root), abs(slope)) for root, (slope, _) in slopes.items()]
        # Of something drawn it is the law that is in doubt, not the scale.
        doubt += max((root.doubt for root in slopes if root.drawn is not None), default=0.0)
        doubt += sum(_not_forgotten(*group) for group in cofactors(node).values())
        passed = [h for (h, d), slope in inner if h not in ("sampled", "assumed") or d * slope > 1e-3]
        # Roots that vary together are one here; the errors of others need not cancel.
        return max([how, *passed], key=HOWS.index), doubt + sum(d * slope for (_, d), slope in inner)
    hows, doubts = zip(*(_steps(v.node) for v in node.args), strict=True) if node.args else ((), ())
    how = max([how, *hows], key=HOWS.index)
    if isinstance(node, Sum) and any(doubts):
        doubts = [w * d for w, d in zip(_error_weights(node), doubts, strict=True)]
        return how, min(doubt + sum(doubts), UNKNOWN)
    return how, doubt + sum(doubts)


def _not_forgotten(main: View, *scales: View) -> float:
    """What a norm does not forget of the doubt about what it divides, x: it forgets that about the scale of the whole row.

    A mean of squares v of the row itself is off as x is. But x less its mean and v may be worked out in two ways, by
    covariances of parts that are in doubt: then E[x²]/E[v] is not 1. Of a part of the row, or of another array, x is off
    and v is not.
    """
    out = 0.0
    terms = main.node.args if isinstance(main.node, Sum) else ()
    # What a mean was taken away from: a term that has more axes than all others.
    whole = {t.node for t in terms if all(t is u or len(u.bind) < len(t.bind) for u in terms)}
    for scale, _ in scales:
        means = [view.node for view in scale.args] if scale.is_variance else [scale]
        inner = next((mean.argument for mean in means if mean.averages), scale)
        read = {root.node for root in roots(inner)}
        opened = {view.node for node in read if isinstance(node, Sum) for view in node.args}
        if main.node not in read and not whole & (read | opened):
            out += doubt_of(main.node) + doubt_of(scale) / 2
        elif inner.params == ("integer_pow", (2,)) and (scale.is_variance or inner.argument is main.node):
            out += abs(main.node.table.mean_square / max(scale.table.total_mean, 1e-300) - 1)
    return min(out, UNKNOWN)


def _error_weights(node: Sum) -> list[float]:
    """What the relative error of a term's second moment makes of the sum's: more than itself, where terms cancel.

    A scale that is off by a factor enters with the term's product with the sum; a variance that is off alone, with the term's
    own share. A number has no variance, and of an array less its own mean the two are off together.
    """
    taken, weights, terms = set(node.centring.values()), list[float](), node.terms
    for i, (c, view) in enumerate(terms):
        others = (c * d * mean_of_product(view, x, node.axes) for j, (d, x) in enumerate(terms) if j != i)
        own = c * c * view.node.table.mean_square
        scaled = abs(own + sum(others))
        weight = scaled if concentrated(view.node) else max(own, scaled)
        weights.append(0.0 if i in taken else weight / max(node.table.mean_square, 1e-300))
    return weights
