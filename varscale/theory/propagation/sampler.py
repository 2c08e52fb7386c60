"""Arrays drawn with the laws of nodes, at some of their positions: for what no formula covers.

A node is drawn from draws of its arguments where its kind allows (`sampled_from`); else from its own moments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from varscale.theory.domain.axes import Axes, Axis, over_classes, pool, reduced, refine
from varscale.theory.domain.tables import (
    LOOSE,
    Positions,
    Table,
    estimate,
    estimated_products,
    gaussian,
    over_frame,
    table_over,
)
from varscale.theory.graph.expressions import Mean, Sum, content, roots, roots_of
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.linear_nodes import (
    Concat,
    Contract,
    Gather,
    Permute,
    Rearranged,
    Take,
    applied_weights,
    unmoved,
)
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import Z, read_off
from varscale.theory.propagation.marginals import concentrated, evaluate, marginal
from varscale.theory.propagation.pullbacks import repeats

TERMS = 32  # terms of a sum that stand for all
_TOO_MUCH = 2.0  # chosen, not derived: a mean square over draws, over the known one, that is no chance


@once_per_node
def in_order(node: Node) -> bool:
    """Whether a node depends on what is known by its draws, whose order in time its moments by type do not hold."""
    return node.timed or any(map(in_order, node.sources))


@functools.singledispatch
def sampled_from(node: Node, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """A node at some positions of its axes, (replicates or 1, ...); None where its law is all that is known of it."""
    return None


class Drawing:
    """Nodes drawn together, so many replicates: what they have in common is the same in all.

    `some` gives the positions of an axis that stand for all of it: sums and means are taken over these.
    """

    def __init__(self, replicates: int, some: Callable[[Axis], Int[np.ndarray, " kept"]]):
        self.replicates, self.some = replicates, some
        # Relative doubt of its draws' moments, for an order in time that some of them have lost.
        self.doubt = 0.0
        self.drawn: dict[Hashable, np.ndarray] = {}

    def values(self, view: View, frame: Axes, positions: Positions) -> np.ndarray:
        """A view at some positions of a frame, (positions or 1 ..., replicates or 1): 1 where it does not have an axis."""
        env = {}
        for root in roots_of(view):
            drawn = self._root(root.node, [positions[place] for place in root.bind])
            env[root] = over_frame(np.moveaxis(drawn, 0, -1), root.bind, len(frame))
        return evaluate(view, frame, env)

    def at(self, view: View, frame: Axes, positions: Positions) -> np.ndarray:
        """A view at some positions of a frame, (replicates, positions...)."""
        values = self.values(view, frame, positions)
        return np.moveaxis(np.broadcast_to(values, (*map(len, positions), self.replicates)), -1, 0)

    def _root(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...); where all stand for others, among what is drawn for those."""
        usual = [self.some(axis) for axis in node.axes]
        if not all(np.isin(asked, among).all() for asked, among in zip(positions, usual, strict=True)):
            usual = positions
        key = node.id, tuple(kept.tobytes() for kept in usual)
        if key not in self.drawn:
            made = sampled_from(node, self, usual)
            if made is None:
                self.doubt = LOOSE if in_order(node) else self.doubt  # its order is lost
                made = _drawn(node, usual, self.replicates)
            self.drawn[key] = made.astype(np.float32)
        drawn = self.drawn[key]
        for k, (asked, among) in enumerate(zip(positions, usual, strict=True), 1):
            drawn = drawn if len(asked) == len(among) else drawn.take(np.searchsorted(among, asked), axis=k)
        return drawn

    def averages_all(self, mean: Node) -> bool:
        """Whether a mean is over so many drawn positions that they are as good as all."""
        axes = [mean.argument.axes[k] for k in mean.params]
        whole = math.prod(axis.size for axis in axes)
        return math.prod(len(self.some(axis)) for axis in axes) >= min(whole, TERMS)


