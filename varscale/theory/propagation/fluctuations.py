r"""Finite width: how much the mean square of ONE initialization differs from its mean over initializations.

The logarithm of a node's mean square has a variance over draws: it comes from sampling finitely many units (at each root,
`fourth_moments.fresh`), and each layer multiplies it by s² (s = d ln E[f²]/d ln q of its function, q its input's second
moment). Where s differs from q to q, the mean shifts, too, and the logarithm leans to one side (`integrals.lognormal`). Of ReLU
at width n, s = 1 and fresh = (E f⁴/E[f²]² − 1)/n = 5/n: ln of the norm drifts by −5/(2n) a layer, though its mean is kept.

That the logarithm is normal, with a variance that adds up layer by layer, is a theorem for products of random matrices and for
gradients of ReLU nets (Hanin & Nica 2020); elsewhere it is assumed.

Backward, a gradient is a product of derivatives along all layers, each a function of a random scale: D_k = E[f_k'(√Q_k z)²].
Scales Q_k of later layers inherit those of earlier ones, so that E[Π D_k] = Π E[D_k] · exp(Σ_{j<k} Cov[ln D_j, ln D_k]). Going
back, one number is enough for the sum: a = d ln(gradient²)/d ln Q at a layer, through all later ones. Past a function f with
s = d ln E[f²]/d ln Q and d = d ln E[f'²]/d ln Q, with P the relative variance of Q at one place,

    Σ gains a s d ln(1 + P),    a → s a + d.

What is of order 1/n for sums over n units adds up over layers where it is amplified. Given h = W x, a gradient Wᵀ g is the
radial x (h·g)/|x|² and one across x that does not depend on h (so is a Gaussian matrix, given what it makes of one vector).
Let 1 + e be the radial energy over that of any other direction; with u = f²/E[f²] (a unit's part in the next scale),
q = E[h²], F = E[f²] and D = E[f'²],

    at W    Σ gains e/n
    at f    Σ gains (a + e) (E[u f'²]/D − 1)/n,    e → e s²F/(q D) + 2 d.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from varscale.theory.domain.axes import over_classes
from varscale.theory.domain.tables import ROUGH
from varscale.theory.graph.convolutions import Conv, WindowSum, taps_of
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots
from varscale.theory.graph.known_arrays import is_known_array, scatter_of_given
from varscale.theory.graph.linear_nodes import Concat, Contract, applied_weights
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS
from varscale.theory.integrals.lognormal import shared, weighted
from varscale.theory.propagation.fourth_moments import EXCESS_ROUNDING, free_share, fresh, origin
from varscale.theory.propagation.inherited_fluctuations import (
    NONE,
    Spread,
    combine,
    inherited,
    kernel,
    propagated,
    responses,
    root_responses,
)
from varscale.theory.propagation.marginals import along, fluctuating, term_shares
from varscale.theory.propagation.pullbacks import Cotangent
from varscale.theory.propagation.shared_component import channel_scatter, of_an_average, of_few
from varscale.theory.propagation.token_gram import normed_together


def with_own_weights(spread: Spread, node: Node) -> Spread:
    """A unit's weights have a squared norm that varies by (κ − 1)/n from unit to unit, and is one for all samples.

    At one place a sum of n terms has fourth moment 3 (1 + p) for Gaussian weights and inputs whose squares' mean varies by p;
    others, of kurtosis κ, add (κ − 3) E[x⁴]/(n E[x²]²). What is sampled has this 1/n in p; what all terms share has not.
    """
    terms = node.width or 1
    for leaf, _, x, own in applied_weights(node):
        units = node.count(own)
        noise = math.sqrt(max(leaf.kurtosis - 1, 0.0) / terms / units * free_share(leaf, terms, units))
        common = min(inherited(x.node).point, spread.point)
        shape = (leaf.kurtosis - 3) / 3 * (spread.point - common + (1 + common) / terms)
        sources = {**spread.sources, ~node.id: noise}
        spread = replace(spread, sources=sources, shape=max(shape, -spread.point))
    return spread


def averaged(node: Node, axes: Sequence[int], taps: int = 1, *, apart: bool = False) -> Spread:
    """A node's fluctuations when it enters a contraction over these axes (at several taps): what one output sees.

    `apart`: each output of a place sees units of its own, as of tokens' values: a norm over the outputs averages that away.
    """
    weights = isinstance(node, Leaf | Array) and not node.is_input
    # Attention weights are fixed by kernels over all units, which fluctuate less than one unit's outputs.
    if weights or all(r.node.shares for r in roots(node)):
        return NONE
    spread = fluctuations(node)
    given = node.is_input and is_known_array(node)
    varied = scatter_of_given(node, axes, taps) if given else fresh(node, tuple(axes)) / taps
    units = math.sqrt(math.log1p(varied))
    source = ("apart", origin(node)) if apart else origin(node)
    return replace(spread, places=weighted([(1.0, inherited(node).places), (1.0, {source: units})]))


def of_a_group(node: Node, axes: Sequence[int], groups: int) -> float:
    """By how much more the mean of x² over a group varies than over all n units; the next layer averages over groups again.

    A mean of m has what one has, less what all have, times (1/m − 1/n) / (1 − 1/n).
    """
    n = node.count(axes)
    if groups == 1 or n == 1:
        return 0.0
    return max(fresh(node, ()) - fresh(node, tuple(axes)), 0.0) * (groups - 1) / (n - 1)


@once_per_node
def fluctuations(node: Node) -> Spread:
    """Fluctuations of a node's mean square: inherited, and from sampling finitely many units."""
    base = inherited(node)
    return replace(base, sources=weighted([(1.0, base.sources), (1.0, _sampled(node))]))


