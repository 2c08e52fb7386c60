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
    tap_means,
    tap_pairs,
)
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


@second_moments.register(Conv)
def second_moments_of_conv(node: Conv) -> Table:

    groups, windows, xd, wd, od = node.params
    if dependent(*(v.node for v in node.args)):
        # A weight that was applied before is as good as fresh; of data with their own crop the terms may all
        # be equal.
        fresh = weight_of(node) is not None
        node.graph.flag(*("quadrature", 1 / node.width) if fresh else ("assumed", UNKNOWN))
    x, w = (v.node.table for v in node.args)
    second = node.carry(by_dim(x.second, xd), by_dim(w.second, wd))
    mean = np.zeros([1 if k is None else node.axes[k].classes for k in od])
    if np.any(w.mean) and np.any(x.mean):
        x_axes, o_axes = dim_axes(node.args[0].node, xd), dim_axes(node, od)
        term = by_dim(x.mean, xd)
        channels = x_axes[1].counts[: x_axes[1].classes] / groups
        term = np.repeat(np.tensordot(term, channels, axes=(1, 0))[:, None], o_axes[1].classes, axis=1)
        for k, window in enumerate(windows):
            term = apply_axis(term, k + 2, tap_means(window, x_axes[k + 2], o_axes[k + 2]))
        mean = mean + term * w.total_mean
    return Table(node.axes, by_axis(mean, od), by_axis(second, od))


@pullback.register(Conv)
def pullback_of_conv(node: Conv, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    _groups, _windows, xd, wd, od = node.params
    back = node.carry(by_dim(cotangent, od), by_dim(node.args[1].node.table.second, wd), transposed=True)
    return [np.broadcast_to(by_axis(back, xd), node.args[0].node.frame_types), None]


@cross_by_kind.register(Conv)
def cross_by_kind_of_conv(node: Conv, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """One kernel on two inputs."""
    other = b.node
    weights = weight_of(node), weight_of(other)
    if None not in weights and weights[0] is not weights[1]:
        return np.zeros((1,) * len(frame))
    if (
        not isinstance(other, Conv)
        or other.params != node.params
        or a.bind != b.bind
        or other.args[1] != node.args[1]
    ):
        return None
    x, y = node.args[0].node, other.args[0].node
    if x.axes != y.axes:
        return None
    identity = tuple(range(len(x.axes)))
    table = np.broadcast_to(cross(View(x, identity), View(y, identity), x.axes), [ax.types for ax in x.axes])
    second = node.carry(
        by_dim(table, node.params.x_dims), by_dim(node.args[1].node.table.second, node.params.w_dims)
    )
    return lift(by_axis(second, node.params.out_dims), node.axes, a.bind, frame, pairs=True)


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
    taps = math.prod(w.taps for w in windows)
    channels = 1 if xd[1] is None else x.axes[xd[1]].size
    summed = [k for k in xd[1:2] if k is not None]
    spread = combine([(1.0, averaged(x, summed, taps))])
    units = 1 if od[1] is None else node.axes[od[1]].size
    out = with_own_weights(spread, node, node.args[1], x, taps * channels / groups, units)
    if (varied := of_few(node)) is not None:  # what weights of its own add is in the law of its channels
        out = dataclasses.replace(out, sources=spread.sources, shape=out.shape + (1 - 1 / taps) * varied)
    return dataclasses.replace(out, shape=out.shape + of_a_group(x, summed, groups) / taps)


@scatter_of.register(Conv)
def scatter_of_conv(node: Conv) -> np.ndarray | None:
    _, windows, xd, _, od = node.params
    taps = math.prod(w.taps for w in windows)
    weights = node.args[1].node
    if taps == 1 or not isinstance(weights, Leaf) or not weights.odd:
        return None
    inputs = dim_axes(node.args[0].node, xd)
    meeting, same = np.ones([1] * len(node.axes)), np.ones([1] * len(node.axes), bool)
    for dim, k in enumerate(od):
        if k is None:
            continue
        axis = node.axes[k]
        own = np.arange(axis.types) < axis.classes
        line = own.astype(float)
        if dim >= 2:  # of two places along a spatial axis, the pairs of taps that read one input
            one_tap, two_taps = tap_pairs(windows[dim - 2], inputs[dim], axis)
            line = (one_tap + two_taps)[:, : inputs[dim].classes].sum(axis=1)
        shape = [1] * len(node.axes)
        shape[k] = -1
        meeting, same = meeting * line.reshape(shape), same & own.reshape(shape)
    x = node.args[0].node
    met = meeting * node.width / taps * (1 + excess_kurtosis(x) / 2) * _own_part_of_input(x, xd) ** 2
    return np.where(same, 0.0, met / (node.width * (node.width + weights.kurtosis - 1)))


def axes_of(x: Value, order: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(x.dims[d][0].axis if x.dims[d] else None for d in order)


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
    if repeats(w.node) and interpreter.ask("a kernel that repeats itself", whole=True):
        return placeholder(interpreter, eqn.outvars[0].aval)
    cx, x = without_factor(x)
    cw, w = without_factor(w)
    x, w = layout.separated(x), layout.separated(w)
    dims = p["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    xd, wd = axes_of(x, dims.lhs_spec), axes_of(w, dims.rhs_spec)
    windows = tuple(
        Window(shape[dims.out_spec[k + 2]], w.shape[dims.rhs_spec[k + 2]], s, pad[0], ld, rd)
        for k, (s, pad, ld, rd) in enumerate(
            zip(p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
        )
    )
    logical = [
        x.node.axes[xd[0]] if xd[0] is not None else ONE,
        w.node.axes[wd[0]] if wd[0] is not None else ONE,
    ]
    logical += [
        output_axis(win, x.node.axes[k] if k is not None else ONE)
        for win, k in zip(windows, xd[2:], strict=True)
    ]
    axes, od = axes_above_one(logical)
    views = [View(x.node, tuple(range(len(x.node.axes)))), View(w.node, tuple(range(len(w.node.axes))))]
    node = interpreter.graph.make(
        Conv, axes, views, ConvParams(p["feature_group_count"], windows, xd, wd, od)
    )
    out: list[tuple[Atom, ...]] = [()] * len(shape)
    for k, d in enumerate(dims.out_spec):
        place = od[k]
        out[d] = (Atom(shape[d], place),) if place is not None else ()

    return Value(affine(node, cx * cw, 0.0), tuple(out))
