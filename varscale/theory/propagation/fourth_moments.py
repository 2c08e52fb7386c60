"""Fourth moments: of units that a norm divides, and of the squares whose mean finitely many units have.

Units that a norm divides are not exactly Gaussian. To first order in their excess kurtosis (Gram-Charlier series of type A),
with the Hermite coefficients a_k of f²,

    E[f(y)²] = a_0 + excess · a_4 / √24.

On a sphere: x/√(mean x²) of m independent normals has excess −6/(m + 2); of correlated ones m is 2/r, r the relative variance
of mean x². Sums of few terms: given its weights, Σ w_k x_k over n terms keeps the excess of x times Σ w⁴/(Σ w²)², about
κ/(n + κ − 1) for weights of kurtosis κ. Where no norm divides, y is Gaussian given x, and `fluctuations` tell the rest.

How far the mean of finitely many squares is from its expectation follows from E[x_i² x_j²] of all pairs.
"""

import functools
import itertools
import math
from collections.abc import Collection, Container, Sequence

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axes, average, contract_axes, equal, outer, over_classes, rest
from varscale.theory.domain.tables import NEGLIGIBLE, by_type, full_types, means_by_type
from varscale.theory.graph.convolutions import Conv, by_axis, dim_axes, tap_scatter
from varscale.theory.graph.expressions import Apply, Sum, factors, roots, roots_of
from varscale.theory.graph.known_arrays import Computed, scatter_of_given
from varscale.theory.graph.linear_nodes import Concat, Contract, Gather, applied_weights, axes_before, unmoved
from varscale.theory.graph.nodes import Array, Leaf, Node, View
from varscale.theory.graph.normal_form import apply, mean_node
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import HERMITE, WEIGHTS, Z, power_series
from varscale.theory.propagation.marginals import (
    Environment,
    along,
    at_means,
    cofactors,
    concentrated,
    evaluate,
    fluctuating,
    grid,
    independent_factors,
    marginal,
    of_terms,
    term_shares,
    uncentred,
)
from varscale.theory.propagation.token_gram import (
    Tokens,
    covariance,
    overlap_before,
    own_part,
    own_terms,
    patch_overlap,
    tokens_averaged,
    tokens_of,
)


def kurtosis_shift(node: Apply) -> tuple[float, float]:
    """The relative shift of the second moment of a function of normalised units from that of Gaussian ones, and its doubt.

    A shift is no more certain than it is large. It is left out where units are not centred, or each reads an input of its own.
    """
    shift, doubt = 0.0, 0.0
    for main, *scales in cofactors(node).values():
        for excess, sure in (_of_few_terms(main, scales), _on_a_sphere(main, scales)) if scales else ():
            found = excess * _response(node, main) if excess else 0.0
            shift, doubt = shift + found * sure, doubt + abs(found)
    return shift, doubt


def _response(node: Apply, main: View) -> float:
    """a_4 / (√24 a_0) of the square of all factors that read a root, the other roots held at their means."""
    read = [along(factor, node.axes, main) for factor in factors(node.whole)[1] if main in roots_of(factor)]
    lines = (over_classes(np.square(line), node.axes) for line in read)
    a = functools.reduce(np.multiply, lines, np.ones(len(WEIGHTS))) @ HERMITE
    return float(a[4] / (math.sqrt(24) * a[0])) if a[0] > 0 else 0.0


def _of_few_terms(main: View, scales: Sequence[View]) -> tuple[float, bool]:
    """Excess kurtosis of sums of few terms, and whether the norm is over other axes than that of their units."""
    node, bind = uncentred(main)
    for leaf, _, x, own in applied_weights(node):
        units = {bind[k] for k in own}
        inside = all(units <= set(scale.bind) for scale in scales)
        if units and (inside or (isinstance(node, Conv) and node.params.groups > 1)):
            return excess_kurtosis(x.node) * leaf.kurtosis / ((node.width or 1) + leaf.kurtosis - 1), inside
    return 0.0, True


