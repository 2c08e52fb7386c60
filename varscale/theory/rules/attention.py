r"""Attention: weights and values are projections of the same tokens, and so are not independent.

Let x_k be tokens, x̃_k what each has of its own, C = Σ p_k x̃_k x̃_kᵀ its covariance under the weights p of a query q (of unit
trace), s² the variance of the logits over keys, and V the relative variance of the overlap of two tokens: tr C²/(tr C)² for
equal weights, one over the number of directions that tokens differ in (`token_gram`). Keys and values have d features a head.

1.  What outputs gain by following their queries (`tilted`). Given q, the logit l_k and an entry v_k of the value are two
    projections of one token, Gaussian over the tokens, with E[correlation²] = V. Regression of v on l leaves what does not
    depend on the weights, and E[(Σ p v)²] gains Var[v] · V · (E[(Σ p l)²]/s² − Σ p²): what moves along the logits, less what is
    counted without it.

2.  What queries' cotangents gain (`gain_of_queries`). A query's cotangent is W_k C W_vᵀ g, of mean square E[tr C²]. A token
    with itself adds Σ p² to it, the part that independence gives; two different ones add (1 − Σ p²)² V.

3.  How the logits' variance differs from query to query (`logit_scatter`). It is qᵀ A q with A the keys' covariance; for
    Gaussian q of covariance B its relative variance is 2 tr (A B)²/(tr A B)², of which each projection to d features adds 1/d.

4.  How alike two outputs are (`mixed`). A part τ of an output's own, that of 1., is C q: it overlaps with another's as the
    queries do. Of the rest, lognormal weights of logits that differ by s² between queries make b = s²/(e^{s²} − 1) of what the
    queries do: o = (τ + (1 − τ) b) o_x. Each of H heads adds overlaps of its own, so that these are divided by H:
        (1 − τ)² (1/T + V_v + b²/d)     sums over T keys, of values, by queries of d features;
        τ² (3/d + V(C²) − V_x)          three projections, and C twice: with λ = 1/(T V_x), by Marchenko and Pastur,
                                        V(C²) = tr C⁴/(tr C²)² = V_x (1 + 6 λ + 6 λ² + λ³)/(1 + λ)²;
        2 τ (1 − τ)/d                   what either has of the other's direction.
    Where rows see different keys that is no chance: of the weights' own a part 1 − c is the mask's, and of b and 1/T only the
    part c, or its square, is left.

5.  Normalised tokens lie on a sphere (`key_directions`), so that logits have less than a Gaussian's tails.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import average, contract_axes, contract_axis, full_along, over_classes, rest
from varscale.theory.domain.tables import lift
from varscale.theory.graph.expressions import roots, weighted_sum
from varscale.theory.graph.linear_nodes import Contract, weight_of
from varscale.theory.graph.nodes import View
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.marginals import cofactors
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.propagation.token_gram import (
    Mixture,
    Tokens,
    covariance,
    mixture_of_sum,
    overlap,
    own_beyond_pairs,
    own_part,
    projected,
    tokens_of,
)

# Of what tokens share, which moves by the curvature of what made them times the variance of their overlaps;
# set on the validation grid, not derived.
SHARED_DOUBT = 0.03
_AS_ONE = 0.99  # of what a value has beyond any two: values that have so much of it in common are one


class Attention(NamedTuple):
    """A contraction Σ p v of softmax weights with values."""

    weights: Any  # the softmax
    place: tuple[int, ...]  # where its axes are in the contraction's frame
    values: View  # over that frame
    kept: float  # the mean of what dropout multiplies weights by, squared
    key: int  # the frame's axis that keys are along

    def projections(self) -> Tokens:
        """Values of one head, as tokens."""
        return tokens_of(self.values, [self.key], set(self.values.bind) - set(self.place))


class Scores(NamedTuple):
    """The product of queries and keys, tokens of one head, that logits are made of."""

    product: View  # over the logits' frame
    slope: float  # the square of what it is multiplied by
    queries: Tokens
    keys: Tokens
    place: int  # which argument of the product the queries are


def attention_of(node: Any) -> Attention | None:
    """The attention that a contraction is; None where it is none."""
    for weights, v in (node.args, node.args[::-1]):
        p, kept = weights, 1.0
        if weights.node.primitive == "mul":  # dropout, of each by itself
            for x, mask in (weights.node.args, weights.node.args[::-1]):
                drawn = all(root.node.is_bits for root in roots(mask.node))
                if drawn and x.node.shares and x.bind[x.node.params] in mask.bind:
                    p, kept = x.within(weights.bind), mask.node.table.total_mean**2
        # Shares of what is not added up, a capsule's of those above it, are no weights of an average.
        if p.node.shares and len(node.axes) <= (key := p.bind[p.node.params]) in v.bind:
            return Attention(p.node, p.bind, v, kept, key)
    return None


def scores(weights: Any) -> Scores | None:
    """What the logits of softmax weights are, where they are a product of queries and keys, and what is added to it."""
    for slope, product in weighted_sum(weights.args[0])[0]:
        node, along = product.node, {*product.axes_at([weights.params])}
        if not isinstance(node, Contract) or weight_of(node) is not None:
            continue
        for place, query in enumerate(node.args):
            if not along & set(query.bind):
                key = node.args[1 - place]
                # Heads and samples are along axes that both have.
                queries = tokens_of(query, set(query.bind) - set(key.bind), node.summed)
                keys = tokens_of(key, along, node.summed)
                known = queries.tokens and keys.tokens
                return Scores(product, slope**2, queries, keys, place) if known else None
    return None


def gain_of_queries(weights: Any, notes: BackwardNotes, passed: np.ndarray, kept: np.ndarray) -> float | None:
    """The share of queries' cotangents that they gain because keys and values see the same tokens (2.), if known.

    The pullback of the scores adds it. By type of rows, of a key's own a cotangent has `passed`, the Jacobian keeps `kept`.
    """
    found, values = scores(weights), notes.values.get(weights.id)
    if found is None or values is None or (tokens := projected(found.keys)) is None:
        return None
    several = np.clip(1 - (weights.seen * weights.weights.square).sum(-1), 0, 1) ** 2
    square = found.keys.node.table.divisor
    share = overlap(tokens, values) * own_part(found.keys) / square
    gain = share * passed * weights.read(several) * weights.own
    keys, (gained, whole) = weights.keys, (average(x, weights.row_axes) for x in (gain, gain + kept))
    gain = found.slope * np.multiply.outer(gain, keys.agrees / keys.size)
    gain = sum_out(np.moveaxis(gain, -1, weights.params), weights.axes, found.product)
    notes.gains[found.product.node.id] = found.place, gain
    return gained / max(whole, 1e-300)


def key_directions(weights: Any) -> float:
    """Directions of the sphere on which a norm has put the tokens of the keys; infinite if they are as good as Gaussian.

    Tokens' squared norms vary by 2 V if they are Gaussian. What a norm has left tokens m + x̃ is |m + x̃|²: that of x̃, which the
    weights see, varies by 4 V |m|²/|x̃|². Kurtosis falls short of 3 by 3 (2 V − that), on a sphere of d directions by 6/(d + 2).
    """
    found = scores(weights)
    tokens = None if found is None else projected(found.keys)
    if tokens is None or not any(len(group) > 1 for group in cofactors(tokens.node).values()):
        return math.inf
    own = own_part(tokens)
    shared = max(tokens.node.table.mean_square - own, 0.0)
    lack = overlap(tokens) * (2 - 4 * shared / max(own, 1e-300))
    return max(2 / lack - 2, 3.0) if lack > 0 else math.inf


def logit_scatter(weights: Any) -> float:
    """Relative variance, between queries, of the logits' variance (3.); in a product of both d is counted once."""
    if (found := scores(weights)) is None:
        return 0.0
    keys, queries = projected(found.keys), projected(found.queries)
    out = 1 / found.keys.count + (0.0 if keys is None else overlap(keys))
    if queries is not None:
        out += overlap(queries) * (own_part(queries) / queries.node.table.divisor) ** 2
    return 2 * out


