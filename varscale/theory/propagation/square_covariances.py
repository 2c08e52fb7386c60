"""What squares have in common, two by two: how far the mean of finitely many of them is from their expectation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, refine
from varscale.theory.domain.tables import by_type, lift
from varscale.theory.graph.expressions import Apply, roots_of
from varscale.theory.graph.linear_nodes import Contract, weight_of
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.normal_form import apply
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.integrals.hermite_series import HERMITE, WEIGHTS, power_series
from varscale.theory.propagation.marginals import (
    Environment,
    at_means,
    concentrated,
    evaluate,
    independent_factors,
    integral_key,
    marginal,
    placed,
)
from varscale.theory.propagation.products import product_second
from varscale.theory.propagation.sample_moments import order_correlation
from varscale.theory.propagation.scale_responses import cofactors

_FEW_NUMBERS = 64  # numbers, from where on what a function of several roots leaves to chance is not asked for


def free_share(weight: Leaf, terms: float, units: int) -> float:
    """What of a product's mean square is up to the draw: nothing where it turns its input, some where it projects it."""
    return max(1 - units / terms, 0.0) if weight.orthonormal else 1.0


def _kept_norm(node: Node) -> float:
    """The share of its mean square's own fluctuations that a product lacks, since its input has fixed it."""
    weight = weight_of(node) if isinstance(node, Contract) else None
    if weight is None or not weight.orthonormal or not isinstance(node, Contract):
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
        if len(live) > 1 and math.prod(axis.size for axis in frame) <= _FEW_NUMBERS:
            pairs = pairs * refine(_joint_pairs(factor, frame), frame)
        if len(live) != 1:
            continue
        (root,) = live
        if concentrated(root.node) and len(parts) > 1:
            continue  # a norm's scale: its fluctuations are those of what it normalises
        fixed = at_means([r for r in own if r != root], frame)
        found = _square_coefficients(factor, frame, fixed)
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
    """E[g_i g_j] by type of a function of one root, from its Hermite coefficients and mean square by class."""
    rho = lift(_correlation(root.node), root.node.axes, root.bind, frame, pairs=True)
    ai, aj = (by_type(a, frame, second=second) for second in (False, True))
    alike = np.sqrt(by_type(whole, frame, second=False) * by_type(whole, frame, second=True))
    return np.where(rho >= 1 - 1e-9, alike, power_series(ai * aj, rho))


def _joint_pairs(factor: View, frame: tuple[Axis, ...]) -> np.ndarray:
    """The same of a function of several roots, all that they share included."""
    coarse = tuple(Axis(axis.size) for axis in frame)
    square = View(apply(factor.node.graph, "integer_pow", (2,), frame, [factor]), tuple(range(len(frame))))
    mean = product_second(factor, factor, coarse)[(0,) * len(frame)]
    return product_second(square, square, coarse) / mean**2 if mean > 0 else np.ones([1] * len(frame))


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


def _correlation(root: Node) -> np.ndarray:
    """A root's latent correlations by type, as far as it has an order in time those of draws."""
    ordered = order_correlation(root)
    return marginal(root).correlation if ordered is None else refine(ordered, root.axes)


_SQUARED: Fact[Hashable, tuple[np.ndarray, np.ndarray] | None] = (
    Fact()
)  # Hermite coefficients of f² and E[f⁴], by form