def excess_kurtosis(node: Node) -> float:
    """E[(x − m)⁴] / Var[x]² − 3 of a function of one root; what is a sum is Gaussian."""
    live = fluctuating(roots(node))
    if not isinstance(node, Apply) or len(live) != 1:
        return 0.0
    values = along(node.whole, node.axes, *live)
    values = values - (values @ WEIGHTS)[..., None]
    fourth, square = (float(over_classes(values**k, node.axes) @ WEIGHTS) for k in (4, 2))
    return fourth / max(square, 1e-300) ** 2 - 3


def _on_a_sphere(main: View, scales: Sequence[View]) -> tuple[float, bool]:
    """Excess kurtosis of Gaussian units over the root of their mean square, and whether their mean is a small part of it."""
    means = [s for s in scales if (s.node.averages or s.node.is_variance) and len(s.bind) < len(main.bind)]
    own = marginal(main.node)
    if not means or not own.gaussian:
        return 0.0, True
    r = mean_squared_correlation(main.node.table.covariance, main, means[0])
    centred = bool(np.sum(own.mean**2) <= 0.1 * np.sum(own.mean**2 + own.deviation**2))
    return -6 / (max(1 / max(r, 1e-12), 1.0) + 2), centred


def mean_squared_correlation(second: np.ndarray, main: View, scale: View, power: int = 2) -> float:
    """The mean of M_ij², M given by type, over pairs of the positions that a norm of x averages over, by E[mean x²]².

    For jointly Gaussian x, Cov[x_i², x_j²] = 2 C_ij² + 4 m_i m_j C_ij = 2 (E[x_i x_j]² − m_i² m_j²). So a norm's variance v has
    Var[v]/E[v]² = 2 (this of E[x_i x_j] − this of m_i m_j), and 2 (this of C) for x less its mean. `scale` is v, a mean along
    the axes that it lacks. With power=1 it is the most that it can be where a type's pairs differ, but have one sign: ρ² ≤ |ρ|.
    """
    table, axes = main.node.table, main.node.axes
    sizes = means_by_type(np.sqrt(np.maximum(table.diagonal, 1e-300)), axes)
    pairs = np.abs(np.clip(full_types(second, axes) / sizes, -1, 1)) ** power * sizes**2
    return _over_squared_mean(pairs, table.diagonal, axes, main.axes_beyond(scale))


def _over_squared_mean(pairs: np.ndarray, squares: np.ndarray, axes: Axes, over: Collection[int]) -> float:
    """The mean over pairs along some axes, over the squared mean of squares there; averaged over the places that are held."""
    pairs = contract_axes(pairs, {k: axes[k].any_pair for k in over})
    squares = over_classes(squares, axes, over)
    held = [axis for k, axis in enumerate(axes) if k not in over]
    varied = np.where(squares > 0, pairs[equal(held)] / np.maximum(squares, 1e-150) ** 2, 1.0)
    return float(over_classes(varied, held))


def origin(node: Node) -> Node:
    """The root whose sampled units a node's are: a function of a root, or a centred copy, fluctuates with it."""
    while True:
        views = fluctuating(roots(node)) if isinstance(node, Apply) else [uncentred(node.whole)]
        below = [unmoved(view.node) for view in views]
        if len(below) != 1 or below[0] is node:
            return node
        node = below[0]


