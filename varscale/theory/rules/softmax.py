"""Softmax as a unit: its weights' moments (`integrals.softmax`), its Jacobian diag(p) − ppᵀ backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import LEADING_ORDER, LOOSE, NEXT_ORDER, Table, by_type, estimate, lift
from varscale.theory.graph.expressions import Apply, Sum
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact, once_per_node
from varscale.theory.integrals.softmax import (
    WeightMoments,
    apart,
    balance,
    in_common,
    weighed_in_both,
    weight_moments,
    where_weighed,
)
from varscale.theory.propagation.inherited_fluctuations import NONE, Spread, propagated
from varscale.theory.propagation.pullbacks import sum_out

# Variance of logits from where on the largest of them has all the weight, but for the reciprocal of its root.
_LARGEST = 1e4
_NO_LOGITS = 1e8  # what numbers that hide keys (−10⁹) give them, where it is not known which they hide
# Set on the validation grid, not derived, all of these.
_PLACED_DOUBT = 1.5  # of cotangents where weights and values share tokens, whose overlaps are not known


_KEYS: Fact[Hashable, tuple[np.ndarray, np.ndarray]] = Fact()  # by mask
_WEIGHTS: Fact[Hashable, WeightMoments] = Fact()


@functools.singledispatch
def key_directions(weights: Node) -> float:
    """Directions of the sphere on which a norm has put the tokens of the keys; infinite if they are as good as Gaussian."""
    return math.inf


@functools.singledispatch
def logit_scatter(weights: Node) -> float:
    """Relative variance, between queries, of the logits' variance; 0 of logits that are not made of tokens."""
    return 0.0


@functools.singledispatch
def gain_of_queries(
    weights: Node, notes: BackwardNotes, passed: np.ndarray, kept: np.ndarray
) -> float | None:
    """The part of the queries' cotangents that keys and values gain them by seeing the same tokens; None where not known."""
    return None


class Softmax(Node):
    """Softmax along an axis of its logits, the keys'; `params` is that axis. Args: logits[, mask[, rows]].

    Rows that the last is 0 for have equal logits: a mask has hidden all of them.
    """

    how = "quadrature"
    shares = True

    def prepare(self) -> None:
        self.positive = True

    @property
    def keys(self) -> Axis:
        """The axis along which the weights add up to 1."""
        return self.axes[self.params]

    def rows(self) -> list[int]:
        """Its axes but the keys': samples, heads and queries."""
        return [k for k in range(len(self.axes)) if k != self.params]

    @functools.cached_property
    def deviation(self) -> np.ndarray:
        """Covariance of the logits' deviations along the keys: by type of the rows, and by class of key."""
        second = self.args[0].second(self.axes)
        for node, bind in self.args[2:]:
            assert isinstance(node, Array)
            seeing = node.over([self.axes[b] for b in bind]).table
            second = second * lift(seeing.second, seeing.axes, bind, self.axes, pairs=True)
        return apart(self.by_key(np.broadcast_to(second, self.frame_types)), self.shared)

    @functools.cached_property
    def mask(self) -> Table | None:
        """Moments of the mask over this node's axes (those it runs over)."""
        if len(self.args) < 2:
            return None
        view = self.args[1]
        assert isinstance(view.node, Array)
        return view.node.over([self.axes[b] for b in view.bind]).table

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys a row can see, by class of the rows and of the keys; keys two rows share, by type of the rows and class.

        The number of keys enters as 1/n, so that is what is averaged within a class.
        """
        masks = tuple((view.node.id, view.bind) for view in self.args[1:])
        return _KEYS.once(self.graph, (masks, self.axes, self.params), functools.partial(_counts, self))

    @functools.cached_property
    def weights(self) -> WeightMoments:
        """Weight moments for each class of row, averaged over the variances that queries of different norms give the logits.

        They are normal to leading order, and averages over them by the three-point Gauss-Hermite rule, weights 2/3, 1/6, 1/6.
        """
        own = tuple(slice(0, self.axes[k].classes) for k in self.rows())
        variances = np.clip(self.deviation[own], 1e-12, _LARGEST)
        counts = np.broadcast_to(self.seen, variances.shape)
        # Gauss and Hermite's step: √3 relative deviations of the logits' variance between queries.
        spread = min(math.sqrt(3.0 * logit_scatter(self)), 0.95)
        nodes = np.array([1.0, 1 + spread, max(1 - spread, 0.05)]).reshape(3, *[1] * variances.ndim)
        # Rows see the same keys: where variances agree to three digits, one quadrature serves them all, and
        # other layers too.
        members, variances = (
            np.broadcast_to(_rounded(counts, 5), (3, *counts.shape)),
            _rounded(nodes * variances, 3),
        )
        directions = float(_rounded(np.array(self.directions), 2)) if self.directions < 1e4 else math.inf
        key = ("weights", members.shape, members.tobytes(), variances.tobytes(), directions)
        found = _WEIGHTS.once(self.graph, key, lambda: weight_moments(members, variances, directions))
        # Of what goes with the logits' variance only its ratio to that is used, query by query.
        found = found._replace(pull=found.pull / nodes[..., 0], own_pull=found.own_pull / nodes[..., 0])
        return WeightMoments(*(np.tensordot([2 / 3, 1 / 6, 1 / 6], x, axes=1) for x in found))

    @functools.cached_property
    def directions(self) -> float:
        """Of the sphere that the tokens lie on which keys are projections of; infinite where they are as good as Gaussian."""
        return key_directions(self)

    def read(self, by_class: np.ndarray, *, second: bool = False) -> np.ndarray:
        """An array by class of the rows (then anything), read at i (or j) of every type of the rows."""
        axes = [self.axes[k] for k in self.rows()]
        out = by_type(by_class, axes, second=second)
        return np.broadcast_to(out, (*[a.types for a in axes], *out.shape[len(axes) :]))

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Which types of the rows are a row with itself."""
        axes = [self.axes[k] for k in self.rows()]
        return functools.reduce(np.logical_and.outer, [a.agrees for a in axes], np.array(True))

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """Keys that a row sees: by its class, and by the class of key."""
        return np.broadcast_to(
            self.counts[0], (*(self.axes[k].classes for k in self.rows()), self.keys.classes)
        )

    @functools.cached_property
    def shared(self) -> np.ndarray:
        """Keys that two rows share: by their type, and by the class of key."""
        return np.broadcast_to(
            self.counts[1], (*(self.axes[k].types for k in self.rows()), self.keys.classes)
        )

    @functools.cached_property
    def tilt(self) -> np.ndarray:
        """What the weights gain along the logits' direction, τ = E[(Σ p l)²]/s² − Σ p², times the rows' correlation.

        On a sphere what is left across a direction falls with what is along it: there Σ p² l²/s² is in place of Σ p².
        """
        by_rows = self.deviation.mean(-1)
        variance = np.maximum(by_rows[tuple(slice(0, self.axes[k].classes) for k in self.rows())], 1e-12)
        square = (self.seen * self.weights.square).sum(-1)
        across = square if self.directions == math.inf else self.weights.own_pull / variance
        gain = np.maximum(self.weights.pull / variance - across, 0.0)
        return self.read(gain) * np.clip(by_rows / self.read(variance), -1, 1)

    def by_key(self, second: np.ndarray) -> np.ndarray:
        """A type array with the keys' axis last."""
        return np.moveaxis(second, self.params, -1)


