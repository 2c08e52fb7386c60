r"""Norms over few units: what they put out lies on a sphere, and no coordinate of it is Gaussian.

Of x with m independent normal coordinates, y = x/√(mean x²) is √m times a coordinate of a unit vector: y²/m is a Beta(1/2,
(m − 1)/2) variable (±1 for m = 1, Gaussian for m = ∞; excess kurtosis −6/(m + 2)). Over n units m is n, or n − 1 where their
mean is taken away; of correlated units it is 2/r, where r is the relative variance of mean x².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.tables import full_types, means_by_type
from varscale.theory.graph.expressions import Apply, Sum
from varscale.theory.graph.nodes import Node, View
from varscale.theory.integrals.hermite_series import WEIGHTS, Z, sphere_squares
from varscale.theory.propagation.few_terms import held_square
from varscale.theory.propagation.marginals import marginal, placed
from varscale.theory.propagation.scale_responses import companions, responses

_MANY_UNITS = 2000  # units, from where on a shift is below a thousandth
_FREE = 0.1  # ratio of responses up to which a function is one of a normalised array: its epsilon is left
_OFF_CENTRE = 0.1  # share of a mean square that is the mean's, up to which the law is the symmetric one


def sphere_shift(node: Apply) -> tuple[float, float]:
    """How a function of what a norm puts out differs from that of Gaussian units, for which they are taken.

    Returns:
        The relative shift of its second moment, and what is in doubt: half as much again where units are correlated (set
        on the validation grid, not derived), and all of it, in place of the shift, where they are not centred: then the law on
        the sphere is another.
    """
    shift, doubt = 0.0, 0.0
    for main, *scales in companions(node).values():
        scale = next((s for s in scales if _is_scale(s.node) and len(s.bind) < len(main.bind)), None)
        if scale is None or not marginal(main.node).gaussian or abs(responses(node)[main.node][0]) > _FREE:
            continue
        dimension, independent = _dimension(main, scale)
        if dimension > _MANY_UNITS:
            continue
        own = marginal(main.node)
        given = {(main.node.id, main.bind): _root_on_sphere(main, dimension, node.axes)}
        plain, squared = held_square(node, main, {}), held_square(node, main, given)
        found = float(squared @ WEIGHTS / (plain @ WEIGHTS)) - 1 if plain @ WEIGHTS > 0 else 0.0
        if np.sum(own.mean**2) > _OFF_CENTRE * np.sum(own.mean**2 + own.deviation**2):
            doubt += abs(found)
            continue
        shift, doubt = shift + found, doubt + (0.0 if independent else abs(found) / 2)
    return shift, doubt


def _is_scale(node: Node) -> bool:
    return node.averages or (isinstance(node, Sum) and node.is_variance)


def _dimension(main: View, scale: View) -> tuple[float, bool]:
    """2/r, and whether that is what independent units have."""
    units = math.prod(axis.size for axis, place in zip(main.node.axes, main.bind, strict=True) if place not in scale.bind)
    dimension = max(1 / max(mean_squared_correlation(main.node.table.covariance, main, scale), 1e-12), 1.0)
    return dimension, dimension > 0.9 * (units - 1)


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
    out = (
        np.clip(full_types(second, table.axes) / means_by_type(np.sqrt(np.maximum(table.diagonal, 1e-300)), table.axes), -1, 1)
        ** 2
    )
    for k in reversed(range(len(table.axes))):
        axis = table.axes[k]
        out = contract_axis(out, k, axis.same if main.bind[k] in scale.bind else axis.any_pair)
    return float(out)


def _root_on_sphere(main: View, dimension: float, frame: Sequence[Axis]) -> np.ndarray:
    """Values of a root whose normalised coordinates lie on a sphere, over its frame's classes and the normal grid."""
    coordinates = np.sign(Z) * np.sqrt(sphere_squares(dimension))
    coordinates = coordinates / math.sqrt(float(coordinates**2 @ WEIGHTS))
    own = marginal(main.node)
    return placed(own.mean[..., None] + own.deviation[..., None] * coordinates, main, frame)
