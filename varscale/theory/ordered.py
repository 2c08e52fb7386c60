"""What is known by draws, and so in its order in time: moments by type are averages over pairs of steps, draws tell more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from varscale.theory.axes import Axis, grouped
from varscale.theory.draws import TERMS, Drawing, Positions, applies_weights, chosen, evenly, in_order, operands, reduced
from varscale.theory.graph import Node, View
from varscale.theory.moments import Table, estimate, lift

_POOLED = 2_000_000  # numbers that moments by type are estimated from
_REPLICATES = 16  # draws that correlations are estimated from
_MOST_PAIRED, _FEW_PAIRED = 256, 3  # positions of the longest axis, and of the others, that are paired
_GROUPS = 8  # of draws, for the standard error of a cross-moment
_SCORES = 4.0  # standard errors that a mean is trusted to; within them it is taken for zero
_LEVEL = 0.02  # positions whose second moments differ by less, relatively, are one class


def pooled(numbers: np.ndarray, axes: Sequence[Axis], positions: Sequence[np.ndarray]) -> Table:
    """Moments by class and type, from draws at some positions; of very many the first of the shortest-lived axes."""
    kept = [list(range(n)) for n in numbers.shape[1:]]
    last = len(kept) - 1
    most = max(_POOLED // max(numbers.size // max(numbers.shape[-1], 1), 1), 4)
    if kept and axes[last].classes == 1 and len(kept[last]) > most:
        numbers, kept[last] = numbers[..., :most], kept[last][:most]
    small = [reduced(a, p[own]) for a, p, own in zip(axes, positions, kept, strict=True)]
    whole = estimate(numbers, [Axis(len(numbers)), *small])
    return Table(tuple(axes), whole.mean.reshape(whole.mean.shape[1:]), whole.second[0])


def table_of_draws(node: Node, numbers: np.ndarray, positions: Sequence[np.ndarray]) -> Table:
    """The table of a node that was drawn, (replicates, positions...); it is flagged with the error of so many draws.

    A mean that may be zero by its standard error is: a loop changes sign with its weights unless something breaks that.
    """
    table, within = pooled(numbers, node.axes, positions), tuple(range(1, numbers.ndim))
    squares = np.mean(numbers.astype(float) ** 2, axis=within)
    node.graph.flag("sampled", _SCORES * float(squares.std() / max(squares.mean(), 1e-300)) / math.sqrt(len(squares)))
    means = numbers.mean(axis=within)
    if abs(means.mean()) < _SCORES * means.std() / math.sqrt(len(means)):
        return Table(table.axes, np.zeros_like(table.mean), table.second)
    return table


def by_level(squares: Float[np.ndarray, "size arrays"]) -> Axis:
    """Positions classed by the second moments that some arrays have there, on a logarithmic scale down to a thousandth."""
    levels = np.log(np.maximum(squares, 1e-30) / np.maximum(squares.max(axis=0), 1e-30) + 1e-3)
    return grouped(np.round(levels / _LEVEL) * _LEVEL)


def cross_moments(
    x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], axes: Sequence[Axis], positions: Positions
) -> Float[np.ndarray, "..."]:
    """E[x_i y_j] by type, symmetrized, from draws of both, (replicates, positions...); 0 where that may be all it is."""
    found = []
    for some in np.array_split(np.arange(len(x)), _GROUPS):
        pair = x[some], y[some]
        both, first, second = (pooled(z, axes, positions).second for z in (pair[0] + pair[1], *pair))
        found.append((both - first - second) / 2)
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(_GROUPS)
    # Most loops change sign with weights that what else there is does not have.
    return np.where(np.abs(mean) > _SCORES * error, mean, 0.0)


def crossed(a: View, b: View, frame: Sequence[Axis]) -> Float[np.ndarray, "..."] | None:
    """E[a_i b_j] by type, drawn together; None where neither has an order in time."""
    if not in_order(a.node) and not in_order(b.node):
        return None
    kept = sorted({*a.bind, *b.bind})
    axes = [frame[k] for k in kept]
    positions = [chosen(axis, _MOST_PAIRED // axis.classes if axis.size == max(x.size for x in axes) else 8) for axis in axes]
    drawing = Drawing(axes, _REPLICATES, np.random.default_rng(0))
    shape = (_REPLICATES, *map(len, positions))
    x, y = (drawing.values(View(v.node, tuple(kept.index(k) for k in v.bind)), positions) for v in (a, b))
    x, y = (np.broadcast_to(np.moveaxis(z, -1, 0), shape) for z in (x, y))
    return lift(cross_moments(x, y, axes, positions), axes, kept, frame, pairs=True)


def order_correlation(node: Node) -> Float[np.ndarray, "..."] | None:
    """Root mean square correlations of a product with weights, "the same" and "different" along every axis.

    Its mean square fluctuates with their squares, which in an order in time are far from the square of their mean. None where
    it has none.
    """
    if not applies_weights(node) or not in_order(node):
        return None
    _, x = operands(node)
    longest = max((node.axes[k].size for k in range(len(node.axes)) if k in x.bind), default=0)
    positions = [evenly(a.size, _MOST_PAIRED if a.size == longest else _FEW_PAIRED) for a in node.axes]
    rng = np.random.default_rng(0)
    values = Drawing(node.frame, _REPLICATES, rng).values(x, [*positions, *(evenly(a.size, TERMS) for a in node.params)])
    own = values.shape[: len(positions)]
    flat = values.reshape(math.prod(own), -1)
    products = flat @ flat.T
    norms = np.sqrt(np.maximum(np.diag(products), 1e-300))
    # The square of a correlation over n terms is 1/n where there is none: here over those drawn, there over one network's.
    chance = 1 / node.width - 1 / flat.shape[1]
    squares = np.clip((products / np.multiply.outer(norms, norms)) ** 2 + chance, 0.0, 1.0)
    letters, out = "abcdefgh"[: len(own)], "ijklmnop"[: len(own)]
    pairs = [np.stack([np.eye(n) / n, (1 - np.eye(n)) / max(n * (n - 1), 1)]) for n in own]
    spec = [letters + letters.upper(), *(f"{o}{a}{a.upper()}" for o, a in zip(out, letters, strict=True))]
    return np.sqrt(np.einsum(",".join(spec) + "->" + out, squares.reshape(*own, *own), *pairs, optimize=True))
