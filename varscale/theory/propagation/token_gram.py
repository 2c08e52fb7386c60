"""How much the overlap of two tokens fluctuates: one over the number of directions that tokens differ in.

The overlap o = mean over features of x_k·x_k' of two tokens, less what any two share, has mean zero; relative to what one token
has of its own, V = E[o²]. For white tokens of D features V = 1/D. An overlap is a weighted sum of others and what is its own,
independent of them, so that what any two have in common is known: a layer that mixes features keeps it and adds 1/D of its own;
an activation keeps the linear part (Price's theorem); branches of a stream, all functions of it, add up as o = Σ w o_i;
attention adds most (`rules.attention`). To leading order in V, for Gaussian features and tokens alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, averaging, contract_axis
from varscale.theory.domain.tables import full_types, means_by_type
from varscale.theory.graph.convolutions import Conv, hits
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import Concat, Contract, Gather, Rearranged, Take, weight_of
from varscale.theory.graph.nodes import Constant, Node, View
from varscale.theory.graph.normal_form import derivative
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.propagation.sampler import evenly

_MOST_TOKENS, _MOST_OTHERS = (
    128,
    16,
)  # given tokens that are compared with each other; how many times that is done


class Mixture(NamedTuple):
    """How an overlap is made of others: the weight of each, and the variance of what is its own."""

    weights: tuple[float, ...]
    variance: float = 0.0


OverlapRule = Callable[[Sequence[float]], Mixture]  # given V of each of the others


class Tokens(NamedTuple):
    """A node, and along which of its axes tokens and their features are."""

    node: Node
    tokens: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def count(self) -> int:
        """Features."""
        return math.prod(self.node.axes[k].size for k in self.features)


def tokens_of(view: View, tokens: Iterable[int], features: Iterable[int]) -> Tokens:
    """Tokens of a view over a frame, by the frame's axes."""
    place = {outer: k for k, outer in enumerate(view.bind)}
    return Tokens(
        view.node, *(tuple(sorted(place[k] for k in axes if k in place)) for axes in (tokens, features))
    )


def overlap(x: Tokens) -> float:
    """V of these tokens."""
    return float(np.clip(_covariance(x, x), 1 / x.count, 1.0))


def shared_overlap(x: Tokens, y: Tokens) -> float:
    """E[o_x o_y], relative to what one token of each has of its own: V of what both were made of."""
    return overlap(x) if x == y else float(np.clip(_covariance(x, y), 0.0, 1.0))


def overlap_before(x: Tokens, y: Tokens) -> float:
    """The same of features of their own: of one array with itself, less what its features overlap by as if they were white."""
    return shared_overlap(x, y) if x != y else max(overlap(x) - 1 / x.count, 0.0)


def _covariance(x: Tokens, y: Tokens) -> float:
    """What two overlaps have in common."""
    # Given numbers were there before all else.
    later, other = sorted((x, y), key=lambda z: (not is_known_array(z.node), z.node.id, z[1:]), reverse=True)
    return _shared_with_earlier(later.node, later, other)


@once_per_node
def _shared_with_earlier(node: Node, later: Tokens, other: Tokens) -> float:
    """What is the later one's own the other cannot have: it is what the later one's sources have in common with the other."""
    sources, rule = sources_of(later)
    mixture = MIXTURES.once(node.graph, later, lambda: rule([_covariance(s, s) for s in sources]))
    own = max(mixture.variance, 0.0) if later == other else _of_given(later, other)
    return own + sum(w * _covariance(other, s) for w, s in zip(mixture.weights, sources, strict=True) if w)


def _of_given(x: Tokens, y: Tokens) -> float:
    """What the overlaps of given tokens have in common, measured over pairs of tokens; 0 of what is not given."""
    if not (is_known_array(x.node) and is_known_array(y.node)):
        return 0.0
    first, second = _measured(x), _measured(y)
    return float(np.mean(first * second)) if first.shape == second.shape else 0.0


def _measured(x: Tokens) -> np.ndarray:
    """The overlaps of each two given tokens, less what any two share, relative to what one has of its own."""
    found = numbers(x.node)
    assert found is not None
    others = [k for k in range(len(x.node.axes)) if k not in (*x.tokens, *x.features)]
    sizes = [math.prod(x.node.axes[k].size for k in axes) for axes in (others, *x[1:])]
    found = found.transpose([*others, *x.tokens, *x.features]).reshape(sizes).astype(float)
    found = found[evenly(sizes[0], _MOST_OTHERS)][:, evenly(sizes[1], _MOST_TOKENS)]
    pairs = found @ found.transpose(0, 2, 1)
    return _own_overlaps(pairs)


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
    x = numbers(node.args[0].node)
    if groups > 1 or x is None:
        return 1 / node.width
    x = x.transpose([k for k in dims if k is not None])
    x = x[tuple(None if k is None else slice(None) for k in dims)][evenly(x.shape[0], _MOST_OTHERS)]
    for d, window in enumerate(windows):
        k = 2 * d + 2
        at = hits(window, x.shape[k])[evenly(window.size_out, _MOST_OTHERS)]
        x = x.take(at, axis=k)
        x = x * (at >= 0).reshape(*[1] * k, *at.shape, *[1] * (x.ndim - k - 2))
    rows = x.transpose([*range(0, x.ndim, 2), *range(1, x.ndim, 2)]).reshape(math.prod(x.shape[::2]), -1)
    return float(np.mean(_own_overlaps((rows @ rows.T)[None]) ** 2))