@once_per_node
def _sampled(node: Node) -> dict[Hashable, float]:
    """What sampling finitely many units adds: what goes by terms, parts or roots is theirs, as branches read them, too."""
    key, scatter = origin(node), channel_scatter(node)
    if is_known_array(node):
        return {}
    parts: list[tuple[float, Node]] = []
    if isinstance(node, Sum | Concat):
        parts = [(float(s), v.node) for s, v in zip(term_shares(node), node.args, strict=True)]
    elif isinstance(node, Apply):
        parts = [(slope, root) for root, (slope, _) in responses(node).items()]
    own = weighted([(s, _sampled(x)) for s, x in parts if key is node])
    chance = fresh(node) if scatter is None else scatter
    return own | {key: math.sqrt(max(chance - math.hypot(*own.values()) ** 2, 0.0))}


@propagated.register
def propagated_of_average(node: Mean | WindowSum) -> Spread:
    inner = node.argument
    if node.averages and inner.is_square:
        below, units = inherited(inner.argument), (len(inner.axes) - 1,)
        # With s the scale of one place, E[s²] in a mean over its units; over other places what all share.
        places = below.places if node.params == units else below.sources
        spread = replace(fluctuations(inner.argument), places=places)
        return combine([(2.0, replace(spread, shift=spread.shift + spread.point / 2))])
    return of_an_average(node, inherited(inner))


@propagated.register
def propagated_of_conv(node: Conv) -> Spread:
    x, groups, taps = node.argument, node.params.groups, taps_of(node)
    summed = [k for k in node.params.x_dims[1:2] if k is not None]
    spread = combine([(1.0, averaged(x, summed, taps))])
    out, shape = with_own_weights(spread, node), of_a_group(x, summed, groups) / taps
    if (varied := of_few(node)) is not None:  # what weights of its own add is in the law of its channels
        out, shape = replace(out, sources=spread.sources), shape + (1 - 1 / taps) * varied
    return replace(out, shape=out.shape + shape)


@propagated.register
def propagated_of_contract(node: Contract) -> Spread:
    """Both arguments' scales, which go together where one has all the places of the other; and what weights make of either."""
    apart = not applied_weights(node)
    x, y = (averaged(v.node, v.axes_at(node.summed), apart=apart) for v in node.args)
    few, many = sorted(({b for b in bind if b < len(node.axes)} for _, bind in node.args), key=len)
    unlike = node.argument is node.args[1].node or not few <= many
    together = 0.0 if unlike else min(shared(x.places, y.places), 1.0)
    spread = combine([(1.0, x), (1.0, y)])
    return with_own_weights(replace(spread, shift=spread.shift + math.expm1(together)), node)