def _counts(node: Softmax) -> tuple[np.ndarray, np.ndarray]:
    number = node.keys.counts.reshape([1] * len(node.rows()) + [-1])
    if node.mask is None:
        return number, number
    bind, frame = node.args[1].bind, list(node.axes)
    mean = node.by_key(lift(node.mask.mean, node.mask.axes, bind, frame, pairs=False))
    second = node.by_key(lift(node.mask.second, node.mask.axes, bind, frame, pairs=True))
    seen, shared = mean * number, second[..., : node.keys.classes] * number
    inverse = _mean_inverse(node)
    whole = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, inverse.shape)).sum(-1, keepdims=True)
    return seen / np.maximum(inverse * whole, 1e-300), shared


def _mean_inverse(node: Softmax) -> np.ndarray:
    """E[1/n] by class of the rows, shape (rows..., 1)."""
    mask, bind = node.args[1]
    assert isinstance(mask, Array)
    keys = tuple(k for k, b in enumerate(bind) if b == node.params)
    seen = mask.values.sum(axis=keys) * (1 if keys else node.keys.size)
    left = [b for b in bind if b != node.params]
    inverse = estimate(1 / np.maximum(seen, 1.0), [node.axes[b] for b in left])
    return node.by_key(lift(inverse.mean, inverse.axes, left, node.axes, pairs=False))