def tilted(node: Any) -> np.ndarray | float:
    """What Σ p v gains because weights and values see the same tokens (1.), by type of the output of a contraction."""
    if (attention := attention_of(node)) is None:
        return 0.0
    (p, place, v, kept, key), frame = attention, node.frame
    tokens, found = projected(attention.projections()), scores(p)
    if tokens is None or not p.deps & tokens.node.deps:
        return 0.0
    keys = None if found is None else projected(found.keys)
    seen_by_both = overlap(tokens) if keys is None else overlap(keys, tokens)
    # What a value varies by along the keys, those of one class compared with each other.
    values, c = full_along(v.second(frame), key, frame[key]), frame[key].classes
    differ = np.take(values, range(c), axis=key) - np.take(values, c + np.arange(c) * (c + 1), axis=key)
    deviation = over_classes(np.maximum(differ, 0.0), frame, [key])
    gain = lift(p.tilt, p.row_axes, [place[k] for k in p.rows], frame, pairs=True).squeeze(key)
    return np.broadcast_to(deviation * gain * seen_by_both * kept, node.frame_types)


def note_values(node: Contract, notes: BackwardNotes) -> None:
    """Note which tokens the values of an attention are made of, for the cotangents behind its weights."""
    attention = attention_of(node)
    if attention is not None and (values := projected(attention.projections())) is not None:
        notes.values[attention.weights.id] = values


