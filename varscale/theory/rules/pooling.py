"""Pooling: sums over windows count pairs of taps as convolutions do; maxima are sampled, their cotangents spread evenly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, apply_axis
from varscale.theory.domain.axis_maps import AxisMap, adjoint, identity_map, pair_counts
from varscale.theory.domain.tables import LEADING_ORDER, Table, full_along, means_by_type
from varscale.theory.graph.convolutions import (
    ONE,
    Window,
    WindowSum,
    WindowSumParams,
    dim_axes,
    output_axis,
    tap_pairs,
    window_map,
)
from varscale.theory.graph.layout import Atom, Value, separated
from varscale.theory.graph.nodes import View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.cross_moments import cross, unsure
from varscale.theory.propagation.doubts import lost_excess
from varscale.theory.propagation.inherited_fluctuations import Spread, inherited, propagated
from varscale.theory.propagation.marginals import quantiles_of_kind
from varscale.theory.propagation.pullbacks import Near, pulled_back, repeats
from varscale.theory.propagation.shared_component import of_an_average
from varscale.theory.rules.convolution import axes_above_one
from varscale.theory.rules.reductions import bounded, draw, fewest_terms, of_increasing, pooled_estimate
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import placeholder


@second_moments.register(WindowSum)
def second_moments_of_window_sum(node: WindowSum) -> Table:
    table = node.args[0].node.table
    mean = node.carried(table.mean, node.maps(AxisMap.means))
    out = Table(node.axes, mean, node.carried(table.second, node.maps(pair_counts)))
    taps = math.prod(w.taps for w in node.params.windows if w is not None)
    if doubt := near_places(node, out.mean_square, taps**2 * table.mean_square):
        node.graph.flag("quadrature", doubt)
    return out


def near_places(node: WindowSum, second: float, alike: float) -> float:
    """How far a mean square may be off for near places being more alike than any two, which is all that types of pairs know.

    Args:
        node: sums or maxima over windows.
        second: their mean square, of places that are as alike as any two.
        alike: the same, were all places of a window one; near ones go a share `near` of the way.

    Raises:
        NotImplementedError: known numbers are in what the windows read, of which near ones may be one.
    """
    near = node.args[0].node.near
    if near == 1:
        raise NotImplementedError(
            "windows over known numbers, of which near ones may be more alike than others"
        )
    return near * abs(alike / max(second, 1e-300) - 1)


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
    windows, xd, od = node.params
    x, read = node.args[0].node, {}
    for window, k, o in zip(windows, xd, od, strict=True):
        if k is not None and o is not None and (window is None or window.size_out == x.axes[k].size):
            read[k] = (a.bind[o], window)
        elif k != o:  # the only place of an axis is no axis of the frame; a stride leaves places out
            return None
    if len(read) < len(x.axes):
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
def cross_by_kind_of_window_max(
    node: WindowMax, a: View, b: View, frame: Sequence[Axis]
) -> np.ndarray | None:
    return None  # which places are read depends on what is there


@second_moments.register(WindowMax)
def second_moments_of_window_max(node: WindowMax) -> Table:

    windows, xd, od = node.params
    source = node.args[0].node
    x, cut = _drawn_windows(node)
    law = _law(node, x)
    for k, (span, step, dilation) in cut.items():
        view = np.lib.stride_tricks.sliding_window_view(x, span, axis=k + 1)
        x = view[..., ::dilation].max(axis=-1)
        x = np.moveaxis(np.moveaxis(x, k + 1, 0)[::step], 0, k + 1)
    _LAWS.put(node.graph, node.id, _standardized(x))
    by_axis = dict(zip(xd, od, strict=True))
    places = [by_axis[k] for k in range(len(source.axes))]
    x = x[(slice(None), *(0 if place is None else slice(None) for place in places))]
    order = np.argsort([place for place in places if place is not None])
    drawn = pooled_estimate(x.transpose([0, *(1 + order)]), node.axes)
    out = _with_law(drawn, *law)
    # Of what a few numbers decide there is no Gaussian tail; what places share does not add to the largest.
    taps = math.prod(w.taps for w in windows if w is not None)
    near = near_places(node, out.mean_square, source.table.mean_square)
    node.graph.flag("sampled", bounded(taps, fewest_terms(source)) + lost_excess(source) + near)
    return out


_LAWS: Fact[int, np.ndarray] = Fact()  # of maxima, less their mean over their deviation, on the normal grid
_MAXIMA_SORTED = 200_000  # maxima that a law is taken from


def _standardized(x: np.ndarray) -> np.ndarray:
    """Quantiles of draws on the normal grid, of mean 0 and variance 1."""
    line = np.quantile(x.ravel()[:: max(x.size // _MAXIMA_SORTED, 1)], special.ndtr(Z))
    line = line - WEIGHTS @ line
    return line / max(math.sqrt(WEIGHTS @ line**2), 1e-300)


@quantiles_of_kind.register(WindowMax)
def quantiles_of_window_max(root: WindowMax, table: Table, deviation: np.ndarray) -> np.ndarray | None:
    """Maxima are skew: what follows a norm sees it."""
    return table.mean[..., None] + deviation[..., None] * _LAWS.of(root.graph)[root.id]


def _drawn_windows(node: WindowMax) -> tuple[np.ndarray, dict[int, tuple[int, int, int]]]:
    """Draws of two windows along each axis, next to one another, and how each is cut into them: span, step, dilation."""
    source = node.args[0].node
    windows = {k: w for w, k in zip(*node.params[:2], strict=True) if k is not None and w is not None}
    sizes, cut = [min(axis.size, 2) for axis in source.axes], {}
    for k, w in windows.items():
        span = min((w.taps - 1) * w.dilation + 1, source.axes[k].size)
        sizes[k] = min(source.axes[k].size, 2 * w.stride + span)
        cut[k] = (span, w.stride, w.dilation)
    replicates, rng = int(np.clip(3e6 / math.prod(sizes), 16, 20_000)), np.random.default_rng(0)
    return draw(source, sizes, replicates, rng), cut


def _law(node: WindowMax, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square by class of window: of as many places as are in the array, of the mean square that they have."""
    windows, xd, od = node.params
    source = node.args[0].node
    maps: list[np.ndarray | None] = []
    reals: dict[int, np.ndarray] = {}  # by axis: how many places of a window there are, by its class
    for window, k, axis in zip(windows, xd, dim_axes(node, od), strict=True):
        taps = None if window is None or k is None else window_map(window, source.axes[k], axis).means()
        if taps is not None and k is not None:
            reals[k] = np.maximum(taps.sum(axis=1), 1.0)
            taps = taps / reals[k][:, None]
        maps.append(taps)
    squares = node.carried(source.table.diagonal, maps) / max(source.table.mean_square, 1e-300)
    dilations = {k: w.dilation for k, w in zip(xd, windows, strict=True) if w is not None}

    @functools.cache
    def moments(counts: tuple[int, ...]) -> tuple[float, float]:
        y = x
        for k, m in zip(reals, counts, strict=True):
            at = (slice(None),) * (k + 1) + (slice(0, m * dilations[k], dilations[k]),)
            y = y[at].max(axis=k + 1, keepdims=True)
        return float(y.mean()), float((y**2).mean())

    shape = [len(reals[k]) if k in reals else 1 for k in range(len(source.axes))]
    law = np.empty([2, *shape])
    for cell in np.ndindex(*shape):
        law[(slice(None), *cell)] = moments(tuple(round(float(real[cell[k]])) for k, real in reals.items()))
    mean, square = (node.carried(y, []) for y in law)
    return mean * np.sqrt(squares), square * squares


