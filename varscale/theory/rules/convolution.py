"""Convolutions: contractions over taps, of which those beyond the border of the input do not count."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis, grouped
from varscale.theory.domain.tables import Table
from varscale.theory.graph import layout
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node, View
from varscale.theory.interpreter.interpreter import Interpreter, rule
from varscale.theory.propagation.few_terms import kurtosis
from varscale.theory.propagation.fluctuations import Spread, averaged, combine, handed_on, of_a_group, with_own_weights
from varscale.theory.propagation.shared_component import of_few
from varscale.theory.propagation.window_overlaps import scatter_of

ONE = Axis(1)  # a dimension of size 1: only the type "same"
# Set on the validation grid, not derived: of a gradient through sums of n terms, n times this.
_FEW_TERMS = 1.5


class Window(NamedTuple):
    """How one spatial axis is read."""

    size_out: int
    taps: int
    stride: int
    low: int
    input_dilation: int
    dilation: int


@functools.cache
def hits(window: Window, size_in: int) -> np.ndarray:
    """Input position of each (output position, tap), −1 where there is none."""
    n, taps, stride, low, input_dilation, dilation = window
    at = np.arange(n)[:, None] * stride - low + np.arange(taps)[None] * dilation
    real = (at >= 0) & (at % input_dilation == 0) & (at // input_dilation < size_in)
    return np.where(real, at // input_dilation, -1)


@functools.cache
def output_axis(window: Window, axis: Axis) -> Axis:
    """Output positions classed by their taps in each class of the input; of too many kinds, those with as many merge first."""
    at = hits(window, axis.size)
    seen = np.stack([((at >= 0) & (axis.label_array[at] == c)).sum(axis=1) for c in range(axis.classes)], axis=1)
    taps = 2 * window.taps * axis.size * seen.sum(axis=1, keepdims=True)
    return ONE if window.size_out == 1 else grouped(np.concatenate([seen, taps], axis=1).astype(float))


@functools.cache
def tap_means(window: Window, axis: Axis, out: Axis) -> np.ndarray:
    """Mean number of taps of each class of output in each class of input, (C_out, C_in)."""
    at = hits(window, axis.size)
    table = np.zeros((out.classes, axis.classes))
    p, t = np.nonzero(at >= 0)
    np.add.at(table, (out.label_array[p], axis.label_array[at[p, t]]), 1.0)
    return table / out.counts[:, None]


@functools.cache
def tap_pairs(window: Window, axis: Axis, out: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Mean number of tap pairs for each type of output pair and of input pair, (types_out, types_in).

    Returns:
        For pairs of the same tap; for pairs of two different taps.
    """
    at = hits(window, axis.size)
    p, t = np.nonzero(at >= 0)
    i = at[p, t]
    co, ci = out.classes, axis.classes
    c, d = out.label_array[p], axis.label_array[i]
    by_tap = np.zeros((window.taps, co, ci))
    np.add.at(by_tap, (t, c, d), 1.0)
    by_place = np.zeros((window.size_out, ci))
    np.add.at(by_place, (p, d), 1.0)
    by_input = np.zeros((axis.size, co))
    np.add.at(by_input, (i, c), 1.0)
    members, inputs = np.eye(co)[out.label_array], np.eye(ci)[axis.label_array]
    same, other = (np.zeros((co + co * co, ci + ci * ci)) for _ in range(2))
    total = by_tap.sum(axis=0)
    # One output: a tap with itself, and two taps, which read two inputs.
    same[:co, :ci] = total
    within = np.einsum("pc,pd,pe->cde", members, by_place, by_place)
    two = within - np.einsum("cd,de->cde", total, np.eye(ci))
    other[:co, ci:] = two.reshape(co, ci * ci)
    # Two outputs: one tap reads two inputs; two taps may read one.
    shared = np.einsum("tcd,tef->cedf", by_tap, by_tap) - np.einsum("cd,ce,df->cedf", total, np.eye(co), np.eye(ci))
    same[co:, ci:] = shared.reshape(co * co, ci * ci)
    meet = np.einsum("ic,ie,id->ced", by_input, by_input, inputs) - np.einsum("cd,ce->ced", total, np.eye(co))
    other[co:, :ci] = meet.reshape(co * co, ci)
    everything = np.einsum("cd,ef->cedf", total, total) - np.einsum("ce,cdf->cedf", np.eye(co), within)
    rest = everything - shared - np.einsum("ced,df->cedf", meet, np.eye(ci))
    other[co:, ci:] = rest.reshape(co * co, ci * ci)
    pairs = np.maximum(out.pairs, 1e-300)[:, None] * (out.pairs > 0)[:, None] + (out.pairs <= 0)[:, None]
    return same / pairs, other / pairs


