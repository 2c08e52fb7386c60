"""Fourth moments: of units that a norm divides, and of the squares whose mean finitely many units have.

Units that a norm divides are not exactly Gaussian. To first order in their excess kurtosis (Gram-Charlier series of type A),
with the Hermite coefficients a_k of f²,

    E[f(y)²] = a_0 + excess · a_4 / √24.

On a sphere: x/√(mean x²) of m independent normals has excess −6/(m + 2); of correlated ones m is 2/r, r the relative variance
of mean x². Sums of few terms: given its weights, Σ w_k x_k over n terms keeps the excess of x times Σ w⁴/(Σ w²)², about
κ/(n + κ − 1) for weights of kurtosis κ. Where no norm divides, y is Gaussian given x, and `fluctuations` tell the rest.

How far the mean of finitely many squares is from its expectation follows from E[x_i² x_j²] of all pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Sequence

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.tables import NEGLIGIBLE, by_type, full_types, lift, means_by_type
from varscale.theory.graph.convolutions import Conv, tap_scatter
from varscale.theory.graph.expressions import Apply, Sum, factors, roots, roots_of
from varscale.theory.graph.known_arrays import Computed, scatter_of_given
from varscale.theory.graph.linear_nodes import Contract, Gather, Rearranged, weight_of
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.integrals.hermite_series import HERMITE, WEIGHTS, Z, power_series
from varscale.theory.propagation.marginals import (
    Environment,
    along,
    at_means,
    cofactors,
    concentrated,
    evaluate,
    grid,
    independent_factors,
    integral_key,
    largest_term,
    marginal,
    over_classes,
    placed,
)
from varscale.theory.propagation.token_gram import Tokens, overlap, own_part, patch_overlap, tokens_of


def kurtosis_shift(node: Apply) -> tuple[float, float]:
    """How a function of normalised units differs from that of Gaussian ones, for which they are taken.

    Returns:
        The relative shift of its second moment, which is no more certain than it is large; and its size. It is left out where
        units are not centred, or each reads an input of its own.
    """
    shift, doubt = 0.0, 0.0
    for main, *scales in cofactors(node).values():
        for excess, sure in (_of_few_terms(main, scales), _on_a_sphere(main, scales)) if scales else ():
            found = excess * _response(node, main) if excess else 0.0
            shift, doubt = shift + found * sure, doubt + abs(found)
    return shift, doubt


def _response(node: Apply, main: View) -> float:
    """a_4 / (√24 a_0) of the square of all factors that read a root, the other roots held at their means."""
    product = np.ones(len(WEIGHTS))
    for factor in factors(View(node, tuple(range(len(node.axes)))))[1]:
        if main in roots_of(factor):
            product = product * over_classes(np.square(along(factor, node.axes, main)), node.axes)
    a = product @ HERMITE
    return float(a[4] / (math.sqrt(24) * a[0])) if a[0] > 0 else 0.0


def _of_few_terms(main: View, scales: Sequence[View]) -> tuple[float, bool]:
    """Excess kurtosis of sums of few terms, and whether the norm is over other axes than that of their units."""
    whole, view = main.node, main
    if isinstance(whole, Sum) and whole.is_centred:
        view = largest_term(whole).within(main.bind)
    node = view.node
    if not isinstance(node, Conv | Contract):
        return 0.0, True
    x, w = next(
        ((x, w) for x, w in (node.args, node.args[::-1]) if isinstance(w.node, Leaf) and not w.node.is_input),
        (None, None),
    )
    if x is None or w is None:
        return 0.0, True
    if isinstance(node, Conv):
        channels = node.params.out_dims[1]
        units = set() if channels is None else {view.bind[channels]}
    else:
        units = {view.bind[k] for k in range(len(node.axes)) if k in w.bind and k not in x.bind}
    inside = bool(units) and all(units <= set(scale.bind) for scale in scales)
    if not units or not (inside or (isinstance(node, Conv) and node.params.groups > 1)):
        return 0.0, True
    own = getattr(w.node, "kurtosis", 3.0)
    return excess_kurtosis(x.node) * own / (node.width + own - 1), inside


def excess_kurtosis(node: Node) -> float:
    """E[(x − m)⁴] / Var[x]² − 3 of a function of one root; what is a sum is Gaussian."""
    live = [r for r in roots(node) if not concentrated(r.node)]
    if not isinstance(node, Apply) or len(live) != 1:
        return 0.0
    values = along(View(node, tuple(range(len(node.axes)))), node.axes, *live)
    if values.shape[-1] != len(WEIGHTS):
        return 0.0
    values = values - (values @ WEIGHTS)[..., None]
    fourth, square = (float(over_classes(values**k, node.axes) @ WEIGHTS) for k in (4, 2))
    return fourth / max(square, 1e-300) ** 2 - 3


def _on_a_sphere(main: View, scales: Sequence[View]) -> tuple[float, bool]:
    """Excess kurtosis of Gaussian units over the root of their mean square, and whether their mean is a small part of it."""
    scale = next((s for s in scales if _is_mean_square(s.node) and len(s.bind) < len(main.bind)), None)
    own = marginal(main.node)
    if scale is None or not own.gaussian:
        return 0.0, True
    r = mean_squared_correlation(main.node.table.covariance, main, scale)
    centred = bool(np.sum(own.mean**2) <= 0.1 * np.sum(own.mean**2 + own.deviation**2))
    return -6 / (max(1 / max(r, 1e-12), 1.0) + 2), centred


def _is_mean_square(node: Node) -> bool:
    return node.averages or (isinstance(node, Sum) and node.is_variance)


def mean_squared_correlation(second: np.ndarray, main: View, scale: View, power: int = 2) -> float:
    """The mean of M_ij² / (E[x_i²] E[x_j²]) over the pairs of positions that one norm averages over.

    For jointly Gaussian x, Cov[x_i², x_j²] = 2 C_ij² + 4 m_i m_j C_ij = 2 (E[x_i x_j]² − m_i² m_j²). So a norm's variance v has
    Var[v]/E[v]² = 2 (this of E[x_i x_j] − this of m_i m_j), and 2 (this of C) for x less its mean.

    Args:
        second: M by type of the root's pairs.
        main: the root x that is normalised, over a frame.
        scale: the norm's variance, over the same frame: along the axes that it lacks it is a mean.
        power: 1 for the most that it can be where a type's pairs differ, but have one sign: ρ² ≤ |ρ|.
    """
    table = main.node.table
    sizes = means_by_type(np.sqrt(np.maximum(table.diagonal, 1e-300)), table.axes)
    out = np.abs(np.clip(full_types(second, table.axes) / sizes, -1, 1)) ** power
    for k in reversed(range(len(table.axes))):
        axis = table.axes[k]
        out = contract_axis(out, k, axis.same if main.bind[k] in scale.bind else axis.any_pair)
    return float(out)


def origin(node: Node) -> int:
    """The root whose sampled units a node's are: a function of a root, or a centred copy, fluctuates with it."""
    while True:
        if isinstance(node, Apply):
            own = [r.node for r in roots(node) if not concentrated(r.node)]
            if len(own) != 1:
                return node.id
            node = own[0]
        elif isinstance(node, Sum) and node.is_centred:
            node = largest_term(node).node
        elif isinstance(node, Rearranged):
            node = node.args[0].node
        else:
            return node.id


