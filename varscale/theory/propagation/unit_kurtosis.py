r"""Units that a norm divides are not exactly Gaussian: what their excess kurtosis does to a function of them.

To first order in it (the Gram-Charlier series of type A), with the Hermite coefficients a_k of f²,

    E[f(y)²] = a_0 + excess · a_4 / √24.

On a sphere: x/√(mean x²) of m independent normals has excess −6/(m + 2); of correlated ones m is 2/r, r the relative variance
of mean x². Sums of few terms: given its weights, Σ w_k x_k over n terms keeps the excess of x times Σ w⁴/(Σ w²)², about
κ/(n + κ − 1) for weights of kurtosis κ. Where no norm divides, y is Gaussian given x, and `fluctuations` tell the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import contract_axis
from varscale.theory.domain.tables import full_types, means_by_type
from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.expressions import Apply, Sum, roots, roots_of
from varscale.theory.graph.factors import factors
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Leaf, Node, View
from varscale.theory.integrals.hermite_series import HERMITE, WEIGHTS
from varscale.theory.propagation.marginals import along, concentrated, marginal, over_classes
from varscale.theory.propagation.scale_responses import cofactors


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
    view = main
    if main.node.is_centred:
        shares = [
            c * c * term.node.table.mean_square
            for c, term in zip(main.node.params, main.node.args, strict=True)
        ]
        view = main.node.args[int(np.argmax(shares))].within(main.bind)
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


def mean_squared_correlation(second: np.ndarray, main: View, scale: View) -> float:
    """The mean of M_ij² / (E[x_i²] E[x_j²]) over the pairs of positions that one norm averages over.

    For jointly Gaussian x, Cov[x_i², x_j²] = 2 C_ij² + 4 m_i m_j C_ij = 2 (E[x_i x_j]² − m_i² m_j²). So a norm's variance v has
    Var[v]/E[v]² = 2 (this of E[x_i x_j] − this of m_i m_j), and 2 (this of C) for x less its mean.

    Args:
        second: M by type of the root's pairs.
        main: the root x that is normalised, over a frame.
        scale: the norm's variance, over the same frame: along the axes that it lacks it is a mean.
    """
    table = main.node.table
    sizes = means_by_type(np.sqrt(np.maximum(table.diagonal, 1e-300)), table.axes)
    out = np.clip(full_types(second, table.axes) / sizes, -1, 1) ** 2
    for k in reversed(range(len(table.axes))):
        axis = table.axes[k]
        out = contract_axis(out, k, axis.same if main.bind[k] in scale.bind else axis.any_pair)
    return float(out)