@functools.cache
def tap_reads(window: Window, axis: Axis) -> np.ndarray:
    """Mean number of taps for each type of pair (output, place) and of pair (what the tap reads, that place).

    Args:
        window: how it is read, as many outputs as inputs.
        axis: the places.
    """
    n, classes = axis.counts, axis.classes
    p, t = np.nonzero((at := hits(window, axis.size)) >= 0)
    i = at[p, t]
    c, d = axis.label_array[p], axis.label_array[i]
    own, to_other = p == i, classes + d * classes + c
    table = np.zeros((axis.types, axis.types))
    # The place is the output's own: one tap may read it, the rest read others.
    np.add.at(table, (c, np.where(own, d, to_other)), 1.0)
    # The place is any other: a tap may read it, too.
    rest = np.zeros((classes,) * 4)  # class of the output, of the place; of what is read, of the place
    taps = np.zeros((classes, classes))
    np.add.at(taps, (c, d), 1.0)
    for e in range(classes):
        rest[:, e, :, e] = taps * n[e]
    np.subtract.at(rest, (c, c, d, c), 1.0)
    np.subtract.at(rest, (c[~own], d[~own], d[~own], d[~own]), 1.0)
    np.add.at(table, (classes + c[~own] * classes + d[~own], d[~own]), 1.0)
    table[classes:, classes:] = rest.reshape(classes**2, classes**2)
    return table / np.where(axis.pairs > 0, axis.pairs, 1.0)[:, None]


def squeeze_types(matrix: np.ndarray, out: Axis, axis: Axis) -> np.ndarray:
    """Only the type "same" where an axis has one position."""
    return matrix[: 1 if out.size == 1 else None, : 1 if axis.size == 1 else None]


