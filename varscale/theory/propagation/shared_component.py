r"""What places share: how the part of a mean square that is common to all places differs from draw to draw.

A channel of a convolution is, once its weights are drawn, m + v at every place: m common to all, v of variance s² and its own.
Over places its mean square is K = E[m² + s²]; an average over places keeps C = E[m²] of it, which fluctuates more than K, and
differently. To first order, with F(K) = E[f²] and G(K, C) = E over channels of (E[f | m, s])²,

    δln K′ = (∂ln F/∂ln K) δln K,   δln C′ = (∂ln G/∂ln K) δln K + (∂ln G/∂ln C) δln C,

to which n channels add the covariance of (q_c, m_c²)/n, the mean square and the squared mean of one of them: where each reads
few others (a depthwise convolution reads one), its (m, s) is far from normal, and follows from that of those read. A sum or an
average over places has a weighted mean of both fluctuations. Of a mean over n places, s²/n is left in K, of a normal v; and v
of two places overlap by chance (`token_gram`), which makes nets differ where places have nothing in common (m = 0).

The law of one channel is a POPULATION, a few thousand drawn; m of different samples is jointly normal where many are read.
It is known of products with random weights, functions of one, and averages; else C fluctuates as all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple, TypeGuard

import numpy as np
from scipy.special import ndtri

from varscale.theory.domain.axes import average, rest
from varscale.theory.graph.convolutions import Conv, Dims, WindowSum
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.known_arrays import is_known_array
from varscale.theory.graph.linear_nodes import applied_weights
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import POINTS, read_off
from varscale.theory.integrals.lognormal import shared, weighted
from varscale.theory.propagation.fourth_moments import correlation_scatter, fresh, origin
from varscale.theory.propagation.inherited_fluctuations import SCALE_STEP, Spread, combine, inherited
from varscale.theory.propagation.marginals import concentrated, evaluate
from varscale.theory.propagation.token_gram import Tokens, by_source, mixture, own_part, tokens_averaged

_CHANNELS, _POPULATION_SAMPLES = 2048, 16  # of a population, at most
_OF_FEW = 8192  # channels where they are far from normal, and those with the other sign
_MANY_CHANNELS = 8  # read together, from which on what they make is taken for normal: a matter of time
_POINTS, _POINT_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_POINT_WEIGHTS = _POINT_WEIGHTS / _POINT_WEIGHTS.sum()

Places = frozenset[int]  # axes of a node that places are along


class Channels(NamedTuple):
    """The law of one channel: of one initialization a row and one sample a column, (channels, samples)."""

    mean: np.ndarray  # over places, m
    square: np.ndarray  # its mean over places, m² + s²
    units: int  # how many channels there are
    read: np.ndarray  # the covariance of (K, C) of one channel that comes with those it reads, (2, 2)

    @property
    def own(self) -> np.ndarray:
        """Variance over places, s²."""
        return np.maximum(self.square - self.mean**2, 0.0)

    def at_one_place(self, between: float) -> Channels:
        """Where one place is left v is normal and part of m: correlated, in two samples, by ± the root of `between`."""
        drawn = np.random.default_rng(2).standard_normal((len(self.mean), self.mean.shape[1] + 1))
        v = math.sqrt(1 - math.sqrt(between)) * drawn[:, 1:] + between**0.25 * drawn[:, :1]
        mean = self.mean + np.sqrt(self.own) * v
        return self._replace(mean=mean, square=mean**2).of(*2 * [float(np.mean(self.square))])

    def totals(self) -> np.ndarray:
        """K and C."""
        return np.maximum([np.mean(self.square), np.mean(self.mean**2)], 1e-300)

    def of(self, whole: float, common: float) -> Channels:
        """The same with this K and this C."""
        ratio = common / float(self.totals()[1])
        own = self.own * (max(whole - common, 0.0) / max(float(np.mean(self.own)), 1e-300))
        return self._replace(mean=math.sqrt(ratio) * self.mean, square=ratio * self.mean**2 + own)

    def scatter(self) -> np.ndarray:
        """Covariance of K and C of one channel, each relative to its mean."""
        both = np.stack([self.square.mean(axis=1), np.mean(self.mean**2, axis=1)])
        return np.cov(both / np.maximum(both.mean(axis=1, keepdims=True), 1e-300))


class Shared(NamedTuple):
    """How the common part of a node fluctuates."""

    inherited: Spread  # what ln C inherits from its inputs
    sources: dict[Hashable, float]  # coefficients of what its own channels add
    scatter: float | None = None  # relative variance of K that these add; None: they are normal, or not known
    channels: Channels | None = None  # what it makes of them; None: their law is not known


def of_an_average(node: Node, whole: Spread) -> Spread:
    """What a sum or mean over places makes of the fluctuations of a mean square, `whole`, and of what places have in common.

    Of a mean over n places, whose overlaps o_jk have the variance V, (1/n²) Σ o_jk varies by 2V, for each sample by itself.
    """
    if (below := _averaged(node)) is not None:
        shares, part = _shares_of_mean(node, *below), common_part(*below)
        if part.channels is not None:
            found = combine(list(zip(shares, (whole, part.inherited), strict=True)))
            whole = dataclasses.replace(whole, sources=found.sources, shift=found.shift, bend=found.bend)
        else:  # two places have the scale of the draw in common, and not their own
            drawn = min(whole.variance / max(math.log1p(whole.point), 1e-300), 1.0)
            whole = dataclasses.replace(whole, shift=whole.shift * (shares[0] + drawn * shares[1]))
    if (x := tokens_averaged(node)) is None:
        return whole
    n = x.node.count(node.params)
    scale = math.sqrt(2) * min(own_part(x) / n / node.table.divisor, 1.0)
    overlaps: dict[Hashable, float] = {("overlap", y): scale * c for y, c in _before_units(x.node, x).items()}
    of_all = math.sqrt(n / x.node.count(x.tokens))
    sources, places = (weighted([(1.0, whole.sources), (c, overlaps)]) for c in (of_all, 1.0))
    return dataclasses.replace(whole, sources=sources, places=places)


@once_per_node
def _before_units(node: Node, x: Tokens) -> dict[Tokens, float]:
    """`by_source` of what random weights mixed before and of what is drawn: not of its units, nor of given numbers."""
    sources, weights, _ = mixture(x) if not isinstance(node, Conv) else ((), (), 0.0)
    inner = by_source if applied_weights(node) else _before_units
    found = weighted([(w, inner(s.node, s)) for s, w in zip(sources, weights, strict=True)])
    return {y: c for y, c in found.items() if not is_known_array(y.node)}


def channel_scatter(node: Node) -> float | None:
    """Relative variance of K that a node's own channels add, where they are far from normal; None: normal, or unknown."""
    own = roots(node)
    if len(own) != 1 or (_averaged(own[0].node) is None and not _few(own[0].node)):
        return None
    return common_part(node, frozenset(own[0].bind[k] for k in _own_places(own[0].node))).scatter