def evenly(size: int, most: int) -> Int[np.ndarray, " kept"]:
    """Positions evenly spread along an axis of this size, all of them where they are no more."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(int)


def picked(known: np.ndarray, axes: Axes, positions: Positions, replicates: int) -> np.ndarray:
    """Known draws at some positions: along an axis that was drawn whole those positions' own, along others any.

    Where more are asked for than were drawn, those of other replicates stand in.
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
    values, out = np.broadcast_to(law.values, (*classes, len(Z))), np.empty_like(latents)
    for cell in np.ndindex(*classes):
        own = [np.flatnonzero(label == c) for label, c in zip(labels, cell, strict=True)]
        index = np.ix_(np.arange(replicates), *own)
        out[index] = read_off(values[cell], latents[index])
    return out


@sampled_from.register
def sampled_from_sum(node: Sum, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The terms, where all means among them are as good as of all."""
    if not all(drawing.averages_all(x) for x in node.sources if isinstance(x, Mean)):
        return None
    terms = (c * drawing.at(term, node.axes, positions) for c, term in node.terms)
    return sum(terms, np.zeros(1, np.float32))


@sampled_from.register
def sampled_from_mean(node: Mean, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The mean of what is drawn, where that is as good as all."""
    if not drawing.averages_all(node):
        return None
    source, own = node.argument, iter(positions)
    there = [drawing.some(a) if k in node.params else next(own) for k, a in enumerate(source.axes)]
    return drawing.at(source.whole, source.axes, there).mean(axis=tuple(1 + k for k in node.params))


@sampled_from.register
def sampled_from_moved(node: Rearranged | Take, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """Entries of one array in another order, where more is known of given places than moments by type say."""
    known = all(is_known_array(root.node) for root in roots(unmoved(node)))
    if not (known or in_order(node) or repeats(node)):
        return None
    source, mesh = node.argument, np.ix_(*positions)
    if isinstance(node, Permute):
        mesh = [mesh[d] for d in np.argsort(node.params)]
    elif isinstance(node, Take):
        k, start, _, step = node.params
        sliced = len(source.axes) == len(node.axes)
        mesh = [*mesh[:k], start + step * mesh[k] if sliced else np.array(start), *mesh[k + sliced :]]
    else:  # row-major, as its argument
        here, there = ([axis.size for axis in x.axes] for x in (node, source))
        mesh = np.unravel_index(np.ravel_multi_index(mesh, here), there)
    own = [np.unique(at, return_inverse=True) for at in mesh]
    places = (place.reshape(at.shape) for (_, place), at in zip(own, mesh, strict=True))
    return drawing.at(source.whole, source.axes, [kept for kept, _ in own])[(slice(None), *places)]


@sampled_from.register
def sampled_from_concat(node: Concat, drawing: Drawing, positions: Positions) -> np.ndarray:
    """The parts, each at those of the positions that lie in it."""
    (along, sizes), found = node.params, []
    for end, size, part in zip(np.cumsum(sizes), sizes, node.args, strict=True):
        at = positions[along] - (end - size)
        at = at[(at >= 0) & (at < size)]
        there = [at if k == along else kept for k, kept in enumerate(positions)]
        found += [drawing.at(part, node.axes, there)] if len(at) else []
    return np.concatenate(found, axis=1 + along)


@sampled_from.register
def sampled_from_contract(node: Contract, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """A product, multiplied out; with weights that are drawn, the same wherever they are applied, some of its terms for all.

    Its moments by type say neither what order in time its argument has, nor that units share the norm of what is narrow. With
    weights it is scaled to the mean square that is known; far from it, what was drawn apart belongs together.
    """
    terms = [drawing.some(a) for a in node.params]
    ratio = math.prod(a.size / len(kept) for a, kept in zip(node.params, terms, strict=True))
    there, timed = [*positions, *terms], in_order(node)
    if not (applied := applied_weights(node)):
        if not timed or ratio != 1:
            return None
        x, y = (drawing.values(view, node.frame, there) for view in node.args)
        return summed(x, y, len(positions))
    _, (weights, bind), x, _ = applied[0]
    made = [node, *(root.node for root in roots(x.node))]
    made += [x for below in made if isinstance(below, Sum) for x in below.sources]
    narrow = (n for n in made if isinstance(n, Contract) and n.width <= TERMS)
    if not timed and not any(map(applied_weights, narrow)):
        return None
    own = [there[k] for k in bind]
    rng = np.random.default_rng((content(weights), *(int(kept.sum()) for kept in own)))
    drawn = rng.standard_normal((drawing.replicates, *map(len, own)), np.float32)
    drawn = drawn * math.sqrt(weights.table.mean_square) * math.sqrt(ratio)
    values = drawing.values(x, node.frame, there)
    out = summed(values, over_frame(np.moveaxis(drawn, 0, -1), bind, len(there)), len(positions))
    excess = float(np.mean(np.square(out, dtype=float))) / node.table.divisor
    if not 1 / _TOO_MUCH < excess < _TOO_MUCH:
        node.graph.flag("assumed", UNKNOWN)
    return out / math.sqrt(max(excess, 1e-300))


def summed(x: np.ndarray, y: np.ndarray, kept: int) -> np.ndarray:
    """Σ x·y over the axes after the first `kept`, of arrays (positions or 1..., draws or 1): (draws, positions...)."""
    pairs, draws = ((x, y), (y, x)), x.ndim - 1
    own = [[k for k, n in enumerate(z.shape) if n > 1 or other.shape[k] == 1] for z, other in pairs]
    x, y = (z.reshape([z.shape[k] for k in axes]) for z, axes in zip((x, y), own, strict=True))
    return np.einsum(x, own[0], y, own[1], [draws, *range(kept)], optimize=True)


@sampled_from.register
def sampled_from_gather(node: Gather, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """Rows of a table that is drawn by known indices, or of known numbers by drawn ones: (replicates or 1, ...)."""
    (table, bind), (row_axes, index_axes, *_) = node.args[0], node.params
    if node.known is not None and len(row_axes) == 1:
        ids = node.known.reshape([a.size for a in node.indexed])[np.ix_(*(positions[k] for k in index_axes))]
        found, line = np.unique(ids, return_inverse=True)
        there = [found if k in row_axes else positions[bind[k]] for k in range(len(table.axes))]
        rows = np.moveaxis(drawing.at(table.whole, table.axes, there), 1 + row_axes[0], 1)
        order = np.argsort([*index_axes, *(b for k, b in enumerate(bind) if k not in row_axes)])
        return rows[:, line.reshape(ids.shape)].transpose([0, *(1 + order)])
    if not isinstance(table, Array) or node.known is not None:
        return None
    sizes = [table.axes[k].size for k in row_axes]
    lengths = [len(kept) if k in index_axes else 1 for k, kept in enumerate(positions)]
    rng = np.random.default_rng(content(node))
    drawn = np.unravel_index(rng.integers(math.prod(sizes), size=(drawing.replicates, *lengths)), sizes)
    rows, mesh = dict(zip(row_axes, drawn, strict=True)), np.ix_(*positions)
    return table.values[tuple(rows[k] if k in rows else mesh[place] for k, place in enumerate(bind))]


_MOST_DRAWN = 3_000_000  # elements drawn for one node


def draw(node: Node, sizes: Sequence[int]) -> np.ndarray:
    """Arrays with a node's law at other sizes: its roots are drawn, its tree is evaluated. (replicates, *sizes)

    The scale of a norm is a number here, as it is in quadrature: what it normalises is Gaussian given it, x = √v·z, so that
    x/√v is z whatever v is, and x/√(E v) with x drawn alone has the law of z. E[1/v] of v drawn apart would be left over.
    """
    env, every, rng = dict[Any, np.ndarray](), roots(node), np.random.default_rng(0)
    replicates = int(np.clip(_MOST_DRAWN / math.prod(sizes), 16, 20_000))
    # Trees are evaluated over a frame with the replicates last, as quadrature points are.
    for root in every:
        x, own = root.node, [sizes[b] for b in root.bind]
        if concentrated(x) and any(x.deps & other.node.deps for other in every if other != root):
            drawn = np.full((1, *[1] * len(own)), x.table.total_mean)
        elif isinstance(x, Array):
            drawn = np.asarray(x.values, float)[tuple(slice(0, n) for n in own)][None]
        else:
            law, plain = marginal(x), [Axis(axis.size) for axis in x.axes]
            line, positions = over_classes(np.asarray(law.values, float), x.axes), list(map(np.arange, own))
            drawn = read_off(line, gaussian(pool(law.correlation, x.axes), plain, positions, replicates, rng))
        env[root] = over_frame(np.moveaxis(drawn, 0, -1), root.bind, len(sizes))
    out = evaluate(node.whole, node.axes, env)
    return np.moveaxis(np.broadcast_to(out, (*sizes, replicates)), -1, 0)


def pooled_estimate(samples: np.ndarray, axes: Axes) -> Table:
    """A table with one class an axis, from replicates (first axis) at reduced sizes."""
    second = estimate(samples, [Axis(n) for n in samples.shape[1:]]).second
    return table_over(axes, samples.mean(), refine(second, axes))


_POOLED = 2_000_000  # numbers that moments by type are estimated from
SCORES = 4.0  # standard errors that a mean is trusted to; within them it is taken for zero


def pooled(numbers: np.ndarray, axes: Axes, positions: Positions) -> Table:
    """Moments by class and type, from draws at some positions, (replicates, positions...)."""
    square = float(np.mean(np.square(numbers, dtype=float)))
    numbers, small = _thinned(numbers, axes, positions)
    # Units that differ in scale (of several heads, say) are not all among those that are left.
    table = estimate(numbers * math.sqrt(square / max(float(np.mean(numbers**2)), 1e-300)), small)
    return Table(tuple(axes), table.mean, table.second)


def _thinned(drawn: np.ndarray, axes: Axes, positions: Positions) -> tuple[np.ndarray, list[Axis]]:
    """Draws and the axes that they are over; of very many some of the last axis, from all over it."""
    n, there = drawn.shape[-1], list(positions)
    most = max(_POOLED * n // max(drawn.size, 1), 4)
    if axes and axes[-1].classes == 1 and n > most:
        kept = evenly(n, most)
        drawn, there[-1] = drawn[..., kept], there[-1][kept]
    return np.asarray(drawn, float), [reduced(a, p) for a, p in zip(axes, there, strict=True)]


def table_of_draws(numbers: np.ndarray, axes: Axes, positions: Positions) -> Table:
    """The table of what was drawn, (replicates, positions...).

    A mean that is zero within its error is set to zero: a loop changes sign with its weights unless something breaks that.
    """
    table, means = pooled(numbers, axes, positions), numbers.mean(axis=tuple(range(1, numbers.ndim)))
    if abs(means.mean()) < SCORES * means.std() / math.sqrt(len(means)):
        return Table(table.axes, np.zeros_like(table.mean), table.second)
    return table


def cross_moments_of_draws(
    x: np.ndarray, y: np.ndarray, axes: Axes, positions: Positions, otherwise: np.ndarray | float = 0.0
) -> np.ndarray:
    """E[x_i y_j] by type, from draws of both, (replicates, positions...); what is expected where it is that within its error.

    Most loops change sign with weights that what else there is does not have: zero is expected of them.
    """
    (x, small), (y, _) = (_thinned(z, axes, positions) for z in (x, y))
    found = estimated_products(x, y, small)
    mean, error = found.mean(axis=0), found.std(axis=0) / math.sqrt(len(found) - 1)
    return np.where(np.abs(mean - otherwise) > SCORES * error, mean, otherwise)