@pullback.register(WindowMax)
def pullback_of_window_max(
    node: WindowMax, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    taps = math.prod(w.taps for w in node.params.windows if w is not None)
    (spread,) = pullback_of_window_sum(node, cotangent, notes)
    assert spread is not None
    # Each window feeds one entry: of the pairs of taps those of one window and one entry remain, and of two
    # windows that share o of their n entries those of one, which is the largest of all 2n − o.
    windows, xd, od = node.params
    read = zip(windows, dim_axes(node.args[0].node, xd), dim_axes(node, od), strict=True)
    maps = [None if w is None else adjoint(tap_pairs(w, a, o)[0], o, a) for w, a, o in read]
    diagonal = tuple(slice(0, a.classes) for a in node.args[0].node.axes)
    own = node.carried(cotangent, maps, back=True)
    windows = [w for w in node.params.windows if w is not None]
    steps = [w.taps - w.stride * np.abs(np.arange(-w.taps, w.taps + 1)) for w in windows]
    shared = functools.reduce(np.multiply.outer, [np.maximum(step, 0) for step in steps])
    shared = shared[(shared > 0) & (shared < taps)]
    both = float((shared / (2 * taps - shared)).sum() / max(shared.sum(), 1))
    out = spread / taps**2
    out[diagonal] = own[diagonal] / taps + (spread - own)[diagonal] * both
    return [out]


@pulled_back.register(WindowMax)
def pulled_back_of_window_max(node: WindowMax, i: int, excess: float, back: np.ndarray) -> Near:
    """Of the windows over an entry a share is fed by it, and one window's cotangent goes to one entry."""
    met = math.prod(max(w.taps / w.stride, 1.0) for w in node.params.windows if w is not None)
    return Near(excess, excess * (met - 1))


def _with_law(table: Table, mean: np.ndarray, square: np.ndarray) -> Table:
    """A table of one class an axis with the means and variances of the classes that there are, correlations kept."""
    old = float(table.mean.flat[0])
    correlation = (table.second - old**2) / max(table.mean_square - old**2, 1e-300)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    second = means_by_type(mean, table.axes) + correlation * means_by_type(deviation, table.axes)
    return Table(table.axes, np.array(np.broadcast_to(mean, table.mean.shape)), second)


def _window_node(interpreter: Context, eqn: Any, x: Value, kind: type[WindowSum]) -> Value:
    p = eqn.params
    shape = eqn.outvars[0].aval.shape
    x = separated(x)
    if repeats(x.node) and interpreter.ask("windows over copies of near places", whole=True):
        return placeholder(interpreter, eqn.outvars[0].aval)
    rank = len(shape)
    dilation = p.get("window_dilation") or (1,) * rank
    base = p.get("base_dilation") or (1,) * rank
    windows = tuple(
        None if w == 1 and s == 1 and not any(pad) else Window(n, w, s, pad[0], b, d)
        for n, w, s, pad, b, d in zip(
            shape, p["window_dimensions"], p["window_strides"], p["padding"], base, dilation, strict=True
        )
    )
    xd = tuple(dim[0].axis if dim else None for dim in x.dims)
    read = [ONE if k is None else x.node.axes[k] for k in xd]
    axes, od = axes_above_one(
        [axis if w is None else output_axis(w, axis) for w, axis in zip(windows, read, strict=True)]
    )
    node = interpreter.graph.make(kind, axes, [x.node.whole], WindowSumParams(windows, xd, od))
    return Value(node, tuple((Atom(n, k),) if k is not None else () for n, k in zip(shape, od, strict=True)))


@rule("reduce_window_sum")
def reduce_window_sum(interpreter: Context, eqn: Any, x: Value) -> Value:
    return _window_node(interpreter, eqn, x, WindowSum)


@rule("reduce_window_max")
def reduce_window_max(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    return of_increasing(interpreter, x, lambda inner: _window_node(interpreter, eqn, inner, WindowMax))


@rule("reduce_window_min")
def reduce_window_min(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    """A minimum is the maximum of the negative, with its sign turned."""
    largest = _window_node(interpreter, eqn, interpreter.elementwise("neg", x), WindowMax)
    return interpreter.elementwise("neg", largest)
