"""Correlations of the normals behind two roots, and factors of correlation matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.accuracy import NEXT_ORDER
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import by_type, lift
from varscale.theory.graph.expressions import Apply
from varscale.theory.graph.nodes import Graph, View
from varscale.theory.integrals.hermite_series import DEGREE, HERMITE, solved
from varscale.theory.propagation.cross_moments import cross, mean_product
from varscale.theory.propagation.marginals import marginal, placed


def latent_cross(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray:
    """`latent` of two different roots, from their cross-moments: correlations by type of the frame, (types or 1...)."""
    covariance = cross(a, b, frame) - mean_product(a, b, frame)
    lines, scales = [], []
    for view, second in ((a, False), (b, True)):
        own = marginal(view.node)
        scales.append(
            by_type(lift(own.deviation, view.node.axes, view.bind, frame, pairs=False), frame, second=second)
        )
        line = (
            None
            if isinstance(view.node, Apply) or own.gaussian
            else placed(own.values, view, frame) @ HERMITE
        )
        lines.append(_STRAIGHT_LINE if line is None else by_type(line, frame, second=second))
    rho = np.clip(covariance / np.maximum(scales[0] * scales[1], 1e-300), -1.0, 1.0)
    if all(line is _STRAIGHT_LINE for line in lines):
        return rho
    ai, bj = (np.where(np.arange(line.shape[-1]) > 0, line, 0.0) for line in lines)
    whole = np.sqrt(np.sum(ai**2, -1) * np.sum(bj**2, -1))
    return solved(ai * bj / np.maximum(whole, 1e-300)[..., None], rho)


_STRAIGHT_LINE = np.eye(DEGREE)[1]  # Hermite coefficients of a normal


def factored(rho: np.ndarray, graph: Graph) -> np.ndarray:
    """L with unit rows and L Lᵀ = ρ, or the nearest there is; what that changes is in doubt."""
    return _of_unit_length(_square_root(rho, graph))


def continued(first: np.ndarray, between: np.ndarray, second: np.ndarray, graph: Graph) -> np.ndarray:
    """The rows that continue a factor of some correlations to one of more: L = [[first, 0], [result]], (k, 2k).

    Args:
        first: the factor so far, (k, k).
        between: the known ones' correlations with the further ones, (k, k).
        second: the further ones', (k, k).
        graph: what is marked where there is no such factor.
    """
    shared = np.linalg.lstsq(first, between, rcond=1e-9)[0].T
    return _of_unit_length(np.concatenate([shared, _square_root(second - shared @ shared.T, graph)], axis=1))


def _square_root(covariance: np.ndarray, graph: Graph) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -NEXT_ORDER:
        graph.flag("assumed", float(-values[0]))
    return vectors * np.sqrt(np.clip(values, 0, None))


def _of_unit_length(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
