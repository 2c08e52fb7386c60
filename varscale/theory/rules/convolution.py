"""Convolutions, and sums and maxima over windows: which taps of which places meet; those beyond the border do not count.

Maxima are drawn, and their cotangents spread evenly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, apply_axis, contract_axes, outer
from varscale.theory.domain.axis_maps import AxisMap, adjoint, identity_map, pair_counts
from varscale.theory.domain.tables import LEADING_ORDER, Table, full_along, means_by_type
from varscale.theory.graph.convolutions import (
    Conv,
    ConvParams,
    Window,
    WindowSum,
    WindowSumParams,
    by_axis,
    by_dim,
    dim_axes,
    output_axis,
    tap_pairs,
    window_map,
)
from varscale.theory.graph.known_arrays import is_known_array
from varscale.theory.graph.layout import Atom, Value, separated
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import UNKNOWN, Leaf, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.cross_moments import cross, dependent, unsure
from varscale.theory.propagation.doubts import lost_excess
from varscale.theory.propagation.fluctuations import averaged, of_a_group, with_own_weights
from varscale.theory.propagation.fourth_moments import excess_kurtosis
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, inherited, propagated
from varscale.theory.propagation.marginals import quantiles_of_kind, scatter_of
from varscale.theory.propagation.pullbacks import Cotangent, pulled_back, repeats
from varscale.theory.propagation.shared_component import of_an_average, of_few
from varscale.theory.rules.linear import without_factor
from varscale.theory.rules.reductions import bounded, draw, fewest_terms, of_increasing, pooled_estimate
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region, placeholder


def _carried(node: Conv, second: np.ndarray) -> np.ndarray:
    """Second moments by type of what a convolution makes of an input with these."""
    _, _, xd, wd, od = node.params
    weights = by_dim(node.args[1].node.table.second, wd)
    return by_axis(node.carry(by_dim(second, xd), weights), od)


@second_moments.register(Conv)
def second_moments_of_conv(node: Conv) -> Table:
    groups, windows, xd, _, od = node.params
    x, w = (v.node for v in node.args)
    if dependent(
        x, w
    ):  # one applied before is as good as fresh; of data with their own crop terms may be equal
        fresh = weight_of(node) is not None
        node.graph.flag(*("quadrature", 1 / node.width) if fresh else ("assumed", UNKNOWN))
    mean = np.zeros([a.classes for a in node.axes])
    if np.any(w.table.mean) and np.any(x.table.mean):
        (_, channels, *places), (_, features, *out) = dim_axes(x, xd), dim_axes(node, od)
        own = np.tile(channels.counts[: channels.classes] / groups, (features.classes, 1))
        matrices = [own, *(window_map(*read).means() for read in zip(windows, places, out, strict=True))]
        term = by_dim(x.table.mean, xd)
        for k, matrix in enumerate(matrices, 1):
            term = apply_axis(term, k, matrix)
        mean = by_axis(term * w.table.total_mean, od)
    return Table(node.axes, mean, _carried(node, x.table.second))


@pullback.register(Conv)
def pullback_of_conv(node: Conv, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    _, _, xd, wd, od = node.params
    weights = by_dim(node.args[1].node.table.second, wd)
    back = node.carry(by_dim(cotangent, od), weights, transposed=True)
    return [np.broadcast_to(by_axis(back, xd), node.args[0].node.frame_types), None]


@cross_by_kind.register(Conv)
def cross_by_kind_of_conv(node: Conv, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """The same weights on two inputs, whose cross-moment takes the place of their second moment."""
    x, weights = node.args[0].node, (weight_of(node), weight_of(b.node))
    if None not in weights and weights[0] is not weights[1]:
        return np.zeros((1,) * len(frame))
    same = isinstance(b.node, Conv) and (b.node.params, b.node.args[1]) == (node.params, node.args[1])
    if not same or a.bind != b.bind or b.node.args[0].node.axes != x.axes:
        return None
    table = cross(x.whole, b.node.args[0].node.whole, x.axes)
    second = _carried(node, np.broadcast_to(table, x.frame_types))
    return a.over(second, frame, pairs=True)


@propagated.register(Conv)
def propagated_of_conv(node: Conv) -> Spread:
    x = node.args[0].node
    groups, windows, xd, *_ = node.params
    taps, summed = math.prod(w.taps for w in windows), [k for k in xd[1:2] if k is not None]
    spread = combine([(1.0, averaged(x, summed, taps))])
    out = with_own_weights(spread, node)
    if (varied := of_few(node)) is not None:  # what weights of its own add is in the law of its channels
        out = dataclasses.replace(out, sources=spread.sources, shape=out.shape + (1 - 1 / taps) * varied)
    return dataclasses.replace(out, shape=out.shape + of_a_group(x, summed, groups) / taps)


@scatter_of.register(Conv)
def scatter_of_conv(node: Conv) -> np.ndarray | None:
    _, windows, xd, _, od = node.params
    taps, inputs = math.prod(w.taps for w in windows), dim_axes(node.args[0].node, xd)
    x, weights = (view.node for view in node.args)
    if taps == 1 or not isinstance(weights, Leaf) or not weights.odd:
        return None
    # Of two places along a spatial axis, the pairs of taps that read one input.
    lines = [
        axis.agrees
        if (dim := od.index(k)) < 2
        else np.add(*tap_pairs(windows[dim - 2], inputs[dim], axis))[:, : inputs[dim].classes].sum(axis=1)
        for k, axis in enumerate(node.axes)
    ]
    meeting = outer(lines)
    same = outer(axis.agrees for axis in node.axes)
    # The part of the input's mean square that is not common to all places.
    kinds = {k: axis.different if k in xd[2:] else axis.same for k, axis in enumerate(x.axes)}
    common = float(contract_axes(x.table.second, kinds)) / max(x.table.mean_square, 1e-300)
    own = float(np.clip(1 - common, 0.0, 1.0)) if any(k is not None for k in xd[2:]) else 1.0
    met = meeting * node.width / taps * (1 + excess_kurtosis(x) / 2) * own**2
    return np.where(same, 0.0, met / (node.width * (node.width + weights.kurtosis - 1)))


def _axes_of(x: Value, order: Sequence[int]) -> tuple[int | None, ...]:
    """The axis of each dimension of a value, in this order; None of one of size 1."""
    return tuple(x.dims[d][0].axis if x.dims[d] else None for d in order)


def _above_one(logical: Sequence[Axis]) -> tuple[list[Axis], tuple[int | None, ...]]:
    """The axes of more than one position, and the place of each dimension's among them (None: it has one position)."""
    axes = [axis for axis in logical if axis.size > 1]
    places = iter(range(len(axes)))
    return axes, tuple(next(places) if axis.size > 1 else None for axis in logical)


