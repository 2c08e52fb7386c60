"""Softmax and log Σ exp recognised: flax inlines them, as exp(x − max) / Σ exp(x − max), say; and their masks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, affordable, join, labelled
from varscale.theory.domain.tables import LEADING_ORDER, NEGLIGIBLE, NEXT_ORDER, Table
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
from varscale.theory.graph.normal_form import affine, apply, total
from varscale.theory.graph.store import BackwardNotes, Fact, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.marginals import along, concentrated, marginal
from varscale.theory.propagation.sampler import evenly
from varscale.theory.rules.lookup import padded
from varscale.theory.rules.reductions import Extreme, OneOfMany, cross_by_kind_of_one_of_many
from varscale.theory.rules.registry import Context, recognise
from varscale.theory.rules.softmax import Softmax

# Made of known masks: products; where a choice is made.
_MASKS: Fact[Hashable, Node] = Fact()
_WINDOWS: Fact[None, int] = Fact()  # masks whose rows share more keys with those near them

MASKED = -1e4  # a logit below this is a mask, not a number
_NOTHING_LEFT = 50.0  # a difference of logits that takes all of a key's weight, whatever else they add
_ROW_CLASSES = 8
_ROWS_COMPARED = 512  # rows of a mask that are compared with each other


@recognise("div")
def softmax_of(interpreter: Context, top: Value, bottom: Value) -> Value | None:
    """exp(x − max) / Σ exp(x − max), if that is what this division is."""
    num, den = top.node, bottom.node
    if not (
        isinstance(num, Apply)
        and num.params[0] == "exp"
        and isinstance(den, Apply)
        and den.params[0] == "affine"
    ):
        return None
    mean = den.args[0].node
    if not (isinstance(mean, Mean) and mean.args[0].node is num):
        return None
    if abs(den.params[1][0] - math.prod(num.axes[k].size for k in mean.params)) > 1e-6:
        return None
    random, allowed = logits(num.args[0], num.axes)
    if random is None:
        return None
    if len(mean.params) > 1:  # drawn where that can be; else a division as any other
        return Value(random.node, top.dims) if interpreter.ask("a softmax over several axes") else None
    (key,), frame, args = mean.params, list(num.axes), [random]
    if allowed is not None:
        frame = _row_classes(frame, random, allowed, key)
    gaussian = _is_nearly_gaussian(random.node)
    if not gaussian and interpreter.ask("a softmax of logits that are not Gaussian"):
        return Value(random.node, top.dims)
    doubt = max(_bias_by_place(random, key), _windowed_before(allowed, key))
    if max(doubt, _learned_bias(random, key)) > LEADING_ORDER and interpreter.ask(
        "attention by distance", whole=True
    ):
        return Value(random.node, top.dims)
    if allowed is not None:
        args += _rows_filled(allowed, key)
        if isinstance(args[1].node, Constant):  # rows see every key or none
            args = [View(apply(interpreter.graph, "mul", (), tuple(frame), [random, args[2]]), random.bind)]
    node = interpreter.graph.make(Softmax, frame, args, key)
    if doubt > NEGLIGIBLE:
        node.flagged, node.doubt, node.gradient_doubt = "assumed", doubt, max(doubt, NEXT_ORDER)
    # Where keys that may be paddings are not told apart, of which a mask by sample hides some, weights are
    # spread over paddings, all alike, where a row sees words: of outputs that can be as much again.
    padded_keys = {size for _, size in padded(interpreter.graph)} & {frame[key].size}
    by_sample = allowed is not None and key in allowed.bind and len(allowed.bind) > 1
    if not gaussian or (by_sample and padded_keys and frame[key].labels is None):
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


def _bias_by_place(random: View, key: int) -> float:
    """The relative error of Σ p² where known numbers among the logits vary along the keys: e^{s²} − 1, s² their variance."""
    terms = zip(random.node.params, random.node.args, strict=True) if isinstance(random.node, Sum) else ()
    variances = [
        np.var(c * v.node.values, axis=v.bind.index(key)).mean()
        for c, v in terms
        if isinstance(v.node, Array) and key in v.bind
    ]
    return math.expm1(min(sum(variances), 3.0))


def _learned_bias(random: View, key: int) -> float:
    """The variance of weights among the logits that no input goes with: one draw of them serves all samples."""
    terms = zip(random.node.params, random.node.args, strict=True) if isinstance(random.node, Sum) else ()
    weights = [(c, v) for c, v in terms if v.node.deps and not v.node.deps & v.node.graph.inputs]
    return sum(c * c * v.node.table.variance for c, v in weights if key in v.bind)


def _windowed_before(allowed: View | None, key: int) -> float:
    """How much of their keys two rows do not share, of a mask behind another whose rows share as little; else 0.

    Classes of rows by their number of keys do not tell which keys these are. Behind a window a row reads rows near one another,
    which share more keys than two of their classes do on average.
    """
    if allowed is None or key not in allowed.bind:
        return 0.0
    assert isinstance(allowed.node, Array)
    keys, sizes = allowed.bind.index(key), [axis.size for axis in allowed.node.axes]
    rows = [k for k, size in enumerate(sizes) if size == sizes[keys] and k != keys]
    apart = _keys_apart(allowed.node, rows[-1], keys) if rows else 0.0
    before = _WINDOWS.of(allowed.node.graph).setdefault(None, 0)
    _WINDOWS.put(allowed.node.graph, None, before + (apart > NEXT_ORDER))
    return apart if before else 0.0


@once_per_node
def _keys_apart(mask: Array, row: int, key: int) -> float:
    """1 − E[|A ∩ B| / min(|A|, |B|)] over the sets of keys A, B that two rows see: 0 of a causal mask, or of paddings."""
    n = mask.axes[row].size
    seen = np.moveaxis(mask.values, (row, key), (-2, -1)).reshape(-1, n, n)[0].astype(np.float32)
    rows = np.flatnonzero(seen.any(axis=-1))
    seen = seen[rows[evenly(len(rows), _ROWS_COMPARED)]]
    number = seen.sum(axis=-1)
    return 1 - float(np.mean(seen @ seen.T / np.minimum.outer(number, number))) if len(seen) else 0.0


def _rows_filled(allowed: View, key: int) -> list[View]:
    """The mask, and, where some rows see no key (of paddings that ask), which do; the others then see all, all alike."""
    mask, bind = allowed
    assert isinstance(mask, Array)
    keys = tuple(k for k, b in enumerate(bind) if b == key)
    if not (found := _filled(mask, keys)):
        return [allowed]
    left = tuple(b for b in bind if b != key)
    return [View(x, bound if x.axes else ()) for x, bound in zip(found, (bind, left), strict=True)]


@once_per_node
def _filled(mask: Array, keys: tuple[int, ...]) -> tuple[Node, ...]:
    """A mask whose rows without a key see all, and which rows see any; nothing where all do."""
    some = np.any(mask.values, axis=keys, keepdims=True)
    if some.all():
        return ()
    return array(mask.graph, mask.values | ~some), array(mask.graph, some.squeeze(keys))


def _row_classes(frame: list[Axis], random: View, allowed: View, key: int) -> list[Axis]:
    """Rows that see different numbers of keys belong to different classes, evenly in the logarithm of that number.

    Where other axes have classes, too, there are as many as leave room for the product of queries and keys of the next layer.
    """
    mask, bind = allowed
    keys = tuple(k for k, b in enumerate(bind) if b == key)
    left = [b for b in bind if b != key]
    features = _features(random)
    for most in range(_ROW_CLASSES, 0, -1):
        classed = _classes_by_keys(mask, keys, most)
        found = list(frame)
        for b, axis in zip(left, classed, strict=True):
            found[b] = join(axis, frame[b])
        rows = {axis.size: axis for k, axis in enumerate(found) if k != key}
        later = (
            *(rows.get(axis.size, axis) if k == key else axis for k, axis in enumerate(found)),
            *features,
        )
        if affordable(later) == later:
            return found
    return frame


def _features(view: View) -> tuple[Axis, ...]:
    """The axes that a product of queries and keys sums over."""
    node = view.node
    if isinstance(node, Contract):
        return node.params
    inside = [_features(child) for child in node.args] if isinstance(node, Apply | Sum) else []
    return max(inside, key=lambda found: math.prod(axis.types for axis in found), default=())


@once_per_node
def _classes_by_keys(mask: Node, keys: tuple[int, ...], most: int) -> list[Axis]:
    """The axes of a mask besides those of the keys, classed by how many keys a position sees."""
    assert isinstance(mask, Array)
    seen = mask.values.sum(axis=keys)
    level = np.where(
        seen > 0, np.log(np.maximum(seen, 1.0)), -1.0
    )  # who sees none is in no class with others
    out = []
    for i, size in enumerate(level.shape):
        mean = level.mean(axis=tuple(j for j in range(level.ndim) if j != i))
        low, reach = mean.min(), float(np.ptp(mean))
        bins = (most * (mean - low) / max(reach, 0.01)).astype(int)
        out.append(labelled(np.minimum(bins, most - 1)) if reach > 0.01 else Axis(size))
    return out


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
    random = View(node, tuple(range(len(axes))))
    frame = tuple(sorted({b for m in masks for b in m.bind}))
    if not masks or (len(masks) == 1 and masks[0].bind == frame):
        return random, masks[0] if masks else None
    sizes = tuple(axes[b].size for b in frame)

    def product() -> Node:
        out = np.ones(sizes)
        for m in masks:
            assert isinstance(m.node, Array)
            shape = [axes[b].size if b in m.bind else 1 for b in frame]
            out = out * m.node.values.transpose(np.argsort(m.bind)).reshape(shape)
        return array(graph, out)

    mask = _MASKS.once(graph, (tuple((m.node.id, m.bind) for m in masks), sizes), product)
    return random, (None if isinstance(mask, Constant) else View(mask, frame))


def _mask_level(known: Array) -> float | None:
    """The number below which those that are added to logits are a mask; None where they are none.

    So are numbers of two kinds, zeros for one, when the others leave a key nothing of its weight (windows that meet: −100).
    """
    low, high = float(known.values.min()), float(known.values.max())
    if low >= MASKED and low < high - _NOTHING_LEFT and set(np.unique(known.values)) == {low, high}:
        return (low + high) / 2
    return MASKED if low < MASKED else None


def _random_terms(view: View, masks: list[View]) -> list[tuple[float, View]]:
    node, bind = view
    graph = node.graph
    if isinstance(node, Sum):
        return [
            (c * d, t)
            for c, child in zip(node.params, node.args, strict=True)
            for d, t in _random_terms(child.within(bind), masks)
        ]
    if isinstance(node, Apply) and node.params[0] == "affine":
        return [(node.params[1][0] * c, t) for c, t in _random_terms(node.args[0].within(bind), masks)]
    chosen = node.args[0] if isinstance(node, Apply) and node.params[0] == "select_n" else view
    if len(node.args) == 3 and isinstance(which := chosen.node, Array):
        for keep, drop in ((1, 2), (2, 1)):
            other = node.args[drop].node
            if isinstance(other, Constant) and other.params < MASKED:
                allowed = _MASKS.once(
                    graph, (which.params, keep), lambda k=keep: array(graph, which.values == k - 1)
                )
                masks.append(View(allowed, tuple(bind[b] for b in chosen.bind)))
                return _random_terms(node.args[keep].within(bind), masks)
    if isinstance(node, Array) and (level := _mask_level(node)) is not None:
        allowed = _MASKS.once(graph, (node.params, None), lambda: array(graph, node.values > level))
        if isinstance(allowed, Array):
            masks.append(View(allowed, bind))
        kept = node.values[node.values > level]
        left = np.where(node.values > level, node.values, kept.mean() if kept.size else 0.0)
        return [(1.0, View(array(graph, left), bind))] if np.ptp(left) > 0 else []
    return [(1.0, view)]


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
    inner, scale = (
        x.node,
        1.0,
    )  # what is added up, times a positive number; the absolute value of what is positive is itself
    while isinstance(inner, Apply) and inner.args[0].bind == tuple(range(len(inner.axes))):
        name, extra = inner.params
        if name == "affine" and extra[0] > 0 and extra[1] == 0:
            scale *= extra[0]
        elif not (name == "abs" and inner.args[0].node.positive):
            break
        inner = inner.args[0].node
    if not isinstance(inner, Mean) or tuple(inner.axes) != tuple(x.node.axes):
        return None
    powers, axes = inner.args[0].node, inner.params
    if not (isinstance(powers, Apply) and powers.params[0] == "exp"):
        return None
    if len(axes) > 1:
        raise NotImplementedError("a softmax over several axes")
    random, allowed = logits(powers.args[0], powers.axes)
    if random is None or allowed is not None or tuple(random.node.axes) != tuple(powers.axes):
        return None
    terms, offset = weighted_sum(powers.args[0])
    taken = [(c, v) for c, v in terms if all(isinstance(r.node, Extreme) for r in roots(v.node))]
    if any(b in axes for _, view in taken for b in view.bind):
        return None
    place = {k: i for i, k in enumerate(k for k in range(len(powers.axes)) if k not in axes)}
    graph = interpreter.graph
    unit = graph.make(LogSumExp, inner.axes, [random], (axes,))
    count = math.prod(powers.axes[k].size for k in axes)
    views = [
        View(unit, tuple(range(len(inner.axes)))),
        *(View(v.node, tuple(place[b] for b in v.bind)) for _, v in taken),
    ]
    node = total(graph, [1.0, *(c for c, _ in taken)], inner.axes, views)
    return Value(affine(node, 1.0, offset + math.log(scale / count)), x.dims)