@once_per_node
def fresh(node: Node, axes: Collection[int] | None = None) -> float:
    """Relative variance of the mean of x² over `axes` (None: all), the other axes held, from sampling alone."""
    over = set(node.whole.bind if axes is None else axes)
    if isinstance(node, Computed):
        return scatter_of_given(node, over)
    if unmoved(node) is not node:
        before = {j for k in over for j in axes_before(node, k)}
        if over == {k for k in range(len(node.axes)) if before.issuperset(axes_before(node, k))}:
            return fresh(node.argument, tuple(sorted(before)))
    squares = mean_node(apply(node.graph, "integer_pow", (2,), node.axes, [node.whole]), over)
    if over and {r.node for r in roots(squares)} <= {r.node for r in roots(node)}:  # of a norm, fixed
        return 0.0
    excess = _over_squared_mean(*square_pairs(node), node.axes, over) - 1.0
    # Terms, and parts of what is joined, add what of their squares is not as in Gaussian arrays: of gates.
    joined = isinstance(node, Sum | Concat)
    for share, view in zip(term_shares(node), node.args, strict=True) if joined else ():
        if (part := view.node).entrywise:
            own, table = view.axes_at(over), part.table
            gaussian = 2 * average(table.second**2 - table.outer**2, table.axes, own) / table.divisor**2
            excess += share**2 * (fresh(part, own) - gaussian)
    return excess if excess > EXCESS_ROUNDING else 0.0


EXCESS_ROUNDING = 1e-12  # what rounding leaves of a relative variance that is zero


def free_share(weight: Leaf, terms: float, units: int) -> float:
    """What part of a product's sampling variance is left: none where weights rotate the input, less where they project it."""
    return max(1 - units / terms, 0.0) if weight.kind == "orthonormal" else 1.0


