"""How much the overlap of two tokens fluctuates: 1 over the number of directions they differ in; and what products gain by it.

The overlap o = mean over features of x_k·x_k' of two tokens, less what any two share, has mean zero; relative to what one token
has of its own, V = E[o²], 1/D for white tokens of D features. An overlap is a weighted sum of others and what is its own,
independent of them: a layer that mixes features keeps it and adds 1/D; an activation keeps the linear part (Price's theorem);
branches of a stream add up as o = Σ w o_i; attention adds most (`rules.attention`), and a mean over tokens keeps what is their
own. To leading order in V, of Gaussian tokens.

Products of uncorrelated arrays made of the same tokens, or by the same weights, are not independent. Given what both were made
of, entries of x at the tokens a and b have the covariance E[x_a x_b] + (own part of x) o_ab, of y likewise with the same o:

    E[x_a y_a x_b y_b] = E[x_a x_b] E[y_a y_b] + V (own part of x) (own part of y),    a ≠ b.

Gated units gain it, and sums over tokens for each pair of them: kᵀv of linear attention, (x W)(y W)ᵀ, of order n²V against n
for the rest. What a token's own squared norm varies by, 2V, is left out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Container, Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import average, outer, rest
from varscale.theory.domain.tables import LEADING_ORDER, Axes, full_types, means_by_type
from varscale.theory.graph.convolutions import Conv, by_dim, hits, taps_of
from varscale.theory.graph.expressions import Apply, Mean, Sum, alike, factors, roots
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import (
    Concat,
    Contract,
    Gather,
    Rearranged,
    Take,
    applied_weights,
    axes_before,
)
from varscale.theory.graph.nodes import Array, Constant, Node, View
from varscale.theory.graph.normal_form import derivative
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.integrals.lognormal import weighted
from varscale.theory.propagation.marginals import cofactors, fluctuating, independent_factors
from varscale.theory.propagation.sampler import evenly

_MOST_TOKENS, _MOST_OTHERS = 128, 16  # given tokens that are compared with each other, and how often
_MIXTURES: Fact[Tokens, Mixture] = Fact()


class Tokens(NamedTuple):
    """A node, and along which of its axes tokens and their features are; of a convolution without features, what it reads."""

    node: Node
    tokens: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def count(self) -> int:
        """Features."""
        return self.node.count(self.features)

    def before(self) -> Tokens:
        """The same tokens before their entries were moved: their axes reordered, put together, taken apart, or one cut."""
        own = (tuple(sorted({j for k in axes for j in axes_before(self.node, k)})) for axes in self[1:])
        return Tokens(self.node.argument, *own)


class Mixture(NamedTuple):
    """An overlap as a sum of other tokens' overlaps, `sources`, with weights, and of a part of its own, of this variance."""

    sources: Sequence[Tokens] = ()
    weights: Sequence[float] = ()
    variance: float = 0.0


def tokens_of(view: View, tokens: Container[int], features: Container[int]) -> Tokens:
    """Tokens of a view over a frame, by the frame's axes."""
    return Tokens(view.node, view.axes_at(tokens), view.axes_at(features))


def normed_together(root: View, scale: View) -> Tokens:
    """The places, and the units of one (along the last axis), of which a norm's scale is that of all together."""
    over, last = root.axes_beyond(scale), len(root.bind) - 1
    return Tokens(root.node, tuple(k for k in over if k != last), tuple(k for k in over if k == last))


def overlap(x: Tokens, y: Tokens | None = None) -> float:
    """V of these tokens; of two arrays E[o_x o_y] relative to the own parts of their tokens: V of what both are made of."""
    return min(max(covariance(x, y or x), 1 / x.count if y in (None, x) else 0.0), 1.0)


def tokens_averaged(node: Node) -> Tokens | None:
    """What a mean over places averages, with features along its last axis; None of other nodes, and of means over features."""
    *tokens, feature = range(len(node.argument.axes)) if node.averages else (0,)
    return Tokens(node.argument, tuple(tokens), (feature,)) if tokens and feature not in node.params else None


