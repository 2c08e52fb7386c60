"""How a node's second moment was obtained, and how far off it may be: the steps that led to it, and what they pass on."""

from __future__ import annotations

import math

import numpy as np

from varscale.theory.elementwise import Apply, Sum
from varscale.theory.graph import HOWS, Array, Constant, Leaf, Node, far_below
from varscale.theory.responses import responses
from varscale.theory.spread import full

# Where every rule is exact, rounding of a kink's cell, finitely many units of second order, and a norm's epsilon are left.
_BASE = 0.02
# The mean over draws shifts by half the curvature of each layer's response times the variance of its input; the next order is
# taken to be as large once more as the first, with every layer's curvature counted as if they all had one sign.
_NEXT_ORDER = 2.0
_NO_BOUND = 1e3  # a relative error above which there is no bound at all
_SCATTER = 0.5  # of the variance of ln(mean square): what is not lognormal in it


def provenance(node: Node) -> tuple[str, float]:
    """The worst way in which a step that matters was taken, and a bound on the relative error of the second moment."""
    how, doubt = _steps(node)
    spread = full(node)
    if doubt > _NO_BOUND:
        doubt = math.inf
    return how, _BASE + doubt + _NEXT_ORDER * spread.bend + _SCATTER * spread.variance


def settle(node: Node) -> None:
    """Find all this out from the bottom up, for nets of any depth, once moments are known."""
    for below in [*far_below(node, lambda n: ("provenance", n.id) in n.graph.memo), node]:
        provenance(below)


def doubt_of(node: Node) -> float:
    """The relative error of the second moment that the steps leading to it may have added."""
    return _steps(node)[1]


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
        # Of something drawn it is the law that is in doubt, not the scale.
        doubt += max((root.doubt for root in slopes if root.drawn is not None), default=0.0)
        passed = [h for h, d in inner if h not in ("sampled", "assumed") or d * net > 1e-3]
        return max([how, *passed], key=HOWS.index), doubt + net * worst
    inner = [_steps(v.node) for v in node.args]
    how = max([how, *(h for h, _ in inner)], key=HOWS.index)
    if isinstance(node, Sum):
        shares = np.array([c * c * v.node.table.mean_square for c, v in zip(node.params, node.args, strict=True)])
        weights = shares / max(shares.sum(), 1e-300)
        return how, doubt + float(weights @ np.array([d for _, d in inner]))
    return how, doubt + sum(d for _, d in inner)