def fresh(node: Node, axes: Sequence[int]) -> float:
    """Relative variance of the mean of x² over `axes`, the other axes held, from sampling alone."""
    return _fresh(node, tuple(axes))


@once_per_node
def _fresh(node: Node, over: tuple[int, ...]) -> float:
    axes = set(over)
    if isinstance(node, Computed):
        return scatter_of_given(node, axes)
    source = _rearranged(node, axes)
    if source is not None:
        return fresh(*source)
    pairs, squares = square_pairs(node)
    for k in reversed(range(len(node.axes))):
        axis = node.axes[k]
        if k not in axes:
            pairs = pairs.take(range(axis.classes), axis=k) if pairs.shape[k] > 1 else pairs
            continue
        pairs = contract_axis(pairs, k, axis.any_pair) if pairs.shape[k] > 1 else pairs.take(0, axis=k)
        squares = (
            contract_axis(squares, k, axis.counts / axis.size)
            if squares.shape[k] > 1
            else squares.take(0, axis=k)
        )
    # Places that are held are what they are: that some are larger than others is no chance.
    varied = np.where(squares > 0, pairs / np.maximum(squares, 1e-150) ** 2, 1.0)
    held = [axis for k, axis in enumerate(node.axes) if k not in axes]
    excess = float(over_classes(varied, held)) - 1.0
    return excess if excess > _EXCESS_ROUNDING else 0.0


def _rearranged(node: Node, axes: set[int]) -> tuple[Node, tuple[int, ...]] | None:
    """What a split, merged or permuted array was before, and which of its axes these are; None where some are parts of one."""
    if not isinstance(node, Rearranged):
        return None
    before = {j for k in axes for j in node.before(k)}
    if axes != {k for k in range(len(node.axes)) if before.issuperset(node.before(k))}:
        return None
    return node.args[0].node, tuple(sorted(before))


