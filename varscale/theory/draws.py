"""Arrays drawn with the laws of nodes, at some of their positions: for what no formula covers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.axes import Axis
from varscale.theory.cross import cross, mean_product
from varscale.theory.elementwise import Apply, Sum, roots
from varscale.theory.graph import Array, Constant, Leaf, Node, View
from varscale.theory.quadrature import Environment, Z, evaluate, marginal

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
    covariance: Float[np.ndarray, "..."], axes: Sequence[Axis], replicates: int, rng: np.random.Generator
) -> Float[np.ndarray, "replicates ..."]:
    """Zero-mean Gaussian arrays over axes of a given covariance by type.

    The law is that of a crossed random-effects model: for every set of axes, an effect that is drawn anew at each of their
    positions and shared along the others, there with one value a class.
    """
    rank = len(axes)
    blocks = covariance.reshape([axis.types for axis in axes])
    out = np.zeros((replicates, *[axis.size for axis in axes]))
    for own in itertools.product((True, False), repeat=rank):
        part = blocks
        for k, (axis, anew) in enumerate(zip(axes, own, strict=True)):
            c = axis.classes
            same, different = np.split(part, [c], axis=k)
            part = same - np.take(different, np.arange(c) * (c + 1), axis=k) if anew else different
        drawn = _effect(part, axes, own, replicates, rng)
        if drawn is not None:
            out += drawn
    return out


def _effect(
    part: np.ndarray, axes: Sequence[Axis], own: Sequence[bool], replicates: int, rng: np.random.Generator
) -> np.ndarray | None:
    """One effect: independent along the axes in `own`, correlated between the classes of the others."""
    if np.max(np.abs(part)) < 1e-14:
        return None
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
        factor = np.take(factor, axes[k].label_array, axis=place)
    noise = rng.standard_normal((replicates, *[axes[k].size for k in mine], total))
    effect = (factor @ noise[..., None])[..., 0].reshape([replicates, *[axes[k].size for k in mine], *classes])
    for place, k in enumerate(others):
        effect = np.take(effect, axes[k].label_array, axis=1 + at + place)
    return effect.transpose([0, *(1 + i for i in np.argsort([*mine, *others]))])


def joint(
    views: Sequence[View], frame: Sequence[Axis], positions: Positions, replicates: int, rng: np.random.Generator
) -> list[Float[np.ndarray, "..."]]:
    """Several views over one frame, drawn together: what they have in common is the same in all.

    Returns:
        A view an array, (positions or 1 ..., replicates): 1 where it does not have an axis.
    """
    env: Environment = {}
    drawn: dict[int, np.ndarray] = {}

    def fill(view: View) -> None:
        for root in roots(view.node):
            node, bind = placed = root.within(view.bind)
            if (node.id, bind) in env:
                continue
            if isinstance(node, Sum) and _unrelated(node):
                terms = [term.within(bind) for term in node.args]
                for term in terms:
                    fill(term)
                env[placed.node.id, bind] = sum(
                    (c * evaluate(term, frame, env) for c, term in zip(node.params, terms, strict=True)), np.zeros(1)
                )
                continue
            if node.id not in drawn:
                drawn[node.id] = _root(node, [positions[b] for b in bind], replicates, rng)
            env[node.id, bind] = _placed(drawn[node.id], bind, len(frame))

    for view in views:
        fill(view)
    return [evaluate(view, frame, env) for view in views]


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


def _root(node: Node, positions: Positions, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """A root's values at these positions, (replicates or 1, ...)."""
    if isinstance(node, Array):
        return np.asarray(node.values, float)[np.ix_(*positions)][None]
    law = marginal(node)
    axes = [reduced(axis, kept) for axis, kept in zip(node.axes, positions, strict=True)]
    latents = gaussian(law.correlation, axes, replicates, rng)
    values = np.broadcast_to(law.values, (*[axis.classes for axis in node.axes], len(Z)))
    out = np.empty_like(latents)
    for cell in np.ndindex(*values.shape[:-1]):
        index = np.ix_(np.arange(replicates), *[np.flatnonzero(a.label_array == c) for a, c in zip(axes, cell, strict=True)])
        out[index] = np.interp(latents[index], Z, values[cell])
    return out
