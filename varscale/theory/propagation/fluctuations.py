r"""Finite width: how much the mean square of ONE initialization differs from its mean over initializations.

The logarithm of a node's mean square has a variance over draws, which comes from sampling finitely many units (at each root,
"fresh") and is handed on by each layer in the ratio s = d ln E[f²] / d ln q of its function to its input's second moment q.
Where that ratio is not the same at all q, the mean shifts, too, and the logarithm leans to one side (`integrals.lognormal`).

    ReLU at width n: s = 1, fresh (E f⁴/E[f²]² − 1)/n = 5/n a layer: ln of the norm drifts by −5/(2n)
    a layer, though its mean is kept.

That the logarithm is normal, with a variance that adds up layer by layer, is a theorem for products of random matrices and for
gradients of ReLU nets (Hanin & Nica 2020); elsewhere it is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

from varscale.theory.graph.expressions import roots
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.propagation.fourth_moments import free_share
from varscale.theory.propagation.inherited_fluctuations import (
    NONE,
    Spread,
    fresh,
    inherited,
    origin,
    weighted,
)
from varscale.theory.propagation.shared_component import channel_scatter


def with_own_weights(spread: Spread, node: Node, view: View, x: Node, terms: float, units: int) -> Spread:
    """A unit's weights have a squared norm that varies by (κ − 1)/terms from unit to unit, and is one for all samples.

    At one place the sum's fourth moment is 3 (1 + p) for Gaussian weights and inputs whose squares' mean varies by p; others,
    of kurtosis κ, add (κ − 3) E[x⁴]/(terms E[x²]²). Of p, what is sampled has this 1/terms in it; what all terms share has not.
    """
    weight = view.node
    while weight.args and len(weight.args) == 1:
        weight = weight.args[0].node
    if not isinstance(weight, Leaf) or weight.is_input or not weight.random:
        return spread
    noise = math.sqrt(max(weight.kurtosis - 1, 0.0) / terms / units * free_share(weight, terms, units))
    common = min(inherited(x).point, spread.point)
    shape = max((weight.kurtosis - 3) / 3 * (spread.point - common + (1 + common) / terms), -spread.point)
    return dataclasses.replace(spread, sources={**spread.sources, ~node.id: noise}, shape=shape)


def averaged(node: Node, axes: Sequence[int], taps: int = 1) -> Spread:
    """A node's fluctuations when it enters a contraction over these axes (at several taps): what one output sees."""
    if isinstance(node, Leaf | Array | Constant) and not (isinstance(node, Leaf) and node.is_input):
        return NONE
    if all(r.node.shares for r in roots(node)):
        # Attention weights are fixed by kernels over all units, which fluctuate less than one unit's outputs.
        return NONE
    spread = fluctuations(node)
    units: dict[Hashable, float] = {origin(node): math.sqrt(math.log1p(fresh(node, axes) / taps))}
    return dataclasses.replace(spread, places=weighted([(1.0, inherited(node).places), (1.0, units)]))


def of_a_group(node: Node, axes: Sequence[int], groups: int) -> float:
    """By how much more the mean of x² over a group varies than over all n units; the next layer averages over groups again.

    A mean of m has what one has, less what all have, times (1/m − 1/n) / (1 − 1/n).
    """
    n = math.prod(node.axes[k].size for k in axes)
    if groups == 1 or n == 1:
        return 0.0
    return max(fresh(node, ()) - fresh(node, axes), 0.0) * (groups - 1) / (n - 1)


@once_per_node
def fluctuations(node: Node) -> Spread:
    """Fluctuations of a node's mean square: inherited, and from sampling finitely many units."""
    base = inherited(node)
    scatter = channel_scatter(node)
    chance = fresh(node, range(len(node.axes))) if scatter is None else scatter
    own = math.sqrt(max(chance, 0.0))
    sources = dict(base.sources)
    source = origin(node)
    sources[source] = sources.get(source, 0.0) + own
    return dataclasses.replace(base, sources=sources)
