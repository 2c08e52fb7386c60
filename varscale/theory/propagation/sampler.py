"""Arrays drawn with the laws of nodes, at some of their positions: for what no formula covers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.accuracy import LOOSE
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.random_arrays import Positions, gaussian
from varscale.theory.graph.content import content
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots_of
from varscale.theory.graph.known_arrays import is_known_array, numbers
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View, known_samples
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.cross_moments import cross, mean_product
from varscale.theory.propagation.marginals import evaluate, marginal

TERMS = 32  # terms of a sum that stand for all


@once_per_node
def in_order(node: Node) -> bool:
    """Whether a node depends on what is known by its draws, whose order in time its moments by type do not hold."""
    return node.timed or any(in_order(view.node) for view in node.args)


@functools.singledispatch
def sampled_from(node: Node, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """A node at some positions of its axes, (replicates or 1, ...); None where its law is all that is known of it."""
    return None


def reduced(axis: Axis, positions: Int[np.ndarray, " kept"]) -> Axis:
    """The axis that these positions make, its classes numbered as the whole one's (each has one of them at least)."""
    return Axis(
        len(positions),
        None if axis.labels is None else axis.label_array[positions].astype(np.uint8).tobytes(),
    )


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

    def random(self, *what: int) -> np.random.Generator:
        """Where the numbers of one thing come from, whatever was drawn before it."""
        return np.random.default_rng(what)

    def values(self, view: View, frame: Sequence[Axis], positions: Positions) -> Float[np.ndarray, "..."]:
        """A view at some positions of a frame, (positions or 1 ..., replicates or 1): 1 where it does not have an axis."""
        env = {}
        for root in roots_of(view):
            numbers = self._at(root.node, [positions[place] for place in root.bind])
            env[root] = _over_the_frame(numbers, root.bind, len(frame))
        return evaluate(view, frame, env)

    def whole(self, node: Node, positions: Positions) -> Float[np.ndarray, "replicates ..."]:
        """A node at some positions of its own axes."""
        view = View(node, tuple(range(len(node.axes))))
        return np.moveaxis(self.values(view, node.axes, positions), -1, 0)

    def _at(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...); where all stand for others, among what is drawn for those."""
        usual = [self.some(axis) for axis in node.axes]
        found = [_places_among(asked, among) for asked, among in zip(positions, usual, strict=True)]
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            return self._known(node, positions)
        drawn = self._known(node, usual)
        for k, (place, among) in enumerate(zip(places, usual, strict=True)):
            drawn = drawn if len(place) == len(among) else np.take(drawn, place, axis=1 + k)
        return drawn

    def _known(self, node: Node, positions: Positions) -> np.ndarray:
        key = node.id, tuple(kept.tobytes() for kept in positions)
        if key not in self.drawn:
            self.drawn[key] = self._fresh(node, positions).astype(np.float32)
        return self.drawn[key]

    def _fresh(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...)."""
        if isinstance(node, Sum) and (self.is_drawn_whole(node) or _unrelated(node)):
            return self._added(node, positions)
        if in_order(node):
            known = known_samples(node)
            if known is not None:
                return picked(known, node.axes, positions, self.replicates)
        made = sampled_from(node, self, positions)
        if made is not None:
            return made
        if in_order(node):  # its order is lost
            self.doubt = LOOSE
        return _drawn(node, positions, self.replicates, self.random(content(node)))

    def _added(self, node: Sum, positions: Positions) -> np.ndarray:
        found = [
            c * self.values(term, node.axes, positions)
            for c, term in zip(node.params, node.args, strict=True)
        ]
        shape = [len(kept) for kept in positions]
        out = sum(found, np.zeros(1, np.float32))
        return np.moveaxis(np.broadcast_to(out, (*shape, out.shape[-1])), -1, 0)

    def is_drawn_whole(self, node: Node) -> bool:
        """Whether a mean, or the means among a sum's terms, are over so many drawn positions that they are as good as all."""
        if isinstance(node, Sum):
            return all(self.is_drawn_whole(view.node) for view in node.args if isinstance(view.node, Mean))
        averaged = [node.args[0].node.axes[k] for k in node.params]
        sizes = math.prod(axis.size for axis in averaged)
        return math.prod(len(self.some(axis)) for axis in averaged) >= min(sizes, TERMS)


