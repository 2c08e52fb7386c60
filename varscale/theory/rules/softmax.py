"""Softmax as a unit, recognised in what flax inlines, exp(x − max) / Σ exp(x − max); and log Σ exp."""

import math
from collections.abc import Hashable
from functools import cached_property

import numpy as np
from scipy import special

from varscale.theory.domain.axes import equal, outer, rest
from varscale.theory.domain.tables import LEADING_ORDER, LOOSE, NEGLIGIBLE, NEXT_ORDER, Table, by_type
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots, weighted_sum
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import affine, total
from varscale.theory.graph.store import BackwardNotes, Fact, Flows, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.integrals.softmax import WeightMoments, apart, balance, in_common, weight_moments
from varscale.theory.propagation.inherited_fluctuations import NONE, propagated
from varscale.theory.propagation.marginals import along, fluctuating, marginal
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.rules.attention import gain_of_queries, key_directions, logit_scatter
from varscale.theory.rules.elementwise import Extreme, OneOfMany, cross_by_kind_of_one_of_many
from varscale.theory.rules.lookup import padded
from varscale.theory.rules.masks import keys_apart, keys_seen, logits, row_classes, rows_filled
from varscale.theory.rules.registry import Context, recognise

_LARGEST = 1e4  # variance of logits s² from where on the largest of them has all the weight but 1/s
_NO_LOGITS = 1e8  # what numbers that hide keys (−10⁹) give them, where it is not known which they hide
_PLACED_DOUBT = 1.5  # of cotangents where weights and values share tokens whose overlaps are not known; set

_NOT_GAUSSIAN = "a softmax of logits that are not Gaussian"

_WEIGHTS: Fact[Hashable, WeightMoments] = Fact()
_WINDOWS: Fact[None, bool] = Fact()  # whether a mask's rows share more keys with those near them


class Softmax(Node):
    """Softmax along an axis `params` of its logits, the keys'. Args: logits[, mask[, rows]].

    Rows that the last is 0 for have equal logits: a mask has hidden all of them. The other axes, `row_axes` at the places
    `rows`, are samples, heads and queries. By class of key, a row sees so many keys (`seen`, by its class), and two rows share
    so many (`shared`, by their type); `own` is 1 of a row with itself.
    """

    how = "quadrature"
    shares = True
    directions = cached_property(key_directions)

    def prepare(self) -> None:
        self.positive, self.keys = True, self.axes[self.params]
        self.rows = rest(self.axes, [self.params])
        self.row_axes, number = tuple(self.axes[k] for k in self.rows), self.keys.counts
        self.own = outer(a.agrees for a in self.row_axes)
        masks = [view for view in self.args[1:2] if isinstance(view.node, Array)]
        seen, shared = keys_seen(*masks[0], self.axes, self.params) if masks else (number, number)
        self.seen = np.broadcast_to(seen, [*(a.classes for a in self.row_axes), len(number)])
        self.shared = np.broadcast_to(shared, [*(a.types for a in self.row_axes), len(number)])

    @cached_property
    def deviation(self) -> np.ndarray:
        """Covariance of the logits' deviations along the keys: by type of the rows, and by class of key."""
        second = np.broadcast_to(self.args[0].second(self.axes), self.frame_types)
        for node, bind in self.args[2:]:
            assert isinstance(node, Array)
            second = second * View(node.over([self.axes[b] for b in bind]), bind).second(self.axes)
        return apart(np.moveaxis(second, self.params, -1), self.shared)

    @cached_property
    def variance(self) -> np.ndarray:
        """The same of a row with itself: by its class."""
        return np.maximum(self.of_one(self.deviation), 1e-12)

    @cached_property
    def weights(self) -> WeightMoments:
        """Weight moments by class of row, averaged over queries' variances of logits by a three-point Gauss-Hermite rule."""
        spread = min(math.sqrt(3.0 * logit_scatter(self)), 0.95)
        nodes = np.array([1.0, 1 + spread, max(1 - spread, 0.05)]).reshape(3, *[1] * self.variance.ndim)
        # Where variances agree to three digits, one quadrature serves all rows, and other layers too.
        members = np.broadcast_to(_rounded(self.seen, 5), (3, *self.seen.shape))
        variances = _rounded(nodes * np.minimum(self.variance, _LARGEST), 3)
        directions = float(_rounded(np.array(self.directions), 2)) if self.directions < 1e4 else math.inf
        key = (members.shape, members.tobytes(), variances.tobytes(), directions)
        found = _WEIGHTS.once(self.graph, key, lambda: weight_moments(members, variances, directions))
        # What goes with the logits' variance is used as its ratio to that.
        found = found._replace(pull=found.pull / nodes[..., 0], own_pull=found.own_pull / nodes[..., 0])
        return WeightMoments(*(np.tensordot([2 / 3, 1 / 6, 1 / 6], x, axes=1) for x in found))

    @cached_property
    def tilt(self) -> np.ndarray:
        """Weights' gain along the logits, E[(Σ p l)²]/s² − Σ p² (on a sphere − Σ p² l²/s²), times the rows' correlation."""
        by_rows, weights = self.deviation.mean(-1), self.weights
        variance = np.maximum(self.of_one(by_rows), 1e-12)
        normal = self.directions == math.inf
        across = (self.seen * weights.square).sum(-1) if normal else weights.own_pull / variance
        gain = np.maximum(weights.pull / variance - across, 0.0)
        return self.read(gain) * np.clip(by_rows / self.read(variance), -1, 1)

    def read(self, by_class: np.ndarray, *, second: bool = False) -> np.ndarray:
        """An array by class of the rows (then anything), read at i (or j) of every type of the rows."""
        out = by_type(by_class, self.row_axes, second=second)
        return np.broadcast_to(out, (*(a.types for a in self.row_axes), *out.shape[len(self.rows) :]))

    def of_one(self, by_types: np.ndarray) -> np.ndarray:
        """An array by type of the rows (then anything), of a row with itself: by its class."""
        return by_types[equal(self.row_axes)]