def of_few(node: Conv) -> float | None:
    """By how much more K of the few channels that an output reads varies than of all; None: they are many, or not known."""
    below = _read_by(node, _own_places(node)) if _few(node) else None
    if below is None or (read := common_part(*below).channels) is None:
        return None
    return float(read.scatter()[0, 0]) * (1 / node.reads - 1 / read.units)


def _few(root: Node) -> TypeGuard[Conv]:
    """Whether it is a convolution of which each output reads a few of the channels."""
    return isinstance(root, Conv) and root.reads < _MANY_CHANNELS


def _windowed(node: Conv | WindowSum, dims: Dims) -> Places:
    """The axes of the dimensions that windows are over, the last ones where there are fewer windows."""
    read = zip(reversed(dims), reversed(node.params.windows), strict=False)
    return frozenset(k for k, window in read if k is not None and window is not None)


def _own_places(root: Node) -> Places:
    """The axes of places of a convolution, or of an average that leaves some."""
    if isinstance(root, Conv) or type(root) is WindowSum:
        return _windowed(root, root.params.out_dims)
    return frozenset()


def _root(node: Node, places: Places) -> tuple[Node, Places]:
    """The one root of a function, and which of its axes these places are; the node itself where it has not just one."""
    view, *more = roots(node) or [node.whole]
    if more or not places <= {*view.bind} or concentrated(view.node):
        return node, places
    return view.node, frozenset(view.axes_at(places))