def evenly(size: int, most: int) -> Int[np.ndarray, " kept"]:
    """Positions evenly spread along an axis of this size, all of them where they are no more."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(int)


def _places_among(
    asked: Int[np.ndarray, " kept"], among: Int[np.ndarray, " some"]
) -> Int[np.ndarray, " kept"] | None:
    """Where positions are among others, both in ascending order; None where one is not."""
    places = np.searchsorted(among, asked)
    inside = places < len(among)
    return places if inside.all() and np.array_equal(among[places], asked) else None


def picked(known: np.ndarray, axes: Sequence[Axis], positions: Positions, replicates: int) -> np.ndarray:
    """Known draws at some positions. Where more are asked for than there are, those of other draws stand in.

    Positions told apart, and all of an axis where all are known, are found by where they are; of others any will do.
    """
    index, shift = [], np.zeros([1] * (len(axes) + 1), int)
    for k, (axis, asked, n) in enumerate(zip(axes, positions, known.shape[1:], strict=True)):
        if n == axis.size:
            at, turn = asked, np.zeros(len(asked), int)
        else:
            at, turn = np.arange(len(asked)) % n, np.arange(len(asked)) // n
        shape = [-1 if i == k else 1 for i in range(len(axes))]
        index.append(at.reshape(1, *shape))
        shift = shift + turn.reshape(1, *shape)
    draw = (np.arange(replicates).reshape(-1, *[1] * len(axes)) + shift) % len(known)
    return known[(draw, *index)]


_RELATED = (
    0.1  # of the smaller term's mean square: a correlation that may be lost when terms are drawn one by one
)


def _unrelated(node: Sum) -> bool:
    """Whether terms can be drawn one by one: none correlated with another, but for what is drawn jointly in any case."""
    for x, y in itertools.combinations(node.args, 2):
        if _of_leaves(x.node) and _of_leaves(y.node):
            continue
        shared = np.max(np.abs(cross(x, y, node.axes) - mean_product(x, y, node.axes)))
        if shared > _RELATED * min(x.node.table.mean_square, y.node.table.mean_square):
            return False
    return True


def _of_leaves(node: Node) -> bool:
    """Whether a node is a function of random leaves and known numbers alone, position by position."""
    if isinstance(node, Apply | Sum):
        return all(_of_leaves(view.node) for view in node.args)
    return isinstance(node, Leaf | Array | Constant)


def _over_the_frame(numbers: np.ndarray, bind: Sequence[int], rank: int) -> np.ndarray:
    """(replicates, own axes...) over the frame, the replicates last."""
    order = sorted(range(len(bind)), key=lambda k: bind[k])
    shape = [1] * rank
    for k in order:
        shape[bind[k]] = numbers.shape[1 + k]
    return np.moveaxis(numbers.transpose([0, *(1 + k for k in order)]).reshape(-1, *shape), 0, -1)


@functools.singledispatch
def sample_of_kind(
    node: Node, positions: Positions, replicates: int, rng: np.random.Generator
) -> np.ndarray | None:
    """A root's values at positions of its axes, (replicates, ...), by the law of its kind; None where that is its marginal."""
    return None


def _drawn(node: Node, positions: Positions, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """A root's values at these positions, (replicates or 1, ...)."""
    if isinstance(node, Array):
        return np.asarray(node.values, float)[np.ix_(*positions)][None]
    if is_known_array(node) and (known := numbers(node)) is not None:
        return np.asarray(known, float)[np.ix_(*positions)][None]
    own = sample_of_kind(node, positions, replicates, rng)
    if own is not None:
        return own
    law = marginal(node)
    latents = gaussian(law.correlation, node.axes, positions, replicates, rng)
    classes = [axis.classes for axis in node.axes]
    labels = [axis.label_array[kept] for axis, kept in zip(node.axes, positions, strict=True)]
    if law.gaussian:
        mean, deviation = (np.broadcast_to(x, classes)[np.ix_(*labels)] for x in (law.mean, law.deviation))
        return mean + deviation * latents
    values = np.broadcast_to(law.values, (*classes, len(Z)))
    out = np.empty_like(latents)
    for cell in np.ndindex(*values.shape[:-1]):
        index = np.ix_(
            np.arange(replicates), *[np.flatnonzero(own == c) for own, c in zip(labels, cell, strict=True)]
        )
        out[index] = np.interp(latents[index], Z, values[cell])
    return out