@once_per_node
def square_pairs(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """E[x_i² x_j²] of an elementwise tree by type and E[x_i²] by class, up to a factor; 1 long where they do not vary."""
    frame = node.axes
    pairs = means = np.ones([1] * len(frame))
    scales = [g[0].node.id for g in cofactors(node).values() if len(g) > 1]
    parts = independent_factors(node)
    for factor in parts:
        own = [r for r in roots_of(factor) if not isinstance(r.node, Array)]
        live = [r for r in own if len(own) == 1 or not concentrated(r.node)]
        bits = [r for r in live if r.node.is_bits] if len(live) > 1 else []
        live = [r for r in live if r not in bits]
        # A norm's scale does not count: its fluctuations are those of what it normalises.
        if len(live) != 1 or (concentrated(live[0].node) and len(parts) > 1):
            continue
        (root,) = live
        fixed = at_means([r for r in own if r != root and r not in bits], frame)
        found = _square_coefficients(factor, frame, fixed, bits)
        if found is None or not np.any(found[0][..., 0] > 0):
            continue
        # The share of its mean square's own fluctuations that a product lacks, since its input has fixed it.
        weights = applied_weights(root.node) if isinstance(root.node, Contract) else ()
        units = [(w.leaf, root.node.count(w.units)) for w in weights]
        kept = max((1 - free_share(leaf, root.node.width or 1, n) for leaf, n in units), default=0.0)
        # Of what a norm divides the mean square cannot fluctuate, nor the mean, where that was taken away.
        normed = root.node.id in scales
        kept, gone = 1.0 if normed else kept, slice(1 if normed and root.node.is_centred else 2, 3)
        a = found[0].copy()
        whole = found[1] - kept * np.sum(a[..., gone] ** 2, axis=-1)
        a[..., gone] *= math.sqrt(1 - kept)
        pairs, means = pairs * _products(a, whole, root, frame), means * a[..., 0]
    return pairs, means


def _products(a: np.ndarray, whole: np.ndarray, root: View, frame: Axes) -> np.ndarray:
    """E[g_i g_j] by type of a function of one root, from its Hermite coefficients and mean square by class.

    Over draws the correlation ρ of two entries has a variance v (`correlation_scatter`). Of n directions, v = 1/n, it has the
    fourth moment k v² with k = 3/(1 + 2v), as ρ + (−s, 0, s) has for s² = k v and weights (1, 2k − 2, 1)/2k: exact at n = 1.
    """
    rho = root.over(marginal(root.node).correlation, frame, pairs=True)
    ai, aj = (by_type(a, frame, second=second) for second in (False, True))
    alike = np.sqrt(means_by_type(whole, frame))
    out = power_series(ai * aj, rho)
    v = root.over(correlation_scatter(root.node), frame, pairs=True)
    if np.any(v > NEGLIGIBLE):
        k = 3 / (1 + 2 * v)
        ends = power_series(ai * aj, np.clip(rho + np.multiply.outer((-1, 1), np.sqrt(k * v)), -1, 1))
        out = out + (sum(ends) / 2 - out) / k
    return np.where(rho >= 1 - 1e-9, alike, out)


@once_per_node
def correlation_scatter(node: Node) -> np.ndarray:
    """Variance over draws of the correlation of two tokens of one unit, by type: their inputs overlap by chance.

    What the weights of a unit add to it, whose squared norm is one for all tokens, is in `fluctuations.with_own_weights`.
    """
    whole, last, applied = node.table.mean_square, len(node.axes) - 1, applied_weights(node)
    if isinstance(node, Gather):  # rows of a table: two are one and the same, or they are not
        rate = np.clip(node.table.covariance / max(node.table.variance, 1e-300), 0, 1)
        return rate * (1 - rate)
    if isinstance(node, Conv) and applied:
        return _patch_scatter(node)
    if isinstance(node, Sum) and whole > 0:  # the mean of what is centred is 0, or below it by rounding
        pairs = itertools.combinations(own_terms(node, Tokens(node, tuple(range(last)), (last,))), 2)
        common = sum(2 * a * b * max(covariance(x, y), 0.0) for (x, a), (y, b) in pairs) / whole**2
        return sum(of_terms(node, correlation_scatter), common * _of_one_unit(node, range(last)))
    if applied or tokens_averaged(node):
        view, features = (applied[0].x, node.summed) if isinstance(node, Contract) else (node.whole, [last])
        x = tokens_of(view, tokens := {*view.bind} - {*features}, features)
        if x.tokens and x.features:
            own = min(own_part(x) / x.node.table.divisor, 1.0)
            return overlap_before(x, x) * own**2 * _of_one_unit(node, tokens)
    return np.zeros(node.frame_types)


def _of_one_unit(node: Node, tokens: Container[int]) -> np.ndarray:
    """By type, 1 of two tokens of one unit, else 0."""
    one_unit = outer(axis.agrees | (k in tokens) for k, axis in enumerate(node.axes))
    return one_unit - outer(axis.agrees for axis in node.axes)


def _patch_scatter(node: Conv) -> np.ndarray:
    """The same of a convolution: given patches overlap more than white ones, and not all pairs of a type share as many taps."""
    _, windows, dims, _, places = node.params
    lines = map(tap_scatter, windows, dim_axes(node.argument, dims)[2:], dim_axes(node, places)[2:])
    shared, tokens = by_axis(outer([np.ones(1), np.ones(1), *lines]), places), rest(node.axes, places[1:2])
    own = own_part(Tokens(node, tuple(tokens), ())) / node.table.divisor
    excess = max(patch_overlap(node) - 1 / node.width, 0.0) * min(own, 1.0) ** 2
    return marginal(node).correlation ** 2 * (shared - 1) + excess * _of_one_unit(node, tokens)


def _square_coefficients(
    f: View, frame: Axes, fixed: Environment, bits: Sequence[View]
) -> tuple[np.ndarray, np.ndarray] | None:
    """By class, Hermite coefficients of f² and E[f⁴]; None where f does not vary.

    They are averaged over random bits, of which each entry has its own: a mask's.
    """
    lines = {b: over_classes(grid(b, frame), frame) for b in bits}
    points = special.ndtri(np.linspace(0.025, 0.975, 20)) if bits else (0.0,)
    flat = (1,) * (len(frame) + 1)
    drawn = ({b: np.full(flat, np.interp(z, Z, line)) for b, line in lines.items()} for z in points)
    squares = [np.square(evaluate(f, frame, fixed | at), dtype=float) for at in drawn]
    if squares[0].shape[-1] == 1:
        return None
    square, fourth = (sum(x**k for x in squares) / len(squares) for k in (1, 2))
    return square @ HERMITE, fourth @ WEIGHTS