@second_moments.register
def second_moments_of_softmax(node: Softmax) -> Table:
    if node.deviation.max() > _NO_LOGITS:
        node.graph.flag("assumed", UNKNOWN)
    seen, weights, c, read = node.seen, node.weights, node.keys.classes, node.read
    share = seen * weights.first  # Σ of E[p] over a class of keys
    share = share / share.sum(-1, keepdims=True)
    # A row with itself.
    n, diagonal, square = read(seen), np.eye(c, dtype=bool), read(weights.square)
    same = n * square
    other = (n[..., :, None] * n[..., None, :] - diagonal * n[..., None]) * read(weights.pair)
    other *= ((1 - same.sum(-1)) / np.maximum(other.sum((-1, -2)), 1e-300))[..., None, None]
    # Two rows. The excess of one key's weights in both: exact for equal logits, lognormal between.
    each = share / np.maximum(seen, 1e-300)
    (shares, ahead), (others, behind) = ([read(x, second=j) for x in (share, each)] for j in (False, True))
    variance = read(node.variance)
    most = np.minimum(variance, 50)
    excess = np.where(n > 0, square / np.maximum(ahead**2, 1e-300) - 1, 0.0)
    excess = excess * np.expm1(np.clip(node.deviation, -variance, most)) / np.expm1(most)
    both = node.shared * ahead * behind * (1 + excess)
    both = both * np.minimum(1.0, 1.0 / np.maximum(both.sum(-1, keepdims=True), 1e-300))
    unlike = shares[..., :, None] * others[..., None, :] - diagonal * both[..., None]
    own = node.own[..., None] > 0
    same, other = np.where(own, same, both), np.where(own[..., None], other, unlike)
    second = np.concatenate([same, other.reshape(*other.shape[:-2], c * c)], axis=-1)
    second = second / np.maximum(node.keys.pairs, 1.0)
    return Table(node.axes, *(np.moveaxis(x, -1, node.params) for x in (share / node.keys.counts, second)))


