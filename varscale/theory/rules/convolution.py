"""Convolutions, and sums and maxima over windows: which taps of which places meet; those beyond the border do not count.

Maxima are drawn, and their cotangents spread evenly.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axes, apply_axis, contract_axes, equal, outer
from varscale.theory.domain.axis_maps import AxisMap, adjoint, cotangent_counts, pair_counts
from varscale.theory.domain.tables import Table, means_by_type, table_over
from varscale.theory.graph.convolutions import (
    Conv,
    ConvParams,
    Window,
    WindowMax,
    WindowSum,
    WindowSumParams,
    by_axis,
    by_dim,
    dim_axes,
    output_axis,
    tap_pairs,
    taps_of,
    window_map,
)
from varscale.theory.graph.known_arrays import is_known_array
from varscale.theory.graph.layout import Atom, Value, separated, transpose
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node, pullback, second_moments
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import BackwardNotes, Flows
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.cross_moments import dependent
from varscale.theory.propagation.fourth_moments import excess_kurtosis
from varscale.theory.propagation.marginals import quantiles_of_kind, scatter_of
from varscale.theory.propagation.pullbacks import repeats
from varscale.theory.propagation.sampler import draw, pooled_estimate
from varscale.theory.rules.elementwise import fewest_terms, of_increasing, tail_excess
from varscale.theory.rules.linear import product, without_factor
from varscale.theory.rules.registry import Context, rule


@second_moments.register
def second_moments_of_conv(node: Conv) -> Table:
    groups, windows, xd, _, od = node.params
    x, w = node.sources
    # A kernel applied before is as good as fresh; of data and a crop of them, terms may be equal.
    if dependent(x, w):
        fresh = weight_of(node) is not None
        node.graph.flag(*("quadrature", 1 / node.width) if fresh else ("assumed", UNKNOWN))
    (_, channels, *places), (_, features, *out) = dim_axes(x, xd), dim_axes(node, od)
    mean = by_dim(x.table.mean, xd) * w.table.total_mean
    maps = (read.means() for read in map(window_map, windows, places, out))
    for k, matrix in enumerate((np.tile(channels.counts / groups, (features.classes, 1)), *maps), 1):
        mean = apply_axis(mean, k, matrix)
    return table_over(node.axes, by_axis(mean, od), node.carry(x.table.second))


@pullback.register
def pullback_of_conv(node: Conv, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    return [node.carry(cotangent, transposed=True), None]


@scatter_of.register
def scatter_of_conv(node: Conv) -> np.ndarray | None:
    (x, weights), (_, windows, xd, _, od) = node.sources, node.params
    taps, inputs = taps_of(node), dim_axes(x, xd)
    if taps == 1 or not isinstance(weights, Leaf) or not weights.odd:
        return None
    # Of two places along a spatial axis, the pairs of taps that read one input.
    lines = [
        axis.agrees
        if (dim := od.index(k)) < 2
        else np.add(*tap_pairs(windows[dim - 2], inputs[dim], axis))[:, : inputs[dim].classes].sum(axis=1)
        for k, axis in enumerate(node.axes)
    ]
    meeting, same = outer(lines), outer(axis.agrees for axis in node.axes)
    # The part of the input's mean square that is not common to all places.
    kinds = {k: axis.different if k in xd[2:] else axis.same for k, axis in enumerate(x.axes)}
    common = contract_axes(x.table.second, kinds) / x.table.divisor
    own = np.clip(1 - common, 0.0, 1.0) if any(k is not None for k in xd[2:]) else 1.0
    met = meeting * (1 + excess_kurtosis(x) / 2) * own**2
    return np.where(same, 0.0, met / (taps * (node.width + weights.kurtosis - 1)))


def _axes_of(x: Value, order: Sequence[int]) -> tuple[int | None, ...]:
    """The axis of each dimension of a value, in this order; None of one of size 1."""
    return tuple(x.dims[d][0].axis if x.dims[d] else None for d in order)


def _window_node(args: Sequence[Value], kind: type[Node], out: Axes, params: Callable[..., Any]) -> Value:
    """A node whose dimensions are over axes, some of one position; its parameters end with their places among its own."""
    axes, places = [axis for axis in out if axis.size > 1], itertools.count()
    od = tuple(next(places) if axis.size > 1 else None for axis in out)
    node = args[0].node.graph.make(kind, axes, [x.node.whole for x in args], params(od))
    return Value(node, tuple(() if k is None else (Atom(axes[k].size, k),) for k in od))


@rule("conv_general_dilated")
def conv(interpreter: Context, eqn: Any, x: Value, w: Value) -> Value:
    """A convolution of weights; one whose kernel is made of inputs, or differs from sample to sample, is drawn."""
    p, aval = eqn.params, eqn.outvars[0].aval
    in_spec, w_spec, out_spec = p["dimension_numbers"]
    if p["batch_group_count"] != 1 or w.node.deps & interpreter.graph.inputs:
        raise NotImplementedError("its kernel is no weight")
    outputs, taps = [aval.shape[d] for d in out_spec[2:]], [w.shape[d] for d in w_spec[2:]]
    same = in_spec == out_spec and outputs == [x.shape[d] for d in in_spec[2:]]
    if same and in_spec[1] == len(outputs) + 1 and p["feature_group_count"] == math.prod(taps) == 1:
        matrix = Value(w.node, (w.dims[w_spec[1]], w.dims[w_spec[0]]))  # channels are last
        return product(interpreter, x, matrix, (in_spec[1:2], (0,)))
    (cx, x), (cw, w) = without_factor(x), without_factor(w)
    kernel, x, w, groups = interpreter.concrete(w), separated(x), separated(w), p["feature_group_count"]
    known = kernel is not None and math.prod(taps) > 1 and groups == w.shape[w_spec[0]]
    lines = _factors(kernel.transpose(w_spec)) if kernel is not None and known else None
    smooth = math.prod(taps) > 1 and x.node.near == 1 and is_known_array(x.node)
    alike = repeats(w.node) or (not w.node.deps and repeats(x.node))
    if smooth or alike or (known and lines is None):
        interpreter.ask("windows over near places that are alike, or a known kernel", whole=True)
    lows = [low for low, _ in p["padding"]]
    read = map(Window, outputs, taps, p["window_strides"], lows, p["lhs_dilation"], p["rhs_dilation"])
    windows, xd, wd = tuple(read), _axes_of(x, in_spec), _axes_of(w, w_spec)
    params, kind, args = partial(ConvParams, groups, windows, xd, wd), Conv, [x, w]
    (batch, channels, *places), (features, *_) = dim_axes(x.node, xd), dim_axes(w.node, wd)
    if lines is not None:
        windows = tuple(own._replace(weights=tuple(line)) for own, line in zip(windows, lines, strict=True))
        params, kind, args = partial(WindowSumParams, (None, None, *windows), xd), WindowSum, [x]
        features = channels
    out = [batch, features, *map(output_axis, windows, places)]
    made = transpose(_window_node(args, kind, out, params), np.argsort(out_spec).tolist())
    return Value(affine(made.node, cx * cw, 0.0), made.dims)


def _factors(kernel: np.ndarray) -> list[np.ndarray] | None:
    """The factors, by axis of its taps, of a known kernel that is their product, for every channel the same; None of others."""
    first = kernel[0, 0]
    top = np.unravel_index(np.abs(first).argmax(), first.shape)
    lines = [first[(*top[:d], slice(None), *top[d + 1 :])] / (first[top] or 1) for d in range(first.ndim)]
    lines[0] = lines[0] * first[top]
    is_product = kernel.shape[1] == 1 and np.allclose(kernel, outer(lines), atol=1e-6 * abs(first[top]))
    return lines if is_product else None


def near_places(node: WindowSum, second: float, alike: float) -> float:
    """How far near places, more alike than any two, go from a mean square to what it is where all places are `alike`."""
    near = node.argument.near
    if near == 1 and not node.graph.undrawn:
        raise NotImplementedError("windows over known numbers, of which near ones may be more alike")
    return near * abs(alike / max(second, 1e-300) - 1)


@second_moments.register
def second_moments_of_window_sum(node: WindowSum) -> Table:
    table = node.argument.table
    mean = node.carried(table.mean, node.maps(AxisMap.means))
    out = Table(node.axes, mean, node.carried(table.second, node.maps(pair_counts)))
    whole = math.prod(w.line.sum() ** 2 for w in node.params.windows if w is not None)
    if doubt := near_places(node, out.mean_square, whole * table.mean_square):
        node.graph.flag("quadrature", doubt)
    return out


@pullback.register
def pullback_of_window_sum(node: WindowSum, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    return [node.carried(cotangent, node.maps(cotangent_counts), back=True)]


_MAXIMA_SORTED = 200_000  # maxima that a law is taken from


@second_moments.register
def second_moments_of_window_max(node: WindowMax) -> Table:
    """From draws of two windows along each axis, next to one another."""
    source, (windows, xd, od) = node.argument, node.params
    read = list(zip(windows, dim_axes(source, xd), strict=True))
    spans = [1 if w is None else min((w.taps - 1) * w.dilation + 1, axis.size) for w, axis in read]
    sizes = [min(a.size, 2 if w is None else 2 * w.stride + n) for (w, a), n in zip(read, spans, strict=True)]
    dims = (0, *(None if k is None else k + 1 for k in xd))
    x = by_dim(draw(source, [sizes[xd.index(k)] for k in range(len(source.axes))]), dims)
    mean, square = _law(node, x)
    for d, (w, span) in enumerate(zip(windows, spans, strict=True), 1):
        if w is not None:
            places = np.lib.stride_tricks.sliding_window_view(x, span, axis=d)
            x = places[(slice(None),) * d + (slice(None, None, w.stride),)][..., :: w.dilation].max(axis=-1)
    line = np.quantile(by_axis(x, dims).ravel()[:: max(x.size // _MAXIMA_SORTED, 1)], special.ndtr(Z))
    line = line - WEIGHTS @ line
    node.law = line / max(math.sqrt(WEIGHTS @ line**2), 1e-300)
    whole = pooled_estimate(x[:, *(0 if k is None else slice(None) for k in od)], node.axes)
    # Correlations are those of whole windows, means and deviations those of each class.
    correlation = (whole.second - whole.total_mean**2) / max(whole.variance, 1e-300)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    second = means_by_type(mean, node.axes) + correlation * means_by_type(deviation, node.axes)
    out = table_over(node.axes, mean, second)
    # Of what a few numbers decide there is no Gaussian tail; what places share does not add to the largest.
    near = near_places(node, out.mean_square, source.table.mean_square)
    node.graph.flag("sampled", tail_excess(taps_of(node), fewest_terms(source)) + near)
    return out


@quantiles_of_kind.register
def quantiles_of_window_max(root: WindowMax, table: Table, deviation: np.ndarray) -> np.ndarray | None:
    """Maxima are skew: what follows a norm sees it."""
    return table.mean[..., None] + deviation[..., None] * root.law


def _law(node: WindowMax, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square by class of window: of as many places as are in the array, of the mean square that they have."""
    windows, table, taps = node.params.windows, node.argument.table, node.maps(AxisMap.means)
    counts = node.entries()
    shares = [None if own is None else own / n[:, None] for own, n in zip(taps, counts, strict=True)]
    squares = node.carried(table.diagonal, shares) / table.divisor

    @cache
    def moments(places: tuple[int, ...]) -> tuple[float, float]:
        y = x
        for d, (w, n) in enumerate(zip(windows, places, strict=True), 1):
            if w is not None:
                at = (slice(None),) * d + (slice(0, n * w.dilation, w.dilation),)
                y = y[at].max(axis=d, keepdims=True)
        return float(y.mean()), float((y**2).mean())

    cells = itertools.product(*(map(round, own) for own in counts))
    law = np.array(list(map(moments, cells))).T.reshape(2, *map(len, counts))
    mean, square = (by_axis(own, node.params.out_dims) for own in law)
    return mean * np.sqrt(squares), square * squares


