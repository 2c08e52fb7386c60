"""Softmax as a unit: its weights' moments (`integrals.softmax`), its Jacobian diag(p) − ppᵀ backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

import numpy as np

from varscale.theory.domain.axes import Axis, outer
from varscale.theory.domain.tables import LEADING_ORDER, LOOSE, NEXT_ORDER, Table, by_type, estimate, lift
from varscale.theory.graph.expressions import Apply, Sum
from varscale.theory.graph.nodes import UNKNOWN, Array, Constant, Node, View, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact, once_per_node
from varscale.theory.integrals.softmax import (
    WeightMoments,
    apart,
    balance,
    in_common,
    weighed_in_both,
    weight_moments,
)
from varscale.theory.propagation.inherited_fluctuations import NONE, Spread, propagated
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.attention import gain_of_queries, key_directions, logit_scatter

# Variance of logits from where on the largest of them has all the weight, but for the reciprocal of its root.
_LARGEST = 1e4
_NO_LOGITS = 1e8  # what numbers that hide keys (−10⁹) give them, where it is not known which they hide
# Set on the validation grid, not derived, all of these.
_PLACED_DOUBT = 1.5  # of cotangents where weights and values share tokens, whose overlaps are not known


_WEIGHTS: Fact[Hashable, WeightMoments] = Fact()


class Softmax(Node):
    """Softmax along an axis of its logits, the keys'; `params` is that axis. Args: logits[, mask[, rows]].

    Rows that the last is 0 for have equal logits: a mask has hidden all of them.

    Attributes:
        keys: the axis along which the weights add up to 1.
        rows: its other axes: samples, heads and queries.
        directions: of the sphere that the tokens lie on which keys are projections of (`key_directions`).
    """

    how = "quadrature"
    shares = True
    directions = functools.cached_property(key_directions)

    def prepare(self) -> None:
        self.positive, self.keys = True, self.axes[self.params]
        self.rows = [k for k in range(len(self.axes)) if k != self.params]

    @functools.cached_property
    def deviation(self) -> np.ndarray:
        """Covariance of the logits' deviations along the keys: by type of the rows, and by class of key."""
        second = self.args[0].second(self.axes)
        for node, bind in self.args[2:]:
            assert isinstance(node, Array)
            second = second * View(node.over([self.axes[b] for b in bind]), bind).second(self.axes)
        return apart(self.by_key(np.broadcast_to(second, self.frame_types)), self.shared)

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """Keys that a row sees: by its class, and by the class of key."""
        return np.broadcast_to(self._counts[0], [self.axes[k].classes for k in (*self.rows, self.params)])

    @functools.cached_property
    def shared(self) -> np.ndarray:
        """Keys that two rows share: by their type, and by the class of key."""
        return np.broadcast_to(self._counts[1], [*(self.axes[k].types for k in self.rows), self.keys.classes])

    @property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        masks = [view for view in self.args[1:2] if not isinstance(view.node, Constant)]
        return _keys_seen(*masks[0], self.axes, self.params) if masks else (self.keys.counts,) * 2

    @functools.cached_property
    def weights(self) -> WeightMoments:
        """Weight moments for each class of row, averaged over the variances that queries of different norms give the logits.

        They are normal to leading order, and averages over them by the three-point Gauss-Hermite rule, weights 2/3, 1/6, 1/6.
        """
        variances = np.clip(self.of_one(self.deviation), 1e-12, _LARGEST)
        # Gauss and Hermite's step: √3 relative deviations of the logits' variance between queries.
        spread = min(math.sqrt(3.0 * logit_scatter(self)), 0.95)
        nodes = np.array([1.0, 1 + spread, max(1 - spread, 0.05)]).reshape(3, *[1] * variances.ndim)
        # Rows see the same keys: where variances agree to three digits, one quadrature serves them all, and
        # other layers too.
        members = np.broadcast_to(_rounded(self.seen, 5), (3, *self.seen.shape))
        variances = _rounded(nodes * variances, 3)
        directions = float(_rounded(np.array(self.directions), 2)) if self.directions < 1e4 else math.inf
        key = (members.shape, members.tobytes(), variances.tobytes(), directions)
        found = _WEIGHTS.once(self.graph, key, lambda: weight_moments(members, variances, directions))
        # Of what goes with the logits' variance only its ratio to that is used, query by query.
        found = found._replace(pull=found.pull / nodes[..., 0], own_pull=found.own_pull / nodes[..., 0])
        return WeightMoments(*(np.tensordot([2 / 3, 1 / 6, 1 / 6], x, axes=1) for x in found))

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Which types of the rows are a row with itself."""
        return outer(self.axes[k].agrees for k in self.rows) > 0

    @functools.cached_property
    def tilt(self) -> np.ndarray:
        """What the weights gain along the logits' direction, τ = E[(Σ p l)²]/s² − Σ p², times the rows' correlation.

        On a sphere what is left across a direction falls with what is along it: there Σ p² l²/s² is in place of Σ p².
        """
        by_rows = self.deviation.mean(-1)
        variance = np.maximum(self.of_one(by_rows), 1e-12)
        square = (self.seen * self.weights.square).sum(-1)
        across = square if self.directions == math.inf else self.weights.own_pull / variance
        gain = np.maximum(self.weights.pull / variance - across, 0.0)
        return self.read(gain) * np.clip(by_rows / self.read(variance), -1, 1)

    def read(self, by_class: np.ndarray, *, second: bool = False) -> np.ndarray:
        """An array by class of the rows (then anything), read at i (or j) of every type of the rows."""
        axes = [self.axes[k] for k in self.rows]
        out = by_type(by_class, axes, second=second)
        return np.broadcast_to(out, (*[a.types for a in axes], *out.shape[len(axes) :]))

    def of_one(self, by_types: np.ndarray) -> np.ndarray:
        """An array by type of the rows (then anything), of a row with itself: by its class."""
        return by_types[tuple(slice(0, self.axes[k].classes) for k in self.rows)]

    def by_key(self, second: np.ndarray) -> np.ndarray:
        """A type array with the keys' axis last."""
        return np.moveaxis(second, self.params, -1)