_EXCESS_ROUNDING = 1e-12  # what rounding leaves of a relative variance that is zero


def free_share(weight: Leaf, terms: float, units: int) -> float:
    """What of a product's mean square is up to the draw: nothing where it turns its input, some where it projects it."""
    return max(1 - units / terms, 0.0) if weight.name[0] == "orthonormal" else 1.0


def _kept_norm(node: Node) -> float:
    """The share of its mean square's own fluctuations that a product lacks, since its input has fixed it."""
    weight = weight_of(node) if isinstance(node, Contract) else None
    if weight is None or weight.name[0] != "orthonormal" or not isinstance(node, Contract):
        return 0.0
    inputs = [view.bind for view in node.args if not view.node.deps & weight.deps]
    units = math.prod(axis.size for k, axis in enumerate(node.axes) if not any(k in bind for bind in inputs))
    return 1 - free_share(weight, node.width, units)


@once_per_node
def square_pairs(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """E[x_i² x_j²] of an elementwise tree by type and E[x_i²] by class, up to a factor; 1 long where they do not vary."""
    frame = node.axes
    pairs, means = np.ones([1] * len(frame)), np.ones([1] * len(frame))
    scales = [g[0].node.id for g in cofactors(node).values() if len(g) > 1]
    parts = independent_factors(node)
    for factor in parts:
        own = [r for r in roots_of(factor) if not isinstance(r.node, Array)]
        live = [r for r in own if len(own) == 1 or not concentrated(r.node)]
        bits = [r for r in live if r.node.is_bits]
        if len(bits) + 1 == len(live):
            live = [r for r in live if r not in bits]
        if len(live) != 1:
            continue
        (root,) = live
        if concentrated(root.node) and len(parts) > 1:
            continue  # a norm's scale: its fluctuations are those of what it normalises
        bits = [r for r in bits if r != root]
        fixed = at_means([r for r in own if r != root and r not in bits], frame)
        found = _over_bits(factor, frame, fixed, bits)
        if found is None:
            continue
        a, whole = found[0].copy(), found[1]
        if root.node.id in scales:
            # Normalised: the mean square of the root cannot fluctuate; nor can its mean, where that was taken
            # away.
            gone = slice(1, 3) if root.node.is_centred else slice(2, 3)
            whole = whole - np.sum(a[..., gone] ** 2, axis=-1)
            a[..., gone] = 0.0
        elif kept := _kept_norm(root.node):
            whole = whole - kept * a[..., 2] ** 2
            a[..., 2] *= math.sqrt(1 - kept)
        pairs, means = pairs * _products(a, whole, root, frame), means * a[..., 0]
    return pairs, means


def _products(a: np.ndarray, whole: np.ndarray, root: View, frame: tuple[Axis, ...]) -> np.ndarray:
    """E[g_i g_j] by type of a function of one root, from its Hermite coefficients and mean square by class.

    Over draws the correlation ρ of two entries has a variance v (`_correlation_scatter`). Of n directions, v = 1/n, it has the
    fourth moment k v² with k = 3/(1 + 2v), as ρ + (−s, 0, s) has for s² = k v and weights (1, 2k − 2, 1)/2k: exact at n = 1.
    """
    rho = lift(marginal(root.node).correlation, root.node.axes, root.bind, frame, pairs=True)
    ai, aj = (by_type(a, frame, second=second) for second in (False, True))
    alike = np.sqrt(by_type(whole, frame, second=False) * by_type(whole, frame, second=True))
    out = power_series(ai * aj, rho)
    v = lift(_correlation_scatter(root.node), root.node.axes, root.bind, frame, pairs=True)
    if np.any(v > NEGLIGIBLE):
        k = 3 / (1 + 2 * v)
        ends = (power_series(ai * aj, np.clip(rho + sign * np.sqrt(k * v), -1, 1)) for sign in (-1, 1))
        out = out + (sum(ends) / 2 - out) / k
    return np.where(rho >= 1 - 1e-9, alike, out)


@once_per_node
def _correlation_scatter(node: Node) -> np.ndarray:
    """Variance over draws of the correlation of two tokens of one unit, by type: their inputs overlap by chance.

    What the weights of a unit add to it, whose squared norm is one for all tokens, is in `fluctuations.with_own_weights`.
    """
    out = np.zeros(node.frame_types)
    if isinstance(node, Gather):  # rows of a table: two are one and the same, or they are not
        rate = np.clip(node.table.covariance / max(node.table.variance, 1e-300), 0, 1)
        return rate * (1 - rate)
    whole = node.table.mean_square
    if isinstance(node, Sum) and whole > 0:  # the mean of what is centred is 0, or below it by rounding
        for c, view in zip(node.params, node.args, strict=True):
            share = c * c * view.node.table.mean_square / whole
            inner = _correlation_scatter(view.node)
            out = out + share**2 * lift(inner, view.node.axes, view.bind, node.axes, pairs=True)
    if isinstance(node, Conv) and weight_of(node) is not None:
        return _patch_scatter(node)
    if not isinstance(node, Contract) or (weight := weight_of(node)) is None:
        return out
    for view in node.args:
        x = tokens_of(view, range(len(node.axes)), range(len(node.axes), len(node.frame)))
        if view.node is weight or not (x.tokens and x.features):
            continue
        own = min(own_part(x) / max(x.node.table.mean_square, 1e-300), 1.0)
        out = out + max(overlap(x) - 1 / x.count, 0.0) * own**2 * _of_one_unit(node, view.bind)
    return out


def _of_one_unit(node: Node, tokens: Collection[int]) -> np.ndarray:
    """By type, 1 of two tokens of one unit, else 0."""
    equal = [axis.agrees.astype(float) for axis in node.axes]
    one_unit = [np.ones_like(e) if k in tokens else e for k, e in enumerate(equal)]
    differ, same = (functools.reduce(np.multiply.outer, lines, np.array(1.0)) for lines in (one_unit, equal))
    return differ - same


def _patch_scatter(node: Conv) -> np.ndarray:
    """The same of a convolution: given patches overlap more than white ones, and not all pairs of a type share as many taps."""
    _, windows, dims, _, places = node.params
    x, shared = node.args[0].node, np.ones([1] * len(node.axes))
    for window, before, k in zip(windows, dims[2:], places[2:], strict=True):
        if k is not None and before is not None:
            line = tap_scatter(window, x.axes[before], node.axes[k])
            shared = shared * line.reshape([-1 if j == k else 1 for j in range(len(node.axes))])
    tokens = tuple(k for d, k in enumerate(places) if k is not None and d != 1)
    own = own_part(Tokens(node, tokens, ())) / max(node.table.mean_square, 1e-300)
    excess = max(patch_overlap(node) - 1 / node.width, 0.0) * min(own, 1.0) ** 2
    return marginal(node).correlation ** 2 * (shared - 1) + excess * _of_one_unit(node, tokens)


def _over_bits(
    f: View, frame: Sequence[Axis], fixed: Environment, bits: Sequence[View]
) -> tuple[np.ndarray, np.ndarray] | None:
    """`_square_coefficients`, averaged over random bits, of which each entry has its own: a mask's."""
    if not bits:
        return _square_coefficients(f, frame, fixed)
    coefficients, whole, points = np.zeros(()), np.zeros(()), np.linspace(0.025, 0.975, 20)
    for z in special.ndtri(points):
        at = {b: np.interp([z], Z, over_classes(grid(b, frame), frame)) for b in bits}
        env = fixed | {b: x.reshape([1] * (len(frame) + 1)) for b, x in at.items()}
        if (found := _square_coefficients(f, frame, env)) is not None:
            coefficients, whole = coefficients + found[0] / len(points), whole + found[1] / len(points)
    return (coefficients, whole) if np.any(coefficients) else None


def _square_coefficients(
    f: View, frame: Sequence[Axis], fixed: Environment
) -> tuple[np.ndarray, np.ndarray] | None:
    """By class, Hermite coefficients of f² and E[f⁴]; None where f does not vary or is zero."""
    own = marginal(f.node) if not isinstance(f.node, Apply | Constant) else None
    if own is not None and own.gaussian:
        m, s = own.mean, own.deviation
        a = placed(np.stack([m * m + s * s, 2 * m * s, math.sqrt(2) * s * s], axis=-1), f, frame)
        return (a, np.sum(a * a, axis=-1)) if np.any(a[..., 0] > 0) else None

    def integrated() -> tuple[np.ndarray, np.ndarray] | None:
        squares = np.asarray(evaluate(f, frame, fixed), float) ** 2
        if squares.shape[-1] == 1:
            return None
        a = squares @ HERMITE
        return (a, squares**2 @ WEIGHTS) if np.any(a[..., 0] > 0) else None

    mark = None if fixed else integral_key(f)
    return integrated() if mark is None else _SQUARED.once(f.node.graph, (mark, tuple(frame)), integrated)


_SQUARED: Fact[Hashable, tuple[np.ndarray, np.ndarray] | None] = (
    Fact()
)  # Hermite coefficients of f² and E[f⁴], by form