def overlap_before(x: Tokens, y: Tokens) -> float:
    """The same before what is of the features alone: of one array with itself it is V less the 1/D of white features."""
    return overlap(x, y) if x != y else max(overlap(x) - 1 / x.count, 0.0)


def covariance(x: Tokens, y: Tokens) -> float:
    """What two overlaps have in common. Given numbers were there before all else."""
    other, later = sorted((x, y), key=_order)
    return _with_earlier(later.node, later, other)


def _order(x: Tokens) -> tuple[float, str]:
    """Given numbers first; what a convolution reads right after the array that it is of."""
    n, windows = x.node, isinstance(x.node, Conv) and not x.features
    return n.argument.id + 0.5 if windows else n.id - 1e9 * is_known_array(n), f"{n.id} {x[1:]}"


@once_per_node
def _with_earlier(node: Node, later: Tokens, other: Tokens) -> float:
    """What the later one's sources have in common with the other, which lacks its own; of given ones measured over pairs."""
    if is_known_array(node):
        first, second = _measured(later), _measured(other)
        return float(np.mean(first * second)) if first.shape == second.shape else 0.0
    sources, weights, variance = mixture(later)
    read = [x.node.argument for x in (later, other) if isinstance(x.node, Conv) and not x.features]
    both = later == other or (len(read) == 2 and read[0] is read[1])
    own = max(min(variance, mixture(other).variance), 0.0) if both else 0.0
    return own + sum(w * covariance(other, s) for w, s in zip(weights, sources, strict=True) if w)


@once_per_node
def by_source(node: Node, x: Tokens) -> dict[Tokens, float]:
    """Coefficients of o on independent overlaps of unit variance, each of which some tokens have of their own."""
    sources, weights, variance = mixture(x)
    read = [(w, by_source(s.node, s)) for s, w in zip(sources, weights, strict=True)]
    return weighted([(1.0, {x: math.sqrt(max(variance, 0.0))}), *read])


def _measured(x: Tokens) -> np.ndarray:
    """The overlaps of each two given tokens, less what any two share, relative to what one has of its own."""
    others = rest(x.node.axes, (*x.tokens, *x.features))
    sizes = [x.node.count(axes) for axes in (others, *x[1:])]
    found = np.asarray(numbers(x.node), float).transpose([*others, *x.tokens, *x.features]).reshape(sizes)
    found = found[evenly(sizes[0], _MOST_OTHERS)][:, evenly(sizes[1], _MOST_TOKENS)]
    return _own_overlaps(found @ found.transpose(0, 2, 1))


def _own_overlaps(pairs: np.ndarray) -> np.ndarray:
    """Products of tokens, (others, tokens, tokens), less what any two share, relative to what one has of its own."""
    different = ~np.eye(pairs.shape[1], dtype=bool)
    between = pairs[:, different]
    own = np.mean(pairs[:, ~different]) - between.mean()
    return (between - between.mean()) / own if own > 1e-9 * np.abs(pairs).max() else np.zeros_like(between)


@once_per_node
def patch_overlap(node: Conv) -> float:
    """V of what a convolution reads for each output: measured, where that is given; else as good as white."""
    groups, windows, dims, *_ = node.params
    if groups > 1 or (x := numbers(node.argument)) is None:
        return 1 / node.width
    x = by_dim(x, dims)
    x = x[evenly(x.shape[0], _MOST_OTHERS)]
    for d, window in enumerate(windows):
        k = 2 * d + 2
        at = hits(window, x.shape[k])[evenly(window.size_out, _MOST_OTHERS)]
        x = np.append(x, 0 * x.take([0], axis=k), axis=k).take(at, axis=k)  # 0 where there is no position, −1
    rows = x.transpose([*range(0, x.ndim, 2), *range(1, x.ndim, 2)]).reshape(math.prod(x.shape[::2]), -1)
    return float(np.mean(_own_overlaps((rows @ rows.T)[None]) ** 2))