@rule("conv_general_dilated")
def conv(interpreter: Context, eqn: Any, x: Value, w: Value) -> Any:
    """A convolution of weights; one whose kernel is made of inputs, or differs from sample to sample, is drawn."""
    p, aval = eqn.params, eqn.outvars[0].aval
    in_spec, w_spec, out_spec = p["dimension_numbers"]
    if p["batch_group_count"] != 1 or w.node.deps & interpreter.graph.inputs:
        return drawn_region(interpreter, eqn, (x, w), "its kernel is no weight")
    smooth = math.prod(w.shape[k] for k in w_spec[2:]) > 1 and x.node.near == 1 and is_known_array(x.node)
    if (smooth and interpreter.ask("windows over given places that are alike", whole=True)) or (
        repeats(w.node) and interpreter.ask("a kernel that repeats itself", whole=True)
    ):
        return placeholder(interpreter, aval)
    (cx, x), (cw, w) = without_factor(x), without_factor(w)
    x, w = separated(x), separated(w)
    outputs, taps = [aval.shape[d] for d in out_spec[2:]], [w.shape[d] for d in w_spec[2:]]
    lows = [low for low, _ in p["padding"]]
    windows = tuple(
        map(Window, outputs, taps, p["window_strides"], lows, p["lhs_dilation"], p["rhs_dilation"])
    )
    xd, wd = _axes_of(x, in_spec), _axes_of(w, w_spec)
    batch, _, *places = dim_axes(x.node, xd)
    axes, od = _above_one([batch, dim_axes(w.node, wd)[0], *map(output_axis, windows, places)])
    params = ConvParams(p["feature_group_count"], windows, xd, wd, od)
    node = interpreter.graph.make(Conv, axes, [x.node.whole, w.node.whole], params)
    dims = [() if k is None else (Atom(node.axes[k].size, k),) for k in od]
    return Value(affine(node, cx * cw, 0.0), tuple(dims[out_spec.index(d)] for d in range(len(dims))))


def near_places(node: WindowSum, second: float, alike: float) -> float:
    """How far a mean square may be off for near places being more alike than any two, which is all that types of pairs know.

    `alike` is what it would be, were all places of a window one; near ones go a share `near` of the way.
    """
    near = node.args[0].node.near
    if near == 1:
        raise NotImplementedError(
            "windows over known numbers, of which near ones may be more alike than others"
        )
    return near * abs(alike / max(second, 1e-300) - 1)


def _taps(node: WindowSum) -> int:
    return math.prod(w.taps for w in node.params.windows if w is not None)