_WIDEST_COVARIANCE = 1.0  # sum of covariances at one layer beyond which first order says nothing


def gradient_scale(node: Apply, root: View, slope: View, held: Sequence[View], part: Cotangent) -> Cotangent:
    """A tree's cotangent past its `slope` towards a root, by the roots' fluctuations; a norm's scales are `held`."""
    ratio = _slope_in(root.node, node)
    passed = replace(part, scale=part.scale * ratio, own=0.0)
    if isinstance(slope.node, Constant):
        return passed
    together, passed = part.unit * _with_slope(node, slope), replace(passed, unit=0.0, weights=0.0)
    if held:
        # Nothing of a gradient is left along what a norm of units at P places normalises: −1/P of it at one.
        # So it is along one unit's weights: over the root mean square of m units, g² goes by |w|^(−2/m).
        norm = normed_together(root, held[0])
        some = bool(norm.tokens or norm.features)
        radial, second = -some / root.node.count(norm.tokens), part.second * math.exp(_limited(together))
        passed = replace(passed, second=second, scale=passed.scale + radial)  # 1/v goes with Q, too
        return replace(passed, radial=radial, weights=-2 * some / norm.count)
    derivative, own = inherited(slope.node), _slope_in(root.node, slope.node)
    together += part.scale * shared(derivative.places, inherited(node).places)
    flat = max(root.node.table.mean_square * slope.node.table.mean_square, 1e-300)
    return replace(
        passed,
        second=part.second * ((1 + derivative.shift) * math.exp(_limited(together))),
        doubt=part.doubt + derivative.bend + ROUGH * abs(together),
        own=own,
        radial=part.radial * ratio**2 * node.table.mean_square / flat + 2 * own,
    )


def _slope_in(root: Node, node: Node) -> float:
    """d ln E[f²]/d ln Q of a tree f."""
    found = root_responses(node)
    return found[root].slope if root in found else 0.0


def summed_scale(node: Node, i: int, part: Cotangent) -> Cotangent:
    """What the fluctuations of a node's i-th argument, in which the node is linear, make of its cotangent."""
    share = float(term_shares(node)[i]) if isinstance(node, Sum) and i not in node.centring else 1.0
    sampled = max((1 + kernel(node).point) / (1 + inherited(node.args[i].node).point) - 1, 0.0)
    radial, unit, weights, growth = share * part.radial, share * part.unit, share * part.weights, 1.0
    if sampled > EXCESS_ROUNDING:
        radial = radial if isinstance(node, Sum) or any(x.is_drawn for x in node.sources) else 0.0
        varied = next((applied.leaf.kurtosis - 1 for applied in applied_weights(node)), 0.0)
        growth = 1 + _limited((radial + weights * varied / 2) / (node.width or math.inf))
        unit, weights = (share * part.scale + radial) * sampled, 0.0
    passed = replace(part, second=growth * part.second, scale=share * part.scale)
    return replace(passed, radial=radial, unit=unit, weights=weights)


def _limited(x: float) -> float:
    return min(max(x, -_WIDEST_COVARIANCE), _WIDEST_COVARIANCE)


def _with_slope(node: Apply, slope: View) -> float:
    """(E[f² f'²]/(E[f²] E[f'²]) − 1)/(E[f⁴]/E[f²]² − 1) of a function of one root: how f'² goes with f² from unit to unit."""
    live = fluctuating(roots(node))
    lines = [over_classes(np.square(along(x, node.axes, *live)), node.axes) for x in (node.whole, slope)]
    if len(live) != 1 or any(line.shape != WEIGHTS.shape for line in lines):
        return 0.0
    f, d = (line / max(line @ WEIGHTS, 1e-300) for line in lines)
    return float(((f * d) @ WEIGHTS - 1) / max(f**2 @ WEIGHTS - 1, 1e-9))