@second_moments.register(Softmax)
def second_moments_of_softmax(node: Softmax) -> Table:
    if node.deviation.max() > _NO_LOGITS:
        node.graph.flag("assumed", UNKNOWN)
    rows = node.rows()
    seen, shared, deviation = node.seen, node.shared, node.deviation
    c, sizes = node.keys.classes, node.keys.counts
    share = seen * node.weights.first  # Σ of E[p] over a class of keys
    share = share / share.sum(-1, keepdims=True)
    mean = share / sizes
    # A row with itself.
    n, diagonal = node.read(seen), np.eye(c, dtype=bool)
    square, pair = node.read(node.weights.square), node.read(node.weights.pair)
    same = n * square
    other = (n[..., :, None] * n[..., None, :] - diagonal * n[..., None]) * pair
    other *= ((1 - same.sum(-1)) / np.maximum(other.sum((-1, -2)), 1e-300))[..., None, None]
    # Two rows. The excess of one key's weights in both: exact for equal logits, lognormal in their covariance
    # between.
    share_i, share_j = node.read(share), node.read(share, second=True)
    per_i, per_j = (
        s / np.maximum(m, 1e-300) for s, m in ((share_i, n), (share_j, node.read(seen, second=True)))
    )
    variance = np.maximum(node.read(deviation[tuple(slice(0, node.axes[k].classes) for k in rows)]), 1e-12)
    whole = np.where(n > 0, square / np.maximum(per_i**2, 1e-300) - 1, 0.0)
    excess = (
        whole
        * np.expm1(np.clip(deviation, -variance, np.minimum(variance, 50)))
        / np.expm1(np.minimum(variance, 50))
    )
    both = shared * per_i * per_j * (1 + excess)
    both = both * np.minimum(1.0, 1.0 / np.maximum(both.sum(-1, keepdims=True), 1e-300))
    apart = share_i[..., :, None] * share_j[..., None, :] - diagonal * both[..., None]
    own = node.own[..., None]
    same, other = np.where(own, same, both), np.where(own[..., None], other, apart)
    pairs = np.concatenate([sizes, (np.outer(sizes, sizes) - np.diag(sizes)).ravel()])
    second = np.concatenate([same, other.reshape(*other.shape[:-2], c * c)], axis=-1) / np.maximum(pairs, 1.0)
    return Table(node.axes, *(np.moveaxis(x, -1, node.params) for x in (mean, second)))


@pullback.register(Softmax)
def pullback_of_softmax(
    node: Softmax, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """∂p_k/∂l_j = p_k(δ − p_j): a cotangent's part common to the keys is lost, the rest is weighted by p."""
    axis, c = node.keys, node.keys.classes
    g, p = (node.by_key(x) for x in (np.broadcast_to(cotangent, node.frame_types), node.table.second))
    square = node.weights.square
    keep = (
        1 - 2 * node.weights.cube / np.maximum(square, 1e-300) + (node.seen * square).sum(-1, keepdims=True)
    )
    overlap = (p[..., :c] * axis.counts).sum(-1, keepdims=True)
    each = apart(g, node.shared)
    mean = np.broadcast_to(node.by_key(node.table.mean), node.seen.shape)
    ahead, behind = node.read(mean), node.read(mean, second=True)
    common = in_common(g, ahead * axis.counts, behind * axis.counts)
    within = np.clip(np.diagonal(common, axis1=-2, axis2=-1) * (axis.counts > 1), 0, np.maximum(each, 0))
    passed = (each - within) * p[..., :c]
    whole = (passed * axis.counts).sum(-1)[..., None, None]
    lost = whole * ahead[..., :, None] * behind[..., None, :]
    lost = lost - passed[..., :, None] * behind[..., None, :] - ahead[..., :, None] * passed[..., None, :]
    variance = node.read(node.deviation[tuple(slice(0, node.axes[k].classes) for k in node.rows())])
    correlation = node.deviation / np.maximum(variance, 1e-12)
    # E[p_ik² p_jk]/E[p_ik p_jk], and the same of the other row.
    apart_of, one = where_weighed(node.weights)
    shares = [
        weighed_in_both(node.read(apart_of, second=j), node.read(one, second=j), correlation)
        for j in (False, True)
    ]
    keep = np.where(node.own[..., None], node.read(keep), 1 - (shares[0] + shares[1]) + overlap)
    same = (
        np.where(node.own[..., None], np.maximum(passed, 0.0), passed) * np.clip(keep, 0, 1)
        + within * p[..., :c]
    )
    lost = lost + common * p[..., c:].reshape(common.shape)
    share = gain_of_queries(node, notes, (each * ahead * axis.counts).sum(-1), (same * axis.counts).sum(-1))
    notes.doubts[node.id] = _doubt(node, share)
    lost = lost + balance(same, lost, ahead, axis)
    out = np.concatenate([same, lost.reshape(*same.shape[:-1], c * c)], axis=-1)
    back = sum_out(np.moveaxis(out, -1, node.params), node.axes, node.args[0])
    return [back, *[None] * (len(node.args) - 1)]


def _doubt(node: Softmax, share: float | None) -> float:
    """Doubt of the queries' and keys' cotangents, of which a part is due to overlaps, known to leading order.

    Where tokens differ in known positions added to them, they share those too, and which are near each other.
    """
    if _adds_known_along(node.args[0].node, node.keys.size):
        return _PLACED_DOUBT
    if share is None:
        return LOOSE
    classed = any(axis.classes > 1 for axis in node.axes)
    return LOOSE * share + (LEADING_ORDER if classed else NEXT_ORDER)


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
