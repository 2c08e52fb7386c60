"""Arrays drawn with the laws of nodes, at some of their positions: for what no formula covers.

An array is drawn from what it is made of, itself drawn: sums, means, products with weights, moves; else by its own moments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import Axis, apply_axis, reduced
from varscale.theory.domain.tables import LOOSE, Positions, Table, estimated_products, gaussian, over_frame
from varscale.theory.graph import linear_nodes as linear
from varscale.theory.graph.expressions import Mean, Sum, content, roots, roots_of
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import AppliedWeights, Concat, Contract, Gather, Take, applied_weights
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import Z, read_off
from varscale.theory.propagation.marginals import evaluate, marginal
from varscale.theory.propagation.pullbacks import repeats

TERMS = 32  # terms of a sum that stand for all


@once_per_node
def in_order(node: Node) -> bool:
    """Whether a node depends on what is known by its draws, whose order in time its moments by type do not hold."""
    return node.timed or any(in_order(view.node) for view in node.args)


@functools.singledispatch
def sampled_from(node: Node, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """A node at some positions of its axes, (replicates or 1, ...); None where its law is all that is known of it."""
    return None


class Drawing:
    """Nodes drawn together: what they have in common is the same in all.

    Attributes:
        replicates: how many draws.
        doubt: what its draws' moments may be off by, relatively, for an order in time that some of them have lost.
        some: the positions of an axis that stand for all of it, in sums and means and wherever nodes are asked for at them.
    """

    def __init__(self, replicates: int, some: Callable[[Axis], Int[np.ndarray, " kept"]]):
        self.replicates, self.some = replicates, some
        self.drawn: dict[Hashable, np.ndarray] = {}
        self.doubt = 0.0

    def values(self, view: View, frame: Sequence[Axis], positions: Positions) -> Float[np.ndarray, "..."]:
        """A view at some positions of a frame, (positions or 1 ..., replicates or 1): 1 where it does not have an axis."""
        env = {}
        for root in roots_of(view):
            numbers = self._at(root.node, [positions[place] for place in root.bind])
            env[root] = over_frame(np.moveaxis(numbers, 0, -1), root.bind, len(frame))
        return evaluate(view, frame, env)

    def whole(self, node: Node, positions: Positions) -> Float[np.ndarray, "replicates ..."]:
        """A node at some positions of its own axes."""
        return _over_positions(self.values(node.whole, node.axes, positions), positions)

    def _at(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...); where all stand for others, among what is drawn for those."""
        usual = [self.some(axis) for axis in node.axes]
        if not all(np.isin(asked, among).all() for asked, among in zip(positions, usual, strict=True)):
            usual = positions
        key = node.id, tuple(kept.tobytes() for kept in usual)
        if key not in self.drawn:
            self.drawn[key] = self._fresh(node, usual).astype(np.float32)
        drawn = self.drawn[key]
        for k, (asked, among) in enumerate(zip(positions, usual, strict=True), 1):
            drawn = drawn if len(asked) == len(among) else drawn.take(np.searchsorted(among, asked), axis=k)
        return drawn

    def _fresh(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...)."""
        made = sampled_from(node, self, positions)
        if made is not None:
            return made
        if in_order(node):  # its order is lost
            self.doubt = LOOSE
        return _drawn(node, positions, self.replicates)


def is_drawn_whole(mean: Node, drawing: Drawing) -> bool:
    """Whether a mean is over so many drawn positions that they are as good as all."""
    averaged = [mean.args[0].node.axes[k] for k in mean.params]
    whole = math.prod(axis.size for axis in averaged)
    return math.prod(len(drawing.some(axis)) for axis in averaged) >= min(whole, TERMS)


def _over_positions(values: np.ndarray, positions: Positions) -> np.ndarray:
    """Values at some positions, (positions or 1 ..., draws), as (draws, positions...)."""
    return np.moveaxis(np.broadcast_to(values, (*map(len, positions), values.shape[-1])), -1, 0)


def evenly(size: int, most: int) -> Int[np.ndarray, " kept"]:
    """Positions evenly spread along an axis of this size, all of them where they are no more."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(int)


