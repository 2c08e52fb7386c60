"""Convolutions: contractions over taps, of which those beyond the border of the input do not count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis
from varscale.theory.domain.tables import Table, lift
from varscale.theory.graph import layout
from varscale.theory.graph.convolutions import (
    ONE,
    Conv,
    ConvParams,
    Window,
    by_axis,
    by_dim,
    dim_axes,
    output_axis,
    tap_pairs,
    window_map,
)
from varscale.theory.graph.known_arrays import is_known_array
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.propagation.cross_moments import cross, dependent
from varscale.theory.propagation.fluctuations import averaged, of_a_group, with_own_weights
from varscale.theory.propagation.fourth_moments import excess_kurtosis
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, propagated
from varscale.theory.propagation.marginals import scatter_of
from varscale.theory.propagation.pullbacks import repeats
from varscale.theory.propagation.shared_component import of_few
from varscale.theory.rules.linear import without_factor
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
    if dependent(x, w):
        # A weight that was applied before is as good as fresh; of data with their own crop the terms may all
        # be equal.
        fresh = weight_of(node) is not None
        node.graph.flag(*("quadrature", 1 / node.width) if fresh else ("assumed", UNKNOWN))
    mean = np.zeros([a.classes for a in node.axes])
    if np.any(w.table.mean) and np.any(x.table.mean):
        x_axes, o_axes = dim_axes(x, xd), dim_axes(node, od)
        channels = x_axes[1].counts[: x_axes[1].classes] / groups
        term = np.tensordot(by_dim(x.table.mean, xd), channels, axes=(1, 0))[:, None]
        term = np.repeat(term, o_axes[1].classes, axis=1)
        for k, window in enumerate(windows):
            term = apply_axis(term, k + 2, window_map(window, x_axes[k + 2], o_axes[k + 2]).means())
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
    weights = weight_of(node), weight_of(b.node)
    if None not in weights and weights[0] is not weights[1]:
        return np.zeros((1,) * len(frame))
    same = isinstance(b.node, Conv) and (b.node.params, b.node.args[1]) == (node.params, node.args[1])
    x = node.args[0].node
    if not same or a.bind != b.bind or b.node.args[0].node.axes != x.axes:
        return None
    table = cross(x.whole, b.node.args[0].node.whole, x.axes)
    second = _carried(node, np.broadcast_to(table, x.frame_types))
    return lift(second, node.axes, a.bind, frame, pairs=True)


def _own_part_of_input(x: Node, dims: Sequence[int | None]) -> float:
    """The part of the mean square of a convolution's input that is not common to all places."""
    common = x.table.second
    places = [k for k in dims[2:] if k is not None]
    for k in reversed(range(len(x.axes))):
        common = contract_axis(common, k, x.axes[k].different if k in places else x.axes[k].same)
    return float(np.clip(1 - float(common) / max(x.table.mean_square, 1e-300), 0.0, 1.0)) if places else 1.0


@propagated.register(Conv)
def propagated_of_conv(node: Conv) -> Spread:
    x = node.args[0].node
    groups, windows, xd, _, od = node.params
    taps, summed = math.prod(w.taps for w in windows), [k for k in xd[1:2] if k is not None]
    spread = combine([(1.0, averaged(x, summed, taps))])
    units = 1 if od[1] is None else node.axes[od[1]].size
    out = with_own_weights(spread, node, node.args[1], x, node.width, units)
    if (varied := of_few(node)) is not None:  # what weights of its own add is in the law of its channels
        out = dataclasses.replace(out, sources=spread.sources, shape=out.shape + (1 - 1 / taps) * varied)
    return dataclasses.replace(out, shape=out.shape + of_a_group(x, summed, groups) / taps)


@scatter_of.register(Conv)
def scatter_of_conv(node: Conv) -> np.ndarray | None:
    _, windows, xd, _, od = node.params
    taps = math.prod(w.taps for w in windows)
    x, weights = (view.node for view in node.args)
    if taps == 1 or not isinstance(weights, Leaf) or not weights.odd:
        return None
    inputs = dim_axes(x, xd)
    meeting, same = np.ones([1] * len(node.axes)), np.ones([1] * len(node.axes), bool)
    for dim, k in enumerate(od):
        if k is None:
            continue
        axis, shape = node.axes[k], [-1 if j == k else 1 for j in range(len(node.axes))]
        line = axis.agrees.astype(float)
        if dim >= 2:  # of two places along a spatial axis, the pairs of taps that read one input
            pairs = np.add(*tap_pairs(windows[dim - 2], inputs[dim], axis))
            line = pairs[:, : inputs[dim].classes].sum(axis=1)
        meeting, same = meeting * line.reshape(shape), same & axis.agrees.reshape(shape)
    met = meeting * node.width / taps * (1 + excess_kurtosis(x) / 2) * _own_part_of_input(x, xd) ** 2
    return np.where(same, 0.0, met / (node.width * (node.width + weights.kurtosis - 1)))


def axes_above_one(logical: Sequence[Axis]) -> tuple[list[Axis], tuple[int | None, ...]]:
    """The axes of more than one position, and the place of each dimension's among them (None: it has one position)."""
    axes = [axis for axis in logical if axis.size > 1]
    places = iter(range(len(axes)))
    return axes, tuple(next(places) if axis.size > 1 else None for axis in logical)


@rule("conv_general_dilated")
def conv(interpreter: Context, eqn: Any, x: Value, w: Value) -> Any:
    """A convolution of weights; one whose kernel is made of inputs, or differs from sample to sample, is drawn."""
    p = eqn.params
    if p["batch_group_count"] != 1 or w.node.deps & interpreter.graph.inputs:
        return drawn_region(interpreter, eqn, (x, w), "its kernel is no weight")
    taps = math.prod(w.shape[k] for k in p["dimension_numbers"].rhs_spec[2:])
    smooth = taps > 1 and x.node.near == 1 and is_known_array(x.node)
    if (smooth and interpreter.ask("windows over given places that are alike", whole=True)) or (
        repeats(w.node) and interpreter.ask("a kernel that repeats itself", whole=True)
    ):
        return placeholder(interpreter, eqn.outvars[0].aval)
    cx, x = without_factor(x)
    cw, w = without_factor(w)
    x, w = layout.separated(x), layout.separated(w)
    dims, shape = p["dimension_numbers"], eqn.outvars[0].aval.shape
    xd, wd = (
        tuple(v.dims[d][0].axis if v.dims[d] else None for d in order)
        for v, order in ((x, dims.lhs_spec), (w, dims.rhs_spec))
    )
    read, weights = (
        [ONE if k is None else v.node.axes[k] for k in places] for v, places in ((x, xd), (w, wd))
    )
    windows = tuple(
        Window(shape[d], w.shape[e], stride, low, dilation, apart)
        for d, e, stride, (low, _), dilation, apart in zip(
            dims.out_spec[2:],
            dims.rhs_spec[2:],
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            strict=True,
        )
    )
    axes, od = axes_above_one([read[0], weights[0], *map(output_axis, windows, read[2:])])
    views = [v.node.whole for v in (x, w)]
    params = ConvParams(p["feature_group_count"], windows, xd, wd, od)
    node = interpreter.graph.make(Conv, axes, views, params)
    out = {d: () if k is None else (Atom(shape[d], k),) for d, k in zip(dims.out_spec, od, strict=True)}
    return Value(affine(node, cx * cw, 0.0), tuple(out[d] for d in range(len(shape))))
