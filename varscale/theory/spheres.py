r"""Norms over few units: what they put out lies on a sphere, and no coordinate of it is Gaussian.

Of x with m independent normal coordinates, y = x/√(mean x²) is √m times a coordinate of a unit vector: y²/m is a Beta(1/2,
(m − 1)/2) variable (±1 for m = 1, Gaussian for m = ∞; excess kurtosis −6/(m + 2)). Over n units m is n, or n − 1 where their
mean is taken away; of correlated units it is 2/r, where r is the relative variance of mean x².

The norm itself is independent of y, and mean x² a gamma variable of shape m/2. What does not divide by its norm but goes by it
otherwise, x·|x| (a capsule's squash), is a function of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.axes import Axis, contract_axis
from varscale.theory.elementwise import Apply
from varscale.theory.graph import View
from varscale.theory.hermite import WEIGHTS, Z, sphere_squares
from varscale.theory.moments import full_types, means_by_type
from varscale.theory.narrow import held_square
from varscale.theory.own_scales import is_direct
from varscale.theory.quadrature import Environment, marginal, placed
from varscale.theory.responses import companions, power_of, responses
from varscale.theory.scales import mean_squares

_MANY = 2000  # units, from where on a shift is below a thousandth
_FREE = 0.1  # ratio of responses up to which a function is one of a normalised array, whatever its norm: its epsilon is left
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
        scale = next((s for s in scales if len(s.bind) < len(main.bind) and is_direct(s.node, main.node)), None)
        if scale is None or not marginal(main.node).gaussian:
            continue
        dimension, independent = _dimension(main, scale)
        if dimension > _MANY:
            continue
        own = marginal(main.node)
        together = [s for s in scales if s.bind == scale.bind]
        plain = held_square(node, main, {(s.node.id, s.bind): s.mean(node.axes)[..., None] for s in together})
        ratios, shares = ([1.0], [1.0]) if abs(responses(node)[main.node][0]) <= _FREE else mean_squares(2 / dimension)
        squared = sum(
            share * held_square(node, main, _of_norm(main, together, dimension, ratio, node.axes))
            for ratio, share in zip(ratios, shares, strict=True)
        )
        found = float(squared @ WEIGHTS / (plain @ WEIGHTS)) - 1 if plain @ WEIGHTS > 0 else 0.0
        if np.sum(own.mean**2) > _OFF_CENTRE * np.sum(own.mean**2 + own.deviation**2):
            doubt += abs(found)
            continue
        shift, doubt = shift + found, doubt + (0.0 if independent else abs(found) / 2)
    return shift, doubt


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


def _of_norm(main: View, scales: Sequence[View], dimension: float, ratio: float, frame: Sequence[Axis]) -> Environment:
    """Values of a root on a sphere, on the normal grid, and of its scales, where its mean square is so many times its own."""
    coordinates = np.sign(Z) * np.sqrt(sphere_squares(dimension))
    coordinates = coordinates * math.sqrt(ratio / float(coordinates**2 @ WEIGHTS))
    own = marginal(main.node)
    line = placed(own.mean[..., None] + own.deviation[..., None] * coordinates, main, frame)
    varied = {(s.node.id, s.bind): s.mean(frame)[..., None] * ratio ** power_of(s.node, main.node) for s in scales}
    return {(main.node.id, main.bind): line, **varied}
