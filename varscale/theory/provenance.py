"""How a node's second moment was obtained, and how far off it may be: the steps that led to it, and what they pass on."""

from __future__ import annotations

import numpy as np

from varscale.theory.elementwise import Apply, Sum
from varscale.theory.graph import HOWS, Array, Constant, Leaf, Node
from varscale.theory.spread import full, inherited, responses

# What theory leaves out even where every rule is exact: terms of second order in 1/width, and the sampling error of a kink.
_BASE = 0.012
_SECOND_ORDER = 0.6  # of the variance of ln(mean square), and of the point variance, beyond first order


def provenance(node: Node) -> tuple[str, float]:
    """The worst way in which a step that matters was taken, and a bound on the relative error of the second moment."""
    how, doubt = _steps(node)
    spread = full(node)
    return how, _BASE + doubt + _SECOND_ORDER * (spread.variance + inherited(node).point) + 0.5 * abs(spread.shift)


def _steps(node: Node) -> tuple[str, float]:
    key = ("provenance", node.id)
    memo = node.graph.memo
    if key not in memo:
        memo[key] = _trace(node)
    return memo[key]


def _trace(node: Node) -> tuple[str, float]:
    how, doubt = type(node).how, node.doubt
    if node.flagged:
        how = max(how, node.flagged, key=HOWS.index)
    if isinstance(node, Leaf | Array | Constant):
        return how, doubt
    if isinstance(node, Apply):
        # A normalised function of a root forgets an error of its scale; an expansive one magnifies it.
        slopes = responses(node)
        net = abs(sum(s for s, _ in slopes.values()))
        inner = [_steps(root) for root in slopes]
        worst = max((d for _, d in inner), default=0.0)
        passed = [h for h, d in inner if h not in ("sampled", "assumed") or d * net > 1e-3]
        return max([how, *passed], key=HOWS.index), doubt + net * worst
    inner = [_steps(v.node) for v in node.args]
    how = max([how, *(h for h, _ in inner)], key=HOWS.index)
    if isinstance(node, Sum):
        shares = np.array([c * c * v.node.table.mean_square for c, v in zip(node.params, node.args, strict=True)])
        weights = shares / max(shares.sum(), 1e-300)
        return how, doubt + float(weights @ np.array([d for _, d in inner]))
    return how, doubt + sum(d for _, d in inner)
