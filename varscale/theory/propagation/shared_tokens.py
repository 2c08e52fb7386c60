"""Products of arrays that are uncorrelated and yet not independent: made of the same tokens, or by the same weights.

Given what both were made of, S, the entries of x that are multiplied with the tokens a and b have a covariance that S decides,
and so do those of y: E[x_a x_b | S] = E[x_a x_b] + (own part of x) o_ab, with one and the same overlap o (`token_gram`). Hence

    E[x_a y_a x_b y_b] = E[x_a x_b] E[y_a y_b] + V (own part of x) (own part of y),    V = E[o²], a ≠ b:

of gated units, say; and a sum over tokens gains it for each pair of them. That is kᵀv of linear attention, where S is the
sequence and V one over its features, and (x W)(y W)ᵀ, where S is W and tokens are its columns. It is of order n²V against n for
the rest. What a token's own squared norm varies by, 2V, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, contract_axes
from varscale.theory.domain.tables import LEADING_ORDER, Table, full_types, lift
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import Contract, weight_of
from varscale.theory.graph.nodes import Array, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.propagation.marginals import concentrated, independent_factors
from varscale.theory.propagation.token_gram import Tokens, overlap_before, projected, tokens_of


def gained_by_sum(node: Contract, second: np.ndarray) -> np.ndarray | float:
    """What a contraction of two activations gains over `second`, by type of its output; what is in doubt of it is marked."""
    x, y = node.args
    summed = range(len(node.axes), len(node.frame))
    sides = [tokens_of(v, summed, set(v.bind) - set(w.bind)) for v, w in ((x, y), (y, x))]
    made_alike = x.node.deps & y.node.deps and all(len(side.tokens) == len(summed) for side in sides)
    if not made_alike or (overlap := overlap_before(*sides)) <= 0:
        return 0.0
    several = all(_others(side) > 0 for side in sides)
    tokens = {*summed, *(set(x.bind) & set(y.bind) if several else ())}
    gain = node.contract(overlap * _own_parts(x, y, node.frame, tokens))
    whole, gained = (
        Table(node.axes, np.zeros(()), np.broadcast_to(part, node.frame_types)).mean_square
        for part in (second, gain)
    )
    share = gained / max(whole + gained, 1e-300)
    node.graph.flag("quadrature", LEADING_ORDER * share + 2 * overlap * (1 - share))
    return gain


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
    for f, g in itertools.combinations(parts, 2):
        if not (f.node.deps & g.node.deps and _varies(f) and _varies(g)):
            continue
        overlaps = {k: v for k in set(f.bind) & set(g.bind) if (v := _along(f, g, k)) > 0}
        if overlaps:
            term = max(overlaps.values()) * _own_parts(f, g, node.axes, overlaps)
            for other in (h for h in parts if h not in (f, g)):
                term = term * other.second(node.axes)
            gain = gain + term
        _doubt_lengths(f, g)
    return gain


def _doubt_lengths(f: View, g: View) -> None:
    """A given factor, or a projection of given tokens, and one made of the same: how large they are may go together.

    A projection has the mean square |x_a|²/D of what it projects. E[f² g²] is off by as much as |x_a|² varies, for all that is
    known of the other.
    """
    for own, other in ((f, g), (g, f)):
        weight = weight_of(own.node) if isinstance(own.node, Contract) else None
        given = own.node if weight is None else next(v.node for v in own.node.args if v.node is not weight)
        values = numbers(given) if is_known_array(given) and given.deps & other.node.deps else None
        if values is not None and not is_known_array(other.node):
            squares = np.square(values.astype(float)).mean(axis=-1)
            given.graph.flag("assumed", min(float(squares.var() / max(squares.mean(), 1e-300) ** 2), 1.0))


def _varies(factor: View) -> bool:
    """Whether it is a function of what varies from token to token, and not of a norm's scale or of known numbers alone."""
    return not all(isinstance(r.node, Array) or concentrated(r.node) for r in roots(factor.node))


def _along(f: View, g: View, k: int) -> float:
    """V of what both were made of, for tokens along one axis; none where that has axes which they have not in common."""
    sides = [tokens_of(v, {k}, set(v.bind) - {k}) for v in (f, g)]
    common = len(set(f.bind) & set(g.bind))
    apart = all(side.features for side in sides) and all(_others(side) < common for side in sides)
    return max(overlap_before(*sides), 0.0) if apart else 0.0


def _own_parts(x: View, y: View, frame: Sequence[Axis], tokens: Collection[int]) -> np.ndarray:
    """By type, what a token has in common with itself that it has not with the other: of x times of y."""
    seconds = [full_types(view.second(frame), frame) for view in (x, y)]
    same = (contract_axes(second, {k: frame[k].same for k in tokens}) for second in seconds)
    own = (np.expand_dims(s, tuple(sorted(tokens))) - t for s, t in zip(same, seconds, strict=True))
    return np.multiply(*(np.maximum(part, 0.0) for part in own))


def _others(side: Tokens) -> int:
    """Axes of what the tokens were made of, beside theirs and its features': there are others along them."""
    source = projected(side)
    return 0 if source is None else len(source.node.axes) - len(source.tokens) - len(source.features)