def picked(known: np.ndarray, axes: Sequence[Axis], positions: Positions, replicates: int) -> np.ndarray:
    """Known draws at some positions. Where more are asked for than there are, those of other draws stand in.

    Positions told apart, and all of an axis where all are known, are found by where they are; of others any will do.
    """
    found = [
        (np.zeros(len(asked), int), asked) if n == axis.size else np.divmod(np.arange(len(asked)), n)
        for axis, asked, n in zip(axes, positions, known.shape[1:], strict=True)
    ]
    shift = sum(np.ix_(*[turn for turn, _ in found]), np.zeros(1, int))
    draw = (np.arange(replicates).reshape(-1, *[1] * len(axes)) + shift) % len(known)
    return known[(draw, *np.ix_(*[at for _, at in found]))]


def _drawn(node: Node, positions: Positions, replicates: int) -> np.ndarray:
    """A root's values at these positions by its own moments, (replicates or 1, ...)."""
    if is_known_array(node) and (known := numbers(node)) is not None:
        return np.asarray(known, float)[np.ix_(*positions)][None]
    law, rng = marginal(node), np.random.default_rng(content(node))
    latents = gaussian(law.correlation, node.axes, positions, replicates, rng)
    classes = [axis.classes for axis in node.axes]
    labels = [axis.label_array[kept] for axis, kept in zip(node.axes, positions, strict=True)]
    if law.gaussian:
        mean, deviation = (np.broadcast_to(x, classes)[np.ix_(*labels)] for x in (law.mean, law.deviation))
        return mean + deviation * latents
    values, out = np.broadcast_to(law.values, (*classes, len(Z))), np.empty_like(latents)
    for cell in np.ndindex(*classes):
        own = [np.flatnonzero(label == c) for label, c in zip(labels, cell, strict=True)]
        index = np.ix_(np.arange(replicates), *own)
        out[index] = read_off(values[cell], latents[index])
    return out


# Chosen, not derived: of a mean square over draws, in units of what it is known to be, more than chance makes
# of it.
_TOO_MUCH = 2.0