class Conv(Node):
    """A convolution; `params` is (groups, windows, x's dims, w's dims, out's dims, logical axes).

    Dims say which axis of the node is (batch, channel, space...) of x and of the output, (out, in, taps...) of w; None: size 1.
    """

    def prepare(self) -> None:
        x, w = (v.node for v in self.args)
        self.odd = (x.odd & w.unseen) | (w.odd & x.unseen)
        # A sum of few terms (a depthwise one has nine) is not Gaussian, and its sign follows the channel it reads.
        self.gradient_doubt = _FEW_TERMS / self.width

    def _axes(self, node: Node, dims: Sequence[int | None]) -> list[Axis]:
        return [ONE if k is None else node.axes[k] for k in dims]

    def _logical(self, array: np.ndarray, dims: Sequence[int | None]) -> np.ndarray:
        """An array over a node's axes as one over the logical dims."""
        out = array.transpose([k for k in dims if k is not None])
        return out[tuple(None if k is None else slice(None) for k in dims)]

    @property
    def width(self) -> float:
        """Terms in a sum."""
        groups, windows, xd, *_ = self.params
        x_axes = self._axes(self.args[0].node, xd)
        return x_axes[1].size / groups * math.prod(w.taps for w in windows)

    def channels(self) -> dict[int, np.ndarray]:
        """Channel pairs behind a pair of output channels, (types_out, types_in): by w's same (0) and another (1) input."""
        groups, _, xd, _wd, od = self.params
        c = self._axes(self.args[0].node, xd)[1]
        o = self._axes(self, od)[1]
        own = c.size / groups
        # Within one group the channels agree with w's input index: the counts of all channels, thinned by the groups.
        agree = np.concatenate([c.counts, np.zeros(c.types - c.classes)]) / groups
        differ = np.concatenate([np.zeros(c.classes), c.pairs[c.classes :]])
        differ *= own * (own - 1) / max(differ.sum(), 1e-300)
        apart_same, apart_other = (np.concatenate([np.zeros(c.classes), c.pairs[c.classes :]]) for _ in range(2))
        apart_same *= own / max(apart_same.sum(), 1e-300)
        apart_other *= own * (own - 1) / max(apart_other.sum(), 1e-300)
        together = (o.size / groups - 1) / (o.size - 1) if o.size > 1 and groups > 1 else 1.0
        tables = []
        for inside, outside in ((agree, apart_same), (differ, apart_other)):
            rows = np.repeat((together * inside + (1 - together) * outside)[None], o.types, 0)
            rows[: o.classes] = inside
            if o.size == 1:
                rows = rows[:1]
            tables.append(rows[:, :1] if c.size == 1 else rows)
        return {0: tables[0], 1: tables[1]}

    def spaces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        _groups, windows, xd, _wd, od = self.params
        xs, os = self._axes(self.args[0].node, xd)[2:], self._axes(self, od)[2:]
        out = []
        for window, a, o in zip(windows, xs, os, strict=True):
            same, other = tap_pairs(window, a, o)
            out.append((squeeze_types(same, o, a), squeeze_types(other, o, a)))
        return out

    def carry(self, x_second: np.ndarray, w_second: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Second moments by type of the output, from those of input and weights (logical dims); or of the input's cotangent."""
        _groups, _windows, xd, wd, od = self.params
        channel, space = self.channels(), self.spaces()
        x_axes, o_axes = self._axes(self.args[0].node, xd), self._axes(self, od)
        w_axes = self._axes(self.args[1].node, wd)
        reads = [range(1) if w_axes[k].size == 1 else range(w_axes[k].types) for k in range(1, len(w_axes))]
        result = 0.0
        for index in np.ndindex(*[len(r) for r in reads]):
            weight = w_second[(slice(None), *index)]
            if not np.any(weight):
                continue
            # Classes within w's own axes do not change how its taps meet the input.
            kinds = [int(t >= w_axes[k + 1].classes) for k, t in enumerate(index)]
            share = math.prod(
                w_axes[k + 1].pairs[t] / w_axes[k + 1].pairs[_block(w_axes[k + 1], kinds[k])].sum()
                if w_axes[k + 1].size > 1
                else 1.0
                for k, t in enumerate(index)
            )
            maps = [channel[kinds[0]], *(space[k][kinds[k + 1]] for k in range(len(space)))]
            term = x_second
            if transposed:
                shape = [1] * term.ndim
                shape[1] = -1
                term = term * weight.reshape(shape)
            for k, matrix in enumerate(maps):
                o, a = o_axes[k + 1], x_axes[k + 1]
                if transposed:
                    po = o.pairs[: matrix.shape[0]]
                    pa = a.pairs[: matrix.shape[1]]
                    matrix = (matrix * po[:, None]).T / np.where(pa > 0, pa, 1.0)[:, None]
                term = apply_axis(term, k + 1, matrix)
            if not transposed:
                shape = [1] * term.ndim
                shape[1] = -1
                term = term * weight.reshape(shape)
            result = result + share * term
        return np.asarray(result)

    def compute(self) -> Table:
        from varscale.theory.propagation.cross_moments import dependent
        from varscale.theory.rules.linear import weight_of

        groups, windows, xd, wd, od = self.params
        if dependent(*(v.node for v in self.args)):
            # A weight that was applied before is as good as fresh; of data with their own crop the terms may all be equal.
            fresh = weight_of(self) is not None
            self.graph.flag(*("quadrature", 1 / self.width) if fresh else ("assumed", UNKNOWN))
        x, w = (v.node.table for v in self.args)
        second = self.carry(self._logical(x.second, xd), self._logical(w.second, wd))
        if second.ndim == 0:  # a kernel of zeros
            second = np.zeros([1 if k is None else self.axes[k].types for k in od])
        mean = np.zeros([1 if k is None else self.axes[k].classes for k in od])
        if np.any(w.mean) and np.any(x.mean):
            x_axes, o_axes = self._axes(self.args[0].node, xd), self._axes(self, od)
            term = self._logical(x.mean, xd)
            channels = x_axes[1].counts[: x_axes[1].classes] / groups
            term = np.repeat(np.tensordot(term, channels, axes=(1, 0))[:, None], o_axes[1].classes, axis=1)
            for k, window in enumerate(windows):
                term = apply_axis(term, k + 2, tap_means(window, x_axes[k + 2], o_axes[k + 2]))
            mean = mean + term * w.total_mean
        return Table(self.axes, self._own(mean, od), self._own(second, od))

    def _own(self, array: np.ndarray, dims: Sequence[int | None]) -> np.ndarray:
        kept = array.reshape([n for n, k in zip(array.shape, dims, strict=True) if k is not None])
        return kept.transpose(np.argsort([k for k in dims if k is not None]))

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        _groups, _windows, xd, wd, od = self.params
        back = self.carry(self._logical(cotangent, od), self._logical(self.args[1].node.table.second, wd), transposed=True)
        if back.ndim == 0:  # a kernel of zeros
            return [np.zeros(self.args[0].node.frame_types), None]
        own = self._own_of(back, xd, self.args[0].node)
        return [own, None]

    def _own_of(self, array: np.ndarray, dims: Sequence[int | None], node: Node) -> np.ndarray:
        out = self._own(array, dims)
        return np.broadcast_to(out, [a.types for a in node.axes])

    def cross_with(self, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
        """One kernel on two inputs."""
        from varscale.theory.domain.tables import lift
        from varscale.theory.propagation.cross_moments import cross
        from varscale.theory.rules.linear import weight_of

        other = b.node
        weights = weight_of(self), weight_of(other)
        if None not in weights and weights[0] is not weights[1]:
            return np.zeros((1,) * len(frame))
        if not isinstance(other, Conv) or other.params != self.params or a.bind != b.bind or other.args[1] != self.args[1]:
            return None
        x, y = self.args[0].node, other.args[0].node
        if x.axes != y.axes:
            return None
        identity = tuple(range(len(x.axes)))
        table = np.broadcast_to(cross(View(x, identity), View(y, identity), x.axes), [ax.types for ax in x.axes])
        second = self.carry(self._logical(table, self.params[2]), self._logical(self.args[1].node.table.second, self.params[3]))
        return lift(self._own(second, self.params[4]), self.axes, a.bind, frame, pairs=True)


def _own_part(x: Node, dims: Sequence[int | None]) -> float:
    """The part of the mean square of a convolution's input that is not common to all places."""
    common = x.table.second
    places = [k for k in dims[2:] if k is not None]
    for k in reversed(range(len(x.axes))):
        common = contract_axis(common, k, x.axes[k].different if k in places else x.axes[k].same)
    return float(np.clip(1 - float(common) / max(x.table.mean_square, 1e-300), 0.0, 1.0)) if places else 1.0


@handed_on.register
def _(node: Conv) -> Spread:
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


@scatter_of.register
def _(node: Conv) -> np.ndarray | None:
    _, windows, xd, _, od = node.params
    taps = math.prod(w.taps for w in windows)
    weights = node.args[1].node
    if taps == 1 or not isinstance(weights, Leaf) or not weights.odd:
        return None
    inputs = node._axes(node.args[0].node, xd)
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
    met = meeting * node.width / taps * (1 + (kurtosis(x) - 3) / 2) * _own_part(x, xd) ** 2
    return np.where(same, 0.0, met / (node.width * (node.width + weights.kurtosis - 1)))


def _block(axis: Axis, kind: int) -> slice:
    return slice(axis.classes, None) if kind else slice(0, axis.classes)


def prepared(x: Value) -> Value:
    """Every dimension one axis of its own, or of size 1."""
    for d in range(len(x.dims)):
        x = layout.merged(layout.materialize(x, [d]), d)
    return x


def axes_of(x: Value, order: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(x.dims[d][0].axis if x.dims[d] else None for d in order)


@rule("conv_general_dilated")
def conv(interpreter: Interpreter, eqn: Any, x: Value, w: Value) -> Value:
    from varscale.theory.rules.linear import strip

    p = eqn.params
    if p["batch_group_count"] != 1:
        raise NotImplementedError("batch_group_count other than 1 (the gradient of a grouped convolution)")
    cx, x = strip(x)
    cw, w = strip(w)
    x, w = prepared(x), prepared(w)
    dims = p["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    xd, wd = axes_of(x, dims.lhs_spec), axes_of(w, dims.rhs_spec)
    windows = tuple(
        Window(shape[dims.out_spec[k + 2]], w.shape[dims.rhs_spec[k + 2]], s, pad[0], ld, rd)
        for k, (s, pad, ld, rd) in enumerate(
            zip(p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
        )
    )
    axes: list[Axis] = []
    od: list[int | None] = []
    logical = [x.node.axes[xd[0]] if xd[0] is not None else ONE, w.node.axes[wd[0]] if wd[0] is not None else ONE]
    logical += [output_axis(win, x.node.axes[k] if k is not None else ONE) for win, k in zip(windows, xd[2:], strict=True)]
    for axis in logical:
        od.append(len(axes) if axis.size > 1 else None)
        if axis.size > 1:
            axes.append(axis)
    views = [View(x.node, tuple(range(len(x.node.axes)))), View(w.node, tuple(range(len(w.node.axes))))]
    node = interpreter.graph.make(Conv, axes, views, (p["feature_group_count"], windows, xd, wd, tuple(od)))
    out: list[tuple[Atom, ...]] = [()] * len(shape)
    for k, d in enumerate(dims.out_spec):
        place = od[k]
        out[d] = (Atom(shape[d], place),) if place is not None else ()
    from varscale.theory.graph.expressions import affine

    return Value(affine(node, cx * cw, 0.0), tuple(out))