@second_moments.register(WindowSum)
def second_moments_of_window_sum(node: WindowSum) -> Table:
    table = node.args[0].node.table
    mean = node.carried(table.mean, node.maps(AxisMap.means))
    out = Table(node.axes, mean, node.carried(table.second, node.maps(pair_counts)))
    if doubt := near_places(node, out.mean_square, _taps(node) ** 2 * table.mean_square):
        node.graph.flag("quadrature", doubt)
    return out


@pullback.register(WindowSum)
def pullback_of_window_sum(
    node: WindowSum, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    maps = node.maps(lambda own: adjoint(pair_counts(own), own.out, own.inner))
    return [node.carried(cotangent, maps, back=True)]


@cross_by_kind.register(WindowSum)
def cross_by_kind_of_window_sum(
    node: WindowSum, a: View, b: View, frame: Sequence[Axis]
) -> np.ndarray | None:
    """Places of another array over the same grid, against the places that a window reads."""
    x = node.args[0].node
    read = {
        k: (a.bind[o], window)
        for window, k, o in zip(*node.params, strict=True)
        if k is not None and o is not None and (window is None or window.size_out == x.axes[k].size)
    }
    if len(read) < max(len(x.axes), len(node.axes)):  # a stride leaves places out, a border makes some
        return None
    out = cross(View(x, tuple(read[k][0] for k in range(len(x.axes)))), b, frame)
    for place, window in read.values():
        if window is not None:
            axis = frame[place]
            counts = pair_counts(window_map(window, axis, axis), identity_map(axis))
            out = apply_axis(full_along(out, place, axis), place, counts)
    unsure(x.graph, "quadrature", x.near)
    return out


@propagated.register(WindowSum)
def propagated_of_window_sum(node: WindowSum) -> Spread:
    return of_an_average(node, inherited(node.args[0].node))


class WindowMax(WindowSum):
    """Maxima over windows: of whole ones, with the mean and variance of the smaller ones at borders counted in.

    Backward, a cotangent goes to one entry of its window, and entries add up.
    """

    how = "sampled"
    gradient_doubt = LEADING_ORDER

    def prepare(self) -> None:
        super().prepare()
        self.odd = 0


@cross_by_kind.register(WindowMax)
def cross_by_kind_of_window_max(node: WindowMax, a: View, b: View, frame: Sequence[Axis]) -> None:
    return None  # which places are read depends on what is there


_LAWS: Fact[int, np.ndarray] = Fact()  # of maxima, less their mean over their deviation, on the normal grid
_MAXIMA_SORTED = 200_000  # maxima that a law is taken from


@second_moments.register(WindowMax)
def second_moments_of_window_max(node: WindowMax) -> Table:
    """From draws of two windows along each axis, next to one another."""
    windows, xd, od = node.params
    source = node.args[0].node
    real = {k: w for w, k in zip(windows, xd, strict=True) if k is not None and w is not None}
    spans = {k: min((w.taps - 1) * w.dilation + 1, source.axes[k].size) for k, w in real.items()}
    sizes = [
        min(a.size, 2 * real[k].stride + spans[k] if k in real else 2) for k, a in enumerate(source.axes)
    ]
    x = draw(source, sizes, int(np.clip(3e6 / math.prod(sizes), 16, 20_000)), np.random.default_rng(0))
    mean, square = _law(node, x)
    for k, w in real.items():
        view = np.lib.stride_tricks.sliding_window_view(x, spans[k], axis=k + 1)
        x = view[(slice(None),) * (k + 1) + (slice(None, None, w.stride),)][..., :: w.dilation].max(axis=-1)
    line = np.quantile(x.ravel()[:: max(x.size // _MAXIMA_SORTED, 1)], special.ndtr(Z))
    line = line - WEIGHTS @ line
    _LAWS.put(node.graph, node.id, line / max(math.sqrt(WEIGHTS @ line**2), 1e-300))
    kept = [k for k, place in zip(xd, od, strict=True) if k is not None and place is not None]
    x = x.transpose([0, *(1 + k for k in kept), *(1 + k for k in range(len(sizes)) if k not in kept)])
    drawn = pooled_estimate(x.reshape(*x.shape[: 1 + len(kept)], -1)[..., 0], node.axes)
    # Correlations are those of whole windows, means and deviations those of each class.
    correlation = (drawn.second - drawn.total_mean**2) / max(drawn.variance, 1e-300)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    second = means_by_type(mean, node.axes) + correlation * means_by_type(deviation, node.axes)
    out = Table(node.axes, np.array(np.broadcast_to(mean, drawn.mean.shape)), second)
    # Of what a few numbers decide there is no Gaussian tail; what places share does not add to the largest.
    near = near_places(node, out.mean_square, source.table.mean_square)
    node.graph.flag("sampled", bounded(_taps(node), fewest_terms(source)) + lost_excess(source) + near)
    return out


@quantiles_of_kind.register(WindowMax)
def quantiles_of_window_max(root: WindowMax, table: Table, deviation: np.ndarray) -> np.ndarray | None:
    """Maxima are skew: what follows a norm sees it."""
    return table.mean[..., None] + deviation[..., None] * _LAWS.of(root.graph)[root.id]


def _law(node: WindowMax, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square by class of window: of as many places as are in the array, of the mean square that they have."""
    windows, xd, od = node.params
    table, taps = node.args[0].node.table, node.maps(AxisMap.means)
    counts = [np.ones(1) if own is None else np.maximum(own.sum(axis=1), 1.0) for own in taps]
    shares = [None if own is None else own / n[:, None] for own, n in zip(taps, counts, strict=True)]
    squares = node.carried(table.diagonal, shares) / max(table.mean_square, 1e-300)

    @functools.cache
    def moments(places: tuple[int, ...]) -> tuple[float, float]:
        y = x
        for w, k, n in zip(windows, xd, places, strict=True):
            if w is not None and k is not None:
                at = (slice(None),) * (k + 1) + (slice(0, n * w.dilation, w.dilation),)
                y = y[at].max(axis=k + 1, keepdims=True)
        return float(y.mean()), float((y**2).mean())

    cells = itertools.product(*([round(float(n)) for n in own] for own in counts))
    law = np.array([moments(cell) for cell in cells]).T.reshape(2, *map(len, counts))
    mean, square = (by_axis(own, od) for own in law)
    return mean * np.sqrt(squares), square * squares


@pullback.register(WindowMax)
def pullback_of_window_max(
    node: WindowMax, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """Each window feeds one entry, and two that share o of their n entries feed one where it is the largest of all 2n − o."""
    windows, xd, od = node.params
    (spread,) = pullback_of_window_sum(node, cotangent, notes)
    assert spread is not None
    read = zip(windows, dim_axes(node.args[0].node, xd), dim_axes(node, od), strict=True)
    maps = [None if w is None else adjoint(tap_pairs(w, a, o)[0], o, a) for w, a, o in read]
    diagonal = tuple(slice(0, a.classes) for a in node.args[0].node.axes)
    own = node.carried(cotangent, maps, back=True)
    real = [w for w in windows if w is not None]
    taps, steps = _taps(node), [w.taps - w.stride * np.abs(np.arange(-w.taps, w.taps + 1)) for w in real]
    shared = outer(np.maximum(step, 0) for step in steps)
    shared = shared[(shared > 0) & (shared < taps)]
    both = float((shared / (2 * taps - shared)).sum() / max(shared.sum(), 1))
    out = spread / taps**2
    out[diagonal] = own[diagonal] / taps + (spread - own)[diagonal] * both
    return [out]


@pulled_back.register(WindowMax)
def pulled_back_of_window_max(node: WindowMax, i: int, part: Cotangent) -> Cotangent:
    """Of the windows over an entry a share is fed by it, and one window's cotangent goes to one entry."""
    met = math.prod(max(w.taps / w.stride, 1.0) for w in node.params.windows if w is not None)
    return part.with_near(part.near, part.near * (met - 1))


def _window_node(interpreter: Context, eqn: Any, x: Value, kind: type[WindowSum]) -> Value:
    p, aval = eqn.params, eqn.outvars[0].aval
    x = separated(x)
    if repeats(x.node) and interpreter.ask("windows over copies of near places", whole=True):
        return placeholder(interpreter, aval)
    ones = (1,) * len(aval.shape)
    base, dilation = (p.get(name) or ones for name in ("base_dilation", "window_dilation"))
    taps, strides, lows = p["window_dimensions"], p["window_strides"], [low for low, _ in p["padding"]]
    windows = tuple(
        None if w.taps == w.stride == 1 and not any(padding) else w
        for w, padding in zip(
            map(Window, aval.shape, taps, strides, lows, base, dilation), p["padding"], strict=True
        )
    )
    xd = _axes_of(x, range(len(windows)))
    axes, od = _above_one(
        [
            axis if w is None else output_axis(w, axis)
            for w, axis in zip(windows, dim_axes(x.node, xd), strict=True)
        ]
    )
    node = interpreter.graph.make(kind, axes, [x.node.whole], WindowSumParams(windows, xd, od))
    return Value(node, tuple(() if k is None else (Atom(axes[k].size, k),) for k in od))


@rule("reduce_window_sum")
def reduce_window_sum(interpreter: Context, eqn: Any, x: Value) -> Value:
    return _window_node(interpreter, eqn, x, WindowSum)


@rule("reduce_window_max")
def reduce_window_max(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    return of_increasing(x, lambda inner: _window_node(interpreter, eqn, inner, WindowMax))
