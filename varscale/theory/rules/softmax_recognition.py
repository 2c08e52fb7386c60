"""Softmax and log Σ exp recognised: flax inlines them, as exp(x − max) / Σ exp(x − max), say; and their masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, affordable, join, labelled
from varscale.theory.domain.tables import LEADING_ORDER, NEGLIGIBLE, NEXT_ORDER, Table, over_frame
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots, weighted_sum
from varscale.theory.graph.layout import Value
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import (
    Array,
    Constant,
    Node,
    View,
    array,
    cross_by_kind,
    pullback,
    second_moments,
)
from varscale.theory.graph.normal_form import affine, total
from varscale.theory.graph.store import BackwardNotes, Fact, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.marginals import along, concentrated, marginal
from varscale.theory.propagation.sampler import evenly
from varscale.theory.rules.lookup import padded
from varscale.theory.rules.reductions import Extreme, OneOfMany, cross_by_kind_of_one_of_many
from varscale.theory.rules.registry import Context, recognise
from varscale.theory.rules.softmax import Softmax

_MASKS: Fact[Hashable, Node] = Fact()  # products of known masks
_WINDOWS: Fact[None, int] = Fact()  # masks whose rows share more keys with those near them

MASKED = -1e4  # a logit below this is a mask, not a number
_NOTHING_LEFT = 50.0  # a difference of logits that takes all of a key's weight, whatever else they add
_ROW_CLASSES = 8
_ROWS_COMPARED = 512  # rows of a mask that are compared with each other


def _mean_of_powers(node: Node) -> tuple[float, Mean] | None:
    """c and the mean of exponentials that a node is the product of, c > 0; None of any other node."""
    scale = 1.0
    while isinstance(node, Apply) and node.args[0].bind == tuple(range(len(node.axes))):
        name, extra = node.params
        if name == "affine" and extra[0] > 0 and extra[1] == 0:
            scale *= extra[0]
        elif not (name == "abs" and node.args[0].node.positive):
            return None
        node = node.args[0].node
    powers = node.args[0].node if isinstance(node, Mean) else None
    exponential = isinstance(powers, Apply) and powers.params[0] == "exp"
    return (scale, node) if isinstance(node, Mean) and exponential else None


@recognise("div")
def softmax_of(interpreter: Context, top: Value, bottom: Value) -> Value | None:
    """exp(x − max) / Σ exp(x − max), if that is what this division is."""
    num, (scale, mean) = top.node, _mean_of_powers(bottom.node) or (0.0, bottom.node)
    whole = isinstance(mean, Mean) and mean.args[0].node is num
    if not whole or abs(scale - math.prod(num.axes[k].size for k in mean.params)) > 1e-6:
        return None
    random, allowed = logits(num.args[0], num.axes)
    if random is None:
        return None
    placeholder = Value(random.node, top.dims)
    if len(mean.params) > 1:  # drawn where that can be; else a division as any other
        return placeholder if interpreter.ask("a softmax over several axes") else None
    (key,), frame, args = mean.params, list(num.axes), [random]
    if allowed is not None:
        frame = _row_classes(frame, random, allowed, key)
        args += _rows_filled(allowed.node, allowed.bind, key)
    gaussian = _is_nearly_gaussian(random.node)
    if not gaussian and interpreter.ask("a softmax of logits that are not Gaussian"):
        return placeholder
    placed, learned = _bias_variances(random, key)
    doubt = max(math.expm1(min(placed, 3.0)), _windowed_before(allowed, key))
    if max(doubt, learned) > LEADING_ORDER and interpreter.ask("attention by distance", whole=True):
        return placeholder
    node = interpreter.graph.make(Softmax, frame, args, key)
    if doubt > NEGLIGIBLE:
        node.flagged, node.doubt, node.gradient_doubt = "assumed", doubt, max(doubt, NEXT_ORDER)
    # Where keys that may be paddings are not told apart, of which a mask by sample hides some, weights are
    # spread over paddings, all alike, where a row sees words: of outputs that can be as much again.
    by_sample = allowed is not None and key in allowed.bind and len(allowed.bind) > 1
    alike = frame[key].size in {size for _, size in padded(interpreter.graph)} and frame[key].labels is None
    if not gaussian or (by_sample and alike):
        node.flagged, node.doubt = "assumed", 1.0
    return Value(node, top.dims)


def _is_nearly_gaussian(node: Node) -> bool:
    """Whether logits are sums of products, or a function of one normal that is as good as linear (a soft cap, far out)."""
    terms = node.args if isinstance(node, Sum) else [View(node, tuple(range(len(node.axes))))]
    if all(isinstance(view.node, Contract | Array) for view in terms):
        return True
    live = [root for root in roots(node) if not concentrated(root.node)]
    if isinstance(node, Apply):
        line = along(terms[0], node.axes, *live) if len(live) == 1 else np.zeros(len(Z))
    elif (law := marginal(node)).gaussian:
        return True
    else:
        line = law.values
    variance = line**2 @ WEIGHTS - (line @ WEIGHTS) ** 2
    return bool(np.all((line * Z @ WEIGHTS) ** 2 > (1 - NEGLIGIBLE) * variance))


def _bias_variances(random: View, key: int) -> tuple[float, float]:
    """Variances along the keys of what no input goes with among the logits: of known numbers, and of weights.

    One draw of the weights serves all samples. The known numbers' s² adds e^{s²} − 1 to Σ p².
    """
    placed, learned = 0.0, 0.0
    for c, (node, bind) in weighted_sum(random)[0] if isinstance(random.node, Sum) else ():
        if isinstance(node, Array) and key in bind:
            placed += np.var(c * node.values, axis=bind.index(key)).mean()
        elif key in bind and not node.deps & node.graph.inputs:
            learned += c * c * node.table.variance
    return placed, learned


def _windowed_before(allowed: View | None, key: int) -> float:
    """How much of their keys two rows do not share, of a mask behind another whose rows share as little; else 0.

    Classes of rows by their number of keys do not tell which keys these are. Behind a window a row reads rows near one another,
    which share more keys than two of their classes do on average.
    """
    if allowed is None or key not in allowed.bind:
        return 0.0
    graph, apart = allowed.node.graph, _keys_apart(allowed.node, allowed.bind.index(key))
    before = _WINDOWS.get(graph, None) or 0
    _WINDOWS.put(graph, None, before + (apart > NEXT_ORDER))
    return apart if before else 0.0


@once_per_node
def _keys_apart(mask: Array, key: int) -> float:
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
def _rows_filled(mask: Array, bind: tuple[int, ...], key: int) -> list[View]:
    """The mask, and, where some rows see no key (of paddings that ask), which do; the others then see all, all alike."""
    graph, keys = mask.graph, tuple(k for k, b in enumerate(bind) if b == key)
    some = np.asarray(np.any(mask.values, axis=keys, keepdims=True))
    if some.all():
        return [View(mask, bind)]
    found = array(graph, mask.values | ~some), array(graph, np.squeeze(some, keys))
    left = bind, tuple(b for b in bind if b != key)
    return [View(x, places if x.axes else ()) for x, places in zip(found, left, strict=True)]


def _row_classes(frame: list[Axis], random: View, allowed: View, key: int) -> list[Axis]:
    """Rows that see different numbers of keys belong to different classes, evenly in the logarithm of that number.

    Where other axes have classes, too, there are as many as leave room for the product of queries and keys of the next layer.
    """
    mask, bind = allowed
    keys = tuple(k for k, b in enumerate(bind) if b == key)
    features = [v.node.params for _, v in weighted_sum(random)[0] if isinstance(v.node, Contract)]
    features = max(features, key=lambda found: math.prod(axis.types for axis in found), default=())
    for most in range(_ROW_CLASSES, 0, -1):
        classed = dict(zip((b for b in bind if b != key), _classes_by_keys(mask, keys, most), strict=True))
        found = [join(classed[k], axis) if k in classed else axis for k, axis in enumerate(frame)]
        rows = {axis.size: axis for k, axis in enumerate(found) if k != key}
        keys_later = rows.get(found[key].size, found[key])
        later = (*found[:key], keys_later, *found[key + 1 :], *features)
        if affordable(later) == later:
            return found
    return frame


@once_per_node
def _classes_by_keys(mask: Array, keys: tuple[int, ...], most: int) -> list[Axis]:
    """The axes of a mask besides those of the keys, classed by how many keys a position sees."""
    seen = mask.values.sum(axis=keys)
    # who sees none is in no class with others
    level = np.where(seen > 0, np.log(np.maximum(seen, 1.0)), -1.0)
    means = [level.mean(axis=tuple(j for j in range(level.ndim) if j != i)) for i in range(level.ndim)]
    bins = [(most * (x - x.min()) / max(np.ptp(x), 0.01)).astype(int) for x in means]
    differ = [most - 1 if np.ptp(x) > 0.01 else 0 for x in means]
    return [labelled(np.minimum(x, last)) for x, last in zip(bins, differ, strict=True)]


def logits(view: View, axes: Sequence[Axis]) -> tuple[View | None, View | None]:
    """The random logits and the mask (1 where a key is allowed) of the argument of the exponential."""
    masks, graph = list[View](), view.node.graph
    terms = [
        (c, v)
        for c, v in _random_terms(view, masks)
        if not all(isinstance(r.node, Extreme) for r in roots(v.node))  # nor constants, which have no roots
    ]
    node = total(graph, [c for c, _ in terms], tuple(axes), [v for _, v in terms]) if terms else None
    if node is None or isinstance(node, Constant):
        return None, None

    def product() -> Node:
        return array(
            graph, functools.reduce(np.multiply, (over_frame(*m, len(axes)) for m in known)).squeeze()
        )

    known = [(m.node.values, m.bind) for m in masks if isinstance(m.node, Array)]
    mask = _MASKS.once(graph, (*masks, len(axes)), product) if known else None
    frame = tuple(sorted({b for _, bind in known for b in bind}))
    return node.whole, (View(mask, frame) if isinstance(mask, Array) else None)


def _random_terms(view: View, masks: list[View]) -> list[tuple[float, View]]:
    """The terms of logits but for masks, which are appended to `masks`."""
    node, bind = view
    if isinstance(node, Sum) or (isinstance(node, Apply) and node.params[0] == "affine"):
        return [(c * d, t) for c, child in weighted_sum(view)[0] for d, t in _random_terms(child, masks)]
    which = node.args[0] if isinstance(node, Apply) and node.params[0] == "select_n" else view
    if len(node.args) == 3 and isinstance(which.node, Array):
        for keep, drop in ((1, 2), (2, 1)):
            other = node.args[drop].node
            if isinstance(other, Constant) and other.params < MASKED:
                masks.append(View(_above(which.node, 0.5, keep == 2), which.within(bind).bind))
                return _random_terms(node.args[keep].within(bind), masks)
    if isinstance(node, Array) and (level := _mask_level(node)) is not None:
        masks.append(View(_above(node, level), bind))
        kept = node.values[node.values > level]
        left = np.where(node.values > level, node.values, kept.mean() if kept.size else 0.0)
        return [(1.0, View(array(node.graph, left), bind))] if np.ptp(left) > 0 else []
    return [(1.0, view)]


@once_per_node
def _above(known: Array, level: float, above: bool = True) -> Node:
    """Where known numbers are above a level, or not above it."""
    return array(known.graph, (known.values > level) == above)


def _mask_level(known: Array) -> float | None:
    """The number below which those that are added to logits are a mask; None where they are none.

    So are numbers of two kinds, zeros for one, when the others leave a key nothing of its weight (windows that meet: −100).
    """
    low, high = known.values.min(), known.values.max()
    if low >= MASKED and low < high - _NOTHING_LEFT and set(np.unique(known.values)) == {low, high}:
        return (low + high) / 2
    return MASKED if low < MASKED else None


class LogSumExp(OneOfMany):
    """log Σ exp along an axis, between the largest and that plus ln n, and sampled as the largest is; `params`: ((axis,),)."""

    how = "sampled"
    gradient_doubt = 0.15


cross_by_kind.register(LogSumExp, cross_by_kind_of_one_of_many)


@second_moments.register(LogSumExp)
def second_moments_of_log_sum_exp(node: LogSumExp) -> Table:
    return node.sampled(lambda x, axes: np.asarray(special.logsumexp(x, axis=axes)))


@pullback.register(LogSumExp)
def pullback_of_log_sum_exp(
    node: LogSumExp, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """A logit gets its share of the cotangent."""
    source = node.args[0].node
    (key,) = node.reduced
    shares = node.graph.make(Softmax, source.axes, [View(source, tuple(range(len(source.axes))))], key)
    return [np.expand_dims(cotangent, key) * shares.table.second]


@recognise("log")
def log_sum_exp_of(interpreter: Context, x: Value) -> Value | None:
    """log x, if x is Σ exp of logits less their largest, as log Σ exp of the logits less their largest."""
    found = _mean_of_powers(x.node)
    if found is None:
        return None
    (scale, mean), graph = found, interpreter.graph
    powers, axes = mean.args[0].node, mean.params
    if len(axes) > 1:
        raise NotImplementedError("a softmax over several axes")
    random, allowed = logits(powers.args[0], powers.axes)
    terms, offset = weighted_sum(powers.args[0])
    taken = [(c, v) for c, v in terms if all(isinstance(r.node, Extreme) for r in roots(v.node))]
    if (
        random is None
        or allowed is not None
        or random.node.axes != powers.axes
        or any(axes[0] in view.bind for _, view in taken)
    ):
        return None
    unit = graph.make(LogSumExp, mean.axes, [random], (axes,))
    views = [unit.whole, *(View(v.node, tuple(b - (b > axes[0]) for b in v.bind)) for _, v in taken)]
    node = total(graph, [1.0, *(c for c, _ in taken)], mean.axes, views)
    return Value(affine(node, 1.0, offset + math.log(scale / powers.axes[axes[0]].size)), x.dims)