def projected(x: Tokens) -> Tokens | None:
    """What these are a projection of, with random weights; None where they are none."""
    while not (isinstance(x.node, Contract) and weight_of(x.node) is not None):
        if isinstance(x.node, Take):
            x = _tokens_before_slice(x, x.node)
            continue
        sources, _ = sources_of(x)
        if len(sources) != 1:
            return None
        x = sources[0]
    sources, _ = sources_of(x)
    return sources[0] if sources else None


def own_part(x: Tokens) -> float:
    """What a token has of its own: its mean square, less what two different ones share."""
    return own_beyond_pairs(x.node.table.second, x.node.axes, x.tokens)


def own_beyond_pairs(second: np.ndarray, axes: Sequence[Axis], tokens: Sequence[int]) -> float:
    """Second moments by type of one position of these axes, less those of two, averaged over all others."""
    n = math.prod(axes[k].size for k in tokens)
    return (
        float(_lacking(tuple(axes), frozenset(tokens)) @ full_types(second, axes).ravel()) * n / max(n - 1, 1)
    )


@functools.cache
def _lacking(axes: tuple[Axis, ...], tokens: frozenset[int]) -> np.ndarray:
    """Weights of a type array, row-major, that average over what is one with itself, less those over all pairs of tokens."""
    return averaging(axes, frozenset()) - averaging(axes, tokens)


def sources_of(x: Tokens) -> tuple[list[Tokens], OverlapRule]:
    """Tokens that these are made of, and how their overlap is made of theirs."""
    return _SOURCES.once(x.node.graph, x, lambda: _token_sources(x))


TokenSources = tuple[list[Tokens], OverlapRule]


@functools.singledispatch
def sources_of_mixture(node: Node, x: Tokens) -> TokenSources | None:
    """Of a sum over tokens with weights that are made of tokens themselves: what those of its output are made of; else None."""
    return None


def _token_sources(x: Tokens) -> tuple[list[Tokens], OverlapRule]:

    node = x.node
    if is_known_array(node):
        return [], lambda _: Mixture((), _of_given(x, x))
    # Some of the features, or of their factors, have more of their own than all.
    if isinstance(node, Rearranged):
        inner = _tokens_before_reshape(x, node)
        return [inner], lambda _: Mixture((1.0,), 1 / x.count - 1 / inner.count)
    if isinstance(node, Take):
        return _taken(x, node)
    if isinstance(node, Gather) and len(node.params.row_axes) == 1:
        return [], lambda _: _repeated(x, node)
    if (
        isinstance(node, Concat) and node.params[0] not in x.features
    ):  # the largest part that is no padding tells for all
        parts = [
            (n, v) for v, n in zip(node.args, node.params[1], strict=True) if not isinstance(v.node, Constant)
        ]
        if parts:
            return [
                tokens_of(max(parts, key=lambda part: part[0])[1], x.tokens, x.features)
            ], lambda _: Mixture((1.0,))
    if isinstance(node, Conv) and weight_of(node) is not None:
        return [], lambda _: Mixture((), 1 / x.count + patch_overlap(node))
    if isinstance(node, Sum):
        return _overlap_of_sum(x, node)
    if isinstance(node, Apply):
        return _overlap_of_apply(x, node)
    if isinstance(node, Contract):
        summed = range(len(node.axes), len(node.frame))
        if weight_of(node) is not None:
            inputs = [y for v in node.args if (y := tokens_of(v, x.tokens, summed)).tokens and y.features]
            if len(inputs) == 1:
                return inputs, lambda _: Mixture((1.0,), 1 / x.count)
        if (mixed := sources_of_mixture(node, x)) is not None:
            return mixed
        sides = [tokens_of(v, x.tokens, summed) for v in node.args]
        with_tokens = [y for y in sides if y.tokens]
        if (
            len(with_tokens) == 1 and with_tokens[0].features
        ):  # what the tokens are multiplied with is none of theirs
            return with_tokens, lambda _: Mixture((1.0,), 1 / x.count)
    return [], lambda _: white(x)


def _tokens_before_reshape(x: Tokens, node: Rearranged) -> Tokens:
    """The same tokens before their axes were put in another order, together or apart."""
    return Tokens(
        node.args[0].node, *(tuple(sorted({j for k in axes for j in node.before(k)})) for axes in x[1:])
    )