@pullback.register
def pullback_of_window_max(node: WindowMax, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Each window feeds one of its n entries, and two that share o feed one where it is the largest of all 2n − o."""
    (windows, xd, od), x, taps = node.params, node.argument, taps_of(node)
    read = zip(windows, dim_axes(x, xd), dim_axes(node, od), strict=True)
    same = [None if w is None else adjoint(tap_pairs(w, a, o)[0], o, a) for w, a, o in read]
    n = np.broadcast_to(by_axis(outer(node.entries()), od), [axis.classes for axis in node.axes])
    cotangent = cotangent * np.sqrt(means_by_type(taps / n, node.axes))
    own, spread = (node.carried(cotangent, maps, back=True) for maps in (same, node.maps(cotangent_counts)))
    diagonal = equal(x.axes)
    overlaps = (w.taps - w.stride * np.abs(np.arange(-w.taps, w.taps + 1)) for w in windows if w is not None)
    shared = outer(np.maximum(overlap, 0) for overlap in overlaps)
    shared = shared[(shared > 0) & (shared < taps)]
    both = (shared / (2 * taps - shared)).sum() / max(shared.sum(), 1)
    out = spread / taps**2
    out[diagonal] = own[diagonal] / taps + (spread - own)[diagonal] * both
    return [out]


@rule("reduce_window_sum", "reduce_window_max")
def reduce_window(interpreter: Context, eqn: Any, x: Value, *_: Value) -> Value:
    """Sums over windows, or maxima, of an increasing function those of its argument."""
    p, aval = eqn.params, eqn.outvars[0].aval

    def pooled(x: Value, kind: type[WindowSum] = WindowMax) -> Value:
        x, ones = separated(x), (1,) * len(aval.shape)
        if repeats(x.node):
            interpreter.ask("windows over near places that are alike", whole=True)
        strides, lows = p["window_strides"], [low for low, _ in p["padding"]]
        dilations = (p.get(name) or ones for name in ("base_dilation", "window_dilation"))
        read = map(Window, aval.shape, p["window_dimensions"], strides, lows, *dilations)
        pairs = zip(read, p["padding"], strict=True)
        windows = tuple(None if w.taps == w.stride == 1 and not any(ends) else w for w, ends in pairs)
        xd = _axes_of(x, range(len(windows)))
        inner = dim_axes(x.node, xd)
        out = [a if w is None else output_axis(w, a) for w, a in zip(windows, inner, strict=True)]
        return _window_node([x], kind, out, partial(WindowSumParams, windows, xd))

    return pooled(x, WindowSum) if eqn.primitive.name == "reduce_window_sum" else of_increasing(x, pooled)
