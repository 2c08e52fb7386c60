r"""What places share: how the part of a mean square that is common to all places differs from draw to draw.

A channel of a convolution is, once its weights are drawn, m + v at every place: m common to all, v of variance s² and its own.
Over places its mean square is K = E[m² + s²]; what an average over places keeps of it is C = E[m²], and that fluctuates more
than K, from draw to draw, and otherwise. To first order, with F(K) = E[f²] and G(K, C) = E over channels of (E[f | m, s])²,

    δln K′ = (∂ln F/∂ln K) δln K,   δln C′ = (∂ln G/∂ln K) δln K + (∂ln G/∂ln C) δln C,

to which n channels add the covariance of (q_c, m_c²)/n, the mean square and the squared mean of one of them: where each reads
few others (a depthwise convolution reads one), (m, s) of one channel is far from normal, and follows from that of those read.
A sum or an average over places has a weighted mean of both fluctuations.

The law of one channel is a POPULATION, a few thousand drawn as the law says; m of different samples is jointly normal where
many channels are read. Known of products with random weights, functions of one of them, and averages over places; what is
made otherwise has its common part fluctuate as all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from varscale.theory.domain.axes import contract_axis
from varscale.theory.graph.convolutions import Conv, WindowSum
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.fourth_moments import fresh, origin
from varscale.theory.propagation.inherited_fluctuations import (
    SCALE_STEP,
    Spread,
    inherited,
    kernel,
    shared,
    weighted,
)
from varscale.theory.propagation.marginals import concentrated, evaluate

_CHANNELS, _POPULATION_SAMPLES = 2048, 4  # of a population
_OF_FEW = 8192  # channels where they are far from normal, and those with the other sign
# Channels that are read together, from where on what they make is taken for normal: not derived, a matter of
# time.
_MANY_CHANNELS = 8
_SHARED_BY_SAMPLES = (
    0.98  # share of what places have in common that samples share, too, from where on they are as one
)
_POINTS, _POINT_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_POINT_WEIGHTS = _POINT_WEIGHTS / _POINT_WEIGHTS.sum()

Sources = dict[Hashable, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The law of one channel.

    Attributes:
        common: its part common to all places, m, of one initialization a row and one sample a column.
        own: variance of the rest, s².
        units: how many channels there are.
        read: what of the covariance of (K, C) of one channel comes with the channels that it reads.
    """

    common: Float[np.ndarray, "channels samples"]
    own: Float[np.ndarray, "channels samples"]
    units: int
    read: Float[np.ndarray, "2 2"]

    def scaled(self, whole: float, common: float) -> Channels:
        """The same where K and C are so many times as large."""
        c, own = float(np.mean(self.common**2)), float(np.mean(self.own))
        left = max(whole * (own + c) - common * c, 0.0) / max(own, 1e-300)
        return dataclasses.replace(self, common=math.sqrt(common) * self.common, own=left * self.own)

    def of(self, whole: float, common: float) -> Channels:
        """The same with this K and this C."""
        c, own = float(np.mean(self.common**2)), float(np.mean(self.own))
        return self.scaled(whole / max(own + c, 1e-300), common / max(c, 1e-300))


class ChannelMoments(NamedTuple):
    """What a function makes of channels, (channels, samples): its mean over places, and its mean square."""

    mean: np.ndarray
    square: np.ndarray

    def levels(self) -> np.ndarray:
        """ln K and ln C."""
        return np.log(np.maximum([np.mean(self.square), np.mean(self.mean**2)], 1e-300))

    def scatter(self) -> np.ndarray:
        """Covariance of K and C of one channel, each relative to its mean."""
        both = np.stack([self.square.mean(axis=1), np.mean(self.mean**2, axis=1)])
        return np.cov(both / np.maximum(both.mean(axis=1, keepdims=True), 1e-300))


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """How the common part of a node fluctuates.

    Attributes:
        inherited: coefficient of ln C on each source, of what its inputs hand on.
        sources: with what its own channels add.
        shift: of C, relative to its value for infinitely many units.
        bend: what of that is in doubt.
        scatter: relative variance of K that its own channels add; None where they are normal, or not known.
        channels: what it makes of them; None where their law is not known.
        units: how many there are.
        passed: what of the covariance of (K, C) of one of them comes with what it reads.
    """

    inherited: Sources
    sources: Sources
    shift: float
    bend: float
    scatter: float | None = None
    channels: ChannelMoments | None = None
    units: int = 1
    passed: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 2)))


