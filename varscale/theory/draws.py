"""Arrays drawn with the laws of nodes, at some of their positions: for what no formula covers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.axes import Axis
from varscale.theory.cross import cross, mean_product
from varscale.theory.elementwise import Apply, Sum, roots
from varscale.theory.graph import UNKNOWN, Array, Constant, Leaf, Node, View
from varscale.theory.hermite import Z
from varscale.theory.quadrature import Environment, evaluate, marginal
from varscale.theory.rearranged import Permute
from varscale.theory.rules.joining import Concat
from varscale.theory.rules.reductions import Mean
from varscale.theory.rules.structure import Take

if TYPE_CHECKING:
    from varscale.theory.rules.linear import Contract

Positions = Sequence[Int[np.ndarray, " kept"]]


def chosen(axis: Axis, most: int) -> Int[np.ndarray, " kept"]:
    """Positions of an axis to draw: up to `most` of each class, evenly spread, the first of each among them."""
    labels = axis.label_array
    kept = []
    for c in range(axis.classes):
        own = np.flatnonzero(labels == c)
        kept.append(own[np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int)])
    return np.sort(np.concatenate(kept))


def reduced(axis: Axis, positions: Int[np.ndarray, " kept"]) -> Axis:
    """The axis that these positions make, its classes numbered as the whole one's (each has one of them at least)."""
    return Axis(len(positions), None if axis.labels is None else axis.label_array[positions].astype(np.uint8).tobytes())


def gaussian(
    covariance: Float[np.ndarray, "..."],
    axes: Sequence[Axis],
    positions: Positions,
    replicates: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "replicates ..."]:
    """Zero-mean Gaussian arrays of a given covariance by type, at some positions of its axes.

    The law is that of a crossed random-effects model: for every set of axes, an effect that is drawn anew at each of their
    positions and shared along the others, there with one value a class.
    """
    labels = [axis.label_array[kept] for axis, kept in zip(axes, positions, strict=True)]
    blocks = covariance.reshape([axis.types for axis in axes])
    out = np.zeros((replicates, *map(len, positions)))
    for own in itertools.product((True, False), repeat=len(axes)):
        part = blocks
        for k, (axis, anew) in enumerate(zip(axes, own, strict=True)):
            c = axis.classes
            same, different = np.split(part, [c], axis=k)
            part = same - np.take(different, np.arange(c) * (c + 1), axis=k) if anew else different
        if np.max(np.abs(part)) > 1e-14:
            out += _effect(part, axes, labels, own, replicates, rng)
    return out