def _averaged(node: Node) -> tuple[Node, Places] | None:
    """What is averaged or summed over places, and which of its axes they are."""
    if type(node) is WindowSum:
        return node.argument, _windowed(node, node.params.x_dims)
    return (node.argument, frozenset(node.params)) if node.averages else None


def _read_by(root: Node, places: Places) -> tuple[Node, Places] | None:
    """What a root adds up over random weights or averages over places, and which of its axes these are."""
    if (isinstance(root, Conv) or _averaged(root) is not None) and places != _own_places(root):
        return None
    for weight, view, x, _ in applied_weights(root):
        if weight.is_drawn and isinstance(root, Conv):
            return x.node, _windowed(root, root.params.x_dims)
        if weight.is_drawn and places <= {*x.bind} and not places & {*view.bind}:
            return x.node, frozenset(x.axes_at(places))
    return _averaged(root)


def _shares_of_mean(node: Node, x: Node, places: Places) -> tuple[float, float]:
    """What of the mean square of a sum or mean over places is from a place and itself, and what from two of them."""
    windows = () if node.averages else node.params.windows
    taps = [float(w.line @ w.line) for w in windows if w is not None] or [1 / x.axes[k].size for k in places]
    share = min(x.table.mean_square * math.prod(taps) / node.table.divisor, 1.0)
    return share, 1 - share


@once_per_node
def common_part(node: Node, places: Places) -> Shared:
    """How what a node has in common along these axes fluctuates."""
    root, own_places = _root(node, places)
    below = _read_by(root, own_places)
    if below is None or (channels := _channels(root, own_places, *below)) is None:
        return Shared(inherited(node), {origin(node): math.sqrt(fresh(node))})
    read, averaged = common_part(*below), _averaged(root) is not None
    made, (jacobian, hessian) = _made(node, root, channels), _derivatives(node, root, channels)
    levels = inherited(root), combine([(1.0, read.inherited), (1.0 - averaged, Spread(read.sources))])
    handed = combine(list(zip(jacobian[1], levels, strict=True)))
    together = np.array([[shared(a.sources, b.sources) for b in levels] for a in levels])
    shift, bend = handed.shift + float(np.sum(hessian * together) / 2), handed.bend
    few = _few(root) and read.channels is not None
    if few:  # of which moments by type know the second ones alone
        bend += math.sqrt(made.scatter()[1, 1] / len(made.mean))  # a population's own error
        shift = (1 + shift) * float(made.totals()[1]) / max(_common(node, places), 1e-300) - 1
    made = made._replace(read=jacobian @ made.read @ jacobian.T)
    scatter = (made.scatter() - made.read) / made.units
    whole, common = (math.log1p(max(float(scatter[k, k]), 0.0)) for k in (0, 1))
    most = math.sqrt(common)
    along = float(np.clip(scatter[0, 1] / math.sqrt(max(whole, 1e-300)), -most, most))
    return Shared(
        dataclasses.replace(handed, shift=shift, bend=bend),
        {origin(node): along, ("common part", node.id): math.sqrt(max(common - along**2, 0.0))},
        scatter=whole if averaged or few else None,
        channels=made,
    )