def projected(x: Tokens) -> Tokens | None:
    """What these are a projection of, with random weights; None where they are none."""
    while True:
        sources = [x.before()] if x.node.moves else mixture(x).sources
        if isinstance(x.node, Contract) and applied_weights(x.node):
            return next(iter(sources), None)
        if len(sources) != 1 or isinstance(x.node, Conv):
            return None
        (x,) = sources


def own_part(x: Tokens) -> float:
    """What a token has of its own: its mean square, less what two different ones share."""
    return own_beyond_pairs(x.node.table.second, x.node.axes, x.tokens)


def own_beyond_pairs(second: np.ndarray, axes: Axes, tokens: Sequence[int]) -> float:
    """Second moments by type of one position of these axes, less those of two, averaged over all others."""
    n = math.prod(axes[k].size for k in tokens)
    return (average(second, axes) - average(second, axes, tokens)) * n / max(n - 1, 1)


def mixture(x: Tokens) -> Mixture:
    """Tokens that these are made of, and how their overlap is made of theirs; of given ones, what is measured."""
    return _MIXTURES.once(x.node.graph, x, lambda: _made_of(x) or Mixture(variance=1 / x.count))


@functools.singledispatch
def mixture_of_sum(node: Node, x: Tokens) -> Mixture | None:
    """The mixture behind a sum over tokens whose weights are made of tokens, too (attention); None of any other sum."""
    return None


def _made_of(x: Tokens) -> Mixture | None:
    """By the kind of node; None of what is as good as white."""
    node = x.node
    match node:
        case Rearranged():  # some of the features, or of their factors, have more of their own than all
            inner = x.before()
            return Mixture([inner], [1.0], 1 / x.count - 1 / inner.count)
        case _ if is_known_array(node):
            return Mixture(variance=covariance(x, x))
        case Take():
            return _taken(x)
        case Mean() if x.features == (len(node.axes) - 1,) and (inner := tokens_averaged(node)):
            mean = own_part(inner) / inner.node.count(node.params)  # of n, and what they have in common
            share = float(np.clip(mean / max(own_part(x), 1e-300), 0, 1))
            return Mixture([inner], [share], (1 - share**2) / x.count)
        case Gather() if len(node.params.row_axes) == 1:
            return _repeated(x, node)
        case Concat() if node.params[0] not in x.features:  # the largest part that is no padding tells all
            parts = zip(node.args, node.params[1], strict=True)
            sizes = {v: n for v, n in parts if not isinstance(v.node, Constant)}
            return Mixture([tokens_of(max(sizes, key=sizes.__getitem__), *x[1:])], [1.0]) if sizes else None
        case Conv() if applied_weights(node):
            return _of_windows(x, node)
        case Sum():
            return _of_a_sum(x, node)
        case Apply():
            return _of_a_function(x, node)
        case Contract():
            return _of_a_product(x, node)
    return None


def _of_windows(x: Tokens, node: Conv) -> Mixture:
    """Outputs overlap as what they read does (each group reads its own), and that as the inputs do, averaged over taps."""
    groups, _, (_, channel, *_), _, out_dims = node.params
    if channel is None or out_dims[1] in x.tokens:
        return Mixture(variance=1 / x.count + patch_overlap(node))
    if x.features and groups == 1:
        return Mixture([x._replace(features=())], [1.0], 1 / x.count)
    at, share = dict(zip(out_dims, node.params.x_dims, strict=True)), 1 / taps_of(node)
    inner = Tokens(node.argument, tuple(sorted(k for t in x.tokens if (k := at[t]) is not None)), (channel,))
    alike, own = share * overlap(inner), patch_overlap(node)
    if groups == 1:
        own = max(own, alike)
    elif x.features:
        own = own / groups + alike + 1 / x.count
    return Mixture([inner], [share], own - share * alike)


def _of_a_product(x: Tokens, node: Contract) -> Mixture | None:
    """Features that are mixed, by weights or otherwise; what tokens are multiplied with is none of theirs."""
    sides = [y for v in node.args if (y := tokens_of(v, x.tokens, node.summed)).tokens]
    inputs = [y for y in sides if y.features] if applied_weights(node) else []
    if len(inputs) != 1:
        if (mixed := mixture_of_sum(node, x)) is not None:
            return mixed
        inputs = sides if len(sides) == 1 and sides[0].features else []
    return Mixture(inputs, [1.0], 1 / x.count) if inputs else None


