"""Softmax as a unit: its weights' moments (`softmax_weights`), its Jacobian diag(p) − ppᵀ backward.

flax inlines softmax, so the division exp(x − max) / Σ exp(x − max) is recognised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.axes import Axis, apply_axis, join, labelled
from varscale.theory.elementwise import Apply, Sum, roots, total
from varscale.theory.graph import Array, Constant, Node, View, array
from varscale.theory.interpreter import Interpreter
from varscale.theory.layout import Value
from varscale.theory.moments import Table, lift
from varscale.theory.quadrature import by_type
from varscale.theory.rules.reductions import Extreme, Mean
from varscale.theory.softmax_weights import WeightMoments, weight_moments

_MASKED = -1e4  # a logit below this is a mask, not a number
ROW_CLASSES = 6
_SHARED_DOUBT, _PLACED_DOUBT = 0.5, 1.5


class Softmax(Node):
    """Softmax over some axes of its logits; `params` is (axes, digest of the mask or None). Args: logits[, mask]."""

    how = "quadrature"
    shares = True

    def prepare(self) -> None:
        self.positive = True

    @property
    def gradient_doubt(self) -> float:
        """Cotangents of the weights are correlated with the logits through what the values share with the keys.

        Where tokens differ in known positions added to them, they share those too, and which are near each other.
        """
        return _PLACED_DOUBT if _placed(self.args[0].node, frozenset(self.axes[k].size for k in self.params)) else _SHARED_DOUBT

    def rows(self) -> list[int]:
        return [k for k in range(len(self.axes)) if k not in self.params]

    @functools.cached_property
    def deviation(self) -> np.ndarray:
        """Covariance of the logits' deviations along the keys: by type of the other axes, and by class of key."""
        out = np.broadcast_to(self.args[0].second(self.axes), [a.types for a in self.axes])
        for k in self.params:
            c = self.axes[k].classes
            same = np.take(out, range(c), axis=k)
            diagonal = [c + i * (c + 1) for i in range(c)]
            out = same - np.take(out, diagonal, axis=k)
        return out

    @functools.cached_property
    def mask(self) -> Table | None:
        """Moments of the mask over this node's axes (those it runs over)."""
        if len(self.args) < 2:
            return None
        view = self.args[1]
        assert isinstance(view.node, Array)
        return view.node.table_over([self.axes[b] for b in view.bind])

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray, list[Axis]]:
        """Keys a row can see, by class of the rows and of the keys; keys two rows share, by types of the rows; the key axes.

        The number of keys enters as 1/n, so that is what is averaged within a class.
        """
        masks = tuple((view.node.id, view.bind) for view in self.args[1:])
        return self.graph.once(("keys", masks, self.axes, self.params), self._counts)

    def _counts(self) -> tuple[np.ndarray, np.ndarray, list[Axis]]:
        keys = [self.axes[k] for k in self.params]
        number = np.ones([1] * len(self.rows()) + [a.classes for a in keys])
        for i, axis in enumerate(keys):
            shape = [1] * number.ndim
            shape[len(self.rows()) + i] = axis.classes
            number = number * axis.counts.reshape(shape)
        if self.mask is None:
            return number, number, keys
        view = self.args[1]
        frame = list(self.axes)
        mean = lift(self.mask.mean, self.mask.axes, view.bind, frame, pairs=False)
        second = lift(self.mask.second, self.mask.axes, view.bind, frame, pairs=True)
        order = [*self.rows(), *self.params]
        for k in self.params:
            if second.shape[k] > 1:
                second = np.take(second, range(frame[k].classes), axis=k)
        seen, shared = mean.transpose(order) * number, second.transpose(order) * number
        inverse = self._mean_inverse()
        all_keys = tuple(range(len(self.rows()), seen.ndim))
        scale = 1 / np.maximum(
            inverse * np.broadcast_to(seen, np.broadcast_shapes(seen.shape, inverse.shape)).sum(all_keys, keepdims=True), 1e-300
        )
        return seen * scale, shared, keys

    def _mean_inverse(self) -> np.ndarray:
        """E[1/n] by class of the rows, shape (rows..., 1...)."""
        node, bind = self.args[1]
        assert isinstance(node, Array)
        keys = tuple(k for k, b in enumerate(bind) if b in self.params)
        missing = math.prod(self.axes[b].size for b in self.params if b not in bind)
        inverse = 1 / np.maximum(node.values.sum(axis=keys) * missing, 1.0)
        left = [b for b in bind if b not in self.params]
        for i, b in enumerate(left):
            onehot = np.eye(self.axes[b].classes)[self.axes[b].label_array].T / self.axes[b].counts[:, None]
            inverse = apply_axis(inverse, i, onehot)
        shape = [1] * len(self.axes)
        for i, k in enumerate(self.rows()):
            if k in left:
                shape[i] = inverse.shape[sorted(left).index(k)]
        return inverse.transpose(np.argsort(np.argsort(left)) if inverse.ndim else ()).reshape(shape)

    @functools.cached_property
    def weights(self) -> WeightMoments:
        """Weight moments for each class of row, logit variances averaged over what the queries' norms do."""
        seen, _, _ = self.counts
        rows = self.rows()
        classes = [self.axes[k].classes for k in rows]
        own = self.deviation.transpose([*rows, *self.params])[tuple(slice(0, c) for c in classes)]
        variances = np.maximum(own.reshape(*classes, -1), 1e-12)
        counts = np.broadcast_to(seen.reshape(*seen.shape[: len(rows)], -1), variances.shape)
        spread = self._query_spread()
        nodes = np.array([1.0, 1 + spread, max(1 - spread, 0.05)]).reshape(3, *[1] * variances.ndim)
        # Rows see the same keys: where variances agree to three digits, one quadrature serves them all, and other layers too.
        members, variances = np.broadcast_to(_rounded(counts, 5), (3, *counts.shape)), _rounded(nodes * variances, 3)
        key = ("weights", members.shape, members.tobytes(), variances.tobytes())
        found = self.graph.once(key, lambda: weight_moments(members, variances))
        return WeightMoments(*(np.tensordot([2 / 3, 1 / 6, 1 / 6], x, axes=1) for x in found))

    def _query_spread(self) -> float:
        """√3 times the relative deviation of the logit variance between queries: their squared norm varies by 2/width."""
        for root in roots(self.args[0].node):
            width = getattr(root.node, "width", None)
            if width:
                return min(math.sqrt(6.0 / width), 0.95)
        return 0.0

    def read(self, by_class: np.ndarray, *, second: bool = False) -> np.ndarray:
        """An array by class of the rows (then anything), read at i (or j) of every type of the rows."""
        axes = [self.axes[k] for k in self.rows()]
        out = by_type(by_class, axes, second=second)
        return np.broadcast_to(out, (*[a.types for a in axes], *out.shape[len(axes) :]))

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Which types of the rows are a row with itself."""
        axes = [self.axes[k] for k in self.rows()]
        return functools.reduce(np.logical_and.outer, [np.arange(a.types) < a.classes for a in axes], np.array(True))

    @functools.cached_property
    def visible(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys a row sees, by its class; keys two rows share and the logits' deviation, by type; last axis: the key's class."""
        rows = self.rows()
        axes = [self.axes[k] for k in rows]
        seen, shared, keys = self.counts
        c = math.prod(a.classes for a in keys)
        seen = np.broadcast_to(seen.reshape(*seen.shape[: len(rows)], c), (*[a.classes for a in axes], c))
        shared = np.broadcast_to(shared.reshape(*shared.shape[: len(rows)], c), (*[a.types for a in axes], c))
        return seen, shared, self.deviation.transpose([*rows, *self.params]).reshape(*[a.types for a in axes], c)

    def compute(self) -> Table:
        rows = self.rows()
        seen, shared, deviation = self.visible
        keys = self.counts[2]
        c = seen.shape[-1]
        sizes = functools.reduce(np.multiply.outer, [a.counts for a in keys]).ravel()
        share = seen * self.weights.first  # Σ of E[p] over a class of keys
        share = share / share.sum(-1, keepdims=True)
        mean = share / sizes
        # A row with itself.
        n, diagonal = self.read(seen), np.eye(c, dtype=bool)
        square, pair = self.read(self.weights.square), self.read(self.weights.pair)
        same = n * square
        other = (n[..., :, None] * n[..., None, :] - diagonal * n[..., None]) * pair
        other *= ((1 - same.sum(-1)) / np.maximum(other.sum((-1, -2)), 1e-300))[..., None, None]
        # Two rows. The excess of one key's weights in both: exact for equal logits, lognormal in their covariance between.
        share_i, share_j = self.read(share), self.read(share, second=True)
        per_i, per_j = (s / np.maximum(m, 1e-300) for s, m in ((share_i, n), (share_j, self.read(seen, second=True))))
        variance = np.maximum(self.read(deviation[tuple(slice(0, self.axes[k].classes) for k in rows)]), 1e-12)
        whole = square / np.maximum(per_i**2, 1e-300) - 1
        excess = whole * np.expm1(np.clip(deviation, -variance, np.minimum(variance, 50))) / np.expm1(np.minimum(variance, 50))
        both = shared * per_i * per_j * (1 + excess)
        both = both * np.minimum(1.0, 1.0 / np.maximum(both.sum(-1, keepdims=True), 1e-300))
        apart = share_i[..., :, None] * share_j[..., None, :] - diagonal * both[..., None]
        own = self.own[..., None]
        same, other = np.where(own, same, both), np.where(own[..., None], other, apart)
        pairs = np.concatenate([sizes, (np.outer(sizes, sizes) - np.diag(sizes)).ravel()])
        second = np.concatenate([same, other.reshape(*other.shape[:-2], c * c)], axis=-1) / np.maximum(pairs, 1.0)
        if len(keys) > 1:
            mean, second = _unflatten(mean, second, keys, len(rows))
        order = np.argsort([*rows, *self.params])
        return Table(self.axes, mean.transpose(order), second.transpose(order))

    @functools.cached_property
    def tilt(self) -> np.ndarray:
        """What the weights gain along the logits' direction, τ = E[(Σ p l)²]/s² − Σ p², times the rows' correlation."""
        seen, _, deviation = self.visible
        by_rows = deviation.mean(-1)
        variance = np.maximum(by_rows[tuple(slice(0, self.axes[k].classes) for k in self.rows())], 1e-12)
        gain = np.maximum(self.weights.pull / variance - (seen * self.weights.square).sum(-1), 0.0)
        return self.read(gain) * np.clip(by_rows / self.read(variance), -1, 1)

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        """∂p_k/∂l_j = p_k(δ − p_j): a cotangent's part common to the keys is lost, the rest is weighted by p."""
        from varscale.theory.backward import sum_out

        keys = [self.axes[k] for k in self.params]
        axis = keys[0] if len(keys) == 1 else Axis(math.prod(a.size for a in keys))
        c = axis.classes
        g, p = (self._by_key(x) for x in (np.broadcast_to(cotangent, self.frame_types), self.table.second))
        diagonal = [c + i * (c + 1) for i in range(c)]
        deviation = np.maximum(g[..., :c] - g[..., diagonal], 0.0)
        square = self.weights.square
        keep = 1 - 2 * self.weights.cube / np.maximum(square, 1e-300) + (self.visible[0] * square).sum(-1, keepdims=True)
        same = deviation * p[..., :c] * np.where(self.own[..., None], np.clip(self.read(keep), 0, 1), 1.0)
        # The rows of the Jacobian sum to zero: what one key gains the others lose.
        rest = -same[..., :, None] * axis.counts / max(axis.size * (axis.size - 1), 1)
        out = np.concatenate([same, rest.reshape(*same.shape[:-1], c * c)], axis=-1)
        if len(keys) > 1:
            out = out[..., _joint_types(keys)]
        back = sum_out(out.transpose(np.argsort([*self.rows(), *self.params])), self.axes, self.args[0])
        return [back, *[None] * (len(self.args) - 1)]

    def _by_key(self, second: np.ndarray) -> np.ndarray:
        """A type array with the keys' axis last; several are one, of which a pair is the same or is not."""
        keys = [self.axes[k] for k in self.params]
        out = second.transpose([*self.rows(), *self.params])
        if len(keys) == 1:
            return out
        pairs = functools.reduce(np.multiply.outer, [a.pairs for a in keys])
        pairs = pairs * (_joint_types(keys) == 1)
        same = out[(..., *[0] * len(keys))]
        different = np.tensordot(out, pairs / pairs.sum(), axes=len(keys))
        return np.stack([same, different], axis=-1)