def of_an_average(node: Node, whole: Spread) -> Spread:
    """What a sum or mean over places makes of the fluctuations of a mean square, `whole`, and of what places have in common."""
    below = _averaged(node)
    if below is None:
        return whole
    x, places = below
    shared = common_part(x, places)
    if shared.channels is None:
        return whole

    alone, together = _shares_of_mean(node, x, places)
    sources = weighted([(alone, whole.sources), (together, shared.inherited)])
    shift, bend = (
        alone * getattr(whole, name) + together * getattr(shared, name) for name in ("shift", "bend")
    )
    return dataclasses.replace(whole, sources=sources, shift=shift, bend=bend)


def channel_scatter(node: Node) -> float | None:
    """Relative variance of K that a node's own channels add, where they are far from normal; None: normal, or unknown."""
    own = roots(node)
    if len(own) != 1 or (_averaged(own[0].node) is None and not _few(own[0].node)):
        return None
    return common_part(node, frozenset(own[0].bind[k] for k in _place_axes(own[0].node))).scatter


def of_few(node: Conv) -> float | None:
    """By how much more K of the few channels that an output reads varies than of all; None: they are many, or not known."""
    if not _few(node):
        return None
    below = _read_by(node, _place_axes(node))
    read = common_part(*below) if below is not None else None
    if read is None or read.channels is None:
        return None
    return float(read.channels.scatter()[0, 0]) * (1 / _group(node) - 1 / read.units)


def _group(node: Conv) -> int:
    """How many channels an output reads."""
    channels = node.params.x_dims[1]
    return 1 if channels is None else node.args[0].node.axes[channels].size // node.params.groups


def _units(root: Node, x: Node) -> list[int]:
    """The axes along which a product with weights has weights of its own."""
    if isinstance(root, Conv):
        return [k for k in root.params.out_dims[1:2] if k is not None]
    shared = {k for view in root.args if view.node is x for k in view.bind}
    return [k for k in range(len(root.axes)) if k not in shared]


def _place_axes(root: Node) -> frozenset[int]:
    """The axes of places of a convolution, or of an average that leaves some."""
    if isinstance(root, Conv):
        return frozenset(k for k in root.params.out_dims[2:] if k is not None)
    windows, _, od = root.params if not root.averages else ((), (), ())
    return frozenset(k for k, window in zip(od, windows, strict=True) if window is not None and k is not None)


def _root(node: Node, places: frozenset[int]) -> tuple[Node, frozenset[int]]:
    """The one root of a function, and which of its axes these places are; the node itself where it has not just one."""
    own = roots(node)
    if (
        not isinstance(node, Apply)
        or len(own) != 1
        or not places <= set(own[0].bind)
        or concentrated(own[0].node)
    ):
        return node, places
    return own[0].node, frozenset(k for k, b in enumerate(own[0].bind) if b in places)


def _averaged(node: Node) -> tuple[Node, frozenset[int]] | None:
    """What is averaged or summed over places, and which of its axes they are."""
    if type(node) is WindowSum:
        windows, xd, _ = node.params
        return node.args[0].node, frozenset(
            k for k, window in zip(xd, windows, strict=True) if window is not None and k is not None
        )
    return (node.args[0].node, frozenset(node.params)) if node.averages else None


def _read_by(root: Node, places: frozenset[int]) -> tuple[Node, frozenset[int]] | None:
    """What a root adds up over random weights or averages over places, and which of its axes these are."""
    below = _averaged(root)
    if below is not None:
        return below if places == _place_axes(root) else None
    if not isinstance(root, Conv | Contract):
        return None
    for x, w in (root.args, root.args[::-1]):
        if not (w.node.is_drawn and w.node.odd):
            continue
        if isinstance(root, Conv):
            xd = root.params.x_dims
            return (
                (x.node, frozenset(k for k in xd[2:] if k is not None))
                if places == _place_axes(root)
                else None
            )
        if places <= set(x.bind) and not places & set(w.bind):
            return x.node, frozenset(k for k, b in enumerate(x.bind) if b in places)
    return None


