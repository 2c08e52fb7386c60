"""Correlations of the normals behind two roots, and factors of correlation matrices.

Windows that overlap: given their weights, two places of a convolution have not in common what they have on average.

Over fresh weights y_p and y_q have the correlation of their inputs. Given the weights it is off by

    r = Σ w_t w_s / Σ w²   over the pairs of taps (t at p, s at q, t ≠ s) that read one input,

of mean 0 and variance N/(m (m + κ − 1)) where N pairs meet and a sum has m terms of kurtosis κ, times the square of the part
of the inputs' mean square that is not common to all places, and times 1 + excess/2 for inputs of an excess kurtosis. A linear
function does not see it; to second order a function with E[f f'] = S(ρ) gains S″(ρ)/2 times that variance: little for each pair
of places, but the places near one another are what the mean over a picture is made of. Where a sum is over many channels as
well it is small.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.accuracy import NEXT_ORDER
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import by_type, lift
from varscale.theory.graph.expressions import Apply, Sum
from varscale.theory.graph.nodes import Graph, Node, View
from varscale.theory.graph.store import once_per_node
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


@once_per_node
def scatter(node: Node) -> np.ndarray | None:
    """Variance over weights of the correlation of two entries, by type of pair; None where there is none."""
    return scatter_of(node)


@functools.singledispatch
def scatter_of(root: Node) -> np.ndarray | None:
    """`scatter` of a kind of node, worked out."""
    return None


@scatter_of.register(Sum)
def scatter_of_sum(root: Sum) -> np.ndarray | None:
    """Independent terms share the correlation as they share the variance, of which a mean that is taken away is no part."""
    terms = zip(root.params, root.args, strict=True)
    whole = max(root.table.mean_square, 1e-300)
    found = [
        (c * c * view.node.table.mean_square / whole) ** 2
        * lift(own, view.node.axes, view.bind, root.axes, pairs=True)
        for c, view in terms
        if (own := scatter(view.node)) is not None
    ]
    return np.asarray(sum(found)) if found else None
