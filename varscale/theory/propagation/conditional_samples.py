"""How arrays drawn at some positions follow from what they are made of, drawn: products with weights, averages, moves."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.random_arrays import Positions
from varscale.theory.graph.axis_nodes import Concat, Take
from varscale.theory.graph.content import content
from varscale.theory.graph.expressions import Mean, Sum, roots
from varscale.theory.graph.linear_nodes import Contract, applies_weights, operands
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import UNKNOWN, Array, Node
from varscale.theory.graph.reshapes import Merge, Permute, Split
from varscale.theory.propagation.sampler import TERMS, Drawing, in_order, sample_of_kind, sampled_from

# Chosen, not derived: of a mean square over draws, in units of what it is known to be, more than chance makes
# of it.
_TOO_MUCH = 2.0


@sampled_from.register(Mean)
def sampled_from_mean(node: Mean, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The mean of what is drawn, where that is as good as all."""
    if not drawing.is_drawn_whole(node):
        return None
    source, own = node.args[0].node, iter(positions)
    there = [drawing.some(a) if k in node.params else next(own) for k, a in enumerate(source.axes)]
    return drawing.whole(source, there).mean(axis=tuple(1 + k for k in node.params))


@sampled_from.register(Permute)
def sampled_from_permute(node: Permute, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    if not in_order(node):
        return None
    source = node.args[0].node
    values = drawing.whole(source, [positions[node.params.index(k)] for k in range(len(source.axes))])
    return values.transpose([0, *(1 + k for k in node.params)])


@sampled_from.register(Take)
def sampled_from_take(node: Take, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    if not in_order(node):
        return None
    source, (k, start, _, step) = node.args[0].node, node.params
    dropped = len(source.axes) > len(node.axes)
    there = list(positions)
    there[k : k + (not dropped)] = [np.array([start]) if dropped else start + step * positions[k]]
    if step < 0 and not dropped:
        there[k] = there[k][::-1]
    values = drawing.whole(source, there)
    values = np.flip(values, 1 + k) if step < 0 and not dropped else values
    return values.squeeze(1 + k) if dropped else values


@sampled_from.register(Split)
def sampled_from_split(node: Split, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The positions of an axis that those of its factors are."""
    if not in_order(node):
        return None
    k, sizes = node.params
    factors = list(positions[k : k + len(sizes)])
    at = np.ravel_multi_index(np.meshgrid(*factors, indexing="ij"), sizes).ravel()
    values = drawing.whole(node.args[0].node, [*positions[:k], at, *positions[k + len(sizes) :]])
    return values.reshape(*values.shape[: 1 + k], *map(len, factors), *values.shape[2 + k :])


@sampled_from.register(Merge)
def sampled_from_merge(node: Merge, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    """The factors' positions that those of the whole are, each with each, and of those the ones that were asked for."""
    if not in_order(node):
        return None
    k, count = node.params
    source = node.args[0].node
    places = np.unravel_index(positions[k], [a.size for a in source.axes[k : k + count]])
    own = [np.unique(place, return_inverse=True) for place in places]
    values = drawing.whole(source, [*positions[:k], *(kept for kept, _ in own), *positions[k + 1 :]])
    return values[(*[slice(None)] * (1 + k), *(index for _, index in own))]


@sampled_from.register(Concat)
def sampled_from_concat(node: Concat, drawing: Drawing, positions: Positions) -> np.ndarray:
    """The parts, each at those of the positions that lie in it."""
    along, sizes = node.params
    start, found = 0, []
    for size, part in zip(sizes, node.args, strict=True):
        inside = positions[along][(positions[along] >= start) & (positions[along] < start + size)] - start
        start += size
        if len(inside):
            there = [inside if k == along else kept for k, kept in enumerate(positions)]
            values = drawing.values(part, node.axes, there)
            found.append(np.broadcast_to(values, (*map(len, there), values.shape[-1])))
    replicates = max(x.shape[-1] for x in found)
    wide = [np.broadcast_to(x, (*x.shape[:-1], replicates)) for x in found]
    return np.moveaxis(np.concatenate(wide, axis=along), -1, 0)


@sampled_from.register(Contract)
def sampled_from_contract(node: Contract, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    if applies_weights(node):
        return _weighed(node, drawing, positions) if in_order(node) or _is_narrow(node) else None
    if not in_order(node) or any(len(drawing.some(a)) < a.size for a in node.params):
        return None
    there = [*positions, *(np.arange(a.size) for a in node.params)]
    x, y = (drawing.values(view, node.frame, there) for view in node.args)
    return summed(x, y, len(positions))


def _is_narrow(node: Contract) -> bool:
    """Whether it has few terms, or what it multiplies is made of few: then its units are not independent."""
    inside = [root.node for root in roots(operands(node)[1].node)]
    inside += [view.node for x in inside if isinstance(x, Sum) for view in x.args]
    return any(applies_weights(x) and x.width <= TERMS for x in (node, *inside))


def _weighed(node: Contract, drawing: Drawing, positions: Positions) -> np.ndarray:
    """A product with weights, multiplied out with drawn ones; some of the terms for all.

    Its moments by type say neither what order in time its argument has, nor that products of one narrow argument share its
    norm.
    """
    weights, x = operands(node)
    terms = [drawing.some(a) for a in node.params]
    ratio = math.prod(a.size / len(kept) for a, kept in zip(node.params, terms, strict=True))
    whole = [*positions, *terms]
    values = drawing.values(x, node.frame, whole)
    drawn = _weights(weights.node, drawing, [whole[k] for k in weights.bind]) * math.sqrt(ratio)
    order = sorted(range(len(weights.bind)), key=weights.bind.__getitem__)
    shape = [len(whole[k]) if k in weights.bind else 1 for k in range(len(whole))]
    out = summed(values, drawn.transpose([1 + k for k in order] + [0]).reshape(*shape, -1), len(positions))
    return _known_scale(node, out)


def _weights(weights: Node, drawing: Drawing, positions: Positions) -> np.ndarray:
    """Weights at some positions, (replicates, ...): the same wherever they are applied."""
    rng = drawing.random(content(weights), *(int(kept.sum()) for kept in positions))
    shape = (drawing.replicates, *map(len, positions))
    return rng.standard_normal(shape, np.float32) * math.sqrt(weights.table.mean_square)


def _known_scale(node: Node, out: np.ndarray) -> np.ndarray:
    """What was drawn, scaled to the mean square that is known; far from it, what was drawn apart belongs together."""
    excess = float(np.mean(np.square(out, dtype=float))) / max(node.table.mean_square, 1e-300)
    if not 1 / _TOO_MUCH < excess < _TOO_MUCH:
        node.graph.flag("assumed", UNKNOWN)
    return out / math.sqrt(max(excess, 1e-300))


def summed(x: np.ndarray, y: np.ndarray, kept: int) -> np.ndarray:
    """Σ x·y over the axes after the first `kept`, of arrays (positions or 1..., draws or 1): (draws, positions...)."""
    letters = string.ascii_lowercase[: x.ndim - 1]
    spec = f"{letters},{letters}->{letters[:kept]}"
    draws = np.broadcast_shapes(x.shape, y.shape)[-1]
    pairs = ((z[..., min(r, z.shape[-1] - 1)] for z in (x, y)) for r in range(draws))
    return np.stack([np.einsum(spec, *pair, optimize=True) for pair in pairs])


@sample_of_kind.register(Gather)
def sample_of_kind_of_gather(
    node: Gather, positions: Sequence[np.ndarray], replicates: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Rows of known numbers by indices that are drawn, at these positions of its axes, (replicates, ...)."""
    if not isinstance(node.args[0].node, Array) or node.known is not None:
        return None
    row_axes, index_axes = node.params[:2]
    table, bind = node.args[0].node, node.args[0].bind
    assert isinstance(table, Array)
    kept = [k for k in range(len(table.axes)) if k not in row_axes]
    rows = table.values.transpose([*row_axes, *kept]).reshape(-1, *[table.axes[k].size for k in kept])
    rows = rows[np.ix_(np.arange(len(rows)), *[positions[bind[k]] for k in kept])]
    out = rows[rng.integers(len(rows), size=(replicates, *[len(positions[k]) for k in index_axes]))]
    order = np.argsort([*index_axes, *(bind[k] for k in kept)])
    return out.transpose([0, *(1 + int(k) for k in order)])