def _shares_of_mean(node: Node, x: Node, places: frozenset[int]) -> tuple[float, float]:
    """What of the mean square of a sum or mean over places is from a place and itself, and what from two of them."""
    if node.averages:
        alone = x.table.mean_square / math.prod(x.axes[k].size for k in places)
    else:
        alone = x.table.mean_square * math.prod(
            window.taps for window in node.params.windows if window is not None
        )
    share = min(alone / max(node.table.mean_square, 1e-300), 1.0)
    return share, 1 - share


@once_per_node
def common_part(node: Node, places: frozenset[int]) -> Shared:
    """How what a node has in common along these axes fluctuates."""
    root, own_places = _root(node, places)
    below = _read_by(root, own_places)
    channels = _channels(root, own_places, *below) if below is not None else None
    if below is None or channels is None:
        base = inherited(node)
        own: Sources = {origin(node): math.sqrt(fresh(node, range(len(node.axes))))}
        return Shared(base.sources, weighted([(1.0, base.sources), (1.0, own)]), base.shift, base.bend)
    read, scale, averages = common_part(*below), kernel(root), _averaged(root) is not None
    few = _few(root) and read.channels is not None
    made, jacobian, hessian = _answer(node, root, channels)
    levels = [scale.sources, read.inherited if averages else read.sources]
    handed = weighted(list(zip(jacobian[1], levels, strict=True)))
    passed = jacobian @ channels.read @ jacobian.T
    scatter = (made.scatter() - passed) / channels.units
    whole, common = (math.log1p(max(float(scatter[k, k]), 0.0)) for k in (0, 1))
    along = float(
        np.clip(scatter[0, 1] / math.sqrt(max(whole, 1e-300)), -math.sqrt(common), math.sqrt(common))
    )
    own = {origin(node): along, ("common part", node.id): math.sqrt(max(common - along**2, 0.0))}
    together = np.array([[shared(x, y) for y in levels] for x in levels])
    shift = float(jacobian[1] @ [scale.shift, read.shift] + np.sum(hessian * together) / 2)
    bend = float(np.abs(jacobian[1]) @ [scale.bend, read.bend])
    if few:  # of which moments by type know the second ones alone
        bend += math.sqrt(made.scatter()[1, 1] / len(made.mean))  # a population's own error
        shift = (1 + shift) * math.exp(made.levels()[1]) / max(_common(node, places), 1e-300) - 1
    return Shared(
        inherited=handed,
        sources=weighted([(1.0, handed), (1.0, own)]),
        shift=shift,
        bend=bend,
        scatter=whole if averages or few else None,
        channels=made,
        units=channels.units,
        passed=passed,
    )


def _few(root: Node) -> TypeGuard[Conv]:
    """Whether it is a convolution of which each output reads a few of the channels."""
    return isinstance(root, Conv) and _group(root) < _MANY_CHANNELS


def _channels(root: Node, places: frozenset[int], x: Node, x_places: frozenset[int]) -> Channels | None:
    """The law of a root's channels, which has its K and its C."""
    read, whole = common_part(x, x_places), root.table.mean_square
    common = max(_common(root, places), 0.0)  # a difference of tables may round below
    if _averaged(root) is not None:
        if read.channels is None:
            return None
        alone, together = _shares_of_mean(root, x, x_places)
        mean, square = read.channels
        row = np.array([[alone, together], [0.0, 1.0]])
        found = Channels(mean, np.maximum(square - mean**2, 0.0), read.units, row @ read.passed @ row.T)
        return found.of(whole, common if places else whole * (1 - alone))
    if np.any(root.table.mean):
        return None
    own = _units(root, x)
    units = math.prod(root.axes[k].size for k in own)
    if _few(root) and read.channels is not None:
        return _of_few(root, read, units).of(whole, common)
    others = frozenset(range(len(root.axes))) - set(own)
    between = float(np.clip(_common(root, others) / max(common, 1e-300), 0.0, 1.0))
    drawn = _normals((1 if between > _SHARED_BY_SAMPLES else _POPULATION_SAMPLES) + 2)
    means = math.sqrt(between) * drawn[:, 1:2] + math.sqrt(1 - between) * drawn[:, 2:]
    weights = next(view.node for view in root.args if view.node is not x)
    excess = max(getattr(weights, "kurtosis", 3.0) - 1, 0.0) / max(
        root.width or 1, 1
    )  # of a unit's squared weights
    spread = math.sqrt(math.log1p(excess)) * drawn[:, :1]
    return Channels(means, np.broadcast_to(np.exp(spread), means.shape), units, np.zeros((2, 2))).of(
        whole, common
    )


