"""Softmax by segment, as graph attention has it: exp(l − max[i]) / Σ exp(l − max[i]), recognised at the division.

The weights of a segment of n edges have the moments of a softmax over n independent Gaussian logits (see `softmax`), in which
what the edges of a segment share cancels; weights of two segments are independent.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axis, contract_axis, grouped
from varscale.theory.domain.tables import Table
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.layout import Value
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import Array, Constant, Node, View, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.integrals.softmax import WeightMoments, weight_moments
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.registry import recognise
from varscale.theory.rules.segment_sums import SEGMENTS, Segments, SegmentSum
from varscale.theory.rules.segments import SegmentMax, as_seen_within, pairs_within_segments
from varscale.theory.rules.softmax_recognition import MASKED

# Set on the validation grid, not derived, both: weights and values are projections of one node; some edges are masked besides.
_PROJECTED_DOUBT, _MASKED_DOUBT = 0.6, 0.8


class SegmentSoftmax(Node):
    """Weights over axis 0; `params` is (key of the segments in the store, whether pairs are those within a segment)."""

    how = "quadrature"
    shares = True
    gradient_doubt = 1.0  # to first order in the logits alone, with no bound on the rest

    def prepare(self) -> None:
        self.positive = True

    @functools.cached_property
    def moments(self) -> list[tuple[float, WeightMoments]]:
        """For each class of edges: the size of their segments, and the moments of their weights."""
        ids = SEGMENTS.of(self.graph)[self.params[0]].ids
        logits = self.args[0].node
        inside = as_seen_within(logits, ids).table.second
        same = inside
        for axis in reversed(logits.axes):
            same = contract_axis(same, same.ndim - 1, axis.same)
        pair = inside
        for axis in reversed(logits.axes[1:]):
            pair = contract_axis(pair, pair.ndim - 1, axis.same)
        shared = contract_axis(pair, 0, logits.axes[0].different)
        variance = float(max(same - shared, 1e-12))
        sizes = segment_sizes(ids)
        own = self.axes[0]
        out = []
        for c in range(own.classes):
            mine = sizes[own.label_array == c]
            n = float(1 / np.mean(1 / np.maximum(mine, 1.0))) if mine.min() > 0 else 0.0
            out.append((n, weight_moments(np.array([max(n, 1.0)]), np.array([variance]))))
        return out


@second_moments.register(SegmentSoftmax)
def second_moments_of_segment_softmax(node: SegmentSoftmax) -> Table:
    ids = SEGMENTS.of(node.graph)[node.params[0]].ids
    # What weights and values share (both are projections of one node) is not counted, nor how masked edges are placed.
    node.graph.flag("assumed", _PROJECTED_DOUBT if ids.min() >= 0 else _MASKED_DOUBT)
    sizes = np.array([n for n, _ in node.moments])
    live = sizes > 0
    square = np.array([m.square[0] for _, m in node.moments]) * live
    pair = np.array([m.pair[0, 0] for _, m in node.moments]) * live
    mean = live / np.maximum(sizes, 1.0)
    apart = np.multiply.outer(mean, mean)
    if node.params[1]:
        np.fill_diagonal(apart, np.where(sizes > 1, (1 - sizes * square) / np.maximum(sizes * (sizes - 1), 1e-9), pair))
    types = np.concatenate([square, apart.ravel()])
    rest = node.axes[1:]
    # Weights of two heads are independent given the segment.
    second = np.empty(node.frame_types)
    second[...] = np.concatenate([mean**2, np.multiply.outer(mean, mean).ravel()]).reshape(-1, *[1] * len(rest))
    second[(slice(None), *(slice(0, a.classes) for a in rest))] = types.reshape(-1, *[1] * len(rest))
    means = np.broadcast_to(mean.reshape(-1, *[1] * len(rest)), [a.classes for a in node.axes])
    return Table(node.axes, np.array(means), second)


@pullback.register(SegmentSoftmax)
def pullback_of_segment_softmax(node: SegmentSoftmax, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """∂p/∂l = p(δ − p): to first order in the size of the logits the weights are 1/n each, and a segment sums to zero."""
    own = node.axes[0]
    c = own.classes
    square = np.array([m.square[0] * (1 - 1 / max(n, 1.0)) for n, m in node.moments])
    weights = np.zeros(own.types)
    weights[:c] = square
    diagonal = [c + i * (c + 1) for i in range(c)]
    weights[diagonal] = -square * own.counts / np.maximum(own.pairs[diagonal], 1.0)
    own_cotangent = np.broadcast_to(cotangent, node.frame_types)[own.first]
    back = own_cotangent * weights.reshape(-1, *[1] * (cotangent.ndim - 1))
    return [sum_out(back, node.axes, node.args[0])]


def _segment_sum(node: Node) -> SegmentSum | None:
    """The sums by segment that a denominator reads, if that is all it reads."""
    while not isinstance(node, SegmentSum):
        own = roots(node)
        if isinstance(node, Gather):
            node = node.args[0].node
        elif len(own) == 1 and own[0].node is not node:
            node = own[0].node
        else:
            return None
    return node


def _is_maximum(view: View) -> bool:
    source = view.node
    while isinstance(source, Gather | Apply) and len(roots(source)) == 1:
        inner = source.args[0].node if isinstance(source, Gather) else roots(source)[0].node
        if inner is source:
            break
        source = inner
    return isinstance(source, SegmentMax)


@recognise("div")
def segment_softmax_of(interpreter: Any, top: Value, bottom: Value) -> Value | None:
    """exp(l − max[i]) / (Σ exp(l − max[i]))[i], if that is what this division is."""
    weights = top.node
    if not (isinstance(weights, Apply) and weights.params[0] == "exp" and weights.axes):
        return None
    total = _segment_sum(bottom.node)
    if total is None or total.args[0].node is not weights:
        return None
    ids, _, size = SEGMENTS.of(interpreter.graph)[total.params]
    view = weights.args[0]
    if isinstance(view.node, Sum):
        terms = [v for c, v in zip(view.node.params, view.node.args, strict=True) if not _is_maximum(v)]
        if len(terms) == 1:
            view = terms[0].within(view.bind)
    view, allowed = _unmasked(view, len(ids))
    if view.bind != tuple(range(len(weights.axes))):
        return None
    ids = np.where(allowed, ids, -1)
    key = (*total.params, hashlib.sha1(ids.tobytes()).hexdigest())
    SEGMENTS.put(interpreter.graph, key, Segments(ids, np.ones(len(ids)), size))
    own = grouped(segment_sizes(ids)[:, None], 2 * MOST_CLASSES)
    axes: tuple[Axis, ...] = (own, *weights.axes[1:])
    node = interpreter.graph.make(SegmentSoftmax, axes, [view], (key, False))
    return Value(node, top.dims)


def segment_sizes(ids: np.ndarray) -> np.ndarray:
    """How many share each position's segment; 0 for a position that is masked (index −1)."""
    kept = ids >= 0
    counts = np.bincount(ids[kept])
    return np.where(kept, counts[np.where(kept, ids, ids.max())], 0).astype(float)


def _unmasked(view: View, size: int) -> tuple[View, np.ndarray]:
    """The logits behind a choice between them and minus infinity, and where they are chosen."""
    node, bind = view
    allowed = np.ones(size, bool)
    while isinstance(node, Apply) and node.params[0] == "select_n" and len(node.args) == 3:
        mask, *cases = node.args
        dropped = [i for i, c in enumerate(cases) if isinstance(c.node, Constant) and c.node.params < MASKED]
        if not isinstance(mask.node, Array) or mask.bind != (0,) or len(dropped) != 1:
            break
        allowed &= np.asarray(mask.node.values).astype(int) != dropped[0]
        node, bind = cases[1 - dropped[0]].within(bind)
    return View(node, bind), allowed


@pairs_within_segments.register(SegmentSoftmax)
def pairs_within_segments_of_segment_softmax(node: SegmentSoftmax) -> Node:
    return node.graph.make(SegmentSoftmax, node.axes, node.args, (node.params[0], True))
