"""Masks of attention: told apart from the logits that they hide; the keys that each row, and each two rows, see."""

import functools
import math
from collections.abc import Hashable

import numpy as np

from varscale.theory.domain.axes import Axes, Axis, affordable, join, labelled, replaced
from varscale.theory.domain.tables import estimate, lift, over_frame
from varscale.theory.graph.expressions import Apply, Sum, roots, weighted_sum
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Array, Constant, Node, View, array
from varscale.theory.graph.normal_form import total
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.propagation.sampler import evenly
from varscale.theory.rules.elementwise import MASKED, Extreme

_NOTHING_LEFT = 50.0  # a difference of logits that takes all of a key's weight, whatever else they add
_ROW_CLASSES = 8
_ROWS_COMPARED = 512  # rows of a mask that are compared with each other

_MASKS: Fact[Hashable, Node] = Fact()  # products of known masks


def logits(view: View, axes: Axes) -> tuple[View | None, View | None]:
    """The random logits and the mask (1 where a key is allowed) of the argument of the exponential."""
    masks, graph = list[View](), view.node.graph
    terms = _random_terms(view, masks)
    node = total(graph, [c for c, _ in terms], tuple(axes), [v for _, v in terms])
    if isinstance(node, Constant):
        return None, None
    known = [over_frame(m.node.values, m.bind, len(axes)) for m in masks if isinstance(m.node, Array)]
    if not known:
        return node.whole, None
    frame = tuple(k for k in range(len(axes)) if any(m.shape[k] > 1 for m in known))
    key = (*masks, len(axes))
    mask = _MASKS.once(graph, key, lambda: array(graph, functools.reduce(np.multiply, known).squeeze()))
    return node.whole, View(mask, frame) if isinstance(mask, Array) else None


def _random_terms(view: View, masks: list[View]) -> list[tuple[float, View]]:
    """The terms of logits but for masks, which go to `masks`, and for what all keys share: numbers, the largest.

    A mask is below `MASKED`, or of two numbers, the lower of which leaves a key nothing (windows that meet: −100).
    """
    node, bind = view
    if all(isinstance(root.node, Extreme) for root in roots(node)):
        return []
    match node:
        case Sum() | Apply(params=("affine", _)):
            return [(c * d, t) for c, child in weighted_sum(view)[0] for d, t in _random_terms(child, masks)]
        case Apply(params=("select_n", _), args=(View(Array() as which, _), below, above)):
            for keep, drop in ((below, above), (above, below)):
                if isinstance(drop.node, Constant) and drop.node.params < MASKED:
                    masks.append(View(_above(which, 0.5, keep is above), node.args[0].within(bind).bind))
                    return _random_terms(keep.within(bind), masks)
        case Array(values=values):
            low, high = values.min(), values.max()
            two = high - _NOTHING_LEFT > low >= MASKED and set(np.unique(values)) == {low, high}
            if low < (level := (low + high) / 2 if two else MASKED):
                masks.append(View(_above(node, level), bind))
                kept = values[values > level]
                rest = np.where(values > level, values, kept.mean() if kept.size else 0.0)
                return [(1.0, View(array(node.graph, rest), bind))] if np.ptp(rest) > 0 else []
    return [(1.0, view)]


@once_per_node
def _above(known: Array, level: float, above: bool = True) -> Node:
    """Where known numbers are above a level, or not above it."""
    return array(known.graph, (known.values > level) == above)


@once_per_node
def keys_seen(mask: Array, bind: tuple[int, ...], axes: Axes, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys that a row sees, by class of both; keys that two rows share, by type and class. 1/n is averaged within a class."""
    left, across = [b for b in bind if b != key], View(mask, bind).axes_at([key])
    members = mask.values.sum(axis=across) * (1 if across else axes[key].size)
    table, number = estimate(mask.values, [axes[b] for b in bind]), axes[key].counts
    inverse = estimate(1 / np.maximum(members, 1.0), [axes[b] for b in left])
    seen, once = (
        np.moveaxis(lift(x.mean, x.axes, at, axes, pairs=False), key, -1)
        for x, at in ((table, bind), (inverse, left))
    )
    whole = np.broadcast_arrays(seen, once)[0] * number
    shared = np.moveaxis(lift(table.second, table.axes, bind, axes, pairs=True), key, -1)
    share = seen * number / np.maximum(once * whole.sum(-1, keepdims=True), 1e-300)
    return share, shared[..., : len(number)] * number


@once_per_node
def keys_apart(mask: Array, key: int) -> float:
    """1 − E[|A ∩ B| / min(|A|, |B|)] over the sets of keys A, B that two rows see: 0 of a causal mask, or of paddings."""
    n = mask.axes[key].size
    rows = [k for k, axis in enumerate(mask.axes) if axis.size == n and k != key]
    if not rows:
        return 0.0
    seen = np.moveaxis(mask.values, (rows[-1], key), (-2, -1)).reshape(-1, n, n)[0].astype(np.float32)
    seen = seen[seen.any(axis=-1)]
    seen = seen[evenly(len(seen), _ROWS_COMPARED)]
    number = seen.sum(axis=-1)
    return 1 - float(np.mean(seen @ seen.T / np.minimum.outer(number, number))) if len(seen) else 0.0


@once_per_node
def rows_filled(mask: Array, bind: tuple[int, ...], key: int) -> list[View]:
    """The mask, and, where some rows see no key (of paddings that ask), which do; the others then see all, all alike."""
    keys = View(mask, bind).axes_at([key])
    some = np.asarray(np.any(mask.values, axis=keys, keepdims=True))
    parts = [(mask.values | ~some, bind), (np.squeeze(some, keys), tuple(b for b in bind if b != key))]
    made = [(array(mask.graph, x), at) for x, at in parts[: 1 if some.all() else 2]]
    return [View(node, at if node.axes else ()) for node, at in made]


def row_classes(frame: Axes, random: View, allowed: View, key: int) -> Axes:
    """Axes with rows classed evenly in the logarithm of how many keys they see, as finely as the next layer's scores allow."""
    left = [b for b in allowed.bind if b != key]
    summed = [v.node.params for _, v in weighted_sum(random)[0] if isinstance(v.node, Contract)]
    features = max(summed, key=lambda found: math.prod(axis.types for axis in found), default=())
    for most in range(_ROW_CLASSES, 0, -1):
        classed = dict(zip(left, _classes_by_keys(*allowed, key, most), strict=True))
        found = tuple(join(classed[k], axis) if k in classed else axis for k, axis in enumerate(frame))
        rows = {axis.size: axis for k, axis in enumerate(found) if k != key}
        later = (*replaced(found, key, rows.get(found[key].size, found[key])), *features)
        if affordable(later) == later:
            return found
    return frame


@once_per_node
def _classes_by_keys(mask: Array, bind: tuple[int, ...], key: int, most: int) -> list[Axis]:
    """The axes of a mask besides those of the keys, classed by how many keys a position sees."""
    seen = mask.values.sum(axis=View(mask, bind).axes_at([key]))
    level = np.where(seen > 0, np.log(np.maximum(seen, 1.0)), -1.0)  # who sees none is in no other's class
    means = [level.mean(axis=tuple(j for j in range(level.ndim) if j != i)) for i in range(level.ndim)]
    bins = (most * (x - x.min()) / (span if (span := np.ptp(x)) > 0.01 else math.inf) for x in means)
    return [labelled(np.minimum(x.astype(int), most - 1)) for x in bins]