def _of_few(root: Conv, read: Shared, units: int) -> Channels:
    """Sums over a few channels, of one weight a tap and channel."""
    assert read.channels is not None
    mean, square = read.channels
    rest = np.maximum(square - mean**2, 0.0)
    group, taps = _group(root), math.prod(w.taps for w in root.params.windows)
    law = getattr(root.args[1].node, "transport", None)
    rng = np.random.default_rng(1)
    common, own = (np.zeros((_OF_FEW, mean.shape[1])) for _ in range(2))
    for _ in range(group):
        weights = rng.standard_normal((_OF_FEW, taps))
        weights = weights if law is None else np.interp(weights, Z, law.reshape(-1, len(Z))[0])
        at = rng.permutation(_OF_FEW) % len(mean)
        common += weights.sum(axis=1, keepdims=True) * mean[at]
        own += np.sum(weights**2, axis=1, keepdims=True) * rest[at]
    common, own = (
        np.concatenate([common, -common]),
        np.concatenate([own, own]),
    )  # weights of either sign are as likely
    return Channels(common, own, units, read.channels.scatter() / group)


def _normals(columns: int) -> Float[np.ndarray, "channels columns"]:
    """Standard normals, each column spread as evenly as a normal is."""
    rng = np.random.default_rng(0)
    even = ndtri((np.arange(_CHANNELS) + 0.5) / _CHANNELS)
    return np.stack([rng.permutation(even) for _ in range(columns)], axis=1)


def _common(node: Node, places: frozenset[int]) -> float:
    """C of a node, along these axes."""
    common = node.table.second
    for k in reversed(range(len(node.axes))):
        common = contract_axis(common, k, node.axes[k].different if k in places else node.axes[k].same)
    return float(common)


def _made(node: Node, root: Node, channels: Channels) -> ChannelMoments:
    """What a function of one root makes of its channels."""
    if node is root:
        return ChannelMoments(channels.common, channels.common**2 + channels.own)
    (view,) = roots(node)
    values = channels.common[..., None] + np.sqrt(channels.own)[..., None] * _POINTS
    shape = (1,) * len(node.axes)
    out = evaluate(View(node, tuple(range(len(node.axes)))), node.axes, {view: values.reshape(*shape, -1)})
    out = np.asarray(out, float).reshape(-1)[-values.size :].reshape(values.shape)
    return ChannelMoments(out @ _POINT_WEIGHTS, out**2 @ _POINT_WEIGHTS)


def _answer(node: Node, root: Node, channels: Channels) -> tuple[ChannelMoments, np.ndarray, np.ndarray]:
    """What a function of one root makes of its channels, and how that follows (K, C) of the root.

    Returns:
        What it makes; derivatives of (ln K, ln C) by those of the root; what E[C] gains for each covariance of these, twice.
    """
    made = _made(node, root, channels)
    if node is root:
        return made, np.eye(2), np.zeros((2, 2))
    step = math.log1p(SCALE_STEP)

    def levels(*steps: int) -> np.ndarray:
        return _made(node, root, channels.scaled(*np.exp(np.multiply(step, steps)))).levels()

    pairs = [(levels(*way), levels(*(-x for x in way))) for way in ((1, 0), (0, 1), (1, 1))]
    jacobian = np.stack([(up - down) / (2 * step) for up, down in pairs[:2]], axis=1)
    first, second, both = ((up + down - 2 * made.levels())[1] / step**2 for up, down in pairs)
    mixed = (both - first - second) / 2
    slope = jacobian[1]
    # C = exp(l(k, c)) of lognormal K and C with given means.
    hessian = np.array([[first, mixed], [mixed, second]]) + np.outer(slope, slope) - np.diag(slope)
    return made, jacobian, hessian