def _taken(x: Tokens) -> Mixture:
    """A slice of one axis: of features the same tokens; of what tokens are made along, others, which overlap as much."""
    inner, k, axes = x.before(), x.node.params[0], range(len(x.node.argument.axes))
    fewer, others = 1 / x.count - 1 / inner.count, k in inner.tokens
    if not others and len(axes) > len(x.node.axes):
        # Does what they are a projection of have this axis, too? Joined queries and keys have it by weights.
        source = projected(inner)
        along = projected(Tokens(inner.node, (k,), tuple(j for j in axes if j != k)))
        others = source is None or (along is not None and along.node is source.node)
    if others:
        return Mixture([inner], [0.0], covariance(inner, inner) + fewer)
    while isinstance(inner.node, Rearranged):
        inner = inner.before()
    whole = mixture(inner)  # what all features have of their own, other slices do not share
    return whole._replace(variance=whole.variance + fewer)


def _of_a_sum(x: Tokens, node: Sum) -> Mixture | None:
    """Branches of a stream: o = Σ w o_i, and what one has of another's direction."""
    terms = own_terms(node, x)
    shares = np.array([own for _, own in terms])
    shares = shares / max(shares.sum(), 1e-300)
    own = (1 - float(shares @ shares)) / x.count
    return Mixture([y for y, _ in terms], shares.tolist(), own) if terms else None


def own_terms(node: Sum, x: Tokens) -> list[tuple[Tokens, float]]:
    """The tokens in each term of a sum of these, and the part of the sum's mean square that they have of their own."""
    return [(y, c * c * max(own_part(y), 0.0)) for c, v in node.terms if all((y := tokens_of(v, *x[1:]))[1:])]


def _of_a_function(x: Tokens, node: Apply) -> Mixture | None:
    """A function's overlap moves with its roots' by E[f' f'] of two tokens; what is not linear in them is as good as white."""
    read = [(view, y) for view in roots(node) if (y := tokens_of(view, *x[1:])).tokens]
    found = [(view, y) for view, y in read if y.features]
    if not found:  # a number a token, times weights: tokens are all along one direction
        return Mixture(variance=1.0) if read and node.params[0] == "mul" else None
    own, slopes = max(own_part(x), 1e-300), []
    for view, y in found:
        slope = derivative(node, view)
        second = 0.0 if slope is None else average(slope.second(node.axes), node.axes, apart=x.tokens)
        # Of n tokens that a norm normalises together, two overlap less by 2/n.
        if any(not {*scale.bind} & {*x.tokens} for scale in cofactors(node).get(view, [])[1:]):
            second *= 1 - 2 / node.count(x.tokens)
        share = min(max(second * max(own_part(y), 0.0) / own, 0.0), 1.0)
        slopes.append(1.0 if alike(share, 1.0) else share)
    return Mixture([y for _, y in found], slopes, (1 - min(sum(slopes), 1.0) ** 2) / x.count)


def _repeated(x: Tokens, node: Gather) -> Mixture | None:
    """Rows of a table, the same at the rate at which indices repeat; a token counts by what others of its class have not."""
    axes, rates, along = node.indexed, node.rates(), [k in x.tokens for k in node.params.index_axes]
    if not any(along):
        return None
    met = [axis.different if mine else axis.same for axis, mine in zip(axes, along, strict=True)]
    alike = [np.arange(1, a.classes + 1) * (1 + k * a.classes) - 1 for a, k in zip(axes, along, strict=True)]
    weights = outer(met) * means_by_type(1 - rates[np.ix_(*alike)], axes)
    rates = np.clip(rates, 0, 1)
    whole = float((weights * (rates * (1 - rates) + (1 - rates) / x.count)).sum())
    return Mixture(variance=whole / max(float(weights.sum()), 1e-300))