def _taken(x: Tokens, node: Node) -> tuple[list[Tokens], OverlapRule]:
    """A slice of one axis: of features the same tokens; of what tokens are made along, others, which overlap as much."""
    inner, k = _tokens_before_slice(x, node), node.params[0]
    fewer = 1 / x.count - 1 / inner.count
    if k in inner.tokens or (len(inner.node.axes) > len(node.axes) and _made_along(inner, k)):
        return [inner], lambda parts: Mixture((0.0,), parts[0] + fewer)
    while isinstance(inner.node, Rearranged):
        inner = _tokens_before_reshape(inner, inner.node)
    sources, rule = sources_of(inner)  # what all features have of their own, other slices do not share
    return sources, lambda parts: (own := rule(parts))._replace(variance=own.variance + fewer)


def _tokens_before_slice(x: Tokens, node: Node) -> Tokens:
    """The tokens before a slice of one axis was taken, which one position of it drops."""
    before, k = node.args[0].node, node.params[0]
    dropped = len(before.axes) > len(node.axes)
    return Tokens(before, *(tuple(j + (dropped and j >= k) for j in axes) for axes in x[1:]))


def _made_along(x: Tokens, k: int) -> bool:
    """Whether what tokens are a projection of has this axis, too: joined queries and keys are so by their weights alone."""
    before = projected(x)
    along = projected(Tokens(x.node, (k,), tuple(j for j in range(len(x.node.axes)) if j != k)))
    return before is None or (along is not None and along.node is before.node)


def white(x: Tokens) -> Mixture:
    """Features that are independent of each other."""
    return Mixture((), 1 / x.count)


def _overlap_of_sum(x: Tokens, node: Sum) -> tuple[list[Tokens], OverlapRule]:
    """Branches of a stream: o = Σ w o_i, and what one has of another's direction."""
    terms = [(c * c, tokens_of(v, x.tokens, x.features)) for c, v in zip(node.params, node.args, strict=True)]
    terms = [(scale, y) for scale, y in terms if y.tokens and y.features]
    if not terms:
        return [], lambda _: white(x)
    shares = np.array([scale * max(own_part(y), 0.0) for scale, y in terms])
    shares = shares / max(shares.sum(), 1e-300)
    return [y for _, y in terms], lambda _: Mixture(
        tuple(shares.tolist()), (1 - float(shares @ shares)) / x.count
    )


def _overlap_of_apply(x: Tokens, node: Apply) -> tuple[list[Tokens], OverlapRule]:
    """A function's overlap moves with its roots' by E[f' f'] of two tokens; what is not linear in them is as good as white."""
    found = [(view, tokens_of(view, x.tokens, x.features)) for view in roots(node)]
    numbers_only = any(y.tokens and not y.features for _, y in found)
    found = [(view, y) for view, y in found if y.tokens and y.features]
    if not found:  # a number a token, times weights: tokens are all along one direction
        return [], lambda _: Mixture((), 1.0) if numbers_only and node.params[0] == "mul" else white(x)
    own = max(own_part(x), 1e-300)
    slopes = []
    for view, y in found:
        slope = derivative(node, view)
        second = (
            np.zeros(node.frame_types)
            if slope is None
            else np.broadcast_to(slope.second(node.axes), node.frame_types)
        )
        for k in reversed(range(len(node.axes))):
            axis = node.axes[k]
            second = contract_axis(second, k, axis.different if k in x.tokens else axis.same)
        slopes.append(float(np.clip(float(second) * max(own_part(y), 0.0) / own, 0, 1)))
    return [y for _, y in found], lambda _: Mixture(tuple(slopes), (1 - min(sum(slopes), 1.0) ** 2) / x.count)


MIXTURES: Fact[Tokens, Mixture] = Fact()
_SOURCES: Fact[Tokens, tuple[list[Tokens], OverlapRule]] = Fact()


def _repeated(x: Tokens, node: Gather) -> Mixture:
    """Rows of a table: two tokens are the same row at the rate at which indices of their classes repeat.

    Tokens count by what each has of its own that others of its class have not: paddings have nothing.
    """
    along = [k in x.tokens for k in node.params.index_axes]
    if not any(along):
        return white(x)
    axes, rates = node.indexed, node.rates()
    met = [axis.different if mine else axis.same for axis, mine in zip(axes, along, strict=True)]
    alike = [  # two of one class
        a.classes + np.arange(a.classes) * (a.classes + 1) if mine else np.arange(a.classes)
        for a, mine in zip(axes, along, strict=True)
    ]
    own = 1 - rates[np.ix_(*alike)]
    weights = functools.reduce(np.multiply.outer, met) * means_by_type(own, axes)
    rates = np.clip(rates, 0, 1)
    whole = float((weights * (rates * (1 - rates) + (1 - rates) / x.count)).sum())
    return Mixture((), whole / max(float(weights.sum()), 1e-300))