def _effect(
    part: np.ndarray,
    axes: Sequence[Axis],
    labels: Sequence[np.ndarray],
    own: Sequence[bool],
    replicates: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One effect: independent along the axes in `own`, correlated between the classes of the others."""
    mine = [k for k, anew in enumerate(own) if anew]
    others = [k for k, anew in enumerate(own) if not anew]
    classes = [axes[k].classes for k in others]
    square = part.transpose([*mine, *others]).reshape([axes[k].classes for k in mine] + [n for c in classes for n in (c, c)])
    at = len(mine)
    pairs = [*range(at), *range(at, square.ndim, 2), *range(at + 1, square.ndim, 2)]
    total = math.prod(classes)
    matrix = square.transpose(pairs).reshape([axes[k].classes for k in mine] + [total, total])
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    for place, k in enumerate(mine):
        factor = np.take(factor, labels[k], axis=place)
    sizes = [len(labels[k]) for k in mine]
    noise = rng.standard_normal((replicates, *sizes, total))
    effect = (factor @ noise[..., None])[..., 0].reshape([replicates, *sizes, *classes])
    for place, k in enumerate(others):
        effect = np.take(effect, labels[k], axis=1 + at + place)
    return effect.transpose([0, *(1 + i for i in np.argsort([*mine, *others]))])


class Drawing:
    """Views over one frame drawn together: what they have in common is the same in all.

    Attributes:
        frame: the axes that views are read over.
        replicates: how many draws.
        rng: where they come from.
        terms: how many positions stand for all in a sum over an axis of a given size. Where it is given, the views are asked
            for at just as many, and so means are those of what is drawn.
    """

    def __init__(
        self, frame: Sequence[Axis], replicates: int, rng: np.random.Generator, terms: Callable[[int], int] | None = None
    ):
        self.frame, self.replicates, self.rng, self.terms = frame, replicates, rng, terms
        self.drawn: dict[Hashable, np.ndarray] = {}

    def over(self, frame: Sequence[Axis]) -> Drawing:
        """The same draws, for views over another frame."""
        other = Drawing(frame, self.replicates, self.rng, self.terms)
        other.drawn = self.drawn
        return other

    def values(self, view: View, positions: Positions) -> Float[np.ndarray, "..."]:
        """A view at some positions of the frame, (positions or 1 ..., replicates or 1): 1 where it does not have an axis."""
        env: Environment = {}
        for root in roots(view.node):
            own = root.within(view.bind)
            env[own.node.id, own.bind] = self._root(own, positions)
        return evaluate(view, self.frame, env)

    def _root(self, view: View, positions: Positions) -> np.ndarray:
        node, bind = view
        if isinstance(node, Sum) and (self._is_drawn_whole(node) or _unrelated(node)):
            terms = [c * self.values(term.within(bind), positions) for c, term in zip(node.params, node.args, strict=True)]
            return sum(terms, np.zeros(1))
        if isinstance(node, Concat):
            return self._joined(node, bind, positions)
        own = [positions[place] for place in bind]
        key = node.id, tuple(kept.tobytes() for kept in own)
        if key not in self.drawn:
            self.drawn[key] = self._fresh(node, own)
        return _placed(self.drawn[key], bind, len(self.frame))

    def _fresh(self, node: Node, positions: Positions) -> np.ndarray:
        """A root at these positions, (replicates or 1, ...)."""
        if in_order(node):
            known = node.draws()
            if known is not None:
                return picked(known, node.axes, positions, self.replicates)
            if isinstance(node, Take | Permute):
                return self._rearranged(node, positions)
        if isinstance(node, Mean) and self._is_drawn_whole(node):
            return self._averaged(node, positions)
        if applies_weights(node) and (in_order(node) or node.width <= TERMS):
            return self._multiplied(node, positions)
        return _drawn(node, positions, self.replicates, self.rng)

    def _rearranged(self, node: Take | Permute, positions: Positions) -> np.ndarray:
        """What was made from an array that has an order in time, by looking there."""
        source = node.args[0].node
        if isinstance(node, Permute):
            there = [positions[node.params.index(k)] for k in range(len(source.axes))]
            values = self.over(source.axes).values(View(source, tuple(range(len(there)))), there)
            return np.moveaxis(values, -1, 0).transpose([0, *(1 + k for k in node.params)])
        k, start, _, step = node.params
        dropped = len(source.axes) > len(node.axes)
        there = list(positions)
        there[k : k + (not dropped)] = [np.array([start]) if dropped else start + step * positions[k]]
        values = np.moveaxis(self.over(source.axes).values(View(source, tuple(range(len(there)))), there), -1, 0)
        return values.squeeze(1 + k) if dropped else values

    def _is_drawn_whole(self, node: Node) -> bool:
        """Whether a mean, or the means among a sum's terms, are over so many drawn positions that they are as good as all."""
        if self.terms is None:
            return False
        if isinstance(node, Sum):
            return all(self._is_drawn_whole(view.node) for view in node.args if isinstance(view.node, Mean))
        averaged = [node.args[0].node.axes[k].size for k in node.params]
        return math.prod(map(self.terms, averaged)) >= min(math.prod(averaged), TERMS)

    def _averaged(self, node: Mean, positions: Positions) -> np.ndarray:
        """The mean of what is drawn."""
        source, own = node.args[0].node, iter(positions)
        there = [self._some(a) if k in node.params else next(own) for k, a in enumerate(source.axes)]
        values = self.over(source.axes).values(View(source, tuple(range(len(there)))), there)
        return np.moveaxis(values.mean(axis=tuple(node.params)), -1, 0)

    def _some(self, axis: Axis) -> Int[np.ndarray, " kept"]:
        """The positions that stand for all in a sum."""
        return evenly(axis.size, TERMS if self.terms is None else self.terms(axis.size))

    def _multiplied(self, node: Contract, positions: Positions) -> np.ndarray:
        """A product with weights, multiplied out with drawn ones; some of the terms for all.

        Its moments by type say neither what order in time its argument has, nor that products of one narrow argument share its
        norm.
        """
        weights, x = operands(node)
        terms = [self._some(a) for a in node.params]
        ratio = math.prod(a.size / len(kept) for a, kept in zip(node.params, terms, strict=True))
        whole = [*positions, *terms]
        values = self.over(node.frame).values(x, whole)
        values = np.broadcast_to(values, (*values.shape[:-1], self.replicates))
        shape = [len(whole[k]) if k in weights.bind else 1 for k in range(len(whole))]
        drawn = self.rng.standard_normal((*shape, self.replicates)) * math.sqrt(ratio * weights.node.table.mean_square)
        out = _summed(values, drawn, len(positions))
        # A norm's scale that was drawn apart from what it divides leaves too much: its mean square is known.
        excess = float(np.mean(np.square(out))) / max(node.table.mean_square, 1e-300)
        if excess > _TOO_MUCH:
            node.graph.flag("assumed", UNKNOWN)
            out = out / math.sqrt(excess)
        return out

    def _joined(self, node: Concat, bind: tuple[int, ...], positions: Positions) -> np.ndarray:
        """The parts, each at those of the positions that lie in it."""
        along, sizes = node.params
        place, start, found = bind[along], 0, []
        for size, part in zip(sizes, node.args, strict=True):
            inside = positions[place][(positions[place] >= start) & (positions[place] < start + size)] - start
            start += size
            if len(inside):
                there = [inside if k == place else kept for k, kept in enumerate(positions)]
                values = self.values(part.within(bind), there)
                found.append(np.moveaxis(np.broadcast_to(values, _with(values.shape, place, len(inside))), place, 0))
        wide = np.broadcast_shapes(*(x.shape[1:] for x in found))
        return np.moveaxis(np.concatenate([np.broadcast_to(x, (len(x), *wide)) for x in found]), 0, place)


def applies_weights(node: Node) -> TypeGuard[Contract]:
    from varscale.theory.rules.linear import Contract, weight_of

    return isinstance(node, Contract) and weight_of(node) is not None


# Chosen, not derived: of a mean square over draws, in units of what it is known to be, more than chance makes of it.
_TOO_MUCH = 2.0
TERMS = 32  # terms of a sum that stand for all


def evenly(size: int, most: int) -> Int[np.ndarray, " kept"]:
    """Positions evenly spread along an axis of this size, all of them where they are no more."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(int)


def operands(node: Contract) -> tuple[View, View]:
    """The weights of a product, and what they multiply."""
    from varscale.theory.rules.linear import weight_of

    x, y = node.args
    return (x, y) if weight_of(node) in (x.node, *_sources(x.node)) else (y, x)


def _sources(node: Node) -> list[Node]:
    """What a rearranged array is rearranged from."""
    out = []
    while len(node.args) == 1:
        node = node.args[0].node
        out.append(node)
    return out


def _summed(x: np.ndarray, y: np.ndarray, kept: int) -> np.ndarray:
    """Σ x·y over the axes after the first `kept`, of arrays (positions or 1..., replicates): (replicates, positions...)."""
    letters = "abcdefghijklmnopqrstuvw"[: x.ndim - 1]
    shape = np.broadcast_shapes(x.shape, y.shape)
    own = [("".join(c for c, n in zip(letters, a.shape[:-1], strict=True) if n > 1) + "z", a) for a in (x, y)]
    out = "z" + "".join(c for c, n in zip(letters[:kept], shape, strict=False) if n > 1)
    squeezed = [a.reshape([n for n in a.shape[:-1] if n > 1] + [a.shape[-1]]) for _, a in own]
    return np.einsum(f"{own[0][0]},{own[1][0]}->{out}", *squeezed, optimize=True).reshape(shape[-1], *shape[:kept])


def in_order(node: Node) -> bool:
    """Whether a node depends on what is known by its draws, whose order in time its moments by type do not hold."""
    key = ("in order", node.id)
    memo = node.graph.memo
    if key not in memo:
        memo[key] = node.timed or any(in_order(view.node) for view in node.args)
    return memo[key]


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


def _with(shape: tuple[int, ...], place: int, size: int) -> tuple[int, ...]:
    return (*shape[:place], size, *shape[place + 1 :])


_RELATED = 0.1  # of the smaller term's mean square: a correlation that may be lost when terms are drawn one by one


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


def _placed(numbers: np.ndarray, bind: Sequence[int], rank: int) -> np.ndarray:
    """(replicates, own axes...) over the frame, the replicates last."""
    order = sorted(range(len(bind)), key=lambda k: bind[k])
    shape = [1] * rank
    for k in order:
        shape[bind[k]] = numbers.shape[1 + k]
    return np.moveaxis(numbers.transpose([0, *(1 + k for k in order)]).reshape(-1, *shape), 0, -1)


def _drawn(node: Node, positions: Positions, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """A root's values at these positions, (replicates or 1, ...)."""
    from varscale.theory.rules.gather import Gather

    if isinstance(node, Array):
        return np.asarray(node.values, float)[np.ix_(*positions)][None]
    if isinstance(node, Gather) and isinstance(node.args[0].node, Array) and node.known is None:
        return node.picked(positions, replicates, rng)
    law = marginal(node)
    latents = gaussian(law.correlation, node.axes, positions, replicates, rng)
    values = np.broadcast_to(law.values, (*[axis.classes for axis in node.axes], len(Z)))
    labels = [axis.label_array[kept] for axis, kept in zip(node.axes, positions, strict=True)]
    out = np.empty_like(latents)
    for cell in np.ndindex(*values.shape[:-1]):
        index = np.ix_(np.arange(replicates), *[np.flatnonzero(own == c) for own, c in zip(labels, cell, strict=True)])
        out[index] = np.interp(latents[index], Z, values[cell])
    return out