def gained_by_sum(node: Contract, second: np.ndarray) -> np.ndarray | float:
    """What a contraction of two activations gains over `second`, by type of its output; what is in doubt of it is marked."""
    x, y = node.args
    sides = [tokens_of(v, node.summed, set(v.bind) - set(w.bind)) for v, w in ((x, y), (y, x))]
    made_alike = x.node.deps & y.node.deps and all(len(side.tokens) == len(node.params) for side in sides)
    if not made_alike or (overlap := overlap_before(*sides)) <= 0:
        return 0.0
    tokens = {*node.summed, *(set(x.bind) & set(y.bind) if all(map(_others, sides)) else ())}
    gain = node.contract(overlap * _own_parts(x, y, node.frame, tokens))
    whole, gained = (average(part, node.axes) for part in (second, gain))
    share = gained / max(whole + gained, 1e-300)
    node.graph.flag("quadrature", LEADING_ORDER * share + 2 * overlap * (1 - share))
    return gain


@once_per_node
def gained_in_common(node: Apply) -> np.ndarray | float:
    """What a product of factors without a common root gains, by type; of a sum with one in it, what that gains."""
    gain: np.ndarray | float = 0.0
    if node.params[0] != "mul":
        for view in node.args:
            if isinstance(view.node, Apply) and np.any(own := gained_in_common(view.node)):
                gain = gain + view.over(full_types(np.asarray(own), view.node.axes), node.axes, pairs=True)
        return gain
    parts = independent_factors(node)
    # Functions of what varies from token to token, and not of a norm's scale or of known numbers alone.
    varied = [f for f in parts if any(not isinstance(r.node, Array) for r in fluctuating(roots(f.node)))]
    for f, g in itertools.combinations(varied, 2):
        if not f.node.deps & g.node.deps:
            continue
        overlaps = {k: v for k in set(f.bind) & set(g.bind) if (v := _along(f, g, k)) > 0}
        if overlaps:
            term = max(overlaps.values()) * _own_parts(f, g, node.axes, overlaps)
            for other in (h for h in parts if h not in (f, g)):
                term = term * other.second(node.axes)
            gain = gain + factors(node.whole)[0] ** 2 * term
        _doubt_lengths(f, g)
    return gain


def _doubt_lengths(f: View, g: View) -> None:
    """A given factor or a projection of given tokens x, and one made of the same: E[f² g²] may be off as |x_a|² varies."""
    for own, other in ((f, g), (g, f)):
        applied = applied_weights(own.node) if isinstance(own.node, Contract) else ()
        given = next((weights.x.node for weights in applied), own.node)
        values = numbers(given) if is_known_array(given) and given.deps & other.node.deps else None
        if values is not None and not is_known_array(other.node):
            squares = np.square(values.astype(float)).mean(axis=-1)
            given.graph.flag("assumed", min(float(squares.var() / max(squares.mean(), 1e-300) ** 2), 1.0))


def _along(f: View, g: View, k: int) -> float:
    """V of what both were made of, for tokens along one axis; none where that has axes which they have not in common."""
    sides = [tokens_of(v, {k}, set(v.bind) - {k}) for v in (f, g)]
    common = len(set(f.bind) & set(g.bind))
    apart = all(side.features and _others(side) < common for side in sides)
    return max(overlap_before(*sides), 0.0) if apart else 0.0


def _own_parts(x: View, y: View, frame: Axes, tokens: Collection[int]) -> np.ndarray:
    """By type, what a token has in common with itself that it has not with the other: of x times of y."""
    out = np.ones(())
    for view in (x, y):
        second = own = other = full_types(view.second(frame), frame)
        for k in tokens:  # the types of one position come first, by class
            own, other = own.take(frame[k].first, axis=k), other.take(frame[k].second, axis=k)
        out = out * np.maximum((own + other) / 2 - second, 0.0)
    return out


def _others(side: Tokens) -> int:
    """Axes of what the tokens were made of, beside theirs and its features': there are others along them."""
    source = projected(side)
    return 0 if source is None else len(source.node.axes) - len(source.tokens) - len(source.features)