@once_per_node
def _keys_seen(
    mask: Array, bind: tuple[int, ...], axes: tuple[Axis, ...], key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys that a row sees, by class of the rows and of the keys; keys that two rows share, by type of the rows and class.

    The number of keys enters as 1/n, so that is what is averaged within a class.
    """
    left, across = [b for b in bind if b != key], tuple(k for k, b in enumerate(bind) if b == key)
    members = mask.values.sum(axis=across) * (1 if across else axes[key].size)
    inverse = estimate(1 / np.maximum(members, 1.0), [axes[b] for b in left])
    finer, number = View(mask.over([axes[b] for b in bind]), bind), axes[key].counts
    once = np.moveaxis(lift(inverse.mean, inverse.axes, left, axes, pairs=False), key, -1)
    seen = np.moveaxis(finer.mean(axes), key, -1) * number
    whole = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, once.shape)).sum(-1, keepdims=True)
    shared = np.moveaxis(finer.second(axes), key, -1)[..., : len(number)] * number
    return seen / np.maximum(once * whole, 1e-300), shared


@second_moments.register(Softmax)
def second_moments_of_softmax(node: Softmax) -> Table:
    if node.deviation.max() > _NO_LOGITS:
        node.graph.flag("assumed", UNKNOWN)
    seen, weights, deviation = node.seen, node.weights, node.deviation
    c, sizes = node.keys.classes, node.keys.counts
    share = seen * weights.first  # Σ of E[p] over a class of keys
    share = share / share.sum(-1, keepdims=True)
    # A row with itself.
    n, diagonal, square = node.read(seen), np.eye(c, dtype=bool), node.read(weights.square)
    same = n * square
    other = (n[..., :, None] * n[..., None, :] - diagonal * n[..., None]) * node.read(weights.pair)
    other *= ((1 - same.sum(-1)) / np.maximum(other.sum((-1, -2)), 1e-300))[..., None, None]
    # Two rows. The excess of one key's weights in both: exact for equal logits, lognormal in their covariance
    # between.
    shares = [node.read(share), node.read(share, second=True)]
    ahead, behind = (
        shares[0] / np.maximum(n, 1e-300),
        node.read(share / np.maximum(seen, 1e-300), second=True),
    )
    variance = np.maximum(node.read(node.of_one(deviation)), 1e-12)
    most = np.minimum(variance, 50)
    excess = np.where(n > 0, square / np.maximum(ahead**2, 1e-300) - 1, 0.0)
    excess = excess * np.expm1(np.clip(deviation, -variance, most)) / np.expm1(most)
    both = node.shared * ahead * behind * (1 + excess)
    both = both * np.minimum(1.0, 1.0 / np.maximum(both.sum(-1, keepdims=True), 1e-300))
    unlike = shares[0][..., :, None] * shares[1][..., None, :] - diagonal * both[..., None]
    own = node.own[..., None]
    same, other = np.where(own, same, both), np.where(own[..., None], other, unlike)
    second = np.concatenate([same, other.reshape(*other.shape[:-2], c * c)], axis=-1)
    second = second / np.maximum(node.keys.pairs, 1.0)
    return Table(node.axes, *(np.moveaxis(x, -1, node.params) for x in (share / sizes, second)))


@pullback.register(Softmax)
def pullback_of_softmax(
    node: Softmax, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """∂p_k/∂l_j = p_k(δ − p_j): a cotangent's part common to the keys is lost, the rest is weighted by p."""
    axis, c, own, weights = node.keys, node.keys.classes, node.own[..., None], node.weights
    g, p = (node.by_key(x) for x in (np.broadcast_to(cotangent, node.frame_types), node.table.second))
    keep = 1 - 2 * weights.cube / np.maximum(weights.square, 1e-300)
    keep = node.read(keep + (node.seen * weights.square).sum(-1, keepdims=True))
    overlap = (p[..., :c] * axis.counts).sum(-1, keepdims=True)
    each = apart(g, node.shared)
    mean = np.broadcast_to(node.by_key(node.table.mean), node.seen.shape)
    ahead, behind = node.read(mean), node.read(mean, second=True)
    common = in_common(g, ahead * axis.counts, behind * axis.counts)
    within = np.clip(np.diagonal(common, axis1=-2, axis2=-1) * (axis.counts > 1), 0, np.maximum(each, 0))
    passed = (each - within) * p[..., :c]
    lost = (passed * axis.counts).sum(-1)[..., None, None] * ahead[..., :, None] * behind[..., None, :]
    lost = lost - passed[..., :, None] * behind[..., None, :] - ahead[..., :, None] * passed[..., None, :]
    lost = lost + common * p[..., c:].reshape(common.shape)
    correlation = node.deviation / np.maximum(node.read(node.of_one(node.deviation)), 1e-12)
    # E[p_ik² p_jk]/E[p_ik p_jk], and the same of the other row.
    # Of one key: its share where another row weighs it that has nothing, or all, in common.
    first, square, cube = (np.maximum(x, 1e-300) for x in weights[:3])
    unlike, alike = square / first, cube / square
    weighed = sum(
        weighed_in_both(node.read(unlike, second=j), node.read(alike, second=j), correlation)
        for j in (False, True)
    )
    keep = np.clip(np.where(own, keep, 1 - weighed + overlap), 0, 1)
    same = np.where(own, np.maximum(passed, 0.0), passed) * keep + within * p[..., :c]
    share = gain_of_queries(node, notes, (each * ahead * axis.counts).sum(-1), (same * axis.counts).sum(-1))
    # Of the queries' and keys' cotangents a part is due to overlaps, known to leading order. Where tokens
    # differ in known positions added to them, they share those too, and which are near each other.
    next_one = LEADING_ORDER if any(a.classes > 1 for a in node.axes) else NEXT_ORDER
    doubt = LOOSE if share is None else LOOSE * share + next_one
    placed = _adds_known_along(node.args[0].node, axis.size)
    notes.doubts[node.id] = _PLACED_DOUBT if placed else doubt
    lost = lost + balance(same, lost, ahead, axis)
    out = np.concatenate([same, lost.reshape(*same.shape[:-1], c * c)], axis=-1)
    back = sum_out(np.moveaxis(out, -1, node.params), node.axes, node.args[0])
    return [back, *[None] * (len(node.args) - 1)]


@propagated.register(Softmax)
def propagated_of_softmax(node: Softmax) -> Spread:
    """Shares add up to 1 whatever the scale of the logits."""
    return NONE


@once_per_node
def _adds_known_along(node: Node, size: int) -> bool:
    """Whether known numbers that vary along an axis of this size were added to what a node was made from."""
    here = isinstance(node, Sum | Apply) and any(
        isinstance(v.node, Array) and len(v.bind) > 1 and size in [a.size for a in v.node.axes]
        for v in node.args
    )
    return here or any(_adds_known_along(v.node, size) for v in node.args)


def _rounded(x: np.ndarray, digits: int) -> np.ndarray:
    """To so many significant digits."""
    unit = 10.0 ** (np.floor(np.log10(np.maximum(x, 1e-300))) + 1 - digits)
    return np.round(x / unit) * unit
