"""The law of a sum of parts that are not all Gaussian: independent parts are convolved, correlated ones drawn together."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from varscale.theory.domain.axes import equal
from varscale.theory.domain.tables import Axes, Table, full_types
from varscale.theory.graph.expressions import Apply, Sum, connected, roots_of
from varscale.theory.graph.nodes import View
from varscale.theory.integrals.hermite_series import POINTS, WEIGHTS, Z, on_grid, read_off, sobol
from varscale.theory.propagation.cross_moments import cross_covariance, dependent
from varscale.theory.propagation.marginals import (
    along,
    deviations,
    evaluate,
    factored,
    fluctuating,
    grid,
    in_class,
    latent_cross,
    marginal,
    quantiles_of_kind,
)

_MOST_CELLS = 9
_LINEAR_SHARE = 0.995  # of a term's variance, linear in a normal: above it the term is as good as Gaussian
_MOST_ROOTS = 3  # live roots of one term: a normal, its scale, and a gate on both
_CORRELATED = 0.1  # of parts with less the square of it is lost, times an excess kurtosis of a few


class _Part(NamedTuple):
    """A term: its weight, its view, and the roots that give it its shape (none where it is as good as Gaussian)."""

    weight: float
    view: View
    live: tuple[View, ...]

    @property
    def latent(self) -> View:
        """What is a function of one normal; a function of several, a normal scaled by another, is taken for one of its own."""
        return self.live[0] if len(self.live) == 1 else self.view


@quantiles_of_kind.register
def quantiles_of_sum(root: Sum, table: Table, deviation: np.ndarray) -> np.ndarray | None:
    """Quantiles of a sum on the normal grid, (classes..., points), moments matched; None where it is as good as Gaussian."""
    if root.is_variance:
        return None
    parts = [_Part(c, view, _shaping(view, root.axes)) for c, view in root.terms]
    alive = sum(p.weight**2 * p.view.node.table.variance for p in parts if p.live)
    if alive < 0.1 * max(table.variance, 1e-300):  # which moves a fourth moment by a hundredth
        return None
    cells, coarse = list(np.ndindex(table.mean.shape)), slice(None, None, 5)
    if len(cells) > _MOST_CELLS:  # one shape for all: mean and deviation stay each class's own
        cells = [_most_common(root.axes)]
    together = connected(parts, lambda a, b: _joined(a, b, root.axes))
    pairs = np.multiply.outer(WEIGHTS[coarse], WEIGHTS[coarse]).ravel()
    shapes = np.empty((*table.mean.shape, POINTS))
    for cell in cells:
        line = np.zeros(POINTS)
        for group in together:
            own = [p.weight * on_grid(in_class(_term_on_grid(*p[1:], root.axes), cell)) for p in group]
            if len(own) > 1:
                values, weights = _points([p.latent for p in group], own, root.axes, cell)
                own = [_ordered(values.sum(axis=0), weights)]
            line = _ordered(np.add.outer(line[coarse], own[0][coarse]).ravel(), pairs)  # tails included
        mean = WEIGHTS @ line
        std = math.sqrt(max(WEIGHTS @ line**2 - mean**2, 1e-300))
        shapes[cell if len(cells) > 1 else ...] = (line - mean) / std
    return table.mean[..., None] + deviation[..., None] * shapes


def _most_common(axes: Axes) -> tuple[int, ...]:
    """The class of each axis that most of its positions have."""
    return tuple(int(np.argmax(a.counts)) for a in axes)


def _ordered(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted values as quantiles on the normal grid."""
    order = np.argsort(values)
    mass = weights[order] / weights.sum()
    below, above = np.cumsum(mass) - mass / 2, np.cumsum(mass[::-1])[::-1] - mass / 2
    left, right = (special.ndtri(np.maximum(tail, 1e-300)) for tail in (below, above))
    return np.interp(Z, np.where(below < 0.5, left, -right), values[order])


def _points(
    latents: Sequence[View], lines: Sequence[np.ndarray], axes: Axes, cell: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Values of functions, `lines` on the normal grid, of the normals behind views in one class; and the points' weights."""
    rho = np.eye(k := len(latents))
    for (i, a), (j, b) in itertools.combinations(enumerate(latents), 2):
        if dependent(a.node, b.node):
            rho[i, j] = rho[j, i] = full_types(latent_cross(b, a, axes), axes)[cell]
    points, wide = sobol(k), 1 + 2 / k  # by √(1 + 2/k): further into the tails at the cost of 1 − e^{−2/k}
    at = points * math.sqrt(wide) @ factored(rho, latents[0].node.graph).T
    values = np.stack([read_off(line, z) for z, line in zip(at.T, lines, strict=True)])
    return values, np.exp(-np.sum(points**2, axis=1) * (wide - 1) / 2)


def _joined(a: _Part, b: _Part, axes: Axes) -> bool:
    """Whether two terms are correlated at one place, of any class, by more than goes unseen."""
    if not (a.live or b.live) or not dependent(a.latent.node, b.latent.node):
        return False
    views = a.view, b.view
    found = np.abs(cross_covariance(*views, axes)) / np.maximum(deviations(*views, axes), 1e-300)
    return bool(np.max(found[equal(axes)]) > _CORRELATED)


def _shaping(view: View, axes: Axes) -> tuple[View, ...]:
    """The few roots of a term, over these axes, that give it its shape; none where there are none, or it is Gaussian."""
    node, own = view.node, roots_of(view)
    if len(own) == 1:
        plain = node.table.variance == 0 if isinstance(node, Apply) else marginal(node).gaussian
        return () if plain else tuple(own)
    live = fluctuating(own)  # the scale of a norm is as good as a number
    if not 0 < len(live) <= _MOST_ROOTS:
        return ()
    line = _term_on_grid(view, live, axes)
    variance = line**2 @ WEIGHTS - (line @ WEIGHTS) ** 2
    straight = np.all((line * Z @ WEIGHTS) ** 2 >= _LINEAR_SHARE * variance)
    return () if straight else tuple(live)


def _term_on_grid(view: View, live: Sequence[View], axes: Axes) -> np.ndarray:
    """A term's quantiles on the normal grid, the roots that are not live held at their means, (classes or 1..., points).

    Without live roots it is Gaussian. A function of several (μ + e^s·ε, heavy-tailed) is drawn, in one class.
    """
    table, cell, one = view.node.table, _most_common(axes), [1] * len(axes)
    if len(live) == 1:
        return along(view, axes, *live)
    if not live:
        return np.reshape(table.total_mean + math.sqrt(table.variance) * Z, (*one, -1))
    lines = [on_grid(in_class(grid(root, axes), cell)) for root in live]
    values, weights = _points(live, lines, axes, cell)
    env = {root: line.reshape(*one, -1) for root, line in zip(live, values, strict=True)}
    env |= {r: np.full((*one, 1), r.node.table.total_mean) for r in roots_of(view) if r not in live}
    drawn = np.broadcast_to(evaluate(view, axes, env).ravel(), weights.shape)
    return _ordered(drawn, weights).reshape(*one, -1)