def _channels(root: Node, places: Places, x: Node, x_places: Places) -> Channels | None:
    """The law of a root's channels, which has its K and its C."""
    read, whole = common_part(x, x_places), root.table.mean_square
    common = max(_common(root, places), 0.0)  # a difference of tables may round below
    if _averaged(root) is not None:
        if read.channels is None:
            return None
        alone, together = _shares_of_mean(root, x, x_places)
        row = np.array([[alone, together], [0.0, 1.0]])
        found = read.channels._replace(read=row @ read.channels.read @ row.T)
        if places:
            return found.of(whole, common)
        between = average(correlation_scatter(root), root.axes, apart=range(len(root.axes) - 1))
        return found.of(whole, whole * together).at_one_place(min(between, 1.0))
    if np.any(root.table.mean):
        return None
    weight, *_, own = next(applied for applied in applied_weights(root) if applied.leaf.is_drawn)
    units = root.count(own)
    if _few(root) and read.channels is not None:
        found = _of_few(root, read.channels, units)
    else:
        others = frozenset(range(len(root.axes))).difference(own)
        between = float(np.clip(_common(root, others) / max(common, 1e-300), 0.0, 1.0))
        columns = 2 + min(root.count(rest(root.axes, {*own, *places})), _POPULATION_SAMPLES)
        # Numbers that spread as a normal does, in random order.
        rng, even = np.random.default_rng(0), ndtri((np.arange(_CHANNELS) + 0.5) / _CHANNELS)
        drawn = np.stack([rng.permutation(even) for _ in range(columns)], axis=1)
        means = math.sqrt(between) * drawn[:, 1:2] + math.sqrt(1 - between) * drawn[:, 2:]
        excess = max(weight.kurtosis - 1, 0.0) / max(root.width or 1, 1)  # of a unit's squared weights
        own = np.exp(math.sqrt(math.log1p(excess)) * drawn[:, :1])
        found = Channels(means, means**2 + own, units, np.zeros((2, 2)))
    return found.of(whole, common)


def _of_few(root: Conv, read: Channels, units: int) -> Channels:
    """Sums over a few channels, of one weight a tap and channel."""
    group, taps = root.reads, math.prod(w.taps for w in root.params.windows)
    law = getattr(root.args[1].node, "transport", None)
    rng, (common, own) = np.random.default_rng(1), np.zeros((2, _OF_FEW, read.mean.shape[1]))
    for _ in range(group):
        weights = rng.standard_normal((_OF_FEW, taps))
        weights = weights if law is None else read_off(law.reshape(-1, POINTS)[0], weights)
        at = rng.permutation(_OF_FEW) % len(read.mean)
        common += weights.sum(axis=1, keepdims=True) * read.mean[at]
        own += np.sum(weights**2, axis=1, keepdims=True) * read.own[at]
    both = np.concatenate([common, -common])  # weights of either sign are as likely
    return Channels(both, both**2 + np.concatenate([own, own]), units, read.scatter() / group)


def _common(node: Node, places: Places) -> float:
    """C of a node, along these axes."""
    return average(node.table.second, node.axes, apart=places)


def _made(node: Node, root: Node, channels: Channels) -> Channels:
    """What a function of one root makes of its channels."""
    if node is root:
        return channels
    values = channels.mean[..., None] + np.sqrt(channels.own)[..., None] * _POINTS
    env = dict.fromkeys(roots(node), values.reshape(*[1] * len(node.axes), -1))
    out = np.asarray(evaluate(node.whole, node.axes, env), float).reshape(values.shape)
    return channels._replace(mean=out @ _POINT_WEIGHTS, square=out**2 @ _POINT_WEIGHTS)


def _derivatives(node: Node, root: Node, channels: Channels) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of (ln K, ln C) of a function of one root by the root's, and second ones of C, of lognormal K and C."""
    if node is root:
        return np.eye(2), np.zeros((2, 2))
    step, own = math.log1p(SCALE_STEP), channels.totals()

    def levels(*steps: int) -> np.ndarray:
        return np.log(_made(node, root, channels.of(*own * np.exp(np.multiply(step, steps)))).totals())

    middle, pairs = levels(0, 0), [(levels(i, j), levels(-i, -j)) for i, j in ((1, 0), (0, 1), (1, 1))]
    jacobian = np.stack([(up - down) / (2 * step) for up, down in pairs[:2]], axis=1)
    first, second, both = ((up + down - 2 * middle)[1] / step**2 for up, down in pairs)
    mixed, slope = (both - first - second) / 2, jacobian[1]
    return jacobian, np.array([[first, mixed], [mixed, second]]) + np.outer(slope, slope) - np.diag(slope)