@pullback.register
def pullback_of_softmax(node: Softmax, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """∂p_k/∂l_j = p_k(δ − p_j): a cotangent's part common to the keys is lost, the rest is weighted by p."""
    c, counts, weights, read = node.keys.classes, node.keys.counts, node.weights, node.read
    tables = np.broadcast_to(cotangent, node.frame_types), node.table.second, node.table.mean
    g, p, mean = (np.moveaxis(x, node.params, -1) for x in tables)
    mean, own = np.broadcast_to(mean, node.seen.shape), node.own[..., None] > 0
    large = weights.cube / np.maximum(weights.square, 1e-300)
    squares = (node.seen * weights.square).sum(-1, keepdims=True)
    kept = 1 - 2 * large + squares
    keep = read(kept)
    each = apart(g, node.shared)
    ahead, behind = (read(mean, second=j) for j in (False, True))
    common = in_common(g, ahead * counts, behind * counts)
    within = np.clip(np.diagonal(common, axis1=-2, axis2=-1) * (counts > 1), 0, np.maximum(each, 0))
    passed = (each - within) * p[..., :c]
    one, two = ahead[..., :, None], behind[..., None, :]
    lost = (passed * counts).sum(-1)[..., None, None] * one * two
    lost = lost - passed[..., :, None] * two - one * passed[..., None, :]
    lost = lost + common * p[..., c:].reshape(common.shape)
    # E[p_ik² p_jk]/E[p_ik p_jk] and its like = e^{(3/2 + ρ) s²} E[p] of lognormal weights, between that of
    # independent rows, a key's share, and that of one row.
    first, square, cube = (np.maximum(x, 1e-300) for x in weights[:3])
    unlike, alike = square / first, cube / square
    rho = np.clip(node.deviation / read(node.variance), 0.0, 1.0)
    weighed = sum(read(unlike, second=j) ** (1 - rho) * read(alike, second=j) ** rho for j in (False, True))
    overlap = (p[..., :c] * counts).sum(-1, keepdims=True)
    keep = np.clip(np.where(own, keep, 1 - weighed + overlap), 0, 1)
    same = np.where(own, np.maximum(passed, 0.0), passed) * keep + within * p[..., :c]
    share = gain_of_queries(node, notes, (each * ahead * counts).sum(-1), (same * counts).sum(-1))
    # What is due to overlaps is known to leading order. Tokens with known positions added share those too.
    next_one = LEADING_ORDER if any(a.classes > 1 for a in node.axes) else NEXT_ORDER
    if share is None and np.array_equal(cotangent, notes.given.get(node.id, 0.0)):
        # It is independent of the weights. Where one of them is large, Σ p² is up to E[p³]/E[p²].
        share, next_one = 0.0, next_one + float(np.max((large - squares) / np.maximum(kept, NEGLIGIBLE)))
    doubt = LOOSE if share is None else LOOSE * share + next_one
    placed = _adds_known_along(node.argument, node.keys.size)
    notes.doubts[node.id] = _PLACED_DOUBT if placed else doubt
    lost = lost + balance(same, lost, ahead, node.keys)
    out = np.concatenate([same, lost.reshape(*same.shape[:-1], c * c)], axis=-1)
    back = sum_out(np.moveaxis(out, -1, node.params), node.axes, node.args[0])
    return [back, *[None] * (len(node.args) - 1)]


propagated.register(Softmax, lambda node: NONE)  # shares add up to 1 whatever the scale of the logits


@once_per_node
def _adds_known_along(node: Node, size: int) -> bool:
    """Whether known numbers that vary along an axis of this size were added to what a node was made from."""
    return any(
        (isinstance(x, Array) and isinstance(node, Sum | Apply) and len(at) > 1 and size in x.values.shape)
        or _adds_known_along(x, size)
        for x, at in node.args
    )


def _rounded(x: np.ndarray, digits: int) -> np.ndarray:
    """To so many significant digits."""
    unit = 10.0 ** (np.floor(np.log10(np.maximum(x, 1e-300))) + 1 - digits)
    return np.round(x / unit) * unit


def _mean_of_powers(node: Node) -> tuple[float, Mean] | None:
    """c and the mean of exponentials that a node is the product of, c > 0; None of any other node."""
    scale = 1.0
    while isinstance(node, Apply) and node.args[0] == node.argument.whole:
        name, extra = node.params
        if name == "affine" and extra[0] > 0 and extra[1] == 0:
            scale *= extra[0]
        elif not (name == "abs" and node.argument.positive):
            return None
        node = node.argument
    return (scale, node) if isinstance(node, Mean) and node.argument.primitive == "exp" else None


@recognise("div")
def softmax_of(interpreter: Context, top: Value, bottom: Value) -> Value | None:
    """exp(x − max) / Σ exp(x − max), if that is what this division is."""
    num, (scale, mean) = top.node, _mean_of_powers(bottom.node) or (0.0, None)
    if mean is None or mean.argument is not num or abs(scale - num.count(mean.params)) > 1e-6:
        return None
    random, allowed = logits(num.args[0], num.axes)
    if random is None:
        return None
    if len(mean.params) > 1:  # drawn where that can be; else a division as any other
        interpreter.ask("a softmax over several axes", whole=True)
        return None
    graph, (key,), frame = interpreter.graph, mean.params, num.axes
    args, unshared, by_sample = [random], 0.0, False
    if allowed is not None:
        frame = row_classes(frame, random, allowed, key)
        args += rows_filled(*allowed, key)
        if key in allowed.bind:
            unshared = keys_apart(allowed.node, allowed.bind.index(key))
            by_sample = len(allowed.bind) > 1
    gaussian = _is_nearly_gaussian(random.node)
    if not gaussian:
        interpreter.ask(_NOT_GAUSSIAN)
    placed, learned = _bias_variances(random, key)
    # Classes of rows do not tell which keys are seen: behind a window, rows near one another share more keys.
    before = bool(_WINDOWS.get(graph, None))
    _WINDOWS.put(graph, None, before or unshared > NEXT_ORDER)
    doubt = max(math.expm1(min(placed, 3.0)), before * unshared)
    if max(doubt, learned) > LEADING_ORDER:
        interpreter.ask("attention by distance", whole=True)
    node = graph.make(Softmax, frame, args, key)
    if doubt > NEGLIGIBLE:
        node.mark("assumed", doubt)
        node.gradient_doubt = max(doubt, NEXT_ORDER)
    # Where paddings, some hidden by sample, are not told apart, outputs can be as much again.
    alike = frame[key].size in {size for _, size in padded(graph)} and frame[key].labels is None
    if not gaussian or (by_sample and alike):
        node.mark("assumed", 1.0)
    return Value(node, top.dims)


def _is_nearly_gaussian(node: Node) -> bool:
    """Whether logits are sums of products, or a function of one normal that is as good as linear (a soft cap, far out)."""
    live = fluctuating(roots(node))
    if isinstance(node, Apply):
        line = along(node.whole, node.axes, *live) if len(live) == 1 else np.zeros(len(Z))
    elif (law := marginal(node)).gaussian:
        return True
    else:
        line = law.values
    mean, slope, square = (line * x @ WEIGHTS for x in (1, Z, line))
    return bool(np.all(slope**2 > (1 - NEGLIGIBLE) * (square - mean**2)))


def _bias_variances(random: View, key: int) -> tuple[float, float]:
    """Variances along the keys of logits without inputs: of known numbers, whose s² adds e^{s²} − 1 to Σ p², and of weights."""
    terms = weighted_sum(random)[0] if isinstance(random.node, Sum) else []
    found = [(c, x, at.index(key)) for c, (x, at) in terms if key in at]
    placed = sum(np.var(c * x.values, axis=k).mean() for c, x, k in found if isinstance(x, Array))
    learned = [(c, x) for c, x, _ in found if not (isinstance(x, Array) or x.deps & x.graph.inputs)]
    return placed, sum(c * c * x.table.variance for c, x in learned)


class LogSumExp(OneOfMany):
    """log Σ exp along an axis, between the largest and that plus ln n, and sampled as the largest is; `params`: ((axis,),)."""

    gradient_doubt = 0.0


cross_by_kind.register(LogSumExp, cross_by_kind_of_one_of_many)


@second_moments.register
def second_moments_of_log_sum_exp(node: LogSumExp) -> Table:
    return node.sampled(lambda x, axes: np.asarray(special.logsumexp(x, axis=axes)))


@pullback.register
def pullback_of_log_sum_exp(node: LogSumExp, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """A logit gets its share of the cotangent."""
    source, (key,) = node.argument, node.reduced
    shares = node.graph.make(Softmax, source.axes, [source.whole], key)
    return [np.expand_dims(cotangent, key) * shares.table.second]


@recognise("log")
def log_sum_exp_of(interpreter: Context, x: Value) -> Value | None:
    """log x, if x is Σ exp of logits less their largest, as log Σ exp of the logits less their largest."""
    if (found := _mean_of_powers(x.node)) is None:
        return None
    (scale, mean), graph, (key, *more) = found, interpreter.graph, found[1].params
    if more:
        raise NotImplementedError("a softmax over several axes")
    powers = mean.argument
    (random, allowed), (terms, offset) = logits(powers.args[0], powers.axes), weighted_sum(powers.args[0])
    taken = [(c, v) for c, v in terms if all(isinstance(r.node, Extreme) for r in roots(v.node))]
    along = any(key in view.bind for _, view in taken)
    if random is None or allowed is not None or random.node.axes != powers.axes or along:
        return None
    if not _is_nearly_gaussian(random.node):
        interpreter.ask(_NOT_GAUSSIAN)
    unit = graph.make(LogSumExp, mean.axes, [random], ((key,),))
    views = [unit.whole, *(View(v.node, tuple(b - (b > key) for b in v.bind)) for _, v in taken)]
    node = total(graph, [1.0, *(c for c, _ in taken)], mean.axes, views)
    return Value(affine(node, 1.0, offset + math.log(scale / powers.axes[key].size)), x.dims)