def _joint_types(keys: Sequence[Axis]) -> np.ndarray:
    """Of several axes of one class each, which types are the same on all of them (0) and which are not (1)."""
    types = np.ones([a.types for a in keys], int)
    types[(0,) * len(keys)] = 0
    return types


def _placed(node: Node, sizes: frozenset[int]) -> bool:
    """Whether known numbers that vary along an axis of one of these sizes were added to what a node was made from."""
    known: dict[int, bool] = node.graph.once(("placed", sizes), dict)
    pending = [node]
    while pending:
        top = pending[-1]
        before = [v.node for v in top.args if v.node.id not in known]
        if before:
            pending += before
            continue
        pending.pop()
        here = isinstance(top, Sum | Apply) and any(
            isinstance(v.node, Array) and len(v.bind) > 1 and sizes & {a.size for a in v.node.axes} for v in top.args
        )
        known[top.id] = here or any(known[v.node.id] for v in top.args)
    return known[node.id]


def _rounded(x: np.ndarray, digits: int) -> np.ndarray:
    """To so many significant digits."""
    unit = 10.0 ** (np.floor(np.log10(np.maximum(x, 1e-300))) + 1 - digits)
    return np.round(x / unit) * unit


def _unflatten(mean: np.ndarray, second: np.ndarray, keys: Sequence[Axis], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Several key axes computed as one: their joint types read on each axis (classes one each)."""
    return mean.reshape(*mean.shape[:rank], *[1] * len(keys)), second[..., _joint_types(keys)]


def softmax_of(interpreter: Interpreter, top: Value, bottom: Value) -> Value | None:
    """exp(x − max) / Σ exp(x − max), if that is what this division is."""
    num, den = top.node, bottom.node
    if not (isinstance(num, Apply) and num.params[0] == "exp" and isinstance(den, Apply) and den.params[0] == "affine"):
        return None
    mean = den.args[0].node
    if not (isinstance(mean, Mean) and mean.args[0].node is num):
        return None
    axes = mean.params
    if abs(den.params[1][0] - math.prod(num.axes[k].size for k in axes)) > 1e-6:
        return None
    random, allowed = _logits(num.args[0], num.axes)
    if random is None:
        return None
    # Keys over several axes have one class.
    frame = [Axis(a.size) if len(axes) > 1 and k in axes else a for k, a in enumerate(num.axes)]
    args = [random]
    if allowed is not None:
        frame = _row_classes(frame, allowed, axes)
        args.append(allowed)
    node = interpreter.graph.make(Softmax, frame, args, tuple(axes))
    return Value(node, top.dims)


def _row_classes(frame: list[Axis], allowed: View, axes: Sequence[int]) -> list[Axis]:
    """Rows that see different numbers of keys belong to different classes, evenly in the logarithm of that number."""
    mask, bind = allowed
    keys = tuple(k for k, b in enumerate(bind) if b in axes)
    classed = mask.graph.once(("row classes", mask.id, keys), lambda: _classes_by_keys(mask, keys))
    left = [b for b in bind if b not in axes]
    for b, axis in zip(left, classed, strict=True):
        frame[b] = join(axis, frame[b])
    return frame


def _classes_by_keys(mask: Node, keys: tuple[int, ...]) -> list[Axis]:
    """The axes of a mask besides those of the keys, classed by how many keys a position sees."""
    assert isinstance(mask, Array)
    level = np.log(np.maximum(mask.values.sum(axis=keys), 1.0))
    out = []
    for i, size in enumerate(level.shape):
        mean = level.mean(axis=tuple(j for j in range(level.ndim) if j != i))
        low, reach = mean.min(), float(np.ptp(mean))
        bins = (ROW_CLASSES * (mean - low) / max(reach, 0.01)).astype(int)
        out.append(labelled(np.minimum(bins, ROW_CLASSES - 1)) if reach > 0.01 else Axis(size))
    return out


def _logits(view: View, axes: Sequence[Axis]) -> tuple[View | None, View | None]:
    """The random logits and the mask (1 where a key is allowed) of the argument of the exponential."""
    masks: list[View] = []
    terms = _terms(view, masks)
    terms = [(c, v) for c, v in terms if not all(isinstance(r.node, Extreme) for r in roots(v.node)) and roots(v.node)]
    if not terms:
        return None, None
    graph = view.node.graph
    identity = tuple(range(len(axes)))
    node = total(graph, [c for c, _ in terms], tuple(axes), [v for _, v in terms])
    if isinstance(node, Constant):
        return None, None
    random = View(node, identity)
    if not masks:
        return random, None
    frame = sorted({b for m in masks for b in m.bind})

    def product() -> Node:
        out = np.ones([axes[b].size for b in frame])
        for m in masks:
            assert isinstance(m.node, Array)
            order = sorted(range(len(m.bind)), key=lambda k, b=m.bind: b[k])
            shape = [axes[b].size if b in m.bind else 1 for b in frame]
            out = out * m.node.values.transpose(order).reshape(shape)
        return array(graph, out)

    sizes = tuple(axes[b].size for b in frame)
    if len(masks) == 1 and masks[0].bind == tuple(frame):
        return random, masks[0]
    mask = graph.once(("mask", tuple((m.node.id, m.bind) for m in masks), sizes), product)
    return random, (None if isinstance(mask, Constant) else View(mask, tuple(frame)))


def _terms(view: View, masks: list[View]) -> list[tuple[float, View]]:
    node, bind = view
    graph = node.graph
    if isinstance(node, Sum):
        return [
            (c * d, t) for c, child in zip(node.params, node.args, strict=True) for d, t in _terms(child.within(bind), masks)
        ]
    if isinstance(node, Apply) and node.params[0] == "affine":
        return [(node.params[1][0] * c, t) for c, t in _terms(node.args[0].within(bind), masks)]
    if (
        isinstance(node, Apply)
        and node.params[0] == "select_n"
        and isinstance(node.args[0].node, Array)
        and len(node.args) == 3
    ):
        which, where = node.args[0]
        assert isinstance(which, Array)
        for keep, drop in ((1, 2), (2, 1)):
            other = node.args[drop].node
            if isinstance(other, Constant) and other.params < _MASKED:
                allowed = graph.once(("kept", which.params, keep), lambda k=keep: array(graph, which.values == k - 1))
                masks.append(View(allowed, tuple(bind[b] for b in where)))
                return _terms(node.args[keep].within(bind), masks)
    if isinstance(node, Array) and node.values.min() < _MASKED:
        allowed = graph.once(("above", node.params), lambda: array(graph, node.values > _MASKED))
        if isinstance(allowed, Array):
            masks.append(View(allowed, bind))
        return []
    return [(1.0, view)]