@sampled_from.register(Sum)
def sampled_from_sum(node: Sum, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The terms, where all means among them are as good as of all."""
    if not all(is_drawn_whole(view.node, drawing) for view in node.args if isinstance(view.node, Mean)):
        return None
    terms = node.terms
    found = [c * drawing.values(term, node.axes, positions) for c, term in terms]
    return _over_positions(sum(found, np.zeros(1, np.float32)), positions)


@sampled_from.register(Mean)
def sampled_from_mean(node: Mean, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The mean of what is drawn, where that is as good as all."""
    if not is_drawn_whole(node, drawing):
        return None
    source, own = node.args[0].node, iter(positions)
    there = [drawing.some(a) if k in node.params else next(own) for k, a in enumerate(source.axes)]
    return drawing.whole(source, there).mean(axis=tuple(1 + k for k in node.params))


@sampled_from.register(linear.Permute | linear.Split | linear.Merge | Take)
def sampled_from_moved(node: Node, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """Entries of one array in another order, where more is known of given places than moments by type say."""
    if not (in_order(node) or repeats(node)):
        return None
    source, mesh, (k, *more) = node.args[0].node, list(np.ix_(*positions)), node.params
    if isinstance(node, linear.Permute):
        mesh = [mesh[d] for d in np.argsort(node.params)]
    elif isinstance(node, linear.Split):
        n = len(more[0])
        mesh[k : k + n] = [np.ravel_multi_index(tuple(mesh[k : k + n]), more[0])]
    elif isinstance(node, linear.Merge):
        mesh[k : k + 1] = np.unravel_index(mesh[k], more[0])
    elif len(source.axes) > len(node.axes):
        mesh.insert(k, np.full([1] * len(mesh), more[0]))
    else:
        mesh[k] = more[0] + more[2] * mesh[k]
    own = [np.unique(at, return_inverse=True) for at in mesh]
    places = (place.reshape(at.shape) for (_, place), at in zip(own, mesh, strict=True))
    return drawing.whole(source, [kept for kept, _ in own])[(slice(None), *places)]


@sampled_from.register(Concat)
def sampled_from_concat(node: Concat, drawing: Drawing, positions: Positions) -> np.ndarray:
    """The parts, each at those of the positions that lie in it."""
    (along, sizes), start, found = node.params, 0, []
    for size, part in zip(sizes, node.args, strict=True):
        inside = positions[along][(positions[along] >= start) & (positions[along] < start + size)] - start
        start += size
        there = [inside if k == along else kept for k, kept in enumerate(positions)]
        if len(inside):
            found.append(_over_positions(drawing.values(part, node.axes, there), there))
    replicates = max(map(len, found))
    return np.concatenate([np.broadcast_to(x, (replicates, *x.shape[1:])) for x in found], axis=1 + along)


@sampled_from.register(Contract)
def sampled_from_contract(node: Contract, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    if applied := applied_weights(node):
        return _weighed(node, applied[0], drawing, positions) if in_order(node) or _is_narrow(node) else None
    if not in_order(node) or any(len(drawing.some(a)) < a.size for a in node.params):
        return None
    there = [*positions, *(np.arange(a.size) for a in node.params)]
    x, y = (drawing.values(view, node.frame, there) for view in node.args)
    return summed(x, y, len(positions))


def _is_narrow(node: Contract) -> bool:
    """Whether it has few terms, or what it multiplies is made of few: then its units are not independent."""
    inside = [root.node for root in roots(applied_weights(node)[0].x.node)]
    inside += [view.node for x in inside if isinstance(x, Sum) for view in x.args]
    return any(isinstance(x, Contract) and applied_weights(x) and x.width <= TERMS for x in (node, *inside))


def _weighed(node: Contract, applied: AppliedWeights, drawing: Drawing, positions: Positions) -> np.ndarray:
    """A product with weights, multiplied out with drawn ones, the same wherever they are applied; some of the terms for all.

    Its moments by type say neither what order in time its argument has, nor that products of one narrow argument share its
    norm. It is scaled to the mean square that is known; far from it, what was drawn apart belongs together.
    """
    _, (weights, bind), x, _ = applied
    terms = [drawing.some(a) for a in node.params]
    ratio = math.prod(a.size / len(kept) for a, kept in zip(node.params, terms, strict=True))
    there = [*positions, *terms]
    own = [there[k] for k in bind]
    rng = np.random.default_rng((content(weights), *(int(kept.sum()) for kept in own)))
    drawn = rng.standard_normal((drawing.replicates, *map(len, own)), np.float32)
    drawn = drawn * math.sqrt(weights.table.mean_square) * math.sqrt(ratio)
    values = drawing.values(x, node.frame, there)
    out = summed(values, over_frame(np.moveaxis(drawn, 0, -1), bind, len(there)), len(positions))
    excess = float(np.mean(np.square(out, dtype=float))) / max(node.table.mean_square, 1e-300)
    if not 1 / _TOO_MUCH < excess < _TOO_MUCH:
        node.graph.flag("assumed", UNKNOWN)
    return out / math.sqrt(max(excess, 1e-300))


def summed(x: np.ndarray, y: np.ndarray, kept: int) -> np.ndarray:
    """Σ x·y over the axes after the first `kept`, of arrays (positions or 1..., draws or 1): (draws, positions...).

    One matrix product a draw: axes that both have are batches or are summed over, others are rows or columns.
    """
    rank = x.ndim - 1
    x, y = (np.moveaxis(z, -1, 0) for z in (x, y))
    for k in range(kept, rank):  # where one is constant, the other is summed over first
        if x.shape[1 + k] == 1 or y.shape[1 + k] == 1:
            x, y = (z.sum(1 + k, keepdims=True) for z in (x, y))
    both = [k for k in range(rank) if x.shape[1 + k] > 1 and y.shape[1 + k] > 1]
    batch, inner = [k for k in both if k < kept], [k for k in both if k >= kept]
    columns = [k for k in range(kept) if k not in both and y.shape[1 + k] > 1]
    rows = [k for k in range(kept) if k not in both and k not in columns]

    def matrices(z: np.ndarray, *groups: list[int]) -> np.ndarray:
        sizes = [math.prod(z.shape[1 + k] for k in group) for group in groups]
        order = [1 + k for group in groups for k in group]
        rest = [1 + k for k in range(rank) if 1 + k not in order]  # of size 1
        return z.transpose([0, *order, *rest]).reshape(len(z), *sizes)

    out = matrices(x, batch, rows, inner) @ matrices(y, batch, inner, columns)
    order = [*batch, *rows, *columns]
    sizes = [max(x.shape[1 + k], y.shape[1 + k]) for k in order]
    return out.reshape(len(out), *sizes).transpose([0, *(1 + int(k) for k in np.argsort(order))])


@sampled_from.register(Gather)
def sampled_from_gather(node: Gather, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """Rows of known numbers by indices that are drawn, at these positions of its axes, (replicates, ...)."""
    (table, bind), (row_axes, index_axes, *_) = node.args[0], node.params
    if not isinstance(table, Array) or node.known is not None:
        return None
    kept = [k for k in range(len(table.axes)) if k not in row_axes]
    rows = table.values.transpose([*row_axes, *kept]).reshape(-1, *[table.axes[k].size for k in kept])
    rows = rows[np.ix_(np.arange(len(rows)), *[positions[bind[k]] for k in kept])]
    size = (drawing.replicates, *(len(positions[k]) for k in index_axes))
    out = rows[np.random.default_rng(content(node)).integers(len(rows), size=size)]
    order = np.argsort([*index_axes, *(bind[k] for k in kept)])
    return out.transpose([0, *(1 + int(k) for k in order)])


_POOLED = 2_000_000  # numbers that moments by type are estimated from
_SCORES = 4.0  # standard errors that a mean is trusted to; within them it is taken for zero


def pooled(numbers: np.ndarray, axes: Sequence[Axis], positions: Positions) -> Table:
    """Moments by class and type, from draws at some positions, (replicates, positions...)."""
    square = float(np.mean(np.square(numbers, dtype=float)))
    (numbers,), small = _thinned([numbers], axes, positions)
    # Units that differ in scale (of several heads, say) are not all among those that are left.
    numbers = numbers * math.sqrt(square / max(float(np.mean(numbers**2)), 1e-300))
    mean = np.mean(numbers, axis=0)
    for k, axis in enumerate(small):
        mean = apply_axis(mean, k, axis.members / axis.counts[:, None])
    return Table(tuple(axes), mean, estimated_products(numbers, numbers, small).mean(axis=0))


def _thinned(
    drawn: Sequence[np.ndarray], axes: Sequence[Axis], positions: Positions
) -> tuple[list[np.ndarray], list[Axis]]:
    """Draws and the axes that they are over; of very many some of the last axis, from all over it."""
    n, last, there = drawn[0].shape[-1], drawn[0].ndim - 2, list(positions)
    most = max(_POOLED // max(drawn[0].size // max(n, 1), 1), 4)
    if last >= 0 and axes[last].classes == 1 and n > most:
        kept = evenly(n, most)
        drawn, there[last] = [x[..., kept] for x in drawn], there[last][kept]
    return [np.asarray(x, float) for x in drawn], [reduced(a, p) for a, p in zip(axes, there, strict=True)]


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


def cross_moments(
    x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], axes: Sequence[Axis], positions: Positions
) -> Float[np.ndarray, "..."]:
    """E[x_i y_j] by type, from draws of both, (replicates, positions...); 0 where that may be all it is."""
    (x, y), small = _thinned([x, y], axes, positions)
    found = estimated_products(x, y, small)
    mean, error = found.mean(axis=0), found.std(axis=0) / math.sqrt(len(found) - 1)
    # Most loops change sign with weights that what else there is does not have.
    return np.where(np.abs(mean) > _SCORES * error, mean, 0.0)
