"""One joint draw of a model in its order in time: what its layers have in common, the draws of all of them have in common.

Each array is drawn once, at all steps and at some of its units and samples, from what it is made of: so every layer costs the
same, however deep it lies, and of a sum whose terms belong together, or a norm and what it divides, nothing is drawn apart.

Moments by type are averages over pairs of steps; moments of draws know the order in time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import Axis, grouped
from varscale.theory.domain.tables import Positions, Table, estimated_products, lift
from varscale.theory.graph.linear_nodes import applies_weights, operands
from varscale.theory.graph.nodes import Array, Graph, Leaf, Node, View
from varscale.theory.graph.store import Fact
from varscale.theory.propagation.cross_moments import strategy, unsure
from varscale.theory.propagation.sampler import TERMS, Drawing, evenly, in_order, reduced

_BUDGET = 1_000_000  # numbers drawn for one array
_FEWEST, _MOST = 8, 64  # draws
_BATCH_SAMPLES = 4  # of a batch
_KNOWN = 128  # positions, up to which an axis is drawn whole along which something is known number by number


def steps(graph: Graph) -> set[int]:
    """How many steps the recurrences and loops of a graph have: such axes are drawn whole."""
    return _STEPS.once(graph, None, set)


def joint_drawing(graph: Graph, frame: Sequence[Axis]) -> Drawing:
    """The draws of a graph; where there are none yet, as many as can be had of an array over this frame."""

    def work() -> Drawing:
        leaves = [x for x in graph.nodes.values() if isinstance(x, Leaf) and not x.is_bits]
        units = {a.size for x in leaves if not x.is_input for a in x.axes}
        samples = {a.size for x in leaves if x.is_input for a in x.axes} - units
        known = {x.axes[0].size for x in graph.nodes.values() if isinstance(x, Array) and len(x.axes) == 1}

        @functools.cache
        def some(axis: Axis) -> Int[np.ndarray, " kept"]:
            n = axis.size
            if n in steps(graph) or (n <= _KNOWN and n in known):
                return np.arange(n)
            return _with_all_classes(axis, evenly(n, _BATCH_SAMPLES if n in samples else TERMS))

        numbers = math.prod(len(some(axis)) for axis in frame)
        return Drawing(int(np.clip(_BUDGET // max(numbers, 1), _FEWEST, _MOST)), some)

    return _DRAWINGS.once(graph, None, work)


def _with_all_classes(axis: Axis, kept: Int[np.ndarray, " kept"]) -> Int[np.ndarray, " more"]:
    """Positions, and the first one of every class that none of them is of."""
    labels = axis.label_array
    missing = set(range(axis.classes)) - set(labels[kept].tolist())
    return np.union1d(kept, [int(np.argmax(labels == c)) for c in missing]).astype(int) if missing else kept


_STEPS: Fact[None, set[int]] = Fact()
_DRAWINGS: Fact[None, Drawing] = Fact()


_POOLED = 2_000_000  # numbers that moments by type are estimated from
_CORRELATED_REPLICATES = 16  # draws that correlations are estimated from
_MOST_PAIRED, _FEW_PAIRED = 256, 3  # positions of the longest axis, and of the others, that are paired
_SCORES = 4.0  # standard errors that a mean is trusted to; within them it is taken for zero
_LEVEL = 0.02  # positions whose second moments differ by less, relatively, are one class


def pooled(numbers: np.ndarray, axes: Sequence[Axis], positions: Positions) -> Table:
    """Moments by class and type, from draws at some positions, (replicates, positions...)."""
    (numbers,), small = _thinned([numbers], axes, positions)
    mean = np.mean(numbers, axis=0, dtype=float)
    for k, axis in enumerate(small):
        mean = np.stack(
            [mean.compress(axis.label_array == c, axis=k).mean(axis=k) for c in range(axis.classes)], axis=k
        )
    return Table(tuple(axes), mean, estimated_products(numbers, numbers, small).mean(axis=0))


def _thinned(
    drawn: Sequence[np.ndarray], axes: Sequence[Axis], positions: Positions
) -> tuple[list[np.ndarray], list[Axis]]:
    """Draws and the axes that they are over; of very many the first of the last axis."""
    shape = drawn[0].shape
    kept, last = [list(range(n)) for n in shape[1:]], len(shape) - 2
    most = max(_POOLED // max(drawn[0].size // max(shape[-1], 1), 1), 4)
    if kept and axes[last].classes == 1 and len(kept[last]) > most:
        drawn, kept[last] = [x[..., :most] for x in drawn], kept[last][:most]
    small = [reduced(a, p[own]) for a, p, own in zip(axes, positions, kept, strict=True)]
    return [np.asarray(x, float) for x in drawn], small


def table_of_draws(node: Node, numbers: np.ndarray, positions: Sequence[np.ndarray]) -> Table:
    """The table of a node that was drawn, (replicates, positions...); it is flagged with the error of so many draws.

    A mean that may be zero by its standard error is: a loop changes sign with its weights unless something breaks that.
    """
    table, within = pooled(numbers, node.axes, positions), tuple(range(1, numbers.ndim))
    squares = np.mean(numbers.astype(float) ** 2, axis=within)
    node.graph.flag(
        "sampled", _SCORES * float(squares.std() / max(squares.mean(), 1e-300)) / math.sqrt(len(squares))
    )
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
    """E[x_i y_j] by type, from draws of both, (replicates, positions...); 0 where that may be all it is."""
    mean, error = _drawn_products(x, y, axes, positions)
    # Most loops change sign with weights that what else there is does not have.
    return np.where(np.abs(mean) > _SCORES * error, mean, 0.0)


def _drawn_products(
    x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], axes: Sequence[Axis], positions: Positions
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """E[x_i y_j] by type, and its standard error, from draws of both, (replicates, positions...)."""
    (x, y), small = _thinned([x, y], axes, positions)
    found = estimated_products(x, y, small)
    return found.mean(axis=0), found.std(axis=0) / math.sqrt(len(found) - 1)


@strategy("samples")
def crossed(a: View, b: View, frame: tuple[Axis, ...]) -> Float[np.ndarray, "..."] | None:
    """E[a_i b_j] by type, drawn together; None where neither has an order in time."""
    if not in_order(a.node) and not in_order(b.node):
        return None
    kept = sorted({*a.bind, *b.bind})
    axes = [frame[k] for k in kept]
    drawing = joint_drawing(a.node.graph, axes)
    positions = [drawing.some(axis) for axis in axes]
    views = [View(v.node, tuple(kept.index(k) for k in v.bind)) for v in (a, b)]
    x, y = (np.moveaxis(_everywhere(drawing, v, axes), -1, 0) for v in views)
    unsure(a.node.graph, "assumed", drawing.doubt)
    return lift(cross_moments(x, y, axes, positions), axes, kept, frame, pairs=True)


def _everywhere(drawing: Drawing, view: View, frame: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """A view at all drawn positions of a frame, (positions..., replicates)."""
    positions = [drawing.some(axis) for axis in frame]
    return np.broadcast_to(drawing.values(view, frame, positions), [*map(len, positions), drawing.replicates])


def order_correlation(node: Node) -> Float[np.ndarray, "..."] | None:
    """Root mean square correlations of a product with weights, "the same" and "different" along every axis.

    Its mean square fluctuates with their squares, which in an order in time are far from the square of their mean. None where
    it has none.
    """
    if not applies_weights(node) or not in_order(node):
        return None
    _, x = operands(node)
    frame = node.frame
    longest = max((node.axes[k].size for k in range(len(node.axes)) if k in x.bind), default=0)
    drawing = joint_drawing(node.graph, frame)
    positions = [drawing.some(axis) for axis in frame]
    values = drawing.values(x, frame, positions)[..., :_CORRELATED_REPLICATES]
    thin = [
        evenly(n, _MOST_PAIRED if axis.size == longest else _FEW_PAIRED)
        for axis, n in zip(node.axes, values.shape, strict=False)
    ]
    values = values[np.ix_(*thin, *map(np.arange, values.shape[len(thin) :]))]
    own = values.shape[: len(thin)]
    flat = np.moveaxis(values.reshape(math.prod(own), -1, values.shape[-1]), -1, 0)
    lengths = np.sqrt(np.maximum(np.sum(np.square(flat, dtype=float), axis=-1), 1e-300))
    unit = flat / lengths[..., None].astype(np.float32)
    squares = np.mean(np.square(unit @ np.swapaxes(unit, 1, 2)), axis=0, dtype=float)
    # The square of a correlation over n terms is 1/n where there is none: here over those drawn, there over
    # one network's.
    squares = np.clip(squares + (1 - squares) * (1 / node.width - 1 / flat.shape[-1]), 0.0, 1.0)
    letters, out = "abcdefgh"[: len(own)], "ijklmnop"[: len(own)]
    pairs = [np.stack([np.eye(n) / n, (1 - np.eye(n)) / max(n * (n - 1), 1)]) for n in own]
    spec = [letters + letters.upper(), *(f"{o}{a}{a.upper()}" for o, a in zip(out, letters, strict=True))]
    return np.sqrt(np.einsum(",".join(spec) + "->" + out, squares.reshape(*own, *own), *pairs, optimize=True))