@mixture_of_sum.register
def mixed(node: Contract, x: Tokens) -> Mixture | None:
    """How the overlap of two outputs Σ p v is made of that of two values and of two queries (4.)."""
    if (attention := attention_of(node)) is None:
        return None
    p, values, found = attention.weights, attention.projections(), scores(attention.weights)
    source = None if found is None else projected(found.queries)
    if found is None or source is None or not (values.tokens and values.features and found.queries.tokens):
        return Mixture(variance=1 / x.count)
    count, keys = found.queries.count, float(p.seen.sum(-1).mean())
    heads = x.node.count(set(x.features) & set(attention.place))
    rows = [k for k, row in enumerate(p.rows) if attention.place[row] in x.tokens]
    variance = own_beyond_pairs(p.deviation.mean(-1), p.row_axes, rows)
    # What part of what a row of weights has of its own is due to the logits, not to the keys that it sees.
    whole = p.seen * p.weights.first
    mean = whole / whole.sum(-1, keepdims=True)
    drawn = (p.seen * p.weights.square - mean**2 / np.maximum(p.seen, 1e-300)).sum(-1)
    squares = contract_axis(p.table.second, p.params, p.keys.same) * p.keys.size
    own = max(own_beyond_pairs(squares, p.row_axes, rows), 1e-300)
    chance = float(np.clip(over_classes(drawn, p.row_axes) / own, 0, 1))
    slope = chance * (variance / math.expm1(variance) if 0 < variance < 50 else float(variance <= 0))
    gain = own_beyond_pairs(np.asarray(tilted(x.node)), x.node.axes, x.tokens)
    tilt = min(max(gain / max(own_part(x), 1e-300), 0.0), 1.0)
    v_values, v_tokens = (covariance(tokens, tokens) for tokens in (values, source))
    ratio = 1 / (v_tokens * keys)
    squared = v_tokens * (1 + 6 * ratio + 6 * ratio**2 + ratio**3) / (1 + ratio) ** 2
    noise = (1 - tilt) ** 2 * (chance**2 / keys + v_values + slope**2 / count)
    noise += tilt**2 * (3 / count + squared - v_tokens) + 2 * tilt * (1 - tilt) / values.count
    return Mixture([values, source], [0.0, (1 - tilt) * slope + tilt], noise / heads)


def alike_keys(weights: View, values: View) -> bool:
    """Whether values at keys of one class are as good as one: mask tokens, say, which are one row repeated."""
    node, place = values.node, weights.bind[weights.node.params]
    if place not in values.bind:
        return False
    axis = node.axes[k := values.bind.index(place)]
    second = contract_axes(node.table.second, {j: node.axes[j].same for j in rest(node.axes, [k])})
    second = second - second @ axis.different
    own, pairs = second[: axis.classes], second[axis.classes :: axis.classes + 1]
    alike = (axis.counts > 1) & (pairs > _AS_ONE * np.maximum(own, 1e-300))
    return axis.classes > 1 and bool(np.any(alike))
