"""Products of arrays that are uncorrelated and yet not independent: made of the same tokens, or by the same weights.

Given what both were made of, S, the entries of x that are multiplied with the tokens a and b have a covariance that S decides,
and so do those of y: E[x_a x_b | S] = E[x_a x_b] + (own part of x) o_ab, with one and the same overlap o (`token_gram`). Hence

    E[(Σ_a x_a y_a)²] = Σ_ab E[x_a x_b] E[y_a y_b] + Σ_{a≠b} V (own part of x) (own part of y),    V = E[o²].

Entry by entry the same is added to what the products of two tokens have in common, E[x_a y_a x_b y_b]: gated units, say.

That is kᵀv of linear attention, where S is the sequence and V one over its features, and (x W)(y W)ᵀ, where S is W and tokens
are its columns. It is of order n²V against n for the rest. What a token's own squared norm varies by, 2V, is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.tables import LEADING_ORDER, full_types, lift
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import Contract, weight_of
from varscale.theory.graph.nodes import Array, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.propagation.marginals import concentrated, independent_factors
from varscale.theory.propagation.token_gram import Tokens, overlap_before, sources_of, tokens_of


class Gain(NamedTuple):
    """What a contraction gains, by type of its output; the share of it that is in doubt, and what it leaves out of the rest."""

    second: np.ndarray | float
    doubt: float = 0.0
    left_out: float = 0.0


def shared_tokens(node: Any) -> Gain:
    """What a contraction of two activations gains because they were made of the same tokens."""
    x, y = node.args
    if not x.node.deps & y.node.deps:
        return Gain(0.0)
    summed = range(len(node.axes), len(node.frame))
    sides = [tokens_of(v, summed, set(v.bind) - set(w.bind)) for v, w in ((x, y), (y, x))]
    if any(len(side.tokens) < len(summed) for side in sides):
        return Gain(0.0)
    overlap = overlap_before(*sides)
    if overlap <= 0:
        return Gain(0.0)
    frame, n = node.frame, node.width
    together = (
        [k for k in x.bind if k in y.bind and k not in summed]
        if all(_others(side) > 0 for side in sides)
        else []
    )
    own = [_own_part(v, frame, summed, together) for v in (x, y)]
    gain = np.full([a.types for a in node.axes], n * n * overlap) * own[0] * own[1]
    agree = [a.agrees if k in together else np.ones(a.types, bool) for k, a in enumerate(node.axes)]
    gain[np.ix_(*agree)] *= 1 - 1 / n  # a token has no overlap with itself
    return Gain(gain, LEADING_ORDER, 2 * overlap)


@once_per_node
def gained_in_common(node: Apply) -> np.ndarray | float:
    """What a product of factors without a common root gains, by type; of a sum with one in it, what that gains."""
    gain: np.ndarray | float = 0.0
    if node.params[0] != "mul":
        for child, bind in node.args:
            if isinstance(child, Apply) and np.any(own := gained_in_common(child)):
                gain = gain + lift(
                    full_types(np.asarray(own), child.axes), child.axes, bind, node.axes, pairs=True
                )
        return gain
    parts = independent_factors(node)
    for i, j in itertools.combinations(range(len(parts)), 2):
        f, g = parts[i], parts[j]
        varied = f.node.deps & g.node.deps and _varies(f) and _varies(g)
        overlaps = {k: _along(f, g, k) for k in set(f.bind) & set(g.bind)} if varied else {}
        tokens = [k for k, v in overlaps.items() if v > 0]
        if tokens:
            term = (
                max(overlaps.values())
                * np.asarray(_own_of_tokens(f, node.axes, tokens))
                * _own_of_tokens(g, node.axes, tokens)
            )
            for other in (h for h in parts if h not in (f, g)):
                term = term * other.second(node.axes)
            gain = gain + term
        if varied:
            _doubt_lengths(f, g)
    return gain


def _doubt_lengths(f: View, g: View) -> None:
    """A given factor, or a projection of given tokens, and one made of the same: how large they are may go together.

    A projection has the mean square |x_a|²/D of what it projects. E[f² g²] is off by as much as |x_a|² varies, for all that is
    known of the other.
    """
    for own, other in ((f, g), (g, f)):
        weight = weight_of(own.node) if isinstance(own.node, Contract) else None
        given = (
            next((v for v in own.node.args if v.node is not weight), own).node
            if weight is not None
            else own.node
        )
        values = numbers(given) if is_known_array(given) and given.deps & other.node.deps else None
        if values is not None and not is_known_array(other.node):
            squares = np.square(values.astype(float)).mean(axis=-1)
            given.graph.flag("assumed", min(float(squares.var() / max(squares.mean(), 1e-300) ** 2), 1.0))


def _varies(factor: View) -> bool:
    """Whether it is a function of what varies from token to token, and not of a norm's scale or of known numbers alone."""
    return not all(isinstance(r.node, Array) or concentrated(r.node) for r in roots(factor.node))


def _along(f: View, g: View, k: int) -> float:
    """V of what both were made of, for tokens along one axis; none where that has axes which they have not in common."""
    both = set(f.bind) & set(g.bind)
    sides = [tokens_of(v, {k}, set(v.bind) - {k}) for v in (f, g)]
    if not all(side.features for side in sides):
        return 0.0
    overlap = overlap_before(*sides)
    return overlap if overlap > 0 and all(_others(side) < len(both) for side in sides) else 0.0


def _own_of_tokens(view: View, frame: Sequence[Axis], tokens: Sequence[int]) -> np.ndarray:
    """By type, what a token has in common with itself that it has not with the other."""
    second = full_types(view.second(frame), frame)
    same = second
    for k in sorted(tokens, reverse=True):
        same = contract_axis(same, k, frame[k].same)
    return np.maximum(np.expand_dims(same, tuple(sorted(tokens))) - second, 0.0)


def _others(side: Tokens) -> int:
    """Axes of what the tokens were made of, beside theirs and its features': there are others along them."""
    while True:
        sources, _ = sources_of(side)
        if len(sources) != 1:
            return 0
        last, side = side, sources[0]
        if isinstance(last.node, Contract):
            return len(side.node.axes) - len(side.tokens) - len(side.features)


def _own_part(
    view: View, frame: Sequence[Axis], summed: Sequence[int], together: Sequence[int]
) -> np.ndarray:
    """What an entry has of its own along the summed axes, by type of the others; where `together`, that of one sample."""
    second = full_types(view.second(frame), frame)
    same, every = second, second
    for k in reversed(summed):
        same, every = contract_axis(same, k, frame[k].same), contract_axis(every, k, frame[k].any_pair)
    n = math.prod(frame[k].size for k in summed)
    own = np.maximum(same - every, 0.0) * n / max(n - 1, 1)
    for k in together:
        own = np.expand_dims(contract_axis(own, k, frame[k].same), k)
    return own
